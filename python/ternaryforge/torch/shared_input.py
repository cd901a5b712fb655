# SPDX-License-Identifier: Apache-2.0
"""Layers that read one input, q, k and v or gate and up, multiply it together: one rounding, one start of threads."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ternaryforge.torch.linear import TernaryLinear, multiply

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(slots=True)
class _Products:
    """What was computed for one input, the tensors it came from, and by layer the parts that nobody has taken yet."""

    tensors: list[Tensor]
    state: tuple[int, ...]
    parts: dict[int, Tensor]

    def are_of(self, tensors: list[Tensor], state: tuple[int, ...]) -> bool:
        """Whether they would come out the same now."""
        return self.state == state and all(a is b for a, b in zip(self.tensors, tensors, strict=True))


class SharedInput:
    """Makes the first of `layers` that gets an input multiply for all of them; the others take their part.

    A part is given only for the same input tensor, unchanged, with the same weights, unchanged, and in the same mode
    of autocast. Each multiplies alone where the input needs a gradient, since layers have graphs of their own; in
    compiled graphs; and with tensors of inference mode, which do not tell whether they were changed.
    """

    def __init__(self, layers: tuple[TernaryLinear, ...]) -> None:
        self._layers = layers
        self._products: _Products | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_layers": self._layers, "_products": None}

    def multiply(self, layer: TernaryLinear, x: Tensor) -> Tensor:
        """What `layer` gives for x [..., cols], without its bias."""
        tensors = [x, *(tensor for each in self._layers for tensor in (each.weight, each.scale_bits))]
        has_graph = x.requires_grad and torch.is_grad_enabled()
        if has_graph or torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            return multiply([layer], x)[0]
        state = (torch.is_autocast_enabled("cpu"), *map(_changes, tensors))
        number = next(i for i, each in enumerate(self._layers) if each is layer)
        products = self._products
        # Threads may share an input: whoever takes a part first has it, the other one multiplies.
        part = products.parts.pop(number, None) if products and products.are_of(tensors, state) else None
        if part is None:
            products = _Products(tensors, state, dict(enumerate(multiply(self._layers, x))))
            part = products.parts.pop(number)
        self._products = products if products and products.parts else None
        return part


def _changes(tensor: Tensor) -> int:
    """PyTorch's own count of changes in place."""
    return tensor._version  # noqa: SLF001 # there is no other way


def share_inputs(model: nn.Module) -> None:
    """Joins the packed layers of a model that are known by their names to read one input."""
    for parent in model.modules():
        for names in _TOGETHER:
            children = [child for name in names if isinstance(child := getattr(parent, name, None), TernaryLinear)]
            kinds = {(child.in_features, child.group_size, child.activation_bits) for child in children}
            if len(children) > 1 and len(kinds) == 1:
                shared = SharedInput(tuple(children))
                for child in children:
                    child.shared_input = shared
