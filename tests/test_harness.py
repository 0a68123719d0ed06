"""The training loop: optimizers by hand, schedules, budgets, logs, and what a method may not do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdbench import harness
from kdbench.clock import running
from kdbench.config import TrainingConfig
from kdbench.distiller import Batch, Distiller, Group, Step, Store, example_mean, freeze, token_mean
from kdbench.errors import UserError
from kdbench.harness import BatchSource, Diverged, Milestone, Order, Recorder, SourceData, Trainer, share
from kdbench.processes import Processes

X = [[1.0, -2.0], [0.5, 1.5], [3.0, 0.0], [-1.0, 2.0], [2.0, 1.0], [0.0, -1.0], [1.5, 1.5], [-2.0, 0.5]]
Y = [1.0, -1.0, 4.0, 0.0, 2.0, 3.0, -2.0, 1.0]


def rows(count: int = 8) -> BatchSource:
    """Inputs `x` [B, 2] and targets `y` [B], in float64."""
    fields = {
        "example_id": torch.arange(count) + 100,
        "x": torch.tensor(X[:count], dtype=torch.float64),
        "y": torch.tensor(Y[:count], dtype=torch.float64),
    }
    return BatchSource(Batch(fields))


class Line(nn.Module):
    """weight . x + bias, in float64."""

    def __init__(self, weight: Sequence[float] = (0.3, -0.2), bias: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([bias], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Fit(Distiller):
    """Least squares; the mean is over the examples of the update."""

    needs = ("example_id", "x", "y")

    @dataclass
    class Config:
        inner: int = 1  # updates per visit

    def __init__(self, cfg: Config | None = None, student: nn.Module | None = None) -> None:
        super().__init__(cfg or self.Config(), student or Line())

    def train_step(self, batch: Batch, step: Step) -> None:
        for _ in range(self.cfg.inner):
            step.update("student", self.loss, batch)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        error = (self.student(batch["x"]) - batch["y"]).square()
        step.log(error=example_mean(error, batch))
        return example_mean(error, batch)


def training(**changed: Any) -> TrainingConfig:
    told: dict[str, Any] = {"optimizer_steps": 6, "batch_size": 4, "lr": 0.1, "schedule": "constant"}
    return TrainingConfig(
        **{**told, "weight_decay": 0.0, "grad_clip": None, "checkpoint_every": 0, **changed}
    )


def trained(distiller: Distiller, source: Any = None, *, seed: int = 3, **options: Any) -> Trainer:
    """Train to the end; `options` are training settings, or arguments of Trainer."""
    known = ("processes", "extras", "folder", "milestones", "recorder", "track")
    arguments = {name: options.pop(name) for name in known if name in options}
    arguments.setdefault("recorder", Recorder())
    trainer = Trainer(distiller, source or rows(), training(**options), seed, **arguments)
    trainer.fit()
    return trainer


def lines(trainer: Trainer) -> list[dict[str, float]]:
    assert trainer.recorder is not None
    return trainer.recorder.losses


# ---------------------------------------------------------------------------------------- optimizer
SCHEDULES = {  # 6 steps, 2 of them warm-up, lr 0.1 falling to a tenth
    "constant": [0.05, 0.1, 0.1, 0.1, 0.1, 0.1],
    "linear": [0.05, 0.1, 0.1, 0.0775, 0.055, 0.0325],
    "cosine": [0.05, 0.1, 0.1, 0.01 + 0.09 * 0.853553390593, 0.055, 0.01 + 0.09 * 0.146446609407],
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_learning_rate_by_hand(schedule: str) -> None:
    done = trained(Fit(), schedule=schedule, warmup_steps=2, min_lr_ratio=0.1)
    assert [line["lr"] for line in lines(done)] == pytest.approx(SCHEDULES[schedule], rel=1e-9)


def test_without_warmup_the_first_update_has_the_whole_rate() -> None:
    done = trained(Fit(), schedule="linear", optimizer_steps=4)
    assert [line["lr"] for line in lines(done)] == pytest.approx([0.1, 0.075, 0.05, 0.025])


class Two(Fit):
    """A scale with an optimizer of its own, moved before the student in each visit."""

    def __init__(self, group: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.group = dict(group or {})
        self.seen: list[float] = []

    def groups(self) -> dict[str, Group]:
        return {
            "student": Group(self.student.named_parameters(prefix="student")),
            "scale": Group([("scale", self.scale)], **self.group),
        }

    def train_step(self, batch: Batch, step: Step) -> None:
        step.update("scale", self.loss, batch)
        step.update("student", self.loss, batch)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        self.seen.append(float(self.scale.detach()))
        return example_mean((self.scale * self.student(batch["x"]) - batch["y"]).square(), batch)


def test_group_has_settings_of_its_own() -> None:
    own = {"lr": 0.01, "schedule": "linear", "warmup_steps": 0, "weight_decay": 0.5, "betas": (0.5, 0.6)}
    rates: list[float] = []
    method = Two(own)
    trainer = Trainer(method, rows(), training(warmup_steps=3, weight_decay=0.25), 1)
    adam = trainer.optimizers["scale"].adam
    trainer.recorder = Recorder(visit=lambda visit: rates.append(adam.param_groups[0]["lr"]))
    trainer.fit()
    # the student is one update further when the visit has ended, not when the scale moved
    assert rates == pytest.approx([0.01 * (1 - i / 6) for i in range(6)])
    assert [entry["weight_decay"] for entry in adam.param_groups] == [0.5, 0.0]
    assert adam.param_groups[0]["betas"] == (0.5, 0.6)
    student = trainer.optimizers["student"].adam
    assert [entry["weight_decay"] for entry in student.param_groups] == [0.25, 0.0]
    assert student.param_groups[0]["betas"] == (0.9, 0.999)


def adamw_by_hand(steps: int, lr: float, decay: float, clip: float | None, eps: float) -> list[np.ndarray]:
    """The weights of `Fit` after each update on all rows; bias is not decayed."""
    x, y = np.array(X), np.array(Y)
    beta1, beta2 = 0.9, 0.999
    w, m, v = np.array([0.3, -0.2, 0.1]), np.zeros(3), np.zeros(3)
    after = []
    for step in range(1, steps + 1):
        error = x @ w[:2] + w[2] - y
        g = np.array([2 * (error * x[:, 0]).mean(), 2 * (error * x[:, 1]).mean(), 2 * error.mean()])
        norm = math.sqrt((g**2).sum())
        if clip is not None and norm > clip:
            g = g * clip / norm
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        w = w - lr * decay * w * np.array([1, 1, 0])
        w = w - lr * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps)
        after.append(w)
    return after


@pytest.mark.parametrize("clip", [None, 1.5])
def test_adamw_by_hand(clip: float | None) -> None:
    found: list[np.ndarray] = []
    method = Fit()
    model: Any = method.student
    keep = Recorder(visit=lambda visit: found.append(torch.cat([model.weight, model.bias]).detach().numpy()))
    options = {"optimizer_steps": 12, "batch_size": 8, "weight_decay": 0.2, "eps": 1e-3, "grad_clip": clip}
    done = trained(method, recorder=keep, **options)
    expected = adamw_by_hand(12, 0.1, 0.2, clip, 1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    norms = [line["student/grad_norm"] for line in lines(done)]
    assert min(norms) < 1.5 < max(norms)  # the clip acts in some updates, not in all


def test_no_decay_names_are_parts_of_names() -> None:
    method = Fit()
    adam = (
        Trainer(method, rows(), training(weight_decay=0.3, no_decay=("eight",)), 1).optimizers["student"].adam
    )
    assert [(len(e["params"]), e["weight_decay"]) for e in adam.param_groups] == [(1, 0.3), (1, 0.0)]
    assert adam.param_groups[1]["params"][0] is method.student.weight


def test_parameter_without_gradient_decays_all_the_same() -> None:
    """A parameter that no loss reached has a zero gradient, on one process as on two."""
    student = Line()
    student.spare = nn.Parameter(torch.ones(1, dtype=torch.float64))
    trained(Fit(student=student), optimizer_steps=1, weight_decay=0.5)
    assert float(student.spare.detach()) == pytest.approx(0.95)


def test_gradients_are_summed_over_micro_batches_and_seen_before_clipping() -> None:
    seen: list[dict[str, Tensor]] = []
    for size in (1, 3, None):
        keep = Recorder(gradient=lambda group, gradient: seen.append(gradient))
        options = {"optimizer_steps": 1, "batch_size": 8, "grad_clip": 0.01}
        trained(Fit(), recorder=keep, micro_batch=size, **options)
    for gradient in seen:
        assert set(gradient) == {"student.weight", "student.bias"}
        error = np.array(X) @ [0.3, -0.2] + 0.1 - np.array(Y)
        assert float(gradient["student.bias"]) == pytest.approx(2 * error.mean(), rel=1e-12)


# ------------------------------------------------------------------------------------ one update
def test_second_group_sees_new_weights() -> None:
    method = Two()
    trained(method, optimizer_steps=3)
    before, after = method.seen[::2], method.seen[1::2]
    assert before[0] == 1.0
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert after[:-1] == before[1:]


def test_micro_batch_mean_is_the_mean_of_their_means() -> None:
    done = trained(Fit(), optimizer_steps=1, batch_size=8, micro_batch=3, mean="micro_batch")
    error = (np.array(X) @ [0.3, -0.2] + 0.1 - np.array(Y)) ** 2
    taken = Order(3, "order", 8).take(0, 8)
    cuts = [taken[0:3], taken[3:6], taken[6:8]]
    assert lines(done)[0]["student/loss"] == pytest.approx(np.mean([error[cut].mean() for cut in cuts]))


class Pairs(Fit):
    """Two parts whose rows belong together."""

    def train_step(self, batch: Batch, step: Step) -> None:
        first = torch.arange(batch.size) + 1
        parts = {
            "long": batch.replace(length=first, prompt_length=torch.zeros_like(first)),
            "short": batch.replace(length=first.flip(0), prompt_length=torch.zeros_like(first)),
        }
        step.update("student", self.paired, parts)

    def paired(self, parts: Mapping[str, Batch], step: Step) -> Tensor:
        assert parts["long"]["example_id"].tolist() == parts["short"]["example_id"].tolist()
        assert parts["long"].totals.examples == 8
        return super().loss(parts["long"], step)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_parts_are_cut_alike(size: int) -> None:
    trained(Pairs(), optimizer_steps=2, batch_size=8, micro_batch=size)


def test_parts_of_other_sizes_are_spread_over_the_pieces() -> None:
    sizes: list[tuple[int, int]] = []

    class Uneven(Fit):
        def train_step(self, batch: Batch, step: Step) -> None:
            step.update("student", self.both, {"all": batch, "few": batch.rows([0, 1, 2])})

        def both(self, parts: Mapping[str, Batch], step: Step) -> Tensor:
            sizes.append((parts["all"].size, parts["few"].size))
            assert parts["few"].totals.examples == 3
            return super().loss(parts["all"], step) + super().loss(parts["few"], step)

    trained(Uneven(), optimizer_steps=1, batch_size=8, micro_batch=2)
    assert sizes == [(2, 1), (2, 1), (2, 1), (2, 0)]


def test_rows_of_like_length_share_a_micro_batch() -> None:
    widths: list[list[int]] = []

    class Widths(Fit):
        def train_step(self, batch: Batch, step: Step) -> None:
            length = torch.tensor([5, 2, 9, 3, 7, 1, 8, 4])
            step.update("student", self.loss, batch.replace(length=length, prompt_length=length * 0))

        def loss(self, batch: Batch, step: Step) -> Tensor:
            widths.append(sorted(batch["length"].tolist()))
            return super().loss(batch, step)

    trained(Widths(), optimizer_steps=1, batch_size=8, micro_batch=2)
    assert widths == [[1, 2], [3, 4], [5, 7], [8, 9]]


def test_coupled_examples_are_not_cut() -> None:
    sizes: list[int] = []

    class Coupled(Fit):
        couples_examples = True

        def loss(self, batch: Batch, step: Step) -> Tensor:
            sizes.append(batch.size)
            return super().loss(batch, step)

    trained(Coupled(), optimizer_steps=2, batch_size=8, micro_batch=1)
    assert sizes == [8, 8]


class Linears(Distiller):
    """Two updates per visit of a float32 model, so that bf16 applies."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(None, nn.Linear(2, 1))

    def train_step(self, batch: Batch, step: Step) -> None:
        with torch.no_grad():
            self.student(batch["x"].float())  # a cast made without gradients may not serve the loss
        for _ in range(3):
            step.update("student", self.loss, batch)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        return example_mean((self.student(batch["x"].float())[:, 0].float() - batch["y"]).square(), batch)


