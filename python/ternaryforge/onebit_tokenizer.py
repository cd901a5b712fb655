# SPDX-License-Identifier: Apache-2.0
"""The tokenizer inside a `.1bit` file: merges and bytes of tokens, as docs/reference/onebit.md says.

Two kinds of tokenizers can be told to a small program: byte-level BPE that cuts words by the
pattern of GPT-2, and BPE over characters as SentencePiece does it.
"""

import json
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge._core import FormatError
from ternaryforge.bpe_vocabulary import byte_alphabet
from ternaryforge.sentencepiece_model import SPACE
from ternaryforge.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

NO_TEXT, BYTE_LEVEL, SENTENCEPIECE = 0, 1, 2
_NO_TOKEN = 0xFFFFFFFF
_HEADER = struct.Struct("<9I4x")
_ADDS_SPACE, _TIDIES_SPACES = 1, 2
_NORMAL, _SPECIAL, _BYTE, _UNKNOWN = 0, 1, 2, 3
_TYPES = (_NORMAL, _SPECIAL, _BYTE, _UNKNOWN)
_UNKNOWN_TEXT = " \u2047 "

# The steps of normalisers that SentencePiece models have, as the `tokenizers` package writes them.
_OUTER, _RUN = rf"\A +|[ {SPACE}]+\z", " {2,}"
_TIDY = [
    {"type": "Replace", "pattern": {"Regex": _OUTER}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": _RUN}, "content": " "},
]
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


@dataclass(frozen=True, slots=True)
class StoredTokenizer:
    """What a file says of its tokenizer. `names` are the bytes of each token, `types` what it is."""

    kind: int
    bos_id: int | None
    end_ids: tuple[int, ...]
    unknown_id: int | None
    adds_space: bool
    tidies_spaces: bool
    names: tuple[bytes, ...]
    types: tuple[int, ...]
    merges: tuple[tuple[int, int, int], ...]  # left, right, result; the earliest first

    def build(self) -> Tokenizer | None:
        """The tokenizer for Python; None for a file that knows only the ids of its end tokens."""
        if self.kind == NO_TEXT:
            return None
        import tokenizers
        from tokenizers import AddedToken, normalizers, pre_tokenizers

        byte_level = self.kind == BYTE_LEVEL
        tokens = [self._token(index, byte_level=byte_level) for index in range(len(self.names))]
        backend = tokenizers.Tokenizer(self._bpe(tokens, byte_fallback=not byte_level))
        if byte_level:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            steps: list[normalizers.Normalizer] = []
            if self.tidies_spaces:
                steps += [
                    normalizers.Replace(tokenizers.Regex(_OUTER), ""),
                    normalizers.Replace(tokenizers.Regex(_RUN), " "),
                ]
            if self.adds_space:
                steps.append(normalizers.Prepend(SPACE))
            backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
        special = {tokens[index]: index for index, kind in enumerate(self.types) if kind == _SPECIAL}
        if byte_level:
            backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        return Tokenizer(
            backend,
            kind=".1bit",
            bos_id=self.bos_id,
            eos_ids=self.end_ids,
            special_ids=special.values(),
            byte_level=byte_level,
            leading_spaces=sys.maxsize if self.tidies_spaces else int(self.adds_space),
            texts={index: self.names[index].decode() for index, kind in enumerate(self.types) if kind == _UNKNOWN},
            special_tokens=special,
        )

    def _bpe(self, tokens: Sequence[str], *, byte_fallback: bool) -> "tokenizers.models.BPE":
        from tokenizers import models

        try:
            return models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=[(tokens[left], tokens[right]) for left, right, _ in self.merges],
                byte_fallback=byte_fallback,
                fuse_unk=byte_fallback,
                unk_token=None if self.unknown_id is None else tokens[self.unknown_id],
            )
        except Exception as error:  # noqa: BLE001 - the package raises Exception itself
            raise FormatError(f"the tokenizer's tokens and merges do not fit: {error}") from None

    def _token(self, index: int, *, byte_level: bool) -> str:
        name = self.names[index]
        match self.types[index]:
            case 0 if byte_level:
                return "".join(_CHARACTER_OF_BYTE[byte] for byte in name)
            case 0:
                return name.decode().replace(" ", SPACE)
            case 2:
                return f"<0x{name[0]:02X}>"
            case 3:
                return "<unk>"
        return name.decode()


