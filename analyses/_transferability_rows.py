"""What the transferability analysis reads: gains and predictions of a board's pairs of source and target.

Shapes: K training seeds, S sources, T targets. A number that no run has is NaN; a pair whose source is its
target is a self-transfer.
"""

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from kdbench import registry
from kdbench.errors import UserError
from kdbench.estimators import Array
from kdbench.record import RecordError, RunFolder, RunRecord

VERSION = 1
NAME = "transferability"
SCORE = "transfer/score"
BASELINE, TRANSFER, DISTILLED = "pt", "pot", "panda"
ROWS = (BASELINE, TRANSFER, DISTILLED)
PROMPTS = ("student", "prompted.safetensors")  # of a run's folder: what it trained, with its signatures
UNRELATED = "unrelated"  # the relation of pairs that are not marked

GAIN, DISTILLED_GAIN, EARLY = "PoT - PT", "PANDA - PT", "PoT - PT, first evaluation"
METRICS = ("semantic", "semantic_probe", "e_avg", "e_concat", "e_pairwise", "on")
CENTRED = {"own": "semantic_centred", "probe": "semantic_probe_centred"}
_CHOSEN = "chosen"

Key = tuple[int, int, int]  # seed, source and target, as places


def first_evaluation(record: RunRecord) -> tuple[int, float] | None:
    """(student updates, dev score) at the first evaluation; None where dev was not scored.

    The sign of a score of which less is better is turned.
    """
    if not record.curve:
        return None
    first = min(record.curve, key=lambda one: one.step)
    return first.step, _sign(record) * first.score


def _sign(record: RunRecord) -> int:
    return -1 if record.config.get("select", {}).get("direction") == "lower" else 1


def _best_dev(record: RunRecord) -> float:
    """The best dev score of a run, NaN where dev was not scored."""
    return max((_sign(record) * one.score for one in record.curve), default=np.nan)


# -------------------------------------------------------------------------------------------------- one board
@dataclass(frozen=True)
class Pairs:
    """The pairs of one board.

    `baseline` [K, T]: scores of prompt tuning alone. `gains` and `predictions` [K, S, T] by name: what a pair
    gains (points), and what a metric predicts. `tried` [K, S, T]: the best dev score of the transferred
    prompt. `relations` [S, T]: names, '' where the task declares none. `board_metric` is the metric that
    weights the board's distillation. `notes` say what is missing.
    """

    board: str
    sources: list[str]
    targets: list[str]
    seeds: list[int]
    baseline: Array
    gains: dict[str, Array]
    predictions: dict[str, Array]
    tried: Array
    relations: Array
    board_metric: str
    first_steps: list[int]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def selves(self) -> Array:
        """[S, T] bool: the self-transfers."""
        return np.array([[one == other for other in self.targets] for one in self.sources])

    def kept(self, selves: bool) -> Array:
        """[S, T] bool: the pairs that count, with or without self-transfers."""
        return np.ones_like(self.selves) if selves else ~self.selves

    @property
    def kinds(self) -> list[str]:
        """The relations of the board's pairs, in alphabetical order."""
        return sorted({str(one) for one in self.relations.flat} - {""})


def over_seeds(values: Array) -> Array:
    """The mean over the first axis of what is there, NaN where nothing is."""
    there = np.isfinite(values)
    count = there.sum(axis=0)
    total = np.where(there, values, 0.0).sum(axis=0)
    found: Array = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    return found


def read(runs: RunFolder | Sequence[RunFolder]) -> Pairs:
    """The pairs of a board's runs, in the order of its axes.

    Of two runs of one row, pair and seed the one begun last counts.

    Raises: RecordError where the runs are of several boards or sizes, or none of them transfers.
    """
    folders = [runs] if isinstance(runs, RunFolder) else list(runs)
    records = [(folder, folder.record) for folder in folders]
    boards = list(dict.fromkeys(f"{one.board}, size {one.size}" for _, one in records))
    if len(boards) > 1:
        raise RecordError(f"{NAME}: is of one board and size; these runs are of {'; '.join(boards)}.")
    rows = {name: _row(records, name) for name in ROWS}
    if not rows[BASELINE] or not rows[TRANSFER]:
        lacking = " and ".join(name for name in (BASELINE, TRANSFER) if not rows[name])
        raise RecordError(
            f"{NAME}: nothing to judge: there is no scored run of {lacking}; a board needs the rows "
            f"{BASELINE} (axis target) and {TRANSFER} (axes source, target), scored by `transfer`."
        )
    return _pairs(records[0][1], rows)


