"""Figures of the few-shot analysis: PNG and SVG, with 95 % intervals, readable in greyscale.

    accuracy                   a panel per test set, and their mean: every row, its draws as small dots
    ablation                   the same of a method's rows that differ in settings, the full one first, and of
                               the other methods
    accuracy_over_k            runs that differ in K
    accuracy_over_student_size runs that differ in the student
    probes-<row>               accuracy of the probe on each layer, a line per bank
    confusion-<test set>       a panel per row: share of each class' examples by prediction

Reference rows are grey; a dotted line is chance. Each figure is drawn where its data exist.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analyses._drawing import write
from analyses._few_shot_rows import (
    Curve,
    Row,
    ablations,
    file_name,
    main_rows,
    over_k,
    over_student_size,
    set_names,
)
from kdbench.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
AVERAGE = "average"


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write every figure that the rows have the data for; return the files."""
    return write(lambda: _figures(rows), out, 1.1)


def _figures(rows: Sequence[Row]) -> "list[tuple[str, Figure]]":
    found = [("accuracy", _dots(rows))]
    for at, one in enumerate(ablations(rows)):
        found.append((f"ablation-{one.full.name}" if at else "ablation", _dots(one.rows)))
    for name, curves, label in (
        ("accuracy_over_k", over_k(rows), "examples per class K"),
        ("accuracy_over_student_size", over_student_size(rows), "parameters of the student"),
    ):
        if curves:
            found.append((name, _curves(curves, label)))
    found += [(f"probes-{row.name}", _probes(row)) for row in main_rows(rows) if row.probes()]
    found += [(f"confusion-{file_name(name)}", _confusion(rows, name)) for name in set_names(rows)]
    return found


