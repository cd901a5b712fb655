# SPDX-License-Identifier: Apache-2.0
"""`TernaryLinear`: a packed linear layer on the compiled core, and how other layers become one."""

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ternaryforge import _core
from ternaryforge.quantization import Convention
from ternaryforge.torch import ops
from ternaryforge.torch.qat import QATLinear
from ternaryforge.torch.quantizers import make_quantizer
from ternaryforge.torch.scale_blocks import ScaleBlocks


class TernaryLinear(nn.Linear):
    """A frozen ternary linear layer: codes in the run-time layout, a quarter of a byte each, one copy.

    In a `state_dict` it has the names and bytes of a stock packed layer: `weight` uint8 [rows / 4, cols] and
    `weight_scale` float32, divided by where `convention` is "divide" (transformers' `bitlinear`). Gradients reach
    the input, so adapters train on top of it. Made by `from_packed`; rows must be a multiple of 4.
    """

    convention: Convention
    group_size: int
    activation_bits: int | None
    scale_bits: Tensor

    def __init__(self) -> None:  # not nn.Linear's: it would allocate a dense weight
        nn.Module.__init__(self)
        self._register_state_dict_hook(_write_stock)
        self.register_load_state_dict_pre_hook(_read_stock)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        convention: Convention = "multiply",
        group_size: int = 0,
        activation_bits: int | None = 8,
    ) -> Self:
        """A layer from stock bytes [rows / 4, cols] and scales [1], [rows] or [rows, groups] as stored.

        Raises FormatError where a code is 3, ValueError for scales that do not fit or are not usable.
        """
        layer = cls()
        rows, cols = 4 * packed.shape[0], packed.shape[1]
        layer.in_features, layer.out_features = cols, rows
        layer.convention, layer.group_size = convention, group_size
        layer.activation_bits = activation_bits
        layer.weight = nn.Parameter(_to_tiles(packed, rows, cols), requires_grad=False)
        layer.register_buffer("scale_bits", _scale_bits(scales, convention, rows, cols, group_size), persistent=False)
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        return layer

    @classmethod
    def from_trits(cls, trits: Tensor, scales: Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """A layer from int8 trits [rows, cols]; the rest as of `from_packed`."""
        packed = _core.formats.pack(np.ascontiguousarray(trits.detach().cpu().numpy().astype(np.int8)), "hf_packed")
        return cls.from_packed(torch.from_numpy(packed).view(-1, trits.shape[1]), scales, bias, **options)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 # nn.Linear's name
        """Input [..., cols] to [..., rows], in its dtype."""
        return ops.linear(
            input,
            self.weight,
            self.scale_bits,
            self.bias,
            rows=self.out_features,
            group_size=self.group_size,
            int8=self.activation_bits == 8,
        )

    def scales(self) -> Tensor:
        """The float32 scales that multiply the trits."""
        return self.scale_bits.view(torch.float32)

    def trits(self) -> Tensor:
        """The int8 trits [rows, cols]."""
        tiles = self.weight.detach().numpy()
        return torch.from_numpy(_core.formats.unpack(tiles, "t16", self.out_features, self.in_features))

    def extra_repr(self) -> str:
        """Sizes and arithmetic."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, activation_bits={self.activation_bits}"
        )


def _to_tiles(packed: Tensor, rows: int, cols: int) -> Tensor:
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise ValueError(f"[linear] packed codes are uint8 [rows / 4, cols], got {packed.dtype} {list(packed.shape)}")
    stock = _core.formats.PackedTensor(
        "hf_packed",
        rows,
        cols,
        packed.detach().cpu().contiguous().numpy().reshape(-1),
        scale_kind="tensor",
        scales=np.ones(1, np.float32),  # repacking keeps it, and nothing looks at it
    )
    tiles = _core.kernels.repack(stock, "t16", threads=torch.get_num_threads())
    return torch.from_numpy(tiles.data.copy())


def _scale_bits(scales: Tensor, convention: Convention, rows: int, cols: int, group_size: int) -> Tensor:
    stored = scales.detach().cpu().to(torch.float32)
    shapes = [(rows, -(-cols // group_size))] if group_size else [(1,), (rows,)]
    if stored.ndim == 0:
        stored = stored.reshape(1)
    if tuple(stored.shape) not in shapes:
        raise ValueError(f"[linear] scales are {' or '.join(map(str, shapes))}, got {tuple(stored.shape)}")
    effective = 1 / stored if convention == "divide" else stored
    if not torch.isfinite(effective).all():
        raise ValueError("[linear] a scale is not finite: the checkpoint is damaged")
    return effective.contiguous().view(torch.int32)


def _write_stock(module: TernaryLinear, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Replaces tiles by stock bytes and adds the scale."""
    packed = _core.formats.pack(module.trits().numpy(), "hf_packed")
    state[prefix + "weight"] = torch.from_numpy(packed).view(module.out_features // 4, module.in_features)
    scales = module.scales()
    state[prefix + "weight_scale"] = 1 / scales if module.convention == "divide" else scales.clone()


def _read_stock(module: TernaryLinear, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The inverse, before a strict load looks at names and shapes."""
    scales = state.pop(prefix + "weight_scale", None)
    packed = state.get(prefix + "weight")
    if scales is None or packed is None:
        return
    rows, cols = module.out_features, module.in_features
    if tuple(packed.shape) == (rows // 4, cols):
        state[prefix + "weight"] = _to_tiles(packed, rows, cols)
    module.scale_bits = _scale_bits(scales, module.convention, rows, cols, module.group_size)


def optimize_layers(model: nn.Module) -> list[str]:
    """Replaces every layer that is ternary by a `TernaryLinear`, one by one; returns their names.

    Replaced are transformers' `BitLinear` and `AutoBitLinear`, packed or latent, and layers that `prepare_qat` made.
    Everything else stays. Raises ValueError for a layer that would compute something else: a norm or a bias inside
    the scale, a shift, four levels, training half way. Latents are lost; in a `state_dict` their layers look like
    `bitlinear` where they have one scale and int8 inputs.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        layer = _convert(name, module)
        if layer is not None:
            layer.train(module.training)
            model.set_submodule(name, layer)
            replaced.append(name)
    return replaced


def _convert(name: str, module: nn.Module) -> TernaryLinear | None:
    """A layer of the same function, None for a module that is not ternary."""
    if isinstance(module, TernaryLinear):
        return None
    kind = type(module).__name__
    if isinstance(module, QATLinear):
        return _from_qat(name, module)
    if kind == "BitLinear":
        return _from_stock(name, module)
    if kind == "AutoBitLinear":
        return _from_auto(name, module)
    return None


def _from_stock(name: str, module: Any) -> TernaryLinear:
    """Of transformers' `BitLinear`, packed bytes and the reciprocal of the scale."""
    _refuse_norm(name, module)
    return TernaryLinear.from_packed(module.weight, module.weight_scale.reshape(1), module.bias, convention="divide")


def _from_auto(name: str, module: Any) -> TernaryLinear:
    """Of transformers' `AutoBitLinear`: trits as floats with a scale, or latents."""
    _refuse_norm(name, module)
    weight = module.weight.detach().float()
    if module.online_quant:
        blocks = ScaleBlocks(module.out_features, module.in_features)
        codes = make_quantizer("absmean", blocks).encode(blocks.split(weight))
        layer = TernaryLinear.from_trits(blocks.join(codes.codes), codes.scale.reshape(1), module.bias)
        layer.convention = "divide"
        return layer
    if module.bias is not None:
        raise ValueError(f"[optimize] '{name}': transformers multiplies this bias by the scale, which is not supported")
    return TernaryLinear.from_trits(weight, module.weight_scale.float().reshape(1))


def _from_qat(name: str, module: QATLinear) -> TernaryLinear:
    quantizer = module.quantizer
    if module.strength is not None or module.residual is not None or module.sub_norm is not None:
        raise ValueError(f"[optimize] '{name}' is blended, has a residual or a norm of its own: end training first")
    codes = quantizer.encode(quantizer.blocks.split(module.weight.detach().float()))
    if quantizer.alphabet == "four" or codes.shift is not None:
        raise ValueError(f"[optimize] '{name}': the quantizer {module.qat.quantizer!r} is not ternary without a shift")
    layer = TernaryLinear.from_trits(
        quantizer.blocks.join(codes.codes),
        codes.scale.reshape(quantizer.blocks.scale_shape),
        module.quantized_bias(),
        group_size=module.qat.group_size if module.qat.scale == "group" else 0,
        activation_bits=module.qat.activation_bits,
    )
    if module.qat.is_stock:
        layer.convention = "divide"
    return layer


def _refuse_norm(name: str, module: Any) -> None:
    if getattr(module, "rms_norm", None) is not None:
        raise ValueError(f"[optimize] '{name}' has a norm of its own on its input (use_rms_norm): not supported")