Found = dict[tuple[str, str, int], tuple[RunFolder, RunRecord]]  # by source ('' for none), target and seed


def _row(records: Iterable[tuple[RunFolder, RunRecord]], name: str) -> Found:
    """The scored runs of the row of that name, else of the first row of the method of that name."""
    scored = [(f, r) for f, r in records if r.value(SCORE) is not None and "target" in r.axes]
    mine = [(folder, record) for folder, record in scored if record.row == name]
    if not mine:
        rows = [record.row for _, record in scored if record.distiller.name == name]
        mine = [(folder, record) for folder, record in scored if record.row in rows[:1]]
    found: Found = {}
    for folder, record in sorted(mine, key=lambda one: one[0].begun):
        source = str(record.axes.get("source", ""))
        if bool(source) == (name != BASELINE):
            found[source, str(record.axes["target"]), record.seed] = folder, record
    return found


def _pairs(first: RunRecord, rows: Mapping[str, Found]) -> Pairs:
    pairs = [key for name in (TRANSFER, DISTILLED) for key in rows[name]]
    sources = _ordered(first.board, "source", {source for source, _, _ in pairs})
    targets = _ordered(first.board, "target", {target for _, target, _ in pairs})
    seeds = sorted({seed for _, _, seed in pairs})
    shape = (len(seeds), len(sources), len(targets))

    def table(of: Callable[[RunRecord], float | None], name: str) -> Array:
        """[K, S, T]: a number of each run of a row of pairs."""
        made = np.full(shape, np.nan)
        for (source, target, seed), (_, record) in rows[name].items():
            at = seeds.index(seed), sources.index(source), targets.index(target)
            made[at] = np.nan if (value := of(record)) is None else value
        return made

    def alone(of: Callable[[RunRecord], float | None]) -> Array:
        """[K, T]: a number of each run of the baseline on a target."""
        made = np.full((shape[0], shape[2]), np.nan)
        for (_, target, seed), (_, record) in rows[BASELINE].items():
            if target in targets and seed in seeds and (value := of(record)) is not None:
                made[seeds.index(seed), targets.index(target)] = value
        return made

    baseline = alone(_score)
    gains = {GAIN: table(_score, TRANSFER) - baseline[:, None]}
    if rows[DISTILLED]:
        gains[DISTILLED_GAIN] = table(_score, DISTILLED) - baseline[:, None]
    step = alone(lambda one: _first(one, 0))[:, None]
    early = table(lambda one: _first(one, 1), TRANSFER) - alone(lambda one: _first(one, 1))[:, None]
    early[table(lambda one: _first(one, 0), TRANSFER) != step] = np.nan  # dev was scored at other steps
    if np.isfinite(early).any():
        gains[EARLY] = early
    predictions, board_metric = _predictions(rows, table)
    predictions |= _centred(rows, sources, targets, seeds)
    return Pairs(
        board=f"{first.board}, size {first.size}",
        sources=sources,
        targets=targets,
        seeds=seeds,
        baseline=baseline,
        gains=gains,
        predictions=predictions,
        tried=table(_best_dev, TRANSFER),
        relations=_relations(first, sources, targets),
        board_metric=board_metric,
        first_steps=sorted({int(one) for one in step.flat if np.isfinite(one)}) if EARLY in gains else [],
        notes=_notes(gains, predictions, sources, targets, seeds),
    )


def _score(record: RunRecord) -> float | None:
    return record.value(SCORE)


def _first(record: RunRecord, at: int) -> float | None:
    found = first_evaluation(record)
    return None if found is None else float(found[at])


def _ordered(board: str, axis: str, names: set[str]) -> list[str]:
    """Names in the order of the board's axis; those that it does not have come last, by name."""
    from kdbench import config

    try:
        known = [str(value) for value in config.load_board(board).axes.get(axis, [])]
    except UserError:
        known = []
    return [name for name in known if name in names] + sorted(names - set(known))


