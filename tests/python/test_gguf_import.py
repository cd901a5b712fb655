# SPDX-License-Identifier: Apache-2.0
"""GGUF files as models and as folders: real ones, split ones, and ones that must be refused."""

import json
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
from gguf_models import LLAMA_SHAPES, llama_metadata, write_gguf
from typer.testing import CliRunner

import ternaryforge as tf
from ternaryforge import FormatError, _core
from ternaryforge.cli import app
from ternaryforge.inspection import inspect

TEXT = "Once upon a time, there was a little girl named Lily."


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "folder"),
    [("stories260k/hf/stories260K-f32.gguf", "stories260k/hf"),
     ("babyllama/hf-tok361/babyllama361-f32.gguf", "babyllama/hf-tok361")],
)  # fmt: skip
def test_trained_models_equal_their_folders(shared: Path, tmp_path: Path, file: str, folder: str) -> None:
    model = tf.TernaryModel.from_pretrained(shared / "data" / file)
    expected = tf.TernaryModel.from_pretrained(shared / "data" / folder)
    ids = expected.encode(TEXT)
    assert model.encode(TEXT) == ids
    assert model.eos_ids == expected.eos_ids == (2,)
    np.testing.assert_array_equal(model.logits(ids), expected.logits(ids))
    report = tf.import_gguf(shared / "data" / file, tmp_path / "out")
    assert (report.scale, report.stock, report.exact) == (None, True, True)
    imported = tf.TernaryModel.from_pretrained(tmp_path / "out")
    assert imported.encode(TEXT) == ids
    np.testing.assert_array_equal(imported.logits(ids), expected.logits(ids))


@pytest.mark.shared
def test_a_real_file_runs(shared: Path) -> None:
    file = shared / "data/gguf-fixtures/llama-2-tiny-random.gguf"
    model = tf.TernaryModel.from_pretrained(file)
    assert model.encode(TEXT)[:5] == [1, 9038, 2501, 263, 931]
    assert np.isfinite(model.logits(model.encode(TEXT))).all()
    found = inspect(file)
    assert (found.format, found.arch, found.producer) == ("gguf", "llama", "llama.cpp")
    assert found.context_length == 4096
    assert found.tensors["F16"]["count"] == 9
    assert found.tokenizer is not None
    assert found.tokenizer["vocab_size"] == 32000
    assert found.engines["llama.cpp"] == found.engines["ternaryforge"] == "runs"
    assert not found.warnings


def refused(path: Path, text: str, **options: Any) -> None:
    with pytest.raises(FormatError, match=text) as caught:
        tf.TernaryModel.from_pretrained(path)
    assert path.name in str(caught.value)


