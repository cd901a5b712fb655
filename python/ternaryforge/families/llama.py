# SPDX-License-Identifier: Apache-2.0
"""The llama family: Llama 1 to 3, Falcon3, SmolLM2 and everything else of LlamaForCausalLM."""

from ternaryforge.families.base import Details, Family
from ternaryforge.families.fields import Fields


def _details(fields: Fields, _layers: int) -> Details:
    attention, ffn = fields.flag("attention_bias"), fields.flag("mlp_bias")
    return Details(layer={"projection_bias": attention, "output_bias": attention, "ffn_bias": ffn})


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults={"rope_theta": 10000.0, "max_position_embeddings": 2048},
    reads=frozenset({"attention_bias", "mlp_bias"}),
    details=_details,
)
