"""Roles that other rows' runs fill: which runs are planned, their names and ids, what is refused, and what
becomes of a run when one that it needs ends badly.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdbench import commands, record
from kdbench.commands import chosen_axes, find_each, label_of, pairs, runs_of, to_profile, trials, with_needs
from kdbench.config import Board, load_board
from kdbench.distillers.mlm_pooler import MLMPooler
from kdbench.distillers.pt import PT
from kdbench.errors import Missing, UserError
from kdbench.jobs import Job, Outcome, Workers, _make, jobs_of, make
from kdbench.runner import Plan
from kdbench.stages import Places
from kdbench.tasks.tiny_transfer import TinyTransfer

BOARD = """
name = "linked"
version = "v1"
question = "Does a prompt of another task help?"
task = "tiny_transfer"
seeds = [1, 2]
analyses = ["transfer"]
average = ["source"]
task_settings = { dataset = "{target}", dev = 8, test = 8 }

[axes]
source = ["mood_few", "agree"]
target = ["food", "agree"]

[tuning]
seed = 9
factors = [1.0, 2.0]
score = "score"
size = "debug"
axes = { source = ["mood_few"] }

[roles.student]
seed = 0
tokenizer = "task:bert"
stages = []

[roles.student.architecture]
model_type = "bert"

[roles.student.architecture.config]
num_hidden_layers = 1
hidden_size = 16
num_attention_heads = 2
intermediate_size = 16
max_position_embeddings = 64
hidden_dropout_prob = 0.0
attention_probs_dropout_prob = 0.0

[roles.source]
row = "pt"
at = { target = "{source}" }

[roles.target]
row = "pt"

[roles.teacher]
row = "pot"

[roles.sources]
row = "pt"
each = "source"
at = { target = "{source}" }
without = "{target}"

[roles.early]
row = "fused"

[sizes.debug]
training = { optimizer_steps = 2, batch_size = 4, lr = 1e-2, checkpoint_every = 0 }

[[rows]]
name = "pt"
method = "pt"
settings = { prompt_length = 2, texts = 4 }
axes = { target = ["target", "source"] }

[[rows]]
name = "pot"
method = "pot"
settings = { prompt_length = 2, texts = 4 }

[[rows]]
name = "panda"
method = "panda"
settings = { prompt_length = 2, texts = 4 }

[[rows]]
name = "fused"
method = "pot_early"
settings = { prompt_length = 2, texts = 4 }
axes = { target = ["target"] }

[[rows]]
name = "panda_early"
method = "panda_early"
settings = { prompt_length = 2, texts = 4 }
roles = { teacher = "early" }
axes = { target = ["target"] }

[[columns]]
score = "transfer/score"
title = "score"
direction = "higher"
rank = true
"""

STAGE = (
    '[{ name = "pretrain", method = "mlm_pooler", task = "tiny_transfer_text", '
    "task_settings = { train = 40, dev = 8 }, training = { optimizer_steps = 2 } }]"
)

PLUGIN = """
from dataclasses import dataclass

from kdbench.distillers._transfer import PromptConfig, PromptTuned, load_prompt, prompted


class Mine(PromptTuned):
    @dataclass
    class Config(PromptConfig):
        prompt_length: int = 2

    def __init__(self, cfg: Config, student, {roles}):
        super().__init__(cfg, prompted(student, cfg))
"""

TO_FOOD = ["target=food", "source=mood_few"]


def board_of(folder: Path, *changes: tuple[str, str]) -> Board:
    """The board with texts replaced."""
    text = BOARD
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "board.toml").write_text(text)
    return load_board(str(folder / "board.toml"))


def said(folder: Path, *changes: tuple[str, str]) -> str:
    """The error of a board with texts replaced."""
    with pytest.raises(UserError) as caught:
        board_of(folder, *changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def plugin(folder: Path, name: str, roles: str = "sources") -> str:
    """A method file that asks for these roles."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(PLUGIN.replace("{roles}", roles))
    return str(path)


def planned(
    board: Board,
    folder: Path,
    rows: Sequence[str],
    overrides: Sequence[str] = (),
    axis: Sequence[str] = (),
    seeds: Sequence[int] = (1,),
) -> list[Plan]:
    places = Places(folder / "runs", folder / "cache")
    return commands.plans(board, "debug", rows, seeds, overrides, "cpu", places, axis)


