"""Lines and page of the speed benchmark: what is to be reached, and what was."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

VOCABULARIES = (8192, 50257)
MEGABYTE = 1e6
BLANK = "–"
TRL_MISSING = "TRL is not installed"


@dataclass(frozen=True)
class Row:
    """A line of the table: which sides of which group it compares, and what is to be reached, by vocabulary.

    `sides` are kdbench's and the peer's; `grown` names kdbench's and the peer's in `step.memory`.
    """

    title: str
    group: str
    sides: tuple[str, str] = ("", "")
    most: Mapping[int, float] = field(default_factory=dict)  # of the ratio
    grown: tuple[str, ...] = ()
    most_grown: Mapping[int, float] = field(default_factory=dict)  # of the ratio of growths


def _both(small: float, large: float) -> dict[int, float]:
    return dict(zip(VOCABULARIES, (small, large), strict=True))


GKD, DISTILLATION, PLAIN = "TRL GKDTrainer", "TRL DistillationTrainer", "plain loop"
ROWS: dict[str, Row] = {
    "plain": Row(
        "on-policy reverse-KL update / plain loop with `generate`",
        "on_policy",
        ("kdbench", PLAIN),
        _both(0.62, 0.38),
        ("kdbench", PLAIN),
    ),
    "distillation": Row(
        "on-policy reverse-KL update / TRL DistillationTrainer, prompts of equal length",
        "trl",
        ("kdbench", DISTILLATION),
        _both(0.60, 0.45),
        ("kdbench", DISTILLATION),
        {50257: 0.5},
    ),
    "gkd": Row(
        "on-policy reverse-KL update / TRL GKDTrainer, lmbda 1, prompts of equal length",
        "trl",
        ("kdbench", GKD),
        _both(0.60, 0.28),
        ("kdbench", GKD),
        {50257: 0.25},
    ),
    "supervised": Row(
        "supervised reverse-KL update / TRL GKDTrainer, lmbda 0, prompts of equal length",
        "supervised",
        ("kdbench", GKD),
        _both(0.75, 0.30),
    ),
    "promptkd": Row(
        "PromptKD update / plain implementation of the same work",
        "promptkd",
        ("kdbench", "plain PromptKD"),
        _both(0.52, 0.24),
        ("kdbench PromptKD", "plain PromptKD"),
        {50257: 0.25},
    ),
    "sampling": Row(
        "sampling / `generate`, equal response lengths",
        "sampling",
        ("kdbench", "generate"),
        _both(0.45, 0.45),
    ),
    "mixed": Row(
        "sampling / `generate`, mixed lengths, mean a third of the maximum, a batch of 8",
        "mixed",
        ("kdbench", "generate"),
        _both(0.25, 0.25),
    ),
    "divergence": Row(
        "reverse KL and its gradient, 512 rows: memory beyond inputs and gradients",
        "divergence",
        most=_both(32, 64),
        grown=("divergence",),
    ),
    "floor": Row(
        "on-policy reverse-KL update / floor of its matrix products through oneDNN",
        "on_policy",
        ("kdbench", "floor"),
        _both(3.0, 3.5),
    ),
    "overhead": Row(
        "harness overhead over the bare functions",
        "overhead",
        ("kdbench", "bare functions"),
        _both(1.03, 1.03),
    ),
    # without a limit
    "floor_onednn": Row(
        "the same with the update through oneDNN too", "on_policy", ("kdbench through oneDNN", "floor")
    ),
    "distillation_ragged": Row(
        "on-policy reverse-KL update / TRL DistillationTrainer, ragged prompts",
        "trl_ragged",
        ("kdbench", DISTILLATION),
    ),
    "set": Row(
        "sampling / `generate`, mixed lengths, 64 prompts: one call against batches of 8",
        "set",
        ("kdbench", "generate"),
    ),
}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    return {"median": middle, "min": min(values), "q1": low, "q3": high, "rounds": len(values)}


def figure(key: str, vocab: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return one line of the table from what was measured at one vocabulary."""
    row = ROWS[key]
    line: dict[str, Any] = {"row": key, "title": row.title, "vocab": vocab, "peer": row.sides[1]}
    group = found["groups"].get(row.group, {})
    grown = {kind: found["memory"].get(kind, "not measured") for kind in row.grown}
    problems = [group.get("failed", {}).get(side) for side in row.sides]
    problems += [value for value in grown.values() if isinstance(value, str)]
    problems += [
        f"not the same {check['what']}"
        for check in group.get("checks", [])
        if check["must"] and not check["same"] and check["peer"] == row.sides[1]
    ]
    line["problems"] = list(dict.fromkeys(problem for problem in problems if problem))
    verdicts = []
    if key == "divergence":
        if not line["problems"]:
            line["megabytes"] = grown["divergence"] / MEGABYTE
            verdicts.append((line["megabytes"], row.most.get(vocab)))
    elif row.sides[0] in group.get("times", {}):
        mine = group["times"][row.sides[0]]
        theirs = group["times"].get(row.sides[1])
        if row.sides[1] == "floor":
            gigaflop = sum(found["floor"]["padded"].values())
            theirs = [gigaflop / found["floor"]["best"]] * len(mine)
        line["kdbench_seconds"] = spread(mine)
        if theirs:
            line["peer_seconds"] = spread(theirs)
            line["ratio"] = spread([a / b for a, b in zip(mine, theirs, strict=True)])
            verdicts.append((line["ratio"]["median"], row.most.get(vocab)))
    if len(grown) == 2 and not any(isinstance(value, str) for value in grown.values()):
        mine, theirs = grown.values()
        line["growth_bytes"] = [mine, theirs]
        line["growth_ratio"] = mine / max(theirs, 1)
        verdicts.append((line["growth_ratio"], row.most_grown.get(vocab)))
    judged = [value <= limit for value, limit in verdicts if limit is not None]
    line["limit"], line["growth_limit"] = row.most.get(vocab), row.most_grown.get(vocab)
    line["reached"] = bool(all(judged) and not line["problems"]) if judged else None
    return line


