"""Prompt transfer: prompt tuning that starts from the prompt of a source task.

Source: PoT, the vanilla transfer of PANDA (Zhong et al. 2024, https://arxiv.org/abs/2208.10160) and its
public code; the same idea as SPoT (Vu et al. 2022, https://arxiv.org/abs/2110.07904, sec. 3.1) with one
source.
Differs: heads are told from prompts by module; in that code everything is loaded whose name does not contain
"classifier", which lets the head of question answering through. A prompt that does not fit is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from kdbench.distiller import freeze
from kdbench.distillers._transfer import PromptConfig, PromptTuned, load_prompt, prompted
from kdbench.prompted import PromptedEncoder


class PoT(PromptTuned):
    """The task's loss in a source's prompt and a new head."""

    @dataclass
    class Config(PromptConfig):
        """The prompt, and what moves: `head` keeps the source's prompt as it is."""

        train: Literal["both", "head"] = "both"  # prompt and head, or the head alone

    def __init__(self, cfg: Config, student: nn.Module, source: PromptedEncoder) -> None:
        super().__init__(cfg, prompted(student, cfg))
        assert source.prompt is not None
        load_prompt(self.student, source.prompt.state_dict(), "source")
        if cfg.train == "head":
            assert self.student.prompt is not None
            freeze(self.student.prompt)
