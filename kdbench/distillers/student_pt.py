"""Prompt-tuning of all parameters: cross-entropy of the label words at the mask, without a teacher.

Source: eq. 2 of Prompt-Distiller (ICASSP 2023), the PET of Schick & Schütze 2021,
https://arxiv.org/abs/2001.07676, sec. 3.1. With the teacher's model in the student's place it tunes the
teacher.
Differs: PET has several patterns, an ensemble of their models and an auxiliary loss of masked words; here is
one pattern and the cross-entropy. PET and eq. 2 normalise over the label words; `pt_loss` "full_vocab" does
so over the whole vocabulary. Dropout is off, unless the training setting `student_dropout` brings it back.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kdbench.distiller import Batch, Distiller, Step, example_mean
from kdbench.distillers._prompted import PtLoss, needs_of, prompt_tuning


class StudentPT(Distiller):
    """L_MLM(X) = -log p_S(y | x), mean over examples."""

    head = "masked_lm"
    needs = needs_of()

    @dataclass
    class Config:
        """Over which words the probability is normalised."""

        pt_loss: PtLoss = "label_words"  # the N label words, or the whole vocabulary

    def __init__(self, cfg: Config, student: nn.Module) -> None:
        super().__init__(cfg, student)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return L_MLM, nats per example."""
        _, ce = prompt_tuning(self.student, batch, self.cfg.pt_loss)
        return example_mean(ce, batch)
