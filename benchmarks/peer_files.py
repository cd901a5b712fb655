# SPDX-License-Identifier: Apache-2.0
"""Files of random weights for other engines, written with the gguf package: one shape, one layout of codes.

    write_gguf(path, "bitnet-2b-4t", "TQ2_0")

Embedding and head are Q6_K blocks, norms one; there is no vocabulary. `LAYOUTS` says which engine
reads which layout; bitnet.cpp and ik_llama.cpp number theirs beyond what the gguf package knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ternaryforge.shapes import linear_scale, random_codes, shape_config

LINEARS = {
    "attn_q": ("heads", "hidden"),
    "attn_k": ("keys", "hidden"),
    "attn_v": ("keys", "hidden"),
    "attn_output": ("hidden", "heads"),
    "ffn_gate": ("ffn", "hidden"),
    "ffn_up": ("ffn", "hidden"),
    "ffn_down": ("hidden", "ffn"),
}
Blocks = Callable[[int, int, np.random.SFC64], NDArray[np.uint8]]


def random_bytes(generator: np.random.SFC64, count: int) -> NDArray[np.uint8]:
    """Any bytes."""
    return generator.random_raw(-(-count // 8)).view(np.uint8)[:count]


def tq2_0(rows: int, cols: int, generator: np.random.SFC64) -> NDArray[np.uint8]:
    """256 weights: 64 bytes of two-bit codes, an f16 scale."""
    blocks = np.empty((rows, cols // 256, 66), np.uint8)
    blocks[..., :64] = random_codes(generator, rows * cols // 4).reshape(rows, -1, 64)
    blocks[..., 64:] = np.array([linear_scale(cols)], np.float16).view(np.uint8)
    return blocks


def tq1_0(rows: int, cols: int, generator: np.random.SFC64) -> NDArray[np.uint8]:
    """256 weights: 52 bytes of up to five trits each, of which any byte is some; an f16 scale."""
    blocks = np.empty((rows, cols // 256, 54), np.uint8)
    blocks[..., :52] = random_bytes(generator, rows * cols // 256 * 52).reshape(rows, -1, 52)
    blocks[..., 52:] = np.array([linear_scale(cols)], np.float16).view(np.uint8)
    return blocks


def i2_s(rows: int, cols: int, generator: np.random.SFC64) -> NDArray[np.uint8]:
    """The whole tensor: two-bit codes, then 32 bytes that begin with an f32 scale."""
    data = np.zeros(rows * cols // 4 + 32, np.uint8)
    data[:-32] = random_codes(generator, rows * cols // 4)
    data[-32:-28] = np.array([linear_scale(cols)], np.float32).view(np.uint8)
    return data


def iq2_bn(rows: int, cols: int, generator: np.random.SFC64) -> NDArray[np.uint8]:
    """A row: an f32 scale, two-bit codes."""
    data = np.empty((rows, 4 + cols // 4), np.uint8)
    data[:, 4:] = random_codes(generator, rows * cols // 4).reshape(rows, -1)
    data[:, :4] = np.array([linear_scale(cols)], np.float32).view(np.uint8)
    return data


def iq2_bn_r4(rows: int, cols: int, generator: np.random.SFC64) -> NDArray[np.uint8]:
    """Four rows interleaved: four f32 scales, then the codes of all."""
    data = np.empty((rows // 4, 16 + cols), np.uint8)
    data[:, 16:] = random_codes(generator, rows * cols // 4).reshape(rows // 4, -1)
    data[:, :16] = np.full(4, linear_scale(cols), np.float32).view(np.uint8)
    return data


def q6_k(rows: int, cols: int, generator: np.random.SFC64) -> NDArray[np.uint8]:
    """256 weights: 128 + 64 bytes of codes, 16 scales of one byte, the f16 scale of scales."""
    blocks = np.empty((rows, cols // 256, 210), np.uint8)
    blocks[..., :192] = random_bytes(generator, rows * cols // 256 * 192).reshape(rows, -1, 192)
    blocks[..., 192:208] = 16
    blocks[..., 208:] = np.array([2**-14], np.float16).view(np.uint8)
    return blocks


@dataclass(frozen=True)
class Layout:
    """How an engine stores ternary matrices: type id, columns that a row must be a multiple of, its writer."""

    engine: str
    type_id: int
    columns: int
    blocks: Blocks


LAYOUTS = {
    "TQ1_0": Layout("llama.cpp", 34, 256, tq1_0),
    "TQ2_0": Layout("llama.cpp", 35, 256, tq2_0),
    "I2_S": Layout("bitnet.cpp", 36, 128, i2_s),
    "IQ2_BN": Layout("ik_llama.cpp", 135, 64, iq2_bn),
    "IQ2_BN_R4": Layout("ik_llama.cpp", 335, 64, iq2_bn_r4),
}
Q6_K = 14


def architecture(config: dict[str, Any], engine: str) -> str:
    """What an engine calls the family."""
    if config["model_type"] == "bitnet" and engine == "ik_llama.cpp":
        return "bitnet-b1.58"
    return str(config["model_type"])


def write_gguf(path: Path, shape: str, kind: str, *, context_length: int = 32768) -> None:
    """A model of the shape. Exits where the layout cannot hold it."""
    config, layout = shape_config(shape), LAYOUTS[kind]
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    sizes = {
        "hidden": config["hidden_size"],
        "ffn": config["intermediate_size"],
        "heads": config["num_attention_heads"] * head_dim,
        "keys": config["num_key_value_heads"] * head_dim,
    }
    for _, cols in LINEARS.values():
        if sizes[cols] % layout.columns:
            raise SystemExit(f"[peers] {kind} needs multiples of {layout.columns} columns, {shape} has {sizes[cols]}")
    generator = np.random.SFC64(0)
    partial = path.with_suffix(".partial")
    arch = architecture(config, layout.engine)
    # With a temporary file, so that the largest shapes do not lie in memory twice.
    writer = gguf.GGUFWriter(partial, arch, use_temp_file=True)
    writer.add_context_length(context_length)
    writer.add_embedding_length(sizes["hidden"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["ffn"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add_norm(tensor: str, size: int) -> None:
        writer.add_tensor(f"{tensor}.weight", np.ones(size, np.float32))

    def add_matrix(tensor: str, rows: int, cols: int, blocks: Blocks, type_id: int) -> None:
        # As int8 the writer takes shape and type as they are told, types unknown to it included.
        data = blocks(rows, cols, generator).reshape(-1).view(np.int8)
        writer.add_tensor(f"{tensor}.weight", data, raw_shape=(rows, cols), raw_dtype=type_id)

    add_matrix("token_embd", config["vocab_size"], sizes["hidden"], q6_k, Q6_K)
    add_norm("output_norm", sizes["hidden"])
    if not config["tie_word_embeddings"]:
        add_matrix("output", config["vocab_size"], sizes["hidden"], q6_k, Q6_K)
    for i in range(config["num_hidden_layers"]):
        add_norm(f"blk.{i}.attn_norm", sizes["hidden"])
        add_norm(f"blk.{i}.ffn_norm", sizes["hidden"])
        if config["model_type"] == "bitnet":
            add_norm(f"blk.{i}.attn_sub_norm", sizes["heads"])
            add_norm(f"blk.{i}.ffn_sub_norm", sizes["ffn"])
        if config["model_type"] == "qwen3":
            add_norm(f"blk.{i}.attn_q_norm", head_dim)
            add_norm(f"blk.{i}.attn_k_norm", head_dim)
        for tensor, (rows, cols) in LINEARS.items():
            add_matrix(f"blk.{i}.{tensor}", sizes[rows], sizes[cols], layout.blocks, layout.type_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)
