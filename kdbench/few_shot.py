"""Few-shot text classification: prompts and label words, K-shot draws, encoders of two heads, predictions.

Source: templates, label words, lengths and the draws of Gao et al. 2021 (LM-BFF),
https://arxiv.org/abs/2012.15723, sec. 3 and its public `run_experiment.sh` and `generate_k_shot_data.py`;
patterns of Schick & Schütze 2021 (PET), https://arxiv.org/abs/2001.07676, sec. 4, and its public `pvp.py`;
the unlabelled set of Prompt-Distiller (ICASSP 2023), experimental settings.
Differs: rows are shuffled by a hash of (seed, data set, row), the same under every library version, so a
draw is not LM-BFF's own sample; a text that the data repeat is in one of X, D_dev and Xu, and in X and D_dev
once, where LM-BFF parts rows; a sequence that is too long loses the tail of its sentences, never a token
of the template or the last separator; MNLI and SNLI cap the first sentence as RTE does, so that a long
premise leaves room for the hypothesis; PET's patterns follow the spacing of the template instead of a
space before every part, and are cut as the others.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kdbench.classify import class_logits, mask_logits
from kdbench.distiller import Batch
from kdbench.errors import UserError, unknown
from kdbench.streams import stream_seed
from kdbench.task import Decode, Row, Task, spread, tokenizer_hash

Ids = npt.NDArray[np.int64]

DRAW_SEEDS = (13, 21, 42, 87, 100)  # LM-BFF's five draws
UNLABELED = "unlabeled"
TOP_ROWS, TOP_TOKENS = 32, 10  # rows of an output with the likeliest tokens at the mask, and how many

_PLACE = re.compile(r"\{([^{}]*)\}|(\|)")
_FORMS = ("", "-", ".", "^")

# --------------------------------------------------------------------------------------------------
# templates


@dataclass(frozen=True)
class Fragment:
    """A part of a template that is tokenised on its own.

    `kind` is "text", "mask", or the sentence "a" or "b"; `text` the literal text, or the sentence's form: ""
    as it is, "-" without its last character, "." without its trailing punctuation, "^" with its first letter
    in lower case. `space` says that a sentence follows a space.
    """

    kind: str
    text: str = ""
    space: bool = False

    def fill(self, row: Row) -> str:
        """The fragment's text in one row, its leading space included; the mask has none."""
        if self.kind in ("text", "mask"):
            return self.text
        value = _sentence(row, self.kind)
        if self.text == "-":
            value = value[:-1]
        elif self.text == ".":
            value = value.rstrip(string.punctuation)
        elif self.text == "^":
            value = value[:1].lower() + value[1:]
        return f" {value}" if self.space and value else value


class Template:
    """A prompt with one mask, read from a string such as `{a-}? {mask}, {b^}`.

    `{a}` and `{b}` stand for the first and second sentence, with the forms of `Fragment`; `{mask}` for the
    mask; `|` parts two segments. A fragment after a space is encoded with that space; before the mask there
    is none.

    Raises: UserError for a string that is no template.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.segments = _parse(text)
        kinds = [fragment.kind for segment in self.segments for fragment in segment]
        self.pair = "b" in kinds
        if kinds.count("mask") != 1:
            raise UserError(f"template '{text}': must have one {{mask}}, has {kinds.count('mask')}")
        for kind in ("a", "b"):
            if kinds.count(kind) > 1:
                raise UserError(
                    f"template '{text}': must have {{{kind}}} once, has it {kinds.count(kind)} times"
                )
        if "a" not in kinds:
            raise UserError(f"template '{text}': must have the sentence {{a}}")
        if len(self.segments) > 2:
            raise UserError(f"template '{text}': must have two segments at most, has {len(self.segments)}")

    def fill(self, row: Row, word: str) -> str:
        """The filled text with `word` in the mask's place, segments joined by a space."""
        parts = []
        for segment in self.segments:
            text = ""
            for fragment in segment:
                text += (" " * bool(text) + word) if fragment.kind == "mask" else fragment.fill(row)
            parts.append(text.strip())
        return " ".join(parts)


