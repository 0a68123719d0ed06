"""PANDA with late fusion: every chosen source has a teacher of its own, and the student learns from all of
them.

    L = L_task + sum_k lam_k t_k,   lam_k = lam0 max(0, s_k) sched / K

over the K sources that are most similar to the target.

Source: the multi-source variants that PANDA names (Zhong et al. 2024, https://arxiv.org/abs/2208.10160); no
code or formula of them is public, so this is a reconstruction. `fusion = "mean_logits"` draws to the weighted
mean of the teachers' outputs instead: the same gradient, for the weights sum to the same.
Differs: see `_panda`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from kdbench.distiller import Batch, Data, Step, freeze
from kdbench.distillers._panda import PandaConfig, Transferred, chosen_sources
from kdbench.distillers._transfer import prompted
from kdbench.prompted import PromptedEncoder


class PandaLate(Transferred):
    """The task's loss and the distances to several transferred teachers."""

    @dataclass
    class Config(PandaConfig):
        """How many sources, and how their teachers are put together."""

        top_k: int = 3  # sources, the most similar ones
        fusion: Literal["sum", "mean_logits"] = "sum"

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.top_k < 1:
                raise ValueError(f"top_k = {self.top_k} must be 1 or more")
            if self.fusion == "mean_logits" and (self.distill, self.positions) != ("logits", "labelled"):
                raise ValueError("fusion = 'mean_logits' is for distill = 'logits' at labelled positions")
            if self.student_init == "source":
                raise ValueError("student_init = 'source' needs one source; here are several")

    cfg: Config
    prepare_reads = ("metric", "representation", "inputs", "texts", "neuron_layers", "neurons_by_text")

    def __init__(
        self,
        cfg: Config,
        student: nn.Module,
        teachers: nn.ModuleList,
        sources: nn.ModuleList,
        target: PromptedEncoder,
    ) -> None:
        if len(teachers) != len(sources):
            raise ValueError(f"there are {len(teachers)} teachers for {len(sources)} sources")
        super().__init__(cfg, prompted(student, cfg))
        self.teachers, self.sources, self.target = freeze(teachers), freeze(sources), freeze(target)
        for teacher in teachers:
            self.check_teacher(cast(PromptedEncoder, teacher))

    def prepare(self, data: Data, step: Step) -> None:
        """Compare every source to the target."""
        self.state["similarities"] = [
            self.compared(source, self.target, data)["chosen"]  # type: ignore[arg-type]
            for source in cast(nn.ModuleList, self.sources)
        ]

    @property
    def chosen(self) -> list[int]:
        """The places of the sources that teach."""
        return chosen_sources(self.state["similarities"], self.cfg.top_k)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the task's loss plus the weighted distances."""
        states = self.student.states(batch)
        logits = self.student.outputs_from(states, batch)
        task = self.task_loss(logits, batch)
        teachers = cast(nn.ModuleList, self.teachers)
        chosen = self.chosen
        weights = {i: self.weight(self.state["similarities"][i], step) / len(chosen) for i in chosen}
        weights = {i: weight for i, weight in weights.items() if weight}
        share = batch.size / max(batch.totals.examples, 1.0)
        step.log(task=task, weight=sum(weights.values()) * share)
        if not weights:
            return task
        if self.cfg.fusion == "mean_logits":
            whole = sum(weights.values())
            shares = torch.stack(
                [
                    w / whole * self.taught(cast(PromptedEncoder, teachers[i]), batch)[1]
                    for i, w in weights.items()
                ]
            )
            total = whole * self.divided(self.gap(logits, shares.sum(0), batch), batch)
        else:
            total = sum(
                (w * self.distance(states, logits, cast(PromptedEncoder, teachers[i]), batch)
                 for i, w in weights.items()),
                start=torch.zeros_like(task),
            )  # fmt: skip
        step.log(weighted_distance=total)
        return task + total

    def measures(self) -> Mapping[str, float]:
        found = self.state["similarities"]
        told = {f"source_{i}": value for i, value in enumerate(found)}  # by place, the target left out
        return {**super().measures(), **told, "sources": float(len(self.chosen))}
