"""Soft prompts: vectors in front of the text that steer a frozen model; deep prompts: in front of every
layer.

Source: Lester et al. 2021, https://arxiv.org/abs/2104.08691, sec. 2; initialised from text as in PromptKD
(Kim et al. 2024, https://arxiv.org/abs/2402.12842, sec. 4.1); deep prompts of Liu et al. 2022 (P-Tuning v2),
https://arxiv.org/abs/2110.07602, sec. 3.2.
Differs: the vectors stand between padding and text and take the positions 0..k-1, in training and in sampling
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache


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

    def table(self) -> Tensor:
        """Return the vectors, [k, D]."""
        return self.vectors

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


class DeepPrompt(nn.Module):
    """m prompt tokens as one more key and value each for every layer: a table of m x 2 L d numbers.

    A token's row is read as (2 L, heads, head size): key and value of layer 0, then of layer 1, and so on.
    They are a memory without order: no rows of queries, no states and no positions of their own, though the
    text's positions start at m. With `hidden` the table is made by tanh(E A + a) B + b of an embedding E [m,
    d].
    """

    def __init__(self, config: Any, length: int, std: float, hidden: int = 0) -> None:
        """Start at normal noise of standard deviation `std` from torch's global stream on the CPU.

        Args: `config`: the encoder's; `hidden`: the width of the reparameterisation, 0: none.
        """
        super().__init__()
        self.layers, self.heads = int(config.num_hidden_layers), int(config.num_attention_heads)
        width = 2 * self.layers * int(config.hidden_size)
        first = int(config.hidden_size) if hidden else width
        self.vectors = nn.Parameter(std * torch.randn(length, first))
        self.mlp: nn.Module | None = None
        if hidden:
            self.mlp = nn.Sequential(nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, width))

    @property
    def length(self) -> int:
        """m, the number of prompt tokens."""
        return len(self.vectors)

    def table(self) -> Tensor:
        """Return the prompt tokens, [m, 2 L d]."""
        return self.vectors if self.mlp is None else self.mlp(self.vectors)

    def cache(self, table: Tensor) -> DynamicCache:
        """Return keys and values for one forward, which appends its own to them.

        Args: `table`: [B, m, 2 L d], a row's prompt tokens.
        """
        rows, length = table.shape[:2]
        parts = table.view(rows, length, 2 * self.layers, self.heads, -1).permute(2, 0, 3, 1, 4)
        made = DynamicCache()
        for layer in range(self.layers):
            made.update(parts[2 * layer], parts[2 * layer + 1], layer)
        return made


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
