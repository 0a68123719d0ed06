"""tiny_transfer and its text: rules, relations between data sets, and that no text is in two splits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kdbench import board as boards
from kdbench.config import load_board
from kdbench.errors import UserError
from kdbench.record import RunRecord, load
from kdbench.tasks import _tiny_transfer_world as world
from kdbench.tasks._draws import Rng
from kdbench.tasks.tiny_transfer import LENGTH, TinyTransfer
from kdbench.tasks.tiny_transfer_text import TinyTransferText

NAMES = tuple(world.TASKS)
MOOD = {**dict.fromkeys(world.GOOD, 1), **dict.fromkeys(world.BAD, -1)}


def made(dataset: str, **settings: Any) -> TinyTransfer:
    return TinyTransfer(TinyTransfer.Settings(dataset=dataset, **settings))


def clauses(text: str) -> list[tuple[str, int]]:
    """What each clause of a review is about, and its mood, read from its words alone."""
    aspect = {noun: name for name, nouns in world.ASPECTS.items() for noun in nouns}
    known = {**MOOD, **dict.fromkeys(world.PLAIN, 0)}
    words = [word for word in text.split() if word in aspect or word in known]
    pairs = zip(words[::2], words[1::2], strict=True)
    return [(aspect[a if a in aspect else b], known[b if a in aspect else a]) for a, b in pairs]


@pytest.mark.parametrize("dataset", NAMES)
def test_splits_have_their_sizes_and_share_no_text(dataset: str) -> None:
    task = made(dataset, dev=30, test=50)
    texts = {split: [world.text_of(row) for row in task.rows(split)] for split in task.splits()}
    sizes = {"train": world.TASKS[dataset].train, "dev": 30, f"test/{dataset}": 50}
    assert {split: len(rows) for split, rows in texts.items()} == sizes
    every = [text for rows in texts.values() for text in rows]
    assert len(set(every)) == len(every)
    assert all(world.is_test(text) == (split.startswith("test")) for split in texts for text in texts[split])


def test_rows_follow_from_name_and_seed_alone() -> None:
    assert made("food").rows("train") == made("food").rows("train")
    assert made("food").rows("train") != made("food", world=2).rows("train")
    assert made("mood").rows("train")[:4] != made("mood_few").rows("train")[:4]


@pytest.mark.parametrize("dataset", ["mood", "mood_few"])
def test_mood_is_that_of_most_clauses(dataset: str) -> None:
    for row in made(dataset).rows("dev"):
        total = sum(mood for _, mood in clauses(row["text"]))
        assert total
        assert row["label"] == ("good" if total > 0 else "bad")


@pytest.mark.parametrize("dataset", ["food", "staff"])
def test_an_aspects_mood_is_that_of_its_one_clause_whatever_the_rest_says(dataset: str) -> None:
    against = 0
    rows = made(dataset).rows("dev")
    for row in rows:
        found = clauses(row["text"])
        (mood,) = [mood for aspect, mood in found if aspect == dataset]
        assert row["label"] == ("good" if mood > 0 else "bad")
        rest = sum(other for aspect, other in found if aspect != dataset)
        assert rest
        against += rest * mood < 0
    assert 0.35 < against / len(rows) < 0.65, "the mood of the whole does not tell"


def test_pairs_agree_or_not() -> None:
    rows = made("agree").rows("dev")
    for row in rows:
        one, other = clauses(row["text_a"])[0][1], clauses(row["text_b"])[0][1]
        assert row["label"] == ("yes" if one == other else "no")
    assert 0.35 < sum(row["label"] == "yes" for row in rows) / len(rows) < 0.65


def test_times_of_a_trip_are_all_early_or_all_late() -> None:
    for row in made("when").rows("dev"):
        words = set(row["text"].split())
        early, late = words & set(world.EARLY), words & set(world.LATE)
        assert bool(early) != bool(late)
        assert row["label"] == ("early" if early else "late")


def test_tags_name_persons_and_places_and_some_words_are_either() -> None:
    tags: dict[str, set[str]] = {}
    for row in made("names").rows("dev"):
        assert len(row["words"]) == len(row["tags"])
        for word, tag in zip(row["words"], row["tags"], strict=True):
            tags.setdefault(word, set()).add(tag)
    assert all(tags[word] == {"B-place"} for word in world.PLACE)
    assert all(tags[word] == {"I-person"} for word in world.LAST)
    assert all(tags[word] == {"B-person", "B-place"} for word in world.BOTH)
    assert all(tags[word] == {"O"} for word in tags.keys() & {*world.LEAVE, *world.EARLY, ".", "at", "met"})


def test_relations_are_those_of_the_rules() -> None:
    found = {(a, b): TinyTransfer.relation(a, b) for a in NAMES for b in NAMES}
    assert all((kind == "self") == (a == b) for (a, b), kind in found.items())
    assert all(kind == found[b, a] for (a, b), kind in found.items()), "symmetric"
    of_kind = {kind: {pair for pair, one in found.items() if one == kind} for kind in set(found.values())}
    same = {("mood", "mood_few"), ("names", "names_few")}
    assert of_kind["same"] == same | {(b, a) for a, b in same}
    assert of_kind["opposed"] == {("staff", "food"), ("food", "staff")}
    trips = {"when", "names", "names_few"}
    assert of_kind["unrelated"] == {(a, b) for a, b in found if (a in trips) != (b in trips)}
    assert ("agree", "mood_few") in of_kind["shared"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "mod"}, "no data set 'mod'. Did you mean 'mood'"),
        ({"dev": 0}, "dev = 0 must be 1 or more"),
        ({"test": 0}, "test = 0 must be 1 or more"),
        ({"selection": "test"}, "selection says nothing here"),
    ],
)
def test_mistakes_are_told_in_a_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TinyTransfer(TinyTransfer.Settings(**settings))
    assert message in str(caught.value)
    with pytest.raises(UserError, match="no tokenizer 'gpt'"):
        made("mood").tokenizer("gpt")


@pytest.mark.parametrize("dataset", NAMES)
def test_every_word_is_a_token_and_no_text_is_cut(dataset: str) -> None:
    task = made(dataset)
    tokenizer = task.tokenizer("bert")
    encoder = task.encoder(tokenizer, "encoder")
    for split in task.splits():
        for row, example in zip(task.rows(split), task.encoded(task.rows(split), encoder), strict=True):
            assert tokenizer.unk_token_id not in example.sequences[0].ids
            assert not example.truncated
            words = len(world.text_of(row).replace(" | ", " ").split())
            assert len(example.sequences[0].ids) == words + (3 if "text_b" in row else 2) <= LENGTH


# ------------------------------------------------------------------------------------------------------- text
def test_pretraining_text_holds_no_text_of_a_test_set_and_all_words() -> None:
    task = TinyTransferText(TinyTransferText.Settings(train=3000))
    rows = task.rows("train")
    lines = [f"{row['text_a']} | {row['text_b']}" for row in rows if row["text_b"]]
    lines += [text for row in rows for text in (row["text_a"], row["text_b"]) if text]
    assert not any(world.is_test(line) for line in lines)
    tests = {world.text_of(row) for name in NAMES for row in made(name).rows(f"test/{name}")}
    assert len(tests) > 2000
    assert not tests & set(lines)
    assert {word for line in lines for word in line.split()} >= {
        word for kind in (*world.KINDS, *world.MOODS) for word in kind
    }


def test_bag_ids_are_the_kinds_of_words_in_the_order_of_the_text() -> None:
    task = TinyTransferText(TinyTransferText.Settings(train=40))
    encoder = task.encoder(task.tokenizer("bert"))
    rows = task.rows("train")
    batch = task.collate(rows, {"student": encoder})
    assert set(batch.keys()) == set(task.fields)
    for i, row in enumerate(rows):
        kinds = [-1, *world.kinds(row["text_a"].split()), -1]
        if row["text_b"]:
            kinds += [*world.kinds(row["text_b"].split()), -1]
        assert batch["bag_ids"][i, : len(kinds)].tolist() == kinds
        assert (batch["bag_ids"][i, len(kinds) :] == -1).all()
        assert batch["segment_ids"][i].sum() == (len(row["text_b"].split()) + 1 if row["text_b"] else 0)
    fresh = task.collate([dict(row) for row in rows], {"student": encoder})
    assert all(torch.equal(fresh[key], batch[key]) for key in task.fields)


def test_kinds_say_whose_mood_it_is() -> None:
    aspects, count = list(world.ASPECTS), len(world.KINDS)
    found = world.kinds("the soup was good , we had a dull waiter and the bed was plain .".split())
    food, staff, room = aspects.index("food"), aspects.index("staff"), aspects.index("room")
    assert found == [
        -1, food, -1, count + 3 * food + 2, -1, -1, -1, -1, count + 3 * staff, staff, -1, -1, room, -1,
        count + 3 * room + 1, -1,
    ]  # fmt: skip
    assert count + 9 <= len(TinyTransfer().tokenizer("bert")), "the pooler is asked for ids of the vocabulary"


def test_a_perfect_reader_scores_100() -> None:
    class Reader(nn.Module):
        """Logits of a review's mood, read from its words."""

        def __init__(self, tokenizer: Any) -> None:
            super().__init__()
            values = torch.zeros(len(tokenizer))
            for word, mood in MOOD.items():
                values[tokenizer.convert_tokens_to_ids(word)] = mood
            self.values = nn.Parameter(values)

        def forward(self, batch: Any) -> torch.Tensor:
            total = self.values[batch["input_ids"]].sum(1)
            return torch.stack([-total, total], 1)

    from analyses.transfer import dev_scores

    task = made("mood", test=100)
    tokenizer = task.tokenizer("bert")
    encoder = task.encoder(tokenizer)
    decode: Any = None
    rows = task.outputs(Reader(tokenizer), "test/mood", encoder, decode, [0], 32)
    assert dev_scores(rows)["score"] == 100.0


