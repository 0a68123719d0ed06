"""TinyBERT: each loss against numpy row by row, the two stages, what each mode refuses, padding."""

from __future__ import annotations

import copy
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

from kdbench.classify import all_states
from kdbench.distiller import Batch
from kdbench.distillers.tinybert_ft import (
    TinyBERTFT,
    attention_distance,
    attention_scores,
    hidden_distance,
    uniform_map,
    word_distance,
)
from kdbench.errors import UserError
from kdbench.registry import load_distiller

CLASSES = 3
SAME = {"student": "bert", "teacher": "bert"}
LATE = ClassStep(progress=0.8)


def make(mode: Any, teacher: Any = None, **settings: Any) -> TinyBERTFT:
    """Two layers of width 8 with two heads learn from four of width 12 with two or three."""
    if teacher is None and mode == "full":
        teacher = tiny_bert(2, classes=CLASSES, layers=4, width=12)
    teacher = teacher or tiny_roberta(2, classes=CLASSES, layers=4)
    torch.manual_seed(5)
    student = tiny_bert(1, classes=CLASSES, layers=2)
    return TinyBERTFT(TinyBERTFT.Config(mode=mode, **settings), student, teacher)


def raw_rows(mode: str) -> Batch:
    return class_rows(classes=CLASSES, families=SAME) if mode == "full" else class_rows(classes=CLASSES)


def prepared(method: TinyBERTFT, rows: Batch | None = None) -> Batch:
    rows = raw_rows(method.cfg.mode) if rows is None else rows
    made = method.prepare(ClassData(train=rows), ClassStep())
    assert list(made) == ["train"]
    return made["train"]


def fitted(method: TinyBERTFT, states: Array) -> Array:
    weight, bias = method.fit.weight.detach().numpy(), method.fit.bias.detach().numpy()
    return states @ weight.T + bias  # type: ignore[no-any-return]


def scores_of(model: Any, states: Array, layer: int) -> Array:
    """Scores before the softmax of one layer (1..L) of one row, [heads, T, T]."""
    attention = model.base_model.encoder.layer[layer - 1].attention.self
    heads = attention.num_attention_heads

    def project(linear: Any) -> Array:
        out = states[layer - 1] @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        return np.stack(np.split(out, heads, axis=-1))  # type: ignore[no-any-return]

    q, k = project(attention.query), project(attention.key)
    return q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])  # type: ignore[no-any-return]


def test_it_is_registered_with_its_defaults() -> None:
    assert load_distiller("tinybert_ft") is TinyBERTFT
    assert vars(TinyBERTFT.Config()) == {
        "mode": "prediction",
        "intermediate_share": 0.8,
        "temperature": 1.0,
        "class_mean": True,
    }
    assert "class_label" not in TinyBERTFT.needs


def test_uniform_map() -> None:
    assert uniform_map(12, 4) == (0, 3, 6, 9, 12)
    assert uniform_map(24, 4) == (0, 6, 12, 18, 24)
    assert uniform_map(3, 3) == (0, 1, 2, 3)
    with pytest.raises(UserError, match="the teacher's 12 layers are no multiple of the student's 5"):
        uniform_map(12, 5)
    with pytest.raises(UserError, match="no multiple"):
        uniform_map(2, 4)


# ------------------------------------------------------------------------------------- prediction
@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0}, {"class_mean": False}])
def test_prediction_is_the_soft_cross_entropy(settings: dict[str, Any]) -> None:
    method, raw = make("prediction", **settings), raw_rows("prediction")
    rows, t = prepared(method), settings.get("temperature", 1.0)
    assert not any("." in name for name in rows)
    p = np.exp(log_softmax(row_logits(method.teacher, raw.of("teacher")) / t))
    terms = -p * log_softmax(row_logits(method.student, raw) / t)
    expected = terms.mean() if method.cfg.class_mean else terms.sum() / raw.size
    assert method.loss(rows, ClassStep()).item() == pytest.approx(expected, abs=1e-12)
    assert {name.split(".")[0] for name, _ in method.groups()["student"].params} == {"student"}


@pytest.mark.parametrize("mode", ["full", "aligned"])
def test_layers_come_first_and_prediction_last(mode: str) -> None:
    method = make(mode, intermediate_share=0.8)
    rows = prepared(method)
    terms: set[str] = {"attention", "hidden"} if mode == "full" else {"hidden"}
    for progress, expected in ((0.0, terms), (0.79, terms), (0.8, set()), (0.99, set())):
        step = ClassStep(progress=progress)
        found = gradients(method, method.loss, rows, step)
        assert set(step.terms) == expected
        matched = {name.split(".")[1] for name in found if name.startswith("student.")}
        assert matched == ({"bert"} if expected else {"bert", "classifier"})
        assert ("fit.weight" in found) == bool(expected)
    plain = make("prediction", method.teacher)
    late = plain.loss(prepared(plain, raw_rows(mode)), ClassStep()).item()
    assert method.loss(rows, LATE).item() == pytest.approx(late, abs=1e-12)
    never = make(mode, intermediate_share=0.0)
    assert never.loss(rows, ClassStep()).item() == method.loss(rows, LATE).item()
    always, step = make(mode, intermediate_share=1.0), ClassStep(progress=0.999)
    always.loss(rows, step)
    assert set(step.terms) == terms


