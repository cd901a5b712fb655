# SPDX-License-Identifier: Apache-2.0
"""What making a model ternary costs in quality: figures on record, each with where it comes from."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["measured", "published", "independent"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One perplexity before and after. `before` is None where the source does not give it.

    `kind`: measured by this project, published by a method's authors, or reported by others
    (independent, not reviewed). Perplexities of different texts cannot be compared.
    """

    method: str
    model: str
    text: str
    before: float | None
    after: float
    kind: Kind
    source: str


@dataclass(frozen=True, slots=True)
class ExpectedLoss:
    """What to expect of a method: a sentence, the least factor on record, and the figures."""

    summary: str
    least_perplexity_factor: float | None
    figures: tuple[Figure, ...]


_WINDOWS = "TinyStories, 160 windows of 256 tokens"
_DOCUMENTS = "TinyStories validation, first 200 documents, protocol documents"
_HERE = "groups of 64, linear layers only, one run"
_PARETOQ = "ParetoQ, arXiv 2502.02631, ternary round to nearest"

FIGURES = (
    Figure("absmax", "stories260K", _WINDOWS, 4.32, 4739, "measured", _HERE),
    Figure("absmean", "stories260K", _WINDOWS, 4.32, 476, "measured", _HERE),
    Figure("twn", "stories260K", _WINDOWS, 4.32, 255, "measured", _HERE),
    Figure("ls", "stories260K", _WINDOWS, 4.32, 241, "measured", _HERE),
    Figure("absmean", "stories260K", _DOCUMENTS, 3.69, 430, "measured", _HERE),
    Figure("ls", "stories260K", _DOCUMENTS, 3.69, 224, "measured", _HERE),
    Figure("absmean", "BabyLlama tok105", _WINDOWS, 2.35, 48860, "measured", _HERE),
    Figure("ls", "BabyLlama tok105", _WINDOWS, 2.35, 124, "measured", _HERE),
    Figure("absmean", "MobileLLM-600M", "WikiText-2", 9.1, 6.6e5, "published", _PARETOQ),
    Figure("absmean", "MobileLLM-1B", "WikiText-2", 8.0, 1.4e5, "published", _PARETOQ),
    Figure("absmean", "Llama-3-3B", "WikiText-2", None, 4.4e5, "published", _PARETOQ),
    Figure("absmean", "Qwen2.5-1.5B", "WikiText-2", 13.9, 3.8e6, "independent", "a write-up by others"),
    Figure("absmax", "Qwen3-1.7B", "WikiText-2", None, 1e8, "independent", "a write-up by others"),
)
"""Plain rounding without calibration or training, in perplexity."""


def expected_loss(method: str | None) -> ExpectedLoss:
    """What is on record for rounding by `method`; None is a model that keeps its weights."""
    if method is None:
        return ExpectedLoss("none: the weights stay as they are", 1.0, ())
    figures = tuple(figure for figure in FIGURES if figure.method == method)
    factors = [figure.after / figure.before for figure in figures if figure.before is not None]
    least = min(factors)
    return ExpectedLoss(
        f"plain rounding of a dense model gives gibberish: at least {least:.0f} times the perplexity in every "
        f"case on record for '{method}', more in larger models; weights that are ternary already lose nothing",
        least,
        figures,
    )
