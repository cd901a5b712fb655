# SPDX-License-Identifier: Apache-2.0
"""The quantizers of training: what latent weights become in the forward pass, and how gradients come back.

Every quantizer works on blocks, a matrix with one row per scale, and gives the value that the layer
multiplies and, for export, the codes and scales that stand for exactly that value. In the formulas
w is a latent weight, w' its value, mean and sum run over a block, and dw is short for dw'/dw.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ternaryforge import _core
from ternaryforge.torch.scale_blocks import ScaleBlocks

Alphabet = Literal["trit", "binary", "four"]

SMALLEST_SCALE = 1e-5
"""No scale is smaller, as in transformers: a matrix of zeros must not divide by zero."""


class PassThrough(torch.autograd.Function):
    """The straight-through estimator: the value of `quantized`, the gradient of `latent`."""

    @staticmethod
    def forward(latent: Tensor, quantized: Tensor) -> Tensor:  # its gradient is what it is for
        """Returns `quantized`."""
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient goes to the latent."""
        return grads[0], None


class RoundThrough(torch.autograd.Function):
    """Rounds half to even; the gradient passes unchanged."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Returns `x` rounded."""
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The gradient as it is."""
        return grads[0]


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(x: Tensor, factor: Tensor | float) -> Tensor:  # for backward
        """Returns `x`."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the factor."""
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient times the factor."""
        return grads[0] * ctx.factor, None


@dataclass(frozen=True, slots=True)
class Codes:
    """What a file stores of blocks: weight = code * scale + shift.

    `codes` is int8 [blocks, size], of the alphabet trit -1, 0, 1; binary -1, 1; four -3, -1, 1, 3.
    `scale` and `shift` are float32 [blocks, 1]; no shift is None.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None = None

    def values(self) -> Tensor:
        """The weights that they stand for."""
        product = self.codes * self.scale
        return product if self.shift is None else product + self.shift


class Quantizer(nn.Module):
    """Latent weights [blocks, size] to the values that a layer multiplies with.

    Subclasses give `forward`, differentiable, and `encode`, with `encode(w).values()` equal to
    `forward(w)` bit by bit once training has reached its hard form.
    """

    alphabet: ClassVar[Alphabet] = "trit"
    has_output_bias: ClassVar[bool] = False

    def __init__(self, blocks: ScaleBlocks) -> None:
        super().__init__()
        self.blocks = blocks

    def initialise(self, weight: Tensor) -> None:
        """Sets what is learned from the latents [blocks, size]; may change them in place. Nothing by default."""

    def encode(self, weight: Tensor) -> Codes:
        """Codes and scales of latents [blocks, size]."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """Straight-through: the value of `encode`, and dw = 1."""
        with torch.no_grad():
            values = self.encode(weight).values()
        return PassThrough.apply(weight, values)

    def output_bias(self, weight: Tensor) -> Tensor:
        """What the quantizer adds to the outputs of the layer, [rows], where `has_output_bias`."""
        raise NotImplementedError

    def hold(self, codes: Codes) -> Tensor:  # noqa: ARG002 # for those that can
        """Latents [blocks, size] that mean these codes and scales; sets what is learned to fit.

        Raises ValueError where a scale follows from the latents in a way that leaves no room for another.
        """
        raise ValueError("scales follow from the latents: absmean, lsq, seq and four_levels hold others")

    def _mean_magnitude(self, weight: Tensor) -> Tensor:
        return self.blocks.mean(weight.abs()).clamp(min=SMALLEST_SCALE)


class Absmean(Quantizer):
    """BitNet b1.58 (arXiv:2402.17764): s = mean|w|, w' = s clip(round(w / s), -1, 1), dw = 1.

    In the arithmetic of transformers' online `AutoBitLinear`, which multiplies by 1 / s and divides by it.
    Latents that are ternary already would shrink, since their mean counts the zeros: preparation
    enlarges them by one over their share of non-zeros, so that their values stay.
    """

    def initialise(self, weight: Tensor) -> None:
        """Enlarges blocks that hold only -v, 0, v."""
        top = weight.abs().amax(1, keepdim=True)
        taken = weight != 0
        baked = ((weight.abs() == top) | ~taken).all(1, keepdim=True) & (top > 0)
        share = self.blocks.mean(taken.to(weight.dtype)).clamp(min=SMALLEST_SCALE)
        weight.div_(torch.where(baked, share, 1.0))

    def encode(self, weight: Tensor) -> Codes:
        """The scale is the reciprocal of the factor that a `bitlinear` checkpoint stores."""
        factor = 1 / self._mean_magnitude(weight)
        codes = (weight * factor).round().clamp(-1, 1)
        return Codes(codes.to(torch.int8), 1 / factor)

    def hold(self, codes: Codes) -> Tensor:
        """Larger than the values by one over the share of non-zeros, whose mean is the scale."""
        taken = (codes.codes != 0).to(codes.scale.dtype)
        return codes.values() / self.blocks.mean(taken).clamp(min=SMALLEST_SCALE)


class TernaryWeightNetwork(Quantizer):
    """TWN (arXiv:1605.04711): d = 0.7 mean|w|, w' = s sign(w) where |w| > d else 0, s = mean|w| of those; dw = 1.

    The threshold follows the latents at every step. `threshold` is its factor.
    """

    def __init__(self, blocks: ScaleBlocks, threshold: float = 0.7) -> None:
        super().__init__(blocks)
        self.threshold = threshold

    def encode(self, weight: Tensor) -> Codes:
        """See the class."""
        taken = weight.abs() > self.threshold * self._mean_magnitude(weight)
        total = (weight.abs() * taken).sum(1, keepdim=True)
        scale = total / taken.sum(1, keepdim=True).clamp(min=1)
        return Codes((weight.sign() * taken).to(torch.int8), scale.clamp(min=SMALLEST_SCALE))


class Binary(Quantizer):
    """Binary weights (arXiv:1603.05279): s = mean|w|, w' = s where w >= 0, else -s; dw = 1."""

    alphabet = "binary"

    def encode(self, weight: Tensor) -> Codes:
        """See the class."""
        return Codes(torch.where(weight >= 0, 1, -1).to(torch.int8), self._mean_magnitude(weight))


