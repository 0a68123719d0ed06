"""Several processes train as one: sums, shares, logs, checkpoints, and what happens when one fails."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdbench.checks import Broken, ProcessFailed, in_processes
from kdbench.config import TrainingConfig
from kdbench.distiller import Batch, Distiller, Group, Step, Store, example_mean
from kdbench.errors import UserError
from kdbench.harness import BatchSource, Recorder, SourceData, Trainer
from kdbench.processes import Processes


# ------------------------------------------------------------------------------- running processes
def _fails(kind: str) -> int:
    together = Processes()
    if together.rank == 1:
        if kind == "broken":
            raise Broken("law 7")
        if kind == "raises":
            raise KeyError("label")
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "waits":
            time.sleep(60)
    together.all_sum(torch.ones(1))  # which waits for the other
    return together.rank


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("broken", Broken, "law 7"),
        ("raises", ProcessFailed, r"in process 1 of 2: KeyError: 'label' \(test_processes.py:\d+\)"),
        ("dies", ProcessFailed, "process 1 of 2 died"),
        ("waits", Broken, "after 2 s, process 0 and 1 of 2 has not ended"),
    ],
)
def test_failure_of_one_ends_all(kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        in_processes(2, _fails, kind, timeout_s=2.0 if kind == "waits" else 60.0)


# ------------------------------------------------------------------------------------------- sums
def _told() -> dict[str, Any]:
    together = Processes()
    rank = together.rank
    ragged = torch.ones(2, dtype=torch.float32 if rank else torch.float64) * (rank + 1)
    kept = torch.tensor([rank + 1.0], requires_grad=True)
    sums = {
        "float32": together.all_sum(torch.tensor([0.1, rank], dtype=torch.float32)),
        "int64": together.all_sum(torch.tensor(2**40 + rank)),
        "other types": together.all_sum(ragged),
        "gradient": together.all_sum(kept),
    }
    told = {name: (value.tolist(), str(value.dtype), value.requires_grad) for name, value in sums.items()}
    alone = Processes(solo=True)
    one = alone.all_sum(kept)
    return {
        **told,
        "rank": (rank, together.world, together.is_main, str(together.device.type)),
        "alone": (alone.rank, alone.world, alone.is_main, one.tolist(), one.requires_grad),
        "kept": kept.tolist(),
    }


def test_sums_over_processes() -> None:
    first, second = in_processes(2, _told)
    assert first["rank"] == (0, 2, True, "cpu")
    assert second["rank"] == (1, 2, False, "cpu")
    assert first["float32"] == (pytest.approx([0.2, 1.0]), "torch.float32", False)
    assert first["int64"] == (2**41 + 1, "torch.int64", False)
    assert first["other types"] == ([3.0, 3.0], "torch.float64", False)
    assert second["other types"] == ([3.0, 3.0], "torch.float32", False)
    assert first["gradient"] == second["gradient"] == ([3.0], "torch.float32", False)
    assert second["alone"] == (0, 1, True, [2.0], False)
    assert (first["kept"], second["kept"]) == ([1.0], [2.0])  # what was summed is as it was


# ------------------------------------------------------------------------------------- one training
class Keeper(Distiller):
    """Two optimizers, a store of rows that differ between processes, an extra set, parts of other sizes."""

    needs = ("example_id", "x")

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(None, nn.Linear(3, 1).double())
        self.probe = nn.Linear(3, 1).double()
        self.kept = Store()
        self.state["rows"] = 0.0

    def groups(self) -> dict[str, Group]:
        return {
            "student": Group(self.student.named_parameters(prefix="student")),
            "probe": Group(self.probe.named_parameters(prefix="probe")),
        }

    def prepare(self, data: Any, step: Step) -> Mapping[str, Batch]:
        rows = Batch.cat(list(data.batches("train")))
        step.update("probe", self.probe_loss, rows)
        step.count("tokens_sampled", 3)
        return {"train": rows.replace(x=rows["x"] + step.all_sum(torch.ones((), dtype=torch.float64)))}

    def train_step(self, batch: Batch, step: Step) -> None:
        self.kept.add(batch)
        self.state["rows"] += float(step.all_sum(torch.tensor(float(batch.size))))
        step.count("tokens_sampled", batch.size)
        step.update("probe", self.probe_loss, batch)
        if step.visit % 2:
            text = step.extra("lm")
            assert text is not None
            for part in self.kept.batches():
                step.update("student", self.loss, {"rows": part, "text": text})
            self.kept.clear()

    def probe_loss(self, batch: Batch, step: Step) -> Tensor:
        return example_mean((self.probe(batch["x"]) - 1).square()[:, 0], batch)

    def loss(self, parts: Mapping[str, Batch], step: Step) -> Tensor:
        values = [
            example_mean((self.student(part["x"]) - self.probe(part["x"]).detach()).square()[:, 0], part)
            for part in parts.values()
        ]
        step.log(text=values[1])
        return values[0] + values[1]


def source(count: int, seed: int) -> BatchSource:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=draw, dtype=torch.float64)
    return BatchSource(Batch({"example_id": torch.arange(count), "x": x}))


def keeper(folder: Path, batch_size: int, processes: Processes | None, **changed: Any) -> Trainer:
    told: dict[str, Any] = {"optimizer_steps": 5, "batch_size": batch_size, "lr": 0.05, "micro_batch": 2}
    trainer = Trainer(
        Keeper(),
        source(11, 1),
        TrainingConfig(**{**told, "checkpoint_every": 2, **changed}),
        7,
        processes=processes,
        extras={"lm": source(4, 2)},
        folder=folder,
        identity="k",
        recorder=Recorder(),
    )
    made = trainer.prepare(SourceData({"train": trainer.source}, 4, trainer.processes.device))
    assert made is not None
    trainer.source = BatchSource(made["train"])
    return trainer


def outcome(trainer: Trainer) -> dict[str, Any]:
    assert trainer.recorder is not None
    return {
        "weights": {name: value.tolist() for name, value in trainer.distiller.state_dict().items()},
        "lines": trainer.recorder.losses,
        "counters": trainer.counters,
        "state": trainer.distiller.state,
    }


def _trains(folder: str, batch_size: int, updates: int) -> dict[str, Any]:
    """Train on two processes; with fewer `updates` than the budget, stop, lose a visit and resume."""
    together = Processes()
    trainer = keeper(Path(folder), batch_size, together)
    if updates:
        trainer.resume()
        while trainer.updates < updates:
            trainer.one_visit()
        trainer.save()
        trainer.one_visit()
        trainer = keeper(Path(folder), batch_size, together)
    trainer.fit()
    return outcome(trainer)


@pytest.mark.parametrize("batch_size", [5, 1])
def test_two_processes_train_as_one(batch_size: int, tmp_path: Path) -> None:
    alone = keeper(tmp_path / "alone", batch_size, None)
    alone.fit()
    expected = outcome(alone)
    found = in_processes(2, _trains, str(tmp_path / "two"), batch_size, 0)
    for name in ("weights", "lines", "counters", "state"):
        assert found[0][name] == found[1][name]
    for name, value in expected["weights"].items():
        torch.testing.assert_close(
            torch.tensor(found[0]["weights"][name]), torch.tensor(value), rtol=1e-6, atol=0
        )
    for mine, theirs in zip(found[0]["lines"], expected["lines"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert found[0]["counters"] == expected["counters"]
    assert found[0]["state"] == expected["state"]
    # only the main process writes the log, and the same as one process
    log = [json.loads(line) for line in (tmp_path / "two" / "steps.jsonl").read_text().splitlines()]
    assert log == found[0]["lines"]


def test_two_processes_resume_with_their_own_rows(tmp_path: Path) -> None:
    whole = in_processes(2, _trains, str(tmp_path / "whole"), 5, 0)
    again = in_processes(2, _trains, str(tmp_path / "again"), 5, 2)
    for mine, theirs in zip(again, whole, strict=True):
        assert mine["lines"] == theirs["lines"][2:]
        assert {**mine, "lines": None} == {**theirs, "lines": None}
    logs = [(tmp_path / name / "steps.jsonl").read_bytes() for name in ("whole", "again")]
    assert logs[0] == logs[1]


def test_one_process_does_not_go_on_for_two(tmp_path: Path) -> None:
    in_processes(2, _trains, str(tmp_path), 3, 0)
    with pytest.raises(UserError, match="written by 2 processes, this run has 1"):
        keeper(tmp_path, 3, None).fit()
