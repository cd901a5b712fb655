# SPDX-License-Identifier: Apache-2.0
"""The metadata of a GGUF file as the config.json that a Hugging Face folder of the same model would have."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge._core import FormatError
from ternaryforge.families.fields import Fields
from ternaryforge.families.rope import make_rotation
from ternaryforge.gguf.architectures import ARCHITECTURES, GgufArchitecture

FFN_SIZE = "ternaryforge.feed_forward_length"
"""The true size where the file's is padded with zeros."""
ACTIVATION_BITS = "ternaryforge.activation_bits"
"""What the model was made for: 8 or 16 bits, or 32 for floating point."""

_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "attention.sliding_window",
    "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "hidden_activation", "attn_logit_softcapping",
    "final_logit_softcapping",
}  # fmt: skip
# Values at which a key changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
    "rope.scaling.finetuned": (True, False),
    "attention.scale": (),
    "logit_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
}
# factor, low_freq_factor, high_freq_factor and original context of published models with such a tensor.
_LLAMA3_SCALINGS = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 4.0, 8192))
_LARGE = {"gemma2": 46, "gemma3": 62}  # blocks of the models that scale attention by the width of the model


class Metadata:
    """Typed access to the keys of one file; every error names file, key and value."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        name = values.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise FormatError(
                f"[gguf] '{where}': general.architecture {name!r:.80} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.architecture: GgufArchitecture = ARCHITECTURES[name]

    def get(self, name: str) -> Any:
        """The value of a key of the architecture, None where there is none."""
        return self.values.get(f"{self.architecture.name}.{name}")

    def refusal(self, name: str, rule: str) -> FormatError:
        """The error for a key of the architecture that breaks a rule."""
        text = str(self.get(name))
        return FormatError(f"[gguf] '{self.where}': {self.architecture.name}.{name} {rule}, got {text:.80}")

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; of a value per block the one that all have."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, list | np.ndarray):
            if len(set(map(int, value))) != 1:
                raise self.refusal(name, "differs between blocks, which is not supported")
            value = int(value[0])
        if type(value) is not int or not 1 <= value < 1 << 28:
            raise self.refusal(name, "must be a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal that the file's float32 stands for."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.refusal(name, "must be a positive number")
        return shortest(value)

    def refuse_unknown(self) -> None:
        """Refuses keys of the architecture that might change the mathematics, and rotated weights."""
        prefix = self.architecture.name + "."
        for key, value in self.values.items():
            if key.startswith("prism.hadamard."):
                raise FormatError(
                    f"[gguf] '{self.where}': the weights are stored rotated (prism.hadamard.*), which is not "
                    "supported; without the rotation a model prints garbage"
                )
            name = key.removeprefix(prefix)
            if name == key or name in _READ:
                continue
            if isinstance(value, list | np.ndarray) or value not in _NEUTRAL.get(name, ()):
                raise self.refusal(name, "is not supported: it might change the mathematics")


def shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def read_config(
    values: Mapping[str, Any],
    tensors: Collection[str],
    *,
    where: str,
    vocab_size: int,
    rope_factors: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """The config.json of a file, without quantization_config and token ids.

    `vocab_size` is that of the embedding. Raises FormatError by name for a key that is missing,
    malformed, or not known and able to change the result.
    """
    metadata = Metadata(values, where)
    metadata.refuse_unknown()
    known = metadata.architecture
    heads, hidden = metadata.size("attention.head_count"), metadata.size("embedding_length")
    if hidden % heads and metadata.get("attention.key_length") is None:
        raise metadata.refusal("embedding_length", f"is no multiple of attention.head_count {heads}")
    head_dim = metadata.size("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if metadata.size(name, head_dim) != head_dim:
            raise metadata.refusal(name, f"must be the size of a head, {head_dim}")
    config: dict[str, Any] = {
        "architectures": [known.hf_class],
        "model_type": known.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": _ffn_size(metadata),
        "num_hidden_layers": metadata.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "max_position_embeddings": metadata.size("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    _read_rope(metadata, config, rope_factors)
    _read_family(metadata, config, tensors)
    return config


def _ffn_size(metadata: Metadata) -> int:
    stored = metadata.size("feed_forward_length")
    true = metadata.values.get(FFN_SIZE, stored)
    if type(true) is not int or not 1 <= true <= stored:
        raise FormatError(f"[gguf] '{metadata.where}': {FFN_SIZE} must be 1 to {stored}, got {true!r:.80}")
    return true


def _read_rope(metadata: Metadata, config: dict[str, Any], factors: NDArray[np.float32] | None) -> None:
    kind = metadata.get("rope.scaling.type")
    if kind == "linear":
        factor = metadata.number("rope.scaling.factor", 1.0)
        if factor != 1:
            config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind not in (None, "none"):
        raise metadata.refusal("rope.scaling.type", "is supported only as 'none' and 'linear'")
    if factors is not None:
        if "rope_scaling" in config:
            raise metadata.refusal("rope.scaling.type", "cannot stand beside rope_freqs.weight")
        config["rope_scaling"] = _find_llama3_scaling(metadata, config, factors)


def _find_llama3_scaling(metadata: Metadata, config: Mapping[str, Any], factors: NDArray[np.float32]) -> dict[str, Any]:
    """The fields whose factors a file holds, among those of published models and its own context."""
    original = metadata.get("rope.scaling.original_context_length")
    candidates = [*_LLAMA3_SCALINGS]
    if type(original) is int:
        candidates += [(float(factors.max()), 1.0, 4.0, original)]
    for factor, low, high, context in candidates:
        fields = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        expected = llama3_factors({**config, "rope_scaling": fields}, where=metadata.where)
        if expected is not None and expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-4):
            return fields
    raise FormatError(
        f"[gguf] '{metadata.where}': tensor 'rope_freqs.weight' holds factors that no published Llama 3 model "
        "has; convert the model from its Hugging Face folder"
    )


def llama3_factors(config: Mapping[str, Any], *, where: str) -> NDArray[np.float32] | None:
    """What `rope_freqs.weight` holds for a config.json with a llama3 scaling, None without one."""
    fields = Fields(config, where)
    scaling = fields.object("rope_scaling") or fields.object("rope_parameters")
    if scaling is None or (scaling.get("rope_type") or scaling.get("type")) != "llama3":
        return None
    head_dim = fields.size("head_dim", default=fields.size("hidden_size") // fields.size("num_attention_heads"))
    base = Fields({"rope_theta": scaling.get("rope_theta") or config.get("rope_theta"),
                   "max_position_embeddings": config.get("max_position_embeddings")}, where)  # fmt: skip
    plain = make_rotation(None, base, head_dim, base_field="rope_theta").frequencies
    original = fields.optional_size("original_max_position_embeddings")
    slowed = make_rotation(scaling, fields, head_dim, base_field="rope_theta", original=original).frequencies
    factors: NDArray[np.float32] = (np.asarray(plain) / np.asarray(slowed)).astype(np.float32)
    return factors


def _read_family(metadata: Metadata, config: dict[str, Any], tensors: Collection[str]) -> None:
    """What only some architectures have."""
    name = metadata.architecture.name
    biased = "blk.0.attn_q.bias" in tensors
    if name == "llama":
        config["attention_bias"] = biased
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    elif name == "qwen3" and biased:
        config["attention_bias"] = True
    activation = "silu"
    if name in {"bitnet-b1.58", "bitnet-25"}:
        config["hidden_act"] = activation = "relu2"
    elif name.startswith("gemma"):
        activation = "gelu_pytorch_tanh"
        config["hidden_act" if name == "gemma" else "hidden_activation"] = activation
    if metadata.get("hidden_activation") not in (None, activation):
        raise metadata.refusal("hidden_activation", f"is supported only as '{activation}'")
    if name in {"gemma2", "gemma3"}:
        _read_gemma(metadata, config)
    elif metadata.get("attention.sliding_window") not in (None, 0):
        # These engines ignore the key for such models: what they compute is without a window.
        window = metadata.size("attention.sliding_window")
        config["max_position_embeddings"] = min(window, config["max_position_embeddings"])


def _read_gemma(metadata: Metadata, config: dict[str, Any]) -> None:
    name, layers = metadata.architecture.name, config["num_hidden_layers"]
    width = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = width if layers == _LARGE[name] else config["head_dim"]
    window = metadata.get("attention.sliding_window")
    if name == "gemma2":
        config["sliding_window"] = metadata.size("attention.sliding_window", 4096)
        config["attn_logit_softcapping"] = metadata.number("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = metadata.number("final_logit_softcapping", 30.0)
        return
    config["final_logit_softcapping"] = (
        metadata.number("final_logit_softcapping") if metadata.get("final_logit_softcapping") else None
    )
    config["rope_local_base_freq"] = metadata.number("rope.freq_base_swa", 10000.0)
    if window in (None, 0):
        config["layer_types"] = ["full_attention"] * layers
    else:
        config["sliding_window"] = metadata.size("attention.sliding_window")


def large_attention_scale(name: str, layers: int) -> bool:
    """Whether engines scale attention by the width of the model over its heads, not by the size of a head."""
    return _LARGE.get(name) == layers
