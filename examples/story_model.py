# SPDX-License-Identifier: Apache-2.0
"""What the examples train: a folder that the user names, or the embedded model with stories of its own. Offline."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ternaryforge as tf
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.evaluation import split_documents
from ternaryforge.sources import find_source
from ternaryforge.tokenizer import Tokenizer
from ternaryforge.weights import scale_name

BEGINNINGS = (
    "Once upon a time",
    "One day, a little girl",
    "Tom had a dog",
    "Lily went to the park",
    "There was a bird",
)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all examples have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model", default="demo", help="a Hugging Face folder of a dense model; default: the embedded one"
    )
    made.add_argument("--text", type=Path, help="stories separated by <|endoftext|>; default: the embedded model's own")
    made.add_argument("--out", type=Path, required=True, help="folder for what is written")
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--length", type=int, default=128)
    made.add_argument("--lr", type=float, default=5e-4)
    made.add_argument("--seed", type=int, default=0)
    return made


def load_dense(name: str) -> Any:
    """A dense model in float32, which is what training starts from."""
    folder = find_source(name, download=False)
    config = AutoConfig.from_pretrained(folder)
    if not hasattr(config, "quantization_config"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # A packed checkpoint, such as the embedded model: its trits times their scales are dense weights.
    del config.quantization_config
    checkpoint = Checkpoint.open(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, value in model.state_dict().items():
        if key in checkpoint:
            value.copy_(torch.from_numpy(read_dense(checkpoint, key, tuple(value.shape))))
    model.tie_weights()
    return model


def read_dense(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor as it multiplies; a packed one is unpacked and divided by its stored scale (`bitlinear`)."""
    if checkpoint.info(name).dtype != "U8":
        return np.array(checkpoint.read_float32(name))
    codes = tf.unpack(checkpoint.read(name), "hf_packed", (shape[0], shape[1]))
    return codes / checkpoint.read_float32(scale_name(name))


def stories(text: Path | None, seed: int) -> list[str]:
    """Documents of a file, or some that the embedded model writes."""
    if text is not None:
        return split_documents(text.read_text(encoding="utf-8"))
    model = tf.TernaryModel.demo()
    return [
        start + model.generate(start, max_new_tokens=160, temperature=0.8, seed=seed + i).text
        for i in range(4)
        for start in BEGINNINGS
    ]


def windows(name: str, texts: list[str], length: int) -> Tensor:
    """Tokens of all texts, one behind the other, as rows [windows, length]."""
    tokenizer = Tokenizer.from_folder(find_source(name, download=False))
    stream = [token for text in texts for token in tokenizer.encode(text)]
    rows = len(stream) // length
    if not rows:
        raise ValueError(f"the texts have {len(stream)} tokens, less than one row of {length}: give more, or --length")
    return torch.tensor(stream[: rows * length]).view(rows, length)
