"""Figures of exposure bias: PNG and SVG, with 95 % intervals, readable in greyscale.

    ex_acc_err            ExAccErr (alive) over generation steps (Figure 3a of the PromptKD paper)
    ex_acc_err_training   ExAccErr of training snapshots over optimizer steps (its Figure 3b), a panel per row
                          with the others in grey
    errors                R(l) and l epsilon(l)
    survival              share of responses that still run
    decomposition         length term and state term of R - l epsilon over all responses, at one l; the thin
                          intervals are those of the length term (upper) and of the state term (lower)
    reliability           what changes from the teacher's prefixes to the student's, at one l
    variants              ExAccErr by every definition, at one l
    hand_over, corruption, recovery     see `kdbench.counterfactuals`, where runs have them

A row whose student is its teacher is left out beside others, as all of it is 0 by definition. Curves that are
conditional on running reach to a survival of `MIN_SURVIVAL`; there is no line where there is no ratio, see
`kdbench.intervals.ex_acc_err_estimates`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analyses._exposure_rows import LENGTHS, Band, Row, reach
from kdbench import counterfactuals, estimators, intervals
from kdbench.estimators import Array, Arrays
from kdbench.intervals import MIN_SURVIVAL, VARIANTS, Estimate
from kdbench.record import RecordError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STEP = "generation step l (tokens)"
_KINDS = {
    "random": "random token",
    "teacher_unlikely": "token unlikely for the teacher",
    "student": "token drawn from the student",
}
_HORIZON = 30  # tokens behind a replaced one


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write every figure that the rows have the data for; return the files."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import seaborn as sns

    with sns.axes_style("ticks"), sns.plotting_context("paper", font_scale=1.1):
        book = _Book([row for row in rows if not row.same_models] or rows, out)
        for figure in (
            book.ex_acc_err,
            book.training,
            book.errors,
            book.survival,
            book.decomposition,
            book.reliability,
            book.variants,
            book.hand_over,
            book.corruption,
            book.recovery,
        ):
            figure()
    return book.paths


def excess_per_response(arrays: Arrays, weights: Array, length: int) -> Array:
    """R - E of arora22-paper: what length and state term add up to."""
    student, teacher = (
        estimators.arora_paper_error_nats(arrays, weights, length, g) for g in ("student", "teacher")
    )
    return student - teacher


class _Book:
    def __init__(self, rows: Sequence[Row], out: Path) -> None:
        import seaborn as sns

        self.rows, self.out = list(rows), out
        self.paths: list[Path] = []
        out.mkdir(parents=True, exist_ok=True)
        colors = iter(sns.color_palette("colorblind", len(self.rows)))
        self.look: dict[int, dict[str, Any]] = {}
        for i, row in enumerate(self.rows):
            look = {"linestyle": _STYLES[i % len(_STYLES)], "marker": _MARKERS[i % len(_MARKERS)]}
            grey = {"color": "0.5", "linewidth": 1.0, "markersize": 4}
            self.look[id(row)] = look | (grey if row.reference else {"color": next(colors), "markersize": 5})

    # ---------------------------------------------------------------------------------------------- parts
    def sheet(self, across: int = 1, down: int = 1, **more: Any) -> "tuple[Figure, Any]":
        from matplotlib.figure import Figure

        size = more.pop("figsize", (4.4 * across + 2.2, 3.3 * down + 0.3))
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots(down, across, squeeze=False, **more)

    def line(self, ax: "Axes", row: Row, x: Sequence[Any] | Array, band: Band) -> None:
        """A row's curve with its band; markers are spread so that those of other rows lie beside them."""
        look, every = self.look[id(row)], max(1, len(x) // 8)
        first = self.rows.index(row) * every // max(1, len(self.rows)) if every > 1 else 0
        if np.asarray(x).dtype.kind == "i":
            ax.locator_params(axis="x", integer=True)
        ax.plot(x, band[0], label=row.title, markevery=(first, every), **look)
        ax.fill_between(x, band[1], band[2], color=look["color"], alpha=0.12, linewidth=0)

    def points(self, ax: "Axes", y: Iterable[float], found: Iterable[Estimate], **look: Any) -> None:
        """Points with interval marks, one per estimate that has a value."""
        kept = [(at, one) for at, one in zip(y, found, strict=True) if one.value is not None]
        values = np.array([one.value for _, one in kept], dtype=float)
        ends = [[one.value if end is None else end for end in (one.low, one.high)] for _, one in kept]
        spread = np.abs(np.array(ends, dtype=float).reshape(-1, 2).T - values)
        look = {"linestyle": "none", "capsize": 2.5, "elinewidth": 1.1, "markersize": 5.5, **look}
        ax.errorbar(values, [at for at, _ in kept], xerr=spread, **look)

    def named(self, ax: "Axes") -> None:
        """Rows from top to bottom, their titles on the y axis, every other one shaded."""
        ax.set_yticks(range(len(self.rows)), [row.title for row in self.rows])
        ax.set_ylim(len(self.rows) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        for at in range(0, len(self.rows), 2):
            ax.axhspan(at - 0.5, at + 0.5, color="0.96", zorder=-2)

    def finish(self, figure: "Figure", name: str, legend: bool = True) -> None:
        axes = figure.axes
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
        handles = {t: h for ax in axes for h, t in zip(*ax.get_legend_handles_labels(), strict=True)}
        if legend and handles:
            figure.legend(
                handles.values(), handles, loc="outside right center", frameon=False, handlelength=3.2
            )
        for suffix in ("png", "svg"):
            self.paths.append(self.out / f"{name}.{suffix}")
            figure.savefig(self.paths[-1], dpi=150)

    def band(self, row: Row, curve: Callable[..., Array], length: int, **args: Any) -> Band:
        return intervals.band(curve, row.arrays, length, args)

    def length(self) -> int:
        """The largest of `LENGTHS` that every row but reference rows reaches."""
        rows = [row for row in self.rows if not row.reference] or self.rows
        return min(row.length() for row in rows)

    # -------------------------------------------------------------------------------------------- figures
    def ex_acc_err(self) -> None:
        figure, axes = self.sheet()
        ax = axes[0, 0]
        for row in self.rows:
            band = intervals.ex_acc_err_band(row.arrays, row.reach)
            if np.isfinite(band[0]).any():
                self.line(ax, row, np.arange(1, row.reach + 1), band)
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set(xlabel=_STEP, ylabel="ExAccErr(l) (%)")
        self.finish(figure, "ex_acc_err")

    def training(self) -> None:
        taken = [(row, found) for row in self.rows if (found := row.snapshots())]
        if not taken:
            return
        reached = min(_half_reach(found.values()) for _, found in taken)
        length = max((length for length in LENGTHS if length <= reached), default=1)
        bands: list[tuple[Row, list[int], Band]] = []
        for row, found in taken:
            # a snapshot that does not reach l has no value, and so no point
            made = [np.array(intervals.ex_acc_err_band(runs, length))[:, -1] for runs in found.values()]
            point, low, high = np.array(made).T
            if np.isfinite(point).any():
                bands.append((row, list(found), (point, low, high)))
        if not bands:
            return
        across = min(len(bands), 4 if len(bands) > 6 else 3)
        down = math.ceil(len(bands) / across)
        size = (0.8 + 2.7 * across, 0.5 + 2.4 * down)
        figure, axes = self.sheet(across, down, sharex=True, sharey=True, figsize=size)
        for ax, (row, steps, band) in zip(axes.flat, bands, strict=False):
            for _, others, other in bands:
                ax.plot(others, other[0], color="0.8", linewidth=0.8, zorder=0.5)
            self.line(ax, row, steps, band)
            ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            ax.set_title(row.title)
        for ax in axes.flat[len(bands) :]:
            ax.set_visible(False)
        figure.supxlabel("optimizer steps", fontsize="medium")
        figure.supylabel(f"ExAccErr({length}) (%)", fontsize="medium")
        self.finish(figure, "ex_acc_err_training", legend=False)

    def errors(self) -> None:
        figure, axes = self.sheet(2, sharey=True, sharex=True)
        sides = {"student": "R(l): on the student's prefixes", "teacher": "l ε(l): on the teacher's prefixes"}
        for ax, (side, title) in zip(axes[0], sides.items(), strict=True):
            for row in self.rows:
                band = self.band(row, estimators.accumulated_error_curve, row.reach, roll_in=side)
                self.line(ax, row, np.arange(1, row.reach + 1), band)
            ax.set(xlabel=_STEP, title=title)
        axes[0, 0].set_ylabel("accumulated KL(p||q) (nats)")
        self.finish(figure, "errors")

    def survival(self) -> None:
        figure, axes = self.sheet()
        ax = axes[0, 0]
        for row in self.rows:
            longest = max(run["student_count"].shape[1] for run in row.arrays)
            x = np.arange(1, longest + 1)
            self.line(ax, row, x, self.band(row, estimators.survival_curve, longest))
        shared, x = self.rows[0], np.arange(1, self.rows[0].arrays[0]["teacher_count"].shape[1] + 1)
        own = self.band(shared, estimators.survival_curve, len(x), roll_in="teacher")[0]
        ax.plot(x, own, color="black", linewidth=1, label="teacher's own responses")
        ax.axhline(MIN_SURVIVAL, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        ax.set(xlabel=_STEP, ylabel="share of responses with l tokens or more", ylim=(0, 1.02))
        self.finish(figure, "survival")

    def _rowwise(self, across: int = 1) -> "tuple[Figure, Any]":
        height = 1.1 + 0.42 * len(self.rows)
        return self.sheet(across, sharey=True, figsize=(2.9 + (2.6 if across > 1 else 4.6) * across, height))

    def decomposition(self) -> None:
        length = self.length()
        figure, axes = self._rowwise()
        ax, y = axes[0, 0], np.arange(len(self.rows))
        terms = {
            "length term": (estimators.length_term_nats, {"facecolor": "0.85", "hatch": "///"}),
            "state term": (estimators.state_term_nats, {"facecolor": "0.45"}),
        }
        start = {1: np.zeros(len(y)), -1: np.zeros(len(y))}
        for label, (function, look) in terms.items():  # their intervals would start where the other ends
            found = np.array([row.estimate(function, length=length).value or 0.0 for row in self.rows])
            sign = np.where(found < 0, -1, 1)
            left = np.where(sign > 0, start[1], start[-1])
            ax.barh(y, found, left=left, height=0.72, edgecolor="0.2", linewidth=0.6, label=label, **look)
            for one in (1, -1):
                start[one] += np.where(sign == one, found, 0)
        total = [row.estimate(excess_per_response, length=length) for row in self.rows]
        self.points(ax, y, total, marker="D", color="black", markerfacecolor="white", label="their sum")
        ax.axvline(0, color="0.3", linewidth=0.8)
        self.named(ax)
        ax.set_xlabel(f"R({length}) − {length} ε({length}), all responses (nats)")
        self.finish(figure, "decomposition")

    def reliability(self) -> None:
        length = self.length()
        measures = {
            "acceptance_drop": "drop of acceptance 1 − TV",
            "teacher_entropy_rise": "rise of the teacher's\nentropy (nats per token)",
            "teacher_surprise_rise": "rise of the teacher's\nsurprise (nats per token)",
        }
        figure, axes = self._rowwise(len(measures))
        for ax, (name, label) in zip(axes[0], measures.items(), strict=True):
            for at, row in enumerate(self.rows):
                look = {k: v for k, v in self.look[id(row)].items() if k in ("color", "marker")}
                self.points(ax, [at], [row.estimate(name, length=length)], **look)
            ax.axvline(0, color="0.3", linewidth=0.8, zorder=0)
            self.named(ax)
            ax.set_xlabel(f"{label},\nfirst {length} tokens")
            ax.locator_params(axis="x", nbins=4)
        self.finish(figure, "reliability", legend=False)

    def variants(self) -> None:
        import seaborn as sns

        matched = [
            reach({"student_count": run["matched_count"], "prompt": run["prompt"]})
            for row in self.rows
            for run in row.arrays
        ]
        length = max((one for one in LENGTHS if one <= min([*matched, self.length()])), default=1)
        named: list[tuple[str, str, str]] = [(name, name, "") for name in VARIANTS if name != "abs"]
        named.append(("minillm-code", "minillm-code, 6-gram ban", "minillm"))
        found: dict[str, list[Estimate]] = {}
        for name, label, profile in named:
            made = []
            for row in self.rows:
                seen = row.profile(profile) if profile else row
                try:
                    one = intervals.ex_acc_err_estimate(seen.arrays, length, name) if seen else None
                except RecordError:  # the evidence cannot carry it
                    one = None
                usable = one is not None and one.unit == "%"
                made.append(one if usable and one else Estimate(None, None, None, "%", 0))
            if any(one.value is not None for one in made):
                found[label] = made
        figure, axes = self._rowwise()
        ax, wide = axes[0, 0], 0.72 / max(1, len(found))
        figure.set_figheight(1.1 + 0.14 * max(4, len(found)) * len(self.rows))
        colors = sns.color_palette("colorblind", len(found))
        for i, (label, made) in enumerate(found.items()):
            y = np.arange(len(self.rows)) + (i - (len(found) - 1) / 2) * wide
            look = {"marker": _MARKERS[i % len(_MARKERS)], "color": colors[i], "label": label, "capsize": 1.5}
            self.points(ax, y, made, markersize=4.5, **look)
        ax.axvline(0, color="0.3", linewidth=0.8, zorder=0)
        self.named(ax)
        ax.set_xlabel(f"ExAccErr({length}) (%)")
        self.finish(figure, "variants")

    # -------------------------------------------------------------------------------------- interventions
    def hand_over(self) -> None:
        found = {id(row): [counterfactuals.hand_over_arrays(one) for one in row.interventions["hand_over"]]
                 for row in self.rows}  # fmt: skip
        if not any(found.values()):
            return
        figure, axes = self.sheet(2, 2, sharex=True, sharey="row")
        counts: list[int] = []
        for row in self.rows:
            if not (made := found[id(row)]):
                continue
            counts = made[0][0]
            arrays = [one for _, one in made]
            for across, first in enumerate(("student", "teacher")):
                scored = intervals.band(
                    counterfactuals.hand_over_score_curve, arrays, len(counts), {"first": first}
                )
                args = {"first": first, "part": "finished"}
                told = intervals.band(counterfactuals.hand_over_log_prob_curve, arrays, len(counts), args)
                going = np.min([(one[f"{first}_finished_count"] > 0).mean(axis=0) for one in arrays], axis=0)
                few = np.where(going < MIN_SURVIVAL, np.nan, 0.0)  # responses that there is more of
                point, low, high = (one + few for one in told)
                for down, band in enumerate((scored, (point, low, high))):
                    self.line(axes[down, across], row, range(len(counts)), band)
        for ax, first, other in zip(axes[1], ("student", "teacher"), ("teacher", "student"), strict=True):
            ax.set_xticks(range(len(counts)), counts)
            ax.set_xlabel(f"tokens that the {first} writes first")
            figure.axes[0 if first == "student" else 1].set_title(f"the {other} finishes")
        axes[0, 0].set_ylabel("ROUGE-L (× 100)")
        axes[1, 0].set_ylabel("teacher's log-likelihood of what\nis finished (nats per token)")
        self.finish(figure, "hand_over")

    def corruption(self) -> None:
        found = {id(row): [counterfactuals.corruption_arrays(one) for one in row.interventions["corruption"]]
                 for row in self.rows}  # fmt: skip

        def panel(ax: "Axes", row: Row, kind: str) -> None:
            made = found[id(row)]
            rates, arrays = made[0][0], [one for _, one in made]
            if all(f"{kind}_forward_kl" in one for one in arrays):
                curve = counterfactuals.corruption_curve
                self.line(ax, row, rates, intervals.band(curve, arrays, len(rates), {"kind": kind}))

        label = "mean KL(p||q) on the\ncorrupted prefixes (nats per token)"
        self._kinds("corruption", found, panel, "share of replaced tokens", label)

    def recovery(self) -> None:
        found = {id(row): [counterfactuals.excess_arrays(one) for one in row.interventions["recovery"]]
                 for row in self.rows}  # fmt: skip

        def panel(ax: "Axes", row: Row, kind: str) -> None:
            arrays = found[id(row)]
            if all(f"{kind}_alive" in one for one in arrays):
                length = behind(arrays, kind)
                band = intervals.band(counterfactuals.excess_curve, arrays, length, {"kind": kind})
                self.line(ax, row, np.arange(1, length + 1), band)
                ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)

        label = "KL(p||q) less that of\nthe clean twin (nats)"
        self._kinds("recovery", found, panel, "tokens behind the replaced one", label)

    def _kinds(
        self,
        name: str,
        found: dict[int, list[Any]],
        panel: "Callable[[Axes, Row, str], None]",
        x: str,
        y: str,
    ) -> None:
        """A panel per kind of replacement."""
        if not any(found.values()):
            return
        figure, axes = self.sheet(len(_KINDS), sharey=True, sharex=True, figsize=(12.5, 3.6))
        for ax, (kind, title) in zip(axes[0], _KINDS.items(), strict=True):
            for row in self.rows:
                if found[id(row)]:
                    panel(ax, row, kind)
            ax.set(xlabel=x, title=title)
        axes[0, 0].set_ylabel(y)
        self.finish(figure, name)


def _half_reach(snapshots: Iterable[Sequence[Arrays]]) -> int:
    """The longest l that at least half of a row's snapshots reach."""
    reached = sorted(min(reach(run) for run in runs) for runs in snapshots)
    return reached[len(reached) // 2]


def behind(arrays: Sequence[Arrays], kind: str) -> int:
    """How many tokens behind the replaced one, at most 30, at least `MIN_SURVIVAL` of the twins reach."""
    reached = []
    for one in arrays:
        ones = np.ones((1, len(one["prompt"])))
        alive = counterfactuals.excess_alive_curve(one, ones, _HORIZON, kind)[0]
        reached.append(int((np.nan_to_num(alive) >= MIN_SURVIVAL).sum()))
    return max(1, min(reached))
