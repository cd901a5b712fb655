# SPDX-License-Identifier: Apache-2.0
"""Trainer, its callbacks and the distillation trainer on a small model, and what a stock reload computes."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hf_setup import small_model, some_ids, torch, transformers

from ternaryforge.hf import (
    AnnealingCallback,
    DistillationTrainer,
    LambdaWarmupCallback,
    ResidualCallback,
    TernaryMonitorCallback,
    WeightDecayAnnealCallback,
)
from ternaryforge.torch import DistillationLoss, QATConfig, prepare_qat

STEPS = 6


def arguments(out: Path, **changes: Any) -> Any:
    fields = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | changes
    return transformers.TrainingArguments(output_dir=str(out), **fields)


def texts(count: int = 16) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row.clone()} for row in some_ids(count)]


class Record(transformers.TrainerCallback):
    """What the model and the optimizer look like in the middle of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        layer = kwargs["model"].model.layers[0].self_attn.q_proj
        sharpness = getattr(layer.quantizer, "sharpness", None)
        decays = {group["weight_decay"] for group in kwargs["optimizer"].param_groups}
        values = {"strength": layer.strength, "residual": layer.residual, "sharpness": sharpness}
        self.rows.append({n: None if v is None else v.item() for n, v in values.items()} | {"decay": max(decays)})


def test_warmup_weight_decay_and_monitor(tmp_path: Path) -> None:
    model = prepare_qat(small_model(), QATConfig())
    record, monitor = Record(), TernaryMonitorCallback(every=2)
    callbacks = [LambdaWarmupCallback(4), WeightDecayAnnealCallback(0.5), monitor, record]
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=texts(), callbacks=callbacks)
    trainer.train()
    assert [row["strength"] for row in record.rows] == [0, 0.25, 0.5, 0.75, None, None]
    assert [row["decay"] for row in record.rows] == [0.1] * 3 + [0] * 3
    assert [look["step"] for look in monitor.history] == [2, 4, 6]
    last = monitor.history[-1]
    assert 0.1 < last["tf/zeros/all"] < 0.6
    assert 0 < last["tf/flips/q_proj"] < 0.5
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["tf/lambda"] for entry in logs] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert logs[-1]["tf/zeros/all"] == last["tf/zeros/all"]

    trainer.save_model(str(tmp_path / "master"))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "master").eval()
    assert type(stock.model.layers[0].mlp.up_proj).__name__ == "AutoBitLinear"
    ids = some_ids(seed=9)
    with torch.no_grad():
        ours, theirs = model.eval()(ids).logits, stock(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    again = prepare_qat(stock, QATConfig())  # a stock reload goes on training
    with torch.no_grad():
        assert torch.equal(again(ids).logits, ours)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "master")
    with pytest.raises(ValueError, match=r"was made with quant_method = 'bitnet', not 'ternaryforge'"):
        prepare_qat(other, QATConfig(quantizer="lsq"))


def test_a_trainer_does_not_resume_another_training(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first = {"scale": "group", "group_size": 64, "activation_bits": None}
    model = prepare_qat(small_model(), QATConfig(**first))
    transformers.Trainer(model, arguments(tmp_path, **changes), train_dataset=texts()).train()
    for config, callback in (
        (QATConfig(**first | {"group_size": 128}), LambdaWarmupCallback(2)),
        (QATConfig(**first | {"quantizer": "twn"}), TernaryMonitorCallback(2)),
        (QATConfig(), WeightDecayAnnealCallback()),
    ):
        other = prepare_qat(small_model(), config)
        trainer = transformers.Trainer(other, arguments(tmp_path), train_dataset=texts(), callbacks=[callback])
        with pytest.raises(ValueError, match=r"checkpoint was made with .* resume with the configuration that it was"):
            trainer.train(resume_from_checkpoint=True)
    same = prepare_qat(small_model(), QATConfig(**first))
    trainer = transformers.Trainer(
        same, arguments(tmp_path), train_dataset=texts(), callbacks=[LambdaWarmupCallback(2), TernaryMonitorCallback(2)]
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS


def test_annealing_and_residual(tmp_path: Path) -> None:
    model = prepare_qat(small_model(), QATConfig(quantizer="tanh", scale="row", residual=True, activation_bits=None))
    record = Record()
    callbacks = [AnnealingCallback(0.5), ResidualCallback(4), record]
    transformers.Trainer(model, arguments(tmp_path), train_dataset=texts(), callbacks=callbacks).train()
    assert [row["sharpness"] for row in record.rows[:4]] == pytest.approx([1, 1 + 7 / 3, 1 + 14 / 3, None])
    residuals = [row["residual"] for row in record.rows]
    assert residuals[0] == 0
    assert residuals[4:] == [None, None]
    layer = model.model.layers[1].mlp.down_proj
    assert (layer.weight.abs() <= 1.2001 * layer.quantizer.unit).all()


def test_distillation_brings_the_student_to_its_teacher(tmp_path: Path) -> None:
    teacher = small_model()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(30)  # so that it has opinions
    model = prepare_qat(copy.deepcopy(teacher), QATConfig(scale="row", activation_bits=None))
    loss = DistillationLoss(ce=0.01, kl=1.0, off=0.1)
    fields = {"max_steps": 12, "gradient_accumulation_steps": 2}
    trainer = DistillationTrainer(
        model, arguments(tmp_path, **fields), train_dataset=texts(4), teacher=teacher, distillation=loss
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        inputs = {"input_ids": torch.stack([text["input_ids"] for text in texts(4)])}
        start = prepare_qat(copy.deepcopy(teacher), QATConfig(scale="row", activation_bits=None))
        outputs = [m(**inputs, output_hidden_states=True) for m in (start, teacher)]
    expected = loss(*outputs, labels=inputs["input_ids"]).total.item()
    assert losses[0] == pytest.approx(expected, rel=1e-3)  # a mean, not a sum over accumulated steps
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(ValueError, match="loop of your own"):
        DistillationTrainer(model, arguments(tmp_path), teacher=teacher, distillation=DistillationLoss(relations=1))


def test_refusals_come_before_the_run() -> None:
    with pytest.raises(ValueError, match="schedule is one of"):
        LambdaWarmupCallback(10, "staircase")
    with pytest.raises(ValueError, match="every is a number of steps"):
        TernaryMonitorCallback(0)
