"""Embedded few-shot classification: four data sets of a generated world, without files or downloads.

Source: own; sizes and prompts as in `few_shot`.

`polarity` and `opinion` have two classes (the second with 76 % of one class), `topic` six and `pairs`, of two
sentences, three. `tiny_fewshot_text` is the text that models of this world are pretrained on. Nothing is read
from disk: a data set follows from its name and the world's seed. A text is in the pool or in the test set, by
a hash, never in both; neither holds a text twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerFast

from kdbench.errors import UserError, unknown
from kdbench.few_shot import FewShotTask
from kdbench.task import Row
from kdbench.tasks import _tiny_fewshot_world as world
from kdbench.tasks._draws import Rng, stable_hash


class TinyFewShot(FewShotTask):
    """K-shot draws of polarity, opinion, topic or pairs; one test set, named as the data set."""

    name: ClassVar[str] = "tiny_fewshot"

    @dataclass
    class Settings(FewShotTask.Settings):
        """Which data set, how much of it, and how it is put to a model."""

        dataset: str = "polarity"  # or opinion, topic, pairs
        world: int = 1  # seed of the world
        size: int = 2400  # texts of the pool that X, D_dev and Xu are drawn from
        test: int = 480  # texts of the test set

    def __init__(self, settings: Any = None, data_root: Any = None) -> None:
        given = self.Settings() if settings is None else settings
        if given.dataset not in world.TASKS:
            raise unknown("data set", given.dataset, world.TASKS, "task tiny_fewshot")
        if given.prompt_set != "lm-bff":
            raise UserError(
                f"task tiny_fewshot: prompt_set = '{given.prompt_set}' must be lm-bff, its only one"
            )
        for name in ("size", "test"):
            if getattr(given, name) < 1:
                raise UserError(f"task tiny_fewshot: {name} = {getattr(given, name)} must be 1 or more")
        self._made = world.TASKS[given.dataset]
        super().__init__(given, data_root)

    def classes(self) -> list[str]:
        return list(self._made.classes)

    def label_words(self) -> list[str]:
        return list(self._made.label_words)

    def template(self) -> str:
        return self._made.template

    def limits(self) -> tuple[int, int | None]:
        """64 tokens; the longest text has about 25."""
        return self.settings.max_length or 64, None

    def test_names(self) -> list[str]:
        return [self.settings.dataset]

    def pool(self) -> list[Row]:
        return self._texts("pool", self.settings.size)

    def tests(self) -> dict[str, list[Row]]:
        return {self.settings.dataset: self._texts("test", self.settings.test)}

    def tokenizer(self, name: str = "") -> PreTrainedTokenizerFast:
        """The tokenizer "bert" (uncased, word-level) or "roberta" (cased, byte-level BPE).

        Raises: UserError for another name.
        """
        return world.tokenizer(name, self.name)

    def _texts(self, part: str, size: int) -> list[Row]:
        """Different texts with the data set's shares of classes; a longer list begins with a shorter one."""
        dataset, made = self.settings.dataset, self._made
        rng = Rng(stable_hash("tiny_fewshot", self.settings.world, dataset, part))
        found: dict[tuple[str, str], Row] = {}
        while len(found) < size:
            label = world.drawn(rng, made.prior)
            a, b = world.text(rng, made, label)
            if world.is_test(a, b) == (part == "test") and (a, b) not in found:
                sentences = {"text_a": a, "text_b": b} if b else {"text": a}
                found[a, b] = {**sentences, "label": made.classes[label]}
        return list(found.values())
