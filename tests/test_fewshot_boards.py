"""The few-shot boards: settings are the paper's, rows share all but what they compare, and the path from
folders in the hub's format to a table works with tiny models.
"""

from __future__ import annotations

import dataclasses
import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from kdbench import record
from kdbench.cli import main
from kdbench.config import Board, RunConfig, load_board, resolve
from kdbench.paths import configs_dir, leaderboards_dir
from kdbench.registry import load_distiller, load_task

PAPER: dict[str, Any] = tomllib.loads((configs_dir() / "papers" / "prompt_distiller.toml").read_text())
BOARDS = ("tiny-fewshot/v1", "fewshot-roberta/v1", "fewshot-scratch/v1")
ROWS = [
    *("teacher_ft", "teacher_pt", "teacher_zero_shot", "student_zero_shot"),
    *("student_ft", "kd_ft", "pkd_ft", "pkd_ft_last", "tinybert_ft", "tinybert_ft_aligned"),
    *("student_pt", "prompt_kd", "prompt_distiller"),
    *("without_contrast", "without_unlabeled", "without_both"),
]


def resolved(board: Board, size: str, row: str, seed: int = 1, dataset: str | None = None) -> RunConfig:
    axes = board.axis_values()[0] if dataset is None else {"dataset": dataset}
    found = board.row(row)
    assert found is not None
    return resolve(
        board,
        size,
        row,
        seed,
        axes=axes,
        settings_class=load_distiller(found.method).Config,
        task_settings_class=load_task(board.task).Settings,
    )


@pytest.mark.parametrize("name", BOARDS)
def test_every_board_has_every_row_of_the_family(name: str) -> None:
    without = {"tinybert_ft_aligned"} if name.startswith("tiny") else set()  # its 3 and 2 layers do not fit
    assert [row.name for row in load_board(name).rows] == [row for row in ROWS if row not in without]


@pytest.mark.parametrize("name", BOARDS)
def test_rows_share_all_but_what_they_compare(name: str) -> None:
    board = load_board(name)
    for size in board.sizes:
        shared = set()
        for row in board.rows:
            run = resolved(board, size, row.name, 2)
            assert run.task_settings["draw"] == 2
            assert run.task_settings["dataset"] == board.axis_values()[0]["dataset"]
            if not row.reference:
                training = dataclasses.replace(run.training, schedule="linear")
                told = [training, run.select, run.task_settings, run.roles["student"], run.evaluation]
                shared.add(json.dumps([str(one) for one in told]))
        assert len(shared) == 1, size


@pytest.mark.parametrize("name", BOARDS)
def test_teachers_are_tuned_for_each_draw_and_pretrained_once(name: str) -> None:
    board = load_board(name)
    for size in board.sizes:
        for role in ("teacher", "teacher-ft"):
            one, other = (resolved(board, size, "prompt_distiller", seed).roles[role] for seed in (1, 2))
            assert (one.stages[-1].seed, other.stages[-1].seed) == (1, 2)
            assert one.stages[-1].select is not None
            assert (
                one.stages[:-1]
                == other.stages[:-1]
                == resolved(board, size, "kd_ft").roles["pretrained"].stages
            )
        assert one.seed == other.seed == 0


def test_prompt_distiller_reads_the_unlabelled_texts_of_its_own_draw() -> None:
    run = resolved(load_board("tiny-fewshot/v1"), "full", "prompt_distiller", 3)
    extra = run.extra["unlabeled"]
    assert (extra.task, extra.split) == (run.task, "unlabeled")
    assert extra.task_settings == run.task_settings


def test_the_paper_board_has_the_papers_settings() -> None:
    board, told = load_board("fewshot-roberta/v1"), PAPER["training"]
    assert [one["dataset"] for one in board.axis_values()] == PAPER["data"]["datasets"]
    for size in ("small", "base", "tiny"):
        run = resolved(board, size, "prompt_distiller")
        training = run.training
        assert (training.batch_size, training.lr, training.optimizer_steps) == (
            told["batch_size"],
            told["lr"],
            told["optimizer_steps"],
        )
        assert (training.schedule, training.warmup_steps, training.weight_decay) == (
            told["schedule"],
            told["warmup_steps"],
            told["weight_decay"],
        )
        assert [*training.betas] == told["betas"]
        assert (training.eps, training.grad_clip, training.student_dropout) == (
            told["eps"],
            told["grad_clip"],
            True,
        )
        assert (run.select.rule, run.select.every) == ("best", told["eval_every"])
        assert run.roles["student"].model == PAPER["models"][size]
        assert run.roles["teacher"].model == run.roles["pretrained"].model == PAPER["models"]["teacher"]
        assert (run.task_settings["k"], run.task_settings["unlabeled_ratio"]) == (
            PAPER["data"]["k"],
            PAPER["data"]["unlabeled_ratio"],
        )
        assert run.task_settings["prompt_set"] == PAPER["data"]["prompts"]


