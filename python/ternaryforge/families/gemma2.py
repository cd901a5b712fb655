# SPDX-License-Identifier: Apache-2.0
"""The gemma2 family: gemma with a window on every other layer, soft caps, and norms behind its parts."""

from typing import Any

from ternaryforge.families.base import TENSORS, Details, Family
from ternaryforge.families.fields import Fields
from ternaryforge.families.gemma import DEFAULTS, TANH_GELU, attention_biases, model_options

FIELDS = frozenset({"attention_bias", "query_pre_attn_scalar", "sliding_window", "final_logit_softcapping"})
POST_NORM_TENSORS = {
    **TENSORS,
    "layers.attention_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers.ffn_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}
"""The tensors of Gemma 2 and 3."""


def read_details(fields: Fields, windowed: list[bool], **layer: Any) -> Details:
    """What Gemma 2 and 3 share. `windowed`: the layers with a window where there are no layer_types."""
    expected = ["sliding_attention" if window else "full_attention" for window in windowed]
    return Details(
        layer={
            **attention_biases(fields),
            "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
            "post_norms": True,
            **layer,
        },
        model={**model_options(fields), "logit_soft_cap": fields.optional_number("final_logit_softcapping") or 0.0},
        windows=fields.windows(expected, fields.optional_size("sliding_window")),
    )


def _details(fields: Fields, layers: int) -> Details:
    return read_details(
        fields,
        [i % 2 == 0 for i in range(layers)],
        attention_soft_cap=fields.optional_number("attn_logit_softcapping") or 0.0,
    )


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    activations=TANH_GELU,
    activation_field="hidden_activation",
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    tensors=POST_NORM_TENSORS,
    reads=FIELDS | {"attn_logit_softcapping"},
    neutral={"hidden_act": tuple(TANH_GELU)},
    details=_details,
)
