# SPDX-License-Identifier: Apache-2.0
"""Tuning of scales and norms: gradients against NumPy, what it learns, what stays, and going on after a stop."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch_setup import torch

from ternaryforge.torch.scale_blocks import ScaleBlocks
from ternaryforge.torch.tuning import TunedLinear, TuningOptions, install, tune

VOCABULARY, WIDTH = 17, 12


class SmallModel(torch.nn.Module):
    """Embedding, two linear layers around a norm, head: enough to be a language model of one token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.up = torch.nn.Linear(WIDTH, 20)
        self.norm = torch.nn.RMSNorm(20)
        self.down = torch.nn.Linear(20, WIDTH, bias=False)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Any) -> SimpleNamespace:
        x = self.embedding(ids)
        return SimpleNamespace(logits=self.head(x + self.down(torch.relu(self.norm(self.up(x))))))


def round_layer(layer: Any, scale: Any = "group", group_size: int = 8) -> TunedLinear:
    """By half of the largest of all weights, so that there is something to tune."""
    weight = layer.weight.detach()
    blocks = ScaleBlocks(*weight.shape, scale, group_size)
    unit = weight.abs().max() / 2
    codes = (weight / unit).round().clamp(-1, 1).to(torch.int8)
    return TunedLinear(codes, torch.full((blocks.count,), float(unit)), blocks)


def models(**options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    teacher = SmallModel().eval().requires_grad_(requires_grad=False)
    student = copy.deepcopy(teacher)
    norms = install(student, {name: round_layer(getattr(student, name), **options) for name in ("up", "down")},
                    ["norm.weight"])  # fmt: skip
    return teacher, student, norms


def texts(count: int = 30) -> list[Any]:
    random = np.random.default_rng(1)
    return [random.integers(0, VOCABULARY, random.integers(2, 12)).astype(np.int32) for _ in range(count)]


@pytest.mark.parametrize(("scale", "shape"), [("tensor", (1,)), ("row", (20,)), ("group", (20, 2))])
def test_a_layer_and_its_gradient(scale: Any, shape: tuple[int, ...]) -> None:
    """The last group of a row is shorter. dL/dchange of a block is scale * sum over it of code * dL/dweight."""
    random = np.random.default_rng(0)
    codes = random.integers(-1, 2, (20, WIDTH)).astype(np.int8)
    scales = random.uniform(0.1, 0.2, shape).astype(np.float32)
    layer = TunedLinear(torch.tensor(codes), torch.tensor(scales), ScaleBlocks(20, WIDTH, scale, 8))
    change = random.normal(size=shape).astype(np.float32) / 8
    with torch.no_grad():
        layer.change.copy_(torch.tensor(change).reshape(-1, 1))
    now = scales * (1 + change)
    np.testing.assert_allclose(layer.encode().scale.numpy().reshape(shape), now, rtol=1e-6)
    wide = np.repeat(now, 8, 1)[:, :WIDTH] if scale == "group" else now.reshape(-1, 1)
    x = random.normal(size=(5, WIDTH)).astype(np.float32)
    wanted = random.normal(size=(5, 20)).astype(np.float32)
    output = layer(torch.tensor(x))
    np.testing.assert_allclose(output.detach().numpy(), x @ (codes * wide).T, atol=1e-5)
    (output * torch.tensor(wanted)).sum().backward()
    product = codes * (wanted.T @ x)
    sums = {
        "tensor": product.sum().reshape(1),
        "row": product.sum(1),
        "group": np.stack([product[:, :8].sum(1), product[:, 8:].sum(1)], 1),
    }[scale]
    np.testing.assert_allclose(layer.change.grad.numpy().reshape(shape), scales * sums, rtol=1e-4, atol=1e-5)


def test_a_scale_that_fell_below_zero_turns_its_codes_round() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-1, 2, (4, WIDTH)).astype(np.int8)
    blocks = ScaleBlocks(4, WIDTH, "row")
    layer = TunedLinear(torch.tensor(codes), torch.full((4,), 0.5), blocks)
    with torch.no_grad():
        layer.change.copy_(torch.tensor([[0.0], [-1.5], [0.0], [-3.0]]))
    found = layer.encode()
    np.testing.assert_array_equal(found.scale[:, 0].numpy(), [0.5, 0.25, 0.5, 1.0])
    np.testing.assert_array_equal(found.codes.numpy(), codes * np.array([[1], [-1], [1], [-1]]))
    x = torch.eye(WIDTH)
    torch.testing.assert_close(layer(x).detach().T, found.codes.float() * found.scale)


