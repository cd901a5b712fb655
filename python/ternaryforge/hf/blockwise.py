# SPDX-License-Identifier: Apache-2.0
"""Block-wise training of a checkpoint folder, of which one block at a time is in memory (at the start, embeddings too).

    train_blockwise("dense", "master", ids, QATConfig(quantizer="lsq", scale="group", activation_bits=None))
    export_bitnet("master", "ternary", linear_class="ternaryforge")

First stage of EfficientQAT; `from_pretrained("master")` gives the model for the second, `tune_scales`.
"""

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from ternaryforge._core import FormatError
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.checkpoint_writer import CheckpointWriter, TensorPlan
from ternaryforge.report import Report
from ternaryforge.torch.blockwise import (
    BlockError,
    BlockwiseOptions,
    Progress,
    capture_inputs,
    decoder_blocks,
    fill,
    train_blocks,
)
from ternaryforge.torch.qat import QATConfig, linear_names, prepare_qat, qat_layers


@dataclass(frozen=True, slots=True)
class BlockwiseReport(Report):
    """What block-wise training did: the relative squared error of every block's output, and tokens that each saw."""

    source: str
    out: str
    blocks: list[BlockError]
    tokens: int


def train_blockwise(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    ids: NDArray[Any],
    config: QATConfig,
    options: BlockwiseOptions | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> BlockwiseReport:
    """Trains the blocks of the dense folder `source` into the new folder `out` of latents.

    Args:
        source: A Hugging Face folder in safetensors form.
        out: A folder that does not exist yet, or is empty.
        ids: Tokens [sequences, length], whole sequences without padding.
        config: How linear layers of the blocks are trained; patterns are names within a block. All else stays.
        options: Rates, epochs, batch.
        folder: Where hidden states and finished blocks lie while it runs, 8 bytes for each token and hidden unit
            (twice that between two blocks); `out` with `.blocks` behind it by default. A later call with the same
            arguments goes on there, and it is removed at the end.
        progress: Called after each block with the blocks done, all, and the last one's error.

    Raises FormatError for a checkpoint that is quantised or incomplete, ValueError for a model without a list of
    decoder blocks, for ids of another shape, and for all that `prepare_qat` refuses.
    """
    options = options or BlockwiseOptions()
    out = Path(out)
    if ids.ndim != 2 or not ids.size:
        raise ValueError(f"[blockwise] ids are [sequences, length], got the shape {list(ids.shape)}")
    checkpoint = Checkpoint.open(source)
    if "quantization_config" in checkpoint.config:
        raise FormatError(f"[blockwise] '{source}/config.json' is quantised already: start from the dense checkpoint")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"[blockwise] '{out}' is not empty: name another folder")
    work = out.with_name(out.name + ".blocks") if folder is None else Path(folder)
    work.mkdir(parents=True, exist_ok=True)
    blocks = _FolderBlocks(checkpoint, config, work, ids)
    errors = train_blocks(blocks, blocks.hidden, options, folder=work, progress=progress)
    blocks.write(out)
    shutil.rmtree(work)
    return BlockwiseReport(str(source), str(out), errors, int(ids.size) * options.epochs)


