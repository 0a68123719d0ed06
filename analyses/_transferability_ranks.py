"""How well a metric ranks sources, what following it gains, and how pairs of each relation differ.

Source: Spearman's correlation over the sources of a target, averaged over targets, or over all pairs at once;
PANDA (Zhong et al. 2024, https://arxiv.org/abs/2208.10160) judges its metric by such a correlation without
saying how it is averaged. Its figures include self-transfers, whose prediction is the highest by definition.
Differs: both are given with self-transfers and without; ties have average ranks; intervals.

Shapes: K training seeds, S sources, T targets, R resamples. Correlations are of tables averaged over training
seeds, as noise lowers those within a seed. Their intervals are percentile intervals of a bootstrap that draws
sources and, from `MIN_SEEDS` on, training seeds, over which both tables are averaged; targets are those of
the board. A source that is drawn twice ties with itself. As a draw has fewer seeds than there are, resampled
tables are noisier than the one at hand, and intervals reach rather too far towards 0. In simulated boards
(three seeds; predictions and gains share effects of pairs, or of sources too; correlations from 0.1 to 0.95)
95 % intervals cover the truth in 98 to 100 % of 300 cases with 8 sources and 4 targets, in 92 to 99 % of 120
with 21 and 9. Drawing targets too makes them nearly twice as wide, and they then never miss it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from scipy.special import stdtrit

from analyses._transferability_rows import Pairs, over_seeds
from kdbench import intervals
from kdbench.estimators import Array, Arrays
from kdbench.intervals import MIN_SEEDS, Estimate

MIN_SOURCES = 3  # of a target: two are ranked rightly or wrongly, whatever the metric
_TINY = 1e-9
_DIGITS = 9  # after the point; values that agree in these are equal
_MOST_ORDERS = 2000


# ---------------------------------------------------------------------------------------------- correlation
def ranks(values: Array, weights: Array) -> Array:
    """[R, N]: average ranks of values [N] or [R, N] of which each counts `weights` [R, N] times.

    Values that differ by rounding, as means over seeds do, tie.
    """
    values = values.round(_DIGITS)
    if values.ndim == 1:
        below, equal = (op(values[:, None], values).astype(np.float64) for op in (np.less, np.equal))
        return np.asarray(weights @ below + (weights @ equal + 1) / 2)
    less, same = (op(values[:, :, None], values[:, None, :]) for op in (np.less, np.equal))
    return np.asarray(np.einsum("rj,rji->ri", weights, less + same / 2) + 0.5)


def spearman(x: Array, y: Array, weights: Array) -> Array:
    """[R]: Spearman's correlation of x and y, each [N] or [R, N]; NaN where one of them is constant.

    Whole weights [R, N] give that of values which are there so many times.
    """
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1)
    ranked = [ranks(values, weights) for values in (x, y)]
    one, other = (found - (weights * found).sum(axis=1, keepdims=True) / total for found in ranked)
    top = (weights * one * other).sum(axis=1)
    square = (weights * one**2).sum(axis=1) * (weights * other**2).sum(axis=1)
    rho: Array = np.divide(top, np.sqrt(square), out=np.full(len(top), np.nan), where=square > _TINY)
    return rho


def by_target(prediction: Array, gain: Array, weights: Array) -> Array:
    """[R, T]: the correlation over sources of each target, of two tables [S, T] with NaN for what is not
    there; NaN where fewer than `MIN_SOURCES` sources are, or where predictions or gains are constant.
    """
    found = np.full((len(weights), prediction.shape[1]), np.nan)
    for t in range(prediction.shape[1]):
        there = np.isfinite(prediction[:, t]) & np.isfinite(gain[:, t])
        if there.sum() >= MIN_SOURCES:
            found[:, t] = spearman(prediction[there, t], gain[there, t], weights[:, there])
    return found


def _mean(values: Array) -> Array:
    """[R]: the mean over the last axis of what is defined."""
    return over_seeds(values.T)


Statistic = Callable[[Array, Array, Array], Array]


def over_targets(prediction: Array, gain: Array, weights: Array) -> Array:
    """[R]: the mean over targets of `by_target`, of two tables [S, T] and `weights` [R, S] of sources."""
    return _mean(by_target(prediction, gain, weights))


def pooled(prediction: Array, gain: Array, weights: Array) -> Array:
    """[R]: the correlation over all pairs; arguments as of `over_targets`."""
    s, t = np.nonzero(np.isfinite(prediction) & np.isfinite(gain))
    if len(s) < MIN_SOURCES:
        return np.full(len(weights), np.nan)
    return spearman(prediction[s, t], gain[s, t], weights[:, s])


def point(statistic: Statistic, prediction: Array, gain: Array) -> float:
    """A statistic of two tables [S, T] as they are."""
    return float(statistic(prediction, gain, np.ones((1, len(prediction))))[0])


def estimate(statistic: Statistic, prediction: Array, gain: Array) -> Estimate:
    """A statistic of two tables [K, S, T] averaged over training seeds, with its interval; see the module."""
    seeds, count, _ = prediction.shape

    def resampled(_: Arrays, weights: Array) -> Array:
        """[1 + R]: the statistic, then that of each resample."""
        times = np.ones((len(weights), seeds), dtype=np.int64)
        if seeds >= MIN_SEEDS:
            generator = np.random.default_rng([intervals.DEFAULT.seed, seeds])
            share = np.full(seeds, 1 / seeds)
            times[1:] = generator.multinomial(seeds, share, size=len(weights) - 1)
        found = np.full(len(weights), np.nan)
        for drawn in np.unique(times, axis=0):
            mine = (times == drawn).all(axis=1)
            one, other = (over_seeds(np.repeat(values, drawn, axis=0)) for values in (prediction, gain))
            found[mine] = statistic(one, other, weights[mine])
        return found

    found = intervals.estimate(resampled, {"prompt": np.arange(count)})
    low, high = (None if end is None else max(-1.0, min(1.0, end)) for end in (found.low, found.high))
    return replace(found, low=low, high=high)


def chance(prediction: Array, gain: Array, kept: Array) -> float | None:
    """The share of orders of the sources in which `over_targets` is as far from 0 as it is: a p-value.

    Sources are reordered in the predictions [S, T] alike for all targets; of more than 2,000 orders as many
    are drawn, with the one that is. A pair counts where it and the one it is compared with are `kept` [S, T].
    None where the correlation is not defined.
    """
    count = len(prediction)
    if math.factorial(count) <= _MOST_ORDERS:
        orders = np.array(list(permutations(range(count))))
    else:
        generator = np.random.default_rng([intervals.DEFAULT.seed, count])
        drawn = [generator.permutation(count) for _ in range(_MOST_ORDERS - 1)]
        orders = np.array([np.arange(count), *drawn])
    there = np.where(kept, prediction, np.nan)
    columns = []
    for t in range(prediction.shape[1]):
        x, y = there[orders, t], np.broadcast_to(np.where(kept[:, t], gain[:, t], np.nan), orders.shape)
        real = (np.isfinite(x) & np.isfinite(y)).astype(np.float64)
        found = spearman(np.nan_to_num(x), np.nan_to_num(y), real)
        columns.append(np.where(real.sum(axis=1) >= MIN_SOURCES, found, np.nan))
    values = _mean(np.stack(columns, axis=1))
    if not np.isfinite(values[0]):
        return None
    defined = np.abs(values[np.isfinite(values)])
    return float((defined >= abs(values[0]) - _TINY).mean())


@dataclass(frozen=True)
class Correlation:
    """Spearman's correlation of a metric and a gain.

    `mean` is that over sources, averaged over targets, `pooled` that over all pairs, both of means over
    training seeds; `within_seed` is `mean` of each seed alone, averaged, and `p` the `chance` of `mean`. Of
    the `columns`, one per target, `constant` ones and those with too `few` sources are left out; `each` [T]
    has what they say, NaN there. `pairs` counts those that some seed has.
    """

    metric: str
    gain: str
    selves: bool
    mean: Estimate
    pooled: Estimate
    within_seed: float | None
    p: float | None
    columns: int
    constant: int
    few: int
    each: Array
    pairs: int

    @property
    def skipped(self) -> str:
        """How many columns were left out and why, '0' where none was."""
        parts = {"constant": self.constant, f"under {MIN_SOURCES} sources": self.few}
        told = ", ".join(f"{count} {why}" for why, count in parts.items() if count)
        return f"{told} of {self.columns}" if told else "0"


def correlation(pairs: Pairs, metric: str, gain: str, selves: bool) -> Correlation:
    """The correlation of a metric and a gain of a board's pairs, with or without self-transfers."""
    kept = pairs.kept(selves)
    x, y = (np.where(kept, values, np.nan) for values in (pairs.predictions[metric], pairs.gains[gain]))
    x, y = (np.where(np.isfinite(x) & np.isfinite(y), values, np.nan) for values in (x, y))
    means = over_seeds(x), over_seeds(y)
    counts = np.isfinite(means[0]).sum(axis=0)
    single = by_target(*means, np.ones((1, len(pairs.sources))))[0]
    seeds = np.array([point(over_targets, a, b) for a, b in zip(x, y, strict=True)])
    within = float(over_seeds(seeds))
    return Correlation(
        metric=metric,
        gain=gain,
        selves=selves,
        mean=estimate(over_targets, x, y),
        pooled=estimate(pooled, x, y),
        within_seed=within if math.isfinite(within) else None,
        p=chance(*means, kept),
        columns=int((counts > 0).sum()),
        constant=int(((counts >= MIN_SOURCES) & ~np.isfinite(single)).sum()),
        few=int(((counts > 0) & (counts < MIN_SOURCES)).sum()),
        each=single,
        pairs=int(counts.sum()),
    )


