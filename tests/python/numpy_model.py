# SPDX-License-Identifier: Apache-2.0
"""Llama and bitnet in NumPy and float64, written from the papers: the witness for whole models."""

from typing import Any

import made_models
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def widen(entry: tuple[str, NDArray[Any]]) -> Floats:
    """Stored values as float64."""
    dtype, array = entry
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def unpack_rows(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    parts = [(packed >> shift & 3).astype(np.int8) - 1 for shift in (0, 2, 4, 6)]
    return np.concatenate(parts)


def quantize(x: Floats) -> tuple[Floats, Floats]:
    """Int8 codes and 127 * (1 / max) per row, the scale in float32 as the arithmetic contract says."""
    rows = x.astype(np.float32)
    scale = np.float32(127) * (np.float32(1) / np.maximum(np.abs(rows).max(-1, keepdims=True), np.float32(1e-5)))
    return np.rint(rows * scale).astype(np.float64), scale.astype(np.float64)


class NumpyModel:
    """One sequence at a time, without a cache."""

    def __init__(self, config: dict[str, Any], tensors: made_models.Tensors, *, int8: bool = False) -> None:
        self.config = config
        self.tensors = tensors
        self.int8 = int8

    def linear(self, name: str, x: Floats) -> Floats:
        dtype, stored = self.tensors[name + ".weight"]
        if dtype != "U8":
            return x @ widen((dtype, stored)).T
        trits = unpack_rows(stored).astype(np.float64)
        scale = widen(self.tensors[name + ".weight_scale"])
        quantization = self.config["quantization_config"]
        if quantization["quant_method"] == "bitnet" and quantization.get("linear_class") != "autobitlinear":
            scale = 1 / scale
        if scale.ndim == 2:
            scale = np.repeat(scale, quantization["group_size"], 1)[:, : trits.shape[1]]
        elif scale.size > 1:
            scale = scale[:, None]
        codes, step = quantize(x) if self.int8 else (x, np.ones((len(x), 1)))
        return codes @ (trits * scale).T / step

    def norm(self, name: str, x: Floats) -> Floats:
        variance = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(variance + self.config["rms_norm_eps"]) * widen(self.tensors[name + ".weight"])

    def rotate(self, heads: Floats) -> Floats:
        """Rotary positions, the first half of a head paired with the second; heads: [n, count, size]."""
        size = heads.shape[-1]
        inverse = self.config["rope_theta"] ** (-np.arange(0, size, 2) / size)
        angles = np.outer(np.arange(len(heads)), inverse)[:, None, :]
        first, second = heads[..., : size // 2], heads[..., size // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(self, layer: str, x: Floats) -> Floats:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size, count = self.config["head_dim"], len(x)
        query = self.rotate(self.linear(layer + "self_attn.q_proj", x).reshape(count, heads, size))
        key = self.rotate(self.linear(layer + "self_attn.k_proj", x).reshape(count, kv_heads, size))
        value = self.linear(layer + "self_attn.v_proj", x).reshape(count, kv_heads, size)
        key, value = (np.repeat(part, heads // kv_heads, 1) for part in (key, value))
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(size)
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, value).reshape(count, heads * size)
        if self.config["model_type"] == "bitnet":
            mixed = self.norm(layer + "self_attn.attn_sub_norm", mixed)
        return self.linear(layer + "self_attn.o_proj", mixed)

    def feed_forward(self, layer: str, x: Floats) -> Floats:
        gate, up = self.linear(layer + "mlp.gate_proj", x), self.linear(layer + "mlp.up_proj", x)
        if self.config["model_type"] == "bitnet":
            mixed = self.norm(layer + "mlp.ffn_sub_norm", np.maximum(gate, 0) ** 2 * up)
        else:
            mixed = gate / (1 + np.exp(-gate)) * up
        return self.linear(layer + "mlp.down_proj", mixed)

    def logits(self, token_ids: list[int]) -> Floats:
        """[tokens, vocab]."""
        embedding = widen(self.tensors["model.embed_tokens.weight"])
        x = embedding[token_ids]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            x = x + self.attention(layer, self.norm(layer + "input_layernorm", x))
            x = x + self.feed_forward(layer, self.norm(layer + "post_attention_layernorm", x))
        x = self.norm("model.norm", x)
        return x @ (embedding if self.config["tie_word_embeddings"] else widen(self.tensors["lm_head.weight"])).T

    def log_probs(self, token_ids: list[int]) -> Floats:
        """[tokens, vocab], natural logarithm."""
        logits = self.logits(token_ids)
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    def greedy(self, token_ids: list[int], count: int) -> list[int]:
        ids = list(token_ids)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(token_ids) :]
