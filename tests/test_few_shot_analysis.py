"""The few-shot analysis: scores, refusals, intervals, figures, pages."""

import json
import random
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record_kit import make_run

from analyses import _few_shot_rows as groups
from analyses import few_shot
from analyses._few_shot_page import case_study, write
from kdbench import intervals
from kdbench.estimators import ESTIMATORS
from kdbench.record import Named, RecordError, RunFolder, Score, save

WORDS = ("terrible", "great", "fine")
Table = list[dict[str, Any]]


def answer(example: int, label: int, probabilities: Sequence[float], /, **changes: Any) -> dict[str, Any]:
    """An output row that predicts the likeliest class."""
    prediction = int(np.argmax(probabilities))
    row = {"example_id": example, "set": "s", "seed": 10, "prompt": f"text {example} it was <mask> ."}
    row |= {"response": WORDS[prediction], "references": [WORDS[label]], "tokens": 5, "finished": True}
    return {**row, "label": label, "prediction": prediction, "probabilities": list(probabilities), **changes}


ROWS = [
    answer(4, 0, [0.9, 0.1]),
    answer(2, 1, [0.7, 0.3]),
    answer(9, 1, [0.2, 0.8]),
    answer(1, 0, [0.6, 0.4]),
]


def add_outputs(run: RunFolder, **sets: Table) -> RunFolder:
    """Writes outputs, and scores them."""
    write_outputs(run, **sets)
    run.add("few_shot", few_shot.VERSION, few_shot.analyze(run))
    return run


def write_outputs(run: RunFolder, **sets: Table) -> None:
    for name, rows in sets.items():
        path = run.path / "outputs" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------------------- scores
def test_scores_by_hand(tmp_path: Path) -> None:
    other = [answer(1, 0, [0.0, 1.0]), answer(2, 1, [0.5, 0.5], prediction=1)]
    run = add_outputs(make_run(tmp_path), a=ROWS, b=other)
    record = run.record

    def value(name: str) -> float | None:
        return record.value(f"few_shot/{name}")

    assert value("accuracy/a") == 75
    assert value("accuracy/b") == 50
    assert value("accuracy") == 62.5  # the mean over sets, not over examples
    assert value("majority_share/a") == 75
    assert value("majority_share/b") == 100
    # class 0: precision 2/3, recall 1; class 1: precision 1, recall 1/2
    assert value("macro_f1/a") == pytest.approx(100 * (4 / 5 + 2 / 3) / 2)
    assert value("macro_f1/b") == pytest.approx(100 * (0 + 2 / 3) / 2)
    # confidences 0.9, 0.7, 0.8, 0.6 lie in bins of their own: gaps 0.1, 0.7, 0.2, 0.4
    assert value("expected_calibration_error/a") == pytest.approx(100 * 1.4 / 4)
    assert value("expected_calibration_error/b") == pytest.approx(100 * (1.0 + 0.5) / 2)
    assert value("nll/a") == pytest.approx(-np.log([0.9, 0.3, 0.8, 0.6]).mean())
    assert value("nll/b") == pytest.approx((-np.log(np.finfo(np.float32).tiny) - np.log(0.5)) / 2)
    assert record.scores["few_shot/accuracy"].n == 6
    assert record.scores["few_shot/nll/b"].n == 2
    assert {
        name: (one.unit, one.direction) for name, one in record.scores.items() if name.endswith("/a")
    } == {
        "few_shot/accuracy/a": ("%", "higher"),
        "few_shot/majority_share/a": ("%", "none"),
        "few_shot/nll/a": ("nats", "lower"),
        "few_shot/macro_f1/a": ("x 100", "higher"),
        "few_shot/expected_calibration_error/a": ("points", "lower"),
    }
    detail = record.analyses["few_shot"]["detail"]
    assert detail == {
        "sets": ["a", "b"],
        "classes": {"a": ["terrible", "great"], "b": ["terrible", "great"]},
        "confusion": {"a": [[2, 0], [1, 1]], "b": [[0, 1], [0, 1]]},
    }
    arrays = run.arrays()
    np.testing.assert_array_equal(arrays["few_shot/prompt"], [1, 2, 4, 9, 1, 2])
    np.testing.assert_array_equal(arrays["few_shot/stratum"], [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(arrays["few_shot/accuracy"], [100, 0, 100, 100, 0, 100])
    np.testing.assert_array_equal(arrays["few_shot/majority"], [100, 100, 100, 0, 100, 100])
    for name, score in record.scores.items():
        if score.estimator is not None:
            inputs = {argument: arrays[key] for argument, key in score.arrays.items()}
            ones = np.ones((1, len(inputs["prompt"])))
            assert ESTIMATORS[score.estimator](inputs, ones, **score.args)[0] == score.value, name


def test_the_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [answer(i, int(rng.integers(3)), rng.dirichlet(np.ones(3)).tolist()) for i in range(50)]
    one = add_outputs(make_run(tmp_path / "one"), a=rows)
    random.Random(0).shuffle(rows)
    other = add_outputs(make_run(tmp_path / "other"), a=rows)
    assert one.record.scores == other.record.scores
    for name, values in one.arrays().items():
        np.testing.assert_array_equal(values, other.arrays()[name])


def test_renaming_classes_changes_no_score() -> None:
    rng = np.random.default_rng(1)
    probabilities, label = rng.dirichlet(np.ones(3), size=40), rng.integers(0, 3, 40)
    order = np.array([2, 0, 1])
    found = []
    for p, y in ((probabilities, label), (probabilities[:, order], np.argsort(order)[label])):
        confusion = np.zeros((3, 3), dtype=int)
        np.add.at(confusion, (y, p.argmax(axis=1)), 1)
        right = p.argmax(axis=1) == y
        found.append((few_shot.macro_f1(confusion), few_shot.expected_calibration_error(p, right)))
    assert found[0] == pytest.approx(found[1])


def test_macro_f1_leaves_out_classes_that_never_occur() -> None:
    assert few_shot.macro_f1(np.diag([3, 0, 2])) == 100
    assert few_shot.macro_f1(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]])) == pytest.approx(100 * (6 / 7) / 2)


