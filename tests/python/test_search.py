# SPDX-License-Identifier: Apache-2.0
"""`search` against brute force over written folders; its budget against the bytes on the disk; going on; refusals."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_models import llama_config, uneven_model, write_folder, write_tokenizer
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge import bit_map_search
from ternaryforge.bit_map_search import measured_file, score, search
from ternaryforge.budget import find_frontier
from ternaryforge.cli import app
from ternaryforge.mapped_checkpoint import MappedCheckpoint

MODES = ("f16", "int8", "ternary", "binary")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with layers that differ in how much they say, and a text that it wrote, so that changes cost."""
    path = tmp_path_factory.mktemp("search")
    config, tensors = uneven_model()
    source = write_tokenizer(write_folder(path / "source", config, tensors))
    model = tf.TernaryModel.from_pretrained(source, threads=1)
    letters = np.arange(ord("a"), ord("z") + 1)
    random, documents = np.random.default_rng(0), []
    for _ in range(4):
        ids = [257]
        while len(ids) < 40:
            logits = model.logits(ids)[-1, letters] + random.gumbel(size=len(letters))
            ids.append(int(letters[logits.argmax()]))
        documents.append(bytes(ids[1:]).decode())
    (path / "data.txt").write_text("\n<|endoftext|>\n".join(documents))
    return path


def text_of(folder: Path) -> str:
    return (folder / "data.txt").read_text()


@pytest.fixture(scope="module")
def brute_force(folder: Path) -> dict[tuple[str, ...], tuple[float, int]]:
    """Perplexity and size of every map, each written, loaded and evaluated."""
    found = {}
    for modes in itertools.product(MODES, repeat=3):
        out = folder / "-".join(modes)
        tf.convert(folder / "source", out, bit_map={"layer_modes": modes, "lm_head": "f16"}, scale="row", threads=1)
        model = tf.TernaryModel.from_pretrained(out, threads=1)
        found[modes] = model.perplexity(text_of(folder)).perplexity, (out / "model.safetensors").stat().st_size
    return found


def run(folder: Path, **options: Any) -> tf.SearchResult:
    return search(
        folder / "source",
        folder / "data.txt",
        **({"scale": "row", "tokens": None, "threads": 1, "modes": MODES} | options),
    )


