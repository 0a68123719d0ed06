"""The analysis of exposure bias: scores, warnings, comparison, figures, and the words of its summary."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_kit import add_scores, make_manifest, make_record, make_run, response_rows, write_rows
from test_analyses import assert_scores_follow_from_arrays

from analyses import exposure_bias
from analyses._exposure_summary import side, word
from analyses.exposure_bias import Settings
from kdbench import counterfactuals
from kdbench.compare import paired
from kdbench.counterfactuals import InterventionConfig, describe, write_intervention
from kdbench.errors import UserError
from kdbench.evidence import COLUMNS, write_evidence
from kdbench.intervals import Estimate
from kdbench.record import Analysis, RecordError, RunFolder, RunRecord, Score, save

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
    collect(run.evidence, [[2.0] * 6, [4.0] * 6], [[1.0] * 5, [2.0] * 5], columns)
    record = scored(run)
    found = values(record)
    expected = {
        "accumulated_error@5": 15,
        "teacher_error@5": 7.5,
        "ex_acc_err@5": 100,
        "excess@5": 7.5,
        "ex_acc_err_matched@5": 100,
        "ex_acc_err_arora_paper@5": 100,
        "ex_acc_err_arora_paper@15": 140,  # 18 nats against 7.5
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
        "ex_acc_err_minillm@15": 150,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found["loop_onset"] is None
    assert "ex_acc_err@15" not in found
    assert "ex_acc_err_minillm@30" not in found
    detail = record.analyses[NAME]["detail"]
    assert detail["left_out"]["ex_acc_err@15"] == "survival 0.000 is below 0.2"
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
    "ex_acc_err_minillm@30": -3.3598807062776306,
    "accumulated_error_minillm@30": 9.33450216053825,
    "teacher_error_minillm@30": 9.659034186586117,
}


def test_the_numbers_of_version_1_are_unchanged(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    sampled(run.evidence, 12, 2, 40)
    found = values(scored(run))
    assert {name: found[name] for name in BEFORE} == pytest.approx(BEFORE, rel=1e-12)


def test_low_survival_leaves_out_or_warns(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[1.0]] * 9 + [[1.0] * 8], [[1.0] * 8] * 10)
    record = scored(run)
    assert f"{NAME}/ex_acc_err@5" not in record.scores
    for name in ("ex_acc_err", "excess", "eb_c", "growth_exponent", "ex_acc_err_matched", "survival"):
        assert "survival 0.100" in record.analyses[NAME]["detail"]["left_out"][f"{name}@5"]
    for name in ("ex_acc_err_minillm", "ex_acc_err_arora_paper", "state_term", "acceptance_drop"):
        score = record.scores[f"{NAME}/{name}@5"]
        assert "survival at l = 5 is 0.100, below 0.2." in score.detail["warning"]
        assert score.value is not None


def test_epsilon_near_zero_gives_nats_instead_of_a_ratio(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[1.0, 1.0]] * 3, [[0.0, 1e-7]] * 3)
    score = scored(run).scores[f"{NAME}/ex_acc_err@1"]
    assert score.value is None
    assert "no ratio" in score.detail["warning"]
    assert score.detail["excess_nats"] == {"value": 1, "low": 1, "high": 1}


def test_a_teacher_compared_with_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    collect(run.evidence, [[0.0] * 6] * 2, [[0.0] * 5] * 2)
    record = scored(run)
    for name in ("ex_acc_err@5", "ex_acc_err_matched@5", "ex_acc_err_arora_paper@5", "ex_acc_err_minillm@5"):
        score = record.scores[f"{NAME}/{name}"]
        assert (score.value, score.detail) == (0, {"low": 0, "high": 0})


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


def intervene(run: RunFolder, excess: Sequence[float] = (1.0, 0.25, 0.0, 0.0)) -> None:
    """Interventions on three prompts: all responses have KL 1, behind a replaced token 1 + `excess`."""
    config = InterventionConfig(hand_over_tokens=(0, 2), rates=(0.2,), places=(0.0,), recovery_positions=(0,))
    manifest = make_manifest(decoding={**LONGER, "max_new_tokens": len(excess) + 1})
    for name in counterfactuals.NAMES:
        told, parts = describe(name, config, manifest, []), {}
        for condition, setting in told["conditions"].items():
            kl = np.ones(len(excess) + 1) + (np.array([0, *excess]) if "kind" in setting else 0)
            part: dict[str, Any] = {column: np.zeros(3 * len(kl)) for column in COLUMNS}
            part |= {
                "example_id": np.repeat(np.arange(3), len(kl)),
                "position": np.tile(np.arange(len(kl)), 3),
            }
            part |= {"forward_kl": np.tile(kl, 3), "teacher_log_prob": np.full(3 * len(kl), -1.0)}
            part["token"] = part["position"] + 1
            part["token"][part["position"] == 0] += 7 * ("kind" in setting)
            part["score"] = np.full(3 * len(kl), 50.0 - 10 * (setting.get("tokens") == 2))
            parts[condition] = {column: part[column] for column in counterfactuals.COLUMNS}
        write_intervention(run.path / "evidence" / "interventions" / f"{name}.parquet", told, parts)


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
        ([[1.0] * 8] * 3, [[1.0] * 5] * 3, "the student stops later"),
        ([[1.0] * 8] * 3, [[1.0] * 5] * 3, "length 8 tokens [8, 8], teacher 5 tokens [5, 5]: more than the"),
        ([[1.0] * 5] * 3, [[1.0] * 8] * 3, "the student stops sooner"),
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
        ((0.0, 1.0, 1.0, 0.0), "when the student recovers within 4 tokens cannot be told"),
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
