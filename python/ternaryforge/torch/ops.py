# SPDX-License-Identifier: Apache-2.0
"""The custom operators `torch.ops.ternaryforge.*` on the compiled core, which does not link PyTorch.

`linears` and `head` know fake tensors, autograd for their input, autocast, and compile into whole graphs. Scales
travel as the bits of float32 in int32, so that neither autocast nor `model.to(dtype)` rounds them.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from ternaryforge import _core

_NAMESPACE = "ternaryforge"
_ACTIVATIONS: dict[int, Literal["float", "int8", "int16"]] = {0: "float", 8: "int8", 16: "int16"}
_WEIGHTS = "Tensor[] weights, Tensor[] scale_bits, int[] rows, int cols, int group_size"

# The library must live as long as its operators do, and both survive a reload of this file.
_library: torch.library.Library = globals().get("_library") or torch.library.Library(_NAMESPACE, "FRAGMENT")
heads: dict[int, _core.kernels.QuantizedHead] = globals().get("heads", {})
"""Quantized heads by the number that stands for them in a graph; a graph is of one process."""


def linears(
    x: Tensor,
    weights: list[Tensor],
    scale_bits: list[Tensor],
    rows: list[int],
    *,
    group_size: int = 0,
    activation_bits: int = 8,
) -> list[Tensor]:
    """Input [..., cols] times each transposed weight: [..., rows] for each, in the dtype of x.

    Args:
        x: float32, bfloat16 or float16.
        weights: uint8, the bytes of trits [rows, cols] in layout t16; layers with one input share its rounding.
        scale_bits: int32 [1], [rows] or [rows, groups], the bits of float32 scales that multiply.
        rows: Outputs of each weight, which is padded and does not tell.
        group_size: Columns that share a scale, 0 unless scales belong to groups.
        activation_bits: 8 or 16 rounds inputs to integers, one scale a token, 0 leaves them; the gradient of
            the rounding is 1.
    """
    return torch.ops.ternaryforge.linears(x, weights, scale_bits, rows, x.shape[-1], group_size, activation_bits)


def _linears_cpu(
    x: Tensor,
    weights: list[Tensor],
    scale_bits: list[Tensor],
    rows: list[int],
    cols: int,
    group_size: int,
    activation_bits: int,
) -> list[Tensor]:
    _check(x, weights, scale_bits, rows, cols, group_size)
    flat = x.reshape(-1, cols).to(torch.float32).contiguous()
    products = [torch.empty(*x.shape[:-1], count, dtype=torch.float32) for count in rows]
    _core.kernels.linears_at(
        flat.data_ptr(),
        flat.shape[0],
        cols,
        [
            (weight.data_ptr(), scales.data_ptr(), product.data_ptr(), count, scales.numel())
            for weight, scales, product, count in zip(weights, scale_bits, products, rows, strict=True)
        ],
        "t16",
        group_size,
        _ACTIVATIONS[activation_bits],
        torch.get_num_threads(),
    )
    return [product.to(x.dtype) for product in products]


def _input_gradient_cpu(
    grads: list[Tensor], weights: list[Tensor], scale_bits: list[Tensor], rows: list[int], cols: int, group_size: int
) -> Tensor:
    total = grads[0].new_zeros(*grads[0].shape[:-1], cols, dtype=torch.float32)
    for grad, weight, bits, count in zip(grads, weights, scale_bits, rows, strict=True):
        dense = torch.from_numpy(_core.formats.unpack(weight.numpy(), "t16", count, cols)).to(torch.float32)
        scales = bits.view(torch.float32)
        if group_size:
            dense *= scales.view(count, -1).repeat_interleave(group_size, dim=1)[:, :cols]
        else:
            dense *= scales.view(-1, 1)
        total += grad.to(torch.float32) @ dense
    return total.to(grads[0].dtype)


@functools.cache
def _tile_bytes(rows: int, cols: int) -> int:
    return _core.formats.layout_bytes("t16", rows, cols)


def _check(
    x: Tensor, weights: list[Tensor], scale_bits: list[Tensor], rows: list[int], cols: int, group_size: int
) -> None:
    """Addresses go to the core, so everything must have its size."""
    if x.shape[-1] != cols or x.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"[linear] x is a float tensor [..., {cols}], got {x.dtype} {list(x.shape)}")
    for weight, bits, count in zip(weights, scale_bits, rows, strict=True):
        size = _tile_bytes(count, cols)
        if weight.dtype != torch.uint8 or weight.numel() != size or not weight.is_contiguous():
            raise ValueError(
                f"[linear] weight is {size} contiguous bytes (t16 of {count} x {cols}), got {weight.dtype} "
                f"{weight.numel()}"
            )
        counts = {count * -(-cols // group_size)} if group_size else {1, count}
        if bits.dtype != torch.int32 or bits.numel() not in counts or not bits.is_contiguous():
            raise ValueError(
                f"[linear] scale_bits is int32 with {' or '.join(map(str, sorted(counts)))} elements, got "
                f"{bits.dtype} {bits.numel()}"
            )


def _fake_linears(
    x: Tensor,
    weights: list[Tensor],
    scale_bits: list[Tensor],
    rows: list[int],
    cols: int,
    group_size: int,
    activation_bits: int,
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], count) for count in rows]


def _fake_input_gradient(
    grads: list[Tensor], weights: list[Tensor], scale_bits: list[Tensor], rows: list[int], cols: int, group_size: int
) -> Tensor:
    return grads[0].new_empty(*grads[0].shape[:-1], cols)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, weights, scale_bits, rows, cols, group_size, _ = inputs
    ctx.save_for_backward(*weights, *scale_bits)
    ctx.sizes = (rows, cols, group_size)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """The gradient of the input as if it were not rounded; codes and scales get none."""
    saved, count = ctx.saved_tensors, len(ctx.sizes[0])
    grad_x = None
    if ctx.needs_input_grad[0]:
        weights, scale_bits = list(saved[:count]), list(saved[count:])
        grad_x = torch.ops.ternaryforge.linears_input_gradient(grads, weights, scale_bits, *ctx.sizes)
    return grad_x, [None] * count, [None] * count, None, None, None, None


def _head_cpu(x: Tensor, weight: Tensor, number: int) -> Tensor:
    flat = x.reshape(-1, weight.shape[1]).to(torch.float32).contiguous()
    logits = heads[number].multiply(flat.detach().numpy(), threads=torch.get_num_threads())
    return torch.from_numpy(logits.reshape(*x.shape[:-1], weight.shape[0])).to(x.dtype)


def _fake_head(x: Tensor, weight: Tensor, number: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep_head(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _head_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the input of the exact head; its weight gets none."""
    (weight,) = ctx.saved_tensors
    return (grad.to(weight.dtype) @ weight).to(grad.dtype), None, None