# ------------------------------------------------------------------------------------------- full
@pytest.mark.parametrize("heads", [2, 3])
def test_full_against_numpy_row_by_row(heads: int) -> None:
    teacher = tiny_bert(2, classes=CLASSES, layers=4, width=12, heads=heads)
    method, raw, step = make("full", teacher), raw_rows("full"), ClassStep()
    value = method.loss(prepared(method), step).item()
    own, theirs = row_states(method.student, raw), row_states(method.teacher, raw.of("teacher"))
    hidden, attention = 0.0, 0.0
    for q, p in zip(own, theirs, strict=True):
        hidden += sum(((fitted(method, q[m]) - p[2 * m]) ** 2).mean() for m in range(3)) / raw.size
        for m in (1, 2):
            a, b = scores_of(method.student, q, m), scores_of(method.teacher, p, 2 * m)
            if heads != 2:
                a, b = a.mean(0), b.mean(0)
            attention += ((a - b) ** 2).mean() / raw.size
    assert step.terms == {
        "attention": pytest.approx(attention, abs=1e-10),
        "hidden": pytest.approx(hidden, abs=1e-10),
    }
    assert value == pytest.approx(attention + hidden, abs=1e-10)


def test_scores_are_those_that_the_model_turns_into_its_maps() -> None:
    for model, rows in (
        (tiny_bert(1), class_rows()),
        (tiny_roberta(2), class_rows().of("teacher")),
    ):
        model.set_attn_implementation("eager")
        states = all_states(model, rows)
        scores = attention_scores(model, states, range(1, len(states)))
        width = int(rows["length"].max())
        real = (torch.arange(width) < rows["length"][:, None]).long()
        ids = rows["input_ids"][:, :width].masked_fill(real == 0, model.config.pad_token_id)
        kinds = (
            {} if model.config.type_vocab_size == 1 else {"token_type_ids": rows["segment_ids"][:, :width]}
        )
        maps = model(ids, attention_mask=real, **kinds, output_attentions=True).attentions
        beyond = torch.arange(scores[0].shape[-1]) >= rows["length"][:, None]
        for one, theirs in zip(scores, maps, strict=True):
            ours = one.masked_fill(beyond[:, None, None], float("-inf")).softmax(-1)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_equal_models_and_the_identity_leave_no_intermediate_loss() -> None:
    teacher = tiny_bert(1, classes=CLASSES, layers=2)
    method = make("full", teacher)
    with torch.no_grad():
        method.fit.weight.copy_(torch.eye(8))
        method.fit.bias.zero_()
    step = ClassStep()
    assert method.loss(prepared(method), step).item() == pytest.approx(0, abs=1e-14)
    assert step.terms == {"attention": pytest.approx(0, abs=1e-14), "hidden": pytest.approx(0, abs=1e-14)}


def test_distances_by_hand() -> None:
    length = torch.tensor([2, 1])
    q = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    p = torch.tensor([[1.0, 2, 9], [0, 1, 9], [9, 9, 9]]).double().expand(2, 1, 3, 3)
    assert attention_distance(q, p, length).tolist() == [6 / 4, 1.0]
    assert attention_distance(q.expand(2, 4, 3, 3), p.expand(2, 4, 3, 3), length).tolist() == [6 / 4, 1.0]
    heads = torch.stack([p[:, 0] + 1, p[:, 0] - 1], dim=1)
    assert attention_distance(q, heads, length).tolist() == [6 / 4, 1.0]
    states = torch.tensor([[[1.0, 3], [2, 0], [9, 9]], [[2, 2], [9, 9], [9, 9]]]).double()
    assert hidden_distance(torch.zeros_like(states), states, length).tolist() == [14 / 4, 4.0]


@pytest.mark.parametrize("mode", ["prediction", "full", "aligned"])
def test_padding_and_the_cut_of_the_batch_change_nothing(mode: str) -> None:
    method = make(mode)
    rows, other = prepared(method), prepared(method, otherwise_padded(raw_rows(mode)))
    whole, value = gradients(method, method.loss, rows), method.loss(rows, ClassStep()).item()
    assert method.loss(other, ClassStep()).item() == pytest.approx(value, abs=1e-12)
    for name, grad in gradients(method, method.loss, other).items():
        torch.testing.assert_close(grad, whole[name], rtol=0, atol=1e-11)
    assert_cuts_agree(method, method.loss, rows)


@pytest.mark.parametrize("mode", ["prediction", "full", "aligned"])
def test_half_precision_products_are_summed_in_single_precision(mode: str) -> None:
    method = make(mode)
    value = method.loss(prepared(method), ClassStep()).item()
    method = method.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(prepared(method), ClassStep())
        states = all_states(method.student, raw_rows(mode))
        assert attention_scores(method.student, states, [1])[0].dtype == torch.float32
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("mode", ["prediction", "full", "aligned"])
def test_gradient_is_the_slope_of_the_loss(mode: str) -> None:
    method = make(mode)
    rows = prepared(method)
    names = ["student.bert.encoder.layer.0.attention.self.query.weight"]
    names += ["student.classifier.weight"] if mode == "prediction" else ["fit.weight", "fit.bias"]
    for name in names:
        assert_slope(method, method.loss, rows, name)


