# SPDX-License-Identifier: Apache-2.0
"""What an unfinished calibration has reached, kept beside its result so that the same call goes on."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class KeptLayers:
    """The layers that are done, one file each, and what tuning has reached, in a hidden folder beside the result."""

    def __init__(self, out: Path, key: dict[str, Any]) -> None:
        self.folder = out.absolute().with_name(f".{out.name}.calibration")
        file = self.folder / "key.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != key:
            raise ValueError(
                f"[calibrate] '{self.folder}' must hold an unfinished run with the same source, text and options, got "
                "another one: finish that one, or remove the folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._replace(file, json.dumps(key).encode())

    def save(self, layer: int | str, arrays: dict[str, NDArray[Any]]) -> None:
        """Keeps the arrays of a layer, or under a name; all or nothing."""
        partial = self.folder / "layer.partial"
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._file(layer))

    def load(self, layer: int | str) -> dict[str, NDArray[Any]] | None:
        """The arrays of a layer, or of a name; None where it is not done."""
        if not self._file(layer).is_file():
            return None
        with np.load(self._file(layer)) as arrays:
            return dict(arrays)

    def discard(self) -> None:
        """Removes all; the result holds it now."""
        shutil.rmtree(self.folder)

    def _file(self, layer: int | str) -> Path:
        return self.folder / (f"layer-{layer:05d}.npz" if isinstance(layer, int) else f"{layer}.npz")

    def _replace(self, file: Path, data: bytes) -> None:
        partial = self.folder / "key.partial"
        partial.write_bytes(data)
        partial.replace(file)
