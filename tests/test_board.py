"""Records to a table: hand-worked statistics, coverage, bad records, publishing, speed."""

import csv
import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_kit import add_scores, make_record, make_run

from kdbench import board as boards
from kdbench import config
from kdbench.board import Statistics, holm, publish, read_entries, render, report, seed_weights, statistics
from kdbench.errors import UserError
from kdbench.record import Named, RecordError, RunFolder, Score, load, load_arrays, save


@dataclass
class Column:
    score: str
    title: str
    unit: str = ""
    direction: str = "higher"
    rank: bool = False
    digits: int = 1
    at: Mapping[str, Any] = field(default_factory=dict)
    mean: Sequence[str] = ()
    against: str = ""
    above: str = ""

    @property
    def key(self) -> str:
        if self.mean:
            return f"mean:{self.title}"
        return "@".join([self.score, *(f"{axis}={value}" for axis, value in self.at.items())])


@dataclass
class Row:
    name: str
    title: str = ""
    reference: bool = False


@dataclass
class Board:
    id: str = "toy/v1"
    title: str = "Toy"
    question: str = "Which method is best?"
    budgets: str = "equal"
    seeds: Sequence[int] = (1, 2, 3)
    sizes: Mapping[str, Any] = field(default_factory=lambda: {"debug": None, "full": None})
    analyses: Sequence[str] = ("quality",)
    rows: Sequence[Row] = (
        Row("teacher", "Teacher", True),
        Row("kd", "KD"),
        Row("gkd", "GKD"),
        Row("sft", "SFT"),
    )
    columns: Sequence[Column] = (
        Column("quality/x", "Quality", "%", rank=True),
        Column("quality/loss", "Loss", direction="lower"),
        Column("record.budget/optimizer_steps", "steps", direction="none", digits=0),
        Column("record.phases/update/peak_rss_bytes", "peak", "bytes", "lower"),
    )
    folder: Path | None = None
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    average: Sequence[str] = ()

    def row_axis_values(self, name: str, size: str | None = None) -> list[dict[str, Any]]:
        values = itertools.product(*self.axes.values())
        return [dict(zip(self.axes, one, strict=True)) for one in values]


RNG = np.random.default_rng(0)
BASE = RNG.normal(50, 10, 40)


def runs_of(root: Path, row: str, shift: float, seeds: Sequence[int] = (1, 2, 3), noise: float = 0.0) -> None:
    """Runs below root/toy/v1 whose scores per prompt are BASE + shift + noise."""
    for seed in seeds:
        rng = np.random.default_rng([seed, *row.encode()])
        values = {"x": BASE + shift + noise * rng.normal(size=40), "loss": 100 - BASE - shift}
        name = f"{row}{seed}"
        make_run(root / "toy/v1" / name, values, run_id=name, row=row, seed=seed, distiller=Named(row, "1"))


def row_of(result: Statistics, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in result["rows"] if row["name"] == name)
    return found


# --------------------------------------------------------------------------------------------- statistics
def test_means_order_and_exactly_paired_differences(tmp_path: Path) -> None:
    for row, shift in (("kd", 0.0), ("gkd", 1.0), ("sft", 0.0), ("teacher", 9.0)):
        runs_of(tmp_path, row, shift)
    result = report(Board(), tmp_path)
    assert [row["name"] for row in result["rows"]] == ["teacher", "gkd", "kd", "sft"]
    best, kd = row_of(result, "gkd")["cells"]["quality/x"], row_of(result, "kd")["cells"]["quality/x"]
    assert best["value"] == pytest.approx(BASE.mean() + 1)
    assert best["best"]
    assert best["interval"][1] - best["interval"][0] > 3  # the spread of the prompts
    # the same prompts in every row: the difference has no spread at all
    np.testing.assert_allclose([kd["difference"]["value"], *kd["difference"]["interval"]], -1, atol=1e-4)
    assert not kd["difference"]["tied"]
    assert kd["difference"]["p"] == pytest.approx(2 / 10_001)
    assert kd["difference"]["p_holm"] == pytest.approx(4 / 10_001)
    assert row_of(result, "gkd")["cells"]["quality/loss"]["best"]  # lower is better
    teacher = row_of(result, "teacher")["cells"]["quality/x"]
    assert (teacher["best"], teacher["test"], teacher["difference"]) == (False, "", None)
    assert kd["seeds"] == {str(seed): pytest.approx(BASE.mean()) for seed in (1, 2, 3)}
    assert kd["interval_over"] == ["training seeds", "prompts"]


def test_rows_that_differ_by_noise_only_are_tied(tmp_path: Path) -> None:
    for row in ("kd", "gkd", "sft"):
        runs_of(tmp_path, row, 0.0, noise=5.0)
    result = report(Board(), tmp_path)
    cells = [row["cells"]["quality/x"] for row in result["rows"]]
    assert [cell["test"] for cell in cells] == ["best", "tied with the best", "tied with the best"]
    assert all(cell["difference"]["p_holm"] > 0.05 for cell in cells[1:])
    # identical rows
    losses = [row["cells"]["quality/loss"]["difference"] for row in result["rows"]]
    assert [one["p"] for one in losses if one] == [1, 1]
    assert [one["interval"] for one in losses if one] == [[0, 0], [0, 0]]


def test_under_three_seeds_nothing_is_tested_and_the_interval_is_over_prompts(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 0.0)
    runs_of(tmp_path, "gkd", 5.0, seeds=(1, 2))
    runs_of(tmp_path, "sft", -1.0)
    result = report(Board(), tmp_path)
    cell = row_of(result, "gkd")["cells"]["quality/x"]
    assert cell["test"] == "not tested: under 3 training seeds"
    assert cell["interval_over"] == ["prompts"]
    assert cell["interval"][0] < cell["value"] < cell["interval"][1]
    assert row_of(result, "kd")["cells"]["quality/x"]["best"]  # the best of those that can be tested
    assert row_of(result, "gkd")["cells"]["record.budget/optimizer_steps"]["interval"] is None
    assert "not tested" in render(result)


def test_the_interval_over_prompts_is_the_normal_one(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 0.0, seeds=(1,))
    low, high = row_of(report(Board(), tmp_path), "kd")["cells"]["quality/x"]["interval"]
    half = 1.96 * BASE.std() / np.sqrt(len(BASE))
    assert [low, high] == pytest.approx([BASE.mean() - half, BASE.mean() + half], abs=0.25)


