# SPDX-License-Identifier: Apache-2.0
"""The quantizers that `from_pretrained` calls: for our checkpoints, and in place of transformers' own for `bitnet`."""

from pathlib import Path
from typing import Any, cast

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ternaryforge._core import FormatError
from ternaryforge.checkpoint import TensorInfo, read_header
from ternaryforge.hf.config import TernaryForgeConfig
from ternaryforge.torch.qat import prepare_qat
from ternaryforge.torch.replacement import (
    is_linear,
    load_placeholders,
    optimize_layers,
    replace_by_placeholders,
    round_layers,
    scale_biases,
    settle_convention,
)
from ternaryforge.torch.shared_input import share_inputs
from ternaryforge.weights import scale_name

METHOD = "ternaryforge"


class TernaryForgeQuantizer(HfQuantizer):
    """Loads our packed checkpoints, our latents, and dense checkpoints that are rounded on the fly; on CPUs."""

    requires_calibration = False
    quantization_config: TernaryForgeConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses other devices than the CPU for packed layers, and training from a dense checkpoint."""
        if self.quantization_config.latents is None:
            _check_device(kwargs.get("device_map"))
        elif not self.pre_quantized:
            raise ValueError("[load] latents are made by prepare_qat, not by from_pretrained of a dense checkpoint")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            return
        if config.latents is not None:
            prepare_qat(model, config.latents)
            model.config.quantization_config = config
            return
        stored = _headers(kwargs.get("checkpoint_files"))
        names = _packed_modules(model, stored)
        replace_by_placeholders(model, names, scale=config.scale, group_size=getattr(config, "group_size", 0))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.latents is not None:
            return
        group_size = getattr(config, "group_size", 0)
        if self.pre_quantized:
            load_placeholders(
                model, convention="multiply", group_size=group_size, activation_bits=config.activation_bits
            )
            if config.is_stock:
                settle_convention(model, "divide")
        else:
            round_layers(
                model,
                _linear_modules(model, config.modules_to_not_convert),
                scheme=config.scheme,
                scale=config.scale,
                group_size=group_size,
                activation_bits=config.activation_bits,
                convention="divide" if config.is_stock else "multiply",
            )
        share_inputs(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed layers save themselves in stock bytes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed layers let gradients through to adapters; latents train themselves."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Latents are trained without adapters."""
        return self.quantization_config.latents is not None


class AcceleratedBitNetQuantizer(BitNetHfQuantizer):
    """Loads stock `bitnet` checkpoints, packed ones and latents, onto the compiled core."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses other devices than the CPU, and norms inside layers."""
        _check_device(kwargs.get("device_map"))
        if self.quantization_config.use_rms_norm:
            raise ValueError(
                "[load] quantization_config.use_rms_norm adds a norm in front of every linear layer, which packed "
                "layers do not have: load this checkpoint without accelerate_bitnet"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        stored = _headers(kwargs.get("checkpoint_files"))
        names = [] if self._is_online else _packed_modules(model, stored)
        self._holds_bytes = bool(names)
        if not self._holds_bytes:  # latents, or trits as floats: transformers loads them
            super()._process_model_before_weight_loading(model, **kwargs)
            return
        excluded = self.quantization_config.modules_to_not_convert
        skipped = self.get_modules_to_not_convert(model, excluded, getattr(model, "_keep_in_fp32_modules", None))
        # A head of another task, which no checkpoint holds, begins dense.
        base = f"{model.base_model_prefix}."
        meant = [
            name
            for name in _linear_modules(model, skipped)
            if name not in names and (name.startswith(base) or not hasattr(model, model.base_model_prefix))
        ]
        if meant:
            raise FormatError(
                f"[load] '{meant[0]}' is not packed in the checkpoint, and modules_to_not_convert does not name it"
            )
        replace_by_placeholders(model, names, scale="tensor", group_size=0)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self._holds_bytes:
            optimize_layers(model)
            forget_unpacking(model)
        elif self.quantization_config.linear_class == "autobitlinear":
            scale_biases(model, load_placeholders(model, convention="multiply"))
        else:
            load_placeholders(model, convention="divide")
        share_inputs(model)
        settle_linear_class(model, self.quantization_config)

    def get_load_operations(self) -> dict[str, Any]:
        """Packed bytes stay packed; what transformers loads, it unpacks in its own way."""
        if self._holds_bytes:
            return {}
        return cast("dict[str, Any]", super().get_load_operations())  # type: ignore[no-untyped-call]

    @property
    def _is_online(self) -> bool:
        return bool(self.quantization_config.quantization_mode == "online")

    @property
    def is_trainable(self) -> bool:
        """Gradients pass packed layers on their way to adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Latents are packed; to train them, load them without acceleration."""
        return False


def settle_linear_class(model: Any, config: Any) -> None:
    """Makes a stock `config` say what the layers of `model` will be saved as: packed, in one linear class."""
    config.linear_class = "autobitlinear" if settle_convention(model) == "multiply" else "bitlinear"
    config.quantization_mode = "offline"


def forget_unpacking(model: Any) -> None:
    """Drops the conversions by which transformers unpacked at load, which `save_pretrained` would try to revert."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [c for c in conversions if not _unpacks(c)]  # noqa: SLF001 # no public way


def _unpacks(conversion: Any) -> bool:
    return any(type(operation).__name__ == "BitNetDeserialize" for operation in getattr(conversion, "operations", ()))


def _check_device(device_map: Any) -> None:
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if not {str(device) for device in devices} <= {"None", "cpu"}:
        raise ValueError(f"[load] packed ternary layers run on the CPU, got device_map={device_map!r}")


def _headers(files: Any) -> dict[str, TensorInfo]:
    """The tensors of safetensors files, nothing of others."""
    tensors: dict[str, TensorInfo] = {}
    for file in files or ():
        if str(file).endswith(".safetensors"):
            tensors |= read_header(Path(file))
    return tensors


def _linear_modules(model: Any, excluded: list[str] | None) -> list[str]:
    """The linear layers that no pattern excludes, as transformers matches them."""
    return [
        name for name, module in model.named_modules() if is_linear(module) and should_convert_module(name, excluded)
    ]


def _packed_modules(model: Any, stored: dict[str, TensorInfo]) -> list[str]:
    """The modules whose weights a checkpoint holds as packed bytes with scales.

    Raises FormatError where such a module is no linear layer here.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    found = []
    for key, info in stored.items():
        if info.dtype != "U8" or scale_name(key) not in stored:
            continue
        name = key.removesuffix(".weight")
        # A base model is loaded from the checkpoint of a whole one, and the other way round.
        known = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules), None)
        if known is None:
            continue
        if not is_linear(modules[known]):
            raise FormatError(
                f"[load] '{info.file}': tensor '{key}' is ternary, which transformers cannot have as a "
                f"{type(modules[known]).__name__}: use ternaryforge.TernaryModel"
            )
        found.append(known)
    return found


def register() -> None:
    """Tells transformers about `quant_method: ternaryforge`; a second time it does nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, TernaryForgeConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, TernaryForgeQuantizer)
