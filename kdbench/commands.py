"""What commands do around runs: which runs, what they cost, learning rates, finding a run again."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from kdbench import board as boards
from kdbench import config, registry
from kdbench.config import Board, RunConfig, resolve
from kdbench.errors import Missing, UserError, unknown
from kdbench.record import Analysis, RecordError, RunFolder, RunRecord, load, write_json
from kdbench.strict import to_dict

if TYPE_CHECKING:
    from kdbench.intervals import Estimate
    from kdbench.jobs import Job
    from kdbench.runner import Plan
    from kdbench.stages import Places

T = TypeVar("T")
TRACKERS = ("tensorboard", "wandb")
MANY = 50  # runs that take a while to plan
TRACKER = "KDBENCH_TRACKER"  # the variable that a run reads it from
JOBS = "KDBENCH_JOBS"  # the variable that a run reads from how many were made at a time


# ------------------------------------------------------------------------------------------------ what to run
def quiet(threads: int) -> None:
    """Set what libraries read when they are imported: threads, and no chatter of their own."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask for a GPU must not spoil a fork


def silence() -> None:
    """Switch off the progress bars of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def rows_of(board: Board, methods: Sequence[str]) -> list[str]:
    """The rows that a command names: for none or `all` the board's, else its reference rows and these."""
    if not methods or "all" in methods:
        named = [row.name for row in board.rows]
    else:
        named = [row.name for row in board.rows if row.reference]
    return list(dict.fromkeys([*named, *(name for name in methods if name != "all")]))


def narrowed(
    items: Sequence[T], axes_of: Callable[[T], Mapping[str, Any]], given: Sequence[str], where: str = ""
) -> list[T]:
    """Those of the items whose axis values `--axis` names, as in `dataset=sst2,mr`; an axis that it does not
    name is left as it is.

    Raises: UserError for an axis or a value that no item has, with the nearest, and where nothing is left.
    """
    place, kept = f"{where}: --axis" if where else "--axis", list(items)
    for axis, texts in _asked(given).items():
        known = dict.fromkeys(_text(axes_of(one)[axis]) for one in items if axis in axes_of(one))
        if not known:
            raise unknown("axis", axis, dict.fromkeys(name for one in items for name in axes_of(one)), place)
        values = [part for text in texts for part in ([text] if text in known else text.split(","))]
        for value in values:
            if value not in known:
                raise unknown(f"value of {axis}", value, known, place)
        kept = [one for one in kept if axis in axes_of(one) and _text(axes_of(one)[axis]) in values]
    if items and not kept:
        raise UserError(f"{place} {' '.join(given)}: nothing has all of these values")
    return kept


def _asked(given: Sequence[str]) -> dict[str, list[str]]:
    """The texts of `--axis` by axis."""
    found: dict[str, list[str]] = {}
    for text in given:
        axis, equals, value = text.partition("=")
        if not (equals and axis.strip() and value.strip()):
            raise UserError(f"--axis {text}: write it as axis=value, for example dataset=sst2,mr")
        found.setdefault(axis.strip(), []).append(value.strip())
    return found


def _text(value: object) -> str:
    """An axis value as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def said(axes: Mapping[str, Any]) -> str:
    """Axis values in words: `dataset sst2, k 16`."""
    return ", ".join(f"{axis} {_text(value)}" for axis, value in axes.items())


def device_of(name: str) -> str:
    """`cpu` or `cuda`; `auto` is the GPU where there is one. Raises: UserError where there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"), "--device")
    if name == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise UserError("--device cuda: this machine has no CUDA device that torch can use")
    return "cpu"


def jobs_for(device: str, threads: int) -> int:
    """How many runs at the same time a machine takes well: its cores, four at most, or one GPU."""
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores // threads))


def plans(
    board: Board,
    size: str,
    rows: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str],
    device: str,
    places: Places,
    axis: Sequence[str] = (),
) -> list[Plan]:
    """Check every run; return them in order of seed, axis values and row, each after the runs of other rows
    that its roles name.

    On a board with axes, runs whose data is not there are left out and said, so long as any remain.

    Args: `axis`: as in `narrowed`; it narrows the rows that are named, not what they need.

    Raises: UserError for the first that cannot be made.
    """
    silence()
    chosen = chosen_axes(board, size, rows, axis)
    wanted = [
        (seed, values, name)
        for seed in seeds
        for values in _distinct(one for name in rows for one in chosen[name])
        for name in rows
        if values in chosen[name]
    ]
    if places.progress and len(wanted) > MANY:
        print(f"planning {len(wanted)} runs", file=sys.stderr, flush=True)
    planner, missing = Planner(board, size, overrides, rows, device, places), dict[str, int]()
    made: list[Plan] = []
    for seed, values, name in wanted:
        try:
            made.append(planner.plan(name, seed, values))
        except Missing as error:
            if not board.axes:
                raise
            missing[str(error)] = missing.get(str(error), 0) + 1
    if missing and not made:
        raise Missing(next(iter(missing)))
    for reason, count in missing.items():
        print(f"left out: {count} run{'s' * (count > 1)}: {reason}", file=sys.stderr, flush=True)
    planner.check_overrides()
    return list(with_needs(made))


