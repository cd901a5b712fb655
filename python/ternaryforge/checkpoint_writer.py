# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoint folders tensor by tensor, all or nothing.

    plan = [TensorPlan("model.norm.weight", "F32", (64,)), ...]
    with CheckpointWriter("out", plan) as writer:
        writer.write("model.norm.weight", array)       # in any order, each exactly once
        with writer.writing("lm_head.weight") as part: # or in parts, in order
            part(first_rows)
            part(more_rows)
        writer.write_json("config.json", config)
        writer.copy_file(source / "tokenizer.json")

Nothing appears at `out` before everything is written.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from ternaryforge.checkpoint import DTYPE_BYTES, SINGLE_FILE

# A BF16 tensor is handed over as its bits in uint16, or as bytes.
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1"}
COMPANION_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*.jinja", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What is copied beside the weights: texts need it, or a licence asks for it."""

_ALIGNMENT = 64  # of the first tensor in the file; the format asks for 8


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor to write: dtype as safetensors names it, e.g. F32, F16, BF16, U8, I8."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class CheckpointWriter:
    """Writes one checkpoint folder, holding no more than the data at hand.

    The work happens in a hidden folder beside `out`, which is renamed to `out` when the `with`
    block ends without an error and every planned tensor was written; otherwise it is removed,
    after Ctrl-C too. `out` must not exist or be an empty folder (FileExistsError).
    Raises OSError with the reason when the disk is full. `header_bytes`: what comes before the data
    takes so much, a multiple of 8; 0: as little as it can, aligned to 64.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        tensors: Sequence[TensorPlan],
        *,
        metadata: dict[str, str] | None = None,
        header_bytes: int = 0,
    ) -> None:
        self.out = Path(out)
        # As the safetensors library does: wide elements first, so that everything is aligned.
        plan = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        begins: dict[str, int] = {}
        position = 0
        for tensor in plan:
            if tensor.name in header:
                raise ValueError(f"[save] the tensor '{tensor.name}' is planned twice")
            begins[tensor.name] = position
            position += tensor.nbytes
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [begins[tensor.name], position],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        if header_bytes and 8 + len(text) > header_bytes:
            raise ValueError(f"[save] the header takes {8 + len(text)} bytes, and {header_bytes} were foretold")
        text += b" " * (header_bytes - 8 - len(text) if header_bytes else -(8 + len(text)) % _ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text
        self._begins = begins
        self._missing = {tensor.name: tensor for tensor in plan}
        self.file_bytes = len(self._header) + position
        """Size of the safetensors file."""
        self._folder = self.out.with_name(f".{self.out.name}.{uuid.uuid4().hex[:8]}.partial")
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self.out = Path(os.path.abspath(self.out))  # noqa: PTH100 - resolve() would follow a link
        self._folder = self.out.with_name(self._folder.name)
        if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
            raise FileExistsError(
                errno.EEXIST,
                "[save] there is something already; remove it or name another folder",
                str(self.out),
            )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.out.parent).free
        if free < self.file_bytes:
            raise OSError(
                errno.ENOSPC,
                f"[save] {self.file_bytes} bytes are needed and {free} are free; nothing was written",
                str(self.out),
            )
        self._folder.mkdir()
        try:
            with self._explained(SINGLE_FILE):
                self._file = (self._folder / SINGLE_FILE).open("wb")
                self._file.write(self._header)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def write(self, name: str, data: NDArray[Any] | memoryview | bytes) -> None:
        """Writes one tensor whole. An array must have the planned dtype and shape (BF16: uint16)."""
        if isinstance(data, np.ndarray):
            tensor = self._planned(name)
            if data.shape != tensor.shape:
                raise ValueError(f"[save] '{name}' was planned as {tensor.shape}, is {data.shape}")
        with self.writing(name) as part:
            part(data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Callable[[NDArray[Any] | memoryview | bytes], None]]:
        """Writes one tensor in parts: yields a function that appends an array or bytes."""
        tensor = self._planned(name)
        if self._file is None:
            raise ValueError("[save] the writer is used outside its `with` block")
        file = self._file
        begin = len(self._header) + self._begins[name]
        written = 0

        def append(data: NDArray[Any] | memoryview | bytes) -> None:
            nonlocal written
            if isinstance(data, np.ndarray):
                if data.dtype != np.dtype(_NUMPY[tensor.dtype]):
                    raise TypeError(f"[save] '{name}' was planned as {tensor.dtype}, is {data.dtype}")
                view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
            else:
                view = memoryview(data).cast("B")
            if written + view.nbytes > tensor.nbytes:
                raise ValueError(f"[save] '{name}' was planned with {tensor.nbytes} bytes, has more")
            with self._explained(SINGLE_FILE):
                file.seek(begin + written)
                file.write(view)
            written += view.nbytes

        yield append
        if written != tensor.nbytes:
            raise ValueError(f"[save] '{name}' was planned with {tensor.nbytes} bytes, has {written}")
        del self._missing[name]

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file into the folder, or into a folder in it."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file into the folder, or into a folder in it."""
        with self._explained(name):
            (self._folder / name).parent.mkdir(exist_ok=True)
            (self._folder / name).write_bytes(data)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy_file(self, source: Path, name: str | None = None) -> None:
        """Copies a file into the folder, under its own name unless `name` gives its path there."""
        name = name or source.name
        with self._explained(name):
            (self._folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, self._folder / name)

    def copy_companions(self, folder: Path) -> None:
        """Copies what `COMPANION_FILES` names of a checkpoint folder, to the same places."""
        for pattern in COMPANION_FILES:
            for file in sorted(folder.glob(pattern)):
                if file.is_file():
                    self.copy_file(file, str(file.relative_to(folder)))

    def _planned(self, name: str) -> TensorPlan:
        if name not in self._missing:
            raise ValueError(f"[save] '{name}' was not planned or is written already")
        return self._missing[name]

    def _finish(self) -> None:
        if self._missing:
            raise ValueError(f"[save] never written: {', '.join(sorted(self._missing))}")
        if self._file is None:
            raise ValueError("[save] the writer is used outside its `with` block")
        with self._explained(SINGLE_FILE):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if self.out.exists():
                self.out.rmdir()  # it was empty; fails, rightly, if it no longer is
            self._folder.rename(self.out)

    def _discard(self) -> None:
        """Closes and removes what is left of the working folder; nothing after a rename."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk again, when the buffer is flushed
                self._file.close()
            self._file = None
        if self._folder.exists():
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"[save] could not write {name}: {error.strerror}; nothing is left behind",
                str(self.out),
            ) from error
