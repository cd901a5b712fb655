# SPDX-License-Identifier: Apache-2.0
"""Tasks from files that the tests write: scores against NumPy, how questions become texts, and refusals."""

import bz2
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge import tasks
from ternaryforge.cli import app
from ternaryforge.tasks import TASKS, evaluate_tasks, find_tasks

ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"query": "Question: Who barked?", "choices": ["the dog", "the very big and old green tree"], "gold": 0},
        {"query": "Question: Who sang?", "choices": ["a bird", "a stone", "the table in the room"], "gold": 2},
        {"query": "Question: Who ran home?", "choices": ["Tom and his mom", "no"], "gold": 1},
    ],
    "winogrande": [
        {"context_options": ["Tom saw a cat so Tom", "Tom saw a cat so the cat"], "continuation": "smiled.", "gold": 0},
        {"context_options": ["Lily had a cake so Lily", "Lily had a cake so it"], "continuation": "ate.", "gold": 1},
    ],
    "lambada_openai": [
        {"context": "Once upon a", "continuation": "time"},
        {"context": "They lived happily ever", "continuation": "zebra"},
        {"context": "One day, a little girl", "continuation": "named"},
    ],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model() -> tf.TernaryModel:
    return tf.TernaryModel.demo(threads=1)


def log_probabilities(model: tf.TernaryModel, context: str, continuation: str) -> tuple[np.ndarray[Any, Any], bool]:
    """Of the tokens of the continuation, from logits."""
    whole, first = model.encode(context + continuation), len(model.encode(context))
    logits = model.logits(whole).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = range(first, len(whole))
    greedy = all(logs[i - 1].argmax() == whole[i] for i in places)
    return np.array([logs[i - 1, whole[i]] for i in places]), greedy


def stderr(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def test_multiple_choice(tmp_path: Path, model: tf.TernaryModel) -> None:
    """Sums of log-probabilities, and the same per character of the answer."""
    found = evaluate_tasks(model, {"arc_easy": write(tmp_path / "a.jsonl", ROWS["arc_easy"])})["arc_easy"]
    right, normed = [], []
    for row in ROWS["arc_easy"]:
        sums = [log_probabilities(model, row["query"] + "\nAnswer:", " " + text)[0].sum() for text in row["choices"]]
        right.append(float(np.argmax(sums) == row["gold"]))
        lengths = [len(text) for text in row["choices"]]
        normed.append(float(np.argmax(np.array(sums) / lengths) == row["gold"]))
    assert (found.questions, found.acc, found.acc_norm) == (3, np.mean(right), np.mean(normed))
    assert right != normed, "the cases must tell the two apart"
    assert found.acc_stderr == pytest.approx(stderr(right))
    assert found.acc_norm_stderr == pytest.approx(stderr(normed))
    assert found.perplexity is None


def test_endings_and_last_words(tmp_path: Path, model: tf.TernaryModel) -> None:
    names = ("winogrande", "lambada_openai")
    files = {name: write(tmp_path / f"{name}.jsonl", ROWS[name]) for name in names}
    seen: list[tuple[int, int, str]] = []
    found = evaluate_tasks(model, files, progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(i, 5) for i in range(1, 6)]
    right = []
    for row in ROWS["winogrande"]:
        ending = " " + row["continuation"]
        sums = [log_probabilities(model, context, ending)[0].sum() for context in row["context_options"]]
        right.append(float(np.argmax(sums) == row["gold"]))
    assert found["winogrande"].acc == np.mean(right)
    assert found["winogrande"].acc_norm is None
    pairs = [log_probabilities(model, row["context"], " " + row["continuation"]) for row in ROWS["lambada_openai"]]
    greedy = [float(likeliest) for _, likeliest in pairs]
    assert 0 < sum(greedy) < 3, "the cases must tell likely from unlikely"
    assert found["lambada_openai"].acc == pytest.approx(np.mean(greedy))
    assert found["lambada_openai"].perplexity == pytest.approx(
        np.exp(-np.mean([logs.sum() for logs, _ in pairs])), 1e-4
    )
    one = evaluate_tasks(model, files, limit=1)
    assert (one["winogrande"].questions, one["winogrande"].acc_stderr) == (1, None)


@pytest.mark.parametrize(
    ("task", "query", "context"),
    [
        ("arc_challenge", "Question: What?", "Question: What?\nAnswer:"),
        ("piqa", "Question: How?\n", "Question: How?\nAnswer:"),
        ("boolq", "Passage: It is.\nQuestion: is it?", "It is.\nQuestion: is it?\nAnswer:"),
        ("openbookqa", "Predators eat", "Predators eat"),
    ],
)
def test_how_questions_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, query: str, context: str
) -> None:
    asked: list[tuple[str, str]] = []

    def score(_model: object, *pair: str) -> tuple[float, bool]:
        asked.append((pair[0], pair[1]))
        return 0.0, False

    monkeypatch.setattr(tasks, "log_probability", score)
    row = {"query": query, "choices": ["no", "b c"], "gold": 1}
    model: Any = None
    found = evaluate_tasks(model, {task: write(tmp_path / "x.jsonl", [row])})
    assert asked == [(context, " no"), (context, " b c")]
    assert (found[task].acc_norm is None) == (task == "boolq")


