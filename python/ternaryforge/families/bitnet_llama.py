# SPDX-License-Identifier: Apache-2.0
"""BitnetForCausalLM (1bitLLM's bitnet_b1_58): llama with sub-norms, stored as the latents of its training."""

from ternaryforge.families.base import TENSORS, Family
from ternaryforge.families.bitnet import sub_norm_details

BITNET_LLAMA = Family(
    name="llama",  # what its files say as model_type
    architecture="BitnetForCausalLM",
    defaults={"rope_theta": 10000.0, "max_position_embeddings": 2048},
    tensors={
        **TENSORS,
        "layers.attention_sub_norm": "model.layers.{i}.self_attn.inner_attn_ln.weight",
        "layers.ffn_sub_norm": "model.layers.{i}.mlp.ffn_layernorm.weight",
    },
    neutral={"weight_bits": (1,), "input_bits": (8,)},
    details=sub_norm_details,
    quantization={"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"},
)