def _cells(line: Mapping[str, Any], quick: bool = False) -> list[str]:
    """Return a line's cells; those of memory and floor are left blank in a quick run."""

    def seconds(name: str) -> str:
        return f"{1e3 * line[name]['median']:.0f} ms" if name in line else ""

    limit, percent = line["limit"], line["row"] == "overhead"
    ratio, bound = "", "" if limit is None else f"{limit:.2f}"
    if "megabytes" in line:
        ratio, bound = f"{line['megabytes']:.1f} MB", "" if limit is None else f"{limit:.0f} MB"
    elif "ratio" in line:
        middle, low, high = (line["ratio"][name] for name in ("median", "q1", "q3"))
        ratio = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
        if percent:
            ratio = f"{100 * (middle - 1):+.1f} % [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}]"
    if percent and limit is not None:
        bound = f"{100 * (limit - 1):.0f} %"
    grown = ""
    if "growth_ratio" in line:
        mine, theirs = (value / MEGABYTE for value in line["growth_bytes"])
        grown = f"{line['growth_ratio']:.2f} ({mine:.0f} / {theirs:.0f} MB)"
    peer = seconds("peer_seconds")
    if quick:
        grown = BLANK if grown else grown
        if "megabytes" in line or (line["peer"] == "floor" and ratio):
            ratio, peer = BLANK, BLANK if peer else ""
    reached = {True: "yes", False: "no", None: ""}[line["reached"]]
    if line["problems"]:
        reached = "; ".join([reached] * bool(reached and "ratio" in line) + line["problems"])
    return [
        line["title"],
        f"{line['vocab']:,}",
        seconds("kdbench_seconds"),
        peer,
        ratio,
        bound,
        grown,
        "" if line["growth_limit"] is None else f"{line['growth_limit']:.2f}",
        reached,
    ]