def test_hellaswag_as_llama_cpp_has_it(tmp_path: Path, model: tf.TernaryModel) -> None:
    lines = ["Play: A boy has a ball. he", "1", "eats it.", "throws it.", "is it.", "a it."]
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress("\n".join(lines * 2).encode()))
    files = find_tasks(["hellaswag"], tmp_path)
    found = evaluate_tasks(model, files)["hellaswag"]
    row = {"query": lines[0], "gold": 1, "choices": lines[2:]}
    same = evaluate_tasks(model, {"hellaswag": write(tmp_path / "h.jsonl", [row, row])})["hellaswag"]
    assert (found.questions, found.acc, found.acc_norm) == (same.questions, same.acc, same.acc_norm)
    assert found.acc_stderr == 0
    (tmp_path / "hellaswag.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(tf.FormatError, match="has 5 lines, which is no multiple of 6"):
        evaluate_tasks(model, {"hellaswag": tmp_path / "hellaswag.txt"})


def test_long_contexts_lose_their_beginning(tmp_path: Path, model: tf.TernaryModel) -> None:
    text = "The cat sat. " * model.context_length
    rows = [{"context": text, "continuation": "The"}]
    found = evaluate_tasks(model, {"lambada_openai": write(tmp_path / "l.jsonl", rows)})["lambada_openai"]
    assert found.perplexity is not None
    assert math.isfinite(found.perplexity)


def test_command_line(tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        write(tmp_path / f"{name}.jsonl", rows)
    call = ["evaluate", "demo", "--tasks", ",".join(ROWS), "--task-data", str(tmp_path)]
    result = CliRunner().invoke(app, [*call, "--json", "--limit", "2"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["perplexity"] is None
    assert {name: task["questions"] for name, task in document["tasks"].items()} == dict.fromkeys(ROWS, 2)
    text = tmp_path / "text.txt"
    text.write_text("The dog ran to the big tree.")
    result = CliRunner().invoke(app, [*call, "--text", str(text)])
    assert result.exit_code == 0, result.output
    assert "bits per byte" in result.stdout
    assert "winogrande" in result.stdout
    assert CliRunner().invoke(app, ["evaluate", "demo"]).exit_code == 2
    assert CliRunner().invoke(app, call[:4]).exit_code == 2


def test_refusals(tmp_path: Path, model: tf.TernaryModel) -> None:
    def refused(match: str, text: str | bytes, task: str = "arc_easy") -> None:
        file = tmp_path / "x.jsonl"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(tf.FormatError, match=match):
            evaluate_tasks(model, {task: file})

    refused("holds no questions", "\n\n")
    refused("question 1 is malformed for arc_easy: KeyError 'query'", '{"gold": 0, "choices": ["a"]}')
    refused("question 2 is malformed for arc_easy: JSONDecodeError", json.dumps(ROWS["arc_easy"][0]) + "\n{")
    refused("question 1 has an empty text or no answer 2", '{"query": "a", "gold": 2, "choices": ["a", "b"]}')
    refused("cannot be read", b"\xff\xfe")
    with pytest.raises(ValueError, match=f"a task is one of {', '.join(TASKS)}, got 'mmlu'"):
        evaluate_tasks(model, {"mmlu": tmp_path})
    with pytest.raises(ValueError, match="limit is positive"):
        evaluate_tasks(model, {}, limit=0)
    with pytest.raises(FileNotFoundError, match="has no file for the task piqa"):
        find_tasks(["piqa"], tmp_path)


@pytest.mark.shared
def test_the_files_at_hand(shared: Path, model: tf.TernaryModel) -> None:
    """Every task reads its real file; two questions each."""
    files = find_tasks(TASKS, shared / "data" / "eval")
    found = evaluate_tasks(model, files, limit=2)
    assert {result.questions for result in found.values()} == {2}
