# SPDX-License-Identifier: Apache-2.0
"""The quantizers again, in NumPy and float64, written from the formulas: value and gradients for one block.

Each function takes the weights of a block, the gradient g of its values and what is learned, and gives
the values, the gradient of the weights, and the gradients of what is learned.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Result = tuple[Float64, Float64, dict[str, float]]


def absmean(w: Float64, g: Float64, _: dict[str, float]) -> Result:
    s = np.abs(w).mean()
    return s * np.clip(np.rint(w / s), -1, 1), g, {}


def twn(w: Float64, g: Float64, _: dict[str, float], threshold: float = 0.7) -> Result:
    big = np.abs(w) > threshold * np.abs(w).mean()
    return np.where(big, np.sign(w) * np.abs(w)[big].mean(), 0), g, {}


def binary(w: Float64, g: Float64, _: dict[str, float]) -> Result:
    return np.where(w < 0, -1, 1) * np.abs(w).mean(), g, {}


def sherry(w: Float64, g: Float64, _: dict[str, float]) -> Result:
    codes = np.where(w < 0, -1.0, 1.0)
    for start in range(0, len(w), 4):
        codes[start + np.abs(w[start : start + 4]).argmin()] = 0
    return codes * np.abs(w[codes != 0]).mean(), g, {}


def lsq(w: Float64, g: Float64, learned: dict[str, float]) -> Result:
    a, u = learned["scale"], w / learned["scale"]
    inside = np.abs(u) <= 1
    per_scale = np.where(inside, np.rint(u) - u, np.sign(u))
    return a * np.clip(np.rint(u), -1, 1), g * inside, {"scale": (g * per_scale).sum() / len(w) ** 0.5}


def seq(w: Float64, g: Float64, learned: dict[str, float], parts: float = 1.5, offset: float = 0.0) -> Result:
    a, u = learned["scale"], w / learned["scale"]
    inside = np.abs(u) <= 0.99
    levels = (np.rint(np.clip(u, -0.99, 0.99) * parts - offset) + offset) / parts
    return a * levels, g * inside, {"scale": (g * (levels - u * inside)).sum() / len(w) ** 0.5}


def four_levels(w: Float64, g: Float64, learned: dict[str, float]) -> Result:
    return seq(w, g, learned, parts=2.0, offset=0.5)


def dlt(w: Float64, g: Float64, learned: dict[str, float]) -> Result:
    shift = learned["shift"]
    values, grad, grads = lsq(w - shift, g, learned)
    outside = np.abs(w - shift) > learned["scale"]
    return values + shift, grad, {**grads, "shift": (g * outside).sum() / len(w) ** 0.5}


def adaptive(w: Float64, g: Float64, learned: dict[str, float]) -> Result:
    codes = np.sign(w) * (np.abs(w) > 0.7 * np.abs(w).mean())
    return learned["scale"] * codes, g, {"scale": (g * codes).sum()}


def tanh_soft(w: Float64, g: Float64, learned: dict[str, float], sharpness: float = 3.0) -> Result:
    u = np.clip(w / learned["unit"], -1.5, 1.5)
    low, high = np.tanh(sharpness * (u - 0.7)), np.tanh(sharpness * (u + 0.7))
    slope = sharpness * ((1 - low**2) + (1 - high**2)) / 2
    return learned["unit"] * (low + high) / 2, g * slope * (np.abs(w / learned["unit"]) <= 1.5), {}


def tanh_hard(w: Float64, g: Float64, learned: dict[str, float]) -> Result:
    return learned["unit"] * np.sign(w) * (np.abs(w) > 0.7 * learned["unit"]), g, {}


WITNESSES: dict[str, Callable[..., Any]] = {
    "absmean": absmean,
    "twn": twn,
    "lsq": lsq,
    "seq": seq,
    "dlt": dlt,
    "tequila": absmean,
    "sherry": sherry,
    "tanh": tanh_hard,
    "adaptive": adaptive,
    "four_levels": four_levels,
    "binary": binary,
}
