# SPDX-License-Identifier: Apache-2.0
"""The three names that scripts written for onebitllms call, on any device and with the checks of this library.

Change `from onebitllms import ...` to `from ternaryforge.hf.onebitllms import ...`.
"""

import os
from typing import Any

from ternaryforge.hf.export import ExportReport, export_bitnet, export_dense
from ternaryforge.torch import QATConfig, prepare_qat

_TRAINED = QATConfig(quantizer="absmean", scale="tensor", activation_bits=8)


def replace_linear_with_bitnet_linear(model: Any) -> Any:
    """Prepares all linear layers but `lm_head` in place, latents in float32; returns the model."""
    return prepare_qat(model, _TRAINED)


def quantize_to_1bit(input_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> ExportReport:
    """Packs the latents of a folder for plain transformers, whether or not its config.json has the stamp."""
    return export_bitnet(input_dir, output_dir, config=_TRAINED)


def convert_to_bf16(input_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> None:
    """Bakes the ternary values of a folder into dense bfloat16 weights."""
    export_dense(input_dir, output_dir, dtype="bfloat16", config=_TRAINED)
