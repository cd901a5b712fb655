# SPDX-License-Identifier: Apache-2.0
"""`QuantizedHead`: close to its weight, exact where it trains, the same after copies and inside graphs."""

import copy
import gc
import io
import pickle

import numpy as np
import pytest
from torch_setup import torch

from ternaryforge import _core
from ternaryforge.torch import QuantizedHead, ops

nn = torch.nn


def dense(rows: int = 70, cols: int = 96, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(cols, rows, bias=False, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.006), (6, 0.03), (4, 0.12)])
def test_logits_are_close_to_those_of_the_weight(bits: int, tolerance: float, dtype: torch.dtype) -> None:
    exact = dense(dtype=dtype)
    head = QuantizedHead.from_linear(exact, bits)
    x = torch.randn(2, 3, 96, dtype=dtype)
    y = head(x)
    assert (y.dtype, y.shape) == (dtype, (2, 3, 70))
    expected = x.detach().double().numpy() @ exact.weight.detach().double().numpy().T
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    assert np.abs(y.detach().double().numpy() - expected).max() <= (tolerance + rounding) * np.abs(expected).max()


def test_it_is_what_the_core_computes() -> None:
    exact = dense()
    tensor = _core.formats.PackedTensor("f32", 70, 96, exact.weight.detach().numpy().view(np.uint8).reshape(-1))
    x = torch.randn(5, 96)
    expected = _core.kernels.QuantizedHead(tensor, 8).multiply(x.numpy())
    assert np.array_equal(QuantizedHead.from_linear(exact)(x).detach().numpy(), expected)


def test_gradients_and_training_are_those_of_the_exact_head() -> None:
    exact = dense()
    head = QuantizedHead.from_linear(exact)
    assert head.weight is exact.weight
    x = torch.randn(4, 96, requires_grad=True)
    head(x).div_(2).sum().backward()  # in place, as a temperature is applied
    assert torch.allclose(2 * x.grad, exact.weight.sum(0).expand(4, -1), atol=1e-5)
    assert head.weight.grad is None
    head.train()
    assert torch.equal(head(x), exact(x))
    head(x).sum().backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        head.weight.mul_(2)
    head.eval()
    assert (head(x) - exact(x)).abs().max() <= 0.006 * exact(x).abs().max()


def test_copies_give_the_same_logits_and_let_go_of_memory() -> None:
    gc.collect()
    before = len(ops.heads)
    head = QuantizedHead.from_linear(dense())
    x = torch.randn(2, 96)
    expected = head(x)
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(buffer, weights_only=False)]  # noqa: S301
    assert all(torch.equal(copied(x), expected) for copied in copies)
    assert head.state_dict().keys() == {"weight"}
    assert len(ops.heads) == before + 4
    del head, copies
    gc.collect()
    assert len(ops.heads) == before


def test_it_compiles_into_one_graph() -> None:
    head = QuantizedHead.from_linear(dense()).requires_grad_(False)
    model = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), head).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 5):
        x = torch.randn(tokens, 96)
        assert torch.equal(compiled(x), model(x))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    x = torch.randn(2, 96, requires_grad=True)
    torch.library.opcheck(torch.ops.ternaryforge.head.default, (x, head.weight, head._number), test_utils=tests)


def test_what_is_no_head_is_refused() -> None:
    with pytest.raises(ValueError, match="bits is 8, 6 or 4, got 5"):
        QuantizedHead.from_linear(dense(), 5)
    with pytest.raises(ValueError, match="a head with a bias is not quantized"):
        QuantizedHead.from_linear(nn.Linear(96, 70))
    with pytest.raises(ValueError, match=r"a head of torch.float64 is not quantized"):
        QuantizedHead.from_linear(dense(dtype=torch.float64))
