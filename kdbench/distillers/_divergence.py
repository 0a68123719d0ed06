"""What the settings of several methods share: the choice of a divergence, and a temperature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kdbench.losses import Logits, SupportsLogits, divergence_named


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


class _Tempered:
    """A prediction whose logits are divided by a temperature."""

    def __init__(self, prediction: SupportsLogits, temperature: float) -> None:
        self.vocab, self.targets = prediction.vocab, prediction.targets
        self._prediction, self._temperature = prediction, temperature

    def __len__(self) -> int:
        return len(self._prediction)

    def logits(self, start: int, stop: int) -> Tensor:
        return self._prediction.logits(start, stop) / self._temperature


def tempered(prediction: SupportsLogits, temperature: float) -> SupportsLogits:
    """Return softmax(logits / temperature) at the same positions; at temperature 1, `prediction` itself.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, sec. 2.
    """
    return prediction if temperature == 1 else _Tempered(prediction, temperature)
