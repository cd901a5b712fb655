# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from their first cell to their last, and hold the outputs of such a run."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from hf_setup import transformers

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.mark.parametrize("name", sorted(file.stem for file in NOTEBOOKS.glob("*.ipynb")))
def test_it_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream"}
    assert {output["name"] for output in outputs} == {"stdout"}
    assert not re.search(r"/(tmp|home|work|root)/", json.dumps(outputs))
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(NOTEBOOKS.parent / "examples"))
    source = (
        "\n".join("".join(cell["source"]) for cell in code)
        .replace("max_steps=40", "max_steps=2")
        .replace("logging_steps=10", "logging_steps=1")
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name, "exec"), {"__name__": name})  # noqa: S102 # our own
    assert len(printed.getvalue().splitlines()) >= 8


def test_there_are_some() -> None:
    assert transformers.__version__
    assert len(list(NOTEBOOKS.glob("*.ipynb"))) == 2
