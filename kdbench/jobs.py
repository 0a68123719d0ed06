"""Several runs in processes: first the stages that they share, then the runs, each in a fresh child.

A child makes one run, so that its peak memory is that run's own; it ends with its parent, however that ended.
A stage that several runs wait for is one job of its own, so that no child waits while another trains.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kdbench import registry
from kdbench.commands import JOBS, TRACKER, label_of, said, silence, with_needs
from kdbench.config import Stage, stage_training
from kdbench.errors import UserError

if TYPE_CHECKING:
    from kdbench.runner import Plan


@dataclass(frozen=True)
class Outcome:
    """What became of a job: done, diverged, failed, or refused (the user can mend it), and why."""

    status: str
    reason: str
    seconds: float


@dataclass
class Job:
    """A whole run, or the first `count` stages of one of its roles.

    `gives` and `needs` are keys of stages and ids of runs.
    """

    label: str
    plan: Plan
    role: str | None = None
    count: int = 0
    steps: int = 0
    row: str = ""
    gives: str = ""
    needs: frozenset[str] = frozenset()
    outcome: Outcome | None = None


def jobs_of(runs: Iterable[Plan]) -> list[Job]:
    """The stages that are not trained yet, longest first, then the runs that are not finished, each after
    those that it needs.
    """
    stages: dict[str, Job] = {}
    whole: list[Job] = []
    for plan in with_needs(runs):
        if plan.complete():
            continue
        needs = []
        for role, spec in plan.run.roles.items():
            keys = plan.materials.stage_keys(role)
            needs += keys
            for number, (key, stage) in enumerate(zip(keys, spec.stages, strict=True), 1):
                if key not in stages and not plan.materials.trained(key):
                    label = f"stage {stage.name}{_axes(plan, stage)} seed {stage.seed}"
                    steps = stage_training(stage).optimizer_steps
                    before = frozenset(keys[: number - 1])
                    stages[key] = Job(label, plan, role, number, steps, gives=key, needs=before)
        steps = plan.run.training.optimizer_steps
        needs += [other.id for other in plan.needs]
        whole.append(
            Job(
                label_of(plan.run), plan, steps=steps, row=plan.run.row, gives=plan.id, needs=frozenset(needs)
            )
        )
    return [*sorted(stages.values(), key=lambda job: -job.steps), *whole]


def _axes(plan: Plan, stage: Stage) -> str:
    """What a stage on the run's own task says of that task."""
    return f" ({said(plan.run.axes)})" if plan.run.axes and stage.task is None else ""


def preload() -> list[str]:
    """The modules that runs import, for the process that children are forked from."""
    names = ["kdbench.runner", "pyarrow.parquet", "pandas"]
    names += [f"transformers.models.{one}.modeling_{one}" for one in ("gpt2", "bert", "roberta")]
    names += [f"analyses.{name}" for name in registry.names("analyses")]
    return [name for name in names if importlib.util.find_spec(name) is not None]


def start(live: bool) -> Workers | None:
    """Workers that can make runs; None where `accelerate launch` started several processes for each."""
    return Workers(live) if int(os.environ.get("WORLD_SIZE", "1")) == 1 else None


def make(jobs: Sequence[Job], workers: Workers | None, count: int, say: Callable[[str], None]) -> None:
    """Make the jobs, `count` at a time, and put the outcome into each.

    Without workers they are made in this process, one after the other.
    """
    if workers is not None:
        workers.run(jobs, count)
        return
    failed: dict[str, Job] = {}
    for job in jobs:
        if job.role is None:
            say(f"{job.label}: started")
            job.outcome = _broken(job, failed) or _make(job)
            if job.outcome.status != "done":
                failed[job.gives] = job
            say(told(job))


def _broken(job: Job, failed: Mapping[str, Job]) -> Outcome | None:
    """The outcome of a job that needs one which failed; None where it needs none such."""
    for key in sorted(job.needs & failed.keys()):
        other = failed[key]
        assert other.outcome is not None
        why = f"{other.label} {other.outcome.status}: {other.outcome.reason}"
        return Outcome(other.outcome.status, why, 0.0)
    return None


