# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: whatever tokenizer files a checkpoint folder holds.

Decoding works on the bytes of each token, so that the pieces of a stream, joined, are exactly the
text of the whole, and a character whose bytes lie in several tokens appears when it is complete.
"""

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ternaryforge._core import FormatError
from ternaryforge.bpe_vocabulary import (
    MAX_FILE_BYTES,
    build_tiktoken,
    build_vocab_and_merges,
    byte_alphabet,
    is_tiktoken,
)
from ternaryforge.checkpoint import read_json, read_text
from ternaryforge.sentencepiece_model import SPACE, PieceType, SentencePieceModel

if TYPE_CHECKING:
    import tokenizers

JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
FILES = (
    JSON_FILE,
    MODEL_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    VOCAB_FILE,
    MERGES_FILE,
    "chat_template.jinja",
    "chat_template.json",
)
"""What belongs to a tokenizer in a checkpoint folder: copied along by converters."""


class Tokenizer:
    """The tokenizer of one model.

    `bos_id` is the token that starts every text, None where the tokenizer adds none. `eos_ids` are
    the tokens after which a text ends. `kind` is "tokenizer.json", "sentencepiece", "tiktoken",
    "vocab.json" (with merges.txt), "gguf gpt2" or "gguf llama".
    `leading_spaces` is how many spaces in front of a whole text are the tokenizer's own. `texts` are
    tokens that stand for another text than their name. `special_tokens` are the special tokens by
    name, `named_tokens` the names of `bos_token`, `eos_token` and the like, where it has them.
    `encode_continuation` encodes the text behind a special token, where `backend` would not look for those.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        kind: str,
        bos_id: int | None,
        eos_ids: Iterable[int],
        special_ids: Iterable[int],
        byte_level: bool,
        leading_spaces: int,
        texts: Mapping[int, str] | None = None,
        special_tokens: Mapping[str, int] | None = None,
        named_tokens: Mapping[str, str] | None = None,
        encode_continuation: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.backend = backend
        self.kind = kind
        self.bos_id = bos_id
        self.eos_ids = tuple(sorted(set(eos_ids)))
        self.special_ids = frozenset(special_ids)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._byte_level = byte_level
        self._encode_continuation = encode_continuation
        self.texts = texts or {}
        self.special_tokens = dict(special_tokens or {})
        self.named_tokens = dict(named_tokens or {})
        self.leading_spaces = leading_spaces

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """The tokenizer of a checkpoint folder, or None where it holds none."""
        if (folder / JSON_FILE).is_file():
            return cls._from_json(folder)
        if (folder / MODEL_FILE).is_file():
            with (folder / MODEL_FILE).open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            return cls._from_tiktoken(folder, data) if is_tiktoken(data) else cls._from_sentencepiece(folder)
        if (folder / VOCAB_FILE).is_file() and (folder / MERGES_FILE).is_file():
            return cls._from_vocab_and_merges(folder)
        return None

    @classmethod
    def _from_json(cls, folder: Path) -> Self:
        import tokenizers

        path = folder / JSON_FILE
        text = read_text(path, limit=MAX_FILE_BYTES, what="tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
            description: dict[str, Any] = json.loads(text)
        except Exception as error:  # noqa: BLE001 - the package raises Exception itself
            raise FormatError(f"[tokenizer] '{path}' cannot be read: {error}") from None
        byte_level, leading_spaces = _decoder_kind(path, description)
        backend.no_padding()
        backend.no_truncation()
        names = _named_tokens(folder)
        return cls.from_backend(
            backend,
            names,
            kind=JSON_FILE,
            bos_id=_bos_of_json(backend, folder, names),
            byte_level=byte_level,
            leading_spaces=leading_spaces,
        )

    @classmethod
    def _from_tiktoken(cls, folder: Path, data: bytes) -> Self:
        config = _config(folder)
        backend, known = build_tiktoken(folder / MODEL_FILE, data, config)
        names = {"bos_token": known.bos_token, "eos_token": known.eos_token} | _named_tokens(folder)
        wants_bos = config.get("add_bos_token", True)
        bos_id = backend.token_to_id(names["bos_token"]) if wants_bos else None
        return cls.from_backend(backend, names, kind="tiktoken", bos_id=bos_id)

    @classmethod
    def _from_vocab_and_merges(cls, folder: Path) -> Self:
        config = _config(folder)
        backend = build_vocab_and_merges(folder, config)
        names = _named_tokens(folder)
        wants_bos = config.get("add_bos_token", False) and "bos_token" in names
        bos_id = backend.token_to_id(names["bos_token"]) if wants_bos else None
        return cls.from_backend(backend, names, kind=VOCAB_FILE, bos_id=bos_id)

    @classmethod
    def from_backend(
        cls,
        backend: "tokenizers.Tokenizer",
        names: Mapping[str, str],
        *,
        kind: str,
        bos_id: int | None,
        byte_level: bool = True,
        leading_spaces: int = 0,
        end_ids: Iterable[int] = (),
    ) -> Self:
        """A tokenizer of the `tokenizers` package; `names` are those of its `bos_token`, `eos_token` and the like.

        Texts end after the `eos_token` and after `end_ids`.
        """
        special = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        eos_id = backend.token_to_id(names["eos_token"]) if "eos_token" in names else None
        return cls(
            backend,
            kind=kind,
            bos_id=bos_id,
            eos_ids=[*end_ids, *([] if eos_id is None else [eos_id])],
            special_ids=special.values(),
            byte_level=byte_level,
            leading_spaces=leading_spaces,
            special_tokens=special,
            named_tokens=names,
        )

    @classmethod
    def _from_sentencepiece(cls, folder: Path) -> Self:
        model = SentencePieceModel.read(folder / MODEL_FILE)
        config = _config(folder)
        return cls.from_sentencepiece_model(
            model,
            kind="sentencepiece",
            bos_id=model.bos_id if config.get("add_bos_token", True) else None,
            end_ids=[] if model.eos_id is None else [model.eos_id],
            named_tokens=_named_tokens(folder),
            legacy=bool(config.get("legacy")),
        )

    @classmethod
    def from_sentencepiece_model(
        cls,
        model: SentencePieceModel,
        *,
        kind: str,
        bos_id: int | None,
        end_ids: Iterable[int],
        named_tokens: Mapping[str, str],
        legacy: bool = False,
    ) -> Self:
        """The tokenizer of a SentencePiece model; `legacy` puts a space behind special tokens."""
        backend = model.build()
        leading_spaces = sys.maxsize if model.remove_extra_whitespaces else int(model.add_dummy_prefix)
        control = [index for index, piece_type in enumerate(model.types) if piece_type is PieceType.CONTROL]
        special = {model.pieces[index]: index for index in control}
        ends = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unknown_id}
        named = {name: model.pieces[index] for name, index in ends.items() if index is not None}

        def encode_plain(text: str) -> list[int]:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
            return ids

        return cls(
            backend,
            kind=kind,
            bos_id=bos_id,
            eos_ids=end_ids,
            texts={model.unknown_id: model.unknown_text},
            special_ids=special.values(),
            byte_level=False,
            leading_spaces=leading_spaces,
            special_tokens=special,
            named_tokens=named | dict(named_tokens),
            encode_continuation=encode_plain if legacy else partial(model.encode_continuation, backend),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; starts with `bos_id` where there is one and it is asked for.

        Raises ValueError for half a surrogate pair, which is how Python holds bytes that are not UTF-8.
        """
        _check_text(text)
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if add_special_tokens and self.bos_id is not None:
            return [self.bos_id, *ids]
        return ids

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of the text of a chat template, in which special tokens are written by their names."""
        if self._encode_continuation is None or not self.special_tokens:
            return self.encode(text, add_special_tokens=False)
        _check_text(text)
        # SentencePiece itself never finds special tokens in a text. The longest goes first.
        names = sorted(self.special_tokens, key=len, reverse=True)
        first, *others = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        ids = self.encode(first, add_special_tokens=False) if first else []
        for part in others:
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self._encode_continuation(part)
        return ids

    def decode(self, token_ids: Sequence[int], *, continuation: bool = False) -> str:
        """The text of token ids, without special tokens; U+FFFD for what is not UTF-8.

        `continuation`: the ids follow other text, so that a leading space belongs to them.
        """
        stream = DecodeStream(self, continuation=continuation)
        return "".join(map(stream.push, token_ids)) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for special tokens and unused ids."""
        if token_id in self.special_ids:
            return b""
        if token_id in self.texts:
            return self.texts[token_id].encode()
        token = self.backend.id_to_token(token_id) or ""
        is_added = token_id in self._added_ids
        if self._byte_level:
            # Added tokens, and others not written in the byte alphabet, stand for themselves.
            if is_added or not _BYTE_OF_CHARACTER.keys() >= set(token):
                return token.encode()
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None and not is_added:
            return bytes.fromhex(byte[1])
        return token.replace(SPACE, " ").encode()

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())


class DecodeStream:
    """Turns tokens into text one by one and holds unfinished characters back."""

    def __init__(self, tokenizer: Tokenizer, *, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._leading_spaces = 0 if continuation else tokenizer.leading_spaces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        data = self._tokenizer.token_bytes(token_id)
        if token_id in self._tokenizer.texts:  # its spaces are meant
            self._leading_spaces = 0
        while self._leading_spaces and data.startswith(b" "):
            self._leading_spaces -= 1
            data = data[1:]
        if data:
            self._leading_spaces = 0
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character."""
        return self._decoder.decode(b"", final=True)


_BYTE_OF_CHARACTER = byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"[tokenizer] the text was not UTF-8: character {error.start} is {text[error.start]!a}, which is no "
            "character; write the text in UTF-8"
        ) from None


