# SPDX-License-Identifier: Apache-2.0
"""Models on our kernels inside transformers: generation, pipelines, one graph, adapters in a Trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hf_setup import VOCABULARY, small_model, some_ids, torch, transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from ternaryforge.hf import TernaryForgeConfig, optimize
from ternaryforge.torch import QATConfig, TernaryLinear, prepare_qat


@pytest.fixture(name="fast", scope="module")
def fast_model() -> Any:
    """A model of packed layers and a quantized head, tied to its embedding."""
    return optimize(prepare_qat(small_model(tie_word_embeddings=True), QATConfig())).eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generation_in_batches_with_padding(fast: Any, options: dict[str, Any]) -> None:
    ids, mask = some_ids(3), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    tokens = fast.generate(ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0, **options)
    assert tokens.shape == (3, 17)
    assert torch.equal(tokens[:, :12], ids)


def test_steps_with_a_cache_give_the_logits_of_the_whole(fast: Any) -> None:
    ids = some_ids()
    with torch.no_grad():
        whole = fast(ids).logits
        first = fast(ids[:, :-1], use_cache=True)
        last = fast(ids[:, -1:], past_key_values=first.past_key_values).logits
    assert (last[:, 0] - whole[:, -1]).abs().max() <= 2e-2 * whole.abs().max()


def test_a_pipeline(fast: Any) -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))  # noqa: S106 # no password
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")  # noqa: S106
    generate = transformers.pipeline("text-generation", model=fast, tokenizer=tokenizer)
    texts = generate("w1 w2 w3", max_new_tokens=4, do_sample=False)
    assert texts[0]["generated_text"].removeprefix("w1 w2 w3").count("w") == 4


def test_a_whole_model_is_one_graph() -> None:
    fast = optimize(prepare_qat(small_model(num_hidden_layers=1), QATConfig())).eval()
    program = torch.export.export(fast, (some_ids(),), {"use_cache": False}, strict=False)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("ternaryforge.linear" in name for name in names) == 7
    assert sum("ternaryforge.head" in name for name in names) == 1
    with torch.no_grad():
        assert torch.equal(program.module()(some_ids(), use_cache=False).logits, fast(some_ids()).logits)


class Adapter(torch.nn.Module):
    """A low-rank adapter beside a frozen layer."""

    def __init__(self, base: TernaryLinear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_adapters_learn_on_a_frozen_ternary_base(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "dense")
    config = TernaryForgeConfig(group_size=64)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.requires_grad_(False)
    rows = [{"input_ids": row, "labels": row} for row in some_ids(8)]
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=20, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no"
    )
    with pytest.raises(ValueError, match="purely quantized models"):
        transformers.Trainer(model, arguments, train_dataset=rows)
    assert model.hf_quantizer.is_trainable
    before = copy.deepcopy(model.state_dict())
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Adapter(getattr(layer.self_attn, name)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(some_ids(8), labels=some_ids(8)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
