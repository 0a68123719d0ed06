"""Embedded instruction world: a seeded generator and a word-level tokenizer; a whole board runs on a CPU.

Source: template and fields are those of the PromptKD data, https://github.com/gmkim-ai/PromptKD
(tools/process_data_dolly.py); the world itself is written for this project.

Nothing is read from disk: record i of a split depends on (world seed, split, i) alone, so a split can grow
without changing its first records. Prompts are partitioned by a hash: an instruction with its input occurs
in the training splits or in dev and the test sets, never in both.

Families. About a list in the input: `keep drop count first last`, each x four categories. About a table in
the input: `value owner table`, each x four attributes. Open texts of 30 to 80 tokens in which free choices
must be repeated later: `story recipe portrait letter trip`. `pair` asks for two things at once.

The references of `train` are noisy, as crowd-written ones are: a share `noise` of them slips in its facts,
stops early, or answers something else. `teacher_train` is larger and clean, and a share `prefix` of its
prompts has five to ten words before the template, so that a teacher trained on it tolerates a soft prompt
there.

Held out of both: two of seven phrasings of every family (`phrase`), seven of 32 operation x category
combinations (`comb`), eight of 34 ordered pairs (`mix`), longer inputs and texts (`long`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdbench.task import InstructionTask, Row
from kdbench.tasks._draws import Rng, stable_hash

SETS = ("indist", "phrase", "comb", "mix", "long")
SPLITS = ("train", "teacher_train", "dev", *(f"test/{name}" for name in SETS))

INTRO = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
INTRO_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
INPUT = "\n\n### Input:\n"
RESPONSE = "\n\n### Response:\n"
PIECES = (INTRO, INTRO_INPUT, INPUT, RESPONSE)
EOS, UNK = "<eos>", "<unk>"
PROMPT_TEXT = "Suppose you are a student."

ITEMS = {
    "animals": "lion horse rabbit otter eagle goat camel tiger wolf seal".split(),
    "fruits": "apple pear plum cherry lemon mango grape peach melon fig".split(),
    "tools": "hammer saw drill rake shovel wrench ladder brush axe chisel".split(),
    "clothes": "coat scarf glove hat shirt boot sock belt dress skirt".split(),
}
ONE = {"animals": "animal", "fruits": "fruit", "tools": "tool", "clothes": "garment"}
ATTRIBUTES = {
    "colour": "red blue green white black yellow brown grey".split(),
    "job": "baker teacher pilot nurse farmer singer painter sailor".split(),
    "city": "Oslo Rome Cairo Lima Paris Delhi Tokyo Madrid".split(),
    "hobby": "chess tennis fishing dancing cooking reading swimming running".split(),
}
NAMES = "Mia Noah Lena Omar Ruth Ivan Cleo Hugo Nina Paul Zara Adam".split()
PLACES = "harbour market forest library castle garden station museum".split()
THINGS = "key map lamp ring book flute mirror clock".split()
ADJECTIVES = "rusty small golden dusty heavy strange broken shiny".split()
MOODS = "happy sad proud tired calm angry curious nervous".split()
FOODS = "rice beans onion carrot tomato potato cheese mushroom pepper spinach".split()
DISHES = "soup stew pie salad curry omelette".split()
VESSELS = "pot pan bowl oven".split()
CUTS = "Wash Chop Fry Peel Boil Grate".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = [str(n) for n in range(2, 13)]
MINUTES = "15 20 25 30 40 50".split()
GROUPS: tuple[Sequence[str], ...] = (
    *ITEMS.values(),
    *ATTRIBUTES.values(),
    NAMES,
    PLACES,
    THINGS,
    ADJECTIVES,
    MOODS,
    FOODS,
    VESSELS,
    CUTS,
    DAYS,
    NUMBERS,
    MINUTES,
)

# The last two phrasings of each family are held out of training; their words occur in the others.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "keep": (
        "Keep only the {p} of this list.",
        "Which words in the list are {p}?",
        "Write down all the {p} in the list.",
        "Find the {p} and leave out the rest.",
        "I need only the {p}.",
        "Find only the {p} in this list.",
        "Write only the {p} of the list.",
    ),
    "drop": (
        "Remove the {p} from this list.",
        "Leave out the {p}.",
        "Write down the list without the {p}.",
        "Which words in the list are not {p}?",
        "I need the list without the {p}.",
        "Find the {p} and leave out all {p}.",
        "Write all words that are not {p}.",
    ),
    "count": (
        "Count the {p} in this list.",
        "How many {p} are in the list?",
        "Find out how many {p} the list has.",
        "Give the number of {p}.",
        "Tell me how many words are {p}.",
        "Tell me the number of {p} in the list.",
        "What number of {p} has the list?",
    ),
    "first": (
        "Name the first {s} in this list.",
        "Which {s} comes first?",
        "What is the first {s}?",
        "Find the {s} that comes first in the list.",
        "Tell me the first {s} of the list.",
        "Give me the {s} that is first.",
        "Which is the first {s}?",
    ),
    "last": (
        "Name the last {s} in this list.",
        "Which {s} comes last?",
        "What is the last {s}?",
        "Find the {s} that comes last in the list.",
        "Tell me the last {s} of the list.",
        "Give me the {s} that is last.",
        "Which is the last {s}?",
    ),
    "value": (
        "Which {a} has {n}?",
        "What is the {a} of {n}?",
        "Find the {a} of {n} in the table.",
        "Tell me the {a} of {n}.",
        "Read the {a} of {n} from this table.",
        "Give me the {a} of {n}.",
        "What {a} has {n} in the table?",
    ),
    "owner": (
        "Who has the {a} {v}?",
        "Find the person with the {a} {v}.",
        "Which person has {v} as {a}?",
        "Tell me who has the {a} {v}.",
        "Name the person with {v} as {a}.",
        "Give me the person with the {a} {v}.",
        "Who has {v} as {a}?",
    ),
    "table": (
        "Write down the {a} of every person.",
        "Read the whole table of each {a}.",
        "Tell me every {a} in the table.",
        "Who has which {a}?",
        "Make a sentence for each {a}.",
        "Write a sentence for every {a} in the table.",
        "Tell me who has which {a}.",
    ),
    "story": (
        "Write a story about {n} at the {l}.",
        "Tell me a short story with {n} at the {l}.",
        "Make up a story about the {l} and {n}.",
        "What happened to {n} at the {l}?",
        "I need a story about {n} at the {l}.",
        "Tell me what happened at the {l} to {n}.",
        "Write a short text about the {l} and {n}.",
    ),
    "recipe": (
        "Write a recipe for {d} with {f}.",
        "How do I make {d} with {f}?",
        "Tell me how to make a {d} from {f}.",
        "Explain the recipe of a {d} with {f}.",
        "I have {f} and need a {d}.",
        "Explain how to make {d} from {f}.",
        "I need a recipe for a {d} with {f}.",
    ),
    "portrait": (
        "Write a short text about this person.",
        "Describe the person.",
        "Tell me about the person in the table.",
        "Make a portrait from the table.",
        "Who is this person?",
        "Describe the person in the table.",
        "Write a portrait of this person.",
    ),
    "letter": (
        "Write a letter from {m} to {n} about the {t}.",
        "Make up a letter to {n} about a {t} from {m}.",
        "{m} wants to thank {n} for the {t}.",
        "Help {m} to write to {n} about the {t}.",
        "Write down what {m} tells {n} about the {t}.",
        "Help {m} to thank {n} for the {t}.",
        "I need a letter from {m} to {n} about a {t}.",
    ),
    "trip": (
        "Plan a trip to {c} for {k} days.",
        "Make a plan for {k} days in {c}.",
        "What can I do in {c} for {k} days?",
        "Tell me how to spend {k} days in {c}.",
        "Write down a trip of {k} days to {c}.",
        "I need a plan for a trip to {c} of {k} days.",
        "How can I spend {k} days in {c}?",
    ),
}
LIST_OPS = ("keep", "drop", "count", "first", "last")
TABLE_OPS = ("value", "owner", "table")
TEXTS = ("story", "recipe", "portrait", "letter", "trip")
COMB_OUT = frozenset(
    {
        ("keep", "tools"),
        ("drop", "fruits"),
        ("count", "clothes"),
        ("first", "animals"),
        ("last", "tools"),
        ("value", "city"),
        ("table", "hobby"),
    }
)
PAIRS = (
    *((a, b) for a in LIST_OPS for b in LIST_OPS if a != b),
    *((a, b) for a in TABLE_OPS for b in TABLE_OPS if a != b),
    *((a, b) for a in LIST_OPS[:2] for b in ("recipe", "letter")),
    *((b, a) for a in LIST_OPS[3:] for b in ("recipe", "letter")),
)
PAIRS_OUT = frozenset(
    {
        ("keep", "count"),
        ("drop", "first"),
        ("count", "last"),
        ("first", "keep"),
        ("last", "drop"),
        ("value", "owner"),
        ("table", "value"),
        ("keep", "letter"),
    }
)

PREFIX_WORDS = (5, 7, 7, 10)  # the prompt lengths that the PromptKD paper compares; its default is 7
FREE_SHARE = 4  # a prompt belongs to dev and test if its hash is 0 modulo this


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


@dataclass
class _Ask:
    """What one record may draw from: phrasings, longer inputs, whether held-out combinations are meant."""

    rng: Rng
    phrases: range
    long: bool = False
    comb: bool = False

    def say(self, family: str, **slots: str) -> str:
        options = PHRASINGS[family]
        return options[self.phrases[self.rng.below(len(self.phrases))]].format(**slots)

    def pick(self, op: str, kinds: Sequence[str]) -> str:
        """A category or attribute that this operation may (or, for `comb`, must) be combined with."""
        return self.rng.one([kind for kind in kinds if ((op, kind) in COMB_OUT) == self.comb])


_Part = tuple[str, str, str]  # instruction, input, output


def _list_input(ask: _Ask, kinds: Sequence[str]) -> list[str]:
    """4 to 6 items (long: 7 or 8) with at least two of each kind asked about, and one or more others."""
    rng = ask.rng
    size = 7 + rng.below(2) if ask.long else 4 + rng.below(3)
    items = [item for kind in dict.fromkeys(kinds) for item in rng.some(ITEMS[kind], 2)]
    size = max(size, len(items) + 1)
    rest = [item for kind in ITEMS for item in ITEMS[kind] if item not in items]
    if len(set(kinds)) == 1:
        other = rng.one([item for kind in ITEMS if kind not in kinds for item in ITEMS[kind]])
        items.append(other)
        rest.remove(other)
    items += rng.some(rest, size - len(items))
    return rng.some(items, len(items))


def _list_part(ask: _Ask, op: str, kind: str, items: Sequence[str]) -> tuple[str, str]:
    hits = [item for item in items if item in ITEMS[kind]]
    instruction = ask.say(op, p=kind, s=ONE[kind])
    if op == "keep":
        return instruction, f"The {kind} are {_join(hits)}."
    if op == "drop":
        left = [item for item in items if item not in hits]
        return instruction, f"Without {kind} the list is {_join(left)}."
    if op == "count":
        return instruction, f"There are {len(hits)} {kind}: {_join(hits)}."
    return instruction, f"The {op} {ONE[kind]} is {hits[0] if op == 'first' else hits[-1]}."


def _table_input(ask: _Ask, kind: str) -> list[tuple[str, str]]:
    """3 or 4 people (long: 5 or 6), each with a value of the attribute, no value twice."""
    size = 5 + ask.rng.below(2) if ask.long else 3 + ask.rng.below(2)
    return list(zip(ask.rng.some(NAMES, size), ask.rng.some(ATTRIBUTES[kind], size), strict=True))


def _table_part(ask: _Ask, op: str, kind: str, table: Sequence[tuple[str, str]]) -> tuple[str, str]:
    name, value = table[ask.rng.below(len(table))]
    if op == "value":
        return ask.say(op, a=kind, n=name), f"The {kind} of {name} is {value}."
    if op == "owner":
        return ask.say(op, a=kind, v=value), f"The {kind} {value} belongs to {name}."
    return ask.say(op, a=kind), " ".join(f"{n} has the {kind} {v}." for n, v in table)


def _story(ask: _Ask) -> _Part:
    rng = ask.rng
    names = rng.some(NAMES, 3 if ask.long else 2)
    place, thing, adjective, day = rng.one(PLACES), rng.one(THINGS), rng.one(ADJECTIVES), rng.one(DAYS)
    moods, coins, finder = rng.some(MOODS, len(names)), rng.one(NUMBERS), rng.one(names)
    first, *others = names
    said = [f"{n} felt {m}" for n, m in zip(names, moods, strict=True)]
    end = rng.some([f"{m} {n}" for n, m in zip(names, moods, strict=True)], len(names))
    text = [
        rng.one(
            (
                f"On {day} {first} met {_join(others)} at the {place}.",
                f"{_join(names)} went to the {place} on {day}.",
            )
        ),
        rng.one(
            (
                f"There {finder} found a {adjective} {thing}.",
                f"A {adjective} {thing} was there and {finder} took it.",
            )
        ),
        f"{_join(said)}.",
        rng.one(
            (
                f"Then {finder} sold the {thing} for {coins} coins.",
                f"A person gave {finder} {coins} coins for the {thing}.",
            )
        ),
        rng.one(
            (
                f"In the end {_join(end)} left the {place} with {coins} coins.",
                f"With {coins} coins {_join(end)} went home.",
            )
        ),
        f"They never forgot that {day} and the {adjective} {thing}.",
    ]
    return ask.say("story", n=_join(names), l=place), "", " ".join(text)


def _recipe(ask: _Ask) -> _Part:
    rng = ask.rng
    foods = rng.some(FOODS, 4 + rng.below(2) if ask.long else 2 + rng.below(2))
    dish, vessel, minutes, guest = rng.one(DISHES), rng.one(VESSELS), rng.one(MINUTES), rng.one(NAMES)
    adjective = rng.one(("hot", "cold", "sweet", "fresh"))
    text = [f"{rng.one(CUTS)} the {food}." for food in rng.some(foods, len(foods))]
    text += [
        f"Put {_join(rng.some(foods, len(foods)))} in the {vessel}.",
        rng.one(
            (f"Leave the {vessel} for {minutes} minutes.", f"Cook it for {minutes} minutes in the {vessel}.")
        ),
        rng.one(
            (
                f"Call {guest} when the {dish} is {adjective}.",
                f"Ask {guest} to bring {rng.other(FOODS, foods[0])}.",
            )
        ),
        f"After {minutes} minutes take the {vessel} and give the {adjective} {dish} to {guest}.",
    ]
    return ask.say("recipe", d=dish, f=_join(foods)), "", " ".join(text)


def _portrait(ask: _Ask) -> _Part:
    rng = ask.rng
    name, mood, day, number = rng.one(NAMES), rng.one(MOODS), rng.one(DAYS), rng.one(NUMBERS)
    kinds = rng.some(tuple(ATTRIBUTES), 4 if ask.long else 2 + rng.below(2))
    value = {kind: rng.one(ATTRIBUTES[kind]) for kind in kinds}
    forms = {
        "job": ("{n} works as a {v}.", "The job of {n} is {v}."),
        "city": ("{n} lives in {v}.", "The home of {n} is {v}."),
        "hobby": ("{n} likes {v}.", "After work {n} enjoys {v}."),
        "colour": ("{n} wears {v} clothes.", "The colour of {n} is {v}."),
    }
    recap = {"job": "the {v}", "city": "from {v}", "hobby": "who likes {v}", "colour": "in {v}"}
    text = [rng.one(forms[kind]).format(n=name, v=value[kind]) for kind in rng.some(kinds, len(kinds))]
    text.append(
        rng.one(
            (
                f"On {day} {name} is {mood} and sees {number} friends.",
                f"Every {day} {number} friends visit {name}, who is {mood} then.",
            )
        )
    )
    if ask.long:
        thing = rng.one(THINGS)
        text.append(f"They found a {thing} and {name} took the {thing} home.")
    tail = " ".join(recap[kind].format(v=value[kind]) for kind in recap if kind in value)
    text.append(
        rng.one(
            (
                f"So {mood} {name} {tail} has {number} friends on {day}.",
                f"That is {name} {tail}, {mood} with {number} friends every {day}.",
            )
        )
    )
    table = f"name {name} " + " ".join(f"{kind} {value[kind]}" for kind in kinds)
    return ask.say("portrait"), table, " ".join(text)


def _letter(ask: _Ask) -> _Part:
    rng = ask.rng
    writer, reader = rng.some(NAMES, 2)
    thing, adjective, mood, place = rng.one(THINGS), rng.one(ADJECTIVES), rng.one(MOODS), rng.one(PLACES)
    day, hour, dish, food = rng.one(DAYS), rng.one(NUMBERS), rng.one(DISHES), rng.one(FOODS)
    text = [
        f"Dear {reader}, thank you for the {adjective} {thing}.",
        rng.one((f"It makes me {mood}.", f"I was {mood} when I saw it.")),
        rng.one((f"Come to the {place} on {day} at {hour}.", f"Meet me on {day} at {hour} at the {place}.")),
        f"We can make {dish} with {food}.",
    ]
    if ask.long:
        guest, gift = rng.other([n for n in NAMES if n != reader], writer), rng.other(THINGS, thing)
        text.append(f"Call {guest} and bring a {gift} with you.")
        text.append(f"Give {guest} the {gift} and make {dish}.")
    text += [
        rng.one((f"Do not forget: {place}, {day} at {hour}!", f"So on {day} at {hour} the {dish} is ready.")),
        f"Your {mood} {writer} with the {adjective} {thing}",
    ]
    return ask.say("letter", m=writer, n=reader, t=thing), "", " ".join(text)


def _trip(ask: _Ask) -> _Part:
    rng = ask.rng
    days = 4 if ask.long else 2 + rng.below(2)
    city, wear = rng.one(ATTRIBUTES["city"]), rng.one(ITEMS["clothes"])
    places, dishes = rng.some(PLACES, days), rng.some(DISHES, days)
    text = []
    for i in range(days):
        text.append(
            f"Day {i + 1}: "
            + rng.one((f"visit the {places[i]} and eat {dishes[i]}.", f"eat {dishes[i]} at the {places[i]}."))
        )
    best = rng.below(days)
    text += [
        f"Take a {wear} with you.",
        rng.one(
            (
                f"Wear the {wear} at the {places[best]} on day {best + 1}.",
                f"On day {best + 1} the {dishes[best]} in {city} is best, so bring the {wear}.",
            )
        ),
        f"{city} in {days} days: {_join(places)}!",
    ]
    return ask.say("trip", c=city, k=str(days)), "", " ".join(text)


_TEXT: dict[str, Callable[[_Ask], _Part]] = {
    "story": _story,
    "recipe": _recipe,
    "portrait": _portrait,
    "letter": _letter,
    "trip": _trip,
}


def _single(ask: _Ask, family: str) -> _Part:
    if family in _TEXT:
        return _TEXT[family](ask)
    if family in LIST_OPS:
        kind = ask.pick(family, tuple(ITEMS))
        items = _list_input(ask, [kind])
        instruction, output = _list_part(ask, family, kind, items)
        return instruction, " ".join(items), output
    kind = ask.pick(family, tuple(ATTRIBUTES))
    table = _table_input(ask, kind)
    instruction, output = _table_part(ask, family, kind, table)
    return instruction, " ".join(f"{n} {v}" for n, v in table), output


def _pair(ask: _Ask, ops: tuple[str, str]) -> _Part:
    """Two requests over one input; numbered in instruction and output."""
    parts: list[tuple[str, str]] = []
    if ops[0] in TABLE_OPS:
        shared = [kind for kind in ATTRIBUTES if not any((op, kind) in COMB_OUT for op in ops)]
        kind = ask.rng.one(shared)
        table = _table_input(ask, kind)
        given = " ".join(f"{n} {v}" for n, v in table)
        parts = [_table_part(ask, op, kind, table) for op in ops]
    else:
        kinds = {op: ask.pick(op, tuple(ITEMS)) for op in ops if op in LIST_OPS}
        items = _list_input(ask, list(kinds.values()))
        given = " ".join(items)
        for op in ops:
            if op in LIST_OPS:
                parts.append(_list_part(ask, op, kinds[op], items))
            else:
                instruction, _, output = _TEXT[op](ask)
                parts.append((instruction, output))
    (a, x), (b, y) = parts
    return f"1: {a} 2: {b}", given, f"1: {x} 2: {y}"


SEEN, HELD = range(5), range(5, 7)
WEIGHTS = {**dict.fromkeys((*LIST_OPS, *TABLE_OPS), 3), **dict.fromkeys(TEXTS, 6), "pair": 8}
REPEATING = ("pair", "recipe", "story")  # families that can repeat six words by chance
LONG = ("keep", "drop", "table", *TEXTS)
_FAMILIES = tuple(name for name, weight in WEIGHTS.items() for _ in range(weight))
_SINGLE = tuple(name for name in _FAMILIES if name != "pair")
_LONG = tuple(name for name in _FAMILIES if name in LONG)
_COMB = tuple(sorted({op for op, _ in COMB_OUT}))
_PAIRS_SEEN = tuple(pair for pair in PAIRS if pair not in PAIRS_OUT)
_PAIRS_HELD = tuple(pair for pair in PAIRS if pair in PAIRS_OUT)


def _content(rng: Rng, kind: str) -> tuple[str, _Part]:
    """Family, instruction, input and clean output; kind is a test set, "indist" also for train and dev."""
    ask = _Ask(rng, HELD if kind == "phrase" else SEEN, long=kind == "long", comb=kind == "comb")
    families = {"indist": _FAMILIES, "phrase": _SINGLE, "comb": _COMB, "mix": ("pair",), "long": _LONG}
    family = rng.one(families[kind])
    if family == "pair":
        return family, _pair(ask, rng.one(_PAIRS_HELD if kind == "mix" else _PAIRS_SEEN))
    return family, _single(ask, family)


_GROUP_OF = {word: group for group in reversed(GROUPS) for word in group}


def _spoil(rng: Rng, family: str, output: str) -> str:
    """A noisy version of a reference: facts slip, the end is missing, or it answers another request."""
    kind = rng.one(("slip", "slip", "cut", "other"))
    if kind == "other":
        return _content_of(rng, family)
    words = output.split(" ")
    if kind == "cut":
        return " ".join(words[: max(1, int(len(words) * (0.3 + 0.4 * rng.below(1000) / 1000)))])
    for i, word in enumerate(words):
        bare = word.rstrip(".,:!")
        if bare in _GROUP_OF and rng.chance(0.4):
            words[i] = rng.other(_GROUP_OF[bare], bare) + word[len(bare) :]
    return " ".join(words)


def _content_of(rng: Rng, family: str) -> str:
    ask = _Ask(rng, SEEN)
    return (_pair(ask, rng.one(_PAIRS_SEEN)) if family == "pair" else _single(ask, family))[2]


def records(split: str, settings: TinyInstruct.Settings) -> list[Row]:
    """The records of a split: `example_id`, `family`, `instruction`, `input`, `output`.

    Those of "train" also have `noisy` (the reference was spoiled), some of "teacher_train" a `prefix`.
    Raises: KeyError for an unknown split.
    """
    sizes = {"train": settings.train, "teacher_train": settings.teacher_train, "dev": settings.dev}
    size = {**sizes, **{f"test/{name}": settings.test for name in SETS}}[split]
    return [_record(split, index, settings) for index in range(size)]


def _record(split: str, index: int, settings: TinyInstruct.Settings) -> Row:
    kind = split.removeprefix("test/") if split.startswith("test/") else "indist"
    trained = split in ("train", "teacher_train")
    rng = Rng(stable_hash("tiny_instruct", settings.world, split, index))
    while True:
        family, (instruction, given, output) = _content(rng, kind)
        if (stable_hash(instruction, given) % FREE_SHARE == 0) == trained:
            continue
        if family not in REPEATING or not repeats(f"{instruction} | {given} | {output}"):
            break
    row: Row = {
        "example_id": stable_hash(split, index),
        "family": family,
        "instruction": instruction,
        "input": given,
        "output": output,
    }
    if split == "train":
        row["noisy"] = rng.chance(settings.noise)
        if row["noisy"]:
            row["output"] = _spoil(rng, family, output)
    elif split == "teacher_train" and rng.chance(settings.prefix):
        drawn = " ".join(rng.one(words()) for _ in range(rng.one(PREFIX_WORDS))) + " "
        row["prefix"] = re.sub(r" (?=[.,:!?])", "", drawn)
    return row


def repeats(text: str, n: int = 6) -> bool:
    """Whether some n words and marks in a row occur twice; the papers' decoding forbids that for n = 6."""
    tokens = _TOKEN.findall(text)
    return len({tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}) < len(tokens) - n + 1


