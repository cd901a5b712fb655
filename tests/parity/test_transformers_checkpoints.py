# SPDX-License-Identifier: Apache-2.0
"""What `convert` writes, read by plain transformers in a process without this library; and trained models in both."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import (
    decided_greedy,
    figures,
    linear_names,
    load_float32,
    make_config,
    make_model,
    peer_greedy,
    peer_logits,
    relative_error,
    torch,
)

from ternaryforge import TernaryModel, _core, convert
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.weights import load_weights

READ_WITH_TRANSFORMERS = """
import sys, numpy, torch, transformers
from transformers.integrations.bitnet import unpack_weights
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "BitLinear":
            found[name] = (unpack_weights(module.weight, dtype=torch.float32) / module.weight_scale).numpy()
    prompt = torch.from_numpy(numpy.load(folder + "/prompt.npy"))[None]
    mask = torch.ones_like(prompt)
    with torch.no_grad():
        text = model.generate(prompt, attention_mask=mask, max_new_tokens=64, do_sample=False)
    numpy.savez(folder + "/found.npz", text=text[0, prompt.shape[1]:].numpy(), **found)
assert "ternaryforge" not in sys.modules
"""
GQA = {"hidden_size": 84, "intermediate_size": 172, "num_attention_heads": 6, "num_key_value_heads": 2}
SOURCES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", GQA | {"head_dim": 22}, "float32"),
    "llama tied bfloat16": ("llama", GQA | {"head_dim": 10, "tie_word_embeddings": True}, "bfloat16"),
    "bitnet": ("bitnet", GQA | {"num_hidden_layers": 2}, "float32"),
    "bitnet tied bfloat16": ("bitnet", GQA | {"num_hidden_layers": 2, "tie_word_embeddings": True}, "bfloat16"),
    "mistral": ("mistral", GQA | {"head_dim": 22, "sliding_window": 19}, "float32"),
    "qwen2": ("qwen2", GQA, "float32"),
    "qwen3": ("qwen3", GQA | {"head_dim": 22, "tie_word_embeddings": True}, "float32"),
    "gemma2": ("gemma2", GQA | {"head_dim": 22, "sliding_window": 19}, "float32"),
    "gemma3": (
        "gemma3",
        GQA | {"head_dim": 22, "sliding_window": 19, "sliding_window_pattern": 2, "rope_parameters": None},
        "float32",
    ),
}


def converted_weights(model: TernaryModel) -> dict[str, Any]:
    """Trit times scale of every linear layer, by module name, from the tensors that the core is given."""
    weights = load_weights(Checkpoint.open(model.path), model.architecture)
    found = {}
    for slot, tensor in weights.items():
        if model.architecture.is_linear(slot):
            assert tensor.layout == "hf_packed"
            trits = _core.formats.unpack(tensor.data, tensor.layout, tensor.rows, tensor.cols)
            found[model.architecture.module_of(slot)] = trits * tensor.effective_scales
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every source converted, and read by transformers alone, which leaves `found.npz` in each folder."""
    base = tmp_path_factory.mktemp("converted")
    outs = {}
    for name, (family, changes, dtype) in SOURCES.items():
        spread = 2.0 if changes.get("tie_word_embeddings") else 0.5
        model = make_model(make_config(family, **changes), seed=5, spread=spread)
        model.to(getattr(torch, dtype)).save_pretrained(base / name)
        outs[name] = base / f"{name} out"
        report = convert(base / name, outs[name], scale="tensor")
        assert report.tensors == len(linear_names(model))
        prompt, _ = decided_greedy(load_float32(outs[name]), 64)
        np.save(outs[name] / "prompt.npy", np.array(prompt))
    subprocess.run(
        [sys.executable, "-c", READ_WITH_TRANSFORMERS, *map(str, outs.values())],
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
        check=True,
        timeout=300,
    )
    return outs


@pytest.mark.parametrize("name", SOURCES)
def test_converted_folder_in_plain_transformers(folders: dict[str, Path], name: str) -> None:
    model = TernaryModel.from_pretrained(folders[name])
    assert model.transformer.activations == "int8"
    found = np.load(folders[name] / "found.npz")
    expected = converted_weights(model)
    assert set(found) == set(expected) | {"text"}
    for module, weights in expected.items():
        np.testing.assert_array_equal(found[module], weights)
    prompt = np.load(folders[name] / "prompt.npy")
    assert model.generate(prompt, max_new_tokens=64).token_ids == found["text"].tolist()


@pytest.mark.shared
@pytest.mark.parametrize("name", ["stories260k/hf", "babyllama/hf-tok361"])
def test_trained_model(shared: Path, name: str) -> None:
    folder = shared / "data" / name
    story = (shared / "data/tinystories/valid.txt").read_text(encoding="utf-8").split("<|endoftext|>")[0].strip()
    ours, theirs = TernaryModel.from_pretrained(folder), load_float32(folder)
    ids = ours.encode(story)[:100]
    assert len(ids) == 100
    error = relative_error(ours.logits(ids), peer_logits(theirs, ids))
    figures.info("%s: relative error %.1e", name, error)
    assert error <= 1e-4
    prompts = [ids[:count] for count in (1, 30)]
    for prompt in prompts:
        (text,), _ = peer_greedy(theirs, [prompt], 64)
        assert len(text) == 64
        assert ours.generate(prompt, max_new_tokens=64).token_ids == text
