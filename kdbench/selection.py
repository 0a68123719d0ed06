"""Which weights of a training are kept: the last, or the best on the dev split, scored at a fixed cadence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from kdbench import registry
from kdbench.clock import phase
from kdbench.config import Select
from kdbench.errors import UserError
from kdbench.harness import Milestone, Trainer
from kdbench.record import training_seconds
from kdbench.rollout import evaluating

Answer = Callable[[nn.Module], list[dict[str, Any]]]


class Selection:
    """Scores the dev split every so many updates, tells the distiller, and keeps the weights of the best.

    Args: `analyses` have `dev_scores(rows)`, of which `select.score` is one; `answer` gives a model's rows
    for the dev split. The first of equal scores is kept.
    """

    def __init__(self, select: Select, analyses: Sequence[str], answer: Answer) -> None:
        self.select, self.analyses, self.answer = select, analyses, answer
        self.trainer: Trainer | None = None

    def milestones(self, total: int) -> list[Milestone]:
        """Return when dev is scored: at the cadence and at the end; never where there is no cadence."""
        every = self.select.every
        return [Milestone(frozenset([*range(every, total + 1, every), total]), self.score)] if every else []

    def score(self, step: int) -> None:
        """Score the weights as they are. Raises: UserError for an unknown score."""
        trainer, select = self.trainer, self.select
        assert trainer is not None
        seconds = training_seconds({n: entry["seconds"] for n, entry in trainer.clock.state().items()})
        with phase("dev", covers=True), evaluating(trainer.distiller):
            rows = self.answer(trainer.distiller.predictor())
            metrics: dict[str, float] = {}
            for name in self.analyses:
                scores: Callable[..., Mapping[str, float]] | None
                scores = getattr(registry.load_analysis(name), "dev_scores", None)
                metrics.update(scores(rows) if scores else {})
        if select.score not in metrics:
            raise UserError(f"select.score: no dev score '{select.score}'. Known: {', '.join(metrics)}.")
        trainer.distiller.on_eval(metrics)
        if math.isfinite(metrics[select.score]):
            told = {"step": step, "train_seconds": seconds, "score": metrics[select.score]}
            trainer.curve.append(told)
        value = metrics[select.score] * (1 if select.direction == "higher" else -1)
        if "value" not in trainer.best or value > trainer.best["value"]:
            trainer.keep_best({"value": value, "step": step, "score": metrics[select.score], "n": len(rows)})

    def finish(self) -> None:
        """Put the weights of the best score back, where the best are asked for."""
        if self.select.rule == "best" and self.trainer is not None:
            self.trainer.load_best()
