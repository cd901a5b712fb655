# SPDX-License-Identifier: Apache-2.0
"""What every rung of calibration is worth: perplexity of a whole text by method and by calibration draw.

    python benchmarks/calibration_ladder.py MODEL --name stories260K --train train.txt --text valid.txt \
        --group-size 64 --seeds 0 1 2 --output ladder.jsonl
    python benchmarks/calibration_ladder.py --table ladder.jsonl

Every line of --output is one run as JSON, so that an interrupted ladder is not lost: what it holds is not run again.
--table prints the means over the draws, and how far the draws lie apart, as Markdown.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import ternaryforge as tf

RUNGS: dict[str, dict[str, Any]] = {
    "absmean": {"scheme": "absmean"},
    "least squares": {"scheme": "ls"},
    "grid": {"method": "grid"},
    "fit": {"method": "fit"},
    "gptq": {"method": "gptq"},
    "gptq, descent": {"method": "best", "propagation": 0.0, "residual": 0.0},
    "gptq, propagation": {"method": "best", "residual": 0.0, "descent_rounds": 0},
    "gptq, descent, propagation": {"method": "best", "residual": 0.0},
    "gptq, descent, residual": {"method": "best", "propagation": 0.0},
    "best": {"method": "best"},
    "two planes, fit": {"method": "fit", "planes": 2},
    "two planes, gptq": {"method": "gptq", "planes": 2},
    "two planes, best": {"method": "best", "planes": 2},
}


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and spread (largest less smallest) of the perplexities by rung and model."""
    models = list(dict.fromkeys(line["model"] for line in lines))
    rows = [
        "| rung | " + " | ".join(f"{model} | spread" for model in models) + " |",
        "|---" * (1 + 2 * len(models)) + "|",
    ]
    for rung in RUNGS:
        cells = []
        for model in models:
            draws = [line["perplexity"] for line in lines if (line["model"], line["rung"]) == (model, rung)]
            cells.append(f"{statistics.mean(draws):.4g}" if draws else "")
            cells.append(f"{max(draws) - min(draws):.2g}" if len(draws) > 1 else "")
        if any(cells):
            rows.append(f"| {rung} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Runs the chosen rungs, one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sys.argv[1:2] == ["--table"]:
        print(table([json.loads(line) for file in sys.argv[2:] for line in Path(file).read_text().splitlines()]))
        return
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="of the model in the lines; default: that of its folder")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    name = arguments.name or arguments.model.name
    old = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    done = {(line["model"], line["rung"], line["seed"]) for line in map(json.loads, old)}
    for rung in arguments.rungs:
        options = RUNGS[rung]
        for seed in arguments.seeds[: 1 if "scheme" in options else None]:
            if (name, rung, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                out, line = Path(folder) / "out", {"model": name, "rung": rung, "seed": seed}
                grouped = {"scale": "group", "group_size": arguments.group_size, "threads": 1} | options
                if "scheme" in options:
                    report: Any = tf.convert(arguments.model, out, **grouped)
                else:
                    report = tf.calibrate(
                        arguments.model, out, arguments.train, tokens=arguments.tokens, seed=seed, **grouped
                    )
                    line |= {"calibration_tokens": report.calibration_tokens, "held_out": report.perplexity_after}
                result = tf.TernaryModel.from_pretrained(out, threads=1).perplexity(text)
            line |= {
                "group_size": arguments.group_size,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
                "bits_per_weight": report.bits_per_weight,
                "seconds": report.seconds,
            }
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
