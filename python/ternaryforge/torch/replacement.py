# SPDX-License-Identifier: Apache-2.0
"""How other linear layers become `TernaryLinear`: ternary ones as they are, dense ones by rounding."""

from typing import Any, cast

import torch
from torch import nn

from ternaryforge import _core
from ternaryforge.formats import Scheme
from ternaryforge.quantization import Convention, ScaleKind
from ternaryforge.torch.head import HeadBits, QuantizedHead
from ternaryforge.torch.linear import TernaryLinear
from ternaryforge.torch.qat import QATLinear
from ternaryforge.torch.quantizers import make_quantizer
from ternaryforge.torch.scale_blocks import ScaleBlocks
from ternaryforge.torch.shared_input import share_inputs


def optimize_layers(model: nn.Module) -> list[str]:
    """Replaces every layer that is ternary by a `TernaryLinear`, one by one; returns their names.

    Replaced are transformers' `BitLinear` and `AutoBitLinear`, packed or latent, and layers that `prepare_qat` made.
    Everything else stays. Raises ValueError, and changes nothing, for a layer that would compute something else: a
    norm inside it, a shift, four levels, training half way. Latents are lost; in a `state_dict` their layers look
    like `bitlinear` where they have one scale and int8 inputs.
    """
    found = {name: module for name, module in model.named_modules() if _is_ternary(module)}
    for name, module in found.items():
        _check(name, module)
    for name, module in found.items():
        layer = _convert(module)
        layer.train(module.training)
        model.set_submodule(name, layer)
    share_inputs(model)
    return list(found)


def _is_ternary(module: nn.Module) -> bool:
    return isinstance(module, QATLinear) or type(module).__name__ in {"BitLinear", "AutoBitLinear"}


def _check(name: str, module: nn.Module) -> None:
    """Refuses what has no equal among packed layers."""
    if not isinstance(module, QATLinear):
        if getattr(module, "rms_norm", None) is not None:
            raise ValueError(f"[optimize] '{name}' has a norm of its own on its input (use_rms_norm): not supported")
        return
    if module.strength is not None or module.residual is not None or module.sub_norm is not None:
        raise ValueError(f"[optimize] '{name}' is blended, has a residual or a norm of its own: end training first")
    blocks = ScaleBlocks(4, 4)
    codes = make_quantizer(module.qat.quantizer, blocks, **module.qat.options).encode(torch.zeros(1, 16))
    if module.quantizer.alphabet == "four" or codes.shift is not None:
        raise ValueError(f"[optimize] '{name}': the quantizer {module.qat.quantizer!r} is not ternary without a shift")


def _convert(module: Any) -> TernaryLinear:
    if isinstance(module, QATLinear):
        return _from_qat(module)
    if type(module).__name__ == "BitLinear":
        return TernaryLinear.from_packed(module.weight, module.weight_scale, module.bias, convention="divide")
    return _from_auto(module)


def _from_auto(module: Any) -> TernaryLinear:
    """Of transformers' `AutoBitLinear`: latents, or trits as floats with a scale, which multiplies the bias too."""
    weight = module.weight.detach().float()
    if module.online_quant:
        blocks = ScaleBlocks(module.out_features, module.in_features)
        codes = make_quantizer("absmean", blocks).encode(blocks.split(weight))
        return TernaryLinear.from_trits(
            blocks.join(codes.codes), 1 / codes.scale.reshape(1), module.bias, convention="divide"
        )
    scale = module.weight_scale.detach().float().reshape(1)
    bias = None if module.bias is None else module.bias.detach() * scale.to(module.bias.dtype)
    return TernaryLinear.from_trits(weight, scale, bias)


def _from_qat(module: QATLinear) -> TernaryLinear:
    quantizer = module.quantizer
    codes = quantizer.encode(quantizer.blocks.split(module.weight.detach().float()))
    scales = codes.scale.reshape(quantizer.blocks.scale_shape)
    stock = module.qat.is_stock
    return TernaryLinear.from_trits(
        quantizer.blocks.join(codes.codes),
        1 / scales if stock else scales,
        module.quantized_bias(),
        convention="divide" if stock else "multiply",
        group_size=module.qat.group_size if module.qat.scale == "group" else 0,
        activation_bits=module.qat.activation_bits,
    )


class PackedPlaceholder(nn.Module):
    """A packed layer between the start and the end of loading: stock `weight` and `weight_scale`, no forward pass."""

    weight: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter | None
    rows: int


