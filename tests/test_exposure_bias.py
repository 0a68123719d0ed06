"""The analysis of exposure bias: scores, warnings, comparison, figures, and the words of its summary."""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from record_kit import add_scores, make_manifest, make_record, make_run, response_rows, write_rows
from test_analyses import assert_scores_follow_from_arrays

from analyses import exposure_bias
from analyses._exposure_rows import reach
from analyses._exposure_summary import _number, side, word
from analyses.exposure_bias import Settings
from kdbench import counterfactuals, estimators, intervals, per_prompt
from kdbench.certify import arrays_of
from kdbench.compare import paired
from kdbench.counterfactuals import InterventionConfig, describe, write_intervention
from kdbench.errors import UserError
from kdbench.evidence import COLUMNS, read_evidence, write_evidence
from kdbench.intervals import Estimate
from kdbench.record import Analysis, Named, RecordError, RunFolder, RunRecord, Score, save
from kdbench.worlds.catalogue import stop_rate
from kdbench.worlds.truth import Truth

LONGER = {**make_manifest().decoding, "max_new_tokens": 16}
Lists = Sequence[list[float]]
NAME = "exposure_bias"


def collect(
    path: Path,
    students: Lists,
    teachers: Lists,
    columns: dict[str, dict[str, list[float]]] | None = None,
    **manifest: Any,
) -> None:
    """Evidence of one finished response per prompt; the lists are its KL per token, `columns` by roll-in."""
    rows = []
    for name, responses in (("student", students), ("teacher", teachers)):
        for example, kl in enumerate(responses):
            rows += response_rows(name, example, 0, kl, True, **(columns or {}).get(name, {}))
    write_rows(path, rows, **{"decoding": LONGER, **manifest})


def scored(run: RunFolder, settings: Settings | None = None) -> RunRecord:
    return run.add(NAME, exposure_bias.VERSION, exposure_bias.analyze(run, settings))


def values(record: RunRecord) -> dict[str, float | None]:
    return {name.removeprefix(f"{NAME}/"): one.value for name, one in record.scores.items()}


