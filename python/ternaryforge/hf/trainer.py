# SPDX-License-Identifier: Apache-2.0
"""A Trainer whose loss compares the model in training with a teacher."""

from typing import Any

from transformers import Trainer

from ternaryforge.torch import DistillationLoss
from ternaryforge.torch.distillation import teacher_output


class DistillationTrainer(Trainer):
    """transformers' Trainer with `DistillationLoss`; CE, KL and OFF.

    Args:
        teacher: A model of the same vocabulary, kept as it is and put into evaluation mode.
        distillation: The loss; forward KL alone by default.
    """

    def __init__(self, *args: Any, teacher: Any, distillation: DistillationLoss | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation or DistillationLoss()
        if self.distillation.relations:
            raise ValueError("[distillation] relations needs captured features: use a loop of your own and FeatureTap")
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        # The loss is a mean of its own, so accumulated steps are averaged.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the terms."""
        labels = inputs.get("labels")
        texts = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = {"output_hidden_states": True} if self.distillation.off else {}
        outputs = model(**texts, **hidden)
        guide = teacher_output(self.teacher, {**texts, **hidden})
        terms = self.distillation(outputs, guide, labels=labels, attention_mask=texts.get("attention_mask"))
        return (terms.total, {"loss": terms.total, "logits": outputs.logits}) if return_outputs else terms.total
