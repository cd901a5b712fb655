# SPDX-License-Identifier: Apache-2.0
"""The bitnet family (BitNet b1.58 2B4T): llama with sub-norms and a squared ReLU."""

from ternaryforge.families.base import TENSORS, Details, Family
from ternaryforge.families.fields import Fields


def sub_norm_details(fields: Fields, _layers: int) -> Details:
    """Norms before the output and the down projection; the heads together are as wide as the model."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if fields.get("head_dim") is not None and heads * fields.size("head_dim") != hidden:
        raise fields.refusal(
            "head_dim", f"must be hidden_size / num_attention_heads = {hidden} / {heads} for the norm behind the heads"
        )
    return Details(layer={"sub_norms": True})


BITNET = Family(
    name="bitnet",
    architecture="BitNetForCausalLM",
    activations={"relu2": "relu2"},
    defaults={"rope_theta": 500000.0, "max_position_embeddings": 2048},
    tensors={
        **TENSORS,
        "layers.attention_sub_norm": "model.layers.{i}.self_attn.attn_sub_norm.weight",
        "layers.ffn_sub_norm": "model.layers.{i}.mlp.ffn_sub_norm.weight",
    },
    neutral={"use_sub_norms": (True,)},
    details=sub_norm_details,
)
