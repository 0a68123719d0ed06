"""Responses that somebody intervened in: the stored files, arrays per prompt, and curves with their areas.

Three interventions (made by `kdbench.interventions`), each one file `<name>.parquet` of many conditions:

    hand_over    one model writes m tokens, the other finishes
    corruption   tokens of the teacher's responses are replaced, at a rate or at one place
    recovery     one token of the student's response is replaced and the student goes on, beside a clean twin

Source: the excess of one wrong token is that of He et al. 2021, https://arxiv.org/abs/1905.10617, who corrupt
prefixes; handing over, twins with common random numbers and the half-life are written for this project.
Differs: He et al. draw corrupt prefixes from other models and score marginal distributions; here the twins
share prompt, draw and position, and what is compared is KL(p||q) at the same position.

Rows (`COLUMNS`), one per token of a response, ordered by condition, example, position: `condition` (text),
`example_id`, `position` (0 is the first response token), the two models' log-probabilities of the token,
KL(p||q), total variation and the teacher's entropy of the distributions that predict it, and `score` of the
whole response (hand-over only, else NaN). One draw per prompt; the end token is a row where it was produced.

Arrays have one row per prompt, in order of example_id; a condition that a prompt does not take part in counts
0 there. Every curve is `f(arrays, weights [R, P], length, ...) -> [R, length]`, every number `[R]`; `weights`
says how often each prompt counts in each resample. Results are float64, NaN where not defined.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from kdbench import evidence
from kdbench.errors import unknown
from kdbench.estimators import Array, Arrays, estimator
from kdbench.evidence import Manifest
from kdbench.record import RecordError, atomic, read_json, sha256, write_json

SCHEMA = 1
NAMES = ("hand_over", "corruption", "recovery")
KINDS = ("random", "teacher_unlikely", "student")
MEASURES = ("forward_kl", "total_variation", "teacher_entropy")
CLEAN = "clean"
COLUMNS: dict[str, type[np.generic]] = {
    "example_id": np.int64,
    "position": np.int32,
    "token": np.int32,
    "student_log_prob": np.float32,
    "teacher_log_prob": np.float32,
    "forward_kl": np.float32,
    "total_variation": np.float32,
    "teacher_entropy": np.float32,
    "score": np.float32,
}
Conditions = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class InterventionConfig:
    """What is tried, on the first `prompts` prompts (None: all).

    `kdbench.interventions` explains the kinds of replacement. Raises: ValueError for a value out of range.
    """

    prompts: int | None = 100
    hand_over_tokens: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)  # those below max_new_tokens
    kinds: tuple[str, ...] = KINDS
    rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)  # share of replaced tokens; 0 is the clean response
    places: tuple[float, ...] = (0.1, 0.5, 0.8)  # early, middle, late: share of the response's length
    recovery_positions: tuple[int, ...] = (4, 16)  # response tokens before the replaced one
    nucleus: float = 0.9  # a token outside the teacher's top-p of this mass is unlikely

    def __post_init__(self) -> None:
        bad = [
            name
            for name, fine in {
                "prompts": self.prompts is None or self.prompts > 0,
                "hand_over_tokens": all(m >= 0 for m in self.hand_over_tokens),
                "kinds": set(self.kinds) <= set(KINDS),
                "rates": all(0 < rate <= 1 for rate in self.rates),
                "places": all(0 <= place < 1 for place in self.places),
                "recovery_positions": all(at >= 0 for at in self.recovery_positions),
                "nucleus": 0 < self.nucleus < 1,
            }.items()
            if not fine
        ]
        if bad:
            given = ", ".join(f"{name} = {getattr(self, name)}" for name in bad)
            raise ValueError(f"interventions: out of range: {given}")


def conditions(name: str, config: InterventionConfig, max_new_tokens: int) -> Conditions:
    """The conditions of an intervention: settings by name, in the order in which they are made and stored.

    Raises: UserError for an unknown name.
    """
    clean: Conditions = {CLEAN: {}}
    if name == "hand_over":
        counts = sorted({m for m in config.hand_over_tokens if m < max_new_tokens} | {max_new_tokens})
        both = ("student", "teacher")
        return {f"{one}-first-{m}": {"first": one, "tokens": m} for one in both for m in counts}
    if name == "corruption":
        rates = {f"{k}-rate-{r}": {"kind": k, "rate": r} for k in config.kinds for r in config.rates}
        places = {f"{k}-place-{x}": {"kind": k, "place": x} for k in config.kinds for x in config.places}
        return {**clean, **rates, **places}
    if name == "recovery":
        after = [at for at in config.recovery_positions if at + 1 < max_new_tokens]
        return {**clean, **{f"{k}-at-{at}": {"kind": k, "place": at} for k in config.kinds for at in after}}
    raise unknown("intervention", name, NAMES)


# ------------------------------------------------------------------------------------------------- storage
def describe(
    name: str, config: InterventionConfig, manifest: Manifest, special: Sequence[int]
) -> dict[str, Any]:
    """What the manifest file says but for rows and hash: equal where the same would be made again.

    `special` holds the ids that replace no token.
    """
    told = {
        "schema": SCHEMA,
        "intervention": name,
        **asdict(manifest),
        "settings": {**asdict(config), "special": list(special)},
        "conditions": conditions(name, config, manifest.max_new_tokens),
    }
    plain: dict[str, Any] = json.loads(json.dumps(told))
    return plain


class Intervention:
    """One intervention in memory: `description` as in the manifest file, `columns` [rows] and `condition`."""

    def __init__(self, description: dict[str, Any], columns: Mapping[str, Array], condition: Array) -> None:
        self.description, self.columns = description, dict(columns)
        self.conditions: Conditions = description["conditions"]
        self.prompt, self._row = np.unique(self.columns["example_id"], return_inverse=True)
        self._rows = {name: np.flatnonzero(condition == i) for i, name in enumerate(self.conditions)}
        self._width = int(self.columns["position"].max(initial=0)) + 1

    @property
    def made_under(self) -> dict[str, Any]:
        """What another one must share to be set beside it: `kdbench.evidence.conditions` and `settings`."""
        known = {field.name for field in fields(Manifest)}
        manifest = Manifest(**{key: value for key, value in self.description.items() if key in known})
        return {**evidence.conditions(manifest), "settings": self.description["settings"]}

    def matrix(self, condition: str, column: str) -> tuple[Array, Array]:
        """(values [P, T], 0 where there is no token; alive [P, T] bool); T is the same for all conditions."""
        rows = self._rows[condition]
        where = self._row[rows], self.columns["position"][rows]
        values = np.zeros((len(self.prompt), self._width), self.columns[column].dtype)
        alive = np.zeros(values.shape, dtype=bool)
        values[where], alive[where] = self.columns[column][rows], True
        return values, alive


def write_intervention(
    path: Path, description: dict[str, Any], parts: Mapping[str, Mapping[str, Array]]
) -> None:
    """Write the columns of every condition, and last the manifest: `path` with suffix .json."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    codes = np.repeat(np.arange(len(parts), dtype=np.int8), [len(part["token"]) for part in parts.values()])
    table = {"condition": pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(list(parts)))}
    for name, kind in COLUMNS.items():
        table[name] = pa.array(np.concatenate([part[name].astype(kind) for part in parts.values()]))
    path.with_suffix(".json").unlink(missing_ok=True)
    with atomic(path) as file:
        pq.write_table(pa.table(table), file, compression="zstd")
    write_json(path.with_suffix(".json"), {**description, "rows": len(codes), "sha256": sha256(path)})


