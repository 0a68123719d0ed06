"""Divergences between student and teacher distributions, and token scores: pure functions, one per formula.

In every function the student `q` comes first and the teacher `p` second. Each of the two is a Tensor of
logits [..., V] or a `Prediction` of N target positions (anything with `SupportsLogits`); the result is one
value in nats per position, [...] or [N]. Averaging over tokens is left to `token_mean`. Logits of lower
precision are computed in float32, float64 stays float64. Gradients flow into both: compute the fixed one
under `torch.no_grad()`.

Of a `Prediction` at most `CHUNK_ELEMENTS` logits are projected at a time. When that takes several chunks and
gradients are on, each chunk is recomputed in the backward pass, so tokens x vocabulary never exists at once.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, sec. 2; Gu et al. 2024 (MiniLLM),
https://arxiv.org/abs/2306.08543, sec. 2.1; Agarwal et al. 2024 (GKD), https://arxiv.org/abs/2306.13649,
sec. 2; Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898, sec. 3.1; Wu et al. 2025 (AKL),
https://arxiv.org/abs/2404.02657.
Differs: `forward_kl` and `skew_forward_kl` keep the teacher's entropy, which the code of MiniLLM, PromptKD
and DistiLLM drops: the gradient of the student is the same, and equal models give 0. A logit at -inf gets the
log-probability -100 (`FLOOR_NATS`), where the published codes mask after the product, which gives NaN
gradients in `reverse_kl`, or (AKL) replace the logit by 0.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kdbench.clock import detail

FLOOR_NATS = -100.0
"""Log-probability (nats) of an entry whose logit is -inf; as a probability, 4e-44, it
adds nothing to a sum."""

CHUNK_ELEMENTS = 2**22
"""Logits projected at once by a function that keeps what its backward pass needs, and 83 rows at 50,257
entries; the divergences here keep nothing and have limits of their own."""

_CHUNK = {"cpu": (256, 13 * 2**19), "cuda": (2**20, 2**26)}
"""Rows at most, and logits at most, that are projected at once: on a CPU, 26 MiB in float32 for each model,
which is 135 rows at 50,257 entries: about what an efficient matrix product needs."""

_BLOCK = {"cpu": 3 * 2**17, "cuda": 2**24}
"""Logits to which a formula is applied at once: on a CPU, what stays in its cache."""


class SupportsLogits(Protocol):
    """What a `Prediction` must offer here: N positions whose logits are projected on demand.

    `logits` is called later than the prediction was made, and again in the backward pass: it must give the
    same numbers each time, and record no gradient if the prediction was made under `torch.no_grad()`.
    """

    @property
    def vocab(self) -> int:
        """V, the number of vocabulary entries."""

    @property
    def targets(self) -> Tensor:
        """Token ids of the N target positions, [N] int64."""

    def __len__(self) -> int:
        """N, the number of target positions."""

    def logits(self, start: int, stop: int) -> Tensor:
        """Logits of positions start..stop-1, [stop - start, V]."""


@runtime_checkable
class FormsGradient(SupportsLogits, Protocol):
    """What a `Prediction` offers beyond that: a gradient is formed while its chunk of logits exists."""

    @property
    def hidden(self) -> Tensor:
        """What the logits are made of, row by row, [N, H]."""

    def trained(self) -> list[Tensor]:
        """The tensors that a gradient goes to: none for a prediction made without gradients."""

    def chunk(self, start: int, stop: int) -> Tensor:
        """Logits of positions start..stop-1 without a gradient, [stop - start, V], free to be overwritten."""

    def pull_back(self, start: int, stop: int, gradient: Tensor, into: list[Tensor]) -> None:
        """Add to `into`, shaped as `trained()`, what a gradient of those logits means for them."""


Logits: TypeAlias = Tensor | SupportsLogits
Settings = ParamSpec("Settings")
Formula: TypeAlias = Callable[..., Tensor]
"""Chunks of logits [..., V], and of entries per position [...], to a value per position [...]."""
Named = TypeVar("Named", bound=Callable[..., Tensor])

_in_place: dict[Formula, Callable[[Tensor, Tensor], Tensor]] = {}
"""Of a formula of q and p, one for q alone to learn: it leaves q's gradient in the place of its logits."""


