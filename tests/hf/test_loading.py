# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` onto our kernels: stock checkpoints, our own, latents, and dense ones rounded at load."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_setup import small_model, some_ids, torch, transformers
from safetensors.torch import load_file, save_file

import ternaryforge.hf
from ternaryforge import _core
from ternaryforge.hf import TernaryForgeConfig, accelerate_bitnet, export_bitnet, optimize
from ternaryforge.torch import QATConfig, QATLinear, QuantizedHead, TernaryLinear, prepare_qat

Auto = transformers.AutoModelForCausalLM


def exported(tmp_path: Path, linear_class: Any = "bitlinear", family: str = "Llama", **fields: Any) -> tuple[Any, Path]:
    """A prepared model, saved as latents in `master` and packed in `packed`."""
    changes = {"attention_bias": True} if fields.pop("bias", False) else {}
    torch.manual_seed(1)
    model = small_model(family, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    prepare_qat(model, QATConfig(**fields)).eval()
    model.save_pretrained(tmp_path / "master")
    export_bitnet(tmp_path / "master", tmp_path / "packed", linear_class)
    return model, tmp_path / "packed"


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(some_ids()).logits.float().numpy()


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def layer_types(model: Any) -> set[type]:
    return {type(layer.mlp.up_proj) for layer in model.model.layers}


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# In bfloat16 transformers cannot run its own autobitlinear: it leaves the norms in the type of the file.
@pytest.mark.parametrize(
    ("linear_class", "dtype"),
    [("bitlinear", torch.float32), ("bitlinear", torch.bfloat16), ("autobitlinear", torch.float32)],
)
def test_stock_checkpoints_run_on_our_kernels(linear_class: str, dtype: Any, tmp_path: Path) -> None:
    model, folder = exported(tmp_path, linear_class)
    stock = Auto.from_pretrained(folder, dtype=dtype)
    with accelerate_bitnet():
        fast = Auto.from_pretrained(folder, dtype=dtype)
    assert layer_types(fast) == {TernaryLinear}
    x = torch.randn(3, 32, dtype=dtype)
    for name in ("mlp.up_proj", "self_attn.o_proj"):
        pair = [m.model.layers[1].get_submodule(name) for m in (fast, stock)]
        assert_close(*[layer(x).detach().float().numpy() for layer in pair], 1e-5 if dtype == torch.float32 else 1e-2)
    if dtype == torch.float32:
        assert_close(logits(fast), logits(model), 2e-2)  # an int8 rounding may tip
        generated = [m.generate(some_ids(1), max_new_tokens=4, do_sample=False) for m in (fast, model)]
        assert torch.equal(*generated)
    fast.save_pretrained(tmp_path / "again")
    assert quantization(tmp_path / "again")["linear_class"] == linear_class
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    packed = [name for name in before if before[name].dtype == torch.uint8]
    assert packed
    for name in packed:
        assert torch.equal(before[name], after[name])
        assert torch.equal(before[name + "_scale"].float(), after[name + "_scale"].float())
    again = Auto.from_pretrained(tmp_path / "again", dtype=dtype)
    assert TernaryLinear not in layer_types(again)
    assert np.array_equal(logits(again), logits(stock))


def test_latents_and_unpacked_trits_run_on_our_kernels(tmp_path: Path) -> None:
    model, packed = exported(tmp_path, "autobitlinear")
    stock = Auto.from_pretrained(packed, dtype=torch.float32)
    stock.save_pretrained(tmp_path / "floats", save_original_format=False)
    assert load_file(tmp_path / "floats" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].shape == (52, 32)
    for folder, linear_class in (("master", "bitlinear"), ("floats", "autobitlinear")):
        with accelerate_bitnet():
            fast = Auto.from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert layer_types(fast) == {TernaryLinear}
        assert_close(logits(fast), logits(model), 2e-2)
        fast.save_pretrained(tmp_path / folder / "again")
        fields = quantization(tmp_path / folder / "again")
        assert (fields["linear_class"], fields["quantization_mode"]) == (linear_class, "offline")
        again = Auto.from_pretrained(tmp_path / folder / "again", dtype=torch.float32)
        assert_close(logits(again), logits(model), 2e-2)


def test_a_bias_that_transformers_scales(tmp_path: Path) -> None:
    _, folder = exported(tmp_path, bias=True)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = 1 / tensors[name]
    save_file(tensors, file, {"format": "pt"})
    config.write_text(config.read_text().replace('"bitlinear"', '"autobitlinear"'))
    stock = Auto.from_pretrained(folder, dtype=torch.float32)
    expected = logits(stock)
    with accelerate_bitnet():
        fast = Auto.from_pretrained(folder, dtype=torch.float32)
    for model in (fast, optimize(stock, head=None)):
        assert_close(logits(model), expected, 2e-2)
        model.save_pretrained(tmp_path / "again")
        assert quantization(tmp_path / "again")["linear_class"] == "bitlinear"
        assert_close(logits(Auto.from_pretrained(tmp_path / "again", dtype=torch.float32)), expected, 2e-2)


def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    _, folder = exported(tmp_path)
    with accelerate_bitnet():
        fast = Auto.from_pretrained(folder)
    layer = fast.model.layers[0].mlp.up_proj
    tensors = [*layer.parameters(), *layer.buffers()]
    # The trits, and one scale as stored and inverted.
    assert sorted(tensor.nbytes for tensor in tensors) == [4, 4, _core.formats.layout_bytes("t16", 52, 32)]
    assert not [name for name, module in fast.named_modules() if type(module).__name__ == "PackedPlaceholder"]


def test_a_loaded_model_is_optimized(tmp_path: Path) -> None:
    _, folder = exported(tmp_path)
    stock = Auto.from_pretrained(folder, dtype=torch.float32)
    expected = logits(stock)
    assert optimize(stock) is stock
    assert type(stock.lm_head) is QuantizedHead
    assert_close(logits(stock), expected, 2e-2)
    stock.save_pretrained(tmp_path / "saved")
    assert np.array_equal(logits(Auto.from_pretrained(tmp_path / "saved", dtype=torch.float32)), expected)
    latents = Auto.from_pretrained(tmp_path / "master", dtype=torch.float32)
    assert_close(logits(optimize(latents, head=None)), expected, 2e-2)
    latents.save_pretrained(tmp_path / "again")
    assert_close(logits(Auto.from_pretrained(tmp_path / "again", dtype=torch.float32)), expected, 2e-2)
    with pytest.raises(ValueError, match="has no ternary layers"):
        optimize(small_model())


def test_a_model_in_training_is_optimized_and_saved(tmp_path: Path) -> None:
    fields = {"quantizer": "lsq", "scale": "group", "group_size": 64, "activation_bits": None}
    model, _ = exported(tmp_path, "ternaryforge", **fields)
    expected = logits(model)
    optimize(model, head=None)
    assert_close(logits(model), expected, 1e-4)
    model.save_pretrained(tmp_path / "again")
    assert quantization(tmp_path / "again")["quant_method"] == "ternaryforge"
    assert np.array_equal(logits(Auto.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("scale", ["row", "group"])
def test_our_own_checkpoints(scale: str, tmp_path: Path) -> None:
    fields = {"quantizer": "lsq", "scale": scale, "group_size": 64, "activation_bits": None}
    model, folder = exported(tmp_path, "ternaryforge", **fields)
    fast = Auto.from_pretrained(folder)
    assert layer_types(fast) == {TernaryLinear}
    assert_close(logits(fast), logits(model), 1e-4)
    fast.save_pretrained(tmp_path / "again")
    assert np.array_equal(logits(Auto.from_pretrained(tmp_path / "again")), logits(fast))
    latents = Auto.from_pretrained(tmp_path / "master")
    assert layer_types(latents) == {QATLinear}
    assert np.array_equal(logits(latents), logits(model))


def test_what_convert_wrote(tmp_path: Path) -> None:
    small_model(intermediate_size=54).save_pretrained(tmp_path / "dense")  # 54 rows: two fill up the last bytes
    ternaryforge.convert(tmp_path / "dense", tmp_path / "packed", scale="group", group_size=64)
    fast = Auto.from_pretrained(tmp_path / "packed")
    ours = ternaryforge.TernaryModel.from_pretrained(tmp_path / "packed")
    rows = [ours.logits(ids) for ids in some_ids().numpy().astype(np.int32)]
    assert layer_types(fast) == {TernaryLinear}
    assert_close(logits(fast), np.stack(rows), 1e-3)
    fast.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert all(torch.equal(before[name], after[name]) for name in before if before[name].dtype == torch.uint8)


def test_dense_checkpoints_are_rounded_at_load(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "dense")
    fast = Auto.from_pretrained(tmp_path / "dense", quantization_config=TernaryForgeConfig(group_size=64))
    assert layer_types(fast) == {TernaryLinear}
    weight = small_model().model.layers[0].mlp.up_proj.weight.detach().numpy()
    trits, scales = ternaryforge.quantize_weights(weight, scheme="ls", scale="group", group_size=64)
    layer = fast.model.layers[0].mlp.up_proj
    assert np.array_equal(layer.trits().numpy(), trits)
    assert np.array_equal(layer.scales().numpy().reshape(scales.shape), scales)
    fast.save_pretrained(tmp_path / "packed")
    assert np.array_equal(logits(Auto.from_pretrained(tmp_path / "packed")), logits(fast))


def test_one_scale_and_int8_are_saved_in_stock_form(tmp_path: Path) -> None:
    model, _ = exported(tmp_path)
    ternaryforge.hf.export_dense(tmp_path / "master", tmp_path / "baked")
    config = TernaryForgeConfig("tensor", activation_bits=8)
    fast = Auto.from_pretrained(tmp_path / "baked", quantization_config=config, dtype=torch.float32)
    assert_close(logits(fast), logits(model), 2e-2)
    fast.save_pretrained(tmp_path / "again")
    assert quantization(tmp_path / "again")["quant_method"] == "bitnet"
    stock = Auto.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert TernaryLinear not in layer_types(stock)
    assert_close(logits(stock), logits(model), 2e-2)


def test_a_head_of_another_task_begins_dense(tmp_path: Path) -> None:
    _, folder = exported(tmp_path)
    kind = transformers.AutoModelForSequenceClassification
    with accelerate_bitnet():
        fast = kind.from_pretrained(folder, num_labels=3, pad_token_id=0)
    assert layer_types(fast) == {TernaryLinear}
    assert type(fast.score) is torch.nn.Linear
    assert fast(some_ids()).logits.shape == (2, 3)


def test_settings_and_files_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group_size must be a positive multiple of 64, got 20"):
        TernaryForgeConfig("group", group_size=20)
    with pytest.raises(ValueError, match=r"quantization_config.colour = 1 is not known"):
        TernaryForgeConfig(colour=1)
    small_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="run on the CPU"):
        Auto.from_pretrained(tmp_path / "dense", quantization_config=TernaryForgeConfig(), device_map={"": "meta"})
    latents = TernaryForgeConfig(quantization_mode="online", quantizer="lsq", activation_bits=None)
    with pytest.raises(ValueError, match="latents are made by prepare_qat"):
        Auto.from_pretrained(tmp_path / "dense", quantization_config=latents)
    _, folder = exported(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    changed = {**tensors, "model.layers.0.mlp.up_proj.weight": tensors["model.layers.0.mlp.up_proj.weight"] | 3}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    with accelerate_bitnet(), pytest.raises(ValueError, match=r"a code is 3.*layers.0.mlp.up_proj"):
        Auto.from_pretrained(folder)
    dense = {**tensors, "model.layers.0.mlp.up_proj.weight": torch.zeros(52, 32)}
    save_file(dense, folder / "model.safetensors", {"format": "pt"})
    with accelerate_bitnet(), pytest.raises(ValueError, match=r"up_proj' is not packed in the checkpoint"):
        Auto.from_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"quant_method"', '"use_rms_norm": true, "quant_method"'))
    with accelerate_bitnet(), pytest.raises(ValueError, match="use_rms_norm adds a norm"):
        Auto.from_pretrained(folder)


def test_importing_twice_and_switching_twice_is_harmless() -> None:
    mapping = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
    stock = mapping["bitnet"]
    importlib.reload(ternaryforge.hf)
    assert mapping["bitnet"] is stock
    with accelerate_bitnet():
        with accelerate_bitnet():
            assert mapping["bitnet"] is not stock
        assert mapping["bitnet"] is not stock
    assert mapping["bitnet"] is stock


def test_importing_changes_one_table_and_nothing_else() -> None:
    """In a process of its own, where transformers is loaded first; then once more, from new module objects."""
    code = """
import logging, os, sys, warnings
import torch
from transformers import AutoModelForCausalLM, Trainer
from transformers.quantizers import auto

def state():
    return (
        torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
        list(warnings.filters), logging.getLogger().handlers, logging.getLogger().level, dict(os.environ), sys.path[:],
        {name: kind for name, kind in auto.AUTO_QUANTIZER_MAPPING.items() if name != "ternaryforge"},
        {name: kind for name, kind in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.items() if name != "ternaryforge"},
    )

before = state()
for _ in range(2):
    for name in [name for name in sys.modules if name.split(".")[0] == "ternaryforge"]:
        del sys.modules[name]
    import ternaryforge.torch
    import ternaryforge.hf
    assert [a == b for a, b in zip(state(), before, strict=True)] == [True] * len(before)
    assert "ternaryforge" in auto.AUTO_QUANTIZER_MAPPING
print("unchanged")
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=240)
    assert result.stdout == "unchanged\n", result.stderr
