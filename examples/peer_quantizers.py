# SPDX-License-Identifier: Apache-2.0
"""Other projects' quantizers as their released code computes them, for `compare_quantizers.py`.

Written from the formulas in their code, none of it copied. What is the same as one of ours needs no class here;
`tests/qat/test_peer_quantizers.py` holds those equal, in value and gradient:

- onebitllms 0.0.4 is `absmean`, one scale a tensor, int8 inputs (it rounds halves up, we to even).
- AngelSlim's Tequila (branch `tequila`, `ultraquantv2`, which its script trains) is `tequila`; its `absmean` ours.
- AngelSlim's `twn` is `twn` with the threshold 0.75; its `sherry` is ours with the Arenas residual over all steps.
- ParetoQ's LSQ form with one scale a tensor is `lsq`, but for where the scale starts.

AngelSlim cuts the flat matrix into groups, so they cross rows where a row is no multiple of them; here a row's last
group is shorter, which can only help it. Arenas counts its steps from 1, ours from 0.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ternaryforge.torch import QUANTIZERS, Codes, Quantizer, qat_layers
from ternaryforge.torch.scale_blocks import ScaleBlocks


class GivenSlopes(torch.autograd.Function):
    """A value, and the slopes of a peer's own backward pass: by weight, by scale and by shift of a block."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Weights, scale, shift or None, the value to return, and its slopes by weight and by scale."""
        _, _, shift, value, *slopes = inputs
        ctx.shifted = shift is not None
        ctx.save_for_backward(*slopes)
        return cast("Tensor", value.view_as(value))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of weight, scale and shift; the shift's slope is 1."""
        per_weight, per_scale = ctx.saved_tensors
        shift = grads[0].sum(1, keepdim=True) if ctx.shifted else None
        return grads[0] * per_weight, (grads[0] * per_scale).sum(1, keepdim=True), shift, None, None, None


