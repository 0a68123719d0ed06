"""Few-shot classification of the seven data sets of Prompt-Distiller's table, by name.

Source: data sets, test sets and sizes of Gao et al. 2021 (LM-BFF), https://arxiv.org/abs/2012.15723, sec. 3
and appendix B, as used by Prompt-Distiller (ICASSP 2023): the test set of GLUE's tasks and of SNLI is the
original dev set, TREC has its own, and of MR and MPQA 2,000 sentences are held out once.
Differs: a local data folder may hold other copies or samples of the sets; each copy's checksum enters the
task's revision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kdbench import data
from kdbench.errors import unknown
from kdbench.few_shot import LM_BFF, UNLABELED, FewShotTask
from kdbench.task import Row

_SOURCES = ("auto", "hub", "local")


class FewShot(FewShotTask):
    """K-shot draws of sst2, mr, mpqa, trec, mnli (tests: mnli and mnli-mm), snli or rte."""

    name: ClassVar[str] = "fewshot"

    @dataclass
    class Settings(FewShotTask.Settings):
        """Which data set, how much of it, and how it is put to a model."""

        source: str = "auto"  # the local folder if there is one, else the hub; or hub, local

    def __init__(self, settings: Any = None, data_root: Path | None = None) -> None:
        given = self.Settings() if settings is None else settings
        sets = data.known("classify")
        if given.source not in _SOURCES:
            raise unknown("source", given.source, _SOURCES, "task fewshot")
        if given.dataset not in LM_BFF or given.dataset not in sets:
            raise unknown(
                "data set", given.dataset, [name for name in sets if name in LM_BFF], "task fewshot"
            )
        self._set = sets[given.dataset]
        super().__init__(given, data_root)
        for part in self._set.files:
            self._locate(part)

    def test_names(self) -> list[str]:
        return [self._named(part) for part in self._set.files if part != "train"]

    def pool(self) -> list[Row]:
        return self._read("train", ("train", "dev", UNLABELED))

    def tests(self) -> dict[str, list[Row]]:
        parts = [part for part in self._set.files if part != "train"]
        return {self._named(part): self._read(part, (f"test/{self._named(part)}",)) for part in parts}

    def _named(self, part: str) -> str:
        """The test set's name: `test` is called as its data set, `test-mm` <data set>-mm."""
        return self._set.name + part.removeprefix("test")

    def _read(self, part: str, splits: tuple[str, ...]) -> list[Row]:
        """The rows of a file, which serves these splits."""
        place = self._locate(part)
        if isinstance(place, Path):
            rows, digest, dropped = data.read_labelled(place)
            shown = place.relative_to(self.data_root) if self.data_root is not None else place
            origin: dict[str, Any] = {"path": str(shown)}
        else:
            path, commit = data.fetch(*place)
            rows, digest, dropped = data.read_labelled(path, self._set)
            origin = {"hub": "/".join(place), "commit": commit}
        for split in splits:
            self.origins[split] = {**origin, "sha256": digest, "records": len(rows)}
            if dropped:
                self.counts.setdefault(split, {})["without_label"] = dropped
        return rows

    def _locate(self, part: str) -> Path | tuple[str, str]:
        """Where a file lies: below the data folder, or a hub repository and its file.

        Raises: UserError when there is neither, and what to do about it.
        """
        found = data.locate(self._set, part, self.settings.source, self.data_root)
        if isinstance(found, Path):
            return found
        assert self._set.hub is not None
        assert found.hub_file is not None
        return self._set.hub, found.hub_file
