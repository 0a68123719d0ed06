"""What tests of classifying methods share: tiny float64 BERT and RoBERTa models whose vocabularies differ,
rows with every field of both heads, a `Step` and `Data` with extra sets, oracles in numpy.

A text is a list of word numbers 0..19. Both families know every word, under other ids; RoBERTa's splits each
word with an odd number in two tokens, so that lengths, mask positions and word numbers differ too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from method_kit import FakeStep
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from kdbench.distiller import Batch, Distiller

Array = npt.NDArray[np.float64]
WORDS = 20  # words that both families know
LABEL_WORDS = (3, 8, 14)  # the words of classes 0, 1 and 2; RoBERTa's ids of them are single tokens too
FAMILIES = {"student": "bert", "teacher": "roberta", "pretrained": "roberta"}  # which tokenizer a role has
SPECIAL = {
    "bert": {"pad": 0, "cls": 2, "sep": 3, "mask": 4},
    "roberta": {"cls": 0, "pad": 1, "sep": 2, "mask": 5},
}
VOCABULARY = {"bert": 5 + WORDS, "roberta": 6 + 2 * WORDS}

TEXTS = [  # first and second sentence; one has no second
    ([3, 4, 5], [6, 7]),
    ([1], [2, 9, 11, 12]),
    ([8, 13, 14, 0, 19], [18]),
    ([10, 15], []),
    ([17, 16, 2, 6], [5, 1, 0]),
    ([7, 7], [7]),
]


def tiny_bert(
    seed: int, head: str = "sequence", classes: int = 2, layers: int = 2, width: int = 8, heads: int = 2
) -> Any:
    """A random BERT in float64 and eval mode whose distributions are far from uniform."""
    config = BertConfig(pad_token_id=0, **_sizes("bert", classes, layers, width, heads))
    cls = BertForSequenceClassification if head == "sequence" else BertForMaskedLM
    return _random(cls, config, seed)


def tiny_roberta(
    seed: int, head: str = "sequence", classes: int = 2, layers: int = 3, width: int = 12, heads: int = 3
) -> Any:
    """The same for RoBERTa: more layers, wider, other heads, another vocabulary."""
    sizes = _sizes("roberta", classes, layers, width, heads) | {"type_vocab_size": 1}
    config = RobertaConfig(pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes)
    cls = RobertaForSequenceClassification if head == "sequence" else RobertaForMaskedLM
    return _random(cls, config, seed)


def _sizes(family: str, classes: int, layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY[family],
        "num_labels": classes,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
    }


def _random(cls: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).double().eval()


def without_head(model: Any) -> Any:
    """Turn `model` into one whose logits are twice those of its head, which so is not all there is."""

    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    model.__class__ = Doubled
    return model


def tokens_of(word: int, family: str) -> list[int]:
    """The ids of a word: one for BERT; two for RoBERTa where the word's number is odd."""
    if family == "bert":
        return [5 + word]
    first = 6 + WORDS - 1 - word
    return [first, first + WORDS] if word % 2 else [first]


def label_id(word: int, family: str) -> int:
    """The single id that stands for a class's word."""
    return tokens_of(word, family)[0]


