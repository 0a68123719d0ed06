"""The page of the transferability analysis: how metrics rank sources, and what following them gains."""

from collections.abc import Iterable, Sequence

import numpy as np

from analyses._transferability_ranks import MIN_SOURCES, Correlation, Judged
from analyses._transferability_rows import Pairs, over_seeds
from kdbench.estimators import Array
from kdbench.intervals import MIN_SEEDS, Estimate

_MEANINGS = {
    "chosen": "what weighs the board's distillation, by its own settings",
    "semantic": "cosine of the tasks' mean sentence representations, each on its own texts",
    "semantic_probe": "the same on one common set of texts: free of what texts and formats look like",
    "semantic_centred": "`semantic` after the mean over all tasks was taken off",
    "semantic_probe_centred": "`semantic_probe` after the mean over all tasks was taken off",
    "e_avg": "cosine of the prompts' mean tokens",
    "e_concat": "cosine of the flattened prompts",
    "e_pairwise": "mean cosine over all pairs of prompt tokens",
    "on": "overlap of activated feed-forward units",
}
DASH = "–"
_TAKEN = "The source that each metric takes"
_RANKED = (
    "Spearman's correlation over the sources of each target (last columns), and its mean over targets; "
    "pooled: over all pairs at once; all of means over training seeds. Within a seed: the mean over seeds of "
    "what each says alone. p: the share of orders of the sources that rank as far from 0. A target is left "
    f"out where predictions or gains are constant or fewer than {MIN_SOURCES} sources are there."
)
_CHOSEN = (
    "A self-transfer is no choice. A metric chooses within each training seed; names are in order of how "
    "often they are taken. Regret is the oracle's gain less this one. The oracle takes the source with the "
    "highest mean gain, so it sees the scores that it is judged by; the dev score of each PoT needs a "
    "training on the target per source."
)


def number(one: Estimate | float | None, digits: int = 2) -> str:
    """`value [low, high]`, '–' where there is none."""
    if one is None or (isinstance(one, float) and not np.isfinite(one)):
        return DASH
    if isinstance(one, float):
        return f"{one:.{digits}f}"
    if one.value is None:
        return DASH
    ends = "" if one.low is None or one.high is None else f" [{one.low:.{digits}f}, {one.high:.{digits}f}]"
    return f"{one.value:.{digits}f}{ends}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rules = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rules, *lines)]


def write(judged: Judged) -> str:
    """The page with the numbers of every figure, as Markdown."""
    pairs = judged.pairs
    lines = [f"# Which source helps: {pairs.board}", "", *_head(pairs)]
    if judged.nothing:
        lines += ["", f"Nothing to judge: {judged.nothing}"]
    if pairs.notes:
        lines += ["", *(f"- {note}" for note in pairs.notes)]
    parts: list[tuple[str, list[str]]] = []
    if not judged.nothing:
        for gain in pairs.gains:
            parts.append((f"How well metrics rank sources: {gain}", _correlations(judged, gain)))
        parts[0][1][:0] = [_RANKED, ""]
        parts += [("The metrics", [f"- `{name}`: {_MEANINGS[name]}" for name in pairs.predictions])]
    for gain, found in judged.choices.items():
        if found:
            first = [] if any(title.startswith(_TAKEN) for title, _ in parts) else [_CHOSEN, ""]
            parts.append((f"{_TAKEN}: {gain} (points)", [*first, *_choices(judged, gain)]))
    if judged.relations:
        parts.append(("Means by relation", _relations(judged)))
    for name, values in pairs.predictions.items():
        parts.append((f"Prediction: {name}", _matrix(pairs, values, 2)))
    for name, values in pairs.gains.items():
        if np.isfinite(values).any():
            parts.append((f"Gain (points): {name}", _matrix(pairs, values, 1)))
    for title, found_lines in parts:
        lines += ["", f"## {title}", "", *found_lines]
    return "\n".join(lines) + "\n"


def _head(pairs: Pairs) -> list[str]:
    seeds, steps = ", ".join(map(str, pairs.seeds)), " or ".join(map(str, pairs.first_steps))
    found = [
        f"{len(pairs.sources)} sources, {len(pairs.targets)} targets, training seeds {seeds}. A gain is a "
        "score less that of prompt tuning alone on the target with the same training seed, in points."
    ]
    if steps:
        found.append(f"The first evaluation is that of dev after {steps} student updates.")
    found.append(
        "Brackets hold 95 % intervals: of correlations by resampling sources, on these targets; of means "
        "over targets or pairs"
    )
    if len(pairs.seeds) < MIN_SEEDS:
        found[-1] += "; how much another training seed would move them is not known."
    else:
        found[-1] += "; and over training seeds."
    return [" ".join(found)]


# ----------------------------------------------------------------------------------------------- correlations
def _correlations(judged: Judged, gain: str) -> list[str]:
    """A line per metric, and one more with self-transfers where the board has some."""
    lines = []
    for (what, metric, selves), one in judged.correlations.items():
        if what == gain and (not selves or one.pairs != judged.correlations[what, metric, False].pairs):
            lines.append(_line(one, judged.pairs.board_metric))
    head = ["metric", "self-transfers", "Spearman by target", "pooled", "within a seed", "p", "pairs"]
    return _table([*head, "targets left out", *judged.pairs.targets], lines)


def _line(one: Correlation, board_metric: str) -> list[str]:
    name = f"**{one.metric}** (the board's)" if one.metric == board_metric else one.metric
    return [
        name,
        "with" if one.selves else "without",
        number(one.mean),
        number(one.pooled),
        number(one.within_seed),
        DASH if one.p is None else f"{one.p:.3f}",
        str(one.pairs),
        one.skipped,
        *(number(float(value)) for value in one.each),
    ]


# -------------------------------------------------------------------------------------------------- selection
def _choices(judged: Judged, gain: str) -> list[str]:
    pairs, found = judged.pairs, judged.choices[gain]
    lines = []
    for one in found:
        cells = [
            DASH if not np.isfinite(value) else f"{value:+.1f}{_names(names)}"
            for names, value in zip(one.picked, one.by_target, strict=True)
        ]
        lines.append([one.name, number(one.gain), number(one.regret), *cells])
    scores = [number(float(value), 1) for value in over_seeds(pairs.baseline)]
    lines.append(["score of PT", DASH, DASH, *scores])
    return [
        *_table(["chosen by", "mean gain", "regret", *pairs.targets], lines),
    ]


def _names(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


# -------------------------------------------------------------------------------------------------- relations
def _relations(judged: Judged) -> list[str]:
    predictions, gains = list(judged.pairs.predictions), list(judged.pairs.gains)
    lines = [
        [
            one.kind,
            str(one.pairs),
            *(number(one.gains[name], 1) for name in gains),
            *(number(one.predictions[name]) for name in predictions),
        ]
        for one in judged.relations
    ]
    return [
        *_table(["relation", "pairs", *gains, *predictions], lines),
        "",
        "Intervals take the pairs of a relation as independent, though pairs share sources and targets.",
    ]


def _matrix(pairs: Pairs, values: Array, digits: int) -> list[str]:
    """Means over training seeds; sources down, targets across."""
    means = over_seeds(values)
    lines = [
        [source, *(number(float(value), digits) for value in row)]
        for source, row in zip(pairs.sources, means, strict=True)
    ]
    return _table(["source, target", *pairs.targets], lines)
