# SPDX-License-Identifier: Apache-2.0
"""`analyze`: sensitivities against folders written with that one change, zeros and scales against NumPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_models import llama_config, make_tensors, write_folder, write_tokenizer
from numpy_model import NumpyModel
from test_bit_maps import decode
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge.cli import app

TEXT = "The cat sat on the mat.\n<|endoftext|>\nA dog saw the cat, and the cat ran off.\n<|endoftext|>\nThe end.\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tokenizer(write_folder(tmp_path / "source", llama_config()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data.txt").write_text(TEXT)
    return tmp_path / "data.txt"


def test_a_layer_alone_in_a_mode(tmp_path: Path, source: Path, data: Path) -> None:
    """What a folder with just that layer changed gives by `evaluate`, and NumPy's divergence of its predictions."""
    seen: list[tuple[int, int, str]] = []
    report = tf.analyze(
        source, data, modes=["int8", "binary"], scale="row", threads=1, progress=lambda *step: seen.append(step)
    )
    assert [layer.name for layer in report.layers] == ["layers.0", "layers.1"]
    assert seen == [(1, 4, "layers.0"), (2, 4, "layers.0"), (3, 4, "layers.1"), (4, 4, "layers.1")]
    plain = tf.TernaryModel.from_pretrained(source)
    exact = plain.perplexity(TEXT)
    assert report.nll == pytest.approx(exact.nll, rel=1e-6)
    assert report.tokens == exact.tokens
    # f16 of the other layers is what the source is made of here, or nearly.
    tf.convert(source, tmp_path / "out", bit_map={"layer_modes": ["f16", "binary"], "lm_head": "f16"}, scale="row")
    changed = tf.TernaryModel.from_pretrained(tmp_path / "out", activations="float")
    effect = report.layers[1].effects[1]
    assert effect.mode == "binary"
    assert effect.nll_rise == pytest.approx(changed.perplexity(TEXT).nll - exact.nll, abs=2e-3)
    config = json.loads((source / "config.json").read_text())
    ours, theirs = NumpyModel(config, make_tensors(config)), NumpyModel(config, decode(tmp_path / "out"))
    divergence, positions = 0.0, 0
    for document in TEXT.split("<|endoftext|>"):
        ids = plain.encode(document.strip())
        p, q = ours.log_probs(ids), theirs.log_probs(ids)
        divergence += float((np.exp(p) * (p - q)).sum())
        positions += len(ids)
    assert effect.kl == pytest.approx(divergence / positions, rel=0.02)
    assert effect.kl > 0 < report.layers[0].effects[0].kl


def test_zeros_and_scales(source: Path, data: Path) -> None:
    """Of a dense layer by itself: those of the trits that `quantize_weights` gives."""
    report = tf.analyze(source, data, by="linear", modes=["ternary"], scale="row", tokens=5, threads=1)
    layer = next(layer for layer in report.layers if layer.name == "layers.1.down")
    weights = make_tensors(llama_config())["model.layers.1.mlp.down_proj.weight"][1]
    trits, scales = tf.quantize_weights(weights, scale="row")
    assert layer.weights == weights.size
    assert layer.zero_fraction == pytest.approx((trits == 0).mean())
    assert layer.balance == pytest.approx((trits > 0).sum() / (trits != 0).sum())
    assert (layer.scale_min, layer.scale_max) == (scales.min(), scales.max())
    assert layer.scale_mean == pytest.approx(scales.mean())
    error = np.square(weights - trits * scales[:, None]).sum() / np.square(weights).sum()
    assert layer.effects[0].relative_error == pytest.approx(error, rel=1e-5)
    assert layer.effects[0].bits_per_weight == 8 * (trits.size / 4 + 2 * len(scales)) / trits.size
    assert not layer.ternary


def test_a_ternary_model(tmp_path: Path, source: Path, data: Path) -> None:
    """Its own trits cost nothing, and the model is as before after every measurement."""
    tf.convert(source, tmp_path / "ternary", scale="row")
    report = tf.analyze(tmp_path / "ternary", data, modes=["binary", "ternary"], scale="row", threads=1)
    assert all(layer.ternary for layer in report.layers)
    assert [layer.effects[1].nll_rise for layer in report.layers] == pytest.approx([0, 0], abs=1e-6)
    assert all(abs(layer.effects[0].nll_rise) > 1e-4 for layer in report.layers)


def test_report(tmp_path: Path, source: Path, data: Path) -> None:
    arguments = ["analyze", str(source), "--data", str(data), "--tokens", "5", "--plot", str(tmp_path / "a.svg")]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    assert [layer["name"] for layer in json.loads(found.stdout)["layers"]] == ["layers.0", "layers.1"]
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert "layers.1" in CliRunner().invoke(app, arguments).stdout
    report = tf.analyze(source, data, modes=["int8"], tokens=5)
    assert report._repr_html_().count("<tr>") == 3
    report.save(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"modes": []}, "modes are some of"),
        ({"modes": ["int4"]}, "modes are some of .* got"),
        ({"by": "row"}, "by is 'layer' or 'linear'"),
        ({"scale": "column"}, "scale is one of"),
    ],
)
def test_wrong_options(source: Path, data: Path, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        tf.analyze(source, data, **options)


def test_empty_text(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty.txt").write_text("<|endoftext|>\n")
    with pytest.raises(ValueError, match="nothing to score"):
        tf.analyze(source, tmp_path / "empty.txt")
