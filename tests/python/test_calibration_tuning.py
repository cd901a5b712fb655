# SPDX-License-Identifier: Apache-2.0
"""Calibration that ends in tuning: what the folder holds, that it goes on after a stop, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_models import llama_config, make_tensors, write_folder, write_tokenizer
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.cli import app

pytest.importorskip("torch")
pytest.importorskip("transformers")

WORDS = ["one", "two", "three", "four", "five", "six", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog"]
OPTIONS: dict[str, Any] = {"group_size": 64, "tokens": 400, "tune_tokens": 3000, "threads": 1}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = llama_config(max_position_embeddings=64)
    tensors = make_tensors(config, dtype="BF16")
    return write_tokenizer(write_folder(tmp_path / "source", config, tensors))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path / "data.txt"
    path.write_text("\n<|endoftext|>\n".join(" ".join(random.choice(WORDS, 12)) for _ in range(60)))
    return path


def test_the_folder_holds_what_was_tuned(tmp_path: Path, source: Path, data: Path) -> None:
    """Trits, embedding and head are those of plain calibration; scales are exact in 16 bits, gains are in 32."""
    plain = tf.calibrate(source, tmp_path / "plain", data, **OPTIONS | {"tune_tokens": 0})
    seen: list[tuple[int, int, str]] = []
    report = tf.calibrate(source, tmp_path / "out", data, **OPTIONS, progress=lambda *step: seen.append(step))
    assert (plain.tune_tokens, plain.perplexity_untuned, report.tune_tokens) == (0, None, 3000)
    assert report.perplexity_untuned == plain.perplexity_after
    assert report.perplexity_after < report.perplexity_untuned
    assert seen[-1][:2] == (3000, 3000)
    assert "KL" in seen[-1][2]
    assert not list(tmp_path.glob(".*"))
    before, after = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(tmp_path / "out")
    assert before.config == after.config
    for name in after:
        same = bytes(before.raw(name)) == bytes(after.raw(name))
        assert same == (not name.endswith(("_scale", "norm.weight")))
        if name.endswith("_scale"):
            scales = after.read_float32(name)
            assert np.array_equal(scales, scales.astype(np.float16))
            np.testing.assert_allclose(scales, before.read_float32(name), rtol=1)
        if name.endswith("norm.weight"):
            assert (before.info(name).dtype, after.info(name).dtype) == ("BF16", "F32")
    model = tf.TernaryModel.from_pretrained(tmp_path / "out")
    assert model.transformer.activations == "float"
    assert report.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_one_scale_for_all_writes_a_stock_folder(tmp_path: Path, source: Path, data: Path) -> None:
    report = tf.calibrate(source, tmp_path / "out", data, **OPTIONS, scale="tensor")
    assert report.activations == "int8"
    assert report.perplexity_untuned is not None
    assert report.perplexity_after < report.perplexity_untuned
    fields = Checkpoint.open(tmp_path / "out").config["quantization_config"]
    assert fields["quant_method"] == "bitnet"
    model = tf.TernaryModel.from_pretrained(tmp_path / "out")
    text = "the cat sat on a mat"
    ids = model.encode(text)
    tuned = model.perplexity(text).perplexity
    plain = tf.calibrate(source, tmp_path / "plain", data, **OPTIONS | {"tune_tokens": 0}, scale="tensor")
    assert plain.perplexity_after == report.perplexity_untuned
    assert len(ids) > 10
    assert tuned != tf.TernaryModel.from_pretrained(tmp_path / "plain").perplexity(text).perplexity


def test_goes_on_where_it_was_stopped(tmp_path: Path, source: Path, data: Path) -> None:
    options = OPTIONS | {"tune_tokens": 12_000}
    tf.calibrate(source, tmp_path / "whole", data, **options)
    calls: list[tuple[int, int]] = []

    def stop(done: int, total: int, _name: str) -> None:
        calls.append((done, total))
        if total == 12_000 and done > 10_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tf.calibrate(source, tmp_path / "out", data, **options, progress=stop)
    assert not (tmp_path / "out").exists()
    folder = tmp_path / ".out.calibration"
    assert sorted(path.name for path in folder.iterdir()) == [
        "key.json", "layer-00000.npz", "layer-00001.npz", "tuning.npz",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="unfinished run"):
        tf.calibrate(source, tmp_path / "out", data, **OPTIONS)
    before = len(calls)
    report = tf.calibrate(source, tmp_path / "out", data, **options, progress=lambda *step: calls.append(step[:2]))
    assert report.resumed_layers == 2
    assert len(calls) - before < before / 2
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_command_line(tmp_path: Path, source: Path, data: Path) -> None:
    call = ["calibrate", str(source), str(tmp_path / "out"), "--data", str(data), "--tokens", "400"]
    done = CliRunner().invoke(app, [*call, "--tune-tokens", "500", "--scale", "row"])
    assert done.exit_code == 0, done.output
    assert "before tuning" in done.stdout


def test_refusals(tmp_path: Path, source: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tune_tokens is not negative, got -1"):
        tf.calibrate(source, tmp_path / "out", data, tune_tokens=-1)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ImportError, match=r"tuning needs torch and transformers: pip install 'ternaryforge\[hf\]'"):
        tf.calibrate(source, tmp_path / "out", data, **OPTIONS)
    assert sorted(json.loads((source / "config.json").read_text())) == sorted(llama_config())
