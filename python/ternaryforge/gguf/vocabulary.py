# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that lies in the metadata of a GGUF file: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ternaryforge._core import FormatError
from ternaryforge.bpe_vocabulary import byte_alphabet
from ternaryforge.chat_template import DEFAULT, TURN_ENDS
from ternaryforge.gguf.pre_tokenizers import PRE_TOKENIZERS, find_pre_tokenizer
from ternaryforge.sentencepiece_model import PieceType, SentencePieceModel
from ternaryforge.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelt so in the format
    "pad_token": "padding_token_id",
}
_LLAMA3 = (128256, 280147)  # tokens and merges of files that were written before `pre` was

_ASCII = range(0x20, 0x7F)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a file says of its tokens. `kind` is "gpt2" or "llama"; `ids` are the named tokens, by HF's names.

    `adds_bos` is None where the file does not say. `warnings` are whole sentences.
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[PieceType]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]
    end_ids: tuple[int, ...]
    adds_bos: bool | None
    adds_eos: bool
    space_prefix: bool
    templates: dict[str, str]
    warnings: list[str] = field(default_factory=list)

    @property
    def bos_id(self) -> int | None:
        """The token that starts every text, None where none is added."""
        defaults = {"llama": True, "gpt2": self.pre in {"llama-bpe", "tekken"}}
        adds = defaults[self.kind] if self.adds_bos is None else self.adds_bos
        return self.ids.get("bos_token") if adds else None

    @property
    def named_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and the like with their texts."""
        return {name: self.tokens[index] for name, index in self.ids.items()}


def read_vocabulary(metadata: Mapping[str, Any], *, where: str) -> Vocabulary | None:
    """The vocabulary in the metadata of a file, None where it holds none.

    Raises FormatError for a kind or a way of cutting text that is not supported, by name, and for
    lists whose lengths or values do not fit.
    """
    kind = metadata.get(PREFIX + "model")
    if kind is None or kind in {"none", "no_vocab"}:
        return None
    if kind not in {"gpt2", "llama"}:
        raise _error(where, f"tokenizer.ggml.model {kind!r} is not supported; supported are 'gpt2' and 'llama'")
    tokens = _texts(metadata, "tokens", where)
    if not tokens:
        raise _error(where, "tokenizer.ggml.tokens is missing or empty")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    ids_by_text = {token: index for index, token in enumerate(tokens)}
    if len(ids_by_text) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids_by_text[token] != index)
        raise _error(where, f"the token {twice!r:.80} occurs twice")
    types = _types(metadata, len(tokens), where)
    merges = _texts(metadata, "merges", where) if kind == "gpt2" else []
    warnings: list[str] = []
    template = metadata.get(TEMPLATE)
    templates = {DEFAULT: template} if isinstance(template, str) and template else {}
    for key, value in metadata.items():
        if key.startswith(TEMPLATE + ".") and isinstance(value, str):
            templates[key.removeprefix(TEMPLATE + ".")] = value
    pre = _pre(metadata, kind, (len(tokens), len(merges)), warnings, where)
    ids = {name: _token_id(metadata, key, len(tokens), where) for name, key in _NAMED.items()}
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        scores=_scores(metadata, len(tokens), where) if kind == "llama" else [],
        ids={name: index for name, index in _with_defaults(ids, kind, len(tokens)).items() if index is not None},
        end_ids=_end_ids(metadata, tokens, types, where),
        adds_bos=_flag(metadata, "add_bos_token", where),
        adds_eos=_flag(metadata, "add_eos_token", where) or False,
        space_prefix=_flag(metadata, "add_space_prefix", where) is not False,
        templates=templates,
        warnings=warnings,
    )


def build_tokenizer(vocabulary: Vocabulary, *, where: str) -> Tokenizer:
    """The tokenizer of a vocabulary. Raises FormatError for one that the tokens do not make up."""
    if vocabulary.adds_eos:
        raise _error(where, "tokenizer.ggml.add_eos_token is true, which is not supported for a language model")
    if vocabulary.kind == "llama":
        return Tokenizer.from_sentencepiece_model(
            sentencepiece_model(vocabulary, where=where),
            bos_id=vocabulary.bos_id,
            end_ids=vocabulary.end_ids,
            named_tokens=vocabulary.named_tokens,
            kind="gguf llama",
        )
    return Tokenizer.from_backend(
        _build_bpe(vocabulary, where),
        vocabulary.named_tokens,
        kind="gguf gpt2",
        bos_id=vocabulary.bos_id,
        end_ids=vocabulary.end_ids,
    )


def sentencepiece_model(vocabulary: Vocabulary, *, where: str) -> SentencePieceModel:
    """A `llama` vocabulary as the SentencePiece model that it was made from."""
    unknown = vocabulary.ids.get("unk_token")
    types = list(vocabulary.types)
    if unknown is None:
        raise _error(where, "tokenizer.ggml.unknown_token_id is missing")
    types[unknown] = PieceType.UNKNOWN
    return SentencePieceModel(
        pieces=vocabulary.tokens,
        scores=vocabulary.scores,
        types=types,
        is_bpe=True,
        byte_fallback=PieceType.BYTE in types,
        unknown_id=unknown,
        unknown_text=" \u2047 ",
        bos_id=vocabulary.ids.get("bos_token"),
        eos_id=vocabulary.ids.get("eos_token"),
        add_dummy_prefix=vocabulary.space_prefix,
        remove_extra_whitespaces=False,
        character_map=b"",
    )


def _build_bpe(vocabulary: Vocabulary, where: str) -> Any:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    known = find_pre_tokenizer(vocabulary.pre)
    if known is None:
        raise AssertionError(vocabulary.pre)
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    # Bytes that no text of the training held have no token in some vocabularies.
    missing = [character for character, byte in byte_alphabet().items() if byte in _ASCII and character not in ids]
    if missing:
        raise _error(where, f"the tokens are not byte-level: there is none for {missing[0]!r}")
    pairs = []
    for number, merge in enumerate(vocabulary.merges):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise _error(where, f"merge {number}, {merge!r:.80}, does not join two tokens to a third")
        pairs.append((left, right))
    backend = tokenizers.Tokenizer(models.BPE(ids, pairs, ignore_merges=known.ignore_merges))
    if known.composes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = known.build()
    backend.decoder = decoders.ByteLevel()
    # A token that the model already has keeps its id.
    special = {PieceType.CONTROL, PieceType.UNKNOWN}
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=kind in special, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in special or kind is PieceType.USER_DEFINED
        ]
    )
    return backend


def _pre(metadata: Mapping[str, Any], kind: str, counts: tuple[int, int], warnings: list[str], where: str) -> str:
    """The canonical name of the way to cut text."""
    if kind == "llama":
        return "default"
    name = metadata.get(PREFIX + "pre")
    if name is None:
        if counts == _LLAMA3:
            warnings.append("The file does not say how text is cut; its vocabulary is that of Llama 3: 'llama-bpe'.")
            return "llama-bpe"
        warnings.append(
            "The file does not say how text is cut (tokenizer.ggml.pre): 'default' is taken, as llama.cpp does, "
            "which may differ from what the model was trained with."
        )
        return "default"
    known = find_pre_tokenizer(name) if isinstance(name, str) else None
    if known is None:
        names = ", ".join(name for known in PRE_TOKENIZERS for name in known.names)
        raise _error(where, f"tokenizer.ggml.pre {name!r:.80} is not a known way to cut text; known are {names}")
    return known.names[0]


def _with_defaults(ids: dict[str, int | None], kind: str, count: int) -> dict[str, int | None]:
    """What an engine takes where the file does not say, for `llama` only: 11 for `gpt2` is nobody's intention."""
    if kind != "llama" or count < 3:
        return ids
    defaults = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
    return {name: defaults.get(name) if index is None else index for name, index in ids.items()}


