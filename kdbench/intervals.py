"""Intervals for estimators: cluster bootstrap over prompts, crossed with training seeds where there are some.

Source: percentile and BCa intervals of Efron 1987, https://doi.org/10.1080/01621459.1987.10478410; crossed
bootstrap of Owen & Eckles 2012, https://arxiv.org/abs/1106.2125; expansion for few prompts and few training
seeds of Hesterberg 2015, https://arxiv.org/abs/1411.5279.

A prompt with all its draws is the unit that is drawn. The whole estimator is computed again on each resample,
so a ratio's numerator and denominator are resampled together; draws depend on the number of prompts (of each
stratum) and on `seed` only, so two methods on the same prompts are compared in pairs. `arrays` are those of
`kdbench.per_prompt.arrays`; a list of them, one per training seed of one method, stands for the mean over
those seeds. From `MIN_SEEDS` training seeds on these are drawn too, see `seed_weights`.

Percentile intervals are the default. Their ends are the quantiles at Phi(sqrt(P / (P - 1)) t(P - 1)) instead
of Phi(z), without which they are too narrow by that factor; where that is beyond the extreme resample, the
interval goes on along the line through the median and that resample, over normal quantiles. A p-value is the
smallest alpha whose interval of level 1 - alpha excludes 0, so that the two never disagree.

In 2,000 simulated data sets of 200 prompts, 16 estimators of ratios of sums under each of three kinds of
error, 95 % intervals cover the truth in

                                        percentile                  BCa
    gamma                               94.7 % (93.3 to 95.3)       94.6 % (92.9 to 95.2)
    log-normal, prompts differ          94.5 % (93.1 to 95.3)       93.6 % (89.7 to 95.7)
    rare, accumulating once made        94.0 % (91.2 to 95.1)       94.4 % (91.2 to 95.5)

of the cases (1,000 resamples; mean and range over estimators; the lowest of the last line is the growth
exponent). BCa corrects for skewness, but not reliably where few large errors make up the mean.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from kdbench import counterfactuals, estimators  # noqa: F401  the first adds estimators
from kdbench.errors import unknown
from kdbench.estimators import ESTIMATORS, Array, Arrays
from kdbench.record import RecordError

MIN_SEEDS = 3
MIN_SURVIVAL = 0.2  # below this share of running responses a step's mean says little
MIN_EPSILON_NATS = 1e-6  # where the interval of epsilon reaches below, R / (l epsilon) is noise
MIN_EVENTS = 10  # of what a rate counts; with fewer, a percentile interval does not cover as it says
MIN_DEFINED = 0.95  # share of resamples in which an estimator must be defined to have an interval

Runs = Arrays | Sequence[Arrays]
Function = str | Callable[..., Array]


@dataclass(frozen=True)
class Resampling:
    """How an interval is made; see the module's docstring for the choice of `method`."""

    resamples: int = 2000
    method: Literal["percentile", "bca"] = "percentile"
    level: float = 0.95
    seed: int = 1


