"""Figures of the transferability analysis: PNG and SVG, readable by the colour-blind.

    transferability            the board's metric beside the measured gain, and the two in one plot
    transferability-<metric>   the same of other metrics: on common texts, and less the mean over all tasks
    transferability_ranks      Spearman's correlation of every metric with every gain, with intervals
    transferability_choice     what the source that each metric takes gains, beside the best one and the mean
    transferability_relations  predictions and gains by relation, where the task declares relations

Cells are means over training seeds; a pair without a run is blank. A related pair has a frame.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analyses._drawing import write
from analyses._transferability_page import number
from analyses._transferability_ranks import AVERAGE, NONE, ORACLE, TRIED, Judged
from analyses._transferability_rows import CENTRED, UNRELATED, Pairs, over_seeds
from kdbench.estimators import Array
from kdbench.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (3, 1, 1, 1)))
_BLANK = "0.88"


def draw(judged: Judged, out: Path) -> list[Path]:
    """Write every figure that the pairs have the data for; return the files."""
    return write(lambda: _figures(judged), out, 1.0)


def _figures(judged: Judged) -> "list[tuple[str, Figure]]":
    if judged.nothing:
        return []
    pairs, found = judged.pairs, []
    shown = [pairs.board_metric, "semantic_probe", *CENTRED.values()]
    for metric in dict.fromkeys(one for one in shown if one in pairs.predictions):
        name = "transferability" if metric == pairs.board_metric else f"transferability-{metric}"
        found.append((name, _maps(judged, metric)))
    found.append(("transferability_ranks", _ranks(judged)))
    if any(judged.choices.values()):
        found.append(("transferability_choice", _choice(judged)))
    if judged.relations:
        found.append(("transferability_relations", _relations(judged)))
    return found


def _main_gain(pairs: Pairs) -> str:
    return next(name for name, values in pairs.gains.items() if np.isfinite(values).any())


def _frames(pairs: Pairs) -> dict[str, Any]:
    """The line style of each relation whose pairs have a frame."""
    there = {str(kind) for kind in pairs.relations[~pairs.selves]}
    kinds = [kind for kind in pairs.kinds if kind != UNRELATED and kind in there]
    return {kind: _STYLES[at % len(_STYLES)] for at, kind in enumerate(kinds)}


# ------------------------------------------------------------------------------------------------------- maps
def _maps(judged: Judged, metric: str) -> "Figure":
    """The prediction, the gain, and one over the other."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    pairs = judged.pairs
    gain = _main_gain(pairs)
    down, across = len(pairs.sources), len(pairs.targets)
    size = (2 * (1.9 + 0.52 * across) + 3.9, max(3.0, 1.5 + 0.34 * down))
    figure = Figure(figsize=size, layout="constrained")
    widths = [1.9 + 0.52 * across, 1.4 + 0.52 * across, 3.4]
    left, middle, right = figure.subplots(1, 3, width_ratios=widths)
    frames = _frames(pairs)
    x, y = over_seeds(pairs.predictions[metric]), over_seeds(pairs.gains[gain])
    _heat(left, pairs, x, "cividis", None, ".2f", f"predicted: {metric}", frames)
    limit = max(float(np.nanmax(np.abs(y))), 0.1)
    _heat(middle, pairs, y, "PuOr", limit, "+.1f", f"measured: {gain} (points)", frames)
    middle.set_ylabel("")
    middle.set_yticklabels([])
    one = judged.correlations[gain, metric, False]
    told = f"Spearman by target {number(one.mean)}\npooled {number(one.pooled)}"
    _scatter(right, pairs, x, y)
    right.set(title=told, xlabel=metric, ylabel=f"{gain} (points)")
    if frames:
        handles = [Line2D([], [], color="black", linestyle=style, linewidth=1.6) for style in frames.values()]
        figure.legend(
            handles, list(frames), loc="outside lower left", frameon=False, ncols=len(frames), handlelength=3
        )
    return figure


