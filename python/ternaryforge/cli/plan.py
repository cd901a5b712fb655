# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge plan SRC`: what converting and running will need, before anything runs."""

from enum import StrEnum
from typing import Annotated

import typer

from ternaryforge.cli.output import (
    ActivationsOption,
    GroupSizeOption,
    HeadMode,
    HeadOption,
    JsonOption,
    KvOption,
    KvType,
    Scale,
    ScaleOption,
    SeedOption,
    ThreadsOption,
    print_json,
    print_table,
)


class Method(StrEnum):
    """Values of `--method`."""

    NONE = "none"
    LS = "ls"
    ABSMEAN = "absmean"
    ABSMAX = "absmax"
    TWN = "twn"


def command(
    source: Annotated[
        str | None, typer.Argument(metavar="SRC", help="A folder, a cached org/name[@revision], or 'demo'.")
    ] = None,
    *,
    shape: Annotated[str | None, typer.Option(help="Instead of SRC: bitnet-2b-4t, falcon3-1b, llama3-8b, ...")] = None,
    method: Annotated[
        Method | None, typer.Option(help="How dense weights become ternary; default: 'ls' for them.")
    ] = None,
    scale: ScaleOption = Scale.TENSOR,
    group_size: GroupSizeOption = 128,
    prompt_tokens: Annotated[int | None, typer.Option(help="Length of the prompt; default: 128.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    activations: ActivationsOption = None,
    kv: KvOption = KvType.F32,
    head: HeadOption = HeadMode.EXACT,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Say what a model will need: time, memory, size, loss. Reads headers only."""
    from ternaryforge.planning import plan

    del seed  # nothing here is random
    report = plan(
        source,
        shape=shape,
        method=method.value if method else None,
        scale=scale.value,
        group_size=group_size,
        activations=activations.value if activations else None,
        kv=kv.value,
        head=head.value,
        threads=threads,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
    )
    if json:
        print_json(report.to_dict())
        return
    rows: dict[str, object] = {
        "model": f"{report.source}: {report.architecture}, {report.parameters:,} parameters, "
        f"{report.ternary_params:,} of them ternary",
        "method": report.method or "none: the weights stay as they are",
        "file": f"{report.file_bytes:,} bytes (now {report.source_bytes:,})",
        "key-value cache": f"{report.kv}, {report.kv_bytes_per_token:,} bytes per token",
        "head": f"{report.head}, {report.head_bytes:,} bytes per token",
        "speed": f"{report.tokens_per_second:.1f} tokens per second, prompt {report.prompt_tokens_per_second:.1f}",
        "expected loss": report.expected_loss.summary,
    }
    for stage in report.stages:
        rows[stage.verb] = (
            f"{stage.seconds:.1f} s, {_mb(stage.peak_anonymous_bytes)} of memory and {_mb(stage.peak_mapped_bytes)} "
            f"of mapped files ({stage.note})"
        )
    rows["times"] = f"from small matrices run just now; within a factor of {report.time_factor:.0f} on an idle machine"
    if report.warnings:
        rows["warnings"] = "\n".join(report.warnings)
    print_table(rows)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
