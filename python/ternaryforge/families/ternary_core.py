# SPDX-License-Identifier: Apache-2.0
"""Ternary-Core: a decoder with a config.json of its own, whose file holds the latents of its training.

What absent fields mean, the names of tensors and the rules of rounding: docs/reference/ternary-core.md.
"""

import logging
import re
from typing import Any

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.families.base import Architecture, find_parts
from ternaryforge.families.fields import Activation, Fields
from ternaryforge.families.rope import make_rotation
from ternaryforge.latents import LatentRule
from ternaryforge.quantization import parse_quantization

NAME = "ternary-core"
_log = logging.getLogger(__name__)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "hidden_size": 512,
    "num_heads": 8,
    "num_layers": 6,
    "intermediate_size": 2048,
    "max_seq_len": 512,
    "layer_norm_eps": 1e-5,
    "latent_clamp_max": 1.5,
    "rope_theta": 10000.0,  # not a field: the family has one base
}
_SWITCHES = {  # with their defaults
    "use_swiglu": False,
    "use_relu2": False,
    "use_rope": False,
    "use_qk_norm": True,
    "use_subln": True,
    "use_residual_scaling": True,
    "use_dynamic_threshold": True,
    "tie_word_embeddings": True,
}
_TRAINING = {
    "ste_scale_factor", "latent_clip_max_training", "anneal_fraction", "arenas_initial", "arenas_anneal_steps",
}  # fmt: skip
_TELLING = {
    "num_heads", "num_layers", "max_seq_len", "use_ternary", "layer_bit_map", "latent_clamp_max",
    *_TRAINING, *_SWITCHES,
} - {"tie_word_embeddings", "use_qk_norm"}  # fmt: skip
_FOREIGN = {"architectures", "model_type", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"}
_READ = {
    "vocab_size", "hidden_size", "intermediate_size", "layer_norm_eps", "eos_token_id", "bos_token_id",
    "quantization_config",
}  # fmt: skip
_MODES = {"f16": "f16", "8bit": "8bit", "eightbit": "8bit", "int8": "8bit", "ternary": "ternary", "binary": "binary"}
_TENSORS = {
    "embedding": "wte.weight",
    "position_embedding": "wpe.weight",
    "final_norm": "ln_f.weight",
    "head": "lm_head.weight",
    "attention_norm": "ln1.weight",
    "query": "attn.c_attn.weight",
    "key": "attn.c_attn.weight",
    "value": "attn.c_attn.weight",
    "query_norm": "attn.q_norm.weight",
    "key_norm": "attn.k_norm.weight",
    "output": "attn.c_proj.weight",
    "ffn_norm": "ln2.weight",
}
_PLAIN = {"up": "mlp.c_fc.weight", "down": "mlp.c_proj.weight"}
_GATED = {"gate": "mlp.w_gate.weight", "up": "mlp.w_up.weight", "down": "mlp.w_down.weight"}


def is_ternary_core(config: dict[str, Any], *, where: str) -> bool:
    """Whether a config.json is of this family: it has fields of it, and none that names another.

    Raises FormatError for one that has both.
    """
    present = {name for name, value in config.items() if value is not None}
    telling, foreign = sorted(present & _TELLING), sorted(present & _FOREIGN)
    if telling and foreign:
        raise FormatError(
            f"[config] '{where}': {telling[0]} belongs to Ternary-Core and {foreign[0]} to a Hugging Face model; "
            "remove the fields of one of them"
        )
    return bool(telling)


def read_ternary_core(config: dict[str, Any], *, where: str) -> Architecture:
    """Checks every field and builds the specification. Raises FormatError as families do."""
    fields = Fields(config, where, DEFAULTS)
    for name in config:
        if name not in _TELLING | _READ | set(_SWITCHES) and not name.startswith("_"):
            raise fields.refusal(name, "is no field of Ternary-Core")
    switches = {name: fields.flag(name, default=default) for name, default in _SWITCHES.items()}
    layer_count = fields.size("num_layers", limit=10_000)
    embedding, modes, head = _read_modes(fields, layer_count)
    if "binary" in modes:
        _log.warning("'%s': weights of binary layers are -1 and +1, their activations stay floats", where)
    tied = switches["tie_word_embeddings"]
    layers = {mode: _layer(fields, switches, mode) for mode in set(modes)}
    try:
        spec = _core.model.ModelSpec(
            vocab_size=fields.size("vocab_size"),
            hidden_size=fields.size("hidden_size"),
            context_length=fields.size("max_seq_len"),
            norm_epsilon=fields.number("layer_norm_eps"),
            layers=[layers[mode] for mode in modes],
            tied_head=tied and head == embedding,
            position_embedding=not switches["use_rope"],
        )
    except ValueError as error:
        raise FormatError(f"[config] '{where}': {error}") from None
    slots = spec.slots()
    names = _TENSORS | (_GATED if switches["use_swiglu"] else _PLAIN) | ({"head": "wte.weight"} if tied else {})
    rules = {}
    for slot in slots:
        found = re.fullmatch(r"layers\.(\d+)\.(query|key|value|output|gate|up|down)", slot)
        mode = embedding if slot == "embedding" else head if slot == "head" else modes[int(found[1])] if found else ""
        if rule := _rule(fields, switches, mode, table=not found):
            rules[slot] = rule
    head_dim = fields.size("hidden_size") // fields.size("num_heads")
    turning = ("query", "key", "query_bias", "key_bias", "query_norm", "key_norm") if switches["use_rope"] else ()
    return Architecture(
        family=NAME,
        architecture="Ternary-Core",
        spec=spec,
        tensor_names={slot: _tensor_name(names, slot) for slot in slots},
        tied_head=tied and head == embedding,
        quantization=parse_quantization(config, where=where),
        eos_ids=fields.token_ids("eos_token_id"),
        parts=find_parts(spec, [("query", "key", "value")]),
        rules=rules,
        pairs={slot: head_dim for slot in slots if slot.rpartition(".")[2] in turning},
        optional=frozenset(slot for slot in slots if slot.endswith("_bias")),
    )


def _tensor_name(names: dict[str, str], slot: str) -> str:
    layer, _, part = slot.rpartition(".")
    name = names[part.removesuffix("_bias")]
    if part.endswith("_bias"):
        name = name.removesuffix("weight") + "bias"
    return f"h.{layer.removeprefix('layers.')}.{name}" if layer else name


def _layer(fields: Fields, switches: dict[str, bool], mode: str) -> _core.model.LayerSpec:
    hidden, heads = fields.size("hidden_size"), fields.size("num_heads")
    if hidden % heads:
        raise fields.refusal("hidden_size", f"must be a multiple of num_heads {heads}")
    head_dim = hidden // heads
    if switches["use_rope"] and head_dim % 2:
        raise fields.refusal("num_heads", f"must leave heads of even size for use_rope ({head_dim} by hidden_size)")
    if switches["use_qk_norm"] and not switches["use_subln"]:
        raise fields.refusal("use_subln", "must be true (RMSNorm) where use_qk_norm is true")
    rotation = make_rotation(None, fields, head_dim, base_field="rope_theta").frequencies
    swiglu = switches["use_swiglu"]
    activation: Activation = "silu" if swiglu or not switches["use_relu2"] else "relu2"
    biased = mode in ("f16", "8bit")  # such layers may have biases, the others never do
    return _core.model.LayerSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        rotation=rotation if switches["use_rope"] else (),
        ffn_size=fields.size("intermediate_size"),
        activation=activation,
        gated=swiglu,
        norm="rms" if switches["use_subln"] else "layer",
        residual_scale=0.5**0.5 if switches["use_residual_scaling"] else 1.0,
        projection_bias=biased,
        output_bias=biased,
        ffn_bias=biased,
        head_norms=switches["use_qk_norm"],
    )