# -------------------------------------------------------------------------------------------------- selection
@dataclass(frozen=True)
class Choice:
    """What following a metric gains.

    `name` is the metric, or another way to choose. `picked` is by target the sources that it takes, most
    often first, and `by_target` [T] the gain, averaged over training seeds. `gain` and `regret`, the best
    source's gain less this one, are means over targets, in points.
    """

    name: str
    picked: list[list[str]]
    by_target: Array
    gain: Estimate
    regret: Estimate


ORACLE, AVERAGE, NONE, TRIED = "oracle", "mean source", "no transfer (PT)", "dev score of each PoT"


def crossed_mean(values: Array, unit: str) -> Estimate:
    """The mean of [K, N], with its 95 % t-interval over both the N and, from `MIN_SEEDS` on, the K seeds.

    Its variance is that of the N means over seeds, over N, plus that of the seeds' means, over K, with
    Satterthwaite's degrees of freedom; it counts noise within a cell twice. Of the N those that some seed
    has, of the seeds those that have all of these. `n` counts the N.
    """
    there = values[:, np.isfinite(values).any(axis=0)]
    if not there.size:
        return Estimate(None, None, None, unit, 0, "there is none.")
    each, whole = over_seeds(there), there[np.isfinite(there).all(axis=1)]
    mean = float(each.mean())
    parts = []  # (variance of the mean, degrees of freedom)
    if len(each) > 1:
        parts.append((float(each.var(ddof=1)) / len(each), len(each) - 1))
    if len(whole) >= MIN_SEEDS:
        parts.append((float(whole.mean(axis=1).var(ddof=1)) / len(whole), len(whole) - 1))
    total = sum(variance for variance, _ in parts)
    if not parts:
        return Estimate(mean, None, None, unit, len(each), "no interval: one value is too few.")
    if total == 0:
        return Estimate(mean, mean, mean, unit, len(each))
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts)
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(total)
    return Estimate(mean, mean - half, mean + half, unit, len(each))


