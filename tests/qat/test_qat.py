# SPDX-License-Identifier: Apache-2.0
"""`prepare_qat`: what it keeps, what it computes, and what it refuses."""

import copy
import importlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from torch_setup import torch

from ternaryforge.torch import (
    QUANTIZERS,
    QATConfig,
    QATLinear,
    anneal_sharpness,
    clip_latents,
    prepare_qat,
    qat_layers,
    residual_strength,
    set_residual,
    set_sharpness,
    set_strength,
    warmup_strength,
)
from ternaryforge.torch.qat import quantize_activations, read_stamp

nn = torch.nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 12)
        self.q_proj = nn.Linear(12, 12, bias=False)
        self.up_proj = nn.Linear(12, 20)
        self.lm_head = nn.Linear(20, 8, bias=False)

    def forward(self, ids):
        x = self.q_proj(self.embed(ids))
        return self.lm_head(torch.relu(self.up_proj(x)))


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


IDS = torch.tensor([[1, 5, 2, 7]])


def test_parameters_names_hooks_and_optimizer_state_stay() -> None:
    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    calls = []
    model.q_proj.register_forward_hook(lambda *_: calls.append(1))
    model(IDS).sum().backward()
    optimizer.step()
    before = dict(model.named_parameters())
    moments = optimizer.state[model.q_proj.weight]["exp_avg"]
    assert prepare_qat(model, QATConfig()) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert optimizer.state[model.q_proj.weight]["exp_avg"] is moments
    assert set(dict(qat_layers(model))) == {"q_proj", "up_proj"}
    assert type(model.lm_head) is nn.Linear
    model(IDS).sum().backward()
    optimizer.step()
    assert len(calls) == 2


def test_forward_is_int8_by_trits() -> None:
    model = prepare_qat(block(), QATConfig())
    x = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
    w, b = (p.detach().double().numpy() for p in (model.up_proj.weight, model.up_proj.bias))
    s = np.abs(w).mean()
    sx = 127 / np.abs(x).max(1, keepdims=True)
    expected = (np.rint(x * sx) @ np.clip(np.rint(w / s), -1, 1).T) * s / sx + b
    np.testing.assert_allclose(model.up_proj(torch.tensor(x)).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_activations_pass_their_gradient() -> None:
    x = torch.randn(2, 5, requires_grad=True)
    quantize_activations(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 5))
    assert torch.equal(quantize_activations(torch.zeros(1, 3)), torch.zeros(1, 3))


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_every_quantizer_trains_copies_and_reloads(name: str) -> None:
    model = prepare_qat(block(), QATConfig(quantizer=name, scale="group", group_size=8, activation_bits=None))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = model.q_proj.weight.detach().clone()
    loss = torch.nn.functional.cross_entropy(model(IDS)[0], IDS[0])
    loss.backward()
    optimizer.step()
    assert not torch.equal(before, model.q_proj.weight)
    again = prepare_qat(block(1), QATConfig(quantizer=name, scale="group", group_size=8, activation_bits=None))
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 # its own
        assert torch.equal(other(IDS), model(IDS))


def test_strength_blends_weights_and_inputs() -> None:
    dense = block()
    model = prepare_qat(copy.deepcopy(dense), QATConfig())
    quantised = model(IDS)
    set_strength(model, 0.0)
    assert torch.equal(model(IDS), dense(IDS))
    set_strength(model, 1.0)
    assert torch.equal(model(IDS), quantised)
    set_strength(model, 0.25)
    w = model.q_proj.weight
    quantised_weight = model.q_proj.quantizer(w.reshape(1, -1)).reshape(w.shape)
    assert torch.allclose(model.q_proj.quantized_weight(), w + 0.25 * (quantised_weight - w))
    set_strength(model, None)
    assert torch.equal(model(IDS), quantised)


