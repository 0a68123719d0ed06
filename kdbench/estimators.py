"""What analyses compute, as pure functions of per-prompt arrays and of weights on the prompts.

Source: exposure bias after Arora et al. 2022, https://arxiv.org/abs/2204.01171, sec. 3, and as computed for
MiniLLM (Gu et al. 2024, https://arxiv.org/abs/2306.08543) by `evaluate_exposure_bias.py`; EB-C after He et
al. 2021, https://arxiv.org/abs/1905.10617; seq-rep-n and rep/l after Welleck et al. 2020,
https://arxiv.org/abs/1908.04319.
Differs: the teacher stands for the oracle (as in MiniLLM), except in `ex_acc_err_arora_code`, where reference
text does; `ex_acc_err_alive` averages each step over the responses that still run there and includes the
first response token, `ex_acc_err_minillm` does neither.

ExAccErr(l) = 100 [R(l) - E(l)] / E(l) in percent, E(l) = l epsilon(l). What the variants sum over t < l:

    alive           D_g(t) = E[d_t | running at t], g the student for R and the teacher for E
    matched         the same, draw i of both roll-ins cut to the shorter of the two
    arora_paper     S_g(t) D_g(t), S_g(t) the share that runs at t: after the end both models agree
    arora_code      d_t and the prompt's own tokens, averaged over the responses of l tokens or more; E under
                    reference text
    minillm         e_j, see `minillm_step_errors`: first token left out, end token masked, 0 after the end

Every estimator is `f(arrays, weights, **args) -> [R]`: `arrays` map names to [P, ...] (prompts first),
`weights` is [R, P], how often each prompt counts in each of R resamples (ones [1, P] for the point estimate).
Entries of `arrays` that an estimator does not name (`prompt`, `stratum`) are ignored. Results are float64,
NaN where not defined.

Shapes: P prompts, T token positions, R resamples. Under roll-in by g: `<g>_count` [P, T] is the number of a
prompt's responses that have a token at position t, `<g>_sum` [P, T] the sum of their divergences d there, in
nats; `kdbench.per_prompt.arrays` makes these and all others. l counts response tokens, positions 0..l-1; a
`..._curve` gives [R, length], its values for l = 1..length.
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


# -------------------------------------------------------------------------------- classes, spans and numbers
@estimator
def f1(arrays: Arrays, weights: Array) -> Array:
    """100 x 2 sum_p w_p hits_p / sum_p w_p (predicted_p + actual_p), 0 where nothing is predicted or actual.

    `hits`, `predicted`, `actual` [P] count what is both, what is predicted and what there is in an example:
    micro-F1 of the spans of texts, F1 of a class where each is 0 or 1.
    """
    columns = [2 * arrays["hits"], arrays["predicted"] + arrays["actual"]]
    total = _weighted(weights, np.stack(columns, axis=1))
    return np.asarray(np.nan_to_num(100 * _divide(total[:, 0], total[:, 1])))


def _confusion(arrays: Arrays, weights: Array) -> Array:
    """[R, N, N]: the weight of examples with a label (row) and a prediction (column)."""
    label, prediction = arrays["label"], arrays["prediction"]
    classes = int(max(label.max(), prediction.max())) + 1
    pairs = np.eye(classes**2)[classes * label + prediction]
    return _weighted(weights, pairs).reshape(len(weights), classes, classes)


@estimator
def macro_f1(arrays: Arrays, weights: Array) -> Array:
    """The mean F1 x 100 of the classes that are the label or the prediction of some example.

    `label`, `prediction` [P] int64.
    """
    table = _confusion(arrays, weights)
    total = table.sum(axis=1) + table.sum(axis=2)
    scores = 100 * _divide(2 * np.diagonal(table, axis1=1, axis2=2), total)
    return _divide(np.nan_to_num(scores).sum(axis=1), (total > 0).sum(axis=1))


@estimator
def matthews(arrays: Arrays, weights: Array) -> Array:
    """Matthews' correlation x 100, of any number of classes; 0 where labels or predictions are all one class.

    `label`, `prediction` [P] int64. With C the confusion matrix of s examples, c on its diagonal, t and p its
    sums over predictions and over labels: (c s - t p) / sqrt((s^2 - p p) (s^2 - t t)).

    Source: Gorodkin 2004, https://doi.org/10.1016/j.compbiolchem.2004.09.006, eq. 8.
    """
    table = _confusion(arrays, weights)
    true, predicted = table.sum(axis=2), table.sum(axis=1)
    count, right = table.sum(axis=(1, 2)), np.trace(table, axis1=1, axis2=2)
    top = right * count - (true * predicted).sum(axis=1)
    spread = [count**2 - (one**2).sum(axis=1) for one in (true, predicted)]
    bottom = np.sqrt(np.maximum(spread[0] * spread[1], 0))
    return np.asarray(np.nan_to_num(100 * _divide(top, bottom)))


def _correlation(weights: Array, x: Array, y: Array) -> Array:
    """[R]: the weighted correlation x 100 of x and y, [P] or [R, P]; 0 where one of them is constant."""
    share = weights / weights.sum(axis=1, keepdims=True)

    def centred(values: Array) -> Array:
        values = values - values.mean()
        values = values / (np.abs(values).max() or 1.0)
        return np.asarray(values - (share * values).sum(axis=1, keepdims=True))

    a, b = centred(x), centred(y)
    spread = [(share * one**2).sum(axis=1) for one in (a, b)]
    top = np.where(np.minimum(*spread) > 1e-12, (share * a * b).sum(axis=1), 0.0)
    return np.asarray(np.nan_to_num(100 * _divide(top, np.sqrt(spread[0] * spread[1]))))


def _ranks(weights: Array, values: Array) -> Array:
    """[R, P]: how much weight lies below each value, and half of what equals it: ranks, ties averaged."""
    order = np.argsort(values, kind="stable")
    first = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)
    tied = np.add.reduceat(weights[:, order], first, axis=1)
    middle = np.cumsum(tied, axis=1) - tied / 2
    ranks = np.empty(weights.shape)
    ranks[:, order] = np.repeat(middle, np.diff(first, append=len(values)), axis=1)
    return np.asarray(ranks / weights.sum(axis=1, keepdims=True))


@estimator
def pearson(arrays: Arrays, weights: Array) -> Array:
    """Pearson's correlation x 100 of `x` and `y` [P]; 0 where one of them is constant."""
    return _correlation(weights.astype(np.float64), arrays["x"], arrays["y"])


