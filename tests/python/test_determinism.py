# SPDX-License-Identifier: Apache-2.0
"""The same bits however tokens are cut, batched and shared among threads; and every target close to the first."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import made_models
import numpy as np
import pytest
from numpy.typing import NDArray

from ternaryforge import TernaryModel, _core

Activations = Literal["int8", "int16", "float"]
Float32 = NDArray[np.float32]
Ids = NDArray[np.int32]
figures = logging.getLogger("figures")  # seen with pytest --log-cli-level=INFO

# Ragged everywhere, and 620,000 weights a layer: from six tokens on there is work for three threads.
SIZES = {
    "hidden_size": 264,
    "intermediate_size": 524,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 66,
    "max_position_embeddings": 160,
}
ROWS = {"quant_method": "ternaryforge", "scale": "row"}
GROUPS = {"quant_method": "ternaryforge", "scale": "group", "group_size": 64}
CONFIGS = {
    "dense": made_models.llama_config(**SIZES),
    "tensor": made_models.bitnet_config(**SIZES),
    "row": made_models.llama_config(**SIZES, quantization_config=ROWS),
    "group": made_models.llama_config(**SIZES, quantization_config=GROUPS),
}
CASES = [(name, activations) for name in CONFIGS for activations in ("int8", "float")]
CASES.append(("group", "int16"))
IDS, OTHER_IDS = np.random.default_rng(0).integers(0, 263, (2, 150)).astype(np.int32)


def write(folder: Path, config: dict[str, Any]) -> Path:
    """Embeddings as large as what the layers add, so that logits are not decided by the last bits."""
    tensors = made_models.make_tensors(config, dtype="F32", seed=1)
    for name, (dtype, values) in tensors.items():
        if "embed_tokens" in name:
            tensors[name] = (dtype, values * np.float32(8))
        elif name.endswith("weight_scale"):
            divide = config["quantization_config"]["quant_method"] == "bitnet"
            tensors[name] = (dtype, values * np.float32(4 if divide else 0.25))
    return made_models.write_folder(folder, config, tensors)


def load(folder: Path, activations: Activations, threads: int = 1) -> _core.model.Transformer:
    return TernaryModel.from_pretrained(folder, activations=activations, threads=threads).transformer


def forward(model: _core.model.Transformer, state: _core.model.SequenceState, ids: Ids, chunk: int = 150) -> Float32:
    """Logits of all tokens, `chunk` of them at a time."""
    parts = [ids[begin : begin + chunk] for begin in range(0, len(ids), chunk)]
    return np.concatenate([model.forward([(part, state)], logits="all") for part in parts])


@pytest.mark.parametrize(("name", "activations"), CASES)
def test_chunks_and_threads(tmp_path: Path, name: str, activations: Activations) -> None:
    folder = write(tmp_path, CONFIGS[name])
    single = load(folder, activations)
    expected = forward(single, single.new_sequence(), IDS)
    for threads in (1, 2, 3):
        model = load(folder, activations, threads)
        assert model.threads == threads
        for chunk in (1, 7, 64, 150):
            found = forward(model, model.new_sequence(), IDS, chunk)
            assert np.array_equal(found, expected), (threads, chunk)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_three_threads_for_one_token(tmp_path: Path, activations: Activations) -> None:
    """3.2 million weights in the layer are work for three threads even in generation."""
    sizes = {"hidden_size": 524, "intermediate_size": 1780, "num_hidden_layers": 1}
    folder = write(tmp_path, CONFIGS["group"] | sizes)
    logits = []
    for threads in (1, 2, 3):
        model = load(folder, activations, threads)
        logits += [forward(model, model.new_sequence(), IDS[:20], chunk) for chunk in (1, 20)]
    assert all(np.array_equal(found, logits[0]) for found in logits)


@pytest.mark.parametrize(("name", "activations"), CASES)
def test_batches(tmp_path: Path, name: str, activations: Activations) -> None:
    """Sequences of a batch do not see each other, nor which of them is long, short, new or old."""
    folder = write(tmp_path, CONFIGS[name])
    texts = [IDS, IDS[40:77], IDS[90:91], IDS[50:114]]
    single = load(folder, activations)
    expected = [forward(single, single.new_sequence(), text) for text in texts]
    for threads in (1, 3):
        model = load(folder, activations, threads)
        states = [model.new_sequence() for _ in texts]
        together = model.forward(list(zip(texts, states, strict=True)), logits="all")
        assert np.array_equal(together, np.concatenate(expected))
        states = [model.new_sequence() for _ in texts]
        starts = [100, 36, 0, 33]
        for text, state, start in zip(texts, states, starts, strict=True):
            if start:
                forward(model, state, text[:start])
        rest = [(text[start:], state) for text, state, start in zip(texts, states, starts, strict=True)]
        found = model.forward(rest, logits="last")
        assert np.array_equal(found, np.stack([logits[-1] for logits in expected]))


@pytest.mark.parametrize(("name", "activations"), CASES)
def test_roll_back(tmp_path: Path, name: str, activations: Activations) -> None:
    model = load(write(tmp_path, CONFIGS[name]), activations, threads=3)
    state = model.new_sequence()
    expected = forward(model, state, IDS)
    for kept in (149, 96, 70, 1, 0):
        state.truncate(kept)
        forward(model, state, OTHER_IDS[kept:])
        state.truncate(kept)
        assert state.length == kept
        assert np.array_equal(forward(model, state, IDS[kept:], 41), expected[kept:]), kept


def logits_of(folder: Path, activations: Activations, texts: Sequence[Ids]) -> Float32:
    model = load(folder, activations)
    return np.concatenate([forward(model, model.new_sequence(), text) for text in texts])


def has_fused_multiply_add(target: str) -> bool:
    return target.startswith(("avx", "neon"))


@pytest.mark.parametrize(("name", "activations"), CASES)
def test_targets(
    tmp_path: Path,
    target: str,
    name: str,
    activations: Activations,
) -> None:
    """Only fused multiply-add makes a difference; at a rounding tie it may flip an int8 activation."""
    folder = write(tmp_path, CONFIGS[name])
    texts = [IDS, OTHER_IDS]
    found = logits_of(folder, activations, texts)
    first = _core.simd.supported_targets()[0]
    _core.simd.use_target(first)
    expected = logits_of(folder, activations, texts)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    agreement = (found.argmax(-1) == expected.argmax(-1)).mean()
    figures.info("%s %s %s: relative error %.1e, top-1 agreement %.4f", target, name, activations, error, agreement)
    if has_fused_multiply_add(target) == has_fused_multiply_add(first):
        assert np.array_equal(found, expected)
    if activations == "float":
        assert error <= 1e-5
    assert agreement >= 0.99