def _parse(text: str) -> list[list[Fragment]]:
    segments: list[list[Fragment]] = [[]]
    start, space = 0, False

    def literal(end: int) -> None:
        """Adds the text up to `end`; a space at its end belongs to what follows."""
        nonlocal space
        given = text[start:end]
        words = " ".join(given.split())
        within = bool(segments[-1])  # a segment's first token follows no space
        if words:
            segments[-1].append(Fragment("text", f" {words}" if within and given[0].isspace() else words))
        space = bool(segments[-1]) and given[-1:].isspace()

    for match in _PLACE.finditer(text):
        literal(match.start())
        start = match.end()
        name = match[1]
        if match[2]:
            segments.append([])
            space = False
        elif name == "mask":
            segments[-1].append(Fragment("mask"))
        elif name[:1] in ("a", "b") and name[1:] in _FORMS:
            segments[-1].append(Fragment(name[0], name[1:], space))
        else:
            known = ", ".join(f"{{{kind}{form}}}" for kind in "ab" for form in _FORMS)
            raise UserError(f"template '{text}': no place '{{{name}}}'. Known: {{mask}}, {known}.")
    literal(len(text))
    return segments


def _sentence(row: Row, kind: str) -> str:
    """The first ("a") or second ("b") sentence of a row."""
    if kind == "a":
        return str(row["text"] if "text" in row else row["text_a"])
    if "text_b" not in row:
        raise UserError("template: it has {b}, but the data has one sentence per row")
    return str(row["text_b"])


# --------------------------------------------------------------------------------------------------
# prompts of the papers


@dataclass(frozen=True)
class Prompt:
    """A template and each class's label word, with limits in tokens: the whole sequence, and the first
    sentence (None: none of its own).
    """

    template: str
    words: Mapping[str, str]
    max_length: int = 128
    cap: int | None = None


_OPINION = {"negative": "terrible", "positive": "great"}
_NLI = {"contradiction": "No", "entailment": "Yes", "neutral": "Maybe"}
_PAIR = "{a-}? {mask}, {b^}"

# Classes in index order. LM-BFF, run_experiment.sh: "--max_seq_len 256 --first_sent_limit 240" (RTE),
# "--first_sent_limit 110" (mr, mpqa, trec), "--max_seq_length 128" (the rest). MNLI and SNLI have
# "--max_seq_len 256" and no limit of the first sentence there, 240 in EasyNLP's few-shot example.
LM_BFF: dict[str, Prompt] = {
    "sst2": Prompt("{a} It was {mask}.", _OPINION),
    "mr": Prompt("{a} It was {mask}.", _OPINION, cap=110),
    "mpqa": Prompt("{a} It was {mask}.", _OPINION, cap=110),
    "trec": Prompt(
        "{mask}: {a}",
        {
            "description": "Description",
            "entity": "Entity",
            "abbreviation": "Expression",
            "human": "Human",
            "location": "Location",
            "number": "Number",
        },
        cap=110,
    ),
    "mnli": Prompt(_PAIR, _NLI, 256, 240),
    "snli": Prompt(_PAIR, _NLI, 256, 240),
    "rte": Prompt(_PAIR, {"entailment": "Yes", "not_entailment": "No"}, 256, 240),
}

_PET_NLI = ('"{a.}"? | {mask}, "{b}"', "{a.}? | {mask}, {b}")
_PET_RTE = (
    '"{b.}"? | {mask}, "{a}"',
    "{b.}? | {mask}, {a}",
    '"{b.}"? | {mask}. "{a}"',
    "{b.}? | {mask}. {a}",
)
_PET_REVIEW = (  # those of Yelp polarity, its restaurant included
    "It was {mask}. {a}",
    "{a}. All in all, it was {mask}.",
    "Just {mask}! | {a}",
    "{a} | In summary, the restaurant is {mask}.",
)
_WRONG = {"contradiction": "Wrong", "entailment": "Right", "neutral": "Maybe"}
_ENTAILED = {"entailment": "Yes", "not_entailment": "No"}
_PET_NLI_PROMPTS = [Prompt(one, words, 256, 240) for words in (_WRONG, _NLI) for one in _PET_NLI]
_PET_REVIEW_PROMPTS = [Prompt(one, {"negative": "bad", "positive": "good"}, cap=110) for one in _PET_REVIEW]

PET: dict[str, list[Prompt]] = {
    "mnli": _PET_NLI_PROMPTS,
    "snli": _PET_NLI_PROMPTS,
    "rte": [
        *(Prompt(one, _ENTAILED, 256, 240) for one in _PET_RTE),
        Prompt(
            "{a} question: {b} True or False? answer: {mask}",
            {"entailment": "true", "not_entailment": "false"},
            256,
            200,  # own: room for the question
        ),
    ],
    "sst2": _PET_REVIEW_PROMPTS,
    "mr": _PET_REVIEW_PROMPTS,
}


