"""Sizes that fit: where memory ran out, an update or a visit begins again, with half the size."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_harness import Fit, Two, lines, rows, trained, training
from torch import Tensor

from kdbench import board as boards
from kdbench import commands, registry
from kdbench.checks import Case, Probe
from kdbench.config import TrainingConfig, load_board
from kdbench.distiller import Batch, Distiller, Step, Store, example_mean
from kdbench.distillers.gkd import GKD
from kdbench.errors import OutOfMemory, UserError
from kdbench.harness import Milestone, SourceData, Trainer
from kdbench.memory import out_of_memory
from kdbench.processes import Processes
from kdbench.record import RunFolder, RunRecord
from kdbench.stages import Places

ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError,
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"),
}


def no_memory() -> BaseException:
    return ERRORS["cuda"]()


def weights(distiller: Distiller) -> list[list[float]]:
    return [value.flatten().tolist() for value in distiller.state_dict().values()]


# ---------------------------------------------------------------------------------------------- errors
def test_errors_that_say_that_memory_ran_out() -> None:
    assert all(out_of_memory(error()) for error in ERRORS.values())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("not enough memory")):
        assert not out_of_memory(other)


# --------------------------------------------------------------------------------------------- an update
class Small(Fit):
    """Its loss holds no more than `room` rows; it draws from torch's stream, counts, and logs."""

    error = "cuda"

    def __init__(self, room: int = 99, at: int = 1) -> None:
        super().__init__(self.Config(inner=2))
        self.room, self.at, self.sizes = room, at, list[int]()

    def loss(self, batch: Batch, step: Step) -> Tensor:
        self.sizes.append(batch.size)
        step.count("calls_by_row", batch.size)
        noise = torch.rand(())  # that of the micro-batch's number in its update
        error = (self.student(batch["x"]) + noise - batch["y"]).square()
        step.log(error=example_mean(error, batch), rows=batch.size)
        if batch.size > self.room and step.index >= self.at:
            raise ERRORS[self.error]()
        return example_mean(error, batch)


@pytest.mark.parametrize("error", list(ERRORS))
@pytest.mark.parametrize("at", [1, 4])
def test_an_update_begins_again_as_with_the_smaller_size(
    error: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Small, "error", error)
    method = Small(room=2, at=at)
    found = trained(method, optimizer_steps=5, batch_size=8, fit=True)
    sizes = [8] * (at - 1) + [8, 4, *([2] * 4 * (6 - at))]
    assert method.sizes == sizes
    whole, small = Small(), Small()
    before = trained(whole, optimizer_steps=at - 1, batch_size=8) if at > 1 else None
    told = trained(small, optimizer_steps=5, batch_size=8, micro_batch=2)
    if at == 1:
        assert lines(found) == lines(told)
        assert weights(method) == weights(small)
        assert found.counters == told.counters
    elif before is not None:
        assert lines(found)[: at - 1] == lines(before)
    assert found.counters["calls_by_row"] == 40  # the tries that failed are not counted
    assert found.fitted is not None
    assert (found.micro_batch, found.rollout_batch) == (2, 8)
    where, visit = "in an update of 'student'", (at + 1) // 2
    assert found.fitted.halved == [
        {"size": "micro_batch", "was": was, "where": where, "visit": visit} for was in (8, 4)
    ]


def test_a_later_micro_batch_runs_out() -> None:
    """What the earlier ones gave (gradients, terms, counts) is undone."""

    class Late(Small):
        def loss(self, batch: Batch, step: Step) -> Tensor:
            value = super().loss(batch, step)
            if batch.size > 1 and len(self.sizes) == 3:
                raise no_memory()
            return value

    late, small = Late(), Small()
    found = trained(late, optimizer_steps=3, batch_size=8, micro_batch=2, fit=True)
    told = trained(small, optimizer_steps=3, batch_size=8, micro_batch=1)
    assert late.sizes[:5] == [2, 2, 2, 1, 1]
    assert lines(found) == lines(told)
    assert weights(late) == weights(small)
    assert found.counters == told.counters


