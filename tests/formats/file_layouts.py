# SPDX-License-Identifier: Apache-2.0
"""NumPy codecs of the layouts of other engines' files, written from their documents and not from the C++ ones.

A packer takes trits [rows, cols] and scales (a number, [rows] or [rows, blocks]) and returns bytes.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def blocks_of(trits: np.ndarray, size: int) -> np.ndarray:
    return (trits.astype(np.int64) + 1).reshape(-1, size)


def halves(scales: object, count: int) -> Bytes:
    """[count, 2] bytes of f16 scales."""
    values = np.broadcast_to(np.asarray(scales, np.float32).reshape(-1, 1) if np.ndim(scales) else scales, (count, 1))
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8).reshape(count, 2)


def join(*parts: np.ndarray) -> Bytes:
    return np.concatenate([p.astype(np.uint8) for p in parts], axis=1).ravel()


def planes(codes: np.ndarray, width: int, shifts: tuple[int, ...]) -> np.ndarray:
    """[n, 4 * width] -> [n, width]: plane p of the codes at bits shifts[p]."""
    parts = codes.reshape(-1, 4, width)
    return sum(parts[:, p] << shifts[p] for p in range(4))


def base3(codes: np.ndarray, weights: tuple[int, ...]) -> np.ndarray:
    """[..., digits] -> [...]: ceil(number * 256 / 243)."""
    numbers = (codes * np.array(weights)).sum(axis=-1)
    return -(-numbers * 256 // 243)


MOST_FIRST, LEAST_FIRST = (81, 27, 9, 3, 1), (1, 3, 9, 27, 81)


def tq2_0(trits: np.ndarray, scales: object) -> Bytes:
    codes = blocks_of(trits, 256)
    out = np.zeros((len(codes), 64), np.int64)
    for e in range(256):
        out[:, 32 * (e // 128) + e % 32] |= codes[:, e] << 2 * (e % 128 // 32)
    return join(out, halves(scales, len(codes)))


def tq1_0(trits: np.ndarray, scales: object) -> Bytes:
    codes = blocks_of(trits, 256)
    n = len(codes)
    first = base3(codes[:, :160].reshape(n, 5, 32).transpose(0, 2, 1), MOST_FIRST)
    second = base3(codes[:, 160:240].reshape(n, 5, 16).transpose(0, 2, 1), MOST_FIRST)
    third = base3(codes[:, 240:].reshape(n, 4, 4).transpose(0, 2, 1), MOST_FIRST[:4])
    return join(first, second, third, halves(scales, n))


def ptq1_0(trits: np.ndarray, scales: object) -> Bytes:
    codes = blocks_of(trits, 128)
    out = np.zeros((len(codes), 26), np.int64)
    for e in range(128):
        if e < 80:
            byte, digit = e & 15, e >> 4
        elif e < 120:
            byte, digit = 16 + (e - 80) % 8, (e - 80) // 8
        else:
            byte, digit = 24 + (e - 120) % 2, (e - 120) // 2
        out[:, byte] += codes[:, e] * MOST_FIRST[digit]
    return join(-(-out * 256 // 243), halves(scales, len(codes)))


def sequential(size: int) -> Callable[[np.ndarray, object], Bytes]:
    def pack(trits: np.ndarray, scales: object) -> Bytes:
        codes = blocks_of(trits, size)
        out = sum(codes.reshape(-1, size // 4, 4)[:, :, i] << 2 * i for i in range(4))
        return join(halves(scales, len(codes)), out)

    return pack


def q1_0(trits: np.ndarray, scales: object) -> Bytes:
    bits = blocks_of(trits, 128) // 2
    return join(halves(scales, len(bits)), np.packbits(bits.astype(np.uint8), axis=1, bitorder="little"))


def q2_k(trits: np.ndarray, scales: object) -> Bytes:
    codes = blocks_of(trits, 256)
    levels = planes(codes, 32, (0, 2, 4, 6)).reshape(-1, 64)
    scale = halves(scales, len(codes))
    return join(np.full((len(codes), 16), 0x11), levels, scale, scale)


def q4_0(trits: np.ndarray, scales: object) -> Bytes:
    codes = blocks_of(trits, 32) + 7
    return join(halves(scales, len(codes)), codes[:, :16] | codes[:, 16:] << 4)


def i2_s(width: int) -> Callable[[np.ndarray, object], Bytes]:
    def pack(trits: np.ndarray, scales: object) -> Bytes:
        codes = planes(blocks_of(trits, 4 * width), width, (6, 4, 2, 0))
        tail = np.zeros(8, "<f4")
        tail[0] = scales
        return np.concatenate([codes.astype(np.uint8).ravel(), tail.view(np.uint8)])

    return pack


def i2_s_rows4(trits: np.ndarray, scales: object) -> Bytes:
    codes = (trits.astype(np.int64) + 1).reshape(-1, 4, trits.shape[1])
    body = sum(codes[:, r] << (6 - 2 * r) for r in range(4))
    return np.concatenate([body.astype(np.uint8).ravel(), np.array([scales] + [0] * 7, "<f4").view(np.uint8)])


def row_scales(trits: np.ndarray, scales: object, dtype: str) -> Bytes:
    values = np.broadcast_to(np.asarray(scales, np.float32).ravel(), (len(trits),))
    return np.ascontiguousarray(values.astype(dtype)).view(np.uint8).reshape(len(trits), -1)


def iq2_bn(trits: np.ndarray, scales: object) -> Bytes:
    codes = planes(blocks_of(trits, 64), 16, (0, 2, 4, 6)).reshape(len(trits), -1)
    return join(row_scales(trits, scales, "<f4"), codes)


def iq1_bn(trits: np.ndarray, scales: object) -> Bytes:
    codes = blocks_of(trits, 64).reshape(-1, 4, 16)
    fives = base3(codes[:, :, :15].reshape(-1, 4, 3, 5), LEAST_FIRST).reshape(-1, 12)
    extra = base3(codes[:, :, 15], LEAST_FIRST[:4])[:, None]
    blocks = np.concatenate([fives, extra], axis=1).reshape(len(trits), -1)
    return join(row_scales(trits, scales, "<f2"), blocks)


# Layout -> (packer, columns that share a scale: 0 the row, -1 the matrix).
PACKERS: dict[str, tuple[Callable[[np.ndarray, object], Bytes], int]] = {
    "tq1_0": (tq1_0, 256),
    "tq2_0": (tq2_0, 256),
    "q1_0": (q1_0, 128),
    "q2_0": (sequential(64), 64),
    "pq2_0": (sequential(128), 128),
    "ptq1_0": (ptq1_0, 128),
    "q2_k": (q2_k, 256),
    "q4_0": (q4_0, 32),
    "i2_s": (i2_s(32), -1),
    "i2_s_64": (i2_s(16), -1),
    "i2_s_rows4": (i2_s_rows4, -1),
    "iq1_bn": (iq1_bn, 0),
    "iq2_bn": (iq2_bn, 0),
}
