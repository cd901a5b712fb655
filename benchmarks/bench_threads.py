# SPDX-License-Identifier: Apache-2.0
"""Decodes a shape alone, beside torch, and with more threads than cores; prints the ratios to alone.

Usage: python benchmarks/bench_threads.py [SHAPE]

Beside torch: torch is imported, its thread pool has just run a product, and its workers may still be
spinning. Every way takes turns with the others, so that what else the machine does falls on all.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from ternaryforge import _core
from ternaryforge.benchmark import build_shape
from ternaryforge.machine import cpu_name

ROUNDS, TOKENS = 6, 12


def decode(transformer: _core.model.Transformer, before: Callable[[], object] = lambda: None) -> list[float]:
    """Seconds of each token; `before` runs ahead of each, uncounted."""
    state = transformer.new_sequence()
    seconds = []
    for token in range(TOKENS):
        before()
        start = time.perf_counter()
        transformer.forward([(np.array([token], np.int32), state)])
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def main() -> int:
    """One JSON line."""
    shape = sys.argv[1] if len(sys.argv) > 1 else "bitnet-2b-4t"
    cores = _core.parallel.default_threads()
    build = build_shape(shape, context_length=64)
    models = {f"{count} threads": build(count) for count in (cores, 2 * cores, 8 * cores)}
    alone = f"{cores} threads"
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            seconds[name] += decode(model)

    import torch

    matrix = torch.ones(512, 512)
    torch.mm(matrix, matrix)
    seconds |= {"alone, torch imported": [], "after a product of torch": []}
    for _ in range(ROUNDS):
        seconds[alone] += decode(models[alone])  # torch's workers have gone to sleep or not: both count
        seconds["alone, torch imported"] += decode(models[alone], lambda: time.sleep(0.02))
        seconds["after a product of torch"] += decode(models[alone], lambda: torch.mm(matrix, matrix))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    line = {
        "benchmark": "threads",
        "cpu": cpu_name(),
        "cores": cores,
        "shape": shape,
        "torch_threads": torch.get_num_threads(),
        "tokens_per_second": {name: round(1 / value, 2) for name, value in medians.items()},
        "speed_to_alone": {name: round(medians[alone] / value, 3) for name, value in medians.items()},
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