def test_calibration_error_is_of_bins_not_of_examples() -> None:
    right = np.array([True, False])
    assert few_shot.expected_calibration_error(np.array([[0.5, 0.5], [0.5, 0.5]]), right) == 0
    assert few_shot.expected_calibration_error(np.array([[1.0, 0.0], [1.0, 0.0]]), right) == 50
    # 9/15 belongs to the bin below it, 0.66 to (9/15, 10/15]
    edges = np.array([[9 / 15, 6 / 15], [0.66, 0.34]])
    assert few_shot.expected_calibration_error(edges, right) == pytest.approx(100 * (0.4 + 0.66) / 2)


def test_dev_scores_are_those_of_a_test_set() -> None:
    assert few_shot.dev_scores(ROWS) == {
        "accuracy": 75.0,
        "nll": pytest.approx(-np.log([0.9, 0.3, 0.8, 0.6]).mean()),
    }
    bare = [{key: row[key] for key in ("label", "prediction", "probabilities")} for row in ROWS]
    assert few_shot.dev_scores(bare) == few_shot.dev_scores(ROWS)
    with pytest.raises(RecordError, match="the rows to score: is empty"):
        few_shot.dev_scores([])
    with pytest.raises(RecordError, match="the rows to score, line 2: 'label' is missing"):
        few_shot.dev_scores([*ROWS[:1], {"response": "a"}])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "is empty"),
        ([ROWS[0], {"example_id": 3}], "line 2: 'seed' is missing or of the wrong type"),
        ([answer(1, 0, [0.9, 0.1], label="0")], "line 1: 'label' is missing or of the wrong type"),
        ([answer(1, 0, [0.9, 0.1], label=2)], "line 1: label 2 is none of the classes 0..1"),
        ([answer(1, 0, [0.9, 0.1], label=-1)], "line 1: label -1 is none of the classes 0..1"),
        ([answer(1, 0, [0.9, 0.1], prediction=5)], "line 1: prediction 5 is none of the classes 0..1"),
        ([answer(1, 0, [0.9, 0.1], prediction=1)], "class 1 is predicted, but another one is likelier"),
        ([answer(1, 0, [0.9, 0.3])], "line 1: 'probabilities' add up to 1.2, not to 1"),
        ([answer(1, 0, [1.0])], "line 1: 'probabilities' should be two numbers or more, each in 0..1"),
        ([answer(1, 0, [1.5, -0.5])], "line 1: 'probabilities' should be two numbers or more, each in 0..1"),
        ([answer(1, 0, [0.9, 0.1], probabilities=[float("nan"), 0.1])], "each in 0..1"),
        ([ROWS[0], answer(5, 0, [0.5, 0.3, 0.2])], "line 2: has probabilities of 3 classes, line 1 of 2"),
        ([ROWS[0], ROWS[1], ROWS[0]], "example 4 is there twice"),
        ([ROWS[0], answer(5, 0, [0.9, 0.1], seed=20)], "has rows of the seeds 10, 20; a prediction has no"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_scored_are_named(tmp_path: Path, rows: Table, said: str) -> None:
    run = make_run(tmp_path)
    write_outputs(run, sst2=rows)
    with pytest.raises(RecordError) as caught:
        few_shot.analyze(run)
    assert said in str(caught.value)
    assert "sst2.jsonl" in str(caught.value)


def test_seeds_must_agree_between_sets_and_sets_must_be_there(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(RecordError, match="no outputs to score"):
        few_shot.analyze(run)
    write_outputs(run, a=ROWS, b=[answer(1, 0, [0.9, 0.1], seed=20)])
    with pytest.raises(RecordError, match="b.jsonl: has rows of the seeds 10, 20"):
        few_shot.analyze(run)


def test_class_names_are_what_the_rows_say(tmp_path: Path) -> None:
    rows = [answer(1, 0, [0.2, 0.7, 0.1]), answer(2, 0, [0.9, 0.1, 0.0], references=["bad"], response="bad")]
    run = add_outputs(make_run(tmp_path), a=rows)
    assert run.record.analyses["few_shot"]["detail"]["classes"]["a"] == ["bad", "great", "2"]


# -------------------------------------------------------------------------------------------------- a board
TITLES = {"prompt_distiller": "Prompt-Distiller", "student_pt": "Student PT", "prompt_kd": "Prompt-KD"}
TOP = [["Ġgreat", 0.5], ["fun", 0.25], ["a|b", 0.125]]


def fewshot_run(
    root: Path,
    row: str,
    draw: int = 1,
    dataset: str = "sst2",
    skill: float = 0.7,
    method: str = "",
    settings: Mapping[str, Any] | None = None,
    k: int = 16,
    student: Mapping[str, Any] | None = None,
    axes: Mapping[str, Any] | None = None,
    teacher: str = "roberta",
    training: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
    reference: bool = False,
    sets: Sequence[str] = (),
    examples: int = 60,
    top: bool = False,
    title: str = "",
    **changes: Any,
) -> RunFolder:
    """A scored run of a few-shot board; about `skill` of its answers are right."""
    number = len(list(root.glob("*"))) if root.exists() else 0
    config = {
        "title": title or TITLES.get(row, row),
        "reference": reference,
        "settings": dict(settings or {}),
        "task_settings": {"dataset": dataset, "k": k, "draw": draw, **(task or {})},
        "training": dict(training or {}),
        "roles": {
            "student": {**(student or {"model": "bert-small"}), "seed": 0},
            "teacher": {"model": teacher, "stages": [{"seed": draw}]},
        },
    }
    run = make_run(
        root / f"run{number}",
        run_id=f"run{number}",
        row=row,
        seed=draw,
        config=config,
        axes={"dataset": dataset, **(axes or {})},
        distiller=Named(method or row, "1"),
        **changes,
    )
    rng, made = np.random.default_rng(number), {}
    for name in sets or [dataset]:
        rows = []
        for example in range(examples):
            label = example % 2
            sure = rng.uniform(0.5, 1)
            right = rng.random() < skill
            p = [sure, 1 - sure] if (label == 0) == right else [1 - sure, sure]
            rows.append(answer(example, label, p, set=name, **({"top": TOP} if top and example < 8 else {})))
        made[name] = rows
    return add_outputs(run, **made)


def add_probes(run: RunFolder, values: Mapping[str, float]) -> None:
    record = run.record
    record.scores |= {f"method/probe_accuracy/{key}": Score(value, "", 1) for key, value in values.items()}
    save(record, run.path / "record.json")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are drawn, by name; none is written."""
    found: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: found.update({path.stem: self}))
    return found


def marks(ax: Axes) -> list[tuple[float, float, float, float]]:
    """(x, y, low, high) of every point with an interval, in the order drawn."""
    found = []
    for container in ax.containers:
        line, _, bars = container.lines
        (bar,) = bars
        for x, y, ends in zip(line.get_xdata(), line.get_ydata(), bar.get_segments(), strict=True):
            along = 0 if ends[0][1] == ends[1][1] else 1
            found.append((float(x), float(y), float(ends[0][along]), float(ends[1][along])))
    return found


def ends(one: intervals.Estimate) -> tuple[float, float]:
    assert one.low is not None
    assert one.high is not None
    return one.low, one.high


def test_an_interval_is_that_of_the_common_bootstrap() -> None:
    rng = np.random.default_rng(0)
    for draws in (1, 2, 5):
        values = 100.0 * (rng.random((draws, 400)) < rng.uniform(0.5, 0.9, (draws, 1)))
        arrays = [{"values": one, "prompt": np.arange(400)} for one in values]
        expected, found = intervals.estimate("mean", arrays, unit="%"), groups.interval([values])
        assert (found.value, found.unit, found.n) == (expected.value, "%", 400)
        width = ends(expected)[1] - ends(expected)[0]
        np.testing.assert_allclose(ends(found), ends(expected), atol=0.08 * width)


def test_the_average_of_sets_has_the_spread_of_independent_sets() -> None:
    rng = np.random.default_rng(0)
    one, other = (100.0 * (rng.random((1, 500)) < 0.5) for _ in range(2))
    low, high = ends(groups.interval([one, other]))
    deviation = np.sqrt(one.var() / 500 + other.var() / 500) / 2
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.06)


def test_rows_are_runs_by_test_set_and_draw(tmp_path: Path) -> None:
    runs = [
        fewshot_run(tmp_path, row, draw, dataset, sets=sets)
        for row in ("student_pt", "prompt_kd")
        for dataset, sets in (("sst2", ()), ("mnli", ("mnli", "mnli-mm")))
        for draw in (2, 1, 3)
    ]
    found = groups.rows(runs)
    assert [row.title for row in found] == ["Student PT", "Prompt-KD"]
    assert {name: sorted(runs) for name, runs in found[0].runs.items()} == {
        "sst2": [1, 2, 3], "mnli": [1, 2, 3], "mnli-mm": [1, 2, 3],
    }  # fmt: skip
    assert len(found[0].all_runs) == 6
    assert list(found[0].draws("sst2")) == [1, 2, 3]
    mean = np.mean([run.record.value("few_shot/accuracy/sst2") for run in runs[:3]])
    one = found[0].accuracy(["sst2"])
    assert one is not None
    assert one.value == pytest.approx(mean)
    every = found[0].accuracy(["sst2", "mnli", "mnli-mm"])
    assert every is not None
    parts = [np.mean(list(found[0].draws(name).values())) for name in ("sst2", "mnli", "mnli-mm")]
    assert every.value == pytest.approx(np.mean(parts))
    assert found[0].accuracy(["sst2", "rte"]) is None
    apart = groups.difference(found[1], found[0], "sst2")
    assert apart is not None
    assert apart.unit == "points"
    assert apart.value == pytest.approx(
        np.mean(list(found[1].draws("sst2").values())) - np.mean(list(found[0].draws("sst2").values()))
    )


def test_draws_on_other_examples_and_other_versions_are_refused(tmp_path: Path) -> None:
    runs = [fewshot_run(tmp_path, "student_pt", 1), fewshot_run(tmp_path, "student_pt", 2, examples=50)]
    with pytest.raises(RecordError, match="run0 and .*run1: were tested on different examples of sst2"):
        few_shot.figures(runs, tmp_path / "figures")
    bare = make_run(tmp_path / "bare")
    with pytest.raises(RecordError, match="has no scores of few_shot; run `kdbench analyze abc123"):
        few_shot.figures(bare, tmp_path / "figures")
    bare.add("few_shot", 99, few_shot.analyze(runs[0]))
    with pytest.raises(RecordError, match="has scores of version 99, not 1, of few_shot"):
        few_shot.figures(bare, tmp_path / "figures")
    assert not (tmp_path / "figures" / "few_shot.md").exists()


def test_a_single_run_has_figures_and_a_page(tmp_path: Path) -> None:
    run = fewshot_run(tmp_path / "runs", "student_pt")
    paths = few_shot.figures(run, tmp_path / "figures")
    names = ["accuracy.png", "accuracy.svg", "confusion-sst2.png", "confusion-sst2.svg", "few_shot.md"]
    assert [path.name for path in paths] == names
    assert all(path.stat().st_size > 300 for path in paths)
    text = paths[-1].read_text("utf-8")
    assert text.startswith(
        "# Few-shot classification on toy/v1, size full\n\nDraws: 1. Numbers are means over"
    )
    assert "examples only: it is not known how much another draw would move the numbers." in text


def test_accuracy_shows_every_row_with_its_draws_and_interval(
    tmp_path: Path, shown: dict[str, Figure]
) -> None:
    runs = [
        fewshot_run(tmp_path / "runs", row, draw, dataset, reference=row == "teacher_pt")
        for row in ("teacher_pt", "student_pt")
        for dataset in ("sst2", "rte")
        for draw in (1, 2, 3)
    ]
    found = groups.rows(runs)
    few_shot.figures(runs, tmp_path / "figures")
    axes = [ax for ax in shown["accuracy"].axes if ax.get_visible()]
    assert [ax.get_title() for ax in axes] == ["sst2", "rte", "average"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["teacher_pt", "Student PT"]
    for ax, sets in zip(axes, (["sst2"], ["rte"], ["sst2", "rte"]), strict=True):
        assert ax.get_xlabel() == "accuracy (%)"
        expected = []
        for at, row in enumerate(found):
            one = row.accuracy(sets)
            assert one is not None
            expected.append((one.value, at, *ends(one)))
        np.testing.assert_allclose(marks(ax), expected)
        dots = [line for line in ax.get_lines() if line.get_markersize() == 2]
        draws = [list(row.draws(sets[0]).values()) for row in found]
        if len(sets) == 1:
            np.testing.assert_allclose([line.get_xdata() for line in dots], draws)
            assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_linestyle() == ":"] == [50]


def test_an_ablation_is_the_rows_of_a_method_beside_those_of_others(
    tmp_path: Path, shown: dict[str, Figure]
) -> None:
    full: dict[str, Any] = {"lam2": 0.2}
    rows = [
        ("zero_shot", "student_pt", {}, True),
        ("student_pt", "student_pt", {}, False),
        ("mine", "my_method", {}, False),
        ("full", "prompt_distiller", full, False),
        ("prompt_distiller", "prompt_distiller", {"lam2": 0.0}, False),
    ]
    runs = [
        fewshot_run(tmp_path / "runs", row, draw, method=method, settings=settings, reference=reference)
        for row, method, settings, reference in rows
        for draw in (1, 2, 3)
    ]
    for run in runs[9:]:
        add_probes(run, {"teacher/1": 50})
    found = groups.rows(runs)
    (one,) = groups.ablations(found)
    assert [row.row for row in one.rows] == ["full", "prompt_distiller", "student_pt", "mine"]
    main = ["zero_shot", "student_pt", "mine", "full"]
    assert [row.row for row in groups.main_rows(found)] == main
    few_shot.figures(runs, tmp_path / "figures")
    assert set(shown) == {"accuracy", "ablation", "confusion-sst2", "probes-full"}
    (ax,) = shown["ablation"].axes
    np.testing.assert_allclose([x for x, *_ in marks(ax)], [row.accuracy(["sst2"]).value for row in one.rows])
    text = (tmp_path / "figures" / "few_shot.md").read_text("utf-8")
    assert "## Ablation of full: accuracy (%)" in text
    apart = groups.difference(one.others[0], one.full, "sst2")
    assert apart is not None
    assert f"{apart.value:.1f} [{ends(apart)[0]:.1f}, {ends(apart)[1]:.1f}] |" in text


def test_curves_over_k_join_axes_and_rows(tmp_path: Path, shown: dict[str, Figure]) -> None:
    root = tmp_path / "runs"
    runs = [
        fewshot_run(root, row, draw, k=k, axes={"k": k}, reference=row == "teacher_pt", method="student_pt")
        for row in ("teacher_pt", "student_pt")
        for k in (64, 16)
        for draw in (1, 2, 3)
    ]
    runs += [  # rows of their own
        fewshot_run(root, f"kd[k={k}]", draw, k=k, method="prompt_kd") for k in (16, 64) for draw in (1, 2, 3)
    ]
    runs += [fewshot_run(root, "kd_ft", 1, k=16)]  # no curve
    found = groups.rows(runs)
    curves = groups.over_k(found)
    assert [(one.title, one.reference) for one in curves] == [
        ("teacher_pt", True), ("Student PT", False), ("kd", False),
    ]  # fmt: skip
    few_shot.figures(runs, tmp_path / "figures")
    (ax,) = shown["accuracy_over_k"].axes
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == (
        "log",
        "examples per class K",
        "accuracy (%)",
    )
    assert list(ax.get_xticks()) == [16, 64]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["16", "64"]
    assert [text.get_text() for text in shown["accuracy_over_k"].legends[0].get_texts()] == [
        "teacher_pt", "Student PT", "kd",
    ]  # fmt: skip
    drawn = marks(ax)
    rows = {(row.row, row.k): row.accuracy(["sst2"]) for row in found}
    order = [("teacher_pt", 16), ("teacher_pt", 64), ("student_pt", 16), ("student_pt", 64)]
    for (x, y, low, high), key in zip(drawn, order, strict=False):
        one = rows[key]
        assert one is not None
        assert x == pytest.approx(key[1], rel=0.05)
        assert (y, low, high) == pytest.approx((one.value, *ends(one)))
    text = (tmp_path / "figures" / "few_shot.md").read_text("utf-8")
    assert "## Accuracy (%) over K\n\n| sst2, K | 16 | 64 |\n" in text


def test_curves_over_student_size_read_weights_or_configuration(
    tmp_path: Path, shown: dict[str, Figure]
) -> None:
    runs = []
    for name, count in (("bert-base", 110_000_000), ("bert-tiny", 4_390_000)):
        for row in ("student_pt", "prompt_kd"):
            run = fewshot_run(tmp_path / "runs", row, student={"model": name}, axes={"student": name})
            header = {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [count // 10, 10]}}
            blob = json.dumps(header).encode()
            (run.path / "student").mkdir()
            (run.path / "student" / "model.safetensors").write_bytes(struct.pack("<Q", len(blob)) + blob)
            runs.append(run)
    found = groups.rows(runs)
    assert [run.parameters for row in found for run in row.all_runs] == [110_000_000] * 2 + [4_390_000] * 2
    few_shot.figures(runs, tmp_path / "figures")
    (ax,) = shown["accuracy_over_student_size"].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4.39M", "110M"]
    assert len(marks(ax)) == 4
    assert [x for x, *_ in marks(ax)][:2] == pytest.approx([4_390_000, 110_000_000], rel=0.05)
    assert "accuracy_over_k" not in shown
    text = (tmp_path / "figures" / "few_shot.md").read_text("utf-8")
    assert "| sst2, parameters | 4.39M | 110M |\n" in text
    (runs[0].path / "student" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(RecordError, match="model.safetensors: is not a safetensors file"):
        groups.over_student_size(groups.rows(runs))


def test_a_curve_over_student_size_joins_sizes_of_a_board(tmp_path: Path, shown: dict[str, Figure]) -> None:
    def encoder(width: int) -> dict[str, Any]:
        sizes = {"vocab_size": 99, "hidden_size": width, "num_hidden_layers": 2, "intermediate_size": width}
        return {"architecture": {"model_type": "bert", "config": {**sizes, "max_position_embeddings": 9}}}

    def made(root: str, size: str, width: int, row: str = "kd", **more: Any) -> list[RunFolder]:
        return [
            fewshot_run(tmp_path / root, row, draw, student=encoder(width), size=size, method="kd", **more)
            for draw in (1, 2)
        ]

    runs = [*made("runs", "full", 8), *made("runs", "student-tiny", 4), *made("runs", "student-base", 16)]
    short = made("runs", "debug", 16, training={"optimizer_steps": 8})
    found = groups.rows([*runs, *short])
    assert [row.title for row in found] == [
        f"kd, {name}" for name in "full student-tiny student-base debug".split()
    ]
    assert len({row.name for row in found}) == 4
    (curve,) = groups.over_student_size(found)
    (points,) = curve.points.values()
    values = [row.accuracy(["sst2"]) for row in (found[1], found[0], found[2])]
    assert (curve.title, [one for _, one in points]) == ("kd", values)
    few_shot.figures([*runs, *short], tmp_path / "figures")
    assert len(marks(shown["accuracy_over_student_size"].axes[0])) == 3
    assert {"probes-kd", "accuracy_over_k"}.isdisjoint(shown)
    twice = made("runs", "again", 16)
    with pytest.raises(RecordError, match=r"are two points of one curve at \d+ parameters on sst2"):
        groups.over_student_size(groups.rows([*runs, *twice]))


@pytest.mark.parametrize(
    ("other", "titles"),
    [
        ({"board": "other/v1"}, ["KD (toy/v1)", "KD (other/v1)"]),
        ({"teacher": "large"}, ["KD (teacher.model roberta)", "KD (teacher.model large)"]),
        ({"training": {"lr": 0.1}}, ["KD", "KD (lr 0.1)"]),
        ({"task": {"prompt_set": "pet-0"}}, ["KD", "KD (prompt_set pet-0)"]),
        ({"task": {"unlabeled_ratio": 3}}, ["KD", "KD (unlabeled_ratio 3)"]),
        ({"settings": {"alpha": 1}}, ["KD", "KD (alpha 1)"]),
    ],
)
def test_rows_that_differ_in_more_than_k_are_curves_of_their_own(
    tmp_path: Path, other: dict[str, Any], titles: list[str]
) -> None:
    runs = [
        fewshot_run(tmp_path, f"{name}[k={k}]", draw, k=k, method="prompt_kd", title="KD", **more)
        for name, more in (("one", {}), ("two", other))
        for k in (16, 64)
        for draw in ((2, 1) if k == 16 else (1, 2))
    ]
    found = groups.rows(runs)
    curves = groups.over_k(found)
    assert [len(one.points["sst2"]) for one in curves] == [2, 2]
    values = [row.accuracy(["sst2"]) for row in found]
    assert [point for one in curves for _, point in one.points["sst2"]] == values
    assert [one.title for one in curves] == titles
    assert all(f"\n| {title} | " in write(found) for title in titles)


def test_two_rows_of_one_k_are_refused(tmp_path: Path) -> None:
    runs = [
        fewshot_run(tmp_path, row, k=k, method="prompt_kd", axes={"k": k})
        for row in ("one", "two")
        for k in (16, 64)
    ]
    assert len(groups.over_k(groups.rows(runs[:2]))) == 1
    with pytest.raises(RecordError, match="run0 and .*run2: are two points of one curve at 16 K on sst2"):
        groups.over_k(groups.rows(runs))


def test_parameters_of_a_configuration_are_those_of_the_model(tmp_path: Path) -> None:
    base = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
    base["max_position_embeddings"] = 512
    known = 109_514_298  # BertForMaskedLM of bert-base-uncased
    student = {"architecture": {"model_type": "bert", "config": base}}
    (row,) = groups.rows(fewshot_run(tmp_path, "student_pt", student=student))
    assert row.all_runs[0].parameters == known
    run = fewshot_run(tmp_path, "student_pt")
    (row,) = groups.rows(run)
    assert row.all_runs[0].parameters is None
    (run.path / "student").mkdir()
    (run.path / "student" / "config.json").write_text(json.dumps(base))
    (row,) = groups.rows(run)
    assert row.all_runs[0].parameters == known


def test_probes_are_means_over_draws_by_bank_and_layer(tmp_path: Path, shown: dict[str, Figure]) -> None:
    runs = [fewshot_run(tmp_path / "runs", "prompt_distiller", draw) for draw in (1, 2, 3)]
    for run, shift in zip(runs, (-10, 0, 10), strict=True):
        add_probes(run, {"teacher/1": 60, "teacher/10": 90, "teacher/2": 70 + shift, "student/1": 50})
    few_shot.figures(runs, tmp_path / "figures")
    (ax,) = shown["probes-prompt_distiller"].axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines["teacher"].get_xdata()) == [1, 2, 10]
    np.testing.assert_allclose(lines["teacher"].get_ydata(), [60, 70, 90])
    np.testing.assert_allclose(lines["student"].get_ydata(), [50])
    text = (tmp_path / "figures" / "few_shot.md").read_text("utf-8")
    assert "## Probe accuracy (%): Prompt-Distiller\n\n| sst2, layer | 1 | 2 | 10 |\n" in text
    half = 4.302653 * 10 / np.sqrt(3)  # t(0.975, 2) times the standard error
    assert f"| 60.0 [60.0, 60.0] | 70.0 [{70 - half:.1f}, {70 + half:.1f}] | 90.0" in text


def test_confusion_matrices_are_shares_of_each_class(tmp_path: Path, shown: dict[str, Figure]) -> None:
    one = add_outputs(make_run(tmp_path / "1", seed=1), a=ROWS)
    more = [answer(1, 0, [0.1, 0.9]), *ROWS[:3]]
    two = add_outputs(make_run(tmp_path / "2", seed=2), a=more)
    few_shot.figures([one, two], tmp_path / "figures")
    (ax,) = shown["confusion-a"].axes
    assert [text.get_text() for text in ax.texts] == ["75", "25", "50", "50"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["terrible", "great"]
    text = (tmp_path / "figures" / "few_shot.md").read_text("utf-8")
    assert "| row | recall terrible (%) | recall great (%) | most predicted class (%) | macro-F1 |" in text
    assert "| KD | 75.0 | 50.0 | 62.5 | " in text


def test_the_page_has_the_deviation_over_draws(tmp_path: Path) -> None:
    runs = [fewshot_run(tmp_path, "student_pt", draw) for draw in (1, 2, 3)]
    (row,) = found = groups.rows(runs)
    one, deviation = row.accuracy(["sst2"]), np.std(list(row.draws("sst2").values()))
    assert one is not None
    low, high = ends(one)
    assert f"| Student PT | {one.value:.1f} [{low:.1f}, {high:.1f}] ± {deviation:.1f} |" in write(found)


def test_the_case_study_sets_tokens_side_by_side(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    runs = [
        fewshot_run(root, "student_pt", top=True),
        fewshot_run(root, "student_ft"),
        fewshot_run(root, "teacher_pt", reference=True, top=True),
    ]
    paths = few_shot.figures(runs, tmp_path / "figures")
    assert paths[-1].name == "case_study.md"
    text = paths[-1].read_text("utf-8")
    assert text == case_study(groups.rows(runs))
    blocks = text.split("> text ")[1:]
    assert len(blocks) == 5
    lines = blocks[0].splitlines()
    assert lines[0] == "0 it was <mask> . (example 0; right: terrible)"
    assert lines[2] == "| row | predicted | likeliest tokens at the mask |"
    assert [line.split(" | ")[0] for line in lines[4:6]] == ["| teacher_pt", "| Student PT"]
    assert lines[4].endswith("| Ġgreat 0.50, fun 0.25, a\\|b 0.12 |")
    assert case_study(groups.rows(runs[1])) == ""


def test_top_that_is_no_list_of_pairs_is_refused(tmp_path: Path) -> None:
    rows = [answer(1, 0, [0.9, 0.1], top=["great", "fun"])]
    run = add_outputs(make_run(tmp_path), a=rows)
    with pytest.raises(RecordError, match="example 1 of s: 'top' should be pairs"):
        case_study(groups.rows(run))


def test_scores_figures_and_pages_need_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_outputs(run, a=ROWS)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from analyses import few_shot\n"
        "from kdbench.record import RunFolder\n"
        "assert 'seaborn' not in sys.modules\n"
        f"run = RunFolder(Path({str(tmp_path)!r}))\n"
        "run.add('few_shot', 1, few_shot.analyze(run))\n"
        "assert few_shot.figures(run, run.path / 'figures')\n"
        "loaded = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {loaded}' if loaded else 0)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
