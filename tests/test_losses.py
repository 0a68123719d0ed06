"""Formulas of kdbench.losses: hand-worked values, float64 numpy, limits, -inf, gradients and chunks."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from kdbench import losses
from kdbench.losses import (
    DIVERGENCES,
    Logits,
    _kl,
    _kl_of_logits,
    adaptive_kl,
    cross_entropy,
    divergence,
    divergence_named,
    entropy,
    forward_kl,
    generalized_jsd,
    log_probs,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    symmetric_kl,
    token_log_prob,
    total_variation,
)
from kdbench.predict import Prediction

Array = npt.NDArray[np.float64]
Pair = Callable[[Array, Array], Array]

INF = math.inf
NAMES = sorted(DIVERGENCES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Reproducible normal logits."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def logits(*rows: list[float]) -> Tensor:
    """Logits [len(rows), V] whose softmax is the given probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


class FakePrediction:
    """N hidden states [N, H] and a head [V, H], projected on demand; remembers what was asked for."""

    def __init__(self, hidden: Tensor, head: Tensor, targets: Tensor | None = None) -> None:
        self.hidden, self.head = hidden, head
        self.vocab = head.shape[0]
        self.targets = torch.zeros(len(hidden), dtype=torch.int64) if targets is None else targets
        self.calls: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.hidden)

    def logits(self, start: int, stop: int) -> Tensor:
        self.calls.append((start, stop))
        return self.hidden[start:stop] @ self.head.T


# Independent computation, in numpy and from probabilities: sums of a log(a / b), no logsumexp.


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True), dtype=np.float64)


def np_kl(a: Array, b: Array) -> Array:
    return np.asarray((a * np.log(a / b)).sum(-1), dtype=np.float64)


def np_forward(q: Array, p: Array) -> Array:
    return np_kl(p, q)


def np_reverse(q: Array, p: Array) -> Array:
    return np_kl(q, p)


def np_symmetric(q: Array, p: Array, weight: float) -> Array:
    return (1 - weight) * np_kl(p, q) + weight * np_kl(q, p)


def np_jsd(q: Array, p: Array, beta: float) -> Array:
    m = beta * p + (1 - beta) * q
    return beta * np_kl(p, m) + (1 - beta) * np_kl(q, m)


def np_skew_forward(q: Array, p: Array, alpha: float) -> Array:
    return np_kl(p, alpha * p + (1 - alpha) * q)


def np_skew_reverse(q: Array, p: Array, alpha: float) -> Array:
    return np_kl(q, (1 - alpha) * p + alpha * q)


def np_total_variation(q: Array, p: Array) -> Array:
    return np.asarray(1 - np.minimum(q, p).sum(-1), dtype=np.float64)


def np_share(q: Array, p: Array, mu: float) -> Array:
    """The head's share of the gap, one row and one token at a time."""
    shares = []
    for q_row, p_row in zip(q, p, strict=True):
        head, tail, mass = 0.0, 0.0, 0.0
        for rank, token in enumerate(sorted(range(len(p_row)), key=lambda v: -p_row[v])):
            mass += p_row[token]
            gap = abs(p_row[token] - q_row[token])
            if rank == 0 or mass <= mu:
                head += gap
            else:
                tail += gap
        shares.append(head / (head + tail))
    return np.array(shares)


def np_adaptive(q: Array, p: Array, mu: float) -> Array:
    share = np_share(q, p, mu)
    return share * np_kl(p, q) + (1 - share) * np_kl(q, p)


REFERENCES: list[tuple[str, dict[str, float], Pair]] = [
    ("forward_kl", {}, np_forward),
    ("reverse_kl", {}, np_reverse),
    ("total_variation", {}, np_total_variation),
    *[("symmetric_kl", {"weight": w}, partial(np_symmetric, weight=w)) for w in (0.0, 0.3, 0.9, 1.0)],
    *[("generalized_jsd", {"beta": b}, partial(np_jsd, beta=b)) for b in (0.1, 0.5, 0.8)],
    *[("skew_forward_kl", {"alpha": a}, partial(np_skew_forward, alpha=a)) for a in (0.0, 0.1, 0.7)],
    *[("skew_reverse_kl", {"alpha": a}, partial(np_skew_reverse, alpha=a)) for a in (0.0, 0.1, 0.7)],
    *[("adaptive_kl", {"mu": m}, partial(np_adaptive, mu=m)) for m in (0.0, 0.3, 0.5, 0.95)],
]
IDS = [f"{name}-{settings}" for name, settings, _ in REFERENCES]