def read_intervention(path: Path) -> Intervention:
    """The intervention in `path`, checked against its manifest.

    Raises RecordError, naming the file, when manifest or rows are missing, cut, altered or of another schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = path.with_suffix(".json")
    content = read_json(manifest)
    made = {field.name for field in fields(Manifest)} - {"run"}  # which was added later
    wanted = {"intervention", "settings", "conditions", "rows", "sha256", *made}
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not wanted <= content.keys():
        raise RecordError(f"{manifest}: is not an intervention's manifest of schema {SCHEMA}.")
    try:
        if sha256(path) != content["sha256"]:
            raise RecordError(f"{path}: was cut or altered, its SHA-256 is not that of its manifest.")
        table = pq.read_table(path)
        columns = {name: table[name].to_numpy().astype(kind) for name, kind in COLUMNS.items()}
        text = table["condition"].combine_chunks().cast(pa.string()).dictionary_encode()
        codes = [list(content["conditions"]).index(name) for name in text.dictionary.to_pylist()]
        condition = np.array(codes, dtype=np.int64)[np.asarray(text.indices)]
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as an intervention ({error}).") from None
    described = {name: value for name, value in content.items() if name not in ("rows", "sha256")}
    return Intervention(described, columns, condition)


# -------------------------------------------------------------------------------------------------- arrays
def hand_over_arrays(data: Intervention) -> tuple[list[int], dict[str, Array]]:
    """(m of each column, arrays): `<first>_score`, and over tokens the sum of log p in nats,
    `<first>_<part>_log_prob`, and the number, `<first>_<part>_count`; all [P, M].

    `first` is who writes first, 'student' or 'teacher', `part` is 'whole' (all tokens of the response) or
    'finished' (those behind the first m).
    """
    counts = sorted({setting["tokens"] for setting in data.conditions.values()})
    shape = (len(data.prompt), len(counts))
    out: dict[str, Array] = {"prompt": data.prompt}
    for name, setting in data.conditions.items():
        first, m = setting["first"], setting["tokens"]
        log_prob, alive = data.matrix(name, "teacher_log_prob")
        column = {f"{first}_score": data.matrix(name, "score")[0][:, 0]}
        for part, start in (("whole", 0), ("finished", m)):
            column[f"{first}_{part}_log_prob"] = log_prob[:, start:].sum(axis=1, dtype=np.float64)
            column[f"{first}_{part}_count"] = alive[:, start:].sum(axis=1)
        for key, values in column.items():
            out.setdefault(key, np.zeros(shape, dtype=np.float64))[:, counts.index(m)] = values
    return counts, out


def corruption_arrays(data: Intervention) -> tuple[list[float], dict[str, Array]]:
    """(rates, the clean 0 first; arrays): `count` [P] tokens, `<kind>_<measure>` [P, rates], sums over them;
    and the excess behind a replaced token as in `excess_arrays`, its places being shares of the length.
    """
    rates = [0.0, *sorted({setting["rate"] for setting in data.conditions.values() if "rate" in setting})]
    out = {**excess_arrays(data), "count": data.matrix(CLEAN, "token")[1].sum(axis=1)}
    for measure in MEASURES:
        clean = data.matrix(CLEAN, measure)[0].sum(axis=1, dtype=np.float64)
        for name, setting in data.conditions.items():
            if "rate" in setting:
                at = rates.index(setting["rate"])
                sums = out.setdefault(
                    f"{setting['kind']}_{measure}", np.repeat(clean[:, None], len(rates), 1)
                )
                sums[:, at] = data.matrix(name, measure)[0].sum(axis=1, dtype=np.float64)
    return rates, out


def excess_arrays(data: Intervention) -> dict[str, Array]:
    """Corrupted minus clean twin behind one replaced token, column d - 1 being d tokens behind; all [P, T].

    For every kind, and for every kind and place as `<kind>@<place>`: `<which>_<measure>_excess`, the sum of
    the differences (over places), and `<which>_alive`, how many pairs of twins both have a token there.
    """
    tokens, clean_alive = data.matrix(CLEAN, "token")
    behind = np.arange(1, tokens.shape[1] + 1)
    row = np.arange(len(tokens))[:, None]
    out: dict[str, Array] = {"prompt": data.prompt}
    for name, setting in data.conditions.items():
        if "place" not in setting:
            continue
        other, alive = data.matrix(name, "token")
        both = np.pad(alive & clean_alive, ((0, 0), (0, 1)))  # the last column stands for all beyond the data
        differs = both[:, :-1] & (other != tokens)
        at = np.minimum(differs.argmax(axis=1)[:, None] + behind, tokens.shape[1])
        counted = both[row, at] & differs.any(axis=1)[:, None]
        found = {"alive": counted.astype(np.float64)}
        for measure in MEASURES:
            gap = data.matrix(name, measure)[0].astype(np.float64) - data.matrix(CLEAN, measure)[0]
            found[f"{measure}_excess"] = np.where(counted, np.pad(gap, ((0, 0), (0, 1)))[row, at], 0.0)
        for key, values in found.items():
            for which in (setting["kind"], f"{setting['kind']}@{setting['place']}"):
                out[f"{which}_{key}"] = out.get(f"{which}_{key}", 0.0) + values
    return out


# -------------------------------------------------------------------------------------------------- curves
def _ratio(weights: Array, numerator: Array, denominator: Array, length: int) -> Array:
    """sum_p w numerator / sum_p w denominator for the first `length` columns, NaN for 0 / 0 and beyond."""
    out = np.full((len(weights), length), np.nan)
    top = np.asarray(weights @ numerator[:, :length].astype(np.float64))
    below = np.asarray(weights @ denominator[:, :length].astype(np.float64))
    np.divide(top, below, out=out[:, : top.shape[1]], where=below != 0)
    return out


def hand_over_score_curve(arrays: Arrays, weights: Array, length: int, first: str = "student") -> Array:
    """Mean score, in its own unit, where `first` wrote m tokens, for the first `length` values of m."""
    score = arrays[f"{first}_score"]
    return _ratio(weights, score, np.ones_like(score), length)


@estimator
def hand_over_gain(arrays: Arrays, weights: Array, column: int, first: str = "student") -> Array:
    """Mean score where `first` wrote the m tokens of this column, less that of m = 0 (column 0): the other
    model alone.
    """
    curve = hand_over_score_curve(arrays, weights, column + 1, first)
    return np.asarray(curve[:, column] - curve[:, 0])


def hand_over_log_prob_curve(
    arrays: Arrays, weights: Array, length: int, first: str = "student", part: str = "whole"
) -> Array:
    """Teacher's log-likelihood per token, nats: pooled over the tokens of the whole response, or of the part
    that the other model 'finished'.
    """
    return _ratio(weights, arrays[f"{first}_{part}_log_prob"], arrays[f"{first}_{part}_count"], length)


def corruption_curve(
    arrays: Arrays, weights: Array, length: int, kind: str = "random", measure: str = "forward_kl"
) -> Array:
    """Mean of the measure over the tokens of the teacher's responses, for the first `length` rates."""
    sums = arrays[f"{kind}_{measure}"]
    return _ratio(weights, sums, np.broadcast_to(arrays["count"][:, None], sums.shape), length)


