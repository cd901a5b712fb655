# SPDX-License-Identifier: Apache-2.0
"""Loads a stock checkpoint of a shape from a warm file cache and prints the time and memory it took.

Usage: python benchmarks/bench_load.py [SHAPE] [FOLDER]    (bitnet-2b-4t: 1.2 GB of disk in FOLDER, removed at the end)

Exit code 1 where anonymous memory grew by more than 1.15 of the run-time weights, or loading took 2 s.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ternaryforge import TernaryModel
from ternaryforge.machine import cpu_name
from ternaryforge.memory import PeakAnonymous
from ternaryforge.shapes import shape_config, write_random_checkpoint

ROUNDS = 5
MEMORY_LIMIT, SECONDS_LIMIT = 1.15, 2.0


def main() -> int:
    """One JSON line."""
    shape = sys.argv[1] if len(sys.argv) > 1 else "bitnet-2b-4t"
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as temporary:
        folder = Path(temporary) / "model"
        write_random_checkpoint(shape_config(shape), folder)
        seconds, growth, weight_bytes = [], 0, 0
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            with PeakAnonymous() as memory:
                model = TernaryModel.from_pretrained(folder)
            seconds.append(time.perf_counter() - start)
            growth = max(growth, memory.growth or 0)
            weight_bytes = model.transformer.weight_bytes
            del model
    line = {
        "benchmark": "load",
        "cpu": cpu_name(),
        "shape": shape,
        "seconds": round(statistics.median(seconds[1:]), 3),
        "peak_anonymous_bytes": growth,
        "weight_bytes": weight_bytes,
        "anonymous_share": round(growth / weight_bytes, 3),
    }
    print(json.dumps(line))
    return 0 if line["seconds"] < SECONDS_LIMIT and growth <= MEMORY_LIMIT * weight_bytes else 1


if __name__ == "__main__":
    sys.exit(main())
