"""Distillation from a teacher whose soft prompt learns, beside the student, to be followed by that student.

Source: Kim et al. 2024 (PromptKD), https://arxiv.org/abs/2402.12842, sec. 3 and algorithm 1; settings and the
order of the steps from its code, https://github.com/gmkim-ai/PromptKD. Let q be the student, p the teacher,
p_P the teacher behind the prompt P, KL(a || b) = sum_v a (log a - log b) averaged over tokens, g = 1..T
the number of the update and b `base_coef`. One visit (1) samples responses from q, (2) moves P alone down
L_P, and (3) moves q alone down L_S, which already sees the new P:

    L_P   = L_kd + b (1 - g / T) L_reg
    L_kd  = KL(p_P || q)  (kd_direction "prompted_first"),   KL(q || p_P)  ("fixed_first")
    L_reg = KL(p_P || p)  (reg_direction "prompted_first"),  KL(p || p_P)  ("fixed_first")
    L_S   = KL(q || p_P)  (divergence "reverse_kl")

Differs: the teacher runs without dropout while the prompt trains (`teacher_dropout` brings it back). However
many micro-batches an update has, the student sees the updated prompt and g is that of the update; the code
updates both only after the last micro-batch and mixes two g. "fixed_first" keeps the fixed model's entropy,
which has no gradient. The code forces the last token of an unfinished response to the end of sequence;
nothing is forced here, for no loss reads that token, as a label or as an input, and its position is a target
anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdbench.distiller import Batch, Distiller, Group, Step, token_mean
from kdbench.distillers._divergence import DivergenceConfig
from kdbench.losses import Logits, by_position, forward_kl, reverse_kl
from kdbench.predict import predict, shared
from kdbench.prompts import PromptedModel, SoftPrompt
from kdbench.rollout import evaluating, rollout

Direction = Literal["prompted_first", "fixed_first"]


class PromptKD(Distiller):
    """On-policy distillation from a prompted teacher; the student is deployed without a prompt."""

    @dataclass
    class Config(DivergenceConfig):
        """`divergence` and its parameter choose L_S; the defaults are PromptKD's GPT-2 scripts."""

        divergence: str = "reverse_kl"
        max_new_tokens: int | None = None  # tokens sampled per response at most; None: the board's
        prompt_length: int = 7  # k, vectors
        prompt_init: Literal["text", "pad", "random"] = "text"  # pad: its embedding k times; random: N(0, 1)
        prompt_text: str = "Suppose you are a student."  # repeated and cut to k tokens
        prompt_lr: float | None = None  # None: the student's
        prompt_weight_decay: float | None = None  # None: the student's
        base_coef: float = 1.0  # b, the weight of L_reg before it decays; 0: no regularisation
        reg_schedule: Literal["linear", "constant"] = "linear"  # b (1 - g / T), or b throughout
        kd_direction: Direction = "prompted_first"  # which distribution L_kd weighs its log-ratios with
        reg_direction: Direction = "prompted_first"  # the same for L_reg
        teacher_dropout: bool = False  # the teacher's dropout while the prompt trains, as the code has it

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("max_new_tokens", "prompt_length"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ValueError(f"{name} = {value} must be at least 1")
            if self.base_coef < 0:
                raise ValueError(f"base_coef = {self.base_coef} must be at least 0")

    def __init__(self, cfg: Config, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(cfg, student, teacher)
        self.prompt = initial_prompt(cfg, teacher)
        self.divergence = cfg.function()

    @property
    def prompted(self) -> PromptedModel:
        """The teacher behind the prompt: a view, so that each of the two is registered once."""
        return PromptedModel(self.teacher, self.prompt)

    @classmethod
    def added_positions(cls, cfg: Config) -> Mapping[str, int]:
        """Return the length of the prompt, which the teacher reads before the text."""
        return {"teacher": cfg.prompt_length}

    def breaks(self) -> Mapping[str, str]:
        """Dropout in the teacher makes an update depend on its cut, and a frozen model train."""
        if self.cfg.teacher_dropout:
            return {
                "micro_batch": "the teacher's dropout masks follow the cut (teacher_dropout)",
                "frozen_eval": "the teacher is in train mode while the prompt trains (teacher_dropout)",
            }
        return {}

    def groups(self) -> dict[str, Group]:
        """Return the student's parameters and the prompt's, each with an optimizer of its own."""
        prompt = list(self.prompt.named_parameters(prefix="prompt"))
        student = [(n, p) for n, p in self.student.named_parameters(prefix="student") if p.requires_grad]
        return {
            "student": Group(student),
            "prompt": Group(prompt, lr=self.cfg.prompt_lr, weight_decay=self.cfg.prompt_weight_decay),
        }

    def train_step(self, batch: Batch, step: Step) -> None:
        """Sample responses from the student, then update the prompt, then the student."""
        batch = rollout(self.student, batch, step, self.cfg.max_new_tokens)
        with shared(self.student):  # whose weights both updates see
            step.update("prompt", self.prompt_loss, batch)
            step.update("student", self.student_loss, batch)  # already sees the new prompt

    def prompt_loss(self, batch: Batch, step: Step) -> Tensor:
        """Return L_P; its gradient is the prompt's."""
        with dropout_on(self.teacher, self.cfg.teacher_dropout):
            prompted = predict(self.prompted, batch)
        with evaluating(self.student):
            student = predict(self.student, batch)
        coefficient = self.reg_coefficient(step)
        if not coefficient:
            loss = token_mean(kl(self.cfg.kd_direction, prompted, student), batch)
            step.log(prompt_kd=loss)
            return loss
        with torch.no_grad():
            bare = predict(self.teacher, batch)

        def terms(prompted: Tensor, student: Tensor, bare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            kd = kl(self.cfg.kd_direction, prompted, student)
            reg = kl(self.cfg.reg_direction, prompted, bare)
            return kd + coefficient * reg, kd, reg

        loss, kd, reg = by_position(terms, prompted, student, bare)
        step.log(prompt_kd=token_mean(kd, batch), prompt_reg=token_mean(reg, batch))
        return token_mean(loss, batch)

    def student_loss(self, batch: Batch, step: Step) -> Tensor:
        """Return L_S; its gradient is the student's."""
        q = predict(self.student, batch)
        with torch.no_grad():
            p = predict(self.prompted, batch)
        loss = token_mean(self.divergence(q, p), batch)
        step.log(kd=loss)
        return loss

    def reg_coefficient(self, step: Step) -> float:
        """Return the weight of L_reg at this update."""
        if self.cfg.reg_schedule == "constant":
            return float(self.cfg.base_coef)
        return float(self.cfg.base_coef * (1 - step.index / step.total))


def kl(direction: Direction, prompted: Logits, fixed: Logits) -> Tensor:
    """Return KL(prompted || fixed) for "prompted_first", KL(fixed || prompted) for "fixed_first"; nats, [N].

    In `reverse_kl(q, p)` = KL(q || p) and `forward_kl(q, p)` = KL(p || q) the model that learns, here the
    prompted teacher, stands at q.
    """
    return reverse_kl(prompted, fixed) if direction == "prompted_first" else forward_kl(prompted, fixed)


def initial_prompt(cfg: PromptKD.Config, teacher: Any) -> SoftPrompt:
    """Return the soft prompt that training starts from; text is read by the teacher's own tokenizer."""
    if cfg.prompt_init == "random":
        return SoftPrompt.random(teacher, cfg.prompt_length)
    ids = teacher.kdbench_encode(cfg.prompt_text) if cfg.prompt_init == "text" else [teacher.kdbench_pad]
    return SoftPrompt.from_ids(teacher, ids, cfg.prompt_length)


@contextmanager
def dropout_on(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Run a frozen model in train mode, if wanted."""
    model.train(wanted)
    try:
        yield
    finally:
        model.eval()
