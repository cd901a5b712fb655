# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings as data: the frequencies that `rope_parameters` or `rope_scaling` stands for.

Written from the papers (Su et al. 2021; YaRN, Peng et al. 2023) and checked against transformers.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ternaryforge.families.fields import Fields

Float64 = NDArray[np.float64]

_ORIGINAL = "original_max_position_embeddings"
# The fields of each kind, beside its name and the base.
_KINDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {
        "factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim", _ORIGINAL,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rotation:
    """`frequencies[i]` is the angle of pair i at position 1; cosines and sines are multiplied by `scale`."""

    frequencies: tuple[float, ...]
    scale: float = 1.0


def read_rotation(fields: Fields, head_dim: int, *, partial: bool = False) -> Rotation:
    """The rotation of a whole model, from whichever of the fields carries it.

    The base is that of the object, else `rope_theta`. The original context of a scaling is the
    field beside the object, else that in the object, else the context of the model. `partial`:
    `head_dim` is the part of a head that partial_rotary_factor says.
    """
    rope, other = fields.object("rope_scaling"), fields.object("rope_parameters")
    if rope is not None and other is not None:
        raise fields.refusal("rope_scaling", "cannot stand beside rope_parameters")
    original = fields.optional_size(_ORIGINAL)
    return make_rotation(rope or other, fields, head_dim, base_field="rope_theta", original=original, partial=partial)


def make_rotation(
    rope: Fields | None,
    fields: Fields,
    head_dim: int,
    *,
    base_field: str,
    original: int | None = None,
    partial: bool = False,
) -> Rotation:
    """The rotation of the object `rope` of a configuration, or the plain one.

    `fields` hold the base where `rope` does not, under `base_field`. `dynamic` equals `default` up
    to the context of the model, which no sequence here outgrows.
    """
    if rope is None:
        return Rotation(tuple(_plain(fields.number(base_field), head_dim).tolist()))
    name = "rope_type" if rope.get("rope_type") is not None else "type"
    kind = rope.get(name)
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in _KINDS:
        raise rope.refusal(name, f"must be one of {', '.join(_KINDS)}")
    for key in rope.names():
        neutral = key == "partial_rotary_factor" and (partial or rope.get(key) == 1)
        if key not in _KINDS[kind] | {"rope_type", "type", "rope_theta"} and not neutral:
            raise rope.refusal(key, f"is not supported with the rotation {kind!r}")
    theta = rope.optional_number("rope_theta") or fields.number(base_field)
    plain = _plain(theta, head_dim)
    if kind in ("default", "dynamic"):
        return Rotation(tuple(plain.tolist()))
    factor = rope.number("factor")
    if kind == "linear":
        return _rounded(plain / factor)
    original = original or rope.size(_ORIGINAL, default=fields.size("max_position_embeddings"))
    if kind == "llama3":
        return _rounded(_llama3(plain, rope, factor, original))
    if theta <= 1:
        raise rope.refusal("rope_theta", "must be above 1 for yarn")
    return _rounded(_yarn(plain, rope, factor, original, theta), _yarn_scale(rope, factor))


def _rounded(frequencies: Float64, scale: float = 1.0) -> Rotation:
    return Rotation(tuple(frequencies.astype(np.float32).tolist()), scale)


def _plain(theta: float, head_dim: int) -> Float64:
    """theta^(-2i / head_dim) for i < head_dim / 2, rounded to float32 after each step, as transformers does."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    with np.errstate(over="ignore", divide="ignore"):
        powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
        return np.asarray(1 / powers, np.float64)


def _blend(plain: Float64, factor: float, kept: Float64) -> Float64:
    """Plain frequencies where `kept` is 1 or more, slowed by `factor` where it is 0 or less."""
    kept = np.clip(kept, 0, 1)
    return kept * plain + (1 - kept) * plain / factor


def _llama3(plain: Float64, rope: Fields, factor: float, original: int) -> Float64:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.refusal("high_freq_factor", f"must be above low_freq_factor {low}")
    turns = original * plain / (2 * math.pi)  # over the original context
    return _blend(plain, factor, (turns - low) / (high - low))


def _yarn(plain: Float64, rope: Fields, factor: float, original: int, theta: float) -> Float64:
    """Pairs that turn less than beta_slow times over the original context are slowed, fast ones kept."""
    head_dim = 2 * plain.size

    def pair_of(turns: float) -> float:
        """The (fractional) pair that turns so many times over the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_of(rope.optional_number("beta_fast") or 32)
    high = pair_of(rope.optional_number("beta_slow") or 1)
    if rope.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return _blend(plain, factor, 1 - (np.arange(plain.size, dtype=np.float64) - low) / (high - low))


def _yarn_scale(rope: Fields, factor: float) -> float:
    """What the longer context makes of the cosines and sines."""

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = rope.optional_number("attention_factor")
    numerator, denominator = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    if given is not None:
        return given
    if numerator is not None and denominator is not None:
        return magnitude(numerator) / magnitude(denominator)
    return magnitude(1.0)
