"""Estimators against hand-worked values, weights against repeated prompts, MiniLLM's against its script."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from record_kit import response_rows, write_rows

from kdbench import estimators as e
from kdbench.evidence import read_evidence

Array = NDArray[Any]
ONES = np.ones((1, 2))

# Two prompts, two draws each. Student roll-in: prompt 0 has responses of 3 and 1 tokens, prompt 1 of 2 and 2.
# Teacher roll-in: all have 2 tokens.
ARRAYS = {
    "student_sum": np.array([[3.0, 2.0, 5.0], [1.0, 4.0, 0.0]]),
    "student_count": np.array([[2, 1, 1], [2, 2, 0]]),
    "teacher_sum": np.array([[1.0, 1.0], [1.0, 3.0]]),
    "teacher_count": np.array([[2, 2], [2, 2]]),
    "prompt": np.array([0, 1]),
}


def call(name: str, arrays: dict[str, Array] = ARRAYS, weights: Array = ONES, **args: Any) -> Array:
    return e.ESTIMATORS[name](arrays, weights, **args)


def test_means_by_hand() -> None:
    arrays = {"values": np.array([1.0, 2.0, 6.0, 10.0]), "stratum": np.array([4, 4, 4, 9])}
    ones = np.ones((1, 4))
    assert call("mean", arrays, ones) == [4.75]
    assert call("stratified_mean", arrays, ones) == [(3 + 10) / 2]
    assert call("stratum_mean", arrays, ones, stratum=4) == [3]
    weights = np.array([[2.0, 0, 1, 1], [0, 0, 0, 4]])
    assert call("mean", arrays, weights).tolist() == [4.5, 10]
    np.testing.assert_array_equal(call("stratified_mean", arrays, weights), [(8 / 3 + 10) / 2, np.nan])
    np.testing.assert_array_equal(call("stratum_mean", arrays, weights, stratum=4), [8 / 3, np.nan])
    parts = {"numerator": np.array([1.0, 3.0]), "denominator": np.array([2.0, 0.0])}
    np.testing.assert_array_equal(call("ratio", parts, np.array([[1.0, 1.0], [0, 1]])), [2, np.nan])


def test_alive_variant_by_hand() -> None:
    # student: 4/4, 6/3, 5/1; teacher: 2/4, 4/4
    assert call("accumulated_error_nats", length=1) == [1]
    assert call("accumulated_error_nats", length=2) == [3]
    assert call("accumulated_error_nats", length=3) == [8]
    assert call("accumulated_error_nats", length=2, roll_in="teacher") == [1.5]
    assert call("ex_acc_err_alive", length=1) == [100]
    assert call("ex_acc_err_alive", length=2) == [100]
    assert call("excess_nats", length=2) == [1.5]
    assert np.isnan(call("ex_acc_err_alive", length=3))  # no teacher response is that long
    np.testing.assert_array_equal(e.accumulated_error_curve(ARRAYS, ONES, 4), [[1, 3, 8, np.nan]])
    np.testing.assert_array_equal(e.ex_acc_err_alive_curve(ARRAYS, ONES, 2), [[100, 100]])


def test_survival_and_length_by_hand() -> None:
    assert call("survival", length=1) == [1]
    assert call("survival", length=2) == [0.75]
    assert call("survival", length=3) == [0.25]
    assert call("survival", length=9) == [0]
    assert call("survival", length=2, roll_in="teacher") == [1]
    assert call("mean_length_tokens") == [2]
    assert call("mean_length_tokens", roll_in="teacher") == [2]
    # prompt 0 twice, prompt 1 never
    assert call("survival", weights=np.array([[2.0, 0.0]]), length=3) == [0.5]
    np.testing.assert_array_equal(e.survival_curve(ARRAYS, ONES, 4), [[1, 0.75, 0.25, 0]])


def test_minillm_variant_by_hand() -> None:
    values = np.array([[4.0, 8.0], [2.0, 9.0], [6.0, 9.0]])
    alive = np.array([[True, True], [True, False], [True, False]])
    steps, prompts = e.minillm_step_errors(values, alive, np.array([3, 3, 8]))
    np.testing.assert_array_equal(prompts, [3, 8])
    np.testing.assert_allclose(steps, [[6 / 2.001, 8 / 1.001], [6 / 1.001, 0]], rtol=1e-15)
    arrays = {"student_step": np.array([[2.0, 4.0], [4.0, 0.0]]), "teacher_step": np.array([[1.0], [3.0]])}
    assert call("minillm_error_nats", arrays, length=1) == [3]
    assert call("minillm_error_nats", arrays, length=2) == [5]
    assert call("minillm_error_nats", arrays, length=2, roll_in="teacher") == [2]  # ended ones add 0
    assert call("ex_acc_err_minillm", arrays, length=1) == [50]
    assert call("ex_acc_err_minillm", arrays, length=2) == [150]
    np.testing.assert_array_equal(e.ex_acc_err_minillm_curve(arrays, ONES, 3), [[50, 150, 150]])


def test_a_teacher_equal_to_the_student_has_no_exposure_bias() -> None:
    zero = {name: value * (not name.endswith(("sum", "step"))) for name, value in ARRAYS.items()}
    zero |= {"student_step": np.zeros((2, 2)), "teacher_step": np.zeros((2, 0))}
    weights = np.array([[1.0, 1.0], [2.0, 0.0]])
    for name in ("ex_acc_err_alive", "ex_acc_err_minillm"):
        assert call(name, zero, weights, length=2).tolist() == [0, 0]
    assert e.excess(np.array([1.0, 0.0]), np.array([0.0, 2.0])).tolist()[1] == -100
    assert np.isnan(e.excess(np.array([1.0]), np.array([0.0])))


def random_arrays(rng: np.random.Generator, prompts: int) -> dict[str, Array]:
    counts = {side: rng.integers(0, 4, (prompts, 6)) + 1 for side in ("student", "teacher")}
    arrays: dict[str, Array] = {f"{side}_count": count for side, count in counts.items()}
    arrays |= {f"{side}_sum": rng.random((prompts, 6)) * count for side, count in counts.items()}
    arrays |= {f"{side}_step": rng.random((prompts, 6)) for side in counts}
    strata = np.sort(rng.integers(0, 2, prompts))
    strata[:1], strata[-1:] = 0, 1
    return arrays | {
        "values": rng.random(prompts),
        "numerator": rng.random(prompts),
        "denominator": rng.random(prompts),
        "stratum": strata,
    }


ARGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "ratio": {},
    "stratified_mean": {},
    "stratum_mean": {"stratum": 0},
    "mean_length_tokens": {},
}


@pytest.mark.parametrize("name", sorted(e.ESTIMATORS))
def test_a_weight_is_a_number_of_copies_and_order_does_not_matter(name: str) -> None:
    rng = np.random.default_rng(0)
    arrays, args = random_arrays(rng, 8), ARGS.get(name, {"length": 5})
    times = rng.integers(0, 3, (3, 8))
    times[:, [0, -1]] += 1
    found = call(name, arrays, times.astype(float), **args)
    assert found.shape == (3,)
    assert found.dtype == np.float64
    order = rng.permutation(8)
    shuffled = call(name, {k: v[order] for k, v in arrays.items()}, times[:, order].astype(float), **args)
    np.testing.assert_allclose(shuffled, found, rtol=1e-12)
    for r in range(3):
        copies = {key: np.repeat(value, times[r], axis=0) for key, value in arrays.items()}
        again = call(name, copies, np.ones((1, times[r].sum())), **args)
        np.testing.assert_allclose(again, found[r], rtol=1e-12)
    np.testing.assert_allclose(call(name, arrays, times.astype(np.float32), **args), found, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(n for n in e.ESTIMATORS if n not in ARGS))
def test_padding_with_positions_nobody_reaches_changes_nothing(name: str) -> None:
    arrays = random_arrays(np.random.default_rng(1), 5)
    wide = {
        key: np.pad(value, ((0, 0), (0, 3))) if value.ndim == 2 else value for key, value in arrays.items()
    }
    ones = np.ones((1, 5))
    np.testing.assert_array_equal(call(name, wide, ones, length=6), call(name, arrays, ones, length=6))


# ------------------------------------------------------------------------------ MiniLLM's script, transcribed
EOS, VOCABULARY, WINDOW, NEW = 0, 7, 6, 5


def logits_after(model: int, prefix: tuple[int, ...]) -> Array:
    """A random language model whose logits depend on the whole prefix."""
    seed = [model, *prefix]
    return np.asarray(
        2 * np.random.default_rng(seed).normal(size=VOCABULARY) + (np.arange(VOCABULARY) == EOS)
    )


def log_softmax(x: Array) -> Array:
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def sampled(model: int, prompt: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
    response: tuple[int, ...] = ()
    while len(response) < NEW and EOS not in response:
        p = np.exp(log_softmax(logits_after(model, prompt + response)))
        response += (int(rng.choice(VOCABULARY, p=p / p.sum())),)
    return response


def script(prompts: list[tuple[int, ...]], responses: dict[int, list[tuple[int, ...]]]) -> dict[int, Array]:
    """Steps 2 to 5 of the script in its own layout; responses[g] has len(prompts) x S rows, S in a row."""
    accumulated = {}
    for writer, rows in responses.items():
        samples = len(rows) // len(prompts)
        total = np.zeros((len(prompts), NEW))
        for i in range(len(prompts)):
            ids = np.full((samples, WINDOW + NEW), EOS)
            for s in range(samples):
                prompt, response = prompts[i], rows[i * samples + s]
                ids[s, WINDOW - len(prompt) : WINDOW] = prompt
                ids[s, WINDOW : WINDOW + len(response)] = response
            mask = ids != EOS
            logits = np.full((2, *ids.shape, VOCABULARY), 1e3)  # padded places hold anything
            for s, at in zip(*np.nonzero(mask), strict=True):
                prefix = tuple(int(token) for token in ids[s, : at + 1][mask[s, : at + 1]])
                for model in (0, 1):
                    logits[model, s, at] = logits_after(model, prefix)
            log_q, log_p = log_softmax(logits[0]), log_softmax(logits[1])
            d = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)[:, WINDOW:]
            alive = mask[:, WINDOW:]
            total[i] = (alive * d).sum(axis=0) / (alive.sum(axis=0) + 1e-3)
        accumulated[writer] = np.cumsum(total, axis=1).mean(axis=0)
    return accumulated


def test_minillm_variant_equals_the_script_on_ragged_lengths_with_pad_equal_to_eos(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    prompts = [
        tuple(int(t) for t in rng.integers(1, VOCABULARY, rng.integers(1, WINDOW + 1))) for _ in range(6)
    ]
    responses = {g: [sampled(g, prompt, rng) for prompt in prompts for _ in range(3)] for g in (0, 1)}
    for rows in responses.values():
        lengths = {len(row) for row in rows}
        assert {1, NEW} <= lengths, "the case should have responses that end at once and that never end"
        assert any(EOS not in row for row in rows)
    evidence_rows = []
    for writer, name in ((0, "student"), (1, "teacher")):
        for k, response in enumerate(responses[writer]):
            prompt, finished = prompts[k // 3], EOS in response
            kl = []
            for t in range(len(response) + (not finished)):
                log_q, log_p = (log_softmax(logits_after(model, prompt + response[:t])) for model in (0, 1))
                kl.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
            # ids in an order of their own: the estimator pairs by example_id
            evidence_rows += response_rows(name, 100 - k // 3, k % 3, kl, finished, list(response))
    write_rows(tmp_path / "final.parquet", evidence_rows)
    evidence = read_evidence(tmp_path / "final.parquet")
    arrays = {
        f"{side}_step": e.minillm_step_errors(*evidence.after(side, "forward_kl"))[0]
        for side in ("student", "teacher")
    }
    truth = script(prompts, responses)
    ones = np.ones((1, len(prompts)))
    for side, writer in (("student", 0), ("teacher", 1)):
        found = e.minillm_error_curve(arrays, ones, NEW, side)[0]
        np.testing.assert_allclose(found, truth[writer], rtol=1e-6)
    for length in range(1, NEW + 1):
        expected = 100 * (truth[0] - truth[1])[length - 1] / truth[1][length - 1]
        found = e.ESTIMATORS["ex_acc_err_minillm"](arrays, ones, length=length)[0]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-5)
