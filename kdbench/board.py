"""From records to a table: means over training seeds, intervals, paired tests, tied sets.

Source: crossed bootstrap over training seeds and prompts with weights shared by all rows (Owen & Eckles 2012,
https://arxiv.org/abs/1106.2125); Holm 1979 over the rows of a column; for the few training seeds, the
expanded bootstrap of Hesterberg 2015, https://arxiv.org/abs/1411.5279.
Differs: prompts are drawn within each test set, for the sets are given.

A resample draws training seeds and prompts anew: seed s counts 1/S + k (c_s / S - 1/S) where c is multinomial
and k = sqrt(S / (S - 1)) t(0.975, S - 1) / z(0.975), without which an interval from three seeds is far too
narrow; each score is computed again on the drawn prompts and averaged over the drawn seeds. Draws depend on
the seeds' numbers and the prompts only, so differences between rows are paired. A row's difference to the
best row of a column has a two-sided percentile p-value, Holm's correction over the rows, and the interval at
the level that Holm's procedure gives it (simultaneous 95 %); it is tied where that interval contains 0. A row
with fewer than three training seeds is not tested, and its interval is over prompts only. Reference rows take
no part.

A board spreads an axis over its columns when a column names a value of it (`at`): a line of the table is then
a row over all values of that axis, and each column reads the runs of its own. A column that is the mean of
others has their mean in each resample: prompts are drawn for each test set by itself, training seeds for all
columns together. It has a value for those training seeds only that all of them have, as has a column that
names no value of a spread axis, which is the mean over the values that the line has. Runs of other values of
an axis may have other test sets whose prompts bear the same numbers: on such a board prompts are the same
only where they are also read by the same columns' scores.

A board may say that lines are averaged over an axis which no column names (`average`): it is spread too, and
rows that do not have it stand beside those that do. A column against another row, or of the share of values
above it, sets each combination of a line beside that row's at the same training seed and the same values of
the axes that both have, and is the mean over those combinations. A difference is taken in each resample, so
what both share drops out of its interval; a share has an interval over training seeds alone. Local lines are
set beside local ones of the other row where there are some, all others beside published ones.

How far to trust it, from simulated boards of six equal rows with three seeds and 300 prompts: an interval of
a difference covers 0 in 93.5 % of the cases when all noise is between training seeds (74 % without k), in
over 99 % when prompts add noise as they do in practice. Some row is wrongly told from the best in under 1 %
of the boards then, but in 32 % when all noise is between training seeds (80 % without k): three seeds do not
carry five tests alone.

Nothing here imports torch; numpy is imported only when statistics must be computed anew.
"""

import csv
import hashlib
import io
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kdbench.errors import UserError, unknown
from kdbench.record import (
    RecordError,
    RunFolder,
    RunRecord,
    Score,
    atomic,
    load,
    load_arrays,
    read_json,
    save,
    save_arrays,
    sha256,
    write_json,
)

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

VERSION = 2  # of the stored statistics; a higher one makes them be computed again
_SEED = 1
RESAMPLES = 10_000
LEVEL = 0.95
MIN_SEEDS = 3
FORMATS = ("table", "markdown", "csv", "json")
_CHUNK = 500
Statistics = dict[str, Any]


