# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a model: its architecture, its tokenizer, and its tensors as trits and scales or as floats.

source = GgufSource.open("model.gguf")
source.architecture                          # as read_architecture gives it for a folder
source.matrix("layers.0.query")              # Ternary, or None where the weights are no trits
weights = source.load(threads=2)             # what the core runs
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.families import Architecture, read_architecture
from ternaryforge.gguf.architectures import (
    ROPE_FACTORS,
    GgufArchitecture,
    is_norm,
    is_permuted,
    tensor_name,
    to_halves,
)
from ternaryforge.gguf.metadata import ACTIVATION_BITS, Metadata, read_config
from ternaryforge.gguf.vocabulary import Vocabulary, build_tokenizer, read_vocabulary
from ternaryforge.quantization import Quantization, ScaleKind, parse_quantization
from ternaryforge.tokenizer import Tokenizer

I2sLayout = Literal["128", "64", "rows4"]

PLAIN_TYPES = ("F32", "F16", "BF16")
DENSE_TYPES = (*PLAIN_TYPES, "Q8_0", "Q6_K", "Q4_0", "Q2_K")
TERNARY_TYPES = ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "PQ2_0", "PTQ1_0", "I2_S", "IQ1_BN", "IQ2_BN")
"""Types that hold nothing else. Q2_K, Q4_0 and floats may hold trits exactly."""
INT8_TYPES = ("I2_S", "IQ1_BN", "IQ2_BN")
"""Types of engines that round activations to 8 bits as the models were trained."""

BLOCK_COLUMNS = {
    "TQ1_0": 256, "TQ2_0": 256, "Q2_K": 256, "Q1_0": 128, "PQ2_0": 128, "PTQ1_0": 128, "Q2_0": 64, "Q4_0": 32,
}  # fmt: skip
_I2S_LAYOUTS: dict[str, str] = {"128": "i2_s", "64": "i2_s_64", "rows4": "i2_s_rows4"}
_LEAST_GROUP = 64
_PROBED_ROWS = 8
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Ternary:
    """A matrix trit * scale in the order of rows that a folder has. `scales`: [1], [rows] or [rows, groups]."""

    trits: NDArray[np.int8]
    kind: ScaleKind
    group_size: int
    scales: NDArray[np.float32]


