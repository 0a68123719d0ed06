"""What figures and pages of the few-shot analysis read: a board's rows, with their runs by test set and draw.

A run's training seed is its few-shot draw. Intervals are 95 % intervals over the examples of each test set
and, with `MIN_SEEDS` draws or more, over draws too, as `kdbench.intervals` makes them.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from kdbench import intervals
from kdbench.estimators import Array
from kdbench.intervals import MIN_SEEDS, Estimate
from kdbench.record import RecordError, RunFolder, RunRecord, read_json

VERSION = 1
NAME = "few_shot"
_PROBES = "method/probe_accuracy/"
_RESAMPLES = 2000
_CONDITIONS = ("task_settings", "training", "select", "roles", "extra")
_DRAWN = ("k", "dataset", "draw", "seed")


@dataclass(frozen=True)
class Run:
    """A scored run: its folder, its record, and its arrays under the names that the analysis gives them."""

    folder: RunFolder
    record: RunRecord
    arrays: Mapping[str, Array]

    @property
    def detail(self) -> dict[str, Any]:
        """The detail of the analysis."""
        found: dict[str, Any] = self.record.analyses[NAME]["detail"]
        return found

    def value(self, measure: str, name: str) -> float:
        """A score on a test set, NaN where it is not there."""
        found = self.record.value(f"{NAME}/{measure}/{name}")
        return math.nan if found is None else found

    def right(self, name: str) -> tuple[Array, Array]:
        """(examples [P], 100.0 or 0.0 [P]) of a test set."""
        at = self.arrays["stratum"] == self.detail["sets"].index(name)
        return self.arrays["prompt"][at], self.arrays["accuracy"][at]

    @cached_property
    def parameters(self) -> int | None:
        """How many parameters the student has; None where neither its files nor the configuration say."""
        folder = self.folder.path / "student"
        if (counted := sum(_tensor_sizes(path) for path in sorted(folder.glob("*.safetensors")))) > 0:
            return counted
        config = folder / "config.json"
        told = read_json(config) if config.is_file() else None
        role = self.record.config.get("roles", {}).get("student", {})
        return _encoder_size(told or (role.get("architecture") or {}).get("config") or {})


def _tensor_sizes(path: Path) -> int:
    """The numbers in a safetensors file, from its header.

    Raises: RecordError naming a file whose header cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, struct.error, AttributeError, OverflowError) as error:
        raise RecordError(f"{path}: is not a safetensors file ({error}).") from None


