"""What a profile found, as tables or JSON, beside what a paper says that its methods cost. No torch."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdbench.config import library_versions
from kdbench.paths import configs_dir
from kdbench.strict import read_toml

FORMATS = ("table", "json")
PARTS = ("sample", "divergence", "backward", "optimizer", "other")  # beside the roles


@dataclass
class Measured:
    """What a method's step costs; amounts are per update of the student, seconds unless said otherwise.

    `seconds`: of each timed step. `phases`: of sampling, of each role's forward passes, of divergences (with
    the output heads), backward passes, optimizers and the rest; they sum up to `detailed_seconds`. `flops`:
    operations by the same phases. `limit_seconds`: what the machine needs at least. `prepare_seconds`: what
    comes once before training, here for `prepare_rows` rows. `error`: why there is nothing.
    """

    row: str
    title: str = ""
    method: str = ""
    device: str = ""
    precision: str = ""
    threads: int = 0
    batch: int = 0
    micro_batch: int = 0
    rows: str = ""
    prompt_tokens: float = 0.0
    response_tokens: float = 0.0
    models: dict[str, int] = field(default_factory=dict)
    updates_per_step: float = 0.0
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    detailed_seconds: float = 0.0
    trained_tokens: float = 0.0
    sampled_tokens: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    decode_bytes: float = 0.0
    limit_seconds: float | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_rss_growth_bytes: int | None = None
    prepare_seconds: float = 0.0
    prepare_rows: int = 0
    board_steps: int = 0
    error: str = ""

    @property
    def median(self) -> float | None:
        """The median seconds of an update."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def hours(self) -> float | None:
        """Hours of the board's training at that pace."""
        return None if self.median is None else self.median * self.board_steps / 3600

    @property
    def share(self) -> float | None:
        """The share of the hardware's limit that is reached."""
        return None if self.limit_seconds is None or not self.median else self.limit_seconds / self.median

    @property
    def peak(self) -> int | None:
        """Allocated bytes on a GPU, else how far the resident set grew."""
        return self.peak_rss_growth_bytes if self.peak_allocated_bytes is None else self.peak_allocated_bytes

    @property
    def trained_per_s(self) -> float | None:
        """Target tokens of updates per second."""
        return self.trained_tokens / self.median if self.median else None

    @property
    def sampled_per_s(self) -> float | None:
        """Sampled tokens per second of sampling, None where nothing is sampled."""
        spent = self.phases.get("sample", 0.0)
        return self.sampled_tokens / spent if self.sampled_tokens and spent else None


@dataclass(frozen=True)
class Machine:
    """What the machine can do: operations of matrix products by precision, and copied bytes, per second.

    `matmul`: how torch computes float32 products (`training.matmul`).
    """

    device: str
    threads: int
    matmul: str
    flops_per_s: dict[str, float]
    bytes_per_s: float


# ---- what a paper says
@dataclass(frozen=True)
class Published:
    """What a paper says that rows cost: hours and peak gigabytes by row, to be read relative to one."""

    title: str
    url: str
    said: str
    relative_to: str
    rows: dict[str, dict[str, float]]

    def ratio(self, row: str, key: str) -> float | None:
        """How many times the base row's figure a row has; None where it is not in the table."""
        if row not in self.rows or self.relative_to not in self.rows:
            return None
        return self.rows[row][key] / self.rows[self.relative_to][key]


def published(rows: Sequence[str]) -> Published | None:
    """The paper's table of costs that names most of these rows or methods; None where none names one."""
    found: list[tuple[int, Published]] = []
    for path in sorted((configs_dir() / "papers").glob("*.toml")):
        told = read_toml(path)
        for name, setting in told.items():
            table = told.get(name.removesuffix("_setting"), [])
            if name.endswith("_setting") and isinstance(setting, Mapping) and "relative_to" in setting:
                by_row = {str(one["row"]): {k: v for k, v in one.items() if k != "row"} for one in table}
                paper = told["paper"]
                one = Published(paper["title"], paper["url"], setting["said"], setting["relative_to"], by_row)
                found.append((sum(row in by_row for row in rows), one))
    most = max(found, key=lambda pair: pair[0], default=None)
    return most[1] if most is not None and most[0] else None


def _name_in(paper: Published, one: Measured) -> str:
    """The row of the paper's table that a measured row is: the one of its name, or of its method."""
    return one.row if one.row in paper.rows else one.method


# ---- tables
def render(board: str, size: str, machine: Machine, found: Sequence[Measured], format: str) -> str:
    """Return what was measured as text: two tables and notes, or JSON."""
    paper = published([name for one in found for name in (one.row, one.method)])
    if format == "json":
        told: str = json.dumps(as_json(board, size, machine, found, paper), indent=1)
        return told + "\n"
    times, costs = _times(found), _costs(found, paper)
    return "\n".join(
        [f"{board}, size {size}: a student's update, in seconds", *_aligned(times), "", *_aligned(costs), "",
         *_notes(machine, found, paper), ""]
    )  # fmt: skip