class ColumnInfo(Protocol):
    """A column of board.toml, see `kdbench.config.Column`."""

    @property
    def key(self) -> str: ...
    @property
    def score(self) -> str: ...
    @property
    def at(self) -> Mapping[str, Any]: ...
    @property
    def mean(self) -> Sequence[str]: ...
    @property
    def against(self) -> str: ...
    @property
    def above(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def rank(self) -> bool: ...
    @property
    def digits(self) -> int: ...


class RowInfo(Protocol):
    """A row of board.toml, see `kdbench.config.Row`."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def reference(self) -> bool: ...


class BoardInfo(Protocol):
    """What is needed of a board, see `kdbench.config.Board`."""

    @property
    def id(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def budgets(self) -> str: ...
    @property
    def seeds(self) -> Sequence[int]: ...
    @property
    def sizes(self) -> Mapping[str, Any]: ...
    @property
    def analyses(self) -> Sequence[str]: ...
    @property
    def rows(self) -> Sequence[RowInfo]: ...
    @property
    def columns(self) -> Sequence[ColumnInfo]: ...
    @property
    def average(self) -> Sequence[str]: ...
    @property
    def folder(self) -> Path | None: ...

    def row_axis_values(self, name: str, size: str | None = None) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Entry:
    """A record that was read: its file, that file's SHA-256, and whether it is a local run."""

    record: RunRecord
    path: Path
    sha256: str
    local: bool

    @property
    def begun(self) -> float:
        """When the run was begun, or its record published."""
        return RunFolder(self.path.parent).begun if self.local else self.path.stat().st_mtime

    @property
    def arrays_path(self) -> Path:
        """scores.npz in a run folder, <run_id>.npz in a board's records."""
        return (
            self.path.with_name("scores.npz")
            if self.path.name == "record.json"
            else self.path.with_suffix(".npz")
        )


# ------------------------------------------------------------------------------------------------ finding
def published_size(board: BoardInfo) -> str:
    """The size whose runs are published: `full`, or the board's first."""
    return "full" if "full" in board.sizes else next(iter(board.sizes))


def published_records(board: BoardInfo) -> list[Path]:
    """The record files that lie beside the board."""
    return [] if board.folder is None else sorted((board.folder / "records").glob("*.json"))


def local_records(board: BoardInfo, runs: Path) -> list[Path]:
    """The record files of the board's runs below the folder `runs`."""
    return sorted((runs / board.id).glob("*/record.json"))


def read_entries(paths: Iterable[Path], local: bool) -> tuple[list[Entry], list[str]]:
    """(the records that can be used, one warning per file that cannot)."""
    entries, warnings = [], []
    for path in paths:
        try:
            entries.append(Entry(load(path), path, sha256(path), local))
        except RecordError as error:
            warnings.append(f"left out: {error}")
        except OSError as error:
            warnings.append(f"left out: {path}: cannot be read ({error.strerror or error}).")
    return entries, warnings


def _question(board: BoardInfo, size: str) -> str:
    """Identity of all that statistics depend on besides records."""
    columns: list[list[Any]] = [
        [c.score, c.title, c.unit, c.direction, c.rank, c.digits]
        + ([c.at, c.mean] if c.at or c.mean else [])
        + ([c.key] if c.against or c.above else [])
        for c in board.columns
    ]
    rows = [[row.name, row.title, row.reference] for row in board.rows]
    head: list[Any] = [board.id, board.title, board.question, board.budgets, size]
    head += [list(board.average)] if board.average else []
    return hashlib.sha256(json.dumps([VERSION, RESAMPLES, head, columns, rows]).encode()).hexdigest()


def load_statistics(
    board: BoardInfo,
    published: Sequence[Path],
    local: Sequence[Path],
    store: Path | None,
    size: str | None = None,
) -> Statistics:
    """The statistics of these records, from the file `store` where it is of the same records, else computed.

    What was computed is stored where the folder can be written; `store` None: not at all. `size`: only runs
    of that size, default the published one. A file that is no record becomes a warning.
    """
    size = published_size(board) if size is None else size
    if size not in board.sizes:
        raise unknown("size", size, board.sizes, board.id)
    hashes, question, own = {}, _question(board, size), set(local)
    for path in (*published, *local):
        try:
            hashes[str(path.resolve()) if path in own else path.name] = sha256(path)
        except OSError:
            continue  # a file that goes away while we look is no record
    try:
        stored = {"version": None} if store is None else read_json(store)
        if (
            stored["version"] == VERSION
            and stored["question_sha256"] == question
            and stored["files"] == hashes
        ):
            return dict(stored)
    except (RecordError, KeyError, TypeError, ValueError):
        pass
    one, warnings = read_entries(published, local=False)
    two, more = read_entries(local, local=True)
    result = statistics(board, [*one, *two], size)
    result["warnings"] = [*warnings, *more, *result["warnings"]]
    result["files"] = hashes
    if store is not None:
        with suppress(OSError):  # an installed wheel may lie in a folder that cannot be written
            write_json(store, result)
    return result


def report(board: BoardInfo, runs: Path | None = None, size: str | None = None) -> Statistics:
    """The statistics of the board's published records together with its runs in the folder `runs`.

    They are stored beside what they are of: nowhere for a board without records and runs.
    """
    size = published_size(board) if size is None else size
    published, local = published_records(board), [] if runs is None else local_records(board, runs)
    store: Path | None = None
    if runs is not None and (local or board.folder is None):
        store = runs / board.id / f"statistics-{size}.json"
    elif published:
        assert board.folder is not None
        store = board.folder / (
            "statistics.json" if size == published_size(board) else f"statistics-{size}.json"
        )
    return load_statistics(board, published, local, store, size)


# --------------------------------------------------------------------------------------------- statistics
def spread_axes(board: BoardInfo) -> list[str]:
    """The axes within a line: those of columns, in the order in which these name them, then those that a line
    is averaged over.
    """
    return list(dict.fromkeys([*(axis for column in board.columns for axis in column.at), *board.average]))


def _spread_values(record: RunRecord, spread: Sequence[str]) -> dict[str, Any]:
    return {axis: record.axes[axis] for axis in spread if axis in record.axes}


def _named(axes: Mapping[str, Any]) -> str:
    return ",".join(f"{axis}={value}" for axis, value in axes.items())


def _same(one: object, other: object) -> bool:
    """Whether two axis values are the same: 1 is neither true nor 1.0."""
    return type(one) is type(other) and one == other


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the axes that both have are at the same values."""
    return all(_same(one[axis], other[axis]) for axis in one.keys() & other.keys())


@dataclass
class _Line:
    """The runs of one line of the table: a row of the board at one value of each axis, published or local.

    `axes` are those that are not spread; `parts` are the values of the spread ones by the name of their
    combination, `done` the finished runs by combination and training seed. Without spread axes there is one
    combination, named ''.
    """

    name: str
    axes: dict[str, Any]
    local: bool
    parts: dict[str, dict[str, Any]]
    done: dict[str, dict[int, Entry]]
    failed: list[Entry]

    def entries(self) -> list[Entry]:
        """The finished runs."""
        return [entry for runs in self.done.values() for entry in runs.values()]

    def at(self, values: Mapping[str, Any]) -> list[str]:
        """The combinations that have these values of spread axes."""
        return [
            part
            for part, mine in self.parts.items()
            if all(axis in mine and _same(mine[axis], value) for axis, value in values.items())
        ]


def _lines(entries: Sequence[Entry], board: BoardInfo, warnings: list[str]) -> list[_Line]:
    """The lines of the table: of each seed the newest finished run, and a failed one if it is newer still."""
    spread = spread_axes(board)
    published = {entry.record.run_id for entry in entries if not entry.local}
    lines: dict[tuple[str, str, bool], _Line] = {}
    finished: dict[tuple[str, int], list[str]] = {}
    for entry in sorted(entries, key=lambda e: (e.begun, str(e.path))):
        record = entry.record
        if entry.local and record.run_id in published:
            continue
        mine = _spread_values(record, spread)
        axes = {axis: value for axis, value in record.axes.items() if axis not in mine}
        key = (record.row, json.dumps(axes, sort_keys=True), entry.local)
        line = lines.setdefault(key, _Line(record.row, axes, entry.local, {}, {}, []))
        part = _named(mine)
        line.parts[part] = mine
        line.failed = [
            other
            for other in line.failed
            if (other.record.seed, other.record.axes) != (record.seed, record.axes)
        ]
        if record.status == "done":
            line.done.setdefault(part, {})[record.seed] = entry
            name = _name(record.row, {**axes, **mine}, entry.local)
            finished.setdefault((f"row '{name}'", record.seed), []).append(record.run_id)
        else:
            line.failed.append(entry)
    for (name, seed), runs in finished.items():
        if len(runs) > 1:
            warnings.append(f"{name}, seed {seed}: has {len(runs)} runs; shown is the newest, {runs[-1]}.")
    for line in lines.values():
        count = _revisions(line)
        if count > 1:
            name = _name(line.name, line.axes, line.local)
            warnings.append(f"row '{name}': its runs are of {count} revisions of method or task.")
        order = _order(line.parts, spread, board.columns)
        line.parts = {part: line.parts[part] for part in order}
        line.done = {part: line.done[part] for part in order if part in line.done}
    return [lines[key] for key in sorted(lines)]


def _order(
    parts: Mapping[str, Mapping[str, Any]], spread: Sequence[str], columns: Sequence[ColumnInfo]
) -> list[str]:
    """The combinations in the order of the columns, those of no column last."""
    known = {axis: [c.at[axis] for c in columns if axis in c.at] for axis in spread}

    def place(part: str) -> tuple[list[int], str]:
        values = parts[part]
        found = [
            next((i for i, one in enumerate(known[axis]) if _same(one, values.get(axis))), len(columns))
            for axis in spread
        ]
        return found, part

    return sorted(parts, key=place)


def _revisions(line: _Line) -> int:
    """How many revisions of method and task there are among runs of one task with the same settings, or of
    the method alone among runs of one task.
    """
    alike: dict[str, set[tuple[str, ...]]] = {}
    for entry in line.entries():
        record = entry.record
        settings = json.dumps(record.config.get("task_settings"), sort_keys=True)
        pair = (record.distiller.revision, record.task.revision)
        alike.setdefault(record.task.name, set()).add(pair[:1])
        alike.setdefault(f"{record.task.name} {settings}", set()).add(pair)
    return max(map(len, alike.values()), default=0)


def _name(row: str, axes: Mapping[str, Any], local: bool) -> str:
    parts = [f"{key}={value}" for key, value in axes.items()] + ["local"] * local
    return row + (f" ({', '.join(parts)})" if parts else "")


@dataclass
class _Cell:
    """One line's values of one column by training seed, and their resamples [R] where prompts are known.

    It is made of one score at one combination of spread axes, or is the mean of several; `prompts` (identity
    of prompts and task, by training seed) and `conditions` (what the evidence was made under, {} where not
    known) are told for each. `lacking`: some have prompts, and some of them not.
    """

    parts: dict[str, dict[str, Any]]  # the values of each combination
    values: dict[int, float]
    samples: "dict[int, Array]"
    prompts: dict[tuple[str, str], dict[int, str]]
    conditions: dict[tuple[str, str], dict[str, Any]]
    lacking: bool = False


def _inputs(
    score: Score, arrays: "Mapping[str, Array]", where: Path, readers: Sequence[str]
) -> "tuple[dict[str, Array], str]":
    """(the estimator's inputs in order of stratum and prompt, identity of those prompts).

    `readers`: the names of scores that tell prompts from others with the same numbers.
    """
    import numpy as np

    try:
        inputs = {name: arrays[key] for name, key in score.arrays.items()}
    except KeyError as error:
        raise RecordError(f"{where}: lacks the array {error}.") from None
    count = {len(value) for value in inputs.values()}
    if "prompt" not in inputs or len(count) != 1:
        raise RecordError(
            f"{where}: arrays of one score should have one row per prompt, and name the prompts."
        )
    stratum = inputs.get("stratum", np.zeros(count.pop(), dtype=np.int64))
    order = np.lexsort((inputs["prompt"], stratum))
    if (np.diff(order) != 1).any():
        inputs = {name: value[order] for name, value in inputs.items()}
        stratum = stratum[order]
    inputs["stratum"] = stratum
    text = np.stack([stratum, inputs["prompt"]]).astype("<i8").tobytes()
    return inputs, hashlib.sha256(text + "\n".join(readers).encode()).hexdigest()


def _prompt_weights(stratum: "Array", identity: str, chunk: int) -> "Array":
    """[_CHUNK, P] float32: how often each prompt is drawn, within its stratum; P in order of stratum."""
    import numpy as np

    generator = np.random.default_rng([_SEED, chunk, int(identity[:16], 16)])
    sizes = np.unique(stratum, return_counts=True)[1]
    parts = []
    for size in sizes:
        drawn = generator.integers(0, size, (_CHUNK, size)) + size * np.arange(_CHUNK)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=_CHUNK * size).reshape(_CHUNK, size))
    return np.concatenate(parts, axis=1).astype(np.float32)


@cache
def seed_weights(seeds: tuple[int, ...]) -> "Array":
    """[RESAMPLES, S]: `kdbench.intervals.seed_weights`; `seeds` are sorted."""
    from kdbench import intervals

    return intervals.seed_weights(seeds, RESAMPLES)


_Found = dict[tuple[str, str], _Cell]  # the cells of a line, by score and combination
_Job = tuple[Score, "dict[str, Array]", "Array"]  # a score, its inputs, and where its resamples go [R]


def _cells(lines: Sequence[_Line], board: BoardInfo, warnings: list[str]) -> list[dict[str, _Cell]]:
    """For each line the cell of every column that it has, resampled over prompts."""
    import numpy as np

    from kdbench import counterfactuals  # noqa: F401  it adds estimators
    from kdbench.estimators import ESTIMATORS

    scores = list(dict.fromkeys(column.score for column in board.columns if not column.mean))
    spread = bool(spread_axes(board))
    found: list[_Found] = []
    jobs: dict[str, list[_Job]] = {}
    strata: dict[str, Array] = {}
    for line in lines:
        mine: _Found = {}
        for part, entry in ((part, runs[seed]) for part, runs in line.done.items() for seed in sorted(runs)):
            record, seed, loaded = entry.record, entry.record.seed, None
            for name in scores:
                value = record.value(name)
                if value is None:
                    continue
                key = (name, part)
                cell = mine.setdefault(key, _Cell({part: line.parts[part]}, {}, {}, {key: {}}, {key: {}}))
                cell.conditions[key].update(record.conditions(name))
                cell.values[seed] = value
                score = record.scores.get(name)
                if score is None or score.estimator is None:
                    continue
                try:
                    if score.estimator not in ESTIMATORS:
                        raise RecordError(f"{entry.path}: no estimator '{score.estimator}'.")
                    if loaded is None:
                        loaded = load_arrays(entry.arrays_path, record.arrays_sha256)
                    readers = _readers(record, score, scores) if spread else []
                    inputs, identity = _inputs(score, loaded, entry.arrays_path, readers)
                except RecordError as error:
                    warning = f"no interval: {error}"
                    warnings += [] if warning in warnings else [warning]
                    continue
                samples = np.empty(RESAMPLES)
                strata[identity] = inputs["stratum"]
                jobs.setdefault(identity, []).append((score, inputs, samples))
                cell.samples[seed] = samples
                cell.prompts[key][seed] = f"{identity}/{record.task.name}/{record.task.revision}"
        for cell in mine.values():
            cell.lacking = bool(cell.samples) and len(cell.samples) < len(cell.values)
        found.append(mine)
    for identity, group in jobs.items():
        for chunk in range(math.ceil(RESAMPLES / _CHUNK)):
            weights = _prompt_weights(strata[identity], identity, chunk)
            rows = slice(chunk * _CHUNK, min((chunk + 1) * _CHUNK, RESAMPLES))
            _resample(group, weights, rows, together=spread)
    table = list(zip(lines, found, strict=True))
    return [_of_columns(line, mine, board.columns, table, warnings) for line, mine in table]


def _readers(record: RunRecord, score: Score, names: Sequence[str]) -> list[str]:
    """Those of the names that are scores of the record on the prompts of `score`, sorted."""
    prompts = score.arrays.get("prompt")
    found = {name: record.scores[name].arrays.get("prompt") for name in names if name in record.scores}
    return sorted(name for name, array in found.items() if array == prompts)


def _resample(jobs: Sequence[_Job], weights: "Array", rows: slice, together: bool) -> None:
    """Computes each score on the drawn prompts, into `rows` of its resamples.

    `together`: means of many runs are one product, many times faster and equal but for the rounding; boards
    of before keep theirs to the last digit.
    """
    import numpy as np

    from kdbench.estimators import ESTIMATORS

    means: dict[int | None, list[_Job]] = {}
    for job in jobs:
        score, inputs, samples = job
        if together and score.estimator in ("mean", "stratum_mean"):
            means.setdefault(score.args.get("stratum"), []).append(job)
            continue
        drawn = ESTIMATORS[str(score.estimator)](inputs, weights, **score.args)
        samples[rows] = drawn[: rows.stop - rows.start]
    for stratum, group in means.items():
        inside = slice(None) if stratum is None else group[0][1]["stratum"] == stratum
        shares = weights[:, inside]
        values = np.stack([inputs["values"][inside] for _, inputs, _ in group], axis=1)
        with np.errstate(invalid="ignore"):  # a set without prompts has no mean
            drawn = (shares @ values.astype(weights.dtype)) / shares.sum(axis=1, keepdims=True)
        first: dict[bytes, int] = {}  # equal runs differ by nothing, not even by rounding
        for at, (_, _, samples) in enumerate(group):
            same = first.setdefault(values[:, at].tobytes(), at)
            samples[rows] = drawn[: rows.stop - rows.start, same]


def _of_columns(
    line: _Line,
    found: _Found,
    columns: Sequence[ColumnInfo],
    table: Sequence[tuple[_Line, _Found]],
    warnings: list[str],
) -> dict[str, _Cell]:
    """The cells of a line's columns, by key, from those of its scores at each combination; `table` has these
    of all lines.
    """
    cells: dict[str, _Cell] = {}
    for column in columns:
        if not column.mean:
            keys = [(column.score, part) for part in line.at(column.at)]
            parts = [found[key] for key in keys if key in found]
            if column.against or column.above:
                parts = _beside(column, line, parts, table, warnings)
            if parts and (cell := _mean_of(parts)) is not None:
                cells[column.key] = cell
    titles = {column.title: column.key for column in columns}
    for column in columns:
        if column.mean and all(titles[title] in cells for title in column.mean):
            cell = _mean_of([cells[titles[title]] for title in column.mean])
            if cell is not None:
                cells[column.key] = cell
    return cells


def _beside(
    column: ColumnInfo,
    line: _Line,
    cells: Sequence[_Cell],
    table: Sequence[tuple[_Line, _Found]],
    warnings: list[str],
) -> list[_Cell]:
    """Cells of a line, one per combination, set beside those of another row; without those that it lacks."""
    name, score = column.against or column.above, column.score
    others = [
        (other, found)
        for other, found in table
        if other.name == name and _agree(line.axes, other.axes) and any(key[0] == score for key in found)
    ]
    others = [one for one in others if one[0].local == line.local] or [
        one for one in others if not one[0].local
    ]
    if column.above and any(other is line for other, _ in others):
        return []
    made, refused = [], dict[str, int]()
    for cell in cells:
        ((_, values),) = cell.parts.items()
        matches = [
            found[score, part]
            for other, found in others
            for part, theirs in other.parts.items()
            if (score, part) in found and _agree({**line.axes, **values}, {**other.axes, **theirs})
        ]
        match = _mean_of(matches) if matches else None
        if match is None:
            continue
        if differs := _other(cell, match, f"row '{name}'"):
            refused[differs] = refused.get(differs, 0) + 1
        elif (one := _above(cell, match) if column.above else _less(cell, match)) is not None:
            made.append(one)
    for differs, count in refused.items():
        whose = f"row '{_name(line.name, line.axes, line.local)}', column '{column.title}'"
        warnings.append(f"{whose}: {count} of {len(cells)} values left out: {differs}.")
    return made


def _less(cell: _Cell, other: _Cell) -> _Cell | None:
    """A cell less another, for the training seeds that both have; None where there are none."""
    seeds = sorted(cell.values.keys() & other.values.keys())
    drawn = [seed for seed in seeds if seed in cell.samples and seed in other.samples]
    made = replace(
        cell,
        values={seed: cell.values[seed] - other.values[seed] for seed in seeds},
        samples={seed: cell.samples[seed] - other.samples[seed] for seed in drawn},
        lacking=bool(cell.samples or other.samples) and len(drawn) < len(seeds),
    )
    return made if seeds else None


def _above(cell: _Cell, other: _Cell) -> _Cell | None:
    """100 where a cell's value is above the other's and else 0, for the training seeds that both have; None
    where there are none.
    """
    seeds = sorted(cell.values.keys() & other.values.keys())
    values = {seed: 100.0 * (cell.values[seed] > other.values[seed]) for seed in seeds}
    return replace(cell, values=values, samples={}, lacking=False) if seeds else None


def _mean_of(cells: Sequence[_Cell]) -> _Cell | None:
    """The mean of cells, for the training seeds that all of them have; None where there are none."""
    import numpy as np

    if len(cells) == 1:
        return cells[0]
    seeds = sorted(set.intersection(*(set(cell.values) for cell in cells)))
    if not seeds:
        return None
    drawn = [seed for seed in seeds if all(seed in cell.samples for cell in cells)]
    return _Cell(
        parts={part: values for cell in cells for part, values in cell.parts.items()},
        values={seed: float(np.mean([cell.values[seed] for cell in cells])) for seed in seeds},
        samples={seed: np.mean([cell.samples[seed] for cell in cells], axis=0) for seed in drawn},
        prompts={key: value for cell in cells for key, value in cell.prompts.items()},
        conditions={key: value for cell in cells for key, value in cell.conditions.items()},
        lacking=any(cell.samples for cell in cells) and len(drawn) < len(seeds),
    )


def _mean_samples(cell: _Cell) -> "Array | None":
    """[R]: the resampled mean over training seeds; None where there is nothing to resample."""
    import numpy as np

    seeds = tuple(sorted(cell.values))
    if cell.lacking:
        return None
    if not cell.samples and len(seeds) < MIN_SEEDS:
        return None
    columns = [
        cell.samples[seed] if cell.samples else np.full(RESAMPLES, cell.values[seed]) for seed in seeds
    ]
    weights = (
        seed_weights(seeds) if len(seeds) >= MIN_SEEDS else np.full((RESAMPLES, len(seeds)), 1 / len(seeds))
    )
    mean: Array = (weights * np.stack(columns, axis=1)).sum(axis=1)
    return mean


def _interval(samples: "Array", level: float = LEVEL) -> list[float]:
    import numpy as np

    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def holm(p_values: Sequence[float]) -> tuple[list[float], list[float]]:
    """(adjusted p-values, each test's own level / alpha) of Holm's step-down procedure, in the given order.

    With p sorted upwards the k-th of m tests (k from 0) is held against alpha / (m - k) until one fails; the
    failed one and those after it share its level.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    count, running, share, failed = len(p_values), 0.0, 1.0, False
    adjusted, shares = [0.0] * count, [0.0] * count
    for k, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (count - k) * p_values[i]))
        if not failed:
            share = 1 / (count - k)
        failed = failed or running >= 1 - LEVEL
        adjusted[i], shares[i] = running, share
    return adjusted, shares


def _compare(column: ColumnInfo, cells: "Sequence[tuple[_Cell, dict[str, Any], Array | None]]") -> None:
    """Adds `best`, `difference` and `test` to the cells of the lines that are compared in one column."""
    import numpy as np

    sign = 1 if column.direction == "higher" else -1
    ready = []
    for cell, out, samples in cells:
        if len(cell.values) < MIN_SEEDS:
            out["test"] = f"not tested: under {MIN_SEEDS} training seeds"
        elif samples is None or not np.isfinite(samples).all():
            out["test"] = "not tested: not defined in every resample"
        else:
            ready.append((cell, out, samples))
    if len(ready) < 2:
        for _, out, _ in ready:
            out["test"] = "not tested: nothing to compare with"
        return
    best_cell, best, best_samples = max(ready, key=lambda one: sign * one[1]["value"])
    best["best"], best["test"] = True, "best"
    others, differences, p_values = [], [], []
    for cell, out, samples in ready:
        if out is best:
            continue
        other = _other(cell, best_cell)
        if other:
            out["test"] = f"not tested: {other}"
            continue
        drawn = samples - best_samples
        tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        others.append(out)
        differences.append(drawn)
        p_values.append(min(1.0, 2 * (tail + 1) / (RESAMPLES + 1)))
    adjusted, shares = holm(p_values)
    for out, drawn, p, p_holm, share in zip(others, differences, p_values, adjusted, shares, strict=True):
        interval = _interval(drawn, 1 - (1 - LEVEL) * share)
        tied = interval[0] <= 0 <= interval[1]
        out["test"] = "tied with the best" if tied else "differs from the best"
        value = out["value"] - best["value"]
        out["difference"] = {"value": value, "interval": interval, "p": p, "p_holm": p_holm, "tied": tied}


def _other(cell: _Cell, best: _Cell, whom: str = "the best row") -> str:
    """What keeps a cell from being compared with the best one or another, '' where nothing does.

    An axis that one of two rows does not have keeps nothing.
    """
    pairs = [
        (mine, theirs)
        for mine in cell.prompts
        for theirs in best.prompts
        if mine[0] == theirs[0] and _agree(cell.parts[mine[1]], best.parts[theirs[1]])
    ]
    met = [{pair[side] for pair in pairs} for side in (0, 1)]
    if met[0] != cell.prompts.keys() or met[1] != best.prompts.keys():
        return f"mean over other values of the spread axes than {whom}"
    for key, other in pairs:
        mine, theirs = cell.prompts[key], best.prompts[other]
        common = mine.keys() & theirs.keys()
        same = all(mine[seed] == theirs[seed] for seed in common)
        if not same or (not common and set(mine.values()) != set(theirs.values())):
            return f"other prompts or task revision than {whom}"
    for key, other in pairs:
        conditions, known = cell.conditions[key], best.conditions[other]
        if conditions and known:
            from kdbench.evidence import require_same_conditions

            try:
                require_same_conditions(known, conditions, (whom, "this"))
            except RecordError as error:
                return str(error)
    return ""


def statistics(board: BoardInfo, entries: Sequence[Entry], size: str | None = None) -> Statistics:
    """All numbers of one board's table as a JSON-able object, for runs of one size (default: published).

    `rows`: in the order of the table, each with `name`, `title`, `axes`, `local`, `reference`, `runs` (seed
    -> run id), `failed` (run id, seed, status, reason) and `cells` (the column's key -> `value`: mean over
    training seeds, `interval`: 95 % or null, `interval_over`, `seeds`: value by seed, `best`, `test`,
    `difference` to the best).

    On a board that spreads axes, which `spread` then names, `runs` has one such table for each combination of
    their values, for example `dataset=sst2`; `over` of a cell lists the combinations behind it, and `axes` of
    a failed run are its values.

    `costs`: by the row's name with axis values, what `kdbench.cost_report` reads; see `_costs`.
    """
    import numpy as np

    size = published_size(board) if size is None else size
    warnings: list[str] = []
    for entry in entries:
        if entry.record.board != board.id:
            warnings.append(f"left out: {entry.path}: is a run of {entry.record.board}, not of {board.id}.")
    used = [entry for entry in entries if entry.record.board == board.id and entry.record.size == size]
    lines, spread = _lines(used, board, warnings), spread_axes(board)
    known = {row.name: row for row in board.rows}
    cells = _cells(lines, board, warnings)
    rows: list[dict[str, Any]] = []
    compared: dict[tuple[str, str], list[tuple[_Cell, dict[str, Any], Array | None]]] = {}
    for line, mine in zip(lines, cells, strict=True):
        example = next(iter(line.entries()), None) or line.failed[0]
        info = known.get(line.name)
        reference = bool(example.record.config.get("reference")) if info is None else info.reference
        title = (info.title if info else str(example.record.config.get("title") or "")) or line.name
        out: dict[str, dict[str, Any]] = {}
        for column in board.columns:
            cell = mine.get(column.key)
            if cell is None:
                continue
            samples = _mean_samples(cell)
            finite = samples is not None and bool(np.isfinite(samples).all())
            over = ["training seeds"] * (len(cell.values) >= MIN_SEEDS) + ["prompts"] * bool(cell.samples)
            interval = _interval(samples) if samples is not None and finite else None
            if interval is not None and column.above:  # seeds weigh more than they are, shares do not
                interval = [min(max(end, 0.0), 100.0) for end in interval]
            out[column.key] = {
                "value": float(np.mean(list(cell.values.values()))),
                "interval": interval,
                "interval_over": over if finite else [],
                "seeds": {str(seed): value for seed, value in sorted(cell.values.items())},
                "best": False,
                "test": "",
                "difference": None,
                **({"over": list(cell.parts)} if spread else {}),
            }
            if column.direction != "none" and (cell.samples or cell.lacking) and not reference:
                group = (column.key, json.dumps(line.axes, sort_keys=True))
                compared.setdefault(group, []).append((cell, out[column.key], samples))
        runs = {
            part: {str(seed): entry.record.run_id for seed, entry in sorted(done.items())}
            for part, done in line.done.items()
        }
        failed = sorted(line.failed, key=lambda e: (e.record.seed, e.record.run_id))
        rows.append(
            {
                "name": line.name,
                "title": title,
                "axes": line.axes,
                "local": line.local,
                "reference": reference,
                "runs": runs if spread else runs.get("", {}),
                "failed": [
                    {key: getattr(entry.record, key) for key in ("run_id", "seed", "status", "reason")}
                    | ({"axes": _spread_values(entry.record, spread)} if spread else {})
                    for entry in failed
                ],
                "cells": out,
            }
        )
    keys = {column.key: column for column in board.columns}
    for (key, _), group_cells in compared.items():
        _compare(keys[key], group_cells)
    return {
        "version": VERSION,
        "board": board.id,
        "title": board.title or board.id,
        "question": board.question,
        "budgets": board.budgets,
        "size": size,
        "resamples": RESAMPLES,
        "question_sha256": _question(board, size),
        **({"spread": spread} if spread else {}),
        "costs": _costs(lines, cells, rows, board.columns),
        "columns": [_column(column) for column in board.columns],
        "rows": _ordered(rows, board),
        "records": {entry.record.run_id: {"sha256": entry.sha256, "local": entry.local} for entry in used},
        "warnings": warnings,
    }


def _drawn_seconds(cell: _Cell, seconds: Mapping[int, float], mean: float) -> "Array | None":
    """[R]: the mean seconds over the training seeds that are drawn, varied by the same factor as their
    geometric mean: the weights of seeds may be negative, seconds may not. None for under three seeds.
    """
    import numpy as np

    if min(seconds.values()) <= 0:
        return None
    logs = {seed: math.log(value) for seed, value in seconds.items()}
    drawn = _mean_samples(_Cell(cell.parts, logs, {}, {}, {}))
    factor: Array | None = None if drawn is None else np.exp(drawn - np.mean(list(logs.values())))
    return None if factor is None else mean * factor


def _costs(
    lines: Sequence[_Line],
    cells: Sequence[Mapping[str, _Cell]],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[ColumnInfo],
) -> dict[str, dict[str, Any]]:
    """What the runs behind each trained row's cell of the ranking column cost, by the row's full name.

    `seconds` (value, interval, seeds), `peak_bytes`, `tokens_sampled`: means over these runs; `curve` as of
    `kdbench.cost.mean_curve`, `environments`: [device, threads, runs at a time] of each kind, and what
    `kdbench.cost.compare` tells; `front` is None where the row cannot be compared, and `left_out` says why.
    """
    import numpy as np

    from kdbench import cost

    rank = next((column for column in columns if column.rank), None)
    costs: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[tuple[str, _Cell, cost.Point]]] = {}
    for line, mine, row in zip(lines, cells, rows, strict=True):
        cell = mine.get(rank.key) if rank is not None else None
        if rank is None or cell is None or row["reference"]:
            continue
        runs = {seed: [line.done[part][seed].record for part in cell.parts] for seed in sorted(cell.values)}
        records = [record for some in runs.values() for record in some]
        seconds = {seed: float(np.mean([r.training_seconds for r in some])) for seed, some in runs.items()}
        mean = float(np.mean(list(seconds.values())))
        drawn = _drawn_seconds(cell, seconds, mean)
        peaks = [record.training_peak_bytes for record in records]
        known = [peak for peak in peaks if peak is not None]
        kinds = [[r.environment.get(key) for key in ("device", "threads", "jobs")] for r in records]
        name = _name(line.name, line.axes, line.local)
        costs[name] = {
            "seconds": {
                "value": mean,
                "interval": None if drawn is None else _interval(drawn),
                "seeds": {str(seed): value for seed, value in seconds.items()},
            },
            "peak_bytes": float(np.mean(known)) if known and len(known) == len(peaks) else None,
            "tokens_sampled": float(np.mean([r.budget.get("tokens_sampled", 0.0) for r in records])),
            "curve": cost.mean_curve(records),
            "environments": [kind for at, kind in enumerate(kinds) if kind not in kinds[:at]],
            "front": None,
            "front_share": None,
            "against": {},
            "left_out": "",
        }
        sign = 1 if rank.direction == "higher" else -1
        quality = _mean_samples(cell)
        quality = sign * quality if quality is not None and np.isfinite(quality).all() else None
        point = cost.Point(sign * float(np.mean(list(cell.values.values()))), mean, quality, drawn)
        groups.setdefault(json.dumps(line.axes, sort_keys=True), []).append((name, cell, point))
    for group in groups.values():
        best = max(group, key=lambda one: (one[2].quality_samples is not None, one[2].quality))[1]
        for name, cell, _ in group:
            costs[name]["left_out"] = _other(cell, best)
        fit = {name: point for name, _, point in group if not costs[name]["left_out"]}
        for name, told in cost.compare(fit).items():
            costs[name] |= told
    return costs


