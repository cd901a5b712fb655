# SPDX-License-Identifier: Apache-2.0
"""Compares exported files in llama.cpp (package llama-cpp-python, built from source) with this library.

    python benchmarks/check_llama_cpp.py [--shared ../shared] [--output results.json]

For each model and profile: tokens of both tokenizers, teacher-forced top-1 agreement and KL divergence of
the next token to our floating-point mode, and greedy continuations. Exits with 3 where a threshold is missed.
"""

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

import ternaryforge as tf

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog. "
    'One day, they saw a big red ball in the grass, and the dog ran to it. Lily laughed and said, "Good boy!" '
    "A boy came and said that the ball was his. Lily was sad, but she gave it back. The boy smiled and asked her to "
    "play with him. They threw the ball up and down the hill all day. When the sun went down, her mom called her home "
    'for dinner. "I made a new friend today," said Lily. Her mom was very happy and gave her a big hug. That night, '
    "Lily and her dog slept well, and they dreamed of the red ball. The next day, they went to the park again."
)
PROMPT = "Once upon a time"
LEAST_TOP1, LEAST_TOP1_SMALLEST, MOST_KL = 0.97, 0.95, 0.01


@llama_cpp.llama_log_callback
def _be_quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    del data
    if level >= 4:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of probabilities along the last axis."""
    values = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def greedy(logits_of: Callable[[list[int]], NDArray[np.float32]], ids: list[int], count: int) -> list[int]:
    """The likeliest continuation, the whole text anew for each token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits_of(ids)[-1].argmax()))
    return ids


def compare(source: str | Path, file: Path, *, text: str | None = TEXT) -> dict[str, Any]:
    """Our floating-point mode of `source` against llama.cpp with `file`."""
    ours = tf.TernaryModel.from_pretrained(source, activations="float")
    other = llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False, n_threads=2)
    result: dict[str, Any] = {}
    if text is not None:
        ids = ours.encode(text)[:200]
        result["tokens_equal"] = other.tokenize(text.encode(), add_bos=True, special=False)[:200] == ids
    else:
        ids = np.random.default_rng(0).integers(3, ours.architecture.spec.vocab_size, 200).tolist()

    def logits_there(tokens: list[int]) -> NDArray[np.float32]:
        other.reset()
        other.eval(tokens)
        return np.array(other.scores[: len(tokens)], np.float32)

    a, b = log_softmax(ours.logits(ids)), log_softmax(logits_there(ids))
    result["positions"] = len(ids)
    result["top1"] = float((a.argmax(-1) == b.argmax(-1)).mean())
    result["kl"] = float((np.exp(a) * (a - b)).sum(-1).mean())
    start = ours.encode(PROMPT) if text is not None else ids[:8]
    result["greedy_equal"] = greedy(ours.logits, start, 32) == greedy(logits_there, start, 32)
    other.close()
    return result


