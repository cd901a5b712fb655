# SPDX-License-Identifier: Apache-2.0
"""The model class for lm-eval, with a stand-in for its base class and registry."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ternaryforge as tf


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    names: dict[str, Any] = {}

    def register_model(name: str) -> Any:
        def decorate(cls: Any) -> Any:
            names[name] = cls
            return cls

        return decorate

    modules = {
        name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    }
    modules["lm_eval.api.model"].LM = type("LM", (), {})  # type: ignore[attr-defined]
    modules["lm_eval.api.registry"].register_model = register_model  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ternaryforge.lm_eval_model", raising=False)
    importlib.import_module("ternaryforge.lm_eval_model")
    monkeypatch.delitem(sys.modules, "ternaryforge.lm_eval_model")
    return names


def ask(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_scores_and_texts(registered: dict[str, Any]) -> None:
    lm = registered["ternaryforge"](pretrained="demo", threads=1, batch_size=1, device=None)
    model = tf.TernaryModel.demo(threads=1)
    text = "Once upon a time, there was a little girl"
    ids = model.encode(text)
    logits = model.logits(ids).astype(np.float64)
    logs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logs -= logits.max(-1, keepdims=True)
    each = np.array([logs[i - 1, ids[i]] for i in range(1, len(ids))])
    assert lm.loglikelihood_rolling([ask(text)]) == pytest.approx([each.sum()], rel=1e-5)
    first = len(model.encode("Once upon a"))
    [(score, greedy), (worse, unlikely)] = lm.loglikelihood(
        [ask("Once upon a", text.removeprefix("Once upon a")), ask("Once upon a", " zebra")]
    )
    assert score == pytest.approx(each[first - 1 :].sum(), rel=1e-5)
    assert greedy == all(logs[i - 1].argmax() == ids[i] for i in range(first, len(ids)))
    assert (worse < 0, unlikely) == (True, False)
    [plain, stopped] = lm.generate_until(
        [
            ask(text, {"max_gen_toks": 12, "until": []}),
            ask(text, {"max_gen_toks": 12, "until": [" "], "temperature": 0}),
        ]
    )
    assert plain == model.generate(text, max_new_tokens=12).text
    assert stopped == model.generate(text, max_new_tokens=12, stop=[" "]).text


def test_long_texts_are_scored_once_a_token(registered: dict[str, Any]) -> None:
    """Windows of the context, the last of which looks back as far as it can."""
    lm = registered["ternaryforge"]("demo", threads=1)
    model, size = lm.model, lm.model.context_length
    text = "The dog ran to the big tree and saw a bird. " * (size // 8)
    ids = model.encode(text)
    assert size < len(ids) < 3 * size
    total, scored = 0.0, 1
    for end in [*range(size, len(ids), size - 1), len(ids)]:
        begin = max(0, end - size)
        logits = model.logits(ids[begin:end]).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total += sum(logs[i - begin - 1, ids[i]] for i in range(scored, end))
        scored = end
    assert lm.loglikelihood_rolling([ask(text)]) == pytest.approx([total], rel=1e-5)
