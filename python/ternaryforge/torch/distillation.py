# SPDX-License-Identifier: Apache-2.0
"""Losses that let a full-precision teacher guide a model in training.

loss = DistillationLoss(kl=1.0)
terms = loss(student(ids), teacher(ids), labels=ids)
terms.total.backward()
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
"""The label of a token that is not scored, as in transformers."""


@dataclass(frozen=True, slots=True)
class DistillationTerms:
    """`total` is the weighted sum, to be differentiated; the others are its parts, unweighted, None where unused."""

    total: Tensor
    ce: Tensor | None = None
    kl: Tensor | None = None
    off: Tensor | None = None
    relations: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """total = ce CE + kl KL + off OFF + relations MiniLM, means over the scored tokens.

    - CE: -log p_student(next token).
    - KL: forward, t^2 sum p_teacher (log p_teacher - log p_student) over the whole vocabulary, both at temperature t.
    - OFF (TernaryLLM, arXiv:2406.07177): 1 - cos(student's, teacher's hidden state), mean over all layers' outputs;
      a cosine does not see the scale of a feature, nor do few outliers rule it. Needs `output_hidden_states=True`.
    - MiniLM (arXiv:2012.15828): KL of softmax(A A' / sqrt(d)), teacher's and student's, summed over the captured A
      (queries, keys, values of one late layer: `FeatureTap`), cut into `relation_heads` heads.

    `relation_heads` must divide the width of every captured A; teacher and student may differ in width.
    """

    ce: float = 0.0
    kl: float = 1.0
    off: float = 0.0
    relations: float = 0.0
    temperature: float = 1.0
    relation_heads: int = 1

    def __post_init__(self) -> None:
        weights = (self.ce, self.kl, self.off, self.relations)
        if min(weights) < 0 or not max(weights) > 0:
            raise ValueError(f"[distillation] weights are not negative and one is positive, got {weights}")
        if not self.temperature > 0 or self.relation_heads < 1:
            raise ValueError(
                "[distillation] temperature and relation_heads are positive, got "
                f"{self.temperature} and {self.relation_heads}"
            )

    def __call__(
        self,
        student: Any,
        teacher: Any,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        student_features: Mapping[str, Tensor] | None = None,
        teacher_features: Mapping[str, Tensor] | None = None,
    ) -> DistillationTerms:
        """The loss of two outputs with `.logits` [batch, tokens, vocab] and, for OFF, `.hidden_states`.

        `labels` [batch, tokens] are the tokens themselves, as in transformers: position i is scored on
        label i + 1 unless that is -100. Without labels every position but the last counts that
        `attention_mask` shows. Raises ValueError where a term lacks what it needs.
        """
        scored = _scored(student.logits, labels, attention_mask)
        if not scored.any():
            raise ValueError("[distillation] no token is scored: all labels are -100 or the texts have one token")
        terms: dict[str, Tensor] = {}
        logits = student.logits[:, :-1][scored].float()
        if self.ce:
            if labels is None:
                raise ValueError("[distillation] ce needs labels")
            terms["ce"] = F.cross_entropy(logits, labels[:, 1:][scored])
        if self.kl:
            terms["kl"] = forward_kl(logits, teacher.logits[:, :-1][scored].float(), self.temperature)
        if self.off:
            terms["off"] = off_loss(_hidden(student, "student"), _hidden(teacher, "teacher"), attention_mask)
        if self.relations:
            if not student_features or not teacher_features:
                raise ValueError("[distillation] relations needs student_features and teacher_features (FeatureTap)")
            terms["relations"] = relation_loss(student_features, teacher_features, self.relation_heads, attention_mask)
        total = torch.stack([getattr(self, name) * value for name, value in terms.items()]).sum()
        return DistillationTerms(total, **{name: value.detach() for name, value in terms.items()})


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of t^2 KL(teacher || student) for logits [tokens, vocab]."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"[distillation] student and teacher have logits of {tuple(student.shape)} and {tuple(teacher.shape)}: "
            "they need one vocabulary"
        )
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def off_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None = None) -> Tensor:
    """Mean of 1 - cosine over layers and shown tokens of hidden states [batch, tokens, width]."""
    if len(student) != len(teacher):
        raise ValueError(f"[distillation] student and teacher have {len(student)} and {len(teacher)} hidden states")
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        cosine = F.cosine_similarity(ours.float(), theirs.float(), dim=-1)
        losses.append(1 - (cosine if mask is None else cosine[mask.bool()]).mean())
    return torch.stack(losses).mean()


def relation_loss(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], heads: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Sum over the captured names of the mean KL of attention relations; features [batch, tokens, width]."""
    if student.keys() != teacher.keys():
        raise ValueError(f"[distillation] captured {sorted(student)} of the student, {sorted(teacher)} of the teacher")
    losses = []
    for name, features in student.items():
        ours = _relations(features.float(), heads, mask)
        theirs = _relations(teacher[name].float(), heads, mask)
        divergence = (theirs.exp() * (theirs - ours)).nan_to_num().sum(-1)
        rows = divergence if mask is None else divergence.transpose(1, 2)[mask.bool()]
        losses.append(rows.mean())
    return torch.stack(losses).sum()


def _relations(features: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Returns log softmax(A A' / sqrt(d)), [batch, heads, tokens, tokens]."""
    if features.shape[-1] % heads:
        raise ValueError(f"[distillation] relation_heads {heads} does not divide the width {features.shape[-1]}")
    parts = features.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) / math.sqrt(parts.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], -math.inf)
    return F.log_softmax(scores, dim=-1)


def _scored(logits: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which positions but the last are scored, [batch, tokens - 1]."""
    if labels is not None:
        return labels[:, 1:] != IGNORED
    if mask is not None:
        return mask[:, 1:].bool()
    return torch.ones(logits.shape[0], logits.shape[1] - 1, dtype=torch.bool, device=logits.device)


def _hidden(output: Any, who: str) -> tuple[Tensor, ...]:
    hidden: tuple[Tensor, ...] | None = getattr(output, "hidden_states", None)
    if not hidden:
        raise ValueError(f"[distillation] off needs hidden states of the {who}: call it with output_hidden_states=True")
    return hidden[1:]  # the first are the embeddings


class FeatureTap:
    """Captures outputs of named modules while it is open; `features` holds those of the last forward pass.

    with FeatureTap(model, {k: f"model.layers.10.self_attn.{k}_proj" for k in "qkv"}) as tap:
        output = model(ids)
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, str]) -> None:
        known = dict(model.named_modules())
        if missing := [path for path in modules.values() if path not in known]:
            raise ValueError(f"[distillation] the model has no module '{missing[0]}'")
        self.features: dict[str, Tensor] = {}
        self._modules = {name: known[path] for name, path in modules.items()}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                self.features[name] = output

            return hook

        self._handles = [module.register_forward_hook(keep(name)) for name, module in self._modules.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def teacher_output(teacher: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What the teacher says to a batch, without a graph."""
    return teacher(**inputs)