class PeerScale(Quantizer):
    """Codes of w / a with a learned scale a, that subclasses quantize and whose slopes they give."""

    smallest: ClassVar[float] = 1e-5
    shift: nn.Parameter | None

    def __init__(self, blocks: ScaleBlocks) -> None:
        super().__init__(blocks)
        self.scale = nn.Parameter(torch.ones(blocks.count, 1))
        self.register_parameter("shift", None)

    def codes(self, u: Tensor) -> tuple[Tensor, float]:
        """Codes of u = w / a, and what one step of them is worth in a."""
        return u.round().clamp(-1, 1), 1.0

    def slopes(self, u: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """dw'/dw and dw'/da, given u = w / a and levels = w' / a."""
        raise NotImplementedError

    def encode(self, weight: Tensor) -> Codes:
        """Codes, scale and shift as they are multiplied."""
        scale = self.scale.detach().clamp(min=self.smallest)
        codes, step = self.codes(weight / scale)
        return Codes(codes.to(torch.int8), scale * step, None if self.shift is None else self.shift.detach())

    def forward(self, weight: Tensor) -> Tensor:
        """The value of `encode` with the peer's slopes."""
        with torch.no_grad():
            u = weight / self.scale.clamp(min=self.smallest)
            codes, step = self.codes(u)
            slopes = self.slopes(u, codes * step)
            value = self.encode(weight).values()
        return GivenSlopes.apply(weight, self.scale, self.shift, value, *slopes)


class ParetoStep(PeerScale):
    """ParetoQ, `LsqBinaryTernaryExtension` on three levels: a starts as max|w|, its gradient over sqrt(all weights).

    w' = a clip(round(w / a), -1, 1); dw = 1 where |w / a| <= 1, else 0; da = round(u) - u inside, sign(u) outside.
    AngelSlim's branch `sherry` has the same as its LSQ.
    """

    clip: ClassVar[float] = 1.0

    def initialise(self, weight: Tensor) -> None:
        """The largest magnitude."""
        self.scale.data.copy_(weight.abs().amax(1, keepdim=True))

    def slopes(self, u: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        inside = u.abs() <= self.clip
        factor = float(self.blocks.rows * self.blocks.cols) ** -0.5
        return inside.to(u.dtype), torch.where(inside, levels - u, u.sign()) * factor


class ParetoStretched(ParetoStep):
    """ParetoQ, `StretchedElasticQuant` on three levels, as its linear layer has it for 1.58 bits.

    w' = a round(1.5 clip(w / a, -0.99, 0.99)) / 1.5. Outside the clip range da is sign(u), though w' is 2/3 a there:
    its code takes (levels - shift) / levels = 1 for the largest value. Ours takes 2/3.
    """

    clip = 0.99

    def codes(self, u: Tensor) -> tuple[Tensor, float]:
        """See the class."""
        return (u.clamp(-self.clip, self.clip) * 1.5).round(), 1 / 1.5


class AngelShift(ParetoStep):
    """AngelSlim's DLT (branch `sherry`): `ParetoStep` plus a learned shift g, w' = a clip(round(w / a), -1, 1) + g.

    The codes do not see the shift, whose gradient is a plain sum. Its code leaves g unset at the start; here it is 0.
    """

    def __init__(self, blocks: ScaleBlocks) -> None:
        super().__init__(blocks)
        self.shift = nn.Parameter(torch.zeros(blocks.count, 1))


class AngelStep(PeerScale):
    """AngelSlim's LSQ (branch `main`, `special_quantizer`): a starts as 1, whatever the weights are.

    w' = a clip(round(w / a), -1, 1), rounding and clipping both straight-through: dw = 1 and da = w' / a - w / a, for
    every weight.
    """

    smallest = 1e-6

    def slopes(self, u: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return torch.ones_like(u), levels - u


class AngelTernary(Quantizer):
    """AngelSlim's ternary part: s = mean|w|, w' = s sign(w) where |w| >= s / 2, else 0; dw = 1."""

    def encode(self, weight: Tensor) -> Codes:
        """See the class."""
        scale = self.blocks.mean(weight.abs())
        return Codes((weight.sign() * (weight.abs() >= scale / 2)).to(torch.int8), scale)

    def dead(self, weight: Tensor) -> Tensor:
        """The weights of code 0 in a matrix [rows, cols], 1 or 0."""
        blocks = self.blocks
        return (blocks.join(self.encode(blocks.split(weight.detach().float())).codes) == 0).to(weight.dtype)


class AngelSigned(AngelTernary):
    """AngelSlim's first Tequila (`ultraquant`): y = x w' + sign(x) b, b = 1e-5 sign(w) of the dead weights.

    A dead weight gets the gradient of its w' plus that of its b, unscaled. The input gets none through its sign.
    """

    strength: ClassVar[float] = 1e-5

    def with_extra(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """The outputs with the second product."""
        latent = layer.weight
        sign = torch.where(latent.detach() >= 0, self.strength, -self.strength)
        through = sign + latent - latent.detach()
        return output + F.linear(x.detach().sign(), through * self.dead(latent))


class AngelMixed(AngelTernary):
    """AngelSlim's third Tequila (`ultraquantv3`): every dead weight w enters a bias of the outputs as l w.

    l starts as 0.01 N(0, 1) and follows the regression of the dead part's product: the gradient of
    mean over tokens of |x b - sum l b|^2. dw = s for live weights; dead ones get only the bias's gradient, l dy.
    """

    def __init__(self, blocks: ScaleBlocks) -> None:
        super().__init__(blocks)
        self.mixing = nn.Parameter(0.01 * torch.randn(blocks.rows, blocks.cols))

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        with torch.no_grad():
            codes = self.encode(weight)
            live = (codes.codes != 0) * codes.scale
        return GivenSlopes.apply(weight, codes.scale, None, codes.values(), live, torch.zeros_like(live))

    def with_extra(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """The outputs with the bias; sets the gradient of l, which the loss does not reach."""
        dead = layer.weight * self.dead(layer.weight)
        if layer.training and torch.is_grad_enabled():
            with torch.no_grad():
                miss = (self.mixing * dead).sum(1) - dead @ x.reshape(-1, x.shape[-1]).mean(0)
                self.mixing.grad = 2 * miss[:, None] * dead
        return output + (dead * self.mixing.detach()).sum(1)


PEERS: dict[str, type[Quantizer]] = {
    "peer_pareto_seq": ParetoStretched,
    "peer_pareto_lsq": ParetoStep,
    "peer_angel_dlt": AngelShift,
    "peer_angel_lsq": AngelStep,
    "peer_angel_tequila_1": AngelSigned,
    "peer_angel_tequila_3": AngelMixed,
}


def register_peers() -> None:
    """Makes the peers' quantizers known to `QATConfig`, for this process."""
    QUANTIZERS.update(PEERS)


def attach_extras(model: nn.Module) -> None:
    """Lets the layers of a prepared model add what a peer's quantizer computes from their inputs."""

    def add(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return cast("Tensor", layer.quantizer.with_extra(layer, inputs[0], output))

    for _, layer in qat_layers(model):
        if hasattr(layer.quantizer, "with_extra"):
            layer.register_forward_hook(add)