class Sherry(Quantizer):
    """Sherry 3:4 (arXiv:2601.07892): of four neighbours the smallest becomes 0, the others their signs.

    s = mean|w| of those kept, w' = s code, dw = 1; 1.25 bits a weight. The paper adds the Arenas
    residual (`QATConfig(residual=True)`). Rows, and groups, must be whole fours.
    """

    def __init__(self, blocks: ScaleBlocks) -> None:
        super().__init__(blocks)
        if blocks.cols % 4 or (blocks.scale == "group" and blocks.group_size % 4):
            raise ValueError(
                f"[qat] sherry keeps three of four neighbours: columns and group_size are multiples of 4, got "
                f"{blocks.cols} columns" + (f", group_size {blocks.group_size}" if blocks.scale == "group" else "")
            )

    def encode(self, weight: Tensor) -> Codes:
        """See the class; the first of equal magnitudes becomes 0."""
        fours = weight.unflatten(1, (-1, 4))
        kept = torch.ones_like(fours).scatter(2, fours.abs().argmin(2, keepdim=True), 0).flatten(1)
        codes = torch.where(weight >= 0, kept, -kept)
        scale = self.blocks.mean(weight.abs() * kept) * (4 / 3)
        return Codes(codes.to(torch.int8), scale.clamp(min=SMALLEST_SCALE))


class Tequila(Absmean):
    """Tequila (arXiv:2509.23809): absmean, and dead weights, those of code 0, become a bias of the outputs.

    y = x w' + lambda sum of the dead w of the row; so a dead weight gets the straight-through
    gradient plus lambda times the gradient of y, and does not stay trapped. The bias does not depend
    on the input, and export stores it. `reactivation` is lambda.
    """

    has_output_bias = True

    def __init__(self, blocks: ScaleBlocks, reactivation: float = 1e-3) -> None:
        super().__init__(blocks)
        self.reactivation = reactivation

    def output_bias(self, weight: Tensor) -> Tensor:
        """Returns lambda times the sum of the dead weights, [rows]."""
        dead = self.encode(weight.detach()).codes == 0
        return self.reactivation * self.blocks.join(weight * dead).sum(1)


class LearnedScale(Quantizer):
    """What quantizers with a learned scale a share: its parameter and its gradient's factor.

    As in LSQ the gradient of a is multiplied by 1 / sqrt(weights of the block), so that a moves at the pace of
    the weights. A scale is |a|, so that a step across zero does not end its block, which would get no gradient.
    """

    def __init__(self, blocks: ScaleBlocks) -> None:
        super().__init__(blocks)
        self.scale = nn.Parameter(torch.ones(blocks.count, 1))

    def initialise(self, weight: Tensor) -> None:
        """The scale whose trits are the least squares best."""
        set_values(self.scale, least_squares_scale(weight))

    def magnitude(self) -> Tensor:
        """The scales, which are positive."""
        return self.scale.abs().clamp(min=SMALLEST_SCALE)

    def _scale(self, weight: Tensor) -> Tensor:
        return ScaleGradient.apply(self.magnitude(), 1 / self.blocks.root_size(weight))


