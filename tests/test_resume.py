"""A run that is killed anywhere and started again ends with the numbers of one that was not.

In most tests a child kills itself with SIGKILL at an exact place; in a slow one the whole command is killed
from outside, as files appear and at random moments.
"""

import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from process_kit import begin, processes_of, until

from kdbench import commands, jobs
from kdbench.config import load_board
from kdbench.errors import UserError
from kdbench.record import RunFolder
from kdbench.runner import Plan
from kdbench.stages import Places

OVERRIDES = ["training.checkpoint_every=2"]


# ------------------------------------------------------------------------------------------------- one run
def places(folder: Path) -> Places:
    return Places(folder / "runs", folder / "cache")


def plan(row: str, folder: Path) -> Plan:
    board = load_board("tiny-instruct/v1")
    return commands.plans(board, "debug", [row], [1], OVERRIDES, "cpu", places(folder))[0]


def _live(row: str, folder: Path, kill: tuple[str, int, bool] | None) -> None:
    """Make a run in this process, which kills itself before or after the n-th call of a function."""
    import torch

    torch.set_num_threads(1)
    if kill is not None:
        name, nth, before = kill
        module_name, _, path = name.partition(":")
        *owners, last = path.split(".")
        owner: Any = importlib.import_module(module_name)
        for one in owners:
            owner = getattr(owner, one)
        original, calls = getattr(owner, last), [0]

        def patched(*args: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == nth and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **named)
            if calls[0] == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, last, patched)
    record = plan(row, folder).execute()
    assert record.status == "done", record.reason


def live(row: str, folder: Path, kill: tuple[str, int, bool] | None = None) -> int | None:
    """The exit code of a child that makes, or goes on with, a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(jobs.preload())
    process = context.Process(target=_live, args=(row, folder, kill))
    process.start()
    process.join()
    return process.exitcode


def numbers(folder: Path) -> dict[str, Any]:
    """All that must not differ: scores but for times and bytes, loss curve, responses, arrays, weights."""
    run = RunFolder(folder)
    record = run.record
    found: dict[str, Any] = {
        "run_id": record.run_id,
        "status": record.status,
        "selected": [note for note in record.notes if note.startswith("selected")],
        "steps": (folder / "steps.jsonl").read_bytes() if (folder / "steps.jsonl").exists() else b"",
        "student": (folder / "student" / "model.safetensors").read_bytes(),
        "outputs": {path.name: path.read_bytes() for path in folder.glob("outputs/*.jsonl")},
        "files": sorted(path.name for path in folder.rglob("[!.]*") if path.is_file()),
    }
    found["budget"] = {
        name: value for name, value in record.budget.items() if not name.startswith("stage_seconds.")
    }
    found["scores"] = {
        name: score for name, score in record.scores.items() if not name.startswith("memory_time/")
    }
    found["arrays"] = {
        name: (array.dtype.str, array.shape, array.tobytes()) for name, array in run.arrays().items()
    }
    return found


def assert_same(one: Path, other: Path) -> None:
    """Compare two run folders part by part, so that a failure says which part differs."""
    first, second = numbers(one), numbers(other)
    for name, value in first.items():
        assert value == second[name], name


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for uninterrupted runs, each made when first asked for."""
    return tmp_path_factory.mktemp("reference")


def uninterrupted(row: str, reference: Path) -> Path:
    made = plan(row, reference)
    if not made.complete():
        assert live(row, reference) == 0
    return made.folder


DRAWN = "kdbench.rollout:inverse_cdf"
DESCEND = "kdbench.harness:Trainer._descend"
# what, row, function, the number of its call, before or after that call
POINTS: list[tuple[str, str, str, int, bool]] = [
    ("in a rollout", "minillm", DRAWN, 20, True),
    ("in an update", "promptkd", "kdbench.harness:Trainer._reduce", 5, False),
    ("after an update", "promptkd", DESCEND, 3, False),
    ("after a line of the log", "minillm", "kdbench.harness:Trainer._write", 3, False),
    ("in a checkpoint, between its files", "minillm", "kdbench.checkpoint:_write", 2, True),
    ("before a checkpoint gets its name", "promptkd", "kdbench.checkpoint:_digest", 4, False),
    ("before old checkpoints go", "gkd", "kdbench.checkpoint:_sync", 9, False),
    ("in a snapshot's evidence", "gkd", "kdbench.collect:write_evidence", 2, True),
    ("in what prepare makes", "seqkd", DRAWN, 20, True),
    ("before what prepare made gets its name", "seqkd", "kdbench.distiller:Batch.save", 1, False),
    ("in an answer to a test set", "gkd", "kdbench.record:os.replace", 8, True),
    ("after the evidence", "sft", "kdbench.collect:write_evidence", 3, False),
    ("after the record, before its scores", "sft", "kdbench.record:save", 1, False),
    ("between arrays and record", "sft", "kdbench.record:save_arrays", 2, False),
    ("before the checkpoint is removed", "sft", "kdbench.runner:analyse", 1, False),
]
QUICK = {0, 4, 8, 13}


