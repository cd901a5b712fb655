# SPDX-License-Identifier: Apache-2.0
"""`TernaryLinear`: a packed linear layer on the compiled core."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ternaryforge import _core
from ternaryforge.quantization import Convention
from ternaryforge.torch import ops

if TYPE_CHECKING:
    from ternaryforge.torch.shared_input import SharedInput


class TernaryLinear(nn.Linear):
    """A frozen ternary linear layer: codes in the run-time layout, a quarter of a byte each, one copy.

    In a `state_dict` it has the names and bytes of a stock packed layer: `weight` uint8 [ceil(rows / 4), cols] and
    `weight_scale` float32, divided by where `convention` is "divide" (transformers' `bitlinear`). Gradients reach
    the input, so adapters train on top of it. Made by `from_packed` or `from_trits`. `activation_bits` is what the
    model was made for: 8, 16 (two int8 products, within 1e-3 of float and faster), or None for float.
    """

    convention: Convention
    group_size: int
    activation_bits: int | None
    scale_bits: Tensor
    divisor_bits: Tensor | None  # the scale as a "divide" checkpoint stores it, since reciprocals round
    shared_input: "SharedInput | None"  # with layers that read the same input

    def __init__(self) -> None:  # not nn.Linear's: it would allocate a dense weight
        nn.Module.__init__(self)
        self.shared_input = None
        self._register_state_dict_hook(_write_stock)
        self.register_load_state_dict_pre_hook(_read_stock)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        rows: int | None = None,
        convention: Convention = "multiply",
        group_size: int = 0,
        activation_bits: int | None = 8,
    ) -> Self:
        """A layer from stock bytes [ceil(rows / 4), cols] and scales [1], [rows] or [rows, groups] as stored.

        `rows` need not be given where it is a multiple of 4. Raises FormatError where a code is 3, ValueError for
        scales that do not fit or are not usable, and for other activation_bits than 8, 16 and None.
        """
        if packed.dtype != torch.uint8 or packed.ndim != 2:
            raise ValueError(
                f"[linear] packed codes are uint8 [ceil(rows / 4), cols], got {packed.dtype} {list(packed.shape)}"
            )
        if activation_bits not in {8, 16, None}:
            raise ValueError(f"[linear] activation_bits is 8, 16 or None, got {activation_bits!r}")
        layer = cls()
        rows, cols = 4 * packed.shape[0] if rows is None else rows, packed.shape[1]
        layer.in_features, layer.out_features = cols, rows
        layer.convention, layer.group_size = convention, group_size
        layer.activation_bits = activation_bits
        layer.weight = nn.Parameter(_to_tiles(packed, rows, cols), requires_grad=False)
        layer.register_buffer("scale_bits", _scale_bits(scales, convention, rows, cols, group_size), persistent=False)
        divisors = None if convention == "multiply" else scales.detach().float().reshape(-1).view(torch.int32).clone()
        layer.register_buffer("divisor_bits", divisors, persistent=False)
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        return layer

    @classmethod
    def from_trits(cls, trits: Tensor, scales: Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """A layer from int8 trits [rows, cols]; the rest as of `from_packed`."""
        packed = _to_stock_bytes(trits.detach().cpu().numpy().astype(np.int8))
        return cls.from_packed(packed, scales, bias, rows=trits.shape[0], **options)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 # nn.Linear's name
        """Input [..., cols] to [..., rows], in its dtype."""
        shared = self.shared_input
        product = multiply([self], input)[0] if shared is None else shared.multiply(self, input)
        bias = cast("Tensor | None", self.bias)
        return product if bias is None else product + bias.to(product.dtype)

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


def multiply(layers: Sequence[TernaryLinear], x: Tensor) -> list[Tensor]:
    """What each of `layers` gives for x [..., cols] without its bias, all at once.

    They agree in columns, group size and rounding of the input.
    """
    return ops.linears(
        x,
        [layer.weight for layer in layers],
        [layer.scale_bits for layer in layers],
        [layer.out_features for layer in layers],
        group_size=layers[0].group_size,
        activation_bits=layers[0].activation_bits or 0,
    )


def _to_tiles(packed: Tensor, rows: int, cols: int) -> Tensor:
    if packed.shape[0] != -(-rows // 4):
        raise ValueError(f"[linear] {rows} rows are packed in {-(-rows // 4)} rows of bytes, got {packed.shape[0]}")
    data = packed.detach().cpu().contiguous().numpy().reshape(-1)
    if rows % 4:
        trits = _core.formats.unpack(data, "hf_packed", 4 * packed.shape[0], cols)[:rows]
        return torch.from_numpy(_core.formats.pack(np.ascontiguousarray(trits), "t16"))
    # Repacking keeps the scale, and nothing looks at it.
    stock = _core.formats.PackedTensor(
        "hf_packed", rows, cols, data, scale_kind="tensor", scales=np.ones(1, np.float32)
    )
    tiles = _core.kernels.repack(stock, "t16", threads=torch.get_num_threads())
    return torch.from_numpy(tiles.data.copy())


def _to_stock_bytes(trits: NDArray[np.int8]) -> Tensor:
    """Uint8 [ceil(rows / 4), cols]; the trits behind the last row are 0."""
    rows, cols = trits.shape
    padded = np.pad(trits, ((0, -rows % 4), (0, 0)))
    return torch.from_numpy(_core.formats.pack(np.ascontiguousarray(padded), "hf_packed")).view(-1, cols)


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
    state[prefix + "weight"] = _to_stock_bytes(module.trits().numpy())
    scales = module.scales()
    if module.convention == "divide":
        kept = module.divisor_bits
        scales = 1 / scales if kept is None else kept.view(torch.float32)
    state[prefix + "weight_scale"] = scales.clone()


def _read_stock(module: TernaryLinear, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The inverse, before a strict load looks at names and shapes."""
    scales = state.pop(prefix + "weight_scale", None)
    packed = state.get(prefix + "weight")
    if scales is None or packed is None:
        return
    rows, cols = module.out_features, module.in_features
    if tuple(packed.shape) == (-(-rows // 4), cols):
        state[prefix + "weight"] = _to_tiles(packed, rows, cols)
    module.scale_bits = _scale_bits(scales, module.convention, rows, cols, module.group_size)
    if module.convention == "divide":
        module.divisor_bits = scales.detach().float().reshape(-1).view(torch.int32).clone()
