"""Tasks of prompt transfer in five formats: classes, a number, a choice, a tag per word, a span of text.

Source: formats and fields of PANDA (Zhong et al. 2022), https://arxiv.org/abs/2208.10160, and its public
`p-tuning-v2` code: sentences or pairs, multiple choice with one pair per choice, words whose first sub-word
carries the tag, start and end of an answer; max length 128, 384 for spans.
Differs: a dev split is carved from train, and the official validation split is the test set, where that code
reports the best epoch on the validation split itself (`selection = "test"` does so, `"split"` halves it);
what is over `max_length` is cut, a context too, where that code slides a window over it; a word that is cut
off counts as a word outside every span, where that code leaves it out of the score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kdbench.distiller import Batch
from kdbench.errors import UserError, unknown
from kdbench.task import Decode, Row, Task, spread, tokenizer_hash

Ids = npt.NDArray[np.int64]

FORMATS = ("classes", "number", "choice", "tokens", "span")
METRICS = ("accuracy", "f1", "matthews", "pearson_spearman", "entity_f1", "token_f1")
SELECTIONS = ("train", "test", "split")
OUTSIDE = "O"  # the tag of a word outside every span
IGNORED = -100  # the label of a position that has none
LONGEST_ANSWER = 30  # tokens of an answer's span


@dataclass(frozen=True)
class TransferData:
    """What a data set is.

    `format` is one of `FORMATS`, `metric` (the printed one) of `METRICS`. `classes` names the classes in
    index order; of "choice" the choices, of "tokens" the tags; empty for "number" and "span". `pair` says
    that rows have two segments. `max_length` is the default length limit in tokens.
    """

    name: str
    format: str
    metric: str
    classes: tuple[str, ...] = ()
    pair: bool = False
    max_length: int = 128

    def __post_init__(self) -> None:
        for what, given, known in (("format", self.format, FORMATS), ("metric", self.metric, METRICS)):
            if given not in known:
                raise unknown(what, given, known, f"data set '{self.name}'")

    @property
    def outputs(self) -> int:
        """Outputs of the task's linear head: a logit per class or tag, start and end, else one."""
        return {"number": 1, "choice": 1, "span": 2}.get(self.format, len(self.classes))


# --------------------------------------------------------------------------------------------------
# encoding


@dataclass(frozen=True)
class Segments:
    """One encoded row or choice: `ids` and `segments` [T] int64, special tokens included.

    `first` and `second` [T, 2] are the characters (start, end) of the tokens of each segment, (-1, -1)
    elsewhere; empty for formats that do not need them.
    """

    ids: Ids
    segments: Ids
    first: Ids
    second: Ids
    truncated: bool


@dataclass(frozen=True)
class Example:
    """One encoded row: a sequence per choice, else one.

    `labels` [T] are the tags' indices (`IGNORED` where there is none) and `heads` the position of each word's
    first token (-1: cut off), both of tokens; `start` and `end` are the answer's tokens (0, 0 where it is cut
    off) and `context` [T] marks those that may be one, all three of a span.
    """

    sequences: tuple[Segments, ...]
    labels: Ids | None = None
    heads: tuple[int, ...] = ()
    start: int = 0
    end: int = 0
    context: Ids | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(one.ids) for one in self.sequences)

    @property
    def truncated(self) -> bool:
        return any(one.truncated for one in self.sequences)


