# SPDX-License-Identifier: Apache-2.0
"""A model becomes a file for another engine: GGUF in five profiles, or `.1bit` for small machines.

report = export("model-ternary", "model.gguf", profile="upstream")
print(report.tensors_by_type, report.exact)
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from ternaryforge.gguf.exporting import ExportReport, export_gguf
from ternaryforge.gguf.importing import import_gguf
from ternaryforge.gguf.profiles import ProfileName as GgufProfile
from ternaryforge.gguf.reading import is_gguf
from ternaryforge.onebit_export import OnebitReport, PackMode, export_onebit
from ternaryforge.sources import find_source

__all__ = ["ExportReport", "OnebitReport", "ProfileName", "export"]

ProfileName = Literal[GgufProfile, "onebit"]
Progress = Callable[[int, int, str], None]

_DENSE_TYPES: dict[str, Any] = {"F32": "f32", "F16": "f16", "Q8_0": "int8", "INT8": "int8"}
"""How a head of a `.1bit` file is stored, by the names that GGUF has and by its own."""


def export(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    profile: ProfileName = "upstream",
    ternary_type: str | None = None,
    head: str | None = None,
    inline_scale: bool = False,
    tokenizer_pre: str | None = None,
    pack_mode: PackMode | None = None,
    emit_c_header: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExportReport | OnebitReport:
    """Writes a checkpoint folder, a GGUF file or "demo" as the file `out`.

    Args:
        model_dir: A ternary or a dense model. GGUF has the families llama, mistral, qwen2, qwen3,
            gemma, gemma2, gemma3 and bitnet, `.1bit` every family.
        out: The file to make or to replace. Nothing appears there before all was read back.
        profile: For which engine: `upstream` (llama.cpp), `portable` (every engine and GPU), `ik`
            (ik_llama.cpp), `bitnetcpp` (bitnet.cpp), `bonsai` (PrismML's fork, groups of 128), or
            `onebit` (the C program in cpp/embedded).
        ternary_type: GGUF only. The type to try first, such as "TQ1_0"; the profile says which it may be.
        head: Type of the head (of the embedding where they are one): "F32", "F16", "BF16", "Q8_0"
            or "Q6_K"; in `.1bit` files, for all dense matrices, "f32", "f16" or "int8".
            Default: as the source has it, without loss; "f16" in `.1bit` files.
        inline_scale: GGUF with `upstream` only. Round scales that f16 cannot hold into the blocks and
            report the error, where else they lie in `.scale` tensors, which older builds refuse. The
            other profiles have no such tensors and round always, where their types hold f16.
        tokenizer_pre: GGUF only. Name of the way to cut text, where it is not recognised.
        pack_mode: `onebit` only. "ternary" or "binary" for every layer; default: 1 bit where exact.
        emit_c_header: `onebit` only. Also write `out` + ".h", the file as a C array.
        threads: Default: the physical cores at hand.
        progress: Called after each tensor with what is done, all there is to do, and the tensor's name.

    Raises FormatError for a model that the engines of the profile cannot run, with the reason,
    ValueError for wrong options, OSError.
    """
    if profile not in (profiles := (*get_args(GgufProfile), "onebit")):
        raise ValueError(f"[export] profile is one of {', '.join(profiles)}, got {profile!r}")
    if profile != "onebit":
        if pack_mode is not None or emit_c_header:
            raise ValueError(f"[export] pack_mode and emit_c_header go with profile 'onebit', got profile {profile!r}")
        return export_gguf(
            model_dir,
            out,
            profile=profile,
            ternary_type=ternary_type,
            head=head,
            inline_scale=inline_scale,
            tokenizer_pre=tokenizer_pre,
            threads=threads,
            progress=progress,
        )
    if ternary_type is not None or inline_scale or tokenizer_pre is not None:
        raise ValueError(
            "[export] ternary_type, inline_scale and tokenizer_pre go with GGUF files, got profile 'onebit'"
        )

    def report_step(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, "")

    def write(folder: str | os.PathLike[str]) -> OnebitReport:
        dense: Any = "f16" if head is None else _DENSE_TYPES.get(head.upper(), head)
        return export_onebit(
            folder, out, head=dense, pack_mode=pack_mode, emit_c_header=emit_c_header, progress=report_step
        )

    path = find_source(model_dir)
    if not is_gguf(path):
        return write(path)
    with tempfile.TemporaryDirectory() as folder:
        import_gguf(path, Path(folder) / "model", threads=threads)
        return write(Path(folder) / "model")
