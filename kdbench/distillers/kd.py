"""Word-level knowledge distillation on the reference response: cross-entropy and a divergence to the teacher.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, sec. 2; on sequences as in Kim & Rush 2016,
https://arxiv.org/abs/1606.07947, sec. 3.1, weighted as in the code of MiniLLM and PromptKD (kd_ratio 0.5,
T = 1).
Differs: the teacher's term is a divergence, 0 for equal models, where that code has the cross-entropy with
soft targets: the gradient is the same. Multiplying by T^2 is a setting, off by default: Hinton et al. do it,
DSKD (Zhang et al. 2024, https://arxiv.org/abs/2406.17328, T = 2) does not. Means are over the whole update;
no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.distiller import Batch, Distiller, Step, token_mean
from kdbench.distillers._divergence import DivergenceConfig
from kdbench.losses import by_position, cross_entropy
from kdbench.predict import predict


class KD(Distiller):
    """(1 - kd_ratio) cross-entropy + kd_ratio divergence(q, p), token means over the reference response."""

    @dataclass
    class Config(DivergenceConfig):
        """`divergence` and its parameter choose the teacher's term."""

        kd_ratio: float = 0.5  # weight of the teacher's term, 0 to 1; the rest is cross-entropy
        temperature: float = 1.0  # divides both models' logits in the teacher's term
        temperature_squared: bool = False  # multiplies the teacher's term by temperature^2

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.kd_ratio <= 1:
                raise ValueError(f"kd_ratio = {self.kd_ratio} is not in [0, 1]")
            if not self.temperature > 0:
                raise ValueError(f"temperature = {self.temperature} is not above 0")

    def __init__(self, cfg: Config, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(cfg, student, teacher)
        self.divergence = cfg.function()
        self.factor = cfg.temperature**2 if cfg.temperature_squared else 1.0

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the weighted sum of both terms, nats per token."""
        q = predict(self.student, batch)
        with torch.no_grad():
            p = predict(self.teacher, batch)
        loss, ce, kd = by_position(self.terms, q, p, q.targets)
        step.log(ce=token_mean(ce, batch), **{self.cfg.divergence: token_mean(kd, batch)})
        return token_mean(loss, batch)

    def terms(self, q: Tensor, p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted sum and both terms at each position, nats."""
        ratio, temperature = self.cfg.kd_ratio, self.cfg.temperature
        ce = cross_entropy(q, targets)
        if temperature != 1:
            q, p = q / temperature, p / temperature
        kd = self.factor * self.divergence(q, p)
        return (1 - ratio) * ce + ratio * kd, ce, kd
