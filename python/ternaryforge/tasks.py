# SPDX-License-Identifier: Apache-2.0
"""Multiple choice and last words from local files, scored as lm-eval does.

    results = evaluate_tasks(model, {"arc_easy": "eval/arc_easy.jsonl", "lambada_openai": "eval/lambada_openai.jsonl"})
    results["arc_easy"].acc, results["arc_easy"].acc_stderr

docs/guide/quantization.md says what the files hold.
"""

import bz2
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.evaluation import log_softmax
from ternaryforge.model import TernaryModel
from ternaryforge.report import Report

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class TaskResult(Report):
    """One task. What it has no figure for is None.

    `acc` is the share of questions whose right answer has the highest log-probability, `acc_norm` the same of
    log-probability per character of the answer; of LAMBADA, `acc` is the share of endings that are the likeliest
    token by token, and `perplexity` exp of the mean -log p of an ending. `*_stderr` are standard errors of the mean.
    """

    task: str
    file: str
    questions: int
    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    perplexity: float | None


@dataclass(frozen=True, slots=True)
class _Question:
    """Pairs of context and continuation, of which number `gold` is right; `lengths` in characters, for acc_norm."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...] | None


Row = Mapping[str, Any]


def _choices(row: Row, context: str, *, normed: bool = True) -> _Question:
    choices = [str(choice) for choice in row["choices"]]
    lengths = tuple(map(len, choices)) if normed else None
    return _Question(tuple((context, f" {choice}") for choice in choices), int(row["gold"]), lengths)


def _asked(row: Row) -> _Question:
    """A question with the word Question in front, and its answer."""
    return _choices(row, f"{str(row['query']).rstrip()}\nAnswer:")


def _yes_or_no(row: Row) -> _Question:
    text = str(row["query"]).removeprefix("Passage: ").rstrip()
    return _choices(row, f"{text}\nAnswer:", normed=False)


def _continued(row: Row) -> _Question:
    return _choices(row, str(row["query"]).rstrip())


def _filled_in(row: Row) -> _Question:
    """The same ending behind each of the options."""
    ending = f" {str(row['continuation']).strip()}"
    return _Question(tuple((str(option).rstrip(), ending) for option in row["context_options"]), int(row["gold"]), None)


def _last_word(row: Row) -> _Question:
    return _Question(((str(row["context"]).rstrip(), f" {str(row['continuation']).strip()}"),), 0, None)


_TASKS: dict[str, Callable[[Row], _Question]] = {
    "arc_easy": _asked,
    "arc_challenge": _asked,
    "piqa": _asked,
    "boolq": _yes_or_no,
    "openbookqa": _continued,
    "hellaswag": _continued,
    "winogrande": _filled_in,
    "lambada_openai": _last_word,
}
TASKS = tuple(_TASKS)
"""The names of the tasks."""
_FILES = {"openbookqa": ("openbook_qa",), "hellaswag": ("hellaswag_val_full",)}  # other stems of files
_ENDINGS = (".jsonl", ".txt", ".txt.bz2", ".jsonl.bz2")
_LINES_OF_HELLASWAG = 6


def find_tasks(names: Sequence[str], folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of tasks in a folder. Raises ValueError for unknown tasks, FileNotFoundError for absent files."""
    found = {}
    for name in names:
        _check_name(name)
        stems = (name, *_FILES.get(name, ()))
        files = [Path(folder) / f"{stem}{ending}" for stem in stems for ending in _ENDINGS]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"[evaluate] '{folder}' has no file for the task {name}, such as {files[0].name}")
        found[name] = file
    return found


