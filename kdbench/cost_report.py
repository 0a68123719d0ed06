"""Quality against cost: a board's rows beside a baseline, as a table.

It reads the statistics of `kdbench.board` and computes nothing anew but the choice of baseline and target, so
that it answers at once; `kdbench.cost` says what the numbers are.
"""

import csv
import io
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdbench import board as boards
from kdbench import cost
from kdbench.board import Statistics
from kdbench.errors import UserError, unknown

UNEVEN = 1.5  # runs of one row whose times differ by this factor are warned of
LOPSIDED = 1.5  # an interval is told by its ends where one is that much farther from the value than the other
NAMED = 3  # rows that a warning of times names at most
View = dict[str, Any]


# ------------------------------------------------------------------------------------------------ the numbers
def against(
    statistics: Statistics,
    baseline: str | None = None,
    target: float = 0.0,
    default: str = "",
    order: Sequence[str] = (),
) -> View:
    """The rows of statistics against a baseline, as a JSON-able object; `rows` are in order of cost.

    Args: `baseline`: a row; None: the row `default`, or where it has no run the row that costs least.
    `target`: how much better than the baseline a row should be, for its time to get there. `order`: of the
    names of rows, in which an error lists them; others follow.

    Raises: UserError for a board without a ranking column, a row that is unknown or not trained, and where no
    row has runs to tell costs of.
    """
    rank = next((column for column in statistics["columns"] if column["rank"]), None)
    where, costs = statistics["board"], statistics["costs"]
    if rank is None:
        raise UserError(f"{where}: no column ranks its rows (rank = true), so costs have no quality beside")
    trained = [row for row in statistics["rows"] if _name(row) in costs]
    if not trained:
        raise UserError(f"{where}: no trained row has finished runs of size '{statistics['size']}'")
    given = dict.fromkeys(str(row["name"]) for row in trained)
    names = [name for name in order if name in given] + [name for name in given if name not in order]
    if baseline is None:
        cheapest = min(trained, key=lambda row: float(costs[_name(row)]["seconds"]["value"]))
        baseline = default if default in names else str(cheapest["name"])
    elif baseline not in names:
        other = next((row for row in statistics["rows"] if row["name"] == baseline), None)
        if other is not None and other["reference"]:
            raise UserError(f"--baseline {baseline}: is a reference row, which is not trained")
        raise unknown("trained row", baseline, names, "--baseline")
    title = next(row["title"] for row in trained if row["name"] == baseline)
    rows = []
    for row in statistics["rows"]:
        base = _baseline(row, trained, baseline)
        rows.append(_row(row, base, costs, boards._key(rank), target, rank["direction"]))
    warnings = [*statistics["warnings"], *_warnings(statistics, trained, baseline)]
    kept = ("board", "size", "title", "budgets", "resamples")
    return {
        **{key: statistics[key] for key in kept},
        "quality": rank,
        "baseline": {"name": baseline, "title": title},
        "target": target,
        "rows": sorted(rows, key=_order),
        "warnings": warnings,
    }


def _name(row: Mapping[str, Any]) -> str:
    return boards._name(row["name"], row["axes"], row["local"])


def _baseline(
    row: Mapping[str, Any], trained: Sequence[Mapping[str, Any]], name: str
) -> Mapping[str, Any] | None:
    """The baseline at the axis values of a row: the published one where there is one."""
    same = [one for one in trained if one["name"] == name and one["axes"] == row["axes"]]
    return min(same, key=lambda one: bool(one["local"]), default=None)