@estimator
def spearman(arrays: Arrays, weights: Array) -> Array:
    """Spearman's rank correlation x 100 of `x` and `y` [P], ties averaged; 0 where one is constant."""
    weights = weights.astype(np.float64)
    return _correlation(weights, _ranks(weights, arrays["x"]), _ranks(weights, arrays["y"]))


@estimator
def pearson_spearman(arrays: Arrays, weights: Array) -> Array:
    """The mean of `pearson` and `spearman`, x 100."""
    return (pearson(arrays, weights) + spearman(arrays, weights)) / 2


# ---------------------------------------------------------------------------------- conditional on running
def _running_means(arrays: Arrays, weights: Array, length: int, roll_in: str) -> Array:
    """[R, length]: E[d_t | still running at t] = sum_p w_p sum[p, t] / sum_p w_p count[p, t].

    NaN where nobody runs, but 0 if there is no error anywhere.
    """
    if not arrays[f"{roll_in}_sum"].any():
        return np.zeros((len(weights), length))
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


def excess_nats_curve(arrays: Arrays, weights: Array, length: int) -> Array:
    """[R, length]: `excess_nats` for l = 1..length."""
    teacher = accumulated_error_curve(arrays, weights, length, "teacher")
    return accumulated_error_curve(arrays, weights, length) - teacher


def _matched(arrays: Arrays) -> Arrays:
    """The `matched_` arrays under the names that the variant `alive` reads."""
    count = arrays["matched_count"]
    sums = {f"{g}_sum": arrays[key] for g in ("student", "teacher") if (key := f"matched_{g}_sum") in arrays}
    return {**sums, "student_count": count, "teacher_count": count}


