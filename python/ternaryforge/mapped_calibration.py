# SPDX-License-Identifier: Apache-2.0
"""Calibration by a bit map: trits, in one plane or two, as always, the rest rounded, all minding those before."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.bit_map import BitMap, Mode
from ternaryforge.calibration_blocks import Targets
from ternaryforge.calibration_keeping import KeptLayers
from ternaryforge.calibration_linear import (
    Float32,
    Float64,
    LinearOptions,
    Planes,
    damped,
    energy_of,
    fit_target,
    moment_factor,
    quantize_linear,
)
from ternaryforge.calibration_run import CalibrationRun
from ternaryforge.calibration_text import CalibrationText
from ternaryforge.mapped_checkpoint import MappedCheckpoint
from ternaryforge.mode_encoding import Encoded, encode
from ternaryforge.rounding import RoundingOptions
from ternaryforge.weights import load_weights


@dataclass(frozen=True, slots=True)
class EncodedLinear:
    """A linear layer in its mode; errors are relative to the output of the best weights."""

    encoded: Encoded
    error_before: float
    error_after: float
    dead_channels: int

    @property
    def trits(self) -> NDArray[Any]:
        """Codes, floats under f16."""
        return self.encoded.codes


class MappedCalibration(CalibrationRun):
    """A calibration whose layers have the modes of a map. Raises FormatError where the map does not fit."""

    def __init__(self, source: Path, options: LinearOptions, targets: Targets, bit_map: BitMap) -> None:
        super().__init__(source, options, targets)
        rounding = RoundingOptions("ls", options.scale, options.group_size, options.threads)
        self._mapped = MappedCheckpoint(self._checkpoint, self._architecture, rounding)
        self._mapped.check(bit_map)
        self._bit_map = bit_map
        self.quantized = self._load_mapped()

    def key(self, drawn: CalibrationText, tokens: int, seed: int) -> dict[str, Any]:
        """With the map."""
        return super().key(drawn, tokens, seed) | {"bit_map": self._bit_map.to_dict()}

    def measure(self, text: str) -> tuple[float, float]:
        """Perplexity of the source, and of rounding it by the map."""
        rounded = self._load_mapped()
        for slot in self._architecture.linear_modules():
            rounded.replace_linear(slot, self._round(slot, self._read(slot)).packed())
        return self.perplexity(self._reference, text), self.perplexity(rounded, text)

    def write(self, out: Path, kept: KeptLayers) -> int:
        """Writes the folder, all or nothing; returns the size of the weights file."""
        slots = {self._architecture.tensor_names[slot]: slot for slot in self._architecture.linear_modules()}

        def encoded(name: str) -> Encoded | None:
            slot = slots.get(name)
            return None if slot is None else self._kept_encoding(slot, kept.load(int(slot.split(".")[1])) or {})

        size, stored = self._mapped.write(out, self._bit_map, encoded=encoded, activation_bits=None)
        self.ternary_bytes = sum(matrix.nbytes for matrix in stored if matrix.name in slots)
        return size

    def _load_mapped(self) -> _core.model.Transformer:
        """The source with embedding and head in their modes."""
        weights = load_weights(self._checkpoint, self._architecture)
        for name, matrix in self._mapped.matrices.items():
            if matrix.slot in ("embedding", "head"):
                weights[matrix.slot] = self._mapped.encode(name, self._mapped.mode(self._bit_map, name)).packed()
        return _core.model.Transformer(
            self._architecture.spec, weights, activations=self.activations, threads=self._options.threads
        )

    def _mode(self, slot: str) -> Mode:
        return self._bit_map.mode(slot, self._architecture.module_of(slot))

    def _kept_encoding(self, slot: str, arrays: dict[str, NDArray[Any]]) -> Encoded:
        scales = arrays[slot + ".scales"]
        group = self._options.group_size if scales.ndim == 2 else 0
        return Encoded(self._mode(slot), arrays[slot + ".codes"], scales, group)

    def _round(self, slot: str, weights: Float32) -> Encoded:
        info = self._checkpoint.info(self._architecture.tensor_names[slot])
        where = f"[calibrate] '{info.file}': tensor '{info.name}'"
        return encode(weights, self._mode(slot), self._mapped.options, dtype=info.dtype, where=where)

    def _quantize(self, slot: str, weights: Float32, moments: Float64, lacking: Float64 | None) -> EncodedLinear:
        with damped(moments, self._options.damping):
            factor = None if lacking is None else moment_factor(moments)
        target = fit_target(weights, factor, lacking, self._options.threads)
        del factor  # as large as the moments
        rounded = self._round(slot, weights)
        match self._mode(slot):
            case "ternary" | "two_plane" as mode:
                planes: Planes = 2 if mode == "two_plane" else 1
                found = quantize_linear(weights, moments, lacking, replace(self._options, planes=planes))
                made = replace(rounded, codes=found.trits, scales=found.scales)
            case "f16":
                made = rounded
            case _:
                made = self._round(slot, np.ascontiguousarray(target, np.float32))
        errors = [energy_of(target - encoded.values(), moments) for encoded in (rounded, made)]
        energy = energy_of(target, moments) or 1.0
        dead = int(np.count_nonzero(np.diag(moments) == 0))
        return EncodedLinear(made, errors[0] / energy, errors[1] / energy, dead)

    def _replace(self, slot: str, linear: EncodedLinear) -> Float32:
        self.quantized.replace_linear(slot, linear.encoded.packed())
        return linear.encoded.values()

    def _store(self, linear: EncodedLinear) -> tuple[NDArray[Any], Float32]:
        return linear.encoded.codes, linear.encoded.scales

    def _restore(self, slot: str, arrays: dict[str, NDArray[Any]]) -> None:
        self.quantized.replace_linear(slot, self._kept_encoding(slot, arrays).packed())
