"""Fine-tuning: its value and gradient, padding, and a run that learns its labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from class_kit import (
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
from kdbench.distillers.student_ft import StudentFT
from kdbench.harness import BatchSource, Trainer
from kdbench.registry import load_distiller
from kdbench.stages import needed_roles


def make(classes: int = 3) -> StudentFT:
    return StudentFT(StudentFT.Config(), tiny_bert(1, classes=classes))


def test_it_is_registered_with_a_student_alone() -> None:
    assert load_distiller("student_ft") is StudentFT
    assert needed_roles(StudentFT) == ["student"]
    assert StudentFT.head == "sequence"


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_loss_is_the_mean_negative_log_probability(family: str) -> None:
    rows = class_rows(classes=3)
    if family == "bert":
        method = make()
    else:
        method, rows = StudentFT(StudentFT.Config(), tiny_roberta(2, classes=3)), rows.of("teacher")
    step = ClassStep()
    value = method.loss(rows, step).item()
    log_q = log_softmax(row_logits(method.student, rows))
    expected = -log_q[np.arange(rows.size), rows["class_label"].numpy()].mean()
    assert value == pytest.approx(expected, abs=1e-12)
    assert step.terms == {"ce": pytest.approx(expected, abs=1e-12)}


@pytest.mark.parametrize(
    "name", ["classifier.weight", "bert.embeddings.token_type_embeddings.weight", "bert.pooler.dense.bias"]
)
def test_gradient_is_the_slope_of_the_loss(name: str) -> None:
    method = make()
    assert_slope(method, method.loss, class_rows(classes=3), f"student.{name}")


def test_padding_and_the_cut_of_the_batch_change_nothing() -> None:
    method, rows = make(), class_rows(classes=3)
    whole = gradients(method, method.loss, rows)
    for name, grad in gradients(method, method.loss, otherwise_padded(rows)).items():
        torch.testing.assert_close(grad, whole[name], rtol=0, atol=1e-12)
    assert_cuts_agree(method, method.loss, rows)


def test_labels_are_learned() -> None:
    method, rows = make(), class_rows(classes=3, roles=())
    training = TrainingConfig(optimizer_steps=40, batch_size=6, lr=1e-2)
    before = method.loss(rows, ClassStep()).item()
    Trainer(method, BatchSource(rows), training, seed=1).fit()
    assert method.loss(rows, ClassStep()).item() < 0.05 < before
    assert (row_logits(method.student, rows).argmax(1) == rows["class_label"].numpy()).all()
