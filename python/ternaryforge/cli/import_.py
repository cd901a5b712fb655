# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge import FILE OUT`: a GGUF file becomes a checkpoint folder."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ternaryforge.cli.output import (
    JsonOption,
    SeedOption,
    ThreadsOption,
    print_json,
    print_table,
    progress_bar,
)


class I2sLayout(StrEnum):
    """Values of `--i2s-layout`."""

    COLUMNS_128 = "128"
    COLUMNS_64 = "64"
    ROWS_4 = "rows4"


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file, or any part of a split one.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    *,
    type_42: Annotated[
        str, typer.Option("--type-42", help="What type number 42 means where sizes cannot tell: Q2_0 or PQ2_0.")
    ] = "",
    i2s_layout: Annotated[
        I2sLayout, typer.Option("--i2s-layout", help="How I2_S interleaves; 64: made by newer ARM builds.")
    ] = I2sLayout.COLUMNS_128,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Make a checkpoint folder from a GGUF file."""
    from ternaryforge.gguf.importing import import_gguf

    del seed  # nothing here is random
    with progress_bar("Importing") as progress:
        report = import_gguf(
            file, out, type_42=type_42, i2s_layout=i2s_layout.value, threads=threads, progress=progress
        )
    if json:
        print_json(report.to_dict())
        return
    types = ", ".join(f"{count} x {name}" for name, count in report.layout.items()) or "none"
    print_table(
        {
            "written": report.out,
            "made by": report.producer,
            "architecture": report.arch,
            "ternary tensors": types,
            "scale": report.scale or "none (dense)",
            "plain transformers": "loads it" if report.stock else "does not know these scales",
            "exact": "yes" if report.exact else "all but one rounding of the norms",
            "file": f"{report.file_bytes:,} bytes",
            "seconds": f"{report.seconds:.1f}",
        }
        | ({"warning": " ".join(report.warnings)} if report.warnings else {})
    )