def _register() -> None:
    """Defines the operators, once in a process: a second import of this file finds them."""
    if hasattr(torch.ops.ternaryforge, "linears"):
        return
    _library.define(f"linears(Tensor x, {_WEIGHTS}, int activation_bits) -> Tensor[]")
    _library.define(f"linears_input_gradient(Tensor[] grads, {_WEIGHTS}) -> Tensor")
    _library.impl("linears", _linears_cpu, "CPU")
    _library.impl("linears_input_gradient", _input_gradient_cpu, "CPU")
    name, gradient_name = f"{_NAMESPACE}::linears", f"{_NAMESPACE}::linears_input_gradient"
    torch.library.register_fake(name, _fake_linears, lib=_library)
    torch.library.register_fake(gradient_name, _fake_input_gradient, lib=_library)
    torch.library.register_autograd(name, _backward, setup_context=_keep, lib=_library)
    torch.library.register_autocast(name, "cpu", torch.bfloat16, lib=_library)
    head_name = f"{_NAMESPACE}::head"
    _library.define("head(Tensor x, Tensor weight, int number) -> Tensor")
    _library.impl("head", _head_cpu, "CPU")
    torch.library.register_fake(head_name, _fake_head, lib=_library)
    torch.library.register_autograd(head_name, _head_backward, setup_context=_keep_head, lib=_library)
    torch.library.register_autocast(head_name, "cpu", torch.bfloat16, lib=_library)


_register()
