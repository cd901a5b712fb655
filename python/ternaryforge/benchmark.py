# SPDX-License-Identifier: Apache-2.0
"""How fast a model runs, against what the machine can do: decoding and prefill by threads, context and target."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.machine import EnergyMeter, Machine, measure_machine
from ternaryforge.memory import PeakAnonymous
from ternaryforge.report import Report, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ternaryforge.model import Activations, HeadMode, KvType, Layout

Build = Callable[[int], _core.model.Transformer]
Progress = Callable[[int, int, str], None]

_CHECKED_PROMPT, _CHECKED_TOKENS = 24, 16
_PROFILED_TOKENS = 8
_FIRST_TOKENS = 256  # whole blocks of the key-value cache


@dataclass(frozen=True)
class BenchmarkResult:
    """One combination. Rates are medians; `_range` is their 10th and 90th percentile.

    `decode`: one token after the other, chosen greedily, after `context` tokens, of which those behind
    the first 256 repeat their keys and values. `prefill`:
    `prompt_tokens` at once, after as many. `decode_bandwidth_share`: bytes of weights and of keys
    and values that a token reads, times the rate, by the measured bandwidth. `prefill_peak_share`:
    multiply-adds of the layers' matrices times the rate, by the measured dot peak. `_parts` are
    seconds per token of matrix products in layers, head, attention, and the rest.
    """

    threads: int
    context: int
    prompt_tokens: int
    target: str
    layout: str
    decode_tokens_per_second: float
    decode_range: tuple[float, float]
    prefill_tokens_per_second: float
    prefill_range: tuple[float, float]
    weight_bytes_per_token: int
    kv_bytes_per_token: int
    decode_bandwidth_share: float
    prefill_peak_share: float
    decode_parts: dict[str, float]
    prefill_parts: dict[str, float]
    energy_joules_per_token: float | None


@dataclass(frozen=True)
class BenchmarkReport(Report):
    """All combinations of one model on one machine, measured in one run.

    `kv` and `head` are how keys and values and the output head are stored, `head_bytes` what the
    latter reads for a token. `greedy_tokens` came out the same for every thread count (and, with
    int8 activations, target).
    """

    model: str
    activations: str
    kv: str
    head: str
    head_bytes: int
    load_seconds: float
    load_peak_anonymous_bytes: int | None
    weight_bytes: int
    greedy_tokens: list[int]
    results: list[BenchmarkResult]
    machine: Machine

    def plot(self) -> "Figure":
        """Tokens per second of decoding by context, one line per target and thread count."""
        figure = new_figure(6, 4, "tight")
        axes = figure.subplots()
        lines: dict[str, dict[int, float]] = {}
        for result in self.results:
            line = lines.setdefault(f"{result.target}, {result.threads} threads", {})
            line[result.context] = result.decode_tokens_per_second
        for label, line in lines.items():
            axes.plot(list(line), list(line.values()), marker="o", label=label)
        axes.set(title=self.model, xlabel="tokens in context", ylabel="tokens per second", ylim=(0, None))
        axes.legend()
        return figure


@dataclass(frozen=True)
class Plan:
    """What to measure. Raises ValueError for an empty list and for values below their least."""

    threads: Sequence[int]
    contexts: Sequence[int] = (0,)
    prompt_tokens: Sequence[int] = (128,)
    targets: Sequence[str] = ()
    decode_tokens: int = 32
    repeats: int = 3

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("contexts", 0), ("prompt_tokens", 1)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ValueError(f"[bench] {name} are numbers from {least} on, got {list(values)}")
        if self.decode_tokens < 1 or self.repeats < 1:
            raise ValueError(
                f"[bench] decode_tokens and repeats must be positive, got {self.decode_tokens} and {self.repeats}"
            )

    @property
    def longest(self) -> int:
        """The context that a model needs for it."""
        return max(max(self.contexts) + max(self.decode_tokens, *self.prompt_tokens), _CHECKED_PROMPT + _CHECKED_TOKENS)


def benchmark(
    build: Build, plan: Plan, *, model: str, machine: Machine | None = None, progress: Progress | None = None
) -> BenchmarkReport:
    """Measures a model; `build` makes it for a number of threads, and is called for every target.

    Nothing else should run meanwhile. Raises ValueError where the context is too short for the
    plan, RuntimeError where two thread counts (or, with int8 activations, targets) choose different
    tokens.
    """
    active = _core.simd.active_target()
    targets = list(plan.targets) or [active]
    told, machine = machine, machine or measure_machine(threads=plan.threads, targets=targets)
    check = _TokenCheck()
    results: list[BenchmarkResult] = []
    loads: list[tuple[float, int | None]] = []
    total = len(targets) * len(plan.threads) * len(plan.contexts)
    transformer = None
    try:
        for target in targets:
            _core.simd.use_target(target)
            for threads in plan.threads:
                transformer = None  # frees the last model before the next is made
                gc.collect()
                start = time.perf_counter()
                with PeakAnonymous() as memory:
                    transformer = build(threads)
                loads.append((time.perf_counter() - start, memory.growth))
                check(transformer, f"{target}, {threads} threads")
                for result in _measure(transformer, plan, machine, target):
                    results.append(result)
                    if progress is not None:
                        done = -(-len(results) // len(plan.prompt_tokens))
                        progress(done, total, f"{target}, {threads} threads, context {result.context}")
    finally:
        _core.simd.use_target(active)
    if transformer is None:
        raise AssertionError("a plan has at least one thread count")
    if told is None:  # what others did to the machine meanwhile should not pass for its limit
        best = machine.best(measure_machine(threads=plan.threads, targets=targets))
        results = [_against(result, machine, best) for result in results]
        machine = best
    return BenchmarkReport(
        model=model,
        activations=transformer.activations,
        kv=transformer.kv,
        head=transformer.head,
        head_bytes=transformer.head_bytes,
        load_seconds=statistics.median(seconds for seconds, _ in loads),
        load_peak_anonymous_bytes=loads[0][1],
        weight_bytes=transformer.weight_bytes,
        greedy_tokens=check.tokens,
        results=results,
        machine=machine,
    )


class _TokenCheck:
    """Greedy tokens of the first model; raises RuntimeError for a model that differs."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._name = ""

    def __call__(self, transformer: _core.model.Transformer, name: str) -> None:
        prompt = np.arange(_CHECKED_PROMPT, dtype=np.int32) * 7 % transformer.spec.vocab_size
        state = transformer.new_sequence()
        token = _greedy(transformer, prompt, state)
        tokens = [token]
        for _ in range(_CHECKED_TOKENS - 1):
            token = _greedy(transformer, np.array([token], np.int32), state)
            tokens.append(token)
        if not self.tokens:
            self.tokens, self._name = tokens, name
        elif tokens != self.tokens:
            raise RuntimeError(f"[bench] {name} chose the tokens {tokens}, {self._name} chose {self.tokens}")


