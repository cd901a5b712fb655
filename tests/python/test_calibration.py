# SPDX-License-Identifier: Apache-2.0
"""Calibration from folder to folder: what it is worth, that it goes on where it was stopped, and what it refuses."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_models import llama_config, make_tensors, write_folder, write_tokenizer
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge import _core
from ternaryforge.calibration_blocks import STAGES, BlockWalk, Targets
from ternaryforge.calibration_linear import METHODS, LinearOptions, quantize_linear
from ternaryforge.calibration_text import draw_text
from ternaryforge.cli import app
from ternaryforge.tokenizer import Tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog"]


def write_text(path: Path, seed: int = 0, documents: int = 40) -> Path:
    random = np.random.default_rng(seed)
    path.write_text("\n<|endoftext|>\n".join(" ".join(random.choice(WORDS, 12)) for _ in range(documents)))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tokenizer(write_folder(tmp_path / "source", llama_config(max_position_embeddings=64)))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_text(tmp_path / "data.txt")


def test_companions_keep_their_places(tmp_path: Path, source: Path, data: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/rag.jinja").write_text("{{ documents }}")
    tf.calibrate(source, tmp_path / "out", data, method="grid", group_size=64, tokens=500)
    assert (tmp_path / "out/additional_chat_templates/rag.jinja").read_text() == "{{ documents }}"
    assert not (tmp_path / "out/rag.jinja").exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_runs_as_the_report_says(tmp_path: Path, source: Path, data: Path, method: Any) -> None:
    seen: list[tuple[int, int, str]] = []
    report = tf.calibrate(
        source, tmp_path / "out", data, method=method, group_size=64, tokens=500,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert report.perplexity_source > 0
    assert [step[:2] for step in seen] == [(i, 14) for i in range(1, 15)]
    assert report.tensors == len(report.layers) == 14
    assert not list(tmp_path.glob(".*"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "ternaryforge", "scale": "group", "group_size": 64, "activation_bits": None,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    assert report.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    held_out = draw_text(
        data.read_text(),
        Tokenizer.from_folder(source),
        tokens=500,
        least=1,
        window=64,
        seed=0,  # type: ignore[arg-type]
    ).held_out
    model = tf.TernaryModel.from_pretrained(tmp_path / "out")
    assert model.perplexity(held_out).perplexity == pytest.approx(report.perplexity_after, rel=1e-6)
    assert model.transformer.activations == "float"


@pytest.mark.parametrize("scale", ["tensor", "row"])
def test_other_scales(tmp_path: Path, source: Path, data: Path, scale: Any) -> None:
    report = tf.calibrate(source, tmp_path / "out", data, scale=scale, tokens=500)
    model = tf.TernaryModel.from_pretrained(tmp_path / "out")
    assert model.transformer.activations == report.activations == {"tensor": "int8", "row": "float"}[scale]
    assert np.mean([layer.mse_after for layer in report.layers]) < np.mean(
        [layer.mse_before for layer in report.layers]
    )


def test_goes_on_where_it_was_stopped(tmp_path: Path, source: Path, data: Path) -> None:
    """After Ctrl-C in the second block there is no result, the first block is kept, and the end is the same."""

    def stop(done: int, total: int, name: str) -> None:
        assert total == 14
        if name.startswith("layers.1.output"):
            signal.raise_signal(signal.SIGINT)

    whole = tf.calibrate(source, tmp_path / "whole", data, tokens=500)
    with pytest.raises(KeyboardInterrupt):
        tf.calibrate(source, tmp_path / "out", data, tokens=500, progress=stop)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (tmp_path / ".out.calibration").iterdir()) == ["key.json", "layer-00000.npz"]
    with pytest.raises(ValueError, match="unfinished run with the same source, text and options"):
        tf.calibrate(source, tmp_path / "out", data, tokens=500, method="fit")
    report = tf.calibrate(source, tmp_path / "out", data, tokens=500)
    assert report.resumed_layers == 1
    assert report.layers == whole.layers
    assert not (tmp_path / ".out.calibration").exists()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_threads_and_draws(tmp_path: Path, source: Path, data: Path) -> None:
    outs = {}
    for name, options in {"a": {"threads": 1}, "b": {"threads": 3}, "c": {"seed": 1}}.items():
        report = tf.calibrate(source, tmp_path / name, data, tokens=300, **options)  # type: ignore[arg-type]
        outs[name] = (tmp_path / name / "model.safetensors").read_bytes()
        assert report.calibration_tokens >= 300
    assert outs["a"] == outs["b"] != outs["c"]


def test_targets_are_the_outputs_of_full_precision(source: Path) -> None:
    """With all of the input's error made up for, the fit is the regression of the exact outputs on the inputs seen."""
    random = np.random.default_rng(0)
    exact = random.normal(size=(400, 64))
    seen = (exact + 0.3 * random.normal(size=exact.shape)).astype(np.float32)
    weights = random.normal(size=(8, 64)).astype(np.float32)
    wide = seen.astype(np.float64)
    moments = wide.T @ wide / 400
    lacking = (weights @ (exact - wide).T) @ wide / 400
    damped = moments + 1e-9 * np.diag(moments).mean() * np.eye(64)
    regression = np.linalg.lstsq(wide, exact @ weights.T, rcond=None)[0].T
    np.testing.assert_allclose(weights + np.linalg.solve(damped, lacking.T).T, regression, atol=1e-5)
    options = LinearOptions("best", "group", 64, 1e-9, 4, 1)
    found = quantize_linear(weights, moments, lacking, options)
    values = found.trits * found.scales.astype(np.float64)
    error = ((regression - values) @ moments * (regression - values)).sum() / (regression @ moments * regression).sum()
    assert found.error_after == pytest.approx(error, rel=1e-6)
    assert found.error_after < found.error_before


