# SPDX-License-Identifier: Apache-2.0
"""Layers with one input: joined they give the same bits as alone, and never a part of another input."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch_setup import torch

from ternaryforge.torch import TernaryLinear, ops
from ternaryforge.torch.shared_input import share_inputs

ROWS = {"q_proj": 48, "k_proj": 20, "v_proj": 16}


class Attention(torch.nn.Module):
    """Three layers of other names, kinds and sizes on one input."""

    def __init__(self, scale: str = "row", activation_bits: int | None = 8) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for name, rows in ROWS.items():
            trits = torch.randint(-1, 2, (rows, 150), generator=draw, dtype=torch.int8)
            shape = {"tensor": (1,), "row": (rows,), "group": (rows, 3)}[scale]
            scales = torch.rand(shape, generator=draw) + 0.1
            bias = torch.rand(rows, generator=draw) if name != "v_proj" else None
            group_size = 64 if scale == "group" else 0
            layer = TernaryLinear.from_trits(
                trits, scales, bias, group_size=group_size, activation_bits=activation_bits
            )
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def joined(*arguments: Any) -> Attention:
    model = Attention(*arguments)
    share_inputs(model)
    return model


@pytest.fixture(name="calls")
def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the operator multiplied."""
    made: list[int] = []
    real = ops.linears

    def count(x: torch.Tensor, weights: list[torch.Tensor], *rest: Any, **options: Any) -> torch.Tensor:
        made.append(len(weights))
        return real(x, weights, *rest, **options)

    monkeypatch.setattr(ops, "linears", count)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_bits", [8, 16, None])
@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
def test_one_product_gives_the_bits_of_three(
    scale: str, activation_bits: int | None, dtype: torch.dtype, calls: list[int]
) -> None:
    x = torch.randn(2, 5, 150).to(dtype)
    expected = Attention(scale, activation_bits)(x)
    assert calls == [1, 1, 1]
    assert torch.equal(joined(scale, activation_bits)(x), expected)
    assert calls[3:] == [3]


def test_parts_are_tensors_of_their_own() -> None:
    model, x = joined(), torch.randn(2, 5, 150)
    expected = Attention().k_proj(x)
    model.v_proj(x).view(-1).zero_()
    assert torch.equal(model.k_proj(x), expected)


def test_layers_that_need_gradients_have_graphs_of_their_own(calls: list[int]) -> None:
    grads = []
    for model in (Attention(), joined()):
        x = torch.linspace(-1, 1, 300).view(2, 150).requires_grad_(True)
        for layer in (model.v_proj, model.k_proj):
            (layer(x).mul_(2) * torch.arange(layer.out_features)).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert calls == [1] * 4


def change_input(model: Attention, x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2)


def equal_input(model: Attention, x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def change_scales(model: Attention, x: torch.Tensor) -> torch.Tensor:
    model.k_proj.load_state_dict({**model.k_proj.state_dict(), "weight_scale": torch.full((20,), 7.0)})
    return x


def change_weight(model: Attention, x: torch.Tensor) -> torch.Tensor:
    model.k_proj.weight = torch.nn.Parameter(model.k_proj.weight.clone().fill_(0x55), requires_grad=False)
    return x


@pytest.mark.parametrize("change", [change_input, equal_input, change_scales, change_weight])
def test_nothing_is_given_that_is_out_of_date(change: Callable[[Attention, torch.Tensor], torch.Tensor]) -> None:
    results = []
    for model in (Attention(), joined()):
        x = torch.linspace(-1, 1, 300).view(2, 150)
        model.q_proj(x)
        results.append(model.k_proj(change(model, x)))
    assert torch.equal(*results)


def test_a_part_without_a_graph_is_not_given_to_training() -> None:
    model, x = joined(), torch.randn(2, 150, requires_grad=True)
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad


def test_a_part_of_autocast_is_not_given_outside_it() -> None:
    model, x = joined(), torch.randn(2, 150)
    with torch.autocast("cpu", torch.bfloat16):
        model.q_proj(x)
    assert model.k_proj(x).dtype == torch.float32


def test_a_layer_asked_again_multiplies_again(calls: list[int]) -> None:
    model, x = joined(), torch.randn(2, 150)
    assert torch.equal(model.k_proj(x), model.k_proj(x))
    assert calls == [3, 3]


def test_without_a_way_to_tell_changes_each_is_alone(calls: list[int]) -> None:
    with torch.inference_mode():
        joined()(torch.randn(2, 150))
    assert calls == [1, 1, 1]


def test_copies_share_among_themselves(calls: list[int]) -> None:
    model, x = joined(), torch.randn(2, 150)
    expected = model(x)
    model.q_proj(x)  # parts that nobody took are no part of a copy
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 # its own
        del calls[:]
        copied.k_proj.scale_bits.copy_(torch.full((20,), 2.0).view(torch.int32))
        changed = copied(x)
        assert calls == [3]
        assert torch.equal(changed[:, :48], expected[:, :48])
        assert not torch.equal(changed[:, 48:68], expected[:, 48:68])
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("same", [True, False])
def test_threads_do_not_get_parts_of_each_other(same: bool) -> None:
    model = joined()
    inputs = [torch.full((3, 150), float(i)) + torch.linspace(0, 1, 150) for i in range(2)]
    if same:
        inputs[1] = inputs[0]
    expected, right = [model(x) for x in inputs], []

    def work(number: int) -> None:
        right.extend(torch.equal(model(inputs[number]), expected[number]) for _ in range(100))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 200


def test_a_compiled_graph_is_whole() -> None:
    model, x = joined(), torch.randn(2, 150)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_layers_that_differ_in_kind_stay_apart() -> None:
    model = Attention()
    model.v_proj.activation_bits = 16
    share_inputs(model)
    assert model.q_proj.shared_input is None
