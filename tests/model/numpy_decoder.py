# SPDX-License-Identifier: Apache-2.0
"""A decoder of any ModelSpec in NumPy and float64: the keywords of the spec and the values of every slot."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_LAYER = {
    "rotation_scale": 1.0,
    "attention_scale": None,
    "attention_soft_cap": 0.0,
    "window": 0,
    "gated": True,
    "norm": "rms",
    "parallel": False,
    "residual_scale": 1.0,
}
_MODEL = {"embedding_scale": 1.0, "norm_offset": 0.0, "logit_soft_cap": 0.0}
_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
}


def quantize(x: Floats) -> Floats:
    """What int8 activations leave of each row."""
    scale = 127 / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    return np.rint(x * scale) / scale


class NumpyDecoder:
    """One sequence at a time, without a cache.

    A slot of `int8` sees activations quantised to 8 bits; an adapter is (A, B, scaling) by slot.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        layers: Sequence[Mapping[str, Any]],
        weights: Mapping[str, Floats],
        *,
        int8: Collection[str] = (),
        adapters: Mapping[str, tuple[Floats, Floats, float]] | None = None,
    ) -> None:
        self.model = _MODEL | dict(model)
        self.layers = [_LAYER | dict(layer) for layer in layers]
        self.weights = weights
        self.int8 = int8
        self.adapters = adapters or {}

    def linear(self, slot: str, x: Floats) -> Floats:
        out = (quantize(x) if slot in self.int8 else x) @ self.weights[slot].T
        if slot in self.adapters:
            a, b, scaling = self.adapters[slot]
            out = out + scaling * (x @ a.T) @ b.T
        return out + self.weights.get(slot + "_bias", 0)

    def norm(self, slot: str, x: Floats) -> Floats:
        """The identity where the model has no such norm; LayerNorm where it has a bias."""
        if slot not in self.weights:
            return x
        weight = self.weights[slot] + self.model["norm_offset"]
        epsilon = self.model["norm_epsilon"]
        if slot + "_bias" in self.weights:
            centred = x - x.mean(-1, keepdims=True)
            return centred / np.sqrt(x.var(-1, keepdims=True) + epsilon) * weight + self.weights[slot + "_bias"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight

    def rotate(self, layer: dict[str, Any], heads: Floats) -> Floats:
        """Pairs (i, i + pairs) of the first 2 * pairs values of every head; heads: [tokens, count, size]."""
        pairs = len(layer["rotation"])
        angles = np.outer(np.arange(len(heads)), layer["rotation"])[:, None, :]
        cos, sin = np.cos(angles) * layer["rotation_scale"], np.sin(angles) * layer["rotation_scale"]
        first, second, rest = np.split(heads, [pairs, 2 * pairs], axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def attention(self, prefix: str, layer: dict[str, Any], x: Floats) -> Floats:
        heads, kv_heads, size, count = layer["heads"], layer["kv_heads"], layer["head_dim"], len(x)
        query = self.linear(prefix + "query", x).reshape(count, heads, size)
        key = self.linear(prefix + "key", x).reshape(count, kv_heads, size)
        value = self.linear(prefix + "value", x).reshape(count, kv_heads, size)
        query = self.rotate(layer, self.norm(prefix + "query_norm", query))
        key = self.rotate(layer, self.norm(prefix + "key_norm", key))
        key, value = (np.repeat(part, heads // kv_heads, 1) for part in (key, value))
        scores = np.einsum("qhd,khd->hqk", query, key) * (layer["attention_scale"] or 1 / np.sqrt(size))
        if layer["attention_soft_cap"]:
            scores = layer["attention_soft_cap"] * np.tanh(scores / layer["attention_soft_cap"])
        seen = np.tri(count, dtype=bool)
        if layer["window"]:
            seen &= ~np.tri(count, k=-layer["window"], dtype=bool)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), value)
        mixed = self.norm(prefix + "attention_sub_norm", mixed.reshape(count, heads * size))
        return self.norm(prefix + "attention_post_norm", self.linear(prefix + "output", mixed))

    def feed_forward(self, prefix: str, layer: dict[str, Any], x: Floats) -> Floats:
        activate = ACTIVATIONS[layer["activation"]]
        up = self.linear(prefix + "up", x)
        mixed = activate(self.linear(prefix + "gate", x)) * up if layer["gated"] else activate(up)
        mixed = self.norm(prefix + "ffn_sub_norm", mixed)
        return self.norm(prefix + "ffn_post_norm", self.linear(prefix + "down", mixed))

    def logits(self, token_ids: NDArray[np.integer[Any]]) -> Floats:
        """[tokens, vocab]."""
        embedding = self.weights["embedding"]
        x = embedding[token_ids] * self.model["embedding_scale"]
        if "position_embedding" in self.weights:
            x = x + self.weights["position_embedding"][: len(token_ids)]
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            normed = self.norm(prefix + "attention_norm", x)
            x = x + layer["residual_scale"] * self.attention(prefix, layer, normed)
            if not layer["parallel"]:
                normed = self.norm(prefix + "ffn_norm", x)
            x = x + layer["residual_scale"] * self.feed_forward(prefix, layer, normed)
        x = self.norm("final_norm", x)
        head = "embedding" if self.model["tied_head"] else "head"
        logits = (quantize(x) if head in self.int8 else x) @ self.weights[head].T + self.weights.get("head_bias", 0)
        cap = self.model["logit_soft_cap"]
        return cap * np.tanh(logits / cap) if cap else logits
