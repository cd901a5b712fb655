# SPDX-License-Identifier: Apache-2.0
"""The families beside llama and bitnet: what each takes from config.json and the tensors, and what it refuses."""

from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest
from test_families import ANYTHING, load, read

from ternaryforge import FormatError
from ternaryforge.families import FAMILIES

FULL, SLIDING = "full_attention", "sliding_attention"
ARCHITECTURES = {
    family.name: family.architecture for family in reversed(FAMILIES)
}  # of those that share a name the first


def make_config(family: str, **changes: Any) -> dict[str, Any]:
    fields = made_models.llama_config(architectures=[ARCHITECTURES[family]], model_type=family)
    if family in ("gemma2", "gemma3_text"):
        fields["hidden_activation"] = "gelu_pytorch_tanh"
        del fields["hidden_act"]
    if family == "gemma3_text":
        fields["sliding_window_pattern"] = 2
    if family == "gemma":
        fields["hidden_act"] = "gelu_pytorch_tanh"
    return fields | changes


def make_tensors(config: dict[str, Any]) -> made_models.Tensors:
    """Random weights for everything that the configuration asks for."""
    rng = np.random.default_rng(0)
    found = read(config)
    tensors = {}
    for slot, (rows, cols) in found.spec.slots().items():
        shape = (cols,) if "norm" in slot or slot.endswith("_bias") else (rows, cols)
        tensors[found.tensor_names[slot]] = ("F32", rng.standard_normal(shape).astype(np.float32))
    return tensors


FOUND = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


@pytest.mark.parametrize("family", FOUND)
def test_a_family(tmp_path: Path, family: str) -> None:
    config = make_config(family)
    assert read(config).family == family
    assert read(config | {"architectures": None}).family == family
    weights = load(made_models.write_folder(tmp_path, config, make_tensors(config)))
    assert list(weights) == list(read(config).spec.slots())


