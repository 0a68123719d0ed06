"""Records and evidence that the tests of what reads them share; no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdbench.evidence import COLUMNS, Manifest, write_evidence
from kdbench.record import Analysis, Named, Phase, RunFolder, RunRecord, Score, save


def make_record(**changes: Any) -> RunRecord:
    """A complete record of a finished run, without scores."""
    values: dict[str, Any] = {
        "run_id": "abc123",
        "board": "toy/v1",
        "size": "full",
        "row": "kd",
        "distiller": Named("kd", "1"),
        "task": Named("toy", "1"),
        "models": {"student": Named("tiny", "s"), "teacher": Named("small", "t")},
        "seed": 1,
        "config": {"title": "KD", "reference": False},
        "environment": {"commit": "c0ffee", "dirty": False, "torch": "2", "python": "3", "threads": 1},
        "budget": {"optimizer_steps": 40, "prompts": 640, "tokens_seen": 1000, "tokens_sampled": 0},
        "phases": {
            "update": Phase(8.0, None, None, 2 * 10**9),
            "evaluate": Phase(5.0, None, None, 3 * 10**9),
        },
    }
    return RunRecord(**{**values, **changes})


def add_scores(
    folder: RunFolder, values: Mapping[str, np.ndarray[Any, Any]], analysis: str = "quality"
) -> None:
    """Adds a score per entry: the mean of per-prompt values [P]; the prompts are 0..P-1, or `prompt`."""
    count = len(next(iter(values.values())))
    arrays = {"prompt": np.arange(count), **values}
    scores = {
        name: Score(float(value.mean()), "", count, "higher", "mean", {"values": name, "prompt": "prompt"})
        for name, value in values.items()
        if name != "prompt"
    }
    folder.add(analysis, 1, Analysis(scores, arrays))


def make_run(
    folder: Path, values: Mapping[str, np.ndarray[Any, Any]] | None = None, **changes: Any
) -> RunFolder:
    """A run folder with a record, and scores of the analysis `quality` where `values` are given."""
    save(make_record(**changes), folder / "record.json")
    run = RunFolder(folder)
    if values is not None:
        add_scores(run, values)
    return run


def response_rows(
    roll_in: str,
    example_id: int,
    draw: int,
    divergence: list[float],
    finished: bool,
    token: list[int] | None = None,
    **columns: list[float],
) -> list[dict[str, Any]]:
    """Rows of one response with `divergence` as `forward_kl`, the extra row of a cut one included."""
    count = len(divergence) - (0 if finished else 1)
    rows = []
    for t, value in enumerate(divergence):
        row: dict[str, Any] = dict.fromkeys(COLUMNS, 0)
        row |= {"roll_in": roll_in, "example_id": example_id, "draw": draw, "position": t, "alive": t < count}
        row |= {"token": (token[t] if token else t + 2) if t < count else -1, "context": False}
        row |= {"forward_kl": value, "student_log_prob": -1.0, "teacher_log_prob": -1.0}
        rows.append(row | {name: column[t] for name, column in columns.items()})
    return rows


def make_manifest(**changes: Any) -> Manifest:
    """A manifest of the plain profile."""
    decoding = {"max_new_tokens": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "no_repeat_ngram": 0}
    values: dict[str, Any] = {
        "profile": "plain",
        "prompts_sha256": "p",
        "decoding": decoding,
        "models": {"student": "s", "teacher": "t"},
        "dtype": "float32",
        "seed": 0,
    }
    return Manifest(**{**values, **changes})


def write_rows(path: Path, rows: list[dict[str, Any]], **changes: Any) -> None:
    """Writes rows of `response_rows` as evidence."""
    write_evidence(
        path, {name: [row[name] for row in rows] for name in ["roll_in", *COLUMNS]}, make_manifest(**changes)
    )
