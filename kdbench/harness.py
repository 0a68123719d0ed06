"""The only training loop: optimizer groups, micro-batches, processes, budget, checkpoints.

It knows distillers, batches and counts, and no method or task by name.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdbench.checkpoint import Checkpoints
from kdbench.clock import Clock, detail, name_roles, phase, running
from kdbench.config import TrainingConfig
from kdbench.distiller import Batch, Distiller, Group, Parts, Store, Totals
from kdbench.errors import Diverged, OutOfMemory, UserError
from kdbench.memory import (
    Fit,
    Size,
    cast,
    check_alone,
    checkpoint_activations,
    free,
    give_back,
    keep_freed,
    out_of_memory,
    telling,
)
from kdbench.processes import Processes, matmul_precision
from kdbench.streams import generator, stream_seed, uniform

T = TypeVar("T")

IDLE_VISITS = (
    1000  # visits in a row without a student update after which a method is told that it never updates
)
_NO_ROOM = (
    "out of memory in an optimizer step: AdamW keeps two more numbers per parameter, which no smaller "
    "micro-batch changes; train a smaller student"
)
_NO_ROOM_TO_MEASURE = (
    "out of memory in an evaluation or snapshot during training: "
    "lower evaluation.batch_size or evidence.batch_size"
)


class _BudgetSpent(BaseException):
    """Ends a visit when the last student update was made; no `except Exception` of a method stops it."""


class Source(Protocol):
    """Rows that training draws from."""

    def __len__(self) -> int: ...

    def batch(self, index: Sequence[int]) -> Batch:
        """Return the rows at `index`, at least one."""

    def lengths(self, index: Sequence[int]) -> list[int]:
        """Return the tokens of the rows at `index`."""


class BatchSource:
    """Rows held in memory, such as those that `prepare` made."""

    def __init__(self, rows: Batch) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows.size

    def batch(self, index: Sequence[int]) -> Batch:
        """Return the rows at `index`."""
        return self._rows.rows(index)

    def lengths(self, index: Sequence[int]) -> list[int]:
        """Return the tokens of the rows at `index`."""
        lengths: list[int] = self._rows["length"][torch.as_tensor(index)].tolist()
        return lengths


class Order:
    """An endless stream of row numbers: one permutation after another, each fixed by seed, name and epoch."""

    def __init__(self, seed: int, name: str, length: int) -> None:
        self._seed, self._name, self._length = seed, name, length
        self._epochs: dict[int, list[int]] = {}

    def take(self, start: int, count: int) -> list[int]:
        """Return the row numbers at places start .. start + count - 1 of the stream."""
        rows = []
        for place in range(start, start + count):
            epoch, offset = divmod(place, self._length)
            if epoch not in self._epochs:
                rng = generator(self._seed, self._name, epoch)
                self._epochs = {epoch: torch.randperm(self._length, generator=rng).tolist()}
            rows.append(self._epochs[epoch][offset])
        return rows


def share(source: Source, rows: Sequence[int], processes: Processes) -> Batch:
    """Return this process's part of the rows, with field `row`: their places in the whole batch. May be
    empty.
    """
    parts = torch.arange(len(rows)).tensor_split(processes.world)
    mine = parts[processes.rank].tolist()
    batch = source.batch([rows[i] for i in mine] or [rows[0]])
    if not mine:
        batch = batch.rows([])
    return batch.replace(row=torch.tensor(mine, dtype=torch.long)).to(processes.device)


def _by_length(part: Batch) -> Tensor:
    """The rows in order of length, so that rows of one micro-batch need little padding."""
    return part["length"].argsort(stable=True) if "length" in part else torch.arange(part.size)


def adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.AdamW:
    """AdamW as one fused kernel per step, or as torch has it for a device that has no such kernel."""
    kinds = {(param.device, param.dtype) for group in groups for param in group["params"]}
    fused = all(_can_fuse(*kind) for kind in kinds)
    return torch.optim.AdamW(groups, fused=fused or None, **settings)


@functools.cache
def _can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a fused kernel, which torch tells at the first step."""
    param = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
    param.grad = torch.zeros_like(param)
    try:
        torch.optim.AdamW([param], fused=True).step()
    except RuntimeError:
        return False
    return True


@dataclass
class _Optimizer:
    """One group's parameters, how they move, and how often they did."""

    params: dict[str, nn.Parameter]
    adam: torch.optim.AdamW
    settings: Group
    updates: int = 0


@dataclass
class Milestone:
    """Something to do after given student updates, such as a snapshot or a dev evaluation."""

    at: frozenset[int]
    action: Callable[[int], None]


