# SPDX-License-Identifier: Apache-2.0
"""Shapes of well-known models: their sizes against published counts, and random weights that are valid codes."""

import copy

import numpy as np
import pytest

from ternaryforge import _core, shapes
from ternaryforge.families import read_architecture

# Parameters of the ternary linear layers and of everything, as the makers or their papers count them.
PUBLISHED = {
    "bitnet-2b-4t": (2_084_044_800, 2.412e9),
    "falcon3-1b": (None, 1.669e9),
    "llama3-8b": (None, 8.03e9),
    "qwen3-1.7b": (None, 1.72e9),
    "3b": (None, 3.3e9),
    "7b": (None, 6.74e9),
    "13b": (None, 13.02e9),
    "70b": (None, 68.98e9),
}


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_it_has_the_published_number_of_parameters(name: str) -> None:
    architecture = shapes.read_shape(name)
    sizes = {slot: rows * cols for slot, (rows, cols) in architecture.spec.slots().items()}
    linear, total = PUBLISHED[name]
    assert sum(sizes.values()) == pytest.approx(total, rel=0.01)
    if linear is not None:
        assert sum(size for slot, size in sizes.items() if architecture.is_linear(slot)) == linear
    assert all(architecture.is_ternary(slot) for slot in sizes if architecture.is_linear(slot))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"\[shape\] .*bitnet-2b-4t, .*70b, got '8b'"):
        shapes.shape_config("8b")


def test_a_configuration_is_a_copy() -> None:
    shapes.shape_config("7b")["quantization_config"]["quant_method"] = "none"
    assert shapes.shape_config("7b")["quantization_config"] == {"quant_method": "bitnet"}


def test_random_codes_are_valid_trits_in_known_shares() -> None:
    codes = shapes.random_codes(np.random.SFC64(3), 1_000_003)
    assert codes.size == 1_000_003
    counts = np.bincount((codes[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).ravel(), minlength=4)
    assert counts[3] == 0
    assert counts[:3] / codes.size / 4 == pytest.approx([0.25, 0.5, 0.25], abs=1e-3)
    assert _core.formats.hf_packed_is_valid(codes)
    np.testing.assert_array_equal(codes, shapes.random_codes(np.random.SFC64(3), 1_000_003))
    assert (codes != shapes.random_codes(np.random.SFC64(4), 1_000_003)).mean() > 0.9


def small_config() -> dict[str, object]:
    """The qwen3 shape with every size divided."""
    return shapes.shape_config("qwen3-1.7b") | {
        "vocab_size": 1000,
        "hidden_size": 96,
        "intermediate_size": 224,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
    }


def test_random_weights_run_and_keep_the_size_of_what_they_carry() -> None:
    architecture = read_architecture(small_config(), where="small")
    weights = shapes.random_weights(architecture, seed=1)
    assert weights["layers.1.up"].layout == "t16"
    assert np.unique(_core.formats.unpack(weights["layers.1.up"].data, "t16", 224, 96)).tolist() == [-1, 0, 1]
    dense = shapes.random_weights(architecture, seed=1, layout="t20")["layers.1.up"]
    assert dense.layout == "t20"
    np.testing.assert_array_equal(
        _core.formats.unpack(dense.data, "t20", 224, 96),
        _core.formats.unpack(weights["layers.1.up"].data, "t16", 224, 96),
    )
    embedding = (weights["embedding"].data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert np.abs(embedding).min() >= 2**-6
    assert np.abs(embedding).max() < 2**-5
    assert abs((embedding > 0).mean() - 0.5) < 0.01
    # A layer of random codes at this scale neither blows up nor fades out.
    x = np.random.default_rng(0).standard_normal((64, 224), dtype=np.float32)
    y = _core.kernels.linear(x, weights["layers.0.down"], activations="float")
    assert 0.8 < y.std() < 1.2
    transformer = _core.model.Transformer(architecture.spec, weights, activations="int8", threads=1)
    logits = transformer.forward([(np.arange(40, dtype=np.int32), transformer.new_sequence())], logits="all")
    assert np.isfinite(logits).all()
    assert 0.02 < logits.std() < 2


def test_a_shape_that_does_not_fill_its_tiles_is_refused() -> None:
    config = copy.deepcopy(small_config()) | {"intermediate_size": 200}
    with pytest.raises(ValueError, match=r"\[shape\] .*'layers.0.gate'.* 200 x 96"):
        shapes.random_weights(read_architecture(config, where="odd"))


def test_a_whole_model_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHAPES", {"small": small_config()})
    transformer = shapes.random_transformer("small", threads=1)
    assert transformer.activations == "int8"
    token = np.array([5], np.int32)
    first = transformer.forward([(token, transformer.new_sequence())])
    again = shapes.random_transformer("small", threads=1)
    np.testing.assert_array_equal(first, again.forward([(token, again.new_sequence())]))
    other = shapes.random_transformer("small", threads=1, activations="float", seed=1)
    assert other.activations == "float"
    assert not np.array_equal(first, other.forward([(token, other.new_sequence())]))
