"""Pretraining text of the world of `tiny_fewshot`: its sentences, most with a prompt and a word in its slot.

Source: own.

A row is one line. The word in the slot names the class of the line's text, but for a share `noise` of the
lines, where it is the last class's whatever the text says: a model learns what the prompt asks for, and
prefers that class too often. `cloze_index` is the position of that word (-1: the line has no slot). No line
holds a text that can be in a test set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdbench.distiller import Batch
from kdbench.errors import unknown
from kdbench.task import Row, Task, tokenizer_hash
from kdbench.tasks import _tiny_fewshot_world as world
from kdbench.tasks._draws import Rng, stable_hash


class LineEncoder:
    """Token ids of lines: the slot's word is encoded as a word within a text, as a prompt's label word is.

    `key` names the tokenizer's content and the rules.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        self.eos: int = self.tokenizer.sep_token_id
        self.pad: int = self.tokenizer.pad_token_id
        self.max_length = self.max_prompt = 64  # tokens; the longest line has about 25
        self.key = f"{tokenizer_hash(tokenizer)[:16]}-line"

    def longest(self, new_tokens: int) -> int:
        """The longest sequence in tokens that a model reads."""
        return self.max_length

    def encode(self, rows: Sequence[Row]) -> list[tuple[list[int], int]]:
        """Ids of each row, special tokens included, and the position of its slot (-1: none)."""
        parts = [(row["before"], f" {row['word']}" if row["word"] else "", row["after"]) for row in rows]
        ids = self.tokenizer([text for line in parts for text in line], add_special_tokens=False)["input_ids"]
        out = []
        for i in range(0, len(ids), 3):
            before, word, after = ids[i : i + 3]
            line = [self.tokenizer.cls_token_id, *before, *word, *after, self.eos]
            out.append((line, 1 + len(before) if word else -1))
        return out


class TinyFewShotText(Task):
    """Lines of the world's text; splits train and dev."""

    name: ClassVar[str] = "tiny_fewshot_text"
    heads: ClassVar[tuple[str, ...]] = ("masked_lm",)
    fields: ClassVar[tuple[str, ...]] = ("example_id", "input_ids", "length", "cloze_index")

    @dataclass
    class Settings:
        """How much text is made, and how much its slots tell."""

        world: int = 1  # seed of the world
        train: int = 20000  # lines
        dev: int = 400
        prompted: float = 1.0  # share of the lines with a prompt
        noise: float = 0.2  # share of the slots with the last class's word whatever the text says

    def __init__(self, settings: Any = None, data_root: Any = None) -> None:
        super().__init__(settings, data_root)
        self._encoded: dict[tuple[str, str], list[tuple[list[int], int]]] = {}

    def splits(self) -> list[str]:
        return ["train", "dev"]

    def load(self, split: str) -> list[Row]:
        """Rows with `before`, `word` and `after`: the line and its slot's word, empty where it has none."""
        cfg = self.settings
        rng = Rng(stable_hash(self.name, cfg.world, split))
        size = cfg.train if split == "train" else cfg.dev
        lines = [world.pretraining(rng, cfg.prompted, cfg.noise) for _ in range(size)]
        return [{"before": before, "word": word, "after": after} for before, word, after in lines]

    def texts(self, split: str) -> Iterator[str]:
        for row in self.rows(split):
            word = f" {row['word']}" if row["word"] and row["before"] else row["word"]
            yield row["before"] + word + row["after"]

    def tokenizer(self, name: str = "") -> PreTrainedTokenizerFast:
        """The tokenizer "bert" or "roberta" of `tiny_fewshot`.

        Raises: UserError for another name.
        """
        return world.tokenizer(name, self.name)

    def encoder(self, tokenizer: PreTrainedTokenizerBase, head: str = "masked_lm") -> Any:
        if head not in self.heads:
            raise unknown("head", head, self.heads, f"task {self.name}")
        return LineEncoder(tokenizer)

    def collate(self, rows: Sequence[Row], encoders: Mapping[str, Any]) -> Batch:
        """`example_id` [B], `input_ids` [B, T] (right-padded), `length` [B] and `cloze_index` [B]."""
        encoder = encoders["student"]
        items = [self._item(row, encoder) for row in rows]
        table = np.full((len(items), max(len(ids) for ids, _ in items)), encoder.pad, dtype=np.int64)
        for i, (ids, _) in enumerate(items):
            table[i, : len(ids)] = ids
        return Batch(
            {
                "example_id": torch.tensor([row["example_id"] for row in rows], dtype=torch.int64),
                "input_ids": torch.from_numpy(table),
                "length": torch.tensor([len(ids) for ids, _ in items], dtype=torch.int64),
                "cloze_index": torch.tensor([slot for _, slot in items], dtype=torch.int64),
            }
        )

    def _item(self, row: Row, encoder: LineEncoder) -> tuple[list[int], int]:
        """A row's ids and slot; those of a split are encoded together, once."""
        split = row.get("split", "")
        rows = self._loaded.get(split)
        if rows is None or rows[row["example_id"]] is not row:
            return encoder.encode([row])[0]
        key = (split, encoder.key)
        if key not in self._encoded:
            self._encoded[key] = encoder.encode(rows)
        return self._encoded[key][row["example_id"]]
