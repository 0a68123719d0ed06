"""The transfer task: the paper's 21 sets, their inputs, encoding, splits, outputs; real data where it is."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from record_kit import make_run
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from analyses import transfer as analysis
from kdbench import data
from kdbench.distiller import Batch
from kdbench.errors import Missing, UserError
from kdbench.prompted import PromptedEncoder
from kdbench.prompts import DeepPrompt
from kdbench.task import Row
from kdbench.tasks.transfer import SOURCES, TARGETS, Transfer
from kdbench.transfer import (
    FORMATS,
    IGNORED,
    LONGEST_ANSWER,
    METRICS,
    TransferData,
    TransferEncoder,
    _best_span,
    segments_of,
)

# format, printed metric, outputs of the head, two segments, tokens at most: the paper's table
TABLE: dict[str, tuple[str, str, int, bool, int]] = {
    "cb": ("classes", "accuracy", 3, True, 128),
    "copa": ("choice", "accuracy", 1, True, 128),
    "wsc": ("classes", "accuracy", 2, True, 128),
    "rte": ("classes", "accuracy", 2, True, 128),
    "wic": ("classes", "accuracy", 2, False, 128),
    "cola": ("classes", "matthews", 2, False, 128),
    "mrpc": ("classes", "accuracy", 2, True, 128),
    "stsb": ("number", "pearson_spearman", 1, True, 128),
    "conll04": ("tokens", "entity_f1", 9, False, 128),
    "boolq": ("classes", "accuracy", 2, True, 128),
    "multirc": ("classes", "f1", 2, True, 128),
    "record": ("classes", "token_f1", 2, True, 128),
    "mnli": ("classes", "accuracy", 3, True, 128),
    "qnli": ("classes", "accuracy", 2, True, 128),
    "qqp": ("classes", "accuracy", 2, True, 128),
    "sst2": ("classes", "accuracy", 2, False, 128),
    "squad": ("span", "token_f1", 2, True, 384),
    "conll03": ("tokens", "entity_f1", 9, False, 128),
    "ontonotes": ("tokens", "entity_f1", 37, False, 128),
    "conll05": ("tokens", "entity_f1", 4, True, 128),  # the tags of the files: here four
    "conll12": ("tokens", "entity_f1", 4, True, 128),
}
REAL = {  # what the published records were made with: training and test records
    "cb": (250, 56), "copa": (400, 100), "wsc": (64, 104), "rte": (2490, 277), "wic": (5428, 638),
    "cola": (8535, 1043), "mrpc": (3668, 408), "stsb": (5742, 1500), "boolq": (64, 3270),
    "mnli": (8999, 1000), "qnli": (8999, 5463), "qqp": (8999, 999), "sst2": (6917, 872),
}  # fmt: skip
KNOWN = data.known()
LOCAL_ONLY = ("conll05", "conll12")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SAID = "the cat sat on mat in a red hat and saw big dog near old mill while it rained".split()


# --------------------------------------------------------------------------------------------- small things
def bert() -> PreTrainedTokenizerFast:
    """An uncased WordPiece tokenizer that knows a few words, and all characters as pieces."""
    signs = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*SPECIAL, *signs, *(f"##{sign}" for sign in signs), *SAID, "##ed", "##ing"]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    core.add_special_tokens(SPECIAL)
    names = ("pad", "unk", "cls", "sep", "mask")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{f"{name}_token": token for name, token in zip(names, SPECIAL, strict=True)}
    )


def roberta() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of RoBERTa's frame: two separators, no numbers of segments."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    signs = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    core.add_special_tokens(special)
    names = ("cls", "pad", "sep", "unk", "mask")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{f"{name}_token": token for name, token in zip(names, special, strict=True)}
    )


BERT, ROBERTA = bert(), roberta()


def sentence(draw: random.Random, least: int = 3, most: int = 9) -> str:
    return " ".join(draw.choice(SAID) for _ in range(draw.randint(least, most)))


def tagged(draw: random.Random, kinds: Sequence[str], i: int) -> Row:
    """A sentence of at least 8 words with one entity of two words."""
    words, kind = sentence(draw, 8, 14).split(), kinds[i % len(kinds)]
    tags = ["O"] * len(words)
    tags[1:3] = [f"B-{kind}", f"I-{kind}"]
    return {"words": words, "tags": tags}


def record(name: str, i: int, draw: random.Random) -> Row:
    """A record of a local file."""
    given = KNOWN[name]
    labels = list(given.hub_labels.values()) or ["negative", "positive"]
    label = labels[i % len(labels)]
    if name == "copa":
        choices = [sentence(draw), sentence(draw)]
        text = f"{sentence(draw)} {i}."
        return {"text": text, "question": ("cause", "effect")[i % 2], "choices": choices, "label": label}
    if name == "wsc":
        return {"text": f"{sentence(draw)} {i}", "span1": "the cat", "span2": "it", "label": label}
    if name == "wic":
        return {"text_a": f"{sentence(draw)} {i}", "text_b": sentence(draw), "word": "mat", "label": label}
    if name == "stsb":
        return {"text_a": f"{sentence(draw)} {i}", "text_b": sentence(draw), "label": i % 11 / 2}
    if name == "multirc":  # five answers a paragraph
        text = " ".join(random.Random(i // 5).choice(SAID) for _ in range(12)) + f" {i // 5}"
        return {"text": text, "question": f"who {i % 5}?", "answer": sentence(draw), "label": label}
    if name == "record":
        entities = ["cat", "dog", "mill", "hat"][: 2 + i % 3]
        text = f"{sentence(draw)} {i}\n@highlight\n{sentence(draw)}\n@highlight\n{sentence(draw)}"
        answers = [entities[i % len(entities)]]
        return {"text": text, "query": "near @placeholder it sat", "entities": entities, "answers": answers}
    if name == "squad":
        text = f"  {sentence(draw, 12, 20)} {i // 2}"
        words = text.split()
        answer = " ".join(words[4:6])
        return {"text": text, "question": "who sat where?", "answers": [answer, words[5]]}
    kinds = {"conll04": ["Loc", "Peop"], "conll03": ["PER", "MISC"], "ontonotes": ["WORK_OF_ART", "GPE"]}
    if name in kinds:
        return tagged(draw, kinds[name], i)
    if name in LOCAL_ONLY:
        return {**tagged(draw, ["A0"], i), "predicate": "sat"} | ({} if i else {"tags": ["B-V"] + ["O"] * 7})
    if name in ("cola", "sst2"):
        return {"text": f"{sentence(draw)} {i}", "label": label}
    return {"text_a": f"{sentence(draw)} {i}", "text_b": sentence(draw), "label": label}


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def fill(root: Path, name: str, train: int = 60, test: int = 20) -> Path:
    """The two files of a set below a data folder."""
    for number, (part, count) in enumerate([("train", train), ("test", test)]):
        draw = random.Random(f"{name} {part}")
        rows = [record(name, 1000 * number + i, draw) for i in range(count)]
        for row in rows[:1] if name in LOCAL_ONLY else []:
            row["tags"] = ["B-V", *["O"] * (len(row["words"]) - 1)]
        local = KNOWN[name].files[part].local
        assert local is not None
        write(root / local, rows)
    return root


def transfer(name: str, root: Path | None = None, **settings: Any) -> Transfer:
    return Transfer(Transfer.Settings(dataset=name, **settings), root)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo: str, name: str, **_: Any) -> str:
        raise OSError(f"no connection to {repo}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


# -------------------------------------------------------------------------------------------- the 21 sets
def test_nine_targets_are_among_twenty_one_sources() -> None:
    assert len(SOURCES) == len(set(SOURCES)) == 21
    assert len(TARGETS) == 9
    assert set(TARGETS) < set(SOURCES) == set(TABLE)


@pytest.mark.parametrize("name", SOURCES)
def test_every_set_is_the_papers(tmp_path: Path, name: str) -> None:
    task = transfer(name, fill(tmp_path, name))
    spec = task.spec()
    assert (spec.format, spec.metric, spec.outputs, spec.pair, spec.max_length) == TABLE[name]
    assert spec.format in FORMATS
    assert spec.metric in METRICS
    assert task.splits() == ["train", "dev", f"test/{name}"]
    assert task.model_settings() == {"num_labels": TABLE[name][2], "task_format": TABLE[name][0]}
    one = KNOWN[name]
    assert {"train", "test"} <= set(one.files)
    assert all(file.local is not None for file in one.files.values())
    for file in one.files.values():
        assert (len(file.sha256) == 64) == (file.records > 0) == (name in REAL)
    assert (one.hub is None) == (name in LOCAL_ONLY)
    assert one.source.startswith("https://")
    assert one.licence
    if one.hub_labels and spec.format in ("classes", "choice"):
        by_index = [one.hub_labels[str(i)] for i in range(len(spec.classes))]
        assert by_index == list(spec.classes)  # head outputs stand in the order of public labels
    if one.hub_labels and spec.format == "tokens":
        assert set(one.hub_labels.values()) == set(spec.classes)
    for split in task.splits():
        assert all((len(segments_of(row)[0]) == 2) for row in task.rows(split))
        assert {segments_of(row)[0][1] is not None for row in task.rows(split)} == {spec.pair}


def row_of(name: str, root: Path, item: Row) -> list[Row]:
    """The rows that one record becomes."""
    for part in ("train", "test"):
        local = KNOWN[name].files[part].local
        assert local is not None
        write(root / local, [item])
    return transfer(name, root).read("test")


INPUTS: list[tuple[str, Row, list[tuple[str, str | None]]]] = [
    ("cb", {"text_a": "A.", "text_b": "B", "label": "neutral"}, [("A.", "B")]),
    (
        "copa",
        {"text": "It fell.", "question": "cause", "choices": ["I ran.", "I hit it."], "label": "choice2"},
        [("It fell. because", "I ran."), ("It fell. because", "I hit it.")],
    ),
    (
        "copa",
        {"text": "It fell.", "question": "effect", "choice1": "A.", "choice2": "B.", "label": "choice1"},
        [("It fell. so", "A."), ("It fell. so", "B.")],
    ),
    (
        "wsc",
        {"text": "Tina saw that it ran.", "span1": "Tina", "span2": "it", "label": "false"},
        [("it: Tina saw that it ran.", "Tina")],
    ),
    (
        "wic",
        {"text_a": "My place.", "text_b": "No place for it.", "word": "place", "label": "true"},
        [("My place. No place for it. Does place have the same meaning in both sentences?", None)],
    ),
    ("cola", {"text": " It ran. ", "label": "acceptable"}, [("It ran.", None)]),
    ("boolq", {"text_a": "is it", "text_b": "It is.", "label": "true"}, [("is it", "It is.")]),
    (
        "multirc",
        {"text": "Long ago.", "question": "When?", "answer": "long ago", "label": "true"},
        [("Long ago.", "When? long ago")],
    ),
    (
        "record",
        {
            "text": "A dog.\n@highlight\nIt ran",
            "query": "@placeholder ran",
            "entities": ["dog"],
            "answers": [],
        },
        [("A dog.\n- It ran", "dog ran")],
    ),
    ("squad", {"text": " A dog ran.", "question": "who?", "answers": ["dog"]}, [("who?", " A dog ran.")]),
    ("conll03", {"words": ["Bo", "ran", "."], "tags": ["B-PER", "O", "O"]}, [("Bo ran .", None)]),
    (
        "conll05",
        {"words": ["Bo", "ran", "."], "tags": ["B-A0", "B-V", "O"], "predicate": "ran"},
        [("Bo ran .", "ran")],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "item", "segments"), INPUTS)
def test_inputs_are_the_papers(
    tmp_path: Path, name: str, item: Row, segments: list[tuple[str, str | None]]
) -> None:
    (row,) = row_of(name, tmp_path, item)
    assert segments_of(row) == segments


def test_record_has_a_row_per_entity(tmp_path: Path) -> None:
    item = {
        "text": "Cat met Dog.\n@highlight\nDog ran",
        "query": "@placeholder said that @placeholder ran",
        "entities": ["Cat", "Dog", "Cat"],
        "answers": ["Dog", "the Dog"],
    }
    rows = row_of("record", tmp_path, item)
    assert [row["text_b"] for row in rows] == ["Cat said that Cat ran", "Dog said that Dog ran"]
    assert [row["label"] for row in rows] == ["false", "true"]
    assert [row["candidate"] for row in rows] == ["Cat", "Dog"]
    assert [row["group"] for row in rows] == [0, 0]
    assert all(row["answers"] == ["Dog", "the Dog"] for row in rows)


def test_srl_tags_are_those_of_both_files(tmp_path: Path) -> None:
    one = {"words": ["Bo", "ran"], "tags": ["B-A0", "B-V"], "predicate": "ran"}
    write(tmp_path / "tokens/conll12/train.jsonl", [one])
    write(tmp_path / "tokens/conll12/dev.jsonl", [{**one, "tags": ["B-A1", "O"]}])
    assert transfer("conll12", tmp_path).spec().classes == ("O", "B-A0", "B-A1", "B-V")


# -------------------------------------------------------------------------------------------------- the hub
HUB: list[tuple[str, list[Row], list[Row]]] = [
    (
        "wsc",
        [{"text": "Bo ran.", "span1_text": "Bo", "span2_text": "he", "span1_index": 0, "label": 1, "idx": 3}],
        [{"text_a": "he: Bo ran.", "text_b": "Bo", "label": "true"}],
    ),
    (
        "copa",
        [{"premise": "A.", "choice1": "B.", "choice2": "C.", "question": "effect", "label": 1, "idx": 0}],
        [{"text": "A. so", "choices": ["B.", "C."], "label": 1}],
    ),
    (
        "stsb",
        [{"sentence1": "a", "sentence2": "b", "label": 3.5, "idx": 0}],
        [{"text_a": "a", "text_b": "b", "label": 3.5}],
    ),
    (
        "squad",
        [
            {
                "id": "x",
                "context": "Dog? A dog ran.",
                "question": "who?",
                "answers": {"text": ["dog", "A dog"], "answer_start": [7, 5]},
            }
        ],
        [
            {
                "text": "Dog? A dog ran.",
                "question": "who?",
                "answers": ["dog", "A dog"],
                "answer_start": 7,
                "block": 0,
            }
        ],
    ),
    (
        "conll04",
        [
            {
                "tokens": ["Bo", "Li", "ran", "home"],
                "entities": [
                    {"start": 0, "end": 2, "type": "Peop"},
                    {"start": 3, "end": 4, "type": "Loc"},
                ],
            }
        ],
        [{"words": ["Bo", "Li", "ran", "home"], "tags": ["B-Peop", "I-Peop", "O", "B-Loc"]}],
    ),
    (
        "ontonotes",
        [{"tokens": ["Mon", "May"], "tags": [2, 3]}],
        [{"words": ["Mon", "May"], "tags": ["B-DATE", "I-DATE"]}],
    ),
]


@pytest.mark.parametrize(("name", "items", "rows"), HUB)
def test_the_hubs_columns_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, items: list[Row], rows: list[Row]
) -> None:
    one, asked = KNOWN[name], []

    def download(repo: str, file: str, repo_type: str, revision: str | None = None) -> str:
        asked.append((repo, file, revision))
        path = tmp_path / repo / "snapshots" / "c0ffee" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".parquet"):
            datasets.Dataset.from_list(items).to_parquet(path)
        else:
            write(path, items)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    task = transfer(name, source="hub")
    file = one.files["train"]
    files = [file.hub_file, *file.hub_more]
    assert task.read("train") == rows * len(files)
    assert asked == [(one.hub, file, one.hub_revision) for file in files]
    assert task.origins["train"]["commit"] == "c0ffee"
    assert task.origins["train"]["records"] == len(files)


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    offline(monkeypatch)
    local = KNOWN[name].files["train"].local
    with pytest.raises(Missing, match=f"data set '{name}': .* lacks {local}"):
        transfer(name, tmp_path).rows("train")
    with pytest.raises(Missing, match=f"data set '{name}': .* lacks {local}.*its source is https://"):
        transfer(name, tmp_path, source="local")
    wanted = local if name in LOCAL_ONLY else KNOWN[name].files["train"].hub_file
    with pytest.raises(Missing, match=f"data set '{name}'.*{wanted}"):
        transfer(name).rows("train")


# ------------------------------------------------------------------------------------------------ encoding
def spec(task_format: str, *classes: str, pair: bool = False) -> TransferData:
    return TransferData("s", task_format, "accuracy", classes, pair, 40)


def encoder(tokenizer: Any, one: TransferData, max_length: int = 40) -> Any:
    return TransferEncoder(tokenizer, one, max_length)


@pytest.mark.parametrize("tokenizer", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_frames_are_the_tokenizers_own(tokenizer: Any) -> None:
    draw = random.Random(0)
    reader = encoder(tokenizer, spec("classes", "a", "b", pair=True), 200)
    for _ in range(30):
        a, b = sentence(draw), sentence(draw)
        for row, told in (({"text": a}, (a,)), ({"text_a": a, "text_b": b}, (a, b))):
            ((made,),) = [one.sequences for one in reader.encode([row])]
            wanted = tokenizer(*told, return_token_type_ids=True)
            assert made.ids.tolist() == wanted["input_ids"]
            assert made.segments.tolist() == wanted["token_type_ids"]
            assert not made.truncated


@pytest.mark.parametrize("tokenizer", [BERT, ROBERTA], ids=["bert", "roberta"])
@pytest.mark.parametrize("limit", [9, 12, 17, 24])
def test_truncation(tokenizer: Any, limit: int) -> None:
    """A single text keeps its head; of a pair the longer one gives way first, down to half of the room."""
    draw = random.Random(limit)
    reader = encoder(tokenizer, spec("classes", "a", "b", pair=True), limit)
    for _ in range(40):
        a, b = sentence(draw, 1, 12), sentence(draw, 1, 12)
        (single,), (pair,) = (
            one.sequences for one in reader.encode([{"text": a}, {"text_a": a, "text_b": b}])
        )
        assert single.ids.tolist() == tokenizer(a, truncation=True, max_length=limit)["input_ids"]
        first, second = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (a, b))
        room = limit - tokenizer.num_special_tokens_to_add(pair=True)
        kept = len(pair.ids) - (limit - room)
        assert kept == min(room, len(first) + len(second))
        sep = tokenizer.sep_token_id
        between = [sep] * (limit - room - 2)
        keep_a = pair.ids.tolist().index(sep) - 1
        assert pair.ids.tolist() == [
            tokenizer.cls_token_id, *first[:keep_a], *between, *second[: kept - keep_a], sep,
        ]  # fmt: skip
        assert keep_a >= min(len(first), room // 2)
        assert kept - keep_a >= min(len(second), room // 2)
        assert pair.truncated == (len(first) + len(second) > room)
        assert single.truncated == (len(first) > limit - 2)


def test_names_of_special_tokens_are_plain_text() -> None:
    tokenizer = BERT
    (made,) = encoder(tokenizer, spec("classes", "a", "b")).encode([{"text": "the [SEP] cat [MASK]"}])
    ids = made.sequences[0].ids.tolist()
    assert ids.count(tokenizer.sep_token_id) == 1
    assert tokenizer.mask_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(ids[1:8]) == ["the", "[", "s", "##e", "##p", "]", "cat"]


@pytest.mark.parametrize(("limit", "pair", "refused"), [(2, False, True), (3, False, False), (4, True, True)])
def test_limits_without_room_are_refused(limit: int, pair: bool, refused: bool) -> None:
    if refused:
        with pytest.raises(UserError, match=f"max_length = {limit} leaves no room"):
            encoder(BERT, spec("classes", "a", "b", pair=pair), limit)
    else:
        assert encoder(BERT, spec("classes", "a", "b", pair=pair), limit).encode([{"text": "cat"}])


def test_a_tokenizer_without_the_tokens_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="it has no cls token"):
        encoder(tiny_tokenizer, spec("classes", "a", "b"))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"format": "number"}, False),
        ({"classes": ("b", "a")}, False),
        ({"max_length": 41}, False),
        ({"tokenizer": ROBERTA}, False),
    ],
)
def test_equal_encoders_share_a_key(changes: dict[str, Any], same: bool) -> None:
    told = {"tokenizer": BERT, "format": "classes", "classes": ("a", "b"), "max_length": 40}

    def key(values: dict[str, Any]) -> str:
        one = TransferData("s", values["format"], "accuracy", values["classes"])
        return str(encoder(values["tokenizer"], one, values["max_length"]).key)

    assert (key(told) == key({**told, **changes})) == same


def test_unknown_formats_and_metrics_are_refused() -> None:
    with pytest.raises(UserError, match="data set 'x': no format 'clases'. Did you mean 'classes'"):
        TransferData("x", "clases", "accuracy")
    with pytest.raises(UserError, match="data set 'x': no metric 'acuracy'. Did you mean 'accuracy'"):
        TransferData("x", "classes", "acuracy")


# --------------------------------------------------------------------------------------------- words and tags
TAGS = ("O", "B-X", "I-X")


@pytest.mark.parametrize("predicate", [None, "sat"])
def test_the_first_piece_of_a_word_carries_its_tag(predicate: str | None) -> None:
    """Against the tokenizer's own numbers of words."""
    tokenizer, draw = BERT, random.Random(4)
    reader = encoder(tokenizer, spec("tokens", *TAGS, pair=predicate is not None), 300)
    kinds = [*SAID, "Wolff", "U.S.", "Ünited", "don't", "seeing", "12,000", "-", "日本"]
    for _ in range(40):
        words = [draw.choice(kinds) for _ in range(draw.randint(1, 12))]
        tags = [draw.choice(TAGS) for _ in words]
        row: Row = {"words": words, "tags": tags} | ({"predicate": predicate} if predicate else {})
        (made,) = reader.encode([row])
        given = tokenizer(words, is_split_into_words=True)
        assert made.sequences[0].ids.tolist()[: len(given["input_ids"])] == given["input_ids"]
        numbers = given.word_ids()
        wanted = [
            TAGS.index(tags[word]) if word is not None and word != numbers[at - 1] else IGNORED
            for at, word in enumerate(numbers)
        ]
        rest = len(made.labels) - len(wanted)
        assert made.labels.tolist() == [*wanted, *[IGNORED] * rest]
        assert made.heads == tuple(numbers.index(i) for i in range(len(words)))
        assert rest == (2 if predicate else 0)  # the predicate and its separator


