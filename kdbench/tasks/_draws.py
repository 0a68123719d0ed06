"""Random choices of generated worlds, the same under every version of Python and every library."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Rng:
    """Random choices made from `random.Random.random` alone, a stream that no Python version changes."""

    def __init__(self, seed: int) -> None:
        self._next = random.Random(seed).random

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self._next() * n)

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self._next() < p

    def one(self, items: Sequence[_T]) -> _T:
        """One of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[_T], n: int) -> list[_T]:
        """n different items in random order."""
        pool = list(items)
        for i in range(n):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]

    def other(self, items: Sequence[_T], item: _T) -> _T:
        """One of the items, but not this one."""
        return self.one([x for x in items if x != item])


def stable_hash(*parts: object) -> int:
    """63-bit integer from the text of the parts, the same everywhere."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
