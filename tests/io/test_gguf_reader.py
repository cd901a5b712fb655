# SPDX-License-Identifier: Apache-2.0
"""The GGUF reader on files of the package gguf, of other engines, and made byte by byte."""

import gc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, BOOL, F32, F64, I8, I16, I32, I64, STRING, U8, U16, U32, U64, entry, gguf_file, tensor

from ternaryforge import _core

io, formats = _core.io, _core.formats


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_file_of_the_package_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "Ġthe", "日本", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    matrix = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    writer.add_tensor("token_embd.weight", matrix)
    packed = gguf.quants.quantize(np.sign(matrix), gguf.GGMLQuantizationType.TQ2_0)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.TQ2_0)
    writer.add_tensor("output_norm.weight", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = io.GgufFile(path)
    assert (file.version, file.alignment, file.paths) == (3, 32, [path])
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.block_count"] == 3
    assert file.metadata["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    assert file.metadata["tokenizer.ggml.tokens"] == ["<s>", "Ġthe", "日本", ""]
    assert file.metadata["tokenizer.ggml.scores"] == [0.5, -1.0]
    assert file.metadata_types["tokenizer.ggml.scores"] == "array[float32]"
    assert file.metadata_types["llama.block_count"] == "uint32"
    assert list(file.tensors) == ["token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight"]
    embedding = file.tensors["token_embd.weight"]
    assert (embedding.type_name, embedding.type_id, embedding.shape) == ("F32", 0, (6, 256))
    np.testing.assert_array_equal(embedding.data.view(np.float32).reshape(6, 256), matrix)
    assert path.read_bytes()[embedding.offset :][:12] == embedding.data[:12].tobytes()
    query = file.tensors["blk.0.attn_q.weight"]
    assert (query.type_name, query.type_owner, query.shape, query.path) == ("TQ2_0", "llama.cpp", (6, 256), path)
    trits, scales = formats.decode_ternary(query.type_name.lower(), query.data, *query.shape)
    np.testing.assert_array_equal(trits, np.sign(matrix))
    np.testing.assert_array_equal(scales, np.ones((6, 1)))
    assert file.tensors["output_norm.weight"].shape == (7,)


def test_every_type_of_value(tmp_path: Path) -> None:
    values = {
        "a": (U8, 255), "b": (I8, -128), "c": (U16, 65535), "d": (I16, -32768), "e": (U32, 2**32 - 1),
        "f": (I32, -(2**31)), "g": (F32, 0.25), "h": (BOOL, 0), "i": (STRING, "é\0x"), "j": (U64, 2**64 - 1),
        "k": (I64, -(2**63)), "l": (F64, 1e300),
    }  # fmt: skip
    arrays = {k + k: (ARRAY, (kind, [v, v])) for k, (kind, v) in values.items()}
    entries = [entry(key, *content) for key, content in {**values, **arrays, "z": (ARRAY, (STRING, []))}.items()]
    for version in (2, 3):
        file = io.GgufFile(write(tmp_path / "a.gguf", gguf_file(entries, version=version)))
        assert file.version == version
        expected = {key: content for key, (_, content) in values.items()}
        assert file.metadata == {**expected, **{k + k: [v, v] for k, v in expected.items()}, "z": []}
        assert list(file.metadata) == [*values, *arrays, "z"]
        assert file.metadata["h"] is False
        assert file.metadata_types["kk"] == "array[int64]"
        assert file.tensors == {}


def test_alignment_and_four_dimensions(tmp_path: Path) -> None:
    data = np.arange(2 * 3 * 4 * 5, dtype=np.float32).tobytes()
    tensors = [tensor("t", (5, 4, 3, 2), 0, 0), tensor("u", (3,), 24, 512)]
    content = gguf_file([entry("general.alignment", U32, 128)], tensors, data + bytes(32) + b"abc", alignment=128)
    file = io.GgufFile(write(tmp_path / "a.gguf", content))
    assert file.alignment == 128
    assert file.tensors["t"].shape == (2, 3, 4, 5)
    assert file.tensors["t"].data.tobytes() == data
    assert file.tensors["u"].data.tobytes() == b"abc"
    assert {t.offset % 128 for t in file.tensors.values()} == {0}


def test_the_data_keep_the_file_mapped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", gguf_file([], [tensor("t", (8,), 24, 0)], b"12345678"))
    data = io.GgufFile(path).tensors["t"].data
    packed = formats.PackedTensor("int8", 1, 8, io.GgufFile(path).tensors["t"].data, scale_kind="tensor",
                                  scales=np.ones(1, np.float32))  # fmt: skip
    path.unlink()
    gc.collect()
    assert data.tobytes() == packed.data.tobytes() == b"12345678"
    assert not data.flags.writeable


def test_the_two_meanings_of_42(tmp_path: Path) -> None:
    trits = np.random.default_rng(5).integers(-1, 2, (16, 512)).astype(np.int8)
    scales = np.float16(np.random.default_rng(6).uniform(0.1, 1, (16, 4))).astype(np.float32)
    for layout, name in (("q2_0", "Q2_0"), ("pq2_0", "PQ2_0")):
        data = formats.encode_ternary(layout, trits, scales).tobytes()
        tensors = [tensor("a", (512, 16), 42, 0), tensor("b", (512, 16), 42, len(data))]
        file = io.GgufFile(write(tmp_path / "a.gguf", gguf_file([], tensors, data + data)))
        for found in file.tensors.values():
            assert (found.type_id, found.type_name) == (42, name)
            np.testing.assert_array_equal(formats.decode_ternary(layout, found.data, 16, 512)[0], trits)
    small = formats.encode_ternary("pq2_0", trits[:1, :128], np.ones(1, np.float32)).tobytes()
    path = write(tmp_path / "a.gguf", gguf_file([], [tensor("a", (128, 1), 42, 0)], small + bytes(30)))
    with pytest.raises(_core.FormatError, match=r"a\.gguf: tensor 'a' has the type number 42, .*any of Q2_0, PQ2_0"):
        io.GgufFile(path)
    assert io.GgufFile(path, type_42="PQ2_0").tensors["a"].data.tobytes() == small


def test_42_with_the_scale_last_is_refused(tmp_path: Path) -> None:
    trits = np.random.default_rng(5).integers(-1, 2, (16, 512)).astype(np.int8)
    blocks = formats.encode_ternary("pq2_0", trits, np.ones(1, np.float32)).reshape(-1, 34)
    data = np.roll(blocks, -2, axis=1).tobytes()
    path = write(tmp_path / "a.gguf", gguf_file([], [tensor("a", (512, 16), 42, 0)], data))
    with pytest.raises(_core.FormatError, match="scale at the end"):
        io.GgufFile(path)


def test_table_types_of_bitnet_cpp_are_named(tmp_path: Path) -> None:
    """Their tiles cannot be decoded; `inspect` still tells what a file holds. One more slot follows each."""
    infos = [tensor("a", (256, 4), 38, 0), tensor("b", (256, 6), 39, 320), tensor("c", (8,), 24, 768)]
    file = io.GgufFile(write(tmp_path / "a.gguf", gguf_file([], infos, bytes(768) + b"12345678")))
    assert [(t.type_name, t.type_owner, t.data.size) for t in file.tensors.values()] == [
        ("TL1", "bitnet.cpp", 288), ("TL2", "bitnet.cpp", 416), ("I8", "llama.cpp", 8),
    ]  # fmt: skip
    for name in ("tl1", "tl2"):
        with pytest.raises(ValueError, match=f"not '{name}'"):
            formats.decode_ternary(name, file.tensors["a"].data, 4, 256)


def test_a_split_file(tmp_path: Path) -> None:
    def part(number: int) -> bytes:
        entries = [entry("split.no", U16, number), entry("split.count", U16, 2), entry("split.tensors.count", I32, 3)]
        names = ["a", "b"] if number == 0 else ["c"]
        infos = [tensor(name, (8,), 24, 32 * i) for i, name in enumerate(names)]
        return gguf_file(entries, infos, b"".join(name.encode() * 8 + bytes(24) for name in names))

    first = write(tmp_path / "m-00001-of-00002.gguf", part(0))
    second = write(tmp_path / "m-00002-of-00002.gguf", part(1))
    file = io.GgufFile(first)
    assert file.paths == [first, second]
    assert {name: (t.path, t.data.tobytes()) for name, t in file.tensors.items()} == {
        "a": (first, b"a" * 8), "b": (first, b"b" * 8), "c": (second, b"c" * 8),
    }  # fmt: skip
    with pytest.raises(_core.FormatError, match="this is part 2 of 2: open the first part"):
        io.GgufFile(second)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="m-00002-of-00002"):
        io.GgufFile(first)


def test_what_the_file_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        io.GgufFile(tmp_path / "absent.gguf")
    with pytest.raises(IsADirectoryError):
        io.GgufFile(tmp_path)


@pytest.mark.shared
def test_a_real_file(shared: Path) -> None:
    path = shared / "data" / "gguf-fixtures" / "llama-2-tiny-random.gguf"
    file, reference = io.GgufFile(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [t.name for t in reference.tensors]
    for expected in reference.tensors:
        found = file.tensors[expected.name]
        assert found.data.tobytes() == expected.data.tobytes()
        assert found.shape == tuple(int(n) for n in reversed(expected.shape))
        assert found.offset == expected.data_offset
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 32000
    fields = {k: f for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    assert {k: f.contents() for k, f in fields.items()} == file.metadata
