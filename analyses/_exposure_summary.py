"""One page on the exposure bias of one row, in words and numbers.

Words follow from 95 % intervals, never from values alone: something *is* so only where the interval lies on
one side of no effect, it *cannot be told* where the interval contains no effect (or comes within 1e-5 of it,
as rounding does), and it is *not known* where there is no interval. No effect is 0 for differences and
ExAccErr, 1 for the growth exponent and the EOS hazard ratio. One term is larger than the other only where the
interval of the difference of their sizes lies on one side of 0. A wrong token has a cost only where its
excess in all lies above 0; then the student recovers where the excess at the last position less half of that
at the first lies below 0, and does not where it lies above. Of a rate with fewer than `MIN_EVENTS` events
(for a difference: of both sides together) nothing can be told.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from analyses._exposure_figures import behind, excess_per_response
from analyses._exposure_rows import LENGTHS, Row
from kdbench import counterfactuals, estimators, intervals
from kdbench.counterfactuals import Intervention
from kdbench.estimators import ESTIMATORS, Array, Arrays
from kdbench.intervals import MIN_SEEDS, VARIANTS, Estimate
from kdbench.record import RecordError

_ROUNDING = 1e-5  # of float32 sums, in percent
_HANDED = 16  # tokens
_KINDS = {
    "random": "a random one",
    "teacher_unlikely": "one unlikely for the teacher",
    "student": "one drawn from the student",
}


def side(one: Estimate, of: float = 0.0) -> int | None:
    """1 or -1 where the whole interval is above or below `of`, 0 where it contains it, None without one."""
    if one.low is None or one.high is None:
        return None
    return 1 if one.low > of + _ROUNDING else -1 if one.high < of - _ROUNDING else 0


def word(one: Estimate, above: str, below: str, neither: str, of: float = 0.0) -> str:
    """What the interval says; 'not known' without one."""
    said = {1: above, -1: below, 0: neither, None: "**not known**"}
    return said[side(one, of)]


def _number(value: float) -> str:
    if abs(value) <= _ROUNDING:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def number(one: Estimate) -> str:
    """Value, unit and interval; '–' without a value."""
    if one.value is None:
        return "–"
    unit = f" {one.unit}" if one.unit else ""
    ends = [_number(end) for end in (one.low, one.high) if end is not None]
    return f"{_number(one.value)}{unit}" + (f" [{', '.join(ends)}]" if len(ends) == 2 else "")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _apart(name: str) -> Callable[..., Array]:
    """An estimator under the student's roll-in less that under the teacher's."""
    function = ESTIMATORS[name]

    def take(arrays: Arrays, weights: Array, **args: Any) -> Array:
        return function(arrays, weights, **args) - function(arrays, weights, **args, roll_in="teacher")

    return take


def _size_apart(arrays: Arrays, weights: Array, length: int) -> Array:
    state = estimators.state_term_nats(arrays, weights, length)
    return np.abs(state) - np.abs(estimators.length_term_nats(arrays, weights, length))


def write(row: Row) -> str:
    """The page, as Markdown."""
    record, detail = row.records[0], row.detail
    draws = max(int(run["student_count"][:, 0].max()) for run in row.arrays)
    seeds = ", ".join(str(one.seed) for one in row.records)
    lines = [
        f"# {row.title}: exposure bias on {record.board}, size {record.size}",
        "",
        f"{len(row.arrays[0]['prompt'])} prompts, {_plural(draws, 'draw')} each, up to "
        f"{detail['max_new_tokens']} tokens, decoding profile {detail['profile']}; training seed"
        f"{'s' * (len(row.records) > 1)} {seeds}. Divergence is KL(p||q), p the teacher; l counts response "
        "tokens; brackets hold 95 % intervals.",
    ]
    sections = {
        "Does error accumulate?": _accumulation,
        "Length or states?": _terms,
        "Is the teacher reliable on the student's prefixes?": _reliability,
        "Does the student recover?": _recovery,
        "Repetition and stopping": _stopping,
        "How sure is this?": _certainty,
    }
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section(row)]
    return "\n".join(lines) + "\n"


def _accumulation(row: Row) -> list[str]:
    if row.same_models:
        return ["**No: student and teacher are the same**, every stored divergence is exactly 0."]
    last = row.length()
    excess = intervals.ex_acc_err_estimate(row.arrays, last)
    verdict = word(
        excess,
        f"**Error accumulates**: over the first {last} tokens the student is farther from the teacher on its "
        "own prefixes than on the teacher's",
        f"**Error does not accumulate**: over the first {last} tokens the student is nearer to the teacher "
        "on its own prefixes than on the teacher's",
        f"**It cannot be told whether error accumulates** over the first {last} tokens: the interval "
        "contains 0",
    )
    what = f"ExAccErr({last})" if excess.unit == "%" else f"R − l ε at l = {last}"
    because = f"; {excess.warning.rstrip('.')}" if excess.warning else ""
    lines = [f"{verdict} ({what} {number(excess)}{because})."]
    if last > 1:
        growth = row.estimate("growth_exponent", length=last)
        teacher = row.estimate("growth_exponent", length=last, roll_in="teacher")
        said = word(growth, "faster than l", "slower than l", "like l, as far as can be told", of=1.0)
        lines[0] += (
            f" R(l) grows {said} (exponent {number(growth)}; on the teacher's prefixes {number(teacher)})."
        )
    lines += [
        "",
        "| l | ExAccErr | R(l) | l ε(l) | R − l ε | survival |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for length in (one for one in LENGTHS if one <= row.reach):
        cells = [
            intervals.ex_acc_err_estimate(row.arrays, length),
            row.estimate("accumulated_error_nats", "nats", length=length),
            row.estimate("accumulated_error_nats", "nats", length=length, roll_in="teacher"),
            row.estimate("excess_nats", "nats", length=length),
            row.estimate("survival", length=length),
        ]
        lines.append(f"| {length} | " + " | ".join(number(cell) for cell in cells) + " |")
    found = []
    for name in VARIANTS:
        if name not in ("alive", "abs"):
            try:
                one = intervals.ex_acc_err_estimate(row.arrays, last, name)
            except RecordError:
                continue
            said = number(one) if one.value is not None else f"({one.warning.rstrip('.')})"
            found.append(f"{name} {said}")
    return [*lines, "", f"By other definitions, at l = {last}: {'; '.join(found)}."]


def _terms(row: Row) -> list[str]:
    last = row.length()
    total, lengths, states, apart = (
        row.estimate(function, "nats", length=last)
        for function in (excess_per_response, "length_term_nats", "state_term_nats", _size_apart)
    )
    larger = word(
        apart,
        "the state term is the larger one",
        "the length term is the larger one",
        "which of the two is larger cannot be told",
    )
    return [
        f"Over all responses (ended ones add 0) R − l ε at l = {last} is {number(total)}; {larger}.",
        "",
        f"- length term {number(lengths)}: "
        + word(
            lengths,
            "longer responses of the student add to it",
            "shorter responses of the student take from it",
            "no effect of other lengths can be told",
        ),
        f"- state term {number(states)}: "
        + word(
            states,
            "the student's own prefixes are worse for it than the teacher's",
            "the student's own prefixes are better for it than the teacher's",
            "no effect of other prefixes can be told",
        ),
    ]


def _reliability(row: Row) -> list[str]:
    last = row.length()
    entropy = row.estimate("teacher_entropy_rise", "nats per token", length=last)
    surprise = row.estimate("teacher_surprise_rise", "nats per token", length=last)
    drop = row.estimate("acceptance_drop", length=last)
    accepted = row.estimate("acceptance", length=last)
    return [
        f"From the teacher's prefixes to the student's, over the first {last} tokens:",
        "",
        f"- the teacher's entropy rises by {number(entropy)}: "
        + word(entropy, "it is less sure there", "it is surer there", "no change can be told"),
        f"- its surprise at the token written rises by {number(surprise)}: "
        + word(
            surprise,
            "the student writes what the teacher finds less likely than its own text",
            "the student writes what the teacher finds likelier than its own text",
            "no change can be told",
        ),
        f"- acceptance 1 − TV falls by {number(drop)}, to {number(accepted)}: "
        + word(drop, "the two agree less there", "the two agree more there", "no change can be told"),
    ]


def _recovery(row: Row) -> list[str]:
    lines = []
    wrong = [counterfactuals.excess_arrays(one) for one in row.interventions["recovery"]]
    for kind, said in _KINDS.items() if wrong else ():
        if not all(f"{kind}_alive" in one for one in wrong):
            continue
        last = behind(wrong, kind)
        args: dict[str, Any] = {"length": last, "kind": kind}
        half = intervals.estimate("half_life_tokens", wrong, args, unit="tokens")
        area = intervals.estimate("excess_area_nats", wrong, args, unit="nats")

        def ends(arrays: Arrays, weights: Array, args: Mapping[str, Any] = args) -> Array:
            curve = counterfactuals.excess_curve(arrays, weights, **args)
            return np.stack([curve[:, -1], curve[:, -1] - curve[:, 0] / 2], axis=1)

        end, above_half = intervals.estimates(ends, wrong, unit="nats")
        gone = f", half of the excess is gone after {number(half)}" if half.value is not None else ""
        if side(area) != 1:
            verdict = word(area, "", "it costs nothing", "no cost can be told")
        elif last == 1:
            verdict = "whether the student recovers cannot be told from one token"
        else:
            verdict = word(
                above_half,
                f"the student does not recover within {last} tokens",
                f"the student recovers within {last} tokens{gone}",
                f"whether the student recovers within {last} tokens cannot be told",
            )
        lines.append(
            f"- a token replaced by {said}: {verdict}; excess KL {number(area)} in all, "
            f"{number(end)} after {last} tokens"
        )
    lines += _corruption(row.interventions["corruption"])
    lines += _hand_over(row.interventions["hand_over"])
    return lines or [
        f"Not measured: `kdbench collect {row.records[0].run_id} --intervention all` tries what happens "
        "after a wrong token and when one model hands over to the other."
    ]


def _corruption(found: list[Intervention]) -> list[str]:
    """What wrong tokens in the teacher's responses do to the student's error."""
    made = [counterfactuals.corruption_arrays(one) for one in found]
    lines = []
    for kind, said in _KINDS.items():
        if made and all(f"{kind}_forward_kl" in arrays for _, arrays in made):
            rates, arrays = made[0][0], [one for _, one in made]
            args = {"rates": rates, "kind": kind}
            area = intervals.estimate("corruption_area_nats", arrays, args, unit="nats")
            lines.append(
                f"- up to {100 * rates[-1]:g} % of the teacher's tokens replaced by {said}: "
                + word(area, "KL rises", "KL falls", "no change of KL can be told")
                + f", area between the curves {number(area)}"
            )
    return lines


def _hand_over(found: list[Intervention]) -> list[str]:
    """What m tokens of the other model do to the score, against the finishing model alone."""
    made = [counterfactuals.hand_over_arrays(one) for one in found]
    counts, arrays = (made[0][0], [one for _, one in made]) if made else ([0], [])
    # at the last one nothing is handed over
    at = max((i for i, m in enumerate(counts[:-1]) if m <= _HANDED), default=0)
    if not at or counts[0]:
        return []
    lines = []
    for first, other in (("student", "teacher"), ("teacher", "student")):
        one = intervals.estimate("hand_over_gain", arrays, {"column": at, "first": first}, unit="points")
        said = word(one, "raises", "lowers", "does not move, as far as can be told,")
        lines.append(
            f"- the first {_plural(counts[at], 'token')} by the {first}: this {said} the ROUGE-L of what the "
            f"{other} makes of it ({number(one)})"
        )
    return lines


def _stopping(row: Row) -> list[str]:
    longest = row.detail["max_new_tokens"]

    def line(name: str, said: str, unit: str = "", **args: Any) -> str:
        sides = ("student", "teacher")
        apart = row.estimate(_apart(name), unit, **args)
        own, teacher = (row.estimate(name, unit, **args, roll_in=g) for g in sides)
        few = intervals.few_events(name, row.arrays, args, sides)
        compared = _nothing(few) or word(
            apart,
            "more than the teacher",
            "less than the teacher",
            "no difference from the teacher can be told",
        )
        return f"- {said} {number(own)}, teacher {number(teacher)}: {compared}"

    hazard = row.estimate("eos_hazard_ratio", length=longest)
    return [
        line("seq_rep", "repeated 4-grams (share of a response)", n=4),
        line("loop_rate", "responses that end in a loop"),
        line("mean_length_tokens", "length", "tokens"),
        line("truncation_rate", "responses without an end", length=longest),
        f"- chance to stop at a token, relative to the teacher's: {number(hazard)}: "
        + (
            _nothing(intervals.few_events("eos_hazard_ratio", row.arrays, {"length": longest}))
            or word(
                hazard,
                "the student stops sooner",
                "the student stops later",
                "no difference can be told",
                of=1.0,
            )
        ),
    ]


def _nothing(few: str) -> str:
    return f"nothing can be told, {few.rstrip('.')}" if few else ""


def _certainty(row: Row) -> list[str]:
    count = len(row.records)
    over = (
        f"Intervals are over prompts and {count} training seeds."
        if count >= MIN_SEEDS
        else f"Intervals are over prompts only: with {_plural(count, 'training seed')} it is not known how "
        "much another seed would move the numbers."
    )
    lines = [f"- {over}", f"- Runs: {', '.join(one.run_id for one in row.records)}."]
    warnings: dict[str, list[str]] = {}
    for one in row.records:
        for name, score in one.scores.items():
            if name.startswith("exposure_bias/") and (text := score.detail.get("warning")):
                reason = re.sub(r"survival .+ is [\d.]+,", "survival is", text)
                reason = re.sub(r"(events: .+), \d+", r"\1", reason)
                reason = re.sub(r"\d+ of \d+ resamples", "some resamples", reason)
                warnings.setdefault(reason, []).append(name.removeprefix("exposure_bias/"))
    reasons: dict[str, list[str]] = {}
    for one in row.records:
        for name, text in one.analyses["exposure_bias"]["detail"]["left_out"].items():
            reason = re.sub(r"^survival [\d.]+", "survival", text).replace(" RUN ", f" {one.run_id} ")
            reasons.setdefault(reason, []).append(name)
    for title, found in (("Warning", warnings), ("Left out", reasons)):
        for text, names in list(found.items())[:6]:
            unique = list(dict.fromkeys(names))
            more = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
            lines.append(f"- {title}: {', '.join(unique[:3])}{more}: {text.rstrip('.')}.")
        if len(found) > 6:
            lines.append(f"- {title}: {len(found) - 6} more, see the records.")
    return lines