def test_the_rng_is_not_shared_between_sets() -> None:
    assert world.review(Rng(1)) == world.review(Rng(1)) != world.review(Rng(2))


# ------------------------------------------------------------------------------------------------------ board
def test_published_pairs_that_are_related_score_above_unrelated_ones() -> None:
    board = load_board("tiny-transfer/v1")
    found: dict[str, list[float]] = {}
    for record in published(board, "panda"):
        kind = TinyTransfer.relation(str(record.axes["source"]), str(record.axes["target"]))
        found.setdefault(kind, []).append(record.scores["method/semantic"].value)
    assert {kind: len(values) for kind, values in found.items()} == {
        "self": 12, "same": 6, "opposed": 3, "shared": 33, "unrelated": 42
    }  # fmt: skip
    assert min(found["same"]) > max(found["unrelated"])
    mean = {kind: sum(values) / len(values) for kind, values in found.items()}
    assert mean["same"] > mean["shared"] > mean["unrelated"] + 0.2


def test_every_published_row_takes_the_learning_rate_that_was_tried() -> None:
    board = load_board("tiny-transfer/v1")
    assert board.tuning is not None
    assert board.tuning.seed not in board.seeds
    assert set(board.tuned) == {row.name for row in board.rows}
    for name, tuned in board.tuned.items():
        assert max(tuned.trials, key=lambda trial: trial.score or 0.0).lr == tuned.lr
        records = published(board, name)
        assert records
        assert {record.config["training"]["lr"] for record in records} == {tuned.lr}


def published(board: Any, row: str) -> list[RunRecord]:
    records = [load(path) for path in boards.published_records(board)]
    return [record for record in records if record.row == row]
