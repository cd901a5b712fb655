# SPDX-License-Identifier: Apache-2.0
"""Layers run one at a time, with taps, and weights put in the place of others: against NumPy and whole passes."""

import numpy as np
import pytest
from made_decoders import HIDDEN, IDS, Case, Made, assert_near, logits_of, store
from numpy.typing import NDArray
from numpy_decoder import NumpyDecoder

TAPS = ("query", "output", "up", "down")
WIDTHS = {"query": HIDDEN, "output": 72, "up": HIDDEN, "down": 130}
TERNARY = dict.fromkeys(("query", "key", "value", "output", "gate", "up", "down"), "ternary group")
CASES = {
    "dense": Case(),
    "two rotations": Case([{}, {"rotation": 100.0 ** (-np.arange(9) / 9), "window": 5}]),
    "ternary parallel": Case([{"parallel": True}] * 2, {}, TERNARY),
    "norms": Case([{"sub_norms": True, "post_norms": True, "residual_scale": 0.5}] * 2, {"embedding_scale": 3.0}),
    "positions": Case([{"gated": False, "rotation": []}] * 2, {"position_embedding": True}),
}


class Listening(NumpyDecoder):
    """Keeps what linear layers see."""

    def linear(self, slot: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        self.seen[slot] = x
        return super().linear(slot, x)

    def logits(self, ids: NDArray[np.int32]) -> NDArray[np.float64]:
        self.seen: dict[str, NDArray[np.float64]] = {}
        return super().logits(ids)


@pytest.mark.parametrize("name", CASES)
def test_taps_against_numpy(name: str) -> None:
    made = Made(CASES[name])
    witness = Listening(made.model, made.layers, made.values)
    witness.logits(IDS)
    model = made.load("float")
    hidden = model.embed(IDS)
    for layer in range(2):
        hidden, taps = model.forward_block(layer, hidden, taps=TAPS)
        assert {tap: found.shape for tap, found in taps.items()} == {
            tap: (len(IDS), width) for tap, width in WIDTHS.items()
        }
        for tap, found in taps.items():
            assert_near(found, witness.seen[f"layers.{layer}.{tap}"])


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_give_the_logits_of_a_whole_pass(threads: int) -> None:
    """More tokens than one slice holds; the head on the last residual stream in NumPy."""
    made = Made(Case([{}, {"window": 150}], {"context_length": 300}))
    ids = np.resize(IDS, 290).astype(np.int32)
    model = made.load("float", threads)
    hidden = model.embed(ids)
    for layer in range(2):
        hidden, taps = model.forward_block(layer, hidden)
        assert taps == {}
    wide = hidden.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + made.model["norm_epsilon"]) * made.values["final_norm"]
    assert_near(model.forward([(ids, model.new_sequence())], logits="all"), normed @ made.values["head"].T)


@pytest.mark.parametrize("how", ["f32", "ternary group", "int8 row"])
def test_replaced_linear(how: str) -> None:
    made, other = Made(CASES["dense"]), Made(Case(stored={"1.up": how}))
    generator = np.random.default_rng(5)
    tensor = store(generator.normal(size=(130, HIDDEN)).astype(np.float32) / np.float32(6), how)
    other.weights["layers.1.up"] = tensor
    model = made.load("float")
    before = logits_of(model)
    model.replace_linear("layers.1.up", tensor)
    assert np.array_equal(logits_of(model), logits_of(other.load("float")))
    assert not np.array_equal(logits_of(model), before)


def test_replaced_norm() -> None:
    made, other = Made(Case(model={"norm_offset": 1.0})), Made(Case(model={"norm_offset": 1.0}))
    weight = np.linspace(-1, 2, HIDDEN, dtype=np.float32)
    other.weights["layers.0.ffn_norm"] = store(weight[None], "f32")
    model = made.load("float")
    model.replace_norm("layers.0.ffn_norm", weight)
    assert np.array_equal(logits_of(model), logits_of(other.load("float")))


def test_refusals() -> None:
    model = Made(CASES["dense"]).load("float")
    hidden = model.embed(IDS)
    square = store(np.ones((HIDDEN, HIDDEN), np.float32), "f32")
    with pytest.raises(ValueError, match="2 layers, got layer 2"):
        model.forward_block(2, hidden)
    with pytest.raises(ValueError, match=r"hidden is \[tokens, 72\]"):
        model.forward_block(0, np.ones((3, HIDDEN + 1), np.float32))
    with pytest.raises(ValueError, match="a tap is query, output, up or down, got 'gate'"):
        model.forward_block(0, hidden, taps=("gate",))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="context holds 40 tokens, got 41"):
        model.forward_block(0, np.ones((41, HIDDEN), np.float32))
    with pytest.raises(ValueError, match="token id"):
        model.embed(np.array([99], np.int32))
    with pytest.raises(ValueError, match=r"no query or the like by the name 'layers\.2\.up'"):
        model.replace_linear("layers.2.up", square)
    with pytest.raises(ValueError, match="130 x 72, got 72 x 72"):
        model.replace_linear("layers.1.up", square)
    with pytest.raises(ValueError, match="has 72 weights, got 3"):
        model.replace_norm("layers.1.ffn_norm", np.ones(3, np.float32))
    with pytest.raises(ValueError, match="must be finite"):
        model.replace_norm("layers.1.ffn_norm", np.full(HIDDEN, np.nan, np.float32))
