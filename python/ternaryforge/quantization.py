# SPDX-License-Identifier: Apache-2.0
"""`quantization_config` of a config.json: what the stored weights mean.

Three kinds are known. `bitnet` is the one of transformers: one scale per tensor, whose convention
follows from `linear_class` alone (bitlinear: stored is 1 / scale, autobitlinear: stored is scale).
`ternaryforge` is ours: a scale per tensor, row or group of columns, always multiplied. `mlx` is the
affine one of MLX with groups that hold nothing but -s, 0 and s (field `quantization`).
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from ternaryforge._core import FormatError
from ternaryforge.bit_map import BitMap, parse_bit_map

ScaleKind = Literal["tensor", "row", "group"]
Convention = Literal["multiply", "divide"]

_BITNET_FIELDS = {
    "quant_method",
    "linear_class",
    "quantization_mode",
    "modules_to_not_convert",
    "use_rms_norm",
    "rms_norm_eps",  # of the norm that use_rms_norm would add
}
_TERNARYFORGE_FIELDS = {
    "quant_method",
    "scale",
    "group_size",
    "activation_bits",
    "modules_to_not_convert",
    "ternary_embeddings",
    "layer_bit_map",
    "version",
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linear layers of a checkpoint are stored.

    `online`: the file holds float latents, which are made ternary by their mean magnitude at load.
    `activation_bits`: what the model was made for; None is floating point. `excluded` are the
    patterns of modules that stay dense, None for "the head alone". `strict`: every linear layer
    that is not excluded must be ternary (`bitnet`); otherwise its dtype tells (`ternaryforge`).
    `ternary_embeddings`: the table of embeddings may be ternary too. `code_bits`: of MLX's codes, else 2.
    `bit_map`: the mode of every matrix, embedding and head included; None where there are only two.
    """

    method: Literal["bitnet", "ternaryforge", "mlx"]
    scale: ScaleKind
    group_size: int
    convention: Convention
    online: bool
    activation_bits: int | None
    excluded: tuple[str, ...] | None
    strict: bool
    ternary_embeddings: bool = False
    code_bits: int = 2
    bit_map: BitMap | None = None

    def keeps_dense(self, module: str) -> bool:
        """Whether a module such as `model.layers.0.mlp.up_proj` is excluded, as transformers reads it.

        A pattern matches as a regular expression from the start up to the end of a name between
        dots, or literally as a suffix.
        """
        if self.excluded is None:
            return module == "lm_head"
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        return any(
            re.match(rf"(?:{pattern}){boundary}", module) or module.endswith(pattern) for pattern in self.excluded
        )


def parse_quantization(config: dict[str, Any], *, where: str) -> Quantization | None:
    """The quantisation that a config.json declares, None for a dense checkpoint.

    Raises FormatError naming the field for a kind or an option that is not supported.
    """
    fields = config.get("quantization_config")
    packed_by_mlx = config.get("quantization")
    if isinstance(packed_by_mlx, dict):
        if fields not in (None, packed_by_mlx):
            raise FormatError(
                f"[config] '{where}': quantization, which is MLX's, cannot stand beside quantization_config"
            )
        return _parse_mlx(packed_by_mlx, where)
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise FormatError(f"[config] '{where}': quantization_config must be an object")
    method = fields.get("quant_method")
    match method:
        case "bitnet":
            return _parse_bitnet(fields, where)
        case "ternaryforge":
            return _parse_ternaryforge(fields, where)
    raise FormatError(
        f"[config] '{where}': quantization_config.quant_method {method!r} is not supported; "
        "supported are 'bitnet', 'ternaryforge' and dense checkpoints"
    )


def _parse_bitnet(fields: dict[str, Any], where: str) -> Quantization:
    _refuse_unknown(fields, _BITNET_FIELDS, where)
    linear_class = _one_of(fields, "linear_class", ("bitlinear", "autobitlinear"), where)
    mode = _one_of(fields, "quantization_mode", ("offline", "online"), where)
    if fields.get("use_rms_norm"):
        raise FormatError(
            f"[config] '{where}': quantization_config.use_rms_norm is not supported: it adds a norm "
            "in front of every linear layer"
        )
    if linear_class == "bitlinear" and mode == "online":
        raise FormatError(f"[config] '{where}': quantization_mode 'online' needs linear_class 'autobitlinear'")
    return Quantization(
        method="bitnet",
        scale="tensor",
        group_size=0,
        convention="divide" if linear_class == "bitlinear" else "multiply",
        online=mode == "online",
        activation_bits=8,
        excluded=_excluded(fields, where),
        strict=True,
    )


