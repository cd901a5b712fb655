# SPDX-License-Identifier: Apache-2.0
"""The text part of the gemma3 family: gemma2 with norms of heads, and windowed layers that rotate by themselves."""

from ternaryforge.families.base import Details, Family
from ternaryforge.families.fields import Fields
from ternaryforge.families.gemma import DEFAULTS, TANH_GELU
from ternaryforge.families.gemma2 import FIELDS, POST_NORM_TENSORS, read_details
from ternaryforge.families.rope import Rotation, make_rotation

_KINDS = {"full_attention", "sliding_attention"}


def _details(fields: Fields, layers: int) -> Details:
    pattern = fields.size("sliding_window_pattern")
    return read_details(fields, [(i + 1) % pattern != 0 for i in range(layers)], head_norms=True)


def _rotation(fields: Fields, head_dim: int, window: int) -> Rotation:
    """Newer files have an object for each kind of layer, older ones two bases and a scaling of the global one."""
    scaling, both = fields.object("rope_scaling"), fields.object("rope_parameters")
    if both is not None:
        if scaling is not None:
            raise fields.refusal("rope_scaling", "cannot stand beside rope_parameters")
        if set(both.names()) - _KINDS:
            raise fields.refusal("rope_parameters", f"must hold {' and '.join(sorted(_KINDS))}")
    kind, base_field = ("sliding_attention", "rope_local_base_freq") if window else ("full_attention", "rope_theta")
    rope = both.object(kind) if both is not None else None if window else scaling
    if rope is not None and rope.get("truncate") is not None:
        raise rope.refusal("truncate", "is not supported for a kind of layer")
    return make_rotation(rope, fields, head_dim, base_field=base_field)


GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    activations=TANH_GELU,
    activation_field="hidden_activation",
    defaults=DEFAULTS
    | {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    tensors=POST_NORM_TENSORS,
    reads=FIELDS | {"sliding_window_pattern", "rope_local_base_freq"},
    neutral={"hidden_act": tuple(TANH_GELU)},
    details=_details,
    rotation=_rotation,
)
