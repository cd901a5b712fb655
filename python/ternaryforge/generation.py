# SPDX-License-Identifier: Apache-2.0
"""Generated text: pieces of a stream, whole results, and stop strings."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypedDict

import numpy as np

from ternaryforge import _core
from ternaryforge.report import Report
from ternaryforge.tokenizer import DecodeStream, Tokenizer

FinishReason = Literal["stop", "length"]


class GenerationOptions(TypedDict, total=False):
    """The options of `TernaryModel.generate`, which has their meaning and defaults."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: str | Sequence[str]
    seed: int
    do_sample: bool | None


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token.

    `text` is what became certain with it: empty while a character or a possible stop string is
    unfinished. `logprob`, the natural logarithm of its probability under the model, is computed when
    asked for where choosing the token did not need it. `finish_reason` is set on the last one:
    "stop" after an end token (whose text is not shown) or a stop string, "length" at
    `max_new_tokens` or at the end of the context.
    """

    text: str
    token_id: int
    finish_reason: FinishReason | None = None
    token: _core.runtime.GeneratedToken | None = field(default=None, repr=False, compare=False)

    @property
    def logprob(self) -> float:
        """Natural log-probability; NaN for a piece that was not generated."""
        return math.nan if self.token is None else self.token.logprob

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class GenerationResult(Report):
    """The continuation of one prompt. `str()` is its text.

    `token_ids` and `logprobs` (natural logarithm, per token) hold every generated token but the
    end token; with a two-stage head, `logprobs` are computed when first asked for. `text` is empty
    where the model has no tokenizer. Seconds are those of the whole batch that the prompt was part
    of.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    prompt_seconds: float
    generation_seconds: float
    tokens: tuple[_core.runtime.GeneratedToken, ...] = field(default=(), repr=False, compare=False)

    @cached_property
    def logprobs(self) -> list[float]:
        """Natural log-probability of each of `token_ids` under the model."""
        return _core.runtime.log_probabilities(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first one; 0 where there are none."""
        count = len(self.token_ids) - 1
        return count / self.generation_seconds if count > 0 and self.generation_seconds else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed at which the prompt was read."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, the log-probabilities and both speeds."""
        fields = {name: value for name, value in vars(self).items() if name != "tokens"}
        return fields | {
            "logprobs": self.logprobs,
            "tokens_per_second": self.tokens_per_second,
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
        }

    def __str__(self) -> str:
        return self.text


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces.

    `push` returns what can be shown: everything but an end that might begin a stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Adds text. Once `found`, nothing after the stop string is returned any more."""
        if self.found:
            return ""
        text = self._held + text
        begins = [begin for begin in (text.find(stop) for stop in self._stop) if begin >= 0]
        if begins:
            self.found = True
            self._held = ""
            return text[: min(begins)]
        held = max((self._overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when no more text follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


@dataclass(slots=True)
class _Sequence:
    """What has become of one prompt so far."""

    prompt_tokens: int
    decoder: DecodeStream | None
    stop: StopStrings
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tokens: list[_core.runtime.GeneratedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, token: _core.runtime.GeneratedToken) -> Piece:
        """Turns a token of the core into a piece, and notes it."""
        reason = _finish_reason(token.finish_reason)
        ended = reason == "stop"
        text = ""
        if not ended:
            self.token_ids.append(token.token_id)
            self.tokens.append(token)
            if self.decoder is not None:
                text = self.stop.push(self.decoder.push(token.token_id))
        if reason is not None and self.decoder is not None:
            text += self.stop.push(self.decoder.flush()) + self.stop.flush()
        if self.stop.found:
            reason = "stop"
        self.finish_reason = reason
        self.text.append(text)
        return Piece(text, token.token_id, reason, token)


def _finish_reason(name: str | None) -> FinishReason | None:
    match name:
        case None | "stop" | "length":
            return name
    raise ValueError(f"[generate] unknown finish reason {name!r}")


class Generation:
    """A running batch: iterate to get (index of the prompt, piece), then ask for the results."""

    def __init__(
        self,
        transformer: _core.model.Transformer,
        tokenizer: Tokenizer | None,
        prompts: Sequence[Sequence[int]],
        options: Sequence[_core.runtime.SamplingOptions],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        stop: Sequence[str],
    ) -> None:
        self._generator = _core.runtime.Generator(
            transformer,
            [np.asarray(prompt, np.int32) for prompt in prompts],
            list(options),
            max_new_tokens=max_new_tokens,
            stop_ids=list(stop_ids),
        )
        self._sequences = [_Sequence(len(prompt), _decoder(tokenizer, prompt), StopStrings(stop)) for prompt in prompts]
        self._prompt_seconds = 0.0
        self._generation_seconds = 0.0

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        waiting = len(self._sequences)  # for their first token
        while not self._generator.done:
            begin = time.perf_counter()
            tokens = self._generator.step()
            seconds = time.perf_counter() - begin
            if waiting:
                self._prompt_seconds += seconds
            else:
                self._generation_seconds += seconds
            for token in tokens:
                sequence = self._sequences[token.sequence]
                waiting -= not sequence.token_ids and sequence.finish_reason is None
                piece = sequence.take(token)
                if piece.finish_reason is not None and token.finish_reason is None:
                    self._generator.stop(token.sequence)
                yield token.sequence, piece

    def results(self) -> list[GenerationResult]:
        """One result per prompt, in their order, of what the iteration has yielded so far."""
        return [
            GenerationResult(
                text="".join(sequence.text),
                token_ids=sequence.token_ids,
                finish_reason=sequence.finish_reason or "length",
                prompt_tokens=sequence.prompt_tokens,
                prompt_seconds=self._prompt_seconds,
                generation_seconds=self._generation_seconds,
                tokens=tuple(sequence.tokens),
            )
            for sequence in self._sequences
        ]


class PieceStream(Iterator[Piece]):
    """The pieces of one prompt as they come; `result` is what they make once they have ended."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._pieces = iter(generation)

    def __next__(self) -> Piece:
        return next(self._pieces)[1]

    @property
    def result(self) -> GenerationResult:
        """The text so far with its figures."""
        return self._generation.results()[0]


def _decoder(tokenizer: Tokenizer | None, prompt: Sequence[int]) -> DecodeStream | None:
    """Text after a prompt of nothing but special tokens is the start of a text."""
    if tokenizer is None:
        return None
    return DecodeStream(tokenizer, continuation=any(map(tokenizer.token_bytes, prompt)))