def with_needs(plans: Iterable[Plan]) -> Iterator[Plan]:
    """The plans, each once and after those that it needs."""
    seen: set[str] = set()

    def all_of(plan: Plan) -> Iterator[Plan]:
        if plan.id not in seen:
            seen.add(plan.id)
            for other in plan.needs:
                yield from all_of(other)
            yield plan

    for plan in plans:
        yield from all_of(plan)


def chosen_axes(
    board: Board, size: str, rows: Sequence[str], axis: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """The combinations of axis values of each row that `--axis` leaves; it narrows a row in the axes that the
    row has.

    Raises: UserError for an axis or value that no row has.
    """
    own = {name: board.row_axis_values(name, size) for name in rows}
    where = f"{board.id}, size {size}"
    every = _distinct(one for values in own.values() for one in values)
    kept = {}
    for name in _asked(axis):
        given = [text for text in axis if text.partition("=")[0].strip() == name]
        kept[name] = {_text(one[name]) for one in narrowed(every, lambda one: one, given, where)}
    found = {
        row: [one for one in values if all(_text(one[name]) in kept[name] for name in one if name in kept)]
        for row, values in own.items()
    }
    if axis and not any(found.values()):
        raise UserError(f"{where}: --axis {' '.join(axis)}: nothing has all of these values")
    return found


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(one, sort_keys=True): one for one in values}.values())


class Planner:
    """Plans runs, with the runs of other rows that their roles name."""

    def __init__(
        self,
        board: Board,
        size: str,
        overrides: Sequence[str],
        among: Sequence[str],
        device: str,
        places: Places,
    ) -> None:
        self.board, self.size, self.overrides = board, size, list(overrides)
        self.among = [*among, *config.linked_rows(board, size)]
        self.device, self.places = device, places
        self._made: dict[str, Plan] = {}
        self._failed: dict[str, Missing] = {}
        self._named = {"method"}  # rows and methods that a run was to be of
        self._tasks: dict[str, type[Any]] = {}

    def plan(self, name: str, seed: int, axes: Mapping[str, Any], before: tuple[str, ...] = ()) -> Plan:
        """Plan a run of a row. A run that another row's role names takes those overrides only that name its
        row or method, or the task.

        Raises: UserError where it cannot be made; Missing where its data, or those of what it needs, lack.
        """
        told = self._overrides(name) if before else self.overrides
        key = json.dumps([name, seed, dict(axes), told], sort_keys=True)
        if key in self._failed:
            raise self._failed[key]
        if key not in self._made:
            try:
                self._made[key] = self._plan(name, seed, axes, told, before)
            except Missing as error:
                self._failed[key] = error
                raise
        return self._made[key]

    def _overrides(self, name: str) -> list[str]:
        """The overrides that a run takes which another row's role names."""
        row = self.board.row(name)
        assert row is not None
        own = {"task", name, registry.stem(row.method)}
        return [one for one in self.overrides if config.parse_override(one).section in own]

    def check_overrides(self) -> None:
        """Raises: UserError for an override of a row or method that none of the runs was to be of."""
        for text in self.overrides:
            section = config.parse_override(text).section
            if section not in self._named and section not in config._SECTIONS:
                raise UserError(f"--set {text}: no run of '{section}' is asked for, nor needed")

    def _plan(
        self, name: str, seed: int, axes: Mapping[str, Any], overrides: Sequence[str], before: tuple[str, ...]
    ) -> Plan:
        from kdbench.runner import Plan, needed

        run = _run(
            self.board, self.size, name, seed, overrides, dict(axes), self.among, self.device, self._tasks
        )
        self._named |= {run.row.partition("[")[0], registry.stem(run.method)}
        run, needs = self.linked(needed(run), before)
        return Plan(run, self.places, needs)

    def linked(self, run: RunConfig, before: tuple[str, ...] = ()) -> tuple[RunConfig, list[Plan]]:
        """The run with the ids of those that its roles name, and their plans. Where settings of these were
        changed, its name says so too: it is no run of the board's row.

        Raises: UserError for rows that need each other, or an axis whose value is not known.
        """
        roles: dict[str, config.Role] = dict(run.roles)
        needs: list[Plan] = []
        line = run.row.partition("[")[0]  # without what was changed
        for name, role in run.roles.items():
            if role.row is None:
                continue
            where = f"{self.board.id}: row '{line}': roles.{name}"
            if name == "student":
                raise UserError(f"{where}: a student has a model of its own, not another row's")
            if role.row in (*before, line):
                raise UserError(f"{where}: rows need each other: {' -> '.join([*before, line, role.row])}")
            found = [
                self.plan(role.row, run.seed, values, (*before, line))
                for values in self._values(role, run, where)
            ]
            if len({plan.id for plan in found}) < len(found):
                raise UserError(
                    f"{where}: each = '{role.each}' stands for one run of '{role.row}' more than once: say at"
                )
            needs += found
            roles[name] = dataclasses.replace(role, runs=[plan.id for plan in found])
        if changed := dict.fromkeys(plan.run.row for plan in needs if "[" in plan.run.row):
            told = ", ".join(changed)
            run = dataclasses.replace(run, row=f"{run.row}[{told}]", title=f"{run.title} [{told}]")
        return dataclasses.replace(run, roles=roles), needs

    def _values(self, role: config.Role, run: RunConfig, where: str) -> list[dict[str, Any]]:
        """The axis values of the runs that a role stands for."""
        assert role.row is not None
        row = self.board.row(role.row)
        assert row is not None
        known = self.board.axes if row.axes is None else row.axes
        drawn: list[dict[str, Any]] = [{}]
        for axis in role.at:
            if axis not in known:
                raise unknown("axis", axis, known, f"{where}: at: row '{role.row}'")
        if "{" in str(role.without):
            raise UserError(f"{where}: without = '{role.without}': the row has no such axis")
        if role.each is not None:
            values = {**self.board.axes, **self.board.sizes[self.size].axes}[role.each]
            drawn = [{role.each: one} for one in values if one != role.without]
            if not drawn:
                raise UserError(f"{where}: no value of {role.each} is left")
        found = []
        for one in drawn:
            told = {**run.axes, **one}
            told |= {axis: config.filled(value, one) for axis, value in role.at.items()}
            for axis, value in told.items():
                if "{" in str(value):
                    raise UserError(f"{where}: at.{axis} = '{value}': the row has no such axis")
            lacking = [axis for axis in known if axis not in told]
            if lacking:
                raise UserError(
                    f"{where}: does not say which {lacking[0]} of the row '{role.row}'; set at.{lacking[0]}"
                )
            found.append({axis: told[axis] for axis in known})
        return found


