"""What commands do around runs: which runs, what they cost, learning rates, finding a run again."""

from __future__ import annotations

import dataclasses
import json
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from kdbench import board as boards
from kdbench import config, registry
from kdbench.config import Board, RunConfig, resolve
from kdbench.errors import UserError, unknown
from kdbench.record import Analysis, RecordError, RunFolder, RunRecord, load, write_json
from kdbench.strict import to_dict

if TYPE_CHECKING:
    from kdbench.intervals import Estimate
    from kdbench.jobs import Job
    from kdbench.runner import Plan
    from kdbench.stages import Places

TRACKERS = ("tensorboard", "wandb")
TRACKER = "KDBENCH_TRACKER"  # the variable that a run reads it from


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
) -> list[Plan]:
    """Check every run; return them in order of seed and row.

    Raises: UserError for the first that cannot be made.
    """
    from kdbench.runner import Plan

    silence()
    found: dict[str, Plan] = {}
    for seed in seeds:
        for axes in board.axis_values():
            for name in rows:
                plan = Plan(_run(board, size, name, seed, overrides, axes, rows, device), places)
                found.setdefault(plan.id, plan)
    return list(found.values())


def _run(
    board: Board,
    size: str,
    name: str,
    seed: int,
    overrides: Sequence[str],
    axes: dict[str, Any],
    among: Sequence[str],
    device: str,
) -> RunConfig:
    """A run with its method's and task's settings completed by their defaults."""
    row = board.row(name)
    method = registry.load_distiller(row.method if row else name).Config
    plain = resolve(board, size, name, seed, overrides, axes=axes, among=among, device=device)
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
        task_settings_class=registry.load_task(plain.task).Settings,
    )


def label_of(run: RunConfig) -> str:
    """A run's name among those of one command: its row, axis values and seed."""
    axes = ", ".join(f"{name} {value}" for name, value in run.axes.items())
    return f"{run.row} ({axes}) seed {run.seed}" if axes else f"{run.row} seed {run.seed}"


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
    """What each stage and run would take, from published and local records of the same row and size."""
    paths = [*boards.published_records(board), *boards.local_records(board, runs)]
    entries, _ = boards.read_entries(paths, local=True)
    done = [entry for entry in entries if entry.record.size == size and entry.record.status == "done"]
    stages: dict[str, float] = {}
    for entry in done:
        for name, value in entry.record.budget.items():
            if name.startswith("stage_seconds."):
                stages[name.removeprefix("stage_seconds.")] = value
    lines = []
    for job in jobs:
        if job.role is not None:
            spec = job.plan.run.roles[job.role]
            size_bytes = _model_bytes(job.plan, job.role)
            more = None if size_bytes is None else 6 * size_bytes
            seconds = stages.get(spec.stages[job.count - 1].name)
            lines.append(Forecast(job.label, job.gives, job.steps, "to train", size_bytes, more, seconds))
    for plan in plans:
        run, label = plan.run, label_of(plan.run)
        steps = run.training.optimizer_steps
        if plan.complete():
            lines.append(Forecast(label, plan.id, steps, "finished"))
            continue
        like = [entry for entry in done if entry.record.row == run.row]
        seconds = None
        if like:
            times = [sum(phase.seconds for phase in entry.record.phases.values()) for entry in like]
            seconds = sum(times) / len(times)
        model = _model_bytes(plan, "student")
        kept = [_folder_bytes(entry.path.parent) for entry in like if entry.path.name == "record.json"]
        answers = _answers(plan)
        if not kept and model is not None:
            kept = [model + 1000 * answers]
        more = 6 * model if model is not None and steps else 0 if model is not None else None
        state = "to go on" if (plan.folder / "checkpoint").is_dir() else "to run"
        lines.append(Forecast(label, plan.id, steps, state, max(kept) if kept else None, more, seconds))
    return lines


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
    from transformers import AutoModelForCausalLM

    from kdbench import models

    spec = plan.run.roles[role]
    try:
        described = models.load_config(spec, plan.materials.tokenizer(role), plan.places.runs)
        with torch.device("meta"):
            return 4 * int(AutoModelForCausalLM.from_config(described).num_parameters())
    except (UserError, ValueError):
        return None


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------------------------- learning rates
def trials(board: Board, device: str, places: Places) -> dict[str, list[Plan]]:
    """The learning-rate trials of every trained row, on the tuning seed, each scored on dev alone.

    They lie in `<runs>/tuning`, where no report looks; the board must have [tuning].
    """
    from kdbench.runner import Plan

    silence()
    assert board.tuning is not None
    tuning, untuned = board.tuning, dataclasses.replace(board, tuned={})
    apart = dataclasses.replace(places, runs=places.runs / "tuning")
    names = [row.name for row in board.rows if not row.reference]
    axes = board.axis_values()[0]
    found: dict[str, list[Plan]] = {}
    for name in names:
        for overrides in config.tuning_runs(board, name):
            run = _run(untuned, tuning.size, name, tuning.seed, overrides, axes, names, device)
            task = Plan(run, apart).materials.task()
            first = next(split for split in task.splits() if split.startswith("test/"))
            evaluation = dataclasses.replace(
                run.evaluation,
                sets=[first.removeprefix("test/")],
                generation_seeds=run.evaluation.generation_seeds[:1],
            )
            select = config.Select("last", tuning.score, tuning.direction, run.training.optimizer_steps)
            scoring = [one for one in run.analyses if hasattr(registry.load_analysis(one), "dev_scores")]
            run = dataclasses.replace(
                run, evaluation=evaluation, select=select, analyses=scoring, evidence=None
            )
            found.setdefault(name, []).append(Plan(run, apart))
    return found


