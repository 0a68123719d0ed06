"""Per-token evidence: what student and teacher said at every token of every roll-in, in Parquet.

Source: the quantities are those of Arora et al. 2022, https://arxiv.org/abs/2204.01171, and of MiniLLM's
`evaluate_exposure_bias.py`; q is the student, p the teacher, all values in nats over the full vocabulary.

What a collector must deliver to `write_evidence`: flat columns (`COLUMNS`), one row per token, in any order.
For a prompt x of m tokens and a response y of n >= 1 tokens *including the end token if it was produced*:

    response rows   position t = 0..n-1, token = y_t, alive = True, context = False. All values belong to the
                    two next-token distributions that PREDICT y_t, i.e. given x and y_0..y_{t-1}. Position 0
                    is the first response token, its distributions are those at the last prompt token. A
                    response that ended has the end token in its last row.
    extra row       only for a response without end token (cut at max_new_tokens): position n, token = -1,
                    alive = False, context = False: the distributions given all of x and y. There
                    `student_log_prob`, `teacher_log_prob` are NaN and `teacher_rank` is -1, the rest is real.
    context rows    for draw 0 of each roll-in only (they depend on neither); a snapshot has none: prompt
                    token i = 1..m-1 (the first has no prediction) at position i - m, token = x_i,
                    alive = False, context = True.

    roll_in         who wrote y: 'student', 'teacher' or 'reference' (text cut and ended like a sample)
    example_id      the prompt; draw = 0..S-1, every prompt has the same number of draws within a roll-in
    student_log_prob, teacher_log_prob      log q(y_t), log p(y_t)
    forward_kl, reverse_kl, jsd, total_variation    KL(p||q), KL(q||p), JSD (beta 0.5), TV: finite, >= 0
    student_entropy, teacher_entropy        nats
    top1_agree      argmax q == argmax p
    teacher_rank    number of tokens v with p(v) > p(y_t); 0 for the teacher's first choice

One file holds one student under all its roll-ins in one decoding profile: `final.parquet` (the board's
profile) and `final-<profile>.parquet` under student, teacher and (where there is reference text) reference;
a snapshot needs student and teacher roll-ins for ExAccErr, with the student's alone only the accumulated
error is known. Positions are 0-based here; a length l counts positions 0..l-1.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdbench.record import RecordError, atomic, read_json, sha256, write_json

SCHEMA = 1
ROLL_INS = ("student", "teacher", "reference")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation")
COLUMNS: dict[str, type[np.generic]] = {
    "example_id": np.int64,
    "draw": np.int32,
    "position": np.int32,
    "token": np.int32,
    "alive": np.bool_,
    "context": np.bool_,
    "student_log_prob": np.float32,
    "teacher_log_prob": np.float32,
    "forward_kl": np.float32,
    "reverse_kl": np.float32,
    "jsd": np.float32,
    "total_variation": np.float32,
    "student_entropy": np.float32,
    "teacher_entropy": np.float32,
    "top1_agree": np.bool_,
    "teacher_rank": np.int32,
}
Array = NDArray[Any]


@dataclass(frozen=True)
class Manifest:
    """What the rows were made from; two files may be compared in pairs only where all but the student agree.

    `prompts_sha256`: `prompts_hash` of the prompts. `decoding`: 'max_new_tokens', 'temperature', 'top_k',
    'top_p', 'no_repeat_ngram'. `models`: hash of the weights by role, 'student' and 'teacher'. `dtype` of the
    forwards. `seed` of the sampling streams. `profile`: the decoding profile's name, 'plain' or 'minillm'
    (6-gram ban). `step`: optimizer step of a snapshot, None for the finished student. `run`: the id of the
    run that the student belongs to, '' where there is none.
    """

    profile: str
    prompts_sha256: str
    decoding: dict[str, Any]
    models: dict[str, str]
    dtype: str
    seed: int
    step: int | None = None
    run: str = ""

    @property
    def max_new_tokens(self) -> int:
        return int(self.decoding["max_new_tokens"])


# what must agree before two files are compared prompt by prompt, and how it is said
_CONDITIONS = {
    "prompts_sha256": "prompts",
    "teacher": "teacher",
    "decoding": "decoding settings",
    "dtype": "dtype",
    "seed": "seed of the sampling",
    "settings": "settings",  # of an intervention
}


def conditions(manifest: Manifest) -> dict[str, Any]:
    """What the numbers of two students must share to be compared prompt by prompt, as JSON values."""
    return {
        "prompts_sha256": manifest.prompts_sha256,
        "teacher": manifest.models.get("teacher", ""),
        "decoding": dict(manifest.decoding),
        "dtype": manifest.dtype,
        "seed": manifest.seed,
    }


def require_same_conditions(
    one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str] = ("the first", "the second")
) -> None:
    """Refuses a paired comparison of evidence made under other `conditions`.

    Raises: RecordError naming what differs, and how.
    """
    found = []
    for key, said in _CONDITIONS.items():
        mine, theirs = one.get(key), other.get(key)
        if mine == theirs:
            continue
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            inner = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
            found += [f"{said} ({k} {mine.get(k)} and {theirs.get(k)})" for k in inner]
        else:
            found.append(f"{said} ({str(mine)[:12]} and {str(theirs)[:12]})")
    if found:
        raise RecordError(f"{names[0]} and {names[1]} cannot be compared in pairs: other {'; '.join(found)}.")


def prompts_hash(prompts: Sequence[tuple[int, Sequence[int]]]) -> str:
    """SHA-256 of a prompt set: (example_id, prompt token ids) in order of example_id."""
    text = json.dumps(sorted((int(i), [int(token) for token in ids]) for i, ids in prompts))
    return hashlib.sha256(text.encode()).hexdigest()


class Evidence:
    """Evidence in memory: `manifest` and `columns`, one array [rows] each.

    Rows are in order of roll-in, example, draw, position; `roll_in` is [rows] int8, an index into `ROLL_INS`.
    """

    def __init__(self, columns: Mapping[str, Array], roll_in: Array, manifest: Manifest) -> None:
        self.columns, self.roll_in, self.manifest = dict(columns), roll_in, manifest

    @cached_property
    def roll_ins(self) -> list[str]:
        """The roll-ins present."""
        return [ROLL_INS[i] for i in np.unique(self.roll_in)]

    def _rows(self, roll_in: str) -> tuple[Array, Array, Array]:
        """Indices [N] of a roll-in's response and extra rows, the response of each [N], example_id [P*S]."""
        if roll_in not in self.roll_ins:
            raise RecordError(f"the evidence has no {roll_in} roll-in; it has {', '.join(self.roll_ins)}.")
        rows = np.flatnonzero((self.roll_in == ROLL_INS.index(roll_in)) & ~self.columns["context"])
        starts = self.columns["position"][rows] == 0
        return rows, np.cumsum(starts) - 1, self.columns["example_id"][rows[starts]]

    def _spread(self, rows: Array, response: Array, at: Array, column: str, count: int, width: int) -> Array:
        source = self.columns[column]
        out = np.zeros((count, width), dtype=source.dtype)
        out[response, at] = source[rows]
        return out

    def matrix(self, roll_in: str, column: str) -> tuple[Array, Array, Array]:
        """(values [P*S, T], alive [P*S, T] bool, example_id [P*S]).

        Column t is position t; values are 0 where not alive. Responses are in order of example_id, then draw;
        T is the longest response of this roll-in.
        """
        rows, response, examples = self._rows(roll_in)
        keep = self.columns["alive"][rows]
        rows, response = rows[keep], response[keep]
        at = self.columns["position"][rows]
        width = int(at.max()) + 1
        alive = self._spread(rows, response, at, "alive", len(examples), width)
        return self._spread(rows, response, at, column, len(examples), width), alive, examples

    def after(self, roll_in: str, column: str) -> tuple[Array, Array, Array]:
        """As `matrix`, but column j is position j + 1: the distributions *after* response token j was read.

        `alive` [P*S, J] is True where token j exists and is not the end token: positions 1..n-1 of a response
        that ended, 1..n (the extra row) of one that was cut. These are the rows of MiniLLM's script.
        """
        rows, response, examples = self._rows(roll_in)
        keep = self.columns["position"][rows] >= 1
        rows, response = rows[keep], response[keep]
        at = self.columns["position"][rows] - 1
        width = int(at.max()) + 1 if len(at) else 0
        alive = np.zeros((len(examples), width), dtype=bool)
        alive[response, at] = True
        return self._spread(rows, response, at, column, len(examples), width), alive, examples

    @cached_property
    def has_context(self) -> bool:
        """Whether the prompts' own tokens were measured too."""
        return bool(self.columns["context"].any())

    def context(self, roll_in: str, column: str) -> tuple[Array, Array]:
        """(sum of a column over the context rows of each prompt [P] float64, example_id [P]).

        A prompt of one token has no context row; its sum is 0.
        Raises: RecordError when the evidence has no context rows under this roll-in.
        """
        _, _, examples = self._rows(roll_in)
        prompts = np.unique(examples)
        inside = np.flatnonzero((self.roll_in == ROLL_INS.index(roll_in)) & self.columns["context"])
        if not len(inside):
            raise RecordError(f"the evidence has no context rows under {roll_in} roll-in; collect it again.")
        at = np.searchsorted(prompts, self.columns["example_id"][inside])
        return np.bincount(at, self.columns[column][inside].astype(np.float64), len(prompts)), prompts

    def finished(self, roll_in: str) -> tuple[Array, Array]:
        """([P*S] bool, the response ended with the end token; example_id [P*S])."""
        rows, response, examples = self._rows(roll_in)
        ended = np.ones(len(examples), dtype=bool)
        ended[response[~self.columns["alive"][rows]]] = False
        return ended, examples


