"""Boards and runs as dataclasses: TOML in, one fully resolved `RunConfig` out, and its run id.

Everything a user writes is read strictly by `from_dict`: an unknown key or a wrong type is refused with its
place, long before weights load. A method's or task's own settings are read in the same way, into its `Config`
or `Settings`.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from kdbench import registry
from kdbench.errors import UserError, nearest, unknown
from kdbench.paths import configs_dir, leaderboards_dir
from kdbench.strict import changed, from_dict, read_toml, to_dict

T = TypeVar("T")
M = TypeVar("M", bound="ModelSpec")
Scalar = str | int | float | bool

# --------------------------------------------------------------------------------------------------
# What a board says


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} = {value} must be above 0")


def _within(low: float, high: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} = {value} must lie between {low:g} and {high:g}")


@dataclass(frozen=True)
class Architecture:
    """A fresh model: `model_type` of a transformers configuration and the fields to set in it."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from.

    `model` is a hub id, a local folder, `run:<id>`, a name under configs/models or a path to such a TOML;
    `resolve` puts the content in place of these two.
    `tokenizer` is "task" (the task's own), a hub id, a local folder, `data:<path>` (below the data root), or
    `train:bpe:<size>` (trained on the task's text); None is the model's own.
    """

    model: str = ""
    architecture: Architecture | None = None
    tokenizer: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer's budget and numerics; shared by all rows of a board, a row may override some.

    Source: the defaults are the shared recipe of PromptKD's code (AdamW, clip 1.0, no decay of biases).
    """

    optimizer_steps: int  # updates of the student
    batch_size: int  # examples per update, over all processes
    lr: float
    max_new_tokens: int = 256  # longest response that a model samples in training, in tokens
    micro_batch: int | None = None  # examples per forward; None: batch_size
    rollout_batch: int | None = None  # examples sampled at once; None: batch_size
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    # parameters whose name contains one of these are not decayed
    no_decay: tuple[str, ...] = (
        *("bias", "ln_f.weight", "ln_1.weight", "ln_2.weight", "ln_cross_attn"),  # GPT-2
        *("LayerNorm.weight", "layer_norm.weight", "norm_weight"),  # BERT, RoBERTa, probes
    )
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = 0  # optimizer steps of linear increase
    min_lr_ratio: float = 0.0  # the lr at the end of the schedule, as a share of `lr`
    grad_clip: float | None = 1.0  # largest gradient norm of a group; None: off
    precision: Literal["fp32", "bf16"] = "fp32"
    # of the models that are not trained: bf16 holds and runs them in bfloat16; None: as `precision` says
    teacher_precision: Literal["fp32", "bf16"] | None = None
    # torch's float32 matrix products in training; "high" and "medium" may round their inputs (to TF32, bf16)
    matmul: Literal["highest", "high", "medium"] = "highest"
    # halve micro_batch or rollout_batch where memory runs out, and go on; the run's fit.json keeps the sizes
    fit: bool = False
    # keep each layer's input alone for the backward pass, and compute the rest again: less memory, more time
    checkpoint_activations: bool = False
    # the two that break the law that an update does not depend on how its batch was cut
    student_dropout: bool = False  # the model's own dropout while the student trains
    mean: Literal["update", "micro_batch"] = "update"  # over what losses are averaged
    # batches of rows of like length, cut from this many batches at a time; 1: as drawn. Saves padding; every
    # row is still seen once an epoch
    length_pool: int = 1
    position_offset: int = 0  # each training row's positions start at a random number of 0..this
    checkpoint_every: int = 100  # optimizer steps between checkpoints; 0: none
    log_every: int = 1  # optimizer steps between lines of steps.jsonl

    def __post_init__(self) -> None:
        _positive(batch_size=self.batch_size, lr=self.lr, micro_batch=self.micro_batch, eps=self.eps)
        _positive(max_new_tokens=self.max_new_tokens)
        _positive(length_pool=self.length_pool, max_new_tokens=self.max_new_tokens)
        _positive(rollout_batch=self.rollout_batch, grad_clip=self.grad_clip, log_every=self.log_every)
        _within(0, float("inf"), optimizer_steps=self.optimizer_steps, warmup_steps=self.warmup_steps)
        _within(0, float("inf"), weight_decay=self.weight_decay, checkpoint_every=self.checkpoint_every)
        _within(0, float("inf"), position_offset=self.position_offset)
        _within(0, 1, min_lr_ratio=self.min_lr_ratio)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)} must lie in [0, 1)")
        if self.teacher_precision == "fp32" and self.precision == "bf16":
            raise ValueError("teacher_precision = 'fp32' cannot stand beside precision = 'bf16'")
        if self.fit and (self.student_dropout or self.mean == "micro_batch"):
            why = "student_dropout = true" if self.student_dropout else "mean = 'micro_batch'"
            raise ValueError(f"fit = true may cut batches anew, and with {why} results depend on the cut")


@dataclass(frozen=True)
class Data:
    """Rows of one split of a task, the run's own task where none is named."""

    task: str | None = None
    task_settings: dict[str, Any] = field(default_factory=dict)
    split: str = "train"


@dataclass(frozen=True)
class Stage:
    """Training that a role's model has had before a run begins; equal stages are trained once and cached.

    `training` overrides the size's [training]; in a resolved run it is complete (`stage_training`). `seed` is
    that of its data order and new weights: a number, "run" (the run's, also where the role's is fixed), or
    None (the role's). With `select` the weights that are best on dev at its cadence are kept, else the last.
    """

    name: str
    method: str = "sft"
    settings: dict[str, Any] = field(default_factory=dict)
    task: str | None = None  # None: the board's task
    task_settings: dict[str, Any] = field(default_factory=dict)
    split: str = "train"
    training: dict[str, Any] = field(default_factory=dict)
    seed: int | Literal["run"] | None = None
    select: "Select | None" = None


