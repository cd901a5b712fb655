# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: equal to weights that they were added to, and refused by name where they do not fit."""

import json
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest
from numpy_model import NumpyModel
from test_cli import fails, run_json
from test_ternary_core import Witness
from test_ternary_core import make_config as core_config
from test_ternary_core import make_tensors as core_tensors

from ternaryforge import FormatError, TernaryModel

RANK = 3
CONFIG = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 7,
    "use_rslora": False,
    "bias": "none",
    "target_modules": ["q_proj", "down_proj"],
    "modules_to_save": None,
    "init_lora_weights": True,
    "lora_dropout": 0.1,
}
QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
IDS = [5, 99, 260, 7, 7, 31]


def tensor(module: str, part: str) -> str:
    return f"base_model.model.{module}.lora_{part}.weight"


def make_adapter(shapes: dict[str, tuple[int, int]], *, seed: int = 0) -> made_models.Tensors:
    rng = np.random.default_rng(seed)
    tensors: made_models.Tensors = {}
    for module, (rows, cols) in shapes.items():
        tensors[tensor(module, "A")] = ("F32", rng.standard_normal((RANK, cols)).astype(np.float32))
        tensors[tensor(module, "B")] = ("F32", (0.3 * rng.standard_normal((rows, RANK))).astype(np.float32))
    return tensors


def write(folder: Path, tensors: made_models.Tensors, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "adapter_model.safetensors").write_bytes(made_models.safetensors_bytes(tensors))
    return folder


