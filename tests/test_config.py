"""Strict TOML, boards, models, and how a run is resolved and named."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from kdbench import config, registry
from kdbench.config import Board, RunConfig, load_board, resolve, run_id
from kdbench.errors import UserError, unknown
from kdbench.strict import changed, from_dict, read_toml, to_dict

BOARD = """
name = "toy"
version = "v1"
question = "which?"
task = "toy_task"
seeds = [1, 2, 3]
analyses = ["toy_analysis"]

[roles.teacher]
model = "tiny/teacher"
seed = 0
stages = [{ name = "sft", training = { optimizer_steps = 100, lr = 1e-3 } }]

[roles.student]
model = "tiny/student"
stages = [{ name = "init", training = { optimizer_steps = 10 } }]

[sizes.full]
training = { optimizer_steps = 40, batch_size = 16, lr = 1e-3 }

[sizes.full.evaluation]
decode = { max_new_tokens = 80 }

[sizes.full.evidence]
prompts = 8

[sizes.debug]
training = { optimizer_steps = 4, batch_size = 2, lr = 1e-2 }
task_settings = { records = 3 }
roles.student.model = "tiny/student"
rows.alpha = { settings = { length = 2 }, training = { lr = 0.5 } }

[[rows]]
name = "teacher"
method = "alpha"
reference = true
roles = { student = "teacher" }

[[rows]]
name = "alpha"
method = "alpha"
title = "Alpha"
settings = { length = 7 }

[[rows]]
name = "beta"
method = "beta"
training = { lr = 2e-3, weight_decay = 0 }

[[columns]]
score = "toy_analysis/good"
title = "good"
direction = "higher"
rank = true
"""


@dataclass
class AlphaConfig:
    length: int = 5
    rate: float = 0.5
    init: Literal["text", "pad"] = "text"


@dataclass
class TaskSettings:
    records: int = 10
    names: list[str] = field(default_factory=list)


@pytest.fixture(autouse=True)
def toy_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Methods alpha and beta, one task, one analysis: these tests name no real one."""
    root = tmp_path / "registry"
    found = {"distillers": ["alpha", "beta", "gamma"], "tasks": ["toy_task"], "analyses": ["toy_analysis"]}
    for kind, names in found.items():
        (root / kind).mkdir(parents=True)
        for name in names:
            (root / kind / f"{name}.py").write_text("")
    monkeypatch.setattr(registry, "folder", lambda kind: root / kind)


def board_of(tmp_path: Path, text: str = BOARD) -> Board:
    path = tmp_path / "board.toml"
    path.write_text(text)
    return load_board(str(path))


def said(tmp_path: Path, *changes: tuple[str, str], add: str = "") -> str:
    """The error for the toy board with some text replaced and some added at the top."""
    text = BOARD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    with pytest.raises(UserError) as caught:
        board_of(tmp_path, add + text)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path), "DIR")


def run_of(
    board: Board, row: str = "alpha", *overrides: str, size: str = "full", seed: int = 1, **more: Any
) -> RunConfig:
    return resolve(board, size, row, seed, overrides, **more)


# -------------------------------------------------------------------------------------- strict reading


@dataclass
class Inner:
    x: float
    y: int = 1


@dataclass
class Outer:
    inner: Inner
    table: dict[str, Inner] = field(default_factory=dict)
    rows: list[Inner] = field(default_factory=list)
    pair: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    maybe: float | None = 1.0
    text: str | None = None
    sets: list[str] | Literal["all"] = "all"
    scalar: str | int | float | bool = 0
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    free: dict[str, Any] = field(default_factory=dict)
    hidden: int = field(default=0, metadata={"toml": False})


