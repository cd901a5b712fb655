# SPDX-License-Identifier: Apache-2.0
"""Dense checkpoints of transformers, loaded unconverted: the logits and the greedy text of transformers in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
from hf_models import (
    MIN_DISTINCT,
    figures,
    load_float32,
    make_config,
    make_model,
    peer_greedy,
    peer_logits,
    random_ids,
    relative_error,
    torch,
)

from ternaryforge import TernaryModel

LENGTHS = (1, 7, 33, 150)
LLAMA: dict[str, dict[str, Any]] = {
    "3 wide heads": {"hidden_size": 51, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 20},
    "4 narrow heads": {"hidden_size": 76, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "GQA 6/2": {
        "hidden_size": 78,
        "intermediate_size": 172,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 22,
        "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
    },
    "5 heads": {"hidden_size": 100, "num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 2},
}
BITNET: dict[str, dict[str, Any]] = {
    "3 heads": {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3},
    "GQA 6/2": {
        "hidden_size": 84,
        "intermediate_size": 172,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
    },
}
CASES = [("llama", name) for name in LLAMA] + [("bitnet", name) for name in BITNET]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_dense_model(tmp_path: Path, family: str, name: str, dtype: str) -> None:
    config = make_config(family, **(LLAMA if family == "llama" else BITNET)[name])
    make_model(config, seed=1).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    ours, theirs = TernaryModel.from_pretrained(tmp_path), load_float32(tmp_path)
    assert ours.transformer.activations == "float"
    for count in LENGTHS:
        ids = random_ids(count)
        error = relative_error(ours.logits(ids), peer_logits(theirs, ids))
        figures.info("%s %s %s, %d tokens: relative error %.1e", family, name, dtype, count, error)
        assert error <= 1e-4
    prompts = [random_ids(7, seed=seed) for seed in range(3)]
    texts, _ = peer_greedy(theirs, prompts, 64)
    assert max(len(set(text)) for text in texts) >= MIN_DISTINCT
    assert [result.token_ids for result in ours.generate(prompts, max_new_tokens=64)] == texts


def test_config_as_older_versions_write_it(tmp_path: Path) -> None:
    """The rotation's base beside the other fields, `torch_dtype`, and no head_dim."""
    config = make_config("llama", **LLAMA["5 heads"])
    make_model(config).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "head_dim", "dtype"):
        del fields[name]
    fields |= {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ids = random_ids(33)
    expected = peer_logits(load_float32(tmp_path), ids)
    assert relative_error(TernaryModel.from_pretrained(tmp_path).logits(ids), expected) <= 1e-4


@pytest.mark.parametrize("family", ["llama", "bitnet"])
def test_default_base_of_the_rotation(tmp_path: Path, family: str) -> None:
    make_model(make_config(family)).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ids = random_ids(33)
    expected = peer_logits(load_float32(tmp_path), ids)
    assert relative_error(TernaryModel.from_pretrained(tmp_path).logits(ids), expected) <= 1e-4
