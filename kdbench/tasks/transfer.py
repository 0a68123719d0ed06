"""Prompt transfer on real data: the 21 source and 9 target tasks of PANDA, by name, and four more.

Source: tasks, metrics and inputs of PANDA (Zhong et al. 2022), https://arxiv.org/abs/2208.10160, and of its
public `p-tuning-v2` code, which follows P-tuning v2 (Liu et al. 2022), https://arxiv.org/abs/2110.07602:
scores are those of the official validation split (MNLI matched), for the tests' labels are not public.
Differs: see `kdbench.transfer` for the dev split; a local data folder may hold other copies or samples of the
sets, and each copy's checksum enters the task's revision; SST-2 is that of `kdbench.tasks.fewshot`, whole
sentences without GLUE's phrases; tags of the semantic role sets are those of their own files, and the
predicate is a segment of its own. MR, MPQA, TREC and SNLI are no part of the paper; they serve small studies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kdbench import data
from kdbench.errors import Missing, UserError, unknown
from kdbench.task import Row
from kdbench.transfer import OUTSIDE, TransferData, TransferTask

_ORIGINS = ("auto", "hub", "local")
_HIGHLIGHT = re.compile(r"@highlight\s+")
_PLACE = "@placeholder"
_Make = Callable[[Row, str], list[Row]]


def _get(item: Row, where: str, name: str, kind: type = str) -> Any:
    """A field of a record. Raises: UserError where it is missing or of another type."""
    if name not in item:
        raise UserError(f"{where}: lacks the field '{name}'; it has: {', '.join(item) or 'nothing'}")
    value = item[name]
    wanted = int | float if kind is float else kind
    if not isinstance(value, wanted) or isinstance(value, bool):
        told = {str: "text", list: "a list", float: "a number", int: "a whole number"}[kind]
        raise UserError(f"{where}: '{name}' must be {told}")
    return value.strip() if isinstance(value, str) else value


def _texts(item: Row, where: str, name: str) -> list[str]:
    """A field that is a list of texts."""
    found = list(_get(item, where, name, list))
    if not all(isinstance(one, str) for one in found):
        raise UserError(f"{where}: '{name}' must be a list of texts")
    return found


def _sentences(item: Row, where: str) -> Row:
    names = ("text",) if "text" in item else ("text_a", "text_b")
    return {name: _get(item, where, name) for name in names}


def _classes(item: Row, where: str) -> list[Row]:
    return [{**_sentences(item, where), "label": _get(item, where, "label")}]


def _number(item: Row, where: str) -> list[Row]:
    return [{**_sentences(item, where), "label": float(_get(item, where, "label", float))}]


def _copa(item: Row, where: str) -> list[Row]:
    """The premise and "because" (its cause is asked for) or "so"; a choice is the second segment."""
    asked = {"cause": "because", "effect": "so"}
    question, label = _get(item, where, "question"), _get(item, where, "label")
    if question not in asked:
        raise unknown("question", question, asked, where)
    if label not in _CHOICES:
        raise unknown("choice", label, _CHOICES, where)
    text = f"{_get(item, where, 'text')} {asked[question]}"
    listed = "choices" in item
    choices = _texts(item, where, "choices") if listed else [_get(item, where, name) for name in _CHOICES]
    return [{"text": text, "choices": choices, "label": _CHOICES.index(label)}]


def _wsc(item: Row, where: str) -> list[Row]:
    """Whether the pronoun (span 2) stands for the noun (span 1)."""
    first = f"{_get(item, where, 'span2')}: {_get(item, where, 'text')}"
    return [{"text_a": first, "text_b": _get(item, where, "span1"), "label": _get(item, where, "label")}]


def _wic(item: Row, where: str) -> list[Row]:
    """Both sentences and the question in one segment."""
    a, b, word = (_get(item, where, name) for name in ("text_a", "text_b", "word"))
    text = f"{a} {b} Does {word} have the same meaning in both sentences?"
    return [{"text": text, "label": _get(item, where, "label")}]


def _multirc(item: Row, where: str) -> list[Row]:
    """The paragraph, and a question with one of its answers."""
    paragraph = _get(item, where, "text")
    asked = f"{_get(item, where, 'question')} {_get(item, where, 'answer')}"
    label = _get(item, where, "label")
    return [{"text_a": paragraph, "text_b": asked, "label": label, "block": paragraph}]


def _record(item: Row, where: str) -> list[Row]:
    """The passage, and the query with one of the passage's entities in its gap; a row per entity."""
    passage = _HIGHLIGHT.sub("- ", _get(item, where, "text"))
    query, answers = _get(item, where, "query"), _texts(item, where, "answers")
    if _PLACE not in query:
        raise UserError(f"{where}: 'query' lacks {_PLACE}")
    return [
        {
            "text_a": passage,
            "text_b": query.replace(_PLACE, entity),
            "label": "true" if entity in answers else "false",
            "candidate": entity,
            "answers": answers,
            "block": passage,
        }
        for entity in dict.fromkeys(_texts(item, where, "entities"))
    ]


