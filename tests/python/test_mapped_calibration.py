# SPDX-License-Identifier: Apache-2.0
"""Calibration by a bit map: what it writes runs as it says, ternary layers are the ones of plain calibration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_models import LINEARS, llama_config, write_folder, write_tokenizer
from test_calibration import write_text
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge.calibration_text import draw_text
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.cli import app
from ternaryforge.tokenizer import Tokenizer

MAP = {
    "embedding": "int8",
    "layer_modes": [{"query": "int8", "up": "f16", "down": "binary", "gate": "two_plane"}, "ternary"],
}
OPTIONS: dict[str, Any] = {"scale": "group", "group_size": 64, "tokens": 500, "threads": 1}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tokenizer(write_folder(tmp_path / "source", llama_config(max_position_embeddings=64)))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_text(tmp_path / "data.txt")


def test_the_folder_runs_as_the_report_says(tmp_path: Path, source: Path, data: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = tf.calibrate(
        source, tmp_path / "out", data, bit_map=MAP, progress=lambda *step: seen.append(step), **OPTIONS
    )
    assert [step[:2] for step in seen] == [(i, 14) for i in range(1, 15)]
    assert not list(tmp_path.glob(".*"))
    converted = tf.convert(source, tmp_path / "rounded", bit_map=MAP, scale="group", group_size=64)
    assert report.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size == converted.file_bytes
    assert report.bit_map == converted.bit_map
    tokenizer = Tokenizer.from_folder(source)
    assert tokenizer is not None
    held_out = draw_text(data.read_text(), tokenizer, tokens=500, least=1, window=64, seed=0).held_out
    model = tf.TernaryModel.from_pretrained(tmp_path / "out")
    assert model.transformer.activations == report.activations == "float"
    assert model.perplexity(held_out).perplexity == pytest.approx(report.perplexity_after, rel=1e-6)
    rounded = tf.TernaryModel.from_pretrained(tmp_path / "rounded", activations="float")
    assert rounded.perplexity(held_out).perplexity == pytest.approx(report.perplexity_before, rel=1e-6)
    dtypes = {name: Checkpoint.open(tmp_path / "out").info(f"model.layers.0.{name}.weight").dtype for name in LINEARS}
    assert dtypes["self_attn.q_proj"] == "I8"
    assert dtypes["mlp.up_proj"] == "F16"
    assert dtypes["mlp.down_proj"] == "U8"
    errors = {layer.name: layer for layer in report.layers}
    ternary = [layer for name, layer in errors.items() if "layers.1." in name]
    assert np.mean([layer.mse_after for layer in ternary]) < np.mean([layer.mse_before for layer in ternary])
    assert errors["model.layers.0.self_attn.q_proj.weight"].mse_after < 1e-3
    planes = errors["model.layers.0.mlp.gate_proj.weight"]
    assert planes.mse_after <= planes.mse_before < 0.1
    assert Checkpoint.open(tmp_path / "out").info("model.layers.0.mlp.gate_proj.weight").shape == (2, 7, 20)
    binary = errors["model.layers.0.mlp.down_proj.weight"]
    assert binary.zero_fraction == 0
    assert 0 < binary.mse_after < 1


def test_all_ternary_is_plain_calibration(tmp_path: Path, source: Path, data: Path) -> None:
    """Nearly the same trits and scales: the embedding is rounded to 16 bits."""
    exact = {"embedding": "f16", "layer_modes": ["ternary", "ternary"]}
    tf.calibrate(source, tmp_path / "map", data, bit_map=exact, propagation=0.0, residual=0.0, **OPTIONS)
    tf.calibrate(source, tmp_path / "same", data, propagation=0.0, residual=0.0, **OPTIONS)
    folders = [Checkpoint.open(tmp_path / name) for name in ("map", "same")]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (folders[0].read(name) == folders[1].read(name)).mean() > 0.95
    scales = [folder.read_float32(name + "_scale") for folder in folders[:2]]
    np.testing.assert_allclose(scales[0], scales[1], rtol=0.05)


def test_goes_on_where_it_was_stopped(tmp_path: Path, source: Path, data: Path) -> None:
    def stop(_done: int, _total: int, name: str) -> None:
        if name.startswith("layers.1.output"):
            raise KeyboardInterrupt

    whole = tf.calibrate(source, tmp_path / "whole", data, bit_map=MAP, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        tf.calibrate(source, tmp_path / "out", data, bit_map=MAP, progress=stop, **OPTIONS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unfinished run with the same source, text and options"):
        tf.calibrate(source, tmp_path / "out", data, **OPTIONS)
    report = tf.calibrate(source, tmp_path / "out", data, bit_map=MAP, **OPTIONS)
    assert report.resumed_layers == 1
    assert report.layers == whole.layers
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scale": "tensor"}, "goes with scale='row' or 'group'"),
        ({"tune_tokens": 100}, "without planes and tune_tokens"),
        ({"planes": 2}, "without planes and tune_tokens"),
        ({"bit_map": {"layer_modes": ["f16"]}}, "one entry for each of the 2 layers, got 1"),
        ({"bit_map": "no.json"}, "no.json"),
    ],
)
def test_refused(tmp_path: Path, source: Path, data: Path, options: Any, text: str) -> None:
    with pytest.raises((ValueError, OSError), match=text):
        tf.calibrate(source, tmp_path / "out", data, **(OPTIONS | {"bit_map": MAP} | options))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_commands(tmp_path: Path, source: Path, data: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"layer_bit_map": MAP}))
    common = [str(source), "OUT", "--data", str(data), "--bit-map", str(file), "--group-size", "64", "--json"]
    sizes = []
    for verb, more in (("calibrate", ["--tokens", "500"]), ("convert", ["--calibrate", "--scale", "group"])):
        arguments = [verb, *common, *more]
        arguments[2] = str(tmp_path / verb)
        found = CliRunner().invoke(app, arguments)
        assert found.exit_code == 0, found.output
        sizes.append(json.loads(found.stdout)["file_bytes"])
    assert sizes == [(tmp_path / verb / "model.safetensors").stat().st_size for verb in ("calibrate", "convert")]
