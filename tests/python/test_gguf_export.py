# SPDX-License-Identifier: Apache-2.0
"""Exports of every family and profile: read back, against the gguf package, and refused where engines err."""

import json
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest

import ternaryforge as tf
from ternaryforge import FormatError
from ternaryforge.gguf.profiles import PROFILES, padded_size, type_order
from ternaryforge.gguf.reading import GgufSource
from ternaryforge.inspection import inspect

IDS = [257, 5, 90, 256, 40, 41, 200, 7, 8, 9, 10, 11]
FAMILIES = [family for family in gguf_models.CLASSES if family != "bitnet"]
GROUPS = {"quant_method": "ternaryforge", "scale": "group", "group_size": 128}
PER_TENSOR = {"quant_method": "ternaryforge", "scale": "tensor"}
ROWS = {"quant_method": "ternaryforge", "scale": "row"}


def logits(source: Path) -> np.ndarray[Any, Any]:
    return tf.TernaryModel.from_pretrained(source, activations="float", threads=1).logits(IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_logits_of_its_folder(tmp_path: Path, family: str) -> None:
    quantization = PER_TENSOR if family == "qwen2" else gguf_models.STOCK  # which has biases
    folder = gguf_models.write_model(tmp_path / "model", family, quantization)
    report = tf.export(folder, tmp_path / "a.gguf", threads=1)
    assert report.exact
    assert report.relative_error == 0
    assert report.tensors_by_type["TQ2_0"]["count"] == 14
    assert report.sidecar_scales == 0
    assert report.ternary_bits_per_weight == 2.0625
    # Norms with an offset come back within one rounding.
    error = 2e-5 if family.startswith("gemma") else 0
    np.testing.assert_allclose(logits(tmp_path / "a.gguf"), logits(folder), rtol=0, atol=error)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("profile", "model", "options", "types"),
    [
        ("upstream", ("llama", gguf_models.STOCK), {"ternary_type": "tq1_0"}, {"TQ1_0": 14}),
        ("upstream", ("llama", ROWS), {}, {"TQ2_0": 14}),
        ("upstream", ("qwen3", GROUPS), {}, {"Q2_0": 14}),
        ("portable", ("llama", gguf_models.STOCK), {}, {"Q2_K": 14}),
        ("portable", ("qwen3", GROUPS), {}, {"Q4_0": 14}),
        ("ik", ("llama", gguf_models.STOCK), {}, {"IQ2_BN": 2, "Q4_0": 12}),
        ("ik", ("bitnet", gguf_models.STOCK), {"ternary_type": "IQ1_BN"}, {"IQ1_BN": 2, "IQ2_BN": 0}),
        ("bitnetcpp", ("bitnet", gguf_models.STOCK), {}, {"I2_S": 14}),
        ("bitnetcpp", ("llama", ROWS), {}, {"Q4_0": 14}),
        ("bonsai", ("qwen3", GROUPS), {}, {"PQ2_0": 14}),
        ("bonsai", ("qwen3", GROUPS), {"ternary_type": "Q2_0"}, {"Q2_0": 14}),
    ],
)
def test_profiles(
    tmp_path: Path, profile: Any, model: tuple[str, dict[str, Any]], options: Any, types: dict[str, int]
) -> None:
    folder = gguf_models.write_model(tmp_path / "model", *model)
    report = tf.export(folder, tmp_path / "a.gguf", profile=profile, threads=1, **options)
    assert report.exact
    assert {name: report.tensors_by_type.get(name, {"count": 0})["count"] for name in types} == types
    np.testing.assert_array_equal(logits(tmp_path / "a.gguf"), logits(folder))
    imported = tf.import_gguf(tmp_path / "a.gguf", tmp_path / "back", threads=1)
    assert imported.exact
    assert imported.producer.startswith("ternaryforge ")
    assert imported.stock == (model[1] is gguf_models.STOCK)
    np.testing.assert_array_equal(logits(tmp_path / "back"), logits(folder))


