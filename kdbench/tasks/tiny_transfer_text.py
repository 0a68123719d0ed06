"""Pretraining text of the world of `tiny_transfer`: reviews, pairs of short ones, and trips.

Source: own. A row is a line of one or two segments; no line is a text of a test set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdbench.distiller import Batch
from kdbench.errors import unknown
from kdbench.task import Row, Task
from kdbench.tasks import _tiny_transfer_world as world
from kdbench.tasks._draws import Rng, stable_hash
from kdbench.tasks.tiny_transfer import LENGTH
from kdbench.transfer import Example, TransferData, TransferEncoder

_LINES = TransferData("lines", "classes", "accuracy", (), True, LENGTH)


class TinyTransferText(Task):
    """Lines of the world's text; splits train and dev."""

    name: ClassVar[str] = "tiny_transfer_text"
    heads: ClassVar[tuple[str, ...]] = ("encoder",)
    fields: ClassVar[tuple[str, ...]] = (
        "example_id",
        "input_ids",
        "length",
        "segment_ids",
        "bag_ids",
        "cloze_index",
    )

    @dataclass
    class Settings:
        """How much text is made."""

        world: int = 1  # seed of the world
        train: int = 20000  # lines
        dev: int = 400

    def __init__(self, settings: Any = None, data_root: Any = None) -> None:
        super().__init__(settings, data_root)
        self._encoded: dict[tuple[str, str], list[Example]] = {}

    def splits(self) -> list[str]:
        return ["train", "dev"]

    def load(self, split: str) -> list[Row]:
        """Rows with `text_a` and `text_b`, the second empty for a line of one segment."""
        rng = Rng(stable_hash(self.name, self.settings.world, split))
        size = self.settings.train if split == "train" else self.settings.dev
        lines = [world.pretraining(rng) for _ in range(size)]
        return [{"text_a": a, "text_b": b} for a, b in lines]

    def texts(self, split: str) -> Iterator[str]:
        for row in self.rows(split):
            yield f"{row['text_a']} {row['text_b']}".strip()

    def tokenizer(self, name: str = "") -> PreTrainedTokenizerFast:
        """The tokenizer "bert" of the world. Raises: UserError for another name."""
        return world.tokenizer(name, self.name)

    def encoder(self, tokenizer: PreTrainedTokenizerBase, head: str = "encoder") -> Any:
        if head not in self.heads:
            raise unknown("head", head, self.heads, f"task {self.name}")
        return TransferEncoder(tokenizer, _LINES, LENGTH)

    def collate(self, rows: Sequence[Row], encoders: Mapping[str, Any]) -> Batch:
        """`example_id` [B], `input_ids` and `segment_ids` [B, T] (right-padded), `length` [B]; `bag_ids`
        [B, T] say what the words tell (`world.kinds`), -1 for nothing; `cloze_index` [B] is -1: no token is
        masked for certain.
        """
        made = encoders["student"].tensors([self._item(row, encoders["student"]) for row in rows])
        told = torch.full_like(made["input_ids"], -1)
        for at, row in enumerate(rows):
            kinds = world.kinds(row["text_a"].split())
            if row["text_b"]:  # after the mark between both
                kinds += [-1, *world.kinds(row["text_b"].split())]
            told[at, 1 : 1 + len(kinds)] = torch.tensor(kinds)
        return Batch(
            {
                "example_id": torch.tensor([row["example_id"] for row in rows], dtype=torch.int64),
                **made,
                "bag_ids": told,
                "cloze_index": torch.full((len(rows),), -1),
            }
        )

    def _item(self, row: Row, encoder: TransferEncoder) -> Example:
        """An encoded row; those of a split are encoded together, once."""
        split = row.get("split", "")
        rows = self._loaded.get(split)
        if rows is None or rows[row["example_id"]] is not row:
            return encoder.encode([_line(row)])[0]
        if (split, encoder.key) not in self._encoded:
            self._encoded[split, encoder.key] = encoder.encode([_line(one) for one in rows])
        return self._encoded[split, encoder.key][row["example_id"]]


def _line(row: Row) -> Row:
    """A row as the encoder takes it: without a second segment where it has none."""
    return row if row["text_b"] else {"text": row["text_a"]}
