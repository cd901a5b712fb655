# SPDX-License-Identifier: Apache-2.0
"""The study of bit maps on a made model: every point is there once, and a second run measures nothing anew."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from made_models import llama_config, write_folder, write_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bit_map_study.py"
TRAIN = "\n<|endoftext|>\n".join(f"{word} saw the cat on the mat." for word in "abcdefghijklmnopqrst")
TEXT = "The cat sat on the mat.\n<|endoftext|>\nA dog saw the cat, and the cat ran off.\n<|endoftext|>\nThe end.\n"


def test_points_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = write_tokenizer(write_folder(tmp_path / "made" / "hf", llama_config()))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "train.txt").write_text(TRAIN)
    output = tmp_path / "study.json"
    command = [sys.executable, str(SCRIPT), str(source), "--output", str(output), "--plot", str(tmp_path / "study.svg")]
    command += ["--train", str(tmp_path / "train.txt"), "--text", str(tmp_path / "text.txt"), "--how", "rounded"]
    command += ["--modes", "int8", "ternary", "--megabytes", "0.04", "--tokens", "5", "--calibration-tokens", "70"]
    runs = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    points = json.loads(output.read_text())["points"]
    names = [(point["kind"], point["name"]) for point in points]
    assert names[-3:] == [
        ("fixed", "pure ternary"),
        ("searched by rounding", "0.04 MB"),
        ("searched as calibrated", "0.04 MB"),
    ]
    assert len(set(names)) == len(names)
    assert all(point["size_bytes"] <= 40_000 for point in points[-2:])
    assert runs[1].stdout.startswith("| map |")  # nothing else: all was there
    assert "<svg" in (tmp_path / "study.svg").read_text()
