# SPDX-License-Identifier: Apache-2.0
"""Speed of the kernels for one and two planes of trits beside what the machine can do at most, in the same run.

Decoding (1 to 8 tokens) streams a matrix larger than the caches: GB/s and share of the read
bandwidth. Prefill multiplies matrices of a 2B model: multiply-adds a second and share of the peak of
the dot instruction. Answers are checked first: integer sums against NumPy, t16 and t20 against each
other bit by bit. Two planes (t8) are another matrix of the same shape. Ends with one JSON line.

    python benchmarks/bench_kernels.py --threads 1 --threads 2
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.machine import cpu_name

COLS = 2560
DECODE_ROWS = 163_840  # 105 MB of t16, 84 MB of t20, 210 MB of t8
PREFILL_SHAPES = [(6912, 2560), (2560, 6912)]
PREFILL_TOKENS = 128
LAYOUTS = ("t16", "t20")


def make_tensor(rows: int, cols: int, group_size: int, layout: str) -> tuple[Any, NDArray[np.int8]]:
    """A random t16 or t8 matrix with fp16 scales, and the trits (or levels) of its first 64 rows."""
    random = np.random.default_rng(rows + cols)
    bits, base = (2, 3) if layout == "t16" else (4, 9)
    codes = np.array([sum((i // base**n % base) << (bits * n) for n in range(8 // bits)) for i in range(81)], np.uint8)
    data = codes[random.integers(0, 81, _core.formats.layout_bytes(layout, rows, cols), dtype=np.uint8)]
    shape = (rows, -(-cols // group_size)) if group_size else (1,)
    scales = random.uniform(0.5, 1.5, shape).astype(np.float16).astype(np.float32)
    kind = "group" if group_size else "tensor"
    tensor = _core.formats.PackedTensor(
        layout, rows, cols, data, scale_kind=kind, group_size=group_size, scales=scales.reshape(-1)
    )
    head = _core.formats.unpack(data[: _core.formats.layout_bytes(layout, 64, cols)], layout, 64, cols)
    return tensor, head


def check(tensors: dict[str, Any], head: NDArray[np.int8], activations: str, *, grouped: bool) -> None:
    """Raises AssertionError where a kernel is wrong."""
    x = np.random.default_rng(0).normal(size=(9, head.shape[1])).astype(np.float32)
    outputs = [_core.kernels.linear(x, tensor, activations=activations) for tensor in tensors.values()]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])
    if not grouped:
        scale = next(iter(tensors.values())).effective_scales[0]
        codes, steps = _core.kernels.quantize_acts(x, activations=activations)
        expected = codes.astype(np.float64) @ head.T.astype(np.float64) / steps[:, None] * scale
        np.testing.assert_allclose(outputs[0][:, :64], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def make_layouts(rows: int, cols: int, group_size: int, threads: int, checked: tuple[str, ...]) -> dict[str, Any]:
    """A matrix in every layout; their products are right."""
    tensor, head = make_tensor(rows, cols, group_size, "t16")
    tensors = {layout: _core.kernels.repack(tensor, layout, threads=threads) for layout in LAYOUTS}
    planes, levels = make_tensor(rows, cols, group_size, "t8")
    for activations in checked:
        check(tensors, head, activations, grouped=group_size != 0)
        check({"t8": planes}, levels, activations, grouped=group_size != 0)
    return tensors | {"t8": planes}


def measure(tensor: Any, tokens: int, activations: str, threads: int, passes: int) -> dict[str, Any]:
    """Median seconds of one product, and the spread of the middle half."""
    seconds = sorted(_core.kernels.time_linear(tensor, tokens, activations=activations, threads=threads, passes=passes))
    spread = (seconds[3 * len(seconds) // 4] - seconds[len(seconds) // 4]) / seconds[len(seconds) // 2]
    return {"seconds": statistics.median(seconds), "spread": spread}


def decode(threads: int, bandwidth: float, passes: int, group_size: int) -> Iterator[dict[str, Any]]:
    """Few tokens on a matrix larger than the caches."""
    tensors = make_layouts(DECODE_ROWS, COLS, group_size, threads, ("int8", "int16"))
    for activations in ("int8", "int16"):
        for tokens in (1, 2, 4, 8) if activations == "int8" and group_size == 0 else (1,):
            for layout, weight in tensors.items():
                found = measure(weight, tokens, activations, threads, passes)
                # fp16 scales are read beside the codes
                size = weight.data.nbytes + (2 * DECODE_ROWS * -(-COLS // group_size) if group_size else 0)
                rate = size / found["seconds"]
                yield {
                    "part": "decode", "layout": layout, "activations": activations, "tokens": tokens,
                    "group_size": group_size, "threads": threads, **found, "gb_per_second": rate / 1e9,
                    "share": rate / bandwidth, "ns_per_weight": found["seconds"] / (DECODE_ROWS * COLS) * 1e9,
                }  # fmt: skip


def prefill(threads: int, peak: float, passes: int, group_size: int) -> Iterator[dict[str, Any]]:
    """Many tokens on two matrices of a 2B model."""
    for rows, cols in PREFILL_SHAPES:
        tensors = make_layouts(rows, cols, group_size, threads, ("int8",))
        for layout, weight in tensors.items():
            found = measure(weight, PREFILL_TOKENS, "int8", threads, passes)
            rate = rows * cols * PREFILL_TOKENS / found["seconds"]
            yield {
                "part": "prefill", "layout": layout, "activations": "int8", "tokens": PREFILL_TOKENS,
                "group_size": group_size, "rows": rows, "cols": cols, "threads": threads, **found,
                "gmac_per_second": rate / 1e9, "share": rate / peak,
            }  # fmt: skip


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, action="append", help="Default: 1.")
    parser.add_argument("--target", help="Default: the best.")
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--group-size", type=int, default=0, help="0: one scale for the tensor.")
    parser.add_argument("--part", choices=["decode", "prefill"], help="Default: both.")
    options = parser.parse_args()
    if options.target:
        _core.simd.use_target(options.target)
    results, limits = [], []
    for threads in options.threads or [1]:
        bandwidth = _core.kernels.read_bandwidth(size=256 << 20, passes=5, threads=threads)
        peak = _core.kernels.dot_peak(rounds=1_000_000, passes=3, threads=threads)
        limits.append({"threads": threads, "read_bytes_per_second": bandwidth, "dot_macs_per_second": peak})
        print(f"threads {threads}: read {bandwidth / 1e9:.1f} GB/s, dot {peak / 1e9:.0f} GMAC/s")
        runs = []
        if options.part != "prefill":
            runs.append(decode(threads, bandwidth, options.passes, options.group_size))
        if options.part != "decode":
            runs.append(prefill(threads, peak, options.passes, options.group_size))
        for run in runs:
            for result in run:
                rate = result.get("gb_per_second") or result["gmac_per_second"]
                shape = f" {result['rows']}x{result['cols']}" if "rows" in result else ""
                print(
                    f"{result['part']:8}{result['layout']} {result['activations']:6}{result['tokens']:4} tokens{shape}"
                    f" {result['seconds'] * 1e3:8.2f} ms +-{result['spread'] * 50:.0f} %  {rate:6.1f}"
                    f" {'GB/s' if 'gb_per_second' in result else 'GMAC/s'}, {result['share']:.2f} of the limit"
                )
                results.append(result)
    document = {
        "benchmark": "kernels", "cpu": cpu_name(), "target": _core.simd.active_target(),
        "limits": limits, "results": results,
    }  # fmt: skip
    print(json.dumps(document))


if __name__ == "__main__":
    main()