def merge(weights: made_models.Tensors, adapter: made_models.Tensors, scaling: float) -> made_models.Tensors:
    """Dense weights plus scaling * B A."""
    merged = dict(weights)
    for name in adapter:
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = adapter[tensor(module, "B")][1] @ adapter[name][1]
            merged[module + ".weight"] = ("F32", weights[module + ".weight"][1] + np.float32(scaling) * delta)
    return merged


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 7 / 3), (True, 7 / 3**0.5)])
def test_as_if_added_to_the_weights(tmp_path: Path, rslora: bool, scaling: float) -> None:
    config = made_models.llama_config()
    weights = made_models.make_tensors(config)
    adapter = make_adapter({QUERY: (24, 20), DOWN: (20, 28)})
    folder = made_models.write_folder(tmp_path / "model", config, weights)
    model = TernaryModel.from_pretrained(folder, adapter=write(tmp_path / "adapter", adapter, use_rslora=rslora))
    assert "adapter" in repr(model)
    expected = NumpyModel(config, merge(weights, adapter, scaling)).logits(IDS)
    plain = TernaryModel.from_pretrained(folder).logits(IDS)
    assert np.abs(model.logits(IDS) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(plain - expected).max() > 0.1 * np.abs(expected).max()


def test_beside_packed_weights(tmp_path: Path) -> None:
    """The sum is taken in floats, whatever the activations of the packed weights are."""
    own = {"quant_method": "ternaryforge", "scale": "row"}
    config = made_models.llama_config(hidden_size=24, quantization_config=own)
    weights = made_models.make_tensors(config)
    adapter = make_adapter({QUERY: (24, 24), DOWN: (24, 28)})
    model = TernaryModel.from_pretrained(
        made_models.write_folder(tmp_path / "model", config, weights), adapter=write(tmp_path / "adapter", adapter)
    )
    witness = NumpyModel(config, weights)
    linear = witness.linear

    def with_adapter(name: str, x: Any) -> Any:
        found = linear(name, x)
        if tensor(name, "A") in adapter:
            found = found + 7 / 3 * (x @ adapter[tensor(name, "A")][1].T) @ adapter[tensor(name, "B")][1].T
        return found

    witness.linear = with_adapter  # type: ignore[method-assign]
    expected = witness.logits(IDS)
    assert np.abs(model.logits(IDS) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_parts_of_a_fused_tensor(tmp_path: Path) -> None:
    """Rows of B follow the rows of the weights: split, and from neighbouring pairs into halves."""
    config = core_config(use_rope=True, layer_bit_map={"layer_modes": ["f16"] * 3})
    weights = core_tensors(config)
    adapter = make_adapter({"h.1.attn.c_attn": (108, 36), "h.2.mlp.c_proj": (36, 52)})
    model = TernaryModel.from_pretrained(
        made_models.write_folder(tmp_path / "model", config, weights), adapter=write(tmp_path / "adapter", adapter)
    )
    ids = [1, 60, 33, 2, 2]
    expected = Witness(config, merge(weights, adapter, 7 / 3)).logits(ids)
    assert np.abs(model.logits(ids) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "IA3"}, "peft_type is supported only as 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora is not supported; merge the adapter"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
        ({"bias": "all"}, "bias is supported only as 'none', got 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights changes the weights of the base model"),
        ({"r": 0}, "r must be a positive integer"),
        ({"r": 4}, r"lora_A.weight' has shape \[3, 2\d\], expected \[4, 2\d\]"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"something_new": 3}, "something_new is not supported"),
    ],
)
def test_refused_configurations(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    folder = made_models.write_folder(tmp_path / "model", made_models.llama_config())
    adapter = write(tmp_path / "adapter", make_adapter({QUERY: (24, 20), DOWN: (20, 28)}), **changes)
    with pytest.raises(FormatError, match=text):
        TernaryModel.from_pretrained(folder, adapter=adapter)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({tensor(QUERY, "B"): None}, f"lora_B of '{QUERY}.weight' is missing"),
        (
            {tensor(QUERY, "A"): ("F32", np.ones((3, 21)))},
            r"has shape \[3, 21\], expected \[3, 20\] by the model and r",
        ),
        ({tensor(QUERY, "B"): ("F32", np.ones((20, 3)))}, r"has shape \[20, 3\], expected \[24, 3\]"),
        ({tensor(QUERY, "A"): ("F32", np.full((3, 20), np.nan))}, "holds NaN or infinity"),
        ({tensor("lm_head", "A"): ("F32", np.ones((3, 20)))}, "'base_model.model.lm_head.lora_A.weight' belongs to no"),
        ({tensor("model.layers.7.mlp.up_proj", "A"): ("F32", np.ones((3, 20)))}, "layers.7.* belongs to no linear"),
        ({"base_model.model.lm_head.weight": ("F32", np.ones((3, 20)))}, "lm_head.weight' belongs to no linear"),
    ],
)
def test_refused_tensors(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    folder = made_models.write_folder(tmp_path / "model", made_models.llama_config())
    tensors = make_adapter({QUERY: (24, 20), DOWN: (20, 28)}) | changes
    adapter = write(tmp_path / "adapter", {name: entry for name, entry in tensors.items() if entry is not None})
    with pytest.raises(FormatError, match=text):
        TernaryModel.from_pretrained(folder, adapter=adapter)


def test_absent_files(tmp_path: Path) -> None:
    folder = made_models.write_folder(tmp_path / "model", made_models.llama_config())
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json; name the folder"):
        TernaryModel.from_pretrained(folder, adapter=folder)
    adapter = write(tmp_path / "adapter", make_adapter({QUERY: (24, 20)}))
    with pytest.raises(ValueError, match=r"beside the folder of a checkpoint, and '.*model.safetensors' is a file"):
        TernaryModel.from_pretrained(folder / "model.safetensors", adapter=adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"holds no adapter_model.safetensors; save the adapter in safetensors"):
        TernaryModel.from_pretrained(folder, adapter=adapter)


def test_on_the_command_line(tmp_path: Path) -> None:
    folder = made_models.write_tokenizer(made_models.write_folder(tmp_path / "model", made_models.llama_config()))
    adapter = write(tmp_path / "adapter", make_adapter({QUERY: (24, 20), DOWN: (20, 28)}))
    expected = TernaryModel.from_pretrained(folder, adapter=adapter).generate("abc", max_new_tokens=8)
    found = run_json("generate", folder, "--prompt", "abc", "--max-new-tokens", "8", "--adapter", adapter)
    assert found["token_ids"] == expected.token_ids
    assert "holds no adapter_config.json" in fails("generate", folder, "--prompt", "abc", "--adapter", folder)
