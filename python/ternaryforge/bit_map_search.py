# SPDX-License-Identifier: Apache-2.0
"""Which mode for which layer: the best bit map under a ceiling of perplexity, of bytes, or of both.

    result = search("model", "text.txt", max_size_mb=0.2, output="map.json")
    convert("model", "out", bit_map="map.json", scale="group")

Every layer is measured alone in every mode, the best sum under the budget is found exactly, and the
maps that look best are measured as a whole, rounded or calibrated: docs/guide/bit-maps.md.
"""

import hashlib
import heapq
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ternaryforge import _core
from ternaryforge.bit_map import MODES, BitMap, Mode, parse_bit_map, read_bit_map, sandwich
from ternaryforge.budget import find_frontier
from ternaryforge.calibration_text import read_text
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.evaluation import cut_documents
from ternaryforge.families import read_architecture
from ternaryforge.map_calibrating import DEFAULT_TOKENS, CalibratedMaps, CalibrationSource
from ternaryforge.map_measuring import Choice, LiveModel, MapSpace, MeasuredMaps
from ternaryforge.mapped_checkpoint import MappedCheckpoint
from ternaryforge.model import Activations
from ternaryforge.quantization import ScaleKind
from ternaryforge.rounding import RoundingOptions, check_options
from ternaryforge.search_report import MEGABYTE, By, MapScore, MeasuredMap, SearchResult, UnitEffect
from ternaryforge.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]

_MOST_EXHAUSTIVE = 256  # maps that are all measured instead of searched
_ROUNDS = 6
_PAIRS = 12  # of changes that are measured in a round
_TIGHTER = 3  # times that a loss which turned out too high is asked to be lower


@dataclass(frozen=True, slots=True)
class Limits:
    """What a map must keep: nats a token, bytes."""

    nll: float | None
    size: int | None

    def keeps(self, nll: float, size: int) -> bool:
        """Whether both are kept."""
        return (self.nll is None or nll <= self.nll) and (self.size is None or size <= self.size)

    def rank(self, nll: float, size: int) -> tuple[float, float]:
        """Less is better: bytes under a ceiling of perplexity, else loss."""
        return (nll, size) if self.nll is None else (size, nll)


