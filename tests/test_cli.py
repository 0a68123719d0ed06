"""The command line: what it prints, its exit codes, and one clear line for every mistake of the user."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from process_kit import environment
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from kdbench import certify, cli
from kdbench.commands import (
    find_each,
    find_run,
    find_runs,
    narrowed,
    pairs,
    rows_of,
    runs_of,
    trials,
    write_tuning,
)
from kdbench.config import load_board
from kdbench.errors import UserError
from kdbench.evidence import read_evidence
from kdbench.paths import leaderboards_dir
from kdbench.record import Named, RunFolder, Score, load, save
from kdbench.stages import Places

TINY = leaderboards_dir() / "tiny-instruct" / "v1" / "board.toml"
PLUGIN = Path(__file__).parent / "plugins" / "tempered_kd.py"


def call(*args: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(arg) for arg in args])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a cache of its own."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KDBENCH_CACHE", str(folder / "cache"))
        patch.delenv("KDBENCH_DATA_ROOT", raising=False)
        yield folder


@pytest.fixture(scope="module")
def ran(here: Path) -> tuple[int, str, str]:
    """What `run` says for two methods of the debug size."""
    return call("run", "sft", PLUGIN, "--size", "debug", "--seeds", "1", "--jobs", "2")


def folders(here: Path) -> dict[str, RunFolder]:
    """The runs by row."""
    found = [RunFolder(path.parent) for path in here.glob("runs/tiny-instruct/v1/*/record.json")]
    return {folder.record.row: folder for folder in found}


# -------------------------------------------------------------------------------------------------------- run
def test_run_ends_with_the_table_of_what_it_ran(ran: tuple[int, str, str], here: Path) -> None:
    code, out, err = ran
    assert code == 0, err
    assert set(folders(here)) == {"teacher", "student-init", "sft", "tempered_kd"}
    for title in ("Teacher (reference, local)", "SFT (local)", "tempered_kd (local)", "ROUGE-L"):
        assert title in out
    assert "4 runs, 0 of them finished already" in err
    assert err.count("stage teacher-sft seed 0: done") == 1
    assert "sft seed 1: done in" in err
    assert "Loading weights" not in out + err


def test_finished_runs_are_not_repeated(ran: tuple[int, str, str], here: Path) -> None:
    before = {row: (folder.path / "record.json").stat().st_mtime_ns for row, folder in folders(here).items()}
    code, out, err = call("run", "sft", PLUGIN, "--size", "debug", "--seeds", "1")
    assert code == 0
    assert "4 of them finished already" in err
    assert "SFT (local)" in out
    after = {row: (folder.path / "record.json").stat().st_mtime_ns for row, folder in folders(here).items()}
    assert before == after


def test_a_setting_that_changes_nothing_is_no_new_run(ran: tuple[int, str, str], here: Path) -> None:
    same = ("--set", "tempered_kd.temperature=2", "--set", "training.lr=1e-3")
    _, out, _ = call("run", PLUGIN, "--size", "debug", "--seeds", "1", "--dry-run", *same)
    assert re.search(r"tempered_kd seed 1 .* finished", out)


def test_dry_run_tells_runs_steps_disk_and_time_and_does_nothing(
    ran: tuple[int, str, str], here: Path
) -> None:
    before = sorted(here.rglob("*"))
    code, out, _ = call("run", "sft", "gkd", "--size", "debug", "--seeds", "1,2", "--dry-run")
    assert code == 0
    assert sorted(path for path in here.rglob("*") if path.suffix != ".lock") == [
        path for path in before if path.suffix != ".lock"
    ]
    lines = {line[:27].strip(): line[27:].split() for line in out.splitlines()}
    assert lines["stage student-init seed 2"][1:4] == ["4", "to", "train"]
    assert lines["sft seed 1"][1:] == ["4", "finished"]
    assert lines["sft seed 2"][1:4] == ["4", "to", "run"]
    assert lines["sft seed 2"][-1] == "s", "the time of a like run is known"
    assert lines["gkd seed 2"][-1] == "unknown"
    assert "stage teacher-sft seed 0" not in lines, "it is trained already"
    assert "Left to do: 6" in out


def test_diverged_is_a_row_and_exit_code_1(ran: tuple[int, str, str], here: Path) -> None:
    code, out, err = call(
        "run", "sft", "--size", "debug", "--seeds", "1", "--set", "training.lr=1e38",
        "--set", "training.grad_clip=none", "--runs", "diverged",
    )  # fmt: skip
    assert code == 1
    assert "diverged" in out
    assert re.search(r"sft\[.*\] seed 1: diverged in .*update", err)


def test_a_method_that_raises_is_a_failed_row_and_exit_code_1(ran: tuple[int, str, str], here: Path) -> None:
    first = "        q = predict"
    text = PLUGIN.read_text().replace(first, f"        raise RuntimeError('mine')\n{first}")
    (here / "raises.py").write_text(text)
    code, out, err = call("run", "raises.py", "--size", "debug", "--seeds", "1")
    assert code == 1
    assert "RuntimeError: mine (raises.py:" in out
    assert "1 failed" in out
    assert "Traceback" not in err
    for path in here.glob("runs/tiny-instruct/v1/*/record.json"):
        if load(path).row == "raises":
            path.unlink()


def test_rows_of() -> None:
    board = load_board("tiny-instruct/v1")
    names = [row.name for row in board.rows]
    assert rows_of(board, []) == rows_of(board, ["all"]) == names
    assert rows_of(board, ["kd", "my.py"]) == ["teacher", "student-init", "kd", "my.py"]
    assert rows_of(board, ["my.py", "all"]) == [*names, "my.py"]


def test_tune_writes_what_the_board_then_uses(ran: tuple[int, str, str], here: Path) -> None:
    text = re.sub(r"\n\[tuning\].*?\n\n", "\n", TINY.read_text(), flags=re.DOTALL)
    head, *rows = re.split(r"(?=\[\[rows\]\])", text)
    last, columns = rows[-1].split("\n# ---", 1)
    kept = [row for row in [*rows[:-1], last] if 'name = "teacher"' in row or 'name = "sft"' in row]
    tuning = '[tuning]\nseed = 9\nfactors = [0.5, 2.0]\nscore = "rouge_l"\nsize = "debug"\n\n'
    sizes = head.index("[sizes.full]")
    (here / "tiny").mkdir()
    board = here / "tiny" / "board.toml"
    board.write_text(head[:sizes] + tuning + head[sizes:] + "".join(kept) + "\n# ---" + columns)
    code, out, err = call("tune", board, "--jobs", "2")
    assert code == 0, err
    tuned = load_board(str(board)).tuned["sft"]
    assert [trial.lr for trial in tuned.trials] == [5e-4, 2e-3]
    scores = [trial.score for trial in tuned.trials]
    assert all(score is not None for score in scores)
    assert tuned.lr == tuned.trials[scores.index(max(scores, key=lambda score: score or 0.0))].lr
    assert f"sft                  lr {tuned.lr:g}" in out
    assert {path.name for path in here.glob("runs/tuning/*/*/*") if path.is_dir()} == {
        trial.run_id for trial in tuned.trials
    }
    _, out, _ = call("report", board, "--size", "debug")
    assert "SFT" in out
    assert not any(trial.run_id in out for trial in tuned.trials), "trials are not reported"
    _, out, _ = call("run", "sft", "--board", board, "--size", "debug", "--seeds", "1", "--dry-run")
    assert re.search(r"sft seed 1 .*(to run|finished)", out)


def axes_board(folder: Path, *changes: tuple[str, str]) -> Path:
    """The few-shot board with tuning of its debug size at two of its data sets, all rows but one left out."""
    text = (leaderboards_dir() / "tiny-fewshot" / "v1" / "board.toml").read_text()
    head, *rows = re.split(r"(?=\[\[rows\]\])", text)
    last, columns = rows[-1].split("\n# ---", 1)
    kept = [row for row in [*rows[:-1], last] if 'name = "student_pt"' in row]
    tuning = '[tuning]\nseed = 9\nfactors = [2.0, 1.0, 0.5]\nscore = "accuracy"\nsize = "debug"\n\n'
    head = head.replace("[sizes.full]", f"{tuning}[sizes.full]", 1)
    axes = '[sizes.debug]\naxes = { dataset = ["topic", "pairs"] }\n'
    text = head.replace("[sizes.debug]\n", axes, 1) + "".join(kept) + "\n# ---" + columns
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    folder.mkdir()
    (folder / "board.toml").write_text(text)
    return folder / "board.toml"


def test_trials_are_made_at_every_axis_value_and_their_mean_is_the_score(
    ran: tuple[int, str, str], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = load_board(str(axes_board(here / "axes_tuned")))
    (plans,) = trials(board, "cpu", Places(tmp_path / "runs", tmp_path / "cache")).values()
    names = [(plan.run.training.lr, plan.run.axes["dataset"]) for plan in plans]
    assert names == [(lr, data) for lr in (2e-3, 1e-3, 5e-4) for data in ("topic", "pairs")]
    assert {plan.run.task_settings["dataset"] for plan in plans} == {"topic", "pairs"}
    assert [plan.run.evaluation.sets for plan in plans] == [["topic"], ["pairs"]] * 3
    select = {(p.run.select.rule, p.run.select.score, p.run.select.every, p.run.seed) for p in plans}
    assert select == {("best", "accuracy", 4, 9)}, "the best dev score, as the board keeps it"

    scores: dict[tuple[float, str], float | None] = {}
    record = next(iter(folders(here).values())).record

    def finished(plan: Any) -> Any:
        score = scores[plan.run.training.lr, plan.run.axes["dataset"]]
        record.scores = {} if score is None else {"dev/accuracy": Score(score, "", 8)}
        return dataclasses.replace(record)

    monkeypatch.setattr(type(plans[0]), "finished", finished)
    for given, best, means in (
        ([50, 70, 80, 40, 10, 20], 1e-3, [60, 60, 15]),  # a tie: the smaller rate
        ([50, 70, 80, 45, 10, 20], 1e-3, [60, 62.5, 15]),
        ([50, 70, 99, None, 10, 20], 2e-3, [60, None, 15]),  # one of its axis values is missing
    ):
        scores.update(zip(names, given, strict=True))
        write_tuning(board, {"student_pt": plans})
        tuned = load_board(str(here / "axes_tuned" / "board.toml")).tuned["student_pt"]
        assert tuned.lr == best
        assert [trial.score for trial in tuned.trials] == means
        assert [trial.lr for trial in tuned.trials] == [2e-3, 1e-3, 5e-4]
        ids = [one for trial in tuned.trials for one in trial.run_id.split(" ")]
        assert ids == [plan.id for plan in plans]


def test_trials_score_the_last_weights_where_the_board_keeps_them(here: Path, tmp_path: Path) -> None:
    keeps = ('select = { rule = "best", score = "accuracy", every = 4 }\n\n[sizes.debug.training]',
             'select = { rule = "last" }\n\n[sizes.debug.training]')  # fmt: skip
    board = load_board(str(axes_board(here / "last_tuned", keeps)))
    (plans,) = trials(board, "cpu", Places(tmp_path / "runs", tmp_path / "cache")).values()
    assert {(p.run.select.rule, p.run.select.every) for p in plans} == {("last", 8)}


# ----------------------------------------------------------------------------------------------- reading runs
def test_report_formats(ran: tuple[int, str, str], here: Path) -> None:
    for format in ("table", "markdown", "csv"):
        code, out, _ = call("report", "--size", "debug", "--format", format)
        assert code == 0
        assert "SFT" in out
    _, out, _ = call("report", "tiny-instruct", "--size", "debug", "--format", "json")
    assert {"sft", "tempered_kd"} <= {row["name"] for row in json.loads(out)["rows"]}


def test_a_record_that_does_not_fit_is_named_and_left_out(ran: tuple[int, str, str], here: Path) -> None:
    broken = here / "runs" / "tiny-instruct" / "v1" / "000000000000" / "record.json"
    broken.parent.mkdir()
    data = json.loads((folders(here)["sft"].path / "record.json").read_text())
    del data["seed"]
    broken.write_text(json.dumps(data))
    code, out, _ = call("report", "--size", "debug")
    broken.unlink()
    broken.parent.rmdir()
    assert code == 0
    assert "'seed' is missing" in out
    assert "000000000000" in out
    assert "SFT (local)" in out


def test_show(ran: tuple[int, str, str], here: Path) -> None:
    run = folders(here)["sft"]
    code, out, _ = call("show", run.record.run_id[:8], "--set", "long", "--n", "2")
    assert code == 0
    assert out.count("example ") == 2
    first = run.outputs("long")[0]
    assert str(first["example_id"]) in out
    assert first["references"][0].split()[0] in out
    assert "rouge_l" in out
    code, out, _ = call("show", "sft", "--against", "tempered_kd", "--n", "1")
    assert code == 0
    assert out.count("response: rouge_l") == 2


def test_find_run(ran: tuple[int, str, str], here: Path) -> None:
    runs, sft = here / "runs", folders(here)["sft"]
    for name in (sft.record.run_id, sft.record.run_id[:9], "sft", str(sft.path)):
        assert find_run(name, runs).path.resolve() == sft.path.resolve()
    with pytest.raises(UserError, match="several begin so"):
        find_run("", runs)
    with pytest.raises(UserError, match="Did you mean 'sft'"):
        find_run("stf", runs)
    with pytest.raises(UserError, match="there are no runs"):
        find_run("sft", here / "nowhere")


def test_analyze_puts_scores_back(ran: tuple[int, str, str], here: Path) -> None:
    run = folders(here)["sft"]
    before = run.record.scores
    code, out, err = call("analyze", "sft", "--analysis", "instruction_following")
    assert code == 0, err
    assert "instruction_following/rouge_l" in out
    assert run.record.scores == before


def test_analyze_takes_a_board_and_settings(ran: tuple[int, str, str], here: Path) -> None:
    more = ("--set", 'exposure_bias.divergences=["jsd"]', "--figures", "drawn")
    code, out, err = call("analyze", "sft", "tempered_kd", "--analysis", "exposure_bias", *more)
    assert code == 0, err
    assert "sft, seed 1, run" in out
    assert "tempered_kd, seed 1, run" in out
    assert {"ex_acc_err.png", "summary-sft.md"} <= {path.name for path in (here / "drawn").iterdir()}
    assert "exposure_bias/jsd/ex_acc_err@5" in folders(here)["sft"].record.scores
    assert call("analyze", "tiny-instruct/v1")[2].strip() == (
        "kdbench: tiny-instruct/v1: no finished run of size 'full' in the folder runs"
    )
    code, out, err = call("analyze", "sft", "--analysis", "exposure_bias")
    assert "exposure_bias/jsd/ex_acc_err@5" not in folders(here)["sft"].record.scores
    assert re.search(r"exposure_bias/length +[\d.]+ +tokens +\[[\d.]+, [\d.]+\] +n 8", out)


def test_an_analysis_of_ones_own_that_fails_is_one_line(ran: tuple[int, str, str], here: Path) -> None:
    for text, said in (
        ("raise ValueError('boom')", "ValueError: boom (own.py:3)"),
        ("return {}", "should return an Analysis, not dict"),
    ):
        (here / "own.py").write_text(f"VERSION = 1\ndef analyze(run):\n    {text}\n")
        code, out, err = call("analyze", "sft", "--analysis", "own.py")
        assert (code, out, len(err.splitlines()), said in err) == (2, "", 1, True), err


def test_compare(ran: tuple[int, str, str], here: Path) -> None:
    debug = ("--size", "debug")
    code, out, err = call("compare", "sft", "tempered_kd", *debug, "--score", "exposure_bias/length")
    assert code == 0, err
    assert "sft less tempered_kd, seeds 1, the same prompts, 95 % intervals" in out
    line = next(line for line in out.splitlines() if line.startswith("exposure_bias/length tokens"))
    mean = [
        run.record.value("exposure_bias/length")
        for run in map(folders(here).get, ("sft", "tempered_kd"))
        if run
    ]
    shown = [float(x) for x in re.findall(r"(-?[\d.]+(?:e-?\d+)?) \[", line)]
    assert shown == pytest.approx([mean[0], mean[1], (mean[0] or 0) - (mean[1] or 0)], rel=1e-3)
    assert "instruction_following/rouge_l" in call("compare", "sft", "tempered_kd", *debug)[1]
    code, _, err = call("compare", "sft", "gdk", *debug)
    assert (code, "no run 'gdk'" in err) == (2, True)
    code, _, err = call("compare", "sft", "tempered_kd", *debug, "--score", "exposure_bias/lenght")
    assert (code, "Did you mean 'exposure_bias/length'" in err) == (2, True)


def test_collect_more_evidence(ran: tuple[int, str, str], here: Path) -> None:
    code, out, err = call("collect", "sft", "--profile", "minillm", "--intervention", "recovery")
    assert code == 0, err
    folder = folders(here)["sft"].path / "evidence"
    assert read_evidence(folder / "final-minillm.parquet").manifest.profile == "minillm"
    assert (folder / "interventions" / "recovery.parquet").is_file()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    code, out, err = call("collect", "sft", "--profile", "minillm", "--intervention", "recovery")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert code == 0
    code, out, _ = call("analyze", "sft", "--analysis", "exposure_bias")
    assert "exposure_bias/minillm/ex_acc_err_minillm@5" in out
    for wrong, part in (
        (("--profile", "minilm"), "Did you mean 'minillm'"),
        (("--intervention", "recover"), "Did you mean 'recovery'"),
        ((), "say what"),
    ):
        code, out, err = call("collect", "sft", *wrong)
        assert (code, out, part in err, len(err.splitlines())) == (2, "", True, 1)


def test_collect_makes_again_what_is_damaged_or_another_runs(ran: tuple[int, str, str], here: Path) -> None:
    mine, other = (folders(here)[row].path / "evidence" for row in ("sft", "student-init"))
    whole = {path: path.read_bytes() for path in mine.glob("final.*")}
    assert len(whole) == 2
    for damage in ("foreign", "torn", "gone"):
        for path in whole:
            if damage == "foreign":
                path.write_bytes((other / path.name).read_bytes())
            elif damage == "torn":
                path.write_bytes(path.read_bytes()[:-7])
            else:
                path.unlink()
        assert call("collect", "sft", "--profile", "plain")[0] == 0
        assert {path: path.read_bytes() for path in whole} == whole, damage


def test_collect_trains_a_teacher_that_is_gone_and_refuses_another(
    ran: tuple[int, str, str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders(here)["sft"]
    path = folder.evidence
    before = path.read_bytes()
    path.unlink()
    monkeypatch.setenv("KDBENCH_CACHE", str(here / "another-cache"))
    assert call("collect", "sft", "--profile", "plain")[0] == 0
    assert path.read_bytes() == before
    record = folder.record
    teacher = record.models["teacher"]
    record.models["teacher"] = Named(teacher.name, "0" * 16)
    save(record, folder.path / "record.json")
    code, out, err = call("collect", "sft", "--profile", "plain")
    assert (code, out) == (2, "")
    assert "its teacher is not in the cache" in err.splitlines()[-1]
    record.models["teacher"] = teacher
    save(record, folder.path / "record.json")


def test_a_name_stands_for_the_run_begun_last_of_each_seed(ran: tuple[int, str, str], here: Path) -> None:
    folder = folders(here)["sft"]
    old = here / "twice/tiny-instruct/v1/older"
    shutil.copytree(folder.path, here / "twice/tiny-instruct/v1/newer")
    shutil.copytree(folder.path, old)
    for name, row in (("older", 1000), ("newer", 2000)):
        os.utime(here / f"twice/tiny-instruct/v1/{name}/config.json", (row, row))
    (old / "record.json").touch()  # as after another analysis
    board = load_board("tiny-instruct/v1")
    for found in (
        find_runs("sft", here / "twice"),
        find_runs("tiny-instruct/v1", here / "twice", "debug"),
        runs_of("sft", board, "debug", here / "twice"),
        [find_run("sft", here / "twice")],
    ):
        assert [one.path.name for one in found] == ["newer"]
    with pytest.raises(UserError, match="no finished run of row 'sft' in size 'full'"):
        runs_of("sft", board, "full", here / "twice")


@pytest.fixture(scope="module")
def spread(ran: tuple[int, str, str], here: Path) -> Path:
    """Runs of two methods at two values of an axis, seed 1; the second method has seed 2 on the other too."""
    runs = here / "spread"
    for row, data, seed in (
        ("sft", "polarity", 1),
        ("sft", "topic", 1),
        ("tempered_kd", "polarity", 1),
        ("tempered_kd", "topic", 1),
        ("tempered_kd", "topic", 2),
    ):
        target = runs / "tiny-instruct/v1" / f"{data}-{row.replace('_', '-')}-{seed}"
        shutil.copytree(folders(here)[row].path, target)
        record = load(target / "record.json")
        record.run_id, record.seed, record.axes = target.name, seed, {"data": data}
        save(record, target / "record.json")
    return runs


def test_show_asks_which_axis_value(spread: Path) -> None:
    code, out, err = call("show", "sft", "--runs", spread)
    assert (code, out) == (2, "")
    assert (
        "run 'sft': has runs of several axis values (data polarity; data topic); name one by its id, " in err
    )
    assert err.endswith("or say which values, for example --axis data=polarity\n")
    code, out, err = call("show", "sft", "--axis", "data=topic", "--n", "1", "--runs", spread)
    assert code == 0, err
    assert "sft, data topic, seed 1, run topic-sft-1 (tiny-instruct/v1, debug)" in out
    beside = ("--against", "tempered_kd", "--axis", "data=topic", "--n", "1")
    code, out, err = call("show", "sft", *beside, "--runs", spread)
    assert code == 0, err
    assert re.search(r"topic-sft-1.*│ tempered_kd, data topic, seed 1", out)
    for axis, said in (
        ("data=topics", "no value of data 'topics'. Did you mean 'topic'? Known: polarity, topic."),
        ("dat=topic", "no axis 'dat'. Did you mean 'data'? Known: data."),
        ("topic", "write it as axis=value, for example dataset=sst2,mr"),
    ):
        code, _, err = call("show", "sft", "--axis", axis, "--runs", spread)
        assert (code, said in err) == (2, True), err


def test_names_stand_for_runs_of_all_axis_values(spread: Path) -> None:
    def ids(found: list[RunFolder]) -> list[str]:
        return [one.path.name for one in found]

    board, both = load_board("tiny-instruct/v1"), ["polarity-sft-1", "topic-sft-1"]
    assert ids(find_runs("sft", spread)) == both
    assert ids(find_runs("sft", spread, axes=["data=topic"])) == both[1:]
    assert ids(runs_of("sft", board, "debug", spread)) == both
    assert ids(runs_of("sft", board, "debug", spread, ["data=polarity"])) == both[:1]
    assert len(find_runs("tiny-instruct/v1", spread, "debug")) == 5
    assert len(find_runs("tiny-instruct/v1", spread, "debug", ["data=topic"])) == 3
    assert ids(find_each(both, spread)) == both
    assert ids(find_each(["sft", "tempered_kd"], spread, ["data=topic"])) == [
        "topic-sft-1",
        "topic-tempered-kd-1",
    ]
    with pytest.raises(UserError, match="no value of data 'topic'. Known: polarity"):
        find_run("polarity-sft-1", spread, ["data=topic"])


def test_compare_pairs_runs_of_equal_axis_values_and_seed(spread: Path) -> None:
    sides = [
        runs_of(name, load_board("tiny-instruct/v1"), "debug", spread) for name in ("sft", "tempered_kd")
    ]
    found, left = pairs(*sides)
    assert [(pair.axes["data"], [run.path.name for run in pair.runs]) for pair in found] == [
        ("polarity", ["polarity-sft-1", "polarity-tempered-kd-1"]),
        ("topic", ["topic-sft-1", "topic-tempered-kd-1"]),
    ]
    assert left == []
    command = ("compare", "sft", "tempered_kd", "--size", "debug", "--runs", spread)
    code, out, err = call(*command, "--score", "exposure_bias/length")
    assert code == 0, err
    assert [line for line in out.splitlines() if "less" in line] == [
        f"sft less tempered_kd, data {data}, seeds 1, the same prompts, 95 % intervals"
        for data in ("polarity", "topic")
    ]
    assert out.count("exposure_bias/length tokens") == 2
    code, out, _ = call(*command, "--axis", "data=topic")
    assert (code, out.count(" less ")) == (0, 1)
    code, _, err = call(*command, "--score", "exposure_bias/lenght")
    assert (code, "Did you mean 'exposure_bias/length'" in err) == (2, True)
    code, _, err = call(
        "compare", "polarity-sft-1", "topic-tempered-kd-1", *command[3:], "--score", "exposure_bias/length"
    )
    assert (code, "needs one axis value" in err) == (2, True), err
    code, out, err = call("compare", "polarity-sft-1", "polarity-tempered-kd-1", "--runs", spread)
    assert (code, out.count(" less ")) == (0, 1), "board and size are the runs' own"
    assert out.count("\n") > 2, err
    found, left = pairs(sides[0], sides[1][1:])
    assert [pair.axes["data"] for pair in found] == ["topic"]
    assert left == ["data polarity: seeds 1 and none"]
    with pytest.raises(
        UserError, match="the same axis values and training seed, here are data polarity: seeds 1"
    ):
        pairs([*sides[0][:1], sides[0][0]], sides[1][1:])


def test_run_keeps_only_the_axis_values_asked_for(ran: tuple[int, str, str], here: Path) -> None:
    axes = 'axes = { dev = [8, 9, 10] }\ntask_settings = { dev = "{dev}" }\n'
    sizes = "[sizes.debug]\naxes = { dev = [8, 9] }\n"
    text = TINY.read_text().replace("dev = 8, ", "").replace("[sizes.debug]\n", sizes)
    (here / "axes.toml").write_text(axes + text.replace("[tuning]", "[tuning]\nsize = 'debug'", 1))
    command = ("run", "sft", "--board", "axes.toml", "--size", "debug", "--seeds", "1", "--dry-run")
    for given, values in ((), "89"), (("--axis", "dev=9"), "9"), (("--axis", "dev=9,8"), "89"):
        code, out, err = call(*command, *given)
        assert code == 0, err
        labels = [line.split(" seed")[0] for line in out.splitlines() if line.startswith("sft")]
        assert labels == [f"sft (dev {value})" for value in values]
    for axis, said in (
        ("dev=10", "--axis: no value of dev '10'. Known: 8, 9."),
        ("devs=8", "--axis: no axis 'devs'. Did you mean 'dev'? Known: dev."),
    ):
        code, out, err = call(*command, "--axis", axis)
        assert (code, out, said in err, len(err.splitlines())) == (2, "", True, 1), err


def test_narrowed() -> None:
    items = [{"a": text, "k": k} for text in ("x,y", "x", "on") for k in (True, 16)]
    assert narrowed(items, lambda one: one, []) == items
    assert narrowed(items, lambda one: one, ["a=x,y"]) == items[:2], "a value may hold a comma"
    assert narrowed(items, lambda one: one, ["a=on,x", "k=true"]) == [items[2], items[4]]
    assert narrowed(items, lambda one: one, ["k=16", "k=true"]) == items
    with pytest.raises(UserError, match="nothing has all of these values"):
        narrowed(items[1:3], lambda one: one, ["a=x,y", "k=true"])
    with pytest.raises(UserError, match="no axis 'a'. There are none."):
        narrowed([{}], lambda one: one, ["a=1"])


def test_certify_says_what_is_out_of_bounds(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "PROMPTS", 20)
    monkeypatch.setattr(certify, "CHUNK", 3)
    monkeypatch.setattr(certify, "FAST", certify.Plan(("equal",), 3, 60))
    code, out, err = call("certify", "--fast", "--jobs", "1", "--out", "certified")
    assert code in (0, 1), err
    assert "# Certification of the estimators" in out
    assert {path.name for path in (here / "certified").iterdir()} == {
        "results.csv", "table.md", "stop_rate.png", "stop_rate.svg"
    }  # fmt: skip
    code, out, err = call("certify", "--world", "equall")
    assert (code, out, "Did you mean 'equal'" in err) == (2, "", True)


def test_publish_says_why_not(ran: tuple[int, str, str], here: Path) -> None:
    code, _, err = call("publish", "sft")
    assert code == 2
    assert "publishes 'full'" in err


def test_student_loads_with_from_pretrained(ran: tuple[int, str, str], here: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folders(here)["sft"].path / "student"
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Write two words.", return_tensors="pt")
    assert model(**ids).logits.shape[-1] == model.config.vocab_size


def test_the_student_of_a_run_is_a_model(ran: tuple[int, str, str], here: Path) -> None:
    run_id = folders(here)["sft"].record.run_id
    text = TINY.read_text().replace(
        '[sizes.debug.roles.student]\nmodel = "tiny/student"\n',
        f'[sizes.debug.roles.student]\nmodel = "run:{run_id}"\n',
    )
    assert run_id in text
    (here / "further.toml").write_text(text)
    code, out, err = call(*"run sft --board further.toml --size debug --seeds 1 --dry-run".split())
    assert code == 0, err
    assert re.search(r"sft seed 1 .*to run", out)


# ------------------------------------------------------------------------------------------------------ lists
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("methods", r"promptkd +\S.*prompt"),
        ("boards", r"tiny-instruct/v1 +.*sizes: full, debug"),
        ("tasks", r"tiny_instruct +\S"),
        ("analyses", r"exposure_bias +\S"),
        ("models", r"tiny/student +\S"),
        ("data", r"dolly: https://"),
    ],
)
def test_list(kind: str, line: str) -> None:
    code, out, _ = call("list", kind)
    assert code == 0
    assert re.search(line, out)


def test_list_data_says_what_a_folder_lacks(tmp_path: Path) -> None:
    _, out, _ = call("list", "data", "--data-root", tmp_path)
    assert re.search(r"train +lacking", out)
    assert re.search(r"[0-9a-f]{64}", out)


# ------------------------------------------------------------------------------------------------------ check
def test_check_names_the_laws() -> None:
    laws = ("--law", "roles", "--law", "moves")
    code, out, err = call("check", PLUGIN, *laws, "--set", "tempered_kd.temperature=3")
    assert code == 0, err
    assert re.search(r"roles +pass", out)
    assert re.search(r"moves +pass", out)


def test_check_fails_with_exit_code_1(tmp_path: Path) -> None:
    right, wrong = "return self.cfg.temperature**2 * token_mean(kl, batch)", "return kl.mean()"
    text = PLUGIN.read_text().replace(right, wrong)
    (tmp_path / "tempered_kd.py").write_text(text)
    code, out, _ = call("check", tmp_path / "tempered_kd.py", "--law", "micro_batch")
    assert code == 1
    assert re.search(r"micro_batch +fail", out)


# --------------------------------------------------------------------------------------- mistakes of the user
MISTAKES: list[tuple[str, str]] = [
    ("runn", "no command 'runn'. Did you mean 'run'?"),
    ("run --sizee debug", "No such option"),
    ("run promtkd", "Did you mean 'promptkd'?"),
    ("run sft --board tiny-instruc/v1", "Did you mean 'tiny-instruct/v1'?"),
    ("report tiny-instruct/v9", "Known: tiny-instruct/v1"),
    ("run sft --size fulll", "Did you mean 'full'?"),
    ("report --size fulll", "Did you mean 'full'?"),
    ("report --format tabel", "Did you mean 'table'?"),
    ("run sft --seeds one", "whole numbers"),
    ("run sft --jobs 0", "--jobs"),
    ("run sft --device tpu --size debug", "no device 'tpu'"),
    ("run sft --track mlflow --size debug", "no tracker 'mlflow'"),
    ("run promptkd --set promptkd.promt_length=3", "Did you mean 'prompt_length'?"),
    ("run promptkd --set promtkd.prompt_length=3", "Did you mean 'promptkd'?"),
    ("run promptkd --set promptkd.prompt_length=many", "prompt_length: expected a whole number"),
    ("run sft --set training.lr=fast", "training.lr: expected a number"),
    ("run sft --set training.optimizer_steps=7", "budgets = 'equal'"),
    ("run sft --set task.trainn=7", "Did you mean"),
    ("run sft --set nonsense", "section.key=value"),
    ("run sft --axis data=mr", "no axis 'data'. There are none."),
    ("run sft --axis data", "write it as axis=value"),
    ("run missing.py", "missing.py: there is no such file"),
    ("run empty.py", "defines none"),
    ("run broken.py", "broken.py:3: ZeroDivisionError: division by zero"),
    ("run syntax.py", "syntax.py:1: SyntaxError"),
    ("run sft --board type.toml", "sizes.debug.training.lr: expected a number, given \"fast\""),
    ("run sft --board key.toml", "no setting 'learning_rate'"),
    ("run sft --board analysis.toml", "Did you mean 'exposure_bias'?"),
    ("run sft --board task.toml", "Did you mean 'tiny_instruct'?"),
    ("run sft --board torn.toml", "is not TOML"),
    ("run sft --size debug --data-root nowhere", "nowhere: there is no such folder"),
    ("run sft --size debug --runs a-file/runs", "cannot be written"),
    ("run sft --board instruct.toml", "--data-root"),
    ("run sft --board instruct.toml --data-root void", "void"),
    ("run sft --board lines.toml --set task.train=empty.jsonl", "empty.jsonl: is empty"),
    ("run sft --board lines.toml --set task.train=torn.jsonl", "torn.jsonl:2: is not JSON"),
    ("run sft --board lines.toml --set task.train=lacks.jsonl", "lacks.jsonl:2: lacks the field 'output'"),
    ("run sft --board lines.toml --set task.train=none.jsonl", "none.jsonl"),
    ("run sft --board weightless.toml", "has no weights"),
    ("run kd --board vocabularies.toml", "student has 40 tokens (model vocabulary 40), teacher has 3"),
    ("show nothing", "there are no runs"),
    ("analyze nothing", "there are no runs"),
    ("publish nothing", "there are no runs"),
    ("list method", "Did you mean 'methods'?"),
    ("list data --data-root nowhere", "nowhere: there is no such folder"),
    ("check promtkd", "Did you mean 'promptkd'?"),
    ("check promptkd --law micro_bacth", "Did you mean 'micro_batch'?"),
    ("check promptkd --set promptkd.promt_length=3", "Did you mean 'prompt_length'?"),
    ("tune tiny-instruc", "Did you mean"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Path]:
    """A folder with one file for each mistake."""
    folder = tmp_path_factory.mktemp("bad")
    write_mistakes(folder, tiny_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KDBENCH_CACHE", str(folder / "cache"))
        patch.delenv("KDBENCH_DATA_ROOT", raising=False)
        yield folder


def write_mistakes(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Boards, plug-ins, data and models, each with one thing wrong."""
    text = TINY.read_text()

    def board(name: str, *changes: tuple[str, str]) -> None:
        changed = text
        for old, new in changes:
            assert old in changed, old
            changed = changed.replace(old, new)
        (folder / name).write_text(changed)

    debug = "[sizes.debug.training]\n"
    before, after = text.split(debug)
    (folder / "type.toml").write_text(before + debug + after.replace("lr = 1e-3", 'lr = "fast"', 1))
    board("key.toml", (debug, debug + "learning_rate = 1\n"))
    board("analysis.toml", ('"exposure_bias"', '"exposure_bais"'))
    board("task.toml", ('task = "tiny_instruct"', 'task = "tiny_instuct"'))
    (folder / "torn.toml").write_text("name = [")
    size = """
[sizes.full.training]
optimizer_steps = 2
batch_size = 2
lr = 1e-3
max_new_tokens = 4

[sizes.full.evaluation]
decode = { max_new_tokens = 4 }

[[rows]]
name = "sft"
method = "sft"

[[rows]]
name = "kd"
method = "kd"

[[columns]]
score = "instruction_following/rouge_l"
title = "ROUGE-L"
"""
    head = 'name = "mine"\nversion = "v1"\nquestion = "?"\ntask = "instruct"\nseeds = [1]\nanalyses = []\n'
    settings = '[task_settings]\nmax_prompt = 40\nmax_length = 56\nsource = "{}"\n'
    names = 'train = "dolly"\ndev = "dolly"\ntests = ["dolly"]\n'
    files = 'train = "good.jsonl"\ndev = "good.jsonl"\ntests = ["good.jsonl"]\n'
    roles = '[roles.student]\nmodel = "{}"\n[roles.teacher]\nmodel = "{}"\n'
    for name, told in (
        ("instruct.toml", settings.format("local") + names + roles.format("./small", "./small")),
        ("lines.toml", settings.format("auto") + files + roles.format("./small", "./small")),
        ("weightless.toml", settings.format("auto") + files + roles.format("./weightless", "./small")),
        ("vocabularies.toml", settings.format("auto") + files + roles.format("./small", "./other")),
    ):
        (folder / name).write_text(head + told + size)
    good = json.dumps({"instruction": "say one", "input": "", "output": "one"})
    (folder / "good.jsonl").write_text(f"{good}\n" * 20)
    (folder / "empty.jsonl").write_text("")
    (folder / "torn.jsonl").write_text(f'{good}\n{{"instruction": \n')
    (folder / "lacks.jsonl").write_text(f'{good}\n{{"instruction": "say one"}}\n')
    (folder / "void").mkdir()
    (folder / "a-file").write_text("")
    (folder / "empty.py").write_text("x = 1\n")
    (folder / "broken.py").write_text("x = 1\n\ny = x / 0\n")
    (folder / "syntax.py").write_text("def (\n")
    save_model(folder / "small", tokenizer)
    save_model(folder / "weightless", tokenizer)
    (folder / "weightless" / "model.safetensors").unlink()
    words = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1, "other": 2}, unk_token="<unk>"))
    other = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    save_model(folder / "other", other)


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A random GPT-2 for the tokenizer, as the hub would give it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = len(tokenizer)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(("command", "part"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_gets_one_line_and_exit_code_2(
    bad: Path, monkeypatch: pytest.MonkeyPatch, command: str, part: str
) -> None:
    import kdbench.models

    def no_weights(*args: Any, **named: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(kdbench.models, "load_model", no_weights)
    code, out, err = call(*command.split())
    assert (code, out) == (2, ""), err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("kdbench: ")
    assert part in lines[0]
    assert not (bad / "runs").exists()


# ---------------------------------------------------------------------------------------- processes and speed
def started(*command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command", ["report", "report --cost", "--help", "run --help", "list methods", "list boards"]
)
def test_answers_at_once_and_without_torch(command: str, ran: tuple[int, str, str], here: Path) -> None:
    """Processor time rather than wall-clock time, which a busy machine stretches; nothing here waits."""
    code = (
        "import resource, sys; from kdbench.cli import main; "
        f"code = main({command.split()!r}); used = resource.getrusage(resource.RUSAGE_SELF); "
        "print(code, 'torch' in sys.modules, used.ru_utime + used.ru_stime, file=sys.stderr)"
    )
    found = [started(sys.executable, "-c", code, folder=here).stderr.split()[-3:] for _ in range(3)]
    assert all(one[:2] == ["0", "False"] for one in found)
    assert min(float(one[2]) for one in found) < 0.5


def test_module_and_exit_code(here: Path) -> None:
    done = started(sys.executable, "-m", "kdbench", "run", "promtkd", folder=here)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kdbench: no method 'promtkd'. Did you mean 'promptkd'?")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_pipe_is_no_error(here: Path) -> None:
    script = f"{sys.executable} -m kdbench list data | head -1"
    assert started("bash", "-c", script, folder=here).stderr == ""


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.boards, "report", stop)
    code, out, err = call("report")
    assert code == 130
    assert out == ""
    assert err.splitlines() == ["kdbench: stopped; what is done is kept, the same command goes on from there"]
