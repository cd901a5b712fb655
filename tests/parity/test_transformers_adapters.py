# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters against transformers, where hooks add scaling * B (A x) to the same layers."""

import json
from pathlib import Path
from typing import Any

import pytest
from hf_models import (
    decided_greedy,
    figures,
    load_float32,
    peer_logits,
    random_ids,
    relative_error,
    torch,
    write_packed,
)
from safetensors.torch import save_file
from test_packed_families import SIZES, random_model

from ternaryforge import TernaryModel

RANK, ALPHA = 5, 8
TARGETS = {
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"),
    "bitnet": ("self_attn.v_proj", "mlp.gate_proj"),
}


def add_adapter(folder: Path, model: Any, targets: tuple[str, ...]) -> Path:
    """Random A and B for the layers with these names, in PEFT's files and as hooks of the model."""
    generator = torch.Generator().manual_seed(11)
    tensors = {}

    def attach(module: Any, down: Any, up: Any) -> None:
        module.register_forward_hook(lambda _, inputs, output: output + ALPHA / RANK * (inputs[0] @ down.T) @ up.T)

    for name, module in list(model.named_modules()):
        if name.endswith(targets):
            rows, cols = module.out_features, module.in_features
            down = torch.randn(RANK, cols, generator=generator) / cols**0.5
            up = 0.1 * torch.randn(rows, RANK, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            attach(module, down, up)
    assert len(tensors) == 2 * 3 * len(targets)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("family", TARGETS)
def test_adapter_beside_packed_weights(tmp_path: Path, family: str) -> None:
    changes = SIZES | ({"hidden_size": 120} if family == "phi3" else {})
    model = random_model(family, changes)
    folder = write_packed(tmp_path / "model", model, {"quant_method": "bitnet"}, dtype=torch.float32)
    theirs = load_float32(folder)
    plain = peer_logits(theirs, random_ids(40))
    adapter = add_adapter(tmp_path / "adapter", theirs, TARGETS[family])
    ours = TernaryModel.from_pretrained(folder, adapter=adapter)
    expected = peer_logits(theirs, random_ids(40))
    assert relative_error(plain, expected) > 0.1
    error = relative_error(ours.logits(random_ids(40)), expected)
    figures.info("%s: relative error %.1e", family, error)
    assert error <= 5e-2  # a flipped code, as in test_transformers_bitnet
    prompt, text = decided_greedy(theirs, 64)
    assert ours.generate(prompt, max_new_tokens=64).token_ids == text


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_adapter_beside_dense_weights(tmp_path: Path, family: str) -> None:
    model = random_model(family, SIZES | ({"hidden_size": 120} if family == "phi3" else {}))
    model.save_pretrained(tmp_path / "model")
    adapter = add_adapter(tmp_path / "adapter", model, TARGETS[family])
    ours = TernaryModel.from_pretrained(tmp_path / "model", adapter=adapter)
    for count in (1, 40):
        assert relative_error(ours.logits(random_ids(count)), peer_logits(model, random_ids(count))) <= 1e-4
