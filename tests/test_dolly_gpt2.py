"""The board dolly-gpt2: its settings against the paper's file, and its whole path with tiny models.

The models are in the hub's format (config, safetensors, tokenizer) in local folders, the data are laid out as
a real data folder.
"""

from __future__ import annotations

import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from kdbench import record
from kdbench.cli import main
from kdbench.config import Board, RunConfig, load_board, resolve, stage_training
from kdbench.paths import configs_dir, leaderboards_dir
from kdbench.registry import load_distiller, load_task
from kdbench.task import template

PAPER: dict[str, Any] = tomllib.loads((configs_dir() / "papers" / "promptkd.toml").read_text())
BOARD = leaderboards_dir() / "dolly-gpt2" / "v1" / "board.toml"
SIZES = ("base", "medium", "large")
METHODS = ("sft", "kd", "seqkd", "minillm", "gkd", "promptkd")
SETS = ("dolly", "self-inst", "vicuna", "s-ni", "unni-short")


@pytest.fixture(scope="module")
def board() -> Board:
    return load_board("dolly-gpt2/v1")


def resolved(board: Board, size: str, row: str) -> RunConfig:
    """A run of the board with its method's and task's settings complete."""
    line = board.row(row)
    assert line is not None
    task = load_task(board.task).Settings
    config = load_distiller(line.method).Config
    return resolve(board, size, row, 10, settings_class=config, task_settings_class=task)