def _tags(item: Row, where: str) -> list[Row]:
    """Words and tags; `entities` (start, end, type; words counted from 0, end left out) become tags."""
    words = _texts(item, where, "words")
    if "tags" in item or "entities" not in item:
        tags = _texts(item, where, "tags")
    else:
        tags = [OUTSIDE] * len(words)
        for one in _get(item, where, "entities", list):
            start, end = (_get(one, f"{where}: entity", name, int) for name in ("start", "end"))
            if not 0 <= start < end <= len(words):
                raise UserError(f"{where}: entity {start} to {end} is not within {len(words)} words")
            kind = _get(one, f"{where}: entity", "type")
            tags[start:end] = [f"{'I' if i else 'B'}-{kind}" for i in range(end - start)]
    return [{"words": words, "tags": tags}]


def _roles(item: Row, where: str) -> list[Row]:
    """Words and tags of the semantic roles of one predicate, which is the second segment."""
    return [{**row, "predicate": _get(item, where, "predicate")} for row in _tags(item, where)]


def _span(item: Row, where: str) -> list[Row]:
    """A context, a question and its answers; those of the hub are lists of texts and of places."""
    text, question = _get_raw(item, where, "text"), _get(item, where, "question")
    row: Row = {"text": text, "question": question, "block": text}
    if isinstance(item.get("answers"), dict):
        given, told = item["answers"], f"{where}: answers"
        row["answers"] = _texts(given, told, "text")
        if begins := _get(given, told, "answer_start", list):
            row["answer_start"] = int(begins[0])
    else:
        row["answers"] = _texts(item, where, "answers")
        if "answer_start" in item:
            row["answer_start"] = int(_get(item, where, "answer_start", int))
    return [row]


def _get_raw(item: Row, where: str, name: str) -> str:
    """A text with its white space, which places of answers count."""
    _get(item, where, name)
    return str(item[name])


@dataclass(frozen=True)
class _Recipe:
    """What a set is, and how its records become rows; no `classes` of tokens: those of the files."""

    make: _Make
    format: str
    metric: str
    classes: tuple[str, ...] = ()
    pair: bool = True
    max_length: int = 128


def _bio(*types: str) -> tuple[str, ...]:
    return (OUTSIDE, *(f"{at}-{one}" for one in types for at in "BI"))


_CHOICES = ("choice1", "choice2")
_FALSE_TRUE = ("false", "true")
_ENTAILED = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_POLARITY = ("negative", "positive")
_ONTONOTES = (
    "CARDINAL", "DATE", "EVENT", "FAC", "GPE", "LANGUAGE", "LAW", "LOC", "MONEY", "NORP", "ORDINAL", "ORG",
    "PERCENT", "PERSON", "PRODUCT", "QUANTITY", "TIME", "WORK_OF_ART",
)  # fmt: skip

# Classes stand in the order of the public label indices.
_RECIPES = {
    # targets
    "cb": _Recipe(_classes, "classes", "accuracy", ("entailment", "contradiction", "neutral")),
    "copa": _Recipe(_copa, "choice", "accuracy", _CHOICES),
    "wsc": _Recipe(_wsc, "classes", "accuracy", _FALSE_TRUE),
    "rte": _Recipe(_classes, "classes", "accuracy", _ENTAILED),
    "wic": _Recipe(_wic, "classes", "accuracy", _FALSE_TRUE, pair=False),
    "cola": _Recipe(_classes, "classes", "matthews", ("unacceptable", "acceptable"), pair=False),
    "mrpc": _Recipe(_classes, "classes", "accuracy", ("not_equivalent", "equivalent")),
    "stsb": _Recipe(_number, "number", "pearson_spearman"),
    "conll04": _Recipe(_tags, "tokens", "entity_f1", _bio("Loc", "Org", "Other", "Peop"), pair=False),
    # sources only
    "boolq": _Recipe(_classes, "classes", "accuracy", _FALSE_TRUE),
    "multirc": _Recipe(_multirc, "classes", "f1", _FALSE_TRUE),
    "record": _Recipe(_record, "classes", "token_f1", _FALSE_TRUE),
    "mnli": _Recipe(_classes, "classes", "accuracy", _NLI),
    "sst2": _Recipe(_classes, "classes", "accuracy", _POLARITY, pair=False),
    "qnli": _Recipe(_classes, "classes", "accuracy", _ENTAILED),
    "qqp": _Recipe(_classes, "classes", "accuracy", ("not_duplicate", "duplicate")),
    "squad": _Recipe(_span, "span", "token_f1", max_length=384),
    "conll03": _Recipe(_tags, "tokens", "entity_f1", _bio("PER", "ORG", "LOC", "MISC"), pair=False),
    "conll05": _Recipe(_roles, "tokens", "entity_f1"),
    "conll12": _Recipe(_roles, "tokens", "entity_f1"),
    "ontonotes": _Recipe(_tags, "tokens", "entity_f1", _bio(*_ONTONOTES), pair=False),
    # no part of the paper
    "mr": _Recipe(_classes, "classes", "accuracy", _POLARITY, pair=False),
    "mpqa": _Recipe(_classes, "classes", "accuracy", _POLARITY, pair=False),
    "trec": _Recipe(
        _classes,
        "classes",
        "accuracy",
        ("description", "entity", "abbreviation", "human", "location", "number"),
        pair=False,
    ),
    "snli": _Recipe(_classes, "classes", "accuracy", _NLI),
}
TARGETS = ("cb", "copa", "wsc", "rte", "wic", "cola", "mrpc", "stsb", "conll04")
SOURCES = (
    *TARGETS, "boolq", "multirc", "record", "mnli", "sst2", "qnli", "qqp", "squad", "conll03", "conll05",
    "conll12", "ontonotes",
)  # fmt: skip


