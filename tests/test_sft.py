"""SFT: the value and gradient of its loss, and which tokens are targets."""

from __future__ import annotations

import pytest
import torch
from method_kit import FakeStep, assert_gradient_is_slope, gradients, make_rows, nll, ragged_rows, tiny_gpt2

from kdbench.distiller import Batch
from kdbench.distillers.sft import SFT
from kdbench.registry import load_distiller


@pytest.fixture
def sft() -> SFT:
    return SFT(SFT.Config(), tiny_gpt2(1))


def test_it_is_registered_and_needs_no_teacher() -> None:
    assert load_distiller("sft") is SFT
    assert list(SFT.__init__.__annotations__) == ["cfg", "student", "return"]


def test_loss_is_the_mean_nll_of_response_tokens(sft: SFT) -> None:
    rows, step = ragged_rows(), FakeStep()
    value = sft.loss(rows, step).item()
    assert value == pytest.approx(nll(sft.student, rows), abs=1e-12)
    assert step.terms == {"ce": pytest.approx(value)}


def test_gradient_is_the_slope_of_the_loss(sft: SFT) -> None:
    assert_gradient_is_slope(sft, ragged_rows())


def test_one_token_by_hand(sft: SFT) -> None:
    rows = make_rows([[3, 4]], [[5]])
    logits = sft.student(input_ids=torch.tensor([[3, 4]])).logits[0, -1].detach()
    assert sft.loss(rows, FakeStep()).item() == pytest.approx(
        float(torch.logsumexp(logits, -1) - logits[5]), abs=1e-12
    )


def test_eos_is_a_target_though_it_is_the_padding(sft: SFT) -> None:
    whole, cut = make_rows([[3, 4]], [[5, 6, 0]]), make_rows([[3, 4]], [[5, 6]])
    logits = sft.student(input_ids=torch.tensor([[3, 4, 5, 6]])).logits[0, -1].detach()
    of_eos = float(torch.logsumexp(logits, -1) - logits[0])
    total = 3 * sft.loss(whole, FakeStep()).item()
    assert total == pytest.approx(2 * sft.loss(cut, FakeStep()).item() + of_eos, abs=1e-12)


def test_prompt_and_padding_carry_no_gradient_of_their_own(sft: SFT) -> None:
    rows = ragged_rows()
    other = rows.replace(input_ids=torch.nn.functional.pad(rows["input_ids"], (0, 3), value=11))
    for name, grad in gradients(sft, rows).items():
        torch.testing.assert_close(grad, gradients(sft, other)[name], rtol=0, atol=1e-12)


def test_micro_batches_sum_to_the_whole(sft: SFT) -> None:
    rows = ragged_rows()
    whole = gradients(sft, rows)
    sft.zero_grad()
    for cut in (slice(0, 2), slice(2, 3), slice(3, 5)):
        sft.loss(rows.rows(cut).with_totals(rows.totals), FakeStep()).backward()
    for name, param in sft.student.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(param.grad, whole[name], rtol=0, atol=1e-12)


def test_a_share_without_rows_adds_nothing(sft: SFT) -> None:
    rows = ragged_rows()
    empty: Batch = rows.rows([]).with_totals(rows.totals)
    assert sft.loss(empty, FakeStep()).item() == 0.0
