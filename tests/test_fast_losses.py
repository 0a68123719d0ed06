"""Divergences of predictions, formed chunk by chunk: values and gradients are those of the plain formula on
whole logits in float64, and no tensor of tokens times vocabulary exists.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_kit import V, ragged_rows, tiny_gpt2
from test_losses import SCORES
from test_prompts import Capped, Scaled, prompted, single_rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdbench import losses
from kdbench.distiller import token_mean
from kdbench.losses import (
    _kl,
    cross_entropy,
    divergence,
    entropy,
    forward_kl,
    log_probs,
    reverse_kl,
)
from kdbench.predict import Prediction, predict

INF = math.inf
ROWS, VOCAB, WIDTH = 23, 13, 5
TARGETS = torch.arange(ROWS) % VOCAB
TOLERANCE = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-11, 1e-10)}
"""Of a value and, relative to its norm, of a gradient."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six chunks of 4 rows, formulas over 2 rows at once: the last of each is smaller than the rest."""
    monkeypatch.setitem(losses._CHUNK, "cpu", (4, 2**20))
    monkeypatch.setitem(losses._BLOCK, "cpu", 3 * VOCAB)


@divergence
def users_own(q: Tensor, p: Tensor, scale: float = 3.0) -> Tensor:
    """What the author of a method writes: a plain function of two chunks of logits."""
    log_q, log_p = log_probs(q), log_probs(p)
    return scale * ((log_q - log_p).tanh() * log_p.exp()).sum(-1) + (0.1 * log_q * log_p).sin().sum(-1)


FORMULAS: dict[str, Callable[..., Tensor]] = {**SCORES, "users_own": users_own}
UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda values: values.sum(),
    "token mean": lambda values: values.sum() / 31,
    "scaled mean": lambda values: (0.25 * values).mean(),
    "row weights": lambda values: (values * torch.linspace(-1, 2, len(values), dtype=values.dtype)).sum(),
    "example means": lambda values: torch.stack([one.mean() for one in values.split([5, 1, 10, 7])]).sum(),
    "squares": lambda values: (values**2).sum(),
}


def plain(name: str, q: Tensor, p: Tensor, targets: Tensor) -> Tensor:
    """The formula on whole logits."""
    said = log_probs(q).gather(-1, targets[:, None])[:, 0]
    if name == "cross_entropy":
        return -said
    if name == "token_log_prob":
        return said
    if name in ("forward_kl", "reverse_kl"):  # not the closed form, which `FORMULAS` have
        first, second = (p, q) if name == "forward_kl" else (q, p)
        return _kl(log_probs(first), log_probs(second))
    return entropy(q) if name == "entropy" else FORMULAS[name](q, p)


class Side:
    """Hidden states and a head of one model: leaves to differentiate in, and the same in float64."""

    def __init__(
        self, seed: int, dtype: torch.dtype, kind: str = "random", bias: bool = True, rows: int = ROWS
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale = {"sharp": 8.0, "flat": 1e-3}.get(kind, 1.0)
        parts = [
            scale * torch.randn(s, generator=generator) for s in ((rows, WIDTH), (VOCAB, WIDTH), (VOCAB,))
        ]
        if kind.startswith("closed"):
            parts[2][{"closed": 3, "closed elsewhere": 6}[kind]] = -INF
        self.hidden = parts[0].to(dtype).requires_grad_()
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias or kind.startswith("closed")).to(dtype)
        with torch.no_grad():
            self.head.weight.copy_(parts[1])
            if self.head.bias is not None:
                self.head.bias.copy_(parts[2])
        self.exact = [x.detach().double().requires_grad_() for x in self.leaves()]

    def leaves(self) -> list[Tensor]:
        return [self.hidden, *self.head.parameters()]

    def prediction(self) -> Prediction:
        return Prediction(self.hidden, self.head, TARGETS[: len(self.hidden)], VOCAB)

    def logits(self) -> Tensor:
        """Whole, in float64."""
        hidden, weight, *bias = self.exact
        found: Tensor = hidden @ weight.T + (bias[0] if bias else 0)
        return found


