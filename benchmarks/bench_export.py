# SPDX-License-Identifier: Apache-2.0
"""Exports a random model of a known shape and prints how long it took and how much anonymous memory.

    python benchmarks/bench_export.py [--shape bitnet-2b-4t] [--profiles ik bitnetcpp] [--tokenizer FOLDER] [--work DIR]

3 GB of disk are needed for 2 G weights. The folder is made once where --work names one. Exits with 1 where an
export was not exact.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
from ternaryforge.families import read_architecture
from ternaryforge.gguf.exporting import export_gguf
from ternaryforge.shapes import shape_config
from ternaryforge.weights import scale_name

_PIECE = 1 << 22


def make(folder: Path, shape: str, tokenizer: Path | None) -> None:
    """A folder of random trits and bf16 embeddings."""
    config = shape_config(shape)
    architecture = read_architecture(config, where=shape)
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 3, (4, _PIECE), np.uint8)
    codes = digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6
    bits = (rng.standard_normal(_PIECE, np.float32) * np.float32(0.02)).view(np.uint32) >> 16
    plans: list[TensorPlan] = []
    for slot, (rows, cols) in architecture.spec.slots().items():
        name = architecture.tensor_names[slot]
        if architecture.is_linear(slot):
            plans += [TensorPlan(name, "U8", (rows // 4, cols)), TensorPlan(scale_name(name), "F32", (1,))]
        else:
            plans.append(TensorPlan(name, "BF16", (cols,) if rows == 1 else (rows, cols)))
    with CheckpointWriter(folder, plans) as writer:
        for plan in plans:
            if plan.dtype == "F32":
                writer.write(plan.name, np.array([0.03125], np.float32))
                continue
            source = codes if plan.dtype == "U8" else bits.astype(np.uint16)
            with writer.writing(plan.name) as part:
                size = int(np.prod(plan.shape))
                for begin in range(0, size, _PIECE):
                    part(source[: min(_PIECE, size - begin)])
        writer.write_json("config.json", config)
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
            if tokenizer is not None and (tokenizer / name).is_file():
                writer.copy_file(tokenizer / name)


def main() -> int:
    """Prints one line per profile and a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="bitnet-2b-4t")
    parser.add_argument("--profiles", nargs="+", default=["ik", "bitnetcpp"])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        source = work / options.shape
        if not source.exists():
            make(source, options.shape, options.tokenizer)
        for profile in options.profiles:
            report = export_gguf(source, work / "out.gguf", profile=profile, threads=options.threads)
            (work / "out.gguf").unlink()
            results.append(report)
            peak = (report.peak_anonymous_bytes or 0) / 1e6
            print(
                f"{profile:10} {report.seconds:5.1f} s, {peak:6.1f} MB anonymous, {report.file_bytes / 1e9:.2f} GB, "
                f"exact {report.exact}",
                flush=True,
            )
        shutil.rmtree(Path(temporary) / options.shape, ignore_errors=True)
    print(json.dumps({"shape": options.shape, "threads": options.threads,
                      "results": [{"profile": r.profile, "seconds": r.seconds, "file_bytes": r.file_bytes,
                                   "peak_anonymous_bytes": r.peak_anonymous_bytes, "exact": r.exact}
                                  for r in results]}))  # fmt: skip
    return 0 if all(report.exact for report in results) else 1


if __name__ == "__main__":
    sys.exit(main())
