"""The transfer analysis: metrics by hand and against scipy, groups, refusals, what a table computes anew."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_kit import make_run
from scipy import stats

from analyses.transfer import VERSION, analyze, dev_scores, entities, token_f1, words
from kdbench.estimators import ESTIMATORS
from kdbench.record import RecordError, RunFolder, Score

Table = list[dict[str, Any]]


def row(i: int, **told: Any) -> dict[str, Any]:
    common = {"example_id": i, "set": "s", "seed": 1, "tokens": 5, "finished": True, "prompt": f"text {i}"}
    return {**common, "response": "", "references": [""], **told}


def classified(
    pairs: Sequence[tuple[int, int]], metric: str = "accuracy", classes: int = 2, **told: Any
) -> Table:
    """Rows with these labels and predictions."""
    return [
        row(
            i, format="classes", metric=metric, label=label, prediction=prediction,
            probabilities=[float(c == prediction) for c in range(classes)], **told,
        )
        for i, (label, prediction) in enumerate(pairs)
    ]  # fmt: skip


def numbers(x: Sequence[float], y: Sequence[float]) -> Table:
    told = {"format": "number", "metric": "pearson_spearman"}
    return [
        row(i, label=float(a), prediction=float(b), **told) for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]


def tagged(*pairs: tuple[str, str]) -> Table:
    """Rows with these tags and predicted tags, given as texts."""
    told = {"format": "tokens", "metric": "entity_f1"}
    return [row(i, label=a.split(), prediction=b.split(), **told) for i, (a, b) in enumerate(pairs)]


def spans(*pairs: tuple[str, list[str]]) -> Table:
    told = {"format": "span", "metric": "token_f1"}
    return [row(i, prediction=text, **told) | {"references": right} for i, (text, right) in enumerate(pairs)]


def run_of(folder: Path, rows: Table, name: str = "s") -> RunFolder:
    run = make_run(folder)
    outputs = folder / "outputs"
    outputs.mkdir(exist_ok=True)
    (outputs / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return run


# ------------------------------------------------------------------------------------------------- entities
@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", []),
        ("B-X I-X O", [("X", 0, 2)]),
        ("B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
        ("I-X I-X O", [("X", 0, 2)]),  # begins without a B
        ("O I-X", [("X", 1, 2)]),
        ("B-X I-Y I-Y", [("X", 0, 1), ("Y", 1, 3)]),  # another type begins a span
        ("B-X I-X I-Y B-Y", [("X", 0, 2), ("Y", 2, 3), ("Y", 3, 4)]),
        ("B-X O I-X", [("X", 0, 1), ("X", 2, 3)]),
        ("B-C-A1 I-C-A1", [("C-A1", 0, 2)]),  # types of roles have hyphens
        ("B I O I", [("", 0, 2), ("", 3, 4)]),
        ("", []),
    ],
)
def test_entities_by_hand(tags: str, found: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == set(found)


def chunks(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The rules of seqeval's default mode, as its `start_of_chunk` and `end_of_chunk` state them."""
    found, begin, before, kind_before = set(), 0, "O", ""
    for at, tag in enumerate([*tags, "O"]):
        mark, kind = tag[0], tag[2:]
        ends = (before, mark) in {("B", "B"), ("B", "O"), ("I", "B"), ("I", "O")}
        ends = ends or (before != "O" and kind_before != kind)
        begins = mark == "B" or (before == "O" and mark == "I") or (mark != "O" and kind_before != kind)
        if ends:
            found.add((kind_before, begin, at))
        if begins:
            begin = at
        before, kind_before = mark, kind
    return found


def test_entities_are_those_of_seqevals_rules() -> None:
    kinds = ("O", "B-X", "I-X", "B-Y", "I-Y")
    for length in range(6):
        for tags in itertools.product(kinds, repeat=length):
            assert entities(tags) == chunks(tags)


def test_entity_f1_is_micro_over_all_texts() -> None:
    """3 of 4 predicted spans are among the 5 true ones: P = 3/4, R = 3/5."""
    rows = tagged(
        ("B-X I-X O B-Y", "B-X I-X O B-Y"),  # 2 right of 2
        ("B-X I-X O O", "B-X O O O"),  # a span cut short is wrong
        ("B-Y O B-X", "B-Y O O"),  # 1 right, 1 missed
        ("O O", "O O"),
    )
    told = dev_scores(rows)
    assert told == {"score": pytest.approx(2 * 100 * 3 / 9), "entity_f1": pytest.approx(2 * 100 * 3 / 9)}


