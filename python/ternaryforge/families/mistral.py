# SPDX-License-Identifier: Apache-2.0
"""The mistral family: llama with a sliding window on every layer, or on none."""

from ternaryforge.families.base import Details, Family
from ternaryforge.families.fields import Fields


def _details(fields: Fields, layers: int) -> Details:
    window = fields.optional_size("sliding_window")
    if window is None:
        return Details()
    windows = fields.windows(["sliding_attention"] * layers, window)
    if 0 in windows:
        raise fields.refusal("layer_types", "must be 'sliding_attention' for every layer, as sliding_window says")
    return Details(windows=windows)


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults={
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    reads=frozenset({"sliding_window"}),
    details=_details,
)
