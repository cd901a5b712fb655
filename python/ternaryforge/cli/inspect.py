# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge inspect FILE`: what is in a checkpoint and who made it."""

from typing import Annotated, Any

import typer

from ternaryforge.cli.output import (
    JsonOption,
    SeedOption,
    ThreadsOption,
    print_json,
    print_table,
)


def command(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A folder, a .safetensors, .gguf or .1bit file, or 'demo'.")
    ],
    *,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Say what is in a checkpoint."""
    from ternaryforge.inspection import inspect

    del threads, seed  # only headers are read
    found = inspect(file)
    if json:
        print_json(found.to_dict())
        return
    rows: dict[str, object] = {
        "path": found.path,
        "format": found.format,
        "architecture": found.arch or "unknown",
        "made by": found.producer or "unknown",
        "context": found.context_length or "unknown",
        "weights": f"{found.file_bytes:,} bytes",
    }
    for dtype, entry in found.tensors.items():
        rows[dtype] = f"{entry['count']} tensors, {entry['elements']:,} elements"
    if found.head_bytes is not None:
        rows["head"] = ", ".join(f"{name} {size:,} bytes" for name, size in found.head_bytes.items())
    if found.quantization is not None:
        rows["quantization"] = _in_words(found.quantization)
    if found.tokenizer is not None:
        rows["tokenizer"] = ", ".join(f"{k} {v}" for k, v in found.tokenizer.items())
    rows |= found.engines
    if found.warnings:
        rows["warnings"] = "\n".join(found.warnings)
    print_table(rows)


def _in_words(fields: dict[str, Any]) -> str:
    """A `Quantization`; what else there may be in the words of its fields."""
    if "scale" not in fields:
        return ", ".join(f"{k} {v}" for k, v in fields.items())
    size, excluded = fields["group_size"], fields["excluded"]
    bits = fields["activation_bits"]
    parts = [
        str(fields["method"]),
        "latents of training, rounded at load" if fields["online"] else "packed",
        f"a scale per {fields['scale']}" + (f" of {size}" if size else ""),
        "activations in " + ("floating point" if bits is None else f"{bits} bits"),
    ]
    if fields["convention"] == "divide" and not fields["online"]:
        parts[2] += " (stored as reciprocals)"
    if "two_plane_tensors" in fields:
        parts.append(f"{fields['two_plane_tensors']} layers of two planes")
    if (bit_map := fields.get("bit_map")) is not None:
        modes = [entry if isinstance(entry, str) else "mixed" for entry in bit_map["layers"]]
        counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in dict.fromkeys(modes))
        return ", ".join([*parts, f"embedding {bit_map['embedding']}", f"layers {counts}"])
    dense = ("lm_head",) if excluded is None else excluded
    return ", ".join(parts) + ("; dense: " + ", ".join(dense) if dense else "")