def _check(columns: Mapping[str, Array], roll_in: Array, where: str) -> None:
    """Raises RecordError when sorted rows break the contract of this module."""

    def refuse(bad: Array, what: str) -> None:
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            row = ", ".join(f"{name} {columns[name][at]}" for name in ("example_id", "draw", "position"))
            raise RecordError(f"{where}: {what} (roll_in {ROLL_INS[roll_in[at]]}, {row}).")

    position, alive, context = columns["position"], columns["alive"], columns["context"]
    if not len(position):
        raise RecordError(f"{where}: no rows.")
    key = np.stack([roll_in.astype(np.int64), columns["example_id"], columns["draw"]])
    same = np.zeros(len(position), dtype=bool)  # the row before belongs to the same response
    same[1:] = (key[:, 1:] == key[:, :-1]).all(axis=0)
    step = np.diff(position, prepend=position[:1])
    refuse(same & (step <= 0), "a row occurs twice")
    refuse(context & (alive | (position >= 0)), "a context row is alive or not before the response")
    refuse(~context & (position < 0), "a response row has a negative position")
    before = np.roll(context, 1)
    first = ~context & (~same | before)
    refuse(first & ((position != 0) | ~alive), "a response does not begin with a live row at position 0")
    refuse(~context & ~first & (step != 1), "a position is missing")
    refuse(~context & ~first & ~np.roll(alive, 1), "a row follows the end of its response")
    extra = ~alive & ~context
    refuse(extra & (columns["token"] != -1), "the row after the last token has a token other than -1")
    last_is_context = context & ~np.append(same[1:], False)
    refuse(last_is_context, "context rows without a response")
    for name in (*DIVERGENCES, "student_entropy", "teacher_entropy"):
        refuse(~np.isfinite(columns[name]) | (columns[name] < 0), f"{name} is negative or not finite")
    for name in ("student_log_prob", "teacher_log_prob"):
        bad = ~np.isfinite(columns[name]) | (columns[name] > 1e-6)
        refuse(bad & ~extra, f"{name} is no log-probability")
    for code in np.unique(roll_in):
        examples = columns["example_id"][first & (roll_in == code)]
        _, counts = np.unique(examples, return_counts=True)
        if counts.min() != counts.max():
            raise RecordError(f"{where}: prompts differ in draws under {ROLL_INS[code]} roll-in.")


