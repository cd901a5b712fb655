# SPDX-License-Identifier: Apache-2.0
"""The committed results: documents that compare.py reads, and figures that plot.py draws from them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DOCS = BENCHMARKS.parent / "docs"
REPORTS = sorted((BENCHMARKS / "results").glob("bench-*.json"))
PEERS = sorted((BENCHMARKS / "results").glob("peers-*.json"))


def test_there_are_results() -> None:
    assert REPORTS
    assert PEERS


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_report_has_lost_nothing_to_itself(path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "compare.py", path, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("+0.0%") == 2 * len(json.loads(path.read_text())["results"])


@pytest.mark.parametrize("path", PEERS, ids=lambda path: path.stem)
def test_ratios_are_of_the_medians_beside_them(path: Path) -> None:
    for run in json.loads(path.read_text())["runs"]:
        rates = {result["engine"]: result for result in run["results"]}
        for result in run["results"]:
            for measure in ("decode", "prefill"):
                rate = f"{measure}_tokens_per_second"
                if rate not in result:
                    continue
                low, high = result[f"{measure}_range"]
                assert low <= result[rate] <= high
                ratios = result[f"{measure}_ratio"]
                for name, ratio in (ratios if isinstance(ratios, dict) else {"ternaryforge": ratios}).items():
                    assert ratio == pytest.approx(rates[name][rate] / result[rate])


def test_the_figures_can_be_drawn_and_are_the_ones_shown(tmp_path: Path) -> None:
    subprocess.run([sys.executable, BENCHMARKS / "plot.py", tmp_path], check=True)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (DOCS / "figures").iterdir())
    text = "".join(page.read_text() for page in (DOCS / "performance.md", *(DOCS / "guide").glob("*.md")))
    for path in tmp_path.iterdir():
        assert path.stat().st_size < 60_000
        assert f"figures/{path.name}" in text
    assert "llama.cpp TQ2_0" in (tmp_path / "peers.svg").read_text()
