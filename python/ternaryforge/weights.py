# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint folder as the weights of the core: every one checked, none copied.

Copies are made only of what the core cannot read in place: latents of quantisation-aware training,
packed parts of tensors that hold several layers, rows in another order.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from ternaryforge.families import Architecture
from ternaryforge.families.base import Part
from ternaryforge.latents import LatentRule, row_chunks
from ternaryforge.quantization import Convention, Quantization, ScaleKind

# Buffers that older checkpoints stored and that follow from the configuration.
_IGNORED = re.compile(r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_CHUNK_ELEMENTS = 1 << 22
# A scale this large is read by the wrong convention where its reciprocal suits the layer: trained
# layers have scales near 1 / sqrt(columns), far below 1 / 16.
_LARGE_SCALE = 16.0
_PLAUSIBLE_GAIN = (1 / 30, 30.0)  # scale * sqrt(columns), of the reciprocal
_ONLINE = LatentRule("absmean")


def load_weights(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, _core.formats.PackedTensor]:
    """All weights by slot. They keep the mapping of the checkpoint alive.

    Raises FormatError that names file and tensor: a missing, unknown or misshapen tensor, a dtype
    that does not fit the quantisation, a row count that cannot be packed, NaN or infinity, a code
    that is no trit, scales that were meant for the other convention.
    """
    check_tensor_names(checkpoint, architecture)
    _refuse_undeclared_latents(checkpoint, architecture)
    loader = _Loader(checkpoint, architecture)
    weights = {slot: loader.load(slot, *shape) for slot, shape in architecture.spec.slots().items()}
    if architecture.quantization is not None and architecture.quantization.strict:
        _check_convention(checkpoint, weights, architecture.quantization)
    return weights


def scale_name(name: str) -> str:
    """The tensor that holds the scale of a packed weight."""
    return name.removesuffix(".weight") + ".weight_scale"


def taken_rows(architecture: Architecture, slot: str, rows: int) -> NDArray[np.int64] | slice:
    """The rows of its tensor that a slot takes, neighbours of a rotation brought into halves."""
    first = architecture.parts.get(slot, Part(0, rows)).first
    head = architecture.pairs.get(slot)
    if head is None:
        return slice(first, first + rows)
    return first + np.arange(rows).reshape(-1, head // 2, 2).transpose(0, 2, 1).reshape(-1)


def mlx_names(name: str) -> tuple[str, str]:
    """The tensors that hold scales and biases of a weight that MLX packed."""
    module = name.removesuffix(".weight")
    return module + ".scales", module + ".biases"


def packed_rows(rows: int) -> int:
    """Rows of bytes for `rows` rows of codes; where four do not divide them, the last codes are zeros."""
    return -(-rows // 4)


def packed_shape(rows: int, cols: int, planes: int = 1) -> tuple[int, ...]:
    """The shape of the U8 tensor that holds the codes of one or two trit planes."""
    return (packed_rows(rows), cols) if planes == 1 else (2, packed_rows(rows), cols)


def is_two_plane(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a linear layer holds two planes: no other form has three dimensions."""
    return dtype == "U8" and len(shape) == 3


def check_tensor_names(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raises FormatError for a tensor that is missing, and for one that no part of the model takes."""
    for slot, name in architecture.tensor_names.items():
        if slot not in architecture.optional:
            checkpoint.info(name)
    known = set(architecture.tensor_names.values())
    for slot, name in architecture.tensor_names.items():
        if architecture.is_ternary(slot) or architecture.mode(slot) not in (None, "f16"):
            known.add(scale_name(name))
        if architecture.is_ternary(slot) and (
            architecture.quantization is not None and architecture.quantization.method == "mlx"
        ):
            known.update(mlx_names(name))
    head = "lm_head.weight"
    for name in checkpoint:
        if name in known or _IGNORED.fullmatch(name):
            continue
        info = checkpoint.info(name)
        if architecture.tied_head and name == head:
            _check_tied_head(checkpoint, info, architecture.tensor_names["embedding"])
            continue
        raise FormatError(
            f"[model] '{info.file}': tensor '{name}' is no part of {architecture.architecture} "
            "as config.json describes it"
        )


@dataclass(frozen=True, slots=True)
class _Codes:
    """A whole tensor as codes, of which slots take rows."""

    layout: Literal["t16", "t8", "int8"]
    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    scale_kind: ScaleKind
    group_size: int
    convention: Convention

    def rows(self, chosen: NDArray[np.int64] | slice) -> _core.formats.PackedTensor:
        codes = np.ascontiguousarray(self.codes[chosen])
        scales = self.scales if self.scale_kind == "tensor" else np.ascontiguousarray(self.scales[chosen])
        rows, cols = codes.shape
        return _core.formats.PackedTensor(
            self.layout,
            rows,
            cols,
            codes if self.layout == "int8" else _core.formats.pack(codes, self.layout),
            scale_kind=self.scale_kind,
            group_size=self.group_size,
            convention=self.convention,
            scales=scales.reshape(-1),
        )


class _Loader:
    """Slots one after the other; keeps the last tensor decoded, since neighbours share it."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        self._checkpoint = checkpoint
        self._architecture = architecture
        self._last: _Codes | None = None
        self._last_key = ""

    def load(self, slot: str, rows: int, cols: int) -> _core.formats.PackedTensor:
        """The weight of one slot, in whichever form the file holds it."""
        checkpoint, architecture = self._checkpoint, self._architecture
        name, quantization = architecture.tensor_names[slot], architecture.quantization
        if slot in architecture.optional and name not in checkpoint:
            return _core.formats.PackedTensor("f32", rows, cols, np.zeros((rows, cols), np.float32))
        info = checkpoint.info(name)
        if architecture.mode(slot) is not None and quantization is not None:
            return self._in_mode(slot, info, rows, cols, quantization)
        if architecture.is_ternary(slot) and quantization is not None and not quantization.online:
            if slot == "head" and quantization.strict:
                raise FormatError(
                    f"[model] '{checkpoint.path}': a ternary head ('{name}') is not supported in a 'bitnet' "
                    "checkpoint; keep it dense and list 'lm_head' in modules_to_not_convert"
                )
            if quantization.method == "mlx" and info.dtype == "U32":
                return self._packed_by_mlx(slot, info, rows, cols, quantization)
            if info.dtype == "U8" or quantization.strict:
                return self._packed(slot, info, rows, cols, quantization)
        rule = architecture.rules.get(slot)
        if rule is None and quantization is not None and quantization.online and architecture.is_ternary(slot):
            rule = _ONLINE
        if rule is not None:
            return self._from_latents(slot, info, rows, cols, rule)
        if quantization is not None and architecture.is_ternary(slot.removesuffix("_bias")):
            _check_bias(info, quantization)
        return self._dense(slot, info, rows, cols)

    def _in_mode(
        self, slot: str, info: TensorInfo, rows: int, cols: int, quantization: Quantization
    ) -> _core.formats.PackedTensor:
        """A matrix of which a bit map says how it is stored."""
        mode = self._architecture.mode(slot)
        expected = {"f16": ("F16", "BF16"), "int8": ("I8",)}.get(mode or "", ("U8",))
        if info.dtype not in expected:
            raise FormatError(
                f"[model] '{info.file}': tensor '{info.name}' has dtype {info.dtype}, expected "
                f"{' or '.join(expected)}, since layer_bit_map says {mode}"
            )
        match mode:
            case "f16":
                return self._dense(slot, info, rows, cols)
            case "int8":
                return self._int8(slot, info, rows, cols)
            case "binary":
                return self._binary(slot, info, rows, cols, quantization)
        return self._packed(slot, info, rows, cols, quantization)

    def _chosen(self, slot: str, rows: int) -> NDArray[np.int64] | slice:
        return taken_rows(self._architecture, slot, rows)

    def _stored_rows(self, slot: str, rows: int) -> int:
        return self._architecture.parts.get(slot, Part(0, rows)).total

    def _dense(self, slot: str, info: TensorInfo, rows: int, cols: int) -> _core.formats.PackedTensor:
        if info.dtype not in FLOAT_DTYPES:
            raise FormatError(
                f"[model] '{info.file}': tensor '{info.name}' has dtype {info.dtype}, expected floating point "
                f"({', '.join(FLOAT_DTYPES)}); a packed tensor needs a quantization_config that covers it"
            )
        # A vector is a norm or a bias: one row for the core.
        vector = len(info.shape) == 1 and rows == 1
        size = self._stored_rows(slot, cols if vector else rows)
        _check_shape(info, (size,) if vector else (size, cols))
        stored = self._checkpoint.read(info.name)
        chosen = self._chosen(slot, cols if vector else rows)
        part = stored[chosen]
        _check_finite(info, part)
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        return _core.formats.PackedTensor(info.dtype.lower(), rows, cols, data)

    def _packed(
        self, slot: str, info: TensorInfo, rows: int, cols: int, quantization: Quantization
    ) -> _core.formats.PackedTensor:
        stored_rows = self._stored_rows(slot, rows)
        if info.dtype in FLOAT_DTYPES and scale_name(info.name) in self._checkpoint:
            _check_shape(info, (stored_rows, cols))
            return self._unpacked(info, quantization).rows(self._chosen(slot, rows))
        if info.dtype != "U8":
            raise FormatError(
                f"[model] '{info.file}': tensor '{info.name}' has dtype {info.dtype}, expected U8 (packed "
                "ternary codes); list its module in modules_to_not_convert if it is dense"
            )
        if stored_rows % 4 and quantization.strict:
            raise FormatError(
                f"[model] '{info.file}': tensor '{info.name}' has {rows} rows; packed weights need a multiple "
                "of 4: keep this layer dense"
            )
        byte_rows = packed_rows(stored_rows)
        found = 2 if is_two_plane(info.dtype, info.shape) and not quantization.strict else 1
        planes = {"ternary": 1, "two_plane": 2}.get(self._architecture.mode(slot) or "", found)
        _check_shape(info, packed_shape(stored_rows, cols, planes), f": four of the {stored_rows} rows in a byte")
        layout: Literal["hf_packed", "two_plane"] = "hf_packed" if planes == 1 else "two_plane"
        raw = self._checkpoint.raw(info.name)
        if not _core.formats.hf_packed_is_valid(np.frombuffer(raw, np.uint8)):
            raise FormatError(
                f"[model] '{info.file}': tensor '{info.name}' holds the code 3, which is no trit; "
                "the checkpoint is damaged or in another format"
            )
        chosen = self._chosen(slot, rows)
        if isinstance(chosen, slice) and chosen == slice(0, stored_rows) and stored_rows % 4 == 0:
            return _core.formats.PackedTensor(
                layout,
                rows,
                cols,
                raw,
                scale_kind=quantization.scale,
                group_size=quantization.group_size,
                convention=quantization.convention,
                scales=_read_scales(self._checkpoint, info.name, rows, cols, quantization).reshape(-1),
            )

        def decode() -> _Codes:
            codes = _core.formats.unpack(np.frombuffer(raw, np.uint8), layout, 4 * byte_rows, cols)
            return self._ternary(info.name, codes[:stored_rows], quantization, "t16" if planes == 1 else "t8")

        return self._codes(info.name, decode).rows(chosen)

    def _int8(self, slot: str, info: TensorInfo, rows: int, cols: int) -> _core.formats.PackedTensor:
        stored_rows = self._stored_rows(slot, rows)
        _check_shape(info, (stored_rows, cols))
        codes = self._checkpoint.read(info.name)
        scales = _read_row_scales(self._checkpoint, info.name, stored_rows)
        return _Codes("int8", codes, scales, "row", 0, "multiply").rows(self._chosen(slot, rows))

    def _binary(
        self, slot: str, info: TensorInfo, rows: int, cols: int, quantization: Quantization
    ) -> _core.formats.PackedTensor:
        stored_rows = self._stored_rows(slot, rows)
        _check_shape(info, (stored_rows, -(-cols // 8)), f": eight of the {cols} columns in a byte")

        def decode() -> _Codes:
            raw = np.frombuffer(self._checkpoint.raw(info.name), np.uint8)
            try:
                codes = _core.formats.unpack(raw, "onebit_binary", stored_rows, cols)
            except ValueError as error:
                raise FormatError(f"[model] '{info.file}': tensor '{info.name}': {error}") from None
            return self._ternary(info.name, codes, quantization)

        return self._codes(info.name, decode).rows(self._chosen(slot, rows))

    def _packed_by_mlx(
        self, slot: str, info: TensorInfo, rows: int, cols: int, quantization: Quantization
    ) -> _core.formats.PackedTensor:
        stored_rows, size, bits = self._stored_rows(slot, rows), quantization.group_size, quantization.code_bits
        if cols % size:
            raise FormatError(
                f"[model] '{info.file}': tensor '{info.name}' has {cols} columns, which groups of {size} do not divide"
            )
        _check_shape(info, (stored_rows, cols * bits // 32), f": codes of {bits} bits in words of 32")

        def decode() -> _Codes:
            scales, biases = map(self._checkpoint.info, mlx_names(info.name))
            for other in (scales, biases):
                _check_shape(other, (stored_rows, cols // size))
            try:
                codes, found = _core.formats.decode_mlx(
                    np.frombuffer(self._checkpoint.raw(info.name), np.uint8),
                    self._checkpoint.read_float32(scales.name),
                    self._checkpoint.read_float32(biases.name),
                    bits=bits,
                    group_size=size,
                )
            except ValueError as error:
                raise FormatError(f"[model] '{info.file}': tensor '{info.name}' is not ternary: {error}") from None
            return _Codes("t16", codes, found, "group", size, "multiply")

        return self._codes(info.name, decode).rows(self._chosen(slot, rows))

    def _unpacked(self, info: TensorInfo, quantization: Quantization) -> _Codes:
        """Trits stored as floats beside their scale, as transformers saves an `autobitlinear` model again."""
        stored_rows, cols = info.shape

        def decode() -> _Codes:
            codes = np.empty((stored_rows, cols), np.int8)
            for begin, part in row_chunks(self._reader(info), (stored_rows, cols)):
                trits = codes[begin : begin + len(part)]
                trits[:] = np.sign(part)
                if not np.array_equal(trits, part):
                    raise FormatError(
                        f"[model] '{info.file}': tensor '{info.name}' has a '{scale_name(info.name)}' beside it and "
                        "must hold -1, 0 and 1 only; if it holds latents of training, set quantization_mode to "
                        "'online' and remove the scale"
                    )
            return self._ternary(info.name, codes, quantization)

        return self._codes(info.name, decode)

    def _ternary(
        self, name: str, codes: NDArray[np.int8], quantization: Quantization, layout: Literal["t16", "t8"] = "t16"
    ) -> _Codes:
        scales = _read_scales(self._checkpoint, name, codes.shape[0], codes.shape[1], quantization)
        return _Codes(layout, codes, scales, quantization.scale, quantization.group_size, quantization.convention)

    def _from_latents(
        self, slot: str, info: TensorInfo, rows: int, cols: int, rule: LatentRule
    ) -> _core.formats.PackedTensor:
        if info.dtype not in FLOAT_DTYPES:
            raise FormatError(
                f"[model] '{info.file}': tensor '{info.name}' has dtype {info.dtype}, expected floating point "
                "latents, as quantization_mode 'online' or the family says"
            )
        stored_rows = self._stored_rows(slot, rows)
        _check_shape(info, (stored_rows, cols))

        def decode() -> _Codes:
            _check_finite(info, self._checkpoint.read(info.name))
            codes, scales = rule.round(self._reader(info), (stored_rows, cols))
            kind: ScaleKind = "row" if rule.kind == "int8" else "tensor"
            convention: Convention = "divide" if rule.kind == "absmean" else "multiply"
            return _Codes("int8" if rule.kind == "int8" else "t16", codes, scales, kind, 0, convention)

        # Another rule for the same tensor (a head tied to embeddings) is another decoding.
        return self._codes(f"{info.name} by {rule}", decode).rows(self._chosen(slot, rows))

    def _reader(self, info: TensorInfo) -> Callable[[int, int], NDArray[np.float32]]:
        return lambda first, last: self._checkpoint.read_float32(info.name, rows=(first, last))

    def _codes(self, key: str, decode: Callable[[], _Codes]) -> _Codes:
        if self._last is None or self._last_key != key:
            self._last_key, self._last = key, decode()
        return self._last


def _refuse_undeclared_latents(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuses weights of a BitNet training that would run as if they were those of a dense model.

    Folders of onebitllms have `is_bitnet_config`. Without a quantization_config they hold either
    ternary weights as floats, which may run dense, or latents.
    """
    config = checkpoint.config
    if config.get("is_bitnet_config") is not True or config.get("quantization_config") is not None:
        return
    name = next(name for slot, name in architecture.tensor_names.items() if architecture.is_linear(slot))
    info = checkpoint.info(name)
    if info.dtype not in FLOAT_DTYPES or len(info.shape) != 2:
        return
    part = np.abs(checkpoint.read_float32(name, rows=(0, min(64, info.shape[0]))))
    if ((part > 0) & (part < part.max(1, keepdims=True))).any():
        fields = '{"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}'
        raise FormatError(
            f"[model] '{checkpoint.path / 'config.json'}': is_bitnet_config says that the weights were trained to be "
            f"ternary, but '{name}' is not, and nothing says how to round it; add \"quantization_config\": {fields}"
        )


def _check_bias(info: TensorInfo, quantization: Quantization) -> None:
    """Refuses a bias that transformers multiplies by the scale of the weights, which no one means."""
    if quantization.strict and quantization.convention == "multiply" and not quantization.online:
        raise FormatError(
            f"[model] '{info.file}': the bias '{info.name}' of a packed 'autobitlinear' layer is not supported; "
            "store the model with linear_class 'bitlinear'"
        )


def _check_tied_head(checkpoint: Checkpoint, head: TensorInfo, embedding: str) -> None:
    same = checkpoint.info(embedding)
    if (head.dtype, head.shape) != (same.dtype, same.shape) or not np.array_equal(
        np.frombuffer(checkpoint.raw(head.name), np.uint8),
        np.frombuffer(checkpoint.raw(embedding), np.uint8),
    ):
        raise FormatError(
            f"[model] '{head.file}': tensor '{head.name}' differs from '{embedding}' although "
            "tie_word_embeddings is true; set it to false"
        )


def _check_shape(info: TensorInfo, expected: tuple[int, ...], rule: str = " by config.json") -> None:
    if info.shape != expected:
        raise FormatError(
            f"[model] '{info.file}': tensor '{info.name}' has shape {list(info.shape)}, expected {list(expected)}{rule}"
        )


def _check_finite(info: TensorInfo, stored: NDArray[Any]) -> None:
    """Refuses NaN and infinity: all exponent bits are set."""
    exponent = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[info.dtype]
    bits: NDArray[Any] = stored.reshape(-1).view(np.uint32 if info.dtype == "F32" else np.uint16)
    for begin in range(0, bits.size, _CHUNK_ELEMENTS):
        part = bits[begin : begin + _CHUNK_ELEMENTS] & exponent
        if part.size and part.max() == exponent:
            raise FormatError(
                f"[model] '{info.file}': tensor '{info.name}' holds NaN or infinity; the checkpoint is damaged"
            )


def _read_row_scales(checkpoint: Checkpoint, name: str, rows: int) -> NDArray[np.float32]:
    info = checkpoint.info(scale_name(name))
    _check_shape(info, (rows,))
    scales = checkpoint.read_float32(info.name)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise FormatError(
            f"[model] '{info.file}': tensor '{info.name}' holds the unusable scale "
            f"{scales[~(scales >= 0) | ~np.isfinite(scales)][0]}; the checkpoint is damaged"
        )
    return scales


def _read_scales(
    checkpoint: Checkpoint, name: str, rows: int, cols: int, quantization: Quantization
) -> NDArray[np.float32]:
    name = scale_name(name)
    info = checkpoint.info(name)
    match quantization.scale:
        case "tensor":
            # Some writers store a tensor without dimensions.
            _check_shape(info, () if info.shape == () else (1,))
        case "row":
            _check_shape(info, (rows,))
        case "group":
            _check_shape(info, (rows, -(-cols // quantization.group_size)))
    scales = checkpoint.read_float32(name).reshape(info.shape or 1)
    usable = np.isfinite(scales)
    if quantization.convention == "divide":
        usable &= np.abs(scales) > 1 / np.finfo(np.float32).max  # so that 1 / scale is finite
    if not usable.all():
        raise FormatError(
            f"[model] '{info.file}': tensor '{name}' holds the unusable scale "
            f"{scales[~usable][0]}; the checkpoint is damaged"
        )
    return scales


def _check_convention(
    checkpoint: Checkpoint, weights: dict[str, _core.formats.PackedTensor], quantization: Quantization
) -> None:
    """Refuses scales that are huge as they are read and usual when read by the other convention.

    The median over all packed layers decides, so that one odd layer does not.
    """
    packed = [tensor for tensor in weights.values() if tensor.scale_kind == "tensor"]
    if not packed or quantization.online:
        return
    scales = np.array([abs(tensor.effective_scales[0]) for tensor in packed], np.float64)
    gains = np.sqrt([tensor.cols for tensor in packed]) / np.maximum(scales, np.finfo(np.float64).tiny)
    scale, gain = float(np.median(scales)), float(np.median(gains))
    if scale < _LARGE_SCALE or not _PLAUSIBLE_GAIN[0] <= gain <= _PLAUSIBLE_GAIN[1]:
        return
    used, other = (
        ("bitlinear", "autobitlinear") if quantization.convention == "divide" else ("autobitlinear", "bitlinear")
    )
    raise FormatError(
        f"[model] '{checkpoint.path / 'config.json'}': read as linear_class {used!r} says, the weights have a scale of "
        f"{scale:.4g} (median), and of {1 / scale:.4g} as linear_class {other!r} would read it, which is usual; set "
        f"quantization_config.linear_class to {other!r}"
    )
