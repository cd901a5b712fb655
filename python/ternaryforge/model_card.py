# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported checkpoint: what it is, how to load it, what was measured; and sending it to the hub.

    export_bitnet("master", "out", base_model="org/name", measured={"perplexity on valid.txt": "6.91"})
    push_to_hub("out", "me/name-ternary", private=True)

A card says only what is known: no figure that was not given, no licence that the source's card does not name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ternaryforge.checkpoint import Checkpoint

CARD = "README.md"

_CARRIED = ("license", "license_name", "license_link", "language", "datasets")
_TAGS = ["ternary", "bitnet", "1.58-bit", "ternaryforge"]


def source_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's card, {} without a card or without metadata.

    Raises ValueError for metadata that is no YAML mapping.
    """
    card = folder / CARD
    if not card.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        return dict(metadata_load(card) or {})
    except Exception as error:  # noqa: BLE001 # whatever the YAML reader raises
        raise ValueError(f"[card] '{card}' has metadata that cannot be read: {error}") from None


def write_model_card(
    name: str,
    facts: Mapping[str, str],
    loading: str,
    *,
    source: Path,
    base_model: str | None = None,
    measured: Mapping[str, str | float] | None = None,
) -> str:
    """The text of a card.

    Args:
        name: The title.
        facts: Rows of the first table.
        loading: Markdown on how the weights are loaded.
        source: The folder that was exported, from whose card licence, language, data and base model come.
        base_model: `org/name` of the full-precision model; before what the source's card says.
        measured: Figures by what they are; without them the card says that nothing was measured.
    """
    from huggingface_hub import ModelCardData

    known = source_metadata(source)
    base = base_model or known.get("base_model")
    carried = {key: known[key] for key in _CARRIED if known.get(key) is not None}
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": _TAGS, **carried}
    if base:
        fields["base_model"] = base
    metadata = ModelCardData(ignore_metadata_errors=False, **fields).to_yaml()
    bases = ", ".join(base) if isinstance(base, list) else base
    rows = {"Base model": bases or "not stated where this was exported", **facts}
    rows["Licence"] = str(carried.get("license_name") or carried.get("license") or "not stated: that of the base model")
    table = "\n".join(f"| {what} | {_cell(value)} |" for what, value in rows.items())
    if measured:
        figures = "\n".join(f"| {_cell(what)} | {_cell(value)} |" for what, value in measured.items())
        measurements = f"| what | figure |\n|---|---|\n{figures}\n\nNothing else was measured."
    else:
        measurements = (
            "Nothing was measured on this checkpoint. Measure it with `ternaryforge evaluate FOLDER --text FILE`, "
            "on text that it was not trained on."
        )
    return (
        f"---\n{metadata}\n---\n\n# {name}\n\nA language model with ternary weights, written by TernaryForge.\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Loading\n\n{loading}\n\n## Measurements\n\n{measurements}\n"
    )


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Add a ternary checkpoint",
    create_pull_request: bool = False,
) -> str:
    """Sends an exported folder to the repository `org/name` of the Hugging Face hub; returns the address of the commit.

    The repository is made where it does not exist. Files whose names begin with a point stay here. `token` None takes
    the one that `hf auth login` stored. Raises FileNotFoundError or FormatError for a folder that is no checkpoint,
    ValueError for one without a card, and what huggingface_hub raises.
    """
    path = Path(folder)
    checkpoint = Checkpoint.open(path)
    if not checkpoint.config:
        raise ValueError(f"[hub] '{path}' has no config.json: nobody could load it")
    if not (path / CARD).is_file():
        raise ValueError(
            f"[hub] '{path}' has no {CARD}: write a card, or export the checkpoint again, which writes one"
        )
    if repo_id.count("/") != 1:
        raise ValueError(f"[hub] a repository is 'org/name', got {repo_id!r}")
    source_metadata(path)
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=path,
        commit_message=message,
        create_pr=create_pull_request,
        ignore_patterns=[".*", "*/.*"],
    )
    return str(commit.pr_url if create_pull_request else commit.commit_url)


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
