"""Everything known about one run: its record, the arrays beside it, and the folder that holds both.

Source: mteb's result files (both revisions in each) and benchopt's status lists were the examples.

A run folder, and who writes what (all writes are atomic, all text is UTF-8):

    config.json             harness   the resolved config, a JSON object
    record.json             harness   `RunRecord`; analyses add their scores through `RunFolder.add`
    scores.npz              `add`     arrays "<analysis>/<name>", first dimension = prompts
    steps.jsonl             harness   one JSON object per student update
    outputs/<set>.jsonl     harness   one JSON object per prompt and generation seed, see `RunFolder.outputs`
    evidence/final.parquet  harness   per-token evidence of the finished student, see `kdbench.evidence`
    evidence/final-<profile>.parquet                in a further decoding profile, by `kdbench collect`
    evidence/interventions/<name>.parquet           see `kdbench.interventions`, by `kdbench collect`
    evidence/snapshot-<optimizer step>.parquet      the same for a snapshot of training
    fit.json                harness   with `training.fit`: sizes that fit memory, see `kdbench.memory.Fit`
    student/                harness   `from_pretrained` folder

What the harness must put into a record: see the fields of `RunRecord`. A run that ended in NaN has status
`diverged`, one that raised has `failed`; both need a `reason` and are records like any other.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kdbench.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
STATUSES = ("done", "diverged", "failed")
# Phases that make what all methods share, measure, or save, and are no part of a method's training.
NOT_TRAINING = ("stages", "evaluate", "snapshot", "dev", "checkpoint")


class RecordError(UserError):
    """A record, or a file beside it, that cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Named:
    """A name and the identity of its content: a commit, a hash, a hub revision ('' where unknown)."""

    name: str
    revision: str


@dataclass(frozen=True)
class Phase:
    """What one phase of a run cost: wall-clock seconds and peak bytes (None where not measured)."""

    seconds: float
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_rss_bytes: int | None = None


def training_seconds(seconds: Mapping[str, float]) -> float:
    """The seconds of training among those of phases, by name."""
    return sum(value for name, value in seconds.items() if name not in NOT_TRAINING)


@dataclass(frozen=True)
class DevScore:
    """The dev score that weights are selected by, after `step` student updates and so much training time:
    without that of evaluation, snapshots and checkpoints.
    """

    step: int
    train_seconds: float
    score: float


