"""The pages of the few-shot analysis: the numbers of its figures, and top tokens at the mask side by side."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from analyses._few_shot_figures import AVERAGE, panels, short
from analyses._few_shot_rows import (
    Ablation,
    Curve,
    Row,
    ablations,
    difference,
    main_rows,
    over_k,
    over_student_size,
    set_names,
)
from kdbench.intervals import MIN_SEEDS, Estimate
from kdbench.record import RecordError

EXAMPLES = 5  # of the case study, per test set
TOKENS = 10


def number(one: Estimate | None) -> str:
    """`value [low, high]`, '–' where there is none."""
    if one is None or one.value is None:
        return "–"
    ends = "" if one.low is None or one.high is None else f" [{one.low:.1f}, {one.high:.1f}]"
    return f"{one.value:.1f}{ends}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], rule: str = "---:") -> list[str]:
    """A Markdown table; `rule` aligns all columns but the first."""
    rules = ["---", *[rule] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rules, *lines)]


def write(rows: Sequence[Row]) -> str:
    """The page with the numbers of every figure, as Markdown."""
    boards = ", ".join(dict.fromkeys(f"{row.board}, size {row.size}" for row in rows))
    draws = sorted({draw for row in rows for runs in row.runs.values() for draw in runs})
    over = f"examples and, in rows with {MIN_SEEDS} draws or more, over draws."
    if len(draws) < MIN_SEEDS:
        over = "examples only: it is not known how much another draw would move the numbers."
    told = ", ".join(map(str, draws))
    lines = [
        f"# Few-shot classification on {boards}",
        "",
        f"Draws: {told}. Numbers are means over draws; brackets hold 95 % intervals over {over}",
    ]
    parts: list[tuple[str, list[str]]] = [("Accuracy (%)", _accuracy(rows))]
    parts += [(f"Ablation of {one.full.title}: accuracy (%)", _ablation(one)) for one in ablations(rows)]
    parts += [("Accuracy (%) over K", _curves(over_k(rows), "K"))]
    parts += [("Accuracy (%) over the student's parameters", _curves(over_student_size(rows), "parameters"))]
    parts += [(f"Probe accuracy (%): {row.title}", _probes(row)) for row in main_rows(rows)]
    parts += [(f"Predictions on {name}", _predictions(rows, name)) for name in set_names(rows)]
    for title, found in parts:
        if found:
            lines += ["", f"## {title}", "", *found]
    return "\n".join(lines) + "\n"


def _accuracy(rows: Sequence[Row]) -> list[str]:
    """Mean, interval and, as in the papers, the population standard deviation over draws."""
    shown = panels(rows)
    lines = [
        [row.title, *(_with_deviation(row, title, names) for title, names in shown.items())] for row in rows
    ]
    return [*_table(["row", *shown], lines), "", "± is the standard deviation over draws (ddof 0)."]


def _with_deviation(row: Row, title: str, names: Sequence[str]) -> str:
    found = row.accuracy(names)
    if found is None or title == AVERAGE:
        return number(found)
    values = list(row.draws(names[0]).values())
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return f"{number(found)} ± {deviation:.1f}"


def _ablation(one: Ablation) -> list[str]:
    names = list(one.full.runs)
    head = ["row", *(cell for name in names for cell in (name, f"less {one.full.title}"))]
    lines = []
    for row in one.rows:
        cells = [row.title]
        for name in names:
            apart = None if row is one.full else difference(row, one.full, name)
            cells += [number(row.accuracy([name])), number(apart)]
        lines.append(cells)
    return [*_table(head, lines), "", "Differences are in points, on the same draws and examples."]


def _curves(curves: Sequence[Curve], label: str) -> list[str]:
    lines: list[str] = []
    for name in dict.fromkeys(name for curve in curves for name in curve.points):
        found = [(curve.title, dict(curve.points[name])) for curve in curves if name in curve.points]
        places = sorted({x for _, points in found for x in points})
        cells = [[title, *(number(points.get(x)) for x in places)] for title, points in found]
        lines += [""] * bool(lines) + _table([f"{name}, {label}", *map(short, places)], cells)
    return lines


def _probes(row: Row) -> list[str]:
    lines: list[str] = []
    for name, banks in row.probes().items():
        layers = sorted({layer for found in banks.values() for layer in found})
        cells = [[bank, *(number(found.get(layer)) for layer in layers)] for bank, found in banks.items()]
        lines += [""] * bool(lines) + _table([f"{name}, layer", *map(str, layers)], cells)
    return lines


def _predictions(rows: Sequence[Row], name: str) -> list[str]:
    """What the confusion matrices say, as recall of each class, and the scores that have no figure."""
    shown = [row for row in rows if name in row.runs]
    measures = {
        "most predicted class (%)": "majority_share",
        "macro-F1": "macro_f1",
        "calibration error (points)": "expected_calibration_error",
    }
    lines = []
    for row in shown:
        recall = [
            "–" if math.isnan(share) else f"{100 * share:.1f}" for share in row.confusion(name).diagonal()
        ]
        scores = [f"{row.mean(measure, name):.1f}" for measure in measures.values()]
        lines.append([row.title, *recall, *scores, f"{row.mean('nll', name):.3f}"])
    head = ["row", *(f"recall {one} (%)" for one in shown[0].classes(name)), *measures, "-log p (nats)"]
    return _table(head, lines)


# ------------------------------------------------------------------------------------------------- case study
def case_study(rows: Sequence[Row]) -> str:
    """Top tokens at the mask for the first examples of each test set, row by row; '' where no run has them.

    Rows are the reference rows and, of an ablation, the full one; each is seen at its least draw.

    Raises: RecordError where `top` is not a list of [token, probability] pairs.
    """
    order = sorted(main_rows(rows), key=lambda row: not row.reference)
    lines: list[str] = []
    for name in set_names(rows):
        seen = {row.title: found for row in order if name in row.runs and (found := _tops(row, name))}
        common = [at for at in next(iter(seen.values()), {}) if all(at in found for found in seen.values())]
        if seen and common:
            lines += ["", f"## {name}"]
        for example in common[:EXAMPLES]:
            first = next(iter(seen.values()))[example]
            lines += [
                "",
                f"{_quoted(first['prompt'])} (example {example}; right: {first['references'][0]})",
                "",
            ]
            cells = [
                [title, found[example]["response"], _told(found[example])] for title, found in seen.items()
            ]
            lines += _table(["row", "predicted", "likeliest tokens at the mask"], cells, "---")
    if not lines:
        return ""
    head = f"The {TOKENS} likeliest tokens of the whole vocabulary at the mask, with their probabilities."
    return "\n".join(["# Case study", "", head, *lines]) + "\n"


def _tops(row: Row, name: str) -> dict[int, dict[str, Any]]:
    """The output rows of a set with `top` by example, of the least draw."""
    draw = min(row.runs[name])
    return {one["example_id"]: one for one in row.runs[name][draw].folder.outputs(name) if one.get("top")}


def _quoted(text: str) -> str:
    return "> " + " ".join(str(text).split())


def _told(row: dict[str, Any]) -> str:
    try:
        pairs = [f"{_cell(token)} {probability:.2f}" for token, probability in row["top"][:TOKENS]]
    except (TypeError, ValueError):
        raise RecordError(
            f"example {row['example_id']} of {row.get('set')}: 'top' should be pairs of a token and a number."
        ) from None
    return ", ".join(pairs)


def _cell(token: object) -> str:
    return str(token).replace("|", "\\|")
