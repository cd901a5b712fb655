# SPDX-License-Identifier: Apache-2.0
"""What converting and running a model will need, said before anything runs.

    report = plan("path/to/llama", method="ls")     # convert it, then run the result
    report = plan(shape="llama3-8b")                # no checkpoint needed

Only headers are read: config.json and the heads of the safetensors files. Sizes follow from them;
times come from small matrices run on this machine, and are good to a factor of `time_factor`.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.checkpoint import FLOAT_DTYPES, Checkpoint
from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
from ternaryforge.conversion import ROUNDED
from ternaryforge.expected_loss import ExpectedLoss, expected_loss
from ternaryforge.families import Architecture, read_architecture
from ternaryforge.families.base import Part
from ternaryforge.footprint import SCORED_TOKENS, Footprint, Memory, conversion_memory
from ternaryforge.machine_rates import RunRates, measure_rounding_rate, measure_run_rates
from ternaryforge.memory import available_bytes
from ternaryforge.model import Activations, HeadMode, KvType, Layout, default_activations
from ternaryforge.quantization import Quantization, ScaleKind
from ternaryforge.report import Report
from ternaryforge.rounding import SCHEMES, RoundingOptions, Scheme, check_options, rounded_shapes
from ternaryforge.shapes import read_shape, stored_tensors
from ternaryforge.sources import find_source
from ternaryforge.weights import check_tensor_names, is_two_plane, packed_shape

METHODS = ("none", *SCHEMES)
"""Methods that exist: run it as it is, or plain rounding by a scheme of `convert`."""

TIME_FACTOR = 3.0
_EVALUATED_TOKENS = 10_000
_EVALUATION_WINDOW = 2048
_CHECKED_BYTES_PER_SECOND = 1e9  # of loading and copying from the page cache; a cold disk is slower
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One command. `parts` says what the anonymous memory is for; `verb` is the command's name."""

    verb: str
    seconds: float
    peak_anonymous_bytes: int
    peak_mapped_bytes: int
    peak_rss_bytes: int
    parts: dict[str, int]
    note: str


