"""The embedded few-shot world: the same anywhere, splits apart, labels that are tokens, texts in order."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from kdbench.errors import UserError
from kdbench.few_shot import Template
from kdbench.task import Row
from kdbench.tasks import _tiny_fewshot_world as world
from kdbench.tasks.tiny_fewshot import TinyFewShot
from kdbench.tasks.tiny_fewshot_text import TinyFewShotText

DATASETS = ("polarity", "opinion", "topic", "pairs")
TOKENIZERS = ("bert", "roberta")


def task(dataset: str, **settings: object) -> TinyFewShot:
    return TinyFewShot(TinyFewShot.Settings(dataset=dataset, **settings))  # type: ignore[arg-type]


TASKS = {dataset: task(dataset) for dataset in DATASETS}
TEXT = TinyFewShotText()


def sentences(row: Row) -> tuple[str, str]:
    return row.get("text", row.get("text_a")), row.get("text_b", "")


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def test_golden() -> None:
    texts = {name: [one.pool()[:200], one.tests()[name][:100]] for name, one in TASKS.items()}
    assert digest(texts) == "90b9df8023f18e6c"
    assert digest([TEXT.rows(split)[:200] for split in TEXT.splits()]) == "1c3233611be98115"
    assert digest([world.build_tokenizer(name).get_vocab() for name in TOKENIZERS]) == "571f5ede99af9fd9"


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_draw_is_the_same_each_time_and_another_for_each_seed(dataset: str) -> None:
    first, again, other = task(dataset, draw=2), task(dataset, draw=2), task(dataset, draw=3)
    for split in first.splits():
        assert first.rows(split) == again.rows(split)
        assert (first.rows(split) == other.rows(split)) == split.startswith("test/")
    assert first.revision == again.revision != other.revision


@pytest.mark.parametrize("dataset", DATASETS)
def test_splits_are_apart_and_balanced(dataset: str) -> None:
    one = TASKS[dataset]
    assert one.splits() == ["train", "dev", "unlabeled", f"test/{dataset}"]
    rows = {split: one.rows(split) for split in one.splits()}
    n = len(one.classes())
    for split in ("train", "dev"):
        assert Counter(row["class_label"] for row in rows[split]) == dict.fromkeys(range(n), 16)
    assert len(rows["unlabeled"]) == 160 * n
    assert {row["class_label"] for row in rows["unlabeled"]} == {-1}
    assert not any("label" in row for row in rows["unlabeled"])
    texts = [{sentences(row) for row in rows[split]} for split in one.splits()]
    assert all(not a & b for i, a in enumerate(texts) for b in texts[:i])
    assert len(texts[3]) == len(rows[f"test/{dataset}"]) == 480
    assert len(texts[0]) == len(rows["train"])


@pytest.mark.parametrize("dataset", DATASETS)
def test_classes_have_their_shares(dataset: str) -> None:
    made = world.TASKS[dataset]
    assert sum(made.prior) == pytest.approx(1)
    for rows in (TASKS[dataset].pool(), TASKS[dataset].rows(f"test/{dataset}")):
        seen = Counter(row["label"] for row in rows)
        for name, share in zip(made.classes, made.prior, strict=True):
            assert seen[name] / len(rows) == pytest.approx(share, abs=0.07)
            assert seen[name] >= 32


def test_a_longer_pool_begins_with_a_shorter_one_and_worlds_differ() -> None:
    whole = TASKS["topic"].pool()
    assert task("topic", size=50).pool() == whole[:50]
    assert task("topic", world=2, size=50).pool() != whole[:50]


def test_no_pretraining_line_holds_a_test_text() -> None:
    bare = TinyFewShotText(TinyFewShotText.Settings(train=4000, prompted=0.0))
    lines = {*TEXT.texts("train"), *TEXT.texts("dev"), *bare.texts("train")}
    for dataset, one in TASKS.items():
        made = world.TASKS[dataset]
        for row in one.rows(f"test/{dataset}"):
            assert world.is_test(*sentences(row))
            assert " ".join(sentences(row)).rstrip() not in lines
            assert not lines & {Template(made.template).fill(row, word) for word in made.label_words}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_label_words_are_single_tokens(dataset: str, name: str) -> None:
    one = TASKS[dataset]
    encoder = one.encoder(one.tokenizer(name), "masked_lm")
    words = [word.lower() if name == "bert" else word for word in one.label_words()]
    assert [encoder.token(i) for i in encoder.verbalizer_ids] == words
    assert len(set(encoder.verbalizer_ids)) == len(words)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_know_every_word_and_give_texts_back(name: str, tmp_path: Path) -> None:
    tokenizer = world.build_tokenizer(name)
    specials = ("pad", "unk", "cls", "sep", "mask")
    assert len({getattr(tokenizer, f"{token}_token_id") for token in specials}) == 5
    for word in world.words():
        if word.isalpha():
            ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            assert len(ids) == 1
            assert tokenizer.unk_token_id not in ids
    texts = [" ".join(sentences(row)).strip() for one in TASKS.values() for row in one.rows("train")]
    texts += list(TEXT.texts("dev"))
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert not any(tokenizer.unk_token_id in line for line in ids)
    lower = [text.lower() for text in texts] if name == "bert" else texts
    assert tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False) == lower
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(texts[:50])["input_ids"] == tokenizer(texts[:50])["input_ids"]
    assert loaded.mask_token_id == tokenizer.mask_token_id


def test_tokenizers_share_no_numbering() -> None:
    bert, roberta = (world.build_tokenizer(name).get_vocab() for name in TOKENIZERS)
    shared = [word for word in world.words() if word in bert and f"Ġ{word}" in roberta]
    assert sum(bert[word] == roberta[f"Ġ{word}"] for word in shared) < len(shared) / 20


@pytest.mark.parametrize("dataset", DATASETS)
def test_texts_are_words_with_marks_in_their_places(dataset: str) -> None:
    known = set(world.words())
    for row in TASKS[dataset].pool():
        for text in filter(None, sentences(row)):
            assert re.fullmatch(r"[A-Za-z]+(,? [a-z]+)*[.?]?", text), text
            assert known.issuperset(re.findall(r"[A-Za-z]+|[.,?]", text))
    assert bool(sentences(TASKS[dataset].pool()[0])[1]) == (dataset == "pairs")


@pytest.mark.parametrize("dataset", DATASETS)
def test_classes_are_told_by_their_words(dataset: str) -> None:
    """The class with most words in a text is right more often than not, and not always."""
    made = world.TASKS[dataset]
    assert len({word for lexicon in made.lexicons for word in lexicon}) == sum(map(len, made.lexicons))
    rows = TASKS[dataset].rows(f"test/{dataset}")
    right = 0.0
    for row in rows:
        said = re.findall(r"[a-z]+", " ".join(sentences(row)).lower())
        counts = [sum(word in lexicon for word in said) for lexicon in made.lexicons]
        best = [i for i, count in enumerate(counts) if count == max(counts)]
        right += (row["class_label"] in best) / len(best)
    assert 0.7 < right / len(rows) < 0.98


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pretraining_rows_are_encoded_as_prompts_are(name: str) -> None:
    tokenizer = world.build_tokenizer(name)
    encoder = TEXT.encoder(tokenizer)
    for dataset, one in TASKS.items():
        row = one.rows("train")[0]
        before, after = world.fragments(one.template(), *sentences(row))
        word = one.label_words()[row["class_label"]]
        ids, slot = encoder.encode([{"before": before, "word": word, "after": after}])[0]
        prompted = one.encoder(tokenizer, "masked_lm")
        example = prompted.encode([row])[0]
        assert slot == example.mask, dataset
        assert ids[slot] == prompted.verbalizer_ids[row["class_label"]]
        ids[slot] = tokenizer.mask_token_id
        assert ids == example.ids.tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pretraining_batches(name: str) -> None:
    tokenizer = TEXT.tokenizer(name)
    encoder = TEXT.encoder(tokenizer)
    some = TinyFewShotText(TinyFewShotText.Settings(train=60, dev=20, prompted=0.5))
    rows = some.rows("train")
    batch = some.collate(rows, {"student": encoder})
    assert tuple(batch) == some.fields
    alone = [some.collate([row], {"student": encoder}) for row in (rows[3], {**rows[3]})]
    for i, row in enumerate(rows):
        length, slot = int(batch["length"][i]), int(batch["cloze_index"][i])
        assert batch["input_ids"][i, 0] == tokenizer.cls_token_id
        assert batch["input_ids"][i, length - 1] == tokenizer.sep_token_id
        assert (batch["input_ids"][i, length:] == tokenizer.pad_token_id).all()
        assert (slot >= 0) == bool(row["word"])
        if slot >= 0:
            shown = tokenizer.decode([int(batch["input_ids"][i, slot])]).strip()
            assert shown.lower() == row["word"].lower()
    assert len({bool(row["word"]) for row in rows}) == 2
    for one in alone:
        assert torch.equal(one["input_ids"][0], batch["input_ids"][3, : int(batch["length"][3])])
    assert int(batch["length"].max()) <= encoder.max_length


def test_slots_follow_the_text_but_for_a_share_of_noise() -> None:
    films = {name: set(text.split()) for name, text in world.FILM.items()}
    rates, shares = [], []
    for noise in (0.0, 0.5):
        some = TinyFewShotText(TinyFewShotText.Settings(train=2000, noise=noise))
        right, rows = 0.0, []
        for row in some.rows("train"):
            said = re.findall(r"[a-z]+", row["before"])
            good, bad = (sum(word in films[name] for word in said) for name in ("positive", "negative"))
            if row["word"] in ("terrible", "great") and good + bad:
                rows.append(row)
                right += 0.5 if good == bad else (good > bad) == (row["word"] == "great")
        rates.append(right / len(rows))
        shares.append(sum(row["word"] == "great" for row in rows) / len(rows))
    assert rates[0] > 0.85 > 0.8 > rates[1] > 0.6
    assert shares == pytest.approx([0.5, 0.75], abs=0.06)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="polarty.*Did you mean 'polarity'"):
        task("polarty")
    with pytest.raises(UserError, match="prompt_set = 'pet-0' must be lm-bff"):
        task("topic", prompt_set="pet-0")
    with pytest.raises(UserError, match="size = 0"):
        task("topic", size=0)
    for one in (TASKS["topic"], TEXT):
        with pytest.raises(UserError, match="tokenizer 'gpt2'"):
            one.tokenizer("gpt2")