def _decoder_kind(path: Path, description: dict[str, Any]) -> tuple[bool, int]:
    """(byte level, leading spaces to remove) of the `decoder` entry of a tokenizer.json."""
    decoder = description.get("decoder")
    steps: list[dict[str, Any]] = []
    if isinstance(decoder, dict):
        steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return True, 0
    if kinds == ["Metaspace"]:
        scheme = steps[0].get("prepend_scheme", "always")
        return False, int(scheme != "never" and steps[0].get("add_prefix_space", True))
    known = {"Replace", "ByteFallback", "Fuse", "Strip"}
    if kinds and kinds[0] == "Replace" and set(kinds) <= known and _is_metaspace(steps[0]):
        return False, sum(step.get("start", 0) for step in steps if step.get("type") == "Strip")
    raise FormatError(
        f"[tokenizer] '{path}' has the decoder {kinds or None}; supported are byte-level BPE and "
        "SentencePiece style (Metaspace, or Replace with ByteFallback)"
    )


def _is_metaspace(step: dict[str, Any]) -> bool:
    return step.get("pattern") == {"String": SPACE} and step.get("content") == " "


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _named_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and the like: name -> content, from whichever file names them."""
    tokens: dict[str, str] = {}
    path = folder / "special_tokens_map.json"
    for source in (read_json(path) if path.is_file() else {}, _config(folder)):
        for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
            value = source.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
    return tokens


def _bos_of_json(backend: "tokenizers.Tokenizer", folder: Path, names: dict[str, str]) -> int | None:
    """`add_bos_token` decides where it is given, else whether the post-processor adds a token."""
    wanted = _config(folder).get("add_bos_token")
    if wanted is False:
        return None
    if wanted is True and "bos_token" in names:
        index: int | None = backend.token_to_id(names["bos_token"])
        return index
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    return full[0] if full[:1] != plain[:1] else None
