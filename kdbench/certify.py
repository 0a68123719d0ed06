"""Certification: every estimator on worlds whose truth is computed, many times, by the code of real runs.

A repetition is a prompt set of `PROMPTS` prompts with one response each: sampled by `kdbench.rollout`,
measured by `kdbench.collect`, summed by `kdbench.per_prompt`, estimated with an interval by
`kdbench.intervals`. Over the repetitions the mean of the estimates is compared with the truth (bias), and the
share of intervals that hold the truth (coverage) with 95 %. The truth is that of `kdbench.worlds.truth`
(dynamic programming); for repetition measures, whose state would be the whole response, it is the estimator
itself on `REFERENCE` other prompts.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kdbench import intervals, per_prompt, registry
from kdbench.errors import unknown
from kdbench.estimators import ESTIMATORS, Array
from kdbench.evidence import COLUMNS, assemble
from kdbench.paths import PACKAGE, cache_dir
from kdbench.record import RecordError, read_json, write_json
from kdbench.worlds.catalogue import WORLDS, world
from kdbench.worlds.tables import World
from kdbench.worlds.truth import Truth

PROMPTS = 200
REPETITIONS = 2000
REFERENCE = 1_000_000
RESAMPLES = 1000
LENGTHS = (1, 5, 15, 30)
CHUNK = 100  # repetitions that are sampled at once
COVERAGE = (0.93, 0.97)
MIN_EVENTS = 10  # of what a rate counts; with fewer expected, a percentile interval cannot cover as it says
_MEASURED = 4000  # responses that are measured at once
_RESAMPLING_SEEDS = 8  # repetitions take turns, so that one draw of resamples does not stand for all

# estimator -> unit; those with a curve are asked for every length at once
_CURVES: dict[str, str] = {
    "ex_acc_err_alive": "%",
    "ex_acc_err_matched": "%",
    "ex_acc_err_arora_paper": "%",
    "ex_acc_err_arora_code": "%",
    "ex_acc_err_minillm": "%",
    "excess_nats": "nats",
    "accumulated_error_nats": "nats",
    "matched_error_nats": "nats",
    "arora_paper_error_nats": "nats",
    "arora_code_error_nats": "nats",
    "minillm_error_nats": "nats",
    "eb_c": "",
    "state_shift_nats": "nats",
    "state_shift_reverse_nats": "nats",
    "survival": "",
}
_SCALARS: dict[str, str] = {
    "length_term_nats": "nats",
    "state_term_nats": "nats",
    "growth_exponent": "",
    "acceptance": "",
    "acceptance_drop": "",
    "agreement": "",
    "teacher_entropy": "nats",
    "teacher_entropy_rise": "nats",
    "teacher_surprise": "nats",
    "teacher_surprise_rise": "nats",
    "entropy_drift": "nats/token",
    "stop_rate": "",
    "eos_hazard": "",
    "eos_hazard_ratio": "",
}
_TWO_SIDED = ("accumulated_error_nats", "survival", "acceptance", "growth_exponent")
# what is conditional on running, or a ratio that analyses refuse at low survival, and its roll-ins
_RUNNING: dict[str, tuple[str, ...]] = {
    "ex_acc_err_alive": ("student", "teacher"),
    "ex_acc_err_matched": ("matched",),
    "ex_acc_err_arora_paper": ("student", "teacher"),
    "ex_acc_err_arora_code": ("student", "reference"),
    "ex_acc_err_minillm": ("student", "teacher"),
    "excess_nats": ("student", "teacher"),
    "accumulated_error_nats": ("student",),
    "matched_error_nats": ("matched",),
    "arora_code_error_nats": ("student",),
    "eb_c": ("student", "teacher"),
    "growth_exponent": ("student",),
    "entropy_drift": ("student",),
}
PAIRED = "paired difference"  # of R(l) between two roll-ins that both hold the teacher's text: truly 0


@dataclass(frozen=True)
class Case:
    """One number to certify: an estimator with its arguments, under one divergence."""

    estimator: str
    args: tuple[tuple[str, Any], ...]
    unit: str
    divergence: str = "forward_kl"

    @property
    def name(self) -> str:
        """As it is printed."""
        inner = ", ".join(str(value) for _, value in self.args)
        return f"{self.estimator}({inner})" + (
            "" if self.divergence == "forward_kl" else f" {self.divergence}"
        )

    @property
    def length(self) -> int | None:
        """The length l that it is about, None where it is about whole responses."""
        found = dict(self.args).get("length")
        return None if found is None else int(found)

    @property
    def computed(self) -> bool:
        """Whether its truth is computed rather than drawn."""
        return self.estimator == PAIRED or Truth.knows(self.estimator)

    def truth(self, place: World) -> float:
        """Its computed truth in a world."""
        truth = Truth(place, self.divergence)
        if self.estimator != PAIRED:
            return truth.value(self.estimator, **dict(self.args))
        one, other = (
            truth.accumulated_error_nats(self.length or 1, side) for side in ("teacher", "reference")
        )
        return one - other


def cases() -> list[Case]:
    """All numbers that are certified, in the order of the table."""
    found = []
    for name, unit in {**_CURVES, **_SCALARS}.items():
        sides: Sequence[tuple[tuple[str, Any], ...]] = [()]
        if name in _TWO_SIDED:
            sides = [(("roll_in", "student"),), (("roll_in", "teacher"),)]
        lengths = [n for n in LENGTHS if n > 1 or name not in ("growth_exponent", "entropy_drift")]
        found += [Case(name, (("length", n), *side), unit) for side in sides for n in lengths]
    for divergence in ("reverse_kl", "total_variation"):
        found += [Case("ex_acc_err_alive", (("length", n),), "%", divergence) for n in LENGTHS]
    found += [Case(PAIRED, (("length", n),), "nats") for n in (5, 15)]
    for side in ("student", "teacher"):
        found.append(Case("mean_length_tokens", (("roll_in", side),), "tokens"))
    found.append(Case("length_quantile_tokens", (("level", 0.5),), "tokens"))
    found += [Case("seq_rep", (("n", n),), "") for n in (2, 3, 4)]
    found.append(Case("rep", (("window", 16), ("length", LENGTHS[-1])), ""))
    found += [Case("loop_rate", (), ""), Case("loop_onset_tokens", (), "tokens")]
    return found


# ------------------------------------------------------------------------------------------------- simulation
def arrays_of(place: World, count: int, seed: int, first_id: int, scored: bool = True) -> dict[str, Array]:
    """The per-prompt arrays of `count` prompts drawn from a world, one response each under every roll-in.

    Without `scored` the student's roll-in alone, its tokens only: enough for repetition measures.
    """
    from kdbench import collect
    from kdbench.rollout import Draw, evaluating, rollout
    from kdbench.streams import stream_seed
    from kdbench.worlds.automaton import AutomatonLM, prompt_batch

    gold = prompt_batch(place, place.draw(count, stream_seed(seed, place.name, first_id)), first_id)
    plan = collect.Plan(gold, 1, place.max_new_tokens, "plain", 4 * count)
    student, teacher, writer = (AutomatonLM(one) for one in (place.student, place.teacher, place.reference))
    everything = slice(0, count)
    texts = {"student": collect.sampled(student, plan).responses(0, everything)}
    if scored:
        texts["teacher"] = collect.sampled(teacher, plan).responses(0, everything)
        independent = Draw(stream_seed(seed, "reference text"), 0, 4 * count)
        texts["reference"] = rollout(writer, gold, independent, place.max_new_tokens)
    parts = []
    with evaluating(student, teacher):
        for name, responses in texts.items():
            part = _unscored(responses)
            if scored:
                part = collect.measure(student, teacher, responses, _MEASURED, context=True)
            rows = len(part["token"])
            parts.append({**part, "draw": np.zeros(rows, np.int32), "roll_in": np.full(rows, name)})
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    models = {"student": "student", "teacher": "teacher"}
    return per_prompt.arrays(assemble(columns, collect.manifest_of(plan, models)))


def _unscored(responses: Mapping[str, Any]) -> dict[str, Array]:
    """Evidence columns with tokens and lengths alone; every measurement is 0."""
    length = (responses["length"] - responses["prompt_length"]).numpy()
    rows = length + ~responses["finished"].numpy()
    of = np.repeat(np.arange(len(rows)), rows)
    position = np.arange(len(of)) - np.repeat(np.cumsum(rows) - rows, rows)
    alive = position < length[of]
    ids = np.pad(responses["input_ids"].numpy(), ((0, 0), (0, 1)))
    columns = {name: np.zeros(len(of), kind) for name, kind in COLUMNS.items()}
    token = np.where(alive, ids[of, responses["prompt_length"].numpy()[of] + position], -1)
    return columns | {
        "example_id": responses["example_id"].numpy()[of],
        "position": position,
        "alive": alive,
        "token": token,
    }


@dataclass
class Tally:
    """What the repetitions of one case add up to."""

    repetitions: int = 0
    defined: int = 0
    error: float = 0.0  # sum of estimate - truth
    square: float = 0.0  # sum of its square
    intervals: int = 0
    covered: int = 0
    below: int = 0  # intervals that lie below the truth
    width: float = 0.0

    def add(self, value: float, low: float, high: float, truth: float) -> None:
        """One repetition's estimate and interval; NaN where not defined."""
        self.repetitions += 1
        if math.isfinite(value):
            self.defined += 1
            self.error += value - truth
            self.square += (value - truth) ** 2
        if math.isfinite(low) and math.isfinite(high):
            slack = 1e-6 * max(abs(truth), 1e-3)  # sums of float32 against a truth in float64
            self.intervals += 1
            self.covered += low - slack <= truth <= high + slack
            self.below += high + slack < truth
            self.width += high - low

    def joined(self, other: Tally) -> Tally:
        """The tally of both."""
        return Tally(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def estimates(
    arrays: Mapping[str, Array], wanted: Sequence[Case], seed: int
) -> Iterator[tuple[float, float, float]]:
    """(value, low, high) of each case on one prompt set; NaN where not defined. `seed` of the resampling."""
    curves: dict[tuple[Any, ...], tuple[Array, Array, Array]] = {}
    longest, how = max(LENGTHS), intervals.Resampling(resamples=RESAMPLES, seed=seed)
    found: intervals.Estimate
    for case in wanted:
        args = dict(case.args)
        if case.estimator in _CURVES:
            length = args.pop("length")
            key = (case.estimator, case.divergence, args.get("roll_in"))
            if key not in curves:
                mine = arrays if case.divergence == "forward_kl" else _under(arrays, case.divergence)
                curve = intervals.curve_of(case.estimator)
                assert curve is not None, case.estimator
                curves[key] = intervals.band(curve, mine, longest, args, how=how)
            value, low, high = (float(one[length - 1]) for one in curves[key])
        else:
            if case.estimator == PAIRED:
                one, other = (_as_student(arrays, side) for side in ("teacher", "reference"))
                found = intervals.paired("accumulated_error_nats", one, other, args, how=how)
            else:
                found = intervals.estimate(case.estimator, arrays, args, how=how)
            value, low, high = (math.nan if x is None else x for x in (found.value, found.low, found.high))
        yield value, low, high


def _under(arrays: Mapping[str, Array], divergence: str) -> dict[str, Array]:
    """The sums of another divergence in place of the chosen one."""
    sums = {f"{side}_sum": arrays[f"{side}_{divergence}"] for side in ("student", "teacher")}
    return {**arrays, **sums}


def _as_student(arrays: Mapping[str, Array], side: str) -> dict[str, Array]:
    """Another roll-in's errors in the place of the student's, as if a second method had them."""
    mine = {f"student_{name}": arrays[f"{side}_{name}"] for name in ("sum", "count")}
    return {"prompt": arrays["prompt"], **mine}


@cache
def _computed(name: str) -> tuple[float, ...]:
    """The computed truth of each case in a world, NaN where it is drawn instead."""
    return tuple(case.truth(world(name)) if case.computed else math.nan for case in cases())


def _repetitions(name: str, chunk: int, repetitions: int, drawn: Sequence[float]) -> list[dict[str, Any]]:
    """The tallies of one chunk of repetitions in one world, by case."""
    wanted, computed = cases(), _computed(name)
    truths = [b if math.isnan(a) else a for a, b in zip(computed, drawn, strict=True)]
    arrays = arrays_of(world(name), repetitions * PROMPTS, 0, chunk * CHUNK * PROMPTS)
    tallies = [Tally() for _ in wanted]
    for number in range(repetitions):
        mine = {key: value[number * PROMPTS : (number + 1) * PROMPTS] for key, value in arrays.items()}
        found = estimates(mine, wanted, number % _RESAMPLING_SEEDS)
        for tally, truth, numbers in zip(tallies, truths, found, strict=True):
            tally.add(*numbers, truth)
    return [asdict(tally) for tally in tallies]


def _reference(name: str, part: int) -> dict[str, list[Any]]:
    """Sums over `CHUNK * PROMPTS` other prompts of what repetition measures read."""
    arrays = arrays_of(world(name), CHUNK * PROMPTS, 1, part * CHUNK * PROMPTS, scored=False)
    kept = [key for key in arrays if "_rep_" in key or key in ("student_loop", "student_count")]
    return {key: arrays[key].sum(axis=0, dtype=np.float64).tolist() for key in kept}


def _drawn(parts: Sequence[Mapping[str, Any]]) -> list[float]:
    """What each case that is drawn rather than computed is on all these prompts, NaN for the others."""
    total = {key: np.sum([part[key] for part in parts], axis=0)[None] for key in parts[0]}
    found = []
    for case in cases():
        value = (
            math.nan
            if case.computed
            else ESTIMATORS[case.estimator](total, np.ones((1, 1)), **dict(case.args))[0]
        )
        found.append(float(value))
    return found


# ------------------------------------------------------------------------------------------------------- runs
@dataclass(frozen=True)
class Plan:
    """What to certify: worlds, repetitions of each, draws of the reference for repetition measures."""

    worlds: tuple[str, ...] = tuple(WORLDS)
    repetitions: int = REPETITIONS
    reference: int = REFERENCE

    def __post_init__(self) -> None:
        """Raises: UserError for an unknown world."""
        for name in self.worlds:
            if name not in WORLDS:
                raise unknown("world", name, WORLDS, "--world")


FAST = Plan(("markov1", "stops_earlier", "equal"), 100, 40_000)


def _single_thread() -> None:
    import torch

    torch.set_num_threads(1)


class _Here(Executor):
    """Makes everything at once, in this process."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A future that is done."""
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def _pool(jobs: int) -> Executor:
    if jobs == 1:
        return _Here()
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_single_thread)