def matched_error_curve(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """[R, length]: `matched_error_nats` for l = 1..length."""
    return accumulated_error_curve(_matched(arrays), weights, length, roll_in)


def ex_acc_err_matched_curve(arrays: Arrays, weights: Array, length: int) -> Array:
    """[R, length]: `ex_acc_err_matched` for l = 1..length, in percent."""
    return ex_acc_err_alive_curve(_matched(arrays), weights, length)


@estimator
def matched_error_nats(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """`accumulated_error_nats` with draw i of both roll-ins cut to the shorter of the two."""
    return accumulated_error_nats(_matched(arrays), weights, length, roll_in)


@estimator
def ex_acc_err_matched(arrays: Arrays, weights: Array, length: int) -> Array:
    """`ex_acc_err_alive` with draw i of student and of teacher roll-in both cut to the shorter, in percent.

    `matched_count`, `matched_student_sum`, `matched_teacher_sum` [P, T].
    """
    return ex_acc_err_alive(_matched(arrays), weights, length)


# ------------------------------------------------------------------------------------ as Arora et al. have it
def _steps(arrays: Arrays, weights: Array, length: int, name: str) -> Array:
    """[R, length]: sum_p w_p values[p, t], 0 beyond the arrays' last position."""
    total = _weighted(weights, arrays[name][:, :length])
    return np.pad(total, ((0, 0), (0, length - total.shape[1])))


def _responses(arrays: Arrays, weights: Array, roll_in: str) -> Array:
    """[R, 1]: how many responses there are."""
    return _weighted(weights, arrays[f"{roll_in}_count"][:, :1])


def _per_response_curve(arrays: Arrays, weights: Array, length: int, roll_in: str, column: str) -> Array:
    """[R, length]: sum_{t<l} S_g(t) E[values_t | running at t], values 0 after a response's end."""
    total = np.cumsum(_steps(arrays, weights, length, f"{roll_in}_{column}"), axis=1)
    return _divide(total, _responses(arrays, weights, roll_in))


def arora_paper_error_curve(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """[R, length]: `arora_paper_error_nats` for l = 1..length."""
    return _per_response_curve(arrays, weights, length, roll_in, "sum")


def ex_acc_err_arora_paper_curve(arrays: Arrays, weights: Array, length: int) -> Array:
    """[R, length]: `ex_acc_err_arora_paper` for l = 1..length, in percent."""
    student = arora_paper_error_curve(arrays, weights, length)
    return excess(student, arora_paper_error_curve(arrays, weights, length, "teacher"))


@estimator
def arora_paper_error_nats(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """R(l) = sum_{t<l} S_g(t) D_g(t) in nats, for 'teacher' l epsilon(l): per response, 0 after its end.

    = sum_p w_p sum_{t<l} sum[p, t] / sum_p w_p count[p, 0].
    """
    return arora_paper_error_curve(arrays, weights, length, roll_in)[:, -1]


@estimator
def ex_acc_err_arora_paper(arrays: Arrays, weights: Array, length: int) -> Array:
    """ExAccErr(l) in percent with R and E over all responses: ended ones add 0, for both models agree there.

    `student_sum`, `student_count`, `teacher_sum`, `teacher_count` [P, T].
    """
    return ex_acc_err_arora_paper_curve(arrays, weights, length)[:, -1]


def arora_code_error_curve(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """[R, length]: `arora_code_error_nats` for l = 1..length; NaN from where no response is that long."""
    if _no_error(arrays, roll_in):
        return np.zeros((len(weights), length))
    return _accumulated(arrays, weights, length, roll_in)


def _no_error(arrays: Arrays, roll_in: str) -> bool:
    return not any(arrays[f"{roll_in}_{name}"].any() for name in ("running", "context"))


def _accumulated(arrays: Arrays, weights: Array, length: int, roll_in: str) -> Array:
    count, context = arrays[f"{roll_in}_count"][:, :length], arrays[f"{roll_in}_context"]
    total = arrays[f"{roll_in}_running"][:, :length] + count * context[:, None].astype(np.float64)
    mean = _divide(_weighted(weights, total), _weighted(weights, count))
    return np.pad(mean, ((0, 0), (0, length - mean.shape[1])), constant_values=np.nan)


def ex_acc_err_arora_code_curve(arrays: Arrays, weights: Array, length: int) -> Array:
    """[R, length]: `ex_acc_err_arora_code` for l = 1..length, in percent."""
    student = arora_code_error_curve(arrays, weights, length)
    return excess(student, arora_code_error_curve(arrays, weights, length, "reference"))


@estimator
def arora_code_error_nats(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """R(l) = E[c + d_0 + ... + d_{l-1} | the response has l tokens or more] in nats, c over the prompt's.

    `<g>_context` [P], `<g>_running`, `<g>_count` [P, T]; l epsilon(l) is the same for 'reference'.
    """
    column = slice(length - 1, length)
    names = (f"{roll_in}_count", f"{roll_in}_running")
    short = {name: arrays[name][:, column] for name in names if arrays[name].shape[1] >= length}
    if not short or _no_error(arrays, roll_in):
        return arora_code_error_curve(arrays, weights, length, roll_in)[:, -1]
    short[f"{roll_in}_context"] = arrays[f"{roll_in}_context"]
    return _accumulated(short, weights, 1, roll_in)[:, 0]


@estimator
def ex_acc_err_arora_code(arrays: Arrays, weights: Array, length: int) -> Array:
    """ExAccErr(l) in percent as the code of Arora et al. has it: the oracle's prefixes are reference text.

    What a sequence has accumulated from its second token on, the prompt included, averaged over those that
    still run at l. `student_`, `reference_` `context` [P], `running`, `count` [P, T].
    """
    student = arora_code_error_nats(arrays, weights, length)
    return excess(student, arora_code_error_nats(arrays, weights, length, "reference"))


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


# ----------------------------------------------------------------------------------- length or states; growth
def excess_terms_curve(arrays: Arrays, weights: Array, length: int) -> tuple[Array, Array]:
    """(`length_term_nats`, `state_term_nats`), both [R, length] for l = 1..length."""
    alive, mean = {}, {}
    for g in ("student", "teacher"):
        alive[g] = survival_curve(arrays, weights, length, g)
        mean[g] = _running_means(arrays, weights, length, g)
    student = np.nan_to_num(np.where(np.isnan(mean["student"]), mean["teacher"], mean["student"]))
    teacher = np.nan_to_num(np.where(np.isnan(mean["teacher"]), mean["student"], mean["teacher"]))
    lengths = (alive["student"] - alive["teacher"]) * (student + teacher) / 2
    states = (alive["student"] + alive["teacher"]) / 2 * (student - teacher)
    return np.cumsum(lengths, axis=1), np.cumsum(states, axis=1)


@estimator
def length_term_nats(arrays: Arrays, weights: Array, length: int) -> Array:
    """sum_{t<l} (S_q - S_p) (D_q + D_p) / 2 in nats: the part of R - E that is due to other lengths.

    R and E as in `arora_paper_error_nats`, R - E = length term + state term. Where no response of one side
    runs, its D is taken to be the other's.
    """
    return excess_terms_curve(arrays, weights, length)[0][:, -1]


@estimator
def state_term_nats(arrays: Arrays, weights: Array, length: int) -> Array:
    """sum_{t<l} (S_q + S_p) / 2 (D_q - D_p) in nats: the part of R - E that is due to other prefixes."""
    return excess_terms_curve(arrays, weights, length)[1][:, -1]


def _slope(x: Array, y: Array) -> Array:
    """[R]: the least-squares slope of y [R, L] on x [L]; NaN for fewer than two points."""
    x = x - x.mean()
    return _divide(y @ x, np.asarray(x @ x))


@estimator
def growth_exponent(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """The least-squares slope of log R(l') on log l', l' = 1..l; 1 where each step adds the same.

    R is `accumulated_error_nats`; NaN for l = 1 or where R is 0.
    """
    error = accumulated_error_curve(arrays, weights, length, roll_in)
    log = np.log(error, out=np.full_like(error, np.nan), where=error > 0)
    return _slope(np.log(np.arange(1.0, length + 1)), log)


def eb_c_curve(arrays: Arrays, weights: Array, length: int) -> Array:
    """[R, length]: `eb_c` for l = 1..length."""
    student = _running_means(arrays, weights, length, "student")
    teacher = _running_means(arrays, weights, length, "teacher")
    return np.where((student == 0) & (teacher == 0), 1.0, _divide(student, teacher))


@estimator
def eb_c(arrays: Arrays, weights: Array, length: int) -> Array:
    """EB-C of He et al. 2021: D_q / D_p at position l - 1; 1 is no exposure bias, and where both are 0.

    Differs: He et al. index by the length of the prefix, so this is their EB-C(l - 1).

    `student_sum`, `student_count`, `teacher_sum`, `teacher_count` [P, T].
    """
    return eb_c_curve(arrays, weights, length)[:, -1]


def state_shift_curve(arrays: Arrays, weights: Array, length: int) -> Array:
    """[R, length]: `state_shift_nats` for l = 1..length."""
    return _per_response_curve(arrays, weights, length, "student", "reverse_kl")


@estimator
def state_shift_nats(arrays: Arrays, weights: Array, length: int) -> Array:
    """KL(d^q||d^p) of the distributions of prefixes of l tokens, in nats (an ended prefix stays as it is).

    = sum_{t<l} S_q(t) E_q[KL(q_t||p_t) | running at t]; `student_reverse_kl`, `student_count` [P, T].
    """
    return state_shift_curve(arrays, weights, length)[:, -1]


def state_shift_reverse_curve(arrays: Arrays, weights: Array, length: int) -> Array:
    """[R, length]: `state_shift_reverse_nats` for l = 1..length."""
    return _per_response_curve(arrays, weights, length, "teacher", "forward_kl")


@estimator
def state_shift_reverse_nats(arrays: Arrays, weights: Array, length: int) -> Array:
    """KL(d^p||d^q) of prefixes of l tokens in nats; `teacher_forward_kl`, `teacher_count` [P, T]."""
    return state_shift_reverse_curve(arrays, weights, length)[:, -1]


# ------------------------------------------------------------------- over all tokens of the first l positions
def _pooled(arrays: Arrays, weights: Array, length: int, roll_in: str, column: str) -> Array:
    """[R]: the mean of `column` over all tokens at positions 0..l-1."""
    names = (f"{roll_in}_{column}", f"{roll_in}_count")
    sums = [arrays[name][:, :length].sum(axis=1, dtype=np.float64) for name in names]
    return ratio({"numerator": sums[0], "denominator": sums[1]}, weights)


@estimator
def acceptance(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """Mean of 1 - TV(p, q) over tokens: the share that speculative sampling would accept.

    `<g>_total_variation`, `<g>_count` [P, T], pooled over positions 0..l-1.
    """
    return 1 - _pooled(arrays, weights, length, roll_in, "total_variation")


@estimator
def acceptance_drop(arrays: Arrays, weights: Array, length: int) -> Array:
    """`acceptance` under the teacher's prefixes less that under the student's."""
    student = acceptance(arrays, weights, length)
    return acceptance(arrays, weights, length, "teacher") - student


@estimator
def agreement(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """The share of tokens where both models have the same first choice; `<g>_agree`, `<g>_count` [P, T]."""
    return _pooled(arrays, weights, length, roll_in, "agree")


@estimator
def teacher_entropy(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """Mean entropy of the teacher over tokens in nats; `<g>_teacher_entropy`, `<g>_count` [P, T]."""
    return _pooled(arrays, weights, length, roll_in, "teacher_entropy")


@estimator
def teacher_entropy_rise(arrays: Arrays, weights: Array, length: int) -> Array:
    """`teacher_entropy` on the student's prefixes less that on its own, in nats: high where it is lost."""
    own = teacher_entropy(arrays, weights, length, "teacher")
    return teacher_entropy(arrays, weights, length) - own


@estimator
def teacher_surprise(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """Mean of -log p(y_t) over tokens in nats; `<g>_surprise`, `<g>_count` [P, T]."""
    return _pooled(arrays, weights, length, roll_in, "surprise")


@estimator
def teacher_surprise_rise(arrays: Arrays, weights: Array, length: int) -> Array:
    """`teacher_surprise` under the student's roll-in less that under its own, in nats."""
    own = teacher_surprise(arrays, weights, length, "teacher")
    return teacher_surprise(arrays, weights, length) - own


@estimator
def entropy_drift(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """The least-squares slope over t < l of E[student's entropy at t | running at t], nats per token.

    `<g>_student_entropy`, `<g>_count` [P, T]; NaN for l = 1 or where no response is that long.
    """
    renamed = {f"{roll_in}_sum": arrays[f"{roll_in}_student_entropy"]}
    renamed[f"{roll_in}_count"] = arrays[f"{roll_in}_count"]
    return _slope(np.arange(float(length)), _running_means(renamed, weights, length, roll_in))


# ------------------------------------------------------------------------------------------------- repetition
@estimator
def seq_rep(arrays: Arrays, weights: Array, n: int, roll_in: str = "student") -> Array:
    """seq-rep-n: the mean over responses of 1 - unique / total n-grams, n = 2, 3 or 4.

    `<g>_seq_rep_<n>`, `<g>_seq_rep_<n>_count` [P]; responses of fewer than n tokens are left out.
    """
    name = f"{roll_in}_seq_rep_{n}"
    return ratio({"numerator": arrays[name], "denominator": arrays[f"{name}_count"]}, weights)


@estimator
def rep(arrays: Arrays, weights: Array, window: int, length: int, roll_in: str = "student") -> Array:
    """rep/l: the share of the first l tokens that occur among the `window` (16, 32, 128) tokens before them.

    `<g>_rep_<window>`, `<g>_count` [P, T].
    """
    return _pooled(arrays, weights, length, roll_in, f"rep_{window}")


@estimator
def loop_rate(arrays: Arrays, weights: Array, roll_in: str = "student") -> Array:
    """The share of responses that end in a loop; `<g>_loop`, `<g>_count` [P, T]."""
    loops = arrays[f"{roll_in}_loop"].sum(axis=1)
    return ratio({"numerator": loops, "denominator": arrays[f"{roll_in}_count"][:, 0]}, weights)


@estimator
def loop_onset_tokens(arrays: Arrays, weights: Array, roll_in: str = "student") -> Array:
    """The mean number of tokens before the loop of a response that ends in one; NaN where none does."""
    loops = arrays[f"{roll_in}_loop"]
    onset = loops @ np.arange(loops.shape[1])
    return ratio({"numerator": onset, "denominator": loops.sum(axis=1)}, weights)


# ---------------------------------------------------------------------------------------------------- lengths
@estimator
def stop_rate(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """The share of responses whose end token is among the first l; `<g>_ended`, `<g>_count` [P, T]."""
    return _per_response_curve(arrays, weights, length, roll_in, "ended")[:, -1]


@estimator
def truncation_rate(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """The share of responses without an end token, for l = max_new_tokens: 1 - `stop_rate`."""
    return 1 - stop_rate(arrays, weights, length, roll_in)


@estimator
def length_quantile_tokens(arrays: Arrays, weights: Array, level: float, roll_in: str = "student") -> Array:
    """The least n such that a share of at least `level` of the responses has n tokens or fewer."""
    count = arrays[f"{roll_in}_count"]
    longer = survival_curve(arrays, weights, count.shape[1], roll_in)
    below = (1 - longer[:, 1:] < level - 1e-9).sum(axis=1)
    return np.where(np.isnan(longer[:, 0]), np.nan, 1.0 + below)


@estimator
def eos_hazard(arrays: Arrays, weights: Array, length: int, roll_in: str = "student") -> Array:
    """The share of the first l tokens that are the end token: the mean chance to stop at a token."""
    return _pooled(arrays, weights, length, roll_in, "ended")


@estimator
def eos_hazard_ratio(arrays: Arrays, weights: Array, length: int) -> Array:
    """`eos_hazard` of the student's roll-in over that of the teacher's; NaN where the teacher never stops."""
    return _divide(eos_hazard(arrays, weights, length), eos_hazard(arrays, weights, length, "teacher"))
