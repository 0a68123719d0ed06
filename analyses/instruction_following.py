"""ROUGE-L and exact match of the responses to each test set, and how long they are.

Source: MiniLLM (Gu et al. 2024, https://arxiv.org/abs/2306.08543), sec. 3.1, and its code's
`rouge_metric.py`: rouge-score's stemmed ROUGE-L F-measure, the best over the references, mean over examples,
x 100; five generation seeds, the mean over seeds of the corpus score.
Differs: nothing is rounded; predictions and references of different number are an error, not cut.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
from rouge_score import tokenize, tokenizers

from kdbench.errors import unknown
from kdbench.estimators import ESTIMATORS
from kdbench.record import Analysis, RecordError, RunFolder, Score

VERSION = 1
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_KEYS = {"example_id": int, "seed": int, "response": str, "references": list, "tokens": int, "finished": bool}


class _CachedStemmer:
    """nltk's Porter stemmer with a memory, for rouge-score's own tokenizer."""

    def __init__(self) -> None:
        self.stem = cache(tokenizers.porter.PorterStemmer().stem)


_STEMMER = _CachedStemmer()


@lru_cache(maxsize=1 << 16)
def _tokens(text: str) -> tuple[str, ...]:
    return tuple(tokenize.tokenize(text, _STEMMER))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, with one machine word operation per 64 tokens of `a`.

    Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    where: dict[str, int] = {}
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        matches = row & where.get(token, 0)
        row = (row + matches | row - matches) & full
    return len(a) - row.bit_count()


def rouge_l(response: str, reference: str) -> float:
    """rouge-score's rougeL F-measure with stemming, in [0, 1]; 0 where either text has no token."""
    a, b = _tokens(reference), _tokens(response)
    common = common_subsequence(a, b) if a and b else 0
    if common == 0:
        return 0.0
    precision, recall = common / len(b), common / len(a)
    return 2 * precision * recall / (precision + recall)


def exact_match(response: str, reference: str) -> float:
    """1.0 where both are equal in lower case, without ASCII punctuation and with single spaces; else 0.0."""
    return float(_plain(response) == _plain(reference))


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def clean(response: str) -> str:
    """A generated text as it is scored: cut at a literal `<|endoftext|>`, `<n>` as newline, stripped."""
    return response.split("<|endoftext|>", 1)[0].replace("<n>", "\n").strip()


METRICS: dict[str, Callable[[str, str], float]] = {"rouge_l": rouge_l, "exact_match": exact_match}


