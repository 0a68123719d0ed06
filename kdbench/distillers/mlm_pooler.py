"""Masked language modelling together with the pooler: the pretraining of an encoder that prompts can steer.

    L = -log q(token) per predicted token - bag_weight * mean log b(token), b = softmax(W pooled + c)

The second term asks the pooled first token for the row's words, whatever their order; where a task gives
`bag_ids` [B, T] (ids below the vocabulary's size, -1: none), for those: kinds of words, say. Without it the
pooler keeps its random weights, and prompts in front of a frozen encoder learn nothing.

Source: the masked part of Devlin et al. 2019 (BERT), https://arxiv.org/abs/1810.04805, sec. 3.1; the bag of
words from one vector is PV-DBOW of Le and Mikolov 2014, https://arxiv.org/abs/1405.4053, sec. 2.3.
Differs: BERT's pooler is trained by next-sentence prediction, which needs documents; here any text serves.
Tokens are chosen as in `mlm`; the mark between two segments is one like others. What predicts words from
states is trained too and not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdbench.distiller import Batch, Distiller, Step
from kdbench.distillers._masking import NONE, MaskingConfig, masked, tokens_of


class MLMPooler(Distiller):
    """Mean of -log q over the chosen tokens, and over rows the mean of -log b over the row's tokens."""

    head = "encoder"
    needs = ("example_id", "input_ids", "length", "segment_ids", "cloze_index")

    @dataclass
    class Config(MaskingConfig):
        """What becomes of the tokens, and how much the pooler counts."""

        bag_weight: float = 1.0  # of the pooler's loss, nats a token, beside the masked tokens'

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.bag_weight < 0:
                raise ValueError(f"bag_weight = {self.bag_weight} must be 0 or more")

    cfg: Config

    def __init__(self, cfg: Config, student: nn.Module) -> None:
        super().__init__(cfg, student)
        encoder: Any = student
        if getattr(encoder, "pooler", None) is None:
            raise ValueError("the student has no pooler: mlm_pooler is for encoders that have one")
        self.mask_token, self.vocabulary, self.never_drawn = tokens_of(encoder.config)
        width, std = encoder.config.hidden_size, getattr(encoder.config, "initializer_range", 0.02)
        first = nn.Linear(width, width)
        self.transform = nn.Sequential(first, nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(self.vocabulary))
        self.bag = nn.Linear(width, self.vocabulary)
        for linear in (first, self.bag):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
        self.to(next(student.parameters()).dtype)

    def train_step(self, batch: Batch, step: Step) -> None:
        """Choose and replace tokens, then update the encoder once."""
        rows = masked(batch, step, self.cfg, self.vocabulary, self.mask_token, self.never_drawn)
        count = step.all_sum((rows["targets"] != NONE).sum())
        place = torch.arange(batch["input_ids"].shape[1], device=count.device)
        inner = (place > 0) & (place < batch["length"][:, None] - 1)
        words = batch["bag_ids"] if "bag_ids" in batch else batch["input_ids"].masked_fill(~inner, NONE)
        step.update("student", self.loss, rows.replace(target_count=count.expand(rows.size), bag=words))

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return both terms, in nats."""
        width = int(batch["length"].max())
        targets, words = batch["targets"][:, :width], batch["bag"][:, :width]
        states, pooled = self.encoded(batch, width)
        chosen = targets != NONE
        encoder: Any = self.student
        table = encoder.get_input_embeddings().weight
        logits = functional.linear(self.transform(states[chosen]), table, self.bias)
        nats = functional.cross_entropy(_precise(logits), targets[chosen], reduction="sum")
        masked_loss = nats / batch["target_count"][0].clamp(min=1)
        asked = words != NONE
        log_b = _precise(self.bag(pooled)).log_softmax(-1).gather(1, words.clamp(min=0))
        bag = -(log_b * asked).sum(1) / asked.sum(1).clamp(min=1)
        bag_loss = bag.sum() / max(batch.totals.examples, 1.0)
        step.log(masked=masked_loss, bag=bag_loss)
        return masked_loss + self.cfg.bag_weight * bag_loss

    def encoded(self, batch: Batch, width: int) -> tuple[Tensor, Tensor]:
        """Return the last states [B, T, H] and the pooled first token [B, H]."""
        encoder: Any = self.student
        ids, real = batch["input_ids"][:, :width], torch.arange(width, device=batch["length"].device)
        mask = (real < batch["length"][:, None]).long()
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if getattr(encoder.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch["segment_ids"][:, :width] * mask
        out = encoder(**inputs)
        return out.last_hidden_state, out.pooler_output


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