def test_a_small_file(tmp_path: Path) -> None:
    model = tf.TernaryModel.from_pretrained(write_gguf(tmp_path / "a.gguf", llama_metadata()))
    assert np.isfinite(model.logits([1, 2, 3])).all()
    assert model.architecture.quantization is None
    named = write_gguf(tmp_path / "no-ending", llama_metadata())
    np.testing.assert_array_equal(tf.TernaryModel.from_pretrained(named).logits([1, 2]), model.logits([1, 2]))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"general.architecture": None}, "general.architecture None is not supported; supported are llama, qwen2"),
        ({"general.architecture": ("string", "mamba")}, "general.architecture 'mamba' is not supported"),
        ({"llama.context_length": None}, "llama.context_length must be a positive integer, got None"),
        ({"llama.embedding_length": ("uint32", 16)}, "'blk.0.attn_norm.weight'|'token_embd.weight' has shape"),
        ({"llama.embedding_length": ("uint32", 9)}, "is no multiple of attention.head_count 2"),
        ({"llama.block_count": ("uint32", 2)}, "tensor 'blk.1.attn_norm.weight' is missing"),
        ({"llama.feed_forward_length": ("uint32", 16)}, r"has shape \[12, 8\], expected \[16, 8\]"),
        ({"llama.rope.dimension_count": ("uint32", 2)}, "rope.dimension_count must be the size of a head, 4, got 2"),
        ({"llama.attention.layer_norm_rms_epsilon": ("float32", 0.0)}, "must be a positive number"),
        ({"llama.expert_count": ("uint32", 8)}, "llama.expert_count is not supported: it might change"),
        ({"llama.rope.scaling.type": ("string", "yarn")}, "is supported only as 'none' and 'linear', got yarn"),
        ({"llama.hidden_activation": ("string", "relu2")}, "hidden_activation is supported only as 'silu'"),
        ({"prism.hadamard.version": ("uint32", 1)}, "stored rotated .*prints garbage"),
        ({"ternaryforge.feed_forward_length": ("uint32", 13)}, "must be 1 to 12, got 13"),
        ({"ternaryforge.feed_forward_length": ("uint32", 11)}, "holds weights behind ternaryforge.feed_forward_length"),
        ({"tokenizer.ggml.model": ("string", "t5")}, "tokenizer.ggml.model 't5' is not supported"),
        ({"tokenizer.ggml.tokens": ("array[string]", ["a"] * 12)}, "the token 'a' occurs twice"),
        ({"tokenizer.ggml.tokens": ("array[string]", [str(i) for i in range(13)]),
          "tokenizer.ggml.scores": ("array[float32]", [0.0] * 13), "tokenizer.ggml.token_type": None},
         "13 tokens, but 'token_embd.weight' has 12 rows"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing or empty"),
        ({"tokenizer.ggml.scores": None}, "tokenizer.ggml.scores has 0 entries for 12 tokens"),
        ({"tokenizer.ggml.token_type": ("array[int32]", [9] * 12)}, "tokenizer.ggml.token_type is malformed"),
        ({"tokenizer.ggml.token_type": ("array[int32]", [1] * 11)}, "has 11 entries for 12 tokens"),
        ({"tokenizer.ggml.bos_token_id": ("uint32", 12)}, "bos_token_id is 12, but there are 12 tokens"),
        ({"tokenizer.ggml.bos_token_id": ("string", "x")}, "bos_token_id must be a token id"),
        ({"tokenizer.ggml.add_bos_token": ("uint32", 1)}, "add_bos_token must be true or false"),
        ({"tokenizer.ggml.add_eos_token": ("bool", True)}, "add_eos_token is true, which is not supported"),
        ({"tokenizer.ggml.model": ("string", "gpt2"), "tokenizer.ggml.pre": ("string", "nobody")},
         "tokenizer.ggml.pre 'nobody' is not a known way to cut text; known are llama-bpe"),
        ({"tokenizer.ggml.model": ("string", "gpt2"), "tokenizer.ggml.pre": ("string", "gpt-2")},
         "the tokens are not byte-level"),
    ],
)  # fmt: skip
def test_keys_that_are_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    refused(write_gguf(tmp_path / "bad.gguf", llama_metadata(**changes)), text)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (LLAMA_SHAPES | {"blk.0.attn_sub_norm.weight": (8,)}, "'blk.0.attn_sub_norm.weight' is no part of the arch"),
        (LLAMA_SHAPES | {"blk.0.attn_q.scale": (2,)}, "'blk.0.attn_q.scale' must be one number of type F32"),
        (LLAMA_SHAPES | {"token_embd.weight": (12,)}, "holds no matrix 'token_embd.weight'"),
        (LLAMA_SHAPES | {"blk.0.attn_v.weight": (8, 4)}, r"'blk.0.attn_v.weight' has shape \[8, 4\]"),
        ({name: shape for name, shape in LLAMA_SHAPES.items() if "ffn_up" not in name}, "ffn_up.weight' is missing"),
        (LLAMA_SHAPES | {"rope_freqs.weight": (2,)}, "factors that no published Llama 3 model has"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]], text: str) -> None:
    refused(write_gguf(tmp_path / "bad.gguf", llama_metadata(), shapes), text)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights(tmp_path: Path, value: float) -> None:
    refused(write_gguf(tmp_path / "bad.gguf", llama_metadata(), fill=value), "holds NaN or infinity")


