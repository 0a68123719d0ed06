"""Exposure bias: how much faster a student's error accumulates on its own prefixes than on the teacher's.

Source: Arora et al. 2022, https://arxiv.org/abs/2204.01171, sec. 3 (ExAccErr); MiniLLM (Gu et al. 2024,
https://arxiv.org/abs/2306.08543), `evaluate_exposure_bias.py`, for `ex_acc_err_minillm`; for the other
measures see `kdbench.estimators`.
Differs: `ex_acc_err@l` averages each step over the responses that still run there, so that a change of
response length alone does not move it, and measures the first response token; the published definitions are
scores of their own. `ex_acc_err_minillm` is the script's formula on whatever decoding the evidence has; the
script's decoding (ban on repeated 6-grams) is the profile `minillm`, scores `minillm/ex_acc_err_minillm@l`.

Divergences are in nats over the full vocabulary, KL(p||q) unless a score's name says otherwise; l counts
response tokens. Every interval is a 95 % interval over prompts, see `kdbench.intervals`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from analyses._exposure_rows import LENGTHS, VERSION, interventions, must_be_of, reach, rows
from kdbench import counterfactuals, estimators, intervals, per_prompt
from kdbench.counterfactuals import Intervention
from kdbench.errors import UserError, unknown
from kdbench.estimators import ESTIMATORS, Array
from kdbench.evidence import DIVERGENCES, Evidence, conditions, read_evidence
from kdbench.intervals import MIN_SURVIVAL, VARIANTS, Estimate, Resampling
from kdbench.record import Analysis, RecordError, RunFolder, Score

__all__ = ["LENGTHS", "VERSION", "Settings", "analyze", "figures", "summary"]
DIVERGENCE = "forward_kl"
HORIZON = 15  # tokens behind a replaced one that scores of recovery look at


@dataclass(frozen=True)
class Settings:
    """`divergences`: KL(p||q) is always scored; the scores of others are prefixed by their names.

    `resamples`: draws of prompts per interval.

    Raises: UserError for an unknown divergence or under 100 draws.
    """

    divergences: list[str] = field(default_factory=lambda: [DIVERGENCE])
    resamples: int = intervals.DEFAULT.resamples

    def __post_init__(self) -> None:
        for name in self.divergences:
            if name not in DIVERGENCES:
                raise unknown("divergence", name, DIVERGENCES)
        if self.resamples < 100:
            raise UserError(f"resamples: an interval needs 100 or more, not {self.resamples}.")


# ------------------------------------------------------------------------------------------------- the scores
@dataclass(frozen=True)
class _Row:
    """One score, at every l of `LENGTHS` unless `whole`.

    `inputs`: names of arrays, '*' standing for the roll-in of `args`, or for student and teacher. `running`:
    conditional on running, so left out where survival is low (an ExAccErr has a warning there). `first`: the
    least l at which it is defined. An argument `length` of 0 stands for max_new_tokens.
    """

    name: str
    estimator: str
    inputs: str
    unit: str = ""
    direction: str = "none"
    args: Mapping[str, Any] = field(default_factory=dict)
    running: bool = False
    first: int = 1
    variant: str = ""
    whole: bool = False

    @property
    def ratio(self) -> bool:
        """Whether it is an ExAccErr in percent, under the rules of `kdbench.intervals`."""
        return bool(self.variant) and self.unit == "%"

    @property
    def arrays(self) -> list[str]:
        """The names of its arrays."""
        if self.variant:
            return list(VARIANTS[self.variant].arrays)
        sides = [self.args["roll_in"]] if "roll_in" in self.args else ["student", "teacher"]
        return list(dict.fromkeys(n.replace("*", side) for side in sides for n in self.inputs.split()))

    @property
    def counts(self) -> list[str]:
        """The arrays that say who still runs."""
        mine = [name for name in self.arrays if name.endswith("_count")]
        return mine if self.variant else ["student_count", "teacher_count"]


def _both(
    name: str,
    estimator: str,
    inputs: str,
    unit: str = "",
    direction: str = "none",
    args: Mapping[str, Any] | None = None,
    teacher: str = "",
    **more: Any,
) -> tuple[_Row, _Row]:
    """A score under the student's roll-in and, as `teacher` or `teacher_<name>`, under the teacher's."""
    student = {**(args or {}), "roll_in": "student"}
    one = _Row(name, estimator, inputs, unit, direction, student, **more)
    other = {**student, "roll_in": "teacher"}
    return one, replace(one, name=teacher or f"teacher_{name}", direction="none", args=other)


def _variant(name: str, variant: str) -> _Row:
    found = VARIANTS[variant]
    return _Row(name, found.estimator, found.inputs, found.unit, "lower", running=True, variant=variant)


_SUMS, _PER = "*_sum *_count", "nats/token"
_ERROR, _MINILLM = "accumulated_error", "accumulated_error_minillm"
_ROWS: tuple[_Row, ...] = (
    *_both("length", "mean_length_tokens", "*_count", "tokens", whole=True),
    _variant("ex_acc_err", "alive"),
    *_both(_ERROR, "accumulated_error_nats", _SUMS, "nats", "lower", running=True, teacher="teacher_error"),
    *_both("survival", "survival", "*_count"),
    _variant("ex_acc_err_minillm", "minillm-code"),
    *_both(_MINILLM, "minillm_error_nats", "*_step", "nats", "lower", teacher="teacher_error_minillm"),
    _variant("ex_acc_err_matched", "matched"),
    _variant("ex_acc_err_arora_paper", "arora22-paper"),
    _variant("ex_acc_err_arora_code", "arora22-code"),
    _variant("excess", "abs"),
    _Row("length_term", "length_term_nats", _SUMS, "nats"),
    _Row("state_term", "state_term_nats", _SUMS, "nats", "lower"),
    *_both("growth_exponent", "growth_exponent", _SUMS, "", "lower", running=True, first=2),
    _Row("eb_c", "eb_c", _SUMS, "", "lower", running=True),
    _Row("state_shift", "state_shift_nats", "student_reverse_kl student_count", "nats"),
    _Row("state_shift_reverse", "state_shift_reverse_nats", "teacher_forward_kl teacher_count", "nats"),
    *_both("acceptance", "acceptance", "*_total_variation *_count", "", "higher"),
    _Row("acceptance_drop", "acceptance_drop", "*_total_variation *_count", "", "lower"),
    _Row("teacher_entropy_rise", "teacher_entropy_rise", "*_teacher_entropy *_count", "nats", "lower"),
    _Row("teacher_surprise_rise", "teacher_surprise_rise", "*_surprise *_count", "nats", "lower"),
    *_both("entropy_drift", "entropy_drift", "*_student_entropy *_count", _PER, running=True, first=2),
    _Row("eos_hazard_ratio", "eos_hazard_ratio", "*_ended *_count"),
    *_both("seq_rep_4", "seq_rep", "*_seq_rep_4 *_seq_rep_4_count", args={"n": 4}, whole=True),
    *(
        row
        for window in per_prompt.WINDOWS
        for row in _both(
            f"rep_{window}",
            "rep",
            f"*_rep_{window} *_count",
            args={"window": window, "length": 0},
            whole=True,
        )
    ),
    *_both("loop_rate", "loop_rate", "*_loop *_count", "", "lower", whole=True),
    *_both("loop_onset", "loop_onset_tokens", "*_loop", "tokens", whole=True),
    *_both("stop_rate", "stop_rate", "*_ended *_count", args={"length": 0}, whole=True),
    *_both("truncation_rate", "truncation_rate", "*_ended *_count", args={"length": 0}, whole=True),
    *(
        row
        for percent in (10, 50, 90)
        for row in _both(
            f"length_q{percent}",
            "length_quantile_tokens",
            "*_count",
            "tokens",
            args={"level": percent / 100},
            whole=True,
        )
    ),
)


def _of_divergence(name: str) -> bool:
    """Whether an array depends on the divergence chosen."""
    return name.endswith(("_sum", "_running", "_context", "_step"))


@dataclass
class _Scorer:
    """Scores of one evidence file under one divergence; `keys`: what the arrays are stored as."""

    found: Mapping[str, Array]
    keys: Mapping[str, str]
    longest: int
    how: Resampling

    def score(self, row: _Row, prefix: str, left_out: dict[str, str]) -> dict[str, Score]:
        """The row's scores by name; what is left out is put into `left_out` with the reason."""
        inputs = {name: self.found[name] for name in [*row.arrays, "prompt"]}
        lengths = [self.longest]
        if not row.whole:
            alive = intervals.survival([{name: self.found[name] for name in row.counts}], self.longest)
            lengths = []
            for length in (one for one in LENGTHS if row.first <= one <= self.longest):
                if row.running and not row.ratio and (share := alive[length - 1]) < MIN_SURVIVAL:
                    why = f"survival {share:.3f} is below {MIN_SURVIVAL}"
                    left_out[f"{prefix}{row.name}@{length}"] = why
                else:
                    lengths.append(length)
        if not lengths:
            return {}
        if row.ratio:
            found = intervals.ex_acc_err_estimates(inputs, lengths, row.variant, how=self.how)
        else:
            found = intervals.estimates(_columns(row, lengths), inputs, unit=row.unit, how=self.how)
        names = [row.name] if row.whole else [f"{row.name}@{length}" for length in lengths]
        made = (self._score(row, inputs, *one) for one in zip(lengths, found, strict=True))
        return dict(zip(names, made, strict=True))

    def _score(self, row: _Row, inputs: Mapping[str, Array], length: int, found: Estimate) -> Score:
        args = dict(row.args)
        if not row.whole or "length" in args:
            args["length"] = length
        arrays = {name: self.keys[name] for name in inputs}
        if found.value is not None and found.unit == row.unit:  # the number that its estimator gives
            value = float(ESTIMATORS[row.estimator](inputs, np.ones((1, found.n)), **args)[0])
            found = replace(found, value=value)
        found = replace(found, warning=intervals.few_events(row.estimator, inputs, args) or found.warning)
        return _as_score(found, row.estimator, arrays, args, row.unit, row.direction)


