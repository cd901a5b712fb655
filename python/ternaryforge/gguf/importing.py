# SPDX-License-Identifier: Apache-2.0
"""A GGUF file becomes a ternary checkpoint folder: config.json, model.safetensors, tokenizer files.

report = import_gguf("model.gguf", "folder")
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.chat_template import DEFAULT
from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
from ternaryforge.gguf.producer import describe_producer
from ternaryforge.gguf.reading import PLAIN_TYPES, GgufSource, I2sLayout, Ternary, first_part
from ternaryforge.gguf.vocabulary import Vocabulary, build_tokenizer, sentencepiece_model
from ternaryforge.report import Report
from ternaryforge.weights import scale_name

Progress = Callable[[int, int, str], None]

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class ImportReport(Report):
    """What `import_gguf` did. `layout` has the types of the file's ternary tensors, `scale` theirs in the folder.

    `exact`: every weight of the folder equals the file's, bit by bit. `tensors` counts the ternary ones.
    """

    source: str
    out: str
    producer: str
    arch: str
    layout: dict[str, int]
    scale: str | None
    stock: bool
    tensors: int
    ternary_params: int
    exact: bool
    file_bytes: int
    seconds: float
    warnings: tuple[str, ...]


def import_gguf(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type_42: str = "",
    i2s_layout: I2sLayout = "128",
    threads: int | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Imports the GGUF file `file` (or a split one, by any of its parts) as the folder `out`.

    Args:
        file: A file of the architectures llama, qwen2, qwen3, gemma, gemma2, gemma3, bitnet,
            bitnet-b1.58 or bitnet-25, ternary or dense.
        out: A folder that does not exist yet, or is empty. Nothing appears there before all is done.
        type_42: What the type number 42 means ("Q2_0", "PQ2_0") where the file leaves it open.
        i2s_layout: How I2_S tensors interleave: "128" (official files), "64" (written by ARM builds
            of bitnet.cpp since 2026), "rows4". Nothing in a file tells, and a wrong one gives garbage.
        threads: Default: the physical cores at hand.
        progress: Called after each tensor with the weights done, all weights, and the tensor's name.

    Where every layer has one scale the folder is stock, and plain transformers loads it. Tensors that
    are not ternary keep their 16 or 32 bits; of blocks such as Q6_K or Q8_0 the float32 values are kept.

    Raises FormatError for a file that is malformed or not supported, FileExistsError and other OSError.
    """
    started = time.perf_counter()
    source = GgufSource.open(first_part(Path(file)), type_42=type_42, i2s_layout=i2s_layout)
    job = _Import(source, threads or _core.parallel.default_threads())
    file_bytes = job.write(Path(out), progress)
    config = job.quantization_config or {}
    return ImportReport(
        source=str(source.path),
        out=str(out),
        producer=describe_producer(source.file).name,
        arch=source.known.name,
        layout=job.layout,
        scale=job.scale,
        stock=config.get("quant_method", "bitnet") == "bitnet",
        tensors=len(job.kinds),
        ternary_params=job.ternary_params,
        exact=not source.known.unit_norms,  # one is taken off the weights of norms
        file_bytes=file_bytes,
        seconds=time.perf_counter() - started,
        warnings=tuple(job.warnings),
    )


