"""Runs in processes: their order, what becomes of a child that dies, and that none outlives its parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from process_kit import begin, environment, processes_of, until

from kdbench import commands
from kdbench.config import load_board
from kdbench.jobs import Job, Lines, Outcome, Workers, duration, jobs_of, told
from kdbench.stages import Places


def plans(tmp_path: Path, rows: list[str], seeds: list[int]) -> list[Any]:
    places = Places(tmp_path / "runs", tmp_path / "cache")
    return commands.plans(load_board("tiny-instruct/v1"), "debug", rows, seeds, [], "cpu", places)


# ------------------------------------------------------------------------------------------------------ order
def test_stages_are_jobs_of_their_own_made_once(tmp_path: Path) -> None:
    jobs = jobs_of(plans(tmp_path, ["teacher", "sft", "kd"], [1, 2]))
    stages = [job for job in jobs if job.role is not None]
    assert [job.label for job in stages] == [
        "stage teacher-sft seed 0",
        "stage student-init seed 1",
        "stage student-init seed 2",
    ], "longest first, each once"
    runs = jobs[len(stages) :]
    assert [job.label for job in runs] == [
        f"{row} seed {seed}" for seed in (1, 2) for row in ("teacher", "sft", "kd")
    ]
    key = {job.label: job.gives for job in stages}
    sft = next(job for job in runs if job.label == "sft seed 2")
    assert sft.needs == {key["stage teacher-sft seed 0"], key["stage student-init seed 2"]}
    teacher = next(job for job in runs if job.label == "teacher seed 2")
    assert teacher.needs == {key["stage teacher-sft seed 0"]}


class Pretend(Workers):
    """Workers whose jobs are threads that do what a table says, by label, and are noted."""

    def __init__(self, acts: dict[str, Callable[[], Outcome]]) -> None:
        super().__init__()
        self.acts, self.lines = acts, []
        self.now: set[str] = set()
        self.together: list[set[str]] = []
        self.slots: dict[str, int] = {}

    lines: list[str]

    def say(self, text: str) -> None:
        self.lines.append(text)

    def _start(self, job: Job, slot: int) -> tuple[Connection, Any]:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        self.now.add(job.label)
        self.together.append(set(self.now))
        self.slots[job.label] = slot

        def work() -> None:
            act = self.acts.get(job.label, lambda: Outcome("done", "", 0.01))
            outcome = act()
            time.sleep(0.02)
            self.now.discard(job.label)
            sender.send(outcome)
            sender.close()

        thread = threading.Thread(target=work)
        thread.start()
        return receiver, thread


def fake(label: str, gives: str = "", needs: tuple[str, ...] = ()) -> Job:
    plan: Any = None
    role = "student" if gives else None
    return Job(label, plan, role=role, gives=gives, needs=frozenset(needs))


def test_jobs_wait_for_what_they_need_and_fill_the_slots() -> None:
    jobs = [
        fake("teacher", gives="t"),
        fake("init", gives="i"),
        fake("a", needs=("t",)),
        fake("b", needs=("t", "i")),
        fake("c", needs=("cached",)),
    ]
    slow = {"teacher": lambda: time.sleep(0.3) or Outcome("done", "", 0.3)}  # type: ignore[func-returns-value]
    workers = Pretend(slow)
    workers.run(jobs, 2)
    assert workers._runs == 2  # what records will say was made at a time
    assert all(job.outcome == Outcome("done", "", 0.01) for job in jobs[1:])
    assert workers.together[1] == {"teacher", "init"}, "stages are made at the same time"
    assert {"teacher", "c"} in workers.together, "a run that needs nothing does not wait"
    assert max(map(len, workers.together)) == 2
    assert set(workers.slots.values()) == {0, 1}
    order = [line.split(":")[0] for line in workers.lines if line.endswith("started")]
    assert order.index("a") > order.index("teacher")
    assert order.index("b") > order.index("init")


def test_each_line_says_how_far_all_runs_are_and_how_long_they_will_take() -> None:
    jobs = [fake(name) for name in ("a1", "a2", "a3", "b1", "b2")]
    for job in jobs:
        job.row = job.label[0]
    took = {"a1": 60.0, "a2": 120.0, "a3": 90.0, "b1": 600.0, "b2": 600.0}
    workers = Pretend({name: lambda s=s: Outcome("done", "", s) for name, s in took.items()})  # type: ignore[misc]
    workers.run(jobs, 1)
    ends = [line.partition(" [")[2] for line in workers.lines if " [" in line]
    assert ends == [
        "1/5, about 4 min 0 s to go]",  # nothing is known of b yet: as long as a
        "2/5, about 4 min 30 s to go]",
        "3/5, about 3 min 0 s to go]",
        "4/5, about 10 min 0 s to go]",
        "5/5]",
    ]


def test_one_run_alone_does_not_say_that_it_is_all() -> None:
    workers = Pretend({})
    workers.run([fake("teacher", gives="t"), fake("a", needs=("t",))], 1)
    assert not any("[" in line for line in workers.lines)


def test_a_failed_stage_takes_its_runs_with_it_and_no_other() -> None:
    jobs = [
        fake("teacher", gives="t"),
        fake("more", gives="m", needs=("t",)),
        fake("a", needs=("t", "m")),
        fake("b"),
    ]
    workers = Pretend({"teacher": lambda: Outcome("failed", "no memory", 0.1)})
    workers.run(jobs, 2)
    assert [job.outcome.status for job in jobs if job.outcome] == ["failed", "failed", "failed", "done"]
    assert jobs[2].outcome is not None
    assert "teacher failed: no memory" in jobs[2].outcome.reason
    assert set(workers.slots) == {"teacher", "b"}


# -------------------------------------------------------------------------------------------------- processes
class Dying(Workers):
    """Workers whose children do something else."""

    def _start(self, job: Job, slot: int) -> tuple[Connection, Any]:
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_dies if job.label == "dies" else _lives, args=(sender,))
        process.start()
        sender.close()
        return receiver, process


def _dies(sender: Connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(sender: Connection) -> None:
    sender.send(Outcome("done", "", 0.0))
    sender.close()


def test_a_killed_child_is_a_failed_job_and_the_others_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    jobs = [fake("dies"), fake("lives")]
    Dying().run(jobs, 1)
    assert jobs[0].outcome is not None
    assert jobs[0].outcome.status == "failed"
    assert "SIGKILL" in jobs[0].outcome.reason
    assert jobs[1].outcome == Outcome("done", "", 0.0)
    assert "dies: failed" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_its_parent(tmp_path: Path, sent: signal.Signals) -> None:
    process = begin(tmp_path, "run", "sft", "kd", "--size", "debug", "--seeds", "1,2,3", "--jobs", "2")
    log = tmp_path / "log"
    until(lambda: b"started" in log.read_bytes() or process.poll() is not None, 120, "the first job")
    until(lambda: len(processes_of(tmp_path)) >= 3, 120, "a child")
    process.send_signal(sent)
    code = process.wait(120)
    until(lambda: not processes_of(tmp_path), 60, "the end of all children")
    assert code == (-9 if sent == signal.SIGKILL else 130)
    if sent == signal.SIGINT:
        lines = log.read_text().splitlines()
        assert lines[-1] == "kdbench: stopped; what is done is kept, the same command goes on from there"
        assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    """Two processes make one run; only the first prints."""
    env = environment(KDBENCH_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1")
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = "--dynamo_backend no --main_process_port 0 -m kdbench run gkd --size debug --seeds 1"
    done = subprocess.run(
        [sys.executable, *launch.split(), *command.split()],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("GKD (local)") >= 1
    assert done.stdout.count("Ordered by ROUGE-L") == 1
    assert done.stderr.count("gkd seed 1: done") == 1


# ------------------------------------------------------------------------------------------------------ words
def test_lines_prints_whole_lines_only(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Lines()
    for text in ("\r", "\rsft: 0/4 step in 00:00", "\rsft: 4/4 step in 00:01", "\n", "   ", "\x1b[A"):
        stream.write(text)
    assert capsys.readouterr().err == "sft: 4/4 step in 00:01\n"


def test_jobs_for() -> None:
    assert commands.jobs_for("cuda", 1) == 1
    assert commands.jobs_for("cpu", 1000) == 1
    assert 1 <= commands.jobs_for("cpu", 1) <= 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_told() -> None:
    job = fake("sft seed 1")
    job.outcome = Outcome("diverged", "loss nan", 61)
    assert told(job) == "sft seed 1: diverged in 1 min 1 s: loss nan"
