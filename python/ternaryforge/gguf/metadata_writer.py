# SPDX-License-Identifier: Apache-2.0
"""A config.json as the metadata of a GGUF file; what no engine would compute is refused by name."""

import math
from collections.abc import Mapping
from typing import Any

from ternaryforge._core import FormatError
from ternaryforge.families import Architecture, family_of
from ternaryforge.families.fields import Fields
from ternaryforge.gguf.architectures import BITNET_B158, WRITTEN_AS, GgufArchitecture
from ternaryforge.gguf.metadata import ACTIVATION_BITS, FFN_SIZE, large_attention_scale
from ternaryforge.gguf.vocabulary_writer import Entry

_PLAIN_ROPE = {"default", None}


def written_architecture(architecture: Architecture, *, where: str) -> GgufArchitecture:
    """The GGUF architecture of a model. Raises FormatError that names what can be written."""
    known = WRITTEN_AS.get(architecture.architecture)
    if known is None:
        raise FormatError(
            f"[export] '{where}': {architecture.architecture} cannot be written as GGUF; supported are "
            f"{', '.join(WRITTEN_AS)}"
        )
    return known


def describe_model(
    config: Mapping[str, Any],
    architecture: Architecture,
    known: GgufArchitecture,
    *,
    name: str,
    ffn_size: int,
    notes: list[str],
    where: str,
) -> list[Entry]:
    """The keys of the model itself. `ffn_size` is the stored one; `notes` gets what a user should know."""
    family = family_of(dict(config), where=where)
    fields = Fields(config, where, family.defaults)
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    head_dim = fields.size("head_dim", default=hidden // heads)
    prefix = known.name + "."
    entries: list[Entry] = [
        ("general.architecture", known.name, "string"),
        ("general.name", name, "string"),
        ("general.quantization_version", 2, "uint32"),
        (prefix + "vocab_size", fields.size("vocab_size"), "uint32"),
        (prefix + "context_length", _context(fields, known, notes), "uint32"),
        (prefix + "embedding_length", hidden, "uint32"),
        (prefix + "block_count", fields.size("num_hidden_layers"), "uint32"),
        (prefix + "feed_forward_length", ffn_size, "uint32"),
        (prefix + "attention.head_count", heads, "uint32"),
        (prefix + "attention.head_count_kv", fields.size("num_key_value_heads", default=heads), "uint32"),
        (prefix + "attention.key_length", head_dim, "uint32"),
        (prefix + "attention.value_length", head_dim, "uint32"),
        (prefix + "attention.layer_norm_rms_epsilon", fields.number("rms_norm_eps"), "float32"),
        (prefix + "rope.dimension_count", head_dim, "uint32"),
    ]
    entries += _rope(fields, known, notes)
    if known.name in {"gemma2", "gemma3"}:
        entries += _gemma(fields, known, head_dim, hidden // heads)
    if known.name.startswith("bitnet"):
        # Read by no engine yet, and what tells the two apart.
        entries.append((prefix + "hidden_activation", "relu2" if known is BITNET_B158 else "silu", "string"))
        if heads * head_dim != hidden:
            raise FormatError(
                f"[export] '{where}': {known.name} needs heads as wide as the model, {heads} x {head_dim} for {hidden}"
            )
    if ffn_size != fields.size("intermediate_size"):
        entries.append((FFN_SIZE, fields.size("intermediate_size"), "uint32"))
    quantization = architecture.quantization
    if quantization is not None:
        entries.append((ACTIVATION_BITS, quantization.activation_bits or 32, "uint32"))
    return entries


def _context(fields: Fields, known: GgufArchitecture, notes: list[str]) -> int:
    """The context, cut to the window where the engines have no windows for an architecture."""
    context = fields.size("max_position_embeddings")
    if known.name in {"gemma2", "gemma3"}:
        return context
    window = fields.optional_size("sliding_window")
    uses = fields.get("use_sliding_window")
    if window is None or uses is False or (uses is None and known.name in {"qwen2", "qwen3"}) or window >= context:
        return context
    notes.append(
        f"The context is {window} instead of {context} tokens: engines ignore the model's sliding window, within "
        "which nothing changes."
    )
    return window


def _rope(fields: Fields, known: GgufArchitecture, notes: list[str]) -> list[Entry]:
    prefix = known.name + ".rope."
    rope = fields.object("rope_scaling") or fields.object("rope_parameters")
    if rope is not None and rope.get("full_attention") is not None:  # an object for each kind of layer
        return _rope_by_layer(rope, prefix)
    base = None if rope is None else rope.optional_number("rope_theta")
    entries: list[Entry] = [(prefix + "freq_base", base or fields.number("rope_theta"), "float32")]
    kind = None if rope is None else rope.get("rope_type") or rope.get("type")
    if known.name == "gemma3":
        entries.append((prefix + "freq_base_swa", fields.number("rope_local_base_freq"), "float32"))
    if kind == "linear" and rope is not None:
        entries += [
            (prefix + "scaling.type", "linear", "string"),
            (prefix + "scaling.factor", rope.number("factor"), "float32"),
        ]
    elif kind == "dynamic":
        notes.append("The dynamic scaling of positions is left out: it changes nothing within the model's context.")
    elif kind == "llama3" and rope is not None:
        original = rope.optional_size("original_max_position_embeddings")
        if original is not None:
            entries.append((prefix + "scaling.original_context_length", original, "uint32"))
    elif kind not in _PLAIN_ROPE:
        raise fields.refusal("rope_scaling", "of this kind cannot be written as GGUF; only linear and llama3 can")
    return entries


def _rope_by_layer(rope: Fields, prefix: str) -> list[Entry]:
    """Gemma 3 as transformers 5 writes it."""
    full, local = rope.object("full_attention"), rope.object("sliding_attention")
    if full is None or local is None or (local.get("rope_type") or "default") != "default":
        raise rope.refusal("full_attention", "and sliding_attention must both be there, the second one unscaled")
    entries: list[Entry] = [
        (prefix + "freq_base", full.number("rope_theta"), "float32"),
        (prefix + "freq_base_swa", local.number("rope_theta"), "float32"),
    ]
    kind = full.get("rope_type")
    if kind == "linear":
        entries += [
            (prefix + "scaling.type", "linear", "string"),
            (prefix + "scaling.factor", full.number("factor"), "float32"),
        ]
    elif kind not in _PLAIN_ROPE:
        raise rope.refusal("full_attention", "is of a kind that cannot be written as GGUF; only linear can")
    return entries


def _gemma(fields: Fields, known: GgufArchitecture, head_dim: int, width: int) -> list[Entry]:
    layers = fields.size("num_hidden_layers")
    scalar = fields.number("query_pre_attn_scalar")
    computed = width if large_attention_scale(known.name, layers) else head_dim
    if not math.isclose(scalar, computed):
        raise fields.refusal("query_pre_attn_scalar", f"must be {computed}, which is what engines compute")
    pattern = 2 if known.name == "gemma2" else 6
    expected = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    if fields.get("layer_types") not in (None, expected):
        raise fields.refusal("layer_types", f"must have full attention in every layer number {pattern}")
    if fields.get("sliding_window_pattern") not in (None, pattern):
        raise fields.refusal("sliding_window_pattern", f"must be {pattern}, which is what engines compute")
    prefix = known.name + "."
    entries: list[Entry] = [(prefix + "attention.sliding_window", fields.size("sliding_window"), "uint32")]
    final = fields.optional_number("final_logit_softcapping")
    if known.name == "gemma2":
        caps = fields.optional_number("attn_logit_softcapping")
        if caps is None or final is None:
            raise fields.refusal("attn_logit_softcapping", "and final_logit_softcapping must be numbers for gemma2")
        entries.append((prefix + "attn_logit_softcapping", caps, "float32"))
    if final is not None:
        entries.append((prefix + "final_logit_softcapping", final, "float32"))
    return entries