def test_residual_adds_latents_and_needs_consent() -> None:
    model = prepare_qat(block(), QATConfig(residual=True))
    plain = model.q_proj.quantized_weight()
    set_residual(model, 0.5)
    assert torch.allclose(model.q_proj.quantized_weight(), plain + 0.5 * model.q_proj.weight)
    with pytest.raises(ValueError, match=r"QATConfig\(residual=True\)"):
        set_residual(prepare_qat(block()), 0.5)


def test_gradient_factor() -> None:
    grads = []
    for factor in (1.0, 2.0):
        model = prepare_qat(block(), QATConfig(ste_scale=factor))
        model.q_proj(torch.ones(1, 12)).sum().backward()
        grads.append(model.q_proj.weight.grad)
    assert torch.allclose(grads[1], 2 * grads[0])


def test_latents_of_annealing_are_clipped() -> None:
    model = prepare_qat(block(), QATConfig(quantizer="tanh", scale="row"))
    set_sharpness(model, 3.0)
    soft = model(IDS)
    set_sharpness(model, None)
    assert not torch.equal(soft, model(IDS))
    unit = model.q_proj.quantizer.unit
    assert (model.q_proj.weight.abs() > 1.2 * unit).any()
    clip_latents(model, 1.2)
    assert (model.q_proj.weight.abs() <= 1.2 * unit).all()
    with pytest.raises(ValueError, match="no layer anneals"):
        set_sharpness(prepare_qat(block()), 3.0)


def test_sub_norm_is_a_norm_before_the_layer() -> None:
    model = prepare_qat(block(), QATConfig(sub_norm=("up_proj",), activation_bits=None))
    assert "up_proj.sub_norm.weight" in model.state_dict()
    assert model.q_proj.sub_norm is None
    x = torch.randn(3, 12)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    weight, bias = model.up_proj.quantized_weight(), model.up_proj.bias
    assert torch.allclose(model.up_proj(x), normed @ weight.T + bias, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "half"), [("linear", 0.5), ("cosine", 0.5), ("sigmoid", 0.5), ("exponential", 0.0758582)]
)
def test_warmup_schedules(schedule: str, half: float) -> None:
    values = [warmup_strength(step, 100, schedule) for step in range(-1, 120)]
    assert values[:2] == [0.0, 0.0]
    assert values[101:] == [1.0] * 20
    assert sorted(values) == values
    assert values[51] == pytest.approx(half, abs=1e-6)
    assert warmup_strength(0, 0, schedule) == 1.0


