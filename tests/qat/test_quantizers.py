# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of every quantizer against NumPy, under every kind of scale, ragged groups included."""

import numpy as np
import pytest
from numpy_quantizers import WITNESSES, tanh_soft
from torch_setup import torch

from ternaryforge.torch import QUANTIZERS, Codes
from ternaryforge.torch.quantizers import make_quantizer
from ternaryforge.torch.scale_blocks import ScaleBlocks

ROWS, COLS, GROUP = 6, 44, 16  # the last group has 12 columns
SCALES = ("tensor", "row", "group")


def latents(seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((ROWS, COLS)) * 0.3 + 0.02).astype(np.float32)


def blocks_of(matrix: np.ndarray, scale: str) -> list[np.ndarray]:
    """The blocks as views, in the order of their scales."""
    if scale == "tensor":
        return [matrix.reshape(-1)]
    if scale == "row":
        return list(matrix)
    return [row[start : start + GROUP] for row in matrix for start in range(0, COLS, GROUP)]


def prepared(name: str, scale: str, weight: np.ndarray) -> tuple[ScaleBlocks, torch.nn.Module, torch.Tensor]:
    blocks = ScaleBlocks(ROWS, COLS, scale, GROUP)
    quantizer = make_quantizer(name, blocks)
    latent = torch.tensor(weight)
    with torch.no_grad():
        split = blocks.split(latent.clone())
        quantizer.initialise(split)
    return blocks, quantizer, latent.requires_grad_()


def learned_values(quantizer: torch.nn.Module, block: int) -> dict[str, float]:
    return {name: tensor[block].item() for name, tensor in quantizer.state_dict().items()}


def assert_agrees(blocks: ScaleBlocks, quantizer: torch.nn.Module, latent: torch.Tensor, scale: str, witness) -> None:
    values = blocks.join(quantizer(blocks.split(latent)))
    upstream = np.random.default_rng(1).standard_normal((ROWS, COLS)).astype(np.float32)
    (values * torch.tensor(upstream)).sum().backward()
    got = [blocks_of(t.detach().numpy(), scale) for t in (latent, values, latent.grad)]
    for i, (w, value, grad) in enumerate(zip(*got, strict=True)):
        g = blocks_of(upstream, scale)[i].astype(np.float64)
        expected, expected_grad, learned = witness(w.astype(np.float64), g, learned_values(quantizer, i))
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)
        for name, expected_learned in learned.items():
            actual = getattr(quantizer, name).grad[i].item()
            np.testing.assert_allclose(actual, expected_learned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_value_and_gradient(name: str, scale: str) -> None:
    blocks, quantizer, latent = prepared(name, scale, latents())
    with torch.no_grad():
        for parameter in quantizer.parameters():  # away from the start, where some gradients vanish
            parameter.mul_(0.8).add_(0.01)
    assert_agrees(blocks, quantizer, latent, scale, WITNESSES[name])


@pytest.mark.parametrize("scale", SCALES)
def test_soft_form_of_tanh(scale: str) -> None:
    blocks, quantizer, latent = prepared("tanh", scale, 2 * latents())
    quantizer.sharpness = torch.tensor(3.0)
    assert_agrees(blocks, quantizer, latent, scale, tanh_soft)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_codes_stand_for_the_values(name: str, scale: str) -> None:
    blocks, quantizer, latent = prepared(name, scale, latents(2))
    codes = quantizer.encode(blocks.split(latent.detach()))
    assert codes.scale.shape == (blocks.count, 1)
    assert torch.equal(blocks.join(codes.values()), blocks.join(quantizer(blocks.split(latent))).detach())
    alphabet = {"trit": {-1, 0, 1}, "binary": {-1, 1}, "four": {-3, -1, 1, 3}}[quantizer.alphabet]
    assert set(blocks.join(codes.codes).unique().tolist()) == alphabet


def test_dead_weights_of_tequila_become_a_bias() -> None:
    blocks, quantizer, latent = prepared("tequila", "group", latents())
    dead = quantizer.encode(blocks.split(latent.detach())).codes == 0
    dead = blocks.join(dead).numpy()
    bias = quantizer.output_bias(blocks.split(latent))
    bias.sum().backward()
    np.testing.assert_allclose(bias.detach().numpy(), 1e-3 * (latents() * dead).sum(1), rtol=1e-5)
    np.testing.assert_allclose(latent.grad.numpy(), 1e-3 * dead, rtol=1e-6)


def test_sherry_keeps_three_of_four() -> None:
    blocks, quantizer, latent = prepared("sherry", "row", latents())
    codes = quantizer.encode(blocks.split(latent.detach())).codes.reshape(-1, 4)
    assert ((codes != 0).sum(1) == 3).all()
    with pytest.raises(ValueError, match="multiples of 4, got 42 columns"):
        make_quantizer("sherry", ScaleBlocks(4, 42))


@pytest.mark.parametrize("scale", SCALES)
def test_absmean_keeps_weights_that_are_ternary_already(scale: str) -> None:
    trits = np.random.default_rng(3).integers(-1, 2, (ROWS, COLS)).astype(np.float32)
    blocks = ScaleBlocks(ROWS, COLS, scale, GROUP)
    quantizer = make_quantizer("absmean", blocks)
    split = blocks.split(torch.tensor(trits * 0.25))
    quantizer.initialise(split)
    np.testing.assert_allclose(blocks.join(quantizer(split)).numpy(), trits * 0.25, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_zeros_give_finite_values_and_gradients(name: str) -> None:
    blocks, quantizer, latent = prepared(name, "group", np.zeros((ROWS, COLS), np.float32))
    values = blocks.join(quantizer(blocks.split(latent)))
    values.sum().backward()
    assert values.abs().max() <= 1e-5
    assert torch.isfinite(latent.grad).all()


@pytest.mark.parametrize("name", ["lsq", "seq", "dlt", "adaptive", "four_levels"])
def test_a_scale_that_crossed_zero_goes_on_learning(name: str) -> None:
    seen = []
    for sign in (1, -1):
        blocks, quantizer, latent = prepared(name, "group", latents())
        quantizer.scale.data.mul_(sign)
        values = blocks.join(quantizer(blocks.split(latent)))
        (values * torch.linspace(-1, 1, COLS)).sum().backward()
        assert torch.equal(blocks.join(quantizer.encode(blocks.split(latent.detach())).values()), values)
        seen.append((values, latent.grad, quantizer.scale.grad * sign))
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    assert seen[0][2].abs().min() > 0


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quantizer is one of absmean, .*, got 'abs'"):
        make_quantizer("abs", ScaleBlocks(4, 4))
    with pytest.raises(ValueError, match="does not take the options"):
        make_quantizer("absmean", ScaleBlocks(4, 4), threshold=0.5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["absmean", "lsq", "seq", "four_levels"])
def test_latents_can_hold_any_scale(name: str, scale: str) -> None:
    blocks, quantizer, latent = prepared(name, scale, latents())
    codes = quantizer.encode(blocks.split(latent.detach()))
    wanted = Codes(codes.codes, codes.scale * torch.linspace(0.5, 1.7, blocks.count)[:, None])
    held = quantizer.encode(quantizer.hold(wanted))
    assert torch.equal(held.codes, wanted.codes)
    torch.testing.assert_close(held.scale, wanted.scale)
    with pytest.raises(ValueError, match="scales follow from the latents"):
        make_quantizer("twn", blocks).hold(wanted)
