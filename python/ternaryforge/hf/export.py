# SPDX-License-Identifier: Apache-2.0
"""What a trainer saved becomes a packed ternary checkpoint, or a plain dense one.

    trainer.save_model("master")
    export_bitnet("master", "out")                                # plain transformers loads it
    export_bitnet("master", "out", linear_class="ternaryforge")   # scales per row or group, for this library
    export_dense("master", "baked")                               # the same values as ordinary weights

No model is built: tensors go one by one from file to file, and the codes are those of the last training step.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
from ternaryforge.families import Architecture, read_architecture
from ternaryforge.hf.export_card import DENSE_LOADING, describe_loading, describe_method
from ternaryforge.model_card import CARD, source_metadata, write_model_card
from ternaryforge.report import Report
from ternaryforge.torch.encoding import EncodedMatrix, encode_matrix, has_output_bias, learned_names
from ternaryforge.torch.qat import QATConfig, read_stamp
from ternaryforge.weights import scale_name

LinearClass = Literal["bitlinear", "autobitlinear", "ternaryforge"]
DenseType = Literal["float32", "bfloat16"]
Progress = Callable[[int, int, str], None]

_GROUP_STEP = 64  # what the run-time layout can hold


@dataclass(frozen=True, slots=True)
class ExportReport(Report):
    """What an export wrote. `zero_fraction` and `bits_per_weight` are over the ternary weights."""

    source: str
    out: str
    linear_class: str
    quantizer: str
    scale: str
    group_size: int | None
    activation_bits: int | None
    tensors: int
    ternary_params: int
    zero_fraction: float
    bits_per_weight: float
    file_bytes: int
    seconds: float


def export_bitnet(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    linear_class: LinearClass = "bitlinear",
    *,
    config: QATConfig | None = None,
    base_model: str | None = None,
    measured: Mapping[str, str | float] | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Packs the latents in the folder `source` into the new folder `out`.

    Args:
        source: What `save_model`, `save_pretrained` or a Trainer's `checkpoint-N` holds; with or without a tokenizer.
        out: A folder that does not exist yet, or is empty.
        linear_class: `bitlinear` and `autobitlinear` are transformers' own two forms (one scale a tensor, int8
            activations; the first is read by more programs); `ternaryforge` is this library's.
        config: How the model was trained, where config.json does not say it.
        base_model: `org/name` of the full-precision model, for the card; else what the card of `source` says.
        measured: Figures for the card, by what they are; it has no others.
        progress: Called after each tensor with the tensors done, all, and the name.

    `out` gets a card, README.md, that takes over the licence in the metadata of the source's card.
    A bias that the quantizer made (Tequila) is stored as the bias of every linear layer.
    Raises FormatError for a source that is no such checkpoint or cannot be stored as asked, with the fix, ValueError
    for an unknown `linear_class`, FileExistsError and other OSError.
    """
    if linear_class not in {"bitlinear", "autobitlinear", "ternaryforge"}:
        raise ValueError(f"[export] linear_class is bitlinear, autobitlinear or ternaryforge, got {linear_class!r}")
    started = time.perf_counter()
    master = _Master(Path(source), config)
    master.check_packable(linear_class)
    biased = has_output_bias(master.config)
    plan = master.dense_plan()
    for name, (rows, cols) in master.shapes.items():
        plan.append(TensorPlan(name, "U8", (rows // 4, cols)))
        plan.append(TensorPlan(scale_name(name), "F32", master.scale_shape(rows, cols)))
        if biased:
            plan.append(TensorPlan(_bias_name(name), "F32", (rows,)))
    zeros = weights = bits = 0
    with CheckpointWriter(Path(out), plan) as writer:
        for name, encoded in master.copy_and_encode(writer, progress):
            stored = np.float32(1) / encoded.scales if linear_class == "bitlinear" else encoded.scales
            packed = _core.formats.pack(encoded.codes, "hf_packed")
            writer.write(name, packed.reshape(-1, encoded.codes.shape[1]))
            writer.write(scale_name(name), stored)
            if encoded.bias is not None:
                writer.write(_bias_name(name), encoded.bias + master.stored_bias(name))
            zeros += encoded.codes.size - int(np.count_nonzero(encoded.codes))
            weights += encoded.codes.size
            bits += 8 * (packed.nbytes + stored.nbytes)
        changed = {"attention_bias": True, "mlp_bias": True} if biased else {}
        writer.write_json("config.json", master.config_json(master.packed_fields(linear_class), changed))
        writer.copy_companions(master.checkpoint.path)
        facts = {
            "Method": describe_method(master.config),
            "Ternary weights": f"{weights:,} in {len(master.shapes)} matrices, {zeros / weights:.1%} of them zero",
            "Bits per ternary weight": f"{bits / weights:.3f}, scales included",
            "Size": f"{writer.file_bytes / 1e6:,.2f} MB, of which ternary {bits / 8e6:,.2f} MB",
            "Format": f"`{linear_class}`",
        }
        loading = describe_loading(stock=linear_class != "ternaryforge")
        card = write_model_card(
            Path(out).name, facts, loading, source=Path(source), base_model=base_model, measured=measured
        )
        writer.write_text(CARD, card)
    trained = master.config
    return ExportReport(
        source=str(source),
        out=str(out),
        linear_class=linear_class,
        quantizer=trained.quantizer,
        scale=trained.scale,
        group_size=trained.group_size if trained.scale == "group" else None,
        activation_bits=trained.activation_bits,
        tensors=len(master.shapes),
        ternary_params=weights,
        zero_fraction=zeros / weights,
        bits_per_weight=bits / weights,
        file_bytes=writer.file_bytes,
        seconds=time.perf_counter() - started,
    )


def export_dense(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: DenseType = "float32",
    config: QATConfig | None = None,
    base_model: str | None = None,
    measured: Mapping[str, str | float] | None = None,
    progress: Progress | None = None,
) -> None:
    """Bakes the values that training multiplied with into ordinary weights of `dtype`, for any program.

    Holds every quantizer, those with a shift or four levels too; int8 activations are lost, and so is
    the size. Arguments and errors as of `export_bitnet`.
    """
    if dtype not in {"float32", "bfloat16"}:
        raise ValueError(f"[export] dtype is float32 or bfloat16, got {dtype!r}")
    master = _Master(Path(source), config)
    biased = has_output_bias(master.config)
    master.check_biases()
    plan = master.dense_plan()
    stored_as = "F32" if dtype == "float32" else "BF16"
    for name, shape in master.shapes.items():
        plan.append(TensorPlan(name, stored_as, shape))
        if biased:
            plan.append(TensorPlan(_bias_name(name), "F32", shape[:1]))
    with CheckpointWriter(Path(out), plan) as writer:
        for name, encoded in master.copy_and_encode(writer, progress):
            writer.write(name, encoded.values if stored_as == "F32" else _bfloat16(encoded.values))
            if encoded.bias is not None:
                writer.write(_bias_name(name), encoded.bias + master.stored_bias(name))
        changed: dict[str, Any] = {"attention_bias": True, "mlp_bias": True} if biased else {}
        writer.write_json("config.json", master.config_json(None, {**changed, "dtype": dtype}))
        writer.copy_companions(master.checkpoint.path)
        facts = {
            "Method": describe_method(master.config),
            "Bits per weight": f"{32 if dtype == 'float32' else 16}: the quantised values are stored as plain {dtype}",
            "Size": f"{writer.file_bytes / 1e6:,.2f} MB",
        }
        card = write_model_card(
            Path(out).name, facts, DENSE_LOADING, source=Path(source), base_model=base_model, measured=measured
        )
        writer.write_text(CARD, card)


class _Master:
    """A folder of latents: what lies in it and how it was trained."""

    def __init__(self, source: Path, config: QATConfig | None) -> None:
        self.checkpoint = Checkpoint.open(source)
        self.where = str(source / "config.json")
        source_metadata(source)  # a card that cannot be read is refused before any work
        fields = self.checkpoint.config.get("quantization_config")
        self.config = self._trained(fields, config)
        kept = list((fields or {}).get("modules_to_not_convert") or ["lm_head"])
        # The names of what was trained, as if all had been trained in the stock way.
        stand_in = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
        described = {**self.checkpoint.config, "quantization_config": {**stand_in, "modules_to_not_convert": kept}}
        self.architecture: Architecture = read_architecture(described, where=self.where)
        self.kept = kept
        slots = self.architecture.spec.slots()
        names = self.architecture.tensor_names
        self.shapes = {
            names[slot]: shape
            for slot, shape in slots.items()
            if self.architecture.is_ternary(slot) and names[slot].endswith(".weight")
        }
        self._learned = learned_names(self.config)
        self._check_tensors()

    def _trained(self, fields: dict[str, Any] | None, config: QATConfig | None) -> QATConfig:
        try:
            stamped = read_stamp(fields) if fields else None
        except (ValueError, TypeError) as error:
            raise FormatError(f"[export] '{self.where}': {error}") from None
        if stamped is not None:
            # What does not change the values is not recorded.
            if config is not None and stamped != replace(
                config, skip=stamped.skip, targets=None, ste_scale=1.0, residual=False
            ):
                raise FormatError(
                    f"[export] '{self.where}' says that the model was trained as {stamped}, not as the config given"
                )
            return stamped
        if fields:
            raise FormatError(
                f"[export] '{self.where}' is quantised already ({fields.get('quant_method')!r}); what is exported "
                "are the latents that a trainer saved"
            )
        if config is None:
            raise FormatError(
                f"[export] '{self.where}' does not say that the weights are latents: export what a model prepared by "
                "prepare_qat saved, or say with config=QATConfig(...) how it was trained; to make a dense model "
                "ternary use ternaryforge.convert"
            )
        return config

    def _check_tensors(self) -> None:
        """Refuses a tensor that is missing, and one that no part of the model takes."""
        known = {"lm_head.weight"} if self.architecture.tied_head else set()
        known |= set(self.architecture.tensor_names.values())
        for name in self.architecture.tensor_names.values():
            self.checkpoint.info(name)
        for name in self.shapes:
            for learned in self._learned:
                known.add(_learned_name(name, learned))
                self.checkpoint.info(_learned_name(name, learned))
        if self.config.sub_norm:
            raise FormatError(
                f"[export] '{self.where}': the model was trained with a norm before some layers (sub_norm), for which "
                "its architecture has no place"
            )
        for name in self.checkpoint:
            if name not in known:
                raise FormatError(
                    f"[export] '{self.checkpoint.info(name).file}': tensor '{name}' is no part of "
                    f"{self.architecture.architecture} trained with the quantizer {self.config.quantizer!r}"
                )

    def check_biases(self) -> None:
        """Refuses a bias of the quantizer where the architecture has no place for it."""
        if not has_output_bias(self.config):
            return
        blocks = [slot for slot in self.architecture.spec.slots() if self.architecture.is_linear(slot)]
        if self.architecture.family != "llama" or not all(self.architecture.is_ternary(slot) for slot in blocks):
            raise FormatError(
                f"[export] '{self.where}': the quantizer {self.config.quantizer!r} gives every layer a bias, which "
                "only the llama family can store, and only when all linear layers of its blocks were trained"
            )

    def check_packable(self, linear_class: LinearClass) -> None:
        """Refuses what the form asked for cannot store."""
        config = self.config
        alphabet = encode_matrix(np.ones((4, 4), np.float32), *_smallest(config)).alphabet
        if config.quantizer == "dlt" or alphabet == "four":
            what = "a shift" if config.quantizer == "dlt" else "four levels"
            raise FormatError(
                f"[export] '{self.where}': the quantizer {config.quantizer!r} has {what}, which no packed form here "
                "stores: use export_dense"
            )
        stock = config.scale == "tensor" and config.activation_bits == 8
        if linear_class != "ternaryforge" and not stock:
            raise FormatError(
                f"[export] '{self.where}': trained with scale {config.scale!r} and activation_bits "
                f"{config.activation_bits}; a stock checkpoint has one scale a tensor and int8 activations: use "
                "linear_class='ternaryforge'"
            )
        if config.scale == "group" and config.group_size % _GROUP_STEP:
            raise FormatError(
                f"[export] '{self.where}': trained with groups of {config.group_size}; packed groups are multiples of "
                f"{_GROUP_STEP}: use export_dense"
            )
        for name, (rows, _) in self.shapes.items():
            if rows % 4:
                raise FormatError(
                    f"[export] '{self.where}': tensor '{name}' has {rows} rows; four rows share a byte, so their "
                    "number must be a multiple of 4"
                )
        self.check_biases()
        if linear_class == "autobitlinear" and has_output_bias(config):
            raise FormatError(
                f"[export] '{self.where}': transformers multiplies the bias of an 'autobitlinear' layer by its scale: "
                "use linear_class='bitlinear'"
            )

    def scale_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """The shape of the scales of a matrix."""
        groups = -(-cols // self.config.group_size)
        return {"tensor": (1,), "row": (rows,), "group": (rows, groups)}[self.config.scale]

    def dense_plan(self) -> list[TensorPlan]:
        """All tensors that are copied."""
        return [TensorPlan(i.name, i.dtype, i.shape) for i in map(self.checkpoint.info, self._copied())]

    def _copied(self) -> list[str]:
        made = set(self.shapes) | {_learned_name(name, learned) for name in self.shapes for learned in self._learned}
        if has_output_bias(self.config):
            made |= {_bias_name(name) for name in self.shapes}
        return [name for name in self.checkpoint if name not in made]

    def copy_and_encode(self, writer: CheckpointWriter, progress: Progress | None) -> Any:
        """Copies what stays, then yields name and codes of every trained matrix."""
        copied = self._copied()
        total = len(copied) + len(self.shapes)
        for done, name in enumerate(copied, start=1):
            writer.write(name, self.checkpoint.raw(name))
            if progress is not None:
                progress(done, total, name)
        for done, name in enumerate(self.shapes, start=len(copied) + 1):
            yield name, self.encode(name)
            if progress is not None:
                progress(done, total, name)

    def encode(self, name: str) -> EncodedMatrix:
        """Codes and scales of one matrix."""
        info = self.checkpoint.info(name)
        learned = {part: self.checkpoint.read_float32(_learned_name(name, part)) for part in self._learned}
        try:
            return encode_matrix(self.checkpoint.read_float32(name), self.config, learned)
        except ValueError as error:
            raise FormatError(f"[export] '{info.file}': tensor '{name}': {error}") from None

    def stored_bias(self, name: str) -> NDArray[np.float32] | np.float32:
        """The bias that a layer had in training, or 0."""
        bias = _bias_name(name)
        return self.checkpoint.read_float32(bias) if bias in self.checkpoint else np.float32(0)

    def packed_fields(self, linear_class: LinearClass) -> dict[str, Any]:
        """`quantization_config` of the packed checkpoint."""
        if linear_class != "ternaryforge":
            fields = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
            return {**fields, "modules_to_not_convert": self.kept}
        ours: dict[str, Any] = {"quant_method": "ternaryforge", "scale": self.config.scale}
        if self.config.scale == "group":
            ours["group_size"] = self.config.group_size
        ours["activation_bits"] = self.config.activation_bits
        return {**ours, "modules_to_not_convert": self.kept}

    def config_json(self, quantization: dict[str, Any] | None, changed: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with another `quantization_config`, or none."""
        rest = {name: value for name, value in self.checkpoint.config.items() if name != "quantization_config"}
        rest |= changed
        return rest if quantization is None else {**rest, "quantization_config": quantization}


def _smallest(config: QATConfig) -> tuple[QATConfig, dict[str, NDArray[np.float32]]]:
    """The configuration with one scale, and learned values that fit it: enough to ask for the alphabet."""
    return replace(config, scale="tensor"), {name: np.ones((1, 1), np.float32) for name in learned_names(config)}


def _learned_name(name: str, learned: str) -> str:
    return f"{name.removesuffix('.weight')}.quantizer.{learned}"


def _bias_name(name: str) -> str:
    return name.removesuffix(".weight") + ".bias"


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
