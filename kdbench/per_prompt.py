"""From evidence to arrays per prompt: sums over a prompt's responses, what `kdbench.estimators` reads.

Source: repetition after Welleck et al. 2020, https://arxiv.org/abs/1908.04319, sec. 6 (seq-rep-n, rep/l).
Differs: seq-rep-n is the mean over responses, each with its end token where it has one; rep/l looks back over
response tokens only.

Shapes: P prompts in order of example_id, T positions 0..longest response - 1 over *all* roll-ins of the
evidence, S draws, N = P S responses in order of example_id, then draw. Divergences are in nats (total
variation has no unit).
"""

import numpy as np

from kdbench.estimators import Array, minillm_step_errors
from kdbench.evidence import DIVERGENCES, ROLL_INS, Evidence
from kdbench.record import RecordError

GRAMS = (2, 3, 4)
WINDOWS = (16, 32, 128)
MAX_PERIOD = 8
MIN_REPEATS = 3


class _RollIn:
    """The responses of one roll-in: `tokens` [N] (end token included), `ended` [N], `examples` [N]."""

    def __init__(self, evidence: Evidence, name: str) -> None:
        self._columns = evidence.columns
        rows = np.flatnonzero((evidence.roll_in == ROLL_INS.index(name)) & ~self._columns["context"])
        first = self._columns["position"][rows] == 0
        alive = self._columns["alive"][rows]
        response = np.cumsum(first) - 1
        self.examples = self._columns["example_id"][rows[first]]
        self.ended = np.ones(len(self.examples), dtype=bool)
        self.ended[response[~alive]] = False
        self._rows, self._response = rows[alive], response[alive]
        self.tokens = np.bincount(self._response, minlength=len(self.examples))
        self.prompts = np.unique(self.examples)
        self.draws = len(self.examples) // len(self.prompts)

    def matrix(self, column: str, width: int) -> Array:
        """[N, width]: the column's value at each position of each response, 0 after its last token."""
        out = np.zeros((len(self.examples), width), dtype=self._columns[column].dtype)
        out[self._response, self._columns["position"][self._rows]] = self._columns[column][self._rows]
        return out

    def per_prompt(self, values: Array) -> Array:
        """Sums over draws, [N, ...] to [P, ...]: numbers as float32, counts and flags as int32."""
        grouped = values.reshape(len(self.prompts), self.draws, *values.shape[1:])
        if values.dtype.kind in "bi":
            return np.asarray(grouped.sum(axis=1), dtype=np.int32)
        return np.asarray(grouped.sum(axis=1, dtype=np.float64), dtype=np.float32)


def _previous(token: Array, alive: Array) -> tuple[Array, Array]:
    """(steps back to the same token [N, T], 0 where it is new; code [N, T] of a response's own tokens)."""
    width = token.shape[1]
    position = np.arange(width)
    key = np.where(alive, token.astype(np.int64), np.iinfo(np.int32).max) * width + position
    key.sort(axis=1)
    token, at = np.divmod(key, width)
    same = token[:, 1:] == token[:, :-1]
    back, code = np.zeros_like(key), np.zeros_like(key)
    np.put_along_axis(back, at[:, 1:], np.where(same, np.diff(at, axis=1), 0), axis=1)
    np.put_along_axis(code, at[:, 1:], np.cumsum(~same, axis=1), axis=1)
    return back, code


def _seq_rep(code: Array, tokens: Array, n: int) -> Array:
    """[N]: 1 - unique / total n-grams of each response; 0 where it has fewer than n tokens."""
    count, width = code.shape
    if width < n:
        return np.zeros(count)
    key = np.zeros((count, width - n + 1), dtype=np.int64)
    for i in range(n):
        key = key * width + code[:, i : i + width - n + 1]
    total = np.maximum(tokens - n + 1, 0)
    key[np.arange(width - n + 1) >= total[:, None]] = -1
    key.sort(axis=1)
    unique = (np.diff(key, axis=1, prepend=-1) != 0).sum(axis=1)
    return np.where(total > 0, 1 - unique / np.maximum(total, 1), 0.0)