def _run(
    board: Board,
    size: str,
    name: str,
    seed: int,
    overrides: Sequence[str],
    axes: dict[str, Any],
    among: Sequence[str],
    device: str,
    tasks: dict[str, type[Any]],
) -> RunConfig:
    """A run with its method's and task's settings completed by their defaults.

    Args: `tasks`: the settings of the tasks seen before, by axis values.
    """
    row = board.row(name)
    method = registry.load_distiller(row.method if row else name).Config
    at = json.dumps(axes)
    if at not in tasks:
        plain = resolve(board, size, name, seed, overrides, axes=axes, among=among, device=device)
        tasks[at] = registry.load_task(plain.task).Settings
    return resolve(
        board,
        size,
        name,
        seed,
        overrides,
        axes=axes,
        among=among,
        device=device,
        settings_class=method,
        task_settings_class=tasks[at],
    )


def to_profile(
    board: Board,
    size: str,
    methods: Sequence[str],
    overrides: Sequence[str],
    device: str,
    axes: Mapping[str, dict[str, Any]],
    named: bool = True,
) -> list[RunConfig]:
    """The runs of these rows, methods or files whose steps are measured: of the first seed, at these axis
    values of each or its first ones, with the roles that each method asks for. A row whose roles other rows'
    runs fill is left out and said, or refused where it was `named`.

    Raises: UserError for the first that cannot be made.
    """
    from kdbench.stages import needed_roles

    runs, tasks = [], dict[str, type[Any]]()
    for name in methods:
        values = axes[name] if name in axes else board.row_axis_values(name, size)[0]
        run = _run(board, size, name, board.seeds[0], overrides, dict(values), methods, device, tasks)
        if not run.training.optimizer_steps:
            raise UserError(f"{name}: takes no step on {board.id}, there is nothing to measure")
        run = config.keep_roles(run, needed_roles(registry.load_distiller(run.method)))
        if linked := [f"{role} ({spec.row})" for role, spec in run.roles.items() if spec.row]:
            told = f"{name}: takes models of other rows' runs, which are not made here: {', '.join(linked)}"
            if named:
                raise UserError(told)
            print(f"left out: {told}", file=sys.stderr, flush=True)
            continue
        runs.append(run)
    if not runs:
        raise UserError(
            f"{board.id}: every row takes models of other rows' runs; there is nothing to measure"
        )
    return runs