def _column(column: ColumnInfo) -> dict[str, Any]:
    names = ("score", "title", "unit", "direction", "rank", "digits")
    told: dict[str, Any] = {name: getattr(column, name) for name in names}
    if column.at or column.mean or column.against or column.above:
        told |= {"key": column.key, "at": dict(column.at), "mean": list(column.mean)}
    if column.against or column.above:
        told |= {"against": column.against, "above": column.above}
    return told


def _ordered(rows: list[dict[str, Any]], board: BoardInfo) -> list[dict[str, Any]]:
    """Reference rows first, then by the ranking column, best first; rows without its value last."""
    place = {row.name: i for i, row in enumerate(board.rows)}
    rank = next((column for column in board.columns if column.rank), None)

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        cell = row["cells"].get(rank.key) if rank is not None else None
        sign = -1 if rank is not None and rank.direction == "higher" else 1
        value = math.inf if cell is None else sign * cell["value"]
        axes = json.dumps(row["axes"], sort_keys=True)
        if row["reference"]:
            return (axes, 0, 0.0, place.get(row["name"], len(place)), row["name"], row["local"])
        return (
            axes,
            1,
            value if rank else 0.0,
            place.get(row["name"], len(place)),
            row["name"],
            row["local"],
        )

    return sorted(rows, key=key)


