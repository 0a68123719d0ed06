"""Losses over N classes: one value per row [B] in nats, for `kdbench.distiller.example_mean`.

Shapes: B rows, N classes; `q` is the student, `p` the teacher, both as logits [B, N].

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, sec. 2; the form `literal` is eq. 3 of
Prompt-Distiller as it is printed; the mean over classes is that of TinyBERT's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kdbench import losses
from kdbench.classify import class_logits
from kdbench.distiller import Batch
from kdbench.losses import cross_entropy as cross_entropy

Form = Literal["literal", "hinton", "hinton_t2"]


def soft_cross_entropy(q_logits: Tensor, p_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return -sum_y p(y) log q(y), [B], of the distributions softmax(logits / temperature)."""
    return losses.soft_cross_entropy(q_logits / temperature, p_logits / temperature)


def kl_divergence(q_logits: Tensor, p_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(p || q), [B], of the distributions softmax(logits / temperature)."""
    return losses.forward_kl(q_logits / temperature, p_logits / temperature)


def distilled(q_logits: Tensor, p_logits: Tensor, temperature: float, form: Form) -> Tensor:
    """Return how far the student is from the teacher, [B]. With a the temperature, above 0:

        literal    CE(p / a, q) = CE(p, q) / a, no softening: a only scales the term
        hinton     KL(p_a || q_a),   p_a = softmax(p_logits / a), q_a likewise
        hinton_t2  a^2 KL(p_a || q_a)

    Raises: ValueError for another form.
    """
    if form == "literal":
        return soft_cross_entropy(q_logits, p_logits) / temperature
    if form not in get_args(Form):
        raise ValueError(f"form = '{form}' is none of {', '.join(get_args(Form))}")
    factor = temperature**2 if form == "hinton_t2" else 1.0
    return factor * kl_divergence(q_logits, p_logits, temperature)


def class_mean(values: Tensor, logits: Tensor) -> Tensor:
    """Return `values` [B] over the number of classes: a sum over classes made their mean."""
    return values / logits.shape[-1]


@torch.no_grad()
def teacher_logits(teacher: nn.Module, batch: Batch) -> Tensor:
    """Return the frozen teacher's logits of the N classes on its own view of the rows, [B, N]."""
    return class_logits(teacher, batch.of("teacher"))


@torch.no_grad()
def with_cache(batches: Iterable[Batch], cache: Callable[[Batch], Mapping[str, Tensor]]) -> Batch:
    """Return the rows of all batches, on the CPU: the student's fields, and those that `cache` makes of a
    batch.

    What stands in a row cannot be taken for another row's; the fields of other roles are dropped.
    """
    return Batch.cat([batch.of("student").replace(**cache(batch)).to("cpu") for batch in batches])


@dataclass
class SoftTargetsConfig:
    """Settings of a loss with labels and soft targets."""

    kd_ratio: float = 0.5  # weight of the soft targets, 0 to 1; the rest is cross-entropy with the labels
    temperature: float = 10.0  # divides both models' logits in the term of the soft targets

    def __post_init__(self) -> None:
        if not 0 <= self.kd_ratio <= 1:
            raise ValueError(f"kd_ratio = {self.kd_ratio} is not in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} is not above 0")