def label_of(run: RunConfig) -> str:
    """A run's name among those of one command: its row, axis values and seed."""
    return f"{run.row} ({said(run.axes)}) seed {run.seed}" if run.axes else f"{run.row} seed {run.seed}"


def check_track(name: str | None) -> None:
    """Let runs log to this tracker too. Raises: UserError for one that is unknown or not installed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS, "--track")
    from kdbench.runner import check_tracker

    check_tracker(name)
    os.environ[TRACKER] = name


# ------------------------------------------------------------------------------------------ what it will cost
@dataclass(frozen=True)
class Forecast:
    """One line of a dry run; None is unknown. `bytes` are kept, `training_bytes` are gone afterwards."""

    label: str
    id: str
    steps: int
    state: str
    bytes: int | None = None
    training_bytes: int | None = None
    seconds: float | None = None


def forecast(
    board: Board, size: str, plans: Sequence[Plan], jobs: Sequence[Job], runs: Path
) -> list[Forecast]:
    """What each stage and run would take, from published and local records of the same row and size: those of
    the same axis values where there are some.
    """
    paths = [*boards.published_records(board), *boards.local_records(board, runs)]
    entries, _ = boards.read_entries(paths, local=True)
    past = _Past([entry for entry in entries if entry.record.size == size and entry.record.status == "done"])
    models: dict[str, int | None] = {}
    answers: dict[str, int] = {}
    lines = []

    def model_bytes(plan: Plan, role: str) -> int | None:
        spec = dataclasses.replace(plan.run.roles[role], seed=None, stages=[])
        key = json.dumps([role, to_dict(spec), plan.run.method, plan.run.task, plan.run.task_settings])
        if key not in models:
            models[key] = _model_bytes(plan, role)
        return models[key]

    def answer_count(plan: Plan) -> int:
        run = plan.run
        key = json.dumps(
            [run.task, run.task_settings, to_dict(run.evaluation), to_dict(run.roles["student"])]
        )
        if key not in answers:
            answers[key] = _answers(plan)
        return answers[key]

    for job in jobs:
        if job.role is not None:
            spec = job.plan.run.roles[job.role]
            size_bytes = model_bytes(job.plan, job.role)
            more = None if size_bytes is None else 6 * size_bytes
            seconds = past.stage_seconds(spec.stages[job.count - 1].name, job.plan.run.axes)
            lines.append(Forecast(job.label, job.gives, job.steps, "to train", size_bytes, more, seconds))
    for plan in plans:
        run, label = plan.run, label_of(plan.run)
        steps = run.training.optimizer_steps
        if plan.complete():
            lines.append(Forecast(label, plan.id, steps, "finished"))
            continue
        seconds, known = past.run(run)
        model = model_bytes(plan, "student")
        if known is None and model is not None:
            known = model + 1000 * answer_count(plan)
        more = 6 * model if model is not None and steps else 0 if model is not None else None
        state = "to go on" if (plan.folder / "checkpoint").is_dir() else "to run"
        lines.append(Forecast(label, plan.id, steps, state, known, more, seconds))
    return lines


class _Past:
    """What finished runs took."""

    def __init__(self, done: Sequence[boards.Entry]) -> None:
        self._rows: dict[tuple[str, str], list[boards.Entry]] = {}
        self._stages: dict[tuple[str, str], float] = {}
        self._bytes: dict[Path, int] = {}
        for entry in done:
            record = entry.record
            for axes in (json.dumps(record.axes, sort_keys=True), ""):
                self._rows.setdefault((record.row, axes), []).append(entry)
                for name, value in record.budget.items():
                    if name.startswith("stage_seconds."):
                        self._stages[name.removeprefix("stage_seconds."), axes] = value

    def stage_seconds(self, name: str, axes: Mapping[str, Any]) -> float | None:
        """Seconds of the stage of that name, at these axis values where it is known there."""
        other = self._stages.get((name, ""))
        return self._stages.get((name, json.dumps(dict(axes), sort_keys=True)), other)

    def run(self, run: RunConfig) -> tuple[float | None, int | None]:
        """(mean seconds, the most bytes of a folder) of runs of the same row, at the same axis values where
        there are some; None where there are none.
        """
        key = (run.row, json.dumps(dict(run.axes), sort_keys=True))
        like = self._rows.get(key) or self._rows.get((run.row, "")) or []
        times = [sum(phase.seconds for phase in entry.record.phases.values()) for entry in like]
        folders = [entry.path.parent for entry in like if entry.path.name == "record.json"]
        for folder in folders:
            if folder not in self._bytes:
                self._bytes[folder] = _folder_bytes(folder)
        kept = [self._bytes[folder] for folder in folders]
        return sum(times) / len(times) if times else None, max(kept) if kept else None


def _answers(plan: Plan) -> int:
    """How many responses the run's evaluation writes."""
    evaluation, task = plan.run.evaluation, plan.materials.task()
    splits = [split for split in task.splits() if split.startswith("test/")]
    if evaluation.sets != "all":
        splits = [f"test/{name}" for name in evaluation.sets]
    encoder = plan.materials.encoders(task)["student"]
    rows = [len(task.rows(split, encoder)) for split in splits]
    limit = evaluation.limit
    return len(evaluation.generation_seeds) * sum(min(n, limit) if limit else n for n in rows)


