"""Averaged axes, differences to another row and shares above it: values by hand, pairing, what is missing."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_kit import make_run
from test_board import Board, Row, row_of

from kdbench import board as boards
from kdbench.board import Statistics, publish, render, report, seed_weights
from kdbench.config import Column, load_board
from kdbench.errors import UserError
from kdbench.paths import leaderboards_dir
from kdbench.record import Named, RunFolder, load, save

SOURCES, TARGETS, SEEDS = ("p", "q", "r"), ("a", "b"), (1, 2, 3)
SIZES = {"a": 30, "b": 50}
Key = tuple[Any, ...]
Values = dict[Key, np.ndarray[Any, Any]]


def score(title: str, **more: Any) -> Column:
    return Column(title, **{"score": "quality/x", "unit": "%", "direction": "higher", **more})


def transfer_board(**changes: Any) -> Board:
    """Rows `pan` and `pot` over source and target, `pt` and `early` over target alone."""
    told: dict[str, Any] = {
        "axes": {"source": SOURCES, "target": TARGETS},
        "average": ["source"],
        "rows": [Row("pt", "PT"), Row("pot", "PoT"), Row("pan", "PAN"), Row("early", "Early")],
        "columns": [
            *(score(t.upper(), score=f"quality/{t}", at={"target": t}) for t in TARGETS),
            score("mean", score="", mean=["A", "B"], rank=True),
            *(score(f"{t} - PT", score=f"quality/{t}", at={"target": t}, against="pt") for t in TARGETS),
            score("less PT", score="", mean=["a - PT", "b - PT"]),
            score("all - PT", against="pt"),
            score("all - PoT", against="pot"),
            score("% > PT", above="pt"),
        ],
    }
    return Board(**{**told, **changes})


def make(root: Path, row: str, axes: Mapping[str, Any], seed: int, values: Any, **more: Any) -> RunFolder:
    """A run with scores x and the target's name, of the same values per prompt."""
    name = "-".join([row, *map(str, axes.values()), str(seed)])
    scores = {"x": values, axes.get("target", "t"): values}
    changes = {"run_id": name, "row": row, "axes": dict(axes), "seed": seed, **more}
    return make_run(root / "toy/v1" / name, scores, **changes)


def drawn_values(row: str, sources: Sequence[str] = ()) -> Values:
    """Values per prompt by (source, target, seed), or (target, seed) for a row without sources."""
    rng = np.random.default_rng(list(row.encode()))
    places = itertools.product(*([sources] if sources else []), TARGETS, SEEDS)
    return {
        at: rng.normal(50, 10, SIZES[at[-2]]) + rng.normal(0, 2) + (5 if at[0] == "p" else 0) for at in places
    }


def make_all(root: Path, row: str, values: Values, **more: Any) -> None:
    for at, one in values.items():
        axes = dict(zip(("source", "target") if len(at) == 3 else ("target",), at, strict=False))
        make(root, row, axes, at[-1], one, **more)


def cells_of(result: Statistics, row: str, *, local: bool | None = None) -> dict[str, Any]:
    found = [one for one in result["rows"] if one["name"] == row and (local is None or one["local"] == local)]
    assert len(found) == 1, "an averaged axis makes no lines of its own"
    titles = {boards._key(column): column["title"] for column in result["columns"]}
    return {titles[key]: cell for key, cell in found[0]["cells"].items()}


PT, POT, PAN = drawn_values("pt"), drawn_values("pot", SOURCES), drawn_values("pan", SOURCES)
EARLY = drawn_values("early")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for row, values in (("pt", PT), ("pot", POT), ("pan", PAN), ("early", EARLY)):
        make_all(tmp_path, row, values)
    return tmp_path


# ------------------------------------------------------------------------------------------ averaged axes
def test_a_line_is_the_mean_over_an_averaged_axis(runs: Path) -> None:
    result = report(transfer_board(), runs)
    assert result["spread"] == ["target", "source"]
    assert sorted(row["name"] for row in result["rows"]) == ["early", "pan", "pot", "pt"]
    for row, values in (("pot", POT), ("pan", PAN)):
        cells = cells_of(result, row)
        for t in TARGETS:
            by_seed = {
                str(seed): np.mean([values[s, t, seed].mean() for s in SOURCES]) for seed in SEEDS
            }  # each source counts the same
            assert cells[t.upper()]["seeds"] == pytest.approx(by_seed)
            assert cells[t.upper()]["value"] == pytest.approx(np.mean(list(by_seed.values())))
            assert cells[t.upper()]["over"] == [f"target={t},source={s}" for s in SOURCES]
    cells = cells_of(result, "pt")
    assert cells["A"]["value"] == pytest.approx(np.mean([PT["a", seed].mean() for seed in SEEDS]))
    assert cells["A"]["over"] == ["target=a"]
    assert row_of(result, "pt")["axes"] == {}


