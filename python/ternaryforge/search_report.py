# SPDX-License-Identifier: Apache-2.0
"""What a search of bit maps found: the map, its figures, everything that was measured."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ternaryforge.bit_map import BitMap, Mode, parse_bit_map
from ternaryforge.quantization import ScaleKind
from ternaryforge.report import Report, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

By = Literal["layer", "linear"]
MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class MeasuredMap:
    """A map that was measured as a whole."""

    size_bytes: int
    perplexity: float
    layer_modes: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class UnitEffect:
    """What a layer, or a linear layer, alone in a mode adds to the nll, all others in the first mode; its bytes."""

    name: str
    mode: Mode
    nll_rise: float
    size_bytes: int


@dataclass(frozen=True)
class SearchResult(Report):
    """The map that was found.

    `perplexity` (protocol documents, on `tokens` scored tokens of `data`) was measured with exactly
    this map; `size_bytes` is what model.safetensors will have. `exhaustive`: every map was measured,
    so that no other is better. `measured` are all maps that were, `effects` the units alone. With
    `calibration`, the text, maps were measured as `calibrate` makes them of `calibration_tokens` tokens
    by `seed`; without, as `convert` does.
    """

    source: str
    data: str
    layer_bit_map: dict[str, Any]
    perplexity: float
    size_bytes: int
    max_perplexity: float | None
    max_size_mb: float | None
    by: By
    scale: ScaleKind
    group_size: int | None
    tokens: int
    exhaustive: bool
    resumed: int
    effects: tuple[UnitEffect, ...]
    measured: tuple[MeasuredMap, ...]
    calibration: str | None = None
    calibration_tokens: int | None = None
    seed: int | None = None

    @property
    def bit_map(self) -> BitMap:
        """The map, for `convert`."""
        return parse_bit_map(self.layer_bit_map, where="search")

    def plot(self) -> "Figure":
        """Perplexity over size of all maps that were measured, and the one that was chosen."""
        figure = new_figure(7, 4)
        axes = figure.subplots()
        axes.plot(
            [found.size_bytes / MEGABYTE for found in self.measured],
            [found.perplexity for found in self.measured],
            ".",
            color="#9a9a9a",
            label="measured",
        )
        axes.plot([self.size_bytes / MEGABYTE], [self.perplexity], "o", color="#d98032", label="chosen")
        axes.set_yscale("log")
        axes.set_xlabel("megabytes")
        axes.set_ylabel("perplexity")
        axes.legend()
        return figure


@dataclass(frozen=True)
class MapScore(Report):
    """One map, measured; `kept`: it keeps the limits that were given."""

    layer_bit_map: dict[str, Any]
    perplexity: float
    size_bytes: int
    tokens: int
    kept: bool
    calibration: str | None = None
