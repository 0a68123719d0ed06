"""What every estimator would find with infinitely many prompts, by dynamic programming over automaton states.

Student, teacher and reference writer read the same prefix, so their three states are one product state z, and
the next z follows from z and the token. Under roll-in by g, alpha_t[z] = P(no end token yet, state z at
position t) is a forward recursion; an estimator is a function of ratios of means over prompts and draws, so
its limit is the same function of sums over z. All values are float64, exact up to rounding.

Source: forward recursion, Rabiner 1989, https://doi.org/10.1109/5.18626, sec. III.
Differs: of the tokens only the end token is an event; `matched` runs the recursion on pairs of product
states, because both roll-ins of a draw use the same uniform number at a position and so are dependent.
"""

from __future__ import annotations

from functools import cache, cached_property
from math import comb

import numpy as np
from scipy import sparse

from kdbench.worlds.tables import Array, World

ROLL_INS = ("student", "teacher", "reference")


class Paths:
    """The product states of a world, what is measured there, and how likely they are under each roll-in.

    Shapes: K prompts, N product states, V tokens, T = max_new_tokens.

    next            [N, V] product state after each token (of the end token: 0, never used)
    prob, moves     by roll-in: [N, V] probabilities, and [N, N] those of going on from state to state
    measures        by name: [N], in nats but for total_variation and top1_agree
    start, context  [K] state that predicts the first response token; per prompt, those that predict its own
    alpha           by roll-in: [T + 1, K, N] P(prompt k, no end token among the first t, then state z)
    """

    def __init__(self, world: World) -> None:
        self.world = world
        models = (world.student, world.teacher, world.reference)
        sizes = [len(model.log_prob) for model in models]

        def step(codes: Array) -> Array:
            at = np.unravel_index(codes, sizes)
            after = tuple(model.next_state[part] for model, part in zip(models, at, strict=True))
            return np.asarray(np.ravel_multi_index(after, sizes))

        walks = [
            np.ravel_multi_index([np.array(model.walk(prompt)) for model in models], sizes)
            for prompt in world.prompts
        ]
        seen = frontier = np.unique(np.concatenate(walks))
        while len(frontier):
            frontier = np.setdiff1d(step(frontier)[:, 1:], seen)
            seen = np.union1d(seen, frontier)
        self.next = np.searchsorted(seen, step(seen))
        self.next[:, 0] = 0
        self.start = np.searchsorted(seen, [walk[-1] for walk in walks])
        self.context = [np.searchsorted(seen, walk[:-1]) for walk in walks]
        at = np.unravel_index(seen, sizes)
        self.log_prob = {g: m.log_prob[part] for g, m, part in zip(ROLL_INS, models, at, strict=True)}
        self.prob = {g: np.exp(value) for g, value in self.log_prob.items()}
        self.measures = _measures(self.log_prob["student"], self.log_prob["teacher"])
        self.moves = {g: self._moves(g) for g in ROLL_INS}
        self.alpha = {g: self._forward(g) for g in ROLL_INS}

    def _moves(self, roll_in: str) -> sparse.csr_array:
        n, v = self.next.shape
        mass, rows = self.prob[roll_in][:, 1:].ravel(), np.repeat(np.arange(n), v - 1)
        return sparse.csr_array((mass, (rows, self.next[:, 1:].ravel())), shape=(n, n))

    def _forward(self, roll_in: str) -> Array:
        alpha = np.zeros((self.world.max_new_tokens + 1, len(self.start), len(self.next)))
        alpha[0, np.arange(len(self.start)), self.start] = self.world.weights
        for t in range(1, len(alpha)):
            alpha[t] = alpha[t - 1] @ self.moves[roll_in]
        return alpha

    @cached_property
    def coupled(self) -> tuple[Array, Array, Array]:
        """(student path's state [M], teacher path's [M], P(neither ended before t, these states) [T, M]).

        Both draw by inverse CDF from one uniform number, so tokens (a, b) have the probability by which the
        intervals of a and of b overlap.
        """
        n = len(self.next)
        cdf_q, cdf_p = (self.prob[g].cumsum(axis=1) for g in ("student", "teacher"))
        first = self.start * (n + 1)
        seen = frontier = np.unique(first)
        source, target, mass = [], [], []
        while len(frontier):
            i, j = np.divmod(frontier, n)
            high = np.minimum(cdf_q[i, 1:, None], cdf_p[j, None, 1:])
            low = np.maximum(cdf_q[i, :-1, None], cdf_p[j, None, :-1])
            pair, a, b = np.nonzero(high > low)
            source.append(frontier[pair])
            target.append(self.next[i[pair], a + 1] * n + self.next[j[pair], b + 1])
            mass.append((high - low)[pair, a, b])
            frontier = np.setdiff1d(target[-1], seen)
            seen = np.union1d(seen, frontier)
        rows, columns = (np.searchsorted(seen, np.concatenate(codes)) for codes in (source, target))
        moves = sparse.csr_array((np.concatenate(mass), (rows, columns)), shape=(len(seen), len(seen)))
        both = np.zeros((self.world.max_new_tokens, len(seen)))
        np.add.at(both[0], np.searchsorted(seen, first), self.world.weights)
        for t in range(1, len(both)):
            both[t] = both[t - 1] @ moves
        return seen // n, seen % n, both