class GgufSource:
    """An open file. Views of its tensors keep it mapped."""

    def __init__(
        self,
        path: Path,
        file: _core.io.GgufFile,
        config: dict[str, Any],
        architecture: Architecture,
        *,
        vocabulary: Vocabulary | None,
        i2s_layout: I2sLayout,
    ) -> None:
        self.path = path
        self.file = file
        self.config = config
        self.architecture = architecture
        self.vocabulary = vocabulary
        self._i2s_layout = i2s_layout

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, type_42: str = "", i2s_layout: I2sLayout = "128") -> Self:
        """Opens a file, or the first part of a split one, and checks its header and the names of its tensors.

        `type_42` says what the type number 42 means where the sizes leave it open; `i2s_layout` how
        I2_S tensors interleave: "128" (the official files), "64" (made by ARM builds of bitnet.cpp
        since 2026) or "rows4". Raises FormatError, OSError where the file cannot be read.
        """
        path = Path(path)
        if i2s_layout not in _I2S_LAYOUTS:
            raise ValueError(f"[gguf] i2s_layout is one of {', '.join(_I2S_LAYOUTS)}, got {i2s_layout!r}")
        file = _core.io.GgufFile(path, type_42=type_42)
        where = str(path)
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise FormatError(f"[gguf] '{where}' holds no matrix 'token_embd.weight': it is no language model")
        factors = file.tensors.get(ROPE_FACTORS)
        vocabulary = read_vocabulary(file.metadata, where=where)
        config = read_config(
            file.metadata,
            file.tensors.keys(),
            where=where,
            vocab_size=embedding.shape[0],
            rope_factors=None if factors is None else _vector(factors),
        )
        if vocabulary is not None:
            for name in ("bos_token", "eos_token", "pad_token"):
                if name in vocabulary.ids:
                    config[name + "_id"] = vocabulary.ids[name]
            if len(vocabulary.tokens) > embedding.shape[0]:
                raise FormatError(
                    f"[gguf] '{where}': {len(vocabulary.tokens)} tokens, but 'token_embd.weight' has "
                    f"{embedding.shape[0]} rows"
                )
        architecture = read_architecture({key: value for key, value in config.items() if value is not None},
                                         where=where)  # fmt: skip
        source = cls(path, file, config, architecture, vocabulary=vocabulary, i2s_layout=i2s_layout)
        source._check_tensors()
        return source

    @property
    def known(self) -> GgufArchitecture:
        """The architecture by its name in the file."""
        return Metadata(self.file.metadata, str(self.path)).architecture

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens after which a text ends."""
        return () if self.vocabulary is None else self.vocabulary.end_ids

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the file, None where it holds none."""
        return None if self.vocabulary is None else build_tokenizer(self.vocabulary, where=str(self.path))

    def tensor(self, slot: str) -> _core.io.GgufTensor:
        """The tensor of a slot."""
        return self.file.tensors[tensor_name(slot)]

    def load(self, *, threads: int) -> tuple[dict[str, _core.formats.PackedTensor], Quantization | None]:
        """All weights by slot, and what they are: None for dense ones."""
        weights = {}
        for slot, (rows, cols) in self.architecture.spec.slots().items():
            packed = self._pack(slot, threads) if self.architecture.is_linear(slot) else None
            weights[slot] = self._pack_dense(slot, rows, cols, threads) if packed is None else packed
        linear = {slot: weights[slot] for slot in weights if self.architecture.is_linear(slot)}
        kinds = {
            slot: (weight.scale_kind, weight.group_size)
            for slot, weight in linear.items()
            if weight.scale_kind != "none"
        }
        return weights, self.quantization(kinds)

    def quantization(self, kinds: Mapping[str, tuple[str, int]]) -> Quantization | None:
        """What a folder with such ternary layers would declare; see `quantization_config`."""
        config = self.quantization_config(kinds)
        return None if config is None else parse_quantization({"quantization_config": config}, where=str(self.path))

    def quantization_config(self, kinds: Mapping[str, tuple[str, int]]) -> dict[str, Any] | None:
        """The quantization_config of the ternary layers by slot: scale kind and group size of each.

        Stock, so that plain transformers reads the folder, where every scale is of a whole tensor,
        all linear layers are ternary, and the model was made for 8-bit activations or does not say.
        """
        if not kinds:
            return None
        order: tuple[ScaleKind, ...] = ("tensor", "row", "group")
        kind = order[max(order.index(kind) for kind, _ in kinds.values())]
        groups = {group for other, group in kinds.values() if other == "group"}
        linear = [slot for slot in self.architecture.spec.slots() if self.architecture.is_linear(slot)]
        bits = self.activation_bits(kind)
        biased = any(slot.endswith("_bias") for slot in self.architecture.spec.slots())
        if kind == "tensor" and bits == 8 and len(kinds) == len(linear) and not biased:
            return {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",  # the one whose scales are multiplied
                "quantization_mode": "offline",
                "modules_to_not_convert": ["lm_head"],
            }
        config: dict[str, Any] = {"quant_method": "ternaryforge", "scale": kind}
        if kind == "group":
            config["group_size"] = min(groups)
        return config | {"activation_bits": bits, "modules_to_not_convert": ["lm_head"]}

    def activation_bits(self, kind: str) -> int | None:
        """What the model was made for: 8 or 16 bits, None for floating point; 16 where nothing tells of 8."""
        said = self.file.metadata.get(ACTIVATION_BITS)
        if said is not None:
            if said not in (8, 16, 32):
                raise FormatError(f"[gguf] '{self.path}': {ACTIVATION_BITS} must be 8, 16 or 32, got {said!r:.80}")
            return None if said == 32 else int(said)
        types = {tensor.type_name for tensor in self.file.tensors.values()}
        is_int8 = kind == "tensor" or self.known.name.startswith("bitnet") or bool(types & set(INT8_TYPES))
        return 8 if is_int8 else 16

    def matrix(self, slot: str, *, threads: int = 1) -> Ternary | None:
        """A linear layer as trits and scales, None where it is none. Raises FormatError for damaged data."""
        tensor = self.tensor(slot)
        rows, cols = tensor.shape
        factor = self._factor(slot)
        if tensor.type_name in PLAIN_TYPES or tensor.type_name == "Q8_0":
            return self._found(slot, tensor, threads)
        try:
            trits, blocks = _core.formats.decode_ternary(self._layout(tensor), tensor.data, rows, cols, threads=threads)
        except FormatError as error:
            if tensor.type_name in TERNARY_TYPES:
                raise FormatError(f"[gguf] '{tensor.path}': tensor '{tensor.name}': {error}") from None
            return None
        if blocks.shape == (1, 1):
            return self._finish(slot, trits, "tensor", 0, blocks.reshape(1) * factor)
        unit = BLOCK_COLUMNS.get(tensor.type_name, cols)
        kind, group_size, scales = _core.formats.collapse_scales(blocks, cols, unit)
        if kind == "group" and group_size % _LEAST_GROUP:
            if tensor.type_name in TERNARY_TYPES:
                raise FormatError(
                    f"[gguf] '{tensor.path}': tensor '{tensor.name}' has scales for groups of {group_size} columns"
                )
            return None
        return self._finish(slot, trits, kind, group_size, scales * factor)

    def floats(self, slot: str, rows: tuple[int, int] | None = None, *, threads: int = 1) -> NDArray[np.float32]:
        """A tensor as float32, in the order and with the offset that a folder has; `rows` only a part of it.

        Parts of a permuted tensor are refused. Raises FormatError for NaN and infinity.
        """
        tensor = self.tensor(slot)
        count, cols = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
        begin, end = rows or (0, count)
        row_bytes = len(tensor.data) // count
        data = tensor.data[begin * row_bytes : end * row_bytes]
        if tensor.type_name not in DENSE_TYPES:
            raise _unknown_type(tensor)
        values = _core.formats.dequantize(tensor.type_name, data, end - begin, cols, threads=threads)
        if self.has_scale(slot):
            values = values * self._factor(slot)
        if not np.isfinite(values).all():
            raise FormatError(f"[gguf] '{tensor.path}': tensor '{tensor.name}' holds NaN or infinity; it is damaged")
        if len(tensor.shape) == 1:
            values = values.reshape(-1)
        if is_norm(slot) and self.known.unit_norms:
            values = values - np.float32(1)
        if is_permuted(self.known, slot):
            if rows is not None:
                raise ValueError(f"[gguf] '{slot}' can only be read whole")
            values = to_halves(values, self.config["head_dim"])
        return self._trimmed(slot, values, begin)

    def _found(self, slot: str, tensor: _core.io.GgufTensor, threads: int) -> Ternary | None:
        """Trits in floats, if they are ones; most are not, and a few rows show it."""
        probed = min(_PROBED_ROWS, tensor.shape[0])
        row_bytes = len(tensor.data) // tensor.shape[0]
        probe = _core.formats.dequantize(
            tensor.type_name, tensor.data[: probed * row_bytes], probed, tensor.shape[1], threads=threads
        )
        if not np.isfinite(probe).all() or _core.quant.find_ternary(probe, group_size=_LEAST_GROUP) is None:
            return None
        found = _core.quant.find_ternary(self.floats(slot, threads=threads), group_size=_LEAST_GROUP, threads=threads)
        if found is None:
            return None
        kind, trits, scales = found
        return Ternary(trits, kind, _LEAST_GROUP if kind == "group" else 0, scales)

    def _finish(
        self, slot: str, trits: NDArray[np.int8], kind: ScaleKind, group_size: int, scales: NDArray[np.float32]
    ) -> Ternary:
        """Rows back in order, padding cut off."""
        if is_permuted(self.known, slot):
            head_dim = self.config["head_dim"]
            trits = to_halves(trits, head_dim)
            if kind != "tensor":
                scales = to_halves(scales, head_dim)
        rows, cols = self.architecture.spec.slots()[slot]
        trits = np.ascontiguousarray(self._trimmed(slot, trits))
        if kind != "tensor":
            scales = scales[:rows]
        if kind == "group":
            scales = scales[:, : -(-cols // group_size)]
        return Ternary(trits, kind, group_size, np.ascontiguousarray(scales))

    def _trimmed(self, slot: str, values: NDArray[Any], begin: int = 0) -> NDArray[Any]:
        """Without the rows or columns that pad the feed-forward part, which must be zero."""
        rows, cols = self.architecture.spec.slots()[slot]
        if values.ndim == 1:
            padding, kept = values[cols:], values[:cols]
        else:
            last = max(0, min(len(values), rows - begin))
            padding, kept = np.append(values[last:].any(), values[:, cols:].any()), values[:last, :cols]
        if padding.any():
            raise FormatError(
                f"[gguf] '{self.path}': tensor '{tensor_name(slot)}' holds weights behind "
                "ternaryforge.feed_forward_length; remove that key"
            )
        return kept

    def _pack(self, slot: str, threads: int) -> _core.formats.PackedTensor | None:
        """A ternary layer for the core: the bytes of the file where rows lie in order, else new ones."""
        tensor = self.tensor(slot)
        shape = self.architecture.spec.slots()[slot]
        factor = self._factor(slot)
        if tensor.type_name in TERNARY_TYPES and shape == tensor.shape and not is_permuted(self.known, slot):
            scales = None if factor == 1 else np.array([factor], np.float32)
            file_bytes = _core.formats.PackedTensor(
                self._layout(tensor), *shape, tensor.data, scale_kind="none" if factor == 1 else "tensor", scales=scales
            )
            try:
                return _core.kernels.repack(file_bytes, "t16", threads=threads)
            except ValueError as error:
                raise FormatError(f"[gguf] '{tensor.path}': tensor '{tensor.name}': {error}") from None
        found = self.matrix(slot, threads=threads)
        if found is None:
            return None
        return _core.formats.PackedTensor(
            "t16",
            *shape,
            _core.formats.pack(found.trits, "t16"),
            scale_kind=found.kind,
            group_size=found.group_size,
            scales=found.scales.reshape(-1),
        )

    def _pack_dense(self, slot: str, rows: int, cols: int, threads: int) -> _core.formats.PackedTensor:
        tensor = self.tensor(slot)
        quantization = self.architecture.quantization
        if self.architecture.is_linear(slot) and quantization is not None and quantization.online:
            raise FormatError(
                f"[gguf] '{tensor.path}': tensor '{tensor.name}' of architecture {self.known.name} is not ternary: the "
                "file holds the latents of training; convert the model from its Hugging Face folder"
            )
        mapped = tensor.type_name in PLAIN_TYPES and rows * cols == np.prod(tensor.shape) and not self.has_scale(slot)
        if mapped and not is_permuted(self.known, slot) and not (is_norm(slot) and self.known.unit_norms):
            for begin, end in _parts(rows, cols):
                self.floats(slot, (begin, end) if rows > 1 else None)  # checked, not kept
            return _core.formats.PackedTensor(tensor.type_name.lower(), rows, cols, tensor.data)
        values = self.floats(slot, threads=threads)
        return _core.formats.PackedTensor("f32", rows, cols, np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def _layout(self, tensor: _core.io.GgufTensor) -> str:
        return _I2S_LAYOUTS[self._i2s_layout] if tensor.type_name == "I2_S" else tensor.type_name.lower()

    def has_scale(self, slot: str) -> bool:
        """Whether a `.scale` tensor stands beside a weight."""
        return _scale_name(slot) in self.file.tensors

    def _factor(self, slot: str) -> np.float32:
        """What the `.scale` tensor beside a weight multiplies it by."""
        tensor = self.file.tensors.get(_scale_name(slot))
        return np.float32(1) if tensor is None else np.float32(_vector(tensor)[0])

    def _check_tensors(self) -> None:
        """Every tensor that the architecture has must be there in its shape, and no other."""
        stored = Metadata(self.file.metadata, str(self.path)).size("feed_forward_length")
        true = self.config["intermediate_size"]
        extras = {ROPE_FACTORS}
        for slot, (rows, cols) in self.architecture.spec.slots().items():
            name = tensor_name(slot)
            part = slot.rpartition(".")[2]
            if part in {"gate", "up"} and rows == true:
                rows = stored  # noqa: PLW2901
            if part in {"down", "gate_bias", "up_bias", "ffn_sub_norm"} and cols == true:
                cols = stored  # noqa: PLW2901
            tensor = self.file.tensors.get(name)
            if tensor is None:
                raise FormatError(
                    f"[gguf] '{self.path}': tensor '{name}' is missing; the file is incomplete or its architecture is "
                    f"not {self.known.name}"
                )
            expected = (cols,) if rows == 1 and len(tensor.shape) == 1 else (rows, cols)
            if tensor.shape != expected:
                raise FormatError(
                    f"[gguf] '{tensor.path}': tensor '{name}' has shape {list(tensor.shape)}, expected {list(expected)}"
                )
            extras.add(name)
            if self.architecture.is_linear(slot):
                extras.add(_scale_name(slot))
        for tensor in self.file.tensors.values():
            self._check_use(tensor, extras)

    def _check_use(self, tensor: _core.io.GgufTensor, known: set[str]) -> None:
        """Refuses a tensor that no part of the model takes, or of a type that cannot be read."""
        name = tensor.name
        if name not in known:
            raise FormatError(
                f"[gguf] '{tensor.path}': tensor '{name}' is no part of the architecture {self.known.name} as it "
                "is known here; running without it would change the result"
            )
        if tensor.type_name not in {*TERNARY_TYPES, *DENSE_TYPES}:
            raise _unknown_type(tensor)
        if name.endswith(".scale") and (tensor.type_name != "F32" or np.prod(tensor.shape) != 1):
            raise FormatError(f"[gguf] '{tensor.path}': tensor '{name}' must be one number of type F32")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def with_quantization(architecture: Architecture, quantization: Quantization | None) -> Architecture:
    """The same architecture with what its weights turned out to be."""
    return dataclasses.replace(architecture, quantization=quantization)


def first_part(path: Path) -> Path:
    """The first file of a split model, whichever part is named."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    return path if match is None else path.with_name(f"{match[1]}-00001-of-{match[2]}.gguf")


def _scale_name(slot: str) -> str:
    return tensor_name(slot).removesuffix("weight") + "scale"


def _unknown_type(tensor: _core.io.GgufTensor) -> FormatError:
    known = ", ".join(dict.fromkeys((*DENSE_TYPES, *TERNARY_TYPES)))
    advice = f"supported are {known}"
    if tensor.type_name in TERNARY_TYPES:
        advice = f"it must be dense: {', '.join(DENSE_TYPES)}"
    elif tensor.type_name in {"TL1", "TL2"}:
        advice = "it is cut for the kernels of one build: take the model's own checkpoint or its I2_S file"
    return FormatError(
        f"[gguf] '{tensor.path}': tensor '{tensor.name}' has type {tensor.type_name}, which cannot be read here; "
        f"{advice}"
    )


def _vector(tensor: _core.io.GgufTensor) -> NDArray[np.float32]:
    if tensor.type_name != "F32":
        raise FormatError(f"[gguf] '{tensor.path}': tensor '{tensor.name}' must have type F32")
    values = np.frombuffer(tensor.data, np.float32)
    if not np.isfinite(values).all() or not values.all():
        raise FormatError(f"[gguf] '{tensor.path}': tensor '{tensor.name}' holds zero, NaN or infinity")
    return values


def _parts(rows: int, cols: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // cols)
    return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]