@pytest.mark.parametrize(("name", "settings", "reference"), REFERENCES, ids=IDS)
def test_divergence_matches_numpy(name: str, settings: dict[str, float], reference: Pair) -> None:
    q, p = normal(40, 11, seed=1), normal(40, 11, seed=2)
    expected = reference(softmax(q.numpy()), softmax(p.numpy()))
    np.testing.assert_allclose(DIVERGENCES[name](q, p, **settings).numpy(), expected, rtol=1e-10, atol=1e-13)
    single = DIVERGENCES[name](q.float(), p.float(), **settings)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-4, atol=1e-6)
    shaped = DIVERGENCES[name](q.view(5, 8, 11), p.view(5, 8, 11), **settings)
    assert torch.equal(shaped, DIVERGENCES[name](q, p, **settings).view(5, 8))


def test_every_divergence_has_a_reference_and_its_default_settings() -> None:
    assert {name for name, _, _ in REFERENCES} == set(NAMES)
    q, p = normal(9, 7, seed=1), normal(9, 7, seed=2)
    assert torch.equal(generalized_jsd(q, p), generalized_jsd(q, p, 0.5))
    assert torch.equal(skew_forward_kl(q, p), skew_forward_kl(q, p, 0.1))
    assert torch.equal(skew_reverse_kl(q, p), skew_reverse_kl(q, p, 0.1))
    assert torch.equal(adaptive_kl(q, p), adaptive_kl(q, p, 0.5))
    assert torch.equal(symmetric_kl(q, p), symmetric_kl(q, p, 0.9))


def test_two_tokens_by_hand() -> None:
    # q = (1/2, 1/2), p = (1/4, 3/4)
    q, p = logits([0.5, 0.5]), logits([0.25, 0.75])
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)  # -0.17329 + 0.30410
    reverse = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # 0.34657 - 0.20273
    assert forward == pytest.approx(0.1308120, abs=1e-7)
    assert reverse == pytest.approx(0.1438410, abs=1e-7)
    assert forward_kl(q, p).item() == pytest.approx(forward, abs=1e-12)
    assert reverse_kl(q, p).item() == pytest.approx(reverse, abs=1e-12)
    assert symmetric_kl(q, p).item() == pytest.approx(0.1 * forward + 0.9 * reverse, abs=1e-12)
    assert total_variation(q, p).item() == pytest.approx(0.25, abs=1e-12)
    assert entropy(q).item() == pytest.approx(math.log(2), abs=1e-12)
    assert soft_cross_entropy(q, p).item() == pytest.approx(math.log(2), abs=1e-12)
    assert cross_entropy(p, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3), abs=1e-12)
    assert token_log_prob(p, torch.tensor([0])).item() == pytest.approx(math.log(1 / 4), abs=1e-12)
    # m = (3/8, 5/8) at beta 1/2; at alpha 1/2 the skew mixture is the same m
    from_p = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    from_q = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    assert (from_p + from_q) / 2 == pytest.approx(0.0338221, abs=1e-7)
    assert generalized_jsd(q, p).item() == pytest.approx((from_p + from_q) / 2, abs=1e-12)
    assert skew_forward_kl(q, p, 0.5).item() == pytest.approx(from_p, abs=1e-12)
    assert skew_reverse_kl(q, p, 0.5).item() == pytest.approx(from_q, abs=1e-12)
    # beta and alpha weigh the teacher and the first argument of the KL: m = (9/20, 11/20) is 0.2 p + 0.8 q
    assert generalized_jsd(q, p, 0.2).item() == pytest.approx(
        0.2 * (0.25 * math.log(0.25 / 0.45) + 0.75 * math.log(0.75 / 0.55))
        + 0.8 * (0.5 * math.log(0.5 / 0.45) + 0.5 * math.log(0.5 / 0.55)),
        abs=1e-12,
    )
    assert skew_forward_kl(q, p, 0.2).item() == pytest.approx(
        0.25 * math.log(0.25 / 0.45) + 0.75 * math.log(0.75 / 0.55), abs=1e-12
    )
    assert skew_reverse_kl(q, p, 0.8).item() == pytest.approx(
        0.5 * math.log(0.5 / 0.45) + 0.5 * math.log(0.5 / 0.55), abs=1e-12
    )


