# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache in blocks, against its formula in float64."""

from typing import Any

import numpy as np
import pytest
from float_cases import SIZES, Float32, assert_same_bits, assert_targets_agree, poisoned

from ternaryforge import _core

pytestmark = pytest.mark.usefixtures("target")
attend = _core.kernels.attend

LENGTHS = (1, 2, 5, 31, 32, 33, 64, 100)  # a block holds 32 tokens


def witness(query: Float32, keys: Float32, values: Float32, scale: float, soft_cap: float = 0) -> np.ndarray:
    scores = keys.astype(np.float64) @ query.astype(np.float64) * scale
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
    weights = np.exp(scores - scores.max())
    return weights @ values.astype(np.float64) / weights.sum()


def attend_head(query: Float32, *args: Any, **options: Any) -> Float32:
    return attend(query[None], *args, **options)[0]


def head(head_dim: int, length: int, seed: int) -> tuple[Float32, Float32, Float32]:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal(head_dim, np.float32),
        rng.standard_normal((length, head_dim), np.float32),
        rng.standard_normal((length, head_dim), np.float32),
    )


@pytest.mark.parametrize("head_dim", [*SIZES[:-1], 80, 96, 128, 192, 256])
def test_matches_the_formula(head_dim: int) -> None:
    for length in LENGTHS:
        query, keys, values = head(head_dim, length, head_dim + length)
        scale = head_dim**-0.5
        # The binding puts the tokens in blocks that lie in reverse order, amid NaN.
        out = attend_head(poisoned(query, 1), poisoned(keys, 3), poisoned(values, 1), scale)
        np.testing.assert_allclose(out, witness(query, keys, values, scale), rtol=0, atol=4e-6)


def test_a_long_context() -> None:
    query, keys, values = head(128, 5000, 1)
    out = attend_head(query, keys, values, 128**-0.5)
    np.testing.assert_allclose(out, witness(query, keys, values, 128**-0.5), rtol=0, atol=2e-6)


def test_one_token_gives_its_value() -> None:
    query, keys, values = head(33, 1, 2)
    np.testing.assert_array_equal(attend_head(query, keys, values, 0.3), values[0])


def test_equal_keys_give_the_mean() -> None:
    query, keys, values = head(64, 77, 3)
    keys[:] = keys[0]
    np.testing.assert_allclose(attend_head(query, keys, values, 1.0), values.mean(axis=0, dtype=np.float64), atol=1e-6)


def test_the_best_key_wins_under_a_large_scale() -> None:
    query, keys, values = head(64, 77, 4)
    best = int(np.argmax(keys @ query))
    np.testing.assert_array_equal(attend_head(query, keys, values, 1e6), values[best])


def test_scores_far_below_zero_do_not_vanish_together() -> None:
    query = np.full(16, 100, np.float32)
    keys = np.full((40, 16), -100, np.float32)
    keys[35] *= np.float32(0.999)
    values = np.arange(40 * 16, dtype=np.float32).reshape(40, 16)
    np.testing.assert_array_equal(attend_head(query, keys, values, 1.0), values[35])


def test_tokens_behind_the_last_are_not_seen() -> None:
    query, keys, values = head(100, 64, 5)
    short = attend_head(query, keys[:33], values[:33], 0.1)
    keys[33:] = np.nan
    values[33:] = np.nan
    assert_same_bits(attend_head(query, keys[:33], values[:33], 0.1), short)


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
def test_tokens_before_the_window_are_not_seen(soft_cap: float) -> None:
    for head_dim in (22, 64):
        for length, begin in ((5, 1), (33, 31), (33, 32), (64, 32), (100, 1), (100, 33), (100, 63), (100, 99)):
            query, keys, values = head(head_dim, length, head_dim + begin)
            keys[:begin] = np.nan
            values[:begin] = np.nan
            out = attend_head(query, keys, values, 0.2, begin=begin, soft_cap=soft_cap)
            expected = witness(query, keys[begin:], values[begin:], 0.2, soft_cap)
            np.testing.assert_allclose(out, expected, rtol=0, atol=4e-6)
            # The same tokens give the same bits, wherever they lie in their blocks.
            assert_same_bits(out, attend_head(query, keys[begin:], values[begin:], 0.2, soft_cap=soft_cap))


@pytest.mark.parametrize("soft_cap", [0.05, 1.0, 50.0])
def test_soft_caps(soft_cap: float) -> None:
    for length in LENGTHS:
        query, keys, values = head(40, length, length)
        out = attend_head(query, keys, values, 0.7, soft_cap=soft_cap)
        np.testing.assert_allclose(out, witness(query, keys, values, 0.7, soft_cap), rtol=0, atol=2e-5)


def test_a_soft_cap_bounds_any_score() -> None:
    query, keys, values = head(64, 77, 8)
    out = attend_head(query, keys, values, 1e30, soft_cap=2.0)
    sign = np.sign(keys.astype(np.float64) @ query)
    weights = np.exp(2 * sign)
    np.testing.assert_allclose(out, weights @ values / weights.sum(), rtol=0, atol=4e-6)


