# SPDX-License-Identifier: Apache-2.0
"""benchmarks/compare.py: what counts as a loss."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPARE = Path(__file__).resolve().parents[2] / "benchmarks" / "compare.py"


def document(*rates: tuple[int, float, float]) -> dict[str, Any]:
    results = [
        {
            "target": "avx2",
            "threads": threads,
            "context": 0,
            "prompt_tokens": 128,
            "decode_tokens_per_second": decode,
            "prefill_tokens_per_second": prefill,
        }
        for threads, decode, prefill in rates
    ]
    return {"model": "m", "machine": {"cpu": "c", "read_bandwidth": {"1": 4e10}}, "results": results}


@pytest.mark.parametrize(
    ("new", "options", "code", "shown"),
    [
        (document((1, 10, 100), (2, 20, 200)), [], 0, "ok"),
        (document((1, 9.51, 95.1), (2, 30, 300)), [], 0, "-4.9%"),
        (document((1, 9.49, 100), (2, 20, 200)), [], 1, "LOST"),
        (document((1, 10, 100), (2, 20, 189)), [], 1, "LOST"),
        (document((1, 9.49, 100), (2, 20, 200)), ["--loss", "0.1"], 0, "-5.1%"),
        (document((1, 10, 100)), [], 1, "MISSING  target avx2, threads 2"),
    ],
)
def test_losses(tmp_path: Path, new: dict[str, Any], options: list[str], code: int, shown: str) -> None:
    (tmp_path / "old.json").write_text(json.dumps(document((1, 10, 100), (2, 20, 200))))
    (tmp_path / "new.json").write_text(json.dumps(new))
    command = [sys.executable, COMPARE, tmp_path / "old.json", tmp_path / "new.json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert shown in done.stdout


@pytest.mark.parametrize("text", ["", "[]", '{"results": [{}]}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    done = subprocess.run([sys.executable, COMPARE, path, path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "odd.json" in done.stderr