@dataclass(frozen=True)
class Role(ModelSpec):
    """A model that a method asks for by the name of an argument: student, teacher, ...

    With `like` it is another role's model, on which its own stages follow. With `row` it is what a run of
    another row of the board made, at the seed and axis values of this run but those that `at` says. With
    `each` there is one such run for each value of an axis but `without`, and `{axis}` in `at` stands for the
    value; the method is given all of them. In a resolved run `runs` are their ids.
    """

    like: str | None = None
    row: str | None = None
    at: dict[str, Scalar] = field(default_factory=dict)  # axis -> value
    each: str | None = None  # an axis
    without: Scalar | None = None  # a value of it
    runs: list[str] = field(default_factory=list)
    seed: int | None = None  # of new weights and of the stages; None: the run's seed
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = [name for name in ("model", "architecture", "like", "row") if getattr(self, name)]
        if len(given) != 1:
            told = "none of them is" if not given else " and ".join(given) + " are"
            raise ValueError(f"exactly one of model, architecture, like and row is needed; {told} given")
        if self.row and (self.stages or self.tokenizer or self.revision or self.seed is not None):
            raise ValueError(
                "a role that another row makes has its own model; it takes row, at, each, without"
            )
        if not self.row and (self.at or self.each or self.runs or self.without is not None):
            raise ValueError("at, each, without and runs are for a role that another row makes: say row too")
        if self.without is not None and not self.each:
            raise ValueError("without leaves out a value of each; say each too")
        if self.like and (self.tokenizer or self.revision):
            raise ValueError("a role that is like another has its tokenizer and revision; leave them out")


@dataclass(frozen=True)
class DecodeConfig:
    """How responses are sampled for evaluation.

    Source: the defaults are those of MiniLLM's and PromptKD's evaluation, with its ban on repeated 6-grams.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    no_repeat_ngram: int = 6  # counted over prompt and response; 0: off

    def __post_init__(self) -> None:
        _positive(max_new_tokens=self.max_new_tokens, top_p=self.top_p)
        _within(
            0,
            float("inf"),
            temperature=self.temperature,
            top_k=self.top_k,
            no_repeat_ngram=self.no_repeat_ngram,
        )
        _within(0, 1, top_p=self.top_p)


@dataclass(frozen=True)
class EvaluationConfig:
    """Which test sets are answered, and how."""

    sets: list[str] | Literal["all"] = "all"
    generation_seeds: list[int] = field(default_factory=lambda: [10, 20, 30, 40, 50])
    batch_size: int = 16
    limit: int | None = None  # examples per set; None: all
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        _positive(batch_size=self.batch_size, limit=self.limit)
        if not self.generation_seeds or len(set(self.generation_seeds)) != len(self.generation_seeds):
            raise ValueError("generation_seeds must be different numbers, at least one")


Profile = Literal["plain", "minillm"]
PROFILES: tuple[str, ...] = typing.get_args(Profile)


@dataclass(frozen=True)
class EvidenceConfig:
    """Responses measured token by token against the teacher: the finished model's and those of snapshots."""

    split: str = "dev"
    prompts: int | None = None  # None: all of the split
    samples: int = 1  # responses per prompt and model
    max_new_tokens: int = 256
    profile: Profile = "plain"  # minillm: its decoding, with the ban on repeated 6-grams
    batch_size: int = 16
    snapshots: int = 10  # at equal distances over training; 0: none
    snapshot_prompts: int = 64
    snapshot_tokens: int = 50

    def __post_init__(self) -> None:
        _positive(prompts=self.prompts, samples=self.samples, max_new_tokens=self.max_new_tokens)
        _positive(batch_size=self.batch_size, snapshot_prompts=self.snapshot_prompts)
        _positive(snapshot_tokens=self.snapshot_tokens)
        _within(0, float("inf"), snapshots=self.snapshots)


@dataclass(frozen=True)
class Select:
    """Which weights of a run are scored: the last, or the best on the dev split at a fixed cadence."""

    rule: Literal["last", "best"] = "last"
    score: str = "rouge_l"  # of the dev split
    direction: Literal["higher", "lower"] = "higher"
    every: int = 0  # optimizer steps between dev scores; 0: none

    def __post_init__(self) -> None:
        _within(0, float("inf"), every=self.every)
        if self.rule == "best" and not self.every:
            raise ValueError("rule 'best' needs `every`, the optimizer steps between dev scores")


@dataclass(frozen=True)
class Tuning:
    """How each row's learning rate was chosen: as many trials for every row, on a seed not reported."""

    seed: int
    factors: list[float]  # trials: the row's lr times each of these
    score: str  # of the dev split
    direction: Literal["higher", "lower"] = "higher"
    size: str = "full"  # the chosen rates hold for this size
    axes: dict[str, list[Scalar]] = field(default_factory=dict)  # trials at these values only; else at all

    def __post_init__(self) -> None:
        if not self.factors or len(set(self.factors)) != len(self.factors):
            raise ValueError("factors must be different numbers, at least one")
        for factor in self.factors:
            _positive(factors=factor)


@dataclass(frozen=True)
class Trial:
    """One learning rate of one row, its dev score (None: diverged or failed) and the run that shows it: over
    several axis values the mean score (None where one is missing) and their runs, joined by a space.
    """

    lr: float
    score: float | None
    run_id: str


@dataclass(frozen=True)
class Tuned:
    """The chosen learning rate of a row and all its trials."""

    lr: float
    trials: list[Trial]


@dataclass(frozen=True)
class _TuningFile:
    rows: dict[str, Tuned]


