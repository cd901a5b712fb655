# SPDX-License-Identifier: Apache-2.0
"""Block-wise training: each decoder block learns to give what the full-precision block gives, one after the other.

    prepare_qat(student, QATConfig(quantizer="lsq", scale="group", group_size=64, activation_bits=None))
    hidden, arguments = capture_inputs(student, student.model.layers[0], ids)
    blocks = BlocksInMemory(teacher.model.layers, student.model.layers, arguments)
    train_blocks(blocks, hidden, BlockwiseOptions())
    tune_scales(student, teacher, sequences, TuningOptions(tokens=400_000))      # end to end, codes fixed

Block-AP of EfficientQAT (arXiv:2407.11062); `tune_scales` of `ternaryforge.torch.tuning` is its second stage. Only one
block is trained at a time; with a folder, hidden states lie in files, and a run that was stopped goes on after its
last finished block. `ternaryforge.hf.train_blockwise` reads the blocks of a checkpoint one by one.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor, nn

from ternaryforge.torch.qat import qat_layers

_MEASURED = 64  # sequences on which the error of a block is reported
_BETAS = (0.9, 0.95)

Float32 = NDArray[np.float32]
Progress = Callable[[int, int, "BlockError"], None]


@dataclass(frozen=True, slots=True)
class BlockwiseOptions:
    """How each block is trained.

    `weight_rate` is the learning rate of AdamW for latents, norms and biases, `scale_rate` that of what quantizers
    learn; both fall by half a cosine to the share `last_rate`. The defaults are the paper's for models of 7 G
    parameters and more; small models want more. A step takes `batch` sequences; `clip` is the largest norm of the
    gradients.
    """

    epochs: int = 2
    batch: int = 2
    weight_rate: float = 2e-5
    scale_rate: float = 1e-4
    last_rate: float = 0.05
    clip: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not self.clip > 0:
            raise ValueError(
                f"[blockwise] epochs, batch and clip are positive, got {self.epochs}, {self.batch} and {self.clip}"
            )
        if min(self.weight_rate, self.scale_rate) < 0 or not 0 <= self.last_rate <= 1:
            raise ValueError(
                "[blockwise] rates are not negative and last_rate is a share, got "
                f"{self.weight_rate}, {self.scale_rate} and {self.last_rate}"
            )


@dataclass(frozen=True, slots=True)
class BlockError:
    """Mean squared error of a block's output over its mean square, before and after its training."""

    before: float
    after: float


class BlockSource(Protocol):
    """Where blocks come from and go to."""

    def __len__(self) -> int:
        """How many blocks there are."""

    def open(self, index: int) -> tuple[nn.Module, nn.Module, Mapping[str, Any]]:
        """The full-precision block, the prepared one, and the arguments that both are called with."""

    def close(self, index: int, trained: nn.Module) -> None:
        """Keeps a trained block."""


class BlocksInMemory:
    """Blocks of two models that are in memory; the student's are trained where they are."""

    def __init__(
        self, teacher: Sequence[nn.Module], student: Sequence[nn.Module], arguments: Mapping[str, Any]
    ) -> None:
        if len(teacher) != len(student):
            raise ValueError(f"[blockwise] teacher and student have {len(teacher)} and {len(student)} blocks")
        self.teacher, self.student, self.arguments = teacher, student, arguments

    def __len__(self) -> int:
        return len(self.teacher)

    def open(self, index: int) -> tuple[nn.Module, nn.Module, Mapping[str, Any]]:
        """See `BlockSource`."""
        return self.teacher[index], self.student[index], self.arguments

    def close(self, index: int, trained: nn.Module) -> None:
        """Nothing to do: the block is where it was."""


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one list of blocks of a decoder and its name, such as `model.layers`. Raises ValueError for none or more."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in {"layers", "h", "blocks"}
    ]
    if len(found) != 1:
        raise ValueError(f"[blockwise] a {type(model).__name__} has {len(found)} lists of decoder blocks, not one")
    return found[0]