def _read_modes(fields: Fields, layers: int) -> tuple[str, list[str], str]:
    """The modes of the embedding, of every layer and of the head."""
    bit_map = fields.object("layer_bit_map")
    if bit_map is None:
        ternary = fields.flag("use_ternary", default=True)
        return "f16", ["ternary" if ternary else "binary"] * layers, "f16"
    unknown = set(bit_map.names()) - {"embedding", "layer_modes", "lm_head"}
    if unknown:
        raise bit_map.refusal(min(unknown), "is no field of layer_bit_map")
    modes = bit_map.get("layer_modes")
    if not isinstance(modes, list) or len(modes) != layers:
        raise bit_map.refusal("layer_modes", f"must be a list of {layers} modes, one for each layer")
    embedding = _mode(bit_map, "embedding", bit_map.get("embedding") or "f16")
    head = bit_map.get("lm_head")
    return (
        embedding,
        [_mode(bit_map, "layer_modes", mode) for mode in modes],
        embedding if head is None else _mode(bit_map, "lm_head", head),
    )


def _mode(bit_map: Fields, name: str, value: Any) -> str:
    if not isinstance(value, str) or value.lower() not in _MODES:
        raise bit_map.refusal(name, f"may be {', '.join(dict.fromkeys(_MODES.values()))}")
    return _MODES[value.lower()]


def _rule(fields: Fields, switches: dict[str, bool], mode: str, *, table: bool) -> LatentRule | None:
    clamp = fields.number("latent_clamp_max")
    match mode:
        case "8bit":
            return LatentRule("int8")
        case "binary":
            return LatentRule("sign", clamp, rooted=not table)
        case "ternary":
            return LatentRule("threshold" if switches["use_dynamic_threshold"] else "round", clamp, rooted=not table)
    return None