def test_reads_every_kind_of_field() -> None:
    read = from_dict(
        Outer,
        {
            "inner": {"x": 1},
            "table": {"one": {"x": 2.5, "y": 3}},
            "rows": [{"x": 0}, {"x": 1, "y": 2}],
            "pair": [1, 2.5],
            "names": ["a", "b"],
            "maybe": "none",
            "text": "none",
            "sets": ["p"],
            "scalar": 3,
            "kind": "b",
            "flag": True,
            "free": {"any": [1, {"thing": None}]},
        },
        "file.toml",
    )
    assert read == Outer(
        Inner(1.0),
        {"one": Inner(2.5, 3)},
        [Inner(0.0), Inner(1.0, 2)],
        (1.0, 2.5),
        ("a", "b"),
        None,
        "none",
        ["p"],
        3,
        "b",
        True,
        {"any": [1, {"thing": None}]},
    )
    assert type(read.inner.x) is float
    assert type(read.scalar) is int
    assert from_dict(Outer, json.loads(json.dumps(to_dict(read))), "again") == read


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {"x": 1}, "hiden": 1}, "f.toml: no setting 'hiden'. Known: inner, table, rows, pair"),
        ({"inner": {"x": 1}, "hidden": 1}, "f.toml: no setting 'hidden'"),
        ({"inner": {"x": 1}, "nams": []}, "f.toml: no setting 'nams'. Did you mean 'names'? Known: inner, "),
        ({"inner": {"x": 1, "z": 1}}, "f.toml: inner: no setting 'z'. Known: x, y."),
        ({}, "f.toml: inner is missing; expected a table"),
        ({"inner": {}}, "f.toml: inner.x is missing; expected a number"),
        ({"inner": 3}, "f.toml: inner: expected a table, given 3 (a whole number)"),
        ({"inner": {"x": "1"}}, 'f.toml: inner.x: expected a number, given "1" (text)'),
        ({"inner": {"x": True}}, "f.toml: inner.x: expected a number, given true (true or false)"),
        ({"inner": {"x": 1, "y": True}}, "f.toml: inner.y: expected a whole number, given true"),
        ({"inner": {"x": 1, "y": 1.0}}, "f.toml: inner.y: expected a whole number, given 1.0 (a number)"),
        ({"inner": {"x": 1}, "flag": 1}, "f.toml: flag: expected true or false, given 1 (a whole number)"),
        (
            {"inner": {"x": 1}, "rows": [{"x": 1}, {"x": []}]},
            "f.toml: rows[1].x: expected a number, given []",
        ),
        ({"inner": {"x": 1}, "rows": {}}, "f.toml: rows: expected a list, each a table, given a table"),
        ({"inner": {"x": 1}, "table": {"k": 1}}, "f.toml: table.k: expected a table, given 1"),
        ({"inner": {"x": 1}, "table": []}, "f.toml: table: expected a table, given []"),
        (
            {"inner": {"x": 1}, "pair": [1]},
            "f.toml: pair: expected a list of 2: a number, a number, given [1]",
        ),
        ({"inner": {"x": 1}, "pair": [1, "a"]}, 'f.toml: pair[1]: expected a number, given "a"'),
        ({"inner": {"x": 1}, "maybe": "x"}, 'f.toml: maybe: expected a number, given "x"'),
        ({"inner": {"x": 1}, "sets": "al"}, "f.toml: sets: expected a list, each text or one of all, given"),
        ({"inner": {"x": 1}, "kind": "c"}, "f.toml: kind: no choice 'c'. Known: a, b."),
        ({"inner": {"x": 1}, "kind": 1}, "f.toml: kind: expected one of a, b, given 1"),
        ([], "f.toml: expected a table, given []"),
    ],
)
def test_refuses_with_place_expected_and_given(data: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(Outer, data, "f.toml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_nearest_setting_as_the_user_sees_it() -> None:
    @dataclass
    class Config:
        prompt_length: int = 7
        max_new_tokens: int = 80

    with pytest.raises(UserError) as caught:
        from_dict(Config, {"promt_length": 5}, "method")
    assert str(caught.value) == (
        "method: no setting 'promt_length'. Did you mean 'prompt_length'? "
        "Known: prompt_length, max_new_tokens."
    )
    assert str(unknown("task", "x", [])) == "no task 'x'. There are none."


def test_values_out_of_range_are_user_errors() -> None:
    @dataclass
    class Beta:
        beta: float

        def __post_init__(self) -> None:
            if not 0 < self.beta < 1:
                raise ValueError("beta = 0 is forward KL: name it")

    with pytest.raises(UserError, match="gkd: beta = 0 is forward KL: name it"):
        from_dict(Beta, {"beta": 0}, "gkd")


def test_changed_reads_only_what_changes() -> None:
    base = config.TrainingConfig(optimizer_steps=3, batch_size=2, lr=1.0)
    assert changed(base, {}, "x") is base
    assert changed(base, {"lr": 2, "grad_clip": "none"}, "x") == dataclasses.replace(
        base, lr=2.0, grad_clip=None
    )
    with pytest.raises(UserError, match="row: no setting 'rl'"):
        changed(base, {"rl": 2}, "row")


def test_toml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no.toml: cannot be read: No such file"):
        read_toml(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = \n")
    with pytest.raises(UserError, match=r"bad.toml: is not TOML: Invalid value \(at line 1"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(UserError, match=r"bytes.toml: is not TOML"):
        read_toml(tmp_path / "bytes.toml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_steps": -1}, "optimizer_steps = -1"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"micro_batch": 0}, "micro_batch = 0"),
        ({"rollout_batch": -2}, "rollout_batch = -2"),
        ({"lr": 0}, "lr = 0.0"),
        ({"grad_clip": 0}, "grad_clip = 0.0"),
        ({"betas": [0.9, 1]}, "betas = [0.9, 1.0]"),
        ({"min_lr_ratio": 2}, "min_lr_ratio = 2.0"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
        ({"log_every": 0}, "log_every = 0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"position_offset": -1}, "position_offset = -1"),
        ({"precision": "fp16"}, "precision: no choice 'fp16'. Did you mean 'bf16'? Known: fp32, bf16."),
        ({"schedule": "cosin"}, "schedule: no choice 'cosin'. Did you mean 'cosine'?"),
    ],
)
def test_training_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    data = {"optimizer_steps": 1, "batch_size": 1, "lr": 1.0, **changes}
    with pytest.raises(UserError) as caught:
        from_dict(config.TrainingConfig, data, "t")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "data"),
    [
        (config.DecodeConfig, {"max_new_tokens": 0}),
        (config.DecodeConfig, {"top_p": 1.5}),
        (config.DecodeConfig, {"temperature": -1}),
        (config.EvaluationConfig, {"generation_seeds": []}),
        (config.EvaluationConfig, {"generation_seeds": [1, 1]}),
        (config.EvaluationConfig, {"limit": 0}),
        (config.EvidenceConfig, {"prompts": 0}),
        (config.EvidenceConfig, {"snapshots": -1}),
        (config.Select, {"rule": "best"}),
        (config.Tuning, {"seed": 1, "factors": [], "score": "rouge_l"}),
        (config.Tuning, {"seed": 1, "factors": [1, 1], "score": "rouge_l"}),
        (config.Tuning, {"seed": 1, "factors": [-1], "score": "rouge_l"}),
        (config.Column, {"score": "a", "title": "b", "rank": True}),
        (config.Role, {}),
        (config.Role, {"model": "a", "like": "b"}),
        (config.Role, {"like": "b", "tokenizer": "task"}),
    ],
)
def test_other_values_out_of_range(cls: type, data: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="^here: "):
        from_dict(cls, data, "here")