def table(results: Mapping[str, Any]) -> str:
    """Return the page of these results, in Markdown."""
    told, quick = results["environment"], bool(results.get("quick"))
    heads = "figure; vocabulary; kdbench; peer; ratio [quartiles]; limit; memory growth; limit; reached"
    rows = [heads.split("; "), *(_cells(line, quick) for line in results["rows"])]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    trl = f"TRL {told['trl']}" if told["trl"] else TRL_MISSING
    first = next(iter(results["vocabularies"].values()))["setting"]
    sizes = {role: first[role] for role in ("teacher", "student")}
    shapes = ", ".join(f"{role} {n} x {width} ({heads} heads)" for role, (n, width, heads) in sizes.items())
    under = {
        "own": "each side under the thresholds of glibc's allocator that it has where it runs alone",
        "kdbench": "all sides under the thresholds of glibc's allocator that kdbench sets",
    }[told.get("allocator", "kdbench")]
    about = [
        f"GPT-2 shapes with random weights: {shapes}; batch {first['batch']}, prompts of {first['shortest']} "
        f"to {first['prompt']} tokens (all {first['prompt']} where lengths are equal), {first['new']} new "
        f"tokens, float32, dropout 0, {told['threads']} thread{'s' * (told['threads'] > 1)}, matrix products "
        f"at `{told['matmul_precision']}`.",
        f"{told['cpu']}, {told['cores']} cores. torch {told['torch']}, transformers {told['transformers']}, "
        f"{trl}, Python {told['python']}; kdbench {told['kdbench']} at {told['commit'][:12]}"
        + (" with changes" if told["dirty"] else "")
        + f"; {results['rounds']} round{'s' * (results['rounds'] > 1)}.",
        "Times are medians; a ratio is the median over rounds of kdbench / peer, one after the other in one "
        f"process, {under}. Memory growth is that of the resident set over one update on prompts of full "
        "length. TRL's trainers pass no position ids, so they are compared on prompts of equal length.",
    ]
    made = "Made by `python benchmarks/step.py`; every round is in [results.json](results.json)."
    toy = "quick run of toy sizes: its numbers mean nothing"
    head = [f"# Speed, {toy}", ""] if quick else ["# Speed, v1", "", made, ""]
    return "\n".join(head + [f"- {line}" for line in about] + ["", *lines, "", *_remarks(results)])


def _remarks(results: Mapping[str, Any]) -> list[str]:
    lines = ["## The same work", ""]
    for vocab, found in results["vocabularies"].items():
        for name, group in found["groups"].items():
            for check in group["checks"]:
                lines.append(f"- {int(vocab):,}, {name}, {check['peer']}, {check['what']}: {_said(check)}")
    lines += ["", "## Lengths and floors", ""]
    for vocab, found in results["vocabularies"].items():
        for name, group in found["groups"].items():
            for side, lengths in group["notes"].get("lengths", {}).items():
                lines.append(
                    f"- {int(vocab):,}, {name}, {side}: {lengths['responses']} responses, of "
                    f"{lengths['mean']:.1f} tokens on average and {lengths['longest']} at most"
                )
        if "floor" in found and not results.get("quick"):
            floor = found["floor"]
            padded, real = sum(floor["padded"].values()), sum(floor["real"].values())
            lines.append(
                f"- {int(vocab):,}, floor: {padded:.1f} GFLOP where every row is padded to the longest "
                f"({real:.1f} for real tokens only) at {floor['best']:.0f} GFLOP/s: "
                f"{1e3 * padded / floor['best']:.0f} ms ({1e3 * real / floor['best']:.0f} ms)"
            )
            if "head" in floor:
                rates = [f"{rate:.0f} GFLOP/s by {name}" for name, rate in floor["head"].items()]
                lines.append(f"- {int(vocab):,}, 128 rows times the teacher's head: {', '.join(rates)}")
    return [*lines, "", *_phases(results)]


def _phases(results: Mapping[str, Any]) -> list[str]:
    """Where the time of kdbench's updates goes, a line a phase."""
    if results.get("quick"):
        return []
    rows = ["| vocabulary | update | phase | ms | GFLOP of products | GFLOP/s |", "|---|---|---|---|---|---|"]
    for vocab, found in results["vocabularies"].items():
        for name, group in found["groups"].items():
            told = group["notes"].get("phases", {})
            for phase, cost in sorted(told.items(), key=lambda item: -item[1]["seconds"]):
                seconds, gflop = cost["seconds"], cost["gflop"]
                rate = f"{gflop / seconds:.0f}" if gflop and seconds else ""
                shown = f"{gflop:.1f}" if gflop else ""
                rows.append(f"| {int(vocab):,} | {name} | {phase} | {1e3 * seconds:.0f} | {shown} | {rate} |")
    if len(rows) == 2:
        return []
    about = (
        "Updates of kdbench by the trainer's clock, the mean of three, with the operations that torch "
        "executed. `teacher` and `student` are without the output heads, which are multiplied in "
        "`divergence`, together with the gradients of hidden states and head; `backward` is the rest of the "
        "backward pass."
    )
    return ["## Where the time goes", "", about, "", *rows, ""]


def _said(check: Mapping[str, Any]) -> str:
    if "equal_share" in check:
        return f"{100 * check['equal_share']:.1f} % equal"
    said = f"{check['kdbench']:.6f} and {check['theirs']:.6f}, relative difference {check['difference']:.1e}"
    if "gradient_difference" in check:
        said += f", of the gradient {check['gradient_difference']:.1e}"
    return said + ("" if check["same"] else "; not the same")
