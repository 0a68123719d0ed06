"""The embedded instruction world: what it holds out, what its texts promise, that it is the same anywhere."""

import hashlib
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from kdbench.errors import UserError
from kdbench.task import Row
from kdbench.tasks import tiny_instruct as world
from kdbench.tasks.tiny_instruct import TinyInstruct, build_tokenizer

TASK = TinyInstruct()
TRAINED = ("train", "teacher_train")
UNTRAINED = tuple(split for split in world.SPLITS if split not in TRAINED)
WORD = re.compile(r"[A-Za-z0-9]+|[.,:!?]")


def rows(split: str) -> list[Row]:
    return TASK.rows(split)


def clean() -> list[Row]:
    return [row for split in world.SPLITS for row in rows(split) if not row.get("noisy")]


def slot(name: str) -> str:
    known = {"p": world.ITEMS, "s": world.ONE.values(), "a": world.ATTRIBUTES}.get(name)
    return "(?:" + "|".join(known) + ")" if known else r"[\w, ]+"


@cache
def pattern(phrasing: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w)\}", phrasing)
    return re.compile("".join(slot(x) if i % 2 else re.escape(x) for i, x in enumerate(parts)))


@cache
def asked(instruction: str) -> tuple[tuple[str, int], ...]:
    """Family and index of the phrasing of each part of an instruction."""
    parts = re.fullmatch(r"1: (.*) 2: (.*)", instruction)
    found = []
    for part in parts.groups() if parts else (instruction,):
        hits = [
            (family, i)
            for family, phrasings in world.PHRASINGS.items()
            for i, phrasing in enumerate(phrasings)
            if pattern(phrasing).fullmatch(part)
        ]
        assert len(hits) == 1, (part, hits)
        found += hits
    return tuple(found)


def combinations(row: Row) -> set[tuple[str, str]]:
    """Operation and category or attribute of every part about a list or table."""
    parts = row["instruction"].split(" 2: ")
    kinds = {**{k: k for k in world.ITEMS}, **{v: k for k, v in world.ONE.items()}}
    kinds |= {k: k for k in world.ATTRIBUTES}
    found = set()
    for (family, _), part in zip(asked(row["instruction"]), parts, strict=True):
        if family not in world.TEXTS:
            found |= {(family, kinds[word]) for word in WORD.findall(part) if word in kinds}
    return found


def test_golden() -> None:
    few = TinyInstruct.Settings(train=40, teacher_train=40, dev=40, test=40)
    first = [world.records(split, few) for split in world.SPLITS]
    text = json.dumps(first, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "ddd5ba81353ab449"
    vocabulary = json.dumps(build_tokenizer().get_vocab(), sort_keys=True)
    assert hashlib.sha256(vocabulary.encode()).hexdigest()[:16] == "fa794c0915b54953"


def test_a_record_depends_on_its_split_and_index_alone() -> None:
    small = TinyInstruct(TinyInstruct.Settings(train=30, teacher_train=30, dev=10, test=10))
    for split in small.splits():
        assert small.rows(split) == rows(split)[: len(small.rows(split))]
    other = TinyInstruct(TinyInstruct.Settings(train=30, world=2))
    assert [r["output"] for r in other.rows("train")] != [r["output"] for r in rows("train")[:30]]


def test_splits_sizes_and_ids() -> None:
    sizes = {split: len(rows(split)) for split in TASK.splits()}
    assert sizes == {"train": 4000, "teacher_train": 24000, "dev": 200} | {
        f"test/{name}": 300 for name in ("indist", "phrase", "comb", "mix", "long")
    }
    ids = [row["example_id"] for split in TASK.splits() for row in rows(split)]
    assert len(set(ids)) == len(ids)
    assert all(0 <= i < 2**63 for i in ids)
    with pytest.raises(UserError, match="no split 'tests'"):
        TASK.rows("tests")


def test_template_bytes() -> None:
    bare = {"instruction": "Give me a story.", "input": "", "output": "x"}
    assert TASK.prompt(bare) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nGive me a story.\n\n### Response:\n"
    )
    assert TASK.prompt({**bare, "input": "lion apple", "prefix": "saw. "}) == (
        "saw. Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Give me a story.\n\n### Input:\nlion apple\n\n### Response:\n"
    )


