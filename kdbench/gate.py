"""The regression check: do the methods still compute, train and score as when its references were learned?

Two measurements, each compared with `configs/gate/reference.json`:

- *Updates.* Every method makes its first `UPDATES` updates in float64 on tiny random models whose
  configuration has dropout. Each loss term is computed a second time, from the models' own logits at the rows
  of the update, by formulas stated here and not taken from the methods or from `losses`. Every logged number,
  the movement of each group's weights and the counts of target tokens are compared with stored ones.
- *Scores.* Every method runs once on `configs/gate/board.toml`, the whole way from stages to analyses. Its
  scores must lie in bands learned from `SEEDS` training seeds.

A number has *passed*, has *regressed* (with the amount), or was *not measured* (with the reason). The gate
fails on a regressed number, and on one that was not measured, since what is not measured is not guarded; but
not where the reason is stated in `EXEMPT`, nor where a stored number is missed under other versions of torch
or transformers than those it was learned with, for then the code need not be at fault. Formulas, counts that
must agree, and the teacher's repeatability need no stored number and hold under every version.

Tolerances: float64 leaves rounding alone to differ between machines. Each tolerance is `FACTOR` times the
largest difference seen between 1 and 2 threads and after moving the first weights by one unit in the last
place, at least `FLOOR`, relative to the largest entry. Bands are prediction intervals of Student's t for one
new seed; together they are missed by chance in a share `FALSE_ALARM` of gates whose random streams changed.
The gate's own seed is one of those learned from, so unchanged code is not at that risk.

A new method takes part by its name. To have its terms recomputed it needs an entry in `FORMULAS`.

Source: own; prediction interval as in Student 1908, https://doi.org/10.2307/2331554.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

from kdbench import registry, stages
from kdbench.clock import running
from kdbench.config import TrainingConfig, library_versions, load_board, resolve
from kdbench.distiller import Batch, Distiller, Parts
from kdbench.errors import UserError
from kdbench.harness import BatchSource, Recorder, SourceData, Trainer
from kdbench.paths import configs_dir
from kdbench.record import atomic
from kdbench.runner import Plan
from kdbench.stages import Places
from kdbench.strict import read_toml
from kdbench.tasks.tiny_instruct import TinyInstruct

Outcome = Literal["passed", "regressed", "not measured"]
Array = NDArray[np.float64]

UPDATES = 20  # student updates that leave a fingerprint
FACTOR, FLOOR = 100.0, 1e-9  # tolerance: so many times the largest difference seen, at least the floor
CEILING = 1e-7  # a recomputed term may never differ by more, whatever was learned
SEEDS = tuple(range(1, 11))  # training seeds that the bands are learned from; the gate runs the first
FALSE_ALARM = 0.01  # share of gates in which some band is missed by chance
SCORES = (
    "instruction_following/rouge_l",
    "instruction_following/length",
    "exposure_bias/accumulated_error@15",
    "exposure_bias/ex_acc_err@15",
)
EXEMPT: dict[str, str] = {}
"""Methods that the gate leaves out, each with the reason; they do not make it fail."""

TRAINING: dict[str, Any] = {
    "optimizer_steps": UPDATES + 4,  # so that a visit that begins within `UPDATES` is whole
    "batch_size": 8,
    "micro_batch": 3,  # uneven, so that a mean over micro-batches shows
    "rollout_batch": 5,
    "max_new_tokens": 12,
    "lr": 1e-2,
    "schedule": "linear",
    "warmup_steps": 3,
    "checkpoint_every": 0,
}
ROWS: dict[str, Any] = {"train": 48, "dev": 12, "noise": 0.0}


# ---------------------------------------------------------------------------------------------------- report
@dataclass(frozen=True)
class Number:
    """One checked number: what became of it, and why. `excused`: not measured, for a stated reason."""

    name: str
    outcome: Outcome
    reason: str = ""
    excused: bool = False


@dataclass
class Report:
    """Everything that the gate checked, and how long it took."""

    numbers: list[Number] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing has regressed and everything was measured, but for what is excused."""
        return all(number.outcome == "passed" or number.excused for number in self.numbers)

    def named(self, outcome: Outcome) -> list[str]:
        """The names of the numbers with this outcome."""
        return [number.name for number in self.numbers if number.outcome == outcome]

    def render(self) -> str:
        """The report as text: a line per method, then every number that has not passed."""
        lines = []
        for owner in dict.fromkeys(number.name.split("/")[0] for number in self.numbers):
            own = [number for number in self.numbers if number.name.split("/")[0] == owner]
            counts = Counter(number.outcome for number in own)
            lines.append(f"{owner:<20} " + ", ".join(f"{count} {name}" for name, count in counts.items()))
        for number in self.numbers:
            if number.outcome != "passed":
                lines.append(f"{number.outcome}: {number.name}: {number.reason}")
        lines += [f"note: {note}" for note in self.notes]
        counts = Counter(number.outcome for number in self.numbers)
        told = ", ".join(f"{counts[name]} {name}" for name in ("passed", "regressed", "not measured"))
        lines.append(f"gate {'passed' if self.passed else 'failed'}: {told} ({self.seconds:.0f} s)")
        return "\n".join(lines)


