# SPDX-License-Identifier: Apache-2.0
"""A model becomes a GGUF file that an engine runs, and the file is read back before it appears.

report = export_gguf("model-ternary", "model.gguf", profile="upstream")
print(report.tensors_by_type, report.exact)
"""

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ternaryforge
from ternaryforge import _core
from ternaryforge.gguf.export_plan import ExportPlan
from ternaryforge.gguf.export_source import open_source
from ternaryforge.gguf.profiles import PROFILES, ProfileName
from ternaryforge.gguf.verification import verify
from ternaryforge.memory import PeakAnonymous
from ternaryforge.report import Report

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class ExportReport(Report):
    """What an export as GGUF wrote and what reading it back gave.

    `tensors_by_type` has count, elements and bytes of each type. `exact`: trits, scales and all other
    weights came back bit by bit; else `relative_error` is the largest of |difference| / |largest
    weight| over the tensors. `notes` says in whole sentences what is not as in the source.
    """

    source: str
    out: str
    profile: str
    engine: str
    arch: str
    tensors_by_type: dict[str, dict[str, int]]
    ternary_tensors: int
    ternary_bits_per_weight: float
    exact: bool
    relative_error: float
    sidecar_scales: int
    file_bytes: int
    peak_anonymous_bytes: int | None
    seconds: float
    notes: tuple[str, ...]


def export_gguf(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    profile: ProfileName = "upstream",
    ternary_type: str | None = None,
    head: str | None = None,
    inline_scale: bool = False,
    tokenizer_pre: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a checkpoint folder, a GGUF file or "demo" as a GGUF file; see `ternaryforge.export`."""
    started = time.perf_counter()
    if profile not in PROFILES:
        raise ValueError(f"[export] profile is one of {', '.join(PROFILES)}, got {profile!r}")
    threads = threads or _core.parallel.default_threads()
    out = Path(out)
    with PeakAnonymous() as memory:
        source = open_source(model_dir, threads=threads)
        plan = ExportPlan(
            source, PROFILES[profile], ternary_type=ternary_type, head=head, inline=inline_scale, pre=tokenizer_pre
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            _write(plan, partial, threads, progress)
            error = verify(plan, partial, threads=threads)
            partial.replace(out)
            if error:
                plan.notes.append(
                    f"Not every weight is exact: the largest error is {error:.1e} of the largest weight of its tensor."
                )
        finally:
            partial.unlink(missing_ok=True)
    table: dict[str, dict[str, int]] = {}
    for tensor in _core.io.GgufFile(out).tensors.values():
        entry = table.setdefault(tensor.type_name, {"count": 0, "elements": 0, "bytes": 0})
        entry["count"] += 1
        entry["elements"] += int(np.prod(tensor.shape))
        entry["bytes"] += len(tensor.data)
    ternary = [tensor for tensor in plan.tensors if tensor.storage is not None]
    weights = sum(tensor.rows * tensor.cols for tensor in ternary)
    bits = 8 * sum(tensor.nbytes for tensor in ternary)
    return ExportReport(
        source=str(model_dir),
        out=str(out),
        profile=profile,
        engine=PROFILES[profile].engine,
        arch=plan.known.name,
        tensors_by_type=table,
        ternary_tensors=len(ternary),
        ternary_bits_per_weight=bits / weights if weights else 0.0,
        exact=error == 0,
        relative_error=error,
        sidecar_scales=sum(tensor.storage is not None and tensor.storage.sidecar for tensor in plan.tensors),
        file_bytes=out.stat().st_size,
        peak_anonymous_bytes=memory.growth,
        seconds=time.perf_counter() - started,
        notes=tuple(plan.notes),
    )


def _write(plan: ExportPlan, path: Path, threads: int, progress: Progress | None) -> None:
    """Tensor by tensor, and large ones in parts."""
    total, done = sum(tensor.rows * tensor.cols for tensor in plan.tensors), 0
    with _core.io.GgufWriter(path) as writer:
        for key, value, kind in plan.entries(ternaryforge.__version__):
            writer.add_metadata(key, value, kind)
        for tensor in plan.tensors:
            writer.add_tensor(tensor.name, tensor.shape, tensor.type_name)
        for tensor in plan.tensors:
            for part in plan.data(tensor, threads=threads):
                writer.write(tensor.name, part)
            done += tensor.rows * tensor.cols
            if progress is not None:
                progress(done, total, tensor.name)
        writer.finish()
