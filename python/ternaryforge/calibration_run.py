# SPDX-License-Identifier: Apache-2.0
"""The work of `calibrate`: one checkpoint in full precision, quantised layer by layer beside itself, and written."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.calibration_blocks import BlockEditor, BlockWalk, Targets, calibrate_block
from ternaryforge.calibration_keeping import KeptLayers
from ternaryforge.calibration_linear import Float32, LinearOptions, quantize_linear, round_plainly
from ternaryforge.calibration_text import WINDOW, CalibrationText, draw_text
from ternaryforge.calibration_tuning import WINDOW as TUNING_WINDOW
from ternaryforge.calibration_tuning import Tuning
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
from ternaryforge.evaluation import evaluate
from ternaryforge.families import Architecture, read_architecture
from ternaryforge.rounding import RoundingOptions, rounded_shapes
from ternaryforge.tokenizer import Tokenizer
from ternaryforge.weights import load_weights, packed_shape, scale_name

Progress = Callable[[int, int, str], None]

_TOKENS_PER_COLUMN = 2  # of the widest input: with fewer tokens, second moments say little


@dataclass(frozen=True, slots=True)
class CalibratedLayer:
    """One linear layer, with the error of its output against that of the best weights for its input, relative to it.

    `mse_before` is that of rounding by least squares, `mse_after` that of the result. `dead_channels`
    of the input were 0 for the whole text.
    """

    name: str
    rows: int
    cols: int
    mse_before: float
    mse_after: float
    zero_fraction: float
    dead_channels: int


class CalibrationRun:
    """One calibration: the source, the two models, and what is known about the layers so far."""

    def __init__(self, source: Path, options: LinearOptions, targets: Targets) -> None:
        self._checkpoint = Checkpoint.open(source)
        where = str(source / "config.json")
        self._architecture: Architecture = read_architecture(self._checkpoint.config, where=where)
        if self._architecture.quantization is not None:
            raise FormatError(
                f"[calibrate] '{where}': the weights are quantised already; start from the checkpoint in full precision"
            )
        tokenizer = Tokenizer.from_folder(source)
        if tokenizer is None:
            raise ValueError(f"[calibrate] '{source}' must hold a tokenizer, got none: put its files there")
        self._tokenizer = tokenizer
        self._rounding = RoundingOptions("ls", options.scale, options.group_size, options.threads, options.planes)
        self._shapes = rounded_shapes(self._architecture, self._rounding, str(source))
        self._refuse_shapes(where)
        self._options = options
        self._targets = targets
        # A stock folder is run with int8 activations, whoever loads it.
        self.activations: Any = "int8" if options.scale == "tensor" else "float"
        self._reference = self._load("float")
        self.quantized = self._load(self.activations)
        self.layers: list[CalibratedLayer] = []
        self._tuned: dict[str, NDArray[Any]] = {}
        self._gains: dict[str, Float32] = {}
        self.ternary_bytes = 0
        self._refuse_ternary()

    def _refuse_shapes(self, where: str) -> None:
        if self._architecture.parts or self._architecture.rules:
            raise FormatError(
                f"[calibrate] '{where}': fused or latent tensors of {self._architecture.architecture} are not "
                "supported; use convert"
            )
        for name, (rows, _) in self._shapes.items():
            if rows % 4:
                raise FormatError(
                    f"[calibrate] '{where}': tensor '{name}' must have a multiple of 4 rows, got {rows}; use convert"
                )

    def _load(self, activations: Any) -> _core.model.Transformer:
        weights = load_weights(self._checkpoint, self._architecture)
        return _core.model.Transformer(
            self._architecture.spec, weights, activations=activations, threads=self._options.threads
        )

    def _refuse_ternary(self) -> None:
        found = _core.quant.find_ternary(self._read("layers.0.query"), group_size=64, threads=self._options.threads)
        if found is not None:
            raise FormatError(
                f"[calibrate] '{self._checkpoint.path}': the weights are ternary already, with a scale per {found[0]}; "
                "convert keeps them exactly"
            )

    def _read(self, slot: str) -> Float32:
        return np.ascontiguousarray(self._checkpoint.read_float32(self._architecture.tensor_names[slot]))

    def draw(self, text: str, tokens: int, seed: int) -> CalibrationText:
        """The text to calibrate on; at least two tokens for every column of the widest input."""
        spec = self._architecture.spec
        least = min(tokens, _TOKENS_PER_COLUMN * max(cols for _, cols in self._shapes.values()))
        window = min(WINDOW, spec.context_length)
        return draw_text(text, self._tokenizer, tokens=tokens, least=least, window=window, seed=seed)

    def key(self, drawn: CalibrationText, tokens: int, seed: int) -> dict[str, Any]:
        """What must be the same for a run to go on with the layers of another."""
        options = asdict(self._options) | asdict(self._targets)
        del options["threads"]  # the result does not depend on them
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._checkpoint.files]
        digest = hashlib.sha256(json.dumps([self._checkpoint.config, files], sort_keys=True).encode()).hexdigest()
        return {"source": digest, "data": drawn.sha256, "tokens": tokens, "seed": seed, "options": options}

    def perplexity(self, model: _core.model.Transformer, text: str) -> float:
        """Protocol documents."""
        return evaluate(model, self._tokenizer, text).perplexity

    def measure(self, text: str) -> tuple[float, float]:
        """Perplexity of the source, and of rounding it by least squares."""
        rounded = self._load(self.activations)
        for slot in self._architecture.spec.slots():
            if self._architecture.is_linear(slot):
                rounded.replace_linear(
                    slot, self._packed(*self._codes(*round_plainly(self._read(slot), self._options)))
                )
        return self.perplexity(self._reference, text), self.perplexity(rounded, text)

    def quantize(self, drawn: CalibrationText, kept: KeptLayers, progress: Progress | None) -> int:
        """Quantises layer after layer; returns how many were there already."""
        walk = BlockWalk(self._reference, self.quantized, drawn.sequences, self._options.threads)
        total, done, resumed = len(self._shapes), 0, 0

        def step(slot: str) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total, slot)

        editor = BlockEditor(self._read, self._quantize, self._replace, step)
        for layer in range(len(self._architecture.spec.layers)):
            arrays = kept.load(layer)
            if arrays is None:
                arrays = {}
                for slot, linear in calibrate_block(walk, editor, self._targets).items():
                    arrays[slot + ".codes"], arrays[slot + ".scales"] = self._store(linear)
                    zeros = 1 - np.count_nonzero(linear.trits) / linear.trits.size
                    arrays[slot + ".facts"] = np.array(
                        [linear.error_before, linear.error_after, zeros, linear.dead_channels]
                    )
                kept.save(layer, arrays)
            else:
                resumed += 1
                for slot in _slots(arrays):
                    self._restore(slot, arrays)
                    step(slot)
            self._note(arrays)
            walk.advance()
        return resumed

    def tune(self, text: str, kept: KeptLayers, tokens: int, seed: int, progress: Progress | None) -> None:
        """Trains scales and norms; what was reached is kept, and the quantised model is made of it."""
        spec = self._architecture.spec
        layers = [kept.load(layer) or {} for layer in range(len(spec.layers))]
        tuning = Tuning(self._checkpoint.path, self._architecture, self._options, tokens, seed)
        tuned = kept.load("tuned")
        if tuned is None:
            window = min(TUNING_WINDOW, spec.context_length)
            drawn = draw_text(text, self._tokenizer, tokens=tokens, least=1, window=window, seed=seed)
            arrays = {name: array for layer in layers for name, array in layer.items()}
            state = kept.load("tuning")
            tuned = tuning.run(arrays, drawn.sequences, state, lambda state: kept.save("tuning", state), progress)
            kept.save("tuned", tuned)
        self._tuned = tuned
        self._gains = {name: tuned[slot + ".gains"] for slot, name in tuning.norms.items()}
        weights = load_weights(self._checkpoint, self._architecture)
        for slot, name in tuning.norms.items():
            weights[slot] = _core.formats.PackedTensor("f32", 1, self._gains[name].size, self._gains[name])
        self.quantized = _core.model.Transformer(
            spec, weights, activations=self.activations, threads=self._options.threads
        )
        for slot in _slots(tuned):
            self._restore(slot, tuned)

    def _note(self, arrays: dict[str, NDArray[Any]]) -> None:
        for slot in _slots(arrays):
            before, after, zeros, dead = arrays[slot + ".facts"]
            name = self._architecture.tensor_names[slot]
            self.ternary_bytes += arrays[slot + ".codes"].nbytes + arrays[slot + ".scales"].nbytes
            rows, cols = self._shapes[name]
            self.layers.append(CalibratedLayer(name, rows, cols, float(before), float(after), float(zeros), int(dead)))

    def _quantize(
        self, slot: str, weights: Float32, moments: NDArray[np.float64], lacking: NDArray[np.float64] | None
    ) -> Any:
        """What becomes of a linear layer: something with `trits` and the facts of `CalibratedLayer`."""
        del slot  # all alike
        return quantize_linear(weights, moments, lacking, self._options)

    def _replace(self, slot: str, linear: Any) -> Float32:
        """Puts what `_quantize` made into the quantised model; returns its values."""
        self.quantized.replace_linear(slot, self._packed(*self._store(linear)))
        rows, cols = linear.trits.shape
        wide = linear.scales.reshape(1 if self._options.scale == "tensor" else rows, -1)
        values: Float32 = linear.trits * np.repeat(wide, self._options.run_cols(cols), axis=1)[:, :cols]
        return values

    def _store(self, linear: Any) -> tuple[NDArray[Any], Float32]:
        """What of `_quantize` is kept: codes and scales."""
        return self._codes(linear.trits, linear.scales)

    def _restore(self, slot: str, arrays: dict[str, NDArray[Any]]) -> None:
        """Puts a layer that was kept into the quantised model."""
        self.quantized.replace_linear(slot, self._packed(arrays[slot + ".codes"], arrays[slot + ".scales"]))

    def _codes(self, trits: NDArray[np.int8], scales: Float32) -> tuple[NDArray[np.uint8], Float32]:
        """What the checkpoint holds: packed codes ([2,] rows / 4, cols) and scales, inverse in a stock folder."""
        planes, (rows, cols) = self._options.planes, trits.shape
        codes = _core.formats.pack(trits, "two_plane" if planes == 2 else "hf_packed")
        codes = codes.reshape(packed_shape(rows, cols, planes))
        return codes, np.float32(1) / scales if self._options.scale == "tensor" else scales

    def _packed(self, codes: NDArray[np.uint8], stored: Float32) -> _core.formats.PackedTensor:
        group = self._options.group_size if self._options.scale == "group" else 0
        convention: Any = "divide" if self._options.scale == "tensor" else "multiply"
        return _core.formats.PackedTensor(
            "two_plane" if codes.ndim == 3 else "hf_packed",
            4 * codes.shape[-2],
            codes.shape[-1],
            codes.reshape(-1),
            scale_kind=self._options.scale,
            group_size=group,
            convention=convention,
            scales=stored.reshape(-1),
        )

    def write(self, out: Path, kept: KeptLayers) -> int:
        """Writes the folder, all or nothing; returns the size of the weights file."""
        checkpoint = self._checkpoint
        infos = (checkpoint.info(name) for name in checkpoint)
        plan = self._rounding.rounded_tensors(
            (TensorPlan(info.name, "F32" if info.name in self._gains else info.dtype, info.shape) for info in infos),
            self._shapes,
        )
        with CheckpointWriter(out, plan) as writer:
            for name in checkpoint:
                if name in self._gains:
                    writer.write(name, self._gains[name])
                elif name not in self._shapes:
                    writer.write(name, checkpoint.raw(name))
            for layer in range(len(self._architecture.spec.layers)):
                arrays = kept.load(layer) or {}
                stored = self._tuned or arrays
                for slot in _slots(arrays):
                    name = self._architecture.tensor_names[slot]
                    writer.write(name, stored[slot + ".codes"])
                    writer.write(scale_name(name), stored[slot + ".scales"])
            writer.write_json("config.json", {**checkpoint.config, "quantization_config": self._fields()})
            writer.copy_companions(checkpoint.path)
        return writer.file_bytes

    def _fields(self) -> dict[str, Any]:
        """quantization_config of the result."""
        kept = {"modules_to_not_convert": ["lm_head"]}
        if self._options.scale == "tensor":
            return {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"} | kept
        fields: dict[str, Any] = {"scale": self._options.scale}
        if self._options.scale == "group":
            fields["group_size"] = self._options.group_size
        return {"quant_method": "ternaryforge"} | fields | {"activation_bits": None} | kept


def _slots(arrays: dict[str, NDArray[Any]]) -> list[str]:
    return [name.removesuffix(".codes") for name in arrays if name.endswith(".codes")]