def _model_bytes(plan: Plan, role: str) -> int | None:
    """The size of a role's weights in float32, from its configuration; None where that cannot be read."""
    import torch

    from kdbench import models

    spec = plan.run.roles[role]
    try:
        head = plan.materials.first_head(role)
        described = models.load_config(spec, plan.materials.tokenizer(role), plan.places.runs, head)
        with torch.device("meta"):
            return 4 * int(models.HEADS[head].auto.from_config(described).num_parameters())
    except (UserError, ValueError):
        return None


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------------------------- learning rates
def trials(board: Board, device: str, places: Places) -> dict[str, list[Plan]]:
    """The learning-rate trials of every trained row, on the tuning seed and at every axis value of the tuning
    size, each scored on dev alone: the last weights or, on a board that keeps the best, the best ones.

    They lie in `<runs>/tuning`, where no report looks; the board must have [tuning].
    """
    from kdbench.runner import Plan, needed

    silence()
    assert board.tuning is not None
    tuning, untuned = board.tuning, dataclasses.replace(board, tuned={})
    apart = dataclasses.replace(places, runs=places.runs / "tuning")
    names = [row.name for row in board.rows if not row.reference]
    found: dict[str, list[Plan]] = {}
    tasks: dict[str, type[Any]] = {}
    planner = Planner(untuned, tuning.size, [], names, device, apart)
    for name in names:
        for overrides in config.tuning_runs(board, name):
            for axes in _tuned_at(board, name):
                run = _run(untuned, tuning.size, name, tuning.seed, overrides, axes, names, device, tasks)
                run, needs = planner.linked(needed(run))
                found.setdefault(name, []).append(Plan(_trial(run, tuning, apart), apart, needs))
    return found


def _tuned_at(board: Board, name: str) -> list[dict[str, Any]]:
    """The axis values that a row's trials are made at."""
    assert board.tuning is not None
    asked = board.tuning.axes
    found = [
        values
        for values in board.row_axis_values(name, board.tuning.size)
        if all(values[axis] in asked[axis] for axis in values if axis in asked)
    ]
    if not found:
        raise UserError(f"{board.id}: tuning.axes leaves the row '{name}' no combination of axis values")
    return found


def _trial(run: RunConfig, tuning: config.Tuning, places: Places) -> RunConfig:
    """The run with as little evaluation as there can be, scored on dev as its board would keep it."""
    from kdbench.runner import Plan

    splits = Plan(run, places).materials.task().splits()
    first = next(split for split in splits if split.startswith("test/"))
    seeds = run.evaluation.generation_seeds[:1]
    evaluation = dataclasses.replace(
        run.evaluation, sets=[first.removeprefix("test/")], generation_seeds=seeds
    )
    every = run.select.every if run.select.rule == "best" else run.training.optimizer_steps
    select = config.Select(run.select.rule, tuning.score, tuning.direction, every)
    scoring = [one for one in run.analyses if hasattr(registry.load_analysis(one), "dev_scores")]
    return dataclasses.replace(run, evaluation=evaluation, select=select, analyses=scoring, evidence=None)