@estimator
def corruption_area_nats(
    arrays: Arrays,
    weights: Array,
    rates: tuple[float, ...],
    kind: str = "random",
    measure: str = "forward_kl",
) -> Array:
    """Area between corrupted and clean curve: trapezoids of c(rate) - c(0) over `rates` (0 first), in nats
    (total variation: no unit), since a rate has no unit.
    """
    curve = corruption_curve(arrays, weights, len(rates), kind, measure)
    return np.asarray(np.trapezoid(curve - curve[:, :1], np.asarray(rates), axis=1))


def _which(kind: str, place: float | None) -> str:
    return kind if place is None else f"{kind}@{place}"


def excess_curve(
    arrays: Arrays,
    weights: Array,
    length: int,
    kind: str = "random",
    place: float | None = None,
    measure: str = "forward_kl",
) -> Array:
    """Mean of corrupted minus clean twin 1..length tokens behind the replaced one, over twins alive in both.

    `place` None pools all places.
    """
    which = _which(kind, place)
    return _ratio(weights, arrays[f"{which}_{measure}_excess"], arrays[f"{which}_alive"], length)


def excess_alive_curve(
    arrays: Arrays, weights: Array, length: int, kind: str = "random", place: float | None = None
) -> Array:
    """The share of the twins alive 1 token behind the replaced one that are alive 1..length tokens behind."""
    alive = arrays[f"{_which(kind, place)}_alive"]
    return _ratio(weights, alive, np.broadcast_to(alive[:, :1], alive.shape), length)


@estimator
def excess_area_nats(
    arrays: Arrays,
    weights: Array,
    length: int,
    kind: str = "random",
    place: float | None = None,
    measure: str = "forward_kl",
) -> Array:
    """sum_{d=1..length} of `excess_curve`: what one replaced token costs in all, in nats."""
    return np.asarray(excess_curve(arrays, weights, length, kind, place, measure).sum(axis=1))


@estimator
def half_life_tokens(
    arrays: Arrays,
    weights: Array,
    length: int,
    kind: str = "random",
    place: float | None = None,
    measure: str = "forward_kl",
) -> Array:
    """How many tokens behind the replaced one the excess falls below half of its value at 1, interpolated.

    NaN where it does not within `length` tokens, and where the excess at 1 is not positive.
    """
    curve = excess_curve(arrays, weights, length, kind, place, measure)
    half = curve[:, :1] / 2
    below = (curve < half) & (half > 0)
    at = np.maximum(below.argmax(axis=1), 1)
    row = np.arange(len(curve))
    out = np.full(len(curve), np.nan)
    reached = below.any(axis=1)
    if reached.any():
        before, after, level = curve[row, at - 1], curve[row, at], half[:, 0]
        np.divide(before - level, before - after, out=out, where=reached)
        out += at
    return out
