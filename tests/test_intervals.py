"""Bootstrap intervals: weights, rules of ExAccErr, paired differences, training seeds, coverage."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import bootstrap

from kdbench import estimators as e
from kdbench.errors import UserError
from kdbench.intervals import (
    VARIANTS,
    Resampling,
    _sample,
    band,
    estimate,
    ex_acc_err_band,
    ex_acc_err_estimate,
    ex_acc_err_estimates,
    few_events,
    paired,
    require,
    seed_weights,
    weights,
)
from kdbench.record import RecordError

Array = NDArray[Any]
Arrays = dict[str, Array]
QUICK = Resampling(400)


def toy(seed: int = 0, prompts: int = 60, excess: float = 0.5, width: int = 6) -> Arrays:
    """Arrays of all variants; the student's divergences are 1 + `excess` times the teacher's in the mean."""
    rng, arrays = np.random.default_rng(seed), {"prompt": np.arange(prompts)}
    for side in ("student", "teacher", "reference"):
        alive = np.arange(width) < np.minimum(rng.geometric(0.1, (prompts, 1)), width)
        d = rng.gamma(2, 0.1, (prompts, width)) * (1 + excess * (side == "student")) * alive
        arrays |= {f"{side}_count": alive.astype(np.int32), f"{side}_sum": d, f"{side}_step": d[:, 1:]}
        arrays |= {f"{side}_running": np.cumsum(d, axis=1) * alive, f"{side}_context": np.full(prompts, 0.5)}
    arrays["matched_count"] = both = arrays["student_count"] * arrays["teacher_count"]
    return arrays | {f"matched_{side}_sum": arrays[f"{side}_sum"] * both for side in ("student", "teacher")}


def values(rng: np.random.Generator, count: int) -> Arrays:
    return {"prompt": np.arange(count), "values": rng.exponential(size=count)}


# ---------------------------------------------------------------------------------------------------- weights
def test_weights_are_multinomial_within_each_stratum() -> None:
    drawn = weights(50, 3000)
    assert (drawn.sum(axis=1) == 50).all()
    np.testing.assert_allclose(drawn.mean(axis=0), 1, atol=0.1)
    np.testing.assert_allclose(drawn.var(axis=0), 1 - 1 / 50, rtol=0.15)
    np.testing.assert_array_equal(weights(50, 3000), drawn)
    assert not np.array_equal(weights(50, 3000, seed=2), drawn)
    strata = np.array([4, 0, 4, 4, 0, 9])
    drawn = weights(strata, 200)
    assert len(drawn) == 200
    for one, size in ((0, 2), (4, 3), (9, 1)):
        assert (drawn[:, strata == one].sum(axis=1) == size).all()
    with pytest.raises(ValueError, match="read-only"):
        weights(50, 3000)[0, 0] = 1


def test_an_estimate_is_the_percentile_interval_of_the_resampled_estimator() -> None:
    arrays = values(np.random.default_rng(0), 40)
    found = estimate("mean", arrays, unit="nats", how=Resampling(999))
    drawn = weights(40, 999) @ arrays["values"] / 40
    assert found.value == pytest.approx(arrays["values"].mean(), rel=1e-14)
    assert (found.unit, found.n, found.warning) == ("nats", 40, "")
    # 40 prompts: the 2.5 % quantile of a normal becomes sqrt(40 / 39) t(39), a share of 0.0209
    expected = np.quantile(drawn, [0.0202, 0.9798], method="weibull")
    np.testing.assert_allclose([found.low, found.high], expected, rtol=2e-3)
    assert estimate(e.mean, arrays, unit="nats", how=Resampling(999)) == found
    narrow = estimate("mean", arrays, how=Resampling(999, level=0.5))
    assert found.low < narrow.low < found.value < narrow.high < found.high  # type: ignore[operator]


def test_bca_agrees_with_scipy() -> None:
    arrays = values(np.random.default_rng(1), 30)
    found = estimate("mean", arrays, how=Resampling(9999, "bca"))
    theirs = bootstrap(
        (arrays["values"],), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    np.testing.assert_allclose([found.low, found.high], theirs, rtol=0.02)
    plain = estimate("mean", arrays, how=Resampling(9999))
    assert plain.high < found.high  # type: ignore[operator]  # skewed to the right


def test_the_order_of_prompts_does_not_matter() -> None:
    arrays, order = toy(), np.random.default_rng(0).permutation(60)
    shuffled = {name: value[order] for name, value in arrays.items()}
    for method in ("percentile", "bca"):
        how = Resampling(200, method)  # type: ignore[arg-type]
        found = ex_acc_err_estimate(arrays, 3, how=how)
        assert ex_acc_err_estimate(shuffled, 3, how=how) == found
    assert paired("ex_acc_err_alive", arrays, shuffled, {"length": 3}, how=QUICK).value == 0


def test_a_band_holds_the_interval_of_each_length() -> None:
    arrays = toy()
    for method in ("percentile", "bca"):
        how = Resampling(300, method)  # type: ignore[arg-type]
        point, low, high = band(e.ex_acc_err_alive_curve, arrays, 8, how=how)
        assert point.shape == low.shape == high.shape == (8,)
        for length in (1, 4, 6):
            one = estimate("ex_acc_err_alive", arrays, {"length": length}, how=how)
            np.testing.assert_allclose(
                [point[length - 1], low[length - 1], high[length - 1]], [one.value, one.low, one.high]
            )
        assert np.isnan([point[6:], low[6:], high[6:]]).all()
    point, *_ = band(e.survival_curve, arrays, 6, {"roll_in": "teacher"}, how=QUICK)
    np.testing.assert_array_equal(point, arrays["teacher_count"].mean(axis=0))


def test_what_is_not_defined_has_a_warning_instead() -> None:
    arrays = {"prompt": np.arange(20), "numerator": np.ones(20), "denominator": np.zeros(20)}
    found = estimate("ratio", arrays, how=QUICK)
    assert (found.value, found.low, found.high) == (None, None, None)
    assert found.warning == "not defined on these responses."
    arrays["denominator"][0] = 1  # in a share of 1 / e of the resamples it is not drawn
    found = estimate("ratio", arrays, how=QUICK)
    assert (found.value, found.low) == (20, None)
    assert "no interval: not defined in 1" in found.warning
    arrays["denominator"][:4] = 1
    found = estimate("ratio", arrays, how=QUICK)
    assert found.low is not None
    assert "resamples, which are left out" in found.warning
    single = estimate("mean", values(np.random.default_rng(0), 1))
    assert single.warning == "no interval: one prompt is too few."
    with pytest.raises(UserError, match="no estimator 'meen'. Did you mean 'mean'?"):
        estimate("meen", arrays)


# ----------------------------------------------------------------------------------------------- the variants
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_each_variant_has_its_estimator_with_an_interval(name: str) -> None:
    arrays, variant = toy(), VARIANTS[name]
    needed = {key: arrays[key] for key in (*variant.arrays, "prompt")}  # no others are read
    found = ex_acc_err_estimate(needed, 4, name, how=QUICK)
    expected = e.ESTIMATORS[variant.estimator](arrays, np.ones((1, 60)), length=4)[0]
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.low < found.value < found.high  # type: ignore[operator]
    assert (found.unit, found.n, found.warning) == (variant.unit, 60, "")
    same = estimate(variant.estimator, arrays, {"length": 4}, how=QUICK)
    np.testing.assert_allclose([found.low, found.high], [same.low, same.high], rtol=1e-10)  # type: ignore[arg-type]
    np.testing.assert_allclose(variant.curve(needed, np.ones((1, 60)), 4)[0, -1], expected)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_teacher_equal_to_the_student_has_none(name: str) -> None:
    zero = {
        key: value * 0 if key.endswith(("sum", "step", "running", "context")) else value
        for key, value in toy().items()
    }
    found = ex_acc_err_estimate(zero, 4, name)
    assert (found.value, found.low, found.high, found.warning) == (0, 0, 0, "")


def test_where_epsilon_is_near_zero_there_is_no_ratio() -> None:
    arrays = toy()
    arrays["teacher_sum"] = arrays["teacher_sum"] * 1e-6
    found = ex_acc_err_estimate(arrays, 4, how=QUICK)
    assert found.unit == "nats"
    assert "epsilon may be under 1e-06 nats" in found.warning
    assert found.value == pytest.approx(e.excess_nats(arrays, np.ones((1, 60)), 4)[0])
    assert found.low < found.value < found.high  # type: ignore[operator]
    absolute = ex_acc_err_estimate(arrays, 4, "abs", how=QUICK)  # needs no ratio
    assert (absolute.value, absolute.low, absolute.warning) == (found.value, found.low, "")
    arrays["teacher_sum"] = np.where(np.arange(60)[:, None] == 0, toy()["teacher_sum"], 0)  # one prompt alone
    assert "epsilon" in ex_acc_err_estimate(arrays, 4, how=QUICK).warning
    assert np.isnan(ex_acc_err_band(arrays, 4, how=QUICK)).all()
    single = {name: value[:1] for name, value in toy().items()}  # no interval: the value itself
    assert ex_acc_err_estimate(single, 1).unit == "%"
    assert ex_acc_err_estimate(single | {"teacher_sum": single["teacher_sum"] * 1e-7}, 1).unit == "nats"


def test_what_is_not_defined_is_no_small_epsilon() -> None:
    arrays = toy()
    arrays["teacher_sum"][:, 1] = np.nan
    found = ex_acc_err_estimate(arrays, 2, how=QUICK)
    assert (found.value, found.unit, found.warning) == (None, "%", "not defined on these responses.")


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_several_lengths_at_once_are_those_one_by_one(name: str) -> None:
    arrays = toy()
    arrays["teacher_sum"][:, 0] = arrays["teacher_step"][:, 0] = 0  # no ratio at l = 1
    lengths = [1, 2, 5, 9]
    found = ex_acc_err_estimates(arrays, lengths, name, how=QUICK)
    for length, one in zip(lengths, found, strict=True):
        alone = ex_acc_err_estimate(arrays, length, name, how=QUICK)
        assert (one.unit, one.warning) == (alone.unit, alone.warning)
        np.testing.assert_allclose(
            np.array([one.value, one.low, one.high], dtype=float),
            np.array([alone.value, alone.low, alone.high], dtype=float),
            rtol=1e-9,
        )


# --------------------------------------------------------------------------------------------------- events
def test_rates_of_few_events_have_a_warning() -> None:
    """The boundary, on both sides: 9 and 10 events, 9 and 10 responses without one."""
    prompts = 40
    arrays = toy(prompts=prompts)

    def with_events(student: int, teacher: int) -> Arrays:
        for side, count in (("student", student), ("teacher", teacher)):
            for column in ("loop", "ended"):
                arrays[f"{side}_{column}"] = np.zeros((prompts, 6), dtype=np.int32)
                arrays[f"{side}_{column}"][:count, 2] = 1
        return arrays

    for name, args in (("loop_rate", {}), ("stop_rate", {"length": 6}), ("truncation_rate", {"length": 6})):
        for count, few in ((0, True), (9, True), (10, False), (30, False), (31, True), (40, True)):
            found = estimate(name, with_events(count, 20), args, how=QUICK)
            assert found.value is not None
            assert ("fewer than 10 events: " in found.warning) == few, (name, count)
            assert few_events(name, arrays, {**args, "roll_in": "teacher"}) == ""
            total = count + 20  # student and teacher together, and so for a difference of two methods
            assert bool(few_events(name, arrays, args, ("student", "teacher"))) == (total > 70)
    assert few_events("stop_rate", with_events(12, 0), {"length": 2}) == (
        "fewer than 10 events: responses with an end token, 0."
    )
    for sides, few in (((10, 10), False), ((9, 20), True), ((20, 9), True), ((40, 40), False)):
        found = estimate("eos_hazard_ratio", with_events(*sides), {"length": 6}, how=QUICK)
        assert ("events" in found.warning) == few, sides
    for count, few in ((9, True), (10, False), (40, False)):
        assert bool(few_events("loop_onset_tokens", with_events(count, 0))) == few
    assert few_events("loop_rate", [with_events(5, 0)] * 2) == ""  # of two training seeds
    assert few_events("survival", arrays, {"length": 2}) == ""
    one, other = dict(with_events(4, 0)), dict(with_events(6, 0))
    assert paired("loop_rate", one, other, how=QUICK).warning == ""
    assert "with a loop, 9." in paired("loop_rate", one, dict(with_events(5, 0)), how=QUICK).warning


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_where_few_responses_run_there_is_no_number(side: str) -> None:
    arrays = toy()
    short = {name: value.copy() for name, value in arrays.items()}
    short[f"{side}_count"][8:, 3:] = 0
    short[f"{side}_sum"][8:, 3:] = 0
    found = ex_acc_err_estimate(short, 4, how=QUICK)
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "survival at l = 4 is 0." in found.warning
    assert "below 0.2" in found.warning
    assert ex_acc_err_estimate(short, 3, how=QUICK).value is not None
    assert "is 0.000, below" in ex_acc_err_estimate(arrays, 100).warning
    for name in ("minillm-code", "arora22-paper"):  # defined there, and yet no number
        assert ex_acc_err_estimate(short, 4, name, how=QUICK).value is None
    band = ex_acc_err_band(short, 6, how=QUICK)
    assert [np.isnan(one).tolist() for one in band] == [[False] * 3 + [True] * 3] * 3


def test_a_variant_says_what_to_collect() -> None:
    arrays = toy()
    with pytest.raises(UserError, match="no variant 'arora22-cod'. Did you mean 'arora22-code'?"):
        ex_acc_err_estimate(arrays, 4, "arora22-cod")
    light = {key: value for key, value in arrays.items() if "teacher" not in key}
    message = "alive needs teacher roll-in: `kdbench collect RUN --profile plain`."
    with pytest.raises(RecordError, match=message):
        ex_acc_err_estimate(light, 4)
    plain = {key for key in arrays if not key.startswith("reference") and not key.endswith("context")}
    message = "arora22-code needs reference roll-in and context rows: `kdbench collect RUN --profile plain`."
    with pytest.raises(RecordError, match=message):
        require("arora22-code", plain)
    with pytest.raises(RecordError, match="needs context rows: `kdbench collect"):
        require("arora22-code", {key for key in arrays if not key.endswith("context")})
    with pytest.raises(RecordError, match="'minillm', not 'plain': `kdbench collect RUN --profile minillm`."):
        ex_acc_err_estimate(arrays, 4, "minillm-code", profile="plain")
    assert ex_acc_err_estimate(arrays, 4, "minillm-code", profile="minillm", how=QUICK).value is not None
    assert require("alive", arrays, "minillm") is VARIANTS["alive"]  # no published figures to be like
    with pytest.raises(RecordError, match="needs the arrays teacher_step: score the run anew"):
        require("minillm-code", set(arrays) - {"teacher_step"})


# -------------------------------------------------------------------------------------- pairs, training seeds
def test_a_paired_difference_uses_the_same_prompts_for_both() -> None:
    one, other = toy(), toy()
    other["student_sum"] = other["student_sum"] * 1.01
    args = {"length": 4}
    same = paired("ex_acc_err_alive", one, one, args, unit="%", how=QUICK)
    assert (same.value, same.low, same.high, same.p_value, same.unit, same.n) == (0, 0, 0, 1, "%", 60)
    found = paired("ex_acc_err_alive", one, other, args, how=QUICK)
    apart = [estimate("ex_acc_err_alive", arrays, args, how=QUICK) for arrays in (one, other)]
    assert found.value == pytest.approx(apart[0].value - apart[1].value)  # type: ignore[operator]
    assert found.high < 0  # type: ignore[operator]
    assert found.p_value == pytest.approx(2 / 401)
    assert found.high - found.low < 0.1 * (apart[0].high - apart[0].low)  # type: ignore[operator]
    back = paired("ex_acc_err_alive", other, one, args, how=QUICK)
    np.testing.assert_allclose([back.low, back.high], [-found.high, -found.low], rtol=1e-9)  # type: ignore[operator]
    bca = paired("ex_acc_err_alive", one, other, args, how=Resampling(400, "bca"))
    assert bca.low < found.value < bca.high < 0  # type: ignore[operator]
    independent = paired("ex_acc_err_alive", one, toy(seed=5), args, how=QUICK)
    assert independent.p_value > 0.05  # type: ignore[operator]


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("prompts", [3, 10, 100])
def test_the_p_value_is_the_inverse_of_the_interval(method: Any, prompts: int) -> None:
    """The interval of level 1 - alpha excludes 0 exactly where alpha is above p."""
    rng, seen = np.random.default_rng(prompts), []
    for _ in range(12):
        one, other = values(rng, prompts), values(rng, prompts)
        other["values"] += rng.choice([0.0, 2.0, 4.0]) / np.sqrt(prompts)
        p = paired("mean", one, other, how=Resampling(400, method)).p_value
        assert p is not None
        seen.append(p)
        near = [alpha for alpha in (p * 0.99, p * 1.01) if 2 / 401 < alpha < 1]
        for alpha in (*near, 0.01, 0.05, 0.1, 0.3, 0.6, 0.9):
            found = paired("mean", one, other, how=Resampling(400, method, 1 - alpha))
            excluded = found.low > 0 or found.high < 0  # type: ignore[operator]
            assert excluded == (p < alpha), (p, alpha, found)
    assert len(set(seen)) > 4
    assert min(seen) < 0.3 < max(seen)


def test_few_prompts_give_t_intervals_beyond_the_extreme_resamples() -> None:
    """Values of a normal, 5 prompts, level 99.9 %: more than 400 resamples can show."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        arrays = {"prompt": np.arange(5), "values": rng.normal(size=5)}
        found = estimate("mean", arrays, how=Resampling(400, level=0.99))
        drawn = weights(5, 400) @ arrays["values"] / 5
        assert found.low < drawn.min() < drawn.max() < found.high  # type: ignore[operator]
        covered += found.low <= 0 <= found.high  # type: ignore[operator]
    assert covered >= 192


