# SPDX-License-Identifier: Apache-2.0
"""Loads transformers for tests, quietly and on one thread, and makes small models."""

import os
from typing import Any

import pytest

# Read when torch is imported: compiling transformers' helpers takes many seconds and changes nothing.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 64


def small_model(family: str = "Llama", seed: int = 0, **changes: Any) -> Any:
    """A random model of float32 in evaluation mode."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    } | changes
    torch.manual_seed(seed)
    config = getattr(transformers, family + "Config")(**fields)
    return getattr(transformers, family + "ForCausalLM")(config).eval()


def some_ids(rows: int = 2, length: int = 12, seed: int = 0) -> Any:
    """Random tokens [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