def _measures(log_q: Array, log_p: Array) -> dict[str, Array]:
    """Name -> [N] of log-probabilities [N, V]."""
    q, p = np.exp(log_q), np.exp(log_p)
    ratio = log_p - log_q  # log q/m = -log((1 + p/q) / 2) for m = (p + q) / 2, exactly 0 where q = p
    return {
        "forward_kl": (p * ratio).sum(axis=1),
        "reverse_kl": -(q * ratio).sum(axis=1),
        "jsd": -(p * np.log((1 + np.exp(-ratio)) / 2) + q * np.log((1 + np.exp(ratio)) / 2)).sum(axis=1) / 2,
        "total_variation": np.abs(q - p).sum(axis=1) / 2,
        "student_entropy": -(q * log_q).sum(axis=1),
        "teacher_entropy": -(p * log_p).sum(axis=1),
        "top1_agree": (q.argmax(axis=1) == p.argmax(axis=1)).astype(np.float64),
    }


@cache
def paths(world: World) -> Paths:
    """The paths of a world, computed once."""
    return Paths(world)


def _excess(student: Array, teacher: Array) -> Array:
    same = (student == 0) & (teacher == 0)
    return np.where(same, 0.0, 100 * (student - teacher) / np.where(teacher == 0, np.nan, teacher))


def _slope(x: Array, y: Array) -> float:
    """Least-squares slope; NaN of a single point."""
    x = x - x.mean()
    return float((x @ y) / (x @ x)) if len(x) > 1 else float("nan")