def prompt_of(dataset: str, prompt_set: str = "lm-bff") -> Prompt:
    """The prompt of a data set: LM-BFF's, or PET's pattern i for `pet-<i>`; classes in LM-BFF's order.

    Raises: UserError for a data set or prompt set that does not exist.
    """
    if dataset not in LM_BFF:
        raise unknown("prompt for the data set", dataset, LM_BFF, "task")
    classes = LM_BFF[dataset].words
    if prompt_set == "lm-bff":
        return LM_BFF[dataset]
    number = prompt_set.removeprefix("pet-")
    if number == prompt_set or not number.isdecimal():
        raise UserError(f"task: prompt_set = '{prompt_set}' must be lm-bff or pet-<i>, i a pattern's number")
    if dataset not in PET:
        raise UserError(f"task: PET has no pattern for '{dataset}'; it has some for: {', '.join(PET)}")
    patterns = PET[dataset]
    if int(number) >= len(patterns):
        raise UserError(f"task: PET has no pattern {number} for '{dataset}'; it has 0 to {len(patterns) - 1}")
    one = patterns[int(number)]
    return Prompt(one.template, {name: one.words[name] for name in classes}, one.max_length, one.cap)


# --------------------------------------------------------------------------------------------------
# encoding


@dataclass(frozen=True)
class Example:
    """One encoded row: `ids`, `segments` and `words` [T] int64, special tokens included.

    `words` numbers the whitespace-separated word of each token through both sentences, -1 for special tokens
    (empty for a prompt); `mask` is the mask's position (-1: none).
    """

    ids: Ids
    segments: Ids
    words: Ids
    mask: int
    truncated: bool


