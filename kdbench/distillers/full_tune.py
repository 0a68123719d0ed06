"""Fine-tuning of the whole encoder and a head: the upper line of the comparison, with far more parameters.

Source: Devlin et al. 2019 (BERT), https://arxiv.org/abs/1810.04805, sec. 4, as the row "full-tuning" of PANDA
(Zhong et al. 2024, https://arxiv.org/abs/2208.10160).
Differs: dropout is off, unless the training setting `student_dropout` brings it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdbench.distiller import Batch, Distiller, Step, freeze
from kdbench.distillers._transfer import NEEDS, counted, task_losses, trained_parameters, unit_mean
from kdbench.prompted import PromptedEncoder, outputs_of


class FullTune(Distiller):
    """The task's loss in all parameters, no prompt."""

    head = "encoder"
    needs = NEEDS
    student: PromptedEncoder

    @dataclass
    class Config:
        """No settings of its own."""

    def __init__(self, cfg: Config, student: nn.Module) -> None:
        config: Any = student.config
        std = getattr(config, "initializer_range", 0.02)
        super().__init__(cfg, PromptedEncoder(student, None, config.task_format, outputs_of(config), std))
        if not self.student.reads_pooler and getattr(student, "pooler", None) is not None:
            freeze(student.pooler)  # type: ignore[arg-type]

    def train_step(self, batch: Batch, step: Step) -> None:
        """Update everything once."""
        step.update("student", self.loss, counted(batch, step))

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the task's loss."""
        return unit_mean(task_losses(self.student(batch), batch, self.student.task_format), batch)

    def measures(self) -> Mapping[str, float]:
        return {"trained_parameters": trained_parameters(self)}
