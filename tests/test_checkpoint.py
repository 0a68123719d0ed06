"""Checkpoints are whole or refused, and a training that was killed anywhere ends as if it had not been."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdbench import checkpoint
from kdbench.checkpoint import Checkpoints
from kdbench.checks import ProcessFailed, in_processes
from kdbench.config import TrainingConfig
from kdbench.distiller import Batch, Distiller, Group, Step, Store, example_mean
from kdbench.errors import UserError
from kdbench.harness import BatchSource, Recorder, Trainer
from kdbench.processes import Processes


def alone(rank: int = 0, world: int = 1) -> Processes:
    processes = Processes(solo=True)
    processes.rank, processes.world = rank, world
    return processes


def tensors(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Shared tensors, own tensors and state that tell their step."""
    shared = {"param/student/w": torch.full((5, 3), step / 7), "buffer/seen": torch.tensor(step)}
    return shared, {"rollouts/0/length": torch.arange(step)}, {"updates": step, "best": {"score": 0.1 * step}}


def written(folder: Path, *steps: int, identity: str = "run-1", world: int = 1) -> Checkpoints:
    kept = Checkpoints(folder, identity, alone(world=world))
    for step in steps:
        kept.save(step, *tensors(step))
    return kept


def assert_step(kept: Checkpoints, step: int) -> None:
    found = kept.load()
    assert found is not None
    for mine, theirs in zip(found[:2], tensors(step)[:2], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert found[2] == tensors(step)[2]


# ------------------------------------------------------------------------------------- what is kept
def test_saved_is_loaded_with_every_type(tmp_path: Path) -> None:
    values = {
        "float64": torch.tensor([0.1, float("nan"), -0.0], dtype=torch.float64),
        "bfloat16": torch.tensor([1.5, 2.0], dtype=torch.bfloat16),
        "bool": torch.tensor([[True], [False]]),
        "int64": torch.tensor(2**62),
        "empty": torch.zeros(0, 4),
        "view": torch.arange(12.0).reshape(3, 4).T[1:],
    }
    values["alias"] = values["float64"]  # safetensors refuses tensors that share memory
    kept = Checkpoints(tmp_path, "x", alone())
    kept.save(1, values, {}, {"text": "ä\n", "numbers": [1, 2.5, None]})
    found = kept.load()
    assert found is not None
    for name, value in values.items():
        assert found[0][name].dtype == value.dtype
        assert torch.equal(found[0][name].nan_to_num(7), value.nan_to_num(7))
    assert found[1:] == ({}, {"text": "ä\n", "numbers": [1, 2.5, None]})


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    kept = written(tmp_path, 3, 20, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]
    assert_step(kept, 100)


def test_nothing_saved_is_nothing_loaded(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "no" / "folder", "x", alone()).load() is None
    assert Checkpoints(tmp_path, "x", alone()).load() is None


def test_same_step_may_be_written_again(tmp_path: Path) -> None:
    assert_step(written(tmp_path, 4, 4), 4)


def test_leftovers_of_a_write_are_ignored_and_swept(tmp_path: Path) -> None:
    kept = written(tmp_path, 5)
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "new-00000009")
    (tmp_path / "new-00000009" / "shared.safetensors").write_bytes(b"half")
    assert_step(kept, 5)
    kept.save(9, *tensors(9))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]
    assert_step(kept, 9)


# ------------------------------------------------------------------------------------- what is refused
def refused(kept: Checkpoints, *parts: str) -> None:
    with pytest.raises(UserError) as raised:
        kept.load()
    for part in ("checkpoint", "step-00000005", *parts):
        assert part in str(raised.value)