def _row(
    row: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    costs: Mapping[str, Any],
    key: str,
    target: float,
    direction: str,
) -> dict[str, Any]:
    """One row's quality and, where it is trained, its cost and what it gains over the baseline."""
    cell, mine = row["cells"].get(key), costs.get(_name(row))
    kept = ("name", "title", "axes", "local", "reference", "runs", "failed")
    told = {name: row[name] for name in kept} | {"quality": cell, "seconds": None}
    if mine is None or cell is None:
        return told
    told |= {name: mine[name] for name in mine if name != "against"}
    told |= {"relative": None, "gain": None, "per_cost": None, "reach": None}
    if base is None:
        return told
    other, quality = costs[_name(base)], base["cells"][key]["value"]
    told["reach"] = cost.reach(
        {"quality": cell["value"], "seconds": mine["seconds"]["value"], "curve": mine["curve"]},
        {"quality": quality, "curve": other["curve"]},
        target,
        direction,
    )
    if base is row:
        told["relative"] = {"value": 1.0, "interval": None}
        return told
    intervals = mine["against"].get(_name(base), {})
    gain = (cell["value"] - quality) * (1 if direction == "higher" else -1)
    told["gain"] = {"value": gain, "interval": intervals.get("gain")}
    if other["seconds"]["value"] > 0:
        relative = mine["seconds"]["value"] / other["seconds"]["value"]
        told["relative"] = {"value": relative, "interval": intervals.get("relative")}
        if relative > 1 and (intervals.get("relative") or [relative])[0] > 1:  # surely more expensive
            told["per_cost"] = {"value": gain / (relative - 1), "interval": intervals.get("per_cost")}
    return told


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """By axis values: reference rows, then from the cheapest to the dearest, then those without a run."""
    seconds = row["seconds"]
    place = 0 if row["reference"] else 1 if seconds else 2
    return json.dumps(row["axes"], sort_keys=True), place, seconds["value"] if seconds else 0.0, row["name"]


