# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint: family, tensors, quantisation, tokenizer, and what is wrong with it."""

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.families import Architecture, read_architecture
from ternaryforge.gguf.inspection import describe_gguf
from ternaryforge.gguf.reading import is_gguf
from ternaryforge.onebit import MAGIC, read_onebit
from ternaryforge.report import Report
from ternaryforge.sources import find_source
from ternaryforge.tokenizer import Tokenizer
from ternaryforge.weights import check_tensor_names, is_two_plane


@dataclass(frozen=True)
class Inspection(Report):
    """What a file or a folder holds.

    `tensors` maps each dtype to count, elements and bytes. `head_bytes` is what each form of a
    floating-point output head reads for a token, by the name that `from_pretrained(head=...)` knows it
    by; None where the configuration or the head says otherwise. `quantization` is None for dense weights
    (`two_plane_tensors` in it counts the layers that hold two planes of trits),
    `tokenizer` None where there is none. `warnings` says in whole sentences why the checkpoint
    cannot be used, or only in part. `engines` says of a GGUF or `.1bit` file what each engine does with it.
    """

    path: str
    format: str
    arch: str | None
    producer: str | None
    context_length: int | None
    tensors: dict[str, dict[str, int]]
    quantization: dict[str, Any] | None
    tokenizer: dict[str, Any] | None
    file_bytes: int
    warnings: list[str]
    head_bytes: dict[str, int] | None = None
    engines: dict[str, str] = field(default_factory=dict)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Looks at a checkpoint folder, a safetensors, GGUF or `.1bit` file, or "demo" without running it.

    Raises FormatError for one that cannot be read at all; what can be read but not used becomes a
    warning.
    """
    path = find_source(path)
    if is_gguf(path):
        return Inspection(path=str(path), format="gguf", **asdict(describe_gguf(path)))
    if _is_onebit(path):
        return _inspect_onebit(path)
    checkpoint = Checkpoint.open(path)
    path = checkpoint.path
    config = checkpoint.config
    warnings: list[str] = []
    context_length = quantization = head_bytes = None
    architectures = config.get("architectures") or [config.get("model_type")]
    if config:
        try:
            architecture = read_architecture(config, where=str(path / "config.json"))
            context_length = architecture.spec.context_length
            architectures = [architecture.architecture]
            if architecture.quantization is not None:
                quantization = asdict(architecture.quantization)
                if count := sum(is_two_plane(info.dtype, info.shape) for info in map(checkpoint.info, checkpoint)):
                    quantization["two_plane_tensors"] = count
            head_bytes = _head_bytes(checkpoint, architecture)
            check_tensor_names(checkpoint, architecture)
        except FormatError as error:
            warnings.append(str(error))
    else:
        warnings.append("There is no config.json, so that the weights alone cannot be run.")
    tokenizer = None
    if path.is_dir():
        try:
            tokenizer = _describe_tokenizer(path)
            if tokenizer is None:
                warnings.append("There is no tokenizer: only token ids can be generated from.")
        except FormatError as error:
            warnings.append(str(error))
    version = config.get("transformers_version")
    return Inspection(
        path=str(path),
        format="safetensors",
        arch=str(architectures[0]) if architectures[0] else None,
        producer=f"transformers {version}" if version else None,
        context_length=context_length,
        tensors=_tensors_by_dtype(checkpoint),
        head_bytes=head_bytes,
        quantization=quantization,
        tokenizer=tokenizer,
        file_bytes=sum(file.stat().st_size for file in checkpoint.files),
        warnings=warnings,
    )


def _is_onebit(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".1bit" or file.read(len(MAGIC)) == MAGIC


def _inspect_onebit(path: Path) -> Inspection:
    """A file that can be read is whole: its checksum is part of it."""
    file = read_onebit(path)
    table: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        entry = table.setdefault(tensor.mode, {"count": 0, "elements": 0, "bytes": 0})
        entry["count"] += 1
        entry["elements"] += tensor.rows * tensor.cols
        entry["bytes"] += tensor.nbytes
    warnings = [] if file.tokenizer is not None else ["There is no tokenizer: only token ids can be generated from."]
    return Inspection(
        path=str(path),
        format="1bit",
        arch=".1bit",
        producer="ternaryforge",
        context_length=file.architecture.spec.context_length,
        tensors=dict(sorted(table.items())),
        quantization={"activations": file.activations},
        tokenizer=None if file.tokenizer is None else _describe(file.tokenizer),
        file_bytes=path.stat().st_size,
        warnings=warnings,
        engines={
            "ternaryforge": "runs",
            "onebit (cpp/embedded)": "runs",
            "llama.cpp": "refuses: It is no GGUF file; export the model with profile 'upstream'.",
        },
    )


def _tensors_by_dtype(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for name in checkpoint:
        info = checkpoint.info(name)
        entry = table.setdefault(info.dtype, {"count": 0, "elements": 0, "bytes": 0})
        entry["count"] += 1
        entry["elements"] += math.prod(info.shape)
        entry["bytes"] += info.nbytes
    return dict(sorted(table.items()))


def _head_bytes(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, int] | None:
    """By the names of `from_pretrained(head=...)`."""
    name = architecture.tensor_names["embedding" if architecture.tied_head else "head"]
    if name not in checkpoint or checkpoint.info(name).dtype not in ("F32", "F16", "BF16"):
        return None
    spec = architecture.spec
    sizes = {"exact": checkpoint.info(name).nbytes}
    for bits in (8, 6, 4):
        sizes[f"int{bits}"] = _core.kernels.quantized_head_bytes(spec.vocab_size, spec.hidden_size, bits)
    return sizes


def _describe_tokenizer(folder: Path) -> dict[str, Any] | None:
    tokenizer = Tokenizer.from_folder(folder)
    return None if tokenizer is None else _describe(tokenizer)


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_ids": list(tokenizer.eos_ids),
    }
