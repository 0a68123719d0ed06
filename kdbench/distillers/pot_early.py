"""Prompt transfer from several sources: prompt tuning that starts from a weighted mean of their prompts.

Source: as `_fusion`; what teaches in PANDA's early fusion, and a baseline of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from kdbench.distillers._fusion import FusionConfig, fuse
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

    def __init__(
        self, cfg: Config, student: nn.Module, sources: nn.ModuleList, target: PromptedEncoder
    ) -> None:
        super().__init__(cfg, prompted(student, cfg))
        fused = fuse(cfg, sources, target)
        load_prompt(self.student, fused.prompt, "sources")
        self.weights = fused.weights

    def measures(self) -> Mapping[str, float]:
        return {**super().measures(), **{f"weight_{i}": weight for i, weight in self.weights.items()}}
