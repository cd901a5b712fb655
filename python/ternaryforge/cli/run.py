# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge run SRC [OUT]`: convert or calibrate, export, validate; finished stages are not repeated."""

from pathlib import Path
from typing import Annotated

import typer

from ternaryforge.cli.convert import Scheme
from ternaryforge.cli.export import Profile
from ternaryforge.cli.output import (
    MISSED,
    GroupSizeOption,
    JsonOption,
    Scale,
    ScaleOption,
    SeedOption,
    ThreadsOption,
    print_columns,
    print_json,
    print_table,
    progress_bar,
)
from ternaryforge.cli.validate import read_thresholds


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of the checkpoint, org/name, or 'demo'.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder for all results; default: SRC-ternary.")
    ] = None,
    *,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Mind the activations of --data.")] = False,
    data: Annotated[Path | None, typer.Option(help="Text for --calibrate.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Text to validate on, apart from --data.")] = None,
    scheme: Annotated[Scheme, typer.Option(help="How codes and scales are chosen without --calibrate.")] = Scheme.LS,
    scale: ScaleOption = Scale.TENSOR,
    group_size: GroupSizeOption = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of calibration.")] = 32_768,
    tune_tokens: Annotated[int, typer.Option(min=0, help="Tokens of tuning, with --calibrate.")] = 0,
    profile: Annotated[Profile, typer.Option(help="For which engine to export.")] = Profile.UPSTREAM,
    no_export: Annotated[bool, typer.Option("--no-export", help="Make the checkpoint only.")] = False,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="For the checkpoint against SRC, such as kl=1.0; repeatable."),
    ] = None,
    max_documents: Annotated[int | None, typer.Option(min=1, help="Perplexity on the first ones only.")] = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Convert or calibrate, export and validate; exit code 3 where a threshold is missed."""
    from ternaryforge.pipeline import run

    if calibrate != (data is not None):
        raise typer.BadParameter("--calibrate and --data FILE go together")
    with progress_bar("Running") as progress:
        report = run(
            source,
            out,
            calibrate=calibrate,
            data=data,
            evaluation=evaluation,
            scheme=scheme.value,
            scale=scale.value,
            group_size=group_size,
            tokens=tokens,
            tune_tokens=tune_tokens,
            profile=None if no_export else profile.value,
            thresholds=read_thresholds(threshold or ()),
            max_documents=max_documents,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    if json:
        print_json(report.to_dict())
    else:
        rows = [
            [stage.name, "done before" if stage.reused else "done", f"{stage.seconds:.1f} s", stage.output or ""]
            for stage in report.stages
        ]
        print_columns(["stage", "", "time", "result"], rows)
        last = report.stages[-1].report
        print_table(
            {
                "perplexity": f"{last['perplexity']:.4f}, source {last['reference_perplexity']:.4f}, on {last['text']}",
                "passed": "yes" if report.passed else "NO: " + "; ".join(report.missed),
            }
        )
    if not report.passed:
        raise typer.Exit(MISSED)