def choices(pairs: Pairs, gain: str) -> list[Choice]:
    """What each metric's best source gains, beside the best one, the mean, none, and the dev score's.

    A self-transfer is no choice. A choice is made within a training seed, among the sources with a gain; of
    equally predicted ones the mean is taken. The oracle is the source with the highest mean gain over
    training seeds: it looks at the scores that it is judged by, so its gain is an upper bound.
    """
    gains = np.where(pairs.kept(False), pairs.gains[gain], np.nan)
    if not np.isfinite(gains).any():
        return []
    best = _taken(np.where(np.isfinite(gains), over_seeds(gains), np.nan))
    oracle = _followed(gains, best)
    found = [_choice(pairs, ORACLE, best, oracle, oracle)]
    by: Mapping[str, Array] = {**pairs.predictions, TRIED: pairs.tried}
    for name, values in by.items():
        taken = _taken(np.where(np.isfinite(gains), values, np.nan))
        if taken.any():
            found.append(_choice(pairs, name, taken, _followed(gains, taken), oracle))
    there = np.isfinite(gains)
    every = there / np.maximum(there.sum(axis=1, keepdims=True), 1)
    nothing = np.where(there.any(axis=1), 0.0, np.nan)
    found.append(_choice(pairs, AVERAGE, None, _followed(gains, every), oracle))
    found.append(_choice(pairs, NONE, None, nothing, oracle))
    return found


