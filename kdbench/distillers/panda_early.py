"""PANDA with early fusion: the sources' prompts are made into one, which is then transferred as a single
source's.

Source: the multi-source variants that PANDA names (Zhong et al. 2024, https://arxiv.org/abs/2208.10160); no
code or formula of them is public, so this is a reconstruction. The teacher is the fused prompt tuned on the
target; its weight is that of the mean similarity of the fused sources, weighted as their prompts.
Differs: see `_panda` and `_fusion`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kdbench.distiller import Batch, Step
from kdbench.distillers._fusion import FUSED, FusionConfig, fuse
from kdbench.distillers._panda import PandaConfig, Transferred
from kdbench.distillers._transfer import load_prompt, prompted
from kdbench.errors import UserError
from kdbench.prompted import PromptedEncoder


class PandaEarly(Transferred):
    """The task's loss and the distance to the teacher that began at the fused prompt."""

    @dataclass
    class Config(FusionConfig, PandaConfig):
        """Settings of the fusion, those of the teacher's row, and of the distillation."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.inputs == "target":
                raise ValueError(
                    "inputs = 'target' cannot choose the sources of a prompt that is fused beforehand"
                )

    def __init__(
        self,
        cfg: Config,
        student: nn.Module,
        teacher: PromptedEncoder,
        sources: nn.ModuleList,
        target: PromptedEncoder,
    ) -> None:
        super().__init__(cfg, prompted(student, cfg), teacher)
        self.check_teacher(teacher)
        fused = fuse(cfg, sources, target)
        self.similarity, self.weights = fused.similarity, fused.weights
        mine = torch.tensor([fused.weights.get(i, 0.0) for i in range(len(sources))])
        told = teacher.signature.get(FUSED)
        if told is not None and (told.shape != mine.shape or not torch.allclose(told.cpu(), mine, atol=1e-5)):
            raise UserError(
                "teacher: it began at another prompt; its row needs a fusion with the same top_k, tau, "
                "weights, metric, representation and inputs"
            )
        if cfg.student_init == "source":
            load_prompt(self.student, fused.prompt, "sources")

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the task's loss plus the weighted distance."""
        return self.taught_loss(cast(PromptedEncoder, self.teacher), self.similarity, batch, step)

    def measures(self) -> Mapping[str, float]:
        """Also `weight_<i>`, by the place of a source among those that are not the target."""
        told = {f"weight_{i}": weight for i, weight in self.weights.items()}
        return {**super().measures(), "chosen": self.similarity, **told}