def sampled(path: Path, prompts: int, draws: int, longest: int, **manifest: Any) -> None:
    """Evidence with responses of random lengths and divergences, the same for the same arguments."""
    rng, parts, names = np.random.default_rng(prompts), [], []
    for name in ("student", "teacher", "reference"):
        count = prompts * draws
        tokens = np.minimum(rng.geometric(2.5 / longest, count), longest)
        rows = tokens + (tokens == longest)
        response = np.repeat(np.arange(count), rows)
        position = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        alive = position < tokens[response]
        part: dict[str, Any] = {column: rng.random(len(response)) for column in COLUMNS}
        part |= {"example_id": response // draws, "draw": response % draws, "position": position}
        part |= {"alive": alive, "context": np.zeros(len(alive), dtype=bool)}
        part["token"] = np.where(alive, rng.integers(0, 9, len(alive)), -1)
        part |= {key: 0 - part[key] for key in ("student_log_prob", "teacher_log_prob")}
        parts.append(part)
        names += [name] * len(alive)
    columns = {column: np.concatenate([part[column] for part in parts]) for column in COLUMNS}
    decoding = {**LONGER, "max_new_tokens": longest}
    write_evidence(path, {**columns, "roll_in": names}, make_manifest(decoding=decoding, **manifest))


# --------------------------------------------------------------------------------------------------- scores
def test_every_score_by_hand(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    columns = {
        "student": {
            "reverse_kl": [0.5] * 6,
            "total_variation": [0.25] * 6,
            "teacher_entropy": [2.0] * 6,
            "teacher_log_prob": [-3.0] * 6,
            "student_entropy": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        },
        "teacher": {
            "total_variation": [0.125] * 5,
            "teacher_entropy": [1.5] * 5,
            "teacher_log_prob": [-1.0] * 5,
        },
    }
    collect(run.evidence, [[2.0] * 6, [4.0] * 6] * 3, [[1.0] * 5, [2.0] * 5] * 3, columns)
    record = scored(run)
    found = values(record)
    expected = {
        "accumulated_error@5": 15,
        "teacher_error@5": 7.5,
        "ex_acc_err@5": 100,
        "excess@5": 7.5,
        "ex_acc_err_matched@5": 100,
        "ex_acc_err_arora_paper@5": 100,
        "length_term@15": 3,  # the sixth token of the student, 3 nats
        "state_term@15": 7.5,
        "growth_exponent@5": 1,
        "teacher_growth_exponent@5": 1,
        "eb_c@5": 2,
        "state_shift@15": 3,
        "state_shift_reverse@15": 7.5,
        "acceptance@5": 0.75,
        "teacher_acceptance@5": 0.875,
        "acceptance_drop@15": 0.125,
        "teacher_entropy_rise@5": 0.5,
        "teacher_surprise_rise@5": 2,
        "entropy_drift@5": 0.1,
        "eos_hazard_ratio@15": 5 / 6,
        "survival@5": 1,
        "survival@15": 0,
        "teacher_survival@15": 0,
        "length": 6,
        "teacher_length": 5,
        "length_q50": 6,
        "teacher_length_q90": 5,
        "stop_rate": 1,
        "truncation_rate": 0,
        "seq_rep_4": 0,
        "rep_16": 0,
        "loop_rate": 0,
        # the script: positions 1.. of each response, 5 of the student's and 4 of the teacher's, over 1.001
        "accumulated_error_minillm@5": 15 / 1.001,
        "teacher_error_minillm@15": 6 / 1.001,
        "ex_acc_err_minillm@5": 150,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    none = [found[f"{name}@15"] for name in ("ex_acc_err", "ex_acc_err_minillm", "ex_acc_err_arora_paper")]
    assert [*none, found["loop_onset"]] == [None] * 4
    assert "excess@15" not in found
    assert "ex_acc_err_minillm@30" not in found
    detail = record.analyses[NAME]["detail"]
    assert detail["left_out"]["excess@15"] == "survival 0.000 is below 0.2"
    assert detail["left_out"]["ex_acc_err@30"] == "responses have at most 16 tokens"
    assert "reference roll-in" in detail["left_out"]["ex_acc_err_arora_code"]
    assert "--profile minillm" in detail["left_out"]["minillm/ex_acc_err_minillm"]
    assert detail["curve"]["accumulated_error"] == [3, 6, 9, 12, 15]
    assert detail["profile"] == "plain"
    assert detail["conditions"]["teacher"] == "t"
    assert record.scores[f"{NAME}/accumulated_error@5"].args == {"length": 5, "roll_in": "student"}
    assert_scores_follow_from_arrays(run)


def test_repetition_and_loops_by_hand(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    tokens = [3, 2, 2, 2, 2, 2, 0]
    rows = response_rows("student", 0, 0, [1.0] * 7, True, tokens)
    write_rows(run.evidence, rows + response_rows("teacher", 0, 0, [1.0] * 7, True), decoding=LONGER)
    found = values(scored(run))
    assert found["seq_rep_4"] == pytest.approx(1 - 3 / 4)  # 3222 2222 2222 2220
    assert found["rep_16"] == pytest.approx(4 / 7)
    assert (found["loop_rate"], found["loop_onset"], found["teacher_loop_rate"]) == (1, 1, 0)


def test_intervals_hold_the_value_and_warnings_stand_beside_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    sampled(run.evidence, 30, 2, 40)
    record = scored(run)
    for name, score in record.scores.items():
        low, high = score.detail["low"], score.detail["high"]
        if low is None:
            assert score.detail["warning"], name
        else:
            assert low - 1e-9 <= score.value <= high + 1e-9, name
    assert record.scores[f"{NAME}/ex_acc_err@15"].detail["low"] < 0
    assert_scores_follow_from_arrays(run)


# what version 1 of this analysis gave on the same evidence
BEFORE = {
    "length": 17.0,
    "teacher_length": 13.958333333333334,
    "ex_acc_err_minillm@1": -19.9128946743603,
    "accumulated_error_minillm@1": 0.5162060105552276,
    "teacher_error_minillm@1": 0.6445557102560997,
    "ex_acc_err@1": 42.52079942801315,
    "accumulated_error@1": 0.6010231599211693,
    "teacher_error@1": 0.421709085504214,
    "survival@1": 1.0,
    "teacher_survival@1": 1.0,
    "ex_acc_err_minillm@5": -1.7482159326884503,
    "accumulated_error_minillm@5": 2.332821614175676,
    "teacher_error_minillm@5": 2.3743300300557166,
    "ex_acc_err@5": 6.931184736714265,
    "accumulated_error@5": 2.6218685465287965,
    "teacher_error@5": 2.4519213482805373,
    "survival@5": 0.8333333333333334,
    "teacher_survival@5": 0.75,
    "ex_acc_err_minillm@15": -17.263141597461853,
    "accumulated_error_minillm@15": 5.490853884867344,
    "teacher_error_minillm@15": 6.636526925101255,
    "ex_acc_err@15": -11.456467805404698,
    "accumulated_error@15": 7.000756742181019,
    "teacher_error@15": 7.906570439041447,
    "survival@15": 0.4583333333333333,
    "teacher_survival@15": 0.4166666666666667,
    "accumulated_error_minillm@30": 9.33450216053825,
    "teacher_error_minillm@30": 9.659034186586117,
}


def test_the_numbers_of_version_1_are_unchanged(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    sampled(run.evidence, 12, 2, 40)
    found = values(scored(run))
    assert {name: found[name] for name in BEFORE} == pytest.approx(BEFORE, rel=1e-12)
    assert found["ex_acc_err_minillm@30"] is None  # -3.36 with a tenth of the responses still running


def test_low_survival_leaves_out_or_warns(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[1.0]] * 9 + [[1.0] * 8], [[1.0] * 8] * 10)
    record = scored(run)
    for name in ("excess", "accumulated_error", "eb_c", "growth_exponent", "entropy_drift"):
        assert f"{NAME}/{name}@5" not in record.scores
        assert record.analyses[NAME]["detail"]["left_out"][f"{name}@5"] == "survival 0.100 is below 0.2"
    for name in ("", "_matched", "_minillm", "_arora_paper"):
        score = record.scores[f"{NAME}/ex_acc_err{name}@5"]
        assert score.value is None
        assert score.detail == {
            "low": None,
            "high": None,
            "warning": "survival at l = 5 is 0.100, below 0.2: no number.",
        }
    for name in (
        *("accumulated_error_minillm", "teacher_error_minillm", "length_term", "state_term", "state_shift"),
        *("acceptance", "acceptance_drop", "survival", "teacher_survival", "teacher_entropy_rise"),
    ):
        score = record.scores[f"{NAME}/{name}@5"]
        assert score.value is not None
        assert set(score.detail) == {"low", "high"}


def test_every_ratio_follows_the_rules_of_the_intervals(tmp_path: Path) -> None:
    """One rule: scores and `ex_acc_err_estimate` say the same, at every l and for every variant."""
    run = make_run(tmp_path)
    sampled(run.evidence, 20, 1, 40)
    record, found = scored(run), per_prompt.arrays(read_evidence(run.evidence))
    names = {"alive": "", "matched": "_matched", "arora22-paper": "_arora_paper", "minillm-code": "_minillm"}
    for variant, suffix in names.items():
        for length in (1, 5, 15, 30):
            score = record.scores[f"{NAME}/ex_acc_err{suffix}@{length}"]
            one = intervals.ex_acc_err_estimate(found, length, variant)
            assert [score.value, score.detail["low"], score.detail["high"]] == [
                None if x is None else pytest.approx(x, rel=1e-9) for x in (one.value, one.low, one.high)
            ]
            assert score.detail.get("warning", "") == one.warning
    assert record.value(f"{NAME}/ex_acc_err@5") is not None
    assert record.value(f"{NAME}/ex_acc_err@30") is None


def test_rates_of_few_events_are_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[1.0, 1.0]] * 12, [[1.0]] * 12)
    record = scored(run)
    for name, said in {
        "loop_rate": "with a loop",
        "teacher_loop_onset": "with a loop",
        "stop_rate": "without an end token",
        "truncation_rate": "without an end token",
        "eos_hazard_ratio@1": "with an end token",  # the student's second token is the end
    }.items():
        detail = record.scores[f"{NAME}/{name}"].detail
        assert detail["warning"] == f"fewer than 10 events: responses {said}, 0.", name
    assert record.value(f"{NAME}/stop_rate") == 1
    assert "warning" not in record.scores[f"{NAME}/eos_hazard_ratio@5"].detail  # 12 ends under either roll-in
    text = exposure_bias.summary(run)
    assert "end in a loop 0 [0, 0], teacher 0 [0, 0]: nothing can be told, fewer than 10 events" in text
    assert "the student stops later" in text
    assert "Warning: loop_rate, teacher_loop_rate" in text


def test_epsilon_near_zero_gives_nats_instead_of_a_ratio(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[1.0, 1.0]] * 3, [[0.0, 1e-7]] * 3)
    score = scored(run).scores[f"{NAME}/ex_acc_err@1"]
    assert score.value is None
    assert "no ratio" in score.detail["warning"]
    assert score.detail["excess_nats"] == {"value": 1, "low": 1, "high": 1}


def test_a_stop_rate_alone_moves_minillm_code_and_neither_alive_nor_matched() -> None:
    """One prompt set per world of the family where only the student's stop rate changes."""
    found: dict[str, list[float]] = {"minillm-code": [], "alive": [], "matched": []}
    for rate in (0.01, 0.03, 0.06):
        place = stop_rate(rate)
        arrays, truth = arrays_of(place, 200, 2, 0), Truth(place)
        for variant, values in found.items():
            one = intervals.ex_acc_err_estimate(arrays, 15, variant)
            assert None not in (one.value, one.low, one.high)
            values.append(one.value)  # type: ignore[arg-type]
            if variant != "minillm-code":
                expected = truth.value(intervals.VARIANTS[variant].estimator, length=15)
                assert one.low < expected < one.high, (variant, rate)  # type: ignore[operator]
    spread = {variant: max(values) - min(values) for variant, values in found.items()}
    assert spread["minillm-code"] > 30
    assert max(spread["alive"], spread["matched"]) < 5


def test_a_teacher_compared_with_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[0.0] * 6] * 2, [[0.0] * 5] * 2)
    record = scored(run)
    for name in ("ex_acc_err", "ex_acc_err_matched", "ex_acc_err_arora_paper", "ex_acc_err_minillm"):
        for length in (5, 15):  # also where no response is that long
            score = record.scores[f"{NAME}/{name}@{length}"]
            assert (score.value, score.detail) == (0, {"low": 0, "high": 0})
    assert_scores_follow_from_arrays(run)