@dataclass(frozen=True)
class Score:
    """One number of one run, with what is needed to compute it again on resampled prompts.

    `estimator` names a function of `kdbench.estimators.ESTIMATORS`; `arrays` maps the names of its inputs to
    names in scores.npz, `args` holds its scalar arguments. Two entries of `arrays` are not inputs only:
    `prompt` ([P] int64, which prompt a row belongs to) and `stratum` ([P] int64, the set that it was drawn
    from); resampling is paired over `prompt` and done within each `stratum`. `value` is None where the
    estimator is not defined on the data; `detail` then says why. `n` counts the independent units (prompts).
    """

    value: float | None
    unit: str
    n: int
    direction: str = "none"
    estimator: str | None = None
    arrays: dict[str, str] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class Analysis:
    """What an analysis returns: scores, the arrays they are computed from, and a JSON-able `detail`.

    In `scores`, array names are those of `arrays`; `RunFolder.add` prefixes both with the analysis' name.
    """

    scores: dict[str, Score]
    arrays: "dict[str, np.ndarray[Any, Any]]" = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunRecord:
    """One run. Field by field what the harness fills:

    run_id        letters, digits, '.', '_', '-'; unique within a board
    board, size   e.g. 'tiny-instruct/v1' and 'full'; row: the row's name in board.toml
    distiller, task, models     name and revision each; models by role ('student', 'teacher', ...)
    seed          the training seed; axes: the value of each axis of the board ({} where it has none)
    config        the resolved config, as in config.json
    environment   'commit' (str), 'dirty' (bool), 'torch', 'transformers', 'python' (version strings),
                  'device' ('cpu' or the GPU's name), 'threads' (int), 'jobs' (int: how many runs were made
                  at a time); nothing that names the host or a user
    budget        numbers: 'optimizer_steps' (of the student), 'prompts', 'tokens_seen', 'tokens_sampled',
                  'init_steps' (optimizer steps of the common student init), more where useful, such as
                  the 'micro_batch' and 'rollout_batch' that `training.fit` found
    phases        'prepare', 'rollout', 'update', 'evaluate', ...; disjoint, so that they may be added
    curve         the dev scores during training, where some were measured (`select.every` of the config)
    scores        '<analysis>/<score>' -> Score; analyses: '<analysis>' -> {'version': int, 'detail': ...}
    arrays_sha256 hash of scores.npz, None while there is none; kept by `RunFolder.add`
    """

    run_id: str
    board: str
    size: str
    row: str
    distiller: Named
    task: Named
    models: dict[str, Named]
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    budget: dict[str, float]
    phases: dict[str, Phase]
    axes: dict[str, Any] = field(default_factory=dict)
    curve: list[DevScore] = field(default_factory=list)
    scores: dict[str, Score] = field(default_factory=dict)
    analyses: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: str = "done"
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    arrays_sha256: str | None = None
    schema: int = SCHEMA

    @property
    def training_phases(self) -> dict[str, Phase]:
        """The phases that are part of the method's training."""
        return {name: phase for name, phase in self.phases.items() if name not in NOT_TRAINING}

    @property
    def training_seconds(self) -> float:
        """Seconds of training."""
        return training_seconds({name: phase.seconds for name, phase in self.phases.items()})

    @property
    def training_peak_bytes(self) -> int | None:
        """The most memory of the training phases: allocated on a GPU, or resident where there is none."""
        phases = self.training_phases.values()
        for found in ([p.peak_allocated_bytes or 0 for p in phases], [p.peak_rss_bytes or 0 for p in phases]):
            if any(found):
                return max(found)
        return None

    def conditions(self, name: str) -> Mapping[str, Any]:
        """What the evidence behind a score was made under, as its analysis says; {} where it says nothing.

        See `kdbench.evidence.conditions`; a score `<analysis>/<profile>/...` has those of its profile.
        """
        analysis, profile, *_ = [*name.split("/"), ""]
        detail = self.analyses.get(analysis, {}).get("detail", {})
        found: Mapping[str, Any] = detail.get("profiles", {}).get(profile, detail).get("conditions", {})
        return found

    def value(self, name: str) -> float | None:
        """The value of the score `name`, or of `record.<path>`, e.g. `record.budget/optimizer_steps`.

        `record.phases/<phase>/seconds` reads one phase; a path that leads nowhere gives None.
        """
        if not name.startswith("record."):
            score = self.scores.get(name)
            return None if score is None else score.value
        found: Any = self
        for key in name.removeprefix("record.").split("/"):
            found = found.get(key) if isinstance(found, Mapping) else getattr(found, key, None)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


# ------------------------------------------------------------------------------------------------ files
@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` complete or not at all (temporary file, fsync, rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as JSON, atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`. Raises RecordError, naming the file, when it cannot be read or parsed."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: is not JSON ({error}).") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in `path`, one per line. Raises RecordError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error}).") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RecordError(f"{path}, line {number}: is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise RecordError(f"{path}, line {number}: is not a JSON object.")
        rows.append(row)
    return rows


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_arrays(path: Path, arrays: "Mapping[str, np.ndarray[Any, Any]]") -> str:
    """Writes `arrays` (no object dtypes) as a compressed .npz, atomically; returns the file's SHA-256."""
    import numpy as np

    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise RecordError(f"{path}: array '{name}' holds Python objects, not numbers or text.")
    with atomic(path) as file:
        content: dict[str, Any] = dict(sorted(arrays.items()))
        np.savez_compressed(file, **content)
    return sha256(path)


