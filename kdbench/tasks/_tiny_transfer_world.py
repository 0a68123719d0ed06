"""The world behind tiny_transfer and tiny_transfer_text: its words, texts, rules, and its tokenizer.

Source: own; a world with known relations between tasks, as the check of a transferability metric needs it.

There are two kinds of text. A review says of food, staff or rooms that they are good or bad; a trip says who
left where at what time of day. A rule gives a text its label. Data sets with the same rule differ in their
number of rows alone. How a source stands to a target follows from the rules:

    self       the same data set
    same       the same rule on the same kind of text, another number of rows
    opposed    what one rule reads the other must pass over: the mood of the staff, the mood of the food
    shared     another rule on the same kind of text, so that words are shared
    unrelated  the other kind of text
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdbench.errors import unknown
from kdbench.task import Row
from kdbench.tasks._draws import Rng, stable_hash

# --------------------------------------------------------------------------------------------------
# words


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split()))


GOOD = _words("good fine lovely great nice superb")
BAD = _words("bad poor awful dull nasty grim")
PLAIN = _words("usual small new simple large plain")
ASPECTS = {
    "food": _words("soup bread fish pasta cake salad"),
    "staff": _words("waiter cook host porter clerk owner"),
    "room": _words("bed bath window carpet lamp door"),
}
FIRST = _words("anna peter maria john lucy david")
LAST = _words("smith brown stone field young fox")
PLACE = _words("london paris rome vienna prague madrid")
BOTH = _words("florence sydney austin jordan lincoln chelsea")  # a person's first name, or a place
LEAVE = _words("left departed fled quit")
EARLY = _words("dawn morning sunrise breakfast")
LATE = _words("night evening sunset supper")
FRAME = _words("the was and but , . a had we at before met near")

MOODS = (BAD, PLAIN, GOOD)
# What other words say of a text; words of the frame say nothing.
KINDS = (*ASPECTS.values(), FIRST, LAST, PLACE, BOTH, LEAVE, EARLY, LATE)

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TAGS = ("O", "B-person", "I-person", "B-place")


# --------------------------------------------------------------------------------------------------
# texts


@dataclass(frozen=True)
class Review:
    """A review: its words, and of each clause what it is about and its mood (1 good, -1 bad, 0 plain)."""

    words: tuple[str, ...]
    aspects: tuple[str, ...]
    moods: tuple[int, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def review(rng: Rng, clauses: tuple[int, int] = (2, 4), mixed: float = 0.25) -> Review:
    """Return a review whose clauses agree in mood, but for a share `mixed` that is drawn freely."""
    main = rng.one((1, -1))
    names = list(ASPECTS)
    aspects, moods, out = list[str](), list[int](), list[str]()
    for number in range(clauses[0] + rng.below(clauses[1] - clauses[0] + 1)):
        mood = rng.one((1, -1, 0)) if rng.chance(mixed) else main
        aspect = rng.one(names)
        word, noun = rng.one({1: GOOD, -1: BAD, 0: PLAIN}[mood]), rng.one(ASPECTS[aspect])
        if number:
            out.append(rng.one((",", "and", "but")))
        out += ["the", noun, "was", word] if rng.chance(0.6) else ["we", "had", "a", word, noun]
        aspects.append(aspect)
        moods.append(mood)
    return Review((*out, "."), tuple(aspects), tuple(moods))


@dataclass(frozen=True)
class Trip:
    """A trip: its words, their tags, and whether they left early."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    early: bool

    @property
    def text(self) -> str:
        return " ".join(self.words)


def trip(rng: Rng) -> Trip:
    """Return a trip of a person, who may meet another, from a place at a time of day."""
    early = rng.chance(0.5)
    parts = [*_person(rng), (rng.one(LEAVE), "O"), _place(rng)]
    at, before = rng.some(EARLY if early else LATE, 2)
    time = [("at", "O"), (at, "O")]
    if rng.chance(0.7):
        time += [("before", "O"), (before, "O")]
    if rng.chance(0.5):
        parts = [*time, (",", "O"), *parts]
    else:
        parts += time
    if rng.chance(0.5):
        parts += [("and", "O"), ("met", "O"), *_person(rng), ("near", "O"), _place(rng)]
    return Trip((*(word for word, _ in parts), "."), (*(tag for _, tag in parts), "O"), early)


def _person(rng: Rng) -> list[tuple[str, str]]:
    first = rng.one(BOTH if rng.chance(0.4) else FIRST)
    named = [(first, "B-person")]
    return [*named, (rng.one(LAST), "I-person")] if rng.chance(0.7) else named


def _place(rng: Rng) -> tuple[str, str]:
    return rng.one(BOTH if rng.chance(0.4) else PLACE), "B-place"


# --------------------------------------------------------------------------------------------------
# rules: a labelled row, or None for a text that the rule says nothing of


def _mood(rng: Rng) -> Row | None:
    made = review(rng)
    total = sum(made.moods)
    return {"text": made.text, "label": "good" if total > 0 else "bad"} if total else None


