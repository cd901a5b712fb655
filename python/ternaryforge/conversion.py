# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint folder becomes a ternary one, tensor by tensor.

    report = convert("llama", "llama-ternary")                          # plain transformers loads it
    report = convert("llama", "out", scale="group", group_size=64)      # finer scales, for this library

Linear layers become trits and scales; norms keep their bytes, and so do embeddings and head unless
they are ternary as they stand (with row or group scales).
What lies in the folder is described in docs/reference/formats.md.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.bit_map import BitMap, Mode, read_bit_map
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
from ternaryforge.families import Architecture, read_architecture
from ternaryforge.families.base import Part
from ternaryforge.mapped_checkpoint import MappedCheckpoint
from ternaryforge.memory import PeakAnonymous
from ternaryforge.quantization import Quantization, ScaleKind
from ternaryforge.report import Report
from ternaryforge.rounding import (
    SCALES,
    RoundingOptions,
    Scheme,
    check_options,
    latent_rules,
    relative_error,
    rounded_shapes,
    row_ranges,
    scale_text,
    zero_fraction,
)
from ternaryforge.weights import load_weights, packed_rows, scale_name

Progress = Callable[[int, int, str], None]

ROUNDED = (
    "these weights were not trained to be ternary, and rounding alone usually turns such a model into gibberish: "
    "measure the result with `ternaryforge evaluate` before using it"
)
"""The warning for dense weights that are rounded."""
_FINEST_GROUP = 64


@dataclass(frozen=True, slots=True)
class LinearConversion:
    """One matrix. `relative_error` is |w - stored|^2 / |w|^2."""

    name: str
    rows: int
    cols: int
    already_ternary: bool
    relative_error: float
    zero_fraction: float
    mode: Mode = "ternary"


