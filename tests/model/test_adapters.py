# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside dense and ternary weights, against NumPy, and the same bits for every way to run them."""

from typing import Any

import numpy as np
import pytest
from made_decoders import HIDDEN, IDS, Activations, Case, Float32, Made, assert_near, logits_of

Adapters = dict[str, tuple[Float32, Float32, float]]
TERNARY = dict.fromkeys(("query", "key", "value", "output", "gate", "up", "down"), "ternary row")
CASES = {
    "dense": Case(),
    "ternary": Case(stored=TERNARY),
    "plain parallel": Case([{"gated": False, "parallel": True, "ffn_bias": True}] * 2, {}, TERNARY | {"up": "f16"}),
}


def adapters_of(made: Made, slots: str, rank: int = 5) -> Adapters:
    random = np.random.default_rng(3)
    found = {}
    for slot, (rows, cols) in made.spec.slots().items():
        if rows > 1 and slot.startswith("layers.") and slot.split(".")[-1] in slots.split():
            a = random.normal(size=(rank, cols)).astype(np.float32) / np.float32(np.sqrt(cols))
            b = random.normal(size=(rows, rank)).astype(np.float32)
            found[slot] = (a, b, 0.25)
            rank += 1  # ranks may differ
    assert found
    return found


@pytest.mark.parametrize("slots", ["query key value output gate up down", "value", "up down"])
@pytest.mark.parametrize("name", CASES)
def test_float_activations(target: str, name: str, slots: str) -> None:
    made = Made(CASES[name])
    adapters = adapters_of(made, slots)
    expected = made.witness(adapters=adapters)
    assert_near(logits_of(made.load("float", adapters=adapters)), expected)
    assert np.abs(made.witness() - expected).max() > 0.05 * np.abs(expected).max()  # adapters make a difference


def test_they_see_floats_where_the_weights_see_int8() -> None:
    """As in test_transformer: most tokens are as near as in float."""
    made = Made(CASES["ternary"])
    adapters = adapters_of(made, "query output gate down")
    expected = made.witness(int8=made.ternary_slots(), adapters=adapters)
    errors = np.abs(logits_of(made.load("int8", adapters=adapters)) - expected).max(-1) / np.abs(expected).max()
    assert np.median(errors) <= 1e-5


@pytest.mark.parametrize(
    ("name", "activations", "ffn_size"),
    [("dense", "float", 2200), ("ternary", "int8", 15_000), ("plain parallel", "int8", 2200)],
)
def test_chunks_threads_and_batches(name: str, activations: Activations, ffn_size: int) -> None:
    """With the large size, one token is work for three threads."""
    case = CASES[name]
    made = Made(Case([{"ffn_size": ffn_size} | layer for layer in case.layers[:1]], case.model, case.stored))
    adapters = adapters_of(made, "query key value output gate up down", rank=19)
    expected = logits_of(made.load(activations, adapters=adapters))
    for threads in (2, 3):
        model = made.load(activations, threads, adapters=adapters)
        for chunk in (1, 5, 37):
            assert np.array_equal(logits_of(model, chunk), expected), (threads, chunk)
        states = [model.new_sequence() for _ in range(3)]
        ends = (37, 20, 1)
        found = model.forward([(IDS[:end], state) for end, state in zip(ends, states, strict=True)], logits="last")
        assert np.array_equal(found, expected[[end - 1 for end in ends]])


def test_no_adapter_and_an_adapter_of_zeros_change_nothing() -> None:
    made = Made(CASES["ternary"])
    a, b, scaling = adapters_of(made, "down")["layers.0.down"]
    plain = made.load("int8")
    assert np.array_equal(logits_of(made.load("int8", adapters={})), logits_of(plain))
    zeros = made.load("int8", adapters={"layers.0.down": (a, np.zeros_like(b), scaling)})
    assert np.array_equal(logits_of(zeros), logits_of(plain))
    assert zeros.weight_bytes - plain.weight_bytes == a.nbytes + b.nbytes


def adapter(rows: int = HIDDEN, rank: int = 3, cols: int = HIDDEN, b_rank: int = 3, **values: Any) -> Adapters:
    a, b = np.ones((rank, cols), np.float32), np.ones((rows, b_rank), np.float32)
    a[:1, -1:] = values.get("last", 1)
    return {values.get("slot", "layers.1.query"): (a, b, values.get("scaling", 1.0))}


@pytest.mark.parametrize(
    ("adapters", "text"),
    [
        (adapter(cols=71), r"'layers.1.query' takes A \[rank, 72\] and B \[72, rank\], got \[3, 71\] and \[72, 3\]"),
        (adapter(rows=73), r"'layers.1.query' takes .* got \[3, 72\] and \[73, 3\]"),
        (adapter(b_rank=4), r"'layers.1.query' takes .* got \[3, 72\] and \[72, 4\]"),
        (adapter(rank=0), r"A of 'layers.1.query' has at least one row and column, got \[0, 72\]"),
        (adapter(last=np.nan), "'layers.1.query' holds NaN or infinity"),
        (adapter(scaling=float("inf")), "'layers.1.query' holds NaN or infinity"),
        (adapter(slot="layers.2.query"), "no linear layer takes the adapter 'layers.2.query'"),
        (adapter(slot="head"), "no linear layer takes the adapter 'head'"),
        (adapter(slot="layers.0.attention_norm"), "no linear layer takes the adapter 'layers.0.attention_norm'"),
    ],
)
def test_adapters_that_do_not_fit(adapters: Adapters, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Made(Case()).load("float", adapters=adapters)


def test_a_gate_that_is_not_there_takes_no_adapter() -> None:
    made = Made(Case([{"gated": False}]))
    with pytest.raises(ValueError, match=r"no linear layer takes the adapter 'layers.0.gate'"):
        made.load("float", adapters=adapter(slot="layers.0.gate", rows=130))


def test_matrices_of_another_type() -> None:
    a, b, scaling = adapter()["layers.1.query"]
    with pytest.raises(TypeError, match=r"\[adapter\] B of 'layers.1.query' has dtype float32, got float64"):
        Made(Case()).load("float", adapters={"layers.1.query": (a, b.astype(np.float64), scaling)})
    with pytest.raises(TypeError, match=r"A of 'layers.1.query' has 2 dimensions, got 1"):
        Made(Case()).load("float", adapters={"layers.1.query": (a[0], b, scaling)})


def test_the_core_keeps_its_own_copy() -> None:
    made = Made(Case())
    adapters = adapters_of(made, "value")
    model = made.load("float", adapters=adapters)
    before = logits_of(model)
    for a, _, _ in adapters.values():
        a[:] = 0
    assert np.array_equal(logits_of(model), before)