@pytest.mark.parametrize(
    ("row", "name", "nth", "before"),
    [
        pytest.param(*point[1:], id=point[0], marks=[] if i in QUICK else [pytest.mark.slow])
        for i, point in enumerate(POINTS)
    ],
)
def test_killed_and_resumed(
    reference: Path, tmp_path: Path, row: str, name: str, nth: int, before: bool
) -> None:
    expected = uninterrupted(row, reference)
    shutil.copytree(reference / "cache" / "stages", tmp_path / "cache" / "stages")
    assert live(row, tmp_path, (name, nth, before)) == -signal.SIGKILL
    assert plan(row, tmp_path).folder.name == expected.name
    assert live(row, tmp_path) == 0
    assert_same(expected, plan(row, tmp_path).folder)


STAGES = [
    ("in a stage's update", DESCEND, 4, False),
    ("in a stage's checkpoint", "kdbench.checkpoint:_write", 4, True),
    ("before a stage gets its name", "kdbench.models:save_student", 1, False),
]


@pytest.mark.parametrize(
    ("name", "nth", "before"),
    [
        pytest.param(*one[1:], id=one[0], marks=[] if i == 0 else [pytest.mark.slow])
        for i, one in enumerate(STAGES)
    ],
)
def test_a_killed_stage_resumes(reference: Path, tmp_path: Path, name: str, nth: int, before: bool) -> None:
    expected = uninterrupted("sft", reference)
    assert live("sft", tmp_path, (name, nth, before)) == -signal.SIGKILL
    assert list(tmp_path.glob("cache/stages/*.work")), "it was killed in a stage"
    assert live("sft", tmp_path) == 0
    assert_same(expected, plan("sft", tmp_path).folder)


def test_killed_again_and_again(reference: Path, tmp_path: Path) -> None:
    """Each start gets a little further than the one before."""
    expected = uninterrupted("promptkd", reference)
    for point in ((DESCEND, 9, True), (DESCEND, 2, False), (DESCEND, 8, False), (DRAWN, 40, True)):
        assert live("promptkd", tmp_path, point) == -signal.SIGKILL
    assert live("promptkd", tmp_path) == 0
    assert_same(expected, plan("promptkd", tmp_path).folder)


# ---------------------------------------------------------------------------------------- bad checkpoints
@pytest.mark.parametrize("harm", ["torn", "foreign"])
def test_a_bad_checkpoint_is_named_and_refused(reference: Path, tmp_path: Path, harm: str) -> None:
    uninterrupted("sft", reference)
    shutil.copytree(reference / "cache" / "stages", tmp_path / "cache" / "stages")
    kill = ("kdbench.harness:Trainer._write", 3, False)
    assert live("sft", tmp_path, kill) == -signal.SIGKILL
    run = plan("sft", tmp_path)
    folder = next(run.folder.glob("checkpoint/step-*"))
    if harm == "torn":
        tensors = folder / "shared.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1])
    else:
        shutil.rmtree(folder)
        assert live("gkd", tmp_path, kill) == -signal.SIGKILL
        shutil.copytree(next(plan("gkd", tmp_path).folder.glob("checkpoint/step-*")), folder)
    told = "torn or was changed" if harm == "torn" else "belongs to another run"
    with pytest.raises(UserError, match=told) as caught:
        run.execute()
    assert str(folder) in str(caught.value)
    assert not (run.folder / "record.json").exists()


# ------------------------------------------------------------------------------------- killed from outside
COMMAND = "run seqkd minillm promptkd --size debug --seeds 1 --jobs 2".split()
# a file that is there at a moment of interest; kill as soon as it appears
MOMENTS = [
    "cache/stages/*.work/steps.jsonl",
    "cache/stages/*.work/checkpoint/new-*",
    "cache/prepared/*.work",
    "runs/*/*/*/steps.jsonl",
    "runs/*/*/*/checkpoint/new-*",
    "runs/*/*/*/evidence/snapshot-*.parquet",
    "runs/*/*/*/outputs/*.jsonl",
    "runs/*/*/*/record.json",
]


def _until_new(folder: Path, pattern: str, known: set[Path], process: "subprocess.Popen[bytes]") -> None:
    """Wait for a file that is not known, or for the process to end."""
    until(lambda: process.poll() is not None or bool(set(folder.glob(pattern)) - known), 300, pattern)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_command_killed_from_outside(tmp_path: Path) -> None:
    """`kill -9` as each file appears, then at random moments; the same command always goes on."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert begin(whole, *COMMAND).wait(600) == 0, (whole / "log").read_text()
    draw, kills = random.Random(0), 0
    moments: list[str | float] = [*MOMENTS, *(draw.uniform(0, 6) for _ in range(4))]
    for moment in moments:
        process, start = begin(killed, *COMMAND), time.monotonic()
        if isinstance(moment, str):
            known = set(killed.glob(moment))
            _until_new(killed, moment, known, process)
        else:
            _until_new(killed, "runs/*/*/*.lock", set(), process)
            time.sleep(moment)
        if process.poll() is None:
            kills += 1
            process.kill()
        process.wait()
        until(lambda: not processes_of(killed), 20, "the end of all children")
        assert time.monotonic() - start < 300
    assert kills >= 6
    assert begin(killed, *COMMAND).wait(600) == 0, (killed / "log").read_text()
    records = sorted(whole.glob("runs/*/*/*/record.json"))
    assert len(records) == 5
    for path in records:
        other = killed / path.relative_to(whole)
        assert_same(path.parent, other.parent)
