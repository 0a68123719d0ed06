"""Generalized knowledge distillation: the student learns from the teacher on its own responses.

Source: Agarwal et al. 2024, https://arxiv.org/abs/2306.13649, sec. 3 and algorithm 1. The defaults are what
the PromptKD paper (Kim et al. 2024, https://arxiv.org/abs/2402.12842, sec. 4) says of its GKD baseline:
reverse KL, student-sampled responses only.
Differs: `student_fraction` is the paper's lambda; the other batches hold the data set's responses, never the
teacher's. A response cut at `max_new_tokens` gets no end-of-sequence token. TRL's trainer divides by the
token count of the data set's responses even on sampled ones; here the mean is over the real tokens of the
whole update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.distiller import Batch, Distiller, Step, token_mean
from kdbench.distillers._divergence import DivergenceConfig
from kdbench.predict import predict
from kdbench.rollout import rollout


class GKD(Distiller):
    """Token mean of divergence(q, p) over student-sampled responses; sampling carries no gradient."""

    @dataclass
    class Config(DivergenceConfig):
        """`divergence` and its parameter choose the loss."""

        divergence: str = "reverse_kl"
        student_fraction: float = 1.0  # lambda: share of batches that are student-sampled, 0 to 1
        sampling_temperature: float = 1.0  # of the student's sampling; 0 takes the likeliest token
        max_new_tokens: int | None = None  # the longest response that the student samples; None: the board's

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.student_fraction <= 1:
                raise ValueError(f"student_fraction = {self.student_fraction} is not in [0, 1]")
            if self.sampling_temperature < 0:
                raise ValueError(f"sampling_temperature = {self.sampling_temperature} is under 0")
            if self.max_new_tokens is not None and self.max_new_tokens < 1:
                raise ValueError(f"max_new_tokens = {self.max_new_tokens} is under 1")

    def __init__(self, cfg: Config, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(cfg, student, teacher)
        self.divergence = cfg.function()

    def train_step(self, batch: Batch, step: Step) -> None:
        """Sample with probability lambda, the same draw on every process; then update on what there is."""
        if torch.rand((), generator=step.rng("on_policy")).item() < self.cfg.student_fraction:
            longest, temperature = self.cfg.max_new_tokens, self.cfg.sampling_temperature
            batch = rollout(self.student, batch, step, longest, temperature=temperature)
        step.update("student", self.loss, batch)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the divergence, nats per token."""
        q = predict(self.student, batch)
        with torch.no_grad():
            p = predict(self.teacher, batch)
        value = token_mean(self.divergence(q, p), batch)
        step.log(**{self.cfg.divergence: value})
        return value