def test_bf16_sees_new_weights_within_a_visit() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        done = trained(Linears(), precision=precision, optimizer_steps=6, batch_size=8)
        losses.append([line["student/loss"] for line in lines(done)])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


# ------------------------------------------------------------------------------------- what diverges
def test_loss_that_is_not_finite_names_group_and_step() -> None:
    class Explodes(Two):
        def loss(self, batch: Batch, step: Step) -> Tensor:
            value = super().loss(batch, step)
            return value / 0 if step.index == 3 else value

    method = Explodes()
    trainer = Trainer(method, rows(), training(), 1)
    with pytest.raises(Diverged, match="update 3 of 'scale': loss inf, gradient norm "):
        trainer.fit()
    assert trainer.updates == 2
    assert math.isfinite(float(method.scale.detach()))


def test_gradient_that_is_not_finite_diverges() -> None:
    class Steep(Fit):
        def loss(self, batch: Batch, step: Step) -> Tensor:
            return (self.student.weight * 0).sum().abs().sqrt()

    with pytest.raises(Diverged, match="update 1 of 'student': loss 0.0, gradient norm nan"):
        trained(Steep())


# -------------------------------------------------------------------------------- budget and visits
@pytest.mark.parametrize("total", [1, 4, 6, 7])
def test_budget_ends_in_mid_visit(total: int) -> None:
    after: list[int] = []

    class Inner(Fit):
        def train_step(self, batch: Batch, step: Step) -> None:
            super().train_step(batch, step)
            after.append(step.index - 1)

    done = trained(Inner(Fit.Config(inner=3)), optimizer_steps=total)
    assert done.updates == total == len(lines(done))
    assert done.visit == math.ceil(total / 3)
    assert after == [i for i in (3, 6) if i < total]
    assert done.progress == 1.0


