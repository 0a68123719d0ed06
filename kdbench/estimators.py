"""What analyses compute, as pure functions of per-prompt arrays and of weights on the prompts.

Source: exposure bias after Arora et al. 2022, https://arxiv.org/abs/2204.01171, sec. 3, and as computed for
MiniLLM (Gu et al. 2024, https://arxiv.org/abs/2306.08543) by `evaluate_exposure_bias.py`.
Differs: the teacher stands for the oracle (as in MiniLLM); `ex_acc_err_alive` averages each step over the
responses that still run there and includes the first response token, `ex_acc_err_minillm` does neither.

Every estimator is `f(arrays, weights, **args) -> [R]`: `arrays` map names to [P, ...] (prompts first),
`weights` is [R, P], how often each prompt counts in each of R resamples (ones [1, P] for the point estimate).
Entries of `arrays` that an estimator does not name (`prompt`, `stratum`) are ignored. Results are float64,
NaN where not defined.

Shapes: P prompts, T token positions, R resamples. Under roll-in by g: `<g>_count` [P, T] is the number of a
prompt's responses that have a token at position t, `<g>_sum` [P, T] the sum of their divergences d there, in
nats.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Estimator = Callable[..., Array]
ESTIMATORS: dict[str, Estimator] = {}


def estimator(function: Estimator) -> Estimator:
    """Registers `function` under its name, the name that a `Score` stores."""
    ESTIMATORS[function.__name__] = function
    return function


def _weighted(weights: Array, values: Array) -> Array:
    """sum_p weights[r, p] values[p, ...] in the precision of `weights`, returned as float64."""
    return np.asarray(weights @ values.astype(weights.dtype, copy=False), dtype=np.float64)


def _divide(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, NaN where the denominator is 0."""
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=out, where=denominator != 0)
    return out


def excess(student: Array, teacher: Array) -> Array:
    """100 (student - teacher) / teacher, in percent; 0 where both are 0, NaN where only `teacher` is."""
    return np.where((student == 0) & (teacher == 0), 0.0, 100 * _divide(student - teacher, teacher))


# ------------------------------------------------------------------------------------------------- means
@estimator
def mean(arrays: Arrays, weights: Array) -> Array:
    """sum_p w_p values_p / sum_p w_p; `values` [P]."""
    values = arrays["values"]
    total = _weighted(weights, np.stack([values, np.ones_like(values)], axis=1))
    return _divide(total[:, 0], total[:, 1])


@estimator
def ratio(arrays: Arrays, weights: Array) -> Array:
    """sum_p w_p numerator_p / sum_p w_p denominator_p; both [P]."""
    total = _weighted(weights, np.stack([arrays["numerator"], arrays["denominator"]], axis=1))
    return _divide(total[:, 0], total[:, 1])


@estimator
def stratified_mean(arrays: Arrays, weights: Array) -> Array:
    """The mean over sets of each set's weighted mean; `values` [P], `stratum` [P] says which set."""
    sets = np.unique(arrays["stratum"])
    return np.asarray(np.mean([stratum_mean(arrays, weights, stratum=one) for one in sets], axis=0))


@estimator
def stratum_mean(arrays: Arrays, weights: Array, stratum: int) -> Array:
    """The weighted mean within one set; `values` [P], `stratum` [P] says which set."""
    at = np.flatnonzero(arrays["stratum"] == stratum)
    inside: Any = at
    if len(at) and at[-1] - at[0] == len(at) - 1:
        inside = slice(at[0], at[-1] + 1)  # a view, not a copy of the weights
    return mean({"values": arrays["values"][inside]}, weights[:, inside])


# ---------------------------------------------------------------------------------- conditional on running
def _running_means(arrays: Arrays, weights: Array, length: int, roll_in: str) -> Array:
    """[R, length]: E[d_t | still running at t] = sum_p w_p sum[p, t] / sum_p w_p count[p, t], else NaN."""
    total = _weighted(weights, arrays[f"{roll_in}_sum"][:, :length])
    count = _weighted(weights, arrays[f"{roll_in}_count"][:, :length])
    missing = ((0, 0), (0, length - total.shape[1]))
    return np.pad(_divide(total, count), missing, constant_values=np.nan)