def evaluate_tasks(
    model: TernaryModel,
    files: Mapping[str, str | os.PathLike[str]],
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskResult]:
    """Scores the tasks whose `files` are given by name, see `TASKS`; without examples in the prompt.

    `limit` takes the first questions only. `progress` is called with the questions done, all there are, and the
    task. Raises FormatError for a malformed file, ValueError for unknown tasks and a model without a tokenizer.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"[evaluate] limit is positive, got {limit}")
    tasks = {}
    for name, file in files.items():
        _check_name(name)
        tasks[name] = list(_read(name, Path(file)))[:limit]
    results = {}
    done, total = 0, sum(map(len, tasks.values()))
    for name, questions in tasks.items():
        score = _last_words if name == "lambada_openai" else _multiple_choice
        rows = []
        for question in questions:
            rows.append(score(model, question))
            done += 1
            if progress is not None:
                progress(done, total, name)
        results[name] = _summarize(name, os.fspath(files[name]), rows)
    return results


def _check_name(name: str) -> None:
    if name not in _TASKS:
        raise ValueError(f"[evaluate] a task is one of {', '.join(TASKS)}, got {name!r}")


def _read(name: str, file: Path) -> Iterator[_Question]:
    data = file.read_bytes()
    try:
        text = (bz2.decompress(data) if file.suffix == ".bz2" else data).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"[evaluate] '{file}' cannot be read: {error}") from None
    lines = [line for line in text.split("\n") if line.strip()]
    rows: Sequence[str | Row] = _hellaswag_rows(lines, file) if ".txt" in file.suffixes else lines
    count = 0
    for count, row in enumerate(rows, start=1):
        try:
            question = _TASKS[name](json.loads(row) if isinstance(row, str) else row)
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"[evaluate] '{file}': question {count} is malformed for {name}: {type(error).__name__} {error}"
            ) from None
        if not 0 <= question.gold < len(question.pairs) or not all(map(all, question.pairs)):
            raise FormatError(f"[evaluate] '{file}': question {count} has an empty text or no answer {question.gold}")
        yield question
    if not count:
        raise FormatError(f"[evaluate] '{file}' holds no questions")


def _hellaswag_rows(lines: Sequence[str], file: Path) -> list[Row]:
    """llama.cpp's form: context, number of the right ending, four endings."""
    if len(lines) % _LINES_OF_HELLASWAG:
        raise FormatError(f"[evaluate] '{file}' has {len(lines)} lines, which is no multiple of {_LINES_OF_HELLASWAG}")
    return [
        {"query": lines[i], "gold": lines[i + 1], "choices": lines[i + 2 : i + _LINES_OF_HELLASWAG]}
        for i in range(0, len(lines), _LINES_OF_HELLASWAG)
    ]


def _multiple_choice(model: TernaryModel, question: _Question) -> dict[str, float]:
    scores = np.array([log_probability(model, *pair)[0] for pair in question.pairs])
    row = {"acc": float(scores.argmax() == question.gold)}
    if question.lengths is not None:
        row["acc_norm"] = float((scores / np.array(question.lengths)).argmax() == question.gold)
    return row


def _last_words(model: TernaryModel, question: _Question) -> dict[str, float]:
    score, greedy = log_probability(model, *question.pairs[0], greedy=True)
    return {"acc": float(greedy), "nats": -score}


def log_probability(
    model: TernaryModel, context: str, continuation: str, *, greedy: bool = False
) -> tuple[float, bool]:
    """Log p(continuation | context), and, if asked, whether each of its tokens is the likeliest.

    The texts are cut into tokens together, and the context loses what exceeds the window at its beginning.
    """
    whole, first = model.encode(context + continuation), len(model.encode(context))
    count = max(1, len(whole) - first)
    ids = whole[-min(len(whole), model.context_length) :]
    count = min(count, len(ids) - 1)
    if count < 1:
        raise ValueError("[evaluate] a question of one token cannot be scored: the tokenizer starts texts with none")
    if not greedy:
        scores = _core.runtime.score(model.transformer, np.asarray(ids, np.int32))
        return float(scores[-count:].sum(dtype=np.float64)), False
    logits, targets = model.logits(ids)[-count - 1 : -1], np.array(ids[-count:])
    score = float(log_softmax(logits)[np.arange(count), targets].sum())
    return score, bool((logits.argmax(-1) == targets).all())


def _summarize(name: str, file: str, rows: Sequence[Mapping[str, float]]) -> TaskResult:
    def mean(key: str) -> tuple[float | None, float | None]:
        values = np.array([row[key] for row in rows if key in row])
        if not len(values):
            return None, None
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None

    acc, stderr = mean("acc")
    nats, _ = mean("nats")
    return TaskResult(
        name,
        file,
        len(rows),
        acc or 0.0,
        stderr,
        *mean("acc_norm"),
        perplexity=None if nats is None else math.exp(min(nats, 700.0)),
    )
