"""Few-shot tasks on generated data: templates, encoders, label words, draws, batches, predictions."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
)

from kdbench.classify import class_logits
from kdbench.errors import UserError
from kdbench.few_shot import LM_BFF, PET, ClassEncoder, FewShotTask, Template, draw, prompt_of
from kdbench.task import Row

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    "a an the man runs moves good bad film film2 who wins it was terrible great description entity "
    "expression human location number yes no maybe right wrong true false question answer or all in just "
    "summary restaurant is one two three four five six seven"
).split()
CAPITALS = (
    "The Description Entity Expression Human Location Number Yes No Maybe Right Wrong True It All Just In"
).split()
PIECES = list("?.,:!\"'[]<>")
# what the byte-level tokenizer knows whole, within a text
WHOLE = [*(word for word in WORDS if word.isalpha()), *CAPITALS]
AT_START = "a the The man good who It Just one".split()  # and at the beginning of a text


def bert() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of BERT's format, uncased."""
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS, *PIECES])}, unk_token="[UNK]")
    )
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, name_or_path="tiny-bert", pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def roberta(whole: Sequence[str] = WHOLE) -> Any:
    """A byte-level BPE tokenizer of RoBERTa's format that knows some words whole, cased."""
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in [*(f"Ġ{w}" for w in [*whole, '"']), *AT_START]:
        for i in range(1, len(word)):
            if (word[:i], word[i]) not in merges:
                merges.append((word[:i], word[i]))
                vocabulary.append(word[: i + 1])
    ids = {token: i for i, token in enumerate(dict.fromkeys([*vocabulary, "<mask>"]))}
    made = RobertaTokenizer(vocab=ids, merges=merges, name_or_path="tiny-roberta")
    assert all(len(made(f" {w}", add_special_tokens=False)["input_ids"]) == 1 for w in whole)
    return made


def encoder(
    tokenizer: Any,
    template: str,
    words: Any = None,
    head: str = "masked_lm",
    length: int = 64,
    cap: Any = None,
) -> ClassEncoder:
    return ClassEncoder(
        tokenizer, head, Template(template), words or {"n": "terrible", "p": "great"}, length, cap
    )


def shown(made: ClassEncoder, row: Row) -> str:
    """The tokens of one encoded row, parted by spaces."""
    return " ".join(made.tokenizer.convert_ids_to_tokens(made.encode([row])[0].ids.tolist()))


ONE = {"text": "good film"}
TWO = {"text_a": "a man runs.", "text_b": "The man moves."}

# ------------------------------------------------------------------------------------------- templates

GOLDEN = [
    ("sst2", "lm-bff", "[CLS] good film it was [MASK] . [SEP]", "<s> good Ġfilm ĠIt Ġwas <mask> . </s>"),
    ("mr", "lm-bff", "[CLS] good film it was [MASK] . [SEP]", "<s> good Ġfilm ĠIt Ġwas <mask> . </s>"),
    ("mpqa", "lm-bff", "[CLS] good film it was [MASK] . [SEP]", "<s> good Ġfilm ĠIt Ġwas <mask> . </s>"),
    ("trec", "lm-bff", "[CLS] [MASK] : good film [SEP]", "<s> <mask> : Ġgood Ġfilm </s>"),
    *(
        (
            name,
            "lm-bff",
            "[CLS] a man runs ? [MASK] , the man moves . [SEP]",
            "<s> a Ġman Ġruns ? <mask> , Ġthe Ġman Ġmoves . </s>",
        )
        for name in ("mnli", "snli", "rte")
    ),
    *(
        (
            name,
            f"pet-{i}",
            '[CLS] " a man runs " ? [SEP] [MASK] , " the man moves . " [SEP]',
            '<s> " a Ġman Ġruns " ? </s> </s> <mask> , Ġ" The Ġman Ġmoves . " </s>',
        )
        for name in ("mnli", "snli")
        for i in (0, 2)
    ),
    *(
        (
            name,
            f"pet-{i}",
            "[CLS] a man runs ? [SEP] [MASK] , the man moves . [SEP]",
            "<s> a Ġman Ġruns ? </s> </s> <mask> , ĠThe Ġman Ġmoves . </s>",
        )
        for name in ("mnli", "snli")
        for i in (1, 3)
    ),
    (
        "rte",
        "pet-0",
        '[CLS] " the man moves " ? [SEP] [MASK] , " a man runs . " [SEP]',
        '<s> " The Ġman Ġmoves " ? </s> </s> <mask> , Ġ" a Ġman Ġruns . " </s>',
    ),
    (
        "rte",
        "pet-1",
        "[CLS] the man moves ? [SEP] [MASK] , a man runs . [SEP]",
        "<s> The Ġman Ġmoves ? </s> </s> <mask> , Ġa Ġman Ġruns . </s>",
    ),
    (
        "rte",
        "pet-2",
        '[CLS] " the man moves " ? [SEP] [MASK] . " a man runs . " [SEP]',
        '<s> " The Ġman Ġmoves " ? </s> </s> <mask> . Ġ" a Ġman Ġruns . " </s>',
    ),
    (
        "rte",
        "pet-3",
        "[CLS] the man moves ? [SEP] [MASK] . a man runs . [SEP]",
        "<s> The Ġman Ġmoves ? </s> </s> <mask> . Ġa Ġman Ġruns . </s>",
    ),
    (
        "rte",
        "pet-4",
        "[CLS] a man runs . question : the man moves . true or false ? answer : [MASK] [SEP]",
        "<s> a Ġman Ġruns . Ġquestion : ĠThe Ġman Ġmoves . ĠTrue Ġor ĠFalse ? Ġanswer : <mask> </s>",
    ),
    *(
        row
        for name in ("sst2", "mr")
        for row in (
            (name, "pet-0", "[CLS] it was [MASK] . good film [SEP]", "<s> It Ġwas <mask> . Ġgood Ġfilm </s>"),
            (
                name,
                "pet-1",
                "[CLS] good film . all in all , it was [MASK] . [SEP]",
                "<s> good Ġfilm . ĠAll Ġin Ġall , Ġit Ġwas <mask> . </s>",
            ),
            (
                name,
                "pet-2",
                "[CLS] just [MASK] ! [SEP] good film [SEP]",
                "<s> Just <mask> ! </s> </s> good Ġfilm </s>",
            ),
            (
                name,
                "pet-3",
                "[CLS] good film [SEP] in summary , the restaurant is [MASK] . [SEP]",
                "<s> good Ġfilm </s> </s> In Ġsummary , Ġthe Ġrestaurant Ġis <mask> . </s>",
            ),
        )
    ),
]