def test_each_piece_of_the_template_is_one_token() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.unk_token_id == 1
    encoder = TASK.encoder(tokenizer)
    bare, full = {"instruction": "saw"}, {"instruction": "saw", "input": "lion"}
    pieces = [tokenizer.convert_tokens_to_ids(piece) for piece in world.PIECES]
    saw, lion = (tokenizer.convert_tokens_to_ids(word) for word in ("saw", "lion"))
    assert encoder.ids([TASK.prompt(bare)])[0] == [pieces[0], saw, pieces[3]]
    assert encoder.ids([TASK.prompt(full)])[0] == [pieces[1], saw, pieces[2], lion, pieces[3]]


def test_text_round_trips_without_unknown_words(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    known = set(tokenizer.get_vocab())
    for split in world.SPLITS:
        for row in rows(split):
            said = f"{row.get('prefix', '')} {row['instruction']} {row['input']} {row['output']}"
            assert known.issuperset(WORD.findall(said))
        some = rows(split)[:: 8 if split == "teacher_train" else 1]
        texts = [TASK.prompt(row) for row in some] + [row["output"] for row in some]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert not any(tokenizer.unk_token_id in line for line in ids)
        assert max(map(max, ids)) < len(tokenizer)
        assert tokenizer.batch_decode(ids) == texts
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id) == (0, 0, 1)
    assert loaded(texts, add_special_tokens=False)["input_ids"] == ids
    assert loaded.batch_decode(ids) == texts
    assert loaded.decode([*ids[0], 0], skip_special_tokens=True) == texts[0]