def test_three_tokens_by_hand() -> None:
    # p sorted: 0.55, 0.3, 0.15 at tokens 1, 0, 2
    q, p = logits([0.5, 0.3, 0.2]), logits([0.3, 0.55, 0.15])
    forward = 0.3 * math.log(0.6) + 0.55 * math.log(11 / 6) + 0.15 * math.log(0.75)
    reverse = 0.5 * math.log(5 / 3) + 0.3 * math.log(6 / 11) + 0.2 * math.log(4 / 3)
    assert forward == pytest.approx(0.1369747, abs=1e-7)
    assert reverse == pytest.approx(0.1311085, abs=1e-7)
    assert forward_kl(q, p).item() == pytest.approx(forward, abs=1e-12)
    assert reverse_kl(q, p).item() == pytest.approx(reverse, abs=1e-12)
    assert total_variation(q, p).item() == pytest.approx(0.25, abs=1e-12)
    # gaps by rank: 0.25, 0.2, 0.05. mu 0.5: the first token alone, though 0.55 > mu: weight 0.25 / 0.5
    assert adaptive_kl(q, p).item() == pytest.approx(0.5 * forward + 0.5 * reverse, abs=1e-12)
    # mu 0.9: cumulative 0.55 and 0.85 are head, 1.0 is tail: weight 0.45 / 0.5
    assert adaptive_kl(q, p, 0.9).item() == pytest.approx(0.9 * forward + 0.1 * reverse, abs=1e-12)
    # mu 0.8: the second token crosses mu and is tail (DSKD would have it in the head)
    assert adaptive_kl(q, p, 0.8).item() == pytest.approx(0.5 * forward + 0.5 * reverse, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_for_equal_models(name: str, dtype: torch.dtype) -> None:
    p = normal(50, 300, seed=3, scale=4.0, dtype=dtype)
    q = p.clone().requires_grad_()
    value = DIVERGENCES[name](q, p)
    tolerance = 1e-7 if dtype == torch.float32 else 1e-15
    assert value.abs().max() <= tolerance
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert gradient.abs().max() <= tolerance
    # the same model, its logits moved by a constant: still 0 up to the rounding of the logits
    assert DIVERGENCES[name](q + 3.0, p).abs().max() <= 1e2 * tolerance


@pytest.mark.parametrize("name", NAMES)
def test_never_negative(name: str) -> None:
    for seed in range(30):
        near = 10.0 ** -(seed % 8)
        q = normal(20, 100, seed=seed, scale=1.0 + seed, dtype=torch.float32)
        p = q + near * normal(20, 100, seed=1000 + seed, dtype=torch.float32)
        assert DIVERGENCES[name](q, p).min() >= 0
        assert DIVERGENCES[name](q.double(), p.double()).min() >= 0


def test_kl_is_non_negative_by_formula() -> None:
    """The lift of rounding to 0 hides no more than rounding, and keeps the gradient."""
    q = normal(200, 1000, seed=1, scale=3.0, dtype=torch.float32)
    for near in (0.0, 1e-6, 1e-4, 1e-2):
        p = q + near * normal(200, 1000, seed=2, dtype=torch.float32)
        exact = forward_kl(q.double(), p.double())
        assert (forward_kl(q, p) - exact).abs().max() < 2e-7
    half = torch.tensor([[0.5, 0.5]]).log()
    # an error common to the row counts in second order; the plain sum a (log a - log b) would be -1e-3
    assert 0 <= losses._kl(half, half + 1e-3).item() < 1e-6
    p = (q + 1e-6 * normal(200, 1000, seed=2, dtype=torch.float32)).requires_grad_()
    value = forward_kl(q, p)
    (gradient,) = torch.autograd.grad(value.sum(), p)
    assert (value == 0).any()
    assert (gradient[value == 0].abs().sum(-1) > 0).all()


def test_agrees_with_torch_distributions() -> None:
    q, p = normal(30, 17, seed=5), normal(30, 17, seed=6)
    dq, dp = torch.distributions.Categorical(logits=q), torch.distributions.Categorical(logits=p)
    torch.testing.assert_close(forward_kl(q, p), torch.distributions.kl_divergence(dp, dq))
    torch.testing.assert_close(reverse_kl(q, p), torch.distributions.kl_divergence(dq, dp))
    torch.testing.assert_close(entropy(q), dq.entropy())
    torch.testing.assert_close(soft_cross_entropy(q, p), forward_kl(q, p) + dp.entropy())
    ids = torch.arange(30) % 17
    torch.testing.assert_close(token_log_prob(q, ids), dq.log_prob(ids))
    expected = torch.nn.functional.cross_entropy(q, ids, reduction="none")
    torch.testing.assert_close(cross_entropy(q, ids), expected)
    torch.testing.assert_close(cross_entropy(q.view(5, 6, 17), ids.view(5, 6)), expected.view(5, 6))


def test_swapped_arguments() -> None:
    q, p = normal(10, 9, seed=1), normal(10, 9, seed=2)
    torch.testing.assert_close(forward_kl(q, p), reverse_kl(p, q))
    torch.testing.assert_close(skew_forward_kl(q, p), skew_reverse_kl(p, q))
    torch.testing.assert_close(generalized_jsd(q, p, 0.2), generalized_jsd(p, q, 0.8))
    torch.testing.assert_close(total_variation(q, p), total_variation(p, q))
    directed: list[Callable[[Tensor, Tensor], Tensor]] = [
        forward_kl,
        reverse_kl,
        skew_forward_kl,
        skew_reverse_kl,
        symmetric_kl,
        adaptive_kl,
    ]
    directed += [partial(generalized_jsd, beta=0.2), soft_cross_entropy]
    for function in directed:
        assert ((function(q, p) - function(p, q)).abs() > 1e-4).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "symmetric_kl"])