@dataclass(frozen=True)
class SizeRow:
    """What one row does otherwise at one size."""

    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def _check_axes(axes: Mapping[str, Sequence[Scalar]]) -> None:
    for axis, values in axes.items():
        if axis == "seed":
            raise ValueError("an axis cannot be called seed: {seed} stands for the run's seed")
        if not values:
            raise ValueError(f"axis '{axis}' has no values")
        twice = sorted({str(one) for one in values if list(map(str, values)).count(str(one)) > 1})
        if twice:
            raise ValueError(f"axis '{axis}' has the value {twice[0]} twice")


@dataclass(frozen=True)
class Size:
    """One scale of a board: budget, models (beside or instead of the board's roles) and evaluation."""

    training: TrainingConfig
    description: str = ""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    evidence: EvidenceConfig | None = None
    roles: dict[str, Role] = field(default_factory=dict)
    task_settings: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, SizeRow] = field(default_factory=dict)
    select: Select | None = None  # None: the board's
    axes: dict[str, list[Scalar]] = field(default_factory=dict)  # other values of the board's axes
    threads: int = 1

    def __post_init__(self) -> None:
        _positive(threads=self.threads)
        _check_axes(self.axes)


@dataclass(frozen=True)
class Row:
    """One line of the table: a method with settings. An ablation is a row; a reference row takes no step."""

    name: str
    method: str
    title: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)  # role -> the role of the board that fills it
    extra: dict[str, Data] = field(default_factory=dict)  # further data sets, by the name the method uses
    # the axes that the row has, each with those whose values it takes; None: all of the board's
    axes: dict[str, list[str]] | None = None
    reference: bool = False


@dataclass(frozen=True)
class Column:
    """One column of the table: a score of the records, or the mean of other columns.

    With `at` it reads the runs at those values of axes; such an axis is spread over the columns, and one line
    of the table holds a row's runs at all of its values. Without, it is the mean over the values of a spread
    axis.

    With `against` it is the score less that of another row, with `above` the percentage of a row's values
    that are above that row's: at the same training seed, and at the same values of the axes that both have.
    """

    title: str
    score: str = ""  # "<analysis>/<score>", or "record.<path>" as `RunRecord.value` reads it
    at: dict[str, Scalar] = field(default_factory=dict)  # axis -> value
    mean: list[str] = field(default_factory=list)  # titles of the columns whose mean this is
    against: str = ""  # the row whose value is taken off
    above: str = ""  # the row whose value is to be exceeded
    unit: str = ""
    direction: Literal["higher", "lower", "none"] = "none"  # what is better; none: not compared
    rank: bool = False  # rows are ordered by this column
    digits: int = 1

    def __post_init__(self) -> None:
        _within(0, 10, digits=self.digits)
        if self.rank and self.direction == "none":
            raise ValueError(f"column '{self.title}' ranks rows, so its direction must be higher or lower")
        if bool(self.score) == bool(self.mean):
            told = "both are" if self.score else "neither is"
            raise ValueError(f"column '{self.title}': exactly one of score and mean is needed; {told} given")
        if self.mean and self.at:
            raise ValueError(f"column '{self.title}': at is said by the columns whose mean this is")
        if self.mean and (self.against or self.above):
            named = "against" if self.against else "above"
            raise ValueError(f"column '{self.title}': {named} is said by the columns whose mean this is")
        if self.against and self.above:
            raise ValueError(f"column '{self.title}': only one of against and above can be said")
        if self.above and self.unit != "%":
            raise ValueError(f"column '{self.title}': above counts in percent, so its unit must be '%'")

    @property
    def key(self) -> str:
        """What tells its cells from those of other columns: `<score>`, `<score>@<axis>=<value>`, either with
        ` - <row>` or ` > <row>`, or `mean:<title>`.
        """
        if self.mean:
            return f"mean:{self.title}"
        at = ",".join(f"{axis}={self.at[axis]}" for axis in sorted(self.at))
        row = f" - {self.against}" if self.against else f" > {self.above}" if self.above else ""
        return (f"{self.score}@{at}" if at else self.score) + row


@dataclass(frozen=True)
class Board:
    """A question: task, models, budget, seeds, rows and columns.

    Text `{axis}` in task, task_settings, roles, settings, extra and evaluation stands for that axis' value,
    and `{seed}` for the run's seed.
    """

    name: str
    version: str
    question: str
    task: str
    sizes: dict[str, Size]
    rows: list[Row]
    columns: list[Column]
    seeds: list[int]
    title: str = ""
    task_settings: dict[str, Any] = field(default_factory=dict)
    budgets: Literal["equal", "differ"] = "equal"
    axes: dict[str, list[Scalar]] = field(default_factory=dict)
    average: list[str] = field(default_factory=list)  # axes over whose values a line of the table is a mean
    analyses: list[str] = field(default_factory=list)
    roles: dict[str, Role] = field(default_factory=dict)
    select: Select = field(default_factory=Select)
    tuning: Tuning | None = None
    baseline: str = ""  # the row that quality and cost of the others are told against
    superseded_by: str | None = None
    folder: Path | None = field(default=None, metadata={"toml": False})
    tuned: dict[str, Tuned] = field(default_factory=dict, metadata={"toml": False})

    def __post_init__(self) -> None:
        if not self.sizes or not self.rows or not self.columns or not self.seeds:
            raise ValueError("a board needs at least one of each: sizes, rows, columns, seeds")
        for what, given in (("row", [row.name for row in self.rows]), ("seed", [str(s) for s in self.seeds])):
            twice = sorted({one for one in given if given.count(one) > 1})
            if twice:
                raise ValueError(f"{what} '{twice[0]}' is there twice")
        if sum(column.rank for column in self.columns) > 1:
            raise ValueError("only one column can rank the rows")
        if self.tuning is not None and self.tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed = {self.tuning.seed} is a reported seed; tune on another")
        _check_axes(self.axes)

    @property
    def id(self) -> str:
        """`<name>/<version>`."""
        return f"{self.name}/{self.version}"

    def row(self, name: str) -> Row | None:
        """The row of that name, if there is one."""
        return next((row for row in self.rows if row.name == name), None)

    def axis_values(self, size: str | None = None) -> list[dict[str, Scalar]]:
        """Every combination of axis values, those of a size where one is named; one empty table for a board
        without axes.
        """
        return _combinations(self._size_axes(size))

    def _size_axes(self, size: str | None) -> dict[str, list[Scalar]]:
        return self.axes if size is None else {**self.axes, **self.sizes[size].axes}

    def row_axis_values(self, name: str, size: str | None = None) -> list[dict[str, Scalar]]:
        """Every combination of axis values that the row of that name is run at; a name that is no row's
        stands for a method, which has all of the board's axes.
        """
        row = _find_row(self, name) if registry.is_path(name) else self.row(name)
        axes = self._size_axes(size)
        if row is None or row.axes is None:
            return _combinations(axes)
        return _combinations(
            {
                own: list(dict.fromkeys(one for axis in taken for one in axes[axis]))
                for own, taken in row.axes.items()
            }
        )