@dataclass(frozen=True, slots=True)
class ConversionReport(Report):
    """What `convert` did. `tensors` counts the linear layers that are ternary now.

    `scheme` is None where the source was quantised already and is copied.
    `bits_per_weight` is codes and scales of those over `ternary_params`; `file_bytes` is the size of
    the weights file, and `file_bits_per_weight` spreads it over all parameters.
    `peak_anonymous_bytes` is the growth of the process's anonymous memory, None where the system
    does not tell. `already_ternary` names the layers that were kept as they were. `warnings` says what
    the user should know before using the result. With a `bit_map`, `linears` are all matrices that it
    covers, embedding and head included, and `bits_per_weight` is over them all.
    """

    source: str
    out: str
    scheme: str | None
    scale: str
    group_size: int | None
    tensors: int
    ternary_params: int
    bits_per_weight: float
    file_bits_per_weight: float
    file_bytes: int
    peak_anonymous_bytes: int | None
    seconds: float
    already_ternary: tuple[str, ...]
    warnings: tuple[str, ...]
    linears: tuple[LinearConversion, ...]
    bit_map: dict[str, Any] | None = None


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scheme: Scheme = "ls",
    scale: ScaleKind = "tensor",
    group_size: int = 128,
    bit_map: BitMap | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts the checkpoint folder `source` into the ternary checkpoint folder `out`.

    Args:
        source: Folder of a supported family with weights in bf16, f16 or f32, in one file or shards.
        out: A folder that does not exist yet, or is empty. Nothing appears there before all is done.
        scheme: `ls` exact least squares, `absmean` (BitNet b1.58), `absmax`, `twn`.
        scale: `tensor` writes a stock folder that plain transformers loads (with int8 activations);
            `row` or `group` a folder for this library.
        group_size: Columns that share a scale under `group`: a multiple of 64.
        bit_map: The mode of every layer, embedding and head (f16, int8, ternary, binary), as a JSON
            file or its content: docs/guide/bit-maps.md. Default: linear layers are ternary, the rest
            keeps its bytes.
        threads: Default: the physical cores at hand.
        progress: Called after each tensor with the bytes done, all bytes, and the tensor's name.

    Weights that are ternary already are kept exactly, whatever the scheme; a folder that is
    quantised already is copied; latents whose model has a rule of its own (Ternary-Core) are rounded
    by that rule, with scale="tensor". Other scales are exact in 16 bits, so that every export is lossless.

    Raises FormatError for a source that is malformed, unsupported, or cannot be kept exactly as
    asked (the text names the fix), ValueError for wrong options, FileExistsError and other OSError.
    """
    started = time.perf_counter()
    threads = _core.parallel.default_threads() if threads is None else threads
    check_options(scheme, scale, group_size, threads)
    source, out = Path(source), Path(out)
    real_source, real_out = source.resolve(), out.resolve()
    if real_out == real_source or real_source in real_out.parents:
        raise ValueError(f"[convert] the output must lie outside of the source, got '{out}'")
    options = RoundingOptions(scheme, scale, group_size, threads)
    if bit_map is not None:
        return _convert_mapped(source, out, read_bit_map(bit_map), options, progress)
    with PeakAnonymous() as memory:
        checkpoint = Checkpoint.open(source)
        where = str(source / "config.json")
        architecture = read_architecture(checkpoint.config, where=where)
        quantization = architecture.quantization
        if quantization is None or quantization.online:
            job: _Copy = _Rounding(checkpoint, architecture, options)
        else:
            job = _Copy(checkpoint, architecture)
            _check_kept(quantization, scale, group_size, where)
        file_bytes = job.write(out, progress)
    linears = tuple(job.linears)
    weights = sum(linear.rows * linear.cols for linear in linears)
    shapes = architecture.spec.slots().values()
    return ConversionReport(
        source=str(source),
        out=str(out),
        scheme=scheme if isinstance(job, _Rounding) else None,
        scale=scale,
        group_size=group_size if scale == "group" else None,
        tensors=len(linears),
        ternary_params=weights,
        bits_per_weight=8 * job.ternary_bytes / weights if weights else 0.0,
        file_bits_per_weight=8 * file_bytes / sum(rows * cols for rows, cols in shapes),
        file_bytes=file_bytes,
        peak_anonymous_bytes=memory.growth,
        seconds=time.perf_counter() - started,
        already_ternary=tuple(linear.name for linear in linears if linear.already_ternary),
        warnings=_warnings(quantization, linears, trained=bool(architecture.rules)),
        linears=linears,
    )


def _convert_mapped(
    source: Path, out: Path, bit_map: BitMap, options: RoundingOptions, progress: Progress | None
) -> ConversionReport:
    started = time.perf_counter()
    with PeakAnonymous() as memory:
        checkpoint = Checkpoint.open(source)
        architecture = read_architecture(checkpoint.config, where=str(source / "config.json"))
        mapped = MappedCheckpoint(checkpoint, architecture, options)
        bits = 8 if architecture.family == "bitnet" else 16
        file_bytes, stored = mapped.write(out, bit_map, activation_bits=bits, progress=progress)
    linears = tuple(
        LinearConversion(
            matrix.name, matrix.rows, matrix.cols, False, matrix.relative_error, matrix.zero_fraction, matrix.mode
        )
        for matrix in stored
    )
    weights = sum(linear.rows * linear.cols for linear in linears)
    few_bits = [linear for linear in linears if linear.mode in ("two_plane", "ternary", "binary")]
    return ConversionReport(
        source=str(source),
        out=str(out),
        scheme=options.scheme,
        scale=options.scale,
        group_size=options.group_size if options.scale == "group" else None,
        tensors=sum(linear.mode == "ternary" for linear in linears),
        ternary_params=sum(linear.rows * linear.cols for linear in linears if linear.mode == "ternary"),
        bits_per_weight=8 * sum(matrix.nbytes for matrix in stored) / weights,
        file_bits_per_weight=8 * file_bytes / sum(rows * cols for rows, cols in architecture.spec.slots().values()),
        file_bytes=file_bytes,
        peak_anonymous_bytes=memory.growth,
        seconds=time.perf_counter() - started,
        already_ternary=(),
        warnings=(ROUNDED,) if few_bits else (),
        linears=linears,
        bit_map=bit_map.to_dict(),
    )


def _warnings(
    quantization: Quantization | None, linears: tuple[LinearConversion, ...], *, trained: bool
) -> tuple[str, ...]:
    """Dense weights that were rounded and neither trained nor calibrated for it."""
    if quantization is not None or trained or all(linear.already_ternary for linear in linears):
        return ()
    return (ROUNDED,)


def _check_kept(quantization: Quantization, scale: str, group_size: int, where: str) -> None:
    """Refuses to store scales that exist already in another way."""
    if quantization.method == "mlx":
        raise FormatError(
            f"[convert] '{where}': MLX packed these weights, which run as they are; to store them otherwise, convert "
            "the unpacked folder of the model"
        )
    if (scale, group_size if scale == "group" else 0) != (
        quantization.scale,
        quantization.group_size,
    ):
        raise FormatError(
            f"[convert] '{where}': the weights are quantised already and are only copied: "
            f"use {scale_text(quantization.scale, quantization.group_size)}"
        )


class _Copy:
    """Writes a checkpoint that is ternary already, byte by byte."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        self._checkpoint = checkpoint
        self._architecture = architecture
        # For its checks of every tensor; latents of training are plain floats here.
        quantization = architecture.quantization
        online = quantization is None or quantization.online
        load_weights(checkpoint, replace(architecture, quantization=None, rules={}) if online else architecture)
        self._stored_rows = {
            architecture.tensor_names[slot]: architecture.parts.get(slot, Part(0, rows)).total
            for slot, (rows, _) in architecture.spec.slots().items()
        }
        self.linears: list[LinearConversion] = []
        self.ternary_bytes = 0

    def write(self, out: Path, progress: Progress | None) -> int:
        """Writes the folder; returns the size of the weights file."""
        checkpoint = self._checkpoint
        sizes = {name: checkpoint.info(name).nbytes for name in checkpoint}
        done = 0
        with CheckpointWriter(out, self._plan()) as writer:
            for name in checkpoint:
                self._write_tensor(writer, name)
                done += sizes[name]
                if progress is not None:
                    progress(done, sum(sizes.values()), name)
            self._write_config(writer)
            writer.copy_companions(checkpoint.path)
        return writer.file_bytes

    def _plan(self) -> list[TensorPlan]:
        infos = (self._checkpoint.info(name) for name in self._checkpoint)
        return [TensorPlan(info.name, info.dtype, info.shape) for info in infos]

    def _write_config(self, writer: CheckpointWriter) -> None:
        writer.copy_file(self._checkpoint.path / "config.json")

    def _write_tensor(self, writer: CheckpointWriter, name: str) -> None:
        writer.write(name, self._checkpoint.raw(name))
        info = self._checkpoint.info(name)
        if info.dtype != "U8":
            return
        rows, cols = self._stored_rows[name], info.shape[1]
        codes = np.frombuffer(self._checkpoint.raw(name), np.uint8)
        zeros = sum(int(np.count_nonzero((codes >> shift & 3) == 1)) for shift in (0, 2, 4, 6))
        zeros -= (4 * info.shape[0] - rows) * cols  # what fills the last rows of bytes
        self.linears.append(LinearConversion(name, rows, cols, True, 0.0, zeros / (rows * cols)))
        self.ternary_bytes += info.nbytes + self._checkpoint.info(scale_name(name)).nbytes


