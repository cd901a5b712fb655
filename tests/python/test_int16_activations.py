# SPDX-License-Identifier: Apache-2.0
"""16-bit activations against floating point on a trained model made ternary."""

from pathlib import Path

import numpy as np
import pytest

from ternaryforge import TernaryModel, convert
from ternaryforge.inspection import inspect


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    out = tmp_path_factory.mktemp("int16") / "out"
    convert(shared / "data/stories260k/hf", out, scale="group", group_size=64)
    return out


@pytest.mark.shared
def test_logits_are_those_of_float_activations(folder: Path, shared: Path) -> None:
    model = TernaryModel.from_pretrained(folder)
    assert model.transformer.activations == "int16"
    reference = TernaryModel.from_pretrained(folder, activations="float")
    text = (shared / "data/tinystories/valid.txt").read_text(encoding="utf-8")
    documents = text.split("<|endoftext|>")[:8]
    found, expected = [], []
    for document in documents:
        ids = model.encode(document.strip())[: model.context_length]
        found.append(model.logits(ids))
        expected.append(reference.logits(ids))
    logits, wanted = np.concatenate(found), np.concatenate(expected)
    assert len(wanted) > 1000
    assert np.abs(logits - wanted).max() <= 1e-3 * np.abs(wanted).max()
    assert (logits.argmax(-1) == wanted.argmax(-1)).mean() >= 0.999


@pytest.mark.shared
def test_inspection_shows_the_bits(folder: Path) -> None:
    quantization = inspect(folder).quantization
    assert quantization is not None
    assert quantization["activation_bits"] == 16