def _combinations(axes: Mapping[str, Sequence[Scalar]]) -> list[dict[str, Scalar]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


# --------------------------------------------------------------------------------------------------
# Finding and checking boards

_BUDGET = ("optimizer_steps", "batch_size")


def boards() -> list[str]:
    """All published boards and versions, `<name>/v<N>`."""
    root = leaderboards_dir()
    found = [path.parent for path in root.glob("*/v*/board.toml")]
    return [
        f"{path.parent.name}/{path.name}"
        for path in sorted(found, key=lambda p: (p.parent.name, _number(p.name)))
    ]


def _number(version: str) -> int:
    return int(version[1:]) if re.fullmatch(r"v\d+", version) else -1


def _board_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix == ".toml" or (path / "board.toml").is_file():
        return path if path.suffix == ".toml" else path / "board.toml"
    known = boards()
    versions = {board.split("/")[0]: board for board in known}  # the last, which is the newest
    full = versions.get(name, name)
    if full in known:
        return leaderboards_dir() / full / "board.toml"
    family = [board for board in known if board.split("/")[0] == name.split("/")[0]]
    raise unknown("board", name, family or known)


def load_board(name: str) -> Board:
    """A board by `<name>/v<N>`, by `<name>` (the newest version), or by a path to its folder or TOML.

    Raises: UserError for an unknown board (with the nearest), and for whatever its file says wrongly.
    """
    path = _board_file(name)
    where = (
        f"{path.parent.parent.name}/{path.parent.name}/{path.name}"
        if path.name == "board.toml"
        else str(path)
    )
    board = from_dict(Board, read_toml(path), where)
    if (
        path.is_relative_to(leaderboards_dir())
        and board.id != f"{path.parent.parent.name}/{path.parent.name}"
    ):
        raise UserError(f"{where}: calls itself {board.id}, which is not its folder")
    tuned: dict[str, Tuned] = {}
    tuning = path.parent / "tuning.json"
    if board.tuning is not None and tuning.is_file():
        tuned = _load_tuning(tuning)
    board = dataclasses.replace(board, folder=path.parent, tuned=tuned)
    _check_board(board, where)
    return board


def _load_tuning(path: Path) -> dict[str, Tuned]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    return from_dict(_TuningFile, data, str(path)).rows


def _check_board(board: Board, where: str) -> None:
    """What rows, sizes, roles and tuning say about each other."""
    rows = {row.name: row for row in board.rows}
    for row in board.rows:
        _check_budget(board, row.training, row.reference, f"{where}: row '{row.name}'")
    for name, size in board.sizes.items():
        place = f"{where}: sizes.{name}"
        for row_name, one in size.rows.items():
            if row_name not in rows:
                raise unknown("row", row_name, rows, f"{place}.rows")
            _check_budget(board, one.training, rows[row_name].reference, f"{place}.rows.{row_name}")
            changed(size.training, one.training, f"{place}.rows.{row_name}.training")
        for row in board.rows:
            changed(size.training, row.training, f"{where}: row '{row.name}': training")
            _roles(board, size, row, place)
    if board.tuning is not None and board.tuning.size not in board.sizes:
        raise unknown("size", board.tuning.size, board.sizes, f"{where}: tuning.size")
    for axis, values in (board.tuning.axes if board.tuning is not None else {}).items():
        known = board.axes.get(axis)
        if known is None:
            raise unknown("axis", axis, board.axes, f"{where}: tuning.axes")
        for value in values:
            if value not in known:
                raise unknown(f"value of {axis}", str(value), map(str, known), f"{where}: tuning.axes")
    trained = [row.name for row in board.rows if not row.reference]
    if board.baseline and board.baseline not in trained:
        raise unknown("trained row", board.baseline, trained, f"{where}: baseline")
    for row_name, tuned in board.tuned.items():
        if row_name not in trained:
            raise unknown("trained row", row_name, trained, "tuning.json")
        if len(tuned.trials) != len(board.tuning.factors if board.tuning else []):
            raise UserError(
                f"tuning.json: row '{row_name}' has {len(tuned.trials)} trials; every row of {board.id} "
                f"has as many as there are tuning.factors"
            )
    _check_row_axes(board, where)
    _check_columns(board, where)
    used = json.dumps(to_dict([board.rows, board.task, board.task_settings, board.roles, board.sizes]))
    for axis in board.axes:
        if f"{{{axis}}}" not in used:
            raise UserError(f"{where}: axes.{axis} is used nowhere; write '{{{axis}}}' where it belongs")


def _check_row_axes(board: Board, where: str) -> None:
    """What rows say of axes, and roles of rows."""
    for row in board.rows:
        for own, taken in (row.axes or {}).items():
            for axis in (own, *taken):
                if axis not in board.axes:
                    raise unknown("axis", axis, board.axes, f"{where}: row '{row.name}': axes")
            if not taken:
                raise UserError(f"{where}: row '{row.name}': axes.{own} takes the values of no axis")
    for place, roles in [("", board.roles), *((f"sizes.{n}.", one.roles) for n, one in board.sizes.items())]:
        for name, role in roles.items():
            said = f"{where}: {place}roles.{name}"
            if role.row and board.row(role.row) is None:
                raise unknown("row", role.row, [row.name for row in board.rows], f"{said}.row")
            for key, axes in (("at", list(role.at)), ("each", [role.each] if role.each else [])):
                for axis in axes:
                    if axis not in board.axes:
                        raise unknown("axis", axis, board.axes, f"{said}.{key}")


def _check_columns(board: Board, where: str) -> None:
    """What axes, sizes and columns say about each other."""
    values = {axis: list(known) for axis, known in board.axes.items()}
    for name, size in board.sizes.items():
        for axis, more in size.axes.items():
            if axis not in board.axes:
                raise unknown("axis", axis, board.axes, f"{where}: sizes.{name}.axes")
            values[axis] += more
    titles = [column.title for column in board.columns]
    means = [column for column in board.columns if column.mean]
    for column in board.columns:
        place = f"{where}: column '{column.title}'"
        for axis, value in column.at.items():
            if axis not in board.axes:
                raise unknown("axis", axis, board.axes, f"{place}: at")
            if not any(type(one) is type(value) and one == value for one in values[axis]):
                shown = json.dumps if str(value) in map(str, values[axis]) else str
                known = dict.fromkeys(map(shown, values[axis]))
                raise unknown(f"value of {axis}", shown(value), known, f"{place}: at")
            if axis in board.average:
                raise UserError(f"{place}: at: '{axis}' is averaged over; take it out of the board's average")
        for key, row in (("against", column.against), ("above", column.above)):
            if row and board.row(row) is None:
                raise unknown("row", row, [one.name for one in board.rows], f"{place}: {key}")
    for axis in board.average:
        if axis not in board.axes:
            raise unknown("axis", axis, board.axes, f"{where}: average")
    for column in means:
        place = f"{where}: column '{column.title}': mean"
        others = [one.title for one in board.columns if not one.mean]
        for title in column.mean:
            if title not in others:
                raise unknown("column with a score", title, others, place)
            if titles.count(title) > 1 or column.mean.count(title) > 1:
                raise UserError(f"{place}: '{title}' is there twice")
        if titles.count(column.title) > 1:
            raise UserError(f"{where}: column '{column.title}' is there twice")
        named = [one for one in board.columns if one.title in column.mean]
        for key in ("unit", "direction"):
            found = {str(getattr(one, key)) for one in [column, *named]}
            if len(found) > 1:
                raise UserError(f"{place}: {key} is to be that of its columns; here are {sorted(found)}")


def _check_budget(board: Board, training: Mapping[str, object], reference: bool, where: str) -> None:
    for key in _BUDGET:
        if board.budgets == "equal" and not reference and key in training:
            raise UserError(
                f"{where}: {key} cannot differ between rows, for {board.id} says budgets = 'equal'; set it "
                f"in a size for all rows, or say budgets = 'differ'"
            )


def _roles(board: Board, size: Size, row: Row, where: str) -> dict[str, Role]:
    """The roles that a row sees: the board's, the size's above them, and the row's own naming above both."""
    known = {**board.roles, **size.roles}
    for role, source in row.roles.items():
        if source not in known:
            raise unknown("role", source, known, f"{where}: row '{row.name}': roles.{role}")
    roles = {**known, **{role: known[source] for role, source in row.roles.items()}}
    return {role: _followed(spec, known, f"{where}: roles.{role}", (role,)) for role, spec in roles.items()}


def _followed(role: Role, known: Mapping[str, Role], where: str, seen: tuple[str, ...]) -> Role:
    """The role with `like` replaced by what it names."""
    if role.like is None:
        return role
    if role.like not in known:
        raise unknown("role", role.like, known, f"{where}.like")
    if role.like in seen:
        raise UserError(f"{where}.like: {' is like '.join([*seen, role.like])}, which has no beginning")
    base = _followed(known[role.like], known, where, (*seen, role.like))
    if base.row and (role.stages or role.seed is not None):
        raise UserError(
            f"{where}: '{role.like}' is what another row's run made; it takes no stages and no seed"
        )
    seed = base.seed if role.seed is None else role.seed
    before = [  # the stages of what this role begins from are the other role's own, with its seed
        dataclasses.replace(stage, seed=base.seed) if stage.seed is None else stage for stage in base.stages
    ]
    return dataclasses.replace(base, seed=seed, stages=[*before, *role.stages])


# --------------------------------------------------------------------------------------------------
# Models


def models() -> list[str]:
    """Names of the model TOMLs under configs/models, for example `tiny/teacher`."""
    root = configs_dir() / "models"
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.toml"))


def _is_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def resolve_model(spec: M, where: str = "model") -> M:
    """The spec with a TOML's content in place of its name; hub ids, folders and runs are kept.

    Raises: UserError for an unknown name, a folder that is missing or has no weights, or a wrong TOML.
    """
    model = spec.model
    if not model or model.startswith("run:"):
        return spec
    root = configs_dir() / "models"
    if model.endswith(".toml") or model in models():
        path = Path(model).expanduser() if model.endswith(".toml") else root / f"{model}.toml"
        told = from_dict(
            ModelSpec, read_toml(path), str(path) if model.endswith(".toml") else f"models/{model}.toml"
        )
        if told.architecture is None and not told.model:
            raise UserError(f"{path}: needs [architecture] for a fresh model, or model")
        if told.model.endswith(".toml") or told.model in models():
            raise UserError(
                f"{path}: model = '{told.model}' is again a model file; name a hub id or a folder"
            )
        named = dataclasses.replace(
            spec,
            model=told.model,
            architecture=told.architecture,
            tokenizer=spec.tokenizer or told.tokenizer,
            revision=spec.revision or told.revision,
        )
        return resolve_model(named, where)
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(folder, where)
        return dataclasses.replace(spec, model=str(folder))
    if _is_path(model) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise UserError(f"{where}: there is no folder '{model}'")
    local = [name for name in models() if name.split("/")[0] == model.split("/")[0]]
    if local or nearest(model, models()) is not None:
        raise unknown("model", model, models(), where)
    return spec


def _check_folder(folder: Path, where: str) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: {folder} is no model folder: it has no config.json")
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).is_file() for name in names):
        pickled = list(folder.glob("pytorch_model*"))
        told = "; pickled weights are not read: save them as safetensors" if pickled else ""
        raise UserError(f"{where}: {folder} has no weights ({names[0]}){told}")


