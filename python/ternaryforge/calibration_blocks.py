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


DEFAULT_TARGETS = Targets(propagation=0.5, residual=0.75)
"""Those of method best; docs/guide/quantization.md says how they were chosen."""


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
        for i, stream in enumerate(self._streams):
            self._streams[i] = self.quantized.forward_block(self.layer, stream)[0]
        self._advance_exact()
        self.layer += 1

    def _advance_exact(self) -> None:
        for i, exact in enumerate(self._exact):
            self._exact[i] = self.reference.forward_block(self.layer, exact)[0]

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
        for sums in (moments, shift, stream_error):
            if sums is not None:
                np.divide(sums, self._tokens, out=sums)  # in place: the largest arrays of all
        return moments, shift, stream_error

    def _inputs(self, tap: Tap) -> Iterator[tuple[Float32, Float32, Mapping[str, Float32], Mapping[str, Float32]]]:
        taps: tuple[Tap, ...] = ("output", "down") if tap == "down" else (tap,)
        for exact, stream in zip(self._exact, self._streams, strict=True):
            seen_exact = self.reference.forward_block(self.layer, exact, taps=taps)[1]
            yield exact, stream, seen_exact, self.quantized.forward_block(self.layer, stream, taps=taps)[1]

    def _add(self, sums: Float64, a: Float32, b: Float32 | None) -> None:
        _core.quant.sum_moments(a, b, sums, threads=self._threads)


class ReturningWalk(BlockWalk):
    """A walk that can go back: the exact residual streams in front of all layers that it has seen are kept."""

    def __init__(
        self,
        reference: _core.model.Transformer,
        quantized: _core.model.Transformer,
        sequences: Sequence[NDArray[np.int32]],
        threads: int,
    ) -> None:
        super().__init__(reference, quantized, sequences, threads)
        self._all_exact = [tuple(self._exact)]

    @property
    def streams(self) -> tuple[Float32, ...]:
        """The quantised model's, of every sequence, where the walk stands."""
        return tuple(self._streams)

    def exact_streams(self, layer: int) -> tuple[Float32, ...]:
        """The reference's, in front of a layer."""
        while len(self._all_exact) <= layer:
            last = len(self._all_exact) - 1
            self._all_exact.append(
                tuple(self.reference.forward_block(last, exact)[0] for exact in self._all_exact[last])
            )
        return self._all_exact[layer]

    def go_to(self, layer: int, streams: Sequence[Float32]) -> None:
        """Stands in front of a layer, with the quantised model's streams there."""
        self.layer = layer
        self._exact = list(self.exact_streams(layer))
        self._streams = list(streams)

    def _advance_exact(self) -> None:
        self._exact = list(self.exact_streams(self.layer + 1))


Quantized = TypeVar("Quantized")


def _keep_none(_: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class BlockEditor(Generic[Quantized]):
    """What calibration needs of the checkpoint and of the quantised model.

    `read` gives the weights of a slot; `quantize` makes something of them, of the second moments of the
    input and of what the output lacks (see `quantize_linear`); `replace` puts that into the model and gives
    its values; `progress` is called with every slot that is done. `keep` gives what a slot becomes whatever
    its input is, None where that matters.
    """

    read: Callable[[str], Float32]
    quantize: Callable[[str, Float32, Float64, Float64 | None], Quantized]
    replace: Callable[[str, Quantized], Float32]
    progress: Callable[[str], None]
    keep: Callable[[str], Quantized | None] = _keep_none


def calibrate_block(walk: BlockWalk, editor: BlockEditor[Quantized], targets: Targets) -> dict[str, Quantized]:
    """Quantises all linear layers of the layer at which `walk` stands, each minding those before it.

    Raises ValueError that names the slot for activations that are not finite or all zero.
    """
    prefix = f"layers.{walk.layer}."
    done: dict[str, Quantized] = {}
    output_weights: tuple[Float32, Float32] | None = None
    for tap, names in STAGES:
        slots = [prefix + name for name in names if name != "gate" or walk.reference.spec.layers[walk.layer].gated]
        kept = {slot: editor.keep(slot) for slot in slots}
        moments, lacking = np.empty((0, 0)), dict[str, Float64 | None]()
        try:
            if None in kept.values():
                moments, shift, stream_error = walk.moments(tap, targets, output_weights if tap == "down" else None)
                lacking = {
                    slot: _lacking(editor.read(slot), shift, stream_error, targets)
                    for slot in slots
                    if kept[slot] is None
                }
                del shift, stream_error
            for slot in slots:
                weights, known = editor.read(slot), kept[slot]
                done[slot] = editor.quantize(slot, weights, moments, lacking.pop(slot)) if known is None else known
                values = editor.replace(slot, done[slot])
                if tap == "output":
                    output_weights = weights, values
                editor.progress(slot)
        except ValueError as error:
            raise ValueError(f"[calibrate] the input of '{prefix}{names[0]}': {error}") from None
    return done


def _lacking(weights: Float32, shift: Float64 | None, stream_error: Float64 | None, targets: Targets) -> Float64 | None:
    """What the output of a layer lacks, times its input; None for nothing."""
    lacking = None if shift is None else targets.propagation * (weights @ shift)
    if stream_error is not None:
        return targets.residual * stream_error + (0 if lacking is None else lacking)
    return lacking
