"""Products of float32 states with weights on a CPU, through oneDNN.

By itself torch multiplies float32 matrices through MKL, which brings a weight into a layout of its own in
every call, which weighs for the few rows of a decoding step, and for an output head, whose weight is large
for what is done with it. oneDNN takes a weight that was laid out once, and a head as it lies; the speed
benchmark has both rates for a head. Its arithmetic is float32 throughout, unless
`torch.set_float32_matmul_precision` allows less. Other devices, types and builds of torch without oneDNN get
torch's own product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

ROWS = 64
"""Rows that a layout is made for. It serves fewer as well; one made for a single row serves no others."""


@cache
def _onednn() -> Any:
    """torch's operations on oneDNN, None where this build has none, or none that agree with torch's own."""
    operations = torch.ops.mkldnn
    weight = torch.linspace(-1, 1, 96 * 64, dtype=torch.float32, device="cpu").view(96, 64).sin()
    bias = weight[:, 0].contiguous()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            laid_out = operations._reorder_linear_weight(weight, ROWS)
            for rows in (1, 3, ROWS + 1):
                x = weight[0].repeat(rows, 1)
                wanted = linear(x, weight, bias)
                found = [
                    operations._linear_pointwise(x, weight, bias, "none", [], ""),
                    operations._linear_pointwise(x, laid_out, bias, "none", [], ""),
                    operations._linear_pointwise.binary(x, wanted, laid_out, bias, "add") - wanted,
                ]
                if not all(torch.allclose(one, wanted, rtol=1e-2, atol=1e-2) for one in found):
                    return None
                curved = operations._linear_pointwise(x, laid_out, bias, "gelu", [], "tanh")
                if not torch.allclose(curved, gelu(wanted, approximate="tanh"), rtol=1e-2, atol=1e-2):
                    return None
    except (AttributeError, RuntimeError):  # another version of torch, or one without oneDNN
        return None
    return operations


def _takes(*tensors: Tensor | None) -> bool:
    """Whether oneDNN takes these: float32 on a CPU, and nobody wants a gradient."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _onednn() is None:
        return False
    given = [one for one in tensors if one is not None]
    return all(one.dtype == torch.float32 and one.device.type == "cpu" for one in given)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias, [N, out], for x [N, in] and weight [out, in]."""
    if _takes(x, weight, bias):
        found: Tensor = _onednn()._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return linear(x, weight, bias)


class Layer:
    """A weight [out, in] and its bias [out] or None, laid out for many products with few rows; for use
    without gradients, and to be made anew after the weight has changed.

    Through oneDNN it is a copy of the weight, in a layout of its own.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        with torch.no_grad():
            self.fast = _takes(weight, bias)
            self.weight: Tensor = (
                _onednn()._reorder_linear_weight(weight.detach(), ROWS) if self.fast else weight.contiguous()
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Return x weight^T + bias, [N, out], for x [N, in]."""
        if not self.fast:
            return linear(x, self.weight, self.bias)
        found: Tensor = _onednn()._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return found

    def gelu(self, x: Tensor) -> Tensor:
        """Return GELU, in its form with tanh, of x weight^T + bias."""
        if not self.fast:
            return gelu(self(x), approximate="tanh")
        found: Tensor = _onednn()._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")
        return found

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """Return x weight^T + bias + other."""
        if not self.fast:
            return self(x) + other
        found: Tensor = _onednn()._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return found