def test_full_refuses_two_vocabularies_at_once() -> None:
    with pytest.raises(UserError, match="was given vocabularies of 25 and 46 tokens; use mode 'prediction'"):
        make("full", tiny_roberta(2, classes=CLASSES, layers=4))


def test_full_refuses_other_tokens_before_training() -> None:
    method, rows = make("full"), raw_rows("full")
    ids = rows["teacher.input_ids"].clone()
    ids[3, 1] += 1
    longer = rows["teacher.length"] + torch.tensor([0, 0, 1, 0, 0, 0])
    for other in ({"teacher.input_ids": ids}, {"teacher.length": longer}):
        with pytest.raises(UserError, match="rows that the models read as different tokens"):
            prepared(method, rows.replace(**other))
    prepared(method, otherwise_padded(rows))  # padding is no token


def test_layers_that_do_not_divide_are_refused_at_once() -> None:
    teacher = tiny_roberta(2, classes=CLASSES, layers=3)
    with pytest.raises(UserError, match="the teacher's 3 layers are no multiple of the student's 2"):
        make("aligned", teacher)
    make("prediction", teacher)


def test_another_attention_is_refused_at_once() -> None:
    teacher = copy.deepcopy(tiny_bert(2, classes=CLASSES, layers=4, width=12))
    del teacher.bert.encoder.layer[1].attention.self.query
    with pytest.raises(UserError, match="attention of BERT's family; BertForSequenceClassification's"):
        make("full", teacher)


# ---------------------------------------------------------------------------------------- aligned
def words_of(states: Array, index: torch.Tensor) -> dict[int, Array]:
    """The mean state of each word of one row, and the first token's as word -1, from states [T, d] and its
    tokens' word numbers.
    """
    numbers = index[: len(states)].numpy()
    found = {int(word): states[numbers == word].mean(0) for word in np.unique(numbers) if word >= 0}
    return found | {-1: states[0]}


def test_aligned_against_numpy_row_by_row() -> None:
    method, raw, step = make("aligned"), raw_rows("aligned"), ClassStep()
    value = method.loss(prepared(method), step).item()
    own, theirs = row_states(method.student, raw), row_states(method.teacher, raw.of("teacher"))
    each = []
    for row in range(raw.size):
        total = 0.0
        for m in range(3):
            q = words_of(fitted(method, own[row][m]), raw["word_index"][row])
            p = words_of(theirs[row][2 * m], raw["teacher.word_index"][row])
            assert q.keys() == p.keys()
            total += np.mean([((q[word] - p[word]) ** 2).mean() for word in q])
        each.append(total)
    assert value == pytest.approx(np.mean(each), abs=1e-10)
    assert step.terms == {"hidden": pytest.approx(np.mean(each), abs=1e-10)}


def aligned(index: list[int], other: list[int], length: int | None = None) -> float:
    """The distance of two views of one row: token t has state t + 1 in one, 10 (t + 1) in the other."""
    views = []
    for words, factor in ((index, 1.0), (other, 10.0)):
        states = factor * torch.arange(1.0, len(words) + 1, dtype=torch.float64)[None, :, None]
        count = len(words) if length is None else min(length, len(words))
        batch = Batch({"word_index": torch.tensor([words]), "length": torch.tensor([count])})
        views.append((batch, [states]))
    return word_distance(views[0][1], views[1][1], views[0][0], views[1][0]).item()


def test_words_by_hand() -> None:
    # the first token: 1 against 10; words 0 and 1: 2 and 3.5 against 25 and 40
    both = pytest.approx((9**2 + 23**2 + 36.5**2) / 3)
    assert aligned([-1, 0, 1, 1, -1], [-1, 0, 0, 1]) == both
    # word 1 was cut off for one model
    one = pytest.approx((9**2 + 23**2) / 2)
    assert aligned([-1, 0, 1, 1, -1], [-1, 0, 0]) == one
    # what stands beyond the length is no word, and costs no memory
    assert aligned([-1, 0, 1, 1, 10**12], [-1, 0, 0, 1], length=4) == both
    # a word of three tokens against one of one: 3 against 20
    three = pytest.approx((9**2 + 17**2) / 2, rel=1e-14)
    assert aligned([-1, 0, 0, 0, -1], [-1, 0, -1]) == three
    # seven tokens: 5 against 20
    assert aligned([-1, *[0] * 7], [-1, 0]) == pytest.approx((9**2 + 15**2) / 2, rel=1e-14)
    # no word in common, and none at all
    assert aligned([-1, 0], [-1, 1]) == 9**2
    assert aligned([-1, -1], [-1]) == 9**2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intermediate_share": 1.1}, "intermediate_share = 1.1"),
        ({"intermediate_share": -0.1}, "intermediate_share = -0.1"),
        ({"temperature": 0.0}, "temperature = 0.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyBERTFT.Config(**settings)