def _formed_by(in_place: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Named], Named]:
    """Name the function by which value and gradient of the decorated formula, called without settings, are
    formed on a CPU, where nobody needs the logits any more. An entry at -inf must make its value NaN or
    infinite.
    """

    def named(plain: Named) -> Named:
        _in_place[plain] = in_place
        return plain

    return named


def divergence(
    plain: Callable[Concatenate[Tensor, Tensor, Settings], Tensor],
) -> Callable[Concatenate[Logits, Logits, Settings], Tensor]:
    """Make a function of two chunks of logits accept Tensors [..., V] and Predictions of any size.

    `plain(q, p, ...)` gets logits of equal shape [..., V], float32 or float64, and returns one value per row,
    [...]. It must treat rows independently and draw no random numbers, because chunks are recomputed in the
    backward pass. `log_probs` inside it takes care of entries at -inf.

    Returns: the function of two Logits, whose result is [...] for Tensors and [N] for Predictions.
    Raises: ValueError, when called, if q and p differ in vocabulary or positions, or a result is not one per
    row.
    Source: own; recomputing chunks is gradient checkpointing, Chen et al. 2016,
    https://arxiv.org/abs/1604.06174.
    """
    name = plain.__name__

    @functools.wraps(plain)
    def over_models(q: Logits, p: Logits, /, *args: Settings.args, **kwargs: Settings.kwargs) -> Tensor:
        if _vocab(q) != _vocab(p):
            raise ValueError(
                f"{name}: the student has {_vocab(q)} vocabulary entries, the teacher {_vocab(p)}. "
                "Slice both to the tokenizer's usable vocabulary first."
            )
        if _rows(q) != _rows(p):
            raise ValueError(f"{name}: the student has positions {_rows(q)}, the teacher {_rows(p)}.")
        in_place = None if args or kwargs else _in_place.get(plain)
        return _over_chunks(name, lambda a, b: plain(a, b, *args, **kwargs), q, p, in_place=in_place)

    return over_models


def by_position(
    function: Callable[..., tuple[Tensor, ...]], q: Logits, *others: Logits
) -> tuple[Tensor, ...]:
    """Return what `function` makes of the logits of all positions: its first result, which has a gradient,
    and the others as numbers; each [...] or [N].

    `function` gets chunks of logits [..., V] of q and of each model in `others`, and the entries of each
    Tensor [N] among them, and returns one value per position, and what else is to be known there. A loss of
    several terms written so goes through the head of each model once. It must treat positions independently
    and draw no random numbers.
    Raises: ValueError as a function that `divergence` made.
    Source: own.
    """
    known: list[list[Tensor]] = []
    counting = True

    def plain(*chunks: Tensor) -> Tensor:
        value, *rest = function(*chunks)
        if counting:  # a chunk may be gone through again in the backward pass
            known.append([one.detach() for one in rest])
        return value

    for other in others:
        if not isinstance(other, Tensor) and (_vocab(other), _rows(other)) != (_vocab(q), _rows(q)):
            raise ValueError(
                f"by_position: a model has {_vocab(other)} vocabulary entries at positions {_rows(other)}, "
                f"the first {_vocab(q)} at {_rows(q)}."
            )
    value = _over_chunks("by_position", plain, q, *others)
    counting = False
    if len(known) == 1:
        return value, *known[0]
    return value, *(torch.cat(parts) for parts in zip(*known, strict=True))


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities in nats of logits [..., V], in float32 at least; an entry at -inf gets `FLOOR_NATS`.

    Two models that both have an entry at -inf agree on it, so it adds nothing to a divergence. Where only one
    has it, value and gradient stay finite. No gradient reaches an entry at -inf.
    Source: own.
    """
    values = torch.log_softmax(_at_least_float32(logits), dim=-1)
    return torch.nan_to_num(values, nan=math.nan, posinf=math.inf, neginf=FLOOR_NATS)


@divergence
@_formed_by(lambda q, p: _form_kl(p, q, False, True))
def forward_kl(q: Tensor, p: Tensor) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q): teacher first; nats, [...] or [N].

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, sec. 2 (there without the teacher's
    entropy).
    """
    return _kl_of_logits(p, q)