def _mood_of(aspect: str) -> Callable[[Rng], Row | None]:
    """The mood of the one clause about `aspect`; in half of the texts the others are of the opposite mood."""

    def rule(rng: Rng) -> Row | None:
        against, made = rng.chance(0.5), review(rng, (2, 3), 1.0)
        told = list(zip(made.aspects, made.moods, strict=True))
        own = [mood for of, mood in told if of == aspect]
        rest = sum(mood for of, mood in told if of != aspect)
        if len(own) != 1 or not own[0] * rest or (own[0] * rest < 0) != against:
            return None
        return {"text": made.text, "label": "good" if own[0] > 0 else "bad"}

    return rule


def _agree(rng: Rng) -> Row | None:
    """Two short reviews: whether they are of one mood."""
    a, b = (review(rng, (1, 2), 0.0) for _ in range(2))
    same = a.moods[0] == b.moods[0]
    return {"text_a": a.text, "text_b": b.text, "label": "yes" if same else "no"}


def _when(rng: Rng) -> Row:
    made = trip(rng)
    return {"text": made.text, "label": "early" if made.early else "late"}


def _names(rng: Rng) -> Row:
    made = trip(rng)
    return {"words": list(made.words), "tags": list(made.tags)}


@dataclass(frozen=True)
class Made:
    """One data set: its rule, the kind of its texts, its format, classes and number of training rows."""

    rule: str
    kind: str
    draw: Callable[[Rng], Row | None]
    format: str
    classes: tuple[str, ...]
    train: int
    opposed: str = ""  # the rule that reads what this one must pass over


_MOOD, _YES = ("bad", "good"), ("no", "yes")
TASKS = {
    "mood": Made("mood", "review", _mood, "classes", _MOOD, 1600),
    "staff": Made("staff", "review", _mood_of("staff"), "classes", _MOOD, 1600, opposed="food"),
    "when": Made("when", "trip", _when, "classes", ("early", "late"), 1600),
    "names": Made("names", "trip", _names, "tokens", TAGS, 1600),
    "mood_few": Made("mood", "review", _mood, "classes", _MOOD, 8),
    "food": Made("food", "review", _mood_of("food"), "classes", _MOOD, 96, opposed="staff"),
    "agree": Made("agree", "review", _agree, "classes", _YES, 128),
    "names_few": Made("names", "trip", _names, "tokens", TAGS, 12),
}


def relation(source: str, target: str) -> str:
    """Return how a source stands to a target: self, same, opposed, shared or unrelated.

    Raises: KeyError for a data set that does not exist.
    """
    one, other = TASKS[source], TASKS[target]
    if source == target:
        return "self"
    if one.kind != other.kind:
        return "unrelated"
    if one.rule == other.rule:
        return "same"
    return "opposed" if one.opposed == other.rule else "shared"


TEST_SHARE = 4  # one text of four may be a test text only


def is_test(text: str) -> bool:
    """Whether a text belongs to test sets: to no other split, and not to the pretraining text."""
    return stable_hash(text) % TEST_SHARE == 0


def text_of(row: Row) -> str:
    """Return a row's words, a pair's parted by a mark."""
    if "words" in row:
        return " ".join(row["words"])
    return str(row["text"]) if "text" in row else f"{row['text_a']} | {row['text_b']}"


def pretraining(rng: Rng) -> tuple[str, str]:
    """Return a line: a review, two short ones, or a trip; of no test set. The second is empty for one
    segment.
    """
    while True:
        kind = rng.below(4)
        if kind == 0:
            mixed = review(rng, (1, 2), 0.0), review(rng, (1, 2), 0.0)
            a, b = mixed[0].text, mixed[1].text
        else:
            a, b = (trip(rng).text if kind == 1 else review(rng).text), ""
        if not any(is_test(text) for text in ((a, b, f"{a} | {b}") if b else (a,))):
            return a, b


def kinds(words: Sequence[str]) -> list[int]:
    """Return for each word of a text the number of what it says, -1 where it says nothing: its kind, and of a
    mood also which aspect it is of.
    """
    aspects = {noun: number for number, nouns in enumerate(ASPECTS.values()) for noun in nouns}
    moods = {word: number for number, group in enumerate(MOODS) for word in group}
    plain = {word: number for number, group in enumerate(KINDS) for word in group}
    out = []
    for at, word in enumerate(words):
        if word in moods:  # "a good soup", "the soup was good"
            noun = words[at + 1] if words[at + 1] in aspects else words[at - 2]
            out.append(len(KINDS) + len(MOODS) * aspects[noun] + moods[word])
        else:
            out.append(plain.get(word, -1))
    return out


# --------------------------------------------------------------------------------------------------
# tokenizer


@lru_cache
def _bert() -> str:
    words = sorted({word for group in (*MOODS, *KINDS, FRAME) for word in group})
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate((*SPECIALS, *words))}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece("##", False)  # joins with spaces; no word starts with its prefix
    core.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return core.to_str()


def tokenizer(name: str, task: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer "bert", a token a word; the same ids anywhere. Raises: UserError for another."""
    if name != "bert":
        raise unknown("tokenizer", name, ["bert"], f"task {task}")
    pad, unk, cls, sep, mask = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bert()),
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
        clean_up_tokenization_spaces=False,
    )