def replace_by_placeholders(model: nn.Module, names: list[str], *, scale: ScaleKind, group_size: int) -> None:
    """Puts placeholders where linear layers were, on the meta device, for a loader to fill."""
    for name in names:
        linear = _linear(model, name)
        rows, cols = linear.out_features, linear.in_features
        shape = ScaleBlocks(rows, cols, scale, group_size).scale_shape
        module = PackedPlaceholder()
        module.rows = rows
        with torch.device("meta"):
            packed = torch.empty(-(-rows // 4), cols, dtype=torch.uint8)
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.weight_scale = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
        module.bias = cast("nn.Parameter | None", linear.bias)
        if module.bias is not None:
            module.bias.requires_grad_(False)
        model.set_submodule(name, module)


def load_placeholders(
    model: nn.Module, *, convention: Convention, group_size: int = 0, activation_bits: int | None = 8
) -> list[str]:
    """Makes a `TernaryLinear` of every filled placeholder, one by one, so that bytes are in memory once.

    Returns their names. Raises ValueError for one that was not filled, or whose scale is unusable.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, PackedPlaceholder)]
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, PackedPlaceholder)  # noqa: S101 # by the line above
        if module.weight.is_meta or module.weight_scale.is_meta:
            raise ValueError(f"[load] the checkpoint has no weight or no scale for '{name}'")
        try:
            layer = TernaryLinear.from_packed(
                module.weight,
                module.weight_scale,
                module.bias,
                rows=module.rows,
                convention=convention,
                group_size=group_size,
                activation_bits=activation_bits,
            )
        except ValueError as error:
            raise type(error)(f"{error} (layer '{name}')") from None
        model.set_submodule(name, layer.train(model.training))
    return names


def round_layers(
    model: nn.Module,
    names: list[str],
    *,
    scheme: Scheme,
    scale: ScaleKind,
    group_size: int,
    activation_bits: int | None,
    convention: Convention = "multiply",
) -> None:
    """Rounds dense linear layers to trits in place, one by one; `convention` is that of their `state_dict`."""
    for name in names:
        linear = _linear(model, name)
        weight = linear.weight.detach().float().contiguous().cpu().numpy()
        try:
            trits, scales = _core.quant.quantize_weights(
                weight, scheme=scheme, scale=scale, group_size=group_size or 64, threads=torch.get_num_threads()
            )
        except ValueError as error:
            raise ValueError(f"{error} (layer '{name}')") from None
        stored = torch.from_numpy(scales)
        layer = TernaryLinear.from_trits(
            torch.from_numpy(trits),
            1 / stored if convention == "divide" else stored,
            linear.bias,
            convention=convention,
            group_size=group_size if scale == "group" else 0,
            activation_bits=activation_bits,
        )
        model.set_submodule(name, layer.train(model.training))


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer of any kind."""
    return isinstance(module, nn.Linear)


@torch.no_grad()
def scale_biases(model: nn.Module, names: list[str]) -> None:
    """Multiplies the biases of packed layers by the scale, as transformers does in the class `autobitlinear`."""
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, TernaryLinear) and layer.bias is not None:
            layer.bias.mul_(layer.scales())


def settle_convention(model: nn.Module, wanted: Convention = "multiply") -> Convention:
    """Returns the one convention in which all packed layers are saved from now on: `wanted` if all can be.

    A bias in the class `autobitlinear`, which multiplies, would be multiplied too at the next load.
    """
    layers = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    if wanted == "multiply" and all(layer.convention == "multiply" and layer.bias is None for layer in layers):
        return "multiply"
    for layer in layers:
        layer.convention = "divide"
    return "divide"


def quantize_head(model: nn.Module, bits: HeadBits) -> None:
    """Makes the output head of a language model a `QuantizedHead`, unless it has a bias or is no plain layer."""
    find: Any = getattr(model, "get_output_embeddings", None)
    old = find() if find is not None else None
    if type(old) is nn.Linear and old.bias is None:
        name = next(name for name, module in model.named_modules() if module is old)
        model.set_submodule(name, QuantizedHead.from_linear(old, bits))


def has_packed_layers(model: nn.Module) -> bool:
    """Whether there is a `TernaryLinear` in a model."""
    return any(isinstance(module, TernaryLinear) for module in model.modules())


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"[load] '{name}' is a {type(linear).__name__}, not a linear layer: list it in modules_to_not_convert"
        )
    return linear