def test_moments_of_a_walk(source: Path) -> None:
    """Against NumPy: means over all tokens of what both models see, and of what the residual streams differ by."""
    from ternaryforge.checkpoint import Checkpoint
    from ternaryforge.families import read_architecture
    from ternaryforge.weights import load_weights

    checkpoint = Checkpoint.open(source)
    architecture = read_architecture(checkpoint.config, where="config.json")
    made = [
        _core.model.Transformer(
            architecture.spec, load_weights(checkpoint, architecture), activations="float", threads=1
        )
        for _ in range(2)
    ]
    random = np.random.default_rng(1)
    changed = {
        name: random.normal(size=architecture.spec.slots()[f"layers.0.{name}"]).astype(np.float32) / np.float32(5)
        for name in ("value", "output")
    }
    for name, values in changed.items():
        made[1].replace_linear(f"layers.0.{name}", _core.formats.PackedTensor("f32", *values.shape, values))
    sequences = [random.integers(0, 250, size).astype(np.int32) for size in (20, 33)]
    walk = BlockWalk(made[0], made[1], sequences, 1)
    exact_output = checkpoint.read_float32(architecture.tensor_names["layers.0.output"])
    for tap, _ in STAGES:
        moments, shift, stream = walk.moments(tap, Targets(1.0, 1.0), (exact_output, changed["output"]))
        seen = [[model.forward_block(0, model.embed(ids), taps=(tap,))[1][tap] for ids in sequences] for model in made]
        exact, x = (np.concatenate(parts).astype(np.float64) for parts in seen)
        np.testing.assert_allclose(moments, x.T @ x / 53, atol=1e-9)
        assert shift is not None
        np.testing.assert_allclose(shift, (exact - x).T @ x / 53, atol=1e-6)
        assert (stream is not None) == (tap in ("output", "down"))
    before = [[model.embed(ids) for ids in sequences] for model in made]
    after = [[model.forward_block(0, model.embed(ids))[0] for ids in sequences] for model in made]
    walk.advance()
    assert np.array_equal(before[0][0], before[1][0])
    _, _, stream = walk.moments("output", Targets(1.0, 1.0), None) if walk.layer == 1 else (None, None, None)
    x = np.concatenate([made[1].forward_block(1, h, taps=("output",))[1]["output"] for h in after[1]])
    error = np.concatenate(after[0]) - np.concatenate(after[1])
    assert stream is not None
    np.testing.assert_allclose(stream, error.astype(np.float64).T @ x / 53, atol=1e-5)


