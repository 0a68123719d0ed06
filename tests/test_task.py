"""The base of instruction tasks: template, tokenisation, truncation, batches and generated responses."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from kdbench.config import DecodeConfig
from kdbench.distiller import target_mask, target_tokens
from kdbench.errors import UserError
from kdbench.task import Encoder, InstructionTask, Row, spread, template, tokenizer_hash

WITHOUT = (
    b"Below is an instruction that describes a task. "
    b"Write a response that appropriately completes the request."
    b"\n\n### Instruction:\nName a cat.\n\n### Response:\n"
)
WITH = (
    b"Below is an instruction that describes a task, paired with an input that provides further context. "
    b"Write a response that appropriately completes the request."
    b"\n\n### Instruction:\nName a cat.\n\n### Input:\nred {x}\n\n### Response:\n"
)


class Toy(InstructionTask):
    """Rows given by the test."""

    name = "toy"
    data: dict[str, list[Row]]

    def splits(self) -> list[str]:
        return list(self.data)

    def load(self, split: str) -> list[Row]:
        return [dict(row) for row in self.data[split]]


@dataclass
class Limits:
    """Settings of Toy."""

    max_prompt: int = 256
    max_length: int = 512


def row(output: Any = "Tom", instruction: str = "Name a cat.", given: str = "") -> Row:
    return {"instruction": instruction, "input": given, "output": output}


def toy(limits: Limits | None = None, **data: list[Row]) -> Toy:
    task = Toy(limits or Limits())
    task.data = {name.replace("__", "/"): rows for name, rows in data.items()}
    return task


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with double newlines as one token, as GPT-2's; pad is EOS."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(["a\n\nb\n\n\nc" * 5, template(row())] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def test_template_is_byte_exact() -> None:
    assert template(row()).encode() == WITHOUT
    assert template({"instruction": "Name a cat.", "output": "Tom"}).encode() == WITHOUT
    assert template(row(given="red {x}")).encode() == WITH
    assert template({**row(), "prefix": "Q: a\n\n"}).encode() == b"Q: a\n\n" + WITHOUT


def test_response_follows_its_prompt_and_ends_in_eos(bpe: PreTrainedTokenizerFast) -> None:
    [item] = Encoder(bpe).encode([("a b", " c d")])
    assert [*item.prompt, *item.response] == [*bpe("a b c d")["input_ids"], bpe.eos_token_id]
    assert not item.apart
    assert not item.response_cut
    assert item.prompt_tokens == len(item.prompt)


def test_response_that_merges_with_its_prompt_is_encoded_apart(bpe: PreTrainedTokenizerFast) -> None:
    prompt, response = "b\n", "\n\nc"
    assert bpe(prompt + response)["input_ids"][: len(bpe(prompt)["input_ids"])] != bpe(prompt)["input_ids"]
    [item] = Encoder(bpe).encode([(prompt, response)])
    assert item.apart
    assert item.prompt.tolist() == bpe(prompt)["input_ids"]
    assert item.response.tolist() == [*bpe(response)["input_ids"], bpe.eos_token_id]
    assert bpe.decode([*item.prompt, *item.response[:-1]]) == prompt + response


def test_head_is_kept_and_eos_lost_when_cut(bpe: PreTrainedTokenizerFast) -> None:
    text = "abcdefgh" * 20
    [item] = Encoder(bpe, 10, 30).encode([(text, text)])
    ids = bpe(text)["input_ids"]
    assert item.prompt.tolist() == ids[:10]
    assert item.prompt_tokens == len(ids)
    assert item.response.tolist() == bpe(text + text)["input_ids"][len(ids) :][:20]
    assert item.response_cut
    [short] = Encoder(bpe, 10, 30).encode([("abc", "def")])
    assert short.response[-1] == bpe.eos_token_id
    [exact] = Encoder(bpe, 3, len(short.prompt) + len(short.response)).encode([("abc", "def")])
    assert not exact.response_cut
    [less] = Encoder(bpe, 3, len(short.prompt) + len(short.response) - 1).encode([("abc", "def")])
    assert less.response_cut


def test_encoder_refuses_what_it_cannot_use(bpe: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="max_prompt = 512 must lie between 0 and max_length = 512"):
        Encoder(bpe, 512, 512)
    endless = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token"):
        Encoder(endless)
    assert tokenizer_hash(endless) != tokenizer_hash(bpe)


def test_long_prompts_are_dropped_in_train_and_dev_and_cut_in_test(bpe: PreTrainedTokenizerFast) -> None:
    rows = [row(), row(instruction="long " * 40), row("\n\nTom")]
    fits = len(bpe(template(row()))["input_ids"])
    task = toy(Limits(fits, fits + 8), train=rows, dev=rows, test__a=rows)
    encoder = task.encoder(bpe)
    for split in ("train", "dev"):
        kept = task.rows(split, encoder)
        assert [one["example_id"] for one in kept] == [0, 2]
        assert task.counts[split] == {
            "records": 3,
            "long_prompts_dropped": 1,
            "long_prompts_cut": 0,
            "responses_cut": 0,
            "responses_apart": 1,
        }
    assert [one["example_id"] for one in task.rows("test/a", encoder)] == [0, 1, 2]
    assert task.counts["test/a"]["long_prompts_cut"] == 1
    batch = task.collate(task.rows("test/a"), {"student": encoder})
    assert batch["prompt_length"].tolist() == [fits, fits, fits]
    assert len(task.rows("train")) == 3
    with pytest.raises(UserError, match="all prompts of 'train' are over max_prompt = 3"):
        toy(Limits(3, 9), train=rows).rows("train", Encoder(bpe, 3, 9))


def test_padding_with_eos_hides_no_target(bpe: PreTrainedTokenizerFast) -> None:
    task = toy(train=[row("Tom"), row(["a much longer answer", "other"])])
    encoder = task.encoder(bpe)
    batch = task.collate(task.rows("train", encoder), {"student": encoder})
    assert bpe.pad_token_id == bpe.eos_token_id
    assert batch["length"][0] < batch["length"][1] == batch["input_ids"].shape[1]
    assert (batch["input_ids"][0, batch["length"][0] :] == bpe.eos_token_id).all()
    counts = target_mask(batch).sum(1)
    assert torch.equal(counts, batch["length"] - batch["prompt_length"])
    tokens = target_tokens(batch)
    assert tokens[counts[0] - 1] == tokens[-1] == bpe.eos_token_id
    assert bpe.decode(tokens[counts[0] : -1]) == "a much longer answer"


def test_changed_and_foreign_rows_are_encoded_anew(bpe: PreTrainedTokenizerFast) -> None:
    task = toy(train=[row("Tom"), row("Kit")])
    encoder = task.encoder(bpe)
    rows = task.rows("train", encoder)
    changed = [{**rows[0], "output": "Moggy"}, rows[1], {"example_id": 7, **row("Puss")}]
    items = task.encoded(changed, encoder)
    assert [encoder.decode(item.response.tolist()) for item in items] == ["Moggy", "Kit", "Puss"]
    assert task.collate(changed, {"student": encoder})["example_id"].tolist() == [0, 1, 7]


def test_splits_that_do_not_exist_or_are_empty(bpe: PreTrainedTokenizerFast) -> None:
    task = toy(train=[row()], dev=[])
    with pytest.raises(UserError, match="no split 'tests'. Known: train, dev"):
        task.rows("tests")
    with pytest.raises(UserError, match="split 'dev' is empty"):
        task.rows("dev")


def test_revision_follows_content_and_limits() -> None:
    first = toy(train=[row("Tom")])
    assert first.revision == toy(train=[row("Tom")]).revision
    others = [toy(train=[row("Tim")]), toy(Limits(100), train=[row("Tom")]), toy(dev=[row("Tom")])]
    assert len({first.revision, *(task.revision for task in others)}) == 4
    first.origins["train"] = {"sha256": "abc"}
    assert first.revision != toy(train=[row("Tom")]).revision


def test_texts_are_prompt_and_first_reference() -> None:
    assert list(toy(train=[row(["Tom", "Kit"])]).texts("train")) == [WITHOUT.decode() + "Tom"]


def test_spread() -> None:
    assert spread([0, 1, 2, 3, 4, 5], 3) == [0, 2, 4]
    assert spread([0, 1], 3) == spread([0, 1], None) == spread([0, 1], 0) == [0, 1]


@pytest.fixture
def model(tiny_student: Callable[..., GPT2LMHeadModel], bpe: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    return tiny_student(vocabulary=len(bpe))


def test_outputs(bpe: PreTrainedTokenizerFast, model: GPT2LMHeadModel, tmp_path: Path) -> None:
    rows = [row(["Tom", "Kit"], "cat " * n) for n in (1, 3, 2, 9)]
    task = toy(Limits(20, 40), test__a=rows)
    encoder = task.encoder(bpe)
    decode = DecodeConfig(max_new_tokens=6)
    made = task.outputs(model, "test/a", encoder, decode, [10, 20], 2)
    assert [(one["seed"], one["example_id"]) for one in made] == [(s, i) for s in (10, 20) for i in range(4)]
    for one in made:
        assert one["set"] == "a"
        assert one["references"] == ["Tom", "Kit"]
        assert one["finished"] or one["tokens"] == 6
        assert 1 <= one["tokens"] <= 6
        assert bpe.eos_token not in one["response"]
        assert len(bpe(one["prompt"])["input_ids"]) <= 20
    assert [one["response"] for one in made[:4]] != [one["response"] for one in made[4:]]
    # neither the batch nor the order nor the other examples matter
    assert task.outputs(model, "test/a", encoder, decode, [10, 20], 3) == made
    assert task.outputs(model, "test/a", encoder, decode, [20], 1, limit=2) == [made[4], made[6]]


def test_outputs_of_another_set_are_drawn_anew(bpe: PreTrainedTokenizerFast, model: GPT2LMHeadModel) -> None:
    task = toy(Limits(40, 60), test__a=[row()], test__b=[row()])
    encoder = task.encoder(bpe)
    decode = DecodeConfig(max_new_tokens=8)
    a, b = (task.outputs(model, split, encoder, decode, [10], 1)[0] for split in ("test/a", "test/b"))
    assert (a["set"], b["set"]) == ("a", "b")
    assert a["prompt"] == b["prompt"]
    assert a["response"] != b["response"]