def test_where_no_ratio_is_given_curves_hold_none(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    students, teachers = [[1.0, 1.0, 1.0]] * 3, [[0.0, 1.0, 1.0]] * 3
    collect(run.evidence, students, teachers)
    collect(run.path / "evidence" / "snapshot-2.parquet", students, [[0.0, 0.0, 1.0]] * 3, step=2)
    detail = scored(run).analyses[NAME]["detail"]
    assert detail["curve"]["ex_acc_err"] == [None, 100, 50]
    assert detail["curve"]["teacher_error"] == [0, 1, 2]
    snapshot = detail["snapshots"][0]
    assert snapshot["ex_acc_err"] == [None, None, 200]
    assert snapshot["ex_acc_err_minillm"] == [None, 100, 100] + [None] * 13  # survival: 3 of 16 tokens


def test_context_and_reference_carry_arora_code(tmp_path: Path) -> None:
    run, rows = make_run(tmp_path), []
    for name, kl in (("student", 3.0), ("reference", 1.0), ("teacher", 2.0)):
        rows += response_rows(name, 0, 0, [kl] * 2, True)
        context = response_rows(name, 0, 0, [1.0], True)
        rows += [{**row, "context": True, "alive": False, "position": -1} for row in context]
    write_rows(run.evidence, rows)
    record = scored(run)
    assert record.value(f"{NAME}/ex_acc_err_arora_code@1") == 100  # 1 + 3 against 1 + 1
    write_rows(run.evidence, [row for row in rows if not row["context"]])
    assert "context rows" in scored(run).analyses[NAME]["detail"]["left_out"]["ex_acc_err_arora_code"]


def test_profiles_and_divergences_have_prefixes(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(
        run.evidence, [[2.0] * 3], [[1.0] * 3], {"student": {"jsd": [0.5] * 3}, "teacher": {"jsd": [0.1] * 3}}
    )
    banned = {**LONGER, "no_repeat_ngram": 6}
    collect(run.evidence_of("minillm"), [[3.0] * 3], [[1.0] * 3], profile="minillm", decoding=banned)
    record = scored(run, Settings(["jsd"], resamples=200))
    found, detail = values(record), record.analyses[NAME]["detail"]
    assert found["minillm/ex_acc_err_minillm@1"] == pytest.approx(200)
    assert found["ex_acc_err@1"] == 100
    assert found["jsd/ex_acc_err@1"] == pytest.approx(400)
    assert found["jsd/accumulated_error@1"] == pytest.approx(0.5)
    assert "jsd/length" not in found
    assert found["minillm/length"] == 3
    assert detail["profiles"]["minillm"]["conditions"]["decoding"]["no_repeat_ngram"] == 6
    assert "minillm/ex_acc_err_minillm" not in detail["left_out"]
    assert_scores_follow_from_arrays(run)
    with pytest.raises(UserError, match="no divergence 'jds'. Did you mean 'jsd'?"):
        Settings(["jds"])
    with pytest.raises(UserError, match="100 or more"):
        Settings(resamples=5)


def test_snapshots_keep_their_curves_with_and_without_the_teacher(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[2.0, 2.0]], [[1.0, 1.0]])
    for step in (10, 2):
        collect(run.path / "evidence" / f"snapshot-{step}.parquet", [[3.0, 3.0]], [[1.0, 2.0]], step=step)
    write_rows(run.path / "evidence" / "snapshot-20.parquet", response_rows("student", 0, 0, [5.0], True))
    snapshots = scored(run).analyses[NAME]["detail"]["snapshots"]
    assert [one["step"] for one in snapshots] == [2, 10, 20]
    assert snapshots[0]["ex_acc_err"] == [200, 100]
    assert snapshots[0]["length"] == 2
    assert snapshots[2]["accumulated_error"] == [5]
    assert "ex_acc_err" not in snapshots[2]


def test_missing_and_damaged_evidence_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(RecordError, match="final.json: cannot be read"):
        exposure_bias.analyze(run)
    write_rows(run.evidence, response_rows("student", 0, 0, [5.0], True))
    with pytest.raises(RecordError, match="final.parquet: lacks the teacher roll-in"):
        exposure_bias.analyze(run)
    rows = response_rows("student", 0, 0, [5.0], True) + response_rows("teacher", 1, 0, [5.0], True)
    write_rows(run.evidence, rows)
    with pytest.raises(RecordError, match="other prompts under teacher"):
        exposure_bias.analyze(run)
    collect(run.evidence, [[1.0]], [[1.0]])
    run.evidence.write_bytes(run.evidence.read_bytes()[:-1])
    with pytest.raises(RecordError, match="final.parquet: was cut or altered"):
        exposure_bias.analyze(run)


def test_files_of_other_runs_and_profiles_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    folder = run.path / "evidence"

    def refused(said: str) -> None:
        with pytest.raises(RecordError, match=said) as error:
            exposure_bias.analyze(run)
        assert len(str(error.value).splitlines()) == 1

    lists: tuple[Lists, Lists] = [[2.0] * 3] * 3, [[1.0] * 3] * 3
    collect(run.evidence, *lists, run="other")
    refused("final.parquet: belongs to run other, not to abc123.")
    collect(run.evidence, *lists, run="abc123")
    intervene(run, run="abc123")
    exposure_bias.analyze(run)
    collect(folder / "snapshot-2.parquet", *lists, step=2, run="other")
    refused("snapshot-2.parquet: belongs to run other")
    collect(folder / "snapshot-2.parquet", *lists, step=2)
    collect(run.evidence_of("minillm"), *lists)
    refused("final-minillm.parquet: was made in the decoding profile 'plain'")
    collect(run.evidence_of("minillm"), *lists, profile="minillm")
    exposure_bias.analyze(run)
    intervene(run, run="other")
    refused("hand_over.parquet: belongs to run other")
    intervene(run, models={"student": "another", "teacher": "t"})
    refused("hand_over.parquet: is of another student")
    intervene(run)
    for suffix in ("parquet", "json"):
        shutil.copy(
            folder / f"interventions/recovery.{suffix}", folder / f"interventions/corruption.{suffix}"
        )
    refused("corruption.parquet: holds the intervention 'recovery'")
    intervene(run)
    scored(run)
    (folder / "interventions" / "recovery.parquet").write_bytes(b"cut")
    before = run.record
    refused("recovery.parquet: was cut or altered")
    with pytest.raises(RecordError, match="recovery.parquet: was cut or altered"):
        exposure_bias.figures(run, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
    assert run.record == before


# ------------------------------------------------------------------------------------- interventions (scores)
def test_scores_of_interventions_by_hand(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[1.0] * 3] * 3, [[1.0] * 3] * 3)
    intervene(run)
    record = scored(run)
    found = values(record)
    for kind in counterfactuals.KINDS:
        assert found[f"recovery/area_{kind}@0"] == pytest.approx(1.25)
        assert found[f"recovery/half_life_{kind}@0"] == pytest.approx(1 + 0.5 / 0.75)
        # the mean excess over 5 tokens is 0.25 at a rate of 0.2: a triangle
        assert found[f"corruption/area_{kind}"] == pytest.approx(0.2 * 0.25 / 2)
    assert [name for name in found if name.startswith("hand_over/")] == [
        "hand_over/gain@2",
        "hand_over/gain@5",
    ]
    assert found["hand_over/gain@2"] == pytest.approx(-10)
    assert found["hand_over/gain@5"] == 0
    assert record.scores[f"{NAME}/hand_over/gain@2"].detail == {"low": -10, "high": -10}
    assert record.scores[f"{NAME}/corruption/area_random"].unit == "nats"
    assert_scores_follow_from_arrays(run)
    assert set(record.conditions(f"{NAME}/recovery/area_random@0")["settings"]) >= {"nucleus", "special"}
    intervene(run, (1.0, 1.0, 0.75, 0.75))
    score = scored(run).scores[f"{NAME}/recovery/half_life_random@0"]
    assert score.value is None
    assert score.detail["warning"] == "the excess does not fall to half within 4 tokens."
    intervene(run, (1.0, 0.25, 0.0, 0.0), short=True)  # of three corrupted responses none has five tokens
    for name in ("area", "half_life"):
        score = scored(run).scores[f"{NAME}/recovery/{name}_random@0"]
        assert score.value is None
        assert score.detail["warning"] == "survival 4 tokens behind is 0.000, below 0.2: no number."


def test_interventions_are_compared_in_pairs_and_refused_under_other_settings(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    intervene(one)
    intervene(other, (1.0, 0.75, 0.25, 0.0))
    for run in (one, other):
        scored(run)
    names = [f"{NAME}/{name}" for name in ("recovery/half_life_random@0", "corruption/area_random")]
    half, area = paired([one], [other], names)
    assert half.difference.value == pytest.approx(1.5 / 0.9 - 2.5, abs=0.01)
    assert area.difference.value == pytest.approx(-0.2 * 0.15 / 2)
    assert half.difference.low is not None
    exposure_bias.figures([one, other], tmp_path / "figures")
    for change, said in (
        ({"nucleus": 0.5}, r"other settings \(nucleus 0.9 and 0.5\)"),
        ({"hand_over_tokens": (0, 3)}, r"other settings \(hand_over_tokens \[0, 2\] and \[0, 3\]\)"),
    ):
        intervene(other, **change)
        scored(other)
        with pytest.raises(RecordError, match=said):
            paired([one], [other], names)
        with pytest.raises(RecordError, match=said) as error:
            exposure_bias.figures([one, other], tmp_path / "figures")
        assert f"{other.path}/evidence/interventions/hand_over.parquet" in str(error.value)
    for manifest, said in (
        ({"prompts_sha256": "z"}, "other prompts"),
        ({"models": {"student": "s", "teacher": "u"}}, "other teacher"),
        ({"seed": 3}, "other seed of the sampling"),
    ):
        intervene(other, **manifest)
        with pytest.raises(RecordError, match=said):
            exposure_bias.figures([one, other], tmp_path / "figures")


def test_a_run_is_scored_again_in_a_second(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    sampled(run.evidence, 200, 2, 90)
    exposure_bias.analyze(run)
    start = time.process_time()
    exposure_bias.analyze(run)
    assert time.process_time() - start < 4  # about 0.8 on a quiet core


def test_scores_figures_and_summary_need_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[2.0] * 3], [[1.0] * 3])
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name.split('.')[0] not in ('torch', 'transformers'), name\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from pathlib import Path\n"
        "from analyses import exposure_bias as one\n"
        "from kdbench.record import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1]))\n"
        "run.add('exposure_bias', one.VERSION, one.analyze(run))\n"
        "assert one.figures(run, run.path / 'figures')\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------- comparison
def two(folder: Path, **manifest: Any) -> tuple[RunFolder, RunFolder]:
    """Two scored runs on the same prompts; `manifest` changes the second's evidence."""
    one, other = make_run(folder / "one", row="kd"), make_run(folder / "other", row="gkd")
    rng = np.random.default_rng(0)
    teachers = [[float(x) for x in rng.random(3) + 1] for _ in range(20)]
    collect(one.evidence, [[2 * x for x in kl] for kl in teachers], teachers)
    collect(other.evidence, [[1.5 * x for x in kl] for kl in teachers], teachers, **manifest)
    for run in (one, other):
        scored(run)
    return one, other


def test_methods_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    ex_acc_err, length = paired([one], [other], [f"{NAME}/ex_acc_err@1", f"{NAME}/length"])
    assert (ex_acc_err.score, ex_acc_err.a.value, ex_acc_err.b.value) == (
        f"{NAME}/ex_acc_err@1",
        pytest.approx(100),
        pytest.approx(50),
    )
    assert ex_acc_err.difference.value == pytest.approx(50)
    assert ex_acc_err.difference.p_value == pytest.approx(0, abs=0.01)
    assert ex_acc_err.difference.low == pytest.approx(50, rel=1e-5)
    assert (length.difference.value, length.difference.p_value) == (0, 1)
    for run in (one, other):
        add_scores(run, {"rouge": np.arange(5.0)})
    assert paired([one], [other], ["quality/rouge"])[0].difference.value == 0


def test_a_seed_may_be_a_draw_of_the_task_that_both_sides_share(tmp_path: Path) -> None:
    """Revisions differ between draws; a comparison needs them equal draw by draw."""
    sides: list[list[RunFolder]] = [[], []]
    for seed in (1, 2):
        for number, runs in enumerate(sides):
            task = Named("toy", f"draw-{seed}")
            values = {"rouge": np.arange(5.0) + number}
            runs.append(make_run(tmp_path / f"{number}-{seed}", values, seed=seed, task=task))
    found = paired(*sides, ["quality/rouge"])[0]
    assert found.difference.value == pytest.approx(-1)
    other = [sides[1][0], make_run(tmp_path / "x", values, seed=2, task=Named("toy", "another"))]
    with pytest.raises(RecordError, match="0-2 and .*x: quality/rouge is of another task or revision"):
        paired(sides[0], other, ["quality/rouge"])


def test_what_has_no_ratio_is_compared_in_nats(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    collect(other.evidence, [[1.0] * 3] * 20, [[0.0] * 3] * 20)  # the teacher's own error is 0
    scored(other)
    names = ("ex_acc_err@1", "ex_acc_err_minillm@1", "ex_acc_err_arora_paper@1", "ex_acc_err_matched@1")
    for name, found in zip(names, paired([one], [other], [f"{NAME}/{n}" for n in names]), strict=True):
        assert {found.a.unit, found.b.unit, found.difference.unit} == {"nats"}
        assert found.b.value == pytest.approx(1 / 1.001 if "minillm" in name else 1)
        assert found.difference.value == pytest.approx(found.a.value - found.b.value)  # type: ignore[operator]
        assert found.difference.p_value is not None
        assert found.difference.warning.startswith("gkd, seed 1: epsilon may be under 1e-06 nats: no ratio")
    assert found.a.value == pytest.approx(one.record.value(f"{NAME}/excess@1"))


def test_what_too_few_responses_reach_is_not_compared(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    collect(other.evidence, [[1.0]] * 17 + [[1.0] * 6] * 3, [[0.0] * 6] * 20)
    collect(one.evidence, [[1.0] * 6] * 20, [[2.0] * 6] * 20)
    for run in (one, other):
        scored(run)
    found, loops = paired([one], [other], [f"{NAME}/ex_acc_err@5", f"{NAME}/loop_rate"])
    assert (found.a.value, found.b.value, found.difference.value, found.difference.p_value) == (None,) * 4
    assert found.difference.warning == "gkd, seed 1: survival at l = 5 is 0.150, below 0.2: no number."
    events = "fewer than 10 events: responses with a loop, 0."
    assert loops.difference.value == 0
    assert loops.difference.warning == f"kd: {events} gkd: {events} {events}"


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"prompts_sha256": "z"}, r"other prompts \(p and z\)"),
        ({"models": {"teacher": "u"}}, r"other teacher \(t and u\)"),
        ({"decoding": {**LONGER, "top_k": 5}}, r"other decoding settings \(top_k 0 and 5\)"),
    ],
)
def test_other_conditions_are_refused(tmp_path: Path, manifest: dict[str, Any], said: str) -> None:
    one, other = two(tmp_path, **manifest)
    with pytest.raises(RecordError, match=said):
        paired([one], [other], [f"{NAME}/ex_acc_err@1"])
    with pytest.raises(RecordError, match=said):
        exposure_bias.figures([one, other], tmp_path / "figures")


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    with pytest.raises(UserError, match="no score 'exposure_bias/ex_acc_err@2'"):
        paired([one], [other], [f"{NAME}/ex_acc_err@2"])
    for run in (one, other):
        run.add("plain", 1, Analysis({"x": Score(1.0, "", 1)}))
    with pytest.raises(UserError, match="plain/x has no values per prompt"):
        paired([one], [other], ["plain/x"])
    with pytest.raises(RecordError, match="the same training seeds: 1, 1 and 1"):
        paired([one, one], [other], [f"{NAME}/length"])


