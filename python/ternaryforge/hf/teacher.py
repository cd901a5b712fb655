# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder as transformers' model, to learn from."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM


def load_teacher(source: Path) -> Any:
    """The model in float32, frozen, for evaluation; without bars of transformers' own, and from this machine only."""
    logging: Any = transformers.utils.logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="float32", local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    model.config.use_cache = False
    return model.eval().requires_grad_(requires_grad=False)