def test_rows_without_the_averaged_axis_are_compared_with_those_that_have_it(runs: Path) -> None:
    result = report(transfer_board(), runs)
    tests = {row: cells_of(result, row)["mean"]["test"] for row in ("pt", "pot", "pan", "early")}
    assert sorted(tests.values())[0] == "best"
    assert all("best" in test and not test.startswith("not tested") for test in tests.values()), tests


def test_rows_with_other_values_of_the_averaged_axis_are_not_compared(tmp_path: Path) -> None:
    make_all(tmp_path, "pan", PAN)
    make_all(tmp_path, "pot", {at: one - 20 for at, one in POT.items() if at[0] != "q"})
    make_all(tmp_path, "pt", {at: one - 20 for at, one in PT.items()})
    result = report(transfer_board(), tmp_path)
    said = "not tested: mean over other values of the spread axes than the best row"
    assert cells_of(result, "pan")["A"]["test"] == "best"
    assert cells_of(result, "pot")["A"]["test"] == said
    assert cells_of(result, "pt")["A"]["test"] == "differs from the best"


def test_other_prompts_at_a_target_are_not_compared_though_an_axis_is_lacking(tmp_path: Path) -> None:
    make_all(tmp_path, "pan", PAN)
    make_all(tmp_path, "pt", {at: one[:-3] - 20 for at, one in PT.items()})
    assert "other prompts" in cells_of(report(transfer_board(), tmp_path), "pt")["A"]["test"]


# --------------------------------------------------------------------------------------------- differences
def test_differences_by_hand(runs: Path) -> None:
    result = report(transfer_board(), runs)
    cells = cells_of(result, "pan")
    for t in TARGETS:
        by_seed = {
            str(seed): np.mean([PAN[s, t, seed].mean() - PT[t, seed].mean() for s in SOURCES])
            for seed in SEEDS
        }
        assert cells[f"{t} - PT"]["seeds"] == pytest.approx(by_seed)
        assert cells[f"{t} - PT"]["value"] == pytest.approx(np.mean(list(by_seed.values())))
        assert cells[f"{t} - PT"]["over"] == [f"target={t},source={s}" for s in SOURCES]
    less = np.mean([cells["a - PT"]["value"], cells["b - PT"]["value"]])
    assert cells["less PT"]["value"] == pytest.approx(less)
    assert cells["all - PT"]["value"] == pytest.approx(less)
    pairs = itertools.product(SOURCES, TARGETS, SEEDS)
    assert cells["all - PoT"]["value"] == pytest.approx(
        np.mean([PAN[at].mean() - POT[at].mean() for at in pairs])
    )
    # a row without sources is set beside the mean over the other's
    expected = np.mean(
        [
            EARLY[t, seed].mean() - np.mean([POT[s, t, seed].mean() for s in SOURCES])
            for t, seed in itertools.product(TARGETS, SEEDS)
        ]
    )
    assert cells_of(result, "early")["all - PoT"]["value"] == pytest.approx(expected)


def test_a_difference_has_the_interval_of_resampling_both_rows_together(runs: Path) -> None:
    found = cells_of(report(transfer_board(), runs), "pan")
    rng, count = np.random.default_rng(3), 40_000
    expansion = np.sqrt(1.5) * 4.30265 / 1.95996
    seeds = 1 / 3 + expansion * (rng.multinomial(3, [1 / 3] * 3, count) / 3 - 1 / 3)
    means = []
    for t in TARGETS:
        prompts = rng.integers(0, SIZES[t], (count, SIZES[t]))
        apart = [np.mean([PAN[s, t, seed] for s in SOURCES], axis=0) - PT[t, seed] for seed in SEEDS]
        means.append(np.stack([one[prompts].mean(axis=1) for one in apart], axis=1))
        low, high = np.quantile((seeds * means[-1]).sum(axis=1), [0.025, 0.975])
        assert found[f"{t} - PT"]["interval"] == pytest.approx([low, high], abs=0.03 * (high - low))
    low, high = np.quantile((seeds * np.mean(means, axis=0)).sum(axis=1), [0.025, 0.975])
    for title in ("less PT", "all - PT"):
        assert found[title]["interval"] == pytest.approx([low, high], abs=0.03 * (high - low))
        assert found[title]["interval_over"] == ["training seeds", "prompts"]