# ------------------------------------------------------------------------------------ the paper's numbers
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", METHODS)
def test_each_row_has_the_papers_recipe(board: Board, size: str, row: str) -> None:
    recipe = PAPER["recipes"][row]
    told, run = recipe[size], resolved(board, size, row)
    training, optimizer = run.training, PAPER["optimizer"]
    assert (training.optimizer_steps, training.batch_size, training.lr) == (
        told["steps"],
        told["batch_size"],
        told["lr"],
    )
    assert (training.schedule, training.warmup_steps) == (recipe["schedule"], recipe["warmup_steps"])
    assert told["micro_batch"] * told["accumulation"] * optimizer["gpus"] == told["batch_size"]
    across = optimizer["gpus"] if row == "minillm" else 1  # it whitens over a micro-batch of all GPUs
    assert training.micro_batch == told["micro_batch"] * across
    assert (training.mean, training.student_dropout) == (optimizer["mean"], row != "minillm")
    own = run.settings
    assert (own.get("betas") or list(training.betas)) == recipe.get("betas", optimizer["betas"])
    assert (own.get("weight_decay") or training.weight_decay) == recipe.get(
        "weight_decay", optimizer["weight_decay"]
    )
    assert (training.eps, training.grad_clip) == (optimizer["eps"], optimizer["grad_clip"])
    if recipe["schedule"] == "cosine":
        assert training.lr * training.min_lr_ratio == pytest.approx(optimizer["lr_min"])
    assert recipe.get("settings", {}).items() <= own.items()
    assert training.max_new_tokens == PAPER["evaluation"]["max_new_tokens"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", METHODS)
def test_steps_follow_from_epochs(size: str, row: str) -> None:
    recipe, records = PAPER["recipes"][row], PAPER["data"]["train_records"]
    told = recipe[size]
    if row == "minillm":
        phases = told["epochs"] * (records // recipe["rollouts"])
        steps = phases * recipe["settings"]["inner_epochs"] * recipe["rollouts"] // told["batch_size"]
        assert told["steps"] == min(steps, 5000)
        assert load_board("dolly-gpt2").sizes[size].rows[row].settings == {
            "rollout_batches": recipe["rollouts"] // told["batch_size"]
        }
    else:
        assert told["steps"] == told["epochs"] * (records // told["batch_size"])


@pytest.mark.parametrize("size", SIZES)
def test_models_and_what_they_were_trained_on(board: Board, size: str) -> None:
    teachers = set()
    for row in METHODS:
        roles = resolved(board, size, row).roles
        recipe = PAPER["recipes"][row]
        assert roles["student"].model == PAPER["models"][size]
        assert [stage.name for stage in roles["student"].stages] == (
            [] if recipe["init"] == "pretrained" else ["sft-init"]
        )
        assert (roles["teacher"].model, roles["teacher"].seed) == (PAPER["models"]["teacher"], 10)
        stages = {
            "teacher-sft": PAPER["recipes"]["sft"]["teacher"],
            "sft-init": PAPER["recipes"]["sft-init"][size],
        }
        for role in ("teacher", "student"):
            for stage in roles[role].stages:
                training, told = stage_training(stage), stages[stage.name]
                assert (
                    training.optimizer_steps
                    == told["steps"]
                    == told["epochs"] * (11435 // told["batch_size"])
                )
                assert (training.batch_size, training.micro_batch, training.lr) == (32, 2, told["lr"])
                assert training.lr * training.min_lr_ratio == pytest.approx(PAPER["optimizer"]["lr_min"])
                assert (training.student_dropout, training.mean) == (True, "micro_batch")
        teachers.add(json.dumps([stage.training for stage in roles["teacher"].stages], default=str))
    assert len(teachers) == 1
    other = [resolved(board, one, "kd").roles["teacher"] for one in SIZES]
    assert all(one == other[0] for one in other)  # one teacher, trained once


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_is_the_papers(board: Board, size: str) -> None:
    run, told, exposure = resolved(board, size, "promptkd"), PAPER["evaluation"], PAPER["exposure_bias"]
    assert run.task_settings["tests"] == told["sets"]
    assert (run.task_settings["max_prompt"], run.task_settings["max_length"]) == (
        PAPER["data"]["max_prompt"],
        PAPER["data"]["max_length"],
    )
    assert (run.evaluation.generation_seeds, run.evaluation.limit) == (told["generation_seeds"], None)
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "no_repeat_ngram"):
        assert getattr(run.evaluation.decode, name) == told[name]
    assert (run.select.rule, run.select.score) == ("best", told["select"])
    evidence = run.evidence
    assert evidence is not None
    assert (evidence.split, evidence.profile) == ("test/" + exposure["set"], "minillm")
    for name in ("samples", "max_new_tokens", "snapshots", "snapshot_tokens"):
        assert getattr(evidence, name) == exposure[name]


def test_published_numbers_are_complete_and_add_up() -> None:
    found = {(line["size"], line["row"]) for line in PAPER["table1"]}
    assert found == {("teacher", "teacher")} | {(size, row) for size in SIZES for row in METHODS}
    for line in PAPER["table1"]:
        scores = line["scores"]
        assert list(scores) == PAPER["evaluation"]["sets"]
        assert sum(scores.values()) / 5 == pytest.approx(line["mean"], abs=0.005)
    assert [line["row"] for line in PAPER["table2"]] == list(METHODS)
    means = {line["size"]: line["mean"] for line in PAPER["table1"] if line["row"] == "promptkd"}
    assert all(PAPER["table3"][size]["with"] == pytest.approx(means[size], abs=0.015) for size in SIZES)


def test_the_board_says_that_budgets_differ(board: Board) -> None:
    assert board.budgets == "differ"
    assert len({resolved(board, "base", row).training.optimizer_steps for row in METHODS}) > 1


# --------------------------------------------------------------------------------- the path, with tiny models
TINY = """
[sizes.tiny]
task_settings = {{ tests = [{sets}], source = "local", max_prompt = 48, max_length = 80 }}

[sizes.tiny.roles.teacher]
model = "{root}/hub/teacher"
seed = 10
stages = [{{ name = "teacher-sft", training = {{ optimizer_steps = 3 }} }}]

[sizes.tiny.roles.pretrained]
model = "{root}/hub/student"

[sizes.tiny.roles.sft-init]
like = "pretrained"
stages = [{{ name = "sft-init", training = {{ optimizer_steps = 2 }} }}]

[sizes.tiny.training]
optimizer_steps = 3
batch_size = 4
micro_batch = 2
max_new_tokens = 6
lr = 1e-3
student_dropout = true
mean = "micro_batch"
precision = "bf16"

[sizes.tiny.rows.minillm.training]
optimizer_steps = 4

[sizes.tiny.rows.promptkd.training]
optimizer_steps = 2
schedule = "constant"
warmup_steps = 1

[sizes.tiny.select]
rule = "best"
every = 2

[sizes.tiny.evaluation]
generation_seeds = [10, 20]
batch_size = 4
decode = {{ max_new_tokens = 6 }}

[sizes.tiny.evidence]
split = "test/dolly"
max_new_tokens = 6
profile = "minillm"
snapshots = 1
snapshot_prompts = 2
snapshot_tokens = 4
"""
WORDS = "red blue green cat dog bird runs sleeps sings one two three".split()


def rows(count: int, seed: int, references: bool = False) -> list[dict[str, Any]]:
    """Instructions with answers of a few words; every other one has an input."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 4))]
        answer = " ".join(words[::-1])
        row = {
            "instruction": "Turn round",
            "input": " ".join(words),
            "output": [answer, "red"] if references else answer,
        }
        made.append(
            row if number % 2 else {**row, "instruction": f"Turn round {' '.join(words)}", "input": ""}
        )
    return made


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, with its end-of-text token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, unk_token=end)


def save_gpt2(
    folder: Path, tokenizer: PreTrainedTokenizerFast, width: int, layers: int, vocabulary: int
) -> None:
    """A random GPT-2 with dropout 0.1, saved as the hub's repositories are."""
    torch.manual_seed(width)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=96,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All rows of the board run at size tiny; their records by row."""
    root = tmp_path_factory.mktemp("dolly-gpt2")
    data = root / "data" / "instruct"
    train = rows(12, 1)
    write(data / "dolly" / "train.jsonl", train)
    write(data / "dolly" / "dev.jsonl", rows(3, 2))
    for number, name in enumerate(("dolly", "self-inst", "vicuna", "s-ni", "unni")):
        write(data / name / "test.jsonl", rows(3, 3 + number, references=name == "s-ni"))
    tokenizer = tokenizer_of([template(row) + str(row["output"]) for row in train] * 3)
    used = len(tokenizer)
    save_gpt2(root / "hub" / "student", tokenizer, 16, 1, used)
    save_gpt2(root / "hub" / "teacher", tokenizer, 32, 2, used + 5)  # padded, as published heads often are
    text = BOARD.read_text() + TINY.format(root=root, sets=", ".join(f'"{name}"' for name in SETS))
    (root / "board.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDBENCH_CACHE", str(root / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        command = ["run", "all", "--board", str(root / "board.toml"), "--size", "tiny", "--seeds", "10"]
        command += ["--runs", str(root / "runs"), "--data-root", str(root / "data"), "--device", "cpu"]
        code = main(command)
    records = [record.load(path) for path in root.glob("runs/dolly-gpt2/v1/*/record.json")]
    return {"code": code, "root": root, "records": {one.row: one for one in records}}


def test_every_row_is_done_with_scores_of_every_set(made: dict[str, Any]) -> None:
    told = {row: (one.status, one.reason) for row, one in made["records"].items()}
    assert made["code"] == 0, told
    assert set(told) == {"teacher", "pretrained", "sft-init", *METHODS}
    for one in made["records"].values():
        assert (one.status, one.seed) == ("done", 10)
        for name in SETS[:4]:
            assert 0 <= one.value(f"instruction_following/rouge_l/{name}") <= 100
        assert 0 <= one.value("instruction_following/exact_match/unni-short") <= 100
        assert one.value("exposure_bias/ex_acc_err_minillm@5") is not None


def test_budgets_differ_by_row_and_are_recorded(made: dict[str, Any]) -> None:
    budgets = {row: one.budget for row, one in made["records"].items()}
    steps = {row: budget["optimizer_steps"] for row, budget in budgets.items()}
    assert steps == {
        **dict.fromkeys(("teacher", "pretrained", "sft-init"), 0),
        **dict.fromkeys(("sft", "kd", "seqkd", "gkd"), 3),
        "minillm": 4,
        "promptkd": 2,
    }
    init = {row: budget["init_steps"] for row, budget in budgets.items()}
    assert {row for row, count in init.items() if count == 2} == {"sft-init", "minillm", "gkd", "promptkd"}
    assert {row for row, count in init.items() if count == 0} == {"pretrained", "sft", "kd", "seqkd"}
    assert all(budgets[row]["tokens_sampled"] > 0 for row in ("seqkd", "minillm", "gkd", "promptkd"))


def test_what_the_papers_settings_break_is_noted(made: dict[str, Any]) -> None:
    for row in METHODS:
        assert any("micro_batch" in note for note in made["records"][row].notes), row


def test_selection_scored_the_dev_split(made: dict[str, Any]) -> None:
    for row in METHODS:
        assert any("selected step" in note for note in made["records"][row].notes), row


def test_students_load_in_the_hubs_format(made: dict[str, Any]) -> None:
    for one in made["records"].values():
        folder = made["root"] / "runs" / "dolly-gpt2" / "v1" / one.run_id / "student"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("### Instruction:\nTurn round", return_tensors="pt")["input_ids"]
        assert torch.isfinite(model(ids).logits).all()


def test_reference_rows_are_the_models_they_name(made: dict[str, Any]) -> None:
    records, root = made["records"], made["root"]
    folder = root / "runs" / "dolly-gpt2" / "v1" / records["pretrained"].run_id / "student"
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(root / "hub" / "student").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
