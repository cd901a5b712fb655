# SPDX-License-Identifier: Apache-2.0
"""Every family in every form of ternary storage, against transformers with the same weights.

`row` and `group` folders compute in float: transformers is given code times scale. `stock` folders
compute with int8 activations, in transformers too. Bonsai is stored dense and made ternary by `convert`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import (
    MIN_DISTINCT,
    Float32,
    decided_greedy,
    figures,
    linear_names,
    load_float32,
    make_config,
    make_model,
    peer_greedy,
    peer_logits,
    random_ids,
    relative_error,
    torch,
    write_packed,
)
from safetensors.numpy import save_file

from ternaryforge import TernaryModel, _core, convert
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.weights import load_weights

SIZES = {"hidden_size": 132, "intermediate_size": 200, "num_attention_heads": 6, "num_key_value_heads": 2}
WIDE = SIZES | {"head_dim": 24}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
FALCON3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000042.0}, "rms_norm_eps": 1e-6}
# The name as in the page, the class, its changes, the storage.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Falcon3-1.58 stock": ("llama", WIDE | FALCON3, "stock"),
    "Falcon-E stock": ("llama", WIDE | FALCON3 | {"num_key_value_heads": 1}, "stock listed"),
    "Llama3-8B-1.58 stock": ("llama", SIZES | {"rope_parameters": LLAMA3}, "stock"),
    "llama row": ("llama", WIDE | {"attention_bias": True, "mlp_bias": True}, "row"),
    "llama tensor": ("llama", SIZES, "tensor"),
    "bitnet group": ("bitnet", SIZES, "group"),
    "mistral stock": ("mistral", WIDE | {"sliding_window": 19}, "stock"),
    "mistral group": ("mistral", WIDE | {"sliding_window": 19}, "group"),
    "qwen2 stock": ("qwen2", SIZES, "stock"),
    "qwen2 row": ("qwen2", SIZES, "row"),
    "qwen3 stock": ("qwen3", WIDE, "stock"),
    "qwen3 group": ("qwen3", WIDE | {"rope_parameters": YARN}, "group"),
    "gemma row": ("gemma", WIDE | {"tie_word_embeddings": True}, "row"),
    "gemma2 group": ("gemma2", WIDE | {"sliding_window": 19, "query_pre_attn_scalar": 20}, "group"),
    "gemma3 row": (
        "gemma3",
        WIDE | {"sliding_window": 19, "query_pre_attn_scalar": 20, "rope_parameters": None},
        "row",
    ),
    "phi group": ("phi", SIZES | {"hidden_size": 120}, "group"),
    "phi3 stock": ("phi3", SIZES | {"hidden_size": 120}, "stock"),
    "phi3 group": ("phi3", SIZES | {"hidden_size": 120}, "group"),
}
BONSAI: dict[str, dict[str, Any]] = {
    "Ternary-Bonsai": {"tie_word_embeddings": True},
    "Ternary-Bonsai, head apart": {},
    "binary Bonsai": {"tie_word_embeddings": True, "binary": True},
}


def random_model(family: str, changes: dict[str, Any], *, seed: int = 2) -> Any:
    spread = 2.0 if changes.get("tie_word_embeddings") else 0.4 if family == "phi" else 0.6
    return make_model(make_config(family, **changes), seed=seed, spread=spread)


def ternary(weights: Float32, kind: str, group: int, *, binary: bool = False) -> tuple[Any, Float32]:
    """Trits and float32 scales by absolute means, [1], [rows] or [rows, groups]."""
    rows, cols = weights.shape
    size = {"tensor": weights.size, "row": cols, "group": group}[kind]
    blocks = [weights.reshape(1, -1)] if kind == "tensor" else np.split(weights, range(size, cols, size), axis=1)
    scales = np.stack([np.abs(block).mean(1) for block in blocks], -1).astype(np.float16).astype(np.float32)
    per_weight = np.full((rows, cols), scales[0, 0]) if kind == "tensor" else np.repeat(scales, size, 1)[:, :cols]
    trits = np.where(weights < 0, -1, 1) if binary else np.clip(np.rint(weights / per_weight), -1, 1)
    return trits.astype(np.int8), scales.reshape(-1) if kind != "group" else scales


def spread_scales(trits: Any, scales: Float32, group: int) -> Float32:
    """Code times scale."""
    if scales.ndim == 2:
        scales = np.repeat(scales, group, 1)[:, : trits.shape[1]]
    elif scales.size > 1:
        scales = scales[:, None]
    return (trits * scales).astype(np.float32)


def write_own(folder: Path, model: Any, kind: str, group: int = 64) -> None:
    """A `ternaryforge` folder; `model` is given the weights that it means."""
    linears, tensors = set(linear_names(model)), {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        tensors[name] = values.copy()
        if name.removesuffix(".weight") in linears:
            trits, scales = ternary(values, kind, group)
            filled = np.concatenate([trits, np.zeros((-len(trits) % 4, trits.shape[1]), np.int8)])
            quarters = (filled + 1).astype(np.uint8).reshape(4, -1, trits.shape[1])
            tensors[name] = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
            tensors[name.removesuffix("weight") + "weight_scale"] = scales
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(spread_scales(trits, scales, group)))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    own = {"quant_method": "ternaryforge", "scale": kind} | ({"group_size": group} if kind == "group" else {})
    fields = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": own}
    (folder / "config.json").write_text(json.dumps(fields))


def check_linears(ours: TernaryModel, dense: dict[str, Float32], activations: Any) -> None:
    """Each linear layer on the same input, against NumPy with the weights that the file means."""
    weights = load_weights(Checkpoint.open(ours.path), ours.architecture)
    slots = [slot for slot in weights if ours.architecture.is_linear(slot)]
    assert len(slots) == sum(not slot.endswith("_bias") and ".layers" not in slot for slot in slots)
    for slot in slots:
        tensor, part = weights[slot], ours.architecture.parts.get(slot)
        expected = dense[ours.architecture.tensor_names[slot]]
        if part is not None:
            expected = expected[part.first : part.first + tensor.rows]
        x = np.random.default_rng(tensor.cols).standard_normal((5, tensor.cols)).astype(np.float32)
        given = x.astype(np.float64)
        if activations == "int8":
            codes, scales = _core.kernels.quantize_acts(x)
            given = codes / scales[:, None].astype(np.float64)
        found = _core.kernels.linear(x, tensor, activations=activations)
        assert relative_error(found, (given @ expected.T.astype(np.float64)).astype(np.float32)) <= 1e-5


def check_text(ours: TernaryModel, theirs: Any) -> None:
    """Logits within 1e-4 of the largest; three greedy texts of 64 tokens equal."""
    for count in (1, 90):
        error = relative_error(ours.logits(random_ids(count)), peer_logits(theirs, random_ids(count)))
        figures.info("%d tokens: relative error %.1e", count, error)
        assert error <= 1e-4
    prompts = [random_ids(7, seed=seed) for seed in range(3)]
    texts, _ = peer_greedy(theirs, prompts, 64)
    assert max(len(set(text)) for text in texts) >= MIN_DISTINCT
    assert [result.token_ids for result in ours.generate(prompts, max_new_tokens=64)] == texts


@pytest.mark.parametrize("name", CASES)
def test_packed(tmp_path: Path, name: str) -> None:
    family, changes, form = CASES[name]
    model = random_model(family, changes)
    if not form.startswith("stock"):
        write_own(tmp_path / "own", model, form)
        ours = TernaryModel.from_pretrained(tmp_path / "own")
        dense = {key: value.detach().numpy() for key, value in model.named_parameters()}
        check_linears(ours, dense, "float")
        check_text(ours, model)
        return
    quantization: dict[str, Any] = {"quant_method": "bitnet"}
    if form == "stock listed":  # as onebitllms writes it
        quantization["modules_to_not_convert"] = ["lm_head", "model.embed_tokens"]
    folder = write_packed(tmp_path / "stock", model, quantization, dtype=torch.float32)
    ours, theirs = TernaryModel.from_pretrained(folder), load_float32(folder)
    assert ours.transformer.activations == "int8"
    from transformers.integrations.bitnet import unpack_weights

    dense = {
        key + ".weight": (unpack_weights(module.weight, dtype=torch.float32) / module.weight_scale).numpy()
        for key, module in theirs.named_modules()
        if type(module).__name__ == "BitLinear"
    }
    assert len(dense) == len(linear_names(model))
    check_linears(ours, dense, "int8")
    prompt, text = decided_greedy(theirs, 64)
    assert ours.generate(prompt, max_new_tokens=64).token_ids == text


@pytest.mark.parametrize("name", BONSAI)
def test_bonsai(tmp_path: Path, name: str) -> None:
    """Dense-stored group scales, embeddings and head included: kept exactly, stored ternary, equal text."""
    changes = dict(BONSAI[name])
    binary = changes.pop("binary", False)
    sizes = WIDE | {"hidden_size": 268, "rope_parameters": YARN}
    model = random_model("qwen3", sizes | changes)
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                trits, scales = ternary(parameter.numpy(), "group", 128, binary=binary)
                parameter.copy_(torch.from_numpy(spread_scales(trits, scales, 128)))
    model.half().save_pretrained(tmp_path / "unpacked")
    report = convert(tmp_path / "unpacked", tmp_path / "out", scale="group", group_size=128)
    assert not report.warnings
    assert report.tensors == len(report.already_ternary) == 21 + (1 if "tie_word_embeddings" in changes else 2)
    if binary:
        assert {item.zero_fraction for item in report.linears} == {0.0}
    stored = Checkpoint.open(tmp_path / "out")
    assert stored.config["quantization_config"]["ternary_embeddings"] is True
    assert stored.info("model.embed_tokens.weight").shape == (33, 268)  # 131 rows, four in a byte
    assert all(stored.info(key).dtype == "U8" for key in tables if key in stored)
    ours, theirs = TernaryModel.from_pretrained(tmp_path / "out"), load_float32(tmp_path / "unpacked")
    check_linears(ours, {key: value.detach().numpy() for key, value in theirs.named_parameters()}, "float")
    check_text(ours, theirs)
    again = convert(tmp_path / "out", tmp_path / "again", scale="group", group_size=128)
    assert [item.zero_fraction for item in again.linears] == pytest.approx(
        [item.zero_fraction for item in sorted(report.linears, key=lambda item: item.name)]
    )


def test_model_that_transformers_saved_unpacked(tmp_path: Path) -> None:
    """`save_pretrained(save_original_format=False)` of a packed `autobitlinear` model: floats -1, 0, 1 and a scale."""
    multiply = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    model = random_model("bitnet", SIZES)
    folder = write_packed(tmp_path / "packed", model, multiply, dtype=torch.bfloat16)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    loaded.save_pretrained(tmp_path / "saved", save_original_format=False)
    stored = Checkpoint.open(tmp_path / "saved")
    assert stored.info("model.layers.0.mlp.up_proj.weight").dtype == "BF16"
    ids = random_ids(40)
    first, second = (TernaryModel.from_pretrained(tmp_path / name).logits(ids) for name in ("packed", "saved"))
    assert np.array_equal(first, second)