def write_tuning(board: Board, plans: dict[str, list[Plan]]) -> Path:
    """Write `tuning.json` beside the board: the best learning rate of each row, and all trials.

    A trial's score is the mean over axis values, None where one of them has none; of equal scores the
    smallest learning rate is chosen.

    Raises: UserError where every trial of a row failed, and where the board's folder cannot be written.
    """
    assert board.tuning is not None
    assert board.folder is not None
    sign = 1 if board.tuning.direction == "higher" else -1
    rows = {}
    for name, row_plans in plans.items():
        by_rate: dict[float, list[Plan]] = {}
        for plan in row_plans:
            by_rate.setdefault(plan.run.training.lr, []).append(plan)
        tried = []
        for lr, some in by_rate.items():
            records = [plan.finished() for plan in some]
            done = [one for one in records if one is not None and one.status == "done"]
            scores = [one.value(f"dev/{board.tuning.score}") for one in done]
            known = [score for score in scores if score is not None]
            score = sum(known) / len(known) if len(known) == len(some) else None
            tried.append(config.Trial(lr, score, " ".join(plan.id for plan in some)))
        scored = [(-sign * one.score, one.lr) for one in tried if one.score is not None]
        if not scored:
            raise UserError(f"{board.id}: every trial of row '{name}' failed; tuning.json is left as it was")
        rows[name] = config.Tuned(min(scored)[1], tried)
    path = board.folder / "tuning.json"
    try:
        write_json(path, {"rows": to_dict(rows)})
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return path


# ---------------------------------------------------------------------------------------------- more evidence
def check_evidence(profiles: Sequence[str], interventions: Sequence[str]) -> None:
    """Refuse unknown names of decoding profiles and interventions. Raises: UserError with the nearest."""
    from kdbench.config import PROFILES
    from kdbench.counterfactuals import NAMES

    for name in profiles:
        if name not in PROFILES:
            raise unknown("decoding profile", name, PROFILES, "--profile")
    for name in interventions:
        if name not in ("all", *NAMES):
            raise unknown("intervention", name, ("all", *NAMES), "--intervention")


def collect(
    folder: RunFolder, places: Places, profiles: Sequence[str], interventions: Sequence[str]
) -> list[Path]:
    """Collect evidence of a finished run in these profiles, try these interventions; return the files.

    Raises: UserError for a run whose models cannot be had.
    """
    import torch

    from kdbench.counterfactuals import NAMES
    from kdbench.run_evidence import of_finished

    silence()
    torch.set_num_threads(int(folder.config.get("threads", 1)))
    with FileLock(f"{folder.path}.lock"):  # not beside a run of the same id
        evidence, student, teacher = of_finished(folder, places)
        paths = [evidence.make(student, teacher, profile=name) for name in profiles]
        chosen = NAMES if "all" in interventions else [n for n in NAMES if n in interventions]
        return paths + (evidence.intervene(student, teacher, chosen) if chosen else [])


# -------------------------------------------------------------------------------------------- finding one run
def _finished(runs: Path, wanted: Callable[[RunRecord], bool], board: str = "*/*") -> list[RunFolder]:
    """The finished runs that are wanted, of each row, axis value and seed the one begun last."""
    found: dict[tuple[str, str, str, str, int], tuple[float, RunFolder]] = {}
    for path in sorted(runs.glob(f"{board}/*/record.json")):
        with suppress(RecordError):
            record, folder = load(path), RunFolder(path.parent)
            if record.status == "done" and wanted(record):
                axes = json.dumps(record.axes, sort_keys=True)
                key = (record.board, record.size, record.row, axes, record.seed)
                found[key] = max(
                    found.get(key, (0.0, folder)), (folder.begun, folder), key=lambda one: one[0]
                )
    return [found[key][1] for key in sorted(found)]


def _narrowed_runs(found: Sequence[RunFolder], axes: Sequence[str], where: str) -> list[RunFolder]:
    if not axes:
        return list(found)
    read = [(one, one.record) for one in found]
    return [one for one, _ in narrowed(read, lambda pair: pair[1].axes, axes, where)]


def runs_of(name: str, board: Board, size: str, runs: Path, axes: Sequence[str] = ()) -> list[RunFolder]:
    """The finished runs of a row of a board in one size, one per training seed and axis values; or the run
    with this id or folder. `axes` as in `narrowed`.

    Raises: UserError where there is none.
    """
    found = _finished(runs, lambda one: (one.board, one.size, one.row) == (board.id, size, name), board.id)
    if found:
        return _narrowed_runs(found, axes, name)
    one = find_run(name, runs, axes)
    if one.record.row == name:
        raise UserError(f"{board.id}: no finished run of row '{name}' in size '{size}' in the folder {runs}")
    return [one]


@dataclass(frozen=True)
class Pair:
    """Both methods' runs at the same axis values and of the same training seeds."""

    axes: dict[str, Any]
    one: list[RunFolder]
    other: list[RunFolder]

    @property
    def runs(self) -> list[RunFolder]:
        """All of them."""
        return [*self.one, *self.other]

    @property
    def seeds(self) -> str:
        """The training seeds in words."""
        first, second = (", ".join(str(run.record.seed) for run in side) for side in (self.one, self.other))
        return f"seeds {first}" if first == second else f"seed {first} and seed {second}"