def test_prompt_distillers_defaults_are_the_papers() -> None:
    settings = resolved(load_board("fewshot-roberta/v1"), "small", "prompt_distiller").settings
    for name, value in PAPER["prompt_distiller"].items():
        assert settings[name] == value, name


def test_the_second_profile_tries_the_learning_rates_of_the_spec() -> None:
    board = load_board("fewshot-roberta/v1")
    assert board.tuning is not None
    assert board.tuning.seed not in board.seeds
    lr = resolved(board, board.tuning.size, "student_pt").training.lr
    assert [lr * factor for factor in board.tuning.factors] == pytest.approx(PAPER["tuned_lr"]["lr"])


def test_published_averages_are_recomputed() -> None:
    recomputed = {
        "teacher_ft": 61.99,
        "student_ft": 51.60,
        "kd_ft": 51.29,
        "pkd_ft": 49.14,
        "tinybert_ft": 51.04,
        "teacher_pt": 79.38,
        "student_pt": 51.89,
        "prompt_kd": 51.70,
        "prompt_distiller": 61.13,
    }
    table = PAPER["table_1"]
    for row, mean in recomputed.items():
        assert len(table[row]) == len(table["columns"]) == 8
        assert sum(table[row]) / 8 == pytest.approx(mean, abs=0.006), row


# --------------------------------------------------------------------------------- the path, with tiny models
TINY = """
[sizes.hub]
axes = {{ dataset = ["sst2", "mnli"] }}
task_settings = {{ k = 3, source = "local" }}
select = {{ rule = "best", score = "accuracy", every = 2 }}

[sizes.hub.roles.pretrained]
model = "{root}/hub/teacher"
seed = 0

[sizes.hub.roles.teacher]
like = "pretrained"

[[sizes.hub.roles.teacher.stages]]
name = "teacher-pt"
method = "student_pt"
seed = "run"
select = {{ rule = "best", score = "accuracy", every = 2 }}
training = {{ optimizer_steps = 2 }}

[sizes.hub.roles.teacher-ft]
like = "pretrained"

[[sizes.hub.roles.teacher-ft.stages]]
name = "teacher-ft"
method = "student_ft"
seed = "run"
select = {{ rule = "best", score = "accuracy", every = 2 }}
training = {{ optimizer_steps = 2 }}

[sizes.hub.roles.student]
model = "{root}/hub/student"
seed = 0

[sizes.hub.training]
optimizer_steps = 4
batch_size = 4
lr = 1e-3
student_dropout = true
checkpoint_every = 2

[sizes.hub.evaluation]
generation_seeds = [0]
batch_size = 8
"""
WORDS = (
    "film actor scene plot night day man woman dog ball runs sees finds likes hates good bad red blue".split()
)
LABELS = "terrible great No Yes Maybe".split()


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 7))) + " ."


