# SPDX-License-Identifier: Apache-2.0
"""Other programs that run GGUF files, as far as they are installed: llama-cpp-python and llama-cli."""

import importlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_COMMANDS = ("llama-completion", "llama-cli")  # newer builds keep the second one for conversations
_TIMEOUT = 600  # seconds


class Engine(Protocol):
    """A program with a loaded file. `name` says which, with its version where it tells."""

    name: str

    def tokenize(self, text: str) -> list[int] | None:
        """Its tokens of a text with the one that starts it, None where it does not say."""

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32] | None:
        """Logits after each token, None where it does not give them."""

    def continue_text(self, prompt: str, ids: Sequence[int], count: int, end_ids: Sequence[int]) -> list[int] | str:
        """The likeliest `count` tokens after a prompt, or their text; ends before an end token."""

    def close(self) -> None:
        """Frees the file."""


class LlamaCppPython:
    """llama.cpp in the package `llama-cpp-python`. Raises ImportError, and ValueError for a file that it refuses."""

    def __init__(self, file: Path, *, context: int, threads: int) -> None:
        llama_cpp: Any = importlib.import_module("llama_cpp")
        self.name = f"llama-cpp-python {llama_cpp.__version__}"
        try:
            self._model: Any = llama_cpp.Llama(
                str(file), n_ctx=context, n_batch=context, logits_all=True, verbose=False, n_threads=threads
            )
        except ValueError as error:
            raise ValueError(f"[validate] {self.name} refuses '{file}': {error}") from None

    def tokenize(self, text: str) -> list[int]:
        """As `Engine` says."""
        return list(self._model.tokenize(text.encode(), add_bos=True, special=False))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """As `Engine` says."""
        self._model.reset()
        self._model.eval(list(ids))
        return np.array(self._model.scores[: len(ids)], np.float32)

    def continue_text(self, prompt: str, ids: Sequence[int], count: int, end_ids: Sequence[int]) -> list[int]:
        """As `Engine` says."""
        del prompt
        self._model.reset()
        self._model.eval(list(ids))
        tokens: list[int] = []
        while len(tokens) < count:
            best = int(self._model.scores[self._model.n_tokens - 1].argmax())
            if best in end_ids:
                break
            tokens.append(best)
            self._model.eval([best])
        return tokens

    def close(self) -> None:
        """As `Engine` says."""
        self._model.close()


class LlamaCli:
    """The command line of llama.cpp or of one of its forks, which gives text only."""

    def __init__(self, file: Path, command: str, *, threads: int) -> None:
        self.name = Path(command).name
        self._file = file
        self._command = command
        self._threads = threads

    def tokenize(self, text: str) -> None:
        """It does not tell."""
        del text

    def logits(self, ids: Sequence[int]) -> None:
        """It does not tell."""
        del ids

    def continue_text(self, prompt: str, ids: Sequence[int], count: int, end_ids: Sequence[int]) -> str:
        """As `Engine` says; what stands behind an end token belongs to the text."""
        del ids, end_ids
        arguments = ["-m", str(self._file), "-p", prompt, "-n", str(count), "--temp", "0", "-t", str(self._threads)]
        # Files with a chat template start a conversation unless told; old builds do not know the option.
        code, output, errors = self._run([*arguments, "--no-display-prompt", "-no-cnv"])
        if code != 0:
            code, output, errors = self._run([*arguments, "--no-display-prompt"])
        if code != 0:
            raise ValueError(f"[validate] {self._command} ended with {code} for '{self._file}': {_reason(errors)}")
        return output.rstrip("\n").removesuffix(" [end of text]")

    def _run(self, arguments: list[str]) -> tuple[int, str, str]:
        done = subprocess.run(  # noqa: S603 - the program that the user named, without a shell
            [self._command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT, check=False
        )
        return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")

    def close(self) -> None:
        """Nothing runs between two calls."""


def _reason(errors: str) -> str:
    """The first line that speaks of an error: the later ones only say who else gave up. Else the last line."""
    lines = errors.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if "error" in line.lower() or "assert" in line.lower()), lines[-1]).strip()


def open_engine(
    file: str | os.PathLike[str], engine: str | None = None, *, context: int = 512, threads: int = 1
) -> Engine:
    """Loads a file in "llama-cpp-python", in "llama-cli" (from PATH), or in the command at a path.

    None takes the first of these that is installed. Raises ValueError where there is none, or where
    it does not load the file.
    """
    if engine in (None, "llama-cpp-python"):
        try:
            return LlamaCppPython(Path(file), context=context, threads=threads)
        except ImportError:
            if engine is not None:
                raise ValueError("[validate] llama-cpp-python is not installed: pip install llama-cpp-python") from None
    names = _COMMANDS if engine is None or engine == "llama-cli" else (engine,)
    command = next((found for name in names if (found := shutil.which(name))), None)
    if command is None:
        raise ValueError(
            f"[validate] no engine for GGUF files is installed ({engine or 'llama-cpp-python, llama-cli'}): "
            "pip install llama-cpp-python, or name a folder with reference (--reference)"
        )
    return LlamaCli(Path(file), command, threads=threads)
