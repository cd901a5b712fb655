# SPDX-License-Identifier: Apache-2.0
"""Tuning by distillation: codes stay, scales and norms are trained to give what a full-precision teacher gives.

    linears = {name: TunedLinear(codes, scales, blocks) for ...}
    install(model, linears)
    tune(model, teacher, [*scale_groups(linears), ...], sequences, TuningOptions(tokens=800_000))

The end-to-end stage of EfficientQAT (arXiv:2407.11062), with the divergence from a teacher as its loss. It needs
nothing but linear layers that have names and a model that gives `.logits`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ternaryforge.quantization import ScaleKind
from ternaryforge.torch.distillation import IGNORED, DistillationLoss
from ternaryforge.torch.qat import QATLinear, qat_layers, quantize_activations
from ternaryforge.torch.quantizers import Codes
from ternaryforge.torch.scale_blocks import ScaleBlocks

_BATCHES_AT_ONCE = 16  # among so many batches, sequences of like length come together
_KEPT_STEPS = 50
_EPSILON = 1e-10  # of Adam: gradients of single scales are small

Float32 = NDArray[np.float32]
State = dict[str, NDArray[Any]]
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class TuningOptions:
    """How scales and norms are trained.

    `scale_rate` and `norm_rate` are learning rates of Adam for the relative change of a scale and for the
    gain of a norm; both rise over the share `warmup` of the tokens and fall to 0 by half a cosine. A step
    takes `batch` sequences.
    """

    tokens: int
    scale_rate: float = 3e-2
    norm_rate: float = 3e-2
    warmup: float = 0.05
    batch: int = 2
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.batch < 1 or not 0 <= self.warmup < 1:
            raise ValueError(
                f"[tune] tokens and batch are positive and warmup lies in 0 to 1, got {self.tokens}, {self.batch} and "
                f"{self.warmup}"
            )
        if min(self.scale_rate, self.norm_rate) < 0:
            raise ValueError(f"[tune] rates are not negative, got {self.scale_rate} and {self.norm_rate}")

    def share(self, done: float) -> float:
        """Of the learning rates, when the share `done` of all tokens was seen."""
        if done < self.warmup:
            return done / self.warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - self.warmup) / (1 - self.warmup))))


class TunedLinear(nn.Module):
    """A linear layer of fixed codes [rows, cols]; `change` is what training adds to each scale, relative to it."""

    codes: Tensor
    start: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        blocks: ScaleBlocks,
        *,
        bias: Tensor | None = None,
        activation_bits: int | None = None,
    ) -> None:
        super().__init__()
        if codes.shape != (blocks.rows, blocks.cols) or scales.numel() != blocks.count:
            raise ValueError(
                f"[tune] codes are {[blocks.rows, blocks.cols]} with {blocks.count} scales, got {list(codes.shape)} "
                f"with {scales.numel()}"
            )
        self.blocks = blocks
        self.activation_bits = activation_bits
        self.register_buffer("codes", blocks.split(codes), persistent=False)
        self.register_buffer("start", scales.float().reshape(-1, 1), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.start))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @torch.no_grad()
    def encode(self) -> Codes:
        """Codes and scales as they are now, by block; a scale that fell below zero turns its codes round."""
        scales = self.start * (1 + self.change)
        return Codes(torch.where(scales < 0, -self.codes, self.codes), scales.abs())

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 # nn.Linear's name
        """Input [..., cols] to [..., rows]."""
        if self.activation_bits == 8:
            input = quantize_activations(input)  # noqa: A001 # as above
        weight = self.blocks.join(self.codes * (self.start * (1 + self.change)))
        return F.linear(input, weight, self.bias)


def install(model: nn.Module, linears: Mapping[str, TunedLinear], norms: Sequence[str]) -> list[nn.Parameter]:
    """Puts `linears` into `model` by name and freezes all but their scales and `norms`, which it returns.

    A linear layer keeps its bias. Raises ValueError where the model has no such layer or parameter.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    if missing := [*(linears.keys() - modules.keys()), *(set(norms) - parameters.keys())]:
        raise ValueError(f"[tune] the model has no '{min(missing)}'")
    model.requires_grad_(requires_grad=False)
    for name, linear in linears.items():
        linear.bias = cast("nn.Parameter | None", modules[name].bias)
        model.set_submodule(name, linear)
    gains = [parameters[name] for name in norms]
    for gain in gains:
        gain.requires_grad = True
    return gains


