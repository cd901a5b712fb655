# SPDX-License-Identifier: Apache-2.0
"""What every layer of a model tolerates: what it costs to store it alone in fewer bits; its zeros and scales.

report = analyze("model", "text.txt")      # calibration="train.txt": as calibrate makes them
report.plot()                              # a matplotlib Figure
"""

import html
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.bit_map import MODES, Mode, sandwich
from ternaryforge.calibration_text import read_text
from ternaryforge.evaluation import Window, cut_documents, log_softmax
from ternaryforge.families.base import LINEAR_SLOTS
from ternaryforge.gguf.export_source import ExportSource, open_source
from ternaryforge.map_calibrating import DEFAULT_TOKENS, CalibrationSource, LayerCalibrator
from ternaryforge.mode_encoding import Encoded, encode, plan_matrix
from ternaryforge.model import TernaryModel
from ternaryforge.quantization import ScaleKind
from ternaryforge.report import Report, new_figure
from ternaryforge.rounding import RoundingOptions, check_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Progress = Callable[[int, int, str], None]
By = Literal["layer", "linear"]

_CHUNK_TOKENS = 64  # whose logits are held at once
_KEPT_LOGITS = 1 << 28  # numbers of the model as it is


@dataclass(frozen=True, slots=True)
class ModeEffect:
    """A layer alone in a mode: what it adds to the mean nll, mean KL(model || changed model) in nats, bits, error."""

    mode: Mode
    nll_rise: float
    kl: float
    bits_per_weight: float
    relative_error: float


@dataclass(frozen=True, slots=True)
class AnalyzedLayer:
    """A layer, or a linear layer of one: layers.0, layers.0.query.

    Zeros, balance (the share of +1 among the others) and the mean, least and largest scale are those
    of its trits: as stored where `ternary`, else as least squares rounds them.
    """

    name: str
    weights: int
    ternary: bool
    zero_fraction: float
    balance: float
    scale_mean: float
    scale_min: float
    scale_max: float
    effects: tuple[ModeEffect, ...]


@dataclass(frozen=True)
class AnalysisReport(Report):
    """What `analyze` found; `nll` and `perplexity` are those of the model as it is (protocol documents)."""

    model: str
    data: str
    by: By
    scale: ScaleKind
    group_size: int | None
    tokens: int
    nll: float
    perplexity: float
    layers: tuple[AnalyzedLayer, ...]
    calibration: str | None = None

    def plot(self) -> "Figure":
        """Rise of nll by layer and mode, and zeros and scales by layer."""
        figure = new_figure(10, 6)
        loss, zeros = figure.subplots(2, 1, sharex=True)
        places, names = range(len(self.layers)), [layer.name.removeprefix("layers.") for layer in self.layers]
        for i, effect in enumerate(self.layers[0].effects):
            rises = [layer.effects[i].nll_rise for layer in self.layers]
            loss.plot(places, rises, "o-", label=effect.mode, markersize=4)
        loss.set_yscale("symlog", linthresh=1e-3)
        loss.set_ylabel("rise of nll, nats a token")
        loss.legend(title="alone in")
        zeros.bar(places, [layer.zero_fraction for layer in self.layers], color="#9a9a9a")
        zeros.set_ylabel("share of zeros")
        zeros.set_ylim(0, 1)
        scales = zeros.twinx()
        means = np.array([layer.scale_mean for layer in self.layers])
        bounds = np.array([[layer.scale_min, layer.scale_max] for layer in self.layers]).T
        scales.errorbar(places, means, np.abs(bounds - means), fmt="k.", capsize=2)
        scales.set_ylabel("scales: mean, least, largest")
        zeros.set_xticks(places, names, rotation=90 if self.by == "linear" else 0, fontsize=7)
        return figure

    def _repr_html_(self) -> str:
        modes = [effect.mode for effect in self.layers[0].effects]
        head = "".join(f"<th>{name}</th>" for name in ("layer", "weights", "zeros", *modes))
        rows = "".join(
            f"<tr><td>{html.escape(layer.name)}</td><td>{layer.weights:,}</td><td>{layer.zero_fraction:.3f}</td>"
            + "".join(f"<td>{effect.nll_rise:+.4f}</td>" for effect in layer.effects)
            + "</tr>"
            for layer in self.layers
        )
        caption = f"{html.escape(self.model)}: perplexity {self.perplexity:.4g}; rise of nll of a layer alone in a mode"
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{rows}</table>"


