# SPDX-License-Identifier: Apache-2.0
"""Perplexity by three named protocols, so that a figure says how it was measured."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.report import Report
from ternaryforge.tokenizer import Tokenizer

Protocol = Literal["documents", "wikitext", "llama.cpp"]
PROTOCOLS: tuple[Protocol, ...] = ("documents", "wikitext", "llama.cpp")
SEPARATOR = "<|endoftext|>"

_DEFAULT_WINDOW = {"documents": 2048, "wikitext": 2048, "llama.cpp": 512}


@dataclass(frozen=True)
class EvaluationResult(Report):
    """How well a text was predicted.

    `nll` is the mean of -ln p over the scored `tokens`, `perplexity` is exp(nll), `bits_per_byte`
    the total in bits over `bytes`: UTF-8 bytes of the documents, or of the scored tokens in the two
    protocols that cut a text into chunks. `window` is the number of tokens seen at once.
    """

    protocol: Protocol
    nll: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    window: int


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens to run at once, the first of them that is scored, and the bytes this adds."""

    ids: list[int]
    first: int
    size: int


def evaluate(
    transformer: _core.model.Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    protocol: Protocol = "documents",
    window: int | None = None,
    max_documents: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Scores `text`. `progress` is called with the windows done and their number.

    - documents: split at <|endoftext|>, each stripped; tokens are the one that starts a text (where
      the tokenizer has one) and the document; windows of at most 2048 tokens overlap by half, and
      every token but the first is scored once, in the first window that holds it.
    - wikitext: the whole text tokenised once, windows of 2048 side by side, the rest dropped, every
      token of a window but the first scored.
    - llama.cpp: chunks of 512 with the starting token in place of their first, the second half of
      each scored, as `llama-perplexity` does.

    `window` is another number of tokens; it never exceeds the context of the model.
    `max_documents` takes only the first ones. Raises ValueError for a text with nothing to score.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"[evaluate] protocol must be one of {PROTOCOLS}, got {protocol!r}")
    if max_documents is not None and (max_documents < 1 or protocol != "documents"):
        raise ValueError("[evaluate] max_documents must be positive and goes with 'documents'")
    size = window or _DEFAULT_WINDOW[protocol]
    if size < 4:
        raise ValueError(f"[evaluate] window must be at least 4 tokens, got {size}")
    size = min(size, transformer.spec.context_length)
    if protocol == "documents":
        windows = list(_document_windows(tokenizer, split_documents(text)[:max_documents], size))
    else:
        windows = list(_chunk_windows(tokenizer, text, size, llama_cpp=protocol == "llama.cpp"))
    tokens = sum(len(part.ids) - part.first for part in windows)
    size_in_bytes = sum(part.size for part in windows)
    if not tokens:
        raise ValueError(
            "[evaluate] the text has nothing to score"
            + ("" if protocol == "documents" else f": it is shorter than one window of {size} tokens")
        )
    nll = score_windows(transformer, windows, progress=progress)
    return EvaluationResult(
        protocol=protocol,
        nll=nll,
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        bits_per_byte=nll * tokens / (math.log(2) * size_in_bytes) if size_in_bytes else math.inf,
        tokens=tokens,
        bytes=size_in_bytes,
        window=size,
    )


def split_documents(text: str) -> list[str]:
    """The documents between the separators, stripped, without empty ones."""
    return [part.strip() for part in text.split(SEPARATOR) if part.strip()]


def score_windows(
    transformer: _core.model.Transformer,
    windows: Sequence[Window],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """The mean of -ln p over the scored tokens of windows."""
    nats = 0.0
    for done, part in enumerate(windows, start=1):
        scores = _core.runtime.score(transformer, np.asarray(part.ids, np.int32))
        nats -= float(scores[part.first - 1 :].sum(dtype=np.float64))
        if progress is not None:
            progress(done, len(windows))
    return nats / sum(len(part.ids) - part.first for part in windows)


def cut_documents(tokenizer: Tokenizer, text: str, size: int, *, tokens: int | None) -> list[Window]:
    """The windows of protocol documents, from the start of a text until `tokens` are scored; None: all of it.

    Whole documents are taken. Raises ValueError for a text with nothing to score.
    """
    windows: list[Window] = []
    scored = 0
    for document in split_documents(text):
        for window in _document_windows(tokenizer, [document], size):
            windows.append(window)
            scored += len(window.ids) - window.first
        if tokens is not None and scored >= tokens:
            break
    if not scored:
        raise ValueError("[evaluate] the text has nothing to score")
    return windows


def _document_windows(tokenizer: Tokenizer, documents: Sequence[str], size: int) -> Iterator[Window]:
    for document in documents:
        ids = tokenizer.encode(document)
        document_bytes = len(document.encode())
        scored, start = 1, 0
        while scored < len(ids):
            part = ids[start : start + size]
            yield Window(part, scored - start, document_bytes)
            document_bytes = 0
            scored, start = start + len(part), start + size // 2


def _chunk_windows(tokenizer: Tokenizer, text: str, size: int, *, llama_cpp: bool) -> Iterator[Window]:
    ids = tokenizer.encode(text)
    for start in range(0, len(ids) - size + 1, size):
        part = ids[start : start + size]
        if llama_cpp and tokenizer.bos_id is not None:
            part[0] = tokenizer.bos_id
        # llama-perplexity scores the predictions made at positions size / 2 .. size - 2.
        first = size // 2 + 1 if llama_cpp else 1
        yield Window(part, first, sum(len(tokenizer.token_bytes(i)) for i in part[first:]))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities [..., vocab] of logits [..., vocab]."""
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values