@pytest.mark.parametrize("far", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("predicted", [False, True])
def test_float32_is_near_float64_over_a_large_vocabulary(name: str, far: float, predicted: bool) -> None:
    """Sums over 50,257 entries are accurate to a few of float32's steps, near 0 and far from it."""
    q = normal(20, 50257, seed=1, scale=3.0, dtype=torch.float32)
    p = q + far * normal(20, 50257, seed=2, dtype=torch.float32)
    q.requires_grad_()
    exact_q = q.detach().double().requires_grad_()
    function = DIVERGENCES[name]
    models: list[Logits] = [q, p]
    if predicted:  # formed chunk by chunk
        targets = torch.zeros(20, dtype=torch.long)
        models = [Prediction(x, torch.nn.Identity(), targets, 50257) for x in (q, p)]
    found, exact = function(*models), function(exact_q, p.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)
    (mine,) = torch.autograd.grad(found.sum(), q)
    (theirs,) = torch.autograd.grad(exact.sum(), exact_q)
    assert float((mine.double() - theirs).norm() / theirs.norm()) < 1e-5 / min(far, 1)


@pytest.mark.parametrize("closed", ["", "x", "y", "xy", "apart"])
@pytest.mark.parametrize("trained", ["x", "y", "xy"])
def test_the_closed_form_is_that_of_autograd(closed: str, trained: str) -> None:
    """Also with mass where the other model is closed; gradients of a softmax's logits sum to 0."""
    x, y = normal(7, 40, seed=1), normal(7, 40, seed=2)
    x[:, 3] += 4  # mass
    y[:, 3] += 4
    if closed in ("x", "xy"):
        x[2:5, 3] = -INF
    if closed in ("y", "xy"):
        y[2:5, 3] = -INF
    if closed == "apart":
        x[2:5, 3], y[3:6, 9] = -INF, -INF
    sides = [
        (x.clone().requires_grad_("x" in trained), y.clone().requires_grad_("y" in trained)) for _ in "12"
    ]
    values = _kl_of_logits(*sides[0]), _kl(*map(log_probs, sides[1]))
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    for value in values:
        (value * weights).sum().backward()
    for mine, theirs in zip(*sides, strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
            assert float(mine.grad.sum(-1).abs().max()) < 1e-12


def test_models_of_two_precisions_are_compared_in_the_higher() -> None:
    x, y = normal(5, 30, seed=1, dtype=torch.float32), normal(5, 30, seed=2)
    for one, other in ((x, y), (y, x)):
        found = reverse_kl(one, other)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, reverse_kl(one.double(), other.double()))


def test_limits() -> None:
    q, p = normal(10, 9, seed=1), normal(10, 9, seed=2)
    forward, reverse = forward_kl(q, p), reverse_kl(q, p)
    small = 1e-6
    torch.testing.assert_close(generalized_jsd(q, p, small) / small, forward, rtol=1e-3, atol=0)
    torch.testing.assert_close(generalized_jsd(q, p, 1 - small) / small, reverse, rtol=1e-3, atol=0)
    assert generalized_jsd(q, p, small).max() < 1e-4
    for skew, kl in ((skew_forward_kl, forward), (skew_reverse_kl, reverse)):
        assert torch.equal(skew(q, p, 0.0), kl)
        torch.testing.assert_close(skew(q, p, 1e-8), kl, rtol=1e-5, atol=0)
        assert skew(q, p, 1 - 1e-6).max() < 1e-5
    torch.testing.assert_close(symmetric_kl(q, p, 0.0), forward)
    torch.testing.assert_close(symmetric_kl(q, p, 1.0), reverse)


def test_js_distance_of_distillm_is_generalized_jsd() -> None:
    q, p = normal(10, 9, seed=1), normal(10, 9, seed=2)
    nq, np_ = softmax(q.numpy()), softmax(p.numpy())
    weight = 0.9
    m = (1 - weight) * np_ + weight * nq
    distance = weight * np_kl(nq, m) + (1 - weight) * np_kl(np_, m)
    np.testing.assert_allclose(generalized_jsd(q, p, 0.1).numpy(), distance, rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_adding_a_constant_to_logits_changes_nothing(name: str) -> None:
    q, p = normal(10, 9, seed=1), normal(10, 9, seed=2)
    shift = normal(10, 1, seed=3, scale=50.0)
    torch.testing.assert_close(DIVERGENCES[name](q + shift, p - shift), DIVERGENCES[name](q, p))


@pytest.mark.parametrize("name", NAMES)
def test_both_tails_vanishing_stays_finite(name: str) -> None:
    """At -300 nats float32 probabilities are 0 in both models; log(prob) would give -inf - -inf."""
    q = torch.tensor([[0.0, 1.0, -300.0, -400.0]], requires_grad=True)
    p = torch.tensor([[1.0, 0.0, -400.0, -300.0]], requires_grad=True)
    value = DIVERGENCES[name](q, p)
    expected = DIVERGENCES[name](q[:, :2], p[:, :2])
    torch.testing.assert_close(value, expected)
    for gradient in torch.autograd.grad(value.sum(), (q, p)):
        assert gradient.isfinite().all()


# Entries at -inf.


@pytest.mark.parametrize("name", [*NAMES, "soft_cross_entropy"])
def test_infinite_in_both_is_dropped(name: str) -> None:
    function = DIVERGENCES.get(name, soft_cross_entropy)
    q, p = normal(6, 7, seed=1), normal(6, 7, seed=2)
    closed = torch.full((6, 2), -INF, dtype=torch.float64)
    q_open, p_open = (x.clone().requires_grad_() for x in (q, p))
    q_full, p_full = (torch.cat([x, closed], -1).requires_grad_() for x in (q, p))
    with torch.autograd.set_detect_anomaly(True):
        value = function(q_full, p_full)
        gradients = torch.autograd.grad(value.sum(), (q_full, p_full))
    expected = function(q_open, p_open)
    torch.testing.assert_close(value, expected)
    for full, part in zip(gradients, torch.autograd.grad(expected.sum(), (q_open, p_open)), strict=True):
        torch.testing.assert_close(full[:, :7], part)
        assert (full[:, 7:] == 0).all()


@pytest.mark.parametrize("name", [*NAMES, "soft_cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("closed", ["student", "teacher", "crossed"])
def test_infinite_in_one_gives_finite_values_and_gradients(
    name: str, dtype: torch.dtype, closed: str
) -> None:
    function = DIVERGENCES.get(name, soft_cross_entropy)
    q, p = normal(6, 7, seed=1, dtype=dtype), normal(6, 7, seed=2, dtype=dtype)
    if closed != "teacher":
        q[:, 3] = -INF
    if closed != "student":
        p[:, 5] = -INF
    q.requires_grad_()
    p.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        value = function(q, p)
        gradients = torch.autograd.grad(value.sum(), (q, p))
    assert value.isfinite().all()
    assert (value > 0).all()
    for x, gradient in zip((q, p), gradients, strict=True):
        assert gradient.isfinite().all()
        assert (gradient[x == -INF] == 0).all()


def test_floor_is_100_nats() -> None:
    q, p = logits([0.5, 0.5, 0.0]), logits([0.25, 0.25, 0.5])
    assert q[0, 2] == -INF
    # student closed where the teacher has 1/2: FKL = 1/2 log(1/2) + 1/2 (log(1/2) + 100)
    assert forward_kl(q, p).item() == pytest.approx(50 - math.log(2), abs=1e-9)
    assert reverse_kl(q, p).item() == pytest.approx(math.log(2), abs=1e-9)
    # teacher closed
    assert reverse_kl(p, q).item() == pytest.approx(50 - math.log(2), abs=1e-9)
    assert forward_kl(p, q).item() == pytest.approx(math.log(2), abs=1e-9)
    assert total_variation(q, p).item() == pytest.approx(0.5, abs=1e-12)
    # a bounded divergence takes its exact value: m = (3/8, 3/8, 1/4)
    exact = 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) + 0.5 * math.log(4 / 3)
    assert generalized_jsd(q, p).item() == pytest.approx(exact, abs=1e-9)
    assert token_log_prob(q, torch.tensor([2])).item() == -100
    assert entropy(q).item() == pytest.approx(math.log(2), abs=1e-12)
    # a finite logit is exact, however low
    low = torch.tensor([[0.0, 0.0, -200.0]], dtype=torch.float64)
    assert forward_kl(low, p).item() == pytest.approx(100 - 0.5 * math.log(2), abs=1e-9)


@pytest.mark.parametrize("function", [entropy, cross_entropy, token_log_prob])
def test_scores_with_infinite_logits_have_finite_gradients(function: Callable[..., Tensor]) -> None:
    q = normal(4, 5, seed=1)
    q[:, 2] = -INF
    q.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        value = function(q) if function is entropy else function(q, torch.tensor([2, 0, 1, 2]))
        (gradient,) = torch.autograd.grad(value.sum(), q)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


# Gradients.


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"adaptive_kl"}))
def test_gradients_of_both_arguments(name: str) -> None:
    q, p = normal(3, 5, seed=1).requires_grad_(), normal(3, 5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(DIVERGENCES[name], (q, p))


def test_gradients_of_scores() -> None:
    q, p = normal(3, 5, seed=1).requires_grad_(), normal(3, 5, seed=2).requires_grad_()
    ids = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(soft_cross_entropy, (q, p))
    assert torch.autograd.gradcheck(entropy, (q,))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, ids), (q,))
    assert torch.autograd.gradcheck(lambda x: token_log_prob(x, ids), (q,))