def _encoder_size(config: Mapping[str, Any]) -> int | None:
    """The parameters of a BERT-like masked language model, None where a field is missing."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
    if not all(isinstance(config.get(name), int) for name in names):
        return None
    vocabulary, width, layers, inner, positions = (config[name] for name in names)
    embeddings = (vocabulary + positions + config.get("type_vocab_size", 2) + 2) * width
    layer = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    head = width**2 + 3 * width + vocabulary
    return int(embeddings + layers * layer + head)


# ---------------------------------------------------------------------------------------------------- one row
@dataclass(frozen=True)
class Row:
    """A row of a board at one value of each axis but `dataset`; `runs[test set][draw]`."""

    name: str  # usable as a file name
    title: str
    board: str
    size: str
    row: str
    axes: dict[str, Any]
    reference: bool
    method: str
    settings: str  # as JSON
    k: int | None
    student: str  # which model the student is, as JSON
    conditions: dict[str, Any]  # what else of its configuration moves numbers, without what draws differ in
    runs: dict[str, dict[int, Run]] = field(default_factory=dict)

    @property
    def all_runs(self) -> list[Run]:
        """Every run once."""
        found = {str(run.folder.path): run for runs in self.runs.values() for run in runs.values()}
        return list(found.values())

    def draws(self, name: str) -> dict[int, float]:
        """The accuracy on a test set (%) by draw, in order of draws."""
        return {draw: run.value("accuracy", name) for draw, run in sorted(self.runs[name].items())}

    def accuracy(self, names: Sequence[str]) -> Estimate | None:
        """The mean accuracy over test sets and over the draws that all of them have (%).

        None where a set or a common draw is missing. The interval is cut at 0 and 100. Raises: RecordError
        where draws differ in examples.
        """
        draws = common_draws([self], names)
        if not draws:
            return None
        found = interval([self.right(name, draws) for name in names])
        low, high = np.clip([found.low, found.high], 0, 100)
        return replace(found, low=float(low), high=float(high))

    def right(self, name: str, draws: Sequence[int]) -> Array:
        """[draws, P]: 100.0 where an example is answered rightly; examples in the same order."""
        return _stacked([self.runs[name][draw] for draw in draws], name)

    def mean(self, measure: str, name: str) -> float:
        """The mean of a score on a test set over draws."""
        return float(np.mean([run.value(measure, name) for run in self.runs[name].values()]))

    def classes(self, name: str) -> list[str]:
        """The names of the classes of a test set."""
        found: list[str] = next(iter(self.runs[name].values())).detail["classes"][name]
        return found

    def confusion(self, name: str) -> Array:
        """[N, N]: share of the examples of a label (row) that have a prediction (column), over all draws.

        NaN for a label that no example has.
        """
        counts = np.sum([run.detail["confusion"][name] for run in self.runs[name].values()], axis=0)
        total = counts.sum(axis=1, keepdims=True)
        return np.asarray(np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0))

    def probes(self) -> dict[str, dict[str, dict[int, Estimate]]]:
        """Probe accuracy by data set (as its first test set), bank and layer, in %, as methods measure it.

        The mean over draws, with the 95 % t-interval of it where there are `MIN_SEEDS` or more.
        """
        values: dict[str, dict[str, dict[int, list[float]]]] = {}
        for run in self.all_runs:
            for key, score in run.record.scores.items():
                bank, _, layer = key.removeprefix(_PROBES).rpartition("/")
                if key.startswith(_PROBES) and bank and layer.isdigit() and score.value is not None:
                    banks = values.setdefault(run.detail["sets"][0], {})
                    banks.setdefault(bank, {}).setdefault(int(layer), []).append(score.value)
        return {
            name: {
                bank: {layer: _over_draws(found) for layer, found in sorted(layers.items())}
                for bank, layers in banks.items()
            }
            for name, banks in values.items()
        }


def common_draws(rows: Iterable[Row], names: Sequence[str]) -> list[int]:
    """The draws that all rows have on all test sets."""
    found = [row.runs.get(name, {}).keys() for row in rows for name in names]
    return sorted(set(found[0]).intersection(*found[1:]))


def _stacked(runs: Sequence[Run], name: str) -> Array:
    (first, *_), values = runs[0].right(name), []
    for run in runs:
        examples, right = run.right(name)
        if not np.array_equal(examples, first):
            paths = f"{runs[0].folder.path} and {run.folder.path}"
            raise RecordError(f"{paths}: were tested on different examples of {name}.")
        values.append(right)
    return np.stack(values)


def _over_draws(values: Sequence[float]) -> Estimate:
    mean, count = float(np.mean(values)), len(values)
    if count < MIN_SEEDS:
        return Estimate(mean, None, None, "%", count)
    half = float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half, "%", count)


def interval(sets: Sequence[Array]) -> Estimate:
    """The mean over sets of the mean of `[draws, P]`, with its 95 % interval; `n` counts examples.

    Values are -100, 0 or 100. Examples of a set with the same values in all draws are drawn together, by one
    multinomial number: the same bootstrap as that of `kdbench.intervals`, without its [resamples, P] weights.
    """
    point = float(np.mean([values.mean() for values in sets]))
    resampled = np.zeros((_RESAMPLES, len(sets[0])))
    for at, values in enumerate(sets):
        total = values.shape[1]
        codes = 3 ** np.arange(len(values)) @ np.sign(values).astype(np.int64)
        _, first, counts = np.unique(codes, return_index=True, return_counts=True)
        generator = np.random.default_rng([intervals.DEFAULT.seed, at, total])
        drawn = generator.multinomial(total, counts / total, size=_RESAMPLES)
        resampled += drawn @ values[:, first].T / total / len(sets)
    draws = len(sets[0])
    if draws >= MIN_SEEDS:
        means = (resampled * intervals.seed_weights(range(draws), _RESAMPLES)).sum(axis=1)
    else:
        means = resampled.mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(point, float(low), float(high), "%", sum(values.shape[1] for values in sets))


def difference(one: Row, other: Row, name: str) -> Estimate | None:
    """The accuracy of `one` less that of `other` on a test set (points), by example and draw.

    None without a common draw. Raises: RecordError where both were tested on different examples.
    """
    draws = common_draws([one, other], [name])
    if not draws:
        return None
    both = _stacked([row.runs[name][draw] for row in (one, other) for draw in draws], name)
    return replace(interval([both[: len(draws)] - both[len(draws) :]]), unit="points")


# --------------------------------------------------------------------------------------------------- all rows
def rows(runs: RunFolder | Sequence[RunFolder]) -> list[Row]:
    """The rows of scored runs, in the order given; where they are of several boards or sizes, each is named
    with its own.

    Raises: RecordError where a run has no scores of this version.
    """
    found: dict[str, Row] = {}
    for folder in [runs] if isinstance(runs, RunFolder) else runs:
        record = folder.record
        version = record.analyses.get(NAME, {}).get("version")
        if version != VERSION:
            what = "no scores" if version is None else f"scores of version {version}, not {VERSION},"
            command = f"kdbench analyze {record.run_id} --analysis {NAME}"
            raise RecordError(f"{folder.path}: has {what} of {NAME}; run `{command}`.")
        prefix = f"{NAME}/"
        arrays = {k.removeprefix(prefix): v for k, v in folder.arrays().items() if k.startswith(prefix)}
        axes = {key: value for key, value in record.axes.items() if key != "dataset"}
        key = json.dumps([record.board, record.size, record.row, axes], sort_keys=True)
        row = found.setdefault(key, _empty_row(record, axes))
        run = Run(folder, record, arrays)
        for name in run.detail["sets"]:
            row.runs.setdefault(name, {})[record.seed] = run
    made = list(found.values())
    for what in ("size", "board"):
        if len({getattr(row, what) for row in made}) > 1:
            made = [_told_apart(row, str(getattr(row, what))) for row in made]
    return made


def _told_apart(row: Row, text: str) -> Row:
    return replace(row, name=file_name(f"{row.name}-{text}"), title=f"{row.title}, {text}")


def _empty_row(record: RunRecord, axes: dict[str, Any]) -> Row:
    config = record.config
    role = config.get("roles", {}).get("student") or {}
    student = {key: role[key] for key in ("model", "architecture") if role.get(key)}
    return Row(
        name=file_name("-".join([record.row, *(f"{key}-{value}" for key, value in axes.items())])),
        title=", ".join([str(config.get("title") or record.row), *(f"{k} {v}" for k, v in axes.items())]),
        board=record.board,
        size=record.size,
        row=record.row,
        axes=axes,
        reference=bool(config.get("reference")),
        method=record.distiller.name,
        settings=json.dumps(config.get("settings", {}), sort_keys=True),
        k=config.get("task_settings", {}).get("k"),
        student=json.dumps(student or record.models["student"].name, sort_keys=True),
        conditions={name: _kept(config.get(name)) for name in _CONDITIONS},
    )


def _kept(value: Any) -> Any:
    """A part of a configuration without K, data set, draw and seeds."""
    if isinstance(value, Mapping):
        return {key: _kept(one) for key, one in value.items() if key not in _DRAWN}
    return [_kept(one) for one in value] if isinstance(value, list) else value


def file_name(text: str) -> str:
    """The text with '-' for what does not belong into a file name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def set_names(rows: Iterable[Row]) -> list[str]:
    """The names of all test sets, in the order in which they are met."""
    return list(dict.fromkeys(name for row in rows for name in row.runs))


