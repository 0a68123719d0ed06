"""Sequence-level knowledge distillation: the student learns from responses that the teacher wrote.

Source: Kim & Rush 2016, https://arxiv.org/abs/1606.07947, sec. 3.2 (`hard`). `mixed`, the default, is what
MiniLLM and PromptKD run as SeqKD, the objective of KD on the teacher's text
(https://arxiv.org/abs/2402.12842, sec. 4); `soft` is DistiLLM's (Ko et al. 2024,
https://arxiv.org/abs/2402.03898).
Differs: Kim & Rush decode by beam search; here one response is sampled per training prompt (T = 1, nothing
cut), as in MiniLLM. Sampled ids are kept as ids, where MiniLLM decodes and encodes them again. A response
cut at `max_new_tokens` gets no end-of-sequence token, so it does not teach to stop there; one that ends at
once has that token as its only target. The released scripts of MiniLLM, PromptKD and DistiLLM still train on
the reference unless one swaps the teacher's text in by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kdbench.distiller import Batch, Data, Distiller, Step, token_mean
from kdbench.losses import by_position, cross_entropy, forward_kl
from kdbench.predict import predict
from kdbench.rollout import rollout


class SeqKD(Distiller):
    """Cross-entropy, forward KL or both, token means over teacher-written responses."""

    prepare_reads = ("max_new_tokens",)

    @dataclass
    class Config:
        """Which terms, and how the teacher writes."""

        variant: Literal["hard", "mixed", "soft"] = "mixed"  # cross-entropy, both terms, forward KL
        kd_ratio: float = 0.5  # weight of the forward KL in "mixed", 0 to 1
        max_new_tokens: int | None = None  # the longest response that the teacher writes; None: the board's

        def __post_init__(self) -> None:
            if not 0 <= self.kd_ratio <= 1:
                raise ValueError(f"kd_ratio = {self.kd_ratio} is not in [0, 1]")
            if self.max_new_tokens is not None and self.max_new_tokens < 1:
                raise ValueError(f"max_new_tokens = {self.max_new_tokens} is under 1")

    def __init__(self, cfg: Config, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(cfg, student, teacher)
        self.kd_ratio = {"hard": 0.0, "mixed": cfg.kd_ratio, "soft": 1.0}[cfg.variant]

    def prepare(self, data: Data, step: Step) -> Mapping[str, Batch]:
        """Let the teacher write one response to each training prompt; they replace the training rows."""
        prompts, longest = data.batches("train"), self.cfg.max_new_tokens
        written = [rollout(self.teacher, batch, step, longest).to("cpu") for batch in prompts]
        return {"train": Batch.cat(written)}

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the weighted sum of the terms, nats per token; at weight 0 the teacher is not run."""
        q = predict(self.student, batch)
        if self.kd_ratio == 0:
            loss = token_mean(cross_entropy(q), batch)
            step.log(ce=loss)
            return loss
        with torch.no_grad():
            p = predict(self.teacher, batch)
        both, ce, kl = by_position(self.terms, q, p, q.targets)
        step.log(ce=token_mean(ce, batch), forward_kl=token_mean(kl, batch))
        return token_mean(both, batch)

    def terms(self, q: Tensor, p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted sum and both terms at each position, nats."""
        ce, kl = cross_entropy(q, targets), forward_kl(q, p)
        return (1 - self.kd_ratio) * ce + self.kd_ratio * kl, ce, kl