def test_adaptive_weights_carry_no_gradient() -> None:
    q, p = normal(3, 5, seed=1).requires_grad_(), normal(3, 5, seed=2).requires_grad_()
    share = torch.from_numpy(np_share(softmax(q.detach().numpy()), softmax(p.detach().numpy()), 0.5))
    fixed = share * forward_kl(q, p) + (1 - share) * reverse_kl(q, p)
    expected = torch.autograd.grad(fixed.sum(), (q, p))
    for gradient, other in zip(torch.autograd.grad(adaptive_kl(q, p).sum(), (q, p)), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_known_gradients_of_student_logits() -> None:
    """d FKL / d logits = q - p; d RKL / d logits = q (log q - log p - RKL)."""
    z, p = normal(4, 6, seed=1).requires_grad_(), normal(4, 6, seed=2)
    q, teacher = z.detach().softmax(-1), p.softmax(-1)
    (gradient,) = torch.autograd.grad(forward_kl(z, p).sum(), z)
    torch.testing.assert_close(gradient, q - teacher)
    (gradient,) = torch.autograd.grad(soft_cross_entropy(z, p).sum(), z)
    torch.testing.assert_close(gradient, q - teacher)
    (gradient,) = torch.autograd.grad(reverse_kl(z, p).sum(), z)
    ratio = q.log() - teacher.log()
    torch.testing.assert_close(gradient, q * (ratio - (q * ratio).sum(-1, keepdim=True)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trained", ["student", "teacher"])
def test_gradient_flows_into_the_trained_model_only(
    name: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other model is computed under no_grad: distillation trains q, PromptKD's prompt update trains p."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 3 * 7)
    weights = {"student": normal(7, 4, seed=1), "teacher": normal(7, 4, seed=2)}
    hidden = {"student": normal(8, 4, seed=3), "teacher": normal(8, 4, seed=4)}
    hidden[trained].requires_grad_()
    weights[trained].requires_grad_()
    models = {role: FakePrediction(hidden[role], weights[role]) for role in hidden}
    DIVERGENCES[name](models["student"], models["teacher"]).sum().backward()
    for role in hidden:
        for tensor in (hidden[role], weights[role]):
            if role == trained:
                assert tensor.grad is not None
                assert tensor.grad.abs().sum() > 0
            else:
                assert tensor.grad is None


# Precision.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    q, p = normal(10, 50, seed=1, dtype=dtype), normal(10, 50, seed=2, dtype=dtype)
    value = DIVERGENCES[name](q, p)
    assert value.dtype == torch.float32
    assert torch.equal(value, DIVERGENCES[name](q.float(), p.float()))
    assert torch.equal(DIVERGENCES[name](q.float(), p), value)
    assert DIVERGENCES[name](q.double(), p.double()).dtype == torch.float64


def test_scores_in_low_precision_are_computed_in_float32() -> None:
    q, ids = normal(10, 50, seed=1, dtype=torch.bfloat16), torch.arange(10)
    assert torch.equal(entropy(q), entropy(q.float()))
    assert torch.equal(cross_entropy(q, ids), cross_entropy(q.float(), ids))
    assert log_probs(q).dtype == torch.float32


# Predictions and chunks.


def predictions(dtype: torch.dtype, rows: int = 23) -> tuple[FakePrediction, FakePrediction]:
    """Student and teacher of 23 positions and 13 entries, all four tensors requiring gradients."""
    ids = torch.arange(rows) % 13
    parts = [
        normal(*shape, seed=seed, scale=1.0, dtype=dtype).requires_grad_()
        for seed, shape in enumerate([(rows, 5), (13, 5), (rows, 6), (13, 6)])
    ]
    return FakePrediction(parts[0], parts[1], ids), FakePrediction(parts[2], parts[3], ids)


SCORES: dict[str, Callable[..., Tensor]] = {
    **DIVERGENCES,
    "soft_cross_entropy": soft_cross_entropy,
    "entropy": lambda q, p: entropy(q),
    "cross_entropy": lambda q, p: cross_entropy(q),
    "token_log_prob": lambda q, p: token_log_prob(q),
}


@pytest.mark.parametrize("name", sorted(SCORES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_equal_the_whole(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    function = SCORES[name]
    q, p = predictions(dtype)
    inputs = (q.hidden, q.head, p.hidden, p.head)
    weights = normal(23, seed=9, dtype=dtype)

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        q.calls.clear()
        value = function(q, p)
        total = (weights * value).sum()
        return value.detach(), torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)

    whole, whole_gradients = run()
    assert q.calls == [(0, 23)]  # one chunk runs directly: projected once
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * 13 + 12)
    value, gradients = run()
    chunks = [(a, min(a + 4, 23)) for a in range(0, 23, 4)]
    assert q.calls[:6] == chunks
    assert sorted(q.calls[6:]) == chunks  # recomputed in the backward pass
    assert value.shape == (23,)
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-13, 1e-14)
    torch.testing.assert_close(value, whole, rtol=atol, atol=atol)
    for one, other in zip(gradients, whole_gradients, strict=True):
        assert (one - other).norm() <= rtol * other.norm() + atol * (other.norm() == 0)
    tensors = (q.logits(0, 23), p.logits(0, 23))
    if name in ("cross_entropy", "token_log_prob"):
        direct = {"cross_entropy": cross_entropy, "token_log_prob": token_log_prob}[name](
            tensors[0], q.targets
        )
    else:
        direct = function(*tensors)
    torch.testing.assert_close(value, direct.detach(), rtol=atol, atol=atol)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(function(q, p).detach(), whole, rtol=atol, atol=atol)


def test_chunks_keep_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * 13)
    q, p = predictions(torch.float32)
    with torch.no_grad():
        reverse_kl(q, p)
    assert len(q.calls) == 6  # without gradients nothing is recomputed
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = reverse_kl(q, p)
    assert max(kept, default=0) <= 23
    assert value.requires_grad


def test_prediction_beside_a_tensor_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, p = predictions(torch.float64)
    expected = forward_kl(q, p)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * 13)
    torch.testing.assert_close(forward_kl(q, p.logits(0, 23)), expected)
    torch.testing.assert_close(forward_kl(q.logits(0, 23), p), expected)


def test_no_positions() -> None:
    q, p = predictions(torch.float32, rows=0)
    for name in SCORES:
        value = SCORES[name](q, p)
        assert value.shape == (0,)
        torch.autograd.grad(value.sum(), (q.hidden, q.head))


def test_own_divergence_is_chunked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    @divergence
    def squared_gap(q: Tensor, p: Tensor, scale: float = 1.0) -> Tensor:
        """Mean squared difference of centred logits."""
        seen.append(tuple(q.shape))
        return scale * ((q - q.mean(-1, keepdim=True)) - (p - p.mean(-1, keepdim=True))).square().mean(-1)

    assert squared_gap.__name__ == "squared_gap"
    q, p = predictions(torch.float32)
    whole = squared_gap(q, p, scale=2.0)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 10 * 13)
    seen.clear()
    torch.testing.assert_close(squared_gap(q, p, 2.0), whole)
    assert seen == [(10, 13), (10, 13), (3, 13)]
    seen.clear()
    assert squared_gap(q.logits(0, 23).bfloat16(), p.logits(0, 23)).dtype == torch.float32

    @divergence
    def summed(q: Tensor, p: Tensor) -> Tensor:
        return (q - p).sum()

    with pytest.raises(ValueError, match=r"summed: returned shape \(\) .* \(10,\), is needed"):
        summed(q, p)


# Errors.


def test_different_vocabularies_are_refused() -> None:
    q, p = normal(3, 5), normal(3, 6)
    for name in NAMES:
        with pytest.raises(ValueError, match=f"{name}: the student has 5 .* the teacher 6"):
            DIVERGENCES[name](q, p)
    with pytest.raises(ValueError, match="the student has 13 .* the teacher 6"):
        forward_kl(predictions(torch.float32)[0], p)


def test_different_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student has positions \(3,\), the teacher \(1,\)"):
        forward_kl(normal(3, 5), normal(1, 5))
    with pytest.raises(ValueError, match=r"\(23,\), the teacher \(22,\)"):
        forward_kl(predictions(torch.float32)[0], predictions(torch.float32, rows=22)[1])


def test_settings_out_of_range_are_refused() -> None:
    q, p = normal(3, 5), normal(3, 5, seed=1)
    with pytest.raises(ValueError, match=r"beta = 0 is not in \(0, 1\).*forward_kl"):
        generalized_jsd(q, p, beta=0)
    with pytest.raises(ValueError, match=r"beta = 1 is not in \(0, 1\).*reverse_kl"):
        generalized_jsd(q, p, beta=1)
    for bad in (-0.1, 1.0, math.nan):
        for skew in (skew_forward_kl, skew_reverse_kl):
            with pytest.raises(ValueError, match="alpha"):
                skew(q, p, alpha=bad)
        with pytest.raises(ValueError, match="mu"):
            adaptive_kl(q, p, mu=bad)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="weight"):
            symmetric_kl(q, p, weight=bad)
        with pytest.raises(ValueError, match="beta"):
            generalized_jsd(q, p, beta=bad)


