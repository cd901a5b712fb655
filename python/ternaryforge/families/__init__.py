# SPDX-License-Identifier: Apache-2.0
"""Model families: a config.json becomes a `ModelSpec` and a map of tensor names, or is refused."""

from typing import Any

from ternaryforge._core import FormatError
from ternaryforge.families.base import LINEAR_SLOTS, Architecture, Family
from ternaryforge.families.bitnet import BITNET
from ternaryforge.families.bitnet_llama import BITNET_LLAMA
from ternaryforge.families.fields import Fields
from ternaryforge.families.gemma import GEMMA
from ternaryforge.families.gemma2 import GEMMA2
from ternaryforge.families.gemma3 import GEMMA3
from ternaryforge.families.llama import LLAMA
from ternaryforge.families.mistral import MISTRAL
from ternaryforge.families.phi import PHI
from ternaryforge.families.phi3 import PHI3
from ternaryforge.families.qwen2 import QWEN2
from ternaryforge.families.qwen3 import QWEN3
from ternaryforge.families.ternary_core import is_ternary_core, read_ternary_core

FAMILIES = (LLAMA, BITNET, BITNET_LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI, PHI3)

__all__ = ["FAMILIES", "LINEAR_SLOTS", "Architecture", "Family", "family_of", "read_architecture"]


def family_of(config: dict[str, Any], *, where: str) -> Family:
    """The family of a Hugging Face config.json, by `architectures`, or by `model_type` where that is absent.

    Raises FormatError that names the architecture and what is supported.
    """
    names = config.get("architectures")
    supported = ", ".join(family.architecture for family in FAMILIES)
    if names:
        if not isinstance(names, list) or len(names) != 1:
            raise FormatError(f"[config] '{where}': architectures must name one, got {names!r}")
        for family in FAMILIES:
            if family.architecture == names[0]:
                if config.get("model_type", family.name) != family.name:
                    raise FormatError(
                        f"[config] '{where}': model_type {config['model_type']!r} does not belong to "
                        f"{family.architecture}"
                    )
                return family
        raise FormatError(
            f"[config] '{where}': the architecture {names[0]!r} is not supported; supported are {supported}"
        )
    for family in FAMILIES:
        if family.name == config.get("model_type"):
            return family
    raise FormatError(
        f"[config] '{where}': no supported architecture (model_type {config.get('model_type')!r}); "
        f"supported are {supported}"
    )


def read_architecture(config: dict[str, Any], *, where: str) -> Architecture:
    """Everything that a config.json says about the model. `where` names the file in errors.

    Raises FormatError for a missing or malformed field, and by name for a field that is unknown or
    has a value whose mathematics is not implemented.
    """
    Fields(config, where).refuse_rotated()
    if is_ternary_core(config, where=where):
        found = read_ternary_core(config, where=where)
    else:
        found = family_of(config, where=where).read(config, where=where)
    bit_map = None if found.quantization is None else found.quantization.bit_map
    if bit_map is not None:
        if found.rules:
            raise bit_map.refusal(f"the layers of {found.architecture} have modes of their own, in its layer_bit_map")
        bit_map.check(found.linear_modules(), len(found.spec.layers), tied_head=found.tied_head)
    return found
