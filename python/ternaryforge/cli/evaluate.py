# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge evaluate MODEL --text FILE`: perplexity by a named protocol, and tasks."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ternaryforge.cli.output import (
    ActivationsOption,
    AdapterOption,
    HeadMode,
    HeadOption,
    JsonOption,
    KvOption,
    KvType,
    SeedOption,
    ThreadsOption,
    print_columns,
    print_json,
    print_table,
    progress_bar,
)

if TYPE_CHECKING:
    from ternaryforge.tasks import TaskResult


class ProtocolName(StrEnum):
    """Values of `--protocol`."""

    DOCUMENTS = "documents"
    WIKITEXT = "wikitext"
    LLAMA_CPP = "llama.cpp"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, org/name[@revision], or 'demo'.")],
    *,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; documents end with <|endoftext|>.")] = None,
    protocol: Annotated[ProtocolName, typer.Option(help="How the text is cut and scored.")] = ProtocolName.DOCUMENTS,
    window: Annotated[int | None, typer.Option(min=4, help="Tokens seen at once; default: the protocol's.")] = None,
    max_documents: Annotated[int | None, typer.Option(min=1, help="Only the first ones, with 'documents'.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Names with commas, such as arc_easy,piqa; or 'all'.")] = None,
    task_data: Annotated[Path | None, typer.Option(help="Folder with the files of the tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of every task.")] = None,
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    kv: KvOption = KvType.F32,
    head: HeadOption = HeadMode.EXACT,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Measure perplexity on a text, and accuracy on tasks from local files."""
    if text is None and tasks is None:
        raise typer.BadParameter("give --text FILE, --tasks NAMES, or both")
    if (tasks is None) != (task_data is None):
        raise typer.BadParameter("--tasks NAMES and --task-data FOLDER go together")
    from ternaryforge.evaluation import EvaluationResult
    from ternaryforge.model import TernaryModel
    from ternaryforge.tasks import TASKS, evaluate_tasks, find_tasks

    del seed  # nothing here is random
    content = None if text is None else _read(text)
    files = {}
    if tasks is not None and task_data is not None:
        files = find_tasks(TASKS if tasks == "all" else tasks.split(","), task_data)
    loaded = TernaryModel.from_pretrained(
        model,
        threads=threads,
        activations=activations.value if activations else None,
        kv=kv.value,
        head=head.value,
        adapter=adapter,
    )
    result = None
    with progress_bar("Evaluating") as progress:
        if content is not None:
            result = loaded.perplexity(
                content,
                protocol=protocol.value,
                window=window,
                max_documents=max_documents,
                progress=progress,
            )
        scored = evaluate_tasks(loaded, files, limit=limit, progress=progress)
    if json:
        fields = dict.fromkeys(EvaluationResult.__dataclass_fields__) if result is None else result.to_dict()
        print_json(fields | {"tasks": {name: task.to_dict() for name, task in scored.items()}})
        return
    if result is not None:
        print_table(
            {
                "protocol": f"{result.protocol}, windows of {result.window} tokens",
                "perplexity": f"{result.perplexity:.4f} per token",
                "nll": f"{result.nll:.4f} nats per token",
                "bits per byte": f"{result.bits_per_byte:.4f}",
                "scored": f"{result.tokens:,} tokens, {result.bytes:,} bytes",
            }
        )
    if scored:
        header = ["task", "questions", "acc", "+-", "acc_norm", "+-", "perplexity"]
        print_columns(header, [_row(task) for task in scored.values()])


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[evaluate] '{text}' is not UTF-8: {error}") from None


def _row(task: "TaskResult") -> list[str]:
    figures = (task.acc, task.acc_stderr, task.acc_norm, task.acc_norm_stderr)
    cells = ["" if figure is None else f"{figure:.4f}" for figure in figures]
    return [task.task, str(task.questions), *cells, "" if task.perplexity is None else f"{task.perplexity:.2f}"]