def test_targets_are_checked() -> None:
    q = normal(3, 5)
    with pytest.raises(ValueError, match="no targets of their own"):
        cross_entropy(q)
    with pytest.raises(ValueError, match=r"\(4,\) given, integers of shape \(3,\)"):
        cross_entropy(q, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="float32"):
        token_log_prob(q, torch.zeros(3))


def test_divergence_by_name() -> None:
    q, p = normal(3, 5), normal(3, 5, seed=1)
    assert torch.equal(divergence_named("generalized_jsd", beta=0.2)(q, p), generalized_jsd(q, p, 0.2))
    for name in NAMES:
        assert torch.equal(divergence_named(name)(q, p), DIVERGENCES[name](q, p))
    with pytest.raises(ValueError, match="no divergence 'revers_kl'. Did you mean 'reverse_kl'"):
        divergence_named("revers_kl")
    with pytest.raises(ValueError, match="no setting of skew_forward_kl 'beta'. .*Known: alpha"):
        divergence_named("skew_forward_kl", beta=0.1)
    with pytest.raises(ValueError, match="it has none"):
        divergence_named("forward_kl", beta=0.1)
    with pytest.raises(ValueError, match=r"beta = 0 is not in \(0, 1\)"):
        divergence_named("generalized_jsd", beta=0)


