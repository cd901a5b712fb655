# SPDX-License-Identifier: Apache-2.0
"""Which tokens end a text."""

from pathlib import Path

from ternaryforge.checkpoint import read_json
from ternaryforge.families import Architecture
from ternaryforge.families.fields import Fields
from ternaryforge.tokenizer import Tokenizer


def find_eos_ids(path: Path, architecture: Architecture, tokenizer: Tokenizer | None) -> list[int]:
    """The union of what config.json, generation_config.json and the tokenizer call an end token."""
    ids = set(architecture.eos_ids)
    generation_config = path / "generation_config.json"
    if generation_config.is_file():
        ids.update(Fields(read_json(generation_config), str(generation_config)).token_ids("eos_token_id"))
    if tokenizer is not None:
        ids.update(tokenizer.eos_ids)
    return sorted(token_id for token_id in ids if 0 <= token_id < architecture.spec.vocab_size)
