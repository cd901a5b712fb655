# SPDX-License-Identifier: Apache-2.0
"""The phi3 family (Phi 3 and 4): llama with fused projections, and rotation of a part of each head."""

from ternaryforge.families.base import TENSORS, Details, Family
from ternaryforge.families.fields import Fields
from ternaryforge.families.phi import read_partial_rotation

_QKV = "model.layers.{i}.self_attn.qkv_proj.weight"
_GATE_UP = "model.layers.{i}.mlp.gate_up_proj.weight"


def _details(fields: Fields, layers: int) -> Details:
    window = fields.optional_size("sliding_window")
    return Details() if window is None else Details(windows=[window] * layers)


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    defaults={"rope_theta": 10000.0, "max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
    tensors=TENSORS
    | {
        "layers.query": _QKV,
        "layers.key": _QKV,
        "layers.value": _QKV,
        "layers.gate": _GATE_UP,
        "layers.up": _GATE_UP,
    },
    fused=(("query", "key", "value"), ("gate", "up")),
    reads=frozenset({"partial_rotary_factor", "sliding_window"}),
    details=_details,
    rotation=read_partial_rotation,
)