def search(
    source: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    max_perplexity: float | None = None,
    max_size_mb: float | None = None,
    output: str | os.PathLike[str] | None = None,
    by: By = "layer",
    modes: Sequence[Mode] = MODES,
    embedding: Mode = "f16",
    lm_head: Mode | None = None,
    scale: ScaleKind = "group",
    group_size: int = 128,
    tokens: int | None = 16_384,
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Finds the map of least size within `max_perplexity`, or of least perplexity within `max_size_mb`.

    Args:
        source: Folder of a dense checkpoint with a tokenizer.
        data: UTF-8 text to measure on (protocol documents), other than what results are reported on.
        max_perplexity: Ceiling; the smallest map that keeps it (and `max_size_mb`) is found.
        max_size_mb: Ceiling of model.safetensors in millions of bytes.
        output: JSON file for the map. What was measured is kept beside it (NAME.measured.json): the
            same call goes on after Ctrl-C, and a search under other limits starts from it.
        by: `layer`: one mode for all linear layers of a layer; `linear`: each has its own.
        modes: Those to choose from.
        embedding: The mode of the embedding, which is pinned.
        lm_head: The mode of the head; default: as the embedding where tied, else f16.
        scale: What shares a scale under ternary and binary: `tensor`, `row` or `group`.
        group_size: Columns of a group, a multiple of 64.
        tokens: Documents are taken from the start until so many tokens are scored; None: all.
        calibration: UTF-8 text: maps are measured as `calibrate` makes them of it, under `row` and `group`.
            Apart from `data`, or the same text: then what is never drawn of it is measured on.
        calibration_tokens: How many are drawn for that.
        seed: Of the draw.
        threads: Default: the physical cores at hand.
        progress: Called with measurements done, those expected, and what is measured.

    Raises ValueError for wrong options, and for limits that nothing keeps, saying what can be
    reached; FormatError and OSError for a source that cannot be searched.
    """
    _check_limits(max_perplexity, max_size_mb)
    job = _Job(
        source, data, _ends(embedding, lm_head), modes=modes, by=by, scale=scale, group_size=group_size, tokens=tokens,
        threads=threads, output=output, progress=progress,
        calibration=_calibration(calibration, calibration_tokens, seed),
    )  # fmt: skip
    limits = Limits(
        None if max_perplexity is None else math.log(max_perplexity),
        None if max_size_mb is None else math.floor(max_size_mb * MEGABYTE),
    )
    choice = job.find(limits)
    bit_map = job.space.bit_map(choice)
    result = SearchResult(
        source=str(source),
        data=str(data),
        layer_bit_map=bit_map.to_dict(),
        perplexity=math.exp(job.nll(choice)),
        size_bytes=job.space.size(choice),
        max_perplexity=max_perplexity,
        max_size_mb=max_size_mb,
        by=by,
        scale=scale,
        group_size=group_size if scale == "group" else None,
        tokens=job.tokens,
        exhaustive=job.exhaustive,
        resumed=job.memory.resumed,
        effects=tuple(job.effects()),
        measured=tuple(
            MeasuredMap(job.space.size(found), math.exp(nll), tuple(job.space.bit_map(found).to_dict()["layer_modes"]))
            for found, nll in job.memory.all().items()
        ),
        calibration=None if calibration is None else str(calibration),
        calibration_tokens=None if calibration is None else calibration_tokens,
        seed=None if calibration is None else seed,
    )
    if output is not None:
        bit_map.save(
            output,
            perplexity=result.perplexity,
            size_bytes=result.size_bytes,
            scale=scale,
            group_size=result.group_size,
            calibration_tokens=result.calibration_tokens,
        )
    return result


def score(
    source: str | os.PathLike[str],
    data: str | os.PathLike[str],
    bit_map: BitMap | Mapping[str, Any] | str | os.PathLike[str],
    *,
    max_perplexity: float | None = None,
    max_size_mb: float | None = None,
    scale: ScaleKind = "group",
    group_size: int = 128,
    tokens: int | None = 16_384,
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    threads: int | None = None,
) -> MapScore:
    """Measures one map as `search` does; raises as it does."""
    given = read_bit_map(bit_map)
    job = _Job(
        source, data, given, modes=MODES, by="linear", scale=scale, group_size=group_size, tokens=tokens,
        threads=threads, output=None, progress=None,
        calibration=_calibration(calibration, calibration_tokens, seed),
    )  # fmt: skip
    job.space.mapped.check(given)
    choice = job.space.choice(given)
    if choice is None:
        raise ValueError(f"[search] the map must have modes of {', '.join(MODES)}, got {given.to_dict()}")
    perplexity, size = math.exp(job.nll(choice)), job.space.size(choice)
    kept = perplexity <= (max_perplexity or math.inf) and size <= (max_size_mb or math.inf) * MEGABYTE
    calibrated_on = None if calibration is None else str(calibration)
    return MapScore(given.to_dict(), perplexity, size, job.tokens, kept, calibrated_on)


def _calibration(data: str | os.PathLike[str] | None, tokens: int, seed: int) -> CalibrationSource | None:
    return None if data is None else CalibrationSource(data, tokens, seed)


def _ends(embedding: Mode, head: Mode | None) -> BitMap:
    return parse_bit_map({"embedding": embedding, "layer_modes": ["f16"], "lm_head": head}, where="search")


def _check_limits(max_perplexity: float | None, max_size_mb: float | None) -> None:
    if max_perplexity is None and max_size_mb is None:
        raise ValueError("[search] one of max_perplexity and max_size_mb must be given, got neither")
    if max_perplexity is not None and not 1 <= max_perplexity < math.inf:
        raise ValueError(f"[search] max_perplexity is a number of at least 1, got {max_perplexity}")
    if max_size_mb is not None and not 0 < max_size_mb < math.inf:
        raise ValueError(f"[search] max_size_mb is a positive number, got {max_size_mb}")


class _Job:
    """One search: the maps, the model that is measured, and what is known so far."""

    def __init__(
        self,
        source: str | os.PathLike[str],
        data: str | os.PathLike[str],
        ends: BitMap,
        *,
        modes: Sequence[Mode],
        by: By,
        scale: ScaleKind,
        group_size: int,
        tokens: int | None,
        threads: int | None,
        output: str | os.PathLike[str] | None,
        progress: Progress | None,
        calibration: CalibrationSource | None,
    ) -> None:
        threads = threads or _core.parallel.default_threads()
        check_options("ls", scale, group_size, threads)
        if by not in ("layer", "linear"):
            raise ValueError(f"[search] by is 'layer' or 'linear', got {by!r}")
        if len(modes) < 2 or len(set(modes)) < len(modes) or not set(modes) <= set(MODES):
            raise ValueError(f"[search] modes are at least two of {', '.join(MODES)}, got {', '.join(modes)}")
        if tokens is not None and tokens < 1:
            raise ValueError(f"[search] tokens is at least 1, got {tokens}")
        if calibration is not None:
            calibration.check("search", scale)
        checkpoint = Checkpoint.open(source)
        where = str(Path(source) / "config.json")
        architecture = read_architecture(checkpoint.config, where=where)
        options = RoundingOptions("ls", scale, group_size, threads)
        mapped = MappedCheckpoint(checkpoint, architecture, options)
        ends = replace(sandwich(len(architecture.spec.layers)), embedding=ends.embedding, head=ends.head)
        mapped.check(ends)
        tokenizer = Tokenizer.from_folder(Path(source))
        if tokenizer is None:
            raise ValueError(f"[search] '{source}' must hold a tokenizer, got none: put its files there")
        self.space = MapSpace(mapped, [mode for mode in MODES if mode in modes], ends, by_linear=by == "linear")
        self.exhaustive = len(self.space.modes) ** len(self.space.units) <= _MOST_EXHAUSTIVE
        text, maps = read_text(data), None
        if calibration is not None:
            maps = CalibratedMaps(Path(source), calibration, ends, self.space, threads=threads)
            text = maps.text_apart(text)
        windows = cut_documents(tokenizer, text, min(2048, architecture.spec.context_length), tokens=tokens)
        self.tokens = sum(len(window.ids) - window.first for window in windows)
        # As `convert`, or `calibrate`, writes the folder.
        activations: Activations = "float" if maps else "int8" if architecture.family == "bitnet" else "int16"
        live = maps or LiveModel(self.space, ends, activations=activations, threads=threads)
        self._measure: Callable[[Choice], float] = lambda choice: live.nll(choice, windows)
        self._progress = progress
        self._done = self._expected = 0
        key: dict[str, Any] = {
            "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files],
            "config": checkpoint.config,
            "text": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": tokens,
            "maps": [self.space.modes, by, ends.embedding, ends.head, scale, group_size, activations],
        }
        if calibration is not None and maps is not None:
            key["calibration"] = [maps.drawn.sha256, calibration.tokens, calibration.seed]
        self.memory = MeasuredMaps(None if output is None else measured_file(output), key)

    def nll(self, choice: Choice, what: str = "") -> float:
        """Of a map as a whole."""
        value = self.memory.get(choice, self._measure)
        self._done += 1
        if self._progress is not None:
            self._progress(min(self._done, self._expected), self._expected, what)
        return value

    @property
    def _first(self) -> Choice:
        return (0,) * len(self.space.units)

    def effects(self) -> Iterator[UnitEffect]:
        """Every unit alone in every mode."""
        base = self.nll(self._first)
        for i, unit in enumerate(self.space.units):
            for k, mode in enumerate(self.space.modes):
                rise = self.nll(_changed(self._first, i, k), unit.name) - base
                yield UnitEffect(unit.name, mode, rise, self.space.costs[i][k])

    def find(self, limits: Limits) -> Choice:
        """The best map that was measured and keeps the limits. Raises ValueError where none does."""
        space = self.space
        smallest = tuple(min(range(len(space.modes)), key=costs.__getitem__) for costs in space.costs)
        if limits.size is not None and space.size(smallest) > limits.size:
            raise ValueError(
                f"[search] no map has at most {limits.size:,} bytes: the smallest, {_words(space.bit_map(smallest))}, "
                f"takes {space.size(smallest):,} bytes ({space.fixed_bytes:,} of them beside the layers): allow "
                f"{math.ceil(space.size(smallest) / 1000) / 1000:.3f} MB, or lower the modes of embedding and head"
            )
        if self.exhaustive:
            self._expected = len(space.modes) ** len(space.units)
            for choice in itertools.product(range(len(space.modes)), repeat=len(space.units)):
                if limits.nll is not None or limits.size is None or space.size(choice) <= limits.size:
                    self.nll(choice, "all maps")
            return self._best(limits)
        units = len(space.units) * (len(space.modes) - 1)
        self._expected = units * (1 + _ROUNDS // 2)
        self._start(limits)
        for _ in range(_ROUNDS):
            before = self._best(limits)
            self._improve(before, limits)
            if self._best(limits) == before:
                break
        return self._best(limits)

    def _local(self, around: Choice) -> list[list[tuple[int, float]]]:
        """Bytes of every unit in every mode, and what it adds to the loss of a map; all measured."""
        base = self.nll(around)
        return [
            [(cost, self.nll(_changed(around, i, k), self.space.units[i].name) - base) for k, cost in enumerate(costs)]
            for i, costs in enumerate(self.space.costs)
        ]

    def _start(self, limits: Limits) -> None:
        """Measures the maps on the frontier of the first sensitivities that may be the best."""
        space = self.space
        frontier = find_frontier(self._local(self._first))
        room = None if limits.size is None else limits.size - space.fixed_bytes
        if limits.nll is None:
            if room is not None and (found := frontier.least_loss(room)) is not None:
                self.nll(found, "best sum")
            return
        fitting = len(frontier.sizes) if room is None else int((frontier.sizes <= room).sum())
        low, high = 0, max(fitting - 1, 0)  # loss falls with size, nearly: halve, then look around
        while low < high:
            middle = (low + high) // 2
            if self.nll(frontier.choice(middle), "best sum") <= limits.nll:
                high = middle
            else:
                low = middle + 1
        for index in range(max(low - 2, 0), min(low + 3, max(fitting, 1))):
            self.nll(frontier.choice(index), "best sum")

    def _improve(self, around: Choice, limits: Limits) -> None:
        """Measures every change of one unit, the best sum of such changes, and the pairs that look best."""
        local = self._local(around)
        for choice in self._pairs(around, local, limits):
            self.nll(choice, "pairs")
        frontier = find_frontier(local)
        room = math.inf if limits.size is None else limits.size - self.space.fixed_bytes
        if limits.nll is None:
            found = frontier.least_loss(int(room))
            if found is not None:
                self.nll(found, "best sum")
            return
        allowed = limits.nll - self.nll(around)
        for _ in range(_TIGHTER):
            found = frontier.least_bytes(allowed)
            if found is None:
                return
            excess = self.nll(found, "best sum") - limits.nll
            if excess <= 0:
                return
            allowed -= excess

    def _pairs(self, around: Choice, local: list[list[tuple[int, float]]], limits: Limits) -> list[Choice]:
        """The changes of two units that keep the limits by their sums, best first."""
        base, size, found = self.nll(around), self.space.size(around), []
        for (u, first), (v, second) in itertools.combinations(enumerate(local), 2):
            for k, m in itertools.product(range(len(first)), range(len(second))):
                if k == around[u] or m == around[v]:
                    continue
                nll = base + first[k][1] + second[m][1]
                bytes_now = size + first[k][0] - first[around[u]][0] + second[m][0] - second[around[v]][0]
                if limits.keeps(nll, bytes_now):
                    found.append((limits.rank(nll, bytes_now), _changed(_changed(around, u, k), v, m)))
        return [choice for _, choice in heapq.nsmallest(_PAIRS, found)]

    def _best(self, limits: Limits) -> Choice:
        known = {choice: (nll, self.space.size(choice)) for choice, nll in self.memory.all().items()}
        kept = [choice for choice, (nll, size) in known.items() if limits.keeps(nll, size)]
        if kept:
            return min(kept, key=lambda choice: (limits.rank(*known[choice]), choice))
        within = [choice for choice, (_, size) in known.items() if Limits(None, limits.size).keeps(0.0, size)]
        best = min(within or known, key=lambda choice: known[choice])
        text = (
            f"[search] no map that was measured keeps perplexity {math.exp(limits.nll or 0.0):.6g}"
            + ("" if limits.size is None else f" within {limits.size:,} bytes")
            + f": the best reaches {math.exp(known[best][0]):.6g} with {known[best][1]:,} bytes "
            f"({_words(self.space.bit_map(best))})"
        )
        reaching = [choice for choice, (nll, _) in known.items() if Limits(limits.nll, None).keeps(nll, 0)]
        if reaching:
            size = min(known[choice][1] for choice in reaching)
            text += f"; the perplexity was kept with {size:,} bytes"
        raise ValueError(text + ": allow more")


def measured_file(output: str | os.PathLike[str]) -> Path:
    """Where `search` keeps what it measured for a map file."""
    path = Path(output)
    return path.with_name(path.stem + ".measured.json")


def _changed(choice: Choice, unit: int, mode: int) -> Choice:
    return (*choice[:unit], mode, *choice[unit + 1 :])


def _words(bit_map: BitMap) -> str:
    """A map in a few words."""
    modes = [mode for entry in bit_map.layers for mode in ([entry] if isinstance(entry, str) else entry.values())]
    counts = ", ".join(f"{modes.count(mode)} x {mode}" for mode in MODES if mode in modes)
    return f"embedding {bit_map.embedding}, layers {counts}"