def _loop_onset(token: Array, body: Array) -> Array:
    """[N]: where the loop that runs to the end of the first `body` [N] tokens begins; -1 without one.

    The least t such that tokens t..body - 1 have a period k <= `MAX_PERIOD` and at least `MIN_REPEATS` k
    tokens.
    """
    count, width = token.shape
    onset = np.full(count, width)
    for k in range(1, min(MAX_PERIOD, width // MIN_REPEATS) + 1):
        differs = (token[:, k:] != token[:, :-k]) & (np.arange(k, width) < body[:, None])
        last = width - k - np.argmax(differs[:, ::-1], axis=1)  # one past the last difference, less k
        start = np.where(differs.any(axis=1), last, 0)
        onset = np.where(body - start >= MIN_REPEATS * k, np.minimum(onset, start), onset)
    return np.where(onset < width, onset, -1)


def _at(position: Array, where: Array, width: int) -> Array:
    """[N, width] bool: True at `position` [N] of the responses `where` [N]."""
    return np.asarray((np.arange(width) == position[:, None]) & where[:, None])


def _repetition(roll: _RollIn, alive: Array) -> dict[str, Array]:
    """The arrays of repetition of one roll-in, named without it."""
    width = alive.shape[1]
    token = roll.matrix("token", width)
    back, code = _previous(token, alive)
    onset = _loop_onset(token, roll.tokens - roll.ended)
    found = {"loop": _at(onset, onset >= 0, width)}
    for n in GRAMS:
        found[f"seq_rep_{n}"] = _seq_rep(code, roll.tokens, n)
        found[f"seq_rep_{n}_count"] = roll.tokens >= n
    for window in WINDOWS:
        found[f"rep_{window}"] = alive & (back > 0) & (back <= window)
    return found


def arrays(evidence: Evidence, divergence: str = "forward_kl") -> dict[str, Array]:
    """All arrays that the estimators read, for each roll-in g of the evidence; d is the divergence.

    float32 sums and int32 counts over a prompt's draws; a draw is alive at t if it has a token there (the end
    token included), and n is its number of tokens.

    prompt [P] int64        example_id
    g_count, g_ended [P, T]             draws alive at t; draws whose end token is at t
    g_sum, g_running [P, T]             over draws alive at t, of d_t and of d_0 + ... + d_t
    g_context [P]           sum of d over the prompt's own tokens, only where the evidence has context rows
    g_step [P, J]           `minillm_step_errors`, J of this roll-in
    g_forward_kl, g_reverse_kl, g_total_variation, g_student_entropy, g_teacher_entropy [P, T]
                            over draws alive at t, whatever d is
    g_surprise, g_student_surprise [P, T]       of -log p(y_t) and of -log q(y_t)
    g_agree [P, T]          draws alive at t where both models have the same first choice
    g_seq_rep_n, g_seq_rep_n_count [P]  n = 2, 3, 4: sum over draws of 1 - unique / total n-grams; draws that
                            have any
    g_rep_w [P, T]          w = 16, 32, 128: draws alive at t whose token is one of the w tokens before it
    g_loop [P, T]           draws whose loop begins at t: from there to the end (the end token left out) the
                            response has a period of at most 8 tokens, at least three times
    matched_count, matched_student_sum, matched_teacher_sum [P, T]      where both are roll-ins: draw i of
                            the student with draw i of the teacher, both cut to the shorter of the two

    Raises: RecordError for an unknown divergence, or where roll-ins are of different prompts.
    """
    if divergence not in DIVERGENCES:
        raise RecordError(f"no divergence '{divergence}'. Known: {', '.join(DIVERGENCES)}.")
    rolls = {name: _RollIn(evidence, name) for name in evidence.roll_ins}
    first, *others = rolls
    for name in others:
        if not np.array_equal(rolls[name].prompts, rolls[first].prompts):
            raise RecordError(f"the evidence has other prompts under {name} than under {first} roll-in.")
    width = max(int(roll.tokens.max()) for roll in rolls.values())
    found: dict[str, Array] = {"prompt": rolls[first].prompts.astype(np.int64)}
    errors = {name: roll.matrix(divergence, width).astype(np.float64) for name, roll in rolls.items()}
    for name, roll in rolls.items():
        alive = np.arange(width) < roll.tokens[:, None]
        mine = {
            "count": alive,
            "ended": _at(roll.tokens - 1, roll.ended, width),
            "sum": errors[name],
            "running": np.where(alive, np.cumsum(errors[name], axis=1), 0),
            "surprise": 0 - roll.matrix("teacher_log_prob", width),
            "student_surprise": 0 - roll.matrix("student_log_prob", width),
            "agree": roll.matrix("top1_agree", width),
            **_repetition(roll, alive),
        }
        for column in ("forward_kl", "reverse_kl", "total_variation", "student_entropy", "teacher_entropy"):
            mine[column] = roll.matrix(column, width)
        found |= {f"{name}_{key}": roll.per_prompt(values) for key, values in mine.items()}
        steps, _ = minillm_step_errors(*evidence.after(name, divergence))
        found[f"{name}_step"] = steps.astype(np.float32)
        context = np.flatnonzero((evidence.roll_in == ROLL_INS.index(name)) & evidence.columns["context"])
        if len(context):
            at = np.searchsorted(found["prompt"], evidence.columns["example_id"][context])
            values = evidence.columns[divergence][context]
            total = np.bincount(at, weights=values, minlength=len(found["prompt"]))
            found[f"{name}_context"] = total.astype(np.float32)
    if {"student", "teacher"} <= set(rolls):
        found |= _matched(rolls["student"], rolls["teacher"], errors)
    return found


def _matched(student: _RollIn, teacher: _RollIn, errors: dict[str, Array]) -> dict[str, Array]:
    """The arrays `matched_*` from the draws that both roll-ins have; `errors` [N, T] by roll-in."""
    prompts, draws = len(student.prompts), min(student.draws, teacher.draws)

    def common(roll: _RollIn, values: Array) -> Array:
        return values.reshape(prompts, roll.draws, *values.shape[1:])[:, :draws]

    tokens = np.minimum(common(student, student.tokens), common(teacher, teacher.tokens))
    alive = np.arange(errors["student"].shape[1]) < tokens[..., None]
    found: dict[str, Array] = {"matched_count": alive.sum(axis=1, dtype=np.int32)}
    for name, roll in (("student", student), ("teacher", teacher)):
        values = np.where(alive, common(roll, errors[name]), 0).sum(axis=1)
        found[f"matched_{name}_sum"] = values.astype(np.float32)
    return found
