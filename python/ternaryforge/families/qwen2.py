# SPDX-License-Identifier: Apache-2.0
"""The qwen2 family (Qwen2, Qwen2.5): llama with biases before attention, and windows on the last layers."""

from ternaryforge.families.base import Details, Family
from ternaryforge.families.fields import Fields

WINDOW_FIELDS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})
DEFAULTS = {
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
"""What absent fields mean for Qwen2 and Qwen3."""


def read_windows(fields: Fields, layers: int) -> list[int]:
    """The window of every layer: those from max_window_layers on have one, where any does."""
    window = fields.optional_size("sliding_window") if fields.flag("use_sliding_window") else None
    first = layers if window is None else fields.size("max_window_layers", least=0)
    expected = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return fields.windows(expected, window)


def _details(fields: Fields, layers: int) -> Details:
    return Details(layer={"projection_bias": True}, windows=read_windows(fields, layers))


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=DEFAULTS,
    reads=WINDOW_FIELDS,
    details=_details,
)
