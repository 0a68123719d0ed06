"""The boards of prompt transfer on real data: settings are the paper's, rows share all but what they compare,
and the path from folders in the hub's format, or from plain text, to a table works with tiny models.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_transfer_task import BERT, REAL, TABLE, fill
from transformers import BertConfig, BertModel

from kdbench import commands, record
from kdbench.cli import main
from kdbench.config import Board, RunConfig, load_board, resolve, tuning_runs
from kdbench.paths import configs_dir, leaderboards_dir
from kdbench.registry import load_distiller, load_task
from kdbench.stages import Places
from kdbench.tasks.transfer import SOURCES, TARGETS

PAPER: dict[str, Any] = tomllib.loads((configs_dir() / "papers" / "panda.toml").read_text())
BOARDS = ("transfer-bert/v1", "transfer-scratch/v1")
MODELS = ("large", "base", "medium", "small", "tiny")
PAIRS = ["pot", "panda", "panda_code"]  # a run for each pair of source and target
FUSED = ["pot_early", "pot_early_uniform", "panda_early", "panda_late", "panda_late_1"]
ROWS = ["full_tune", "pt", *PAIRS, *FUSED]


def resolved(board: Board, size: str, row: str, **axes: str) -> RunConfig:
    """A run of a row at its first axis values, or at these."""
    found = board.row(row)
    assert found is not None
    return resolve(
        board,
        size,
        row,
        1,
        axes={**board.row_axis_values(row, size)[0], **axes},
        settings_class=load_distiller(found.method).Config,
        task_settings_class=load_task(board.task).Settings,
    )


# ------------------------------------------------------------------------------------------ what is said
@pytest.mark.parametrize("name", BOARDS)
def test_rows_share_all_but_what_they_compare(name: str) -> None:
    board = load_board(name)
    assert [row.name for row in board.rows] == ROWS
    for size in board.sizes:
        target = board.row_axis_values("full_tune", size)[0]["target"]
        shared = set()
        for row in ROWS:
            run = resolved(board, size, row, target=str(target))
            told = [run.select, run.task_settings, run.roles["student"], run.evaluation]
            training = dataclasses.replace(run.training, lr=1.0)  # full tuning moves other weights
            shared.add(json.dumps([str(one) for one in (*told, training)]))
        assert len(shared) == 1, size
        rates = {resolved(board, size, row).training.lr for row in ROWS if row != "full_tune"}
        assert len(rates) == 1 + (size == "large-cb"), "only the released script has a rate for each method"


@pytest.mark.parametrize("name", BOARDS)
def test_pairs_of_all_sources_and_targets(name: str) -> None:
    board = load_board(name)
    for size, spec in board.sizes.items():
        axes = {**board.axes, **spec.axes}
        pairs = [{"source": s, "target": t} for s in axes["source"] for t in axes["target"]]
        assert all(board.row_axis_values(row, size) == pairs for row in PAIRS)
        of_target = [{"target": one} for one in axes["target"]]
        assert all(board.row_axis_values(row, size) == of_target for row in ("full_tune", *FUSED))
        prompts = {str(one["target"]) for one in board.row_axis_values("pt", size)}
        assert prompts == {*axes["source"], *axes["target"]}, "every source has a prompt to hand on"


@pytest.mark.parametrize("name", BOARDS)
def test_rates_are_tried_alike_on_a_seed_of_their_own(name: str) -> None:
    board = load_board(name)
    assert board.tuning is not None
    assert board.tuning.seed not in board.seeds
    assert len(board.seeds) >= 3
    for row in ROWS:
        tried = tuning_runs(board, row)
        assert len(tried) == len(board.tuning.factors)
    for axis, values in board.tuning.axes.items():
        assert set(values) <= set(board.axes[axis])


def test_the_paper_board_has_the_papers_settings() -> None:
    board = load_board("transfer-bert/v1")
    told, of_all = PAPER["optimizer"], PAPER["board"]
    assert board.axes["target"] == list(TARGETS) == PAPER["data"]["targets"]
    assert board.axes["source"] == list(SOURCES) == [*TARGETS, *PAPER["data"]["sources_only"]]
    assert len(board.row_axis_values("pot")) == 189
    for size in (*MODELS, "large-cb"):
        script = size == "large-cb"
        for row in ("pt", "pot", "panda", "panda_code"):
            run = resolved(board, size, row)
            training = run.training
            recipe = PAPER["cb"] if script else of_all
            assert training.optimizer_steps == recipe["steps"]
            assert (training.batch_size, run.select.every) == (recipe["batch_size"], recipe["eval_every"])
            for key in ("weight_decay", "schedule", "warmup_steps", "eps", "grad_clip"):
                assert getattr(training, key) == told[key], key
            assert ([*training.betas], training.student_dropout) == (told["betas"], True)
            rate = PAPER["cb"]["lr"][row.removesuffix("_code")] if script else max(of_all["lr"])
            assert training.lr == rate
            assert run.roles["student"].model == PAPER["models"][size.removesuffix("-cb")]
            assert run.task_settings["selection"] == (PAPER["data"]["selection"] if script else "train")
            for key in ("prompt", "prompt_length", "prompt_init_std", "reparameterize"):
                assert run.settings[key] == PAPER["prompt"][key], key
    assert board.tuning is not None
    lr = resolved(board, board.tuning.size, "panda").training.lr
    assert [lr * one for one in board.tuning.factors] == pytest.approx(of_all["lr"])


@pytest.mark.parametrize("name", BOARDS)
@pytest.mark.parametrize("row", ["panda", "panda_code"])
def test_the_two_readings_of_panda(name: str, row: str) -> None:
    board = load_board(name)
    for size in board.sizes:
        settings = resolved(board, size, row).settings
        for key, value in PAPER[row].items():
            assert settings[key] == value, key


def test_steps_are_the_epochs_of_the_scripts() -> None:
    rows, told = PAPER["data"]["train_records"], PAPER["p_tuning_v2"]
    script, of_all = PAPER["cb"], PAPER["board"]
    assert script["eval_every"] == -(-rows["cb"] // script["batch_size"])
    assert script["steps"] == script["epochs"] * script["eval_every"]
    batch_size, _, _, epochs = told["rte"]
    assert of_all["batch_size"] == batch_size
    assert of_all["eval_every"] == -(-rows["rte"] // batch_size)
    assert of_all["steps"] == epochs * of_all["eval_every"]


def test_printed_metrics_are_the_papers() -> None:
    assert {name: TABLE[name][1] for name in TARGETS} == PAPER["metrics"]
    assert {TABLE[name][4] for name in TARGETS} == {PAPER["data"]["max_length"]}
    assert TABLE["squad"][4] == PAPER["data"]["max_length_squad"]


# ------------------------------------------------------------------------------------- published numbers
def test_published_averages_are_recomputed() -> None:
    for row, printed in PAPER["averages"].items():
        for model in MODELS:
            scores = PAPER["without_transfer"][row][model]
            assert len(scores) == len(PAPER["without_transfer"]["columns"]) == 9
            assert sum(scores) / 9 == pytest.approx(printed[model], abs=0.051), (row, model)
    for row, means in PAPER["mean_over_pairs"].items():
        for model in MODELS:  # the means were rounded before
            found = sum(PAPER["mean_over_sources"][row][model]) / 9
            assert found == pytest.approx(means[model], abs=0.05), (row, model)


def test_published_gains_follow_from_the_averages() -> None:
    gains, pairs, alone = PAPER["gains"], PAPER["mean_over_pairs"], PAPER["averages"]["pt"]
    for model in MODELS:
        pot, panda = pairs["pot"][model], pairs["panda"][model]
        assert gains["panda_over_pot"][model] == pytest.approx(panda - pot, abs=0.015)
        assert gains["panda_over_pt"][model] == pytest.approx(panda - alone[model], abs=0.101)
        assert gains["pot_over_pt"][model] == pytest.approx(pot - alone[model], abs=0.101)
    assert sum(gains["panda_over_pot"].values()) / 5 == pytest.approx(gains["headline"], abs=0.05)


def test_prompts_have_the_parameters_that_are_said() -> None:
    told = PAPER["prompt"]
    for model in MODELS:
        layers, width = told["shape"][model]
        assert told["trained"][model] == told["prompt_length"] * 2 * layers * width


# ------------------------------------------------------------------- transfer-bert's path, with a tiny model
HUB = """
[sizes.hub]
axes = {{ source = {sources}, target = {targets} }}
task_settings = {{ source = "local", max_length = 40 }}
select = {{ rule = "best", score = "score", every = 1 }}