class Transfer(TransferTask):
    """One of PANDA's data sets, by name, tested on its official validation split."""

    name: ClassVar[str] = "transfer"

    @dataclass
    class Settings(TransferTask.Settings):
        """Which data, how much of it, and on what checkpoints are selected."""

        dataset: str = "cb"
        source: str = "auto"  # the local folder if it has the file, else the hub; or hub, local

    def __init__(self, settings: Any = None, data_root: Path | None = None) -> None:
        super().__init__(settings, data_root)
        cfg = self.settings
        if cfg.source not in _ORIGINS:
            raise unknown("source", cfg.source, _ORIGINS, "task transfer")
        if cfg.dataset not in _RECIPES:
            raise unknown("data set", cfg.dataset, _RECIPES, "task transfer")
        self._set = data.known()[cfg.dataset]
        self._recipe = _RECIPES[cfg.dataset]
        self._read: dict[str, list[Row]] = {}
        for part in ("train", "test"):
            data.locate(self._set, part, cfg.source, self.data_root)

    def spec(self) -> TransferData:
        one = self._recipe
        tags = one.classes or self._found_tags()
        return TransferData(self._set.name, one.format, one.metric, tags, one.pair, one.max_length)

    def read(self, part: str) -> list[Row]:
        if part not in self._read:
            items, origin = self._items(part)
            kept = [pair for pair in items if pair[1].get("label") != data.NO_LABEL]
            rows: list[Row] = []
            for number, (where, item) in enumerate(kept):
                made = self._recipe.make(item, where)
                rows += [{**row, "group": number} if "candidate" in row else row for row in made]
            _number_blocks(rows)
            test = f"test/{self._set.name}"
            for split in self._splits_of(part, test):
                self.origins[split] = {**origin, "records": len(items)}
                if len(kept) < len(items):
                    self.counts.setdefault(split, {})["without_label"] = len(items) - len(kept)
            self._read[part] = rows
        return self._read[part]

    def _splits_of(self, part: str, test: str) -> Sequence[str]:
        """The splits that a part serves."""
        if self.settings.selection == "train":
            return ("train", "dev") if part == "train" else (test,)
        return ("train",) if part == "train" else ("dev", test)

    def _found_tags(self) -> tuple[str, ...]:
        """The tags of both files, that of no span first; none for formats without tags."""
        if self._recipe.format != "tokens":
            return ()
        found = {tag for part in ("train", "test") for row in self.read(part) for tag in row["tags"]}
        return (OUTSIDE, *sorted(found - {OUTSIDE}))

    def _items(self, part: str) -> tuple[list[tuple[str, Row]], dict[str, Any]]:
        """The records of a part, each with its place, and where they were read."""
        one = self._set
        place = data.locate(one, part, self.settings.source, self.data_root)
        if isinstance(place, Path):
            items, digest = data.read_records(place)
            shown = place.relative_to(self.data_root) if self.data_root is not None else place
            return items, {"path": str(shown), "sha256": digest}
        assert one.hub is not None
        assert place.hub_file is not None
        items, digests, commit = [], [], ""
        for name in (place.hub_file, *place.hub_more):
            try:
                path, commit = data.fetch(one.hub, name, one.hub_revision)
            except Missing as error:
                looked = self.settings.source == "auto" and self.data_root is not None and place.local
                lacking = f"{self.data_root} lacks {place.local}[.gz]; " if looked else ""
                raise Missing(f"data set '{one.name}': {lacking}{name} of {error}") from error
            found, digest = data.read_records(path, one)
            items += found
            digests.append(digest)
        return items, {
            "hub": f"{one.hub}/{place.hub_file}",
            "commit": commit,
            "sha256": " ".join(digests),
        }


def _number_blocks(rows: Sequence[Row]) -> None:
    """Puts a number in place of the text that names a row's block."""
    numbers: dict[str, int] = {}
    for row in rows:
        if "block" in row:
            row["block"] = numbers.setdefault(row["block"], len(numbers))