FILES = ["shared.safetensors", "own-0.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_noticed(name: str, tmp_path: Path) -> None:
    kept = written(tmp_path, 5)
    path = tmp_path / "step-00000005" / name
    whole = path.read_bytes()
    for place in sorted({*range(0, len(whole) - 1, 37), len(whole) - 2}):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(kept)
    path.write_bytes(whole)
    assert_step(kept, 5)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_torn_file_is_named(name: str, share: float, tmp_path: Path) -> None:
    kept = written(tmp_path, 5)
    path = tmp_path / "step-00000005" / name
    os.truncate(path, int(path.stat().st_size * share))
    refused(kept, "delete the folder", *([name] if name != "state.json" else []))


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(name: str, tmp_path: Path) -> None:
    kept = written(tmp_path, 5)
    (tmp_path / "step-00000005" / name).unlink()
    refused(kept, name)


def test_older_checkpoint_does_not_stand_in_for_a_torn_one(tmp_path: Path) -> None:
    written(tmp_path / "other", 3)
    kept = written(tmp_path / "this", 5)
    shutil.copytree(tmp_path / "other" / "step-00000003", tmp_path / "this" / "step-00000003")
    os.truncate(tmp_path / "this" / "step-00000005" / "shared.safetensors", 10)
    refused(kept, "shared.safetensors")


def test_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 5)
    refused(Checkpoints(tmp_path, "run-2", alone()), "another run (run-1)")


def test_exchanged_tensors_are_refused(tmp_path: Path) -> None:
    kept = written(tmp_path, 5)
    save_file(tensors(6)[0], tmp_path / "step-00000005" / "shared.safetensors")
    refused(kept, "shared.safetensors is torn or was changed")


def test_other_number_of_processes_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 5)
    refused(Checkpoints(tmp_path, "run-1", alone(world=2)), "by 1 processes, this run has 2")


# ------------------------------------------------------------------------------- killed while it writes
class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