def test_inspect_names_what_is_wrong(tmp_path: Path) -> None:
    demo = tmp_path / "demo.gguf"
    tf.export("demo", demo)
    found = inspect(demo)
    assert found.producer == f"ternaryforge {tf.__version__}"
    assert found.quantization == {"ternary_types": ["TQ2_0"], "scale_tensors": 28}
    assert found.engines["llama.cpp"].startswith("runs: Files with .scale tensors need a build of about March 2026")
    assert found.engines["ik_llama.cpp"].startswith("crashes: It divides by zero on the type TQ2_0")
    assert found.engines["bitnet.cpp"].startswith("refuses")
    assert found.warnings == []
    folder = gguf_models.write_model(tmp_path / "bitnet", "bitnet")
    tf.export(folder, tmp_path / "i2s.gguf", profile="bitnetcpp", threads=1)
    found = inspect(tmp_path / "i2s.gguf")
    assert found.engines["llama.cpp"].startswith("refuses: It does not know the type I2_S")
    assert found.engines["ik_llama.cpp"].startswith("garbage: I2_S must be requantised first")
    assert "ARM builds since January 2026" in found.engines["bitnet.cpp"]
    assert any("Nothing in the file says how its I2_S tensors interleave" in text for text in found.warnings)
    bad = inspect(write_gguf(tmp_path / "bad.gguf", llama_metadata(**{"llama.expert_count": ("uint32", 8)})))
    assert any("llama.expert_count is not supported" in text for text in bad.warnings)


def test_the_other_i2s_layout_is_another_model(tmp_path: Path) -> None:
    folder = gguf_models.write_model(tmp_path / "bitnet", "bitnet")
    tf.export(folder, tmp_path / "a.gguf", profile="bitnetcpp", threads=1)
    tf.import_gguf(tmp_path / "a.gguf", tmp_path / "64", i2s_layout="64", threads=1)
    right, wrong = (tf.TernaryModel.from_pretrained(path).logits([1, 2, 3]) for path in (folder, tmp_path / "64"))
    assert np.abs(right - wrong).max() > 0.01
    with pytest.raises(ValueError, match="i2s_layout is one of 128, 64, rows4, got 'x'"):
        tf.import_gguf(tmp_path / "a.gguf", tmp_path / "x", i2s_layout="x")  # type: ignore[arg-type]


