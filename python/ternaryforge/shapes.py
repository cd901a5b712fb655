# SPDX-License-Identifier: Apache-2.0
"""Shapes of well-known models, with random weights: for speed and memory without a download.

    transformer = shapes.random_transformer("bitnet-2b-4t", threads=2)     # in memory, ready to run
    architecture = shapes.read_shape("llama3-8b")                          # only the description

Every shape is the config.json of a checkpoint in the stock packed form. The weights are random
bits, so such a model computes as fast as a real one, and says nothing.
"""

import copy
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.checkpoint import INDEX_FILE, SINGLE_FILE
from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
from ternaryforge.families import Architecture, read_architecture
from ternaryforge.model import Activations, default_activations
from ternaryforge.weights import scale_name

_CHUNK_WORDS = 1 << 17  # of random bits at once: 1 MB, which stays in the cache


def _llama(**fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "bitnet"},
    } | fields


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "bitnet-2b-4t": _llama(
        architectures=["BitNetForCausalLM"],
        model_type="bitnet",
        vocab_size=128256,
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=30,
        num_attention_heads=20,
        num_key_value_heads=5,
        hidden_act="relu2",
        rope_theta=500000.0,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        quantization_config={
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    ),
    "falcon3-1b": _llama(
        vocab_size=131072,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        rms_norm_eps=1e-6,
        rope_theta=1000042.0,
        max_position_embeddings=8192,
    ),
    "qwen3-1.7b": _llama(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
    "llama3-8b": _llama(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
        max_position_embeddings=8192,
    ),
    # The plain sizes of the literature: 1bitLLM's bitnet_b1_58-3B (without its sub-norms), Llama 2.
    "3b": _llama(
        vocab_size=32002,
        hidden_size=3200,
        intermediate_size=8640,
        num_hidden_layers=26,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "7b": _llama(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    ),
    "13b": _llama(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        max_position_embeddings=4096,
    ),
    "70b": _llama(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    ),
}
"""Name to config.json; names are those of `bench --shape` and `plan --shape`."""


def shape_config(name: str) -> dict[str, Any]:
    """The config.json of a shape, a copy. Raises ValueError for a name that is not in `SHAPES`."""
    if name not in SHAPES:
        raise ValueError(f"[shape] the shape must be one of {', '.join(SHAPES)}, got {name!r}")
    return copy.deepcopy(dict(SHAPES[name]))


def read_shape(name: str) -> Architecture:
    """The description of a shape, as that of a checkpoint. Raises ValueError for an unknown name."""
    return read_architecture(shape_config(name), where=name)


def random_transformer(
    name: str, *, threads: int | None = None, activations: Activations | None = None, seed: int = 0
) -> _core.model.Transformer:
    """A model of this shape with random ternary weights, in memory.

    `activations` None is what the shape was made for. Raises ValueError for an unknown name.
    """
    architecture = read_shape(name)
    return _core.model.Transformer(
        architecture.spec,
        random_weights(architecture, seed=seed),
        activations=activations or default_activations(architecture.quantization),
        threads=threads or _core.parallel.default_threads(),
    )


def random_weights(
    architecture: Architecture, *, seed: int = 0, layout: Literal["t16", "t20"] = "t16"
) -> dict[str, _core.formats.PackedTensor]:
    """All weights by slot: linear layers in a run-time layout, so that nothing is repacked as they are loaded.

    Norms are one, biases zero, embedding and head bfloat16. Raises ValueError for a linear layer
    whose rows or columns are no multiple of 16, since random bits would fill its padding.
    """
    generator = np.random.SFC64(seed)
    weights = {}
    for slot, (rows, cols) in architecture.spec.slots().items():
        if architecture.is_linear(slot):
            if rows % 16 or cols % 16:
                raise ValueError(f"[shape] rows and columns of '{slot}' must be multiples of 16, got {rows} x {cols}")
            tiles = _core.formats.PackedTensor(
                "t16",
                rows,
                cols,
                random_codes(generator, rows * cols // 4),
                scale_kind="tensor",
                scales=np.array([linear_scale(cols)], np.float32),
            )
            threads = _core.parallel.default_threads()
            weights[slot] = _core.kernels.repack(tiles, layout, threads=threads) if layout != "t16" else tiles
        else:
            weights[slot] = _core.formats.PackedTensor("bf16", rows, cols, dense_values(generator, slot, rows * cols))
    return weights


def linear_scale(cols: int) -> float:
    """The scale with which random codes keep the variance of a vector of `cols` values."""
    return math.sqrt(2 / cols)  # half of the codes are not zero


def random_codes(generator: np.random.SFC64, size: int) -> NDArray[np.uint8]:
    """Bytes of four two-bit codes each (code = trit + 1): half are 1, a quarter each 0 and 2."""
    words = np.empty(-(-size // 8), np.uint64)
    low_bits = np.uint64(0x5555555555555555)
    for begin in range(0, words.size, _CHUNK_WORDS):
        part = words[begin : begin + _CHUNK_WORDS]
        part[:] = generator.random_raw(part.size)
        # The code 3 stands for no trit; without its high bit it is 1.
        part ^= (part & (part >> np.uint64(1)) & low_bits) << np.uint64(1)
    return words.view(np.uint8)[:size]


def dense_values(generator: np.random.SFC64, slot: str, size: int) -> NDArray[np.uint16]:
    """Bits of bfloat16 for a slot that is no linear layer: ones, zeros, or random 2^-6 <= |x| < 2^-5."""
    part = slot.rpartition(".")[2]
    if part.endswith("_bias"):
        return np.zeros(size, np.uint16)
    if part.endswith("_norm"):
        return np.full(size, 0x3F80, np.uint16)
    words = np.empty(-(-size // 4), np.uint64)
    sign_and_mantissa, exponent = np.uint64(0x807F807F807F807F), np.uint64(0x3C803C803C803C80)
    for begin in range(0, words.size, _CHUNK_WORDS):
        words[begin : begin + _CHUNK_WORDS] = generator.random_raw(min(_CHUNK_WORDS, words.size - begin))
        words[begin : begin + _CHUNK_WORDS] &= sign_and_mantissa
        words[begin : begin + _CHUNK_WORDS] |= exponent
    return words.view(np.uint16)[:size]


def write_random_checkpoint(
    config: dict[str, Any], out: str | os.PathLike[str], *, shards: int = 1, seed: int = 0
) -> None:
    """Writes the folder `out` of a stock packed checkpoint with this config.json and random weights.

    Tensor by tensor, so that any size fits the memory; nothing appears at `out` before all is done. There is no
    tokenizer. Raises ValueError for a configuration that is not packed, FileExistsError where `out` exists.
    """
    architecture = read_architecture(config, where="config.json")
    quantization = architecture.quantization
    if quantization is None or quantization.online or quantization.scale != "tensor":
        raise ValueError("[shape] the configuration needs a quantization_config with one scale per tensor")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"[shape] there is something already at '{out}'; name another folder")
    plan = stored_tensors(architecture)
    generator = np.random.SFC64(seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        work = Path(folder) / "model"
        work.mkdir()
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        names = [SINGLE_FILE] if shards == 1 else names
        step = -(-len(plan) // shards)
        for i, name in enumerate(names):
            part = plan[i * step : (i + 1) * step]
            with CheckpointWriter(Path(folder) / "part", [tensor for _, _, tensor in part]) as writer:
                for slot, cols, tensor in part:
                    writer.write(tensor.name, _random_tensor(generator, slot, cols, tensor, quantization.convention))
            (Path(folder) / "part" / SINGLE_FILE).rename(work / name)
            (Path(folder) / "part").rmdir()
        if shards > 1:
            places = {tensor.name: names[i // step] for i, (_, _, tensor) in enumerate(plan)}
            size = sum(tensor.nbytes for _, _, tensor in plan)
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (work / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
        (work / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        work.rename(out)


def stored_tensors(architecture: Architecture) -> list[tuple[str, int, TensorPlan]]:
    """The tensors of a stock checkpoint, packed or in bfloat16, with slot and columns; a scale follows its codes."""
    plan = []
    for slot, (rows, cols) in architecture.spec.slots().items():
        name = architecture.tensor_names[slot]
        if architecture.is_linear(slot) and architecture.is_ternary(slot):
            plan.append((slot, cols, TensorPlan(name, "U8", (rows // 4, cols))))
            plan.append((slot, cols, TensorPlan(scale_name(name), "F32", (1,))))
        else:
            plan.append((slot, cols, TensorPlan(name, "BF16", (cols,) if rows == 1 else (rows, cols))))
    return plan


def _random_tensor(
    generator: np.random.SFC64, slot: str, cols: int, tensor: TensorPlan, convention: str
) -> NDArray[Any]:
    if tensor.dtype == "U8":
        return random_codes(generator, tensor.nbytes).reshape(tensor.shape)
    if tensor.dtype == "F32":
        scale = linear_scale(cols)
        return np.array([1 / scale if convention == "divide" else scale], np.float32)
    return dense_values(generator, slot, tensor.nbytes // 2).reshape(tensor.shape)