class TransferEncoder:
    """Token ids of a data set's rows for one model, in its tokenizer's frame for one or two segments.

    `max_length` counts all tokens. What is too long loses the tail of its longer segment, down to half of
    the room, then of the other. `key` names the tokenizer's content and the rules, so that equal encoders
    share a cache.

    Raises: UserError for a tokenizer that is not a fast one or lacks the special tokens, or for a limit that
    leaves no room for a text.
    """

    head = "encoder"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: TransferData, max_length: int) -> None:
        self.tokenizer: Any = tokenizer
        self.spec = spec
        self.max_length = self.max_prompt = max_length
        name = tokenizer.name_or_path or type(tokenizer).__name__
        for token in ("cls", "sep"):
            if getattr(tokenizer, f"{token}_token_id", None) is None:
                raise UserError(f"tokenizer {name}: it has no {token} token, which the task needs")
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {name}: it must be a fast one (a tokenizer.json)")
        self._cls, self._sep = int(self.tokenizer.cls_token_id), int(self.tokenizer.sep_token_id)
        pad = self.tokenizer.pad_token_id
        self._pad = 0 if pad is None else int(pad)
        self.eos = self._sep
        # between two segments stand one separator (BERT) or two (RoBERTa)
        self._between = [self._sep] * max(1, self.tokenizer.num_special_tokens_to_add(pair=True) - 2)
        # BERT numbers the second segment 1, RoBERTa 0
        numbers = self.tokenizer("a", "a", return_token_type_ids=True)["token_type_ids"]
        self._numbered = max(numbers, default=0) > 0
        if max_length < (least := 2 + spec.pair * (len(self._between) + 1) + 1):
            raise UserError(
                f"task: max_length = {max_length} leaves no room for a text; {least} is the least"
            )
        rules = [spec.format, list(spec.classes), max_length, self._cls, self._sep]
        digest = hashlib.sha256(json.dumps([*rules, self._between, self._numbered]).encode()).hexdigest()
        self.key = f"{tokenizer_hash(tokenizer)[:16]}-{digest[:16]}"

    def longest(self, new_tokens: int) -> int:
        """The longest sequence in tokens that a model reads."""
        return self.max_length

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens, segments parted by " | "."""
        hidden = set(self.tokenizer.all_special_ids) - {self._sep, self.tokenizer.unk_token_id}
        segments: list[list[int]] = [[]]
        for one in ids:
            if one == self._sep:
                segments.append([])
            elif one not in hidden:
                segments[-1].append(one)
        made = (self.tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in segments if one)
        return " | ".join(str(text).strip() for text in made)

    def prompt(self, example: Example) -> str:
        """The text as the model reads it; choices are parted by " || "."""
        return " || ".join(self.decode(one.ids.tolist()) for one in example.sequences)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Encodes rows of the data set's format (`TransferTask`)."""
        pairs = [pair for row in rows for pair in segments_of(row)]
        first = self._tokens([a for a, _ in pairs])
        second = self._tokens([b or "" for _, b in pairs])
        made = iter(
            self._join(a, None if pair[1] is None else b)
            for pair, a, b in zip(pairs, first, second, strict=True)
        )
        return [self._example(row, tuple(next(made) for _ in segments_of(row))) for row in rows]

    def tensors(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The model's fields of a batch: right-padded ids, and what follows from them."""
        flat = [one for example in examples for one in example.sequences]
        ids, segments = _table([one.ids for one in flat], self._pad), _table([one.segments for one in flat])
        length = torch.tensor([len(one.ids) for one in flat], dtype=torch.int64)
        if self.spec.format == "choice":
            choices = len(self.spec.classes)
            length = length.view(-1, choices)
            fields = {
                "input_ids": ids.view(*length.shape, ids.shape[1]),
                "segment_ids": segments.view(*length.shape, ids.shape[1]),
                "choice_length": length,
                "length": length.amax(1),
            }
        else:
            fields = {"input_ids": ids, "segment_ids": segments, "length": length}
        if self.spec.format == "tokens":
            fields["labels"] = _table([one.labels for one in examples if one.labels is not None], IGNORED)
        if self.spec.format == "span":
            fields["start"] = torch.tensor([one.start for one in examples], dtype=torch.int64)
            fields["end"] = torch.tensor([one.end for one in examples], dtype=torch.int64)
            fields["context"] = _table([one.context for one in examples if one.context is not None])
        return fields

    def _tokens(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and characters of each text; names of special tokens in it are plain text."""
        if not texts:
            return []
        made = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            split_special_tokens=True,
            verbose=False,
        )
        return list(zip(made["input_ids"], made["offset_mapping"], strict=True))

    def _join(self, first: _Tokens, second: _Tokens | None) -> Segments:
        """One or two segments within the limit."""
        a, b = first[0], [] if second is None else second[0]
        room = max(0, self.max_length - 2 - (0 if second is None else len(self._between)))
        keep_a = min(len(a), max(room - len(b), (room + 1) // 2))
        keep_b = min(len(b), room - keep_a)
        ids, numbers = [self._cls, *a[:keep_a]], [0] * (1 + keep_a)
        places = [1, 1]
        if second is not None:
            ids += self._between
            numbers += [0] * len(self._between)
            places[1] = len(ids)
            ids += b[:keep_b]
            numbers += [int(self._numbered)] * keep_b
        ids.append(self._sep)
        numbers.append(numbers[-1] if keep_b else int(self._numbered and second is not None))
        located = self.spec.format in ("tokens", "span")
        spans = np.full((2, len(ids) if located else 0, 2), -1, dtype=np.int64)
        for number, (found, keep) in enumerate([(first, keep_a), (second, keep_b)]):
            if located and found is not None and keep:
                spans[number, places[number] : places[number] + keep] = found[1][:keep]
        return Segments(
            np.asarray(ids, dtype=np.int64),
            np.asarray(numbers, dtype=np.int64),
            spans[0],
            spans[1],
            keep_a + keep_b < len(a) + len(b),
        )

    def _example(self, row: Row, made: tuple[Segments, ...]) -> Example:
        if self.spec.format == "tokens":
            return self._tagged(row, made)
        if self.spec.format == "span":
            return _answered(row, made)
        return Example(made)

    def _tagged(self, row: Row, made: tuple[Segments, ...]) -> Example:
        """The tag of each word at its first token."""
        text, spans = " ".join(row["words"]), made[0].first
        word_at = [i for i, word in enumerate(row["words"]) for _ in range(len(word) + 1)]
        heads = [-1] * len(row["words"])
        labels = np.full(len(spans), IGNORED, dtype=np.int64)
        for at, (start, end) in enumerate(spans.tolist()):
            inside = [i for i in range(max(start, 0), end) if not text[i].isspace()]
            if inside and heads[word_at[inside[0]]] < 0:
                word = word_at[inside[0]]
                heads[word] = at
                labels[at] = self.spec.classes.index(row["tags"][word])
        return Example(made, labels, tuple(heads))


_Tokens = tuple[list[int], list[tuple[int, int]]]


def segments_of(row: Row) -> list[tuple[str, str | None]]:
    """The first and second segment of a row, of each of its choices; None where there is no second one."""
    if "words" in row:
        return [(" ".join(row["words"]), row.get("predicate"))]
    if "question" in row:
        return [(row["question"], row["text"])]
    if "choices" in row:
        return [(row["text"], choice) for choice in row["choices"]]
    return [(row["text"], None)] if "text" in row else [(row["text_a"], row["text_b"])]


def _answered(row: Row, made: tuple[Segments, ...]) -> Example:
    """The tokens of the first answer, and those of the context."""
    spans = made[0].second
    inside = spans[:, 1] > spans[:, 0]
    answer = row["answers"][0]
    begin = row["answer_start"] if "answer_start" in row else row["text"].find(answer)
    finish = begin + len(answer)
    start, end = 0, 0
    if begin >= 0 and answer and finish <= spans[inside, 1].max(initial=0):
        start = int(np.flatnonzero(inside & (spans[:, 1] > begin))[0])
        end = int(np.flatnonzero(inside & (spans[:, 0] < finish))[-1])
    return Example(made, start=start, end=end, context=inside.astype(np.int64))


def _table(rows: Sequence[Ids], pad: int = 0) -> Tensor:
    table = np.full((len(rows), max((len(row) for row in rows), default=1)), pad, dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table)


# --------------------------------------------------------------------------------------------------
# the task


class TransferTask(Task):
    """A data set with the splits `train`, `dev` and `test/<name>`, for models with the head "encoder".

    A subclass has the setting `dataset` and defines `spec` and `read`. Rows by format:

        classes   text, or text_a and text_b; label, a class's name
        number    the same; label, a float
        choice    text, choices (a list of texts), label (index of the right one)
        tokens    words, tags (names, one a word); maybe predicate, a second segment
        span      text (the context), question, answers (texts); maybe answer_start, where the first begins
                  (in characters; else its first occurrence)

    A row of classes may have `group` (an int), `candidate` and `answers` (texts): the group's likeliest
    candidate is its answer. Rows of one `block` (an int, where there is one), else of one text, are on one
    side of a carved split. Rows of classes and choice gain `class_label`, the label's index. A row keeps its
    number in its part as `example_id`.

    `counts[split]`: records; truncated/<role>, rows cut for a role's model; answers_cut/<role>, answers of
    spans that are cut off or not in their context.
    """

    heads: ClassVar[tuple[str, ...]] = ("encoder",)
    fields: ClassVar[tuple[str, ...]] = ("example_id", "input_ids", "length", "segment_ids")
    RULES: ClassVar[int] = 1  # raised when splits, truncation or fields change

    @dataclass
    class Settings:
        """Which data, how much of it, and on what checkpoints are selected."""

        dataset: str = ""
        max_length: int = 0  # tokens, special ones included; 0: the data set's own
        train_limit: int = 0  # training examples, spread evenly over the set; 0: all
        test_limit: int = 0  # examples of the test set, spread evenly over it; 0: all
        selection: str = "train"  # what dev is carved from; or test (dev is the test set), split (half of it)
        dev_share: float = 0.1  # of the training rows, for dev
        dev_limit: int = 500  # rows that dev has at most; 0: no limit

    def __init__(self, settings: Any = None, data_root: Path | None = None) -> None:
        super().__init__(settings, data_root)
        cfg = self.settings
        for name in ("max_length", "train_limit", "test_limit", "dev_limit"):
            if getattr(cfg, name) < 0:
                raise UserError(f"task {self.name}: {name} = {getattr(cfg, name)} must be 0 or more")
        if not 0 < cfg.dev_share < 1:
            raise UserError(f"task {self.name}: dev_share = {cfg.dev_share} must lie between 0 and 1")
        if cfg.selection not in SELECTIONS:
            raise unknown("selection", cfg.selection, SELECTIONS, f"task {self.name}")
        self._spec: TransferData | None = None
        self._parted: dict[str, list[Row]] = {}
        self._encoded: dict[tuple[str, str], tuple[dict[int, tuple[Row, Example]], dict[str, int]]] = {}

    # what a subclass says

    def spec(self) -> TransferData:
        """What the data set is."""
        raise NotImplementedError

    def read(self, part: str) -> list[Row]:
        """All rows of the part "train" or "test", in a fixed order.

        Raises: Missing where the data is not there, UserError where it is malformed.
        """
        raise NotImplementedError

    # what the task does with it

    @property
    def data(self) -> TransferData:
        """The data set, as `spec` says."""
        if self._spec is None:
            self._spec = self.spec()
        return self._spec

    def rules(self) -> list[Any]:
        cfg, data = self.settings, self.data
        chosen = [cfg.train_limit, cfg.test_limit, cfg.selection, cfg.dev_share, cfg.dev_limit]
        return [self.RULES, data.name, data.format, data.metric, list(data.classes), self._length(), *chosen]

    def splits(self) -> list[str]:
        return ["train", "dev", f"test/{self.data.name}"]

    def load(self, split: str) -> list[Row]:
        """Reads a part and takes the split's rows of it.

        Raises: UserError where the data is missing or malformed, or too little to be parted.
        """
        cfg = self.settings
        test = f"test/{self.data.name}"
        if split == "train" or (split == "dev" and cfg.selection == "train"):
            rows = self._part("train")
            count = max(1, round(cfg.dev_share * len(rows)))
            if cfg.selection != "train":
                return _spread(rows, cfg.train_limit)
            held = self._carved(rows, min(count, cfg.dev_limit or count))
            kept = [row for i, row in enumerate(rows) if (i in held) == (split == "dev")]
            return kept if split == "dev" else _spread(kept, cfg.train_limit)
        rows = _spread(self._part("test"), cfg.test_limit)
        if cfg.selection == "split":
            held = self._carved(rows, len(rows) // 2)
            rows = [row for i, row in enumerate(rows) if (i in held) == (split != test)]
        return rows

    def select(self, split: str, encoder: Any) -> list[Row]:
        """All rows; those that the encoder cuts are counted."""
        rows = self.rows(split)
        self.counts.setdefault(split, {})["records"] = len(rows)
        self._split_encoded(split, encoder, "student")
        return rows

    def texts(self, split: str) -> Iterator[str]:
        """The segments of each row (of each of its choices), without labels."""
        for row in self.rows(split):
            found = segments_of(row)
            yield " ".join([found[0][0], *(second for _, second in found if second)])

    def fields_of(self, head: str) -> tuple[str, ...]:
        """The fields of a batch of the data set's format."""
        if head not in self.heads:
            raise unknown("head", head, self.heads, f"task {self.name}")
        own = {
            "classes": ("class_label",),
            "number": ("target",),
            "choice": ("choice_length", "class_label"),
            "tokens": ("labels",),
            "span": ("start", "end", "context"),
        }
        return (*self.fields, *own[self.data.format])

    def model_settings(self) -> dict[str, Any]:
        """`num_labels`, the outputs of the head, and `task_format`."""
        return {"num_labels": self.data.outputs, "task_format": self.data.format}

    def encoder(self, tokenizer: PreTrainedTokenizerBase, head: str = "encoder") -> Any:
        if head not in self.heads:
            raise unknown("head", head, self.heads, f"task {self.name}")
        return TransferEncoder(tokenizer, self.data, self._length())

    def collate(self, rows: Sequence[Row], encoders: Mapping[str, Any]) -> Batch:
        """Fields by format; those of a role other than the student are named `<role>.<field>`.

        all       example_id [B], input_ids [B, T], segment_ids [B, T], length [B]
        classes   class_label [B]
        number    target [B] float32
        choice    input_ids and segment_ids [B, C, T], choice_length [B, C], class_label [B]; length [B] is
                  that of the longest choice
        tokens    labels [B, T], -100 at all but each word's first token
        span      start, end [B], context [B, T]: 1 where an answer may lie
        """
        fields = {"example_id": torch.tensor([row["example_id"] for row in rows], dtype=torch.int64)}
        if self.data.format in ("classes", "choice"):
            fields["class_label"] = torch.tensor([row["class_label"] for row in rows], dtype=torch.int64)
        if self.data.format == "number":
            fields["target"] = torch.tensor([row["label"] for row in rows], dtype=torch.float32)
        for role, encoder in encoders.items():
            prefix = "" if role == "student" else f"{role}."
            made = encoder.tensors(self.encoded(rows, encoder, role))
            fields |= {prefix + name: value for name, value in made.items()}
        return Batch(fields)

    def encoded(self, rows: Sequence[Row], encoder: TransferEncoder, role: str = "student") -> list[Example]:
        """Encoded rows; those of a split come from a cache, changed or foreign rows are encoded anew."""
        out: list[Example | None] = []
        for row in rows:
            split = row.get("split")
            known = None
            if isinstance(split, str) and split in self._loaded:
                known = self._split_encoded(split, encoder, role).get(row["example_id"])
            out.append(known[1] if known is not None and known[0] is row else None)
        new = iter(encoder.encode([row for row, item in zip(rows, out, strict=True) if item is None]))
        return [next(new) if item is None else item for item in out]

    def outputs(
        self,
        model: nn.Module,
        split: str,
        encoder: Any,
        decode: Decode,
        seeds: Sequence[int],
        batch_size: int,
        limit: int | None = None,
        progress: bool = False,
    ) -> list[dict[str, Any]]:
        """What the model predicts for every example, rows as in the split.

        Each row: example_id, set ("dev", or the name after "test/"), seed (the first: nothing is drawn),
        tokens, finished, format, metric (the printed one), prompt (as the model saw it), response and
        references (texts), and by format

            classes, choice   label and prediction (indices), probabilities [N]; group and candidate where the
                              row has them
            number            label and prediction (floats)
            tokens            label and prediction (lists of tags, one a word; "O" for a word that is cut off)
            span              prediction (a text)

        Examples of like length share a batch; `limit` takes that many, spread evenly over the split.
        """
        rows = _spread(self.rows(split, encoder), limit)
        examples = self.encoded(rows, encoder)
        order = sorted(range(len(rows)), key=lambda i: (-examples[i].tokens, i))
        device = next(model.parameters()).device
        label = split.removeprefix("test/")
        out: dict[int, dict[str, Any]] = {}
        with tqdm(total=len(rows), desc=f"predict {label}", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                batch = self.collate([rows[i] for i in chunk], {"student": encoder}).to(device)
                with torch.no_grad():
                    logits = model(batch).double().cpu()
                for i, one in zip(chunk, logits, strict=True):
                    out[i] = {
                        "example_id": rows[i]["example_id"],
                        "set": label,
                        "seed": int(seeds[0]),
                        "tokens": examples[i].tokens,
                        "finished": True,
                        "format": self.data.format,
                        "metric": self.data.metric,
                        "prompt": encoder.prompt(examples[i]),
                        **self._predicted(rows[i], examples[i], one),
                    }
                bar.update(len(chunk))
        return [out[i] for i in range(len(rows))]

    def _predicted(self, row: Row, example: Example, logits: Tensor) -> dict[str, Any]:
        """The prediction of one row, from its logits: [N], [1], [C], [T, N] or [T, 2]."""
        names, told = self.data.classes, dict[str, Any]()
        if self.data.format == "number":
            value = float(logits[0])
            told = {"label": float(row["label"]), "prediction": value}
            return {**told, "response": f"{value:.4g}", "references": [f"{row['label']:g}"]}
        if self.data.format == "tokens":
            best = logits.argmax(-1).tolist()
            tags = [names[best[at]] if at >= 0 else OUTSIDE for at in example.heads]
            told = {"label": list(row["tags"]), "prediction": tags}
            return {**told, "response": " ".join(tags), "references": [" ".join(row["tags"])]}
        if self.data.format == "span":
            answer = _best_span(row["text"], example, logits)
            return {"prediction": answer, "response": answer, "references": list(row["answers"])}
        chances, best_class = logits.softmax(-1), int(logits.argmax())
        told = {"label": row["class_label"], "prediction": best_class, "probabilities": chances.tolist()}
        texts = row.get("choices", names)
        references = row.get("answers", [texts[row["class_label"]]])
        told |= {"response": texts[best_class], "references": list(references)}
        return told | {name: row[name] for name in ("group", "candidate") if name in row}

    def _length(self) -> int:
        return int(self.settings.max_length or self.data.max_length)

    def _part(self, part: str) -> list[Row]:
        """A part's rows, checked, with `example_id` and `class_label`."""
        if part not in self._parted:
            rows = self.read(part)
            for number, row in enumerate(rows, start=1):
                self._check(row, f"task {self.name}: {self.data.name} {part} record {number}")
            self._parted[part] = [
                {"example_id": i, **row, **self._class_label(row)} for i, row in enumerate(rows)
            ]
        return self._parted[part]

    def _class_label(self, row: Row) -> Row:
        if self.data.format == "classes":
            return {"class_label": self.data.classes.index(row["label"])}
        return {"class_label": row["label"]} if self.data.format == "choice" else {}

    def _check(self, row: Row, where: str) -> None:
        """Raises: UserError for a label that is none, or for words without one tag each."""
        names = self.data.classes
        if self.data.format == "classes" and row["label"] not in names:
            raise unknown("class", str(row["label"]), names, where)
        if self.data.format == "choice":
            if len(row["choices"]) != len(names):
                raise UserError(f"{where}: has {len(row['choices'])} choices, must have {len(names)}")
            if row["label"] not in range(len(names)):
                raise UserError(f"{where}: label {row['label']} must lie between 0 and {len(names) - 1}")
        if self.data.format == "tokens":
            if len(row["words"]) != len(row["tags"]) or not row["words"]:
                raise UserError(f"{where}: has {len(row['words'])} words and {len(row['tags'])} tags")
            for tag in row["tags"]:
                if tag not in names:
                    raise unknown("tag", tag, names, where)
        if self.data.format == "span" and not row["answers"]:
            raise UserError(f"{where}: has no answer")

    def _carved(self, rows: Sequence[Row], count: int) -> set[int]:
        """The places of about `count` rows, by a hash of their text: rows of one block or text go together.

        Raises: UserError where all rows are of one block or text.
        """
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(json.dumps(row.get("block", segments_of(row))), []).append(i)
        if len(groups) < 2:
            raise UserError(
                f"task {self.name}: '{self.data.name}' has too few different texts for a dev split"
            )
        held: set[int] = set()
        for key in sorted(groups, key=lambda key: hashlib.sha256(key.encode()).digest()):
            if held and len(held) + len(groups[key]) > count:
                break
            held |= set(groups[key])
        return held

    def _split_encoded(
        self, split: str, encoder: TransferEncoder, role: str
    ) -> dict[int, tuple[Row, Example]]:
        key = (split, encoder.key)
        if key not in self._encoded:
            rows = self.rows(split)
            items = encoder.encode(rows)
            by_id = {row["example_id"]: (row, item) for row, item in zip(rows, items, strict=True)}
            counts = {"truncated": sum(item.truncated for item in items)}
            if self.data.format == "span":
                counts["answers_cut"] = sum(item.end == 0 for item in items)
            self._encoded[key] = by_id, counts
        known, counts = self._encoded[key]
        told = self.counts.setdefault(split, {})
        told |= {f"{name}/{role}": count for name, count in counts.items()}
        return known


def _spread(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """About `limit` rows at even distances, all of a group or none; all for None or 0."""
    groups: dict[int, list[Row]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.get("group", i), []).append(row)
    if not limit or limit >= len(rows):
        return list(rows)
    return [
        row
        for group in spread(list(groups.values()), max(1, limit * len(groups) // len(rows)))
        for row in group
    ]


def _best_span(text: str, example: Example, logits: Tensor) -> str:
    """The context's text from its likeliest start to its likeliest end, `LONGEST_ANSWER` tokens at most.

    `logits` [T, 2]: of start and of end.
    """
    assert example.context is not None
    at = torch.from_numpy(np.flatnonzero(example.context))
    if not len(at):
        return ""
    start, end = logits[at, 0], logits[at, 1]
    sums = start[:, None] + end[None, :]
    reach = torch.arange(len(at))
    width = reach[None, :] - reach[:, None]
    sums = sums.masked_fill((width < 0) | (width >= LONGEST_ANSWER), float("-inf"))
    best = int(sums.argmax())
    spans = example.sequences[0].second[at.numpy()]
    return text[spans[best // len(at), 0] : spans[best % len(at), 1]].strip()
