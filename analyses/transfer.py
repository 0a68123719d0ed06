"""Scores of prompt transfer: each data set's printed metric, and the others of its format, from output rows.

Source: metrics of PANDA (Zhong et al. 2022), https://arxiv.org/abs/2208.10160, and its public code: accuracy,
Matthews' correlation for CoLA, the mean of Pearson's and Spearman's correlation for STS-B, micro-F1 of
entities (seqeval's default mode), F1 over answers for MultiRC; token F1 and exact match of SQuAD v1.1
(Rajpurkar et al. 2016), https://arxiv.org/abs/1606.05250, also for ReCoRD.
Differs: all scores are x 100; a correlation is 0, not undefined, where predictions are constant.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdbench.errors import unknown
from kdbench.estimators import ESTIMATORS, Array
from kdbench.record import Analysis, RecordError, RunFolder, Score

VERSION = 1
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_KEYS: dict[str, dict[str, type]] = {
    "classes": {"label": int, "prediction": int, "probabilities": list},
    "choice": {"label": int, "prediction": int, "probabilities": list},
    "number": {"label": float, "prediction": float},
    "tokens": {"label": list, "prediction": list},
    "span": {"prediction": str, "references": list},
}
_MEANS = {"accuracy": "%", "exact_match": "%", "token_f1": "x 100"}
Measures = dict[str, tuple[str, dict[str, str]]]  # by score: the estimator, and its inputs' names


# ------------------------------------------------------------------------------------------------ measures
def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The spans of a BIO tagging as (type, first word, word after the last).

    An `I-` tag that continues no span of its type begins one, as in seqeval's default mode.
    """
    found: set[tuple[str, int, int]] = set()
    kind, start = "", -1
    for at, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if start >= 0 and not (mark == "I" and name == kind):
            found.add((kind, start, at))
            start = -1
        if mark in ("B", "I") and start < 0:
            kind, start = name, at
    return found


def words(text: str) -> list[str]:
    """The words of an answer in lower case, without punctuation and articles, as SQuAD compares them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(answer: str, reference: str) -> float:
    """F1 x 100 of the words that two answers share; 100 for two answers without words."""
    given, right = words(answer), words(reference)
    if not given or not right:
        return 100.0 * (given == right)
    return 200.0 * (Counter(given) & Counter(right)).total() / (len(given) + len(right))


def _answers(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Array]:
    """`token_f1` and `exact_match` [P], each the best over an answer's references, x 100."""
    pairs = list(zip(texts, references, strict=True))
    return {
        "token_f1": np.array([max(token_f1(text, one) for one in right) for text, right in pairs]),
        "exact_match": np.array(
            [100.0 * any(words(text) == words(one) for one in right) for text, right in pairs]
        ),
    }


def _likeliest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The row of each group whose candidate is most probably right: the first of equals, by group."""
    best: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        have = best.get(row["group"])
        if have is None or row["probabilities"][1] > have["probabilities"][1]:
            best[row["group"]] = row
    return [best[group] for group in sorted(best)]


def _measured(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Array], Measures]:
    """The arrays [P] of rows of one format, and the scores that follow from them."""
    kind = rows[0]["format"]
    arrays: dict[str, Array] = {"prompt": np.array([row["example_id"] for row in rows], dtype=np.int64)}
    if kind == "number":
        arrays |= {
            name: np.array([row[key] for row in rows], dtype=np.float64)
            for name, key in (("x", "label"), ("y", "prediction"))
        }
        both = {"x": "x", "y": "y"}
        return arrays, {name: (name, both) for name in ("pearson_spearman", "pearson", "spearman")}
    if kind == "tokens":
        spans = [(entities(row["label"]), entities(row["prediction"])) for row in rows]
        arrays["hits"] = np.array([len(true & found) for true, found in spans])
        arrays["predicted"] = np.array([len(found) for _, found in spans])
        arrays["actual"] = np.array([len(true) for true, _ in spans])
        return arrays, {"entity_f1": ("f1", {name: name for name in ("hits", "predicted", "actual")})}
    if kind == "span" or "candidate" in rows[0]:
        if kind != "span":
            rows = _likeliest(rows)
            arrays["prompt"] = np.array([row["group"] for row in rows], dtype=np.int64)
        key = "prediction" if kind == "span" else "candidate"
        arrays |= _answers([row[key] for row in rows], [row["references"] for row in rows])
        return arrays, {name: ("mean", {"values": name}) for name in ("token_f1", "exact_match")}
    label, prediction = (np.array([row[key] for row in rows]) for key in ("label", "prediction"))
    arrays |= {"label": label, "prediction": prediction}
    arrays["accuracy"] = np.where(label == prediction, 100.0, 0.0)
    both = {"label": "label", "prediction": "prediction"}
    measures: Measures = {"accuracy": ("mean", {"values": "accuracy"})}
    if kind == "classes":
        measures["f1"] = ("macro_f1", both)
        measures["matthews"] = ("matthews", both)
        if len(rows[0]["probabilities"]) == 2:  # F1 of the second class
            arrays |= {"hits": label * prediction, "predicted": prediction, "actual": label}
            measures["f1"] = ("f1", {name: name for name in ("hits", "predicted", "actual")})
    return arrays, measures


def _value(arrays: Mapping[str, Array], measure: tuple[str, dict[str, str]]) -> float:
    name, inputs = measure
    given = {argument: arrays[key] for argument, key in inputs.items()}
    return float(ESTIMATORS[name](given, np.ones((1, len(arrays["prompt"]))))[0])


def _check_all(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises: RecordError naming the first line that cannot be scored."""
    if not rows:
        raise RecordError(f"{where}: is empty.")
    for number, row in enumerate(rows, 1):
        place = f"{where}, line {number}"
        for key in ("format", "metric"):
            if row.get(key) != rows[0].get(key):
                raise RecordError(f"{place}: {key} is '{row.get(key)}', in line 1 '{rows[0].get(key)}'.")
        if row.get("format") not in _KEYS:
            raise RecordError(f"{place}: {unknown('format', str(row.get('format')), _KEYS)}")
        for key, kind in {"example_id": int, **_KEYS[row["format"]]}.items():
            if not isinstance(row.get(key), kind):
                raise RecordError(f"{place}: '{key}' is missing or of the wrong type.")
        _check(row, rows[0], place)


