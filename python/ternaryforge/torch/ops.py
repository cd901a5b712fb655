# SPDX-License-Identifier: Apache-2.0
"""The custom operators `torch.ops.ternaryforge.*` on the compiled core, which does not link PyTorch.

`linear` and `head` know fake tensors, autograd for their input, autocast, and compile into whole graphs. Scales
travel as the bits of float32 in int32, so that neither autocast nor `model.to(dtype)` rounds them.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from ternaryforge import _core

_NAMESPACE = "ternaryforge"
_ACTIVATIONS: dict[int, Literal["float", "int8", "int16"]] = {0: "float", 8: "int8", 16: "int16"}
_WEIGHT = "Tensor weight, Tensor scale_bits, int rows, int cols, int group_size"

# The library must live as long as its operators do, and both survive a reload of this file.
_library: torch.library.Library = globals().get("_library") or torch.library.Library(_NAMESPACE, "FRAGMENT")
heads: dict[int, _core.kernels.QuantizedHead] = globals().get("heads", {})
"""Quantized heads by the number that stands for them in a graph; a graph is of one process."""


def linear(
    x: Tensor,
    weight: Tensor,
    scale_bits: Tensor,
    bias: Tensor | None,
    *,
    rows: int,
    group_size: int = 0,
    activation_bits: int = 8,
) -> Tensor:
    """Input [..., cols] times the transposed weight, plus bias: [..., rows] in the dtype of x.

    Args:
        x: float32, bfloat16 or float16.
        weight: uint8, the bytes of trits [rows, cols] in layout t16.
        scale_bits: int32 [1], [rows] or [rows, groups], the bits of float32 scales that multiply.
        bias: [rows] or None.
        rows: Outputs; `weight` is padded, so it does not tell.
        group_size: Columns that share a scale, 0 unless scales belong to groups.
        activation_bits: 8 or 16 rounds inputs to integers, one scale a token, 0 leaves them; the gradient of
            the rounding is 1.
    """
    return torch.ops.ternaryforge.linear(x, weight, scale_bits, bias, rows, x.shape[-1], group_size, activation_bits)


def _linear_cpu(
    x: Tensor,
    weight: Tensor,
    scale_bits: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
    group_size: int,
    activation_bits: int,
) -> Tensor:
    _check(x, weight, scale_bits, rows, cols, group_size)
    flat = x.reshape(-1, cols).to(torch.float32).contiguous()
    out = torch.empty(flat.shape[0], rows, dtype=torch.float32)
    _core.kernels.linear_at(
        flat.data_ptr(),
        flat.shape[0],
        cols,
        weight.data_ptr(),
        rows,
        "t16",
        scale_bits.data_ptr(),
        scale_bits.numel(),
        group_size,
        out.data_ptr(),
        _ACTIVATIONS[activation_bits],
        torch.get_num_threads(),
    )
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], rows)


def _input_gradient_cpu(
    grad: Tensor, weight: Tensor, scale_bits: Tensor, rows: int, cols: int, group_size: int
) -> Tensor:
    trits = _core.formats.unpack(weight.numpy(), "t16", rows, cols)
    dense = torch.from_numpy(trits).to(torch.float32)
    scales = scale_bits.view(torch.float32)
    if group_size:
        dense *= scales.view(rows, -1).repeat_interleave(group_size, dim=1)[:, :cols]
    else:
        dense *= scales.view(-1, 1)
    return (grad.to(torch.float32) @ dense).to(grad.dtype)


@functools.cache
def _tile_bytes(rows: int, cols: int) -> int:
    return _core.formats.layout_bytes("t16", rows, cols)


def _check(x: Tensor, weight: Tensor, scale_bits: Tensor, rows: int, cols: int, group_size: int) -> None:
    """Addresses go to the core, so everything must have its size."""
    if x.shape[-1] != cols or x.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"[linear] x is a float tensor [..., {cols}], got {x.dtype} {list(x.shape)}")
    size = _tile_bytes(rows, cols)
    if weight.dtype != torch.uint8 or weight.numel() != size or not weight.is_contiguous():
        raise ValueError(
            f"[linear] weight is {size} contiguous bytes (t16 of {rows} x {cols}), got {weight.dtype} {weight.numel()}"
        )
    counts = {rows * -(-cols // group_size)} if group_size else {1, rows}
    if scale_bits.dtype != torch.int32 or scale_bits.numel() not in counts or not scale_bits.is_contiguous():
        raise ValueError(
            f"[linear] scale_bits is int32 with {' or '.join(map(str, sorted(counts)))} elements, got "
            f"{scale_bits.dtype} {scale_bits.numel()}"
        )


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    scale_bits: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
    group_size: int,
    activation_bits: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _fake_input_gradient(
    grad: Tensor, weight: Tensor, scale_bits: Tensor, rows: int, cols: int, group_size: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], cols)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale_bits, bias, rows, cols, group_size, _ = inputs
    ctx.save_for_backward(weight, scale_bits)
    ctx.sizes = (rows, cols, group_size)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the input as if it were not rounded; codes and scales get none."""
    weight, scale_bits = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.ternaryforge.linear_input_gradient(grad, weight, scale_bits, *ctx.sizes)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias, None, None, None, None


def _head_cpu(x: Tensor, weight: Tensor, number: int) -> Tensor:
    flat = x.reshape(-1, weight.shape[1]).to(torch.float32).contiguous()
    logits = heads[number].multiply(flat.detach().numpy(), threads=torch.get_num_threads())
    return torch.from_numpy(logits).to(x.dtype).view(*x.shape[:-1], weight.shape[0])


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
    if hasattr(torch.ops.ternaryforge, "linear"):
        return
    _library.define(
        "linear(Tensor x, Tensor weight, Tensor scale_bits, Tensor? bias, int rows, int cols, int group_size, "
        "int activation_bits) -> Tensor"
    )
    _library.define(f"linear_input_gradient(Tensor grad, {_WEIGHT}) -> Tensor")
    _library.impl("linear", _linear_cpu, "CPU")
    _library.impl("linear_input_gradient", _input_gradient_cpu, "CPU")
    linear_name, gradient_name = f"{_NAMESPACE}::linear", f"{_NAMESPACE}::linear_input_gradient"
    torch.library.register_fake(linear_name, _fake_linear, lib=_library)
    torch.library.register_fake(gradient_name, _fake_input_gradient, lib=_library)
    torch.library.register_autograd(linear_name, _backward, setup_context=_keep, lib=_library)
    torch.library.register_autocast(linear_name, "cpu", torch.bfloat16, lib=_library)
    head_name = f"{_NAMESPACE}::head"
    _library.define("head(Tensor x, Tensor weight, int number) -> Tensor")
    _library.impl("head", _head_cpu, "CPU")
    torch.library.register_fake(head_name, _fake_head, lib=_library)
    torch.library.register_autograd(head_name, _head_backward, setup_context=_keep_head, lib=_library)
    torch.library.register_autocast(head_name, "cpu", torch.bfloat16, lib=_library)


_register()
