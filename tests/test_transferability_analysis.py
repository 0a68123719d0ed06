"""The transferability analysis: correlations, choices, relations, figures and page, on known gains."""

import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from record_kit import make_run
from safetensors.numpy import save_file
from scipy.stats import spearmanr
from typer.testing import CliRunner

from analyses import _transferability_ranks as ranking
from analyses import _transferability_rows as rows
from analyses import transferability
from analyses._transferability_page import write
from kdbench.cli import app
from kdbench.record import DevScore, Named, RecordError, RunFolder, Score, save

SOURCES, TARGETS = ("a", "b", "c", "d", "e"), ("a", "b", "x")
# how much each source helps each target: all different within a target
GAINS = {(s, t): 3.0 * i - 5 + (2 * i + j) % 3 for j, t in enumerate(TARGETS) for i, s in enumerate(SOURCES)}
Number = Callable[[str, str, int], float | None]


def likeness(source: str, target: str, seed: int) -> float:
    """Grows with the gain; 1 of a task with itself."""
    return 1.0 if source == target else float(np.tanh(GAINS[source, target] / 10))


def board(
    root: Path,
    metrics: Mapping[str, Number] | None = None,
    gain: Number = lambda s, t, k: GAINS[s, t],
    seeds: Sequence[int] = (1,),
    sources: Sequence[str] = SOURCES,
    targets: Sequence[str] = TARGETS,
    skip: Callable[[str, str, int], bool] = lambda s, t, k: False,
    curve: Callable[[str, str, int], list[float]] | None = None,
    task: str = "toy",
    settings: Mapping[str, Any] | None = None,
) -> list[RunFolder]:
    """The runs of a board: pt on every task scores 50 + seed, pot `gain` more, panda half of it."""
    found = []
    given = {"semantic": likeness} if metrics is None else metrics

    def add(row: str, score: float, seed: int, axes: dict[str, str], predicted: Mapping[str, float]) -> None:
        name = "-".join([row, *axes.values(), str(seed)])
        points = curve(axes.get("source", ""), axes["target"], seed) if curve else []
        run = make_run(
            root / name,
            run_id=name,
            row=row,
            seed=seed,
            axes=axes,
            distiller=Named(row, "1"),
            task=Named(task, "1"),
            config={"title": row, "settings": dict(settings or {}), "select": {"score": "score"}},
            curve=[DevScore(50 * (at + 1), 1.0, value) for at, value in enumerate(points)],
            scores={
                "transfer/score": Score(score, "x 100", 40, "higher"),
                **{f"method/{key}": Score(value, "", 1) for key, value in predicted.items()},
                **({"dev/score": Score(max(points), "", 200, "higher")} if points else {}),
            },
        )
        found.append(run)

    for seed in seeds:
        for name in dict.fromkeys((*targets, *sources)):
            add("pt", 50.0 + seed, seed, {"target": name}, {})
        for source, target in itertools.product(sources, targets):
            if skip(source, target, seed):
                continue
            value = gain(source, target, seed)
            axes = {"source": source, "target": target}
            predicted = {key: of(source, target, seed) for key, of in given.items()}
            assert value is not None
            add("pot", 50.0 + seed + value, seed, axes, {})
            told = {key: one for key, one in predicted.items() if one is not None}
            chosen = {"chosen": told["semantic"]} if "semantic" in told else {}
            add("panda", 50.0 + seed + value / 2, seed, axes, {**told, **chosen})
    return found


