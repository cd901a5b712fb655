# SPDX-License-Identifier: Apache-2.0
"""Trains the wheel's embedded model: a natively ternary (BitNet b1.58) Llama of 3.1 M weights that tells short stories.

Run: python train_embedded_model.py --data train.txt --synthetic FOLDER --out RUN --minutes 95
     python train_embedded_model.py ... --resume      (goes on from RUN/checkpoint.pt, with the time that was left)

--data is text with stories separated by <|endoftext|>; its last 3 % are held out. --synthetic is a folder of such files
(see sample_stories.py); its share falls to nothing by the end. RUN/model becomes a checkpoint that plain
transformers loads (model_type "llama", quantization "bitnet" with packed "bitlinear" weights); RUN/master.pt holds
the latent float32 weights. With --full-precision 1 nothing becomes ternary, and RUN/model is the float32 twin of the
embedded model. Needs torch, tokenizers, safetensors.

The first part of the run is trained in full precision, the rest in ternary: weights one absmean scale per matrix,
activations int8 with one scale per token, both straight-through (BitNet b1.58, arXiv:2402.17764). The matrices are
moved by Muon, embeddings and norms by AdamW. All schedules follow the share of --minutes that has passed.
"""

import argparse
import ctypes
import dataclasses
import json
import logging
import math
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)

SEPARATOR = "<|endoftext|>"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
IGNORED = -100  # the target of a position that is not scored


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of the model, named as in its config.json; every matrix has a multiple of 256 inputs."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


def weight_scale(weight: Tensor) -> Tensor:
    """Returns 1 / mean|W|, the factor that takes the latent weights to the grid -1, 0, 1."""
    return 1 / weight.abs().mean().clamp(min=1e-5)


def ternary_codes(weight: Tensor) -> Tensor:
    """Returns the trits of a latent matrix, as floats."""
    return (weight * weight_scale(weight)).round().clamp(-1, 1)


class TernaryLinear(torch.autograd.Function):
    """y = x W' for all `weights` stacked: int8 activations by trits; gradients pass both quantizers unchanged.

    The codes are small integers, exact in bfloat16. Only the products' sums are rounded to bfloat16, and only there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        """Returns x [tokens, in] times all weights [out, in], as float32 [tokens, sum of out]."""
        x_scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        q = (x * x_scale).round().clamp(-128, 127).to(dtype)
        codes = torch.cat([ternary_codes(w).to(dtype) for w in weights])
        w_scale = torch.cat([weight_scale(w).expand(len(w)) for w in weights])
        ctx.save_for_backward(q, codes, x_scale, w_scale)
        ctx.rows = [len(w) for w in weights]
        return F.linear(q, codes).float() / (x_scale * w_scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x, of dtype (none), and of each weight."""
        q, codes, x_scale, w_scale = ctx.saved_tensors
        grad_x = (grads[0] / w_scale).to(q.dtype) @ codes
        grad_w = (grads[0] / x_scale).to(q.dtype).T @ q
        return grad_x.float(), None, *grad_w.float().split(ctx.rows)


def is_matrix(name: str) -> bool:
    """Tells a parameter that is made ternary from the others by its name."""
    return name.endswith("_proj.weight")


def linear(x: Tensor, weights: list[Tensor], ternary: bool, dtype: torch.dtype) -> Tensor:
    """Returns x times the stacked `weights`, multiplied in `dtype`: [tokens, in] -> float32 [tokens, sum of out]."""
    if ternary:
        return TernaryLinear.apply(x, dtype, *weights)
    return F.linear(x.to(dtype), torch.cat(weights).to(dtype)).float()