class Truth:
    """The limit of every estimator in one world, by methods named like those of `kdbench.estimators`.

    Repetition is left out: its state would be the whole response.

    `divergence` is the d of the arrays; `samples` S, the draws per prompt, moves the `minillm` values alone
    (a prompt with c live draws divides by c + 1e-3). `length` l counts response tokens, 1 to T. Methods named
    *_curve are [T], entry l - 1 for length l (or entry t for position t).
    """

    def __init__(self, world: World, divergence: str = "forward_kl", samples: int = 1) -> None:
        self.world, self.samples, self.paths = world, samples, paths(world)
        self.d = self.paths.measures[divergence]

    def value(self, name: str, **args: object) -> float:
        """The truth of estimator `name` with its arguments, in its unit.

        Raises: ValueError for an estimator whose truth is not computed here.
        """
        if not self.knows(name):
            raise ValueError(f"no truth of estimator '{name}'")
        return float(getattr(self, name)(**args))

    @classmethod
    def knows(cls, name: str) -> bool:
        """Whether `value` has the truth of this estimator."""
        helper = name in ("value", "knows", "curve") or name.startswith("_") or name.endswith("_curve")
        return not helper and callable(getattr(cls, name, None))

    def curve(self, name: str, **args: object) -> Array:
        """[T]: `value` at every length."""
        lengths = range(1, self.world.max_new_tokens + 1)
        return np.array([self.value(name, length=length, **args) for length in lengths])

    # --------------------------------------------------------------------------------- lengths
    def survival_curve(self, roll_in: str = "student") -> Array:
        """S(t), entry t: the share of responses with a token at t."""
        return np.asarray(self.paths.alpha[roll_in][:-1].sum(axis=(1, 2)))

    def survival(self, length: int, roll_in: str = "student") -> float:
        return float(self.survival_curve(roll_in)[length - 1])

    def mean_length_tokens(self, roll_in: str = "student") -> float:
        return float(self.survival_curve(roll_in).sum())

    def length_probability_curve(self, roll_in: str = "student") -> Array:
        """Entry n - 1: the share of responses with n tokens (a cut one has T)."""
        return -np.diff(self.survival_curve(roll_in), append=0.0)

    def length_quantile_tokens(self, level: float, roll_in: str = "student") -> float:
        reached = np.cumsum(self.length_probability_curve(roll_in)) >= level - 1e-12
        return float(np.argmax(reached) + 1)

    def stop_rate(self, length: int, roll_in: str = "student") -> float:
        return float(1 - self.paths.alpha[roll_in][length].sum())

    def truncation_rate(self, length: int, roll_in: str = "student") -> float:
        return 1 - self.stop_rate(length, roll_in)

    def eos_hazard(self, length: int, roll_in: str = "student") -> float:
        return float(self.stop_rate(length, roll_in) / self.survival_curve(roll_in)[:length].sum())

    def eos_hazard_ratio(self, length: int) -> float:
        return self.eos_hazard(length) / self.eos_hazard(length, "teacher")

    # --------------------------------------------------------------------------------- accumulated error
    def _sums(self, measure: Array, roll_in: str) -> Array:
        """[T]: E[measure at t, 0 where the response has ended]; `measure` [N]."""
        return np.asarray((self.paths.alpha[roll_in][:-1] @ measure).sum(axis=1))

    def divergence_curve(self, roll_in: str = "student") -> Array:
        """D(t) = E[d_t | running at t], entry t."""
        return self._sums(self.d, roll_in) / self.survival_curve(roll_in)

    def alive_error_curve(self, roll_in: str = "student") -> Array:
        return np.cumsum(self.divergence_curve(roll_in))

    def arora_paper_error_curve(self, roll_in: str = "student") -> Array:
        return np.cumsum(self._sums(self.d, roll_in))

    def arora_code_error_curve(self, roll_in: str = "student") -> Array:
        """E[prompt's own d + d_0 + ... + d_{l-1} | n >= l]."""
        alpha, moves = self.paths.alpha[roll_in][:-1], self.paths.moves[roll_in]
        context = np.array([self.d[states].sum() for states in self.paths.context])
        total = context[:, None] * alpha[0]  # E[what was accumulated; prompt, state]
        out = np.zeros(len(alpha))
        for t in range(len(alpha)):
            if t:
                total = total @ moves
            total = total + alpha[t] * self.d
            out[t] = total.sum() / alpha[t].sum()
        return out

    def minillm_error_curve(self, roll_in: str = "student") -> Array:
        alpha, weights = self.paths.alpha[roll_in][1:], self.world.weights
        running = alpha.sum(axis=2)  # [T, K]
        chance, n = running / weights, self.samples
        share = sum(  # E[c / (c + 1e-3)] for c live draws of a prompt
            c / (c + 1e-3) * comb(n, c) * chance**c * (1 - chance) ** (n - c) for c in range(1, n + 1)
        )
        return np.cumsum((weights * share * (alpha @ self.d) / running).sum(axis=1))

    def matched_error_curve(self, roll_in: str = "student") -> Array:
        student, teacher, both = self.paths.coupled
        at = student if roll_in == "student" else teacher
        return np.cumsum((both @ self.d[at]) / both.sum(axis=1))

    def accumulated_error_nats(self, length: int, roll_in: str = "student") -> float:
        return float(self.alive_error_curve(roll_in)[length - 1])

    def arora_paper_error_nats(self, length: int, roll_in: str = "student") -> float:
        return float(self.arora_paper_error_curve(roll_in)[length - 1])

    def arora_code_error_nats(self, length: int, roll_in: str = "student") -> float:
        return float(self.arora_code_error_curve(roll_in)[length - 1])

    def minillm_error_nats(self, length: int, roll_in: str = "student") -> float:
        return float(self.minillm_error_curve(roll_in)[length - 1])

    def matched_error_nats(self, length: int, roll_in: str = "student") -> float:
        return float(self.matched_error_curve(roll_in)[length - 1])

    def excess_nats(self, length: int) -> float:
        return self.accumulated_error_nats(length) - self.accumulated_error_nats(length, "teacher")

    def ex_acc_err_alive(self, length: int) -> float:
        curves = self.alive_error_curve(), self.alive_error_curve("teacher")
        return float(_excess(*curves)[length - 1])

    def ex_acc_err_arora_paper(self, length: int) -> float:
        curves = self.arora_paper_error_curve(), self.arora_paper_error_curve("teacher")
        return float(_excess(*curves)[length - 1])

    def ex_acc_err_arora_code(self, length: int) -> float:
        curves = self.arora_code_error_curve(), self.arora_code_error_curve("reference")
        return float(_excess(*curves)[length - 1])

    def ex_acc_err_minillm(self, length: int) -> float:
        curves = self.minillm_error_curve(), self.minillm_error_curve("teacher")
        return float(_excess(*curves)[length - 1])

    def ex_acc_err_matched(self, length: int) -> float:
        curves = self.matched_error_curve(), self.matched_error_curve("teacher")
        return float(_excess(*curves)[length - 1])

    def length_term_nats(self, length: int) -> float:
        (s_q, d_q), (s_p, d_p) = ((self.survival_curve(g), self.divergence_curve(g)) for g in ROLL_INS[:2])
        return float(((s_q - s_p) * (d_q + d_p) / 2)[:length].sum())

    def state_term_nats(self, length: int) -> float:
        (s_q, d_q), (s_p, d_p) = ((self.survival_curve(g), self.divergence_curve(g)) for g in ROLL_INS[:2])
        return float(((s_q + s_p) / 2 * (d_q - d_p))[:length].sum())

    def growth_exponent(self, length: int, roll_in: str = "student") -> float:
        error = self.alive_error_curve(roll_in)[:length]
        log = np.log(np.where(error > 0, error, np.nan))
        return _slope(np.log(np.arange(1, length + 1)), log)

    def eb_c(self, length: int) -> float:
        student, teacher = (self.divergence_curve(g)[length - 1] for g in ("student", "teacher"))
        return 1.0 if student == teacher else float(student / teacher)

    # --------------------------------------------------------------------------------- states
    def state_shift_nats(self, length: int) -> float:
        return float(self._sums(self.paths.measures["reverse_kl"], "student")[:length].sum())

    def state_shift_reverse_nats(self, length: int) -> float:
        return float(self._sums(self.paths.measures["forward_kl"], "teacher")[:length].sum())

    def _pooled(self, measure: Array, length: int, roll_in: str) -> float:
        """The mean of `measure` [N] over live positions t < length."""
        total = self._sums(measure, roll_in)[:length].sum()
        return float(total / self.survival_curve(roll_in)[:length].sum())

    def acceptance(self, length: int, roll_in: str = "student") -> float:
        return self._pooled(1 - self.paths.measures["total_variation"], length, roll_in)

    def acceptance_drop(self, length: int) -> float:
        return self.acceptance(length, "teacher") - self.acceptance(length, "student")

    def teacher_entropy(self, length: int, roll_in: str = "student") -> float:
        return self._pooled(self.paths.measures["teacher_entropy"], length, roll_in)

    def teacher_entropy_rise(self, length: int) -> float:
        return self.teacher_entropy(length) - self.teacher_entropy(length, "teacher")

    def teacher_surprise(self, length: int, roll_in: str = "student") -> float:
        mean = -(self.paths.prob[roll_in] * self.paths.log_prob["teacher"]).sum(axis=1)
        return self._pooled(mean, length, roll_in)

    def teacher_surprise_rise(self, length: int) -> float:
        return self.teacher_surprise(length) - self.teacher_surprise(length, "teacher")

    def agreement(self, length: int, roll_in: str = "student") -> float:
        return self._pooled(self.paths.measures["top1_agree"], length, roll_in)

    def entropy_drift(self, length: int, roll_in: str = "student") -> float:
        mean = self._sums(self.paths.measures["student_entropy"], roll_in) / self.survival_curve(roll_in)
        return _slope(np.arange(length, dtype=np.float64), mean[:length])
