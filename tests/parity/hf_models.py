# SPDX-License-Identifier: Apache-2.0
"""Random models of transformers with odd sizes, their folders, and what transformers computes with them.

A test module that imports this one skips where torch or transformers is absent.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

# Read when torch is imported: compiling transformers' helpers takes many seconds and changes nothing.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

Float32 = NDArray[np.float32]
figures = logging.getLogger("figures")  # seen with pytest --log-cli-level=INFO
VOCABULARY = 131
MIN_DISTINCT = 8  # different tokens of a greedy text; fewer would show little
CONFIGS = {
    "llama": "LlamaConfig",
    "bitnet": "BitNetConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "phi": "PhiConfig",
    "phi3": "Phi3Config",
}


def make_config(family: str, **changes: Any) -> Any:
    """The configuration of a small model; no token ends a text, so that greedy text has full length."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 60,
        "intermediate_size": 92,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-2,  # so large that the logits show it
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    } | changes
    if family == "bitnet":
        fields.setdefault("hidden_act", "relu2")
    if family == "phi":
        fields["layer_norm_eps"] = fields.pop("rms_norm_eps")
    return getattr(transformers, CONFIGS[family])(**fields)


def make_model(config: Any, *, seed: int = 0, spread: float = 1.0) -> Any:
    """Random norms and weights; blocks that change the residual stream by about `spread` of a token's embedding.

    The final norm has both signs: a tied head would only repeat the last token otherwise. Gemma adds
    one to the weights of norms, and multiplies embeddings by the root of their size.
    """
    generator = torch.Generator().manual_seed(seed)
    offset, scale = (1, config.hidden_size**0.5) if config.model_type.startswith("gemma") else (0, 1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name in {"model.norm.weight", "model.final_layernorm.weight"}:
                parameter.copy_(noise - offset)
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise - offset)
            elif "embed_tokens" in name:
                parameter.copy_(noise / scale)
            else:
                last = name.endswith(("o_proj.weight", "down_proj.weight", "dense.weight", "fc2.weight"))
                parameter.copy_(noise * (spread if last else 1.0) / parameter.shape[1] ** 0.5)
    return model


def linear_names(model: Any) -> list[str]:
    """The linear layers of the blocks, by their module names."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    ]


def round_to_trits(weights: Any) -> tuple[Any, Any]:
    """absmean of BitNet b1.58: trits as int8, and their scale."""
    scale = weights.abs().mean().clamp(min=1e-5)
    return (weights / scale).round().clamp(-1, 1).to(torch.int8), scale


def write_packed(folder: Path, model: Any, quantization: dict[str, Any], *, dtype: Any) -> Path:
    """The checkpoint that transformers' users publish: trits by its `pack_weights`, scale as `linear_class` says."""
    from safetensors.torch import save_file
    from transformers.integrations.bitnet import pack_weights

    linears = set(linear_names(model))
    tensors = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if module not in linears:
            tensors[name] = parameter.detach().to(dtype)
            continue
        trits, scale = round_to_trits(parameter.detach())
        multiply = quantization.get("linear_class") == "autobitlinear"
        tensors[name] = pack_weights(trits)
        tensors[f"{module}.weight_scale"] = (scale if multiply else 1 / scale).reshape(1).to(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": quantization,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_float32(folder: Path) -> Any:
    """What plain transformers makes of a folder, computing in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_ids(count: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    return np.random.default_rng([seed, count]).integers(0, vocabulary, count).tolist()


def peer_logits(model: Any, ids: list[int]) -> Float32:
    """[tokens, vocab]."""
    with torch.no_grad():
        logits: Float32 = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def peer_greedy(model: Any, prompts: list[list[int]], count: int) -> tuple[list[list[int]], Float32]:
    """Greedy texts of prompts of one length, and for each how far ahead the first choice was at least.

    The lead is that of the largest logit before the second, over the largest magnitude.
    """
    prompt = torch.tensor(prompts)
    with torch.no_grad():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack(output.logits)
    best = logits.topk(2).values
    leads: Float32 = ((best[..., 0] - best[..., 1]) / logits.abs().max()).amin(0).numpy()
    return output.sequences[:, prompt.shape[1] :].tolist(), leads


def decided_greedy(model: Any, count: int, *, candidates: int = 24) -> tuple[list[int], list[int]]:
    """A prompt and its greedy text: of several the one whose closest choice was the clearest.

    A rounding tie of one int8 activation changes the logits a little, and must not decide the text.
    """
    prompts = [random_ids(7, seed=seed) for seed in range(candidates)]
    texts, leads = peer_greedy(model, prompts, count)
    varied = [i for i in range(candidates) if len(set(texts[i])) >= MIN_DISTINCT]
    chosen = max(varied, key=lambda i: leads[i])
    figures.info("closest choice of the greedy text: ahead by %.1e", leads[chosen])
    return prompts[chosen], texts[chosen]


def relative_error(found: Float32, expected: Float32) -> float:
    """The largest difference over the largest magnitude."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def top1_agreement(found: Float32, expected: Float32) -> float:
    return float((found.argmax(-1) == expected.argmax(-1)).mean())