def test_equal_rows_differ_by_exactly_nothing(tmp_path: Path) -> None:
    make_all(tmp_path, "pt", PT)
    make_all(tmp_path, "pan", {(s, t, seed): one for (t, seed), one in PT.items() for s in SOURCES})
    make_all(tmp_path, "pot", {(s, t, seed): one + 1 for (t, seed), one in PT.items() for s in SOURCES})
    result = report(transfer_board(), tmp_path)
    for row, title in itertools.product(("pan", "pt"), ("a - PT", "less PT", "all - PT")):
        cell = cells_of(result, row)[title]
        assert (cell["value"], cell["interval"]) == (0.0, [0.0, 0.0]), (row, title)
    cell = cells_of(result, "pot")["all - PT"]
    np.testing.assert_allclose([cell["value"], *cell["interval"]], 1.0, atol=1e-4)


def test_a_row_less_itself_is_nothing(runs: Path) -> None:
    result = report(transfer_board(), runs)
    for row, title in (("pt", "a - PT"), ("pt", "all - PT"), ("pot", "all - PoT")):
        cell = cells_of(result, row)[title]
        assert cell["seeds"] == {"1": 0.0, "2": 0.0, "3": 0.0}
        assert cell["interval"] == [0.0, 0.0]


def test_differences_are_taken_at_common_seeds_only(tmp_path: Path) -> None:
    make_all(tmp_path, "pan", PAN)
    make_all(tmp_path, "pt", {at: one for at, one in PT.items() if at != ("a", 2)})
    cells = cells_of(report(transfer_board(), tmp_path), "pan")
    assert list(cells["A"]["seeds"]) == ["1", "2", "3"]
    assert list(cells["a - PT"]["seeds"]) == ["1", "3"]
    assert list(cells["b - PT"]["seeds"]) == ["1", "2", "3"]
    assert list(cells["less PT"]["seeds"]) == ["1", "3"]
    assert cells["a - PT"]["value"] == pytest.approx(
        np.mean([PAN[s, "a", seed].mean() - PT["a", seed].mean() for s in SOURCES for seed in (1, 3)])
    )
    assert cells["a - PT"]["test"] == "not tested: under 3 training seeds"


def test_differences_are_over_the_pairs_that_both_have(tmp_path: Path) -> None:
    make_all(tmp_path, "pan", PAN)
    make_all(tmp_path, "pot", {at: one for at, one in POT.items() if at[:2] != ("q", "b")})
    result = report(transfer_board(), tmp_path)
    both = [at for at in PAN if at[:2] != ("q", "b")]
    cell = cells_of(result, "pan")["all - PoT"]
    by_pair = [
        np.mean([PAN[s, t, seed].mean() - POT[s, t, seed].mean() for seed in SEEDS])
        for s, t in dict.fromkeys(at[:2] for at in both)
    ]
    assert len(by_pair) == 5
    assert cell["value"] == pytest.approx(np.mean(by_pair))
    assert "target=b,source=q" not in cell["over"]
    assert len(cell["over"]) == 5
    assert "a - PT" not in cells_of(result, "pan"), "there is no run of pt"
    assert result["warnings"] == []
    line = next(one for one in render(result).split("\n") if one.startswith("PAN"))
    assert "–" in line


def test_rows_of_other_prompts_are_left_out_and_said(tmp_path: Path) -> None:
    make_all(tmp_path, "pan", PAN)
    make_all(tmp_path, "pt", {at: one for at, one in PT.items() if at[0] == "a"}, task=Named("toy", "2"))
    make_all(tmp_path, "pt", {at: one for at, one in PT.items() if at[0] == "b"})
    result = report(transfer_board(), tmp_path)
    cells = cells_of(result, "pan")
    assert "a - PT" not in cells
    assert "less PT" not in cells
    assert cells["all - PT"]["value"] == pytest.approx(cells["b - PT"]["value"])
    told = "values left out: other prompts or task revision than row 'pt'."
    assert [w for w in result["warnings"] if "revisions" not in w] == [
        f"row 'pan (local)', column 'a - PT': 3 of 3 {told}",
        f"row 'pan (local)', column 'all - PT': 3 of 6 {told}",
        f"row 'pan (local)', column '% > PT': 3 of 6 {told}",
    ]


