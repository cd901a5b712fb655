# SPDX-License-Identifier: Apache-2.0

"""Converts a random checkpoint of 1.1 G parameters in bf16 and prints the anonymous memory it took.

Usage: python benchmarks/bench_convert_memory.py [FOLDER]    (3 GB of disk there, removed at the end)
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
from ternaryforge.conversion import convert

HIDDEN, FFN, LAYERS, VOCAB, KEYS = 2048, 8192, 16, 32000, 512
LIMIT = 500_000_000


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of a llama of 1.1 G parameters."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found |= {
            layer + "input_layernorm.weight": (HIDDEN,),
            layer + "post_attention_layernorm.weight": (HIDDEN,),
            layer + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            layer + "self_attn.k_proj.weight": (KEYS, HIDDEN),
            layer + "self_attn.v_proj.weight": (KEYS, HIDDEN),
            layer + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            layer + "mlp.gate_proj.weight": (FFN, HIDDEN),
            layer + "mlp.up_proj.weight": (FFN, HIDDEN),
            layer + "mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return found


def make(folder: Path) -> int:
    """Writes the source; returns its number of parameters."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    rng = np.random.default_rng(0)
    plan = [TensorPlan(name, "BF16", shape) for name, shape in shapes().items()]
    with CheckpointWriter(folder, plan) as writer:
        for tensor in plan:
            values = rng.standard_normal(tensor.shape, dtype=np.float32) * np.float32(0.02)
            writer.write(tensor.name, (values.view(np.uint32) >> 16).astype(np.uint16))
        writer.write_json("config.json", config)
    return sum(tensor.nbytes for tensor in plan) // 2


def main() -> int:
    """Exit code 1 where the limit was passed."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        parameters = make(Path(folder) / "source")
        worst = 0
        for scale in ("tensor", "group"):
            report = convert(Path(folder) / "source", Path(folder) / scale, scale=scale)
            peak = report.peak_anonymous_bytes
            if peak is None:
                raise SystemExit("this system does not tell the memory of a process")
            worst = max(worst, peak)
            errors = [linear.relative_error for linear in report.linears]
            if not 0.186 < min(errors) <= max(errors) < 0.191:
                raise SystemExit(f"not the error of Gaussian weights: {min(errors)} to {max(errors)}")
            line = {
                "benchmark": "convert_memory",
                "parameters": parameters,
                "scale": scale,
                "peak_anonymous_bytes": peak,
                "seconds": round(report.seconds, 2),
                "relative_error": round(float(np.mean(errors)), 5),
            }
            print(json.dumps(line))
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