@dataclass(frozen=True)
class PlanReport(Report):
    """What to expect of a model on this machine.

    `method` is None where the weights stay as they are. `file_bytes` is the size of the weights that
    will be run, `source_bytes` of those there are. `seconds` adds up all stages, the peaks are the highest of them;
    mapped bytes are pages of files, which the system may drop when memory is short.
    """

    source: str
    architecture: str
    method: str | None
    scale: str | None
    group_size: int | None
    activations: str
    layout: str
    threads: int
    parameters: int
    ternary_params: int
    source_bytes: int
    file_bytes: int
    seconds: float
    time_factor: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    peak_mapped_bytes: int
    kv: str
    kv_bytes_per_token: int
    head: str
    head_bytes: int
    tokens_per_second: float
    prompt_tokens_per_second: float
    expected_loss: ExpectedLoss
    warnings: tuple[str, ...]
    stages: tuple[PlannedStage, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """A model of which only the headers are known. `folder` is None for a shape."""

    name: str
    where: str
    architecture: Architecture
    tensors: Mapping[str, TensorPlan]
    file_bytes: int
    kept_bytes: int
    folder: Path | None
    has_tokenizer: bool


def plan(
    source: str | os.PathLike[str] | None = None,
    *,
    shape: str | None = None,
    method: str | None = None,
    scale: ScaleKind = "tensor",
    group_size: int = 128,
    activations: Activations | None = None,
    kv: KvType = "f32",
    head: HeadMode = "exact",
    threads: int | None = None,
    prompt_tokens: int | None = None,
    max_new_tokens: int = 128,
    layout: Layout = "auto",
) -> PlanReport:
    """Foretells time, memory, size and loss of converting and running a model. Reads no weights.

    Args:
        source: A folder, `org/name[@revision]` in the cache of the hub (nothing is downloaded), or "demo".
        shape: Instead of a source, a name of `shapes.SHAPES`.
        method: `none` runs the weights as they are, a scheme of `convert` (`ls`, `absmean`, `absmax`, `twn`) rounds
            them first. Default: `ls` for dense weights, `none` for others.
        scale: As in `convert`, with a method.
        group_size: As in `convert`, with `scale="group"`.
        activations: As in `TernaryModel.from_pretrained`.
        kv: Likewise.
        head: Likewise; `head_bytes` of the report is what a token reads of it.
        threads: Default: the physical cores at hand.
        prompt_tokens: Length of the prompt that `generate` is planned for; default 128, or half of a short context.
        max_new_tokens: Tokens that it shall generate.
        layout: As in `TernaryModel.from_pretrained`; `auto` is measured, and may come out otherwise in a later run
            where both layouts are about as fast.

    Raises FormatError for a source that is malformed, unsupported or cannot be converted like that, ValueError for
    wrong options, OSError where there is nothing.
    """
    threads = _core.parallel.default_threads() if threads is None else threads
    check_options(method if method in SCHEMES else "ls", scale, group_size, threads)
    if method is not None and method not in METHODS:
        raise ValueError(
            f"[plan] method is one of {', '.join(METHODS)}, got {method!r}; methods with calibration or training "
            "are not offered yet"
        )
    if activations not in (None, "int8", "int16", "float"):
        raise ValueError(f"[plan] activations must be 'int8', 'int16' or 'float', got {activations!r}")
    if kv not in get_args(KvType) or head not in get_args(HeadMode):
        raise ValueError(
            f"[plan] kv is one of {', '.join(get_args(KvType))} and head one of {', '.join(get_args(HeadMode))}, "
            f"got {kv!r} and {head!r}"
        )
    if layout not in ("auto", "t16", "t20"):
        raise ValueError(f"[plan] layout must be 'auto', 't16' or 't20', got {layout!r}")
    if (source is None) == (shape is None):
        raise ValueError("[plan] name either a source or a shape")
    given = _read_folder(source) if source is not None else _make_shape(str(shape), dense=method in SCHEMES)
    context = given.architecture.spec.context_length
    prompt_tokens = min(128, max(1, context // 2)) if prompt_tokens is None else prompt_tokens
    if prompt_tokens < 1 or max_new_tokens < 1:
        raise ValueError(
            f"[plan] prompt_tokens and max_new_tokens must be positive, got {prompt_tokens} and {max_new_tokens}"
        )
    if prompt_tokens >= context:
        raise ValueError(f"[plan] the prompt must be shorter than the context of {context}, got {prompt_tokens} tokens")
    scheme = _check_method(given, method)
    stages, result = [], given
    if scheme is not None:
        options = RoundingOptions(scheme, scale, group_size, threads)
        result = _converted(given, options)
        stages.append(_plan_conversion(given, options, result.file_bytes))
    mode = activations or default_activations(result.architecture.quantization)
    rates = measure_run_rates(threads, mode)
    footprint = Footprint(
        result.architecture,
        result.tensors,
        file_bytes=result.file_bytes,
        kept_bytes=result.kept_bytes,
        has_tokenizer=result.has_tokenizer,
        activations=mode,
        threads=threads,
        kv=kv,
        head=head,
        layout=layout,
    )
    total = min(prompt_tokens + max_new_tokens, context)
    loading = footprint.packed_bytes / rates.repack_bytes + footprint.file_bytes / _CHECKED_BYTES_PER_SECOND
    token = _token_seconds(footprint, rates, total)
    prompt = _prompt_seconds(footprint, rates)
    head_seconds = footprint.vocab_size * result.architecture.spec.hidden_size / rates.dense_prefill
    stages += [
        _stage(
            "generate",
            loading + prompt_tokens * prompt + max_new_tokens * token,
            footprint.run(threads, tokens=total, logit_rows=1),
            f"loads, reads {prompt_tokens} tokens, writes {max_new_tokens}",
        ),
        _stage(
            "evaluate",
            loading + _EVALUATED_TOKENS * (prompt + head_seconds),
            footprint.run(threads, tokens=min(_EVALUATION_WINDOW, context), logit_rows=SCORED_TOKENS),
            f"loads, scores {_EVALUATED_TOKENS:,} tokens",
        ),
    ]
    peak = max(stages, key=lambda stage: stage.peak_rss_bytes)
    loss = expected_loss(None if _is_trained(given.architecture) else scheme)
    slots = result.architecture.spec.slots()
    return PlanReport(
        source=given.name,
        architecture=given.architecture.architecture,
        method=scheme,
        scale=scale if scheme is not None else None,
        group_size=group_size if scheme is not None and scale == "group" else None,
        activations=mode,
        layout=footprint.layout,
        threads=threads,
        parameters=sum(rows * cols for rows, cols in slots.values()),
        ternary_params=footprint.packed_weights,
        source_bytes=given.file_bytes,
        file_bytes=result.file_bytes,
        seconds=sum(stage.seconds for stage in stages),
        time_factor=TIME_FACTOR,
        peak_rss_bytes=peak.peak_rss_bytes,
        peak_anonymous_bytes=max(stage.peak_anonymous_bytes for stage in stages),
        peak_mapped_bytes=max(stage.peak_mapped_bytes for stage in stages),
        kv=kv,
        kv_bytes_per_token=footprint.kv_bytes_per_token,
        head=head,
        head_bytes=footprint.head_bytes,
        tokens_per_second=1 / token,
        prompt_tokens_per_second=1 / prompt,
        expected_loss=loss,
        warnings=tuple(_warnings(given, result, peak, scheme)),
        stages=tuple(stages),
    )


def _read_folder(source: str | os.PathLike[str]) -> _Source:
    path = find_source(source, download=False)
    checkpoint = Checkpoint.open(path)
    if not checkpoint.config:
        raise FormatError(f"[plan] '{path}' has no config.json; name the folder of a checkpoint")
    architecture = read_architecture(checkpoint.config, where=str(path / "config.json"))
    # A second copy of a tied head would be compared, which reads weights.
    if not (architecture.tied_head and "lm_head.weight" in checkpoint):
        check_tensor_names(checkpoint, architecture)
    infos = {name: checkpoint.info(name) for name in checkpoint}
    tensors = {name: TensorPlan(name, info.dtype, info.shape) for name, info in infos.items()}
    _check_shapes(architecture, tensors, str(path))
    kept = {info.file for info in infos.values() if info.dtype in FLOAT_DTYPES and len(info.shape) == 2}
    return _Source(
        name=os.fspath(source),
        where=str(path),
        architecture=architecture,
        tensors=tensors,
        file_bytes=sum(file.stat().st_size for file in checkpoint.files),
        kept_bytes=sum(file.stat().st_size for file in kept),
        folder=path,
        has_tokenizer=any((path / name).is_file() for name in _TOKENIZER_FILES),
    )


def _check_shapes(architecture: Architecture, tensors: Mapping[str, TensorPlan], where: str) -> None:
    """Raises FormatError for a tensor that is missing or does not fit the configuration; loading checks the rest."""
    for slot, (rows, cols) in architecture.spec.slots().items():
        name = architecture.tensor_names[slot]
        if name not in tensors:
            if slot in architecture.optional:
                continue
            raise FormatError(f"[plan] '{where}': tensor '{name}' is missing; the checkpoint is incomplete")
        tensor = tensors[name]
        vector = rows == 1 and len(tensor.shape) == 1
        total = architecture.parts.get(slot, Part(0, cols if vector else rows)).total
        expected: tuple[int, ...] = (total,) if vector else (total, cols)
        mode = architecture.mode(slot)
        if mode == "binary":
            expected = (total, -(-cols // 8))
        elif tensor.dtype == "U8":
            expected = packed_shape(total, cols, 2 if is_two_plane(tensor.dtype, tensor.shape) else 1)
        if tensor.dtype == "U32" and architecture.quantization is not None:
            expected = (total, cols * architecture.quantization.code_bits // 32)
        if tensor.dtype not in (*FLOAT_DTYPES, "U8", "U32") and (mode, tensor.dtype) != ("int8", "I8"):
            raise FormatError(f"[plan] '{where}': tensor '{name}' has dtype {tensor.dtype}, which cannot be used")
        if tensor.shape != expected:
            raise FormatError(
                f"[plan] '{where}': tensor '{name}' has shape {list(tensor.shape)}, expected {list(expected)}"
            )


def _make_shape(name: str, *, dense: bool) -> _Source:
    """The stock packed checkpoint of a shape, or the bfloat16 one that it would be converted from."""
    architecture = read_shape(name)
    if dense:
        architecture = replace(architecture, quantization=None)
    tensors = {tensor.name: tensor for _, _, tensor in stored_tensors(architecture)}
    return _Source(
        name=name,
        where=name,
        architecture=architecture,
        tensors=tensors,
        file_bytes=_file_bytes(tensors),
        kept_bytes=_file_bytes(tensors),
        folder=None,
        has_tokenizer=False,
    )


def _file_bytes(tensors: Mapping[str, TensorPlan]) -> int:
    return CheckpointWriter("plan", list(tensors.values())).file_bytes


def _check_method(given: _Source, method: str | None) -> Scheme | None:
    """The scheme of `convert` to plan for, None where nothing is converted."""
    quantization = given.architecture.quantization
    if method is None:
        method = "none" if _is_trained(given.architecture) else "ls"
    if method == "none":
        return None
    if quantization is not None and not quantization.online:
        raise ValueError(
            f"[plan] the weights of '{given.name}' are quantised already and would only be copied, got "
            f"method {method!r}; use 'none'"
        )
    return cast("Scheme", method)


def _is_trained(architecture: Architecture) -> bool:
    """Whether the weights were made to be ternary."""
    return architecture.quantization is not None or bool(architecture.rules)


def _converted(given: _Source, options: RoundingOptions) -> _Source:
    """What `convert` will make of it."""
    options.check_latents(given.architecture, given.where)
    shapes = rounded_shapes(given.architecture, options, given.where)
    tensors = {tensor.name: tensor for tensor in options.rounded_tensors(given.tensors.values(), shapes)}
    trained = given.architecture.family == "bitnet" or given.architecture.quantization is not None
    rules = given.architecture.rules
    stock = options.scale == "tensor" and not rules
    quantization = Quantization(
        method="bitnet" if stock else "ternaryforge",
        scale=options.scale,
        group_size=options.group_size if options.scale == "group" else 0,
        convention="divide" if stock else "multiply",
        online=False,
        activation_bits=8 if stock or trained else 16,
        excluded=() if rules else ("lm_head",),
        strict=stock,
    )
    kept_rules = {slot: rule for slot, rule in rules.items() if given.architecture.tensor_names[slot] not in shapes}
    architecture = replace(given.architecture, quantization=quantization, rules=kept_rules)
    size = _file_bytes(tensors)  # one file, which also holds the embedding
    return replace(given, architecture=architecture, tensors=tensors, file_bytes=size, kept_bytes=size)


def _plan_conversion(given: _Source, options: RoundingOptions, file_bytes: int) -> PlannedStage:
    shapes = rounded_shapes(given.architecture, options, given.where)
    weights = sum(rows * cols for rows, cols in shapes.values())
    seconds = weights / measure_rounding_rate(options) + (given.file_bytes + file_bytes) / _CHECKED_BYTES_PER_SECOND
    float32 = all(given.tensors[name].dtype == "F32" for name in shapes)
    memory = conversion_memory(shapes.values(), float32=float32, file_bytes=given.file_bytes)
    return _stage("convert", seconds, memory, f"rounds {weights:,} weights by '{options.scheme}'")


def _stage(verb: str, seconds: float, memory: Memory, note: str) -> PlannedStage:
    anonymous = memory.anonymous_bytes
    return PlannedStage(verb, seconds, anonymous, memory.mapped_bytes, memory.resident_bytes, dict(memory.parts), note)


def _token_seconds(footprint: Footprint, rates: RunRates, tokens: int) -> float:
    """Reads every weight once, and the keys and values of all tokens."""
    dense = footprint.read_dense_bytes + tokens * footprint.kv_bytes_per_token
    return footprint.packed_bytes / rates.packed_bytes + dense / rates.dense_bytes


def _prompt_seconds(footprint: Footprint, rates: RunRates) -> float:
    """Of one token among many; the head runs for the last one only."""
    return footprint.packed_weights / rates.packed_prefill + footprint.dense_linear_weights / rates.dense_prefill


def _warnings(given: _Source, result: _Source, peak: PlannedStage, method: str | None) -> list[str]:
    found = []
    if method is not None and not _is_trained(given.architecture):
        found.append(ROUNDED)
    if given.folder is not None and not given.has_tokenizer:
        found.append("the folder has no tokenizer: only token ids can be generated from")
    available = available_bytes()
    if available is not None and peak.peak_anonymous_bytes > available:
        found.append(
            f"'{peak.verb}' needs {peak.peak_anonymous_bytes:,} bytes of memory and {available:,} are available: "
            "it will swap or be killed"
        )
    elif available is not None and peak.peak_rss_bytes > available:
        found.append(
            f"'{peak.verb}' would touch {peak.peak_rss_bytes:,} bytes and {available:,} are available: pages of "
            "the file will be read from disk again"
        )
    free = shutil.disk_usage(Path.cwd()).free
    if method is not None and result.file_bytes > free:
        found.append(f"the result takes {result.file_bytes:,} bytes and {free:,} are free in this folder")
    return found
