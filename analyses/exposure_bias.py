"""Exposure bias: how much faster a student's error accumulates on its own prefixes than on the teacher's.

Source: Arora et al. 2022, https://arxiv.org/abs/2204.01171, sec. 3 (ExAccErr); MiniLLM (Gu et al. 2024,
https://arxiv.org/abs/2306.08543), `evaluate_exposure_bias.py`, for the variant `minillm-code`.
Differs: the variant `alive` (scores `ex_acc_err@l`) averages each step over the responses that still run
there, so that a change of response length alone does not move it, and measures the first response token. The
variant `minillm-code` (scores `ex_acc_err_minillm@l`) is the script's formula; for the script's decoding it
also needs evidence of the profile `minillm` (ban on repeated 6-grams).

The divergence is KL(p||q), nats, over the full vocabulary; l counts response tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdbench import estimators
from kdbench.estimators import ESTIMATORS, Array
from kdbench.evidence import Evidence, read_evidence
from kdbench.record import Analysis, RecordError, RunFolder, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERSION = 1
LENGTHS = (1, 5, 15, 30, 50, 120, 250)
MIN_SURVIVAL = 0.2  # below this share of running responses a step's mean says little; `alive` stops there
DIVERGENCE = "forward_kl"


def arrays(evidence: Evidence) -> dict[str, Array]:
    """What both variants need of evidence: `<g>_sum`, `<g>_count` [P, T], `<g>_step` [P, J], `prompt` [P].

    g is each of student and teacher that the evidence has as roll-in. float32 and int32, as stored.

    Raises: RecordError when the two roll-ins are of different prompts.
    """
    found: dict[str, Array] = {}
    for roll_in in (name for name in evidence.roll_ins if name != "reference"):
        values, alive, examples = evidence.matrix(roll_in, DIVERGENCE)
        prompts, at = np.unique(examples, return_inverse=True)
        if "prompt" in found and not np.array_equal(found["prompt"], prompts):
            raise RecordError("the evidence has other prompts under student than under teacher roll-in.")
        found["prompt"] = prompts
        total, count = np.zeros((2, len(prompts), values.shape[1]))
        np.add.at(total, at, values.astype(np.float64))
        np.add.at(count, at, alive)
        steps, _ = estimators.minillm_step_errors(*evidence.after(roll_in, DIVERGENCE))
        found[f"{roll_in}_sum"] = total.astype(np.float32)
        found[f"{roll_in}_count"] = count.astype(np.int32)
        found[f"{roll_in}_step"] = steps.astype(np.float32)
    return found


# score, estimator, its inputs (of both roll-ins, or of one), args, unit, direction
_ALIVE: tuple[tuple[str, str, str, dict[str, str], str, str], ...] = (
    ("ex_acc_err", "ex_acc_err_alive", "sum count", {}, "%", "lower"),
    ("accumulated_error", "accumulated_error_nats", "sum count", {"roll_in": "student"}, "nats", "lower"),
    ("teacher_error", "accumulated_error_nats", "sum count", {"roll_in": "teacher"}, "nats", "none"),
    ("survival", "survival", "count", {"roll_in": "student"}, "", "none"),
    ("teacher_survival", "survival", "count", {"roll_in": "teacher"}, "", "none"),
)
_MINILLM: tuple[tuple[str, str, str, dict[str, str], str, str], ...] = (
    ("ex_acc_err_minillm", "ex_acc_err_minillm", "step", {}, "%", "lower"),
    ("accumulated_error_minillm", "minillm_error_nats", "step", {"roll_in": "student"}, "nats", "lower"),
    ("teacher_error_minillm", "minillm_error_nats", "step", {"roll_in": "teacher"}, "nats", "none"),
)
_LENGTH: tuple[tuple[str, str, str, dict[str, str], str, str], ...] = (
    ("length", "mean_length_tokens", "count", {"roll_in": "student"}, "tokens", "none"),
    ("teacher_length", "mean_length_tokens", "count", {"roll_in": "teacher"}, "tokens", "none"),
)


def _score(
    found: Mapping[str, Array],
    row: tuple[str, str, str, dict[str, str], str, str],
    args: dict[str, Any],
    detail: dict[str, Any],
) -> Score:
    _, estimator, inputs, more, unit, direction = row
    sides = [more["roll_in"]] if "roll_in" in more else ["student", "teacher"]
    names = [f"{side}_{one}" for side in sides for one in inputs.split()] + ["prompt"]
    args = {**args, **more}
    weights = np.ones((1, len(found["prompt"])))
    value = float(ESTIMATORS[estimator]({name: found[name] for name in names}, weights, **args)[0])
    if not np.isfinite(value):
        detail = {**detail, "undefined": "the teacher's own error is 0, so there is no ratio"}
    usable = value if np.isfinite(value) else None
    return Score(
        usable, unit, weights.size, direction, estimator, {name: name for name in names}, args, detail
    )


def _survival(found: Mapping[str, Array], length: int) -> float:
    """The smaller share of responses with at least `length` tokens, of both roll-ins."""
    ones = np.ones((1, len(found["prompt"])))
    sides = ("student", "teacher")
    return min(float(estimators.survival(found, ones, length=length, roll_in=side)[0]) for side in sides)


def analyze(run: RunFolder) -> Analysis:
    """Scores at every l of `LENGTHS` as far as the data reach, and `length`, `teacher_length` (tokens).

    `ex_acc_err@l` (%), `accumulated_error@l` = R(l) and `teacher_error@l` = l epsilon(l) (nats), `survival@l`
    and `teacher_survival@l` (share of responses with l tokens or more); `ex_acc_err_minillm@l`,
    `accumulated_error_minillm@l`, `teacher_error_minillm@l`. `alive` reaches to a survival of `MIN_SURVIVAL`
    under both roll-ins, `minillm-code` to the longest response allowed; `detail` says what was left out and
    holds the whole curves, also of every snapshot of training.

    Raises: RecordError where evidence is missing or lacks a roll-in.
    """
    evidence = _read(run.evidence)
    found = arrays(evidence)
    longest = evidence.manifest.max_new_tokens
    about = {"profile": evidence.manifest.profile, "max_new_tokens": longest}
    scores, left_out = {}, {}
    for row in _LENGTH:
        scores[row[0]] = _score(found, row, {}, about)
    for length in LENGTHS:
        for row in _MINILLM if length <= longest else ():
            scores[f"{row[0]}@{length}"] = _score(found, row, {"length": length}, about)
        alive = _survival(found, length)
        if alive >= MIN_SURVIVAL:
            for row in _ALIVE:
                scores[f"{row[0]}@{length}"] = _score(found, row, {"length": length}, about)
        elif length <= longest:
            left_out[f"ex_acc_err@{length}"] = f"survival {alive:.3f} is below {MIN_SURVIVAL}"
        else:
            left_out[f"ex_acc_err@{length}"] = f"responses have at most {longest} tokens"
    snapshots = [{"step": step, **_snapshot(_read(path, light=True))} for step, path in run.snapshots()]
    detail = {
        **about,
        "divergence": DIVERGENCE,
        "left_out": left_out,
        "curve": curve(found),
        "snapshots": snapshots,
    }
    return Analysis(scores, found, detail)


def _read(path: Path, light: bool = False) -> Evidence:
    evidence = read_evidence(path)
    needed = {"student"} if light else {"student", "teacher"}
    if not needed <= set(evidence.roll_ins):
        missing = ", ".join(sorted(needed - set(evidence.roll_ins)))
        raise RecordError(f"{path}: lacks the {missing} roll-in, which ExAccErr needs.")
    return evidence


def _numbers(values: NDArray[Any]) -> list[float | None]:
    return [round(float(value), 6) if np.isfinite(value) else None for value in values]


def _reach(found: Mapping[str, Array]) -> int:
    """The longest l with a survival of `MIN_SURVIVAL` under every roll-in present."""
    ones = np.ones((1, len(found["prompt"])))
    reach = []
    for side in (side for side in ("student", "teacher") if f"{side}_count" in found):
        length = found[f"{side}_count"].shape[1]
        alive = estimators.survival_curve(found, ones, length, side)[0]
        reach.append(int((alive >= MIN_SURVIVAL).sum()))
    return min(reach)


def curve(found: Mapping[str, Array]) -> dict[str, list[float | None]]:
    """The variant `alive` for l = 1, 2, ... as far as it reaches, as lists under the scores' names."""
    ones = np.ones((1, len(found["prompt"])))
    length = _reach(found)
    lists = {
        "accumulated_error": estimators.accumulated_error_curve(found, ones, length)[0],
        "survival": estimators.survival_curve(found, ones, length)[0],
    }
    if "teacher_sum" in found:
        lists["ex_acc_err"] = estimators.ex_acc_err_alive_curve(found, ones, length)[0]
        lists["teacher_error"] = estimators.accumulated_error_curve(found, ones, length, "teacher")[0]
        lists["teacher_survival"] = estimators.survival_curve(found, ones, length, "teacher")[0]
    return {name: _numbers(values) for name, values in lists.items()}


