# SPDX-License-Identifier: Apache-2.0
"""The model inside the wheel: small, ternary, fit for every file format, and good at its stories."""

import zlib
from pathlib import Path

import pytest

import ternaryforge
from ternaryforge import TernaryModel
from ternaryforge.checkpoint import Checkpoint

FOLDER = Path(ternaryforge.__file__).with_name("embedded_model")


def test_it_takes_at_most_1_5_megabytes_of_the_wheel() -> None:
    compressed = sum(len(zlib.compress(file.read_bytes())) for file in FOLDER.iterdir() if file.is_file())
    assert compressed <= 1_500_000


def test_every_linear_layer_is_ternary_and_fits_every_file_format() -> None:
    checkpoint = Checkpoint.open(FOLDER)
    linears = [checkpoint.info(name) for name in checkpoint if checkpoint.info(name).dtype == "U8"]
    assert all(info.shape[1] % 256 == 0 and 4 * info.shape[0] % 64 == 0 for info in linears)
    assert len(linears) == 7 * checkpoint.config["num_hidden_layers"]
    assert 1e6 <= sum(4 * info.shape[0] * info.shape[1] for info in linears) <= 4e6
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.config["quantization_config"]["quant_method"] == "bitnet"


def test_it_tells_a_story() -> None:
    model = TernaryModel.demo(threads=1)
    assert model.transformer.activations == "int8"
    result = model.generate("Once upon a time", max_new_tokens=60)
    assert len(result.text.split()) >= 25
    assert result.text == model.generate("Once upon a time", max_new_tokens=60).text


@pytest.mark.shared
def test_it_predicts_held_out_stories(shared: Path) -> None:
    text = (shared / "data/tinystories/valid.txt").read_text(encoding="utf-8")
    result = TernaryModel.demo().perplexity(text)
    assert result.bytes == 397_882  # all 499 documents
    assert result.bits_per_byte <= 1.00
