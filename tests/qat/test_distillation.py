# SPDX-License-Identifier: Apache-2.0
"""Losses of distillation against NumPy, and their refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
from torch_setup import torch

from ternaryforge.torch import DistillationLoss, FeatureTap

BATCH, TOKENS, VOCAB, WIDTH = 2, 5, 7, 6


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def output(seed: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    hidden = tuple(torch.randn(BATCH, TOKENS, WIDTH, generator=generator) for _ in range(3))
    return SimpleNamespace(logits=torch.randn(BATCH, TOKENS, VOCAB, generator=generator), hidden_states=hidden)


STUDENT, TEACHER = output(0), output(1)
LABELS = torch.tensor([[1, 2, 3, 4, 5], [6, 0, 1, -100, -100]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
SCORED = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


def test_cross_entropy_and_kl() -> None:
    terms = DistillationLoss(ce=0.25, kl=0.75, temperature=2.0)(STUDENT, TEACHER, labels=LABELS)
    s, t = (x.logits.double().numpy() for x in (STUDENT, TEACHER))
    ce = np.mean([-np.log(softmax(s[b, i])[LABELS[b, i + 1]]) for b, i in SCORED])
    p, q = softmax(t / 2), softmax(s / 2)
    kl = np.mean([4 * (p[b, i] * np.log(p[b, i] / q[b, i])).sum() for b, i in SCORED])
    assert terms.ce.item() == pytest.approx(ce, rel=1e-5)
    assert terms.kl.item() == pytest.approx(kl, rel=1e-5)
    assert terms.total.item() == pytest.approx(0.25 * ce + 0.75 * kl, rel=1e-5)
    assert terms.off is None


def test_features_and_relations() -> None:
    s, t = ([h.double().numpy() for h in x.hidden_states] for x in (STUDENT, TEACHER))
    shown = MASK.bool().numpy()
    cosines = [
        (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        for a, b in zip(s[1:], t[1:], strict=True)
    ]
    off = np.mean([1 - c[shown].mean() for c in cosines])

    def relations(x: np.ndarray, batch: int, head: int) -> np.ndarray:
        part = x[batch][shown[batch]][:, head * 3 : head * 3 + 3]
        return softmax(part @ part.T / 3**0.5)

    rows = []
    for batch in range(BATCH):
        for head in range(2):
            ours, theirs = relations(s[0], batch, head), relations(t[0], batch, head)
            rows.extend((theirs * np.log(theirs / ours)).sum(-1))
    terms = DistillationLoss(kl=0, off=2.0, relations=3.0, relation_heads=2)(
        STUDENT,
        TEACHER,
        attention_mask=MASK,
        student_features={"q": STUDENT.hidden_states[0]},
        teacher_features={"q": TEACHER.hidden_states[0]},
    )
    assert terms.off.item() == pytest.approx(off, rel=1e-5)
    assert terms.relations.item() == pytest.approx(np.mean(rows), rel=1e-5)
    assert terms.total.item() == pytest.approx(2 * off + 3 * np.mean(rows), rel=1e-5)


def test_equal_models_have_no_loss_and_gradients_are_finite() -> None:
    loss = DistillationLoss(kl=1, off=1, relations=1)
    student = output(0)
    features = {"v": student.hidden_states[0].requires_grad_()}
    student.logits.requires_grad_()
    args = {"attention_mask": MASK, "student_features": features, "teacher_features": features}
    terms = loss(student, STUDENT, **args)
    assert terms.total.item() == pytest.approx(0, abs=1e-6)
    loss(student, TEACHER, **{**args, "teacher_features": {"v": TEACHER.hidden_states[0]}}).total.backward()
    assert torch.isfinite(student.logits.grad).all()
    assert torch.isfinite(features["v"].grad).all()


def test_a_tap_captures_while_it_is_open() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    x = torch.randn(2, 4)
    with FeatureTap(model, {"first": "0"}) as tap:
        model(x)
    assert torch.equal(tap.features["first"], model[0](x))
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match="no module '7'"):
        FeatureTap(model, {"first": "7"})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="one is positive"):
        DistillationLoss(kl=0)
    with pytest.raises(ValueError, match="ce needs labels"):
        DistillationLoss(ce=1)(STUDENT, TEACHER)
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        DistillationLoss(off=1)(SimpleNamespace(logits=STUDENT.logits), TEACHER)
    with pytest.raises(ValueError, match="FeatureTap"):
        DistillationLoss(relations=1)(STUDENT, TEACHER)
    with pytest.raises(ValueError, match="no token is scored"):
        DistillationLoss()(STUDENT, TEACHER, labels=torch.full((BATCH, TOKENS), -100))
    with pytest.raises(ValueError, match="one vocabulary"):
        DistillationLoss()(STUDENT, SimpleNamespace(logits=TEACHER.logits[..., :3]))
    features = {"q": STUDENT.hidden_states[0]}
    loss = DistillationLoss(relations=1, relation_heads=4)
    with pytest.raises(ValueError, match="does not divide the width"):
        loss(STUDENT, TEACHER, student_features=features, teacher_features=features)
