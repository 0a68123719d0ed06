"""Stages: their seeds, heads, selection and refusals; what `prepare` made is cached by what it depends on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_weights
from transformers import BertForSequenceClassification

from kdbench import commands, config, registry
from kdbench.config import Board, Data, Stage, load_board
from kdbench.errors import UserError
from kdbench.harness import Trainer
from kdbench.runner import Plan
from kdbench.selection import Selection
from kdbench.stages import Materials, Places

BOARD = "tiny-fewshot/v1"
SMALL = ["task.k=2", "task.unlabeled_ratio=2", "task.test_limit=8"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages that the tests of this file share."""
    return tmp_path_factory.mktemp("cache")


def plan(
    row: str, tmp_path: Path, cache: Path, *overrides: str, board: Board | None = None, seed: int = 1
) -> Plan:
    board = board or load_board(BOARD)
    places = Places(tmp_path / "runs", cache)
    made = commands.plans(
        board, "debug", [row], [seed], [*SMALL, *overrides], "cpu", places, ["dataset=polarity"]
    )
    return made[0]


def replaced(plan: Plan, role: str, *stages: Stage) -> Plan:
    """The plan made anew with other stages behind a role."""
    roles = {**plan.run.roles, role: dataclasses.replace(plan.run.roles[role], stages=list(stages))}
    return Plan(dataclasses.replace(plan.run, roles=roles), plan.places)


def changed(stage: Stage, **fields: Any) -> Stage:
    return dataclasses.replace(stage, **fields)


# ------------------------------------------------------------------------------------------------ seeds
def test_a_stage_may_have_the_runs_seed_though_its_role_is_fixed() -> None:
    board = load_board(BOARD)
    for seed in (1, 4):
        run = config.resolve(board, "debug", "prompt_kd", seed, axes={"dataset": "topic"})
        assert run.roles["teacher"].seed == 0
        assert [stage.seed for stage in run.roles["teacher"].stages] == [0, seed]
        assert run.task_settings["draw"] == seed
        assert run.task_settings["dataset"] == "topic"


def test_pretraining_is_shared_by_data_sets_and_draws_and_tuning_is_not(tmp_path: Path, cache: Path) -> None:
    board, places = load_board(BOARD), Places(tmp_path / "runs", cache)
    axes = ["dataset=polarity,topic"]
    plans = commands.plans(board, "debug", ["prompt_kd", "kd_ft"], [1, 2], SMALL, "cpu", places, axes)
    keys = [plan.materials.stage_keys("teacher") for plan in plans]
    assert len({key[0] for key in keys}) == 1
    assert len({key[1] for key in keys}) == len(plans) == 8


def test_a_new_classifier_has_the_weights_of_its_seed(tmp_path: Path, cache: Path) -> None:
    models = [plan("student_ft", tmp_path, cache, seed=seed).materials.model("student") for seed in (1, 1, 2)]
    assert all(isinstance(model, BertForSequenceClassification) for model in models)
    assert same_weights(models[0], models[1])
    one, other = (dict(model.named_parameters()) for model in (models[0], models[2]))
    differ = {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}
    assert "classifier" in differ
    assert not [name for name in one if "encoder" in name and not torch.equal(one[name], other[name])]


# ---------------------------------------------------------------------------------------------- refusals
def test_stages_that_cannot_be_trained_are_refused_before_any(tmp_path: Path, cache: Path) -> None:
    made = plan("prompt_kd", tmp_path, cache)
    pretrain, tune = made.run.roles["teacher"].stages
    selected = tune.select
    told = {
        "which task tiny_fewshot does not give": changed(pretrain, task=None),
        "has no split 'nowhere'": changed(tune, split="nowhere"),
        "gives no answers to select by": changed(pretrain, select=selected),
        "needs more than a student": changed(tune, method="prompt_kd", seed=1),
        "task tiny_fewshot has none for it": changed(tune, method="sft"),
    }
    for words, stage in told.items():
        with pytest.raises(UserError, match=words) as caught:
            replaced(made, "teacher", stage)
        assert "roles.teacher: stage" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_teacher_is_not_given_a_random_classifier(tmp_path: Path, cache: Path) -> None:
    board = load_board(BOARD)
    rows = [dataclasses.replace(row, roles={}) if row.name == "kd_ft" else row for row in board.rows]
    with pytest.raises(UserError, match="its last stage trained a masked language model"):
        plan("kd_ft", tmp_path, cache, board=dataclasses.replace(board, rows=rows))


def test_a_model_that_is_not_trained_next_keeps_its_head_or_is_refused(tmp_path: Path, cache: Path) -> None:
    made = plan("kd_ft", tmp_path, cache)
    materials = made.materials
    folder = cache / "stages" / materials.stage_keys("teacher")[0] / "model"
    materials.model("teacher", 1)
    with pytest.raises(UserError, match="have no weights"):
        materials.saved("teacher", folder)


def test_an_extra_set_of_no_such_split_is_refused(tmp_path: Path, cache: Path) -> None:
    made = plan("prompt_distiller", tmp_path, cache)
    wrong = {"unlabeled": dataclasses.replace(made.run.extra["unlabeled"], split="unlabelled")}
    with pytest.raises(UserError, match="extra.unlabeled: task tiny_fewshot has no split 'unlabelled'"):
        Plan(dataclasses.replace(made.run, extra=wrong), made.places)