def test_other_schedules() -> None:
    assert [anneal_sharpness(step, 4) for step in range(5)] == [1.0, 2.75, 4.5, 6.25, None]
    residuals = [residual_strength(step, 100) for step in (0, 5, 10, 55, 100)]
    assert residuals[:3] == [0.0, 0.5, 1.0]
    assert residuals[3] == pytest.approx(0.5)
    assert residuals[4] is None
    with pytest.raises(ValueError, match="schedule is one of linear"):
        warmup_strength(1, 2, "steps")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": ("k_proj",)}, "targets: the pattern 'k_proj' matches no linear layer"),
        ({"skip": ("router",)}, "skip: the pattern 'router' matches no linear layer"),
        ({"targets": ("q_proj", "*_proj")}, "'q_proj' is matched twice, by 'q_proj' and '\\*_proj'"),
        ({"targets": ("*_proj",), "skip": ("lm_head", "up_proj")}, "targets and skip both match 'up_proj'"),
        ({"targets": ("q_proj",)}, "neither targets nor skip matches 'up_proj'"),
        ({"sub_norm": ("lm_head",)}, "sub_norm: the pattern 'lm_head' matches no linear layer"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(config: dict, message: str) -> None:
    model = block()
    with pytest.raises(ValueError, match=message):
        prepare_qat(model, QATConfig(**config))
    assert not list(qat_layers(model))


def test_models_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents in torch.bfloat16: most updates .* dtype=torch.float32"):
        prepare_qat(block().bfloat16())
    tied = block()
    tied.embed = nn.Embedding(8, 20)
    tied.lm_head.weight = tied.embed.weight
    with pytest.raises(ValueError, match="'lm_head' is tied to 'embed'"):
        prepare_qat(tied, QATConfig(skip=()))
    odd = block()
    odd.up_proj = nn.Linear(12, 18)
    with pytest.raises(ValueError, match="'up_proj' has 18 rows"):
        prepare_qat(odd)
    with pytest.raises(TypeError, match="'out_proj' is a NonDynamicallyQuantizableLinear"):
        prepare_qat(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="'q_proj' is prepared already"):
        prepare_qat(prepare_qat(block()))
    with pytest.raises(ValueError, match="no linear layers"):
        prepare_qat(nn.Embedding(4, 4))
    broken = block()
    broken.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'q_proj' holds NaN"):
        prepare_qat(broken)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantizer": "int4"}, "quantizer is one of"),
        ({"scale": "channel"}, "scale is one of tensor, row, group"),
        ({"group_size": 0, "scale": "group"}, "group_size is positive"),
        ({"activation_bits": 4}, "activation_bits is 8 or None"),
        ({"ste_scale": 0}, "ste_scale is positive"),
        ({"options": {"threshold": 1}}, "does not take the options"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QATConfig(**fields)


def test_a_text_is_no_list_of_patterns() -> None:
    with pytest.raises(TypeError, match="skip is a sequence of patterns, got the text 'lm_head'"):
        QATConfig(skip="lm_head")


def test_a_shard_is_no_matrix() -> None:
    model = block()
    model.q_proj.weight.placements = ()  # what tells a DTensor
    with pytest.raises(ValueError, match="'q_proj' is sharded over devices: prepare the model first"):
        prepare_qat(model)


def test_tensor_parallel_shards_are_refused_when_they_run(tmp_path: Path) -> None:
    model = prepare_qat(block(), QATConfig(scale="tensor"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        tensor = importlib.import_module("torch.distributed.tensor")
        shards = tensor.distribute_tensor(model.q_proj.weight.detach(), mesh, [tensor.Shard(0)])
        model.q_proj.weight = nn.Parameter(shards)
        with pytest.raises(
            ValueError, match=r"a scale of a shard is not the scale of the matrix; .* not tensor parallel"
        ):
            model(IDS)
    finally:
        torch.distributed.destroy_process_group()


def test_stamps_say_what_the_latents_mean() -> None:
    model = block()
    model.config = type("Config", (), {})()
    prepare_qat(model)
    stock = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    assert model.config.quantization_config == {**stock, "modules_to_not_convert": ["lm_head"]}
    assert read_stamp(model.config.quantization_config) == QATConfig()
    for config in (
        QATConfig(quantizer="twn", options={"threshold": 0.75}),
        QATConfig(scale="group", group_size=64),
        QATConfig(activation_bits=None, sub_norm=("up_proj",)),
    ):
        other = block()
        other.config = type("Config", (), {})()
        prepare_qat(other, config)
        assert other.config.quantization_config["quant_method"] == "ternaryforge"
        assert read_stamp(other.config.quantization_config) == config
        again = block()
        again.config = other.config
        with pytest.raises(ValueError, match=r"the checkpoint was made with .* resume with the configuration"):
            prepare_qat(again)
        prepare_qat(again, config)
    assert read_stamp({"quant_method": "bitnet"}) is None
    with pytest.raises(ValueError, match="fields that are not known: colour"):
        read_stamp({"quant_method": "ternaryforge", "quantization_mode": "online", "colour": 1})


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch.compile does
def test_it_compiles_whole() -> None:
    model = prepare_qat(block(), QATConfig(quantizer="lsq", scale="row"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    set_strength(model, 0.25)
    loss = compiled(IDS).square().sum()
    loss.backward()
    grad = model.q_proj.weight.grad.clone()
    model.q_proj.weight.grad = None
    model(IDS).square().sum().backward()
    assert torch.allclose(grad, model.q_proj.weight.grad, atol=1e-5)
    assert isinstance(model.q_proj, QATLinear)
