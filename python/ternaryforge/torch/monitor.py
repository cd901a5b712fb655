# SPDX-License-Identifier: Apache-2.0
"""How the codes of a model in training look and move."""

import torch
from torch import Tensor, nn

from ternaryforge.torch.qat import qat_layers


class CodeMonitor:
    """Zero fraction and code flips since the last look, per kind of layer (the last part of its name).

    A flip rate of 0 over many steps means that the codes are frozen: the learning rate is too small for the
    scale, or the latents are in half precision.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """`zeros/KIND`, `flips/KIND` (after the first look) as shares of the weights, and both for `all`."""
        counts: dict[str, list[int]] = {}
        for name, layer in qat_layers(self._model):
            blocks = layer.quantizer.blocks
            codes = blocks.join(layer.quantizer.encode(blocks.split(layer.weight.detach())).codes)
            before = self._before.get(name)
            flips = int((codes != before).sum()) if before is not None else 0
            self._before[name] = codes
            for kind in (name.rpartition(".")[2], "all"):
                total = counts.setdefault(kind, [0, 0, 0, 0])
                seen = 0 if before is None else codes.numel()
                for i, value in enumerate((int((codes == 0).sum()), flips, codes.numel(), seen)):
                    total[i] += value
        figures = {}
        for kind, (zeros, flips, weights, seen) in counts.items():
            figures[f"zeros/{kind}"] = zeros / weights
            if seen:
                figures[f"flips/{kind}"] = flips / seen
        return figures