def _as_score(
    found: Estimate, estimator: str, arrays: dict[str, str], args: dict[str, Any], unit: str, direction: str
) -> Score:
    """An estimate as a score; in another unit than the score's it is what there is instead of a value."""
    detail: dict[str, Any] = dict(zip(("low", "high"), _numbers([found.low, found.high]), strict=True))
    value = found.value
    if found.unit != unit:
        value, detail = None, {"low": None, "high": None}
        excess = _numbers([found.value, found.low, found.high])
        detail["excess_nats"] = dict(zip(("value", "low", "high"), excess, strict=True))
    if found.warning:
        detail["warning"] = found.warning
    return Score(value, unit, found.n, direction, estimator, arrays, args, detail)


def _numbers(values: Iterable[float | None], digits: int = 10) -> list[float | None]:
    return [None if x is None or not np.isfinite(x) else round(float(x), digits) for x in values]


def _columns(row: _Row, lengths: Sequence[int]) -> Callable[..., Array]:
    """f(arrays, weights) -> [R, L]: the row's estimator at each length."""
    if row.whole:
        args = {**row.args, **({"length": lengths[0]} if "length" in row.args else {})}
        return lambda arrays, weights: ESTIMATORS[row.estimator](arrays, weights, **args)[:, None]
    take = intervals.at_each(row.estimator, lengths)
    return lambda arrays, weights: take(arrays, weights, **row.args)


