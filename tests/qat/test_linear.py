# SPDX-License-Identifier: Apache-2.0
"""`TernaryLinear` and its operator: values, gradients, compilation, autocast, copies, refusals."""

import copy
import importlib
import io
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from torch_setup import torch

from ternaryforge import FormatError
from ternaryforge.torch import QATConfig, TernaryLinear, ops, optimize_layers, prepare_qat, set_strength
from ternaryforge.torch.linear import multiply

nn = torch.nn
SCALES = {"tensor": 0, "row": 0, "group": 64}


def made(
    scale: str = "tensor", rows: int = 24, cols: int = 150, *, bias: bool = False, int8: bool = True
) -> tuple[TernaryLinear, np.ndarray]:
    """A layer and its dense weight in float64."""
    rng = np.random.default_rng(rows + cols)
    trits = rng.integers(-1, 2, (rows, cols)).astype(np.int8)
    shape = {"tensor": (1,), "row": (rows,), "group": (rows, -(-cols // 64))}[scale]
    scales = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    spread = np.repeat(scales, 64, axis=1)[:, :cols] if scale == "group" else scales.reshape(-1, 1)
    layer = TernaryLinear.from_trits(
        torch.tensor(trits),
        torch.tensor(scales),
        torch.linspace(-1, 1, rows) if bias else None,
        group_size=SCALES[scale],
        activation_bits=8 if int8 else None,
    )
    return layer, trits * spread.astype(np.float64)


def rounded(x: np.ndarray) -> np.ndarray:
    scale = 127 / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    return np.rint(x * scale) / scale


@pytest.mark.parametrize("shape", [(150,), (1, 150), (7, 150), (2, 3, 150), (0, 150)])
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("scale", SCALES)
def test_value_and_input_gradient(scale: str, int8: bool, shape: tuple[int, ...]) -> None:
    layer, dense = made(scale, bias=True, int8=int8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    inputs = x.detach().numpy()
    expected = (rounded(inputs) if int8 and inputs.size else inputs) @ dense.T + np.linspace(-1, 1, 24)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(upstream)
    np.testing.assert_allclose(x.grad.numpy(), upstream.numpy() @ dense, rtol=1e-4, atol=1e-4)


def test_bias_of_an_adapter_gets_its_gradient() -> None:
    layer, _ = made(bias=True)
    layer.bias.requires_grad_(True)
    layer(torch.randn(3, 2, 150)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((24,), 6.0))
    assert layer.weight.grad is None


def test_half_precision_in_and_out() -> None:
    layer, _ = made("row", bias=True)
    x = torch.randn(5, 150)
    expected = layer(x.bfloat16().float())
    got = layer(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() <= 0.01 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        under = layer(x)
    assert under.dtype == torch.bfloat16
    before = layer.scales().clone()
    assert torch.equal(layer.to(torch.bfloat16).scales(), before)


@pytest.mark.parametrize("scale", SCALES)
def test_the_operator_keeps_pytorchs_rules(scale: str) -> None:
    layers = [made(scale, rows)[0] for rows in (24, 40)]
    x = torch.randn(2, 150, requires_grad=True)
    weights, scales = [layer.weight for layer in layers], [layer.scale_bits for layer in layers]
    args = (x, weights, scales, [24, 40], 150, layers[0].group_size, 8)
    # The registration test compares with `dispatch`, where only Python's autograd key counts.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(torch.ops.ternaryforge.linears.default, args, test_utils=tests)


def test_gradients_of_layers_multiplied_together_add_up() -> None:
    layers = [made("row", rows)[0] for rows in (24, 40)]
    together, apart = (torch.linspace(-1, 1, 300).view(2, 150).requires_grad_(True) for _ in range(2))
    products = multiply(layers, together)
    sum((product * torch.arange(product.shape[1])).sum() for product in products).backward()
    for layer in layers:
        (multiply([layer], apart)[0] * torch.arange(layer.out_features)).sum().backward()
    assert torch.allclose(together.grad, apart.grad, rtol=1e-5)
    products = multiply(layers, together)
    (of_one,) = torch.autograd.grad(products[1].sum(), together)
    assert torch.allclose(of_one, torch.autograd.grad(multiply([layers[1]], apart)[0].sum(), apart)[0], rtol=1e-5)


def test_it_compiles_into_one_graph() -> None:
    first, _ = made()
    second, _ = made(rows=16, cols=24, int8=False)
    model = nn.Sequential(first, nn.ReLU(), second)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 4):
        x = torch.randn(tokens, 150, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        grad, x.grad = x.grad, None
        model(x).sum().backward()
        assert torch.equal(y, model(x))
        assert torch.allclose(grad, x.grad)
    program = torch.export.export(model, (torch.randn(3, 150),))
    x = torch.randn(3, 150)
    assert torch.equal(program.module()(x), model(x))


def test_copies_and_state_dict_are_exact() -> None:
    for convention in ("divide", "multiply"):
        layer, dense = made()
        layer.convention = convention
        x = torch.randn(2, 150)
        state = layer.state_dict()
        assert state["weight"].shape == (6, 150)
        stored = state["weight_scale"].item()
        assert (1 / stored if convention == "divide" else stored) == pytest.approx(np.abs(dense).max(), rel=1e-6)
        other = TernaryLinear.from_packed(torch.zeros(6, 150, dtype=torch.uint8), torch.ones(1), convention=convention)
        other.load_state_dict(state)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=False)
        for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved):  # noqa: S301 # its own
            assert torch.allclose(copied(x), layer(x), rtol=1e-6, atol=0)
            assert torch.equal(copied.trits(), layer.trits())
            assert copied.state_dict().keys() == state.keys()


def test_two_threads_at_once() -> None:
    layer, _ = made(rows=64, cols=256)
    x = torch.randn(3, 256)
    expected = layer(x)
    wrong = []

    def work() -> None:
        wrong.extend(1 for _ in range(50) if not torch.equal(layer(x), expected))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("quantizer", ["absmean", "lsq", "tequila"])
def test_a_trained_model_moves_to_the_core(quantizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 24), nn.ReLU(), nn.Linear(24, 8, bias=False))
    scale = "tensor" if quantizer == "absmean" else "group"
    prepare_qat(model, QATConfig(quantizer=quantizer, scale=scale, group_size=64))
    x = torch.randn(4, 150)
    expected = model(x)
    set_strength(model, 0.5)
    with pytest.raises(ValueError, match="'0' is blended"):
        optimize_layers(model)
    set_strength(model, None)
    assert optimize_layers(model) == ["0", "2"]
    assert type(model[2]) is TernaryLinear
    assert torch.allclose(model(x), expected, atol=2e-2 * expected.abs().max().item())
    assert torch.allclose(model[0](x), expected_first(x, quantizer, scale), atol=1e-4)
    assert optimize_layers(model) == []


def expected_first(x: torch.Tensor, quantizer: str, scale: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 24), nn.ReLU(), nn.Linear(24, 8, bias=False))
    return prepare_qat(model, QATConfig(quantizer=quantizer, scale=scale, group_size=64))[0](x)


def test_what_does_not_fit_is_refused() -> None:
    layer, _ = made()
    with pytest.raises(ValueError, match=r"x is a float tensor \[..., 150\], got torch.float64"):
        layer(torch.randn(2, 150, dtype=torch.float64))
    args = ([layer.weight], [layer.scale_bits], [24], 150, 0, 8)
    with pytest.raises(ValueError, match=r"x is a float tensor \[..., 150\]"):
        torch.ops.ternaryforge.linears(torch.randn(2, 140), *args)
    with pytest.raises(ValueError, match="weight is 1280 contiguous bytes"):
        ops.linears(torch.randn(2, 150), [layer.weight[:-1]], [layer.scale_bits], [24])
    with pytest.raises(ValueError, match="scale_bits is int32 with 1 or 24 elements"):
        ops.linears(torch.randn(2, 150), [layer.weight], [torch.zeros(3, dtype=torch.int32)], [24])
    packed = torch.zeros(6, 150, dtype=torch.uint8)
    with pytest.raises(FormatError, match="a code is 3"):
        TernaryLinear.from_packed(packed + 255, torch.ones(1))
    with pytest.raises(ValueError, match=r"scales are \(1,\) or \(24,\), got \(7,\)"):
        TernaryLinear.from_packed(packed, torch.ones(7))
    with pytest.raises(ValueError, match="a scale is not finite"):
        TernaryLinear.from_packed(packed, torch.zeros(1), convention="divide")
    with pytest.raises(ValueError, match="packed codes are uint8"):
        TernaryLinear.from_packed(packed.float(), torch.ones(1))
    four = nn.Sequential(nn.Linear(8, 8))
    prepare_qat(four, QATConfig(quantizer="four_levels"))
    with pytest.raises(ValueError, match="'four_levels' is not ternary"):
        optimize_layers(four)


def test_importing_twice_is_harmless() -> None:
    layer, _ = made()
    x = torch.randn(1, 150)
    before = layer(x)
    importlib.reload(ops)
    assert torch.equal(layer(x), before)


def test_either_order_of_import_works() -> None:
    work = (
        "import torch; from ternaryforge.torch import TernaryLinear as T;"
        "l = T.from_trits(torch.ones(8, 16, dtype=torch.int8), torch.ones(1));"
        "print(l(torch.ones(1, 16)).sum().item())"
    )
    code = f"import ternaryforge._core; {work}"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert float(result.stdout) == pytest.approx(128, rel=1e-5)
