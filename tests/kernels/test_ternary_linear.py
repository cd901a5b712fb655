# SPDX-License-Identifier: Apache-2.0
"""Ternary products on every target against NumPy written from the arithmetic contract."""

import numpy as np
import pytest

from ternaryforge import _core

SHAPES = [(4, 1), (4, 15), (16, 16), (20, 17), (12, 64), (36, 100), (64, 257), (132, 1000)]
TOKENS = [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 17, 130, 150]
MAX_CODES = {"int8": 127, "int16": 32639}


def made_trits(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (rows, cols)).astype(np.int8)


def made_scales(kind: str, rows: int, cols: int, group_size: int) -> np.ndarray:
    shape = {"tensor": (1,), "row": (rows,), "group": (rows, -(-cols // group_size))}[kind]
    return np.random.default_rng(3).uniform(0.2, 2.0, shape).astype(np.float32)


def packed(
    trits: np.ndarray, kind: str = "tensor", group_size: int = 64, layout: str = "hf_packed"
) -> tuple[_core.formats.PackedTensor, np.ndarray]:
    rows, cols = trits.shape
    scales = made_scales(kind, rows, cols, group_size)
    keywords = {"group_size": group_size} if kind == "group" else {}
    data = _core.formats.pack(trits, layout, **keywords)
    tensor = _core.formats.PackedTensor(
        layout, rows, cols, data, scale_kind=kind, group_size=group_size if kind == "group" else 0, scales=scales
    )
    return tensor, scales


@pytest.fixture(params=["t16", "t20"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def dense(trits: np.ndarray, scales: np.ndarray, kind: str, group_size: int) -> np.ndarray:
    """The weights as float64."""
    if kind == "tensor":
        return trits.astype(np.float64) * scales[0]
    if kind == "row":
        return trits.astype(np.float64) * scales[:, None]
    columns = np.repeat(scales, group_size, axis=1)[:, : trits.shape[1]]
    return trits.astype(np.float64) * columns


def quantized(x: np.ndarray, activations: str = "int8") -> tuple[np.ndarray, np.ndarray]:
    """BitNet b1.58's per-token int8: s = 127 * (1 / max(max |x|, 1e-5)) in float32, round half to even.

    int16 has 32639 = 127 * 257 for 127.
    """
    limit = np.float32(MAX_CODES[activations])
    scale = limit * (np.float32(1) / np.maximum(np.abs(x).max(axis=1), np.float32(1e-5)))
    return np.clip(np.rint(x * scale[:, None]), -limit, limit).astype(np.int16), scale


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_integer_sums_are_exact(target: str, layout: str, rows: int, cols: int) -> None:
    trits = made_trits(rows, cols)
    tensor, _ = packed(trits, layout=layout)
    random = np.random.default_rng(1).integers(-128, 128, (3, cols))
    for codes in (random, np.full((1, cols), 127), np.full((1, cols), -128)):
        expected = codes.astype(np.int64) @ trits.T.astype(np.int64)
        np.testing.assert_array_equal(_core.kernels.ternary_dot(codes.astype(np.int8), tensor), expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("code", [127, -128])
@pytest.mark.parametrize("cols", [256, 6912, 28672])
def test_long_rows_of_extremes_do_not_saturate(target: str, layout: str, cols: int, code: int, sign: int) -> None:
    tensor, _ = packed(np.full((4, cols), sign, np.int8), layout=layout)
    sums = _core.kernels.ternary_dot(np.full((1, cols), code, np.int8), tensor)
    np.testing.assert_array_equal(sums, np.full((1, 4), cols * code * sign))


@pytest.mark.parametrize(("kind", "group_size"), [("tensor", 64), ("row", 64), ("group", 64), ("group", 128)])
@pytest.mark.parametrize("activations", MAX_CODES)
def test_integer_linear_is_the_contract(target: str, layout: str, activations: str, kind: str, group_size: int) -> None:
    rows, cols = 36, 1 + 11 * group_size // 2
    trits = made_trits(rows, cols)
    tensor, scales = packed(trits, kind, group_size, layout)
    x = np.random.default_rng(2).normal(size=(max(TOKENS), cols)).astype(np.float32)
    codes, act_scale = quantized(x, activations)
    expected = codes.astype(np.float64) @ dense(trits, scales, kind, group_size).T / act_scale[:, None]
    for tokens in TOKENS:
        actual = _core.kernels.linear(x[:tokens], tensor, activations=activations)
        np.testing.assert_allclose(actual, expected[:tokens], rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
@pytest.mark.parametrize(("kind", "group_size"), [("tensor", 64), ("row", 64), ("group", 64), ("group", 256)])
def test_float_linear_is_the_product(target: str, layout: str, kind: str, group_size: int, tokens: int) -> None:
    rows, cols = 20, 333
    trits = made_trits(rows, cols)
    tensor, scales = packed(trits, kind, group_size, layout)
    x = np.random.default_rng(2).normal(size=(tokens, cols)).astype(np.float32)
    expected = x.astype(np.float64) @ dense(trits, scales, kind, group_size).T
    actual = _core.kernels.linear(x, tensor, activations="float")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("activations", ["int8", "int16", "float"])
@pytest.mark.parametrize(("kind", "group_size"), [("tensor", 64), ("row", 64), ("group", 64)])
def test_every_target_and_layout_gives_the_same_bits(kind: str, group_size: int, activations: str) -> None:
    tensors = [packed(made_trits(36, 700), kind, group_size, layout)[0] for layout in ("t16", "t20")]
    x = np.random.default_rng(4).normal(size=(11, 700)).astype(np.float32)
    previous = _core.simd.active_target()
    try:
        results = {}
        for name in _core.simd.supported_targets():
            _core.simd.use_target(name)
            for tensor in tensors:
                parts = [_core.kernels.linear(part, tensor, activations=activations) for part in (x, x[:1], x[1:4])]
                results[name, tensor.layout] = np.concatenate(parts)
    finally:
        _core.simd.use_target(previous)
    first = next(iter(results.values()))
    for name, result in results.items():
        np.testing.assert_array_equal(result, first, err_msg=str(name))


@pytest.mark.parametrize("activations", ["int8", "int16", "float"])
def test_tokens_and_threads_do_not_change_a_bit(target: str, layout: str, activations: str) -> None:
    tensor, _ = packed(made_trits(100, 400), "group", 64, layout)
    x = np.random.default_rng(5).normal(size=(13, 400)).astype(np.float32)
    whole = _core.kernels.linear(x, tensor, activations=activations)
    single = np.concatenate([_core.kernels.linear(row[None], tensor, activations=activations) for row in x])
    np.testing.assert_array_equal(whole, single)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(whole, _core.kernels.linear(x, tensor, activations=activations, threads=threads))


@pytest.mark.parametrize("size", [1, 3, 7, 15, 16, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize("activations", MAX_CODES)
def test_activations_round_half_to_even(target: str, activations: str, size: int) -> None:
    x = np.random.default_rng(6).normal(size=(3, size)).astype(np.float32)
    x[0] = (np.arange(size) % 9 - 4) * 0.5  # ties once scaled by the powers of two below
    x[0, 0] = MAX_CODES[activations]
    x[1] = 0
    codes, scales = _core.kernels.quantize_acts(x, activations=activations)
    expected, expected_scales = quantized(x, activations)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(codes, expected)
    assert not codes[1].any()


def test_ties_become_even(target: str) -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], np.float32)
    codes, _ = _core.kernels.quantize_acts(x)
    np.testing.assert_array_equal(codes, [[127, 0, 2, 2, 0, -2, -2]])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("cols", [5120, 28672, 65520])
def test_long_rows_of_the_largest_int16_codes(target: str, layout: str, cols: int, sign: int) -> None:
    """One activation of either sign fixes the scale at 1; the sum comes near the end of 32 bits."""
    tensor, _ = packed(np.full((4, cols), sign, np.int8), layout=layout)
    x = np.full((3, cols), MAX_CODES["int16"], np.float32)
    x[1] *= -1
    x[2, ::2] *= -1
    sums = _core.kernels.linear(x, tensor, activations="int16") / made_scales("tensor", 4, cols, 64)
    scale = quantized(x, "int16")[1][0]
    expected = np.array([1, -1, 0])[:, None] * float(cols * MAX_CODES["int16"] * sign) / scale
    np.testing.assert_allclose(sums, np.broadcast_to(expected, sums.shape), rtol=3e-7)


def test_rows_that_could_overflow_are_refused() -> None:
    tensor, _ = packed(np.ones((4, 65537), np.int8))
    with pytest.raises(ValueError, match="exact up to 65536 columns, got 65537"):
        _core.kernels.linear(np.ones((1, 65537), np.float32), tensor, activations="int16")


def test_tiny_activations_do_not_divide_by_zero(target: str) -> None:
    tensor, _ = packed(made_trits(4, 20))
    x = np.full((1, 20), 1e-30, np.float32)
    np.testing.assert_array_equal(_core.kernels.linear(x, tensor, activations="int8"), np.zeros((1, 4), np.float32))


def test_wrong_arguments_are_refused() -> None:
    tensor, _ = packed(made_trits(4, 20))
    with pytest.raises(TypeError, match="float32"):
        _core.kernels.linear(np.zeros((1, 20)), tensor, activations="int8")
    with pytest.raises(ValueError, match="20 columns"):
        _core.kernels.linear(np.zeros((1, 21), np.float32), tensor, activations="int8")
    with pytest.raises(ValueError, match="int8, int16 or float"):
        _core.kernels.linear(np.zeros((1, 20), np.float32), tensor, activations="bf16")
    with pytest.raises(ValueError, match="at least one thread"):
        _core.kernels.linear(np.zeros((1, 20), np.float32), tensor, activations="int8", threads=0)
    with pytest.raises(ValueError, match="C-contiguous"):
        _core.kernels.linear(np.zeros((20, 2), np.float32).T, tensor, activations="int8")


def linear_at(x: np.ndarray, layout: str, data: np.ndarray, scales: np.ndarray, group_size: int = 0) -> np.ndarray:
    """The layer on addresses; the weights are copied to a multiple of 64, as PyTorch gives them."""
    (tokens, cols), rows = x.shape, len(scales)
    room = np.empty(data.size + 64, np.uint8)
    weight = room[-room.ctypes.data % 64 :][: data.size]
    weight[:] = data
    out = np.empty((tokens, rows), np.float32)
    addresses = [array.ctypes.data for array in (x, weight, scales, out)]
    layers = [(*addresses[1:], rows, scales.size)]
    _core.kernels.linears_at(addresses[0], tokens, cols, layers, layout, group_size, "int8", 2)
    return out


@pytest.mark.parametrize(("kind", "group_size"), [("row", 0), ("group", 128)])
def test_addresses_and_arrays_give_the_same_bits(layout: str, kind: str, group_size: int) -> None:
    trits = made_trits(36, 700)
    tensor, scales = packed(trits, kind, group_size or 64, layout)
    data = _core.formats.pack(trits, layout, group_size=group_size)
    x = np.random.default_rng(5).normal(size=(3, 700)).astype(np.float32)
    expected = _core.kernels.linear(x, tensor, activations="int8", threads=2)
    np.testing.assert_array_equal(linear_at(x, layout, data, scales, group_size), expected)


def test_addresses_that_do_not_fit_are_refused() -> None:
    x, scales = np.zeros((1, 256), np.float32), np.ones(16, np.float32)
    for name in ("hf_packed", "tq2_0", "f32"):
        with pytest.raises(ValueError, match=f"t16 and t20, got {name}"):
            linear_at(x, name, np.zeros(16 * 66, np.uint8), scales)
    with pytest.raises(ValueError, match="an address is null"):
        _core.kernels.linears_at(
            x.ctypes.data, 1, 256, [(0, scales.ctypes.data, x.ctypes.data, 16, 16)], "t16", 0, "int8", 1
        )
    with pytest.raises(ValueError, match="there is no layer"):
        _core.kernels.linears_at(x.ctypes.data, 1, 256, [], "t16", 0, "int8", 1)
    wide = np.zeros((1, 2**19 + 64), np.float32)
    with pytest.raises(ValueError, match="exact up to 524288 columns, got 524352"):
        linear_at(wide, "t16", np.full(16 * wide.shape[1] // 4, 0x55, np.uint8), scales)