def correlated(runs: Sequence[RunFolder], metric: str = "semantic", selves: bool = False) -> Any:
    return ranking.correlation(rows.read(runs), metric, rows.GAIN, selves)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are drawn, by name; none is written."""
    found: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: found.update({path.stem: self}))
    return found


# ---------------------------------------------------------------------------------------------- correlation
def test_ranks_and_correlation_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        x, y = rng.integers(0, 5, 9).astype(float), rng.integers(0, 4, 9).astype(float)
        counts = rng.integers(0, 3, 9)
        expected = spearmanr(np.repeat(x, counts), np.repeat(y, counts)).statistic
        weights = np.stack([counts, np.ones(9)]).astype(float)
        found = ranking.spearman(x, y, weights)
        assert found[0] == pytest.approx(expected, abs=1e-12)
        assert found[1] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
        both = np.broadcast_to(x, (2, 9)), np.broadcast_to(y, (2, 9))
        np.testing.assert_allclose(ranking.spearman(*both, weights), found, atol=1e-12)


def test_average_ranks_by_hand() -> None:
    ones = np.ones((1, 4))
    np.testing.assert_array_equal(ranking.ranks(np.array([3.0, 1, 3, 0]), ones), [[3.5, 2, 3.5, 1]])
    # the ranks of 0, 0, 1, 3: values count as often as their weights say
    np.testing.assert_array_equal(
        ranking.ranks(np.array([3.0, 1, 3, 0]), np.array([[1.0, 1, 0, 2]]))[0][[0, 1, 3]], [4, 3, 1.5]
    )


def test_rounding_breaks_no_tie(tmp_path: Path) -> None:
    parts = {"a": (0.1, 0.2, 0.3), "b": (0.3, 0.1, 0.2), "c": (0.2, 0.3, 0.1), "d": (0.7, 0.1, 0.3)}
    told = lambda s, t, k: parts[s][k - 1]
    assert len({np.mean(one) for one in list(parts.values())[:3]}) > 1  # equal but for rounding
    runs = board(tmp_path, gain=told, seeds=(1, 2, 3), sources=tuple(parts), targets=("x",))
    runs_of_x = [GAINS[s, "x"] for s in parts]
    assert correlated(runs).mean.value == pytest.approx(spearmanr(runs_of_x, [1, 1, 1, 2]).statistic)


def test_a_constant_has_no_correlation() -> None:
    x, y, ones = np.full(4, 0.1), np.arange(4.0), np.ones((1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(ranking.spearman(x, y, ones)).all()
        assert np.isnan(ranking.spearman(y, x, ones)).all()
        assert np.isnan(ranking.spearman(y, y, np.array([[0.0, 3, 0, 0], [0, 0, 0, 0]]))).all()


def test_a_metric_that_grows_with_the_gain_has_correlation_one(tmp_path: Path) -> None:
    opposite = lambda s, t, k: -likeness(s, t, k)
    runs = board(tmp_path, {"semantic": likeness, "e_avg": opposite}, seeds=(1, 2, 3))
    one = correlated(runs)
    assert one.mean.value == pytest.approx(1)
    assert (one.mean.low, one.mean.high) == (pytest.approx(1), pytest.approx(1))
    assert one.within_seed == pytest.approx(1)
    assert one.skipped == "0"
    assert one.columns == 3
    assert one.pairs == 13  # 5 x 3 less two self-transfers
    assert 2 / 120 <= one.p < 0.05
    other = correlated(runs, "e_avg")
    assert other.mean.value == pytest.approx(-1)
    assert other.p == one.p


def test_self_transfers_move_only_the_correlation_with_them(tmp_path: Path) -> None:
    pairs = rows.read(board(tmp_path))
    expected = []
    for t, target in enumerate(TARGETS):
        x = [likeness(s, target, 1) for s in SOURCES]
        y = [GAINS[s, target] for s in SOURCES]
        expected.append(spearmanr(x, y).statistic)
        np.testing.assert_allclose(pairs.gains[rows.GAIN][0, :, t], y)
    found = ranking.correlation(pairs, "semantic", rows.GAIN, True)
    assert found.pairs == 15
    assert found.mean.value == pytest.approx(np.mean(expected))
    assert found.mean.value < 0.9  # a self-transfer is predicted to be best and is not


def test_the_pooled_correlation_is_over_all_pairs(tmp_path: Path) -> None:
    shift = {"a": 0.0, "b": 20.0, "x": -30.0}
    runs = board(tmp_path, gain=lambda s, t, k: GAINS[s, t] + shift[t], seeds=(1, 2))
    one = correlated(runs)
    assert one.mean.value == pytest.approx(1)  # within a target nothing has changed
    x, y = zip(
        *((likeness(s, t, 1), GAINS[s, t] + shift[t]) for s in SOURCES for t in TARGETS if s != t),
        strict=True,
    )
    assert one.pooled.value == pytest.approx(spearmanr(x, y).statistic)
    assert one.pooled.value < 0.8


def test_seeds_are_averaged_before_they_are_ranked(tmp_path: Path) -> None:
    flipped = lambda s, t, k: GAINS[s, t] * (1 if k == 1 else -3)
    one = correlated(board(tmp_path, gain=flipped, seeds=(1, 2)))
    assert one.mean.value == pytest.approx(-1)  # the mean gain is that of seed 2
    assert one.within_seed == pytest.approx(0, abs=1e-12)


def test_constant_and_short_columns_are_left_out_and_counted(tmp_path: Path) -> None:
    constant = lambda s, t, k: 0.5 if t == "b" else likeness(s, t, k)
    runs = board(tmp_path, {"semantic": constant}, skip=lambda s, t, k: t == "x" and s in "abc")
    one = correlated(runs)
    assert (one.columns, one.constant, one.few) == (3, 1, 1)
    assert one.skipped == "1 constant, 1 under 3 sources of 3"
    assert one.mean.value == pytest.approx(1)  # of the target a alone
    text = write(ranking.judge(rows.read(runs)))
    assert "| **semantic** (the board's) | without | 1.00" in text
    assert "| 1 constant, 1 under 3 sources of 3 | 1.00 | – | – |" in text


def test_a_metric_without_any_order_has_no_value(tmp_path: Path) -> None:
    runs = board(tmp_path, {"semantic": likeness, "on": lambda s, t, k: 0.5})
    one = correlated(runs, "on")
    assert (one.mean.value, one.pooled.value, one.within_seed, one.p) == (None, None, None, None)
    assert one.constant == 3
    assert "| on | without | – | – | – | – | 13 | 3 constant of 3 | – | – | – |" in write(
        ranking.judge(rows.read(runs))
    )


def test_ties_have_average_ranks(tmp_path: Path) -> None:
    coarse = lambda s, t, k: float(s in "de")
    one = correlated(board(tmp_path, {"semantic": coarse}, targets=("x",)))
    expected = spearmanr([0, 0, 0, 1, 1], [GAINS[s, "x"] for s in SOURCES]).statistic
    assert one.mean.value == pytest.approx(expected)


def test_missing_pairs_are_said_and_left_blank(tmp_path: Path, shown: dict[str, Figure]) -> None:
    skip = lambda s, t, k: (s, t) == ("c", "a") or (s, t, k) == ("d", "x", 2)
    runs = board(tmp_path / "runs", seeds=(1, 2), skip=skip)
    pairs = rows.read(runs)
    assert np.isnan(pairs.gains[rows.GAIN][:, 2, 0]).all()
    one = ranking.correlation(pairs, "semantic", rows.GAIN, False)
    assert one.mean.value == pytest.approx(1)
    assert one.pairs == 12
    transferability.figures(runs, tmp_path)
    text = (tmp_path / "transferability.md").read_text("utf-8")
    gone = "Missing: 1 of 15 pairs (c to a) and 1 pairs at some of the 2 training seeds"
    assert f"\n- {gone}; of PoT - PT, PANDA - PT, semantic.\n" in text
    line = next(one for one in text.split("## Gain (points): PoT - PT\n")[1].splitlines() if "| c |" in one)
    assert line.startswith("| c | – | ")
    heat = shown["transferability"].axes[1]
    assert len(heat.texts) == 14


def test_chance_is_the_share_of_orders_that_rank_as_well() -> None:
    x = np.arange(4.0)[:, None]
    kept = np.ones((4, 1), dtype=bool)
    assert ranking.chance(x, x, kept) == pytest.approx(2 / 24)  # in order, or all reversed
    y = np.array([1.0, 0, 2, 3])[:, None]
    values = [
        abs(spearmanr(x[list(order), 0], y[:, 0]).statistic) for order in itertools.permutations(range(4))
    ]
    assert ranking.chance(x, y, kept) == pytest.approx(np.mean(np.array(values) >= 0.8 - 1e-9))
    rng = np.random.default_rng(0)
    many = [ranking.chance(*rng.random((2, 10, 2)), np.ones((10, 2), dtype=bool)) for _ in range(12)]
    assert 0.2 < np.mean([one for one in many if one is not None]) < 0.8


def test_chance_reorders_sources_alike_for_all_targets() -> None:
    """Targets that are copies of one add nothing."""
    rng = np.random.default_rng(1)
    x, y = rng.random((2, 5, 1))
    one = ranking.chance(x, y, np.ones((5, 1), dtype=bool))
    copies = ranking.chance(x.repeat(4, 1), y.repeat(4, 1), np.ones((5, 4), dtype=bool))
    assert one == copies


def test_intervals_of_noise_are_wide_and_shrink_with_sources() -> None:
    widths = []
    for sources in (6, 40):
        found = ranking.estimate(ranking.over_targets, *np.random.default_rng(2).random((2, 3, sources, 4)))
        assert found.low is not None
        assert found.high is not None
        assert found.low < 0 < found.high
        widths.append(found.high - found.low)
    assert widths[1] < 0.6 * widths[0]


@pytest.mark.parametrize("statistic", [ranking.over_targets, ranking.pooled])
def test_intervals_cover_the_truth(statistic: ranking.Statistic) -> None:
    """Predictions and gains share a part that is drawn per pair: 95 % intervals miss it seldom."""
    rng, missed, wide = np.random.default_rng(5), 0, []

    def tables(sources: int, targets: int) -> tuple[Any, Any]:
        common = rng.standard_normal((1, sources, targets))
        x, y = (common + rng.standard_normal((1, sources, targets)) for _ in range(2))
        return x, y

    truth = ranking.point(statistic, *(one[0] for one in tables(60, 30)))
    for _ in range(60):
        found = ranking.estimate(statistic, *tables(9, 5))
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= truth <= found.high
        wide.append(found.high - found.low)
    assert missed <= 6  # of 60; by chance 3
    assert np.mean(wide) < 1.1


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((2, 1, 12, 6))
    y = x + 0.5 * y
    noise = rng.standard_normal((3, 12, 6))
    noise -= noise.mean(axis=0)  # the means over seeds are the same
    alike, apart = (ranking.estimate(ranking.over_targets, x.repeat(3, 0), y + s * noise) for s in (0, 2))
    assert alike.value == pytest.approx(apart.value)
    assert alike.low is not None
    assert apart.low is not None
    assert apart.low < alike.low


def test_means_over_cells_and_seeds_by_hand() -> None:
    one = ranking.crossed_mean(np.array([[1.0, 2, 6]]), "points")
    half = 4.302653 * np.sqrt(7 / 3)  # t(0.975, 2), and the variance 7 over three cells
    assert (one.value, one.low, one.high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-5)
    two = ranking.crossed_mean(np.array([[4.0], [5], [9]]), "points")  # one cell: over seeds alone
    assert (two.value, two.low, two.high) == pytest.approx((6, 6 - half, 6 + half), rel=1e-5)
    both = ranking.crossed_mean(np.array([[1.0, 2, 6], [2, 3, 7], [6, 7, 11]]), "points")
    total, freedom = 2 * 7 / 3, 4  # two parts of 7 / 3 with two degrees of freedom each
    assert both.high == pytest.approx(both.value + 2.776445 * np.sqrt(total), rel=1e-5)
    assert freedom == pytest.approx(total**2 / (2 * (7 / 3) ** 2 / 2))
    alone = ranking.crossed_mean(np.array([[4.0], [5]]), "points")
    assert (alone.value, alone.low) == (4.5, None)
    gaps = ranking.crossed_mean(np.array([[1.0, np.nan, 3], [3, np.nan, np.nan]]), "points")
    assert (gaps.value, gaps.n) == (2.5, 2)
    assert ranking.crossed_mean(np.full((2, 2), np.nan), "points").value is None


# -------------------------------------------------------------------------------------------------- selection
def chosen(runs: Sequence[RunFolder]) -> dict[str, ranking.Choice]:
    return {one.name: one for one in ranking.choices(rows.read(runs), rows.GAIN)}


def test_what_following_a_metric_gains(tmp_path: Path) -> None:
    worst = lambda s, t, k: -likeness(s, t, k)
    found = chosen(board(tmp_path, {"semantic": likeness, "e_avg": worst}, seeds=(1, 2, 3)))
    others = {t: {s: GAINS[s, t] for s in SOURCES if s != t} for t in TARGETS}
    best = [max(one.values()) for one in others.values()]
    least = [min(one.values()) for one in others.values()]
    np.testing.assert_allclose(found["oracle"].by_target, best)
    np.testing.assert_allclose(found["semantic"].by_target, best)
    np.testing.assert_allclose(found["e_avg"].by_target, least)
    assert found["semantic"].picked == [[max(one, key=one.__getitem__)] for one in others.values()]
    assert found["semantic"].regret.value == pytest.approx(0)
    assert found["e_avg"].regret.value == pytest.approx(np.mean(best) - np.mean(least))
    mean = np.mean([np.mean(list(one.values())) for one in others.values()])
    assert found["mean source"].gain.value == pytest.approx(mean)
    nothing = found["no transfer (PT)"]
    assert nothing.gain.value == 0
    assert nothing.regret.value == pytest.approx(np.mean(best))


def test_equal_predictions_gain_their_mean(tmp_path: Path) -> None:
    coarse = lambda s, t, k: float(s in "de")
    found = chosen(board(tmp_path, {"semantic": coarse}, targets=("x",)))
    assert found["semantic"].by_target == pytest.approx([(GAINS["d", "x"] + GAINS["e", "x"]) / 2])
    assert sorted(found["semantic"].picked[0]) == ["d", "e"]
    assert found["semantic"].gain.low is None  # one target: nothing to resample


def test_the_oracle_is_one_source_over_seeds(tmp_path: Path) -> None:
    """Taking the best of each seed would report noise as a gain."""
    noise = {("a", 1): 9.0, ("b", 2): 9.0, ("c", 1): 5.0, ("c", 2): 5.0}
    found = chosen(board(tmp_path, gain=lambda s, t, k: noise.get((s, k), 0.0), targets=("x",), seeds=(1, 2)))
    assert found["oracle"].picked == [["c"]]
    assert found["oracle"].by_target == pytest.approx([5.0])


def test_the_dev_score_chooses_among_trained_transfers(tmp_path: Path) -> None:
    curve = lambda s, t, k: [10.0, 90.0 if s == "b" else 20.0, 5.0]
    found = chosen(board(tmp_path, targets=("x",), curve=curve))
    assert found["dev score of each PoT"].picked == [["b"]]
    assert found["dev score of each PoT"].by_target == pytest.approx([GAINS["b", "x"]])


# ------------------------------------------------------------------------------------------ first evaluation
def test_the_first_evaluation_is_a_gain_of_its_own(tmp_path: Path) -> None:
    curve = lambda s, t, k: [40.0 - GAINS[s, t] if s else 40.0, 60.0]
    runs = board(tmp_path, curve=curve)
    pairs = rows.read(runs)
    assert pairs.first_steps == [50]
    assert ranking.correlation(pairs, "semantic", rows.EARLY, False).mean.value == pytest.approx(-1)
    assert "The first evaluation is that of dev after 50 student updates." in write(ranking.judge(pairs))


def test_first_evaluations_at_other_steps_are_not_compared(tmp_path: Path) -> None:
    runs = board(tmp_path, curve=lambda s, t, k: [40.0, 60.0])
    for run in runs:
        record = run.record
        if record.row == "pot" and record.axes["source"] == "c":
            record.curve = record.curve[1:]
            save(record, run.path / "record.json")
    early = rows.read(runs).gains[rows.EARLY]
    assert np.isnan(early[0, 2]).all()
    assert np.isfinite(early[0, [0, 1, 3, 4]]).all()


def test_a_run_has_its_first_dev_score(tmp_path: Path) -> None:
    run = next(one for one in board(tmp_path, curve=lambda s, t, k: [40.0, 60.0]) if one.record.row == "pot")
    record = run.add("transferability", transferability.VERSION, transferability.analyze(run))
    score = record.scores["transferability/first_dev"]
    assert (score.value, score.n, score.direction) == (40.0, 200, "higher")
    assert record.analyses["transferability"]["detail"] == {"step": 50}
    assert transferability.analyze(make_run(tmp_path / "other")).scores == {}


# ---------------------------------------------------------------------------------------------- what is read
def test_predictions_of_the_distilled_row_come_first_and_chosen_names_the_metric(tmp_path: Path) -> None:
    pairs = rows.read(board(tmp_path, {"e_avg": lambda s, t, k: 0.1, "semantic": likeness}))
    assert pairs.board_metric == "semantic"
    assert list(pairs.predictions) == ["semantic", "e_avg"]  # what equals another metric is no metric
    np.testing.assert_allclose(pairs.gains[rows.DISTILLED_GAIN], pairs.gains[rows.GAIN] / 2)
    np.testing.assert_allclose(pairs.baseline, [[51, 51, 51]])


def test_of_two_runs_of_a_pair_the_last_counts_and_rows_go_by_name(tmp_path: Path) -> None:
    runs = board(tmp_path)
    again = next(one for one in runs if one.record.run_id == "pot-c-x-1")
    record = again.record
    config = {"x": 1}
    for name, score, row in (("later", 99.0, "pot"), ("other", 10.0, "pot-head")):
        made = make_run(
            tmp_path / name,
            run_id=name,
            row=row,
            axes=record.axes,
            distiller=Named("pot", "1"),
            config=config,
            scores={"transfer/score": Score(score, "", 1)},
        )
        (made.path / "config.json").write_text(json.dumps(config))
        os.utime(made.path / "config.json", (4e9, 4e9))
        runs.append(made)
    assert rows.read(runs).gains[rows.GAIN][0, 2, 2] == 99.0 - 51
    renamed = []
    for run in runs:
        record = run.record
        if record.row == "pot":
            record.row = "prompt-transfer"
            save(record, run.path / "record.json")
        if record.row != "pot-head":
            renamed.append(run)
    assert rows.read(renamed).gains[rows.GAIN][0, 2, 2] == 99.0 - 51


def test_runs_that_transfer_nothing_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="nothing to judge: there is no scored run of pt and pot"):
        rows.read([make_run(tmp_path / "one")])
    runs = board(tmp_path / "runs")
    with pytest.raises(RecordError, match="nothing to judge: there is no scored run of pot;"):
        rows.read([one for one in runs if one.record.row == "pt"])
    with pytest.raises(RecordError, match="these runs are of toy/v1, size full; toy/v1, size debug"):
        rows.read([*runs, make_run(tmp_path / "two", size="debug")])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {}}, "no run of a pair has a prediction"),
        ({"sources": ("a", "b"), "targets": ("x",)}, "no target has 3 sources"),
        ({"metrics": {"on": lambda s, t, k: 0.5}}, "with a prediction and a gain that differ"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_said_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    paths = transferability.figures(board(tmp_path / "runs", **changes), tmp_path / "figures")
    assert [path.name for path in paths] == ["transferability.md"]
    (line,) = [one for one in paths[0].read_text("utf-8").splitlines() if one.startswith("Nothing to judge")]
    assert said in line


def test_pairs_without_their_baseline_are_left_out(tmp_path: Path) -> None:
    runs = [one for one in board(tmp_path) if one.record.run_id != "pt-x-1"]
    pairs = rows.read(runs)
    assert np.isnan(pairs.gains[rows.GAIN][0, :, 2]).all()
    assert ranking.correlation(pairs, "semantic", rows.GAIN, False).columns == 2
    judged = ranking.judge(
        rows.read([one for one in runs if one.record.row != "pt" or "pt-c" in one.record.run_id])
    )
    assert judged.nothing == "no pair has a score and one of prompt tuning alone with the same training seed."


# ------------------------------------------------------------------------------------------------ centre
def test_centred_cosines_come_from_the_files_of_prompt_tuning(tmp_path: Path) -> None:
    runs = board(tmp_path, settings={"representation": "pooler"}, seeds=(1, 2))
    rng = np.random.default_rng(3)
    vectors = {name: 5 + rng.standard_normal(8) for name in SOURCES}
    for run in runs:
        record = run.record
        name = record.axes["target"]
        if record.row == "pt" and record.seed == 1 and name in vectors:
            (run.path / "student").mkdir()
            tensors = {"signature.own.pooler": vectors[name], "signature.own.cls_hidden": np.ones(8)}
            save_file(
                {key: value.astype(np.float32) for key, value in tensors.items()},
                run.path / "student" / "prompted.safetensors",
            )
    found = rows.read(runs).predictions
    assert list(found) == ["semantic", "semantic_centred"]
    mean = np.mean(list(vectors.values()), axis=0)
    one, other = vectors["c"] - mean, vectors["a"] - mean
    expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert found["semantic_centred"][0, 2, 0] == pytest.approx(expected, abs=1e-5)
    assert found["semantic_centred"][0, 0, 0] == pytest.approx(1)
    assert np.isnan(found["semantic_centred"][1]).all()  # no file of seed 2
    assert np.isnan(found["semantic_centred"][0, :, 2]).all()  # none of x


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    runs = board(tmp_path)
    torn = next(one for one in runs if one.record.row == "pt").path / "student" / "prompted.safetensors"
    torn.parent.mkdir()
    torn.write_bytes(b"torn")
    with pytest.raises(RecordError, match=r"prompted\.safetensors: is not a safetensors file"):
        rows.read(runs)


# ---------------------------------------------------------------------------------------------- relations
WORLD_SOURCES, WORLD_TARGETS = ("mood", "staff", "when", "names"), ("mood_few", "food", "names_few")
BY_KIND = {"same": 6.0, "shared": 2.0, "opposed": -4.0, "unrelated": 0.0}


def world(root: Path) -> tuple[list[RunFolder], dict[str, int]]:
    """A board of the embedded world whose gains follow from its relations, and how many pairs each has."""
    from kdbench.tasks.tiny_transfer import TinyTransfer

    kinds = {(s, t): TinyTransfer.relation(s, t) for s in WORLD_SOURCES for t in WORLD_TARGETS}
    runs = board(
        root,
        {"semantic": lambda s, t, k: BY_KIND[kinds[s, t]] / 10 + 0.01 * k},
        gain=lambda s, t, k: BY_KIND[kinds[s, t]] + (k - 2),
        seeds=(1, 2, 3),
        sources=WORLD_SOURCES,
        targets=WORLD_TARGETS,
        task="tiny_transfer",
    )
    told = list(kinds.values())
    return runs, {kind: told.count(kind) for kind in set(told)}


def test_means_by_relation_are_those_of_the_task(tmp_path: Path, shown: dict[str, Figure]) -> None:
    runs, counts = world(tmp_path / "runs")
    pairs = rows.read(runs)
    found = {one.kind: one for one in ranking.related(pairs)}
    assert {kind: one.pairs for kind, one in found.items()} == counts
    assert len(found) > 1
    assert list(found) == sorted(found, key=lambda kind: -BY_KIND[kind])
    for kind, one in found.items():
        mean = one.gains[rows.GAIN]
        assert mean.value == pytest.approx(BY_KIND[kind])
        assert mean.low is None or mean.low < BY_KIND[kind]  # seeds differ by a point
        assert one.predictions["semantic"].value == pytest.approx(BY_KIND[kind] / 10 + 0.02)
    transferability.figures(runs, tmp_path)
    heat = shown["transferability"].axes[1]
    framed = sum(count for kind, count in counts.items() if kind != "unrelated")
    assert len(heat.patches) == 2 * framed
    (legend,) = shown["transferability"].legends
    assert [text.get_text() for text in legend.get_texts()] == sorted(set(counts) - {"unrelated"})
    assert [tick.get_text() for tick in shown["transferability_relations"].axes[0].get_yticklabels()] == list(
        found
    )


def test_a_task_without_relations_has_none(tmp_path: Path) -> None:
    for task in ("toy", "transfer"):
        judged = ranking.judge(rows.read(board(tmp_path / task, task=task)))
        assert judged.relations == []
        assert "## Means by relation" not in write(judged)


# ------------------------------------------------------------------------------------------ figures and page
def test_figures_show_prediction_gain_and_the_control(tmp_path: Path, shown: dict[str, Figure]) -> None:
    noise = np.random.default_rng(4)
    metrics = {"semantic": likeness, "semantic_probe": lambda s, t, k: float(noise.random())}
    runs = board(tmp_path / "runs", metrics, seeds=(1, 2, 3), curve=lambda s, t, k: [30.0 + len(s), 60.0])
    paths = transferability.figures(runs, tmp_path / "figures")
    names = ["transferability", "transferability-semantic_probe", "transferability_ranks"]
    assert list(shown) == [*names, "transferability_choice"]
    assert paths[-1].name == "transferability.md"
    left, middle, right = shown["transferability"].axes[:3]
    assert left.get_title() == "predicted: semantic"
    assert [text.get_text() for text in middle.texts[:3]] == [f"{GAINS['a', t]:+.1f}" for t in TARGETS]
    assert right.get_title().startswith("Spearman by target 1.00 [1.00, 1.00]\npooled ")
    (colours,) = middle.collections
    assert colours.norm.vmin == -colours.norm.vmax  # no gain is the middle of the colours
    ranks = shown["transferability_ranks"].axes
    assert [ax.get_title() for ax in ranks] == ["PoT - PT", "PANDA - PT", "PoT - PT, first evaluation"]
    text = paths[-1].read_text("utf-8")
    for gain in (rows.GAIN, rows.DISTILLED_GAIN, rows.EARLY):
        assert f"## How well metrics rank sources: {gain}\n" in text
    assert "| **semantic** (the board's) | with | " in text


def test_page_and_figures_do_not_depend_on_the_order_of_runs(tmp_path: Path) -> None:
    runs = board(tmp_path, seeds=(1, 2))
    assert write(ranking.judge(rows.read(runs))) == write(ranking.judge(rows.read(runs[::-1])))


def test_files_are_written_without_torch(tmp_path: Path) -> None:
    board(tmp_path / "runs")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from analyses import transferability\n"
        "from kdbench.record import RunFolder\n"
        "assert 'seaborn' not in sys.modules\n"
        f"root = Path({str(tmp_path)!r})\n"
        "runs = [RunFolder(path) for path in sorted((root / 'runs').iterdir())]\n"
        "paths = transferability.figures(runs, root / 'figures')\n"
        "assert len(paths) == 7 and all(path.stat().st_size for path in paths), paths\n"
        "loaded = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {loaded}' if loaded else 0)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_adds_scores_and_writes_the_page(tmp_path: Path, shown: dict[str, Figure]) -> None:
    runs = board(tmp_path / "runs" / "toy" / "v1", curve=lambda s, t, k: [40.0, 60.0])
    names = [run.record.run_id for run in runs]
    command = ["analyze", *names, "--analysis", "transferability", "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, [*command, "--figures", str(tmp_path / "figures")])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"written: {tmp_path / 'figures' / 'transferability.md'}"
    assert runs[0].record.value("transferability/first_dev") == 40.0
    alone = CliRunner().invoke(app, ["analyze", names[0], *command[-4:]])
    assert isinstance(alone.exception, RecordError)
    assert "nothing to judge" in str(alone.exception)
