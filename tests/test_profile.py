"""Profiles: what is measured is what a step does, on random models and rows of a board's sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench import cli, flops, profile
from kdbench.commands import to_profile
from kdbench.config import Data, RunConfig, boards, load_board
from kdbench.errors import Diverged, OutOfMemory, UserError
from kdbench.profile import Fresh, Wanted, forecast, machine_of, measure
from kdbench.profile_report import Machine, Measured, as_json, published, render
from kdbench.stages import Places

MACHINE = Machine("cpu", 1, "highest", {"fp32": 1e11}, 1e10)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "runs", tmp_path / "cache")


def runs(board: str, size: str, *methods: str | Path, overrides: tuple[str, ...] = ()) -> list[RunConfig]:
    question = load_board(board)
    names = [str(one) for one in methods] or [row.name for row in question.rows if not row.reference]
    return to_profile(question, size, names, overrides, "cpu", {}, bool(methods))


def tiny(*methods: str | Path, overrides: tuple[str, ...] = ()) -> list[RunConfig]:
    return runs("tiny-instruct/v1", "debug", *methods, overrides=overrides)


def measured(
    places: Places, *methods: str | Path, overrides: tuple[str, ...] = (), **wanted: Any
) -> list[Measured]:
    told = Wanted(**{"steps": 2, "random": True, "prompt": 12, "response": 8, **wanted})
    return [measure(run, places, told, MACHINE) for run in tiny(*methods, overrides=overrides)]


# ---- what a step does
def test_phases_add_up_and_name_the_roles(places: Places) -> None:
    kd, gkd = measured(places, "kd", "gkd")
    assert list(kd.phases) == ["sample", "student", "teacher", "divergence", "backward", "optimizer", "other"]
    for one in (kd, gkd):
        assert sum(one.phases.values()) == pytest.approx(one.detailed_seconds)
        assert all(seconds > 0 for part, seconds in one.phases.items() if part != "sample")
        assert len(one.seconds) == 2
        assert one.updates_per_step == 1
        assert (one.batch, one.micro_batch, one.board_steps) == (4, 4, 4)
        assert (one.prompt_tokens, one.response_tokens, one.trained_tokens) == (12, 8, 4 * 8)
    assert (kd.phases["sample"], kd.sampled_tokens, kd.sampled_per_s) == (0, 0, None)
    assert gkd.phases["sample"] > 0
    assert gkd.sampled_tokens == 4 * 8  # no random response ends before its time
    assert gkd.hours == pytest.approx(gkd.median * 4 / 3600)


def test_operations_are_those_of_the_passes(places: Places) -> None:
    """KD reads teacher and student once. PromptKD reads the teacher three times, twice behind its prompt, and
    its backward pass goes through the teacher to the prompt. Less than a layer may be spared in each pass,
    where nobody reads it.
    """
    sft, kd, promptkd = measured(places, "sft", "kd", "promptkd")
    made = Fresh(tiny("kd")[0], places, Wanted(random=True, prompt=12, response=8))
    student, teacher = (flops.shape_of(made.model(role)) for role in ("student", "teacher"))

    def share(seen: float, whole: float) -> float:
        return seen / whole

    once, bare = flops.forward_flops(student, 4, 19, 0), flops.forward_flops(teacher, 4, 19, 0)
    assert sft.flops["student"] == kd.flops["student"]
    assert 1 - 1 / student.layers < share(kd.flops["student"], once) <= 1
    assert 1 - 1 / teacher.layers < share(kd.flops["teacher"], bare) <= 1
    prompted = flops.forward_flops(teacher, 4, 19 + 7, 0)
    assert 1 - 1 / teacher.layers < share(promptkd.flops["teacher"], 2 * prompted + bare) <= 1
    through = flops.backward_flops(teacher, 4, 19 + 7, 0, weights=False)
    assert promptkd.flops["backward"] - kd.flops["backward"] > (1 - 1 / teacher.layers) * through
    assert promptkd.flops["sample"] == pytest.approx(flops.decode_flops(student, 4, 12, 8), rel=0.3)


def test_the_limit_is_the_least_time_of_the_operations(places: Places) -> None:
    kd, gkd = measured(places, "kd", "gkd")
    assert kd.limit_seconds == pytest.approx(sum(kd.flops.values()) / 1e11)
    rest = sum(gkd.flops.values()) - gkd.flops["sample"]
    student = flops.shape_of(Fresh(tiny("gkd")[0], places, Wanted(random=True)).model("student"))
    assert gkd.decode_bytes == pytest.approx(flops.decode_bytes(student, 4, 12, 8, 4))
    decode = max(gkd.flops["sample"] / 1e11, gkd.decode_bytes / 1e10)
    assert gkd.limit_seconds == pytest.approx(rest / 1e11 + decode)
    assert gkd.share == pytest.approx(gkd.limit_seconds / gkd.median)


def test_a_teacher_of_another_precision_has_its_own_limit(places: Places) -> None:
    run = tiny("kd", overrides=("training.teacher_precision=bf16",))[0]
    machine = dataclasses.replace(MACHINE, flops_per_s={"fp32": 1e11, "bf16": 4e11})
    one = measure(run, places, Wanted(1, True, 12, 8), machine)
    shared = one.flops["divergence"] + one.flops["backward"]
    due = one.flops["student"] / 1e11 + (one.flops["teacher"] + shared) / 4e11
    assert one.limit_seconds == pytest.approx(due, rel=1e-3)
    assert set(machine_of(run).flops_per_s) == {"fp32", "bf16"}


def test_memory_grows_with_what_a_step_holds(places: Places) -> None:
    if not profile._resident_now():
        pytest.skip("the kernel does not tell the resident set")
    small, large = (measured(places, "sft", prompt=12, response=n, steps=1)[0] for n in (8, 160))
    assert small.peak_rss_growth_bytes is not None
    assert large.peak == large.peak_rss_growth_bytes > small.peak_rss_growth_bytes
    assert large.peak_allocated_bytes is None


VISITS = """
from kdbench.distiller import Distiller, token_mean
from kdbench.losses import cross_entropy
from kdbench.predict import predict

