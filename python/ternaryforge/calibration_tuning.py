# SPDX-License-Identifier: Apache-2.0
"""Calibrated layers tuned by distillation: scales and norms are trained, codes stay. PyTorch does it, where it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.calibration_linear import Float32, LinearOptions, storable_scale
from ternaryforge.families import Architecture

if TYPE_CHECKING:
    from ternaryforge.torch.tuning import TunedValues

WINDOW = 512
"""Tokens that tuning sees at once, where the model's context holds as many."""

Arrays = Mapping[str, NDArray[Any]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Tuning:
    """One run of tuning: against which source, on how many tokens."""

    source: Path
    architecture: Architecture
    options: LinearOptions
    tokens: int
    seed: int

    @property
    def norms(self) -> dict[str, str]:
        """The tensors of the norms by slot."""
        names = self.architecture.tensor_names
        return {slot: name for slot, name in names.items() if slot.rpartition(".")[2].endswith("norm")}

    def run(
        self,
        layers: Arrays,
        sequences: tuple[NDArray[np.int32], ...],
        state: dict[str, NDArray[Any]] | None,
        keep: Callable[[dict[str, NDArray[Any]]], None],
        progress: Progress | None,
    ) -> dict[str, NDArray[Any]]:
        """Trains on `sequences`; gives `SLOT.codes`, `SLOT.scales` as files hold them, and `SLOT.gains` of the norms.

        Codes differ from those before where a scale changed its sign.

        `layers` are `SLOT.codes` and `SLOT.scales` as files hold them; `state` is the last that `keep` got.
        """
        from ternaryforge.hf.teacher import load_teacher
        from ternaryforge.torch.tuning import TuningOptions, tune_model

        def show(done: int, total: int, divergence: float) -> None:
            if progress is not None:
                progress(done, total, f"tokens of tuning, KL {divergence:.3f}")

        modules = {slot: self.architecture.module_of(slot) for slot in self._slots(layers)}
        found = tune_model(
            load_teacher(self.source),
            {module: self._decode(layers, slot) for slot, module in modules.items()},
            list(self.norms.values()),
            sequences,
            TuningOptions(self.tokens, seed=self.seed),
            scale=self.options.scale,
            group_size=self.options.group_size,
            activation_bits=8 if self.options.scale == "tensor" else None,
            threads=self.options.threads,
            state=state,
            keep=keep,
            progress=show,
        )
        return self._stored(found, modules, layers)

    def _slots(self, layers: Arrays) -> list[str]:
        return [name.removesuffix(".codes") for name in layers if name.endswith(".codes")]

    def _decode(self, layers: Arrays, slot: str) -> tuple[NDArray[np.int8], Float32]:
        codes, scales = layers[slot + ".codes"], layers[slot + ".scales"]
        trits = _core.formats.unpack(codes.reshape(-1), _layout(codes.shape), 4 * codes.shape[-2], codes.shape[-1])
        return trits, np.reciprocal(scales) if self.options.scale == "tensor" else scales

    def _stored(self, found: "TunedValues", modules: Mapping[str, str], layers: Arrays) -> dict[str, NDArray[Any]]:
        """Scales are rounded to 16 bits as everywhere, or to what a stock folder gives back exactly."""
        arrays: dict[str, NDArray[Any]] = {}
        for slot, module in modules.items():
            trits, scales = found.layers[module]
            shape = layers[slot + ".codes"].shape
            arrays[slot + ".codes"] = _core.formats.pack(trits, _layout(shape)).reshape(shape)
            if self.options.scale == "tensor":
                arrays[slot + ".scales"] = np.float32(1) / storable_scale(float(scales[0]))
            else:
                arrays[slot + ".scales"] = scales.astype(np.float16).astype(np.float32)
        for slot, name in self.norms.items():
            arrays[slot + ".gains"] = found.norms[name]
        return arrays


def _layout(shape: tuple[int, ...]) -> Literal["two_plane", "hf_packed"]:
    """Of codes as files hold them: [2, rows / 4, cols] or [rows / 4, cols]."""
    return "two_plane" if len(shape) == 3 else "hf_packed"


def check_packages() -> None:
    """Raises ImportError that says what to install where PyTorch or transformers is missing."""
    from importlib.util import find_spec

    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        raise ImportError(
            f"[calibrate] tuning needs {' and '.join(missing)}: pip install 'ternaryforge[hf]', "
            "or leave out tune_tokens",
            name=missing[0],
        )
