"""KD of a classifier: both terms and their gradient against numpy, the cache, settings and their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from class_kit import (
    ClassData,
    ClassStep,
    assert_cuts_agree,
    assert_slope,
    class_rows,
    gradients,
    otherwise_padded,
    row_logits,
    tiny_bert,
    tiny_roberta,
)
from method_kit import log_softmax

from kdbench.config import TrainingConfig
from kdbench.distiller import Batch
from kdbench.distillers.kd_ft import KDFT
from kdbench.distillers.student_ft import StudentFT
from kdbench.harness import BatchSource, Trainer
from kdbench.registry import load_distiller

CLASSES = 3


def make(**settings: Any) -> KDFT:
    return KDFT(KDFT.Config(**settings), tiny_bert(1, classes=CLASSES), tiny_roberta(2, classes=CLASSES))


def prepared(method: KDFT, rows: Batch | None = None) -> Batch:
    made = method.prepare(ClassData(train=class_rows(classes=CLASSES) if rows is None else rows), ClassStep())
    assert list(made) == ["train"]
    return made["train"]


def test_it_is_registered_with_its_defaults() -> None:
    assert load_distiller("kd_ft") is KDFT
    assert vars(KDFT.Config()) == {"kd_ratio": 0.5, "temperature": 10.0, "variant": "hinton"}


def test_the_cache_is_the_teacher_on_its_own_tokens() -> None:
    method, rows = make(), class_rows(classes=CLASSES)
    made = prepared(method)
    np.testing.assert_allclose(
        made["teacher_logits"].numpy(), row_logits(method.teacher, rows.of("teacher")), rtol=0, atol=1e-12
    )
    assert not any("." in name for name in made)
    assert made["input_ids"].tolist() == rows["input_ids"].tolist()


def test_terms_and_their_sum() -> None:
    method, step = make(kd_ratio=0.3, temperature=4.0), ClassStep()
    rows, raw = prepared(method), class_rows(classes=CLASSES)
    value = method.loss(rows, step).item()
    q, p = row_logits(method.student, raw), row_logits(method.teacher, raw.of("teacher"))
    ce = -log_softmax(q)[np.arange(rows.size), raw["class_label"].numpy()].mean()
    log_q, log_p = log_softmax(q / 4), log_softmax(p / 4)
    kd = 16 * (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert step.terms == {"ce": pytest.approx(ce, abs=1e-12), "kd": pytest.approx(kd, abs=1e-12)}
    assert value == pytest.approx(0.7 * ce + 0.3 * kd, abs=1e-12)


def test_mse_is_the_mean_square_over_examples_and_classes_and_has_no_label() -> None:
    method, raw = make(variant="mse", kd_ratio=0.0), class_rows(classes=CLASSES)
    rows = prepared(method)
    q, p = row_logits(method.student, raw), row_logits(method.teacher, raw.of("teacher"))
    value = method.loss(rows, ClassStep()).item()
    assert value == pytest.approx(((q - p) ** 2).mean(), abs=1e-12)
    other = rows.replace(class_label=(rows["class_label"] + 1) % CLASSES)
    assert method.loss(other, ClassStep()).item() == value


@pytest.mark.parametrize("settings", [{}, {"variant": "mse"}, {"kd_ratio": 0.9, "temperature": 2.0}])
def test_gradient_is_the_slope_of_the_loss(settings: dict[str, Any]) -> None:
    method = make(**settings)
    rows = prepared(method)
    for name in ("classifier.bias", "bert.encoder.layer.0.attention.self.value.weight"):
        assert_slope(method, method.loss, rows, f"student.{name}")


@pytest.mark.parametrize("settings", [{}, {"variant": "mse"}])
def test_padding_and_the_cut_of_the_batch_change_nothing(settings: dict[str, Any]) -> None:
    method = make(**settings)
    rows = prepared(method)
    other = prepared(method, otherwise_padded(class_rows(classes=CLASSES)))
    whole = gradients(method, method.loss, rows)
    for name, grad in gradients(method, method.loss, other).items():
        torch.testing.assert_close(grad, whole[name], rtol=0, atol=1e-11)
    assert_cuts_agree(method, method.loss, rows)


def test_ratio_zero_is_fine_tuning_to_the_bit() -> None:
    method, plain = make(kd_ratio=0.0), StudentFT(StudentFT.Config(), tiny_bert(1, classes=CLASSES))
    rows = prepared(method)
    expected = gradients(plain, plain.loss, rows)
    for name, grad in gradients(method, method.loss, rows).items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("settings", [{"kd_ratio": 1.0}, {"variant": "mse"}])
def test_a_student_like_its_teacher_has_no_gradient(settings: dict[str, Any]) -> None:
    method = KDFT(KDFT.Config(**settings), tiny_bert(1), tiny_bert(1))
    rows = class_rows(families={"student": "bert", "teacher": "bert"})
    grads = gradients(method, method.loss, prepared(method, rows))
    assert max(float(grad.abs().max()) for grad in grads.values()) < 1e-13


def test_the_teacher_runs_in_prepare_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make()
    rows = prepared(method)
    assert not any(p.requires_grad for p in method.teacher.parameters())

    def forward(*args: Any, **named: Any) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(method.teacher, "forward", forward)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    Trainer(method, BatchSource(rows), TrainingConfig(optimizer_steps=3, batch_size=4, lr=1e-2), seed=1).fit()
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
    assert {name.split(".")[0] for name, _ in method.groups()["student"].params} == {"student"}


def test_a_cached_step_is_a_live_step() -> None:
    method = make()
    rows, raw = prepared(method), class_rows(classes=CLASSES)
    live = raw.replace(teacher_logits=torch.from_numpy(row_logits(method.teacher, raw.of("teacher"))))
    expected = gradients(method, method.loss, live)
    for name, grad in gradients(method, method.loss, rows).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"kd_ratio": 2.0}, {"temperature": -1.0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} = "):
        KDFT.Config(**settings)
