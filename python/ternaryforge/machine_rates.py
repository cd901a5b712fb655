# SPDX-License-Identifier: Apache-2.0
"""How fast this machine does the steps of converting and running, measured on small random matrices."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ternaryforge import _core
from ternaryforge.model import Activations
from ternaryforge.rounding import RoundingOptions, relative_error
from ternaryforge.shapes import random_codes

_DECODE_SHAPE = (16384, 8192)  # 32 MB packed: more than most caches
_DENSE_SHAPE = (8192, 2048)  # 32 MB as bfloat16
_PREFILL_SHAPE = (1024, 2048)
_PREFILL_TOKENS = 128
_ROUNDING_SHAPE = (512, 2048)
_RUNS = 3


@dataclass(frozen=True, slots=True)
class RunRates:
    """Of running: bytes of weights per second for one token, weights times tokens per second for a prompt."""

    packed_bytes: float
    dense_bytes: float
    packed_prefill: float
    dense_prefill: float
    repack_bytes: float


def measure_run_rates(threads: int, activations: Activations) -> RunRates:
    """Takes about a second."""
    generator = np.random.SFC64(0)

    def packed(layout: str, shape: tuple[int, int]) -> _core.formats.PackedTensor:
        codes = random_codes(generator, shape[0] * shape[1] // 4)
        return _core.formats.PackedTensor(layout, *shape, codes, scale_kind="tensor", scales=np.ones(1, np.float32))

    def dense(shape: tuple[int, int]) -> _core.formats.PackedTensor:
        return _core.formats.PackedTensor("bf16", *shape, np.full(shape, 0x3C80, np.uint16))

    def seconds(tensor: _core.formats.PackedTensor, tokens: int) -> float:
        x = np.ones((tokens, tensor.cols), np.float32)
        return _least(lambda: _core.kernels.linear(x, tensor, activations=activations, threads=threads))

    large, stored = packed("t16", _DECODE_SHAPE), packed("hf_packed", _PREFILL_SHAPE)
    table = dense(_DENSE_SHAPE)
    prompt = _PREFILL_TOKENS * _PREFILL_SHAPE[0] * _PREFILL_SHAPE[1]
    return RunRates(
        packed_bytes=large.data.nbytes / seconds(large, 1),
        dense_bytes=table.data.nbytes / seconds(table, 1),
        packed_prefill=prompt / seconds(packed("t16", _PREFILL_SHAPE), _PREFILL_TOKENS),
        dense_prefill=prompt / seconds(dense(_PREFILL_SHAPE), _PREFILL_TOKENS),
        repack_bytes=stored.data.nbytes / _least(lambda: _core.kernels.repack(stored, "t16", threads=threads)),
    )


def measure_rounding_rate(options: RoundingOptions) -> float:
    """Weights per second that `convert` rounds and measures."""
    weights = np.random.default_rng(0).standard_normal(_ROUNDING_SHAPE, dtype=np.float32)
    group = options.group_size if options.scale == "group" else 64

    def convert_part() -> None:
        _core.quant.find_ternary(weights, group_size=group, threads=options.threads)
        trits, scales = _core.quant.quantize_weights(
            weights, scheme=options.scheme, scale=options.scale, group_size=group, threads=options.threads
        )
        _core.formats.pack(trits, "hf_packed")
        relative_error(weights, trits, scales, options.group_size)

    return weights.size / _least(convert_part)


def _least(call: Callable[[], object]) -> float:
    """The shortest of a few runs: other programs only ever make one longer."""
    best = float("inf")
    for _ in range(_RUNS):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best
