# SPDX-License-Identifier: Apache-2.0
"""What an export reads: the layers of a folder or of another GGUF file as trits and scales, or as floats in parts."""

import abc
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.checkpoint import Checkpoint, read_json
from ternaryforge.families import Architecture, read_architecture
from ternaryforge.families.base import Part
from ternaryforge.gguf.architectures import is_norm, is_permuted
from ternaryforge.gguf.profiles import Scales
from ternaryforge.gguf.reading import GgufSource, Ternary, first_part, is_gguf, with_quantization
from ternaryforge.gguf.vocabulary import Vocabulary
from ternaryforge.gguf.vocabulary_writer import describe_tokenizer
from ternaryforge.sources import find_source
from ternaryforge.tokenizer import Tokenizer
from ternaryforge.weights import load_weights, scale_name

_LEAST_GROUP = 64
_PROBED_ROWS = 8
_CHUNK_ELEMENTS = 1 << 22
_FLOATS = {"f32", "f16", "bf16"}
TWO_PLANES = {"two_plane", "t8"}
"""Layouts of two tied trit planes."""


class ExportSource(abc.ABC):
    """A model to be exported. `config` is its config.json, `where` the file that describes it, for errors.

    Every call reads anew, so that never more than one layer lies in memory.
    """

    def __init__(self, path: Path, where: str, config: dict[str, Any], architecture: Architecture) -> None:
        self.path = path
        self.where = where
        self.config = config
        self.architecture = architecture

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None where there is none; made once, since large ones take seconds."""
        return self._read_tokenizer()

    @abc.abstractmethod
    def _read_tokenizer(self) -> Tokenizer | None: ...

    @abc.abstractmethod
    def vocabulary(self, pre: str | None) -> Vocabulary | None:
        """The tokens for the file, None where there is no tokenizer. `pre`: how text is cut, by name."""

    @abc.abstractmethod
    def dtype(self, slot: str) -> str:
        """What the source holds: "F32", "F16" or "BF16" for floats, else the layout or type."""

    @abc.abstractmethod
    def scales_of(self, slot: str) -> Scales | None:
        """The scales of a ternary layer, None for other weights."""

    @abc.abstractmethod
    def ternary(self, slot: str) -> Ternary | None:
        """A linear layer as trits and scales, None where it is none. Floats that are trits times scales count."""

    def levels(self, slot: str) -> Ternary | None:
        """As `ternary`, and for a layer of two planes its levels -4 .. 4 in place of trits."""
        return self.ternary(slot)

    @abc.abstractmethod
    def floats(self, slot: str) -> Iterator[NDArray[np.float32]]:
        """The weights of a slot as float32 [rows, cols], in parts of whole rows."""

    @property
    @abc.abstractmethod
    def file_bytes(self) -> int:
        """Size of the files that hold the weights."""

    @abc.abstractmethod
    def stored_bytes(self, slot: str) -> int:
        """Bytes of a layer with its scales, as the source has them."""

    def stored(self, slot: str) -> tuple[str, NDArray[np.uint8]] | None:
        """Type and bytes of an embedding or a head that can be copied as they are, None where they cannot."""
        del slot
        return None


def open_source(source: str | os.PathLike[str], *, threads: int) -> ExportSource:
    """Opens a folder, a GGUF file, `org/name` of the hub or "demo". Raises FormatError and OSError."""
    path = find_source(source)
    return _GgufFile(path, threads) if is_gguf(path) else _Folder(path, threads)


class _Folder(ExportSource):
    def __init__(self, path: Path, threads: int) -> None:
        checkpoint = Checkpoint.open(path)
        if not checkpoint.config:
            raise FormatError(f"[export] '{path}' has no config.json; name the folder of a checkpoint")
        where = str(path / "config.json")
        architecture = read_architecture(checkpoint.config, where=where)
        super().__init__(path, where, checkpoint.config, architecture)
        self._files = checkpoint.files
        self._checkpoint = checkpoint
        self._weights: Mapping[str, _core.formats.PackedTensor] = load_weights(checkpoint, architecture)
        self._threads = threads

    def _read_tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_folder(self.path)

    def vocabulary(self, pre: str | None) -> Vocabulary | None:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return None
        ends = list(self.architecture.eos_ids)
        generation = self.path / "generation_config.json"
        if generation.is_file():
            value = read_json(generation).get("eos_token_id")
            ends += [item for item in (value if isinstance(value, list) else [value]) if type(item) is int]
        size = self.architecture.spec.vocab_size
        return describe_tokenizer(self.path, tokenizer, vocab_size=size, eos_ids=ends, pre=pre)

    def dtype(self, slot: str) -> str:
        layout = self._weights[slot].layout
        return layout.upper() if layout in _FLOATS else layout

    def scales_of(self, slot: str) -> Scales | None:
        weight = self._weights[slot]
        if _is_packed(weight) and weight.scale_kind != "none":
            return weight.scale_kind, weight.group_size, _shaped(weight)
        found = self.ternary(slot)
        return None if found is None else (found.kind, found.group_size, found.scales)

    def ternary(self, slot: str) -> Ternary | None:
        weight = self._weights[slot]
        if _is_packed(weight) and weight.scale_kind != "none":
            trits = _core.formats.unpack(weight.data, weight.layout, weight.rows, weight.cols)
            return Ternary(trits, weight.scale_kind, weight.group_size, _shaped(weight))
        if not self.architecture.is_linear(slot) or weight.layout not in _FLOATS:
            return None
        probe = np.ascontiguousarray(next(self._parts(slot, _PROBED_ROWS)))
        if _core.quant.find_ternary(probe, group_size=_LEAST_GROUP) is None:
            return None
        found = _core.quant.find_ternary(
            np.concatenate(list(self.floats(slot))), group_size=_LEAST_GROUP, threads=self._threads
        )
        if found is None:
            return None
        kind, trits, scales = found
        return Ternary(trits, kind, _LEAST_GROUP if kind == "group" else 0, scales)

    def levels(self, slot: str) -> Ternary | None:
        weight = self._weights[slot]
        if weight.layout not in TWO_PLANES or weight.scale_kind == "none":
            return self.ternary(slot)
        levels = _core.formats.unpack(weight.data, weight.layout, weight.rows, weight.cols)
        return Ternary(levels, weight.scale_kind, weight.group_size, _shaped(weight))

    def floats(self, slot: str) -> Iterator[NDArray[np.float32]]:
        return self._parts(slot, max(1, _CHUNK_ELEMENTS // self._weights[slot].cols))

    @property
    def file_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._files)

    def stored_bytes(self, slot: str) -> int:
        architecture, name = self.architecture, self.architecture.tensor_names[slot]
        rows = architecture.spec.slots()[slot][0]
        names = [name, scale_name(name)] if scale_name(name) in self._checkpoint else [name]
        nbytes = sum(self._checkpoint.info(stored).nbytes for stored in names)
        return nbytes * rows // architecture.parts.get(slot, Part(0, rows)).total

    def _parts(self, slot: str, step: int) -> Iterator[NDArray[np.float32]]:
        weight = self._weights[slot]
        bounds = [(begin, min(weight.rows, begin + step)) for begin in range(0, weight.rows, step)]
        if weight.layout in _FLOATS:
            stored = weight.data.reshape(weight.rows, -1)
            for begin, end in bounds:
                part = np.ascontiguousarray(stored[begin:end]).reshape(-1)
                yield _core.formats.dequantize(weight.layout.upper(), part, end - begin, weight.cols)
            return
        found = self.levels(slot)
        if found is None:
            raise FormatError(
                f"[export] '{self.where}': '{slot}' is stored as {weight.layout}, which cannot be exported; "
                "keep it in 16 bits"
            )
        for begin, end in bounds:
            yield scaled(found, begin, end)


class _GgufFile(ExportSource):
    def __init__(self, path: Path, threads: int) -> None:
        self._file = file = GgufSource.open(first_part(path))
        self._threads = threads
        linear = [slot for slot in file.architecture.spec.slots() if file.architecture.is_linear(slot)]
        found = {slot: file.matrix(slot, threads=threads) for slot in linear}
        self._scales = {
            slot: (matrix.kind, matrix.group_size, matrix.scales)
            for slot, matrix in found.items()
            if matrix is not None
        }
        quantization = file.quantization({slot: (kind, size) for slot, (kind, size, _) in self._scales.items()})
        config = {key: value for key, value in file.config.items() if value is not None}
        super().__init__(path, str(path), config, with_quantization(file.architecture, quantization))

    def _read_tokenizer(self) -> Tokenizer | None:
        return self._file.tokenizer()

    def vocabulary(self, pre: str | None) -> Vocabulary | None:
        del pre  # the file says it
        return self._file.vocabulary

    def dtype(self, slot: str) -> str:
        return self._file.tensor(slot).type_name

    def scales_of(self, slot: str) -> Scales | None:
        return self._scales.get(slot)

    def ternary(self, slot: str) -> Ternary | None:
        return self._file.matrix(slot, threads=self._threads) if slot in self._scales else None

    def floats(self, slot: str) -> Iterator[NDArray[np.float32]]:
        rows, cols = self.architecture.spec.slots()[slot]
        found = self.ternary(slot)
        step = max(1, _CHUNK_ELEMENTS // cols)
        if found is not None:
            yield from (scaled(found, begin, min(rows, begin + step)) for begin in range(0, rows, step))
        elif rows == 1 or is_norm(slot) or is_permuted(self._file.known, slot) or self.architecture.is_linear(slot):
            yield self._file.floats(slot, threads=self._threads).reshape(rows, cols)
        else:
            for begin in range(0, rows, step):
                yield self._file.floats(slot, (begin, min(rows, begin + step)), threads=self._threads)

    def stored(self, slot: str) -> tuple[str, NDArray[np.uint8]] | None:
        if slot not in {"embedding", "head"}:
            return None
        tensor = self._file.tensor(slot)
        return tensor.type_name, tensor.data

    @property
    def file_bytes(self) -> int:
        return sum(part.stat().st_size for part in self._file.file.paths)

    def stored_bytes(self, slot: str) -> int:
        return len(self._file.tensor(slot).data) + (4 if self._file.has_scale(slot) else 0)


def _is_packed(weight: _core.formats.PackedTensor) -> bool:
    return weight.layout in {"hf_packed", "t16", "t20"} and weight.scale_kind != "none"


def scaled(matrix: Ternary, begin: int, end: int) -> NDArray[np.float32]:
    """Rows of trit * scale."""
    trits = matrix.trits[begin:end].astype(np.float32)
    if matrix.kind == "group":
        scales = matrix.scales[begin:end].repeat(matrix.group_size, axis=1)[:, : trits.shape[1]]
    else:
        scales = matrix.scales if matrix.kind == "tensor" else matrix.scales[begin:end, None]
    trits *= scales
    return trits


def _shaped(weight: _core.formats.PackedTensor) -> NDArray[np.float32]:
    scales: NDArray[np.float32] = weight.effective_scales
    return scales.reshape(weight.rows, -1) if weight.scale_kind == "group" else scales.reshape(-1)