# ---------------------------------------------------------------------------------- scores of interventions
def _trials(name: str, one: Intervention) -> Iterator[tuple[str, str, str, str, Mapping[str, Array], Any]]:
    """(name, estimator, unit, direction, arrays, arguments) of the scores of an intervention."""
    if name == "hand_over":
        counts, arrays = counterfactuals.hand_over_arrays(one)
        inputs = {"student_score": arrays["student_score"], "prompt": arrays["prompt"]}
        for column, m in enumerate(counts):
            if m and not counts[0]:
                yield f"gain@{m}", "hand_over_gain", "points", "higher", inputs, {"column": column}
    elif name == "corruption":
        rates, arrays = counterfactuals.corruption_arrays(one)
        for kind in counterfactuals.KINDS:
            if (key := f"{kind}_forward_kl") in arrays:
                inputs = {n: arrays[n] for n in (key, "count", "prompt")}
                args: dict[str, Any] = {"rates": rates, "kind": kind}
                yield f"area_{kind}", "corruption_area_nats", "nats", "lower", inputs, args
    else:
        arrays = counterfactuals.excess_arrays(one)
        for setting in (setting for setting in one.conditions.values() if setting):
            kind, place = setting["kind"], setting["place"]
            which = f"{kind}@{place}"
            inputs = {n: arrays[n] for n in (f"{which}_forward_kl_excess", f"{which}_alive", "prompt")}
            length = min(HORIZON, one.description["decoding"]["max_new_tokens"] - place - 1)
            args = {"length": length, "kind": kind, "place": place}
            yield f"area_{which}", "excess_area_nats", "nats", "lower", inputs, args
            yield f"half_life_{which}", "half_life_tokens", "tokens", "lower", inputs, args


