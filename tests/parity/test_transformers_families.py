# SPDX-License-Identifier: Apache-2.0
"""Every family and every kind of rotation against transformers, both computing in float32.

Models have several layers and odd sizes; windows and original contexts are shorter than the texts.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import (
    MIN_DISTINCT,
    decided_greedy,
    figures,
    load_float32,
    make_config,
    make_model,
    peer_greedy,
    peer_logits,
    random_ids,
    relative_error,
)
from safetensors.torch import load_file, save_file

from ternaryforge import TernaryModel

LENGTHS = (1, 7, 150)
GQA: dict[str, Any] = {"hidden_size": 78, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 22}
HEADS: dict[str, Any] = {"hidden_size": 120, "num_attention_heads": 6, "num_key_value_heads": 2}
THETA = {"rope_theta": 5000.0}
ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "truncate": False,
        "attention_factor": 0.8,
    },
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
}
FULL, SLIDING = "full_attention", "sliding_attention"
CAPS = {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 1.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama attention bias": ("llama", GQA | {"attention_bias": True}),
    "llama every bias": ("llama", GQA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama shaped as SmolLM2": (
        "llama",
        {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 140}
        | {"num_hidden_layers": 5, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    ),
    "mistral": ("mistral", GQA | {"sliding_window": None}),
    "mistral window": ("mistral", GQA | {"sliding_window": 13}),
    "mistral hidden by heads": ("mistral", {"hidden_size": 90, "num_attention_heads": 5, "sliding_window": 32}),
    "qwen2": ("qwen2", GQA | {"num_hidden_layers": 4, "use_sliding_window": False, "sliding_window": 9}),
    "qwen2 tied, last layers windowed": (
        "qwen2",
        {"num_hidden_layers": 4, "tie_word_embeddings": True}
        | {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2},
    ),
    "qwen2 layer types": (
        "qwen2",
        GQA | {"use_sliding_window": True, "sliding_window": 11, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "qwen3": ("qwen3", GQA | {"tie_word_embeddings": True}),
    "qwen3 biases, windows, yarn": (
        "qwen3",
        GQA
        | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
        | {"rope_parameters": THETA | ROTATIONS["yarn"]},
    ),
    "gemma": ("gemma", GQA | {"tie_word_embeddings": True}),
    "gemma one KV head, biases": ("gemma", {"num_key_value_heads": 1, "head_dim": 26, "attention_bias": True}),
    "gemma2": ("gemma2", GQA | CAPS | {"num_hidden_layers": 4, "sliding_window": 11, "query_pre_attn_scalar": 13}),
    "gemma2 tied, no caps, layer types": (
        "gemma2",
        GQA
        | {"tie_word_embeddings": True, "attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"sliding_window": 30, "layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "gemma3": (
        "gemma3",
        GQA
        | {"num_hidden_layers": 5, "sliding_window": 17, "query_pre_attn_scalar": 30, "tie_word_embeddings": True}
        | {"sliding_window_pattern": 2, "rope_parameters": {FULL: {"rope_theta": 9e5}, SLIDING: {"rope_theta": 3e3}}},
    ),
    "gemma3 scaled, layer types, final cap": (
        "gemma3",
        GQA
        | {"sliding_window": 17, "layer_types": [FULL, SLIDING, FULL], "final_logit_softcapping": 1.5}
        | {"rope_parameters": {FULL: THETA | ROTATIONS["linear"], SLIDING: THETA}},
    ),
    "phi": ("phi", HEADS),
    "phi exact gelu, tied": ("phi", {"hidden_act": "gelu", "tie_word_embeddings": True}),
    "phi relu, half of each head linear": (
        "phi",
        HEADS
        | {"hidden_act": "relu"}
        | {"rope_parameters": THETA | ROTATIONS["linear"] | {"partial_rotary_factor": 0.4}},
    ),
    "phi3": ("phi3", HEADS),
    "phi3 window, part of each head": (
        "phi3",
        HEADS
        | {"sliding_window": 13, "rope_parameters": THETA | {"rope_type": "default", "partial_rotary_factor": 0.8}},
    ),
    "phi3 tied": ("phi3", {"tie_word_embeddings": True}),
}


def compare(folder: Path, family: str, changes: dict[str, Any]) -> None:
    """Logits and greedy text of a random model in both libraries."""
    config = make_config(family, **changes)
    spread = 2.0 if config.tie_word_embeddings else 0.4 if family == "phi" else 1.0  # plain ReLU adds its mean
    model = make_model(config, seed=1, spread=spread)
    model.save_pretrained(folder)
    ours, theirs = TernaryModel.from_pretrained(folder), load_float32(folder)
    for count in LENGTHS:
        ids = random_ids(count)
        error = relative_error(ours.logits(ids), peer_logits(theirs, ids))
        figures.info("%s, %d tokens: relative error %.1e", family, count, error)
        assert error <= 1e-4
    prompts = [random_ids(7, seed=seed) for seed in range(3)]
    texts, _ = peer_greedy(theirs, prompts, 64)
    assert max(len(set(text)) for text in texts) >= MIN_DISTINCT
    assert [result.token_ids for result in ours.generate(prompts, max_new_tokens=64)] == texts


@pytest.mark.parametrize("name", MODELS)
def test_family(tmp_path: Path, name: str) -> None:
    compare(tmp_path, *MODELS[name])


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotation(tmp_path: Path, name: str) -> None:
    compare(tmp_path, "llama", GQA | {"rope_parameters": THETA | ROTATIONS[name]})


# The fields that are left out, and sizes that fit what is left.
ABSENT: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "mistral": (("sliding_window", "num_key_value_heads"), {"num_attention_heads": 16, "hidden_size": 64}),
    "qwen2": (
        ("use_sliding_window", "sliding_window", "max_window_layers", "num_key_value_heads"),
        {"num_attention_heads": 32, "hidden_size": 64},
    ),
    "qwen3": (
        ("use_sliding_window", "sliding_window", "num_key_value_heads", "head_dim", "attention_bias"),
        {"num_attention_heads": 32},
    ),
    "gemma": (("num_key_value_heads", "head_dim", "attention_bias"), {"num_attention_heads": 16, "hidden_size": 64}),
    "gemma2": (
        ("num_key_value_heads", "head_dim", "query_pre_attn_scalar", "attn_logit_softcapping", "hidden_activation"),
        {"num_attention_heads": 4},
    ),
    "gemma3": (
        ("num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window", "_sliding_window_pattern"),
        {"num_attention_heads": 4, "num_hidden_layers": 7},
    ),
}


@pytest.mark.parametrize("family", ABSENT)
def test_absent_fields_mean_what_the_class_says(tmp_path: Path, family: str) -> None:
    names, changes = ABSENT[family]
    absent = {*names, "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "hidden_act", "layer_types"}
    full = make_config(family, **changes)
    config = type(full)(**{name: value for name, value in full.to_dict().items() if name not in absent})
    make_model(config).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in absent}))
    model = TernaryModel.from_pretrained(tmp_path)
    assert model.context_length == config.max_position_embeddings
    assert model.architecture.tied_head == config.tie_word_embeddings
    ids = random_ids(33)
    error = relative_error(model.logits(ids), peer_logits(load_float32(tmp_path), ids))
    figures.info("relative error %.1e", error)
    assert error <= 1e-4


ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


def test_biases_of_latents_in_training(tmp_path: Path) -> None:
    """Rounded at every use by transformers, at load by us; the bias is added unscaled."""
    make_model(make_config("qwen2", **GQA), seed=3, spread=0.5).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": ONLINE}))
    ours, theirs = TernaryModel.from_pretrained(tmp_path), load_float32(tmp_path)
    ids = random_ids(33)
    found, expected = ours.logits(ids), peer_logits(theirs, ids)
    # A code that flips at a rounding tie changes the tokens from there on, but not half of them.
    error = float(np.median(np.abs(found - expected).max(-1)) / np.abs(expected).max())
    figures.info("median relative error %.1e", error)
    assert error <= 1e-5
    prompt, text = decided_greedy(theirs, 64)
    assert ours.generate(prompt, max_new_tokens=64).token_ids == text


def test_latents_of_1bitllm(tmp_path: Path) -> None:
    """transformers has no such class; its bitnet with SiLU computes the same from renamed norms."""
    config = make_config("bitnet", hidden_act="silu", hidden_size=84, num_attention_heads=6, num_key_value_heads=2)
    make_model(config, seed=3, spread=0.5).save_pretrained(tmp_path / "theirs")
    fields = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(fields | {"quantization_config": ONLINE}))
    renamed = {
        name.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm"): tensor
        for name, tensor in load_file(tmp_path / "theirs" / "model.safetensors").items()
    }
    (tmp_path / "ours").mkdir()
    save_file(renamed, tmp_path / "ours" / "model.safetensors")
    own = {"architectures": ["BitnetForCausalLM"], "model_type": "llama", "weight_bits": 1, "input_bits": 8}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(fields | own))
    ours, theirs = TernaryModel.from_pretrained(tmp_path / "ours"), load_float32(tmp_path / "theirs")
    assert ours.transformer.activations == "int8"
    ids = random_ids(33)
    found, expected = ours.logits(ids), peer_logits(theirs, ids)
    error = float(np.median(np.abs(found - expected).max(-1)) / np.abs(expected).max())
    figures.info("median relative error %.1e", error)
    assert error <= 1e-5
    prompt, text = decided_greedy(theirs, 64)
    assert ours.generate(prompt, max_new_tokens=64).token_ids == text


# As older versions of transformers, or the makers, wrote the same models.
OLDER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}, {}),
    "qwen3": ("qwen3", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2}, {}),
    "gemma2": ("gemma2", {"sliding_window": 11}, {}),
    "gemma3": (
        "gemma3",
        {"num_hidden_layers": 4, "sliding_window": 17, "sliding_window_pattern": 3, "rope_parameters": None},
        {
            "sliding_window_pattern": 3,
            "rope_theta": 9e5,
            "rope_local_base_freq": 3e3,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_config_as_older_versions_write_it(tmp_path: Path, name: str) -> None:
    family, changes, fields = OLDER[name]
    make_model(make_config(family, **GQA | changes), seed=1).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for field in ("layer_types", "rope_parameters", "_sliding_window_pattern"):
        stored.pop(field, None)
    (tmp_path / "config.json").write_text(json.dumps(stored | fields))
    ids = random_ids(33)
    error = relative_error(TernaryModel.from_pretrained(tmp_path).logits(ids), peer_logits(load_float32(tmp_path), ids))
    figures.info("relative error %.1e", error)
    assert error <= 1e-4