@torch.no_grad()
def fill(module: nn.Module, read: Callable[[str], NDArray[np.float32] | None]) -> None:
    """Sets every tensor of `module` from `read(name)`; None leaves it."""
    for name, tensor in module.state_dict().items():
        values = read(name)
        if values is not None:
            tensor.copy_(torch.from_numpy(np.array(values)))


class _Reached(BaseException):
    """Ends a forward pass at its first block; no error, so that no model catches it."""


@torch.no_grad()
def capture_inputs(
    model: nn.Module, block: nn.Module, ids: NDArray[Any], *, file: str | os.PathLike[str] | None = None
) -> tuple[Float32, dict[str, Any]]:
    """Hidden states [sequences, length, width] and arguments with which `model` calls its first `block`.

    `ids` [sequences, length] are whole sequences without padding: the arguments are those of a single one, and serve
    batches of any size. The model is called as `model(ids, use_cache=False)`. With a `file` (.npy) the states lie
    there instead of in memory.
    """
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        found.append((hidden, rest))
        raise _Reached

    states: Float32 = np.empty(0, np.float32)
    arguments: dict[str, Any] = {}
    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for i, row in enumerate(ids):
            try:
                model(torch.from_numpy(np.asarray(row, np.int64))[None].to(_device(model)), use_cache=False)
            except _Reached:
                hidden, arguments = found.pop()
            else:
                raise ValueError("[blockwise] the model does not call the block that was given as its first")
            if i == 0:
                shape = (len(ids), *hidden.shape[1:])
                states = np.empty(shape, np.float32) if file is None else _new_file(Path(file), shape)
            states[i] = hidden[0].float().cpu().numpy()
    finally:
        hook.remove()
    return states, arguments


