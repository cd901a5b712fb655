# SPDX-License-Identifier: Apache-2.0
"""Calibration layer by layer: a full-precision and a partly quantised model walk through the same text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.calibration_linear import Float32, Float64

Tap = Literal["query", "output", "up", "down"]
STAGES: tuple[tuple[Tap, tuple[str, ...]], ...] = (
    ("query", ("query", "key", "value")),
    ("output", ("output",)),
    ("up", ("gate", "up")),
    ("down", ("down",)),
)
"""The inputs of a layer in the order in which they are reached, and the linear layers that see each."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a linear layer is fitted to, beside its own output for the input that it sees.

    `propagation`: the share of the error of its input that it makes up for, so that its output is
    the one of full precision (QEP, arXiv 2504.09629). `residual`: the share of the error in the
    residual stream that the layers which add to the stream (output, down) take away.
    """

    propagation: float
    residual: float

    def check(self) -> None:
        """Raises ValueError for shares outside of 0 to 1."""
        for name, share in (("propagation", self.propagation), ("residual", self.residual)):
            if not 0 <= share <= 1:
                raise ValueError(f"[calibrate] {name} lies between 0 and 1, got {share}")


class BlockWalk:
    """The two models, and the residual streams of every sequence in front of layer `layer`."""

    def __init__(
        self,
        reference: _core.model.Transformer,
        quantized: _core.model.Transformer,
        sequences: Sequence[NDArray[np.int32]],
        threads: int,
    ) -> None:
        self.reference = reference
        self.quantized = quantized
        self.layer = 0
        self._threads = threads
        self._exact = [reference.embed(ids) for ids in sequences]
        self._streams = [stream.copy() for stream in self._exact]
        self._tokens = sum(len(ids) for ids in sequences)

    def advance(self) -> None:
        """Goes on behind the layer, with the weights that it has now."""
        for i, (exact, stream) in enumerate(zip(self._exact, self._streams, strict=True)):
            self._exact[i] = self.reference.forward_block(self.layer, exact)[0]
            self._streams[i] = self.quantized.forward_block(self.layer, stream)[0]
        self.layer += 1

    def moments(
        self, tap: Tap, targets: Targets, output_weights: tuple[Float32, Float32] | None
    ) -> tuple[Float64, Float64 | None, Float64 | None]:
        """Means over all tokens: of x x^T, of (exact x - x) x^T, and of (exact - residual stream) x^T.

        x is what the tapped layers see in the quantised model. `output_weights`: exact and quantised
        weights of the output projection, for `down`, which finds the stream behind the attention.
        Raises ValueError for activations that are not finite.
        """
        spec = self.reference.spec
        layer = spec.layers[self.layer]
        cols = {"output": layer.heads * layer.head_dim, "down": layer.ffn_size}.get(tap, spec.hidden_size)
        moments = np.zeros((cols, cols))
        shift = np.zeros((cols, cols)) if targets.propagation > 0 else None
        # Behind a norm, an addition to the output is none to the stream.
        wants_stream = targets.residual > 0 and tap in ("output", "down") and not layer.post_norms
        stream_error = np.zeros((spec.hidden_size, cols)) if wants_stream else None
        for exact, stream, seen_exact, seen in self._inputs(tap):
            x = seen[tap]
            self._add(moments, x, None)
            if shift is not None:
                self._add(shift, seen_exact[tap] - x, x)
            if stream_error is not None:
                error = exact - stream
                if output_weights is not None:
                    weights, quantized = output_weights
                    change = seen_exact["output"] @ weights.T - seen["output"] @ quantized.T
                    error += np.float32(layer.residual_scale) * change
                self._add(stream_error, error / np.float32(layer.residual_scale), x)
        shares = [None if sums is None else sums / self._tokens for sums in (shift, stream_error)]
        return moments / self._tokens, shares[0], shares[1]

    def _inputs(self, tap: Tap) -> Iterator[tuple[Float32, Float32, Mapping[str, Float32], Mapping[str, Float32]]]:
        taps: tuple[Tap, ...] = ("output", "down") if tap == "down" else (tap,)
        for exact, stream in zip(self._exact, self._streams, strict=True):
            seen_exact = self.reference.forward_block(self.layer, exact, taps=taps)[1]
            yield exact, stream, seen_exact, self.quantized.forward_block(self.layer, stream, taps=taps)[1]

    def _add(self, sums: Float64, a: Float32, b: Float32 | None) -> None:
        _core.quant.sum_moments(a, b, sums, threads=self._threads)


Quantized = TypeVar("Quantized")


@dataclass(frozen=True, slots=True)
class BlockEditor(Generic[Quantized]):
    """What calibration needs of the checkpoint and of the quantised model.

    `read` gives the weights of a slot; `quantize` makes something of them, of the second moments of the
    input and of what the output lacks (see `quantize_linear`); `replace` puts that into the model and gives
    its values; `progress` is called with every slot that is done.
    """

    read: Callable[[str], Float32]
    quantize: Callable[[str, Float32, Float64, Float64 | None], Quantized]
    replace: Callable[[str, Quantized], Float32]
    progress: Callable[[str], None]


def calibrate_block(walk: BlockWalk, editor: BlockEditor[Quantized], targets: Targets) -> dict[str, Quantized]:
    """Quantises all linear layers of the layer at which `walk` stands, each minding those before it.

    Raises ValueError that names the slot for activations that are not finite or all zero.
    """
    prefix = f"layers.{walk.layer}."
    done: dict[str, Quantized] = {}
    output_weights: tuple[Float32, Float32] | None = None
    for tap, names in STAGES:
        try:
            moments, shift, stream_error = walk.moments(tap, targets, output_weights if tap == "down" else None)
            for slot in (prefix + name for name in names):
                if slot.endswith(".gate") and not walk.reference.spec.layers[walk.layer].gated:
                    continue
                weights = editor.read(slot)
                lacking = None if shift is None else targets.propagation * (weights @ shift)
                if stream_error is not None:
                    lacking = targets.residual * stream_error + (0 if lacking is None else lacking)
                done[slot] = editor.quantize(slot, weights, moments, lacking)
                values = editor.replace(slot, done[slot])
                if tap == "output":
                    output_weights = weights, values
                editor.progress(slot)
        except ValueError as error:
            raise ValueError(f"[calibrate] the input of '{prefix}{names[0]}': {error}") from None
    return done
