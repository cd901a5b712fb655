# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S603 - a script that prints and starts itself
"""Real shapes with random weights: written as checkpoints, planned, loaded, generated from; plan against measurement.

Usage: python benchmarks/bench_real_shapes.py FOLDER [SHAPE ...]    (up to 4 GB of disk there, removed at the end)

Each model is written to FOLDER and run in a process of its own, whose memory is sampled by the system. Ends with
one JSON line per shape; exit code 1 where memory or file size is off by more than 10 %.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ternaryforge import TernaryModel, shapes
from ternaryforge.memory import PeakAnonymous, anonymous_bytes
from ternaryforge.planning import plan

NAMES = ("falcon3-1b", "qwen3-1.7b", "bitnet-2b-4t", "llama3-8b")
SHARDS = {"llama3-8b": 4}
PROMPT, NEW = 128, 32
LIMIT = 0.10


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def run(folder: str, threads: int, layout: str) -> dict[str, float]:
    """Loads and generates; what this process took."""
    start = anonymous_bytes() or 0
    with PeakAnonymous() as memory:
        begin = time.perf_counter()
        model = TernaryModel.from_pretrained(folder, threads=threads, layout=layout)
        loaded = time.perf_counter() - begin
        loaded_anonymous = status("RssAnon")
        result = model.generate(list(range(1, PROMPT + 1)), max_new_tokens=NEW)
        total = time.perf_counter() - begin
    if memory.growth is None or len(result.token_ids) != NEW:
        raise SystemExit(f"memory is not told, or the model stopped early: {len(result.token_ids)} tokens")
    return {
        "peak_anonymous_bytes": start + memory.growth,
        "loaded_anonymous_bytes": loaded_anonymous,
        "peak_rss_bytes": status("VmHWM"),
        "weight_bytes": model.transformer.weight_bytes,
        "load_seconds": loaded,
        "seconds": total,
        "tokens_per_second": result.tokens_per_second,
        "prompt_tokens_per_second": result.prompt_tokens_per_second,
    }


def compare(name: str, folder: Path, threads: int) -> bool:
    """Writes, plans, runs and prints one shape; whether the plan was right."""
    path = folder / name
    try:
        shapes.write_random_checkpoint(shapes.shape_config(name), path, shards=SHARDS.get(name, 1))
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        planned = plan(path, threads=threads, prompt_tokens=PROMPT, max_new_tokens=NEW)
        by_shape = plan(shape=name, threads=threads)
        stage = next(stage for stage in planned.stages if stage.verb == "generate")
        command = [sys.executable, __file__, "--run", str(path), str(threads), planned.layout]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    finally:
        shutil.rmtree(path, ignore_errors=True)
    measured = json.loads(done.stdout)
    errors = {
        "peak_anonymous_bytes": stage.peak_anonymous_bytes / measured["peak_anonymous_bytes"] - 1,
        "peak_rss_bytes": stage.peak_rss_bytes / measured["peak_rss_bytes"] - 1,
        "file_bytes": by_shape.file_bytes / size - 1,
    }
    print(
        json.dumps(
            {
                "benchmark": "real_shapes",
                "shape": name,
                "threads": threads,
                "layout": planned.layout,
                "file_bytes": size,
                "packed_weights_bytes": stage.parts["packed weights"],
                "planned": {
                    "peak_anonymous_bytes": stage.peak_anonymous_bytes,
                    "peak_rss_bytes": stage.peak_rss_bytes,
                    "file_bytes": by_shape.file_bytes,
                    "seconds": round(stage.seconds, 2),
                    "tokens_per_second": round(planned.tokens_per_second, 2),
                    "prompt_tokens_per_second": round(planned.prompt_tokens_per_second, 1),
                },
                "measured": {key: round(value, 2) for key, value in measured.items()},
                "off_by": {key: round(value, 4) for key, value in errors.items()},
            }
        ),
        flush=True,
    )
    return max(np.abs(list(errors.values()))) <= LIMIT


def main() -> int:
    """Exit code 1 where the plan was off."""
    if sys.argv[1] == "--run":
        print(json.dumps(run(sys.argv[2], int(sys.argv[3]), sys.argv[4])))
        return 0
    threads = int(os.environ.get("TERNARYFORGE_NUM_THREADS", "2"))
    results = [compare(name, Path(sys.argv[1]), threads) for name in sys.argv[2:] or NAMES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