_TOKEN = re.compile(r"[A-Za-z0-9]+|[.,:!?|]")


@lru_cache
def words() -> tuple[str, ...]:
    """Every word and punctuation mark that a record can hold, and those of `PROMPT_TEXT`, sorted."""
    texts = [text for group in PHRASINGS.values() for text in group]
    texts += [word for group in GROUPS for word in group] + [*ITEMS, *ONE.values(), *ATTRIBUTES, *DISHES]
    texts += ["name", "1", "2", "3", "4", "5", "hot cold sweet fresh", PROMPT_TEXT]
    rng = Rng(0)
    for kind in ("indist", "long"):
        for family in (*LIST_OPS, *TABLE_OPS, *TEXTS):
            for _ in range(100):
                texts.append(_single(_Ask(rng, SEEN, long=kind == "long"), family)[2])
    found = {token for text in texts for token in _TOKEN.findall(re.sub(r"\{.\}", " ", text))}
    return tuple(sorted(found))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of this world: each fixed piece of the template is one token, pad is eos.

    Ids: eos, unk, the four pieces, then `words()`. Every prompt and response decodes to the text it was.
    """
    vocabulary = {token: i for i, token in enumerate((EOS, UNK, *PIECES, *words()))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    glue = [decoders.Replace(f" {mark}", mark) for mark in ".,:!?"]
    lines = [decoders.Replace("\n ", "\n"), decoders.Replace(" \n", "\n")]
    # the WordPiece decoder joins with spaces; no word starts with its prefix
    core.decoder = decoders.Sequence([decoders.WordPiece("##", False), decoders.Fuse(), *glue, *lines])
    core.add_special_tokens([AddedToken(EOS, normalized=False), AddedToken(UNK, normalized=False)])
    core.add_tokens([AddedToken(piece, normalized=False) for piece in PIECES])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=EOS, pad_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


class TinyInstruct(InstructionTask):
    """The embedded instruction world; splits train, teacher_train, dev and the five test sets."""

    name = "tiny_instruct"

    @dataclass
    class Settings(InstructionTask.Settings):
        """What world is made; sizes are numbers of records, lengths are tokens."""

        max_prompt: int = 64  # the longest prompt has about 50
        max_length: int = 160  # the longest record about 115
        world: int = 1  # seed of the world
        train: int = 4000  # records with noisy references, for student init and distillation
        teacher_train: int = 24000  # clean records, for the teacher
        dev: int = 200
        test: int = 300  # records of each test set
        noise: float = 0.3  # share of `train` with a spoiled reference
        prefix: float = 0.5  # share of `teacher_train` with 5 to 10 words before the template

    def splits(self) -> list[str]:
        return list(SPLITS)

    def load(self, split: str) -> list[Row]:
        return records(split, self.settings)

    def tokenizer(self, name: str = "") -> PreTrainedTokenizerFast:
        return build_tokenizer()