# ---------------------------------------------------------------------------------------------- boards


def test_the_published_boards_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real registry
    names = config.boards()
    assert "tiny-instruct/v1" in names
    for name in names:
        board = load_board(name)
        assert board.id == name
        linked = any(role.row for role in board.roles.values())  # there PT and full tuning are trained rows
        assert linked or any(row.reference for row in board.rows), (
            "every board shows its teacher and its student init"
        )


@pytest.mark.parametrize("name", config.boards())
def test_every_row_of_the_published_boards_resolves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real registry
    board = load_board(name)
    for size in board.sizes:
        for row in board.rows:
            settings = registry.load_distiller(row.method).Config
            task = registry.load_task(board.task).Settings
            for axes in board.row_axis_values(row.name):
                run = resolve(
                    board, size, row.name, 1, axes=axes, settings_class=settings, task_settings_class=task
                )
                assert run.row == row.name
                assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict())), "again") == run


def test_the_newest_version_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "leaderboards_dir", lambda: tmp_path / "boards")
    for version in ("v2", "v10", "v1"):
        folder = tmp_path / "boards" / "toy" / version
        folder.mkdir(parents=True)
        (folder / "board.toml").write_text(BOARD.replace('"v1"', f'"{version}"'))
    assert config.boards() == ["toy/v1", "toy/v2", "toy/v10"]
    assert load_board("toy").version == "v10"
    assert load_board("toy/v2").version == "v2"
    assert load_board(str(tmp_path / "boards" / "toy" / "v1")).version == "v1"
    with pytest.raises(
        UserError, match=r"no board 'toy/v3'. Did you mean '.*'\? Known: toy/v1, toy/v2, toy/v10"
    ):
        load_board("toy/v3")
    with pytest.raises(UserError, match="no board 'nothing'"):
        load_board("nothing")
    (tmp_path / "boards" / "toy" / "v1" / "board.toml").write_text(BOARD.replace('"toy"', '"other"'))
    with pytest.raises(UserError, match=r"calls itself other/v1, which is not its folder"):
        load_board("toy/v1")
    with pytest.raises(UserError, match="cannot be read"):
        load_board(str(tmp_path / "missing.toml"))


def test_what_a_board_file_can_say_wrongly(tmp_path: Path) -> None:
    assert "no setting 'sedes'. Did you mean 'seeds'?" in said(tmp_path, ("seeds", "sedes"))
    assert "seeds[0]: expected a whole number" in said(tmp_path, ("[1, 2, 3]", '["1"]'))
    assert "DIR/board.toml" in said(tmp_path, ("seeds = [1, 2, 3]", "seeds = [")).replace("//", "/")
    assert "columns is missing" in said(tmp_path, (BOARD[BOARD.index("[[columns]]") :], ""))
    assert "row 'alpha' is there twice" in said(tmp_path, ('name = "beta"', 'name = "alpha"'))
    assert "seed '2' is there twice" in said(tmp_path, ("[1, 2, 3]", "[1, 2, 2]"))
    assert "at least one of each" in said(tmp_path, ("[1, 2, 3]", "[]"))
    assert "sizes.debug.rows: no row 'alhpa'. Did you mean 'alpha'?" in said(
        tmp_path, ("rows.alpha", "rows.alhpa")
    )
    assert "rows.alpha.training: no setting 'rl'" in said(tmp_path, ("{ lr = 0.5 }", "{ rl = 0.5 }"))
    assert "row 'beta': training: no setting 'weight_decoy'" in said(
        tmp_path, ("weight_decay", "weight_decoy")
    )
    role = said(tmp_path, ('{ student = "teacher" }', '{ student = "teachr" }'))
    assert (
        "row 'teacher': roles.student: no role 'teachr'. Did you mean 'teacher'? Known: teacher, student."
        in role
    )
    assert "exactly one of model" in said(tmp_path, ('model = "tiny/teacher"', ""))
    assert "no setting 'modle'. Did you mean 'model'?" in said(tmp_path, ('model = "tiny', 'modle = "tiny'))


