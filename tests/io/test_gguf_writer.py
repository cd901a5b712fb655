# SPDX-License-Identifier: Apache-2.0
"""The GGUF writer: read back by ours and by the package gguf, and what it refuses."""

import math
from pathlib import Path

import gguf
import numpy as np
import pytest

from ternaryforge import _core

io, formats = _core.io, _core.formats

VALUES: list[tuple[str, object, str]] = [
    ("general.architecture", "llama", "string"),
    ("general.name", "", "string"),
    ("a.u8", 255, "uint8"), ("a.i8", -128, "int8"), ("a.u16", 65535, "uint16"), ("a.i16", -32768, "int16"),
    ("a.u32", 2**32 - 1, "uint32"), ("a.i32", -(2**31), "int32"), ("a.u64", 2**64 - 1, "uint64"),
    ("a.i64", -(2**63), "int64"), ("a.f32", 0.25, "float32"), ("a.f64", 1e300, "float64"), ("a.b", True, "bool"),
    ("tokens", ["<s>", "日本", ""], "array[string]"), ("scores", [0.5, -math.inf], "array[float32]"),
    ("types", [3, 1, -1], "array[int32]"), ("flags", [True, False], "array[bool]"), ("none", [], "array[uint32]"),
]  # fmt: skip


def write_model(path: Path, alignment: int = 32) -> dict[str, np.ndarray]:
    """Tensors of odd sizes, written in pieces of odd sizes."""
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (6, 512)).astype(np.int8)
    tensors = {
        "token_embd.weight": ((5, 7), "F32", rng.normal(size=(5, 7)).astype(np.float32)),
        "blk.0.attn_q.weight": ((6, 512), "TQ2_0", formats.encode_ternary("tq2_0", trits, np.ones(1, np.float32))),
        "blk.0.attn_k.weight": ((6, 512), "I2_S", formats.encode_ternary("i2_s", trits, np.ones(1, np.float32))),
        "output_norm.weight": ((3,), "F16", np.ones(3, np.float16)),
    }
    with io.GgufWriter(path, alignment) as writer:
        for key, value, kind in VALUES:
            writer.add_metadata(key, value, kind)
        for name, (shape, type_name, _) in tensors.items():
            writer.add_tensor(name, shape, type_name)
        for name, (_, _, data) in tensors.items():
            raw = data.tobytes()
            for begin in range(0, len(raw), 37):
                writer.write(name, raw[begin : begin + 37])
        assert not path.exists()
        writer.finish()
    return {name: data for name, (_, _, data) in tensors.items()}


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_what_was_written_is_read(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "a.gguf"
    tensors = write_model(path, alignment)
    assert list(tmp_path.iterdir()) == [path]
    file = io.GgufFile(path)
    expected = {key: value for key, value, _ in VALUES}
    kinds = {key: kind for key, _, kind in VALUES}
    if alignment != 32:
        expected = {"general.alignment": alignment, **expected}
        kinds["general.alignment"] = "uint32"
    assert file.metadata == expected
    assert file.metadata_types == kinds
    assert list(file.metadata) == list(expected)
    assert file.alignment == alignment
    for (name, data), found in zip(tensors.items(), file.tensors.values(), strict=True):
        assert found.name == name
        assert found.data.tobytes() == data.tobytes()
        assert found.offset % alignment == 0
    assert file.tensors["token_embd.weight"].shape == (5, 7)
    end = file.tensors["output_norm.weight"].offset + 6
    assert path.stat().st_size == end + -end % alignment


def test_the_package_gguf_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    matrix = np.random.default_rng(1).normal(size=(4, 256)).astype(np.float32)
    with io.GgufWriter(path) as writer:
        for key, value, kind in VALUES:
            if value not in ("", []):
                writer.add_metadata(key, value, kind)
        for type_name in ("F32", "Q8_0", "Q6_K", "Q4_0", "F16", "BF16"):
            writer.add_tensor(type_name, matrix.shape, type_name)
        for type_name in ("F32", "Q8_0", "Q6_K", "Q4_0", "F16", "BF16"):
            writer.write(type_name, formats.quantize(type_name, matrix))
        writer.finish()
    reader = gguf.GGUFReader(path)
    for key, value, _ in VALUES:
        if value not in ("", []):
            assert reader.fields[key].contents() == value
    for found in reader.tensors:
        ours = io.GgufFile(path).tensors[found.name]
        assert found.tensor_type.name == ours.type_name == found.name
        assert found.data.tobytes() == ours.data.tobytes()
        assert tuple(int(n) for n in found.shape) == (256, 4)


def test_nothing_stays_without_finish(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    with io.GgufWriter(path) as writer:
        writer.add_tensor("a", (4,), "F32")
        writer.write("a", bytes(8))
    with pytest.raises(ValueError, match="unrelated"), io.GgufWriter(path):
        raise ValueError("unrelated")
    with io.GgufWriter(path) as writer:
        writer.add_tensor("a", (4,), "F32")
        writer.write("a", bytes(8))
        with pytest.raises(ValueError, match="the tensor 'a' has 8 of 16 bytes"):
            writer.finish()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        io.GgufWriter(tmp_path / "absent" / "a.gguf")


def test_order_and_sizes_are_kept(tmp_path: Path) -> None:
    with io.GgufWriter(tmp_path / "a.gguf") as writer:
        writer.add_tensor("a", (4,), "F32")
        writer.add_tensor("b", (2, 32), "Q8_0")
        with pytest.raises(
            ValueError, match=r"next bytes are those of the tensor 'a' \(0 of 16 are there\), got some for 'b'"
        ):
            writer.write("b", bytes(4))
        writer.write("a", np.zeros(4, np.float32))
        with pytest.raises(ValueError, match="got some for 'a'"):
            writer.write("a", bytes(1))
        with pytest.raises(ValueError, match="'b' takes 68 bytes, got 69"):
            writer.write("b", bytes(69))
        with pytest.raises(ValueError, match="comes too late"):
            writer.add_tensor("c", (4,), "F32")
        with pytest.raises(ValueError, match="comes too late"):
            writer.add_metadata("c", 1, "uint8")
        writer.write("b", bytes(68))
        with pytest.raises(ValueError, match="all tensors are complete"):
            writer.write("b", bytes(1))
        writer.finish()
        with pytest.raises(ValueError, match="the file is finished"):
            writer.write("b", bytes(1))


@pytest.mark.parametrize(
    ("value", "kind", "error", "message"),
    [
        (256, "uint8", ValueError, "'k' .*uint8.* got 256"),
        (-1, "uint64", ValueError, "got -1"),
        (2**63, "int64", ValueError, "got 9223372036854775808"),
        (1.5, "uint32", TypeError, "'k' .*uint32.* got float"),
        (True, "uint32", TypeError, "got bool"),
        (1, "bool", TypeError, "got int"),
        (1, "string", TypeError, "got int"),
        ("1", "float32", TypeError, "got str"),
        (1e39, "float32", ValueError, "got 1e"),
        ([1, "a"], "array[uint32]", TypeError, "got str"),
        (1, "array[uint32]", TypeError, "got int"),
        (1, "uint128", ValueError, "value type .*'uint128'"),
        ([[1]], "array[array]", ValueError, "value type"),
    ],
)
def test_values_that_do_not_fit_their_type(
    tmp_path: Path, value: object, kind: str, error: type[Exception], message: str
) -> None:
    with io.GgufWriter(tmp_path / "a.gguf") as writer, pytest.raises(error, match=message):
        writer.add_metadata("k", value, kind)


def test_names_shapes_and_types_are_checked(tmp_path: Path) -> None:
    with io.GgufWriter(tmp_path / "a.gguf") as writer:
        writer.add_metadata("k", 1, "uint8")
        writer.add_tensor("t", (4,), "F32")
        for call, message in [
            (lambda: writer.add_metadata("k", 1, "uint8"), "the key 'k' is there already"),
            (lambda: writer.add_metadata("", 1, "uint8"), "not empty"),
            (lambda: writer.add_metadata("general.alignment", 32, "uint32"), "the argument alignment"),
            (lambda: writer.add_tensor("t", (4,), "F32"), "the tensor 't' is there already"),
            (lambda: writer.add_tensor("x" * 64, (4,), "F32"), "of 1 to 63 bytes"),
            (lambda: writer.add_tensor("q.weight_scale", (4,), "F32"), "must not end in _scale"),
            (lambda: writer.add_tensor("u", (), "F32"), "has 0 dimensions"),
            (lambda: writer.add_tensor("u", (1,) * 5, "F32"), "has 5 dimensions"),
            (lambda: writer.add_tensor("u", (4, 0), "F32"), "a dimension of 0"),
            (lambda: writer.add_tensor("u", (2**40, 2**40), "F32"), "too large"),
            (lambda: writer.add_tensor("u", (4, 255), "TQ2_0"), "255 columns cannot be TQ2_0, which has blocks of 256"),
            (lambda: writer.add_tensor("u", (4, 256), "TL2"), "cannot be written as 'TL2'"),
            (lambda: writer.add_tensor("u", (4, 256), "tq2_0"), "cannot be written as 'tq2_0'"),
        ]:
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match="a power of two, got 24"):
        io.GgufWriter(tmp_path / "a.gguf", 24)