def as_json(
    board: str, size: str, machine: Machine, found: Sequence[Measured], paper: Published | None
) -> dict[str, Any]:
    """What `render` prints, and all single numbers."""
    base = _base(found, paper)
    methods = []
    for one in found:
        derived = {
            "median_seconds": one.median,
            "hours": one.hours,
            "trained_tokens_per_s": one.trained_per_s,
            "sampled_tokens_per_s": one.sampled_per_s,
            "share_of_limit": one.share,
        }
        ratios: dict[str, float | None] = {}
        if paper is not None:
            name = _name_in(paper, one)
            ratios = {
                "hours_ratio": _over(one.hours, base.hours if base else None),
                "paper_hours_ratio": paper.ratio(name, "hours"),
                "peak_ratio": _over(one.peak, base.peak if base else None),
                "paper_allocated_ratio": paper.ratio(name, "allocated_gb"),
            }
        methods.append({**dataclasses.asdict(one), **derived, **ratios})
    return {
        "board": board,
        "size": size,
        "machine": dataclasses.asdict(machine),
        "torch": library_versions()["torch"],
        "methods": methods,
        "paper": None if paper is None else dataclasses.asdict(paper),
    }


def _base(found: Sequence[Measured], paper: Published | None) -> Measured | None:
    """The measured row that others are told relative to."""
    if paper is None:
        return None
    return next((one for one in found if _name_in(paper, one) == paper.relative_to and one.seconds), None)


def _over(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _times(found: Sequence[Measured]) -> list[list[str]]:
    """Median and spread of the timed steps, then the phases of the detailed ones."""
    parts = list(dict.fromkeys(part for one in found for part in one.phases))
    parts = ["sample", *(part for part in parts if part not in PARTS), *PARTS[1:]] if parts else []
    table = [["", "median", "least", "most", *parts, "sum"]]
    for one in found:
        if one.seconds:
            shown = [one.median, min(one.seconds), max(one.seconds)]
            shown += [one.phases.get(part) or None for part in parts]
            table.append([one.row, *map(_seconds, shown), _seconds(one.detailed_seconds)])
        else:
            table.append([one.row, *["–"] * (len(parts) + 4)])
    return table


def _costs(found: Sequence[Measured], paper: Published | None) -> list[list[str]]:
    """Tokens, share of the limit, memory, and ratios beside the paper's."""
    base = _base(found, paper)
    head = ["", "trained tokens/s", "sampled tokens/s", "of the limit", "peak MB", "reserved MB", "hours"]
    if paper is not None:
        head += [f"hours / {paper.relative_to}", "paper", f"peak / {paper.relative_to}", "paper"]
    table = [head]
    for one in found:
        line = [
            one.row,
            _number(one.trained_per_s),
            _number(one.sampled_per_s),
            "–" if one.share is None else f"{100 * one.share:.0f} %",
            _number(_over(one.peak, 1e6)),
            _number(_over(one.peak_reserved_bytes, 1e6)),
            "–" if one.hours is None else f"{one.hours:.3g}",
        ]
        if paper is not None:
            name = _name_in(paper, one)
            hours, peak = (base.hours, base.peak) if base else (None, None)
            line += [_ratio(_over(one.hours, hours)), _ratio(paper.ratio(name, "hours"))]
            line += [_ratio(_over(one.peak, peak)), _ratio(paper.ratio(name, "allocated_gb"))]
        table.append(line)
    return table


def _notes(machine: Machine, found: Sequence[Measured], paper: Published | None) -> list[str]:
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in machine.flops_per_s.items())
    notes = [
        f"machine: {machine.device}, {machine.threads} threads; matrix products {rates}"
        f" (float32 as in matmul = {machine.matmul}); copies {machine.bytes_per_s / 1e9:,.0f} GB/s"
    ]
    for one in found:
        if one.error:
            notes.append(f"{one.row}: {one.error}")
            continue
        sizes = ", ".join(f"{role} {count / 1e6:,.2f} M" for role, count in one.models.items())
        lengths = " + ".join(f"{n:.0f}" for n in (one.prompt_tokens, one.response_tokens) if n)
        told = (
            f"{one.row}: batch {one.batch}, micro-batch {one.micro_batch}, {one.precision}; rows {one.rows}, "
        )
        told += f"of {lengths} tokens in the mean; {sizes} parameters"
        if one.updates_per_step != 1:
            told += f"; {one.updates_per_step:g} updates a step"
        if one.prepare_rows:
            told += f"; prepares once, {one.prepare_seconds:.2f} s for {one.prepare_rows} rows"
        notes.append(told)
    if any(one.peak_rss_growth_bytes is not None for one in found):
        notes.append("peak: growth of the resident set, models included")
    if paper is not None:
        notes.append(f"paper: {paper.title}, {paper.said}, {paper.url}")
    return notes


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