def test_a_byte_level_token_with_its_space_belongs_to_its_word() -> None:
    reader = encoder(ROBERTA, spec("tokens", *TAGS))
    (made,) = reader.encode([{"words": ["ab", "c"], "tags": ["B-X", "I-X"]}])
    # <s> a b _ c </s>: the space is a token of its own here
    assert made.heads == (1, 4)
    assert made.labels.tolist() == [IGNORED, 1, IGNORED, IGNORED, 2, IGNORED]


def test_words_that_are_cut_off_have_no_place() -> None:
    reader = encoder(BERT, spec("tokens", *TAGS), 5)
    (made,) = reader.encode([{"words": ["the", "cats", "sat", "on"], "tags": ["O", "O", "O", "B-X"]}])
    assert made.heads == (1, 2, -1, -1)
    assert made.truncated
    assert made.labels.tolist() == [IGNORED, 0, 0, IGNORED, IGNORED]


# ----------------------------------------------------------------------------------------------------- spans
def span(row: Row, limit: int = 60) -> tuple[Any, str]:
    """The encoded row, and the text of its answer's tokens."""
    (made,) = encoder(BERT, spec("span", pair=True), limit).encode([row])
    places = made.sequences[0].second
    return made, row["text"][places[made.start, 0] : places[made.end, 1]] if made.end else ""


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"text": " the Red hat, and a mill", "answers": ["Red hat"]}, "Red hat"),
        ({"text": "a mill and a mill", "answers": ["mill"], "answer_start": 13}, "mill"),
        ({"text": "near Ünited mills", "answers": ["Ünited"]}, "Ünited"),
        ({"text": "it has 1,200 mills", "answers": ["200"]}, "200"),
        ({"text": "it rained", "answers": ["snow"]}, ""),
    ],
)
def test_answers_are_found_in_the_context(row: Row, answer: str) -> None:
    made, found = span({"question": "the red mill?", **row})
    assert found == answer
    if "answer_start" in row:
        assert made.sequences[0].second[made.start, 0] == row["answer_start"]
    ids = made.sequences[0].ids.tolist()
    inside = np.flatnonzero(made.context)
    assert inside[0] == ids.index(3) + 1  # right after the first separator
    assert inside[-1] == len(ids) - 2


