# SPDX-License-Identifier: Apache-2.0
"""Post-training quantisation that minds what the layers see: a dense checkpoint folder becomes a ternary one.

    report = calibrate("llama", "llama-ternary", "text.txt", scale="group", group_size=64)

docs/guide/quantization.md says what the methods do and what each is worth.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ternaryforge import _core
from ternaryforge.bit_map import BitMap, read_bit_map
from ternaryforge.calibration_blocks import DEFAULT_TARGETS, Targets
from ternaryforge.calibration_keeping import KeptLayers
from ternaryforge.calibration_linear import DAMPING, DESCENT_ROUNDS, METHODS, LinearOptions, Method, Planes
from ternaryforge.calibration_run import CalibratedLayer, CalibrationRun
from ternaryforge.calibration_text import check_apart, read_text
from ternaryforge.calibration_tuning import check_packages
from ternaryforge.mapped_calibration import MappedCalibration
from ternaryforge.memory import PeakAnonymous
from ternaryforge.quantization import ScaleKind
from ternaryforge.report import Report
from ternaryforge.rounding import check_options

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class CalibrationReport(Report):
    """What `calibrate` did.

    The perplexities (protocol documents, on what `measured_on` says) are those of the source, of
    rounding it by least squares, and of the result. `resumed_layers` were done by an earlier run.
    `perplexity_untuned` is that before `tune_tokens` tokens of tuning, None without. With a `bit_map`,
    the counts are over all linear layers, whatever their mode, and `perplexity_before` is of rounding by it.
    """

    source: str
    out: str
    method: str
    scale: str
    group_size: int | None
    planes: int
    activations: str
    seed: int
    calibration_tokens: int
    calibration_sha256: str
    measured_on: str
    perplexity_source: float
    perplexity_before: float
    perplexity_after: float
    perplexity_untuned: float | None
    tune_tokens: int
    tensors: int
    ternary_params: int
    bits_per_weight: float
    file_bytes: int
    peak_anonymous_bytes: int | None
    seconds: float
    resumed_layers: int
    warnings: tuple[str, ...]
    layers: tuple[CalibratedLayer, ...]
    bit_map: dict[str, Any] | None = None


def calibrate(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    method: Method = "best",
    scale: ScaleKind = "group",
    group_size: int = 128,
    planes: Planes = 1,
    bit_map: BitMap | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    tokens: int = 32_768,
    evaluation: str | os.PathLike[str] | None = None,
    propagation: float = DEFAULT_TARGETS.propagation,
    residual: float = DEFAULT_TARGETS.residual,
    descent_rounds: int = DESCENT_ROUNDS,
    tune_tokens: int = 0,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Quantises the dense checkpoint folder `source` into the ternary checkpoint folder `out`.

    Args:
        source: Folder of a supported family with floating-point weights and a tokenizer.
        out: A folder that does not exist yet, or is empty. Nothing appears there before all is done.
        data: UTF-8 text to calibrate on; documents end with <|endoftext|>, or else with a blank line.
        method: `grid` the best of 0.5 to 3.0 times the mean magnitude for the activations; `fit` the
            exact least squares for them; `gptq` columns that make up for the errors of those before;
            `best` also makes up for the errors of earlier layers, and lowers the error by descent.
        scale: `tensor` writes a stock folder that plain transformers loads (with int8 activations);
            `row` or `group` a folder for this library.
        group_size: Columns that share a scale under `group`: a multiple of 64.
        planes: 1 for trits; 2 for two tied planes of them, nine levels in 4 bits, under `row` and `group`.
        bit_map: The mode of every layer, embedding and head, as for `convert`; under `row` and `group`.
        tokens: How many are drawn from `data`; an eighth of its documents is never drawn.
        evaluation: Text to measure the result on; None takes the documents that are never drawn.
        propagation: Under `best`, the share of the error of its input that a layer makes up for: 0 to 1.
        residual: Under `best`, the share of the error in the residual stream that the layers which
            add to it take away: 0 to 1.
        descent_rounds: Under `best`, how often all scales, then all trits, are chosen again.
        tune_tokens: Then train scales and norms, trits fixed, on so many tokens of `data` to give what the
            source gives; 0 does not. Needs PyTorch and transformers.
        seed: Of the draws.
        threads: Default: the physical cores at hand.
        progress: Called with the linear layers done, their number, and the name of the last; then with the
            tokens of tuning.

    The layers that are done lie in a hidden folder beside `out`; after Ctrl-C, the same call goes on
    behind them. Raises ImportError where tuning lacks its packages; ValueError for wrong options, too
    little text, an evaluation text that is or shares documents with `data`, activations that are not
    finite; FormatError for a source that is malformed, not supported or ternary already;
    FileExistsError and other OSError.
    """
    started = time.perf_counter()
    threads = _core.parallel.default_threads() if threads is None else threads
    _check(method, scale, planes, tokens)
    check_options("ls", scale, group_size, threads)
    targets = Targets(propagation, residual) if method == "best" else Targets(0.0, 0.0)
    targets.check()
    if descent_rounds < 0:
        raise ValueError(f"[calibrate] descent_rounds is not negative, got {descent_rounds}")
    if tune_tokens < 0:
        raise ValueError(f"[calibrate] tune_tokens is not negative, got {tune_tokens}")
    if bit_map is not None and (scale == "tensor" or tune_tokens or planes == 2):
        raise ValueError(
            "[calibrate] a bit map, which may say two_plane itself, goes with scale='row' or 'group', without planes "
            f"and tune_tokens, got scale={scale!r}, planes={planes}, tune_tokens={tune_tokens}"
        )
    if tune_tokens:
        check_packages()
    source, out = Path(source), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"[calibrate] '{out}': there is something already; remove it or name another folder")
    with PeakAnonymous() as memory:
        options = LinearOptions(method, scale, group_size, DAMPING, descent_rounds, threads, planes)
        if bit_map is None:
            run = CalibrationRun(source, options, targets)
        else:
            run = MappedCalibration(source, options, targets, read_bit_map(bit_map))
        text = read_text(data)
        measured = None if evaluation is None else read_text(evaluation)
        if measured is not None:
            check_apart(text, measured)
        drawn = run.draw(text, tokens, seed)
        kept = KeptLayers(out, run.key(drawn, tokens, seed) | ({"tune_tokens": tune_tokens} if tune_tokens else {}))
        before = run.measure(measured or drawn.held_out)
        resumed = run.quantize(drawn, kept, progress)
        after, untuned = run.perplexity(run.quantized, measured or drawn.held_out), None
        if tune_tokens:
            run.tune(text, kept, tune_tokens, seed, progress)
            after, untuned = run.perplexity(run.quantized, measured or drawn.held_out), after
        file_bytes = run.write(out, kept)
        kept.discard()
    weights = sum(layer.rows * layer.cols for layer in run.layers)
    dead = sum(layer.dead_channels > 0 for layer in run.layers)
    return CalibrationReport(
        source=str(source),
        out=str(out),
        method=method,
        scale=scale,
        group_size=group_size if scale == "group" else None,
        planes=planes,
        activations=run.activations,
        seed=seed,
        calibration_tokens=drawn.tokens,
        calibration_sha256=drawn.sha256,
        measured_on="documents of the calibration text that were not drawn" if evaluation is None else str(evaluation),
        perplexity_source=before[0],
        perplexity_before=before[1],
        perplexity_after=after,
        perplexity_untuned=untuned,
        tune_tokens=tune_tokens,
        tensors=len(run.layers),
        ternary_params=weights,
        bits_per_weight=8 * run.ternary_bytes / weights,
        file_bytes=file_bytes,
        peak_anonymous_bytes=memory.growth,
        seconds=time.perf_counter() - started,
        resumed_layers=resumed,
        warnings=(f"{dead} linear layers have input channels that were 0 for the whole text",) if dead else (),
        layers=tuple(run.layers),
        bit_map=None if bit_map is None else read_bit_map(bit_map).to_dict(),
    )


def _check(method: str, scale: str, planes: int, tokens: int) -> None:
    if method not in METHODS:
        raise ValueError(f"[calibrate] method is one of {', '.join(METHODS)}, got {method!r}")
    if planes not in (1, 2):
        raise ValueError(f"[calibrate] planes is 1 or 2, got {planes}")
    if planes == 2 and scale == "tensor":
        raise ValueError(
            "[calibrate] a stock folder holds one plane of trits, got planes=2: use scale='group' or 'row'"
        )
    if tokens < 1:
        raise ValueError(f"[calibrate] tokens is at least 1, got {tokens}")
