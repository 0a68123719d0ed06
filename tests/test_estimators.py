"""Estimators against hand-worked values, weights against repeated prompts, MiniLLM's against its script."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from record_kit import response_rows, write_rows

from kdbench import estimators as e
from kdbench.evidence import read_evidence
from kdbench.per_prompt import arrays as per_prompt_arrays

Array = NDArray[Any]
ONES = np.ones((1, 2))
OWN = sorted(name for name, function in e.ESTIMATORS.items() if function.__module__ == e.__name__)

# Two prompts, two draws each. Student roll-in: prompt 0 has responses of 3 and 1 tokens, prompt 1 of 2 and 2.
# Teacher roll-in: all have 2 tokens.
ARRAYS = {
    "student_sum": np.array([[3.0, 2.0, 5.0], [1.0, 4.0, 0.0]]),
    "student_count": np.array([[2, 1, 1], [2, 2, 0]]),
    "teacher_sum": np.array([[1.0, 1.0], [1.0, 3.0]]),
    "teacher_count": np.array([[2, 2], [2, 2]]),
    "student_running": np.array([[3.0, 3.0, 8.0], [1.0, 5.0, 0.0]]),
    "student_context": np.array([10.0, 20.0]),
    "reference_running": np.array([[2.0, 3.0], [4.0, 0.0]]),
    "reference_count": np.array([[1, 1], [1, 0]]),
    "reference_context": np.array([10.0, 20.0]),
    "matched_count": np.array([[2, 1, 0], [2, 2, 0]]),
    "matched_student_sum": np.array([[3.0, 2.0, 0.0], [1.0, 4.0, 0.0]]),
    "matched_teacher_sum": np.array([[1.0, 0.5, 0.0], [1.0, 3.0, 0.0]]),
    "student_reverse_kl": np.array([[2.0, 2.0, 4.0], [0.0, 4.0, 0.0]]),
    "teacher_forward_kl": np.array([[1.0, 1.0], [1.0, 3.0]]),
    "student_total_variation": np.array([[1.0, 0.5, 0.5], [1.0, 1.0, 0.0]]),
    "teacher_total_variation": np.array([[0.5, 0.5], [0.5, 0.5]]),
    "student_agree": np.array([[2, 0, 1], [1, 1, 0]]),
    "student_teacher_entropy": np.array([[3.0, 3.0, 1.0], [4.0, 4.0, 0.0]]),
    "teacher_teacher_entropy": np.array([[2.0, 2.0], [2.0, 2.0]]),
    "student_surprise": np.array([[7.0, 0.0, 9.0], [7.0, 7.0, 0.0]]),
    "teacher_surprise": np.array([[4.0, 4.0], [4.0, 4.0]]),
    "student_student_entropy": np.array([[4.0, 3.0, 1.0], [4.0, 3.0, 0.0]]),
    "student_seq_rep_2": np.array([0.5, 1.0]),
    "student_seq_rep_2_count": np.array([1, 2]),
    "student_rep_16": np.array([[0, 1, 1], [0, 0, 0]]),
    "student_loop": np.array([[0, 1, 0], [1, 0, 1]]),
    "student_ended": np.array([[1, 0, 1], [0, 1, 0]]),
    "teacher_ended": np.array([[0, 2], [0, 1]]),
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
    zero |= {name: np.zeros_like(ARRAYS[name]) for name in ARRAYS if name.endswith(("running", "context"))}
    for name in (name for name in OWN if name.startswith(("ex_acc_err", "excess"))):
        assert call(name, zero, weights, length=2).tolist() == [0, 0]
    assert call("eb_c", zero, weights, length=2).tolist() == [1, 1]
    assert e.excess(np.array([1.0, 0.0]), np.array([0.0, 2.0])).tolist()[1] == -100
    assert np.isnan(e.excess(np.array([1.0]), np.array([0.0])))


def test_matched_variant_by_hand() -> None:
    # both cut to 2 and 1, and to 2 and 2 tokens: student 4/4, 6/3, teacher 2/4, 3.5/3
    assert call("matched_error_nats", length=2) == [3]
    assert call("matched_error_nats", length=2, roll_in="teacher") == pytest.approx(0.5 + 3.5 / 3)
    assert call("ex_acc_err_matched", length=1) == [100]
    assert call("ex_acc_err_matched", length=2) == pytest.approx(80)
    np.testing.assert_allclose(e.ex_acc_err_matched_curve(ARRAYS, ONES, 3), [[100, 80, np.nan]])
    np.testing.assert_allclose(e.matched_error_curve(ARRAYS, ONES, 3), [[1, 3, np.nan]])


def test_arora_paper_variant_and_its_decomposition_by_hand() -> None:
    # four responses; student (4, 10, 15) / 4, teacher (2, 6, 6) / 4
    np.testing.assert_array_equal(e.arora_paper_error_curve(ARRAYS, ONES, 4), [[1, 2.5, 3.75, 3.75]])
    assert call("arora_paper_error_nats", length=3, roll_in="teacher") == [1.5]
    assert call("ex_acc_err_arora_paper", length=3) == [150]
    np.testing.assert_allclose(e.ex_acc_err_arora_paper_curve(ARRAYS, ONES, 2), [[100, 200 / 3]])
    # S_q = 1, 3/4, 1/4 and D_q = 1, 2, 5; S_p = 1, 1, 0 and D_p = 1/2, 1, none: then the student's 5
    assert call("length_term_nats", length=3) == [0 - 0.25 * 3 / 2 + 0.25 * 5]
    assert call("state_term_nats", length=3) == [0.5 + 0.875 * 1]
    lengths, states = e.excess_terms_curve(ARRAYS, ONES, 5)
    np.testing.assert_allclose(lengths + states, [[0.5, 1, 2.25, 2.25, 2.25]])


def test_arora_code_variant_by_hand() -> None:
    # l = 2: responses of two tokens or more have accumulated 3 + 10, and together 5 + 2 x 20
    assert call("arora_code_error_nats", length=2) == pytest.approx(58 / 3)
    assert call("arora_code_error_nats", length=3) == [18]
    assert call("arora_code_error_nats", length=2, roll_in="reference") == [13]
    assert call("ex_acc_err_arora_code", length=2) == pytest.approx(100 * (58 / 3 - 13) / 13)
    assert np.isnan(call("ex_acc_err_arora_code", length=3))
    np.testing.assert_allclose(e.arora_code_error_curve(ARRAYS, ONES, 4), [[16, 58 / 3, 18, np.nan]])
    found = e.ex_acc_err_arora_code_curve(ARRAYS, ONES, 3)
    np.testing.assert_allclose(found, [[100 * (16 - 18) / 18, 100 * (58 / 3 - 13) / 13, np.nan]])


def test_growth_and_states_by_hand() -> None:
    assert call("growth_exponent", length=2) == pytest.approx(np.log(3) / np.log(2))  # R(1) = 1, R(2) = 3
    assert np.isnan(call("growth_exponent", length=1))
    even = {"student_sum": np.full((1, 9), 0.3), "student_count": np.ones((1, 9))}
    assert call("growth_exponent", even, np.ones((1, 1)), length=9) == pytest.approx(1)
    np.testing.assert_array_equal(e.eb_c_curve(ARRAYS, ONES, 3), [[2, 2, np.nan]])
    assert call("eb_c", length=2) == [2]
    assert call("state_shift_nats", length=2) == [2]
    assert call("state_shift_reverse_nats", length=2) == [1.5]
    np.testing.assert_array_equal(e.state_shift_curve(ARRAYS, ONES, 3), [[0.5, 2, 3]])
    np.testing.assert_array_equal(e.excess_nats_curve(ARRAYS, ONES, 2), [[0.5, 1.5]])


def test_measures_pooled_over_tokens_by_hand() -> None:
    # the first two positions hold 4 + 3 student tokens and 8 teacher tokens
    assert call("acceptance", length=2) == [1 - 3.5 / 7]
    assert call("acceptance", length=2, roll_in="teacher") == [0.75]
    assert call("acceptance_drop", length=2) == [0.25]
    assert call("agreement", length=2) == [4 / 7]
    assert call("teacher_entropy", length=2) == [2]
    assert call("teacher_entropy_rise", length=2) == [1]
    assert call("teacher_surprise", length=2) == [3]
    assert call("teacher_surprise_rise", length=2) == [1]
    assert call("entropy_drift", length=3) == [-0.5]  # means 2, 2, 1
    assert np.isnan(call("entropy_drift", length=1))
    assert call("rep", window=16, length=3) == [2 / 8]
    assert call("seq_rep", n=2) == [0.5]
    assert call("loop_rate") == [0.75]
    assert call("loop_onset_tokens") == [(1 + 0 + 2) / 3]
    never = {"student_loop": np.zeros((2, 3), dtype=int), "student_count": ARRAYS["student_count"]}
    assert call("loop_rate", never) == [0]
    assert np.isnan(call("loop_onset_tokens", never))


def test_stopping_by_hand() -> None:
    assert call("stop_rate", length=2) == [0.5]
    assert call("stop_rate", length=9) == [0.75]
    assert call("truncation_rate", length=3) == [0.25]
    assert call("eos_hazard", length=2) == [2 / 7]
    assert call("eos_hazard_ratio", length=2) == pytest.approx(2 / 7 / (3 / 8))
    unending = {**ARRAYS, "teacher_ended": np.zeros((2, 2), dtype=int)}
    assert np.isnan(call("eos_hazard_ratio", unending, length=2))
    lengths = [call("length_quantile_tokens", level=level)[0] for level in (0.01, 0.25, 0.26, 0.75, 0.76, 1)]
    assert lengths == [1, 1, 2, 2, 3, 3]  # responses of 3, 1, 2 and 2 tokens


def random_arrays(rng: np.random.Generator, prompts: int) -> dict[str, Array]:
    shape, arrays = (prompts, 6), {}
    for side in ("student", "teacher", "reference", "matched"):
        arrays[f"{side}_count"] = -np.sort(-rng.integers(1, 5, shape), axis=1)
    for side in ("student", "teacher", "reference"):
        count = arrays[f"{side}_count"]
        for name in ("ended", "agree", "loop", "rep_16"):
            arrays[f"{side}_{name}"] = rng.integers(0, 2, shape)
        for name in ("sum", "running", "step", "surprise", "forward_kl", "reverse_kl", "total_variation"):
            arrays[f"{side}_{name}"] = rng.random(shape) * count
        for name in ("student_entropy", "teacher_entropy"):
            arrays[f"{side}_{name}"] = rng.random(shape) * count
        arrays[f"matched_{side}_sum"] = rng.random(shape) * arrays["matched_count"]
        arrays[f"{side}_context"] = rng.random(prompts)
        arrays[f"{side}_seq_rep_2"] = rng.random(prompts)
        arrays[f"{side}_seq_rep_2_count"] = rng.integers(1, 4, prompts)
    strata = np.sort(rng.integers(0, 2, prompts))
    strata[:1], strata[-1:] = 0, 1
    return arrays | {
        "values": rng.random(prompts),
        "numerator": rng.random(prompts),
        "denominator": rng.random(prompts),
        "stratum": strata,
        "label": rng.integers(0, 3, prompts),
        "prediction": rng.integers(0, 3, prompts),
        "hits": rng.integers(0, 2, prompts),
        "predicted": rng.integers(1, 4, prompts),
        "actual": rng.integers(1, 4, prompts),
        "x": rng.integers(0, 4, prompts) / 2,  # ties
        "y": rng.random(prompts),
    }


ARGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "ratio": {},
    "stratified_mean": {},
    "stratum_mean": {"stratum": 0},
    **{name: {} for name in ("f1", "macro_f1", "matthews", "pearson", "spearman", "pearson_spearman")},
    "mean_length_tokens": {},
    "seq_rep": {"n": 2},
    "rep": {"window": 16, "length": 5},
    "loop_rate": {},
    "loop_onset_tokens": {},
    "length_quantile_tokens": {"level": 0.5},
}


@pytest.mark.parametrize("name", OWN)
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


@pytest.mark.parametrize("name", OWN)
def test_padding_with_positions_nobody_reaches_changes_nothing(name: str) -> None:
    arrays, args = random_arrays(np.random.default_rng(1), 5), ARGS.get(name, {"length": 6})
    wide = {
        key: np.pad(value, ((0, 0), (0, 3))) if value.ndim == 2 else value for key, value in arrays.items()
    }
    ones = np.ones((1, 5))
    np.testing.assert_array_equal(call(name, wide, ones, **args), call(name, arrays, ones, **args))


CURVES = sorted(name.removesuffix("_curve") for name in vars(e) if name.endswith("_curve") and name[0] != "_")


@pytest.mark.parametrize("name", [name for name in CURVES if name in e.ESTIMATORS])
def test_a_curve_holds_the_estimator_at_each_length(name: str) -> None:
    arrays, weights = random_arrays(np.random.default_rng(2), 5), np.array([[1.0] * 5, [0, 2, 0, 1, 2]])
    curve = getattr(e, f"{name}_curve")(arrays, weights, 8)
    assert curve.shape == (2, 8)
    points = np.stack([call(name, arrays, weights, length=length) for length in range(1, 9)], axis=1)
    np.testing.assert_allclose(curve, points, rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_length_and_state_term_add_up_to_the_excess(seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = random_arrays(rng, 4)
    for side in ("student", "teacher"):  # runs that nobody reaches, on either side
        gone = np.arange(6) >= rng.integers(1, 7)
        arrays |= {f"{side}_{name}": arrays[f"{side}_{name}"] * ~gone for name in ("count", "sum")}
    weights = rng.multinomial(4, np.full(4, 0.25), size=3).astype(float)
    parts = call("length_term_nats", arrays, weights, length=length)
    parts = parts + call("state_term_nats", arrays, weights, length=length)
    student, teacher = (
        call("arora_paper_error_nats", arrays, weights, length=length, roll_in=side)
        for side in ("student", "teacher")
    )
    np.testing.assert_allclose(parts, student - teacher, atol=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_matched_is_alive_where_lengths_are_equal(seed: int) -> None:
    arrays = random_arrays(np.random.default_rng(seed), 4)
    arrays["teacher_count"] = arrays["matched_count"] = arrays["student_count"]
    arrays |= {f"matched_{side}_sum": arrays[f"{side}_sum"] for side in ("student", "teacher")}
    found = call("ex_acc_err_matched", arrays, np.ones((1, 4)), length=6)
    assert found == call("ex_acc_err_alive", arrays, np.ones((1, 4)), length=6)


def test_state_shift_is_the_divergence_of_prefixes_when_all_are_enumerated() -> None:
    """Every response of a random model is a prompt of its own, weighted with its probability."""
    cells: list[dict[str, Array]] = []
    weights: dict[str, list[float]] = {"student": [], "teacher": []}
    prefixes: dict[tuple[int, ...], Array] = {}

    def grow(response: tuple[int, ...], log: Array, kl: list[tuple[float, float]]) -> None:
        prefixes[response] = log
        if len(response) == 3 or (response and response[-1] == EOS):
            row = np.zeros((3, 3))
            row[: len(kl), :2], row[: len(kl), 2] = kl, 1
            cells.append({"forward": row[:, 0], "reverse": row[:, 1], "count": row[:, 2]})
            for side, value in zip(("student", "teacher"), np.exp(log), strict=True):
                weights[side].append(value)
            return
        log_q, log_p = (log_softmax(logits_after(model, (9, *response))) for model in (0, 1))
        both = ((np.exp(log_p) * (log_p - log_q)).sum(), (np.exp(log_q) * (log_q - log_p)).sum())
        for token in range(VOCABULARY):
            grow((*response, token), log + np.array([log_q[token], log_p[token]]), [*kl, both])

    grow((), np.zeros(2), [])
    arrays = {f"{g}_count": np.stack([c["count"] for c in cells]) for g in ("student", "teacher")}
    arrays["student_reverse_kl"] = np.stack([c["reverse"] for c in cells])
    arrays["teacher_forward_kl"] = np.stack([c["forward"] for c in cells])
    for length in (1, 2, 3):
        log = np.stack([v for k, v in prefixes.items() if len(k) == length or (EOS in k and len(k) < length)])
        shift = (np.exp(log[:, 0]) * (log[:, 0] - log[:, 1])).sum()
        back = (np.exp(log[:, 1]) * (log[:, 1] - log[:, 0])).sum()
        q, p = (np.array([weights[side]]) for side in ("student", "teacher"))
        assert call("state_shift_nats", arrays, q, length=length) == pytest.approx(shift, rel=1e-10)
        assert call("state_shift_reverse_nats", arrays, p, length=length) == pytest.approx(back, rel=1e-10)
        # the paper's sum with the divergence that fits is the same number
        renamed = {"teacher_sum": arrays["teacher_forward_kl"], "teacher_count": arrays["teacher_count"]}
        found = call("arora_paper_error_nats", renamed, p, length=length, roll_in="teacher")
        assert found == pytest.approx(back, rel=1e-10)


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
    arrays = per_prompt_arrays(evidence)
    truth = script(prompts, responses)
    ones = np.ones((1, len(prompts)))
    for side, writer in (("student", 0), ("teacher", 1)):
        found = e.minillm_error_curve(arrays, ones, NEW, side)[0]
        np.testing.assert_allclose(found, truth[writer], rtol=1e-6)
    for length in range(1, NEW + 1):
        expected = 100 * (truth[0] - truth[1])[length - 1] / truth[1][length - 1]
        found = e.ESTIMATORS["ex_acc_err_minillm"](arrays, ones, length=length)[0]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-5)
