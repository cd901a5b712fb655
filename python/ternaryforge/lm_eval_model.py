# SPDX-License-Identifier: Apache-2.0
"""Our models in lm-eval, by the name `ternaryforge`; importing this file registers them. Needs lm-eval.

import lm_eval, ternaryforge.lm_eval_model
lm_eval.simple_evaluate("ternaryforge", model_args="pretrained=model-ternary,threads=2", tasks=["arc_easy"])
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ternaryforge import _core
from ternaryforge.model import TernaryModel
from ternaryforge.tasks import log_probability

_NEW_TOKENS = 256  # where a task does not say how many


@register_model("ternaryforge")
class TernaryForgeLM(LM):
    """A model for lm-eval; `options` are those of `TernaryModel.from_pretrained`, lm-eval's own are ignored."""

    def __init__(self, pretrained: str, threads: int | None = None, activations: Any = None, **_: Any) -> None:
        super().__init__()
        self.model = TernaryModel.from_pretrained(pretrained, threads=threads, activations=activations)

    @property
    def tokenizer_name(self) -> str:
        """What distinguishes cached requests."""
        return str(self.model.path)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log p of a continuation behind a context, and whether it is the likeliest token by token."""
        return [log_probability(self.model, *request.args, greedy=True) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log p of whole texts; every token is scored once, the last window looks back as far as it can."""
        return [self._score(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Continues texts; the context loses what does not fit at its beginning."""
        return [self._generate(*request.args) for request in requests]

    def _score(self, text: str) -> float:
        ids, size = self.model.encode(text), self.model.context_length
        total, scored = 0.0, 1  # the first token is the one that starts a text, or has nothing before it
        while scored < len(ids):
            end = min(len(ids), scored - 1 + size)
            begin = max(0, end - size)
            scores = _core.runtime.score(self.model.transformer, np.asarray(ids[begin:end], np.int32))
            total += float(scores[scored - begin - 1 :].sum(dtype=np.float64))
            scored = end
        return total

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or ()
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        count = min(int(options.get("max_gen_toks", _NEW_TOKENS)), self.model.context_length - 1)
        ids = self.model.encode(context)[-(self.model.context_length - count) :]
        sampling = {name: options[name] for name in ("temperature", "top_k", "top_p") if options.get(name) is not None}
        if not options.get("do_sample", False):
            sampling = {}
        return self.model.generate(ids, max_new_tokens=count, stop=stop, **sampling).text