def test_int8_inputs_are_those_of_training() -> None:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    blocks = ScaleBlocks(4, WIDTH, "tensor")
    layer = TunedLinear(torch.ones(4, WIDTH, dtype=torch.int8), torch.ones(1), blocks, activation_bits=8)
    factor = 127 / x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(layer(x)[:, 0], ((x * factor).round() / factor).sum(-1))


def test_only_scales_and_norms_move_and_the_divergence_falls() -> None:
    teacher, student, norms = models()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    codes = student.up.codes.clone()
    seen: list[tuple[int, int, float]] = []
    after = tune(student, teacher, texts(), TuningOptions(6000, scale_rate=0.02, batch=4), norms=norms,
                 progress=lambda *step: seen.append(step))  # fmt: skip
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"up.change", "down.change", "norm.weight"}
    assert torch.equal(codes, student.up.codes)
    assert torch.equal(student.up.bias, teacher.up.bias)
    assert after < 0.5 * np.mean([loss for _, _, loss in seen[:10]])
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert (done[-1], seen[-1][1]) == (6000, 6000)


def test_rates_of_zero_change_nothing() -> None:
    teacher, student, norms = models()
    tune(student, teacher, texts(), TuningOptions(500, norm_rate=0.0), norms=norms)
    assert torch.equal(norms[0], torch.ones(20))
    assert student.up.change.abs().max() > 0


def test_goes_on_to_the_same_end() -> None:
    """Stopped at any step, the training goes on from the last kept state, and ends with the same bits."""
    options = TuningOptions(3000, batch=2, seed=3)
    teacher, whole, norms = models()
    kept: list[Any] = []
    divergence = tune(whole, teacher, texts(), options, norms=norms, keep=kept.append)
    assert len(kept) > 2
    for state in (kept[0], kept[-1]):
        teacher, student, norms = models()
        stored = {name: array.copy() for name, array in state.items()}
        steps: list[Any] = []
        again = tune(
            student,
            teacher,
            texts(),
            options,
            norms=norms,
            state=stored,
            progress=lambda *step, steps=steps: steps.append(step),
        )
        assert again == divergence
        for ours, theirs in zip(student.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert len(steps) < 50


def test_rates_rise_and_fall() -> None:
    options = TuningOptions(100, warmup=0.2)
    assert [options.share(share) for share in (0.0, 0.1, 0.2, 1.0)] == pytest.approx([0, 0.5, 1, 0])
    assert options.share(0.6) == pytest.approx(0.5)
    assert TuningOptions(100, warmup=0.0).share(0.0) == 1


def test_refusals() -> None:
    teacher, student, _ = models()
    with pytest.raises(ValueError, match="the model has no 'gate'"):
        install(copy.deepcopy(teacher), {"gate": round_layer(teacher.up)}, [])
    with pytest.raises(ValueError, match="the model has no 'bias'"):
        install(copy.deepcopy(teacher), {}, ["bias"])
    with pytest.raises(ValueError, match=r"codes are \[4, 8\] with 4 scales, got \[4, 8\] with 3"):
        TunedLinear(torch.zeros(4, 8), torch.ones(3), ScaleBlocks(4, 8, "row"))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        tune(student, teacher, [np.zeros(1, np.int32)], TuningOptions(10))
    with pytest.raises(ValueError, match="tokens and batch are positive"):
        TuningOptions(0)
    with pytest.raises(ValueError, match="rates are not negative"):
        TuningOptions(1, scale_rate=-1)
    with torch.no_grad():
        student.up.start.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or infinity"):
        tune(student, teacher, texts(), TuningOptions(20))