def _sorted(columns: Mapping[str, Array], roll_in: Array) -> tuple[dict[str, Array], Array]:
    order = np.lexsort((columns["position"], columns["draw"], columns["example_id"], roll_in))
    return {name: columns[name][order] for name in COLUMNS}, roll_in[order]


def assemble(columns: Mapping[str, Any], manifest: Manifest, where: str = "evidence") -> Evidence:
    """Evidence of `columns` (name -> [rows]; `COLUMNS`, and `roll_in` as text), sorted and checked.

    Values that are negative by rounding only (down to -1e-4) are set to 0.
    Raises: RecordError, beginning with `where`, when a column is missing or the rows break the contract.
    """
    known = ["roll_in", *COLUMNS]
    missing, odd = [n for n in known if n not in columns], [n for n in columns if n not in known]
    if missing or odd:
        raise RecordError(f"{where}: columns missing: {missing}, unknown: {odd}.")
    names = np.asarray(columns["roll_in"])
    if not np.isin(names, ROLL_INS).all():
        raise RecordError(f"{where}: roll_in should be one of {', '.join(ROLL_INS)}.")
    codes = np.zeros(len(names), dtype=np.int8)
    for code, name in enumerate(ROLL_INS):
        codes[names == name] = code
    data = {name: np.asarray(columns[name]).astype(kind) for name, kind in COLUMNS.items()}
    if len({len(value) for value in (names, *data.values())}) != 1:
        raise RecordError(f"{where}: columns differ in length.")
    for name in (*DIVERGENCES, "student_entropy", "teacher_entropy"):
        data[name][(data[name] < 0) & (data[name] > -1e-4)] = 0
    for name in ("student_log_prob", "teacher_log_prob"):
        data[name][(data[name] > 0) & (data[name] < 1e-4)] = 0
    data, codes = _sorted(data, codes)
    _check(data, codes, where)
    return Evidence(data, codes, manifest)