def _taken(values: Array) -> Array:
    """[K, S, T]: the share that each source has of a target's choice: the highest value, or equal ones."""
    values = values.round(_DIGITS)
    top = np.where(np.isfinite(values), values, -np.inf).max(axis=1, keepdims=True)
    first = (values == top) & np.isfinite(values)
    return np.asarray(first / np.maximum(first.sum(axis=1, keepdims=True), 1))


def _followed(gains: Array, taken: Array) -> Array:
    """[K, T]: the gain of a choice, NaN where there is none."""
    values = (np.where(taken > 0, gains, 0.0) * taken).sum(axis=1)
    return np.where(taken.any(axis=1), values, np.nan)


def _choice(pairs: Pairs, name: str, taken: Array | None, values: Array, oracle: Array) -> Choice:
    picked: list[list[str]] = [[] for _ in pairs.targets]
    if taken is not None:
        share = taken.sum(axis=0)
        for t in range(len(pairs.targets)):
            order = sorted(np.nonzero(share[:, t])[0], key=lambda s, t=t: -share[s, t])  # type: ignore[misc]
            picked[t] = [pairs.sources[s] for s in order]
    regret = crossed_mean(oracle - values, "points")
    return Choice(name, picked, over_seeds(values), crossed_mean(values, "points"), regret)


# -------------------------------------------------------------------------------------------------- relations
@dataclass(frozen=True)
class Related:
    """Means over the pairs of one relation: `predictions` by metric, `gains` by name (points)."""

    kind: str
    pairs: int
    predictions: dict[str, Estimate]
    gains: dict[str, Estimate]


def related(pairs: Pairs) -> list[Related]:
    """The relations of a board's pairs, the one with the highest mean gain first."""
    found = []
    for kind in pairs.kinds:
        there = pairs.relations == kind
        predictions, gains = (
            {name: crossed_mean(values[:, there], unit) for name, values in tables.items()}
            for tables, unit in ((pairs.predictions, ""), (pairs.gains, "points"))
        )
        if any(one.value is not None for one in (*predictions.values(), *gains.values())):
            found.append(Related(kind, int(there.sum()), predictions, gains))
    first = next(iter(pairs.gains))
    return sorted(found, key=lambda one: -math.inf if (v := one.gains[first].value) is None else v)[::-1]


@dataclass(frozen=True)
class Judged:
    """All that is computed of a board's pairs; `correlations` by gain, metric and self-transfers or not."""

    pairs: Pairs
    correlations: dict[tuple[str, str, bool], Correlation]
    choices: dict[str, list[Choice]]
    relations: list[Related]

    @property
    def nothing(self) -> str:
        """Why there is nothing to judge, '' where there is something."""
        if not any(np.isfinite(values).any() for values in self.pairs.gains.values()):
            return "no pair has a score and one of prompt tuning alone with the same training seed."
        if not self.pairs.predictions:
            return "no run of a pair has a prediction, and no files of prompt tuning hold representations."
        if not any(one.mean.value is not None or one.pooled.value is not None for one in self._all()):
            return f"no target has {MIN_SOURCES} sources with a prediction and a gain that differ."
        return ""

    def _all(self) -> Sequence[Correlation]:
        return list(self.correlations.values())


def judge(pairs: Pairs) -> Judged:
    """Everything that figures and page show."""
    has_selves = bool(pairs.selves.any())
    found = {
        (gain, metric, selves): correlation(pairs, metric, gain, selves)
        for gain in pairs.gains
        for metric in pairs.predictions
        for selves in ((False, True) if has_selves else (False,))
    }
    return Judged(pairs, found, {gain: choices(pairs, gain) for gain in pairs.gains}, related(pairs))
