# SPDX-License-Identifier: Apache-2.0
"""The phi family (Phi 1 to 2): attention and a plain feed-forward side by side behind one LayerNorm."""

from ternaryforge.families.base import Details, Family
from ternaryforge.families.fields import Fields
from ternaryforge.families.rope import Rotation, read_rotation


def read_partial_rotation(fields: Fields, head_dim: int, _window: int) -> Rotation:
    """The rotation of the first values of a head, as many as partial_rotary_factor says."""
    rope = fields.object("rope_parameters")
    stored = None if rope is None else rope.optional_number("partial_rotary_factor")
    size = int(head_dim * (fields.number("partial_rotary_factor") if stored is None else stored))
    if size % 2 or not 0 < size <= head_dim:
        raise fields.refusal("partial_rotary_factor", f"must rotate an even part of a head of {head_dim}")
    return read_rotation(fields, size, partial=True)


def _details(_fields: Fields, _layers: int) -> Details:
    return Details(
        layer={
            "gated": False,
            "norm": "layer",
            "parallel": True,
            "projection_bias": True,
            "output_bias": True,
            "ffn_bias": True,
        },
        model={"head_bias": True},
    )


PHI = Family(
    name="phi",
    architecture="PhiForCausalLM",
    activations={"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf", "relu": "relu"},
    defaults={"rope_theta": 10000.0, "max_position_embeddings": 2048, "partial_rotary_factor": 0.5},
    norm_field="layer_norm_eps",
    tensors={
        "embedding": "model.embed_tokens.weight",
        "final_norm": "model.final_layernorm.weight",
        "head": "lm_head.weight",
        "layers.attention_norm": "model.layers.{i}.input_layernorm.weight",
        "layers.query": "model.layers.{i}.self_attn.q_proj.weight",
        "layers.key": "model.layers.{i}.self_attn.k_proj.weight",
        "layers.value": "model.layers.{i}.self_attn.v_proj.weight",
        "layers.output": "model.layers.{i}.self_attn.dense.weight",
        "layers.up": "model.layers.{i}.mlp.fc1.weight",
        "layers.down": "model.layers.{i}.mlp.fc2.weight",
    },
    reads=frozenset({"partial_rotary_factor", "layer_norm_eps"}),
    details=_details,
    rotation=read_partial_rotation,
)