# ------------------------------------------------------------------------------ several terms at once
@pytest.mark.parametrize("formed", [True, False], ids=["prediction", "checkpointed"])
def test_terms_together_are_the_terms_apart(formed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass over chunks of four rows: value, gradient, the numbers beside it; weights per position."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * V_WIDE)
    monkeypatch.setitem(losses._CHUNK, "cpu", (4, 4 * V_WIDE))
    monkeypatch.setitem(losses._BLOCK, "cpu", 3 * V_WIDE)
    hidden, targets, weight = normal(11, 5), torch.arange(11) % V_WIDE, normal(11, seed=3).abs()
    heads = [torch.nn.Linear(5, V_WIDE, bias=False).double() for _ in range(2)]

    def model(index: int, x: Tensor) -> Logits:
        if formed:
            return Prediction(x, heads[index], targets, V_WIDE)
        return Headed(x, heads[index], targets)

    def terms(q: Tensor, p: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        ce, kl = cross_entropy(q, y), w * reverse_kl(q, p / 2)
        return ce + 3 * kl, ce, kl

    found: list[Tensor] = []
    for together in (True, False):
        x = hidden.clone().requires_grad_()
        heads[0].weight.grad = None
        with torch.no_grad():
            p = model(1, hidden)
        q = model(0, x)
        if together:
            value, ce, kl = losses.by_position(terms, q, p, targets, weight)
            assert not ce.requires_grad
            assert not kl.requires_grad
        else:
            logits_p = heads[1](hidden).detach()
            ce = cross_entropy(heads[0](x), targets)
            kl = weight * reverse_kl(heads[0](x), logits_p / 2)
            value = ce + 3 * kl
        value.mean().backward()
        assert x.grad is not None
        assert heads[0].weight.grad is not None
        found += [value.detach(), ce.detach(), kl.detach(), x.grad, heads[0].weight.grad]
    for one, other in zip(found[:5], found[5:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


V_WIDE = 7


class Headed:
    """A prediction that offers no more than logits on demand."""

    def __init__(self, hidden: Tensor, head: torch.nn.Module, targets: Tensor) -> None:
        self.hidden, self.head, self.targets, self.vocab = hidden, head, targets, V_WIDE
        if isinstance(head, torch.nn.Identity):
            self.vocab = hidden.shape[1]
        self.grad = torch.is_grad_enabled()

    def __len__(self) -> int:
        return len(self.hidden)

    def logits(self, start: int, stop: int) -> Tensor:
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            logits: Tensor = self.head(self.hidden[start:stop])
            return logits


def test_terms_together_refuse_models_that_do_not_fit() -> None:
    q, p = normal(3, 7), normal(3, 8)
    with pytest.raises(ValueError, match="8 vocabulary entries"):
        losses.by_position(
            lambda a, b: (reverse_kl(a, b),), q, Headed(p, torch.nn.Identity(), p[:, 0].long())
        )