def tune(
    student: nn.Module,
    teacher: nn.Module,
    sequences: Sequence[NDArray[np.int32]],
    options: TuningOptions,
    *,
    norms: Sequence[nn.Parameter] = (),
    state: State | None = None,
    keep: Callable[[State], None] | None = None,
    progress: Progress | None = None,
) -> float:
    """Trains the scales of all `TunedLinear` in `student`, and `norms`; returns the mean divergence of the last tenth.

    Both models take ids [batch, tokens] and give `.logits`; the loss is the mean KL(teacher || student) of the next
    token. `sequences` are gone through in a random order, again and again, until `options.tokens` were seen.

    `keep` gets now and then all that a later call needs as `state` to go on from there; the result is then the same.
    `progress` gets the tokens seen, their number, and the loss.
    """
    scales = [module.change for module in student.modules() if isinstance(module, TunedLinear)]
    rates = ((scales, options.scale_rate), (list(norms), options.norm_rate))
    groups: list[dict[str, Any]] = [{"params": params, "lr": rate} for params, rate in rates if params]
    optimizer = torch.optim.Adam(groups, betas=options.betas, eps=_EPSILON)
    first = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    done = 0 if state is None else _restore(state, optimizer, parameters)
    loss_of, losses = DistillationLoss(kl=1.0), [] if state is None else list(state["losses"])
    seen = 0
    for step, (ids, labels, tokens) in enumerate(_batches(sequences, options)):
        seen += tokens
        if step < done:
            continue
        share = options.share(min(1.0, seen / options.tokens))
        for group, rate in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = rate * share
        with torch.no_grad():
            wanted = teacher(ids)
        terms = loss_of(student(ids), wanted, labels=labels)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        losses.append(float(terms.total.detach()))
        if keep is not None and (step + 1) % _KEPT_STEPS == 0:
            keep(_state(optimizer, parameters, losses))
        if progress is not None:
            progress(min(seen, options.tokens), options.tokens, losses[-1])
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise ValueError("[tune] training has led to NaN or infinity: lower the learning rates")
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def tune_scales(
    model: nn.Module,
    teacher: nn.Module,
    sequences: Sequence[NDArray[np.int32]],
    options: TuningOptions,
    *,
    state: State | None = None,
    keep: Callable[[State], None] | None = None,
    progress: Progress | None = None,
) -> float:
    """Trains nothing but the scales of a model that `prepare_qat` prepared, end to end; its codes stay.

    The second stage of EfficientQAT. The rest as of `tune`; afterwards the latents are such that the quantizer gives
    these codes and scales. Raises ValueError for a model without such layers, one in
    the middle of a schedule, and a quantizer that cannot hold scales apart from its latents.
    """
    layers = dict(qat_layers(model))
    if not layers:
        raise ValueError("[tune] the model has no ternary layers: prepare_qat it first")
    linears = {name: _tuned(name, layer) for name, layer in layers.items()}
    trained = {name: value.requires_grad for name, value in model.named_parameters()}
    install(model, linears, ())
    try:
        divergence = tune(model, teacher, sequences, options, state=state, keep=keep, progress=progress)
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        for name, value in model.named_parameters():
            value.requires_grad = trained[name]
    with torch.no_grad():
        for name, layer in layers.items():
            quantizer = layer.quantizer
            layer.weight.copy_(quantizer.blocks.join(quantizer.hold(linears[name].encode())))
    return divergence


def _tuned(name: str, layer: QATLinear) -> TunedLinear:
    """The codes and scales of a prepared layer, once it is sure that the layer can hold others."""
    quantizer = layer.quantizer
    if layer.strength is not None or layer.residual is not None or layer.sub_norm is not None:
        raise ValueError(f"[tune] '{name}' has a strength, a residual or a norm of its own: end the schedule first")
    if quantizer.has_output_bias:
        raise ValueError(
            f"[tune] '{name}': the quantizer {layer.qat.quantizer!r} makes a bias of its latents: use another"
        )
    blocks = quantizer.blocks
    encoded = quantizer.encode(blocks.split(layer.weight.detach().float()))
    try:
        copy.deepcopy(quantizer).hold(encoded)
    except ValueError as error:
        raise ValueError(f"[tune] '{name}': the quantizer {layer.qat.quantizer!r}: {error}") from None
    return TunedLinear(blocks.join(encoded.codes), encoded.scale, blocks, activation_bits=layer.qat.activation_bits)