# -------------------------------------------------------------------------------------- tiny models and rows
def _model(role: str, task: TinyInstruct) -> nn.Module:
    """A GPT-2 of 2 layers in float64 whose numbers no library version changes; the student is narrower.

    The end of a sequence is likely enough that some responses end and some are cut.
    """
    tokenizer = task.tokenizer()
    eos = int(tokenizer.eos_token_id)
    width = 16 if role == "student" else 24
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": width, "n_positions": 192}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **shape)
    model: Any = GPT2LMHeadModel(config).double()
    draw = np.random.RandomState(int(hashlib.sha256(role.encode()).hexdigest()[:8], 16))
    with torch.no_grad():
        for name, param in sorted(model.named_parameters()):
            value = torch.from_numpy(0.3 * draw.standard_normal(tuple(param.shape)))
            param.copy_(1 + 0.3 * value if "ln_" in name and name.endswith("weight") else value)
        end = model.get_output_embeddings().weight[eos]
        model.base_model.ln_f.bias.copy_((4 if role == "student" else 3.5) * end / end.square().sum())
    model.config.pad_token_id = eos
    model.kdbench_encode = lambda text: list(tokenizer(text)["input_ids"])
    model.kdbench_pad = eos
    for part in (model, model.base_model):  # rows have no padding here, and the check only prints
        part.warn_if_padding_and_no_attention_mask = lambda ids, mask: None
    return model.eval()  # type: ignore[no-any-return]


def _one_ulp(model: nn.Module) -> None:
    """Move about two thirds of the weights by one unit in the last place."""
    draw = np.random.RandomState(0)
    with torch.no_grad():
        for _, param in sorted(model.named_parameters()):
            param.mul_(torch.from_numpy(1 + 2.0**-52 * draw.randint(-1, 2, tuple(param.shape))))


@dataclass(frozen=True)
class Row:
    """One row of an update: its ids without padding, and how many of them are the prompt."""

    example: int
    ids: list[int]
    prompt: int

    @property
    def targets(self) -> range:
        """Places of the response's tokens."""
        return range(max(self.prompt, 1), len(self.ids))


def _rows(batch: Batch) -> list[Row]:
    fields = (batch[name].tolist() for name in ("example_id", "input_ids", "prompt_length", "length"))
    return [Row(example, ids[:end], prompt) for example, ids, prompt, end in zip(*fields, strict=True)]


# ------------------------------------------------------------------------------------- formulas, stated anew
class Seen:
    """One update before the method makes it: its rows, and log-probabilities of its models at their targets.

    `memory` lasts as long as the visit. Roles are the distiller's models, and `prompted`, the teacher behind
    the distiller's soft prompt.
    """

    def __init__(
        self, distiller: Distiller, parts: Mapping[str, Batch], index: int, total: int, memory: dict[str, Any]
    ) -> None:
        self.rows = {name: _rows(part) for name, part in parts.items()}
        self.index, self.total, self.memory = index, total, memory
        self._distiller: Any = distiller
        self._known: dict[tuple[str, str], Array] = {}

    def log(self, role: str, part: str = "") -> Array:
        """Log-probabilities [N, V] at the N targets of a part, row by row, from forwards without padding."""
        if (role, part) not in self._known:
            logits = [self._logits(role, row) for row in self.rows[part] if row.targets]
            at = np.concatenate(logits)
            at -= at.max(axis=1, keepdims=True)
            self._known[role, part] = at - np.log(np.exp(at).sum(axis=1, keepdims=True))
        return self._known[role, part]

    def _logits(self, role: str, row: Row) -> Array:
        model = self._distiller.teacher if role == "prompted" else getattr(self._distiller, role)
        ids, before = torch.tensor([row.ids]), 0
        if role == "prompted":
            vectors = self._distiller.prompt.vectors
            before = len(vectors)
            out = model(inputs_embeds=torch.cat([vectors[None], model.get_input_embeddings()(ids)], dim=1))
        else:
            out = model(input_ids=ids)
        logits: Array = out.logits[0, [before + t - 1 for t in row.targets]].numpy()
        return logits

    def said(self, role: str, part: str = "") -> Array:
        """Log-probability [N] that a model gives to each target token."""
        tokens = [row.ids[t] for row in self.rows[part] for t in row.targets]
        return self.log(role, part)[np.arange(len(tokens)), tokens]


