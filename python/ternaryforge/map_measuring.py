# SPDX-License-Identifier: Apache-2.0
"""Bit maps of one model, measured on a text: which maps there are, their sizes, their loss, and a memory of both."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ternaryforge import _core
from ternaryforge.bit_map import BitMap, LayerModes, Mode
from ternaryforge.evaluation import Window, score_windows
from ternaryforge.mapped_checkpoint import MappedCheckpoint
from ternaryforge.model import Activations
from ternaryforge.weights import load_weights, taken_rows

Choice = tuple[int, ...]
"""The mode of every unit, by its place in the list of modes."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What changes its mode as a whole: a layer, or one tensor of it."""

    name: str
    layer: int
    tensors: tuple[str, ...]


class MapSpace:
    """All maps with one of `modes` for every unit, and embedding and head as given."""

    def __init__(self, mapped: MappedCheckpoint, modes: Sequence[Mode], ends: BitMap, *, by_linear: bool) -> None:
        self.mapped = mapped
        self.modes = tuple(modes)
        self._ends = ends
        units: dict[str, list[str]] = {}
        for name, matrix in mapped.matrices.items():
            if matrix.slot not in ("embedding", "head"):
                units.setdefault(matrix.slot if by_linear else matrix.slot.rpartition(".")[0], []).append(name)
        self.units = [Unit(name, int(name.split(".")[1]), tuple(tensors)) for name, tensors in units.items()]
        self.costs = [
            [sum(mapped.matrix_bytes(name, mode) for name in unit.tensors) for mode in self.modes]
            for unit in self.units
        ]
        tables = [name for name, matrix in mapped.matrices.items() if matrix.slot in ("embedding", "head")]
        self.fixed_bytes = mapped.fixed_bytes + sum(
            mapped.matrix_bytes(name, mapped.mode(ends, name)) for name in tables
        )

    def size(self, choice: Choice) -> int:
        """Bytes of the weights file."""
        return self.fixed_bytes + sum(costs[i] for costs, i in zip(self.costs, choice, strict=True))

    def bit_map(self, choice: Choice) -> BitMap:
        """The map; a layer whose linear layers agree is one entry."""
        architecture = self.mapped.architecture
        modes = {name: self.modes[i] for unit, i in zip(self.units, choice, strict=True) for name in unit.tensors}
        layers: list[LayerModes] = []
        for layer in range(len(architecture.spec.layers)):
            own = {
                slot.rpartition(".")[2]: modes[architecture.tensor_names[slot]]
                for slot in architecture.linear_modules()
                if slot.startswith(f"layers.{layer}.")
            }
            layers.append(next(iter(own.values())) if len(set(own.values())) == 1 else own)
        return BitMap(self._ends.embedding, tuple(layers), self._ends.head)

    def choice(self, bit_map: BitMap) -> Choice | None:
        """The choice that gives a map, None where none does."""
        found = []
        for unit in self.units:
            modes = {self.mapped.mode(bit_map, name) for name in unit.tensors}
            if len(modes) > 1 or not modes <= set(self.modes):
                return None
            found.append(self.modes.index(modes.pop()))
        return tuple(found)


class LiveModel:
    """The model with its linear layers exchanged in place; every other weight as the map has it."""

    def __init__(self, space: MapSpace, ends: BitMap, *, activations: Activations, threads: int) -> None:
        mapped = space.mapped
        weights = load_weights(mapped.checkpoint, mapped.architecture)
        for name, matrix in mapped.matrices.items():
            if matrix.slot in ("embedding", "head"):
                weights[matrix.slot] = mapped.encode(name, mapped.mode(ends, name)).packed()
        self._transformer = _core.model.Transformer(
            mapped.architecture.spec, weights, activations=activations, threads=threads
        )
        self._space = space
        self._now: list[int | None] = [None] * len(space.units)
        names = mapped.architecture.tensor_names
        self._slots: dict[str, list[str]] = {}
        for slot in mapped.architecture.linear_modules():
            self._slots.setdefault(names[slot], []).append(slot)

    def nll(self, choice: Choice, windows: Sequence[Window]) -> float:
        """The mean nll of a text with every unit in the mode of the choice."""
        space = self._space
        slots = space.mapped.architecture.spec.slots()
        for i, mode in enumerate(choice):
            if self._now[i] == mode:
                continue
            self._now[i] = None
            for name in space.units[i].tensors:
                encoded = space.mapped.encode(name, space.modes[mode])
                for slot in self._slots[name]:
                    rows = taken_rows(space.mapped.architecture, slot, slots[slot][0])
                    self._transformer.replace_linear(slot, encoded.rows(rows).packed())
            self._now[i] = mode
        return score_windows(self._transformer, windows)


class MeasuredMaps:
    """What was measured, by choice; kept in a file after every measurement, so that a run can go on.

    A file of another model, text or other options is replaced.
    """

    def __init__(self, file: Path | None, key: dict[str, Any]) -> None:
        self._file = file
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._values: dict[str, float] = {}
        self.resumed = 0
        if file is not None and file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError):
                found = {}
            if isinstance(found, dict) and found.get("key") == self._key and isinstance(found.get("nll"), dict):
                self._values = {str(name): float(value) for name, value in found["nll"].items()}
                self.resumed = len(self._values)

    def get(self, choice: Choice, measure: Callable[[Choice], float]) -> float:
        """The nll of a choice, measured where it is not known."""
        name = "".join(map(str, choice))
        if name not in self._values:
            value = measure(choice)
            if not np.isfinite(value):
                raise ValueError(f"[search] the loss of the map {name} is not finite: the weights overflow")
            self._values[name] = value
            self._save()
        return self._values[name]

    def all(self) -> dict[Choice, float]:
        """Everything measured."""
        return {tuple(map(int, name)): value for name, value in self._values.items()}

    def _save(self) -> None:
        if self._file is None:
            return
        partial = self._file.with_name(f".{self._file.name}.partial")
        partial.write_text(json.dumps({"key": self._key, "nll": self._values}, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._file)