class ClassEncoder:
    """Token ids of rows for one model: prompted (head "masked_lm"), or the sentences alone ("sequence").

    `max_length` counts all tokens, `cap` those of the first sentence. `verbalizer_ids` are the label words'
    ids, in class order (empty for "sequence"). `key` names the tokenizer's content and the rules, so that
    equal encoders share a cache.

    Raises: UserError for a tokenizer without the special tokens, for a label word that is not one token of
    its own, or for a template that leaves no room.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        head: str,
        template: Template,
        label_words: Mapping[str, str],
        max_length: int = 128,
        cap: int | None = None,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.head = head
        self.template = template
        self.max_length = self.max_prompt = max_length
        self.cap = cap
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        prompted = head == "masked_lm"
        for token in ("cls", "sep", *(["mask"] if prompted else [])):
            if getattr(tokenizer, f"{token}_token_id", None) is None:
                raise UserError(f"tokenizer {self.name}: it has no {token} token, which the task needs")
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {self.name}: it must be a fast one (a tokenizer.json)")
        self._cls, self._sep = int(self.tokenizer.cls_token_id), int(self.tokenizer.sep_token_id)
        self._mask = int(self.tokenizer.mask_token_id) if prompted else -1
        pad = self.tokenizer.pad_token_id
        self._pad = 0 if pad is None else int(pad)
        self.eos = self._sep
        # between two segments stand one separator (BERT) or two (RoBERTa)
        self._between = [self._sep] * max(1, self.tokenizer.num_special_tokens_to_add(pair=True) - 2)
        # BERT numbers the second segment 1, RoBERTa 0
        self._numbered = max(self.tokenizer("a", "a", return_token_type_ids=True)["token_type_ids"]) > 0
        plain = [[Fragment("a")], *([[Fragment("b")]] if template.pair else [])]
        self._segments = template.segments if prompted else plain
        self.verbalizer_ids = [] if not prompted else self._verbalize(label_words)
        rules = [head, template.text, list(label_words.items()) if prompted else [], max_length, cap]
        rules += [self._cls, self._sep, self._mask, self._numbered, self._between]
        digest = hashlib.sha256(json.dumps(rules).encode()).hexdigest()
        self.key = f"{tokenizer_hash(tokenizer)[:16]}-{digest[:16]}"
        fixed = self._frame() + sum(
            1 if fragment.kind == "mask" else len(self._tokens([fragment.text])[0][0])
            for segment in self._segments
            for fragment in segment
            if fragment.kind in ("text", "mask")
        )
        if fixed >= max_length:
            raise UserError(
                f"task: max_length = {max_length} leaves no room beside {fixed} tokens of the prompt"
            )

    def longest(self, new_tokens: int) -> int:
        """The longest sequence in tokens that a model reads."""
        return self.max_length

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, segments parted by " | "; of the special tokens only the mask is shown."""
        hidden = set(self.tokenizer.all_special_ids) - {self._mask, self._sep, self.tokenizer.unk_token_id}
        segments: list[list[int]] = [[]]
        for one in ids:
            if one == self._sep:
                segments.append([])
            elif one not in hidden:
                segments[-1].append(one)
        return " | ".join(self._text(segment) for segment in segments if segment)

    def token(self, token_id: int) -> str:
        """The text of one token, without the mark or space of a word's beginning."""
        return self._text([token_id]).strip() or str(self.tokenizer.convert_ids_to_tokens(token_id))

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Encodes rows with `text`, or `text_a` and `text_b`."""
        if not rows:
            return []
        columns = [[self._column(fragment, rows) for fragment in segment] for segment in self._segments]
        return [
            self._join(row, [[column[i] for column in segment] for segment in columns])
            for i, row in enumerate(rows)
        ]

    def tensors(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The model's fields of a batch: right-padded ids and the head's own fields."""
        fields = {
            "input_ids": _padded([one.ids for one in examples], self._pad),
            "length": torch.tensor([len(one.ids) for one in examples], dtype=torch.int64),
        }
        if self.head == "masked_lm":
            words = torch.tensor(self.verbalizer_ids, dtype=torch.int64)
            fields["mask_index"] = torch.tensor([one.mask for one in examples], dtype=torch.int64)
            fields["verbalizer_ids"] = words.repeat(len(examples), 1)
        if self.head == "sequence" or len(self._segments) > 1:
            fields["segment_ids"] = _padded([one.segments for one in examples], 0)
        if self.head == "sequence":
            fields["word_index"] = _padded([one.words for one in examples], -1)
        return fields

    def _verbalize(self, label_words: Mapping[str, str]) -> list[int]:
        """The id of each class's label word, looked up as a word within a text."""
        owner: dict[int, str] = {}
        for name, word in label_words.items():
            where = f"label word '{word}' of class '{name}': tokenizer {self.name}"
            ids = self._tokens([f" {word}"])[0][0]
            if len(ids) != 1:
                pieces = self.tokenizer.convert_ids_to_tokens(ids)
                raise UserError(f"{where} makes {len(ids)} tokens of it, {pieces}; it must be one")
            one = ids[0]
            if one == self.tokenizer.unk_token_id or one in self.tokenizer.all_special_ids:
                raise UserError(f"{where} does not know it")
            if self.token(one) not in (word, self._lower(word)):
                raise UserError(f"{where} reads it back as '{self.token(one)}'")
            if one in owner:
                raise UserError(f"{where} has the same token for it as for class '{owner[one]}'")
            owner[one] = name
        return list(owner)

    def _lower(self, word: str) -> str:
        """The word as an uncased tokenizer knows it; itself under a cased one."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return word if normalizer is None else str(normalizer.normalize_str(word))

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _frame(self) -> int:
        """How many tokens stand around the segments."""
        return 2 + (len(self._between) if len(self._segments) > 1 else 0)

    def _tokens(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character spans of each text; names of special tokens in it are plain text."""
        made = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            split_special_tokens=True,
            verbose=False,
        )
        return list(zip(made["input_ids"], made["offset_mapping"], strict=True))

    def _column(self, fragment: Fragment, rows: Sequence[Row]) -> list[_Part]:
        """One fragment's tokens in every row."""
        if fragment.kind == "mask":
            return [_Part("mask", [self._mask])] * len(rows)
        if fragment.kind == "text":
            return [_Part("text", self._tokens([fragment.text])[0][0])] * len(rows)
        texts = [fragment.fill(row) for row in rows]
        numbered = self.head == "sequence"
        return [
            _Part(fragment.kind, ids, _word_numbers(text, spans) if numbered else [])
            for text, (ids, spans) in zip(texts, self._tokens(texts), strict=True)
        ]

    def _join(self, row: Row, segments: list[list[_Part]]) -> Example:
        """One row within the limits: the first sentence is cut to its cap, then the sentences' tail."""
        parts = [part for segment in segments for part in segment]
        kept = [
            min(len(part.ids), self.cap or len(part.ids)) if part.kind == "a" else len(part.ids)
            for part in parts
        ]
        excess = sum(kept) + self._frame() - self.max_length
        for i in reversed(range(len(parts))):
            if excess > 0 and parts[i].kind in ("a", "b"):
                less = min(excess, kept[i])
                kept[i] -= less
                excess -= less
        first_words = len(_sentence(row, "a").split())
        ids, numbers, words, mask, at = [self._cls], [0], [-1], -1, 0
        for number, segment in enumerate(segments):
            if number:
                ids += self._between
                numbers += [0] * len(self._between)
                words += [-1] * len(self._between)
            for part in segment:
                mask = len(ids) if part.kind == "mask" else mask
                ids += part.ids[: kept[at]]
                numbers += [number * self._numbered] * kept[at]
                before = first_words if part.kind == "b" else 0
                words += [one + before for one in part.words[: kept[at]]]
                at += 1
        ids, numbers, words = (
            [*ids, self._sep],
            [*numbers, (len(segments) - 1) * self._numbered],
            [*words, -1],
        )
        assert len(ids) <= self.max_length
        assert ids.count(self._mask) == (mask >= 0)
        return Example(
            np.asarray(ids, dtype=np.int64),
            np.asarray(numbers, dtype=np.int64),
            np.asarray(words if self.head == "sequence" else [], dtype=np.int64),
            mask,
            kept != [len(part.ids) for part in parts],
        )


