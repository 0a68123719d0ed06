"""Supervised fine-tuning on the reference response, the baseline without a teacher.

Source: the SFT rows of Gu et al. 2024 (MiniLLM), https://arxiv.org/abs/2306.08543, sec. 3.1, and of Kim et
al. 2024 (PromptKD), https://arxiv.org/abs/2402.12842, sec. 4.
Differs: the mean is over the response tokens of the whole update, where their code averages the means of
micro-batches; no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kdbench.distiller import Batch, Distiller, Step, token_mean
from kdbench.losses import cross_entropy
from kdbench.predict import predict


class SFT(Distiller):
    """Token mean of -log q over the reference response, its end-of-sequence token included."""

    @dataclass
    class Config:
        """No settings of its own."""

    def __init__(self, cfg: Config, student: nn.Module) -> None:
        super().__init__(cfg, student)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the cross-entropy, nats per token."""
        ce = token_mean(cross_entropy(predict(self.student, batch)), batch)
        step.log(ce=ce)
        return ce