class Visits(Distiller):
    def __init__(self, cfg, student):
        super().__init__(cfg, student)

    def loss(self, batch, step):
        return token_mean(cross_entropy(predict(self.student, batch)), batch)

    def train_step(self, batch, step):
        for _ in range({updates} if step.visit % 2 else 0):
            step.update("student", self.loss, batch)
"""


def test_a_step_is_the_visits_up_to_an_update_and_is_shared_by_its_updates(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "visits.py"
    file.write_text(VISITS.format(updates=3))
    step = profile._step
    with monkeypatch.context() as patch:
        patch.setattr(profile, "_step", lambda *args: (6.0, step(*args)[1]))
        assert measured(places, file)[0].seconds == [2.0, 2.0]
    one = measured(places, file)[0]
    assert one.updates_per_step == 3
    assert one.trained_tokens == 4 * 8  # of an update
    sft = measured(places, "sft")[0]
    assert one.flops["student"] == pytest.approx(sft.flops["student"])  # as many for each update
    assert one.detailed_seconds == pytest.approx(sum(one.phases.values()))


def test_a_method_that_never_updates_is_refused(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "idle.py"
    file.write_text(VISITS.format(updates=0))
    monkeypatch.setattr(profile, "IDLE_VISITS", 5)
    with pytest.raises(UserError, match="no update of the student"):
        measured(places, file)


def test_what_comes_before_training_is_measured_apart(places: Places) -> None:
    seqkd, kd = measured(places, "seqkd", "kd")
    assert (seqkd.prepare_rows, kd.prepare_rows) == (16, 0)
    assert seqkd.prepare_seconds > 0
    assert seqkd.phases["sample"] == 0


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (Diverged("loss nan"), "diverged: loss nan"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (OutOfMemory("lower micro_batch"), "lower micro_batch"),
    ],
)
def test_what_a_method_runs_into_is_said(
    places: Places, monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
) -> None:
    def fails(*args: object) -> None:
        raise raised

    monkeypatch.setattr(profile, "_measure", fails)
    one = measured(places, "kd")[0]
    assert one.error == said
    assert (one.median, one.hours, one.share, one.trained_per_s) == (None, None, None, None)
    assert said in render("b/v1", "debug", MACHINE, [one], "table")


# ---- without data or weights
LINKED = [name for name in boards() if any(role.row for role in load_board(name).roles.values())]


@pytest.mark.parametrize("board", LINKED)
def test_prompts_of_encoders_are_not_made_up(board: str, places: Places) -> None:
    for size in load_board(board).sizes:
        with pytest.raises(UserError, match="encoder"):
            forecast(runs(board, size), places, Wanted(random=True))


@pytest.mark.parametrize("board", [name for name in boards() if name not in LINKED])
def test_every_row_of_every_board_can_be_made_up(
    board: str, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    question = load_board(board)
    for size in question.sizes:
        told = forecast(runs(board, size), places, Wanted(random=True))
        lines = told.splitlines()
        assert [line.split()[0] for line in lines[1:-2]] == [r.name for r in question.rows if not r.reference]


def test_a_model_that_cannot_be_fetched_is_said_with_the_way_out(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **named: object) -> None:
        raise OSError("no network.")

    monkeypatch.setattr("kdbench.models.AutoConfig.from_pretrained", refuse)
    with pytest.raises(UserError, match=r"gpt2.*no network; --random-weights measures without it$"):
        forecast(runs("dolly-gpt2/v1", "base", "kd"), places, Wanted())


def test_sizes_are_those_of_the_board(places: Places) -> None:
    promptkd = runs("dolly-gpt2/v1", "base", "promptkd")[0]
    made = Fresh(promptkd, places, Wanted(random=True))
    assert made.lengths == (256, 256)
    assert profile._parameters(made, "teacher", {}) == pytest.approx(1558e6, rel=0.001)
    assert profile._parameters(made, "student", {}) == 124_439_808
    told = forecast([promptkd], places, Wanted(random=True))
    assert "256 + 256 random tokens" in told
    assert "teacher 1,557.61 M" in told


def test_few_shot_methods_are_measured(places: Places) -> None:
    """Rows for every role, extra sets, and what is prepared from dev rows."""
    for run in runs("tiny-fewshot/v1", "debug", "prompt_distiller", "tinybert_ft", "student_pt"):
        one = measure(run, places, Wanted(1, random=True))
        assert one.error == ""
        assert one.phases["student"] > 0
        assert (one.prompt_tokens, one.response_tokens) == (64, 0)
        assert one.limit_seconds is None


def test_extra_sets_have_rows_of_their_task(places: Places) -> None:
    run = tiny("minillm")[0]
    lm = Data(task="text", task_settings={"max_length": 40})
    made = Fresh(dataclasses.replace(run, extra={"lm": lm}), places, Wanted(random=True))
    source = made.source("lm")
    assert source is not None
    batch = source.batch([0, 1])
    assert batch["prompt_length"].tolist() == [1, 1]
    assert batch["length"].tolist() == [40, 40]
    assert made.source("unlabeled") is None


def test_random_models_are_those_of_the_config(places: Places) -> None:
    made = Fresh(tiny("promptkd")[0], places, Wanted(random=True))
    model: Any = made.model("teacher")
    assert not model.training
    assert model.config.eos_token_id is None
    assert len(model.kdbench_encode("Suppose you are a student.")) == 5
    before = torch.random.get_rng_state()
    again: Any = made.model("teacher")
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert torch.equal(before, torch.random.get_rng_state())


# ---- the paper's table
def test_the_papers_ratios() -> None:
    paper = published(["kd", "gkd"])
    assert paper is not None
    assert "PromptKD" in paper.title
    assert paper.ratio("promptkd", "hours") == pytest.approx(9.78 / 0.85)
    assert paper.ratio("gkd", "hours") == pytest.approx(10, abs=0.1)
    assert paper.ratio("minillm", "allocated_gb") == pytest.approx(12.63 / 5.91)
    assert paper.ratio("nobody", "hours") is None
    assert published(["student_pt"]) is None


def found() -> list[Measured]:
    kd = Measured("kd", method="kd", seconds=[2.0, 1.0, 4.0], board_steps=3600, batch=8, micro_batch=4)
    kd.phases = {
        "sample": 0.0,
        "student": 1.0,
        "divergence": 0.25,
        "backward": 0.5,
        "optimizer": 0.1,
        "other": 0.4,
    }
    kd.peak_allocated_bytes, kd.peak_reserved_bytes, kd.trained_tokens = 5_000_000_000, 6_000_000_000, 100.0
    kd.detailed_seconds, kd.limit_seconds, kd.models = 2.25, 0.5, {"student": 1_000_000}
    own = dataclasses.replace(kd, row="promptkd[prompt_length=5]", method="promptkd", seconds=[8.0])
    own.peak_allocated_bytes, own.sampled_tokens = 10_000_000_000, 60.0
    own.phases = {**kd.phases, "sample": 3.0, "teacher": 3.0}
    return [kd, own]


def test_the_table_holds_ratios_beside_the_papers() -> None:
    text = render("dolly-gpt2/v1", "base", MACHINE, found(), "table")
    times, costs, notes = text.strip().split("\n\n")
    assert times.splitlines()[1].split() == (
        "median least most sample student teacher divergence backward optimizer other sum".split()
    )
    assert times.splitlines()[2].split() == "kd 2 1 4 – 1 – 0.25 0.5 0.1 0.4 2.25".split()
    head = costs.splitlines()[0]
    assert "hours / kd  paper  peak / kd  paper" in head
    kd, own = (line.split() for line in costs.splitlines()[1:])
    assert kd == "kd 50 – 25 % 5,000 6,000 2 1.0 1.0 1.0 1.0".split()
    assert own == "promptkd[prompt_length=5] 12 20 6 % 10,000 6,000 8 4.0 11.5 2.0 2.3".split()
    assert "8 x RTX 3090" in notes
    assert "100 GFLOP/s in fp32" in notes


def test_json_has_the_same_numbers() -> None:
    told = as_json("dolly-gpt2/v1", "base", MACHINE, found(), published(["kd"]))
    assert told == json.loads(json.dumps(told))
    own = told["methods"][1]
    assert (own["median_seconds"], own["hours"], own["hours_ratio"]) == (8.0, 8.0, 4.0)
    assert own["paper_hours_ratio"] == pytest.approx(11.5, abs=0.01)
    assert own["share_of_limit"] == 0.5 / 8
    without = as_json("dolly-gpt2/v1", "base", MACHINE, found()[1:], published(["promptkd"]))
    assert without["methods"][0]["hours_ratio"] is None


# ---- command line
def call(*args: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["profile", *(str(arg) for arg in args)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KDBENCH_DATA_ROOT", raising=False)
    return tmp_path


def test_the_command_measures_and_writes_nothing_else(here: Path) -> None:
    told = ("--size", "debug", "--method", "kd", "--method", "gkd", "--random-weights", "--steps", "1")
    lengths = ("--prompt-tokens", "12", "--response-tokens", "8", "--device", "cpu")
    code, out, err = call(*told, *lengths, "--format", "json", "--out", "found.json")
    assert code == 0, err
    assert out == ""
    assert "gkd (2 of 2): done in" in err
    found = json.loads((here / "found.json").read_text())
    assert [one["row"] for one in found["methods"]] == ["kd", "gkd"]
    assert all(one["seconds"] and one["peak_rss_growth_bytes"] is not None for one in found["methods"])
    assert found["machine"]["flops_per_s"]["fp32"] > 1e8
    assert sorted(path.name for path in here.iterdir()) == ["found.json"]


def test_the_command_takes_the_boards_own_rows_and_models(here: Path) -> None:
    code, out, err = call("--size", "debug", "--method", "kd", "--steps", "1", "--device", "cpu")
    assert code == 0, err
    assert "rows the board's" in out
    assert not (here / "runs").exists()
    code, out, _ = call("--size", "debug", "--method", "kd", "--dry-run", "--device", "cpu")
    assert code == 0
    assert out.splitlines()[1].split()[-1] == "–", "its stages are trained now"


def test_dry_run_says_what_would_be_measured(here: Path) -> None:
    code, out, _ = call("--board", "dolly-gpt2/v1", "--size", "base", "--random-weights", "--dry-run")
    assert code == 0
    assert "teacher 1,557.61 M, student 124.44 M" in out
    assert "1 step to warm up, 5 timed, 3 in detail, 1 counted" in out
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--method promtkd", "no method 'promtkd'. Did you mean 'promptkd'?"),
        ("--method teacher", "teacher: takes no step"),
        ("--size big", "no size 'big'"),
        ("--format csv", "no format 'csv'"),
        ("--steps 0", "--steps"),
        ("--prompt-tokens 5", "add --random-weights"),
        ("--vocabulary 500", "add --random-weights"),
        ("--set training.lrr=1", "no setting 'lrr'"),
        ("--out no/folder/file", "there is no folder"),
        ("--random-weights --method kd --prompt-tokens 400", "has 192 positions"),
        ("--axis dataset=sst2", "no axis 'dataset'"),
        ("--board dolly-scratch/v1 --method sft", "needs a data folder"),
        ("--data-root nowhere", "there is no such folder"),
    ],
)
def test_a_mistake_gets_one_line(here: Path, args: str, said: str) -> None:
    code, out, err = call(*args.split(), "--device", "cpu")
    assert code == 2, err
    assert out == ""
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_a_process_that_dies_or_raises_is_said(here: Path, places: Places) -> None:
    run = tiny("kd")[0]
    with pytest.raises(UserError, match="positions"):
        profile._apart(measure, run, places, Wanted(1, True, 400, 8))
    assert "exit code" in profile._apart(_dies)
    assert profile._apart(_raises).startswith("ValueError: no (test_profile.py:")


def _dies() -> None:
    import os

    os._exit(3)


def _raises() -> None:
    raise ValueError("no")
