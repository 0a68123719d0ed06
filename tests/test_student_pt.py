"""Prompt-tuning against plain numpy, from the student's logits of single unpadded rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from class_kit import (
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

from kdbench.distillers.student_pt import StudentPT

LOSSES = ["label_words", "full_vocab"]


def made(pt_loss: Any = "label_words", student: Any = None, classes: int = 3) -> StudentPT:
    return StudentPT(StudentPT.Config(pt_loss), student or tiny_bert(1, "masked_lm", classes=classes))


def rows(classes: int = 3, family: str = "bert") -> Any:
    return class_rows("masked_lm", classes=classes, roles=(), families={"student": family})


def value(distiller: StudentPT, batch: Any) -> float:
    return distiller.loss(batch, ClassStep()).item()  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("pt_loss", LOSSES)
def test_loss_is_the_cross_entropy_at_the_mask(family: str, pt_loss: str) -> None:
    student = {"bert": tiny_bert, "roberta": tiny_roberta}[family](1, "masked_lm", classes=3)
    batch = rows(family=family)
    labels = batch["class_label"].numpy()
    if pt_loss == "label_words":
        expected = -log_softmax(row_logits(student, batch))[np.arange(6), labels].mean()
    else:
        every = torch.arange(student.config.vocab_size).repeat(6, 1)
        whole = log_softmax(row_logits(student, batch.replace(verbalizer_ids=every)))
        words = batch["verbalizer_ids"].numpy()[np.arange(6), labels]
        expected = -whole[np.arange(6), words].mean()
    assert value(made(pt_loss, student), batch) == pytest.approx(expected, rel=1e-12)


def test_the_two_losses_differ_and_the_label_words_cost_less() -> None:
    assert value(made(), rows()) < value(made("full_vocab"), rows()) - 0.1


@pytest.mark.parametrize("pt_loss", LOSSES)
def test_gradient_is_the_slope(pt_loss: str) -> None:
    distiller = made(pt_loss)
    for name in ("student.bert.embeddings.word_embeddings.weight", "student.cls.predictions.bias"):
        assert_slope(distiller, distiller.loss, rows(), name)


@pytest.mark.parametrize("pt_loss", LOSSES)
def test_neither_cut_nor_padding_matters(pt_loss: str) -> None:
    distiller = made(pt_loss)
    assert_cuts_agree(distiller, distiller.loss, rows())
    assert value(distiller, otherwise_padded(rows())) == pytest.approx(value(distiller, rows()), rel=1e-12)


def test_only_label_words_have_logits_that_count() -> None:
    """A constant on every label word's logit changes nothing, on another word's only the whole vocabulary."""
    batch, label_words = rows(), rows()["verbalizer_ids"][0]
    for pt_loss, word, same in [
        ("label_words", label_words, True),
        ("label_words", torch.tensor([20]), True),
        ("full_vocab", label_words, False),
        ("full_vocab", torch.tensor([20]), False),
    ]:
        assert 20 not in label_words
        distiller = made(pt_loss)
        before = value(distiller, batch)
        with torch.no_grad():
            distiller.student.cls.predictions.bias[word] += 2.0  # type: ignore[index, union-attr]
        assert (abs(value(distiller, batch) - before) < 1e-12) == same


def test_an_unlabelled_row_is_refused() -> None:
    batch = rows()
    with pytest.raises(RuntimeError):
        value(made(), batch.replace(class_label=torch.full_like(batch["class_label"], -1)))


def test_it_asks_for_the_students_fields_alone() -> None:
    assert set(StudentPT.needs) == set(rows())
    assert StudentPT.head == "masked_lm"
    assert list(made().groups()) == ["student"]