@pytest.mark.parametrize(("dataset", "prompt_set", "words", "pieces"), GOLDEN)
def test_every_template_encodes_as_worked_out_by_hand(
    dataset: str, prompt_set: str, words: str, pieces: str
) -> None:
    one = prompt_of(dataset, prompt_set)
    row = TWO if dataset in ("mnli", "snli", "rte") else ONE
    for tokenizer, expected in ((bert(), words), (roberta([*WHOLE, "False"]), pieces)):
        made = encoder(tokenizer, one.template, one.words, length=one.max_length, cap=one.cap)
        if "In Ġsummary" in expected:  # no token of its own at the beginning of a segment
            expected = expected.replace("In Ġsummary", "I n Ġsummary")
        assert shown(made, row) == expected
        [item] = made.encode([row])
        assert item.ids[item.mask] == tokenizer.mask_token_id
        assert not item.truncated


def test_every_prompt_is_golden() -> None:
    known = [(name, "lm-bff") for name in LM_BFF] + [
        (name, f"pet-{i}") for name, patterns in PET.items() for i in range(len(patterns))
    ]
    assert sorted(known) == sorted(row[:2] for row in GOLDEN)


@pytest.mark.parametrize(
    ("dataset", "prompt_set", "classes", "words"),
    [
        ("sst2", "lm-bff", "negative positive", "terrible great"),
        ("mr", "lm-bff", "negative positive", "terrible great"),
        ("mpqa", "lm-bff", "negative positive", "terrible great"),
        (
            "trec",
            "lm-bff",
            "description entity abbreviation human location number",
            "Description Entity Expression Human Location Number",
        ),
        ("mnli", "lm-bff", "contradiction entailment neutral", "No Yes Maybe"),
        ("snli", "lm-bff", "contradiction entailment neutral", "No Yes Maybe"),
        ("rte", "lm-bff", "entailment not_entailment", "Yes No"),
        ("mnli", "pet-1", "contradiction entailment neutral", "Wrong Right Maybe"),
        ("snli", "pet-3", "contradiction entailment neutral", "No Yes Maybe"),
        ("rte", "pet-2", "entailment not_entailment", "Yes No"),
        ("rte", "pet-4", "entailment not_entailment", "true false"),
        ("mr", "pet-3", "negative positive", "bad good"),
    ],
)
def test_classes_and_label_words(dataset: str, prompt_set: str, classes: str, words: str) -> None:
    one = prompt_of(dataset, prompt_set)
    assert (list(one.words), list(one.words.values())) == (classes.split(), words.split())


def test_limits_of_the_papers() -> None:
    limits = {name: (one.max_length, one.cap) for name, one in LM_BFF.items()}
    assert limits == {
        "sst2": (128, None), "mr": (128, 110), "mpqa": (128, 110), "trec": (128, 110),
        "mnli": (256, 240), "snli": (256, 240), "rte": (256, 240),
    }  # fmt: skip


