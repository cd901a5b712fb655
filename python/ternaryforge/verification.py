# SPDX-License-Identifier: Apache-2.0
"""Known answers of published models: does this copy, run by this build, give what its makers gave?

    report = verify("demo")                                             # offline
    report = verify("microsoft/bitnet-b1.58-2B-4T", text="wiki.test.raw")

The answers are data (known_answers.json), each with its source. A perplexity is compared on exactly
the text that it was published for, known by its SHA-256.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ternaryforge.checkpoint import Checkpoint
from ternaryforge.families import read_architecture
from ternaryforge.model import TernaryModel
from ternaryforge.report import Report
from ternaryforge.sources import find_source

Status = Literal["passed", "failed", "not run"]
Progress = Callable[[int, int], None]

_CHUNK_BYTES = 1 << 24
_WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. `note` says where the expected value is from, or what is missing."""

    what: str
    status: Status
    expected: str
    found: str
    note: str


@dataclass(frozen=True)
class VerificationReport(Report):
    """All checks of one model. `passed`: at least one ran and none `failed`; `complete`: every one ran."""

    name: str
    path: str
    passed: bool
    failed: bool
    complete: bool
    checks: tuple[Check, ...]


def known_answers() -> dict[str, Any]:
    """The file known_answers.json: `texts` by name and the list `models`."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("known_answers.json").read_text(encoding="utf-8"))
    return data


def verify(
    source: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    answers: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Checks file hashes, sizes and perplexities of a model against what is published.

    Args:
        source: "demo", a name of the hub that has answers, a folder, or one file.
        text: The file that perplexities are measured on. Without it those are not run.
        answers: The model whose answers apply; default: that of the same name, or with the same weights file.
        threads: Default: the physical cores at hand.
        progress: Called with the windows done and their number.

    Raises ValueError where no answers are known, or none for this text: never is another text used silently;
    OSError where the model or the text cannot be had.
    """
    known = known_answers()
    texts: dict[str, dict[str, str]] = known["texts"]
    given = None if text is None else Path(text)
    digest = None if given is None else _sha256(given)
    named = answers or os.fspath(source)
    model = next((model for model in known["models"] if model["name"] == named.partition("@")[0]), None)
    if answers is not None and model is None:
        raise _unknown(known, f"got {answers!r}")
    path = find_source(source)
    if not path.exists():
        raise FileNotFoundError(f"[verify] no such file or folder: '{path}'; name one, a model of the hub, or 'demo'")
    if model is None:
        model = _find_by_hash(known, path)
    scores = [score | {"content": _content(texts[score["text"]], given, digest)} for score in model["scores"]]
    if given is not None and all(score["content"] is None or "content" in texts[score["text"]] for score in scores):
        wanted = [f"'{name}' ({texts[name]['sha256']})" for name in dict.fromkeys(s["text"] for s in scores)
                  if "sha256" in texts[name]]  # fmt: skip
        raise ValueError(
            f"[verify] '{given}' has the SHA-256 {digest}; the answers of {model['name']} are for "
            f"{' and '.join(wanted) or 'no text'}: perplexities of different texts cannot be compared"
        )
    checks = [_check_file(path, name, expected) for name, expected in model["files"].items()]
    if "parameters" in model or "ternary_weights" in model or "code_shares" in model:
        checks += _check_sizes(path, model)
    checks += _check_scores(path, scores, texts, threads, progress)
    ran = [check for check in checks if check.status != "not run"]
    return VerificationReport(
        name=model["name"],
        path=str(path),
        passed=bool(ran) and all(check.status == "passed" for check in ran),
        failed=any(check.status == "failed" for check in ran),
        complete=len(ran) == len(checks),
        checks=tuple(checks),
    )


def _unknown(known: Mapping[str, Any], found: str) -> ValueError:
    names = ", ".join(model["name"] for model in known["models"])
    return ValueError(f"[verify] there are answers for {names}; {found}. Name the model that it is meant to be")