_CHARACTER_OF_BYTE = {byte: character for character, byte in byte_alphabet().items()}


# ---- From a tokenizer ----


def store_tokenizer(tokenizer: Tokenizer | None, eos_ids: Sequence[int]) -> tuple[StoredTokenizer, str | None]:
    """What a file can say of a tokenizer, and, where that is only its end tokens, the reason."""
    if tokenizer is None:
        return _without_text(eos_ids), "the model has no tokenizer"
    description: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    problem = _problem(description)
    if problem is not None:
        return _without_text(eos_ids), problem
    model = description["model"]
    kind = BYTE_LEVEL if description["pre_tokenizer"] is not None else SENTENCEPIECE
    ids: dict[str, int] = model["vocab"] | {token["content"]: token["id"] for token in description["added_tokens"]}
    tokens = {index: token for token, index in ids.items()}
    if sorted(tokens) != list(range(len(tokens))):
        return _without_text(eos_ids), "its token ids leave gaps"
    unknown = ids.get(model["unk_token"]) if model["unk_token"] is not None else None
    types = tuple(_type_of(tokenizer, tokens[index], index, unknown, kind) for index in range(len(tokens)))
    names = []
    for index, type_ in enumerate(types):
        if type_ == _UNKNOWN:
            names.append(tokenizer.texts.get(index, _UNKNOWN_TEXT).encode())
        else:
            names.append(tokens[index].encode() if type_ == _SPECIAL else tokenizer.token_bytes(index))
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    stored = StoredTokenizer(
        kind=kind,
        bos_id=tokenizer.bos_id,
        end_ids=tuple(eos_ids),
        unknown_id=unknown,
        adds_space=_PREPEND in _steps(description["normalizer"]),
        tidies_spaces=_TIDY[0] in _steps(description["normalizer"]),
        names=tuple(names),
        types=types,
        merges=tuple((ids[left], ids[right], ids[left + right]) for left, right in pairs),
    )
    return stored, None


def _without_text(eos_ids: Sequence[int]) -> StoredTokenizer:
    return StoredTokenizer(NO_TEXT, None, tuple(eos_ids), None, False, False, (), (), ())


def _problem(description: dict[str, Any]) -> str | None:
    """Why a small program could not cut text as this tokenizer does."""
    model, splitter, normalizer = description["model"], description["pre_tokenizer"], description["normalizer"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    if any(model.get(option) for option in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")):
        return "its BPE has options that a .1bit file cannot say"
    if any(not token["special"] for token in description["added_tokens"]):
        return "it has added tokens that are not special"
    if splitter is not None:
        plain = splitter["type"] == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]
        return None if plain and normalizer is None else "it cuts words by another pattern than GPT-2"
    steps = _steps(normalizer)
    tidy = [step for step in steps if step in _TIDY]
    rest = [step for step in steps if step not in _TIDY]
    known = tidy in ([], _TIDY) and rest in ([_REPLACE], [_PREPEND, _REPLACE]) and steps == tidy + rest
    return None if known else "it normalises text"


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    return list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]


def _type_of(tokenizer: Tokenizer, token: str, index: int, unknown: int | None, kind: int) -> int:
    if index == unknown:
        return _UNKNOWN
    if index in tokenizer.special_ids:
        return _SPECIAL
    is_byte = kind == SENTENCEPIECE and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return _BYTE if is_byte else _NORMAL


# ---- Bytes ----


