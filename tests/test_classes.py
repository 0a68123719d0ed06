"""Losses over classes: values worked out by hand, identities, gradients against closed forms and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from class_kit import class_rows, otherwise_padded, row_logits, tiny_roberta
from method_kit import log_softmax

from kdbench.distiller import Batch
from kdbench.distillers._classes import (
    SoftTargetsConfig,
    class_mean,
    cross_entropy,
    distilled,
    kl_divergence,
    soft_cross_entropy,
    teacher_logits,
    with_cache,
)

FORMS: tuple[Any, ...] = ("literal", "hinton", "hinton_t2")
Z_T = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
Z_S = torch.tensor([[0.0, 1.0]], dtype=torch.float64)


def random_logits(seed: int, rows: int = 5, classes: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, classes, generator=draw, dtype=torch.float64)


def gradient(form: Any, q: torch.Tensor, p: torch.Tensor, temperature: float) -> torch.Tensor:
    q = q.clone().requires_grad_()
    distilled(q, p, temperature, form).sum().backward()
    assert q.grad is not None
    return q.grad


def test_values_by_hand() -> None:
    assert cross_entropy(Z_S, torch.tensor([0])).item() == pytest.approx(1.313262, abs=1e-6)
    assert soft_cross_entropy(Z_S, Z_T).item() == pytest.approx(1.194059, abs=1e-6)
    assert soft_cross_entropy(Z_S, Z_T, 10.0).item() == pytest.approx(0.699380, abs=1e-6)
    assert soft_cross_entropy(Z_S, Z_T, 2.0).item() == pytest.approx(0.839606, abs=1e-6)
    assert class_mean(soft_cross_entropy(Z_S, Z_T, 10.0), Z_S).item() == pytest.approx(0.349690, abs=1e-6)


@pytest.mark.parametrize(
    ("form", "temperature", "value"),
    [
        ("literal", 10.0, 0.119406),
        ("literal", 2.0, 0.597029),
        ("hinton", 10.0, 0.0112080),
        ("hinton", 2.0, 0.257403),
        ("hinton_t2", 10.0, 1.120799),
        ("hinton_t2", 2.0, 1.029613),
    ],
)
def test_forms_by_hand(form: Any, temperature: float, value: float) -> None:
    assert distilled(Z_S, Z_T, temperature, form).item() == pytest.approx(value, abs=1e-6)


def test_each_row_against_numpy() -> None:
    q, p, labels = random_logits(1), random_logits(2), torch.tensor([0, 3, 1, 2, 2])
    log_q, log_p = log_softmax(q.numpy()), log_softmax(p.numpy())
    warm_q, warm_p = log_softmax(q.numpy() / 3), log_softmax(p.numpy() / 3)
    kl = (np.exp(warm_p) * (warm_p - warm_q)).sum(-1)
    expected = {
        "literal": -(np.exp(log_p) * log_q).sum(-1) / 3,
        "hinton": kl,
        "hinton_t2": 9 * kl,
    }
    for form in FORMS:
        np.testing.assert_allclose(distilled(q, p, 3.0, form).numpy(), expected[form], rtol=0, atol=1e-12)
    found = cross_entropy(q, labels).numpy()
    np.testing.assert_allclose(found, -log_q[np.arange(5), labels.numpy()], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        soft_cross_entropy(q, p, 3.0) - kl_divergence(q, p, 3.0), soft_cross_entropy(p, p, 3.0)
    )


def test_gradients_of_the_forms() -> None:
    q, p, a = random_logits(3), random_logits(4), 7.0
    warm = (q / a).softmax(-1) - (p / a).softmax(-1)
    closed = {"literal": (q.softmax(-1) - p.softmax(-1)) / a, "hinton": warm / a, "hinton_t2": a * warm}
    for form in FORMS:
        torch.testing.assert_close(gradient(form, q, p, a), closed[form], rtol=0, atol=1e-12)


def test_at_temperature_one_all_gradients_are_one() -> None:
    q, p = random_logits(3), random_logits(4)
    for form in FORMS[1:]:
        torch.testing.assert_close(gradient(form, q, p, 1.0), gradient("literal", q, p, 1.0))


def test_literal_only_scales() -> None:
    q, p = random_logits(5), random_logits(6)
    torch.testing.assert_close(10 * distilled(q, p, 10.0, "literal"), distilled(q, p, 1.0, "literal"))


def test_a_high_temperature_matches_centred_logits() -> None:
    q, p = random_logits(5), random_logits(6)
    centred = (q - q.mean(-1, keepdim=True)) - (p - p.mean(-1, keepdim=True))
    torch.testing.assert_close(gradient("hinton_t2", q, p, 1e3), centred / 4, rtol=1e-2, atol=1e-4)


def test_an_equal_student_is_at_the_minimum() -> None:
    p = random_logits(7)
    for form in FORMS:
        assert float(gradient(form, p, p, 4.0).abs().max()) < 1e-14
    assert float(kl_divergence(p, p, 4.0).abs().max()) < 1e-14
    entropy = -(p.softmax(-1) * p.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(distilled(p, p, 4.0, "literal"), entropy / 4)


def test_a_constant_added_to_the_logits_and_an_order_of_classes_change_nothing() -> None:
    q, p, turn = random_logits(8), random_logits(9), [2, 0, 3, 1]
    for form in FORMS:
        value = distilled(q, p, 5.0, form)
        torch.testing.assert_close(distilled(q + 100, p - 3, 5.0, form), value)
        torch.testing.assert_close(distilled(q[:, turn], p[:, turn], 5.0, form), value)


def test_large_logits_stay_finite() -> None:
    far = torch.tensor([[1e4, -1e4]], dtype=torch.float32)
    for form in FORMS:
        assert torch.isfinite(gradient(form, far, -far, 1.0)).all()
        assert torch.isfinite(distilled(far, far, 1.0, form)).all()


def test_a_label_out_of_range_and_another_form_are_refused() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy(Z_S, torch.tensor([-1]))
    other: Any = "hinton_t"
    with pytest.raises(ValueError, match="form = 'hinton_t' is none of literal, hinton, hinton_t2"):
        distilled(Z_S, Z_T, 1.0, other)


def test_the_teacher_reads_its_own_view_of_the_rows_without_a_gradient() -> None:
    for head in ("sequence", "masked_lm"):
        teacher, rows = tiny_roberta(2, head, classes=3), class_rows(head, classes=3)
        found = teacher_logits(teacher, rows)
        assert not found.requires_grad
        np.testing.assert_allclose(found.numpy(), row_logits(teacher, rows.of("teacher")), rtol=0, atol=1e-12)
        other = teacher_logits(teacher, otherwise_padded(rows))
        torch.testing.assert_close(other, found, rtol=0, atol=1e-12)


def test_a_cache_stands_in_its_row() -> None:
    rows = class_rows()
    parts = [rows.rows([0, 1, 2, 3]), otherwise_padded(rows.rows([4, 5]))]
    made = with_cache(parts, lambda batch: {"doubled": 2 * batch["teacher.length"]})
    assert set(made) == {*(name for name in rows if "." not in name), "doubled"}
    assert made["example_id"].tolist() == rows["example_id"].tolist()
    assert made["doubled"].tolist() == (2 * rows["teacher.length"]).tolist()
    assert isinstance(made, Batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_ratio": -0.1}, "kd_ratio = -0.1"),
        ({"kd_ratio": 1.1}, "kd_ratio = 1.1"),
        ({"kd_ratio": float("nan")}, "kd_ratio = nan"),
        ({"temperature": 0.0}, "temperature = 0.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftTargetsConfig(**settings)
