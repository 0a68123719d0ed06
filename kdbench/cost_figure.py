"""The figure of quality against cost: points with intervals, the Pareto front, reference rows.

It draws what `kdbench.cost_report` tells.
"""

import itertools
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdbench.board import _number
from kdbench.cost_report import View
from kdbench.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

SUFFIXES = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raises: UserError for a file name whose kind cannot be drawn, and for a folder that is not there."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--figure {path}: the name should end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"--figure {path}: there is no folder {path.parent}")


def draw(view: View, path: Path) -> None:
    """Write the figure: quality over training time, the front as steps, 95 % intervals, a panel per
    combination of axis values; dotted lines are reference rows.

    Raises: UserError where the file cannot be written.
    """
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check(path)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in view["rows"]:
        if row["quality"] is not None:
            groups.setdefault(json.dumps(row["axes"], sort_keys=True), []).append(row)
    shown = [rows for rows in groups.values() if any(_drawn(row) for row in rows)]
    if not shown:
        raise UserError(f"--figure {path}: no row took training time, so there is nothing to draw")
    with sns.axes_style("ticks"), sns.plotting_context("paper", font_scale=1.1):
        figure = Figure(figsize=(7.2, 4.4 * len(shown)), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        sheet = list(figure.subplots(len(shown), 1, squeeze=False).flat)
        panels = [_panel(ax, view, rows) for ax, rows in zip(sheet, shown, strict=True)]
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # labels are placed on what is laid out now
        for ax, (labels, shapes) in zip(sheet, panels, strict=True):
            _place(ax, labels, shapes, canvas.get_renderer(), figure.dpi / 72)  # type: ignore[no-untyped-call]
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise UserError(f"--figure {path}: cannot be written: {error.strerror or error}") from None


def _drawn(row: Mapping[str, Any]) -> bool:
    return bool(row["seconds"] and row["seconds"]["value"] > 0)


def _ends(told: Mapping[str, Any]) -> tuple[float, float]:
    """The distances from a value to the ends of its interval, 0 where it has none."""
    low, high = told["interval"] or (told["value"], told["value"])
    return max(told["value"] - low, 0.0), max(high - told["value"], 0.0)


def _panel(ax: "Axes", view: View, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Draw one combination of axis values; return the points' labels, and what they should not cover."""
    import seaborn as sns
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    color, points = sns.color_palette("colorblind")[0], [row for row in rows if _drawn(row)]
    text: dict[str, Any] = {"fontsize": 8.5, "textcoords": "offset points", "zorder": 5}
    text["path_effects"] = [withStroke(linewidth=2.5, foreground="white")]
    labels: list[Any] = []
    shapes: list[Any] = []
    for row in points:
        x, y = row["seconds"]["value"], row["quality"]["value"]
        look = {"color": color} if row["front"] else {"color": "0.45", "markerfacecolor": "white"}
        spread = [[[end] for end in _ends(row[name])] for name in ("seconds", "quality")]
        bars = ax.errorbar(
            x, y, xerr=spread[0], yerr=spread[1], fmt="o", markersize=5.5, elinewidth=0.9, capsize=2, **look
        )
        shapes += [bars.lines[0], *bars.lines[1], *bars.lines[2]]
        share = "" if row["front_share"] is None else f"  {100 * row['front_share']:.0f} %"
        said = f"{_short(row)}{share}"
        label = ax.annotate(said, (x, y), (0, 0), va="bottom", color="0.1", in_layout=False, **text)
        labels.append(label)
    ax.set_xscale("log")
    limits = ax.get_xlim(), ax.get_ylim()
    steps = sorted((row["seconds"]["value"], row["quality"]["value"]) for row in points if row["front"])
    ends = [*(x for x, _ in steps[1:]), limits[0][1]]
    corners = [corner for (x, y), end in zip(steps, ends, strict=False) for corner in ((x, y), (end, y))]
    for one, other in itertools.pairwise(corners):
        shapes += ax.plot(*zip(one, other, strict=True), color=color, linewidth=1.2, alpha=0.7, zorder=1.8)
    shapes += _references(ax, view, [row for row in rows if row["reference"]], limits[1], text)
    ax.set(xlim=limits[0], ylim=limits[1])
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    quality = view["quality"]
    better = {"higher": "more is better", "lower": "less is better"}[quality["direction"]]
    unit = f"{quality['unit']}, " if quality["unit"] else ""
    ax.set(xlabel="training time (s)", ylabel=f"{quality['title']} ({unit}{better})")
    axes = ", ".join(f"{key} {value}" for key, value in rows[0]["axes"].items())
    title = textwrap.fill(f"{view['title']}{f', {axes}' if axes else ''}", 80)
    told = "filled, joined: the Pareto front; %: resamples with the row on it; bars: 95 % intervals"
    ax.set_title(f"{title}\n{told}", loc="left", fontsize=8.5)
    ax.spines[["top", "right"]].set_visible(False)
    return labels, shapes


def _references(
    ax: "Axes",
    view: View,
    rows: Sequence[Mapping[str, Any]],
    limits: tuple[float, float],
    text: Mapping[str, Any],
) -> list[Any]:
    """Dotted lines of reference rows; those beyond the limits are named at the edge. Returns the texts."""
    beyond: dict[bool, list[str]] = {}
    texts, across = [], ax.get_yaxis_transform()
    for row in rows:
        value = row["quality"]["value"]
        said = f"{row['title']} {_number(value, view['quality'])}"
        if limits[0] <= value <= limits[1]:
            ax.axhline(value, color="0.4", linewidth=0.9, linestyle=":", zorder=1)
            texts.append(ax.annotate(said, (1, value), (-3, 2), across, ha="right", color="0.35", **text))
        else:
            beyond.setdefault(bool(value > limits[1]), []).append(said)
    for above, names in beyond.items():
        said = f"{'above' if above else 'below'}: {', '.join(names)}"
        look = {"ha": "right", "va": "top" if above else "bottom", "color": "0.35", **text}
        texts.append(ax.annotate(said, (1, limits[above]), (-3, -2 if above else 2), across, **look))
    return texts


def _short(row: Mapping[str, Any]) -> str:
    name = f"{row['title']}{' (local)' if row['local'] else ''}"
    return "\n".join(textwrap.wrap(name, 26))


def _nearest(spot: Sequence[float], box: "Bbox") -> tuple[float, float]:
    """The point of a box that is nearest to a spot."""
    return min(max(spot[0], box.x0), box.x1), min(max(spot[1], box.y0), box.y1)


_PLACES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # right, left, above, ...
_DISTANCES = (4, 8, 14, 22, 32, 44, 58, 74)  # points


def _place(ax: "Axes", labels: Sequence[Any], drawn: Sequence[Any], renderer: Any, point: float) -> None:
    """Move each label to the place around its point where it covers least of what is drawn and of the other
    labels; a thin line leads to one that is far off. Args: `point`: pixels of a point.
    """
    from matplotlib.transforms import Bbox

    inside = ax.get_window_extent(renderer)
    taken = [one.get_window_extent(renderer).padded(1.5 * point) for one in drawn]
    places: dict[int, tuple[float, Bbox]] = {}

    def common(one: Bbox, other: Bbox) -> float:
        both = Bbox.intersection(one, other)
        return both.width * both.height / point**2 if both is not None else 0.0

    def cost_of(at: int, box: Bbox, far: float) -> float:
        others = sum(
            common(box.padded(3 * point), other) for number, (_, other) in places.items() if number != at
        )
        outside = box.width * box.height / point**2 - common(box, inside)
        near = [math.dist(_nearest(spot, box), spot) / point for spot in spots]
        foreign = sum(max(0.0, near[at] + 4 - one) for number, one in enumerate(near) if number != at)
        return 10 * (others + outside + foreign) + 3 * sum(common(box, other) for other in taken) + 2 * far

    sizes = [label.get_window_extent(renderer) for label in labels]
    spots = [tuple(ax.transData.transform(label.xy)) for label in labels]
    for _ in range(3):  # those placed first give way to those placed after them
        for at, (x, y) in enumerate(spots):
            width, height = sizes[at].width, sizes[at].height
            tried = []
            for far in _DISTANCES:
                for across, up in _PLACES:
                    left = x + across * far * point + (across - 1) * width / 2
                    low = y + up * far * point + (up - 1) * height / 2
                    box = Bbox.from_bounds(left, low, width, height)
                    tried.append((cost_of(at, box, far), far, box))
            _, far, box = min(tried, key=lambda one: one[0])
            places[at] = far, box
    for at, (distance, box) in places.items():
        labels[at].set_position(((box.x0 - spots[at][0]) / point, (box.y0 - spots[at][1]) / point))
        if distance > _DISTANCES[1]:
            ends = ax.transData.inverted().transform([spots[at], _nearest(spots[at], box)])
            ax.plot(*ends.T, color="0.6", linewidth=0.6, zorder=1.5)