# ---------------------------------------------------------------------------------------------------- one job
def _make(job: Job) -> Outcome:
    start = time.monotonic()
    try:
        if job.role is not None:
            import torch

            torch.set_num_threads(job.plan.run.threads)
            job.plan.materials.model(job.role, job.count)
            status, reason = "done", ""
        else:
            record = job.plan.execute()
            status, reason = record.status, record.reason
    except UserError as error:
        status, reason = "refused", str(error)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        status, reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())} ({place})"
    return Outcome(status, reason, time.monotonic() - start)


def told(job: Job) -> str:
    """One line on how a job ended."""
    assert job.outcome is not None
    reason = f": {job.outcome.reason}" if job.outcome.reason else ""
    return f"{job.label}: {job.outcome.status} in {duration(job.outcome.seconds)}{reason}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: `35 s`, `4 min 10 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# ------------------------------------------------------------------------------------------------ in children
@dataclass
class Workers:
    """Children that make jobs, forked from one process that has torch loaded already."""

    live: bool = False  # progress bars that move, for a terminal; else a line now and then
    _context: Any = field(init=False)
    _lock: Any = field(init=False)
    _runs: int = field(init=False, default=1)  # at a time, at most

    def __post_init__(self) -> None:
        forking = "forkserver" in multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context("forkserver" if forking else "spawn")
        if forking:
            self._start_server()
        self._lock = self._context.RLock()

    def _start_server(self) -> None:
        """Start the process to fork from; it imports torch while this process does the same."""
        from multiprocessing import forkserver

        self._context.set_forkserver_preload(preload())
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process alone
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)

    def say(self, text: str) -> None:
        """Print a line above the children's bars."""
        with self._lock:
            clear = "\r\x1b[J" if self.live else ""
            sys.stderr.write(f"{clear}{text}\n")
            sys.stderr.flush()

    def run(self, jobs: Sequence[Job], count: int) -> None:
        """Make the jobs, `count` at a time, as soon as what they need is there; note what became of each."""
        waiting = list(jobs)
        made = [job.gives for job in jobs if job.gives]
        missing = set(made)
        self._runs = max(1, min(count, sum(job.role is None for job in jobs)))
        running: dict[Connection, tuple[Job, Any, int, float]] = {}
        failed: dict[str, Job] = {}
        whole = _Whole(jobs, count, self.live, self._lock)
        try:
            while waiting or running:
                for job in list(waiting):
                    if (broken := _broken(job, failed)) is not None:
                        waiting.remove(job)
                        self._ended(job, broken, missing, failed, whole)
                    elif len(running) < count and not job.needs & missing:
                        waiting.remove(job)
                        taken = {slot for _, _, slot, _ in running.values()}
                        slot = next(i for i in range(count) if i not in taken)
                        with _uninterrupted():  # a child that is not in the list would not be ended
                            receiver, process = self._start(job, slot)
                            running[receiver] = (job, process, slot, time.monotonic())
                        self.say(f"{job.label}: started")
                ready = wait(list(running)) if running else []
                for receiver in [one for one in running if one in ready]:
                    job, process, _, since = running.pop(receiver)
                    try:
                        outcome: Outcome = receiver.recv()
                    except EOFError:
                        process.join()
                        outcome = Outcome("failed", _death(process.exitcode), time.monotonic() - since)
                    receiver.close()
                    process.join()
                    self._ended(job, outcome, missing, failed, whole)
        finally:
            whole.close()
            for _, process, _, _ in running.values():
                process.kill()
            for _, process, _, _ in running.values():
                process.join()

    def _ended(
        self, job: Job, outcome: Outcome, missing: set[str], failed: dict[str, Job], whole: _Whole
    ) -> None:
        job.outcome = outcome
        if job.gives:
            missing.discard(job.gives)
            if outcome.status != "done":
                failed[job.gives] = job
        self.say(told(job) + whole.ended(job))

    def _start(self, job: Job, slot: int) -> tuple[Connection, Any]:
        receiver, sender = self._context.Pipe(duplex=False)
        places = job.plan.places
        fresh = type(places)(places.runs, places.cache, places.data_root, places.progress)
        told = (job.plan.run, fresh, job.label, job.role, job.count, os.environ.get(TRACKER, ""))
        args = (sender, (*told, str(self._runs)), slot if self.live else None, self._lock)
        process = self._context.Process(target=_child, args=args, name=job.label)
        process.start()
        sender.close()
        return receiver, process


