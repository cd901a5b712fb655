# SPDX-License-Identifier: Apache-2.0
"""What changes while a model trains: strength, sharpness, residual; for plain loops and for callbacks.

for step in range(steps):
    set_strength(model, warmup_strength(step, 1000, "linear"))
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ternaryforge.torch.qat import QATLinear, qat_layers
from ternaryforge.torch.quantizers import TanhAnnealing

Schedule = Literal["linear", "cosine", "sigmoid", "exponential"]
SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine", "sigmoid", "exponential")

_SIGMOID_STEEPNESS = 10.0
_EXPONENT = 5.0


def warmup_strength(step: int, steps: int, schedule: Schedule = "linear") -> float:
    """Lambda of a warm-up over `steps`: 0 before the first step, 1 from the last on.

    With t = step / steps: linear t; cosine (1 - cos(pi t)) / 2; sigmoid 1 / (1 + exp(-10 (t - 1/2))), stretched to
    reach 0 and 1; exponential (exp(5 t) - 1) / (exp(5) - 1).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"[qat] schedule is one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if steps < 0:
        raise ValueError(f"[qat] warm-up steps are not negative, got {steps}")
    t = min(max(step / steps, 0.0), 1.0) if steps else 1.0
    match schedule:
        case "linear":
            return t
        case "cosine":
            return (1 - math.cos(math.pi * t)) / 2
        case "sigmoid":
            low, at, high = (1 / (1 + math.exp(-_SIGMOID_STEEPNESS * (x - 0.5))) for x in (0.0, t, 1.0))
            return (at - low) / (high - low)
        case "exponential":
            return math.expm1(_EXPONENT * t) / math.expm1(_EXPONENT)


def anneal_sharpness(step: int, steps: int, *, first: float = 1.0, last: float = 8.0) -> float | None:
    """Sharpness of tanh annealing, from `first` to `last` in equal steps; None, the hard form, from `steps` on."""
    return None if step >= steps else first + (last - first) * step / max(1, steps)


def residual_strength(step: int, steps: int, *, peak: float = 1.0, warmup: float = 0.1) -> float | None:
    """Weight of the Arenas residual: linear to `peak` over the share `warmup` of `steps`, then half a cosine to 0.

    None, no residual, from `steps` on: what is exported has none.
    """
    if step >= steps:
        return None
    rise = warmup * steps
    if step < rise:
        return peak * step / rise
    return peak * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def set_strength(model: nn.Module, strength: float | None) -> None:
    """Blends all layers: 0 is full precision, 1 quantised, None quantised and without the cost of blending."""
    for _, layer in qat_layers(model):
        layer.strength = _written(layer.strength, strength, layer)


def set_residual(model: nn.Module, residual: float | None) -> None:
    """Adds `residual` times the latents to the weights of all layers; None ends it.

    Raises ValueError unless the model was prepared with `residual=True`.
    """
    for name, layer in qat_layers(model):
        if not layer.qat.residual:
            raise ValueError(f"[qat] '{name}' was prepared without a residual: use QATConfig(residual=True)")
        layer.residual = _written(layer.residual, residual, layer)


def set_sharpness(model: nn.Module, sharpness: float | None) -> None:
    """Sets the sharpness of tanh annealing; None is the hard form. Raises ValueError without such a layer."""
    found = False
    for _, layer in qat_layers(model):
        quantizer = layer.quantizer
        if isinstance(quantizer, TanhAnnealing):
            quantizer.sharpness = _written(quantizer.sharpness, sharpness, layer)
            found = True
    if not found:
        raise ValueError("[qat] no layer anneals: use QATConfig(quantizer='tanh')")


def clip_latents(model: nn.Module, limit: float = 1.2) -> None:
    """Keeps latents of tanh annealing within `limit` units; call it after every step of the optimizer."""
    with torch.no_grad():
        for _, layer in qat_layers(model):
            quantizer = layer.quantizer
            if isinstance(quantizer, TanhAnnealing):
                blocks = quantizer.blocks
                bound = limit * quantizer.unit
                split = blocks.split(layer.weight)
                layer.weight.copy_(blocks.join(torch.maximum(torch.minimum(split, bound), -bound)))


def _written(buffer: Tensor | None, value: float | None, layer: QATLinear) -> Tensor | None:
    """The buffer with a value; a number in a tensor does not make compiled code compile again."""
    if value is None:
        return None
    if buffer is None:
        return torch.tensor(value, dtype=torch.float32, device=layer.weight.device)
    return buffer.fill_(value)
