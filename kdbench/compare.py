"""Two methods compared prompt by prompt: any score that has values per prompt, with interval and p-value.

Source: `kdbench.intervals.paired`; conditions that must agree are those of `kdbench.evidence`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdbench import intervals
from kdbench.errors import UserError, unknown
from kdbench.estimators import Array
from kdbench.evidence import require_same_conditions
from kdbench.intervals import Difference, Estimate, Resampling
from kdbench.record import RecordError, RunFolder, RunRecord, Score


@dataclass(frozen=True)
class Comparison:
    """A score of two methods: each with its interval, and their difference, the first less the second."""

    score: str
    a: Estimate
    b: Estimate
    difference: Difference


def paired(
    runs_a: Sequence[RunFolder],
    runs_b: Sequence[RunFolder],
    scores: Sequence[str],
    how: Resampling = intervals.DEFAULT,
) -> list[Comparison]:
    """Compare two methods prompt by prompt; a list per method, one run per training seed, in any order.

    `scores`: full names, of any analysis, e.g. 'exposure_bias/ex_acc_err@30'.

    Raises: RecordError, naming what differs, where the two have other prompts, teachers, decoding settings,
    tasks, training seeds or definitions of a score; UserError where a run has no such score, or none with
    values per prompt.
    """
    pairs = [[(run, run.record) for run in side] for side in (runs_a, runs_b)]
    sides = [sorted(side, key=lambda pair: pair[1].seed) for side in pairs]
    seeds = [[record.seed for _, record in side] for side in sides]
    if len(seeds[0]) != len(seeds[1]) or (len(seeds[0]) > 1 and seeds[0] != seeds[1]):
        said = " and ".join(", ".join(map(str, one)) or "none" for one in seeds)
        raise RecordError(f"a comparison needs the same training seeds: {said}.")
    loaded = [[(run, record, run.arrays()) for run, record in side] for side in sides]
    out = []
    first, first_record, _ = loaded[0][0]
    for name in scores:
        inputs: list[list[dict[str, Array]]] = []
        like: Score | None = None
        for side in loaded:
            inputs.append([])
            for run, record, arrays in side:
                if name not in record.scores:
                    raise unknown("score", name, record.scores, str(run.path))
                score = record.scores[name]
                if score.estimator is None:
                    raise UserError(f"{run.path}: {name} has no values per prompt to compare by.")
                like = like or score
                both = f"{first.path} and {run.path}: {name}"
                if (score.estimator, score.args) != (like.estimator, like.args):
                    raise RecordError(f"{both} has another estimator or other arguments.")
                if record.task != first_record.task:
                    raise RecordError(f"{both} is of another task or revision.")
                told = [_conditions(one, name) for one in (first_record, record)]
                require_same_conditions(told[0], told[1], (str(first.path), str(run.path)))
                inputs[-1].append({key: arrays[stored] for key, stored in score.arrays.items()})
        assert like is not None
        function, unit = str(like.estimator), like.unit
        a, b = (intervals.estimate(function, side, like.args, unit=unit, how=how) for side in inputs)
        apart = intervals.paired(function, inputs[0], inputs[1], like.args, unit=unit, how=how)
        out.append(Comparison(name, a, b, apart))
    return out


def _conditions(record: RunRecord, name: str) -> Mapping[str, Any]:
    """The conditions of the evidence that a score was computed from; {} where its analysis has none."""
    analysis, profile, *_ = [*name.split("/"), ""]
    detail = record.analyses.get(analysis, {}).get("detail", {})
    found: Mapping[str, Any] = detail.get("profiles", {}).get(profile, detail).get("conditions", {})
    return found
