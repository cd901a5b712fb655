# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge verify NAME`: a published model against its known answers."""

from pathlib import Path
from typing import Annotated

import typer

from ternaryforge.cli.output import MISSED, JsonOption, SeedOption, ThreadsOption, print_json, progress_bar


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="'demo', org/name[@revision], a folder, or a file.")],
    *,
    text: Annotated[Path | None, typer.Option(help="The text that perplexities are known for.")] = None,
    answers: Annotated[str | None, typer.Option(help="The model that it is meant to be, where NAME is a path.")] = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Compare a published model with its known answers: hashes, sizes, perplexity."""
    from ternaryforge.verification import verify

    del seed  # nothing here is random
    with progress_bar("Evaluating") as progress:
        report = verify(name, text=text, answers=answers, threads=threads, progress=progress)
    if json:
        print_json(report.to_dict())
    else:
        print(f"{report.name} in {report.path}")
        for check in report.checks:
            found = f", found {check.found}" if check.found else ""
            print(f"{check.status}: {check.what}: expected {check.expected}{found} ({check.note})")
        verdict = "passed" if report.passed else "failed" if report.failed else "nothing could be checked"
        print(f"result: {verdict}" + ("" if report.complete else "; some checks were not run"))
    if not report.passed:
        raise typer.Exit(MISSED)
