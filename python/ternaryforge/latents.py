# SPDX-License-Identifier: Apache-2.0
"""Float weights of quantisation-aware training become what their model computes with.

    rule = LatentRule("threshold", clamp=1.5, rooted=True)
    codes, scale = rule.round(read, (rows, cols))         # read(first, last) gives rows in float32

All rules work in float32 on a whole tensor, whatever parts of it a model takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

RowReader = Callable[[int, int], NDArray[np.float32]]

_CHUNK_ELEMENTS = 1 << 22
_ABSMEAN_FLOOR = 1e-5  # of the mean magnitude, as in transformers
_THRESHOLD = 0.7  # of the mean magnitude (Li and Liu, Ternary Weight Networks)
_MEAN_FLOOR = 1e-8


@dataclass(frozen=True, slots=True)
class LatentRule:
    """How latents become codes and a scale; m is the mean magnitude after clamping to +-`clamp`.

    | kind | code | weight |
    |---|---|---|
    | absmean | round(w / m) in -1 .. 1 | code * m |
    | round | round(w / m) in -1 .. 1 | code * m |
    | threshold | sign(w) where abs(w) > 0.7 m, else 0 | code * m |
    | sign | sign(w); 0 stays 0 | code * m |
    | int8 | round(w * 127 / max of the row) | code * max / 127 |

    absmean is what transformers computes, reciprocals and floor included; round has them not.
    `rooted` divides the scale by the root of the number of columns. Only int8 has a scale per row,
    and it neither clamps nor is rooted.
    """

    kind: Literal["absmean", "round", "threshold", "sign", "int8"]
    clamp: float | None = None
    rooted: bool = False

    def round(self, read: RowReader, shape: tuple[int, int]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Codes [rows, cols] and scales, [1] or [rows], to multiply by (absmean: to divide by)."""
        if self.kind == "int8":
            return _round_rows(read, shape)
        rows, cols = shape
        total = sum(float(np.abs(part).sum(dtype=np.float64)) for _, part in self._chunks(read, shape))
        mean = np.float32(total / (rows * cols))
        codes = np.empty(shape, np.int8)
        if self.kind == "absmean":
            inverse = np.float32(1) / np.maximum(mean, np.float32(_ABSMEAN_FLOOR))
            for begin, part in self._chunks(read, shape):
                codes[begin : begin + len(part)] = np.clip(np.rint(part * inverse), -1, 1)
            return codes, np.array([inverse], np.float32)
        mean = np.maximum(mean, np.float32(_MEAN_FLOOR))
        least = np.float32(_THRESHOLD * float(mean)) if self.kind == "threshold" else np.float32(0)
        for begin, part in self._chunks(read, shape):
            rounded = np.clip(np.rint(part / mean), -1, 1) if self.kind == "round" else np.sign(part)
            codes[begin : begin + len(part)] = rounded * (np.abs(part) > least)
        scale = float(mean) / (cols**0.5 if self.rooted else 1.0)
        return codes, np.array([scale], np.float32)

    def _chunks(self, read: RowReader, shape: tuple[int, int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for begin, part in row_chunks(read, shape):
            yield begin, part if self.clamp is None else np.clip(part, -self.clamp, self.clamp)


def row_chunks(read: RowReader, shape: tuple[int, int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """A tensor in parts of a few million values: the first row of each, and its values."""
    rows, cols = shape
    step = max(1, _CHUNK_ELEMENTS // cols)
    for begin in range(0, rows, step):
        yield begin, read(begin, min(rows, begin + step))


def _round_rows(read: RowReader, shape: tuple[int, int]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    codes, scales = np.empty(shape, np.int8), np.empty(shape[0], np.float32)
    for begin, part in row_chunks(read, shape):
        largest = np.abs(part).max(1)
        scales[begin : begin + len(part)] = largest / np.float32(127)
        step = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
        codes[begin : begin + len(part)] = np.clip(np.rint(part * step[:, None]), -127, 127)
    return codes, scales