def refused(board: Board, folder: Path, *args: Any) -> str:
    """The one-line error of planning."""
    with pytest.raises(UserError) as caught:
        planned(board, folder, *args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labels(plans: Sequence[Plan]) -> list[str]:
    return [label_of(plan.run).removesuffix(" seed 1") for plan in plans]


def of(plans: Sequence[Plan], row: str) -> Plan:
    """The one plan of a row."""
    (found,) = [plan for plan in plans if plan.run.row == row]
    return found


def pt_at(plans: Sequence[Plan], target: str) -> Plan:
    (found,) = [p for p in plans if p.run.row.partition("[")[0] == "pt" and p.run.axes["target"] == target]
    return found


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return board_of(tmp_path)


# ------------------------------------------------------------------------------------------ what is planned
def test_what_a_run_needs_is_planned_once_and_before_it(board: Board, tmp_path: Path) -> None:
    plans = planned(board, tmp_path, ["panda"], axis=TO_FOOD)
    assert labels(plans) == [
        "pt (target mood_few)",
        "pt (target food)",
        "pot (source mood_few, target food)",
        "panda (source mood_few, target food)",
    ]
    panda = plans[-1]
    assert {role: spec.runs for role, spec in panda.run.roles.items() if spec.row} == {
        "source": [pt_at(plans, "mood_few").id],
        "target": [pt_at(plans, "food").id],
        "teacher": [of(plans, "pot").id],
    }
    every = planned(board, tmp_path, [row.name for row in board.rows], seeds=[1, 2])
    assert len({plan.id for plan in every}) == len(every) == 2 * (3 + 4 + 4 + 2 + 2)
    place = {plan.id: number for number, plan in enumerate(every)}
    for plan in every:
        assert all(place[other.id] < place[plan.id] for other in plan.needs)
        assert all(other.run.seed == plan.run.seed for other in plan.needs)
    assert [plan.id for plan in with_needs([*every, *every])] == [plan.id for plan in every]


def test_each_is_a_run_for_each_value_but_the_targets_own(board: Board, tmp_path: Path) -> None:
    plans = planned(board, tmp_path, ["fused"])
    told = {
        plan.run.axes["target"]: [other.run.axes["target"] for other in plan.needs]
        for plan in plans
        if plan.run.row == "fused"
    }
    assert told == {"food": ["food", "mood_few", "agree"], "agree": ["agree", "mood_few"]}
    at_agree = next(p for p in plans if (p.run.row, p.run.axes["target"]) == ("fused", "agree"))
    assert at_agree.run.roles["sources"].runs == [pt_at(plans, "mood_few").id]
    assert at_agree.run.roles["target"].runs == [pt_at(plans, "agree").id]


def test_each_wins_over_the_runs_own_value_of_that_axis(board: Board, tmp_path: Path) -> None:
    plans = planned(board, tmp_path, [plugin(tmp_path, "mine")])
    mine = [plan for plan in plans if plan.run.row == "mine"]
    assert [plan.run.axes for plan in mine] == board.axis_values("debug")
    sources = [
        [other.run.axes["target"] for other in plan.needs]
        for plan in mine
        if plan.run.axes["target"] == "food"
    ]
    assert sources == [["mood_few", "agree"]] * 2, "at either source all of them, each once"
    assert all(len(set(plan.run.roles["sources"].runs)) == len(plan.needs) for plan in mine)


# ------------------------------------------------------------------------------------------------------- ids
def test_an_id_follows_settings_and_seed_of_what_is_needed(board: Board, tmp_path: Path) -> None:
    one = planned(board, tmp_path, ["pot"], axis=TO_FOOD)
    other_seed = planned(board, tmp_path, ["pot"], axis=TO_FOOD, seeds=[2])
    old = 'method = "pt"\nsettings = { prompt_length = 2, texts = '
    changed = board_of(tmp_path / "other", (f"{old}4", f"{old}3"))
    other_texts = planned(changed, tmp_path, ["pot"], axis=TO_FOOD)
    assert of(other_texts, "pot").run.settings == of(one, "pot").run.settings
    assert len({of(plans, "pt").id for plans in (one, other_seed, other_texts)}) == 3
    assert len({of(plans, "pot").id for plans in (one, other_seed, other_texts)}) == 3
    made, source = of(one, "pot"), of(other_seed, "pt")  # the needed run's seed alone
    roles = {**made.run.roles, "source": dataclasses.replace(made.run.roles["source"], runs=[source.id])}
    assert Plan(dataclasses.replace(made.run, roles=roles), made.places, [source]).id != made.id
    assert of(planned(board, tmp_path, ["pot"], axis=TO_FOOD), "pot").id == made.id


def test_an_override_of_another_row_leaves_the_id(board: Board, tmp_path: Path) -> None:
    plain = planned(board, tmp_path, ["pot", "fused"], axis=TO_FOOD)
    other = planned(board, tmp_path, ["pot", "fused"], ["fused.tau=2.0"], TO_FOOD)
    assert of(other, "pot").id == of(plain, "pot").id
    assert of(other, "fused[tau=2.0]").id != of(plain, "fused").id
    same = planned(board, tmp_path, ["pot"], ["pt.texts=4"], TO_FOOD)
    assert [plan.id for plan in same] == [p.id for p in planned(board, tmp_path, ["pot"], axis=TO_FOOD)]


# ------------------------------------------------------------------------------------------------- overrides
def test_an_override_of_what_is_needed_names_the_dependent(board: Board, tmp_path: Path) -> None:
    plain = planned(board, tmp_path, ["panda"], axis=TO_FOOD)
    plans = planned(board, tmp_path, ["panda"], ["pt.texts=3"], TO_FOOD)
    assert [plan.run.row for plan in plans] == [
        "pt[texts=3]",
        "pt[texts=3]",
        "pot[pt[texts=3]]",
        "panda[pt[texts=3], pot[pt[texts=3]]]",
    ]
    assert all(plan.run.settings["texts"] == 3 for plan in plans if plan.run.method == "pt")
    assert plans[2].run.settings["texts"] == 4, "the override is pt's alone"
    assert not {plan.id for plan in plans} & {plan.id for plan in plain}
    both = planned(board, tmp_path, ["pot"], ["pt.texts=3", "pot.texts=2"], TO_FOOD)
    assert [plan.run.row for plan in both] == ["pt[texts=3]", "pot[texts=2][pt[texts=3]]"]
    assert both[0].id == plans[0].id
    again = planned(board, tmp_path, ["panda"], axis=TO_FOOD)
    assert [(p.run.row, p.id) for p in again] == [(p.run.row, p.id) for p in plain]


def test_only_what_names_a_row_or_the_task_reaches_what_is_needed(board: Board, tmp_path: Path) -> None:
    for text in ("training.lr=0.5", "method.texts=3", "evaluation.batch_size=2"):
        plans = planned(board, tmp_path, ["pot"], [text], TO_FOOD)
        assert plans[0].run.row == "pt", text
        assert plans[0].id == planned(board, tmp_path, ["pt"], axis=["target=mood_few"])[0].id
        assert plans[1].run.row.startswith("pot["), text
    task = planned(board, tmp_path, ["pot"], ["task.test=6"], TO_FOOD)
    assert [plan.run.task_settings["test"] for plan in task] == [6, 6]
    by_method = planned(board, tmp_path, ["panda_early"], ["pot_early.tau=2.0"], ["target=agree"])
    assert "fused[tau=2.0]" in [plan.run.row for plan in by_method]
    asked = planned(board, tmp_path, ["pt", "pot"], ["training.lr=0.5"], TO_FOOD)
    assert sum(plan.run.row == "pt[training.lr=0.5]" for plan in asked) == 1
    assert of(asked, "pot[training.lr=0.5]").needs[0].run.row == "pt"


@pytest.mark.parametrize("text", ["fused.tau=2.0", "pot_early.tau=2.0"])
def test_an_override_that_reaches_no_run_is_refused(board: Board, tmp_path: Path, text: str) -> None:
    name = text.partition(".")[0]
    told = refused(board, tmp_path, ["pot"], [text], TO_FOOD)
    assert told == f"--set {text}: no run of '{name}' is asked for, nor needed"
    assert "no section 'panda'" in refused(board, tmp_path, ["pot"], ["panda.lam0=0.5"], TO_FOOD)


# ------------------------------------------------------------------------------------------------- refusals
def test_boards_say_roles_of_rows_rightly(tmp_path: Path) -> None:
    role = '[roles.teacher]\nrow = "pot"'
    for new, words in {
        '[roles.teacher]\nrow = "pott"': "roles.teacher.row: no row 'pott'. Did you mean 'pot'?",
        f'{role}\nat = {{ sorce = "agree" }}': "roles.teacher.at: no axis 'sorce'. Did you mean 'source'?",
        f'{role}\neach = "sorce"': "roles.teacher.each: no axis 'sorce'. Did you mean 'source'?",
        f'{role}\nwithout = "agree"': "without leaves out a value of each; say each too",
        f"{role}\nseed = 1": "it takes row, at, each, without",
        f"{role}\nstages = {STAGE}": "it takes row, at, each, without",
        f'{role}\nmodel = "tiny/student"': "model and row are given",
        '[roles.teacher]\nmodel = "tiny/student"\neach = "source"': "say row too",
        f'{role}\n[roles.more]\nlike = "teacher"\nstages = {STAGE}': "it takes no stages and no seed",
        f'{role}\n[roles.more]\nlike = "teacher"\nseed = 3': "it takes no stages and no seed",
    }.items():
        assert words in said(tmp_path, (role, new)), new


def test_a_role_that_is_like_a_rows_is_that_rows(tmp_path: Path) -> None:
    like = board_of(tmp_path, ('[roles.target]\nrow = "pt"', '[roles.target]\nlike = "source"'))
    panda = planned(like, tmp_path, ["panda"], axis=TO_FOOD)[-1]
    assert panda.run.roles["target"].runs == panda.run.roles["source"].runs


def test_tuning_axes_are_the_boards(tmp_path: Path) -> None:
    old = 'axes = { source = ["mood_few"] }'
    told = said(tmp_path, (old, 'axes = { sorce = ["mood_few"] }'))
    assert "tuning.axes: no axis 'sorce'. Did you mean 'source'?" in told
    told = said(tmp_path, (old, 'axes = { source = ["mod_few"] }'))
    assert "tuning.axes: no value of source 'mod_few'. Did you mean 'mood_few'?" in told


def test_rates_are_tried_at_the_axis_values_that_are_asked(board: Board, tmp_path: Path) -> None:
    places = Places(tmp_path / "runs", tmp_path / "cache")
    found = trials(board, "cpu", places)
    tried = {row: [(p.run.training.lr, p.run.axes) for p in plans] for row, plans in found.items()}
    of_source = [{"source": "mood_few", "target": target} for target in ("food", "agree")]
    assert tried["pot"] == [(lr, axes) for lr in (0.01, 0.02) for axes in of_source]
    assert [axes["target"] for _, axes in tried["pt"]] == ["food", "agree", "mood_few"] * 2
    for plan in found["pot"]:
        (need,) = plan.needs
        assert (need.run.row, need.run.seed, need.run.training.lr) == ("pt", 9, 0.01)
        assert need.folder.is_relative_to(tmp_path / "runs" / "tuning")
    none = dataclasses.replace(board.tuning, axes={"source": []}) if board.tuning else None
    with pytest.raises(UserError, match=r"tuning.axes leaves the row 'pot' no combination"):
        trials(dataclasses.replace(board, tuning=none), "cpu", places)


@pytest.mark.parametrize(
    ("old", "new", "row", "words"),
    [
        (  # the run's own target, once for each source
            'each = "source"\nat = { target = "{source}" }', 'each = "source"', "fused",
            "row 'fused': roles.sources: each = 'source' stands for one run of 'pt' more than once: say at",
        ),
        (
            'without = "{target}"', 'without = "{source}"', "fused",
            "row 'fused': roles.sources: without = '{source}': the row has no such axis",
        ),
        (
            '[roles.target]\nrow = "pt"', '[roles.target]\nrow = "pt"\nat = { target = "{source}" }', "fused",
            "row 'fused': roles.target: at.target = '{source}': the row has no such axis",
        ),
        (
            '[roles.target]\nrow = "pt"', '[roles.target]\nrow = "pt"\nat = { source = "agree" }', "fused",
            "row 'fused': roles.target: at: row 'pt': no axis 'source'. Known: target.",
        ),
        (
            '[roles.early]\nrow = "fused"', '[roles.early]\nrow = "pot"', "panda_early",
            "row 'panda_early': roles.teacher: does not say which source of the row 'pot'; set at.source",
        ),
        (
            'roles = { teacher = "early" }', 'roles = { student = "source" }', "panda_early",
            "row 'panda_early': roles.student: a student has a model of its own, not another row's",
        ),
    ],
)  # fmt: skip
def test_roles_that_stand_for_no_run_are_refused(
    tmp_path: Path, old: str, new: str, row: str, words: str
) -> None:
    board = board_of(tmp_path, (old, new))
    assert words in refused(board, tmp_path, [row], (), ["target=food"])


def test_nothing_left_of_each_is_refused(tmp_path: Path) -> None:
    one = board_of(tmp_path, ('source = ["mood_few", "agree"]', 'source = ["agree"]'),
                   ('axes = { source = ["mood_few"] }', ""))  # fmt: skip
    assert "roles.sources: no value of source is left" in refused(
        one, tmp_path, ["fused"], (), ["target=agree"]
    )


@pytest.mark.parametrize("overrides", [[], ["pot.texts=3"], ["fused.texts=3", "pot.texts=2"]])
def test_rows_that_need_each_other_are_refused(tmp_path: Path, overrides: list[str]) -> None:
    source = '[roles.source]\nrow = "pt"\nat = { target = "{source}" }'
    sources = source.replace("[roles.source]", "[roles.sources]").replace("\nat", '\neach = "source"\nat')
    spare = source.replace("[roles.source]", "[roles.spare]")  # for a board uses its axes
    own = board_of(tmp_path, (source, f'[roles.source]\nrow = "pot"\n{spare}'))
    asked = [text for text in overrides if text.startswith("pot")]
    told = refused(own, tmp_path, ["pot"], asked, TO_FOOD)
    assert told == "linked/v1: row 'pot': roles.source: rows need each other: pot -> pot"
    two = board_of(
        tmp_path,
        (source, f'[roles.source]\nrow = "fused"\n{spare}'),
        (f'{sources}\nwithout = "{{target}}"', '[roles.sources]\nrow = "pot"\nat = { source = "agree" }'),
    )
    for row, chain in {
        "pot": "pot -> fused -> pot",
        "fused": "fused -> pot -> fused",
        "panda_early": "panda_early -> fused -> pot -> fused",
    }.items():
        told = refused(two, tmp_path, [row], overrides, ["target=food"])
        assert told.endswith(f"rows need each other: {chain}"), row


# --------------------------------------------------------------------------------------------------- --axis
def test_axis_narrows_a_row_in_the_axes_that_it_has(board: Board) -> None:
    rows = ["pt", "pot", "fused"]
    found = chosen_axes(board, "debug", rows, ["target=mood_few,food"])
    assert found == {
        "pt": [{"target": "food"}, {"target": "mood_few"}],
        "pot": [{"source": "mood_few", "target": "food"}, {"source": "agree", "target": "food"}],
        "fused": [{"target": "food"}],
    }
    found = chosen_axes(board, "debug", rows, ["source=agree", "target=mood_few", "target=agree"])
    assert found == {
        "pt": [{"target": "agree"}, {"target": "mood_few"}],
        "pot": [{"source": "agree", "target": "agree"}],
        "fused": [{"target": "agree"}],
    }
    only = chosen_axes(board, "debug", rows, ["target=mood_few"])
    assert {row: len(values) for row, values in only.items()} == {"pt": 1, "pot": 0, "fused": 0}


def test_axis_of_no_run_is_refused(board: Board) -> None:
    def told(rows: list[str], *axis: str) -> str:
        with pytest.raises(UserError) as caught:
            chosen_axes(board, "debug", rows, axis)
        return str(caught.value)

    assert "--axis: no value of target 'mood_few'. Known: food, agree." in told(["pot"], "target=mood_few")
    assert "--axis: no axis 'source'" in told(["pt", "fused"], "source=agree")
    assert "no axis 'sorce'. Did you mean 'source'?" in told(["pot"], "sorce=agree")
    swapped = [
        *board.rows,
        dataclasses.replace(board.rows[1], name="swapped", axes={"source": ["target"], "target": ["source"]}),
    ]
    other = dataclasses.replace(board, rows=swapped)
    with pytest.raises(UserError, match="source=food target=food: nothing has all of these values"):
        chosen_axes(other, "debug", ["pot", "swapped"], ["source=food", "target=food"])


def test_a_file_named_like_a_row_of_another_method_has_the_boards_axes(board: Board, tmp_path: Path) -> None:
    path = plugin(tmp_path, "fused", "source")
    assert board.row_axis_values(path, "debug") == board.axis_values("debug")
    same = plugin(tmp_path, "pt", "source")  # the row's method has the file's name: it stands for the row
    assert board.row_axis_values(same, "debug") == board.row_axis_values("pt", "debug")
    plans = planned(board, tmp_path, [path], axis=TO_FOOD)
    assert labels(plans) == ["pt (target mood_few)", "fused (source mood_few, target food)"]
    assert plans[-1].run.method == path


# ------------------------------------------------------------------------------------------- missing data
@pytest.fixture
def without_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set agree is not there."""
    begin = TinyTransfer.__init__

    def missing(self: TinyTransfer, settings: Any = None, data_root: Any = None) -> None:
        if settings.dataset == "agree":
            raise Missing("agree: there is no such file")
        begin(self, settings, data_root)

    monkeypatch.setattr(TinyTransfer, "__init__", missing)


@pytest.mark.usefixtures("without_agree")
def test_no_run_is_made_for_one_that_lacks_data(
    board: Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = planned(board, tmp_path, ["pot", "fused"])
    assert labels(plans) == ["pt (target mood_few)", "pot (source mood_few, target food)"]
    err = capsys.readouterr().err
    assert err == "left out: 5 runs: agree: there is no such file\n", "three pairs and two fusions"
    one_target = planned(board, tmp_path, ["pt", "panda_early"], axis=["target=food"])
    assert labels(one_target) == ["pt (target food)"]
    with pytest.raises(Missing, match="agree: there is no such file"):
        planned(board, tmp_path, ["fused"])


@pytest.mark.usefixtures("without_agree")
def test_an_override_of_runs_that_lack_data_is_not_called_unasked(board: Board, tmp_path: Path) -> None:
    plans = planned(board, tmp_path, ["pot", "fused"], ["fused.tau=2.0"])
    assert labels(plans) == ["pt (target mood_few)", "pot (source mood_few, target food)"]


# ------------------------------------------------------------------------------------------------------ jobs
class Here(Workers):
    """Workers that make a job in this process, as a child would."""

    def __post_init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._lock = self._context.RLock()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def _start(self, job: Job, slot: int) -> tuple[Connection, Any]:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        sender.send(_make(dataclasses.replace(job, plan=Plan(job.plan.run, job.plan.places))))
        sender.close()
        return receiver, SimpleNamespace(join=lambda: None, kill=lambda: None)


def made(
    plans: Sequence[Plan], apart: bool = False, say: Callable[[str], None] = lambda text: None
) -> list[Job]:
    """The jobs of these plans, made here or by workers."""
    jobs = jobs_of(plans)
    make(jobs, Here() if apart else None, 1, say)
    return jobs


def outcomes(jobs: Sequence[Job]) -> dict[str, Outcome]:
    """How each whole run ended, by row."""
    return {job.row: job.outcome for job in jobs if job.role is None and job.outcome is not None}


def ends(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Let every run of pt end so."""

    def loss(self: PT, batch: Any, step: Any) -> torch.Tensor:
        if how == "failed":
            raise RuntimeError("no light")
        return next(self.student.head.parameters()).sum() * float("nan")

    monkeypatch.setattr(PT, "loss", loss)


def test_runs_are_made_in_order_and_not_again(board: Board, tmp_path: Path) -> None:
    plans = planned(board, tmp_path, ["panda_early"], axis=["target=food"])
    jobs = jobs_of(plans)
    by_id = {job.gives: job for job in jobs}
    assert [job.label for job in jobs] == [label_of(plan.run) for plan in plans]
    assert all(job.needs == {other.id for other in job.plan.needs} for job in jobs)
    assert len(by_id) == len(jobs) == 5
    make(jobs, None, 1, lambda text: None)
    assert {job.outcome.status for job in jobs if job.outcome} == {"done"}
    models = plans[-1].materials.models()
    assert list(models) == list(plans[-1].run.roles) == ["student", "target", "teacher", "sources"]
    sources: Any = models["sources"]
    assert len(sources) == 2
    assert all(one.encoder is models["student"] for one in [*sources, models["teacher"]])
    told = record.load(plans[-1].folder / "record.json")
    assert told.models["teacher"].name == "row:fused"
    assert not jobs_of(planned(board, tmp_path, ["panda_early", "fused", "pt"], axis=["target=food"]))
    more = jobs_of(planned(board, tmp_path, ["pot", "panda_early"], axis=TO_FOOD))
    assert [job.row for job in more] == ["pot"], "what is finished is not made again"


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("how", ["failed", "diverged"])
def test_what_needs_a_run_that_ended_badly_ends_so_too(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, apart: bool
) -> None:
    axis = ["target=agree"]
    plans = planned(board, tmp_path, ["fused", "panda_early"], axis=axis)
    with monkeypatch.context() as patch:
        ends(patch, how)
        found = outcomes(made(plans, apart))
    assert [one.status for one in found.values()] == [how] * 3
    assert f"{how}: " in found["fused"].reason
    assert found["fused"].reason.startswith("pt (target ")
    last = plans[-1]
    assert found["panda_early"].reason.split(f" {how}: ")[0] in {label_of(one.run) for one in last.needs}
    assert "\n" not in found["panda_early"].reason
    assert not of(plans, "fused").folder.exists(), "nothing is recorded of a run that never began"

    again = planned(board, tmp_path, ["fused", "panda_early"], axis=axis)  # the next command
    assert [plan.id for plan in again] == [plan.id for plan in plans]
    found = outcomes(made(again, apart))
    if how == "failed":  # it is tried again, and goes well now
        assert {row: one.status for row, one in found.items()} == dict.fromkeys(
            ("pt", "fused", "panda_early"), "done"
        )
    else:  # that is its result
        assert list(found) == ["fused", "panda_early"]
        assert all(one.status != "done" for one in found.values())
        assert found["fused"].reason.startswith("roles.")
        assert "of the row 'pt' diverged: " in found["fused"].reason
        assert "of the row 'pt' diverged: " in found["panda_early"].reason


@pytest.mark.parametrize("apart", [False, True])
def test_a_failed_run_takes_no_finished_one_with_it(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    made(planned(board, tmp_path, ["pot"], axis=TO_FOOD))
    ends(monkeypatch, "failed")
    plans = planned(board, tmp_path, ["pot"], axis=["target=food"])
    before = (of_pair := plans[1].folder / "record.json").read_bytes()
    jobs = made(plans, apart)
    assert [(job.label, job.outcome.status) for job in jobs if job.outcome] == [
        ("pt (target agree) seed 1", "failed"),
        ("pot (source agree, target food) seed 1", "failed"),
    ]
    assert of_pair.read_bytes() == before


@pytest.mark.parametrize("apart", [False, True])
def test_a_stage_that_fails_takes_all_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    board = board_of(tmp_path, ("stages = []", f"stages = {STAGE}"))

    def loss(self: MLMPooler, *args: Any) -> torch.Tensor:
        raise RuntimeError("no light")

    plans = planned(board, tmp_path, ["pot"], axis=TO_FOOD)
    with monkeypatch.context() as patch:
        patch.setattr(MLMPooler, "loss", loss)
        jobs = made(plans, apart)
    assert [job.label for job in jobs if job.role is not None] == ["stage pretrain seed 0"]
    found = outcomes(jobs)
    assert {row: one.status for row, one in found.items()} == {"pt": "failed", "pot": "failed"}
    assert all("no light" in one.reason for one in found.values())
    assert {one.status for one in outcomes(made(plans, apart)).values()} == {"done"}
    encoder = json.loads((of(plans, "pt").folder / "student" / "prompted.json").read_text())["encoder"]
    assert encoder == plans[0].materials.stage_keys("student")[-1]


def test_a_model_that_is_gone_is_said(board: Board, tmp_path: Path) -> None:
    plans = planned(board, tmp_path, ["pot"], axis=TO_FOOD)
    source, pot = plans
    made([source])
    shutil.rmtree(source.folder / "student")
    (job,) = made(plans)
    assert job.outcome is not None
    assert job.outcome.status == "refused"
    whose = f"roles.source: run {source.id} of the row 'pt'"
    assert job.outcome.reason == f"{whose} has no model left; remove {source.folder} and it is made again"
    shutil.rmtree(source.folder)
    with pytest.raises(UserError, match=f"{whose} is not there"):
        pot.materials.models()
    assert {one.status for one in outcomes(made(plans)).values()} == {"done"}


def test_killed_between_two_runs_the_rest_goes_on(board: Board, tmp_path: Path) -> None:
    def stop(text: str) -> None:
        if text.startswith("pt (target mood_few) seed 1: done"):
            raise KeyboardInterrupt

    plans = planned(board, tmp_path, ["pot"], axis=TO_FOOD)
    with pytest.raises(KeyboardInterrupt):
        made(plans, say=stop)
    source, pot = plans
    before = (source.folder / "record.json").read_bytes()
    assert not pot.folder.exists()
    jobs = made(planned(board, tmp_path, ["pot"], axis=TO_FOOD))
    assert [(job.row, job.outcome.status) for job in jobs if job.outcome] == [("pot", "done")]
    assert (source.folder / "record.json").read_bytes() == before


# --------------------------------------------------------------------------------------- profile and compare
def test_rows_with_models_of_other_rows_are_not_profiled(
    board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["pt", "pot", "panda_early"]
    axes = {row: board.row_axis_values(row, "debug")[0] for row in rows}
    runs = to_profile(board, "debug", rows, [], "cpu", axes, named=False)
    assert [run.row for run in runs] == ["pt"]
    left = capsys.readouterr().err.splitlines()
    told = "takes models of other rows' runs, which are not made here"
    assert left == [
        f"left out: pot: {told}: source (pt)",
        f"left out: panda_early: {told}: target (pt), teacher (fused), sources (pt)",
    ]
    with pytest.raises(UserError) as caught:
        to_profile(board, "debug", rows, [], "cpu", axes)
    assert str(caught.value) == f"pot: {told}: source (pt)"
    with pytest.raises(UserError, match="every row takes models of other rows' runs"):
        to_profile(board, "debug", rows[1:], [], "cpu", axes, named=False)


def test_pairs_of_rows_with_and_without_an_axis(board: Board, tmp_path: Path) -> None:
    plans = planned(board, tmp_path, ["pt", "pot"], axis=["target=food", "source=mood_few"], seeds=[1, 2])
    plans += planned(board, tmp_path, ["pot"], axis=["target=agree", "source=mood_few"])
    assert {one.status for one in outcomes(made(plans)).values()} == {"done"}
    runs = tmp_path / "runs"
    sides = [runs_of(row, board, "debug", runs) for row in ("pot", "pt")]
    for flipped in (False, True):
        found, left = pairs(*(reversed(sides) if flipped else sides))
        assert [(pair.axes, pair.seeds) for pair in found] == [
            ({"source": "mood_few", "target": "food"}, "seeds 1, 2")
        ]
        pot, pt = (found[0].other, found[0].one) if flipped else (found[0].one, found[0].other)
        assert {run.record.row for run in pot} == {"pot"}
        assert {(run.record.row, run.record.axes["target"]) for run in pt} == {("pt", "food")}
        none = "seeds none and 1" if flipped else "seeds 1 and none"
        assert left == [f"source mood_few, target agree: {none}"]
    both = find_each(["pot", "pt"], runs, ["target=food", "source=mood_few"])  # pt has no source
    assert [run.record.axes for run in both] == [
        {"source": "mood_few", "target": "food"},
        {"target": "food"},
    ]
    with pytest.raises(UserError, match="no axis 'sorce'"):
        find_each(["pot", "pt"], runs, ["target=food", "sorce=mood_few"])
