"""Masked language modelling: the pretraining of an encoder on plain text.

Source: Devlin et al. 2019 (BERT), https://arxiv.org/abs/1810.04805, sec. 3.1, task 1: 15 % of the tokens are
predicted; 80 % of these are replaced by the mask, 10 % by a random token, 10 % kept.
Differs: no next-sentence prediction; tokens are chosen anew at each visit, as in Liu et al. 2019 (RoBERTa),
https://arxiv.org/abs/1907.11692, sec. 4.1, not once beforehand; the first and the last token of a row, the
tokenizer's marks, are never chosen; a row's `cloze_index` always is, as the mask itself, so that a prompt's
slot is seen as it will be used; a random token is never the padding, from which RoBERTa counts positions,
nor the mask; the mean is over the chosen tokens of the whole update; no dropout, unless the training setting
`student_dropout` brings it back.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kdbench.classify import chosen_logits
from kdbench.distiller import Batch, Distiller, Step
from kdbench.distillers._masking import NONE, MaskingConfig, masked, tokens_of


class MLM(Distiller):
    """Mean of -log q(token) over the chosen tokens."""

    head = "masked_lm"
    needs = ("example_id", "input_ids", "length", "cloze_index")

    @dataclass
    class Config(MaskingConfig):
        """What becomes of the tokens."""

    def __init__(self, cfg: Config, student: nn.Module) -> None:
        super().__init__(cfg, student)
        self.mask_token, self.vocabulary, self.never_drawn = tokens_of(student.config)

    def train_step(self, batch: Batch, step: Step) -> None:
        """Choose and replace tokens, then update the student once."""
        rows = self.masked(batch, step)
        count = step.all_sum((rows["targets"] != NONE).sum())
        step.update("student", self.loss, rows.replace(target_count=count.expand(rows.size)))

    def masked(self, batch: Batch, step: Step) -> Batch:
        """Return the rows with tokens replaced, and `targets`, as in `_masking.masked`."""
        return masked(batch, step, self.cfg, self.vocabulary, self.mask_token, self.never_drawn)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the cross-entropy, nats per predicted token."""
        targets = batch["targets"][:, : int(batch["length"].max())]
        logits = chosen_logits(self.student, batch, targets != NONE)
        nats = -logits.log_softmax(-1).gather(1, targets[targets != NONE][:, None]).sum()
        return nats / batch["target_count"][0].clamp(min=1)
