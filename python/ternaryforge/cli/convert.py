# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge convert SRC OUT`: a Hugging Face folder becomes a ternary checkpoint."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ternaryforge.cli.output import (
    BitMapOption,
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


class Scheme(StrEnum):
    """Values of `--scheme`."""

    LS = "ls"
    ABSMEAN = "absmean"
    ABSMAX = "absmax"
    TWN = "twn"


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    *,
    scheme: Annotated[Scheme, typer.Option(help="How codes and scales are chosen.")] = Scheme.LS,
    scale: ScaleOption = Scale.TENSOR,
    group_size: GroupSizeOption = 128,
    bit_map: BitMapOption = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Mind the activations of --data, as 'calibrate' does by default.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Text for --calibrate.")] = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Make a ternary checkpoint from a Hugging Face folder."""
    if calibrate != (data is not None):
        raise typer.BadParameter("--calibrate and --data FILE go together")
    if data is not None:
        from ternaryforge.cli.calibrate import run

        options = {"scale": scale.value, "group_size": group_size, "bit_map": bit_map, "threads": threads}
        run(source, out, data, json=json, seed=seed, **options)
        return
    from ternaryforge.conversion import convert

    with progress_bar("Converting", in_bytes=True) as progress:
        report = convert(
            source,
            out,
            scheme=scheme.value,
            scale=scale.value,
            group_size=group_size,
            bit_map=bit_map,
            threads=threads,
            progress=progress,
        )
    if json:
        print_json(report.to_dict())
        return
    print_table(
        {
            "written": report.out,
            "ternary layers": f"{report.tensors} ({len(report.already_ternary)} were ternary already)",
            "ternary weights": f"{report.ternary_params:,}",
            f"bits per {'ternary' if bit_map is None else 'mapped'} weight": f"{report.bits_per_weight:.4f}",
            "file": f"{report.file_bytes:,} bytes",
            "seconds": f"{report.seconds:.1f}",
        }
        | ({"warning": " ".join(report.warnings)} if report.warnings else {})
    )
