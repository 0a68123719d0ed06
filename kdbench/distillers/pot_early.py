"""Prompt transfer from several sources: prompt tuning that starts from a weighted mean of their prompts.

Source: as `_fusion`; what teaches in PANDA's early fusion, and a baseline of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from kdbench.distiller import Data
from kdbench.distillers._fusion import FUSED, FusionConfig, fuse
from kdbench.distillers._transfer import PromptConfig, PromptTuned, load_prompt, prompted
from kdbench.prompted import PromptedEncoder
from kdbench.transferability import Metric, Representation


class PoTEarly(PromptTuned):
    """The task's loss in the fused prompt and a new head."""

    @dataclass
    class Config(FusionConfig, PromptConfig):
        """Which sources, by which metric."""

        metric: Metric = "semantic"
        representation: Representation = "cls_hidden"
        inputs: Literal["own", "probe"] = "own"
        neuron_layers: int = 0  # of the metric `on`: as many top layers; 0: all
        neurons_by_text: bool = False  # of `on`: how often a unit is active, not whether its mean is above 0

    def __init__(
        self, cfg: Config, student: nn.Module, sources: nn.ModuleList, target: PromptedEncoder
    ) -> None:
        super().__init__(cfg, prompted(student, cfg))
        fused = fuse(cfg, sources, target)
        load_prompt(self.student, fused.prompt, "sources")
        self.weights, self.sources = fused.weights, len(sources)

    def finish(self, data: Data) -> None:
        """Keep the weights too, which tell a student whether its own fusion is this one."""
        super().finish(data)
        shares = [self.weights.get(i, 0.0) for i in range(self.sources)]
        self.student.signature[FUSED] = torch.tensor(shares)

    def measures(self) -> Mapping[str, float]:
        """Also `weight_<i>`, by the place of a source among those that are not the target."""
        return {**super().measures(), **{f"weight_{i}": weight for i, weight in self.weights.items()}}
