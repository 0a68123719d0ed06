"""How much work a model's passes are: counted from its shape, and seen in what torch executes.

Counted: two operations for each parameter of a matrix product and token, attention over whole rows as if it
were not causal, the output head at the positions where it is asked for. A backward pass is twice a forward
one, or once where no weight takes a gradient. Element-wise work is left out.

Source: the usual count, as in Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, sec. 2.1.
Differs: attention and the head are counted apart, exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from kdbench.clock import Clock


@dataclass(frozen=True)
class Shape:
    """What of a transformer its work follows from.

    `trunk` and `head`: parameters of matrix products below and in the output head. `layers`, `width` (heads
    times their dimension) and `kv_width` (the same of keys and values) say what attention costs.
    """

    trunk: int
    head: int
    layers: int
    width: int
    kv_width: int


def shape_of(model: nn.Module) -> Shape:
    """Return a model's shape: of the model inside, where it stands behind a soft prompt.

    A mixture of experts is counted as if every token met each of them.
    """
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings"):
        inner = inner.model
    head = inner.get_output_embeddings()
    trunk = 0
    for module in inner.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) or module is head:
            continue
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            trunk += weight.numel()
    config = inner.config.get_text_config()
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return Shape(
        trunk, 0 if head is None else head.weight.numel(), int(config.num_hidden_layers),
        heads * size, kv_heads * size,
    )  # fmt: skip


def forward_flops(shape: Shape, rows: int, tokens: float, heads: float) -> float:
    """Return the operations of one forward pass of `rows` rows of `tokens` tokens each, with logits at
    `heads` positions in all.
    """
    attention = 4.0 * shape.layers * shape.width * rows * tokens**2
    return 2.0 * shape.trunk * rows * tokens + attention + 2.0 * shape.head * heads


def backward_flops(shape: Shape, rows: int, tokens: float, heads: float, weights: bool = True) -> float:
    """Return the operations of the backward pass that belongs to `forward_flops`; without `weights`, of one
    through frozen weights to what the model reads.
    """
    attention = 8.0 * shape.layers * shape.width * rows * tokens**2
    products = 2.0 * shape.trunk * rows * tokens + 2.0 * shape.head * heads
    return attention + products * (2 if weights else 1)


def decode_flops(shape: Shape, rows: int, prompt: float, new: float) -> float:
    """Return the operations of sampling `new` tokens to each of `rows` prompts, with a key-value cache: the
    prompt's forward pass, then one of a single token for each token but the last.
    """
    steps = max(new - 1, 0)
    context = prompt + (steps + 1) / 2  # mean number of tokens that a step looks at, itself included
    attention = 4.0 * shape.layers * shape.width * rows * steps * context
    first = forward_flops(shape, rows, prompt, rows)
    return first + rows * steps * 2.0 * (shape.trunk + shape.head) + attention


def decode_bytes(shape: Shape, rows: int, prompt: float, new: float, bytes_each: int) -> float:
    """Return the bytes that the steps after the prompt's must read: weights once a step, and each row's keys
    and values; numbers of `bytes_each` bytes.
    """
    steps = max(new - 1, 0)
    weights = steps * (shape.trunk + shape.head)
    cache = 2.0 * shape.layers * shape.kv_width * rows * steps * (prompt + (steps + 1) / 2)
    return (weights + cache) * bytes_each


# ---- what torch executes
_aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *args: Any, **named: Any) -> float:
    return float(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **named: Any) -> float:
    return float(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


def _linear(x: Any, *args: Any, **named: Any) -> float:
    return float(2 * x.numel() * named["out_val"].shape[-1])


def _same_as(packet: Any) -> Callable[..., float]:
    def count(*args: Any, **named: Any) -> float:
        return float(flop_registry[packet](*args, **named))

    return count


# what torch's registry lacks: the CPU's fused attention, and products that add into a tensor or go through
# oneDNN
_MORE: dict[Any, Callable[..., float]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.addmm_: _same_as(_aten.addmm),
    _aten.baddbmm_: _same_as(_aten.baddbmm),
    getattr(torch.ops.mkldnn, "_linear_pointwise", None): _linear,  # not in every build of torch
}


class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products and attention that torch executes, by phase of a clock.

    `found` maps the innermost open phase to its operations, "" where none is open. What a captured CUDA
    graph replays is not seen.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clock, self.found = clock, dict[str, float]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        count = _MORE.get(packet) or flop_registry.get(packet)
        if count is None and func is not torch.ops.prim.device.default:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        if count is not None:
            name = self.clock.innermost
            self.found[name] = self.found.get(name, 0.0) + float(count(*args, **kwargs, out_val=out))
        return out


# ---- what a machine can do
def matmul_rate(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Return the best rate of square matrix products, FLOP/s, found within so many seconds for each size.

    Args: `precision` "bf16" or "fp32", the latter as torch is set (`get_float32_matmul_precision`).
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024):
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        best = max(best, 2.0 * size**3 / _least(lambda a=a, b=b: a @ b, device, seconds))  # type: ignore[misc]
    return best


def copy_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Return the best rate of copying memory, bytes read and written per second."""
    count = (1 << 28) if device.type == "cuda" else (1 << 24)  # float32 numbers: 1 GiB, 64 MiB
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    return 8.0 * count / _least(lambda: target.copy_(source), device, seconds)


def _least(action: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The least seconds that `action` took, tried for so many seconds and three times at least."""
    guard: AbstractContextManager[Any] = torch.no_grad() if torch.is_grad_enabled() else nullcontext()
    with guard:
        action()
        least, end, tries = float("inf"), time.perf_counter() + seconds, 0
        while tries < 3 or time.perf_counter() < end:
            synchronize(device)
            start = time.perf_counter()
            action()
            synchronize(device)
            least, tries = min(least, time.perf_counter() - start), tries + 1
    return least


def synchronize(device: torch.device) -> None:
    """Wait for what was given to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