def _greedy(transformer: _core.model.Transformer, ids: NDArray[np.int32], state: _core.model.SequenceState) -> int:
    return transformer.likeliest_tokens([(ids, state)])[0]


def _measure(
    transformer: _core.model.Transformer, plan: Plan, machine: Machine, target: str
) -> Iterator[BenchmarkResult]:
    """Every context, shortest first, each with every prompt size."""
    spec, threads = transformer.spec, transformer.threads
    if plan.longest > spec.context_length:
        raise ValueError(
            f"[bench] contexts and prompts need {plan.longest} tokens, the model holds {spec.context_length}; "
            "ask for shorter ones"
        )
    multiplies = sum(
        rows * cols for slot, (rows, cols) in spec.slots().items() if slot.startswith("layers.") and rows > 1
    )
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, plan.longest).astype(np.int32)
    state = transformer.new_sequence()
    meter = EnergyMeter()
    for context in sorted(plan.contexts):
        _reach(transformer, state, context, ids)
        _decode(transformer, state, context, ids, 4)  # warms up
        meter.start()
        steps = _decode(transformer, state, context, ids, plan.decode_tokens)
        energy = meter.stop()
        decode_parts = _parts(transformer, partial(_decode, transformer, state, context, ids, _PROFILED_TOKENS))
        rate, spread = _rates(steps)
        kv_bytes = transformer.kv_bytes_per_token * (context + plan.decode_tokens // 2)
        for size in plan.prompt_tokens:
            run = partial(_prefill, transformer, state, context, ids[:size])
            seconds = [run() for _ in range(plan.repeats + 1)][1:]  # the first warms up
            prefill_rate, prefill_spread = _rates([second / size for second in seconds])
            yield BenchmarkResult(
                threads=threads,
                context=context,
                prompt_tokens=size,
                target=target,
                layout=transformer.layout,
                decode_tokens_per_second=rate,
                decode_range=spread,
                prefill_tokens_per_second=prefill_rate,
                prefill_range=prefill_spread,
                weight_bytes_per_token=transformer.token_bytes,
                kv_bytes_per_token=kv_bytes,
                decode_bandwidth_share=(transformer.token_bytes + kv_bytes) * rate / machine.read_bandwidth[threads],
                prefill_peak_share=multiplies * prefill_rate / machine.dot_peak[target][threads],
                decode_parts={name: value / _PROFILED_TOKENS for name, value in decode_parts.items()},
                prefill_parts={name: value / size for name, value in _parts(transformer, run).items()},
                energy_joules_per_token=None if energy is None else energy / plan.decode_tokens,
            )


def _against(result: BenchmarkResult, before: Machine, machine: Machine) -> BenchmarkResult:
    """The result with shares of another measurement of the machine."""
    threads, target = result.threads, result.target
    return dataclasses.replace(
        result,
        decode_bandwidth_share=result.decode_bandwidth_share
        * (before.read_bandwidth[threads] / machine.read_bandwidth[threads]),
        prefill_peak_share=result.prefill_peak_share
        * (before.dot_peak[target][threads] / machine.dot_peak[target][threads]),
    )


def _reach(
    transformer: _core.model.Transformer, state: _core.model.SequenceState, context: int, ids: NDArray[np.int32]
) -> None:
    """Extends to `context` tokens; those behind the first ones repeat their keys and values, since time is the same."""
    first = min(context, _FIRST_TOKENS)
    if first > state.length:
        transformer.forward([(ids[state.length : first], state)], logits="none")
    if context > state.length:
        state.truncate(first)
        state.repeat(context)


def _decode(
    transformer: _core.model.Transformer,
    state: _core.model.SequenceState,
    context: int,
    ids: NDArray[np.int32],
    count: int,
) -> list[float]:
    """Seconds of each of `count` tokens after the first `context` ones, which stay."""
    seconds = []
    token = int(ids[context])
    for _ in range(count):
        start = time.perf_counter()
        token = _greedy(transformer, np.array([token], np.int32), state)
        seconds.append(time.perf_counter() - start)
    state.truncate(context)
    return seconds


def _prefill(
    transformer: _core.model.Transformer, state: _core.model.SequenceState, context: int, ids: NDArray[np.int32]
) -> float:
    start = time.perf_counter()
    transformer.forward([(ids, state)], logits="last")
    taken = time.perf_counter() - start
    state.truncate(context)
    return taken


def _parts(transformer: _core.model.Transformer, run: Callable[[], Any]) -> dict[str, float]:
    """Seconds by part of one run."""
    transformer.time_parts(on=True)
    try:
        run()
        return transformer.part_seconds()
    finally:
        transformer.time_parts(on=False)


def _rates(seconds: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median, and 10th and 90th percentile, of one over a time."""
    slow, middle, fast = 1 / np.quantile(np.asarray(seconds), [0.9, 0.5, 0.1])
    return float(middle), (float(slow), float(fast))


def build_model(
    source: str, *, activations: "Activations | None" = None, kv: "KvType" = "f32", head: "HeadMode" = "exact"
) -> Build:
    """Builds the model of a folder or file, for `benchmark`."""
    from ternaryforge.model import TernaryModel

    def build(threads: int) -> _core.model.Transformer:
        model = TernaryModel.from_pretrained(source, threads=threads, activations=activations, kv=kv, head=head)
        return model.transformer

    return build


def build_shape(
    name: str,
    *,
    context_length: int,
    activations: "Activations | None" = None,
    kv: "KvType" = "f32",
    head: "HeadMode" = "exact",
    layout: "Layout" = "auto",
) -> Build:
    """Builds a shape with random weights in memory, with room for at least `context_length` tokens.

    Layout "auto" holds the weights as t16, and once more where t20 is faster; "t20" only as that,
    which the largest shapes need. Raises ValueError for an unknown name.
    """
    from ternaryforge.families import read_architecture
    from ternaryforge.model import default_activations
    from ternaryforge.shapes import random_weights, shape_config

    config = shape_config(name)
    config["max_position_embeddings"] = max(config["max_position_embeddings"], context_length)
    architecture = read_architecture(config, where=name)
    weights = random_weights(architecture, layout="t20" if layout == "t20" else "t16")

    def build(threads: int) -> _core.model.Transformer:
        return _core.model.Transformer(
            architecture.spec,
            weights,
            activations=activations or default_activations(architecture.quantization),
            kv=kv,
            head=head,
            layout=layout,
            threads=threads,
        )

    return build