def pairs(one: Sequence[RunFolder], other: Sequence[RunFolder]) -> tuple[list[Pair], list[str]]:
    """(both methods' runs for each combination of axis values, of the training seeds that both have there;
    what is left out for lack of a counterpart). Two single runs are taken as they are. Of a row without one
    of the axes the same runs stand beside the other row's at each value of it.

    Raises: UserError where they have no axis values and training seed in common.
    """
    if len(one) == len(other) == 1:
        axes = one[0].record.axes
        return [Pair(axes if axes == other[0].record.axes else {}, list(one), list(other))], []
    sides: list[dict[str, dict[int, RunFolder]]] = [{}, {}]
    values: dict[str, dict[str, Any]] = {}
    for side, runs in zip(sides, (one, other), strict=True):
        for run in runs:
            record = run.record
            key = json.dumps(record.axes, sort_keys=True)
            values[key] = record.axes
            side.setdefault(key, {})[record.seed] = run
    found, left = [], []
    most = max(map(len, values.values()))
    for axes in [one for one in values.values() if len(one) == most]:
        mine, theirs = (_at(axes, side, values) for side in sides)
        seeds = sorted(mine.keys() & theirs.keys())
        if seeds:
            found.append(Pair(axes, [mine[seed] for seed in seeds], [theirs[seed] for seed in seeds]))
        else:
            of = " and ".join(", ".join(map(str, sorted(side))) or "none" for side in (mine, theirs))
            left.append(f"{said(axes)}: seeds {of}" if axes else of)
    if not found:
        what = "axis values and training seed" if any(values.values()) else "training seed"
        raise UserError(f"a comparison needs runs of the same {what}, here are {'; '.join(left)}")
    return found, left


def _at(
    axes: Mapping[str, Any], side: Mapping[str, dict[int, RunFolder]], values: Mapping[str, Mapping[str, Any]]
) -> dict[int, RunFolder]:
    """A method's runs by seed at these values of the axes that it has."""
    fits = [key for key in side if values[key].items() <= axes.items()]
    return side[fits[0]] if fits else {}


def find_runs(name: str, runs: Path, size: str | None = None, axes: Sequence[str] = ()) -> list[RunFolder]:
    """The runs that a name stands for: a board's of one size (default: the published one; "all": of each), a
    row's of all training seeds and axis values (of the board and size of its newest run), or one run as in
    `find_run`. `axes` as in `narrowed`.

    Raises: UserError as `find_run`, and for a board without finished runs.
    """
    known = config.boards()
    if name in known or name in {one.split("/")[0] for one in known} or name.endswith(".toml"):
        board = config.load_board(name)
        chosen = boards.published_size(board) if size is None else size
        if chosen not in (*board.sizes, "all"):
            raise unknown("size", chosen, [*board.sizes, "all"], board.id)
        found = _finished(runs, lambda one: one.board == board.id and chosen in (one.size, "all"), board.id)
        if not found:
            raise UserError(f"{board.id}: no finished run of size '{chosen}' in the folder {runs}")
        order = {row.name: at for at, row in enumerate(board.rows)}
        found.sort(key=lambda one: order.get(one.record.row, len(order)))
        return _narrowed_runs(found, axes, board.id)
    rows = _finished(runs, lambda one: one.row == name and size in (None, one.size))
    if not rows:
        return [find_run(name, runs, axes)]
    last = max(rows, key=lambda one: one.begun).record
    same = [one for one in rows if (one.record.board, one.record.size) == (last.board, last.size)]
    return _narrowed_runs(same, axes, name)


