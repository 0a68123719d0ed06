"""What figures and summaries of exposure bias read: the runs of one row, pooled over training seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kdbench import counterfactuals, intervals, per_prompt
from kdbench.counterfactuals import Intervention, read_intervention
from kdbench.estimators import Array, Arrays
from kdbench.evidence import read_evidence, require_same_conditions
from kdbench.intervals import Estimate
from kdbench.record import RecordError, RunFolder, RunRecord, read_json

VERSION = 2
LENGTHS = (1, 5, 15, 30, 50, 120, 250)
NAME = "exposure_bias"
Band = tuple[Array, Array, Array]


def reach(found: Mapping[str, Array]) -> int:
    """The longest l with a survival of `MIN_SURVIVAL` under student and teacher roll-in, where present."""
    counts = {name: found[name] for name in ("student_count", "teacher_count") if name in found}
    alive = intervals.survival([counts], found["student_count"].shape[1])
    return int((alive >= intervals.MIN_SURVIVAL).sum())


def must_be_of(path: Path, run: str, run_id: str) -> None:
    """Refuses a file whose manifest names another run than the record beside it; '' names none.

    Raises: RecordError naming the file.
    """
    if run not in ("", run_id):
        raise RecordError(f"{path}: belongs to run {run}, not to {run_id}.")


def interventions(run: RunFolder, run_id: str) -> dict[str, tuple[Path, Intervention]]:
    """The interventions that a run has, by name.

    Raises: RecordError naming a file that is damaged, of another run, or not what its name says.
    """
    found = {}
    for name in counterfactuals.NAMES:
        path = run.path / "evidence" / "interventions" / f"{name}.parquet"
        if path.with_suffix(".json").is_file():
            one = read_intervention(path)
            must_be_of(path, one.description.get("run", ""), run_id)
            evidence, mine = run.evidence.with_suffix(".json"), one.description["models"]
            if evidence.is_file() and mine.get("student") != read_json(evidence)["models"].get("student"):
                raise RecordError(f"{path}: is of another student than the run's evidence.")
            if one.description["intervention"] != name:
                raise RecordError(f"{path}: holds the intervention '{one.description['intervention']}'.")
            found[name] = path, one
    return found


@dataclass(frozen=True)
class Row:
    """The scored runs of one row of a board (at one value of each axis), in order of training seed."""

    folders: list[RunFolder]
    records: list[RunRecord]
    arrays: Sequence[Arrays]  # of each run, under the names that `kdbench.per_prompt` gives them
    interventions: Mapping[str, list[Intervention]]  # by name, of every run that has them

    @property
    def name(self) -> str:
        """Row and axes, usable as a file name."""
        record = self.records[0]
        return "-".join([record.row, *(f"{key}-{value}" for key, value in record.axes.items())])

    @property
    def title(self) -> str:
        record = self.records[0]
        axes = "".join(f", {key} {value}" for key, value in record.axes.items())
        return str(record.config.get("title") or record.row) + axes

    @property
    def reference(self) -> bool:
        return bool(self.records[0].config.get("reference"))

    @property
    def detail(self) -> dict[str, Any]:
        """The detail of the first run's analysis."""
        found: dict[str, Any] = self.records[0].analyses[NAME]["detail"]
        return found

    @cached_property
    def same_models(self) -> bool:
        """Whether every stored divergence is exactly 0, as of a teacher with itself."""
        return not any(np.any(run[f"{g}_sum"]) for run in self.arrays for g in ("student", "teacher"))

    @cached_property
    def reach(self) -> int:
        """The longest l that every run reaches."""
        return min(reach(run) for run in self.arrays)

    def length(self, limit: int | None = None) -> int:
        """The largest of `LENGTHS` that is reached (and is at most `limit`)."""
        most = self.reach if limit is None else min(limit, self.reach)
        return max((length for length in LENGTHS if length <= most), default=1)

    def estimate(self, function: intervals.Function, unit: str = "", **args: Any) -> Estimate:
        """An estimator with its interval over prompts and training seeds."""
        return intervals.estimate(function, self.arrays, args, unit=unit)

    def profile(self, name: str) -> "Row | None":
        """The same runs as seen in another decoding profile, None where one of them lacks it."""
        if not all(f"{name}/prompt" in run for run in self.arrays):
            return None
        prefix = f"{name}/"
        views = [
            {key.removeprefix(prefix): value for key, value in run.items() if key.startswith(prefix)}
            for run in self.arrays
        ]
        return replace(self, arrays=views)

    def snapshots(self) -> dict[int, Sequence[Arrays]]:
        """The arrays of each snapshot step that every run has, one per run, student and teacher rolled in."""
        paths = [dict(folder.snapshots()) for folder in self.folders]
        out: dict[int, Sequence[Arrays]] = {}
        for step in sorted(set(paths[0]).intersection(*paths[1:])):
            found = [per_prompt.arrays(read_evidence(mine[step])) for mine in paths]
            if all("teacher_count" in run for run in found):
                out[step] = found
        return out


def rows(runs: RunFolder | Sequence[RunFolder]) -> list[Row]:
    """The scored runs by row, reference rows last.

    Raises: RecordError where a run has no scores of this version, or where evidence or interventions were
    made under different conditions, naming what differs.
    """
    folders = [runs] if isinstance(runs, RunFolder) else list(runs)
    grouped: dict[str, list[tuple[RunFolder, RunRecord]]] = {}
    tried: dict[str, dict[str, Intervention]] = {}
    beside: dict[str, tuple[Path, Intervention]] = {}
    first: tuple[RunFolder, RunRecord] | None = None
    for folder in folders:
        record = folder.record
        if NAME not in record.analyses:
            raise RecordError(f"{folder.path}: has no scores of {NAME} yet.")
        version = record.analyses[NAME]["version"]
        if version != VERSION:
            raise RecordError(
                f"{folder.path}: has scores of {NAME} of version {version}, not {VERSION}; run "
                f"`kdbench analyze {record.run_id} --analysis {NAME}`."
            )
        first = first or (folder, record)
        told = [one.analyses[NAME]["detail"]["conditions"] for one in (first[1], record)]
        require_same_conditions(told[0], told[1], (str(first[0].path), str(folder.path)))
        mine = tried[str(folder.path)] = {}
        for name, (path, one) in interventions(folder, record.run_id).items():
            other, like = beside.setdefault(name, (path, one))
            require_same_conditions(like.made_under, one.made_under, (str(other), str(path)))
            mine[name] = one
        key = json.dumps([record.row, record.axes], sort_keys=True)
        grouped.setdefault(key, []).append((folder, record))
    found = []
    for group in grouped.values():
        group.sort(key=lambda pair: pair[1].seed)
        folders, records, prefix = [one[0] for one in group], [one[1] for one in group], f"{NAME}/"
        loaded = [
            {key.removeprefix(prefix): v for key, v in folder.arrays().items() if key.startswith(prefix)}
            for folder in folders
        ]
        made = [tried[str(folder.path)] for folder in folders]
        named = {name: [one[name] for one in made if name in one] for name in counterfactuals.NAMES}
        found.append(Row(folders, records, loaded, named))
    return sorted(found, key=lambda row: row.reference)
