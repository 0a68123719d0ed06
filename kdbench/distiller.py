"""What the author of a method reads first: `Batch`, `Step`, `Group`, `Store` and `Distiller`.

A method is one file with one subclass of `Distiller`; most write `loss` and nothing else. Shapes: B rows, T
tokens, V vocabulary, N target positions (the response tokens of all rows, row by row).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Totals:
    """How many target tokens and examples the *whole* update holds, over all micro-batches and processes."""

    tokens: float
    examples: float


class Batch(Mapping[str, Tensor]):
    """Rows of examples: tensors that share their first dimension.

    A causal language model's batch holds `example_id` [B] int64, `input_ids` [B, T] int64 (prompt, then
    response, then padding of any id), `prompt_length` [B] and `length` [B] (prompt and response). Masks
    follow from the lengths, never from ids, so that a padding id equal to the end-of-sequence id hides no
    target.
    """

    def __init__(self, fields: Mapping[str, Tensor], totals: Totals | None = None) -> None:
        if not fields:
            raise ValueError("a batch needs at least one field")
        sizes = {name: len(value) for name, value in fields.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"fields of one batch differ in their number of rows: {sizes}")
        self._fields = dict(fields)
        self.size: int = next(iter(sizes.values()))
        self._totals = totals

    def __getitem__(self, name: str) -> Tensor:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Batch({', '.join(f'{name} {list(value.shape)}' for name, value in self.items())})"

    def counts(self) -> Totals:
        """Return the target tokens and examples of these rows alone: response tokens, all tokens where there
        is no response, one per row where there are no lengths.
        """
        if "prompt_length" in self:
            tokens = float((self["length"] - self["prompt_length"].clamp(min=1)).clamp(min=0).sum())
        elif "length" in self:
            tokens = float(self["length"].sum())
        else:
            tokens = float(self.size)
        return Totals(tokens, float(self.size))

    @property
    def totals(self) -> Totals:
        """The counts that means divide by: those of the whole update where the harness has set them."""
        return self.counts() if self._totals is None else self._totals

    def rows(self, index: Tensor | slice | Sequence[int]) -> Batch:
        """Return the chosen rows, with the totals kept."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, dtype=torch.long, device=next(iter(self.values())).device)
        return Batch({name: value[index] for name, value in self.items()}, self._totals)

    def of(self, role: str) -> Batch:
        """Return the rows as one role's model reads them, with the totals kept.

        The student's fields have plain names; those of another role are named `<role>.<field>`, since its
        tokenizer may be another, and stand in place of the student's.

        Raises: KeyError where the batch holds no field of that role.
        """
        fields = {name: value for name, value in self.items() if "." not in name}
        if role != "student":
            start = f"{role}."
            own = {n.removeprefix(start): value for n, value in self.items() if n.startswith(start)}
            if not own:
                raise KeyError(f"the batch holds no field of the role '{role}'")
            fields |= own
        return Batch(fields, self._totals)

    def replace(self, **fields: Tensor) -> Batch:
        """Return a batch with these fields added or exchanged."""
        return Batch({**self._fields, **fields}, self._totals)

    def with_totals(self, totals: Totals | None) -> Batch:
        """Return the same rows whose means divide by `totals`."""
        return Batch(self._fields, totals)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`."""
        return Batch({name: value.to(device) for name, value in self.items()}, self._totals)

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Return the rows of all batches, in order; dimension 1 is padded with zeros to the widest."""
        if not batches:
            raise ValueError("no batches to join")
        joined = {}
        for name in batches[0]:
            parts = [batch[name] for batch in batches]
            if parts[0].dim() > 1:
                width = max(part.shape[1] for part in parts)
                parts = [_widen(part, width) for part in parts]
            joined[name] = torch.cat(parts)
        return Batch(joined)

    def save(self, path: Path) -> None:
        """Write the fields as safetensors."""
        save_file({name: value.detach().cpu().contiguous() for name, value in self.items()}, path)

    @staticmethod
    def load(path: Path) -> Batch:
        """Read what `save` wrote."""
        return Batch(load_file(path))


def _widen(value: Tensor, width: int) -> Tensor:
    if value.shape[1] == width:
        return value
    wide = value.new_zeros((value.shape[0], width, *value.shape[2:]))
    wide[:, : value.shape[1]] = value
    return wide


class Store:
    """A buffer of rows that survives a kill: what a visit leaves for a later one."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []

    @property
    def size(self) -> int:
        """The number of rows."""
        return sum(batch.size for batch in self._batches)

    def add(self, batch: Batch) -> None:
        """Append rows."""
        self._batches.append(batch)

    def clear(self) -> None:
        """Forget all rows."""
        self._batches = []

    def batches(self) -> list[Batch]:
        """Return the batches as they were added."""
        return list(self._batches)


def target_mask(batch: Batch) -> Tensor:
    """Return bool [B, T-1]: entry (b, j) says that the token after position j of row b is a target."""
    token = torch.arange(1, batch["input_ids"].shape[1], device=batch["input_ids"].device)
    return (token >= batch["prompt_length"].clamp(min=1)[:, None]) & (token < batch["length"][:, None])


def target_tokens(batch: Batch) -> Tensor:
    """Return the N response tokens, row by row."""
    return batch["input_ids"][:, 1:][target_mask(batch)]


def scatter_targets(values: Tensor, batch: Batch) -> Tensor:
    """Return `values` [N] laid out as [B, T-1], zero where there is no target."""
    out = values.new_zeros(target_mask(batch).shape)
    out[target_mask(batch)] = values
    return out


def gather_targets(laid_out: Tensor, batch: Batch) -> Tensor:
    """Return the N entries of `laid_out` [B, T-1] (or wider) that stand at target positions: undoes
    `scatter_targets`.
    """
    mask = target_mask(batch)
    return laid_out[:, : mask.shape[1]][mask]


def token_mean(values: Tensor, batch: Batch) -> Tensor:
    """Return the sum of `values` [N] over the number of target tokens of the whole update, a scalar."""
    return values.sum() / max(batch.totals.tokens, 1.0)


def example_mean(values: Tensor, batch: Batch) -> Tensor:
    """Return the sum of `values` [B] over the number of examples of the whole update, a scalar."""
    return values.sum() / max(batch.totals.examples, 1.0)


@dataclass
class Group:
    """Parameters that one optimizer moves. None takes the board's training setting."""

    params: Iterable[tuple[str, nn.Parameter]]
    lr: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    schedule: Literal["constant", "cosine", "linear"] | None = None
    warmup_steps: int | None = None


Parts = Mapping[str, Batch]


class Step(Protocol):
    """What a visit may use: the only way to change weights, and streams that a seed fixes."""

    seed: int
    visit: int
    total: int
    rollout_batch: int
    max_new_tokens: int

    @property
    def index(self) -> int:
        """The number (1..T) of the student's update that comes next."""

    @property
    def progress(self) -> float:
        """The finished share of the student's updates."""

    @overload
    def update(self, group: str, loss: Callable[[Batch, Step], Tensor], batch: Batch) -> None: ...
    @overload
    def update(self, group: str, loss: Callable[[Parts, Step], Tensor], batch: Parts) -> None: ...

    def extra(self, name: str) -> Batch | None:
        """The next batch of the board's extra set `name` (this process' share), or None where the board has
        none.
        """

    def rng(self, name: str) -> torch.Generator:
        """A CPU generator fixed by seed, name and visit."""

    def all_sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over processes."""

    def count(self, name: str, amount: float) -> None:
        """Add to a counter of the run's budget, such as `tokens_sampled`."""

    def log(self, **terms: Tensor | float) -> None:
        """Write terms of this update beside its loss; inside a loss they are summed over micro-batches."""


class Data(Protocol):
    """What `prepare` and `finish` may read."""

    @property
    def names(self) -> Sequence[str]:
        """The splits and extra sets that there are."""

    def batches(self, split: str, batch_size: int | None = None, limit: int | None = None) -> Iterator[Batch]:
        """All rows of `split` ("train", "dev" or the name of an extra set) in order, with a progress bar;
        with `limit` so many, spread evenly over it.
        """


class Distiller(nn.Module):
    """A method. Assign models and modules in `__init__`: torch registers them, so they are moved and saved.

    The argument names of `__init__` after `cfg` are the roles that a board must fill. `self.state` (plain
    JSON values), parameters, registered buffers and `Store`s survive a kill; nothing else does.
    """

    head: ClassVar[str] = "causal_lm"
    needs: ClassVar[tuple[str, ...]] = ("example_id", "input_ids", "prompt_length", "length")
    couples_examples: ClassVar[bool] = False
    prepare_reads: ClassVar[tuple[str, ...] | None] = None  # settings that `prepare` depends on; None: all

    @dataclass
    class Config:
        """Settings of the method; a board's row and `--set method.key=value` change them."""

    def __init__(self, cfg: Any, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.student = student
        if teacher is not None:
            self.teacher = freeze(teacher)
        self.state: dict[str, Any] = {}

    @classmethod
    def added_positions(cls, cfg: Any) -> Mapping[str, int]:
        """Return the positions that the method puts before the text, by role: a soft prompt's length."""
        return {}

    def breaks(self) -> Mapping[str, str]:
        """Return the laws that the settings break, each with its reason."""
        return {}

    def groups(self) -> dict[str, Group]:
        """Return the parameters by optimizer group; the budget counts updates of `student`."""
        return {"student": Group([(n, p) for n, p in self.named_parameters() if p.requires_grad])}

    def prepare(self, data: Data, step: Step) -> Mapping[str, Batch] | None:
        """Make what training needs before its first visit; rows that it returns replace those of "train" or
        of an extra set.
        """
        return None

    def train_step(self, batch: Batch, step: Step) -> None:
        """Use one batch of the training data."""
        step.update("student", self.loss, batch)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the scalar to descend; means divide by the counts of the whole update (`token_mean`)."""
        raise NotImplementedError(f"{type(self).__name__} must define loss or train_step")

    def finish(self, data: Data) -> None:
        """Measure what is kept with the scored model, whose weights are in place and stay as they are."""

    def predictor(self) -> nn.Module:
        """Return the model that is scored."""
        return self.student

    def measures(self) -> Mapping[str, float]:
        """Return numbers about the method's own parts, which the record keeps as scores `method/<name>`."""
        return {}

    def on_eval(self, metrics: Mapping[str, float]) -> None:
        """Hear the dev scores, at the board's cadence."""


def freeze(model: nn.Module) -> nn.Module:
    """Return `model` in eval mode with no parameter to train."""
    return model.requires_grad_(False).eval()
