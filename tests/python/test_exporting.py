# SPDX-License-Identifier: Apache-2.0
"""`.1bit` files by the same call and verb as GGUF, and what `inspect` says of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge import OnebitReport
from ternaryforge.cli import app
from ternaryforge.inspection import inspect

PROMPT = "Once upon a time"


def test_onebit_of_a_folder_and_of_a_file(tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    report = tf.export("demo", tmp_path / "a.1bit", profile="onebit", progress=lambda *step: steps.append(step))
    assert isinstance(report, OnebitReport)
    assert report.profile == "onebit"
    assert steps[-1][0] == steps[-1][1] == len(report.tensors)
    tf.export("demo", tmp_path / "demo.gguf", threads=1)
    again = tf.export(tmp_path / "demo.gguf", tmp_path / "b.1bit", profile="onebit", threads=1)
    assert again.tensors_by_type == report.tensors_by_type
    models = [tf.TernaryModel.from_pretrained(tmp_path / name) for name in ("a.1bit", "b.1bit")]
    ids = models[0].encode(PROMPT)
    assert models[1].encode(PROMPT) == ids
    np.testing.assert_array_equal(models[0].logits(ids), models[1].logits(ids))
    for head, mode in (("F32", "f32"), ("int8", "int8"), ("Q8_0", "int8")):
        report = tf.export("demo", tmp_path / "c.1bit", profile="onebit", head=head)
        assert isinstance(report, OnebitReport)
        assert report.layer_bit_map["embedding"] == mode


def test_options_that_belong_elsewhere(tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(ValueError, match="go with GGUF files, got profile 'onebit'"):
        tf.export("demo", out, profile="onebit", ternary_type="TQ1_0")
    with pytest.raises(ValueError, match="go with GGUF files, got profile 'onebit'"):
        tf.export("demo", out, profile="onebit", inline_scale=True)
    with pytest.raises(ValueError, match="go with profile 'onebit', got profile 'upstream'"):
        tf.export("demo", out, pack_mode="binary")
    with pytest.raises(ValueError, match="go with profile 'onebit', got profile 'ik'"):
        tf.export("demo", out, profile="ik", emit_c_header=True)
    with pytest.raises(ValueError, match=r"head is 'f32', 'f16' or 'int8' in a \.1bit file, got 'Q6_K'"):
        tf.export("demo", out, profile="onebit", head="Q6_K")
    with pytest.raises(ValueError, match=r"which one bit cannot say"):
        tf.export("demo", out, profile="onebit", pack_mode="binary")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    file = tmp_path / "demo.1bit"
    arguments = ["export", "demo", str(file), "--profile", "onebit", "--head", "int8", "--pack-mode", "ternary"]
    result = runner.invoke(app, [*arguments, "--emit-c-header"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "demo.1bit.h").is_file()
    assert "ternary" in result.stdout
    result = runner.invoke(app, [*arguments, "--json"])
    report = json.loads(result.stdout)
    assert (report["profile"], report["file_bytes"]) == ("onebit", file.stat().st_size)
    result = runner.invoke(app, ["inspect", str(file), "--json"])
    found = json.loads(result.stdout)
    assert (found["format"], found["producer"], found["warnings"]) == ("1bit", "ternaryforge", [])
    assert found["engines"]["llama.cpp"].startswith("refuses: It is no GGUF file")
    assert found["tensors"]["ternary"]["count"] == 28
    assert found["tokenizer"]["vocab_size"] == tf.TernaryModel.demo().require_tokenizer().vocab_size
    renamed = tmp_path / "renamed"
    file.rename(renamed)
    assert inspect(renamed).format == "1bit"
    renamed.write_bytes(renamed.read_bytes()[:-1])
    with pytest.raises(tf.FormatError, match="cut off or damaged"):
        inspect(renamed)