@pytest.mark.parametrize(
    ("pair", "score"),
    [(("O O", "O O"), 0), (("B-X", "O"), 0), (("O", "B-X"), 0), (("B-X", "B-Y"), 0), (("B-X", "B-X"), 100)],
)
def test_entity_f1_at_its_limits(pair: tuple[str, str], score: float) -> None:
    assert dev_scores(tagged(pair))["score"] == score


# -------------------------------------------------------------------------------------------------- answers
def test_words_are_compared_as_squad_does() -> None:
    assert words("The  U.S. (a Cat's) an-other, ANswer!") == ["us", "cats", "another", "answer"]
    assert words("theatre an") == ["theatre"]


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the red hat", "Red Hat.", 100),
        ("a big red hat", "red hat", 100 * 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # P 2/3, R 1
        ("cat cat cat", "cat cat dog", 100 * 2 / 3),  # words count as often as they are there
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("cat", "the", 0),
        ("a", "the", 100),
    ],
)
def test_token_f1_by_hand(answer: str, reference: str, score: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(score)
    assert token_f1(reference, answer) == pytest.approx(score)


def test_answers_take_their_best_reference() -> None:
    rows = spans(("big hat", ["hat", "The big hat", "dog"]), ("red hat", ["hat"]), ("dog", ["cat", "mill"]))
    told = dev_scores(rows)
    assert told["token_f1"] == told["score"] == pytest.approx((100 + 100 * 2 / 3 + 0) / 3)
    assert told["exact_match"] == pytest.approx(100 / 3)


# -------------------------------------------------------------------------------------------------- classes
def test_matthews_by_hand() -> None:
    """tp 3, tn 2, fp 1, fn 2: (6 - 2) / sqrt(4 x 5 x 3 x 4)."""
    pairs = [(1, 1)] * 3 + [(0, 0)] * 2 + [(0, 1)] + [(1, 0)] * 2
    told = dev_scores(classified(pairs, "matthews"))
    assert told["score"] == told["matthews"] == pytest.approx(100 * 4 / np.sqrt(240))
    assert told["accuracy"] == pytest.approx(62.5)
    assert told["f1"] == pytest.approx(100 * 6 / 9)


def test_f1_of_two_classes_is_that_of_the_second() -> None:
    """MultiRC over answers, and MRPC's second score."""
    pairs = [(1, 1)] * 4 + [(1, 0)] * 2 + [(0, 1)] * 3 + [(0, 0)] * 11
    told = dev_scores(classified(pairs, "f1"))
    assert told["score"] == told["f1"] == pytest.approx(100 * 2 * 4 / (7 + 6))


def test_f1_of_more_classes_is_their_mean() -> None:
    """CB: class 0 has P 1, R 1/2; class 1 has P 1/2, R 1; class 2 has P 1/2, R 1/2."""
    pairs = [(0, 0), (0, 2), (1, 1), (2, 1), (2, 2)]
    told = dev_scores(classified(pairs, classes=3))
    assert told["f1"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 1 / 2) / 3)
    assert told["score"] == told["accuracy"] == pytest.approx(60)


