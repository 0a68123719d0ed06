"""Certification: that it passes where estimators are right, and says so where one is not."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdbench import certify, estimators
from kdbench.certify import Case, Plan, Tally, arrays_of, cases, row
from kdbench.errors import UserError
from kdbench.worlds.catalogue import world
from kdbench.worlds.truth import Truth

ALIVE = Case("ex_acc_err_alive", (("length", 15),), "%")


def tally(values: list[float], half: float, truth: float) -> Tally:
    found = Tally()
    for value in values:
        found.add(value, value - half, value + half, truth)
    return found


def test_a_tally_by_hand() -> None:
    truth = Truth(world("markov1")).value("ex_acc_err_alive", length=15)
    errors = [1.0, -1.0, 3.0, 1.0]
    found = row("markov1", ALIVE, truth, tally([truth + e for e in errors], 2.0, truth))
    assert found["bias"] == pytest.approx(1.0)
    assert found["spread"] == pytest.approx(np.std(errors, ddof=1))
    assert found["bias_se"] == pytest.approx(np.std(errors, ddof=1) / 2)
    assert (found["coverage"], found["below"], found["width"]) == (0.75, 0.0, pytest.approx(4.0))
    halves = (
        tally([truth + e for e in errors[:1]], 2.0, truth),
        tally([truth + e for e in errors[1:]], 2.0, truth),
    )
    joined = row("markov1", ALIVE, truth, halves[0].joined(halves[1]))
    numbers = [key for key, value in found.items() if isinstance(value, float)]
    assert [joined[key] for key in numbers] == pytest.approx([found[key] for key in numbers])


@pytest.mark.parametrize(
    ("shift", "half", "verdict"),
    [(0.0, 1.96, "ok"), (0.2, 1.96, "bias"), (0.0, 1.5, "coverage"), (0.0, 3.0, "coverage")],
)
def test_verdicts(shift: float, half: float, verdict: str) -> None:
    errors = np.random.default_rng(0).standard_normal(2000) + shift
    assert row("markov1", ALIVE, 5.0, tally((5 + errors).tolist(), half, 5.0))["verdict"] == verdict


def values(spread: float = 1.0, count: int = 2000, seed: int = 0) -> list[float]:
    return (5 + spread * np.random.default_rng(seed).standard_normal(count)).tolist()


def test_what_is_not_claimed() -> None:
    wide = tally(values(), 0.0, 5.0)  # intervals of no width: out of bounds wherever it is judged
    late = Case("ex_acc_err_alive", (("length", 30),), "%")
    assert row("stops_earlier", late, 5.0, wide)["verdict"] == "survival"
    assert row("markov1", late, 5.0, wide)["verdict"] == "coverage"  # 0.56 still run
    assert row("hidden", late, 5.0, wide)["verdict"] == "coverage"  # 0.41
    for free in ("acceptance", "state_shift_nats", "minillm_error_nats", "length_term_nats"):
        args = (("length", 30), *((("roll_in", "student"),) if free == "acceptance" else ()))
        assert row("stops_earlier", Case(free, args, ""), 5.0, wide)["verdict"] == "coverage", free
    teachers = Case("accumulated_error_nats", (("length", 30), ("roll_in", "teacher")), "nats")
    assert row("stops_earlier", teachers, 5.0, wide)["verdict"] == "coverage"
    matched = Case("ex_acc_err_matched", (("length", 15),), "%")
    assert row("stops_earlier", matched, 5.0, wide)["verdict"] == "coverage"
    loops = Case("loop_rate", (), "")
    assert row("markov1", loops, 5.0, wide, loops=9.9)["verdict"] == "events"
    assert row("markov1", loops, 5.0, wide, loops=10.1)["verdict"] == "coverage"
    first = Case("stop_rate", (("length", 1),), "")  # 4 of 200 in markov1, 16 in stops_earlier
    assert row("markov1", first, 5.0, wide)["verdict"] == "events"
    assert row("stops_earlier", first, 5.0, wide)["verdict"] == "coverage"
    growth = Case("growth_exponent", (("length", 15), ("roll_in", "student")), "")
    assert row("equal", growth, math.nan, tally([math.nan] * 9, 1.0, math.nan))["verdict"] == "no truth"


def test_what_is_not_defined_fails_and_nothing_is_exact_without_intervals() -> None:
    lost = tally([math.nan] * 1990 + values(count=10), 1.96, 5.0)
    assert "undefined" in row("markov1", ALIVE, 5.0, lost)["verdict"]
    assert "undefined" in row("markov1", ALIVE, 5.0, tally([math.nan] * 9, 1.0, 5.0))["verdict"]
    off = tally([7.0] * 2000, math.nan, 5.0)
    assert row("markov1", ALIVE, 5.0, off)["verdict"] == "undefined and bias and coverage"
    assert row("markov1", ALIVE, 5.0, tally([7.0] * 2000, 3.0, 5.0))["verdict"] == "bias and coverage"
    good = tally([5.0] * 2000, 0.0, 5.0)
    assert row("markov1", ALIVE, 5.0, good)["verdict"] == "exact"
    rows = [row("markov1", ALIVE, 5.0, one) for one in (lost, off, good)]
    assert certify.failed(rows) == rows[:2]


def test_what_is_out_of_bounds_fails_unless_its_numbers_tell_why() -> None:
    def judged(case: Case, shift: float, low: float, high: float) -> tuple[str, bool]:
        found = Tally()
        for value in values(count=20_000):
            found.add(value + shift, value + shift - low, value + shift + high, 5.0)
        one = row("markov1", case, 5.0, found)
        return certify.why(one), bool(certify.failed([one]))

    means = Case("accumulated_error_nats", (("length", 15), ("roll_in", "student")), "nats")
    assert judged(ALIVE, 0.15, 1.96, 1.96) == ("a ratio of means, whose small bias is of second order", False)
    assert judged(ALIVE, 0.3, 1.96, 1.96) == ("", True)  # too large for that
    assert judged(means, 0.15, 1.96, 1.96) == ("", True)  # no ratio
    assert judged(means, 0.0, 1.5, 1.5) == ("", True)  # too narrow on both sides
    reason, fails = judged(means, 0.0, 2.5, 1.3)
    assert "most misses lie below the truth" in reason
    assert not fails
    assert judged(means, 0.0, 2.5, 0.3) == ("", True)  # too many misses


def test_an_interval_that_is_too_narrow_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdbench import intervals

    true = intervals.band

    def narrow(*args: Any, **named: Any) -> Any:
        point, low, high = true(*args, **named)
        return point, point - 0.5 * (point - low), point + 0.5 * (high - point)

    monkeypatch.setattr(intervals, "band", narrow)
    tallies = certify._repetitions("markov1", 0, 60, [math.nan] * len(cases()))
    at = cases().index(ALIVE)
    found = row("markov1", ALIVE, certify._computed("markov1")[at], Tally(**tallies[at]))
    assert "coverage" in found["verdict"]


def test_the_reference_text_is_drawn_apart_from_both_roll_ins() -> None:
    arrays = arrays_of(world("markov1"), 300, 0, 0)
    for side in ("student", "teacher"):
        assert (arrays["reference_count"] != arrays[f"{side}_count"]).any()
        both = np.corrcoef(arrays["reference_count"].sum(axis=1), arrays[f"{side}_count"].sum(axis=1))
        assert abs(both[0, 1]) < 0.25  # 4 standard errors
    same = np.corrcoef(arrays["student_count"].sum(axis=1), arrays["teacher_count"].sum(axis=1))
    assert same[0, 1] > 0.5  # these share their random numbers


def test_every_case_has_a_truth_or_is_a_repetition_measure() -> None:
    drawn = {case.estimator for case in cases() if not case.computed}
    assert drawn == {"seq_rep", "rep", "loop_rate", "loop_onset_tokens"}
    assert all(
        math.isfinite(x) for x, c in zip(certify._computed("tree"), cases(), strict=True) if c.computed
    )


def test_a_response_of_tokens_alone_has_the_same_repetition() -> None:
    scored = arrays_of(world("grammar"), 300, 1, 0)
    tokens = arrays_of(world("grammar"), 300, 1, 0, scored=False)
    same = [
        key for key in tokens if "_rep_" in key or key in ("student_loop", "student_count", "student_ended")
    ]
    assert len(same) > 8
    for key in same:
        np.testing.assert_array_equal(tokens[key], scored[key][..., : tokens[key].shape[-1]], err_msg=key)


def test_an_estimator_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first response token left out, as the published script does."""
    true = estimators.accumulated_error_curve

    def without_first(arrays: Any, weights: Any, length: int, roll_in: str = "student") -> Any:
        values = true(arrays, weights, length, roll_in)
        return values - values[:, :1]

    monkeypatch.setattr(certify, "PROMPTS", 100)
    plan = Plan(("markov1",), 60, 20_000)
    drawn = [math.nan] * len(cases())
    by_name = {}
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(estimators, "accumulated_error_curve", without_first)
        tallies = certify._repetitions("markov1", 0, plan.repetitions, drawn)
        rows = [
            row("markov1", case, truth, Tally(**one))
            for case, truth, one in zip(cases(), certify._computed("markov1"), tallies, strict=True)
            if case.computed
        ]
        by_name[broken] = {certify._label(one): one["verdict"] for one in rows}
    name = "accumulated_error_nats(15, student)"
    assert by_name[False][name] == "ok"
    assert "bias" in by_name[True][name]


def test_results_are_kept_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(certify, "PROMPTS", 20)
    monkeypatch.setattr(certify, "CHUNK", 3)
    plan = Plan(("equal",), 4, 60)
    rows = certify.certify(plan)
    monkeypatch.setattr(certify, "arrays_of", lambda *_: pytest.fail("made again"))
    assert certify.certify(plan) == rows
    assert {one["repetitions"] for one in rows} == {4}
    exact = [one for one in rows if one["estimator"] == "ex_acc_err_alive"]
    assert all(one["verdict"] == "exact" and one["truth"] == 0 for one in exact)
    text = certify.markdown(rows, plan)
    assert "| `ex_acc_err_alive(15)` | % |" in text


def test_an_unknown_world_is_named() -> None:
    with pytest.raises(UserError, match="--world: no world 'markow1'. Did you mean 'markov1'"):
        Plan(("markow1",))