def test_an_answer_that_is_cut_off_points_at_the_first_token() -> None:
    text = "the cat sat on the mat near a mill"
    for words in range(1, 10):
        made, found = span({"text": text, "question": "who?", "answers": ["near a mill"]}, words + 7)
        whole = int(made.context.sum()) == 9
        assert (found == "near a mill") == whole == (made.end > 0)
        assert (made.start, made.end) == (0, 0) or whole


def test_answers_that_are_cut_off_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"the cat sat {i} times", "question": "who?", "answers": ["times"]} for i in range(4)]
    rows[2]["text"] += " on the mat" * 9  # the answer stays
    rows[3] = {**rows[3], "text": "on the mat " * 9 + rows[3]["text"]}
    for part in ("train", "dev"):
        write(tmp_path / f"span/squad/{part}.jsonl", rows)
    task = transfer("squad", tmp_path, max_length=20)
    task.rows("test/squad", task.encoder(BERT))
    assert task.counts["test/squad"] == {"records": 4, "truncated/student": 2, "answers_cut/student": 1}


def test_the_best_span_by_hand() -> None:
    row = {"text": "the cat sat on", "question": "who?", "answers": ["cat"]}
    made, _ = span(row)
    at = np.flatnonzero(made.context)
    logits = torch.zeros(len(made.context), 2)
    logits[at[2], 0], logits[at[0], 1] = 3.0, 4.0  # the likeliest ends are in the wrong order
    logits[at[1], 0], logits[at[3], 1] = 2.0, 2.5
    logits[0] = 100.0  # no context
    assert _best_span(row["text"], made, logits) == "sat on"  # 3 + 2.5 against 0 + 4 and 2 + 2.5
    logits[at[0], 0] = 2.5
    assert _best_span(row["text"], made, logits) == "the"  # 2.5 + 4


