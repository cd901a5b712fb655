# SPDX-License-Identifier: Apache-2.0
"""The text that calibration sees, drawn by a seed, and the text on which its result is measured."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ternaryforge.evaluation import SEPARATOR, split_documents
from ternaryforge.tokenizer import Tokenizer

WINDOW = 256
"""Tokens that calibration sees at once, where the model's context holds as many."""
_SHORTEST = 16  # tokens of a window that is worth running
_HELD_OUT_SHARE = 8  # one document in so many is never drawn
_HELD_OUT_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """`sequences` of token ids to calibrate on, and `held_out` documents apart from them to measure on."""

    sequences: tuple[NDArray[np.int32], ...]
    held_out: str
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(ids) for ids in self.sequences)


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 file. Raises ValueError for anything else, OSError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[calibrate] '{os.fspath(path)}' is not UTF-8: {error}") from None


def check_apart(data: str, evaluation: str) -> None:
    """Raises ValueError where the text to measure on is, or shares a document with, the calibration text."""
    if _sha256(data) == _sha256(evaluation):
        raise ValueError(
            "[calibrate] the calibration text must not be the evaluation text, got the same SHA-256 "
            f"{_sha256(data)} for both: a model looks better on what it was fitted to; name another file"
        )
    shared = set(split_documents(data)) & set(split_documents(evaluation))
    if shared:
        raise ValueError(
            f"[calibrate] the calibration text and the evaluation text must share no document, got {len(shared)}, "
            f"the first beginning {min(shared)[:40]!r}: remove them from one of the files"
        )


def draw_text(text: str, tokenizer: Tokenizer, *, tokens: int, least: int, window: int, seed: int) -> CalibrationText:
    """Draws about `tokens` tokens in windows of at most `window`, documents shuffled by `seed`.

    Documents are what <|endoftext|> separates, or else paragraphs; a long one gives several windows.
    Every eighth of the shuffled documents is held out. Raises ValueError where fewer than `least`
    tokens can be drawn.
    """
    documents = split_documents(text)
    if len(documents) < 2 * _HELD_OUT_SHARE:
        documents = [part.strip() for part in text.replace(SEPARATOR, "\n\n").split("\n\n") if part.strip()]
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out, held_out_tokens = [], 0
    for i in order[::_HELD_OUT_SHARE] if len(documents) >= _HELD_OUT_SHARE else ():
        if held_out_tokens < _HELD_OUT_TOKENS:
            held_out.append(documents[i])
            held_out_tokens += len(tokenizer.encode(documents[i]))
    sequences: list[NDArray[np.int32]] = []
    drawn = 0
    for position, i in enumerate(order):
        if position % _HELD_OUT_SHARE == 0 or drawn >= tokens:
            continue
        ids = np.asarray(tokenizer.encode(documents[i]), np.int32)
        for begin in range(0, len(ids), window):
            part = ids[begin : begin + window]
            if len(part) >= _SHORTEST and drawn < tokens:
                sequences.append(part)
                drawn += len(part)
    if drawn < least or not held_out:
        raise ValueError(
            f"[calibrate] at least {least} tokens are needed beside the eighth of the documents that is held out, "
            f"got {drawn} of {len(documents)} documents: give more text, or ask for more tokens"
        )
    return CalibrationText(tuple(sequences), SEPARATOR.join(held_out), _sha256(text))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
