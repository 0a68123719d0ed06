"""Several sources made into one before the target is met: the early fusion of prompts.

    P* = sum_k w_k P_k,   w = softmax(s_k / tau) or 1 / K,   over the K most similar sources

Source: the early fusion that PANDA names (Zhong et al. 2024, https://arxiv.org/abs/2208.10160); no code or
formula of it is public, so this is a reconstruction.
Differs: one prompt trained on all sources together, with a head for each, is not offered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from kdbench.distillers._panda import chosen_sources, predicted
from kdbench.errors import UserError
from kdbench.prompted import PromptedEncoder

FUSED = "fused.weights"  # in the signature of a model that began at a fused prompt: the weight of each source


@dataclass
class FusionConfig:
    """Which sources are fused, and how."""

    top_k: int = 3  # sources, the most similar ones
    tau: float = 1.0  # temperature of the weights
    weights: Literal["similarity", "uniform"] = "similarity"

    def __post_init__(self) -> None:
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()
        if self.top_k < 1 or self.tau <= 0:
            raise ValueError("top_k must be 1 or more, tau above 0")


@dataclass(frozen=True)
class Fused:
    """The tensors of P* by name, weights by the place of a source, and the similarities of all sources."""

    prompt: dict[str, Tensor]
    weights: dict[int, float]
    similarities: list[float]

    @property
    def similarity(self) -> float:
        """The weighted mean of the fused sources' similarities."""
        return sum(weight * self.similarities[i] for i, weight in self.weights.items())


def fuse(cfg: Any, sources: Iterable[Any], target: PromptedEncoder) -> Fused:
    """Return the weighted mean of the chosen sources' prompts.

    Args: `cfg`: a `FusionConfig` with what `predicted` reads.

    Raises: UserError for prompts that an MLP makes: the mean of its weights makes no mean of prompts.
    """
    models = [cast(PromptedEncoder, one) for one in sources]
    if any(getattr(one.prompt, "mlp", None) is not None for one in models):
        raise UserError("reparameterize: prompts that an MLP makes cannot be fused; set reparameterize = 0")
    found = [predicted(cfg, one, target) for one in models]
    chosen = chosen_sources(found, cfg.top_k)
    scores = torch.tensor([found[i] for i in chosen], dtype=torch.float64)
    shares = (
        (scores / cfg.tau).softmax(0)
        if cfg.weights == "similarity"
        else torch.full_like(scores, 1 / len(scores))
    )
    weights = dict(zip(chosen, shares.tolist(), strict=True))
    states = {i: models[i].prompt.state_dict() for i in chosen}  # type: ignore[union-attr]
    prompt = {
        name: sum((weights[i] * states[i][name].double() for i in chosen), start=torch.zeros(()).double()).to(
            value.dtype
        )
        for name, value in states[chosen[0]].items()
    }
    return Fused(prompt, weights, found)
