"""The life of a run: materials, training, answers, evidence, analyses, record. Killed anywhere, it goes on
from there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from kdbench import models, record, registry, stages
from kdbench.clock import Clock, phase, running
from kdbench.config import RunConfig, check_settings, keep_roles, library_versions, run_id
from kdbench.distiller import Distiller
from kdbench.errors import Diverged, OutOfMemory, UserError
from kdbench.harness import Milestone, Trainer
from kdbench.memory import check_alone, telling
from kdbench.paths import PACKAGE
from kdbench.processes import Processes
from kdbench.rollout import evaluating
from kdbench.run_evidence import RunEvidence
from kdbench.selection import Selection
from kdbench.stages import Materials, Places


def needed(run: RunConfig) -> RunConfig:
    """Return the run with the roles that method and evidence ask for. Raises: UserError for a missing one."""
    roles = stages.needed_roles(registry.load_distiller(run.method))
    if run.evidence is not None and "teacher" not in roles:
        roles.append("teacher")
    return keep_roles(run, roles)


class Plan:
    """One run before it starts: checked, with its id; nothing heavy is loaded."""

    def __init__(self, run: RunConfig, places: Places, needs: Sequence[Plan] = ()) -> None:
        """Args: `needs`: the runs whose models its roles are.

        Raises: UserError for whatever would fail: settings, roles, data, vocabularies, an unwritable folder.
        """
        self.run, self.places, self.needs = needed(run), places, list(needs)
        self.method = registry.load_distiller(run.method)
        check_settings(self.method.Config, run.settings, registry.stem(run.method))
        self.materials = Materials(self.run, places)
        self._check_task()
        self.materials.check_stages()
        self.materials.shared_vocabulary()
        self.code = registry.code_hash(registry.code_files(self.run.methods, self.run.tasks))
        keys = {role: self.materials.key(role) for role in self.run.roles}
        versions = {**library_versions(), **self.materials.revisions(), **keys}
        self.id = run_id(self.run, self.code, versions)
        self.folder = places.runs / Path(*run.board.split("/")) / self.id
        _writable(self.folder)
        _writable(places.cache)

    def _check_task(self) -> None:
        task = self.materials.task()
        fields = task.fields_of(self.method.head)
        lacking = [name for name in self.method.needs if name.rpartition(".")[2] not in fields]
        if lacking:
            raise UserError(
                f"{self.run.method}: needs {', '.join(lacking)}, which task {task.name} does not give"
            )
        if self.method.head not in task.heads:
            heads = ", ".join(task.heads)
            raise UserError(
                f"{self.run.method}: its head is {self.method.head}, task {task.name} has {heads}"
            )
        known = [name.removeprefix("test/") for name in task.splits() if name.startswith("test/")]
        for name in [] if self.run.evaluation.sets == "all" else self.run.evaluation.sets:
            if name not in known:
                raise UserError(
                    f"evaluation.sets: task {task.name} has no set '{name}'. Known: {', '.join(known)}."
                )
        for name, data in self.run.extra.items():
            other = self.materials.task(data.task, data.task_settings)
            if data.split not in other.splits():
                raise UserError(
                    f"extra.{name}: task {other.name} has no split '{data.split}'. "
                    f"Known: {', '.join(other.splits())}."
                )
        if self.run.evidence is not None and self.run.evidence.split not in task.splits():
            raise UserError(
                f"evidence.split: task {task.name} has no split '{self.run.evidence.split}'. "
                f"Known: {', '.join(task.splits())}."
            )

    def finished(self) -> record.RunRecord | None:
        """Return the record of an earlier run of the same id that needs no repeating (done or diverged)."""
        path = self.folder / "record.json"
        if path.is_file():
            try:
                found = record.load(path)
            except record.RecordError:
                return None
            if found.status in ("done", "diverged"):
                return found
        return None

    def complete(self) -> bool:
        """Whether an earlier run of the same id left nothing to do, neither an analysis nor tidying up."""
        found = self.finished()
        if found is None or found.status != "done":
            return found is not None
        return set(self.run.analyses) <= set(found.analyses) and not (self.folder / "checkpoint").exists()

    def execute(self) -> record.RunRecord:
        """Run, or go on with what an earlier process left; return the record.

        Raises: UserError for what the user can mend. Any other exception becomes a record with status
        `failed`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        processes = Processes(self.run.device, self.run.training.precision)
        check_alone(self.run.training.fit, processes.world)
        with FileLock(f"{self.folder}.lock") if processes.is_main else _nothing():
            found: record.RunRecord | None = processes.told_by_main(self.finished())
            if found is None:
                found = _Life(self, processes).run_all()
            elif found.status == "done" and processes.is_main:
                missing = [name for name in self.run.analyses if name not in found.analyses]
                found = analyse(record.RunFolder(self.folder), missing) if missing else found
                shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        processes.wait()
        return found


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def _writable(folder: Path) -> None:
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder}: cannot be written ({place} is {'read-only' if place.is_dir() else 'a file'})"
        )


