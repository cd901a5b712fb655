# SPDX-License-Identifier: Apache-2.0
"""Output heads: how many rows the two-stage head looks up on trained models, and the time of every form.

Usage: python benchmarks/bench_head.py trained [FOLDER TEXT]    (the embedded model, and what is named)
       python benchmarks/bench_head.py time [ROWS COLS]         (128256 x 2560, 3 GB of memory)

`trained` feeds a text token by token and asks for the likeliest next token each time; both heads must
agree. On random weights bounds prune as they like, so that only trained models count there. `time`
needs a quiet machine; products do not depend on the values, and the input of the two-stage head is
one row of it with noise, as peaked as the logits of a trained model.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ternaryforge import TernaryModel, _core
from ternaryforge.machine import cpu_name, measure_machine

TOKENS, ROUNDS = 4000, 9
TEXT = "Once upon a time there was a little girl who lived near the sea. One day she found a red ball. "


def documents(text: str, model: TernaryModel) -> list[np.ndarray]:
    """Token ids of each story, as long as the context allows."""
    parts = [part.strip() for part in text.split("<|endoftext|>")]
    return [np.array(model.encode(part)[: model.context_length - 1], np.int32) for part in parts if part]


def trained(source: str, text: str) -> dict[str, object]:
    """Agreement and rows looked up; raises RuntimeError where the heads choose two tokens."""
    exact, found = (TernaryModel.from_pretrained(source, threads=1, head=head) for head in ("exact", "two-stage"))
    tokens = 0
    for ids in documents(text, exact):
        expected = exact.logits(ids).argmax(1)
        state = found.transformer.new_sequence()
        for place, token in enumerate(ids):
            (chosen,) = found.transformer.likeliest_tokens([(np.array([token], np.int32), state)])
            if chosen != expected[place]:
                raise RuntimeError(f"the two-stage head chose {chosen}, the exact one {expected[place]}")
        tokens += len(ids)
        if tokens >= TOKENS:
            break
    counts = found.transformer.search_counts()
    rows, cols = found.architecture.spec.vocab_size, found.transformer.spec.slots()["embedding"][1]
    exact_bytes = exact.transformer.head_bytes
    looked_up = counts["rows"] / max(1, counts["searches"] - counts["fallbacks"])
    row_bytes = exact_bytes // rows
    return {
        "model": Path(source).name,
        "head": [rows, cols],
        "tokens": tokens,
        "agreement": 1.0,
        "fallbacks": counts["fallbacks"],
        "rows_per_token": round(looked_up, 2),
        "bytes_per_token": round(found.transformer.head_bytes + looked_up * row_bytes),
        "exact_bytes": exact_bytes,
    }


def median_seconds(run: Callable[[], object]) -> float:
    """Of several runs, the first two left out."""
    seconds = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def timed(rows: int, cols: int) -> dict[str, object]:
    """Milliseconds and share of the bandwidth of each form, one token, by threads."""
    random = np.random.default_rng(0)
    values = random.standard_normal((rows, cols), np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    x = values[rows // 3 : rows // 3 + 1] * np.float32(0.4) + random.standard_normal((1, cols), np.float32)
    del values
    tensor = _core.formats.PackedTensor("bf16", rows, cols, bits)
    threads = sorted({1, _core.parallel.default_threads()})
    machine = measure_machine(threads=threads)
    heads = {f"int{bits}": _core.kernels.QuantizedHead(tensor, bits, threads=threads[-1]) for bits in (8, 6, 4)}
    result: dict[str, object] = {"head": [rows, cols]}
    expected = _core.kernels.linear(x, tensor, activations="float", threads=1)[0]
    for count in threads:
        finder = _core.kernels.TwoStageHead(tensor, threads=count)
        ((tokens, logits, complete),) = finder.find(x)
        chosen = int(logits.argmax()) if complete else int(tokens[logits.argmax()])
        if chosen != int(expected.argmax()):
            raise RuntimeError(f"the two-stage head chose {chosen}, the exact one {int(expected.argmax())}")
        runs: dict[str, tuple[int, Callable[[], object]]] = {
            "exact": (
                2 * rows * cols,
                lambda count=count: _core.kernels.linear(x, tensor, activations="float", threads=count),
            )
        }
        for name, head in heads.items():
            runs[name] = (head.bytes, lambda head=head, count=count: head.multiply(x, threads=count))
        runs["two-stage"] = (finder.bytes, lambda finder=finder: finder.find(x))
        for name, (size, run) in runs.items():
            seconds = median_seconds(run)
            share = size / seconds / machine.read_bandwidth[count]
            result[f"{name}, {count} threads"] = {
                "ms": round(1e3 * seconds, 3),
                "bytes": size,
                "bandwidth_share": round(share, 3),
            }
        result[f"rows looked up, {count} threads"] = len(tokens)
    return result


def main(arguments: Sequence[str]) -> int:
    """One JSON line per model, or one for the times."""
    what, *rest = arguments or ["trained"]
    if what == "trained":
        pairs = [("demo", None), *zip(rest[::2], rest[1::2], strict=True)]
        for source, text in pairs:
            words = Path(text).read_text(encoding="utf-8") if text else "<|endoftext|>".join([TEXT * 4] * 10)
            print(json.dumps({"benchmark": "head", "cpu": cpu_name()} | trained(source, words)))
        return 0
    rows, cols = (int(number) for number in rest) if rest else (128256, 2560)
    print(json.dumps({"benchmark": "head", "cpu": cpu_name()} | timed(rows, cols)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
