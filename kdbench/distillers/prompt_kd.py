"""Distillation of a prompt-tuned teacher on the labelled examples alone.

Source: the baseline Prompt-KD of Prompt-Distiller (ICASSP 2023), its eq. 2 and 3:

    L = L_MLM(X) + lam1 L_KD(X)

Differs: eq. 3 divides the teacher's probabilities by the temperature, which only scales the term; `kd_form`
"literal" is that, the default softens the logits of both models. Its minimum is 0, see `distilled`. Dropout
is off, unless the training setting `student_dropout` brings the student's back. The paper does not say over
which words the probability of L_MLM is normalised: `pt_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kdbench.distiller import Batch, Data, Distiller, Step, example_mean
from kdbench.distillers._classes import Form, distilled, teacher_logits, with_cache
from kdbench.distillers._prompted import PtLoss, above_zero, at_least, needs_of, prompt_tuning


class PromptKD(Distiller):
    """Prompt-tuning with the soft labels of a frozen teacher, which reads each example once."""

    head = "masked_lm"
    needs = needs_of("teacher")
    prepare_reads = ()

    @dataclass
    class Config:
        """Names as in the paper: `alpha` is the temperature."""

        alpha: float = 10.0  # temperature of the distillation term, above 0
        lam1: float = 0.2  # weight of L_KD(X)
        kd_form: Form = "hinton_t2"  # literal, hinton, or hinton times alpha^2
        pt_loss: PtLoss = "label_words"  # the N label words, or the whole vocabulary

        def __post_init__(self) -> None:
            above_zero(alpha=self.alpha)
            at_least(lam1=self.lam1)

    def prepare(self, data: Data, step: Step) -> Mapping[str, Batch]:
        """Let the teacher read the labelled examples; its class logits join their rows."""
        return {
            "train": with_cache(
                data.batches("train"), lambda batch: {"teacher_logits": teacher_logits(self.teacher, batch)}
            )
        }

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the weighted sum of both terms, nats per example."""
        logits, ce = prompt_tuning(self.student, batch, self.cfg.pt_loss)
        loss = example_mean(ce, batch)
        step.log(mlm=loss)
        if self.cfg.lam1 > 0:
            kd = distilled(logits, batch["teacher_logits"], self.cfg.alpha, self.cfg.kd_form)
            term = self.cfg.lam1 * example_mean(kd, batch)
            step.log(kd_labeled=term)
            loss = loss + term
        return loss