class Layer(nn.Module):
    """One decoder layer; its parameters are named as in transformers' Llama."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        hidden, ffn = shape.hidden_size, shape.intermediate_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.input_layernorm = nn.RMSNorm(hidden, shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, shape.rms_norm_eps)
        self.self_attn = matrices(q_proj=(hidden, q), k_proj=(hidden, kv), v_proj=(hidden, kv), o_proj=(q, hidden))
        self.mlp = matrices(gate_proj=(hidden, ffn), up_proj=(hidden, ffn), down_proj=(ffn, hidden))
        with torch.no_grad():  # the sum of all branches starts with the variance of one
            self.self_attn["o_proj"].weight *= (2 * shape.num_hidden_layers) ** -0.5
            self.mlp["down_proj"].weight *= (2 * shape.num_hidden_layers) ** -0.5

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], ternary: bool, dtype: torch.dtype, drop: float) -> Tensor:
        """Returns the residual stream [batch, length, hidden] after this layer."""

        def project(x: Tensor, module: nn.ModuleDict, *names: str) -> Tensor:
            weights = [cast("Tensor", module[name].weight) for name in names]
            return linear(x.flatten(0, 1), weights, ternary, dtype).unflatten(0, x.shape[:2])

        h = project(self.input_layernorm(x), self.self_attn, "q_proj", "k_proj", "v_proj")
        heads = h.unflatten(-1, (-1, self.head_dim))
        turned, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        q, k = rotate(turned, rope).split([self.heads, self.kv_heads], dim=2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (k, v))
        h = attention(*(t.to(dtype).transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2).float()
        x = x + F.dropout(project(h, self.self_attn, "o_proj"), drop, self.training)
        gate, up = project(self.post_attention_layernorm(x), self.mlp, "gate_proj", "up_proj").chunk(2, dim=-1)
        return x + F.dropout(project(F.silu(gate) * up, self.mlp, "down_proj"), drop, self.training)


def matrices(**sizes: tuple[int, int]) -> nn.ModuleDict:
    """Returns linear layers of (inputs, outputs), drawn so that they keep the variance of what goes in."""
    layers = {name: nn.Linear(*size, bias=False) for name, size in sizes.items()}
    for layer in layers.values():
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return nn.ModuleDict(layers)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns [batch, length, heads, head_dim] by rotary position, pairing the two halves of a head (as Llama does)."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = rope
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns causal attention over [batch, heads, length, head_dim]; written out it beats the fused kernel here."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype) @ v


class Model(nn.Module):
    """A Llama decoder with tied embeddings; `ternary` switches the matrices between full precision and ternary."""

    def __init__(self, shape: Shape, drop: float = 0.0) -> None:
        super().__init__()
        self.shape, self.drop = shape, drop
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        powers = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        angles = torch.arange(shape.max_position_embeddings)[:, None] * shape.rope_theta**-powers
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, ids: Tensor, targets: Tensor, ternary: bool, dtype: torch.dtype) -> Tensor:
        """Returns the summed nats of the scored targets; ids and targets are [batch, length]."""
        x = self.embed_tokens(ids)
        rope = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, rope, ternary, dtype, self.drop)
        logits = F.linear(self.norm(x).to(dtype), self.embed_tokens.weight.to(dtype)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


# The data -------------------------------------------------------------------------------------------------------------

Window = tuple[list[int], int]  # token ids, and the index of the first one that is scored


def documents(path: Path) -> list[str]:
    """Returns the stories of a file."""
    return [d.strip() for d in path.read_text(encoding="utf-8").split(SEPARATOR) if d.strip()]


def train_tokenizer(docs: list[str], vocab: int) -> Tokenizer:
    """Returns a byte-level BPE that puts BOS first; every text comes back from its tokens unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(docs, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def windows(ids: list[int], context: int) -> list[Window]:
    """Cuts a document into windows that overlap by half and together score each token but the first exactly once."""
    result, start, scored = [], 0, 1
    while scored < len(ids):
        result.append((ids[start : start + context], scored - start))
        scored, start = start + len(result[-1][0]), start + context // 2
    return result


def batch_of(chosen: list[Window]) -> tuple[Tensor, Tensor]:
    """Returns ids and targets, padded to the longest window; padding is at the end, where it is not attended to."""
    longest = max(len(ids) for ids, _ in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.long)
    targets = torch.full((len(chosen), longest), IGNORED)
    for row, (window, first) in enumerate(chosen):
        ids[row, : len(window)] = torch.tensor(window)
        targets[row, first : len(window)] = ids[row, first : len(window)]
    return ids[:, :-1], targets[:, 1:]


def batches(pool: list[Window], tokens: int) -> Iterator[list[Window]]:
    """Yields groups of windows of like length, at most `tokens` ids when padded; the last group is what is left."""
    chosen: list[Window] = []
    for window in sorted(pool, key=lambda w: len(w[0])):
        if (len(chosen) + 1) * len(window[0]) > tokens:
            yield chosen
            chosen = []
        chosen.append(window)
    yield chosen


def cycle(items: list[Window], rng: random.Random) -> Iterator[Window]:
    """Yields all items in random order, and then again in another one, for ever."""
    while True:
        yield from rng.sample(items, len(items))


def learning_rate(progress: float) -> float:
    """The share of the peak rate: a short warm-up, a plateau, and a straight line to zero."""
    return max(0.0, min(progress / 0.01, 1.0, (1 - progress) / 0.7))


def real_share(progress: float, start: float) -> float:
    """The share of real stories: `start` in the first half, all in the last tenth, a straight line between."""
    return start + (1 - start) * min(1.0, max(0.0, (progress - 0.5) / 0.4))


@torch.no_grad()
def bits_per_byte(model: Model, docs: list[Window], size: int, ternary: bool, dtype: torch.dtype) -> float:
    """Returns the mean of `docs`, which are `size` bytes of text."""
    model.eval()
    nats = sum(model(*batch_of(chosen), ternary, dtype).item() for chosen in batches(docs, 8192))
    model.train()
    return nats / math.log(2) / size


class Trainer:
    """One run: the model, its optimizers, the streams of windows, and the clock that all schedules follow."""

    def __init__(self, args: argparse.Namespace, shape: Shape) -> None:
        self.args, self.step, self.tokens, self.elapsed = args, 0, 0, 0.0
        args.out.mkdir(parents=True, exist_ok=True)
        docs = documents(args.data)
        first = len(docs) - len(docs) * 3 // 100
        made = [doc for file in sorted(args.synthetic.glob("*.txt")) for doc in documents(file)]
        self.tokenizer = train_tokenizer(docs[:first], shape.vocab_size)
        eos = cast("int", self.tokenizer.token_to_id(EOS))
        self.real = self.encode(docs[:first], shape, [eos])
        self.synthetic = self.encode(made, shape, [eos])
        self.held_out = self.encode(docs[first:], shape, [])
        self.held_out_bytes = sum(len(doc.encode()) for doc in docs[first:])
        sizes = [sum(len(ids) for ids, _ in stream) for stream in (self.real, self.synthetic, self.held_out)]
        log.info("tokens: %d real, %d synthetic, %d held out", *sizes)
        torch.manual_seed(args.seed)
        self.model = Model(shape, args.dropout)
        self.loss = torch.compile(self.model, dynamic=True)
        matrices = [p for n, p in self.model.named_parameters() if is_matrix(n)]
        others = [p for n, p in self.model.named_parameters() if not is_matrix(n)]
        self.optimizers = [
            torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def encode(self, docs: list[str], shape: Shape, end: list[int]) -> list[Window]:
        """Returns the windows of all documents, each document with the tokens `end` appended."""
        encoded = self.tokenizer.encode_batch(docs)
        return [w for e in encoded for w in windows(e.ids + end, shape.max_position_embeddings)]

    @property
    def progress(self) -> float:
        """The share of the time that has passed."""
        return self.elapsed / (self.args.minutes * 60)

    @property
    def ternary(self) -> bool:
        """Whether the time of full precision is over."""
        return self.args.full_precision < 1 and self.progress >= self.args.full_precision

    def stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches for ever: pools of some batches of mixed windows, sorted by length, in random order."""
        rng = random.Random(self.args.seed + self.step)
        real, synthetic = cycle(self.real, rng), cycle(self.synthetic, rng)
        pool: list[Window] = []
        while True:
            share = real_share(self.progress, self.args.real_start) if self.synthetic else 1.0
            while sum(len(ids) for ids, _ in pool) < 16 * self.args.batch:
                pool.append(next(real if rng.random() < share else synthetic))
            *groups, pool = batches(pool, self.args.batch)
            yield from map(batch_of, rng.sample(groups, len(groups)))

    def update(self, ids: Tensor, targets: Tensor) -> float:
        """Makes one step and returns the mean nats of a token."""
        loss = self.loss(ids, targets, self.ternary, torch.bfloat16) / (targets != IGNORED).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, (self.args.muon_lr, self.args.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(self.progress)
                if self.progress > 0.5:
                    group["weight_decay"] = 0.0
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += int((targets != IGNORED).sum())
        return loss.item()

    def save(self) -> None:
        """Writes the checkpoint to resume from and, once its weights have their final form, the loadable model."""
        counters = {"step": self.step, "tokens": self.tokens, "elapsed": self.elapsed}
        optimizers = [o.state_dict() for o in self.optimizers]
        state = {"model": self.model.state_dict(), "optimizers": optimizers, "counters": counters}
        torch.save(state, self.args.out / "checkpoint.new")
        (self.args.out / "checkpoint.new").replace(self.args.out / "checkpoint.pt")
        if self.ternary or self.args.full_precision >= 1:
            torch.save(self.model.state_dict(), self.args.out / "master.pt")
            export(self.model, self.tokenizer, self.args.out / "model", self.args.full_precision < 1)

    def resume(self) -> None:
        """Goes back to the last checkpoint."""
        state = torch.load(self.args.out / "checkpoint.pt")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        vars(self).update(state["counters"])

    def evaluate(self, dtype: torch.dtype = torch.bfloat16) -> float:
        """Returns the bits per byte of the held-out stories."""
        return bits_per_byte(self.model, self.held_out, self.held_out_bytes, self.ternary, dtype)

    def train(self) -> None:
        """Trains until the time is over; saves on the way, and also when it is interrupted."""
        before = time.monotonic()
        saved, mean = self.elapsed, math.nan
        try:
            for ids, targets in self.stream():
                nats = self.update(ids, targets)
                mean = nats if math.isnan(mean) else 0.98 * mean + 0.02 * nats
                now = time.monotonic()
                self.elapsed, before = self.elapsed + now - before, now
                if self.progress >= 1:
                    break
                if self.step % 20 == 0:
                    log.info("step %d, %.0f s, %d tokens: %.3f nats", self.step, self.elapsed, self.tokens, mean)
                if self.elapsed - saved > self.args.save_minutes * 60:
                    saved = self.elapsed
                    self.save()
                    log.info("held out: %.4f bits per byte at %.3f of the time", self.evaluate(), self.progress)
        finally:
            self.save()
        exact = self.evaluate(torch.float32)
        log.info("held out: %.4f bits per byte after %d steps, %d tokens", exact, self.step, self.tokens)


def pack(codes: Tensor) -> Tensor:
    """Packs trits [out, in] to bytes [out / 4, in]: row j * out / 4 + r, plus 1, lies in bits 2j and 2j+1 of row r."""
    quarters = (codes + 1).to(torch.uint8).unflatten(0, (4, -1))
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def export(model: Model, tokenizer: Tokenizer, folder: Path, ternary: bool) -> None:
    """Writes config, generation config, weights (packed trits, or float32) and tokenizer as transformers loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict(prefix="model.").items():
        if not ternary:
            tensors[name] = tensor
        elif is_matrix(name):
            tensors[name] = pack(ternary_codes(tensor))
            tensors[name + "_scale"] = weight_scale(tensor).reshape(1)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ids = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)}
    quantization = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(model.shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "bfloat16" if ternary else "float32",
        **ids,
    }
    if ternary:
        config["quantization_config"] = {**quantization, "modules_to_not_convert": ["lm_head"]}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
    }
    files = {"config.json": config, "generation_config.json": ids, "tokenizer_config.json": tokenizer_config}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed: mapping big tensors anew in every step costs a third of the speed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    """Reads the command line, trains, exports."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="real stories")
    parser.add_argument("--synthetic", type=Path, required=True, help="folder of .txt files; may be empty")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=95)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--muon-lr", type=float, default=1e-2)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--real-start", type=float, default=0.4, help="share of real stories in the first half")
    parser.add_argument("--full-precision", type=float, default=0.2, help="share of the time before ternary")
    parser.add_argument("--save-minutes", type=float, default=4)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end as by Ctrl-C, with a checkpoint
    keep_freed_memory()
    trainer = Trainer(args, Shape())
    if args.resume:
        trainer.resume()
    trainer.train()


if __name__ == "__main__":
    main()