def certify(plan: Plan, jobs: int = 1, progress: bool = False) -> list[dict[str, Any]]:
    """The rows of the table, see `row`; finished chunks are kept in the cache, so that a call can go on.

    `jobs`: processes at the same time.
    """
    code = [*(PACKAGE / f"{name}.py" for name in _CODE), *(PACKAGE / "worlds").glob("*.py")]
    key = registry.code_hash(sorted(code))[:16]
    folder = cache_dir() / "certify" / key
    size = CHUNK * PROMPTS
    parts = [(name, part) for name in plan.worlds for part in range(math.ceil(plan.reference / size))]
    chunks = [
        (name, number, min(CHUNK, plan.repetitions - number * CHUNK))
        for name in plan.worlds
        for number in range(math.ceil(plan.repetitions / CHUNK))
    ]
    with (
        _pool(jobs) as pool,
        tqdm(total=len(parts) + len(chunks), desc="certify", unit="chunk", disable=not progress) as bar,
    ):

        def made(tasks: Iterable[tuple[Path, Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
            """The results of tasks (file, function, arguments), in order; what a file holds is kept."""
            futures = [pool.submit(_once, *task) for task in tasks]
            for future in futures:
                future.add_done_callback(lambda _: bar.update())
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        sums = made(
            (folder / f"{name}-reference-{part}.json", _reference, (name, part)) for name, part in parts
        )
        drawn = {
            name: _drawn([total for (owner, _), total in zip(parts, sums, strict=True) if owner == name])
            for name in plan.worlds
        }
        tallies = made(
            (
                folder / f"{name}-{number}-{count}-{plan.reference}.json",
                _repetitions,
                (name, number, count, drawn[name]),
            )
            for name, number, count in chunks
        )
    rows, wanted = [], cases()
    for name in plan.worlds:
        mine = [one for (owner, *_), one in zip(chunks, tallies, strict=True) if owner == name]
        loops = drawn[name][wanted.index(Case("loop_rate", (), ""))] * PROMPTS
        for at, case in enumerate(wanted):
            total = Tally()
            for one in mine:
                total = total.joined(Tally(**one[at]))
            computed = _computed(name)[at]
            truth = drawn[name][at] if math.isnan(computed) else computed
            rows.append(row(name, case, truth, total, loops))
    return rows


_CODE = "certify collect estimators evidence intervals losses per_prompt predict rollout streams".split()


def _once(path: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The function's result, from the file where it is there, else written to it."""
    with suppress(RecordError):
        return read_json(path)
    result = function(*args)
    write_json(path, result)
    return result


def _events(case: Case, truth: Truth, loops: float) -> float:
    """How many events the number stands on in a prompt set on average; infinite for what counts none."""
    if case.estimator in ("loop_rate", "loop_onset_tokens"):
        return loops
    if case.estimator in ("stop_rate", "eos_hazard", "eos_hazard_ratio") and case.length:
        sides = ("student", "teacher") if case.estimator == "eos_hazard_ratio" else ("student",)
        ends = [truth.stop_rate(case.length, side) * PROMPTS for side in sides]
        return (
            min(*ends, *(PROMPTS - count for count in ends)) if case.estimator == "stop_rate" else min(ends)
        )
    if case.estimator == "survival" and case.length:
        alive = truth.survival(case.length, str(dict(case.args)["roll_in"])) * PROMPTS
        return math.inf if alive == PROMPTS else min(alive, PROMPTS - alive)
    return math.inf


def _survival(case: Case, truth: Truth) -> float:
    """The least share that still runs at the length of a number that is conditional on running, else 1."""
    if case.length is None or case.estimator not in _RUNNING:
        return 1.0
    sides = _RUNNING[case.estimator]
    if "roll_in" in dict(case.args):
        sides = (str(dict(case.args)["roll_in"]),)
    at = case.length - 1
    return min(
        float(truth.paths.coupled[2][at].sum())
        if side == "matched"
        else float(truth.survival_curve(side)[at])
        for side in sides
    )


def bounds(tally: Tally) -> tuple[float, float]:
    """The least and the highest coverage that passes; four standard errors wider than `COVERAGE` where there
    are fewer than `REPETITIONS`, for there are hundreds of numbers.
    """
    few = tally.repetitions < REPETITIONS
    noise = 4 * math.sqrt(0.05 * 0.95 / max(tally.intervals, 1)) if few else 0.0
    return COVERAGE[0] - noise, min(COVERAGE[1] + noise, 1.0)


def row(name: str, case: Case, truth: float, tally: Tally, loops: float = math.inf) -> dict[str, Any]:
    """One line of the table: truth, bias and its standard error, spread, coverage, and what they say.

    `loops`: responses of a prompt set that loop, on average. `verdict`: 'ok'; 'exact' (every estimate and
    interval is the truth); 'survival' (a number conditional on running where under 0.2 still run, or a ratio
    that analyses refuse there); 'events' (a rate that stands on fewer than `MIN_EVENTS` events on average);
    'no truth' (there is none: the exponent of an error that is 0); else what is out of bounds: 'bias',
    'coverage', 'undefined' (no estimate or interval in more than 5 % of the repetitions), or several.
    """
    exact = Truth(world(name), case.divergence)
    survival, events = _survival(case, exact), _events(case, exact, loops)
    count = max(tally.defined, 1)
    bias = tally.error / count
    spread = math.sqrt(max(tally.square / count - bias**2, 0.0) * count / max(count - 1, 1))
    error = spread / math.sqrt(count)
    coverage = tally.covered / max(tally.intervals, 1)
    least, most = bounds(tally)
    errors = 3 if tally.repetitions >= REPETITIONS else 4
    tiny = 1e-6 * max(abs(truth), 1e-3)
    defined = min(tally.defined, tally.intervals) >= 0.95 * tally.repetitions
    wrong = [] if defined else ["undefined"]
    allowed = max(0.01 * abs(truth), 0.1 if case.unit == "%" else 0.0, errors * error)
    wrong += ["bias"] if abs(bias) > allowed else []
    wrong += [] if least <= coverage <= most else ["coverage"]
    verdict = " and ".join(wrong) or "ok"
    if not math.isfinite(truth):
        verdict = "no truth"
    elif defined and spread <= tiny and abs(bias) <= tiny and tally.covered == tally.intervals:
        verdict = "exact"
    elif survival < intervals.MIN_SURVIVAL:
        verdict = "survival"
    elif events < MIN_EVENTS:
        verdict = "events"
    return {
        "world": name,
        "estimator": case.estimator,
        "args": dict(case.args),
        "divergence": case.divergence,
        "unit": case.unit,
        "truth": truth if math.isfinite(truth) else None,
        "source": "computed" if case.computed else "drawn",
        "repetitions": tally.repetitions,
        "intervals": tally.intervals,
        "bias": bias,
        "bias_se": error,
        "spread": spread,
        "width": tally.width / max(tally.intervals, 1),
        "coverage": coverage,
        "below": tally.below / max(tally.intervals, 1),
        "survival": survival,
        "verdict": verdict,
    }


# ----------------------------------------------------------------------------------------------- what it says
_REASONS = {
    "survival": f"under {100 * intervals.MIN_SURVIVAL:.0f} % still run at this length, where analyses warn",
    "events": f"stands on fewer than {MIN_EVENTS} events in {PROMPTS} responses, where analyses warn",
    "no truth": "not defined in this world",
}


def claimed(one: Mapping[str, Any]) -> bool:
    """Whether a row belongs to what is certified: enough survival, enough events, a truth."""
    return one["verdict"] not in _REASONS


def failed(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that are out of bounds without a reason that their numbers tell."""
    return [one for one in out_of_bounds(rows) if not why(one)]


def out_of_bounds(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows whose bias or coverage is out of bounds."""
    return [one for one in rows if claimed(one) and one["verdict"] not in ("ok", "exact")]


def _label(one: Mapping[str, Any]) -> str:
    return Case(one["estimator"], tuple(one["args"].items()), one["unit"], one["divergence"]).name


def why(one: Mapping[str, Any]) -> str:
    """What makes a number miss the bounds, as far as its row tells; '' where it does not."""
    if one["estimator"] == "length_quantile_tokens":
        return "a quantile of whole numbers: an estimate is on one side of the truth or exactly on it"
    if "undefined" in one["verdict"]:
        return ""
    found = []
    if "bias" in one["verdict"]:
        ratio = one["estimator"].startswith("ex_acc_err") or one["estimator"] in _RATIOS
        small = abs(one["bias"]) < 0.2 * one["spread"]
        found.append("a ratio of means, whose small bias is of second order" if ratio and small else "")
    if "coverage" in one["verdict"]:
        missed = 1 - one["coverage"]
        above = missed - one["below"]
        skewed = max(one["below"], above) > 0.6 * missed > 0 and missed < 0.3
        side = "below" if one["below"] > above else "above"
        reason = f"few responses carry it, so it is skewed: most misses lie {side} the truth"
        found.append(reason if skewed else "")
    return "; ".join(found) if all(found) else ""


_RATIOS = ("eb_c", "eos_hazard", "eos_hazard_ratio", "acceptance", "acceptance_drop", "growth_exponent")


def _exception(one: Mapping[str, Any]) -> str:
    unit = f" {one['unit']}" if one["unit"] else ""
    return (
        f"{one['world']}, {_label(one)}: {one['verdict']}; truth {one['truth']:.4g}{unit}, "
        f"bias {one['bias']:+.3g} ± {one['bias_se']:.2g}, spread {one['spread']:.3g}, "
        f"coverage {100 * one['coverage']:.1f} %, "
        f"{100 * one['below']:.1f} % of the intervals lie below the truth"
    )


def markdown(rows: Sequence[Mapping[str, Any]], plan: Plan) -> str:
    """The certification table: per number its bias and coverage over worlds, then all exceptions."""
    held = [one for one in rows if claimed(one)]
    wrong = out_of_bounds(rows)
    errors = 3 if plan.repetitions >= REPETITIONS else 4
    least, most = bounds(Tally(repetitions=plan.repetitions, intervals=plan.repetitions))
    lines = [
        "# Certification of the estimators, v1",
        "",
        f"{plan.repetitions:,} repetitions of {PROMPTS} prompts with one response each in every world; made "
        "by `kdbench certify`. All numbers are in [results.csv](results.csv).",
        "",
        f"- {len(held)} of {len(rows)} pairs of number and world are judged, "
        f"{len(held) - len(wrong)} within bounds: |bias| <= max(1 % of the truth, 0.1 points, {errors} "
        f"standard errors), coverage of the 95 % intervals from {100 * least:.1f} to {100 * most:.1f} %.",
        f"- Intervals are made with {RESAMPLES:,} resamples. `{PAIRED}` is that of R(l) between two sets "
        "of texts by the teacher, and truly 0 but in markov2, whose reference has another writer.",
        "- Not certified: Jensen-Shannon divergence, intervals over training seeds, interventions, and "
        f"lengths over {LENGTHS[-1]}.",
        "- A number is an estimator with its length l (or other arguments). Bias is that of the world where "
        "it has most standard errors; coverage is the lowest and the highest over worlds. Where every "
        "estimate equals the truth (a difference that must be 0), the number counts as exact.",
        "",
        "| world | | survival at 30, student / teacher |",
        "| --- | --- | ---: |",
    ]
    for name in plan.worlds:
        truth = Truth(world(name))
        alive = [truth.survival(LENGTHS[-1], side) for side in ("student", "teacher")]
        lines.append(f"| {name} | {world(name).description} | {alive[0]:.2f} / {alive[1]:.2f} |")
    lines += [
        "",
        "| number | unit | truth over worlds | worst bias | coverage % | certified | exact | not claimed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in cases():
        mine = [one for one in rows if _label(one) == case.name]
        ours = [one for one in mine if claimed(one)]
        free = [one for one in ours if one["verdict"] != "exact"]
        ok = sum(one["verdict"] == "ok" for one in free)
        cells = [f"`{case.name}`", case.unit]
        if free:
            truths = [one["truth"] for one in free]
            worst = max(free, key=lambda one: abs(one["bias"]) / max(one["bias_se"], 1e-12))
            cover = [100 * one["coverage"] for one in free]
            cells += [
                f"{min(truths):.3g} to {max(truths):.3g}",
                f"{worst['bias']:+.2g} ± {worst['bias_se']:.1g}",
            ]
            cells += [f"{min(cover):.1f} to {max(cover):.1f}", f"{ok} of {len(free)}"]
        else:
            cells += ["", "", "", ""]
        lines.append(f"| {' | '.join(cells)} | {len(ours) - len(free)} | {len(mine) - len(ours)} |")
    lines += ["", "## Out of bounds", ""]
    reasons: dict[str, list[str]] = {}
    for one in wrong:
        reasons.setdefault(why(one) or "no reason that the numbers tell", []).append(_exception(one))
    for reason, found in reasons.items():
        lines += [f"{reason[0].upper()}{reason[1:]} ({len(found)}):", "", *(f"- {one}" for one in found), ""]
    lines += [] if wrong else ["None."]
    lines += ["", "## Not claimed", ""]
    for verdict, reason in _REASONS.items():
        mine = [one for one in rows if one["verdict"] == verdict]
        by_case: dict[str, list[str]] = {}
        for one in mine:
            by_case.setdefault(_label(one), []).append(one["world"])
        told = "; ".join(f"{name} in {', '.join(worlds)}" for name, worlds in by_case.items())
        if mine:
            lines.append(f"- {reason[0].upper()}{reason[1:]}: {told}.")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Mapping[str, Any]], plan: Plan, folder: Path) -> list[Path]:
    """Write results.csv, table.md and the figure of stop rates into `folder`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "results.csv", folder / "table.md"]
    with paths[0].open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        table.writeheader()
        for one in rows:
            args = " ".join(f"{key}={value}" for key, value in one["args"].items())
            table.writerow({key: _rounded(value) for key, value in {**one, "args": args}.items()})
    paths[1].write_text(markdown(rows, plan), encoding="utf-8")
    return paths + stop_rate_figure(folder)


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


STOP_RATES = (0.005, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08)
_SHOWN = {
    "ex_acc_err_minillm": ("minillm-code", "s", "--"),
    "ex_acc_err_arora_paper": ("arora22-paper", "^", ":"),
    "ex_acc_err_matched": ("matched", "D", "-."),
    "ex_acc_err_alive": ("alive", "o", "-"),
}


def stop_rate_figure(folder: Path, length: int = 15, prompts: int = PROMPTS) -> list[Path]:
    """Draw what published variants and ours make of a student of which only the stop rate changes.

    Lines are the computed truth of each variant; points with 95 % intervals are estimates from one prompt
    set.
    """
    import seaborn as sns
    from matplotlib.figure import Figure

    from kdbench.worlds.catalogue import TEACHER_STOP, stop_rate

    places = [stop_rate(rate) for rate in STOP_RATES]
    sets = [arrays_of(place, prompts, 2, 0) for place in places]
    folder.mkdir(parents=True, exist_ok=True)
    colors = sns.color_palette("colorblind", len(_SHOWN))
    with sns.axes_style("ticks"):
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        ax = figure.subplots()
        for at, (name, (label, marker, line)) in enumerate(_SHOWN.items()):
            truth = [Truth(place).value(name, length=length) for place in places]
            found = [intervals.estimate(name, arrays, {"length": length}) for arrays in sets]
            values = np.array([[x.value, x.low, x.high] for x in found], dtype=float).T
            x = np.arange(len(places)) + 0.06 * (at - 1.5)
            ax.plot(np.arange(len(places)), truth, color=colors[at], linestyle=line, label=f"{label}: truth")
            spread = np.abs(values[1:] - values[0])
            ax.errorbar(x, values[0], spread, color=colors[at], marker=marker, linestyle="none", capsize=2,
                        markersize=5, label=f"{label}: estimate")  # fmt: skip
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set_xticks(np.arange(len(places)), [f"{rate:g}" for rate in STOP_RATES])
        ax.set(
            xlabel=f"the student's stop probability per token (the teacher's: {TEACHER_STOP:g})",
            ylabel=f"ExAccErr({length}) (%)",
        )
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        paths = [folder / f"stop_rate.{suffix}" for suffix in ("png", "svg")]
        for path in paths:
            figure.savefig(path, dpi=150)
    return paths