@divergence
@_formed_by(lambda q, p: _form_kl(q, p, True, False))
def reverse_kl(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) = sum_v q (log q - log p): student first; nats, [...] or [N].

    Source: Gu et al. 2024, https://arxiv.org/abs/2306.08543, sec. 2.1, here in full at each position.
    """
    return _kl_of_logits(q, p)


@divergence
def symmetric_kl(q: Tensor, p: Tensor, weight: float = 0.9) -> Tensor:
    """(1 - weight) forward_kl + weight reverse_kl; nats, [...] or [N].

    Raises: ValueError if weight is not in [0, 1].
    Source: Ko et al. 2024, code of https://arxiv.org/abs/2402.03898 (weight 0.9).
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"symmetric_kl: weight = {weight} is not in [0, 1].")
    return (1 - weight) * _kl_of_logits(p, q) + weight * _kl_of_logits(q, p)


@divergence
def generalized_jsd(q: Tensor, p: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; nats, [...] or [N].

    It vanishes as beta nears 0 or 1: it is JSD / beta that nears forward_kl, and JSD / (1 - beta) reverse_kl.
    DistiLLM's JS distance with lambda is this with beta = 1 - lambda.
    Raises: ValueError if beta is not in (0, 1), naming the KL that is meant.
    Source: Agarwal et al. 2024, https://arxiv.org/abs/2306.13649, sec. 2.
    Differs: TRL silently takes beta = 0 for forward_kl and beta = 1 for reverse_kl, a jump in value.
    """
    if not 0 < beta < 1:
        limit = (
            "forward_kl, the limit of JSD / beta"
            if beta <= 0
            else "reverse_kl, the limit of JSD / (1 - beta)"
        )
        raise ValueError(f"generalized_jsd: beta = {beta} is not in (0, 1). At this end use {limit}.")
    log_q, log_p = log_probs(q), log_probs(p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


@divergence
def skew_forward_kl(q: Tensor, p: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q), forward_kl at alpha = 0; nats, [...] or [N].

    Raises: ValueError if alpha is not in [0, 1).
    Source: Ko et al. 2024, https://arxiv.org/abs/2402.03898, sec. 3.1 (alpha 0.1).
    """
    _check_alpha("skew_forward_kl", alpha)
    if alpha == 0:
        return _kl_of_logits(p, q)
    log_q, log_p = log_probs(q), log_probs(p)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha))


