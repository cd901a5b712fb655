# SPDX-License-Identifier: Apache-2.0
"""Matrix products with f32, f16, bf16 and int8 weights against NumPy in float64."""

import numpy as np
import pytest
from float_cases import SIZES, Float32, assert_same_bits, assert_targets_agree, poisoned
from numpy.typing import NDArray

from ternaryforge import _core

pytestmark = pytest.mark.usefixtures("target")
PackedTensor = _core.formats.PackedTensor

LAYOUTS = ("f32", "f16", "bf16", "int8")
ROWS = (1, 2, 3, 4, 5, 17)
TOKENS = (1, 2, 3, 4, 5, 7, 8)


def linear(x: Float32, tensor: PackedTensor, threads: int = 1) -> Float32:
    return _core.kernels.linear(x, tensor, activations="float", threads=threads)


def bf16_bits(values: Float32) -> NDArray[np.uint16]:
    """Cut off, not rounded: any bit pattern is as good."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def stored_as(layout: str, values: Float32) -> tuple[NDArray[np.generic], np.ndarray]:
    """What the layout stores for these values, and what that means in float64."""
    if layout == "f32":
        return values, values.astype(np.float64)
    if layout == "f16":
        half = values.astype(np.float16)
        return half, half.astype(np.float64)
    if layout == "bf16":
        bits = bf16_bits(values)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    codes = np.clip(np.rint(values * 40), -127, 127).astype(np.int8)
    return codes, codes.astype(np.float64)


def tensor_of(layout: str, values: Float32, *, offset: int = 0) -> tuple[PackedTensor, np.ndarray]:
    """The tensor, its bytes `offset` behind an aligned address and between bytes of ones, and its float64 weights."""
    rows, cols = values.shape
    stored, wide = stored_as(layout, values)
    data = np.frombuffer(stored.tobytes(), np.uint8)
    raw = np.full(data.size + 256, 0xFF, np.uint8)
    begin = -raw.ctypes.data % 64 + 64 + offset
    view = raw[begin : begin + data.size]
    view[:] = data
    if layout != "int8":
        return PackedTensor(layout, rows, cols, view), wide
    scales = np.linspace(0.01, 0.02, rows, dtype=np.float32)
    tensor = PackedTensor(layout, rows, cols, view, scale_kind="row", scales=scales)
    return tensor, wide * scales.astype(np.float64)[:, None]


def tolerance(x: Float32, wide: np.ndarray) -> np.ndarray:
    """Rounding of a sum in float32, relative to the sum of absolute products."""
    return 4e-7 * (np.abs(x).astype(np.float64) @ np.abs(wide).T) + 1e-30


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cols", SIZES)
def test_matches_numpy(layout: str, cols: int) -> None:
    rng = np.random.default_rng(cols)
    for rows in ROWS:
        for tokens in (1, 7):
            x = rng.standard_normal((tokens, cols), np.float32)
            tensor, wide = tensor_of(layout, rng.standard_normal((rows, cols), np.float32))
            out = linear(poisoned(x, 1), tensor)
            assert out.shape == (tokens, rows)
            assert (np.abs(out - x.astype(np.float64) @ wide.T) <= tolerance(x, wide)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_at_any_byte(layout: str) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((9, 50), np.float32)
    x = rng.standard_normal((5, 50), np.float32)
    aligned = linear(x, tensor_of(layout, values)[0])
    for offset in (1, 2, 4, 31):
        assert_same_bits(linear(x, tensor_of(layout, values, offset=offset)[0]), aligned)


@pytest.mark.parametrize("layout", ["f16", "bf16"])
def test_every_value_of_16_bits(layout: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    if layout == "f16":
        floats = bits.view(np.float16).astype(np.float32)
    else:
        floats = (bits.astype(np.uint32) << 16).view(np.float32)
    # Row r holds value r in column r % 23, so that whole vectors and the rest behind them are both used.
    weights = np.zeros((bits.size, 23), np.uint16)
    weights[bits, bits % 23] = bits
    tensor = PackedTensor(layout, bits.size, 23, weights)
    out = linear(np.ones((1, 23), np.float32), tensor)[0]
    np.testing.assert_array_equal(out, floats)  # NaN equals NaN here


def test_every_value_of_int8() -> None:
    codes = np.arange(-128, 128).astype(np.int8)
    weights = np.zeros((256, 17), np.int8)
    weights[np.arange(256), np.arange(256) % 17] = codes
    scales = np.array([0.25], np.float32)
    tensor = PackedTensor("int8", 256, 17, weights, scale_kind="tensor", scales=scales)
    np.testing.assert_array_equal(linear(np.ones((1, 17), np.float32), tensor)[0], codes * np.float32(0.25))


def test_division_is_the_other_scale_convention() -> None:
    weights = np.full((2, 16), 3, np.int8)
    tensor = PackedTensor(
        "int8", 2, 16, weights, scale_kind="row", convention="divide", scales=np.array([2, 4], np.float32)
    )
    np.testing.assert_array_equal(linear(np.ones((1, 16), np.float32), tensor), [[24, 12]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cols", [15, 64, 100])
def test_tokens_and_rows_do_not_depend_on_each_other(layout: str, cols: int) -> None:
    rng = np.random.default_rng(cols)
    rows = 53
    values = rng.standard_normal((rows, cols), np.float32)
    x = rng.standard_normal((max(TOKENS), cols), np.float32)
    tensor, _ = tensor_of(layout, values)
    whole = linear(x, tensor)
    for tokens in TOKENS:
        assert_same_bits(linear(x[:tokens], tensor), whole[:tokens])
        assert_same_bits(linear(x[-tokens:], tensor), whole[-tokens:])
    for threads in (2, 3, 5):  # each worker gets a range of rows
        assert_same_bits(linear(x, tensor, threads), whole)
        assert_same_bits(linear(x[:1], tensor, threads), whole[:1])
    if layout != "int8":  # whose scales go by row
        for begin, end in ((0, 1), (1, 4), (5, 22), (50, 53)):
            part, _ = tensor_of(layout, values[begin:end])
            assert_same_bits(linear(x, part), whole[:, begin:end])


@pytest.mark.parametrize("cols", [16, 33, 1000])
def test_the_order_of_the_sum_is_the_documented_one(cols: int) -> None:
    # Small integers: products and sums are exact in any order but the roundings of the lanes' tree, spoiled by 2^24.
    rng = np.random.default_rng(cols)
    weights = rng.integers(-3, 4, cols).astype(np.float32)
    x = rng.integers(-3, 4, cols).astype(np.float32)
    weights[0], x[0] = 2.0**13, 2.0**12
    lanes = np.zeros(16, np.float32)
    for begin in range(0, cols, 16):
        product = np.float32(weights[begin : begin + 16] * x[begin : begin + 16])  # exact
        lanes[: product.size] += product
    for half in (8, 4, 2, 1):
        lanes = lanes[:half] + lanes[half:]
    tensor, _ = tensor_of("f32", weights[None])
    assert linear(x[None], tensor)[0, 0] == lanes[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_agree_to_the_last_bit(layout: str) -> None:
    rng = np.random.default_rng(8)
    for cols in SIZES:
        tensor, _ = tensor_of(layout, rng.standard_normal((11, cols), np.float32))
        for tokens in (1, 7):
            x = rng.standard_normal((tokens, cols), np.float32)
            assert_targets_agree(lambda x=x, tensor=tensor: linear(x, tensor))


def test_large_weights_overflow_to_infinity_not_to_nan() -> None:
    tensor, _ = tensor_of("f32", np.full((3, 20), 3e38, np.float32))
    assert (linear(np.full((2, 20), 2, np.float32), tensor) == np.inf).all()


def test_refuses_scales_per_group() -> None:
    with pytest.raises(ValueError, match="int8 codes have one scale per tensor or row"):
        PackedTensor(
            "int8",
            2,
            128,
            np.ones((2, 128), np.int8),
            scale_kind="group",
            group_size=64,
            scales=np.ones((2, 2), np.float32),
        )
