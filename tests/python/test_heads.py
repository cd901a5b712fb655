# SPDX-License-Identifier: Apache-2.0
"""Output heads of a whole model: fewer bits, and the two-stage head that must choose as the exact one does."""

import math
from pathlib import Path
from typing import Any, get_args

import made_models
import numpy as np
import pytest

from ternaryforge import TernaryModel, _core
from ternaryforge.inspection import inspect
from ternaryforge.model import HeadMode

PROMPT = "Once upon a time, there was a little"
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.4},
    {"temperature": 0.9, "top_k": 1},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1},
    {"temperature": 0.7, "top_k": 100, "repetition_penalty": 0.8},
)


@pytest.fixture(scope="module")
def demos() -> dict[HeadMode, TernaryModel]:
    return {head: TernaryModel.demo(threads=1, head=head) for head in get_args(HeadMode)}


def test_names_and_sizes(demos: dict[HeadMode, TernaryModel]) -> None:
    exact = demos["exact"].transformer
    sizes = inspect("demo").head_bytes
    assert sizes is not None
    assert sizes["exact"] == exact.head_bytes == 1024 * 256 * 2
    for head, bits in (("int8", 8), ("int6", 6), ("int4", 4), ("two-stage", 6)):
        transformer = demos[head].transformer
        assert transformer.head == head
        assert transformer.head_bytes == sizes[f"int{bits}"]
        assert sizes[f"int{bits}"] == 1024 * 256 * bits // 8 + 1024 * 256 // (16 if bits == 6 else 32) + 1024 * 12
        assert transformer.token_bytes == exact.token_bytes - exact.head_bytes + transformer.head_bytes
        assert transformer.weight_bytes == exact.weight_bytes + transformer.head_bytes  # the embedding stays


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_two_stage_chooses_what_the_exact_head_chooses(
    demos: dict[HeadMode, TernaryModel], sampling: dict[str, Any]
) -> None:
    for seed in range(3):
        exact = demos["exact"].generate([PROMPT, "The dog"], max_new_tokens=40, seed=seed, **sampling)
        found = demos["two-stage"].generate([PROMPT, "The dog"], max_new_tokens=40, seed=seed, **sampling)
        for first, second in zip(exact, found, strict=True):
            assert first.token_ids == second.token_ids
            assert first.logprobs == second.logprobs
            assert first.finish_reason == second.finish_reason


def test_two_stage_without_a_limit_on_candidates(demos: dict[HeadMode, TernaryModel]) -> None:
    for sampling in ({"temperature": 0.8}, {"temperature": 0.8, "top_k": 1000}, {"temperature": 0.8, "top_p": 0.9}):
        exact = demos["exact"].generate(PROMPT, max_new_tokens=20, **sampling)
        found = demos["two-stage"].generate(PROMPT, max_new_tokens=20, **sampling)
        assert (found.token_ids, found.logprobs) == (exact.token_ids, exact.logprobs)


def test_log_probabilities_of_a_stream_come_when_asked_for(demos: dict[HeadMode, TernaryModel]) -> None:
    pieces = list(demos["two-stage"].stream(PROMPT, max_new_tokens=8))
    expected = [piece.logprob for piece in demos["exact"].stream(PROMPT, max_new_tokens=8)]
    assert [piece.logprob for piece in reversed(pieces)] == expected[::-1]
    result = demos["two-stage"].generate(PROMPT, max_new_tokens=8)
    assert result.to_dict()["logprobs"] == [logprob for piece, logprob in zip(pieces, expected, strict=True)]
    assert _core.runtime.log_probabilities([]) == []


def test_likeliest_tokens(demos: dict[HeadMode, TernaryModel]) -> None:
    prompts = [np.array(demos["exact"].encode(text), np.int32) for text in (PROMPT, "The dog ran", "Lily")]
    logits = {}
    before = demos["two-stage"].transformer.search_counts()
    for head in ("exact", "two-stage"):
        transformer = demos[head].transformer
        states = [transformer.new_sequence() for _ in prompts]
        batch = list(zip(prompts, states, strict=True))
        logits[head] = transformer.likeliest_tokens(batch)
        assert [state.length for state in states] == [len(prompt) for prompt in prompts]
    expected = [int(demos["exact"].logits(prompt)[-1].argmax()) for prompt in prompts]
    assert logits["exact"] == logits["two-stage"] == expected
    counts = demos["two-stage"].transformer.search_counts()
    assert counts["searches"] - before["searches"] == 3
    assert counts["fallbacks"] == before["fallbacks"]
    assert 3 <= counts["rows"] - before["rows"] <= 3 * 256
    assert demos["exact"].transformer.search_counts() == {"searches": 0, "fallbacks": 0, "rows": 0}


