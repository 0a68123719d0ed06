"""Accuracy of few-shot classification on each test set, and what stands behind it: collapse, F1, calibration.

Source: accuracy on the original test split, mean over five few-shot draws, as in Table 1 of Prompt-Distiller
and in LM-BFF (Gao et al. 2021, https://arxiv.org/abs/2012.15723); expected calibration error of Guo et al.
2017, https://arxiv.org/abs/1706.04599, eq. 3, with its 15 bins.
Differs: a student that has learned nothing predicts one class and has that class' share as its accuracy, so
the share of the most predicted class is a score of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analyses._few_shot_rows import VERSION, rows
from kdbench.estimators import ESTIMATORS, Array
from kdbench.record import Analysis, RecordError, RunFolder, Score, atomic

__all__ = ["VERSION", "analyze", "dev_scores", "figures"]
BINS = 15
_LEAST = float(np.finfo(np.float32).tiny)  # a probability below it is 0 in float32 and counts as this
_ROUNDING = 1e-4
_KEYS: dict[str, type] = {"label": int, "prediction": int, "probabilities": list}
_TEST_KEYS: dict[str, type] = {"example_id": int, "seed": int, "references": list, "response": str, **_KEYS}


# ------------------------------------------------------------------------------------------------ output rows
@dataclass(frozen=True)
class _Answers:
    """The rows of one set: `label`, `prediction` [P] int64 in 0..N-1, `probabilities` [P, N] float64."""

    label: Array
    prediction: Array
    probabilities: Array

    @property
    def right(self) -> Array:
        """[P]: 100.0 where the prediction is the label, else 0.0."""
        return np.where(self.prediction == self.label, 100.0, 0.0)

    @property
    def nll(self) -> Array:
        """[P]: -log of the label's probability, in nats."""
        chosen = self.probabilities[np.arange(len(self.label)), self.label]
        return np.asarray(-np.log(np.maximum(chosen, _LEAST)))

    @property
    def confusion(self) -> Array:
        """[N, N] int64: how many examples with a label (row) have a prediction (column)."""
        classes = self.probabilities.shape[1]
        pairs = classes * self.label + self.prediction
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _answers(rows: Sequence[Mapping[str, Any]]) -> _Answers:
    label, prediction, probabilities = (np.array([row[key] for row in rows]) for key in _KEYS)
    return _Answers(label, prediction, probabilities.astype(np.float64))


def _check_all(rows: Sequence[Mapping[str, Any]], where: str, keys: Mapping[str, type]) -> None:
    """Raises: RecordError naming the first line that cannot be scored."""
    if not rows:
        raise RecordError(f"{where}: is empty.")
    for number, row in enumerate(rows, 1):
        for key, kind in keys.items():
            if not isinstance(row.get(key), kind):
                raise RecordError(f"{where}, line {number}: '{key}' is missing or of the wrong type.")
        _check(row, len(rows[0]["probabilities"]), f"{where}, line {number}")


def _check(row: Mapping[str, Any], classes: int, where: str) -> None:
    found = row["probabilities"]
    if len(found) < 2 or not all(isinstance(x, int | float) and 0 <= x <= 1 + _ROUNDING for x in found):
        raise RecordError(f"{where}: 'probabilities' should be two numbers or more, each in 0..1.")
    if len(found) != classes:
        raise RecordError(f"{where}: has probabilities of {len(found)} classes, line 1 of {classes}.")
    if abs(sum(found) - 1) > 10 * _ROUNDING:
        raise RecordError(f"{where}: 'probabilities' add up to {sum(found):.4g}, not to 1.")
    for key in ("label", "prediction"):
        if not 0 <= row[key] < classes:
            raise RecordError(f"{where}: {key} {row[key]} is none of the classes 0..{classes - 1}.")
    if found[row["prediction"]] < max(found) - _ROUNDING:
        raise RecordError(f"{where}: class {row['prediction']} is predicted, but another one is likelier.")