DEFAULT = Resampling()


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, all None where not defined; `n` counts prompts.

    `warning` is empty or one sentence: why there is no value, or what the value is instead.
    """

    value: float | None
    low: float | None
    high: float | None
    unit: str
    n: int
    warning: str = ""


@dataclass(frozen=True)
class Difference(Estimate):
    """The first method's value less the second's; `p_value` is two-sided, None where not defined."""

    p_value: float | None = None


# ---------------------------------------------------------------------------------------------------- weights
@lru_cache(maxsize=8)
def _weights(sizes: tuple[int, ...], resamples: int, seed: int) -> Array:
    """[1 + R, P]: ones, then the draws, for prompts in order of their strata, which have `sizes`."""
    generator = np.random.default_rng([seed, resamples, *sizes])
    parts = []
    for size in sizes:
        drawn = generator.integers(0, size, (resamples, size)) + size * np.arange(resamples)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size))
    rows = np.concatenate([np.ones((1, sum(sizes))), np.concatenate(parts, axis=1)])
    rows.setflags(write=False)
    return rows


def _rows(strata: int | Array, resamples: int, seed: int) -> Array:
    """[1 + R, P]: ones, then `weights`."""
    if np.ndim(strata) == 0:
        return _weights((int(strata),), resamples, seed)
    sizes = np.unique(strata, return_counts=True)[1]
    place = np.argsort(np.argsort(strata, kind="stable"), kind="stable")
    return np.asarray(_weights(tuple(sizes.tolist()), resamples, seed)[:, place])


def weights(strata: int | Array, resamples: int = DEFAULT.resamples, seed: int = DEFAULT.seed) -> Array:
    """[R, P] float64: how often each prompt is drawn, within its stratum; read-only.

    `strata` is the number of prompts, or [P] which stratum each belongs to. Equal arguments give equal
    weights.
    """
    return _rows(strata, resamples, seed)[1:]


def seed_weights(seeds: Sequence[int], resamples: int = DEFAULT.resamples) -> Array:
    """[R, S]: the weight of each training seed in each resample; one seed has weight 1.

    1/S + k (c_s / S - 1/S) where c is multinomial and k = sqrt(S / (S - 1)) t(0.975, S - 1) / z(0.975),
    without which an interval from three seeds is far too narrow. `seeds` are sorted, so that equal sets of
    seeds get equal weights.
    """
    count = len(seeds)
    if count == 1:
        return np.ones((resamples, 1))
    generator = np.random.default_rng([DEFAULT.seed, count, *(seed % 2**32 for seed in seeds)])
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    expansion = math.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.975) / ndtri(0.975)
    return np.asarray(1 / count + expansion * (drawn / count - 1 / count))


# ------------------------------------------------------------------------------------------------- resampling
@dataclass(frozen=True)
class _Sample:
    """An estimator's values: on P prompts [L], on R resamples [R, L], without each prompt [P, L] (BCa)."""

    point: Array
    draws: Array
    jackknife: Array | None
    prompts: int

    def interval(self, level: float) -> tuple[Array, Array]:
        """(low [L], high [L]) over the resamples where it is defined; NaN where these are too few."""
        if self.prompts < 2:
            return np.full_like(self.point, np.nan), np.full_like(self.point, np.nan)
        count = np.isfinite(self.draws).sum(axis=0)
        ends = np.array([[(1 - level) / 2], [(1 + level) / 2]])
        if self.jackknife is None:
            tails = math.sqrt(self.prompts / (self.prompts - 1)) * stdtrit(self.prompts - 1, ends)
        else:
            bias, acceleration = self._bca(count)
            tails = ndtri(ends)
            tails = bias + (bias + tails) / (1 - acceleration * (bias + tails))
        ordered = np.sort(np.where(np.isfinite(self.draws), self.draws, np.inf), axis=0)
        last = np.maximum(count, 1) - 1
        at = np.clip(ndtr(tails) * (count + 1) - 1, 0, last)
        below = np.floor(at).astype(np.int64)
        above = np.minimum(below + 1, last)
        first, second = (np.take_along_axis(ordered, i, axis=0) for i in (below, above))
        middle = [np.take_along_axis(ordered, i[None], axis=0) for i in (last // 2, (last + 1) // 2)]
        defined = (count >= MIN_DEFINED * len(self.draws)) & np.isfinite(self.point)
        with np.errstate(invalid="ignore", divide="ignore"):  # inf - inf where not defined
            inside = first + (at - below) * (second - first)
            median, beyond = (middle[0] + middle[1]) / 2, np.abs(tails / ndtri(1 / (count + 1)))
            ends = np.where(beyond > 1, median + beyond * (inside - median), inside)
            low, high = np.where(defined, ends, np.nan)
        return low, high

    def p_value(self) -> float | None:
        """The smallest alpha whose interval of level 1 - alpha excludes 0, at least 2 / (R + 1).

        Of the first column; None where there is no interval.
        """

        def excluded(alpha: float) -> bool:
            low, high = self.interval(1 - alpha)
            return bool(low[0] > 0 or high[0] < 0)

        least, most = 2 / (len(self.draws) + 1), 1.0
        if not np.isfinite(self.interval(0.0)[0][0]):
            return None
        if not excluded(most) or excluded(least):
            return least if excluded(least) else 1.0
        for _ in range(40):
            middle = (least + most) / 2
            least, most = (least, middle) if excluded(middle) else (middle, most)
        return most

    def _bca(self, count: Array) -> tuple[Array, Array]:
        """(z0 [L], a [L]): bias correction, and acceleration by the jackknife."""
        assert self.jackknife is not None
        below = (self.draws < self.point).sum(axis=0) + (self.draws == self.point).sum(axis=0) / 2
        half = 0.5 / np.maximum(count, 1)
        bias = ndtri(np.clip(below / np.maximum(count, 1), half, 1 - half))
        change = np.nan_to_num(self.jackknife.mean(axis=0) - self.jackknife)
        square = (change**2).sum(axis=0)
        cube = (change**3).sum(axis=0)
        acceleration = np.divide(cube, 6 * square**1.5, out=np.zeros_like(cube), where=square > 0)
        return bias, acceleration


def _runs(runs: Runs) -> list[Arrays]:
    """The runs, each with prompts in order. Raises RecordError when they differ in prompts."""
    listed: list[Arrays] = [runs] if isinstance(runs, Mapping) else list(runs)
    ordered = []
    for arrays in listed:
        order = np.argsort(arrays["prompt"], kind="stable")
        straight = bool((np.diff(order) == 1).all())
        ordered.append(arrays if straight else {name: value[order] for name, value in arrays.items()})
    for other in ordered[1:]:
        _same_prompts(ordered[0], other)
    return ordered


def _same_prompts(one: Arrays, other: Arrays) -> None:
    """Raises RecordError, naming what differs, unless both have the same prompts in the same strata."""
    first, second = one["prompt"], other["prompt"]
    if not np.array_equal(first, second):
        only = [np.setdiff1d(a, b) for a, b in ((first, second), (second, first))]
        parts = [
            f"{len(ids)} only in the {which} (such as {ids[0]})"
            for which, ids in zip(("first", "second"), only, strict=True)
            if len(ids)
        ]
        what = ", ".join(parts) or f"{len(first)} against {len(second)} rows"
        raise RecordError(f"a comparison needs the same prompts: {what}.")
    if not np.array_equal(one.get("stratum", 0), other.get("stratum", 0)):
        raise RecordError("a comparison needs the same prompts: their strata differ.")


def _function(function: Function) -> Callable[..., Array]:
    if callable(function):
        return function
    if function not in ESTIMATORS:
        raise unknown("estimator", function, ESTIMATORS)
    return ESTIMATORS[function]


def _sample(
    function: Callable[..., Array],
    runs: Sequence[Arrays],
    args: Mapping[str, Any],
    how: "Resampling",
) -> _Sample:
    """The estimator of every run in one call each, averaged over runs."""
    count, resamples = len(runs[0]["prompt"]), how.resamples
    rows = _rows(runs[0].get("stratum", count), resamples, how.seed)
    drawn_seeds = len(runs) >= MIN_SEEDS
    bca = how.method == "bca" and not drawn_seeds
    if bca:
        rows = np.concatenate([rows, 1 - np.eye(count)])
    values = np.stack([function(arrays, rows, **args).reshape(len(rows), -1) for arrays in runs])
    mean = values.mean(axis=0)
    draws = mean[1 : 1 + resamples]
    if drawn_seeds:
        share = seed_weights(range(len(runs)), resamples)
        draws = np.einsum("rs,srl->rl", share, values[:, 1 : 1 + resamples])
    return _Sample(mean[0], draws, mean[1 + resamples :] if bca else None, count)


Three = tuple[float | None, float | None, float | None]


def _numbers(sample: _Sample, low: Array, high: Array, at: int = 0) -> Three:
    """(value, low, high) of one column, None where not defined."""
    value, *ends = (float(x[at]) if np.isfinite(x[at]) else None for x in (sample.point, low, high))
    return value, ends[0], ends[1]


def _warning(sample: _Sample, low: Array, at: int = 0) -> str:
    """What to say about one column of a sample; '' where all is well."""
    if not np.isfinite(sample.point[at]):
        return "not defined on these responses."
    if sample.prompts < 2:
        return "no interval: one prompt is too few."
    lost = int((~np.isfinite(sample.draws[:, at])).sum())
    if not np.isfinite(low[at]):
        return f"no interval: not defined in {lost} of {len(sample.draws)} resamples."
    return f"not defined in {lost} of {len(sample.draws)} resamples, which are left out." if lost else ""


# the array that counts an estimator's events, what these are, and whether it also needs responses without one
_EVENTS = {
    "loop_rate": ("loop", "a loop", True),
    "loop_onset_tokens": ("loop", "a loop", False),
    "stop_rate": ("ended", "an end token", True),
    "truncation_rate": ("ended", "an end token", True),
    "eos_hazard_ratio": ("ended", "an end token", False),
}


def few_events(
    name: str, runs: Runs, args: Mapping[str, Any] | None = None, roll_ins: Sequence[str] = ()
) -> str:
    """A warning where an estimator rests on fewer than `MIN_EVENTS` events, '' elsewhere.

    Events are loops and end tokens, of all runs together; those of a share, which is as badly known near 1 as
    near 0, also the responses without one. `roll_ins`: what is counted together, for a difference between
    them; else the one of `args`. `eos_hazard_ratio` needs the events under either roll-in.
    """
    if name not in _EVENTS:
        return ""
    column, noun, share = _EVENTS[name]
    given, listed = args or {}, [runs] if isinstance(runs, Mapping) else list(runs)
    groups = [list(roll_ins) or [str(given.get("roll_in", "student"))]]
    if name == "eos_hazard_ratio":
        groups = [["student"], ["teacher"]]
    for group in groups:
        pairs = [(arrays, g) for arrays in listed for g in group]
        seen = sum(int(arrays[f"{g}_{column}"][:, : given.get("length")].sum()) for arrays, g in pairs)
        counts = {"with": seen}
        if share:
            counts["without"] = sum(int(arrays[f"{g}_count"][:, 0].sum()) for arrays, g in pairs) - seen
        for which, count in counts.items():
            if count < MIN_EVENTS:
                return f"fewer than {MIN_EVENTS} events: responses {which} {noun}, {count}."
    return ""


def estimates(
    function: Callable[..., Array], runs: Runs, *, unit: str = "", how: Resampling = DEFAULT
) -> list[Estimate]:
    """As `estimate`, one for each column of `function(arrays, weights) -> [R, L]`."""
    listed = _runs(runs)
    sample = _sample(function, listed, {}, how)
    low, high = sample.interval(how.level)
    count = len(listed[0]["prompt"])
    return [
        Estimate(*_numbers(sample, low, high, at), unit, count, _warning(sample, low, at))
        for at in range(len(low))
    ]


def curve_of(name: str) -> Callable[..., Array] | None:
    """The function of `kdbench.estimators` that gives an estimator for l = 1..length at once, if any."""
    curve: Callable[..., Array] | None = getattr(estimators, f"{name.removesuffix('_nats')}_curve", None)
    return curve or getattr(estimators, f"{name}_curve", None)


def at_each(name: str, lengths: Sequence[int]) -> Callable[..., Array]:
    """f(arrays, weights, **args) -> [R, L]: an estimator at each length, from its curve where it has one."""
    curve = curve_of(name)
    if curve is None:
        one = ESTIMATORS[name]
        return lambda arrays, weights, **args: np.stack(
            [one(arrays, weights, length=length, **args) for length in lengths], axis=1
        )
    at, longest = np.asarray(lengths) - 1, max(lengths)
    return lambda arrays, weights, **args: curve(arrays, weights, longest, **args)[:, at]


def estimate(
    function: Function,
    runs: Runs,
    args: Mapping[str, Any] | None = None,
    *,
    unit: str = "",
    how: Resampling = DEFAULT,
) -> Estimate:
    """The estimator (a name of `ESTIMATORS` or a function) on the data, with its interval.

    `runs`: arrays, or a list of them, one per training seed. `args` go to the estimator.

    Raises: UserError for an unknown estimator, RecordError where the runs differ in prompts.
    """
    take, given = _function(function), args or {}
    found, *_ = estimates(lambda arrays, weights: take(arrays, weights, **given), runs, unit=unit, how=how)
    return replace(found, warning=few_events(take.__name__, runs, given) or found.warning)


def band(
    curve: Callable[..., Array],
    runs: Runs,
    length: int,
    args: Mapping[str, Any] | None = None,
    *,
    how: Resampling = DEFAULT,
) -> tuple[Array, Array, Array]:
    """(point, low, high), each [length], of a `..._curve` of `kdbench.estimators`; NaN where not defined.

    Intervals hold at each l, not for all l at once. Other arguments as in `estimate`.
    """
    sample = _sample(curve, _runs(runs), {"length": length, **(args or {})}, how)
    return (sample.point, *sample.interval(how.level))


def paired(
    function: Function,
    runs_a: Runs,
    runs_b: Runs,
    args: Mapping[str, Any] | None = None,
    *,
    unit: str = "",
    how: Resampling = DEFAULT,
) -> Difference:
    """The estimator on a less that on b, both on the same draws of prompts (and of training seeds).

    The p-value is the smallest alpha whose interval of level 1 - alpha excludes 0, at least
    2 / (resamples + 1). Arguments as in `estimate`; with lists both methods have the same training seeds, in
    the same order.

    Raises: RecordError, naming what differs, unless prompts and number of training seeds are the same.
    """
    one, other = _runs(runs_a), _runs(runs_b)
    _same_prompts(one[0], other[0])
    if len(one) != len(other):
        raise RecordError(f"a comparison needs the same training seeds: {len(one)} against {len(other)}.")
    take = _function(function)
    a, b = (_sample(take, runs, args or {}, how) for runs in (one, other))
    left_out = None if a.jackknife is None or b.jackknife is None else a.jackknife - b.jackknife
    sample = _Sample(a.point - b.point, a.draws - b.draws, left_out, a.prompts)
    low, high = sample.interval(how.level)
    warning = few_events(take.__name__, [*one, *other], args) or _warning(sample, low)
    numbers, count = _numbers(sample, low, high), len(one[0]["prompt"])
    return Difference(*numbers, unit, count, warning, sample.p_value())


# --------------------------------------------------------------------------------------- variants of ExAccErr
@dataclass(frozen=True)
class Variant:
    """A published or own definition of ExAccErr.

    `estimator` and `error` (R(l), and E(l) with roll_in=`oracle`) are names of `ESTIMATORS`, `estimator` with
    `_curve` its curve; `inputs` are the arrays of one roll-in. `profile`: the decoding profile of the
    published figures, '' for any.
    """

    estimator: str
    error: str
    inputs: str
    oracle: str = "teacher"
    context: bool = False
    profile: str = ""
    unit: str = "%"

    @property
    def roll_ins(self) -> tuple[str, str]:
        """The roll-ins that R and E are taken under."""
        return ("student", self.oracle)

    def arrays_of(self, roll_in: str) -> list[str]:
        """The names of the arrays that it reads of one roll-in, the counts of responses included."""
        return [name.replace("*", roll_in) for name in self.inputs.split()]

    @property
    def arrays(self) -> list[str]:
        """The names of all arrays that it reads."""
        return list(dict.fromkeys(name for g in self.roll_ins for name in self.arrays_of(g)))

    @property
    def curve(self) -> Callable[..., Array]:
        """The function that gives [R, length]."""
        found: Callable[..., Array] = getattr(estimators, f"{self.estimator}_curve")
        return found

    def excess(self, arrays: Arrays, weights: Array, length: int) -> Array:
        """[R]: R(l) - l epsilon(l) in nats."""
        student, oracle = (
            ESTIMATORS[self.error](arrays, weights, length=length, roll_in=g) for g in self.roll_ins
        )
        return student - oracle


VARIANTS = {
    "alive": Variant("ex_acc_err_alive", "accumulated_error_nats", "*_sum *_count"),
    "matched": Variant("ex_acc_err_matched", "matched_error_nats", "matched_*_sum matched_count"),
    "abs": Variant("excess_nats", "accumulated_error_nats", "*_sum *_count", unit="nats"),
    "arora22-paper": Variant(
        "ex_acc_err_arora_paper", "arora_paper_error_nats", "*_sum *_count", profile="plain"
    ),
    "arora22-code": Variant(
        "ex_acc_err_arora_code",
        "arora_code_error_nats",
        "*_running *_context *_count",
        oracle="reference",
        context=True,
        profile="plain",
    ),
    "minillm-code": Variant("ex_acc_err_minillm", "minillm_error_nats", "*_step *_count", profile="minillm"),
}


def require(name: str, arrays: Collection[str], profile: str | None = None) -> Variant:
    """The variant, when evidence with these arrays can carry it.

    `profile`: the evidence's decoding profile where the figure as published is asked for; without it the
    variant's formula is taken on any decoding.

    Raises: UserError for an unknown name; RecordError that says what to collect.
    """
    if name not in VARIANTS:
        raise unknown("variant", name, VARIANTS)
    variant = VARIANTS[name]
    there = [g for g in variant.roll_ins if any(g in name.split("_") for name in arrays)]
    needs = [f"{g} roll-in" for g in variant.roll_ins if g not in there]
    if variant.context and any(f"{g}_context" not in arrays for g in there):
        needs.append("context rows")
    if profile is not None and variant.profile not in ("", profile):
        needs.append(f"as published the decoding profile '{variant.profile}', not '{profile}'")
    if needs:
        collect = f"`kdbench collect RUN --profile {variant.profile or profile or 'plain'}`"
        raise RecordError(f"{name} needs {' and '.join(needs)}: {collect}.")
    missing = [array for array in variant.arrays if array not in arrays]
    if missing:
        raise RecordError(f"{name} needs the arrays {', '.join(missing)}: score the run anew.")
    return variant


def ex_acc_err_estimates(
    runs: Runs,
    lengths: Sequence[int],
    variant: str = "alive",
    *,
    profile: str | None = None,
    how: Resampling = DEFAULT,
) -> list[Estimate]:
    """ExAccErr(l) of a variant in percent at each length, with its interval, or why there is none.

    - every divergence that the variant reads is exactly 0: 0 with the interval [0, 0];
    - survival at l under `MIN_SURVIVAL` under either of its roll-ins: no value, a warning;
    - not defined on the data: no value, a warning;
    - the interval of epsilon (without one, epsilon) reaches below `MIN_EPSILON_NATS`: R - l epsilon in nats,
      and a warning.

    'abs' is R - l epsilon in nats under the first two rules. `profile` as in `require`, other arguments as in
    `estimate`.

    Raises: UserError for an unknown variant; RecordError where the evidence cannot carry it, which says what
    to collect, or where runs differ in prompts.
    """
    listed = _runs(runs)
    chosen, *_ = [require(variant, arrays, profile) for arrays in listed]
    unit, count = chosen.unit, len(listed[0]["prompt"])
    counts = [name for name in chosen.arrays if name.endswith("_count")]
    if not any(np.any(arrays[name]) for arrays in listed for name in chosen.arrays if name not in counts):
        return [Estimate(0.0, 0.0, 0.0, unit, count) for _ in lengths]
    alive = survival([{name: arrays[name] for name in counts} for arrays in listed], max(lengths))
    error = at_each(chosen.error, lengths)

    def table(arrays: Arrays, weights: Array) -> Array:
        """[R, 3 L]: ExAccErr (%), R - E and E (nats)."""
        student, oracle = (error(arrays, weights, roll_in=g) for g in chosen.roll_ins)
        return np.concatenate([estimators.excess(student, oracle), student - oracle, oracle], axis=1)

    sample = _sample(table, listed, {}, how)
    low, high = sample.interval(how.level)
    found = []
    for i, length in enumerate(lengths):
        ratio, excess, oracle = i, i + len(lengths), i + 2 * len(lengths)
        least = low[oracle] if np.isfinite(low[oracle]) else sample.point[oracle]
        if (share := float(alive[length - 1])) < MIN_SURVIVAL:
            warning = f"survival at l = {length} is {share:.3f}, below {MIN_SURVIVAL}: no number."
            found.append(Estimate(None, None, None, unit, count, warning))
        elif unit != "%" or least / length >= MIN_EPSILON_NATS or np.isnan(least):
            at = ratio if unit == "%" else excess
            found.append(Estimate(*_numbers(sample, low, high, at), unit, count, _warning(sample, low, at)))
        else:
            warning = f"epsilon may be under {MIN_EPSILON_NATS:g} nats: no ratio, R - l epsilon instead."
            found.append(Estimate(*_numbers(sample, low, high, excess), "nats", count, warning))
    return found


def ex_acc_err_estimate(
    runs: Runs,
    length: int,
    variant: str = "alive",
    *,
    profile: str | None = None,
    how: Resampling = DEFAULT,
) -> Estimate:
    """`ex_acc_err_estimates` at one length."""
    return ex_acc_err_estimates(runs, [length], variant, profile=profile, how=how)[0]


def ex_acc_err_band(
    runs: Runs, length: int, variant: str = "alive", *, how: Resampling = DEFAULT
) -> tuple[Array, Array, Array]:
    """(point, low, high) of ExAccErr in percent for l = 1..length; NaN where there is no ratio."""
    found = ex_acc_err_estimates(runs, range(1, length + 1), variant, how=how)
    kept = [(x.value, x.low, x.high) if x.unit == "%" else (None, None, None) for x in found]
    point, low, high = np.array(kept, dtype=np.float64).T
    return point, low, high


def survival(runs: Sequence[Arrays], length: int) -> Array:
    """[length]: the least share, over runs and their `..._count`, of responses of l tokens or more."""
    shares = [
        estimators.survival_curve({"student_count": value}, np.ones((1, len(value))), length)[0]
        for arrays in runs
        for name, value in arrays.items()
        if name.endswith("_count")
    ]
    return np.asarray(np.min(shares, axis=0))