def count_down(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Raise `Killed` before the given number of file operations has been made."""
    left = [calls]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return called

    for owner, name in (
        (checkpoint, "_sync"),
        (checkpoint, "save_file"),
        (checkpoint.shutil, "rmtree"),
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "write_text"),
    ):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))


def test_killed_write_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    finished, steps = False, set()
    for calls in range(40):
        folder = tmp_path / str(calls)
        kept = written(folder, 5)
        with pytest.MonkeyPatch.context() as patch:
            count_down(patch, calls)
            try:
                kept.save(7, *tensors(7))
                finished = True
            except Killed:
                pass
        found = kept.load()
        assert found is not None
        steps.add(found[2]["updates"])
        kept.save(9, *tensors(9))  # and the next one is written as usual
        assert_step(kept, 9)
        if finished:
            break
    assert finished
    assert steps == {5, 7}


# --------------------------------------------------------------------------- a training that is killed
class Keeper(Distiller):
    """Has all that must survive: two optimizers, a buffer, a store, state, dropout, terms of the log."""

    needs = ("example_id", "x")

    @dataclass
    class Config:
        kill_at: int = 0  # the call of a loss in which the process kills itself; 0: never

    def __init__(self, cfg: Config) -> None:
        torch.manual_seed(0)
        super().__init__(cfg, nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)))
        self.probe = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.kept = Store()
        self.state["best"] = [1.0, None]
        self.calls = 0

    def groups(self) -> dict[str, Group]:
        return {
            "student": Group(self.student.named_parameters(prefix="student")),
            "probe": Group(self.probe.named_parameters(prefix="probe")),
        }

    def train_step(self, batch: Batch, step: Step) -> None:
        self.seen += batch.size
        self.kept.add(batch.replace(odd=batch["row"] % 2 == 1, noise=torch.rand(batch.size)))
        step.update("probe", self.probe_loss, batch)
        step.log(rows=self.kept.size)
        step.count("tokens_sampled", batch.size)
        if self.kept.size >= 9:
            for part in self.kept.batches():
                step.update("student", self.loss, part)
            self.state["best"] = [float(self.seen), step.visit]
            self.kept.clear()

    def probe_loss(self, batch: Batch, step: Step) -> Tensor:
        with torch.no_grad():
            target = self.student(batch["x"])
        return example_mean((self.probe(batch["x"][:, :1]) - target).square()[:, 0], batch)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        self.calls += 1
        if self.calls == self.cfg.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        value = (self.student(batch["x"])[:, 0] - batch["noise"] - self.seen / 50).square()
        step.log(odd=example_mean(batch["odd"].float(), batch))
        return example_mean(value, batch)


def keeper(folder: Path | None, kill_at: int = 0, **changed: Any) -> Trainer:
    draw = torch.Generator().manual_seed(1)
    source = BatchSource(Batch({"example_id": torch.arange(17), "x": torch.randn(17, 3, generator=draw)}))
    told: dict[str, Any] = {"optimizer_steps": 13, "batch_size": 4, "lr": 0.05, "warmup_steps": 2}
    told |= {"checkpoint_every": 2, "micro_batch": 3, "student_dropout": True, **changed}
    method = Keeper(Keeper.Config(kill_at))
    return Trainer(
        method, source, TrainingConfig(**told), 5, folder=folder, identity="k", recorder=Recorder()
    )


def finished(trainer: Trainer) -> tuple[dict[str, list[Any]], bytes, dict[str, float], Any]:
    named = {**dict(trainer.distiller.named_parameters()), **dict(trainer.distiller.named_buffers())}
    weights = {name: value.detach().tolist() for name, value in named.items()}
    assert trainer.folder is not None
    log = (trainer.folder / "steps.jsonl").read_bytes()
    return weights, log, trainer.counters, trainer.distiller.state


def _train_and_die(folder: str, kill_at: int) -> None:
    keeper(Path(folder), kill_at).fit()


@pytest.mark.parametrize("kill_at", [1, 7, 12, 20])
def test_killed_training_goes_on_as_if_it_had_not_been(kill_at: int, tmp_path: Path) -> None:
    whole = keeper(tmp_path / "whole")
    whole.fit()
    with pytest.raises(ProcessFailed, match="process 0 of 1 died"):
        in_processes(1, _train_and_die, str(tmp_path / "killed"), kill_at)
    again = keeper(tmp_path / "killed")
    again.fit()
    assert finished(again) == finished(whole)
    assert whole.updates == 13


def test_killed_checkpoint_write_loses_no_more_than_its_interval(tmp_path: Path) -> None:
    whole = keeper(tmp_path / "whole")
    whole.fit()
    expected = finished(whole)
    completed = False
    for calls in range(0, 400, 7):
        folder = tmp_path / str(calls)
        with pytest.MonkeyPatch.context() as patch:
            count_down(patch, calls)
            try:
                keeper(folder).fit()
                completed = True
            except Killed:
                pass
        again = keeper(folder)
        again.fit()
        assert finished(again) == expected
        if completed:
            break
    assert completed
    assert calls > 28


def test_checkpoint_of_each_visit_resumes(tmp_path: Path) -> None:
    whole = keeper(tmp_path / "whole")
    whole.fit()
    for visits in range(1, 6):
        folder = tmp_path / str(visits)
        first = keeper(folder)
        first.resume()
        for _ in range(visits):
            first.one_visit()
        first.save()
        first.one_visit()  # is lost, with its lines of the log
        again = keeper(folder)
        again.fit()
        assert finished(again) == finished(whole)


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = keeper(tmp_path)
    first.fit()
    again = keeper(tmp_path)
    again.fit()
    assert again.recorder is not None
    assert again.recorder.losses == []
    assert finished(again) == finished(first)


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    keeper(tmp_path, optimizer_steps=2).fit()
    again = keeper(tmp_path)
    again.distiller.probe = nn.Linear(2, 1)
    again = Trainer(again.distiller, again.source, again.training, 5, folder=tmp_path, identity="k")
    with pytest.raises(
        UserError, match=r"step-00000002: it has no param/probe/probe.weight of shape \[1, 2\]"
    ):
        again.fit()


def test_log_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    keeper(tmp_path, optimizer_steps=4).fit()
    os.truncate(tmp_path / "steps.jsonl", 30)
    with pytest.raises(UserError, match="steps.jsonl: its end is lost; delete"):
        keeper(tmp_path).fit()


def test_no_checkpoint_without_an_interval(tmp_path: Path) -> None:
    keeper(tmp_path, checkpoint_every=0).fit()
    assert not (tmp_path / "checkpoint").exists()
