# SPDX-License-Identifier: Apache-2.0
"""Reads an exported file back as any file is read, and compares it with what it was made of."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ternaryforge._core import FormatError
from ternaryforge.gguf.export_plan import ExportPlan, Planned
from ternaryforge.gguf.pre_tokenizers import PROBES
from ternaryforge.gguf.reading import GgufSource, Ternary


def verify(plan: ExportPlan, path: Path, *, threads: int) -> float:
    """The largest |difference| / |largest weight| over all tensors: 0 where every bit came back.

    Raises FormatError where trits or scales differ from what was meant to be written, or the
    tokenizer makes other tokens.
    """
    back = GgufSource.open(path)
    error = 0.0
    for tensor in plan.tensors:
        if tensor.slot is None:
            continue
        if tensor.storage is not None:
            error = max(error, _compare_ternary(plan, back, tensor, threads))
        else:
            error = max(error, _compare_floats(plan, back, tensor.slot, threads))
    _compare_tokenizers(plan, back)
    return error


def _compare_ternary(plan: ExportPlan, back: GgufSource, tensor: Planned, threads: int) -> float:
    if tensor.slot is None:
        raise AssertionError(tensor.name)
    source, read = plan.source.ternary(tensor.slot), back.matrix(tensor.slot, threads=threads)
    if source is None or read is None or not np.array_equal(source.trits, read.trits):
        raise FormatError(
            f"[export] tensor '{tensor.name}' came back with other trits; this is a defect of ternaryforge"
        )
    sizes = [matrix.group_size for matrix in (source, read) if matrix.kind == "group"]
    size = min(sizes, default=source.trits.shape[1])
    expected, found = _by_group(source, size), _by_group(read, size)
    largest = float(np.abs(expected).max(initial=0))
    if largest == 0 or np.array_equal(expected, found):
        return 0.0
    # A group whose trits are all 0 may have any scale.
    starts = np.arange(0, source.trits.shape[1], size)
    used = np.logical_or.reduceat(source.trits != 0, starts, axis=1)
    return float(np.abs(np.where(used, expected - found, 0)).max()) / largest


def _by_group(matrix: Ternary, size: int) -> NDArray[np.float32]:
    """The scale of every group of `size` columns: [rows, groups]."""
    rows, cols = matrix.trits.shape
    groups = -(-cols // size)
    if matrix.kind == "group":
        return matrix.scales.repeat(matrix.group_size // size, axis=1)[:, :groups]
    return np.broadcast_to(matrix.scales.reshape(-1, 1), (rows, groups))


def _compare_floats(plan: ExportPlan, back: GgufSource, slot: str, threads: int) -> float:
    rows = plan.source.architecture.spec.slots()[slot][0]
    difference = largest = 0.0
    whole = len(back.tensor(slot).shape) == 1 or plan.source.architecture.is_linear(slot)
    read = back.floats(slot, threads=threads) if whole else None
    begin = 0
    for part in plan.source.floats(slot):
        end = begin + len(part)
        found = back.floats(slot, (begin, end), threads=threads) if read is None else read.reshape(rows, -1)[begin:end]
        difference = max(difference, float(np.abs(part - found).max(initial=0)))
        largest = max(largest, float(np.abs(part).max(initial=0)))
        begin = end
    if difference == 0 or (back.known.unit_norms and slot.endswith("norm") and difference <= 1e-6 * (1 + largest)):
        return 0.0  # one was added to these and is taken off again
    return difference / largest if largest else difference


def _compare_tokenizers(plan: ExportPlan, back: GgufSource) -> None:
    source, read = plan.source.tokenizer, back.tokenizer()
    if source is None or read is None:
        return
    for probe in PROBES:
        if source.encode(probe) != read.encode(probe):
            text = (
                f"The tokenizer of the file makes other tokens than the model's, for example of {probe!r:.60}: engines "
                "will see the prompts differently."
            )
            if not plan.may_differ:
                raise FormatError(f"[export] {text} Name how text is cut with tokenizer_pre")
            plan.notes.append(text)
            return