def test_channels_do_not_depend_on_each_other() -> None:
    # Values of one channel are summed in token order, wherever the channel lies in a vector.
    query, keys, values = head(100, 70, 6)
    out = attend_head(query, keys, values, 0.1)
    rolled = attend_head(query, keys, np.roll(values, 7, axis=1), 0.1)
    assert_same_bits(np.roll(out, 7), rolled)


def test_targets_agree_to_the_last_bit() -> None:
    for head_dim in (8, 17, 64, 80, 100, 128, 256):
        for length in (1, 33, 100):
            query, keys, values = head(head_dim, length, head_dim * length)
            assert_targets_agree(lambda query=query, keys=keys, values=values: attend_head(query, keys, values, 0.2))
            if length > 2:
                assert_targets_agree(
                    lambda query=query, keys=keys, values=values: attend_head(
                        query, keys, values, 0.2, begin=2, soft_cap=0.9
                    )
                )


def test_refuses_what_it_cannot_take() -> None:
    query, keys, values = head(8, 3, 7)
    with pytest.raises(ValueError, match=r"\[attend\] keys and values are \[tokens, 8\]"):
        attend_head(query, keys, values[:2], 1.0)
    with pytest.raises(ValueError, match=r"at least one token"):
        attend_head(query, keys[:0], values[:0], 1.0)
    with pytest.raises(ValueError, match=r"\[attend\] begin lies below 3 tokens, got 3"):
        attend_head(query, keys, values, 1.0, begin=3)
    with pytest.raises(TypeError, match=r"\[attend\] values has dtype float32, got float64"):
        attend_head(query, keys, values.astype(np.float64), 1.0)
    with pytest.raises(TypeError, match=r"\[attend\] keys has 2 dimensions, got 1"):
        attend_head(query, keys[0], values, 1.0)


def stored(kv: str, rows: Float32) -> np.ndarray:
    """What a cache of this kind remembers of each row, in float64."""
    if kv == "f16":
        return rows.clip(-65504, 65504).astype(np.float16).astype(np.float64)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(rows * factor).astype(np.float64) * (largest / np.float32(127))


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_stored_in_fewer_bits(kv: str) -> None:
    for head_dim in (3, 16, 50, 64, 128):
        for length, begin in ((1, 0), (33, 2), (100, 31), (700, 65)):
            query, keys, values = head(head_dim, length, head_dim + length)
            keys[length // 2] = 0
            values[0] *= np.float32(1e-6)
            out = attend_head(query, keys, values, 0.3, begin=begin, kv=kv)
            expected = witness(query, stored(kv, keys[begin:]), stored(kv, values[begin:]), 0.3)
            np.testing.assert_allclose(out, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize(("kv", "key_step", "value_step"), [("f16", 2**-11, 2**-11), ("int8", 0.5 / 127, 0.5 / 127)])
def test_error_bounds_of_fewer_bits(kv: str, key_step: float, value_step: float) -> None:
    """A score is off by at most `d`, so a weight by a factor exp(2 d), and a value by its own step."""
    query, keys, values = head(64, 900, 9)
    scale = 0.05
    out = attend_head(query, keys, values, scale, kv=kv)
    largest_key = np.abs(keys).max()
    shift = scale * np.abs(query).sum() * largest_key * key_step
    exact = witness(query, keys, values, scale)
    bound = np.abs(values).max() * (np.expm1(2 * shift) + value_step) + 4e-6
    assert 1e-6 < np.abs(out - exact).max() <= bound


def test_f16_saturates() -> None:
    values = np.full((1, 16), 1e6, np.float32) * np.array([1, -1] * 8, np.float32)
    out = attend_head(np.ones(16, np.float32), np.zeros((1, 16), np.float32), values, 1.0, kv="f16")
    np.testing.assert_array_equal(out, np.sign(values[0]) * 65504)


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
def test_heads_that_share_keys_do_not_see_each_other(kv: str) -> None:
    rng = np.random.default_rng(10)
    for head_dim, length in ((20, 40), (64, 70), (33, 1100)):
        queries = rng.standard_normal((7, head_dim), np.float32)
        _, keys, values = head(head_dim, length, 1)
        together = attend(queries, keys, values, 0.2, begin=length // 3, kv=kv)
        for query, out in zip(queries, together, strict=True):
            assert_same_bits(out, attend_head(query, keys, values, 0.2, begin=length // 3, kv=kv))


def test_chunks_of_the_context() -> None:
    """Around the 512 tokens of a chunk, with the largest score in any of them."""
    for length in (511, 512, 513, 1024, 1500):
        query, keys, values = head(48, length, length)
        for best in (0, length // 2, length - 1):
            keys[best] = 3 * query / np.linalg.norm(query)
            out = attend_head(query, keys, values, 2.0)
            np.testing.assert_allclose(out, witness(query, keys, values, 2.0), rtol=0, atol=8e-6)


def test_fewer_bits_agree_on_all_targets() -> None:
    for kv in ("f16", "int8"):
        query, keys, values = head(80, 600, 11)
        assert_targets_agree(
            lambda query=query, keys=keys, values=values, kv=kv: attend_head(query, keys, values, 0.2, begin=2, kv=kv)
        )
