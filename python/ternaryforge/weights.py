# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint folder as the weights of the core: every one checked, none copied.

Only latents of quantisation-aware training (`quantization_mode: online`) become new arrays.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from ternaryforge.families import Architecture
from ternaryforge.quantization import Quantization

# Buffers that older checkpoints stored and that follow from the configuration.
_IGNORED = re.compile(r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_CHUNK_ELEMENTS = 1 << 22
_LATENT_FLOOR = 1e-5  # of the mean magnitude, as in transformers


def load_weights(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, _core.formats.PackedTensor]:
    """All weights by slot. They keep the mapping of the checkpoint alive.

    Raises FormatError that names file and tensor: a missing, unknown or misshapen tensor, a dtype
    that does not fit the quantisation, a row count that cannot be packed, NaN or infinity, a code
    that is no trit.
    """
    check_tensor_names(checkpoint, architecture)
    weights = {}
    for slot, (rows, cols) in architecture.spec.slots().items():
        name = architecture.tensor_names[slot]
        quantization = architecture.quantization
        if quantization is None or not architecture.is_ternary(slot):
            if quantization is not None and architecture.is_ternary(slot.removesuffix("_bias")):
                _check_bias(checkpoint.info(name), quantization)
            weights[slot] = _dense(checkpoint, name, rows, cols)
        elif slot == "head" and (quantization.strict or checkpoint.info(name).dtype == "U8"):
            raise FormatError(
                f"[model] '{checkpoint.path}': a ternary head ('{name}') is not supported; keep it "
                "dense and list 'lm_head' in modules_to_not_convert"
            )
        elif quantization.online:
            weights[slot] = _from_latents(checkpoint, name, rows, cols)
        elif not quantization.strict and checkpoint.info(name).dtype in FLOAT_DTYPES:
            weights[slot] = _dense(checkpoint, name, rows, cols)
        else:
            weights[slot] = _packed(checkpoint, name, rows, cols, quantization)
    return weights


def _check_bias(info: TensorInfo, quantization: Quantization) -> None:
    """Refuses a bias that transformers multiplies by the scale of the weights, which no one means."""
    if quantization.strict and quantization.convention == "multiply" and not quantization.online:
        raise FormatError(
            f"[model] '{info.file}': the bias '{info.name}' of a packed 'autobitlinear' layer is not supported; "
            "store the model with linear_class 'bitlinear'"
        )


def scale_name(name: str) -> str:
    """The tensor that holds the scale of a packed weight."""
    return name.removesuffix(".weight") + ".weight_scale"


def check_tensor_names(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raises FormatError for a tensor that is missing, and for one that no part of the model takes."""
    for name in architecture.tensor_names.values():
        checkpoint.info(name)
    known = set(architecture.tensor_names.values())
    for slot, name in architecture.tensor_names.items():
        if architecture.is_ternary(slot):
            known.add(scale_name(name))
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


def _check_shape(info: TensorInfo, expected: tuple[int, ...], rule: str = "") -> None:
    if info.shape != expected:
        raise FormatError(
            f"[model] '{info.file}': tensor '{info.name}' has shape {list(info.shape)}, expected {list(expected)}{rule}"
        )


def _dense(checkpoint: Checkpoint, name: str, rows: int, cols: int) -> _core.formats.PackedTensor:
    info = checkpoint.info(name)
    if info.dtype not in FLOAT_DTYPES:
        raise FormatError(
            f"[model] '{info.file}': tensor '{name}' has dtype {info.dtype}, expected floating point "
            f"({', '.join(FLOAT_DTYPES)}); a packed tensor needs a quantization_config that covers it"
        )
    # A vector is a norm or a bias: one row for the core.
    _check_shape(info, (cols,) if len(info.shape) == 1 and rows == 1 else (rows, cols))
    _check_finite(info, checkpoint.read(name))
    return _core.formats.PackedTensor(info.dtype.lower(), rows, cols, checkpoint.raw(name))


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


def _packed(
    checkpoint: Checkpoint, name: str, rows: int, cols: int, quantization: Quantization
) -> _core.formats.PackedTensor:
    info = checkpoint.info(name)
    if info.dtype != "U8":
        raise FormatError(
            f"[model] '{info.file}': tensor '{name}' has dtype {info.dtype}, expected U8 (packed "
            "ternary codes); list its module in modules_to_not_convert if it is dense"
        )
    if rows % 4:
        raise FormatError(
            f"[model] '{info.file}': tensor '{name}' has {rows} rows; packed weights need a multiple "
            "of 4: keep this layer dense"
        )
    _check_shape(info, (rows // 4, cols), f": four of the {rows} rows in a byte")
    codes = np.frombuffer(checkpoint.raw(name), np.uint8)
    if not _core.formats.hf_packed_is_valid(codes):
        raise FormatError(
            f"[model] '{info.file}': tensor '{name}' holds the code 3, which is no trit; "
            "the checkpoint is damaged or in another format"
        )
    return _core.formats.PackedTensor(
        "hf_packed",
        rows,
        cols,
        checkpoint.raw(name),
        scale_kind=quantization.scale,
        group_size=quantization.group_size,
        convention=quantization.convention,
        scales=_read_scales(checkpoint, name, rows, cols, quantization),
    )


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
    scales = checkpoint.read_float32(name).reshape(-1)
    usable = np.isfinite(scales)
    if quantization.convention == "divide":
        usable &= np.abs(scales) > 1 / np.finfo(np.float32).max  # so that 1 / scale is finite
    if not usable.all():
        raise FormatError(
            f"[model] '{info.file}': tensor '{name}' holds the unusable scale "
            f"{scales[~usable][0]}; the checkpoint is damaged"
        )
    return scales


def _from_latents(checkpoint: Checkpoint, name: str, rows: int, cols: int) -> _core.formats.PackedTensor:
    """Codes are round(w / s) in -1 .. 1 with s = max(mean |w|, 1e-5), all in float32."""
    info = checkpoint.info(name)
    if info.dtype not in FLOAT_DTYPES:
        raise FormatError(
            f"[model] '{info.file}': tensor '{name}' has dtype {info.dtype}, expected floating point "
            "latents, as quantization_mode 'online' says"
        )
    _check_shape(info, (rows, cols))
    _check_finite(info, checkpoint.read(name))
    total = sum(float(np.abs(part).sum(dtype=np.float64)) for _, part in _row_chunks(checkpoint, info))
    scale = np.float32(1) / np.maximum(np.float32(total / (rows * cols)), np.float32(_LATENT_FLOOR))
    trits = np.empty((rows, cols), np.int8)
    for begin, part in _row_chunks(checkpoint, info):
        rounded = np.clip(np.rint(part * scale), -1, 1)
        trits[begin : begin + len(part)] = rounded
    return _core.formats.PackedTensor(
        "t16",
        rows,
        cols,
        _core.formats.pack(trits, "t16"),
        scale_kind="tensor",
        convention="divide",
        scales=np.array([scale], np.float32),
    )


def _row_chunks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[tuple[int, NDArray[np.float32]]]:
    rows, cols = info.shape
    step = max(1, _CHUNK_ELEMENTS // cols)
    for begin in range(0, rows, step):
        yield begin, checkpoint.read_float32(info.name, rows=(begin, min(rows, begin + step)))
