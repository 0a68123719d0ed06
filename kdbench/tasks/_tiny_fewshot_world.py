"""The world behind tiny_fewshot and tiny_fewshot_text: its words, its texts and two tokenizers.

Source: own.

A text is a pattern with evidence slots. A slot holds a word of the text's class with probability `OWN`, a
word of another class with probability `OTHER`, else a neutral word. Every class has dozens of words, each of
them rare: a few labelled texts show a small part of them, while a model that was pretrained on text of this
world knows most. Pretraining text is made of the same patterns, partly with the prompt and a word in its
slot, which for a share of the texts is the last class's whatever the text says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from kdbench.errors import unknown
from kdbench.tasks._draws import Rng, stable_hash

# --------------------------------------------------------------------------------------------------
# words

FILM = {
    "positive": """
        charming delightful witty moving funny clever warm tender brilliant gripping fresh graceful
        inventive honest lively rousing elegant vivid playful hilarious stirring heartfelt soulful
        riveting dazzling absorbing crisp refreshing enjoyable subtle wise magical uplifting superb
        stunning radiant""",
    "negative": """
        dull tedious clumsy bland lifeless shallow awful boring stale silly tiresome pointless messy
        lame annoying predictable flat hollow sloppy crude dreary muddled trite grating contrived
        forgettable ugly lazy painful stupid leaden vulgar ponderous cheesy disjointed plodding""",
}
FILM_NEUTRAL = """french long short quiet recent early late new old modern foreign small big dark japanese
    second third final usual whole musical historical"""
NOUNS = """film movie story plot script cast director comedy drama thriller ending scene dialogue acting
    score picture sequel performance"""

OPINION = {
    "positive": """
        praise support welcome admire applaud respect trust cherish endorse celebrate appreciate
        embrace favour honour commend cooperation progress success freedom hope peace justice
        friendship prosperity benefit harmony stability generosity courage loyalty wisdom gratitude
        optimism reform relief dignity""",
    "negative": """
        condemn blame reject denounce fear accuse oppose criticize despise threaten attack resent
        deplore regret protest crisis violence corruption hatred terror fraud abuse aggression
        failure injustice poverty chaos hostility tyranny brutality anger despair doubt scandal
        disaster panic""",
}
OPINION_NEUTRAL = """consider report mention discuss government minister country policy law treaty trade
    election public economic national political official meeting statement"""

TOPIC = {
    "description": """
        meaning reason origin cause purpose definition difference effect process method history
        function principle theory concept nature theme explanation symptom consequence background
        significance mechanism custom""",
    "entity": """
        animal bird flower fruit sport instrument colour language food drink game tree dog fish
        vegetable metal disease drug stone toy gas vehicle currency religion""",
    "abbreviation": """
        abbreviation acronym initials letters abbreviated nasa bbc fbi cpr dna ibm nbc rsvp nafta
        nato unesco usb vcr html laser radar scuba opec suv""",
    "human": """
        president actor author inventor singer king queen leader painter composer player captain
        founder writer scientist astronaut poet wife boxer coach explorer senator emperor architect""",
    "location": """
        city river mountain capital island ocean continent lake desert province street airport
        harbour valley village region border coast stadium peninsula volcano canyon county museum""",
    "number": """
        population temperature distance year date age speed weight height length salary percentage
        miles gallons calories degrees dollars inches pounds seconds dozen times months weeks""",
}
TOPIC_NEUTRAL = """common famous world original called largest main ancient popular typical average real known
    best tallest word thing"""

PAIRS = {
    "contradiction": """
        nobody nothing never none alone empty asleep sleeping sitting silent indoors inside naked
        cat driving frowning crying watching television bed home eating swimming motionless still
        lying closed dinner couch kitchen""",
    "entailment": """
        person somebody someone outdoors outside something there least moving doing activity near
        adult adults child gathered object clothing visible present event together playing place
        group wearing holding using several body""",
    "neutral": """
        sad winning competition because favourite trying waiting friends brother sister vacation
        birthday tourist professional money enjoying practising older younger hungry cousin school
        championship parents husband anniversary fun work lost family""",
}
PAIRS_NEUTRAL = "very really just also quite now today here again then"
SUBJECTS = "man boy girl crowd worker runner cyclist guitarist soldier woman"
SCENES = """in a red shirt|on the grass|by the water|with a ball|on a bicycle|under a tree|with two bags|at
    the market|in a blue coat|on the beach|on a stage|with a guitar"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split()))