class _Rounding(_Copy):
    """Writes a checkpoint with floats in its linear layers as a ternary one."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, options: RoundingOptions) -> None:
        options.check_latents(architecture, str(checkpoint.path / "config.json"))
        super().__init__(checkpoint, architecture)
        self._options = options
        self._rules = latent_rules(architecture)
        self._shapes = rounded_shapes(architecture, options, str(checkpoint.path))
        self._tables: dict[str, str] = {}
        for slot in ("embedding", "head"):
            name = architecture.tensor_names.get(slot, "")
            if name and options.may_keep_tables(architecture) and self._is_ternary_table(name):
                self._tables[slot] = name
                self._shapes[name] = checkpoint.info(name).shape[0], checkpoint.info(name).shape[1]

    def _is_ternary_table(self, name: str) -> bool:
        """Whether embeddings or a head are ternary as they stand, and the scales asked for can keep them."""
        return all(self._find(part) is not None for part in self._parts(name))

    def _find(self, part: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
        """Trits, and scales in the shape of the options, of rows that are ternary as they stand."""
        options = self._options
        found = _core.quant.find_ternary(part, group_size=options.group_size, threads=options.threads)
        if found is None or SCALES.index(found[0]) > SCALES.index(options.scale):
            return None
        kind, trits, scales = found
        shape = options.scale_shape(*part.shape)
        if len(shape) == 2 and kind != "group":
            scales = scales[:, None]
        return trits, np.ascontiguousarray(np.broadcast_to(scales, shape))

    def _parts(self, name: str) -> Iterator[NDArray[np.float32]]:
        rows, cols = self._checkpoint.info(name).shape
        for chunk in row_ranges(rows, cols):
            yield self._checkpoint.read_float32(name, rows=chunk)

    def _plan(self) -> list[TensorPlan]:
        return self._options.rounded_tensors(super()._plan(), self._shapes)

    def _write_config(self, writer: CheckpointWriter) -> None:
        quantization = self._architecture.quantization
        trained = self._architecture.family == "bitnet" or quantization is not None
        kept = None if quantization is None else quantization.excluded
        if self._rules:
            fields: dict[str, Any] = {"quant_method": "ternaryforge", "scale": "tensor", "activation_bits": 16}
        elif self._options.scale == "tensor":
            fields = {
                "quant_method": "bitnet",
                "linear_class": "bitlinear",
                "quantization_mode": "offline",
            }
        else:
            fields = {"quant_method": "ternaryforge", "scale": self._options.scale}
            if self._options.scale == "group":
                fields["group_size"] = self._options.group_size
            fields["activation_bits"] = 8 if trained else 16
        if "embedding" in self._tables or self._architecture.tensor_names["embedding"] in self._rules:
            fields["ternary_embeddings"] = True
        kept = () if self._rules or "head" in self._tables else kept
        fields["modules_to_not_convert"] = ["lm_head"] if kept is None else list(kept)
        writer.write_json("config.json", {**self._checkpoint.config, "quantization_config": fields})

    def _write_tensor(self, writer: CheckpointWriter, name: str) -> None:
        if name not in self._shapes:
            writer.write(name, self._checkpoint.raw(name))
            return
        rows, cols = self._shapes[name]
        where = f"[convert] '{self._checkpoint.info(name).file}': tensor '{name}'"
        if name in self._tables.values():
            found = [part for part in map(self._find, self._parts(name)) if part is not None]
            trits, scales = (np.concatenate(parts) for parts in zip(*found, strict=True))
            self._write_trits(writer, name, trits, scales)
            self.linears.append(LinearConversion(name, rows, cols, True, 0.0, zero_fraction(trits)))
            return
        weights = self._read(name)
        if name in self._rules:
            trits, scales = self._rules[name].round(lambda first, last: weights[first:last], (rows, cols))
            already, stored = False, scales
        else:
            trits, scales, already = self._round(weights, where)
            stored = scales
        if self._options.scale == "tensor" and not self._rules:
            with np.errstate(over="ignore"):
                stored = np.float32(1) / scales
            if not np.isfinite(stored[0]):
                raise FormatError(
                    f"{where} has the scale {scales[0]}, whose reciprocal a stock checkpoint cannot "
                    "store: use scale='row'"
                )
            scales = np.float32(1) / stored
        self._write_trits(writer, name, trits, stored)
        error = relative_error(weights, trits, scales, self._options.group_size)
        self.linears.append(LinearConversion(name, rows, cols, already, error, zero_fraction(trits)))

    def _write_trits(
        self, writer: CheckpointWriter, name: str, trits: NDArray[np.int8], scales: NDArray[np.float32]
    ) -> None:
        rows, cols = trits.shape
        byte_rows = packed_rows(rows)
        if rows % 4:
            trits = np.concatenate([trits, np.zeros((4 * byte_rows - rows, cols), np.int8)])
        codes = _core.formats.pack(trits, "hf_packed")
        writer.write(name, codes.reshape(byte_rows, cols))
        writer.write(scale_name(name), scales)
        self.ternary_bytes += codes.nbytes + scales.nbytes

    def _read(self, name: str) -> NDArray[np.float32]:
        """The weights as float32: mapped where the file holds just that, else read in parts."""
        info = self._checkpoint.info(name)
        if info.dtype == "F32":
            return self._checkpoint.read_float32(name)
        weights = np.empty(info.shape, np.float32)
        for begin, end in row_ranges(*info.shape):
            weights[begin:end] = self._checkpoint.read_float32(name, rows=(begin, end))
        return weights

    def _round(self, weights: NDArray[np.float32], where: str) -> tuple[NDArray[np.int8], NDArray[np.float32], bool]:
        """Trits, scales, and whether the weights were ternary before."""
        options = self._options
        group = options.group_size if options.scale == "group" else _FINEST_GROUP
        kept = None if self._architecture.quantization is not None else self._keep(weights, group, where)
        if kept is not None:
            return *kept, True
        try:
            trits, scales = _core.quant.quantize_weights(
                weights,
                scheme=options.scheme,
                scale=options.scale,
                group_size=group,
                threads=options.threads,
            )
        except ValueError as error:
            raise FormatError(f"{where}: {error}") from None
        return trits, scales, False

    def _keep(
        self, weights: NDArray[np.float32], group: int, where: str
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
        """Trits and scales of weights that are ternary already; refuses what the scale cannot keep."""
        options = self._options
        found = _core.quant.find_ternary(weights, group_size=group, threads=options.threads)
        kind = "group" if found is None else found[0]
        if found is None or SCALES.index(kind) > SCALES.index(options.scale):
            for size in (256, 128, _FINEST_GROUP):
                if _core.quant.find_ternary(weights, group_size=size, threads=options.threads):
                    raise FormatError(
                        f"{where} is ternary already, with one scale per {kind}, which "
                        f"{scale_text(options.scale, options.group_size)} cannot keep: use {scale_text(kind, size)}"
                    )
            return None
        return self._find(weights)
