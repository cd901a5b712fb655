# SPDX-License-Identifier: Apache-2.0
"""`.1bit` files: a whole model in one file that a small C program reads without a copy.

The format, byte by byte, is docs/reference/onebit.md; the C program is cpp/embedded.
"""

import os
import re
import struct
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.families import Architecture
from ternaryforge.onebit_tokenizer import StoredTokenizer, pack_tokenizer, unpack_tokenizer
from ternaryforge.tokenizer import Tokenizer

MAGIC = b"1BIT"
VERSION = 1
Activations = Literal["int8", "float"]
Mode = Literal["f32", "f16", "int8", "ternary", "binary"]
ScaleKind = Literal["none", "tensor", "row", "group"]

# magic, version, file bytes, CRC-32 of what follows; then the model
_HEADER = struct.Struct("<4sIII 5I3f I12x")
_CHECKED_FROM = 16
_LAYER = struct.Struct("<8I4f2I8x")
_ENTRY = struct.Struct("<7I4x")
_ALIGNMENT = 8
_MAX_FILE = (1 << 32) - 1

_TIED_HEAD, _POSITION_EMBEDDING, _INT8_ACTIVATIONS = 1, 2, 4
_ACTIVATIONS: tuple[Literal["silu", "relu2", "gelu", "relu"], ...] = ("silu", "relu2", "gelu", "relu")
_LAYER_FLAGS = ("projection_bias", "output_bias", "ffn_bias", "head_norms", "sub_norms", "post_norms", "gated")

MODES: tuple[Mode, ...] = get_args(Mode)
_LAYOUTS = {"f32": "f32", "f16": "f16", "int8": "int8", "ternary": "onebit", "binary": "onebit_binary"}
_SCALE_KINDS: tuple[ScaleKind, ...] = get_args(ScaleKind)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: codes or numbers as they lie there, and the scales, float32."""

    mode: Mode
    rows: int
    cols: int
    data: NDArray[np.uint8]
    scale_kind: ScaleKind = "none"
    group_size: int = 0
    scales: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return len(self.data) + (0 if self.scales is None else 4 * self.scales.size)

    def packed(self) -> _core.formats.PackedTensor:
        """The tensor for the core; ternary codes become run-time tiles."""
        layout = _LAYOUTS[self.mode]
        data = self.data
        if self.mode in {"ternary", "binary"}:
            trits = _core.formats.unpack(np.ascontiguousarray(data), layout, self.rows, self.cols)
            layout, data = "t16", _core.formats.pack(trits, "t16")
        return _core.formats.PackedTensor(
            layout,
            self.rows,
            self.cols,
            data,
            scale_kind=self.scale_kind,
            group_size=self.group_size,
            scales=self.scales,
        )


@dataclass(frozen=True, slots=True)
class OnebitFile:
    """A file that was read and checked. The tensors keep it mapped.

    `activations` is what the model was made for, "int8" or "float". `tensors` are by slot.
    """

    architecture: Architecture
    activations: Activations
    tensors: Mapping[str, StoredTensor]
    tokenizer: Tokenizer | None

    @property
    def layer_bit_map(self) -> dict[str, Any]:
        """How embedding, linear layers and head are stored, in the form that `search` writes."""
        layers: dict[int, dict[str, str]] = {}
        for slot, tensor in self.tensors.items():
            if slot.startswith("layers.") and tensor.rows > 1:
                _, index, name = slot.split(".")
                layers.setdefault(int(index), {})[name] = tensor.mode
        return {
            "embedding": self.tensors["embedding"].mode,
            "layer_modes": [layers[index] for index in sorted(layers)],
            "lm_head": self.tensors.get("head", self.tensors["embedding"]).mode,
        }


# ---- Reading ----


def read_onebit(path: str | os.PathLike[str]) -> OnebitFile:
    """Reads a `.1bit` file; the tensors stay mapped.

    Raises FormatError naming the file and what is wrong with it, OSError where it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            data = np.frombuffer(mmap(file.fileno(), 0, access=ACCESS_READ), np.uint8)
        except ValueError:  # an empty file cannot be mapped
            raise FormatError(f"[onebit] '{path}' is empty") from None
    try:
        return _Reader(path, data).read()
    except (FormatError, ValueError) as error:
        raise FormatError(f"[onebit] '{path}': {error}") from None


