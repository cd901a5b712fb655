# SPDX-License-Identifier: Apache-2.0
"""benchmarks/peer_files.py: what other engines are measured on is what they take for ternary."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from ternaryforge import shapes

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def peer_files() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "peer_files.py"
    spec = importlib.util.spec_from_file_location("peer_files", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_blocks_of_llama_cpp_are_ternary_with_one_scale(peer_files: ModuleType, kind: str) -> None:
    rows, cols = 16, 512
    layout = peer_files.LAYOUTS[kind]
    assert layout.type_id == gguf.GGMLQuantizationType[kind]
    blocks = layout.blocks(rows, cols, np.random.SFC64(0)).reshape(rows, -1)
    weights = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert weights.shape == (rows, cols)
    scale = float(np.float16(shapes.linear_scale(cols)))
    counts = [np.count_nonzero(weights == value) / weights.size for value in (-scale, 0, scale)]
    assert sum(counts) == 1
    assert min(counts) > 0.2


@pytest.mark.parametrize(
    ("kind", "shape", "begin", "scales"),
    [
        # rows of bytes, where codes begin, floats of scales before the codes
        ("I2_S", (1, 16 * 512 // 4 + 32), 0, 0),
        ("IQ2_BN", (16, 4 + 128), 4, 1),
        ("IQ2_BN_R4", (4, 16 + 512), 16, 4),
    ],
)
def test_codes_of_other_engines_are_trits(
    peer_files: ModuleType, kind: str, shape: tuple[int, int], begin: int, scales: int
) -> None:
    data = peer_files.LAYOUTS[kind].blocks(16, 512, np.random.SFC64(0)).reshape(shape)
    scale = np.float32(shapes.linear_scale(512))
    if kind == "I2_S":
        assert data[0, -32:-28].view(np.float32)[0] == scale
        codes = data[:, :-32]
    else:
        assert (np.ascontiguousarray(data[:, : 4 * scales]).view(np.float32) == scale).all()
        codes = data[:, begin:]
    fields = np.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)])
    assert set(np.unique(fields)) == {0, 1, 2}


def test_the_head_is_finite_and_varied(peer_files: ModuleType) -> None:
    blocks = peer_files.q6_k(4, 512, np.random.SFC64(0)).reshape(4, -1)
    weights = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q6_K)
    assert weights.shape == (4, 512)
    assert np.isfinite(weights).all()
    assert len(np.unique(weights)) == 64
    assert 0.01 < weights.std() < 0.1


def test_a_file_names_every_tensor_of_the_shape(
    peer_files: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = shapes.shape_config("bitnet-2b-4t") | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 300,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    monkeypatch.setattr(shapes, "SHAPES", {"small": small, "odd": small | {"hidden_size": 192}})
    path = tmp_path / "small.gguf"
    peer_files.write_gguf(path, "small", "TQ2_0")
    reader = gguf.GGUFReader(path)
    slots = shapes.read_shape("small").spec.slots()
    assert len(reader.tensors) == len(slots)
    assert sorted(int(np.prod(tensor.shape)) for tensor in reader.tensors) == sorted(
        rows * cols for rows, cols in slots.values()
    )
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "Q6_K"  # noqa: S105
    assert kinds["blk.1.ffn_down.weight"] == "TQ2_0"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(SystemExit, match="TQ2_0 needs multiples of 256 columns, odd has 192"):
        peer_files.write_gguf(tmp_path / "odd.gguf", "odd", "TQ2_0")