def assert_near(mine: list[Tensor | None], exact: list[Tensor | None], near: float) -> None:
    for one, other in zip(mine, exact, strict=True):
        if other is None or one is None:
            assert all(x is None or not x.any() for x in (one, other))
            continue
        assert one.isfinite().all()
        far = float((one.double() - other).norm())
        assert far <= near * float(other.norm()) + 1e-3 * near, (far, float(other.norm()))


def check(
    name: str, sides: tuple[Side, Side], upstream: str, dtype: torch.dtype, trained: str = "qp"
) -> None:
    """Compare value and gradients in all leaves with the formula in float64."""
    value_near, gradient_near = TOLERANCE[dtype]
    predictions, exact = [], []
    for side, letter in zip(sides, "qp", strict=True):
        with torch.set_grad_enabled(letter in trained):
            predictions.append(side.prediction())
            exact.append(side.logits())
    values = FORMULAS[name](*predictions)
    wanted = plain(name, *exact, TARGETS)
    assert values.dtype == dtype
    assert values.shape == (ROWS,)
    torch.testing.assert_close(values.double(), wanted, rtol=value_near, atol=value_near)
    own = [x for side, letter in zip(sides, "qp", strict=True) if letter in trained for x in side.leaves()]
    theirs = [x for side, letter in zip(sides, "qp", strict=True) if letter in trained for x in side.exact]
    mine = torch.autograd.grad(UPSTREAM[upstream](values), own, allow_unused=True)
    gradients = torch.autograd.grad(UPSTREAM[upstream](wanted), theirs, allow_unused=True)
    assert_near(list(mine), list(gradients), gradient_near)


# ------------------------------------------------------------------------ the formula on whole logits
@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_the_plain_formula(
    name: str, upstream: str, dtype: torch.dtype
) -> None:
    """In hidden states, head weight and head bias of both models."""
    check(name, (Side(1, dtype), Side(2, dtype)), upstream, dtype)


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize(
    ("first", "second"),
    [("sharp", "sharp"), ("flat", "flat"), ("closed", "random"), ("random", "closed"), ("closed", "closed"),
     ("closed", "closed elsewhere")],
)  # fmt: skip
@pytest.mark.parametrize("trained", ["qp", "q"])
def test_structured_logits(name: str, first: str, second: str, trained: str) -> None:
    """Nearly certain or nearly uniform models, and entries at -inf in one or both of them."""
    dtype = torch.float64
    for upstream in ("token mean", "row weights"):
        check(name, (Side(1, dtype, first), Side(2, dtype, second)), upstream, dtype, trained)


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("trained", ["q", "p", ""])
def test_a_fixed_model_gets_no_gradient(name: str, trained: str) -> None:
    sides = Side(1, torch.float64, bias=False), Side(2, torch.float64)
    if not trained or (trained == "p" and name in ("entropy", "cross_entropy", "token_log_prob")):
        with torch.set_grad_enabled(bool(trained)):
            p = sides[1].prediction()
        with torch.no_grad():
            q = sides[0].prediction()
        assert not FORMULAS[name](q, p).requires_grad
        return
    check(name, sides, "scaled mean", torch.float64, trained)
    check(name, sides, "row weights", torch.float64, trained)
    letters = dict(zip("qp", sides, strict=True))
    with torch.no_grad():
        fixed = letters["p" if trained == "q" else "q"].prediction()
    moving = letters[trained].prediction()
    FORMULAS[name](*((moving, fixed) if trained == "q" else (fixed, moving))).sum().backward()
    assert all(x.grad is not None for x in letters[trained].leaves())
    assert all(x.grad is None for x in letters["p" if trained == "q" else "q"].leaves())