def random_model(folder: Path, kind: str, **changes: int) -> Path:
    """A small model with random weights from transformers, without a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    common = {
        "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
    } | changes  # fmt: skip
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaConfig(**common),
        "llama3-rope": lambda: transformers.LlamaConfig(
            **common,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in common.items() if k != "head_dim"}),
        "qwen3": lambda: transformers.Qwen3Config(**common),
        "bitnet": lambda: transformers.BitNetConfig(**common, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2),
        "gemma": lambda: transformers.GemmaConfig(**common),
        "gemma2": lambda: transformers.Gemma2Config(**common, query_pre_attn_scalar=64, sliding_window=32),
        "gemma3": lambda: transformers.Gemma3TextConfig(**common, query_pre_attn_scalar=64, sliding_window=32),
    }
    config = configs[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms that matter
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data *= 2
    model.save_pretrained(folder)
    return folder


def with_random_tokens(folder: Path, count: int) -> None:
    """A byte-level tokenizer, because llama.cpp runs no file without tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)} | {"he": 256}
    vocab |= {f"<t{index}>": index for index in range(257, count)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<t257>", "bos_token": "<t258>"}))


def silu_bitnet(source: Path, folder: Path) -> Path:
    """1bitLLM's form of a folder of BitNetForCausalLM: other names of the sub-norms, SiLU."""
    from safetensors.numpy import load_file, save_file

    names = {"self_attn.attn_sub_norm": "self_attn.inner_attn_ln", "mlp.ffn_sub_norm": "mlp.ffn_layernorm"}
    folder.mkdir()
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for old, new in names.items():
            name = name.replace(old, new)  # noqa: PLW2901
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["BitnetForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_ternary(work: Path, kind: str, **changes: int) -> Path:
    """A random model of `random_model`, or "bitnet-silu", with ternary weights and a tokenizer."""
    source = work / kind
    if kind == "bitnet-silu":
        silu_bitnet(random_model(work / "silu-latents", "bitnet", **changes), source)
    else:
        random_model(source, kind, **changes)
    with_random_tokens(source, 320)
    # 1bitLLM's checkpoints are latents that are rounded in this way.
    tf.convert(source, work / f"{kind}-ternary", scheme="absmean" if kind == "bitnet-silu" else "ls")
    return work / f"{kind}-ternary"


def main() -> int:
    """Runs everything and prints one line per file, and a JSON document at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    llama_cpp.llama_log_set(_be_quiet, ctypes.c_void_p(0))
    results, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        trained: dict[str, str | Path] = {"demo": "demo"}
        for name, path in (("stories260k", "data/stories260k/hf"), ("babyllama", "data/babyllama/hf-tok361")):
            trained[name] = options.shared / path
            tf.convert(options.shared / path, work / f"{name}-ternary")
            trained[f"{name}-ternary"] = work / f"{name}-ternary"
        cases: list[tuple[str, str | Path, str, dict[str, Any], str | None]] = []
        for name, source in trained.items():
            cases += [(name, source, profile, {}, TEXT) for profile in ("upstream", "portable")]
        cases.append(("demo", "demo", "upstream", {"ternary_type": "TQ1_0", "head": "Q6_K"}, TEXT))
        cases.append(("demo", "demo", "upstream", {"ternary_type": "Q2_0", "head": "Q8_0"}, TEXT))
        for kind in ("llama", "llama3-rope", "qwen2", "qwen3", "bitnet-silu", "gemma", "gemma2", "gemma3"):
            ternary = random_ternary(work, kind)
            if kind != "bitnet-silu":  # whose dense form would be latents
                cases.append((f"random-{kind}", work / kind, "upstream", {}, None))
            cases.append((f"random-{kind}-ternary", ternary, "upstream", {}, None))
            cases.append((f"random-{kind}-ternary", ternary, "portable", {}, None))
        for index, (name, source, profile, extra, text) in enumerate(cases):
            report = tf.export(source, work / f"{index}.gguf", profile=profile, **extra)
            # A head that was rounded on purpose is compared as the file has it.
            ours = work / f"{index}.gguf" if "head" in extra else source
            found = compare(ours, work / f"{index}.gguf", text=text)
            is_float = report.ternary_tensors == 0
            least = LEAST_TOP1_SMALLEST if "stories260k" in name or text is None else LEAST_TOP1
            least = 0.9 if text is None and not is_float else least
            passed = found["top1"] >= least and found["kl"] < MOST_KL and found.get("tokens_equal", True)
            passed = passed and (found["greedy_equal"] or not is_float)
            failed += not passed
            types = {kind: entry["count"] for kind, entry in report.tensors_by_type.items()}
            found |= {"model": name, "profile": profile, "types": types, "exact": report.exact, "passed": passed}
            results.append(found)
            print(
                f"{name:26} {profile:9} top-1 {found['top1']:.3f}  KL {found['kl']:.1e}  greedy "
                f"{'equal ' if found['greedy_equal'] else 'differs'} tokens {found.get('tokens_equal', '-')!s:5} "
                f"{types}{'' if passed else '  FAILED'}",
                flush=True,
            )
    document = {"llama_cpp_python": llama_cpp.__version__, "ternaryforge": tf.__version__, "results": results}
    if options.output is not None:
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