def test_forms_of_a_sentence() -> None:
    made = Template("{a-} {b^} {mask}")
    assert made.fill({"text_a": "Ends here?!", "text_b": "Upper Case"}, "yes") == "Ends here? upper Case yes"
    assert Template("{a.}; {mask}").fill({"text": "Ends here?!"}, "yes") == "Ends here; yes"
    assert Template("{mask} | {a}").fill({"text": "Just"}, "One") == "One Just"
    assert Template("{a-}{mask}").fill({"text": "x"}, "yes") == "yes"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a} It was", r"must have one \{mask\}, has 0"),
        ("{mask} {a} {mask}", r"must have one \{mask\}, has 2"),
        ("It was {mask}", r"must have the sentence \{a\}"),
        ("{a} {a-} {mask}", r"must have \{a\} once, has it 2 times"),
        ("{a} {masc}", r"no place '\{masc\}'. Known: \{mask\}, \{a\}, \{a-\}, \{a.\}, \{a\^\}, \{b\}"),
        ("{a} | {b} | {mask}", "two segments at most, has 3"),
    ],
)
def test_what_is_no_template(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Template(template)


@pytest.mark.parametrize(
    ("dataset", "prompt_set", "message"),
    [
        ("sts2", "lm-bff", "no prompt for the data set 'sts2'. Did you mean 'sst2'?"),
        ("sst2", "lmbff", "prompt_set = 'lmbff' must be lm-bff or pet-<i>"),
        ("sst2", "pet-x", "prompt_set = 'pet-x' must be lm-bff or pet-<i>"),
        ("sst2", "pet-4", "PET has no pattern 4 for 'sst2'; it has 0 to 3"),
        ("trec", "pet-0", "PET has no pattern for 'trec'; it has some for: mnli, snli, rte, sst2, mr"),
        ("mpqa", "pet-0", "PET has no pattern for 'mpqa'"),
    ],
)
def test_what_is_no_prompt(dataset: str, prompt_set: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prompt_of(dataset, prompt_set)


# ------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("tokenizer", [bert(), roberta()])
@pytest.mark.parametrize("dataset", list(LM_BFF))
@pytest.mark.parametrize("words", [(600, 4), (4, 600), (600, 600), (300, 5)])
def test_a_long_sentence_leaves_one_mask_and_the_template(
    tokenizer: Any, dataset: str, words: tuple[int, int]
) -> None:
    one = prompt_of(dataset)
    a, b = ("one two " * (n // 2) for n in words)
    row = {"text_a": f"{a}.", "text_b": b} if dataset in ("mnli", "snli", "rte") else {"text": a}
    made = encoder(tokenizer, one.template, one.words, length=one.max_length, cap=one.cap)
    [item] = made.encode([row])
    ids = item.ids.tolist()
    assert len(ids) <= one.max_length
    assert ids.count(tokenizer.mask_token_id) == 1
    assert ids[item.mask] == tokenizer.mask_token_id
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert item.truncated == (len(ids) == one.max_length or words[0] > 200)
    for literal in one.template.translate(str.maketrans("", "", "{}^-")).replace("mask", "").split():
        if literal not in ("a", "b"):
            assert made.decode(ids).lower().replace(" ", "").count(literal.lower()[-1]) >= 1


def test_cap_first_then_tail() -> None:
    row = {"text_a": "one two three four five six.", "text_b": "one two three four five six seven"}
    made = encoder(bert(), "{a-}? {mask}, {b}", length=14, cap=3)
    assert shown(made, row) == "[CLS] one two three ? [MASK] , one two three four five six [SEP]"
    made = encoder(bert(), "{a-}? {mask}, {b}", length=12, cap=3)
    assert shown(made, row) == "[CLS] one two three ? [MASK] , one two three four [SEP]"
    made = encoder(bert(), "{a-}? {mask}, {b}", length=8, cap=None)
    assert shown(made, row) == "[CLS] one two three ? [MASK] , [SEP]"
    assert made.encode([row])[0].mask == 5
    exact = encoder(bert(), "{a-}? {mask}, {b}", length=18, cap=6)
    assert not exact.encode([row])[0].truncated
    assert encoder(bert(), "{a-}? {mask}, {b}", length=17, cap=6).encode([row])[0].truncated


def test_trec_has_its_mask_right_after_cls() -> None:
    one = prompt_of("trec")
    for tokenizer in (bert(), roberta()):
        assert encoder(tokenizer, one.template, one.words).encode([ONE])[0].mask == 1


@pytest.mark.parametrize(("tokenizer", "name"), [(bert(), "[MASK]"), (roberta(), "<mask>")])
def test_a_special_token_in_a_text_is_plain_text(tokenizer: Any, name: str) -> None:
    made = encoder(tokenizer, "{a} It was {mask}.")
    end = tokenizer.sep_token
    [item] = made.encode([{"text": f"one {name} two {end}"}])
    ids = item.ids.tolist()
    assert ids.count(tokenizer.mask_token_id) == ids.count(tokenizer.sep_token_id) == 1
    assert ids.index(tokenizer.mask_token_id) == item.mask


def test_a_whole_text_is_not_cut_and_is_shown_again() -> None:
    assert (
        encoder(bert(), "{a} It was {mask}.").decode([2, 12, 13, 18, 4, 1, 3, 0])
        == "bad film was [MASK] [UNK]"
    )
    made = encoder(roberta(), "{a.}? | {mask}, {b}")
    assert made.decode(made.encode([TWO])[0].ids.tolist()) == "a man runs? | <mask>, The man moves."
    assert (made.eos, made.longest(5), made.max_prompt) == (2, 64, 64)


# ------------------------------------------------------------------------------------------- label words


def test_label_words_are_looked_up_as_words_in_a_text() -> None:
    words = {"no": "No", "yes": "Yes", "great": "great"}
    uncased, cased = bert(), roberta()
    assert uncased.convert_ids_to_tokens(encoder(uncased, "{a} {mask}", words).verbalizer_ids) == [
        "no", "yes", "great"
    ]  # fmt: skip
    assert cased.convert_ids_to_tokens(encoder(cased, "{mask} {a}", words).verbalizer_ids) == [
        "ĠNo", "ĠYes", "Ġgreat"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tokenizer", "words", "message"),
    [
        (bert(), {"x": "great", "y": "awful"}, "'awful' of class 'y': tokenizer tiny-bert does not know it"),
        (
            roberta(),
            {"x": "great", "y": "Great"},
            "label word 'Great' of class 'y': tokenizer tiny-roberta makes 6 tokens of it, .* be one",
        ),
        (bert(), {"x": "great film"}, "tokenizer tiny-bert makes 2 tokens of it, .*'great', 'film'"),
        (bert(), {"x": "Yes", "y": "yes"}, "'yes' of class 'y': tokenizer tiny-bert has the same .* 'x'"),
        (bert(), {"x": ""}, "makes 0 tokens of it"),
        (bert(), {"x": "great "}, "reads it back as 'great'"),
    ],
)  # fmt: skip
def test_label_words_that_are_refused(tokenizer: Any, words: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder(tokenizer, "{a} {mask}", words)


def test_special_tokens_are_no_label_words() -> None:
    tokenizer = bert()
    tokenizer.add_special_tokens({"additional_special_tokens": ["great"]})
    with pytest.raises(UserError, match="'great' of class 'p': tokenizer tiny-bert does not know it"):
        encoder(tokenizer, "{a} {mask}")


@pytest.mark.parametrize(
    ("token", "head"), [("cls", "masked_lm"), ("sep", "sequence"), ("mask", "masked_lm")]
)
def test_tokenizers_without_special_tokens_are_refused(token: str, head: str) -> None:
    tokenizer = bert()
    setattr(tokenizer, f"{token}_token", None)
    with pytest.raises(UserError, match=f"tokenizer tiny-bert: it has no {token} token"):
        encoder(tokenizer, "{a} {mask}", head=head)
    if token == "mask":
        encoder(tokenizer, "{a} {mask}", head="sequence")


def test_a_limit_without_room_and_a_pair_template_for_single_sentences_are_refused() -> None:
    encoder(bert(), "{a} It was {mask}.", length=7)
    with pytest.raises(UserError, match="max_length = 6 leaves no room beside 6 tokens of the prompt"):
        encoder(bert(), "{a} It was {mask}.", length=6)
    with pytest.raises(UserError, match="it has {b}, but the data has one sentence per row"):
        encoder(bert(), "{a} {mask} {b}").encode([ONE])


def test_key_tells_encoders_apart() -> None:
    keys = [
        encoder(*arguments, **named).key  # type: ignore[arg-type]
        for arguments, named in [
            ((bert(), "{a} {mask}"), {}),
            ((roberta(), "{a} {mask}"), {}),
            ((bert(), "{a}: {mask}"), {}),
            ((bert(), "{a} {mask}", {"n": "bad", "p": "good"}), {}),
            ((bert(), "{a} {mask}"), {"head": "sequence"}),
            ((bert(), "{a} {mask}"), {"length": 32}),
            ((bert(), "{a} {mask}"), {"cap": 8}),
        ]
    ]
    assert len(set(keys)) == len(keys)
    assert encoder(bert(), "{a} {mask}").key == keys[0]


# ------------------------------------------------------------------------------------------- sequence head


@pytest.mark.parametrize("tokenizer", [bert(), roberta()])
def test_a_sequence_is_encoded_as_its_tokenizer_does(tokenizer: Any) -> None:
    made = encoder(tokenizer, "{a} {mask} {b}", head="sequence")
    [item] = made.encode([TWO])
    theirs = tokenizer(TWO["text_a"], TWO["text_b"])
    assert item.ids.tolist() == theirs["input_ids"]
    types = tokenizer(TWO["text_a"], TWO["text_b"], return_token_type_ids=True)["token_type_ids"]
    assert item.segments.tolist() == types
    assert max(types) == (tokenizer.cls_token == "[CLS]")
    made = encoder(tokenizer, "{a} {mask}", head="sequence")
    assert made.encode([ONE])[0].ids.tolist() == tokenizer(ONE["text"])["input_ids"]
    assert made.verbalizer_ids == []


def test_words_are_numbered_through_both_sentences() -> None:
    row = {"text_a": "good film2,  xy it", "text_b": "who wins?"}
    made = encoder(bert(), "{a} {mask} {b}", head="sequence")
    assert shown(made, row) == "[CLS] good film2 , [UNK] it [SEP] who wins ? [SEP]"
    assert made.encode([row])[0].words.tolist() == [-1, 0, 1, 1, 2, 3, -1, 4, 5, 5, -1]
    other = encoder(roberta(), "{a} {mask} {b}", head="sequence")
    assert shown(other, row) == "<s> good Ġfilm 2 , Ġ Ġ x y Ġit </s> </s> who Ġwins ? </s>"
    assert other.encode([row])[0].words.tolist() == [-1, 0, 1, 1, 1, 2, 2, 2, 2, 3, -1, -1, 4, 5, 5, -1]
    short = encoder(bert(), "{a} {mask} {b}", head="sequence", length=7, cap=2)
    assert short.encode([row])[0].words.tolist() == [-1, 0, 1, -1, 4, 5, -1]  # numbers do not depend on cuts
    assert short.encode([row])[0].truncated


def test_odd_white_space_and_letters_are_numbered_alike() -> None:
    text = "café\u00a0au  lait\tà\u3000la 映画 ok"
    for tokenizer in (bert(), roberta()):
        [item] = encoder(tokenizer, "{a} {mask}", head="sequence").encode([{"text": text}])
        assert sorted(set(item.words.tolist())) == list(range(-1, len(text.split())))
        assert [n for n in item.words.tolist() if n >= 0] == sorted(n for n in item.words.tolist() if n >= 0)


# ------------------------------------------------------------------------------------------- the task


NEUTRAL = "a the film it was is in all one two three four five six seven".split()


def text(i: int, marked: str) -> str:
    """A text of its own for each number below 3,375."""
    size = len(NEUTRAL)
    words = [(i * step + step) % size for step in range(1, 3 + i % 5)] + [i // size % size, i // size**2]
    return " ".join([*(NEUTRAL[word] for word in words), marked])


class Toy(FewShotTask):
    """Generated rows; the number of each class's rows is a setting."""

    name = "toy"

    @dataclass
    class Settings(FewShotTask.Settings):
        rows: tuple[int, ...] = (60, 120)
        pair: bool = False

    def template(self) -> str:
        return "{a-}? {mask}, {b^}" if self.settings.pair else "{a} It was {mask}."

    def classes(self) -> list[str]:
        return ["bad", "good", "human"][: len(self.settings.rows)]

    def label_words(self) -> list[str]:
        return ["terrible", "great", "Human"][: len(self.settings.rows)]

    def pool(self) -> list[Row]:
        marked = [
            (name, i) for name, n in zip(self.classes(), self.settings.rows, strict=True) for i in range(n)
        ]
        return [self.row(name, i) for name, i in sorted(marked, key=lambda one: (one[1], one[0]))]

    def tests(self) -> dict[str, list[Row]]:
        return {
            name: [self.row(self.classes()[i % len(self.settings.rows)], 1000 + i) for i in range(40)]
            for name in ("toy", "toy-mm")
        }

    def row(self, name: str, i: int) -> Row:
        if self.settings.pair:
            return {"text_a": text(i, name), "text_b": text(i + 1, "The man"), "label": name}
        return {"text": text(i, name), "label": name}


def toy(**settings: Any) -> Toy:
    return Toy(Toy.Settings(**{"dataset": "toy", "k": 8, **settings}))


def ids(task: FewShotTask, split: str, field: str = "example_id") -> list[int]:
    return [row[field] for row in task.rows(split)]


def bert_model(tokenizer: Any, classes: int = 2, cls: Any = BertForMaskedLM) -> Any:
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.5, num_labels=classes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).double().eval()


def roberta_model(tokenizer: Any) -> Any:
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=140, initializer_range=0.3, type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return RobertaForMaskedLM(config).double().eval()


class Decoding:
    """What is not used: nothing is generated."""

    max_new_tokens, temperature, top_k, top_p, no_repeat_ngram = 1, 1.0, 0, 1.0, 0


# ------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("rows", [(60, 120), (40, 90, 33)])
@pytest.mark.parametrize("k", [1, 8, 16])
def test_draws(rows: tuple[int, ...], k: int) -> None:
    sets = []
    for number in range(1, 6):
        task = toy(rows=rows, k=k, draw=number)
        assert task.seed == (13, 21, 42, 87, 100)[number - 1]
        assert task.splits() == ["train", "dev", "unlabeled", "test/toy", "test/toy-mm"]
        train, dev, more = (ids(task, split) for split in ("train", "dev", "unlabeled"))
        sources = ids(task, "unlabeled", "source")
        n = len(rows)
        assert len(train) == len(dev) == len(set(train)) == len(set(dev)) == n * k
        assert not set(train) & set(dev)
        assert not set(sources) & {*train, *dev}
        assert len(more) == len(set(more)) == 10 * n * k
        assert set(more).isdisjoint(range(sum(rows))), "a row of Xu is a row of its own, unlike its source"
        for split in ("train", "dev"):
            assert Counter(row["label"] for row in task.rows(split)) == dict.fromkeys(task.classes(), k)
        pool = task.pool()
        assert all(pool[row["example_id"]]["text"] == row["text"] for row in task.rows("train"))
        assert all(pool[row["source"]]["text"] == row["text"] for row in task.rows("unlabeled"))
        assert all(row["class_label"] == -1 and "label" not in row for row in task.rows("unlabeled"))
        assert not any("short" in name for counts in task.counts.values() for name in counts)
        sets.append(frozenset(train))
    assert len(set(sets)) == 5


def test_xu_repeats_rows_and_keeps_the_natural_share_of_classes() -> None:
    task = toy(rows=(300, 900), k=16, unlabeled_ratio=100)
    sources = ids(task, "unlabeled", "source")
    assert len(sources) == 3200
    assert len(set(sources)) < 1200 - 64
    pool = task.pool()
    share = sum(pool[i]["label"] == "good" for i in sources) / 3200
    assert abs(share - 868 / 1136) < 0.03  # drawn whatever the class: 0.764, not one half
    assert max(Counter(sources).values()) > 1


def test_a_draw_is_fixed_for_all_time_and_every_library_version() -> None:
    labels = [0, 1] * 10
    made = draw(labels, range(len(labels)), 2, 3, 13, "toy", ratio=2)
    assert made["train"] == [16, 6, 14, 15, 9, 5]
    assert made["dev"] == [4, 10, 0, 1, 17, 19]

    def number(*name: Any) -> int:
        text = "\x1f".join(str(part) for part in name)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    order = sorted(range(20), key=lambda i: number(13, "few_shot/toy", i))
    by_class = [[i for i in order if labels[i] == label] for label in (0, 1)]
    assert made["train"] == by_class[0][:3] + by_class[1][:3]
    assert made["dev"] == by_class[0][3:6] + by_class[1][3:6]
    rest = sorted({*range(20)} - {*made["train"], *made["dev"]})
    assert made["unlabeled"] == [rest[number(13, "few_shot/toy/unlabeled", j) % 8] for j in range(12)]


def test_each_draw_has_a_stream_of_its_own() -> None:
    labels = [i % 2 for i in range(100)]
    base = draw(labels, range(len(labels)), 2, 4, 13, "toy")
    assert draw(labels, range(len(labels)), 2, 4, 13, "toy", ratio=3)["train"] == base["train"]
    assert draw(labels, range(len(labels)), 2, 4, 13, "toy", ratio=3)["unlabeled"] == base["unlabeled"][:24]
    assert draw(labels, range(len(labels)), 2, 4, 13, "other")["train"] != base["train"]
    assert draw(labels, range(len(labels)), 2, 4, 14, "toy")["unlabeled"] != base["unlabeled"]
    more = draw(labels, range(len(labels)), 2, 8, 13, "toy")
    assert set(base["train"]) < set(more["train"]), "a larger K adds to a smaller one's X"
    assert toy(draw=13).rows("train") != toy(draw=12).rows("train")
    assert toy(draw=13).seed == 13
    assert toy(draw=13).rows("train") == toy(draw=1).rows("train")


def test_a_repeated_text_is_in_one_of_x_dev_and_xu() -> None:
    texts = [i % 9 for i in range(40)]  # of 40 rows 9 texts, most of them with both labels
    labels = [int(i >= 20) for i in range(40)]
    for seed in range(30):
        made = draw(labels, texts, 2, 2, seed, "toy", ratio=5)
        train, dev, more = ([texts[i] for i in made[split]] for split in ("train", "dev", "unlabeled"))
        assert len({*train, *dev}) == len(train) + len(dev) == 8
        assert [labels[i] for i in made["train"]] == [labels[i] for i in made["dev"]] == [0, 0, 1, 1]
        assert set(more) == {*texts} - {*train, *dev}
        assert len(set(made["unlabeled"])) > 1, "rows that repeat a text stay in Xu"
    with pytest.raises(UserError, match="leaves none for the unlabelled set"):
        draw(labels, [i % 8 for i in range(40)], 2, 2, 13, "toy")
    with pytest.raises(UserError, match="fewer than two training rows of class 1 with texts of their own"):
        draw([0, 0, 0, 1, 1], ["a", "b", "c", "d", "d"], 2, 1, 13, "toy")


def test_a_text_is_the_same_whatever_its_case_and_spaces() -> None:
    class Twice(Toy):
        def pool(self) -> list[Row]:
            rows = super().pool()
            shouted = {name: "  ".join(["", *value.upper().split()]) for name, value in rows[0].items()}
            return [rows[0], {**shouted, "label": rows[0]["label"]}, *rows[1:]]

    for pair in (False, True):
        task = Twice(Twice.Settings(dataset="toy", rows=(2, 2), k=1, pair=pair))
        with pytest.raises(UserError, match="leaves none for the unlabelled set"):
            task.rows("train")
    task = Twice(Twice.Settings(dataset="toy", rows=(3, 3), k=1, pair=True))
    for number in range(1, 6):
        task = Twice(Twice.Settings(dataset="toy", rows=(3, 3), k=1, pair=True, draw=number))
        drawn = {0, 1} & {*ids(task, "train"), *ids(task, "dev")}
        assert not drawn or not {0, 1} & set(ids(task, "unlabeled", "source"))


def test_regenerating_is_byte_identical() -> None:
    first, second = (json.dumps([task.rows(split) for split in task.splits()]) for task in (toy(), toy()))
    assert first == second
    assert toy().revision == toy().revision
    changes: list[dict[str, Any]] = [
        {"draw": 2}, {"k": 7}, {"unlabeled_ratio": 9}, {"label_words": ["bad", "good"]}, {"max_length": 32},
        {"test_limit": 5}, {"pair": True},
    ]  # fmt: skip
    assert len({toy(**change).revision for change in [{}, *changes]}) == 1 + len(changes)


def test_a_rare_class_gives_what_it_has() -> None:
    task = toy(rows=(10, 100, 3), k=8)
    for split, sizes in (("train", (8, 8, 2)), ("dev", (2, 8, 1))):
        rows = Counter(row["label"] for row in task.rows(split))
        assert rows == dict(zip(task.classes(), sizes, strict=True))
    assert task.counts["train"] == {"short/human": 6}
    assert task.counts["dev"] == {"short/bad": 6, "short/human": 7}
    assert not set(ids(task, "train")) & set(ids(task, "dev"))
    assert len(task.rows("unlabeled")) == 10 * len(task.rows("train"))
    task.rows("train", task.encoder(bert()))
    assert task.counts["train"] == {"short/human": 6, "records": 18, "truncated/student": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": (60, 1)}, "data set 'toy' has fewer than two training rows of class 1"),
        (
            {"rows": (16, 16)},
            "k = 8 takes the texts of all 32 training rows of 'toy' and leaves none for the unlabelled set",
        ),
        ({"k": 0}, "task toy: k = 0 must be 1 or more"),
        ({"draw": 0}, "draw = 0 must be 1 or more"),
        ({"unlabeled_ratio": -1}, "unlabeled_ratio = -1 must be 0 or more"),
        ({"label_words": ["good"]}, "label_words has 1 words for 2 classes: bad, good"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy(**settings).rows("train")


def test_without_an_unlabelled_set() -> None:
    task = toy(rows=(16, 16), unlabeled_ratio=0)
    assert task.splits() == ["train", "dev", "test/toy", "test/toy-mm"]
    assert len(task.rows("train")) == 16


def test_a_label_that_is_no_class_is_refused() -> None:
    class Odd(Toy):
        def pool(self) -> list[Row]:
            return [{"text": "x", "label": "baad"}]

    with pytest.raises(UserError, match="task toy: train record 1: no class 'baad'. Did you mean 'bad'?"):
        Odd(Odd.Settings(dataset="toy")).rows("train")


# ------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("head", ["masked_lm", "sequence"])
@pytest.mark.parametrize("pair", [False, True])
def test_a_batch_holds_every_roles_fields(head: str, pair: bool) -> None:
    task = toy(pair=pair)
    tokenizers = {"student": bert(), "teacher": roberta(), "pretrained": roberta()}
    encoders = {role: task.encoder(tokenizer, head) for role, tokenizer in tokenizers.items()}
    rows = task.rows("train")[3:9]
    batch = task.collate(rows, encoders)
    own = [name for name in task.fields_of(head) if name not in ("example_id", "class_label")]
    named = [f"{role}.{name}" for role in ("teacher", "pretrained") for name in own]
    assert list(batch) == ["example_id", "class_label", *own, *named]
    assert batch["class_label"].tolist() == [row["class_label"] for row in rows]
    assert batch["example_id"].tolist() == [row["example_id"] for row in rows]
    assert all(value.dtype == torch.int64 and len(value) == 6 for value in batch.values())
    for role, tokenizer in tokenizers.items():
        part = batch.of(role)
        for i, row in enumerate(rows):
            [item] = encoders[role].encode([row])
            n = int(part["length"][i])
            assert part["input_ids"][i, :n].tolist() == item.ids.tolist()
            if head == "masked_lm":
                assert part["input_ids"][i, part["mask_index"][i]] == tokenizer.mask_token_id
                assert int((part["input_ids"][i] == tokenizer.mask_token_id).sum()) == 1
                assert part["verbalizer_ids"][i].tolist() == encoders[role].verbalizer_ids
            else:
                assert part["word_index"][i, :n].tolist() == item.words.tolist()
                assert set(part["word_index"][i, n:].tolist()) <= {-1}
                assert set(part["segment_ids"][i].tolist()) == ({0, 1} if pair and role == "student" else {0})
        assert part["input_ids"].shape[1] == part["length"].max()
    assert task.collate(task.rows("unlabeled")[:2], encoders)["class_label"].tolist() == [-1, -1]


def test_two_segments_of_a_prompt_are_told_apart() -> None:
    class Parted(Toy):
        def template(self) -> str:
            return "{a}? | {mask}, {b}"

    task = Parted(Parted.Settings(dataset="toy", k=8, pair=True))
    assert task.fields_of("masked_lm")[-1] == "segment_ids"
    batch = task.collate(task.rows("train")[:1], {"student": task.encoder(bert())})
    first = batch["input_ids"][0].tolist().index(3)
    assert batch["segment_ids"][0].tolist() == [0] * (first + 1) + [1] * (int(batch["length"]) - first - 1)
    assert "segment_ids" not in toy().fields_of("masked_lm"), "one segment: all zero"


def test_encodings_are_made_once_per_encoder_and_cuts_are_counted_per_role(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    encode = ClassEncoder.encode
    monkeypatch.setattr(
        ClassEncoder, "encode", lambda self, rows: made.append(len(rows)) or encode(self, rows)
    )
    task = toy(max_length=12)
    encoders = {
        "student": task.encoder(bert()),
        "teacher": task.encoder(roberta()),
        "pretrained": task.encoder(roberta()),
    }
    for start in (0, 4, 8):
        task.collate(task.rows("train")[start : start + 4], encoders)
    assert [n for n in made if n] == [16, 16], "the two roles with one tokenizer share"
    counts = task.counts["train"]
    cut = sum(len(text.split()) > 6 for text in (row["text"] for row in task.rows("train")))
    assert 0 < cut < 16
    assert counts["truncated/student"] == cut
    assert counts["truncated/teacher"] == counts["truncated/pretrained"]
    changed = {**task.rows("train")[0], "text": "wins"}
    assert task.collate([changed], {"student": encoders["student"]})["length"].tolist() == [7]


def test_limits_follow_the_prompt() -> None:
    class Named(Toy):
        def template(self) -> str:
            return FewShotTask.template(self)

        def classes(self) -> list[str]:
            return FewShotTask.classes(self)

        def label_words(self) -> list[str]:
            return FewShotTask.label_words(self)

    def limits(**settings: Any) -> tuple[int, int | None]:
        return Named(Named.Settings(**settings)).limits()

    assert limits(dataset="rte") == (256, 240)
    assert limits(dataset="rte", max_length=64) == (64, 48), "as much room for the second sentence"
    assert limits(dataset="mr", max_length=32) == (32, 14)
    assert limits(dataset="sst2", max_length=32) == (32, None)
    assert toy().limits() == (128, None)
    named = Named(Named.Settings(dataset="sst2", prompt_set="pet-1", label_words=["sad", "fun"]))
    assert named.words == {"negative": "sad", "positive": "fun"}
    assert named.prompt.text == "{a}. All in all, it was {mask}."


def test_texts_settings_and_heads() -> None:
    task = toy()
    row = task.rows("train")[0]
    assert next(task.texts("train")) == f"{row['text']} It was {task.words[row['label']]}."
    assert next(task.texts("unlabeled")) == task.rows("unlabeled")[0]["text"]
    both = toy(pair=True)
    row = both.rows("unlabeled")[0]
    assert next(both.texts("unlabeled")) == f"{row['text_a']} {row['text_b']}"
    assert task.model_settings() == {"num_labels": 2}
    assert task.whole_words == ["terrible", "great"]
    for asked in (lambda: task.fields_of("sequnce"), lambda: task.encoder(bert(), "sequnce")):
        with pytest.raises(UserError, match="task toy: no head 'sequnce'. Did you mean 'sequence'?"):
            asked()
    assert task.heads == ("masked_lm", "sequence")
    limited = toy(test_limit=4)
    assert [row["example_id"] for row in limited.rows("test/toy")] == [0, 10, 20, 30]


# ------------------------------------------------------------------------------------------- predictions


def outputs(
    task: FewShotTask, model: Any, made: Any, split: str = "test/toy", size: int = 7, **more: Any
) -> Any:
    return task.outputs(model, split, made, Decoding(), [5, 6], size, **more)


def test_outputs_of_a_prompted_model() -> None:
    task, tokenizer = toy(), bert()
    made = task.encoder(tokenizer)
    model = bert_model(tokenizer)
    rows = outputs(task, model, made)
    assert [row["example_id"] for row in rows] == list(range(40))
    assert {row["prediction"] for row in rows} == {0, 1}
    for row, given in zip(rows, task.rows("test/toy"), strict=True):
        one = task.collate([given], {"student": made})
        with torch.no_grad():
            chances = class_logits(model, one).softmax(-1)[0].tolist()
            all_chances = model(one["input_ids"]).logits[0, one["mask_index"][0]].softmax(-1)
        assert row["probabilities"] == pytest.approx(chances, abs=1e-12)
        assert row["prediction"] == max(range(2), key=chances.__getitem__)
        assert row["response"] == ["terrible", "great"][row["prediction"]]
        assert row["references"] == [["terrible", "great"][given["class_label"]]]
        assert (row["set"], row["seed"], row["finished"], row["label"]) == (
            "toy",
            5,
            True,
            given["class_label"],
        )
        assert row["prompt"] == f"{given['text']} it was [MASK]."
        assert row["tokens"] == len(given["text"].split()) + 6
        assert ("top" in row) == (row["example_id"] < 32)
        if "top" in row:
            best = all_chances.topk(10)
            names = tokenizer.convert_ids_to_tokens(best.indices.tolist())
            assert [name for name, _ in row["top"]] == names
            assert [chance for _, chance in row["top"]] == pytest.approx(best.values.tolist(), abs=1e-12)
    json.dumps(rows)


def test_outputs_do_not_depend_on_the_batch() -> None:
    task, tokenizer = toy(), bert()
    made, model = task.encoder(tokenizer), bert_model(tokenizer)
    one, many = outputs(task, model, made, size=1), outputs(task, model, made, size=40)
    for a, b in zip(one, many, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-12)
        assert {**a, "probabilities": 0, "top": 0} == {**b, "probabilities": 0, "top": 0}
    few = outputs(task, model, made, limit=4)
    assert [row["example_id"] for row in few] == [0, 10, 20, 30]
    assert few[1]["prediction"] == one[10]["prediction"]


def test_outputs_of_a_classifier_and_of_xu() -> None:
    task, tokenizer = toy(rows=(60, 60, 60), pair=True), bert()
    made = task.encoder(tokenizer, "sequence")
    model = bert_model(tokenizer, 3, BertForSequenceClassification)
    rows = outputs(task, model, made, "dev")
    assert len(rows) == 24
    assert all(row["set"] == "dev" and "top" not in row and len(row["probabilities"]) == 3 for row in rows)
    assert all(row["response"] == task.classes()[row["prediction"]] for row in rows)
    assert all(row["references"] == [task.classes()[row["label"]]] for row in rows)
    assert " | " in rows[0]["prompt"]
    unlabelled = outputs(task, model, made, "unlabeled", limit=3)
    assert [(row["label"], row["references"]) for row in unlabelled] == [(-1, [])] * 3


def test_top_tokens_have_no_mark_of_a_words_beginning() -> None:
    task, tokenizer = toy(), roberta()
    made = task.encoder(tokenizer)
    assert made.token(tokenizer.convert_tokens_to_ids("Ġgreat")) == "great"
    rows = outputs(task, roberta_model(tokenizer), made, limit=3)
    assert all(name and "Ġ" not in name.strip("Ġ") for row in rows for name, _ in row["top"])
    assert rows[0]["prompt"].endswith("It was<mask>.")


# ------------------------------------------------------------------------------------------- independence


def permuted(tokenizer: Any, order: list[int]) -> PreTrainedTokenizerFast:
    """The word-level tokenizer with id i renamed to order[i]."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"] = {word: order[i] for word, i in core["model"]["vocab"].items()}
    for one in core["added_tokens"]:
        one["id"] = order[one["id"]]
    core["added_tokens"].sort(key=lambda one: one["id"])
    for name in ("sep", "cls"):
        core["post_processor"][name][1] = order[core["post_processor"][name][1]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def test_permuted_ids_change_nothing() -> None:
    """14.7: embedding and decoder rows permuted with the vocabulary give the same probabilities."""
    task, tokenizer = toy(), bert()
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(3)).tolist()
    other = permuted(tokenizer, order)
    model, twin = bert_model(tokenizer), bert_model(tokenizer)
    to = torch.tensor(order)
    with torch.no_grad():
        weight = twin.bert.embeddings.word_embeddings.weight
        bias = twin.cls.predictions.decoder.bias
        weight[to] = weight.clone()
        bias[to] = bias.clone()
    twin.bert.embeddings.word_embeddings.padding_idx = order[0]
    twin.config.pad_token_id = order[0]
    made, moved = task.encoder(tokenizer), task.encoder(other)
    assert moved.verbalizer_ids == [order[i] for i in made.verbalizer_ids] != made.verbalizer_ids
    one, two = outputs(task, model, made), outputs(task, twin, moved)
    for a, b in zip(one, two, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-6)
        assert (a["prompt"], a.get("top", [[""]])[0][0]) == (b["prompt"], b.get("top", [[""]])[0][0])


def test_another_mask_position_of_the_teacher_leaves_the_student_alone() -> None:
    task = toy()
    rows = task.rows("train")[:4]
    student, teacher = task.encoder(bert()), task.encoder(roberta())
    longer = ClassEncoder(
        roberta(), "masked_lm", Template("One two three four five six. {a} It was {mask}."), task.words
    )
    plain = task.collate(rows, {"student": student, "teacher": teacher})
    moved = task.collate(rows, {"student": student, "teacher": longer})
    assert (moved["teacher.mask_index"] > plain["teacher.mask_index"]).all()
    for name in task.fields_of("masked_lm"):
        assert torch.equal(plain[name], moved[name])
    model = bert_model(bert())
    with torch.no_grad():
        assert torch.equal(class_logits(model, plain.of("student")), class_logits(model, moved.of("student")))
        theirs = roberta_model(roberta())
        assert not torch.allclose(
            class_logits(theirs, plain.of("teacher")), class_logits(theirs, moved.of("teacher"))
        )
