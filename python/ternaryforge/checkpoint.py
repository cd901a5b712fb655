# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoint folders in safetensors form, read without copies.

    checkpoint = Checkpoint.open("folder")             # or one .safetensors file
    checkpoint.config                                  # config.json as a dict ({} for a lone file)
    checkpoint.names                                   # tensor names, sorted
    checkpoint.info("model.norm.weight")               # dtype, shape, file
    checkpoint.raw("model.norm.weight")                # bytes as they lie in the file, zero copy
    checkpoint.read_float32("lm_head.weight", rows=(0, 1024))

Writing is the job of `checkpoint_writer.py`.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ternaryforge._core import FormatError

# Bytes per element of every dtype that a safetensors file may name. Only those of READABLE can be
# used for weights; the rest may lie in a file beside them.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOAT_DTYPES = ("F32", "F16", "BF16")
READABLE = (*FLOAT_DTYPES, "U8", "I8")

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1"}
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_JSON_BYTES = 100_000_000
_MAX_RANK = 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `begin` and `end` are byte offsets in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


class Checkpoint:
    """The tensors of one folder or file, memory-mapped. Views keep their mapping alive."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.config = config
        self.names = sorted(tensors)
        self._tensors = tensors
        self._maps: dict[Path, memoryview] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Opens a folder with config.json and safetensors, or one safetensors file.

        Raises FileNotFoundError where there is nothing, FormatError for what cannot be trusted:
        pickles, missing, truncated or inconsistent shards, malformed headers.
        """
        path = Path(path)
        if path.is_file():
            _refuse_pickle(path)
            return cls(path, {}, read_header(path))
        if not path.is_dir():
            raise FileNotFoundError(f"[checkpoint] no such file or folder: '{path}'")
        config_file = path / "config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        if (path / SINGLE_FILE).is_file():
            return cls(path, config, read_header(path / SINGLE_FILE))
        if (path / INDEX_FILE).is_file():
            return cls(path, config, _read_shards(path))
        for file in sorted(path.iterdir()):
            _refuse_pickle(file)
        raise FormatError(
            f"[checkpoint] '{path}' holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "name a folder of a Hugging Face checkpoint in safetensors form"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def files(self) -> list[Path]:
        """The safetensors files that hold the tensors."""
        return sorted({info.file for info in self._tensors.values()})

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor. Raises FormatError when there is none."""
        try:
            return self._tensors[name]
        except KeyError:
            raise FormatError(
                f"[checkpoint] '{self.path}': tensor '{name}' is missing; "
                "the checkpoint is incomplete or of another architecture"
            ) from None

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor as they lie in the file (read-only, not copied)."""
        info = self.info(name)
        if info.nbytes == 0:
            return memoryview(b"")
        if info.file not in self._maps:
            with info.file.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[info.file] = memoryview(mapping)
        return self._maps[info.file][info.begin : info.end]

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as stored, as a read-only view: F32, F16, U8, I8; BF16 as its bits in uint16.

        Raises FormatError for any other dtype.
        """
        info = self.info(name)
        if info.dtype not in READABLE:
            raise FormatError(
                f"[checkpoint] '{info.file}': tensor '{name}' has dtype {info.dtype}; "
                f"only {', '.join(READABLE)} can be used: save the checkpoint in one of them"
            )
        return np.frombuffer(self.raw(name), dtype=_NUMPY[info.dtype]).reshape(info.shape)

    def read_float32(self, name: str, *, rows: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """A floating-point tensor (F32, F16, BF16) as float32, exactly.

        `rows` = (first, last) reads only that part of the first axis, so that a large tensor can
        be handled in parts. F32 data is a read-only view of the file where it lies aligned.
        """
        info = self.info(name)
        if info.dtype not in FLOAT_DTYPES:
            raise FormatError(
                f"[checkpoint] '{info.file}': tensor '{name}' has dtype {info.dtype}, "
                f"expected floating point ({', '.join(FLOAT_DTYPES)})"
            )
        stored = self.read(name)
        if rows is not None:
            stored = stored[rows[0] : rows[1]]
        if info.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        if info.dtype == "F32" and not stored.flags.aligned:
            return stored.astype(np.float32, copy=True)
        return stored.astype(np.float32, copy=False)


def read_text(path: Path, *, limit: int, what: str) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises FormatError that begins with [`what`]."""
    if path.stat().st_size > limit:
        raise FormatError(f"[{what}] '{path}' is larger than {limit} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"[{what}] '{path}' is not UTF-8: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises FormatError for anything else, duplicate keys included."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise FormatError(f"[checkpoint] '{path}' is larger than {_MAX_JSON_BYTES} bytes")
    return _parse_object(path.read_bytes(), str(path))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, every field and offset checked against the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise FormatError(f"[checkpoint] '{path}' {_not_safetensors(start, length, size)}")
        header = _parse_object(file.read(length), str(path))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise FormatError(f"[checkpoint] '{path}': __metadata__ is not an object")
    data_begin = 8 + length
    tensors = {name: _parse_tensor(path, name, fields, data_begin) for name, fields in header.items()}
    _check_coverage(path, tensors, data_begin, size)
    return tensors


def _not_safetensors(start: bytes, length: int, size: int) -> str:
    if start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "is a pickle, which can run code; save the model in safetensors form"
    if start == b"version ":
        return "is a Git LFS pointer, not the file itself; run `git lfs pull`"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, not a safetensors file"
    return f"is truncated or no safetensors file: header of {length} bytes in a file of {size}; download it again"


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise FormatError(f"[checkpoint] '{where}': the name '{twice}' occurs twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"[checkpoint] '{where}' holds no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"[checkpoint] '{where}' holds no JSON object")
    return value


def _parse_tensor(path: Path, name: str, fields: object, data_begin: int) -> TensorInfo:
    where = f"[checkpoint] '{path}': tensor '{name}'"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(f"{where} has the unknown dtype {dtype!r}; save it as F32, F16 or BF16")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise FormatError(f"{where} has a malformed shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{where} has malformed data_offsets")
    begin, end = offsets
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise FormatError(
            f"{where}: dtype {dtype} and shape {shape} need {expected} bytes, its offsets give {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_begin + begin, data_begin + end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_coverage(path: Path, tensors: dict[str, TensorInfo], data_begin: int, file_size: int) -> None:
    """The tensors must cover the data exactly: no gap, no overlap, nothing behind the last one."""
    position = data_begin
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.end > file_size:
            raise FormatError(
                f"[checkpoint] '{path}' is truncated: tensor '{tensor.name}' ends at byte "
                f"{tensor.end}, the file has {file_size}; download it again"
            )
        if tensor.begin != position:
            kind = "overlaps the one before it" if tensor.begin < position else "follows a gap"
            raise FormatError(f"[checkpoint] '{path}': tensor '{tensor.name}' {kind}")
        position = tensor.end
    if position != file_size:
        raise FormatError(f"[checkpoint] '{path}': {file_size - position} bytes behind the last tensor")


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index_file = folder / INDEX_FILE
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"[checkpoint] '{index_file}' has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise FormatError(
                f"[checkpoint] '{index_file}': tensor '{name}' must name a file of this folder, not {shard!r}"
            )
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        _refuse_pickle(path)
        if not path.is_file():
            raise FormatError(f"[checkpoint] shard '{path}' is missing; download it again")
        for name, info in read_header(path).items():
            if weight_map.get(name) != shard:
                raise FormatError(f"[checkpoint] '{path}': tensor '{name}' is not placed there by {INDEX_FILE}")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise FormatError(
                f"[checkpoint] '{folder / shard}': tensor '{name}' of {INDEX_FILE} is not in it; download it again"
            )
    return tensors


def _refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLE_SUFFIXES:
        raise FormatError(
            f"[checkpoint] '{path}' is a pickle, which can run code when it is read; convert it "
            "to safetensors first (transformers: save_pretrained of the loaded model)"
        )
