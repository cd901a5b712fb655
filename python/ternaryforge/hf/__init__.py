# SPDX-License-Identifier: Apache-2.0
"""What needs transformers: callbacks for its Trainer, export of what it trained.

    from ternaryforge.hf import LambdaWarmupCallback, export_bitnet

Needs the extra `hf`.
"""

from ternaryforge.hf.callbacks import (
    AnnealingCallback,
    LambdaWarmupCallback,
    ResidualCallback,
    TernaryMonitorCallback,
    WeightDecayAnnealCallback,
)
from ternaryforge.hf.export import ExportReport, export_bitnet, export_dense
from ternaryforge.hf.trainer import DistillationTrainer

__all__ = [
    "AnnealingCallback",
    "DistillationTrainer",
    "ExportReport",
    "LambdaWarmupCallback",
    "ResidualCallback",
    "TernaryMonitorCallback",
    "WeightDecayAnnealCallback",
    "export_bitnet",
    "export_dense",
]
