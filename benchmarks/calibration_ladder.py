# SPDX-License-Identifier: Apache-2.0
"""What every rung of calibration is worth: perplexity of a whole text by method and by calibration draw.

    python benchmarks/calibration_ladder.py MODEL --train train.txt --text valid.txt --group-size 64 --seeds 0 1 2

Every line of --output is one run as JSON, so that an interrupted ladder is not lost.
"""

import argparse
import json
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
}


def main() -> None:
    """Runs the chosen rungs, one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    for rung in arguments.rungs:
        options = RUNGS[rung]
        for seed in arguments.seeds[: 1 if "scheme" in options else None]:
            with tempfile.TemporaryDirectory() as folder:
                out, line = Path(folder) / "out", {"model": str(arguments.model.name), "rung": rung, "seed": seed}
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
