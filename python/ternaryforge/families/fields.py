# SPDX-License-Identifier: Apache-2.0
"""The fields of a config.json: whitelisted, typed, and refused by name.

A field is read, or without influence on the result, or neutral at certain values only. Any other
field with a value is refused, since it might change the mathematics.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from ternaryforge._core import FormatError

Activation = Literal["silu", "relu", "relu2", "gelu", "gelu_erf"]

_TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"}
_READ = {
    "architectures", "model_type", "quantization_config", "vocab_size", "hidden_size",
    "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "max_position_embeddings", "original_max_position_embeddings", "tie_word_embeddings",
    "layer_types", "quantization",
}  # fmt: skip
# Training, storage, bookkeeping and the defaults of older generation code.
_HARMLESS = {
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "initializer_range",
    "use_cache", "torch_dtype", "dtype", "transformers_version", "auto_map", "is_llama_config",
    "is_bitnet_config", "transformers.js_config", "tokenizer_class", "name_or_path",
    "unsloth_version", "unsloth_fixed", "unsloth_training_type", "return_dict",
    "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "is_decoder",
    "finetuning_task", "id2label", "label2id", "problem_type", "num_labels", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "remove_invalid_values", "chunk_size_feed_forward",
    "encoder_no_repeat_ngram_size", "tie_encoder_decoder", "pruned_heads",
    "decoder_start_token_id", "begin_suppress_tokens", "suppress_tokens", "task_specific_params",
    "cache_implementation",
} | _TOKEN_IDS  # fmt: skip
# Fields that leave the mathematics alone only at these values (null always does), where a family
# does not read them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": (),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_bidirectional_attention": (False,),
}


class Fields:
    """Typed access to the fields of one object; every error names file, field and value.

    `defaults` are the values of absent fields; a field that is null stays null.
    """

    def __init__(self, config: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self._config = {**(defaults or {}), **config}
        self._where = where

    def refusal(self, name: str, rule: str) -> FormatError:
        """The error for a field that breaks a rule."""
        return FormatError(f"[config] '{self._where}': {name} {rule}, got {self._config.get(name)!r}")

    def get(self, name: str) -> Any:
        """The value as it stands, None where it is absent."""
        return self._config.get(name)

    def refuse_rotated(self) -> None:
        """Refuses weights in a rotated basis: activations would have to be rotated at run time."""
        for name, value in self._config.items():
            if "hadamard" in f"{name} {value}".lower():
                raise self.refusal(
                    name, "says that weights are rotated (Hadamard), which is not supported; take a model without"
                )

    def refuse_unknown(self, reads: Collection[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses fields of a config.json that are neither read, nor harmless, nor at a neutral value."""
        neutral = {**_NEUTRAL, **neutral}
        for name, value in self._config.items():
            if value is None or name in _READ or name in reads or name in _HARMLESS or name.startswith("_"):
                continue
            if name not in neutral:
                raise self.refusal(name, "is not known and might change the mathematics; remove it if it does not")
            if value not in neutral[name]:
                accepted = " or ".join(repr(item) for item in (*neutral[name], None))
                raise self.refusal(name, f"is supported only as {accepted}")

    def size(self, name: str, *, default: int | None = None, least: int = 1, limit: int = 1 << 28) -> int:
        """An integer from `least` to `limit`."""
        value = self._config.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= limit:
            raise self.refusal(name, f"must be an integer from {least} to {limit}")
        return value

    def number(self, name: str) -> float:
        """A positive finite number."""
        value: Any = self._config.get(name)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.refusal(name, "must be a positive number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A positive finite number, or None where there is none."""
        return None if self._config.get(name) is None else self.number(name)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self._config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refusal(name, "must be true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id, a list of them, or none."""
        value = self._config.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int and item >= 0 for item in values):
            raise self.refusal(name, "must be a token id or a list of them")
        return tuple(values)

    def activation(self, name: str, known: Mapping[str, Activation]) -> Activation:
        """What `known` has for the activation; null is the first, the default of the family's class."""
        value = self._config.get(name)
        if value is None:
            return next(iter(known.values()))
        if not isinstance(value, str) or value not in known:
            raise self.refusal(name, f"is supported only as {' or '.join(map(repr, known))}")
        return known[value]

    def object(self, name: str) -> "Fields | None":
        """An object, None where it is absent, null or empty."""
        value = self._config.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.refusal(name, "must be an object")
        return Fields(value, f"{self._where}: {name}")

    def names(self) -> Collection[str]:
        """The names of all fields that are not null."""
        return [name for name, value in self._config.items() if value is not None]

    def windows(self, expected: list[str], window: int | None) -> list[int]:
        """The window of every layer, 0 for "full_attention", by `layer_types` or, where it is absent, `expected`."""
        kinds = self._config.get("layer_types")
        kinds = expected if kinds is None else kinds
        sizes = {"full_attention": 0} | ({} if window is None else {"sliding_attention": window})
        if not isinstance(kinds, list) or len(kinds) != len(expected) or any(str(kind) not in sizes for kind in kinds):
            raise self.refusal("layer_types", f"must name {' or '.join(sizes)} for each of {len(expected)} layers")
        return [sizes[kind] for kind in kinds]

    def optional_size(self, name: str) -> int | None:
        """A positive integer, or None where there is none."""
        return None if self._config.get(name) is None else self.size(name)
