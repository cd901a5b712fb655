# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: a folder, the Hugging Face hub, or the package itself."""

import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Never pickles: these are all that is read.
_HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja"]
# Folders hold other forms of the model; only additional_chat_templates belongs to this one.
_HUB_IGNORED = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*"]


def find_source(source: str | os.PathLike[str], *, download: bool = True) -> Path:
    """The local path of a path, of `org/name[@revision]` on the hub, or of "demo".

    What is not cached is downloaded, unless HF_HUB_OFFLINE or `download` forbids it. A path that exists goes
    before a name on the hub. Raises OSError where the hub does not give the files.
    """
    name = os.fspath(source)
    if name == "demo":
        return Path(__file__).with_name("embedded_model")
    path = Path(source)
    if path.exists() or not _HUB_NAME.fullmatch(name):
        return path
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repo,
            revision=revision or None,
            local_files_only=not download,
            allow_patterns=_HUB_PATTERNS,
            ignore_patterns=_HUB_IGNORED,
        )
    except Exception as error:
        if not download:
            raise FileNotFoundError(
                f"[load] '{name}' is no folder here and not in the cache of the hub, and nothing is downloaded "
                f"for this: fetch it first with `hf download {repo}`"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"[load] '{name}' is no folder here and could not be fetched from the hub: {reason}") from error
    return Path(folder)
