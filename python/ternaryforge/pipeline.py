# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a judged file in one call: convert or calibrate, export, validate; what is done is kept.

    report = run("llama", "llama-ternary", data="train.txt", evaluation="valid.txt", calibrate=True)
    print(report.passed, [(stage.name, stage.reused) for stage in report.stages])

OUT holds `ternary/` (the checkpoint), `model.gguf` or `model.1bit`, and `run.json`, which remembers of every stage
what went in and what came out, by SHA-256.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ternaryforge.checkpoint import Checkpoint
from ternaryforge.checkpoint_writer import COMPANION_FILES
from ternaryforge.conversion import convert
from ternaryforge.exporting import ProfileName, export
from ternaryforge.quantization import ScaleKind
from ternaryforge.report import Report
from ternaryforge.rounding import Scheme
from ternaryforge.sources import find_source
from ternaryforge.validation import validate
from ternaryforge.validation_report import THRESHOLDS, check_thresholds

StageName = Literal["convert", "calibrate", "export", "validate-export", "validate"]
Progress = Callable[[int, int, str], None]

_STATE = "run.json"


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: the digest of what went in, the `report` of its call, and whether it was there already."""

    name: StageName
    inputs_sha256: str
    output: str | None
    output_sha256: str | None
    reused: bool
    seconds: float
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunReport(Report):
    """What `run` did. `missed` are the thresholds that are not kept, by stage; `passed`: none is."""

    source: str
    out: str
    stages: tuple[Stage, ...]
    missed: tuple[str, ...]
    passed: bool


def run(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    calibrate: bool = False,
    data: str | os.PathLike[str] | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    scheme: Scheme = "ls",
    scale: ScaleKind = "tensor",
    group_size: int = 128,
    tokens: int = 32_768,
    tune_tokens: int = 0,
    profile: ProfileName | None = "upstream",
    thresholds: Mapping[str, float] | None = None,
    max_documents: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Makes a ternary checkpoint of `source`, exports it, and validates both.

    Args:
        source: A checkpoint folder, `org/name` of the hub, or "demo".
        out: The folder for all results; None takes the name of the source with "-ternary", here.
        calibrate: Mind the activations of `data`, instead of rounding.
        data: Text to calibrate on; goes with `calibrate`.
        evaluation: Text to validate on, apart from `data`; default: a few sentences of English.
        scheme: Of rounding, as in `convert`.
        scale: As in `convert` and `calibrate`.
        group_size: As in `convert` and `calibrate`.
        tokens: Of calibration, as in `calibrate`.
        tune_tokens: Of tuning, as in `calibrate`.
        profile: For which engine to export, as in `export`; None does not.
        thresholds: For the checkpoint against its source, as in `validate`; none by default. An exported
            file must always agree with its checkpoint as `validation_report.THRESHOLDS` say.
        seed: Of the draws of calibration.
        max_documents: Perplexity on the first ones of `evaluation` only.
        threads: Default: the physical cores at hand.
        progress: Called with what is done, all there is to do, and where.

    Every stage that is done is kept in `out`; it is repeated where the contents of its input or its options have
    changed, or what it wrote. Raises what the stages raise, and ValueError for options that do not go together.
    """
    if calibrate != (data is not None):
        raise ValueError("[run] calibrate and data go together")
    if tune_tokens and not calibrate:
        raise ValueError("[run] tune_tokens goes with calibrate")
    limits = check_thresholds(thresholds or {})
    name, path = os.fspath(source), find_source(source)
    out = Path(f"{path.resolve().name}-ternary") if out is None else Path(out)
    if path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"[run] the results must lie outside of the source, got '{out}'")
    folder = out / "ternary"
    rounding: dict[str, Any] = {"scale": scale, "group_size": group_size}
    stages = _Stages(out)
    texts = {"data": data} if data is not None else {}
    if calibrate:
        rounding |= {"tokens": tokens, "tune_tokens": tune_tokens, "seed": seed}
    else:
        rounding |= {"scheme": scheme}

    def make() -> Report:
        if data is None:
            return convert(path, folder, threads=threads, progress=progress, **rounding)
        from ternaryforge.calibration import calibrate as calibrate_folder

        return calibrate_folder(path, folder, data, threads=threads, progress=progress, **rounding)

    stages.do("calibrate" if calibrate else "convert", [path, *texts.values()], rounding, folder, make)
    if profile is not None:
        file = out / ("model.1bit" if profile == "onebit" else "model.gguf")
        stages.do(
            "export",
            [folder],
            {"profile": profile},
            file,
            lambda: export(folder, file, profile=profile, threads=threads, progress=progress),
        )
        text = [] if evaluation is None else [evaluation]
        stages.do(
            "validate-export",
            [folder, file, *text],
            {"thresholds": THRESHOLDS},
            None,
            lambda: validate(file, folder, data=evaluation, max_documents=1, threads=threads),
        )
    stages.do(
        "validate",
        [path, folder, *([] if evaluation is None else [evaluation])],
        {"thresholds": limits, "max_documents": max_documents},
        None,
        lambda: validate(
            folder, path, data=evaluation, thresholds=limits, max_documents=max_documents, threads=threads
        ),
    )
    missed = tuple(f"{stage.name}: {text}" for stage in stages.done for text in stage.report.get("missed", ()))
    return RunReport(source=name, out=str(out), stages=tuple(stages.done), missed=missed, passed=not missed)


class _Stages:
    """The stages of one folder: those of earlier calls, and those of this one."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._file = out / _STATE
        self._earlier: dict[str, Any] = {}
        if self._file.is_file():
            try:
                self._earlier = json.loads(self._file.read_text(encoding="utf-8"))["stages"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"[run] '{self._file}' is damaged; remove it, and all stages are done again") from None
        elif out.is_dir() and any(not item.name.startswith(".") for item in out.iterdir()):
            raise FileExistsError(f"[run] '{out}': there is something already; remove it or name another folder")
        self.done: list[Stage] = []

    def do(
        self,
        name: StageName,
        inputs: Iterable[str | os.PathLike[str]],
        options: Mapping[str, Any],
        output: Path | None,
        call: Callable[[], Report],
    ) -> None:
        """Does a stage, or takes it from an earlier call with the same inputs, options and output."""
        started = time.perf_counter()
        facts = {"inputs": [digest(path) for path in inputs], "options": dict(options)}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        known = self._earlier.get(name)
        if known is not None and known["inputs_sha256"] == key and known["output_sha256"] == _digest_output(output):
            self.done.append(Stage(**known | {"reused": True, "seconds": time.perf_counter() - started}))
            return
        if known is not None and output is not None and output.is_dir():
            shutil.rmtree(output)  # this pipeline made it, of other inputs
        report = json.loads(json.dumps(call().to_dict()))
        stage = Stage(
            name=name,
            inputs_sha256=key,
            output=None if output is None else str(output),
            output_sha256=_digest_output(output),
            reused=False,
            seconds=time.perf_counter() - started,
            report=report,
        )
        self.done.append(stage)
        self._earlier[name] = {field: getattr(stage, field) for field in Stage.__slots__}
        self._out.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps({"stages": self._earlier}, indent=2) + "\n", encoding="utf-8")
        partial.replace(self._file)


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of all files of a checkpoint folder that are read, with their names."""
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    checkpoint = Checkpoint.open(path)
    files = {*checkpoint.files, path / "config.json"}
    files |= {file for pattern in COMPANION_FILES for file in path.glob(pattern)}
    lines = [f"{file.relative_to(path)} {digest(file)}" for file in sorted(files) if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest_output(output: Path | None) -> str | None:
    return None if output is None or not output.exists() else digest(output)
