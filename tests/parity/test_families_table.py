# SPDX-License-Identifier: Apache-2.0
"""docs/reference/families.md says what the tests of this folder check; run this file to write it anew."""

from pathlib import Path
from typing import Any

from hf_models import CONFIGS, transformers
from test_packed_families import BONSAI
from test_packed_families import CASES as STORED
from test_transformers_bitnet import CASES as PACKED
from test_transformers_checkpoints import SOURCES as CONVERTED
from test_transformers_dense import CASES as DENSE
from test_transformers_families import ABSENT, MODELS, OLDER, ROTATIONS

from ternaryforge.families import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "families.md"
IN_DENSE_TESTS = {"llama": 2, "bitnet": 1}  # test_config_as_older_versions_write_it, test_default_base_of_the_rotation
TEXT = """\
# Model families

Written by `tests/parity/test_families_table.py` from the parameters of the tests: the numbers count random models with
odd sizes, each held against transformers in float32. Change the tests, not this page.

| architecture | dense | config drift | stock | own scales | latents | converted |
|---|---|---|---|---|---|---|
{rows}

- *dense*: float checkpoints; logits of 1, 7 and 150 tokens within 1e-4 of the largest, 64 greedy tokens equal. Windows
  are shorter than the texts.
- *config drift*: fields that are absent, or stand where older versions wrote them; logits within 1e-4.
- *stock*: ternary `bitnet` checkpoints with int8 activations; each linear layer within 1e-5 on the same input, 64
  greedy tokens equal.
- *own scales*: `ternaryforge` folders with a scale per tensor, row or group of columns; each linear layer within 1e-5,
  logits within 1e-4, three greedy texts of 64 tokens equal.
- *latents*: float weights of quantisation-aware training, rounded at load; 64 greedy tokens equal. `BitnetForCausalLM`
  is held against the bitnet class of transformers with SiLU, since it has no such class.
- *converted*: dense models that `convert` made ternary, read by plain transformers; weights exact, 64 greedy tokens
  equal.

[Ternary-Core](ternary-core.md) has a config.json of its own and no class in transformers; a forward pass in NumPy is
its witness (`tests/python/test_ternary_core.py`).

| published models | stored as | checked by the case |
|---|---|---|
{published}

Rotations, each as *dense*: {rotations}; of the scaled ones the frequencies are compared too.
Weights in a rotated basis (`hadamard` in config.json) are refused.
Any other kind of rotation, such as `longrope`, is refused by name, and so is every field of a config.json that is not
known.
"""

# What is published, how it is stored, and the random model of the tests that is like it.
PUBLISHED = [
    ("BitNet-b1.58-2B-4T", "stock, multiply, tied, BF16 ends", "bitnet multiply tied bfloat16", PACKED),
    ("BitNet-b1.58-2B-4T-bf16", "latents", "bitnet online bfloat16", PACKED),
    ("Llama3-8B-1.58", "stock, divide", "Llama3-8B-1.58 stock", STORED),
    ("Falcon3-1B to 10B-1.58bit", "stock, divide, head size apart", "Falcon3-1.58 stock", STORED),
    ("Falcon-E-1B, 3B", "stock, divide, modules listed", "Falcon-E stock", STORED),
    ("Ternary-Bonsai-1.7B, 4B (unpacked)", "dense, groups of 128, tied ends ternary, YaRN", "Ternary-Bonsai", BONSAI),
    ("Ternary-Bonsai-8B (unpacked)", "the same, with a head apart", "Ternary-Bonsai, head apart", BONSAI),
    ("Bonsai (binary, unpacked)", "dense, groups of 128, -1 and +1", "binary Bonsai", BONSAI),
    ("SmolLM, SmolLM2", "dense, tied, three query heads for each of the keys", "llama shaped as SmolLM2", MODELS),
    ("phi-1.5, phi-2", "dense, LayerNorm, parallel layers, a part of each head rotated", "phi", MODELS),
    ("bitnet_b1_58-large, -3B (1bitLLM)", "latents", "test_latents_of_1bitllm", ["test_latents_of_1bitllm"]),
]


def count(cases: Any, family: str) -> int:
    return sum(1 for case in cases if case[0] == family)


def make_page() -> str:
    rows = []
    for family in FAMILIES:
        name = next((n for n, c in CONFIGS.items() if getattr(transformers, c).model_type == family.name), "")
        packed = [(case.split()[0], "online" in case) for case in PACKED]  # as the tests are named
        counts = [
            count(MODELS.values(), name) + 2 * count(DENSE, name),  # those of the dense tests in two dtypes
            count(OLDER.values(), name) + (name in ABSENT) + IN_DENSE_TESTS.get(name, 0),
            packed.count((name, False)) + sum(c[0] == name and c[2].startswith("stock") for c in STORED.values()),
            sum(case[0] == name and not case[2].startswith("stock") for case in STORED.values())
            + (len(BONSAI) if name == "qwen3" else 0),
            packed.count((name, True)) + (name == "qwen2"),  # test_biases_of_latents_in_training
            count(CONVERTED.values(), name),
        ]
        if family.architecture == "BitnetForCausalLM":
            counts = [0, 0, 0, 0, 1, 0]  # test_latents_of_1bitllm
        rows.append(" | ".join([f"| `{family.architecture}`", *(str(n or "-") for n in counts)]) + " |")
    published = []
    for models, form, case, cases in PUBLISHED:
        assert case in cases
        published.append(f"| {models} | {form} | `{case}` |")
    kinds = dict.fromkeys(f"`{fields['rope_type']}`" for fields in ROTATIONS.values())
    return TEXT.format(rows="\n".join(rows), published="\n".join(published), rotations=", ".join(["`default`", *kinds]))


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page()


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
