"""What PANDA and its two fusions share: the weight of a teacher, its schedule, and the distillation term.

With s the similarity of source and target, x the finished share of training, and t the student's distance to
the frozen teacher (7.2 to 7.7 of the settings below):

    L = L_task + lam0 max(0, s) sched(x) t

Source: PANDA (Zhong et al. 2024, https://arxiv.org/abs/2208.10160) and its public code (`trainer_base.py`).
Differs: that code has a constant weight 0.1 beta, beta = 0.1, and divides the mean squared gap of logits by
the batch size once more, which makes the term all but inert; `lam0 = 0.1`, `lam_source = "const"`, `beta =
0.1`, `schedule = "const"`, `divide_by_batch = true` and `positions = "all"` are that. There the teacher is in
training mode (`teacher_train_mode`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kdbench.distiller import Batch, Data, Step
from kdbench.distillers._transfer import (
    PromptConfig,
    PromptTuned,
    divergences,
    load_prompt,
    squared_gaps,
    unit_mean,
)
from kdbench.errors import UserError
from kdbench.prompted import PromptedEncoder
from kdbench.rollout import evaluating
from kdbench.transferability import METRICS, Metric, Representation, signature, similarity, table_of

Schedule = Literal["const", "hold_decay", "tri"]


def scheduled(kind: str, epoch: float, epochs: int) -> float:
    """Return the factor of the weight at a (fractional) epoch of `epochs`, in [0, 1]. With w = int(0.1
    epochs):

        const       1
        hold_decay  1 before w, then linearly to 0 at the end
        tri         linearly from 0 to 1 at w, then linearly to 0 at the end

    Raises: ValueError for another kind.
    """
    warm = int(0.1 * epochs)
    if kind == "const":
        return 1.0
    if kind not in ("hold_decay", "tri"):
        raise ValueError(f"schedule = '{kind}' is none of const, hold_decay, tri")
    if epoch < warm:
        return epoch / warm if kind == "tri" else 1.0
    return max(0.0, 1 - (epoch - warm) / (epochs - warm))


@dataclass
class PandaConfig(PromptConfig):
    """The distillation from the transferred prompt."""

    lam0: float = 1.0  # weight of the distillation at similarity 1
    lam_source: Literal["sim", "const"] = "sim"  # times max(0, similarity), or times `beta`
    beta: float = 1.0  # the constant in place of the similarity
    schedule: Schedule = "hold_decay"
    schedule_epochs: int = 100  # that the schedule counts training as; a tenth of them is its first part
    metric: Metric = "semantic"
    representation: Representation = "cls_hidden"  # of a sentence, for `semantic`
    inputs: Literal["own", "probe", "target"] = (
        "own"  # texts that are represented: each task's, common, the target's
    )
    neuron_layers: int = 0  # of the metric `on`: as many top layers; 0: all
    neurons_by_text: bool = False  # of `on`: how often a unit is active, not whether its mean is above 0
    distill: Literal["logits", "cls_hidden", "prompt", "prob_kl"] = "logits"  # what is drawn to the teacher's
    temperature: float = 1.0  # of prob_kl
    divide_by_batch: bool = False  # divide the mean squared gap of logits or states by the update's examples
    positions: Literal["labelled", "all"] = "labelled"  # of token tasks: where logits are compared
    teacher_train_mode: bool = False  # the teacher's own dropout is on
    student_init: Literal["random", "source"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam0 < 0 or self.beta < 0:
            raise ValueError("lam0 and beta must be 0 or more")
        if self.temperature <= 0 or self.schedule_epochs < 1:
            raise ValueError("temperature must be above 0, schedule_epochs 1 or more")
        if self.divide_by_batch and self.distill not in ("logits", "cls_hidden"):
            raise ValueError("divide_by_batch is for distill = 'logits' and 'cls_hidden'")
        if self.positions == "all" and self.distill != "logits":
            raise ValueError("positions = 'all' compares logits; set distill = 'logits'")


class Transferred(PromptTuned):
    """The student, and what it takes from teachers with weights that `prepare` finds from similarities."""

    cfg: PandaConfig

    def breaks(self) -> Mapping[str, str]:
        broken: dict[str, str] = {}
        if self.cfg.positions == "all" and self.student.task_format in ("tokens", "span"):
            why = "logits at padding are compared (positions), up to the longest row of a piece"
            broken["micro_batch"] = why
        if self.cfg.teacher_train_mode:
            broken["micro_batch"] = "the teacher's dropout masks follow the cut (teacher_train_mode)"
            broken["frozen_eval"] = "the teacher's dropout is on (teacher_train_mode)"
        return broken

    def check_teacher(self, teacher: PromptedEncoder) -> None:
        """Raises: UserError for a teacher of another format or number of outputs, or of another prompt where
        prompts are compared.
        """
        (form, outputs), (theirs, their_outputs) = (
            (one.task_format, one.outputs) for one in (self.student, teacher)
        )
        if (form, outputs) != (theirs, their_outputs):
            raise UserError(
                f"teacher: its head is for {theirs} ({their_outputs} outputs), the task needs {form} "
                f"({outputs}); "
                "a teacher is tuned on the target, as in a row of the method pot"
            )
        if self.cfg.distill == "prob_kl" and form == "number":
            raise UserError("distill = 'prob_kl' needs a distribution; the task has a number")
        if self.cfg.distill == "prompt" and table_of(teacher).shape != table_of(self.student).shape:
            raise UserError("distill = 'prompt' needs a teacher with the same prompt and prompt_length")

    def start_at(self, source: PromptedEncoder) -> None:
        """Begin at the source's prompt, where the settings say so."""
        if self.cfg.student_init == "source":
            assert source.prompt is not None
            load_prompt(self.student, source.prompt.state_dict(), "source")

    def compared(self, source: PromptedEncoder, target: PromptedEncoder, data: Data) -> dict[str, float]:
        """Return the similarity of a source to the target by every metric that can be had, and the chosen
        one.

        `chosen` is that of the settings; `semantic_probe` compares on the common texts where there are some.
        """
        cfg = self.cfg
        found: dict[str, float] = {}
        same = table_of(source).shape == table_of(target).shape
        for name in METRICS:
            if (name != "on" or "own.activation" in target.signature) and (name != "e_concat" or same):
                found[name] = predicted(cfg, source, target, name, "own")
        if "probe.cls_hidden" in target.signature:
            found["semantic_probe"] = predicted(cfg, source, target, "semantic", "probe")
        told = [dict(model.signature) for model in (source, target)]
        if cfg.inputs == "target":
            for model in (source, target):
                read = signature(model, data.batches("train", 64, cfg.texts))
                model.signature |= {f"target.{name}": value for name, value in read.items()}
        found["chosen"] = predicted(cfg, source, target)
        source.signature, target.signature = told  # read again where it is asked for: it belongs to no run
        return found

    def weight(self, chosen: float, step: Step) -> float:
        """Return lam at this step, from the chosen similarity."""
        cfg = self.cfg
        scale = max(0.0, chosen) if cfg.lam_source == "sim" else cfg.beta
        epoch = step.progress * cfg.schedule_epochs
        return cfg.lam0 * scale * scheduled(cfg.schedule, epoch, cfg.schedule_epochs)

    def taught_loss(self, teacher: PromptedEncoder, similarity: float, batch: Batch, step: Step) -> Tensor:
        """Return the task's loss plus the weighted distance to one teacher; at weight 0 it is not asked."""
        states = self.student.states(batch)
        logits = self.student.outputs_from(states, batch)
        task = self.task_loss(logits, batch)
        lam = self.weight(similarity, step)
        step.log(task=task, weight=lam * batch.size / max(batch.totals.examples, 1.0))  # its share of the sum
        if lam == 0:
            return task
        distance = self.distance(states, logits, teacher, batch)
        step.log(distance=distance)
        return task + lam * distance

    def distance(self, states: Tensor, logits: Tensor, teacher: PromptedEncoder, batch: Batch) -> Tensor:
        """Return how far the student is from a teacher, a scalar: a mean over the update's units."""
        cfg, form = self.cfg, self.student.task_format
        if cfg.distill == "prompt":
            gap = (self.student.prompt.table() - table_of(teacher)).square().mean()  # type: ignore[union-attr]
            return gap * batch.size / max(batch.totals.examples, 1.0)  # this piece's share of one term
        their_states, p = self.taught(teacher, batch)
        if cfg.distill == "cls_hidden":
            gaps = (states[:, 0] - their_states[:, 0]).square().mean(-1).view(batch.size, -1).mean(-1)
            return self.divided(gaps.sum() / max(batch.totals.examples, 1.0), batch)
        if cfg.distill == "prob_kl":
            return unit_mean(divergences(logits, p, batch, form, cfg.temperature), batch)
        return self.divided(self.gap(logits, p, batch), batch)

    def divided(self, mean: Tensor, batch: Batch) -> Tensor:
        """Return a mean squared gap, over the update's number of examples where the settings say so."""
        return mean / max(batch.totals.examples, 1.0) if self.cfg.divide_by_batch else mean

    def gap(self, q: Tensor, p: Tensor, batch: Batch) -> Tensor:
        """Return the mean squared difference of student and teacher logits at the settings' positions."""
        if self.cfg.positions == "all":
            return (q - p).square().flatten(1).mean(1).sum() / max(batch.totals.examples, 1.0)
        return unit_mean(squared_gaps(q, p, batch, self.student.task_format), batch)

    @torch.no_grad()
    def taught(self, teacher: PromptedEncoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the teacher's last states and outputs; its dropout is off unless `teacher_train_mode`."""
        with evaluating(teacher):  # the encoder is the student's too, whose dropout may be on
            teacher.train(self.cfg.teacher_train_mode)
            states = teacher.states(batch)
            return states, teacher.outputs_from(states, batch)


def predicted(
    cfg: Any, source: PromptedEncoder, target: PromptedEncoder, metric: str = "", inputs: str = ""
) -> float:
    """Return the similarity of a source to the target, by the settings' metric and texts or by others.

    Raises: UserError for one that cannot be had, or is no number.
    """
    found = similarity(
        source, target, metric or cfg.metric, cfg.representation, inputs or cfg.inputs, cfg.neuron_layers,
        cfg.neurons_by_text,
    )  # fmt: skip
    if not math.isfinite(found):
        raise UserError(
            f"metric = '{metric or cfg.metric}': the similarity of a source to the target is {found}"
        )
    return found


def chosen_sources(similarities: Sequence[float], k: int) -> list[int]:
    """Return the places of the k most similar sources, best first; of equal ones the earlier."""
    order = sorted(range(len(similarities)), key=lambda i: (-similarities[i], i))
    return order[:k]
