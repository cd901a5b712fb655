# SPDX-License-Identifier: Apache-2.0
"""The model that the training script writes is the model that it trained, ternary or in full precision."""

import json
from pathlib import Path

import numpy as np
import pytest
from torch_setup import torch

import ternaryforge as tf
from ternaryforge.torch import train_embedded_model as training

STORIES = ["Tom had a red ball. He ran to the park.", "The cat sat on the mat and saw the ball."] * 8
SHAPE = training.Shape(vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=2)


# Ternary: an activation that lies between two int8 codes may take another one.
@pytest.mark.parametrize(("ternary", "tolerance"), [(True, 1e-3), (False, 1e-6)])
def test_the_exported_folder_scores_as_the_trained_model(tmp_path: Path, ternary: bool, tolerance: float) -> None:
    torch.manual_seed(0)
    model = training.Model(SHAPE).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not training.is_matrix(name):
                parameter.copy_(parameter.bfloat16())  # a ternary folder stores them so
    tokenizer = training.train_tokenizer(STORIES, SHAPE.vocab_size)
    training.export(model, tokenizer, tmp_path, ternary=ternary)
    ids = tokenizer.encode(STORIES[0]).ids
    with torch.no_grad():
        nats = float(model(*training.batch_of([(ids, 1)]), ternary, torch.float32))
    ours = tf.TernaryModel.from_pretrained(tmp_path)
    logits = ours.logits(ids).astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert ours.encode(STORIES[0]) == ids
    assert -scores[np.arange(len(ids) - 1), ids[1:]].sum() == pytest.approx(nats, rel=tolerance)
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) == ternary