@divergence
def skew_reverse_kl(q: Tensor, p: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(q || alpha q + (1 - alpha) p), reverse_kl at alpha = 0; nats, [...] or [N].

    Raises: ValueError if alpha is not in [0, 1).
    Source: Ko et al. 2024, https://arxiv.org/abs/2402.03898, sec. 3.1 (alpha 0.1).
    """
    _check_alpha("skew_reverse_kl", alpha)
    if alpha == 0:
        return _kl_of_logits(q, p)
    log_q, log_p = log_probs(q), log_probs(p)
    return _kl(log_q, _log_mixture(log_q, log_p, alpha))


@divergence
def total_variation(q: Tensor, p: Tensor) -> Tensor:
    """0.5 sum_v |p - q|, a probability in [0, 1] without unit; [...] or [N].

    Source: Wen et al. 2023, https://arxiv.org/abs/2307.15190.
    """
    return 0.5 * (log_probs(p).exp() - log_probs(q).exp()).abs().sum(-1)


@divergence
def adaptive_kl(q: Tensor, p: Tensor, mu: float = 0.5) -> Tensor:
    """(g_h forward_kl + g_t reverse_kl) / (g_h + g_t); nats, [...] or [N].

    g_h and g_t are the sums of |p - q| over the head and the tail of the vocabulary. The head holds the
    teacher's most probable tokens as long as their cumulative probability, their own included, is at most mu,
    and always the first; the tail is the rest. The two weights carry no gradient, and are 1/2 each where the
    models are equal.
    Raises: ValueError if mu is not in [0, 1); with everything in the head it would be forward_kl.
    Source: Wu et al. 2025, https://arxiv.org/abs/2404.02657, and its code wutaiqiang/LLM_KD_AKL.
    Differs: a token that crosses mu is in the tail as in that code; DSKD's version has it in the head.
    """
    if not 0 <= mu < 1:
        raise ValueError(f"adaptive_kl: mu = {mu} is not in [0, 1); mu = 1 would be forward_kl.")
    with torch.no_grad():
        log_q, log_p = log_probs(q), log_probs(p)
        sorted_p, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
        gap = (sorted_p - log_q.exp().gather(-1, order)).abs()
        head = sorted_p.cumsum(-1) <= mu
        head[..., 0] = True
        total = gap.sum(-1)
        share = torch.where(total > 0, (gap * head).sum(-1) / total, 0.5)
    return share * _kl_of_logits(p, q) + (1 - share) * _kl_of_logits(q, p)


@divergence
def soft_cross_entropy(q: Tensor, p: Tensor) -> Tensor:
    """-sum_v p log q = forward_kl + entropy of p, so equal models do not give 0; nats, [...] or [N].

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, sec. 2.
    """
    return -(log_probs(p).exp() * log_probs(q)).sum(-1)


def entropy(q: Logits) -> Tensor:
    """-sum_v q log q; nats, [...] or [N].

    Source: Shannon 1948, sec. 6.
    """

    def plain(logits: Tensor) -> Tensor:
        log_q = log_probs(logits)
        return -(log_q.exp() * log_q).sum(-1)

    return _over_chunks("entropy", plain, q)


def token_log_prob(q: Logits, targets: Tensor | None = None) -> Tensor:
    """log q(target), at most 0; nats, [...] or [N].

    `targets` holds integer token ids, [...] or [N]; without it the `targets` of the Prediction q are taken.
    Raises: ValueError if targets are missing, not integers, or do not fit the positions of q.
    Source: own; a definition.
    """
    return _of_targets("token_log_prob", 1, q, targets)


def cross_entropy(q: Logits, targets: Tensor | None = None) -> Tensor:
    """-log q(target), the loss of hard targets; nats, [...] or [N].

    Raises: ValueError on targets that do not fit, as `token_log_prob`, whose arguments it takes.
    Source: own; a definition.
    """
    return _of_targets("cross_entropy", -1, q, targets)


def _of_targets(name: str, sign: int, q: Logits, targets: Tensor | None) -> Tensor:
    """sign log q(target) per row; [...] or [N]."""
    if targets is None:
        if isinstance(q, Tensor):
            raise ValueError("targets: logits in a Tensor have no targets of their own; give them.")
        targets = q.targets
    if targets.is_floating_point() or tuple(targets.shape) != _rows(q):
        raise ValueError(
            f"targets: {targets.dtype} {tuple(targets.shape)} given, integers of shape {_rows(q)} expected."
        )

    def plain(logits: Tensor, ids: Tensor) -> Tensor:
        return sign * log_probs(logits).gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    return _over_chunks(name, plain, q, targets)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "generalized_jsd": generalized_jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
}
"""Divergences that a setting can name: non-negative, and 0 for equal models."""


def divergence_named(name: str, **settings: float) -> Callable[[Logits, Logits], Tensor]:
    """The divergence of that name as a function of (q, p) alone, with its settings (alpha, beta, ...) fixed.

    Raises: ValueError if the name or a setting is unknown, with the nearest known, or a value is out of
    range.
    Source: own.
    """
    if name not in DIVERGENCES:
        raise ValueError(_unknown("divergence", name, list(DIVERGENCES)))
    function = DIVERGENCES[name]
    known = list(inspect.signature(function).parameters)[2:]
    for setting in settings:
        if setting not in known:
            raise ValueError(_unknown(f"setting of {name}", setting, known))
    chosen = functools.partial(function, **settings)
    chosen(torch.zeros(1), torch.zeros(1))  # refuses a value out of range now, not in the first update
    return chosen


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) in nats from log-probabilities [..., V], never negative; [...].

    b - a sums to 0 and makes every term non-negative, so that an error common to a row (of its normalisation)
    enters only in second order. What rounding leaves below 0 is lifted to 0 in the value; the gradient is
    kept.
    """
    a, b = log_a.exp(), log_b.exp()
    value = (a * (log_a - log_b) + (b - a)).sum(-1)
    return value - value.detach().clamp(max=0)


def _kl_of_logits(x: Tensor, y: Tensor) -> Tensor:
    """`_kl` of two models' log-probabilities, from their logits [..., V], as `log_probs` has them; [...]."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    if x.device.type != "cpu":  # would wait for the GPU to tell whether the logits are finite
        return _kl(log_probs(x), log_probs(y))
    value: Tensor = _KL.apply(x, y)  # type: ignore[no-untyped-call]
    return value - value.detach().clamp(max=0)


class _KL(torch.autograd.Function):
    """KL(a || b) for a = softmax(x), b = softmax(y), and its gradient in closed form, by `_form_kl`; autograd
    goes over the vocabulary about three times as often.

    Where a row has an entry at -inf, all take the formula of `_kl`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        in_x, in_y = x.clone(), y.clone()
        value = _form_kl(in_x, in_y, *ctx.needs_input_grad)
        if not bool(value.isfinite().all()):
            return _KL._of_closed(ctx, x, y)
        formed = zip((in_x, in_y), ctx.needs_input_grad, strict=True)
        ctx.save_for_backward(*(gradient for gradient, wanted in formed if wanted))
        return value

    @staticmethod
    def _of_closed(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        """`forward` by autograd, where an entry at -inf, or no number at all, makes the closed form fail."""
        both = x.detach(), y.detach()
        asked = [t.requires_grad_() for t, wanted in zip(both, ctx.needs_input_grad, strict=True) if wanted]
        with torch.enable_grad():
            value = _kl(log_probs(both[0]), log_probs(both[1]))
        found = torch.autograd.grad(value, asked, torch.ones_like(value)) if asked else ()
        ctx.save_for_backward(*found)
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = iter(ctx.saved_tensors)
        return tuple(
            next(found) * upstream[0].unsqueeze(-1) if wanted else None for wanted in ctx.needs_input_grad
        )


def _form_kl(x: Tensor, y: Tensor, of_x: bool, of_y: bool) -> Tensor:
    """KL(a || b) of a = softmax(x) and b = softmax(y), x and y [..., V], in nats, [...]. Its gradient takes
    the place of the logits for which it is wanted, the others are lost: with d = log a - log b it is
    a (d - sum_v a d) in x and b - a in y.

    a and d come from the same x - max x, whatever was rounded there, and the sums that make a and b
    probabilities are taken in float64: equal models give 0, near ones an error of the size of that in exp.
    An entry at -inf makes the value NaN or infinite.
    """
    x.sub_(x.amax(-1, keepdim=True))
    y.sub_(y.amax(-1, keepdim=True))
    d = x - y
    a, b = x.exp_(), y.exp_()
    sum_a, sum_b = (one.sum(-1, keepdim=True, dtype=torch.float64) for one in (a, b))
    of_a, of_b = (one.reciprocal().to(x.dtype) for one in (sum_a, sum_b))
    products = d.sub_((sum_a / sum_b).log().to(x.dtype)).mul_(a)
    value = products.sum(-1, keepdim=True).mul_(of_a)
    if of_y:
        b.mul_(of_b).addcmul_(a, of_a, value=-1)
    if of_x:
        torch.addcmul(products, a, value, value=-1, out=a).mul_(of_a)
    return value.squeeze(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b) for weight in (0, 1), finite wherever both arguments are; [..., V]."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def _check_alpha(name: str, alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"{name}: alpha = {alpha} is not in [0, 1).")


def _over_chunks(
    name: str, plain: Formula, q: Logits, *others: Logits, in_place: Formula | None = None
) -> Tensor:
    """plain(q, *others) per row, over chunks of rows if one of them is a Prediction; [...] or [N].

    `others` are further models, or Tensors with one entry per position; `in_place` is that of `_formed_by`.
    """
    inputs = (q, *others)

    def checked(*chunks: Tensor) -> Tensor:
        value = plain(*(_at_least_float32(chunk) for chunk in chunks))
        if value.shape != chunks[0].shape[:-1]:
            raise ValueError(
                f"{name}: returned shape {tuple(value.shape)} for logits of shape {tuple(chunks[0].shape)}; "
                f"one value per row, {tuple(chunks[0].shape[:-1])}, is needed."
            )
        return value

    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if len(tensors) == len(inputs):
        return checked(*tensors)
    if all(isinstance(x, FormsGradient) or (isinstance(x, Tensor) and not x.requires_grad) for x in inputs):
        formed = [x for x in inputs if isinstance(x, FormsGradient)]
        trained = [tensor for one in formed for tensor in one.trained()] if torch.is_grad_enabled() else []
        with detail("divergence"):
            value: Tensor = _Formed.apply(checked, in_place, inputs, bool(trained), *trained)  # type: ignore[no-untyped-call]
        return value

    def part(start: int, stop: int) -> Tensor:
        return checked(*(x[start:stop] if isinstance(x, Tensor) else x.logits(start, stop) for x in inputs))

    (positions,) = _rows(q)
    rows = max(1, CHUNK_ELEMENTS // _vocab(q))
    if positions <= rows:
        return part(0, positions)
    values = []
    for start in range(0, positions, rows):
        stop = min(start + rows, positions)
        # without gradients this is a plain call
        values.append(checkpoint(part, start, stop, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(values)


class _Formed(torch.autograd.Function):
    """A value per row, and its gradient formed while the row's logits exist: memory for a chunk of logits.

    Rows are independent, so the gradient of sum_n g_n value_n in the hidden state of row n is g_n times that
    of value_n, whatever g is. That in the head's weight is a sum over rows: where all g_n are one number c,
    as in a mean over tokens, it is c times the sum formed with g = 1; for any other g the chunks are gone
    through again.

    Source: own; the idea of forming the gradient in the forward pass is that of Hsu et al. 2024 (Liger
    Kernel), https://arxiv.org/abs/2410.10989, sec. 3.2, there for cross-entropy of a scalar mean.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plain: Formula,
        in_place: Formula | None,
        inputs: tuple[Any, ...],
        wanted: bool,
        *trained: Tensor,
    ) -> Tensor:
        ctx.formulas, ctx.inputs = (plain, in_place), inputs
        ctx.autocast = _autocast_state(inputs)
        ctx.save_for_backward(*trained)
        with torch.autocast(**ctx.autocast):
            values, ctx.unit = _through(ctx.formulas, inputs, None, wanted)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = upstream
        formed = [x for x in ctx.inputs if isinstance(x, FormsGradient)]
        owners = [(x, tensor) for x in formed for tensor in x.trained()]
        per_row = [tensor is x.hidden for x, tensor in owners]
        unit = ctx.unit
        ctx.unit = None  # what is returned may be changed in place
        if unit is None or not (all(per_row) or _one_number(g)):
            unit = None
            _ = ctx.saved_tensors  # refuses weights that were changed since the forward pass
            with torch.autocast(**ctx.autocast):
                _, unit = _through(ctx.formulas, ctx.inputs, g, True)
            return None, None, None, None, *unit
        for total, of_rows in zip(unit, per_row, strict=True):
            total.mul_(g[:, None] if of_rows else g[:1].sum())  # the sum of no rows is 0
        return None, None, None, None, *unit


def _through(
    formulas: tuple[Formula, Formula | None], inputs: tuple[Any, ...], weights: Tensor | None, wanted: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return plain's value per row [N], and the gradient of their sum, weighted if `weights` [N] are given,
    in all that its predictions train. `formulas` are plain, and in_place where there is one.
    """
    plain, in_place = formulas
    first = next(x for x in inputs if not isinstance(x, Tensor))
    positions, vocab = len(first), first.vocab
    trained = [x.trained() if wanted and isinstance(x, FormsGradient) else [] for x in inputs]
    totals = [[torch.zeros_like(tensor) for tensor in tensors] for tensors in trained]
    most, elements = _CHUNK.get(first.targets.device.type, _CHUNK["cuda"])
    rows = max(1, min(most, elements // vocab))
    chunks = max(1, math.ceil(positions / rows))
    rows = max(1, math.ceil(positions / chunks))  # no small chunk at the end, which multiplies slowly
    block = max(1, min(rows, _BLOCK.get(first.targets.device.type, _BLOCK["cuda"]) // vocab))
    if first.targets.device.type != "cpu" or [bool(one) for one in trained] != [True, False]:
        in_place = None
    if not all(isinstance(x, FormsGradient) for x in inputs):
        in_place = None  # a Tensor of logits is its owner's
    values: list[Tensor] = []
    for start in range(0, positions, rows):
        stop = min(start + rows, positions)
        here = None if weights is None else weights[start:stop]
        found = None
        if in_place is not None:
            found = _chunk_in_place(in_place, inputs, start, stop, block, here, totals[0])
        if found is None:
            in_place = None
            found = _through_chunk(plain, inputs, start, stop, block, here, trained, totals)
        values += found
    if not values:
        values = [plain(*(x if isinstance(x, Tensor) else x.chunk(0, 0) for x in inputs))]
    return torch.cat(values), [total for of_one in totals for total in of_one]


def _chunk_in_place(
    in_place: Formula,
    inputs: tuple[Any, ...],
    start: int,
    stop: int,
    block: int,
    weights: Tensor | None,
    total: list[Tensor],
) -> list[Tensor] | None:
    """`_through_chunk` by a formula that overwrites logits, where the first of two models learns; None, with
    nothing added to `total`, where some value is not finite or the models differ in precision.
    """
    q, p = (x.chunk(start, stop) for x in inputs)
    if q.dtype != p.dtype:
        return None
    value = torch.cat([in_place(a, b) for a, b in zip(q.split(block), p.split(block), strict=True)])
    if not bool(value.isfinite().all()):
        return None
    if weights is not None:
        q.mul_(weights[:, None].to(q.dtype))
    inputs[0].pull_back(start, stop, q, total)
    return [value.clamp_(min=0)]


def _through_chunk(
    plain: Formula,
    inputs: tuple[Any, ...],
    start: int,
    stop: int,
    block: int,
    weights: Tensor | None,
    trained: list[list[Tensor]],
    totals: list[list[Tensor]],
) -> list[Tensor]:
    """Return plain's value per row of one chunk, and add the gradient of their sum, weighted if `weights`
    [stop - start] are given, to `totals`; the chunk's logits are gone when it returns.
    """
    values = []
    chunks = [x[start:stop] if isinstance(x, Tensor) else x.chunk(start, stop) for x in inputs]
    for low in range(0, stop - start, block):
        here = [chunk[low : low + block].detach() for chunk in chunks]
        learns = [x.requires_grad_() for x, tensors in zip(here, trained, strict=True) if tensors]
        with torch.set_grad_enabled(bool(learns)):
            value = plain(*here)
        values.append(value.detach())
        if learns:
            weight = torch.ones_like(value)
            if weights is not None:
                weight = weights[low : low + len(value)].to(value.dtype)
            # a formula may leave one of its models out, or have no gradient at all
            found: Sequence[Tensor | None] = [None] * len(learns)
            if value.requires_grad:
                found = torch.autograd.grad(value, learns, weight, allow_unused=True)
            for x, gradient in zip(learns, found, strict=True):
                # in the place of the logits, which nobody needs any more
                x.detach().zero_() if gradient is None else x.detach().copy_(gradient)
    for x, chunk, tensors, total in zip(inputs, chunks, trained, totals, strict=True):
        if tensors:
            x.pull_back(start, stop, chunk, total)
    return values


def _one_number(g: Tensor) -> bool:
    """Whether all entries of `g` [N] are equal, as under a sum or a mean."""
    return g.stride() == (0,) or bool((g == g[:1]).all())


def _autocast_state(inputs: tuple[Any, ...]) -> dict[str, Any]:
    """The state of autocast, as arguments that bring it back, without its cache: in older versions of torch
    that hands a weight which was cast for a chunk of logits, without its graph, to the pass that wants its
    gradient.
    """
    device = next(x for x in inputs if not isinstance(x, Tensor)).targets.device.type
    return {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
        "cache_enabled": False,
    }


def _rows(x: Logits) -> tuple[int, ...]:
    return tuple(x.shape[:-1]) if isinstance(x, Tensor) else (len(x),)


def _vocab(x: Logits) -> int:
    return x.shape[-1] if isinstance(x, Tensor) else x.vocab


def _at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if it has lower precision; float64 and integers unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _unknown(what: str, given: str, known: list[str]) -> str:
    if not known:
        return f"no {what} '{given}': it has none."
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.0)[0]
    return f"no {what} '{given}'. Did you mean '{nearest}'? Known: {', '.join(known)}."
