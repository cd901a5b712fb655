# SPDX-License-Identifier: Apache-2.0
"""Does a model still compute what it should? Compared token by token with a reference, and judged.

report = validate("model.gguf")                        # with llama.cpp, where it is installed
report = validate("model-ternary", reference="model")
print(report.top1_agreement, report.kl, report.passed)
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.gguf.engines import Engine, open_engine
from ternaryforge.gguf.export_source import open_source
from ternaryforge.gguf.producer import judge_engines
from ternaryforge.gguf.reading import first_part, is_gguf
from ternaryforge.memory import peak_resident_bytes
from ternaryforge.model import TernaryModel
from ternaryforge.report import Report
from ternaryforge.sources import find_source

DEFAULT_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog. "
    'One day, they saw a big red ball in the grass, and the dog ran to it. Lily laughed and said, "Good boy!"'
)
THRESHOLDS = {"top1_agreement": 0.97, "kl": 0.01}
"""The least share of equal likeliest tokens, and the most Kullback-Leibler divergence in nats."""

_GREEDY_TOKENS = 32
_PROMPT_TOKENS = 8
_MOST_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ValidationReport(Report):
    """What `validate` found. Where there is nothing to tell, a field is None.

    `reference` is what the model was compared with, over `positions` of a text that both were given:
    `top1_agreement` is the share of them with the same likeliest next token, `kl` the mean divergence
    of the next token in nats. `greedy_equal` of `greedy_tokens` generated tokens are the same.
    `tokens_equal`: both cut the text into the same tokens. `sparsity` is the share of zeros in the
    ternary layers, `balance` that of +1 among the others. `passed`: every one of `thresholds` is kept.
    """

    model: str
    reference: str
    positions: int
    top1_agreement: float
    kl: float | None
    greedy_equal: int
    greedy_tokens: int
    tokens_equal: bool | None
    perplexity: float
    reference_perplexity: float | None
    sparsity: float | None
    balance: float | None
    bits_per_weight: float | None
    file_bytes: int
    tokens_per_second: float
    peak_rss_bytes: int | None
    thresholds: dict[str, float]
    passed: bool


def validate(
    model: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    thresholds: Mapping[str, float] | None = None,
    engine: str | None = None,
    threads: int | None = None,
) -> ValidationReport:
    """Compares a model with a reference on the first 256 tokens of a text.

    Args:
        model: A checkpoint folder, a GGUF file, or "demo".
        reference: A folder or a GGUF file with the same vocabulary, run in floating point. Without
            one, a GGUF file is run by another engine and compared with our floating-point mode, and
            a folder with its own floating-point mode.
        data: A text file; default: a few sentences of English.
        thresholds: Instead of `THRESHOLDS`; keys "top1_agreement" and "kl".
        engine: "llama-cpp-python", "llama-cli" or the path of such a program; default: what is installed.
        threads: Default: the physical cores at hand.

    Raises ValueError where no engine is there or it refuses the file, with the reason where it is
    known; FormatError, OSError.
    """
    path = first_part(find_source(model))
    threads = threads or _core.parallel.default_threads()
    limits = dict(THRESHOLDS if thresholds is None else thresholds)
    if unknown := limits.keys() - THRESHOLDS.keys():
        raise ValueError(f"[validate] thresholds has the keys {', '.join(THRESHOLDS)}, got {', '.join(unknown)}")
    text = DEFAULT_TEXT if data is None else Path(data).read_text(encoding="utf-8")
    wants_engine = reference is None and is_gguf(path)
    if wants_engine and engine is None:
        _refuse_hopeless(path)
    ours = TernaryModel.from_pretrained(path, threads=threads, activations="float" if wants_engine else None)
    ids = ours.encode(text)[: min(_MOST_TOKENS, ours.context_length)]
    if len(ids) <= _PROMPT_TOKENS:
        raise ValueError(f"[validate] the text must have more than {_PROMPT_TOKENS} tokens, got {len(ids)}")
    prompt = ids[:_PROMPT_TOKENS]
    count = min(_GREEDY_TOKENS, ours.context_length - len(prompt))
    generated = ours.generate(prompt, max_new_tokens=count)
    if wants_engine:
        other = open_engine(path, engine, context=min(_MOST_TOKENS + 1, ours.context_length), threads=threads)
        try:
            found = _compare_engine(ours, other, text, ids, prompt=prompt, count=count)
        finally:
            other.close()
    else:
        name = os.fspath(reference or path)
        other_model = TernaryModel.from_pretrained(name, threads=threads, activations="float")
        found = _compare_models(ours, other_model, text, ids, prompt=prompt, count=count)
        found["reference"] = f"{name} in floating point"
    mine, theirs = generated.token_ids, found.pop("greedy")
    equal = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
    passed = found["top1_agreement"] >= limits.get("top1_agreement", 0)
    passed = passed and (found["kl"] is None or found["kl"] <= limits.get("kl", math.inf))
    return ValidationReport(
        model=str(model),
        greedy_equal=min(len(mine), len(theirs)) if equal is None else equal,
        greedy_tokens=max(len(mine), len(theirs)),
        **found,
        **_describe_weights(path, threads),
        tokens_per_second=generated.tokens_per_second,
        peak_rss_bytes=peak_resident_bytes(),
        thresholds=limits,
        passed=passed and found["tokens_equal"] is not False,
    )


def _refuse_hopeless(path: Path) -> None:
    """Says beforehand what llama.cpp would say less clearly, or not at all."""
    verdict = next(found for found in judge_engines(_core.io.GgufFile(path)) if found.name == "llama.cpp")
    if verdict.verdict != "runs":
        raise ValueError(
            f"[validate] llama.cpp cannot be the reference for '{path}' ({verdict.verdict}): {verdict.reason} Name a "
            "folder with reference (--reference), or another engine's llama-cli with engine (--engine)"
        )


def _compare_engine(
    ours: TernaryModel, other: Engine, text: str, ids: list[int], *, prompt: list[int], count: int
) -> dict[str, Any]:
    tokens, logits = other.tokenize(text), other.logits(ids)
    start = ours.require_tokenizer().decode(prompt)
    continued = other.continue_text(start, prompt, count, ours.eos_ids)
    if logits is not None and not isinstance(continued, str):
        compared = _compare(ours.logits(ids), logits, ids)
        return compared | {
            "reference": other.name,
            "greedy": continued,
            "tokens_equal": None if tokens is None else tokens[: len(ids)] == ids,
        }
    # Only text: our model is asked in each place what it would have said.
    ids = ours.encode(f"{start}{continued}")
    own = ours.logits(ids)
    top1 = own[len(prompt) - 1 : -1].argmax(-1) == np.array(ids[len(prompt) :])
    return _compare(own, own, ids) | {
        "reference": other.name,
        "greedy": ids[len(prompt) :],
        "positions": len(top1),
        "top1_agreement": float(top1.mean()) if len(top1) else 0.0,
        "kl": None,
        "reference_perplexity": None,
        "tokens_equal": None,
    }


def _compare_models(
    ours: TernaryModel, other: TernaryModel, text: str, ids: list[int], *, prompt: list[int], count: int
) -> dict[str, Any]:
    sizes = [model.architecture.spec.vocab_size for model in (ours, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"[validate] the reference has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}")
    return _compare(other.logits(ids), ours.logits(ids), ids, ours_first=False) | {
        "greedy": other.generate(prompt, max_new_tokens=count).token_ids,
        "tokens_equal": None if other.tokenizer is None else other.encode(text)[: len(ids)] == ids,
    }


def _compare(
    p: NDArray[np.float32], q: NDArray[np.float32], ids: list[int], *, ours_first: bool = True
) -> dict[str, Any]:
    """Agreement and KL(p || q) of the next tokens, and what both think of `ids`; row by row, as rows are long."""
    equal, divergence, nll = 0, 0.0, np.zeros(2)
    for index, row in enumerate(zip(p, q, strict=True)):
        a, b = map(_log_softmax, row)
        equal += int(a.argmax() == b.argmax())
        divergence += float((np.exp(a) * (a - b)).sum())
        if index + 1 < len(ids):
            nll -= (a[ids[index + 1]], b[ids[index + 1]])
    perplexities = np.exp(nll / (len(ids) - 1))[:: 1 if ours_first else -1]
    return {
        "positions": len(ids),
        "top1_agreement": equal / len(ids),
        "kl": divergence / len(ids),
        "perplexity": float(perplexities[0]),
        "reference_perplexity": float(perplexities[1]),
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = logits.astype(np.float64) - logits.max()
    shifted: NDArray[np.float64] = values - np.log(np.exp(values).sum())
    return shifted


def _describe_weights(path: Path, threads: int) -> dict[str, Any]:
    if path.suffix == ".1bit":
        return {"sparsity": None, "balance": None, "bits_per_weight": None, "file_bytes": path.stat().st_size}
    source = open_source(path, threads=threads)
    total = zeros = ones = size = 0
    for slot in source.architecture.spec.slots():
        found = source.ternary(slot)
        if found is not None:
            total += found.trits.size
            zeros += found.trits.size - int(np.count_nonzero(found.trits))
            ones += int(np.count_nonzero(found.trits > 0))
            size += source.stored_bytes(slot)
    return {
        "sparsity": zeros / total if total else None,
        "balance": ones / (total - zeros) if total > zeros else None,
        "bits_per_weight": 8 * size / total if total else None,
        "file_bytes": source.file_bytes,
    }
