"""Language models as tables: a finite automaton whose next state follows from state and token.

Source: unifilar hidden Markov models, Crutchfield and Young 1989,
https://doi.org/10.1103/PhysRevLett.63.105.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
END = 0  # the end token


@dataclass(frozen=True, eq=False)
class Automaton:
    """`next_state` [S, V] int64 and `log_prob` [S, V] float64 in nats; reading begins in state 0.

    The distribution of a token is the row of the state reached by all tokens before it, the prompt's too.
    Raises: ValueError where the tables are not those of such a model, or a probability is 0.
    """

    next_state: Array
    log_prob: Array

    def __post_init__(self) -> None:
        states, vocab = self.log_prob.shape
        ok = self.next_state.shape == (states, vocab) and np.isfinite(self.log_prob).all()
        if not (ok and self.next_state.min() >= 0 and self.next_state.max() < states):
            raise ValueError(f"automaton: tables {self.next_state.shape}, {self.log_prob.shape} do not fit")
        if not np.allclose(np.exp(self.log_prob).sum(axis=1), 1, rtol=0, atol=1e-12):
            raise ValueError("automaton: the probabilities of a state do not add up to 1")

    @property
    def prob(self) -> Array:
        """[S, V] probabilities."""
        return np.exp(self.log_prob)

    def walk(self, tokens: Sequence[int]) -> list[int]:
        """The states after each of `tokens`."""
        state, visited = 0, []
        for token in tokens:
            state = int(self.next_state[state, token])
            visited.append(state)
        return visited


@dataclass(frozen=True, eq=False)
class World:
    """Two language models, prompts, and how long a response may become.

    `prompts` are token tuples, drawn with `weights` [K]. The reference text is drawn independently of both
    roll-ins, from `writer` or else from the teacher.
    """

    name: str
    description: str
    teacher: Automaton
    student: Automaton
    prompts: tuple[tuple[int, ...], ...]
    weights: Array
    max_new_tokens: int = 30
    writer: Automaton | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.weights) or not np.isclose(np.sum(self.weights), 1):
            raise ValueError(f"world {self.name}: {len(self.prompts)} prompts, weights {self.weights}")

    @property
    def reference(self) -> Automaton:
        """Who writes the reference text."""
        return self.teacher if self.writer is None else self.writer

    def draw(self, count: int, seed: int) -> Array:
        """[count] int64: indices into `prompts`, drawn independently."""
        return np.random.default_rng(seed).choice(len(self.prompts), size=count, p=self.weights)
