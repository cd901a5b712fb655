# SPDX-License-Identifier: Apache-2.0
"""Size against perplexity of bit maps: pure ternary, the Sandwich Rule, maps that `search` found, 8 and 16 bits.

    python benchmarks/bit_map_study.py MODEL --train train.txt --text valid.txt --output study.json --plot study.svg

Maps are searched on the training text, with layers as rounding or as calibration makes them; every point is a
folder that `convert` or `calibrate` writes with the map, evaluated by protocol documents. The output is written
after every point, and points that it holds are not run again.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import ternaryforge as tf
from ternaryforge.bit_map import MODES, BitMap, Mode, sandwich

SEARCHES = {"rounded": "searched by rounding", "calibrated": "searched as calibrated"}
COLOURS = {
    "fixed": "#3b6ea5",
    "searched by rounding": "#d98032",
    "searched as calibrated": "#5d9b61",
}


def fixed_maps(layers: int) -> dict[str, BitMap]:
    """Maps that need no search."""
    return {
        "all f16": sandwich(layers, "f16"),
        "all int8": sandwich(layers, "int8", ends="int8"),
        "Sandwich (int8, two planes)": sandwich(layers, "two_plane", ends="int8"),
        "Sandwich (f16, ternary)": sandwich(layers),
        "Sandwich (int8, ternary)": sandwich(layers, ends="int8"),
        "Sandwich (int8, binary)": sandwich(layers, "binary", ends="int8"),
        "pure ternary": sandwich(layers, ends="ternary"),
    }


def save(figure: Any, path: Path) -> None:
    """Text stays text, and the file changes only with the figures."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ternaryforge"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()), encoding="utf-8")


def measure(arguments: argparse.Namespace, bit_map: BitMap, *, calibrated: bool) -> dict[str, Any]:
    """Writes the folder of a map, and runs it."""
    grouped: dict[str, Any] = {"scale": "group", "group_size": arguments.group_size, "threads": arguments.threads}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if calibrated:
            tf.calibrate(arguments.model, out, arguments.train, bit_map=bit_map, **grouped)
        else:
            tf.convert(arguments.model, out, bit_map=bit_map, **grouped)
        size = (out / "model.safetensors").stat().st_size
        text = arguments.text.read_text(encoding="utf-8")
        result = tf.TernaryModel.from_pretrained(out, threads=arguments.threads).perplexity(
            text, max_documents=arguments.documents
        )
    return {"size_bytes": size, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}


def table(points: list[dict[str, Any]]) -> str:
    """Markdown: a row for each map, by size."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for point in points:
        row = rows.setdefault((point["kind"], point["name"]), {"size": point["size_bytes"]})
        row[point["how"]] = f"{point['perplexity']:.2f}"
    lines = ["| map | bytes | rounded | calibrated |", "|---|---|---|---|"]
    for (kind, name), row in sorted(rows.items(), key=lambda item: -item[1]["size"]):
        title = name if kind == "fixed" else f"{kind}, {name}"
        lines.append(f"| {title} | {row['size']:,} | {row.get('rounded', '')} | {row.get('calibrated', '')} |")
    return "\n".join(lines)


def plot(points: list[dict[str, Any]], title: str) -> Any:
    """Perplexity over size: rounded as open marks, calibrated as full ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, colour in COLOURS.items():
        own = sorted((point for point in points if point["kind"] == kind), key=lambda point: point["size_bytes"])
        for how, face in (("rounded", "white"), ("calibrated", colour)):
            chosen = [point for point in own if point["how"] == how]
            axes.plot(
                [point["size_bytes"] / 1e6 for point in chosen],
                [point["perplexity"] for point in chosen],
                "o" if kind == "fixed" else "o-",
                color=colour,
                markerfacecolor=face,
                label=f"{kind}, {how}" if chosen else None,
                markersize=5,
            )
    for point in points:
        if point["kind"] == "fixed" and point["how"] == "rounded":
            place = (point["size_bytes"] / 1e6, point["perplexity"])
            axes.annotate(point["name"], place, textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set_yscale("log")
    axes.set_xlabel("model.safetensors, megabytes")
    axes.set_ylabel("perplexity, documents")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    return figure


def main() -> None:
    """Runs the points that the output lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192, help="scored for a measurement of the search")
    parser.add_argument("--documents", type=int, help="first ones of the text that are evaluated; default: all")
    parser.add_argument("--megabytes", type=float, nargs="+", required=True, help="limits of the searches")
    parser.add_argument("--embedding", default="int8")
    parser.add_argument("--fixed", nargs="+", help="the maps without search; default: all")
    parser.add_argument("--how", nargs="+", choices=("rounded", "calibrated"), default=["rounded", "calibrated"])
    parser.add_argument("--by", choices=("layer", "linear"), default="layer", help="what has a mode of its own")
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="those that are searched")
    parser.add_argument("--search", nargs="+", choices=tuple(SEARCHES), default=list(SEARCHES))
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="drawn for a measurement of the search")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    document = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"points": []}
    document |= {
        "model": arguments.model.parent.name,
        "group_size": arguments.group_size,
        "text": arguments.text.name,
        "documents": arguments.documents,
        "search_tokens": arguments.tokens,
        "search_calibration_tokens": arguments.calibration_tokens,
        "search_modes": arguments.modes,
    }
    points = document["points"]
    config = json.loads((arguments.model / "config.json").read_text())

    def add(kind: str, name: str, bit_map: BitMap, **facts: Any) -> None:
        for how in arguments.how:
            if any((point["kind"], point["name"], point["how"]) == (kind, name, how) for point in points):
                continue
            found = measure(arguments, bit_map, calibrated=how == "calibrated")
            points.append({"kind": kind, "name": name, "how": how, **found, **facts, "bit_map": bit_map.to_dict()})
            arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            print(kind, name, how, found["size_bytes"], f"{found['perplexity']:.3f}", flush=True)

    for name, bit_map in fixed_maps(config["num_hidden_layers"]).items():
        if arguments.fixed is None or name in arguments.fixed:
            add("fixed", name, bit_map)
    embedding: Mode = arguments.embedding
    for way in arguments.search:
        for limit in arguments.megabytes:
            result = tf.search(
                arguments.model,
                arguments.train,
                max_size_mb=limit,
                output=arguments.output.with_name(f"{arguments.model.parent.name}-{arguments.by}-{way}.json"),
                by=arguments.by,
                modes=arguments.modes,
                embedding=embedding,
                scale="group",
                group_size=arguments.group_size,
                tokens=arguments.tokens,
                calibration=arguments.train if way == "calibrated" else None,
                calibration_tokens=arguments.calibration_tokens,
                threads=arguments.threads,
            )
            facts = {"search_perplexity": result.perplexity, "exhaustive": result.exhaustive}
            add(SEARCHES[way], f"{limit:g} MB", result.bit_map, **facts)
    print(table(points))
    if arguments.plot is not None:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        save(plot(points, f"{document['model']}, groups of {arguments.group_size}"), arguments.plot)


if __name__ == "__main__":
    main()
