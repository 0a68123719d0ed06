"""What quality costs: training time, the Pareto front, gain per further training, time to reach a score.

Cost is the seconds of a run's training: shared stages, evaluation, evidence, snapshots and checkpoints are
left out. A row is on the front where no other is as good and as cheap, and better in one of the two. How sure
that is, is told by the share of resamples in which it is there: those of `kdbench.board`, which are the same
for all rows, and where a training seed that is drawn brings its score and its seconds. Gain per cost is the
quality gained over a baseline for each further training of the baseline that the row's time would have paid
for: (quality - baseline's) / (seconds / baseline's - 1).

Nothing here imports torch; numpy is imported only to resample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdbench.record import DevScore, RunRecord

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

LEVEL = 0.95
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Point:
    """A row: its mean quality, of which more is better, its mean seconds, and their resamples [R].

    None where there is nothing to resample: such a quality has no share and no interval, such seconds are the
    same in every resample.
    """

    quality: float
    seconds: float
    quality_samples: "Array | None" = None
    seconds_samples: "Array | None" = None

    def drawn_seconds(self) -> "Array":
        """[R] or [1]: the seconds in each resample."""
        import numpy as np

        return np.array([self.seconds]) if self.seconds_samples is None else self.seconds_samples


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each (quality, cost) is on the Pareto front; equal points are there together or not at all."""
    return [
        not any(q >= quality and c <= cost and (q > quality or c < cost) for q, c in points)
        for quality, cost in points
    ]


def front_shares(quality: "Array", cost: "Array") -> list[float]:
    """The share of resamples in which each row is on the front; `quality` and `cost` are [rows, R]."""
    import numpy as np

    shares = []
    for q, c in zip(quality, cost, strict=True):
        beaten = (quality >= q) & (cost <= c) & ((quality > q) | (cost < c))
        shares.append(float(np.mean(~beaten.any(axis=0))))
    return shares


def against(row: Point, base: Point) -> dict[str, list[float] | None]:
    """95 % intervals of a row's `gain` over a baseline, `relative` cost and gain `per_cost`, None where not
    defined.

    Gain per cost has one where that of the relative cost is above 1; the few resamples that cost no more than
    the baseline count as beyond all others, on the side of their gain.
    """
    import numpy as np

    def interval(values: "Array") -> list[float]:
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return [float(low), float(high)]

    def of_rate(gain: "Array", further: "Array") -> list[float] | None:
        rate = np.divide(gain, further, out=np.copysign(np.inf, gain), where=further > 0)
        ends = np.quantile(rate, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
        return [float(end) for end in ends] if np.isfinite(ends).all() else None

    told: dict[str, list[float] | None] = {"gain": None, "relative": None, "per_cost": None}
    relative = row.drawn_seconds() / base.drawn_seconds() if base.seconds > 0 else np.zeros(1)
    if len(relative) > 1:
        told["relative"] = interval(relative)
    if row.quality_samples is not None and base.quality_samples is not None:
        gain = row.quality_samples - base.quality_samples
        told["gain"] = interval(gain)
        if interval(relative)[0] > 1:
            told["per_cost"] = of_rate(gain, np.broadcast_to(relative - 1, gain.shape))
    return told


def compare(points: Mapping[str, Point]) -> dict[str, dict[str, Any]]:
    """For each row `front`, `front_share` (None where not resampled) and `against` every other row."""
    import numpy as np

    on_front = front([(one.quality, one.seconds) for one in points.values()])
    told: dict[str, dict[str, Any]] = {
        name: {
            "front": on,
            "front_share": None,
            "against": {other: against(one, base) for other, base in points.items() if other != name},
        }
        for (name, one), on in zip(points.items(), on_front, strict=True)
    }
    drawn = {name: one for name, one in points.items() if one.quality_samples is not None}
    if drawn:
        quality = np.stack([np.asarray(one.quality_samples) for one in drawn.values()])
        cost = np.stack([np.broadcast_to(one.drawn_seconds(), quality.shape[1:]) for one in drawn.values()])
        for name, share in zip(drawn, front_shares(quality, cost), strict=True):
            told[name]["front_share"] = share
    return told


# --------------------------------------------------------------------------------------------- over training
def mean_curve(records: Sequence[RunRecord]) -> dict[str, Any] | None:
    """The dev score over training, mean over runs, at the steps that all of them have; None where a run has
    none, or they were scored by different scores.

    `points`: [step, training seconds, score]. Where the best weights are kept, the score is the best so far.
    """
    rules = []
    runs: list[dict[int, DevScore]] = []
    for record in records:
        select = record.config.get("select") or {}
        rule = {
            "score": select.get("score"),
            "direction": select.get("direction"),
            "rule": select.get("rule"),
        }
        rules += [rule] if rule not in rules else []
        better = max if rule["direction"] == "higher" else min
        kept: dict[int, DevScore] = {}
        best: float | None = None
        for point in sorted(record.curve, key=lambda one: one.step):
            best = point.score if best is None or rule["rule"] != "best" else better(best, point.score)
            kept[point.step] = DevScore(point.step, point.train_seconds, best)
        runs.append(kept)
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    if len(rules) != 1 or not steps:
        return None

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    points = [
        [step, mean([run[step].train_seconds for run in runs]), mean([run[step].score for run in runs])]
        for step in steps
    ]
    return {"score": rules[0]["score"], "direction": rules[0]["direction"], "points": points}


def reach(
    row: Mapping[str, Any], base: Mapping[str, Any], more: float, direction: str
) -> dict[str, float | str | None]:
    """The training seconds after which a row is as good as the baseline at its end, and `more`.

    `by` is `dev` where both have a curve of one dev score: the first evaluation at which the mean is there.
    Else it is `end`: the time of the whole training, if the final score is there. Args: `row` and `base` hold
    `quality`, `seconds` and `curve`. Returns: `seconds` (None: not reached), `target`, `score`, `by`.
    """
    curve, other = row["curve"], base["curve"]
    same = curve and other and all(curve[key] == other[key] for key in ("score", "direction"))
    if not same:
        points, score, end, by = [[0, row["seconds"], row["quality"]]], "", base["quality"], "end"
    else:
        points, score, end, by = curve["points"], curve["score"], other["points"][-1][2], "dev"
        direction = curve["direction"]
    sign = 1 if direction == "higher" else -1
    target = end + sign * more
    there = (seconds for _, seconds, value in points if sign * (value - target) >= -_ROUNDING)
    return {"seconds": next(there, None), "target": target, "score": score, "by": by}