# -------------------------------------------------------------------------------------------------- figures
FIGURES = {"ex_acc_err", "errors", "survival", "decomposition", "reliability", "variants"}


def drawn(paths: Sequence[Path]) -> set[str]:
    """Names of the figures; each is there as PNG and SVG, and no file is empty."""
    assert all(path.stat().st_size > 500 for path in paths)
    pictures = [path for path in paths if path.suffix != ".md"]
    assert {path.suffix for path in pictures} == {".png", ".svg"}
    assert len(pictures) == 2 * len({path.stem for path in pictures})
    return {path.stem for path in pictures}


def intervene(
    to: RunFolder,
    excess: Sequence[float] | Lists = (1.0, 0.25, 0.0, 0.0),
    short: bool = False,
    nucleus: float = 0.9,
    hand_over_tokens: tuple[int, ...] = (0, 2),
    **changes: Any,
) -> None:
    """Interventions: all responses have KL 1, behind a replaced token 1 + `excess`, of three prompts alike or
    of one each. `short`: without a last token behind a replaced one; `changes` of the manifest.
    """
    behind = np.atleast_2d(np.array(excess, dtype=float))
    behind = np.repeat(behind, 3, axis=0) if len(behind) == 1 else behind
    prompts, width = len(behind), behind.shape[1] + 1
    config = InterventionConfig(
        hand_over_tokens=hand_over_tokens,
        rates=(0.2,),
        places=(0.0,),
        recovery_positions=(0,),
        nucleus=nucleus,
    )
    manifest = make_manifest(**{"decoding": {**LONGER, "max_new_tokens": width}, **changes})
    for name in counterfactuals.NAMES:
        told, parts = describe(name, config, manifest, []), {}
        for condition, setting in told["conditions"].items():
            replaced = "kind" in setting
            kl = 1 + np.pad(behind, ((0, 0), (1, 0))) * replaced
            part: dict[str, Any] = {column: np.zeros(prompts * width) for column in COLUMNS}
            part |= {
                "example_id": np.repeat(np.arange(prompts), width),
                "position": np.tile(np.arange(width), prompts),
            }
            part |= {"forward_kl": kl.ravel(), "teacher_log_prob": np.full(prompts * width, -1.0)}
            part["token"] = part["position"] + 1
            part["token"][part["position"] == 0] += 7 * replaced
            part["score"] = np.full(prompts * width, 50.0 - 10 * (setting.get("tokens") == 2))
            kept = part["position"] < width - (short and replaced)
            parts[condition] = {column: part[column][kept] for column in counterfactuals.COLUMNS}
        write_intervention(to.path / "evidence" / "interventions" / f"{name}.parquet", told, parts)


