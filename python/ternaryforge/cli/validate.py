# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge validate MODEL`: does a model still compute what it should?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ternaryforge.cli.output import MISSED, JsonOption, SeedOption, ThreadsOption, print_json, print_table


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a GGUF file, or 'demo'.")],
    *,
    reference: Annotated[
        str | None,
        typer.Option(help="Model to compare with; default: llama.cpp for GGUF, the same model in floating point else."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text to compare on; default: a few sentences.")] = None,
    positions: Annotated[int, typer.Option(help="Tokens on which the two are compared.")] = 256,
    max_documents: Annotated[int | None, typer.Option(min=1, help="Perplexity on the first ones only.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="llama-cpp-python, llama-cli, or the path of such a program.")
    ] = None,
    least_top1: Annotated[float, typer.Option("--least-top1", help="Threshold of the agreement.")] = 0.97,
    most_kl: Annotated[float, typer.Option("--most-kl", help="Threshold of the divergence in nats.")] = 0.01,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Another threshold, such as perplexity=20; repeatable."),
    ] = None,
    output: Annotated[
        list[Path] | None, typer.Option(help="Also write the report: .json, .md, or .html with plots; repeatable.")
    ] = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Compare a model with a reference, measure it; exit code 3 where a threshold is missed."""
    from ternaryforge.validation import validate
    from ternaryforge.validation_report import check_suffix

    del seed  # greedy throughout
    limits = {"top1_agreement": least_top1, "kl": most_kl} | read_thresholds(threshold or ())
    for path in output or ():
        check_suffix(path)
    report = validate(
        model,
        reference,
        data=data,
        thresholds=limits,
        positions=positions,
        max_documents=max_documents,
        engine=engine,
        threads=threads,
    )
    for path in output or ():
        report.save(path)
    if json:
        print_json(report.to_dict())
    else:
        print_table(report.rows())
    if not report.passed:
        raise typer.Exit(MISSED)


def read_thresholds(texts: Sequence[str]) -> dict[str, float]:
    """`NAME=VALUE` as a dictionary; names are checked by `validate`."""
    thresholds = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            thresholds[name] = float(value)
        except ValueError:
            raise typer.BadParameter(f"--threshold is NAME=VALUE, got {text!r}") from None
    return thresholds
