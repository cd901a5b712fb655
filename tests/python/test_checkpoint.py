# SPDX-License-Identifier: Apache-2.0
"""Reading and writing safetensors folders, right and wrong ones."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_models
import numpy as np
import pytest

from ternaryforge import FormatError
from ternaryforge.checkpoint import Checkpoint, read_json
from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]}


def write(path: Path, header: Any, data: bytes = bytes(29)) -> Path:
    path.write_bytes(made_models.file_bytes(header, data))
    return path


def test_reads_every_dtype_exactly(tmp_path: Path) -> None:
    values = np.array([[1.5, -0.0, 3.25e-5], [np.pi, -7, 65504]])
    tensors = {d: (d, made_models.encode(values, d)) for d in ("F32", "F16", "BF16")}
    tensors["I8"] = ("I8", np.array([-128, 127], np.int8))
    tensors["U8"] = ("U8", np.arange(7, dtype=np.uint8))
    path = tmp_path / "odd.safetensors"
    path.write_bytes(made_models.safetensors_bytes(tensors))
    checkpoint = Checkpoint.open(path)
    assert checkpoint.names == ["BF16", "F16", "F32", "I8", "U8"]
    assert checkpoint.config == {}
    for dtype in ("F32", "F16"):
        expected = values.astype(made_models.NUMPY[dtype]).astype(np.float32)
        assert np.array_equal(checkpoint.read_float32(dtype), expected)
    truncated = (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.array_equal(checkpoint.read_float32("BF16"), truncated)
    assert np.array_equal(checkpoint.read_float32("BF16", rows=(1, 2)), truncated[1:])
    assert checkpoint.read("I8").tolist() == [-128, 127]
    assert bytes(checkpoint.raw("U8")) == bytes(range(7))
    assert checkpoint.raw("U8").readonly
    with pytest.raises(FormatError, match="'U8' has dtype U8, expected floating point"):
        checkpoint.read_float32("U8")
    with pytest.raises(FormatError, match="'nothing' is missing"):
        checkpoint.info("nothing")


def test_listed_but_unusable_dtype(tmp_path: Path) -> None:
    path = write(tmp_path / "f.safetensors", {"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8))
    checkpoint = Checkpoint.open(path)
    assert checkpoint.info("a").dtype == "I64"
    with pytest.raises(FormatError, match="'a' has dtype I64"):
        checkpoint.read("a")


def test_views_outlive_the_checkpoint(tmp_path: Path) -> None:
    view = Checkpoint.open(write(tmp_path / "f.safetensors", {"a": A, "b": B}, bytes(range(29)))).raw("b")
    assert bytes(view) == bytes(range(24, 29))


def test_empty_tensor(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
    checkpoint = Checkpoint.open(write(tmp_path / "f.safetensors", {"a": empty}, b""))
    assert checkpoint.read_float32("a").shape == (0, 3)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": A | {"dtype": "F7"}, "b": B}, "'a' has the unknown dtype 'F7'"),
        ({"a": A | {"dtype": ["F32"]}, "b": B}, "'a' has the unknown dtype"),
        ({"a": A | {"shape": [2, -3]}, "b": B}, "'a' has a malformed shape"),
        ({"a": A | {"shape": [2, 3.0]}, "b": B}, "'a' has a malformed shape"),
        ({"a": A | {"shape": [True, 6]}, "b": B}, "'a' has a malformed shape"),
        ({"a": A | {"shape": [1] * 99}, "b": B}, "'a' has a malformed shape"),
        ({"a": A | {"shape": [2, 4]}, "b": B}, r"need 32 bytes, its offsets give 24"),
        ({"a": A | {"shape": [2**62, 2**62]}, "b": B}, "its offsets give 24"),
        ({"a": A | {"data_offsets": [0, 2**70]}, "b": B}, "malformed data_offsets"),
        ({"a": A | {"data_offsets": [24, 0]}, "b": B}, "its offsets give -24"),
        ({"a": A | {"data_offsets": [0]}, "b": B}, "malformed data_offsets"),
        ({"a": A | {"more": 1}, "b": B}, "needs exactly dtype, shape and data_offsets"),
        ({"a": [1], "b": B}, "needs exactly dtype, shape and data_offsets"),
        ({"a": A}, "5 bytes behind the last tensor"),
        ({"b": B}, "'b' follows a gap"),
        ({"a": A, "b": B, "c": A}, "overlaps"),
        ({"a": A, "b": B, "c": B | {"data_offsets": [29, 34]}}, "truncated: tensor 'c' ends at byte"),
        ({"__metadata__": 3, "a": A, "b": B}, "__metadata__ is not an object"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[1, 2]", "holds no JSON object"),
        ('{"a": ', "holds no valid JSON"),
        ("[" * 100_000, "holds no valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "holds no valid JSON"),
    ],
)
def test_malformed_header(tmp_path: Path, header: Any, message: str) -> None:
    path = write(tmp_path / "wrong.safetensors", header)
    with pytest.raises(FormatError, match=message) as caught:
        Checkpoint.open(path)
    assert "wrong.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x10\0\0\0", "truncated"),
        (b"\xff" * 64, "truncated"),
        ((2**40).to_bytes(8, "little") + b"{}", "truncated"),
        (b"\x03\0\0\0\0\0\0\0{\xff}", "no valid JSON"),
        (b"PK\x03\x04" + bytes(99), "is a pickle"),
        (b"\x80\x02\x8a\x0a" + bytes(99), "is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"GGUF" + bytes(99), "GGUF"),
    ],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = made_models.safetensors_bytes({"a": ("F32", np.ones((3, 5), np.float32)), "b": ("U8", np.ones(7))})
    path = tmp_path / "model.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            Checkpoint.open(path)
    path.write_bytes(whole)
    assert Checkpoint.open(path).names == ["a", "b"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "x.ckpt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"anything")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(FormatError, match=f"{name}' is a pickle.*safetensors first"):
            Checkpoint.open(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(FormatError, match="holds neither"):
        Checkpoint.open(tmp_path)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    config = made_models.llama_config()
    return made_models.write_shards(tmp_path / "sharded", config, made_models.make_tensors(config))


def edit_index(folder: Path, name: str, shard: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if shard is None:
        del index["weight_map"][name]
    else:
        index["weight_map"][name] = shard
    path.write_text(json.dumps(index))


def test_shards_equal_one_file(tmp_path: Path, shards: Path) -> None:
    whole = Checkpoint.open(made_models.write_folder(tmp_path / "whole", made_models.llama_config()))
    sharded = Checkpoint.open(shards)
    assert sharded.names == whole.names
    assert len(sharded.files) == 3
    for name in whole:
        assert bytes(sharded.raw(name)) == bytes(whole.raw(name))


def test_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00003.safetensors' is missing"):
        Checkpoint.open(shards)


def test_truncated_shard(shards: Path) -> None:
    path = shards / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"model-00003-of-00003.safetensors' is truncated"):
        Checkpoint.open(shards)


@pytest.mark.parametrize(
    ("name", "shard", "message"),
    [
        ("model.norm.weight", None, "'model.norm.weight' is not placed there"),
        ("invented", "model-00001-of-00003.safetensors", "'invented' of .* is not in it"),
        ("invented", "../secret.safetensors", "must name a file of this folder"),
        ("invented", "/etc/passwd", "must name a file of this folder"),
        ("invented", "pytorch_model.bin", "is a pickle"),
    ],
)
def test_index_that_does_not_fit(shards: Path, name: str, shard: str | None, message: str) -> None:
    edit_index(shards, name, shard)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(shards)


def test_index_without_a_map(shards: Path) -> None:
    (shards / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(FormatError, match="has no weight_map"):
        Checkpoint.open(shards)


PLAN = [TensorPlan("a", "U8", (3, 5)), TensorPlan("b", "F32", (2, 2)), TensorPlan("c", "BF16", (3,))]
DATA = {
    "a": np.arange(15, dtype=np.uint8).reshape(3, 5),
    "b": np.array([[1.5, -2], [3, 4]], np.float32),
    "c": np.array([0x3F80, 0xBF80, 0x4000], np.uint16),
}


def write_all(out: Path) -> None:
    with CheckpointWriter(out, PLAN) as writer:
        for name in ("c", "a", "b"):
            writer.write(name, DATA[name])
        writer.write_json("config.json", {"name": "é"})


def test_written_folder_reads_back(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write_all(out)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.config == {"name": "é"}
    assert np.array_equal(checkpoint.read("a"), DATA["a"])
    assert np.array_equal(checkpoint.read_float32("b"), DATA["b"])
    assert checkpoint.read_float32("c").tolist() == [1, -1, 2]
    assert checkpoint.info("b").begin % 64 == 0  # wide elements first, so that all are aligned
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    safe_open = pytest.importorskip("safetensors").safe_open
    write_all(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert np.array_equal(file.get_tensor("a"), DATA["a"])
        assert np.array_equal(file.get_tensor("b"), DATA["b"])


def test_written_in_parts(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", PLAN) as writer:
        with writer.writing("a") as part:
            part(DATA["a"][:1])
            part(DATA["a"][1:].tobytes())
        writer.write("b", memoryview(DATA["b"]).cast("B"))
        writer.write("c", DATA["c"].tobytes())
    assert np.array_equal(Checkpoint.open(tmp_path / "out").read("a"), DATA["a"])


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_all(out)
    assert Checkpoint.open(out).names == ["a", "b", "c"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="name another folder"):
        write_all(out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with CheckpointWriter(tmp_path / "out", PLAN) as writer:
            writer.write("a", DATA["a"])
            raise error

    with pytest.raises(error):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_wrong_use_of_the_writer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never written: b, c"), CheckpointWriter(tmp_path / "o", PLAN) as writer:
        writer.write("a", DATA["a"])
    with pytest.raises(ValueError, match="planned as"), CheckpointWriter(tmp_path / "o", PLAN) as writer:
        writer.write("a", DATA["a"].T)
    with pytest.raises(TypeError, match="planned as F32"), CheckpointWriter(tmp_path / "o", PLAN) as writer:
        writer.write("b", DATA["b"].astype(np.float64))
    with pytest.raises(ValueError, match="has more"), CheckpointWriter(tmp_path / "o", PLAN) as writer:
        writer.write("a", bytes(16))
    with pytest.raises(ValueError, match="has 14"), CheckpointWriter(tmp_path / "o", PLAN) as writer:
        writer.write("a", bytes(14))
    with pytest.raises(ValueError, match="was not planned"), CheckpointWriter(tmp_path / "o", PLAN) as writer:
        writer.write("d", DATA["a"])
    with pytest.raises(ValueError, match="planned twice"):
        CheckpointWriter(tmp_path / "o", [*PLAN, PLAN[0]])
    assert not list(tmp_path.iterdir())


def test_a_disk_known_to_be_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=99))
    with pytest.raises(OSError, match="99 are free") as caught:
        write_all(tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system refuses to write on."""
    pytest.importorskip("resource")
    script = f"""
import resource, numpy as np
from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with CheckpointWriter({str(tmp_path / "out")!r}, [TensorPlan("a", "U8", (500, 400))]) as writer:
        writer.write("a", np.zeros((500, 400), np.uint8))
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "could not write model.safetensors: File too large; nothing is left behind" in done.stdout
    assert not list(tmp_path.iterdir())


def test_read_json_needs_an_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ("3", "", "{'a': 1}", '{"a": 1, "a": 1}'):
        path.write_text(text)
        with pytest.raises(FormatError, match=r"config\.json"):
            read_json(path)