def _end_ids(metadata: Mapping[str, Any], tokens: list[str], types: list[PieceType], where: str) -> tuple[int, ...]:
    """Tokens after which a text ends: those with a key of their own, and those known by name."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = {_token_id(metadata, key, len(tokens), where) for key in keys} - {None}
    ends = {index for index in found if index is not None}
    if _token_id(metadata, "eot_token_id", len(tokens), where) is None:
        # Files rarely say it; engines look for the names.
        ends |= {
            index for index, token in enumerate(tokens) if token in TURN_ENDS and types[index] is PieceType.CONTROL
        }
    return tuple(sorted(ends))


def _texts(metadata: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = metadata.get(PREFIX + name)
    texts = [] if value is None else list(value)
    if isinstance(value, str) or not all(isinstance(text, str) for text in texts):
        raise _error(where, f"tokenizer.ggml.{name} must be a list of texts")
    return texts


def _types(metadata: Mapping[str, Any], count: int, where: str) -> list[PieceType]:
    value = metadata.get(PREFIX + "token_type")
    if value is None:
        return [PieceType.NORMAL] * count
    try:
        types = [PieceType(int(kind)) for kind in value]
    except (TypeError, ValueError) as error:
        raise _error(where, f"tokenizer.ggml.token_type is malformed: {error}") from None
    if len(types) != count:
        raise _error(where, f"tokenizer.ggml.token_type has {len(types)} entries for {count} tokens")
    return types


def _scores(metadata: Mapping[str, Any], count: int, where: str) -> list[float]:
    try:
        scores = [float(score) for score in metadata.get(PREFIX + "scores", ())]
    except (TypeError, ValueError) as error:
        raise _error(where, f"tokenizer.ggml.scores is malformed: {error}") from None
    if len(scores) != count:
        raise _error(where, f"tokenizer.ggml.scores has {len(scores)} entries for {count} tokens")
    return scores


def _token_id(metadata: Mapping[str, Any], key: str, count: int, where: str) -> int | None:
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise _error(where, f"tokenizer.ggml.{key} must be a token id, got {json.dumps(value, default=str)}")
    if value == 0xFFFFFFFF:  # -1, which some writers put for "none"
        return None
    if not 0 <= value < count:
        raise _error(where, f"tokenizer.ggml.{key} is {value}, but there are {count} tokens")
    return value


def _flag(metadata: Mapping[str, Any], key: str, where: str) -> bool | None:
    value = metadata.get(PREFIX + key)
    if value is not None and not isinstance(value, bool):
        raise _error(where, f"tokenizer.ggml.{key} must be true or false, got {value!r:.80}")
    return value


def _error(where: str, text: str) -> FormatError:
    return FormatError(f"[gguf] '{where}': {text}")