def write(path: Path, labels: list[str], count: int, pair: bool, seed: int) -> None:
    draw, lines = random.Random(seed), []
    for number in range(count):
        texts = {"text_a": sentence(draw), "text_b": sentence(draw)} if pair else {"text": sentence(draw)}
        lines.append(json.dumps({**texts, "label": labels[number % len(labels)]}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def bert_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, ".", ",", "?", ":", "it", "was", *WORDS, *(word.lower() for word in LABELS)]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ("pad", "unk", "cls", "sep", "mask")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{f"{name}_token": token for name, token in zip(names, special, strict=True)}
    )


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([" " + " ".join([*WORDS, *LABELS])] * 20, trainer)
    names = ("cls", "pad", "sep", "unk", "mask")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{f"{name}_token": token for name, token in zip(names, special, strict=True)}
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All rows of fewshot-roberta at a size `hub` of tiny local folders; records by row and data set."""
    root = tmp_path_factory.mktemp("fewshot-roberta")
    data = root / "data" / "classify"
    opinion, nli = ["negative", "positive"], ["contradiction", "entailment", "neutral"]
    write(data / "sst2" / "train.jsonl", opinion, 60, False, 1)
    write(data / "sst2" / "dev.jsonl", opinion, 12, False, 2)
    write(data / "sst2" / "test.jsonl", opinion, 12, False, 3)
    write(data / "mnli" / "train.jsonl", nli, 90, True, 4)
    for number, name in enumerate(("dev", "test-matched", "test-mismatched")):
        write(data / "mnli" / f"{name}.jsonl", nli, 12, True, 5 + number)
    bert, roberta = bert_tokenizer(), roberta_tokenizer()
    torch.manual_seed(1)
    shape: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    student = BertConfig(vocab_size=len(bert), num_hidden_layers=2, max_position_embeddings=256, **shape)
    BertForMaskedLM(student).save_pretrained(root / "hub" / "student")
    bert.save_pretrained(root / "hub" / "student")
    teacher = RobertaConfig(
        vocab_size=len(roberta),
        num_hidden_layers=4,
        max_position_embeddings=258,
        type_vocab_size=1,
        pad_token_id=1,
        **{**shape, "hidden_size": 24},
    )
    RobertaForMaskedLM(teacher).save_pretrained(root / "hub" / "teacher")
    roberta.save_pretrained(root / "hub" / "teacher")
    board = leaderboards_dir() / "fewshot-roberta" / "v1" / "board.toml"
    text = board.read_text()
    at = text.index("[[rows]]")
    (root / "board.toml").write_text(text[:at] + TINY.format(root=root) + "\n" + text[at:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDBENCH_CACHE", str(root / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        command = ["run", "all", "--board", str(root / "board.toml"), "--size", "hub", "--seeds", "1"]
        command += ["--runs", str(root / "runs"), "--data-root", str(root / "data"), "--device", "cpu"]
        code = main(command)
    records = [record.load(path) for path in root.glob("runs/fewshot-roberta/v1/*/record.json")]
    return {"code": code, "root": root, "records": {(one.row, one.axes["dataset"]): one for one in records}}


def test_every_row_is_done_on_both_data_sets(made: dict[str, Any]) -> None:
    told = {key: (one.status, one.reason) for key, one in made["records"].items()}
    assert made["code"] == 0, told
    assert set(told) == {(row, dataset) for row in ROWS for dataset in ("sst2", "mnli")}
    for (_, dataset), one in made["records"].items():
        for name in ("sst2",) if dataset == "sst2" else ("mnli", "mnli-mm"):
            assert 0 <= one.value(f"few_shot/accuracy/{name}") <= 100


def test_students_load_with_the_head_of_their_method(made: dict[str, Any]) -> None:
    runs = made["root"] / "runs" / "fewshot-roberta" / "v1"
    for row, dataset in (("prompt_distiller", "mnli"), ("kd_ft", "mnli"), ("teacher_ft", "sst2")):
        folder = runs / made["records"][row, dataset].run_id / "student"
        kind: Any = AutoModelForMaskedLM if row == "prompt_distiller" else AutoModelForSequenceClassification
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert model.config.num_labels == (3 if dataset == "mnli" else 2)


def test_reference_rows_take_no_step_and_trained_rows_the_same(made: dict[str, Any]) -> None:
    for (row, _), one in made["records"].items():
        assert one.budget["optimizer_steps"] == (0 if "shot" in row or row.startswith("teacher") else 4)


def test_without_both_is_prompt_kd(made: dict[str, Any]) -> None:
    for dataset in ("sst2", "mnli"):
        ids = [made["records"][row, dataset].run_id for row in ("without_both", "prompt_kd")]
        runs = made["root"] / "runs" / "fewshot-roberta" / "v1"
        one, other = (
            AutoModelForMaskedLM.from_pretrained(runs / run / "student").state_dict() for run in ids
        )
        assert all(torch.equal(one[name], value) for name, value in other.items())


def test_probe_accuracies_are_scores_of_the_record(made: dict[str, Any]) -> None:
    scores = made["records"]["prompt_distiller", "mnli"].scores
    layers = {"teacher": 3, "pretrained": 3, "student": 1}
    for bank, count in layers.items():
        found = [name for name in scores if name.startswith(f"method/probe_accuracy/{bank}/")]
        assert len(found) == count


# ---------------------------------------------------------------------------------- what the tiny board shows
def averages(paths: list[Path]) -> dict[str, float]:
    """Mean accuracy of each row over data sets and draws, in %; every row has all of them."""
    board = load_board("tiny-fewshot/v1")
    found: dict[str, list[float]] = {}
    for one in map(record.load, paths):
        found.setdefault(one.row, []).append(one.value(f"few_shot/accuracy/{one.axes['dataset']}") or 0.0)
    assert {len(values) for values in found.values()} == {len(board.seeds) * len(board.axis_values())}
    return {row: sum(values) / len(values) for row, values in found.items()}


def in_order(mean: dict[str, float]) -> None:
    """Directions with slack; no gain of contrast and no order of the baselines is claimed."""
    assert mean["teacher_pt"] > mean["prompt_distiller"] + 2
    assert mean["prompt_distiller"] >= mean["student_pt"] + 2
    assert mean["student_pt"] > mean["student_zero_shot"] + 2


def test_published_records_are_in_order() -> None:
    in_order(averages(sorted((leaderboards_dir() / "tiny-fewshot" / "v1" / "records").glob("*.json"))))


@pytest.mark.slow
def test_five_draws_run_anew_are_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path / "cache"))
    command = ["run", "student_pt", "prompt_distiller", "--board", "tiny-fewshot/v1", "--device", "cpu"]
    assert main([*command, "--runs", str(tmp_path / "runs")]) == 0
    in_order(averages(sorted(tmp_path.glob("runs/tiny-fewshot/v1/*/record.json"))))