def _tried(name: str, one: Intervention, how: Resampling) -> tuple[dict[str, Score], dict[str, Array]]:
    """(scores, arrays) of an intervention, without the prefix `<name>/`."""
    scores: dict[str, Score] = {}
    stored: dict[str, Array] = {}
    for label, estimator, unit, direction, arrays, args in _trials(name, one):
        found = intervals.estimate(estimator, arrays, args, unit=unit, how=how)
        if name == "recovery":
            found = _after_a_token(found, arrays, **args)
        stored |= arrays
        keys = {key: f"{name}/{key}" for key in arrays}
        scores[label] = _as_score(found, estimator, keys, args, unit, direction)
    return scores, stored


def _after_a_token(
    found: Estimate, arrays: Mapping[str, Array], length: int, kind: str, place: int
) -> Estimate:
    """The estimate, without a value where too few twins run `length` tokens behind the replaced one."""
    ones = np.ones((1, found.n))
    alive = counterfactuals.excess_alive_curve(arrays, ones, length, kind, place)[0]
    if np.isnan(alive[0]):  # no twins
        return found
    if (share := float(np.nan_to_num(alive[-1]))) < MIN_SURVIVAL:
        warning = f"survival {length} tokens behind is {share:.3f}, below {MIN_SURVIVAL}: no number."
        return Estimate(None, None, None, found.unit, found.n, warning)
    if found.unit == "tokens" and found.value is None:
        return replace(found, warning=f"the excess does not fall to half within {length} tokens.")
    return found