def test_other_prompts_or_another_task_revision_are_not_compared(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 1.0)
    runs_of(tmp_path, "gkd", 0.0)
    for seed in (1, 2, 3):
        values = {"x": BASE[:30], "prompt": np.arange(30)}
        make_run(tmp_path / "toy/v1" / f"sft{seed}", values, run_id=f"sft{seed}", row="sft", seed=seed)
        path = tmp_path / "toy/v1" / f"gkd{seed}" / "record.json"
        record = load(path)
        record.task = Named("toy", "2")
        save(record, path)
    result = report(Board(), tmp_path)
    for name in ("gkd", "sft"):
        assert "other prompts or task revision" in row_of(result, name)["cells"]["quality/x"]["test"]
        assert row_of(result, name)["cells"]["quality/x"]["difference"] is None


def test_the_order_of_prompts_in_a_file_does_not_matter(tmp_path: Path) -> None:
    for root, order in ((tmp_path / "a", np.arange(40)), (tmp_path / "b", np.arange(40)[::-1])):
        for row, shift in (("kd", 1.0), ("gkd", 0.0)):
            for seed in (1, 2, 3):
                run = make_run(root / "toy/v1" / f"{row}{seed}", run_id=f"{row}{seed}", row=row, seed=seed)
                noise = np.random.default_rng(seed).normal(size=40)
                add_scores(run, {"x": (BASE + shift * noise)[order], "prompt": order})
    one, two = report(Board(), tmp_path / "a"), report(Board(), tmp_path / "b")
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["cells"]["quality/x"]["interval"] == pytest.approx(
            b["cells"]["quality/x"]["interval"], rel=1e-6
        )


def test_statistics_are_reproducible(tmp_path: Path) -> None:
    for row in ("kd", "gkd"):
        runs_of(tmp_path, row, 0.0, noise=5.0)
    entries, _ = read_entries(boards.local_records(Board(), tmp_path), local=True)
    one = statistics(Board(), entries)
    seed_weights.cache_clear()
    assert statistics(Board(), entries[::-1]) == {**one, "records": one["records"]}


def test_axes_are_lines_of_their_own_and_compared_within_themselves(tmp_path: Path) -> None:
    for source, shift in (("a", 0.0), ("b", 7.0)):
        for row, more in (("kd", 0.0), ("gkd", 1.0)):
            for seed in (1, 2, 3):
                name = f"{row}{source}{seed}"
                values = {"x": BASE + shift + more}
                changes = {"run_id": name, "row": row, "seed": seed, "axes": {"source": source}}
                make_run(tmp_path / "toy/v1" / name, values, **changes)
    result = report(Board(), tmp_path)
    best = [
        (row["name"], row["axes"]["source"]) for row in result["rows"] if row["cells"]["quality/x"]["best"]
    ]
    assert best == [("gkd", "a"), ("gkd", "b")]
    assert "KD · source a" in render(result)


def test_holm_by_hand() -> None:
    adjusted, shares = holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert shares == pytest.approx(
        [1 / 3, 1 / 2, 1 / 2, 1 / 4]
    )  # the third test fails, the fourth shares its level
    assert holm([0.6, 0.7])[0] == [1, 1]
    assert holm([]) == ([], [])


def test_seed_weights_average_to_equal_shares_and_widen_for_few_seeds() -> None:
    weights = seed_weights((1, 2, 3))
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights.mean(axis=0), 1 / 3, atol=0.02)
    # Var = k^2 (1/S) (1/S) (1 - 1/S) with k = sqrt(3/2) * 4.3027 / 1.96
    k = np.sqrt(1.5) * 4.30265 / 1.95996
    np.testing.assert_allclose(weights.var(axis=0), k**2 / 9 * (2 / 3), rtol=0.05)
    assert seed_weights((4,)).tolist() == [[1.0]] * len(weights)
    np.testing.assert_array_equal(seed_weights((1, 2, 3)), weights)
    assert not np.array_equal(seed_weights((1, 2, 4)), weights)