# --------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class RunConfig:
    """One run, fully resolved: it depends on no board file, default or command line any more."""

    board: str  # <name>/<version>
    size: str
    row: str
    title: str
    reference: bool
    method: str  # a registered name, or the path of a plug-in file
    settings: dict[str, Any]
    task: str
    task_settings: dict[str, Any]
    seed: int
    axes: dict[str, Scalar]
    roles: dict[str, Role]
    training: TrainingConfig
    evaluation: EvaluationConfig
    evidence: EvidenceConfig | None
    select: Select
    analyses: list[str]
    extra: dict[str, Data] = field(default_factory=dict)
    threads: int = 1
    device: str = "cpu"

    @property
    def methods(self) -> list[str]:
        """The run's method, then those of its stages."""
        stages = [stage.method for role in self.roles.values() for stage in role.stages]
        return list(dict.fromkeys([self.method, *stages]))

    @property
    def tasks(self) -> list[str]:
        """The run's task, then those of its stages and further data."""
        stages = [stage.task for role in self.roles.values() for stage in role.stages if stage.task]
        extra = [data.task for data in self.extra.values() if data.task]
        return list(dict.fromkeys([self.task, *stages, *extra]))

    def to_dict(self) -> dict[str, Any]:
        """The run as a JSON table."""
        return typing.cast("dict[str, Any]", to_dict(self))

    @staticmethod
    def from_dict(data: object, where: str) -> "RunConfig":
        """What `to_dict` gave.

        Raises: UserError, as the function `from_dict`.
        """
        return from_dict(RunConfig, data, where)


