"""What a run is made of: tasks, tokenizers and models by role. What runs share is trained once, cached by
content.

A stage (pretraining, the teacher's fine-tuning, the common student init) is an ordinary training by
`harness.Trainer`. Its key is a hash of everything that determines the result: the model before it, settings,
data, seed, code and library versions. Concurrent processes wait for each other at a file lock; a killed stage
resumes from its checkpoint.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdbench import models, registry
from kdbench.clock import spent
from kdbench.config import (
    ModelSpec,
    RunConfig,
    Select,
    Stage,
    check_settings,
    library_versions,
    stage_seed,
    stage_training,
)
from kdbench.distiller import Batch, Distiller
from kdbench.errors import OutOfMemory, UserError
from kdbench.harness import Source, SourceData, Trainer
from kdbench.processes import Processes
from kdbench.prompted import PromptedEncoder
from kdbench.record import load
from kdbench.selection import Selection
from kdbench.streams import stream_seed
from kdbench.strict import to_dict
from kdbench.task import Encoder, Task, tokenizer_hash

_COSMETIC = ("name", "checkpoint_every", "log_every")


@dataclass
class Places:
    """Where a run reads and writes."""

    runs: Path
    cache: Path
    data_root: Path | None = None
    progress: bool = False
    tasks: dict[str, Task] = field(default_factory=dict)  # read once, shared by the runs of one command
    revisions: dict[str, str] = field(default_factory=dict)
    tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)


@dataclass
class TaskSource:
    """The rows of one split as batches."""

    task: Task
    split: str
    encoders: Mapping[str, Encoder]
    rows: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.task.rows(self.split, self.encoders["student"])

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Any) -> Batch:
        """Return the rows at `index`."""
        return self.task.collate([self.rows[i] for i in index], self.encoders)

    def lengths(self, index: Any) -> list[int]:
        """Return the tokens of the rows at `index`."""
        lengths: list[int] = self.batch(index)["length"].tolist()
        return lengths


def digest(*parts: Any) -> str:
    """Return 16 hexadecimal digits that change with any of the JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def needed_roles(method: type[Distiller]) -> list[str]:
    """Return the roles a method asks for: the argument names of its `__init__` after `cfg`."""
    return list(inspect.signature(method.__init__).parameters)[2:]


def build(
    method: type[Distiller],
    settings: Mapping[str, Any],
    role: Callable[[str], nn.Module],
    seed: int,
    name: str,
) -> Distiller:
    """Return the distiller with its models; new modules take their weights from the seed's own stream.

    Raises: UserError for a wrong setting.
    """
    cfg = check_settings(method.Config, settings, name)
    filled = {name: role(name) for name in needed_roles(method)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "weights/method"))
        return method(cfg, **filled)


