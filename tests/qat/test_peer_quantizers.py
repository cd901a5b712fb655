# SPDX-License-Identifier: Apache-2.0
"""Other projects' quantizers against NumPy written from their code, and those of ours that are the same."""

import sys
from pathlib import Path

import numpy as np
import pytest
from torch_setup import torch

from ternaryforge.torch import QATConfig, prepare_qat
from ternaryforge.torch.qat import quantize_activations
from ternaryforge.torch.quantizers import make_quantizer
from ternaryforge.torch.scale_blocks import ScaleBlocks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from peer_quantizers import PEERS, attach_extras

ROWS, COLS, GROUP = 6, 32, 16
RANDOM = np.random.default_rng(0)
W = (RANDOM.standard_normal((ROWS, COLS)) * 0.3 + 0.02).astype(np.float32)
G = RANDOM.standard_normal((ROWS, COLS)).astype(np.float32)
X = RANDOM.standard_normal((5, COLS)).astype(np.float32)
GY = RANDOM.standard_normal((5, ROWS)).astype(np.float32)


def of_block(name, w, g, a, total):
    """Values, gradient of the weights, of the scale and of the shift, by what the peer's code computes."""
    u = w / a
    if name == "peer_pareto_seq":
        levels, inside = np.rint(np.clip(u, -0.99, 0.99) * 1.5) / 1.5, np.abs(u) <= 0.99
    else:
        levels, inside = np.clip(np.rint(u), -1, 1), np.abs(u) <= 1
    if name == "peer_angel_lsq":
        return a * levels, g, (g * (levels - u)).sum(), None
    small, big = u < 0, u > 0
    slope = np.where(inside, levels - u, np.where(big, 1.0, 0.0) - np.where(small, 1.0, 0.0))
    shifted = name == "peer_angel_dlt"
    return a * levels + 0.1 * shifted, g * inside, (g * slope).sum() / total**0.5, g.sum() if shifted else None


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
@pytest.mark.parametrize("name", ["peer_pareto_seq", "peer_pareto_lsq", "peer_angel_dlt", "peer_angel_lsq"])
def test_learned_scales(name: str, scale: str) -> None:
    blocks = ScaleBlocks(ROWS, COLS, scale, GROUP)
    quantizer = PEERS[name](blocks)
    latent = torch.tensor(W, requires_grad=True)
    quantizer.initialise(blocks.split(latent.detach()))
    cut = blocks.split(torch.tensor(W)).numpy().astype(np.float64)
    start = np.ones(len(cut)) if name == "peer_angel_lsq" else np.abs(cut).max(1)
    np.testing.assert_allclose(quantizer.scale.detach().numpy()[:, 0], start, rtol=1e-6)
    quantizer.scale.data.mul_(0.6)
    if name == "peer_angel_dlt":
        quantizer.shift.data.fill_(0.1)
    values = quantizer(blocks.split(latent))
    (blocks.join(values) * torch.tensor(G)).sum().backward()
    assert torch.equal(values.detach(), quantizer.encode(blocks.split(latent.detach())).values())
    upstream = blocks.split(torch.tensor(G)).numpy().astype(np.float64)
    grads = blocks.split(latent.grad).numpy()
    for i, (w, g) in enumerate(zip(cut, upstream, strict=True)):
        value, grad, scale_grad, shift_grad = of_block(name, w, g, 0.6 * start[i], ROWS * COLS)
        np.testing.assert_allclose(values.detach().numpy()[i], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grads[i], grad, atol=1e-6)
        np.testing.assert_allclose(quantizer.scale.grad[i].item(), scale_grad, rtol=1e-4, atol=1e-5)
        if shift_grad is not None:
            np.testing.assert_allclose(quantizer.shift.grad[i].item(), shift_grad, rtol=1e-4, atol=1e-5)


def layer(name: str, monkeypatch: pytest.MonkeyPatch):
    for peer, kind in PEERS.items():
        monkeypatch.setitem(sys.modules["ternaryforge.torch.quantizers"].QUANTIZERS, peer, kind)
    model = torch.nn.Sequential(torch.nn.Linear(COLS, 8, bias=False))
    model[0].weight.data.copy_(torch.tensor(np.vstack([W, W[:2]])))
    prepare_qat(model, QATConfig(quantizer=name, scale="group", group_size=GROUP, activation_bits=None))
    attach_extras(model)
    x = torch.tensor(X, requires_grad=True)
    y = model(x)
    (y[:, :ROWS] * torch.tensor(GY)).sum().backward()
    return model[0], y.detach().numpy()[:, :ROWS], model[0].weight.grad.numpy()[:ROWS], x.grad.numpy()