# ------------------------------------------------------------------------------------------------------ parts
def _sheet(panels: int, across: int, width: float, height: float, left: float = 0.6, **more: Any) -> Any:
    """(figure, axes of each panel); sizes in inches, `left` is what names beside the panels take."""
    from matplotlib.figure import Figure

    across = min(across, panels)
    down = math.ceil(panels / across)
    figure = Figure(figsize=(left + width * across, 0.3 + height * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, **more).flat)
    for ax in axes[panels:]:
        ax.set_visible(False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[:panels]


def _spread(found: Sequence[Estimate]) -> Any:
    """[2, points]: the distances of the values to the ends of their intervals."""
    ends = [[one.value if end is None else end for end in (one.low, one.high)] for one in found]
    values = np.array([one.value for one in found], dtype=float)
    return np.abs(np.array(ends, dtype=float).reshape(-1, 2).T - values)


def _legend(figure: "Figure", axes: "Sequence[Axes]") -> None:
    handles = {t: h for ax in axes for h, t in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, handlelength=3.2)


# ---------------------------------------------------------------------------------------------------- figures
def panels(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The test sets behind each panel: every set alone and, where there are several, their mean."""
    names = set_names(rows)
    return {name: [name] for name in names} | ({AVERAGE: names} if len(names) > 1 else {})


def _dots(rows: Sequence[Row]) -> "Figure":
    """A dot with its interval for each row in each panel; small dots are the draws."""
    import seaborn as sns

    color = sns.color_palette("colorblind")[0]
    shown = panels(rows)
    longest = max(len(row.title) for row in rows)
    figure, axes = _sheet(
        len(shown), 3, 2.5, 0.75 + 0.24 * len(rows), left=0.2 + 0.075 * longest, sharey=True
    )
    for ax, (title, names) in zip(axes, shown.items(), strict=True):
        for at in range(0, len(rows), 2):
            ax.axhspan(at - 0.5, at + 0.5, color="0.96", zorder=-2)
        chance = [100 / len(row.classes(name)) for name in names for row in rows if name in row.runs]
        if len(names) == 1:
            ax.axvline(chance[0], color="0.4", linewidth=0.9, linestyle=":", zorder=0)
        for at, row in enumerate(rows):
            one = row.accuracy(names)
            if one is None:
                continue
            draws = [row.draws(name) for name in names]
            common = set(draws[0]).intersection(*draws[1:])
            means = [float(np.mean([found[draw] for found in draws])) for draw in sorted(common)]
            look: dict[str, Any] = (
                {"color": "0.35", "markerfacecolor": "white"} if row.reference else {"color": color}
            )
            ax.plot(means, [at + 0.3] * len(means), "o", color="0.55", markersize=2, zorder=1)
            ax.errorbar(
                [one.value], [at], xerr=_spread([one]), fmt="o", capsize=2.5, markersize=5, zorder=3, **look
            )
        ax.set(title=title, xlabel="accuracy (%)")
        ax.locator_params(axis="x", nbins=5)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(rows)), [row.title for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure  # type: ignore[no-any-return]


def _curves(curves: Sequence[Curve], label: str) -> "Figure":
    """A panel per test set, a line per curve over a logarithmic axis; points lie side by side."""
    import seaborn as sns
    from matplotlib.ticker import FuncFormatter, NullLocator

    names = list(dict.fromkeys(name for curve in curves for name in curve.points))
    colors = sns.color_palette("colorblind", len(curves))
    longest = max(len(curve.title) for curve in curves)
    figure, axes = _sheet(len(names), 3, 2.6, 2.5, left=1.1 + 0.075 * longest)
    for ax, name in zip(axes, names, strict=True):
        places = sorted({x for curve in curves for x, _ in curve.points.get(name, [])})
        for at, curve in enumerate(curves):
            if name not in curve.points:
                continue
            found = [one for _, one in curve.points[name]]
            aside = (places[-1] / places[0]) ** (0.015 * (at - (len(curves) - 1) / 2))
            ax.errorbar(
                [x * aside for x, _ in curve.points[name]],
                [one.value for one in found],
                yerr=_spread(found),
                label=curve.title,
                color="0.5" if curve.reference else colors[at],
                linestyle=_STYLES[at % len(_STYLES)],
                marker=_MARKERS[at % len(_MARKERS)],
                markersize=5,
                elinewidth=0.9,
                capsize=2,
            )
        ax.set_xscale("log", base=2)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        ax.set_xticks(places)
        ax.set(title=name, xlabel=label, ylabel="accuracy (%)")
    _legend(figure, axes)
    return figure  # type: ignore[no-any-return]


def short(value: float) -> str:
    """A count in three digits: 16, 4.39M, 110M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _probes(row: Row) -> "Figure":
    """A panel per data set, a line per bank of probes over the layers."""
    import seaborn as sns

    shown = row.probes()
    banks = list(dict.fromkeys(bank for found in shown.values() for bank in found))
    colors = sns.color_palette("colorblind", len(banks))
    figure, axes = _sheet(len(shown), 3, 2.6, 2.5, left=2.0)
    for ax, (name, found) in zip(axes, shown.items(), strict=True):
        for bank, layers in found.items():
            at, x, made = banks.index(bank), list(layers), list(layers.values())
            values = [one.value for one in made]
            look = {"linestyle": _STYLES[at % len(_STYLES)], "marker": _MARKERS[at % len(_MARKERS)]}
            ax.plot(x, values, label=bank, color=colors[at], markersize=4, **look)
            below, above = _spread(made)
            ends = np.array(values) - below, np.array(values) + above
            ax.fill_between(x, *ends, color=colors[at], alpha=0.15, linewidth=0)
        ax.axhline(100 / len(row.classes(name)), color="0.4", linewidth=0.9, linestyle=":", zorder=0)
        ax.set(title=name, xlabel="layer", ylabel="probe accuracy (%)")
        ax.locator_params(axis="x", integer=True)
    _legend(figure, axes)
    return figure  # type: ignore[no-any-return]


def _confusion(rows: Sequence[Row], name: str) -> "Figure":
    """A panel per row: of each class' examples (down), the share with each prediction (across), in %."""
    import seaborn as sns

    shown = [row for row in rows if name in row.runs]
    classes = shown[0].classes(name)
    side = max(1.4, 0.4 * len(classes))
    figure, axes = _sheet(len(shown), 5, side, side + 0.35, left=1.0, sharex=True, sharey=True)
    for ax, row in zip(axes, shown, strict=True):
        sns.heatmap(
            100 * row.confusion(name),
            ax=ax,
            vmin=0,
            vmax=100,
            cmap="Blues",
            annot=True,
            fmt=".0f",
            cbar=False,
            square=True,
            linewidths=0.5,
            linecolor="white",
            annot_kws={"fontsize": 7},
            xticklabels=classes,
            yticklabels=classes,
        )
        ax.set_title(textwrap.fill(row.title, 18), fontsize=8)
        ax.tick_params(length=0, labelsize=7)
    figure.supxlabel("predicted (% of the class)", fontsize="medium")
    figure.supylabel("class", fontsize="medium")
    figure.suptitle(name, fontsize="medium")
    return figure  # type: ignore[no-any-return]