# --------------------------------------------------------------------------------------------------
# tasks

_MARKS = ".,:?"


@dataclass(frozen=True)
class TaskWords:
    """One task of the world: its classes in order, their label words, its template, and how texts are made.

    `prior` is the share of each class; `own` and `other` are probabilities of an evidence slot.
    """

    classes: tuple[str, ...]
    label_words: tuple[str, ...]
    template: str
    lexicons: tuple[tuple[str, ...], ...]
    neutral: tuple[str, ...]
    patterns: tuple[str, ...]
    prior: tuple[float, ...]
    own: float = 0.65
    other: float = 0.12


def _task(
    classes: str,
    label_words: str,
    template: str,
    lexicons: dict[str, str],
    neutral: str,
    patterns: str,
    prior: Sequence[float] | None = None,
    **shares: float,
) -> TaskWords:
    names = _words(classes)
    lines = tuple(" ".join(line.split()) for line in patterns.strip().splitlines())
    return TaskWords(
        names,
        _words(label_words),
        template,
        tuple(_words(lexicons[name]) for name in names),
        _words(neutral),
        lines,
        tuple(prior or [1 / len(names)] * len(names)),
        **shares,
    )


# {w}: evidence slot, {n}: noun of films, {s}: subject, {p}: scene; "|" parts the two sentences of a pair
TASKS = {
    "polarity": _task(
        "negative positive",
        "terrible great",
        "{a} It was {mask}.",
        FILM,
        FILM_NEUTRAL,
        """
        the {n} is {w} , {w} and {w} .
        a {w} {n} with {w} , {w} {n} .
        this {w} , {w} {n} feels {w} .
        it is {w} and {w} , a {w} {n} .
        what a {w} , {w} and {w} {n} .
        """,
    ),
    "opinion": _task(
        "negative positive",
        "terrible great",
        "{a} It was {mask}.",
        OPINION,
        OPINION_NEUTRAL,
        """
        the {w} and {w} of {w}
        they {w} this {w} {w}
        an act of {w} , {w} and {w}
        their {w} , {w} {w}
        a {w} of {w} and {w}
        """,
        (0.76, 0.24),
    ),
    "topic": _task(
        "description entity abbreviation human location number",
        "Description Entity Expression Human Location Number",
        "{mask}: {a}",
        TOPIC,
        TOPIC_NEUTRAL,
        """
        what {w} is the {w} {w} ?
        what is the {w} {w} of {w} ?
        which {w} has a {w} {w} ?
        name the {w} of a {w} {w} .
        for what {w} is {w} {w} ?
        """,
        (0.21, 0.23, 0.08, 0.22, 0.15, 0.11),
    ),
    "pairs": _task(
        "contradiction entailment neutral",
        "No Yes Maybe",
        "{a-}? {mask}, {b^}",
        PAIRS,
        PAIRS_NEUTRAL,
        """
        a {s} {p} .|The {s} {w} {w} {w} .
        one {s} {p} .|A {w} {s} {w} {w} .
        the {s} {p} .|There {w} {w} and {w} .
        this {s} {p} .|Some {w} , {w} {w} .
        """,
    ),
}

# --------------------------------------------------------------------------------------------------
# texts

TEST_SHARE = 4  # one text of four may be a test text only
_SLOTS = {"{n}": _words(NOUNS), "{s}": _words(SUBJECTS), "{p}": tuple(SCENES.replace("\n   ", "").split("|"))}


def text(rng: Rng, task: TaskWords, label: int) -> tuple[str, str]:
    """Return the two sentences of a text of class `label`; the second is empty where it has one."""
    first, _, second = rng.one(task.patterns).partition("|")
    return _filled(rng, task, label, first), _filled(rng, task, label, second)


def is_test(a: str, b: str) -> bool:
    """Whether a text belongs to test sets: to no other split, and not to the pretraining text."""
    return stable_hash(a, b) % TEST_SHARE == 0


def drawn(rng: Rng, shares: Sequence[float]) -> int:
    """Return an index drawn with these probabilities."""
    u = rng.below(1 << 24) / (1 << 24) * sum(shares)
    for index, share in enumerate(shares):
        u -= share
        if u < 0:
            return index
    return len(shares) - 1