def test_widths_that_no_type_divides(tmp_path: Path) -> None:
    folder = gguf_models.write_model(tmp_path / "llama", "llama", intermediate_size=172)
    report = tf.export(folder, tmp_path / "a.gguf", threads=1)
    assert any("padded with zeros from 172 to 192" in note for note in report.notes)
    assert report.tensors_by_type["Q2_0"]["count"] == 2
    source = GgufSource.open(tmp_path / "a.gguf")
    assert source.file.metadata["llama.feed_forward_length"] == 192
    assert source.file.tensors["blk.0.ffn_down.weight"].shape == (256, 192)
    assert source.config["intermediate_size"] == 172
    np.testing.assert_array_equal(logits(tmp_path / "a.gguf"), logits(folder))
    # The norm in front of `down` would count the padding.
    folder = gguf_models.write_model(tmp_path / "bitnet", "bitnet-silu", intermediate_size=172)
    report = tf.export(folder, tmp_path / "b.gguf", threads=1)
    assert report.exact
    assert report.tensors_by_type["F16"]["count"] == 2
    assert any("blk.0.ffn_down.weight is written as F16, which is exact" in note for note in report.notes)
    np.testing.assert_array_equal(logits(tmp_path / "b.gguf"), logits(folder))


def test_scales_that_16_bits_cannot_hold(tmp_path: Path) -> None:
    folder = gguf_models.write_model(tmp_path / "model", "llama", scale_bits=20)
    report = tf.export(folder, tmp_path / "a.gguf", threads=1)
    assert (report.exact, report.sidecar_scales) == (True, 14)
    np.testing.assert_array_equal(logits(tmp_path / "a.gguf"), logits(folder))
    assert GgufSource.open(tmp_path / "a.gguf").file.tensors["blk.1.ffn_up.scale"].shape == (1,)
    for profile, options in (("upstream", {"inline_scale": True}), ("portable", {})):
        report = tf.export(folder, tmp_path / "b.gguf", profile=profile, threads=1, **options)  # type: ignore[arg-type]
        assert not report.exact
        assert 0 < report.relative_error <= 2.0**-11
        assert report.sidecar_scales == 0
        assert any("the largest error is" in note for note in report.notes)
    assert tf.export(folder, tmp_path / "b.gguf", profile="bitnetcpp", threads=1).exact
    rows = gguf_models.write_model(tmp_path / "rows", "llama", ROWS, scale_bits=20)
    refused = r"a scale of 'blk.0.attn_q.weight' is not exact in 16 bits.*use inline_scale=True.*by [0-9.]+e-[0-9]+$"
    with pytest.raises(FormatError, match=refused):
        tf.export(rows, tmp_path / "c.gguf", threads=1)


@pytest.mark.parametrize("profile", ["upstream", "portable", "bonsai"])
def test_a_squared_relu_is_refused(tmp_path: Path, profile: Any) -> None:
    folder = gguf_models.write_model(tmp_path / "model", "bitnet")
    with pytest.raises(FormatError, match=r"squared ReLU.*print garbage; use profile 'ik' or 'bitnetcpp'"):
        tf.export(folder, tmp_path / "a.gguf", profile=profile)
    assert not (tmp_path / "a.gguf").exists()


def test_sub_norms_are_mapped(tmp_path: Path) -> None:
    folder = gguf_models.write_model(tmp_path / "model", "bitnet")
    tf.export(folder, tmp_path / "a.gguf", profile="ik", threads=1)
    source = GgufSource.open(tmp_path / "a.gguf")
    assert source.file.metadata["general.architecture"] == "bitnet-b1.58"
    assert source.file.metadata["bitnet-b1.58.hidden_activation"] == "relu2"
    norm = np.frombuffer(source.file.tensors["blk.1.ffn_sub_norm.weight"].data, np.float32)
    weights = tf.checkpoint.Checkpoint.open(folder).read("model.layers.1.mlp.ffn_sub_norm.weight")
    np.testing.assert_array_equal(norm, weights)
    untied = gguf_models.write_model(tmp_path / "untied", "bitnet-silu", tie_word_embeddings=False)
    with pytest.raises(FormatError, match="take the embedding as the head"):
        tf.export(untied, tmp_path / "b.gguf")


