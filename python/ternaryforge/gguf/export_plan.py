# SPDX-License-Identifier: Apache-2.0
"""What an export will write: keys, tensors with their types, and the bytes of each of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.gguf.architectures import ROPE_FACTORS, is_norm, is_permuted, tensor_name, to_neighbours
from ternaryforge.gguf.export_source import TWO_PLANES, ExportSource, scaled
from ternaryforge.gguf.metadata import llama3_factors
from ternaryforge.gguf.metadata_writer import describe_model, written_architecture
from ternaryforge.gguf.producer import VERSION
from ternaryforge.gguf.profiles import (
    FILE_TYPES,
    Profile,
    Scales,
    Storage,
    choose_storage,
    is_half_exact,
    padded_size,
    refuse_architecture,
    type_order,
    warn_of,
)
from ternaryforge.gguf.reading import Ternary
from ternaryforge.gguf.vocabulary_writer import Entry, vocabulary_entries

HEAD_TYPES = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q6_K": 256}
"""What a head may be stored as, with the columns of a block."""


@dataclass(slots=True)
class Planned:
    """One tensor of the file: `rows` and `cols` as stored, `storage` for ternary ones; `slot` None for extras."""

    name: str
    slot: str | None
    rows: int
    cols: int
    type_name: str
    storage: Storage | None = None
    is_vector: bool = False
    value: NDArray[np.float32] | None = None
    nbytes: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first."""
        return (self.cols,) if self.is_vector else (self.rows, self.cols)