def dev_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`accuracy` in % and `nll`, the mean -log probability of the label in nats: to select checkpoints by.

    Raises: RecordError where there are no rows or one cannot be scored.
    """
    _check_all(rows, "the rows to score", _KEYS)
    found = _answers(rows)
    return {"accuracy": float(found.right.mean()), "nll": float(found.nll.mean())}


# ------------------------------------------------------------------------------------------------- the scores
def macro_f1(confusion: Array) -> float:
    """The mean F1 x 100 of the classes that are the label or the prediction of some example."""
    hits, total = np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(100 * np.mean(2 * hits[total > 0] / total[total > 0]))


def expected_calibration_error(probabilities: Array, right: Array) -> float:
    """100 x the mean over examples of |accuracy - confidence| of their bin, in percentage points.

    Confidence is the highest probability of a row of `probabilities` [P, N]; bin i of 15 is
    (i / 15, (i + 1) / 15]. `right` [P] is true where the prediction is the label.
    """
    confidence = probabilities.max(axis=1)
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=right.astype(np.float64) - confidence, minlength=BINS)
    return float(100 * np.abs(gaps).sum() / len(confidence))


def analyze(run: RunFolder) -> Analysis:
    """Scores of each test set, and `accuracy`, the mean over the sets.

    `accuracy/<set>` and `majority_share/<set>`, the share of the most predicted class (%);
    `macro_f1/<set>` (x 100); `expected_calibration_error/<set>` (percentage points); `nll/<set>`, the mean
    -log probability of the label (nats). Macro-F1 and calibration error have no intervals, as both are no
    means over examples. Arrays [P] over the examples of all sets: `accuracy`, `majority` (100 where the most
    predicted class of all is predicted), `nll`, `prompt` (the example), `stratum` (the index of the set).
    The detail holds, per set, the names of the `classes` and the counts `confusion[label][prediction]`.

    Raises: RecordError where outputs are missing, of several seeds, or cannot be scored.
    """
    names = run.output_sets()
    if not names:
        raise RecordError(f"{run.path / 'outputs'}: there are no outputs to score.")
    parts: dict[str, list[Array]] = {key: [] for key in ("accuracy", "majority", "nll", "prompt", "stratum")}
    whole: dict[str, Score] = {}
    detail: dict[str, Any] = {"sets": names, "classes": {}, "confusion": {}}
    seeds: set[int] = set()
    for index, name in enumerate(names):
        where = str(run.path / "outputs" / f"{name}.jsonl")
        rows = run.outputs(name)
        _check_all(rows, where, _TEST_KEYS)
        rows.sort(key=lambda row: row["example_id"])
        found = _answers(rows)
        seeds |= {row["seed"] for row in rows}
        if len(seeds) > 1:
            raise RecordError(
                f"{where}: has rows of the seeds {', '.join(map(str, sorted(seeds)))}; a prediction has no "
                "randomness, so evaluation.generation_seeds should be one number."
            )
        examples = np.array([row["example_id"] for row in rows], dtype=np.int64)
        if (twice := examples[1:][np.diff(examples) == 0]).size:
            raise RecordError(f"{where}: example {twice[0]} is there twice.")
        confusion = found.confusion
        parts["accuracy"].append(found.right)
        parts["majority"].append(100.0 * (found.prediction == confusion.sum(axis=0).argmax()))
        parts["nll"].append(found.nll)
        parts["prompt"].append(examples)
        parts["stratum"].append(np.full(len(rows), index))
        error = expected_calibration_error(found.probabilities, found.right > 0)
        whole[f"macro_f1/{name}"] = Score(macro_f1(confusion), "x 100", len(rows), "higher")
        whole[f"expected_calibration_error/{name}"] = Score(error, "points", len(rows), "lower")
        detail["classes"][name] = _class_names(rows, len(confusion))
        detail["confusion"][name] = confusion.tolist()
    arrays = {key: np.concatenate(values) for key, values in parts.items()}
    scores = {"accuracy": _score(arrays, "accuracy", "%", "higher")}
    for index, name in enumerate(names):
        scores[f"accuracy/{name}"] = _score(arrays, "accuracy", "%", "higher", index)
        scores[f"majority_share/{name}"] = _score(arrays, "majority", "%", "none", index)
        scores[f"nll/{name}"] = _score(arrays, "nll", "nats", "lower", index)
    return Analysis(scores | whole, arrays, detail)


def _class_names(rows: Sequence[Mapping[str, Any]], classes: int) -> list[str]:
    """What rows call each class: the reference where it is the label, else the response, else its number."""
    names = {row["prediction"]: row["response"] for row in rows}
    names |= {row["label"]: str(row["references"][0]) for row in rows if row["references"]}
    return [names.get(at, str(at)) for at in range(classes)]


def _score(
    arrays: Mapping[str, Array], measure: str, unit: str, direction: str, stratum: int | None = None
) -> Score:
    names = {"values": measure, "prompt": "prompt", "stratum": "stratum"}
    inputs = {argument: arrays[name] for argument, name in names.items()}
    args = {} if stratum is None else {"stratum": stratum}
    count = len(inputs["values"]) if stratum is None else int((inputs["stratum"] == stratum).sum())
    estimator = "stratified_mean" if stratum is None else "stratum_mean"
    value = float(ESTIMATORS[estimator](inputs, np.ones((1, len(inputs["values"]))), **args)[0])
    return Score(value, unit, count, direction, estimator, names, args)


# ------------------------------------------------------------------------------------------ figures and pages
def figures(runs: RunFolder | Sequence[RunFolder], out: Path) -> list[Path]:
    """Draw PNG and SVG files into `out`, write `few_shot.md` and `case_study.md`; return all paths.

    See `analyses._few_shot_figures` for the figures; the page holds their numbers. Runs of one row are
    averaged over few-shot draws.

    Raises: RecordError where a run has no scores of this version, or where draws were tested on different
    examples.
    """
    from analyses._few_shot_figures import draw
    from analyses._few_shot_page import case_study, write

    found = rows(runs)
    paths = draw(found, out)
    for name, text in (("few_shot", write(found)), ("case_study", case_study(found))):
        if text:
            paths.append(out / f"{name}.md")
            with atomic(paths[-1]) as file:
                file.write(text.encode())
    return paths
