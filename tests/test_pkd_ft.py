"""PKD: layer maps, each term against numpy, both reductions, the map between widths, the cache."""

from __future__ import annotations

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
    gradients,
    otherwise_padded,
    row_logits,
    row_states,
    tiny_bert,
    tiny_roberta,
)
from method_kit import log_softmax

from kdbench.config import TrainingConfig
from kdbench.distiller import Batch
from kdbench.distillers.pkd_ft import PKDFT, layer_map, patience
from kdbench.errors import UserError
from kdbench.harness import BatchSource, Trainer
from kdbench.registry import load_distiller

CLASSES = 3


def make(student_layers: int = 3, teacher_layers: int = 5, **settings: Any) -> PKDFT:
    torch.manual_seed(5)
    student = tiny_bert(1, classes=CLASSES, layers=student_layers)
    teacher = tiny_roberta(2, classes=CLASSES, layers=teacher_layers)
    return PKDFT(PKDFT.Config(**settings), student, teacher)


def prepared(method: PKDFT, rows: Batch | None = None) -> Batch:
    made = method.prepare(ClassData(train=class_rows(classes=CLASSES) if rows is None else rows), ClassStep())
    assert list(made) == ["train"]
    return made["train"]


def first_states(method: PKDFT, rows: Batch) -> tuple[Array, Array]:
    """First tokens' states [B, k-1, d_T]: the student's behind the map, and the teacher's chosen ones."""
    own = np.stack([states[1:-1, 0] for states in row_states(method.student, rows)])
    if isinstance(method.fit, torch.nn.Linear):
        own = own @ method.fit.weight.detach().numpy().T
    theirs = [states[list(method.layers), 0] for states in row_states(method.teacher, rows.of("teacher"))]
    return own, np.stack(theirs)


def test_it_is_registered_with_the_codes_settings() -> None:
    assert load_distiller("pkd_ft") is PKDFT
    assert vars(PKDFT.Config()) == {
        "kd_ratio": 0.7,
        "temperature": 10.0,
        "beta": 500.0,
        "layers": "skip",
        "normalize": True,
        "ds_reduction": "mean",
        "pt_reduction": "mean",
    }


@pytest.mark.parametrize(
    ("teacher", "student", "skip", "last"),
    [
        (12, 6, (2, 4, 6, 8, 10), (7, 8, 9, 10, 11)),
        (24, 4, (6, 12, 18), (21, 22, 23)),
        (24, 12, tuple(range(2, 24, 2)), tuple(range(13, 24))),
        (24, 2, (12,), (23,)),
        (12, 3, (4, 8), (10, 11)),
        (12, 5, (2, 4, 7, 9), (8, 9, 10, 11)),  # 2.4, 4.8, 7.2, 9.6 rounded down
        (4, 4, (1, 2, 3), (1, 2, 3)),
        (3, 2, (1,), (2,)),
        (24, 1, (), ()),
    ],
)
def test_layer_maps(teacher: int, student: int, skip: tuple[int, ...], last: tuple[int, ...]) -> None:
    assert layer_map("skip", teacher, student) == skip
    assert layer_map("last", teacher, student) == last


@pytest.mark.parametrize("student", range(1, 12))
def test_maps_grow_and_leave_out_the_embeddings_and_the_last_layer(student: int) -> None:
    for layers in ("skip", "last"):
        found: Any = layer_map(layers, 11, student)  # type: ignore[arg-type]
        assert len(found) == student - 1
        assert list(found) == sorted(set(found) & set(range(1, 11)))


def test_a_deeper_student_is_refused() -> None:
    with pytest.raises(UserError, match="pkd_ft: the student has 4 layers, the teacher 3; it needs as many"):
        make(student_layers=4, teacher_layers=3)


def test_patience_by_hand() -> None:
    q, p = torch.tensor([[[3.0, 4.0]]]).double(), torch.tensor([[[4.0, 3.0]]]).double()
    assert patience(q, p, True, "sum").item() == pytest.approx(0.08, abs=1e-12)
    assert patience(q, p, True, "mean").item() == pytest.approx(0.04, abs=1e-12)
    assert patience(7 * q, 0.1 * p, True, "sum").item() == pytest.approx(0.08, abs=1e-12)
    assert patience(q, p, False, "sum").item() == pytest.approx(2, abs=1e-12)
    assert patience(2 * q, p, False, "mean").item() == pytest.approx((4 + 25) / 2, abs=1e-12)
    two = torch.cat([q, p], dim=1)  # the second layer agrees
    assert patience(two, torch.cat([p, p], dim=1), True, "mean").item() == pytest.approx(0.02, abs=1e-12)


