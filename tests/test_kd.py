"""KD: both terms and their gradient against numpy, the limits of its settings, settings that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_kit import (
    FakeStep,
    V,
    assert_gradient_is_slope,
    gradients,
    kl,
    make_rows,
    nll,
    ragged_rows,
    target_log_probs,
    tiny_gpt2,
)

from kdbench.distillers.kd import KD
from kdbench.distillers.sft import SFT
from kdbench.registry import load_distiller


def make(teacher_seed: int = 2, **settings: Any) -> KD:
    return KD(KD.Config(**settings), tiny_gpt2(1), tiny_gpt2(teacher_seed))


def test_it_is_registered_with_the_papers_settings() -> None:
    assert load_distiller("kd") is KD
    cfg = KD.Config()
    assert (cfg.kd_ratio, cfg.divergence, cfg.temperature, cfg.temperature_squared) == (
        0.5,
        "forward_kl",
        1,
        False,
    )


def test_terms_and_their_sum() -> None:
    kd, rows, step = make(kd_ratio=0.3), ragged_rows(), FakeStep()
    value = kd.loss(rows, step).item()
    ce, forward = nll(kd.student, rows), kl(kd.teacher, kd.student, rows)
    assert step.terms == {"ce": pytest.approx(ce, abs=1e-12), "forward_kl": pytest.approx(forward, abs=1e-12)}
    assert value == pytest.approx(0.7 * ce + 0.3 * forward, abs=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "reverse_kl", "temperature": 2.0},
        {"divergence": "generalized_jsd", "beta": 0.1, "temperature_squared": True, "temperature": 3.0},
    ],
)
def test_gradient_is_the_slope_of_the_loss(settings: dict[str, Any]) -> None:
    assert_gradient_is_slope(make(**settings), ragged_rows())


def test_ratio_zero_is_sft_to_the_bit() -> None:
    rows, kd = ragged_rows(), make(kd_ratio=0.0)
    sft = SFT(SFT.Config(), tiny_gpt2(1))
    assert torch.equal(kd.loss(rows, FakeStep()), sft.loss(rows, FakeStep()))
    expected = gradients(sft, rows)
    for name, grad in gradients(kd, rows).items():
        assert torch.equal(grad, expected[name]), name


def test_ratio_one_with_an_equal_teacher_has_no_gradient() -> None:
    kd = make(teacher_seed=1, kd_ratio=1.0)
    assert kd.loss(ragged_rows(), FakeStep()).item() == pytest.approx(0, abs=1e-14)
    assert max(float(grad.abs().max()) for grad in gradients(kd, ragged_rows()).values()) < 1e-14


def test_gradient_of_forward_kl_is_that_of_soft_targets() -> None:
    rows, kd = ragged_rows(), make(kd_ratio=1.0)
    log_p, _ = target_log_probs(kd.teacher, rows)
    student = tiny_gpt2(1)
    start = 0
    loss = torch.zeros((), dtype=torch.float64)
    for ids, first, stop in zip(rows["input_ids"], rows["prompt_length"], rows["length"], strict=True):
        log_q = student(input_ids=ids[None, :stop]).logits[0, first - 1 : stop - 1].log_softmax(-1)
        p = torch.from_numpy(np.exp(log_p[start : start + len(log_q)]))
        loss, start = loss - (p * log_q).sum(), start + len(log_q)
    (loss / start).backward()
    for name, grad in gradients(kd, rows).items():
        expected = dict(student.named_parameters())[name].grad
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_temperature_divides_both_models_logits_and_leaves_the_cross_entropy() -> None:
    rows, step = ragged_rows(), FakeStep()
    kd = make(temperature=2.0)
    kd.loss(rows, step)
    assert step.terms["ce"] == pytest.approx(nll(kd.student, rows), abs=1e-12)
    assert step.terms["forward_kl"] == pytest.approx(
        kl(kd.teacher, kd.student, rows, temperature=2.0), abs=1e-12
    )
    squared = FakeStep()
    make(temperature=2.0, temperature_squared=True).loss(rows, squared)
    assert squared.terms["forward_kl"] == pytest.approx(4 * step.terms["forward_kl"], abs=1e-12)
    assert squared.terms["ce"] == step.terms["ce"]


def test_teacher_is_frozen_and_gets_no_gradient() -> None:
    kd = make()
    gradients(kd, ragged_rows())
    assert all(not p.requires_grad and p.grad is None for p in kd.teacher.parameters())
    assert not any(module.training for module in kd.teacher.modules())
    assert {name.split(".")[0] for name, _ in kd.groups()["student"].params} == {"student"}


def test_eos_is_distilled_though_it_is_the_padding() -> None:
    kd, whole, step, cut_step = make(), make_rows([[3, 4]], [[5, 6, 0]]), FakeStep(), FakeStep()
    kd.loss(whole, step)
    kd.loss(make_rows([[3, 4]], [[5, 6]]), cut_step)
    log_p, _ = target_log_probs(kd.teacher, whole)
    log_q, _ = target_log_probs(kd.student, whole)
    at_eos = float((np.exp(log_p[-1]) * (log_p[-1] - log_q[-1])).sum())
    assert 3 * step.terms["forward_kl"] == pytest.approx(2 * cut_step.terms["forward_kl"] + at_eos, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_ratio": 1.1}, "kd_ratio = 1.1"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"divergence": "forwardkl"}, "forward_kl"),
        ({"alpha": 0.1}, "alpha"),
        ({"divergence": "skew_forward_kl", "alpha": 1.0}, "alpha = 1.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KD.Config(**settings)


def test_chunks_of_the_vocabulary_projection_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kd, rows = make(temperature=2.0), ragged_rows()
    whole, value = gradients(kd, rows), kd.loss(rows, FakeStep()).item()
    monkeypatch.setattr("kdbench.losses.CHUNK_ELEMENTS", 3 * V)
    assert kd.loss(rows, FakeStep()).item() == pytest.approx(value, abs=1e-13)
    for name, grad in gradients(kd, rows).items():
        torch.testing.assert_close(grad, whole[name], rtol=0, atol=1e-12)
