# SPDX-License-Identifier: Apache-2.0
"""A dense checkpoint as bit maps would store it: what each matrix takes, its size to the byte, and the folder.

    mapped = MappedCheckpoint(checkpoint, architecture, options)
    mapped.file_bytes(bit_map)                  # of model.safetensors, before anything is rounded
    mapped.write("out", bit_map)

The size of the file is a sum over its matrices: every tensor has its room in the header, whatever
the offsets of the others are.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.bit_map import MODES, BitMap, Mode
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
from ternaryforge.families import Architecture
from ternaryforge.families.base import Part
from ternaryforge.mode_encoding import (
    Encoded,
    empty_file_bytes,
    encode,
    plan_matrix,
    stored_dtype,
    tensor_bytes,
)
from ternaryforge.rounding import RoundingOptions, row_ranges
from ternaryforge.weights import load_weights, scale_name

_LEAST_GROUP = 64


@dataclass(frozen=True, slots=True)
class Matrix:
    """One tensor that a map covers: its first slot (others are further rows), shape, and dtype in the source."""

    name: str
    slot: str
    rows: int
    cols: int
    dtype: str


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """What was written of one: relative_error is |w - stored|^2 / |w|^2."""

    name: str
    mode: Mode
    rows: int
    cols: int
    nbytes: int
    relative_error: float
    zero_fraction: float


class MappedCheckpoint:
    """Raises FormatError for a source that is quantised, ternary already, or has modes of its own."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, options: RoundingOptions) -> None:
        self._where = str(checkpoint.path / "config.json")
        if architecture.quantization is not None or architecture.rules:
            raise FormatError(
                f"[bit-map] '{self._where}': the weights are quantised already, or latents with modes of their own; "
                "a bit map needs the checkpoint in full precision"
            )
        load_weights(checkpoint, architecture)  # for its checks of every tensor
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.options = options
        self.matrices: dict[str, Matrix] = {}
        for slot, (rows, cols) in architecture.spec.slots().items():
            name = architecture.tensor_names[slot]
            if (architecture.is_linear(slot) or slot in ("embedding", "head")) and name not in self.matrices:
                stored = architecture.parts.get(slot, Part(0, rows)).total
                self.matrices[name] = Matrix(name, slot, stored, cols, checkpoint.info(name).dtype)
        self._kept = [
            TensorPlan(info.name, info.dtype, info.shape)
            for info in (checkpoint.info(name) for name in checkpoint)
            if info.name not in self.matrices and not (architecture.tied_head and info.name == "lm_head.weight")
        ]
        most = sum(max(self._data_bytes(matrix, mode) for mode in MODES) for matrix in self.matrices.values())
        self._digits = len(str(most + sum(tensor.nbytes for tensor in self._kept)))
        self._refuse_ternary()

    def _refuse_ternary(self) -> None:
        first = next(matrix for matrix in self.matrices.values() if matrix.slot not in ("embedding", "head"))
        weights = np.ascontiguousarray(self.checkpoint.read_float32(first.name))
        if _core.quant.find_ternary(weights, group_size=_LEAST_GROUP, threads=self.options.threads) is not None:
            raise FormatError(
                f"[bit-map] '{self._where}': the weights are ternary already; convert without a bit map keeps them "
                "exactly"
            )

    def check(self, bit_map: BitMap) -> None:
        """Raises FormatError where the map does not fit the model."""
        architecture = self.architecture
        bit_map.check(architecture.linear_modules(), len(architecture.spec.layers), tied_head=architecture.tied_head)

    def mode(self, bit_map: BitMap, name: str) -> Mode:
        """The mode of a matrix."""
        slot = self.matrices[name].slot
        return bit_map.mode(slot, self.architecture.module_of(slot))

    @property
    def fixed_bytes(self) -> int:
        """What the file holds beside the matrices."""
        return empty_file_bytes() + tensor_bytes(self._kept, self._digits)

    def matrix_bytes(self, name: str, mode: Mode) -> int:
        """What a matrix adds to the file in a mode: codes, scales, and its room in the header."""
        return tensor_bytes(self._plan_of(self.matrices[name], mode), self._digits)

    def file_bytes(self, bit_map: BitMap) -> int:
        """The size of model.safetensors."""
        return self.fixed_bytes + sum(self.matrix_bytes(name, self.mode(bit_map, name)) for name in self.matrices)

    def encode(self, name: str, mode: Mode) -> Encoded:
        """A matrix rounded into a mode."""
        matrix = self.matrices[name]
        weights = np.ascontiguousarray(self.checkpoint.read_float32(name))
        return encode(weights, mode, self.options, dtype=matrix.dtype, where=self._tensor_text(name))

    def write(
        self,
        out: str | os.PathLike[str],
        bit_map: BitMap,
        *,
        encoded: Callable[[str], Encoded | None] = lambda _: None,
        activation_bits: int | None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> tuple[int, list[StoredMatrix]]:
        """Writes the folder, all or nothing; returns the size of the weights file, and what the matrices became.

        `encoded` gives what is known of a matrix by its name, None to have it rounded here.
        `progress` is called after each tensor with the bytes of the source done, all of them, and its name.
        """
        self.check(bit_map)
        tensors = [*self._kept]
        for name, matrix in self.matrices.items():
            tensors += self._plan_of(matrix, self.mode(bit_map, name))
        size = self.file_bytes(bit_map)
        header = size - sum(tensor.nbytes for tensor in tensors)
        sizes = {name: self.checkpoint.info(name).nbytes for name in [tensor.name for tensor in self._kept]}
        sizes |= {name: self.checkpoint.info(name).nbytes for name in self.matrices}
        done, stored = 0, []
        with CheckpointWriter(out, tensors, header_bytes=header) as writer:
            for name, nbytes in sizes.items():
                if name in self.matrices:
                    stored.append(self._write_matrix(writer, name, self.mode(bit_map, name), encoded(name)))
                else:
                    writer.write(name, self.checkpoint.raw(name))
                done += nbytes
                if progress is not None:
                    progress(done, sum(sizes.values()), name)
            fields = {**self.checkpoint.config, "quantization_config": self._fields(bit_map, activation_bits)}
            writer.write_json("config.json", fields)
            writer.copy_companions(self.checkpoint.path)
        return size, stored

    def _write_matrix(self, writer: CheckpointWriter, name: str, mode: Mode, known: Encoded | None) -> StoredMatrix:
        matrix = self.matrices[name]
        dtype = stored_dtype(mode, matrix.dtype)
        scales, error, energy, zeros = [], 0.0, 0.0, 0
        with writer.writing(name) as part:
            for begin, end in self._parts(matrix, mode):
                weights = np.ascontiguousarray(self.checkpoint.read_float32(name, rows=(begin, end)))
                made = known or encode(weights, mode, self.options, dtype=matrix.dtype, where=self._tensor_text(name))
                codes, stored_scales = made.stored(dtype)
                part(codes.data)
                if stored_scales is not None:
                    scales.append(stored_scales)
                error += float(np.square(weights - made.values(), dtype=np.float64).sum())
                energy += float(np.square(weights, dtype=np.float64).sum())
                zeros += made.codes.size - int(np.count_nonzero(made.codes))
        if scales:
            writer.write(scale_name(name), np.concatenate(scales))
        nbytes = sum(tensor.nbytes for tensor in self._plan_of(matrix, mode))
        size = matrix.rows * matrix.cols
        return StoredMatrix(
            name, mode, matrix.rows, matrix.cols, nbytes, error / energy if energy else 0.0, zeros / size
        )

    def _parts(self, matrix: Matrix, mode: Mode) -> Iterator[tuple[int, int]]:
        if matrix.slot in ("embedding", "head") and mode in ("f16", "int8"):
            yield from row_ranges(matrix.rows, matrix.cols)  # tables can be far larger than layers
        else:
            yield 0, matrix.rows

    def _plan_of(self, matrix: Matrix, mode: Mode) -> list[TensorPlan]:
        return plan_matrix(matrix.name, mode, (matrix.rows, matrix.cols), self.options, dtype=matrix.dtype)

    def _data_bytes(self, matrix: Matrix, mode: Mode) -> int:
        return sum(tensor.nbytes for tensor in self._plan_of(matrix, mode))

    def _fields(self, bit_map: BitMap, activation_bits: int | None) -> dict[str, Any]:
        """quantization_config of the result."""
        fields: dict[str, Any] = {"quant_method": "ternaryforge", "scale": self.options.scale}
        if self.options.scale == "group":
            fields["group_size"] = self.options.group_size
        return fields | {"activation_bits": activation_bits, "layer_bit_map": bit_map.to_dict()}

    def _tensor_text(self, name: str) -> str:
        return f"[bit-map] '{self.checkpoint.info(name).file}': tensor '{name}'"
