# SPDX-License-Identifier: Apache-2.0
"""Bit maps of one model measured as `calibrate` makes them; what maps have in common is calibrated once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ternaryforge.bit_map import BitMap, LayerModes, Mode
from ternaryforge.calibration_blocks import DEFAULT_TARGETS, BlockEditor, ReturningWalk, calibrate_block
from ternaryforge.calibration_linear import DAMPING, DESCENT_ROUNDS, Float32, LinearOptions
from ternaryforge.calibration_text import CalibrationText, check_apart, read_text
from ternaryforge.evaluation import Window, score_windows
from ternaryforge.map_measuring import Choice, MapSpace
from ternaryforge.mapped_calibration import EncodedLinear, MappedCalibration
from ternaryforge.mode_encoding import Encoded
from ternaryforge.quantization import ScaleKind

DEFAULT_TOKENS = 4096
_KEPT_BYTES = 1 << 30  # of calibrated layers and the residual streams behind them

_Prefix = tuple[int, Choice]
"""A layer, and the modes of all units up to it."""


@dataclass(frozen=True, slots=True)
class CalibrationSource:
    """The text to calibrate on, and how much of it is drawn, by which seed; all else as `calibrate` does by itself."""

    data: str | os.PathLike[str]
    tokens: int
    seed: int

    def check(self, op: str, scale: ScaleKind) -> None:
        """Raises ValueError for what `calibrate` does not do with a map."""
        if scale == "tensor":
            raise ValueError(f"[{op}] calibration goes with scale='row' or 'group', got scale='tensor'")
        if self.tokens < 1:
            raise ValueError(f"[{op}] calibration_tokens is at least 1, got {self.tokens}")


@dataclass(frozen=True, slots=True)
class _CalibratedLayer:
    encoded: dict[str, Encoded]
    streams: tuple[Float32, ...]  # of the quantised model, behind it

    @property
    def nbytes(self) -> int:
        codes = sum(own.codes.nbytes + own.scales.nbytes for own in self.encoded.values())
        return codes + sum(stream.nbytes for stream in self.streams)


class LayerCalibrator(MappedCalibration):
    """A calibration by method best that goes back and forth between maps.

    Raises what `calibrate` raises, FormatError and ValueError, for a source or a text that it refuses.
    """

    def __init__(
        self,
        source: Path,
        calibration: CalibrationSource,
        ends: BitMap,
        *,
        scale: ScaleKind,
        group_size: int,
        threads: int,
    ) -> None:
        options = LinearOptions("best", scale, group_size, DAMPING, DESCENT_ROUNDS, threads)
        super().__init__(source, options, DEFAULT_TARGETS, ends)
        self._text = read_text(calibration.data)
        self.drawn: CalibrationText = self.draw(self._text, calibration.tokens, calibration.seed)
        self._walk = ReturningWalk(self._reference, self.quantized, self.drawn.sequences, threads)
        self._editor: BlockEditor[EncodedLinear] = BlockEditor(
            self._read, self._quantize, self._replace, lambda _: None, self._keep
        )

    def text_apart(self, text: str) -> str:
        """What of a text may be measured on: all, or, where it is the calibration text, what is never drawn.

        Raises ValueError where it shares documents with the calibration text.
        """
        if text == self._text:
            return self.drawn.held_out
        check_apart(self._text, text)
        return text

    def encode_alone(self, slots: Sequence[str], mode: Mode) -> dict[str, Encoded]:
        """Some linear layers of one layer, calibrated in a mode, with all others exact."""
        layer = int(slots[0].split(".")[1])
        own: LayerModes = {
            slot.rpartition(".")[2]: mode if slot in slots else "f16"
            for slot in self._architecture.linear_modules()
            if slot.startswith(f"layers.{layer}.")
        }
        modes: list[LayerModes] = ["f16"] * len(self._architecture.spec.layers)
        modes[layer] = own
        self._bit_map = BitMap(self._bit_map.embedding, tuple(modes))
        self._walk.go_to(layer, self._walk.exact_streams(layer))
        done = calibrate_block(self._walk, self._editor, self._targets)
        return {slot: done[slot].encoded for slot in slots}

    def _keep(self, slot: str) -> EncodedLinear | None:
        if self._mode(slot) != "f16":
            return None
        return EncodedLinear(self._round(slot, self._read(slot)), 0.0, 0.0, 0)


class CalibratedMaps(LayerCalibrator):
    """Measures maps of a space as they are behind `calibrate`: each layer minds the errors of those before it.

    A layer is calibrated anew only where the map differs in it or before it from all that are still kept.
    """

    def __init__(
        self, source: Path, calibration: CalibrationSource, ends: BitMap, space: MapSpace, *, threads: int
    ) -> None:
        options = space.mapped.options
        super().__init__(source, calibration, ends, scale=options.scale, group_size=options.group_size, threads=threads)
        self._space = space
        self._known: dict[_Prefix, _CalibratedLayer] = {}
        self._placed: dict[int, _Prefix] = {}

    def nll(self, choice: Choice, windows: Sequence[Window]) -> float:
        """The mean nll of a text by the map of a choice."""
        self._put(choice)
        return score_windows(self.quantized, windows)

    def _put(self, choice: Choice) -> None:
        """Brings the quantised model into the modes of a choice."""
        self._bit_map = self._space.bit_map(choice)
        streams, path = self._walk.exact_streams(0), []
        for layer in range(len(self._architecture.spec.layers)):
            modes = tuple(i for unit, i in zip(self._space.units, choice, strict=True) if unit.layer <= layer)
            path.append((layer, modes))
            found = self._known.get(path[-1])
            if found is None:
                self._placed.pop(layer, None)
                self._walk.go_to(layer, streams)
                done = calibrate_block(self._walk, self._editor, self._targets)
                self._walk.advance()
                encoded = {slot: linear.encoded for slot, linear in done.items()}
                found = self._known[path[-1]] = _CalibratedLayer(encoded, self._walk.streams)
            elif self._placed.get(layer) != path[-1]:
                self._placed.pop(layer, None)
                for slot, own in found.encoded.items():
                    self.quantized.replace_linear(slot, own.packed())
            self._placed[layer] = path[-1]
            streams = found.streams
        self._forget(path)

    def _forget(self, path: Sequence[_Prefix]) -> None:
        """Drops what was not used for the longest time, deep layers first."""
        for prefix in reversed(path):
            self._known[prefix] = self._known.pop(prefix)
        kept = sum(layer.nbytes for layer in self._known.values())
        for prefix in [prefix for prefix in self._known if prefix not in path]:
            if kept <= _KEPT_BYTES:
                break
            kept -= self._known.pop(prefix).nbytes