def prompt_weights(count: int) -> np.ndarray[Any, Any]:
    stratum = np.zeros(count, dtype=np.int64)
    chunks = range(boards.RESAMPLES // 500)
    return np.concatenate([boards._prompt_weights(stratum, "0f" * 32, chunk) for chunk in chunks])


def test_prompts_are_drawn_within_their_set() -> None:
    stratum = np.repeat([0, 3, 4], [5, 1, 14])
    weights = boards._prompt_weights(stratum, "ab" * 32, 0)
    for one, size in ((0, 5), (3, 1), (4, 14)):
        assert (weights[:, stratum == one].sum(axis=1) == size).all()
    np.testing.assert_array_equal(weights, boards._prompt_weights(stratum, "ab" * 32, 0))
    assert not np.array_equal(weights, boards._prompt_weights(stratum, "ab" * 32, 1))


@pytest.mark.parametrize(("seed_sd", "low"), [(0.0, 0.92), (0.3, 0.92), (3.0, 0.91)])
def test_intervals_cover_the_truth(seed_sd: float, low: float) -> None:
    """Normal scores with noise between prompts and between three training seeds; 400 experiments."""
    rng, count, covered = np.random.default_rng(2), 60, 0
    prompts, seeds = prompt_weights(count) / count, seed_weights((1, 2, 3))
    for _ in range(400):
        x = rng.normal(size=count) + seed_sd * rng.normal(size=(3, 1))
        if seed_sd == 0:
            samples = prompts @ x[0]
        else:
            samples = ((prompts @ x.T) * seeds).sum(axis=1)
        lower, upper = boards._interval(samples)
        covered += lower <= 0 <= upper
    assert covered / 400 >= low
    if seed_sd == 0:
        assert covered / 400 <= 0.98


# ---------------------------------------------------------------------------------- axes over the columns
def spread_board(**changes: Any) -> Board:
    """Two test sets, a and b, side by side, and their mean."""
    told: dict[str, Any] = {
        "axes": {"data": ["a", "b"]},
        "columns": (
            Column("quality/a", "A", "%", at={"data": "a"}),
            Column("quality/b", "B", "%", at={"data": "b"}),
            Column("", "average", "%", rank=True, mean=("A", "B")),
            Column("record.budget/optimizer_steps", "steps", direction="none", digits=0),
        ),
    }
    return Board(**{**told, **changes})


def spread_run(
    root: Path, row: str, data: str, seed: int, values: np.ndarray[Any, Any] | None, **more: Any
) -> RunFolder:
    """A run of a row on one test set, whose prompts are numbered from 0 as those of the other."""
    name = f"{row}-{data}{seed}"
    changes = {"run_id": name, "row": row, "seed": seed, "axes": {"data": data}, **more}
    return make_run(root / "toy/v1" / name, None if values is None else {data: values}, **changes)


def spread_runs(root: Path, row: str, shift: float = 0.0, seeds: Sequence[int] = (1, 2, 3)) -> None:
    """Runs on both sets whose scores per prompt are BASE + shift + seed on a and as much + 10 on b."""
    for seed in seeds:
        for data, more in (("a", 0.0), ("b", 10.0)):
            spread_run(root, row, data, seed, BASE + shift + seed + more)


def half(cell: Mapping[str, Any]) -> float:
    low, high = cell["interval"]
    return float(high - low) / 2


A, B, MEAN, STEPS = "quality/a@data=a", "quality/b@data=b", "mean:average", "record.budget/optimizer_steps"


def test_a_line_holds_all_values_of_a_spread_axis(tmp_path: Path) -> None:
    for row, shift in (("kd", 0.0), ("gkd", 1.0), ("teacher", 9.0)):
        spread_runs(tmp_path, row, shift)
    result = report(spread_board(), tmp_path)
    assert [row["name"] for row in result["rows"]] == ["teacher", "gkd", "kd"]
    kd = row_of(result, "kd")
    assert kd["axes"] == {}
    assert list(kd["cells"]) == [A, B, MEAN, STEPS]
    base = BASE.mean()
    assert kd["cells"][A]["value"] == pytest.approx(base + 2)
    assert kd["cells"][B]["value"] == pytest.approx(base + 12)
    assert kd["cells"][MEAN]["value"] == pytest.approx(base + 7)
    assert kd["cells"][MEAN]["seeds"] == {str(s): pytest.approx(base + s + 5) for s in (1, 2, 3)}
    assert kd["cells"][STEPS]["value"] == 40
    assert kd["cells"][MEAN]["over"] == ["data=a", "data=b"]
    assert kd["cells"][A]["over"] == ["data=a"]
    assert kd["cells"][MEAN]["interval_over"] == ["training seeds", "prompts"]
    # prompts and seeds are the same in both rows: their difference has no spread, in any column
    for key in (A, B, MEAN):
        found = kd["cells"][key]["difference"]
        np.testing.assert_allclose([found["value"], *found["interval"]], -1, atol=1e-4)
        assert row_of(result, "gkd")["cells"][key]["best"]
        assert row_of(result, "teacher")["cells"][key]["test"] == ""


def test_the_mean_of_two_sets_has_the_interval_of_independent_sets(tmp_path: Path) -> None:
    """One seed: the variance of the mean is a quarter of the sum of the sets' own, s^2 / P each."""
    for data in "ab":
        spread_run(tmp_path, "kd", data, 1, BASE)
    cells = row_of(report(spread_board(), tmp_path), "kd")["cells"]
    one = 1.96 * BASE.std() / np.sqrt(len(BASE))
    assert half(cells[A]) == pytest.approx(one, rel=0.03)
    assert half(cells[B]) == pytest.approx(one, rel=0.03)
    assert half(cells[MEAN]) == pytest.approx(one / np.sqrt(2), rel=0.03)
    assert cells[A]["interval"] != cells[B]["interval"]


def test_the_mean_over_seeds_and_sets_varies_with_the_seeds_of_all_columns_jointly(tmp_path: Path) -> None:
    """All noise is between training seeds, with the same effect on both sets: the mean gains nothing."""
    flat = np.full(40, 50.0)
    for seed in (1, 2, 3):
        for data in "ab":
            spread_run(tmp_path, "kd", data, seed, flat + seed)
    cells = row_of(report(spread_board(), tmp_path), "kd")["cells"]
    np.testing.assert_allclose(cells[MEAN]["interval"], cells[A]["interval"], atol=1e-4)
    drawn = seed_weights((1, 2, 3)) @ np.array([51.0, 52.0, 53.0])
    np.testing.assert_allclose(cells[MEAN]["interval"], np.quantile(drawn, [0.025, 0.975]), atol=1e-4)


def test_the_mean_has_the_interval_of_resampling_both_sets_directly(tmp_path: Path) -> None:
    rng, sizes = np.random.default_rng(5), {"a": 60, "b": 25}
    scores = {
        data: rng.normal(50, 10, size) + rng.normal(0, 4, (3, size)) + rng.normal(0, 1.5, (3, 1))
        for data, size in sizes.items()
    }
    for seed in (1, 2, 3):
        for data in "ab":
            spread_run(tmp_path, "kd", data, seed, scores[data][seed - 1])
    found = row_of(report(spread_board(), tmp_path), "kd")["cells"][MEAN]
    assert found["value"] == pytest.approx(np.mean([scores["a"].mean(), scores["b"].mean()]))
    count, expansion = 40_000, np.sqrt(1.5) * 4.30265 / 1.95996
    seeds = 1 / 3 + expansion * (rng.multinomial(3, [1 / 3] * 3, count) / 3 - 1 / 3)
    means = [
        scores[data][:, rng.integers(0, size, (count, size))].mean(axis=2) for data, size in sizes.items()
    ]
    draws = (seeds * np.mean(means, axis=0).T).sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found["interval"] == pytest.approx([low, high], abs=0.03 * (high - low))


def test_one_test_set_at_several_values_of_an_axis_is_drawn_once(tmp_path: Path) -> None:
    columns = (
        *(Column("quality/x", f"K{k}", at={"k": k}) for k in (16, 32)),
        Column("", "average", mean=("K16", "K32")),
        Column("quality/x", "any k"),
    )
    for k in (16, 32):
        changes = {"run_id": f"kd{k}", "axes": {"k": k}}
        make_run(tmp_path / f"toy/v1/kd{k}", {"x": BASE + k}, **changes)
    cells = row_of(report(Board(columns=columns), tmp_path), "kd")["cells"]
    assert list(cells) == ["quality/x@k=16", "quality/x@k=32", "mean:average", "quality/x"]
    for key in cells:  # the mean of two equal curves on the same prompts varies as each of them
        assert half(cells[key]) == pytest.approx(half(cells["quality/x@k=16"]), abs=1e-4)
    assert cells["quality/x"] == {**cells["mean:average"], "best": False}
    assert cells["quality/x"]["value"] == pytest.approx(BASE.mean() + 24)


def test_what_is_missing_is_a_dash_and_no_mean_over_fewer(tmp_path: Path) -> None:
    spread_runs(tmp_path, "kd")
    spread_runs(tmp_path, "gkd", 1.0, seeds=(1, 2))
    spread_run(tmp_path, "gkd", "a", 3, BASE)
    spread_run(tmp_path, "sft", "a", 1, BASE, budget={"optimizer_steps": 7})
    result = report(spread_board(), tmp_path)
    gkd, sft = (row_of(result, name)["cells"] for name in ("gkd", "sft"))
    assert list(gkd[A]["seeds"]) == ["1", "2", "3"]
    assert list(gkd[MEAN]["seeds"]) == ["1", "2"]
    assert list(gkd[STEPS]["seeds"]) == ["1", "2"]
    assert gkd[MEAN]["value"] == pytest.approx(BASE.mean() + 1 + 1.5 + 5)
    assert gkd[MEAN]["test"] == "not tested: under 3 training seeds"
    assert list(sft) == [A, STEPS]
    assert sft[STEPS]["value"] == 7
    table = render(result)
    line = next(line for line in table.split("\n") if line.startswith("SFT"))
    assert line.split()[2:] == ["1", f"{BASE.mean():.1f}", f"±{half(sft[A]):.1f}?", "–", "–", "7"]
    assert "2–3" in next(line for line in table.split("\n") if line.startswith("GKD"))
    assert "average: mean of A, B.\n" in table
    assert "steps: mean over the values of data that a row has.\n" in table


def test_a_column_over_other_values_is_not_compared(tmp_path: Path) -> None:
    spread_runs(tmp_path, "kd")
    spread_runs(tmp_path, "gkd", 1.0)
    for data in "ab":
        for seed in (1, 2, 3):
            for row in ("kd", "gkd"):
                add_scores(RunFolder(tmp_path / f"toy/v1/{row}-{data}{seed}"), {"z": BASE}, "other")
    for seed in (1, 2, 3):
        add_scores(spread_run(tmp_path, "sft", "a", seed, BASE - 5), {"z": BASE - 5}, "other")
    board = spread_board(columns=(*spread_board().columns, Column("other/z", "Z")))
    cells = {name: row_of(report(board, tmp_path), name)["cells"] for name in ("kd", "gkd", "sft")}
    assert cells["sft"][A]["test"] == "differs from the best"
    assert cells["sft"]["other/z"]["test"] == (
        "not tested: mean over other values of the spread axes than the best row"
    )


@pytest.mark.parametrize("change", ["prompts", "task", "conditions"])
def test_every_part_of_a_mean_must_be_of_the_same_prompts_and_conditions(tmp_path: Path, change: str) -> None:
    spread_runs(tmp_path, "kd")
    spread_runs(tmp_path, "gkd", 1.0)
    for seed in (1, 2, 3):
        for row, teacher in (("kd", "t"), ("gkd", "u")):
            for data in "ab":
                path = tmp_path / f"toy/v1/{row}-{data}{seed}/record.json"
                record = load(path)
                shown = teacher if data == "a" and change == "conditions" else "t"
                record.analyses["quality"]["detail"] = {"conditions": {"teacher": shown}}
                if (row, data, change) == ("kd", "a", "task"):
                    record.task = Named("toy", "2")
                save(record, path)
        if change == "prompts":
            spread_run(tmp_path, "kd", "a", seed, BASE[:30])
    cells = row_of(report(spread_board(), tmp_path), "kd")["cells"]
    said = "other teacher (u and t)" if change == "conditions" else "other prompts or task revision"
    assert cells[B]["test"] == "differs from the best"
    for key in (A, MEAN):
        assert said in cells[key]["test"], key


def test_draws_may_differ_between_seeds(tmp_path: Path) -> None:
    """The data of each seed are its own: a revision each, and a row that lacks one is still compared."""
    spread_runs(tmp_path, "kd")
    spread_runs(tmp_path, "gkd", 1.0, seeds=(1, 2, 3, 4))
    for path in tmp_path.glob("toy/v1/*/record.json"):
        record = load(path)
        record.task = Named("toy", f"{record.axes['data']}{record.seed}")
        record.config["task_settings"] = {"draw": record.seed, "data": record.axes["data"]}
        save(record, path)
    result = report(spread_board(), tmp_path)
    assert result["warnings"] == []
    assert row_of(result, "kd")["cells"][MEAN]["difference"] is not None
    path = tmp_path / "toy/v1/kd-a2/record.json"
    record = load(path)
    record.task = Named("toy", "of another day")
    record.distiller = Named("kd", "of another day")
    save(record, path)
    result = report(spread_board(), tmp_path)
    assert result["warnings"] == ["row 'kd (local)': its runs are of 2 revisions of method or task."]
    assert "other prompts or task revision" in row_of(result, "kd")["cells"][MEAN]["test"]


def test_axes_that_no_column_names_stay_lines(tmp_path: Path) -> None:
    for source in ("s", "t"):
        for data in "ab":
            name = f"kd-{source}{data}"
            changes = {"run_id": name, "axes": {"source": source, "data": data}}
            make_run(tmp_path / "toy/v1" / name, {data: BASE}, **changes)
    result = report(spread_board(), tmp_path)
    assert [row["axes"] for row in result["rows"]] == [{"source": "s"}, {"source": "t"}]
    assert result["rows"][1]["runs"] == {"data=a": {"1": "kd-ta"}, "data=b": {"1": "kd-tb"}}
    assert "KD · source t (local): runs by data and seed a (1: kd-ta); b (1: kd-tb)" in render(result)


def test_two_spread_axes(tmp_path: Path) -> None:
    columns = [
        Column("quality/x", f"{data}{k}", at={"data": data, "k": k}) for data in "ba" for k in (True, 1)
    ]
    columns += [Column("quality/x", "b", at={"data": "b"}), Column("", "all", mean=("bTrue", "b1", "a1"))]
    for at, (data, k) in enumerate(itertools.product("ab", (True, 1))):
        changes = {"run_id": f"r{at}", "axes": {"data": data, "k": k}}
        make_run(tmp_path / f"toy/v1/r{at}", {"x": BASE * 0 + at}, **changes)
    result = report(Board(columns=columns), tmp_path)
    cells = row_of(result, "kd")["cells"]
    values = {key: cell["value"] for key, cell in cells.items()}
    assert values == {
        "quality/x@data=b@k=True": 2,
        "quality/x@data=b@k=1": 3,
        "quality/x@data=a@k=True": 0,
        "quality/x@data=a@k=1": 1,
        "quality/x@data=b": 2.5,
        "mean:all": 2,
    }
    assert list(row_of(result, "kd")["runs"]) == [
        "data=b,k=True",
        "data=b,k=1",
        "data=a,k=True",
        "data=a,k=1",
    ]
    assert "runs by data, k and seed data=b,k=True (1: r2); data=b,k=1 (1: r3)" in render(result)


def test_lost_prompts_of_one_part_cost_the_mean_its_interval(tmp_path: Path) -> None:
    spread_runs(tmp_path, "kd")
    spread_runs(tmp_path, "gkd", 1.0)
    (tmp_path / "toy/v1/kd-a2/scores.npz").write_bytes(b"PK")
    cells = row_of(report(spread_board(), tmp_path), "kd")["cells"]
    assert cells[B]["interval"] is not None
    for key in (A, MEAN):
        assert cells[key]["interval"] is None
        assert cells[key]["test"] == "not tested: not defined in every resample"
    assert cells[MEAN]["value"] == pytest.approx(BASE.mean() + 7)
    for seed in (1, 3):  # all of a's prompts
        (tmp_path / f"toy/v1/kd-a{seed}/scores.npz").write_bytes(b"PK")
    cells = row_of(report(spread_board(), tmp_path), "kd")["cells"]
    assert cells[MEAN]["interval"] is None
    assert cells[MEAN]["test"] == "not tested: not defined in every resample"


def test_every_format_leads_from_each_cell_to_its_runs(tmp_path: Path) -> None:
    spread_runs(tmp_path, "kd")
    spread_runs(tmp_path, "gkd", 1.0, seeds=(1, 3))
    spread_run(tmp_path, "gkd", "b", 2, None, status="diverged", reason="loss is NaN at step 12")
    result = report(spread_board(), tmp_path)
    names = {path.parent.name for path in tmp_path.glob("toy/v1/*/record.json")}
    for format in ("table", "markdown", "csv", "json"):
        text = render(result, format)
        assert {name for name in names if name not in text} == set(), format
    for format in ("table", "markdown"):
        lines = render(result, format).replace("- ", "").split("\n")
        assert "GKD · data b (local): seed 2 diverged: loss is NaN at step 12 (run gkd-b2)" in lines
        assert (
            "GKD (local): runs by data and seed a (1: gkd-a1, 3: gkd-a3); b (1: gkd-b1, 3: gkd-b3)" in lines
        )
    assert "2, 1 diverged" in render(result)
    rows = list(csv.DictReader(io.StringIO(render(result, "csv"))))
    runs = {row["score"]: row["runs"] for row in rows if row["row"] == "gkd" and row["status"] == "done"}
    assert runs == {
        A: "1:gkd-a1 3:gkd-a3",
        B: "1:gkd-b1 3:gkd-b3",
        MEAN: "1:gkd-a1 3:gkd-a3 1:gkd-b1 3:gkd-b3",
        STEPS: "1:gkd-a1 3:gkd-a3 1:gkd-b1 3:gkd-b3",
    }
    (failed,) = (row for row in rows if row["status"] == "diverged")
    assert (failed["axes"], failed["runs"]) == ("data=b", "2:gkd-b2")
    back = json.loads(render(result, "json"))
    assert back["spread"] == ["data"]
    assert [column.get("key") for column in back["columns"]] == [A, B, MEAN, None]
    assert back["rows"][0]["runs"] == {
        f"data={data}": {str(seed): f"gkd-{data}{seed}" for seed in (1, 3)} for data in "ab"
    }
    spread_run(tmp_path, "gkd", "b", 2, BASE)  # done since; one of the same seed on a is another run
    assert row_of(report(spread_board(), tmp_path), "gkd")["failed"] == []


def test_a_failed_run_of_one_value_hides_none_of_another(tmp_path: Path) -> None:
    spread_run(tmp_path, "kd", "b", 1, None, status="failed", reason="ValueError: no")
    spread_run(tmp_path, "kd", "a", 1, BASE)
    again = spread_run(tmp_path, "kd", "a", 1, BASE, run_id="again")
    again.path.rename(again.path.with_name("again"))
    spread_run(tmp_path, "kd", "a", 1, BASE)
    result = report(spread_board(), tmp_path)
    assert [run["run_id"] for run in row_of(result, "kd")["failed"]] == ["kd-b1"]
    assert [text.split(":")[0] for text in result["warnings"]] == ["row 'kd (data=a, local)', seed 1"]


def test_a_mean_on_a_board_without_axes(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 0.0, noise=5.0)
    runs_of(tmp_path, "gkd", 1.0, noise=5.0)
    plain = Board(columns=(Column("quality/x", "X"), Column("quality/loss", "L")))
    board = Board(columns=(*plain.columns, Column("", "both", mean=("X", "L"))))
    one, two = report(plain, tmp_path), report(board, tmp_path)
    assert "spread" not in two
    assert "over" not in two["rows"][0]["cells"]["quality/x"]
    for row in one["rows"]:
        cells = row_of(two, row["name"])["cells"]
        assert {key: cells[key] for key in row["cells"]} == row["cells"], "other columns are as before"
        parts = [cells[key]["value"] for key in ("quality/x", "quality/loss")]
        assert cells["mean:both"]["value"] == pytest.approx(np.mean(parts))
    assert "1:gkd1 2:gkd2 3:gkd3" in render(two, "csv").split("mean:both")[1]


@pytest.mark.parametrize("estimator", ["mean", "stratum_mean"])
def test_many_runs_in_one_product_are_each_run_alone(estimator: str) -> None:
    rng, stratum = np.random.default_rng(1), np.repeat([0, 1], [15, 25])
    weights = boards._prompt_weights(stratum, "ab" * 32, 0)
    args = {"stratum": 1} if estimator == "stratum_mean" else {}
    jobs = []
    for _ in range(3):
        inputs = {"values": rng.normal(50, 10, 40), "prompt": np.arange(40), "stratum": stratum}
        jobs.append((Score(0.0, "", 40, "none", estimator, {}, args), inputs, np.empty(500)))
    one = [(*job[:2], np.empty(500)) for job in jobs]
    boards._resample(jobs, weights, slice(0, 500), together=True)
    boards._resample(one, weights, slice(0, 500), together=False)
    for (_, _, fast), (_, _, slow) in zip(jobs, one, strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-6)


# ------------------------------------------------------------------------------ what is not a usable record
def test_failed_and_diverged_runs_show_with_their_reason(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 0.0, seeds=(1, 3))
    folder = tmp_path / "toy/v1"
    make_run(
        folder / "kd2", run_id="kd2", row="kd", seed=2, status="diverged", reason="loss is NaN at step 12"
    )
    make_run(folder / "gkd1", run_id="gkd1", row="gkd", seed=1, status="failed", reason="ValueError: no")
    # a failed run whose seed was done later is no longer shown, one that is newer is
    old = make_run(folder / "old", run_id="old", row="kd", seed=1, status="failed", reason="gone")
    os.utime(old.path / "record.json", (0, 0))
    make_run(folder / "new", run_id="new", row="kd", seed=3, status="failed", reason="broken since")
    for format in ("table", "markdown"):
        text = render(report(Board(), tmp_path), format)
        assert "seed 2 diverged: loss is NaN at step 12 (run kd2)" in text
        assert "seed 1 failed: ValueError: no (run gkd1)" in text
        assert "2, 1 diverged, 1 failed" in text
        assert "seed 3 failed: broken since (run new)" in text
        assert "gone" not in text
    rows = list(csv.DictReader(io.StringIO(render(report(Board(), tmp_path), "csv"))))
    assert {(row["status"], row["runs"]) for row in rows if row["status"] != "done"} == {
        ("diverged", "2:kd2"),
        ("failed", "1:gkd1"),
        ("failed", "3:new"),
    }


def test_bad_records_are_named_and_left_out(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 0.0)
    folder = tmp_path / "toy/v1"
    for name, text in (("torn", "{"), ("other", "[]"), ("old", '{"schema": 0}')):
        (folder / name).mkdir()
        (folder / name / "record.json").write_text(text)
    make_run(folder / "stray", run_id="stray", board="elsewhere/v1")
    (folder / "kd2" / "scores.npz").write_bytes(b"PK")
    result = report(Board(), tmp_path)
    assert len(result["warnings"]) == 5
    for name in ("torn", "other", "old"):
        assert sum(f"{name}/record.json" in warning for warning in result["warnings"]) == 1
    text = render(result)
    assert text.count("\nWarning: ") == 5
    assert "is a run of elsewhere/v1, not of toy/v1" in text
    assert row_of(result, "kd")["cells"]["quality/x"]["interval"] is None  # seed 2's prompts are lost
    assert row_of(result, "kd")["cells"]["quality/x"]["value"] == pytest.approx(BASE.mean())


def test_an_unknown_estimator_costs_the_interval_only(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 0.0)
    path = tmp_path / "toy/v1/kd1/record.json"
    path.write_text(path.read_text().replace('"estimator": "mean"', '"estimator": "median"'))
    result = report(Board(), tmp_path)
    assert any("no estimator 'median'" in warning for warning in result["warnings"])
    assert row_of(result, "kd")["cells"]["quality/x"]["interval"] is None


def test_two_runs_of_one_seed_show_the_newer_and_say_so(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 0.0, seeds=(1,))
    make_run(tmp_path / "toy/v1/newer", {"x": BASE + 3}, run_id="newer", row="kd", seed=1)
    result = report(Board(), tmp_path)
    assert row_of(result, "kd")["runs"] == {"1": "newer"}
    assert result["warnings"] == ["row 'kd (local)', seed 1: has 2 runs; shown is the newest, newer."]


def test_sizes_are_kept_apart(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 0.0)
    make_run(tmp_path / "toy/v1/small", {"x": BASE}, run_id="small", row="gkd", size="debug")
    assert [row["name"] for row in report(Board(), tmp_path)["rows"]] == ["kd"]
    assert [row["name"] for row in report(Board(), tmp_path, "debug")["rows"]] == ["gkd"]
    with pytest.raises(UserError, match="no size 'fulll'. Did you mean 'full'"):
        report(Board(), tmp_path, "fulll")


# ------------------------------------------------------------------------------------------------ rendering
def test_every_format_names_runs_and_fits(tmp_path: Path) -> None:
    for row, shift in (("kd", 0.0), ("gkd", 1.0), ("teacher", 9.0)):
        runs_of(tmp_path, row, shift)
    columns = [
        Column(f"quality/{name}", f"{name} {i}", rank=i == 0) for i, name in enumerate(["x", "loss"] * 6)
    ]
    wide = Board(columns=[*columns, *Board().columns[2:]])
    result = report(wide, tmp_path)
    table = render(result)
    assert (
        max(len(line) for line in table.split("\n") if line.startswith(("KD", "GKD", "─", "Teacher (ref")))
        <= 120
    )
    assert table.count("Teacher (reference, local) ") == 2  # in two blocks
    assert "2.00" in table
    assert "GB ↓" in table
    for format in ("table", "markdown", "csv", "json"):
        text = render(result, format)
        for run in ("kd1", "gkd3", "teacher2"):
            assert run in text
    back = json.loads(render(result, "json"))
    assert back["rows"][1]["runs"] == {"1": "gkd1", "2": "gkd2", "3": "gkd3"}
    assert "files" not in back
    line = next(row for row in csv.DictReader(io.StringIO(render(result, "csv"))) if row["row"] == "kd")
    assert float(line["difference"]) == pytest.approx(-1)
    assert line["runs"] == "1:kd1 2:kd2 3:kd3"
    assert line["local"] == "True"
    with pytest.raises(UserError, match="Did you mean 'markdown'"):
        render(result, "markdwn")


def test_an_empty_board_and_differing_budgets_are_said(tmp_path: Path) -> None:
    result = report(Board(budgets="differ", folder=tmp_path))
    for format in ("table", "markdown"):
        assert "No runs yet." in render(result, format)
        assert "budgets differ" in render(result, format)
    assert render(result, "csv").count("\n") == 1


def test_marks_of_best_tied_and_different(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 0.0, noise=5.0)
    runs_of(tmp_path, "gkd", 0.0, noise=5.0)
    runs_of(tmp_path, "sft", -20.0)
    result = report(Board(), tmp_path)
    values = [row["cells"]["quality/x"] for row in result["rows"]]
    lines = {line.split(" ")[0]: line for line in render(result).split("\n") if "runs by" not in line}
    first, second, third = (row["title"] for row in result["rows"])
    assert f"{values[0]['value']:.1f} ±" in lines[first]
    assert "*" in lines[first]
    assert "=" in lines[second]
    assert [mark in lines[third] for mark in "*="] == [False, False]


# ---------------------------------------------------------------------------------------------- publishing
@pytest.fixture
def published(tmp_path: Path) -> Board:
    board = Board(folder=tmp_path / "board")
    for row, shift in (("kd", 0.0), ("gkd", 1.0)):
        runs_of(tmp_path / "runs", row, shift)
    folders = sorted((tmp_path / "runs/toy/v1").iterdir())
    assert publish(folders, board) == []
    return board


def test_publishing_copies_records_and_refreshes_the_table(published: Board, tmp_path: Path) -> None:
    assert published.folder is not None
    names = {path.name for path in (published.folder / "records").iterdir()}
    assert names == {
        f"{row}{seed}.{suffix}" for row in ("kd", "gkd") for seed in (1, 2, 3) for suffix in ("json", "npz")
    }
    assert "| GKD | 3 |" in (published.folder / "table.md").read_text()
    result = report(published)
    assert not any(row["local"] for row in result["rows"])
    assert result == report(published, tmp_path / "nothing")
    # the same runs found locally are shown once, as published; a new one is local
    runs_of(tmp_path / "runs", "sft", 2.0)
    rows = report(published, tmp_path / "runs")["rows"]
    assert [(row["name"], row["local"]) for row in rows] == [("sft", True), ("gkd", False), ("kd", False)]
    assert rows[0]["cells"]["quality/x"]["best"]
    stored = (published.folder / "statistics.json").read_text()
    assert str(tmp_path) not in stored


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"board": "other/v1"}, "is a run of other/v1"),
        ({"status": "diverged", "reason": "NaN"}, "the run diverged (NaN)"),
        ({"size": "debug"}, "is of size 'debug'; toy/v1 publishes 'full'"),
        ({"seed": 9}, "seed 9 is not one of the board's seeds (1, 2, 3)"),
        ({"row": "kdd"}, "no row 'kdd'. Did you mean 'kd'"),
        ({"analyses": {}}, "has no scores of quality"),
        ({"run_id": "kd1b"}, "has run kd1 for row 'kd' and seed 1"),
    ],
)
def test_what_may_not_be_published_is_refused(
    published: Board, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert published.folder is not None
    before = sorted((published.folder / "records").iterdir())
    run = RunFolder(tmp_path / "runs/toy/v1/kd1")
    record = run.record
    for key, value in changes.items():
        setattr(record, key, value)
    save(record, run.path / "record.json")
    with pytest.raises(UserError) as caught:
        publish([tmp_path / "runs/toy/v1/gkd1", run.path], published)
    assert said in str(caught.value)
    assert sorted((published.folder / "records").iterdir()) == before


def test_a_run_without_its_arrays_is_not_published(published: Board, tmp_path: Path) -> None:
    (tmp_path / "runs/toy/v1/kd1/scores.npz").unlink()
    with pytest.raises(RecordError, match="scores.npz"):
        publish([tmp_path / "runs/toy/v1/kd1"], published)


def test_publishing_keeps_the_arrays_of_columns_only(published: Board, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs/toy/v1/again", {"x": BASE, "other": BASE * 2}, run_id="again", row="sft")
    before = report(published, tmp_path / "runs")
    publish([run.path], published)
    assert published.folder is not None
    copy = load(published.folder / "records/again.json")
    assert set(run.arrays()) == {"quality/prompt", "quality/x", "quality/other"}
    arrays = load_arrays(published.folder / "records/again.npz", copy.arrays_sha256)
    assert set(arrays) == {"quality/prompt", "quality/x"}
    assert copy.scores["quality/x"] == run.record.scores["quality/x"]
    assert copy.value("quality/other") == run.record.value("quality/other")
    assert copy.scores["quality/other"].estimator is None
    after = report(published, tmp_path / "nothing")
    for name in ("sft", "kd"):
        assert row_of(after, name)["cells"] == row_of(before, name)["cells"]


def test_rows_measured_under_other_conditions_are_not_compared(tmp_path: Path) -> None:
    for row, shift in (("kd", 0.0), ("gkd", 1.0), ("sft", 2.0)):
        runs_of(tmp_path, row, shift)
    for seed in (1, 2, 3):
        for row, temperature in (("kd", 1.0), ("gkd", 0.7), ("sft", 1.0)):
            path = tmp_path / f"toy/v1/{row}{seed}/record.json"
            record = load(path)
            decoding = {"temperature": temperature}
            record.analyses["quality"]["detail"] = {"conditions": {"teacher": "t", "decoding": decoding}}
            save(record, path)
    cells = {
        name: row_of(report(Board(), tmp_path), name)["cells"]["quality/x"] for name in ("kd", "gkd", "sft")
    }
    assert cells["sft"]["best"]
    assert cells["kd"]["test"] == "differs from the best"
    assert "other decoding settings (temperature 1.0 and 0.7)" in cells["gkd"]["test"]


def test_replacing_is_explicit_and_a_dirty_tree_is_warned_of(published: Board, tmp_path: Path) -> None:
    environment = {**make_record().environment, "dirty": True}
    changes: dict[str, Any] = {"run_id": "again", "row": "kd", "seed": 1, "environment": environment}
    run = make_run(tmp_path / "runs/toy/v1/again", {"x": BASE + 9}, **changes)
    warnings = publish([run.path], published, replace=True)
    assert len(warnings) == 1
    assert "changes that were not committed" in warnings[0]
    assert published.folder is not None
    assert not (published.folder / "records/kd1.json").exists()
    assert not (published.folder / "records/kd1.npz").exists()
    assert row_of(report(published), "kd")["runs"]["1"] == "again"


def test_publishing_a_spread_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = spread_board(folder=tmp_path / "board")
    spread_runs(tmp_path / "runs", "kd")
    spread_runs(tmp_path / "runs", "gkd", 1.0)
    counts = {"statistics": 0, "load": 0}
    for name, function in (("statistics", statistics), ("load", load)):

        def counted(*args: Any, _name: str = name, _function: Any = function) -> Any:
            counts[_name] += 1
            return _function(*args)

        monkeypatch.setattr(boards, name, counted)
    folders = sorted((tmp_path / "runs/toy/v1").iterdir())
    assert publish(folders, board) == []
    assert counts == {"statistics": 1, "load": 2 * len(folders)}  # each run's own, then as published
    assert board.folder is not None
    assert len(list((board.folder / "records").glob("*.npz"))) == 12
    assert "| GKD | 3 |" in (board.folder / "table.md").read_text()
    before = row_of(report(board), "kd")["cells"]
    assert before == {
        key: {**cell, "difference": cell["difference"]}
        for key, cell in row_of(report(spread_board(), tmp_path / "runs"), "kd")["cells"].items()
    }, "what is left out of a published record moves nothing"
    new = spread_run(tmp_path / "runs", "kd", "b", 1, BASE, run_id="new")
    with pytest.raises(UserError, match="has run kd-b1 for row 'kd', data b and seed 1"):
        publish([new.path], board)
    publish([new.path], board, replace=True)
    assert row_of(report(board), "kd")["runs"]["data=b"]["1"] == "new"
    assert row_of(report(board), "kd")["runs"]["data=a"]["1"] == "kd-a1"
    twin = spread_run(tmp_path / "runs", "sft", "b", 1, BASE, run_id="one")
    other = make_run(tmp_path / "twin", {"b": BASE}, run_id="two", row="sft", axes={"data": "b"})
    with pytest.raises(UserError, match="is of the row, axis values and seed of .*sft-b1"):
        publish([twin.path, other.path], board)
    stray = make_run(tmp_path / "stray", {"b": BASE}, run_id="stray", row="sft", axes={"data": "c"})
    with pytest.raises(
        UserError, match="no axis values 'data=c'. Did you mean 'data=.'. Known: data=a, data=b"
    ):
        publish([stray.path], board)


# ------------------------------------------------------------------------------------------------- storing
def test_stored_statistics_are_read_until_a_record_or_the_question_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_of(tmp_path, "kd", 0.0)
    first = report(Board(), tmp_path)

    def refuse(*_: object) -> Statistics:
        raise AssertionError("computed again")

    monkeypatch.setattr(boards, "statistics", refuse)
    assert report(Board(), tmp_path) == first
    with pytest.raises(AssertionError):
        report(Board(columns=Board.columns[:1]), tmp_path)
    with pytest.raises(AssertionError):
        report(Board(rows=()), tmp_path)
    (tmp_path / "toy/v1/kd1/record.json").write_text("{")
    with pytest.raises(AssertionError):
        report(Board(), tmp_path)
    monkeypatch.undo()
    assert row_of(report(Board(), tmp_path), "kd")["runs"] == {"2": "kd2", "3": "kd3"}
    (tmp_path / "toy/v1/statistics-full.json").write_text("[]")
    assert row_of(report(Board(), tmp_path), "kd")["runs"] == {"2": "kd2", "3": "kd3"}


def test_a_stored_table_needs_neither_numpy_nor_torch(tmp_path: Path) -> None:
    runs_of(tmp_path, "kd", 0.0)
    report(Board(), tmp_path)
    code = (
        "import sys, time; from pathlib import Path; start = time.process_time()\n"
        "sys.path.insert(0, 'tests'); from kdbench import board\n"
        "import types; c = types.SimpleNamespace\n"
        "columns = [c(score=s, title=t, unit=u, direction=d, rank=r, digits=n, at={}, mean=[],"
        " against='', above='', key=s)"
        " for s, t, u, d, r, n in "
        f"{[(c.score, c.title, c.unit, c.direction, c.rank, c.digits) for c in Board().columns]!r}]\n"
        "rows = [c(name=n, title=t, reference=r) for n, t, r in "
        f"{[(r.name, r.title, r.reference) for r in Board().rows]!r}]\n"
        "b = c(id='toy/v1', title='Toy', question='Which method is best?', budgets='equal', folder=None,\n"
        "      average=[], sizes={'debug': None, 'full': None}, rows=rows, columns=columns)\n"
        f"print(board.render(board.report(b, Path({str(tmp_path)!r}))))\n"
        "loaded = {'numpy', 'torch', 'scipy', 'pyarrow'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert time.process_time() - start < 0.5\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kd: runs" in done.stdout.lower().replace(" (local)", "")


def test_a_board_of_real_size_is_computed_in_seconds(tmp_path: Path) -> None:
    """8 rows, 3 seeds, 1500 prompts, 12 columns."""
    rng, count = np.random.default_rng(0), 1500
    names = [f"m{i}" for i in range(12)]
    for r in range(8):
        for seed in (1, 2, 3):
            values = {name: rng.normal(size=count) for name in names}
            folder = tmp_path / "toy/v1" / f"r{r}-{seed}"
            make_run(folder, values, run_id=f"r{r}-{seed}", row=f"r{r}", seed=seed)
    columns = [Column(f"quality/{name}", name, rank=name == "m0") for name in names]
    rows = [Row(f"r{r}") for r in range(8)]
    start = time.process_time()
    result = report(Board(columns=columns, rows=rows), tmp_path)
    assert time.process_time() - start < 12  # about 3 on a quiet core
    assert len(result["rows"]) == 8
    assert all(len(row["cells"]) == 12 for row in result["rows"])


def test_three_hundred_records_are_computed_in_seconds(tmp_path: Path) -> None:
    """10 rows, 6 test sets of 1,000 prompts, 5 seeds; stored statistics are read at once."""
    rng, sets = np.random.default_rng(0), "abcdef"
    for row, data, seed in itertools.product(range(10), sets, range(1, 6)):
        spread_run(tmp_path, f"r{row}", data, seed, 100.0 * (rng.random(1000) < 0.6))
    columns = [Column(f"quality/{data}", data, at={"data": data}) for data in sets]
    board = Board(columns=[*columns, Column("", "mean", mean=list(sets), rank=True)], rows=[Row("r0")])
    start = time.process_time()
    result = report(board, tmp_path)
    assert time.process_time() - start < 8  # about 2 on a quiet core
    assert len(result["rows"]) == 10
    assert all(len(row["cells"]) == 7 for row in result["rows"])
    start = time.process_time()
    assert report(board, tmp_path) == result
    assert time.process_time() - start < 0.2  # about 0.03


def test_published_statistics_stay_what_they_are() -> None:
    board = config.load_board("tiny-instruct/v1")
    assert board.folder is not None
    stored = json.loads((board.folder / "statistics.json").read_text())
    entries, _ = read_entries(boards.published_records(board), local=False)
    found = json.loads(json.dumps(statistics(board, entries)))
    assert list(found) == [key for key in stored if key != "files"]

    def same(one: Any, other: Any, where: str) -> None:
        if isinstance(one, dict):
            assert list(one) == list(other), where
            for key in one:
                same(one[key], other[key], f"{where}/{key}")
        elif isinstance(one, list):
            assert len(one) == len(other), where
            for at, pair in enumerate(zip(one, other, strict=True)):
                same(*pair, f"{where}/{at}")
        else:
            assert one == (pytest.approx(other, rel=1e-3, abs=1e-5) if isinstance(one, float) else other), (
                where
            )

    same({key: value for key, value in stored.items() if key != "files"}, found, board.id)


def test_the_boards_in_the_tree_can_be_reported(tmp_path: Path) -> None:
    for name in config.boards():
        board = config.load_board(name)
        result = statistics(board, [])
        assert "No runs yet." in render(result)
        assert result["title"] == board.title
