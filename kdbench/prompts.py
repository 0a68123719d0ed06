"""Soft prompts: vectors in front of the text that steer a frozen model.

Source: Lester et al. 2021, https://arxiv.org/abs/2104.08691, sec. 2; initialised from text as in PromptKD
(Kim et al. 2024, https://arxiv.org/abs/2402.12842, sec. 4.1).
Differs: the vectors stand between padding and text and take the positions 0..k-1, in training and in sampling
alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SoftPrompt(nn.Module):
    """k trainable vectors of a model's embedding width, kept in float32 at least."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        self.vectors = nn.Parameter(vectors.detach().clone().to(dtype))

    @property
    def length(self) -> int:
        """k, the number of vectors."""
        return len(self.vectors)

    def forward(self, batch_size: int) -> Tensor:
        """Return the vectors once per row, [B, k, D]."""
        return self.vectors[None].expand(batch_size, -1, -1)

    @classmethod
    def from_ids(cls, model: nn.Module, ids: Sequence[int], length: int) -> SoftPrompt:
        """Start at the embeddings of `ids`, repeated when fewer than `length` and cut to `length`.

        Raises: ValueError without ids or for a length under 1.
        """
        if not ids or length < 1:
            raise ValueError(
                f"a soft prompt needs text and a length of at least 1, got {len(ids)} ids, length {length}"
            )
        wanted = torch.tensor((list(ids) * length)[:length])
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        return cls(table[wanted.to(table.device)])

    @classmethod
    def random(cls, model: nn.Module, length: int) -> SoftPrompt:
        """Start at normal noise of standard deviation 1, as torch initialises an embedding (and PEFT a random
        prompt).

        The noise is torch's global stream on the CPU, which a run seeds before it makes the modules of a
        method.
        """
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        noise = torch.randn(length, table.shape[1])
        return cls(noise.to(table.device, table.dtype))


class PromptedModel(nn.Module):
    """A causal language model behind a soft prompt; `predict` and `rollout` know how to run it."""

    def __init__(self, model: nn.Module, prompt: SoftPrompt) -> None:
        super().__init__()
        self.model = model
        self.prompt = prompt

    @property
    def config(self) -> object:
        """The configuration of the model inside."""
        return self.model.config
