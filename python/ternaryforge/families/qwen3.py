# SPDX-License-Identifier: Apache-2.0
"""The qwen3 family (Qwen3, Ternary-Bonsai): qwen2 with norms of query and key heads, and biases only if asked for."""

from ternaryforge.families.base import Details, Family
from ternaryforge.families.fields import Fields
from ternaryforge.families.qwen2 import DEFAULTS, WINDOW_FIELDS, read_windows


def _details(fields: Fields, layers: int) -> Details:
    bias = fields.flag("attention_bias")
    return Details(
        layer={"head_norms": True, "projection_bias": bias, "output_bias": bias},
        windows=read_windows(fields, layers),
    )


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=DEFAULTS | {"head_dim": 128},
    reads=WINDOW_FIELDS | {"attention_bias"},
    details=_details,
)
