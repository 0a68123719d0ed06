"""The text task: documents, their cut into train and dev, chunks, and what is refused."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from kdbench.distiller import target_mask
from kdbench.errors import UserError
from kdbench.task import template
from kdbench.tasks.text import ENCODER_FIELDS, MASKED_LM_FIELDS, Text

REAL = os.environ.get("KDBENCH_DATA_ROOT")


def text(*corpora: str, root: Path | None = None, **more: Any) -> Text:
    return Text(Text.Settings(corpora=list(corpora), **more), root)


@pytest.fixture
def marked_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with CLS and SEP; its end-of-text token is neither."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    return tokenizer


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A file of 1,000 words, ten to a line."""
    names = ["one", "two", "three", "red", "blue"]
    lines = [" ".join(names[(i + j) % 5] for j in range(10)) for i in range(100)]
    path = tmp_path / "words.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_dev_is_the_end_of_each_corpus(words: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"more/{name}.txt.gz").write_bytes(gzip.compress(f"{name} start\n{name} end".encode()))
    task = text(str(words), str(tmp_path / "more"), dev_share=0.3)
    train, dev = ([row["text"] for row in task.rows(split)] for split in ("train", "dev"))
    whole = words.read_text().strip("\n")
    assert train[0] + "\n" + dev[0] == whole or train[0] + " " + dev[0] == whole
    assert abs(len(dev[0]) / len(whole) - 0.3) < 0.02
    assert (train[1:], dev[1:]) == (["a start\na end", "b"], ["start\nb end"])
    assert list(task.texts("dev")) == dev
    assert task.origins["train"]["documents"] == 3