class Materials:
    """Tasks, tokenizers and models of one run, made when asked for."""

    def __init__(self, run: RunConfig, places: Places) -> None:
        self.run, self.places = run, places
        self._checked, self._shared = False, cast("int | None", None)
        # roles with a model of their own, and those that another row's finished runs are
        self.own = {role: spec for role, spec in run.roles.items() if not spec.row}
        self.linked = {role: spec for role, spec in run.roles.items() if spec.row}

    # ---- data
    def task(self, name: str | None = None, settings: Mapping[str, Any] | None = None) -> Task:
        """Return a task, by default the run's own. Raises: UserError for missing or malformed data."""
        name, settings = (self.run.task, self.run.task_settings) if name is None else (name, settings or {})
        tasks, key = self.places.tasks, digest(name, dict(settings))
        if key not in tasks:
            cls = registry.load_task(name)
            filled = check_settings(cls.Settings, settings, f"task {registry.stem(name)}")
            tasks[key] = cls(filled, self.places.data_root)
        return tasks[key]

    def _name(self, task: Task) -> str:
        """The key of a task among those that are read."""
        return next(key for key, known in self.places.tasks.items() if known is task)

    def revision(self, task: Task) -> str:
        """Return the content identity of a task's data, which is read for it once."""
        key = self._name(task)
        if key not in self.places.revisions:
            self.places.revisions[key] = task.revision
        return self.places.revisions[key]

    @cached_property
    def head(self) -> str:
        """What the models of the run's method predict with."""
        return registry.load_distiller(self.run.method).head

    def tokenizer(self, role: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a role's model; one to be trained reads the text of its first stage."""
        spec, known = self.run.roles[role], self.places.tokenizers
        task = self._stage_task(spec.stages[0]) if spec.stages else self.task()
        told = [spec.model, spec.tokenizer, spec.revision, spec.architecture is None, self._name(task)]
        key = digest(told, list(models.HEADS[self.head].special))
        if key not in known:
            known[key] = models.load_tokenizer(spec, task, self.places.data_root, self.places.runs, self.head)
        return known[key]

    def encoders(self, task: Task) -> dict[str, Encoder]:
        """Return one encoder per role, for models with the head of the run's method."""
        return {role: task.encoder(self.tokenizer(role), self.head) for role in self.own}

    def source(self, split: str, task: Task | None = None) -> TaskSource:
        """Return the rows of a split of a task, the run's own where none is given."""
        task = task or self.task()
        return TaskSource(task, split, self.encoders(task))

    def revisions(self) -> dict[str, str]:
        """Return the content identity of every task's data that the run reads."""
        found = {"": self.revision(self.task())}
        for data in self.run.extra.values():
            found[digest(data.task, data.task_settings)] = self.revision(
                self.task(data.task, data.task_settings)
            )
        for role in self.run.roles.values():
            for stage in role.stages:
                if stage.task:
                    key = digest(stage.task, stage.task_settings)
                    found[key] = self.revision(self.task(stage.task, stage.task_settings))
        return found

    # ---- models
    def shared_vocabulary(self) -> int | None:
        """Return how many ids all roles share, None where their head lets vocabularies differ; reads no
        weights.

        Raises: UserError for models that are missing, and for vocabularies that do not fit.
        """
        if not self._checked:
            self._check_positions()
            tokenizers = {role: self.tokenizer(role) for role in self.own}
            one = models.HEADS[self.head].one_vocabulary
            for role, spec in self.own.items():
                models.load_config(spec, tokenizers[role], self.places.runs, self.first_head(role))
            if one:
                self._shared = models.check_vocabularies(self.own, tokenizers, self.places.runs)
            self._checked = True
        return self._shared

    def _check_positions(self) -> None:
        """Refuse a model with fewer positions than the longest sequence that the run can make."""
        run, trains = self.run, bool(self.run.training.optimizer_steps)
        wanted = [run.evaluation.decode.max_new_tokens]
        wanted.append(run.training.max_new_tokens if trains else 0)
        wanted.append(run.evidence.max_new_tokens + 1 if run.evidence else 0)  # it looks past the last token
        method = registry.load_distiller(run.method)
        added = method.added_positions(check_settings(method.Config, run.settings, registry.stem(run.method)))
        encoders = self.encoders(self.task())
        for role, spec in self.own.items():
            longest = encoders[role].longest(max(wanted))
            longest += run.training.position_offset if trains else 0
            longest += added.get(role, 0)
            tokenizer, head = self.tokenizer(role), self.first_head(role)
            models.check_positions(spec, tokenizer, longest, self.places.runs, head)

    def check_stages(self) -> None:
        """Refuse stages that cannot be trained. Raises: UserError naming the role and the stage."""
        for role, spec in self.own.items():
            for stage in spec.stages:
                self._check_stage(f"roles.{role}: stage '{stage.name}'", stage, role)
            last = self._heads(role)[-2:-1]
            if role != "student" and models.HEADS[self.head].new_head and last not in ([], [self.head]):
                raise UserError(
                    f"roles.{role}: its last stage trained a {models.HEADS[last[0]].what}, {self.run.method} "
                    f"needs a {models.HEADS[self.head].what}; let the row name another role"
                )

    def _check_stage(self, where: str, stage: Stage, role: str) -> None:
        method, task = registry.load_distiller(stage.method), self._stage_task(stage)
        if needed_roles(method) != ["student"] or method.prepare is not Distiller.prepare:
            raise UserError(f"{where}: {stage.method} needs more than a student; train it as a run")
        if method.head not in task.heads:
            raise UserError(f"{where}: {stage.method} is a {method.head}, task {task.name} has none for it")
        lacking = [name for name in method.needs if name not in task.fields_of(method.head)]
        if lacking:
            raise UserError(f"{where}: needs {', '.join(lacking)}, which task {task.name} does not give")
        for split in (stage.split, *(["dev"] if stage.select is not None else [])):
            if split not in task.splits():
                raise UserError(f"{where}: task {task.name} has no split '{split}'")
        if stage.select is not None and type(task).outputs is Task.outputs:
            raise UserError(f"{where}: task {task.name} gives no answers to select by")
        tokenizer = self.tokenizer(role)
        longest = task.encoder(tokenizer, method.head).longest(0)
        longest += stage_training(stage).position_offset
        first = self.first_head(role)
        models.check_positions(self.run.roles[role], tokenizer, longest, self.places.runs, first)

    def _heads(self, role: str) -> list[str]:
        """The head of a role's model before each of its stages, and at the end."""
        stages = self.run.roles[role].stages
        return [*(registry.load_distiller(stage.method).head for stage in stages), self.head]

    def first_head(self, role: str) -> str:
        """Return the head of a role's model before its first stage."""
        return self._heads(role)[0]

    def key(self, role: str) -> str:
        """Return the content identity of a role's model as the run uses it."""
        if role in self.linked:
            return digest(*self.linked[role].runs)
        return self.stage_keys(role)[-1] if self.run.roles[role].stages else self._start_key(role)

    def _start_key(self, role: str) -> str:
        """The identity of a role's model before its own stages."""
        spec = self.run.roles[role]
        revision = models.model_revision(spec, self.places.runs)
        fresh = spec.seed if spec.architecture is not None else None
        return digest(revision, fresh, tokenizer_hash(self.tokenizer(role)))

    def _stage_key(self, before: str, stage: Stage, number: int) -> str:
        task = self._stage_task(stage)
        code = registry.code_hash(
            registry.code_files([stage.method], [stage.task or self.run.task], stage=True)
        )
        told: dict[str, Any] = {
            "method": registry.stem(stage.method),
            "settings": stage.settings,
            "number": number,
            "split": stage.split,
            "training": {k: v for k, v in stage.training.items() if k not in _COSMETIC},
            "device": self.run.device.split(":")[0],
            "threads": self.run.threads,
        }
        if stage.select is not None:
            evaluation = self.run.evaluation
            told["select"] = [to_dict(stage.select), to_dict(evaluation.decode), evaluation.limit]
            told["select"] += [evaluation.generation_seeds[0], evaluation.batch_size]
            scoring = [registry.find("analyses", name) for name in self.run.analyses]
            told["select"] += [self.run.analyses, registry.code_hash(scoring)]
        return digest(before, told, self.revision(task), code, dict(library_versions()), stage_seed(stage))

    def _stage_task(self, stage: Stage) -> Task:
        return self.task() if stage.task is None else self.task(stage.task, stage.task_settings)

    def steps(self, role: str) -> int:
        """Return the optimizer steps of the stages behind a role's model."""
        return sum(stage_training(stage).optimizer_steps for stage in self.run.roles[role].stages)

    def _folder(self, key: str) -> Path:
        return self.places.cache / "stages" / key

    def stage_keys(self, role: str) -> list[str]:
        """Return the content identity of a role's model after each of its own stages."""
        if role in self.linked:
            return []
        key, keys = self._start_key(role), []
        for number, stage in enumerate(self.run.roles[role].stages):
            key = self._stage_key(key, stage, number)
            keys.append(key)
        return keys

    def trained(self, key: str) -> bool:
        """Whether the cache has the model of a stage."""
        return (self._folder(key) / "model").is_dir()

    def model(self, role: str, stages: int | None = None) -> nn.Module:
        """Return a role's model, training the stages behind it where the cache has them not.

        Args: `stages`: only so many of its stages; None: all.
        """
        spec, heads = self.run.roles[role], self._heads(role)
        seeds = [*map(stage_seed, spec.stages), self.run.seed]  # of the weights of a head that is new
        seed = seeds[0] if spec.architecture is None else spec.seed or 0
        count = len(spec.stages) if stages is None else stages
        keys = self.stage_keys(role)
        done = next((n for n in range(count, 0, -1) if self.trained(keys[n - 1])), 0)

        def at(number: int) -> nn.Module:
            """The model after so many stages, as the next one, or the run, needs it."""
            stage = spec.stages[number] if number < len(spec.stages) else None
            if not number:
                return self._load(role, spec, stream_seed(seed, "weights"), heads[0], stage)
            kept = ModelSpec(model=str(self._folder(keys[number - 1]) / "model"))
            return self._load(role, kept, stream_seed(seeds[number], "weights"), heads[number], stage)

        for number in range(done, count):
            stage_stream = stream_seed(seeds[number], "stage", number)
            self._train_once(role, at(number), spec.stages[number], keys[number], stage_stream)
        model: Any = at(count)
        model.kdbench_key = self.key(role) if count == len(spec.stages) else ""
        return cast(nn.Module, model)

    def models(self) -> dict[str, nn.Module]:
        """Return the models of all roles, training the stages behind them where the cache has them not.

        Those of other rows' runs stand on the student's encoder, which they share.
        """
        found = {role: self.model(role) for role in self.own}
        for role, spec in self.linked.items():
            runs = [PromptedEncoder.load(self._made(role, run), found["student"]) for run in spec.runs]
            found[role] = runs[0] if spec.each is None else nn.ModuleList(runs)
        return {role: found[role] for role in self.run.roles}

    def _made(self, role: str, run: str) -> Path:
        """The folder of the model that a run of another row made.

        Raises: UserError where the run is not finished, or its model is gone.
        """
        folder = self.places.runs / self.run.board / run
        whose = f"roles.{role}: run {run} of the row '{self.run.roles[role].row}'"
        if not (folder / "record.json").is_file():
            raise UserError(f"{whose} is not there: {folder}")
        record = load(folder / "record.json")
        if record.status != "done":
            raise UserError(f"{whose} {record.status}: {record.reason}")
        if not (folder / "student").is_dir():
            raise UserError(f"{whose} has no model left; remove {folder} and it is made again")
        return folder / "student"

    def saved(self, role: str, folder: Path) -> nn.Module:
        """Return the model that a run saved in `folder`, as this role. Raises: UserError where it is none."""
        return self._load(role, ModelSpec(model=str(folder)), 0, self.head, None)

    def stage(self, role: str, key: str) -> nn.Module:
        """Return the model of the stage with this key where the cache has it, else the role's model as it is
        now.
        """
        return self.saved(role, self._folder(key) / "model") if self.trained(key) else self.model(role)

    def _load(self, role: str, spec: ModelSpec, seed: int, head: str, stage: Stage | None) -> nn.Module:
        """Load a model as a stage, or the run, trains it: cut to the shared ids, configured for the task, and
        able to encode a text for its soft prompt.
        """
        tokenizer, vocab = self.tokenizer(role), self.shared_vocabulary()
        settings = (self.task() if stage is None else self._stage_task(stage)).model_settings()
        model: Any = models.load_model(
            spec,
            tokenizer,
            seed,
            vocab=vocab,
            runs=self.places.runs,
            head=head,
            settings=settings,
            new_head=stage is not None or role == "student",  # it is trained next
        )
        model.to(self.run.device)
        model.kdbench_encode = lambda text: list(tokenizer(text)["input_ids"])
        model.kdbench_pad = tokenizer.pad_token_id
        for part in (model, model.base_model):  # rows are right padded or masked, and the check costs a copy
            part.warn_if_padding_and_no_attention_mask = lambda ids, mask: None
        return cast(nn.Module, model)

    def _train_once(self, role: str, model: nn.Module, stage: Stage, key: str, seed: int) -> None:
        """Train a stage into the cache, or wait until another process has."""
        final, work = self._folder(key), self._folder(key + ".work")
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{final}.lock"):
            if not (final / "model").is_dir():
                seconds = self._train(role, model, stage, key, seed, work)
                told = {"role": role, "stage": stage.name, "key": key, "seconds": seconds}
                (work / "stage.json").write_text(json.dumps(told))
                work.rename(final)
            shutil.rmtree(final / "checkpoint", ignore_errors=True)

    def _train(self, role: str, model: nn.Module, stage: Stage, key: str, seed: int, work: Path) -> float:
        """Train a stage into `work`; return the seconds that it took, those before a kill included."""
        training = stage_training(stage)
        method = registry.load_distiller(stage.method)
        owner = f"{role}: stage '{stage.name}'"
        distiller = build(
            method, stage.settings, lambda r: model if r == "student" else self.model(r), seed, owner
        )
        task = self._stage_task(stage)
        encoders = {"student": task.encoder(self.tokenizer(role), method.head)}
        source = TaskSource(task, stage.split, encoders)
        solo = Processes(self.run.device, training.precision, solo=True)
        selection = Selection(
            stage.select or Select(),
            self.run.analyses,
            lambda model: self.answers(model, task, "dev", encoders["student"], dev=True),
        )
        trainer = Trainer(
            distiller,
            source,
            training,
            seed,
            processes=solo,
            folder=work,
            identity=key,
            milestones=selection.milestones(training.optimizer_steps),
        )
        selection.trainer = trainer
        try:
            trainer.fit(progress=self.places.progress, label=f"{role} {stage.name}")
        except OutOfMemory as error:
            raise OutOfMemory(f"roles.{role}: stage '{stage.name}': {error}") from error
        selection.finish()
        models.save_student(
            cast(PreTrainedModel, distiller.predictor()), self.tokenizer(role), work / "model"
        )
        return round(sum(entry["seconds"] for entry in trainer.clock.state().values()), 1)

    # ---- answers
    def answers(
        self, model: nn.Module, task: Task, split: str, encoder: Encoder, dev: bool = False
    ) -> list[dict[str, Any]]:
        """Return a model's answers to a split; for `dev`, those of one generation seed, with no n-gram banned
        and no bar.
        """
        evaluation = self.run.evaluation
        decode = replace(evaluation.decode, no_repeat_ngram=0) if dev else evaluation.decode
        seeds = evaluation.generation_seeds[:1] if dev else evaluation.generation_seeds
        shown = self.places.progress and not dev
        return task.outputs(
            model, split, encoder, decode, seeds, evaluation.batch_size, evaluation.limit, shown
        )

    def stage_seconds(self) -> dict[str, float]:
        """Return how long each trained stage behind the run's models took, by name."""
        found = {}
        for role, spec in self.run.roles.items():
            for key, stage in zip(self.stage_keys(role), spec.stages, strict=True):
                path = self._folder(key) / "stage.json"
                if path.is_file() and (seconds := json.loads(path.read_text()).get("seconds")) is not None:
                    found[stage.name] = float(seconds)
        return found

    # ---- what prepare makes
    def data(self, trainer: Trainer) -> SourceData:
        """Return the rows that a method may read before and after its training."""
        sources: dict[str, Source] = {"train": trainer.source, **trainer.extras}
        if "dev" in self.task().splits():
            sources["dev"] = self.source("dev")
        return SourceData(sources, trainer.rollout_batch, trainer.processes.device, self.places.progress)

    def prepare(self, trainer: Trainer) -> None:
        """Let the distiller prepare, or put back what it prepared before; cached by content.

        Rows that it made take the place of the trainer's training rows, or of an extra set.
        """
        distiller = trainer.distiller
        if type(distiller).prepare is Distiller.prepare:
            return
        final = self.places.cache / "prepared" / self._prepare_key(distiller)
        work = final.with_name(final.name + ".work")
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{final}.lock"):
            if not final.is_dir():
                before = trainer.clock.state()
                made = trainer.prepare(self.data(trainer)) or {}
                if foreign := set(made) - {"train", *trainer.extras}:
                    known = ", ".join(["train", *trainer.extras])
                    raise UserError(
                        f"{self.run.method}: prepare returned rows '{min(foreign)}'. Known: {known}."
                    )
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                for name, rows in made.items():
                    rows.save(work / f"{name}.rows.safetensors")
                save_file(_on_cpu(trainer.prepared_tensors()), work / "shared.safetensors")
                save_file(_on_cpu(trainer.own_tensors()), work / "own.safetensors")
                told = {
                    "counters": trainer.counters,
                    "state": distiller.state,
                    "group_updates": {name: one.updates for name, one in trainer.optimizers.items()},
                    "clock": spent(before, trainer.clock.state()),
                }
                (work / "prepared.json").write_text(json.dumps(told))
                work.rename(final)
            else:
                told = json.loads((final / "prepared.json").read_text())
                shared = {**trainer.shared_tensors(), **load_file(final / "shared.safetensors")}
                trainer.load_tensors(shared, load_file(final / "own.safetensors"))
                trainer.counters.update(told["counters"])
                for name, count in told["group_updates"].items():
                    trainer.optimizers[name].updates = count
                distiller.state = told["state"]
                trainer.clock.add(told["clock"])
        for path in final.glob("*.rows.safetensors"):
            trainer.replace_rows(path.name.removesuffix(".rows.safetensors"), Batch.load(path))

    def _prepare_key(self, distiller: Distiller) -> str:
        """The identity of everything that `prepare` may read."""
        run, reads = self.run, distiller.prepare_reads
        settings = {k: v for k, v in run.settings.items() if reads is None or k in reads}
        training: dict[str, Any] = {}
        if set(distiller.groups()) - {"student"}:  # prepare may update them, by the optimizer's settings
            training = {k: v for k, v in to_dict(run.training).items() if k not in _COSMETIC}
        code = registry.code_hash(registry.code_files([run.method], run.tasks, stage=True))
        return digest(
            registry.stem(run.method),
            settings,
            code,
            dict(library_versions()),
            {role: self.key(role) for role in run.roles},
            self.revisions(),
            {name: [data.task, data.task_settings, data.split] for name, data in run.extra.items()},
            training,
            [run.seed, run.training.max_new_tokens, run.training.precision],
            [run.training.matmul, run.training.teacher_precision],
            [run.device.split(":")[0], run.threads, run.training.rollout_batch or run.training.batch_size],
        )


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
