"""Fine-tuning with labels: the baseline without a teacher, and how a teacher is made.

Source: Devlin et al. 2019 (BERT), https://arxiv.org/abs/1810.04805, sec. 4: cross-entropy of a classifier on
the first token; two sentences are read as a pair.
Differs: no dropout, unless the training setting `student_dropout` brings it back.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kdbench.classify import class_logits
from kdbench.distiller import Batch, Distiller, Step, example_mean
from kdbench.distillers._classes import cross_entropy


class StudentFT(Distiller):
    """Cross-entropy with the labels, a mean over examples."""

    head = "sequence"
    needs = ("example_id", "class_label", "input_ids", "length", "segment_ids")

    @dataclass
    class Config:
        """No settings of its own."""

    def __init__(self, cfg: Config, student: nn.Module) -> None:
        super().__init__(cfg, student)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the mean of -log q(label), nats per example."""
        ce = example_mean(cross_entropy(class_logits(self.student, batch), batch["class_label"]), batch)
        step.log(ce=ce)
        return ce
