# SPDX-License-Identifier: Apache-2.0
"""Bit maps: in which mode each matrix of a model is stored.

    bit_map = read_bit_map("map.json")                        # {"layer_bit_map": {...}}, or what lies in it
    bit_map.mode("layers.0.down", "model.layers.0.mlp.down_proj")

docs/guide/bit-maps.md describes the form.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ternaryforge._core import FormatError

Mode = Literal["f16", "int8", "two_plane", "ternary", "binary"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""From many bits to few."""
_SPELLINGS: dict[str, Mode] = {**{mode: mode for mode in MODES}, "8bit": "int8", "eightbit": "int8"}
_DEFAULT: Mode = "ternary"  # of the linear layers that the entry of a layer does not name
_FIELDS = ("embedding", "layer_modes", "lm_head")

LayerModes = Mode | Mapping[str, Mode]


@dataclass(frozen=True, slots=True)
class BitMap:
    """Modes of the embedding, of every layer (one for all its linear layers, or by name), and of the head.

    A name is that of a slot (query, key, value, output, gate, up, down) or the last part of the
    module's (q_proj). Linear layers that an entry does not name are ternary. `head` None: as the
    embedding where the head is tied to it, else f16. `where` is the origin, for errors.
    """

    embedding: Mode
    layers: tuple[LayerModes, ...]
    head: Mode | None = None
    where: str = "bit_map"

    def mode(self, slot: str, module: str) -> Mode:
        """The mode of a matrix by its slot, e.g. layers.0.down, and its module."""
        if slot == "embedding":
            return self.embedding
        if slot == "head":
            return self.head or "f16"
        _, layer, name = slot.split(".")
        entry = self.layers[int(layer)]
        if isinstance(entry, str):
            return entry
        return entry.get(name) or entry.get(module.rpartition(".")[2]) or _DEFAULT

    def check(self, modules: Mapping[str, str], layers: int, *, tied_head: bool) -> None:
        """Raises FormatError where the map does not fit a model.

        `modules` maps the slots of its linear layers to their modules; slots that share a module lie
        in one tensor.
        """
        if len(self.layers) != layers:
            raise self.refusal(
                f"layer_modes must have one entry for each of the {layers} layers, got {len(self.layers)}"
            )
        if tied_head and self.head not in (None, self.embedding):
            raise self.refusal(
                f"lm_head must be as embedding ({self.embedding}), which is the same tensor in this model, got "
                f"{self.head}"
            )
        for i, entry in enumerate(self.layers):
            own = {slot: module for slot, module in modules.items() if slot.startswith(f"layers.{i}.")}
            self._check_layer(i, entry, own)

    def refusal(self, text: str) -> FormatError:
        """An error that names the map."""
        return FormatError(f"[bit-map] '{self.where}': {text}")

    def to_dict(self) -> dict[str, Any]:
        """As in a file: {"embedding": M, "layer_modes": [...], "lm_head": M}."""
        entries = [entry if isinstance(entry, str) else dict(entry) for entry in self.layers]
        found: dict[str, Any] = {"embedding": self.embedding, "layer_modes": entries}
        return found if self.head is None else found | {"lm_head": self.head}

    def save(self, path: str | os.PathLike[str], **facts: Any) -> None:
        """Writes {"layer_bit_map": ...} and other facts beside it as JSON; all or nothing."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps({"layer_bit_map": self.to_dict(), **facts}, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)

    def _check_layer(self, i: int, entry: LayerModes, modules: Mapping[str, str]) -> None:
        if not isinstance(entry, str):
            names = {name for slot, module in modules.items() for name in _names(slot, module)}
            for name in entry:
                if name not in names:
                    raise self.refusal(
                        f"layer_modes[{i}] names '{name}', which is no linear layer there; "
                        f"they are {', '.join(sorted(names))}"
                    )
            for slot, module in modules.items():
                found = {entry[name] for name in _names(slot, module) if name in entry}
                if len(found) > 1:
                    raise self.refusal(f"layer_modes[{i}] names {module} twice, with modes {', '.join(sorted(found))}")
        for slot, module in modules.items():
            shared = {self.mode(other, own) for other, own in modules.items() if own == module}
            if len(shared) > 1:
                raise self.refusal(
                    f"layer_modes[{i}] gives {slot} another mode than what shares the tensor {module}: "
                    f"{', '.join(sorted(shared))}"
                )


def sandwich(layers: int, mode: Mode = "ternary", *, ends: Mode = "f16") -> BitMap:
    """The Sandwich Rule: embedding and head in high precision, all layers in one mode."""
    return BitMap(ends, (mode,) * layers, ends)


def read_bit_map(source: BitMap | Mapping[str, Any] | str | os.PathLike[str]) -> BitMap:
    """A map from a JSON file or from its content. Raises FormatError that names file, field and value."""
    if isinstance(source, BitMap):
        return source
    if isinstance(source, Mapping):
        return parse_bit_map(source, where="bit_map")
    where = os.fspath(source)
    try:
        value = json.loads(Path(where).read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"[bit-map] '{where}' holds no valid JSON: {error}") from None
    except FormatError as error:
        raise FormatError(f"[bit-map] '{where}': {error}") from None
    return parse_bit_map(value, where=where)


def parse_bit_map(value: object, *, where: str) -> BitMap:
    """A map from what JSON holds: the object, or one with the object as its `layer_bit_map`."""
    if isinstance(value, Mapping) and "layer_bit_map" in value:
        value = value["layer_bit_map"]
    name = f"[bit-map] '{where}':"
    if not isinstance(value, Mapping):
        raise FormatError(f"{name} a bit map is an object with {', '.join(_FIELDS)}, got {value!r}")
    if unknown := sorted(set(value) - set(_FIELDS)):
        raise FormatError(f"{name} '{unknown[0]}' is no field of a bit map; they are {', '.join(_FIELDS)}")
    entries = value.get("layer_modes")
    if not isinstance(entries, list | tuple) or not entries:
        raise FormatError(f"{name} layer_modes must be a list with an entry for each layer, got {entries!r}")
    embedding, head = value.get("embedding"), value.get("lm_head")
    return BitMap(
        embedding="f16" if embedding is None else _mode(embedding, f"{name} embedding"),
        layers=tuple(_layer(entry, f"{name} layer_modes[{i}]") for i, entry in enumerate(entries)),
        head=None if head is None else _mode(head, f"{name} lm_head"),
        where=where,
    )


def _layer(entry: object, name: str) -> LayerModes:
    if isinstance(entry, str):
        return _mode(entry, name)
    if not isinstance(entry, Mapping):
        raise FormatError(f"{name} must be a mode, or an object with modes by name, got {entry!r}")
    return {str(key): _mode(value, f"{name}['{key}']") for key, value in entry.items()}


def _mode(value: object, name: str) -> Mode:
    if not isinstance(value, str) or value.lower() not in _SPELLINGS:
        raise FormatError(f"{name} must be one of {', '.join(MODES)}, got {value!r}")
    return _SPELLINGS[value.lower()]


def _names(slot: str, module: str) -> Iterator[str]:
    yield slot.rpartition(".")[2]
    if module.rpartition(".")[2] != slot.rpartition(".")[2]:
        yield module.rpartition(".")[2]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise FormatError(f"the name '{min(twice)}' occurs twice")
    return dict(pairs)