def test_equal_budgets_are_enforced(tmp_path: Path) -> None:
    for key in ("optimizer_steps", "batch_size"):
        message = said(tmp_path, ("weight_decay = 0", f"{key} = 3"))
        assert f"row 'beta': {key} cannot differ between rows" in message
        assert "budgets = 'differ'" in message
    assert "sizes.debug.rows.alpha: batch_size" in said(tmp_path, ("{ lr = 0.5 }", "{ batch_size = 1 }"))
    differ = board_of(
        tmp_path, 'budgets = "differ"' + BOARD.replace("weight_decay = 0", "optimizer_steps = 3")
    )
    assert run_of(differ, "beta").training.optimizer_steps == 3
    assert run_of(differ, "beta", "training.batch_size=4").row == "beta[training.batch_size=4]"
    with pytest.raises(UserError, match="--set training: optimizer_steps cannot differ"):
        run_of(board_of(tmp_path), "alpha", "training.optimizer_steps=3")
    # what does not change anything is no other budget
    assert run_of(board_of(tmp_path), "alpha", "training.optimizer_steps=40").row == "alpha"


def test_roles_like_other_roles(tmp_path: Path) -> None:
    stages = 'stages = [{ name = "more", training = { lr = 7 } }]'
    extra = f'[roles.helper]\nlike = "teacher"\nseed = 5\n{stages}\n[roles.teacher]'
    board = board_of(tmp_path, BOARD.replace("[roles.teacher]", extra))
    helper = run_of(board).roles["helper"]
    assert [stage.name for stage in helper.stages] == ["sft", "more"]
    assert helper.architecture == run_of(board).roles["teacher"].architecture
    assert helper.like is None
    assert helper.seed == 5
    loop = '[roles.helper]\nlike = "helper"\n[roles.teacher]'
    assert "roles.helper.like: helper is like helper" in said(tmp_path, ("[roles.teacher]", loop))
    far = '[roles.helper]\nlike = "teachers"\n[roles.teacher]'
    assert "no role 'teachers'. Did you mean 'teacher'?" in said(tmp_path, ("[roles.teacher]", far))


def test_axes(tmp_path: Path) -> None:
    axes = 'axes = { draw = [1, 2], source = ["a", "b"] }\n'
    axes += 'task_settings = { draw = "{draw}", name = "from-{source}" }\n'
    board = board_of(tmp_path, axes + BOARD)
    assert len(board.axis_values()) == 4
    run = run_of(board, axes={"draw": 2, "source": "b"})
    assert run.task_settings == {"draw": 2, "name": "from-b"}
    assert run.axes == {"draw": 2, "source": "b"}
    assert board_of(tmp_path).axis_values() == [{}]
    with pytest.raises(UserError, match=r"a run of alpha needs a value for each axis \(draw, source\)"):
        run_of(board)
    assert "axes.draw is used nowhere; write '{draw}'" in said(tmp_path, add="axes = { draw = [1] }\n")
    assert "axis 'draw' has no values" in said(tmp_path, add="axes = { draw = [] }\n")
    assert "axis 'draw' has the value 2 twice" in said(tmp_path, add="axes = { draw = [2, 1, 2] }\n")


AXES = 'axes = { data = ["sst2", "mr"], k = [16, 32] }\ntask_settings = { data = "{data}", k = "{k}" }\n'


def test_a_size_has_axis_values_of_its_own(tmp_path: Path) -> None:
    text = AXES + BOARD.replace("[sizes.debug]\n", '[sizes.debug]\naxes = { data = ["tiny"] }\n')
    board = board_of(tmp_path, text)
    assert board.axis_values("debug") == [{"data": "tiny", "k": 16}, {"data": "tiny", "k": 32}]
    assert board.axis_values("full") == board.axis_values()
    assert len(board.axis_values()) == 4
    for axes, message in (
        ('{ dat = ["a"] }', "sizes.debug.axes: no axis 'dat'. Did you mean 'data'? Known: data, k."),
        ("{ data = [] }", "sizes.debug: axis 'data' has no values"),
        ('{ data = ["a", "b", "a"] }', "sizes.debug: axis 'data' has the value a twice"),
    ):
        changes = ("[sizes.debug]\n", f"[sizes.debug]\naxes = {axes}\n")
        assert message in said(tmp_path, changes, add=AXES)


def column_text(**keys: str) -> str:
    return "\n[[columns]]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())


