# SPDX-License-Identifier: Apache-2.0
"""What `validate` found: as JSON, as Markdown, as an HTML page with plots, and judged by thresholds."""

import html
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ternaryforge.report import Report, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS = {"top1_agreement": 0.97, "kl": 0.01}
"""The thresholds of `validate` unless others are given."""
LEAST = ("top1_agreement", "sparsity", "tokens_per_second")
"""Fields that may have a threshold which they must reach."""
MOST = (
    "kl",
    "perplexity",
    "perplexity_ratio",
    "bits_per_weight",
    "file_bytes",
    "file_bits_per_weight",
    "peak_rss_bytes",
)
"""Fields that may have a threshold which they must not exceed."""

_SUFFIXES = (".json", ".md", ".html")
_STYLE = (
    "body{font:16px sans-serif;max-width:60em;margin:2em auto}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ccc}svg{max-width:100%;height:auto}"
)
_COLUMNS = ("layer", "rows", "columns", "zeros", "+1 of the others", "bits per weight")


@dataclass(frozen=True, slots=True)
class ValidatedLayer:
    """One matrix of trits or two planes: the share of zeros, that of positives among the others, its stored size."""

    name: str
    rows: int
    cols: int
    sparsity: float
    balance: float | None
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class ValidationReport(Report):
    """What `validate` found. Where there is nothing to tell, a field is None.

    `reference` is what the model was compared with, over `positions` of a text that both were given:
    `top1_agreement` is the share of them with the same likeliest next token, `kl` the mean divergence
    of the next token in nats, `kl_by_position` each one. `greedy_equal` of `greedy_tokens` generated
    tokens are the same. `tokens_equal`: both cut the text into the same tokens. The perplexities
    (protocol documents) are those of the text named `text`, of `text_sha256`, on `text_tokens` tokens.

    `sparsity` is the share of zeros in the ternary layers, `balance` that of +1 among the others;
    `layers` has them one by one. `bits_per_weight` is the stored size of those layers,
    `file_bits_per_weight` that of the whole file over all parameters.

    `missed` says which of `thresholds` are not kept; `passed`: none is.
    """

    model: str
    reference: str
    positions: int
    top1_agreement: float
    kl: float | None
    kl_by_position: tuple[float, ...]
    greedy_equal: int
    greedy_tokens: int
    tokens_equal: bool | None
    text: str
    text_sha256: str
    text_tokens: int
    perplexity: float
    reference_perplexity: float | None
    perplexity_ratio: float | None
    bits_per_byte: float
    sparsity: float | None
    balance: float | None
    bits_per_weight: float | None
    file_bytes: int
    file_bits_per_weight: float | None
    tokens_per_second: float
    prompt_tokens_per_second: float
    peak_rss_bytes: int | None
    threads: int
    layers: tuple[ValidatedLayer, ...]
    thresholds: dict[str, float]
    missed: tuple[str, ...]
    passed: bool

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report; the ending of `path` says how: .json, .md, or .html with plots (matplotlib)."""
        path = Path(path)
        check_suffix(path)
        match path.suffix:
            case ".md":
                path.write_text(self.to_markdown(), encoding="utf-8")
            case ".html":
                path.write_text(self.to_html(), encoding="utf-8")
            case _:
                Report.save(self, path)

    def rows(self) -> dict[str, str]:
        """What a reader wants to know first, in words."""
        rows = {
            "compared with": self.reference,
            "likeliest token": f"equal in {self.top1_agreement:.4f} of {self.positions} places",
            "divergence": "not given by this engine" if self.kl is None else f"{self.kl:.2e} nats",
            "greedy": f"the first {self.greedy_equal} of {self.greedy_tokens} tokens are equal",
        }
        if self.tokens_equal is not None:
            rows["tokens of the text"] = "equal" if self.tokens_equal else "DIFFERENT"
        rows["text"] = f"{self.text}, {self.text_tokens:,} tokens, SHA-256 {self.text_sha256[:16]}"
        rows["perplexity"] = f"{self.perplexity:.4f}" + (
            "" if self.reference_perplexity is None else f", reference {self.reference_perplexity:.4f}"
        )
        if self.bits_per_weight is not None:
            rows["ternary layers"] = (
                f"{self.bits_per_weight:.4f} bits per weight, {self.sparsity:.3f} zeros, "
                f"{self.balance or 0:.3f} of the others +1"
            )
        rows["file"] = f"{self.file_bytes:,} bytes" + (
            "" if self.file_bits_per_weight is None else f", {self.file_bits_per_weight:.3f} bits per parameter"
        )
        rows["speed"] = (
            f"{self.tokens_per_second:.1f} tokens/s, prompt {self.prompt_tokens_per_second:.1f}, {self.threads} threads"
        )
        if self.peak_rss_bytes is not None:
            rows["memory of the process"] = f"{self.peak_rss_bytes / 1e6:.1f} MB"
        return rows | {"passed": "yes" if self.passed else "NO: " + "; ".join(self.missed)}

    def to_markdown(self) -> str:
        """A page with the table, the thresholds and the layers."""
        lines = [f"# {self.model}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in self.rows().items()]
        if self.layers:
            lines += ["", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
            lines += [f"| {' | '.join(row)} |" for row in self._layer_rows()]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """The same as one page that needs no other file, with plots. Raises ImportError without matplotlib."""
        svg = io.StringIO()
        self.plot().savefig(svg, format="svg", metadata={"Date": None})
        drawing = svg.getvalue()
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self.rows().items()
        )
        header = "<tr>" + "".join(f"<th>{name}</th>" for name in _COLUMNS) + "</tr>"
        layers = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._layer_rows()
        )
        title = html.escape(f"Validation of {self.model}")
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n<table>{rows}</table>\n"
            f"{drawing[drawing.index('<svg') :]}\n"
            + (f"<table>{header}{layers}</table>\n" if layers else "")
            + "</body></html>\n"
        )

    def plot(self) -> "Figure":
        """Zeros and balance by layer, and how the divergence is spread over the positions."""
        figure = new_figure(10, 4, "tight")
        by_layer, by_position = figure.subplots(1, 2)
        numbers = range(1, len(self.layers) + 1)
        by_layer.plot(numbers, [layer.sparsity for layer in self.layers], "o", label="zeros")
        by_layer.plot(numbers, [layer.balance or math.nan for layer in self.layers], "x", label="+1 of the others")
        by_layer.set(xlabel="ternary layer, in the order of the table", ylabel="share", ylim=(0, 1))
        by_layer.legend()
        values = [math.log10(max(value, 1e-12)) for value in self.kl_by_position]
        if values:
            by_position.hist(values, bins=30)
        by_position.set(xlabel="divergence of the next token, log10 of nats", ylabel="positions")
        return figure

    def _layer_rows(self) -> list[list[str]]:
        return [
            [
                layer.name,
                f"{layer.rows}",
                f"{layer.cols}",
                f"{layer.sparsity:.4f}",
                "" if layer.balance is None else f"{layer.balance:.4f}",
                f"{layer.bits_per_weight:.4f}",
            ]
            for layer in self.layers
        ]


def check_suffix(path: Path) -> None:
    """Raises ValueError for a file that no report can be written to."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"[validate] a report ends with {', '.join(_SUFFIXES)}, got '{path}'")