# ------------------------------------------------------------------------------------------------ predictions
def _predictions(
    rows: Mapping[str, Found], table: Callable[[Callable[[RunRecord], float | None], str], Array]
) -> tuple[dict[str, Array], str]:
    """What records of pairs predict by metric, those of the distilled row first; and the board's metric."""
    found: dict[str, Array] = {}
    for metric in (*METRICS, _CHOSEN):
        first, other = (
            table(lambda one, key=f"method/{metric}": one.value(key), name)  # type: ignore[misc]
            for name in (DISTILLED, TRANSFER)
        )
        values = np.where(np.isfinite(first), first, other)
        if np.isfinite(values).any():
            found[metric] = values
    chosen = found.pop(_CHOSEN, None)
    if chosen is None:
        return found, next(iter(found), "")
    there = np.isfinite(chosen)
    for metric, values in found.items():
        if np.array_equal(values[there], chosen[there]):
            return found, metric
    return {_CHOSEN: chosen, **found}, _CHOSEN


def _centred(
    rows: Mapping[str, Found], sources: Sequence[str], targets: Sequence[str], seeds: Sequence[int]
) -> dict[str, Array]:
    """Cosines of the tasks' mean representations less their mean over all tasks, where files hold them.

    The representations are those of prompt tuning with the pair's training seed; a seed with fewer than three
    tasks is left out, for two tasks less their mean are always opposite.
    """
    settings: dict[str, Any] = next(
        (one.config.get("settings", {}) for _, one in rows[DISTILLED].values()), {}
    )
    representation = settings.get("representation", "cls_hidden")
    found: dict[str, Array] = {}
    for inputs, name in CENTRED.items():
        values = np.full((len(seeds), len(sources), len(targets)), np.nan)
        for k, seed in enumerate(seeds):
            vectors = {
                task: vector
                for (_, task, own), (folder, _) in rows[BASELINE].items()
                if own == seed and (vector := _signature(folder, f"{inputs}.{representation}")) is not None
            }
            if len(vectors) < 3:
                continue
            mean = np.mean(list(vectors.values()), axis=0)
            unit = {task: _unit(vector - mean) for task, vector in vectors.items()}
            for s, source in enumerate(sources):
                for t, target in enumerate(targets):
                    if source in unit and target in unit:
                        values[k, s, t] = unit[source] @ unit[target]
        if np.isfinite(values).any():
            found[name] = values
    return found


def _unit(vector: Array) -> Array:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 0 else np.full_like(vector, np.nan)


def _signature(folder: RunFolder, name: str) -> Array | None:
    """A mean representation [H] in float64, None where the run's files hold none.

    Raises: RecordError naming a file that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder.path.joinpath(*PROMPTS)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            if f"signature.{name}" not in file.keys():  # noqa: SIM118  a file is no mapping
                return None
            return np.asarray(file.get_tensor(f"signature.{name}"), dtype=np.float64)
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{path}: is not a safetensors file ({error}).") from None


# ------------------------------------------------------------------------------------ relations, what lacks
def _relations(record: RunRecord, sources: Sequence[str], targets: Sequence[str]) -> Array:
    """[S, T]: what the task's `relation(source, target)` says, '' where it has none or does not know a pair.

    A task that declares none is not imported.
    """
    found = np.full((len(sources), len(targets)), "", dtype=object)
    try:
        path = registry.find("tasks", record.task.name)
        defined = {
            node.name for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.FunctionDef)
        }
        if "relation" not in defined:
            return found
        relation: Any = getattr(registry.load_task(record.task.name), "relation", None)
    except UserError:
        return found  # a task outside the tree that is not here
    for s, source in enumerate(sources):
        for t, target in enumerate(targets):
            try:
                found[s, t] = str(relation(source, target))
            except KeyError:
                continue
    return found


def _notes(
    gains: Mapping[str, Array],
    predictions: Mapping[str, Array],
    sources: Sequence[str],
    targets: Sequence[str],
    seeds: Sequence[int],
) -> list[str]:
    """What pairs lack at all or some seeds, a sentence for all gains and metrics that lack the same."""
    said: dict[str, list[str]] = {}
    for name, values in {**gains, **predictions}.items():
        lacking = ~np.isfinite(values)
        never = [
            f"{sources[s]} to {targets[t]}" for s, t in zip(*np.nonzero(lacking.all(axis=0)), strict=True)
        ]
        partly = int((lacking.any(axis=0) & ~lacking.all(axis=0)).sum())
        parts = []
        if never:
            more = f" and {len(never) - 6} more" if len(never) > 6 else ""
            parts.append(f"{len(never)} of {lacking[0].size} pairs ({', '.join(never[:6])}{more})")
        if partly:
            parts.append(f"{partly} pairs at some of the {len(seeds)} training seeds")
        if parts:
            said.setdefault(" and ".join(parts), []).append(name)
    return [f"Missing: {what}; of {', '.join(names)}." for what, names in said.items()]