def _snapshot(evidence: Evidence) -> dict[str, Any]:
    """A snapshot's curve and mean length, and `minillm-code` over l where the teacher's roll-in is there."""
    found = arrays(evidence)
    ones = np.ones((1, len(found["prompt"])))
    out: dict[str, Any] = {**curve(found), "prompts": len(found["prompt"])}
    out["length"] = round(float(estimators.mean_length_tokens(found, ones)[0]), 6)
    if "teacher_step" in found:
        longest = evidence.manifest.max_new_tokens
        out["ex_acc_err_minillm"] = _numbers(estimators.ex_acc_err_minillm_curve(found, ones, longest)[0])
    return out


# ---------------------------------------------------------------------------------------------------- figures
_RESAMPLES = 1000
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _band(runs: Sequence[Mapping[str, Array]], function: str, roll_in: str | None) -> tuple[Array, Array]:
    """(point [L], interval [2, L]): the mean over runs of a curve, with a 95 % interval over prompts."""
    length = min(_reach(found) for found in runs)
    count = len(runs[0]["prompt"])
    generator = np.random.default_rng(0)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(np.float64)
    take = getattr(estimators, function)
    args = (length,) if roll_in is None else (length, roll_in)
    points = [take(found, np.ones((1, len(found["prompt"]))), *args)[0] for found in runs]
    same = all(np.array_equal(found["prompt"], runs[0]["prompt"]) for found in runs)
    draws = [take(found, weights, *args) for found in runs] if same else [np.stack(points)]
    return np.mean(points, axis=0), np.nanpercentile(np.mean(draws, axis=0), [2.5, 97.5], axis=0)


