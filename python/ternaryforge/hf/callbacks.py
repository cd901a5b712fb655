# SPDX-License-Identifier: Apache-2.0
"""Callbacks of transformers' Trainer for models that `prepare_qat` prepared.

    Trainer(..., callbacks=[LambdaWarmupCallback(1000), TernaryMonitorCallback(every=100)])

All follow `state.global_step`, so that a resumed run goes on where it was, and each refuses to resume from a
checkpoint that was trained in another way: the Trainer itself loads what fits and says nothing.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ternaryforge.checkpoint import read_json
from ternaryforge.torch import (
    CodeMonitor,
    anneal_sharpness,
    clip_latents,
    residual_strength,
    set_residual,
    set_sharpness,
    set_strength,
    warmup_strength,
)
from ternaryforge.torch.qat import check_resumed
from ternaryforge.torch.schedules import Schedule


def _steps(amount: float, state: TrainerState, option: str) -> int:
    """Steps from an int, or from a float that is a share of the run."""
    if isinstance(amount, float):
        if not 0 <= amount <= 1:
            raise ValueError(f"[qat] {option}: a float is a share of the run, 0 to 1, got {amount}")
        return round(amount * state.max_steps)
    if amount < 0:
        raise ValueError(f"[qat] {option}: steps are not negative, got {amount}")
    return amount


def _add(state: TrainerState, kwargs: dict[str, Any], figures: dict[str, float]) -> None:
    """Adds figures to what reporters get next, and to the history, which holds a copy already."""
    for logs in (kwargs.get("logs"), state.log_history[-1] if state.log_history else None):
        if logs is not None:
            logs.update(figures)


class _TernaryCallback(TrainerCallback):
    """What all callbacks do: look at the checkpoint that a run goes on from."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises ValueError where the checkpoint of this step, in the usual place, has another configuration."""
        stamp = getattr(getattr(kwargs["model"], "config", None), "quantization_config", None)
        config = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / "config.json"
        if state.global_step and stamp is not None and config.is_file():
            stored = read_json(config).get("quantization_config") or {}
            check_resumed(stored, stamp if isinstance(stamp, dict) else stamp.to_dict())


class LambdaWarmupCallback(_TernaryCallback):
    """Blends from full precision to quantised over the first steps (an int, or a float: a share of the run).

    Logs `tf/lambda`. From the last step of the warm-up on the model is fully quantised.
    """

    def __init__(self, warmup_steps: float = 1000, schedule: Schedule = "linear") -> None:
        warmup_strength(0, 1, schedule)  # refuses an unknown one now, not in the middle of a run
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self._strength: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the strength of this step."""
        steps = _steps(self.warmup_steps, state, "warmup_steps")
        strength = warmup_strength(state.global_step, steps, self.schedule)
        self._strength = strength
        set_strength(kwargs["model"], strength if strength < 1 else None)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the strength to what is logged."""
        if self._strength is not None:
            _add(state, kwargs, {"tf/lambda": self._strength})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What is evaluated and saved is fully quantised."""
        set_strength(kwargs["model"], None)


class AnnealingCallback(_TernaryCallback):
    """Tanh annealing: sharpness 1 to 8 over a share of the run, then hard; clips latents after every step."""

    def __init__(self, anneal_steps: float = 0.3, *, first: float = 1.0, last: float = 8.0, clip: float = 1.2):
        self.anneal_steps = anneal_steps
        self.first, self.last, self.clip = first, last, clip

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the sharpness of this step."""
        steps = _steps(self.anneal_steps, state, "anneal_steps")
        set_sharpness(kwargs["model"], anneal_sharpness(state.global_step, steps, first=self.first, last=self.last))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Clips the latents."""
        clip_latents(kwargs["model"], self.clip)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What is evaluated and saved is hard."""
        set_sharpness(kwargs["model"], None)


class ResidualCallback(_TernaryCallback):
    """The Arenas residual of a model prepared with `residual=True`: up over a tenth of its steps, then to 0."""

    def __init__(self, residual_steps: float = 0.8, *, peak: float = 1.0) -> None:
        self.residual_steps, self.peak = residual_steps, peak

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the residual of this step."""
        steps = _steps(self.residual_steps, state, "residual_steps")
        set_residual(kwargs["model"], residual_strength(state.global_step, steps, peak=self.peak))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What is evaluated and saved has no residual."""
        set_residual(kwargs["model"], None)


class WeightDecayAnnealCallback(_TernaryCallback):
    """Ends weight decay after a share (float) or number (int) of steps, as BitNet's training tips say: half way."""

    def __init__(self, zero_at: float = 0.5) -> None:
        self.zero_at = zero_at

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets weight decay to zero in all groups of the optimizer once it is time."""
        if state.global_step >= _steps(self.zero_at, state, "zero_at"):
            for group in kwargs["optimizer"].param_groups:
                group["weight_decay"] = 0.0


class TernaryMonitorCallback(_TernaryCallback):
    """Logs zero fraction and code flips, `tf/zeros/...` and `tf/flips/...`, every so many steps.

    `flips` is the share of codes that changed since the last look; `history` keeps all looks by step.
    """

    def __init__(self, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"[qat] every is a number of steps, got {every}")
        self.every = every
        self.history: list[dict[str, float]] = []
        self._monitor: CodeMonitor | None = None
        self._figures: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the codes before training."""
        super().on_train_begin(args, state, control, **kwargs)
        self._monitor = CodeMonitor(kwargs["model"])
        self._monitor.look()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the codes when it is time."""
        if self._monitor is not None and state.global_step % self.every == 0:
            self._figures = {f"tf/{name}": value for name, value in self._monitor.look().items()}
            self.history.append({"step": state.global_step, **self._figures})

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the last figures to what is logged."""
        _add(state, kwargs, self._figures)
