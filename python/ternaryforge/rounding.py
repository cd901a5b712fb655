# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a model `convert` rounds, into what, and how far the result is from them. Reads no weights."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ternaryforge._core import FormatError
from ternaryforge.checkpoint_writer import TensorPlan
from ternaryforge.families import Architecture
from ternaryforge.families.base import Part
from ternaryforge.latents import LatentRule
from ternaryforge.quantization import ScaleKind
from ternaryforge.weights import packed_shape, scale_name

Scheme = Literal["ls", "absmean", "absmax", "twn"]

SCHEMES: tuple[Scheme, ...] = ("ls", "absmean", "absmax", "twn")
SCALES: tuple[ScaleKind, ...] = ("tensor", "row", "group")
_CHUNK_WEIGHTS = 1 << 20  # handled at once where a tensor is read or measured in parts


def check_options(scheme: str, scale: str, group_size: int, threads: int) -> None:
    """Raises ValueError for what `convert` does not know."""
    if scheme not in SCHEMES:
        raise ValueError(f"[convert] scheme is one of {', '.join(SCHEMES)}, got {scheme!r}")
    if scale not in SCALES:
        raise ValueError(f"[convert] scale is one of {', '.join(SCALES)}, got {scale!r}")
    if scale == "group" and (group_size < 64 or group_size % 64):
        raise ValueError(f"[convert] group_size is a positive multiple of 64, got {group_size}")
    if threads < 1:
        raise ValueError(f"[convert] threads is at least 1, got {threads}")


def scale_text(scale: str, group_size: int) -> str:
    """Options of `convert`, as a user writes them."""
    return f"scale='{scale}'" + (f", group_size={group_size}" if scale == "group" else "")


@dataclass(frozen=True, slots=True)
class RoundingOptions:
    """How weights are rounded; see `convert`, and `calibrate` for `planes`."""

    scheme: Scheme
    scale: ScaleKind
    group_size: int
    threads: int
    planes: int = 1

    def scale_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """The shape of the scales of a matrix."""
        match self.scale:
            case "tensor":
                return (1,)
            case "row":
                return (rows,)
            case "group":
                return (rows, -(-cols // self.group_size))

    def check_latents(self, architecture: Architecture, where: str) -> None:
        """Refuses any other rounding than the one that latents of training were made for."""
        if architecture.quantization is not None and (self.scheme, self.scale) != ("absmean", "tensor"):
            raise FormatError(
                f"[convert] '{where}': these weights were trained to be rounded by absmean per tensor "
                "(quantization_mode 'online'): use scheme='absmean', scale='tensor'"
            )
        if architecture.rules and self.scale != "tensor":
            raise FormatError(
                f"[convert] '{where}': the latents of {architecture.architecture} have a rule of their own with one "
                "scale per tensor: use scale='tensor'"
            )

    def may_keep_tables(self, architecture: Architecture) -> bool:
        """Whether embeddings and head are stored as trits where they are ternary as they stand."""
        return architecture.quantization is None and self.scale != "tensor"

    def rounded_tensors(self, tensors: Iterable[TensorPlan], shapes: Mapping[str, tuple[int, int]]) -> list[TensorPlan]:
        """The tensors of the result: those of the source, but codes and scales for the matrices of `shapes`."""
        plan = [tensor for tensor in tensors if tensor.name not in shapes]
        for name, (rows, cols) in shapes.items():
            plan.append(TensorPlan(name, "U8", packed_shape(rows, cols, self.planes)))
            plan.append(TensorPlan(scale_name(name), "F32", self.scale_shape(rows, cols)))
        return plan


def latent_rules(architecture: Architecture) -> dict[str, LatentRule]:
    """The tensors that become trits by a rule of their family, and the rule; none where two slots differ in it."""
    rules = {}
    for slot, rule in architecture.rules.items():
        name = architecture.tensor_names[slot]
        shared = {architecture.rules.get(other) for other, own in architecture.tensor_names.items() if own == name}
        if rule.kind != "int8" and len(shared) == 1:
            rules[name] = rule
    return rules


def rounded_shapes(architecture: Architecture, options: RoundingOptions, where: str) -> dict[str, tuple[int, int]]:
    """The tensors that `convert` rounds, and their shapes. Raises FormatError where one cannot be packed.

    A tensor that several slots share is rounded as a whole.
    """
    rules = latent_rules(architecture)
    rounds = architecture.is_linear if architecture.quantization is None else architecture.is_ternary
    shapes = {}
    for slot, (rows, cols) in architecture.spec.slots().items():
        name = architecture.tensor_names[slot]
        if not (name in rules if architecture.rules else rounds(slot)):
            continue
        stored = architecture.parts.get(slot, Part(0, rows)).total
        if options.scale == "tensor" and not rules and stored % 4:
            raise FormatError(
                f"[convert] '{where}': tensor '{name}' has {stored} rows; four rows share a byte, and plain "
                "transformers needs a multiple of 4: use scale='row' or scale='group'"
            )
        shapes[name] = (stored, cols)
    return shapes


def row_ranges(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of parts of about a million weights."""
    step = max(1, _CHUNK_WEIGHTS // cols)
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def zero_fraction(trits: NDArray[np.int8]) -> float:
    """How many of the trits are zero, of 1."""
    return 1 - int(np.count_nonzero(trits)) / trits.size


def relative_error(
    weights: NDArray[np.float32],
    trits: NDArray[np.int8],
    scales: NDArray[np.float32],
    group_size: int,
) -> float:
    """|w - trit * scale|^2 / |w|^2, in parts; 0 for weights that are all zero."""
    rows, cols = weights.shape
    error = energy = 0.0
    for begin, end in row_ranges(rows, cols):
        part = scales if scales.size == 1 else scales[begin:end]
        per_weight = part[:, None] if part.ndim == 1 else part.repeat(group_size, axis=1)[:, :cols]
        residual = weights[begin:end] - trits[begin:end] * per_weight
        error += float(np.square(residual, dtype=np.float64).sum())
        energy += float(np.square(weights[begin:end], dtype=np.float64).sum())
    return error / energy if energy else 0.0
