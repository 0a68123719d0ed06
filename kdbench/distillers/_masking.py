"""Which tokens a masked language model predicts, and what it sees in their place.

Shapes: B rows, T tokens.

Source: Devlin et al. 2019 (BERT), https://arxiv.org/abs/1810.04805, sec. 3.1, task 1; tokens are chosen anew
at each visit as in Liu et al. 2019 (RoBERTa), https://arxiv.org/abs/1907.11692, sec. 4.1.
Differs: see `mlm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdbench.distiller import Batch, Step
from kdbench.streams import stream_seed, uniform

NONE = -1  # in `targets`: this token is not predicted


@dataclass
class MaskingConfig:
    """What becomes of the tokens; shares lie between 0 and 1."""

    mask_share: float = 0.15  # of a row's tokens that are predicted, rounded, one at least
    replaced_by_mask: float = 0.8  # share of the predicted tokens
    replaced_at_random: float = 0.1  # share of the predicted tokens; the rest is kept as it is

    def __post_init__(self) -> None:
        if not 0 < self.mask_share <= 1:
            raise ValueError(f"mask_share = {self.mask_share} is not in (0, 1]")
        for name in ("replaced_by_mask", "replaced_at_random"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} is not in [0, 1]")
        if self.replaced_by_mask + self.replaced_at_random > 1:
            raise ValueError("replaced_by_mask and replaced_at_random are above 1 together")


def tokens_of(config: Any) -> tuple[int, int, list[int]]:
    """Return a model's mask token, the size of its vocabulary, and the tokens that are never drawn at random.

    Raises: ValueError for a model without a mask token.
    """
    if getattr(config, "mask_token_id", None) is None:
        raise ValueError("the student's config has no mask_token_id: its tokenizer needs a mask token")
    mask, padding = int(config.mask_token_id), getattr(config, "pad_token_id", None)
    return mask, int(config.vocab_size), sorted({mask} if padding is None else {mask, int(padding)})


def masked(
    batch: Batch, step: Step, cfg: MaskingConfig, vocabulary: int, mask: int, never_drawn: Sequence[int]
) -> Batch:
    """Return the rows with tokens replaced, and `targets` [B, T]: the ids to predict, else -1.

    A choice depends on seed, example, visit and position alone, not on the batch, its order or width.
    """
    ids, length = batch["input_ids"], batch["length"][:, None]
    place = torch.arange(ids.shape[1], device=ids.device)
    cloze = place == batch["cloze_index"][:, None]
    inner = (place > 0) & (place < length - 1)

    def draw(name: str) -> Tensor:
        seed = stream_seed(step.seed, f"mlm/{name}")
        return uniform(seed, batch["example_id"][:, None], step.visit, place)

    number = draw("choose").masked_fill(~inner, 1.0).masked_fill(cloze, NONE)
    count = (cfg.mask_share * inner.sum(1, keepdim=True)).round().clamp(min=1)
    chosen = (number.argsort(1).argsort(1) < count) & (number < 1.0)
    fate = draw("replace").masked_fill(cloze, NONE)
    by_mask = fate < cfg.replaced_by_mask
    at_random = ~by_mask & (fate < cfg.replaced_by_mask + cfg.replaced_at_random)
    token = (draw("token") * (vocabulary - len(never_drawn))).long()
    for skipped in never_drawn:  # in ascending order; all others are as likely
        token = token + (token >= skipped)
    seen = torch.where(at_random, token, ids).masked_fill(by_mask, mask)
    return batch.replace(input_ids=torch.where(chosen, seen, ids), targets=ids.masked_fill(~chosen, NONE))