def test_figures_are_drawn_for_several_rows(tmp_path: Path) -> None:
    rng, runs = np.random.default_rng(0), []
    for row, zero in (("teacher", True), ("init", False), ("kd", False), ("gkd", False)):
        config = {"title": row.upper(), "reference": row in ("teacher", "init")}
        for seed in (1, 2):
            run = make_run(tmp_path / f"{row}{seed}", row=row, seed=seed, config=config)
            lists = [[[0.0 if zero else float(x) for x in rng.random(6)] for _ in range(5)] for _ in range(2)]
            collect(run.evidence, *lists)
            for step in () if row == "teacher" else (2, 4):
                collect(run.path / "evidence" / f"snapshot-{step}.parquet", *lists, step=step)
            if row == "gkd":
                intervene(run)
            scored(run)
            runs.append(run)
    paths = exposure_bias.figures(runs, tmp_path / "figures")
    assert drawn(paths) == {*FIGURES, "ex_acc_err_training", *counterfactuals.NAMES}
    texts = [path for path in paths if path.suffix == ".md"]
    assert [path.name for path in texts] == [f"summary-{row}.md" for row in ("kd", "gkd", "teacher", "init")]
    assert texts[1].read_text("utf-8") == exposure_bias.summary([runs[6], runs[7]])
    with pytest.raises(RecordError, match="of one row, not of: kd, gkd"):
        exposure_bias.summary(runs[4:])


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are drawn, by name; none is written."""
    found: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: found.update({path.stem: self}))
    return found


def band_of(ax: Axes, title: str) -> list[list[float]]:
    """[x, point, low, high] of a row's line and of the band in its colour."""
    (line,) = [one for one in ax.get_lines() if one.get_label() == title]
    (area,) = [
        one
        for one in ax.collections
        if isinstance(one, PolyCollection) and same_color(one.get_facecolor()[0][:3], line.get_color())
    ]
    corners = np.concatenate([path.vertices for path in area.get_paths()])
    x = [float(one) for one in line.get_xdata()]
    ends = [corners[corners[:, 0] == at, 1] for at in x]
    return [x, list(line.get_ydata()), [one.min() for one in ends], [one.max() for one in ends]]


