"""The evidence of one run: its prompts, the responses of teacher and reference that a board's runs share, and
the files in the run's folder.

Source: see `kdbench.evidence` for what is measured and `kdbench.interventions` for what is tried.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from torch import nn

from kdbench import collect, registry
from kdbench.config import EvidenceConfig, RunConfig
from kdbench.distiller import Batch, Distiller
from kdbench.errors import UserError
from kdbench.evidence import prompts_hash, read_evidence
from kdbench.predict import Prediction
from kdbench.record import RecordError, RunFolder
from kdbench.stages import Materials, Places, TaskSource, digest


class RunEvidence:
    """Makes the evidence of the finished model, of snapshots, in further profiles, and interventions.

    Args: `teacher` is the teacher's identity in the cache; '': the teacher that the run would have now.
    """

    def __init__(
        self, materials: Materials, config: EvidenceConfig, folder: Path, run_id: str, teacher: str = ""
    ) -> None:
        self.materials, self.config, self.run_id = materials, config, run_id
        self.teacher = teacher or materials.key("teacher")
        self.files, self.places = RunFolder(folder), materials.places
        self._said: dict[tuple[int, ...], Prediction] = {}  # of the frozen teacher, for all snapshots
        self._teacher_hash = ""

    def path(self, step: int | None = None, profile: str | None = None) -> Path:
        """The evidence file of a snapshot, or of the finished model in a decoding profile."""
        if step is not None:
            return self.files.path / "evidence" / f"snapshot-{step}.parquet"
        return self.files.evidence_of("" if profile in (None, self.config.profile) else str(profile))

    def make(
        self, student: nn.Module, teacher: nn.Module, step: int | None = None, profile: str | None = None
    ) -> Path:
        """Collect the evidence file where it is missing, damaged or of another thing; return its path."""
        path = self.path(step, profile)
        plan = collect.plan(self.gold(), self.config, snapshot=step is not None, profile=profile)
        manifest = collect.manifest_of(plan, self._models(student, teacher), step, self.run_id)
        if path.is_file():
            with suppress(RecordError):
                if read_evidence(path).manifest == manifest:
                    shutil.rmtree(collect.pieces_of(path), ignore_errors=True)  # of a kill at the very end
                    return path
            path.unlink()
        rolled = {
            "student": collect.sampled(student, plan),
            "teacher": collect.held(
                self.teacher_roll_in(teacher, plan), None if step is None else self._said
            ),
        }
        if step is None:
            rolled["reference"] = collect.reference(plan)
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = self.places.progress and step is None
        collect.collect(student, teacher, plan, rolled, path, manifest, progress=shown)
        return path

    def intervene(self, student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> list[Path]:
        """Try the named interventions on the finished model, keep what is there; return the files."""
        from kdbench import interventions

        plan = collect.plan(self.gold(), self.config)
        tokenizer, task = self.materials.tokenizer("student"), self.materials.task()
        return interventions.collect_interventions(
            student,
            teacher,
            plan,
            self.files.path / "evidence" / "interventions",
            self._models(student, teacher),
            names=names,
            progress=self.places.progress,
            run=self.run_id,
            **interventions.scoring(task, tokenizer, self.config.split),
        )

    def _models(self, student: nn.Module, teacher: nn.Module) -> dict[str, str]:
        self._teacher_hash = self._teacher_hash or collect.weights_hash(teacher)
        return {"student": collect.weights_hash(student), "teacher": self._teacher_hash}

    def gold(self) -> Batch:
        """Return the evidence prompts with their references; `finished`: the reference kept its end."""
        task = self.materials.task()
        source = TaskSource(task, self.config.split, self.materials.encoders(task))
        batch = source.batch(range(min(self.config.prompts or len(source), len(source))))
        last = batch["input_ids"].gather(1, batch["length"][:, None] - 1)[:, 0]
        return batch.replace(finished=last == self.materials.tokenizer("student").eos_token_id)

    def teacher_roll_in(self, teacher: nn.Module, plan: collect.Plan) -> list[Batch]:
        """Return the teacher's responses, one batch per draw; all runs of a board share them."""
        run = self.materials.run
        code = registry.code_hash(registry.code_files([], [run.task]))
        where = [run.device.split(":")[0], run.threads, plan.batch_size]
        told = digest(self.teacher, prompts_hash(plan.prompts()), plan.decoding, plan.samples, code, where)
        folder = self.places.cache / "rolled" / told
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                work = folder.with_name(told + ".work")
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                label = "teacher's responses" if self.places.progress else ""
                for draw, batch in enumerate(collect.sample(teacher, plan, label)):
                    batch.save(work / f"{draw:03d}.safetensors")
                work.rename(folder)
        return [Batch.load(path) for path in sorted(folder.glob("*.safetensors"))]


def of_finished(folder: RunFolder, places: Places) -> tuple[RunEvidence, nn.Module, nn.Module]:
    """Return (evidence, student, teacher) of a finished run, its models loaded.

    Raises: UserError where the run collects no evidence, its student is not saved as it was scored, or its
    teacher cannot be had any more.
    """
    found, where = folder.record, str(folder.path)
    if found.status != "done":
        raise UserError(f"{where}: the run {found.status}, there is no student to collect evidence of")
    run = RunConfig.from_dict(folder.config, f"{where}/config.json")
    if run.evidence is None or "teacher" not in found.models:
        raise UserError(f"{where}: size '{run.size}' of {run.board} collects no evidence")
    method = registry.load_distiller(run.method)
    if method.predictor is not Distiller.predictor:
        raise UserError(f"{where}: what {run.method} scores is more than the saved student")
    materials = Materials(run, places)
    teacher = found.models["teacher"].revision
    if not materials.trained(teacher) and teacher != materials.key("teacher"):
        raise UserError(
            f"{where}: its teacher is not in the cache, and was made by other code, settings, data or "
            f"libraries than are here; `kdbench run {found.row} --board {found.board}` makes the run again"
        )
    evidence = RunEvidence(materials, run.evidence, folder.path, found.run_id, teacher)
    student = materials.saved("student", folder.path / "student")
    return evidence, student, materials.stage("teacher", teacher)
