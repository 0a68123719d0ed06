"""Products of float32 states with weights on a CPU, through oneDNN.

By itself torch multiplies float32 matrices through MKL, which brings a weight into a layout of its own in
every call. For the few rows of a decoding step, and for an output head, whose weight is large for what is
done with it, that takes as long as the product. oneDNN takes a weight that was laid out once, and a head as
it lies, at up to twice the rate. Its arithmetic is float32 throughout, unless
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
    """torch's operations on oneDNN, None where this build has none that work."""
    operations = torch.ops.mkldnn
    one = torch.ones(1, 1)
    try:
        with torch.no_grad():
            laid_out = operations._reorder_linear_weight(one, 1)
            operations._linear_pointwise(one, one, None, "none", [], "")
            operations._linear_pointwise(one, laid_out, one[0], "gelu", [], "tanh")
            operations._linear_pointwise.binary(one, one, laid_out, one[0], "add")
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
    """A weight [out, in] and its bias [out] or None, laid out for many products with few rows.

    It is a copy: what is written into the weight afterwards does not reach it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        with torch.no_grad():
            self.fast = _takes(weight, bias)
            self.weight: Tensor = (
                _onednn()._reorder_linear_weight(weight.detach(), ROWS) if self.fast else weight
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
            return gelu(linear(x, self.weight, self.bias), approximate="tanh")
        found: Tensor = _onednn()._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")
        return found

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """Return x weight^T + bias + other."""
        if not self.fast:
            return linear(x, self.weight, self.bias) + other
        found: Tensor = _onednn()._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return found