@pytest.mark.parametrize(
    ("family", "changes", "slot", "tensor"),
    [
        ("llama", {"attention_bias": True}, "output_bias", "self_attn.o_proj.bias"),
        ("llama", {"mlp_bias": True}, "down_bias", "mlp.down_proj.bias"),
        ("qwen2", {}, "query_bias", "self_attn.q_proj.bias"),
        ("qwen3", {}, "key_norm", "self_attn.k_norm.weight"),
        ("qwen3", {"attention_bias": True}, "value_bias", "self_attn.v_proj.bias"),
        ("gemma", {"attention_bias": True}, "key_bias", "self_attn.k_proj.bias"),
        ("gemma2", {}, "attention_post_norm", "post_attention_layernorm.weight"),
        ("gemma2", {}, "ffn_norm", "pre_feedforward_layernorm.weight"),
        ("gemma3_text", {}, "ffn_post_norm", "post_feedforward_layernorm.weight"),
        ("gemma3_text", {}, "query_norm", "self_attn.q_norm.weight"),
    ],
)
def test_a_tensor_of_a_family(tmp_path: Path, family: str, changes: dict[str, Any], slot: str, tensor: str) -> None:
    """Its name, and that a folder without it, or with another shape, is refused by this name."""
    config = make_config(family, **changes)
    name = f"model.layers.1.{tensor}"
    assert read(config).tensor_names[f"layers.1.{slot}"] == name
    tensors = make_tensors(config)
    for wrong, text in (({}, "is missing"), ({name: ("F32", np.ones(7, np.float32))}, r"has shape \[7\], expected")):
        others = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(FormatError, match=f"'{name}' {text}"):
            load(made_models.write_folder(tmp_path, config, others | wrong))


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("changes", [{"head_dim": 8}, {"num_key_value_heads": 4}, {"intermediate_size": 36}])
def test_a_config_that_lies_about_shapes(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    config = make_config(family)
    folder = made_models.write_folder(tmp_path, config | changes, make_tensors(config))
    with pytest.raises(FormatError, match=r"'model.layers.0.*proj.*' has shape .*, expected"):
        load(folder)


def test_a_bias_that_the_config_denies(tmp_path: Path) -> None:
    config = make_config("qwen3")
    tensors = make_tensors(config | {"attention_bias": True})
    with pytest.raises(FormatError, match=r"proj.bias' is no part of Qwen3ForCausalLM"):
        load(made_models.write_folder(tmp_path, config, tensors))


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_the_bias_of_a_packed_layer(tmp_path: Path, linear_class: str) -> None:
    """transformers multiplies it by the scale in an AutoBitLinear: refused, since nobody can mean that."""
    config = make_config("qwen2")
    tensors = make_tensors(config)
    config["quantization_config"] = {"quant_method": "bitnet", "linear_class": linear_class}
    for name, (_, values) in list(tensors.items()):
        if "proj.weight" in name:
            tensors[name] = ("U8", np.zeros((values.shape[0] // 4, values.shape[1]), np.uint8))
            tensors[name + "_scale"] = ("F32", np.ones(1, np.float32))
    folder = made_models.write_folder(tmp_path, config, tensors)
    if linear_class == "bitlinear":
        assert load(folder)["layers.0.key_bias"].layout == "f32"
    else:
        with pytest.raises(FormatError, match=r"q_proj.bias' of a packed 'autobitlinear' layer"):
            load(folder)


WINDOW = {"use_sliding_window": True, "sliding_window": 8}
ROPE_BY_KIND = {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 8, "layer_types": [SLIDING] * 2}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "layer_types": [FULL] * 2}),
        ("qwen2", WINDOW | {"max_window_layers": 0}),
        ("qwen3", WINDOW | {"max_window_layers": 99, "layer_types": [SLIDING, FULL]}),
        ("qwen3", {"attention_bias": False, "num_key_value_heads": None}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}),
        ("gemma", {"hidden_act": None, "cache_implementation": "static", "use_bidirectional_attention": False}),
        ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
        ("gemma2", {"sliding_window": None, "layer_types": [FULL] * 2}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e4}),
        ("gemma3_text", {"rope_parameters": ROPE_BY_KIND, "sliding_window_pattern": 2}),
        ("gemma3_text", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ],
)
def test_accepted(family: str, changes: dict[str, Any]) -> None:
    assert read(make_config(family, **changes)).family == family


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        ("mistral", {"hidden_act": "gelu"}, "hidden_act is supported only as 'silu', got 'gelu'"),
        ("mistral", {"attention_bias": True}, "attention_bias is supported only as False"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be an integer from 1"),
        ("mistral", {"sliding_window": 8, "layer_types": [FULL, SLIDING]}, "'sliding_attention' for every layer"),
        ("mistral", {"sliding_window": None, "layer_types": [SLIDING] * 2}, "layer_types must name full_attention for"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window must be true or false"),
        ("qwen2", {"layer_types": [FULL, SLIDING]}, "layer_types must name full_attention for each of 2 layers"),
        ("qwen2", WINDOW | {"max_window_layers": -1}, "max_window_layers must be an integer from 0"),
        ("qwen2", WINDOW | {"layer_types": [FULL]}, "full_attention or sliding_attention for each of 2 layers"),
        ("qwen2", WINDOW | {"layer_types": [FULL, "chunked_attention"]}, "layer_types must name"),
        ("qwen2", {"use_mrope": True}, "use_mrope is not known"),
        ("qwen3", {"rope_scaling": {"type": "mrope"}}, "type must be one of default, linear"),
        ("qwen3", {"use_qk_norm": True}, "use_qk_norm is supported only as False"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act is supported only as 'gelu_pytorch_tanh' or 'gelu'"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation is supported only as 'gelu_pytorch_tanh'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is supported only as False"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is supported only as 'gelu_pytorch_tanh'"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number"),
        ("gemma2", {"attn_logit_softcapping": -50.0}, "attn_logit_softcapping must be a positive number"),
        ("gemma2", {"sliding_window": None}, "layer_types must name full_attention for each of 2 layers, got None"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is supported only as None"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern must be an integer from 1"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "must hold full_attention and sliding_attention"),
        ("gemma3_text", {"rope_parameters": {FULL: {"rope_type": "x"}}}, "full_attention': rope_type must be one of"),
        (
            "gemma3_text",
            {"rope_parameters": {FULL: {"rope_type": "yarn", "factor": 2.0, "truncate": False}}},
            "truncate is not supported",
        ),
        ("gemma3_text", {"architectures": ["Gemma3ForConditionalGeneration"]}, "is not supported; supported are"),
    ],
)
def test_refused(family: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        read(make_config(family, **changes))


@pytest.mark.parametrize("family", FOUND)
def test_any_value_of_any_field_is_taken_or_refused(family: str) -> None:
    config = make_config(family)
    special = ("sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar")
    for field in (*config, *special, "rope_parameters", "rope_scaling", "layer_types", "attention_bias"):
        for value in (*ANYTHING, {FULL: 3}, {FULL: {"rope_type": "yarn", "factor": 1e300}}, {"type": "linear"}):
            try:
                read(config | WINDOW | {field: value})
            except FormatError as error:
                assert "config.json" in str(error)  # noqa: PT017


def test_llama_with_sub_norms() -> None:
    """1bitLLM's files say model_type llama, have no quantization_config, and hold latents."""
    config = make_config("llama", architectures=["BitnetForCausalLM"], hidden_size=24, weight_bits=1, input_bits=8)
    found = read(config)
    assert found.quantization is not None
    assert (found.quantization.online, found.quantization.activation_bits) == (True, 8)
    assert found.tensor_names["layers.1.attention_sub_norm"] == "model.layers.1.self_attn.inner_attn_ln.weight"
    assert found.tensor_names["layers.0.ffn_sub_norm"] == "model.layers.0.mlp.ffn_layernorm.weight"
    packed = read(config | {"quantization_config": {"quant_method": "bitnet"}})
    assert packed.quantization is not None
    assert not packed.quantization.online
    for wrong in ({"weight_bits": 2}, {"input_bits": 4}, {"hidden_act": "relu2"}):
        with pytest.raises(FormatError, match=next(iter(wrong))):
            read(config | wrong)