def test_no_update_follows_the_budget() -> None:
    class Stubborn(Two):
        def train_step(self, batch: Batch, step: Step) -> None:
            for group in ("student", "scale", "student"):
                try:
                    step.update(group, self.loss, batch)
                except Exception:
                    pytest.fail("the end of the budget is no error of the method")
                except BaseException:
                    continue

    method = Stubborn()
    done = trained(method, optimizer_steps=1)
    assert (done.updates, len(method.seen), done.visit) == (1, 1, 1)


def test_store_may_be_filled_over_visits() -> None:
    class Fills(Fit):
        def __init__(self) -> None:
            super().__init__()
            self.store = Store()

        def train_step(self, batch: Batch, step: Step) -> None:
            self.store.add(batch)
            if self.store.size == 12:
                for part in self.store.batches():
                    step.update("student", self.loss, part)
                self.store.clear()

    done = trained(Fills(), optimizer_steps=5)
    assert (done.updates, done.visit, done.counters["prompts"]) == (5, 6, 20)


def test_method_that_never_updates_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "IDLE_VISITS", 5)

    class Idle(Fit):
        def train_step(self, batch: Batch, step: Step) -> None:
            pass

    with pytest.raises(RuntimeError, match="6 visits in a row made no update of the group 'student'"):
        trained(Idle())


