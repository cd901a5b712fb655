# SPDX-License-Identifier: Apache-2.0
"""Comparing models with references: folders, files, and engines that stand in for llama.cpp."""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge import validation
from ternaryforge.cli import app
from ternaryforge.gguf.engines import LlamaCli, open_engine
from ternaryforge.gguf.exporting import export_gguf


class OtherEngine:
    """This library in the place of llama.cpp; `shift` is added to the logits of one token."""

    name = "stand-in"

    def __init__(self, file: Path, shift: float = 0.0) -> None:
        self.model = tf.TernaryModel.from_pretrained(file, activations="float")
        self.shift = shift
        self.closed = False

    def tokenize(self, text: str) -> list[int]:
        return self.model.encode(text)

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        logits = self.model.logits(ids)
        logits[:, 5] += self.shift
        return logits

    def continue_text(self, prompt: str, ids: Sequence[int], count: int, end_ids: Sequence[int]) -> list[int]:
        del prompt, end_ids  # it knows its own
        return self.model.generate(ids, max_new_tokens=count).token_ids

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("validation") / "demo.gguf"
    export_gguf("demo", file, threads=1)
    return file


def use_engine(monkeypatch: pytest.MonkeyPatch, engine: object) -> None:
    monkeypatch.setattr(validation, "open_engine", lambda *_, **__: engine)