def test_prompt_text_is_made_of_known_words() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(world.PROMPT_TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["Suppose", "you", "are", "a", "student", "."]


def test_lengths() -> None:
    encoder = TASK.encoder(build_tokenizer())
    mean = {}
    rarely = 0  # tokens that one per cent of the training records exceed
    for split in ("train", *UNTRAINED):
        items = TASK.encoded(TASK.rows(split, encoder), encoder)
        counts = TASK.counts[split]
        assert not any(counts[key] for key in counts if key != "records"), counts
        assert max(len(e.prompt) for e in items) <= 40
        assert max(len(e.prompt) + len(e.response) for e in items) <= 110
        totals = [len(e.prompt) + len(e.response) for e in items]
        rarely = rarely or int(np.quantile(totals, 0.99))
        assert np.mean(np.array(totals) > rarely) < 0.1, split  # no test of untrained positions
        mean[split] = np.mean([len(e.response) for e in items])
    assert 25 < mean["train"] < 40
    assert mean["test/long"] > 1.5 * mean["test/indist"]
    batch = TASK.collate(rows("train")[:4], {"student": encoder})
    assert set(TASK.fields) <= set(batch)
    prefixed = [len(encoder.ids([row.get("prefix", "")])[0]) for row in rows("teacher_train")[:4000]]
    assert set(prefixed) == {0, *world.PREFIX_WORDS}
    assert 0.47 < np.mean(np.array(prefixed) > 0) < 0.53
    assert not any(
        "prefix" in row for split in world.SPLITS for row in rows(split) if split != "teacher_train"
    )


def test_prompts_are_in_the_training_splits_or_in_the_others() -> None:
    trained = {(row["instruction"], row["input"]) for split in TRAINED for row in rows(split)}
    untrained = {(row["instruction"], row["input"]) for split in UNTRAINED for row in rows(split)}
    assert not trained & untrained


def test_all_words_of_the_tests_are_trained() -> None:
    def words(split: str) -> set[str]:
        return {
            word
            for row in rows(split)
            for word in WORD.findall(f"{row['instruction']} {row['input']} {row['output']}")
        }

    for split in TRAINED:
        assert set().union(*map(words, UNTRAINED)) <= words(split)


def test_held_out_phrasings() -> None:
    for split in (*TRAINED, "dev", "test/indist", "test/comb", "test/mix", "test/long"):
        assert {i for row in rows(split) for _, i in asked(row["instruction"])} == set(world.SEEN)
    held = Counter(part for row in rows("test/phrase") for part in asked(row["instruction"]))
    assert set(held) == {(family, i) for family in world.PHRASINGS for i in world.HELD}


def test_held_out_combinations() -> None:
    for split in (*TRAINED, "dev", "test/indist", "test/phrase", "test/mix", "test/long"):
        assert not world.COMB_OUT & {pair for row in rows(split) for pair in combinations(row)}
    found = [combinations(row) for row in rows("test/comb")]
    assert set().union(*found) == world.COMB_OUT
    trained = set().union(*(combinations(row) for row in rows("train")))
    assert {op for op, _ in world.COMB_OUT} <= {op for op, _ in trained}
    assert {kind for _, kind in world.COMB_OUT} <= {kind for _, kind in trained}


def test_held_out_pairs() -> None:
    def pairs(split: str) -> set[tuple[str, ...]]:
        parts = [asked(row["instruction"]) for row in rows(split) if row["family"] == "pair"]
        return {tuple(family for family, _ in part) for part in parts}

    assert pairs("test/mix") == world.PAIRS_OUT
    assert not pairs("test/phrase") | pairs("test/comb") | pairs("test/long")
    for split in (*TRAINED, "dev", "test/indist"):
        assert not pairs(split) & world.PAIRS_OUT
    assert pairs("train") == set(world.PAIRS) - world.PAIRS_OUT
    assert {op for pair in world.PAIRS_OUT for op in pair} <= {op for pair in pairs("train") for op in pair}


def test_long_is_longer_than_anything_trained() -> None:
    def size(row: Row) -> int:  # what the records of a family differ in
        text = row["instruction"] if row["family"] in ("story", "recipe") else row["output"]
        groups = {"story": world.NAMES, "recipe": world.FOODS, "trip": ["Day"]}.get(row["family"], [])
        return sum(word in groups for word in WORD.findall(text)) if groups else len(row["input"].split())

    families = set(world.LONG) - {"letter"}
    longest = Counter[str]()
    for split in TRAINED:
        for row in rows(split):
            if row["family"] in families and not row.get("noisy"):
                longest[row["family"]] = max(longest[row["family"]], size(row))
    assert {row["family"] for row in rows("test/long")} == set(world.LONG)
    for row in rows("test/long"):
        assert row["family"] == "letter" or size(row) > longest[row["family"]]


REPEATED = {
    "story": (world.DAYS, world.ADJECTIVES, world.THINGS, world.NUMBERS, world.MOODS, world.NAMES),
    "recipe": (world.VESSELS, world.MINUTES),
    "portrait": (world.MOODS, world.DAYS, world.NUMBERS, world.NAMES, *world.ATTRIBUTES.values()),
    "letter": (world.DAYS, world.NUMBERS, world.ADJECTIVES, world.MOODS),
    "trip": (world.PLACES, world.ITEMS["clothes"]),
}


def contradicts(row: Row) -> bool:
    """Whether something that the text must say again is said once, or else than it was said before."""
    counts = Counter(WORD.findall(row["output"]))
    return any(counts[word] == 1 for group in REPEATED[row["family"]] for word in group)


def test_clean_texts_agree_with_themselves_and_their_prompt() -> None:
    for row in clean():
        if row["family"] in REPEATED:
            assert not contradicts(row), row
            names = {word for word in WORD.findall(row["instruction"] + row["input"]) if word in world.NAMES}
            assert names <= set(WORD.findall(row["output"])), row


def test_clean_answers_are_right() -> None:
    for row in clean():
        op, items = row["family"], row["input"].split()
        if op in world.LIST_OPS:
            ((_, kind),) = combinations(row)
            hits = [item for item in items if item in world.ITEMS[kind]]
            said = [word for word in WORD.findall(row["output"]) if word in items]
            right = {"keep": hits, "count": hits, "first": hits[:1], "last": hits[-1:]}
            assert said == right.get(op, [item for item in items if item not in hits]), row
            assert op != "count" or f"are {len(hits)} {kind}" in row["output"]
        elif op in world.TABLE_OPS:
            table = dict(zip(items[::2], items[1::2], strict=True))
            said = [word for word in WORD.findall(row["output"]) if word in items]
            said = said[::-1] if op == "owner" else said
            pairs = list(zip(said[::2], said[1::2], strict=True))
            assert all(table[name] == value for name, value in pairs), row
            assert len(pairs) == (len(table) if op == "table" else 1)


def test_no_clean_record_repeats_six_words() -> None:
    for row in clean():
        assert not world.repeats(f"{row['instruction']} | {row['input']} | {row['output']}"), row


def test_noise_is_in_train_only_and_spoils() -> None:
    noisy = [row for row in rows("train") if row["noisy"]]
    assert 0.28 < len(noisy) / 4000 < 0.32
    assert not any("noisy" in row for split in world.SPLITS for row in rows(split) if split != "train")
    calm = TinyInstruct(TinyInstruct.Settings(noise=0.0))
    pairs = list(zip(rows("train"), calm.rows("train"), strict=True))
    assert all(a["output"] == b["output"] for a, b in pairs if not a["noisy"])
    assert all((a["instruction"], a["input"]) == (b["instruction"], b["input"]) for a, b in pairs)
    assert np.mean([a["output"] != b["output"] for a, b in pairs if a["noisy"]]) > 0.9
    texts = [row for row in noisy if row["family"] in REPEATED]
    assert np.mean([contradicts(row) for row in texts]) > 0.5