@dataclass(frozen=True)
class _Part:
    """A fragment's tokens in one row."""

    kind: str
    ids: list[int]
    words: list[int] = field(default_factory=list)


def _word_numbers(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The number of the word that each character span lies in; white space counts to the word after it."""
    number, within, of = -1, False, []
    for char in text:
        if not char.isspace() and not within:
            number += 1
        within = not char.isspace()
        of.append(number if within else number + 1)
    last = max(number, 0)
    out = []
    for start, end in spans:
        inside = [i for i in range(start, end) if not text[i].isspace()]
        place = inside[0] if inside else start
        out.append(min(of[place], last) if place < len(of) else last)
    return out


def _padded(rows: Sequence[Ids], pad: int) -> Tensor:
    table = np.full((len(rows), max((len(row) for row in rows), default=1)), pad, dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table)


# --------------------------------------------------------------------------------------------------
# the task


class FewShotTask(Task):
    """N-way K-shot classification: `train` (X), `dev` (D_dev), `unlabeled` (Xu), `test/<set>`.

    A subclass defines `pool` and `tests`, and `classes`, `label_words` and `template` unless its `dataset` is
    one of the papers'. Rows have `text`, or `text_a` and `text_b`, and `label`, a class name; they gain
    `class_label`, its index, and in Xu lose `label` (`class_label` is -1, `source` the row of the pool).
    X and D_dev keep the row's number in the pool as `example_id`; Xu's begin after the pool's.

    `counts[split]`: records; short/<class>, rows that X or D_dev lacks; truncated/<role>, rows cut for a
    role's model.
    """

    heads: ClassVar[tuple[str, ...]] = ("masked_lm", "sequence")
    fields: ClassVar[tuple[str, ...]] = (
        "example_id", "class_label", "input_ids", "length", "mask_index", "verbalizer_ids"
    )  # fmt: skip
    RULES: ClassVar[int] = 2  # raised when draws, templates or truncation change

    @dataclass
    class Settings:
        """Which data, how much of it, and how it is put to a model."""

        dataset: str = "sst2"
        k: int = 16  # labelled examples a class, in X and again in D_dev
        draw: int = 1  # 1 to 5: the seeds 13, 21, 42, 87 and 100; a higher number is itself the seed
        unlabeled_ratio: int = 10  # rows of Xu for each row of X
        prompt_set: str = "lm-bff"  # or pet-<i>, PET's pattern i
        label_words: list[str] = field(default_factory=list)  # in class order; empty: the prompt's own
        max_length: int = 0  # tokens, special ones included; 0: the prompt's own
        test_limit: int = 0  # examples of each test set, spread evenly over it; 0: all

    def __init__(self, settings: Any = None, data_root: Path | None = None) -> None:
        super().__init__(settings, data_root)
        cfg = self.settings
        for name, least in (
            ("k", 1),
            ("draw", 1),
            ("unlabeled_ratio", 0),
            ("max_length", 0),
            ("test_limit", 0),
        ):
            if getattr(cfg, name) < least:
                raise UserError(f"task {self.name}: {name} = {getattr(cfg, name)} must be {least} or more")
        names = self.classes()
        words = list(cfg.label_words) or self.label_words()
        if len(words) != len(names):
            raise UserError(
                f"task {self.name}: label_words has {len(words)} words for {len(names)} classes: "
                f"{', '.join(names)}"
            )
        self.words: dict[str, str] = dict(zip(names, words, strict=True))
        self.whole_words = list(words)
        self.prompt = Template(self.template())
        self._pool: list[Row] | None = None
        self._tests: dict[str, list[Row]] | None = None
        self._split: dict[str, list[int]] = {}
        self._encoded: dict[tuple[str, str], tuple[dict[int, tuple[Row, Example]], int]] = {}

    # what a subclass may say

    def classes(self) -> list[str]:
        """Names of the N classes, in index order."""
        return list(prompt_of(self.settings.dataset).words)

    def label_words(self) -> list[str]:
        """Each class's label word, in class order."""
        return list(prompt_of(self.settings.dataset, self.settings.prompt_set).words.values())

    def template(self) -> str:
        """The prompt's template (`Template`)."""
        return prompt_of(self.settings.dataset, self.settings.prompt_set).template

    def limits(self) -> tuple[int, int | None]:
        """Tokens of a sequence, and of its first sentence (None: no limit of its own).

        A `max_length` of the settings leaves the second sentence as much room as the prompt's own does.
        """
        given: int = self.settings.max_length
        if self.settings.dataset not in LM_BFF:
            return given or 128, None
        one = prompt_of(self.settings.dataset, self.settings.prompt_set)
        length = given or one.max_length
        return length, None if one.cap is None else max(1, length - (one.max_length - one.cap))

    def test_names(self) -> list[str]:
        """Names of the test sets, known before they are read."""
        return list(self._test_rows())

    def pool(self) -> list[Row]:
        """All labelled training rows, in a fixed order.

        Raises: UserError for data that is missing or malformed.
        """
        raise NotImplementedError

    def tests(self) -> dict[str, list[Row]]:
        """The rows of each test set, by name."""
        raise NotImplementedError

    # what the task does with it

    @property
    def seed(self) -> int:
        """The seed of the draw."""
        draw: int = self.settings.draw
        return DRAW_SEEDS[draw - 1] if draw <= len(DRAW_SEEDS) else draw

    def rules(self) -> list[Any]:
        cfg = self.settings
        drawn = [cfg.dataset, cfg.k, self.seed, cfg.unlabeled_ratio, cfg.test_limit]
        return [self.RULES, *drawn, list(self.words.items()), self.prompt.text, *self.limits()]

    def splits(self) -> list[str]:
        extra = [UNLABELED] if self.settings.unlabeled_ratio else []
        return ["train", "dev", *extra, *(f"test/{name}" for name in self.test_names())]

    def load(self, split: str) -> list[Row]:
        """Draws or reads one split.

        Raises: UserError where the data has too few rows for K a class, or a label that is no class.
        """
        if split.startswith("test/"):
            name = split.removeprefix("test/")
            rows = self._labelled(self._test_rows()[name], name)
            rows = [{"example_id": i, **row} for i, row in enumerate(rows)]
            return spread(rows, self.settings.test_limit)
        pool, drawn = self._drawn()
        if split != UNLABELED:
            for name in self.words:
                have = sum(pool[i]["label"] == name for i in drawn[split])
                if have < self.settings.k:
                    self.counts.setdefault(split, {})[f"short/{name}"] = self.settings.k - have
            return [{"example_id": i, **pool[i]} for i in drawn[split]]
        return [
            {
                **{name: value for name, value in pool[i].items() if name != "label"},
                "example_id": len(pool) + at,
                "class_label": -1,
                "source": i,
            }
            for at, i in enumerate(drawn[split])
        ]

    def select(self, split: str, encoder: Any) -> list[Row]:
        """All rows; those that the encoder cuts are counted."""
        rows = self.rows(split)
        self.counts.setdefault(split, {})["records"] = len(rows)
        self._split_encoded(split, encoder, "student")
        return rows

    def texts(self, split: str) -> Iterator[str]:
        """Rows with the prompt and their label word; of Xu the sentences alone."""
        for row in self.rows(split):
            if row["class_label"] < 0:
                yield " ".join(_sentence(row, kind) for kind in ("ab" if "text_b" in row else "a"))
            else:
                yield self.prompt.fill(row, self.words[row["label"]])

    def fields_of(self, head: str) -> tuple[str, ...]:
        """A batch's fields; a prompt of two segments adds `segment_ids` to the masked head's."""
        if head == "masked_lm":
            return (*self.fields, *(["segment_ids"] if len(self.prompt.segments) > 1 else []))
        if head == "sequence":
            return ("example_id", "class_label", "input_ids", "length", "segment_ids", "word_index")
        raise unknown("head", head, self.heads, f"task {self.name}")

    def model_settings(self) -> dict[str, Any]:
        return {"num_labels": len(self.words)}

    def encoder(self, tokenizer: PreTrainedTokenizerBase, head: str = "masked_lm") -> Any:
        if head not in self.heads:
            raise unknown("head", head, self.heads, f"task {self.name}")
        length, cap = self.limits()
        return ClassEncoder(tokenizer, head, self.prompt, self.words, length, cap)

    def collate(self, rows: Sequence[Row], encoders: Mapping[str, Any]) -> Batch:
        """`example_id`, `class_label` [B], and each role's fields (`ClassEncoder.tensors`); those of a role
        other than the student are named `<role>.<field>`.
        """
        fields = {
            "example_id": torch.tensor([row["example_id"] for row in rows], dtype=torch.int64),
            "class_label": torch.tensor([row["class_label"] for row in rows], dtype=torch.int64),
        }
        for role, encoder in encoders.items():
            prefix = "" if role == "student" else f"{role}."
            made = encoder.tensors(self.encoded(rows, encoder, role))
            fields |= {prefix + name: value for name, value in made.items()}
        return Batch(fields)

    def encoded(self, rows: Sequence[Row], encoder: ClassEncoder, role: str = "student") -> list[Example]:
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
        """The predicted class of every example, rows as in the split.

        Each row: example_id, set ("dev", or the name after "test/"), seed (the first: nothing is drawn),
        prompt (as the model saw it), response (the predicted label word; the class's name under the head
        "sequence"), references (that of the true class), tokens, finished, label, prediction (indices),
        probabilities [N]; under "masked_lm" the first 32 rows have `top`, the ten likeliest
        tokens of the whole vocabulary at the mask with their probabilities. Examples of like length share
        a batch; `limit` takes that many, spread evenly over the split.
        """
        rows = spread(self.rows(split, encoder), limit)
        lengths = [len(item.ids) for item in self.encoded(rows, encoder)]
        order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
        device = next(model.parameters()).device
        label = split.removeprefix("test/")
        prompted = encoder.head == "masked_lm"
        names = list(self.words.values()) if prompted else list(self.words)
        out: dict[int, dict[str, Any]] = {}
        with tqdm(total=len(rows), desc=f"classify {label}", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                plain = self.collate([rows[i] for i in chunk], {"student": encoder})
                batch = plain.to(device)
                with torch.no_grad():
                    whole = mask_logits(model, batch) if prompted else None
                    logits = (
                        class_logits(model, batch)
                        if whole is None
                        else whole.gather(1, batch["verbalizer_ids"])
                    )
                chances = logits.double().softmax(-1).cpu()
                for j, i in enumerate(chunk):
                    length, true = lengths[i], rows[i]["class_label"]
                    best = int(chances[j].argmax())
                    out[i] = {
                        "example_id": rows[i]["example_id"],
                        "set": label,
                        "seed": int(seeds[0]),
                        "prompt": encoder.decode(plain["input_ids"][j, :length].tolist()),
                        "response": names[best],
                        "references": [names[true]] if true >= 0 else [],
                        "tokens": length,
                        "finished": True,
                        "label": true,
                        "prediction": best,
                        "probabilities": chances[j].tolist(),
                    }
                    if whole is not None and i < TOP_ROWS:
                        out[i]["top"] = _top(whole[j], encoder)
                bar.update(len(chunk))
        return [out[i] for i in range(len(rows))]

    def _labelled(self, rows: Sequence[Row], where: str) -> list[Row]:
        """Rows with `class_label`."""
        index = {name: i for i, name in enumerate(self.words)}
        for number, row in enumerate(rows, start=1):
            if row["label"] not in index:
                raise unknown("class", str(row["label"]), index, f"task {self.name}: {where} record {number}")
        return [{**row, "class_label": index[row["label"]]} for row in rows]

    def _test_rows(self) -> dict[str, list[Row]]:
        if self._tests is None:
            self._tests = self.tests()
        return self._tests

    def _drawn(self) -> tuple[list[Row], dict[str, list[int]]]:
        """The pool, and the pool's row numbers of X, D_dev and Xu."""
        if self._pool is None:
            pool = self._labelled(self.pool(), "train")
            self._split = draw(
                [row["class_label"] for row in pool],
                [_same(row) for row in pool],
                len(self.words),
                self.settings.k,
                self.seed,
                self.settings.dataset,
                self.settings.unlabeled_ratio,
            )
            self._pool = pool
        return self._pool, self._split

    def _split_encoded(self, split: str, encoder: ClassEncoder, role: str) -> dict[int, tuple[Row, Example]]:
        key = (split, encoder.key)
        if key not in self._encoded:
            rows = self.rows(split)
            items = encoder.encode(rows)
            by_id = {row["example_id"]: (row, item) for row, item in zip(rows, items, strict=True)}
            self._encoded[key] = by_id, sum(item.truncated for item in items)
        known, truncated = self._encoded[key]
        self.counts.setdefault(split, {})[f"truncated/{role}"] = truncated
        return known


def _same(row: Row) -> tuple[str, ...]:
    """The row's sentences without case and with single spaces: equal for rows that repeat a text."""
    kinds = "ab" if "text_b" in row else "a"
    return tuple(" ".join(_sentence(row, kind).casefold().split()) for kind in kinds)


def draw(
    labels: Sequence[int],
    texts: Sequence[Hashable],
    classes: int,
    k: int,
    seed: int,
    dataset: str,
    ratio: int = 10,
) -> dict[str, list[int]]:
    """Return row numbers of "train" (X), "dev" (D_dev) and "unlabeled" (Xu), drawn from labelled rows.

    The rows are shuffled once; of each class in turn the first K make X, the next K D_dev, without the rows
    whose text is in them already. A class of fewer than 2K texts leaves D_dev fewer, though one at least,
    which X then lacks. Xu is `ratio` times the size of X, drawn with replacement from all rows, whatever
    their class, whose text is neither in X nor in D_dev, by a stream of its own. All three follow from the
    rows, `seed` and `dataset` alone.

    Args: `texts`: what rows of one text have in common.

    Source: LM-BFF, `generate_k_shot_data.py`; Prompt-Distiller, experimental settings (Xu).
    Raises: UserError for a class of fewer than two texts, or where no row is left for Xu.
    """
    order = sorted(range(len(labels)), key=lambda i: (stream_seed(seed, f"few_shot/{dataset}", i), i))
    by_class: list[dict[Hashable, int]] = [{} for _ in range(classes)]
    for i in order:
        by_class[labels[i]].setdefault(texts[i], i)
    train: list[int] = []
    dev: list[int] = []
    taken: set[Hashable] = set()
    for number, found in enumerate(by_class):
        rows = [i for text, i in found.items() if text not in taken]
        if len(rows) < 2:
            raise UserError(
                f"task: data set '{dataset}' has fewer than two training rows of class {number} with texts "
                "of their own, one to train on and one to select by"
            )
        first = min(k, len(rows) - 1)
        train += rows[:first]
        dev += rows[first : first + k]
        taken |= {texts[i] for i in rows[: first + k]}
    rest = [i for i in range(len(labels)) if texts[i] not in taken]
    if ratio and not rest:
        raise UserError(
            f"task: k = {k} takes the texts of all {len(labels)} training rows of '{dataset}' and leaves "
            "none for the unlabelled set; take a smaller k, or unlabeled_ratio = 0"
        )
    picks = (stream_seed(seed, f"few_shot/{dataset}/unlabeled", j) for j in range(ratio * len(train)))
    return {"train": train, "dev": dev, UNLABELED: [rest[one % len(rest)] for one in picks]}


def _top(logits: Tensor, encoder: ClassEncoder) -> list[list[Any]]:
    """The likeliest tokens of one row and their probabilities, in falling order."""
    found = logits.double().softmax(-1).topk(min(TOP_TOKENS, len(logits)))
    return [
        [encoder.token(one), chance]
        for one, chance in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