# ------------------------------------------------------------------------------------------------ rendering
_WIDTH = 120


def render(statistics: Statistics, format: str = "table") -> str:
    """The statistics as text: `table` (120 columns), `markdown`, `csv` (a line per row and column) or `json`.

    Raises: UserError for another format.
    """
    if format == "table":
        return _table(statistics)
    if format == "markdown":
        return _markdown(statistics)
    if format == "csv":
        return _csv(statistics)
    if format == "json":
        hidden = ("files", "question_sha256", "costs")
        kept = {key: value for key, value in statistics.items() if key not in hidden}
        return json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    raise unknown("format", format, FORMATS)


def _number(value: float, column: Mapping[str, Any]) -> str:
    if column["unit"] == "bytes":
        return f"{value / 1e9:.2f}" if value >= 1e9 else f"{value / 1e9:.3f}"
    return f"{value:,.{column['digits']}f}"


def _unit(column: Mapping[str, Any]) -> str:
    arrow = {"higher": "↑", "lower": "↓"}.get(column["direction"], "")
    unit = "GB" if column["unit"] == "bytes" else column["unit"]
    return " ".join(part for part in (unit, arrow) if part)


def _mark(cell: Mapping[str, Any]) -> str:
    if cell["best"]:
        return "*"
    if cell["difference"] is not None:
        return "=" if cell["difference"]["tied"] else " "
    return "?" if cell["test"] else " "