def test_a_span_has_a_limit() -> None:
    row = {"text": " ".join(["cat"] * 45), "question": "who?", "answers": ["cat"]}
    made, _ = span(row)
    at = np.flatnonzero(made.context)
    logits = torch.zeros(len(made.context), 2)
    logits[at[0], 0] = logits[at[LONGEST_ANSWER], 1] = 5.0  # one token too long
    logits[at[LONGEST_ANSWER - 1], 1] = 1.0
    assert _best_span(row["text"], made, logits) == " ".join(["cat"] * LONGEST_ANSWER)


# ---------------------------------------------------------------------------------------------------- splits
def texts(rows: Sequence[Row]) -> set[str]:
    return {json.dumps(segments_of(row)) for row in rows}


def ids(rows: Sequence[Row]) -> list[int]:
    return [row["example_id"] for row in rows]


@pytest.mark.parametrize("selection", ["train", "test", "split"])
def test_selection(tmp_path: Path, selection: str) -> None:
    task = transfer("rte", fill(tmp_path, "rte", 80, 30), selection=selection)
    train, dev, test = (task.rows(split) for split in task.splits())
    if selection == "train":
        assert sorted(ids(train) + ids(dev)) == list(range(80))
        assert len(dev) == 8
        assert ids(test) == list(range(30))
        assert texts(dev) <= texts(task.read("train"))
    elif selection == "test":
        assert ids(train) == list(range(80))
        assert ids(dev) == ids(test) == list(range(30))
    else:
        assert ids(train) == list(range(80))
        assert len(dev) == len(test) == 15
        assert sorted(ids(dev) + ids(test)) == list(range(30))
    paths = [task.origins[split]["path"].rsplit("/", 1)[-1] for split in task.splits()]
    assert paths == ["train.jsonl", "train.jsonl" if selection == "train" else "dev.jsonl", "dev.jsonl"]