@dataclass
class Recorder:
    """What checks listen to; every hook may be None."""

    gradient: Callable[[str, dict[str, Tensor]], None] | None = None
    visit: Callable[[int], None] | None = None
    losses: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """Trains a distiller until its budget of updates is spent. It is the `Step` that a method sees."""

    def __init__(
        self,
        distiller: Distiller,
        source: Source,
        training: TrainingConfig,
        seed: int,
        *,
        processes: Processes | None = None,
        extras: Mapping[str, Source] | None = None,
        folder: Path | None = None,
        identity: str = "",
        milestones: Sequence[Milestone] = (),
        recorder: Recorder | None = None,
        clock: Clock | None = None,
        track: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        """Move the distiller to its device and set its modes.

        Args: `folder` receives `steps.jsonl`, `checkpoint/` and, with `training.fit`, `fit.json`; None writes
        nothing. `identity` marks the checkpoints.
        Raises: ValueError when a trainable parameter is in no group or in two; UserError for settings that do
        not go together.
        """
        self.distiller, self.source, self.training, self.seed = distiller, source, training, seed
        self.processes = processes or Processes(precision=training.precision, solo=True)
        self.extras = dict(extras or {})
        self.folder, self.milestones, self.recorder, self.track = folder, milestones, recorder, track
        self.clock = clock or Clock()
        self.total = training.optimizer_steps
        self.rollout_batch = training.rollout_batch or training.batch_size
        self.max_new_tokens = training.max_new_tokens
        self.micro_batch = training.micro_batch or training.batch_size
        self.updates = 0
        self.visit = 0
        self.counters: dict[str, float] = {"prompts": 0.0, "tokens_seen": 0.0, "tokens_sampled": 0.0}
        self.best: dict[str, Any] = {}
        self.best_parameters: dict[str, Tensor] = {}
        self.curve: list[dict[str, float]] = []  # dev scores during training, as `record.DevScore`
        self._orders: dict[str, Order] = {}
        self._drawn: dict[str, int] = {}
        self._pools: dict[str, tuple[int, list[list[int]]]] = {}
        self._terms: dict[str, Tensor | float] = {}
        self._counted: dict[str, float] = {}
        self._group: str | None = None
        self._trainable: str | None = None  # the only group whose parameters take gradients; None: all do
        self._log_bytes = 0
        self._preparing = False
        self._fit_written = False
        if self.processes.device.type == "cpu":
            keep_freed()
            give_back()  # what came before is no part of this training
        distiller.to(self.processes.device)
        name_roles(dict(distiller.named_children()))
        self._set_modes()
        self.optimizers = {name: self._optimizer(group) for name, group in distiller.groups().items()}
        self._check_groups()
        self._need_less()
        self.checkpoints = None
        if folder is not None:
            self.checkpoints = Checkpoints(folder / "checkpoint", identity, self.processes)
        self.fitted = self._known_fit() if training.fit else None

    def replace_rows(self, name: str, rows: Batch) -> None:
        """Train on these rows in place of those of "train" or of an extra set."""
        if name == "train":
            self.source = BatchSource(rows)
        else:
            self.extras[name] = BatchSource(rows)

    # ---- what a method sees (the `Step` protocol)
    @property
    def index(self) -> int:
        """The number (1..T) of the student's update that comes next."""
        return self.updates + 1

    @property
    def progress(self) -> float:
        """The finished share of the student's updates."""
        return self.updates / max(self.total, 1)

    def rng(self, name: str) -> torch.Generator:
        """A CPU generator fixed by seed, name and visit."""
        return generator(self.seed, "method/" + name, self.visit)

    def all_sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over processes. Raises: ValueError inside a loss."""
        if self._group:
            raise ValueError("all_sum inside a loss would sum micro-batches; call it in train_step")
        return self.processes.all_sum(value)

    def count(self, name: str, amount: float) -> None:
        """Add to a counter of the budget; visits sum it over processes."""
        self._counted[name] = self._counted.get(name, 0.0) + amount

    def log(self, **terms: Tensor | float) -> None:
        """Write terms of this update; inside a loss they are summed over micro-batches."""
        for name, value in terms.items():
            key = f"{self._group}/{name}" if self._group else name
            value = value.detach().double() if isinstance(value, Tensor) else float(value)
            self._terms[key] = self._terms.get(key, 0.0) + value if self._group else value

    def extra(self, name: str) -> Batch | None:
        """Return the next batch of the board's extra rows `name`, or None where the board has none."""
        if name not in self.extras:
            return None
        return self._draw("extra/" + name, self.extras[name])

    def update(self, group: str, loss: Callable[[Any, Any], Tensor], batch: Batch | Parts) -> None:
        """Descend `loss` once in the parameters of `group` and of no other group.

        The batch is cut into micro-batches, gradients are summed over them and over processes, then the
        group steps. Raises: ValueError for an unknown group, Diverged when loss or gradient is not finite.
        """
        if group not in self.optimizers:
            raise ValueError(f"update: no group '{group}'. Known: {', '.join(self.optimizers)}")
        if self._preparing and group == "student":
            raise ValueError("prepare may not update the group 'student': the budget counts its updates")
        if self.updates >= self.total:
            raise _BudgetSpent
        optimizer = self.optimizers[group]
        with phase("update"):
            self._train_only(group)
            parts = {"": batch} if isinstance(batch, Batch) else dict(batch)
            value, norm, totals = self._fitting(
                "micro_batch",
                f"in an update of '{group}'",
                lambda: self._gradient(group, loss, parts),
                max(part.size for part in parts.values()),
            )
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise Diverged(f"update {self.index} of '{group}': loss {value}, gradient norm {norm}")
            if self.recorder and self.recorder.gradient:
                gradients = {
                    n: p.grad.detach().clone() for n, p in optimizer.params.items() if p.grad is not None
                }
                self.recorder.gradient(group, gradients)
            with detail("optimizer"), telling(_NO_ROOM):
                self._descend(optimizer, norm)
        if group == "student":
            self._student_updated(totals)

    # ---- one update
    def _gradient(
        self, group: str, loss: Callable[[Any, Any], Tensor], parts: Parts
    ) -> tuple[float, float, list[Totals]]:
        """Put the group's gradient in place and return the loss, the gradient's norm, and the parts' counts.

        A single batch is the part "". All numbers are of all processes; they come from the device together,
        so that it is waited for once.
        """
        totals = {name: self._whole(part) for name, part in parts.items()}
        before = {k: v for k, v in self._terms.items() if not k.startswith(group + "/")}
        self._terms, self._group = {}, group
        try:
            value = self._accumulate(loss, parts, totals)
        finally:
            self._group = None
        with detail("optimizer"):
            norm = self._reduce(self.optimizers[group])
            loss_name, norm_name = f"{group}/loss", f"{group}/grad_norm"
            mine = self._numbers({**self._terms, loss_name: value, norm_name: norm})
        now: dict[str, float] = {}
        norm_value = mine.pop(norm_name)  # which is of all processes already
        for terms in self._from_all(mine):
            for name, amount in terms.items():
                now[name] = now.get(name, 0.0) + amount
        self._terms = {**before, **now, norm_name: norm_value}
        return now[loss_name], norm_value, list(totals.values())

    def _accumulate(
        self, loss: Callable[[Any, Any], Tensor], parts: Parts, totals: Mapping[str, Totals]
    ) -> Tensor:
        """Sum the gradients of micro-batches; return this process's part of the loss."""
        size = max(part.size for part in parts.values())
        pieces = math.ceil(size / self.micro_batch)
        if self.distiller.couples_examples:  # the main process alone sees all the rows at once
            parts = {name: self._gathered(part) for name, part in parts.items()}
            pieces = int(self.processes.is_main)
        cuts = self._cuts(parts, max(pieces, 1))
        value = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for piece in range(pieces):
            micro = {
                name: self._micro(part.rows(cuts[name][piece]), totals[name], pieces)
                for name, part in parts.items()
            }
            if not any(part.size for part in micro.values()):
                continue
            term = loss(micro.get("", micro), self)
            if term.requires_grad:
                with torch.autocast(self.processes.device.type, enabled=False), detail("backward"):
                    term.backward()
            value += term.detach()
        return value

    def _cuts(self, parts: Mapping[str, Batch], pieces: int) -> dict[str, Sequence[Tensor]]:
        """The rows of each part's micro-batches."""
        orders: dict[int, Tensor] = {}  # rows of parts with as many rows may belong together: cut them alike
        sort = "micro_batch" not in self.breaks()  # where the cut moves a number, it is the drawn one
        for part in parts.values():
            orders.setdefault(part.size, _by_length(part) if sort else torch.arange(part.size))
        return {name: orders[part.size].tensor_split(pieces) for name, part in parts.items()}

    def _from_all(self, mine: T) -> list[T]:
        """Return the object of every process, this one's alone where there is one."""
        if self.processes.world == 1:
            return [mine]
        found: list[Any] = [None] * self.processes.world
        torch.distributed.all_gather_object(found, mine)
        return found

    def _gathered(self, part: Batch) -> Batch:
        """Return the rows of all processes."""
        fields = self._from_all({name: value.cpu() for name, value in part.items()})
        return Batch.cat([Batch(mine) for mine in fields]).to(self.processes.device)

    def _numbers(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Plain numbers, of which those on the device are fetched together."""
        device = self.processes.device
        there = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if not there:
            return {name: float(value) for name, value in values.items()}
        column = [value.detach().reshape(()).to(device, torch.float64) for value in there.values()]
        found = dict(zip(there, torch.stack(column).tolist(), strict=True))
        return {name: found[name] if name in found else float(value) for name, value in values.items()}

    def _whole(self, part: Batch) -> Totals:
        counts = part.with_totals(None).counts()
        if self.processes.world == 1:
            return counts
        summed = self.processes.all_sum(torch.tensor([counts.tokens, counts.examples], dtype=torch.float64))
        return Totals(float(summed[0]), float(summed[1]))

    def _micro(self, rows: Batch, totals: Totals, pieces: int) -> Batch:
        if self.training.mean == "micro_batch" and not self.distiller.couples_examples:
            own, parts = rows.with_totals(None).counts(), pieces * self.processes.world
            totals = Totals(own.tokens * parts, own.examples * parts)
        return rows.with_totals(totals)

    def _reduce(self, optimizer: _Optimizer) -> Tensor:
        """Sum the group's gradients over processes and return their norm."""
        gradients = []
        for param in optimizer.params.values():
            if param.grad is None:
                # one that this process did not use may be used by another, and decays however many there are
                param.grad = torch.zeros_like(param)
            if self.processes.world > 1:
                torch.distributed.all_reduce(param.grad)
            gradients.append(param.grad)
        return torch.nn.utils.get_total_norm(gradients)

    def _descend(self, optimizer: _Optimizer, norm: float) -> None:
        clip = self.training.grad_clip
        if clip is not None and norm > clip:
            gradients = [p.grad for p in optimizer.params.values() if p.grad is not None]
            torch._foreach_mul_(gradients, clip / norm)
        for entry in optimizer.adam.param_groups:
            entry["lr"] = self._lr(optimizer.settings)
        optimizer.adam.step()
        for param in optimizer.params.values():  # what torch's fused kernel does not tell
            torch.autograd.graph.increment_version(param)
        optimizer.adam.zero_grad(set_to_none=True)
        optimizer.updates += 1

    def _lr(self, group: Group) -> float:
        """The learning rate of the next update: linear warm-up, then the schedule down to its least share."""
        peak = self.training.lr if group.lr is None else group.lr
        warmup = self.training.warmup_steps if group.warmup_steps is None else group.warmup_steps
        schedule = group.schedule or self.training.schedule
        if self.index <= warmup:
            return peak * self.index / warmup
        done = (self.index - 1 - warmup) / max(self.total - warmup, 1)
        least = self.training.min_lr_ratio
        if schedule == "constant":
            return peak
        falling = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return peak * (least + (1 - least) * falling)

    def _student_updated(self, totals: Sequence[Totals]) -> None:
        lr = self._lr(self.optimizers["student"].settings)
        self.updates += 1
        self.counters["tokens_seen"] += sum(part.tokens for part in totals)
        self.counters["prompts"] += max(part.examples for part in totals)
        written = self.updates % self.training.log_every == 0 or self.updates == self.total
        if self.recorder or written:
            line = {"step": self.updates, "lr": lr, **self._numbers(self._terms)}
            if self.recorder:
                self.recorder.losses.append(line)
            if written:
                self._write(line)
        self._terms = {}
        for milestone in self.milestones:
            if self.updates in milestone.at:
                plain = torch.autocast(self.processes.device.type, enabled=False)
                with plain, matmul_precision("highest"), telling(_NO_ROOM_TO_MEASURE):
                    milestone.action(self.updates)
                give_back()
        if self.updates >= self.total:
            raise _BudgetSpent

    # ---- the loop
    def fit(self, progress: bool = False, label: str = "") -> None:
        """Train until the budget is spent, from the newest checkpoint where there is one.

        Raises: Diverged; RuntimeError when the method never updates the student; UserError for a bad
        checkpoint.
        """
        with running(self.clock):
            self.resume()
            bar = tqdm(total=self.total, initial=self.updates, desc=label, unit="step", disable=not progress)
            idle, saved = 0, self.updates
            while self.updates < self.total:
                before = self.updates
                self.one_visit()
                bar.update(self.updates - before)
                idle = 0 if self.updates > before else idle + 1
                if idle > IDLE_VISITS:
                    raise RuntimeError(f"{idle} visits in a row made no update of the group 'student'")
                every = self.training.checkpoint_every
                if every and (self.updates - saved >= every or self.updates >= self.total):
                    self.save()
                    saved = self.updates
            bar.close()

    def one_visit(self) -> None:
        """Give the distiller its next batch."""
        self._fitting("rollout_batch", "outside of updates, where responses are sampled", self._try_visit)
        self._charge()
        self.visit += 1
        if self.fitted is not None and not self._fit_written:
            self._write_fit()
        if self.recorder and self.recorder.visit:
            self.recorder.visit(self.visit)

    def _try_visit(self) -> None:
        torch.manual_seed(stream_seed(self.seed, "torch", self.visit, self.processes.rank))
        self._set_modes()
        batch = self._draw("order", self.source)
        if self.training.position_offset:
            u = uniform(stream_seed(self.seed, "offset"), batch["example_id"], self.visit, 0)
            batch = batch.replace(position_offset=(u * (self.training.position_offset + 1)).long())
        try:
            with self._numerics():
                self.distiller.train_step(batch, self)
        except _BudgetSpent:
            pass
        finally:
            self._train_only(None)

    @contextmanager
    def _numerics(self) -> Iterator[None]:
        """How forward and backward passes of training are computed; what is measured is not."""
        with matmul_precision(self.training.matmul), self.processes.autocast():
            yield

    def _charge(self) -> None:
        for counted in self._from_all(self._counted):
            for name, amount in counted.items():
                self.counters[name] = self.counters.get(name, 0.0) + amount
        self._counted = {}

    def prepare(self, data: Any) -> Mapping[str, Batch] | None:
        """Let the distiller make what its training needs; the student may not be updated.

        This process does it alone: others may wait for the result, or find it cached.
        """
        together = self.processes
        self.processes = Processes(str(together.device), together.precision, solo=True)
        self._preparing = True
        try:
            with running(self.clock), phase("prepare"):
                made = self._fitting("rollout_batch", "in prepare", lambda: self._try_prepare(data))
            self._charge()
            return made
        finally:
            self._preparing, self.processes = False, together

    def _try_prepare(self, data: Any) -> Mapping[str, Batch] | None:
        torch.manual_seed(stream_seed(self.seed, "torch/prepare"))
        try:
            with self._numerics():
                return self.distiller.prepare(data, self)
        finally:
            self._train_only(None)

    def _draw(self, name: str, source: Source) -> Batch:
        order = self._orders.setdefault(name, Order(self.seed, name, len(source)))
        number = self._drawn.get(name, 0)
        self._drawn[name] = number + 1
        with phase("data"):
            return share(source, self._rows_of(number, name, order, source), self.processes)

    def _rows_of(self, number: int, name: str, order: Order, source: Source) -> list[int]:
        """The row numbers of batch `number` of a stream."""
        size, pool = self.training.batch_size, self.training.length_pool
        if pool == 1:
            return order.take(number * size, size)
        which, place = divmod(number, pool)
        if self._pools.get(name, (-1, []))[0] != which:
            rows = order.take(which * pool * size, pool * size)
            ranked = [row for _, row in sorted(zip(source.lengths(rows), rows, strict=True))]
            shuffled = torch.randperm(pool, generator=generator(self.seed, name + "/pool", which)).tolist()
            self._pools[name] = which, [ranked[i * size : (i + 1) * size] for i in shuffled]
        return self._pools[name][1][place]

    def _set_modes(self) -> None:
        """Eval mode everywhere, which switches dropout off; the student alone may be told to keep its own."""
        if any(module.training for module in self.distiller.modules()):
            self.distiller.eval()
        if self.training.student_dropout:
            self.distiller.student.train()

    def _train_only(self, group: str | None) -> None:
        """Let the parameters of this group alone take gradients; None: those of all groups."""
        if group == self._trainable or len(self.optimizers) == 1:
            return
        for name, optimizer in self.optimizers.items():
            for param in optimizer.params.values():
                param.requires_grad_(group in (None, name))
        self._trainable = group

    # ---- what fits into memory
    def _need_less(self) -> None:
        """Do what the settings say to need less memory: models that are not trained in bfloat16, checkpointed
        activations.
        """
        if self.training.teacher_precision == "bf16":
            kept = {id(p) for optimizer in self.optimizers.values() for p in optimizer.params.values()}
            kept |= set(map(id, self.distiller.student.parameters()))  # which is what is scored
            for model in self.distiller.children():
                if not kept & set(map(id, model.parameters())):
                    cast(model, torch.bfloat16)
        if self.training.checkpoint_activations and not checkpoint_activations(self.distiller):
            raise UserError("training.checkpoint_activations: no layer of the models can be checkpointed")

    def _known_fit(self) -> Fit:
        """The sizes to begin with: those found before, else those of the settings."""
        check_alone(self.training.fit, self.processes.world)
        if "micro_batch" in (broken := self.breaks()):
            raise UserError(
                f"training.fit: may cut batches anew, and results depend on the cut: {broken['micro_batch']}"
            )
        found = Fit.start(self.micro_batch, self.rollout_batch, self.processes.device)
        if self._fit_path is not None:
            found = found.known(self._fit_path)
        self.micro_batch, self.rollout_batch = found.micro_batch, found.rollout_batch
        return found

    @property
    def _fit_path(self) -> Path | None:
        return None if self.folder is None else self.folder / "fit.json"

    def _write_fit(self) -> None:
        if self.fitted is not None and self._fit_path is not None:
            self.fitted.save(self._fit_path)
        self._fit_written = True

    def _fitting(self, size: Size, where: str, action: Callable[[], T], rows: int | None = None) -> T:
        """Do it; where memory runs out and `training.fit` is set, do it again with half the size, or half the
        `rows` that there are where these are fewer.

        What is done again is an update, from its first micro-batch, or a visit without an update so far, from
        its start. In both, no weight and no optimizer state has moved yet; all else that may have (gradients,
        terms, counters, rows drawn, stores, state, buffers, torch's random states) is put back. What came
        before an update in its visit (samples, whose random numbers are keyed, and other updates) does not
        depend on the size. So this equals a restart of the visit from its saved random state, with the size
        there from the beginning.

        Raises: OutOfMemory without `training.fit`, for a size of 1, and where an update of the visit has
        been made before memory ran out outside of one; then the smaller size is kept for the next start.
        """
        while True:
            put_back = None if self.fitted is None else self._remember()
            made = self._made()
            try:
                return action()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                now = getattr(self, size) if rows is None else min(getattr(self, size), max(rows, 1))
                moved = self._made() > made
                if self.fitted is None or now == 1 or moved or self._uncut(size):
                    message = self._no_room(size, where, now)
                    if self.fitted is not None and moved and now > 1:
                        self._halve(size, where, now)
                        message += f"; start the run again, it goes on with training.{size} = {now // 2}"
                    raise OutOfMemory(message) from error
            # here the error is gone, and with its traceback the tensors that filled the memory
            free()
            self._halve(size, where, now)
            assert put_back is not None
            put_back()

    def _made(self) -> int:
        """The updates of all groups."""
        return sum(optimizer.updates for optimizer in self.optimizers.values())

    def _uncut(self, size: Size) -> bool:
        return size == "micro_batch" and self.distiller.couples_examples

    def _no_room(self, size: Size, where: str, now: int) -> str:
        if self._uncut(size):
            return f"out of memory {where}: its examples are coupled, thus not cut; lower training.batch_size"
        message = f"out of memory {where} with training.{size} = {now}"
        if self.fitted is not None:
            return message
        return f"{message}: lower training.{size} or set training.fit=true"

    def _halve(self, size: Size, where: str, now: int) -> None:
        assert self.fitted is not None
        setattr(self, size, now // 2)
        setattr(self.fitted, size, now // 2)
        visit = 0 if self._preparing else self.visit + 1
        self.fitted.halved.append({"size": size, "was": now, "where": where, "visit": visit})
        self._write_fit()

    def _remember(self) -> Callable[[], None]:
        """Remember what a visit may change beside weights and optimizer states; return what puts it back."""
        counted, terms, drawn = dict(self._counted), dict(self._terms), dict(self._drawn)
        state = copy.deepcopy(self.distiller.state)
        stores = [(store, store.batches()) for store in self.stores().values()]
        buffers = [(buffer, buffer.clone()) for buffer in self.distiller.buffers()]
        device = self.processes.device
        random = torch.get_rng_state()
        random_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        def put_back() -> None:
            self._counted, self._terms, self._drawn = counted, terms, drawn
            self.distiller.state = state
            for store, batches in stores:
                store.clear()
                for batch in batches:
                    store.add(batch)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for optimizer in self.optimizers.values():
                optimizer.adam.zero_grad(set_to_none=True)
            torch.set_rng_state(random)
            if random_gpu is not None:
                torch.cuda.set_rng_state(random_gpu, device)

        return put_back

    # ---- optimizers
    def _optimizer(self, group: Group) -> _Optimizer:
        params = dict(group.params)
        decay = self.training.weight_decay if group.weight_decay is None else group.weight_decay
        kept = [n for n in params if any(part in n for part in self.training.no_decay)]
        adam = adamw(
            [
                {"params": [p for n, p in params.items() if n not in kept], "weight_decay": decay},
                {"params": [params[n] for n in kept], "weight_decay": 0.0},
            ],
            lr=self.training.lr,
            betas=group.betas or self.training.betas,
            eps=self.training.eps,
        )
        return _Optimizer(params, adam, group)

    def _check_groups(self) -> None:
        names = {id(param): name for name, param in self.distiller.named_parameters() if param.requires_grad}
        found: dict[int, str] = {}
        for group, optimizer in self.optimizers.items():
            if "/" in group:
                raise ValueError(f"the group's name '{group}' may hold no '/'")
            for name, param in optimizer.params.items():
                if not param.requires_grad:
                    raise ValueError(f"{name} is in the group {group}, but it is frozen")
                if id(param) in found:
                    raise ValueError(f"{name} is in the groups {found[id(param)]} and {group}")
                found[id(param)] = group
        missing = [name for key, name in names.items() if key not in found]
        if missing:
            raise ValueError(f"trainable parameters in no group: {', '.join(missing[:5])}")
        if "student" not in self.optimizers:
            raise ValueError("groups() has no group 'student'; the budget counts its updates")

    # ---- what survives a kill
    def stores(self) -> dict[str, Store]:
        """The distiller's buffers of rows by attribute name."""
        return {name: value for name, value in vars(self.distiller).items() if isinstance(value, Store)}

    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters by group and name."""
        return {
            f"{g}/{n}": p for g, optimizer in self.optimizers.items() for n, p in optimizer.params.items()
        }

    def keep_best(self, told: Mapping[str, Any]) -> None:
        """Remember the weights as they are, and what is said of them."""
        self.best = dict(told)
        self.best_parameters = {
            name: value.detach().cpu().clone() for name, value in self.parameters().items()
        }

    def load_best(self) -> None:
        """Put the remembered weights back."""
        with torch.no_grad():
            for name, param in self.parameters().items():
                param.copy_(self.best_parameters[name])

    def breaks(self) -> dict[str, str]:
        """Return the laws that the settings of training and method break, each with its reason."""
        broken = dict(self.distiller.breaks())
        if self.training.student_dropout:
            broken["micro_batch"] = "the student's dropout masks follow the cut of the batch"
        if self.training.mean == "micro_batch":
            broken["micro_batch"] = "means over micro-batches weigh tokens by the size of their micro-batch"
        return broken

    def shared_tensors(self) -> dict[str, Tensor]:
        """Trained parameters, registered buffers and optimizer states by name."""
        tensors: dict[str, Tensor] = {f"buffer/{n}": b for n, b in self.distiller.named_buffers()}
        tensors |= {f"best/{name}": value for name, value in self.best_parameters.items()}
        for group, optimizer in self.optimizers.items():
            for name, param in optimizer.params.items():
                tensors[f"param/{group}/{name}"] = param
                for key, value in optimizer.adam.state.get(param, {}).items():
                    tensors[f"adam/{group}/{key}/{name}"] = torch.as_tensor(value)
        return tensors

    def prepared_tensors(self) -> dict[str, Tensor]:
        """What `prepare` may have changed: everything shared but the student's group."""
        return {
            n: v
            for n, v in self.shared_tensors().items()
            if not n.startswith(("param/student/", "adam/student/"))
        }

    def own_tensors(self) -> dict[str, Tensor]:
        """The rows in the distiller's stores, which differ between processes."""
        return {
            f"{name}/{i}/{key}": value
            for name, store in self.stores().items()
            for i, batch in enumerate(store.batches())
            for key, value in batch.items()
        }

    def state(self) -> dict[str, Any]:
        """What else a resumed training needs, as JSON."""
        return {
            "updates": self.updates,
            "visit": self.visit,
            "group_updates": {name: optimizer.updates for name, optimizer in self.optimizers.items()},
            "counters": self.counters,
            "drawn": self._drawn,
            "best": self.best,
            "curve": self.curve,
            "terms": {name: float(value) for name, value in self._terms.items()},
            "log_bytes": self._log_bytes,
            "distiller": self.distiller.state,
            "clock": self.clock.state(),
        }

    def save(self) -> None:
        """Write a checkpoint."""
        if self.checkpoints:
            with phase("checkpoint"):
                self.checkpoints.save(self.updates, self.shared_tensors(), self.own_tensors(), self.state())

    def resume(self) -> None:
        """Go back to the newest checkpoint, and cut the log to its length.

        Raises: UserError for a checkpoint that is torn or foreign, has not the tensors of this distiller, or
        counts on more of the log than there is.
        """
        found = self.checkpoints.load() if self.checkpoints else None
        if found is None:
            self._cut_log(0)
            return
        shared, own, state = found
        mine = {
            name: value
            for name, value in self.shared_tensors().items()
            if not name.startswith(("adam/", "best/"))
        }
        for name, value in mine.items():
            if name not in shared or shared[name].shape != value.shape:
                where = f"checkpoint {self.checkpoints.newest() if self.checkpoints else ''}"
                raise UserError(f"{where}: it has no {name} of shape {list(value.shape)}; delete the folder")
        self.load_tensors(shared, own)
        self.updates, self.visit = state["updates"], state["visit"]
        self.counters, self._drawn, self.best = state["counters"], state["drawn"], state["best"]
        self.curve = list(state.get("curve", []))  # older checkpoints have none
        self._terms, self.distiller.state = dict(state["terms"]), state["distiller"]
        for name, count in state["group_updates"].items():
            self.optimizers[name].updates = count
        self.clock.load(state["clock"])
        self._cut_log(state["log_bytes"])

    def load_tensors(self, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Put back what `shared_tensors` and `own_tensors` gave."""
        device = self.processes.device
        with torch.no_grad():
            for name, buffer in self.distiller.named_buffers():
                buffer.copy_(shared[f"buffer/{name}"])
            for group, optimizer in self.optimizers.items():
                for name, param in optimizer.params.items():
                    param.copy_(shared[f"param/{group}/{name}"])
            self.best_parameters = {
                k.removeprefix("best/"): v for k, v in shared.items() if k.startswith("best/")
            }
            for key, value in shared.items():
                if key.startswith("adam/"):
                    _, group, entry, name = key.split("/", 3)
                    optimizer = self.optimizers[group]
                    optimizer.adam.state[optimizer.params[name]][entry] = value.to(device).clone()
        batches: dict[tuple[str, int], dict[str, Tensor]] = {}
        for key, value in own.items():
            attribute, number, name = key.split("/", 2)
            batches.setdefault((attribute, int(number)), {})[name] = value.to(device)
        for store in self.stores().values():
            store.clear()
        for (name, _), fields in sorted(batches.items()):
            self.stores()[name].add(Batch(fields))

    # ---- the log
    def _write(self, line: dict[str, float]) -> None:
        if self.track and self.processes.is_main:
            self.track(line, self.updates)
        if self.folder is None or not self.processes.is_main:
            return
        text = json.dumps(line) + "\n"
        with (self.folder / "steps.jsonl").open("a") as file:
            file.write(text)
        self._log_bytes += len(text)

    def _cut_log(self, length: int) -> None:
        self._log_bytes = length
        if self.folder is None or not self.processes.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "steps.jsonl"
        with path.open("a") as file:
            if file.tell() < length:
                raise UserError(f"{path}: its end is lost; delete {self.folder} to start again")
            os.truncate(file.fileno(), length)


class SourceData:
    """The rows that `prepare` and `finish` may read: `batches("train")` in order, with a progress bar."""

    def __init__(
        self, sources: Mapping[str, Source], batch_size: int, device: torch.device, progress: bool = False
    ) -> None:
        self._sources, self._size, self._device, self._progress = sources, batch_size, device, progress

    @property
    def names(self) -> list[str]:
        """The splits and extra sets that there are."""
        return list(self._sources)

    def batches(self, split: str, batch_size: int | None = None, limit: int | None = None) -> Iterator[Batch]:
        """Yield the rows of `split` in order, all or `limit` at even distances.

        Raises: UserError for a split that the board does not give.
        """
        if split not in self._sources:
            known = ", ".join(self._sources)
            raise UserError(f"prepare: there are no rows '{split}'; known: {known}. Rows have `extra` sets.")
        source, size = self._sources[split], batch_size or self._size
        count = len(source) if limit is None else min(limit, len(source))
        rows = [i * len(source) // count for i in range(count)]
        for start in tqdm(range(0, count, size), desc=f"read {split}", disable=not self._progress):
            yield source.batch(rows[start : start + size]).to(self._device)