def test_columns_at_axis_values_and_means(tmp_path: Path) -> None:
    text = AXES + BOARD
    text += column_text(score='"a/s"', title='"SST-2"', at='{ k = 16, data = "sst2" }')
    text += column_text(score='"a/s"', title='"MR"', at='{ data = "mr" }')
    text += column_text(title='"average"', mean='["SST-2", "MR"]')
    columns = board_of(tmp_path, text).columns
    assert [column.key for column in columns] == [
        "toy_analysis/good",
        "a/s@data=sst2,k=16",
        "a/s@data=mr",
        "mean:average",
    ]
    assert (columns[3].score, columns[3].mean) == ("", ["SST-2", "MR"])
    at, mean = "{ data = 'sst2' }", '["good", "good"]'
    for keys, message in (
        ({"title": '"x"'}, "column 'x': exactly one of score and mean is needed; neither is given"),
        ({"title": '"x"', "score": '"a/b"', "mean": '["MR"]'}, "score and mean is needed; both are given"),
        ({"title": '"x"', "mean": '["MR"]', "at": at}, "column 'x': at is said by the columns"),
        (
            {"title": '"x"', "score": '"a/b"', "at": "{ dat = 1 }"},
            "column 'x': at: no axis 'dat'. Did you mean",
        ),
        (
            {"title": '"x"', "score": '"a/b"', "at": "{ data = 'sst3' }"},
            "column 'x': at: no value of data 'sst3'. Did you mean 'sst2'? Known: sst2, mr.",
        ),
        ({"title": '"x"', "score": '"a/b"', "at": "{ k = 16.0 }"}, "at: no value of k '16.0'."),
        (
            {"title": '"x"', "score": '"a/b"', "at": "{ k = '16' }"},
            "no value of k '\"16\"'. Did you mean '16'? Known: 16, 32.",
        ),
        ({"title": '"x"', "mean": '["MRR"]'}, "mean: no column with a score 'MRR'. Did you mean 'MR'?"),
        (
            {"title": '"x"', "mean": '["average"]'},
            "no column with a score 'average'. Known: good, SST-2, MR.",
        ),
        ({"title": '"x"', "mean": mean, "direction": '"higher"'}, "mean: 'good' is there twice"),
        ({"title": '"average"', "mean": '["MR"]'}, "column 'average' is there twice"),
        (
            {"title": '"x"', "mean": '["good", "MR"]'},
            "mean: direction is to be that of its columns; here are",
        ),
        (
            {"title": '"x"', "mean": '["MR"]', "unit": '"%"'},
            "mean: unit is to be that of its columns; here are",
        ),
    ):
        with pytest.raises(UserError) as caught:
            board_of(tmp_path, text + column_text(**keys))
        assert message in str(caught.value)


def test_a_size_may_have_the_value_of_a_column(tmp_path: Path) -> None:
    text = AXES + BOARD.replace("[sizes.debug]\n", '[sizes.debug]\naxes = { data = ["tiny"] }\n')
    board = board_of(tmp_path, text + column_text(score='"a/s"', title='"T"', at="{ data = 'tiny' }"))
    assert board.columns[-1].key == "a/s@data=tiny"


TUNING = '[tuning]\nseed = 9\nfactors = [0.5, 1, 2]\nscore = "rouge_l"\n[roles.teacher]'


def test_tuned_rates(tmp_path: Path) -> None:
    text = BOARD.replace("[roles.teacher]", TUNING)
    board = board_of(tmp_path, text)
    assert config.tuning_runs(board, "beta") == [
        ["training.lr=0.001"],
        ["training.lr=0.002"],
        ["training.lr=0.004"],
    ]
    trials = [{"lr": 0.001, "score": 1.0, "run_id": "a"}, {"lr": 0.002, "score": None, "run_id": "b"}]
    full = {"rows": {"beta": {"lr": 0.004, "trials": [*trials, {"lr": 0.004, "score": 2, "run_id": "c"}]}}}
    tuning = tmp_path / "tuning.json"
    tuning.write_text(json.dumps(full))
    board = board_of(tmp_path, text)
    assert run_of(board, "beta").training.lr == 0.004
    assert run_of(board, "beta", size="debug").training.lr == 2e-3, (
        "rates hold for the size they were tuned at"
    )
    assert run_of(board, "beta", "training.lr=0.5").training.lr == 0.5
    assert run_of(board, "alpha").training.lr == 1e-3
    assert config.tuning_runs(board, "beta")[0] == ["training.lr=0.001"], "trials start from the untuned rate"

    tuning.write_text(json.dumps({"rows": {"beta": {"lr": 0.004, "trials": trials}}}))
    with pytest.raises(UserError, match=r"row 'beta' has 2 trials; every row of toy/v1 has as many"):
        board_of(tmp_path, text)
    tuning.write_text(json.dumps({"rows": {"betta": full["rows"]["beta"]}}))
    with pytest.raises(UserError, match="no trained row 'betta'. Did you mean 'beta'"):
        board_of(tmp_path, text)
    tuning.write_text("{")
    with pytest.raises(UserError, match=r"tuning.json: is not JSON"):
        board_of(tmp_path, text)
    tuning.write_text(json.dumps({"rows": {"beta": {"lr": "fast", "trials": []}}}))
    with pytest.raises(UserError, match=r"tuning.json: rows.beta.lr: expected a number"):
        board_of(tmp_path, text)
    tuning.unlink()
    assert "tuning.seed = 2 is a reported seed" in said(
        tmp_path, ("[roles.teacher]", TUNING.replace("9", "2"))
    )
    size = TUNING.replace("seed = 9", 'seed = 9\nsize = "ful"')
    assert "tuning.size: no size 'ful'. Did you mean 'full'?" in said(tmp_path, ("[roles.teacher]", size))
    with pytest.raises(UserError, match="does not tune"):
        config.tuning_runs(board_of(tmp_path), "beta")