class ExportPlan:
    """Decides everything before anything is written. `notes` says what is not as in the source."""

    def __init__(
        self,
        source: ExportSource,
        profile: Profile,
        *,
        ternary_type: str | None,
        head: str | None,
        inline: bool,
        pre: str | None,
    ) -> None:
        self.source = source
        self.profile = profile
        self.notes: list[str] = []
        self.known = written_architecture(source.architecture, where=source.where)
        reason = refuse_architecture(profile, self.known, tied=source.architecture.tied_head)
        if reason is not None:
            raise FormatError(
                f"[export] '{source.where}': {source.architecture.architecture} cannot be exported with profile "
                f"'{profile.name}': {reason}"
            )
        self._types = type_order(profile, ternary_type)
        self._head = None if head is None else head.upper()
        if self._head is not None and self._head not in HEAD_TYPES:
            raise ValueError(f"[export] head is one of {', '.join(HEAD_TYPES)}, got {head!r}")
        # Where a profile has no other place for a scale, rounding it is what the profile means.
        self._inline = inline or not profile.sidecars
        self.pre = pre
        self.may_differ = False  # the tokens that engines make, as the notes say
        slots = source.architecture.spec.slots()
        self.ffn_size = slots["layers.0.up"][0]
        self._scales = {slot: source.scales_of(slot) for slot in slots if source.architecture.is_linear(slot)}
        self.stored_ffn_size = self._stored_ffn_size()
        self.tensors: list[Planned] = []
        for slot, (rows, cols) in slots.items():
            self._plan(slot, rows, cols)
        self._note_other_types()
        self.notes += warn_of(profile, self.known, {tensor.type_name for tensor in self.tensors})
        factors = llama3_factors(source.config, where=source.where)
        if factors is not None:
            self.tensors.append(Planned(ROPE_FACTORS, None, 1, factors.size, "F32", is_vector=True, value=factors))

    def _stored_ffn_size(self) -> int:
        """The size of the feed-forward part in the file: larger where no type holds its columns."""
        kinds = [found for slot, found in self._scales.items() if slot.endswith(".down") and found is not None]
        if not kinds or not self.known.pads_ffn:
            return self.ffn_size
        scales = kinds[0]
        chosen = choose_storage(self.profile, self._types, self.ffn_size, scales, inline=self._inline)
        if chosen is not None:
            return self.ffn_size
        # Of the types that would hold such scales in a layer of the right width.
        wide = {known.name: max(known.block, known.least_cols) for known in self._types}
        able = tuple(
            known
            for known in self._types
            if choose_storage(self.profile, (known,), wide[known.name], scales, inline=self._inline)
        )
        if not able:
            return self.ffn_size
        size = padded_size(able, self.ffn_size)
        self.notes.append(
            f"The feed-forward part is padded with zeros from {self.ffn_size} to {size}, so that a ternary type "
            "holds it; results are the same."
        )
        return size

    def _plan(self, slot: str, rows: int, cols: int) -> None:
        name, part = tensor_name(slot), slot.rpartition(".")[2]
        if part in {"gate", "up"}:
            rows = self.stored_ffn_size
        if part in {"down", "gate_bias", "up_bias"}:
            cols = self.stored_ffn_size
        found = self._scales.get(slot)
        if rows == 1 or is_norm(slot) or slot.endswith("_bias"):
            self.tensors.append(Planned(name, slot, 1, cols, "F32", is_vector=True))
            return
        if found is None:
            self.tensors.append(Planned(name, slot, rows, cols, self._dense_type(slot, cols)))
            return
        kind, group_size, scales = found
        storage = choose_storage(self.profile, self._types, cols, found, inline=self._inline)
        if storage is None:
            self._refuse_rounding(name, cols, found)
            type_name = "F16" if is_half_exact(scales) else "F32"
            self.tensors.append(Planned(name, slot, rows, cols, type_name))
            self.notes.append(
                f"{name} is written as {type_name}, which is exact: no ternary type of the profile holds {cols} "
                f"columns with a scale per {kind if kind != 'group' else f'{group_size} columns'}."
            )
            return
        self.tensors.append(Planned(name, slot, rows, cols, storage.type_name, storage))
        if storage.sidecar:
            scale = name.removesuffix("weight") + "scale"
            self.tensors.append(Planned(scale, None, 1, 1, "F32", is_vector=True, value=scales.reshape(1)))

    def _note_other_types(self) -> None:
        """Says which layers are of another type than the first that was tried, and why."""
        first = self._types[0].name
        other: dict[tuple[str, int], int] = {}
        for tensor in self.tensors:
            if tensor.storage is not None and tensor.type_name != first:
                key = (tensor.type_name, tensor.cols)
                other[key] = other.get(key, 0) + 1
        for (name, cols), count in other.items():
            self.notes.append(
                f"{count} layers with {cols} columns are written as {name}: {first} does not hold this width or such "
                "scales."
            )

    def _refuse_rounding(self, name: str, cols: int, found: Scales) -> None:
        """A layer that only the precision of its scales keeps out of every type is not blown up to 32 bits."""
        scales = found[2]
        rounded = choose_storage(self.profile, self._types, cols, found, inline=True)
        if rounded is None or is_half_exact(scales):
            return
        with np.errstate(over="ignore"):
            error = np.abs(scales.astype(np.float16).astype(np.float32) - scales) / np.maximum(np.abs(scales), 1e-38)
        other = ", or profile 'upstream'" if found[0] == "tensor" else ""
        raise FormatError(
            f"[export] '{self.source.where}': a scale of '{name}' is not exact in 16 bits, and profile "
            f"'{self.profile.name}' has no other place for it: use inline_scale=True (--inline-scale), which rounds it "
            f"by {float(error.max()):.1e}{other}"
        )

    def _dense_type(self, slot: str, cols: int) -> str:
        """As the source has it; the head as asked for."""
        tied = self.source.architecture.tied_head
        if self._head is not None and (slot == "head" or (slot == "embedding" and tied)):
            if cols % HEAD_TYPES[self._head]:
                raise FormatError(
                    f"[export] '{self.source.where}': a head with {cols} columns cannot be {self._head}, whose blocks "
                    f"have {HEAD_TYPES[self._head]}: use head='F16'"
                )
            return self._head
        stored = self.source.stored(slot)
        if stored is not None and stored[0] in HEAD_TYPES:
            return stored[0]
        dtype = self.source.dtype(slot)
        if dtype in TWO_PLANES:
            raise FormatError(
                f"[export] '{self.source.where}': '{slot}' holds two tied trit planes, which no GGUF type can; keep "
                "the folder, or calibrate with planes=1"
            )
        if dtype == "BF16" and slot in {"embedding", "head"}:
            # Every engine has fast code for F16, not all have it for BF16.
            return "F16" if all(is_half_exact(part) for part in self.source.floats(slot)) else "BF16"
        scales = self.source.scales_of(slot)
        if scales is not None and is_half_exact(scales[2]):
            return "F16"  # ternary ends, for which files have no type that engines look up
        return dtype if dtype in HEAD_TYPES else "F32"

    def entries(self, version: str) -> list[Entry]:
        """The keys of the file in order."""
        source = self.source
        entries = describe_model(
            source.config,
            source.architecture,
            self.known,
            name=source.path.resolve().stem,
            ffn_size=self.stored_ffn_size,
            notes=self.notes,
            where=source.where,
        )
        layers = [tensor.type_name for tensor in self.tensors if tensor.slot in self._scales]
        most = max(set(layers), key=layers.count)
        if most in FILE_TYPES:
            entries.append(("general.file_type", FILE_TYPES[most], "uint32"))
        entries.append((VERSION, version, "string"))
        vocabulary = source.vocabulary(self.pre)
        if vocabulary is None:
            self.notes.append("There is no tokenizer, so that engines can run the file with token ids only.")
        else:
            self.notes += vocabulary.warnings
            self.may_differ = self.pre is not None or bool(vocabulary.warnings)
            entries += vocabulary_entries(vocabulary)
        return entries

    def data(self, tensor: Planned, *, threads: int) -> Iterator[NDArray[np.generic]]:
        """The bytes of a tensor, in parts."""
        if tensor.value is not None:
            yield tensor.value
            return
        if tensor.slot is None:
            raise AssertionError(tensor.name)
        found = self.matrix(tensor) if tensor.slot in self._scales else None
        if found is not None and tensor.storage is not None:
            data = encode(found, tensor.storage, threads=threads)
            tensor.nbytes = data.nbytes
            yield data
        elif found is not None:
            yield _core.formats.quantize(tensor.type_name, scaled(found, 0, tensor.rows), threads=threads)
        else:
            yield from self._dense_data(tensor, threads)

    def matrix(self, tensor: Planned) -> Ternary | None:
        """A layer in the order and size of the file, with the scales that the file will have; None where dense."""
        if tensor.slot is None:
            raise AssertionError(tensor.name)
        found = self.source.ternary(tensor.slot)
        if found is None:
            return None
        trits, scales = found.trits, found.scales
        rows, cols = trits.shape
        if is_permuted(self.known, tensor.slot):
            head_dim = self._head_dim()
            trits = to_neighbours(trits, head_dim)
            scales = scales if found.kind == "tensor" else to_neighbours(scales, head_dim)
        if (tensor.rows, tensor.cols) != (rows, cols):
            trits = np.pad(trits, ((0, tensor.rows - rows), (0, tensor.cols - cols)))
            if found.kind != "tensor":
                # What scales zeros does not matter; the last scale keeps equal ones equal.
                width = [(0, tensor.rows - rows)]
                if found.kind == "group":
                    width.append((0, -(-tensor.cols // found.group_size) - scales.shape[1]))
                scales = np.pad(scales, width, mode="edge")
        if tensor.storage is not None and not tensor.storage.sidecar and self._inline:
            scales = self._rounded(tensor.storage, scales)
        return Ternary(np.ascontiguousarray(trits), found.kind, found.group_size, np.ascontiguousarray(scales))

    def _rounded(self, storage: Storage, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        half = next(known.half for known in self._types if known.name == storage.type_name)
        return scales.astype(np.float16).astype(np.float32) if half else scales

    def _head_dim(self) -> int:
        config = self.source.config
        size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return size

    def _dense_data(self, tensor: Planned, threads: int) -> Iterator[NDArray[np.generic]]:
        slot = tensor.slot
        if slot is None:
            raise AssertionError(tensor.name)
        stored = self.source.stored(slot)
        if stored is not None and stored[0] == tensor.type_name:
            yield stored[1]
            return
        if is_permuted(self.known, slot):
            whole = np.concatenate(list(self.source.floats(slot)))
            column = whole.reshape(-1, 1) if tensor.is_vector else whole
            parts: Iterator[NDArray[np.float32]] = iter([to_neighbours(column, self._head_dim()).reshape(whole.shape)])
        else:
            parts = self.source.floats(slot)
        for values in parts:
            if is_norm(slot) and self.known.unit_norms:
                values = values + np.float32(1)  # noqa: PLW2901
            missing = tensor.cols - values.shape[-1]
            if missing:
                values = np.pad(values, ((0, 0), (0, missing)))  # noqa: PLW2901
            yield _core.formats.quantize(tensor.type_name, np.ascontiguousarray(values), threads=threads)


def encode(matrix: Ternary, storage: Storage, *, threads: int) -> NDArray[np.uint8]:
    """A layer in the layout of its type. Raises ValueError where that is not exact."""
    scales = np.ones(1, np.float32) if storage.sidecar else matrix.scales
    return _core.formats.encode_ternary(
        storage.type_name.lower(), matrix.trits, scales, group_size=matrix.group_size, threads=threads
    )