def test_a_file_in_an_engine(demo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OtherEngine(demo_file)
    use_engine(monkeypatch, engine)
    report = tf.validate(demo_file, threads=1)
    assert (report.top1_agreement, report.kl, report.tokens_equal, report.passed) == (1, 0, True, True)
    assert (report.greedy_equal, report.greedy_tokens, report.reference) == (128, 128, "stand-in")
    assert report.positions > 40
    assert report.perplexity == report.reference_perplexity
    assert report.perplexity == pytest.approx(tf.TernaryModel.from_pretrained(
        demo_file, activations="float").perplexity(validation.DEFAULT_TEXT).perplexity)  # fmt: skip
    assert engine.closed
    trits = tf.TernaryModel.from_pretrained(demo_file)
    assert trits.transformer.activations == "int8"
    assert report.bits_per_weight == pytest.approx(2.0625, abs=1e-3)
    assert report.file_bytes == demo_file.stat().st_size
    assert 0.2 < (report.sparsity or 0) < 0.5
    assert report.balance == pytest.approx(0.5, abs=0.02)


def test_an_engine_that_computes_otherwise(demo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, OtherEngine(demo_file, shift=50.0))
    report = tf.validate(demo_file, threads=1)
    assert (report.top1_agreement, report.passed) == (0, False)
    assert (report.kl or 0) > 10
    # By hand: p . (log p - log q) where q is p with one logit raised.
    model = tf.TernaryModel.from_pretrained(demo_file, activations="float")
    logits = model.logits(model.encode(validation.DEFAULT_TEXT)).astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    expected = np.log1p(p[:, 5] * (np.exp(50.0) - 1)) - 50 * p[:, 5]
    assert report.kl == pytest.approx(expected.mean(), rel=1e-5)
    assert tf.validate(demo_file, thresholds={}, threads=1).passed
    result = CliRunner().invoke(app, ["validate", str(demo_file), "--json"])
    assert result.exit_code == 3
    assert json.loads(result.stdout)["passed"] is False


def test_other_tokens_fail(demo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OtherEngine(demo_file)
    monkeypatch.setattr(engine, "tokenize", lambda text: [7, *engine.model.encode(text)])
    use_engine(monkeypatch, engine)
    report = tf.validate(demo_file, threads=1)
    assert (report.kl, report.tokens_equal, report.passed) == (0, False, False)


def test_a_model_and_its_reference(tmp_path: Path, demo_file: Path) -> None:
    report = tf.validate(demo_file, "demo", threads=1)
    assert report.reference == "demo in floating point"
    assert 0 < (report.kl or 0) < 0.01  # int8 activations
    assert report.passed
    own = tf.validate("demo", threads=1)
    assert (own.kl, own.top1_agreement) == (report.kl, report.top1_agreement)
    text = tmp_path / "text.txt"
    text.write_text("The dog ran to the big tree and saw a small bird.", encoding="utf-8")
    result = CliRunner().invoke(app, ["validate", "demo", "--data", str(text), "--most-kl", "0.5", "--least-top1", "0"])
    assert result.exit_code == 0, result.output
    assert "equal in" in result.stdout
    other = gguf_models.write_model(tmp_path / "other", "llama")
    with pytest.raises(ValueError, match=r"the reference has a vocabulary of 300 tokens, the model one of \d+"):
        tf.validate("demo", other)
    text.write_text("Hi", encoding="utf-8")
    with pytest.raises(ValueError, match="the text must have more than 8 tokens"):
        tf.validate("demo", data=text)
    with pytest.raises(ValueError, match=r"thresholds has the keys top1_agreement, .*, got speed"):
        tf.validate("demo", thresholds={"speed": 1})


def test_an_engine_that_gives_only_text(tmp_path: Path, demo_file: Path) -> None:
    """The command prints what this library would say, and later something else; old ones refuse -no-cnv."""
    model = tf.TernaryModel.from_pretrained(demo_file, activations="float")
    prompt = model.encode(validation.DEFAULT_TEXT)[:8]
    continued = model.generate(prompt, max_new_tokens=128)
    command = tmp_path / "llama-cli"
    command.write_text(
        f'#!/bin/sh\nprintf \'%s\\n\' "$@" > {tmp_path}/arguments\nfor a; do [ "$a" = -no-cnv ] && exit 1; done\n'
        f"cat {tmp_path}/answer\n"
    )
    command.chmod(0o755)
    (tmp_path / "answer").write_text(continued.text + " [end of text]\n", encoding="utf-8")
    report = tf.validate(demo_file, engine=str(command), threads=1)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    start = model.require_tokenizer().decode(prompt)
    options = ["-n", "128", "--temp", "0", "-t", "1", "--no-display-prompt"]
    assert arguments == ["-m", str(demo_file), "-p", start, *options]
    assert (report.top1_agreement, report.kl, report.tokens_equal, report.passed) == (1, None, None, True)
    (tmp_path / "answer").write_text(" x" * 140, encoding="utf-8")
    assert not tf.validate(demo_file, engine=str(command), threads=1).passed
    command.write_text("#!/bin/sh\necho first >&2\necho it is no good >&2\nexit 7\n")
    with pytest.raises(ValueError, match=r"ended with 7 for .*: it is no good"):
        LlamaCli(demo_file, str(command), threads=1).continue_text("x", [], 1, [])
    command.write_text("#!/bin/sh\necho 'load: Error: wrong type' >&2\necho 'main: error' >&2\nexit 1\n")
    with pytest.raises(ValueError, match=r"ended with 1 for .*: load: Error: wrong type$"):
        LlamaCli(demo_file, str(command), threads=1).continue_text("x", [], 1, [])


def test_files_that_llama_cpp_would_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_file: Path) -> None:
    file = tmp_path / "i2s.gguf"
    export_gguf("demo", file, profile="bitnetcpp", threads=1)
    with pytest.raises(ValueError, match=r"cannot be the reference .*\(refuses\): It does not know the type I2_S"):
        tf.validate(file)
    assert tf.validate(file, "demo", threads=1).passed
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="llama-cpp-python is not installed"):
        open_engine(demo_file, "llama-cpp-python")
    with pytest.raises(ValueError, match="no engine for GGUF files is installed"):
        open_engine(demo_file)


def write_documents(path: Path) -> Path:
    """Three documents, one too short to compare."""
    parts = (validation.DEFAULT_TEXT, "Hi", "\nTom saw a big dog. It was sad, so he ran to it.")
    path.write_text("<|endoftext|>".join(parts), encoding="utf-8")
    return path


