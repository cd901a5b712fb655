# SPDX-License-Identifier: Apache-2.0
"""Quantisation-aware training in place: linear layers change their class and keep all else.

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prepare_qat(model, QATConfig(quantizer="absmean", scale="tensor", activation_bits=8))
    ...                                     # any trainer, any optimizer
    model.save_pretrained("master")         # latents; export_bitnet("master", "out") packs them

Parameters, their names, hooks and the state of an optimizer stay; quantizers with learned scales add
parameters of their own, so prepare a model before its optimizer is made.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ternaryforge.quantization import ScaleKind
from ternaryforge.torch.quantizers import PassThrough, Quantizer, ScaleGradient, make_quantizer
from ternaryforge.torch.scale_blocks import ScaleBlocks

_Model = TypeVar("_Model", bound=nn.Module)

_ACTIVATION_FLOOR = 1e-5  # of the largest magnitude of a token, as in transformers
_ONLINE_CLASS = "AutoBitLinear"  # what transformers makes of a checkpoint of latents


@dataclass(frozen=True, slots=True)
class QATConfig:
    """How a model is trained.

    Args:
        quantizer: A name in `ternaryforge.torch.QUANTIZERS`.
        scale: `tensor`, `row` or `group`: which weights share a scale.
        group_size: Columns of a group; the last group of a row may be shorter. Only multiples of 64 can be exported.
        activation_bits: 8 rounds the inputs of every layer to int8 with one scale a token, None leaves them.
        targets: Modules to train as ternary, None for all linear layers that `skip` leaves. A pattern is a
            full name, its last parts (`q_proj`, `mlp.up_proj`), or either with `*`.
        skip: Modules that stay as they are, by the same patterns.
        ste_scale: Factor on the gradient of every latent weight.
        residual: Whether `set_residual` may add latents to the values (Arenas, arXiv:2601.07892).
        sub_norm: Patterns of targets that get an RMSNorm of their own on their input (SubLN).
        options: What the quantizer takes, such as `{"threshold": 0.75}` for `twn`.
    """

    quantizer: str = "absmean"
    scale: ScaleKind = "tensor"
    group_size: int = 128
    activation_bits: int | None = 8
    targets: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ("lm_head",)
    ste_scale: float = 1.0
    residual: bool = False
    sub_norm: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make_quantizer(self.quantizer, ScaleBlocks(4, 4, self.scale, max(4, self.group_size)), **self.options)
        ScaleBlocks(4, 4, self.scale, self.group_size)
        if self.activation_bits not in {8, None}:
            raise ValueError(f"[qat] activation_bits is 8 or None, got {self.activation_bits!r}")
        if not self.ste_scale > 0:
            raise ValueError(f"[qat] ste_scale is positive, got {self.ste_scale}")
        for name in ("targets", "skip", "sub_norm"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                raise TypeError(f"[qat] {name} is a sequence of patterns, got the text {patterns!r}")
            if patterns is not None:
                object.__setattr__(self, name, tuple(patterns))

    @property
    def is_stock(self) -> bool:
        """Whether transformers' own online `bitnet` computes the same forward pass."""
        return (
            (self.quantizer, self.scale, self.activation_bits) == ("absmean", "tensor", 8)
            and not self.residual
            and not self.sub_norm
        )

    def stamp(self, kept: list[str]) -> dict[str, Any]:
        """`quantization_config` of a checkpoint of latents whose modules `kept` are dense.

        Stock where transformers can compute it, so that a plain reload is no dense model by mistake; else
        `quant_method: ternaryforge` with all that the forward pass depends on.
        """
        if self.is_stock:
            method = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
            return {**method, "modules_to_not_convert": kept}
        fields: dict[str, Any] = {"quantizer": self.quantizer, "scale": self.scale}
        fields["activation_bits"] = self.activation_bits
        if self.scale == "group":
            fields["group_size"] = self.group_size
        if self.options:
            fields["options"] = dict(self.options)
        if self.sub_norm:
            fields["sub_norm"] = list(self.sub_norm)
        method = {"quant_method": "ternaryforge", "quantization_mode": "online"}
        return {**method, **fields, "modules_to_not_convert": kept}


def read_stamp(fields: dict[str, Any]) -> QATConfig | None:
    """The configuration that a `quantization_config` of latents stands for, None for any other.

    `skip` becomes the recorded list of dense modules. Raises ValueError for fields that are not known.
    """
    if fields.get("quantization_mode") != "online":
        return None
    kept = tuple(fields.get("modules_to_not_convert") or ("lm_head",))
    if fields.get("quant_method") == "bitnet":
        return QATConfig(skip=kept)
    known = {"quantizer", "scale", "group_size", "activation_bits", "options", "sub_norm"}
    ignored = {"quant_method", "quantization_mode", "modules_to_not_convert"}
    if unknown := sorted(set(fields) - known - ignored):
        raise ValueError(f"[qat] quantization_config holds fields that are not known: {', '.join(unknown)}")
    return QATConfig(skip=kept, **{name: fields[name] for name in known if name in fields})