def class_rows(
    head: str = "sequence",
    classes: int = 2,
    roles: Sequence[str] = ("teacher",),
    count: int = 6,
    first_id: int = 100,
    labelled: bool = True,
    families: Mapping[str, str] = FAMILIES,
    segments: bool = False,
) -> Batch:
    """Ragged rows of all roles with every field of `head`, padded one token beyond the longest.

    Labels go round the classes, or are -1. `families` says whose tokenizer a role has. Beyond six rows the
    texts repeat with every word shifted by one. `segments` gives prompts two segments, as some of PET's have.
    """
    texts = [_shifted(TEXTS[row % len(TEXTS)], row // len(TEXTS)) for row in range(count)]
    label = torch.arange(count) % classes if labelled else torch.full((count,), -1)
    fields = {"example_id": torch.arange(count) + first_id, "class_label": label}
    for role in ("student", *roles):
        prefix = "" if role == "student" else f"{role}."
        family = families[role]
        prompted = head != "sequence"
        own = _prompted(texts, family, classes, segments) if prompted else _sequence(texts, family)
        fields |= {prefix + name: value for name, value in own.items()}
    return Batch(fields)


def _shifted(text: tuple[list[int], list[int]], by: int) -> tuple[list[int], list[int]]:
    first, second = ([(word + by) % WORDS for word in part] for part in text)
    return first, second


def _sequence(texts: Sequence[tuple[list[int], list[int]]], family: str) -> dict[str, Tensor]:
    """CLS a SEP b SEP, or CLS a SEP."""
    special = SPECIAL[family]
    ids, segments, words = [], [], []
    for first, second in texts:
        row, segment, word, number = [special["cls"]], [0], [-1], 0
        for place, part in enumerate((first, second)):
            for one in part:
                new = tokens_of(one, family)
                row, segment = row + new, segment + [place] * len(new)
                word, number = word + [number] * len(new), number + 1
            if part:
                row, segment, word = [*row, special["sep"]], [*segment, place], [*word, -1]
        ids.append(row)
        segments.append(segment)
        words.append(word)
    return {
        "input_ids": _padded(ids, special["pad"]),
        "length": torch.tensor([len(row) for row in ids]),
        "segment_ids": _padded(segments, 0),
        "word_index": _padded(words, -1),
    }


def _prompted(
    texts: Sequence[tuple[list[int], list[int]]], family: str, classes: int, segments: bool
) -> dict[str, Tensor]:
    """CLS a MASK b SEP; the second of two segments starts after the mask."""
    special = SPECIAL[family]
    ids, place, parts = [], [], []
    for first, second in texts:
        before = [special["cls"], *(token for word in first for token in tokens_of(word, family))]
        after = [token for word in second for token in tokens_of(word, family)]
        ids.append([*before, special["mask"], *after, special["sep"]])
        place.append(len(before))
        parts.append([0] * (len(before) + 1) + [1] * (len(after) + 1))
    words = torch.tensor([label_id(word, family) for word in LABEL_WORDS[:classes]])
    return {
        "input_ids": _padded(ids, special["pad"]),
        "length": torch.tensor([len(row) for row in ids]),
        "mask_index": torch.tensor(place),
        "verbalizer_ids": words.repeat(len(ids), 1),
        **({"segment_ids": _padded(parts, 0)} if segments else {}),
    }


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows)) + 1), value)
    for row, entries in zip(out, rows, strict=True):
        row[: len(entries)] = torch.tensor(entries)
    return out


def otherwise_padded(batch: Batch, seed: int = 0) -> Batch:
    """The same rows, three columns wider in each field of tokens, with random content beyond each row's end.

    Ids are below both vocabularies, segments 0 or 1, word numbers such as the text has.
    """
    draw = torch.Generator().manual_seed(seed)
    fields = dict(batch)
    for name, value in batch.items():
        role, _, field = name.rpartition(".")
        most = {"input_ids": min(VOCABULARY.values()), "segment_ids": 2, "word_index": 6}.get(field)
        if most is None:
            continue
        length = batch[f"{role}.length" if role else "length"]
        noise = torch.randint(0, most, (len(value), value.shape[1] + 3), generator=draw)
        wide = torch.cat([value, value.new_zeros(len(value), 3)], dim=1)
        beyond = torch.arange(noise.shape[1]) >= length[:, None]
        fields[name] = torch.where(beyond, noise, wide)
    return Batch(fields, batch.totals)


class ClassStep(FakeStep):
    """A `FakeStep` with extra sets: `extra(name)` gives all rows of the set, each time."""

    def __init__(
        self, seed: int = 7, visit: int = 0, extras: Mapping[str, Batch] | None = None, progress: float = 0.0
    ) -> None:
        super().__init__(seed, visit)
        self.extras, self.progress = dict(extras or {}), progress

    def extra(self, name: str) -> Batch | None:
        return self.extras.get(name)