def test_a_class_that_is_nowhere_does_not_count() -> None:
    """Class 0 has P 1, R 1/2; class 2 has P 1/2, R 1; class 1 is neither label nor prediction."""
    told = dev_scores(classified([(0, 0), (0, 2), (2, 2)], classes=3))
    assert told["f1"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize("prediction", [0, 1])
def test_constant_classes(prediction: int) -> None:
    told = dev_scores(classified([(label, prediction) for label in (0, 0, 0, 1)], "matthews"))
    assert told["matthews"] == told["score"] == 0
    assert told["accuracy"] == (25 if prediction else 75)
    assert told["f1"] == pytest.approx(100 * 2 / 5 if prediction else 0)


def test_all_right_and_all_wrong() -> None:
    pairs = [(0, 0), (1, 1), (1, 1)]
    assert dev_scores(classified(pairs, "matthews"))["matthews"] == pytest.approx(100)
    wrong = [(a, 1 - b) for a, b in pairs]
    told = dev_scores(classified(wrong, "matthews"))
    assert told["matthews"] == pytest.approx(-100)
    assert told["accuracy"] == told["f1"] == 0


def test_a_choice_has_accuracy_alone() -> None:
    rows = [{**one, "format": "choice"} for one in classified([(0, 0), (1, 0), (1, 1), (0, 1)])]
    assert dev_scores(rows) == {"score": 50, "accuracy": 50}


# -------------------------------------------------------------------------------------------------- numbers
def test_correlations_are_scipys() -> None:
    draw = np.random.default_rng(0)
    for count in (5, 60):
        x = draw.integers(0, 6, count).astype(float)  # many ties
        y = np.round(x + 2 * draw.standard_normal(count), 1)
        told = dev_scores(numbers(x, y))
        pearson, spearman = stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic
        assert told["pearson"] == pytest.approx(100 * pearson)
        assert told["spearman"] == pytest.approx(100 * spearman)
        assert told["score"] == told["pearson_spearman"] == pytest.approx(50 * (pearson + spearman))


def test_correlations_by_hand() -> None:
    """x = 1 2 3, y = 1 2 9: deviations -1 0 1 and -3 -2 5, Pearson 8 / sqrt(2 x 38); ranks agree."""
    told = dev_scores(numbers([1, 2, 3], [1, 2, 9]))
    assert told["pearson"] == pytest.approx(100 * 8 / np.sqrt(76))
    assert told["spearman"] == pytest.approx(100)


def test_constant_numbers() -> None:
    assert dev_scores(numbers([1, 2, 3], [2.5] * 3)) == dict.fromkeys(
        ("score", "pearson_spearman", "pearson", "spearman"), 0.0
    )
    assert dev_scores(numbers([3] * 3, [1, 2, 3]))["score"] == 0


# --------------------------------------------------------------------------------------------------- groups
def candidates(*told: tuple[int, str, float, list[str]]) -> Table:
    """Rows of ReCoRD: query, entity, its probability, the answers."""
    rows = classified(
        [(int(name in right), int(chance > 0.5)) for _, name, chance, right in told], "token_f1"
    )
    for one, (group, name, chance, right) in zip(rows, told, strict=True):
        one |= {"group": group, "candidate": name, "references": right, "probabilities": [1 - chance, chance]}
    return rows


def test_the_likeliest_candidate_answers_its_query(tmp_path: Path) -> None:
    rows = candidates(
        (0, "Tom", 0.2, ["Tom Dow", "Dow"]),  # likeliest of its query, below a half: F1 2/3 with "Tom Dow"
        (0, "Ann", 0.1, ["Tom Dow", "Dow"]),
        (3, "Ann", 0.9, ["Bo"]),  # wrong, though Bo is above a half too
        (3, "Bo", 0.8, ["Bo"]),
        (1, "Bo", 0.6, ["Bo"]),  # right
    )
    told = dev_scores(rows)
    assert told == {
        "score": pytest.approx((200 / 3 + 0 + 100) / 3),
        "token_f1": pytest.approx((200 / 3 + 0 + 100) / 3),
        "exact_match": pytest.approx(100 / 3),
    }
    result = analyze(run_of(tmp_path, rows))
    assert result.arrays["prompt"].tolist() == [0, 1, 3]
    assert result.arrays["exact_match"].tolist() == [0, 100, 0]
    assert result.scores["score"].n == 3


def test_the_first_of_equal_candidates_answers(tmp_path: Path) -> None:
    rows = candidates((0, "Ann", 0.4, ["Ann"]), (0, "Bo", 0.4, ["Ann"]))
    assert dev_scores(rows)["score"] == 100
    assert analyze(run_of(tmp_path, rows[::-1])).scores["score"].value == 100  # by number, not by line


# ---------------------------------------------------------------------------------------- the record's scores
ALL = {
    "classes": classified([(0, 0), (1, 0), (1, 1), (0, 0), (1, 1)], "matthews"),
    "classes3": classified([(0, 0), (1, 2), (2, 2), (1, 1)], classes=3),
    "choice": [{**one, "format": "choice"} for one in classified([(0, 0), (1, 0), (1, 1)])],
    "number": numbers([1, 2, 3, 3], [1, 3, 2, 5]),
    "tokens": tagged(("B-X O", "B-X O"), ("B-X I-X", "B-X O"), ("O O", "B-Y O")),
    "span": spans(("a hat", ["hat"]), ("dog", ["big dog"]), ("x", ["y"])),
    "candidates": candidates((0, "Ann", 0.4, ["Ann"]), (0, "Bo", 0.3, ["Ann"]), (1, "Bo", 0.3, ["Ann"])),
}
NAMES = {
    "classes": ["accuracy", "f1", "matthews"],
    "classes3": ["accuracy", "f1", "matthews"],
    "choice": ["accuracy"],
    "number": ["pearson", "pearson_spearman", "spearman"],
    "tokens": ["entity_f1"],
    "span": ["exact_match", "token_f1"],
    "candidates": ["exact_match", "token_f1"],
}


def computed(scored: Score, arrays: dict[str, Any], weights: Any) -> Any:
    """What the table computes anew from the stored arrays, for example weights [R, P]."""
    assert scored.estimator is not None
    inputs = {name: arrays[key] for name, key in scored.arrays.items() if name != "prompt"}
    return ESTIMATORS[scored.estimator](inputs, weights)


@pytest.mark.parametrize("kind", ALL)
def test_scores_follow_from_stored_arrays(tmp_path: Path, kind: str) -> None:
    """With weights 0, 1, 2, ... they are those of the examples taken so often: what a bootstrap draws."""
    rows = ALL[kind]
    result = analyze(run_of(tmp_path, rows))
    assert sorted(result.scores) == sorted(["score", "score/s", *NAMES[kind]])
    told = dev_scores(rows)
    groups = sorted({one.get("group", one["example_id"]) for one in rows})
    draw = random.Random(3)
    drawn = [[draw.randint(0, 2) for _ in groups] for _ in range(4)] + [[1] * len(groups)]
    for name, scored in result.scores.items():
        assert scored.value == pytest.approx(told[name.removesuffix("/s")])
        assert scored.n == len(groups) == len(result.arrays["prompt"])
        assert scored.unit in ("%", "x 100")
        assert scored.direction == "higher"
        again = computed(scored, dict(result.arrays), np.array(drawn, dtype=np.float64))
        assert again[-1] == pytest.approx(scored.value)
        for value, counts in zip(again, drawn, strict=True):
            number = itertools.count()
            repeated = [
                {**one, "example_id": next(number), **({"group": (group, copy)} if "group" in one else {})}
                for group, count in zip(groups, counts, strict=True)
                for copy in range(count)
                for one in rows
                if one.get("group", one["example_id"]) == group
            ]
            if repeated:
                assert value == pytest.approx(dev_scores(repeated)[name.removesuffix("/s")], abs=1e-9)


def test_the_order_of_lines_changes_nothing(tmp_path: Path) -> None:
    for kind, rows in ALL.items():
        one = analyze(run_of(tmp_path / kind, rows))
        other = analyze(run_of(tmp_path / f"{kind} back", rows[::-1]))
        assert one.scores == other.scores
        assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def test_scores_reach_the_record(tmp_path: Path) -> None:
    run = run_of(tmp_path, ALL["number"], "stsb")
    run.add("transfer", VERSION, analyze(run))
    scores = run.record.scores
    assert scores["transfer/score"].value == scores["transfer/score/stsb"].value
    assert scores["transfer/score"].value == scores["transfer/pearson_spearman"].value
    assert scores["transfer/score"].unit == "x 100"


# ------------------------------------------------------------------------------------------------- refusals
def changed(kind: str, at: int = 1, **told: Any) -> Table:
    """Rows of which one says something else; None: leaves it out."""
    rows = [dict(one) for one in ALL[kind]]
    rows[at] |= told
    rows[at] = {name: value for name, value in rows[at].items() if value is not None}
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (changed("classes", label=None), "line 2: 'label' is missing or of the wrong type"),
        (changed("classes", example_id="1"), "line 2: 'example_id' is missing or of the wrong type"),
        (changed("classes", format="choice"), "line 2: format is 'choice', in line 1 'classes'"),
        (changed("classes", metric="f1"), "line 2: metric is 'f1', in line 1 'matthews'"),
        (changed("classes", label=2), "line 2: label 2 is none of the classes 0..1"),
        (changed("classes", probabilities=[1.0]), "line 2: has probabilities of 1 classes"),
        (changed("candidates", candidate=None), "'candidate' and 'group' should be in all rows or in none"),
        (changed("candidates", group=None), "'candidate' and 'group' should be in all rows or in none"),
        (changed("candidates", references=[]), "line 2: has no reference"),
        (changed("number", prediction=float("nan")), "line 2: 'label' and 'prediction' should be finite"),
        (changed("tokens", prediction=["O"]), "line 2: has 1 tags for 2 words"),
        (changed("span", references=[]), "line 2: has no reference"),
        ([{**one, "format": "clases"} for one in ALL["classes"]], "no format 'clases'"),
        (
            [{**one, "metric": "entity_f1"} for one in ALL["classes"]],
            "no metric 'entity_f1'. Known: accuracy",
        ),
    ],
)
def test_rows_that_cannot_be_scored(tmp_path: Path, rows: Table, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        dev_scores(rows)
    with pytest.raises(RecordError, match=message):
        analyze(run_of(tmp_path, rows))


def test_runs_that_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="should hold one set, holds none"):
        analyze(make_run(tmp_path / "none"))
    run = run_of(tmp_path / "two", ALL["span"], "a")
    run_of(tmp_path / "two", ALL["span"], "b")
    with pytest.raises(RecordError, match="should hold one set, holds a, b"):
        analyze(run)
    twice = [*ALL["span"], {**ALL["span"][2], "seed": 2}]
    with pytest.raises(RecordError, match="example 2 is there twice; one generation seed is enough"):
        analyze(run_of(tmp_path / "twice", twice))