def test_lost_prompts_of_either_row_cost_the_difference_its_interval(runs: Path) -> None:
    (runs / "toy/v1/pt-a-2/scores.npz").write_bytes(b"PK")
    cells = cells_of(report(transfer_board(), runs), "pan")
    assert cells["A"]["interval"] is not None
    assert cells["b - PT"]["interval"] is not None
    for title in ("a - PT", "less PT", "all - PT"):
        assert cells[title]["interval"] is None, title
        assert cells[title]["value"] is not None
    assert cells["% > PT"]["interval"] is not None


def test_axes_that_stay_lines_are_matched_too(tmp_path: Path) -> None:
    for k, row, at in itertools.product((4, 8), ("pt", "pan"), range(2)):
        axes = {"k": k, "target": "ab"[at], **({"source": "p"} if row == "pan" else {})}
        make(tmp_path, row, axes, 1, np.full(10, 10.0 * k + at + (k if row == "pan" else 0)))
    make(tmp_path, "pot", {"target": "a", "source": "p"}, 1, np.full(10, 100.0))  # of any k
    rows = {
        (row["name"], row["axes"].get("k")): row["cells"]
        for row in report(transfer_board(), tmp_path)["rows"]
    }
    key = "quality/x - pt"
    assert rows["pan", 4][key]["value"] == 4
    assert rows["pan", 8][key]["value"] == 8
    assert rows["pt", 8][key]["value"] == 0
    assert rows["pot", None][key]["value"] == pytest.approx(100 - (40 + 80) / 2)


def test_differences_on_a_board_without_axes(tmp_path: Path) -> None:
    for row, seed in itertools.product(("pt", "pan"), SEEDS):
        values = np.arange(20.0) + seed + (seed if row == "pan" else 0)
        make(tmp_path, row, {}, seed, values)
    board = Board(
        rows=transfer_board().rows, columns=[score("X"), score("X - PT", against="pt", unit="points")]
    )
    result = report(board, tmp_path)
    cell = cells_of(result, "pan")["X - PT"]
    assert cell["seeds"] == {"1": 1.0, "2": 2.0, "3": 3.0}
    np.testing.assert_allclose(
        cell["interval"], np.quantile(seed_weights((1, 2, 3)) @ [1.0, 2.0, 3.0], [0.025, 0.975]), atol=1e-4
    )
    assert "X - PT: less PT at the same training seed.\n" in render(result)


def test_published_lines_are_set_beside_published_ones_and_local_beside_local(tmp_path: Path) -> None:
    def entries(row: str, value: float, local: bool) -> boards.Entry:
        axes = {"target": "a", **({} if row == "pt" else {"source": "p"})}
        folder = make(tmp_path / str(local), row, axes, 1, np.full(10, value), run_id=f"{row}{local}")
        return boards.Entry(folder.record, folder.path / "record.json", "", local)

    pt, pan = entries("pt", 10, False), entries("pan", 13, False)
    own_pt, own_pan = entries("pt", 20, True), entries("pan", 25, True)

    def value(row: str, local: bool, *given: boards.Entry) -> float | None:
        result = boards.statistics(transfer_board(), given)
        cell = cells_of(result, row, local=local).get("a - PT")
        return None if cell is None else float(cell["value"])

    assert value("pan", False, pt, pan, own_pt, own_pan) == 3
    assert value("pan", True, pt, pan, own_pt, own_pan) == 5
    assert value("pt", True, pt, own_pt) == 0
    assert value("pan", True, pt, own_pan) == 15, "no local pt: the published one"
    assert value("pan", False, pan, own_pt) is None
    failed = dataclasses.replace(own_pt, record=dataclasses.replace(own_pt.record, status="failed"))
    assert value("pan", True, pt, failed, own_pan) == 15


# ------------------------------------------------------------------------------------------- shares above
def test_shares_above_by_hand(runs: Path) -> None:
    result = report(transfer_board(), runs)
    cell = cells_of(result, "pan")["% > PT"]
    by_seed = [
        100 * np.mean([PAN[s, t, seed].mean() > PT[t, seed].mean() for s in SOURCES for t in TARGETS])
        for seed in SEEDS
    ]
    assert 0 < np.mean(by_seed) < 100
    assert len(set(by_seed)) > 1
    assert list(cell["seeds"].values()) == pytest.approx(by_seed)
    assert cell["value"] == pytest.approx(np.mean(by_seed))
    low, high = np.quantile(seed_weights((1, 2, 3)) @ np.array(by_seed), [0.025, 0.975])
    assert low < 0 or high > 100, "the ends that seeds would give are no shares"
    np.testing.assert_allclose(cell["interval"], [max(low, 0), min(high, 100)])
    assert cell["interval_over"] == ["training seeds"]
    assert (cell["test"], cell["best"], cell["difference"]) == ("", False, None)
    assert "% > PT" not in cells_of(result, "pt"), "no row is above itself"


