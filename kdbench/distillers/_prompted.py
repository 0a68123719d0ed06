"""What the prompted methods share: the fields they read, and the loss of prompt-tuning.

Source: prompt-tuning of all parameters as in Schick & Schütze 2021 (PET),
https://arxiv.org/abs/2001.07676, sec. 3.1; `full_vocab` as in the code of EasyNLP's few-shot learning.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from kdbench.classify import class_logits, mask_logits
from kdbench.distiller import Batch
from kdbench.distillers._classes import cross_entropy

PtLoss = Literal["label_words", "full_vocab"]

READ = ("input_ids", "length", "mask_index", "verbalizer_ids")  # what any prompted text has


def needs_of(*roles: str) -> tuple[str, ...]:
    """Return the fields of a batch that the student and these roles read; see `read_of` for one more."""
    others = tuple(f"{role}.{name}" for role in roles for name in READ)
    return ("example_id", "class_label", *READ, *others)


def read_of(batch: Batch) -> list[str]:
    """Return the fields that a model reads of these texts: prompts of two segments add `segment_ids`."""
    return [*READ, *(["segment_ids"] if "segment_ids" in batch else [])]


def vocabulary_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Return -log softmax over the whole vocabulary, `logits` [B, V], at each row's label word, [B]."""
    return cross_entropy(logits, batch["verbalizer_ids"].gather(1, batch["class_label"][:, None])[:, 0])


def prompt_tuning(student: nn.Module, batch: Batch, pt_loss: PtLoss) -> tuple[Tensor, Tensor]:
    """Return class logits [B, N] and the cross-entropy with the labels [B], from one forward."""
    if pt_loss == "label_words":
        logits = class_logits(student, batch)
        return logits, cross_entropy(logits, batch["class_label"])
    whole = mask_logits(student, batch)
    return whole.gather(1, batch["verbalizer_ids"]), vocabulary_cross_entropy(whole, batch)


def at_least(**values: float) -> None:
    """Raises: ValueError naming a value that is no finite number of 0 or more."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value} is not a finite number of 0 or more")


def above_zero(**values: float) -> None:
    """Raises: ValueError naming a value that is no finite number above 0."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} = {value} is not a finite number above 0")


def joined(batches: list[Batch]) -> Batch:
    """Return the rows of all batches, as the model reads them, for one forward."""
    return Batch.cat([Batch({name: batch[name] for name in read_of(batch)}) for batch in batches])
