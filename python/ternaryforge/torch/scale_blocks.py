# SPDX-License-Identifier: Apache-2.0
"""Which weights of a matrix share a scale: all, those of a row, or neighbouring columns of a row."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ternaryforge.quantization import ScaleKind


@dataclass(frozen=True, slots=True)
class ScaleBlocks:
    """The blocks of a matrix [rows, cols] under one kind of scale.

    `split` gives a matrix with one block per row, the last group of a row filled up with zeros;
    `join` is its inverse and drops what was filled up.
    """

    rows: int
    cols: int
    scale: ScaleKind = "tensor"
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.scale not in {"tensor", "row", "group"}:
            raise ValueError(f"[qat] scale is one of tensor, row, group, got {self.scale!r}")
        if self.scale == "group" and self.group_size < 1:
            raise ValueError(f"[qat] group_size is positive, got {self.group_size}")

    @property
    def groups(self) -> int:
        """Blocks per row, 1 unless scales belong to groups."""
        return -(-self.cols // self.group_size) if self.scale == "group" else 1

    @property
    def count(self) -> int:
        """Number of blocks, and of scales."""
        return 1 if self.scale == "tensor" else self.rows * self.groups

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape in which scales are stored: [1], [rows] or [rows, groups]."""
        return {"tensor": (1,), "row": (self.rows,), "group": (self.rows, self.groups)}[self.scale]

    def sizes(self, like: Tensor) -> Tensor | int:
        """How many weights each block has: a number, or [blocks, 1] where the last group is shorter."""
        if self.scale == "tensor":
            return self.rows * self.cols
        if self.scale == "row" or self.cols % self.group_size == 0:
            return self.cols // self.groups
        sizes = like.new_full((self.rows, self.groups), self.group_size)
        sizes[:, -1] = self.cols % self.group_size
        return sizes.reshape(-1, 1)

    def split(self, weight: Tensor) -> Tensor:
        """[rows, cols] as [blocks, longest block]."""
        if self.scale == "tensor":
            return weight.reshape(1, -1)
        if self.scale == "row":
            return weight
        missing = self.groups * self.group_size - self.cols
        return F.pad(weight, (0, missing)).reshape(self.count, self.group_size)

    def join(self, blocks: Tensor) -> Tensor:
        """What `split` took apart, [rows, cols]."""
        return blocks.reshape(self.rows, -1)[:, : self.cols]

    def mean(self, blocks: Tensor) -> Tensor:
        """Mean of each block without what was filled up, [blocks, 1]."""
        if self.scale != "group":
            return blocks.mean(1, keepdim=True)
        return blocks.sum(1, keepdim=True) / self.sizes(blocks)

    def root_size(self, blocks: Tensor) -> Tensor | float:
        """Square root of the number of weights of each block."""
        sizes = self.sizes(blocks)
        return torch.sqrt(sizes) if isinstance(sizes, Tensor) else float(sizes) ** 0.5