def test_memory_of_the_failed_try_is_free_before_the_next() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Heavy(Fit):
        def loss(self, batch: Batch, step: Step) -> Tensor:
            assert all(one() is None for one in kept)
            held = self.student(batch["x"]) * 2
            kept.append(weakref.ref(held))
            if batch.size > 1:
                raise no_memory()
            return super().loss(batch, step) + 0 * held.sum()

    trained(Heavy(), optimizer_steps=1, batch_size=4, fit=True)
    assert len(kept) == 6


def test_half_of_the_rows_that_there_are() -> None:
    method = Small(room=2)
    trained(method, optimizer_steps=1, batch_size=8, micro_batch=100, fit=True)
    assert method.sizes == [8, 4, 2, 2, 2, 2]


# ---------------------------------------------------------------------------------- visits, two optimizers
def test_second_optimizer_runs_out_after_the_first_has_moved() -> None:
    """The first group's update is not made again: the second sees its new weights once."""

    class Both(Two):
        room = 99

        def train_step(self, batch: Batch, step: Step) -> None:
            step.update("scale", super().loss, batch)
            step.update("student", self.student_loss, batch)

        def student_loss(self, batch: Batch, step: Step) -> Tensor:
            if batch.size > self.room:
                raise no_memory()
            return super().loss(batch, step)

    first, second = Both(), Both()
    first.room = 2
    found = trained(first, optimizer_steps=4, batch_size=8, fit=True)
    told = trained(second, optimizer_steps=4, batch_size=8, micro_batch=2)
    assert [{**a, **b} for a, b in zip(lines(found), lines(told), strict=True)] == [
        pytest.approx(line, rel=1e-12) for line in lines(found)
    ]
    assert first.scale.tolist() == pytest.approx(second.scale.tolist(), rel=1e-12)
    assert first.student.weight.tolist() == pytest.approx(second.student.weight.tolist(), rel=1e-12)
    assert found.optimizers["scale"].updates == 4


class Samples(Fit):
    """Fills a store, a state and a buffer, draws extra rows, and samples before its update."""

    def __init__(self, room: int = 99, order: str = "sample first") -> None:
        super().__init__()
        self.room, self.order, self.tries = room, order, list[int]()
        self.kept = Store()
        self.state["seen"] = [0]
        self.register_buffer("level", torch.zeros(1))

    def train_step(self, batch: Batch, step: Step) -> None:
        if self.order == "update first":
            step.update("student", self.loss, batch)
        extra = step.extra("lm")
        assert extra is not None
        self.kept.add(extra)
        self.state["seen"][0] += extra.size
        self.level += 1
        step.log(noise=torch.rand(()), first=extra["example_id"][0])
        step.count("tokens_sampled", batch.size)
        self.tries.append(step.rollout_batch)
        if step.rollout_batch > self.room and step.visit >= 1:
            raise no_memory()
        if self.kept.size >= 12:
            for part in self.kept.batches():
                step.update("student", self.loss, part)
            self.kept.clear()


def sampled(method: Samples, **options: Any) -> Trainer:
    return trained(method, optimizer_steps=6, extras={"lm": rows(5)}, rollout_batch=8, **options)


def test_a_visit_begins_again_where_responses_are_sampled() -> None:
    method, plain = Samples(room=2), Samples()
    found, told = sampled(method, fit=True), sampled(plain)
    assert method.tries == [8, 8, 4, *([2] * (found.visit - 1))]
    assert lines(found) == lines(told)
    assert weights(method) == weights(plain)
    assert method.state == plain.state
    assert found.state()["drawn"] == told.state()["drawn"]
    assert found.counters == told.counters
    assert (found.visit, found.micro_batch, found.rollout_batch) == (told.visit, 4, 2)
    assert found.fitted is not None
    where = "outside of updates, where responses are sampled"
    assert found.fitted.note == (
        f"fit: micro_batch 4 (set: 4), rollout_batch 2 (set: 8); out of memory with rollout_batch 8 {where}, "
        f"visit 2; out of memory with rollout_batch 4 {where}, visit 2"
    )


