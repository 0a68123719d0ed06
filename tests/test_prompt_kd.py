"""Prompt-KD against plain numpy and worked values, and against prompt-tuning where its weight is 0."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from class_kit import (
    Array,
    ClassData,
    ClassStep,
    assert_cuts_agree,
    assert_slope,
    class_rows,
    otherwise_padded,
    row_logits,
    tiny_bert,
    tiny_roberta,
)
from method_kit import log_softmax
from torch import Tensor

from kdbench.config import TrainingConfig
from kdbench.distiller import Batch, Distiller
from kdbench.distillers.prompt_kd import PromptKD
from kdbench.distillers.student_pt import StudentPT
from kdbench.harness import BatchSource, SourceData, Trainer

FORMS = ["literal", "hinton", "hinton_t2"]


def rows(count: int = 6, classes: int = 2, first_id: int = 100) -> Batch:
    return class_rows("masked_lm", classes=classes, count=count, first_id=first_id)


def made(classes: int = 2, **settings: Any) -> PromptKD:
    return PromptKD(
        PromptKD.Config(**settings),
        tiny_bert(1, "masked_lm", classes=classes),
        tiny_roberta(2, "masked_lm", classes=classes),
    )


def prepared(distiller: PromptKD, batch: Batch) -> Batch:
    return distiller.prepare(ClassData(train=batch), ClassStep())["train"]  # type: ignore[arg-type]


def value(distiller: PromptKD, batch: Batch) -> float:
    return distiller.loss(batch, ClassStep()).item()  # type: ignore[arg-type]


def oracle(z_s: Array, z_t: Array, labels: Array, a: float, form: str) -> tuple[float, float]:
    """L_MLM and L_KD, row by row."""
    ce = [-log_softmax(s)[y] for s, y in zip(z_s, labels, strict=True)]
    kd = []
    for s, t in zip(z_s, z_t, strict=True):
        if form == "literal":
            kd.append(-(np.exp(log_softmax(t)) / a * log_softmax(s)).sum())
        else:
            p, q = log_softmax(t / a), log_softmax(s / a)
            kd.append((a * a if form == "hinton_t2" else 1) * (np.exp(p) * (p - q)).sum())
    return float(np.mean(ce)), float(np.mean(kd))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("alpha", "lam1"), [(10.0, 0.2), (2.0, 0.7)])
def test_loss_is_that_of_the_formula(form: str, alpha: float, lam1: float) -> None:
    distiller = made(3, kd_form=form, alpha=alpha, lam1=lam1)
    batch = rows(classes=3)
    z_s, z_t = row_logits(distiller.student, batch), row_logits(distiller.teacher, batch.of("teacher"))
    ce, kd = oracle(z_s, z_t, batch["class_label"].numpy(), alpha, form)
    step = ClassStep()
    found = distiller.loss(prepared(distiller, batch), step)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(ce + lam1 * kd, rel=1e-11)
    assert step.terms == {
        "mlm": pytest.approx(ce, rel=1e-11),
        "kd_labeled": pytest.approx(lam1 * kd, rel=1e-11),
    }


# ------------------------------------------------------------------------------ worked values (N = 2)
def fixed(z_s: list[float], z_t: list[float], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """The method on one row of class 0 whose student logits are `z_s`; returns (loss, gradient in z_s)."""
    logits = torch.tensor([z_s], dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr("kdbench.distillers._prompted.class_logits", lambda model, batch: logits)
    batch = Batch(
        {"class_label": torch.tensor([0]), "teacher_logits": torch.tensor([z_t], dtype=torch.float64)}
    )
    loss = made(**settings).loss(batch, ClassStep())  # type: ignore[arg-type]
    return loss.item(), torch.autograd.grad(loss, logits)[0][0]


HARD = 1.313262  # -log softmax([0, 1])[0]


@pytest.mark.parametrize(
    ("form", "alpha", "expected"),
    [
        ("literal", 1.0, 1.194059),
        ("literal", 10.0, 0.119406),
        ("literal", 2.0, 0.597029),
        ("hinton", 10.0, 0.0112080),
        ("hinton", 2.0, 0.257403),
        ("hinton_t2", 10.0, 1.120799),
        ("hinton_t2", 2.0, 1.029613),
    ],
)
def test_worked_values(form: str, alpha: float, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, _ = fixed([0.0, 1.0], [2.0, 0.0], monkeypatch, kd_form=form, alpha=alpha, lam1=1.0)
    assert loss - HARD == pytest.approx(expected, abs=1.1e-6)


def kd_gradient(
    z_s: list[float], z_t: list[float], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Tensor:
    whole = fixed(z_s, z_t, monkeypatch, lam1=1.0, **settings)[1]
    gradient: Tensor = whole - fixed(z_s, z_t, monkeypatch, lam1=0.0, **settings)[1]
    return gradient


Z_S, Z_T = [0.3, -1.2, 0.8], [1.5, 0.1, -0.6]


def test_at_temperature_1_all_forms_have_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [kd_gradient(Z_S, Z_T, monkeypatch, kd_form=form, alpha=1.0) for form in FORMS]
    assert float(found[0].abs().max()) > 0.1
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-14)


def test_the_literal_form_is_that_of_temperature_1_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    def kd(alpha: float) -> float:
        settings = {"kd_form": "literal", "alpha": alpha}
        with_kd = fixed(Z_S, Z_T, monkeypatch, lam1=1.0, **settings)[0]
        return float(with_kd - fixed(Z_S, Z_T, monkeypatch, lam1=0.0, **settings)[0])

    for alpha in (2.0, 10.0, 37.0):
        assert kd(alpha) == pytest.approx(kd(1.0) / alpha, rel=1e-12)


def test_hot_hinton_t2_matches_centred_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kd_gradient(Z_S, Z_T, monkeypatch, kd_form="hinton_t2", alpha=1e3)
    apart = torch.tensor(Z_S) - torch.tensor(Z_T)
    torch.testing.assert_close(found, ((apart - apart.mean()) / 3).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("alpha", [1.0, 10.0])
def test_equal_logits_cost_nothing_but_in_the_literal_form(
    alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fixed(Z_S, Z_S, monkeypatch, lam1=0.0)[0]
    for form in ("hinton", "hinton_t2"):
        loss, _ = fixed(Z_S, Z_S, monkeypatch, lam1=1.0, kd_form=form, alpha=alpha)
        assert loss - plain == pytest.approx(0, abs=1e-14)
        assert float(kd_gradient(Z_S, Z_S, monkeypatch, kd_form=form, alpha=alpha).abs().max()) < 1e-14
    p = np.exp(log_softmax(np.array(Z_S)))
    loss, _ = fixed(Z_S, Z_S, monkeypatch, lam1=1.0, kd_form="literal", alpha=alpha)
    assert loss - plain == pytest.approx(-(p * np.log(p)).sum() / alpha, rel=1e-10)
    assert loss - plain > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_on_all_class_logits_changes_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = fixed(Z_S, Z_T, monkeypatch, kd_form=form)[0]
    student = fixed([z + 3 for z in Z_S], Z_T, monkeypatch, kd_form=form)[0]
    teacher = fixed(Z_S, [z - 5 for z in Z_T], monkeypatch, kd_form=form)[0]
    assert student == pytest.approx(base, abs=1e-12)
    assert teacher == pytest.approx(base, abs=1e-12)


# ------------------------------------------------------------------------------------ what is prepared
def test_the_teacher_is_cached_in_the_rows_and_its_fields_leave() -> None:
    distiller, batch = made(), rows()
    found = prepared(distiller, batch)
    assert set(found) == {name for name in batch if "." not in name} | {"teacher_logits"}
    expected = row_logits(distiller.teacher, batch.of("teacher"))
    assert np.allclose(found["teacher_logits"].numpy(), expected, atol=1e-12)
    shuffled = prepared(distiller, batch.rows([3, 0, 5, 1, 4, 2]))
    torch.testing.assert_close(shuffled["teacher_logits"], found["teacher_logits"][[3, 0, 5, 1, 4, 2]])
    wider = prepared(distiller, otherwise_padded(batch))
    torch.testing.assert_close(wider["teacher_logits"], found["teacher_logits"], rtol=0, atol=1e-12)


def test_the_teachers_mask_may_stand_anywhere() -> None:
    """Words before the teacher's text move its mask; beyond its own logits nothing changes."""
    distiller, batch = made(), rows()
    ids = batch["teacher.input_ids"]
    longer = batch.replace(
        **{
            "teacher.input_ids": torch.cat([ids[:, :1], ids.new_full((6, 2), 9), ids[:, 1:]], dim=1),
            "teacher.length": batch["teacher.length"] + 2,
            "teacher.mask_index": batch["teacher.mask_index"] + 2,
        }
    )
    found, other = prepared(distiller, batch), prepared(distiller, longer)
    expected = row_logits(distiller.teacher, longer.of("teacher"))
    assert np.allclose(other["teacher_logits"].numpy(), expected, atol=1e-12)
    assert all(torch.equal(other[name], found[name]) for name in found if name != "teacher_logits")