# --------------------------------------------------------------------------------------------- selection
def test_a_stage_keeps_the_weights_that_are_best_on_dev(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan("prompt_kd", tmp_path, cache)
    seen: list[tuple[int, float, dict[str, torch.Tensor]]] = []
    score = Selection.score

    def watched(self: Selection, step: int) -> None:
        score(self, step)
        assert self.trainer is not None
        weights = {
            name: value.detach().clone() for name, value in self.trainer.distiller.student.named_parameters()
        }
        seen.append((step, self.trainer.best["value"], weights))

    monkeypatch.setattr(Selection, "score", watched)
    pretrain, tune = made.run.roles["teacher"].stages
    told = {**tune.training, "optimizer_steps": 6, "lr": 0.05}  # so hot that it does not always improve
    assert tune.select is not None
    every = dataclasses.replace(tune.select, every=1, score="nll", direction="lower")
    other = replaced(made, "teacher", pretrain, changed(tune, training=told, select=every))
    model = other.materials.model("teacher")
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5, 6]
    best = max(range(6), key=lambda i: (seen[i][1], -i))
    assert all(torch.equal(value, seen[best][2][name]) for name, value in model.named_parameters())


def test_of_equal_dev_scores_the_first_is_kept(tmp_path: Path, cache: Path) -> None:
    made = plan("student_pt", tmp_path, cache)
    model = made.materials.model("student")
    distiller = registry.load_distiller("student_pt")(registry.load_distiller("student_pt").Config(), model)
    task, encoder = made.materials.task(), made.materials.encoders(made.materials.task())["student"]
    select = config.Select("best", "accuracy", every=2)
    selection = Selection(
        select, ["few_shot"], lambda model: made.materials.answers(model, task, "dev", encoder, dev=True)
    )
    trainer = Trainer(distiller, made.materials.source("train"), made.run.training, 1)
    selection.trainer = trainer
    for step in (2, 4, 6):  # the weights stay as they are
        selection.score(step)
    assert trainer.best["step"] == 2
    assert [sorted(one.at) for one in selection.milestones(5)] == [[2, 4, 5]]


def test_what_selects_a_stage_enters_its_key(tmp_path: Path, cache: Path) -> None:
    made = plan("prompt_kd", tmp_path, cache)
    pretrain, tune = made.run.roles["teacher"].stages
    assert tune.select is not None
    keys = {made.materials.stage_keys("teacher")[1]}
    for stage in (
        changed(tune, select=None),
        changed(tune, select=dataclasses.replace(tune.select, every=2)),
        changed(tune, seed=7),
    ):
        keys.add(replaced(made, "teacher", pretrain, stage).materials.stage_keys("teacher")[1])
    run = dataclasses.replace(made.run, analyses=["memory_time", "few_shot"])
    keys.add(Materials(run, made.places).stage_keys("teacher")[1])
    assert len(keys) == 5


# --------------------------------------------------------------------------------------- what was prepared
def prepare_key(made: Plan, **changes: Any) -> str:
    run = dataclasses.replace(made.run, **changes)
    materials = Materials(run, made.places)
    with torch.random.fork_rng(devices=[]):
        roles = {role: made.materials.model(role) for role in run.roles}
    distiller = registry.load_distiller(run.method)(
        config.check_settings(registry.load_distiller(run.method).Config, run.settings, "x"), **roles
    )
    return materials._prepare_key(distiller)


def test_prepared_probes_are_cached_by_what_trains_them(tmp_path: Path, cache: Path) -> None:
    made = plan("prompt_distiller", tmp_path, cache, "prompt_distiller.probe_steps=2")
    first = prepare_key(made)
    assert prepare_key(made) == first
    assert prepare_key(made, settings={**made.run.settings, "lam2": 0.5}) == first
    assert prepare_key(made, settings={**made.run.settings, "probe_steps": 3}) != first
    for name, value in (("betas", (0.5, 0.9)), ("grad_clip", 0.05), ("eps", 1e-2), ("no_decay", ())):
        assert prepare_key(made, training=dataclasses.replace(made.run.training, **{name: value})) != first, (
            name
        )
    data = made.run.extra["unlabeled"]
    assert prepare_key(made, extra={"unlabeled": dataclasses.replace(data, split="dev")}) != first
    assert prepare_key(made, extra={"other": data}) != first


def test_rows_prepared_without_training_are_shared_by_optimizers(tmp_path: Path, cache: Path) -> None:
    made = plan("prompt_kd", tmp_path, cache)
    other = dataclasses.replace(made.run.training, betas=(0.5, 0.9))
    assert prepare_key(made) == prepare_key(made, training=other)


def test_a_run_on_cached_rows_is_the_run_that_made_them(tmp_path: Path, cache: Path) -> None:
    """Rows of train and of the extra set, probes, pools and counters come back as they were."""
    told = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        made = plan("prompt_distiller", folder, cache, "prompt_distiller.probe_steps=3")
        found = made.execute()
        assert found.status == "done", found.reason
        steps = (made.folder / "steps.jsonl").read_text().splitlines()
        losses = [json.loads(line)["student/loss"] for line in steps]
        probes = {name: one.value for name, one in found.scores.items() if name.startswith("method/")}
        told.append((losses, probes, found.budget))
    assert told[0] == told[1]
    assert told[0][1]


def test_extra_sets_without_a_task_are_of_the_runs_own() -> None:
    run = config.resolve(load_board(BOARD), "debug", "prompt_distiller", 3, axes={"dataset": "pairs"})
    assert run.extra == {"unlabeled": Data(run.task, run.task_settings, "unlabeled")}
