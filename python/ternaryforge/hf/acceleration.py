# SPDX-License-Identifier: Apache-2.0
"""Two switches for people who have a ternary model in transformers already: `accelerate_bitnet` and `optimize`."""

from types import TracebackType
from typing import Any, Self, TypeVar, cast

from transformers import BitNetQuantConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from ternaryforge.hf.config import TernaryForgeConfig
from ternaryforge.hf.quantizer import AcceleratedBitNetQuantizer, forget_unpacking, settle_linear_class
from ternaryforge.torch import QATConfig
from ternaryforge.torch.head import HeadBits
from ternaryforge.torch.qat import read_stamp
from ternaryforge.torch.replacement import has_packed_layers, optimize_layers, quantize_head

_Model = TypeVar("_Model")


class BitNetAcceleration:
    """What `accelerate_bitnet` returns: in force from the start, ended by `end()` or by leaving a `with` block."""

    def __init__(self) -> None:
        self._previous = AUTO_QUANTIZER_MAPPING["bitnet"]
        AUTO_QUANTIZER_MAPPING["bitnet"] = AcceleratedBitNetQuantizer

    def end(self) -> None:
        """Restores what was before."""
        AUTO_QUANTIZER_MAPPING["bitnet"] = self._previous

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def accelerate_bitnet() -> BitNetAcceleration:
    """From now on, `from_pretrained` loads stock `bitnet` checkpoints onto our kernels.

    with accelerate_bitnet():                # or without `with`, for the rest of the process
        model = AutoModelForCausalLM.from_pretrained(folder)

    Both linear classes, packed or latent; `save_pretrained` writes a stock packed checkpoint. Latents are packed for
    good, so do not load with it what you go on training. The head stays as it is: see `optimize`.
    """
    return BitNetAcceleration()


def optimize(model: _Model, *, head: HeadBits | None = 8) -> _Model:
    """Moves the ternary layers of a loaded model to our kernels, in place, and its head; returns the model.

    Args:
        model: Loaded with or without `accelerate_bitnet`, or in training by `prepare_qat`. Latents are packed for
            good: the model's quantization_config then says so, and `save_pretrained` writes a packed checkpoint.
        head: Bits of the output head, which is read whole for every token; None leaves it. A head with a bias or
            with ternary weights stays as it is. Its weight is kept beside the quantized copy.

    Raises ValueError for a model without ternary layers, and for layers that would compute something else.
    """
    module = cast("Any", model)
    config = getattr(model, "config", None)
    fields = getattr(config, "quantization_config", None)
    stored = fields if fields is None or isinstance(fields, dict) else fields.to_dict()
    trained = read_stamp({name: getattr(v, "value", v) for name, v in stored.items()}) if stored else None
    replaced = optimize_layers(module)
    if not has_packed_layers(module):
        raise ValueError("[optimize] the model has no ternary layers: load a ternary checkpoint, or convert it first")
    forget_unpacking(model)
    if replaced and stored is not None:
        _describe(model, config, fields, trained)
    if head is not None:
        quantize_head(module, head)
    return model


def _describe(model: Any, config: Any, fields: Any, trained: QATConfig | None) -> None:
    """Makes config.json say what `save_pretrained` will write."""
    if trained is not None and not trained.is_stock:
        config.quantization_config = TernaryForgeConfig(
            trained.scale, trained.group_size, trained.activation_bits, modules_to_not_convert=list(trained.skip)
        )
        return
    if trained is not None:
        fields = BitNetQuantConfig(linear_class="bitlinear", modules_to_not_convert=list(trained.skip))
        config.quantization_config = fields
    settle_linear_class(model, fields)