def is_outside(figure: Figure) -> bool:
    """Whether the legend touches no axes."""
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    return not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)


def test_figures_show_the_bands_of_the_intervals(tmp_path: Path, shown: dict[str, Figure]) -> None:
    rng, runs = np.random.default_rng(0), {}
    for title, scale in (("KD", 1.5), ("GKD", 0.8), ("NIL", 0.0)):
        run = runs[title] = make_run(tmp_path / title, row=title.lower(), config={"title": title})
        lists = [
            [[float(f * x) for x in rng.gamma(2, size=rng.integers(1, 12))] for _ in range(40)]
            for f in (1 if title == "NIL" else scale, scale)
        ]
        collect(run.evidence, *lists)
        scored(run)
    exposure_bias.figures(list(runs.values()), tmp_path / "figures")
    arrays = {title: per_prompt.arrays(read_evidence(run.evidence)) for title, run in runs.items()}
    assert [line.get_label() for line in shown["ex_acc_err"].axes[0].get_lines()][:-1] == ["KD", "GKD"]
    for title, found in arrays.items():
        length, longest = reach(found), found["student_count"].shape[1]
        assert 3 < length < longest
        panels: list[tuple[str, int, Any, int, dict[str, Any]]] = [
            ("errors", 0, estimators.accumulated_error_curve, length, {}),
            ("errors", 1, estimators.accumulated_error_curve, length, {"roll_in": "teacher"}),
            ("survival", 0, estimators.survival_curve, longest, {}),
        ]
        if title != "NIL":  # where epsilon is 0 there is no ratio and no line
            panels.append(("ex_acc_err", 0, estimators.ex_acc_err_alive_curve, length, {}))
        for name, at, curve, width, args in panels:
            x, *drawn_band = band_of(shown[name].axes[at], title)
            expected = intervals.band(curve, found, width, args)
            assert x == list(range(1, width + 1))
            np.testing.assert_allclose(drawn_band, expected, rtol=1e-9, err_msg=f"{name} {title}")
            assert title == "NIL" or (expected[2] > expected[1]).sum() > 2
    (own,) = [x for x in shown["survival"].axes[0].get_lines() if x.get_label() == "teacher's own responses"]
    expected = intervals.band(estimators.survival_curve, arrays["KD"], longest, {"roll_in": "teacher"})
    np.testing.assert_allclose(own.get_ydata(), expected[0][: len(own.get_ydata())])
    labels = {
        "ex_acc_err": ("generation step l (tokens)", "ExAccErr(l) (%)"),
        "errors": ("generation step l (tokens)", "accumulated KL(p||q) (nats)"),
        "survival": ("generation step l (tokens)", "share of responses with l tokens or more"),
    }
    for name, said in labels.items():
        figure = shown[name]
        assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == said
        assert is_outside(figure)
    titles = [ax.get_title() for ax in shown["errors"].axes]
    assert titles == ["R(l): on the student's prefixes", "l ε(l): on the teacher's prefixes"]


