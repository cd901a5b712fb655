# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge bench MODEL` or `bench --shape NAME`: speed, against what the machine can do."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ternaryforge.cli.output import (
    ActivationsOption,
    HeadMode,
    HeadOption,
    JsonOption,
    KvOption,
    KvType,
    SeedOption,
    print_columns,
    print_json,
    print_table,
    progress_bar,
)


class LayoutName(StrEnum):
    """Values of `--layout`."""

    AUTO = "auto"
    T16 = "t16"
    T20 = "t20"


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A folder, file or org/name, or 'demo'.")
    ] = None,
    *,
    shape: Annotated[str | None, typer.Option(help="Instead: random weights of this shape, in memory.")] = None,
    threads: Annotated[str | None, typer.Option(help="A list such as 1,2; default: the physical cores.")] = None,
    contexts: Annotated[str, typer.Option(help="Tokens before the measured ones, such as 0,2048.")] = "0",
    prompt_tokens: Annotated[str, typer.Option(help="Prompts for prefill, such as 128,512.")] = "128",
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded one by one.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Prefills of each size.")] = 3,
    targets: Annotated[str | None, typer.Option(help="Instruction sets such as avx512-vnni,avx2.")] = None,
    activations: ActivationsOption = None,
    kv: KvOption = KvType.F32,
    head: HeadOption = HeadMode.EXACT,
    layout: Annotated[
        LayoutName, typer.Option(help="Run-time layout of a shape's ternary weights; t20 keeps no second copy.")
    ] = LayoutName.AUTO,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Measure decoding and prefill on a quiet machine."""
    from ternaryforge import _core
    from ternaryforge.benchmark import Plan, benchmark, build_model, build_shape

    del seed  # random weights are always the same
    if (model is None) == (shape is None):
        raise typer.BadParameter("name either a model or --shape", param_hint="MODEL")
    if shape is None and layout is not LayoutName.AUTO:
        raise typer.BadParameter("only a shape takes a layout", param_hint="--layout")
    plan = Plan(
        threads=_numbers(threads, "--threads", 1) if threads else [_core.parallel.default_threads()],
        contexts=_numbers(contexts, "--contexts", 0),
        prompt_tokens=_numbers(prompt_tokens, "--prompt-tokens", 1),
        targets=targets.split(",") if targets else [],
        decode_tokens=decode_tokens,
        repeats=repeats,
    )
    if shape is not None:
        build = build_shape(
            shape,
            context_length=plan.longest,
            activations=activations.value if activations else None,
            kv=kv.value,
            head=head.value,
            layout=layout.value,
        )
    else:
        build = build_model(
            str(model), activations=activations.value if activations else None, kv=kv.value, head=head.value
        )
    with progress_bar("Measuring") as progress:
        report = benchmark(build, plan, model=str(shape or model), progress=progress)
    if output is not None:
        report.save(output)
    if json:
        print_json(report.to_dict())
        return
    machine = report.machine
    print_table(
        {
            "model": f"{report.model}, {report.activations} activations, {report.weight_bytes / 1e6:,.0f} MB weights",
            "head": f"{report.head}, {report.head_bytes / 1e6:,.0f} MB; keys and values {report.kv}",
            "machine": f"{machine.cpu}, {machine.cores} cores; {machine.compiler}, Highway {machine.highway}",
            "reads": ", ".join(f"{rate / 1e9:.1f} GB/s with {n}" for n, rate in machine.read_bandwidth.items()),
            "multiplies": "; ".join(
                f"{target} " + ", ".join(f"{rate / 1e9:.0f} GMAC/s with {n}" for n, rate in rates.items())
                for target, rates in machine.dot_peak.items()
            ),
            "loading": f"{report.load_seconds:.2f} s",
        }
    )
    print_columns(
        ["target", "layout", "threads", "context", "decode/s", "of memory", "prompt", "prefill/s", "of dot peak"],
        [
            [
                result.target,
                result.layout,
                str(result.threads),
                str(result.context),
                f"{result.decode_tokens_per_second:.1f}",
                f"{result.decode_bandwidth_share:.2f}",
                str(result.prompt_tokens),
                f"{result.prefill_tokens_per_second:.1f}",
                f"{result.prefill_peak_share:.2f}",
            ]
            for result in report.results
        ],
    )


def _numbers(text: str, option: str, least: int) -> list[int]:
    """A comma-separated list. Anything else is wrong usage."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"a list such as 1,2 is wanted, got '{text}'", param_hint=option) from None
    if min(numbers) < least:
        raise typer.BadParameter(f"numbers from {least} on are wanted, got '{text}'", param_hint=option)
    return numbers
