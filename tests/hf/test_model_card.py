# SPDX-License-Identifier: Apache-2.0
"""The card beside an export, what it takes from the source's and what it does not claim; and sending it to the hub."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from hf_setup import small_model

from ternaryforge.hf import export_bitnet, export_dense, push_to_hub
from ternaryforge.torch import QATConfig, prepare_qat

GROUPS = QATConfig(quantizer="lsq", scale="group", group_size=64, activation_bits=None)


def master(folder: Path, config: QATConfig | None = None, card: str | None = None) -> Path:
    prepare_qat(small_model(), config).save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def test_a_card_says_what_is_known(tmp_path: Path) -> None:
    card = "---\nlicense: cc-by-4.0\nlanguage:\n- en\nbase_model: some/parent\ntags:\n- funny\n---\n# Mine\n"
    report = export_bitnet(
        master(tmp_path / "master", GROUPS, card),
        tmp_path / "small-ternary",
        "ternaryforge",
        measured={"perplexity | valid.txt": 7.25},
    )
    text = (tmp_path / "small-ternary" / "README.md").read_text(encoding="utf-8")
    fields = huggingface_hub.metadata_load(tmp_path / "small-ternary" / "README.md")
    assert fields["license"] == "cc-by-4.0"
    assert fields["base_model"] == "some/parent"
    assert fields["language"] == ["en"]
    assert "funny" not in fields["tags"]
    assert "# small-ternary" in text
    assert "quantizer `lsq`; one scale for 64 columns of a row; inputs not quantised" in text
    assert f"{report.bits_per_weight:.3f}, scales included" in text
    assert f"{report.zero_fraction:.1%} of them zero" in text
    assert "| perplexity \\| valid.txt | 7.25 |" in text
    assert "Nothing else was measured." in text
    assert "import ternaryforge.hf" in text
    assert "llama-cli -m model.gguf" in text
    assert str(tmp_path) not in text


def test_a_card_claims_nothing_else(tmp_path: Path) -> None:
    export_bitnet(master(tmp_path / "master"), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    fields = huggingface_hub.metadata_load(tmp_path / "out" / "README.md")
    assert not {"license", "base_model", "language"} & fields.keys()
    assert "Nothing was measured on this checkpoint." in text
    assert "| Base model | not stated where this was exported |" in text
    assert "| Licence | not stated: that of the base model |" in text
    assert "with accelerate_bitnet():" in text
    export_dense(tmp_path / "master", tmp_path / "dense", base_model="org/parent")
    assert huggingface_hub.metadata_load(tmp_path / "dense" / "README.md")["base_model"] == "org/parent"
    assert "accelerate_bitnet" not in (tmp_path / "dense" / "README.md").read_text(encoding="utf-8")


def test_metadata_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    source = master(tmp_path / "master", card="---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=r"README.md' has metadata that cannot be read"):
        export_bitnet(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Hub:
    """Stands for the hub and writes down what it is asked."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("token", {"token": token}))

    def create_repo(self, repo_id: str, **kwargs: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **kwargs}))

    def upload_folder(self, **kwargs: Any) -> SimpleNamespace:
        self.calls.append(("upload_folder", kwargs))
        return SimpleNamespace(commit_url="https://hub/commit", pr_url="https://hub/pull")


def test_a_folder_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    source = master(tmp_path / "master")
    for folder, repo, message in (
        (source, "me/name", "has no README.md: write a card"),
        (tmp_path / "out", "name", "a repository is 'org/name', got 'name'"),
    ):
        if folder.name == "out":
            export_bitnet(source, folder)
        with pytest.raises(ValueError, match=message):
            push_to_hub(folder, repo)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        push_to_hub(tmp_path / "nothing", "me/name")
    assert Hub.calls == []
    assert push_to_hub(tmp_path / "out", "me/name", private=True, token="secret") == "https://hub/commit"  # noqa: S106
    assert [name for name, _ in Hub.calls] == ["token", "create_repo", "upload_folder"]
    assert Hub.calls[0][1] == {"token": "secret"}
    assert Hub.calls[1][1] == {"repo_id": "me/name", "private": True, "exist_ok": True}
    sent = Hub.calls[2][1]
    assert (sent["repo_id"], sent["folder_path"], sent["create_pr"]) == ("me/name", tmp_path / "out", False)
    assert ".*" in sent["ignore_patterns"]
    assert push_to_hub(tmp_path / "out", "me/name", create_pull_request=True) == "https://hub/pull"
