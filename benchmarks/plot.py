# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of the documents from benchmarks/results/ as small SVG files.

Usage: python benchmarks/plot.py [OUTPUT_FOLDER]      (needs matplotlib: pip install 'ternaryforge[plot]')
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bit_map_study
import calibration_ladder
import matplotlib as mpl
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
OUTPUT = RESULTS.parents[1] / "docs" / "figures"
PARTS = {"matmul": "matrices of layers", "head": "head", "attention": "attention", "rest": "all else"}
COLOURS = ("#3b6ea5", "#d98032", "#5d9b61", "#9a9a9a")


def read(name: str) -> Any:
    """A document of the results, or all its lines."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)


def save(figure: Figure, path: Path) -> None:
    """Text stays text, so the files are small; no date, so they change only with the figures."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ternaryforge"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    # matplotlib leaves blanks at line ends.
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()), encoding="utf-8")


def peers(document: Any) -> Figure:
    """Bars by engine, one panel for decoding and one for prefill, one colour for each thread count."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        rate = f"{measure}_tokens_per_second"
        rates = {
            (run["threads"], result["engine"]): result[rate]
            for run in document["runs"]
            for result in run["results"]
            if rate in result
        }
        engines = list(dict.fromkeys(engine for _, engine in rates))
        counts = sorted({threads for threads, _ in rates})
        height = 0.8 / len(counts)
        for i, threads in enumerate(counts):
            places = [row + (i - (len(counts) - 1) / 2) * height for row in range(len(engines))]
            values = [rates.get((threads, engine), 0.0) for engine in engines]
            bars = axes.barh(places, values, height, color=COLOURS[i], label=f"{threads} thread{'s' * (threads > 1)}")
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axes.set_yticks(range(len(engines)), engines if measure == "decode" else [""] * len(engines), fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{measure}, tokens per second", fontsize=9)
        axes.margins(x=0.12)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def contexts(*documents: Any) -> Figure:
    """Seconds of a decoded token by context, stacked by part, one panel for each thread count."""
    results = {(row["threads"], row["context"]): row for document in documents for row in document["results"]}
    counts = sorted({threads for threads, _ in results})
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, threads in zip(figure.subplots(1, len(counts), sharey=True, squeeze=False)[0], counts, strict=True):
        rows = [result for (count, _), result in sorted(results.items()) if count == threads]
        labels = [str(row["context"]) for row in rows]
        bottom = [0.0] * len(rows)
        for colour, (part, label) in zip(COLOURS, PARTS.items(), strict=True):
            values = [row["decode_parts"][part] * 1e3 for row in rows]
            axes.bar(labels, values, 0.6, bottom=bottom, color=colour, label=label)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        axes.set_title(f"{threads} thread{'s' * (threads > 1)}", fontsize=9)
        axes.set_xlabel("tokens in context", fontsize=8)
    axes.legend(fontsize=8, loc="upper left")
    figure.axes[0].set_ylabel("milliseconds per token", fontsize=8)
    return figure


def bit_maps(document: Any) -> Figure:
    """Perplexity over size of bit maps."""
    return bit_map_study.plot(document["points"], f"stories260K, {document['documents']} documents")


def ladder(lines: Any) -> Figure:
    """Perplexity of every rung of calibration, a dot for each draw, one panel for each model."""
    models = list(dict.fromkeys(line["model"] for line in lines))
    rungs = [rung for rung in calibration_ladder.RUNGS if any(line["rung"] == rung for line in lines)]
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        runs = [line for line in lines if line["model"] == model]
        places = [rungs.index(line["rung"]) for line in runs]
        axes.plot([line["perplexity"] for line in runs], places, "o", markersize=4, color=COLOURS[0])
        axes.set_xscale("log")
        axes.grid(axis="x", which="both", alpha=0.3)
        axes.set_title(f"{model}: perplexity", fontsize=9)
    figure.axes[0].set_yticks(range(len(rungs)), rungs, fontsize=8)
    figure.axes[0].invert_yaxis()
    return figure


def main() -> int:
    """Writes every figure whose results are there."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    output.mkdir(parents=True, exist_ok=True)
    figures: tuple[tuple[str, Callable[..., Figure], list[str]], ...] = (
        ("peers.svg", peers, ["peers-bitnet-2b-4t.json"]),
        ("contexts.svg", contexts, [f"bench-{part}.json" for part in ("contexts-1", "contexts-2", "32k-1", "32k-2")]),
        ("bit-maps-stories260K.svg", bit_maps, ["bit-maps-stories260K.json"]),
        ("calibration-ladder.svg", ladder, ["calibration-ladder.jsonl"]),
    )
    for name, draw, sources in figures:
        save(draw(*map(read, sources)), output / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