class ClassData:
    """Sources that `prepare` may read, in parts of `size` rows."""

    def __init__(self, size: int = 4, **sources: Batch) -> None:
        self.sources, self.size = sources, size

    def batches(self, split: str, batch_size: int | None = None) -> Iterator[Batch]:
        rows = self.sources[split]
        for start in range(0, rows.size, self.size):
            yield rows.rows(slice(start, start + self.size))


Loss = Callable[[Any, Any], Tensor]


def gradients(distiller: Distiller, loss: Loss, rows: Any, step: Any = None) -> dict[str, Tensor]:
    """Gradients of `loss(rows, step)` in every parameter of the distiller that has one."""
    distiller.zero_grad()
    loss(rows, step or ClassStep()).backward()
    found = {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}
    distiller.zero_grad()
    return found


def assert_slope(
    distiller: Distiller, loss: Loss, rows: Any, name: str, step: Any = None, entries: int = 3
) -> None:
    """Compare the largest entries of the gradient in parameter `name` with central differences."""
    found = gradients(distiller, loss, rows, step)[name].flatten()
    weight = dict(distiller.named_parameters())[name].data.view(-1)
    assert float(found.abs().max()) > 1e-6, f"{name} has no gradient"
    for entry in found.abs().argsort(descending=True)[:entries].tolist():
        kept, width, values = weight[entry].item(), 1e-5, []
        for sign in (1, -1):
            weight[entry] = kept + sign * width
            with torch.no_grad():
                values.append(loss(rows, step or ClassStep()).item())
        weight[entry] = kept
        slope = (values[0] - values[1]) / (2 * width)
        assert abs(slope - float(found[entry])) <= 1e-8 + 1e-6 * abs(slope), (name, entry, slope)


def assert_cuts_agree(distiller: Distiller, loss: Loss, rows: Batch, step: Any = None) -> None:
    """The loss of the whole batch is the sum over micro-batches of 1 and of 4 rows, its gradient too."""
    whole = gradients(distiller, loss, rows, step)
    value = loss(rows, step or ClassStep()).item()
    for size in (1, 4):
        parts = [rows.rows(slice(i, i + size)).with_totals(rows.totals) for i in range(0, rows.size, size)]
        summed: dict[str, Tensor] = {}
        for part in parts:
            for name, grad in gradients(distiller, loss, part, step).items():
                summed[name] = summed.get(name, torch.zeros_like(grad)) + grad
        assert abs(sum(loss(part, step or ClassStep()).item() for part in parts) - value) < 1e-11
        for name, grad in whole.items():
            torch.testing.assert_close(summed.get(name, torch.zeros_like(grad)), grad, rtol=0, atol=1e-10)


def row_logits(model: nn.Module, batch: Batch) -> Array:
    """Class logits [B, N] from the model's own forward, one unpadded row at a time."""
    out = []
    for row in range(batch.size):
        stop = int(batch["length"][row])
        inputs = {"input_ids": batch["input_ids"][row : row + 1, :stop]}
        if "segment_ids" in batch and model.config.type_vocab_size > 1:
            inputs["token_type_ids"] = batch["segment_ids"][row : row + 1, :stop]
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        if "mask_index" in batch:
            logits = logits[batch["mask_index"][row]][batch["verbalizer_ids"][row]]
        out.append(logits.numpy())
    return np.stack(out)


def row_states(model: nn.Module, batch: Batch) -> list[Array]:
    """States of embedding output and all layers of each unpadded row: B arrays [L + 1, T, H]."""
    out = []
    for row in range(batch.size):
        stop = int(batch["length"][row])
        inputs = {"input_ids": batch["input_ids"][row : row + 1, :stop]}
        if "segment_ids" in batch and model.config.type_vocab_size > 1:
            inputs["token_type_ids"] = batch["segment_ids"][row : row + 1, :stop]
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        out.append(np.stack([state[0].numpy() for state in states]))
    return out
