# SPDX-License-Identifier: Apache-2.0
"""`verify`: known answers of published models, their data, and what is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import made_models
import pytest

from ternaryforge import verification, verify
from ternaryforge.checkpoint import read_header
from ternaryforge.evaluation import PROTOCOLS

DEMO = Path(verification.__file__).with_name("embedded_model")


def cli(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ternaryforge", "verify", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def statuses(report: verification.VerificationReport) -> dict[str, str]:
    return {check.what: check.status for check in report.checks}


def test_every_answer_is_well_formed_and_has_a_source() -> None:
    known = verification.known_answers()
    for text in known["texts"].values():
        assert text["origin"]
        assert ("content" in text) != ("sha256" in text)
    names = [model["name"] for model in known["models"]]
    assert len(set(names)) == len(names)
    for model in known["models"]:
        assert model["source"]
        for file in model["files"].values():
            assert all(set(part) <= set("0123456789abcdef") for part in file["sha256"].split("..."))
        for score in model["scores"]:
            assert score["text"] in known["texts"]
            assert score["protocol"] in PROTOCOLS
            assert score["measure"] in {"perplexity", "bits_per_byte"}
            assert 0 < score["tolerance"] < 0.01 * score["value"]
            assert score["source"]
        assert model["files"] or "parameters" in model


def test_the_demo_passes_offline() -> None:
    report = verify("demo", threads=1)
    found = statuses(report)
    assert (report.passed, report.failed, report.complete) == (True, False, False)
    assert found["file model.safetensors"] == found["ternary weights"] == "passed"
    assert found["bits per byte of 'story', protocol documents"] == "passed"
    assert found["bits per byte of 'TinyStories validation, 499 documents', protocol documents"] == "not run"
    assert "SHA-256 68346e73" in report.checks[-1].note


def test_a_changed_weight_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    info = read_header(weights)["model.layers.0.mlp.up_proj.weight"]
    data[info.begin : info.end] = b"\x55" * info.nbytes  # all zero
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"there are answers for demo, .* is none of their weights files"):
        verify(folder)
    report = verify(folder, answers="demo", threads=1)
    found = statuses(report)
    assert report.failed
    assert not report.passed
    assert found["file model.safetensors"] == "failed"
    assert found["file tokenizer.json"] == "passed"
    assert found["bits per byte of 'story', protocol documents"] == "failed"
    done = cli(folder, "--answers", "demo", "--threads", "1")
    assert done.returncode == 3
    assert "failed: file model.safetensors" in done.stdout
    assert "result: failed" in done.stdout


def test_another_text_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was another text.")
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    with pytest.raises(
        ValueError, match=rf"SHA-256 {digest}; the answers of demo are for 'TinyStories validation.*68346"
    ):
        verify("demo", text=text)
    with pytest.raises(FileNotFoundError):
        verify("demo", text=tmp_path / "absent.txt")


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    folder = made_models.write_folder(tmp_path / "model", made_models.llama_config())
    with pytest.raises(ValueError, match="none of their weights files"):
        verify(folder)
    with pytest.raises(ValueError, match="got 'nothing'"):
        verify(folder, answers="nothing")
    with pytest.raises(FileNotFoundError, match=r"\[verify\] no such file or folder"):
        verify(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no model\.safetensors to know it by"):
        verify(tmp_path / "empty")


def answers_for(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    model = {"name": "made", "files": {}, "scores": [], "source": "this test"} | fields
    monkeypatch.setattr(verification, "known_answers", lambda: {"texts": {}, "models": [model]})


def test_shares_of_codes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = made_models.bitnet_config()
    tensors = made_models.make_tensors(config)
    folder = made_models.write_folder(tmp_path / "model", config, tensors)
    codes = [array for dtype, array in tensors.values() if dtype == "U8"]
    weights = sum(4 * array.size for array in codes)
    shares = [
        sum(int(((array >> shift & 3) == code).sum()) for array in codes for shift in (0, 2, 4, 6)) / weights
        for code in range(3)
    ]
    answers_for(monkeypatch, code_shares={"values": shares, "tolerance": 1e-9}, ternary_weights=weights)
    report = verify(folder, answers="made")
    assert report.passed
    assert report.complete
    assert [check.what for check in report.checks] == [
        "ternary weights", "share of weights -1", "share of weights +0", "share of weights +1",
    ]  # fmt: skip
    answers_for(
        monkeypatch, code_shares={"values": shares[::-1], "tolerance": 1e-9}, parameters={"value": 7, "tolerance": 1}
    )
    assert statuses(verify(folder, answers="made")) == {
        "parameters": "failed",
        "share of weights -1": "failed",
        "share of weights +0": "passed",
        "share of weights +1": "failed",
    }


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made_models.write_folder(tmp_path / "model", made_models.llama_config())
    answers_for(monkeypatch, files={"absent.gguf": {"sha256": "00...11"}})
    report = verify(folder, answers="made")
    assert (report.passed, report.failed, report.complete) == (False, False, False)
    assert "absent.gguf' is missing" in report.checks[0].note
    offline = cli("microsoft/bitnet-b1.58-2B-4T", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert offline.returncode == 1
    assert "'microsoft/bitnet-b1.58-2B-4T' is no folder here and could not be fetched" in offline.stderr


def test_one_json_document() -> None:
    done = cli("demo", "--json", "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["passed"] is True
    assert {"what", "status", "expected", "found", "note"} == set(document["checks"][0])


@pytest.mark.shared
def test_published_models_of_the_shared_data(shared: Path) -> None:
    text = shared / "data/tinystories/valid.txt"
    report = verify(shared / "data/stories260k/hf", text=text, threads=1)
    assert (report.name, report.passed, report.complete) == ("stories260K", True, True)
    report = verify(shared / "data/babyllama/hf-tok361")
    assert (report.name, report.passed, report.complete) == ("BabyLlama tok361", True, False)
    gguf = verify(shared / "data/gguf-fixtures/llama-2-tiny-random.gguf")
    assert gguf.name == "llama-2-tiny-random.gguf"
    assert gguf.passed