def write_tuning(board: Board, plans: dict[str, list[Plan]]) -> Path:
    """Write `tuning.json` beside the board: the best learning rate of each row, and all trials.

    Raises: UserError where every trial of a row failed, and where the board's folder cannot be written.
    """
    assert board.tuning is not None
    assert board.folder is not None
    sign = 1 if board.tuning.direction == "higher" else -1
    rows = {}
    for name, row_plans in plans.items():
        tried = []
        for plan in row_plans:
            record = plan.finished()
            done = record is not None and record.status == "done"
            score = record.value(f"dev/{board.tuning.score}") if record is not None and done else None
            tried.append(config.Trial(plan.run.training.lr, score, plan.id))
        scored = [(sign * one.score, one.lr) for one in tried if one.score is not None]
        if not scored:
            raise UserError(f"{board.id}: every trial of row '{name}' failed; tuning.json is left as it was")
        rows[name] = config.Tuned(max(scored)[1], tried)
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
def _finished(runs: Path, wanted: Callable[[RunRecord], bool]) -> list[RunFolder]:
    """The finished runs that are wanted, of each row, axis value and seed the one begun last."""
    found: dict[tuple[str, str, str, str, int], tuple[float, RunFolder]] = {}
    for path in sorted(runs.glob("*/*/*/record.json")):
        with suppress(RecordError):
            record, folder = load(path), RunFolder(path.parent)
            if record.status == "done" and wanted(record):
                axes = json.dumps(record.axes, sort_keys=True)
                key = (record.board, record.size, record.row, axes, record.seed)
                found[key] = max(
                    found.get(key, (0.0, folder)), (folder.begun, folder), key=lambda one: one[0]
                )
    return [found[key][1] for key in sorted(found)]


def runs_of(name: str, board: Board, size: str, runs: Path) -> list[RunFolder]:
    """The finished runs of a row of a board in one size, one per training seed; or the run with this id or
    folder.

    Raises: UserError where there is none.
    """
    found = _finished(runs, lambda one: (one.board, one.size, one.row) == (board.id, size, name))
    if found:
        return found
    one = find_run(name, runs)
    if one.record.row == name:
        raise UserError(f"{board.id}: no finished run of row '{name}' in size '{size}' in the folder {runs}")
    return [one]


def common_seeds(one: list[RunFolder], other: list[RunFolder]) -> tuple[list[RunFolder], list[RunFolder]]:
    """Both methods' runs of the training seeds that both have; two single runs are taken as they are."""
    if len(one) == len(other) == 1:
        return one, other
    mine, theirs = ({run.record.seed: run for run in side} for side in (one, other))
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        said = " and ".join(", ".join(map(str, side)) for side in (mine, theirs))
        raise UserError(f"a comparison needs runs of the same training seed, here are {said}")
    return [mine[seed] for seed in seeds], [theirs[seed] for seed in seeds]


def find_runs(name: str, runs: Path, size: str | None = None) -> list[RunFolder]:
    """The runs that a name stands for: a board's of one size (default: the published one), a row's of all
    training seeds (of the board and size of its newest run), or one run as in `find_run`.

    Raises: UserError as `find_run`, and for a board without finished runs.
    """
    known = config.boards()
    if name in known or name in {one.split("/")[0] for one in known} or name.endswith(".toml"):
        board = config.load_board(name)
        chosen = boards.published_size(board) if size is None else size
        if chosen not in board.sizes:
            raise unknown("size", chosen, board.sizes, board.id)
        found = _finished(runs, lambda one: (one.board, one.size) == (board.id, chosen))
        if not found:
            raise UserError(f"{board.id}: no finished run of size '{chosen}' in the folder {runs}")
        order = {row.name: at for at, row in enumerate(board.rows)}
        return sorted(found, key=lambda one: order.get(one.record.row, len(order)))
    rows = _finished(runs, lambda one: one.row == name and size in (None, one.size))
    if not rows:
        return [find_run(name, runs)]
    last = max(rows, key=lambda one: one.begun).record
    return [one for one in rows if (one.record.board, one.record.size) == (last.board, last.size)]


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
    """The board's columns that all these runs have with values per prompt."""
    records = [folder.record for folder in folders]
    names = dict.fromkeys(column.score for column in board.columns)
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


def find_run(name: str, runs: Path) -> RunFolder:
    """A run by its folder, its id, the beginning of its id, or its row (the least seed, then the newest).

    Raises: UserError where there is none, or more than one.
    """
    if (Path(name) / "record.json").is_file():
        return RunFolder(Path(name))
    paths = sorted(path for depth in ("*/*/*", "tuning/*/*/*") for path in runs.glob(f"{depth}/record.json"))
    exact = [path for path in paths if path.parent.name == name]
    begun = exact or [path for path in paths if path.parent.name.startswith(name)]
    if len(begun) == 1:
        return RunFolder(begun[0].parent)
    if begun:
        raise UserError(f"run '{name}': several begin so: {', '.join(path.parent.name for path in begun)}")
    rows: dict[str, list[tuple[int, float, Path]]] = {}
    for path in paths:
        try:
            record = load(path)
        except RecordError:
            continue
        rows.setdefault(record.row, []).append((record.seed, -RunFolder(path.parent).begun, path.parent))
    if name in rows:
        return RunFolder(min(rows[name])[2])
    if not paths:
        raise UserError(f"run '{name}': there are no runs in the folder {runs}; `kdbench run` makes some")
    raise unknown("run", name, [*rows, *(path.parent.name for path in paths)])
