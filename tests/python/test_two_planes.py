# SPDX-License-Identifier: Apache-2.0
"""Folders whose layers hold two tied trit planes: made, run, described, and refused where they do not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_models import (
    LINEARS,
    Tensors,
    bitnet_config,
    llama_config,
    make_tensors,
    pack_rows,
    scale_shape,
    shapes,
    write_folder,
    write_tokenizer,
)
from numpy.typing import NDArray
from test_calibration import write_text
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.cli import app
from ternaryforge.inspection import inspect

GROUPS = {"quant_method": "ternaryforge", "scale": "group", "group_size": 64, "activation_bits": None}
IDS = np.arange(1, 30, dtype=np.int32) * 7 % 250


def planes_of(levels: NDArray[np.int8]) -> NDArray[np.uint8]:
    """U8 [2, ceil(rows / 4), cols] by the table in docs/reference/formats.md."""
    padded = np.zeros((-(-levels.shape[0] // 4) * 4, levels.shape[1]), np.int8)
    padded[: len(levels)] = levels
    first = np.sign(padded) * (np.abs(padded) > 1)
    return np.stack([pack_rows(first), pack_rows(padded - 3 * first)])


def levels_of(stored: NDArray[np.uint8], rows: int) -> NDArray[np.int8]:
    trits = [np.concatenate([plane >> shift & 3 for shift in (0, 2, 4, 6)]).astype(np.int8) - 1 for plane in stored]
    return (3 * trits[0] + trits[1])[:rows]  # type: ignore[no-any-return]


def make_planes(config: dict[str, Any], largest: int = 4) -> tuple[Tensors, Tensors]:
    """A folder of two planes with random levels, and the dense one with the same values."""
    random = np.random.default_rng(1)
    dense = make_tensors({key: value for key, value in config.items() if key != "quantization_config"})
    stored = dict(dense)
    for name, shape in shapes(config).items():
        if not any(linear in name for linear in LINEARS):
            continue
        levels = random.integers(-largest, largest + 1, shape).astype(np.int8)
        scales = random.uniform(0.01, 0.05, scale_shape(config["quantization_config"], shape)).astype(np.float32)
        stored[name] = ("U8", planes_of(levels))
        stored[name.replace(".weight", ".weight_scale")] = ("F32", scales)
        dense[name] = ("F32", (levels * np.repeat(scales, 64, axis=1)[:, : shape[1]]).astype(np.float32))
    return stored, dense


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = llama_config(quantization_config=GROUPS, hidden_size=132)
    return write_tokenizer(write_folder(tmp_path / "planes", config, make_planes(config)[0]))


def test_the_model_is_that_of_its_levels(tmp_path: Path, folder: Path) -> None:
    config = llama_config(hidden_size=132)
    dense = write_folder(tmp_path / "dense", config, make_planes(config | {"quantization_config": GROUPS})[1])
    expected = tf.TernaryModel.from_pretrained(dense).logits(IDS)
    model = tf.TernaryModel.from_pretrained(folder)
    assert model.transformer.activations == "float"
    np.testing.assert_allclose(model.logits(IDS), expected, atol=2e-5 * np.abs(expected).max())
    for activations, tolerance in (("int16", 1e-3), ("int8", 0.2)):
        found = tf.TernaryModel.from_pretrained(folder, activations=activations).logits(IDS)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("activations", ["int8", "int16", "float"])
def test_trits_in_the_second_plane_are_trits(tmp_path: Path, activations: Any) -> None:
    """Some layers in one plane, some in two, rows that four do not divide: the same bits as one plane everywhere."""
    config = llama_config(quantization_config=GROUPS, intermediate_size=66)
    two, _ = make_planes(config, largest=1)
    one = dict(two)
    for name, (dtype, array) in two.items():
        if array.ndim == 3:
            one[name] = (dtype, array[1])
    mixed = {name: two[name] if ".0." in name else tensor for name, tensor in one.items()}
    logits = [
        tf.TernaryModel.from_pretrained(write_folder(tmp_path / str(i), config, tensors), activations=activations)
        .logits(IDS)
        for i, tensors in enumerate((one, two, mixed))
    ]  # fmt: skip
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


@pytest.mark.parametrize(("method", "scale"), [("grid", "group"), ("fit", "row"), ("gptq", "group"), ("best", "row")])
def test_calibration(tmp_path: Path, method: Any, scale: Any) -> None:
    source = write_tokenizer(write_folder(tmp_path / "source", llama_config(max_position_embeddings=64)))
    data = write_text(tmp_path / "data.txt")
    options: dict[str, Any] = {"method": method, "scale": scale, "group_size": 64, "tokens": 500}
    one = tf.calibrate(source, tmp_path / "one", data, **options)
    report = tf.calibrate(source, tmp_path / "two", data, planes=2, **options)
    assert (one.planes, report.planes) == (1, 2)
    for single, double in zip(one.layers, report.layers, strict=True):
        assert double.mse_before < 0.35 * single.mse_before
        assert double.mse_after < 0.35 * single.mse_after
    checkpoint = Checkpoint.open(tmp_path / "two")
    for layer in report.layers:
        stored = checkpoint.read(layer.name)
        assert stored.shape == (2, layer.rows // 4, layer.cols)
        levels = levels_of(stored, layer.rows)
        assert np.abs(levels).max() == 4
        assert layer.zero_fraction == pytest.approx((levels == 0).mean())
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "ternaryforge"
    model = tf.TernaryModel.from_pretrained(tmp_path / "two")
    text = write_text(tmp_path / "other.txt", 1).read_text()
    exact = tf.TernaryModel.from_pretrained(source).perplexity(text).nll
    worse = tf.TernaryModel.from_pretrained(tmp_path / "one").perplexity(text).nll
    assert abs(model.perplexity(text).nll - exact) < 0.7 * abs(worse - exact) + 0.02


def test_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    source = write_tokenizer(write_folder(tmp_path / "source", llama_config(max_position_embeddings=64)))
    data = write_text(tmp_path / "data.txt")

    def stop(done: int, total: int, name: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tf.calibrate(source, tmp_path / "out", data, planes=2, tokens=500, progress=stop)
    with pytest.raises(ValueError, match="unfinished run with the same source, text and options"):
        tf.calibrate(source, tmp_path / "out", data, tokens=500)
    report = tf.calibrate(source, tmp_path / "out", data, planes=2, tokens=500)
    assert report.resumed_layers == 1
    tf.calibrate(source, tmp_path / "whole", data, planes=2, tokens=500)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


def test_a_stock_folder_has_one_plane(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"a stock folder holds one plane of trits, got planes=2: use scale='group'"):
        tf.calibrate(folder, tmp_path / "out", tmp_path, planes=2, scale="tensor")
    with pytest.raises(ValueError, match="planes is 1 or 2, got 3"):
        tf.calibrate(folder, tmp_path / "out", tmp_path, planes=3)  # type: ignore[arg-type]


def test_what_is_told(folder: Path) -> None:
    found = inspect(folder)
    assert found.quantization is not None
    assert found.quantization["two_plane_tensors"] == 14
    assert not found.warnings
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert "14 layers of two planes" in " ".join(shown.stdout.split())
    planned = tf.plan(folder, activations="int8", threads=1)
    assert planned.ternary_params == sum(
        int(np.prod(shape)) for name, shape in shapes(llama_config(hidden_size=132)).items() if "proj" in name
    )
    one = folder.parent / "one"
    config = llama_config(quantization_config=GROUPS, hidden_size=132)
    write_tokenizer(write_folder(one, config))
    loading = tf.plan(one, activations="int8", threads=1)
    more = planned.peak_anonymous_bytes - loading.peak_anonymous_bytes
    assert 0.2 * planned.ternary_params < more < 0.4 * planned.ternary_params  # 2 bits a weight, and padding


def test_validation_and_analysis(folder: Path) -> None:
    text, other = write_text(folder.parent / "text.txt"), write_text(folder.parent / "other.txt", 2)
    report = tf.validate(folder, data=text, threads=1, thresholds={})
    linears = [layer for layer in report.layers if "layers." in layer.name]
    assert len(linears) == 14
    assert all(0.03 < layer.sparsity < 0.25 for layer in linears)  # a ninth
    assert all(32 / 64 <= layer.bits_per_weight - 4 <= 32 / 20 for layer in linears)
    assert report.top1_agreement == 1
    analysed = tf.analyze(folder, other, modes=["int8"], scale="row", tokens=100, threads=1)
    assert all(abs(layer.effects[0].nll_rise) < 0.05 for layer in analysed.layers)


@pytest.mark.parametrize(
    ("profile", "error", "match"),
    [
        ("upstream", tf.FormatError, "two tied trit planes, which no GGUF type can"),
        ("onebit", ValueError, r"two tied trit planes, which a \.1bit file cannot"),
    ],
)
def test_other_files_cannot_hold_it(tmp_path: Path, folder: Path, profile: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        tf.export(
            folder, tmp_path / "out.gguf", profile=profile, tokenizer_pre="default" if profile == "upstream" else None
        )
    assert not list(tmp_path.glob("*.gguf*"))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = llama_config(quantization_config=GROUPS)
    name = "model.layers.0.mlp.up_proj.weight"

    def refused(match: str, array: NDArray[np.uint8] | None = None, config: dict[str, Any] = config) -> None:
        tensors, _ = make_planes(config | {"quantization_config": GROUPS})
        if array is not None:
            tensors[name] = ("U8", array)
        with pytest.raises(tf.FormatError, match=match):
            tf.TernaryModel.from_pretrained(write_folder(tmp_path / "bad", config, tensors))

    good = make_planes(config)[0][name][1]
    damaged = good.copy()
    damaged[1, 3, 2] |= 0x30
    refused(rf"'{name}' holds the code 3, which is no trit", damaged)
    refused(r"shape \[3, 7, 20\], expected \[2, 7, 20\]", np.concatenate([good, good[:1]]))
    refused(r"shape \[2, 6, 20\], expected \[2, 7, 20\]", good[:, :6])
    refused(r"shape \[2, 7, 19\], expected \[2, 7, 20\]", good[:, :, :19])
    stock = bitnet_config()
    tensors = make_tensors(stock)
    tensors[name] = ("U8", np.stack([tensors[name][1]] * 2))
    with pytest.raises(tf.FormatError, match=r"shape \[2, 7, 24\], expected \[7, 24\]"):
        tf.TernaryModel.from_pretrained(write_folder(tmp_path / "stock", stock, tensors))


def test_tuning_keeps_the_levels(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = write_tokenizer(write_folder(tmp_path / "source", llama_config(max_position_embeddings=64)))
    data = write_text(tmp_path / "data.txt")
    options: dict[str, Any] = {"planes": 2, "group_size": 64, "tokens": 400, "threads": 1}
    tf.calibrate(source, tmp_path / "plain", data, **options)
    report = tf.calibrate(source, tmp_path / "tuned", data, **options, tune_tokens=2000)
    plain, tuned = (Checkpoint.open(tmp_path / name) for name in ("plain", "tuned"))
    for layer in report.layers:
        assert bytes(plain.raw(layer.name)) == bytes(tuned.raw(layer.name))
    assert report.perplexity_untuned is not None
    assert report.perplexity_after < report.perplexity_untuned


@pytest.mark.shared
def test_stories260k(shared: Path, tmp_path: Path) -> None:
    """A tenth of the usual tokens: within a third of full precision, where one plane is at six times."""
    report = tf.calibrate(
        shared / "data" / "stories260k" / "hf", tmp_path / "out", shared / "data" / "tinystories" / "train.txt",
        planes=2, group_size=64, tokens=3000, threads=1,
    )  # fmt: skip
    assert report.perplexity_source < report.perplexity_after < 1.35 * report.perplexity_source
    assert report.perplexity_after < report.perplexity_before
