# SPDX-License-Identifier: Apache-2.0
"""Conversion of checkpoint folders: what is written, what is kept, what is refused."""

import json
import math
import os
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest
from numpy.typing import NDArray

from ternaryforge import FormatError, TernaryModel
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.conversion import convert

# Read when torch is imported: compiling transformers' helpers takes many seconds and changes nothing.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

DOWN = "model.layers.1.mlp.down_proj.weight"
GROUPED = {"hidden_size": 200, "intermediate_size": 132}  # ragged groups of 64 and 128
Float32 = NDArray[np.float32]


def make(folder: Path, *, dtype: str = "F32", tensors: made_models.Tensors | None = None, **changes: Any) -> Path:
    config = made_models.llama_config(**changes)
    made = made_models.make_tensors(config, dtype=dtype) if tensors is None else tensors
    return made_models.write_folder(folder, config, made)


def is_linear(name: str) -> bool:
    return any(linear in name for linear in made_models.LINEARS)


def read_codes(checkpoint: Checkpoint, name: str) -> NDArray[np.int8]:
    """Trits of a packed tensor: bits 2 j .. 2 j + 1 belong to the j-th quarter of the rows."""
    packed = checkpoint.read(name)
    return np.concatenate([((packed >> shift) & 3).astype(np.int8) - 1 for shift in (0, 2, 4, 6)])


def read_weights(folder: Path, name: str) -> Float32:
    """The matrix that a ternary checkpoint stands for, by docs/reference/formats.md."""
    checkpoint = Checkpoint.open(folder)
    quantization = checkpoint.config["quantization_config"]
    codes = read_codes(checkpoint, name)
    scales = checkpoint.read_float32(name + "_scale")
    if quantization["quant_method"] == "bitnet":
        assert scales.shape == (1,)
        if quantization["linear_class"] == "bitlinear":
            scales = np.float32(1) / scales
    elif quantization["scale"] == "row":
        assert scales.shape == codes.shape[:1]
        scales = scales[:, None]
    else:
        group = quantization["group_size"]
        assert scales.shape == (len(codes), math.ceil(codes.shape[1] / group))
        scales = scales.repeat(group, axis=1)[:, : codes.shape[1]]
    return codes * scales


def rounded(weights: Float32, scale: str, group: int) -> Float32:
    """Least squares by its formula: per run the prefix of the sorted |w| that keeps most energy."""
    if scale == "row":
        group = weights.shape[1]
    result = np.zeros(weights.shape)
    for row, start in np.ndindex(len(weights), math.ceil(weights.shape[1] / group)):
        part = np.s_[row, start * group : (start + 1) * group]
        falling = np.sort(np.abs(weights[part].astype(np.float64)))[::-1]
        sums, counts = falling.cumsum(), np.arange(1, falling.size + 1)
        best = np.argmax(sums**2 / counts)
        s = np.float64(np.float16(sums[best] / counts[best]))
        result[part] = np.where(np.abs(weights[part]) > s / 2, np.sign(weights[part]), 0) * s
    return result.astype(np.float32)


def bake(codes: NDArray[Any], scales: Any) -> Float32:
    return codes.astype(np.float32) * np.asarray(scales, np.float32)


