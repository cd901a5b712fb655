# SPDX-License-Identifier: Apache-2.0
"""Does a model still compute what it should? Compared token by token with a reference, and judged.

report = validate("model.gguf")                        # with llama.cpp, where it is installed
report = validate("model-ternary", reference="model", data="valid.txt", thresholds={"kl": 1.0, "perplexity": 20})
print(report.top1_agreement, report.kl, report.passed, report.missed)
report.save("report.html")
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.evaluation import evaluate, log_softmax, split_documents
from ternaryforge.gguf.engines import Engine, open_engine
from ternaryforge.gguf.export_source import open_source
from ternaryforge.gguf.producer import judge_engines
from ternaryforge.gguf.reading import first_part, is_gguf
from ternaryforge.memory import peak_resident_bytes
from ternaryforge.model import TernaryModel
from ternaryforge.sources import find_source
from ternaryforge.validation_report import (
    THRESHOLDS,
    ValidatedLayer,
    ValidationReport,
    check_thresholds,
    judge,
)

__all__ = ["DEFAULT_TEXT", "THRESHOLDS", "ValidationReport", "validate"]

DEFAULT_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog. "
    'One day, they saw a big red ball in the grass, and the dog ran to it. Lily laughed and said, "Good boy!"'
)
_GREEDY_TOKENS = 128
_PROMPT_TOKENS = 8


def validate(
    model: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    thresholds: Mapping[str, float] | None = None,
    positions: int = 256,
    max_documents: int | None = None,
    engine: str | None = None,
    threads: int | None = None,
) -> ValidationReport:
    """Compares a model with a reference on a text, measures it, and judges it.

    Args:
        model: A checkpoint folder, a GGUF or `.1bit` file, or "demo".
        reference: A folder or a GGUF file with the same vocabulary, run in floating point, whose
            tokenizer a model without one takes. Without
            one, a GGUF file is run by another engine and compared with our floating-point mode, and
            a folder with its own floating-point mode.
        data: A text file; documents end with <|endoftext|>. Default: a few sentences of English.
        thresholds: Instead of `THRESHOLDS`. top1_agreement, sparsity and tokens_per_second are least
            values; kl, perplexity, perplexity_ratio (to the reference), bits_per_weight, file_bytes,
            file_bits_per_weight and peak_rss_bytes are most values.
        positions: Tokens on which the two are compared, from the beginnings of the documents; an
            engine gets the first document only, and perplexities are then those of these tokens.
        max_documents: Perplexity on the first ones only.
        engine: "llama-cpp-python", "llama-cli" or the path of such a program; default: what is installed.
        threads: Default: the physical cores at hand.

    Raises ValueError where no engine is there or it refuses the file, with the reason where it is
    known, and for wrong options; FormatError, OSError.
    """
    path = first_part(find_source(model))
    threads = threads or _core.parallel.default_threads()
    limits = check_thresholds(THRESHOLDS if thresholds is None else thresholds)
    if positions <= _PROMPT_TOKENS:
        raise ValueError(f"[validate] positions is more than {_PROMPT_TOKENS}, got {positions}")
    text = DEFAULT_TEXT if data is None else _read(Path(data))
    wants_engine = reference is None and is_gguf(path)
    if wants_engine and engine is None:
        _refuse_hopeless(path)
    ours = TernaryModel.from_pretrained(path, threads=threads, activations="float" if wants_engine else None)
    name = os.fspath(reference or path)
    other_model = None if wants_engine else TernaryModel.from_pretrained(name, threads=threads, activations="float")
    borrows = ours.tokenizer is None and other_model is not None
    if borrows and other_model is not None:
        ours.tokenizer = other_model.tokenizer
    context = min(model.context_length for model in (ours, other_model) if model is not None)
    beginnings = _beginnings(ours, text, positions, context)
    if not beginnings:
        longest = max((len(ours.encode(document)) for document in split_documents(text)), default=0)
        raise ValueError(f"[validate] the text must have more than {_PROMPT_TOKENS} tokens, got {longest}")
    prompt = beginnings[0][1][:_PROMPT_TOKENS]
    count = min(_GREEDY_TOKENS, ours.context_length - len(prompt))
    generated = ours.generate(prompt, max_new_tokens=count)
    if other_model is None:
        document, ids = beginnings[0]
        other = open_engine(path, engine, context=min(positions + 1, ours.context_length), threads=threads)
        try:
            found = _compare_engine(ours, other, document, ids, prompt=prompt, count=count)
        finally:
            other.close()
    else:
        found = _compare_models(ours, other_model, beginnings, prompt=prompt, count=count)
        found |= _perplexities(ours, other_model, text, max_documents)
        found["reference"] = f"{name} in floating point"
        if borrows:
            found["tokens_equal"] = None
    mine, theirs = generated.token_ids, found.pop("greedy")
    equal = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
    fields = {
        "model": str(model),
        **found,
        "greedy_equal": min(len(mine), len(theirs)) if equal is None else equal,
        "greedy_tokens": max(len(mine), len(theirs)),
        "text": "the built-in text" if data is None else os.fspath(data),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        **_describe_weights(path, threads),
        "tokens_per_second": generated.tokens_per_second,
        "prompt_tokens_per_second": generated.prompt_tokens_per_second,
        "peak_rss_bytes": peak_resident_bytes(),
        "threads": threads,
    }
    known = fields["reference_perplexity"]
    fields["perplexity_ratio"] = None if known is None else fields["perplexity"] / known
    missed = judge(fields, limits)
    return ValidationReport(**fields, thresholds=limits, missed=missed, passed=not missed)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[validate] '{path}' is not UTF-8: {error}") from None


def _beginnings(model: TernaryModel, text: str, positions: int, context: int) -> list[tuple[str, list[int]]]:
    """Documents that are long enough and their first tokens, at most `context` each, `positions` together."""
    found: list[tuple[str, list[int]]] = []
    for document in split_documents(text):
        ids = model.encode(document)[: min(positions, context)]
        if len(ids) > _PROMPT_TOKENS:
            found.append((document, ids))
            positions -= len(ids)
        if positions <= _PROMPT_TOKENS:
            break
    return found


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
        "kl_by_position": (),
        "reference_perplexity": None,
        "tokens_equal": None,
    }


def _compare_models(
    ours: TernaryModel,
    other: TernaryModel,
    beginnings: Sequence[tuple[str, list[int]]],
    *,
    prompt: list[int],
    count: int,
) -> dict[str, Any]:
    sizes = [model.architecture.spec.vocab_size for model in (ours, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"[validate] the reference has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}")
    equal, divergences = 0.0, []
    for _, ids in beginnings:
        part = _compare(other.logits(ids), ours.logits(ids), ids, ours_first=False)
        equal += part["top1_agreement"] * len(ids)
        divergences += part["kl_by_position"]
    same = None
    if other.tokenizer is not None:
        same = all(other.encode(document)[: len(ids)] == ids for document, ids in beginnings)
    return {
        "positions": len(divergences),
        "top1_agreement": equal / len(divergences),
        "kl": float(np.mean(divergences)),
        "kl_by_position": tuple(divergences),
        "greedy": other.generate(prompt, max_new_tokens=count).token_ids,
        "tokens_equal": same,
    }


def _perplexities(ours: TernaryModel, other: TernaryModel, text: str, max_documents: int | None) -> dict[str, Any]:
    """Protocol documents; a reference without a tokenizer gets ours."""
    found = ours.perplexity(text, max_documents=max_documents)
    reference = evaluate(other.transformer, ours.require_tokenizer(), text, max_documents=max_documents)
    return {
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "text_tokens": found.tokens,
        "reference_perplexity": reference.perplexity,
    }


def _compare(
    p: NDArray[np.float32], q: NDArray[np.float32], ids: list[int], *, ours_first: bool = True
) -> dict[str, Any]:
    """Agreement and KL(p || q) of the next tokens, and what both think of `ids`; row by row, as rows are long."""
    equal, divergences, nll = 0, [], np.zeros(2)
    for index, row in enumerate(zip(p, q, strict=True)):
        a, b = map(log_softmax, row)
        equal += int(a.argmax() == b.argmax())
        divergences.append(float((np.exp(a) * (a - b)).sum()))
        if index + 1 < len(ids):
            nll -= (a[ids[index + 1]], b[ids[index + 1]])
    perplexities = np.exp(nll / (len(ids) - 1))[:: 1 if ours_first else -1]
    return {
        "positions": len(ids),
        "top1_agreement": equal / len(ids),
        "kl": float(np.mean(divergences)),
        "kl_by_position": tuple(divergences),
        "perplexity": float(perplexities[0]),
        "reference_perplexity": float(perplexities[1]),
        "text_tokens": len(ids) - 1,
        "bits_per_byte": None,
    }


def _describe_weights(path: Path, threads: int) -> dict[str, Any]:
    if path.suffix == ".1bit":
        names = ("sparsity", "balance", "bits_per_weight", "file_bits_per_weight")
        return dict.fromkeys(names) | {"layers": (), "file_bytes": path.stat().st_size}
    source = open_source(path, threads=threads)
    layers = []
    total = zeros = ones = size = 0
    slots = source.architecture.spec.slots()
    for slot, (rows, cols) in slots.items():
        found = source.levels(slot)
        if found is not None:
            nonzero, positive = int(np.count_nonzero(found.trits)), int(np.count_nonzero(found.trits > 0))
            stored = source.stored_bytes(slot)
            sparsity, balance = 1 - nonzero / (rows * cols), positive / nonzero if nonzero else None
            layers.append(ValidatedLayer(slot, rows, cols, sparsity, balance, 8 * stored / (rows * cols)))
            total, zeros = total + rows * cols, zeros + rows * cols - nonzero
            ones, size = ones + positive, size + stored
    tied = source.architecture.tied_head
    parameters = sum(rows * cols for slot, (rows, cols) in slots.items() if not (tied and slot == "head"))
    return {
        "sparsity": zeros / total if total else None,
        "balance": ones / (total - zeros) if total > zeros else None,
        "bits_per_weight": 8 * size / total if total else None,
        "layers": tuple(layers),
        "file_bytes": source.file_bytes,
        "file_bits_per_weight": 8 * source.file_bytes / parameters,
    }