def test_bars_of_the_decomposition_are_the_terms_and_the_mark_their_sum(
    tmp_path: Path, shown: dict[str, Figure]
) -> None:
    run, rng = make_run(tmp_path), np.random.default_rng(0)
    lists = [[list(rng.random(rng.integers(4, 9))) for _ in range(20)] for _ in range(2)]
    collect(run.evidence, *lists)
    scored(run)
    exposure_bias.figures(run, tmp_path / "figures")
    found, ax = per_prompt.arrays(read_evidence(run.evidence)), shown["decomposition"].axes[0]
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches if bar.get_height() < 1]
    marks = [one for one in ax.collections if isinstance(one, LineCollection)]
    for at, name in enumerate(("length_term_nats", "state_term_nats")):
        assert bars[at][1] == pytest.approx(intervals.estimate(name, found, {"length": 5}).value)

    def both(arrays: Any, weights: Any, length: int) -> Any:
        one, other = (estimators.ESTIMATORS[f"{g}_term_nats"] for g in ("length", "state"))
        return one(arrays, weights, length) + other(arrays, weights, length)

    total = intervals.estimate(both, found, {"length": 5})
    np.testing.assert_allclose(
        marks[0].get_segments()[0][:, 0],
        [total.low, total.high],
        rtol=1e-5,  # type: ignore[arg-type]
    )
    assert len(marks) == 1
    assert is_outside(shown["decomposition"])


def test_a_short_snapshot_is_left_out_of_the_figure_over_training(
    tmp_path: Path, shown: dict[str, Figure]
) -> None:
    run, rng = make_run(tmp_path), np.random.default_rng(0)
    collect(run.evidence, [[1.0] * 6] * 3, [[1.0] * 6] * 3)
    paths = {step: run.path / "evidence" / f"snapshot-{step}.parquet" for step in (2, 4, 6, 8)}
    for step, path in paths.items():
        students = [list(1 + rng.random(1 if step == 2 else 6)) for _ in range(20)]
        teachers = [[0.0 if step == 6 else 1.0] * 6] * 20
        collect(path, students, teachers, step=step)
    scored(run)
    exposure_bias.figures(run, tmp_path / "figures")
    figure = shown["ex_acc_err_training"]
    assert figure.get_supylabel() == "ExAccErr(5) (%)"
    (line,) = [one for one in figure.axes[0].get_lines() if one.get_label() == "KD"]
    expected = [np.nan, *(ex_acc_err(path, 5) for path in list(paths.values())[1:])]
    np.testing.assert_allclose(np.array(line.get_ydata(), dtype=float), np.array(expected, dtype=float))
    assert np.isfinite(expected).tolist() == [False, True, False, True]  # at 6 epsilon is 0


def ex_acc_err(path: Path, length: int) -> float:
    one = intervals.ex_acc_err_estimate(per_prompt.arrays(read_evidence(path)), length)
    return np.nan if one.unit != "%" or one.value is None else one.value


def test_figures_without_snapshots_and_of_a_teacher_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[0.0] * 2], [[0.0] * 3])
    scored(run)
    assert drawn(exposure_bias.figures(run, tmp_path / "figures")) == FIGURES


