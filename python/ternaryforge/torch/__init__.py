# SPDX-License-Identifier: Apache-2.0
"""Training with PyTorch: quantizers, layers that train as ternary, schedules and losses.

    from ternaryforge.torch import QATConfig, prepare_qat

Needs the extra `torch`. What needs transformers as well is in `ternaryforge.hf`.
"""

from ternaryforge.torch.blockwise import (
    BlockError,
    BlocksInMemory,
    BlockwiseOptions,
    capture_inputs,
    train_block,
    train_blocks,
)
from ternaryforge.torch.distillation import DistillationLoss, FeatureTap
from ternaryforge.torch.head import QuantizedHead
from ternaryforge.torch.linear import TernaryLinear
from ternaryforge.torch.monitor import CodeMonitor
from ternaryforge.torch.qat import QATConfig, QATLinear, prepare_qat, qat_layers
from ternaryforge.torch.quantizers import QUANTIZERS, Codes, Quantizer
from ternaryforge.torch.replacement import optimize_layers
from ternaryforge.torch.schedules import (
    anneal_sharpness,
    clip_latents,
    residual_strength,
    set_residual,
    set_sharpness,
    set_strength,
    warmup_strength,
)
from ternaryforge.torch.tuning import TuningOptions, tune_scales

__all__ = [
    "QUANTIZERS",
    "BlockError",
    "BlocksInMemory",
    "BlockwiseOptions",
    "CodeMonitor",
    "Codes",
    "DistillationLoss",
    "FeatureTap",
    "QATConfig",
    "QATLinear",
    "QuantizedHead",
    "Quantizer",
    "TernaryLinear",
    "TuningOptions",
    "anneal_sharpness",
    "capture_inputs",
    "clip_latents",
    "optimize_layers",
    "prepare_qat",
    "qat_layers",
    "residual_strength",
    "set_residual",
    "set_sharpness",
    "set_strength",
    "train_block",
    "train_blocks",
    "tune_scales",
    "warmup_strength",
]
