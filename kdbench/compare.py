"""Two methods compared prompt by prompt: any score that has values per prompt, with interval and p-value.

Source: `kdbench.intervals.paired`; conditions that must agree are those of `kdbench.evidence`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kdbench import intervals
from kdbench.errors import UserError, unknown
from kdbench.estimators import Array
from kdbench.evidence import require_same_conditions
from kdbench.intervals import VARIANTS, Difference, Estimate, Resampling
from kdbench.record import RecordError, RunFolder, Score


@dataclass(frozen=True)
class Comparison:
    """A score of two methods: each with its interval, and their difference, the first less the second.

    The difference's `warning` holds what there is to say of all three.
    """

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

    Two single runs may have different training seeds. Where a run has no ExAccErr because epsilon may be 0,
    R - l epsilon is compared instead, in nats, with that warning. Any other score without a value (survival)
    has none here either, with the warning that its analysis gives.

    Raises: RecordError, naming what differs, where the two have other prompts, teachers, decoding settings,
    tasks, axis values, training seeds or definitions of a score; UserError where a run has no such score, or
    none with values per prompt.
    """
    pairs = [[(run, run.record) for run in side] for side in (runs_a, runs_b)]
    sides = [sorted(side, key=lambda pair: pair[1].seed) for side in pairs]
    several = {json.dumps(record.axes, sort_keys=True) for side in sides for _, record in side}
    known: dict[str, set[str]] = {}  # a row may lack an axis that the other has
    for _, record in (*sides[0], *sides[1]):
        for axis, value in record.axes.items():
            known.setdefault(axis, set()).add(json.dumps(value))
    if any(len(values) > 1 for values in known.values()):
        raise RecordError(f"a comparison needs one axis value: here are {', '.join(sorted(several))}.")
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
        missing: dict[str, Score] = {}  # why a run has no value
        for side in loaded:
            inputs.append([])
            for (run, record, arrays), (twin, twins, _) in zip(side, loaded[0], strict=True):
                if name not in record.scores:
                    raise unknown("score", name, record.scores, str(run.path))
                score = record.scores[name]
                if score.estimator is None:
                    raise UserError(f"{run.path}: {name} has no values per prompt to compare by.")
                like = like or score
                both = f"{first.path} and {run.path}: {name}"
                if record.task != twins.task:  # of the same seed: a seed may be a draw of examples
                    raise RecordError(f"{twin.path} and {run.path}: {name} is of another task or revision.")
                if (score.estimator, score.args) != (like.estimator, like.args):
                    raise RecordError(f"{both} has another estimator or other arguments.")
                if record.task.name != first_record.task.name:
                    raise RecordError(f"{both} is of another task.")
                require_same_conditions(
                    first_record.conditions(name), record.conditions(name), (str(first.path), str(run.path))
                )
                if score.value is None:
                    why = score.detail.get("warning", "not defined.")
                    missing[f"{record.row}, seed {record.seed}: {why}"] = score
                inputs[-1].append({key: arrays[stored] for key, stored in score.arrays.items()})
        assert like is not None
        function: intervals.Function = str(like.estimator)
        unit, why = like.unit, next(iter(missing), "")
        refused = [text for text, score in missing.items() if "excess_nats" not in score.detail]
        if refused:  # what its analysis would not print is not compared either
            none = Estimate(None, None, None, unit, like.n, refused[0])
            out.append(Comparison(name, none, none, Difference(None, None, None, unit, like.n, refused[0])))
            continue
        if missing:
            variant = next(one for one in VARIANTS.values() if one.estimator == like.estimator)
            function, unit = variant.excess, "nats"
        a, b = (intervals.estimate(function, side, like.args, unit=unit, how=how) for side in inputs)
        apart = intervals.paired(function, inputs[0], inputs[1], like.args, unit=unit, how=how)
        told = [f"{side[0][1].row}: {x.warning}" for side, x in zip(loaded, (a, b), strict=True) if x.warning]
        said = " ".join(text for text in (why, *told, apart.warning) if text)
        out.append(Comparison(name, a, b, replace(apart, warning=said)))
    return out