@dataclass(frozen=True, slots=True)
class TunedValues:
    """By layer, codes [rows, cols] and scales, [1], [rows] or [rows, groups]; norms by the name of their parameter."""

    layers: Mapping[str, tuple[NDArray[np.int8], Float32]]
    norms: Mapping[str, Float32]
    divergence: float


def tune_model(
    teacher: nn.Module,
    layers: Mapping[str, tuple[NDArray[np.int8], Float32]],
    norms: Sequence[str],
    sequences: Sequence[NDArray[np.int32]],
    options: TuningOptions,
    *,
    scale: ScaleKind,
    group_size: int,
    activation_bits: int | None,
    threads: int,
    state: State | None = None,
    keep: Callable[[State], None] | None = None,
    progress: Progress | None = None,
) -> TunedValues:
    """Trains the scales of `layers`, which are codes and scales by module, and `norms` against a frozen `teacher`.

    The rest as of `tune`, which trains a copy of the teacher. Only norms and codes take memory of their own: all
    else is the teacher's. Raises ValueError where the teacher has no such module.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shared = {id(value): value for name, value in teacher.named_parameters() if name not in norms}
        student = copy.deepcopy(teacher, shared)
        linears = {
            name: TunedLinear(
                torch.from_numpy(codes),
                torch.from_numpy(scales),
                ScaleBlocks(codes.shape[0], codes.shape[1], scale, group_size),
                activation_bits=activation_bits,
            )
            for name, (codes, scales) in layers.items()
        }
        gains = install(student, linears, norms)
        divergence = tune(student, teacher, sequences, options, norms=gains, state=state, keep=keep, progress=progress)
    finally:
        torch.set_num_threads(before)
    encoded = {name: (linear.blocks, linear.encode()) for name, linear in linears.items()}
    return TunedValues(
        layers={
            name: (blocks.join(codes.codes).contiguous().numpy(), codes.scale.reshape(blocks.scale_shape).numpy())
            for name, (blocks, codes) in encoded.items()
        },
        norms={name: gain.detach().numpy() for name, gain in zip(norms, gains, strict=True)},
        divergence=divergence,
    )


def _batches(sequences: Sequence[NDArray[np.int32]], options: TuningOptions) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Ids and labels [batch, longest], and the number of tokens, until enough were given."""
    usable = [ids for ids in sequences if len(ids) > 1]
    if not usable:
        raise ValueError("[tune] there must be sequences of at least 2 tokens, got none")
    random = np.random.default_rng(options.seed)
    given = 0
    while True:
        order = random.permutation(len(usable))
        for begin in range(0, len(order), options.batch * _BATCHES_AT_ONCE):
            part = sorted(order[begin : begin + options.batch * _BATCHES_AT_ONCE], key=lambda i: len(usable[i]))
            batches = [part[i : i + options.batch] for i in range(0, len(part), options.batch)]
            for i in random.permutation(len(batches)):
                chosen = [usable[j] for j in batches[i]]
                tokens = sum(map(len, chosen))
                given += tokens
                yield (*_pad(chosen), tokens)
                if given >= options.tokens:
                    return


def _pad(sequences: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = labels[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return ids, labels


def _state(optimizer: torch.optim.Adam, parameters: Sequence[Tensor], losses: Sequence[float]) -> State:
    state: State = {"losses": np.array(losses)}
    for i, parameter in enumerate(parameters):
        moments = optimizer.state[parameter]
        state[f"{i}.value"] = parameter.detach().numpy().copy()
        state[f"{i}.mean"], state[f"{i}.square"] = (moments[key].numpy().copy() for key in ("exp_avg", "exp_avg_sq"))
    return state


@torch.no_grad()
def _restore(state: State, optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> int:
    """Puts back what `_state` kept; returns the number of steps that are done."""
    done = len(state["losses"])
    for i, parameter in enumerate(parameters):
        parameter.copy_(torch.from_numpy(state[f"{i}.value"]))
        optimizer.state[parameter] = {
            "step": torch.tensor(float(done)),
            "exp_avg": torch.from_numpy(state[f"{i}.mean"].copy()),
            "exp_avg_sq": torch.from_numpy(state[f"{i}.square"].copy()),
        }
    return done