def nothing_left(folder: Path, *expected: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(expected)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_stock_folder(tmp_path: Path, dtype: str) -> None:
    source = made_models.write_tokenizer(make(tmp_path / "in", dtype=dtype))
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "LICENSE").write_text("free")
    (source / "notes.txt").write_text("not for the copy")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/rag.jinja").write_text("{{ documents }}")
    (source / "additional_chat_templates/notes.txt").write_text("not for the copy")
    report = convert(source, tmp_path / "out")
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert after.config == before.config | {
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "bitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": ["lm_head"],
        }
    }
    for name in before:
        if not is_linear(name):
            assert after.info(name).dtype == dtype
            assert bytes(after.raw(name)) == bytes(before.raw(name))
            continue
        rows, cols = before.info(name).shape
        assert (after.info(name).dtype, after.info(name).shape) == ("U8", (rows // 4, cols))
        stored = after.info(name + "_scale")
        assert (stored.dtype, stored.shape) == ("F32", (1,))
        weights = before.read_float32(name)
        scale = (np.float32(1) / after.read_float32(name + "_scale"))[0]
        assert scale == np.float16(scale)
        codes = read_codes(after, name)
        np.testing.assert_array_equal(codes, np.sign(weights) * (np.abs(weights) > scale / 2))
        falling = np.sort(np.abs(weights.astype(np.float64)), axis=None)[::-1]
        energies = falling.cumsum() ** 2 / np.arange(1, falling.size + 1)
        left = np.square(weights - codes * scale, dtype=np.float64).sum()
        best = np.square(weights, dtype=np.float64).sum() - energies.max()
        assert best <= left * (1 + 1e-12)
        assert left <= best * (1 + 1e-5)  # 16-bit scales cost next to nothing
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    kept = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"}
    assert copied == kept | {"config.json", "model.safetensors", "additional_chat_templates"}
    assert nothing_left(tmp_path / "out/additional_chat_templates", "rag.jinja")
    assert nothing_left(tmp_path, "in", "out")
    assert report.tensors == 14


@pytest.mark.parametrize(("scale", "group"), [("row", 128), ("group", 64), ("group", 128), ("group", 256)])
def test_row_and_group_scales(tmp_path: Path, scale: Any, group: int) -> None:
    source = make(tmp_path / "in", dtype="BF16", **GROUPED)
    convert(source, tmp_path / "out", scale=scale, group_size=group)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    expected = {"quant_method": "ternaryforge", "scale": scale}
    if scale == "group":
        expected["group_size"] = group
    expected |= {"activation_bits": 16, "modules_to_not_convert": ["lm_head"]}
    assert after.config["quantization_config"] == expected
    for name in filter(is_linear, before):
        weights = before.read_float32(name)
        np.testing.assert_array_equal(read_weights(tmp_path / "out", name), rounded(weights, scale, group))


def test_sharded_source_gives_the_same_folder(tmp_path: Path) -> None:
    config = made_models.llama_config()
    tensors = made_models.make_tensors(config, dtype="BF16")
    made_models.write_shards(tmp_path / "shards", config, tensors)
    made_models.write_folder(tmp_path / "one", config, tensors)
    for name in ("shards", "one"):
        convert(tmp_path / name, tmp_path / f"{name}-out", scale="row")
    files = [(tmp_path / f"{name}-out" / "model.safetensors").read_bytes() for name in ("shards", "one")]
    assert files[0] == files[1]


def test_threads_do_not_change_the_folder(tmp_path: Path) -> None:
    source = make(tmp_path / "in", hidden_size=512, intermediate_size=640)
    for scale in ("tensor", "group"):
        written = set()
        for threads in (1, 2, 3):
            out = tmp_path / f"{scale}{threads}"
            convert(source, out, scale=scale, threads=threads)  # type: ignore[arg-type]
            written.add((out / "model.safetensors").read_bytes())
        assert len(written) == 1


def test_bitnet_family_stays_at_eight_bits(tmp_path: Path) -> None:
    config = made_models.bitnet_config(quantization_config=None)
    source = made_models.write_folder(tmp_path / "in", config)
    convert(source, tmp_path / "rows", scale="row")
    assert Checkpoint.open(tmp_path / "rows").config["quantization_config"]["activation_bits"] == 8
    convert(source, tmp_path / "stock")
    assert Checkpoint.open(tmp_path / "stock").config["quantization_config"]["quant_method"] == "bitnet"


def test_report(tmp_path: Path) -> None:
    source = make(tmp_path / "in", **GROUPED)
    seen: list[tuple[int, int, str]] = []
    report = convert(source, tmp_path / "out", scale="group", group_size=64, progress=lambda *step: seen.append(step))
    linears = [name for name in Checkpoint.open(source) if is_linear(name)]
    sizes = [math.prod(Checkpoint.open(source).info(name).shape) for name in linears]
    assert (report.tensors, report.ternary_params) == (len(linears), sum(sizes))
    file = tmp_path / "out" / "model.safetensors"
    assert report.file_bytes == file.stat().st_size
    assert 2.5 < report.bits_per_weight < 2.9  # 2 bits, 32 more per 64 columns, and ragged groups
    assert report.bits_per_weight < report.file_bits_per_weight < 16
    assert report.peak_anonymous_bytes is not None
    assert report.seconds > 0
    assert (report.scheme, report.scale, report.group_size) == ("ls", "group", 64)
    assert "gibberish" in report.warnings[0]
    for linear in report.linears:
        before = Checkpoint.open(source).read_float32(linear.name)
        after = read_weights(tmp_path / "out", linear.name)
        error = np.square(before - after, dtype=np.float64).sum() / np.square(before, dtype=np.float64).sum()
        assert linear.relative_error == pytest.approx(error, rel=1e-6)
        assert linear.zero_fraction == pytest.approx((after == 0).mean())
        assert not linear.already_ternary
        assert 0.1 < linear.relative_error < 0.25
    assert [step[2] for step in seen] == Checkpoint.open(source).names
    assert seen[-1][0] == seen[-1][1]
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert DOWN in report._repr_html_()


def bake_all(tensors: made_models.Tensors, dtype: str, kind: str, group: int) -> None:
    """Makes every linear layer ternary with scales that 16 bits cannot hold where the dtype can."""
    rng = np.random.default_rng(3)
    for name in filter(is_linear, tensors):
        rows, cols = tensors[name][1].shape
        shape = {"tensor": (1, 1), "row": (rows, 1), "group": (rows, math.ceil(cols / group))}[kind]
        scales = rng.uniform(0.01, 0.1, shape).repeat(group if kind == "group" else 1, axis=1)[:, :cols]
        codes = rng.integers(-1, 2, (rows, cols))
        codes[:, ::group] = 1
        tensors[name] = (dtype, made_models.encode(codes * scales, dtype))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("scheme", ["ls", "absmean", "absmax", "twn"])
def test_ternary_weights_are_kept_exactly(tmp_path: Path, scheme: Any, dtype: str) -> None:
    fits = {"tensor": ("tensor", "row", "group"), "row": ("row", "group"), "group": ("group",)}
    for kind, scales in fits.items():
        config = made_models.llama_config(**GROUPED)
        tensors = made_models.make_tensors(config, dtype=dtype)
        bake_all(tensors, dtype, kind, 64)
        source = made_models.write_folder(tmp_path / kind, config, tensors)
        for scale in scales:
            out = tmp_path / f"{kind}-{scale}"
            report = convert(source, out, scheme=scheme, scale=scale, group_size=64)  # type: ignore[arg-type]
            assert len(report.already_ternary) == report.tensors
            assert not report.warnings
            for linear in report.linears:
                before = Checkpoint.open(source).read_float32(linear.name)
                after = read_weights(out, linear.name)
                if scale == "tensor":  # 1 / (1 / s) may miss s by one place of float32
                    np.testing.assert_array_equal(np.sign(after), np.sign(before))
                    np.testing.assert_allclose(after, before, rtol=2**-23)
                else:
                    np.testing.assert_array_equal(after, before)
                assert linear.relative_error < 1e-13


def test_ternary_weights_are_never_stored_coarser(tmp_path: Path) -> None:
    config = made_models.llama_config(hidden_size=320, intermediate_size=320, head_dim=80)
    for kind, group, asked, fix in (
        ("row", 64, {"scale": "tensor"}, "scale='row'"),
        ("group", 64, {"scale": "tensor"}, "scale='group', group_size=64"),
        ("group", 128, {"scale": "row"}, "scale='group', group_size=128"),
        ("group", 128, {"scale": "group", "group_size": 256}, "scale='group', group_size=128"),
        ("group", 64, {"scale": "group", "group_size": 192}, "scale='group', group_size=64"),
    ):
        tensors = made_models.make_tensors(config)
        bake_all(tensors, "F32", kind, group)
        source = made_models.write_folder(tmp_path / f"{kind}{group}", config, tensors)
        with pytest.raises(FormatError, match=r"model\.safetensors': tensor 'model\.layers\.") as caught:
            convert(source, tmp_path / "out", **asked)  # type: ignore[arg-type]
        assert f"one scale per {kind}" in str(caught.value)
        assert str(caught.value).endswith(f"use {fix}")
        assert not (tmp_path / "out").exists()
    convert(tmp_path / "group128", tmp_path / "finer", scale="group", group_size=64)
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(
        read_weights(tmp_path / "finer", name), Checkpoint.open(tmp_path / "group128").read_float32(name)
    )


def test_almost_ternary_weights_are_rounded(tmp_path: Path) -> None:
    config = made_models.llama_config()
    tensors = made_models.make_tensors(config)
    bake_all(tensors, "F32", "tensor", 64)
    tensors[DOWN][1][0, 0] *= np.float32(1.01)
    report = convert(made_models.write_folder(tmp_path / "in", config, tensors), tmp_path / "out")
    assert [linear.name for linear in report.linears if not linear.already_ternary] == [DOWN]


def test_zero_layer_is_kept(tmp_path: Path) -> None:
    tensors = made_models.make_tensors(made_models.llama_config())
    tensors[DOWN][1][:] = 0
    source = make(tmp_path / "in", tensors=tensors)
    for scale in ("tensor", "row", "group"):
        report = convert(source, tmp_path / scale, scale=scale)  # type: ignore[arg-type]
        assert report.already_ternary == (DOWN,)
        assert not read_weights(tmp_path / scale, DOWN).any()


def test_scale_without_a_reciprocal(tmp_path: Path) -> None:
    tensors = made_models.make_tensors(made_models.llama_config())
    tensors[DOWN][1][:] = bake(np.sign(tensors[DOWN][1]), 1e-40)
    source = make(tmp_path / "in", tensors=tensors)
    with pytest.raises(FormatError, match=r"down_proj.* reciprocal .* use scale='row'"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", scale="row")
    np.testing.assert_array_equal(read_weights(tmp_path / "out", DOWN), tensors[DOWN][1])


@pytest.mark.parametrize(
    ("quantization", "scale", "group"),
    [
        ({"quant_method": "bitnet"}, "tensor", 128),
        ({"quant_method": "bitnet", "linear_class": "autobitlinear"}, "tensor", 128),
        ({"quant_method": "ternaryforge", "scale": "row"}, "row", 128),
        ({"quant_method": "ternaryforge", "scale": "group", "group_size": 64}, "group", 64),
    ],
)
def test_quantised_source_is_copied(tmp_path: Path, quantization: Any, scale: Any, group: int) -> None:
    source = make(tmp_path / "in", quantization_config=quantization, **GROUPED)
    report = convert(source, tmp_path / "out", scheme="absmax", scale=scale, group_size=group)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert after.config == before.config
    assert after.names == before.names
    for name in before:
        assert bytes(after.raw(name)) == bytes(before.raw(name))
    assert report.scheme is None
    assert (report.tensors, len(report.already_ternary)) == (14, 14)
    for linear in report.linears:
        assert linear.zero_fraction == pytest.approx((read_codes(before, linear.name) == 0).mean())
        assert (linear.rows, linear.cols) == read_codes(before, linear.name).shape
    for other in ("tensor", "row", "group"):
        if other != scale:
            with pytest.raises(FormatError, match=f"quantised already.*use scale='{scale}'"):
                convert(source, tmp_path / "other", scale=other)  # type: ignore[arg-type]


def test_latents_of_training_are_rounded_as_in_training(tmp_path: Path) -> None:
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    config = made_models.bitnet_config(quantization_config=online)
    tensors = made_models.make_tensors(config, dtype="BF16")
    # Already ternary values mean what training makes of them, too: their mean, not their maximum.
    codes = np.random.default_rng(0).integers(-1, 2, tensors[DOWN][1].shape)
    tensors[DOWN] = ("BF16", made_models.encode(codes * 0.25, "BF16"))
    source = made_models.write_folder(tmp_path / "in", config, tensors)
    for asked in ({}, {"scheme": "absmean", "scale": "row"}, {"scheme": "twn"}):
        with pytest.raises(FormatError, match=r"trained .* use scheme='absmean', scale='tensor'"):
            convert(source, tmp_path / "out", **asked)  # type: ignore[arg-type]
    report = convert(source, tmp_path / "out", scheme="absmean")
    assert report.already_ternary == ()
    after = Checkpoint.open(tmp_path / "out")
    assert after.config["quantization_config"]["linear_class"] == "bitlinear"
    for linear in report.linears:
        latents = Checkpoint.open(source).read_float32(linear.name).astype(np.float64)
        mean = np.abs(latents).mean()
        np.testing.assert_array_equal(read_codes(after, linear.name), np.clip(np.rint(latents / mean), -1, 1))
        scale = 1 / after.read_float32(linear.name + "_scale")[0]
        assert scale == pytest.approx(mean, rel=3 * 2.0**-11)
    assert Checkpoint.open(source).config["model_type"] == "bitnet"


def test_layers_that_training_kept_dense_stay_dense(tmp_path: Path) -> None:
    online = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"],
    }
    source = make(tmp_path / "in", quantization_config=online)
    report = convert(source, tmp_path / "out", scheme="absmean")
    assert DOWN not in [linear.name for linear in report.linears]
    after = Checkpoint.open(tmp_path / "out")
    assert bytes(after.raw(DOWN)) == bytes(Checkpoint.open(source).raw(DOWN))
    kept = after.config["quantization_config"]["modules_to_not_convert"]
    assert kept == online["modules_to_not_convert"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", [DOWN, "model.embed_tokens.weight", "model.norm.weight"])
def test_nan_names_file_and_tensor(tmp_path: Path, name: str, bad: float) -> None:
    tensors = made_models.make_tensors(made_models.llama_config())
    tensors[name][1].flat[-1] = bad
    source = make(tmp_path / "in", tensors=tensors)
    with pytest.raises(FormatError, match=rf"model\.safetensors': tensor '{name}'"):
        convert(source, tmp_path / "out")
    assert nothing_left(tmp_path, "in")


def test_too_large_a_scale_names_the_tensor(tmp_path: Path) -> None:
    tensors = made_models.make_tensors(made_models.llama_config())
    tensors[DOWN][1][:] *= np.float32(1e8)
    source = make(tmp_path / "in", tensors=tensors)
    with pytest.raises(FormatError, match=rf"tensor '{DOWN}': .* above 65504"):
        convert(source, tmp_path / "out")
    assert nothing_left(tmp_path, "in")


def test_rows_that_cannot_be_packed(tmp_path: Path) -> None:
    source = make(tmp_path / "in", hidden_size=18)
    with pytest.raises(FormatError, match=r"tensor '.*o_proj\.weight' has 18 rows.*multiple of 4"):
        convert(source, tmp_path / "out")
    assert nothing_left(tmp_path, "in")
    convert(source, tmp_path / "out", scale="row")
    folder = Checkpoint.open(tmp_path / "out")
    assert folder.info("model.layers.0.self_attn.o_proj.weight").shape == (5, 24)  # the last byte row is half full


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "in")

    def interrupt(done: int, total: int, _: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt)
    assert nothing_left(tmp_path, "in")


def test_output_must_be_elsewhere_and_empty(tmp_path: Path) -> None:
    source = make(tmp_path / "in")
    for out in (source, source / "out", tmp_path / "in" / ".." / "in" / "deeper" / "out"):
        with pytest.raises(ValueError, match="outside of the source"):
            convert(source, out)
    assert not (source / "deeper").exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("data")
    with pytest.raises(FileExistsError):
        convert(source, full)
    assert nothing_left(full, "precious")
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    convert(source, tmp_path / "new" / "folders" / "out")
    assert nothing_left(tmp_path, "in", "full", "empty", "new")


def test_sources_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "nowhere", tmp_path / "out")
    mamba = make(tmp_path / "mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(FormatError, match="MambaForCausalLM"):
        convert(mamba, tmp_path / "out")
    other = make(tmp_path / "gptq", tensors=made_models.make_tensors(made_models.llama_config()))
    config = made_models.llama_config(quantization_config={"quant_method": "gptq"})
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="'gptq' is not supported"):
        convert(other, tmp_path / "out")
    tensors = made_models.make_tensors(made_models.llama_config())
    del tensors[DOWN]
    with pytest.raises(FormatError, match=f"'{DOWN}' is missing"):
        convert(make(tmp_path / "part", tensors=tensors), tmp_path / "out")
    assert nothing_left(tmp_path, "mamba", "gptq", "part")


def test_options_are_checked_first(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"scheme": "best"},
        {"scale": "column"},
        {"scale": "group", "group_size": 100},
        {"scale": "group", "group_size": 0},
        {"threads": 0},
    ]
    for options in wrong:
        with pytest.raises(ValueError, match=r"^\[convert\] .* got"):
            convert(tmp_path / "nowhere", tmp_path / "out", **options)


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory")
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """24 M weights, the largest tensor 1 M: as float32 all would take 100 MB."""
    source = make(tmp_path / "in", dtype="BF16", hidden_size=512, intermediate_size=2048, num_hidden_layers=7)
    for scale in ("tensor", "group"):
        report = convert(source, tmp_path / scale, scale=scale)  # type: ignore[arg-type]
        assert report.peak_anonymous_bytes is not None
        assert report.peak_anonymous_bytes < 40e6