def _find_by_hash(known: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The model whose weights file this is."""
    file = path if path.is_file() else path / _WEIGHTS_FILE
    if not file.is_file():
        raise _unknown(known, f"'{path}' has no {_WEIGHTS_FILE} to know it by")
    digest = _sha256(file)
    for model in known["models"]:
        for name, expected in model["files"].items():
            weights = name == _WEIGHTS_FILE or name.endswith(".gguf")
            if weights and _same_hash(expected["sha256"], digest):
                found: dict[str, Any] = model
                return found
    raise _unknown(known, f"'{file}' (SHA-256 {digest}) is none of their weights files")


def _content(text: Mapping[str, str], given: Path | None, digest: str | None) -> str | None:
    """The text itself where it is at hand."""
    if "content" in text:
        return text["content"]
    if given is not None and text["sha256"] == digest:
        return given.read_text(encoding="utf-8")
    return None


def _check_file(path: Path, name: str, expected: Mapping[str, Any]) -> Check:
    file = path if path.is_file() and path.suffix == Path(name).suffix else path / name
    what, wanted = f"file {name}", expected["sha256"]
    if "bytes" in expected:
        wanted += f", {expected['bytes']} bytes"
    if not file.is_file():
        return Check(what, "not run", wanted, "", f"'{file}' is missing")
    digest, size = _sha256(file), file.stat().st_size
    same = _same_hash(expected["sha256"], digest) and size == expected.get("bytes", size)
    found = digest + (f", {size} bytes" if "bytes" in expected else "")
    return Check(what, "passed" if same else "failed", wanted, found, "SHA-256")


def _same_hash(expected: str, found: str) -> bool:
    """`expected` may be shortened in its middle, as its source gives it: 4221b252...c2162."""
    start, dots, end = expected.partition("...")
    return found.startswith(start) and found.endswith(end) if dots else found == expected


def _check_sizes(path: Path, model: Mapping[str, Any]) -> list[Check]:
    if not path.is_dir():
        return [Check("sizes", "not run", "", "", f"'{path}' is no folder of a checkpoint")]
    checkpoint = Checkpoint.open(path)
    architecture = read_architecture(checkpoint.config, where=str(path / "config.json"))
    checks = []
    if "parameters" in model:
        expected, tolerance = model["parameters"]["value"], model["parameters"]["tolerance"]
        found = sum(rows * cols for rows, cols in architecture.spec.slots().values())
        checks.append(_compare("parameters", expected, found, tolerance, model["source"]))
    packed = [name for name in checkpoint if checkpoint.info(name).dtype == "U8"]
    if "ternary_weights" in model:
        found = sum(4 * checkpoint.info(name).nbytes for name in packed)
        checks.append(_compare("ternary weights", model["ternary_weights"], found, 0, model["source"]))
    if "code_shares" in model and packed:
        counts = np.zeros(256, np.int64)
        for name in packed:
            codes = np.frombuffer(checkpoint.raw(name), np.uint8)
            for begin in range(0, codes.size, _CHUNK_BYTES):
                counts += np.bincount(codes[begin : begin + _CHUNK_BYTES], minlength=256)
        values = np.arange(256)
        total = 4 * int(counts.sum())
        for code, expected in enumerate(model["code_shares"]["values"]):
            share = sum(int(counts[(values >> shift & 3) == code].sum()) for shift in (0, 2, 4, 6)) / total
            tolerance = model["code_shares"]["tolerance"]
            checks.append(_compare(f"share of weights {code - 1:+d}", expected, share, tolerance, model["source"]))
    return checks


def _check_scores(
    path: Path,
    scores: list[dict[str, Any]],
    texts: Mapping[str, Mapping[str, str]],
    threads: int | None,
    progress: Progress | None,
) -> list[Check]:
    checks, loaded = [], None
    for score in scores:
        name = score["text"]
        what = f"{score['measure'].replace('_', ' ')} of '{name}', protocol {score['protocol']}"
        if score["content"] is None:
            missing = f"name the text with --text: {texts[name]['origin']}; SHA-256 {texts[name]['sha256']}"
            checks.append(Check(what, "not run", f"{score['value']:g}", "", missing))
            continue
        if loaded is None:
            loaded = TernaryModel.from_pretrained(path, threads=threads)
        result = loaded.perplexity(score["content"], protocol=score["protocol"], progress=progress)
        found = getattr(result, score["measure"])
        checks.append(_compare(what, score["value"], found, score["tolerance"], score["source"]))
    return checks


def _compare(what: str, expected: float, found: float, tolerance: float, note: str) -> Check:
    same = abs(found - expected) <= tolerance
    wanted = f"{expected:.12g}" + (f" +- {tolerance:g}" if tolerance else "")
    shown = f"{found:.12g}" if float(found).is_integer() else f"{found:.5f}"
    return Check(what, "passed" if same else "failed", wanted, shown, note)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