def test_dead_channels_are_told(tmp_path: Path, data: Path) -> None:
    config = llama_config(max_position_embeddings=64)
    tensors = make_tensors(config)
    tensors["model.layers.0.input_layernorm.weight"][1][3:5] = 0
    source = write_tokenizer(write_folder(tmp_path / "source", config, tensors))
    report = tf.calibrate(source, tmp_path / "out", data, tokens=500)
    assert [layer.dead_channels for layer in report.layers[:4]] == [2, 2, 2, 0]
    assert "3 linear layers" in report.warnings[0]
    tensors["model.layers.0.input_layernorm.weight"][1][:] = 0
    silent = write_tokenizer(write_folder(tmp_path / "silent", config, tensors))
    with pytest.raises(ValueError, match=r"layers\.0\.query.*must not be zero for the whole calibration text"):
        tf.calibrate(silent, tmp_path / "none", data, tokens=500)
    assert not (tmp_path / "none").exists()


def test_activations_that_are_not_finite(tmp_path: Path, data: Path) -> None:
    config = llama_config(max_position_embeddings=64)
    tensors = make_tensors(config)
    tensors["model.layers.1.post_attention_layernorm.weight"][1][:] *= np.float32(1e30)
    source = write_tokenizer(write_folder(tmp_path / "source", config, tensors))
    with pytest.raises(ValueError, match=r"layers\.1\.down'.*activations must be finite"):
        tf.calibrate(source, tmp_path / "out", data, tokens=500, method="gptq")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (tmp_path / ".out.calibration").iterdir()) == ["key.json", "layer-00000.npz"]


def test_refusals(tmp_path: Path, source: Path, data: Path) -> None:
    def refused(match: str, data: Path = data, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            tf.calibrate(options.pop("source", source), tmp_path / "out", data, **options)
        assert not (tmp_path / "out").exists()

    refused("method is one of grid, fit, gptq, best, got 'awq'", method="awq")
    refused("multiple of 64, got 100", group_size=100)
    refused("propagation lies between 0 and 1, got 2", propagation=2)
    refused("descent_rounds", descent_rounds=-1)
    refused("tokens is at least 1", tokens=0)
    short = write_text(tmp_path / "short.txt", documents=2)
    refused("at least 56 tokens are needed", data=short)
    copy = tmp_path / "copy.txt"
    copy.write_bytes(data.read_bytes())
    refused("same SHA-256", evaluation=copy)
    copy.write_text(write_text(tmp_path / "other.txt", 1).read_text() + "<|endoftext|>" + data.read_text()[:200])
    documents = data.read_text().split("<|endoftext|>")
    copy.write_text("<|endoftext|>".join(documents[:3]))
    refused("share no document, got 3", evaluation=copy)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 " * 99)
    refused("not UTF-8", data=latin)
    refused("no such file|No such file", data=tmp_path / "none.txt", error=FileNotFoundError)
    bare = write_folder(tmp_path / "bare", llama_config())
    refused("must hold a tokenizer", source=bare)
    ternary = tmp_path / "ternary"
    tf.convert(source, ternary, scale="row")
    refused("quantised already", source=ternary, error=tf.FormatError)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="something already"):
        tf.calibrate(source, tmp_path / "full", data)


def test_command_line(tmp_path: Path, source: Path, data: Path) -> None:
    runner = CliRunner()
    call = ["calibrate", str(source), str(tmp_path / "out"), "--data", str(data), "--tokens", "500", "--json"]
    done = runner.invoke(app, [*call, "--method", "gptq", "--scale", "row"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["layers"][0].keys() >= {"name", "mse_before", "mse_after"}
    assert document["perplexity_before"] > 0
    both = ["convert", str(source), str(tmp_path / "two"), "--calibrate"]
    assert runner.invoke(app, both).exit_code == 2
    done = runner.invoke(app, [*both, "--data", str(data)])
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.stdout
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitnet"


@pytest.mark.shared
def test_stories260k(shared: Path, tmp_path: Path) -> None:
    """A tenth of the usual tokens: far better than rounding, and better than GPTQ alone."""
    found = {}
    for method in ("gptq", "best"):
        report = tf.calibrate(
            shared / "data" / "stories260k" / "hf", tmp_path / method, shared / "data" / "tinystories" / "train.txt",
            method=method, group_size=64, tokens=3000, threads=1,
        )  # type: ignore[call-overload] # fmt: skip
        found[method] = report.perplexity_after
        assert report.perplexity_source < 4
        assert report.perplexity_before > 200
    assert found["best"] < 32
    assert found["best"] < 0.6 * found["gptq"]