def accumulated_error_curve(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """[R, length]: `accumulated_error_nats` for l = 1..length; NaN from where no response is that long."""
    return np.cumsum(_running_means(arrays, weights, length, roll_in), axis=1)


def ex_acc_err_alive_curve(arrays: Arrays, weights: Array, length: int) -> Array:
    """[R, length]: `ex_acc_err_alive` for l = 1..length, in percent."""
    student = accumulated_error_curve(arrays, weights, length)
    return excess(student, accumulated_error_curve(arrays, weights, length, "teacher"))


@estimator
def accumulated_error_nats(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """R(l) = sum_{t<l} E[d_t | running at t] in nats; for 'teacher' l epsilon(l), under its prefixes.

    E[d_t | running at t] = sum_p w_p sum[p, t] / sum_p w_p count[p, t].
    """
    return np.asarray(_running_means(arrays, weights, length, roll_in).sum(axis=1))


@estimator
def ex_acc_err_alive(arrays: Arrays, weights: Array, length: int) -> Array:
    """ExAccErr(l) = 100 [R(l) - l epsilon(l)] / [l epsilon(l)] in percent, every step conditional on running.

    R(l) = sum_{t<l} E[d_t | running at t] under the student's prefixes, l epsilon(l) under the teacher's.
    `student_sum`, `student_count`, `teacher_sum`, `teacher_count` [P, T]. 0 where both sums are exactly 0.
    """
    student = accumulated_error_nats(arrays, weights, length)
    return excess(student, accumulated_error_nats(arrays, weights, length, "teacher"))


@estimator
def excess_nats(arrays: Arrays, weights: Array, length: int) -> Array:
    """R(l) - l epsilon(l) in nats, every step conditional on running."""
    teacher = accumulated_error_nats(arrays, weights, length, "teacher")
    return accumulated_error_nats(arrays, weights, length) - teacher


def survival_curve(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """[R, length]: the share of responses that have at least l tokens, for l = 1..length."""
    count = arrays[f"{roll_in}_count"]
    alive = _weighted(weights, count[:, :length])
    alive = np.pad(alive, ((0, 0), (0, length - alive.shape[1])))
    return _divide(alive, _weighted(weights, count[:, :1]))


@estimator
def survival(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """The share of responses with at least l tokens: sum_p w_p count[p, l-1] / sum_p w_p count[p, 0]."""
    return survival_curve(arrays, weights, length, roll_in)[:, -1]


@estimator
def mean_length_tokens(arrays: Arrays, weights: Array, roll_in: str = "student") -> Array:
    """Mean tokens per response with its end token: sum_p w_p sum_t count[p, t] / sum_p w_p count[p, 0]."""
    count = arrays[f"{roll_in}_count"]
    total = _weighted(weights, np.stack([count.sum(axis=1), count[:, 0]], axis=1))
    return _divide(total[:, 0], total[:, 1])


# ------------------------------------------------------------------------------------- as MiniLLM computes it
def minillm_step_errors(values: Array, alive: Array, examples: Array) -> tuple[Array, Array]:
    """(e [P, J], prompts [P]): each prompt's mean divergence per step, the way MiniLLM's script takes it.

    `values`, `alive` [P*S, J] and `examples` [P*S] as `Evidence.after` gives them: column j holds the
    distributions after response token j was read, alive where that token is not the end token.
    e_j = sum_s alive d_j / (sum_s alive + 1e-3): prompts without a live sample at j contribute 0.
    """
    prompts, at = np.unique(examples, return_inverse=True)
    total, count = np.zeros((2, len(prompts), values.shape[1]))
    np.add.at(total, at, np.where(alive, values, 0).astype(np.float64))
    np.add.at(count, at, alive.astype(np.float64))
    return total / (count + 1e-3), prompts


def minillm_error_curve(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """[R, length]: R(l), or E(l) for 'teacher': the mean over *all* prompts of sum_{j<l} e_j, in nats."""
    errors = np.cumsum(arrays[f"{roll_in}_step"][:, :length], axis=1, dtype=np.float64)
    if errors.shape[1] < length:
        missing = ((0, 0), (0, length - errors.shape[1]))
        errors = np.pad(errors, missing, mode="edge") if errors.size else np.pad(errors, missing)
    return _divide(_weighted(weights, errors), _weighted(weights, np.ones((len(errors), 1))))


def ex_acc_err_minillm_curve(arrays: Arrays, weights: Array, length: int) -> Array:
    """[R, length]: `ex_acc_err_minillm` for l = 1..length, in percent."""
    student = minillm_error_curve(arrays, weights, length)
    return excess(student, minillm_error_curve(arrays, weights, length, "teacher"))


@estimator
def ex_acc_err_minillm(arrays: Arrays, weights: Array, length: int) -> Array:
    """100 (R(l) - E(l)) / E(l) in percent as MiniLLM's script computes it.

    R(l) is the mean over all prompts of A(l) = sum_{j<l} e_j under student roll-in, E(l) under the teacher's;
    `student_step`, `teacher_step` [P, J] from `minillm_step_errors`. The script prints l = 16.
    """
    student = minillm_error_nats(arrays, weights, length)
    return excess(student, minillm_error_nats(arrays, weights, length, "teacher"))


@estimator
def minillm_error_nats(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """R(l) in nats as MiniLLM's script computes it, E(l) for 'teacher'."""
    values = arrays[f"{roll_in}_step"][:, :length].sum(axis=1, dtype=np.float64)
    return mean({"values": values}, weights)