def analysis_settings(modules: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """The further arguments of each analysis: its `Settings` where it has some, with what `--set` changes.

    Raises: UserError for an analysis that is not asked for, and for an unknown setting.
    """
    given: dict[str, dict[str, Any]] = {registry.stem(name): {} for name in modules}
    for text in overrides:
        one = config.parse_override(text)
        if one.section not in given:
            raise unknown("analysis", one.section, given, f"--set {text}")
        given[one.section][one.key] = one.value
    found: dict[str, tuple[Any, ...]] = {}
    for name, module in modules.items():
        stem, cls = registry.stem(name), getattr(module, "Settings", None)
        if given[stem] and cls is None:
            raise UserError(f"--set: the analysis {stem} has no settings")
        found[name] = (config.check_settings(cls, given[stem], f"--set {stem}"),) if cls else ()
    return found


def analysed(name: str, module: Any, folder: RunFolder, settings: tuple[Any, ...]) -> Analysis:
    """What an analysis makes of a run.

    Raises: UserError where an analysis file of the user's own raises, or returns something else.
    """
    try:
        made = module.analyze(folder, *settings)
    except UserError:
        raise
    except Exception as error:
        if not registry.is_path(name):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        raise UserError(f"analysis {name}: {type(error).__name__}: {error} ({place})") from error
    if not isinstance(made, Analysis):
        raise UserError(f"analysis {name}: analyze should return an Analysis, not {type(made).__name__}")
    return made


def comparable_columns(board: Board, folders: Sequence[RunFolder]) -> list[str]:
    """The scores of the board's columns that all these runs have with values per prompt; of columns at values
    of axes, those of the runs' own.
    """
    records = [folder.record for folder in folders]
    names = dict.fromkeys(
        column.score
        for column in board.columns
        if not column.mean and all(column.at.items() <= one.axes.items() for one in records)
    )
    return [
        name
        for name in names
        if all(name in one.scores and one.scores[name].estimator is not None for one in records)
    ]


def interval_text(one: Estimate) -> str:
    """`value [low, high]`, as far as they are defined."""
    if one.value is None:
        return "–"
    interval = "" if one.low is None or one.high is None else f" [{one.low:.4g}, {one.high:.4g}]"
    return f"{one.value:.4g}{interval}"


class _Below:
    """The runs in a folder, trials of learning rates included; each record is read once."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    @cached_property
    def paths(self) -> list[Path]:
        """The files."""
        depths = ("*/*/*", "tuning/*/*/*")
        return sorted(path for depth in depths for path in self.runs.glob(f"{depth}/record.json"))

    @cached_property
    def rows(self) -> dict[str, list[tuple[RunRecord, Path]]]:
        """The records that can be read, and their folders, by row."""
        found: dict[str, list[tuple[RunRecord, Path]]] = {}
        for path in self.paths:
            with suppress(RecordError):
                record = load(path)
                found.setdefault(record.row, []).append((record, path.parent))
        return found


def find_each(names: Sequence[str], runs: Path, axes: Sequence[str] = ()) -> list[RunFolder]:
    """`find_run` of several names; the folder of runs is read once. An axis that one of them lacks narrows
    the others alone.
    """
    below = _Below(runs)
    if not axes:
        return [_find_run(name, below, axes) for name in names]
    known = {name: {axis for one, _ in below.rows.get(name, []) for axis in one.axes} for name in names}
    every = set().union(*known.values())

    def told(name: str) -> list[str]:
        lacks = every - known[name] if known[name] else set[str]()
        return [text for text in axes if text.partition("=")[0].strip() not in lacks]

    return [_find_run(name, below, told(name)) for name in names]


def find_run(name: str, runs: Path, axes: Sequence[str] = ()) -> RunFolder:
    """A run by its folder, its id, the beginning of its id, or its row (the least seed, then the newest).
    `axes` as in `narrowed`.

    Raises: UserError where there is none, or more than one, as there is of a row with several axis values.
    """
    return _find_run(name, _Below(runs), axes)


def _find_run(name: str, below: _Below, axes: Sequence[str]) -> RunFolder:
    if (Path(name) / "record.json").is_file():
        return _narrowed_runs([RunFolder(Path(name))], axes, name)[0]
    exact = [path for path in below.paths if path.parent.name == name]
    begun = exact or [path for path in below.paths if path.parent.name.startswith(name)]
    if len(begun) == 1:
        return _narrowed_runs([RunFolder(begun[0].parent)], axes, name)[0]
    if begun:
        raise UserError(f"run '{name}': several begin so: {', '.join(path.parent.name for path in begun)}")
    if name in below.rows:
        found = narrowed(below.rows[name], lambda pair: pair[0].axes, axes, f"run '{name}'")
        record, folder = min(found, key=lambda pair: (pair[0].seed, -RunFolder(pair[1]).begun, pair[1]))
        place = (record.board, record.size)
        values = {said(one.axes): one.axes for one, _ in found if (one.board, one.size) == place}
        if len(values) > 1:
            differ = [
                axis for axis in record.axes if len({str(one.get(axis)) for one in values.values()}) > 1
            ]
            example = " ".join(f"--axis {axis}={_text(record.axes[axis])}" for axis in differ)
            raise UserError(
                f"run '{name}': has runs of several axis values ({'; '.join(values)}); name one by its id, "
                f"or say which values, for example {example}"
            )
        return RunFolder(folder)
    if not below.paths:
        raise UserError(
            f"run '{name}': there are no runs in the folder {below.runs}; `kdbench run` makes some"
        )
    raise unknown("run", name, [*below.rows, *(path.parent.name for path in below.paths)])