def _parse_ternaryforge(fields: dict[str, Any], where: str) -> Quantization:
    _refuse_unknown(fields, _TERNARYFORGE_FIELDS, where)
    scale: ScaleKind = _one_of(fields, "scale", ("tensor", "row", "group"), where)
    group_size = fields.get("group_size", 128) if scale == "group" else 0
    if type(group_size) is not int or (scale == "group" and (group_size < 1 or group_size % 64)):
        raise FormatError(
            f"[config] '{where}': quantization_config.group_size must be a positive multiple of 64, got {group_size!r}"
        )
    activation_bits = fields.get("activation_bits")
    if activation_bits not in (None, 8, 16):
        raise FormatError(
            f"[config] '{where}': quantization_config.activation_bits must be 8, 16 or null, got {activation_bits!r}"
        )
    bit_map = fields.get("layer_bit_map")
    if bit_map is not None and (fields.get("modules_to_not_convert") or fields.get("ternary_embeddings")):
        raise FormatError(
            f"[config] '{where}': quantization_config.layer_bit_map says everything: remove modules_to_not_convert and "
            "ternary_embeddings"
        )
    return Quantization(
        method="ternaryforge",
        scale=scale,
        group_size=group_size,
        convention="multiply",
        online=False,
        activation_bits=activation_bits,
        excluded=_excluded(fields, where),
        strict=False,
        ternary_embeddings=_flag(fields, "ternary_embeddings", where),
        bit_map=None if bit_map is None else parse_bit_map(bit_map, where=where),
    )


def _parse_mlx(fields: dict[str, Any], where: str) -> Quantization:
    name = f"[config] '{where}': quantization"
    for field, value in fields.items():
        if field not in ("group_size", "bits", "mode"):
            raise FormatError(f"{name}.{field} is not supported, got {value!r}; only one form for all layers is")
    if fields.get("mode", "affine") != "affine":
        raise FormatError(f"{name}.mode must be 'affine', got {fields['mode']!r}")
    bits, group_size = fields.get("bits"), fields.get("group_size")
    if type(bits) is not int or bits not in (1, 2):
        raise FormatError(f"{name}.bits of ternary weights must be 1 or 2, got {bits!r}")
    if type(group_size) is not int or group_size < 1 or group_size % 64:
        raise FormatError(f"{name}.group_size must be a positive multiple of 64, got {group_size!r}")
    return Quantization(
        method="mlx",
        scale="group",
        group_size=group_size,
        convention="multiply",
        online=False,
        activation_bits=16,
        excluded=(),
        strict=False,
        ternary_embeddings=True,
        code_bits=bits,
    )


def _refuse_unknown(fields: dict[str, Any], known: set[str], where: str) -> None:
    for name, value in fields.items():
        if name not in known and value is not None and not name.startswith("_"):
            raise FormatError(
                f"[config] '{where}': quantization_config.{name} = {value!r} is not known; it might "
                "change the mathematics. Remove the field if it does not"
            )


def _flag(fields: dict[str, Any], name: str, where: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"[config] '{where}': quantization_config.{name} must be true or false, got {value!r}")
    return bool(value)


def _one_of(fields: dict[str, Any], name: str, values: tuple[str, ...], where: str) -> Any:
    """The value of a field; the first of `values` is the default."""
    value = fields.get(name)
    if value is None:
        return values[0]
    if value not in values:
        raise FormatError(
            f"[config] '{where}': quantization_config.{name} must be one of {', '.join(values)}, got {value!r}"
        )
    return value


def _excluded(fields: dict[str, Any], where: str) -> tuple[str, ...] | None:
    patterns = fields.get("modules_to_not_convert")
    if patterns is None:
        return None
    name = f"[config] '{where}': quantization_config.modules_to_not_convert"
    if not isinstance(patterns, list) or not all(isinstance(item, str) for item in patterns):
        raise FormatError(f"{name} must be a list of names")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(f"{name} holds the malformed pattern {pattern!r}: {error}") from None
    return tuple(patterns)
