# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge analyze MODEL --data FILE`: what each layer costs when it alone is stored in fewer bits."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ternaryforge.cli.output import (
    GroupSizeOption,
    JsonOption,
    Scale,
    ScaleOption,
    SeedOption,
    ThreadsOption,
    print_columns,
    print_json,
    progress_bar,
)


class By(StrEnum):
    """Values of `--by`."""

    LAYER = "layer"
    LINEAR = "linear"


CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", metavar="FILE", help="Measure layers as calibrate makes them of it.")
]
CalibrationTokensOption = Annotated[
    int, typer.Option("--calibration-tokens", min=1, help="Tokens that are drawn for that.")
]


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, org/name, or 'demo'.")],
    *,
    data: Annotated[Path, typer.Option(help="UTF-8 text; documents end with <|endoftext|>.")],
    by: Annotated[By, typer.Option(help="Layers whole, or every linear layer by itself.")] = By.LAYER,
    modes: Annotated[str, typer.Option(help="Modes to try, with commas.")] = "int8,ternary,binary",
    scale: ScaleOption = Scale.GROUP,
    group_size: GroupSizeOption = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Documents are taken until so many tokens are scored.")] = 8192,
    plot: Annotated[Path | None, typer.Option(help="Also draw the figure into this file (.svg, .png).")] = None,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = 4096,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Measure which layers tolerate fewer bits, and show their zeros and scales."""
    from ternaryforge.analysis import analyze

    with progress_bar("Analyzing") as progress:
        report = analyze(
            model,
            data,
            by=by.value,
            modes=[mode.strip() for mode in modes.split(",")],  # type: ignore[misc]
            scale=scale.value,
            group_size=group_size,
            tokens=tokens,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    if plot is not None:
        report.plot().savefig(plot)
    if json:
        print_json(report.to_dict())
        return
    print(f"perplexity {report.perplexity:.4f} on {report.tokens:,} tokens; rise of nll of a layer alone in a mode:")
    names = [effect.mode for effect in report.layers[0].effects]
    rows = [
        [
            layer.name,
            f"{layer.weights:,}",
            *(f"{effect.nll_rise:+.4f}" for effect in layer.effects),
            f"{layer.zero_fraction:.3f}",
            f"{layer.scale_mean:.4g}",
        ]
        for layer in report.layers
    ]
    print_columns(["layer", "weights", *names, "zeros", "scale"], rows)
