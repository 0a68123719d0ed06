"""Classification from labels and from a teacher's probabilities on labelled and unlabelled texts.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, sec. 2; unlabelled texts as in Schick & Schütze
2021 (PET), https://arxiv.org/abs/2001.07676, sec. 3.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kdbench.classify import class_logits
from kdbench.distiller import Batch, Data, Distiller, Parts, Step, example_mean

READ = ("input_ids", "length", "mask_index", "verbalizer_ids")


class SoftLabels(Distiller):
    head = "masked_lm"
    needs = ("example_id", "class_label", *READ, *(f"teacher.{name}" for name in READ))

    @torch.no_grad()
    def prepare(self, data: Data, step: Step) -> Mapping[str, Batch]:
        return {
            name: Batch.cat(
                [
                    rows.of("student").replace(p=class_logits(self.teacher, rows.of("teacher")).softmax(-1))
                    for rows in data.batches(name)
                ]
            )
            for name in ("train", "unlabeled")
        }

    def train_step(self, batch: Batch, step: Step) -> None:
        other = step.extra("unlabeled")
        assert other is not None
        step.update("student", self.both, {"labeled": batch, "unlabeled": other})

    def both(self, parts: Parts, step: Step) -> Tensor:
        soft = []
        for rows in parts.values():
            q = class_logits(self.student, rows)
            soft.append(example_mean(cross_entropy(q, rows["p"], reduction="none"), rows))
        rows = parts["labeled"]
        q = class_logits(self.student, rows)
        hard = example_mean(cross_entropy(q, rows["class_label"], reduction="none"), rows)
        step.log(hard=hard, soft=soft[0], soft_unlabeled=soft[1])
        return hard + soft[0] + soft[1]