[sizes.hub.roles.student]
model = "{root}/hub/student"
seed = 0

[sizes.hub.training]
optimizer_steps = 2
batch_size = 8
lr = 1e-2
weight_decay = 0.0
schedule = "linear"
student_dropout = true
checkpoint_every = 2

[sizes.hub.evaluation]
generation_seeds = [0]
batch_size = 16
"""


def with_size(name: str, root: Path, text: str) -> Path:
    """A copy of a board with one more size."""
    board = (leaderboards_dir() / name / "board.toml").read_text()
    at = board.index("[[rows]]")
    path = root / "board.toml"
    path.write_text(board[:at] + text + "\n" + board[at:])
    return path


def tiny_bert(folder: Path) -> Path:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(BERT), num_hidden_layers=2, max_position_embeddings=64, **shape)
    BertModel(config).save_pretrained(folder)
    BERT.save_pretrained(folder)
    return folder


def hub_board(root: Path, sources: list[str], targets: list[str]) -> Path:
    tiny_bert(root / "hub" / "student")
    told = {"sources": json.dumps(sources), "targets": json.dumps(targets), "root": root}
    return with_size("transfer-bert/v1", root, HUB.format(**told))


def run(root: Path, board: Path, size: str) -> None:
    """All rows of a size, seed 1, one after the other in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDBENCH_CACHE", str(root / "cache"))
        loaded, places = load_board(str(board)), Places(root / "runs", root / "cache", root / "data")
        plans = commands.plans(loaded, size, commands.rows_of(loaded, []), [1], [], "cpu", places)
        for plan in plans:
            assert (plan.execute().status, plan.run.row) == ("done", plan.run.row)


