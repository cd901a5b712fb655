# SPDX-License-Identifier: Apache-2.0
"""EfficientQAT on small models: blocks one by one from a folder, going on after a stop, then scales alone."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_setup import small_model, some_ids, torch, transformers

from ternaryforge import FormatError
from ternaryforge.hf import export_bitnet, train_blockwise
from ternaryforge.torch import (
    BlocksInMemory,
    BlockwiseOptions,
    QATConfig,
    TuningOptions,
    capture_inputs,
    prepare_qat,
    qat_layers,
    set_strength,
    train_block,
    train_blocks,
    tune_scales,
)

CONFIG = QATConfig(quantizer="lsq", scale="group", group_size=64, activation_bits=None)
OPTIONS = BlockwiseOptions(epochs=4, weight_rate=3e-3, scale_rate=3e-3, clip=1.0)
IDS = some_ids(16, 10).numpy()


def in_memory(options: BlockwiseOptions = OPTIONS, family: str = "Llama") -> tuple[Any, Any, Any]:
    teacher = small_model(family)
    student = prepare_qat(copy.deepcopy(teacher), CONFIG)
    hidden, arguments = capture_inputs(student, student.model.layers[0], IDS)
    errors = train_blocks(BlocksInMemory(teacher.model.layers, student.model.layers, arguments), hidden, options)
    return teacher, student, errors


def test_every_block_comes_nearer_and_the_rest_stays() -> None:
    teacher, student, errors = in_memory()
    assert len(errors) == 2
    assert all(error.after < 0.8 * error.before for error in errors)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    plain = prepare_qat(copy.deepcopy(teacher), CONFIG)
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        wanted, rounded, trained = (model(ids).logits for model in (teacher, plain, student))
    assert (trained - wanted).square().mean() < 0.7 * (rounded - wanted).square().mean()


def test_the_goal_of_a_block_is_the_exact_one_for_exact_inputs() -> None:
    """Without training, errors are those of rounded blocks on what rounded blocks before them gave."""
    teacher, student, errors = in_memory(BlockwiseOptions(epochs=1, weight_rate=0.0, scale_rate=0.0))
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        exact, rounded = (model(ids, output_hidden_states=True).hidden_states[1] for model in (teacher, student))
    expected = ((rounded - exact).square().sum() / exact.square().sum()).item()
    assert errors[0].before == pytest.approx(expected, rel=1e-4)
    assert errors[0].after == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2"])
def test_a_folder_gives_what_memory_gives(family: str, tmp_path: Path) -> None:
    kinds = {"sliding_window": 4} if family == "Gemma2" else {}
    teacher = small_model(family, head_dim=8, **kinds)
    teacher.save_pretrained(tmp_path / "dense")
    options = BlockwiseOptions(epochs=1, weight_rate=1e-3, scale_rate=1e-3)
    report = train_blockwise(tmp_path / "dense", tmp_path / "master", IDS, CONFIG, options)
    assert report.tokens == IDS.size
    assert not (tmp_path / "master.blocks").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "master").eval()
    assert len(list(qat_layers(loaded))) == 14
    student = prepare_qat(copy.deepcopy(teacher), CONFIG)
    blocks = student.model.layers
    if family != "Gemma2":  # whose blocks are called with other masks in turn
        hidden, arguments = capture_inputs(student, blocks[0], IDS)
        errors = train_blocks(BlocksInMemory(teacher.model.layers, blocks, arguments), hidden, options)
        assert report.blocks == errors
        assert torch.equal(loaded(torch.from_numpy(IDS)).logits, student(torch.from_numpy(IDS)).logits)
    else:
        assert all(error.after < error.before for error in report.blocks)
    packed = export_bitnet(tmp_path / "master", tmp_path / "packed", "ternaryforge")
    assert packed.tensors == 14


class StopError(Exception):
    pass


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "dense")
    options = BlockwiseOptions(epochs=1, weight_rate=1e-3)

    def run(out: str, **kwargs: Any) -> Any:
        return train_blockwise(
            tmp_path / "dense", tmp_path / out, IDS, CONFIG, kwargs.pop("options", options), **kwargs
        )

    whole = run("whole")

    def stop(done: int, total: int, error: Any) -> None:
        raise StopError

    with pytest.raises(StopError):
        run("cut", progress=stop)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ValueError, match="is of another run"):
        run("cut", options=BlockwiseOptions(epochs=2))
    done: list[int] = []
    again = run("cut", progress=lambda i, *_: done.append(i))
    assert done == [2]
    assert again.blocks == whole.blocks
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_stage_two_moves_scales_alone() -> None:
    teacher, student, _ = in_memory(BlockwiseOptions(epochs=1, weight_rate=1e-3, scale_rate=1e-3))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    codes = {
        name: layer.quantizer.encode(layer.quantizer.blocks.split(layer.weight)) for name, layer in qat_layers(student)
    }
    losses: list[float] = []
    sequences = [row.astype(np.int32) for row in IDS]
    after = tune_scales(
        student, teacher, sequences, TuningOptions(4000, scale_rate=1e-2), progress=lambda *step: losses.append(step[2])
    )
    assert after < 0.9 * np.mean(losses[:8])
    ternary = dict(qat_layers(student))
    for name, value in student.state_dict().items():
        if not any(name.startswith(f"{layer}.") for layer in ternary):
            assert torch.equal(value, before[name]), name
    for name, layer in ternary.items():
        now = layer.quantizer.encode(layer.quantizer.blocks.split(layer.weight))
        assert torch.equal(now.codes, codes[name].codes)
        assert not torch.equal(now.scale, codes[name].scale)
        torch.testing.assert_close(layer.weight, layer.quantized_weight())
    assert all(value.requires_grad for value in student.parameters())


def test_what_cannot_be_trained_so_is_refused(tmp_path: Path) -> None:
    teacher = small_model()
    sequences, options = [IDS[0].astype(np.int32)], TuningOptions(10)
    with pytest.raises(ValueError, match="no ternary layers: prepare_qat it first"):
        tune_scales(teacher, teacher, sequences, options)
    for name, reason in (
        ("twn", "scales follow from the latents"),
        ("dlt", "scales follow"),
        ("tequila", "makes a bias"),
    ):
        student = prepare_qat(copy.deepcopy(teacher), QATConfig(quantizer=name, activation_bits=None))
        with pytest.raises(ValueError, match=f"quantizer '{name}'.* {reason}"):
            tune_scales(student, teacher, sequences, options)
    warming = prepare_qat(copy.deepcopy(teacher), CONFIG)
    set_strength(warming, 0.5)
    with pytest.raises(ValueError, match="end the schedule first"):
        tune_scales(warming, teacher, sequences, options)
    hidden, arguments = capture_inputs(teacher, teacher.model.layers[0], IDS)
    with pytest.raises(ValueError, match="the block has no ternary layers"):
        train_block(teacher.model.layers[0], hidden, hidden, OPTIONS, arguments=arguments)
    with pytest.raises(ValueError, match="does not call the block"):
        capture_inputs(teacher, torch.nn.Linear(1, 1), IDS)
    with pytest.raises(ValueError, match="have 2 and 1 blocks"):
        BlocksInMemory(teacher.model.layers, teacher.model.layers[:1], {})
    with pytest.raises(ValueError, match="epochs, batch and clip are positive"):
        BlockwiseOptions(epochs=0)
    prepare_qat(copy.deepcopy(teacher), CONFIG).save_pretrained(tmp_path / "master")
    with pytest.raises(FormatError, match="is quantised already"):
        train_blockwise(tmp_path / "master", tmp_path / "out", IDS, CONFIG)
    teacher.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"ids are \[sequences, length\], got the shape \[160\]"):
        train_blockwise(tmp_path / "dense", tmp_path / "out", IDS.reshape(-1), CONFIG)
    with pytest.raises(FileExistsError, match="is not empty"):
        train_blockwise(tmp_path / "dense", tmp_path / "master", IDS, CONFIG)
    rates = BlockwiseOptions(weight_rate=1e30, scale_rate=1e30)
    with pytest.raises(ValueError, match="NaN or infinity: lower the learning rates"):
        train_blockwise(tmp_path / "dense", tmp_path / "out", IDS, CONFIG, rates)