class _Import:
    def __init__(self, source: GgufSource, threads: int) -> None:
        self._source = source
        self._threads = threads
        self.layout: dict[str, int] = {}
        self.kinds: dict[str, tuple[str, int]] = {}
        self.ternary_params = 0
        self.warnings: list[str] = [] if source.vocabulary is None else list(source.vocabulary.warnings)
        # A first pass over the ternary layers: a folder has one kind of scale for all of them.
        for slot in source.architecture.spec.slots():
            if source.architecture.is_linear(slot):
                self._look(slot)
        self.quantization_config = source.quantization_config(self.kinds)
        config = self.quantization_config or {}
        self.scale: str | None = None if not config else str(config.get("scale", "tensor"))
        self._group_size = int(config.get("group_size", 0))

    def _look(self, slot: str) -> None:
        found = self._source.matrix(slot, threads=self._threads)
        tensor = self._source.tensor(slot)
        if found is None:
            return
        if found.trits.shape[0] % 4:
            raise FormatError(
                f"[import] '{tensor.path}': tensor '{tensor.name}' has {found.trits.shape[0]} rows; four rows share a "
                "byte in a checkpoint folder, so this file can only be run as it is"
            )
        self.kinds[slot] = (found.kind, found.group_size)
        self.layout[tensor.type_name] = self.layout.get(tensor.type_name, 0) + 1
        self.ternary_params += found.trits.size

    def write(self, out: Path, progress: Progress | None) -> int:
        """Writes the folder; returns the size of the weights file."""
        architecture = self._source.architecture
        slots = architecture.spec.slots()
        total, done = sum(rows * cols for rows, cols in slots.values()), 0
        plans = [plan for slot in slots for plan in self._plan(slot)]
        with CheckpointWriter(out, plans) as writer:
            for slot, (rows, cols) in slots.items():
                if slot in self.kinds:
                    self._write_ternary(writer, slot)
                else:
                    self._write_dense(writer, slot)
                done += rows * cols
                if progress is not None:
                    progress(done, total, architecture.tensor_names[slot])
            self._write_config(writer)
            if self._source.vocabulary is not None:
                _write_tokenizer(writer, self._source.vocabulary, str(self._source.path))
        return writer.file_bytes

    def _plan(self, slot: str) -> list[TensorPlan]:
        architecture = self._source.architecture
        rows, cols = architecture.spec.slots()[slot]
        name = architecture.tensor_names[slot]
        if slot in self.kinds:
            shapes = {"tensor": (1,), "row": (rows,), "group": (rows, -(-cols // max(1, self._group_size)))}
            return [
                TensorPlan(name, "U8", (rows // 4, cols)),
                TensorPlan(scale_name(name), "F32", shapes[str(self.scale)]),
            ]
        tensor = self._source.tensor(slot)
        dtype = tensor.type_name if tensor.type_name in PLAIN_TYPES and not self._is_offset(slot) else "F32"
        return [TensorPlan(name, dtype, (cols,) if len(tensor.shape) == 1 else (rows, cols))]

    def _is_offset(self, slot: str) -> bool:
        return self._source.known.unit_norms and slot.endswith("norm")

    def _write_ternary(self, writer: CheckpointWriter, slot: str) -> None:
        found = self._source.matrix(slot, threads=self._threads)
        if found is None:
            raise AssertionError(slot)
        rows, cols = found.trits.shape
        name = self._source.architecture.tensor_names[slot]
        writer.write(name, _core.formats.pack(found.trits, "hf_packed").reshape(rows // 4, cols))
        writer.write(scale_name(name), self._spread(found, rows, cols))

    def _spread(self, found: Ternary, rows: int, cols: int) -> Any:
        """The scales of a layer as the kind that all layers of the folder have."""
        scales = found.scales
        if self.scale == "tensor":
            return scales
        if self.scale == "row":
            return np.ascontiguousarray(np.broadcast_to(scales, (rows,)))
        groups = -(-cols // self._group_size)
        if found.kind == "group":
            return np.ascontiguousarray(scales.repeat(found.group_size // self._group_size, axis=1)[:, :groups])
        return np.ascontiguousarray(np.broadcast_to(scales.reshape(-1, 1), (rows, groups)))

    def _write_dense(self, writer: CheckpointWriter, slot: str) -> None:
        (plan,) = self._plan(slot)
        source = self._source
        whole = len(plan.shape) == 1 or source.architecture.is_linear(slot)
        step = plan.shape[0] if whole else max(1, _CHUNK_ELEMENTS // plan.shape[1])
        with writer.writing(plan.name) as part:
            for begin in range(0, plan.shape[0], step):
                rows = None if whole else (begin, min(plan.shape[0], begin + step))
                part(_encode(source.floats(slot, rows, threads=self._threads), plan.dtype))

    def _write_config(self, writer: CheckpointWriter) -> None:
        config = {key: value for key, value in self._source.config.items() if value is not None}
        if self.quantization_config is not None:
            dense = [
                self._source.architecture.module_of(slot)
                for slot in self._source.architecture.spec.slots()
                if self._source.architecture.is_linear(slot) and slot not in self.kinds
            ]
            excluded = ["lm_head", *dense] if self.quantization_config["quant_method"] == "bitnet" else ["lm_head"]
            config["quantization_config"] = self.quantization_config | {"modules_to_not_convert": excluded}
        ends = self._source.eos_ids
        if len(ends) > 1:
            writer.write_json("generation_config.json", {"eos_token_id": list(ends)})
        writer.write_json("config.json", config)


def _encode(values: Any, dtype: str) -> Any:
    """Float32 values that came from `dtype` in it again, bit by bit."""
    values = np.ascontiguousarray(values)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype])


def _write_tokenizer(writer: CheckpointWriter, vocabulary: Vocabulary, where: str) -> None:
    """tokenizer.json for byte-level BPE, tokenizer.model for SentencePiece; templates beside them."""
    config: dict[str, Any] = {
        **vocabulary.named_tokens,
        "add_bos_token": vocabulary.bos_id is not None,
        "clean_up_tokenization_spaces": False,
    }
    if vocabulary.kind == "llama":
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        writer.write_bytes("tokenizer.model", sentencepiece_model(vocabulary, where=where).to_bytes())
    else:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        backend = build_tokenizer(vocabulary, where=where).backend
        if vocabulary.bos_id is not None:
            from tokenizers import processors

            bos = vocabulary.tokens[vocabulary.bos_id]
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, vocabulary.bos_id)]
            )
        writer.write_text("tokenizer.json", backend.to_str())
    writer.write_text("tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for name, template in vocabulary.templates.items():
        if name == DEFAULT:
            writer.write_text("chat_template.jinja", template)
        else:
            writer.write_text(f"additional_chat_templates/{_file_name(name, where)}.jinja", template)


def _file_name(name: str, where: str) -> str:
    if not name or not all(character.isalnum() or character in "_-" for character in name):
        raise FormatError(f"[import] '{where}': the chat template {name!r:.80} has no name that a file can have")
    return name
