# SPDX-License-Identifier: Apache-2.0
"""Folders that MLX packed: equal to the dense model of the same weights, refused where they are not ternary."""

from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest
from numpy.typing import NDArray
from numpy_model import NumpyModel

from ternaryforge import FormatError, TernaryModel, convert, plan
from ternaryforge.inspection import inspect

IDS = [5, 99, 260, 7, 7, 31]
GROUP = 64
UP = "model.layers.0.mlp.up_proj"


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.uint32]:
    """[rows, cols] codes into words of 32 bits, the first code in the lowest bits."""
    per_word = 32 // bits
    lanes = codes.astype(np.uint64).reshape(codes.shape[0], -1, per_word)
    return (lanes << (bits * np.arange(per_word, dtype=np.uint64))).sum(-1).astype(np.uint32)


def make_folder(folder: Path, bits: int, changes: dict[str, Any] | None = None) -> tuple[Path, Any]:
    """A folder with packed linears and embeddings, and the witness of the same model as floats."""
    config = made_models.llama_config(
        hidden_size=128, intermediate_size=192, num_attention_heads=8, head_dim=16, tie_word_embeddings=True
    )
    rng = np.random.default_rng(bits)
    dense = made_models.make_tensors(config)
    packed: made_models.Tensors = {}
    for name, (dtype, values) in dense.items():
        if values.ndim == 1:
            packed[name] = (dtype, values)
            continue
        trits = rng.integers(-1, 2, values.shape) if bits == 2 else rng.choice([-1, 1], values.shape)
        scales = rng.uniform(0.05, 0.2, (values.shape[0], values.shape[1] // GROUP)).astype(np.float16)
        module = name.removesuffix(".weight")
        packed[name] = ("U32", pack(trits + 1 if bits == 2 else (trits + 1) // 2, bits))
        packed[module + ".scales"] = ("F16", scales * (1 if bits == 2 else 2))
        packed[module + ".biases"] = ("F16", -scales)
        dense[name] = ("F32", trits * scales.astype(np.float32).repeat(GROUP, 1))
    stored = config | {"quantization": {"group_size": GROUP, "bits": bits}}
    stored["quantization_config"] = stored["quantization"]
    packed = {name: entry for name, entry in (packed | (changes or {})).items() if entry is not None}
    made_models.write_folder(folder, stored, packed)
    return folder, NumpyModel(config, dense)


@pytest.mark.parametrize("bits", [1, 2])
def test_as_if_the_weights_were_floats(tmp_path: Path, bits: int) -> None:
    folder, witness = make_folder(tmp_path / "model", bits)
    expected = witness.logits(IDS)
    found = TernaryModel.from_pretrained(folder, activations="float").logits(IDS)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    report = inspect(folder)
    assert report.quantization is not None
    assert (report.quantization["method"], report.quantization["code_bits"]) == ("mlx", bits)
    weights = sum(values.size for _, values in witness.tensors.values() if values.ndim == 2)
    assert plan(folder, prompt_tokens=4, max_new_tokens=4).ternary_params == weights
    with pytest.raises(FormatError, match="MLX packed these weights, which run as they are"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({UP + ".weight": ("U32", np.full((192, 8), 0xFF))}, f"tensor '{UP}.weight' is not ternary: .mlx."),
        ({UP + ".biases": ("F16", np.zeros((192, 2)))}, f"tensor '{UP}.weight' is not ternary: .mlx."),
        ({UP + ".weight": ("U32", np.zeros((192, 9)))}, r"has shape \[192, 9\], expected \[192, 8\]: codes of 2 bits"),
        ({UP + ".scales": ("F16", np.ones((192, 3)))}, rf"'{UP}.scales' has shape \[192, 3\], expected \[192, 2\]"),
        ({UP + ".scales": ("F16", np.full((192, 2), np.nan))}, f"'{UP}.weight' is not ternary"),
        ({UP + ".biases": None}, f"tensor '{UP}.biases' is missing"),
    ],
)
def test_refused_tensors(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    folder, _ = make_folder(tmp_path, 2, changes)
    with pytest.raises(FormatError, match=text):
        TernaryModel.from_pretrained(folder)