@pytest.mark.peer
@pytest.mark.parametrize(
    ("profile", "options"), [("upstream", {}), ("upstream", {"ternary_type": "TQ1_0"}), ("portable", {})]
)
def test_the_gguf_package_reads_the_same(tmp_path: Path, profile: Any, options: Any) -> None:
    """Names, shapes and values, with the order of llama's rows made here once more."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    folder = gguf_models.write_model(tmp_path / "model", "llama", num_key_value_heads=4)
    tf.export(folder, tmp_path / "a.gguf", profile=profile, head="q8_0", threads=1, **options)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.rope.freq_base"] == 20000
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"][256:260] == ["he", "<s>", "</s>", "[PAD259]"]
    assert fields["tokenizer.ggml.token_type"][256:260] == [1, 3, 3, 5]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (257, 258)
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.chat_template"] == "{{ bos_token }}x"
    checkpoint = tf.checkpoint.Checkpoint.open(folder)
    names = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == 20
    for name, stem in names.items():
        tensor = found[f"blk.1.{name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        packed = checkpoint.read(f"model.layers.1.{stem}.weight")
        trits = np.concatenate([(packed >> shift & 3).astype(np.int8) - 1 for shift in (0, 2, 4, 6)])
        expected = trits * checkpoint.read(f"model.layers.1.{stem}.weight_scale")
        if name == "attn_q":
            expected = expected.reshape(4, 2, 32, 256).swapaxes(1, 2).reshape(256, 256)
        np.testing.assert_array_equal(values, expected)
    assert found["token_embd.weight"].tensor_type.name == "Q8_0"


def test_a_dense_model_and_a_file_of_a_file(tmp_path: Path) -> None:
    folder = gguf_models.write_model(tmp_path / "model", "llama", None, tie_word_embeddings=False)
    report = tf.export(folder, tmp_path / "a.gguf", threads=1)
    assert (report.ternary_tensors, set(report.tensors_by_type), report.exact) == (0, {"F32"}, True)
    np.testing.assert_array_equal(logits(tmp_path / "a.gguf"), logits(folder))
    assert tf.TernaryModel.from_pretrained(tmp_path / "a.gguf").transformer.activations == "float"
    ternary = gguf_models.write_model(tmp_path / "ternary", "llama")
    tf.export(ternary, tmp_path / "b.gguf", threads=1)
    again = tf.export(tmp_path / "b.gguf", tmp_path / "c.gguf", profile="portable", threads=1)
    assert again.exact
    assert again.tensors_by_type["Q2_K"]["count"] == 14
    np.testing.assert_array_equal(logits(tmp_path / "c.gguf"), logits(ternary))
    assert tf.TernaryModel.from_pretrained(tmp_path / "c.gguf").transformer.activations == "int8"


@pytest.mark.parametrize("head", ["Q6_K", "Q8_0", "BF16"])
def test_a_rounded_head_is_copied(tmp_path: Path, head: str) -> None:
    folder = gguf_models.write_model(tmp_path / "model", "llama")
    first = tf.export(folder, tmp_path / "a.gguf", head=head, threads=1)
    assert not first.exact
    assert any("Not every weight is exact" in note for note in first.notes)
    again = tf.export(tmp_path / "a.gguf", tmp_path / "b.gguf", profile="portable", threads=1)
    assert (again.exact, again.tensors_by_type[head]["count"]) == (True, 1)
    files = [GgufSource.open(tmp_path / name).file for name in ("a.gguf", "b.gguf")]
    embeddings = [file.tensors["token_embd.weight"].data.tobytes() for file in files]
    assert embeddings[0] == embeddings[1]


def test_trits_in_floats_are_found(tmp_path: Path) -> None:
    folder = gguf_models.write_model(tmp_path / "model", "bitnet-silu", intermediate_size=172)
    tf.export(folder, tmp_path / "a.gguf", threads=1)
    imported = tf.import_gguf(tmp_path / "a.gguf", tmp_path / "back", threads=1)
    assert imported.layout == {"TQ2_0": 12, "F16": 2}
    np.testing.assert_array_equal(logits(tmp_path / "back"), logits(folder))


def test_rotations_and_windows(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    folder = gguf_models.write_model(tmp_path / "llama3", "llama", rope_scaling=scaling, rope_theta=500000.0)
    tf.export(folder, tmp_path / "a.gguf", threads=1)
    source = GgufSource.open(tmp_path / "a.gguf")
    assert source.config["rope_scaling"] == scaling
    factors = np.frombuffer(source.file.tensors["rope_freqs.weight"].data, np.float32)
    assert factors.shape == (32,)
    assert (factors[0], factors[-1]) == (1, 8)
    np.testing.assert_array_equal(logits(tmp_path / "a.gguf"), logits(folder))
    linear = gguf_models.write_model(tmp_path / "linear", "llama", rope_scaling={"type": "linear", "factor": 4.0})
    tf.export(linear, tmp_path / "b.gguf", threads=1)
    np.testing.assert_array_equal(logits(tmp_path / "b.gguf"), logits(linear))
    yarn = gguf_models.write_model(tmp_path / "yarn", "qwen3", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(FormatError, match="rope_scaling of this kind cannot be written as GGUF"):
        tf.export(yarn, tmp_path / "c.gguf")
    window = gguf_models.write_model(tmp_path / "window", "mistral", sliding_window=20)
    report = tf.export(window, tmp_path / "d.gguf", threads=1)
    assert any("The context is 20 instead of 64 tokens" in note for note in report.notes)
    assert tf.TernaryModel.from_pretrained(tmp_path / "d.gguf").context_length == 20
    np.testing.assert_array_equal(logits(tmp_path / "d.gguf"), logits(window))


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="profile is one of upstream, portable, ik, bitnetcpp, bonsai, onebit, got 'x'"
    ):
        tf.export("demo", tmp_path / "a.gguf", profile="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ternary_type of profile 'portable' is one of Q2_K, Q4_0, got 'TQ1_0'"):
        tf.export("demo", tmp_path / "a.gguf", profile="portable", ternary_type="TQ1_0")
    with pytest.raises(ValueError, match="head is one of"):
        tf.export("demo", tmp_path / "a.gguf", head="Q5_K")
    narrow = gguf_models.write_model(tmp_path / "narrow", "llama", hidden_size=96)
    with pytest.raises(FormatError, match="a head with 96 columns cannot be Q6_K"):
        tf.export(narrow, tmp_path / "a.gguf", head="q6_k")
    tokenizer = json.loads((tmp_path / "narrow/tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["use_regex"] = False
    tokenizer["model"]["vocab"]["a\u0120"] = 259  # across two words
    tokenizer["model"]["merges"].append(["a", "\u0120"])
    (tmp_path / "narrow/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(FormatError, match="how the tokenizer cuts text has no name that engines know"):
        tf.export(narrow, tmp_path / "a.gguf")
    report = tf.export(narrow, tmp_path / "a.gguf", tokenizer_pre="gpt-2", threads=1)
    assert any("makes other tokens than the model's" in note for note in report.notes)


def test_how_much_is_padded() -> None:
    order = type_order(PROFILES["upstream"], None)
    assert [known.name for known in order] == ["TQ2_0", "Q2_0", "Q4_0"]
    assert padded_size(order, 8640) == 8704  # 0.7 % for the fastest type
    assert padded_size(order, 172) == 192
    assert padded_size(order, 300) == 320


def test_what_a_user_should_know(tmp_path: Path) -> None:
    groups = gguf_models.write_model(tmp_path / "groups", "qwen3", GROUPS)
    assert any("Q2_0 needs a build" in note for note in tf.export(groups, tmp_path / "a.gguf", threads=1).notes)
    qwen3 = gguf_models.write_model(tmp_path / "qwen3", "qwen3")
    report = tf.export(qwen3, tmp_path / "b.gguf", profile="bitnetcpp", threads=1)
    assert report.notes == ("Builds of bitnet.cpp before July 2026 do not know the architecture 'qwen3'.",)
    assert judged(tmp_path / "b.gguf", "bitnet.cpp").startswith("refuses")
    assert tf.export(qwen3, tmp_path / "c.gguf", threads=1).notes == ()
    notes = tf.export(qwen3, tmp_path / "d.gguf", profile="ik", threads=1).notes
    assert notes == ("12 layers with 256 columns are written as Q4_0: IQ2_BN does not hold this width or such scales.",)


def judged(file: Path, engine: str) -> str:
    return inspect(file).engines[engine]


@pytest.mark.parametrize(("bits", "mode"), [(8, "int8"), (16, "int16"), (None, "float")])
def test_what_activations_the_model_was_made_for(tmp_path: Path, bits: int | None, mode: str) -> None:
    folder = gguf_models.write_model(tmp_path / "model", "llama", ROWS | {"activation_bits": bits})
    tf.export(folder, tmp_path / "a.gguf", threads=1)
    tf.import_gguf(tmp_path / "a.gguf", tmp_path / "back", threads=1)
    for path in (folder, tmp_path / "a.gguf", tmp_path / "back"):
        assert tf.TernaryModel.from_pretrained(path).transformer.activations == mode
    assert GgufSource.open(tmp_path / "a.gguf").file.metadata["ternaryforge.activation_bits"] == (bits or 32)
