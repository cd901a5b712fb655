# SPDX-License-Identifier: Apache-2.0
"""Trains one small model with every quantizer, on equal tokens, and measures perplexity on held-out text.

Run: python compare_quantizers.py MODEL --train train.txt --valid valid.txt --out results.jsonl --seeds 0 1 2

MODEL is a Hugging Face folder of a dense Llama with a tokenizer, which is also the teacher: the loss is forward
KL to it. Texts have stories separated by <|endoftext|>. Every finished run is one line of --out; runs that stand
there already are not repeated. `--table` prints the table of what is there. Needs the extra `hf`.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peer_quantizers import attach_extras, register_peers
from torch import Tensor
from transformers import AutoModelForCausalLM

from ternaryforge.evaluation import split_documents
from ternaryforge.tokenizer import Tokenizer
from ternaryforge.torch import (
    BlocksInMemory,
    BlockwiseOptions,
    DistillationLoss,
    QATConfig,
    TuningOptions,
    anneal_sharpness,
    capture_inputs,
    clip_latents,
    prepare_qat,
    qat_layers,
    residual_strength,
    set_residual,
    set_sharpness,
    set_strength,
    train_blocks,
    tune_scales,
    warmup_strength,
)


@dataclass(frozen=True)
class Method:
    """A quantizer and what goes with it; shares are of all steps.

    `blockwise` is the share of the tokens with which blocks are trained one by one (EfficientQAT); the scales alone
    then get the rest, end to end. `muon` is the learning rate of Muon for the ternary matrices, whose updates then are
    orthogonal; AdamW trains the rest, and without `muon` all.
    """

    config: dict[str, Any]
    warmup: float = 0.0
    anneal: float = 0.0
    residual: float = 0.0
    blockwise: float = 0.0
    muon: float = 0.0
    loss: dict[str, float] = field(default_factory=lambda: {"kl": 1.0})


GROUPS: dict[str, Any] = {"scale": "group", "group_size": 64, "activation_bits": None}
INT8: dict[str, Any] = {"scale": "tensor", "activation_bits": 8}
ROWS: dict[str, Any] = {"scale": "row", "activation_bits": None}
GROUPS_128: dict[str, Any] = {**GROUPS, "group_size": 128}
METHODS = {
    "absmean": Method({**GROUPS, "quantizer": "absmean"}),
    "lsq": Method({**GROUPS, "quantizer": "lsq"}),
    "lsq, Muon": Method({**GROUPS, "quantizer": "lsq"}, muon=3e-3),
    "seq": Method({**GROUPS, "quantizer": "seq"}),
    "twn": Method({**GROUPS, "quantizer": "twn"}),
    "tequila": Method({**GROUPS, "quantizer": "tequila"}),
    "dlt": Method({**GROUPS, "quantizer": "dlt"}),
    "adaptive": Method({**GROUPS, "quantizer": "adaptive"}),
    "tanh": Method({**GROUPS, "quantizer": "tanh"}, anneal=0.3),
    "sherry + residual": Method({**GROUPS, "quantizer": "sherry", "residual": True}, residual=0.8),
    "binary": Method({**GROUPS, "quantizer": "binary"}),
    "four_levels": Method({**GROUPS, "quantizer": "four_levels"}),
    "absmean tensor int8": Method({**INT8, "quantizer": "absmean"}),
    "lsq tensor int8": Method({**INT8, "quantizer": "lsq"}),
    "absmean + residual": Method({**GROUPS, "quantizer": "absmean", "residual": True}, residual=0.8),
    "absmean + warm-up": Method({**GROUPS, "quantizer": "absmean"}, warmup=0.5),
    "tequila + warm-up": Method({**GROUPS, "quantizer": "tequila"}, warmup=0.5),
    "absmean + warm-up + OFF": Method({**GROUPS, "quantizer": "absmean"}, warmup=0.5, loss={"kl": 1.0, "off": 1.0}),
    "tequila + warm-up + OFF": Method({**GROUPS, "quantizer": "tequila"}, warmup=0.5, loss={"kl": 1.0, "off": 1.0}),
    "EfficientQAT": Method({**GROUPS, "quantizer": "lsq"}, blockwise=0.5),
    "absmean, CE": Method({**GROUPS, "quantizer": "absmean"}, loss={"kl": 0.0, "ce": 1.0}),
    # Peers, each with its own scales and with groups of 64. What is the same as ours stands above and is not run
    # again: onebitllms ("absmean tensor int8"), AngelSlim's Tequila and absmean with groups of 64.
    "peer: AngelSlim Tequila": Method({**GROUPS_128, "quantizer": "tequila"}),
    "peer: AngelSlim Tequila v1": Method({**GROUPS_128, "quantizer": "peer_angel_tequila_1"}),
    "peer: AngelSlim Tequila v1, groups of 64": Method({**GROUPS, "quantizer": "peer_angel_tequila_1"}),
    "peer: AngelSlim Tequila v3": Method({**GROUPS_128, "quantizer": "peer_angel_tequila_3"}),
    "peer: AngelSlim Tequila v3, groups of 64": Method({**GROUPS, "quantizer": "peer_angel_tequila_3"}),
    "peer: AngelSlim TWN": Method({**GROUPS_128, "quantizer": "twn", "options": {"threshold": 0.75}}),
    "peer: AngelSlim TWN, groups of 64": Method({**GROUPS, "quantizer": "twn", "options": {"threshold": 0.75}}),
    "peer: AngelSlim Sherry": Method({**GROUPS_128, "quantizer": "sherry", "residual": True}, residual=1.0),
    "peer: AngelSlim Sherry, groups of 64": Method({**GROUPS, "quantizer": "sherry", "residual": True}, residual=1.0),
    "peer: AngelSlim LSQ": Method({**GROUPS_128, "quantizer": "peer_angel_lsq"}),
    "peer: AngelSlim LSQ, groups of 64": Method({**GROUPS, "quantizer": "peer_angel_lsq"}),
    "peer: AngelSlim DLT": Method({**ROWS, "quantizer": "peer_angel_dlt"}),
    "peer: AngelSlim DLT, groups of 64": Method({**GROUPS, "quantizer": "peer_angel_dlt"}),
    "peer: ParetoQ SEQ": Method({**ROWS, "quantizer": "peer_pareto_seq"}),
    "peer: ParetoQ SEQ, groups of 64": Method({**GROUPS, "quantizer": "peer_pareto_seq"}),
    "peer: ParetoQ LSQ": Method({**ROWS, "quantizer": "peer_pareto_lsq"}),
    "peer: ParetoQ LSQ, groups of 64": Method({**GROUPS, "quantizer": "peer_pareto_lsq"}),
}


def batches(ids: Tensor, size: int, length: int, seed: int) -> Iterator[Tensor]:
    """Windows side by side in random order, over and over."""
    windows = ids[: len(ids) // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield windows[order[start : start + size]]


def scored_windows(documents: list[list[int]], context: int) -> list[tuple[list[int], int]]:
    """Protocol `documents`: windows that overlap by half, each with the first of its tokens that is scored."""
    windows = []
    for ids in documents:
        scored, start = 1, 0
        while scored < len(ids):
            part = ids[start : start + context]
            windows.append((part, scored - start))
            scored, start = start + len(part), start + context // 2
    return sorted(windows, key=lambda window: len(window[0]))


@torch.no_grad()
def perplexity(model: Any, windows: list[tuple[list[int], int]]) -> float:
    """Exp of the mean negative log-likelihood of the scored tokens, in batches of windows of like lengths."""
    nats, tokens = 0.0, 0
    for start in range(0, len(windows), 16):
        part = windows[start : start + 16]
        longest = len(part[-1][0])
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in part])
        scores = model(ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        for row, (text, first) in zip(scores, part, strict=True):
            nats -= float(row[first - 1 : len(text) - 1].sum())
            tokens += len(text) - first
    return math.exp(nats / tokens)


def train(teacher: Any, method: Method, data: Iterator[Tensor], steps: int, lr: float) -> tuple[Any, float]:
    """The trained model and seconds of processor time, which other work on the machine does not lengthen."""
    if method.blockwise:
        return train_by_blocks(copy.deepcopy(teacher), method, data, steps, lr)
    student = copy.deepcopy(teacher).requires_grad_(True)
    model = prepare_qat(student, QATConfig(**method.config)).train()
    attach_extras(model)
    optimizers = make_optimizers(model, method, lr)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    loss = DistillationLoss(**method.loss)
    rise = min(20, steps)
    started = time.process_time()
    for step in range(steps):
        progress = max(0.0, (step - rise) / max(1, steps - rise))
        rate = (step + 1) / rise if step < rise else 0.55 + 0.45 * math.cos(math.pi * progress)
        for optimizer, highest in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = highest * min(1.0, rate)
        if method.warmup:
            strength = warmup_strength(step, round(method.warmup * steps))
            set_strength(model, strength if strength < 1 else None)
        if method.anneal:
            set_sharpness(model, anneal_sharpness(step, round(method.anneal * steps)))
        if method.residual:
            set_residual(model, residual_strength(step, round(method.residual * steps)))
        ids = next(data)
        hidden = bool(loss.off)
        with torch.no_grad():
            guide = teacher(ids, output_hidden_states=hidden)
        terms = loss(model(ids, output_hidden_states=hidden), guide, labels=ids)
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()  # here, because a peer sets gradients in its forward pass
        if method.anneal:
            clip_latents(model)
    seconds = time.process_time() - started
    if method.residual:
        set_residual(model, None)
    return model.eval(), seconds


def make_optimizers(model: Any, method: Method, lr: float) -> list[torch.optim.Optimizer]:
    """Each with one group of parameters."""
    matrices = [layer.weight for _, layer in qat_layers(model)] if method.muon else []
    taken = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=method.muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return made


def train_by_blocks(teacher: Any, method: Method, data: Iterator[Tensor], steps: int, lr: float) -> tuple[Any, float]:
    """EfficientQAT: blocks, then scales. Every block sees the first tokens once: the cost of one pass of the model."""
    model = prepare_qat(copy.deepcopy(teacher), QATConfig(**method.config))
    first = round(method.blockwise * steps)
    started = time.process_time()
    ids = torch.cat([next(data) for _ in range(first)])
    rest = [row for _ in range(steps - first) for row in next(data).int().numpy()]
    batch = len(ids) // first
    hidden, arguments = capture_inputs(model, model.model.layers[0], ids.numpy())
    blocks = BlocksInMemory(teacher.model.layers, model.model.layers, arguments)
    # A block learns from its own output, which bears larger steps and smaller batches than the loss of the model.
    rates = {"weight_rate": 2 * lr, "scale_rate": lr / 2, "clip": 1.0}
    train_blocks(blocks, hidden, BlockwiseOptions(epochs=1, batch=max(1, batch // 4), **rates))
    tune_scales(model, teacher, rest, TuningOptions(len(rest) * len(rest[0]), scale_rate=10 * lr, batch=batch))
    return model.eval(), time.process_time() - started


def table(results: list[dict[str, Any]]) -> str:
    """Mean and spread per method and size of the run, best first."""
    rows = ["| method | steps x batch x length | seeds | perplexity | tokens/s of one core |", "|---|---|---|---|---|"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        key = tuple(result[name] for name in ("method", "steps", "batch", "tokens", "lr"))
        groups.setdefault(key, []).append(result)
    for key, runs in sorted(groups.items(), key=lambda item: statistics.mean(r["perplexity"] for r in item[1])):
        name, steps, batch, tokens, _ = key
        values = [run["perplexity"] for run in runs]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        speed = statistics.median(run["tokens"] / run["seconds"] for run in runs)
        size = f"{steps} x {batch} x {tokens // (steps * batch)}"
        rows.append(f"| {name} | {size} | {len(values)} | {statistics.mean(values):.2f}{spread} | {speed:.0f} |")
    return "\n".join(rows)


def main() -> None:
    """Reads the command line and runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(table(done))
        return
    register_peers()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_folder(args.model)
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    stories = [tokenizer.encode(text) for text in split_documents(args.train.read_text(encoding="utf-8"))]
    stream = torch.tensor([token for story in stories for token in story])
    documents = [tokenizer.encode(text) for text in split_documents(args.valid.read_text(encoding="utf-8"))]
    windows = scored_windows(documents, teacher.config.max_position_embeddings)
    print(
        f"full precision: perplexity {perplexity(teacher, windows):.3f}, {len(stream)} tokens to train on", flush=True
    )
    for seed in args.seeds:
        for name in args.methods:
            tokens = args.steps * args.batch * args.length
            key = {"method": name, "seed": seed, "steps": args.steps, "batch": args.batch, "lr": args.lr}
            key["tokens"] = tokens
            if any(all(run.get(k) == v for k, v in key.items()) for run in done):
                continue
            data = batches(stream, args.batch, args.length, seed)
            model, seconds = train(teacher, METHODS[name], data, args.steps, args.lr)
            result = {**key, "seconds": round(seconds, 1)}
            result["perplexity"] = round(perplexity(model, windows), 4)
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(result, flush=True)


if __name__ == "__main__":
    main()