def load_arrays(path: Path, expected_sha256: str | None = None) -> "dict[str, np.ndarray[Any, Any]]":
    """The arrays of a .npz. Raises RecordError when it is missing, torn, pickled, or has another hash."""
    import zipfile
    import zlib

    import numpy as np

    torn = (zipfile.BadZipFile, zlib.error)
    try:
        if expected_sha256 is not None and sha256(path) != expected_sha256:
            raise RecordError(f"{path}: is not the file that its record describes (other SHA-256).")
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, NotImplementedError, *torn) as error:
        raise RecordError(f"{path}: cannot be read as arrays ({error}).") from None


# --------------------------------------------------------------------------------------------- validation
def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


class _Reader:
    """Reads one JSON object field by field; every complaint names the file and the key."""

    def __init__(self, data: Any, where: str, key: str = "") -> None:
        if not isinstance(data, dict):
            raise RecordError(f"{where}: {key or 'the record'} should be an object, is {_kind(data)}.")
        self.data, self.where, self.prefix = data, where, f"{key}/" if key else ""

    def fail(self, key: str, complaint: str) -> RecordError:
        return RecordError(f"{self.where}: '{self.prefix}{key}' {complaint}.")

    def only(self, known: list[str], required: list[str]) -> None:
        for key in required:
            if key not in self.data:
                raise self.fail(key, "is missing")
        for key in self.data:
            if key not in known:
                near = nearest(str(key), known)
                hint = f" (nearest: '{near}')" if near else ""
                raise self.fail(str(key), f"is not a field of schema {SCHEMA}{hint}")

    def text(self, key: str, default: str = "", empty: bool = False) -> str:
        value = self.data.get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, f"should be a text, is {_kind(value)}")
        if not value and not empty:
            raise self.fail(key, "is empty")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"should be a whole number, is {_kind(value)}")
        return value

    def number(self, key: str, optional: bool = False) -> float | None:
        value = self.data.get(key)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"should be a number, is {_kind(value)}")
        if not math.isfinite(value):
            raise self.fail(key, f"should be finite, is {value}")
        return value

    def size(self, key: str) -> int | None:
        return None if self.data.get(key) is None else self.whole(key)

    def table(self, key: str) -> dict[str, Any]:
        value = self.data.get(key, {})
        if not isinstance(value, dict):
            raise self.fail(key, f"should be an object, is {_kind(value)}")
        return value

    def each(self, key: str) -> "Iterator[tuple[str, _Reader]]":
        for name, value in self.table(key).items():
            yield name, _Reader(value, self.where, f"{self.prefix}{key}/{name}")

    def named(self) -> Named:
        self.only(["name", "revision"], ["name", "revision"])
        return Named(self.text("name"), self.text("revision", empty=True))

    def phase(self) -> Phase:
        sizes = ["peak_allocated_bytes", "peak_reserved_bytes", "peak_rss_bytes"]
        self.only(["seconds", *sizes], ["seconds"])
        seconds = self.number("seconds")
        assert seconds is not None
        return Phase(seconds, *(self.size(key) for key in sizes))

    def dev_score(self) -> DevScore:
        names = list(DevScore.__dataclass_fields__)
        self.only(names, names)
        seconds, score = self.number("train_seconds"), self.number("score")
        assert seconds is not None
        assert score is not None
        return DevScore(self.whole("step"), seconds, score)

    def score(self) -> Score:
        known = list(Score.__dataclass_fields__)
        self.only(known, ["value", "unit", "n"])
        direction = self.text("direction", "none")
        if direction not in ("higher", "lower", "none"):
            raise self.fail("direction", f"should be higher, lower or none, is '{direction}'")
        arrays = self.table("arrays")
        for name, value in arrays.items():
            if not isinstance(value, str):
                raise self.fail("arrays", f"should map names to names, has {_kind(value)} at '{name}'")
        estimator = None if self.data.get("estimator") is None else self.text("estimator")
        return Score(
            value=self.number("value", optional=True),
            unit=self.text("unit", empty=True),
            n=self.whole("n"),
            direction=direction,
            estimator=estimator,
            arrays=arrays,
            args=self.table("args"),
            detail=self.table("detail"),
        )


