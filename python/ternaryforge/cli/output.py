# SPDX-License-Identifier: Apache-2.0
"""What the verbs share: options, JSON on stdout, tables, progress on a terminal, error lines."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import ternaryforge

MISSED = 3
"""The exit code where a threshold or a known answer is missed."""


class Scale(StrEnum):
    """Values of `--scale`."""

    TENSOR = "tensor"
    ROW = "row"
    GROUP = "group"


class Activations(StrEnum):
    """Values of `--activations`."""

    INT8 = "int8"
    INT16 = "int16"
    FLOAT = "float"


class KvType(StrEnum):
    """Values of `--kv`."""

    F32 = "f32"
    F16 = "f16"
    INT8 = "int8"


class HeadMode(StrEnum):
    """Values of `--head`."""

    EXACT = "exact"
    INT8 = "int8"
    INT6 = "int6"
    INT4 = "int4"
    TWO_STAGE = "two-stage"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; default: the physical cores.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
ScaleOption = Annotated[Scale, typer.Option("--scale", help="What shares a scale; plain transformers reads 'tensor'.")]
GroupSizeOption = Annotated[
    int, typer.Option("--group-size", help="Columns in a group, a multiple of 64, with --scale group.")
]
BitMapOption = Annotated[
    Path | None, typer.Option("--bit-map", metavar="FILE", help="Modes per layer as JSON, such as 'search' writes.")
]
ActivationsOption = Annotated[
    Activations | None,
    typer.Option("--activations", help="Default: what the checkpoint was made for."),
]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", metavar="PATH", help="A LoRA adapter (PEFT): a folder or org/name.")
]

KvOption = Annotated[
    KvType, typer.Option("--kv", help="How keys and values are remembered: f16 and int8 read less at long contexts.")
]

HeadOption = Annotated[
    HeadMode,
    typer.Option("--head", help="Quantize the output head; two-stage chooses the exact head's tokens, but reads less."),
]

TemperatureOption = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
TopKOption = Annotated[int, typer.Option(min=0, help="Of the k likeliest; 0 is off.")]
TopPOption = Annotated[float, typer.Option(min=0, max=1, help="Of the mass p; 1 is off.")]
MinPOption = Annotated[float, typer.Option(min=0, max=1, help="At least this share of the best; 0 is off.")]
RepetitionPenaltyOption = Annotated[float, typer.Option(help="Above 1 avoids repeats.")]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")]


def print_json(document: Mapping[str, Any]) -> None:
    """The one document of `--json`."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(rows: Mapping[str, object]) -> None:
    """Names and values in two columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(str(value)))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a header; numbers stand under each other."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def report_error(error: BaseException) -> None:
    """One line on stderr."""
    if isinstance(error, ImportError) and error.name == "ternaryforge._core":
        text = ternaryforge.MISSING_CORE
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": '{error.filename}'" if error.filename else "")
    else:
        text = str(error) or type(error).__name__
    print(f"error: {' '.join(text.split())}", file=sys.stderr)


@contextlib.contextmanager
def progress_bar(title: str, *, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """Yields a function (done, total, what="") that draws a bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, what="")

        def update(done: int, total: int, what: str = "") -> None:
            progress.update(task, completed=done, total=total, what=what)

        yield update