def _heat(
    ax: "Axes",
    pairs: Pairs,
    values: Array,
    cmap: str,
    limit: float | None,
    fmt: str,
    title: str,
    frames: dict[str, Any],
) -> None:
    """A map with sources down and targets across; colours reach from -limit to limit where there is one."""
    import seaborn as sns
    from matplotlib.patches import Rectangle

    ends = {} if limit is None else {"vmin": -limit, "vmax": limit}
    sns.heatmap(
        values,
        ax=ax,
        cmap=cmap,
        annot=True,
        fmt=fmt,
        linewidths=0.5,
        linecolor="white",
        annot_kws={"fontsize": 7},
        cbar_kws={"shrink": 0.7},
        xticklabels=pairs.targets,
        yticklabels=pairs.sources,
        **ends,
    )
    ax.set_facecolor(_BLANK)
    ax.set(title=title, xlabel="target", ylabel="source")
    ax.tick_params(length=0, labelsize=8)
    ax.tick_params(axis="x", rotation=45)
    ax.tick_params(axis="y", rotation=0)
    for s, t in np.ndindex(values.shape):
        style = frames.get(str(pairs.relations[s, t]))
        if style is not None and not pairs.selves[s, t]:
            for color, width, line in (("white", 3.0, "-"), ("black", 1.4, style)):
                ax.add_patch(
                    Rectangle(
                        (t + 0.04, s + 0.05), 0.92, 0.9, fill=False, color=color, lw=width, linestyle=line
                    )
                )


def _scatter(ax: "Axes", pairs: Pairs, x: Array, y: Array) -> None:
    """A dot per pair, a colour and marker per target; a self-transfer is hollow."""
    import seaborn as sns

    colors = sns.color_palette("colorblind", len(pairs.targets))
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for t, target in enumerate(pairs.targets):
        look: dict[str, Any] = {"color": colors[t], "marker": _MARKERS[t % len(_MARKERS)], "linestyle": ""}
        others = np.isfinite(x[:, t]) & np.isfinite(y[:, t]) & ~pairs.selves[:, t]
        ax.plot(x[others, t], y[others, t], label=target, markersize=5, **look)
        mine = np.isfinite(x[:, t]) & np.isfinite(y[:, t]) & pairs.selves[:, t]
        ax.plot(x[mine, t], y[mine, t], markersize=6, markerfacecolor="none", **look)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(title="target (hollow: itself)", frameon=False, fontsize=7, title_fontsize=7)


# --------------------------------------------------------------------------------------------- dots and lines
def _spread(found: Sequence[Estimate]) -> Array:
    """[2, points]: the distances of the values to the ends of their intervals."""
    ends = [[one.value if end is None else end for end in (one.low, one.high)] for one in found]
    values = np.array([one.value for one in found], dtype=float)
    distances: Array = np.abs(np.array(ends, dtype=float).reshape(-1, 2).T - values)
    return distances


def _panels(count: int, lines: int, longest: int) -> Any:
    """(figure, axes): panels side by side over common lines, the first at the top."""
    from matplotlib.figure import Figure

    size = (0.4 + 0.075 * longest + 2.5 * count, 1.0 + 0.3 * lines)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False, sharey=True).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.tick_params(axis="y", length=0)
        for at in range(0, lines, 2):
            ax.axhspan(at - 0.5, at + 0.5, color="0.96", zorder=-2)
    axes[0].set_ylim(lines - 0.5, -0.5)
    return figure, axes


def _dots(ax: "Axes", found: Sequence[tuple[float, Estimate]], **look: Any) -> None:
    """A dot with its interval for each (line, estimate) that has a value."""
    there = [(at, one) for at, one in found if one.value is not None]
    if there:
        estimates = [one for _, one in there]
        ax.errorbar(
            np.array([one.value for one in estimates], dtype=float),
            [at for at, _ in there],
            xerr=_spread(estimates),
            linestyle="",
            capsize=2.5,
            markersize=5,
            **look,
        )