def parts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ternary values, scales spread over weights, and which weights are dead."""
    groups = W.reshape(-1, GROUP).astype(np.float64)
    s = np.abs(groups).mean(1, keepdims=True) + 0 * groups
    values = np.where(groups >= s / 2, s, np.where(groups <= -s / 2, -s, 0)).reshape(W.shape)
    return values, s.reshape(W.shape), values == 0


def test_the_first_tequila_multiplies_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    values, _, dead = parts()
    b = np.where(dead, np.where(W >= 0, 1e-5, -1e-5), 0)
    _, y, grad, x_grad = layer("peer_angel_tequila_1", monkeypatch)
    np.testing.assert_allclose(y, X @ values.T + np.sign(X) @ b.T, atol=1e-5)
    np.testing.assert_allclose(grad, GY.T @ X + (GY.T @ np.sign(X)) * dead, atol=1e-4)
    np.testing.assert_allclose(x_grad, GY @ values, atol=1e-5)


def test_the_third_tequila_learns_its_mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, s, dead = parts()
    made, y, grad, _ = layer("peer_angel_tequila_3", monkeypatch)
    mixing = made.quantizer.mixing.detach().numpy()[:ROWS].astype(np.float64)
    b = W * dead
    np.testing.assert_allclose(y, X @ values.T + (mixing * b).sum(1), atol=1e-5)
    bias_grad = mixing * GY.sum(0)[:, None]
    np.testing.assert_allclose(grad, np.where(dead, bias_grad, s * (GY.T @ X)), atol=1e-4)
    products, sums = X @ b.T, (mixing * b).sum(1)
    # d/dl of the sum over outputs and mean over tokens of (x b - sum l b)^2
    expected = np.stack([(-2 * (products[:, r] - sums[r])).mean() * b[r] for r in range(ROWS)])
    np.testing.assert_allclose(made.quantizer.mixing.grad.numpy()[:ROWS], expected, atol=1e-5)


def ours(name: str, scale: str, **options: float):
    """Value, gradient and output bias of one of our quantizers, in groups where asked."""
    blocks = ScaleBlocks(ROWS, COLS, scale, GROUP)
    quantizer = make_quantizer(name, blocks, **options)
    latent = torch.tensor(W, requires_grad=True)
    values = blocks.join(quantizer(blocks.split(latent)))
    loss = (values * torch.tensor(G)).sum()
    if quantizer.has_output_bias:
        loss = loss + (quantizer.output_bias(blocks.split(latent)) * torch.tensor(GY.sum(0))).sum()
    loss.backward()
    return values.detach().numpy(), latent.grad.numpy()


def test_tequila_and_absmean_of_angelslim_are_ours() -> None:
    values, _, dead = parts()
    got, grad = ours("tequila", "group")
    np.testing.assert_allclose(got, values, rtol=1e-6)
    np.testing.assert_allclose(grad, G + 1e-3 * GY.sum(0)[:, None] * dead, rtol=1e-5)
    got, grad = ours("absmean", "group")
    np.testing.assert_allclose(got, values, rtol=1e-6)
    np.testing.assert_array_equal(grad, G)


def test_twn_and_sherry_of_angelslim_are_ours() -> None:
    groups = W.reshape(-1, GROUP).astype(np.float64)
    codes = np.sign(groups) * (np.abs(groups) >= 0.75 * np.abs(groups).mean(1, keepdims=True))
    scale = (groups * codes).sum(1, keepdims=True) / np.abs(codes).sum(1, keepdims=True)
    got, grad = ours("twn", "group", threshold=0.75)
    np.testing.assert_allclose(got, (codes * scale).reshape(W.shape), rtol=1e-5)
    np.testing.assert_array_equal(grad, G)
    kept = groups.reshape(-1, GROUP // 4, 4)
    kept = np.where(np.argsort(np.argsort(np.abs(kept), -1), -1) > 0, kept, 0).reshape(groups.shape)
    expected = np.sign(kept) * np.abs(kept).sum(1, keepdims=True) / (GROUP / 4 * 3)
    got, grad = ours("sherry", "group")
    np.testing.assert_allclose(got, expected.reshape(W.shape), rtol=1e-5)
    np.testing.assert_array_equal(grad, G)


def test_onebitllms_is_absmean_with_int8_inputs() -> None:
    factor = 1 / max(np.abs(W.astype(np.float64)).mean(), 1e-5)
    got, grad = ours("absmean", "tensor")
    np.testing.assert_allclose(got, np.clip(np.floor(W * factor + 0.5), -1, 1) / factor, rtol=1e-5)
    np.testing.assert_array_equal(grad, G)
    factor = 127 / np.maximum(np.abs(X).max(1, keepdims=True), 1e-5)
    x = torch.tensor(X, requires_grad=True)
    rounded = quantize_activations(x)
    np.testing.assert_allclose(
        rounded.detach().numpy(), np.clip(np.floor(X * factor + 0.5), -128, 127) / factor, rtol=1e-6
    )
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_the_step_of_paretoq_is_lsq_with_one_scale() -> None:
    blocks = ScaleBlocks(ROWS, COLS)
    results = []
    for quantizer in (PEERS["peer_pareto_lsq"](blocks), make_quantizer("lsq", blocks)):
        quantizer.scale.data.fill_(0.25)
        latent = torch.tensor(W, requires_grad=True)
        values = blocks.join(quantizer(blocks.split(latent)))
        (values * torch.tensor(G)).sum().backward()
        results.append((values.detach(), latent.grad, quantizer.scale.grad))
    assert all(torch.allclose(theirs, mine, rtol=1e-5) for theirs, mine in zip(*results, strict=True))
