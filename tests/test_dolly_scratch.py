"""The board dolly-scratch: its sizes fit together; its debug size runs on small data and on the real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_dolly_gpt2 import rows, tokenizer_of, write

from kdbench import record
from kdbench.cli import main
from kdbench.config import load_board, resolve, stage_training
from kdbench.paths import leaderboards_dir
from kdbench.registry import load_distiller, load_task
from kdbench.task import template

BOARD = leaderboards_dir() / "dolly-scratch" / "v1" / "board.toml"
SETS = ("dolly", "self-inst", "vicuna", "s-ni")


@pytest.mark.parametrize("size", ["full", "debug"])
def test_rows_share_models_and_budget(size: str) -> None:
    board, budgets, roles = load_board("dolly-scratch/v1"), set(), set()
    for row in board.rows:
        if row.reference:
            continue
        classes = load_distiller(row.method).Config, load_task(board.task).Settings
        run = resolve(board, size, row.name, 1, settings_class=classes[0], task_settings_class=classes[1])
        budgets.add((run.training.optimizer_steps, run.training.batch_size, run.training.lr))
        roles.add(json.dumps([[role, str(spec)] for role, spec in run.roles.items()]))
        teacher, student = run.roles["teacher"], run.roles["student"]
        assert teacher.architecture is not None
        assert student.architecture is not None
        assert teacher.architecture.config["n_embd"] > student.architecture.config["n_embd"]
        assert (teacher.tokenizer, student.tokenizer) == ("data:tokenizers/gpt2", "data:tokenizers/gpt2")
        assert (
            [stage.task for stage in teacher.stages]
            == [stage.task for stage in student.stages]
            == ["text", None]
        )
        assert teacher.stages[0].task_settings["instruct"] == ["t0"]
        for stage in (*teacher.stages, *student.stages):
            assert stage_training(stage).optimizer_steps > 0
        positions = student.architecture.config["n_positions"]
        assert run.task_settings["max_length"] + 7 <= positions  # with a soft prompt of 7
    assert len(budgets) == len(roles) == 1


def run(board: Path, data: Path, runs: Path, methods: list[str]) -> dict[str, record.RunRecord]:
    """Run rows of size debug with one seed; their records by row."""
    command = ["run", *methods, "--board", str(board), "--size", "debug", "--seeds", "1", "--jobs", "2"]
    code = main([*command, "--runs", str(runs), "--data-root", str(data), "--device", "cpu"])
    found = [record.load(path) for path in runs.glob("dolly-scratch/v1/*/record.json")]
    assert code == 0, [(one.row, one.status, one.reason) for one in found]
    return {one.row: one for one in found}


def check(records: dict[str, record.RunRecord], methods: list[str]) -> None:
    """Every row is there with ROUGE-L of four sets, exact match of the fifth and ExAccErr."""
    assert set(records) == {"teacher", "student-init", *methods}
    for one in records.values():
        assert one.status == "done"
        for name in SETS:
            assert 0 <= one.value(f"instruction_following/rouge_l/{name}") <= 100
        assert 0 <= one.value("instruction_following/exact_match/unni-short") <= 100
        assert one.value("exposure_bias/accumulated_error@5") is not None
    assert len({records[name].budget["prompts"] for name in methods}) == 1
    assert len({one.models["teacher"].revision for one in records.values()}) == 1


def test_debug_runs_on_a_small_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    train = rows(40, 1)
    write(data / "instruct" / "dolly" / "train.jsonl", train)
    write(data / "instruct" / "dolly" / "dev.jsonl", rows(4, 2))
    write(data / "instruct" / "t0" / "train.jsonl", rows(40, 9))
    for number, name in enumerate((*SETS, "unni")):
        write(data / "instruct" / name / "test.jsonl", rows(3, 3 + number))
    for name in ("grimm/tales", "wikitext-2/valid", "wikitext-2/test"):
        (data / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(str(row["output"]) for row in rows(60, len(name)))
        (data / "text" / f"{name}.txt").write_text(text)
    tokenizer = tokenizer_of([template(row) + str(row["output"]) for row in train])
    tokenizer.save_pretrained(data / "tokenizers" / "gpt2")
    head, debug = BOARD.read_text().split("[sizes.debug]")
    debug = re.sub(r"optimizer_steps = \d+", "optimizer_steps = 3", debug)
    debug = re.sub(r"max_new_tokens = \d+", "max_new_tokens = 8", debug)
    (tmp_path / "board.toml").write_text(f"{head}[sizes.debug]{debug}")
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path / "cache"))
    methods = ["sft", "kd", "promptkd"]
    check(run(tmp_path / "board.toml", data, tmp_path / "runs", methods), methods)


@pytest.mark.slow
def test_debug_runs_on_the_real_data(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path / "cache"))
    methods = ["sft", "kd", "promptkd"]
    records = run(BOARD, data_root, tmp_path / "runs", methods)
    check(records, methods)
    assert records["teacher"].value("instruction_following/rouge_l/dolly") > 1