class _Life:
    """One run while it runs."""

    def __init__(self, plan: Plan, processes: Processes) -> None:
        self.plan, self.run, self.folder, self.materials = plan, plan.run, plan.folder, plan.materials
        self.processes, self.clock = processes, Clock()
        self.trainer: Trainer | None = None
        self.measured: dict[str, float] = {}  # the method's numbers about its own parts

    def run_all(self) -> record.RunRecord:
        """Go through the phases and return the record."""
        torch.set_num_threads(self.run.threads)
        if self.processes.is_main:
            record.write_json(self.folder / "config.json", self.run.to_dict())
        status, reason = self.outcome(self.work)
        result = self.record(status, reason)
        if self.processes.is_main:
            record.save(result, self.folder / "record.json")
            if status == "done":
                status, reason = self.outcome(self.analyse)
                result = record.RunFolder(self.folder).record
                if status != "done":
                    result.status, result.reason = status, reason
                    record.save(result, self.folder / "record.json")
            if status != "failed":
                shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        return result

    def outcome(self, action: Callable[[], None]) -> tuple[str, str]:
        """Do it and return the status and its reason. Raises: UserError for what the user can mend."""
        try:
            action()
        except UserError:
            raise
        except Diverged as error:
            return "diverged", " ".join(str(error).split())
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
            reason = str(error) if isinstance(error, OutOfMemory) else reason
            (self.folder / "error.txt").write_text(traceback.format_exc())
            return "failed", " ".join(reason.split())
        return "done", ""

    def analyse(self) -> None:
        """Add the scores of the board's analyses to the record."""
        analyse(record.RunFolder(self.folder), self.run.analyses)

    # ---- training
    def work(self) -> None:
        """Train, then answer and measure."""
        roles = self.models()
        method, settings = self.plan.method, self.run.settings
        distiller = stages.build(
            method, settings, roles.__getitem__, self.run.seed, registry.stem(self.run.method)
        )
        teacher = self.measuring(roles.get("teacher"))
        if self.run.training.optimizer_steps:
            self.train(distiller, teacher)
        distiller.eval()
        self.measured = dict(distiller.measures())
        if not self.processes.is_main:
            return
        with running(self.clock), phase("evaluate", covers=True):
            if self.trainer is not None:
                distiller.finish(self.materials.data(self.trainer))
            model = distiller.predictor()
            bare = model if hasattr(model, "save_pretrained") else distiller.student
            models.save_student(bare, self.materials.tokenizer("student"), self.folder / "student")  # type: ignore[arg-type]
            with telling("out of memory in the evaluation: lower evaluation.batch_size"):
                self.answer(model)
            if self.run.evidence is not None and teacher is not None:
                with telling("out of memory while evidence is made: lower evidence.batch_size"):
                    self.evidence.make(model, teacher)

    def models(self) -> dict[str, nn.Module]:
        """Load the roles' models, on all processes; the first to come trains what the cache lacks."""
        with running(self.clock), phase("stages", covers=True):
            return self.materials.models()

    def measuring(self, teacher: nn.Module | None) -> nn.Module | None:
        """Return the teacher that evidence measures with: one in float32, also where training runs another in
        bfloat16.
        """
        training, asked = self.run.training, self.run.evidence is not None and self.processes.is_main
        if teacher is None or not asked or training.teacher_precision != "bf16":
            return teacher
        with running(self.clock), phase("stages", covers=True):
            return self.materials.model("teacher")

    def train(self, distiller: Distiller, teacher: nn.Module | None) -> None:
        """Train the distiller until its budget is spent and put the selected weights into it."""
        source = self.materials.source("train")
        extras = {
            name: self.materials.source(data.split, self.materials.task(data.task, data.task_settings))
            for name, data in self.run.extra.items()
        }
        task = self.materials.task()
        encoder = self.materials.encoders(task)["student"]
        selection = Selection(
            self.run.select,
            self.run.analyses,
            lambda model: self.materials.answers(model, task, "dev", encoder, dev=True),
        )
        trainer = Trainer(
            distiller,
            source,
            self.run.training,
            self.run.seed,
            processes=self.processes,
            extras=extras,
            folder=self.folder,
            identity=self.plan.id,
            milestones=[
                *selection.milestones(self.run.training.optimizer_steps),
                *self.snapshots(distiller, teacher),
            ],
            clock=self.clock,
            track=tracker(self.run, self.plan.id, self.folder) if self.processes.is_main else None,
        )
        self.trainer = trainer
        selection.trainer = trainer
        self.materials.prepare(trainer)
        trainer.fit(progress=self.plan.places.progress and self.processes.is_main, label=self.label())
        selection.finish()

    def label(self) -> str:
        """The run's name on a progress bar."""
        return f"{self.run.row} seed {self.run.seed}"

    def snapshots(self, distiller: Distiller, teacher: nn.Module | None) -> list[Milestone]:
        """Return when snapshots of evidence are taken."""
        total, evidence = self.run.training.optimizer_steps, self.run.evidence
        if evidence is None or not evidence.snapshots or teacher is None or not self.processes.is_main:
            return []
        count, model = min(evidence.snapshots, total), teacher
        marks = frozenset(round(total * i / count) for i in range(1, count + 1))
        return [Milestone(marks, lambda step: self.snapshot(distiller, model, step))]

    def snapshot(self, distiller: Distiller, teacher: nn.Module, step: int) -> None:
        """Collect the light evidence of the student as it is."""
        with phase("snapshot", covers=True), evaluating(distiller):
            self.evidence.make(distiller.predictor(), teacher, step)

    @cached_property
    def evidence(self) -> RunEvidence:
        """What makes the run's evidence."""
        assert self.run.evidence is not None
        return RunEvidence(self.materials, self.run.evidence, self.folder, self.plan.id)

    # ---- evaluation
    def answer(self, model: nn.Module) -> None:
        """Write the answers to every test set that has none yet."""
        task = self.materials.task()
        sets = [name for name in task.splits() if name.startswith("test/")]
        if self.run.evaluation.sets != "all":
            sets = [f"test/{name}" for name in self.run.evaluation.sets]
        for split in sets:
            path = self.folder / "outputs" / f"{split.removeprefix('test/')}.jsonl"
            if not path.is_file():
                rows = self.materials.answers(model, task, split, self.materials.encoders(task)["student"])
                with record.atomic(path) as file:
                    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

    # ---- record
    def record(self, status: str, reason: str) -> record.RunRecord:
        """Return the record of what happened."""
        run, materials = self.run, self.materials
        trainer = self.trainer
        budget: dict[str, float] = {"optimizer_steps": float(trainer.updates if trainer else 0)}
        budget |= trainer.counters if trainer else {"prompts": 0.0, "tokens_seen": 0.0, "tokens_sampled": 0.0}
        budget["init_steps"] = float(materials.steps("student"))
        fitted = trainer.fitted if trainer else None
        if fitted is not None:
            budget["micro_batch"], budget["rollout_batch"] = fitted.micro_batch, fitted.rollout_batch
        budget |= {f"stage_seconds.{name}": seconds for name, seconds in materials.stage_seconds().items()}
        scores: dict[str, record.Score] = {}
        notes = [*(f"breaks {law}: {why}" for law, why in self.broken().items())]
        if fitted is not None:
            notes.append(fitted.note)
        if trainer and trainer.best:
            notes.append(
                f"selected step {trainer.best['step']}: {run.select.score} {trainer.best['score']:.4f} on dev"
            )
            best = record.Score(trainer.best["score"], "", trainer.best["n"], run.select.direction)
            scores[f"dev/{run.select.score}"] = best
        if self.measured:
            scores |= {f"method/{name}": record.Score(v, "", 1) for name, v in self.measured.items()}
        for split, counts in materials.task().counts.items():
            told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
            notes.append(f"{split}: {told}")
        return record.RunRecord(
            run_id=self.plan.id,
            board=run.board,
            size=run.size,
            row=run.row,
            distiller=record.Named(registry.stem(run.method), self.plan.code[:16]),
            task=record.Named(run.task, materials.revision(materials.task())),
            models={
                role: record.Named(_model_name(spec), materials.key(role)) for role, spec in run.roles.items()
            },
            seed=run.seed,
            config=run.to_dict(),
            environment=environment(run),
            budget=budget,
            phases={
                name: record.Phase(
                    seconds=entry["seconds"],
                    peak_allocated_bytes=int(entry["peak_allocated_bytes"]) or None,
                    peak_reserved_bytes=int(entry["peak_reserved_bytes"]) or None,
                    peak_rss_bytes=int(entry["peak_rss_bytes"]) or None,
                )
                for name, entry in self.clock.state().items()
            },
            axes=dict(run.axes),
            curve=[
                record.DevScore(int(point["step"]), point["train_seconds"], point["score"])
                for point in (trainer.curve if trainer else [])
            ],
            scores=scores,
            status=status,
            reason=reason,
            notes=notes,
        )

    def broken(self) -> dict[str, str]:
        """Return the laws that method and training settings break."""
        if self.trainer is None:
            return {}
        return {**self.trainer.breaks()}


