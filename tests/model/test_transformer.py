# SPDX-License-Identifier: Apache-2.0
"""What a ModelSpec can say, against a decoder in NumPy; the same bits for every way to run it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from made_decoders import HIDDEN, IDS, LAYER, MODEL, VOCAB, Activations, Case, Made, assert_near, logits_of, store

from ternaryforge import _core

PHI = {"gated": False, "norm": "layer", "parallel": True, "projection_bias": True, "output_bias": True}
PHI |= {"ffn_bias": True, "activation": "gelu", "rotation": LAYER["rotation"][:4]}
MIXED = {"query": "f16", "key": "int8 row", "value": "ternary row", "output": "binary tensor"}
MIXED |= {"gate": "ternary group", "up": "binary row", "down": "int8 tensor"}
CASES = {
    "llama": Case(),
    "plain": Case([{"gated": False, "activation": "relu"}, {"gated": False, "activation": "silu", "sub_norms": True}]),
    "plain biased": Case([{"gated": False, "ffn_bias": True, "activation": "gelu_erf"}, {"activation": "gelu_erf"}]),
    "residual": Case([{"residual_scale": 0.5**0.5, "post_norms": True}, {"residual_scale": 0.25}]),
    "no rotation": Case([{"rotation": []}] * 2, {"position_embedding": True, "embedding_scale": 3.0}),
    "partial rotation": Case([{"rotation": LAYER["rotation"][:3]}, {"rotation": LAYER["rotation"][:5], "window": 9}]),
    "layer norm": Case([{"norm": "layer", "head_norms": True, "sub_norms": True, "post_norms": True}] * 2),
    "norms by layer": Case([{"norm": "layer"}, {"norm": "rms"}], {"norm_offset": 1.0}),
    "parallel": Case([{"parallel": True}, {"parallel": True, "gated": False}]),
    "phi": Case([PHI, PHI], {"head_bias": True, "logit_soft_cap": 5.0}),
    "mixed": Case([{}, {"gated": False, "activation": "relu"}], {}, MIXED),
    "int8 ends": Case([{}], {}, {"embedding": "int8 row", "head": "int8 row"}),
    "int8 tied": Case([{}], {"tied_head": True}, {"embedding": "int8 row"}),
    "tensor ends": Case([{}], {}, {"embedding": "ternary tensor", "head": "binary tensor"}),
    "row ends": Case([{}], {"head_bias": True}, {"embedding": "ternary row", "head": "ternary row"}),
    "row tied": Case([{}], {"tied_head": True, "embedding_scale": 2.0}, {"embedding": "ternary row"}),
    "group tied": Case([{}], {"tied_head": True, "logit_soft_cap": 5.0}, {"embedding": "ternary group"}),
    "positions": Case([{}], {"position_embedding": True}, {"position_embedding": "ternary group"}),
}


@pytest.mark.parametrize("name", CASES)
def test_float_activations(target: str, name: str) -> None:
    made = Made(CASES[name])
    assert_near(logits_of(made.load("float")), made.witness())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.stored])
def test_int8_activations(target: str, name: str) -> None:
    """A value at a rounding tie may take the other code: most tokens are as near as in float."""
    made = Made(CASES[name])
    expected = made.witness(int8=made.ternary_slots())
    errors = np.abs(logits_of(made.load("int8")) - expected).max(-1) / np.abs(expected).max()
    assert np.median(errors) <= 1e-5
    assert errors.max() <= 1e-2


@pytest.mark.parametrize("name", CASES)
def test_chunks_threads_and_batches(name: str) -> None:
    """Five tokens are work for two threads, 37 for three; of a wide layer one token is."""
    activations: Activations = "int8" if CASES[name].stored else "float"
    layers = [{"ffn_size": 15_000 if name == "mixed" else 2200} | layer for layer in CASES[name].layers]
    made = Made(Case(layers, CASES[name].model, CASES[name].stored))
    expected = logits_of(made.load(activations))
    for threads in (2, 3):
        model = made.load(activations, threads)
        for chunk in (1, 5, 37):
            assert np.array_equal(logits_of(model, chunk), expected), (threads, chunk)
        states = [model.new_sequence() for _ in range(3)]
        ends = (37, 20, 1)
        found = model.forward([(IDS[:end], state) for end, state in zip(ends, states, strict=True)], logits="last")
        assert np.array_equal(found, expected[[end - 1 for end in ends]])


@pytest.mark.parametrize("kind", ["tensor", "row", "group"])
def test_a_ternary_embedding_is_looked_up_exactly(kind: str) -> None:
    """A model whose layers add nothing: its logits are the normalised row times the identity."""
    made = Made(Case([{}], {}, {"embedding": f"ternary {kind}"}))
    for slot, (rows, cols) in made.spec.slots().items():
        if slot.endswith(("output", "down")):
            made.weights[slot] = store(np.zeros((rows, cols), np.float32), "f32")
    made.weights["final_norm"] = store(np.ones((1, HIDDEN), np.float32), "f32")
    made.weights["head"] = store(np.eye(VOCAB, HIDDEN, dtype=np.float32), "f32")
    rows = made.values["embedding"].astype(np.float32)[IDS]
    expected = _core.kernels.rms_norm(rows, np.ones(HIDDEN, np.float32), MODEL["norm_epsilon"])[:, :VOCAB]
    assert np.array_equal(logits_of(made.load("float")), expected)


def test_a_tied_ternary_embedding_is_held_once() -> None:
    tied = Made(Case([{}], {"tied_head": True}, {"embedding": "ternary row"})).load("int8")
    apart = Made(Case([{}], {}, {"embedding": "ternary row", "head": "ternary row"})).load("int8")
    assert apart.weight_bytes - tied.weight_bytes == _core.formats.layout_bytes("t16", VOCAB, HIDDEN)


@pytest.mark.parametrize(
    ("layer", "model", "gone", "there"),
    [
        ({"gated": False, "ffn_bias": True}, {}, {"gate", "gate_bias"}, {"up_bias", "down_bias"}),
        ({"parallel": True}, {}, {"ffn_norm"}, {"attention_norm"}),
        ({"norm": "layer", "parallel": True}, {}, {"ffn_norm_bias"}, {"attention_norm_bias"}),
        ({"norm": "layer", "head_norms": True}, {}, set(), {"query_norm_bias", "ffn_norm_bias"}),
        ({}, {"head_bias": True, "tied_head": True}, {"head"}, {"head_bias"}),
        ({}, {"position_embedding": True}, set(), {"position_embedding"}),
        ({"norm": "layer"}, {}, set(), {"final_norm_bias"}),
    ],
)
def test_slots(layer: dict[str, Any], model: dict[str, Any], gone: set[str], there: set[str]) -> None:
    slots = {slot.removeprefix("layers.0.") for slot in Made(Case([layer], model)).weights}
    assert there <= slots
    assert not gone & slots


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        ({"residual_scale": 0.0}, "residual_scale is positive, got 0"),
        ({"residual_scale": float("nan")}, "residual_scale is positive, got nan"),
        ({"activation": "tanh"}, "activation is one of silu, relu, relu2, gelu, gelu_erf, got 'tanh'"),
        ({"norm": "batch"}, "norm is one of rms, layer, got 'batch'"),
        ({"rotation": [1.0] * 10}, "at most half as many frequencies"),
    ],
)
def test_specs_that_make_no_sense(layer: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Made(Case([dict(layer)]))


def test_vectors_are_floats() -> None:
    made = Made(Case([{"norm": "layer"}]))
    made.weights["final_norm_bias"] = store(
        IDS[:1].astype(np.float32) + np.eye(1, HIDDEN, dtype=np.float32), "int8 row"
    )
    with pytest.raises(ValueError, match="'final_norm_bias' must be floating point"):
        made.load("float")