class QATLinear(nn.Linear):
    """A linear layer whose forward pass sees quantised weights; made by `prepare_qat`, not by its constructor.

    `strength` None means quantised; a 0-dim tensor blends, x + strength (q(x) - x) for weights and
    inputs alike. `residual` None means none; a 0-dim tensor r adds r times the latents to the weights.
    """

    quantizer: Quantizer
    qat: QATConfig
    strength: Tensor | None
    residual: Tensor | None
    sub_norm: nn.RMSNorm | None

    def quantized_weight(self) -> Tensor:
        """The values [rows, cols] that the layer multiplies with, differentiable."""
        latent = self.weight.float()
        if hasattr(latent, "placements"):
            raise ValueError(
                "[qat] the latents are sharded over devices: a scale of a shard is not the scale of the matrix; "
                "use FSDP2 or DDP, which gather a layer before it runs, not tensor parallelism"
            )
        if self.qat.ste_scale != 1:
            latent = ScaleGradient.apply(latent, self.qat.ste_scale)
        blocks = self.quantizer.blocks
        values = blocks.join(self.quantizer(blocks.split(latent)))
        if self.strength is not None:
            values = torch.lerp(latent, values, self.strength)
        return values if self.residual is None else values + self.residual * latent

    def quantized_bias(self) -> Tensor | None:
        """What the layer adds to its outputs, [rows], or None."""
        bias = cast("Tensor | None", self.bias)
        if not self.quantizer.has_output_bias:
            return bias
        extra = self.quantizer.output_bias(self.quantizer.blocks.split(self.weight.float()))
        if self.strength is not None:
            extra = extra * self.strength
        return extra if bias is None else bias + extra

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 # nn.Linear's name
        """Quantised input times quantised weight, plus bias."""
        if self.sub_norm is not None:
            input = self.sub_norm(input)  # noqa: A001 # as above
        if self.qat.activation_bits is not None:
            input = quantize_activations(input, self.strength)  # noqa: A001 # as above
        return F.linear(input, self.quantized_weight(), self.quantized_bias())

    def extra_repr(self) -> str:
        """As of nn.Linear, and how it is trained."""
        return f"{super().extra_repr()}, scale={self.qat.scale}, activation_bits={self.qat.activation_bits}"


def quantize_activations(x: Tensor, strength: Tensor | None = None) -> Tensor:
    """Each token [..., cols] rounded to int8 and back: s = 127 / max|x|, round(s x) / s; gradient 1.

    In float32, whatever the dtype of x. `strength` blends as in `QATLinear`.
    """
    with torch.no_grad():
        floats = x.float()
        scale = 127 / floats.abs().amax(-1, keepdim=True).clamp(min=_ACTIVATION_FLOOR)
        rounded = ((floats * scale).round().clamp(-128, 127) / scale).to(x.dtype)
        if strength is not None:
            rounded = torch.lerp(x, rounded, strength.to(x.dtype))
    return cast("Tensor", PassThrough.apply(x, rounded))


def qat_layers(model: nn.Module) -> Iterator[tuple[str, QATLinear]]:
    """The layers that `prepare_qat` made, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QATLinear))


def linear_names(model: nn.Module, skip: list[str]) -> list[str]:
    """The linear layers of a model but those that are, or end with, a name in `skip`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == kept or name.endswith(f".{kept}") for kept in skip)
    ]


def prepare_qat(model: _Model, config: QATConfig | None = None) -> _Model:
    """Makes the linear layers of `model` train as `config` says, in place; returns the model.

    Every linear layer must be a target or be skipped. `model.config`, where there is one, is stamped with
    what the latents mean, so that a reload does not take them for dense weights.

    Raises ValueError or TypeError, and changes nothing, for: patterns that match no linear layer, a layer that
    several patterns match, latents in half precision, weights that are tied to another module, rows that
    cannot be packed, layers with a forward pass of their own, and a model that is prepared or quantised already.
    """
    config = config or QATConfig()
    targets = _choose(model, config)
    for name, module in targets.items():
        _check_layer(model, name, module)
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in targets]
    stamp = config.stamp(kept)
    before = getattr(getattr(model, "config", None), "quantization_config", None)
    if before is not None:
        check_resumed(before if isinstance(before, dict) else before.to_dict(), stamp)
    normed = _match(config.sub_norm, targets, "sub_norm")
    quantizers = {name: _make_quantizer(name, module, config) for name, module in targets.items()}
    for name, module in targets.items():
        _swap(module, config, quantizers[name], sub_norm=name in normed)
    model_config = getattr(model, "config", None)
    if model_config is not None:
        model_config.quantization_config = stamp
    return model


