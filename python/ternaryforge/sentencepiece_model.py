# SPDX-License-Identifier: Apache-2.0
"""SentencePiece `tokenizer.model` files, read without protobuf and rebuilt with `tokenizers`.

The file is one protobuf message, `ModelProto` of sentencepiece_model.proto: the pieces with their
scores and types, and how text is normalised before it is cut. Every length is checked.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from ternaryforge._core import FormatError

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import normalizers

SPACE = "\u2581"  # the lower one eighth block that stands for a space in pieces


class PieceType(IntEnum):
    """`SentencePiece.Type` of sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a tokenizer needs of the file. An id of None: the model has no such token."""

    pieces: list[str]
    scores: list[float]
    types: list[PieceType]
    is_bpe: bool
    byte_fallback: bool
    unknown_id: int
    unknown_text: str
    bos_id: int | None
    eos_id: int | None
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    character_map: bytes

    @classmethod
    def read(cls, path: Path) -> "SentencePieceModel":
        """Reads a `tokenizer.model`. Raises FormatError for a malformed or unsupported one."""
        data = path.read_bytes()
        try:
            return _parse_model(data)
        except FormatError as error:
            raise FormatError(f"[tokenizer] '{path}': {error}") from None

    def to_bytes(self) -> bytes:
        """The `tokenizer.model` of this model, as `read` reads it."""
        rows = zip(self.pieces, self.scores, self.types, strict=True)
        pieces = [_message({1: piece.encode(), 2: float(score), 3: int(kind)}) for piece, score, kind in rows]
        none = (1 << 64) - 1  # -1
        trainer: dict[int, int | bytes] = {
            3: 2 if self.is_bpe else 1,
            4: len(self.pieces),
            35: int(self.byte_fallback),
            40: self.unknown_id,
            41: none if self.bos_id is None else self.bos_id,
            42: none if self.eos_id is None else self.eos_id,
            43: none,
            44: self.unknown_text.encode(),
        }
        normalizer: dict[int, int | bytes] = {
            1: b"identity" if not self.character_map else b"custom",
            2: self.character_map,
            3: int(self.add_dummy_prefix),
            4: int(self.remove_extra_whitespaces),
            5: 1,
        }
        messages = _message({2: _message(trainer), 3: _message(normalizer)})
        return b"".join(_message({1: piece}) for piece in pieces) + messages

    def build(self) -> "tokenizers.Tokenizer":
        """The same tokenizer in the `tokenizers` package; it adds no special tokens by itself."""
        import tokenizers
        from tokenizers import pre_tokenizers

        tokenizer = tokenizers.Tokenizer(self._bpe() if self.is_bpe else self._unigram())
        tokenizer.normalizer = self._normalizer(prefix=self.add_dummy_prefix)
        if self._user_defined:
            # They are cut out first, the longest one where several begin.
            longest_first = sorted(self._user_defined, key=len, reverse=True)
            pattern = tokenizers.Regex("|".join(map(re.escape, longest_first)))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
        return tokenizer

    def encode_continuation(self, tokenizer: "tokenizers.Tokenizer", text: str) -> list[int]:
        """Token ids of a text that follows another one: `build`'s tokenizer, without the space in front."""
        text = self._normalizer(prefix=False).normalize_str(text)
        before = tokenizer.pre_tokenizer
        parts = [text] if before is None else [part for part, _ in before.pre_tokenize_str(text)]
        return [token.id for part in parts for token in tokenizer.model.tokenize(part)]

    def _normalizer(self, *, prefix: bool) -> "normalizers.Normalizer":
        import tokenizers
        from tokenizers import normalizers

        steps: list[normalizers.Normalizer] = []
        if self.character_map:
            steps.append(normalizers.Precompiled(self.character_map))
        if self.remove_extra_whitespaces:
            steps.append(normalizers.Replace(tokenizers.Regex(rf"\A +|[ {SPACE}]+\z"), ""))
            steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
        if prefix:
            steps.append(normalizers.Prepend(SPACE))
        steps.append(normalizers.Replace(" ", SPACE))
        return normalizers.Sequence(steps)

    @property
    def _user_defined(self) -> list[str]:
        typed = zip(self.pieces, self.types, strict=True)
        return [piece for piece, kind in typed if kind is PieceType.USER_DEFINED]

    def _bpe(self) -> "tokenizers.models.BPE":
        """SentencePiece joins the neighbours whose union has the best score: ranks by that score."""
        from tokenizers import models

        ids = {piece: index for index, piece in enumerate(self.pieces)}
        joinable = {
            piece: index
            for piece, index in ids.items()
            if self.types[index] in {PieceType.NORMAL, PieceType.USER_DEFINED}
        }
        merges: list[tuple[float, int, int, str, str]] = []
        for piece, index in joinable.items():
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in joinable and right in joinable:
                    key = (-self.scores[index], joinable[left], joinable[right])
                    merges.append((*key, left, right))
        merges.sort()
        return models.BPE(
            vocab=ids,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=self.pieces[self.unknown_id],
            fuse_unk=True,
            # A part that is a whole piece is taken as it is: what is user-defined was cut out so.
            ignore_merges=bool(self._user_defined),
            byte_fallback=self.byte_fallback,
        )

    def _unigram(self) -> "tokenizers.models.Unigram":
        """Control pieces get names that no text holds: SentencePiece never finds them in a text."""
        from tokenizers import models

        normal = [score for score, kind in zip(self.scores, self.types, strict=True) if kind is PieceType.NORMAL]
        lowest = min(normal, default=0.0)
        vocab = []
        for index, (piece, score) in enumerate(zip(self.pieces, self.scores, strict=True)):
            match self.types[index]:
                case PieceType.NORMAL | PieceType.USER_DEFINED:
                    vocab.append((piece, score))
                case PieceType.BYTE:
                    vocab.append((piece, lowest))
                case _:
                    vocab.append((f"\U0010ffff{index}", lowest))
        return models.Unigram(vocab, self.unknown_id, self.byte_fallback)