# ---------------------------------------------------------------------------------------------- models


def test_model_files_are_put_in_place(tmp_path: Path) -> None:
    spec = config.resolve_model(config.ModelSpec(model="tiny/student"))
    assert spec.model == ""
    assert spec.tokenizer == "task"
    assert spec.architecture is not None
    assert spec.architecture.model_type == "gpt2"
    own = config.resolve_model(config.ModelSpec(model="tiny/student", tokenizer="train:bpe:500"))
    assert own.tokenizer == "train:bpe:500"
    path = tmp_path / "mine.toml"
    path.write_text('model = "gpt2"\nrevision = "main"\n')
    assert config.resolve_model(config.ModelSpec(model=str(path))) == config.ModelSpec(
        "gpt2", revision="main"
    )
    for kept in ("run:abc", "gpt2", "openai-community/gpt2-xl"):
        assert config.resolve_model(config.ModelSpec(model=kept)).model == kept


def test_models_that_are_refused_before_weights_load(tmp_path: Path) -> None:
    def refusal(model: str) -> str:
        with pytest.raises(UserError) as caught:
            config.resolve_model(config.ModelSpec(model=model), "roles.student.model")
        return str(caught.value)

    assert "no model 'tiny/studnet'. Did you mean 'tiny/student'?" in refusal("tiny/studnet")
    assert "there is no folder './here'" in refusal("./here")
    assert "there is no folder '/no/where/at/all'" in refusal("/no/where/at/all")
    assert "there is no folder 'two words'" in refusal("two words")
    assert "cannot be read" in refusal(str(tmp_path / "no.toml"))
    folder = tmp_path / "model"
    folder.mkdir()
    assert "it has no config.json" in refusal(str(folder))
    (folder / "config.json").write_text("{}")
    assert refusal(str(folder)) == f"roles.student.model: {folder} has no weights (model.safetensors)"
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights are not read" in refusal(str(folder))
    (folder / "model.safetensors").write_bytes(b"")
    assert config.resolve_model(config.ModelSpec(model=str(folder))).model == str(folder)
    path = tmp_path / "mine.toml"
    path.write_text('tokenizer = "task"\n')
    assert "needs [architecture]" in refusal(str(path))
    path.write_text('model = "tiny/student"\n')
    assert "is again a model file" in refusal(str(path))
    path.write_text('[architecture]\nmodel_typ = "gpt2"\n')
    assert "architecture: no setting 'model_typ'. Did you mean 'model_type'?" in refusal(str(path))


# ------------------------------------------------------------------------------------------------ runs


def test_a_resolved_run_is_complete(tmp_path: Path) -> None:
    run = run_of(board_of(tmp_path), seed=3)
    assert (run.board, run.size, run.row, run.method, run.title) == (
        "toy/v1",
        "full",
        "alpha",
        "alpha",
        "Alpha",
    )
    assert run.settings == {"length": 7}
    assert run.training.optimizer_steps == 40
    assert run.roles["student"].seed == 3
    assert run.roles["teacher"].seed == 0
    stage = run.roles["teacher"].stages[0]
    assert config.stage_training(stage) == config.TrainingConfig(optimizer_steps=100, batch_size=16, lr=1e-3)
    assert run.roles["teacher"].architecture is not None
    again = RunConfig.from_dict(json.loads(json.dumps(run.to_dict())), "config.json")
    assert again == run
    assert (run.methods, run.tasks) == (["alpha", "sft"], ["toy_task"])


@pytest.fixture(autouse=True)
def sft_is_there(toy_registry: None) -> None:
    (registry.folder("distillers") / "sft.py").write_text("")