def _score(rows: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """Each row's score x 100, the best over its references; equal rows are scored once."""
    function, known = METRICS[metric], dict[tuple[str, tuple[str, ...]], float]()
    scores = []
    for row in rows:
        key = (row["response"], tuple(row["references"]))
        if key not in known:
            text = clean(key[0])
            known[key] = 100 * max(function(text, reference) for reference in key[1])
        scores.append(known[key])
    return scores


def score_rows(rows: Sequence[Mapping[str, Any]], metric: str = "rouge_l") -> float:
    """The mean score x 100 of output rows (`response`, `references`), for selection on the dev split.

    Raises: UserError for an unknown metric, RecordError where there are no rows or a row has no references.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if not rows:
        raise RecordError("there are no responses to score.")
    _check(rows, "the rows to score", {"response": str, "references": list})
    return float(np.mean(_score(rows, metric)))


def dev_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`score_rows` for every metric, by name: what a board may select checkpoints by."""
    return {metric: score_rows(rows, metric) for metric in METRICS}


def _check(rows: Sequence[Mapping[str, Any]], where: str, keys: Mapping[str, type]) -> None:
    for number, row in enumerate(rows, 1):
        for key, kind in keys.items():
            if not isinstance(row.get(key), kind):
                raise RecordError(f"{where}, line {number}: '{key}' is missing or of the wrong type.")
        references = row["references"]
        if not references or not all(isinstance(text, str) for text in references):
            raise RecordError(f"{where}, line {number}: 'references' should be a list of at least one text.")


def _per_prompt(rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, np.ndarray[Any, Any]]:
    """Per prompt, in order of example_id, the mean over generation seeds of every measure; arrays [P].

    Raises: RecordError unless every generation seed answers the same prompts once each.
    """
    _check(rows, where, _KEYS)
    examples, at = np.unique([row["example_id"] for row in rows], return_inverse=True)
    seeds, draw = np.unique([row["seed"] for row in rows], return_inverse=True)
    answered = np.zeros((len(examples), len(seeds)), dtype=np.int64)
    np.add.at(answered, (at, draw), 1)
    if (answered != 1).any():
        example, seed = (int(i[0]) for i in np.nonzero(answered != 1))
        raise RecordError(
            f"{where}: example {examples[example]} has {answered[example, seed]} responses with generation "
            f"seed {seeds[seed]}; every prompt needs one per seed."
        )
    columns = {metric: _score(rows, metric) for metric in METRICS}
    columns["length"] = [row["tokens"] for row in rows]
    columns["finished"] = [100.0 * row["finished"] for row in rows]
    out = {"prompt": examples.astype(np.int64)}
    for name, values in columns.items():
        table = np.zeros((len(examples), len(seeds)))
        table[at, draw] = values
        out[name] = table.mean(axis=1)
    return out


_UNITS = {
    "rouge_l": ("x 100", "higher"),
    "exact_match": ("x 100", "higher"),
    "length": ("tokens", "none"),
    "finished": ("%", "none"),
}


def analyze(run: RunFolder) -> Analysis:
    """Scores `<measure>/<set>` and `<measure>`, the mean over sets.

    Measures are `rouge_l`, `exact_match`, `length` and `finished`; the mean ROUGE-L leaves out sets that are
    scored by exact match (short answers). Arrays [P] over the prompts of all sets: each measure's mean over
    generation seeds, `prompt`, `stratum` (the index of the set).

    Raises: RecordError where outputs are missing or uneven.
    """
    names = run.output_sets()
    if not names:
        raise RecordError(f"{run.path / 'outputs'}: there are no outputs to score.")
    sets, seeds, short = [], set(), []
    for name in names:
        where, rows = str(run.path / "outputs" / f"{name}.jsonl"), run.outputs(name)
        if not rows:
            raise RecordError(f"{where}: is empty.")
        sets.append(_per_prompt(rows, where))
        seeds |= {row["seed"] for row in rows}
        if any(row.get("scored_by") == "exact_match" for row in rows):
            short.append(name)
    arrays = {key: np.concatenate([one[key] for one in sets]) for key in sets[0]}
    arrays["stratum"] = np.repeat(np.arange(len(sets)), [len(one["prompt"]) for one in sets])
    long = np.isin(arrays["stratum"], [i for i, name in enumerate(names) if name not in short])
    if short and long.any():
        for key in ("rouge_l", "prompt", "stratum"):
            arrays[f"{key}.long"] = arrays[key][long]
    scores = {}
    for measure, (unit, direction) in _UNITS.items():
        only = ".long" if measure == "rouge_l" and f"{measure}.long" in arrays else ""
        scores[measure] = _make(arrays, measure, unit, direction, "stratified_mean", {}, only)
        for index, name in enumerate(names):
            args = {"stratum": index}
            scores[f"{measure}/{name}"] = _make(arrays, measure, unit, direction, "stratum_mean", args)
    detail = {"sets": names, "scored_by_exact_match": short, "generation_seeds": sorted(seeds)}
    return Analysis(scores, arrays, detail)


def _make(
    arrays: dict[str, np.ndarray[Any, Any]],
    measure: str,
    unit: str,
    direction: str,
    estimator: str,
    args: dict[str, Any],
    only: str = "",
) -> Score:
    names = {"values": measure + only, "prompt": f"prompt{only}", "stratum": f"stratum{only}"}
    inputs = {argument: arrays[name] for argument, name in names.items()}
    count = len(inputs["values"])
    if "stratum" in args:
        count = int((inputs["stratum"] == args["stratum"]).sum())
    value = float(ESTIMATORS[estimator](inputs, np.ones((1, len(inputs["values"]))), **args)[0])
    return Score(value, unit, count, direction, estimator, names, args)