def _choose(model: nn.Module, config: QATConfig) -> dict[str, nn.Linear]:
    """The layers to train, after the strict check that each is named exactly once."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError("[qat] the model has no linear layers")
    # A head that shares its embedding's weight, or is absent, needs no `skip` to be left alone.
    present = tuple(pattern for pattern in config.skip if pattern != "lm_head" or _matches(pattern, linears))
    skipped = _match(present, linears, "skip")
    if config.targets is None:
        return {name: module for name, module in linears.items() if name not in skipped}
    chosen = _match(config.targets, linears, "targets")
    if both := sorted(chosen & skipped):
        raise ValueError(f"[qat] targets and skip both match '{both[0]}': a layer is trained or left, not both")
    if missed := sorted(linears.keys() - chosen - skipped):
        raise ValueError(
            f"[qat] neither targets nor skip matches '{missed[0]}'"
            + (f" and {len(missed) - 1} more" if len(missed) > 1 else "")
            + ": name every linear layer in one of them"
        )
    return {name: module for name, module in linears.items() if name in chosen}


def _match(patterns: tuple[str, ...], modules: dict[str, nn.Linear], option: str) -> set[str]:
    """The names that the patterns match, each by one of them."""
    taken: dict[str, str] = {}
    for pattern in patterns:
        names = _matches(pattern, modules)
        if not names:
            raise ValueError(f"[qat] {option}: the pattern '{pattern}' matches no linear layer")
        for name in names:
            if name in taken:
                raise ValueError(f"[qat] {option}: '{name}' is matched twice, by '{taken[name]}' and '{pattern}'")
            taken[name] = pattern
    return set(taken)


def _matches(pattern: str, modules: dict[str, nn.Linear]) -> list[str]:
    return [name for name in modules if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")]


def _check_layer(model: nn.Module, name: str, module: nn.Linear) -> None:
    """Refuses a layer that cannot be trained as ternary."""
    if isinstance(module, QATLinear):
        raise ValueError(f"[qat] '{name}' is prepared already: prepare a model once")  # noqa: TRY004 # a state
    online = type(module).__name__ == _ONLINE_CLASS and getattr(module, "online_quant", False)
    if type(module) is not nn.Linear and not online:
        raise TypeError(
            f"[qat] '{name}' is a {type(module).__name__}, whose own forward pass would be lost: list it in skip"
        )
    if module.weight.dtype != torch.float32:
        raise ValueError(
            f"[qat] '{name}' has latents in {module.weight.dtype}: most updates of a training step are smaller than "
            "half its precision and would be lost; load the model with dtype=torch.float32 and, for speed, "
            "use autocast (bf16=True in a Trainer)"
        )
    if hasattr(module.weight, "placements"):
        raise ValueError(f"[qat] '{name}' is sharded over devices: prepare the model first, then shard it")
    if module.out_features % 4:
        raise ValueError(
            f"[qat] '{name}' has {module.out_features} rows; four rows share a byte when packed, so their number must "
            "be a multiple of 4: list it in skip"
        )
    for other_name, other in model.named_modules():
        if other is not module and any(parameter is module.weight for parameter in other.parameters(recurse=False)):
            raise ValueError(
                f"[qat] the weight of '{name}' is tied to '{other_name}', which would become ternary with it: "
                f"list '{name}' in skip, or untie them"
            )


def check_resumed(fields: dict[str, Any], stamp: dict[str, Any]) -> None:
    """Refuses latents that were trained in another way, and weights that are packed: ValueError.

    `fields` is the `quantization_config` of what is resumed, `stamp` what it should be.
    """
    for name in [*stamp, *(name for name in ("group_size", "options", "sub_norm") if name not in stamp)]:
        value, stored = stamp.get(name), fields.get(name)
        stored = getattr(stored, "value", stored)  # transformers keeps an enumeration
        same = set(stored or ()) == set(value or ()) if name == "modules_to_not_convert" else stored == value
        if not same:
            raise ValueError(
                f"[qat] the checkpoint was made with {name} = {stored!r}, not {value!r}: resume with the "
                "configuration that it was trained with, or start from the dense model"
            )


def _make_quantizer(name: str, module: nn.Linear, config: QATConfig) -> Quantizer:
    """A quantizer with its learned values set from the latents; on the meta device they come with the checkpoint."""
    blocks = ScaleBlocks(module.out_features, module.in_features, config.scale, config.group_size)
    try:
        with module.weight.device:
            quantizer = make_quantizer(config.quantizer, blocks, **config.options)
    except ValueError as error:
        raise ValueError(f"{error} (layer '{name}')") from None
    if module.weight.is_meta:
        return quantizer
    with torch.no_grad():
        latents = blocks.split(module.weight.detach().clone())
        if not torch.isfinite(latents).all():
            raise ValueError(f"[qat] the weight of '{name}' holds NaN or infinity")
        quantizer.initialise(latents)
        module.weight.copy_(blocks.join(latents))
    return quantizer


def _swap(module: nn.Linear, config: QATConfig, quantizer: Quantizer, *, sub_norm: bool) -> None:
    module.__class__ = QATLinear
    layer = cast("QATLinear", module)
    layer.qat = config
    layer.quantizer = quantizer
    layer.register_buffer("strength", None, persistent=False)
    layer.register_buffer("residual", None, persistent=False)
    with module.weight.device:
        layer.sub_norm = nn.RMSNorm(module.in_features, eps=_ACTIVATION_FLOOR) if sub_norm else None