def _label(row: Mapping[str, Any]) -> str:
    axes = ", ".join(f"{key} {value}" for key, value in row["axes"].items())
    kind = "reference" if row["reference"] else ""
    notes = ", ".join(part for part in (kind, "local" if row["local"] else "") if part)
    return f"{row['title']}" + (f" · {axes}" if axes else "") + (f" ({notes})" if notes else "")


def _runs(row: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Run ids by combination of spread axes ('' where none is spread) and seed."""
    runs: dict[str, Any] = row["runs"]
    return runs if any(isinstance(one, dict) for one in runs.values()) else {"": runs} if runs else {}


def _seeds(row: Mapping[str, Any]) -> str:
    counts: dict[str, int] = {}
    for run in row["failed"]:
        counts[run["status"]] = counts.get(run["status"], 0) + 1
    numbers = sorted({len(runs) for runs in _runs(row).values()})
    parts = ["–".join(map(str, numbers if len(numbers) < 2 else (numbers[0], numbers[-1])))] * bool(numbers)
    return ", ".join(parts + [f"{count} {status}" for status, count in counts.items()])


def _spread(cell: Mapping[str, Any], column: Mapping[str, Any]) -> list[float] | None:
    """The interval where it is shown: of shares and of scores over prompts that have a better and a worse."""
    shown = column.get("above") or "prompts" in cell["interval_over"]
    return cell["interval"] if column["direction"] != "none" and shown else None


def _key(column: Mapping[str, Any]) -> str:
    return str(column.get("key", column["score"]))


def _cell(row: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    cell = row["cells"].get(_key(column))
    if cell is None:
        return "–"
    text = _number(cell["value"], column)
    interval = _spread(cell, column)
    if interval is not None:
        text += f" ±{_number((interval[1] - interval[0]) / 2, column)}"
    return text + _mark(cell)


def _blocks(headers: list[list[str]], body: list[list[str]]) -> list[str]:
    """Aligned text; columns that do not fit the width go into blocks below, each with the row names."""
    widths = [max(len(line[i]) for line in (*headers, *body)) for i in range(len(body[0]))]
    groups: list[list[int]] = [[]]
    for i in range(1, len(widths)):
        used = widths[0] + sum(widths[j] + 2 for j in groups[-1])
        if groups[-1] and used + widths[i] + 2 > _WIDTH:
            groups.append([])
        groups[-1].append(i)
    lines = []
    for number, group in enumerate(groups):
        if number:
            lines.append("")
        rule = "─" * (widths[0] + sum(widths[i] + 2 for i in group))
        for k, line in enumerate([*headers, *body]):
            if k == len(headers):
                lines.append(rule)
            text = line[0].ljust(widths[0]) + "".join("  " + line[i].rjust(widths[i]) for i in group)
            lines.append(text.rstrip())
    return lines


def _means(statistics: Statistics) -> list[str]:
    """What columns are the mean of."""
    columns, axes = statistics["columns"], statistics.get("spread", [])
    lines = [f"{c['title']}: mean of {', '.join(c['mean'])}." for c in columns if c.get("mean")]
    over: dict[str, list[str]] = {}
    for column in columns:
        left = [axis for axis in axes if axis not in column.get("at", {})]
        if left and not column.get("mean") and not column.get("above"):
            over.setdefault(" and ".join(left), []).append(column["title"])
    for said, titles in over.items():
        lines.append(f"{', '.join(titles)}: mean over the values of {said} that a row has.")
    at = "at the same training seed" + (
        f" and, as far as both have them, {' and '.join(axes)}" if axes else ""
    )
    for word, text in (
        ("against", "less {row} {at}."),
        ("above", "% of a row's values above {row} {at}; the interval is over seeds."),
    ):
        beside: dict[str, list[str]] = {}
        for column in columns:
            if column.get(word):
                beside.setdefault(column[word], []).append(column["title"])
        for name, named in beside.items():
            row = next((row["title"] for row in statistics["rows"] if row["name"] == name), name)
            lines.append(f"{', '.join(named)}: {text.format(row=row, at=at)}")
    if lines:
        lines.append("A mean is over those training seeds that have all its parts; – where there is none.")
    return lines


def _legend(statistics: Statistics) -> list[str]:
    marks = {_mark(cell) for row in statistics["rows"] for cell in row["cells"].values()}
    ranked = [column["title"] for column in statistics["columns"] if column["rank"]]
    lines = _means(statistics)
    if ranked:
        lines.append(
            f"Ordered by {ranked[0]}. Values are means over training seeds; ± is half a 95 % interval."
        )
    if marks & {"*", "="}:
        lines.append(
            "* best, = tied with the best: the 95 % interval of the difference (simultaneous, Holm over "
            "rows) contains 0; unmarked: differs."
        )
        lines.append(
            f"Test: paired bootstrap over training seeds and prompts, {statistics['resamples']:,} resamples."
        )
    if "?" in marks:
        lines.append(
            f"? not tested, mostly for under {MIN_SEEDS} training seeds; the interval is over prompts then."
        )
    return lines


def _footer(statistics: Statistics) -> list[str]:
    lines = []
    for row in statistics["rows"]:
        for run in row["failed"]:
            name = _label({**row, "axes": {**row["axes"], **run.get("axes", {})}})
            lines.append(f"{name}: seed {run['seed']} {run['status']}: {run['reason']} (run {run['run_id']})")
    axes = statistics.get("spread", [])
    for row in statistics["rows"]:
        groups = {
            part: ", ".join(f"{seed}: {run}" for seed, run in runs.items())
            for part, runs in _runs(row).items()
        }
        if axes and groups:
            short = f"{axes[0]}=" if len(axes) == 1 else ""
            told = "; ".join(f"{part.removeprefix(short)} ({ids})" for part, ids in groups.items())
            lines.append(f"{_label(row)}: runs by {', '.join(axes)} and seed {told}")
        elif groups:
            lines.append(f"{_label(row)}: runs by seed {groups['']}")
    return lines


def _heading(statistics: Statistics) -> str:
    budgets = ", budgets differ" if statistics["budgets"] != "equal" else ""
    return f"{statistics['title']} ({statistics['board']}, size {statistics['size']}{budgets})"


def _table(statistics: Statistics) -> str:
    columns, rows = statistics["columns"], statistics["rows"]
    lines = [_heading(statistics), *textwrap.wrap(statistics["question"], _WIDTH), ""]
    if rows:
        headers = [
            ["", "seeds", *(c["title"] + " " for c in columns)],
            ["", "", *(_unit(c) + " " for c in columns)],
        ]
        body = [[_label(row), _seeds(row), *(_cell(row, c) for c in columns)] for row in rows]
        lines += _blocks(headers, body)
        lines += ["", *_legend(statistics), "", *_footer(statistics)]
    else:
        lines.append("No runs yet.")
    lines += [f"Warning: {warning}" for warning in statistics["warnings"]]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(statistics: Statistics) -> str:
    columns, rows = statistics["columns"], statistics["rows"]

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    def text(row: Mapping[str, Any], column: Mapping[str, Any]) -> str:
        cell = row["cells"].get(_key(column))
        if cell is None:
            return "–"
        out = _number(cell["value"], column)
        mark = _mark(cell).strip()
        out = f"**{out}**" if mark == "*" else out + (f" {mark}" if mark else "")
        interval = _spread(cell, column)
        if interval is not None:
            out += f" [{_number(interval[0], column)}, {_number(interval[1], column)}]"
        return out

    titles = [" ".join(part for part in (c["title"], _unit(c)) if part) for c in columns]
    lines = [f"# {_heading(statistics)}", "", statistics["question"], ""]
    if rows:
        lines += [line(["", "seeds", *titles]), line(["---", *["---:"] * (len(columns) + 1)])]
        lines += [line([_label(row), _seeds(row), *(text(row, c) for c in columns)]) for row in rows]
        notes = [
            entry.replace("* best", "Bold: best").replace("± is half a", "brackets hold a")
            for entry in _legend(statistics)
        ]
        lines += ["", *[f"- {note}" for note in notes], "", *[f"- {note}" for note in _footer(statistics)]]
    else:
        lines.append("No runs yet.")
    lines += [f"- Warning: {warning}" for warning in statistics["warnings"]]
    return "\n".join(lines).rstrip() + "\n"


_CSV = (
    "board size row title axes local reference column score unit value low high seeds test difference "
    "difference_low difference_high p p_holm runs status reason"
).split()


def _csv(statistics: Statistics) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV, restval="", lineterminator="\n")
    writer.writeheader()
    for row in statistics["rows"]:
        head = {key: statistics[key] for key in ("board", "size")}
        head |= {
            "row": row["name"],
            "title": row["title"],
            "local": row["local"],
            "reference": row["reference"],
        }
        head["axes"] = " ".join(f"{key}={value}" for key, value in row["axes"].items())
        ids = _runs(row)
        for column in statistics["columns"]:
            cell = row["cells"].get(_key(column))
            if cell is None:
                continue
            line = {**head, "column": column["title"], "score": _key(column), "unit": column["unit"]}
            low, high = cell["interval"] or ("", "")
            line |= {
                "value": cell["value"],
                "low": low,
                "high": high,
                "seeds": len(cell["seeds"]),
                "test": cell["test"],
            }
            if cell["difference"] is not None:
                found = cell["difference"]
                low, high = found["interval"]
                line |= {"difference": found["value"], "difference_low": low, "difference_high": high}
                line |= {"p": found["p"], "p_holm": found["p_holm"]}
            behind = [(seed, ids[part][seed]) for part in cell.get("over", [""]) for seed in cell["seeds"]]
            runs = " ".join(f"{seed}:{run}" for seed, run in behind)
            writer.writerow({**line, "runs": runs, "status": "done"})
        for run in row["failed"]:
            one = {"runs": f"{run['seed']}:{run['run_id']}", "status": run["status"], "reason": run["reason"]}
            if "axes" in run:
                one["axes"] = " ".join(f"{k}={value}" for k, value in (row["axes"] | run["axes"]).items())
            writer.writerow({**head, **one})
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ publishing
def _check_publishable(folder: Path, board: BoardInfo) -> tuple[RunRecord, list[str]]:
    record, where = load(folder / "record.json"), folder / "record.json"
    if record.board != board.id:
        raise UserError(f"{where}: is a run of {record.board}, not of {board.id}.")
    if record.status != "done":
        raise UserError(
            f"{where}: the run {record.status} ({record.reason}); only finished runs are published."
        )
    if record.size != published_size(board):
        raise UserError(
            f"{where}: is of size '{record.size}'; {board.id} publishes '{published_size(board)}'."
        )
    if record.seed not in board.seeds:
        seeds = ", ".join(map(str, board.seeds))
        raise UserError(f"{where}: seed {record.seed} is not one of the board's seeds ({seeds}).")
    if record.row not in {row.name for row in board.rows}:
        raise unknown("row", record.row, [row.name for row in board.rows], str(where))
    values = board.row_axis_values(record.row, record.size)
    if record.axes not in values:
        known = [", ".join(f"{axis}={one[axis]}" for axis in one) for one in values]
        given = ", ".join(f"{axis}={value}" for axis, value in record.axes.items())
        raise unknown("axis values", given, known, str(where))
    for analysis in board.analyses:
        if analysis not in record.analyses:
            raise UserError(f"{where}: has no scores of {analysis}; run `kdbench analyze` first.")
    if record.arrays_sha256 is not None:
        load_arrays(folder / "scores.npz", record.arrays_sha256)
    warnings = []
    if record.environment.get("dirty", True):
        warnings.append(f"{where}: was run from a working tree with changes that were not committed.")
    if not record.environment.get("commit"):
        warnings.append(f"{where}: does not say which commit it was run from.")
    return record, warnings


def _place(record: RunRecord) -> tuple[str, str, int]:
    return record.row, json.dumps(record.axes, sort_keys=True), record.seed


def _keep_columns(record: RunRecord, arrays: "Mapping[str, Array]", columns: set[str]) -> "dict[str, Array]":
    """The arrays that these columns read; scores of the record that read others lose their estimator."""
    wanted = {
        name for key, score in record.scores.items() if key in columns for name in score.arrays.values()
    }
    for key, score in record.scores.items():
        if score.estimator is not None and not wanted.issuperset(score.arrays.values()):
            record.scores[key] = replace(score, estimator=None, arrays={}, args={})
    return {name: value for name, value in arrays.items() if name in wanted}


def publish(folders: Sequence[Path], board: BoardInfo, replace: bool = False) -> list[str]:
    """Copies the records and arrays of finished runs into the board, refreshes its statistics and table.

    Of the arrays only those that the board's columns read are copied; a score that read others keeps its
    value.
    Returns warnings. All folders are checked before anything is copied. A run of a row, axis values and seed
    that the board has from another run is refused unless `replace`, which removes the other.

    Raises: UserError or RecordError that names the file and what is wrong.
    """
    if board.folder is None:
        raise UserError(f"{board.id}: has no folder to publish into.")
    target, warnings = board.folder / "records", []
    have, _ = read_entries(published_records(board), local=False)
    taken = {_place(e.record): e for e in have}
    accepted, obsolete = [], []
    given: dict[tuple[str, str, int], Path] = {}
    for folder in folders:
        record, more = _check_publishable(folder, board)
        warnings += more
        key = _place(record)
        if key in given:
            raise UserError(f"{folder}: is of the row, axis values and seed of {given[key]}; publish one.")
        given[key] = folder
        other = taken.get(key)
        if other is not None and other.record.run_id != record.run_id:
            if not replace:
                at = "".join(f", {axis} {value}" for axis, value in record.axes.items())
                raise UserError(
                    f"{folder}: {board.id} has run {other.record.run_id} for row '{record.row}'{at} and seed "
                    f"{record.seed}; printed numbers stay unless they are replaced explicitly."
                )
            obsolete.append(other)
        accepted.append((folder, record))
    columns = {column.score for column in board.columns if not column.mean}
    for folder, record in accepted:
        if record.arrays_sha256 is not None:
            arrays = _keep_columns(record, load_arrays(folder / "scores.npz", record.arrays_sha256), columns)
            record.arrays_sha256 = save_arrays(target / f"{record.run_id}.npz", arrays)
        save(record, target / f"{record.run_id}.json")
    for entry in obsolete:
        entry.path.unlink(missing_ok=True)
        entry.arrays_path.unlink(missing_ok=True)
    result = report(board)
    with atomic(board.folder / "table.md") as file:
        file.write(render(result, "markdown").encode())
    return warnings + list(result["warnings"])