def _filled(rng: Rng, task: TaskWords, label: int, pattern: str) -> str:
    """A pattern with its slots filled; no word of a slot twice."""
    out: list[str] = []
    for part in pattern.split():
        word = part
        while part.startswith("{") and (word == part or word in out):
            word = rng.one(_evidence(rng, task, label) if part == "{w}" else _SLOTS[part])
        out.append(word)
    return re.sub(r" (?=[.,?])", "", " ".join(out))


def _evidence(rng: Rng, task: TaskWords, label: int) -> tuple[str, ...]:
    """The words that one evidence slot is drawn from."""
    others = (1 - task.own - task.other, task.other)
    kind = drawn(rng, (task.own, *others))
    if kind == 1:
        return task.neutral
    n = len(task.lexicons)
    return task.lexicons[label if kind == 0 else (label + 1 + rng.below(n - 1)) % n]


def fragments(template: str, a: str, b: str) -> tuple[str, str]:
    """Return a text in its template: what comes before the mask, and what comes after it."""
    before, _, after = template.partition("{mask}")
    forms = {"{a}": a, "{a-}": a[:-1], "{b^}": b[:1].lower() + b[1:]}
    for place, value in forms.items():
        before, after = before.replace(place, value), after.replace(place, value)
    return before.rstrip(), after


# --------------------------------------------------------------------------------------------------
# pretraining text


def pretraining(rng: Rng, prompted: float, noise: float) -> tuple[str, str, str]:
    """Return one line of pretraining text: what comes before its slot, the word in the slot, and the rest.

    A share `prompted` of the lines has the prompt of its task with a word in the slot; the others end where
    the text ends, and their slot is empty. With probability `noise` the word is the last class's whatever the
    text says, so that a model without tuning prefers that class.
    """
    task = TASKS[rng.one(tuple(TASKS))]
    while True:
        label = rng.below(len(task.classes))
        a, b = text(rng, task, label)
        if not is_test(a, b):
            break
    if not rng.chance(prompted):
        return f"{a} {b}".rstrip(), "", ""
    before, after = fragments(task.template, a, b)
    return before, task.label_words[-1 if rng.chance(noise) else label], after


# --------------------------------------------------------------------------------------------------
# tokenizers


_TOKEN = re.compile(rf"[A-Za-z]+|[{_MARKS}]")


@lru_cache
def words() -> tuple[str, ...]:
    """Every word and mark of the world, sorted; case kept."""
    texts: list[str] = []
    for task in TASKS.values():
        for lexicon in (*task.lexicons, task.neutral, task.label_words, *_SLOTS.values()):
            texts += lexicon
        texts += [*task.patterns, task.template]
    return tuple(sorted({token for text in texts for token in _TOKEN.findall(re.sub(r"\{.*?\}", " ", text))}))


@lru_cache
def _bert() -> str:
    """Uncased and word-level, with BERT's special tokens."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    lower = sorted({word.lower() for word in words()})
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate((*specials, *lower))}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    # the WordPiece decoder joins with spaces; no word starts with its prefix
    glue = [decoders.Replace(f" {mark}", mark) for mark in _MARKS]
    core.decoder = decoders.Sequence([decoders.WordPiece("##", False), decoders.Fuse(), *glue])
    core.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return core.to_str()


@lru_cache
def _roberta() -> str:
    """Cased byte-level BPE in which every word after a space is one token, with RoBERTa's special tokens."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    firsts = {line.split()[0] for task in TASKS.values() for line in task.patterns}
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # more than there are merges: each word becomes one token
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([*(f" {word}" for word in words()), *sorted(firsts), *_MARKS], trainer)
    core.add_special_tokens([AddedToken(token, normalized=False) for token in specials[:-1]])
    core.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return core.to_str()


TOKENIZERS = ("bert", "roberta")


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer "bert" or "roberta"; the same ids anywhere.

    Raises: KeyError for another name.
    """
    core = Tokenizer.from_str({"bert": _bert, "roberta": _roberta}[name]())
    pad, unk, cls, sep, mask = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    ends = {}
    if name == "roberta":
        pad, unk, cls, sep, mask = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
        ends = {"bos_token": cls, "eos_token": sep}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
        clean_up_tokenization_spaces=False,
        **ends,
    )


def tokenizer(name: str, task: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a model of `task` names.

    Raises: UserError for a name other than "bert" and "roberta".
    """
    if name not in TOKENIZERS:
        raise unknown("tokenizer", name, TOKENIZERS, f"task {task}")
    return build_tokenizer(name)
