# SPDX-License-Identifier: Apache-2.0
"""Dense GGUF types against the package gguf."""

import gguf
import numpy as np
import pytest

from ternaryforge import _core

formats = _core.formats
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_0", "Q2_K"]


def values_for(rows: int, cols: int) -> np.ndarray:
    """Normal values, with an all-zero block, a one-sided block and tiny ones."""
    values = np.random.default_rng(3).normal(size=(rows, cols)).astype(np.float32)
    values[0, :256] = 0
    values[1, :256] = np.abs(values[1, :256])
    values[2, :256] *= 1e-6
    return values


def random_blocks(type_name: str, blocks: int) -> np.ndarray:
    """Random bytes with scales in place that are numbers."""
    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][1]
    data = np.random.default_rng(4).integers(0, 256, (blocks, block_bytes)).astype(np.uint8)
    places = {"Q8_0": [0], "Q4_0": [0], "Q6_K": [208], "Q2_K": [80, 82]}[type_name]
    for place in places:
        data[:, place : place + 2] = np.float16(np.linspace(-2, 2, blocks))[:, None].view(np.uint8)
    return data.reshape(1, -1)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q6_K", "Q2_K"])
def test_values_of_random_blocks_are_those_of_gguf(type_name: str) -> None:
    data = random_blocks(type_name, 24)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name])
    for threads in (1, 3):
        values = formats.dequantize(type_name, data.ravel(), 1, expected.size, threads=threads)
        np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_quantized_bytes_are_those_of_gguf(type_name: str) -> None:
    values = values_for(6, 512)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name]).view(np.uint8).ravel()
    for threads in (1, 3):
        np.testing.assert_array_equal(formats.quantize(type_name, values, threads=threads), expected)
    read = formats.dequantize(type_name, expected, 6, 512)
    np.testing.assert_array_equal(
        read, gguf.quants.dequantize(expected.reshape(6, -1), gguf.GGMLQuantizationType[type_name])
    )


def test_q6_k_is_close_and_never_worse_than_plain_rounding() -> None:
    values = values_for(64, 1024)
    data = formats.quantize("Q6_K", values)
    read = gguf.quants.dequantize(data.reshape(64, -1), gguf.GGMLQuantizationType.Q6_K)
    np.testing.assert_array_equal(read[0, :256], 0)
    error = np.square(read - values)[3:].mean() / np.square(values)[3:].mean()
    parts = values.reshape(-1, 16)
    step = np.abs(parts).max(axis=1, keepdims=True) / 31
    step[step == 0] = 1
    plain = (np.clip(np.rint(parts / step), -32, 31) * step).reshape(values.shape)
    assert error < np.square(plain - values)[3:].mean() / np.square(values)[3:].mean() < 5e-4


@pytest.mark.parametrize("type_name", ["Q8_0", "Q6_K", "Q4_0", "F16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(type_name: str, value: float) -> None:
    values = np.zeros((2, 512), np.float32)
    values[1, 300] = value
    with pytest.raises(ValueError, match="at row 1, column 300"):
        formats.quantize(type_name, values)


def test_values_too_large_for_f16_are_refused() -> None:
    with pytest.raises(ValueError, match="F16 takes finite values below 65520, got 65520 at row 0, column 1"):
        formats.quantize("F16", np.array([[65519, 65520]], np.float32))


def test_other_types_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="not 'Q4_K'"):
        formats.dequantize("Q4_K", np.zeros(144, np.uint8), 1, 256)
    with pytest.raises(ValueError, match="Q2_K is only read"):
        formats.quantize("Q2_K", np.zeros((1, 256), np.float32))
    with pytest.raises(ValueError, match="multiple of 32, got 1 x 33"):
        formats.quantize("Q8_0", np.zeros((1, 33), np.float32))
    with pytest.raises(ValueError, match="takes 34 bytes, got 33"):
        formats.dequantize("Q8_0", np.zeros(33, np.uint8), 1, 32)