def test_other_prompts_are_refused_by_name() -> None:
    one, other = toy(), toy()
    other["prompt"] = np.arange(60) + 3
    message = r"same prompts: 3 only in the first \(such as 0\), 3 only in the second \(such as 60\)."
    with pytest.raises(RecordError, match=message):
        paired("survival", one, other, {"length": 2})
    with pytest.raises(RecordError, match="same prompts"):
        estimate("survival", [one, other], {"length": 2})
    with pytest.raises(RecordError, match="1 only in the first"):
        paired("survival", one, {name: value[:-1] for name, value in one.items()}, {"length": 2})
    with pytest.raises(RecordError, match="strata differ"):
        paired("survival", one, {**one, "stratum": np.arange(60) % 2}, {"length": 2})
    with pytest.raises(RecordError, match="same training seeds: 2 against 1"):
        paired("survival", [one, one], one, {"length": 2})


def test_training_seeds_are_averaged_and_from_three_on_drawn() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=200)
    runs = [{"prompt": np.arange(200), "values": base + shift} for shift in (-1.0, 0.0, 1.0)]
    assert estimate("mean", runs[:1], how=QUICK) == estimate("mean", runs[0], how=QUICK)
    two = estimate("mean", runs[:2], how=QUICK)
    assert two.value == pytest.approx(base.mean() - 0.5)
    one = estimate("mean", runs[0], how=QUICK)
    assert two.high - two.low == pytest.approx(one.high - one.low)  # type: ignore[operator]
    found = estimate("mean", runs, how=Resampling(2000))
    assert found.value == pytest.approx(base.mean())
    # three seeds with a deviation of 1: about t(2) / sqrt(3) on either side
    assert found.high - found.low == pytest.approx(2 * 4.303 / np.sqrt(3), rel=0.25)  # type: ignore[operator]
    # differences between seeds that both methods share cancel
    other = [{**run, "values": run["values"] - 0.1} for run in runs]
    difference = paired("mean", runs, other, how=QUICK)
    np.testing.assert_allclose([difference.value, difference.low, difference.high], 0.1)  # type: ignore[arg-type]
    point, low, high = band(e.survival_curve, [toy(seed) for seed in range(3)], 6, how=QUICK)
    assert ((low <= point) & (point <= high)).all()
    drawn = ex_acc_err_estimate([toy(seed) for seed in range(3)], 4, how=QUICK)
    expected = [ex_acc_err_estimate(toy(seed), 4, how=QUICK).value for seed in range(3)]
    assert drawn.value == pytest.approx(np.mean(expected))  # type: ignore[arg-type]


def test_seed_weights_depend_on_the_seeds_and_sum_to_one() -> None:
    drawn = seed_weights((1, 2, 3), 5000)
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    k = np.sqrt(1.5) * 4.30265 / 1.95996
    np.testing.assert_allclose(drawn.var(axis=0), k**2 / 9 * (2 / 3), rtol=0.05)
    assert not np.array_equal(seed_weights((1, 2, 4), 5000), drawn)


# --------------------------------------------------------------------------------------------------- coverage
def test_intervals_of_a_ratio_of_sums_cover_the_truth() -> None:
    """300 data sets of 100 prompts, two estimators at once; the standard error of a coverage is 1.3 %."""
    covered, truth = np.zeros(2), np.array([50, 0.9**3])

    def both(arrays: Arrays, weights: Array) -> Array:
        return np.stack([e.ex_acc_err_alive(arrays, weights, 4), e.survival(arrays, weights, 4)], axis=1)

    for seed in range(300):
        sample = _sample(both, [toy(seed, 100)], {}, Resampling(400, seed=seed % 5))
        low, high = sample.interval(0.95)
        covered += (low <= truth) & (truth <= high)
    assert ((covered / 300 > 0.915) & (covered / 300 < 0.985)).all()
