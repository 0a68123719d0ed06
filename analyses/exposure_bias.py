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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from analyses._exposure_rows import LENGTHS, VERSION, reach, rows
from kdbench import estimators, intervals, per_prompt
from kdbench.errors import UserError, unknown
from kdbench.estimators import ESTIMATORS, Array
from kdbench.evidence import DIVERGENCES, Evidence, conditions, read_evidence
from kdbench.intervals import MIN_EPSILON_NATS, MIN_SURVIVAL, VARIANTS, Resampling
from kdbench.record import Analysis, RecordError, RunFolder, Score

__all__ = ["LENGTHS", "VERSION", "Settings", "analyze", "figures", "summary"]
DIVERGENCE = "forward_kl"


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
    conditional on running, so left out where survival is low. `first`: the least l at which it is defined. An
    argument `length` of 0 stands for max_new_tokens.
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


def _variant(name: str, variant: str, running: bool) -> _Row:
    found = VARIANTS[variant]
    return _Row(name, found.estimator, found.inputs, found.unit, "lower", running=running, variant=variant)


_SUMS, _PER = "*_sum *_count", "nats/token"
_ERROR, _MINILLM = "accumulated_error", "accumulated_error_minillm"
_ROWS: tuple[_Row, ...] = (
    *_both("length", "mean_length_tokens", "*_count", "tokens", whole=True),
    _variant("ex_acc_err", "alive", True),
    *_both(_ERROR, "accumulated_error_nats", _SUMS, "nats", "lower", running=True, teacher="teacher_error"),
    *_both("survival", "survival", "*_count", running=True),
    _variant("ex_acc_err_minillm", "minillm-code", False),
    *_both(_MINILLM, "minillm_error_nats", "*_step", "nats", "lower", teacher="teacher_error_minillm"),
    _variant("ex_acc_err_matched", "matched", True),
    _variant("ex_acc_err_arora_paper", "arora22-paper", False),
    _variant("ex_acc_err_arora_code", "arora22-code", True),
    _variant("excess", "abs", True),
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

    def survival(self, counts: Sequence[str], length: int) -> float:
        """The least share of responses with `length` tokens or more."""
        ones = np.ones((1, len(self.found["prompt"])))
        shares = [estimators.survival({"student_count": self.found[name]}, ones, length) for name in counts]
        return min(float(share[0]) for share in shares)

    def score(self, row: _Row, prefix: str, left_out: dict[str, str]) -> dict[str, Score]:
        """The row's scores by name; what is left out is put into `left_out` with the reason."""
        inputs = {name: self.found[name] for name in [*row.arrays, "prompt"]}
        if row.whole:
            return {row.name: self._scores(row, inputs, [self.longest])[0]}
        lengths, low = [], {}
        for length in (one for one in LENGTHS if row.first <= one <= self.longest):
            share = self.survival(row.counts, length)
            if share < MIN_SURVIVAL and row.running:
                left_out[f"{prefix}{row.name}@{length}"] = f"survival {share:.3f} is below {MIN_SURVIVAL}"
                continue
            if share < MIN_SURVIVAL:
                low[length] = f"survival at l = {length} is {share:.3f}, below {MIN_SURVIVAL}."
            lengths.append(length)
        made = self._scores(row, inputs, lengths) if lengths else []
        for length, score in zip(lengths, made, strict=True):
            if length in low:
                score.detail["warning"] = " ".join([low[length], score.detail.get("warning", "")]).strip()
        return {f"{row.name}@{length}": score for length, score in zip(lengths, made, strict=True)}

    def _scores(self, row: _Row, inputs: Mapping[str, Array], lengths: Sequence[int]) -> list[Score]:
        function, ones = ESTIMATORS[row.estimator], np.ones((1, len(inputs["prompt"])))
        ratio = bool(row.variant) and row.unit == "%"
        # exactly no error: 0 with [0, 0], though there is no ratio
        nothing = ratio and not any(np.any(inputs[name]) for name in row.arrays if _of_divergence(name))
        table = _resampled(row, lengths, self.longest)
        points, lows, highs = intervals.band(table, inputs, 0, how=self.how)
        made = []
        for i, length in enumerate(lengths):
            args = dict(row.args)
            if not row.whole or "length" in args:
                args["length"] = length
            value = float(function(inputs, ones, **args)[0])
            detail: dict[str, Any] = dict(zip(("low", "high"), _numbers([lows[i], highs[i]]), strict=True))
            at, oracle = i + len(lengths), i + 2 * len(lengths)
            least = next(
                (one[oracle] for one in (lows, points) if ratio and np.isfinite(one[oracle])), np.inf
            )
            if not nothing and least / length < MIN_EPSILON_NATS:
                excess = _numbers([points[at], lows[at], highs[at]])
                warning = f"epsilon may be under {MIN_EPSILON_NATS:g} nats: no ratio, R - l epsilon instead."
                detail = {"low": None, "high": None, "warning": warning}
                detail["excess_nats"] = dict(zip(("value", "low", "high"), excess, strict=True))
                value = np.nan
            elif not np.isfinite(value):
                detail["warning"] = "not defined on these responses."
            elif detail["low"] is None:
                few = "one prompt is too few" if ones.size < 2 else "not defined in too many resamples"
                detail["warning"] = f"no interval: {few}."
            usable = value if np.isfinite(value) else None
            arrays = {name: self.keys[name] for name in inputs}
            made.append(
                Score(usable, row.unit, ones.size, row.direction, row.estimator, arrays, args, detail)
            )
        return made


def _numbers(values: Sequence[float] | Array, digits: int = 10) -> list[float | None]:
    return [round(float(value), digits) if np.isfinite(value) else None for value in values]


def _at_each(name: str, lengths: Sequence[int]) -> Callable[..., Array]:
    """f(arrays, weights, **args) -> [R, L]: an estimator at each length, from its curve where it has one."""
    curve = getattr(estimators, f"{name.removesuffix('_nats')}_curve", None)
    curve = curve or getattr(estimators, f"{name}_curve", None)
    if curve is None:
        one = ESTIMATORS[name]
        return lambda arrays, weights, **args: np.stack(
            [one(arrays, weights, length=length, **args) for length in lengths], axis=1
        )
    at, longest = np.asarray(lengths) - 1, max(lengths)
    return lambda arrays, weights, **args: curve(arrays, weights, longest, **args)[:, at]


def _resampled(row: _Row, lengths: Sequence[int], longest: int) -> Callable[..., Array]:
    """f(arrays, weights, length) -> [R, L], or of a ratio [R, 3 L]: ratio (%), R - E and E (nats)."""
    if row.whole:
        args = {**row.args, **({"length": longest} if "length" in row.args else {})}
        return lambda arrays, weights, length: ESTIMATORS[row.estimator](arrays, weights, **args)[:, None]
    if not row.variant or row.unit != "%":
        take = _at_each(row.estimator, lengths)
        return lambda arrays, weights, length: take(arrays, weights, **row.args)
    error, oracle = _at_each(VARIANTS[row.variant].error, lengths), VARIANTS[row.variant].oracle

    def table(arrays: Mapping[str, Array], weights: Array, length: int) -> Array:
        student, own = error(arrays, weights), error(arrays, weights, roll_in=oracle)
        return np.concatenate([estimators.excess(student, own), student - own, own], axis=1)

    return table


def analyze(run: RunFolder, settings: Settings | None = None) -> Analysis:
    """Scores at every l of `LENGTHS` as far as the data reach (`<name>@l`) and of whole responses.

    ExAccErr (%) by definition, `ex_acc_err` (alive), `_matched`, `_arora_paper`, `_arora_code`, `_minillm`,
    and R - l epsilon `excess` (nats); `accumulated_error` = R(l), `teacher_error` = l epsilon(l), and both
    `_minillm` (nats); `length_term` + `state_term` (nats); `growth_exponent`, `eb_c`, `state_shift`,
    `acceptance`, reliability of the teacher, entropy drift, survival, lengths, stopping and repetition as
    `kdbench.estimators` has them; under the teacher's roll-in they are named `teacher_<name>`. Prefixes:
    `<profile>/` for further decoding profiles, `<divergence>/` for further divergences.

    A score's detail holds `low` and `high` of its interval and, where there is something to say, `warning`.
    What is conditional on running reaches to a survival of `MIN_SURVIVAL`. The analysis' detail says what was
    `left_out` and why, under which `conditions` the evidence was made, and holds the whole curves, also of
    every snapshot of training.

    Raises: RecordError where evidence is missing or damaged or lacks a roll-in.
    """
    chosen = settings or Settings()
    how = replace(intervals.DEFAULT, resamples=chosen.resamples)
    scores: dict[str, Score] = {}
    arrays: dict[str, Array] = {}
    left_out: dict[str, str] = {}
    about: dict[str, dict[str, Any]] = {}
    for profile in ("", *run.profiles()):
        prefix = f"{profile}/" if profile else ""
        evidence = _read(run.evidence_of(profile))
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
                about[""]["curve"] = curve(found)
                left_out |= _published_elsewhere(found, evidence.manifest.profile, run.profiles())
    detail = {
        **about.pop(""),
        "divergence": DIVERGENCE,
        "left_out": left_out,
        "profiles": about,
        "snapshots": [{"step": step, **_snapshot(_read(path, light=True))} for step, path in run.snapshots()],
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


def _read(path: Path, light: bool = False) -> Evidence:
    evidence = read_evidence(path)
    needed = {"student"} if light else {"student", "teacher"}
    if not needed <= set(evidence.roll_ins):
        missing = ", ".join(sorted(needed - set(evidence.roll_ins)))
        raise RecordError(f"{path}: lacks the {missing} roll-in, which ExAccErr needs.")
    return evidence


def curve(found: Mapping[str, Array]) -> dict[str, list[float | None]]:
    """ExAccErr (alive), both errors and survival for l = 1, 2, ... as far as they reach, as lists."""
    ones = np.ones((1, len(found["prompt"])))
    length = reach(found)
    lists = {
        "accumulated_error": estimators.accumulated_error_curve(found, ones, length)[0],
        "survival": estimators.survival_curve(found, ones, length)[0],
    }
    if "teacher_sum" in found:
        lists["ex_acc_err"] = estimators.ex_acc_err_alive_curve(found, ones, length)[0]
        lists["teacher_error"] = estimators.accumulated_error_curve(found, ones, length, "teacher")[0]
        lists["teacher_survival"] = estimators.survival_curve(found, ones, length, "teacher")[0]
    return {name: _numbers(values, 6) for name, values in lists.items()}


def _snapshot(evidence: Evidence) -> dict[str, Any]:
    """A snapshot's curve and mean length, and `minillm-code` over l where the teacher's roll-in is there."""
    found = per_prompt.arrays(evidence)
    ones = np.ones((1, len(found["prompt"])))
    out: dict[str, Any] = {**curve(found), "prompts": len(found["prompt"])}
    out["length"] = round(float(estimators.mean_length_tokens(found, ones)[0]), 6)
    if "teacher_step" in found:
        longest = evidence.manifest.max_new_tokens
        out["ex_acc_err_minillm"] = _numbers(estimators.ex_acc_err_minillm_curve(found, ones, longest)[0], 6)
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