@pytest.mark.parametrize("frozen", ["head", "hidden", "bias"])
@pytest.mark.parametrize("upstream", ["token mean", "row weights"])
def test_parts_of_a_model_may_be_frozen(frozen: str, upstream: str) -> None:
    sides = Side(1, torch.float64), Side(2, torch.float64)
    q, p = sides
    gone = {"head": [q.head.weight, q.head.bias], "hidden": [q.hidden], "bias": [q.head.bias]}[frozen]
    for leaf in gone:
        leaf.requires_grad_(False)
    with torch.no_grad():
        fixed, logits = p.prediction(), p.logits()
    value = UPSTREAM[upstream](reverse_kl(q.prediction(), fixed))
    value.backward()
    exact = torch.autograd.grad(UPSTREAM[upstream](reverse_kl(q.logits(), logits)), q.exact)
    left = [(x.grad, e) for x, e in zip(q.leaves(), exact, strict=True) if x.requires_grad]
    assert_near([one for one, _ in left], [other for _, other in left], 1e-10)
    assert all(x.grad is None for x in gone)


@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (2, 1000), (7, 2), (22, 3), (23, 1000), (1000, 1)])
def test_any_cut_gives_the_same(chunk: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses._CHUNK, "cpu", (chunk, 2**20))
    monkeypatch.setitem(losses._BLOCK, "cpu", block * VOCAB)
    for upstream in ("token mean", "row weights"):
        check("forward_kl", (Side(1, torch.float64), Side(2, torch.float64)), upstream, torch.float64)
    monkeypatch.setitem(losses._CHUNK, "cpu", (1000, chunk * VOCAB))  # cut by elements, not by rows
    check("reverse_kl", (Side(1, torch.float64), Side(2, torch.float64)), "row weights", torch.float64)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("upstream", ["token mean", "row weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_alone_learns_in_the_place_of_its_logits(
    name: str, upstream: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the closed form, without autograd; it is not asked where the teacher learns too, or alone."""
    plain_formula: Any = FORMULAS[name].__wrapped__  # type: ignore[attr-defined]
    formed, asked = losses._in_place[plain_formula], []
    counting = lambda q, p: (asked.append(len(q)), formed(q, p))[1]
    monkeypatch.setitem(losses._in_place, plain_formula, counting)
    check(name, (Side(1, dtype), Side(2, dtype)), upstream, dtype, "q")
    passes = 2 if upstream == "row weights" else 1
    assert asked == passes * [3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3]
    asked.clear()
    check(name, (Side(1, dtype, "closed"), Side(2, dtype)), upstream, dtype, "q")
    assert asked == passes * [3, 1]  # not again once a logit was at -inf
    check(name, (Side(1, dtype), Side(2, dtype)), upstream, dtype, "qp")
    check(name, (Side(1, dtype), Side(2, dtype)), upstream, dtype, "p")
    assert len(asked) == passes * 2


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_no_other_position_of_a_tempered_student_suffers_from_one_that_is_not_finite(name: str) -> None:
    q, p = Side(1, torch.float64), Side(2, torch.float64)
    with torch.no_grad():
        q.hidden[9] = q.exact[0][9] = INF
        fixed, logits = p.prediction(), p.logits()
    values = FORMULAS[name](q.prediction().tempered(2.5), fixed.tempered(2.5))
    wanted = plain(name, q.logits() / 2.5, logits / 2.5, TARGETS)
    rest = torch.arange(ROWS) != 9
    torch.testing.assert_close(values[rest], wanted[rest], rtol=1e-11, atol=1e-11)
    assert values[9].isnan()
    mine = torch.autograd.grad(values.sum(), q.hidden)[0]
    assert_near([mine[rest]], [torch.autograd.grad(wanted[rest].sum(), q.exact[0])[0][rest]], 1e-10)


def test_settings_that_a_formula_has_not_are_refused() -> None:
    q, p = Side(1, torch.float64), Side(2, torch.float64)
    with torch.no_grad():
        fixed = p.prediction()
    with pytest.raises(TypeError, match=r"forward_kl\(\) got an unexpected keyword argument 'alpha'"):
        forward_kl(q.prediction(), fixed, alpha=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional argument"):
        reverse_kl(q.prediction(), fixed, 7.0)  # type: ignore[call-arg]


# ------------------------------------------------------------------------------- more than one loss
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_two_losses_of_one_prediction(upstream: str) -> None:
    q, p = Side(1, torch.float64), Side(2, torch.float64)
    with torch.no_grad():
        fixed, logits = p.prediction(), p.logits()
    one = q.prediction()
    total = UPSTREAM[upstream](forward_kl(one, fixed)) + 0.3 * cross_entropy(one).sum() - entropy(one).mean()
    exact = (
        UPSTREAM[upstream](forward_kl(q.logits(), logits))
        + 0.3 * cross_entropy(q.logits(), TARGETS).sum()
        - entropy(q.logits()).mean()
    )
    mine = torch.autograd.grad(total, q.leaves())
    assert_near(list(mine), list(torch.autograd.grad(exact, q.exact)), 1e-10)


def test_one_prediction_on_both_sides() -> None:
    q = Side(1, torch.float64)
    one = q.prediction()
    value = reverse_kl(one.tempered(2.0), one)
    wanted = reverse_kl(q.logits() / 2, q.logits())
    torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-12)
    mine = torch.autograd.grad(value.sum(), q.leaves())
    assert_near(list(mine), list(torch.autograd.grad(wanted.sum(), q.exact)), 1e-10)


@pytest.mark.parametrize("upstream", ["sum", "row weights"])
def test_backward_twice_and_in_place_changes_of_what_it_returned(upstream: str) -> None:
    q, p = Side(1, torch.float64), Side(2, torch.float64)
    values = reverse_kl(q.prediction(), p.prediction())
    leaves = [*q.leaves(), *p.leaves()]
    first = torch.autograd.grad(UPSTREAM[upstream](values), leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()  # as an optimizer or a clipping may do
    again = torch.autograd.grad(UPSTREAM[upstream](values), leaves, retain_graph=True)
    assert_near(list(again), list(kept), 1e-14)
    other = torch.autograd.grad((3 * values).sum(), leaves)
    wanted = reverse_kl(q.logits(), p.logits())
    assert_near(list(other), list(torch.autograd.grad((3 * wanted).sum(), [*q.exact, *p.exact])), 1e-10)


@pytest.mark.parametrize("name", ["cross_entropy", "reverse_kl"])
def test_a_mean_is_formed_in_one_pass(name: str) -> None:
    """Each chunk is projected once where all rows weigh the same, and twice where they do not."""
    for upstream, passes in {"sum": 1, "token mean": 1, "scaled mean": 1, "row weights": 2}.items():
        q, p = Side(1, torch.float64), Side(2, torch.float64)
        one, calls = q.prediction(), []
        project = one.chunk
        one.chunk = lambda *at, project=project, calls=calls: (calls.append(at), project(*at))[1]  # type: ignore[method-assign]
        with torch.no_grad():
            fixed = p.prediction()
        UPSTREAM[upstream](FORMULAS[name](one, fixed)).backward()
        assert calls == passes * [(a, min(a + 4, ROWS)) for a in range(0, ROWS, 4)], upstream
    q.head.requires_grad_(False)  # a gradient for the hidden states alone never takes two
    one, calls = q.prediction(), []
    project = one.chunk
    one.chunk = lambda *at: (calls.append(at), project(*at))[1]  # type: ignore[method-assign]
    UPSTREAM["row weights"](FORMULAS[name](one, fixed)).backward()
    assert len(calls) == 6


def test_weights_changed_before_the_backward_pass_are_refused() -> None:
    """Where the gradient is formed only then, it would be that of other weights than the value."""
    q, p = Side(1, torch.float64), Side(2, torch.float64)
    values = reverse_kl(q.prediction(), p.prediction())
    with torch.no_grad():
        q.head.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        UPSTREAM["row weights"](values).backward()


# --------------------------------------------------------------------------- formulas of other kinds
def test_formulas_that_leave_a_model_out_or_have_no_gradient() -> None:
    @divergence
    def of_the_student(q: Tensor, p: Tensor) -> Tensor:
        return log_probs(q).square().sum(-1)

    @divergence
    def to_a_fixed_teacher(q: Tensor, p: Tensor) -> Tensor:
        return -(log_probs(p.detach()).exp() * log_probs(q)).sum(-1)

    @divergence
    def agreement(q: Tensor, p: Tensor) -> Tensor:
        return (q.argmax(-1) == p.argmax(-1)).float()

    for function in (of_the_student, to_a_fixed_teacher):
        q, p = Side(1, torch.float64), Side(2, torch.float64)
        UPSTREAM["row weights"](function(q.prediction(), p.prediction())).backward()
        function(q.prediction(), p.prediction()).sum().backward()
        wanted = function(q.logits(), p.logits())
        (UPSTREAM["row weights"](wanted) + wanted.sum()).backward()
        assert_near([x.grad for x in q.leaves()], [x.grad for x in q.exact], 1e-10)
        assert all(x.grad is None or not x.grad.any() for x in p.leaves())
    found = agreement(q.prediction(), p.prediction())
    assert torch.equal(found.detach(), agreement(q.logits(), p.logits()))
    (found.sum() + forward_kl(q.prediction(), p.prediction()).sum()).backward()


def test_a_formula_that_returns_no_value_per_row_is_refused() -> None:
    @divergence
    def summed(q: Tensor, p: Tensor) -> Tensor:
        return (q - p).sum()

    with pytest.raises(ValueError, match=r"summed: returned shape \(\)"):
        summed(Side(1, torch.float64).prediction(), Side(2, torch.float64).prediction())


def test_tensors_beside_predictions() -> None:
    """A Tensor without a gradient is cut with the chunks; one with a gradient gets it."""
    q, p = Side(1, torch.float64), Side(2, torch.float64)
    fixed = p.logits().detach()
    before = fixed.clone()
    mine = torch.autograd.grad(forward_kl(q.prediction(), fixed).sum(), q.leaves())
    exact = torch.autograd.grad(forward_kl(q.logits(), fixed).sum(), q.exact)
    assert_near(list(mine), list(exact), 1e-10)
    assert torch.equal(fixed, before)  # its owner's, though a chunk of logits is written over
    moving = fixed.clone().requires_grad_()
    mine = torch.autograd.grad(forward_kl(q.prediction(), moving).sum(), [*q.leaves(), moving])
    exact = torch.autograd.grad(forward_kl(q.logits(), moving).sum(), [*q.exact, moving])
    assert_near(list(mine), list(exact), 1e-10)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_no_rows(name: str) -> None:
    q, p = Side(1, torch.float32, rows=0), Side(2, torch.float32, rows=0)
    for weigh in (lambda v: v.sum(), lambda v: (v * v).sum(), lambda v: 2 * v.sum() / 7):
        value = FORMULAS[name](q.prediction(), p.prediction())
        assert value.shape == (0,)
        assert value.dtype == torch.float32
        found = torch.autograd.grad(weigh(value), q.leaves(), allow_unused=True)
        assert all(x is None or not x.any() for x in found)


# ------------------------------------------------------------------------------------ whole models
def models(tied: bool, bias: str) -> tuple[Any, Any]:
    """Student and teacher, GPT-2 in float64: heads tied to the embedding or not, with a bias or without."""
    found = []
    for seed, width in ((1, 16), (2, 8)):
        model: Any = tiny_gpt2(seed, width=width, layers=2)
        if bias:
            head = nn.Linear(width, V).double()
            head.weight = model.lm_head.weight
            if bias == "closed":
                with torch.no_grad():
                    head.bias[5 + seed] = -INF
            model.set_output_embeddings(head)
        if not tied:
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach() + 0.1 * torch.randn_like(head.weight))
        found.append(model)
    return found[0], found[1]


def whole(name: str, q: Tensor, p: Tensor) -> Tensor:
    return plain(name, q, p, predict(tiny_gpt2(1), ragged_rows()).targets)


SOME = ["forward_kl", "generalized_jsd", "cross_entropy"]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", ["", "closed"])
def test_gradient_in_every_parameter_of_a_model(name: str, tied: bool, bias: str) -> None:
    """Of a tied embedding it is the sum of what it gets as embedding and as head."""
    student, teacher = models(tied, bias)
    reference, fixed = copy.deepcopy(student), copy.deepcopy(teacher)
    batch = ragged_rows()
    with torch.no_grad():
        p, exact_p = predict(teacher, batch), single_rows(fixed, batch)
    values = FORMULAS[name](predict(student, batch), p)
    exact = whole(name, single_rows(reference, batch), exact_p)
    torch.testing.assert_close(values, exact, rtol=1e-10, atol=1e-12)
    for one in (values, exact):
        token_mean(one, batch).backward()
    named = dict(student.named_parameters())
    assert any("lm_head" in n for n in named) == (not tied or bool(bias))
    assert_near([x.grad for x in named.values()], [x.grad for x in reference.parameters()], 1e-10)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    ("temperature", "vocab", "tied"), [(0.5, None, True), (3.0, 9, True), (3.0, 9, False)]
)
def test_temperature_and_a_cut_vocabulary(
    name: str, temperature: float, vocab: int | None, tied: bool
) -> None:
    """Ids beyond the usable ones take no part, and their rows of the head get no gradient from it."""
    student, teacher = models(tied, "")
    reference, fixed = copy.deepcopy(student), copy.deepcopy(teacher)
    batch = ragged_rows()
    batch = batch.replace(input_ids=batch["input_ids"].clamp(max=8))
    student.config.kdbench_vocab = teacher.config.kdbench_vocab = vocab
    with torch.no_grad():
        p = predict(teacher, batch).tempered(temperature)
        exact_p = single_rows(fixed, batch)[:, :vocab] / temperature
    q = predict(student, batch).tempered(temperature)
    exact_q = single_rows(reference, batch)[:, :vocab] / temperature
    values, exact = FORMULAS[name](q, p), plain(name, exact_q, exact_p, q.targets)
    torch.testing.assert_close(values, exact, rtol=1e-10, atol=1e-12)
    for one in (values, exact):
        UPSTREAM["squares"](one).backward()
    assert_near([x.grad for x in student.parameters()], [x.grad for x in reference.parameters()], 1e-10)
    if vocab and not tied:
        assert not student.lm_head.weight.grad[vocab:].any()


@pytest.mark.parametrize("kind", [Scaled, Capped])
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_models_that_scale_or_cap_their_logits(kind: type[Any], name: str, temperature: float) -> None:
    plain_student, teacher = models(True, "")
    student: Any = kind(plain_student.config).double().eval()
    reference, batch = copy.deepcopy(student), ragged_rows()
    with torch.no_grad():
        p = predict(teacher, batch)
    q = predict(student, batch).tempered(temperature)
    values = FORMULAS[name](q, p)
    exact = whole(name, single_rows(reference, batch) / temperature, p.logits())
    torch.testing.assert_close(FORMULAS[name](q, p), exact, rtol=1e-10, atol=1e-12)  # q is not used up
    torch.testing.assert_close(values, exact, rtol=1e-10, atol=1e-12)
    for one in (values, exact):
        UPSTREAM["row weights"](one).backward()
    assert_near([x.grad for x in student.parameters()], [x.grad for x in reference.parameters()], 1e-10)


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("regularised", ["forward_kl", "reverse_kl"])
def test_the_prompt_of_a_frozen_teacher_learns(direction: str, regularised: str) -> None:
    """PromptKD's prompt update: the teacher behind the prompt is q or p, the student and the bare teacher
    are fixed; two losses of one prediction.
    """
    student, teacher = models(True, "")
    teacher.requires_grad_(False)
    behind, reference = prompted(teacher), prompted(copy.deepcopy(teacher))
    batch = ragged_rows()
    with torch.no_grad():
        fixed, bare = predict(student, batch), predict(teacher, batch)
    moving = predict(behind, batch)
    total = token_mean(FORMULAS[direction](moving, fixed), batch)
    total = total + 0.5 * token_mean(FORMULAS[regularised](bare, moving), batch)
    logits = single_rows(reference, batch)
    exact = token_mean(FORMULAS[direction](logits, fixed.logits()), batch)
    exact = exact + 0.5 * token_mean(FORMULAS[regularised](bare.logits(), logits), batch)
    torch.testing.assert_close(total, exact, rtol=1e-10, atol=1e-12)
    total.backward()
    exact.backward()
    assert_near([behind.prompt.vectors.grad], [reference.prompt.vectors.grad], 1e-10)
    assert all(x.grad is None for model in (student, teacher) for x in model.parameters())


def test_predictions_made_while_parameters_are_switched_off_and_on() -> None:
    """The harness switches a group's gradients off between updates: what counts is the time of prediction."""
    student, teacher = models(True, "")
    batch = ragged_rows()
    for model in (student, teacher):
        model.requires_grad_(False)
    fixed = predict(teacher, batch)
    teacher.requires_grad_(True)
    student.requires_grad_(True)
    q = predict(student, batch)
    reverse_kl(q, fixed).sum().backward()
    assert all(x.grad is None for x in teacher.parameters())
    assert all(x.grad is not None for x in student.parameters())


# ---------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", ["token mean", "row weights"])
def test_heads_of_low_precision(name: str, dtype: torch.dtype, upstream: str) -> None:
    """Logits are projected in it, and the formula is computed in float32; gradients are the head's."""
    q, p = Side(1, dtype, bias=False), Side(2, dtype)
    with torch.no_grad():
        fixed = p.prediction()
    values = FORMULAS[name](q.prediction(), fixed)
    wanted = plain(name, q.head(q.hidden), p.head(p.hidden).detach(), TARGETS)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6)
    mine = torch.autograd.grad(UPSTREAM[upstream](values), q.leaves())
    exact = torch.autograd.grad(UPSTREAM[upstream](wanted), q.leaves())
    assert {x.dtype for x in mine} == {dtype}
    assert_near(list(mine), [x.double() for x in exact], 3 * torch.finfo(dtype).eps)


def test_a_mean_over_many_tokens_is_exact_in_float16() -> None:
    @divergence
    def steep(q: Tensor, p: Tensor) -> Tensor:
        return 2000 * q[..., 0]

    side, share = Side(1, torch.float16, bias=False), 1.3 * 2.0**-20  # in float16 a multiple of 2^-24
    exact = torch.autograd.grad(steep(side.prediction(), side.prediction()).sum(), side.leaves())
    found = torch.autograd.grad(share * steep(side.prediction(), side.prediction()).sum(), side.leaves())
    assert_near([x.double() for x in found], [share * x.double() for x in exact], 2e-3)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("upstream", ["token mean", "row weights"])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_bfloat16_by_autocast(name: str, upstream: str, cached: bool, inside: bool) -> None:
    """Whether the backward pass runs inside of autocast or outside, and with its cache of cast weights, which
    must not take the head's gradient away.
    """
    q, p = Side(1, torch.float32), Side(2, torch.float32)
    cast = torch.autocast("cpu", torch.bfloat16, cache_enabled=cached)
    with cast:
        with torch.no_grad():
            fixed = p.prediction()
            FORMULAS[name](q.prediction(), fixed)  # as a rollout or a score before the loss
        values = FORMULAS[name](q.prediction(), fixed)
        if inside:
            UPSTREAM[upstream](values).backward()
    if not inside:
        UPSTREAM[upstream](values).backward()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        wanted = plain(name, q.head(q.hidden), p.head(p.hidden).detach(), TARGETS)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6)
    exact = torch.autograd.grad(UPSTREAM[upstream](wanted), q.leaves())
    assert_near([x.grad for x in q.leaves()], [x.double() for x in exact], 2e-2)


