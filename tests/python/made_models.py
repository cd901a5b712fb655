# SPDX-License-Identifier: Apache-2.0
"""Small made checkpoints with odd sizes, written without the code under test."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, tuple[str, NDArray[Any]]]
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1", "U32": "<u4"}
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def llama_config(**changes: Any) -> dict[str, Any]:
    """Nothing is a multiple of 16, and the heads together are wider than the hidden size."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 263,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 48,
        "tie_word_embeddings": False,
        "eos_token_id": 258,
    } | changes


def bitnet_config(**changes: Any) -> dict[str, Any]:
    return (
        llama_config(
            architectures=["BitNetForCausalLM"],
            model_type="bitnet",
            hidden_size=24,
            hidden_act="relu2",
            tie_word_embeddings=True,
            quantization_config={"quant_method": "bitnet"},
        )
        | changes
    )


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    sizes = (
        (query, hidden),
        (key, hidden),
        (key, hidden),
        (hidden, query),
        (ffn, hidden),
        (ffn, hidden),
        (hidden, ffn),
    )
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found[layer + "input_layernorm.weight"] = (hidden,)
        found[layer + "post_attention_layernorm.weight"] = (hidden,)
        for name, size in zip(LINEARS, sizes, strict=True):
            found[f"{layer}{name}.weight"] = size
        if config["model_type"] == "bitnet":
            found[layer + "self_attn.attn_sub_norm.weight"] = (hidden,)
            found[layer + "mlp.ffn_sub_norm.weight"] = (ffn,)
    return found


def make_tensors(config: dict[str, Any], *, dtype: str = "F32", seed: int = 0) -> Tensors:
    """Random weights; linear layers are packed as the configuration says."""
    rng = np.random.default_rng(seed)
    quantization = config.get("quantization_config") or {}
    packed = quantization.get("quant_method") is not None and quantization.get("quantization_mode") != "online"
    tensors: Tensors = {}
    for name, shape in shapes(config).items():
        if packed and any(linear in name for linear in LINEARS):
            tensors[name] = ("U8", pack_rows(rng.integers(-1, 2, shape)))
            value = rng.uniform(0.05, 0.2)
            if quantization["quant_method"] == "ternaryforge":
                scales = rng.uniform(0.05, 0.2, scale_shape(quantization, shape))
            else:
                multiply = quantization.get("linear_class") == "autobitlinear"
                scales = np.array([value if multiply else 1 / value])
            tensors[name.replace(".weight", ".weight_scale")] = ("F32", scales.astype(np.float32))
        elif len(shape) == 1:
            tensors[name] = (dtype, encode(1 + 0.1 * rng.standard_normal(shape), dtype))
        else:
            tensors[name] = (dtype, encode(rng.standard_normal(shape) / math.sqrt(shape[1]), dtype))
    return tensors


def uneven_model() -> tuple[dict[str, Any], Tensors]:
    """A config of three layers of which some say more than others, so that bits are worth more there; its tensors."""
    config = llama_config(num_hidden_layers=3, hidden_size=24, max_position_embeddings=64)
    tensors = make_tensors(config)
    for layer, gain in enumerate((3.0, 0.3, 1.5)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        tensors[name] = "F32", tensors[name][1] * np.float32(gain)
    tensors["lm_head.weight"] = "F32", tensors["lm_head.weight"][1] * np.float32(2.5)
    return config, tensors


def scale_shape(quantization: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    match quantization["scale"]:
        case "tensor":
            return (1,)
        case "row":
            return (shape[0],)
    return (shape[0], -(-shape[1] // quantization["group_size"]))


def pack_rows(trits: NDArray[Any]) -> NDArray[np.uint8]:
    """The "bitnet" layout: byte [r, k] holds the codes trit + 1 of rows r, P + r, 2 P + r, 3 P + r."""
    codes = (trits + 1).astype(np.uint8).reshape(4, -1, trits.shape[1])
    return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6


def encode(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Float values in the given dtype; bfloat16 by truncation, as its bits."""
    values = values.astype(np.float32)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(NUMPY[dtype])


def safetensors_bytes(tensors: Tensors) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = array.astype(NUMPY[dtype]).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    return file_bytes(header, data)


def file_bytes(header: Any, data: bytes) -> bytes:
    """A safetensors file of any header, right or wrong; text is taken as it is."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors | None = None, *, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    found = make_tensors(config, seed=seed) if tensors is None else tensors
    (folder / "model.safetensors").write_bytes(safetensors_bytes(found))
    return folder


def write_shards(folder: Path, config: dict[str, Any], tensors: Tensors, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    names = sorted(tensors)
    for i in range(count):
        shard = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        (folder / shard).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(folder: Path, *, bos: bool = True) -> Path:
    """Byte-level: ids 0 to 255 are single bytes, 256 joins "e" and " ", 257 starts, 258 ends a text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = byte_characters()
    vocab = {character: byte for byte, character in enumerate(alphabet)}
    vocab |= {"e" + alphabet[32]: 256, "<s>": 257, "</s>": 258}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("e", alphabet[32])]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return folder


def byte_characters() -> list[str]:
    """GPT-2's character for each byte: itself where printable, else the next one from U+0100."""
    characters = []
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        characters.append(chr(byte) if printable else "")
    others = iter(range(256, 512))
    return [character or chr(next(others)) for character in characters]
