# SPDX-License-Identifier: Apache-2.0
"""Small folders of every family that GGUF files hold, and files made of chosen keys and tensors."""

import math
from pathlib import Path
from typing import Any

import made_models
import numpy as np

from ternaryforge import _core
from ternaryforge.families import read_architecture

STOCK = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head"],
}
CLASSES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False},
    "gemma": {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64,
        "sliding_window": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64,
        "sliding_window": 8,
        "rope_local_base_freq": 10000.0,
    },
    "bitnet-silu": {"architectures": ["BitnetForCausalLM"], "model_type": "llama"},
    "bitnet": {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2"},
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return (
        {
            "vocab_size": 300,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 20000.0,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "eos_token_id": 258,
        }
        | CLASSES[family]
        | changes
    )


def write_model(
    folder: Path,
    family: str,
    quantization: dict[str, Any] | None = STOCK,
    *,
    scale_bits: int = 11,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A folder with a tokenizer. `scale_bits` is the precision of the scales: 11 fits f16."""
    config = config_of(family, **changes)
    if quantization is not None:
        config["quantization_config"] = quantization
    architecture = read_architecture(config, where="test")
    rng = np.random.default_rng(seed)
    tensors: made_models.Tensors = {}
    for slot, (rows, cols) in architecture.spec.slots().items():
        name = architecture.tensor_names[slot]
        if quantization is not None and architecture.is_linear(slot):
            tensors[name] = ("U8", made_models.pack_rows(rng.integers(-1, 2, (rows, cols))))
            shape = (1,)
            if quantization["quant_method"] == "ternaryforge":
                shape = made_models.scale_shape(quantization, (rows, cols))
            scales = rng.integers(1 << (scale_bits - 1), 1 << scale_bits, shape) / 2.0 ** (scale_bits + 3)
            tensors[name.replace(".weight", ".weight_scale")] = ("F32", scales.astype(np.float32))
        elif rows == 1:
            offset = 0.0 if family.startswith("gemma") or slot.endswith("_bias") else 1.0
            tensors[name] = ("F32", (offset + 0.1 * rng.standard_normal(cols)).astype(np.float32))
        else:
            values = (rng.standard_normal((rows, cols)) / math.sqrt(cols)).astype(np.float32)
            tensors[name] = ("F32", values)
    made_models.write_folder(folder, config, tensors)
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    import json

    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = made_models.byte_characters()
    vocab = {character: byte for byte, character in enumerate(alphabet)}
    vocab |= {"he": 256, "<s>": 257, "</s>": 258}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": "{{ bos_token }}x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


Metadata = dict[str, tuple[str, Any]]


def llama_metadata(**changes: Any) -> Metadata:
    """Keys of a model with 8 columns, 1 block and 12 tokens; a change to None leaves a key out."""
    tokens = ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(9))]
    values: dict[str, Any] = {
        "general.architecture": ("string", "llama"),
        "llama.context_length": ("uint32", 16),
        "llama.embedding_length": ("uint32", 8),
        "llama.block_count": ("uint32", 1),
        "llama.feed_forward_length": ("uint32", 12),
        "llama.attention.head_count": ("uint32", 2),
        "llama.attention.layer_norm_rms_epsilon": ("float32", 1e-5),
        "tokenizer.ggml.model": ("string", "llama"),
        "tokenizer.ggml.tokens": ("array[string]", tokens),
        "tokenizer.ggml.scores": ("array[float32]", [0.0] * 12),
        "tokenizer.ggml.token_type": ("array[int32]", [2, 3, 3] + [1] * 9),
    }
    values |= changes
    return {key: value for key, value in values.items() if value is not None}


LLAMA_SHAPES = {
    "token_embd.weight": (12, 8), "output_norm.weight": (8,), "blk.0.attn_norm.weight": (8,),
    "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (8, 8), "blk.0.attn_v.weight": (8, 8),
    "blk.0.attn_output.weight": (8, 8), "blk.0.ffn_norm.weight": (8,), "blk.0.ffn_gate.weight": (12, 8),
    "blk.0.ffn_up.weight": (12, 8), "blk.0.ffn_down.weight": (8, 12),
}  # fmt: skip


def write_gguf(
    path: Path, metadata: Metadata, shapes: dict[str, tuple[int, ...]] | None = None, *, fill: float | None = None
) -> Path:
    """A file of random F32 tensors."""
    rng = np.random.default_rng(1)
    shapes = LLAMA_SHAPES if shapes is None else shapes
    with _core.io.GgufWriter(path) as writer:
        for key, (kind, value) in metadata.items():
            writer.add_metadata(key, value, kind)
        for name, shape in shapes.items():
            writer.add_tensor(name, shape, "F32")
        for name, shape in shapes.items():
            values = rng.standard_normal(shape) if fill is None else np.full(shape, fill)
            writer.write(name, values.astype(np.float32))
        writer.finish()
    return path
