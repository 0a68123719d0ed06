"""Embedded prompt transfer: eight data sets of a generated world whose relations are known.

Source: own. `mood`, `staff`, `when` and `names` have many rows; `mood_few`, `food`, `agree` (two sentences)
and `names_few` few. `names` and `names_few` tag words. `relation` says how a source stands to a target.
`tiny_transfer_text` is the text that models of this world are pretrained on. Nothing is read from disk: a
data set follows from its name and the world's seed. No text is in two splits, and none of a test set in the
pretraining text. Scores of small test sets are those of the world: `test` rows of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerFast

from kdbench.errors import UserError, unknown
from kdbench.task import Row
from kdbench.tasks import _tiny_transfer_world as world
from kdbench.tasks._draws import Rng, stable_hash
from kdbench.transfer import TransferData, TransferTask

LENGTH = 40  # tokens; the longest text has about 30


class TinyTransfer(TransferTask):
    """A data set of the world; its one test set has the data set's name."""

    name: ClassVar[str] = "tiny_transfer"

    @dataclass
    class Settings(TransferTask.Settings):
        """Which data set, and how much of it."""

        dataset: str = "mood"  # or staff, when, names, mood_few, food, agree, names_few
        world: int = 1  # seed of the world
        dev: int = 200  # rows that checkpoints are selected on
        test: int = 400  # rows of the test set

    def __init__(self, settings: Any = None, data_root: Any = None) -> None:
        given = self.Settings() if settings is None else settings
        if given.dataset not in world.TASKS:
            raise unknown("data set", given.dataset, world.TASKS, "task tiny_transfer")
        for name in ("dev", "test"):
            if getattr(given, name) < 1:
                raise UserError(f"task tiny_transfer: {name} = {getattr(given, name)} must be 1 or more")
        for name in ("selection", "dev_share", "dev_limit"):
            if getattr(given, name) != getattr(TransferTask.Settings, name):
                raise UserError(
                    f"task tiny_transfer: {name} says nothing here: it has dev rows of its own; set dev"
                )
        self._made = world.TASKS[given.dataset]
        super().__init__(given, data_root)

    @staticmethod
    def relation(source: str, target: str) -> str:
        """Return how a source stands to a target: self, same, opposed, shared or unrelated."""
        return world.relation(source, target)

    def spec(self) -> TransferData:
        made = self._made
        metric = "entity_f1" if made.format == "tokens" else "accuracy"
        pair = made.rule == "agree"
        return TransferData(self.settings.dataset, made.format, metric, made.classes, pair, LENGTH)

    def rules(self) -> list[Any]:
        return [*super().rules(), self.settings.world, self.settings.dev, self.settings.test]

    def read(self, part: str) -> list[Row]:
        """The rows of "test", or those of "train" after those of dev."""
        size = self.settings.test if part == "test" else self.settings.dev + self._made.train
        rng = Rng(stable_hash(self.name, self.settings.world, self.settings.dataset, part))
        found: dict[str, Row] = {}
        while len(found) < size:
            row = self._made.draw(rng)
            if row is not None and world.is_test(text := world.text_of(row)) == (part == "test"):
                found.setdefault(text, row)
        return list(found.values())

    def _carved(self, rows: Any, count: int) -> set[int]:
        return set(range(self.settings.dev))

    def tokenizer(self, name: str = "") -> PreTrainedTokenizerFast:
        """The tokenizer "bert" of the world, a token a word. Raises: UserError for another name."""
        return world.tokenizer(name, self.name)