def analyze(run: RunFolder, settings: Settings | None = None) -> Analysis:
    """Scores at every l of `LENGTHS` as far as the data reach (`<name>@l`) and of whole responses.

    ExAccErr (%) by definition, `ex_acc_err` (alive), `_matched`, `_arora_paper`, `_arora_code`, `_minillm`,
    and R - l epsilon `excess` (nats); `accumulated_error` = R(l), `teacher_error` = l epsilon(l), and both
    `_minillm` (nats); `length_term` + `state_term` (nats); `growth_exponent`, `eb_c`, `state_shift`,
    `acceptance`, reliability of the teacher, entropy drift, survival, lengths, stopping and repetition as
    `kdbench.estimators` has them; under the teacher's roll-in they are named `teacher_<name>`. Prefixes:
    `<profile>/` for further decoding profiles, `<divergence>/` for further divergences.

    Interventions that the run has give, with the conditions of their own that `detail["profiles"]` holds:
    `hand_over/gain@m` (ROUGE-L x 100 of what the teacher makes of the student's first m tokens, less that of
    the teacher alone), `corruption/area_<kind>` (nats), and within `HORIZON` tokens behind a token replaced
    after k others `recovery/area_<kind>@k` (nats) and `recovery/half_life_<kind>@k` (tokens).

    A score's detail holds `low` and `high` of its interval and, where there is something to say, `warning`.
    An ExAccErr follows the rules of `kdbench.intervals.ex_acc_err_estimates`: without a value it has a
    warning, and where epsilon is near 0 `excess_nats`. What else is conditional on running is left out under
    a survival of `MIN_SURVIVAL`; what is defined for all responses stays a number. A rate of fewer than
    `MIN_EVENTS` events has its number and a warning. The analysis' detail says what was `left_out` and why,
    under which `conditions` the evidence was made, and holds the whole curves, also of every snapshot of
    training; an ExAccErr there is None where there is no ratio.

    Raises: RecordError where a file is missing or damaged, lacks a roll-in, or is of another run or decoding
    profile than its place says.
    """
    chosen = settings or Settings()
    how = replace(intervals.DEFAULT, resamples=chosen.resamples)
    scores: dict[str, Score] = {}
    arrays: dict[str, Array] = {}
    left_out: dict[str, str] = {}
    about: dict[str, dict[str, Any]] = {}
    run_id = run.record.run_id
    for profile in ("", *run.profiles()):
        prefix = f"{profile}/" if profile else ""
        evidence = _read(run.evidence_of(profile), run_id, profile)
        longest = evidence.manifest.max_new_tokens
        about[profile] = {
            "profile": evidence.manifest.profile,
            "max_new_tokens": longest,
            "conditions": conditions(evidence.manifest),
        }
        for length in (length for length in LENGTHS if length > longest):
            left_out[f"{prefix}ex_acc_err@{length}"] = f"responses have at most {longest} tokens"
        for divergence in dict.fromkeys((DIVERGENCE, *chosen.divergences)):
            own = "" if divergence == DIVERGENCE else f"{divergence}/"
            found = per_prompt.arrays(evidence, divergence)
            keys = {name: prefix + (own if _of_divergence(name) else "") + name for name in found}
            arrays |= {keys[name]: value for name, value in found.items()}
            scorer = _Scorer(found, keys, longest, how)
            for row in _ROWS:
                if own and not any(_of_divergence(name) for name in row.arrays):
                    continue
                try:
                    if row.variant:
                        intervals.require(row.variant, found)
                    made = scorer.score(row, prefix + own, left_out)
                except RecordError as error:
                    left_out[f"{prefix}{own}{row.name}"] = str(error)
                    continue
                scores |= {prefix + own + name: score for name, score in made.items()}
            if not prefix and not own:
                about[""]["curve"] = curve(found, how)
                left_out |= _published_elsewhere(found, evidence.manifest.profile, run.profiles())
    for name, (_, one) in interventions(run, run_id).items():
        made, mine = _tried(name, one, how)
        scores |= {f"{name}/{label}": score for label, score in made.items()}
        arrays |= {f"{name}/{key}": value for key, value in mine.items()}
        about[name] = {"profile": one.description["profile"], "conditions": one.made_under}
    snapshots = [(step, _read(path, run_id, light=True)) for step, path in run.snapshots()]
    detail = {
        **about.pop(""),
        "divergence": DIVERGENCE,
        "left_out": left_out,
        "profiles": about,
        "snapshots": [{"step": step, **_snapshot(one, how)} for step, one in snapshots],
    }
    return Analysis(scores, arrays, detail)


