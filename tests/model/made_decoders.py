# SPDX-License-Identifier: Apache-2.0
"""Small decoders of any ModelSpec with random weights, as models of the core and as their witness."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
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