def analyze(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    by: By = "layer",
    modes: Sequence[Mode] = ("int8", "ternary", "binary"),
    scale: ScaleKind = "group",
    group_size: int = 128,
    tokens: int = 8192,
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> AnalysisReport:
    """Measures what each layer of a model costs when it alone is stored in another mode.

    Args:
        model: A checkpoint folder, a GGUF file, `org/name` of the hub, or "demo"; dense or ternary.
        data: UTF-8 text; documents end with <|endoftext|>.
        by: "layer", all linear layers of a layer at once, or "linear", each by itself.
        modes: Those to try: f16, int8, two_plane and ternary (rounded by least squares), binary.
        scale: What shares a scale under ternary and binary: `tensor`, `row` or `group`.
        group_size: Columns of a group, a multiple of 64.
        tokens: Documents are taken from the start until so many tokens are scored.
        calibration: UTF-8 text: layers are put into a mode as `calibrate` would alone, the model being a folder
            in full precision and the scale per row or group; zeros and scales are those of plain rounding still.
            Apart from `data`, or the same text: then what is never drawn of it is measured on.
        calibration_tokens: How many are drawn for that.
        seed: Of the draw.
        threads: Default: the physical cores at hand.
        progress: Called with the measurements done, their number, and the layer.

    The rise of one layer says little about that of several: errors add up and, where calibration
    mends them, cancel. Raises ValueError for wrong options and a text with nothing to score,
    FormatError and OSError for a model that cannot be read.
    """
    threads = threads or _core.parallel.default_threads()
    check_options("ls", scale, group_size, threads)
    if by not in ("layer", "linear"):
        raise ValueError(f"[analyze] by is 'layer' or 'linear', got {by!r}")
    if unknown := [mode for mode in modes if mode not in MODES] or not modes:
        raise ValueError(f"[analyze] modes are some of {', '.join(MODES)}, got {unknown if modes else 'none'}")
    loaded, text, calibrator = TernaryModel.from_pretrained(model, threads=threads), read_text(data), None
    if calibration is not None:
        given = CalibrationSource(calibration, calibration_tokens, seed)
        given.check("analyze", scale)
        ends = sandwich(len(loaded.transformer.spec.layers))
        calibrator = LayerCalibrator(
            Path(loaded.path), given, ends, scale=scale, group_size=group_size, threads=threads
        )
        text = calibrator.text_apart(text)
    options = RoundingOptions("ls", scale, group_size, threads)
    run = _Analysis(loaded, open_source(loaded.path, threads=threads), options, calibrator)
    windows = cut_documents(loaded.require_tokenizer(), text, run.window, tokens=tokens)
    base = run.start(windows)
    units = run.units(by)
    layers: list[AnalyzedLayer] = []
    for name, slots in units.items():

        def step(done: int, of: str = name) -> None:
            if progress is not None:
                progress(len(layers) * len(modes) + done, len(units) * len(modes), of)

        layers.append(run.analyze(name, slots, modes, base, step))
    return AnalysisReport(
        model=str(model),
        data=str(data),
        by=by,
        scale=scale,
        group_size=group_size if scale == "group" else None,
        tokens=run.scored,
        nll=base,
        perplexity=float(np.exp(min(base, 700.0))),
        layers=tuple(layers),
        calibration=None if calibration is None else str(calibration),
    )


class _Analysis:
    """A model of which linear layers are exchanged and put back, and the predictions that it made at first."""

    def __init__(
        self,
        model: TernaryModel,
        source: ExportSource,
        options: RoundingOptions,
        calibrator: LayerCalibrator | None,
    ) -> None:
        self._calibrator = calibrator
        self._transformer = model.transformer
        self._source = source
        self._options = options
        self._windows: list[Window] = []
        self._reference: list[NDArray[np.float32]] = []
        self.window = min(2048, model.context_length)
        self.scored = 0

    def start(self, windows: list[Window]) -> float:
        """Runs the model as it is; returns its mean nll."""
        self._windows = windows
        self.scored = sum(len(window.ids) - window.first for window in windows)
        ids = sum(len(window.ids) for window in windows)
        if ids * self._transformer.spec.vocab_size > _KEPT_LOGITS:
            raise ValueError(
                f"[analyze] {ids} tokens of {self._transformer.spec.vocab_size} logits are more than are kept: ask for "
                f"at most {_KEPT_LOGITS // self._transformer.spec.vocab_size} tokens"
            )
        self._reference = list(self._predictions())
        return self._measure(iter(self._reference))[0]

    def units(self, by: By) -> dict[str, list[str]]:
        """The slots that change together, by name."""
        units: dict[str, list[str]] = {}
        for slot in self._source.architecture.spec.slots():
            if slot.rpartition(".")[2] in LINEAR_SLOTS:
                units.setdefault(slot if by == "linear" else slot.rpartition(".")[0], []).append(slot)
        return units

    def analyze(
        self, name: str, slots: list[str], modes: Sequence[Mode], base: float, step: Callable[[int], None]
    ) -> AnalyzedLayer:
        """Measures one unit in every mode; the model is as before when this returns."""
        weights = {slot: np.concatenate(list(self._source.floats(slot))) for slot in slots}
        effects = []
        for done, mode in enumerate(modes, start=1):
            encoded = (
                {slot: self._encode(slot, weights[slot], mode) for slot in slots}
                if self._calibrator is None
                else self._calibrator.encode_alone(slots, mode)
            )
            try:
                for slot, made in encoded.items():
                    self._transformer.replace_linear(slot, made.packed())
                nll, divergence = self._measure(self._predictions())
            finally:
                for slot in slots:
                    self._restore(slot, weights[slot])
            effects.append(self._effect(mode, (nll - base, divergence), encoded, weights))
            step(done)
        trits, scales, ternary = self._trits(slots, weights)
        nonzero = np.concatenate([part[part != 0] for part in trits])
        size = sum(part.size for part in trits)
        return AnalyzedLayer(
            name=name,
            weights=size,
            ternary=ternary,
            zero_fraction=1 - nonzero.size / size,
            balance=float((nonzero > 0).mean()) if nonzero.size else 0.0,
            scale_mean=float(scales.mean(dtype=np.float64)),
            scale_min=float(scales.min()),
            scale_max=float(scales.max()),
            effects=tuple(effects),
        )

    def _effect(
        self,
        mode: Mode,
        measured: tuple[float, float],
        encoded: dict[str, Encoded],
        weights: dict[str, NDArray[np.float32]],
    ) -> ModeEffect:
        size = sum(part.size for part in weights.values())
        stored = [
            plan_matrix("w", mode, (part.shape[0], part.shape[1]), self._options, dtype="F32")
            for part in weights.values()
        ]
        pairs = [(weights[slot], encoded[slot].values()) for slot in weights]
        energy = sum(float(np.square(part, dtype=np.float64).sum()) for part, _ in pairs)
        error = sum(float(np.square(part - value, dtype=np.float64).sum()) for part, value in pairs)
        return ModeEffect(
            mode=mode,
            nll_rise=measured[0],
            kl=measured[1],
            bits_per_weight=8 * sum(tensor.nbytes for plan in stored for tensor in plan) / size,
            relative_error=error / energy if energy else 0.0,
        )

    def _encode(self, slot: str, weights: NDArray[np.float32], mode: Mode) -> Encoded:
        where = f"[analyze] '{self._source.where}': '{slot}'"
        return encode(np.ascontiguousarray(weights), mode, self._options, dtype="F32", where=where)

    def _restore(self, slot: str, weights: NDArray[np.float32]) -> None:
        """The layer as it was stored."""
        found = self._source.ternary(slot) if self._source.scales_of(slot) is not None else None
        if found is None:
            rows, cols = weights.shape
            data = np.ascontiguousarray(weights).view(np.uint8)
            self._transformer.replace_linear(slot, _core.formats.PackedTensor("f32", rows, cols, data))
            return
        rows, cols = found.trits.shape
        packed = _core.formats.PackedTensor(
            "t16",
            rows,
            cols,
            _core.formats.pack(found.trits, "t16"),
            scale_kind=found.kind,
            group_size=found.group_size if found.kind == "group" else 0,
            scales=found.scales.reshape(-1),
        )
        self._transformer.replace_linear(slot, packed)

    def _trits(
        self, slots: list[str], weights: dict[str, NDArray[np.float32]]
    ) -> tuple[list[NDArray[np.int8]], NDArray[np.float32], bool]:
        """Trits and scales of the layers, and whether they are stored so."""
        stored = [self._source.ternary(slot) for slot in slots]
        found = [part for part in stored if part is not None]
        if len(found) == len(slots):
            return [part.trits for part in found], np.concatenate([part.scales.reshape(-1) for part in found]), True
        made = [self._encode(slot, weights[slot], "ternary") for slot in slots]
        trits = [part.codes.astype(np.int8) for part in made]
        return trits, np.concatenate([part.scales.reshape(-1) for part in made]), False

    def _predictions(self) -> Iterator[NDArray[np.float32]]:
        """Log-probabilities [tokens, vocab] of what follows each token of a window."""
        for window in self._windows:
            state, parts = self._transformer.new_sequence(), []
            ids = np.asarray(window.ids, np.int32)
            for begin in range(0, len(ids), _CHUNK_TOKENS):
                chunk = ids[begin : begin + _CHUNK_TOKENS]
                logits = self._transformer.forward([(chunk, state)], logits="all")
                parts.append(log_softmax(logits).astype(np.float32))
            yield np.concatenate(parts)

    def _measure(self, predictions: Iterator[NDArray[np.float32]]) -> tuple[float, float]:
        """Mean nll of the scored tokens, and mean divergence from the model as it is, of all positions."""
        nats = divergence = 0.0
        for window, p, q in zip(self._windows, self._reference, predictions, strict=True):
            targets = np.asarray(window.ids[window.first :])
            nats -= float(q[np.arange(window.first - 1, len(window.ids) - 1), targets].sum(dtype=np.float64))
            divergence += float((np.exp(p, dtype=np.float64) * (p.astype(np.float64) - q)).sum())
        return nats / self.scored, divergence / sum(len(window.ids) for window in self._windows)