@pytest.mark.parametrize("exhaustive", [True, False])
def test_equals_brute_force_and_keeps_its_budget_to_the_byte(
    folder: Path, brute_force: Any, monkeypatch: pytest.MonkeyPatch, exhaustive: bool
) -> None:
    """By definition where all maps are measured; here by sums of sensitivities and their refinement too."""
    if not exhaustive:
        monkeypatch.setattr(bit_map_search, "_MOST_EXHAUSTIVE", 0)
    sizes = sorted({size for _, size in brute_force.values()})
    for budget in (sizes[0], sizes[len(sizes) // 3], sizes[len(sizes) // 2], sizes[len(sizes) // 2] - 1, sizes[-1]):
        result = run(folder, max_size_mb=budget / 1e6)
        best = min(perplexity for perplexity, size in brute_force.values() if size <= budget)
        assert result.perplexity == pytest.approx(best, rel=1e-6)
        assert result.size_bytes <= budget
        assert result.exhaustive == exhaustive
        perplexity, size = brute_force[tuple(result.layer_bit_map["layer_modes"])]
        assert result.size_bytes == size
        assert result.perplexity == pytest.approx(perplexity, rel=1e-6)
    for ceiling in sorted(perplexity for perplexity, _ in brute_force.values())[5::19]:
        result = run(folder, max_perplexity=ceiling * (1 + 1e-6))
        smallest = min(size for perplexity, size in brute_force.values() if perplexity <= ceiling * (1 + 1e-6))
        assert result.size_bytes == smallest
        assert result.perplexity <= ceiling * (1 + 1e-6)
    if not exhaustive:
        assert len(result.measured) < len(brute_force)


def test_the_frontier_is_exact() -> None:
    """Against every choice there is, for random bytes and losses, negative ones too."""
    random = np.random.default_rng(0)
    for _ in range(30):
        count = int(random.integers(1, 6))
        items = [
            [(int(random.integers(1, 40)), float(random.normal())) for _ in range(random.integers(1, 5))]
            for _ in range(count)
        ]
        sums = [
            (sum(size for size, _ in choice), sum(loss for _, loss in choice)) for choice in itertools.product(*items)
        ]
        frontier = find_frontier(items)
        assert (np.diff(frontier.sizes) > 0).all()
        assert (np.diff(frontier.losses) < 0).all()
        for budget in random.integers(0, 45 * count, 12):
            fitting = [loss for size, loss in sums if size <= budget]
            choice = frontier.least_loss(int(budget))
            assert (choice is None) == (not fitting)
            if choice is not None:
                found = [options[i] for options, i in zip(items, choice, strict=True)]
                assert sum(size for size, _ in found) <= budget
                assert sum(loss for _, loss in found) == pytest.approx(min(fitting))
        limit = float(random.normal())
        smallest = frontier.least_bytes(limit)
        fitting_sizes = [size for size, loss in sums if loss <= limit]
        assert (smallest is None) == (not fitting_sizes)
        if smallest is not None:
            assert sum(options[i][0] for options, i in zip(items, smallest, strict=True)) == min(fitting_sizes)


def test_every_linear_layer_by_itself(folder: Path, tmp_path: Path) -> None:
    """The file that `convert` writes by the map has the foretold size and perplexity."""
    whole = run(folder, max_size_mb=0.0375, modes=["int8", "ternary"])
    result = run(folder, max_size_mb=0.0375, modes=["int8", "ternary"], by="linear", output=tmp_path / "map.json")
    assert result.perplexity <= whole.perplexity
    report = tf.convert(folder / "source", tmp_path / "out", bit_map=tmp_path / "map.json", scale="row")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == report.file_bytes == result.size_bytes <= 37_500
    model = tf.TernaryModel.from_pretrained(tmp_path / "out")
    assert model.perplexity(text_of(folder)).perplexity == pytest.approx(result.perplexity, rel=1e-6)
    assert json.loads((tmp_path / "map.json").read_text())["perplexity"] == result.perplexity
    assert not result.exhaustive
    assert result.bit_map.to_dict() == result.layer_bit_map


def test_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "map.json"

    def stop(done: int, _total: int, _what: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, max_size_mb=0.04, output=output, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["map.measured.json"]
    assert len(json.loads(measured_file(output).read_text())["nll"]) == 9
    result = run(folder, max_size_mb=0.04, output=output)
    assert result.resumed == 9
    whole = run(folder, max_size_mb=0.04)
    assert (whole.layer_bit_map, whole.perplexity) == (result.layer_bit_map, result.perplexity)
    # Other options are other measurements; a broken file is none.
    assert run(folder, max_size_mb=0.04, output=output, tokens=5).resumed == 0
    measured_file(output).write_text("{")
    assert run(folder, max_size_mb=0.04, output=output, tokens=5).resumed == 0


def test_unreachable_budgets(folder: Path, brute_force: Any) -> None:
    smallest = min(size for _, size in brute_force.values())
    with pytest.raises(ValueError, match=f"no map has at most {smallest - 1:,} bytes.* takes {smallest:,} bytes"):
        run(folder, max_size_mb=(smallest - 1) / 1e6)
    best = min(perplexity for perplexity, _ in brute_force.values())
    with pytest.raises(ValueError, match=rf"keeps perplexity .* the best reaches {best:.4g}"):
        run(folder, max_perplexity=best * 0.99)
    perplexity = sorted(perplexity for perplexity, _ in brute_force.values())[3]
    with pytest.raises(ValueError, match="the perplexity was kept with"):
        run(folder, max_perplexity=perplexity, max_size_mb=smallest / 1e6)


def test_command(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "map.json"
    arguments = ["search", str(folder / "source"), "--data", str(folder / "data.txt"), "--scale", "row"]
    arguments += ["--modes", "int8,binary"]
    found = CliRunner().invoke(app, [*arguments, "--max-size-mb", "0.04", "--output", str(output), "--json"])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["layer_bit_map"] == json.loads(output.read_text())["layer_bit_map"]
    assert {"perplexity", "size_bytes"} <= result.keys()
    scored = CliRunner().invoke(app, [*arguments, "--score", str(output), "--json"])
    assert json.loads(scored.stdout)["perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)
    assert json.loads(scored.stdout)["size_bytes"] == result["size_bytes"]
    missed = CliRunner().invoke(app, [*arguments, "--score", str(output), "--max-size-mb", "0.001"])
    assert missed.exit_code == 3
    assert CliRunner().invoke(app, [*arguments, "--max-size-mb", "0.04"]).exit_code == 2
    shown = CliRunner().invoke(app, [*arguments, "--max-size-mb", "0.04", "--output", str(output)]).stdout
    assert "which are all" in shown
    assert tf.SearchResult.plot(run(folder, max_size_mb=0.04)).axes
    assert score(folder / "source", folder / "data.txt", output, scale="row").kept


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "one of max_perplexity and max_size_mb must be given"),
        ({"max_perplexity": 0.5}, "max_perplexity is a number of at least 1"),
        ({"max_size_mb": float("nan")}, "max_size_mb is a positive number"),
        ({"max_size_mb": 1, "modes": ["f16"]}, "modes are at least two of"),
        ({"max_size_mb": 1, "modes": ["f16", "three_plane"]}, "modes are at least two of"),
        ({"max_size_mb": 1, "by": "tensor"}, "by is 'layer' or 'linear'"),
        ({"max_size_mb": 1, "tokens": 0}, "tokens is at least 1"),
        ({"max_size_mb": 1, "embedding": "f8"}, "embedding must be one of"),
    ],
)
def test_wrong_options(folder: Path, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(folder, **options)


def test_a_source_without_tokenizer(folder: Path, tmp_path: Path) -> None:
    config = llama_config()
    write_folder(tmp_path / "bare", config)
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        search(tmp_path / "bare", folder / "data.txt", max_size_mb=1)
    assert MappedCheckpoint.__doc__
