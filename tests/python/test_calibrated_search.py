# SPDX-License-Identifier: Apache-2.0
"""`search` and `analyze` of calibrated layers against brute force over folders that `calibrate` writes."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_models import uneven_model, write_folder, write_tokenizer
from test_calibration import write_text
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge import bit_map_search, map_calibrating
from ternaryforge.bit_map_search import measured_file, score, search
from ternaryforge.cli import app

MODES = ("int8", "ternary", "binary")
OPTIONS: dict[str, Any] = {"scale": "row", "threads": 1}
TOKENS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with layers that differ in how much they say, exact in 16 bits; a text to calibrate on and another."""
    path = tmp_path_factory.mktemp("calibrated_search")
    config, tensors = uneven_model()
    for name, (_, values) in tensors.items():
        tensors[name] = "F32", values.astype(np.float16).astype(np.float32)
    write_tokenizer(write_folder(path / "source", config, tensors))
    write_text(path / "train.txt")
    write_text(path / "data.txt", seed=1, documents=4)
    return path


@pytest.fixture(scope="module")
def brute_force(folder: Path) -> dict[tuple[str, ...], tuple[float, int]]:
    """Perplexity and size of every map, each calibrated, written, loaded and evaluated."""
    found = {}
    for modes in itertools.product(MODES, repeat=3):
        out = folder / "-".join(modes)
        bit_map = {"layer_modes": modes, "lm_head": "f16"}
        tf.calibrate(folder / "source", out, folder / "train.txt", bit_map=bit_map, tokens=TOKENS, **OPTIONS)
        model = tf.TernaryModel.from_pretrained(out, threads=1)
        perplexity = model.perplexity((folder / "data.txt").read_text()).perplexity
        found[modes] = perplexity, (out / "model.safetensors").stat().st_size
    return found


