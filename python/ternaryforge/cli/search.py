# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge search SRC --data FILE`: the best mode for every layer under a budget."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ternaryforge.cli.analyze import By, CalibrationOption, CalibrationTokensOption
from ternaryforge.cli.output import (
    MISSED,
    GroupSizeOption,
    JsonOption,
    Scale,
    ScaleOption,
    SeedOption,
    ThreadsOption,
    print_json,
    print_table,
    progress_bar,
)


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the dense checkpoint.")],
    *,
    data: Annotated[Path, typer.Option(help="UTF-8 text to measure on; documents end with <|endoftext|>.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file for the map.")] = None,
    max_perplexity: Annotated[float | None, typer.Option(help="The smallest map that keeps it.")] = None,
    max_size_mb: Annotated[float | None, typer.Option(help="Of the weights file, in millions of bytes.")] = None,
    score: Annotated[Path | None, typer.Option(metavar="FILE", help="Measure this map instead of searching.")] = None,
    by: Annotated[By, typer.Option(help="One mode for a layer, or for every linear layer by itself.")] = By.LAYER,
    modes: Annotated[
        str, typer.Option(help="Modes to choose from, with commas.")
    ] = "f16,int8,two_plane,ternary,binary",
    embedding: Annotated[str, typer.Option(help="Mode of the embedding, which is pinned.")] = "f16",
    lm_head: Annotated[
        str | None, typer.Option(help="Mode of the head; default: as a tied embedding, else f16.")
    ] = None,
    scale: ScaleOption = Scale.GROUP,
    group_size: GroupSizeOption = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Documents are taken until so many tokens are scored.")] = 16_384,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = 4096,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Find the bit map of least size within a perplexity, or of least perplexity within a size."""
    from ternaryforge.bit_map_search import score as score_map
    from ternaryforge.bit_map_search import search

    options: dict[str, Any] = {
        "max_perplexity": max_perplexity,
        "max_size_mb": max_size_mb,
        "scale": scale.value,
        "group_size": group_size,
        "tokens": tokens,
        "calibration": calibration,
        "calibration_tokens": calibration_tokens,
        "seed": seed,
        "threads": threads,
    }
    if score is not None:
        found = score_map(source, data, score, **options)
        if json:
            print_json(found.to_dict())
        else:
            print_table({"perplexity": f"{found.perplexity:.4f}", "file": f"{found.size_bytes:,} bytes"})
        if not found.kept:
            raise typer.Exit(MISSED)
        return
    if output is None:
        raise typer.BadParameter("--output FILE is needed, or --score FILE")
    with progress_bar("Searching") as progress:
        result = search(
            source,
            data,
            output=output,
            by=by.value,
            modes=[mode.strip() for mode in modes.split(",")],  # type: ignore[misc]
            embedding=embedding,  # type: ignore[arg-type]
            lm_head=lm_head,  # type: ignore[arg-type]
            progress=progress,
            **options,
        )
    if json:
        print_json(result.to_dict())
        return
    print_table(
        {
            "written": str(output),
            "embedding": result.layer_bit_map["embedding"],
            "layers": "\n".join(f"{i}: {mode}" for i, mode in enumerate(result.layer_bit_map["layer_modes"])),
            "file": f"{result.size_bytes:,} bytes",
            "perplexity": f"{result.perplexity:.4f} on {result.tokens:,} tokens",
            "measured": f"{len(result.measured)} maps"
            + (", which are all" if result.exhaustive else "")
            + (", rounded" if calibration is None else ", calibrated"),
        }
    )