@pytest.mark.parametrize("name", ["rte", "multirc", "record", "squad", "wic", "conll04"])
@pytest.mark.parametrize("selection", ["train", "split"])
def test_no_text_is_on_both_sides(tmp_path: Path, name: str, selection: str) -> None:
    """Neither repeated texts nor two questions about one paragraph."""
    root = fill(tmp_path, name, 60, 40)
    for file in KNOWN[name].files.values():
        assert file.local is not None
        lines = (root / file.local).read_text().splitlines()
        (root / file.local).write_text("\n".join([*lines, *lines[::2]]) + "\n")
    task = transfer(name, root, selection=selection, dev_share=0.4)
    one, other = ("train", "dev") if selection == "train" else ("dev", f"test/{name}")
    assert not texts(task.rows(one)) & texts(task.rows(other))
    key = {"multirc": "text_a", "record": "text_a", "squad": "text"}.get(name)
    if key:
        assert not {row[key] for row in task.rows(one)} & {row[key] for row in task.rows(other)}
    part = task.read("train" if selection == "train" else "test")
    assert len(task.rows(one)) + len(task.rows(other)) == len(part)
    share = len(task.rows("dev")) / len(part)
    assert 0.25 < share < 0.6


def test_a_carved_split_follows_the_texts_alone(tmp_path: Path) -> None:
    before = transfer("rte", fill(tmp_path / "a", "rte", 80))
    root = fill(tmp_path / "b", "rte", 80)
    path = root / "classify/rte/train.jsonl"
    lines = path.read_text().splitlines()
    random.Random(1).shuffle(lines)
    path.write_text("\n".join(lines) + "\n")
    assert texts(before.rows("dev")) == texts(transfer("rte", root).rows("dev"))


