"""The worlds that estimators are certified on.

Token 0 ends a response; prompts are made of ordinary tokens. All probabilities are positive, so every
divergence is finite. A student differs from its teacher by what it cannot represent (`markov2`, `hidden`,
`grammar`) or by noise on the teacher's logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from kdbench.worlds.tables import Array, Automaton, World

TEACHER_STOP = 0.03  # of the worlds where only the student's stop rate changes


def _stopping(logits: Array, stop: Array | float) -> Array:
    """[S, V] log-probabilities: the end token with probability `stop`, else by `logits` [S, V - 1]."""
    rate = np.broadcast_to(np.asarray(stop, dtype=np.float64), len(logits))
    other = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.column_stack([np.log(rate), np.log1p(-rate)[:, None] + other])


def _world(
    name: str,
    description: str,
    teacher: Automaton,
    student: Automaton,
    prompts: Sequence[Sequence[int]],
    reference: Automaton | None = None,
) -> World:
    """A world whose prompts have weights 1 : 2 : 3 : ..."""
    weights = np.arange(1, len(prompts) + 1, dtype=np.float64)
    texts = tuple(tuple(prompt) for prompt in prompts)
    return World(name, description, teacher, student, texts, weights / weights.sum(), writer=reference)


def _suffixes(symbols: int, order: int) -> tuple[list[tuple[int, ...]], Array]:
    """States = the last `order` tokens (fewer at first), shortest first; and next_state [S, symbols + 1]."""
    alphabet = range(1, symbols + 1)
    states = [text for n in range(order + 1) for text in itertools.product(alphabet, repeat=n)]
    index = {text: i for i, text in enumerate(states)}
    after = [[0, *(index[(*text, token)[-order:]] for token in alphabet)] for text in states]
    return states, np.array(after)


# --------------------------------------------------------------------------------------------- Markov chains
def _noisy_chain(stop_q: float, stop_p: float) -> tuple[Automaton, Automaton]:
    """(teacher, student): order-1 chains over 8 tokens; given that it goes on, the student's is fixed."""
    rng = np.random.default_rng(1)
    _, after = _suffixes(8, 1)
    logits = 1.5 * rng.standard_normal((9, 8))
    hard = np.linspace(0.2, 1.0, 9)[:, None]  # some tokens are harder to go on from than others
    noise = hard * rng.standard_normal((9, 8))
    return Automaton(after, _stopping(logits, stop_p)), Automaton(after, _stopping(logits + noise, stop_q))


_CHAIN_PROMPTS = ((1,), (2,), (3, 4), (5, 1), (6,), (8, 7))


def markov1() -> World:
    """Order-1 chain over 8 tokens; a noisy student; both stop with probability 0.02 everywhere."""
    teacher, student = _noisy_chain(0.02, 0.02)
    return _world("markov1", "order-1 Markov chain, equal stop rates", teacher, student, _CHAIN_PROMPTS)


def equal() -> World:
    """The teacher of `markov1` as its own student: every error is exactly 0."""
    teacher, _ = _noisy_chain(0.02, 0.02)
    return _world("equal", "teacher equal to student", teacher, teacher, _CHAIN_PROMPTS)


def stop_rate(rate: float, name: str = "") -> World:
    """`markov1` where the teacher stops with `TEACHER_STOP` and the student with `rate`.

    Given that the student goes on, its distribution is the same for every rate. The divergences contain that
    of stopping itself, KL(Bernoulli(0.03) || Bernoulli(rate)) in the forward case, at every position, so the
    truth of `alive` moves a little with the rate. That of `matched` moves more: where the two stop rates
    differ, that both go on says something about the uniform number they share, and so about their tokens.
    """
    teacher, student = _noisy_chain(rate, TEACHER_STOP)
    about = f"order-1 chain, stop rates {TEACHER_STOP:g} (teacher) and {rate:g} (student)"
    return _world(name or f"stop_rate_{rate:g}", about, teacher, student, _CHAIN_PROMPTS)


def stops_earlier() -> World:
    """A student that stops more than twice as often; one in ten of its responses has 30 tokens."""
    return stop_rate(0.08, "stops_earlier")


def stops_later() -> World:
    """A student that stops a third as often."""
    return stop_rate(0.01, "stops_later")


def markov2() -> World:
    """Order-2 chain over 5 tokens that stops unevenly; the student is its best order-1 approximation.

    The reference text is written by a third chain, the teacher with noise.
    """
    rng = np.random.default_rng(2)
    states, after = _suffixes(5, 2)
    logits = 1.1 * rng.standard_normal((len(states), 5))
    stop = np.exp(rng.uniform(np.log(0.01), np.log(0.05), len(states)))
    teacher = Automaton(after, _stopping(logits, stop))
    reference = Automaton(after, _stopping(logits + 0.4 * rng.standard_normal(logits.shape), 1.3 * stop))
    going = np.zeros((len(states), len(states)))  # the chain of states, begun anew after each end token
    np.add.at(going, (np.arange(len(states))[:, None], after), teacher.prob)
    stationary = np.linalg.matrix_power(going, 4096)[0]
    _, after1 = _suffixes(5, 1)
    last = np.array([text[-1] if text else 0 for text in states])
    joint = np.zeros((6, 6))
    np.add.at(joint, last, stationary[:, None] * teacher.prob)
    student = Automaton(after1, np.log(joint / joint.sum(axis=1, keepdims=True)))
    prompts = ((1,), (2,), (3, 1), (4, 4), (5, 2))
    about = "order-2 Markov chain, student its order-1 approximation"
    return _world("markov2", about, teacher, student, prompts, reference)