def test_stock_folder_loads_in_plain_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for family, config in (
        ("llama", made_models.llama_config()),
        ("bitnet", made_models.bitnet_config(quantization_config=None)),
    ):
        source = made_models.write_folder(tmp_path / family, config)
        out = tmp_path / f"{family}-out"
        convert(source, out)
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        linears = {name: module for name, module in model.named_modules() if type(module).__name__ == "BitLinear"}
        assert len(linears) == 14
        for name, module in linears.items():
            weights = read_weights(out, name + ".weight").astype(np.float64)
            x = torch.randn(5, weights.shape[1], generator=torch.Generator().manual_seed(1))
            values = x.double().numpy()
            step = np.abs(values).max(axis=1, keepdims=True) / 127
            expected = np.rint(values / step) * step @ weights.T
            with torch.no_grad():
                result = module(x).numpy()
            np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.shared
def test_perplexity_of_a_converted_real_model(tmp_path: Path, shared: Path) -> None:
    """Groups of 64, float activations, 200 documents: figures that plain transformers gives as well."""
    text = (shared / "data/tinystories/valid.txt").read_text(encoding="utf-8")
    for scheme, expected in (("ls", 223.895), ("absmean", 430.611)):
        out = tmp_path / scheme
        convert(shared / "data/stories260k/hf", out, scheme=scheme, scale="group", group_size=64)  # type: ignore[arg-type]
        model = TernaryModel.from_pretrained(out)
        assert model.perplexity(text, max_documents=200).perplexity == pytest.approx(expected, abs=0.05)
