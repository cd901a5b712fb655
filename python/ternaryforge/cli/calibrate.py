# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge calibrate SRC OUT --data FILE`: a dense folder becomes a ternary one that minds its activations."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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


class Method(StrEnum):
    """Values of `--method`."""

    GRID = "grid"
    FIT = "fit"
    GPTQ = "gptq"
    BEST = "best"


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    *,
    data: Annotated[Path, typer.Option(help="UTF-8 text to calibrate on; documents end with <|endoftext|>.")],
    method: Annotated[Method, typer.Option(help="From quick to good: grid, fit, gptq, best.")] = Method.BEST,
    scale: ScaleOption = Scale.GROUP,
    group_size: GroupSizeOption = 128,
    planes: Annotated[
        int, typer.Option(min=1, max=2, help="1: trits. 2: two tied planes of them, 4 bits a weight, far closer.")
    ] = 1,
    bit_map: BitMapOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to draw from the text.")] = 32_768,
    evaluation: Annotated[
        Path | None, typer.Option(help="Text to measure on; default: documents of the text that are not drawn.")
    ] = None,
    tune_tokens: Annotated[
        int, typer.Option(min=0, help="Then train scales and norms on so many tokens; needs PyTorch and transformers.")
    ] = 0,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Quantise a dense checkpoint with the help of a text. Interrupted, the same command goes on."""
    run(
        source,
        out,
        data,
        json=json,
        method=method.value,
        scale=scale.value,
        group_size=group_size,
        planes=planes,
        bit_map=bit_map,
        tokens=tokens,
        evaluation=evaluation,
        tune_tokens=tune_tokens,
        threads=threads,
        seed=seed,
    )


def run(source: Path, out: Path, data: Path, *, json: bool, **options: Any) -> None:
    """Calibrates with the options of `ternaryforge.calibrate`, and reports; `convert --calibrate` does the same."""
    from ternaryforge.calibration import calibrate

    with progress_bar("Calibrating") as progress:
        report = calibrate(source, out, data, progress=progress, **options)
    if json:
        print_json(report.to_dict())
        return
    print_table(
        {
            "written": report.out,
            "ternary layers": f"{report.tensors}, {report.resumed_layers} blocks of an earlier run",
            "ternary weights": f"{report.ternary_params:,}",
            "planes of trits": str(report.planes),
            "bits per ternary weight": f"{report.bits_per_weight:.4f}",
            "file": f"{report.file_bytes:,} bytes",
            "calibrated on": f"{report.calibration_tokens:,} tokens",
            "measured on": report.measured_on,
            "perplexity": f"{report.perplexity_after:.3f} (source {report.perplexity_source:.3f}, rounded "
            f"{report.perplexity_before:.3f}"
            + (")" if report.perplexity_untuned is None else f", before tuning {report.perplexity_untuned:.3f})"),
            "seconds": f"{report.seconds:.1f}",
        }
        | ({"warning": " ".join(report.warnings)} if report.warnings else {})
    )