def validate(data: Any, where: str = "record") -> RunRecord:
    """The record in `data` (parsed JSON). Raises RecordError with `where` and the first thing found wrong."""
    top = _Reader(data, where)
    schema = top.whole("schema") if "schema" in top.data else None
    if schema is None:
        raise top.fail("schema", "is missing, so this is not a run record")
    if schema != SCHEMA:
        raise top.fail("schema", f"is {schema}, this kdbench reads {SCHEMA}")
    known = list(RunRecord.__dataclass_fields__)
    optional = {"axes", "curve", "scores", "analyses", "reason", "notes", "arrays_sha256"}
    top.only(known, [key for key in known if key not in optional])
    run_id, status, reason = top.text("run_id"), top.text("status"), top.text("reason", empty=True)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_id):
        raise top.fail("run_id", f"may hold letters, digits, '.', '_' and '-' only, is '{run_id}'")
    if status not in STATUSES:
        raise top.fail("status", f"should be one of {', '.join(STATUSES)}, is '{status}'")
    if status != "done" and not reason:
        raise top.fail("reason", f"is empty, a {status} run needs one")
    budget = {
        key: _Reader({key: value}, where, "budget").number(key) for key, value in top.table("budget").items()
    }
    notes = top.data.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise top.fail("notes", "should be a list of texts")
    curve = top.data.get("curve", [])
    if not isinstance(curve, list):
        raise top.fail("curve", f"should be a list, is {_kind(curve)}")
    analyses = {}
    for name, reader in top.each("analyses"):
        reader.whole("version")
        analyses[name] = reader.data
    return RunRecord(
        run_id=run_id,
        board=top.text("board"),
        size=top.text("size"),
        row=top.text("row"),
        distiller=_Reader(top.data["distiller"], where, "distiller").named(),
        task=_Reader(top.data["task"], where, "task").named(),
        models={role: reader.named() for role, reader in top.each("models")},
        seed=top.whole("seed"),
        config=top.table("config"),
        environment=top.table("environment"),
        budget={key: value for key, value in budget.items() if value is not None},
        phases={name: reader.phase() for name, reader in top.each("phases")},
        axes=top.table("axes"),
        curve=[_Reader(point, where, f"curve/{at}").dev_score() for at, point in enumerate(curve)],
        scores={name: reader.score() for name, reader in top.each("scores")},
        analyses=analyses,
        status=status,
        reason=reason,
        notes=notes,
        arrays_sha256=None if top.data.get("arrays_sha256") is None else top.text("arrays_sha256"),
    )


def load(path: Path) -> RunRecord:
    """The record in the file `path`. Raises only RecordError, which names the file and what is wrong."""
    return validate(read_json(path), str(path))


def save(record: RunRecord, path: Path) -> None:
    """Writes `record` to `path`, atomically. Raises RecordError when it would not load again."""
    data = asdict(record)
    validate(data, str(path))
    try:
        write_json(path, data)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{path}: the record cannot be written as JSON ({error}).") from None


def _check_rows(analysis: Analysis, where: str) -> None:
    """Refuses scores whose arrays are missing or differ in their number of prompts. Raises RecordError."""
    for key, score in analysis.scores.items():
        lost = [array for array in score.arrays.values() if array not in analysis.arrays]
        if lost:
            raise RecordError(f"{where}: score '{key}' reads '{lost[0]}', which is not among the arrays.")
        rows = {len(analysis.arrays[array]) for array in score.arrays.values()}
        if len(rows) > 1:
            raise RecordError(f"{where}: the arrays of score '{key}' differ in prompts: {sorted(rows)}.")


