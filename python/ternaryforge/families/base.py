# SPDX-License-Identifier: Apache-2.0
"""What a model family is, and how its config.json becomes a `ModelSpec` with names of tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.bit_map import Mode
from ternaryforge.families.fields import Activation, Fields
from ternaryforge.families.rope import Rotation, read_rotation
from ternaryforge.latents import LatentRule
from ternaryforge.quantization import Quantization, parse_quantization

LINEAR_SLOTS = ("query", "key", "value", "output", "gate", "up", "down")
"""The last part of the slots that hold linear layers."""

TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.attention_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.query": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.key": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.value": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.query_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.key_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "layers.output": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.ffn_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.gate": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.up": "model.layers.{i}.mlp.up_proj.weight",
    "layers.down": "model.layers.{i}.mlp.down_proj.weight",
}
"""The tensors by slot that most families share, with `{i}` for the number of the layer."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a tensor that holds several slots: the first of them, and how many the tensor has."""

    first: int
    total: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model as its config.json describes it.

    `tensor_names` maps each slot of `spec.slots()` to the tensor of the checkpoint folder.
    `eos_ids` are the end tokens of the configuration. What few families have: `parts` are slots
    that are rows of a tensor which others share; `rules` say how float latents become weights;
    `pairs` are slots whose rows (or values) rotate as neighbours within heads of the size given,
    and are put into halves at load; `optional` are vectors that are zero where the file has none.
    """

    family: str
    architecture: str
    spec: _core.model.ModelSpec
    tensor_names: Mapping[str, str]
    tied_head: bool
    quantization: Quantization | None
    eos_ids: tuple[int, ...]
    parts: Mapping[str, Part] = field(default_factory=dict)
    rules: Mapping[str, LatentRule] = field(default_factory=dict)
    pairs: Mapping[str, int] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    def module_of(self, slot: str) -> str:
        """The module that holds a slot, e.g. `model.layers.0.mlp.up_proj`."""
        return self.tensor_names[slot].removesuffix(".weight")

    def is_linear(self, slot: str) -> bool:
        """Whether a slot is a linear layer of a block (the head and the embedding are not)."""
        return slot.rpartition(".")[2] in LINEAR_SLOTS

    def linear_modules(self) -> dict[str, str]:
        """The modules of the linear layers by slot."""
        return {slot: self.module_of(slot) for slot in self.spec.slots() if self.is_linear(slot)}

    def mode(self, slot: str) -> Mode | None:
        """The mode in which a matrix is stored, None where no bit map says it."""
        bit_map = None if self.quantization is None else self.quantization.bit_map
        if bit_map is None or not (self.is_linear(slot) or slot in ("embedding", "head")):
            return None
        return bit_map.mode(slot, self.module_of(slot))

    def is_ternary(self, slot: str) -> bool:
        """Whether the configuration promises ternary weights for a slot (or allows them)."""
        mode = self.mode(slot)
        if mode is not None:
            return mode == "ternary"
        if slot == "embedding":
            return self.quantization is not None and self.quantization.ternary_embeddings
        if self.quantization is None or not (self.is_linear(slot) or slot == "head"):
            return False
        return not self.quantization.keeps_dense(self.module_of(slot))


@dataclass(frozen=True, slots=True)
class Details:
    """What a family reads beyond the plain decoder: arguments of `LayerSpec` and `ModelSpec`.

    `windows` has a number for every layer, 0 for one that sees all tokens; none means all zero.
    """

    layer: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    windows: Sequence[int] = ()


def _plain_details(_fields: Fields, _layers: int) -> Details:
    return Details()


def _one_rotation(fields: Fields, head_dim: int, _window: int) -> Rotation:
    return read_rotation(fields, head_dim)


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: its names, its tensors, and the fields in which it differs from others.

    `activations` maps what `activation_field` may say to the core's name, the default first.
    `defaults` are the values that absent fields have in the family's class. `reads` are the fields
    that `details` (of the fields and the number of layers) and `rotation` (of the fields, the size
    of a head and the window) take beside the common ones; `neutral` adds fields that are accepted
    only at the values given. `quantization` is the quantization_config of files without one.
    `fused` are slots of a layer that lie in one tensor, one behind the other.
    """

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "silu"})
    activation_field: str = "hidden_act"
    norm_field: str = "rms_norm_eps"
    tensors: Mapping[str, str] = field(default_factory=lambda: TENSORS)
    reads: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    details: Callable[[Fields, int], Details] = _plain_details
    rotation: Callable[[Fields, int, int], Rotation] = _one_rotation
    quantization: Mapping[str, Any] | None = None
    fused: Sequence[Sequence[str]] = ()

    def read(self, config: dict[str, Any], *, where: str) -> Architecture:
        """Checks every field of a config.json and builds the specification."""
        fields = Fields(config, where, self.defaults)
        fields.refuse_unknown(self.reads | {self.activation_field}, self.neutral)
        tied_head = fields.flag("tie_word_embeddings")
        layer_count = fields.size("num_hidden_layers", limit=10_000)
        details = self.details(fields, layer_count)
        windows = details.windows or fields.windows(["full_attention"] * layer_count, None)
        layers = {window: self._layer(fields, details, window) for window in set(windows)}
        try:
            spec = _core.model.ModelSpec(
                vocab_size=fields.size("vocab_size"),
                hidden_size=fields.size("hidden_size"),
                context_length=fields.size("max_position_embeddings"),
                norm_epsilon=fields.number(self.norm_field),
                layers=[layers[window] for window in windows],
                tied_head=tied_head,
                **details.model,
            )
        except ValueError as error:
            raise FormatError(f"[config] '{where}': {error}") from None
        quantized = config
        if self.quantization is not None and config.get("quantization_config") is None:
            quantized = {"quantization_config": dict(self.quantization)}
        return Architecture(
            family=self.name,
            architecture=self.architecture,
            spec=spec,
            tensor_names={slot: self._tensor_name(slot) for slot in spec.slots()},
            tied_head=tied_head,
            quantization=parse_quantization(quantized, where=where),
            eos_ids=fields.token_ids("eos_token_id"),
            parts=find_parts(spec, self.fused),
        )

    def _layer(self, fields: Fields, details: Details, window: int) -> _core.model.LayerSpec:
        hidden_size = fields.size("hidden_size")
        heads = fields.size("num_attention_heads")
        head_dim = fields.size("head_dim", default=hidden_size // heads)
        if fields.get("head_dim") is None and hidden_size % heads:
            raise fields.refusal(
                "hidden_size", f"must be a multiple of num_attention_heads {heads} where there is no head_dim"
            )
        if head_dim % 2:
            raise fields.refusal("head_dim", f"must be even ({head_dim} by the other fields)")
        kv_heads = fields.size("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise fields.refusal("num_attention_heads", f"must be a multiple of num_key_value_heads {kv_heads}")
        rotation = self.rotation(fields, head_dim, window)
        return _core.model.LayerSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotation=rotation.frequencies,
            rotation_scale=rotation.scale,
            window=window,
            ffn_size=fields.size("intermediate_size"),
            activation=fields.activation(self.activation_field, self.activations),
            **details.layer,
        )

    def _tensor_name(self, slot: str) -> str:
        """The tensor of a slot; biases stand beside the weights."""
        layer, _, part = slot.rpartition(".")
        template = self.tensors[("layers." if layer else "") + part.removesuffix("_bias")]
        name = template.format(i=layer.removeprefix("layers."))
        return name.removesuffix("weight") + "bias" if part.endswith("_bias") else name


def find_parts(spec: _core.model.ModelSpec, groups: Sequence[Sequence[str]]) -> dict[str, Part]:
    """Where slots lie in tensors that hold several: each group of a layer in its order, biases too."""
    slots, parts = spec.slots(), {}
    layers = [slot.removesuffix("attention_norm") for slot in slots if slot.endswith(".attention_norm")]
    for layer in layers:
        for group in groups:
            for suffix in ("", "_bias"):
                names = [layer + name + suffix for name in group if layer + name + suffix in slots]
                sizes = [slots[name][1 if suffix else 0] for name in names]
                for i, name in enumerate(names):
                    parts[name] = Part(sum(sizes[:i]), sum(sizes))
    return parts