def test_a_student_under_autocast_learns_everywhere() -> None:
    """Also at the first prediction, which tries the model, without a gradient, before it runs it."""
    student, teacher = (model.float() for model in models(True, ""))
    reference, batch = copy.deepcopy(student), ragged_rows()
    with torch.autocast("cpu", torch.bfloat16):
        q = predict(student, batch)
        with torch.no_grad():
            p = predict(teacher, batch)
        (0.5 * reverse_kl(q, p)).mean().backward()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        exact = reverse_kl(single_rows(reference, batch), p.logits())
    (0.5 * exact).mean().backward()
    for (name, x), y in zip(student.named_parameters(), reference.parameters(), strict=True):
        assert float((x.grad - y.grad).norm()) <= 0.05 * float(y.grad.norm()) + 1e-4, name


# ------------------------------------------------------------------------------------------- memory
class Allocations(TorchDispatchMode):
    """The largest tensor that operations allocate, and the most bytes of such tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.peak = 0, 0
        self.alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        held = [x for x in (ref() for ref in self.alive) if x is not None]
        known = {storage(x) for x in held}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage(tensor) in known or storage(tensor) not in given):
                held.append(tensor)  # no view of what there was before
                self.largest = max(self.largest, tensor.numel())
        self.alive = [weakref.ref(x) for x in held]
        sizes = {storage(x): x.untyped_storage().nbytes() for x in held}
        self.peak = max(self.peak, sum(sizes.values()))
        return out


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl", "cross_entropy"])
@pytest.mark.parametrize(
    ("upstream", "bias"), [("token mean", False), ("row weights", False), ("row weights", True)]
)
def test_no_tensor_of_tokens_times_vocabulary(
    name: str, upstream: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, vocab, width, rows = 64, 200, 4, 4
    monkeypatch.setitem(losses._CHUNK, "cpu", (rows, 2**20))
    monkeypatch.setitem(losses._BLOCK, "cpu", 2 * vocab)
    head, other = (nn.Linear(width, vocab, bias=bias) for _ in range(2))
    hidden = torch.randn(tokens, width, requires_grad=True)
    targets = torch.arange(tokens)
    with torch.no_grad():
        p = Prediction(torch.randn(tokens, width), other, targets, vocab)
    with Allocations() as seen:
        values = FORMULAS[name](Prediction(hidden, head, targets, vocab), p)
        UPSTREAM[upstream](values).backward()
    assert seen.largest == max(rows * vocab, vocab * width)
    gradients = tokens * width + vocab * width + vocab
    chunks, block = 2 * rows * vocab, 2 * vocab  # chunks of student and teacher
    # gradients twice, while the second of two passes forms them; what a formula keeps of a block
    assert seen.peak <= 4 * (2 * gradients + chunks + 16 * block)
    assert seen.peak < 4 * tokens * vocab


def test_without_a_gradient_no_gradient_is_kept() -> None:
    tokens, vocab, width = 64, 500, 4
    p, q = (
        Prediction(torch.randn(tokens, width), nn.Linear(width, vocab), torch.arange(tokens), vocab)
        for _ in "pq"
    )
    with torch.no_grad(), Allocations() as seen:
        forward_kl(q, p)
    assert seen.largest == 4 * vocab
    assert seen.peak <= 4 * vocab * (2 * 4 + 8)  # the chunks of two models, and what a formula needs