def test_limits(tmp_path: Path) -> None:
    root = fill(tmp_path, "rte", 80, 30)
    whole = transfer("rte", root)
    task = transfer("rte", root, train_limit=10, test_limit=6, dev_limit=5)
    assert len(task.rows("train")) == 10
    assert len(task.rows("dev")) == 5
    assert ids(task.rows("test/rte")) == [0, 5, 10, 15, 20, 25]
    assert texts(task.rows("dev")) <= texts(whole.rows("dev"))
    assert not texts(task.rows("train")) & texts(task.rows("dev"))
    assert len(transfer("rte", root, dev_share=0.5, dev_limit=0).rows("dev")) == 40
    assert len(transfer("rte", root, dev_share=0.5, dev_limit=20).rows("dev")) == 20
    halved = transfer("rte", root, test_limit=6, selection="split")
    assert sorted(ids(halved.rows("dev")) + ids(halved.rows("test/rte"))) == [0, 5, 10, 15, 20, 25]


def test_candidates_of_a_query_stay_together(tmp_path: Path) -> None:
    root = fill(tmp_path, "record", 40, 30)
    whole = transfer("record", root)
    sizes = dict.fromkeys(range(30), 0)
    for row in whole.rows("test/record"):
        sizes[row["group"]] += 1
    for limit in (5, 11, 40):
        task = transfer("record", root, test_limit=limit, train_limit=limit)
        for split in ("train", "dev", "test/record"):
            found: dict[int, int] = {}
            for row in task.rows(split):
                found[row["group"]] = found.get(row["group"], 0) + 1
            of_all = {row["group"]: 0 for row in task.read("test" if "/" in split else "train")}
            for row in task.read("test" if "/" in split else "train"):
                of_all[row["group"]] += 1
            assert all(of_all[group] == count for group, count in found.items())
        assert abs(len(task.rows("test/record")) - limit) <= 4
    outputs = answers(whole, "test/record", limit=7)
    assert {row["group"] for row in outputs} < set(sizes)
    assert all(sum(row["group"] == group for row in outputs) in (0, size) for group, size in sizes.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "dev"}, "task transfer: no selection 'dev'. Known: train, test, split"),
        ({"source": "locale"}, "task transfer: no source 'locale'. Did you mean 'local'"),
        ({"dataset": "rt"}, "task transfer: no data set 'rt'. Did you mean 'rte'"),
        ({"dev_share": 1.0}, "dev_share = 1.0 must lie between 0 and 1"),
        ({"train_limit": -1}, "train_limit = -1 must be 0 or more"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Transfer(Transfer.Settings(**{"dataset": "rte", **settings}), fill(tmp_path, "rte"))


def test_one_text_cannot_be_parted(tmp_path: Path) -> None:
    for part in ("train", "dev"):
        write(tmp_path / f"classify/rte/{part}.jsonl", [record("rte", 0, random.Random(0))] * 9)
    with pytest.raises(UserError, match="'rte' has too few different texts for a dev split"):
        transfer("rte", tmp_path).rows("dev")
    assert len(transfer("rte", tmp_path, selection="test").rows("dev")) == 9


@pytest.mark.parametrize(
    ("name", "item", "message"),
    [
        ("rte", {"text_a": "x", "text_b": "y", "label": "entailed"}, "record 1: no class 'entailed'"),
        ("rte", {"text_a": "x", "label": "entailment"}, ":1: lacks the field 'text_b'"),
        ("stsb", {"text_a": "x", "text_b": "y", "label": "3"}, ":1: 'label' must be a number"),
        ("copa", {"text": "x", "question": "why", "label": "choice1"}, ":1: no question 'why'"),
        (
            "copa",
            {"text": "x", "question": "cause", "choices": ["a"], "label": "choice1"},
            "has 1 choices, must have 2",
        ),
        ("copa", {"text": "x", "question": "cause", "choices": ["a", "b"], "label": "a"}, "no choice 'a'"),
        ("conll03", {"words": ["x", "y"], "tags": ["O"]}, "record 1: has 2 words and 1 tags"),
        ("conll03", {"words": ["x"], "tags": ["B-PERS"]}, "no tag 'B-PERS'. Did you mean 'B-PER'"),
        ("conll03", {"words": ["x", 3], "tags": ["O", "O"]}, ":1: 'words' must be a list of texts"),
        ("conll05", {"words": ["x"], "tags": ["O"]}, ":1: lacks the field 'predicate'"),
        (
            "conll04",
            {"words": ["x"], "entities": [{"start": 0, "end": 2, "type": "Loc"}]},
            "entity 0 to 2 is not within 1 words",
        ),
        ("conll04", {"words": ["x"], "entities": [{"start": 0, "type": "Loc"}]}, "lacks the field 'end'"),
        ("squad", {"text": "x", "question": "y", "answers": []}, "record 1: has no answer"),
        (
            "squad",
            {"text": "x", "question": "y", "answers": {"text": [], "answer_start": []}},
            "record 1: has no answer",
        ),
        (
            "record",
            {"text": "x", "query": "y", "entities": ["x"], "answers": ["x"]},
            ":1: 'query' lacks @placeholder",
        ),
        ("cola", ["x"], ":1: must be a JSON object, is a list"),
    ],
)
def test_malformed_records_are_refused(tmp_path: Path, name: str, item: Any, message: str) -> None:
    for file in KNOWN[name].files.values():
        assert file.local is not None
        write(tmp_path / file.local, [item])
    with pytest.raises(UserError, match=message):
        transfer(name, tmp_path, selection="test").rows("train")


def test_the_revision_follows_data_and_settings(tmp_path: Path) -> None:
    root = fill(tmp_path, "cb")
    first = transfer("cb", root).revision
    assert transfer("cb", root).revision == first
    told = [{"max_length": 64}, {"selection": "test"}, {"train_limit": 9}, {"dev_share": 0.2}]
    assert len({first, *(transfer("cb", root, **one).revision for one in told)}) == 5
    path = root / "classify/cb/dev.jsonl"
    path.write_text(path.read_text().replace("entailment", "neutral", 1))
    assert transfer("cb", root).revision != first


# ------------------------------------------------------------------------------------------- batches, outputs
FORMAT_SETS = ("cb", "stsb", "copa", "conll04", "conll05", "squad", "record")


def prompted(task: Transfer, tokenizer: Any, seed: int = 3) -> PromptedEncoder:
    """A random encoder in float64 behind a random prompt, with the task's head."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=160,
        initializer_range=0.5,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = BertModel(config).double()
        told = task.model_settings()
        made = PromptedEncoder(
            encoder, DeepPrompt(config, 3, 0.5), told["task_format"], task.spec().outputs, 1.0
        )
    return made.double().eval()


def answers(task: Transfer, split: str, batch_size: int = 4, **more: Any) -> list[dict[str, Any]]:
    tokenizer = BERT
    return task.outputs(
        prompted(task, tokenizer), split, task.encoder(tokenizer), None, [10], batch_size, **more
    )


@pytest.mark.parametrize("name", FORMAT_SETS)
def test_batches_have_the_fields_of_their_format(tmp_path: Path, name: str) -> None:
    task = transfer(name, fill(tmp_path, name), max_length=50)
    rows, reader = task.rows("train")[:5], task.encoder(BERT)
    batch = task.collate(rows, {"student": reader, "teacher": task.encoder(ROBERTA)})
    own = set(task.fields_of("encoder"))
    assert own <= set(batch.keys())
    shape = batch["input_ids"].shape
    assert shape[-1] == int(batch["length"].max())
    assert batch["segment_ids"].shape == shape
    assert batch["teacher.input_ids"].shape[:-1] == shape[:-1]
    lengths = batch["choice_length"] if name == "copa" else batch["length"]
    real = torch.arange(shape[-1]) < lengths[..., None]
    assert bool((batch["input_ids"][real] != 0).all())
    assert not batch["input_ids"][~real].any()
    assert not batch["segment_ids"][~real].any()
    if name == "copa":
        assert shape[:2] == (5, 2)
        assert torch.equal(batch["length"], batch["choice_length"].amax(1))
        assert batch["class_label"].tolist() == [row["label"] for row in rows]
    if name == "stsb":
        assert batch["target"].tolist() == [row["label"] for row in rows]
    if name == "cb":
        assert batch["class_label"].tolist() == [task.spec().classes.index(row["label"]) for row in rows]
    if name == "conll04":
        assert bool((batch["labels"][~real] == IGNORED).all())
        for labels, row in zip(batch["labels"], rows, strict=True):
            assert [task.spec().classes[i] for i in labels[labels != IGNORED]] == row["tags"]
    if name == "squad":
        assert not batch["context"][~real].any()
        at = torch.arange(5)
        assert bool(batch["context"][at, batch["start"]].all())
        assert bool((batch["end"] >= batch["start"]).all())
    empty = task.collate([], {"student": reader})
    assert own <= set(empty.keys())
    assert empty.size == 0


@pytest.mark.parametrize("name", FORMAT_SETS)
def test_neither_padding_nor_order_changes_an_output(tmp_path: Path, name: str) -> None:
    task = transfer(name, fill(tmp_path, name), max_length=50)
    told = {size: answers(task, f"test/{name}", size) for size in (1, 3, 50)}
    rows = task.rows(f"test/{name}")
    for found in told.values():
        assert ids(found) == ids(rows)
        for one, other in zip(found, told[1], strict=True):
            for key in one.keys() - {"prediction", "probabilities", "response"}:
                assert one[key] == other[key]
            if name == "stsb":
                assert one["prediction"] == pytest.approx(other["prediction"], rel=1e-9)
            else:
                assert one["prediction"] == other["prediction"]
            assert one.get("probabilities", []) == pytest.approx(other.get("probabilities", []), abs=1e-9)
    assert len({json.dumps(row["prediction"]) for row in told[1]}) > 1  # the model tells rows apart


@pytest.mark.parametrize("name", FORMAT_SETS)
def test_outputs_are_what_the_model_says_of_each_row_alone(tmp_path: Path, name: str) -> None:
    task, tokenizer = transfer(name, fill(tmp_path, name), max_length=50), BERT
    model, reader = prompted(task, tokenizer), task.encoder(tokenizer)
    names = task.spec().classes
    for row, found in zip(task.rows("dev"), answers(task, "dev"), strict=True):
        with torch.no_grad():
            logits = model(task.collate([row], {"student": reader}))[0]
        assert (found["set"], found["seed"], found["finished"]) == ("dev", 10, True)
        assert (found["format"], found["metric"]) == TABLE[name][:2]
        if name in ("cb", "record", "copa"):
            assert found["prediction"] == int(logits.argmax())
            assert found["probabilities"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-9)
            assert found["label"] == row["class_label"]
        if name == "copa":
            assert found["response"] == row["choices"][found["prediction"]]
            assert found["references"] == [row["choices"][row["label"]]]
        if name == "record":
            assert (found["group"], found["candidate"]) == (row["group"], row["candidate"])
            assert found["references"] == row["answers"]
        if name == "stsb":
            assert (found["label"], found["prediction"]) == pytest.approx((row["label"], float(logits[0])))
        if name.startswith("conll"):
            heads = reader.encode([row])[0].heads
            assert found["label"] == row["tags"]
            assert found["prediction"] == [names[int(logits[at].argmax())] for at in heads]
        if name == "squad":
            assert found["prediction"] in row["text"]
            assert found["references"] == row["answers"]


def test_a_word_that_is_cut_off_is_predicted_outside(tmp_path: Path) -> None:
    task = transfer("conll04", fill(tmp_path, "conll04"), max_length=8)
    for row, found in zip(task.rows("dev"), answers(task, "dev"), strict=True):
        assert len(found["prediction"]) == len(row["words"])
        assert set(found["prediction"][6:]) == {"O"}  # six one-piece words between the two special tokens
    assert task.counts["dev"]["truncated/student"] == len(task.rows("dev"))


@pytest.mark.parametrize("name", FORMAT_SETS)
def test_outputs_are_scored(tmp_path: Path, name: str) -> None:
    """From the model to the scores of the record."""
    task = transfer(name, fill(tmp_path, name), max_length=50)
    run = make_run(tmp_path / "run")
    found = answers(task, f"test/{name}")
    write(run.path / "outputs" / f"{name}.jsonl", found)
    result = analysis.analyze(run)
    metric = TABLE[name][1]
    score = result.scores["score"]
    assert score.value == result.scores[f"score/{name}"].value == result.scores[metric].value
    assert np.isfinite(score.value)
    assert score.direction == "higher"
    assert score.n == len({row.get("group", row["example_id"]) for row in found})
    assert result.detail == {"set": name, "format": TABLE[name][0], "metric": metric}
    told = analysis.dev_scores(found)
    assert told["score"] == pytest.approx(score.value)
    run.add("transfer", analysis.VERSION, result)
    assert run.record.scores["transfer/score"].value == pytest.approx(score.value)


@pytest.mark.parametrize("name", ["cb", "stsb", "copa", "conll05", "squad"])
def test_a_model_that_knows_the_answer_scores_all(tmp_path: Path, name: str) -> None:
    """Labels, heads and predictions have one meaning: logits made from a batch's labels give 100."""
    task = transfer(name, fill(tmp_path, name), max_length=60)

    class Knows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, batch: Batch) -> torch.Tensor:
            if name == "stsb":
                return batch["target"][:, None]
            if name == "squad":
                both = torch.stack([batch["start"], batch["end"]], -1)
                return torch.nn.functional.one_hot(both, batch["input_ids"].shape[1]).transpose(1, 2).float()
            if name == "conll05":
                classes = len(task.spec().classes)
                return torch.nn.functional.one_hot(batch["labels"].clamp(min=0), classes).float()
            classes = 2 if name == "copa" else task.spec().outputs
            return torch.nn.functional.one_hot(batch["class_label"], classes).float()

    rows = task.outputs(Knows(), f"test/{name}", task.encoder(BERT), None, [10], 7)
    assert analysis.dev_scores(rows)["score"] == pytest.approx(100)


