"""Distillation with soft targets alone, at a temperature.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, sec. 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.distiller import Batch, Distiller, Step, token_mean
from kdbench.losses import forward_kl
from kdbench.predict import predict


class TemperedKD(Distiller):
    @dataclass
    class Config:
        temperature: float = 2.0  # divides the logits of student and teacher

    def loss(self, batch: Batch, step: Step) -> Tensor:
        q = predict(self.student, batch)
        with torch.no_grad():
            p = predict(self.teacher, batch)
        kl = forward_kl(q.logits() / self.cfg.temperature, p.logits() / self.cfg.temperature)
        step.log(kl=token_mean(kl, batch))
        return self.cfg.temperature**2 * token_mean(kl, batch)
