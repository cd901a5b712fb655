# SPDX-License-Identifier: Apache-2.0
"""Heads of 4, 6 and 8 bits, and their bounds, against NumPy in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
from float_cases import Float32, assert_same_bits, assert_targets_agree
from numpy.typing import NDArray

from ternaryforge import _core

pytestmark = pytest.mark.usefixtures("target")
PackedTensor = _core.formats.PackedTensor
QuantizedHead = _core.kernels.QuantizedHead
Float64 = NDArray[np.float64]

BITS = (4, 6, 8)
SHAPES = ((1, 1), (15, 3), (16, 16), (17, 33), (40, 50), (33, 250))
GROUP_COLS = {4: 32, 6: 16, 8: 32}


def float_tensor(values: Float32, layout: str = "f32") -> PackedTensor:
    stored: NDArray[np.generic] = values
    if layout == "f16":
        stored = values.astype(np.float16)
    elif layout == "bf16":
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    return PackedTensor(layout, *values.shape, stored)


def normal(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def exact_products(x: Float32, tensor: PackedTensor) -> Float32:
    return _core.kernels.linear(x, tensor, activations="float", threads=1)


def rounded_to_groups(values: Float32, bits: int) -> Float64:
    """Every group on its own grid of 2^bits points between plus and minus its largest magnitude."""
    rows, cols = values.shape
    group = GROUP_COLS[bits]
    padded = np.zeros((rows, -(-cols // group) * group))
    padded[:, :cols] = values
    groups = padded.reshape(rows, -1, group)
    half = 2.0 ** (bits - 1)
    step = np.abs(groups).max(-1, keepdims=True) / half
    step[step == 0] = 1
    codes = np.clip(np.floor(groups / step) + 0.5, 0.5 - half, half - 0.5)
    return (codes * step).reshape(rows, -1)[:, :cols]


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_close_to_the_weights(bits: int) -> None:
    values = normal(64, 500)
    head = QuantizedHead(float_tensor(values), bits)
    loss, plain = np.square(head.rows - values).mean(), np.square(rounded_to_groups(values, bits) - values).mean()
    assert loss <= 1.02 * plain  # group scales of eight bits cost less than searching them gains
    group = GROUP_COLS[bits]
    assert head.bytes == 64 * 512 * bits // 8 + 64 * (512 // group) + 64 * 12
    assert np.array_equal(head.rows[:4], QuantizedHead(float_tensor(values[:4]), bits).rows)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_rows(bits: int, shape: tuple[int, int]) -> None:
    head = QuantizedHead(float_tensor(normal(*shape)), bits)
    x = normal(6, shape[1], seed=1)
    out = head.multiply(x)
    assert out.shape == (6, shape[0])
    rows = head.rows.astype(np.float64)
    step = np.abs(x).max(1).astype(np.float64) / 16319
    lost = step / 2 * np.sqrt(shape[1])  # of the activations, at most
    allowed = np.outer(lost, np.linalg.norm(rows, axis=1)) + 2e-6 * (np.abs(x) @ np.abs(rows).T) + 1e-30
    assert (np.abs(out - x @ rows.T) <= allowed).all()


@pytest.mark.parametrize("bits", BITS)
def test_activations_of_fifteen_bits_lose_nothing(bits: int) -> None:
    head = QuantizedHead(float_tensor(normal(50, 70)), bits)
    x = np.random.default_rng(2).integers(-16319, 16320, (5, 70)).astype(np.float32)
    x[:, 7] = [16319, -16319, 16319, -16319, 16319]  # makes the scale one
    expected = x.astype(np.float64) @ head.rows.astype(np.float64).T
    allowed = 1e-6 * (np.abs(x) @ np.abs(head.rows).T)
    assert (np.abs(head.multiply(x) - expected) <= allowed).all()


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_do_not_overflow(bits: int) -> None:
    values = np.repeat(np.array([[1.0], [-1.0]], np.float32), 4096, 1)
    head = QuantizedHead(float_tensor(values), bits)
    for sign in (1, -1):
        x = np.full((1, 4096), sign * 3.0, np.float32)
        expected = x.astype(np.float64) @ head.rows.astype(np.float64).T
        np.testing.assert_allclose(head.multiply(x), expected, rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_results_do_not_depend_on_threads_or_on_what_else_is_multiplied(bits: int) -> None:
    tensor, x = float_tensor(normal(100, 90)), normal(7, 90, seed=1)
    head = QuantizedHead(tensor, bits)
    together = head.multiply(x)
    threaded = QuantizedHead(tensor, bits, threads=3)
    assert_same_bits(threaded.rows, head.rows)
    assert_same_bits(threaded.multiply(x, threads=3), together)
    for token in range(7):
        assert_same_bits(head.multiply(x[token : token + 1])[0], together[token])


@pytest.mark.parametrize("bits", BITS)
def test_targets_agree(bits: int) -> None:
    tensor, x = float_tensor(normal(40, 90)), normal(5, 90, seed=1)
    assert_targets_agree(lambda: QuantizedHead(tensor, bits).multiply(x))
    assert_targets_agree(lambda: QuantizedHead(tensor, bits).rows)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_and_tiny_values(bits: int) -> None:
    values = normal(20, 40)
    values[3] = 0
    values[4] *= np.float32(1e-42)
    values[5] *= np.float32(1e30)
    values[6, :32] = 0
    head = QuantizedHead(float_tensor(values), bits)
    assert not head.rows[3].any()
    assert not head.rows[4].any()
    assert not head.rows[6, :32].any()
    np.testing.assert_allclose(head.rows[5], values[5], atol=np.abs(values[5]).max() / 2 ** (bits - 1))
    assert np.isfinite(head.rows).all()
    assert not head.multiply(np.zeros((2, 40), np.float32)).any()
    assert not head.multiply(np.full((2, 40), 1e-40, np.float32)).any()


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite(wrong: float) -> None:
    values = normal(20, 40)
    head = QuantizedHead(float_tensor(values), 6)
    x = normal(3, 40)
    x[1, 39] = wrong
    out = head.multiply(x)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()
    values[17, 8] = wrong
    with pytest.raises(ValueError, match="row 17 of the head holds a value that is not finite"):
        QuantizedHead(float_tensor(values), 6)


def test_other_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="4, 6 or 8 bits, got 5"):
        QuantizedHead(float_tensor(normal(2, 2)), 5)
    codes = PackedTensor("int8", 2, 2, np.ones((2, 2), np.int8), scale_kind="tensor", scales=np.ones(1, np.float32))
    with pytest.raises(ValueError, match="floating-point"):
        QuantizedHead(codes, 6)
    head = QuantizedHead(float_tensor(normal(2, 2)), 8)
    with pytest.raises(ValueError, match="2 columns like the head, got 3"):
        head.multiply(normal(1, 3))
    with pytest.raises(ValueError, match="4 or 6 bits"):
        head.multiply(normal(1, 2), bounds=True)


def bound_witness(head: QuantizedHead, weights: Float64, x: Float32) -> Float64:
    """The two terms that matter, from the weights: no bound that holds can be far below them."""
    lost = np.linalg.norm(head.rows - weights, axis=1)
    return x @ head.rows.T.astype(np.float64) + np.outer(np.linalg.norm(x.astype(np.float64), axis=1), lost)


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("layout", ["f32", "f16", "bf16"])
def test_bounds_hold_and_are_not_loose(bits: int, layout: str) -> None:
    values = normal(50, 200)
    tensor = float_tensor(values, layout)
    weights = exact_products(np.eye(200, dtype=np.float32), tensor).T.astype(np.float64)
    head = QuantizedHead(tensor, bits)
    # The worst inputs are those along what was taken away, and along the rows as quantized.
    lost = (weights - head.rows).astype(np.float32)
    x = np.concatenate([normal(4, 200, seed=3), lost[:6], head.rows[:6]])
    bounds, exact = head.multiply(x, bounds=True), exact_products(x, tensor)
    assert (bounds >= exact).all()
    assert (bounds - exact)[range(4, 10), range(6)].max() < 0.02 * np.abs(exact[range(4, 10), range(6)]).min()
    witness = bound_witness(head, weights, x)
    norms = np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(weights, axis=1))
    assert (np.abs(bounds - witness) <= 2e-3 * norms).all()
    assert (head.norms >= np.linalg.norm(head.rows.astype(np.float64), axis=1)).all()
    assert (head.residuals >= np.linalg.norm(head.rows - weights, axis=1)).all()


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e15])
def test_bounds_hold_at_all_magnitudes(bits: int, scale: float) -> None:
    values = normal(30, 77) * np.float32(scale)
    values[5] *= np.float32(1e-6)
    tensor = float_tensor(values)
    head = QuantizedHead(tensor, bits)
    for factor in (1e-38, 1e-10, 1.0, 1e15):
        x = normal(4, 77, seed=4) * np.float32(factor)
        bounds, exact = head.multiply(x, bounds=True), exact_products(x, tensor)
        assert (bounds >= exact).all(), factor


def top(logits: Float32, count: int) -> set[int]:
    """The `count` likeliest tokens, ties included."""
    return set(np.flatnonzero(logits >= np.sort(logits)[-count]).tolist())


def penalised(logits: Float32, seen: Sequence[int], penalty: float, temperature: float) -> Float32:
    out = logits.copy()
    chosen = out[list(seen)]
    out[list(seen)] = np.where(chosen > 0, chosen / np.float32(penalty), chosen * np.float32(penalty))
    return out / np.float32(temperature)


@pytest.mark.parametrize("layout", ["f32", "bf16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_candidates_hold_the_likeliest_tokens_with_exact_logits(layout: str, threads: int) -> None:
    values = normal(700, 96)
    values[300:310] = values[200:210]  # ties
    tensor = float_tensor(values, layout)
    finder = _core.kernels.TwoStageHead(tensor, threads=threads)
    x = np.concatenate([values[[5, 305, 699]] + normal(3, 96, seed=5) * np.float32(0.3), normal(3, 96, seed=6)])
    exact = exact_products(x, tensor)
    pruned = 0
    for count, seen, penalty, temperature in (
        (1, (), 1.0, 1.0),
        (1, (5, 305, 400), 1.5, 1.0),
        (4, (), 1.0, 0.7),
        (20, (0, 200, 699), 0.6, 3.0),
    ):
        found = finder.find(x, count=count, penalty=penalty, temperature=temperature, seen=seen)
        for row, (tokens, logits, complete) in zip(exact, found, strict=True):
            if complete:
                assert_same_bits(logits, row)
                continue
            pruned += 1
            assert (np.diff(tokens) > 0).all()
            assert_same_bits(logits, row[tokens])
            assert set(seen) <= set(tokens.tolist())
            assert top(penalised(row, seen, penalty, temperature), count) <= set(tokens.tolist())
            assert len(tokens) < len(row) // 4 + 3 * count + len(seen)
    assert pruned >= 16


def test_candidates_fall_back_to_all_logits() -> None:
    values = np.repeat(normal(1, 64), 300, 0)  # every token is as likely
    finder = _core.kernels.TwoStageHead(float_tensor(values), threads=2)
    x = np.concatenate([normal(1, 64, seed=1), np.full((1, 64), np.inf, np.float32), np.zeros((1, 64), np.float32)])
    exact = exact_products(x, float_tensor(values))
    for row, (tokens, logits, complete) in zip(exact, finder.find(x), strict=True):
        assert complete
        assert tokens.size == 0
        np.testing.assert_array_equal(logits, row)
    with pytest.raises(ValueError, match="two-stage head is of finite floats"):
        _core.kernels.TwoStageHead(float_tensor(np.full((2, 2), np.nan, np.float32)))


# Relative errors of llama.cpp 0.3.36's own Q6_K on the same weights (ggml_quantize_chunk, gguf.dequantize).
@pytest.mark.parametrize(("weights", "of_q6_k"), [("normal", 0.017762), ("student", 0.023086), ("laplace", 0.021717)])
def test_six_bits_are_no_less_exact_than_q6_k(weights: str, of_q6_k: float) -> None:
    generator = np.random.default_rng(0)
    values = {
        "normal": lambda: generator.normal(size=(96, 2560)) * 0.03,
        "student": lambda: generator.standard_t(4, size=(96, 2560)) * 0.02,
        "laplace": lambda: generator.laplace(size=(96, 2560)) * 0.02,
    }[weights]()
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    stored = (bits.astype(np.uint32) << 16).view(np.float32)
    head = QuantizedHead(PackedTensor("bf16", *bits.shape, bits), 6, threads=2)
    error = np.sqrt(np.mean(np.square(head.rows - stored)) / np.mean(np.square(stored)))
    assert 0 < error < of_q6_k