def test_figures_need_scores_of_this_version(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(RecordError, match="no scores of exposure_bias"):
        exposure_bias.figures(run, tmp_path / "none")
    run.add(NAME, 1, Analysis({}))
    with pytest.raises(RecordError, match="of version 1, not 2; run `kdbench analyze abc123"):
        exposure_bias.figures(run, tmp_path / "none")


# -------------------------------------------------------------------------------------------------- summary
def test_words_follow_from_intervals() -> None:
    def one(low: float | None, high: float | None) -> Estimate:
        return Estimate(1.0, low, high, "", 3)

    assert [side(one(*ends)) for ends in ((0.1, 2), (-2, -0.1), (-1, 2), (None, None))] == [1, -1, 0, None]
    assert side(one(1e-9, 1e-8)) == 0  # rounding
    assert side(one(1.1, 2), of=1.0) == 1
    words = [word(one(*ends), "up", "down", "flat") for ends in ((0.1, 2), (-2, -0.1), (-1, 2), (None, None))]
    assert words == ["up", "down", "flat", "**not known**"]


def page(folder: Path, students: Lists, teachers: Lists, **columns: Any) -> str:
    run = make_run(folder)
    collect(run.evidence, students, teachers, columns)
    scored(run)
    return exposure_bias.summary(run)


@pytest.mark.parametrize(
    ("students", "teachers", "said"),
    [
        ([[1.0, 3.0, 5.0, 7.0, 9.0]] * 3, [[1.0] * 5] * 3, "**Error accumulates**: over the first 5 tokens"),
        ([[1.0, 3.0, 5.0, 7.0, 9.0]] * 3, [[1.0] * 5] * 3, "R(l) grows faster than l"),
        ([[1.0, 0.5, 0.4, 0.3, 0.2]] * 3, [[1.0] * 5] * 3, "**Error does not accumulate**"),
        ([[1.0, 0.5, 0.4, 0.3, 0.2]] * 3, [[1.0] * 5] * 3, "R(l) grows slower than l"),
        ([[1.0] * 5, [3.0] * 5] * 6, [[3.0] * 5, [1.0] * 5] * 6, "**It cannot be told whether error accum"),
        ([[1.0] * 5] * 3, [[1.0] * 5] * 3, "R(l) grows like l, as far as can be told"),
        ([[0.0] * 5] * 3, [[0.0] * 5] * 3, "**No: student and teacher are the same**"),
        ([[1.0] * 5] * 3, [[0.0] * 5] * 3, "R − l ε at l = 5 5 nats [5, 5]; epsilon may be under"),
        ([[1.0] * 8] * 3, [[1.0] * 5] * 3, "the first 5 tokens: the interval contains 0"),
        ([[2.0] * 5] * 3, [[1.0] * 5] * 3, "the state term is the larger one"),
        ([[2.0] * 5] * 3, [[1.0] * 5] * 3, "the student's own prefixes are worse for it"),
        ([[1.0] * 5] * 3, [[2.0] * 5] * 3, "the student's own prefixes are better for it"),
        ([[1.0] * 5] * 3, [[1.0] * 5] * 3, "no effect of other prefixes can be told"),
        ([[1.0] * 5] * 3, [[1.0] * 5] * 3, "which of the two is larger cannot be told"),
        ([[1.0] * 5] * 12, [[1.0]] * 6 + [[1.0] * 5] * 6, "the length term is the larger one"),
        ([[1.0] * 5] * 12, [[1.0]] * 6 + [[1.0] * 5] * 6, "longer responses of the student add to it"),
        ([[1.0]] * 6 + [[1.0] * 5] * 6, [[1.0] * 5] * 12, "shorter responses of the student take from it"),
        ([[1.0] * 5] * 3, [[1.0] * 5] * 3, "no effect of other lengths can be told"),
        ([[1.0] * 5] * 3, [[1.0] * 5] * 3, "Not measured: `kdbench collect abc123"),
        ([[1.0] * 8] * 10, [[1.0] * 5] * 10, "the student stops later"),
        (
            [[1.0] * 8] * 9,
            [[1.0] * 5] * 9,
            "nothing can be told, fewer than 10 events: responses with an end",
        ),
        ([[1.0] * 8] * 3, [[1.0] * 5] * 3, "length 8 tokens [8, 8], teacher 5 tokens [5, 5]: more than the"),
        ([[1.0] * 5] * 10, [[1.0] * 8] * 10, "the student stops sooner"),
        ([[1.0] * 5] * 3, [[1.0] * 5] * 3, "with 1 training seed it is not known how much another seed"),
        ([[1.0] * 5] * 3, [[1.0] * 5] * 3, "3 prompts, 1 draw each, up to 16 tokens"),
        ([[1.0] * 5] * 3, [[1.0] * 5] * 3, "Left out: ex_acc_err_arora_code: arora22-code needs reference"),
    ],
)
def test_each_branch_of_accumulation_terms_and_stopping(
    tmp_path: Path, students: Lists, teachers: Lists, said: str
) -> None:
    assert said in page(tmp_path, students, teachers)


@pytest.mark.parametrize(
    ("entropy", "surprise", "variation", "said"),
    [
        (2.0, 2.0, 0.5, ["it is less sure there", "less likely than its own text", "agree less there"]),
        (0.5, 0.5, 0.1, ["it is surer there", "likelier than its own text", "agree more there"]),
        (1.0, 1.0, 0.25, ["[0, 0]: no change can be told"]),
    ],
)
def test_each_branch_of_reliability(
    tmp_path: Path, entropy: float, surprise: float, variation: float, said: list[str]
) -> None:
    def columns(entropy: float, surprise: float, variation: float) -> dict[str, list[float]]:
        found = {"teacher_entropy": entropy, "teacher_log_prob": -surprise, "total_variation": variation}
        return {name: [value] * 3 for name, value in found.items()}

    student, teacher = columns(entropy, surprise, variation), columns(1.0, 1.0, 0.25)
    text = page(tmp_path, [[1.0] * 3] * 2, [[1.0] * 3] * 2, student=student, teacher=teacher)
    assert all(one in text for one in said)


@pytest.mark.parametrize(
    ("excess", "said"),
    [
        ((1.0, 0.25, 0.0, 0.0), "half of the excess is gone after 1.67 tokens [1.67, 1.67]"),
        ((1.0, 1.0, 1.0, 1.0), "the student does not recover within 4 tokens"),
        ((0.0, 1.0, 1.0, 0.0), "whether the student recovers within 4 tokens cannot be told"),
        ((1.0, 0.75, 0.5, 0.5), "whether the student recovers within 4 tokens cannot be told"),
        ((0.0, 0.0, 0.0, 0.0), "no cost can be told"),
        ((-0.5, -0.5, 0.0, 0.0), "it costs nothing"),
    ],
)
def test_each_branch_of_recovery(tmp_path: Path, excess: Sequence[float], said: str) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[1.0] * 3] * 2, [[1.0] * 3] * 2)
    intervene(run, excess)
    scored(run)
    text = exposure_bias.summary(run)
    assert text.count(said) == 3
    assert (
        "the first 2 tokens by the student: this lowers the ROUGE-L of what the teacher makes of it" in text
    )
    assert text.count("- up to 20 % of the teacher's tokens replaced by") == 3


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (0.9, "the student does not recover within 6 tokens"),
        (0.0, "the student recovers within 6 tokens, half of the excess is gone after"),
        (0.5, "whether the student recovers within 6 tokens cannot be told"),
    ],
)
def test_recovery_is_told_from_an_interval_over_prompts(tmp_path: Path, last: float, said: str) -> None:
    """Prompts differ: the excess falls from 1 to `last` in the mean; half of 1 is where it turns."""
    run, rng = make_run(tmp_path), np.random.default_rng(0)
    collect(run.evidence, [[1.0] * 3] * 2, [[1.0] * 3] * 2)
    mean = np.linspace(1, last, 6)
    excess = mean + 0.5 * rng.standard_normal((60, 6))
    intervene(run, excess.tolist())
    scored(run)
    arrays = counterfactuals.excess_arrays(
        counterfactuals.read_intervention(run.path / "evidence" / "interventions" / "recovery.parquet")
    )
    at_end = intervals.estimate(
        lambda arrays, weights: counterfactuals.excess_curve(arrays, weights, 6)[:, -1], arrays
    )
    if last == 0.5:  # above 0, and yet not known to be above half
        assert side(at_end) == 1
    assert exposure_bias.summary(run).count(said) == 3


def test_numbers_and_words_round_alike() -> None:
    for value, shown in ((9e-6, "0"), (-9e-6, "0"), (2e-5, "2e-05"), (-2e-5, "-2e-05"), (0.0, "0")):
        assert _number(value) == shown
        assert (side(Estimate(value, value, value, "", 3)) == 0) == (shown == "0")


def test_training_seeds_warnings_and_runs_are_told(tmp_path: Path) -> None:
    runs = []
    for seed in (1, 2, 3):
        save(make_record(run_id=f"run{seed}", seed=seed), tmp_path / str(seed) / "record.json")
        runs.append(RunFolder(tmp_path / str(seed)))
        collect(runs[-1].evidence, [[1.0, 1.0 + seed]] * 9 + [[1.0] * 8], [[1.0] * 8] * 10)
        scored(runs[-1])
    text = exposure_bias.summary(runs[::-1])
    assert "training seeds 1, 2, 3." in text
    assert "Intervals are over prompts and 3 training seeds." in text
    assert "Runs: run1, run2, run3." in text
    assert "survival is below 0.2" in text
    assert len(text.splitlines()) < 65