def pack_tokenizer(tokenizer: StoredTokenizer) -> bytes:
    """The section of the file that holds a tokenizer."""
    text = b"".join(tokenizer.names)
    offsets = np.cumsum([0, *map(len, tokenizer.names)], dtype="<u4")
    normal = [index for index, kind in enumerate(tokenizer.types) if kind == _NORMAL]
    ordered = sorted(normal, key=lambda index: tokenizer.names[index])
    byte_ids = np.full(256, _NO_TOKEN, "<u4")
    byte_type = _NORMAL if tokenizer.kind == BYTE_LEVEL else _BYTE
    for index, (name, kind) in enumerate(zip(tokenizer.names, tokenizer.types, strict=True)):
        if kind == byte_type and len(name) == 1:
            byte_ids[name[0]] = index
    merges = sorted((left, right, rank, result) for rank, (left, right, result) in enumerate(tokenizer.merges))
    types = np.array(tokenizer.types, np.uint8).tobytes()
    header = _HEADER.pack(
        tokenizer.kind,
        _NO_TOKEN if tokenizer.bos_id is None else tokenizer.bos_id,
        _ADDS_SPACE * tokenizer.adds_space | _TIDIES_SPACES * tokenizer.tidies_spaces,
        _NO_TOKEN if tokenizer.unknown_id is None else tokenizer.unknown_id,
        len(tokenizer.end_ids),
        len(tokenizer.names),
        len(ordered),
        len(merges),
        len(text),
    )
    numbers = [np.array(tokenizer.end_ids, "<u4"), offsets, np.array(ordered, "<u4"), byte_ids]
    padding = bytes(-len(types) % 4)
    table = np.array(merges, "<u4").tobytes()
    return header + b"".join(part.tobytes() for part in numbers) + types + padding + table + text


class _Section:
    """Takes arrays one after the other from bytes."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data = data
        self._next = 0

    def take(self, count: int, dtype: str) -> NDArray[Any]:
        size = count * np.dtype(dtype).itemsize
        if size > len(self._data) - self._next:
            raise FormatError("the tokenizer is cut off")
        part = self._data[self._next : self._next + size]
        self._next += size
        return part.view(dtype)


def unpack_tokenizer(data: NDArray[np.uint8]) -> StoredTokenizer:
    """Reads the section at the start of `data`. Raises FormatError for one that is damaged."""
    section = _Section(data)
    fields = section.take(_HEADER.size, "u1").view("<u4").tolist()
    kind, bos_id, flags, unknown, ends, count, ordered, merge_count, text_size = fields[:9]
    if kind not in {NO_TEXT, BYTE_LEVEL, SENTENCEPIECE} or flags & ~(_ADDS_SPACE | _TIDIES_SPACES):
        raise FormatError(f"the tokenizer is of the unknown kind {kind} (flags {flags:#x})")
    end_ids = section.take(ends, "<u4").tolist()
    offsets = section.take(count + 1, "<u4").astype(np.int64)
    section.take(ordered + 256, "<u4")  # indices for the C program; they follow from the rest
    types = section.take(count + -count % 4, "u1")[:count].tolist()
    merges = section.take(4 * merge_count, "<u4").reshape(-1, 4).astype(np.int64)
    text = section.take(text_size, "u1").tobytes()
    if (np.diff(offsets) < 0).any() or offsets[-1] > text_size:
        raise FormatError("the texts of the tokenizer's tokens are out of order")
    if merges.size and merges[:, [0, 1, 3]].max() >= count:
        raise FormatError("a merge of the tokenizer names a token that there is not")
    if set(types) - set(_TYPES):
        raise FormatError(f"the tokenizer has a token of the unknown type {max(types)}")
    for name, token in (("bos", bos_id), ("unknown", unknown)):
        if token != _NO_TOKEN and token >= count:
            raise FormatError(f"the {name} token {token} of the tokenizer does not exist")
    names = tuple(text[begin:end] for begin, end in pairwise(offsets))
    if any(kind_ == _BYTE and len(name) != 1 for name, kind_ in zip(names, types, strict=True)):
        raise FormatError("a token that stands for a byte is not one byte long")
    return StoredTokenizer(
        kind=kind,
        bos_id=None if bos_id == _NO_TOKEN else bos_id,
        end_ids=tuple(end_ids),
        unknown_id=None if unknown == _NO_TOKEN else unknown,
        adds_space=bool(flags & _ADDS_SPACE),
        tidies_spaces=bool(flags & _TIDIES_SPACES),
        names=names,
        types=tuple(types),
        merges=tuple((left, right, result) for left, right, _, result in merges[np.argsort(merges[:, 2])].tolist()),
    )
