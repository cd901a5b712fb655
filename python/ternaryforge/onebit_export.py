# SPDX-License-Identifier: Apache-2.0
"""Exports checkpoints as `.1bit` files and C headers, tensor by tensor."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.end_tokens import find_eos_ids
from ternaryforge.families import read_architecture
from ternaryforge.model import default_activations
from ternaryforge.onebit import Activations, OnebitWriter, StoredTensor, ordered_slots, read_onebit
from ternaryforge.onebit_tokenizer import store_tokenizer
from ternaryforge.report import Report
from ternaryforge.sources import find_source
from ternaryforge.tokenizer import Tokenizer
from ternaryforge.weights import load_weights

DenseType = Literal["f32", "f16", "int8"]
PackMode = Literal["ternary", "binary"]
_BYTES_PER_LINE = 24


@dataclass(frozen=True, slots=True)
class OnebitTensorReport:
    """One tensor of an export. `error` is the largest difference to the source; 0 where it is exact."""

    name: str
    mode: str
    bytes: int
    error: float


@dataclass(frozen=True, slots=True)
class OnebitReport(Report):
    """What `export_onebit` wrote.

    `exact`: every weight is that of the source. `tensors_by_type` counts the matrices.
    `layer_bit_map` has the form that `search` writes.
    """

    profile: str
    arch: str
    tensors: tuple[OnebitTensorReport, ...]
    tensors_by_type: dict[str, int]
    layer_bit_map: dict[str, Any]
    file_bytes: int
    exact: bool
    warnings: tuple[str, ...]


def export_onebit(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    head: DenseType = "f16",
    pack_mode: PackMode | None = None,
    emit_c_header: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> OnebitReport:
    """Writes a checkpoint as one `.1bit` file; with `emit_c_header` also `out` + ".h", a C array of it.

    `head` is how embedding, head and dense layers are stored: "f32", "f16", or "int8" with a scale
    per row. `pack_mode`: "ternary" takes 2 bits for every ternary layer; "binary" takes 1 bit and
    refuses a layer that holds a zero; None takes 1 bit where that is exact. The file appears when
    it is whole. Raises ValueError and FormatError that name what does not fit.
    """
    if head not in {"f32", "f16", "int8"}:
        raise ValueError(f"[export] head is 'f32', 'f16' or 'int8' in a .1bit file, got {head!r}")
    if pack_mode not in {None, "ternary", "binary"}:
        raise ValueError(f"[export] pack_mode is 'ternary' or 'binary', got {pack_mode!r}")
    out = Path(out)
    path = find_source(source)
    checkpoint = Checkpoint.open(path)
    architecture = read_architecture(checkpoint.config, where=str(path / "config.json"))
    weights = load_weights(checkpoint, architecture)
    tokenizer = Tokenizer.from_folder(path)
    stored_tokenizer, problem = store_tokenizer(tokenizer, find_eos_ids(path, architecture, tokenizer))
    activations: Activations = "int8" if default_activations(architecture.quantization) == "int8" else "float"
    reports = []
    slots = ordered_slots(architecture.spec)
    with OnebitWriter(out, architecture.spec, activations=activations, tokenizer=stored_tokenizer) as writer:
        for index, slot in enumerate(slots):
            tensor, error = _store(slot, weights[slot], head, pack_mode, architecture.spec.norm_offset)
            writer.write(slot, tensor)
            reports.append(OnebitTensorReport(slot, tensor.mode, tensor.nbytes, error))
            if progress is not None:
                progress(index + 1, len(slots))
    written = read_onebit(out)
    if emit_c_header:
        _write_header(out)
    matrices = [report.mode for report in reports if slots[report.name][0] > 1]
    return OnebitReport(
        profile="onebit",
        arch=architecture.architecture,
        tensors=tuple(reports),
        tensors_by_type={mode: matrices.count(mode) for mode in dict.fromkeys(matrices)},
        layer_bit_map=written.layer_bit_map,
        file_bytes=out.stat().st_size,
        exact=all(report.error == 0 for report in reports),
        warnings=() if problem is None else (f"the file takes and gives token ids only: {problem}",),
    )


def _store(
    slot: str, weight: _core.formats.PackedTensor, head: DenseType, pack_mode: PackMode | None, norm_offset: float
) -> tuple[StoredTensor, float]:
    """A tensor as it goes into the file, and the largest difference to the source."""
    rows, cols = weight.rows, weight.cols
    if weight.layout not in {"f32", "f16", "bf16", "int8"}:
        return _store_trits(slot, weight, pack_mode), 0.0
    values = _floats(weight)
    if rows == 1 and slot != "embedding":
        if slot.endswith("_norm"):
            values = values + np.float32(norm_offset)
        return StoredTensor("f32", rows, cols, _bytes(values)), 0.0
    if head == "f32":
        return StoredTensor("f32", rows, cols, _bytes(values)), 0.0
    if head == "f16":
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if not np.isfinite(half).all():
            raise ValueError(f"[export] '{slot}' holds {np.abs(values).max():g}, beyond 16-bit floats; take head='f32'")
        return StoredTensor("f16", rows, cols, _bytes(half)), _error(half.astype(np.float32), values)
    scales = np.abs(values).max(axis=1) / np.float32(127)
    codes = np.rint(values / np.where(scales == 0, np.float32(1), scales)[:, None]).astype(np.int8)
    stored = StoredTensor("int8", rows, cols, _bytes(codes), scale_kind="row", scales=scales)
    return stored, _error(codes * scales[:, None], values)


def _store_trits(slot: str, weight: _core.formats.PackedTensor, pack_mode: PackMode | None) -> StoredTensor:
    rows, cols = weight.rows, weight.cols
    if weight.layout in {"two_plane", "t8"}:
        raise ValueError(
            f"[export] '{slot}' holds two tied trit planes, which a .1bit file cannot; calibrate with planes=1"
        )
    trits = _core.formats.unpack(weight.data, weight.layout, rows, cols)
    binary = bool(trits.all())
    if pack_mode == "binary" and not binary:
        raise ValueError(f"[export] '{slot}' holds zeros, which one bit cannot say; take pack_mode='ternary'")
    binary = binary and pack_mode != "ternary"
    return StoredTensor(
        "binary" if binary else "ternary",
        rows,
        cols,
        _core.formats.pack(trits, "onebit_binary" if binary else "onebit"),
        scale_kind=weight.scale_kind,
        group_size=weight.group_size,
        scales=weight.effective_scales,
    )


def _floats(weight: _core.formats.PackedTensor) -> NDArray[np.float32]:
    data = np.ascontiguousarray(weight.data)
    match weight.layout:
        case "f32":
            values = data.view("<f4")
        case "f16":
            values = data.view("<f2").astype(np.float32)
        case "bf16":
            values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        case _:
            codes = data.view(np.int8).reshape(weight.rows, weight.cols)
            values = codes * weight.effective_scales.reshape(-1, 1)
    return values.reshape(weight.rows, weight.cols)


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _error(stored: NDArray[np.float32], values: NDArray[np.float32]) -> float:
    return float(np.abs(stored - values).max())


def _write_header(path: Path) -> None:
    """Writes the file as a C array, `path` + ".h"."""
    data = path.read_bytes()
    header = path.with_name(path.name + ".h")
    temporary = header.with_name(f".{header.name}.tmp")
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.write("/* A .1bit model for onebit.h, written by ternaryforge. */\n#include <stdint.h>\n\n")
            file.write(f"static const uint8_t onebit_file[{len(data)}] = {{\n")
            for begin in range(0, len(data), _BYTES_PER_LINE):
                file.write(",".join(map(str, data[begin : begin + _BYTES_PER_LINE])) + ",\n")
            file.write("};\n")
        temporary.replace(header)
    finally:
        temporary.unlink(missing_ok=True)