def test_index_progress_and_streams() -> None:
    told: list[tuple[int, float, int]] = []
    draws: dict[tuple[str, int], float] = {}

    class Curious(Fit):
        def train_step(self, batch: Batch, step: Step) -> None:
            for name in ("a", "b"):
                draws[name, step.visit] = float(torch.rand((), generator=step.rng(name)))
                assert draws[name, step.visit] == float(torch.rand((), generator=step.rng(name)))
            for _ in range(2):
                told.append((step.index, step.progress, step.visit))
                step.update("student", self.loss, batch)

    trained(Curious(), optimizer_steps=4)
    assert told == [(1, 0.0, 0), (2, 0.25, 0), (3, 0.5, 1), (4, 0.75, 1)]
    assert len(set(draws.values())) == 4
    first = dict(draws)
    trained(Curious(), optimizer_steps=4)
    assert draws == first
    trained(Curious(), optimizer_steps=4, seed=4)
    assert not set(draws.values()) & set(first.values())


def test_modes_are_set_before_each_visit() -> None:
    modes: list[tuple[bool, bool]] = []

    class Modes(Fit):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = freeze(Line())

        def train_step(self, batch: Batch, step: Step) -> None:
            modes.append((self.student.training, self.teacher.training))
            super().train_step(batch, step)
            self.train()

    trained(Modes(), optimizer_steps=2)
    trained(Modes(), optimizer_steps=2, student_dropout=True)
    assert modes == [(False, False)] * 2 + [(True, False)] * 2


