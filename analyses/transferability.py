"""Whether a metric tells which source helps a target: rank correlation, and what following it gains.

Source: PANDA (Zhong et al. 2024, https://arxiv.org/abs/2208.10160) judges its metric by Spearman's
correlation with the scores of transferred prompts after the first epoch; metrics are those of
`kdbench.transferability`.
Differs: how the paper averages is not known; here over sources within each target, then over targets, and
also over all pairs at once, with self-transfers and without; gains over prompt tuning alone take the place of
scores, which changes nothing within a target. The first evaluation of dev stands for the first epoch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analyses._transferability_rows import SCORE, VERSION, read
from kdbench.record import Analysis, RunFolder, Score, atomic

__all__ = ["VERSION", "analyze", "figures"]


def analyze(run: RunFolder) -> Analysis:
    """`first_dev`, the dev score at the first evaluation of a run that `transfer` scored, where there is one.

    It has the direction of the score that weights are selected by; `n` counts dev examples. The detail holds
    the student updates until then. What several runs say together is in figures and page.
    """
    record = run.record
    if record.value(SCORE) is None or not record.curve:
        return Analysis({})
    first = min(record.curve, key=lambda one: one.step)
    select: dict[str, Any] = record.config.get("select", {})
    best = record.scores.get(f"dev/{select.get('score')}")
    direction = str(select.get("direction", "higher"))
    score = Score(first.score, "", best.n if best else 0, direction)
    return Analysis({"first_dev": score}, detail={"step": first.step})


def figures(runs: RunFolder | Sequence[RunFolder], out: Path) -> list[Path]:
    """Draw PNG and SVG files into `out` and write `transferability.md` with their numbers; return all paths.

    Where there is nothing to judge the page says why, in one line, and there are no figures of it. See
    `analyses._transferability_rows` for which runs are read, `_transferability_ranks` for what is computed.

    Raises: RecordError where the runs are of several boards or sizes, or none of them transfers a prompt.
    """
    from analyses._transferability_figures import draw
    from analyses._transferability_page import write
    from analyses._transferability_ranks import judge

    found = judge(read(runs))
    paths = draw(found, out)
    paths.append(out / "transferability.md")
    with atomic(paths[-1]) as file:
        file.write(write(found).encode())
    return paths