def _warnings(statistics: Statistics, trained: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    """Why costs may not be compared, and which rows are not compared with the baseline as others are."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    uneven: list[tuple[float, str]] = []
    warnings = []
    for row in trained:
        mine, label = statistics["costs"][_name(row)], boards._label(row)
        for kind in mine["environments"]:
            kinds.setdefault(tuple(kind), []).append(label)
        seconds = mine["seconds"]["seeds"]
        if min(seconds.values()) > 0 and max(seconds.values()) >= UNEVEN * min(seconds.values()):
            uneven.append((max(seconds.values()) / min(seconds.values()), label))
        base = _baseline(row, trained, baseline)
        if base is None:
            warnings.append(f"{label}: the row '{baseline}' has no runs at these axis values.")
        elif seconds.keys() != (other := statistics["costs"][_name(base)]["seconds"]["seeds"]).keys():
            seeds = f"{', '.join(seconds)}; {boards._label(base)}: {', '.join(other)}"
            warnings.append(f"{label}: is not paired, for the baseline has other training seeds ({seeds}).")
        if mine["left_out"]:
            warnings.append(f"{label}: is compared with none: {mine['left_out']}.")
    if len(kinds) > 1:
        told = "; ".join(f"{_made(kind)}: {', '.join(rows)}" for kind, rows in kinds.items())
        warnings.append(f"costs of runs that were made in different ways do not compare ({told}).")
    elif len({row["local"] for row in trained}) > 1:
        warnings.append("published and local rows may be of different machines, whose costs do not compare.")
    if uneven:
        warnings.append(
            f"a row's runs took unlike times, as on a busy machine (longest by shortest: "
            f"{_uneven(uneven, len(trained))})."
        )
    return warnings


def _uneven(found: Sequence[tuple[float, str]], count: int) -> str:
    """Some of the rows whose runs took unlike times, the worst first; `count`: how many rows there are."""
    worst = sorted(found, key=lambda one: -one[0])
    if len(worst) == count > 1:
        return f"all rows, up to {worst[0][0]:.1f}"
    told = ", ".join(f"{label} {times:.1f}" for times, label in worst[:NAMED])
    return told + (f" and {len(worst) - NAMED} more" if len(worst) > NAMED else "")


def _made(kind: Sequence[Any]) -> str:
    """How runs were made: device, threads, how many at a time."""
    device, threads, jobs = kind
    many = "unknown" if threads is None else str(threads)
    return (
        f"{device or 'unknown device'}, threads {many}, runs at a time {'unknown' if jobs is None else jobs}"
    )


# --------------------------------------------------------------------------------------------------- the text
def render(view: View, format: str = "table") -> str:
    """The view as text: `table` (120 columns), `markdown`, `csv` (a line per row) or `json`.

    Raises: UserError for another format.
    """
    if format == "json":
        return json.dumps(view, indent=1, ensure_ascii=False) + "\n"
    if format == "csv":
        return _csv(view)
    if format in ("table", "markdown"):
        return _text(view, markdown=format == "markdown")
    raise unknown("format", format, boards.FORMATS)


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _with(told: Mapping[str, Any] | None, said: Any, markdown: bool) -> str:
    """A value with its interval: brackets, or half of it behind ± where it is not lopsided."""
    if told is None:
        return "–"
    text, interval = str(said(told["value"])), told["interval"]
    if interval is None:
        return text
    low, high = interval
    if markdown or _lopsided(told["value"], low, high, said):
        return f"{text} [{said(low)}, {said(high)}]"
    return f"{text} ±{said((high - low) / 2).lstrip('+')}"


def _lopsided(value: float, low: float, high: float, said: Any) -> bool:
    """Whether ± would tell other ends than an interval has: not where they are the same once rounded."""
    below, above, half = value - low, high - value, (high - low) / 2
    uneven = max(below, above) > LOPSIDED * min(below, above)
    return uneven and (said(value - half), said(value + half)) != (said(low), said(high))


def _plain(told: Mapping[str, Any] | None, markdown: bool) -> Mapping[str, Any] | None:
    """Without its interval but in markdown: one of times is lopsided, which ± would not tell."""
    return told if told is None or markdown else {**told, "interval": None}


def _target(view: View) -> str:
    """The baseline's title, and what is to be gained."""
    more = f" + {view['target']:g}" if view["target"] else ""
    return f"{view['baseline']['title']}{more}"


def _reached(row: Mapping[str, Any], mixed: bool) -> str:
    found = row.get("reach")
    if found is None:
        return "–"
    if found["seconds"] is None:
        return "not reached"
    return _seconds(found["seconds"]) + (f" ({found['by']})" if mixed else "")


def _on_front(row: Mapping[str, Any]) -> str:
    if row.get("front") is None:
        return "–"
    share, few = row["front_share"], len(row["seconds"]["seeds"]) < boards.MIN_SEEDS
    text = "" if share is None else f"{100 * share:.0f} %"
    return f"{text}{'*' if row['front'] else ' '}{'?' if few else ' '}"


def _text(view: View, markdown: bool) -> str:
    quality, base = view["quality"], view["baseline"]["title"]
    mixed = len({row["reach"]["by"] for row in view["rows"] if row.get("reach")}) > 1

    def score(value: float) -> str:
        return boards._number(value, quality)

    def signed(value: float) -> str:
        return f"{value:+,.{quality['digits']}f}"

    def finer(value: float) -> str:
        return f"{value:+,.{quality['digits'] + 1}f}"

    def times(value: float) -> str:
        return f"{value:.1f}"

    heads: list[tuple[str, str]] = [("", ""), ("seeds", ""), (quality["title"], boards._unit(quality))]
    heads += [("train", "s"), ("×", base), ("peak", "GB"), ("tokens", "sampled"), ("gain", quality["unit"])]
    heads += [("gain per", f"× {base}"), ("front", ""), ("time to", _target(view))]
    body = []
    for row in view["rows"]:
        peak, tokens = row.get("peak_bytes"), row.get("tokens_sampled")
        body.append(
            [
                boards._label(row),
                boards._seeds(row),
                _with(row["quality"], score, markdown),
                _with(_plain(row["seconds"], markdown), _seconds, markdown),
                _with(_plain(row.get("relative"), markdown), times, markdown),
                "–" if peak is None else boards._number(peak, {"unit": "bytes"}),
                "–" if tokens is None else f"{tokens:,.0f}",
                _with(row.get("gain"), signed, markdown),
                _with(row.get("per_cost"), finer, markdown=True),  # a ratio: lopsided as a rule
                _on_front(row).strip() if markdown else _on_front(row),
                _reached(row, mixed),
            ]
        )
    told = f"Quality against cost, baseline {base}"
    if not markdown:
        headers = [list(one) for one in zip(*heads, strict=True)]
        lines = [boards._heading(view), told, "", *boards._blocks(headers, body), ""]
        lines += [part for note in _legend(view, markdown) for part in textwrap.wrap(note, boards._WIDTH)]
        lines += ["", *_failed(view)]
        for warning in view["warnings"]:
            lines += textwrap.wrap(
                f"Warning: {warning}", boards._WIDTH, break_long_words=False, break_on_hyphens=False
            )
    else:

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        titles = [" ".join(part for part in pair if part) for pair in heads]
        lines = [f"# {boards._heading(view)}", "", f"{told}.", ""]
        lines += [line(titles), line(["---", *["---:"] * (len(titles) - 1)])]
        notes = _legend(view, markdown) + _failed(view)
        lines += [*map(line, body), "", *[f"- {note}" for note in notes]]
        lines += [f"- Warning: {warning}" for warning in view["warnings"]]
    return "\n".join(lines).rstrip() + "\n"


def _failed(view: View) -> list[str]:
    """Runs that take no part, with the reason."""
    return boards._footer({**view, "rows": [{**row, "runs": {}} for row in view["rows"]]})


def _legend(view: View, markdown: bool) -> list[str]:
    """What the columns say."""
    base, quality = view["baseline"]["title"], view["quality"]["title"]
    rows = [row for row in view["rows"] if row["seconds"]]
    brackets = "brackets hold a 95 % interval"
    told = brackets if markdown else "± is half a 95 % interval, brackets hold one"
    lines = [
        f"Cost is the time of training. Values are means over training seeds; {told}, each "
        f"by itself. gain: {quality} over {base}, paired; gain per × {base}: for each further training of "
        f"{base} that the time would pay for, where a row costs more for sure.",
        f"front: share of {view['resamples']:,} paired resamples of training seeds and prompts in which no "
        "row is better and cheaper; * there as measured.",
    ]
    if any(len(row["seconds"]["seeds"]) < boards.MIN_SEEDS for row in rows):
        lines.append(
            f"? under {boards.MIN_SEEDS} training seeds: intervals and resamples are over prompts only."
        )
    for by in dict.fromkeys(row["reach"]["by"] for row in rows if row["reach"]):
        found = next(row["reach"] for row in rows if row["reach"] and row["reach"]["by"] == by)
        goal = boards._number(found["target"], view["quality"])
        goal = f"{goal}, that of {_target(view)}"
        if by == "dev":
            what = f"till the first dev evaluation at {found['score']} {goal} at its end"
        else:
            what = f"in all, where its {quality} is at least {goal}; there are no dev scores to tell sooner"
        lines.append(f"time to {_target(view)}: seconds of training {what} ({by}).")
    kinds = {tuple(kind) for row in rows for kind in row["environments"]}
    if len(kinds) == 1:
        lines.append(f"Made on {_made(next(iter(kinds)))}.")
    return lines


_CSV = (
    "board size row title axes local reference quality quality_low quality_high seeds seconds seconds_low "
    "seconds_high relative relative_low relative_high peak_bytes tokens_sampled gain gain_low gain_high "
    "per_cost per_cost_low per_cost_high front front_share reach_seconds reach_by reach_target baseline "
    "target left_out"
).split()


def _csv(view: View) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV, restval="", lineterminator="\n")
    writer.writeheader()
    for row in view["rows"]:
        line = {key: row[key] for key in ("title", "local", "reference")} | {"row": row["name"]}
        line |= {key: view[key] for key in ("board", "size", "target")} | {
            "baseline": view["baseline"]["name"]
        }
        line["axes"] = " ".join(f"{key}={value}" for key, value in row["axes"].items())
        for name in ("quality", "seconds", "relative", "gain", "per_cost"):
            if row.get(name) is not None:
                low, high = row[name]["interval"] or ("", "")
                line |= {name: row[name]["value"], f"{name}_low": low, f"{name}_high": high}
        for name in ("peak_bytes", "tokens_sampled", "front", "front_share", "left_out"):
            line[name] = "" if row.get(name) is None else row[name]
        if row["quality"] is not None:
            line["seeds"] = len(row["quality"]["seeds"])
        if row.get("reach") is not None:
            line |= {f"reach_{key}": row["reach"][key] for key in ("seconds", "by", "target")}
        writer.writerow({key: "" if value is None else value for key, value in line.items()})
    return out.getvalue()
