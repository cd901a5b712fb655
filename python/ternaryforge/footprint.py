# SPDX-License-Identifier: Apache-2.0
"""How much memory a model takes, from the shapes and dtypes of its tensors alone.

Anonymous memory belongs to the process; mapped memory is pages of files, which the system can drop
and read again. A mapped page counts as resident once it was touched, and loading touches all of
them, since every tensor is checked.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ternaryforge import _core
from ternaryforge.checkpoint import FLOAT_DTYPES
from ternaryforge.checkpoint_writer import TensorPlan
from ternaryforge.families import Architecture
from ternaryforge.model import Activations, HeadMode, KvType, Layout
from ternaryforge.weights import is_two_plane

# Measured on Linux x86-64 with CPython 3.11 and NumPy 2: the interpreter, the libraries, the command line.
PROCESS_ANONYMOUS = 20_000_000
PROCESS_MAPPED = 17_000_000
TOKENIZER_MAPPED = 6_000_000  # the library `tokenizers`
# A tokenizer, measured with those of Llama 2 and 3, GPT-2, Qwen2 and SmolLM2 (46 to 65 MB; TinyLlama 29): per
# entry of the vocabulary, for the first 32,000 and for the others.
_TOKENIZER_BYTES = (1400, 150)
_TOKENIZER_FIRST = 32_000

WORKSPACE_TOKENS = 128  # go through the layers together: Transformer::kMaxTokens
KV_BLOCK_TOKENS = 32
HEAD_BITS = {"int8": 8, "int6": 6, "int4": 4, "two-stage": 6}
SCORED_TOKENS = 64  # whose logits `evaluate` holds at once
_LATENT_BYTES = 1 + 3 * 4  # of a trit, and of the floats of a part on their way to it
_LATENT_CHUNK = 1 << 22
# `convert` holds one linear layer: float32 weights, trits, packed codes; and parts of it.
_CONVERT_BYTES_PER_WEIGHT = 4 + 1 + 0.25
_CONVERT_CHUNKS = 24_000_000


@dataclass(frozen=True, slots=True)
class Memory:
    """Peaks of a process in bytes; `parts` add up to `anonymous_bytes`.

    `resident_bytes` is less than anonymous and mapped together where they peak at different times.
    """

    parts: Mapping[str, int]
    mapped_bytes: int
    resident_bytes: int

    @property
    def anonymous_bytes(self) -> int:
        """Memory that no file backs."""
        return sum(self.parts.values())


class Footprint:
    """The memory of one model.

    `tensors` are those of the checkpoint by name, `file_bytes` the size of its weights files,
    `kept_bytes` of those that stay mapped because a matrix in them is used as it lies there,
    `has_tokenizer` whether the folder holds a tokenizer that will be loaded, `activations` and
    `threads` what it will run with: this machine's choice of a layout depends on them where `layout`
    is "auto"; `kv` and `head` are those of `TernaryModel.from_pretrained`. `head_bytes` is what the
    head reads for a token.
    """

    def __init__(
        self,
        architecture: Architecture,
        tensors: Mapping[str, TensorPlan],
        *,
        file_bytes: int,
        kept_bytes: int,
        has_tokenizer: bool,
        activations: Activations,
        threads: int,
        kv: KvType = "f32",
        head: HeadMode = "exact",
        layout: Layout = "auto",
    ) -> None:
        self.file_bytes = file_bytes
        self._kept_bytes = kept_bytes
        self._has_tokenizer = has_tokenizer
        packed: dict[str, tuple[int, int]] = {}  # ternary, or two planes, at run time
        self.dense_bytes = 0  # of matrices that stay floating point, and stay mapped
        self.read_dense_bytes = 0  # those of them that every token reads: not the embedding, unless tied
        self.dense_linear_weights = 0
        self._scale_bytes = self._vector_bytes = self._latent_bytes = 0
        quantization = architecture.quantization
        spec = architecture.spec
        slots = spec.slots()
        for slot, (rows, cols) in slots.items():
            tensor = tensors.get(architecture.tensor_names[slot])
            rule = architecture.rules.get(slot)
            latent = rule is not None or (
                quantization is not None and quantization.online and architecture.is_ternary(slot)
            )
            if tensor is None or rows == 1:
                self._vector_bytes += 4 * cols
            elif (rule is not None and rule.kind == "int8") or tensor.dtype == "I8":
                self._add_bytes(architecture, slot, rows * cols)
                self._scale_bytes += 2 * 2 * 4 * rows
                self._latent_bytes = max(self._latent_bytes, 2 * rows * cols * latent)
            elif tensor.dtype in ("U8", "U32") or latent:
                packed[slot] = (rows, cols)
                # As stored and as used, in float32; twice while the core takes the weights over.
                self._scale_bytes += 2 * 2 * 4 * _scale_count(architecture, rows, cols)
                if latent:
                    self._latent_bytes = max(
                        self._latent_bytes, rows * cols + (_LATENT_BYTES - 1) * min(rows * cols, _LATENT_CHUNK)
                    )
            else:
                nbytes = tensor.nbytes * rows // tensor.shape[0]  # others may share the tensor
                self.dense_bytes += nbytes
                if slot not in ("embedding", "position_embedding") or (slot == "embedding" and architecture.tied_head):
                    self.read_dense_bytes += nbytes
                if architecture.is_linear(slot):
                    self.dense_linear_weights += rows * cols
        two_plane = {
            slot
            for slot in packed
            if is_two_plane((tensor := tensors[architecture.tensor_names[slot]]).dtype, tensor.shape)
        }
        self.packed_weights = sum(rows * cols for rows, cols in packed.values())
        if layout == "auto":
            trits = self.packed_weights - sum(math.prod(packed[slot]) for slot in two_plane)
            layout = _core.kernels.fastest_layout(trits, activations=activations, threads=threads)
        self.layout = layout
        self.packed_bytes = _packed_bytes(packed, two_plane, layout, quantization.group_size if quantization else 0)
        self.kv_bytes_per_token = _core.model.kv_bytes_per_token(spec, kv)
        table = tensors[architecture.tensor_names["embedding" if architecture.tied_head else "head"]]
        self.head_bytes = table.nbytes
        self._quantized_head_bytes = 0
        if head != "exact" and table.dtype in FLOAT_DTYPES:
            self.head_bytes = _core.kernels.quantized_head_bytes(spec.vocab_size, spec.hidden_size, HEAD_BITS[head])
            self._quantized_head_bytes = self.head_bytes
            self.read_dense_bytes += self.head_bytes - table.nbytes
        self.vocab_size, self.context_length = spec.vocab_size, spec.context_length
        self._workspace = _workspace_bytes(slots, spec.hidden_size)

    def _add_bytes(self, architecture: Architecture, slot: str, weights: int) -> None:
        """A matrix of bytes."""
        self.dense_bytes += weights
        if slot != "embedding" or architecture.tied_head:
            self.read_dense_bytes += weights
        if architecture.is_linear(slot):
            self.dense_linear_weights += weights

    def load(self, threads: int) -> Memory:
        """A process that has loaded the model."""
        parts = {
            "process": PROCESS_ANONYMOUS,
            "packed weights": self.packed_bytes,
            "scales": self._scale_bytes,
            "norms and biases": self._vector_bytes,
            "workspace": self._workspace + 4 * threads * self.context_length,
        }
        if self._quantized_head_bytes:
            parts["quantized head"] = self._quantized_head_bytes
        if self._latent_bytes:
            parts["latents on their way"] = self._latent_bytes
        if self._has_tokenizer:
            first = min(self.vocab_size, _TOKENIZER_FIRST)
            parts["tokenizer"] = _TOKENIZER_BYTES[0] * first + _TOKENIZER_BYTES[1] * (self.vocab_size - first)
        return _memory(parts, self._library_bytes + self.file_bytes)

    def run(self, threads: int, *, tokens: int, logit_rows: int) -> Memory:
        """A process that holds a sequence of so many tokens, and so many rows of logits."""
        loaded = self.load(threads)
        blocks = -(-tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
        parts = {
            "key-value cache": blocks * self.kv_bytes_per_token,
            "logits": 4 * logit_rows * self.vocab_size,
        }
        running = _memory({**loaded.parts, **parts}, self._library_bytes + self._kept_bytes)
        return Memory(running.parts, loaded.mapped_bytes, max(loaded.resident_bytes, running.resident_bytes))

    @property
    def _library_bytes(self) -> int:
        return PROCESS_MAPPED + (TOKENIZER_MAPPED if self._has_tokenizer else 0)


def conversion_memory(shapes: Iterable[tuple[int, int]], *, float32: bool, file_bytes: int) -> Memory:
    """A process that rounds linear layers of these shapes, one after the other.

    `float32`: the source holds just that, so that its weights stay mapped.
    """
    largest = max((rows * cols for rows, cols in shapes), default=0)
    per_weight = _CONVERT_BYTES_PER_WEIGHT - (4 if float32 else 0)
    parts = {"process": PROCESS_ANONYMOUS, "largest layer": int(largest * per_weight) + _CONVERT_CHUNKS}
    return _memory(parts, PROCESS_MAPPED + file_bytes)


def _memory(parts: Mapping[str, int], mapped_bytes: int) -> Memory:
    return Memory(parts, mapped_bytes, sum(parts.values()) + mapped_bytes)


def _scale_count(architecture: Architecture, rows: int, cols: int) -> int:
    quantization = architecture.quantization
    match None if quantization is None else quantization.scale:
        case "row":
            return rows
        case "group" if quantization is not None:
            return rows * -(-cols // quantization.group_size)
    return 1


def _packed_bytes(
    packed: Mapping[str, tuple[int, int]], two_plane: Collection[str], layout: str, group_size: int
) -> int:
    """All run-time tiles: those of two planes, those of the layers in `layout`, and the tables."""
    total = 0
    for slot, (rows, cols) in packed.items():
        own = "t8" if slot in two_plane else layout if slot.startswith("layers.") else "t16"
        total += _core.formats.layout_bytes(own, rows, cols, group_size=group_size if own == "t20" else 0)
    return total


def _workspace_bytes(slots: Mapping[str, tuple[int, int]], hidden: int) -> int:
    """Rows of float32 for all tokens: residual stream twice, query, key, value, gate, up; the input and its codes."""
    widest = {
        part: max((rows for slot, (rows, _) in slots.items() if slot.endswith("." + part)), default=0)
        for part in ("query", "key", "value", "gate", "up")
    }
    inputs = max([hidden, *(cols for slot, (_, cols) in slots.items() if slot.endswith((".output", ".down")))])
    return WORKSPACE_TOKENS * (4 * (2 * hidden + sum(widest.values())) + 5 * inputs)