class _FolderBlocks:
    """The blocks of a checkpoint, read when they are opened and written to a folder of their own when closed."""

    def __init__(self, checkpoint: Checkpoint, config: QATConfig, work: Path, ids: NDArray[Any]) -> None:
        self.checkpoint, self.config, self.work = checkpoint, config, work
        self.model_config = AutoConfig.from_pretrained(checkpoint.path)
        self.count = int(self.model_config.num_hidden_layers)
        self.kinds = list(getattr(self.model_config, "layer_types", None) or [None] * self.count)
        self.kept: list[str] = []
        self._blocks: dict[Any, Any] = {}
        self._arguments: dict[Any, Mapping[str, Any]] = {}
        for index, kind in enumerate(self.kinds):
            if kind not in self._blocks:
                hidden = self._add(kind, index, ids if index == 0 else ids[:1])
                if index == 0:
                    self.hidden = hidden

    def __len__(self) -> int:
        return self.count

    def _add(self, kind: Any, index: int, ids: NDArray[Any]) -> NDArray[np.float32]:
        """Makes a model of one block, of this kind, and keeps the block and what it is called with."""
        config = copy.deepcopy(self.model_config)
        config.num_hidden_layers = 1
        if kind is not None:
            config.layer_types = [kind]
        model = AutoModelForCausalLM.from_config(config, dtype="float32").eval()  # type: ignore[no-untyped-call]
        self.prefix, blocks = decoder_blocks(model)
        outside = [name for name in linear_names(model, []) if not name.startswith(f"{self.prefix}.")]
        self.kept = sorted({*self.kept, *outside})
        tied = bool(getattr(self.model_config, "tie_word_embeddings", False))

        def read(name: str) -> NDArray[np.float32] | None:
            if tied and name == "lm_head.weight" and name not in self.checkpoint:
                return None
            return self.checkpoint.read_float32(name.replace(f"{self.prefix}.0.", f"{self.prefix}.{index}.", 1))

        fill(model, read)
        file = self.work / "start.npy" if index == 0 else None
        hidden, self._arguments[kind] = capture_inputs(model, blocks[0], ids, file=file)
        self._blocks[kind] = blocks[0]
        return hidden

    def open(self, index: int) -> tuple[Any, Any, Mapping[str, Any]]:
        """Reads a block and prepares a copy."""
        kind = self.kinds[index]
        teacher = self._blocks[kind]
        fill(teacher, lambda name: self.checkpoint.read_float32(f"{self.prefix}.{index}.{name}"))
        student = prepare_qat(copy.deepcopy(teacher), self.config)
        return teacher, student, self._arguments[kind]

    def close(self, index: int, trained: Any) -> None:
        """Writes a block, all or nothing."""
        tensors = {name: tensor.float().numpy() for name, tensor in trained.state_dict().items()}
        folder = self._folder(index)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that stopped between this and its record
        plan = [TensorPlan(name, "F32", tensor.shape) for name, tensor in tensors.items()]
        with CheckpointWriter(folder, plan) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)

    def write(self, out: Path) -> None:
        """Puts the blocks and what was not trained into one checkpoint."""
        start = f"{self.prefix}."
        copied = [name for name in self.checkpoint if not name.startswith(start)]
        trained = {index: Checkpoint.open(self._folder(index) / "model.safetensors") for index in range(self.count)}
        places = {f"{start}{index}.{name}": (index, name) for index, block in trained.items() for name in block}
        plan = [TensorPlan(i.name, i.dtype, i.shape) for i in map(self.checkpoint.info, copied)]
        plan += [TensorPlan(name, "F32", trained[index].info(local).shape) for name, (index, local) in places.items()]
        with CheckpointWriter(out, plan) as writer:
            for name in copied:
                writer.write(name, self.checkpoint.raw(name))
            for name, (index, local) in places.items():
                writer.write(name, trained[index].raw(local))
            stamp = self.config.stamp(self._dense())
            writer.write_json(
                "config.json", {**self.checkpoint.config, "quantization_config": stamp, "dtype": "float32"}
            )
            writer.copy_companions(self.checkpoint.path)

    def _dense(self) -> list[str]:
        """The linear layers that stay as they are, by their names in the model."""
        block = prepare_qat(copy.deepcopy(next(iter(self._blocks.values()))), self.config)
        chosen = {name for name, _ in qat_layers(block)}
        left = [name for name in linear_names(block, []) if name not in chosen]
        return [*self.kept, *(f"{self.prefix}.{index}.{name}" for index in range(self.count) for name in left)]

    def _folder(self, index: int) -> Path:
        return self.work / f"block_{index}"