def stage_training(stage: Stage) -> TrainingConfig:
    """The complete training settings of a resolved run's stage."""
    return from_dict(TrainingConfig, stage.training, f"stage '{stage.name}': training")


def stage_seed(stage: Stage) -> int:
    """The seed of a resolved run's stage."""
    assert isinstance(stage.seed, int)
    return stage.seed


@dataclass(frozen=True)
class Override:
    """One `--set section.key=value`."""

    section: str
    key: str
    value: Any

    @property
    def text(self) -> str:
        """As the user wrote it, without the section."""
        return f"{self.key}={self.value if isinstance(self.value, str) else _toml(self.value)}"


def _toml(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def parse_override(text: str) -> Override:
    """`section.key=value` with a TOML value (number, true, list, quoted text), or else plain text.

    Raises: UserError when it is not of that form.
    """
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if section.endswith("/") or not (equals and dot and section and key):
        raise UserError(f"--set {text}: write it as section.key=value, for example promptkd.prompt_length=5")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return Override(section, key, parsed)


def check_settings(config: type[T], settings: Mapping[str, object], owner: str) -> T:
    """A method's `Config` or a task's `Settings` filled from a table, strictly.

    Raises: UserError that names `owner` and the setting.
    """
    return from_dict(config, settings, owner)


def filled(value: Any, axes: Mapping[str, Scalar]) -> Any:
    """`value` with `{axis}` replaced: a string that is nothing else becomes the axis value itself."""
    if isinstance(value, str):
        for axis, one in axes.items():
            if value == f"{{{axis}}}":
                return one
            value = value.replace(f"{{{axis}}}", str(one))
        return value
    if isinstance(value, Mapping):
        return {key: filled(one, axes) for key, one in value.items()}
    return [filled(one, axes) for one in value] if isinstance(value, list) else value


def _find_row(board: Board, name: str) -> Row:
    """A row of the board, or a new row for a registered method or a plug-in file.

    A new row has every extra set that a row of the board has.
    """
    row = board.row(name)
    if row is not None:
        return row
    extra = {key: data for one in reversed(board.rows) for key, data in one.extra.items()}  # the first row's
    if registry.is_path(name):
        registry.find("distillers", name)
        stem, path = registry.stem(name), str(Path(name).expanduser())
        named = board.row(stem)
        if named is not None and registry.stem(named.method) == stem:  # the board has a row for the file
            return dataclasses.replace(named, method=path)
        return Row(name=stem, method=path, title=stem, extra=extra)
    known = registry.names("distillers")
    if name not in known:
        rows = [one.name for one in board.rows]
        raise unknown("method", name, [*rows, *(one for one in known if one not in rows)])
    return Row(name=name, method=name, title=name, extra=extra)


def linked_rows(board: Board, size: str) -> list[str]:
    """The rows whose runs fill roles of the board at a size."""
    roles = [*board.roles.values(), *board.sizes[size].roles.values()]
    return list(dict.fromkeys(role.row for role in roles if role.row))


_SECTIONS = ("training", "evaluation", "evidence", "task", "select", "roles")


def _nested(table: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"--set: '{parent}' in '{key}' is no table")
    table[last] = value


def _applied(base: T, overrides: Iterable[Override], section: str) -> T:
    table: dict[str, Any] = to_dict(base)
    for one in overrides:
        if one.section == section:
            _nested(table, one.key, one.value)
    return from_dict(type(base), table, f"--set {section}")


def resolve(
    board: Board,
    size: str,
    row: str,
    seed: int,
    overrides: Sequence[str] = (),
    *,
    axes: Mapping[str, Scalar] | None = None,
    among: Sequence[str] | None = None,
    device: str = "cpu",
    settings_class: type[Any] | None = None,
    task_settings_class: type[Any] | None = None,
) -> RunConfig:
    """One run of a board: a row, or a registered method or plug-in file that becomes a row of its own.

    `overrides` are `section.key=value` with the section training, evaluation, evidence, select, task, roles
    (another role of the board for a method's argument), `method`, or the name of a method or row (then other
    rows are left alone; `among` are the rows, methods and files of the same command, one of which it must
    name; None: any that there is). What they really change makes a row of its own, named by it:
    `promptkd[prompt_length=5]`. With `settings_class` (a distiller's `Config`) and `task_settings_class` the
    settings are checked and completed by their defaults; without, they are kept as given. Later ones win:
    size, row, the size's row, the tuned learning rate, overrides.

    Raises: UserError for an unknown size, row, method, task, analysis, role, section or setting, a wrong
    type, a missing model, and an override of the budget on a board whose budgets are equal.
    """
    if size not in board.sizes:
        raise unknown("size", size, board.sizes, board.id)
    scale, line = board.sizes[size], _find_row(board, row)
    axes = dict(axes or {})
    has = board.axes if line.axes is None else line.axes
    if set(axes) != set(has):
        raise UserError(
            f"{board.id}: a run of {line.name} needs a value for each axis ({', '.join(has) or 'none'})"
        )
    told: dict[str, Scalar] = {**axes, "seed": seed}
    own = {line.name} if line.reference else {"method", line.name, registry.stem(line.method)}
    parsed = _own_overrides(board, [parse_override(text) for text in overrides], own, among)
    if line.reference:
        parsed = [one for one in parsed if one.section not in ("training", "select", "roles")]
    given_roles = {one.key: str(one.value) for one in parsed if one.section == "roles"}
    plain_roles = {**{role: role for role in given_roles}, **line.roles}
    line = dataclasses.replace(line, roles={**line.roles, **given_roles})
    for kind, names in (("tasks", [board.task]), ("analyses", board.analyses)):
        for name in names:
            if "{" not in name:
                registry.find(typing.cast("registry.Kind", kind), name)
    registry.find("distillers", line.method)

    special = scale.rows.get(line.name, SizeRow())
    method = registry.stem(line.method)
    settings = filled({**line.settings, **special.settings}, told)
    set_settings = dict(settings)
    for one in parsed:
        if one.section == "method":
            _nested(set_settings, one.key, one.value)
    task = str(filled(board.task, told))
    task_settings = filled({**board.task_settings, **scale.task_settings}, told)
    set_task = dict(task_settings)
    for one in parsed:
        if one.section == "task":
            _nested(set_task, one.key, one.value)
    if settings_class is not None:
        settings, set_settings = (
            to_dict(check_settings(settings_class, one, method)) for one in (settings, set_settings)
        )
    if task_settings_class is not None:
        task_settings, set_task = (
            to_dict(check_settings(task_settings_class, one, f"task {task}"))
            for one in (task_settings, set_task)
        )

    training = changed(scale.training, line.training, f"row '{line.name}': training")
    training = changed(training, special.training, f"sizes.{size}.rows.{line.name}.training")
    if board.tuning is not None and size == board.tuning.size and line.name in board.tuned:
        training = dataclasses.replace(training, lr=board.tuned[line.name].lr)
    if line.reference:
        training = dataclasses.replace(training, optimizer_steps=0)
    select = scale.select or board.select
    evaluation = from_dict(
        EvaluationConfig, filled(to_dict(scale.evaluation), told), f"sizes.{size}.evaluation"
    )
    evidence = scale.evidence
    if evidence is None and any(one.section == "evidence" for one in parsed):
        raise UserError(f"--set evidence: size '{size}' of {board.id} collects no evidence")
    before = {
        "method": settings,
        "roles": plain_roles,
        "task": task_settings,
        "training": to_dict(training),
        "evaluation": to_dict(evaluation),
        "evidence": to_dict(evidence),
        "select": to_dict(select),
    }
    training = _applied(training, parsed, "training")
    evaluation = _applied(evaluation, parsed, "evaluation")
    evidence = None if evidence is None else _applied(evidence, parsed, "evidence")
    select = _applied(select, parsed, "select")
    after = {
        "method": set_settings,
        "roles": {**plain_roles, **given_roles},
        "task": set_task,
        "training": to_dict(training),
        "evaluation": to_dict(evaluation),
        "evidence": to_dict(evidence),
        "select": to_dict(select),
    }
    effective = _differences(parsed, before, after)
    _check_budget(
        board, {one.key: 1 for one in effective if one.section == "training"}, False, "--set training"
    )
    differs = ",".join(
        one.text if one.section == "method" else f"{one.section}.{one.text}" for one in effective
    )
    named = f"[{differs}]" if differs else ""
    return RunConfig(
        board=board.id,
        size=size,
        row=line.name + named,
        title=(line.title or line.name) + (f" {named}" if named else ""),
        reference=line.reference,
        method=line.method,
        settings=set_settings,
        task=task,
        task_settings=set_task,
        seed=seed,
        axes=axes,
        roles=_resolved_roles(board, scale, line, seed, told),
        training=training,
        evaluation=evaluation,
        evidence=evidence,
        select=select,
        analyses=list(board.analyses),
        extra=_resolved_extra(line, told, task, set_task),
        threads=scale.threads,
        device=device,
    )


@dataclass(frozen=True)
class _Extra:
    extra: dict[str, Data]


def _resolved_extra(
    row: Row, told: Mapping[str, Scalar], task: str, task_settings: dict[str, Any]
) -> dict[str, Data]:
    """The row's further data sets; one that names no task is of the run's own."""
    given = from_dict(_Extra, {"extra": filled(to_dict(row.extra), told)}, f"row '{row.name}'").extra
    return {
        name: dataclasses.replace(data, task=task, task_settings={**task_settings, **data.task_settings})
        if data.task is None
        else data
        for name, data in given.items()
    }


def _own_overrides(
    board: Board, overrides: Iterable[Override], own: set[str], among: Sequence[str] | None
) -> list[Override]:
    """The overrides that concern this row, the method's under the section `method`."""
    if among is None:
        among = [*(row.name for row in board.rows), *registry.names("distillers")]
    lines = [_find_row(board, name) for name in among]
    others = {"method", *(line.name for line in lines), *(registry.stem(line.method) for line in lines)}
    kept = []
    for one in overrides:
        if one.section in own:
            kept.append(dataclasses.replace(one, section="method"))
        elif one.section in _SECTIONS:
            kept.append(one)
        elif one.section not in others:
            raise unknown("section", one.section, [*sorted(own | others), *_SECTIONS], "--set")
    return kept


def _differences(
    overrides: Sequence[Override], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[Override]:
    """The overrides that changed something, in a fixed order, the last one for each key."""

    def value(table: Any, key: str) -> Any:
        for part in key.split("."):
            table = (
                table.get(part, dataclasses.MISSING) if isinstance(table, Mapping) else dataclasses.MISSING
            )
        return table

    last = {(one.section, one.key): one for one in overrides}
    kept = []
    for (section, key), one in sorted(last.items()):
        new = value(after[section], key)
        if value(before[section], key) != new:
            kept.append(dataclasses.replace(one, value=new))
    return kept


def _resolved_roles(
    board: Board, size: Size, row: Row, seed: int, axes: Mapping[str, Scalar]
) -> dict[str, Role]:
    """Roles with axis values, models, seeds and the stages' training filled in."""
    roles = {}
    for name, role in _roles(board, size, row, board.id).items():
        where = f"{board.id}: roles.{name}"
        table = typing.cast("dict[str, Any]", filled(to_dict(role), axes))
        if role.each:  # there `{each}` stands for the value that is drawn, not for the run's own
            table["at"] = filled(dict(role.at), {key: axes[key] for key in axes if key != role.each})
        told = from_dict(Role, table, where)
        if told.row:
            roles[name] = told
            continue
        model = resolve_model(told, f"{where}.model")
        seeded = seed if told.seed is None else told.seed
        stages = []
        for stage in told.stages:
            registry.find("distillers", stage.method)
            if stage.task is not None:
                registry.find("tasks", stage.task)
            place = f"{where}: stage '{stage.name}': training"
            training = to_dict(changed(size.training, stage.training, place))
            own = seeded if stage.seed is None else seed if stage.seed == "run" else stage.seed
            stages.append(dataclasses.replace(stage, training=training, seed=own))
        roles[name] = dataclasses.replace(model, seed=seeded, stages=stages)
    return roles


def keep_roles(run: RunConfig, names: Sequence[str]) -> RunConfig:
    """The run with these roles only: what its method and its evidence ask for.

    Raises: UserError when the board fills one of them not.
    """
    for name in names:
        if name not in run.roles:
            raise unknown("role", name, run.roles, f"{run.row} on {run.board}")
    return dataclasses.replace(run, roles={name: run.roles[name] for name in run.roles if name in names})


def tuning_runs(board: Board, row: str) -> list[list[str]]:
    """The overrides of each learning-rate trial of a row, to be run with the seed `board.tuning.seed` at
    every axis value of the tuning size.

    Raises: UserError when the board does not tune.
    """
    if board.tuning is None:
        raise UserError(f"{board.id}: does not tune learning rates")
    untuned = dataclasses.replace(board, tuned={})
    size, seed = board.tuning.size, board.tuning.seed
    lr = resolve(untuned, size, row, seed, axes=board.row_axis_values(row, size)[0]).training.lr
    return [[f"training.lr={lr * factor:.6g}"] for factor in board.tuning.factors]


# What says nothing about a run's numbers.
_COSMETIC = ("title", "reference", "analyses")
_COSMETIC_TRAINING = ("checkpoint_every", "log_every")


def identity(run: RunConfig) -> dict[str, Any]:
    """What in a run's settings can move a number: no titles, no index of a device, no folder of a plug-in."""
    table = run.to_dict()
    for key in _COSMETIC:
        del table[key]
    table["method"] = registry.stem(run.method)
    table["device"] = run.device.split(":")[0]
    for training in [
        table["training"],
        *(s["training"] for r in table["roles"].values() for s in r["stages"]),
    ]:
        for key in _COSMETIC_TRAINING:
            training.pop(key, None)
    return table


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that can move a number, without importing them."""
    from importlib.metadata import version

    return {name: version(name).split("+")[0] for name in ("torch", "transformers")}


def run_id(run: RunConfig, code: str, versions: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits: a hash of resolved settings, code that moves numbers, and libraries.

    `code` is `registry.code_hash` of `registry.code_files(run.methods, run.tasks)`; `versions` are
    `library_versions()`, and whatever else determines the run, such as the task's revision.
    """
    text = json.dumps([identity(run), code, dict(versions)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