def test_chunks_are_the_text_with_eos_after_each_document(
    words: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("green " * 9 + "cat", encoding="utf-8")
    task = text(str(words), str(other), max_length=64)
    encoder = task.encoder(tiny_tokenizer)
    eos = tiny_tokenizer.eos_token_id
    for split in task.splits():
        rows = task.rows(split, encoder)
        documents = list(task.texts(split))
        stream = [i for document in documents for i in [*tiny_tokenizer(document)["input_ids"], eos]]
        chunks = [stream[i : i + 64] for i in range(0, len(stream), 64)]
        assert [row["ids"].tolist() for row in rows] == [chunk for chunk in chunks if len(chunk) > 1]
        tokens = sum(len(row["ids"]) for row in rows)
        assert task.counts[split] == {"documents": 2, "chunks": len(rows), "tokens": tokens}
    rows = task.rows("train", encoder)
    batch = task.collate([rows[0], rows[-1]], {"student": encoder})
    assert batch["example_id"].tolist() == [0, len(rows) - 1]
    assert batch["length"].tolist() == [64, len(rows[-1]["ids"])]
    assert batch["prompt_length"].tolist() == [1, 1]
    assert torch.equal(target_mask(batch).sum(1), batch["length"] - 1)


def test_chunks_between_marks_are_the_same_stream(
    words: Path, tmp_path: Path, marked_tokenizer: PreTrainedTokenizerFast
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("green " * 9 + "cat", encoding="utf-8")
    task = text(str(words), str(other), max_length=64)
    encoder = task.encoder(marked_tokenizer, "masked_lm")
    cls, sep, pad = (getattr(marked_tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad"))
    plain = task.encoder(marked_tokenizer)
    assert (encoder.longest(100), plain.longest(100)) == (64, 100)
    assert encoder.key != plain.key
    for split in task.splits():
        rows = task.rows(split, encoder)
        stream = [
            i
            for document in task.texts(split)
            for i in [*marked_tokenizer(document, add_special_tokens=False)["input_ids"], sep]
        ]
        cut = [stream[i : i + 62] for i in range(0, len(stream), 62)]
        cut = [ids[:-1] if ids[-1] == sep else ids for ids in cut]
        assert [row["ids"].tolist() for row in rows] == [[cls, *ids, sep] for ids in cut if ids]
        assert task.counts[split]["tokens"] == sum(len(row["ids"]) for row in rows)
    rows = task.rows("train", encoder)
    batch = task.collate([rows[0], rows[-1]], {"student": encoder})
    assert tuple(batch) == MASKED_LM_FIELDS == task.fields_of("masked_lm")
    assert set(task.fields_of("causal_lm")) == set(task.collate(rows[:1], {"student": plain}))
    assert batch["length"].tolist() == [64, len(rows[-1]["ids"])]
    assert batch["cloze_index"].tolist() == [-1, -1]
    assert (batch["input_ids"][1, len(rows[-1]["ids"]) :] == pad).all()


def test_a_bare_encoder_reads_the_same_chunks_as_one_segment(
    words: Path, marked_tokenizer: PreTrainedTokenizerFast
) -> None:
    task = text(str(words), max_length=16)
    both = {head: task.encoder(marked_tokenizer, head) for head in ("masked_lm", "encoder")}
    rows = {head: task.rows("train", one) for head, one in both.items()}
    assert rows["encoder"] is rows["masked_lm"]
    made = {head: task.collate(rows[head][-3:], {"student": one}) for head, one in both.items()}
    assert set(made["encoder"]) == set(ENCODER_FIELDS) == set(task.fields_of("encoder"))
    for name in MASKED_LM_FIELDS:
        assert torch.equal(made["encoder"][name], made["masked_lm"][name]), name
    assert made["encoder"]["segment_ids"].shape == made["encoder"]["input_ids"].shape
    assert not made["encoder"]["segment_ids"].any()


@pytest.mark.parametrize("head", ["masked_lm", "encoder"])
def test_a_tokenizer_without_marks_is_refused(
    words: Path, tiny_tokenizer: PreTrainedTokenizerFast, head: str
) -> None:
    with pytest.raises(UserError, match="it has no cls token; set cls_token in its tokenizer_config.json"):
        text(str(words)).encoder(tiny_tokenizer, head)


@pytest.mark.parametrize("head", ["causal_lm", "masked_lm"])
def test_a_sentence_is_a_chunk_of_its_own(
    head: str, tmp_path: Path, marked_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "lines.txt").write_text("one two\n\nred\nblue green\n \nthree " + "cat " * 9 + "dog ." * 30)
    (tmp_path / "plain.txt").write_text("red blue\ngreen\n" + "dog " * 30)
    task = text(str(tmp_path / "lines.txt"), str(tmp_path / "plain.txt"), max_length=7, sentences=True)
    rows = task.rows("train", task.encoder(marked_tokenizer, head))
    eos = marked_tokenizer.sep_token_id if head == "masked_lm" else marked_tokenizer.eos_token_id
    found = [marked_tokenizer.convert_ids_to_tokens(row["ids"].tolist()) for row in rows]
    first = [["one", "two"], ["red", "blue", "green"]]
    end = marked_tokenizer.convert_ids_to_tokens(eos)
    start = ["[CLS]"] if head == "masked_lm" else []
    assert found[:2] == [[*start, *ids, end] for ids in first]
    room = 5 if head == "masked_lm" else 7
    long = ["three", *["cat"] * 9][:room]  # goes on in the next chunk
    assert found[2] == [*start, *long, *([end] if head == "masked_lm" else [])]
    short = [ids for ids in found if ids[-1] == end and ids[len(start)] in ("red", "green")]
    assert [*start, "red", "blue", end] in short
    assert [*start, "green", end] in short, "lines, where no line is blank"
    assert max(map(len, found)) == 7


def test_classified_sentences_as_text_without_their_labels(tmp_path: Path) -> None:
    folder = tmp_path / "classify"
    for name, row in (
        ("sst2", {"text": "red cat .", "label": "negative"}),
        ("mnli", {"text_a": "A dog .", "text_b": "A cat .", "label": "neutral"}),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text("\n".join([json.dumps(row)] * 40), encoding="utf-8")
    (folder / "sst2/dev.jsonl").write_text(json.dumps({"text": "unseen", "label": "negative"}))
    task = text(classify=["sst2", "mnli"], root=tmp_path, dev_share=0.1)
    assert set(task.texts("train")) == {"red cat .", "A dog . A cat ."}
    assert set(task.texts("dev")) == {"red cat .", "A dog . A cat ."}
    assert len([*task.texts("train"), *task.texts("dev")]) == 80
    assert task.origins["train"]["corpora"] == ["sst2", "mnli"]
    assert next(text(classify=[str(folder / "sst2/dev.jsonl")]).texts("dev")) == "unseen"


def test_documents_of_a_named_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "text/inaugural"
    folder.mkdir(parents=True)
    (folder / "all.txt").write_text(
        "First speech.\n\nIts end.\n\n\nSecond speech of all.\n", encoding="utf-8"
    )
    task = text("inaugural", root=tmp_path, dev_share=0.001)
    assert [row["text"] for row in task.rows("train")] == ["First speech.\n\nIts end.", "Second speech of"]
    assert [row["text"] for row in task.rows("dev")] == ["all."]


def test_instructions_as_text(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "input": "", "output": [f"{i}", "?"]} for i in range(50)]
    path = tmp_path / "instruct/t0/train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = text(instruct=["t0"], root=tmp_path, dev_share=0.1)
    assert next(task.texts("train")) == template(rows[0]) + "0"
    assert list(task.texts("dev"))[-1] == template(rows[-1]) + "49"
    assert next(text(instruct=[str(path)]).texts("train")) == template(rows[0]) + "0"


def test_revision_follows_content_and_settings(words: Path) -> None:
    first = text(str(words)).revision
    assert text(str(words)).revision == first
    assert text(str(words), max_length=64).revision != first
    assert text(str(words), limit=500).revision != first
    assert text(str(words), sentences=True).revision != first
    assert text(str(words), whole_words=["great"]).revision != first
    assert text(str(words), whole_words=["great"]).whole_words == ["great"]
    assert text(str(words), sentences=False, whole_words=[], classify=[]).revision == first
    words.write_text(words.read_text() + "more", encoding="utf-8")
    assert text(str(words)).revision != first


@pytest.mark.parametrize(
    ("corpora", "more", "message"),
    [
        (["gutenburg"], {}, "no text corpus 'gutenburg'. Did you mean 'gutenberg'?"),
        (["grimm"], {}, "'grimm' needs a data folder: pass --data-root"),
        (["grimm"], {"root": "nowhere"}, "nowhere: there is no such folder"),
        (["grimm"], {"root": "."}, "'grimm': .* lacks text/grimm/tales.txt; its source is https"),
        ([], {"instruct": ["unni"]}, "'unni' has no local train split"),
        ([], {}, "no data: name a corpus"),
        ([], {"classify": ["sst3"]}, "no data set 'sst3'. Did you mean 'sst2'?"),
        ([], {"classify": ["sst2"]}, "'sst2' needs a data folder"),
        (["grimm"], {"whole_words": ["very good"]}, "whole_words: 'very good' is not one word"),
        (["grimm"], {"dev_share": 1.0}, "dev_share must lie between 0 and 1"),
        (["grimm"], {"max_length": 1}, "max_length must be at least 2"),
    ],
)
def test_refused_at_once(tmp_path: Path, corpora: list[str], more: dict[str, Any], message: str) -> None:
    if "root" in more:
        more = {**more, "root": tmp_path / more["root"]}
    with pytest.raises(UserError, match=message):
        text(*corpora, **more)


def test_empty_and_tiny_files(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" \n", encoding="utf-8")
    with pytest.raises(UserError, match="a.txt: is empty"):
        text(str(path)).rows("train")
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="holds no .txt"):
        text(str(tmp_path / "b"))
    path.write_text("word", encoding="utf-8")
    task = text(str(path))
    with pytest.raises(UserError, match="split 'train' is empty"):
        task.rows("train", task.encoder(tiny_tokenizer))


@pytest.mark.skipif(not REAL, reason="KDBENCH_DATA_ROOT is not set: no real data")
def test_real_corpora() -> None:
    task = text("brown", "inaugural", "grimm", "gutenberg", root=Path(REAL or ""))
    train, dev = task.rows("train"), task.rows("dev")
    count = {name: sum(row["corpus"] == name for row in [*train, *dev]) for name in ("brown", "inaugural")}
    assert count["brown"] in (500, 501), "a document can be cut in two"
    assert count["inaugural"] in (59, 60)
    share = sum(len(row["text"]) for row in dev) / sum(len(row["text"]) for row in [*train, *dev])
    assert abs(share - 0.01) < 0.001
    assert {row["corpus"] for row in dev} == {"brown", "inaugural", "grimm", "gutenberg"}


def test_sentences_of_test_sets_are_not_pretrained_on(data_root: Path) -> None:
    """Sentences of SST-2's and MR's tests stand in the train part of the other set."""
    task = Text(Text.Settings(corpora=[], classify=["sst2", "mr"]), data_root)
    letters = lambda text: "".join(c for c in text.lower() if c.isalnum())
    held = set()
    for name in ("sst2/dev", "mr/test"):
        path = data_root / "classify" / f"{name}.jsonl"
        held |= {letters(json.loads(line)["text"]) for line in path.read_text().splitlines()}
    assert len(held) > 2000
    texts = [row["text"] for split in ("train", "dev") for row in task.rows(split)]
    assert len(texts) > 10_000
    assert not [text for text in texts if letters(text) in held]