def check_thresholds(thresholds: Mapping[str, float]) -> dict[str, float]:
    """A copy. Raises ValueError for names that no field has, and for values that are no numbers."""
    if unknown := sorted(thresholds.keys() - {*LEAST, *MOST}):
        raise ValueError(f"[validate] thresholds has the keys {', '.join((*LEAST, *MOST))}, got {', '.join(unknown)}")
    if wrong := [name for name, value in thresholds.items() if not math.isfinite(value)]:
        raise ValueError(f"[validate] the threshold of {wrong[0]} is a number, got {thresholds[wrong[0]]}")
    return dict(thresholds)


def judge(fields: Mapping[str, Any], thresholds: Mapping[str, float]) -> tuple[str, ...]:
    """What is missed, in words; a field without a value misses its threshold.

    But an engine that gives no probabilities has no divergence, which the default thresholds ask for.
    """
    missed = []
    for name, limit in thresholds.items():
        value, rule = fields[name], f"must be {'at least' if name in LEAST else 'at most'} {limit:g}"
        if value is None:
            if name != "kl":
                missed.append(f"{name} is not known, and {rule}")
        elif value < limit if name in LEAST else value > limit:
            missed.append(f"{name} is {value:.6g}, and {rule}")
    if fields["tokens_equal"] is False:
        missed.append("the reference cuts the text into other tokens")
    return tuple(missed)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