Made = dict[tuple[str, str, str], record.RunRecord]  # by row, source ("" where the row has none) and target


def records(root: Path, board: str) -> Made:
    found = [record.load(path) for path in (root / "runs" / board).glob("*/record.json")]
    return {(one.row, str(one.axes.get("source", "")), str(one.axes["target"])): one for one in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All rows of transfer-bert on sources and targets of four formats; records by row, source and target."""
    root = tmp_path_factory.mktemp("transfer-bert")
    for name in ("squad", "stsb", "conll04", "copa"):
        fill(root / "data", name, 40, 12)
    board = hub_board(root, ["squad", "stsb", "conll04"], ["conll04", "copa"])
    run(root, board, "hub")
    return {"root": root, "board": board, "records": records(root, "transfer-bert/v1")}


def test_every_row_is_done_on_every_pair(made: dict[str, Any]) -> None:
    found: Made = made["records"]
    sources, targets = ("squad", "stsb", "conll04"), ("conll04", "copa")
    assert set(found) == {
        *((row, source, target) for row in PAIRS for source in sources for target in targets),
        *((row, "", target) for row in ("full_tune", *FUSED) for target in targets),
        *(("pt", "", name) for name in (*sources, "copa")),
    }
    for (row, _, target), one in found.items():
        assert (one.status, one.budget["optimizer_steps"]) == ("done", 2), row
        value = one.value(f"transfer/score/{target}")
        assert value is not None
        assert value == one.value("transfer/score") == one.value(f"transfer/{TABLE[target][1]}")
        assert -100 <= value <= 100


def test_a_pair_is_compared_by_every_metric(made: dict[str, Any]) -> None:
    found: Made = made["records"]
    for name in ("semantic", "e_avg", "e_concat", "e_pairwise", "on", "chosen"):
        for source in ("squad", "stsb"):
            value = found["panda", source, "copa"].value(f"method/{name}")
            assert value is not None
            assert -1 <= value < 1, (name, source)
        if name != "e_pairwise":  # the mean over all pairs of tokens, of which few are a token with itself
            own = found["panda", "conll04", "conll04"].value(f"method/{name}")
            assert own == pytest.approx(1.0, abs=1e-5)


def test_only_prompt_and_head_are_trained_and_kept(made: dict[str, Any]) -> None:
    found: Made = made["records"]
    prompt = 20 * 2 * 2 * 16
    assert found["panda", "squad", "copa"].value("method/trained_parameters") == prompt + 16 + 1
    assert found["pt", "", "conll04"].value("method/trained_parameters") == prompt + 9 * 16 + 9
    folder = made["root"] / "runs" / "transfer-bert" / "v1" / found["pot", "squad", "copa"].run_id / "student"
    kept = {name for name in load_file(folder / "prompted.safetensors") if not name.startswith("signature.")}
    assert {name.split(".")[0] for name in kept} == {"prompt", "head"}


def test_fusions_leave_their_target_out(made: dict[str, Any]) -> None:
    found: Made = made["records"]
    for row, names in (("panda_late", 2), ("panda_late_1", 1)):
        assert found[row, "", "conll04"].value("method/sources") == names  # of squad and stsb
    assert found["panda_late", "", "copa"].value("method/sources") == 3
    shares = [found["pot_early_uniform", "", "copa"].value(f"method/weight_{i}") for i in range(3)]
    assert shares == pytest.approx([1 / 3] * 3)


def test_the_table_prints(made: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["report", str(made["board"]), "--size", "hub", "--runs", str(made["root"] / "runs")]
    assert main(command) == 0
    told = capsys.readouterr().out
    for row in load_board("transfer-bert/v1").rows:
        assert row.title in told
    assert "CoNLL04 - PT" in told
    assert "above PoT" in told


def test_sets_that_are_not_there_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cb", "sst2"):
        fill(tmp_path / "data", name, 40, 12)
    board = load_board(str(hub_board(tmp_path, ["cb", "sst2", "conll05"], ["cb", "wic"])))
    places = Places(tmp_path / "runs", tmp_path / "cache", tmp_path / "data")
    found = commands.plans(board, "hub", ["pt", "pot", "panda_late"], [1], [], "cpu", places)
    told = [(one.run.row, *one.run.axes.values()) for one in found]
    assert sorted(told) == [
        ("pot", "cb", "cb"),
        ("pot", "sst2", "cb"),
        ("pt", "cb"),
        ("pt", "sst2"),
    ]
    said = capsys.readouterr().err
    assert "left out" in said
    assert "tokens/conll05/train.jsonl" in said
    assert "classify/wic/train.jsonl" in said


def test_the_papers_board_on_the_sets_at_hand(
    tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_hand = [name for name in SOURCES if name in REAL]
    board = load_board(str(hub_board(tmp_path, list(SOURCES), list(TARGETS))))
    places = Places(tmp_path / "runs", tmp_path / "cache", data_root)
    found = commands.plans(board, "hub", ["pt"], [1], [], "cpu", places)
    assert {str(one.run.axes["target"]) for one in found} == {*at_hand}
    assert capsys.readouterr().err.count("left out") == len(SOURCES) - len(at_hand)


# -------------------------------------------------------------- transfer-scratch's path, from text to a table
BRIEF = """
[sizes.brief]
axes = {{ source = ["sst2"], target = ["cb"] }}
task_settings = {{ max_length = 40 }}
select = {{ rule = "best", score = "score", every = 1 }}

[sizes.brief.roles.student]
model = "{root}/model.toml"
seed = 0

[[sizes.brief.roles.student.stages]]
name = "pretrain"
method = "mlm_pooler"
task = "text"
task_settings = {{ corpora = ["{root}/words.txt"], classify = ["sst2"], sentences = true, max_length = 24 }}
training = {{ optimizer_steps = 3, batch_size = 8, lr = 1e-3 }}

[sizes.brief.training]
optimizer_steps = 2
batch_size = 8
lr = 1e-2
checkpoint_every = 2

[sizes.brief.evaluation]
generation_seeds = [0]
batch_size = 16
"""


def test_an_encoder_from_text_carries_all_rows(tmp_path: Path) -> None:
    for name in ("sst2", "cb"):
        fill(tmp_path / "data", name, 40, 12)
    (tmp_path / "words.txt").write_text("the cat sat on the mat\nit rained near a mill\n" * 40)
    model = (configs_dir() / "models" / "transfer-scratch" / "debug-encoder.toml").read_text()
    (tmp_path / "model.toml").write_text(model.replace("train:bert:4000", "train:bert:300"))
    board = with_size("transfer-scratch/v1", tmp_path, BRIEF.format(root=tmp_path))
    run(tmp_path, board, "brief")
    found = records(tmp_path, "transfer-scratch/v1")
    assert {(row, source) for row, source, _ in found} == {
        *((row, "sst2") for row in PAIRS),
        *((row, "") for row in ("full_tune", "pt", *FUSED)),
    }
    assert all(one.status == "done" for one in found.values())
    stages = list((tmp_path / "cache" / "stages").glob("*/stage.json"))
    assert [json.loads(path.read_text())["stage"] for path in stages] == ["pretrain"], "once for all rows"
    key = json.loads(stages[0].read_text())["key"]
    for (row, _, _), one in found.items():
        if row != "full_tune":
            folder = tmp_path / "runs" / "transfer-scratch" / "v1" / one.run_id / "student"
            assert json.loads((folder / "prompted.json").read_text())["encoder"] == key


def test_the_scratch_board_reads_whole_local_sets(data_root: Path) -> None:
    board = load_board("transfer-scratch/v1")
    small = {name for name, (train, _) in REAL.items() if train < 100}
    assert set(board.axes["source"]) == set(REAL) - small
    assert set(board.axes["target"]) == {*TARGETS} & set(REAL) - small
    text = load_task("text")
    for size in board.sizes:
        stage = resolved(board, size, "pt").roles["student"].stages[0]
        assert stage.task == "text"
        text(text.Settings(**stage.task_settings), data_root)  # all of its files are there
        task = load_task(board.task)
        for one in board.row_axis_values("pt", size):
            run = resolved(board, size, "pt", target=str(one["target"]))
            made = task(task.Settings(**run.task_settings), data_root)
            limit = run.task_settings["train_limit"]
            assert len(made.rows("train")) >= min(limit or 200, 200)
