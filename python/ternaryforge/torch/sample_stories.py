# SPDX-License-Identifier: Apache-2.0
"""Samples stories from a small Llama checkpoint at temperature 1, as extra text to train the embedded model on.

Run: python sample_stories.py MODEL_FOLDER OUT.txt --megabytes 20
MODEL_FOLDER holds config.json, model.safetensors (float, tied embeddings) and SentencePiece's tokenizer.model.
Stories are separated by <|endoftext|>, duplicates are dropped, and so are stories that outgrow the model's context.
Needs torch, safetensors, sentencepiece.
"""

import argparse
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import sentencepiece
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

SEPARATOR = "<|endoftext|>"


@torch.compile(dynamic=True)
def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One position: q [kv heads, group, head_dim, lanes], keys and values [time, kv heads, 1, head_dim, lanes]."""
    weights = (q * keys).sum(3).softmax(0)
    return (weights[:, :, :, None] * values).sum(0)


class Sampler:
    """A Llama decoder for very small models: many texts at once, which lie along the last axis of every tensor."""

    def __init__(self, folder: Path) -> None:
        self.config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
        self.weights = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
        c = self.config
        powers = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        angles = torch.arange(c.max_position_embeddings)[:, None] * getattr(c, "rope_theta", 10000.0) ** -powers
        self.cos, self.sin = angles.cos()[..., None], angles.sin()[..., None]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Returns RMSNorm over the first axis."""
        return x * (x.square().mean(0) + self.config.rms_norm_eps).rsqrt() * self.weights[name + ".weight"][:, None]

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """Returns [heads * head_dim, lanes] as [heads, head_dim, lanes], turned by rotary position."""
        low, high = x.unflatten(0, (-1, self.config.head_dim)).chunk(2, dim=1)
        cos, sin = self.cos[position], self.sin[position]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=1)

    def probabilities(self, ids: Tensor, cache: Tensor, position: int) -> Tensor:
        """Returns the next token's distribution [lanes, vocab] and writes `position` to the cache."""
        c, w = self.config, self.weights
        group = c.num_attention_heads // c.num_key_value_heads
        x = w["model.embed_tokens.weight"][ids].T
        for layer in range(c.num_hidden_layers):
            name = f"model.layers.{layer}."
            h = self.norm(x, name + "input_layernorm")
            q, k, v = (w[f"{name}self_attn.{p}_proj.weight"] @ h for p in "qkv")
            cache[layer, 0, position] = self.rotate(k, position)[:, None]
            cache[layer, 1, position] = v.unflatten(0, (c.num_key_value_heads, 1, c.head_dim))
            q = self.rotate(q, position).unflatten(0, (c.num_key_value_heads, group)) * c.head_dim**-0.5
            h = attend(q, *cache[layer, :, : position + 1])
            x = x + w[name + "self_attn.o_proj.weight"] @ h.flatten(0, 2)
            h = self.norm(x, name + "post_attention_layernorm")
            h = F.silu(w[name + "mlp.gate_proj.weight"] @ h) * (w[name + "mlp.up_proj.weight"] @ h)
            x = x + w[name + "mlp.down_proj.weight"] @ h
        return (w["model.embed_tokens.weight"] @ self.norm(x, "model.norm")).T.softmax(-1)

    @torch.no_grad()
    def sample(self, lanes: int) -> list[list[int]]:
        """Returns the ids of those of `lanes` sampled texts that ended within the context, without BOS and EOS."""
        c = self.config
        context = c.max_position_embeddings
        cache = torch.empty(c.num_hidden_layers, 2, context, c.num_key_value_heads, 1, c.head_dim, lanes)
        ends = torch.tensor([c.bos_token_id, c.eos_token_id])
        ids = torch.full((lanes, context), c.bos_token_id)
        finished: list[list[int]] = []
        for length in range(1, context):
            ids[:, length] = torch.multinomial(self.probabilities(ids[:, length - 1], cache, length - 1), 1)[:, 0]
            if length % 32 and length < context - 1:
                continue
            is_end = torch.isin(ids[:, 1 : length + 1], ends)  # now and then the lanes that ended are taken out
            ended = is_end.any(1)
            lengths = is_end[ended].int().argmax(1).tolist()
            finished += [row[1 : 1 + n] for row, n in zip(ids[ended].tolist(), lengths, strict=True)]
            if ended.all():
                break
            ids, cache = ids[~ended], cache[..., ~ended]
        return finished


def main() -> None:
    """Reads the command line and samples until the file is big enough."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--lanes", type=int, default=256, help="texts sampled at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    sampler = Sampler(args.model)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(args.model / "tokenizer.model"))
    seen: set[str] = set()
    size = 0
    with args.out.open("w", encoding="utf-8") as file:
        while size < args.megabytes * 1e6:
            for ids in sampler.sample(args.lanes):
                story = pieces.decode(ids).strip()
                if story and story not in seen:
                    seen.add(story)
                    size += file.write(f"{story}\n{SEPARATOR}\n")
            file.flush()
            log.info("%d stories, %.1f MB", len(seen), size / 1e6)


if __name__ == "__main__":
    main()
