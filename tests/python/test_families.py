# SPDX-License-Identifier: Apache-2.0
"""From config.json and tensors to weights of the core: what is accepted, what is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest

from ternaryforge import FormatError, _core
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.families import read_architecture
from ternaryforge.quantization import parse_quantization
from ternaryforge.weights import load_weights

BITNET = {"quant_method": "bitnet"}


def read(config: dict[str, Any]) -> Any:
    return read_architecture(config, where="config.json")


def test_a_llama() -> None:
    found = read(made_models.llama_config())
    assert (found.family, found.tied_head, found.eos_ids) == ("llama", False, (258,))
    assert found.spec.context_length == 48
    slots = found.spec.slots()
    assert slots["layers.1.query"] == (24, 20)
    assert slots["layers.0.key"] == (12, 20)
    assert slots["head"] == (263, 20)
    assert found.tensor_names["layers.1.down"] == "model.layers.1.mlp.down_proj.weight"
    assert set(found.tensor_names) == set(slots)
    assert not any(found.is_ternary(slot) for slot in slots)


def test_a_bitnet() -> None:
    found = read(made_models.bitnet_config())
    assert found.tensor_names["layers.0.attention_sub_norm"] == "model.layers.0.self_attn.attn_sub_norm.weight"
    assert found.spec.slots()["layers.0.ffn_sub_norm"] == (1, 28)
    assert found.is_ternary("layers.0.key")
    assert not found.is_ternary("embedding")


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["bitnet-b1.58-2B-4T", "llama3-8b", "smollm2-135m", "smollm2-360m", "bitllama-110M", "bitnet_b1_58-large"]
)
def test_published_configurations(shared: Path, name: str) -> None:
    config = json.loads((shared / "data/configs" / f"{name}.config.json").read_text())
    assert read(config).spec.vocab_size == config["vocab_size"]


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_dtype": "bfloat16"},
        {"dtype": "float32", "transformers_version": "5.23.0"},
        {"head_dim": None, "hidden_size": 24},
        {"num_key_value_heads": None},
        {"eos_token_id": [1, 2]},
        {"eos_token_id": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": None},
        {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "attention_dropout": 0.1},
        {"sliding_window": None, "some_new_field": None, "_name_or_path": "x"},
        {"layer_types": ["full_attention", "full_attention"]},
        {"architectures": None},
        {"hidden_act": None, "tie_word_embeddings": None},
    ],
)
def test_accepted_drift(changes: dict[str, Any]) -> None:
    assert read(made_models.llama_config(**changes)).family == "llama"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architectures": ["GPTJForCausalLM"]}, "'GPTJForCausalLM' is not supported; supported are Llama"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "architectures must name one"),
        ({"architectures": None, "model_type": "gptj"}, "no supported architecture .model_type 'gptj'"),
        ({"model_type": "prism_hadamard_qwen35"}, "model_type says that weights are rotated .Hadamard., which is not"),
        ({"prism.hadamard.size": 1024}, "prism.hadamard.size says that weights are rotated"),
        ({"model_type": "mistral"}, "'mistral' does not belong to LlamaForCausalLM"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"mlp_bias": "yes"}, "mlp_bias must be true or false"),
        ({"pretraining_tp": 2}, "pretraining_tp is supported only as 1 or None, got 2"),
        ({"sliding_window": 4096}, "sliding_window is supported only as None"),
        ({"hidden_act": "gelu"}, "hidden_act is supported only as 'silu', got 'gelu'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling': low_freq_factor must be a positive number",
        ),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling': factor must be a positive number"),
        ({"rope_scaling": {"type": "longrope"}}, "type must be one of default, linear, dynamic, llama3, yarn, got"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters': factor must be a positive"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 2}}, "factor is not supported with the rotation 'default'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}}, "finetuned is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, "rope_theta must be above 1"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor must be above low_freq_factor",
        ),
        (
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 1e4}},
            "rope_scaling cannot stand beside rope_parameters",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_theta": None}, "rope_theta must be a positive number"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types must name full_attention for each of 2 layers"),
        ({"layer_types": ["full_attention"]}, "layer_types must name full_attention for each of 2 layers"),
        ({"attention_multiplier": 0.5}, "attention_multiplier is not known and might change the mathematics"),
        ({"vocab_size": None}, "vocab_size must be an integer"),
        ({"hidden_size": 0}, "hidden_size must be an integer from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 10000"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        ({"rope_theta": "10000"}, "rope_theta must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"head_dim": None, "hidden_size": 22}, "hidden_size must be a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method 'gptq' is not supported"),
        ({"quantization_config": [1]}, "quantization_config must be an object"),
        (
            {"quantization": {"group_size": 128, "bits": 4}},
            "quantization.bits of ternary weights must be 1 or 2, got 4",
        ),
        ({"quantization": {"group_size": 32, "bits": 2}}, "quantization.group_size must be a positive multiple of 64"),
        ({"quantization": {"group_size": 64, "bits": 2, "mode": "mxfp4"}}, "mode must be 'affine', got 'mxfp4'"),
        (
            {"quantization": {"group_size": 64, "bits": 2, "lm_head": {"bits": 1}}},
            "quantization.lm_head is not supported, .* only one form for all layers",
        ),
        (
            {"quantization": {"group_size": 64, "bits": 2}, "quantization_config": BITNET},
            "quantization, which is MLX's, cannot stand beside quantization_config",
        ),
        ({"prism.hadamard.block": 1024}, "prism.hadamard.block says that weights are rotated"),
        ({"model_type": "prism_hadamard_qwen35"}, "model_type says that weights are rotated"),
        ({"quantization_config": BITNET | {"use_rms_norm": True}}, "use_rms_norm is not supported"),
        ({"quantization_config": BITNET | {"linear_class": "x"}}, "linear_class must be one of bitlinear"),
        ({"quantization_config": BITNET | {"quantization_mode": "online"}}, "'online' needs linear_class 'autob"),
        ({"quantization_config": BITNET | {"rotation": "hadamard"}}, r"says that weights are rotated .Hadamard."),
        ({"quantization_config": BITNET | {"modules_to_not_convert": "lm_head"}}, "must be a list of names"),
        ({"quantization_config": BITNET | {"modules_to_not_convert": ["("]}}, "malformed pattern"),
        ({"quantization_config": {"quant_method": "ternaryforge", "scale": "block"}}, "scale must be one of tensor"),
        (
            {"quantization_config": {"quant_method": "ternaryforge", "scale": "group", "group_size": 16}},
            "group_size must be a positive multiple of 64",
        ),
        ({"quantization_config": {"quant_method": "ternaryforge", "activation_bits": 4}}, "activation_bits must be 8"),
    ],
)
def test_refused_configurations(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text) as caught:
        read(made_models.llama_config(**changes))
    assert "config.json" in str(caught.value)


ANYTHING: list[Any] = [None, True, -1, 0, 3, 2.5, 1e300, "x", "", [], [1], ["x"], [[]], {}, {"a": 1}, {"type": []}]


def is_refused(config: dict[str, Any]) -> bool:
    try:
        read(config)
    except FormatError:
        return True
    return False


def test_any_value_of_any_field_is_taken_or_refused() -> None:
    own = {"quant_method": "ternaryforge", "scale": "group", "group_size": 64, "activation_bits": 8}
    refused = []
    for config in (made_models.llama_config(quantization_config=own), made_models.bitnet_config()):
        for field in (*config, *own, "rope_scaling", "rope_parameters", "layer_types", "modules_to_not_convert", "new"):
            for value in ANYTHING:
                inner = config["quantization_config"] | {field: value}
                refused += [is_refused(config | {field: value}), is_refused(config | {"quantization_config": inner})]
    assert 0.5 < sum(refused) / len(refused) < 0.95


def test_bitnet_needs_its_own_shape() -> None:
    with pytest.raises(FormatError, match="head_dim must be hidden_size / num_attention_heads = 20 / 4"):
        read(made_models.bitnet_config(hidden_size=20))
    with pytest.raises(FormatError, match="hidden_act is supported only as 'relu2'"):
        read(made_models.bitnet_config(hidden_act="silu"))
    with pytest.raises(FormatError, match="use_sub_norms"):
        read(made_models.bitnet_config(use_sub_norms=False))


@pytest.mark.parametrize(
    ("patterns", "dense"),
    [
        (None, {"lm_head"}),
        ([], set()),
        (["lm_head"], {"lm_head"}),
        (["model.layers.1"], {"model.layers.1.mlp.up_proj"}),
        (["up_proj"], {"model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"}),
        ([r"model.layers.\d+.mlp.up"], set()),
        ([r"model.layers.\d+.mlp"], {"model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"}),
    ],
)
def test_modules_to_not_convert_as_transformers_reads_it(patterns: list[str] | None, dense: set[str]) -> None:
    quantization = parse_quantization(
        {"quantization_config": BITNET | {"modules_to_not_convert": patterns}}, where="config.json"
    )
    assert quantization is not None
    modules = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"]
    assert {module for module in modules if quantization.keeps_dense(module)} == dense


def test_matches_the_function_of_transformers() -> None:
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    modules = [
        "lm_head",
        "model.layers.1.mlp.up_proj",
        "model.layers.11.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    for pattern in (
        "lm_head",
        "model.layers.1",
        "up_proj",
        "model.*up",
        "layers",
        "model",
        "proj",
        "a|model.layers.11",
    ):
        quantization = parse_quantization(
            {"quantization_config": BITNET | {"modules_to_not_convert": [pattern]}}, where="config.json"
        )
        assert quantization is not None
        for module in modules:
            assert quantization.keeps_dense(module) != utils.should_convert_module(module, [pattern])


def load(folder: Path) -> dict[str, _core.formats.PackedTensor]:
    checkpoint = Checkpoint.open(folder)
    return load_weights(checkpoint, read(checkpoint.config))


def make(folder: Path, config: dict[str, Any], changes: made_models.Tensors | None = None) -> Path:
    return made_models.write_folder(folder, config, made_models.make_tensors(config) | (changes or {}))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_dense_weights_keep_their_layout(tmp_path: Path, dtype: str) -> None:
    config = made_models.llama_config()
    tensors = made_models.make_tensors(config, dtype=dtype)
    weights = load(made_models.write_folder(tmp_path, config, tensors))
    query = weights["layers.0.query"]
    assert (query.layout, query.rows, query.cols) == (dtype.lower(), 24, 20)
    assert bytes(query.data) == tensors["model.layers.0.self_attn.q_proj.weight"][1].tobytes()
    assert weights["layers.0.ffn_norm"].rows == 1


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_both_scale_conventions(tmp_path: Path, linear_class: str) -> None:
    config = made_models.bitnet_config(quantization_config=BITNET | {"linear_class": linear_class})
    weight = load(make(tmp_path, config))["layers.1.up"]
    stored = Checkpoint.open(tmp_path).read_float32("model.layers.1.mlp.up_proj.weight_scale")
    expected = 1 / stored if linear_class == "bitlinear" else stored
    assert weight.effective_scales.tolist() == expected.tolist()
    assert 0.04 < weight.effective_scales[0] < 0.21


@pytest.mark.parametrize(
    "quantization",
    [
        {"scale": "tensor", "activation_bits": 8},
        {"scale": "row", "activation_bits": None},
        {"scale": "group", "group_size": 128},
        {"scale": "group", "group_size": 64, "activation_bits": 16},
    ],
)
def test_own_quantization(tmp_path: Path, quantization: dict[str, Any]) -> None:
    config = made_models.llama_config(
        quantization_config={"quant_method": "ternaryforge"} | quantization, intermediate_size=164
    )
    dense = ("F32", np.full((164, 20), 0.5, np.float32))
    name = "model.layers.0.mlp.gate_proj.weight"
    weights = load(make(tmp_path, config, {name: dense}))
    stored = Checkpoint.open(tmp_path).read_float32("model.layers.0.mlp.down_proj.weight_scale")
    assert weights["layers.0.down"].scale_kind == quantization["scale"]
    assert np.array_equal(weights["layers.0.down"].effective_scales.reshape(-1), stored.reshape(-1))
    assert weights["layers.0.gate"].layout == "f32"  # a layer that was kept dense


def test_online_latents_become_ternary(tmp_path: Path) -> None:
    fields = BITNET | {"linear_class": "autobitlinear", "quantization_mode": "online"}
    config = made_models.bitnet_config(quantization_config=fields)
    tensors = made_models.make_tensors(config)
    latent = tensors["model.layers.0.mlp.down_proj.weight"][1]
    down = load(made_models.write_folder(tmp_path, config, tensors))["layers.0.down"]
    scale = np.abs(latent).mean(dtype=np.float64)
    trits = _core.formats.unpack(down.data, down.layout, down.rows, down.cols)
    assert np.array_equal(trits, np.clip(np.rint(latent / scale), -1, 1))
    assert down.effective_scales[0] == pytest.approx(scale, rel=1e-6)


def test_excluded_modules_stay_dense(tmp_path: Path) -> None:
    excluded = ["lm_head", "model.layers.0.mlp.up_proj"]
    config = made_models.bitnet_config(quantization_config=BITNET | {"modules_to_not_convert": excluded})
    tensors = made_models.make_tensors(config)
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    tensors["model.layers.0.mlp.up_proj.weight"] = ("F16", np.ones((28, 24), np.float16))
    assert load(made_models.write_folder(tmp_path, config, tensors))["layers.0.up"].layout == "f16"


NAN = np.ones((28, 24), np.float32)
NAN[27, 23] = np.nan
PACKED = np.zeros((7, 24), np.uint8)
INVALID = PACKED.copy()
INVALID[6, 23] = 0b11000000
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({UP: ("I8", np.ones((28, 24)))}, f"'{UP}' has dtype I8, expected U8"),
        ({UP: ("F32", np.full((28, 24), 0.5))}, rf"'{UP}' has a '{UP}_scale' beside it and must hold -1, 0 and 1"),
        ({UP: ("U8", PACKED[:6])}, rf"'{UP}' has shape \[6, 24\], expected \[7, 24\]: four of the 28 rows"),
        ({UP: ("U8", INVALID)}, f"'{UP}' holds the code 3"),
        ({UP + "_scale": ("F32", np.zeros(1))}, "'model.layers.0.mlp.up_proj.weight_scale' holds the unusable scale 0"),
        ({UP + "_scale": ("F32", np.array([np.nan]))}, "holds the unusable scale nan"),
        ({UP + "_scale": ("F32", np.array([1e-45]))}, "holds the unusable scale"),
        ({UP + "_scale": ("F32", np.ones(28))}, r"has shape \[28\], expected \[1\]"),
        ({UP + "_scale": ("U8", np.ones(1))}, "has dtype U8, expected floating point"),
        ({"model.norm.weight": ("F32", np.ones(25))}, r"'model.norm.weight' has shape \[25\], expected \[24\]"),
        ({"model.norm.weight": ("I8", np.ones(24))}, "'model.norm.weight' has dtype I8, expected floating point"),
        ({"model.norm.weight": ("F16", np.full(24, np.inf))}, "'model.norm.weight' holds NaN or infinity"),
        ({"model.norm.weight": ("BF16", np.full(24, 0x7FC0))}, "'model.norm.weight' holds NaN or infinity"),
        ({"model.layers.0.self_attn.q_proj.bias": ("F32", np.ones(24))}, "q_proj.bias' is no part .*"),
        ({"lm_head.weight": ("F32", np.ones((263, 24)))}, "differs from 'model.embed_tokens.weight' although"),
    ],
)
def test_refused_tensors(tmp_path: Path, changes: made_models.Tensors, text: str) -> None:
    with pytest.raises(FormatError, match=text) as caught:
        load(make(tmp_path, made_models.bitnet_config(), changes))
    assert "model.safetensors" in str(caught.value)


def test_nan_in_a_dense_weight(tmp_path: Path) -> None:
    config = made_models.llama_config(hidden_size=24)
    with pytest.raises(FormatError, match=f"'{UP}' holds NaN or infinity"):
        load(make(tmp_path, config, {UP: ("F32", NAN)}))


def test_missing_tensor(tmp_path: Path) -> None:
    config = made_models.llama_config()
    tensors = made_models.make_tensors(config)
    del tensors["lm_head.weight"]
    with pytest.raises(FormatError, match=r"'lm_head.weight' is missing"):
        load(made_models.write_folder(tmp_path, config, tensors))


QUERY, KEY = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"vocab_size": 300}, r"'model.embed_tokens.weight' has shape \[263, 20\], expected \[300, 20\] by"),
        ({"vocab_size": 100}, r"'model.embed_tokens.weight' has shape \[263, 20\], expected \[100, 20\]"),
        ({"hidden_size": 28}, r"'model.embed_tokens.weight' has shape \[263, 20\], expected \[263, 28\]"),
        ({"intermediate_size": 32}, r"gate_proj.weight' has shape \[28, 20\], expected \[32, 20\]"),
        ({"num_attention_heads": 2}, rf"'{QUERY}' has shape \[24, 20\], expected \[12, 20\]"),
        ({"head_dim": 8}, rf"'{QUERY}' has shape \[24, 20\], expected \[32, 20\]"),
        ({"head_dim": None}, "head_dim must be even .5 by the other fields"),
        ({"num_key_value_heads": 4}, rf"'{KEY}' has shape \[12, 20\], expected \[24, 20\]"),
        ({"num_hidden_layers": 1}, "'model.layers.1.input_layernorm.weight' is no part of LlamaForCausalLM as config"),
        ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing; the checkpoint is incomplete"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs from 'model.embed_tokens.weight' although"),
        ({"attention_bias": True}, "'model.layers.0.self_attn.q_proj.bias' is missing"),
        ({"quantization_config": BITNET}, f"'{QUERY}' has dtype F32, expected U8 .packed"),
    ],
)
def test_configurations_that_lie_about_the_weights(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    tensors = made_models.make_tensors(made_models.llama_config())
    with pytest.raises(FormatError, match=text):
        load(made_models.write_folder(tmp_path, made_models.llama_config(**changes), tensors))


def test_latents_that_nothing_declares(tmp_path: Path) -> None:
    """A revision of Falcon-E holds latents, another the ternary weights as floats; only `is_bitnet_config` is left."""
    config = made_models.llama_config(is_bitnet_config=True)
    tensors = made_models.make_tensors(config)
    with pytest.raises(FormatError, match=rf"'{QUERY}' is not, .* add .*\"quantization_mode\": \"online\""):
        load(made_models.write_folder(tmp_path / "latents", config, tensors))
    tensors[QUERY] = ("F32", 0.25 * np.sign(tensors[QUERY][1]))
    assert load(made_models.write_folder(tmp_path / "baked", config, tensors))["layers.0.query"].layout == "f32"
    online = BITNET | {"linear_class": "autobitlinear", "quantization_mode": "online"}
    config |= {"quantization_config": online, "hidden_size": 24}
    latents = made_models.make_tensors(config)
    assert load(made_models.write_folder(tmp_path / "declared", config, latents))["layers.0.query"].layout == "t16"


def test_rows_that_cannot_be_packed(tmp_path: Path) -> None:
    config = made_models.bitnet_config(intermediate_size=30)
    tensors = made_models.make_tensors(made_models.bitnet_config())
    with pytest.raises(FormatError, match=r"gate_proj.weight' has 30 rows; packed weights need a multiple of 4"):
        load(made_models.write_folder(tmp_path, config, tensors))


@pytest.mark.parametrize("name", ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"])
def test_missing_sub_norms(tmp_path: Path, name: str) -> None:
    config = made_models.bitnet_config()
    tensors = made_models.make_tensors(config)
    del tensors[f"model.layers.1.{name}.weight"]
    with pytest.raises(FormatError, match=rf"'model.layers.1.{name}.weight' is missing; the checkpoint is incomplete"):
        load(made_models.write_folder(tmp_path, config, tensors))


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_scales_of_the_other_convention(tmp_path: Path, linear_class: str) -> None:
    """Usual scales pass as stored, and are refused where config.json has them turned over."""
    other = {"bitlinear": "autobitlinear", "autobitlinear": "bitlinear"}[linear_class]
    sizes = {"hidden_size": 400, "head_dim": 100, "intermediate_size": 600}
    config = made_models.bitnet_config(quantization_config=BITNET | {"linear_class": linear_class}, **sizes)
    tensors = made_models.make_tensors(config)
    for name, (_, scale) in tensors.items():
        if name.endswith("weight_scale"):
            scale[:] = 0.03 if linear_class == "autobitlinear" else 1 / 0.03
    load(made_models.write_folder(tmp_path / "right", config, tensors))
    config["quantization_config"] = BITNET | {"linear_class": other}
    with pytest.raises(
        FormatError, match=rf"have a scale of 33.*set quantization_config.linear_class to '{linear_class}'"
    ):
        load(made_models.write_folder(tmp_path / "wrong", config, tensors))


def test_what_a_ternary_head_needs(tmp_path: Path) -> None:
    config = made_models.bitnet_config(
        tie_word_embeddings=False, quantization_config=BITNET | {"modules_to_not_convert": []}
    )
    with pytest.raises(FormatError, match=r"a ternary head .* is not supported"):
        load(make(tmp_path, config))


def test_harmless_extra_tensors(tmp_path: Path) -> None:
    config = made_models.bitnet_config()
    tensors = made_models.make_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", np.ones(3))
    weights = load(made_models.write_folder(tmp_path, config, tensors))
    assert not any(re.search("head|rotary", slot) for slot in weights)