Terms = dict[str, float]
Formulas = Mapping[str, Callable[[Seen], Terms]]


def _kl(first: Array, second: Array) -> float:
    """Mean over targets of sum_v a (log a - log b)."""
    return float((np.exp(first) * (first - second)).sum(axis=1).mean())


def _ce(seen: Seen, part: str = "") -> float:
    return float(-seen.said("student", part).mean())


def _sft(seen: Seen) -> Terms:
    return {"ce": _ce(seen), "loss": _ce(seen)}


def _kd(seen: Seen) -> Terms:
    kl = _kl(seen.log("teacher"), seen.log("student"))
    return {"ce": _ce(seen), "forward_kl": kl, "loss": 0.5 * _ce(seen) + 0.5 * kl}


def _gkd(seen: Seen) -> Terms:
    kl = _kl(seen.log("student"), seen.log("teacher"))
    return {"reverse_kl": kl, "loss": kl}


def _promptkd_prompt(seen: Seen) -> Terms:
    kd = _kl(seen.log("prompted"), seen.log("student"))
    reg = _kl(seen.log("prompted"), seen.log("teacher"))
    return {"prompt_kd": kd, "prompt_reg": reg, "loss": kd + (1 - seen.index / seen.total) * reg}


def _promptkd_student(seen: Seen) -> Terms:
    kl = _kl(seen.log("student"), seen.log("prompted"))
    return {"kd": kl, "loss": kl}


def _minillm(seen: Seen) -> Terms:
    """Spec: rewards doubled, gamma 0.95, length-normalised, whitened over the update, clip 0.2, alpha 0.2."""
    now, teacher, rows = (
        seen.said("student", "rollout"),
        seen.said("teacher", "rollout"),
        seen.rows["rollout"],
    )
    ends = np.cumsum([len(row.targets) for row in rows])
    starts = ends - [len(row.targets) for row in rows]
    old = seen.memory.setdefault("old", {})  # before the first update of a visit the student is the sampler
    for row, start, end in zip(rows, starts, ends, strict=True):
        old.setdefault(row.example, now[start:end])
    before = np.concatenate([old[row.example] for row in rows])
    reward = np.clip((teacher - before) / 0.5, -100, 100)
    advantage = np.zeros_like(reward)
    for start, end in zip(starts, ends, strict=True):
        for t in range(start, end):
            left = np.arange(end - t)
            advantage[t] = (0.95**left * reward[t:end]).sum() / len(left)
    advantage = (advantage - advantage.mean()) / np.sqrt(advantage.var() + 1e-8)
    weight = np.exp(before) / (0.8 * np.exp(before) + 0.2 * np.exp(teacher))
    ratio = weight * np.exp(now - before)
    clipped = np.minimum(np.maximum(ratio, 0.8), 1.2)
    policy = float(np.maximum(-advantage * ratio, -advantage * clipped).mean())
    single = _kl(seen.log("student", "rollout"), seen.log("teacher", "rollout"))
    text_ce = _ce(seen, "lm")
    text_kl = _kl(seen.log("teacher", "lm"), seen.log("student", "lm"))
    return {
        "policy": policy,
        "reward": float(reward.mean()),
        "clipped_share": float((clipped != ratio).mean()),
        "single_step": single,
        "lm_ce": text_ce,
        "lm_kl": text_kl,
        "loss": policy + single + 0.5 * text_ce + 0.5 * text_kl,
    }


FORMULAS: dict[str, Formulas] = {
    "sft": {"student": _sft},
    "kd": {"student": _kd},
    "seqkd": {"student": _kd},
    "gkd": {"student": _gkd},
    "minillm": {"student": _minillm},
    "promptkd": {"prompt": _promptkd_prompt, "student": _promptkd_student},
}
"""What a method's default settings compute: per group the terms it logs and `loss`, nats per token."""

COEFFICIENTS = {"promptkd": ("prompt/loss", "prompt/prompt_kd", "prompt/prompt_reg")}
"""Logged (L, A, B) with L = A + (1 - g / T) B."""