def run(folder: Path, **options: Any) -> tf.SearchResult:
    given = {"modes": MODES, "calibration": folder / "train.txt", "calibration_tokens": TOKENS, "tokens": None}
    return search(folder / "source", folder / "data.txt", **(given | OPTIONS | options))


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
@pytest.mark.parametrize("exhaustive", [True, False])
def test_equals_brute_force_and_keeps_its_budget_to_the_byte(
    folder: Path, brute_force: Any, monkeypatch: pytest.MonkeyPatch, exhaustive: bool, kept_bytes: int
) -> None:
    """Whether layers of other maps are kept or calibrated again."""
    monkeypatch.setattr(map_calibrating, "_KEPT_BYTES", kept_bytes)
    if not exhaustive:
        monkeypatch.setattr(bit_map_search, "_MOST_EXHAUSTIVE", 0)
    sizes = sorted({size for _, size in brute_force.values()})
    output = folder / f"map-{exhaustive}-{kept_bytes}.json"
    for budget in (sizes[0], sizes[len(sizes) // 2], sizes[len(sizes) // 2] - 1, sizes[-1]):
        result = run(folder, max_size_mb=budget / 1e6, output=output)
        perplexity, size = brute_force[tuple(result.layer_bit_map["layer_modes"])]
        assert result.perplexity == pytest.approx(perplexity, rel=1e-6)
        assert result.size_bytes == size <= budget
        assert result.exhaustive == exhaustive
        assert result.perplexity == pytest.approx(
            min(perplexity for perplexity, size in brute_force.values() if size <= budget), rel=1e-6
        )
    for found in result.measured:
        assert (pytest.approx(found.perplexity, rel=1e-6), found.size_bytes) == brute_force[found.layer_modes]
    ceiling = sorted(perplexity for perplexity, _ in brute_force.values())[9] * (1 + 1e-6)
    smallest = run(folder, max_perplexity=ceiling, output=output)
    assert smallest.size_bytes == min(size for perplexity, size in brute_force.values() if perplexity <= ceiling)
    assert smallest.perplexity <= ceiling


def test_calibration_changes_the_choice_not_the_size(folder: Path, brute_force: Any) -> None:
    rounded = run(folder, max_size_mb=1, calibration=None)
    calibrated = run(folder, max_size_mb=1)
    sizes = [{found.layer_modes: found.size_bytes for found in result.measured} for result in (rounded, calibrated)]
    assert sizes[0] == sizes[1]
    losses = [{found.layer_modes: found.perplexity for found in result.measured} for result in (rounded, calibrated)]
    assert np.mean([losses[1][modes] != losses[0][modes] for modes in losses[0]]) > 0.9


def test_every_linear_layer_by_itself_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "map.json"
    options: dict[str, Any] = {"max_size_mb": 0.0375, "modes": ["int8", "ternary"], "by": "linear", "output": output}

    def stop(done: int, _total: int, _what: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, progress=stop, **options)
    kept = len(json.loads(measured_file(output).read_text())["nll"])
    assert kept > 0
    assert not output.exists()
    result = run(folder, **options)
    assert result.resumed == kept < len(result.measured)
    report = tf.calibrate(
        folder / "source", tmp_path / "out", folder / "train.txt", bit_map=output, tokens=TOKENS,
        evaluation=folder / "data.txt", **OPTIONS,
    )  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == report.file_bytes == result.size_bytes <= 37_500
    assert report.perplexity_after == pytest.approx(result.perplexity, rel=1e-6)
    # Another draw, and rounding, are other measurements.
    assert run(folder, **(options | {"seed": 1, "tokens": 5, "modes": ["int8", "binary"], "by": "layer"})).resumed == 0


def test_score_is_what_calibrate_gives(folder: Path, brute_force: Any) -> None:
    modes = ("ternary", "binary", "int8")
    found = score(
        folder / "source", folder / "data.txt", {"layer_modes": modes, "lm_head": "f16"}, tokens=None,
        calibration=folder / "train.txt", calibration_tokens=TOKENS, **OPTIONS,
    )  # fmt: skip
    assert (pytest.approx(found.perplexity, rel=1e-6), found.size_bytes) == brute_force[modes]


def test_one_text_for_both_is_divided(folder: Path) -> None:
    """Measured on what is never drawn, as `calibrate` does; the start of a text that is drawn from is refused."""
    both = search(
        folder / "source", folder / "train.txt", max_size_mb=1, modes=MODES, calibration=folder / "train.txt",
        calibration_tokens=TOKENS, tokens=None, **OPTIONS,
    )  # fmt: skip
    report = tf.calibrate(
        folder / "source", folder / "both", folder / "train.txt", bit_map=both.bit_map, tokens=TOKENS, **OPTIONS
    )
    assert report.perplexity_after == pytest.approx(both.perplexity, rel=1e-6)
    (folder / "start.txt").write_text((folder / "train.txt").read_text()[:300])
    with pytest.raises(ValueError, match="must share no document"):
        score(folder / "source", folder / "start.txt", both.bit_map, calibration=folder / "train.txt", **OPTIONS)


def test_layers_alone(folder: Path) -> None:
    """A layer alone, all others exact, against its folder; a linear layer alone is not the same as rounded."""
    options: dict[str, Any] = {"calibration": folder / "train.txt", "calibration_tokens": TOKENS, **OPTIONS}
    report = tf.analyze(folder / "source", folder / "data.txt", modes=["ternary"], **options)
    rounded = tf.analyze(folder / "source", folder / "data.txt", modes=["ternary"], **OPTIONS)
    assert report.nll == rounded.nll
    for i, layer in enumerate(report.layers):
        modes = ["f16"] * 3
        modes[i] = "ternary"
        bit_map = {"layer_modes": modes, "lm_head": "f16"}
        alone = score(
            folder / "source", folder / "data.txt", bit_map, tokens=None, calibration=folder / "train.txt",
            calibration_tokens=TOKENS, **OPTIONS,
        )  # fmt: skip
        assert layer.effects[0].nll_rise == pytest.approx(np.log(alone.perplexity) - report.nll, abs=1e-5)
        assert layer.effects[0].nll_rise != rounded.layers[i].effects[0].nll_rise
        assert layer.zero_fraction == rounded.layers[i].zero_fraction
    linears = tf.analyze(folder / "source", folder / "data.txt", modes=["binary"], by="linear", **options)
    assert len(linears.layers) == 21
    assert linears.calibration == str(folder / "train.txt")


def test_commands(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "map.json"
    common = [str(folder / "source"), "--data", str(folder / "data.txt"), "--scale", "row", "--json"]
    common += ["--calibration", str(folder / "train.txt"), "--calibration-tokens", str(TOKENS), "--seed", "3"]
    arguments = ["search", *common, "--modes", "int8,binary", "--max-size-mb", "0.04", "--output", str(output)]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert (result["calibration_tokens"], result["seed"]) == (TOKENS, 3)
    scored = CliRunner().invoke(app, ["search", *common, "--score", str(output)])
    assert json.loads(scored.stdout)["perplexity"] == pytest.approx(json.loads(output.read_text())["perplexity"])
    analyzed = CliRunner().invoke(app, ["analyze", *common, "--modes", "binary"])
    assert json.loads(analyzed.stdout)["calibration"] == str(folder / "train.txt")


def test_refusals(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            run(folder, **({"max_size_mb": 1} | options))

    refused(r"\[search\] calibration goes with scale='row' or 'group', got scale='tensor'", scale="tensor")
    refused("calibration_tokens is at least 1, got 0", calibration_tokens=0)
    short = write_text(tmp_path / "short.txt", seed=5, documents=2)
    refused("at least 56 tokens are needed", calibration=short)
    refused(r"no map has at most 100 bytes", max_size_mb=0.0001)
    with pytest.raises(ValueError, match=r"\[analyze\] calibration goes with"):
        tf.analyze(folder / "source", folder / "data.txt", scale="tensor", calibration=short)
    tf.convert(folder / "source", tmp_path / "ternary", scale="row")
    with pytest.raises(tf.FormatError, match="quantised already"):
        tf.analyze(tmp_path / "ternary", folder / "data.txt", scale="row", calibration=folder / "train.txt")