# -------------------------------------------------------------------------------------------------- real data
@pytest.fixture
def real(data_root: Path) -> Callable[..., Transfer]:
    def make(name: str, **settings: Any) -> Transfer:
        return transfer(name, data_root, **settings)

    return make


@pytest.mark.parametrize("name", REAL)
def test_real_sets(real: Callable[..., Transfer], name: str) -> None:
    """Every set that a data folder has: read whole, a part of it encoded and scored."""
    try:
        task = real(name, source="local", train_limit=40, test_limit=40, dev_limit=40)
    except Missing as error:
        pytest.skip(str(error))
    one, tokenizer = KNOWN[name], BERT
    for part, split, count in (
        ("train", "train", REAL[name][0]),
        ("test", f"test/{name}", REAL[name][1]),
    ):
        rows = task.read(part)
        if task.origins[split]["sha256"] == one.files[part].sha256:
            assert len(rows) == one.files[part].records == count
        if task.spec().format == "classes":
            assert {row["label"] for row in rows} == set(task.spec().classes)
        if task.spec().format == "number":
            assert all(0 <= row["label"] <= 5 for row in rows)
    model = prompted(task, tokenizer)
    reader = task.encoder(tokenizer)
    for split in task.splits():
        assert 0 < len(task.rows(split)) <= 40
        found = task.outputs(model, split, reader, None, [1], 16)
        assert ids(found) == ids(task.rows(split))
        assert all(row["tokens"] <= 128 for row in found)
        assert np.isfinite(analysis.dev_scores(found)["score"])


