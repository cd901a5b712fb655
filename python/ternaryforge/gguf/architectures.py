# SPDX-License-Identifier: Apache-2.0
"""The architectures of GGUF files that are known here, how Hugging Face calls them, and the names of their tensors."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TENSORS = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "attention_sub_norm": "attn_sub_norm",
    "output": "attn_output",
    "attention_post_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "ffn_sub_norm": "ffn_sub_norm",
    "down": "ffn_down",
    "ffn_post_norm": "post_ffw_norm",
}
"""The last part of a slot -> the tensor's name in the file, without block number and ending."""

ROPE_FACTORS = "rope_freqs.weight"
"""Divides the frequency of each pair: what files have in place of Llama 3.1's fields."""


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """`name` is `general.architecture`; `hf_class` and `model_type` are those of config.json.

    `permuted`: rows of query and key are ordered for rotation of neighbours. `unit_norms`: norms are
    stored with the one that the config's class adds. `pads_ffn`: zero rows and columns in the
    feed-forward part change nothing.
    """

    name: str
    hf_class: str
    model_type: str
    permuted: bool = False
    unit_norms: bool = False
    pads_ffn: bool = True


LLAMA = GgufArchitecture("llama", "LlamaForCausalLM", "llama", permuted=True)
QWEN2 = GgufArchitecture("qwen2", "Qwen2ForCausalLM", "qwen2")
QWEN3 = GgufArchitecture("qwen3", "Qwen3ForCausalLM", "qwen3")
GEMMA = GgufArchitecture("gemma", "GemmaForCausalLM", "gemma", unit_norms=True)
GEMMA2 = GgufArchitecture("gemma2", "Gemma2ForCausalLM", "gemma2", unit_norms=True)
GEMMA3 = GgufArchitecture("gemma3", "Gemma3ForCausalLM", "gemma3_text", unit_norms=True)
# The mean of the norm in front of `down` counts every column: padding would change it.
BITNET = GgufArchitecture("bitnet", "BitnetForCausalLM", "llama", pads_ffn=False)
BITNET_B158 = GgufArchitecture("bitnet-b1.58", "BitNetForCausalLM", "bitnet", pads_ffn=False)
BITNET_25 = GgufArchitecture("bitnet-25", "BitNetForCausalLM", "bitnet", pads_ffn=False)

ARCHITECTURES = {
    known.name: known for known in (LLAMA, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, BITNET, BITNET_B158, BITNET_25)
}
WRITTEN_AS = {
    "MistralForCausalLM": LLAMA,  # the same mathematics within its window
    **{known.hf_class: known for known in ARCHITECTURES.values() if known is not BITNET_25},
}
"""The architecture that an export of a config.json's class has."""


def tensor_name(slot: str) -> str:
    """The name in a GGUF file of a slot of `ModelSpec.slots()`, e.g. `blk.0.attn_q.bias`."""
    block, _, part = slot.rpartition(".")
    stem, ending = part.removesuffix("_bias"), "bias" if part.endswith("_bias") else "weight"
    prefix = block.replace("layers.", "blk.") + "." if block else ""
    return f"{prefix}{TENSORS[stem]}.{ending}"


def is_norm(slot: str) -> bool:
    """Whether a slot holds the weights of a norm."""
    return slot.endswith("norm")


def is_permuted(architecture: GgufArchitecture, slot: str) -> bool:
    """Whether a slot's rows are in another order in the file."""
    return architecture.permuted and re.search(r"\.(query|key)(_bias)?$", slot) is not None


def to_neighbours(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Rows of query or key, halves of each head rotated with each other, in the order that GGUF's llama has."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def to_halves(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """The inverse of `to_neighbours`."""
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)
