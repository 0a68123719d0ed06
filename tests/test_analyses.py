"""The analyses of outputs and cost: instruction following, memory and time."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_kit import make_record, make_run
from rouge_score.rouge_scorer import RougeScorer

from analyses import instruction_following, memory_time
from analyses.instruction_following import clean, common_subsequence, exact_match, rouge_l, score_rows
from kdbench.errors import UserError
from kdbench.estimators import ESTIMATORS
from kdbench.record import Phase, RecordError, RunFolder, Score, save

WORDS = (
    "running ran runs Café naïve the a of an happily generalization relational dogs dog's 3.5 12,000 x-ray "
    "ties dying İstanbul ß ... — don't U.S.A. \n \t <n> agreed hopping sky 日本"
).split(" ")


def random_text(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(longest + 1)))


# ------------------------------------------------------------------------------------- instruction following
def test_rouge_l_equals_rouge_score() -> None:
    rng, scorer = random.Random(0), RougeScorer(["rougeL"], use_stemmer=True)
    for _ in range(300):
        reference, response = random_text(rng, 30), random_text(rng, 90)
        assert rouge_l(response, reference) == scorer.score(reference, response)["rougeL"].fmeasure


def test_the_corpus_score_is_the_mean_of_the_best_reference() -> None:
    rng, scorer = random.Random(1), RougeScorer(["rougeL"], use_stemmer=True)
    rows, expected = [], []
    for _ in range(40):
        references = [random_text(rng, 12) for _ in range(rng.randrange(1, 4))]
        rows.append(
            {"response": random_text(rng, 12) + "<|endoftext|>" + references[0], "references": references}
        )
        text = clean(str(rows[-1]["response"]))
        expected.append(max(scorer.score(one, text)["rougeL"].fmeasure for one in references))
    assert score_rows(rows) == pytest.approx(100 * float(np.mean(expected)), rel=1e-12)
    assert set(instruction_following.dev_scores(rows)) == {"rouge_l", "exact_match"}


def test_common_subsequence_equals_the_table() -> None:
    rng = random.Random(2)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(70))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert common_subsequence(a, b) == table[-1][-1]


def test_cleaning_and_exact_match_by_hand() -> None:
    assert clean(" a<n>b <|endoftext|> c <|endoftext|>") == "a\nb"
    assert exact_match("The  Cat, sat.", "the cat\nsat") == 1
    assert exact_match("the cat", "cat") == 0  # articles are kept
    assert exact_match("", ".") == 1
    assert rouge_l("", "x") == rouge_l("x", "") == rouge_l("日本", "日本") == 0
    assert rouge_l("the cats sat", "a cat sat there") == pytest.approx(
        2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    )
    rows = [{"response": "Yes.", "references": ["no", "yes"]}, {"response": "yes", "references": ["no"]}]
    assert score_rows(rows, "exact_match") == 50


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"response": "a"}],
        [{"response": "a", "references": []}],
        [{"response": None, "references": ["a"]}],
    ],
)
def test_rows_that_cannot_be_scored_are_refused(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(RecordError):
        score_rows(rows)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'rouge_l'"):
        score_rows([{"response": "a", "references": ["a"]}], "rouge_1")


def write_outputs(run: RunFolder, name: str, rows: list[dict[str, Any]]) -> None:
    (run.path / "outputs").mkdir(exist_ok=True)
    (run.path / "outputs" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def output(example: int, seed: int, response: str, reference: str, **more: Any) -> dict[str, Any]:
    row = {"example_id": example, "set": "s", "seed": seed, "prompt": "p", "response": response}
    return {**row, "references": [reference], "tokens": len(response.split()) + 1, "finished": True, **more}


def test_scores_per_set_and_over_sets(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    one = [
        output(7, 10, "a b", "a b"),
        output(7, 20, "x", "a b"),
        output(3, 20, "c", "c"),
        output(3, 10, "c", "c"),
    ]
    write_outputs(run, "b-set", one)
    write_outputs(run, "a-set", [output(1, 10, "x y z", "q", finished=False), output(1, 20, "q", "q")])
    record = run.add("instruction_following", 1, instruction_following.analyze(run))

    def value(name: str) -> float | None:
        return record.value(f"instruction_following/{name}")

    assert value("rouge_l/b-set") == 75
    assert value("rouge_l/a-set") == 50
    assert value("rouge_l") == 62.5
    assert value("exact_match") == 62.5
    assert value("length/a-set") == 3
    assert value("finished/a-set") == 50
    assert value("finished/b-set") == 100
    assert record.scores["instruction_following/rouge_l"].n == 3
    assert record.scores["instruction_following/rouge_l/b-set"].n == 2
    arrays = run.arrays()
    np.testing.assert_array_equal(arrays["instruction_following/prompt"], [1, 3, 7])
    np.testing.assert_array_equal(arrays["instruction_following/stratum"], [0, 1, 1])
    np.testing.assert_array_equal(arrays["instruction_following/rouge_l"], [50, 100, 50])
    assert_scores_follow_from_arrays(run)


def test_sets_scored_by_exact_match_stay_out_of_the_mean_rouge_l(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_outputs(run, "dolly", [output(1, 10, "a b", "a b")])
    write_outputs(run, "unni-short", [output(1, 10, "a", "b", scored_by="exact_match")])
    record = run.add("instruction_following", 1, instruction_following.analyze(run))
    assert record.value("instruction_following/rouge_l") == 100
    assert record.value("instruction_following/exact_match") == 50
    assert record.value("instruction_following/rouge_l/unni-short") == 0
    assert record.analyses["instruction_following"]["detail"]["scored_by_exact_match"] == ["unni-short"]
    assert_scores_follow_from_arrays(run)


def assert_scores_follow_from_arrays(run: RunFolder) -> None:
    """Every score with an estimator is that estimator of the stored arrays."""
    arrays = run.arrays()
    for name, score in run.record.scores.items():
        if score.estimator is not None and score.value is not None:
            inputs = {argument: arrays[key] for argument, key in score.arrays.items()}
            ones = np.ones((1, len(inputs["prompt"])))
            assert ESTIMATORS[score.estimator](inputs, ones, **score.args)[0] == score.value, name


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [output(1, 10, "a", "a"), output(1, 20, "a", "a"), output(2, 20, "a", "a")],
            "example 2 has 0 responses",
        ),
        ([output(1, 10, "a", "a"), output(1, 10, "a", "a")], "example 1 has 2 responses"),
        ([output(1, 10, "a", "a"), {"example_id": 2}], "line 2: 'seed' is missing"),
        ([output(1, 10, "a", "a", tokens="3")], "'tokens' is missing or of the wrong type"),
        ([], "is empty"),
    ],
)
def test_uneven_outputs_are_named(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    run = make_run(tmp_path)
    write_outputs(run, "dolly", rows)
    with pytest.raises(RecordError) as caught:
        instruction_following.analyze(run)
    assert said in str(caught.value)
    assert "dolly.jsonl" in str(caught.value)


def test_missing_outputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no outputs to score"):
        instruction_following.analyze(make_run(tmp_path))


def test_7500_responses_score_in_seconds() -> None:
    rng = random.Random(3)
    words = [f"word{i}ing" for i in range(2000)]
    rows = [
        {"response": " ".join(rng.choices(words, k=100)), "references": [" ".join(rng.choices(words, k=60))]}
        for _ in range(7500)
    ]
    start = time.process_time()
    score_rows(rows)
    assert time.process_time() - start < 8  # about 1.2 on a quiet core


# -------------------------------------------------------------------------------------------- memory and time
def test_memory_and_time_by_hand(tmp_path: Path) -> None:
    phases = {
        "rollout": Phase(4.0, 10, 30, 200),
        "update": Phase(6.0, 20, 25, 300),
        "evaluate": Phase(50.0, 90, 90, 900),
    }
    budget = {"tokens_seen": 500, "tokens_sampled": 100, "optimizer_steps": 40, "prompts": 80}
    record = make_record(phases=phases, budget=budget)
    save(record, tmp_path / "record.json")
    scores = {name: score.value for name, score in memory_time.analyze(RunFolder(tmp_path)).scores.items()}
    assert scores == {
        "rollout_seconds": 4,
        "update_seconds": 6,
        "evaluate_seconds": 50,
        "train_seconds": 10,
        "seconds_per_update": 0.25,
        "train_tokens_per_s": 50,
        "sampled_tokens_per_s": 25,
        "prompts_per_s": 8,
        "peak_allocated_bytes": 20,
        "peak_reserved_bytes": 30,
        "peak_rss_bytes": 300,
        "peak_bytes": 20,
    }


def test_on_a_cpu_the_peak_is_the_resident_set(tmp_path: Path) -> None:
    scores = memory_time.analyze(make_run(tmp_path)).scores
    assert scores["peak_bytes"] == Score(2 * 10**9, "bytes", 1, "lower")
    assert "peak_allocated_bytes" not in scores
    assert "sampled_tokens_per_s" not in scores


def test_analyses_never_import_torch() -> None:
    code = (
        "import sys\n"
        "from analyses import exposure_bias, instruction_following, memory_time\n"
        "import kdbench.record, kdbench.evidence, kdbench.estimators, kdbench.board\n"
        "from rouge_score import rouge_scorer\n"
        "loaded = {'torch', 'transformers', 'seaborn'} & set(sys.modules)\n"
        "sys.exit(f'imported: {loaded}' if loaded else 0)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