def test_what_wins(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    debug = run_of(board, size="debug")
    assert debug.settings == {"length": 2}
    assert debug.training.lr == 0.5
    assert debug.task_settings == {"records": 3}
    assert debug.roles["student"].stages == []
    assert len(debug.roles["teacher"].stages) == 1
    beta = run_of(board, "beta")
    assert (beta.training.lr, beta.training.weight_decay) == (2e-3, 0.0)


def test_reference_rows_take_no_step(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    run = run_of(board, "teacher", "training.lr=5", "alpha.length=9", "method.length=9")
    assert run.training.optimizer_steps == 0
    assert run.reference
    assert run.row == "teacher"
    assert run.roles["student"] == run.roles["teacher"]
    assert run_of(board, "teacher", "evaluation.limit=5").row == "teacher[evaluation.limit=5]"


def test_overrides_make_a_row_of_its_own(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    run = run_of(board, "alpha", "alpha.length=3", "alpha.names=[1, 2]", "alpha.init=pad")
    assert run.settings == {"length": 3, "names": [1, 2], "init": "pad"}
    assert run.row == "alpha[init=pad,length=3,names=[1,2]]"
    assert run.title == "Alpha [init=pad,length=3,names=[1,2]]"
    assert run_of(board, "alpha", "method.length=3").row == "alpha[length=3]"
    assert run_of(board, "alpha", "alpha.length=7").row == "alpha", "nothing differs"
    assert run_of(board, "alpha", "alpha.length=1", "alpha.length=3").row == "alpha[length=3]", (
        "the last one wins"
    )
    assert run_of(board, "beta", "alpha.length=3").row == "beta", "another row's setting"
    assert run_of(board, "alpha", "gamma.x=3").row == "alpha", "another method's setting"
    deep = run_of(board, "alpha", "evaluation.decode.max_new_tokens=9", "training.lr=1", "task.records=4")
    assert deep.row == "alpha[evaluation.decode.max_new_tokens=9,task.records=4,training.lr=1.0]"
    assert deep.evaluation.decode.max_new_tokens == 9
    assert deep.training.lr == 1.0
    assert deep.task_settings == {"records": 4}
    assert run_of(board, "alpha", "training.grad_clip=none").training.grad_clip is None
    assert run_of(board, "alpha", "evidence.samples=2").evidence == config.EvidenceConfig(
        prompts=8, samples=2
    )
    assert run_of(board, "alpha", "select.every=5").select.every == 5


def test_settings_are_checked_and_completed_by_the_owner(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    classes = {"settings_class": AlphaConfig, "task_settings_class": TaskSettings}
    run = run_of(board, "alpha", "alpha.rate=1", "alpha.init=text", **classes)
    assert run.settings == {"length": 7, "rate": 1.0, "init": "text"}
    assert run.task_settings == {"records": 10, "names": []}
    assert run.row == "alpha[rate=1.0]", "a default set again differs in nothing"
    with pytest.raises(UserError, match="alpha: no setting 'lenght'. Did you mean 'length'"):
        run_of(board, "alpha", "alpha.lenght=1", **classes)
    with pytest.raises(UserError, match=r'alpha.length: expected a whole number, given "long" \(text\)'):
        run_of(board, "alpha", "alpha.length=long", **classes)
    with pytest.raises(UserError, match="task toy_task: no setting 'record'. Did you mean 'records'"):
        run_of(board, "alpha", "task.record=1", **classes)
    assert config.check_settings(AlphaConfig, {"rate": 1}, "alpha") == AlphaConfig(rate=1.0)


@pytest.mark.parametrize("text", ["alpha", "alpha.length", "alpha=3", ".length=3", "alpha.=3", "=3", ""])
def test_overrides_that_have_no_form(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"write it as section.key=value"):
        run_of(board_of(tmp_path), "alpha", text)


def test_values_of_overrides() -> None:
    values = {
        "3": 3,
        "0.5": 0.5,
        "1e-3": 1e-3,
        "true": True,
        '"3"': "3",
        "[1, 2]": [1, 2],
        "two words": "two words",
    }
    for text, value in values.items():
        assert config.parse_override(f"a.b={text}") == config.Override("a", "b", value)
    assert config.parse_override("a.b=x=y").value == "x=y"


def test_overrides_that_name_nothing(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    with pytest.raises(UserError, match="--set: no section 'trainig'. Did you mean 'training'"):
        run_of(board, "alpha", "trainig.lr=1")
    with pytest.raises(UserError, match="--set: no section 'gamma'. Known: alpha, beta, method, training"):
        run_of(board, "alpha", "gamma.x=1", among=["alpha", "beta"])
    with pytest.raises(UserError, match="--set training: no setting 'rl'"):
        run_of(board, "alpha", "training.rl=1")
    with pytest.raises(UserError, match="--set training.lr: expected a number"):
        run_of(board, "alpha", "training.lr=fast")
    with pytest.raises(UserError, match="'seed' in 'seed.x' is no table"):
        run_of(board, "alpha", "alpha.seed=1", "alpha.seed.x=1")
    with pytest.raises(UserError, match="size 'debug' of toy/v1 collects no evidence"):
        run_of(board, "alpha", "evidence.samples=2", size="debug")


def test_unknown_names(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    with pytest.raises(UserError, match=r"toy/v1: no size 'ful'. Did you mean 'full'\? Known: full, debug."):
        run_of(board, size="ful")
    with pytest.raises(
        UserError, match=r"no method 'alfa'. Did you mean 'alpha'\? Known: teacher, alpha, beta, gamma"
    ):
        run_of(board, "alfa")
    with pytest.raises(UserError, match="no task 'toy_tusk'. Did you mean 'toy_task'"):
        run_of(board_of(tmp_path, BOARD.replace('"toy_task"', '"toy_tusk"')))
    with pytest.raises(UserError, match="no analysis 'toy_analisis'. Did you mean 'toy_analysis'"):
        run_of(board_of(tmp_path, BOARD.replace('["toy_analysis"]', '["toy_analisis"]')))
    with pytest.raises(UserError, match="no method 'alpa'"):
        run_of(board_of(tmp_path, BOARD.replace('method = "alpha"\ntitle', 'method = "alpa"\ntitle')))
    with pytest.raises(UserError, match="no method 'sftt'"):
        run_of(board_of(tmp_path, BOARD.replace('name = "init"', 'name = "init", method = "sftt"')))
    with pytest.raises(UserError, match=r"roles.teacher.model: no model 'tiny/techer'"):
        run_of(board_of(tmp_path, BOARD.replace("tiny/teacher", "tiny/techer")))


def test_a_method_that_is_no_row_becomes_one(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    assert run_of(board, "gamma").row == "gamma"
    plugin = tmp_path / "my_method.py"
    plugin.write_text("")
    run = run_of(board, str(plugin), "my_method.temperature=2")
    assert run.row == "my_method[temperature=2]"
    assert run.method == str(plugin)
    both = [str(plugin), "alpha"]
    assert run_of(board, "alpha", "my_method.temperature=2", among=both).row == "alpha"
    with pytest.raises(UserError, match=r"no_method.py: there is no such file"):
        run_of(board, str(tmp_path / "no_method.py"))


def test_keep_roles(tmp_path: Path) -> None:
    run = run_of(board_of(tmp_path))
    assert list(config.keep_roles(run, ["student"]).roles) == ["student"]
    with pytest.raises(UserError, match="alpha on toy/v1: no role 'critic'. Known: teacher, student."):
        config.keep_roles(run, ["student", "critic"])


# ---------------------------------------------------------------------------------------------- run id


def test_run_id(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    run = run_of(board)
    versions = {"torch": "1", "transformers": "2"}
    base = run_id(run, "code", versions)
    assert len(base) == 12
    assert run_id(run_of(board), "code", versions) == base
    other = {
        "code": run_id(run, "code2", versions),
        "torch": run_id(run, "code", {**versions, "torch": "2"}),
        "seed": run_id(run_of(board, seed=2), "code", versions),
        "size": run_id(run_of(board, size="debug"), "code", versions),
        "row": run_id(run_of(board, "beta"), "code", versions),
        "setting": run_id(run_of(board, "alpha", "alpha.length=1"), "code", versions),
        "device": run_id(run_of(board, device="cuda"), "code", versions),
        "precision": run_id(run_of(board, "alpha", "training.precision=bf16"), "code", versions),
    }
    assert len({base, *other.values()}) == 1 + len(other)


def test_run_id_ignores_what_moves_no_number(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    run = run_of(board, device="cuda:0")
    same = dataclasses.replace(
        run,
        title="Another",
        analyses=[],
        device="cuda:1",
        training=dataclasses.replace(run.training, checkpoint_every=7, log_every=3),
    )
    assert run_id(same, "code", {}) == run_id(run, "code", {})
    one, two = tmp_path / "one" / "mine.py", tmp_path / "two" / "mine.py"
    for path in (one, two):
        path.parent.mkdir()
        path.write_text("")
    ids = {run_id(run_of(board, str(path)), "code", {}) for path in (one, two)}
    assert len(ids) == 1, "a plug-in enters by its content, not by its folder"


def test_library_versions() -> None:
    found = config.library_versions()
    assert sorted(found) == ["torch", "transformers"]
    assert "+" not in found["torch"]


# ------------------------------------------------------------- what a method that is no row gets of a board
def with_extra(tmp_path: Path, method: str = "beta") -> Board:
    text = BOARD.replace(
        'name = "beta"\nmethod = "beta"\n',
        f'name = "beta"\nmethod = "{method}"\nextra = {{ more = {{ split = "other" }} }}\n',
        1,
    )
    assert "extra" in text
    return board_of(tmp_path, text)


def test_no_axis_is_called_seed(tmp_path: Path) -> None:
    message = said(tmp_path, add='axes = { seed = ["a"] }\n')
    assert "an axis cannot be called seed: {seed} stands for the run's seed" in message


def test_a_method_that_is_no_row_has_the_extra_sets_of_the_board(tmp_path: Path) -> None:
    board = with_extra(tmp_path)
    (tmp_path / "mine.py").write_text("")
    for name in ("gamma", str(tmp_path / "mine.py")):
        extra = run_of(board, name).extra
        assert list(extra) == ["more"]
        assert (extra["more"].task, extra["more"].split) == ("toy_task", "other")
    assert run_of(board, "alpha").extra == {}, "rows say what they have"


def test_a_file_is_the_boards_row_of_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "beta.py").write_text("")
    run = run_of(with_extra(tmp_path), str(folder / "beta.py"))
    assert (run.row, run.method, list(run.extra)) == ("beta", str(folder / "beta.py"), ["more"])


def test_another_role_of_the_board_can_be_named(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    role = next(iter(board.roles or board.sizes["full"].roles))
    other = dataclasses.replace(board.roles.get(role) or board.sizes["full"].roles[role], seed=77)
    board = dataclasses.replace(board, roles={**board.roles, "other": other})
    run = run_of(board, "alpha", f"roles.{role}=other")
    assert run.row == f"alpha[roles.{role}=other]"
    assert run.roles[role].seed == 77
    assert run_of(board, "alpha", f"roles.{role}={role}").row == "alpha"
    with pytest.raises(UserError, match="no role 'nobody'"):
        run_of(board, "alpha", f"roles.{role}=nobody")
