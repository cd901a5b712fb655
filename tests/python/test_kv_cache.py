# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of a whole model: its kinds, long contexts, and how it is shared out."""

from pathlib import Path

import made_models
import numpy as np
import pytest

from ternaryforge import TernaryModel, _core
from ternaryforge.model import KvType

KINDS: tuple[KvType, ...] = ("f32", "f16", "int8")
# 640,000 weights a layer: work for three threads from five tokens on, and, with 1300 tokens, three chunks of context.
CONFIG = made_models.llama_config(
    hidden_size=264,
    intermediate_size=524,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=44,
    num_hidden_layers=2,
    max_position_embeddings=1400,
)
IDS = np.random.default_rng(0).integers(0, 263, 1300).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_models.write_folder(tmp_path_factory.mktemp("kv") / "model", CONFIG)


def last_logits(model: _core.model.Transformer, ids: np.ndarray, *, single: int = 0) -> np.ndarray:
    """Logits after `ids`, the last `single` of which come one by one."""
    state = model.new_sequence()
    cut = len(ids) - single
    out = model.forward([(ids[:cut], state)])
    for token in ids[cut:]:
        out = model.forward([(np.array([token], np.int32), state)])
    return out[0]


@pytest.mark.parametrize("kv", KINDS)
def test_long_contexts_are_shared_out_without_a_trace(folder: Path, kv: KvType) -> None:
    expected = None
    for threads in (1, 3):
        model = TernaryModel.from_pretrained(folder, threads=threads, kv=kv).transformer
        for single in (0, 2):
            logits = last_logits(model, IDS, single=single)
            expected = logits if expected is None else expected
            np.testing.assert_array_equal(logits, expected)
        batch = [(IDS[:1200], model.new_sequence()), (IDS[:1299], model.new_sequence())]
        model.forward(batch, logits="none")
        rest = [(IDS[1200:1203], batch[0][1]), (IDS[1299:], batch[1][1])]  # four tokens: by chunks
        np.testing.assert_array_equal(model.forward(rest)[1], expected)


def test_fewer_bits_change_little(folder: Path) -> None:
    logits = {
        kv: last_logits(TernaryModel.from_pretrained(folder, threads=1, kv=kv).transformer, IDS[:300]) for kv in KINDS
    }
    scale = np.abs(logits["f32"]).max()
    errors = {kv: np.abs(logits[kv] - logits["f32"]).max() / scale for kv in KINDS}
    assert 0 < errors["f16"] < 1e-3
    assert errors["f16"] < errors["int8"] < 2e-2


@pytest.mark.parametrize(("kv", "bytes_per_number"), [("f32", 4.0), ("f16", 2.0), ("int8", 1 + 4 / 44)])
def test_reports_its_size(folder: Path, kv: KvType, bytes_per_number: float) -> None:
    transformer = TernaryModel.from_pretrained(folder, threads=1, kv=kv).transformer
    assert transformer.kv == kv
    assert transformer.kv_bytes_per_token == pytest.approx(2 * 2 * 2 * 44 * bytes_per_number)


def test_roll_back_forgets(folder: Path) -> None:
    model = TernaryModel.from_pretrained(folder, threads=1, kv="int8").transformer
    state = model.new_sequence()
    first = model.forward([(IDS[:70], state)])
    state.truncate(30)
    model.forward([(IDS[100:180], state)], logits="none")
    state.truncate(30)
    np.testing.assert_array_equal(model.forward([(IDS[30:70], state)]), first)


def test_repeats_what_is_present(folder: Path) -> None:
    model = TernaryModel.from_pretrained(folder, threads=1, kv="f16").transformer
    state, other = model.new_sequence(), model.new_sequence()
    with pytest.raises(ValueError, match=r"\[sequence\] repeating up to 64 tokens needs whole blocks .* has 0"):
        state.repeat(64)
    model.forward([(IDS[:64], state)], logits="none")
    model.forward([(IDS[:64], other)], logits="none")
    with pytest.raises(ValueError, match=r"no more than that, the sequence has 64"):
        state.repeat(63)
    state.repeat(150)
    assert state.length == 150
    other.repeat(128)
    other.repeat(150)  # the first four blocks are those of two, twice
    np.testing.assert_array_equal(model.forward([(IDS[:3], state)]), model.forward([(IDS[:3], other)]))
    state.truncate(64)
    fresh = model.new_sequence()
    model.forward([(IDS[:64], fresh)], logits="none")
    np.testing.assert_array_equal(model.forward([(IDS[64:70], state)]), model.forward([(IDS[64:70], fresh)]))


def test_refuses_another_kind(folder: Path) -> None:
    with pytest.raises(ValueError, match="kv must be 'f32', 'f16' or 'int8', got 'q4'"):
        TernaryModel.from_pretrained(folder, kv="q4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[kv\] kv is f32, f16 or int8, got 'q4'"):
        _core.kernels.attend(*([np.ones((1, 4), np.float32)] * 3), 1.0, kv="q4")  # type: ignore[arg-type]


@pytest.mark.shared
@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_a_trained_model_hardly_notices(shared: Path, kv: KvType) -> None:
    text = (shared / "data" / "tinystories" / "valid.txt").read_text(encoding="utf-8")
    folder = shared / "data" / "stories260k" / "hf"
    exact, found = (
        TernaryModel.from_pretrained(folder, kv=kind).perplexity(text, max_documents=15).nll for kind in ("f32", kv)
    )
    assert abs(found - exact) < {"f16": 2e-4, "int8": 4e-3}[kv]