# ---------------------------------------------------------------------------------- a method's first updates
@dataclass
class Fingerprint:
    """What a method's first updates left behind; lists have one entry per student update.

    `logged` are the numbers it logged, `own` those recomputed, `moved` the norm of each group's change,
    `tokens` and `ends` the target tokens and the ends of sequences among them as counted from the rows,
    `disagree` what was counted in two ways with different results, `repeats` the largest difference between
    two forwards of each frozen model.
    """

    logged: dict[str, list[float | None]] = field(default_factory=dict)
    own: dict[str, list[float | None]] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    disagree: list[str] = field(default_factory=list)
    repeats: dict[str, float] = field(default_factory=dict)


class _Watched(Trainer):
    """A trainer that computes every update's terms before the method makes it."""

    def __init__(
        self, distiller: Distiller, rows: Batch, extras: Mapping[str, Batch], formulas: Formulas
    ) -> None:
        recorder = Recorder()
        sources = {name: BatchSource(extra) for name, extra in extras.items()}
        training = TrainingConfig(**TRAINING)
        super().__init__(distiller, BatchSource(rows), training, 1, extras=sources, recorder=recorder)
        self.lines, self.formulas = recorder.losses, formulas
        self.found = Fingerprint()
        self._own: dict[int, Terms] = {}
        self._memory: dict[str, Any] = {}
        self._eos = int(distiller.student.config.eos_token_id)  # type: ignore[union-attr, arg-type]
        self._looking = False
        self._watch_frozen()

    def _watch_frozen(self) -> None:
        """Run every forward of a frozen model a second time, in the mode in which the method runs it."""
        trained = {id(param) for optimizer in self.optimizers.values() for param in optimizer.params.values()}

        def watch(role: str, model: PreTrainedModel) -> None:
            self.found.repeats[role] = 0.0

            def again(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                if self._looking or kwargs.get("past_key_values") is not None:
                    return
                with self._only_looking():
                    apart = module(*args, **kwargs).last_hidden_state - output.last_hidden_state
                self.found.repeats[role] = max(self.found.repeats[role], float(apart.abs().max()))

            model.base_model.register_forward_hook(again, with_kwargs=True)

        for role, model in self.distiller.named_children():
            if isinstance(model, PreTrainedModel) and trained.isdisjoint(map(id, model.parameters())):
                watch(role, model)

    @contextmanager
    def _only_looking(self) -> Iterator[None]:
        self._looking = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._looking = False

    def update(self, group: str, loss: Callable[[Any, Any], Tensor], batch: Batch | Parts) -> None:
        """Look, then update."""
        parts = {"": batch} if isinstance(batch, Batch) else dict(batch)
        if group in self.formulas:
            modes = [(module, module.training) for module in self.distiller.modules()]
            self.distiller.eval()
            with self._only_looking():
                seen = Seen(self.distiller, parts, self.index, self.total, self._memory)
                for term, value in self.formulas[group](seen).items():
                    self._own.setdefault(self.index, {})[f"{group}/{term}"] = value
            for module, training in modes:
                module.training = training
        if group == "student":
            self._count(parts)
        super().update(group, loss, batch)

    def _count(self, parts: Mapping[str, Batch]) -> None:
        tokens = ends = 0
        for part in parts.values():
            rows = _rows(part)
            tokens += sum(len(row.targets) for row in rows)
            ends += sum(row.ids[t] == self._eos for row in rows for t in row.targets)
            if "finished" in part and [row.ids[-1] == self._eos for row in rows] != part["finished"].tolist():
                self.found.disagree.append(
                    f"update {self.index}: `finished` and the last tokens of the responses"
                )
        self.found.tokens.append(tokens)
        self.found.ends.append(ends)

    def go(self) -> Fingerprint:
        """Make the updates and return what they left."""
        made = (
            self.prepare(SourceData({"train": self.source, "dev": self.source}, 5, self.processes.device))
            or {}
        )
        if "train" in made:
            self.source = BatchSource(made["train"])
        start = {name: param.detach().clone() for name, param in self.parameters().items()}
        with running(self.clock):
            while self.updates < UPDATES and self.visit < 10 * UPDATES:
                self._memory.clear()
                self.one_visit()
        if self.updates < UPDATES:
            raise RuntimeError(f"{self.visit} visits made {self.updates} updates of 'student'")
        found, squares = self.found, Counter[str]()
        for name, param in self.parameters().items():
            squares[name.split("/")[0]] += float((param.detach() - start[name]).square().sum())  # type: ignore[assignment]
        found.moved = {group: math.sqrt(square) for group, square in squares.items()}
        if self.counters["tokens_seen"] != sum(found.tokens):
            found.disagree.append(f"tokens seen: {self.counters['tokens_seen']:.0f} by the harness")
        numbers = range(1, UPDATES + 1)
        lines = {int(line["step"]): line for line in self.lines}
        for table, by_update in ((found.logged, lines), (found.own, self._own)):
            names = dict.fromkeys(name for line in by_update.values() for name in line if name != "step")
            table.update({name: [by_update.get(i, {}).get(name) for i in numbers] for name in names})
        found.tokens, found.ends = found.tokens[:UPDATES], found.ends[:UPDATES]
        return found


def fingerprint(method: str, *, ulp: bool = False) -> Fingerprint:
    """Make a method's first updates; with `ulp`, from weights that differ in their last place.

    Raises: UserError when the gate has no models or rows for the method; whatever the method raises.
    """
    cls = registry.load_distiller(method)
    if cls.head not in TinyInstruct.heads or not set(cls.needs) <= set(TinyInstruct.fields):
        raise UserError(
            f"the gate has no models and rows for a {cls.head} method that needs {', '.join(cls.needs)}"
        )
    task = TinyInstruct(TinyInstruct.Settings(**ROWS))
    encoders = {"student": task.encoder(task.tokenizer())}
    rows = {split: task.collate(task.rows(split), encoders) for split in ("train", "dev")}
    dev = rows["dev"]
    text = dev.replace(prompt_length=torch.ones_like(dev["length"]), length=dev["length"].clamp(max=24))

    def role(name: str) -> nn.Module:
        model = _model(name, task)
        if ulp:
            _one_ulp(model)
        return model

    with torch.random.fork_rng(devices=[]):
        distiller = stages.build(cls, {}, role, 1, method).double()
        formulas = FORMULAS.get(registry.stem(method), {})
        return _Watched(distiller, rows["train"], {"lm": text}, formulas).go()


def training_rows() -> dict[str, Any]:
    """Counts and content hash of the rows that fingerprints train on."""
    task = TinyInstruct(TinyInstruct.Settings(**ROWS))
    rows = _rows(task.collate(task.rows("train"), {"student": task.encoder(task.tokenizer())}))
    eos = task.tokenizer().eos_token_id
    return {
        "rows": len(rows),
        "tokens": sum(len(row.targets) for row in rows),
        "ends": sum(row.ids[t] == eos for row in rows for t in row.targets),
        "sha256": hashlib.sha256(json.dumps([(row.ids, row.prompt) for row in rows]).encode()).hexdigest()[
            :16
        ],
    }


# ---------------------------------------------------------------------------------------------------- scores
def scores(method: str, seed: int, places: Places) -> dict[str, float | None]:
    """Run a method on the gate's board and return its `SCORES`; None where one is not defined.

    Raises: UserError for a method that the board cannot run; RuntimeError when its run is not `done`.
    """
    run = resolve(load_board(str(_board_path())), "gate", method, seed)
    record = Plan(run, places).execute()
    if record.status != "done":
        raise RuntimeError(f"the run ended as {record.status}: {record.reason}")
    return {name: record.scores[name].value if name in record.scores else None for name in SCORES}


# ------------------------------------------------------------------------------------------------- judgement
def _reference_path() -> Path:
    return configs_dir() / "gate" / "reference.json"


def _board_path() -> Path:
    return configs_dir() / "gate" / "board.toml"


def _own_settings() -> str:
    """A hash of what the gate measures: a reference learned with other settings says nothing."""
    return stages.digest(UPDATES, TRAINING, ROWS, SCORES, read_toml(_board_path()))


class _Judge:
    """Turns measurements into numbers with an outcome, against a stored reference."""

    def __init__(self, reference: Mapping[str, Any], report: Report) -> None:
        self.reference, self.report = reference, report
        learned, here = reference.get("versions", {}), library_versions()
        self.versions = ""
        if learned != here:
            told = [" ".join(f"{k} {v}" for k, v in versions.items()) for versions in (learned, here)]
            self.versions = f"the reference is of {told[0]}, here is {told[1]}"

    def say(self, name: str, good: bool, reason: str) -> None:
        """A number that needs no stored one."""
        self.report.numbers.append(Number(name, "passed") if good else Number(name, "regressed", reason))

    def stored(self, name: str, good: bool, reason: str) -> None:
        """A number compared with a stored one, which binds under the versions it was learned with."""
        if good or not self.versions:
            self.say(name, good, reason)
        else:
            self.missing(name, f"{reason}; {self.versions}", excused=True)

    def missing(self, name: str, reason: str, excused: bool = False) -> None:
        """A number that could not be measured."""
        self.report.numbers.append(Number(name, "not measured", reason, excused))

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """What the gate cannot run is not measured; a method that raises has regressed."""
        try:
            yield
        except UserError as error:
            self.missing(name, str(error))
        except Exception as error:
            self.say(name, False, " ".join(f"raised {type(error).__name__}: {error}".split()))

    def rows(self, found: Mapping[str, Any]) -> None:
        """The training rows: each ends in an end of sequence, and they are those of the reference."""
        good = found["ends"] == found["rows"]
        self.say("rows/complete", good, f"{found['rows']} responses have {found['ends']} ends of sequence")
        for name, value in self.reference.get("rows", {}).items():
            self.stored(f"rows/{name}", found[name] == value, f"{found[name]} instead of {value}")

    def updates(self, method: str, found: Fingerprint) -> None:
        """A method's first updates: what holds by itself, then what is stored."""
        known = self.reference.get("methods", {}).get(method)
        tolerances = (known or {}).get("recomputed", {})
        for term, own in found.own.items():
            name, logged = f"{method}/recomputed/{term}", found.logged.get(term)
            if logged is None:
                self.say(name, False, "the method does not log it")
                continue
            allowed = min(CEILING, tolerances.get(term, {"tolerance": CEILING})["tolerance"])
            self.say(name, *_compare(logged, own, allowed, "recomputed"))
        if method in COEFFICIENTS:
            self._coefficient(method, found)
        for group, norm in found.moved.items():
            self.say(f"{method}/moves/{group}", norm > 0, f"no weight moved in {UPDATES} updates")
        for role, apart in found.repeats.items():
            what = f"two forwards of the {role} in the same mode differ by up to {apart:.3g}"
            self.say(f"{method}/repeats/{role}", apart == 0, what)
        self.say(f"{method}/counts", not found.disagree, "; ".join(found.disagree[:3]) + " do not agree")
        if known is None:
            self.missing(f"{method}/reference", "no stored updates: run `kdbench gate --learn`")
            return
        for term in {**known["trajectory"], **found.logged}:
            self._trajectory(
                f"{method}/trajectory/{term}", known["trajectory"].get(term), found.logged.get(term)
            )
        for group in {**known["movement"], **found.moved}:
            stored = known["movement"].get(group, {"value": None, "tolerance": 0})
            good, reason = _compare(
                [found.moved.get(group)], [stored["value"]], stored["tolerance"], "stored"
            )
            self.stored(f"{method}/movement/{group}", good, reason)
        for name, counted in (("tokens", found.tokens), ("ends", found.ends)):
            good = counted == known[name]
            self.stored(f"{method}/{name}", good, f"{sum(counted)} counted in all, {sum(known[name])} stored")

    def _trajectory(self, name: str, stored: Any, logged: list[float | None] | None) -> None:
        if stored is None:
            self.missing(name, "a new term: run `kdbench gate --learn`")
        elif logged is None:
            self.stored(name, False, "is logged no more")
        else:
            self.stored(name, *_compare(logged, stored["values"], stored["tolerance"], "stored"))

    def _coefficient(self, method: str, found: Fingerprint) -> None:
        name = f"{method}/coefficient"
        nothing: list[float | None] = [None] * UPDATES
        whole, first, second = (found.logged.get(term, nothing) for term in COEFFICIENTS[method])
        got = [
            None if w is None or a is None or not b else (w - a) / b
            for w, a, b in zip(whole, first, second, strict=True)
        ]
        due: list[float | None] = [1 - i / TRAINING["optimizer_steps"] for i in range(1, UPDATES + 1)]
        self.say(name, *_compare(got, due, CEILING, "due"))

    def scores(self, method: str, found: Mapping[str, float | None]) -> None:
        """A method's scores against their bands."""
        bands = self.reference.get("methods", {}).get(method, {}).get("scores", {})
        for score, value in found.items():
            name, band = f"{method}/score/{score}", bands.get(score)
            if band is None:
                self.missing(name, "no band: run `kdbench gate --learn`")
            elif value is None:
                self.missing(name, "the run has no such score, or it is not defined", bool(self.versions))
            else:
                low, high = band["low"], band["high"]
                good = low <= value <= high
                past = f"{value:.4g} is {max(low - value, value - high):.3g} outside {low:.4g} .. {high:.4g}"
                self.stored(name, good, f"{past} ({len(band['seeds'])} seeds)")


def _compare(
    got: Sequence[float | None], want: Sequence[float | None], tolerance: float, what: str
) -> tuple[bool, str]:
    """(all agree, where and by how much they first do not), relative to the largest entry of `want`."""
    scale = max([abs(value) for value in want if value is not None], default=0.0) or 1.0
    for number, (a, b) in enumerate(zip(got, want, strict=True), 1):
        if a is None and b is None:
            continue
        if a is None or b is None or not abs(a - b) <= tolerance * scale:
            mine = "nothing" if a is None else f"{a:.8g}"
            theirs = "nothing" if b is None else f"{b:.8g}"
            return False, f"{mine}, {what} {theirs}, from update {number} on (tolerance {tolerance:.0e})"
    return True, ""


def _apart(a: Sequence[float | None], b: Sequence[float | None]) -> float:
    """The largest difference relative to the largest entry of `b`; infinite where one has no value."""
    scale = max([abs(value) for value in b if value is not None], default=0.0) or 1.0
    differences = [
        0.0 if x is None and y is None else math.inf if x is None or y is None else abs(x - y) / scale
        for x, y in zip(a, b, strict=True)
    ]
    return max(differences)


# ------------------------------------------------------------------------------------------------------- run
def run(
    methods: Sequence[str] | None = None,
    *,
    updates: bool = True,
    score: bool = True,
    reference: Path | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> Report:
    """Check the methods (None: all that are registered) against the stored reference, in this process.

    Args: `updates` and `score` leave out one of the two measurements; `reference` is another file; `folder`
    keeps the scores' `runs` and `cache`, and what is there already is not run again (None: nothing is kept).
    Raises: UserError for an unknown method or a reference that cannot be read.
    """
    start, report = time.monotonic(), Report()
    chosen = _chosen(methods)
    judge = _Judge(_load(reference or _reference_path(), report), report)
    left = [method for method in chosen if method not in EXEMPT]
    for method in [one for one in chosen if one in EXEMPT]:
        judge.missing(f"{method}/all", EXEMPT[method], excused=True)
    bar = tqdm(total=len(left) * (updates + score), desc="gate", disable=None if progress else True)
    with _one_thread(), tempfile.TemporaryDirectory() as passing, bar:
        if updates:
            judge.rows(training_rows())
        kept = folder or Path(passing)
        places = Places(kept / "runs", kept / "cache")
        for method in left:
            if updates:
                with judge.guarded(f"{method}/updates"):
                    judge.updates(method, fingerprint(method))
                bar.update()
            if score:
                with judge.guarded(f"{method}/run"):
                    judge.scores(method, scores(method, SEEDS[0], places))
                bar.update()
    without = [method for method in left if method not in FORMULAS]
    if updates and without:
        report.notes.append(f"no term is recomputed of {', '.join(without)}: no entry in FORMULAS")
    report.seconds = time.monotonic() - start
    return report


def _chosen(methods: Sequence[str] | None) -> list[str]:
    """The methods asked for, all registered ones for None. Raises: UserError for an unknown one."""
    chosen = list(registry.names("distillers") if methods is None else methods)
    for method in chosen:
        registry.find("distillers", method)
    return chosen


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    return data


def _load(path: Path, report: Report) -> dict[str, Any]:
    """The stored reference, empty (and the report says so) where there is none that fits."""
    if not path.is_file():
        report.numbers.append(
            Number("reference", "not measured", f"{path} does not exist: run `kdbench gate --learn`")
        )
        return {}
    data = _read(path)
    if data.get("settings") != _own_settings():
        why = f"{path.name} was learned with other settings of the gate: run `kdbench gate --learn`"
        report.numbers.append(Number("reference", "not measured", why))
        return {}
    return data


@contextmanager
def _one_thread(threads: int = 1) -> Iterator[None]:
    """Run with so many torch threads and without the progress bars of transformers."""
    before, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if bars:
            logging.enable_progress_bar()


# ----------------------------------------------------------------------------------------------------- learn
def learn(
    methods: Sequence[str] | None = None,
    *,
    score: bool = True,
    reference: Path | None = None,
    progress: bool = False,
) -> Report:
    """Measure the methods (None: all) as they are and store that, unless something is wrong in itself.

    What is stored of other methods is kept if it was learned with the same settings, versions and rows.
    Returns the gate's own report on what was learned: nothing is stored unless it has passed.
    Raises: UserError for an unknown method or a reference that cannot be read.
    """
    start, report = time.monotonic(), Report()
    chosen = [method for method in _chosen(methods) if method not in EXEMPT]
    learned: dict[str, Any] = {}
    rows = training_rows()
    told = {"settings": _own_settings(), "versions": library_versions(), "rows": rows}
    path, known = reference or _reference_path(), dict[str, Any]()
    if path.is_file() and all(_read(path).get(name) == value for name, value in told.items()):
        known = _read(path)["methods"]
    judge = _Judge({**told, "methods": learned}, report)
    judge.rows(rows)
    variants, seeds = ((1, False), (2, False), (1, True)), SEEDS if score else ()
    with tempfile.TemporaryDirectory() as folder, _pool() as pool:
        prints = {m: [pool.submit(_fingerprint_in, m, *variant) for variant in variants] for m in chosen}
        runs = {m: [pool.submit(_scores_in, folder, m, seed) for seed in seeds] for m in chosen}
        for method in tqdm(chosen, desc="learn", disable=None if progress else True):
            with judge.guarded(f"{method}/learn"):
                found, values = (
                    [one.result() for one in prints[method]],
                    [one.result() for one in runs[method]],
                )
                learned[method] = _of_updates(found)
                judge.updates(method, found[0])
                if score:
                    learned[method]["scores"] = _bands(values, len(_chosen(None)))
                    judge.scores(method, values[0])
    if report.passed:
        _write(path, {**told, "methods": {**known, **learned}})
    report.notes.append(f"{path.name}: {'stored' if report.passed else 'left as it was'}")
    report.seconds = time.monotonic() - start
    return report


@contextmanager
def _pool() -> Iterator[ProcessPoolExecutor]:
    """Two processes whose idle threads sleep: those of a busy machine would wait for each other in loops."""
    told = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(2, os.cpu_count() or 1), context, logging.disable_progress_bar) as pool:
            yield pool
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _fingerprint_in(method: str, threads: int, ulp: bool) -> Fingerprint:
    """`fingerprint` in a process of the pool."""
    torch.set_num_threads(threads)
    return fingerprint(method, ulp=ulp)


def _scores_in(folder: str, method: str, seed: int) -> dict[str, float | None]:
    """`scores` in a process of the pool, with the stages in a folder that the processes share."""
    torch.set_num_threads(1)
    return scores(method, seed, Places(Path(folder) / "runs", Path(folder) / "cache"))


def _write(path: Path, learned: Mapping[str, Any]) -> None:
    """Write JSON with every list of numbers on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(learned, indent=1, allow_nan=False)
    text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    with atomic(path) as file:
        file.write(text.encode() + b"\n")


def _of_updates(runs: Sequence[Fingerprint]) -> dict[str, Any]:
    """The stored form of a method's updates: the first run's numbers, tolerances from all runs."""
    first, others = runs[0], runs[1:]

    def tolerance(*seen: float) -> dict[str, float]:
        return {
            "seen": float(f"{max(seen):.2g}"),
            "tolerance": float(f"{max(FLOOR, FACTOR * max(seen)):.2g}"),
        }

    trajectory = {}
    for term, values in first.logged.items():
        stored = [None if value is None else float(f"{value:.13g}") for value in values]
        apart = [_apart(one.logged.get(term, [None] * UPDATES), values) for one in others]
        trajectory[term] = {"values": stored, **tolerance(*apart)}
    movement = {}
    for group, norm in first.moved.items():
        movement[group] = {
            "value": norm,
            **tolerance(*(_apart([one.moved[group]], [norm]) for one in others)),
        }
    recomputed = {
        term: tolerance(*(_apart(one.logged.get(term, [None] * UPDATES), one.own[term]) for one in runs))
        for term in first.own
    }
    return {
        "recomputed": recomputed,
        "trajectory": trajectory,
        "movement": movement,
        "tokens": first.tokens,
        "ends": first.ends,
    }


def _bands(runs: Sequence[Mapping[str, float | None]], methods: int) -> dict[str, Any]:
    """Per score its values by seed and the interval for one more seed; none where a seed has no value."""
    bands = {}
    for name in SCORES:
        given = [run[name] for run in runs]
        values = np.array([value for value in given if value is not None])
        if len(values) < len(given):
            continue
        n = len(values)
        quantile = float(stats.t.ppf(1 - FALSE_ALARM / (2 * methods * len(SCORES)), n - 1))
        middle, half = float(values.mean()), quantile * float(values.std(ddof=1)) * math.sqrt(1 + 1 / n)
        bands[name] = {"seeds": values.tolist(), "low": middle - half, "high": middle + half}
    return bands