class _Reader:
    """Walks through the bytes of one file; every length is checked before it is used."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self._path = path
        self._data = data
        self._used = 0  # where the next tensor may begin

    def read(self) -> OnebitFile:
        if len(self._data) < _HEADER.size or bytes(self._data[:4]) != MAGIC:
            raise FormatError("this is no .1bit file: it does not begin with '1BIT'")
        header = _HEADER.unpack(self._bytes(0, _HEADER.size).data)
        _, version, size, checksum, vocab_size, hidden_size, layers, context, flags, *rest = header
        epsilon, embedding_scale, soft_cap, tokenizer_offset = rest
        if version != VERSION:
            raise FormatError(f"the file has version {version}; this reader knows version {VERSION}")
        if size != len(self._data):
            raise FormatError(f"the file has {len(self._data)} bytes and should have {size}: it is cut off or damaged")
        if zlib.crc32(self._data[_CHECKED_FROM:].data) != checksum:
            raise FormatError("the checksum does not fit: the file is damaged")
        _refuse_flags(flags, _TIED_HEAD | _POSITION_EMBEDDING | _INT8_ACTIVATIONS, "the model")
        if not 1 <= layers <= (size - _HEADER.size) // _LAYER.size:
            raise FormatError(f"{layers} layers do not fit the file")
        records = [_LAYER.unpack(self._bytes(_HEADER.size + i * _LAYER.size, _LAYER.size).data) for i in range(layers)]
        if 2 * sum(record[5] for record in records) > size:  # every pair has two rows of a matrix
            raise FormatError("the rotated pairs of the layers do not fit the file")
        spec = _core.model.ModelSpec(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            context_length=context,
            norm_epsilon=epsilon,
            layers=[self._layer(index, record) for index, record in enumerate(records)],
            tied_head=bool(flags & _TIED_HEAD),
            embedding_scale=embedding_scale,
            position_embedding=bool(flags & _POSITION_EMBEDDING),
            logit_soft_cap=soft_cap,
        )
        tokenizer = self._tokenizer(tokenizer_offset)
        tensors = self._tensors(spec, [record[13] for record in records])
        architecture = Architecture(
            family="onebit",
            architecture=".1bit",
            spec=spec,
            tensor_names={slot: slot for slot in tensors},
            tied_head=bool(flags & _TIED_HEAD),
            quantization=None,
            eos_ids=tokenizer.end_ids,
        )
        return OnebitFile(
            architecture=architecture,
            activations="int8" if flags & _INT8_ACTIVATIONS else "float",
            tensors=tensors,
            tokenizer=tokenizer.build(),
        )

    def _bytes(self, offset: int, size: int) -> NDArray[np.uint8]:
        if offset > len(self._data) or size > len(self._data) - offset:
            raise FormatError(f"{size} bytes at {offset} lie behind the end of the file")
        return self._data[offset : offset + size]

    def _layer(self, index: int, record: tuple[Any, ...]) -> _core.model.LayerSpec:
        heads, kv_heads, head_dim, ffn_size, window, pairs, activation, flags, *rest = record
        rotation_scale, attention_scale, soft_cap, residual_scale, rotation, _ = rest
        if activation >= len(_ACTIVATIONS):
            raise FormatError(f"layer {index} has the unknown activation {activation}")
        _refuse_flags(flags, (1 << len(_LAYER_FLAGS)) - 1, f"layer {index}")
        switches: dict[str, Any] = {name: bool(flags >> bit & 1) for bit, name in enumerate(_LAYER_FLAGS)}
        return _core.model.LayerSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotation=self._bytes(rotation, 4 * pairs).view("<f4").tolist(),
            rotation_scale=rotation_scale,
            attention_scale=attention_scale,
            attention_soft_cap=soft_cap,
            window=window,
            ffn_size=ffn_size,
            activation=_ACTIVATIONS[activation],
            residual_scale=residual_scale,
            **switches,
        )

    def _tensors(self, spec: _core.model.ModelSpec, tables: list[int]) -> dict[str, StoredTensor]:
        tensors = {}
        entry, current = _HEADER.size + len(tables) * _LAYER.size, ""
        self._used = entry + len(ordered_slots(spec)) * _ENTRY.size
        for slot, (rows, cols) in ordered_slots(spec).items():
            part = slot.rpartition(".")[0]
            if part != current:
                entry, current = tables[int(part.split(".")[1])], part
            tensors[slot] = self._tensor(slot, _ENTRY.unpack(self._bytes(entry, _ENTRY.size).data), rows, cols)
            entry += _ENTRY.size
        return tensors

    def _tensor(self, slot: str, entry: tuple[int, ...], rows: int, cols: int) -> StoredTensor:
        mode, stored_rows, stored_cols, kind, group_size, data, scales = entry
        if (stored_rows, stored_cols) != (rows, cols):
            raise FormatError(f"'{slot}' is {stored_rows} x {stored_cols}, the model has {rows} x {cols}")
        if mode >= len(MODES) or kind >= len(_SCALE_KINDS):
            raise FormatError(f"'{slot}' has the unknown mode {mode} or kind of scales {kind}")
        name, scale_kind = MODES[mode], _SCALE_KINDS[kind]
        allowed = {"f32": {"none"}, "f16": {"none"}, "int8": {"tensor", "row"}}.get(name, {"tensor", "row", "group"})
        if scale_kind not in allowed:
            raise FormatError(f"'{slot}' is {name} with scales of kind '{scale_kind}'")
        if (scale_kind == "group") != (group_size != 0):
            raise FormatError(f"'{slot}' has groups of {group_size} columns and scales of kind '{scale_kind}'")
        per_row = {"none": 0, "tensor": 0, "row": 1}.get(scale_kind, -(-cols // max(group_size, 1)))
        count = 1 if scale_kind == "tensor" else rows * per_row
        stored_scales = self._next_bytes(slot, scales, 4 * count).view("<f4") if count else None
        return StoredTensor(
            mode=name,
            rows=rows,
            cols=cols,
            data=self._next_bytes(slot, data, _core.formats.layout_bytes(_LAYOUTS[name], rows, cols)),
            scale_kind=scale_kind,
            group_size=group_size,
            scales=stored_scales,
        )

    def _next_bytes(self, slot: str, offset: int, size: int) -> NDArray[np.uint8]:
        """Bytes behind those of the tensors before: a small file cannot claim a large model."""
        if offset < self._used:
            raise FormatError(f"'{slot}' begins at {offset}, in other bytes of the model")
        self._used = offset + size
        return self._bytes(offset, size)

    def _tokenizer(self, offset: int) -> StoredTokenizer:
        if offset > len(self._data):
            raise FormatError("the tokenizer lies behind the end of the file")
        return unpack_tokenizer(self._data[offset:])


def _refuse_flags(flags: int, known: int, where: str) -> None:
    if flags & ~known:
        raise FormatError(f"{where} has the unknown flags {flags & ~known:#x}; a newer program wrote it")


def ordered_slots(spec: _core.model.ModelSpec) -> dict[str, tuple[int, int]]:
    """The slots of a model in the order of the tensor tables, with their shapes."""
    slots = spec.slots()
    order = ["embedding", "final_norm", "head", "position_embedding"]
    parts = re.findall(
        r"\w+",
        "attention_norm query query_bias key key_bias value value_bias query_norm key_norm attention_sub_norm output "
        "output_bias attention_post_norm ffn_norm gate gate_bias up up_bias ffn_sub_norm down down_bias ffn_post_norm",
    )
    order += [f"layers.{index}.{part}" for index in range(len(spec.layers)) for part in parts]
    unknown = slots.keys() - set(order)
    if unknown:
        raise FormatError(f"a .1bit file has no place for '{min(unknown)}'")
    return {slot: slots[slot] for slot in order if slot in slots}


# ---- Writing ----


class OnebitWriter:
    """Writes a `.1bit` file, one tensor after the other, all or nothing.

    Everything happens in a temporary file beside `path`, which takes its place when the `with`
    block ends without an error, and is removed otherwise. Tensors come in the order of
    `ordered_slots`. Raises ValueError beyond 4 GB.
    """

    def __init__(
        self, path: Path, spec: _core.model.ModelSpec, *, activations: Activations, tokenizer: StoredTokenizer
    ) -> None:
        self._path = path
        self._spec = spec
        self._flags = (
            _TIED_HEAD * spec.tied_head
            | _POSITION_EMBEDDING * spec.position_embedding
            | _INT8_ACTIVATIONS * (activations == "int8")
        )
        self._tokenizer = tokenizer
        self._missing = list(ordered_slots(spec))
        self._entries: list[bytes] = []
        self._layer_entries = [0] * len(spec.layers)  # the offset of each layer's part of the tensor table
        self._table = _HEADER.size + len(spec.layers) * _LAYER.size

    def __enter__(self) -> Self:
        self._temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex[:8]}")
        self._file = self._temporary.open("w+b")
        self._file.seek(self._table + len(self._missing) * _ENTRY.size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            self._file.close()
            if kind is None:
                self._temporary.replace(self._path)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def write(self, slot: str, tensor: StoredTensor) -> None:
        """Appends the tensor of the next slot."""
        if not self._missing or slot != self._missing[0]:
            raise ValueError(f"[onebit] the next tensor is {self._missing[:1]}, got '{slot}'")
        del self._missing[0]
        if slot.startswith("layers."):
            layer = int(slot.split(".")[1])
            self._layer_entries[layer] = self._layer_entries[layer] or self._table + len(self._entries) * _ENTRY.size
        scales = 0 if tensor.scales is None else self._append(tensor.scales.astype("<f4").tobytes())
        data = self._append(tensor.data.data)
        kind = _SCALE_KINDS.index(tensor.scale_kind)
        mode = MODES.index(tensor.mode)
        self._entries.append(_ENTRY.pack(mode, tensor.rows, tensor.cols, kind, tensor.group_size, data, scales))

    def _append(self, data: bytes | memoryview) -> int:
        """Writes at the next aligned offset, which it returns."""
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        self._file.write(data)
        if self._file.tell() > _MAX_FILE:
            raise ValueError(f"[onebit] '{self._path}': a .1bit file holds at most 4 GB")
        return offset

    def _finish(self) -> None:
        if self._missing:
            raise ValueError(f"[onebit] '{self._missing[0]}' was not written")
        spec = self._spec
        rotations: dict[tuple[float, ...], int] = {}
        layers = []
        for layer, entries in zip(spec.layers, self._layer_entries, strict=True):
            rotation = tuple(layer.rotation)
            if rotation not in rotations:
                rotations[rotation] = self._append(np.array(rotation, "<f4").tobytes())
            layers.append(_pack_layer(layer, rotations[rotation], entries))
        tokenizer = self._append(pack_tokenizer(self._tokenizer))
        size = self._file.tell()
        numbers = (spec.vocab_size, spec.hidden_size, len(layers), spec.context_length, self._flags)
        factors = (spec.norm_epsilon, spec.embedding_scale, spec.logit_soft_cap)
        self._file.seek(0)
        self._file.write(_HEADER.pack(MAGIC, VERSION, size, 0, *numbers, *factors, tokenizer))
        self._file.write(b"".join(layers + self._entries))
        self._file.seek(_CHECKED_FROM)
        checksum = 0
        while part := self._file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
        self._file.seek(0)
        self._file.write(_HEADER.pack(MAGIC, VERSION, size, checksum, *numbers, *factors, tokenizer))


def _pack_layer(layer: _core.model.LayerSpec, rotation: int, entries: int) -> bytes:
    if layer.activation not in _ACTIVATIONS or layer.norm != "rms" or layer.parallel:
        raise ValueError(
            f"[onebit] a .1bit file has no place for the activation '{layer.activation}', the norm '{layer.norm}' "
            f"{'or parallel halves ' if layer.parallel else ''}of this model"
        )
    return _LAYER.pack(
        layer.heads,
        layer.kv_heads,
        layer.head_dim,
        layer.ffn_size,
        layer.window,
        len(layer.rotation),
        _ACTIVATIONS.index(layer.activation),
        sum(bool(getattr(layer, name)) << bit for bit, name in enumerate(_LAYER_FLAGS)),
        layer.rotation_scale,
        layer.attention_scale,
        layer.attention_soft_cap,
        layer.residual_scale,
        rotation,
        entries,
    )