def test_everything_is_measured_on_a_named_text(tmp_path: Path) -> None:
    """Perplexity, sizes and shares against the calls and counts that they stand for."""
    data = write_documents(tmp_path / "text.txt")
    report = tf.validate("demo", data=data, threads=1, positions=60)
    model = tf.TernaryModel.demo(threads=1)
    text = data.read_text()
    expected = model.perplexity(text)
    assert (report.perplexity, report.bits_per_byte) == (expected.perplexity, expected.bits_per_byte)
    assert report.text_tokens == expected.tokens
    assert (report.text, report.text_sha256) == (str(data), hashlib.sha256(text.encode()).hexdigest())
    own = tf.TernaryModel.demo(threads=1, activations="float").perplexity(text).perplexity
    assert report.perplexity_ratio == pytest.approx(expected.perplexity / own)
    documents = [model.encode(part.strip()) for part in text.split("<|endoftext|>")]
    seen = [documents[0][:60], documents[2][: max(0, 60 - len(documents[0]))]]
    used = [ids for ids in seen if len(ids) > 8]
    assert report.positions == len(report.kl_by_position) == sum(map(len, used))
    assert report.kl == pytest.approx(np.mean(report.kl_by_position))
    weights = sum(layer.rows * layer.cols for layer in report.layers)
    zeros = sum(layer.rows * layer.cols * layer.sparsity for layer in report.layers)
    assert report.sparsity == pytest.approx(zeros / weights)
    slots = model.architecture.spec.slots()
    assert {slot for slot in slots if model.architecture.is_linear(slot)} <= {layer.name for layer in report.layers}
    assert report.file_bits_per_weight is not None
    assert 2 < report.file_bits_per_weight < 16
    first = tf.validate("demo", data=data, threads=1, max_documents=1)
    assert first.perplexity == pytest.approx(model.perplexity(validation.DEFAULT_TEXT).perplexity)
    both = tf.validate("demo", data=data, threads=1)
    assert both.positions == len(documents[0]) + len(documents[2])


@pytest.mark.parametrize(
    ("threshold", "missed"),
    [
        ({"perplexity": 1.5}, "perplexity is .*, and must be at most 1.5"),
        ({"tokens_per_second": 1e12}, r"tokens_per_second is .*, and must be at least 1e\+12"),
        ({"file_bytes": 10, "sparsity": 0.999}, "file_bytes is .* at most 10; sparsity is .* at least 0.999"),
    ],
)
def test_thresholds_of_other_fields(threshold: dict[str, float], missed: str) -> None:
    report = tf.validate("demo", thresholds=threshold, threads=1)
    assert not report.passed
    assert re.fullmatch(missed, "; ".join(report.missed))
    kept = dict.fromkeys(("kl", "perplexity", "perplexity_ratio", "file_bytes", "peak_rss_bytes"), 1e12)
    assert tf.validate("demo", thresholds=kept, threads=1).passed


def test_reports_as_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = write_documents(tmp_path / "a|b & c.txt")
    names = [tmp_path / f"report.{ending}" for ending in ("json", "md", "html")]
    call = ["validate", "demo", "--data", str(data), "--threshold", "perplexity=1.5"]
    result = CliRunner().invoke(app, [*call, *(part for name in names for part in ("--output", str(name)))])
    assert result.exit_code == 3, result.output
    assert "NO: perplexity is" in result.stdout
    document = json.loads(names[0].read_text())
    assert document["passed"] is False
    assert document["layers"][0].keys() >= {"name", "sparsity", "balance", "bits_per_weight"}
    markdown, page = names[1].read_text(), names[2].read_text()
    assert "a\\|b & c.txt" in markdown
    assert "a|b &amp; c.txt" in page
    for text in (markdown, page):
        assert all(layer["name"] in text for layer in document["layers"])
        assert document["text_sha256"][:16] in text
    assert page.count("<svg") == page.count("</svg>") == 1


def test_reports_that_are_refused(tmp_path: Path) -> None:
    for call, match in (
        (["--output", str(tmp_path / "report.pdf")], r"a report ends with \.json, \.md, \.html"),
        (["--threshold", "perplexity"], "is NAME=VALUE, got"),
        (["--threshold", "kl=nan"], "the threshold of kl is a number, got nan"),
        (["--positions", "8"], "positions is more than 8, got 8"),
    ):
        result = CliRunner().invoke(app, ["validate", "demo", *call])
        assert result.exit_code in (1, 2)
        assert re.search(match, result.output + str(result.exception))