def test_sampling_after_an_update_of_the_visit_ends_the_run_and_the_next_start_goes_on(
    tmp_path: Path,
) -> None:
    """Weights have moved and nobody kept the old ones; a checkpoint has."""
    made = []
    for start in range(3):
        method = Samples(room=2, order="update first")
        options = {"folder": tmp_path, "fit": True, "checkpoint_every": 1}
        if start < 2:
            message = (
                f"are sampled with training.rollout_batch = {8 >> start}; start the run again, "
                f"it goes on with training.rollout_batch = {4 >> start}"
            )
            with pytest.raises(OutOfMemory, match=re.escape(message)):
                sampled(method, **options)
        else:
            made.append(sampled(method, **options))
    plain = Samples(order="update first")
    told = sampled(plain)
    assert weights(method) == weights(plain)
    assert made[0].counters == told.counters
    log = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert log == lines(told)


def test_prepare_begins_again() -> None:
    class Prepares(Two):
        tries: list[int]

        def prepare(self, data: Any, step: Step) -> Mapping[str, Batch]:
            self.tries.append(step.rollout_batch)
            step.count("tokens_sampled", 5)
            noise = torch.rand((), dtype=torch.float64)
            if step.rollout_batch > 2:
                raise no_memory()
            return {"train": rows().batch(range(8)).replace(x=rows().batch(range(8))["x"] + noise)}

    made = []
    for size, fit in ((8, True), (2, False)):
        method = Prepares()
        method.tries = []
        trainer = Trainer(method, rows(), training(rollout_batch=size, fit=fit), 1)
        found = trainer.prepare(SourceData({"train": trainer.source}, 4, torch.device("cpu")))
        assert found is not None
        made.append((found["train"]["x"].tolist(), trainer.counters, trainer.rollout_batch, method.tries))
    assert made[0][:3] == made[1][:3]
    assert made[0][3] == [8, 4, 2]


# --------------------------------------------------------------------------------------- real methods
class Tight(Probe):
    """A run whose losses hold no more than `ROOM` rows, and whose rollouts hold no more either."""

    ROOM = 2

    def update(self, group: str, loss: Any, batch: Any) -> None:
        def tight(batch: Any, step: Any) -> Tensor:
            value: Tensor = loss(batch, step)
            parts = [batch] if isinstance(batch, Batch) else batch.values()
            if max(part.size for part in parts) > self.ROOM:
                raise no_memory()
            return value

        super().update(group, tight, batch)

    def count(self, name: str, amount: float) -> None:
        super().count(name, amount)
        if name == "tokens_sampled" and self.rollout_batch > self.ROOM:
            raise no_memory()


def _probe(cls: type[Probe], case: Case, **changed: Any) -> Probe:
    sets = case.sets()
    probe = cls(
        case.distiller(),
        sets.pop("train"),
        case.budget(**changed),
        case.seed,
        dev=sets.pop("dev"),
        extras=sets,
    )
    return probe.go()


def _cut() -> list[str]:
    names = registry.names("distillers")
    return [name for name in names if not registry.load_distiller(name).couples_examples]


@pytest.mark.parametrize("name", _cut())
def test_every_method_gives_what_it_gives_with_the_smaller_sizes(name: str) -> None:
    case = Case(name, {}, {})
    found = _probe(Tight, case, fit=True)
    told = _probe(Probe, case, micro_batch=found.micro_batch, rollout_batch=found.rollout_batch)
    assert found.micro_batch <= Tight.ROOM
    assert found.fitted is not None
    assert {one["size"] for one in found.fitted.halved} >= {"micro_batch"}
    if found.counters["tokens_sampled"]:
        assert found.rollout_batch <= Tight.ROOM
    assert found.lines == told.lines
    assert found.counters == told.counters
    mine, theirs = found.weights(), told.weights()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


