# SPDX-License-Identifier: Apache-2.0
"""Export to .1bit files and what comes back from them."""

import struct
import zlib
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest

import ternaryforge as tf
from ternaryforge.onebit import read_onebit
from ternaryforge.onebit_export import export_onebit


def made(tmp_path: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    folder: Path = made_models.write_folder(tmp_path / "model", config, made_models.make_tensors(config, seed=seed))
    return folder


def scales_of(kind: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "ternaryforge", "scale": kind, "activation_bits": None} | more


@pytest.mark.parametrize(
    "config",
    [
        made_models.llama_config(),
        made_models.bitnet_config(),
        made_models.llama_config(quantization_config=scales_of("row")),
        made_models.llama_config(hidden_size=152, quantization_config=scales_of("group", group_size=128)),
    ],
    ids=["dense", "bitnet", "row", "group"],
)
def test_the_same_model_comes_back(config: dict[str, Any], tmp_path: Path) -> None:
    folder = made(tmp_path, config)
    report = export_onebit(folder, tmp_path / "model.1bit", head="f32")
    assert report.exact
    source = tf.TernaryModel.from_pretrained(folder)
    model = tf.TernaryModel.from_pretrained(tmp_path / "model.1bit")
    ids = list(range(40))
    np.testing.assert_array_equal(model.logits(ids), source.logits(ids))
    assert model.eos_ids == source.eos_ids
    assert model.transformer.activations == source.transformer.activations


def test_report_and_layer_bit_map(tmp_path: Path) -> None:
    config = made_models.bitnet_config()
    report = export_onebit(made(tmp_path, config), tmp_path / "model.1bit", head="int8")
    assert report.tensors_by_type == {"int8": 1, "ternary": 14}
    linears = dict.fromkeys(("query", "key", "value", "output", "gate", "up", "down"), "ternary")
    assert report.layer_bit_map == {"embedding": "int8", "layer_modes": [linears, linears], "lm_head": "int8"}
    assert report.file_bytes == (tmp_path / "model.1bit").stat().st_size
    assert 0 < max(tensor.error for tensor in report.tensors) < 0.02
    assert not report.exact
    assert report.warnings == ("the file takes and gives token ids only: the model has no tokenizer",)


def binary_folder(tmp_path: Path, zeros: int) -> Path:
    config = made_models.llama_config(quantization_config=scales_of("row"))
    tensors = made_models.make_tensors(config)
    rng = np.random.default_rng(5)
    for name, (dtype, array) in tensors.items():
        if dtype == "U8":
            signs = rng.integers(0, 2, (4 * array.shape[0], array.shape[1])) * 2 - 1
            signs.reshape(-1)[:zeros] = 0
            tensors[name] = (dtype, made_models.pack_rows(signs))
    folder: Path = made_models.write_folder(tmp_path / "binary", config, tensors)
    return folder


def test_binary_layers_take_one_bit(tmp_path: Path) -> None:
    folder = binary_folder(tmp_path, 0)
    auto = export_onebit(folder, tmp_path / "auto.1bit", head="f32")
    wide = export_onebit(folder, tmp_path / "wide.1bit", head="f32", pack_mode="ternary")
    assert auto.tensors_by_type == {"f32": 2, "binary": 14}
    assert wide.tensors_by_type == {"f32": 2, "ternary": 14}
    assert auto.file_bytes < wide.file_bytes
    models = [
        tf.TernaryModel.from_pretrained(path) for path in (folder, tmp_path / "auto.1bit", tmp_path / "wide.1bit")
    ]
    expected, *others = [model.logits([1, 2, 3]) for model in models]
    for logits in others:
        np.testing.assert_array_equal(logits, expected)
    with pytest.raises(ValueError, match=r"'layers.0.query' holds zeros, .* pack_mode='ternary'"):
        export_onebit(binary_folder(tmp_path / "z", 1), tmp_path / "no.1bit", pack_mode="binary")
    assert not (tmp_path / "no.1bit").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.shared
@pytest.mark.parametrize("name", ["stories260k/hf", "babyllama/hf-tok361"])
def test_tokenizers_come_back(name: str, shared: Path, tmp_path: Path) -> None:
    source = tf.TernaryModel.from_pretrained(shared / "data" / name)
    report = export_onebit(shared / "data" / name, tmp_path / "model.1bit")
    assert report.warnings == ()
    model = tf.TernaryModel.from_pretrained(tmp_path / "model.1bit")
    text = (shared / "data" / "tinystories" / "valid.txt").read_text(encoding="utf-8")[:20000]
    for sample in (text, "", " ", "  two  spaces ", "Zo\u00eb \U0001f415 \u2581", "\t\n"):
        assert model.encode(sample) == source.encode(sample)
    assert model.require_tokenizer().decode(source.encode(text)) == source.require_tokenizer().decode(
        source.encode(text)
    )


def test_the_demo_s_tokenizer_comes_back(tmp_path: Path) -> None:
    export_onebit("demo", tmp_path / "demo.1bit")
    source, model = tf.TernaryModel.demo(), tf.TernaryModel.from_pretrained(tmp_path / "demo.1bit")
    for sample in ("Once upon a time, there was\n\n a caf\u00e9's 12 dogs!  ", "<|end_of_text|>", ""):
        assert model.encode(sample) == source.encode(sample)
    assert str(model.generate("Once upon a time")) == str(source.generate("Once upon a time"))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    export_onebit(made(tmp_path, made_models.bitnet_config()), tmp_path / "model.1bit")
    whole = (tmp_path / "model.1bit").read_bytes()
    bad = tmp_path / "bad.1bit"

    def refused(data: bytes, reason: str) -> None:
        bad.write_bytes(data)
        with pytest.raises(tf.FormatError, match=reason) as caught:
            read_onebit(bad)
        assert str(bad) in str(caught.value)

    def changed(offset: int, value: int) -> bytes:
        data = bytearray(whole)
        struct.pack_into("<I", data, offset, value)
        struct.pack_into("<I", data, 12, zlib.crc32(data[16:]))
        return bytes(data)

    refused(b"", "is empty")
    refused(b"GGUF" + whole[4:], "no .1bit file")
    for size in range(1, 64):
        refused(whole[:size], "no .1bit file")
    refused(whole[:-1], "cut off or damaged")
    refused(whole + b"\0", "cut off or damaged")
    refused(whole[:-1] + bytes([whole[-1] ^ 1]), "checksum")
    refused(changed(4, 2), "version 2")
    refused(changed(24, 1 << 30), "layers do not fit")
    refused(changed(32, 64), "unknown flags 0x40")
    refused(changed(64 + 24, 9), "unknown activation 9")
    refused(changed(64 + 28, 1 << 20), "unknown flags")
    refused(changed(64 + 48, 0xFFFFFFF0), "behind the end")
    refused(changed(64 + 52, 0xFFFFFFF0), "behind the end")
    entry = 64 + 64 * 2
    refused(changed(entry, 77), "'embedding' has the unknown mode 77")
    refused(changed(entry + 4, 1), "'embedding' is 1 x 24")
    refused(changed(entry + 12, 1), "'embedding' is f16 with scales of kind 'tensor'")
    refused(changed(entry + 20, 0xFFFFFFF0), "behind the end")
    refused(changed(entry + 20, entry), f"'embedding' begins at {entry}, in other bytes")
    refused(changed(64 + 20, 1 << 30), "rotated pairs of the layers do not fit")
    refused(changed(48, 0xFFFFFFF0), "tokenizer")


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[export\] head is 'f32', 'f16' or 'int8'"):
        export_onebit("demo", tmp_path / "x.1bit", head="q6_k")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[export\] pack_mode is"):
        export_onebit("demo", tmp_path / "x.1bit", pack_mode="quaternary")  # type: ignore[arg-type]
    config = made_models.llama_config()
    tensors = made_models.make_tensors(config)
    tensors["lm_head.weight"] = ("F32", tensors["lm_head.weight"][1] * 1e6)
    folder = made_models.write_folder(tmp_path / "large", config, tensors)
    with pytest.raises(ValueError, match=r"'head' holds .* beyond 16-bit floats"):
        export_onebit(folder, tmp_path / "x.1bit")
    assert not (tmp_path / "x.1bit").exists()
