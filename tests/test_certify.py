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


def test_what_is_not_claimed() -> None:
    good = tally([1.0, 1.0], 0.0, 1.0)
    assert row("markov1", ALIVE, 1.0, good)["verdict"] == "exact"
    wide = tally((5 + np.random.default_rng(0).standard_normal(50)).tolist(), 0.0, 5.0)
    late = Case("ex_acc_err_alive", (("length", 30),), "%")
    assert row("stops_earlier", late, 5.0, wide)["verdict"] == "survival"
    assert row("markov1", Case("loop_rate", (), ""), 0.01, wide)["verdict"] == "events"
    lost = tally([math.nan] * 60 + [5.0, 6.0], 1.0, 5.0)
    assert row("markov1", ALIVE, 5.0, lost)["verdict"] == "undefined"
    assert certify.failed([row("stops_earlier", late, 5.0, wide), row("markov1", ALIVE, 5.0, lost)]) == []


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
    """The first response token left out, as the published script does, and an interval of one prompt less."""
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