def test_an_equal_value_is_not_above(tmp_path: Path) -> None:
    for seed, (p, q) in zip((1, 2), ((50.0, 50.5), (49.0, 50.0)), strict=True):
        make(tmp_path, "pt", {"target": "a"}, seed, np.full(8, 50.0))
        make(tmp_path, "pan", {"source": "p", "target": "a"}, seed, np.full(8, p))
        make(tmp_path, "pan", {"source": "q", "target": "a"}, seed, np.full(8, q))
    cell = cells_of(report(transfer_board(), tmp_path), "pan")["% > PT"]
    assert cell["seeds"] == {"1": 50.0, "2": 0.0}
    assert (cell["value"], cell["interval"]) == (25.0, None)


def test_a_share_above_a_lower_score_is_of_the_values_themselves(tmp_path: Path) -> None:
    make(tmp_path, "pt", {"target": "a"}, 1, np.full(8, 50.0))
    make(tmp_path, "pan", {"source": "p", "target": "a"}, 1, np.full(8, 60.0))
    board = transfer_board(columns=[score("more", above="pt", direction="lower", rank=True)])
    result = report(board, tmp_path)
    assert cells_of(result, "pan")["more"]["value"] == 100
    assert [row["name"] for row in result["rows"]] == ["pan", "pt"]


# ------------------------------------------------------------------------------------ saying and publishing
def test_every_format_says_what_is_compared_with_what(runs: Path) -> None:
    result = report(transfer_board(), runs)
    text, both = render(result), "at the same training seed and, as far as both have them, target and source"
    for line in (
        "A, B, a - PT, b - PT: mean over the values of source that a row has.",
        "all - PT, all - PoT: mean over the values of target and source that a row has.",
        f"a - PT, b - PT, all - PT: less PT {both}.",
        f"all - PoT: less PoT {both}.",
        f"% > PT: % of a row's values above PT {both}; the interval is over seeds.",
    ):
        assert line in text.split("\n"), line
        assert f"- {line}" in render(result, "markdown").split("\n"), line
    share = cells_of(result, "pan")["% > PT"]
    low, high = share["interval"]
    assert f"{share['value']:.1f} ±{(high - low) / 2:.1f}" in text
    assert f"{share['value']:.1f} [{low:.1f}, {high:.1f}]" in render(result, "markdown")
    found = {(row["row"], row["column"]): row for row in csv.DictReader(io.StringIO(render(result, "csv")))}
    assert found["pan", "all - PT"]["score"] == "quality/x - pt"
    assert found["pan", "a - PT"]["score"] == "quality/a@target=a - pt"
    assert found["pan", "% > PT"]["score"] == "quality/x > pt"
    assert found["early", "a - PT"]["runs"] == "1:early-a-1 2:early-a-2 3:early-a-3"
    assert len(found["pan", "all - PT"]["runs"].split()) == 18
    columns = json.loads(render(result, "json"))["columns"]
    assert [(c.get("against"), c.get("above")) for c in columns[-3:]] == [("pt", ""), ("pot", ""), ("", "pt")]
    assert "against" not in columns[0]


def test_a_failed_run_names_the_axes_that_it_has(tmp_path: Path) -> None:
    make_all(tmp_path, "pt", PT)
    make(tmp_path, "pt", {"target": "a"}, 2, PT["a", 2], status="failed", reason="out of memory")
    make(tmp_path, "pan", {"source": "p", "target": "a"}, 1, PT["a", 1], status="failed", reason="no")
    text = render(report(transfer_board(), tmp_path))
    assert "PT · target a (local): seed 2 failed: out of memory (run pt-a-2)" in text
    assert "PAN · target a, source p (local): seed 1 failed: no (run pan-p-a-1)" in text