def figures(runs: RunFolder | Sequence[RunFolder], out: Path) -> list[Path]:
    """Draws PNG and SVG files into `out` and returns their paths; runs of one row are averaged.

    `ex_acc_err`: ExAccErr over l; `errors`: R(l) and l epsilon(l); `survival`; `ex_acc_err_training`: over
    optimizer steps, where the runs have snapshots. Bands are 95 % bootstrap intervals over prompts.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg", force=False)
    import seaborn as sns

    folders = [runs] if isinstance(runs, RunFolder) else list(runs)
    rows: dict[str, list[dict[str, Array]]] = {}
    training: dict[str, list[list[dict[str, Any]]]] = {}
    for folder in folders:
        record = folder.record
        if "exposure_bias" not in record.analyses:
            raise RecordError(f"{folder.path}: has no scores of exposure_bias yet.")
        mine = folder.arrays().items()
        prefix = "exposure_bias/"
        found = {key.removeprefix(prefix): value for key, value in mine if key.startswith(prefix)}
        rows.setdefault(record.row, []).append(found)
        snapshots = record.analyses["exposure_bias"]["detail"]["snapshots"]
        if snapshots:
            training.setdefault(record.row, []).append(snapshots)
    colors = dict(zip(rows, sns.color_palette("colorblind", len(rows)), strict=True))
    look = {row: (_STYLES[i % len(_STYLES)], _MARKERS[i % len(_MARKERS)]) for i, row in enumerate(rows)}
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []

    def axes(x: str, y: str) -> "tuple[Figure, Axes]":
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        ax = figure.subplots()
        ax.set(xlabel=x, ylabel=y)
        return figure, ax

    def finish(figure: Figure, ax: "Axes", name: str) -> None:
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        for suffix in ("png", "svg"):
            paths.append(out / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=150)

    def draw(ax: "Axes", row: str, function: str, roll_in: str | None, label: str, solid: bool) -> None:
        point, interval = _band(rows[row], function, roll_in)
        style, marker = look[row]
        x = np.arange(1, len(point) + 1)
        fill = colors[row] if solid else "none"
        ax.plot(x, point, color=colors[row], linestyle=style, marker=marker, label=label, markersize=5,
                markevery=max(1, len(x) // 8), markerfacecolor=fill)  # fmt: skip
        ax.fill_between(x, interval[0], interval[1], color=colors[row], alpha=0.15, linewidth=0)

    with sns.axes_style("ticks"):
        figure, ax = axes("generation step l (tokens)", "ExAccErr(l) (%)")
        for row in rows:
            draw(ax, row, "ex_acc_err_alive_curve", None, row, True)
        finish(figure, ax, "ex_acc_err")
        figure, ax = axes("generation step l (tokens)", "accumulated KL(p||q) (nats)")
        for row in rows:
            draw(ax, row, "accumulated_error_curve", "student", f"{row}: R(l)", True)
            draw(ax, row, "accumulated_error_curve", "teacher", f"{row}: l ε(l)", False)
        finish(figure, ax, "errors")
        figure, ax = axes("generation step l (tokens)", "share of responses with l tokens")
        for row in rows:
            draw(ax, row, "survival_curve", "student", row, True)
            draw(ax, row, "survival_curve", "teacher", f"{row}: teacher", False)
        finish(figure, ax, "survival")
        length = _common_length(training)
        if length:
            figure, ax = axes("optimizer steps", f"ExAccErr({length}) (%)")
            for row, per_run in training.items():
                steps = [snapshot["step"] for snapshot in per_run[0]]
                every = [[one["ex_acc_err"][length - 1] for one in one_run] for one_run in per_run]
                every = [values for values in every if len(values) == len(steps)]
                style, marker = look[row]
                ax.plot(
                    steps,
                    np.mean(every, axis=0),
                    color=colors[row],
                    linestyle=style,
                    marker=marker,
                    label=row,
                )
            finish(figure, ax, "ex_acc_err_training")
    return paths


def _common_length(training: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> int:
    """The largest l of `LENGTHS` that every snapshot reaches with an ExAccErr; 0 where there is none."""
    curves = [one.get("ex_acc_err", []) for runs in training.values() for run in runs for one in run]
    reach = min((len([v for v in values if v is not None]) for values in curves), default=0)
    return max((length for length in LENGTHS if length <= reach), default=0)
