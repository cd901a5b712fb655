# SPDX-License-Identifier: Apache-2.0
"""Perplexity: each protocol against its definition, and against published figures of real models."""

import json
import math
from pathlib import Path

import made_models
import numpy as np
import pytest
from numpy_model import NumpyModel

from ternaryforge import TernaryModel
from ternaryforge.evaluation import split_documents

CONFIG = made_models.llama_config()
DOCUMENTS = ["A short one.", "é" * 40 + " and a longer document that needs several windows. " * 3, "x"]
TEXT = "\n<|endoftext|>\n".join(["", *DOCUMENTS, "  \n "])


@pytest.fixture
def model(tmp_path: Path) -> TernaryModel:
    made_models.write_folder(tmp_path, CONFIG)
    return TernaryModel.from_pretrained(made_models.write_tokenizer(tmp_path))


@pytest.fixture(scope="module")
def reference() -> NumpyModel:
    return NumpyModel(CONFIG, made_models.make_tensors(CONFIG))


def test_split_documents() -> None:
    assert split_documents(TEXT) == [document.strip() for document in DOCUMENTS]
    assert split_documents("no separator\n") == ["no separator"]
    assert split_documents(" <|endoftext|> ") == []


@pytest.mark.parametrize("window", [48, 16, 17])
def test_documents(model: TernaryModel, reference: NumpyModel, window: int) -> None:
    """Each token but the first is scored once, in the first window that holds it."""
    nats, tokens, size = 0.0, 0, 0
    for document in split_documents(TEXT):
        ids = model.encode(document)
        size += len(document.encode())
        seen: set[int] = {0}
        for start in range(0, len(ids), window // 2):
            part = ids[start : start + window]
            log_probs = reference.log_probs(part)
            for i in range(1, len(part)):
                if start + i not in seen:
                    nats -= float(log_probs[i - 1, part[i]])
                    tokens += 1
                    seen.add(start + i)
        assert seen == set(range(len(ids)))
    result = model.perplexity(TEXT, window=window)
    assert (result.protocol, result.window, result.tokens, result.bytes) == ("documents", window, tokens, size)
    assert result.nll == pytest.approx(nats / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_wikitext(model: TernaryModel, reference: NumpyModel) -> None:
    ids = model.encode(TEXT)
    chunks = [ids[i : i + 48] for i in range(0, len(ids) - 47, 48)]
    assert len(chunks) >= 4
    assert len(ids) % 48
    nats = -sum(float(reference.log_probs(c)[np.arange(47), c[1:]].sum()) for c in chunks)
    result = model.perplexity(TEXT, protocol="wikitext")
    assert (result.window, result.tokens) == (48, 47 * len(chunks))
    assert result.nll == pytest.approx(nats / result.tokens, rel=1e-6)
    assert model.tokenizer is not None
    assert result.bytes == sum(len(model.tokenizer.token_bytes(i)) for c in chunks for i in c[1:])


def test_llama_cpp(model: TernaryModel, reference: NumpyModel) -> None:
    ids = model.encode(TEXT)
    nats, tokens = 0.0, 0
    for start in range(0, len(ids) - 31, 32):
        chunk = [257, *ids[start + 1 : start + 32]]
        log_probs = reference.log_probs(chunk)
        for position in range(16, 31):  # n_ctx / 2 .. n_ctx - 2
            nats -= float(log_probs[position, chunk[position + 1]])
            tokens += 1
    result = model.perplexity(TEXT, protocol="llama.cpp", window=32)
    assert result.tokens == tokens
    assert result.nll == pytest.approx(nats / tokens, rel=1e-6)


def test_first_documents_only(model: TernaryModel) -> None:
    first = model.perplexity(TEXT, max_documents=1)
    assert first.bytes == len(DOCUMENTS[0])
    assert first == model.perplexity(DOCUMENTS[0])


def test_progress_is_reported(model: TernaryModel) -> None:
    calls: list[tuple[int, int]] = []
    model.perplexity(TEXT, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == list(range(1, calls[0][1] + 1))
    assert {total for _, total in calls} == {len(calls)}


def test_a_tokenizer_without_a_first_token(tmp_path: Path) -> None:
    made_models.write_folder(tmp_path, CONFIG)
    model = TernaryModel.from_pretrained(made_models.write_tokenizer(tmp_path, bos=False))
    assert model.perplexity("abc").tokens == 2  # the very first cannot be scored
    assert model.perplexity("abcd" * 30, protocol="llama.cpp", window=32).tokens == 3 * 15
    with pytest.raises(ValueError, match="the text has nothing to score"):
        model.perplexity("a")


def test_result_as_a_report(model: TernaryModel, tmp_path: Path) -> None:
    result = model.perplexity("some text")
    result.save(tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    assert list(document) == ["protocol", "nll", "perplexity", "bits_per_byte", "tokens", "bytes", "window"]
    assert "bits_per_byte" in result._repr_html_()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text has nothing to score"),
        ("short", {"protocol": "wikitext"}, "shorter than one window of 48 tokens"),
        ("x", {"protocol": "c4"}, "protocol must be one of"),
        ("x", {"window": 3}, "window must be at least 4"),
        ("x", {"max_documents": 0}, "max_documents must be positive"),
        ("x" * 99, {"max_documents": 1, "protocol": "wikitext"}, "goes with 'documents'"),
    ],
)
def test_wrong_requests(model: TernaryModel, text: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.perplexity(text, **options)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "documents", "bits_per_byte", "perplexity"),
    [("stories260k/hf", 200, 0.907, 3.692), ("babyllama/hf-tok361", 40, 0.9456, 1.9244)],
)
def test_real_models(shared: Path, name: str, documents: int, bits_per_byte: float, perplexity: float) -> None:
    """What tools/evaluate_documents.py, with plain transformers, gives for the first documents."""
    model = TernaryModel.from_pretrained(shared / "data" / name)
    text = (shared / "data/tinystories/valid.txt").read_text(encoding="utf-8")
    result = model.perplexity(text, max_documents=documents)
    assert result.bits_per_byte == pytest.approx(bits_per_byte, abs=0.0006)
    assert result.perplexity == pytest.approx(perplexity, abs=0.0006)