def _check(row: Mapping[str, Any], first: Mapping[str, Any], where: str) -> None:
    kind = row["format"]
    if kind in ("classes", "choice"):
        classes = len(row["probabilities"])
        if classes != len(first["probabilities"]) or classes < 2:
            raise RecordError(f"{where}: has probabilities of {classes} classes.")
        for key in ("label", "prediction"):
            if not 0 <= row[key] < classes:
                raise RecordError(f"{where}: {key} {row[key]} is none of the classes 0..{classes - 1}.")
        if ("candidate" in row) != ("candidate" in first) or ("candidate" in row and "group" not in row):
            raise RecordError(f"{where}: 'candidate' and 'group' should be in all rows or in none.")
    if kind == "number" and not np.isfinite([row["label"], row["prediction"]]).all():
        raise RecordError(f"{where}: 'label' and 'prediction' should be finite.")
    if kind == "tokens" and len(row["label"]) != len(row["prediction"]):
        raise RecordError(f"{where}: has {len(row['prediction'])} tags for {len(row['label'])} words.")
    if (kind == "span" or "candidate" in row) and not row.get("references"):
        raise RecordError(f"{where}: has no reference.")


def _printed(rows: Sequence[Mapping[str, Any]], measures: Measures, where: str) -> str:
    """The name of the printed metric. Raises: RecordError where the format has none of this name."""
    metric = str(rows[0]["metric"])
    if metric not in measures:
        raise RecordError(f"{where}: {unknown('metric', metric, measures)}")
    return metric


# -------------------------------------------------------------------------------------------------- scores
def dev_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`score`, the printed metric, and the others of the format, all x 100: to select checkpoints by.

    Raises: RecordError where there are no rows or one cannot be scored.
    """
    where = "the rows to score"
    _check_all(rows, where)
    arrays, measures = _measured(rows)
    values = {name: _value(arrays, measure) for name, measure in measures.items()}
    return {"score": values[_printed(rows, measures, where)], **values}


def analyze(run: RunFolder) -> Analysis:
    """`score`, the printed metric of the data set (also as `score/<set>`), and all metrics of its format.

    classes: `accuracy` (%), `f1` (x 100; of the second of two classes, the mean over more), `matthews`
    (x 100); choice: `accuracy`; number: `pearson_spearman`, `pearson`, `spearman` (x 100); tokens:
    `entity_f1` (x 100); span, and classes with candidates: `token_f1` (x 100), `exact_match` (%). Arrays [P]
    over examples, over groups where rows are candidates. The detail holds set, format and metric.

    Raises: RecordError where outputs are missing, of several sets or seeds, or cannot be scored.
    """
    names = run.output_sets()
    if len(names) != 1:
        raise RecordError(f"{run.path / 'outputs'}: should hold one set, holds {', '.join(names) or 'none'}.")
    where = str(run.path / "outputs" / f"{names[0]}.jsonl")
    rows = run.outputs(names[0])
    _check_all(rows, where)
    rows.sort(key=lambda row: int(row["example_id"]))
    examples = np.array([row["example_id"] for row in rows])
    if (twice := examples[1:][np.diff(examples) == 0]).size:
        raise RecordError(f"{where}: example {twice[0]} is there twice; one generation seed is enough.")
    arrays, measures = _measured(rows)
    metric = _printed(rows, measures, where)
    scores = {}
    for name, measure in measures.items():
        inputs = {**measure[1], "prompt": "prompt"}
        unit, count = _MEANS.get(name, "x 100"), len(arrays["prompt"])
        scores[name] = Score(_value(arrays, measure), unit, count, "higher", measure[0], inputs)
    scores = {"score": scores[metric], f"score/{names[0]}": scores[metric], **scores}
    return Analysis(scores, arrays, {"set": names[0], "format": rows[0]["format"], "metric": metric})