class LearnedStep(LearnedScale):
    """LSQ (arXiv:1902.08153) on three levels: u = w / a, w' = a round(clip(u, -1, 1)).

    dw = 1 where |u| <= 1, else 0; dw'/da = round(u) - u inside, sign(u) outside, over sqrt(weights).
    a starts as the least squares scale.
    """

    def encode(self, weight: Tensor) -> Codes:
        """See the class."""
        scale = self.magnitude().detach()
        return Codes((weight / scale).clamp(-1, 1).round().to(torch.int8), scale)

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        scale = self._scale(weight)
        return RoundThrough.apply((weight / scale).clamp(-1, 1)) * scale

    def hold(self, codes: Codes) -> Tensor:
        """The values themselves."""
        set_values(self.scale, codes.scale)
        return codes.values()


class StretchedElastic(LearnedScale):
    """SEQ (ParetoQ, arXiv:2502.02631) on three levels: w' = a round(1.5 clip(w / a, -c, c)) / 1.5, c = 0.99.

    The clip range falls into three equal parts. dw = 1 where |w / a| <= c, else 0; dw'/da = w' / a - w / a
    inside, w' / a outside, over sqrt(weights). a starts as max|w|.
    """

    clip: ClassVar[float] = 0.99
    parts: ClassVar[float] = 1.5
    offset: ClassVar[float] = 0.0

    def initialise(self, weight: Tensor) -> None:
        """The largest magnitude."""
        set_values(self.scale, weight.abs().amax(1, keepdim=True))

    def encode(self, weight: Tensor) -> Codes:
        """See the class."""
        scale = self.magnitude().detach()
        steps = ((weight / scale).clamp(-self.clip, self.clip) * self.parts - self.offset).round()
        return Codes(steps.to(torch.int8), scale / self.parts)

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        scale = self._scale(weight)
        steps = RoundThrough.apply((weight / scale).clamp(-self.clip, self.clip) * self.parts - self.offset)
        return (steps + self.offset) * (scale / self.parts)

    def hold(self, codes: Codes) -> Tensor:
        """The values themselves; a is as many scales as the range has."""
        set_values(self.scale, codes.scale * (2 * self.parts if self.offset else self.parts))
        return codes.values()


class FourLevels(StretchedElastic):
    """SEQ on four levels (ParetoQ, 2 bits): w' = a (round(2 clip(w / a, -c, c) - 0.5) + 0.5) / 2, c = 0.99.

    So w' / a is -3/4, -1/4, 1/4 or 3/4. Gradients as for three levels. A ternary file cannot hold it.
    """

    alphabet = "four"
    parts = 2.0
    offset = 0.5

    def encode(self, weight: Tensor) -> Codes:
        """Codes -3, -1, 1, 3 and a quarter of a."""
        steps = super().encode(weight).codes
        return Codes(2 * steps + 1, self.magnitude().detach() / 4)


class DualLearnable(LearnedScale):
    """DLT (TernaryLLM, arXiv:2406.07177), scale a and shift g learned: w' = a round(clip((w - g) / a, -1, 1)) + g.

    dw = 1 where |w - g| <= a, else 0; dw'/da as in LSQ of w - g; dw'/dg = 0 inside, 1 outside; both over
    sqrt(weights). g starts as mean(w), a as the least squares scale of w - g.
    """

    def __init__(self, blocks: ScaleBlocks) -> None:
        super().__init__(blocks)
        self.shift = nn.Parameter(torch.zeros(blocks.count, 1))

    def initialise(self, weight: Tensor) -> None:
        """See the class."""
        shift = self.blocks.mean(weight)
        set_values(self.shift, shift)
        filled = self.blocks.split(torch.ones(self.blocks.rows, self.blocks.cols)) == 0
        set_values(self.scale, least_squares_scale((weight - shift).masked_fill(filled, 0)))

    def encode(self, weight: Tensor) -> Codes:
        """See the class."""
        scale, shift = self.magnitude().detach(), self.shift.detach()
        return Codes(((weight - shift) / scale).clamp(-1, 1).round().to(torch.int8), scale, shift)

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        scale = self._scale(weight)
        shift = ScaleGradient.apply(self.shift, 1 / self.blocks.root_size(weight))
        return RoundThrough.apply(((weight - shift) / scale).clamp(-1, 1)) * scale + shift