# ------------------------------------------------------------------------------------------ ablations, curves
@dataclass(frozen=True)
class Ablation:
    """A method's rows that differ in its settings: the full one, the others, and rows to read them beside."""

    full: Row
    others: list[Row]
    beside: list[Row]

    @property
    def rows(self) -> list[Row]:
        """All of them, in this order."""
        return [self.full, *self.others, *self.beside]


def ablations(rows: Sequence[Row]) -> list[Ablation]:
    """The methods that have rows with several settings at one K and for one student, with these rows.

    The full row is the method's first. Beside them are the first rows of all other methods there.
    """
    groups = _grouped(_trained(rows), lambda row: [*_place(row), row.method])
    return [
        Ablation(
            group[0],
            group[1:],
            [one for one, *_ in groups if one.method != group[0].method and _place(one) == _place(group[0])],
        )
        for group in groups
        if len({row.settings for row in group}) > 1
    ]


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows without those that an ablation compares with its full one."""
    variants = {id(row) for one in ablations(rows) for row in one.others}
    return [row for row in rows if id(row) not in variants]


def _place(row: Row) -> list[Any]:
    return [row.board, row.size, row.axes, row.k, row.student]


def _trained(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row.reference]


def _grouped(rows: Sequence[Row], key: Callable[[Row], list[Any]]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps(key(row), sort_keys=True), []).append(row)
    return list(found.values())


@dataclass(frozen=True)
class Curve:
    """Rows that differ in one number: by test set, (x, accuracy) in order of x."""

    title: str
    reference: bool
    points: dict[str, list[tuple[float, Estimate]]]


def over_k(rows: Sequence[Row]) -> list[Curve]:
    """Accuracy over K, of the rows that differ in nothing else.

    Raises: RecordError where two such rows have one K.
    """

    def key(row: Row) -> list[Any]:
        axes = {name: value for name, value in row.axes.items() if value != row.k}
        name = row.row if row.reference else ""  # these have the method of another row
        return [row.board, row.size, name, row.method, row.settings, row.student, axes, row.conditions]

    return _curves(_grouped(rows, key), lambda row: row.k, "K")


def over_student_size(rows: Sequence[Row]) -> list[Curve]:
    """Accuracy over the number of the student's parameters, of trained rows that differ in nothing else, in
    one size of a board or several.

    Raises: RecordError where two such rows have students of one size.
    """

    def key(row: Row) -> list[Any]:
        axes = {k: v for k, v in row.axes.items() if k != "student" and str(v) not in row.student}
        roles = {k: v for k, v in (row.conditions["roles"] or {}).items() if k != "student"}
        return [row.board, row.method, row.settings, row.k, axes, {**row.conditions, "roles": roles}]

    def size(row: Row) -> float | None:
        found = [run.parameters for run in row.all_runs]
        return None if None in found else float(np.mean([one for one in found if one is not None]))

    groups = [group for group in _grouped(_trained(rows), key) if len({row.student for row in group}) > 1]
    return _curves(groups, size, "parameters")


def _curves(groups: Sequence[list[Row]], x: Callable[[Row], float | None], what: str) -> list[Curve]:
    found = []
    for group, title in zip(groups, _titles(groups), strict=True):
        points: dict[str, dict[float, tuple[Row, Estimate]]] = {}
        for row in group:
            if (at := x(row)) is None:
                continue
            for name in row.runs:
                if (one := row.accuracy([name])) is None:
                    continue
                other, _ = points.setdefault(name, {}).setdefault(float(at), (row, one))
                if other is not row:
                    paths = " and ".join(str(each.all_runs[0].folder.path) for each in (other, row))
                    raise RecordError(
                        f"{paths}: are two points of one curve at {at:g} {what} on {name}; leave one out."
                    )
        kept = {
            name: sorted((at, one) for at, (_, one) in by_x.items())
            for name, by_x in points.items()
            if len(by_x) > 1
        }
        if kept:
            found.append(Curve(title, group[0].reference, kept))
    return found


def _shared(facts: Iterable[Iterable[str]]) -> set[str]:
    """What all of them say."""
    first, *others = map(set, facts)
    return first.intersection(*others)


def _titles(groups: Sequence[Sequence[Row]]) -> list[str]:
    """A title of each group; those of groups that are called alike say what these differ in."""
    plain, found = [_common_title(group) for group in groups], []
    for title, group in zip(plain, groups, strict=True):
        alike = [row for other, rows in zip(plain, groups, strict=True) if other == title for row in rows]
        told: list[str] = []
        for facts in (_names, _leaves):
            own, every = (_shared(facts(row) for row in rows) for rows in (group, alike))
            told = told or [one for one in facts(group[0]) if one in own - every]
        found.append(f"{title} ({', '.join(told)})" if told else title)
    return found


def _names(row: Row) -> list[str]:
    """What tells a row from others of its title."""
    return [row.board, row.size, row.row, *(f"{name} {value}" for name, value in row.axes.items())]


def _leaves(row: Row) -> list[str]:
    """Every setting of a row with its value."""

    def walk(value: Any, names: tuple[str, ...]) -> list[str]:
        if isinstance(value, Mapping):
            return [text for key, one in value.items() for text in walk(one, (*names, str(key)))]
        return [f"{'.'.join(names)} {value}"]

    return [text for part in (json.loads(row.settings), *row.conditions.values()) for text in walk(part, ())]


def _common_title(rows: Sequence[Row]) -> str:
    """The title of rows that are called alike, else how all their titles begin, else their method."""
    titles = {str(run.record.config.get("title") or row.row) for row in rows for run in row.all_runs[:1]}
    if len(titles) == 1:
        return titles.pop()
    least, most = min(titles), max(titles)
    same = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    return re.sub(r"[\[(][^\])]*$", "", least[:same]).rstrip(" ,-_/@=") or rows[0].method