@pytest.mark.shared
def test_fewer_bits_lose_little(demos: dict[HeadMode, TernaryModel], shared: Path) -> None:
    text = (shared / "data/tinystories/valid.txt").read_text(encoding="utf-8")
    nll = {head: model.perplexity(text, max_documents=3).nll for head, model in demos.items()}
    assert nll["two-stage"] == nll["exact"]
    assert nll["int8"] == pytest.approx(nll["exact"], abs=1e-3)
    assert nll["int6"] == pytest.approx(nll["exact"], abs=5e-3)
    assert nll["int4"] == pytest.approx(nll["exact"], abs=5e-2)
    assert nll["exact"] not in (nll["int8"], nll["int6"], nll["int4"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["int8", "int6", "int4"])
def test_quantized_logits_are_those_of_the_quantized_rows(tmp_path: Path, tied: bool, head: HeadMode) -> None:
    config = made_models.llama_config(tie_word_embeddings=tied)
    folder = made_models.write_folder(tmp_path, config)
    ids = np.random.default_rng(0).integers(0, 263, 30)
    exact = TernaryModel.from_pretrained(folder, threads=1)
    model = TernaryModel.from_pretrained(folder, threads=1, head=head)
    logits, expected = model.logits(ids), exact.logits(ids)
    step = {"int8": 0.01, "int6": 0.05, "int4": 0.2}[head]
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert step / 100 < error < step
    threaded = TernaryModel.from_pretrained(folder, threads=2, head=head)
    np.testing.assert_array_equal(threaded.logits(ids), logits)
    np.testing.assert_array_equal(model.logits(ids[:1])[0], logits[0])
    kept = exact.transformer.weight_bytes - (0 if tied else exact.transformer.head_bytes)
    assert model.transformer.weight_bytes == kept + model.transformer.head_bytes


def test_two_stage_becomes_exact_where_it_does_not_apply(tmp_path: Path) -> None:
    layer = _core.model.LayerSpec(
        heads=1, kv_heads=1, head_dim=8, rotation=[1, 0.1, 0.01, 0.001], ffn_size=8, activation="silu"
    )

    def transformer(head: HeadMode, change: float | None = None, **spec: Any) -> _core.model.Transformer:
        model = _core.model.ModelSpec(
            vocab_size=32, hidden_size=8, context_length=8, norm_epsilon=1e-5, layers=[layer], tied_head=False, **spec
        )
        weights = {}
        for name, (rows, cols) in model.slots().items():
            values = np.random.default_rng(len(name)).standard_normal((rows, cols)).astype(np.float32)
            if change is not None and name == "head":
                values[7, 3] = change
            weights[name] = _core.formats.PackedTensor("f32", rows, cols, values)
        return _core.model.Transformer(model, weights, activations="float", head=head, threads=1)

    assert transformer("two-stage").head == "two-stage"
    assert transformer("two-stage", head_bias=True).head == "exact"
    assert transformer("two-stage", logit_soft_cap=30.0).head == "exact"
    assert transformer("two-stage", math.nan).head == "exact"
    assert transformer("int6", head_bias=True, logit_soft_cap=30.0).head == "int6"
    with pytest.raises(ValueError, match="row 7 of the head holds a value that is not finite"):
        transformer("int6", math.inf)


def test_biases_and_caps_follow_a_quantized_head() -> None:
    layer = _core.model.LayerSpec(heads=1, kv_heads=1, head_dim=8, rotation=[], ffn_size=8, activation="silu")
    spec = _core.model.ModelSpec(
        vocab_size=40,
        hidden_size=8,
        context_length=8,
        norm_epsilon=1e-5,
        layers=[layer],
        tied_head=True,
        head_bias=True,
        logit_soft_cap=3.0,
    )
    random = np.random.default_rng(0)
    weights = {
        name: _core.formats.PackedTensor("f32", rows, cols, random.standard_normal((rows, cols), np.float32))
        for name, (rows, cols) in spec.slots().items()
    }
    ids = np.arange(5, dtype=np.int32)
    logits = {}
    for head in ("exact", "int8"):
        model = _core.model.Transformer(spec, weights, activations="float", head=head, threads=1)
        logits[head] = model.forward([(ids, model.new_sequence())], logits="all")
    np.testing.assert_allclose(logits["int8"], logits["exact"], atol=0.03)


def test_wrong_heads_are_refused(tmp_path: Path) -> None:
    folder = made_models.write_folder(tmp_path, made_models.llama_config())
    with pytest.raises(ValueError, match=r"\[load\] head must be one of exact, int8, int6, int4, two-stage, got 'q6'"):
        TernaryModel.from_pretrained(folder, head="q6")  # type: ignore[arg-type]
    spec = _core.model.ModelSpec(
        vocab_size=32,
        hidden_size=16,
        context_length=8,
        norm_epsilon=1e-5,
        layers=[_core.model.LayerSpec(heads=1, kv_heads=1, head_dim=8, rotation=[], ffn_size=8, activation="silu")],
        tied_head=True,
    )
    weights = {}
    for name, (rows, cols) in spec.slots().items():
        if name == "embedding":
            codes = np.ones((rows, cols), np.int8)
            scale = np.ones(1, np.float32)
            weights[name] = _core.formats.PackedTensor("int8", rows, cols, codes, scale_kind="tensor", scales=scale)
        else:
            weights[name] = _core.formats.PackedTensor("f32", rows, cols, np.ones((rows, cols), np.float32))
    with pytest.raises(ValueError, match='this one is int8: load the model with head="exact"'):
        _core.model.Transformer(spec, weights, activations="float", head="int6", threads=1)
    assert _core.model.Transformer(spec, weights, activations="float", head="two-stage", threads=1).head == "exact"
