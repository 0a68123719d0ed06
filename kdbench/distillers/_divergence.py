"""What the settings of several methods share: the choice of a divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kdbench.losses import Logits, divergence_named


@dataclass
class DivergenceConfig:
    """The choice of a divergence of `kdbench.losses`; a parameter at None has that function's default."""

    divergence: str = "forward_kl"
    alpha: float | None = None  # of skew_forward_kl and skew_reverse_kl
    beta: float | None = None  # of generalized_jsd
    mu: float | None = None  # of adaptive_kl
    weight: float | None = None  # of symmetric_kl

    def __post_init__(self) -> None:
        self.function()

    def function(self) -> Callable[[Logits, Logits], Tensor]:
        """Return the divergence as a function of (q, p), nats per position.

        Raises: ValueError for an unknown name, a parameter it does not have, or a value out of range.
        """
        given = {"alpha": self.alpha, "beta": self.beta, "mu": self.mu, "weight": self.weight}
        return divergence_named(self.divergence, **{k: v for k, v in given.items() if v is not None})