def hidden() -> World:
    """Twelve hidden states over 4 tokens, next state by state and token; the student has five of its own."""
    rng = np.random.default_rng(3)
    after = rng.integers(1, 13, (13, 5))
    merged = rng.integers(1, 6, (6, 5))
    logits = 1.3 * rng.standard_normal((13, 4))
    teacher = Automaton(after, _stopping(logits, rng.uniform(0.01, 0.04, 13)))
    student = Automaton(merged, _stopping(0.5 * rng.standard_normal((6, 4)) + logits.mean(axis=0), 0.03))
    prompts = ((1,), (2,), (3,), (4, 1), (2, 3))
    return _world("hidden", "hidden Markov chain, student has fewer states", teacher, student, prompts)


# --------------------------------------------------------------------------------------------- grammar, tree
def _stack(depth: int, rng: np.random.Generator) -> Automaton:
    """A writer of nested brackets of 3 kinds (tokens 1-3 open, 4-6 close) and a filler 7.

    It remembers the `depth` innermost open brackets. A closing bracket closes the innermost one, whatever
    its kind.
    """
    states = [text for n in range(depth + 1) for text in itertools.product((1, 2, 3), repeat=n)]
    index = {text: i for i, text in enumerate(states)}
    after, prob = np.zeros((len(states), 8), dtype=np.int64), np.full((len(states), 8), 0.004)
    for i, text in enumerate(states):
        opened = [index[(*text, kind)[-depth:]] for kind in (1, 2, 3)]
        after[i] = [0, *opened, *[index[text[:-1]]] * 3, i]
        prob[i, 1:4] += (0.25 if len(text) < depth else 0.02) * rng.uniform(0.5, 1.5, 3)
        prob[i, 7] += 0.15
        if text:
            prob[i, 3 + text[-1]] += 0.6
        else:
            prob[i, 0] += 0.06
    return Automaton(after, np.log(prob / prob.sum(axis=1, keepdims=True)))


def grammar() -> World:
    """Nested brackets three deep; the student remembers the two innermost and takes the rest for closed."""
    teacher, student = _stack(3, np.random.default_rng(4)), _stack(2, np.random.default_rng(4))
    prompts = ((1,), (7,), (2, 3), (3, 4), (1, 2))
    return _world("grammar", "brackets of bounded depth, student one level short", teacher, student, prompts)


def tree() -> World:
    """Random tables over 3 tokens: prefixes of up to 5 tokens are states of their own, later the last 5."""
    rng = np.random.default_rng(5)
    states, after = _suffixes(3, 5)
    logits = rng.standard_normal((len(states), 3))
    stop = np.exp(rng.uniform(np.log(0.005), np.log(0.05), (2, len(states))))
    noise = 0.7 * rng.standard_normal(logits.shape)
    teacher = Automaton(after, _stopping(logits, stop[0]))
    student = Automaton(after, _stopping(logits + noise, np.sqrt(stop[0] * stop[1])))
    prompts = ((1,), (2,), (3, 3), (1, 2))
    return _world("tree", "every prefix a state, random tables", teacher, student, prompts)


# --------------------------------------------------------------------------------------------- leaving home
def _astray(
    name: str, about: str, onward: Sequence[int], spread: float, noise: float, stop: float, home: bool = False
) -> World:
    """Layers of order-1 states over 6 common and 2 rare tokens: layer 0 is home, from 1 on one is lost.

    A rare token (7, 8) leads to layer 1; the student writes one with probability 0.06, the teacher with
    0.008. After any other token layer i goes to `onward[i]`; with `home` token 1 always leads home. The
    teacher's logits have standard deviation 1.8 at home and `spread` where lost; the student's have noise on
    them, of standard deviation 0.3 at home and `noise` where lost.
    """
    rng = np.random.default_rng(6)
    v = 9
    after = np.repeat(onward, v)[:, None] * v + np.arange(v)
    after[:, 7:] = v + np.arange(7, v)
    if home:
        after[:, 1] = 1
    lost = np.arange(len(after))[:, None] >= v
    common = np.where(lost, spread, 1.8) * rng.standard_normal((len(after), 6))
    changed = common + np.where(lost, noise, 0.3) * rng.standard_normal(common.shape)

    def automaton(logits: Array, rare: float) -> Automaton:
        share = np.log(np.exp(logits).sum(axis=1, keepdims=True) * rare / (1 - rare) / 2)
        return Automaton(after, _stopping(np.column_stack([logits, share, share]), stop))

    prompts = ((1,), (2,), (3,), (4, 5), (6, 1))
    return _world(name, about, automaton(common, 0.008), automaton(changed, 0.06), prompts)


def accumulates() -> World:
    """After a rare token both models are lost for good, and there the student is far from its teacher."""
    return _astray("accumulates", "early errors stay and make later ones worse", (0, 1), 1.8, 1.1, 0.02)


def recovers() -> World:
    """As `accumulates`, but home again two tokens after the last rare one."""
    return _astray("recovers", "errors are over after two tokens", (0, 2, 0), 1.8, 1.1, 0.02)


def unreliable() -> World:
    """Lost, the teacher is nearly uniform and the student is not; token 1 leads home. Both stop early."""
    about = "teacher unreliable off its own states"
    return _astray("unreliable", about, (0, 1), 0.25, 1.3, 0.06, home=True)


WORLDS: dict[str, Callable[[], World]] = {
    make.__name__: make
    for make in (
        markov1,
        markov2,
        stops_earlier,
        stops_later,
        hidden,
        grammar,
        accumulates,
        recovers,
        unreliable,
        tree,
        equal,
    )
}


@cache
def world(name: str) -> World:
    """The world of this name, made once.

    Raises: ValueError for an unknown name.
    """
    if name not in WORLDS:
        raise ValueError(f"no world '{name}'. Known: {', '.join(WORLDS)}.")
    return WORLDS[name]()
