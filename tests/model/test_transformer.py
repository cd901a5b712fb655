# SPDX-License-Identifier: Apache-2.0
"""What a ModelSpec can say, against a decoder in NumPy; the same bits for every way to run it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from numpy_decoder import NumpyDecoder

from ternaryforge import _core

Activations = Literal["int8", "float"]
Float32 = NDArray[np.float32]
PackedTensor = _core.formats.PackedTensor

VOCAB, HIDDEN, CONTEXT = 43, 72, 40
IDS = np.random.default_rng(0).integers(0, VOCAB, 37).astype(np.int32)
LAYER: dict[str, Any] = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 18,
    "rotation": 10.0 ** (-np.arange(9) / 4),
    "ffn_size": 130,
    "activation": "silu",
}
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "context_length": CONTEXT,
    "norm_epsilon": 1e-5,
    "tied_head": False,
}
PHI = {"gated": False, "norm": "layer", "parallel": True, "projection_bias": True, "output_bias": True}
PHI |= {"ffn_bias": True, "activation": "gelu", "rotation": LAYER["rotation"][:4]}


@dataclass
class Case:
    """Keywords of the layers and of the model beyond LAYER and MODEL, and how slots are stored."""

    layers: list[dict[str, Any]] = field(default_factory=lambda: [{}, {}])
    model: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)  # by the end of the slot's name; others are f32


def store(values: Float32, how: str) -> PackedTensor:
    """A matrix as "f32", "f16", "int8 KIND", "binary KIND" or "ternary KIND", with scales of that kind."""
    rows, cols = values.shape
    layout, _, kind = how.partition(" ")
    if layout in {"f32", "f16"}:
        return PackedTensor(layout, rows, cols, values.astype({"f32": np.float32, "f16": np.float16}[layout]))
    shape = {"tensor": (1,), "row": (rows,), "group": (rows, -(-cols // 64))}[kind]
    scales = np.random.default_rng(rows).uniform(0.5, 1.5, shape).astype(np.float32) * values.std()
    if layout == "int8":
        scales /= np.float32(50)
        codes = np.clip(np.rint(values / scales.reshape(-1, 1)), -127, 127).astype(np.int8)
        return PackedTensor("int8", rows, cols, codes, scale_kind=kind, scales=scales)
    trits = np.sign(values) if layout == "binary" else np.clip(np.rint(values / values.std()), -1, 1)
    packed = _core.formats.pack(trits.astype(np.int8), "t16")
    return PackedTensor("t16", rows, cols, packed, scale_kind=kind, group_size=64 * (kind == "group"), scales=scales)


def values_of(tensor: PackedTensor) -> NDArray[np.float64]:
    """The matrix that a tensor stands for."""
    shape = (tensor.rows, tensor.cols)
    if tensor.layout in {"f32", "f16"}:
        return tensor.data.view({"f32": np.float32, "f16": np.float16}[tensor.layout]).reshape(shape).astype(np.float64)
    if tensor.layout == "int8":
        codes = tensor.data.view(np.int8).reshape(shape)
    else:
        codes = _core.formats.unpack(tensor.data, tensor.layout, *shape)
    scales = tensor.effective_scales.astype(np.float64)
    columns = np.repeat(scales.reshape(len(codes) if scales.size > 1 else 1, -1), 64, 1) if scales.ndim == 2 else scales
    return codes * (columns[:, : tensor.cols] if scales.ndim == 2 else columns.reshape(-1, 1))


class Made:
    """The case as a model of the core and as its witness."""

    def __init__(self, case: Case) -> None:
        layers, model = [LAYER | layer for layer in case.layers], MODEL | case.model
        self.spec = _core.model.ModelSpec(layers=[_core.model.LayerSpec(**layer) for layer in layers], **model)
        random = np.random.default_rng(1)
        self.weights: dict[str, PackedTensor] = {}
        for slot, (rows, cols) in self.spec.slots().items():
            values = random.normal(size=(rows, cols)).astype(np.float32)
            if rows > 1 and "embedding" not in slot:
                values *= np.float32(1.5 / np.sqrt(cols))
            how = next((how for end, how in case.stored.items() if slot.endswith(end)), "f32")
            self.weights[slot] = store(values, how)
        dense = {slot: values_of(tensor) for slot, tensor in self.weights.items()}
        self.values = {slot: values[0] if len(values) == 1 else values for slot, values in dense.items()}
        self.layers, self.model = layers, model

    def ternary_slots(self) -> set[str]:
        return {slot for slot, tensor in self.weights.items() if tensor.layout == "t16"}

    def witness(self, *, int8: Collection[str] = (), **options: Any) -> NDArray[np.float64]:
        return NumpyDecoder(self.model, self.layers, self.values, int8=int8, **options).logits(IDS)

    def load(self, activations: Activations, threads: int = 1, **options: Any) -> _core.model.Transformer:
        return _core.model.Transformer(self.spec, self.weights, activations=activations, threads=threads, **options)


def logits_of(model: _core.model.Transformer, chunk: int = len(IDS)) -> Float32:
    state = model.new_sequence()
    parts = [IDS[begin : begin + chunk] for begin in range(0, len(IDS), chunk)]
    return np.concatenate([model.forward([(part, state)], logits="all") for part in parts])


def assert_near(found: Float32, expected: NDArray[np.float64], relative: float = 1e-5) -> None:
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


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
        ({"activation": "tanh"}, "activation is silu, relu, relu2, gelu or gelu_erf, got 'tanh'"),
        ({"norm": "batch"}, "norm is rms or layer, got 'batch'"),
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