class _Whole:
    """How far all jobs are: one bar beneath those of the children, or a word on each line; with the time to
    go.
    """

    def __init__(self, jobs: Sequence[Job], count: int, live: bool, lock: Any) -> None:
        self._jobs = [job for job in jobs if job.role is None]
        self._count, self._bar = max(1, count), cast(Any, None)
        if live and len(self._jobs) > 1:
            from tqdm import tqdm

            tqdm.set_lock(lock)
            form = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
            self._bar = tqdm(
                total=len(self._jobs), desc="all runs", position=count, leave=False, bar_format=form,
                dynamic_ncols=True,
            )  # fmt: skip

    def ended(self, job: Job) -> str:
        """Count a job that has its outcome; return what its line says of all of them."""
        if job.role is not None or len(self._jobs) < 2:
            return ""
        done = sum(one.outcome is not None for one in self._jobs)
        left = self.left()
        told = f"about {duration(left)} to go" if left else ""
        if self._bar is not None:
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update()
            return ""
        return f" [{done}/{len(self._jobs)}{', ' * bool(told)}{told}]"

    def left(self) -> float:
        """Seconds to go: of each row what its finished runs took on average, else what all took."""
        spent: dict[str, list[float]] = {}
        for job in self._jobs:
            if job.outcome is not None and job.outcome.status == "done":
                spent.setdefault(job.row, []).append(job.outcome.seconds)
        if not spent:
            return 0.0
        every = [seconds for mine in spent.values() for seconds in mine]
        left = [spent.get(job.row, every) for job in self._jobs if job.outcome is None]
        return sum(sum(one) / len(one) for one in left) / self._count

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C to the end of the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"its process ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"its process was killed ({name})" + ("; was memory short?" if name == "SIGKILL" else "")


def _child(sender: Connection, told: tuple[Any, ...], slot: int | None, lock: Any) -> None:
    """One job in a fresh process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process when it is told to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run, places, label, role, count, os.environ[TRACKER], os.environ[JOBS] = told
    silence()
    _bars(label, slot, lock)
    from kdbench.runner import Plan

    try:
        outcome = _make(Job(label, Plan(run, places), role, count))
    except UserError as error:
        outcome = Outcome("refused", str(error), 0.0)
    sender.send(outcome)
    sender.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Lines:
    """A text stream for tqdm that prints whole lines only, for logs and pipes."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        """Print what is neither empty nor a bar that has not begun."""
        text = text.replace("\x1b[A", "").strip("\r\n ")
        if text and ": 0/" not in text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        """Flush the stream beneath."""
        sys.stderr.flush()


def _bars(label: str, slot: int | None, lock: Any) -> None:
    """Make every progress bar of this process say whose it is, and keep to its line of the terminal."""
    from tqdm import tqdm

    tqdm.set_lock(lock)
    first = tqdm.__init__
    fixed: dict[str, Any]
    if slot is None:
        short = "{desc}: {n_fmt}/{total_fmt} {unit} in {elapsed}, {remaining} to go"
        fixed = {"file": Lines(), "mininterval": 30, "maxinterval": 60, "bar_format": short}
    else:
        fixed = {"position": slot, "leave": False, "dynamic_ncols": True, "mininterval": 0.5}

    @functools.wraps(first)
    def init(self: Any, *args: Any, **named: Any) -> None:
        desc = str(named.get("desc") or "")
        desc = desc if desc.startswith(label) else f"{label} · {desc}"
        first(self, *args, **{**named, **fixed, "desc": desc})

    tqdm.__init__ = init  # type: ignore[method-assign]
