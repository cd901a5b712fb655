# SPDX-License-Identifier: Apache-2.0
"""Modes per layer: what a map means, what `convert` stores, that it runs as NumPy reads it, what is refused."""

import json
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest
from made_models import llama_config, make_tensors, write_folder, write_tokenizer
from numpy.typing import NDArray
from numpy_model import NumpyModel
from typer.testing import CliRunner

from ternaryforge import FormatError, TernaryModel, convert
from ternaryforge.bit_map import BitMap, read_bit_map, sandwich
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.cli import app
from ternaryforge.families import read_architecture
from ternaryforge.inspection import inspect
from ternaryforge.mapped_checkpoint import MappedCheckpoint
from ternaryforge.planning import plan
from ternaryforge.rounding import RoundingOptions
from ternaryforge.validation import validate

# Ragged groups of 64, bits of a row that do not fill a byte, rows that are no multiple of 4.
WIDE = {"hidden_size": 99, "intermediate_size": 70, "num_hidden_layers": 4}
MIXED = {
    "embedding": "int8",
    "layer_modes": ["binary", {"q_proj": "int8", "up": "f16"}, "ternary", {"down": "binary", "gate": "two_plane"}],
    "lm_head": "f16",
}


def decode(folder: Path) -> made_models.Tensors:
    """Every matrix as floats, by docs/reference/formats.md alone."""
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__")
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        stored[name] = np.frombuffer(raw[begin:end], made_models.NUMPY[entry["dtype"]]).reshape(entry["shape"])
    config = json.loads((folder / "config.json").read_text())
    found: made_models.Tensors = {}
    for name, shape in made_models.shapes(config).items():
        array = stored[name]
        scale = stored.get(name.replace(".weight", ".weight_scale"))
        if scale is None:
            assert header[name]["dtype"] != "U8"
            found[name] = header[name]["dtype"], array
            continue
        assert scale.dtype == np.float16
        if header[name]["dtype"] == "I8":
            codes, factor = array.astype(np.float64), scale[:, None]
        else:
            if array.shape == (shape[0], -(-shape[1] // 8)):
                bits = np.unpackbits(array, axis=1, bitorder="little")
                assert not bits[:, shape[1] :].any()
                codes = bits[:, : shape[1]] * 2.0 - 1
            elif array.ndim == 3:
                parts = [3.0 * (array[0] >> shift & 3) + (array[1] >> shift & 3) - 4 for shift in (0, 2, 4, 6)]
                codes = np.concatenate(parts)[: shape[0]]
            else:
                parts = [(array >> shift & 3).astype(np.float64) - 1 for shift in (0, 2, 4, 6)]
                codes = np.concatenate(parts)[: shape[0]]
            factor = scale if scale.size == 1 else scale[:, None]
            if fields["scale"] == "group":
                factor = scale.repeat(fields["group_size"], axis=1)[:, : shape[1]]
        found[name] = "F32", (codes * factor.astype(np.float64)).astype(np.float32)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tokenizer(write_folder(tmp_path / "source", llama_config(**WIDE)))


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
def test_a_mixed_folder_runs_as_numpy_reads_it(tmp_path: Path, source: Path, scale: Any) -> None:
    report = convert(source, tmp_path / "out", bit_map=MIXED, scale=scale, group_size=64)
    tensors = decode(tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    ids = [257, 5, 77, 200, 31, 32, 110, 3]
    ours = TernaryModel.from_pretrained(tmp_path / "out", activations="float")
    wanted = NumpyModel(config, tensors).logits(ids)
    np.testing.assert_allclose(ours.logits(ids), wanted, atol=2e-5 * np.abs(wanted).max())
    modes = {linear.name.removeprefix("model."): linear.mode for linear in report.linears}
    assert modes["embed_tokens.weight"] == "int8"
    assert modes["lm_head.weight"] == "f16"
    assert {modes[f"layers.0.{name}.weight"] for name in made_models.LINEARS} == {"binary"}
    assert modes["layers.1.self_attn.q_proj.weight"] == "int8"
    assert modes["layers.1.mlp.up_proj.weight"] == "f16"
    assert modes["layers.1.mlp.down_proj.weight"] == "ternary"
    assert modes["layers.3.mlp.down_proj.weight"] == "binary"
    assert modes["layers.3.mlp.gate_proj.weight"] == "two_plane"
    assert ours.transformer.activations == "float"
    assert TernaryModel.from_pretrained(tmp_path / "out").transformer.activations == "int16"


def test_what_each_mode_makes_of_a_matrix(tmp_path: Path, source: Path) -> None:
    """Against the definitions, in NumPy."""
    convert(source, tmp_path / "out", bit_map=MIXED, scale="group", group_size=64)
    convert(source, tmp_path / "ternary", scale="group", group_size=64)
    exact, found = make_tensors(llama_config(**WIDE)), decode(tmp_path / "out")

    def both(name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return exact[name][1].astype(np.float64), found[name][1].astype(np.float64)

    weights, stored = both("model.layers.1.mlp.up_proj.weight")
    np.testing.assert_array_equal(stored, weights.astype(np.float16))
    weights, stored = both("model.embed_tokens.weight")
    step = (np.abs(weights).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
    assert (np.abs(stored - weights) <= 0.5001 * step + 127 * step * 2.0**-10).all()
    weights, stored = both("model.layers.0.mlp.down_proj.weight")
    np.testing.assert_array_equal(np.sign(stored), np.where(weights < 0, -1, 1))
    means = np.abs(weights[:, :64]).mean(1), np.abs(weights[:, 64:]).mean(1)
    np.testing.assert_allclose(np.abs(stored[:, 0]), means[0], rtol=2.0**-10)
    np.testing.assert_allclose(np.abs(stored[:, -1]), means[1], rtol=2.0**-10)
    weights, stored = both("model.layers.3.mlp.gate_proj.weight")
    assert ((stored - weights) ** 2).sum() < 0.035 * (weights**2).sum()  # nine levels of a Gaussian
    name = "model.layers.2.self_attn.o_proj.weight"
    packed = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "ternary")
    np.testing.assert_array_equal(packed[0].read(name), packed[1].read(name))


def test_sizes_are_true_to_the_byte(tmp_path: Path, source: Path) -> None:
    """Foretold, reported and on the disk; and a sum over the matrices, so that a search can add them up."""
    checkpoint = Checkpoint.open(source)
    architecture = read_architecture(checkpoint.config, where="config.json")
    mapped = MappedCheckpoint(checkpoint, architecture, RoundingOptions("ls", "group", 64, 1))
    for i, layers in enumerate([MIXED["layer_modes"], ["f16"] * 4, ["binary"] * 4, ["int8", "f16", "ternary", "f16"]]):
        bit_map = read_bit_map({"embedding": "int8", "layer_modes": layers, "lm_head": "f16"})
        report = convert(source, tmp_path / str(i), bit_map=bit_map, scale="group", group_size=64)
        parts = [mapped.matrix_bytes(name, mapped.mode(bit_map, name)) for name in mapped.matrices]
        size = (tmp_path / str(i) / "model.safetensors").stat().st_size
        assert size == report.file_bytes == mapped.file_bytes(bit_map) == mapped.fixed_bytes + sum(parts)
        written = Checkpoint.open(tmp_path / str(i))
        names = [name for name in written if "norm" not in name]
        weights = sum(linear.rows * linear.cols for linear in report.linears)
        assert report.bits_per_weight == 8 * sum(written.info(name).nbytes for name in names) / weights
        assert report.file_bits_per_weight > report.bits_per_weight
    found = validate(tmp_path / "2", source)
    assert found.bits_per_weight == pytest.approx(_binary_bits(tmp_path / "2"))
    assert found.sparsity == 0


def _binary_bits(folder: Path) -> float:
    checkpoint = Checkpoint.open(folder)
    names = [name for name in checkpoint if "_proj" in name]
    config = json.loads((folder / "config.json").read_text())
    weights = sum(np.prod(shape) for name, shape in made_models.shapes(config).items() if "_proj" in name)
    return float(8 * sum(checkpoint.info(name).nbytes for name in names) / weights)


def test_tied_heads_and_bfloat16(tmp_path: Path) -> None:
    """A tied head is as the embedding; BF16 stays BF16 under f16."""
    config = llama_config(tie_word_embeddings=True)
    source = write_folder(tmp_path / "source", config, make_tensors(config, dtype="BF16"))
    convert(source, tmp_path / "out", bit_map={"embedding": "ternary", "layer_modes": ["f16", "int8"]}, scale="row")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.info("model.layers.0.mlp.up_proj.weight").dtype == "BF16"
    assert "lm_head.weight" not in checkpoint
    ids = [1, 2, 3, 4]
    wanted = NumpyModel(config, decode(tmp_path / "out")).logits(ids)
    ours = TernaryModel.from_pretrained(tmp_path / "out", activations="float")
    np.testing.assert_allclose(ours.logits(ids), wanted, atol=2e-5 * np.abs(wanted).max())
    with pytest.raises(FormatError, match="lm_head must be as embedding"):
        convert(source, tmp_path / "no", bit_map={"embedding": "f16", "layer_modes": ["f16"] * 2, "lm_head": "int8"})


def test_other_verbs_know_such_folders(tmp_path: Path, source: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"layer_bit_map": MIXED, "perplexity": 3.5, "size_bytes": 7}))
    found = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--bit-map", str(file), "--json"])
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert report["bit_map"] == MIXED
    assert report["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert plan(tmp_path / "out").file_bytes == report["file_bytes"]
    assert not inspect(tmp_path / "out").warnings
    text = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    assert "embedding int8" in text.replace("\n", " ")


def test_the_sandwich() -> None:
    assert sandwich(2) == BitMap("f16", ("ternary", "ternary"), "f16")


@pytest.mark.parametrize(
    ("bit_map", "text"),
    [
        ({"layer_modes": ["f16"] * 3}, "one entry for each of the 4 layers, got 3"),
        ({"layer_modes": []}, "layer_modes must be a list"),
        ({"embedding": "f16"}, "layer_modes must be a list"),
        (
            {"layer_modes": ["int4"] * 4},
            r"layer_modes\[0\] must be one of f16, int8, two_plane, ternary, binary, got 'int4'",
        ),
        ({"layer_modes": [{"query": 3}] + ["f16"] * 3}, r"layer_modes\[0\]\['query'\] must be one of"),
        ({"layer_modes": [None] * 4}, r"layer_modes\[0\] must be a mode"),
        ({"layer_modes": [{"qeury": "f16"}] + ["f16"] * 3}, "names 'qeury', which is no linear layer there"),
        ({"layer_modes": [{"query": "f16", "q_proj": "int8"}] + ["f16"] * 3}, "twice, with modes f16, int8"),
        ({"layer_modes": ["f16"] * 4, "head": "f16"}, "'head' is no field of a bit map"),
        ({"layer_modes": ["f16"] * 4, "embedding": "f8"}, "embedding must be one of"),
        (["f16"], "a bit map is an object"),
    ],
)
def test_wrong_maps_are_refused_by_name(tmp_path: Path, source: Path, bit_map: Any, text: str) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps(bit_map))
    with pytest.raises(FormatError, match=text) as caught:
        convert(source, tmp_path / "out", bit_map=file)
    assert "map.json" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("text", ["", "{", '{"layer_modes": ["f16"], "layer_modes": ["f16"]}', "\x00"])
def test_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(FormatError, match=r"map\.json"):
        read_bit_map(tmp_path / "map.json")


def test_wrong_sources_are_refused(tmp_path: Path, source: Path) -> None:
    layers = {"layer_modes": ["f16"] * 4}
    convert(source, tmp_path / "ternary", scale="row")
    with pytest.raises(FormatError, match="quantised already"):
        convert(tmp_path / "ternary", tmp_path / "out", bit_map=layers)
    config = llama_config(**WIDE)
    tensors = make_tensors(config)
    for name, (dtype, weights) in tensors.items():
        if "_proj" in name:
            tensors[name] = dtype, (np.sign(weights) * (np.abs(weights) > 0.05) * 0.25).astype(np.float32)
    dense = write_folder(tmp_path / "dense", config, tensors)
    with pytest.raises(FormatError, match="ternary already"):
        convert(dense, tmp_path / "out", bit_map=layers)
    tensors = make_tensors(config)
    tensors["lm_head.weight"][1][3, 4] = 1e5
    large = write_folder(tmp_path / "large", config, tensors)
    with pytest.raises(FormatError, match=r"'lm_head.weight' holds 100000, more than 16 bits can"):
        convert(large, tmp_path / "out", bit_map=layers)
    assert not (tmp_path / "out").exists()


def damaged(folder: Path, out: Path, change: Any) -> Path:
    """The folder with its configuration changed, or with other tensors."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint.open(folder)
    tensors = {name: (checkpoint.info(name).dtype, checkpoint.read(name).copy()) for name in checkpoint}
    change(config["quantization_config"], tensors)
    return write_folder(out, config, tensors)


def test_damaged_folders_are_refused(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "good", bit_map=MIXED, scale="row")
    binary, int8 = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"

    def refused(name: str, text: str, change: Any) -> None:
        with pytest.raises(FormatError, match=text):
            TernaryModel.from_pretrained(damaged(tmp_path / "good", tmp_path / name, change))

    def other_mode(fields: Any, tensors: Any) -> None:
        no_scale(fields, tensors)
        fields["layer_bit_map"]["embedding"] = "f16"

    def fewer(fields: Any, tensors: Any) -> None:
        del tensors
        fields["layer_bit_map"]["layer_modes"].pop()

    def both(fields: Any, tensors: Any) -> None:
        del tensors
        fields["modules_to_not_convert"] = ["lm_head"]

    def padding(fields: Any, tensors: Any) -> None:
        del fields
        tensors[binary][1][2, -1] |= 0x80

    def shape(fields: Any, tensors: Any) -> None:
        del fields
        tensors[binary] = "U8", tensors[binary][1][:, :-1]

    def no_scale(fields: Any, tensors: Any) -> None:
        del fields
        del tensors[int8.replace("weight", "weight_scale")]

    def nan(fields: Any, tensors: Any) -> None:
        del fields
        tensors[int8.replace("weight", "weight_scale")][1][5] = np.nan

    refused(
        "a", "'model.embed_tokens.weight' has dtype I8, expected F16 or BF16, since layer_bit_map says f16", other_mode
    )
    refused("b", "one entry for each of the 4 layers, got 3", fewer)
    refused("c", "layer_bit_map says everything", both)
    refused("d", "q_proj.weight.*behind the last column", padding)
    refused("e", "eight of the 99 columns in a byte", shape)
    refused("f", "'model.embed_tokens.weight_scale' is missing", no_scale)
    refused("g", "unusable scale nan", nan)
