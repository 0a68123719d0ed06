"""What a step of each method costs at a board's true sizes: seconds by phase, tokens, memory, share of what
the machine can do.

A step is a visit, or several, up to one that updates the student; its seconds are divided by the updates that
it made. Each method is measured in a process of its own, in this order: one step to warm up, `steps` timed
steps, up to three with a clock that looks into the phases (which costs time of its own, so that their sum is
a little more than the timed step), and one in which operations are counted, and the resident set watched.

The limit is the time that the counted operations take at the machine's measured rate of matrix products;
sampling takes at least as long as its decoding steps need to read weights and cache at the rate of copying.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from kdbench import flops, models, registry, stages
from kdbench.clock import Clock, phase, running
from kdbench.config import Architecture, ModelSpec, RunConfig, TrainingConfig, check_settings
from kdbench.distiller import Batch, Distiller
from kdbench.errors import Diverged, OutOfMemory, UserError
from kdbench.harness import IDLE_VISITS, BatchSource, Source, SourceData, Trainer
from kdbench.memory import out_of_memory
from kdbench.paths import configs_dir
from kdbench.processes import Processes, matmul_precision
from kdbench.profile_report import PARTS, Machine, Measured
from kdbench.strict import read_toml
from kdbench.task import Task

ENDLESS = 10**9  # optimizer steps: no budget ends a step that is measured
FEWEST_ROWS = 16
DETAILED = 3  # steps with a detailed clock at most
SAMPLE = ("rollout", "prefill", "decode")
MASK, FIRST_WORD = 3, 4  # ids of synthetic rows: special ones, then words
_NO_ROLE = ("update", "data", "forward", "")


# ---- what to measure
@dataclass(frozen=True)
class Wanted:
    """How steps are measured.

    `random`: fresh weights and synthetic rows of `prompt` and `response` tokens (None: the task's longest);
    `vocabulary`: tokens of a fresh model whose tokenizer is not here. Without `random` models and rows are
    the run's own.
    """

    steps: int = 5
    random: bool = False
    prompt: int | None = None
    response: int | None = None
    vocabulary: int | None = None


def machine_of(run: RunConfig) -> Machine:
    """Measure the machine on the run's device, with its precisions and threads."""
    torch.set_num_threads(run.threads)
    device, training = torch.device(run.device), run.training
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    precisions = {training.precision, training.teacher_precision or training.precision}
    with matmul_precision(training.matmul):
        rates = {str(one): flops.matmul_rate(device, one) for one in sorted(precisions)}
    return Machine(name, run.threads, training.matmul, rates, flops.copy_rate(device))


# ---- models and rows of a run
class Trained:
    """A run's own models, trained first where the cache lacks them, and some of its own rows."""

    def __init__(self, run: RunConfig, places: stages.Places, wanted: Wanted) -> None:
        self.materials = stages.Materials(run, places)
        self.count = max(FEWEST_ROWS, 4 * run.training.batch_size)

    def model(self, role: str) -> nn.Module:
        """Return the model of a role."""
        return self.materials.model(role)

    def source(self, name: str) -> Source | None:
        """Return rows of "train", "dev" or an extra set; None where there are none."""
        run, data = self.materials.run, self.materials.run.extra.get(name)
        if data is not None:
            task = self.materials.task(data.task, data.task_settings)
            return _some(self.materials.source(data.split, task), self.count)
        if name in run.extra or name in self.materials.task().splits():
            return _some(self.materials.source(name), self.count)
        return None


def _some(source: stages.TaskSource, count: int) -> Source:
    """Rows of a source, spread over it: all of its lengths without all of its rows."""
    kept = min(count, len(source))
    source.rows = [source.rows[i * len(source.rows) // kept] for i in range(kept)]
    return source


class _Sizes:
    """Stands for a tokenizer of which nothing but its size and special ids is asked."""

    def __init__(self, size: int, causal: bool) -> None:
        self.size = size
        self.eos_token_id = size - 1
        self.cls_token_id, self.sep_token_id, self.mask_token_id = 0, 2, None if causal else MASK
        self.pad_token_id = size - 1 if causal else 1

    def get_vocab(self) -> dict[str, int]:
        """The last id alone: what the size is read from."""
        return {"": self.size - 1}


class Fresh:
    """Random models of the run's shapes, and synthetic rows; neither data nor weights are read.

    No response ends: the end of a sequence is no token of these models, so that a sampled response has as
    many tokens as the board allows.
    """

    def __init__(self, run: RunConfig, places: stages.Places, wanted: Wanted) -> None:
        """Raises: UserError for a model or tokenizer whose size is not known here, for rows that the method
        needs and nobody can make up, and for rows that a model has no positions for.
        """
        self.run, self.places, self.wanted = run, places, wanted
        self.method = registry.load_distiller(run.method)
        if self.method.head not in _ROWS:
            raise UserError(
                f"{run.method}: its head is {self.method.head}; random rows can be made for "
                f"{', '.join(_ROWS)}"
            )
        self.causal = models.HEADS[self.method.head].one_vocabulary
        self.task = _task(run.task, run.task_settings, places.data_root)
        self.configs = {role: self._config(role, spec) for role, spec in run.roles.items()}
        sizes = {role: int(one.get_text_config().vocab_size) for role, one in self.configs.items()}
        self.vocab = {role: min(sizes.values()) if self.causal else size for role, size in sizes.items()}
        self.lengths = self._lengths("train", self.task)
        self.count = max(FEWEST_ROWS, run.training.batch_size)
        self.said = f"{' + '.join(str(n) for n in self.lengths if n)} random tokens"
        self._check()

    def _config(self, role: str, spec: ModelSpec) -> Any:
        """The configuration of a role's model: fresh, from the list of shapes, or a folder's or the hub's."""
        head, known = models.HEADS[self.method.head], _shapes()
        if spec.architecture is None and spec.model in known:
            spec = dataclasses.replace(spec, model="", architecture=known[spec.model])
        if spec.architecture is not None:
            size = spec.architecture.config.get("vocab_size") or self._vocabulary(role, spec)
            told: Any = _Sizes(int(size), self.causal)
            config: Any = models.load_config(
                ModelSpec(architecture=spec.architecture), told, head=self.method.head
            )
        elif spec.model.startswith("run:"):
            config = models.load_config(spec, _Sizes(0, self.causal), self.places.runs, self.method.head)  # type: ignore[arg-type]
        else:
            try:
                config = AutoConfig.from_pretrained(spec.model, revision=spec.revision, **models.NO_CODE)
            except Exception as error:  # missing repository, network, unreadable file: one line for all
                line = (str(error).strip().splitlines() or [""])[0]
                why = f"{type(error).__name__}: {line}"
                raise UserError(
                    f"roles.{role}: model '{spec.model}': its config cannot be read: {why}"
                ) from error
            if config.model_type not in head.types:
                raise UserError(f"roles.{role}: model {spec.model}: '{config.model_type}' is no {head.what}")
        for name, value in self.task.model_settings().items():
            setattr(config, name, value)
        if not self.causal:
            config.mask_token_id = MASK
        if (size := int(config.get_text_config().vocab_size)) < 2 * FEWEST_ROWS:
            raise UserError(f"roles.{role}: a vocabulary of {size} is too small for random rows")
        return config

    def _vocabulary(self, role: str, spec: ModelSpec) -> int:
        """How many tokens the tokenizer of a fresh model has. Raises: UserError where nobody knows."""
        name, root = spec.tokenizer or "task", self.places.data_root
        if self.wanted.vocabulary is not None:
            return self.wanted.vocabulary
        if name.startswith("train:") and name.rpartition(":")[2].isdigit():
            return int(name.rpartition(":")[2])
        known = read_toml(_shapes_file()).get("vocabularies", {})
        if name in known and (root is None or not (root / name.removeprefix("data:")).is_dir()):
            return int(known[name])
        try:
            return models.vocabulary(models.load_tokenizer(spec, self.task, root, head=self.method.head))
        except UserError as error:
            raise UserError(f"roles.{role}: {error}; or say --vocabulary N") from error

    def _lengths(self, name: str, task: Task) -> tuple[int, int]:
        """Prompt and response tokens of rows of a task: asked for, or the longest that its limits allow."""
        settings, wanted = task.settings, self.wanted
        longest: int | None = getattr(settings, "max_length", None) or None
        if not self.causal:
            limits = getattr(task, "limits", None)
            whole = wanted.prompt or (limits()[0] if limits is not None else longest)
            if whole is None:
                raise UserError(
                    f"task {task.name}: the length of its rows is not known; say --prompt-tokens N"
                )
            return int(whole), 0
        most: int | None = getattr(settings, "max_prompt", None)
        if most is None and longest is not None:  # text without a prompt: all of it is predicted
            return 1, longest - 1
        prompt = wanted.prompt if wanted.prompt is not None else most
        if prompt is None:
            raise UserError(f"task {task.name}: the length of its rows is not known; say --prompt-tokens N")
        response = wanted.response
        if response is None:
            response = self.run.training.max_new_tokens
            if longest is not None and wanted.prompt is None:
                response = min(response, longest - prompt)
        return prompt, response

    def _check(self) -> None:
        run, method = self.run, self.method
        fields = self._row_fields(self.task)
        lacking = [one for one in method.needs if one.rpartition(".")[2] not in fields]
        if lacking:
            raise UserError(f"{run.method}: needs {', '.join(lacking)}, of which no random rows can be made")
        cfg = check_settings(method.Config, run.settings, registry.stem(run.method))
        added = method.added_positions(cfg)
        prompt, response = self.lengths
        new = max(response, run.training.max_new_tokens if self.causal else 0)
        for role, config in self.configs.items():
            known = getattr(config.get_text_config(), "max_position_embeddings", None)
            longest = prompt + new + run.training.position_offset + added.get(role, 0)
            if known is not None and longest - 1 > known:
                raise UserError(
                    f"roles.{role}: has {known} positions, {prompt} + {new} tokens and what stands before "
                    f"them need {longest - 1}; say fewer with --prompt-tokens and --response-tokens"
                )

    def _row_fields(self, task: Task) -> list[str]:
        made = _ROWS[self.method.head](1, 4, 1, 64, 2, False)
        return [name for name in task.fields_of(self.method.head) if name in made]

    def model(self, role: str) -> nn.Module:
        """Return a model of a role's shape with random weights, ready as `stages` makes them ready."""
        config, head = self.configs[role], models.HEADS[self.method.head]
        with torch.random.fork_rng(devices=[]), torch.device(self.run.device):
            torch.manual_seed(0)
            model: Any = head.auto.from_config(config, dtype=torch.float32)
        model.to(self.run.device)
        model.config.pad_token_id = self.vocab[role] - 1 if self.causal else 1
        if self.causal:
            model.config.eos_token_id = None
            if model.generation_config is not None:
                model.generation_config.eos_token_id = None
            if self.vocab[role] < model.config.get_text_config().vocab_size:
                model.config.kdbench_vocab = self.vocab[role]
        words = self.vocab[role] - FIRST_WORD - 1
        model.kdbench_encode = lambda text: [FIRST_WORD + i % words for i in range(len(text.split()))]
        model.kdbench_pad = model.config.pad_token_id
        for part in (model, model.base_model):
            part.warn_if_padding_and_no_attention_mask = lambda ids, mask: None
        model.eval()
        assert isinstance(model, nn.Module)
        return model

    def source(self, name: str) -> Source | None:
        """Return rows of "train", "dev" or an extra set; None where the run has no such set."""
        data = self.run.extra.get(name)
        if name not in ("train", "dev") and data is None:
            return None
        task, lengths, labelled = self.task, self.lengths, True
        if data is not None and data.task is not None:
            settings = data.task_settings
            if data.task != self.run.task:
                task = _task(data.task, settings, self.places.data_root)
                lengths = self._lengths(name, task)
            labelled = data.split in ("train", "dev")
        fields = self._row_fields(task)
        classes = int(task.model_settings().get("num_labels", 2))
        numbers = {"train": 0, "dev": 1}
        first = numbers.get(name, 2 + sorted(self.run.extra).index(name) if name in self.run.extra else 2)
        rows: dict[str, Tensor] = {}
        roles = ["student", *(role for role in self.run.roles if role != "student" and not self.causal)]
        for role in roles:
            size = self.vocab[role] if role in self.vocab else min(self.vocab.values())
            made = _ROWS[self.method.head](self.count, *lengths, size, classes, labelled)
            for key in fields:
                if role == "student":
                    rows[key] = made[key]
                elif key not in ("example_id", "class_label"):
                    rows[f"{role}.{key}"] = made[key]
        rows["example_id"] = rows["example_id"] + first * self.count
        return BatchSource(Batch(rows))


def _causal_rows(
    count: int, prompt: int, response: int, vocab: int, classes: int, labelled: bool
) -> dict[str, Tensor]:
    """Rows of random ids, all of one length."""
    draw = torch.Generator().manual_seed(0)
    return {
        "example_id": torch.arange(count),
        "input_ids": torch.randint(FIRST_WORD, vocab, (count, prompt + response), generator=draw),
        "prompt_length": torch.full((count,), prompt),
        "length": torch.full((count,), prompt + response),
    }


def _class_rows(
    count: int, prompt: int, response: int, vocab: int, classes: int, labelled: bool
) -> dict[str, Tensor]:
    """Rows of random ids with all that masked models and classifiers may read; the mask is last but one."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_WORD + classes, vocab, (count, prompt), generator=draw)
    mask = max(prompt - 2, 0)
    ids[:, mask] = MASK
    words = torch.arange(prompt) - 1
    words[-1] = -1
    return {
        "example_id": torch.arange(count),
        "class_label": torch.arange(count) % classes if labelled else torch.full((count,), -1),
        "input_ids": ids,
        "length": torch.full((count,), prompt),
        "mask_index": torch.full((count,), mask),
        "verbalizer_ids": (FIRST_WORD + torch.arange(classes)).repeat(count, 1),
        "segment_ids": torch.zeros(count, prompt, dtype=torch.long),
        "word_index": words.repeat(count, 1),
        "cloze_index": torch.full((count,), -1),
    }


_ROWS: dict[str, Callable[[int, int, int, int, int, bool], dict[str, Tensor]]] = {
    "causal_lm": _causal_rows,
    "masked_lm": _class_rows,
    "sequence": _class_rows,
}


def _task(name: str, settings: Mapping[str, Any], root: Path | None) -> Task:
    """A task, also where its data is not here: then as far as its base class makes it.

    Raises: UserError for wrong settings.
    """
    cls = registry.load_task(name)
    filled = check_settings(cls.Settings, settings, f"task {registry.stem(name)}")
    try:
        return cls(filled, root)
    except UserError:
        for base in cls.__mro__[1:]:
            if issubclass(base, Task):
                task = cls.__new__(cls)
                base.__init__(task, filled, root)
                return task
        raise


def _shapes_file() -> Path:
    return configs_dir() / "shapes.toml"


def _shapes() -> dict[str, Architecture]:
    """The shapes of models on the hub that are known without it."""
    told = read_toml(_shapes_file())
    return {
        name: Architecture(one["model_type"], dict(one["config"]))
        for name, one in told.items()
        if "model_type" in one
    }


def parts_of(run: RunConfig, places: stages.Places, wanted: Wanted) -> Trained | Fresh:
    """Return what makes models and rows. Raises: UserError for what cannot be had."""
    return (Fresh if wanted.random else Trained)(run, places, wanted)


# ---- measuring
def measure(
    run: RunConfig, places: stages.Places, wanted: Wanted, machine: Machine | None = None
) -> Measured:
    """Measure the steps of one run, in this process; without `machine` the limit is left out.

    Raises: UserError for what cannot be had. What a method itself runs into is the result's `error`.
    """
    torch.set_num_threads(run.threads)
    before, run = _resident(), _as_wanted(run, wanted)
    parts = parts_of(run, places, wanted)
    method = registry.load_distiller(run.method)
    made = Measured(
        row=run.row,
        title=run.title,
        method=registry.stem(run.method),
        device=run.device,
        precision=run.training.precision,
        threads=run.threads,
        rows="random" if wanted.random else "the board's",
        board_steps=run.training.optimizer_steps,
    )
    try:
        roles = {role: parts.model(role) for role in stages.needed_roles(method)}
        trainer = _trainer(run, method, roles, parts)
        made.batch, made.micro_batch = trainer.training.batch_size, trainer.micro_batch
        made.models = {role: sum(p.numel() for p in model.parameters()) for role, model in roles.items()}
        _prepare(made, trainer, parts)
        _measure(made, trainer, wanted, before)
        if machine is not None:
            _limit(made, run, roles["student"], machine)
    except Diverged as error:
        made.error = f"diverged: {error}"
    except Exception as error:
        if not isinstance(error, OutOfMemory) and not out_of_memory(error):
            raise
        made.error = str(error) if isinstance(error, OutOfMemory) else "out of memory"
    return made


def _as_wanted(run: RunConfig, wanted: Wanted) -> RunConfig:
    """The run, sampling as many tokens as a response is wanted to have."""
    if wanted.response is None:
        return run
    return dataclasses.replace(
        run, training=dataclasses.replace(run.training, max_new_tokens=wanted.response)
    )


def _trainer(
    run: RunConfig, method: type[Distiller], roles: Mapping[str, nn.Module], parts: Trained | Fresh
) -> Trainer:
    """The trainer of a run without an end, a folder or anybody who listens."""
    name = registry.stem(run.method)
    distiller = stages.build(method, run.settings, roles.__getitem__, run.seed, name)
    training: TrainingConfig = dataclasses.replace(run.training, optimizer_steps=ENDLESS, checkpoint_every=0)
    source = parts.source("train")
    assert source is not None
    extras = {name: made for name in run.extra if (made := parts.source(name)) is not None}
    processes = Processes(run.device, training.precision, solo=True)
    return Trainer(distiller, source, training, run.seed, processes=processes, extras=extras)


def _prepare(made: Measured, trainer: Trainer, parts: Trained | Fresh) -> None:
    """Let the method prepare, if it does."""
    if type(trainer.distiller).prepare is Distiller.prepare:
        return
    sources: dict[str, Source] = {"train": trainer.source, **trainer.extras}
    if (dev := parts.source("dev")) is not None:
        sources["dev"] = dev
    start = time.perf_counter()
    rows = trainer.prepare(SourceData(sources, trainer.rollout_batch, trainer.processes.device)) or {}
    flops.synchronize(trainer.processes.device)
    made.prepare_seconds, made.prepare_rows = time.perf_counter() - start, len(trainer.source)
    for name, batch in rows.items():
        trainer.replace_rows(name, batch)


def _step(trainer: Trainer, clock: Clock) -> tuple[float, int]:
    """Go through visits up to one that updates the student; return their seconds and its updates."""
    device, done, visits = trainer.processes.device, trainer.updates, 0
    trainer.clock = clock
    flops.synchronize(device)
    start = time.perf_counter()
    with running(clock):
        while trainer.updates == done:
            if visits > IDLE_VISITS:
                raise UserError(f"{visits} visits in a row made no update of the student")
            with phase("update"):  # what a visit does in no phase of its own
                trainer.one_visit()
            visits += 1
    flops.synchronize(device)
    return time.perf_counter() - start, trainer.updates - done


def _measure(made: Measured, trainer: Trainer, wanted: Wanted, before: int) -> None:
    device = trainer.processes.device
    _step(trainer, Clock())
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, counted, clock = trainer.updates, dict(trainer.counters), Clock()
    for _ in range(wanted.steps):
        seconds, updates = _step(trainer, clock)
        made.seconds.append(seconds / updates)
    done = trainer.updates - first
    made.updates_per_step = done / wanted.steps
    each = {name: (amount - counted.get(name, 0.0)) / done for name, amount in trainer.counters.items()}
    made.trained_tokens, made.sampled_tokens = each["tokens_seen"], each["tokens_sampled"]
    made.prompt_tokens, made.response_tokens = _lengths_of(trainer.source)
    if device.type == "cuda":
        entries = clock.phases.values()
        made.peak_allocated_bytes = max(one.peak_allocated_bytes for one in entries)
        made.peak_reserved_bytes = max(one.peak_reserved_bytes for one in entries)
    _in_detail(made, trainer, min(wanted.steps, DETAILED))
    clock, first = Clock(detailed=True), trainer.updates
    with flops.FlopCounter(clock) as counter, _watched(device) as peak:
        _step(trainer, clock)
    made.flops = _by_part(counter.found, trainer.updates - first)
    if peak and before:
        made.peak_rss_growth_bytes = max(peak[0] - before, 0)


def _in_detail(made: Measured, trainer: Trainer, steps: int) -> None:
    """Time the phases."""
    clock, first, total = Clock(detailed=True), trainer.updates, 0.0
    for _ in range(steps):
        total += _step(trainer, clock)[0]
    done = trainer.updates - first
    made.detailed_seconds = total / done
    made.phases = _by_part({name: one.seconds for name, one in clock.phases.items()}, done)
    made.phases["other"] += made.detailed_seconds - sum(made.phases.values())


def _by_part(by_phase: Mapping[str, float], updates: int) -> dict[str, float]:
    """Amounts per update: of sampling, each role, divergence, backward, optimizer and the rest."""
    roles = [name for name in by_phase if name not in (*SAMPLE, *PARTS, *_NO_ROLE)]
    found = dict.fromkeys(["sample", *roles, *PARTS[1:]], 0.0)
    for name, amount in by_phase.items():
        part = "sample" if name in SAMPLE else name if name in found else "other"
        found[part] += amount / updates
    return found


def _lengths_of(source: Source) -> tuple[float, float]:
    """Mean tokens of prompt and response."""
    batch = source.batch(range(len(source)))
    length = float(batch["length"].double().mean())
    prompt = float(batch["prompt_length"].double().mean()) if "prompt_length" in batch else length
    return prompt, length - prompt


def _limit(made: Measured, run: RunConfig, student: nn.Module, machine: Machine) -> None:
    """Put the least seconds of an update into the result: operations at the measured rate, and for decoding
    the bytes that the student's steps read at the rate of copying, where that takes longer.
    """
    training = run.training
    own = machine.flops_per_s[training.precision]
    other = machine.flops_per_s[training.teacher_precision or training.precision]
    rates = {**dict.fromkeys(made.models, other), "student": own}  # where models share a part, the better one
    sampling, seconds = made.flops.get("sample", 0.0), 0.0
    for part, operations in made.flops.items():
        if part != "sample":
            seconds += operations / rates.get(part, max(own, other))
    if made.sampled_tokens:
        shape, new = flops.shape_of(student), training.max_new_tokens
        rows = min(training.rollout_batch or made.batch, made.batch)
        times = made.sampled_tokens / (rows * new)  # how many full rollouts of that many rows
        each = 2 if training.precision == "bf16" else 4
        made.decode_bytes = times * flops.decode_bytes(shape, rows, made.prompt_tokens, new, each)
        if run.device.startswith("cuda"):  # a captured graph shows the operations of one of its many steps
            sampling = max(sampling, times * flops.decode_flops(shape, rows, made.prompt_tokens, new))
            made.flops["sample"] = sampling
        seconds += max(sampling / own, made.decode_bytes / machine.bytes_per_s)
    made.limit_seconds = seconds


def _resident() -> int:
    """The resident set in bytes, after what is free was given back; 0 where the kernel does not tell."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return _resident_now()


def _resident_now() -> int:
    with suppress(OSError, ValueError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@contextmanager
def _watched(device: torch.device) -> Iterator[list[int]]:
    """The largest resident set while the block runs, looked at every millisecond; nothing on a GPU."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _resident_now())
            done.wait(1e-3)

    if device.type == "cuda":
        yield []
        return
    _resident()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


# ---- in processes of its own
def measure_all(
    runs: Sequence[RunConfig], places: stages.Places, wanted: Wanted, say: Callable[[str], None]
) -> tuple[Machine, list[Measured]]:
    """Measure each run in a fresh process, one after the other, so that memory is each one's own.

    Raises: UserError that a process raised.
    """
    fresh = stages.Places(places.runs, places.cache, places.data_root, places.progress)
    machine = _apart(machine_of, runs[0])
    assert isinstance(machine, Machine)
    found = []
    for number, run in enumerate(runs, 1):
        start = time.monotonic()
        made = _apart(measure, run, fresh, wanted, machine)
        if not isinstance(made, Measured):
            made = Measured(row=run.row, title=run.title, method=registry.stem(run.method), error=str(made))
        found.append(made)
        ended = made.error or f"done in {time.monotonic() - start:.0f} s"
        say(f"{run.row} ({number} of {len(runs)}): {ended}")
    return machine, found


def _apart(action: Callable[..., Any], *args: Any) -> Any:
    """What `action` returns in a process of its own, or the text of what it raised. Raises: UserError."""
    forking = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forking else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, action, args), daemon=True)
    process.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        kind, value = "failed", f"its process ended with exit code {process.exitcode}; was memory short?"
    finally:
        receiver.close()
        if process.is_alive():
            process.join(1)
            process.kill()
        process.join()
    if kind == "refused":
        raise UserError(value)
    return value


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _child(sender: Connection, action: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from kdbench.commands import silence

    silence()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    try:
        sender.send(("made", action(*args)))
    except UserError as error:
        sender.send(("refused", str(error)))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        sender.send(("failed", f"{type(error).__name__}: {said} ({place})"))
    sender.close()


def forecast(runs: Sequence[RunConfig], places: stages.Places, wanted: Wanted) -> str:
    """Say what would be measured: sizes of batches, rows and models, stages to train first. Loads nothing.

    Raises: UserError as measuring would.
    """
    table = [
        ["", "method", "batch", "micro-batch", "rows", "precision", "device", "models", "to train first"]
    ]
    counts: dict[str, int] = {}
    for given in runs:
        run = _as_wanted(given, wanted)
        parts, training = parts_of(run, places, wanted), run.training
        rows, sizes, missing = "the board's", "as they are", list[str]()
        if isinstance(parts, Fresh):
            rows = parts.said
            told = {role: _parameters(parts, role, counts) for role in run.roles}
            sizes = ", ".join(f"{role} {count / 1e6:,.2f} M" for role, count in told.items())
        else:
            for role, spec in run.roles.items():
                try:
                    keys = parts.materials.stage_keys(role)
                except UserError as error:
                    if isinstance(error.__cause__, OSError):  # a model that cannot be had here
                        raise UserError(
                            f"{str(error).rstrip('.')}; --random-weights measures without it"
                        ) from error
                    raise
                for stage, key in zip(spec.stages, keys, strict=True):
                    missing += [] if parts.materials.trained(key) else [stage.name]
        micro = training.micro_batch or training.batch_size
        cells = [run.row, registry.stem(run.method), str(training.batch_size), str(micro), rows]
        cells += [training.precision, run.device, sizes, ", ".join(dict.fromkeys(missing)) or "–"]
        table.append(cells)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, "", f"Each: 1 step to warm up, {wanted.steps} timed, "
                      f"{min(wanted.steps, DETAILED)} in detail, 1 counted."])  # fmt: skip


def _parameters(parts: Fresh, role: str, known: dict[str, int]) -> int:
    """How many parameters a fresh model has, without making them; `known` ones are not counted again."""
    config, head = parts.configs[role], parts.method.head
    key = f"{head} {config.to_json_string()}"
    if key not in known:
        with torch.device("meta"):
            model = models.HEADS[head].auto.from_config(config)
        known[key] = sum(parameter.numel() for parameter in model.parameters())
    return known[key]