def train_blocks(
    source: BlockSource,
    hidden: Float32,
    options: BlockwiseOptions,
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[BlockError]:
    """Trains all blocks in order and returns the error of each.

    Block i gets, as input, what the trained blocks before it give and, as goal, what the full-precision block gives for
    what the full-precision blocks before it give. `hidden` [sequences, length, width] goes into the first.

    With a `folder` (made if need be) hidden states lie there instead of in memory, and a later call with the same
    options and inputs goes on after the last finished block, whose `close` was called. `progress` gets the blocks
    done, all, and the last one's error. Raises ValueError where `folder` belongs to another run, or errors grow to NaN.
    """
    run = _Run(None if folder is None else Path(folder), hidden, options)
    for index in range(run.done, len(source)):
        teacher, student, arguments = source.open(index)
        wanted, outputs = run.array("exact", index + 1), run.array("quantized", index + 1)
        _run_block(teacher, run.exact, wanted, arguments, options.batch)
        error = train_block(student, run.quantized, wanted, options, arguments=arguments, seed=options.seed + index)
        _run_block(student, run.quantized, outputs, arguments, options.batch)
        source.close(index, student)
        run.finish(index, error, wanted, outputs)
        if progress is not None:
            progress(index + 1, len(source), error)
    return run.errors


def train_block(
    block: nn.Module,
    inputs: Float32,
    wanted: Float32,
    options: BlockwiseOptions,
    *,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> BlockError:
    """Trains one prepared block to give `wanted` for `inputs`, both [sequences, length, width]."""
    arguments = arguments or {}
    learned = {id(p) for _, layer in qat_layers(block) for p in layer.quantizer.parameters()}
    if not any(True for _ in qat_layers(block)):
        raise ValueError("[blockwise] the block has no ternary layers: prepare_qat the model first")
    block.requires_grad_(requires_grad=True)
    parameters = list(block.parameters())
    rates = (
        ([p for p in parameters if id(p) not in learned], options.weight_rate),
        ([p for p in parameters if id(p) in learned], options.scale_rate),
    )
    groups: list[dict[str, Any]] = [{"params": params, "lr": rate} for params, rate in rates if params]
    optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)
    first = [group["lr"] for group in optimizer.param_groups]
    random = np.random.default_rng(seed)
    before = _error(block, inputs, wanted, arguments, options.batch)
    steps = options.epochs * -(-len(inputs) // options.batch)
    step = 0
    for _ in range(options.epochs):
        order = random.permutation(len(inputs))
        for begin in range(0, len(order), options.batch):
            share = options.last_rate + (1 - options.last_rate) * (1 + math.cos(math.pi * step / steps)) / 2
            for group, rate in zip(optimizer.param_groups, first, strict=True):
                group["lr"] = rate * share
            chosen = np.sort(order[begin : begin + options.batch])
            loss = nn.functional.mse_loss(_call(block, inputs[chosen], arguments), _tensor(wanted[chosen], block))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, options.clip)
            optimizer.step()
            step += 1
    after = _error(block, inputs, wanted, arguments, options.batch)
    if not math.isfinite(after):
        raise ValueError("[blockwise] training has led to NaN or infinity: lower the learning rates")
    return BlockError(before, after)


class _Run:
    """The hidden states between two blocks and what is done, in memory or in a folder."""

    def __init__(self, folder: Path | None, hidden: Float32, options: BlockwiseOptions) -> None:
        self.folder = folder
        self.errors: list[BlockError] = []
        self._shape = hidden.shape
        self._key = {
            "options": asdict(options),
            "shape": list(hidden.shape),
            "sum": float(hidden.sum(dtype=np.float64)),
        }
        self.exact: Float32 = hidden
        self.quantized: Float32 = hidden
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "blockwise.json"
        if not record.is_file():
            return
        stored = json.loads(record.read_text(encoding="utf-8"))
        if stored["run"] != self._key:
            raise ValueError(
                f"[blockwise] '{record}' is of another run ({stored['run']}): take its options and texts, or another"
            )
        self.errors = [BlockError(**error) for error in stored["errors"]]
        self.exact, self.quantized = (np.load(self._file(name, self.done), mmap_mode="r") for name in _SIDES)

    @property
    def done(self) -> int:
        """How many blocks are finished."""
        return len(self.errors)

    def array(self, name: str, index: int) -> Float32:
        """Room for the outputs of the blocks up to `index`."""
        if self.folder is None:
            return np.empty(self._shape, np.float32)
        return _new_file(self._file(name, index), self._shape)

    def finish(self, index: int, error: BlockError, exact: Float32, quantized: Float32) -> None:
        """Takes a block as done; the record is written last, so that it never promises too much."""
        self.errors.append(error)
        self.exact, self.quantized = exact, quantized
        if self.folder is None:
            return
        for array in (exact, quantized):
            if isinstance(array, np.memmap):
                array.flush()
        record = self.folder / "blockwise.json"
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps({"run": self._key, "errors": list(map(asdict, self.errors))}), encoding="utf-8")
        partial.replace(record)
        for name in _SIDES:
            self._file(name, index).unlink(missing_ok=True)

    def _file(self, name: str, index: int) -> Path:
        return Path(self.folder or "") / f"{name}_{index}.npy"


_SIDES = ("exact", "quantized")


def _new_file(file: Path, shape: tuple[int, ...]) -> Float32:
    return open_memmap(file, "w+", np.float32, shape)


@torch.no_grad()
def _run_block(block: nn.Module, inputs: Float32, outputs: Float32, arguments: Mapping[str, Any], batch: int) -> None:
    for begin in range(0, len(inputs), batch):
        part = slice(begin, begin + batch)
        outputs[part] = _call(block, inputs[part], arguments).float().cpu().numpy()


@torch.no_grad()
def _error(block: nn.Module, inputs: Float32, wanted: Float32, arguments: Mapping[str, Any], batch: int) -> float:
    error = energy = 0.0
    for begin in range(0, min(len(inputs), _MEASURED), batch):
        part = slice(begin, begin + batch)
        goal = _tensor(wanted[part], block)
        error += float((_call(block, inputs[part], arguments) - goal).square().sum())
        energy += float(goal.square().sum())
    return error / max(energy, 1e-30)


def _call(block: nn.Module, inputs: Float32, arguments: Mapping[str, Any]) -> Tensor:
    output = block(_tensor(inputs, block), **arguments)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _tensor(values: Float32, module: nn.Module) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32)).to(_device(module))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
