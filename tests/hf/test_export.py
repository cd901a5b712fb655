# SPDX-License-Identifier: Apache-2.0
"""From the trainer's folder to packed and dense checkpoints, read again by transformers and by the engine."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_setup import small_model, some_ids, torch, transformers

import ternaryforge as tf
from ternaryforge import FormatError, _core
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.families import read_architecture
from ternaryforge.hf import export_bitnet, export_dense
from ternaryforge.hf.onebitllms import convert_to_bf16, quantize_to_1bit, replace_linear_with_bitnet_linear
from ternaryforge.torch import QUANTIZERS, QATConfig, prepare_qat, qat_layers
from ternaryforge.weights import load_weights

WEIGHT_ONLY: dict[str, Any] = {"scale": "group", "group_size": 64, "activation_bits": None}


def trained(config: QATConfig, family: str = "Llama", **changes: Any) -> Any:
    """A small model whose latents and learned values were moved a little."""
    model = prepare_qat(small_model(family, **changes), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    ids = some_ids(4, seed=3)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def logits(model: Any, ids: Any) -> np.ndarray:
    with torch.no_grad():
        return model(ids).logits.numpy()


def assert_linears_agree(ours: Any, theirs: Any) -> None:
    others = dict(theirs.named_modules())
    generator = torch.Generator().manual_seed(5)
    count = 0
    with torch.no_grad():
        for name, layer in qat_layers(ours):
            x = torch.randn(3, layer.in_features, generator=generator)
            expected, got = layer(x), others[name](x)
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), name
            count += 1
    assert count == 14


def engine_codes(folder: Path) -> dict[str, np.ndarray]:
    """Trits of all packed matrices as the engine reads them, by module."""
    checkpoint = Checkpoint.open(folder)
    architecture = read_architecture(checkpoint.config, where=str(folder))
    codes = {}
    for slot, tensor in load_weights(checkpoint, architecture).items():
        if tensor.layout == "hf_packed":
            unpacked = _core.formats.unpack(tensor.data, "hf_packed", tensor.rows, tensor.cols)
            codes[architecture.tensor_names[slot].removesuffix(".weight")] = unpacked
    return codes


def assert_engine_agrees(model: Any, folder: Path, *, tolerance: float) -> None:
    codes = engine_codes(folder)
    layers = dict(qat_layers(model))
    assert codes.keys() == layers.keys()
    for name, layer in layers.items():
        blocks = layer.quantizer.blocks
        expected = blocks.join(layer.quantizer.encode(blocks.split(layer.weight.detach())).codes)
        assert np.array_equal(codes[name], expected.numpy()), name
    ids = some_ids(1, 40, seed=7)
    expected = logits(model, ids)[0]
    got = tf.TernaryModel.from_pretrained(folder).logits(ids[0].numpy())
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    assert (got.argmax(-1) == expected.argmax(-1)).mean() >= 0.97


@pytest.mark.parametrize("family", ["Llama", "BitNet", "Qwen3"])
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_transformers_reloads_both_forms(linear_class: str, family: str, tmp_path: Path) -> None:
    changes = {"head_dim": 8} if family == "Qwen3" else {"hidden_act": "relu2"} if family == "BitNet" else {}
    model = trained(QATConfig(), family, **changes)
    report = export_bitnet(saved(model, tmp_path / "master"), tmp_path / "out", linear_class)
    assert report.tensors == 14
    assert report.ternary_params == sum(layer.weight.numel() for _, layer in qat_layers(model))
    assert 0.2 < report.zero_fraction < 0.45
    assert 2 < report.bits_per_weight < 2.1
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    kind = {"bitlinear": "BitLinear", "autobitlinear": "AutoBitLinear"}[linear_class]
    assert {type(module).__name__ for _, module in stock.named_modules()} >= {kind}
    assert_linears_agree(model, stock)
    assert np.abs(logits(stock, some_ids()) - logits(model, some_ids())).max() <= 2e-3
    assert_engine_agrees(model, tmp_path / "out", tolerance=2e-2)  # an int8 rounding may tip


def test_transformers_reloads_the_latents(tmp_path: Path) -> None:
    model = trained(QATConfig())
    stock = transformers.AutoModelForCausalLM.from_pretrained(saved(model, tmp_path)).eval()
    assert_linears_agree(model, stock)
    ids = some_ids(1, 40)
    got = tf.TernaryModel.from_pretrained(tmp_path).logits(ids[0].numpy())
    assert (got.argmax(-1) == logits(model, ids)[0].argmax(-1)).mean() >= 0.97


PACKABLE = sorted(set(QUANTIZERS) - {"dlt", "four_levels"})


@pytest.mark.parametrize("quantizer", PACKABLE)
def test_engine_has_the_codes_of_training(quantizer: str, tmp_path: Path) -> None:
    model = trained(QATConfig(quantizer=quantizer, **WEIGHT_ONLY))
    export_bitnet(saved(model, tmp_path / "master"), tmp_path / "out", "ternaryforge")
    assert_engine_agrees(model, tmp_path / "out", tolerance=1e-4)


@pytest.mark.parametrize("scale", ["tensor", "row"])
def test_our_form_with_other_scales(scale: str, tmp_path: Path) -> None:
    model = trained(QATConfig(quantizer="lsq", scale=scale, activation_bits=None), tie_word_embeddings=True)
    report = export_bitnet(saved(model, tmp_path / "master"), tmp_path / "out", "ternaryforge")
    assert report.to_dict()["group_size"] is None
    assert_engine_agrees(model, tmp_path / "out", tolerance=1e-4)


def test_bias_of_tequila_in_stock_form(tmp_path: Path) -> None:
    config = QATConfig(quantizer="tequila", options={"reactivation": 1.0})
    model = trained(config, attention_bias=True)
    export_bitnet(saved(model, tmp_path / "master"), tmp_path / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert stock.model.layers[0].mlp.up_proj.bias.abs().max() > 0.01
    assert_linears_agree(model, stock)
    assert_engine_agrees(model, tmp_path / "out", tolerance=2e-2)
    with pytest.raises(FormatError, match="multiplies the bias of an 'autobitlinear' layer"):
        export_bitnet(tmp_path / "master", tmp_path / "other", "autobitlinear")


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_dense_export_is_a_plain_model(quantizer: str, tmp_path: Path) -> None:
    model = trained(QATConfig(quantizer=quantizer, scale="group", group_size=20, activation_bits=None))
    export_dense(saved(model, tmp_path / "master"), tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    expected = logits(model, some_ids())
    assert np.abs(logits(plain, some_ids()) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_names_of_onebitllms(tmp_path: Path) -> None:
    model = replace_linear_with_bitnet_linear(small_model())
    saved(model, tmp_path / "master")
    path = tmp_path / "master" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]  # as that library saves it
    path.write_text(json.dumps(config))
    quantize_to_1bit(tmp_path / "master", tmp_path / "packed")
    assert_engine_agrees(model, tmp_path / "packed", tolerance=2e-2)
    convert_to_bf16(tmp_path / "master", tmp_path / "dense")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    weight = plain.model.layers[1].mlp.down_proj.weight
    assert torch.equal(weight, model.model.layers[1].mlp.down_proj.quantized_weight().bfloat16())


@pytest.mark.parametrize(
    ("config", "linear_class", "message"),
    [
        (QATConfig(quantizer="dlt", **WEIGHT_ONLY), "ternaryforge", r"has a shift.* use export_dense"),
        (QATConfig(quantizer="four_levels", **WEIGHT_ONLY), "ternaryforge", r"has four levels.* use export_dense"),
        (QATConfig(scale="row"), "bitlinear", "one scale a tensor and int8 activations: use linear_class"),
        (QATConfig(activation_bits=None), "autobitlinear", "activation_bits None; a stock checkpoint"),
        (QATConfig(scale="group", group_size=20), "ternaryforge", "groups of 20; packed groups are multiples of 64"),
        (QATConfig(sub_norm=("o_proj",)), "bitlinear", "a norm before some layers"),
    ],
)
def test_what_a_form_cannot_store_is_refused(
    config: QATConfig, linear_class: Any, message: str, tmp_path: Path
) -> None:
    saved(prepare_qat(small_model(), config), tmp_path / "master")
    with pytest.raises(FormatError, match=message):
        export_bitnet(tmp_path / "master", tmp_path / "out", linear_class)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_latents_are_refused(tmp_path: Path) -> None:
    saved(small_model(), tmp_path / "dense")
    with pytest.raises(FormatError, match=r"does not say that the weights are latents.*ternaryforge.convert"):
        export_bitnet(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(ValueError, match="linear_class is bitlinear, autobitlinear or ternaryforge, got 'q4'"):
        export_bitnet(tmp_path / "dense", tmp_path / "out", "q4")
    master = saved(prepare_qat(small_model(), QATConfig(quantizer="lsq", scale="row")), tmp_path / "master")
    with pytest.raises(FormatError, match=r"not as the config given"):
        export_bitnet(master, tmp_path / "out", "ternaryforge", config=QATConfig())
    export_bitnet(master, tmp_path / "packed", "ternaryforge")
    with pytest.raises(FormatError, match=r"is quantised already \('ternaryforge'\)"):
        export_bitnet(tmp_path / "packed", tmp_path / "out")
    with pytest.raises(FileExistsError):
        export_bitnet(master, tmp_path / "packed", "ternaryforge")
    config = json.loads((master / "config.json").read_text())
    config["quantization_config"]["quantizer"] = "absmean"
    shutil.copytree(master, tmp_path / "edited")
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"quantizer.scale' is no part of LlamaForCausalLM trained with .*'absmean'"):
        export_bitnet(tmp_path / "edited", tmp_path / "out", "ternaryforge")
    assert not (tmp_path / "out").exists()


def test_damaged_latents_are_refused(tmp_path: Path) -> None:
    model = prepare_qat(small_model(), QATConfig())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    saved(model, tmp_path / "master")
    with pytest.raises(
        FormatError, match=r"model.safetensors': tensor 'model.layers.1.mlp.up_proj.weight': .*infinity"
    ):
        export_bitnet(tmp_path / "master", tmp_path / "out")
    assert not (tmp_path / "out").exists()
