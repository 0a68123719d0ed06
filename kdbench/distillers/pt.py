"""Prompt tuning without any transfer: the baseline that every transferred prompt has to beat.

Source: Liu et al. 2022 (P-Tuning v2), https://arxiv.org/abs/2110.07602, sec. 3.2 (deep prompts); Lester et
al. 2021, https://arxiv.org/abs/2104.08691, sec. 2 (shallow ones); trained as PANDA (Zhong et al. 2024,
https://arxiv.org/abs/2208.10160) trains its prompts of source tasks.
Differs: prompt and head start at normal noise of deviation 0.02 that is drawn after the encoder was loaded
(in PANDA's code the library's loading overrides the initialisation that is asked for); dropout is off, unless
the training setting `student_dropout` brings it back.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kdbench.distillers._transfer import PromptConfig, PromptTuned, prompted


class PT(PromptTuned):
    """The task's loss in a random prompt and a head on a frozen encoder."""

    @dataclass
    class Config(PromptConfig):
        """The prompt."""

    def __init__(self, cfg: Config, student: nn.Module) -> None:
        super().__init__(cfg, prompted(student, cfg))
