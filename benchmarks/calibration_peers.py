# SPDX-License-Identifier: Apache-2.0
"""What calibration is worth beside llama.cpp's own quantiser and plain GPTQ, all as TQ2_0 files that llama.cpp runs.

    python benchmarks/calibration_peers.py MODEL --train train.txt --text valid.txt --output results.jsonl
    python benchmarks/calibration_peers.py --table results.jsonl

MODEL is a dense folder whose widths are multiples of 256. Every file has the same dense embedding, head and norms, and
256 weights to an f16 scale; perplexity is that of protocol documents, computed by llama.cpp (llama-cpp-python).

- `full precision`: the F32 file.
- `llama.cpp TQ2_0`: llama_model_quantize of the F32 file.
- `GPTQ, absmean`: columns with feedback, each group's scale the mean magnitude of what it rounds, layer after layer
  with quantised inputs; no propagation, no descent.
- `ours`: calibrate; `ours, tuned`: with --tune-tokens.

Every line of --output is one run; what stands there is not run again. The table's last column is the distance of ln
perplexity to full precision over that of each peer.
"""

import argparse
import ctypes
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

import ternaryforge as tf
from ternaryforge import _core
from ternaryforge.calibration_blocks import Targets
from ternaryforge.calibration_keeping import KeptLayers
from ternaryforge.calibration_linear import DAMPING, LinearOptions, QuantizedLinear, damped, moment_factor
from ternaryforge.calibration_run import CalibrationRun
from ternaryforge.evaluation import cut_documents, log_softmax
from ternaryforge.tokenizer import Tokenizer

GROUP = 256  # weights of a TQ2_0 block
F32 = 0  # of ggml's types
ROUNDED = "llama.cpp TQ2_0"
PEERS = (ROUNDED, "GPTQ, absmean")
RUNGS = ("full precision", *PEERS, "ours", "ours, tuned")


class PlainGptq(CalibrationRun):
    """GPTQ with a ternary grid whose scale is the mean magnitude of a group."""

    def _quantize(self, slot: str, weights: Any, moments: Any, lacking: Any) -> QuantizedLinear:
        del slot, lacking
        with damped(moments, DAMPING):
            trits, scales = _core.quant.round_with_feedback(
                weights.astype(np.float64),
                moment_factor(moments),
                np.diag(moments).copy(),
                rule="absmean",
                scale="group",
                group_size=GROUP,
                threads=self._options.threads,
            )
        return QuantizedLinear(trits, scales, math.nan, math.nan, 0)


def gptq(source: Path, out: Path, text: str, tokens: int, seed: int) -> None:
    """Writes the folder of `GPTQ, absmean`."""
    options = LinearOptions("gptq", "group", GROUP, DAMPING, 0, _core.parallel.default_threads())
    run = PlainGptq(source, options, Targets(0.0, 0.0))
    drawn = run.draw(text, tokens, seed)
    kept = KeptLayers(out, {"gptq": True} | run.key(drawn, tokens, seed))
    run.quantize(drawn, kept, None)
    run.write(out, kept)
    kept.discard()


def quantize_there(source: Path, out: Path) -> None:
    """llama.cpp's TQ2_0 of a file, embedding and head left as they are."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_TQ2_0
    parameters.token_embedding_type = parameters.output_tensor_type = F32
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not quantise {source}")


def perplexity_there(file: Path, folder: Path, text: str) -> float:
    """Protocol documents in llama.cpp, with the tokens of our tokenizer."""
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise SystemExit(f"{folder}: there must be a tokenizer")
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    model = llama_cpp.Llama(str(file), n_ctx=context, n_batch=context, logits_all=True, verbose=False, n_threads=1)
    nats, tokens = 0.0, 0
    for window in cut_documents(tokenizer, text, context, tokens=None):
        model.reset()
        model.eval(window.ids)
        scores = log_softmax(np.array(model.scores[window.first - 1 : len(window.ids) - 1], np.float32))
        nats -= float(scores[np.arange(len(scores)), window.ids[window.first :]].sum())
        tokens += len(scores)
    model.close()
    return math.exp(nats / tokens)


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and spread (largest less smallest) of the draws, and the share of each peer's distance."""
    found = {
        rung: [line["perplexity"] for line in lines if line["rung"] == rung]
        for rung in RUNGS
        if any(line["rung"] == rung for line in lines)
    }
    mean = {rung: statistics.mean(values) for rung, values in found.items()}
    rows = ["| file | draws | perplexity | spread | of llama.cpp's distance | of GPTQ's |", "|---|---|---|---|---|---|"]
    for rung, values in found.items():
        distance = math.log(mean[rung] / mean["full precision"])
        shares = [f"{distance / math.log(mean[peer] / mean['full precision']):.3f}" for peer in PEERS]
        spread = f"{max(values) - min(values):.2g}" if len(values) > 1 else ""
        rows.append(f"| {rung} | {len(values)} | {mean[rung]:.4g} | {spread} | {' | '.join(shares)} |")
    return "\n".join(rows)


def make(rung: str, seed: int, arguments: argparse.Namespace, folder: Path) -> Path:
    """The GGUF file of a rung."""
    dense, file = folder / "dense.gguf", folder / "file.gguf"
    if rung in ("full precision", ROUNDED):
        tf.export(arguments.model, dense, profile="upstream", head="F32")
        if rung == ROUNDED:
            quantize_there(dense, file)
        return file if rung == ROUNDED else dense
    if rung == "GPTQ, absmean":
        text = arguments.train.read_text(encoding="utf-8")
        gptq(arguments.model, folder / "model", text, arguments.tokens, seed)
    else:
        tf.calibrate(
            arguments.model,
            folder / "model",
            arguments.train,
            group_size=GROUP,
            tokens=arguments.tokens,
            tune_tokens=arguments.tune_tokens if rung == "ours, tuned" else 0,
            seed=seed,
        )
    tf.export(folder / "model", file, profile="upstream", head="F32")
    return file


def main() -> None:
    """Runs what is missing, one line of JSON each."""
    if sys.argv[1:2] == ["--table"]:
        print(table([json.loads(line) for file in sys.argv[2:] for line in Path(file).read_text().splitlines()]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--tune-tokens", type=int, default=800_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    done = {(line["rung"], line["seed"]) for line in map(json.loads, lines)}
    for rung in arguments.rungs:
        for seed in arguments.seeds[: 1 if rung in ("full precision", ROUNDED) else None]:
            if (rung, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                file = make(rung, seed, arguments, Path(folder))
                line = {
                    "rung": rung,
                    "seed": seed,
                    "bytes": file.stat().st_size,
                    "perplexity": perplexity_there(file, arguments.model, text),
                }
            with arguments.output.open("a", encoding="utf-8") as output:
                output.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
