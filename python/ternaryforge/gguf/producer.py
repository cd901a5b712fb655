# SPDX-License-Identifier: Apache-2.0
"""Who made a GGUF file, and which engines load it, which refuse it, and which would print garbage."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ternaryforge import _core
from ternaryforge.gguf.profiles import LATE_IN_BITNET_CPP

VERSION = "ternaryforge.version"
_ENGINES = ("llama.cpp", "ik_llama.cpp", "bitnet.cpp", "PrismML llama.cpp")
_PRISM = {"PQ2_0", "PTQ1_0"}
_IK = {"IQ1_BN", "IQ2_BN"}
_MICROSOFT = {"I2_S", "TL1", "TL2"}
_BITNET_B158 = {"bitnet-b1.58", "bitnet-25"}


@dataclass(frozen=True, slots=True)
class Producer:
    """`name` is what made the file; `clues` are whole sentences that say what tells."""

    name: str
    clues: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Engine:
    """What an engine does with a file: "runs", "refuses", "crashes" or "garbage", and why."""

    name: str
    verdict: str
    reason: str


def tensor_types(file: _core.io.GgufFile) -> Counter[str]:
    """How many tensors have each type."""
    return Counter(tensor.type_name for tensor in file.tensors.values())


@dataclass(frozen=True, slots=True)
class _Facts:
    """What engines look at. `tied`: the file has no head of its own."""

    architecture: str
    types: Mapping[str, int]
    metadata: Mapping[str, Any]
    has_scales: bool
    tied: bool

    def has(self, types: Iterable[str]) -> str | None:
        """The first of some types that occurs."""
        return next((name for name in sorted(types) if name in self.types), None)

    @property
    def is_rotated(self) -> bool:
        return any(key.startswith("prism.hadamard.") for key in self.metadata)


def describe_producer(file: _core.io.GgufFile) -> Producer:
    """Who made a file, from its own words, its types and its names."""
    metadata = file.metadata
    types = tensor_types(file)
    architecture = metadata.get("general.architecture")
    if VERSION in metadata:
        found = Producer(f"ternaryforge {metadata[VERSION]}", (f"The key {VERSION} says so.",))
    elif any(key.startswith("prism.") for key in metadata) or types.keys() & _PRISM:
        found = Producer("PrismML llama.cpp", ("It has keys or tensor types of PrismML's fork.",))
    elif types.keys() & _IK:
        found = Producer("ik_llama.cpp", ("Its IQ1_BN and IQ2_BN tensors are that engine's own.",))
    elif types.keys() & _MICROSOFT:
        clues = ["I2_S, TL1 and TL2 are types of bitnet.cpp."]
        if metadata.get("tokenizer.ggml.pre") is None:
            clues.append("It has no tokenizer.ggml.pre, as the official file of BitNet-b1.58-2B-4T.")
        found = Producer("bitnet.cpp", tuple(clues))
    elif architecture in _BITNET_B158:
        found = Producer("bitnet.cpp or ik_llama.cpp", (f"The architecture '{architecture}' is known there only.",))
    elif "general.quantization_version" in metadata or "general.file_type" in metadata:
        found = Producer("llama.cpp", ("It has the keys that llama.cpp's converter writes, and no other.",))
    else:
        found = Producer("unknown", ("Nothing in the file tells who made it.",))
    by = metadata.get("general.quantized_by")
    return found if not isinstance(by, str) else Producer(found.name, (*found.clues, f"Quantized by {by[:80]!r}."))


def judge_engines(file: _core.io.GgufFile) -> tuple[Engine, ...]:
    """What each engine does with a file, as far as its header tells."""
    facts = _Facts(
        architecture=str(file.metadata.get("general.architecture")),
        types=tensor_types(file),
        metadata=file.metadata,
        has_scales=any(name.endswith(".scale") for name in file.tensors),
        tied="output.weight" not in file.tensors,
    )
    judges = (_upstream, _ik, _microsoft, _prism)
    return tuple(Engine(name, *judge(facts)) for name, judge in zip(_ENGINES, judges, strict=True))


def _upstream(facts: _Facts) -> tuple[str, str]:
    """Also ollama, LM Studio and llama-cpp-python, which have it inside."""
    refusal = None
    if foreign := facts.has(_PRISM | _IK | _MICROSOFT):
        refusal = f"It does not know the type {foreign} (nor do ollama and LM Studio)."
    elif facts.architecture in _BITNET_B158:
        refusal = f"It does not know the architecture '{facts.architecture}'."
    elif facts.metadata.get("tokenizer.ggml.pre") == "falcon_e":
        refusal = "tokenizer.ggml.pre 'falcon_e' is bitnet.cpp's name for 'falcon-h1'."
    elif facts.architecture == "bitnet" and not facts.tied:
        refusal = "It takes no 'output.weight' for this architecture."
    if refusal is not None:
        return "refuses", refusal
    if facts.is_rotated:
        return "garbage", "The weights are stored rotated, and it does not rotate activations."
    if facts.metadata.get("bitnet.hidden_activation") == "relu2":
        return "garbage", "The model needs a squared ReLU; it computes SiLU for 'bitnet'."
    notes = ["Files with .scale tensors need a build of about March 2026 or later."] if facts.has_scales else []
    if "Q2_0" in facts.types:
        notes.append("Q2_0 needs a build of 2026 and is slow on x86.")
    return "runs", " ".join(notes)


def _ik(facts: _Facts) -> tuple[str, str]:
    if crashing := facts.has({"TQ1_0", "TQ2_0", "Q2_0"}):
        return "crashes", f"It divides by zero on the type {crashing}; do not feed it this file."
    if facts.has(_PRISM | {"TL1", "TL2"}):
        return "refuses", "It does not know the types of its tensors."
    if "I2_S" in facts.types:
        verdict = "garbage" if facts.architecture in _BITNET_B158 else "crashes"
        return verdict, "I2_S must be requantised first: llama-quantize --allow-requantize IN OUT iq2_bn."
    if facts.has_scales and facts.architecture != "bitnet":
        return "refuses", "It does not know the .scale tensors."
    return "runs", ""


def _microsoft(facts: _Facts) -> tuple[str, str]:
    if facts.has(_IK | _PRISM | {"Q2_0", "Q1_0"}):
        return "refuses", "It does not know the types of its tensors."
    if facts.has_scales:
        return "refuses", "It does not know the .scale tensors."
    if facts.architecture in LATE_IN_BITNET_CPP:
        return "refuses", f"Builds before July 2026 do not know the architecture '{facts.architecture}'."
    if facts.architecture in _BITNET_B158:
        reason = (
            "Right in x86 builds of April 2025 to about May 2026. Builds since July 2026 compute SiLU for a squared "
            "ReLU, and ARM builds since January 2026 read I2_S in another order: both print garbage."
        )
        return "runs", reason
    if "I2_S" in facts.types:
        return "runs", "Not in ARM builds since January 2026, which read I2_S in another order: garbage."
    return "runs", ""


def _prism(facts: _Facts) -> tuple[str, str]:
    if facts.has(_PRISM):
        return "runs", ""
    return ("runs", "It rotates activations as the file asks.") if facts.is_rotated else _upstream(facts)
