# SPDX-License-Identifier: Apache-2.0
"""What needs transformers: its Trainer's callbacks, export of what it trained, loading onto our kernels.

    from ternaryforge.hf import LambdaWarmupCallback, accelerate_bitnet, export_bitnet

Needs the extra `hf`. Importing it makes `quant_method: ternaryforge` known to transformers and changes nothing else.
"""

from ternaryforge.hf.acceleration import accelerate_bitnet, optimize
from ternaryforge.hf.blockwise import BlockwiseReport, train_blockwise
from ternaryforge.hf.callbacks import (
    AnnealingCallback,
    LambdaWarmupCallback,
    ResidualCallback,
    TernaryMonitorCallback,
    WeightDecayAnnealCallback,
)
from ternaryforge.hf.config import TernaryForgeConfig
from ternaryforge.hf.export import ExportReport, export_bitnet, export_dense
from ternaryforge.hf.quantizer import register
from ternaryforge.hf.trainer import DistillationTrainer
from ternaryforge.model_card import push_to_hub

__all__ = [
    "AnnealingCallback",
    "BlockwiseReport",
    "DistillationTrainer",
    "ExportReport",
    "LambdaWarmupCallback",
    "ResidualCallback",
    "TernaryForgeConfig",
    "TernaryMonitorCallback",
    "WeightDecayAnnealCallback",
    "accelerate_bitnet",
    "export_bitnet",
    "export_dense",
    "optimize",
    "push_to_hub",
    "train_blockwise",
]

register()
