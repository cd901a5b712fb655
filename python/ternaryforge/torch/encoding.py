# SPDX-License-Identifier: Apache-2.0
"""Stored latents to codes and scales, in NumPy terms: what export writes is what training multiplied with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ternaryforge.torch.qat import QATConfig
from ternaryforge.torch.quantizers import QUANTIZERS, Alphabet, make_quantizer
from ternaryforge.torch.scale_blocks import ScaleBlocks

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EncodedMatrix:
    """One trained matrix [rows, cols] as `code * scale + shift`.

    `scales` has the shape [1], [rows] or [rows, groups], `shifts` the same or None; `bias` [rows] is what the
    quantizer adds to the outputs, or None.
    """

    codes: NDArray[np.int8]
    scales: Float32
    shifts: Float32 | None
    bias: Float32 | None
    alphabet: Alphabet
    values: Float32


def learned_names(config: QATConfig) -> tuple[str, ...]:
    """What the quantizer of a layer stores beside the latents, by the names behind `quantizer.`."""
    return tuple(make_quantizer(config.quantizer, ScaleBlocks(4, 4), **config.options).state_dict())


def has_output_bias(config: QATConfig) -> bool:
    """Whether the quantizer adds to the outputs of every layer."""
    return QUANTIZERS[config.quantizer].has_output_bias


@torch.no_grad()
def encode_matrix(latents: Float32, config: QATConfig, learned: Mapping[str, Float32]) -> EncodedMatrix:
    """Codes and scales of latents [rows, cols], given what the quantizer learned (see `learned_names`).

    Raises ValueError for NaN or infinity, and where `learned` does not fit the matrix.
    """
    if not np.isfinite(latents).all() or not all(np.isfinite(value).all() for value in learned.values()):
        raise ValueError("the latents, or what was learned with them, hold NaN or infinity")
    rows, cols = latents.shape
    blocks = ScaleBlocks(rows, cols, config.scale, config.group_size)
    quantizer = make_quantizer(config.quantizer, blocks, **config.options)
    state: dict[str, Any] = {name: torch.tensor(value) for name, value in learned.items()}
    for name, tensor in quantizer.state_dict().items():
        if name not in state or state[name].shape != tensor.shape:
            got = list(state[name].shape) if name in state else "nothing"
            raise ValueError(f"quantizer.{name} has the shape {list(tensor.shape)} under this configuration, got {got}")
    quantizer.load_state_dict(state)
    split = blocks.split(torch.tensor(latents))
    encoded = quantizer.encode(split)
    shape = blocks.scale_shape
    return EncodedMatrix(
        codes=np.ascontiguousarray(blocks.join(encoded.codes).numpy()),
        scales=np.ascontiguousarray(encoded.scale.float().reshape(shape).numpy()),
        shifts=None if encoded.shift is None else encoded.shift.float().reshape(shape).numpy(),
        bias=quantizer.output_bias(split).float().numpy() if quantizer.has_output_bias else None,
        alphabet=quantizer.alphabet,
        values=np.ascontiguousarray(blocks.join(encoded.values()).float().numpy()),
    )
