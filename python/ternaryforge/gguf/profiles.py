# SPDX-License-Identifier: Apache-2.0
"""Which tensor types a profile writes, and which of them holds a given ternary layer exactly."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ternaryforge.gguf.architectures import BITNET_B158, GgufArchitecture
from ternaryforge.quantization import ScaleKind

ProfileName = Literal["upstream", "portable", "ik", "bitnetcpp", "bonsai"]


@dataclass(frozen=True, slots=True)
class TernaryType:
    """What a type needs of a layer. `scope`: what shares a scale; for blocks, `block` columns.

    `half`: scales are stored as f16, else as f32. `least_cols`: engines refuse less.
    """

    name: str
    block: int
    scope: Literal["block", "row", "tensor"]
    half: bool = True
    least_cols: int = 0

    def fits(self, cols: int, kind: ScaleKind, group_size: int) -> bool:
        """Whether a layer with `cols` columns and such scales can be stored, apart from their precision."""
        if cols % self.block or cols < self.least_cols:
            return False
        if kind == "group":
            return self.scope == "block" and group_size % self.block == 0
        return kind == "tensor" or self.scope != "tensor"


TYPES = {
    known.name: known
    for known in (
        TernaryType("TQ2_0", 256, "block"),
        TernaryType("TQ1_0", 256, "block"),
        TernaryType("Q2_K", 256, "block"),
        TernaryType("PQ2_0", 128, "block"),
        TernaryType("PTQ1_0", 128, "block"),
        TernaryType("Q2_0", 64, "block"),
        TernaryType("Q4_0", 32, "block"),
        TernaryType("IQ2_BN", 64, "row", half=False, least_cols=512),
        TernaryType("IQ1_BN", 64, "row", least_cols=512),
        TernaryType("I2_S", 128, "tensor", half=False),
    )
}

FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q2_K": 10, "TQ1_0": 36, "TQ2_0": 37, "Q2_0": 41, "I2_S": 40,
    "IQ1_BN": 136, "IQ2_BN": 137,
}  # fmt: skip
"""`general.file_type` of a file whose layers mostly have a type."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Types in the order in which they are tried. `choices`: types that may be put first instead.

    `sidecars`: a scale that f16 cannot hold may lie in a `.scale` tensor. `relu2`: the engine runs
    models with a squared ReLU.
    """

    name: ProfileName
    engine: str
    types: tuple[str, ...]
    choices: tuple[str, ...]
    sidecars: bool = False
    relu2: bool = False


PROFILES: dict[str, Profile] = {
    known.name: known
    for known in (
        Profile("upstream", "llama.cpp", ("TQ2_0", "Q2_0", "Q4_0"), ("TQ1_0", "Q2_0"), sidecars=True),
        Profile("portable", "llama.cpp of any age, ik_llama.cpp, ollama, LM Studio", ("Q2_K", "Q4_0"), ("Q4_0",)),
        Profile("ik", "ik_llama.cpp", ("IQ2_BN", "Q4_0"), ("IQ1_BN", "Q2_K"), relu2=True),
        Profile("bitnetcpp", "bitnet.cpp", ("I2_S", "Q4_0"), (), relu2=True),
        Profile("bonsai", "PrismML's llama.cpp", ("PQ2_0", "Q4_0"), ("Q2_0",)),
    )
}

Scales = tuple[ScaleKind, int, NDArray[np.float32]]
"""Kind, group size and scales of a ternary layer."""

LATE_IN_BITNET_CPP = frozenset({"qwen3", "gemma3"})
"""Architectures that bitnet.cpp took over with a newer llama.cpp in July 2026."""

_SMALL_PADDING = 8  # a first choice of type may make the feed-forward part larger by one part in so many


@dataclass(frozen=True, slots=True)
class Storage:
    """How a layer is stored: the type, and whether its scale lies beside it, with 1 in its blocks."""

    type_name: str
    sidecar: bool = False


def refuse_architecture(profile: Profile, architecture: GgufArchitecture, *, tied: bool) -> str | None:
    """Why the engines of a profile cannot run an architecture, None where they can."""
    if architecture is BITNET_B158 and not profile.relu2:
        return (
            "its feed-forward part has a squared ReLU, for which these engines compute SiLU: the file would load and "
            "print garbage; use profile 'ik' or 'bitnetcpp'"
        )
    if architecture.name.startswith("bitnet") and not tied:
        return "these engines take the embedding as the head of this architecture, but the model has a head of its own"
    return None


def warn_of(profile: Profile, architecture: GgufArchitecture, types: Collection[str]) -> list[str]:
    """What a user should know of a file with such an architecture and types, in whole sentences."""
    notes = []
    if profile.name == "bitnetcpp" and architecture.name in LATE_IN_BITNET_CPP:
        notes.append(f"Builds of bitnet.cpp before July 2026 do not know the architecture '{architecture.name}'.")
    if profile.name == "upstream" and "Q2_0" in types:
        notes.append(
            "Q2_0 needs a build of llama.cpp of 2026, and is slow on x86 CPUs: ternary_type 'Q4_0' (--type Q4_0) is "
            "faster there, as exact, and twice as large."
        )
    return notes


def type_order(profile: Profile, first: str | None) -> tuple[TernaryType, ...]:
    """The types to try, `first` before all. Raises ValueError for one that the profile does not have."""
    allowed = (*profile.types, *profile.choices)
    if first is not None and first.upper() not in allowed:
        raise ValueError(
            f"[export] ternary_type of profile '{profile.name}' is one of {', '.join(dict.fromkeys(allowed))}, "
            f"got {first!r}"
        )
    names = profile.types if first is None else (first.upper(), *profile.types)
    return tuple(TYPES[name] for name in dict.fromkeys(names))


def choose_storage(
    profile: Profile,
    types: tuple[TernaryType, ...],
    cols: int,
    scales: Scales,
    *,
    inline: bool,
) -> Storage | None:
    """The first type that holds a layer exactly, or with rounded scales where `inline` allows it; None: none does."""
    kind, group_size, values = scales
    half_exact = is_half_exact(values)
    for known in types:
        if not known.fits(cols, kind, group_size):
            continue
        if not known.half or half_exact or inline:
            return Storage(known.name)
        if profile.sidecars and kind == "tensor":
            return Storage(known.name, sidecar=True)
    return None


def padded_size(types: tuple[TernaryType, ...], size: int) -> int:
    """The number of columns to which a feed-forward part is padded so that some type holds it.

    The earliest type whose padding is small; else the one with the least.
    """
    sizes = [max(-(-size // known.block) * known.block, known.least_cols) for known in types]
    small = [padded for padded in sizes if (padded - size) * _SMALL_PADDING <= size]
    return small[0] if small else min(sizes)


def is_half_exact(values: NDArray[np.float32]) -> bool:
    """Whether f16 holds every value."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    return bool(np.array_equal(halves.astype(np.float32), values))