# ------------------------------------------------------------------------------------- a kill and the file
def test_sizes_are_written_beside_the_run_and_read_on_resume(tmp_path: Path) -> None:
    class Stops(Small):
        def loss(self, batch: Batch, step: Step) -> Tensor:
            if step.index == 4:
                raise KeyboardInterrupt
            return super().loss(batch, step)

    options = {"optimizer_steps": 6, "batch_size": 8, "checkpoint_every": 2, "fit": True}
    with pytest.raises(KeyboardInterrupt):
        trained(Stops(room=2), folder=tmp_path / "killed", **options)
    told = json.loads((tmp_path / "killed" / "fit.json").read_text())
    assert (told["micro_batch"], told["rollout_batch"], told["device"]) == (2, 8, "cpu")
    assert told["memory_bytes"] > 1e8
    assert told["set"] == {"micro_batch": 8, "rollout_batch": 8}
    assert [one["was"] for one in told["halved"]] == [8, 4]
    again, whole = Small(room=2), Small(room=2)
    trained(again, folder=tmp_path / "killed", **options)
    trained(whole, folder=tmp_path / "whole", **options)
    assert again.sizes == [2] * 16  # updates 3 to 6, none of them tried with more rows
    assert weights(again) == weights(whole)
    for name in ("steps.jsonl", "fit.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sizes_that_fit_at_once_are_written_too(tmp_path: Path) -> None:
    done = trained(Small(), folder=tmp_path, fit=True)
    told = json.loads((tmp_path / "fit.json").read_text())
    assert (told["micro_batch"], told["halved"]) == (4, [])
    assert done.fitted is not None
    assert done.fitted.note == "fit: micro_batch 4 (set: 4), rollout_batch 4 (set: 4); these fit"
    trained(Small(), folder=tmp_path / "without")
    assert not (tmp_path / "without" / "fit.json").exists()


@pytest.mark.parametrize("key", ["device", "memory_bytes", "set"])
def test_sizes_of_another_device_are_found_anew(tmp_path: Path, key: str) -> None:
    trained(Small(room=1), folder=tmp_path, fit=True)
    path = tmp_path / "fit.json"
    told = json.loads(path.read_text())
    assert told["micro_batch"] == 1
    other = {"device": "NVIDIA H200", "memory_bytes": 1, "set": {"micro_batch": 64, "rollout_batch": 4}}
    path.write_text(json.dumps({**told, key: other[key]}))
    assert Trainer(Small(), rows(), training(fit=True), 3, folder=tmp_path).micro_batch == 4


@pytest.mark.parametrize("text", ["{", "[]", '{"micro_batch": 2}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "fit.json").write_text(text)
    with pytest.raises(UserError, match=r"fit\.json"):
        Trainer(Small(), rows(), training(fit=True), 3, folder=tmp_path)
    trained(Small(room=1), folder=tmp_path / "zero", fit=True)
    path = tmp_path / "zero" / "fit.json"
    path.write_text(path.read_text().replace('"micro_batch": 1', '"micro_batch": 0', 1))
    with pytest.raises(UserError, match="micro_batch 0 and rollout_batch 4 must be at least 1"):
        Trainer(Small(), rows(), training(fit=True), 3, folder=tmp_path / "zero")


# -------------------------------------------------------------------------------------------- what ends it
def test_without_fit_one_line_says_what_to_lower() -> None:
    told = "out of memory in an update of 'student' with training.micro_batch = 8: lower training.micro_batch"
    with pytest.raises(OutOfMemory, match=re.escape(told + " or set training.fit=true")):
        trained(Small(room=2), batch_size=8)
    told = "where responses are sampled with training.rollout_batch = 8: lower training.rollout_batch"
    with pytest.raises(OutOfMemory, match=re.escape(told + " or set training.fit=true")):
        sampled(Samples(room=2))


def test_what_no_smaller_size_can_mend() -> None:
    with pytest.raises(OutOfMemory, match=r"in an update of 'student' with training.micro_batch = 1$"):
        trained(Small(room=0), fit=True)
    with pytest.raises(OutOfMemory, match=r"are sampled with training.rollout_batch = 1$"):
        sampled(Samples(room=0), fit=True)

    class Coupled(Small):
        couples_examples = True

    for fit in (True, False):
        with pytest.raises(OutOfMemory, match="are coupled, thus not cut; lower training.batch_size"):
            trained(Coupled(room=2), fit=fit)

    def measure(step: int) -> None:
        raise no_memory()

    with pytest.raises(OutOfMemory, match="lower evaluation.batch_size or evidence.batch_size"):
        trained(Small(), fit=True, milestones=[Milestone(frozenset({2}), measure)])

    method = Small()
    trainer = Trainer(method, rows(), training(fit=True), 3)
    monkey = trainer.optimizers["student"].adam

    def step() -> None:
        raise no_memory()

    monkey.step = step  # type: ignore[method-assign,assignment]
    with pytest.raises(OutOfMemory, match="out of memory in an optimizer step"):
        trainer.fit()
    assert trainer.micro_batch == 4


def test_other_errors_are_left_alone() -> None:
    class Wrong(Fit):
        def loss(self, batch: Batch, step: Step) -> Tensor:
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="^shapes cannot be multiplied$"):
        trained(Wrong(), fit=True)


# ------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"student_dropout": True}, "student_dropout = true"),
        ({"mean": "micro_batch"}, "mean = 'micro_batch'"),
    ],
)
def test_settings_whose_results_follow_the_cut(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"fit = true may cut batches anew, and with {why} results depend"):
        TrainingConfig(optimizer_steps=1, batch_size=1, lr=1.0, fit=True, **options)