class AdaptiveScale(LearnedScale):
    """TernaryLM (arXiv:2602.07374): codes by the threshold of TWN, one learned scale: w' = a code(w).

    dw = 1; dw'/da = code. Meant for `scale="tensor"`, one scale a layer. a starts as the scale of TWN.
    """

    def __init__(self, blocks: ScaleBlocks, threshold: float = 0.7) -> None:
        super().__init__(blocks)
        self.threshold = threshold

    def initialise(self, weight: Tensor) -> None:
        """The scale of TWN."""
        set_values(self.scale, TernaryWeightNetwork(self.blocks, self.threshold).encode(weight).scale)

    def encode(self, weight: Tensor) -> Codes:
        """See the class."""
        taken = weight.abs() > self.threshold * self._mean_magnitude(weight)
        scale = self.magnitude().detach()
        return Codes((weight.sign() * taken).to(torch.int8), scale)

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        codes = self.encode(weight.detach()).codes
        return self.magnitude() * codes + PassThrough.apply(weight, torch.zeros_like(weight))


class TanhAnnealing(Quantizer):
    """Ternary-Core's soft start: latents u = clip(w / s, -1.5, 1.5), s = mean|w| at preparation, then constant.

    Soft, while the sharpness b grows from 1 to 8 (`set_sharpness`): w' = s (tanh(b (u - d)) + tanh(b (u + d))) / 2,
    with its own derivative, 0 where u is clipped. Hard, without a sharpness: w' = s sign(u) where |u| > d else 0,
    dw = 1.
    Ternary-Core has d = 0, plain tanh, for binary weights; d = 0.7 makes the same curve end in three
    levels. After each optimizer step `clip_latents` keeps |w| <= 1.2 s.
    """

    limit: ClassVar[float] = 1.5
    sharpness: Tensor | None
    unit: Tensor

    def __init__(self, blocks: ScaleBlocks, threshold: float = 0.7) -> None:
        super().__init__(blocks)
        self.threshold = threshold
        self.register_buffer("unit", torch.ones(blocks.count, 1))
        self.register_buffer("sharpness", None, persistent=False)

    def initialise(self, weight: Tensor) -> None:
        """See the class."""
        set_values(self.unit, self._mean_magnitude(weight))

    def encode(self, weight: Tensor) -> Codes:
        """The hard form."""
        taken = weight.abs() > self.threshold * self.unit
        return Codes((weight.sign() * taken).to(torch.int8), self.unit.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """Soft with a sharpness, else hard."""
        if self.sharpness is None:
            return super().forward(weight)
        u = (weight / self.unit).clamp(-self.limit, self.limit)
        steps = [torch.tanh(self.sharpness * (u + side)) for side in (-self.threshold, self.threshold)]
        return self.unit * (steps[0] + steps[1]) / 2


QUANTIZERS: dict[str, type[Quantizer]] = {
    "absmean": Absmean,
    "twn": TernaryWeightNetwork,
    "lsq": LearnedStep,
    "seq": StretchedElastic,
    "dlt": DualLearnable,
    "tequila": Tequila,
    "sherry": Sherry,
    "tanh": TanhAnnealing,
    "adaptive": AdaptiveScale,
    "four_levels": FourLevels,
    "binary": Binary,
}
"""All quantizers by the name that `QATConfig` takes."""


def make_quantizer(name: str, blocks: ScaleBlocks, **options: Any) -> Quantizer:
    """A quantizer by name. Raises ValueError for an unknown name or option."""
    if name not in QUANTIZERS:
        raise ValueError(f"[qat] quantizer is one of {', '.join(QUANTIZERS)}, got {name!r}")
    try:
        return QUANTIZERS[name](blocks, **options)
    except TypeError as error:
        raise ValueError(f"[qat] quantizer {name!r} does not take the options {options}: {error}") from None


def least_squares_scale(blocks: Tensor) -> Tensor:
    """The scale of the trits nearest to each block in least squares, [blocks, 1]."""
    weights = blocks.detach().to("cpu", torch.float32).contiguous().numpy()
    _, scales = _core.quant.quantize_weights(
        weights, scheme="ls", scale="row", threads=_core.parallel.default_threads()
    )
    return torch.from_numpy(scales).reshape(-1, 1).to(blocks.device).clamp(min=SMALLEST_SCALE)


def set_values(tensor: Tensor, values: Tensor) -> None:
    """Writes values into a parameter or buffer."""
    with torch.no_grad():
        tensor.copy_(values)