@pytest.mark.parametrize("name", REAL)
def test_real_splits_share_no_text(real: Callable[..., Transfer], name: str) -> None:
    try:
        task = real(name, source="local")
    except Missing as error:
        pytest.skip(str(error))
    assert not texts(task.rows("train")) & texts(task.rows("dev"))
    share = len(task.rows("dev")) / len(task.read("train"))
    assert share == pytest.approx(min(0.1, 500 / len(task.read("train"))), abs=0.01)


def test_sets_that_the_folder_lacks_are_named(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    lacking = [name for name in SOURCES if name not in REAL]
    assert len(lacking) == 8
    for name in lacking:
        local = KNOWN[name].files["train"].local
        if data.local_file(data_root, str(local)) is None:
            with pytest.raises(Missing, match=f"data set '{name}': .* lacks {local}"):
                transfer(name, data_root).rows("train")


def test_the_page_has_every_set() -> None:
    page = Path(__file__).parent.parent / "docs" / "prompt_transfer.md"
    if not page.is_file():
        pytest.skip("needs the checkout")
    table = {
        line.split("`")[1]: [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.read_text().split("## Tasks")[1].split("### Scores")[0].splitlines()
        if line.startswith("| `")
    }
    assert set(table) == set(SOURCES)
    for name, (_, role, kind, metric, _, files, *records) in table.items():
        task_format, printed, outputs, _, _ = TABLE[name]
        assert role == ("target" if name in TARGETS else "source")
        assert kind.split(" ")[0] == task_format
        if task_format in ("classes", "tokens") and "files" not in kind:
            assert kind == f"{task_format} ({outputs})"
        assert metric == printed
        train, test = (KNOWN[name].files[part] for part in ("train", "test"))
        assert files == f"`{train.local}`, `{str(test.local).rsplit('/', 1)[-1]}`"
        given = [int(one.split(" ")[0].replace(",", "")) for one in records if one]
        assert tuple(given) == REAL.get(name, ())