def test_method_whose_results_follow_the_cut() -> None:
    class Follows(Fit):
        def breaks(self) -> Mapping[str, str]:
            return {"micro_batch": "it whitens over each"}

    told = "training.fit: may cut batches anew, and results depend on the cut: it whitens over each"
    with pytest.raises(UserError, match=told):
        Trainer(Follows(), rows(), training(fit=True), 1)


def test_several_processes_are_refused() -> None:
    together = Processes(solo=True)
    together.world = 2
    with pytest.raises(UserError, match="training.fit: sizes are found by one process, there are 2"):
        Trainer(Fit(), rows(), training(fit=True), 1, processes=together)


# ---------------------------------------------------------------------------------------------- a whole run
def test_a_run_tells_in_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`failed` with one line without fit; with it, done, with note and numbers, and not for publication."""
    loss, board = GKD.loss, load_board("tiny-instruct/v1")

    def tight(self: GKD, batch: Batch, step: Step) -> Tensor:
        value = loss(self, batch, step)
        if batch.size > 2:
            raise no_memory()
        return value

    def run(*overrides: str) -> tuple[RunRecord, Path]:
        places = Places(tmp_path / "runs", tmp_path / "cache")
        plan = commands.plans(board, "debug", ["gkd"], [1], list(overrides), "cpu", places)[0]
        return plan.execute(), plan.folder

    monkeypatch.setattr(GKD, "loss", tight)
    record, _ = run()
    assert record.status == "failed"
    told = r"out of memory in an update of 'student' with training.micro_batch = \d+: "
    assert re.fullmatch(told + "lower training.micro_batch or set training.fit=true", record.reason)
    assert "micro_batch" not in record.budget
    record, folder = run("training.fit=true")
    assert record.status == "done", record.reason
    assert (record.row, record.budget["micro_batch"]) == ("gkd[training.fit=true]", 2)
    told = (
        r"fit: micro_batch 2 \(set: \d+\), rollout_batch \d+ \(set: \d+\); out of memory with micro_batch 4 "
    )
    assert any(re.match(told + "in an update of 'student', visit 1", note) for note in record.notes)
    assert json.loads((folder / "fit.json").read_text())["micro_batch"] == 2
    assert record.config["training"]["fit"] is True
    monkeypatch.setattr(boards, "published_size", lambda board: "debug")
    with pytest.raises(UserError, match=r"no row 'gkd\[training.fit=true\]'"):
        boards._check_publishable(folder, board)
    monkeypatch.setattr(GKD, "loss", loss)
    small, other = run("training.micro_batch=2")
    assert (folder / "steps.jsonl").read_bytes() == (other / "steps.jsonl").read_bytes()
    assert RunFolder(folder).record.scores.keys() == small.scores.keys()
    for name, score in small.scores.items():
        if not name.startswith("memory_time/"):
            assert record.scores[name] == score, name