def _published_elsewhere(found: Mapping[str, Array], profile: str, others: Sequence[str]) -> dict[str, str]:
    """The published definitions whose decoding no evidence of the run has, and what to collect."""
    out = {}
    for name, variant in VARIANTS.items():
        if variant.profile not in ("", profile, *others):
            try:
                intervals.require(name, found, profile)
            except RecordError as error:
                out[f"{variant.profile}/{variant.estimator}"] = str(error)
    return out


def _read(path: Path, run_id: str, profile: str = "", light: bool = False) -> Evidence:
    evidence = read_evidence(path)
    must_be_of(path, evidence.manifest.run, run_id)
    if profile not in ("", evidence.manifest.profile):
        raise RecordError(f"{path}: was made in the decoding profile '{evidence.manifest.profile}'.")
    needed = {"student"} if light else {"student", "teacher"}
    if not needed <= set(evidence.roll_ins):
        missing = ", ".join(sorted(needed - set(evidence.roll_ins)))
        raise RecordError(f"{path}: lacks the {missing} roll-in, which ExAccErr needs.")
    return evidence


def curve(found: Mapping[str, Array], how: Resampling) -> dict[str, list[float | None]]:
    """ExAccErr (alive), both errors and survival for l = 1, 2, ... as far as they reach, as lists.

    ExAccErr is None where epsilon may be 0.
    """
    ones = np.ones((1, len(found["prompt"])))
    length = reach(found)
    lists = {
        "accumulated_error": estimators.accumulated_error_curve(found, ones, length)[0],
        "survival": estimators.survival_curve(found, ones, length)[0],
    }
    if "teacher_sum" in found:
        lists["ex_acc_err"] = intervals.ex_acc_err_band(found, length, how=how)[0]
        lists["teacher_error"] = estimators.accumulated_error_curve(found, ones, length, "teacher")[0]
        lists["teacher_survival"] = estimators.survival_curve(found, ones, length, "teacher")[0]
    return {name: _numbers(values, 6) for name, values in lists.items()}


def _snapshot(evidence: Evidence, how: Resampling) -> dict[str, Any]:
    """A snapshot's curve and mean length, and `minillm-code` over l where the teacher's roll-in is there."""
    found = per_prompt.arrays(evidence)
    ones = np.ones((1, len(found["prompt"])))
    out: dict[str, Any] = {**curve(found, how), "prompts": len(found["prompt"])}
    out["length"] = round(float(estimators.mean_length_tokens(found, ones)[0]), 6)
    if "teacher_step" in found:
        longest = evidence.manifest.max_new_tokens
        ratio = intervals.ex_acc_err_band(found, longest, "minillm-code", how=how)[0]
        out["ex_acc_err_minillm"] = _numbers(ratio, 6)
    return out


# ---------------------------------------------------------------------------------------- figures and summary
def figures(runs: RunFolder | Sequence[RunFolder], out: Path) -> list[Path]:
    """Draw PNG and SVG files into `out`, write `summary-<row>.md` for each row, and return their paths.

    Runs of one row are averaged; bands and marks are 95 % intervals over prompts, and over training seeds
    where there are three or more. See `analyses._exposure_figures` for the figures.

    Raises: RecordError where a run has no scores, or where runs were made under different conditions.
    """
    from analyses._exposure_figures import draw
    from analyses._exposure_summary import write
    from kdbench.record import atomic

    found = rows(runs)
    paths = draw(found, out)
    for row in found:
        paths.append(out / f"summary-{row.name}.md")
        with atomic(paths[-1]) as file:
            file.write(write(row).encode())
    return paths


def summary(runs: RunFolder | Sequence[RunFolder]) -> str:
    """One page of Markdown on the runs of one row, see `analyses._exposure_summary`.

    Raises: RecordError where the runs are of several rows, or as `figures` does.
    """
    from analyses._exposure_summary import write

    found = rows(runs)
    if len(found) != 1:
        raise RecordError(f"a summary is of one row, not of: {', '.join(row.name for row in found)}.")
    return write(found[0])
