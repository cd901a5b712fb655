# SPDX-License-Identifier: Apache-2.0
"""Checkpoints packed by transformers and loaded by it: every linear layer, the logits and the greedy text.

Both sides compute in float32 with int8 activations. The codes of equal activations are equal; where
the two differ in the last place and stand at a rounding tie, a code flips and the logits differ a little.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import (
    decided_greedy,
    figures,
    load_float32,
    make_config,
    make_model,
    peer_logits,
    random_ids,
    relative_error,
    top1_agreement,
    torch,
    transformers,
    write_packed,
)

from ternaryforge import TernaryModel, _core
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.weights import load_weights

DIVIDE = {"quant_method": "bitnet"}
DIVIDE_LIKE_CONVERT = {
    "quant_method": "bitnet",
    "linear_class": "bitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head"],
}
MULTIPLY = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
GQA = {
    "hidden_size": 84,
    "intermediate_size": 172,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


@dataclass(frozen=True)
class Case:
    """One checkpoint. The seeds are such that a flipped code hardly decides the greedy text."""

    family: str
    changes: dict[str, Any]
    quantization: dict[str, Any]
    dtype: str = "float32"
    seed: int = 4

    @property
    def spread(self) -> float:
        """A tied head mirrors the embeddings: only strong blocks keep text from swinging between two tokens."""
        return 1.4 if self.changes.get("tie_word_embeddings") else 0.5


FIVE_HEADS = {"hidden_size": 100, "num_attention_heads": 5, "num_hidden_layers": 2}
NARROW = GQA | {"head_dim": 10}
TIED = {"tie_word_embeddings": True}
CASES = {
    "llama divide": Case("llama", GQA | {"head_dim": 22, "num_hidden_layers": 3}, DIVIDE, seed=7),
    "llama divide tied bfloat16": Case("llama", FIVE_HEADS | TIED, DIVIDE_LIKE_CONVERT, "bfloat16"),
    "llama multiply": Case("llama", NARROW, MULTIPLY),
    "llama online bfloat16": Case("llama", NARROW, ONLINE, "bfloat16"),
    "bitnet divide": Case("bitnet", GQA | TIED, DIVIDE_LIKE_CONVERT),
    "bitnet multiply": Case("bitnet", GQA, MULTIPLY),
    "bitnet multiply tied bfloat16": Case("bitnet", GQA | TIED, MULTIPLY, "bfloat16"),
    "bitnet online": Case("bitnet", GQA, ONLINE),
    "bitnet online bfloat16": Case("bitnet", {"num_hidden_layers": 2}, ONLINE, "bfloat16"),
}


@dataclass
class Pair:
    """One folder in both libraries."""

    folder: Path
    ours: TernaryModel
    theirs: Any


def load_quantized(folder: Path) -> Any:
    """transformers in float32.

    Asked for float32, it leaves the embeddings and norms of an `autobitlinear` folder in bfloat16 and
    fails in the first layer; and it refuses `.float()`. Loaded as stored, its trits are exact in
    bfloat16, so nothing is lost by turning the parameters to float32 with torch's own method.
    """
    fields = json.loads((folder / "config.json").read_text())
    if fields["quantization_config"].get("linear_class") != "autobitlinear":
        return load_float32(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return torch.nn.Module.float(model)


def write_online(folder: Path, model: Any, dtype: Any) -> None:
    """What training leaves: float latents, and a configuration that has them rounded at every use."""
    model.to(dtype).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text()) | {"quantization_config": ONLINE}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("packed") / "model"
    model = make_model(make_config(case.family, **case.changes), seed=case.seed, spread=case.spread)
    if case.quantization is ONLINE:
        write_online(folder, model, getattr(torch, case.dtype))
    else:
        write_packed(folder, model, case.quantization, dtype=getattr(torch, case.dtype))
    pair = Pair(folder, TernaryModel.from_pretrained(folder), load_quantized(folder))
    assert pair.ours.transformer.activations == "int8"
    assert {parameter.dtype for parameter in pair.theirs.parameters()} <= {torch.float32, torch.uint8}
    return pair


def record_linears(model: Any, ids: list[int]) -> dict[str, tuple[Any, Any]]:
    """Input and output of every quantised layer, by module name, over one text."""
    seen = {}
    hooks = []
    for name, module in model.named_modules():
        if type(module).__name__ in {"BitLinear", "AutoBitLinear"}:

            def note(_: Any, inputs: Any, output: Any, name: str = name) -> None:
                seen[name] = (inputs[0][0].numpy(), output[0].numpy())

            hooks.append(module.register_forward_hook(note))
    peer_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_codes_at_rounding_ties() -> None:
    """Half of the largest magnitude is 63.5 steps, give or take the last place of the scale.

    Products of bfloat16 embeddings and norms often are exactly half of another one.
    """
    from transformers.integrations.bitnet import ActQuant, BitLinear

    x = torch.randn(2000, 20, generator=torch.Generator().manual_seed(0))
    largest = x.abs().amax(1)
    x[:, 3], x[:, 4] = largest / 2, -largest / 2
    x[0] = 0
    codes, scales = BitLinear(20, 4, bias=False, dtype=torch.float32).activation_quant(x)
    found_codes, found_scales = _core.kernels.quantize_acts(x.numpy())
    np.testing.assert_array_equal(found_scales, scales[:, 0].numpy())
    np.testing.assert_array_equal(found_codes, codes.numpy())
    np.testing.assert_array_equal(found_codes / found_scales[:, None], ActQuant.apply(x).numpy())


def test_each_linear(pair: Pair) -> None:
    seen = record_linears(pair.theirs, random_ids(33))
    architecture = pair.ours.architecture
    weights = load_weights(Checkpoint.open(pair.folder), architecture)
    slots = {architecture.module_of(slot): slot for slot in weights if architecture.is_linear(slot)}
    assert set(seen) == set(slots)
    for name, (x, expected) in seen.items():
        found = _core.kernels.linear(np.ascontiguousarray(x), weights[slots[name]], activations="int8")
        error = relative_error(found, expected)
        figures.info("%s: relative error %.1e", name, error)
        assert error <= 1e-5


def test_logits(pair: Pair) -> None:
    found, expected = [], []
    for count, seed in ((150, 0), (150, 1), (150, 2), (33, 3), (7, 4), (1, 5)):
        ids = random_ids(count, seed=seed)
        found.append(pair.ours.logits(ids))
        expected.append(peer_logits(pair.theirs, ids))
    ours, theirs = np.concatenate(found), np.concatenate(expected)
    errors = np.abs(ours - theirs).max(-1) / np.abs(theirs).max()
    figures.info(
        "relative error %.1e at worst, median %.1e; a flipped code reaches %d of %d tokens, the first choice of %d",
        errors.max(),
        np.median(errors),
        (errors > 1e-5).sum(),
        len(errors),
        (ours.argmax(-1) != theirs.argmax(-1)).sum(),
    )
    assert errors.max() <= 5e-2
    assert top1_agreement(ours, theirs) >= 0.99


def test_greedy_text(pair: Pair) -> None:
    prompt, text = decided_greedy(pair.theirs, 64)
    assert pair.ours.generate(prompt, max_new_tokens=64).token_ids == text


@pytest.mark.parametrize("quantization", [DIVIDE, ONLINE], ids=["divide", "online"])
def test_folder_saved_again_by_transformers(tmp_path: Path, quantization: dict[str, Any]) -> None:
    """Its own fields of quantization_config are understood; nothing else changes."""
    model = make_model(make_config("llama"))
    if quantization is ONLINE:
        write_online(tmp_path / "first", model, torch.float32)
    else:
        write_packed(tmp_path / "first", model, quantization, dtype=torch.float32)
    load_float32(tmp_path / "first").save_pretrained(tmp_path / "second")
    ids = random_ids(33)
    first, second = (TernaryModel.from_pretrained(tmp_path / name).logits(ids) for name in ("first", "second"))
    assert np.array_equal(first, second)
