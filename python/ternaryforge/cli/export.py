# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge export MODEL OUT --profile P`: a model becomes a file for another engine."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ternaryforge.cli.output import (
    JsonOption,
    SeedOption,
    ThreadsOption,
    print_columns,
    print_json,
    print_table,
    progress_bar,
)

if TYPE_CHECKING:
    from ternaryforge import ExportReport, OnebitReport


class Profile(StrEnum):
    """Values of `--profile`."""

    UPSTREAM = "upstream"
    PORTABLE = "portable"
    IK = "ik"
    BITNETCPP = "bitnetcpp"
    BONSAI = "bonsai"
    ONEBIT = "onebit"


class PackMode(StrEnum):
    """Values of `--pack-mode`."""

    TERNARY = "ternary"
    BINARY = "binary"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a GGUF file, or 'demo'.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to make.")],
    *,
    profile: Annotated[Profile, typer.Option(help="For which engine; 'onebit' makes a .1bit file.")] = Profile.UPSTREAM,
    ternary_type: Annotated[
        str | None, typer.Option("--type", help="GGUF: ternary type to try first, such as TQ1_0 with 'upstream'.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="F32, F16, BF16, Q8_0 or Q6_K, by default as the model has it; .1bit: f32, f16 or int8."),
    ] = None,
    inline_scale: Annotated[
        bool, typer.Option("--inline-scale", help="Round scales that 16 bits cannot hold, and report the error.")
    ] = False,
    tokenizer_pre: Annotated[
        str | None, typer.Option("--tokenizer-pre", help="How text is cut into words, where it is not recognised.")
    ] = None,
    pack_mode: Annotated[
        PackMode | None, typer.Option("--pack-mode", help=".1bit: bits of every layer; default: 1 where exact, else 2.")
    ] = None,
    emit_c_header: Annotated[
        bool, typer.Option("--emit-c-header", help=".1bit: also write OUT.h, the file as a C array.")
    ] = False,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Write a model for another engine, and read it back."""
    from ternaryforge import OnebitReport, export

    del seed  # nothing here is random
    with progress_bar("Exporting") as progress:
        report = export(
            model,
            out,
            profile=profile.value,
            ternary_type=ternary_type,
            head=head,
            inline_scale=inline_scale,
            tokenizer_pre=tokenizer_pre,
            pack_mode=None if pack_mode is None else pack_mode.value,
            emit_c_header=emit_c_header,
            threads=threads,
            progress=progress,
        )
    if json:
        print_json(report.to_dict())
    elif isinstance(report, OnebitReport):
        _print_onebit(report, out, with_header=emit_c_header)
    else:
        _print_gguf(report)


def _print_gguf(report: "ExportReport") -> None:
    header = ["type", "tensors", "elements", "bytes", "bits each"]
    rows = [
        [name, str(entry["count"]), f"{entry['elements']:,}", f"{entry['bytes']:,}",
         f"{8 * entry['bytes'] / entry['elements']:.4f}"]
        for name, entry in report.tensors_by_type.items()
    ]  # fmt: skip
    print_columns(header, rows)
    print_table(
        {
            "written": f"{report.out}, {report.file_bytes:,} bytes",
            "for": report.engine,
            "architecture": report.arch,
            "ternary tensors": f"{report.ternary_tensors}, {report.ternary_bits_per_weight:.4f} bits per weight",
            "read back": "every bit" if report.exact else f"largest relative error {report.relative_error:.1e}",
            "seconds": f"{report.seconds:.1f}",
        }
        | ({"notes": "\n".join(report.notes)} if report.notes else {})
    )


def _print_onebit(report: "OnebitReport", out: Path, *, with_header: bool) -> None:
    print_columns(["type", "matrices"], [[name, str(count)] for name, count in report.tensors_by_type.items()])
    print_table(
        {
            "written": f"{out}, {report.file_bytes:,} bytes" + (f", and {out}.h" if with_header else ""),
            "for": "the C program in cpp/embedded",
            "architecture": report.arch,
            "read back": "every bit" if report.exact else "rounded; see --json for the error of each tensor",
        }
        | ({"notes": "\n".join(report.warnings)} if report.warnings else {})
    )