def test_a_row_is_published_at_the_axes_that_it_has(runs: Path) -> None:
    @dataclasses.dataclass
    class Own(Board):
        def row_axis_values(self, name: str, size: str | None = None) -> list[dict[str, Any]]:
            axes = {"target": TARGETS} if name in ("pt", "early") else {"source": SOURCES, "target": TARGETS}
            return [dict(zip(axes, one, strict=True)) for one in itertools.product(*axes.values())]

    own = transfer_board()
    board = Own(**{f.name: getattr(own, f.name) for f in dataclasses.fields(own)})
    board.folder = runs / "board"
    folders = sorted((runs / "toy/v1").iterdir())
    assert publish(folders, board) == []
    assert "all - PT" in (board.folder / "table.md").read_text()
    local = cells_of(report(transfer_board(), runs), "pan")
    assert cells_of(report(board), "pan") == local, "what a difference needs is published"
    record = load(folders[0] / "record.json")
    record.axes = {"source": "p", "target": "a"}
    save(record, folders[0] / "record.json")
    with pytest.raises(UserError, match=r"no axis values 'source=p, target=a'.*Known: target=a, target=b\."):
        publish(folders[:1], board)


def test_statistics_are_computed_again_when_such_a_column_changes(runs: Path) -> None:
    plain = transfer_board(columns=[score("X")])
    apart = transfer_board(columns=[score("X")], average=())
    for board in (
        plain,
        transfer_board(columns=[score("X", against="pt")]),
        transfer_board(columns=[score("X", against="pot")]),
        transfer_board(columns=[score("X", above="pot")]),
        apart,
    ):
        assert report(board, runs)["columns"][0].get("against", "") == board.columns[0].against
    assert len(report(plain, runs)["rows"]) == 8
    assert len(report(apart, runs)["rows"]) == 16


@pytest.mark.parametrize("name", ["tiny-fewshot/v1", "tiny-instruct/v1"])
def test_boards_without_such_columns_keep_their_stored_numbers(name: str) -> None:
    board = load_board(name)
    assert board.folder is not None
    stored = json.loads((board.folder / "statistics.json").read_text())
    assert stored["question_sha256"] == boards._question(board, stored["size"])


# ------------------------------------------------------------------------------------------- what is refused
AGAINST = '\n[[columns]]\ntitle = "apart"\nunit = "%"\n'


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            'score = "a/b"\nagainst = "student_pp"',
            "column 'apart': against: no row 'student_pp'. Did you mean 'student_pt'? Known: teacher_ft, ",
        ),
        (
            'score = "a/b"\nabove = "promptdistiller"',
            "column 'apart': above: no row 'promptdistiller'. Did you mean 'prompt_distiller'?",
        ),
        ('score = "a/b"\nabove = "kd_ft"\nagainst = "kd_ft"', "only one of against and above can be said"),
        ('mean = ["topic"]\nagainst = "kd_ft"', "against is said by the columns whose mean this is"),
        ('mean = ["topic"]\nabove = "kd_ft"', "above is said by the columns whose mean this is"),
        ('score = "a/b"\nabove = "kd_ft"\n#', "column 'apart': above counts in percent"),
    ],
)
def test_columns_that_cannot_be_are_refused(tmp_path: Path, column: str, message: str) -> None:
    text = (leaderboards_dir() / "tiny-fewshot/v1/board.toml").read_text()
    add = (AGAINST.replace('unit = "%"', 'unit = "s"') if column.endswith("#") else AGAINST) + column + "\n"
    (tmp_path / "board.toml").write_text(text + add)
    with pytest.raises(UserError) as caught:
        load_board(str(tmp_path / "board.toml"))
    assert message in str(caught.value)


def test_what_cannot_be_averaged_over_is_refused(tmp_path: Path) -> None:
    text = (leaderboards_dir() / "tiny-fewshot/v1/board.toml").read_text()
    for average, message in (
        ("datasets", "average: no axis 'datasets'. Did you mean 'dataset'? Known: dataset."),
        ("dataset", "column 'polarity': at: 'dataset' is averaged over; take it out of the board's average"),
    ):
        (tmp_path / "board.toml").write_text(f'average = ["{average}"]\n' + text)
        with pytest.raises(UserError) as caught:
            load_board(str(tmp_path / "board.toml"))
        assert message in str(caught.value)


def test_keys_tell_columns_apart() -> None:
    at = {"target": "a"}
    columns = [
        score("1"),
        score("2", at=at),
        score("3", against="pt"),
        score("4", against="pot"),
        score("5", above="pt"),
        score("6", at=at, above="pt"),
        score("7", at=at, against="pt"),
    ]
    assert len({column.key for column in columns}) == 7