class RunFolder:
    """The files of one run; reads on demand and holds nothing."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        data = read_json(self.path / "config.json")
        if not isinstance(data, dict):
            raise RecordError(f"{self.path / 'config.json'}: should be an object, is {_kind(data)}.")
        return data

    @property
    def record(self) -> RunRecord:
        """record.json, validated."""
        return load(self.path / "record.json")

    @property
    def begun(self) -> float:
        """When the run was begun, in seconds: the time of config.json, which is written once."""
        first = self.path / "config.json"
        return (first if first.is_file() else self.path / "record.json").stat().st_mtime

    def steps(self) -> list[dict[str, Any]]:
        """steps.jsonl, one object per student update."""
        return read_jsonl(self.path / "steps.jsonl")

    def output_sets(self) -> list[str]:
        """The names of the test sets with outputs, sorted."""
        return sorted(path.stem for path in (self.path / "outputs").glob("*.jsonl"))

    def outputs(self, set_name: str) -> list[dict[str, Any]]:
        """outputs/<set_name>.jsonl, one object per prompt and generation seed:

        `example_id` (int), `set` (text), `seed` (int, the generation seed), `prompt`, `response` (texts,
        decoded without special tokens), `references` (list of texts), `tokens` (int, response tokens
        including the end token), `finished` (bool, the end token was produced). Optional `scored_by`:
        `exact_match` keeps the set out of the mean ROUGE-L over sets.
        """
        return read_jsonl(self.path / "outputs" / f"{set_name}.jsonl")

    @property
    def evidence(self) -> Path:
        """evidence/final.parquet, whether it exists or not."""
        return self.path / "evidence" / "final.parquet"

    def evidence_of(self, profile: str = "") -> Path:
        """evidence/final-<profile>.parquet, of a further decoding profile; '' is the board's own."""
        return self.evidence.with_name(f"final-{profile}.parquet") if profile else self.evidence

    def profiles(self) -> list[str]:
        """The further decoding profiles that have evidence, sorted."""
        found = (self.path / "evidence").glob("final-*.parquet")
        return sorted(path.stem.removeprefix("final-") for path in found)

    def snapshots(self) -> list[tuple[int, Path]]:
        """(optimizer step, evidence/snapshot-<step>.parquet), in order of steps."""
        found = (self.path / "evidence").glob("snapshot-*.parquet")
        steps = ((path.stem.removeprefix("snapshot-"), path) for path in found)
        return sorted((int(step), path) for step, path in steps if step.isdigit())

    def arrays(self) -> "dict[str, np.ndarray[Any, Any]]":
        """scores.npz, checked against the record's hash; {} where the record has none."""
        expected = self.record.arrays_sha256
        return {} if expected is None else load_arrays(self.path / "scores.npz", expected)

    def add(self, name: str, version: int, analysis: Analysis) -> RunRecord:
        """Puts an analysis' scores into record.json, its arrays into scores.npz, and returns the new record.

        What the same analysis had put there is replaced. Killed in between, the two disagree, which loading
        says; running `add` again mends it.
        """
        record, path = self.record, self.path / "scores.npz"
        prefix = f"{name}/"
        arrays = {} if record.arrays_sha256 is None else load_arrays(path)
        arrays = {key: value for key, value in arrays.items() if not key.startswith(prefix)}
        arrays |= {prefix + key: value for key, value in analysis.arrays.items()}
        scores = {key: value for key, value in record.scores.items() if not key.startswith(prefix)}
        for key, score in analysis.scores.items():
            named = {argument: prefix + array for argument, array in score.arrays.items()}
            scores[prefix + key] = Score(**{**score.__dict__, "arrays": named})
        record.scores = scores
        record.analyses[name] = {"version": version, "detail": analysis.detail}
        validate(asdict(record), f"{self.path}: analysis {name}")  # before anything is written
        _check_rows(analysis, f"{self.path}: analysis {name}")
        if arrays:
            record.arrays_sha256 = save_arrays(path, arrays)
        save(record, self.path / "record.json")
        return record