def test_gradient_is_the_slope_and_reaches_the_student_alone() -> None:
    distiller = made(lam1=2.0)
    batch = prepared(distiller, rows())
    assert_slope(distiller, distiller.loss, batch, "student.bert.embeddings.word_embeddings.weight")
    assert_cuts_agree(distiller, distiller.loss, batch)
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.parameters())


def test_the_order_of_the_classes_does_not_matter() -> None:
    distiller, batch, order = made(3), rows(classes=3), [2, 0, 1]
    place = torch.tensor(order).argsort()
    permuted = batch.replace(
        class_label=place[batch["class_label"]],
        **{n: batch[n][:, order] for n in ("verbalizer_ids", "teacher.verbalizer_ids")},
    )
    before, after = (
        value(distiller, prepared(distiller, batch)),
        value(distiller, prepared(distiller, permuted)),
    )
    assert after == pytest.approx(before, rel=1e-12)


# --------------------------------------------------------------------------------- with the harness
def trained(distiller: Distiller, steps: int = 6, **changes: Any) -> list[Tensor]:
    """The student's parameters after a training with dropout, prepared where the method prepares."""
    settings = {"optimizer_steps": steps, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 0, **changes}
    trainer = Trainer(distiller, BatchSource(rows(10)), TrainingConfig(**settings, student_dropout=True), 3)
    data = SourceData({"train": trainer.source}, 4, torch.device("cpu"))
    made = trainer.prepare(data) or {}
    trainer.source = BatchSource(made["train"]) if made else trainer.source
    trainer.fit()
    return [p.detach().clone() for p in distiller.student.parameters()]


