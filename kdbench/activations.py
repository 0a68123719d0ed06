"""GPT-2's GELU in fewer and cheaper operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALL = 2**15
"""Entries below which one operation of torch costs less than four cheaper ones."""


class TanhGELU(nn.GELU):
    """GELU in its form with tanh, x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).

    On a CPU the sigmoid costs about half of the tanh; elsewhere, and for lower precision than float32, it is
    torch's own.
    Source: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415, sec. 2.
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        """Return GELU of each entry."""
        exact = input.dtype in (torch.float32, torch.float64)
        if input.device.type != "cpu" or not exact or input.numel() < SMALL:
            return super().forward(input)
        found: Tensor = _BySigmoid.apply(input)  # type: ignore[no-untyped-call]
        return found


class _BySigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        factor = math.sqrt(8 / math.pi)
        share = torch.addcmul(x.new_tensor(factor), x, x, value=0.044715 * factor).mul_(x).sigmoid_()
        return share.mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        found: Tensor = torch.ops.aten.gelu_backward(upstream[0], x, approximate="tanh")
        return found
