# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge validate MODEL`: does a model still compute what it should?"""

from pathlib import Path
from typing import Annotated

import typer

from ternaryforge.cli.output import JsonOption, SeedOption, ThreadsOption, print_json, print_table

_MISSED = 3


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a GGUF file, or 'demo'.")],
    *,
    reference: Annotated[
        str | None,
        typer.Option(help="Model to compare with; default: llama.cpp for GGUF, the same model in floating point else."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text to compare on; default: a few sentences.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="llama-cpp-python, llama-cli, or the path of such a program.")
    ] = None,
    least_top1: Annotated[float, typer.Option("--least-top1", help="Threshold of the agreement.")] = 0.97,
    most_kl: Annotated[float, typer.Option("--most-kl", help="Threshold of the divergence in nats.")] = 0.01,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Compare a model with a reference; exit code 3 where a threshold is missed."""
    from ternaryforge.validation import validate

    del seed  # greedy throughout
    report = validate(
        model,
        reference,
        data=data,
        thresholds={"top1_agreement": least_top1, "kl": most_kl},
        engine=engine,
        threads=threads,
    )
    if json:
        print_json(report.to_dict())
    else:
        rows: dict[str, object] = {
            "compared with": report.reference,
            "likeliest token": f"equal in {report.top1_agreement:.4f} of {report.positions} places",
            "divergence": "not given by this engine" if report.kl is None else f"{report.kl:.2e} nats",
            "greedy": f"the first {report.greedy_equal} of {report.greedy_tokens} tokens are equal",
        }
        if report.tokens_equal is not None:
            rows["tokens of the text"] = "equal" if report.tokens_equal else "DIFFERENT"
        rows["perplexity"] = f"{report.perplexity:.4f}" + (
            "" if report.reference_perplexity is None else f", reference {report.reference_perplexity:.4f}"
        )
        if report.bits_per_weight is not None:
            rows["ternary layers"] = (
                f"{report.bits_per_weight:.4f} bits per weight, {report.sparsity:.3f} zeros, "
                f"{report.balance or 0:.3f} of the others +1"
            )
        rows |= {"file": f"{report.file_bytes:,} bytes", "passed": "yes" if report.passed else "NO"}
        print_table(rows)
    if not report.passed:
        raise typer.Exit(_MISSED)