def _ranks(judged: Judged) -> "Figure":
    """A panel per gain, a line per metric; hollow dots have self-transfers."""
    import seaborn as sns

    pairs = judged.pairs
    metrics = list(pairs.predictions)
    first, second = sns.color_palette("colorblind")[:2]
    figure, axes = _panels(len(pairs.gains), len(metrics), max(map(len, metrics)))
    looks: dict[bool, dict[str, Any]] = {
        False: {"color": first, "fmt": "o", "label": "without self-transfers"},
        True: {"color": second, "fmt": "s", "markerfacecolor": "white", "label": "with self-transfers"},
    }
    for ax, gain in zip(axes, pairs.gains, strict=True):
        for selves, look in looks.items():
            found = [
                (at + 0.22 * selves - 0.11, judged.correlations[gain, metric, selves].mean)
                for at, metric in enumerate(metrics)
                if (gain, metric, selves) in judged.correlations
            ]
            _dots(ax, found, **look)
        ax.set(title=gain, xlabel="Spearman by target", xlim=(-1.05, 1.05))
    axes[0].set_yticks(range(len(metrics)), metrics)
    _legend(figure, axes)
    return figure  # type: ignore[no-any-return]


def _legend(figure: "Figure", axes: "Sequence[Axes]") -> None:
    handles = {t: h for ax in axes for h, t in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(
            handles.values(), handles, loc="outside lower center", frameon=False, ncols=len(handles)
        )


def _choice(judged: Judged) -> "Figure":
    """A panel per gain, a line per way to choose; small dots are targets."""
    import seaborn as sns

    color = sns.color_palette("colorblind")[0]
    shown = {gain: found for gain, found in judged.choices.items() if found}
    names = list(dict.fromkeys(one.name for found in shown.values() for one in found))
    names = [name for name in names if name != NONE]
    figure, axes = _panels(len(shown), len(names), max(map(len, names)))
    for ax, (gain, found) in zip(axes, shown.items(), strict=True):
        for one in found:
            if one.name not in names:
                continue
            at = names.index(one.name)
            plain = one.name in (ORACLE, AVERAGE, TRIED)
            look = {"color": "0.35", "markerfacecolor": "white"} if plain else {"color": color}
            values = one.by_target[np.isfinite(one.by_target)]
            ax.plot(values, [at + 0.25] * len(values), "o", color="0.55", markersize=2, zorder=1)
            _dots(ax, [(at, one.gain)], fmt="o", **look)
        ax.set(title=gain, xlabel="gain (points); 0: no transfer")
    axes[0].set_yticks(range(len(names)), names)
    return figure  # type: ignore[no-any-return]


def _relations(judged: Judged) -> "Figure":
    """A panel of predictions and one per gain; a line per relation."""
    import seaborn as sns

    pairs, kinds = judged.pairs, [one.kind for one in judged.relations]
    metrics = [one for one in (pairs.board_metric, "semantic_probe") if one in pairs.predictions]
    metrics = list(dict.fromkeys(metrics))
    colors = sns.color_palette("colorblind", max(2, len(metrics)))
    panels = (["prediction"] if metrics else []) + list(pairs.gains)
    figure, axes = _panels(len(panels), len(kinds), max(map(len, kinds)))
    for ax, title in zip(axes, panels, strict=True):
        if title in pairs.gains:
            found = [(float(at), one.gains[title]) for at, one in enumerate(judged.relations)]
            _dots(ax, found, color="0.25", fmt="o")
            ax.set(title=title, xlabel="points")
            continue
        for i, metric in enumerate(metrics):
            aside = 0.2 * (i - (len(metrics) - 1) / 2)
            found = [(at + aside, one.predictions[metric]) for at, one in enumerate(judged.relations)]
            _dots(ax, found, color=colors[i], fmt=_MARKERS[i], label=metric)
        ax.set(title=title, xlabel="similarity")
    axes[0].set_yticks(range(len(kinds)), kinds)
    _legend(figure, axes)
    return figure  # type: ignore[no-any-return]