def _model_name(spec: Any) -> str:
    if spec.row:
        return f"row:{spec.row}"
    name = spec.model or f"fresh:{spec.architecture.model_type}"
    return name if "/" not in name or not Path(name).exists() else Path(name).name


def analyse(run: record.RunFolder, names: list[str]) -> record.RunRecord:
    """Add the scores of these analyses to the record of a finished run."""
    result = run.record
    for name in names:
        module = registry.load_analysis(name)
        result = run.add(name, module.VERSION, module.analyze(run))
    return result


def environment(run: RunConfig) -> dict[str, Any]:
    """Return commit, versions, device, threads and runs at a time; nothing that names machine or user."""
    on_gpu = run.device.startswith("cuda")
    return {
        **_commit(),
        **library_versions(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": run.threads,
        "jobs": int(os.environ.get("KDBENCH_JOBS", "1")),
    }


def _commit() -> dict[str, Any]:
    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(PACKAGE), *args], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD") if (PACKAGE.parent / ".git").exists() else ""
        dirty = (
            bool(git("status", "--porcelain", "--untracked-files=no", "--", str(PACKAGE.parent)))
            if commit
            else False
        )
    except (OSError, subprocess.TimeoutExpired):
        commit, dirty = "", False
    return {"commit": commit or "unknown", "dirty": dirty}


def check_tracker(wanted: str) -> None:
    """Refuse a tracker that cannot be used. Raises: UserError naming those that can."""
    from accelerate.tracking import get_available_trackers

    available = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
    if wanted not in available:
        raise UserError(f"tracker '{wanted}' is not installed. Installed: {', '.join(available) or 'none'}.")


def tracker(run: RunConfig, name: str, folder: Path) -> Callable[[dict[str, float], int], None] | None:
    """Return a function that logs a line of steps.jsonl to the tracker named in KDBENCH_TRACKER, if any.

    Raises: UserError for a tracker that accelerate does not know or that is not installed.
    """
    wanted = os.environ.get("KDBENCH_TRACKER", "")
    if not wanted:
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    check_tracker(wanted)
    cls = LOGGER_TYPE_TO_CLASS[wanted]
    args = {"logging_dir": str(folder)} if cls.requires_logging_directory else {}
    made = cls(f"{run.row}-{name}", **args)
    for method in ("start", "_start"):
        if hasattr(made, method):
            getattr(made, method)()
            break
    return lambda line, step: made.log(
        {key: value for key, value in line.items() if key != "step"}, step=step
    )