def test_a_zero_state_has_a_finite_gradient() -> None:
    q = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    patience(q, torch.ones(1, 1, 2, dtype=torch.float64), True, "mean").sum().backward()
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("layers", ["skip", "last"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_terms_and_their_sum(layers: str, normalize: bool, reduction: str) -> None:
    settings = {"layers": layers, "normalize": normalize, "pt_reduction": reduction}
    method, step = (
        make(ds_reduction=reduction, kd_ratio=0.2, temperature=5.0, beta=3.0, **settings),
        ClassStep(),
    )
    rows, raw = prepared(method), class_rows(classes=CLASSES)
    value = method.loss(rows, step).item()
    q, p = row_logits(method.student, raw), row_logits(method.teacher, raw.of("teacher"))
    ce = -log_softmax(q)[np.arange(raw.size), raw["class_label"].numpy()].mean()
    log_q, log_p = log_softmax(q / 5), log_softmax(p / 5)
    terms = 25 * np.exp(log_p) * (log_p - log_q)
    ds = terms.mean() if reduction == "mean" else terms.sum() / raw.size
    own, theirs = first_states(method, raw)
    assert own.shape == theirs.shape == (raw.size, 2, 12)
    if normalize:
        own, theirs = (x / np.sqrt((x**2).sum(-1, keepdims=True)) for x in (own, theirs))
    squares = (own - theirs) ** 2
    pt = squares.mean() if reduction == "mean" else squares.sum() / raw.size
    expected = {"ce": ce, "ds": ds, "pt": pt}
    assert step.terms == {name: pytest.approx(term, abs=1e-11) for name, term in expected.items()}
    assert value == pytest.approx(0.8 * ce + 0.2 * ds + 3 * pt, abs=1e-10)


def test_the_cache_holds_the_chosen_layers() -> None:
    for layers, chosen in (("skip", [1, 3]), ("last", [3, 4])):
        method, raw = make(layers=layers), class_rows(classes=CLASSES)
        rows = prepared(method)
        assert list(method.layers) == chosen
        states = row_states(method.teacher, raw.of("teacher"))
        np.testing.assert_allclose(
            rows["teacher_states"].numpy(), np.stack([x[chosen, 0] for x in states]), rtol=0, atol=1e-12
        )
        np.testing.assert_allclose(
            rows["teacher_logits"].numpy(), row_logits(method.teacher, raw.of("teacher")), rtol=0, atol=1e-12
        )
        assert not any("." in name for name in rows)


@pytest.mark.parametrize("settings", [{}, {"normalize": False, "pt_reduction": "sum", "layers": "last"}])
def test_gradient_is_the_slope_of_the_loss(settings: dict[str, Any]) -> None:
    method = make(beta=2.0, **settings)
    rows = prepared(method)
    for name in (
        "fit.weight",
        "student.bert.encoder.layer.1.output.dense.weight",
        "student.classifier.weight",
    ):
        assert_slope(method, method.loss, rows, name)


def test_half_precision_products_are_summed_in_single_precision() -> None:
    method = make()
    value = method.loss(prepared(method), ClassStep()).item()
    method = method.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(prepared(method), ClassStep())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value, rel=0.05)


def test_the_last_layer_is_left_out_of_the_patient_term() -> None:
    method = make(kd_ratio=0.0)
    rows = prepared(method)
    own = gradients(method, method.loss, rows.replace(teacher_states=rows["teacher_states"] + 1))
    other = gradients(method, method.loss, rows)
    moved = {name for name in own if not torch.equal(own[name], other[name])}
    assert "student.bert.encoder.layer.1.output.dense.weight" in moved
    assert not any("layer.2." in name or "classifier" in name or "pooler" in name for name in moved)


def test_padding_and_the_cut_of_the_batch_change_nothing() -> None:
    method = make()
    rows, other = prepared(method), prepared(method, otherwise_padded(class_rows(classes=CLASSES)))
    whole = gradients(method, method.loss, rows)
    for name, grad in gradients(method, method.loss, other).items():
        torch.testing.assert_close(grad, whole[name], rtol=0, atol=1e-10)
    assert_cuts_agree(method, method.loss, rows)


def test_the_map_is_trained_with_the_student_and_is_no_part_of_it() -> None:
    method = make()
    names = [name for name, _ in method.groups()["student"].params]
    assert [name for name in names if not name.startswith("student.")] == ["fit.weight"]
    assert tuple(method.fit.weight.shape) == (12, 8)
    before = method.fit.weight.detach().clone()
    training = TrainingConfig(optimizer_steps=2, batch_size=6, lr=1e-2)
    Trainer(method, BatchSource(prepared(method)), training, seed=1).fit()
    assert not torch.equal(method.fit.weight, before)
    assert method.predictor() is method.student
    assert not any("fit" in name for name in method.predictor().state_dict())


def test_equal_widths_need_no_map_and_equal_models_have_no_patient_term() -> None:
    twin = [tiny_bert(1, classes=CLASSES, layers=3) for _ in range(2)]
    method, step = PKDFT(PKDFT.Config(), *twin), ClassStep()
    assert not list(method.fit.parameters())
    families = {"student": "bert", "teacher": "bert"}
    method.loss(prepared(method, class_rows(classes=CLASSES, families=families)), step)
    assert step.terms["pt"] == pytest.approx(0, abs=1e-14)
    assert step.terms["ds"] == pytest.approx(0, abs=1e-14)


def test_a_student_of_one_layer_has_no_patient_term() -> None:
    with pytest.warns(UserWarning, match="a student of one layer has no L_PT"):
        method = make(student_layers=1)
    step, rows = ClassStep(), prepared(method)
    value = method.loss(rows, step).item()
    assert set(step.terms) == {"ce", "ds"}
    assert value == pytest.approx(0.3 * step.terms["ce"] + 0.7 * step.terms["ds"], abs=1e-12)
    assert "teacher_states" not in rows
    assert not list(method.fit.parameters())


@pytest.mark.parametrize(
    "settings", [{"kd_ratio": 2.0}, {"temperature": 0.0}, {"beta": -1.0}, {"beta": float("nan")}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} = "):
        PKDFT.Config(**settings)
