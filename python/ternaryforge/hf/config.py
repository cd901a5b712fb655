# SPDX-License-Identifier: Apache-2.0
"""`TernaryForgeConfig`: the `quantization_config` of checkpoints that only this library reads."""

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ternaryforge.formats import Scheme
from ternaryforge.quantization import Quantization, ScaleKind, parse_quantization
from ternaryforge.torch.qat import QATConfig, read_stamp


class TernaryForgeConfig(QuantizationConfigMixin):
    """How linear layers are stored, or are to be made from a dense checkpoint at load.

    Where plain transformers computes the same, one scale a tensor and int8 inputs, `save_pretrained` writes a stock
    `bitnet` checkpoint; else `quant_method: ternaryforge`, which needs `import ternaryforge.hf` before it is loaded.

    Args:
        scale: `tensor`, `row` or `group`.
        group_size: Columns of a group, a multiple of 64.
        activation_bits: Of the inputs of ternary layers: 8, for models trained with int8 inputs; 16, within 1e-3 of
            float and faster; None, float.
        modules_to_not_convert: Modules that stay dense, as transformers matches names.
        scheme: How dense weights are rounded at load: `ls`, `absmean`, `absmax` or `twn`. Not stored.
        fields: Those of a checkpoint of latents (`quantization_mode: online`).

    Raises FormatError, a ValueError, for settings that are not known or do not fit.
    """

    def __init__(
        self,
        scale: ScaleKind = "group",
        group_size: int = 128,
        activation_bits: int | None = 16,
        modules_to_not_convert: list[str] | None = None,
        scheme: Scheme = "ls",
        **fields: Any,
    ) -> None:
        fields.pop("quant_method", None)
        self.quant_method: Any = "ternaryforge"
        self.scale = scale
        if scale == "group":
            self.group_size = group_size
        self.activation_bits = activation_bits
        self.modules_to_not_convert = ["lm_head"] if modules_to_not_convert is None else list(modules_to_not_convert)
        self._scheme: Scheme = scheme
        for name, value in fields.items():
            setattr(self, name, value)
        self._latents = read_stamp(self._fields())
        if self._latents is None:
            self.parsed()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As of the base class, for what config.json holds: what is absent there means one scale and float."""
        stored = {"scale": "tensor", "activation_bits": None, **config_dict}
        return super().from_dict(stored, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    @property
    def scheme(self) -> Scheme:
        """How dense weights are rounded at load."""
        return self._scheme

    @property
    def latents(self) -> QATConfig | None:
        """How a checkpoint of latents is trained, None for packed ones."""
        return self._latents

    @property
    def is_stock(self) -> bool:
        """Whether plain transformers computes the same from packed bytes."""
        return self._latents is None and (self.scale, self.activation_bits) == ("tensor", 8)

    def parsed(self) -> Quantization:
        """What it says of packed layers."""
        found = parse_quantization({"quantization_config": self._fields()}, where="TernaryForgeConfig")
        assert found is not None  # noqa: S101 # there are fields
        return found

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        if self.is_stock:
            method = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
            return {**method, "modules_to_not_convert": list(self.modules_to_not_convert)}
        return self._fields()

    def _fields(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
