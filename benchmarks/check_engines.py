# SPDX-License-Identifier: Apache-2.0
"""Compares exports for ik_llama.cpp and bitnet.cpp, built beside the project, with this library.

    python benchmarks/check_engines.py --ik IK_LOGITS --bitnet BITNET_LOGITS [--shared ../shared] [--output FILE]

The programs are engine_logits.cc, linked against each engine. For each model: agreement of the likeliest next
token and KL divergence to our floating-point mode, teacher-forced. Exits with 3 where KL is 0.01 or more.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from check_llama_cpp import TEXT, log_softmax, random_ternary
from numpy.typing import NDArray

import ternaryforge as tf
from ternaryforge.gguf.exporting import export_gguf
from ternaryforge.gguf.profiles import LATE_IN_BITNET_CPP

MOST_KL = 0.01
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 128}  # fmt: skip


def logits_there(program: Path, file: Path, ids: list[int], vocabulary: int) -> NDArray[np.float32]:
    """What an engine computes, float32 [tokens, vocabulary]."""
    out = file.with_suffix(".f32")
    done = subprocess.run(  # noqa: S603 - the programs are named on the command line
        [program, file, out], input=" ".join(map(str, ids)).encode(), capture_output=True, check=False, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"{program} ended with {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}")
    return np.fromfile(out, np.float32).reshape(len(ids), vocabulary)


def compare(program: Path, source: str | Path, file: Path, text: str | None) -> dict[str, Any]:
    """Agreement of an engine with our floating-point mode of `source`."""
    ours = tf.TernaryModel.from_pretrained(source, activations="float")
    vocabulary = ours.architecture.spec.vocab_size
    ids = ours.encode(text)[:200] if text else np.random.default_rng(0).integers(3, vocabulary, 200).tolist()
    a, b = log_softmax(ours.logits(ids)), log_softmax(logits_there(program, file, ids, vocabulary))
    return {
        "positions": len(ids),
        "top1": float((a.argmax(-1) == b.argmax(-1)).mean()),
        "kl": float((np.exp(a) * (a - b)).sum(-1).mean()),
        "kl_to_uniform": float((np.exp(a) * (a + np.log(vocabulary))).sum(-1).mean()),
    }


def main() -> int:
    """Runs everything and prints one line per file, and a JSON document at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ik", type=Path)
    parser.add_argument("--bitnet", type=Path)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tf.convert(options.shared / "data/babyllama/hf-tok361", work / "babyllama-ternary")
        sources: dict[str, tuple[str | Path, str | None]] = {
            "demo": ("demo", TEXT),
            "babyllama": (options.shared / "data/babyllama/hf-tok361", TEXT),
            "babyllama-ternary": (work / "babyllama-ternary", TEXT),
        }
        for kind in ("llama", "qwen3", "bitnet", "bitnet-silu"):
            sources[f"random-{kind}-ternary"] = (random_ternary(work, kind, **WIDE), None)
        for engine, program, types in (
            ("ik", options.ik, (None, "IQ1_BN", "Q2_K")),
            ("bitnetcpp", options.bitnet, (None,)),
        ):
            for name, (source, text) in sources.items() if program is not None else ():
                for ternary_type in types:
                    file = work / "out.gguf"
                    report = export_gguf(source, file, profile=engine, ternary_type=ternary_type)
                    if engine == "bitnetcpp" and report.arch in LATE_IN_BITNET_CPP:
                        continue
                    found: dict[str, Any] = {"model": name, "engine": engine, "arch": report.arch}
                    found["types"] = {kind: entry["count"] for kind, entry in report.tensors_by_type.items()}
                    try:
                        found |= compare(program.resolve(), source, file, text)
                    except RuntimeError as error:
                        found["error"] = str(error)
                    found["passed"] = found.get("kl", 1.0) < MOST_KL
                    failed += not found["passed"]
                    results.append(found)
                    print(json.dumps(found), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
