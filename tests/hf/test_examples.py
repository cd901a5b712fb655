# SPDX-License-Identifier: Apache-2.0
"""The shortest form of every example that needs no TRL, on the embedded model, offline and in this process."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hf_setup import torch, transformers

import ternaryforge as tf

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import compare_quantizers
import story_model
import train_distributed
import train_with_accelerate
import train_with_trainer
from peer_quantizers import PEERS

from ternaryforge.torch import QUANTIZERS

STORY = "Once upon a time there was a little dog. The dog had a red ball. He ran and ran with his ball in the park. "


def run(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    text = tmp_path / "stories.txt"
    text.write_text("<|endoftext|>".join([STORY * 2] * 4), encoding="utf-8")
    out = tmp_path / "run"
    short = ["--out", str(out), "--text", str(text), "--steps", "2", "--batch", "2", "--length", "32"]
    monkeypatch.setattr(sys, "argv", [example.__name__, *short, *options])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    example.main()
    return out


def test_dense_weights_of_the_embedded_model_give_its_logits() -> None:
    ids = tf.TernaryModel.demo().tokenizer.encode(STORY)
    expected = tf.TernaryModel.demo().logits(ids)
    with torch.no_grad():
        got = story_model.load_dense("demo")(torch.tensor([ids])).logits[0].numpy()
    assert (got.argmax(1) == expected.argmax(1)).mean() > 0.9  # the model rounds its inputs to int8, this one does not
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.99


def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(train_with_trainer, tmp_path, monkeypatch)
    assert "2.000 bits per weight" in capsys.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "master").config.vocab_size == 1024
    assert tf.TernaryModel.from_pretrained(out / "ternary").generate("One day", max_new_tokens=4).text


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(train_with_accelerate, tmp_path, monkeypatch)
    assert "divergence" in capsys.readouterr().out
    assert (out / "ternary" / "README.md").is_file()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_one_process_of_the_distributed_one(
    sharding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchrun starts it; that two do what one does is shown in tests/qat/test_distributed.py."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    out = run(train_distributed, tmp_path, monkeypatch, "--sharding", sharding)
    assert "zeros" in capsys.readouterr().out
    assert (out / "ternary" / "model.safetensors").is_file()


def test_comparison_of_quantizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "stories.txt"
    text.write_text("<|endoftext|>".join([STORY * 2] * 4), encoding="utf-8")
    folder = tmp_path / "dense"
    story_model.load_dense("demo").save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((story_model.find_source("demo") / "tokenizer.json").read_bytes())
    known = dict(QUANTIZERS)
    methods = ["EfficientQAT", "lsq, Muon", *(name for name in compare_quantizers.METHODS if name.endswith("v1"))]
    files = ["--train", str(text), "--valid", str(text), "--out", str(tmp_path / "out.jsonl")]
    short = ["--seeds", "0", "--steps", "2", "--batch", "1", "--length", "32", "--methods", *methods]
    monkeypatch.setattr(sys, "argv", ["compare_quantizers", str(folder), *files, *short])
    try:
        compare_quantizers.main()
        assert QUANTIZERS.keys() == known.keys() | PEERS.keys()
    finally:
        for name in PEERS:
            QUANTIZERS.pop(name, None)
    monkeypatch.setattr(sys, "argv", ["compare_quantizers", str(folder), *files, "--table"])
    compare_quantizers.main()
    table = capsys.readouterr().out
    assert all(f"| {name} | 2 x 1 x 32 | 1 |" in table for name in methods)