@pytest.mark.parametrize("pt_loss", ["label_words", "full_vocab"])
def test_without_weight_it_is_prompt_tuning_bit_by_bit(pt_loss: Any) -> None:
    plain = StudentPT(StudentPT.Config(pt_loss), tiny_bert(1, "masked_lm"))
    first = [p.detach().clone() for p in plain.student.parameters()]
    expected = trained(plain)
    found = trained(made(lam1=0.0, pt_loss=pt_loss))
    other = trained(made(lam1=0.2, pt_loss=pt_loss))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, expected, strict=True))


def test_a_step_with_the_cache_is_that_of_a_live_teacher() -> None:
    class Live(PromptKD):
        """The teacher reads each batch anew."""

        def prepare(self, data: Any, step: Any) -> Any:
            return None

        def loss(self, batch: Batch, step: Any) -> Tensor:
            with torch.no_grad():
                z_t = torch.from_numpy(row_logits(self.teacher, batch.of("teacher")))
            return super().loss(batch.replace(teacher_logits=z_t), step)

    cached = made()
    live = Live(copy.copy(cached.cfg), copy.deepcopy(cached.student), copy.deepcopy(cached.teacher))
    for a, b in zip(trained(cached), trained(live), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 0.0}, "alpha = 0.0 is not a finite number above 0"),
        ({"alpha": math.nan}, "alpha = nan is not a finite number above 0"),
        ({"alpha": math.inf}, "alpha = inf is not a finite number above 0"),
        ({"lam1": -0.1}, "lam1 = -0.1 is not a finite number of 0 or more"),
        ({"lam1": math.nan}, "lam1 = nan is not a finite number of 0 or more"),
        ({"lam1": math.inf}, "lam1 = inf is not a finite number of 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptKD.Config(**wrong)
    assert math.isclose(PromptKD.Config().alpha, 10)