def write_evidence(path: Path, columns: Mapping[str, Any], manifest: Manifest) -> None:
    """Writes what `assemble` makes of `columns`, and the manifest beside it.

    The manifest is `path` with suffix .json and is written last, so evidence is complete when `read_evidence`
    accepts it.
    Raises: RecordError as `assemble`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = assemble(columns, manifest, str(path))
    rolls = pa.DictionaryArray.from_arrays(pa.array(made.roll_in), pa.array(ROLL_INS))
    values = {name: pa.array(value) for name, value in made.columns.items()}
    manifest_path = path.with_suffix(".json")
    manifest_path.unlink(missing_ok=True)
    with atomic(path) as file:
        pq.write_table(pa.table({"roll_in": rolls, **values}), file, compression="zstd")
    content = {"schema": SCHEMA, **asdict(manifest), "rows": len(made.roll_in), "sha256": sha256(path)}
    write_json(manifest_path, content)


def read_evidence(path: Path) -> Evidence:
    """The evidence in `path`, checked against its manifest.

    Raises RecordError, naming the file, when the manifest or the rows are missing, cut, altered or of another
    schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest_path = path.with_suffix(".json")
    content = read_json(manifest_path)
    names = [f.name for f in fields(Manifest) if f.name != "run"]  # which was added later
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise RecordError(f"{manifest_path}: is not an evidence manifest of schema {SCHEMA}.")
    missing = [name for name in (*names, "sha256", "rows") if name not in content]
    if missing:
        raise RecordError(f"{manifest_path}: lacks {', '.join(missing)}.")
    decoding, models = content["decoding"], content["models"]
    whole = isinstance(decoding, dict) and isinstance(decoding.get("max_new_tokens"), int)
    if not whole or not isinstance(models, dict):
        raise RecordError(f"{manifest_path}: 'decoding' or 'models' is not what evidence has.")
    try:
        found = sha256(path)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if found != content["sha256"]:
        raise RecordError(f"{path}: was cut or altered, its SHA-256 is not that of its manifest.")
    try:
        table = pq.read_table(path)
        names_of = table["roll_in"].combine_chunks().cast(pa.string()).dictionary_encode()
        kinds = np.array([ROLL_INS.index(name) for name in names_of.dictionary.to_pylist()], dtype=np.int8)
        rolls = kinds[np.asarray(names_of.indices)]
        columns = {name: table[name].to_numpy().astype(kind) for name, kind in COLUMNS.items()}
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as evidence ({error}).") from None
    return Evidence(
        columns, rolls, Manifest(**{name: content[name] for name in names}, run=str(content.get("run", "")))
    )
