# SPDX-License-Identifier: Apache-2.0
"""The Ternary-Core family against a forward pass in NumPy, written from docs/reference/ternary-core.md."""

import itertools
import json
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest
from numpy.typing import NDArray
from test_families import read

from ternaryforge import FormatError, TernaryModel, convert
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.inspection import inspect

Floats = NDArray[np.float64]
VOCABULARY, HIDDEN, FFN, LAYERS = 67, 36, 52, 3


def make_config(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_heads": 3,
        "num_layers": LAYERS,
        "intermediate_size": FFN,
        "max_seq_len": 96,
        "layer_norm_eps": 1e-3,
    } | changes


def make_tensors(config: dict[str, Any], *, seed: int = 0) -> made_models.Tensors:
    """Latents as training leaves them: wider than the clamp here and there."""
    rng = np.random.default_rng(seed)

    def entry(*shape: int, spread: float = 1.0, mean: float = 0.0) -> tuple[str, NDArray[Any]]:
        return "F32", (mean + spread * rng.standard_normal(shape)).astype(np.float32)

    tensors = {"wte.weight": entry(VOCABULARY, HIDDEN), "ln_f.weight": entry(HIDDEN)}
    if not config.get("use_rope"):
        tensors["wpe.weight"] = entry(config["max_seq_len"], HIDDEN)
    if config.get("tie_word_embeddings") is False:
        tensors["lm_head.weight"] = entry(VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        layer = f"h.{i}."
        for name in ("ln1", "ln2"):
            tensors[f"{layer}{name}.weight"] = entry(HIDDEN, spread=0.3, mean=1)
        if config.get("use_qk_norm", True):
            for name in ("q_norm", "k_norm"):
                tensors[f"{layer}attn.{name}.weight"] = entry(HIDDEN // 3, spread=0.3, mean=1)
        tensors[layer + "attn.c_attn.weight"] = entry(3 * HIDDEN, HIDDEN)
        tensors[layer + "attn.c_proj.weight"] = entry(HIDDEN, HIDDEN)
        names = ("w_gate", "w_up", "w_down") if config.get("use_swiglu") else ("c_fc", "c_proj")
        for name in names:
            down = name in {"w_down", "c_proj"}
            tensors[f"{layer}mlp.{name}.weight"] = entry(*((HIDDEN, FFN) if down else (FFN, HIDDEN)))
    return tensors


def used_weights(latents: NDArray[Any], mode: str, config: dict[str, Any], *, table: bool) -> Floats:
    """What a mode makes of latents."""
    if mode == "f16":
        return latents.astype(np.float64)
    if mode == "8bit":
        largest = np.abs(latents).max(1, keepdims=True)
        return np.rint(latents * (np.float32(127) / largest)) * (largest / 127.0)
    clamped = np.clip(latents, -config.get("latent_clamp_max", 1.5), config.get("latent_clamp_max", 1.5))
    mean = np.float32(np.abs(clamped).mean(dtype=np.float64))
    if mode == "binary":
        codes = np.sign(clamped)
    elif config.get("use_dynamic_threshold", True):
        codes = np.where(np.abs(clamped) > 0.7 * mean, np.sign(clamped), 0)
    else:
        codes = np.clip(np.rint(clamped / mean), -1, 1)
    return codes.astype(np.float64) * float(mean) / (1.0 if table else np.sqrt(latents.shape[1]))


class Witness:
    """One sequence, no cache, float64."""

    def __init__(self, config: dict[str, Any], tensors: made_models.Tensors) -> None:
        self.config, self.tensors = config, tensors
        bit_map = config.get("layer_bit_map")
        if bit_map is None:
            bit_map = {"layer_modes": ["ternary" if config.get("use_ternary", True) else "binary"] * LAYERS}
        self.modes = bit_map["layer_modes"]
        self.embedding = bit_map.get("embedding", "f16")
        self.head = bit_map.get("lm_head") or self.embedding

    def linear(self, i: int, name: str, x: Floats) -> Floats:
        weights = used_weights(self.tensors[f"h.{i}.{name}.weight"][1], self.modes[i], self.config, table=False)
        bias = self.tensors.get(f"h.{i}.{name}.bias")
        return x @ weights.T + (0 if bias is None else bias[1])

    def norm(self, name: str, x: Floats) -> Floats:
        epsilon = self.config["layer_norm_eps"]
        if self.config.get("use_subln") is False:
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * self.tensors[name + ".weight"][1]

    def turn(self, heads: Floats) -> Floats:
        """Neighbours (2 j, 2 j + 1) turn by position * 10000^(-2 j / size)."""
        size = heads.shape[-1]
        angles = np.outer(np.arange(len(heads)), 10000.0 ** (-np.arange(0, size, 2) / size))[:, None, :]
        turned = (heads[..., ::2] + 1j * heads[..., 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], -1).reshape(heads.shape)

    def attention(self, i: int, x: Floats) -> Floats:
        count, size = len(x), HIDDEN // 3
        query, key, value = (
            part.reshape(count, 3, size) for part in np.split(self.linear(i, "attn.c_attn", x), 3, axis=1)
        )
        if self.config.get("use_qk_norm", True):
            query, key = self.norm(f"h.{i}.attn.q_norm", query), self.norm(f"h.{i}.attn.k_norm", key)
        if self.config.get("use_rope"):
            query, key = self.turn(query), self.turn(key)
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(size)
        weights = np.exp(np.where(np.tri(count, dtype=bool), scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        return self.linear(i, "attn.c_proj", np.einsum("hqk,khd->qhd", weights, value).reshape(count, HIDDEN))

    def feed_forward(self, i: int, x: Floats) -> Floats:
        def silu(y: Floats) -> Floats:
            return y / (1 + np.exp(-y))

        if self.config.get("use_swiglu"):
            return self.linear(i, "mlp.w_down", silu(self.linear(i, "mlp.w_gate", x)) * self.linear(i, "mlp.w_up", x))
        hidden = self.linear(i, "mlp.c_fc", x)
        relu2 = np.maximum(hidden, 0) ** 2
        return self.linear(i, "mlp.c_proj", relu2 if self.config.get("use_relu2") else silu(hidden))

    def logits(self, ids: list[int]) -> Floats:
        scale = np.sqrt(0.5) if self.config.get("use_residual_scaling", True) else 1.0
        x = used_weights(self.tensors["wte.weight"][1], self.embedding, self.config, table=True)[ids]
        if not self.config.get("use_rope"):
            x = x + self.tensors["wpe.weight"][1][: len(ids)]
        for i in range(LAYERS):
            x = x + scale * self.attention(i, self.norm(f"h.{i}.ln1", x))
            x = x + scale * self.feed_forward(i, self.norm(f"h.{i}.ln2", x))
        tied = self.config.get("tie_word_embeddings", True)
        head = self.tensors["wte.weight" if tied else "lm_head.weight"][1]
        return self.norm("ln_f", x) @ used_weights(head, self.head, self.config, table=True).T


MIXED = {"embedding": "8bit", "layer_modes": ["8bit", "ternary", "binary"], "lm_head": "f16"}
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "gated, rope": {"use_swiglu": True, "use_rope": True},
    "rope, relu2, no norms of heads": {"use_rope": True, "use_relu2": True, "use_qk_norm": False},
    "LayerNorm": {"use_subln": False, "use_qk_norm": False, "use_residual_scaling": False},
    "binary": {"use_ternary": False, "use_rope": True},
    "rounded, narrow clamp": {"use_dynamic_threshold": False, "latent_clamp_max": 0.8},
    "every mode": {"layer_bit_map": MIXED, "use_swiglu": True, "use_rope": True},
    "dense ends apart": {
        "tie_word_embeddings": False,
        "layer_bit_map": {"embedding": "f16", "layer_modes": ["f16", "ternary", "f16"]},
    },
    "ternary ends": {"layer_bit_map": {"embedding": "ternary", "layer_modes": ["ternary"] * 3}, "use_rope": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_against_numpy(tmp_path: Path, name: str) -> None:
    """The latents, and what `convert` makes of them; 64 greedy tokens of each."""
    config = make_config(**CONFIGS[name])
    tensors = make_tensors(config)
    if name == "every mode":
        tensors["h.0.attn.c_attn.bias"] = ("F32", np.linspace(-1, 1, 3 * HIDDEN, dtype=np.float32))
    witness = Witness(config, tensors)
    model = TernaryModel.from_pretrained(made_models.write_folder(tmp_path / "in", config, tensors))
    assert model.transformer.activations == "float"
    for count in (1, 7, 60):
        ids = np.random.default_rng(count).integers(0, VOCABULARY, count).tolist()
        expected = witness.logits(ids)
        assert np.abs(model.logits(ids) - expected).max() <= 1e-4 * np.abs(expected).max()
    ids = [3, 1, 4]
    text = model.generate(ids, max_new_tokens=64).token_ids
    best = witness.logits(ids + text)[2:-1].argmax(-1).tolist()
    assert text == best
    report = convert(tmp_path / "in", tmp_path / "out", scale="tensor")
    after = TernaryModel.from_pretrained(tmp_path / "out", activations="float")
    expected = model.logits(ids + text)
    assert np.array_equal(after.logits(ids + text), expected)
    fast = TernaryModel.from_pretrained(tmp_path / "out")
    assert fast.transformer.activations == "int16"
    assert np.abs(fast.logits(ids + text) - expected).max() <= 1e-3 * np.abs(expected).max()
    assert not report.warnings
    found = inspect(tmp_path / "out")
    assert (found.arch, found.context_length) == ("Ternary-Core", 96)
    assert found.warnings == ["There is no tokenizer: only token ids can be generated from."]
    ternary = {item.name for item in report.linears}
    stored = Checkpoint.open(tmp_path / "out")
    assert ternary == {name for name in stored if stored.info(name).dtype == "U8"}
    modes = witness.modes
    gated = 1 if config.get("use_swiglu") else 0
    ends = 1 if witness.embedding == "ternary" else 0
    assert len(ternary) == ends + sum(mode in {"ternary", "binary"} for mode in modes) * (4 + gated)


def test_defaults_of_the_page() -> None:
    found = read({"use_ternary": True})
    slots = found.spec.slots()
    assert found.family == "ternary-core"
    assert (slots["embedding"], found.spec.context_length) == ((50257, 512), 512)
    assert slots["layers.5.up"] == (2048, 512)
    assert "layers.6.up" not in slots
    assert "layers.0.gate" not in slots
    assert slots["layers.0.query_norm"] == (1, 64)
    assert slots["position_embedding"] == (512, 512)
    assert found.rules["layers.0.value"].kind == "threshold"
    assert "embedding" not in found.rules


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "max_seq_len belongs to Ternary-Core and architectures to a Hugging"),
        ({"num_hidden_layers": 2}, "max_seq_len belongs to Ternary-Core and num_hidden_layers to a Hugging Face"),
        ({"window": 3}, "window is no field of Ternary-Core, got 3"),
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads 5"),
        ({"num_heads": 12, "use_rope": True}, "num_heads must leave heads of even size"),
        ({"use_subln": False}, "use_subln must be true .RMSNorm. where use_qk_norm is true"),
        ({"use_swiglu": 1}, "use_swiglu must be true or false"),
        ({"latent_clamp_max": 0}, "latent_clamp_max must be a positive number"),
        ({"layer_bit_map": {"layer_modes": ["ternary"]}}, "layer_modes must be a list of 3 modes"),
        ({"layer_bit_map": {"layer_modes": ["two_plane"] * 3}}, "layer_modes may be f16, 8bit, ternary, binary"),
        ({"layer_bit_map": {"layer_modes": ["f16"] * 3, "ffn": "f16"}}, "ffn is no field of layer_bit_map"),
        ({"layer_bit_map": {"layer_modes": ["f16"] * 3, "embedding": 8}}, "embedding may be f16"),
    ],
)
def test_refused_configurations(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        read(make_config(**changes))


def test_refused_tensors(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"h.1.attn.c_attn.weight": ("F32", np.ones((HIDDEN, HIDDEN)))}, r"has shape \[36, 36\], expected \[108, 36\]"),
        ({"h.0.mlp.c_fc.weight": ("F32", np.full((FFN, HIDDEN), np.nan))}, "'h.0.mlp.c_fc.weight' holds NaN"),
        ({"h.0.mlp.c_fc.weight": ("I8", np.ones((FFN, HIDDEN)))}, "dtype I8, expected floating point latents"),
        ({"h.0.mlp.w_gate.weight": ("F32", np.ones((FFN, HIDDEN)))}, "w_gate.weight' is no part of Ternary-Core"),
    ]
    for number, (changes, text) in zip(itertools.count(), wrong):
        with pytest.raises(FormatError, match=text):
            TernaryModel.from_pretrained(made_models.write_folder(tmp_path / str(number), config, tensors | changes))
    del tensors["wpe.weight"]
    with pytest.raises(FormatError, match=r"'wpe.weight' is missing"):
        TernaryModel.from_pretrained(made_models.write_folder(tmp_path / "wpe", config, tensors))


def test_its_own_rule_is_kept(tmp_path: Path) -> None:
    config = make_config()
    folder = made_models.write_folder(tmp_path / "in", config, make_tensors(config))
    with pytest.raises(FormatError, match=r"have a rule of their own .*: use scale='tensor'"):
        convert(folder, tmp_path / "out", scale="row")
    assert json.loads((folder / "config.json").read_text()) == config
