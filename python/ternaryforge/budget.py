# SPDX-License-Identifier: Apache-2.0
"""The best choice of one option for each item under a budget: exact, by dynamic programming.

frontier = find_frontier([[(bytes, loss), ...], ...])      # one list of options for each item
frontier.least_loss(1_000_000)                             # the option of each item, or None
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Option = tuple[int, float]


@dataclass(frozen=True, slots=True)
class Frontier:
    """All choices that no other beats in bytes and in loss, from small to large; loss falls strictly."""

    sizes: NDArray[np.int64]
    losses: NDArray[np.float64]
    steps: tuple[tuple[NDArray[np.int32], NDArray[np.int8]], ...]

    def choice(self, index: int) -> tuple[int, ...]:
        """The option of every item at a point of the frontier."""
        found = []
        for parents, options in reversed(self.steps):
            found.append(int(options[index]))
            index = int(parents[index])
        return tuple(reversed(found))

    def least_loss(self, budget: int) -> tuple[int, ...] | None:
        """The choice of least loss within a budget of bytes (the smallest of several); None where none fits."""
        count = int(np.searchsorted(self.sizes, budget, side="right"))
        return self.choice(count - 1) if count else None

    def least_bytes(self, loss: float) -> tuple[int, ...] | None:
        """The smallest choice whose loss is at most `loss`; None where there is none."""
        fitting = np.flatnonzero(self.losses <= loss)
        return self.choice(int(fitting[0])) if fitting.size else None


def find_frontier(items: Sequence[Sequence[Option]]) -> Frontier:
    """Adds the items one by one and keeps every sum that may still be part of a best choice.

    The sums of the best choice are never dropped: a sum is dropped only for one that is neither
    larger nor worse, which any completion of the first completes too.
    """
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for options in items:
        own_sizes = np.array([size for size, _ in options], np.int64)
        own_losses = np.array([loss for _, loss in options], np.float64)
        all_sizes = (sizes[:, None] + own_sizes).reshape(-1)
        all_losses = (losses[:, None] + own_losses).reshape(-1)
        order = np.lexsort((all_losses, all_sizes))
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(all_losses[order])[:-1]])
        kept = order[all_losses[order] < best_before]
        sizes, losses = all_sizes[kept], all_losses[kept]
        steps.append(((kept // len(options)).astype(np.int32), (kept % len(options)).astype(np.int8)))
    return Frontier(sizes, losses, tuple(steps))
