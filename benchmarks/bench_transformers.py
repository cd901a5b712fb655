# SPDX-License-Identifier: Apache-2.0
"""Decoding inside transformers: our kernels beside its own `bitnet` path and beside a dense bf16 model of the shape.

Usage: python benchmarks/bench_transformers.py [--layers 30] [--threads 1 2] [--tokens 12] [--stock-tokens 2]

The shape is BitNet-2B-4T's; weights are random. All models share one embedding, which is the head too. What is
compiled is compiled, and layers are compared, before the clock starts; then the models take turns, token by token, so
that what else the machine does falls on all. `--gate FILE` waits for FILE before that, so that timing can be put off
until a machine is quiet. Takes 8 GB of memory with 30 layers; prints a JSON line for each number of threads.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitNetConfig, BitNetForCausalLM, BitNetQuantConfig, DynamicCache
from transformers.integrations.bitnet import replace_with_bitnet_linear

from ternaryforge.hf import optimize
from ternaryforge.machine import cpu_name
from ternaryforge.torch import TernaryLinear

PROMPT = 16


def random_weights(parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """Values of the deviation 0.02, one random block over and over."""
    block = torch.empty(1_000_003, dtype=parameter.dtype).normal_(
        0, 0.02, generator=torch.Generator().manual_seed(seed)
    )
    return block.repeat(-(-parameter.numel() // block.numel()))[: parameter.numel()].view_as(parameter)


def random_bytes(buffer: torch.Tensor, seed: int) -> torch.Tensor:
    """Packed trits: bytes of four codes 0, 1 or 2."""
    digits = torch.randint(0, 3, (1_000_003, 4), generator=torch.Generator().manual_seed(seed))
    block = (digits << torch.tensor([0, 2, 4, 6])).sum(1).to(torch.uint8)
    return block.repeat(-(-buffer.numel() // block.numel()))[: buffer.numel()].view_as(buffer)


def build(layers: int, *, packed: bool, embedding: torch.Tensor | None) -> Any:
    """A dense model, or one of transformers' BitLinear, without the minutes that random initialisation takes."""
    config = BitNetConfig(num_hidden_layers=layers, dtype="bfloat16")
    with torch.device("meta"):
        model = BitNetForCausalLM(config).to(torch.bfloat16)
        if packed:
            replace_with_bitnet_linear(model, ["lm_head"], BitNetQuantConfig(modules_to_not_convert=["lm_head"]))
    table = random_weights(model.lm_head.weight, 1) if embedding is None else embedding
    shared = nn.Parameter(table, requires_grad=False)
    for number, (name, module) in enumerate(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if name in {"lm_head", "model.embed_tokens"}:
                module.weight = shared
            elif parameter.ndim == 1:
                setattr(module, key, nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16)))
            else:
                setattr(module, key, nn.Parameter(random_weights(parameter, number), requires_grad=False))
        if packed and type(module).__name__ == "BitLinear":
            module.weight = random_bytes(module.weight, number)
            module.weight_scale = torch.full((1,), 40.0, dtype=torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


class Session:
    """A model that has read a prompt and writes token by token."""

    @torch.no_grad()  # as `generate`
    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.logits = self._forward(torch.arange(PROMPT)[None])
        self.step()

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    @torch.no_grad()  # as `generate`
    def step(self) -> float:
        """Seconds of one token."""
        start = time.perf_counter()
        self._forward(torch.full((1, 1), 7))
        return time.perf_counter() - start


@torch.no_grad()  # as `generate`
def check(name: str, ours: TernaryLinear, stock: Any) -> None:
    """Raises RuntimeError where two layers differ by more than bf16, in which transformers divides, rounds away."""
    x = torch.randn(4, ours.in_features, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    got, expected = ours(x).float(), stock(x).float()
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < 0.01:
        raise RuntimeError(f"{name} differs from transformers' by {error:.4f} of its norm")


def build_all(layers: int) -> list[Any]:
    """Dense, transformers' own, ours with an int8 head and with the bf16 one; raises RuntimeError where ours differ."""
    dense = build(layers, packed=False, embedding=None)
    table = dense.lm_head.weight.data
    stock, ours, headless = (build(layers, packed=True, embedding=table) for _ in range(3))
    optimize(ours)
    optimize(headless, head=None)
    for key, module in ours.named_modules():
        if isinstance(module, TernaryLinear):
            headless.get_submodule(key).weight = module.weight  # the same bytes, once
    for key, module in ours.model.layers[0].named_modules():
        if isinstance(module, TernaryLinear):
            check(key, module, stock.model.layers[0].get_submodule(key))
    return [dense, stock, ours, headless]


def main() -> None:
    """Builds, compares, waits, times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--stock-tokens", type=int, default=2, help="tokens of transformers' own path; 0 leaves it out")
    parser.add_argument("--gate", type=Path, help="start timing once this file is there")
    args = parser.parse_args()
    torch.set_num_threads(max(args.threads))
    dense, stock, ours, headless = build_all(args.layers)
    sessions = {"ours, int8 head": Session(ours), "ours, bf16 head": Session(headless), "dense bf16": Session(dense)}
    if args.stock_tokens:
        slow = Session(stock)
        cosine = nn.functional.cosine_similarity(sessions["ours, int8 head"].logits, slow.logits).item()
        print(f"cosine of logits with those of transformers (random weights, bf16): {cosine:.3f}", flush=True)
    while args.gate is not None and not args.gate.exists():
        time.sleep(0.1)
    for threads in args.threads:
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(args.tokens + 2):
            for name, session in sessions.items():
                seconds[name].append(session.step())
        seconds = {name: values[2:] for name, values in seconds.items()}
        if args.stock_tokens:
            seconds["transformers bitnet"] = [slow.step() for _ in range(args.stock_tokens)]
        report(args.layers, threads, seconds)


def report(layers: int, threads: int, seconds: dict[str, list[float]]) -> None:
    """A line for people per model, and one JSON line."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        spread = f"{min(values) * 1e3:.1f} to {max(values) * 1e3:.1f}"
        print(f"{threads} threads, {name:20} {median[name] * 1e3:8.1f} ms a token ({spread})", flush=True)
    result = {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "threads": threads,
        "layers": layers,
        "median_seconds": {name: round(value, 5) for name, value in median.items()},
        "least_seconds": {name: round(min(values), 5) for name, values in seconds.items()},
        "times_ours": {name: round(value / median["ours, int8 head"], 2) for name, value in median.items()},
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
