# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors.

    adapters = load_adapter("my-adapter", architecture)      # for `_core.model.Transformer`

An adapter adds scaling * B A to a linear layer of the blocks, in floats beside the ternary weights.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge._core import FormatError
from ternaryforge.checkpoint import Checkpoint, read_json
from ternaryforge.families import Architecture
from ternaryforge.weights import taken_rows

Float32 = NDArray[np.float32]
Adapters = dict[str, tuple[Float32, Float32, float]]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_READ = {"peft_type", "r", "lora_alpha", "use_rslora"}
# Training, bookkeeping, and which modules there are: the tensors say that too.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "peft_version",
    "qalora_group_size", "ensure_weight_tying", "loftq_config", "eva_config", "corda_config", "runtime_config",
}  # fmt: skip
# Other ways to begin change the weights of the base model, which is then not the published one.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.\w+)?\.weight")


def load_adapter(folder: Path, architecture: Architecture) -> Adapters:
    """A [rank, cols], B [rows, rank] and scaling by slot, every shape checked against the model.

    Raises FormatError that names file and field or tensor: another kind than LoRA, options that
    change more than the linear layers (DoRA, biases, modules_to_save, ...), tensors that are
    missing, unknown or do not fit; OSError where there is no adapter.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"[adapter] '{folder}' holds no {CONFIG_FILE}; name the folder of a PEFT adapter")
    rank, scaling = _read_config(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FormatError(
            f"[adapter] '{folder}' holds no {WEIGHTS_FILE}; save the adapter in safetensors form "
            "(PEFT: save_pretrained with safe_serialization=True)"
        )
    checkpoint = Checkpoint.open(folder / WEIGHTS_FILE)
    pairs = _pair_tensors(checkpoint, architecture)
    if not pairs:
        raise FormatError(f"[adapter] '{checkpoint.path}' holds no tensors")
    slots = architecture.spec.slots()
    adapters: Adapters = {}
    for slot, (rows, cols) in slots.items():
        name = architecture.tensor_names[slot]
        if name not in pairs or not architecture.is_linear(slot):
            continue
        part = architecture.parts.get(slot)
        down = _read(checkpoint, pairs[name]["A"], (rank, cols))
        up = _read(checkpoint, pairs[name]["B"], (rows if part is None else part.total, rank))
        adapters[slot] = down, np.ascontiguousarray(up[taken_rows(architecture, slot, rows)]), scaling
    return adapters


def _read_config(file: Path) -> tuple[int, float]:
    """The rank and what the product is multiplied by."""
    config = read_json(file)
    for name, value in config.items():
        if rule := _broken_rule(name, value):
            raise FormatError(f"[adapter] '{file}': {name} {rule}, got {value!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise FormatError(f"[adapter] '{file}': r must be a positive integer, got {rank!r}")
    if (type(alpha) is not int and type(alpha) is not float) or not np.isfinite(alpha):
        raise FormatError(f"[adapter] '{file}': lora_alpha must be a number, got {alpha!r}")
    if config.get("peft_type") != "LORA":
        raise FormatError(f"[adapter] '{file}': peft_type is missing; it must be 'LORA'")
    return rank, float(alpha) / (rank**0.5 if config.get("use_rslora") is True else rank)


def _broken_rule(name: str, value: Any) -> str:
    """What is wrong with a field, or nothing."""
    match name:
        case "peft_type":
            return "" if value == "LORA" else "is supported only as 'LORA'"
        case "bias":
            return "" if value == "none" else "is supported only as 'none'"
        case "init_lora_weights":
            changes = "changes the weights of the base model; convert the adapter to plain LoRA"
            return "" if value in _BEGINNINGS else changes
    if name in _READ | _HARMLESS or value in (None, False, [], {}):
        return ""
    return "is not supported; merge the adapter into its model with PEFT and convert that"


def _pair_tensors(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, dict[str, str]]:
    """The names of A and B by the tensor of the model that they belong to."""
    linears = {name for slot, name in architecture.tensor_names.items() if architecture.is_linear(slot)}
    pairs: dict[str, dict[str, str]] = {}
    for name in checkpoint:
        found = _NAME.fullmatch(name)
        target = "" if found is None else found[1] + ".weight"
        if found is None or target not in linears:
            raise FormatError(
                f"[adapter] '{checkpoint.path}': tensor '{name}' belongs to no linear layer of the blocks of "
                f"{architecture.architecture}; the adapter was made for another model, or for its embeddings or head"
            )
        pairs.setdefault(target, {})[found[2]] = name
    for target, pair in pairs.items():
        if len(pair) < 2:
            missing = "B" if "A" in pair else "A"
            raise FormatError(f"[adapter] '{checkpoint.path}': lora_{missing} of '{target}' is missing")
    return pairs


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> Float32:
    info = checkpoint.info(name)
    if info.shape != shape:
        raise FormatError(
            f"[adapter] '{checkpoint.path}': tensor '{name}' has shape {list(info.shape)}, expected {list(shape)} by "
            "the model and r; the adapter was made for another model"
        )
    values: Any = checkpoint.read_float32(name)
    if not np.isfinite(values).all():
        raise FormatError(f"[adapter] '{checkpoint.path}': tensor '{name}' holds NaN or infinity")
    return np.ascontiguousarray(values)