# --------------------------------------------------------------------------------------------- data
def test_each_epoch_is_a_permutation_of_its_own() -> None:
    order = Order(5, "order", 7)
    stream = order.take(0, 21)
    epochs = [stream[0:7], stream[7:14], stream[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert Order(5, "order", 7).take(5, 9) == stream[5:14]  # over the end of an epoch, from anywhere
    assert Order(6, "order", 7).take(0, 7) != epochs[0]
    assert Order(5, "extra/lm", 7).take(0, 7) != epochs[0]


class Notes(Fit):
    """Keeps what each visit was given."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Batch] = []

    def train_step(self, batch: Batch, step: Step) -> None:
        self.batches.append(batch)
        super().train_step(batch, step)


def test_batches_follow_the_order() -> None:
    method = Notes()
    trained(method, optimizer_steps=3, batch_size=3)
    ids = [batch["example_id"].tolist() for batch in method.batches]
    expected = [100 + row for row in Order(3, "order", 8).take(0, 9)]
    assert [i for part in ids for i in part] == expected
    assert [batch["row"].tolist() for batch in method.batches] == [[0, 1, 2]] * 3


def test_pool_by_length_keeps_the_rows_and_sorts_the_batches() -> None:
    length = torch.tensor([9, 1, 8, 2, 7, 3, 6, 4])
    fields = {**dict(rows().batch(range(8))), "length": length, "prompt_length": length * 0}
    method = Notes()
    trained(method, BatchSource(Batch(fields)), optimizer_steps=8, batch_size=2, length_pool=4)
    for epoch in (method.batches[:4], method.batches[4:]):
        pairs = [tuple(sorted(batch["length"].tolist())) for batch in epoch]
        assert sorted(pairs) == [(1, 2), (3, 4), (6, 7), (8, 9)]
    assert [b["length"].tolist() for b in method.batches[:4]] != [
        b["length"].tolist() for b in method.batches[4:]
    ]


def test_extra_sets_have_a_stream_of_their_own() -> None:
    seen: list[list[int]] = []

    class Reads(Fit):
        def train_step(self, batch: Batch, step: Step) -> None:
            text = step.extra("lm")
            assert step.extra("nothing") is None
            assert text is not None
            seen.append(text["example_id"].tolist())
            super().train_step(batch, step)

    plain, reading = Notes(), Reads()
    trained(plain, optimizer_steps=4)
    trained(reading, optimizer_steps=4, extras={"lm": rows(5)})
    expected = [100 + row for row in Order(3, "extra/lm", 5).take(0, 16)]
    assert [i for part in seen for i in part] == expected
    assert torch.equal(plain.student.weight, reading.student.weight)


@pytest.mark.parametrize(("count", "world"), [(5, 2), (3, 2), (1, 2), (4, 3), (8, 1)])
def test_shares_make_up_the_batch(count: int, world: int) -> None:
    parts = []
    for rank in range(world):
        processes = Processes(solo=True)
        processes.rank, processes.world = rank, world
        parts.append(share(rows(), [7 - i for i in range(count)], processes))
    assert torch.cat([part["row"] for part in parts]).tolist() == list(range(count))
    assert torch.cat([part["example_id"] for part in parts]).tolist() == [107 - i for i in range(count)]
    sizes = [part.size for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(part["x"].shape == (part.size, 2) for part in parts)


def test_position_offsets_are_keyed_by_example_and_visit() -> None:
    found: dict[tuple[int, int], int] = {}
    for size, count in ((4, 24), (2, 48)):
        method = Notes()
        trained(method, optimizer_steps=count, batch_size=size, position_offset=3)
        for visit, batch in enumerate(method.batches):
            for example, offset in zip(
                batch["example_id"].tolist(), batch["position_offset"].tolist(), strict=True
            ):
                assert found.setdefault((visit, example), offset) == offset
    assert set(found.values()) == {0, 1, 2, 3}
    plain = Notes()
    trained(plain, optimizer_steps=1)
    assert "position_offset" not in plain.batches[0]


def test_prepare_reads_rows_in_order() -> None:
    data = SourceData({"train": rows(), "dev": rows(3)}, 5, torch.device("cpu"))
    assert [batch["example_id"].tolist() for batch in data.batches("train")] == [
        [100, 101, 102, 103, 104],
        [105, 106, 107],
    ]
    assert [batch.size for batch in data.batches("dev", 2)] == [2, 1]
    with pytest.raises(UserError, match="no rows .test.; known: train, dev"):
        next(data.batches("test"))


# ------------------------------------------------------------------------------- logs and milestones
def read(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def test_log_lines(tmp_path: Path) -> None:
    class Logs(Fit):
        def train_step(self, batch: Batch, step: Step) -> None:
            step.log(visit_now=step.visit)
            step.log(visit_now=step.visit + 0.5)  # outside of a loss the last one stands
            super().train_step(batch, step)

    tracked: list[tuple[int, dict[str, float]]] = []
    done = trained(
        Logs(),
        folder=tmp_path,
        optimizer_steps=5,
        log_every=2,
        micro_batch=1,
        track=lambda line, step: tracked.append((step, line)),
    )
    found = read(tmp_path)
    assert [line["step"] for line in found] == [2, 4, 5]  # the last one always
    assert [step for step, _ in tracked] == [2, 4, 5]
    assert [line for _, line in tracked] == found
    assert found[0] == lines(done)[1]
    assert set(found[0]) == {"step", "lr", "visit_now", "student/loss", "student/error", "student/grad_norm"}
    assert [line["visit_now"] for line in found] == [1.5, 3.5, 4.5]
    for line in found:  # summed over four micro-batches
        assert line["student/error"] == pytest.approx(line["student/loss"], rel=1e-12)


def test_line_holds_the_last_values_of_every_group() -> None:
    class Thrice(Two):
        def train_step(self, batch: Batch, step: Step) -> None:
            step.update("scale", self.loss, batch)
            step.update("scale", self.loss, batch)
            step.update("student", self.loss, batch)

    gradients: list[float] = []
    keep = Recorder(
        gradient=lambda group, gradient: gradients.append(
            float(sum(g.square().sum() for g in gradient.values()))
        )
    )
    done = trained(Thrice(), recorder=keep, optimizer_steps=2)
    assert lines(done)[0]["scale/grad_norm"] == pytest.approx(math.sqrt(gradients[1]))
    assert lines(done)[1]["scale/grad_norm"] == pytest.approx(math.sqrt(gradients[4]))


def test_milestones_come_at_their_updates() -> None:
    method = Fit(Fit.Config(inner=3))
    seen: list[tuple[str, int, float]] = []

    def note(name: str) -> Callable[[int], None]:
        return lambda update: seen.append((name, update, float(method.student.bias.detach())))

    milestones = [Milestone(frozenset({1, 4, 5}), note("a")), Milestone(frozenset({4, 9}), note("b"))]
    trained(method, milestones=milestones, optimizer_steps=5)
    assert [(name, update) for name, update, _ in seen] == [("a", 1), ("a", 4), ("b", 4), ("a", 5)]
    assert len({bias for _, _, bias in seen}) == 3


def test_counters() -> None:
    class Samples(Distiller):
        def __init__(self) -> None:
            super().__init__(None, Line())

        def prepare(self, data: Any, step: Step) -> None:
            step.count("tokens_sampled", 100)

        def train_step(self, batch: Batch, step: Step) -> None:
            step.count("tokens_sampled", 7)
            step.count("calls", 1)
            step.update("student", self.loss, batch)

        def loss(self, batch: Batch, step: Step) -> Tensor:
            return token_mean(self.student(batch["x"]), batch)

    length = torch.tensor([4, 5, 6, 7, 8, 9, 10, 11])
    fields = {**dict(rows().batch(range(8))), "length": length, "prompt_length": length - 3}
    trainer = Trainer(Samples(), BatchSource(Batch(fields)), training(optimizer_steps=3), 1)
    trainer.prepare(None)
    assert trainer.counters["tokens_sampled"] == 100  # charged before the first visit
    trainer.fit()
    assert trainer.counters == {"prompts": 12, "tokens_seen": 36, "tokens_sampled": 121, "calls": 3}


# --------------------------------------------------------------------------------------- what is refused
def test_prepare_may_not_update_the_student_but_a_probe() -> None:
    class Prepares(Two):
        def prepare(self, data: Any, step: Step) -> None:
            step.update("scale", self.loss, rows().batch(range(8)))
            noise.append(float(torch.rand(())))

    noise: list[float] = []
    for _ in range(2):
        method = Prepares()
        trainer = Trainer(method, rows(), training(), 1)
        trainer.prepare(None)
        assert float(method.scale.detach()) != 1.0
        assert trainer.updates == 0
        assert method.student.weight.requires_grad
    assert noise[0] == noise[1]  # torch's own stream is fixed there too

    class Cheats(Fit):
        def prepare(self, data: Any, step: Step) -> None:
            step.update("student", self.loss, rows().batch(range(8)))

    with pytest.raises(ValueError, match="prepare may not update the group 'student'"):
        Trainer(Cheats(), rows(), training(), 1).prepare(None)


def test_unknown_group_is_named() -> None:
    class Typo(Two):
        def train_step(self, batch: Batch, step: Step) -> None:
            step.update("scales", self.loss, batch)

    with pytest.raises(ValueError, match="update: no group 'scales'. Known: student, scale"):
        trained(Typo())


def test_sum_over_processes_inside_a_loss_is_refused() -> None:
    class Sums(Fit):
        def loss(self, batch: Batch, step: Step) -> Tensor:
            step.all_sum(torch.ones(()))
            return super().loss(batch, step)

    with pytest.raises(
        ValueError, match="all_sum inside a loss would sum micro-batches; call it in train_step"
    ):
        trained(Sums())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda m: {"student": Group([("w", m.student.weight)])}, "in no group: scale, student.bias"),
        (
            lambda m: {"student": Group(m.named_parameters()), "b": Group([("s", m.scale)])},
            "s is in the groups student and b",
        ),
        (lambda m: {"all": Group(m.named_parameters())}, "no group 'student'"),
        (
            lambda m: {"student": Group([*m.named_parameters(), *freeze(Line()).named_parameters()])},
            "weight is in the group student, but it is frozen",
        ),
        (lambda m: {"a/b": Group(m.named_parameters())}, "'a/b' may hold no '/'"),
    ],
)
def test_wrong_groups_are_refused(groups: Callable[[Any], dict[str, Group]], message: str) -> None:
    class Wrong(Two):
        def groups(self) -> dict[str, Group]:
            return groups(self)

    with pytest.raises(ValueError, match=message):
        Trainer(Wrong(), rows(), training(), 1)


# ------------------------------------------------------------------------------------------- isolation
def test_only_the_group_is_trainable_while_it_is_updated() -> None:
    class Looks(Two):
        def loss(self, batch: Batch, step: Step) -> Tensor:
            flags.append((self.scale.requires_grad, self.student.weight.requires_grad))
            return super().loss(batch, step)

    flags: list[tuple[bool, bool]] = []
    method = Looks()
    trained(method, optimizer_steps=1)
    assert flags == [(True, False), (False, True)]
    assert method.scale.requires_grad  # and all of them afterwards
    assert all(param.grad is None for param in method.parameters())


def test_same_seed_same_losses_and_log(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        method = Fit()
        trained(method, seed=seed, folder=tmp_path / name)
        found.append(((tmp_path / name / "steps.jsonl").read_bytes(), method.student.weight.tolist()))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_seconds_are_charged_to_phases() -> None:
    done = trained(Fit(), optimizer_steps=2)
    assert {"data", "update"} <= set(done.clock.phases)
    with running(done.clock):
        assert all(entry.seconds > 0 for entry in done.clock.phases.values())
