# SPDX-License-Identifier: Apache-2.0
"""The gemma family: llama with GELU, scaled embeddings, and norms whose weights are stored less one."""

import numpy as np

from ternaryforge.families.base import Details, Family
from ternaryforge.families.fields import Activation, Fields

TANH_GELU: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu"}
DEFAULTS = {"rope_theta": 10000.0, "max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True}
"""What absent fields mean for Gemma 1 and 2."""


def model_options(fields: Fields) -> dict[str, float]:
    """What every Gemma has: embeddings times the root of their size, and one more than the weights of norms."""
    return {"embedding_scale": float(np.float32(fields.size("hidden_size") ** 0.5)), "norm_offset": 1.0}


def attention_biases(fields: Fields) -> dict[str, bool]:
    """All four of attention, or none."""
    bias = fields.flag("attention_bias")
    return {"projection_bias": bias, "output_bias": bias}


def _details(fields: Fields, _layers: int) -> Details:
    return Details(layer=attention_biases(fields), model=model_options(fields))


GEMMA = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    # The first files said "gelu" and meant the tanh form.
    activations=TANH_GELU | {"gelu": "gelu"},
    defaults=DEFAULTS | {"num_key_value_heads": 16},
    reads=frozenset({"attention_bias"}),
    neutral={"hidden_activation": tuple(TANH_GELU)},
    details=_details,
)
