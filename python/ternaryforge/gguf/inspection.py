# SPDX-License-Identifier: Apache-2.0
"""What is in a GGUF file, who made it, and which engines would run it, without reading the weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.gguf.producer import describe_producer, judge_engines
from ternaryforge.gguf.reading import INT8_TYPES, TERNARY_TYPES, GgufSource
from ternaryforge.gguf.vocabulary import build_tokenizer, read_vocabulary


@dataclass(frozen=True, slots=True)
class GgufDescription:
    """The parts of an `Inspection` that a GGUF file gives. `engines`: name -> what it does, and why."""

    arch: str | None
    producer: str
    context_length: int | None
    tensors: dict[str, dict[str, int]]
    quantization: dict[str, Any] | None
    tokenizer: dict[str, Any] | None
    file_bytes: int
    warnings: list[str]
    engines: dict[str, str]


def describe_gguf(path: Path) -> GgufDescription:
    """Reads the header. Raises FormatError for one that cannot be read; what cannot be used becomes a warning."""
    file = _core.io.GgufFile(path)
    where = str(path)
    warnings: list[str] = []
    arch = file.metadata.get("general.architecture")
    arch = arch if isinstance(arch, str) else None
    context = file.metadata.get(f"{arch}.context_length")
    producer = describe_producer(file)
    warnings += producer.clues if producer.name == "unknown" else ()
    tokenizer = None
    try:
        tokenizer = _describe_tokenizer(file, where, warnings)
        if tokenizer is None:
            warnings.append("There is no tokenizer: only token ids can be generated from.")
    except FormatError as error:
        warnings.append(str(error))
    ours = "runs"
    try:
        GgufSource.open(path)
    except FormatError as error:
        ours = f"refuses: {error}"
        if str(error) not in warnings:
            warnings.append(str(error))
    warnings += _traps(file)
    return GgufDescription(
        arch=arch,
        producer=producer.name,
        context_length=context if type(context) is int else None,
        tensors=_tensors_by_type(file),
        quantization=_describe_quantization(file),
        tokenizer=tokenizer,
        file_bytes=sum(part.stat().st_size for part in file.paths),
        warnings=warnings,
        engines={"ternaryforge": ours}
        | {
            engine.name: engine.verdict + (f": {engine.reason}" if engine.reason else "")
            for engine in judge_engines(file)
        },
    )


def _tensors_by_type(file: _core.io.GgufFile) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        entry = table.setdefault(tensor.type_name, {"count": 0, "elements": 0, "bytes": 0})
        entry["count"] += 1
        entry["elements"] += math.prod(tensor.shape)
        entry["bytes"] += len(tensor.data)
    return dict(sorted(table.items()))


def _describe_quantization(file: _core.io.GgufFile) -> dict[str, Any] | None:
    types = sorted({tensor.type_name for tensor in file.tensors.values()} & set(TERNARY_TYPES))
    if not types:
        return None
    scales = sum(name.endswith(".scale") for name in file.tensors)
    return {"ternary_types": types, "scale_tensors": scales}


def _describe_tokenizer(file: _core.io.GgufFile, where: str, warnings: list[str]) -> dict[str, Any] | None:
    vocabulary = read_vocabulary(file.metadata, where=where)
    if vocabulary is None:
        return None
    warnings += vocabulary.warnings
    tokenizer = build_tokenizer(vocabulary, where=where)
    return {
        "kind": tokenizer.kind,
        "pre": vocabulary.pre,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_ids": list(tokenizer.eos_ids),
        "chat_templates": sorted(vocabulary.templates),
    }


def _traps(file: _core.io.GgufFile) -> list[str]:
    """What no header tells and what users lose days with."""
    found = []
    types = {tensor.type_name for tensor in file.tensors.values()}
    if "I2_S" in types:
        found.append(
            "Nothing in the file says how its I2_S tensors interleave. The order of x86 builds and official files is "
            "taken; if the text is garbage, the file was made by an ARM build of bitnet.cpp: import it "
            "with i2s_layout 64."
        )
    if types & {"TL1", "TL2"}:
        found.append(
            "TL1 and TL2 are cut for one machine's kernels, and the sizes are not in the file: use the model's own "
            "checkpoint or its I2_S file."
        )
    if types & set(INT8_TYPES) and file.metadata.get("general.file_type") == 40:
        found.append("general.file_type 40 means I2_S here, and Q1_0 in llama.cpp.")
    heads = file.metadata.get("tokenizer.ggml.eos_token_id")
    if "tokenizer.ggml.model" in file.metadata and heads is None:
        found.append("tokenizer.ggml.eos_token_id is missing: engines fall back to a number of their own.")
    return found