def test_the_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    file, folder = str(tmp_path / "demo.gguf"), str(tmp_path / "folder")
    result = runner.invoke(app, ["export", "demo", file, "--profile", "bitnetcpp", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["profile"], report["arch"], report["exact"]) == ("bitnetcpp", "llama", True)
    assert report["tensors_by_type"]["I2_S"]["count"] == 28
    result = runner.invoke(app, ["import", file, folder, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["layout"], report["scale"], report["exact"]) == ({"I2_S": 28}, "tensor", True)
    model, demo = tf.TernaryModel.from_pretrained(folder), tf.TernaryModel.demo()
    assert model.encode(TEXT) == demo.encode(TEXT)
    np.testing.assert_array_equal(model.logits(model.encode(TEXT)), demo.logits(demo.encode(TEXT)))
    for arguments in (["export", "demo", file], ["import", file, folder + "2"], ["inspect", file]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert "llama.cpp" in result.stdout


def test_a_split_file(tmp_path: Path) -> None:
    """The same model in one file and in two, by the name of either part."""
    whole = write_gguf(tmp_path / "whole.gguf", llama_metadata())
    tensors = list(_core.io.GgufFile(whole).tensors.values())
    parts = [tmp_path / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    for number, (part, chosen) in enumerate(zip(parts, (tensors[:5], tensors[5:]), strict=True)):
        with _core.io.GgufWriter(part) as writer:
            for key, (kind, value) in (llama_metadata() if number == 0 else {}).items():
                writer.add_metadata(key, value, kind)
            for key, value, kind in (("no", number, "uint16"), ("count", 2, "uint16"),
                                     ("tensors.count", len(tensors), "int32")):  # fmt: skip
                writer.add_metadata("split." + key, value, kind)
            for tensor in chosen:
                writer.add_tensor(tensor.name, tensor.shape, tensor.type_name)
            for tensor in chosen:
                writer.write(tensor.name, tensor.data)
            writer.finish()
    expected = tf.TernaryModel.from_pretrained(whole).logits([1, 2, 3])
    for part in parts:
        np.testing.assert_array_equal(tf.TernaryModel.from_pretrained(part).logits([1, 2, 3]), expected)
    assert inspect(parts[0]).file_bytes == sum(part.stat().st_size for part in parts)
    report = tf.import_gguf(parts[1], tmp_path / "folder")
    assert report.exact
    np.testing.assert_array_equal(tf.TernaryModel.from_pretrained(tmp_path / "folder").logits([1, 2, 3]), expected)
    parts[1].unlink()
    with pytest.raises((FormatError, OSError), match="m-00002-of-00002"):
        tf.TernaryModel.from_pretrained(parts[0])


def test_chat_templates(tmp_path: Path) -> None:
    folder = gguf_models.write_model(tmp_path / "model", "llama")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {
            "name": "default",
            "template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
        },
        {"name": "tool_use", "template": "tools {{ messages[0].content }}"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tf.export(folder, tmp_path / "a.gguf", threads=1)
    tf.import_gguf(tmp_path / "a.gguf", tmp_path / "back", threads=1)
    messages = [{"role": "user", "content": "hé"}]
    for path in (folder, tmp_path / "a.gguf", tmp_path / "back"):
        model = tf.TernaryModel.from_pretrained(path)
        template = model.require_chat_template()
        assert template.render(messages) == "<s>[user]hé"
        assert sorted(template.sources) == ["default", "tool_use"]
        assert template.source("tool_use") == "tools {{ messages[0].content }}"
        assert model.chat(messages, max_new_tokens=2).prompt_tokens == 1 + len("[user]hé".encode())


WIDE = {"llama.embedding_length": ("uint32", 256), "llama.feed_forward_length": ("uint32", 256)}
WIDE_SHAPES = {name: tuple(12 if name == "token_embd.weight" and i == 0 else 256 for i in range(len(shape)))
               for name, shape in LLAMA_SHAPES.items()}  # fmt: skip


def test_types_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with _core.io.GgufWriter(path) as writer:
        for key, (kind, value) in llama_metadata(**WIDE).items():
            writer.add_metadata(key, value, kind)
        for name, shape in WIDE_SHAPES.items():
            writer.add_tensor(name, shape, "Q5_K" if "attn_v" in name else "F32")
        for name, shape in WIDE_SHAPES.items():
            writer.write(name, bytes(256 * 176) if "attn_v" in name else np.ones(shape, np.float32))
        writer.finish()
    refused(path, "'blk.0.attn_v.weight' has type Q5_K, which cannot be read here; supported are F32")
    found = inspect(path)
    assert any("Q5_K" in text for text in found.warnings)
    assert found.engines["ternaryforge"].startswith("refuses: ")


def test_a_scale_beside_dense_weights(tmp_path: Path) -> None:
    """It counts, whether the weights are ternary or not."""
    shapes = LLAMA_SHAPES | {"blk.0.ffn_up.scale": (1,), "blk.0.attn_q.scale": (1,)}
    scaled, plain = tmp_path / "scaled.gguf", tmp_path / "plain.gguf"
    rng = np.random.default_rng(3)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in LLAMA_SHAPES.items()}
    values["blk.0.attn_q.weight"] = np.float32(0.25) * rng.integers(-1, 2, (8, 8)).astype(np.float32)
    for path, factor in ((scaled, None), (plain, np.float32(1.7))):
        with _core.io.GgufWriter(path) as writer:
            for key, (kind, value) in llama_metadata().items():
                writer.add_metadata(key, value, kind)
            names = shapes if factor is None else LLAMA_SHAPES
            for name, shape in names.items():
                writer.add_tensor(name, shape, "F32")
            for name in names:
                if name.endswith(".scale"):
                    writer.write(name, np.array([1.7], np.float32))
                else:
                    weight = name.removesuffix("weight") + "scale" in shapes
                    writer.write(name, values[name] if factor is None or not weight else values[name] * factor)
            writer.finish()
    models = [tf.TernaryModel.from_pretrained(path, activations="float") for path in (scaled, plain)]
    np.testing.assert_array_equal(models[0].logits([1, 2, 3]), models[1].logits([1, 2, 3]))
