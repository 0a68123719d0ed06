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
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.classify import chosen_logits
from kdbench.distiller import Batch, Distiller, Step
from kdbench.streams import stream_seed, uniform

NONE = -1  # in `targets`: this token is not predicted


class MLM(Distiller):
    """Mean of -log q(token) over the chosen tokens."""

    head = "masked_lm"
    needs = ("example_id", "input_ids", "length", "cloze_index")

    @dataclass
    class Config:
        """What becomes of the tokens; shares lie between 0 and 1."""

        mask_share: float = 0.15  # of a row's tokens that are predicted, rounded, one at least
        replaced_by_mask: float = 0.8  # share of the predicted tokens
        replaced_at_random: float = 0.1  # share of the predicted tokens; the rest is kept as it is

        def __post_init__(self) -> None:
            if not 0 < self.mask_share <= 1:
                raise ValueError(f"mask_share = {self.mask_share} is not in (0, 1]")
            for name in ("replaced_by_mask", "replaced_at_random"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"{name} = {getattr(self, name)} is not in [0, 1]")
            if self.replaced_by_mask + self.replaced_at_random > 1:
                raise ValueError("replaced_by_mask and replaced_at_random are above 1 together")

    def __init__(self, cfg: Config, student: nn.Module) -> None:
        super().__init__(cfg, student)
        config: Any = student.config
        if getattr(config, "mask_token_id", None) is None:
            raise ValueError("the student's config has no mask_token_id: its tokenizer needs a mask token")
        self.mask_token, self.vocabulary = int(config.mask_token_id), int(config.vocab_size)
        padding = getattr(config, "pad_token_id", None)
        self.never_drawn = sorted({self.mask_token} if padding is None else {self.mask_token, int(padding)})

    def train_step(self, batch: Batch, step: Step) -> None:
        """Choose and replace tokens, then update the student once."""
        rows = self.masked(batch, step)
        count = step.all_sum((rows["targets"] != NONE).sum())
        step.update("student", self.loss, rows.replace(target_count=count.expand(rows.size)))

    def masked(self, batch: Batch, step: Step) -> Batch:
        """Return the rows with tokens replaced, and `targets` [B, T]: the ids to predict, else -1.

        A choice depends on seed, example, visit and position alone, not on the batch, its order or width.
        """
        ids, length = batch["input_ids"], batch["length"][:, None]
        place = torch.arange(ids.shape[1], device=ids.device)
        cloze = place == batch["cloze_index"][:, None]
        inner = (place > 0) & (place < length - 1)

        def draw(name: str) -> Tensor:
            seed = stream_seed(step.seed, f"mlm/{name}")
            return uniform(seed, batch["example_id"][:, None], step.visit, place)

        number = draw("choose").masked_fill(~inner, 1.0).masked_fill(cloze, NONE)
        count = (self.cfg.mask_share * inner.sum(1, keepdim=True)).round().clamp(min=1)
        chosen = (number.argsort(1).argsort(1) < count) & (number < 1.0)
        fate = draw("replace").masked_fill(cloze, NONE)
        by_mask = fate < self.cfg.replaced_by_mask
        at_random = ~by_mask & (fate < self.cfg.replaced_by_mask + self.cfg.replaced_at_random)
        seen = torch.where(at_random, self._token(draw("token")), ids).masked_fill(by_mask, self.mask_token)
        return batch.replace(input_ids=torch.where(chosen, seen, ids), targets=ids.masked_fill(~chosen, NONE))

    def _token(self, number: Tensor) -> Tensor:
        """Return a token id for each number in [0, 1): all are as likely but those never drawn."""
        ids = (number * (self.vocabulary - len(self.never_drawn))).long()
        for skipped in self.never_drawn:  # in ascending order
            ids = ids + (ids >= skipped)
        return ids

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the cross-entropy, nats per predicted token."""
        targets = batch["targets"][:, : int(batch["length"].max())]
        logits = chosen_logits(self.student, batch, targets != NONE)
        nats = -logits.log_softmax(-1).gather(1, targets[targets != NONE][:, None]).sum()
        return nats / batch["target_count"][0].clamp(min=1)
