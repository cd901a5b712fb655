# SPDX-License-Identifier: Apache-2.0
"""`QuantizedHead`: an output head that multiplies with 8, 6 or 4 bits and keeps its weight for saving and gradients."""

import itertools
import weakref
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ternaryforge import _core
from ternaryforge.torch import ops

HeadBits = Literal[8, 6, 4]

_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_numbers = itertools.count()


class QuantizedHead(nn.Linear):
    """A linear layer whose logits are those of its weight quantized to `bits`, 8.25, 6.5 or 4.25 a weight.

    `weight` stays the same parameter, so ties, `state_dict` and input gradients are those of the exact head; the
    quantized copy is made again after unpickling and copying. While `weight` is trained the layer is exact, and
    `eval()` quantizes it anew if it changed.
    """

    bits: HeadBits

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: HeadBits = 8) -> Self:
        """The quantized form of a float linear layer without bias. Raises ValueError for any other."""
        if bits not in {8, 6, 4}:
            raise ValueError(f"[head] bits is 8, 6 or 4, got {bits!r}")
        if linear.bias is not None:
            raise ValueError("[head] a head with a bias is not quantized: keep it as it is")
        if linear.weight.dtype not in _TYPES:
            raise ValueError(f"[head] a head of {linear.weight.dtype} is not quantized: keep it as it is")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = linear.weight
        layer.register_parameter("bias", None)
        layer.bits = bits
        layer.quantize()
        return layer.train(linear.training)

    def quantize(self) -> None:
        """Makes the quantized copy of what `weight` is now."""
        if finalizer := self.__dict__.get("_finalizer"):
            finalizer()
        weight = self.weight.detach().contiguous()
        data = weight.view(torch.uint8).numpy().reshape(-1)
        rows, cols = weight.shape
        tensor = _core.formats.PackedTensor(_TYPES[weight.dtype], rows, cols, data)
        self._number, self._version = next(_numbers), self.weight._version  # noqa: SLF001 # nothing public counts
        ops.heads[self._number] = _core.kernels.QuantizedHead(tensor, self.bits, threads=torch.get_num_threads())
        self._finalizer = weakref.finalize(self, ops.heads.pop, self._number, None)

    def train(self, mode: bool = True) -> Self:
        """As of nn.Module; the end of training quantizes a weight that has changed."""
        if not mode and self.weight._version != self._version:  # noqa: SLF001 # as above
            self.quantize()
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 # nn.Linear's name
        """Input [..., cols] to logits [..., rows], in its dtype."""
        if self.training and self.weight.requires_grad:
            return super().forward(input)
        return torch.ops.ternaryforge.head(input, self.weight, self._number)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        for name in ("_finalizer", "_number", "_version"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.quantize()

    def extra_repr(self) -> str:
        """As of nn.Linear, and the bits."""
        return f"{super().extra_repr()}, bits={self.bits}"
