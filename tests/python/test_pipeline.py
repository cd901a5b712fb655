# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline: what it leaves, which stages it repeats after which change, and its exit codes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_models import llama_config, write_folder, write_tokenizer
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge import pipeline
from ternaryforge.cli import app
from ternaryforge.pipeline import RunReport, run

WORDS = ["one", "two", "three", "four", "five", "six", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog"]
STAGES = ["convert", "export", "validate-export", "validate"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tokenizer(write_folder(tmp_path / "source", llama_config(max_position_embeddings=64)))


def write_text(path: Path, seed: int) -> Path:
    random = np.random.default_rng(seed)
    path.write_text("\n<|endoftext|>\n".join(" ".join(random.choice(WORDS, 12)) for _ in range(40)))
    return path


def make(source: Path, **options: Any) -> RunReport:
    return run(source, source.with_name("out"), **{"profile": "onebit", "threads": 1} | options)


def repeated(report: RunReport) -> list[str]:
    return [stage.name for stage in report.stages if not stage.reused]


def test_only_what_changed_is_repeated(tmp_path: Path, source: Path) -> None:
    first = make(source)
    assert repeated(first) == [stage.name for stage in first.stages] == STAGES
    assert first.passed
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == ["model.1bit", "run.json", "ternary"]
    assert first.stages[0].report["tensors"] == 14
    assert first.stages[2].report["model"] == str(out / "model.1bit")
    assert first.stages[2].report["tokens_equal"] is None  # a .1bit file cannot hold this tokenizer
    assert first.stages[3].report["perplexity_ratio"] > 0
    again = make(source)
    assert repeated(again) == []
    assert [stage.report for stage in again.stages] == [stage.report for stage in first.stages]

    assert repeated(make(source, scheme="absmean")) == STAGES
    assert repeated(make(source, scheme="absmean")) == []
    (out / "model.1bit").write_bytes(b"damaged")
    assert repeated(make(source, scheme="absmean")) == ["export"]  # with the same bytes as before
    shutil.rmtree(out / "ternary")
    assert repeated(make(source, scheme="absmean")) == ["convert"]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert repeated(make(source, scheme="absmean")) == STAGES
    text = write_text(tmp_path / "text.txt", 0)
    assert repeated(make(source, scheme="absmean", evaluation=text)) == ["validate-export", "validate"]
    write_text(text, 1)
    assert repeated(make(source, scheme="absmean", evaluation=text)) == ["validate-export", "validate"]
    model = tf.TernaryModel.from_pretrained(out / "model.1bit")
    assert len(model.generate([1, 2, 3], max_new_tokens=4).token_ids) == 4


def test_a_threshold_is_missed(source: Path) -> None:
    assert make(source).passed
    missed = make(source, thresholds={"kl": 1e-9, "sparsity": 0.01})
    assert repeated(missed) == ["validate"]
    assert not missed.passed
    assert len(missed.missed) == 1
    assert missed.missed[0].startswith("validate: kl is ")
    assert make(source, thresholds={"kl": 1e-9, "sparsity": 0.01}).missed == missed.missed
    call = ["run", str(source), str(source.with_name("out")), "--profile", "onebit", "--threads", "1"]
    for options, code in ((["--threshold", "kl=1e-9"], 3), (["--threshold", "kl=1e9"], 0)):
        result = CliRunner().invoke(app, [*call, *options, "--json"])
        assert result.exit_code == code, result.output
        document = json.loads(result.stdout)
        assert [stage["name"] for stage in document["stages"]] == STAGES
        assert document["passed"] == (code == 0)


def test_calibrates_and_goes_on_after_a_failure(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_text(tmp_path / "data.txt", 0)
    options: dict[str, Any] = {"calibrate": True, "data": data, "tokens": 300, "scale": "row"}

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "export", fail)
        with pytest.raises(KeyboardInterrupt):
            make(source, **options)
    report = make(source, **options)
    assert [stage.name for stage in report.stages] == ["calibrate", *STAGES[1:]]
    assert repeated(report) == STAGES[1:]
    assert report.stages[0].report["calibration_tokens"] >= 300
    assert repeated(make(source, **options | {"tokens": 400})) == ["calibrate", *STAGES[1:]]
    write_text(data, 1)
    assert repeated(make(source, **options | {"tokens": 400}))[0] == "calibrate"


def test_a_gguf_file_and_none(tmp_path: Path) -> None:
    report = run("demo", tmp_path / "out", threads=1)
    assert report.passed
    assert (tmp_path / "out" / "model.gguf").is_file()
    assert report.stages[2].report["top1_agreement"] > 0.97
    only = run("demo", tmp_path / "only", threads=1, profile=None)
    assert [stage.name for stage in only.stages] == ["convert", "validate"]
    assert not (tmp_path / "only" / "model.gguf").exists()
    result = CliRunner().invoke(app, ["run", "demo", str(tmp_path / "out"), "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("done before") == 4


def test_refusals(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="there is something already"):
        make(source)
    (tmp_path / "out" / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json' is damaged; remove it"):
        make(source)
    with pytest.raises(ValueError, match="calibrate and data go together"):
        make(source, calibrate=True)
    with pytest.raises(ValueError, match="tune_tokens goes with calibrate"):
        make(source, tune_tokens=5)
    with pytest.raises(ValueError, match="thresholds has the keys"):
        make(source, thresholds={"speed": 1})
    with pytest.raises(ValueError, match="must lie outside of the source"):
        run(source, source / "inside")
    assert CliRunner().invoke(app, ["run", str(source), "--calibrate"]).exit_code == 2