def _parse_model(data: bytes) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[PieceType] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            piece, score, kind = _parse_piece(_as_bytes(value))
            pieces.append(piece)
            scores.append(score)
            types.append(kind)
        elif field == 2:
            trainer.update(_fields(_as_bytes(value)))
        elif field == 3:
            normalizer.update(_fields(_as_bytes(value)))
    if not pieces or len(set(pieces)) != len(pieces):
        raise FormatError("holds no pieces, or one of them twice")
    # Field numbers and defaults of TrainerSpec and NormalizerSpec.
    model_type = _integer(trainer, 3, 1)
    if model_type not in {1, 2}:
        raise FormatError("is neither a BPE nor a unigram model; only these two are supported")
    if _integer(trainer, 24, 0) or not _integer(normalizer, 5, 1):
        raise FormatError("sets treat_whitespace_as_suffix or escape_whitespaces=false, which is not supported")
    unknown_id = _token_id(_integer(trainer, 40, 0), len(pieces))
    if unknown_id is None:
        raise FormatError("has no unknown piece")
    return SentencePieceModel(
        pieces=pieces,
        scores=scores,
        types=types,
        is_bpe=model_type == 2,
        byte_fallback=bool(_integer(trainer, 35, 0)),
        unknown_id=unknown_id,
        unknown_text=_as_bytes(trainer.get(44, " \u2047 ".encode())).decode("utf-8", errors="replace"),
        bos_id=_token_id(_integer(trainer, 41, 1), len(pieces)),
        eos_id=_token_id(_integer(trainer, 42, 2), len(pieces)),
        add_dummy_prefix=bool(_integer(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_integer(normalizer, 4, 1)),
        character_map=_as_bytes(normalizer.get(2, b"")),
    )


def _parse_piece(data: bytes) -> tuple[str, float, PieceType]:
    piece, score, kind = "", 0.0, PieceType.NORMAL
    for field, value in _fields(data):
        try:
            if field == 1:
                piece = _as_bytes(value).decode("utf-8")
            elif field == 2:
                score = struct.unpack("<f", _as_bytes(value))[0]
            elif field == 3:
                kind = PieceType(_as_integer(value))
        except (ValueError, struct.error) as error:
            raise FormatError(f"has a malformed piece: {error}") from None
    if not piece:
        raise FormatError("holds an empty piece")
    return piece, score, kind


def _token_id(value: int, count: int) -> int | None:
    value = value - (1 << 64) if value >= 1 << 63 else value  # int32 is sign-extended to 64 bits
    if value < 0:
        return None
    if value >= count:
        raise FormatError(f"names the token id {value}, but holds {count} pieces")
    return value


def _integer(message: dict[int, int | bytes], field: int, default: int) -> int:
    return _as_integer(message.get(field, default))


def _as_integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise FormatError("holds bytes where a number is expected")
    return value


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise FormatError("holds a number where bytes are expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protobuf message: number, and an integer (varint) or bytes (all others)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        match key & 7:
            case 0:
                value, position = _varint(data, position)
                yield key >> 3, value
                continue
            case 1:
                length = 8
            case 2:
                length, position = _varint(data, position)
            case 5:
                length = 4
            case _:
                raise FormatError("is no SentencePiece model: unknown protobuf wire type")
        if length > len(data) - position:
            raise FormatError("is truncated or no SentencePiece model")
        yield key >> 3, data[position : position + length]
        position += length


def _message(fields: Mapping[int, int | float | bytes]) -> bytes:
    """A protobuf message: an int is a varint, a float four bytes, bytes come with their length."""
    parts = []
    for field, value in fields.items():
        if isinstance(value, int):
            parts += [_to_varint(field << 3), _to_varint(value)]
        elif isinstance(value, float):
            parts += [_to_varint(field << 3 | 5), struct.pack("<f", value)]
        else:
            parts += [_to_varint(field << 3 | 2), _to_varint(len(value)), value]
    return b"".join(parts)


def _to_varint(value: int) -> bytes:
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise FormatError("is truncated or no SentencePiece model")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise FormatError("is no SentencePiece model: a varint is longer than ten bytes")
