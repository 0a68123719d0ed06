"""PANDA and its fusions: weights and schedules by hand, what stays frozen, what each reduces to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from encoder_kit import CLASSES, FAMILIES, build, encoder, own, rows, run, same, source_data, tuned
from method_kit import FakeStep
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdbench.distiller import Batch
from kdbench.distillers._panda import chosen_sources, scheduled
from kdbench.distillers._transfer import IGNORED, counted, task_losses
from kdbench.errors import UserError
from kdbench.transferability import METRICS, e_avg, signature, similarity, table_of

CODE = {"lam0": 0.1, "lam_source": "const", "schedule": "const", "divide_by_batch": True}
CONST = {"lam_source": "const", "schedule": "const"}  # the weight is lam0 at every step


def models(base: Any, **changed: Any) -> dict[str, Any]:
    """The roles of `panda` on one encoder."""
    return {
        "student": base,
        "teacher": tuned(base, 2),
        "source": tuned(base, 3),
        "target": tuned(base, 4),
        **changed,
    }


def panda(base: Any = None, changed: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A prepared method and its models."""
    base = encoder() if base is None else base
    method = build("panda", models(base, **(changed or {})), **settings)
    method.prepare(source_data(rows(base.config.task_format)), FakeStep())
    return method


def gradient(method: Any, batch: Batch, step: Any = None) -> dict[str, Tensor]:
    """Gradients of the loss in prompt and head."""
    method.zero_grad()
    step = FakeStep() if step is None else step
    method.loss(counted(batch, step), step).backward()
    return {n: p.grad.clone() for n, p in method.student.named_parameters() if p.grad is not None}


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in tensors.values()]).norm())


# ------------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("tri", {5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("hold_decay", {5: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("const", {5: 1.0, 10: 1.0, 55: 1.0, 100: 1.0}),
    ],
)
def test_schedules_by_hand(kind: str, at: dict[int, float]) -> None:
    assert {epoch: scheduled(kind, epoch, 100) for epoch in at} == pytest.approx(at, abs=1e-12)


@pytest.mark.parametrize("kind", ["tri", "hold_decay", "const"])
@pytest.mark.parametrize("epochs", [1, 4, 9, 10, 100])
def test_schedules_are_shares(kind: str, epochs: int) -> None:
    """Fewer than ten epochs have no first part: nothing is divided by it."""
    values = [scheduled(kind, epochs * i / 40, epochs) for i in range(41)]
    assert all(0 <= value <= 1 for value in values)
    assert values[-1] == (1.0 if kind == "const" else 0.0)
    assert values[0] == (0.0 if kind == "tri" and epochs >= 10 else 1.0)
    with pytest.raises(ValueError, match="schedule = 'cosine' is none of const, hold_decay, tri"):
        scheduled("cosine", 1.0, 10)


def test_weights_by_hand() -> None:
    step = FakeStep()
    step.progress = 0.55
    assert panda(lam0=2.0).weight(0.6, step) == pytest.approx(2 * 0.6 * 0.5, abs=1e-12)
    assert panda(lam0=2.0).weight(-0.6, step) == 0.0
    told = panda(lam0=2.0, lam_source="const", beta=0.3, schedule="const")
    assert told.weight(-0.6, step) == pytest.approx(0.6, abs=1e-12)
    assert panda(schedule_epochs=5).weight(1.0, step) == pytest.approx(0.45, abs=1e-12)
    step.progress = 1.0
    assert panda().weight(1.0, step) == 0.0


# ------------------------------------------------------------------------------------------ golden values
Q = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
T = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)


class Table(nn.Module):
    """A stand-in for a prompted encoder that gives the same outputs, whatever the rows."""

    def __init__(self, values: Tensor, form: str) -> None:
        super().__init__()
        self.values, self.task_format = nn.Parameter(values.clone()), form

    def states(self, batch: Batch) -> Tensor:
        return self.values

    def outputs_from(self, states: Tensor, batch: Batch) -> Tensor:
        return states


def tabled(q: Tensor, p: Tensor, form: str, **settings: Any) -> Any:
    """A method whose student and teacher give these outputs."""
    method = panda(**settings)
    method.student, method.teacher = Table(q, form), Table(p, form)
    return method


PAIR = Batch({"class_label": torch.tensor([1, 0]), "length": torch.tensor([3, 3])})


@pytest.mark.parametrize(("beta", "total"), [(0.1, 0.226345), (0.65, 0.260720)])
def test_the_codes_loss_by_hand(beta: float, total: float) -> None:
    method = tabled(Q, T, "classes", beta=beta, **CODE)
    step = FakeStep()
    assert method.loss(PAIR, step).item() == pytest.approx(total, abs=1e-6)
    assert step.terms["task"] == pytest.approx(0.220095, abs=1e-6)
    assert step.terms["distance"] == pytest.approx(0.625, abs=1e-12)
    assert tabled(Q, T, "classes", **CONST).loss(PAIR, FakeStep()).item() == pytest.approx(
        0.220095 + 1.25, abs=1e-6
    )


@pytest.mark.parametrize(("beta", "share"), [(0.1, 0.0025), (1.0, 0.025)])
def test_the_codes_term_is_all_but_inert(beta: float, share: float) -> None:
    """Two classes, a gap of 2, batch 16, at the student's start: its part of the logits' gradient."""
    batch = Batch({"class_label": torch.zeros(16, dtype=torch.long), "length": torch.full((16,), 3)})
    zero, two = torch.zeros(16, 2).double(), torch.full((16, 2), 2.0).double()
    found = []
    for settings in ({**CODE, "beta": beta}, {"lam0": 0.0}):
        method = tabled(zero, two, "classes", **settings)
        method.loss(batch, FakeStep()).backward()
        found.append(method.student.values.grad)
    kd, ce = found[0] - found[1], found[1]
    assert float(kd.norm() / ce.norm()) == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("form", ["classes", "tokens", "number"])
def test_the_codes_term_moves_a_tiny_encoder_little(form: str) -> None:
    base, batch = encoder(form=form), rows(form)
    task = gradient(panda(base, lam0=0.0), batch)
    both = gradient(panda(base, beta=0.1, positions="all", **CODE), batch)
    kd = {name: both[name] - task[name] for name in task}
    assert 0 < norm(kd) < 0.05 * norm(task)


# --------------------------------------------------------------------------------------- the gradient
@pytest.mark.parametrize("distill", ["logits", "cls_hidden", "prompt", "prob_kl"])
@pytest.mark.parametrize("form", ["classes", "choice", "tokens", "span"])
def test_twice_the_weight_is_twice_the_gradient(form: str, distill: str) -> None:
    base, batch = encoder(form=form), rows(form)
    task, once, twice = (
        gradient(panda(base, lam0=lam, distill=distill, **CONST), batch) for lam in (0, 1, 2)
    )
    kd = {name: once[name] - task[name] for name in task}
    assert norm(kd) > 1e-3
    assert bool(kd["prompt.vectors"].any())
    for name, value in kd.items():
        assert torch.allclose(twice[name] - task[name], 2 * value, rtol=0, atol=1e-9), name


def test_the_weight_grows_with_similarity() -> None:
    """A gradient is the task's plus the weight times the distance's, at any similarity."""
    base, batch = encoder(), rows()
    method, plain = panda(base), gradient(panda(base, lam0=0.0), batch)
    found = []
    for value in (0.25, 0.75):
        method.state["similarity"]["chosen"] = value
        found.append(norm({n: v - plain[n] for n, v in gradient(method, batch).items()}))
    assert found[1] == pytest.approx(3 * found[0], rel=1e-9)


@pytest.mark.parametrize("distill", ["logits", "cls_hidden", "prompt", "prob_kl"])
@pytest.mark.parametrize("form", ["classes", "tokens", "span"])
def test_a_student_that_is_its_teacher_is_left_alone(form: str, distill: str) -> None:
    base, batch = encoder(form=form), rows(form)
    method, plain = panda(base, distill=distill, lam0=50.0, **CONST), panda(base, lam0=0.0)
    for one in (method, plain):
        one.student.load_state_dict(one.teacher.own(), strict=False)
    step = FakeStep()
    value = method.loss(counted(batch, step), step).item()
    assert step.terms["distance"] == pytest.approx(0.0, abs=1e-15)
    assert value == pytest.approx(step.terms["task"], abs=1e-12)
    for name, found in gradient(method, batch).items():
        assert torch.allclose(found, gradient(plain, batch)[name], rtol=0, atol=1e-12), name


def test_the_teacher_has_no_gradient() -> None:
    method = panda(**CONST)
    gradient(method, rows())
    assert all(param.grad is None for param in method.teacher.parameters())
    assert not any(param.requires_grad for param in method.teacher.parameters())


def test_a_number_on_all_logits_of_the_teacher_matters_to_squares_alone() -> None:
    """Unlike a softmax' divergence: this is how the method is defined."""
    base, batch = encoder(), rows()
    for distill, moved in (("logits", True), ("prob_kl", False)):
        method = panda(base, distill=distill, **CONST)
        before = method.loss(batch, FakeStep()).item()
        with torch.no_grad():
            method.teacher.head.bias += 1.5
        assert (abs(method.loss(batch, FakeStep()).item() - before) > 1e-3) is moved


def test_a_numbers_term_is_a_squared_difference() -> None:
    base, batch = encoder(form="number"), rows("number")
    method = panda(base, lam0=0.7, schedule="const")
    q, p = method.student(batch)[:, 0], method.teacher(batch)[:, 0]
    weight = 0.7 * similarity(method.source, method.target, "semantic")
    by_hand = (q - batch["target"]).square().mean() + weight * (q - p).square().mean()
    assert method.loss(batch, FakeStep()).item() == pytest.approx(by_hand.item(), abs=1e-12)
    with pytest.raises(UserError, match="needs a distribution; the task has a number"):
        panda(base, distill="prob_kl", **CONST)


def test_hidden_states_and_prompts_by_hand() -> None:
    base, batch = encoder(), rows()
    for distill in ("cls_hidden", "prompt"):
        method, step = panda(base, distill=distill, **CONST), FakeStep()
        method.loss(batch, step)
        if distill == "prompt":
            gap = table_of(method.student) - table_of(method.teacher)
        else:
            gap = method.student.states(batch)[:, 0] - method.teacher.states(batch)[:, 0]
        assert step.terms["distance"] == pytest.approx(gap.square().mean().item(), abs=1e-12)


# ----------------------------------------------------------------------------------------- token tasks
@pytest.mark.parametrize("positions", ["labelled", "all"])
def test_what_stands_at_unlabelled_tokens(positions: str) -> None:
    """It changes the distance only where all positions are compared."""
    draw = torch.Generator().manual_seed(1)
    q, p = torch.randn(2, 2, 4, 3, generator=draw, dtype=torch.float64)
    labels = torch.tensor([[IGNORED, 1, IGNORED, 2], [IGNORED, 0, IGNORED, IGNORED]])
    batch = counted(Batch({"labels": labels, "length": torch.tensor([4, 2])}), FakeStep())
    ignored = labels == IGNORED
    for model in ("student", "teacher"):
        terms = []
        for changed in (False, True):
            given = {"student": q.clone(), "teacher": p.clone()}
            given[model][ignored] += 3.0 * changed
            step = FakeStep()
            tabled(given["student"], given["teacher"], "tokens", positions=positions, **CONST).loss(
                batch, step
            )
            terms.append(step.terms)
        assert terms[0]["task"] == terms[1]["task"]
        assert (abs(terms[0]["distance"] - terms[1]["distance"]) > 0.1) is (positions == "all")
    by_hand = (q - p).square().mean() if positions == "all" else (q - p)[~ignored].square().mean()
    step = FakeStep()
    tabled(q, p, "tokens", positions=positions, **CONST).loss(batch, step)
    assert step.terms["distance"] == pytest.approx(by_hand.item(), abs=1e-12)


# ------------------------------------------------------------------------------------------- similarity
def test_all_metrics_are_told_and_one_is_chosen() -> None:
    base = encoder()
    for metric in METRICS:
        method = panda(base, metric=metric)
        told = method.measures()
        wanted = {name: similarity(method.source, method.target, name) for name in METRICS}
        assert {name: told[name] for name in METRICS} == wanted
        assert told["chosen"] == wanted[metric]
        assert "semantic_probe" not in told


def test_similarity_of_common_texts_and_of_the_targets() -> None:
    base = encoder()
    given = models(base)
    for role in ("source", "target"):
        given[role].signature["probe.cls_hidden"] = torch.ones(8)
    changed = {role: given[role] for role in ("source", "target")}
    told = panda(base, changed, inputs="probe").measures()
    assert told["chosen"] == told["semantic_probe"] == pytest.approx(1.0, abs=1e-6)
    method = panda(base, changed, inputs="target")
    read = [signature(model, [rows()])["cls_hidden"] for model in (method.source, method.target)]
    assert method.measures()["chosen"] == pytest.approx(
        float(torch.cosine_similarity(read[0], read[1], dim=0)), abs=1e-12
    )
    assert not any(name.startswith("target.") for name in method.source.signature)


def test_prompts_are_enough_where_activations_are_not_known() -> None:
    base = encoder()
    source, target = tuned(base, 3), tuned(base, 4)
    del source.signature["own.activation"], target.signature["own.activation"]
    told = panda(base, {"source": source, "target": target}, metric="e_avg").measures()
    assert "on" not in told
    assert told["chosen"] == e_avg(table_of(source), table_of(target))


# --------------------------------------------------------------------------------------------- freezing
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_students_prompt_and_head_move(family: str) -> None:
    base = encoder(family)
    method = panda(base)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    run(method, rows())
    moved = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"student.prompt.vectors", "student.head.weight", "student.head.bias"}
    frozen = [p for n, p in method.named_parameters() if n not in moved]
    assert all(param.grad is None for param in frozen)


# -------------------------------------------------------------------------------------------- reductions
def trained(name: str, roles: dict[str, Any], train: Batch, training: dict[str, Any], **settings: Any) -> Any:
    method = build(name, roles, **settings)
    _, lines = run(method, train, **training)
    return own(method), [line["student/loss"] for line in lines]


def opposed(base: Any) -> dict[str, Any]:
    """A source whose similarity to the target is -1."""
    given = models(base)
    given["source"].signature["own.cls_hidden"] = -given["target"].signature["own.cls_hidden"]
    return given


@pytest.mark.parametrize(
    "training", [{}, {"student_dropout": True, "micro_batch": 1}], ids=["plain", "dropout"]
)
@pytest.mark.parametrize("form", ["classes", "tokens"])
def test_weight_zero_is_prompt_tuning(form: str, training: dict[str, Any]) -> None:
    """Bit for bit: the teacher is not asked, and draws nothing from any stream."""
    base, train = encoder(form=form).float(), rows(form)
    plain, losses = trained("pt", {"student": base}, train, training)
    taught, _ = trained("panda", models(base), train, training)
    assert not same(plain, taught)
    for roles, settings in (
        (models(base), {"lam0": 0.0}),
        (models(base), {"lam_source": "const", "beta": 0.0}),
        (opposed(base), {}),
    ):
        found, lines = trained("panda", roles, train, training, **settings)
        assert same(plain, found), settings
        assert lines == losses
    found, _ = trained("panda", models(base), train, training, lam0=0.0, teacher_train_mode=True)
    close = 0 if training else 1e-6  # a broken law keeps the drawn order of rows, which moves the rounding
    assert all(torch.allclose(value, found[n], rtol=0, atol=close) for n, value in plain.items())


def test_a_teacher_with_dropout_moves_the_students_masks() -> None:
    """It takes numbers from the stream that the student's dropout takes them from, at any weight but 0."""
    base, train, training = encoder(), rows(), {"student_dropout": True, "micro_batch": 1}
    plain, _ = trained("pt", {"student": base}, train, training)
    quiet, _ = trained("panda", models(base), train, training, lam0=1e-30, **CONST)
    loud, _ = trained("panda", models(base), train, training, lam0=1e-30, teacher_train_mode=True, **CONST)
    assert all(torch.allclose(value, quiet[name], rtol=0, atol=1e-9) for name, value in plain.items())
    assert not torch.allclose(plain["prompt.vectors"], loud["prompt.vectors"], rtol=0, atol=1e-6)


def test_at_weight_zero_no_teacher_is_asked() -> None:
    class Silent(nn.Module):
        def states(self, batch: Batch) -> Tensor:
            raise AssertionError("was asked")

    batch = rows()
    late, _ = prepared_late(encoder(), lam0=0.0)
    late.teachers = nn.ModuleList([Silent() for _ in range(4)])
    single = panda(lam0=0.0)
    single.teacher = Silent()
    for method in (single, late):
        assert method.loss(batch, FakeStep()).item() == method.task_loss(method.student(batch), batch).item()
    opposed = panda()
    opposed.teacher, opposed.state["similarity"]["chosen"] = Silent(), -0.1
    opposed.loss(batch, FakeStep())
    opposed.state["similarity"]["chosen"] = 0.1
    with pytest.raises(AssertionError, match="was asked"):
        opposed.loss(batch, FakeStep())


def test_from_the_sources_prompt_at_weight_zero_is_plain_transfer() -> None:
    base, train = encoder().float(), rows()
    given = models(base)
    plain, losses = trained("pot", {"student": base, "source": given["source"]}, train, {})
    found, lines = trained("panda", given, train, {}, student_init="source", lam0=0.0)
    assert same(plain, found)
    assert lines == losses
    random, _ = trained("panda", given, train, {}, lam0=0.0)
    assert not same(plain, random)


# ------------------------------------------------------------------------------------- several sources
def fused_roles(base: Any, teacher: Any, sources: Sequence[Any], target: Any) -> dict[str, Any]:
    return {"student": base, "teacher": teacher, "sources": nn.ModuleList(sources), "target": target}


def late_roles(base: Any, teachers: Sequence[Any], sources: Sequence[Any], target: Any) -> dict[str, Any]:
    return {
        "student": base,
        "teachers": nn.ModuleList(teachers),
        "sources": nn.ModuleList(sources),
        "target": target,
    }


def world(base: Any, count: int = 3) -> tuple[list[Any], list[Any], Any, int]:
    """Teachers, sources, a target, and the place of the source that is most similar to it."""
    teachers = [tuned(base, 20 + i) for i in range(count)]
    sources, target = [tuned(base, 30 + i) for i in range(count)], tuned(base, 40)
    found = [similarity(one, target, "semantic") for one in sources]
    assert len(set(found)) == count
    return teachers, sources, target, found.index(max(found))


@pytest.mark.parametrize("form", ["classes", "tokens"])
def test_one_source_of_either_fusion_is_panda(form: str) -> None:
    base, train = encoder(form=form).float(), rows(form)
    teachers, sources, target, best = world(base)
    single = {"student": base, "teacher": teachers[best], "source": sources[best], "target": target}
    plain, losses = trained("panda", single, train, {})
    early, first = trained(
        "panda_early", fused_roles(base, teachers[best], sources, target), train, {}, top_k=1
    )
    late, second = trained("panda_late", late_roles(base, teachers, sources, target), train, {}, top_k=1)
    assert same(plain, early)
    assert same(plain, late)
    assert losses == first == second


def test_one_source_begins_where_panda_does() -> None:
    base, train = encoder().float(), rows()
    teachers, sources, target, best = world(base)
    single = {"student": base, "teacher": teachers[best], "source": sources[best], "target": target}
    plain, _ = trained("panda", single, train, {}, student_init="source")
    roles = fused_roles(base, teachers[best], sources, target)
    early, _ = trained("panda_early", roles, train, {}, top_k=1, student_init="source")
    assert same(plain, early)


def test_the_order_of_sources_changes_nothing() -> None:
    base, train = encoder().float(), rows()
    teachers, sources, target, _ = world(base)
    turn = [2, 0, 1]
    for fusion in ("sum", "mean_logits"):
        one, losses = trained(
            "panda_late", late_roles(base, teachers, sources, target), train, {}, fusion=fusion
        )
        other, lines = trained(
            "panda_late",
            late_roles(base, [teachers[i] for i in turn], [sources[i] for i in turn], target),
            train,
            {},
            fusion=fusion,
        )
        assert same(one, other)
        assert losses == lines
    one, _ = trained("panda_early", fused_roles(base, teachers[0], sources, target), train, {}, top_k=2)
    turned = fused_roles(base, teachers[0], [sources[i] for i in turn], target)
    other, _ = trained("panda_early", turned, train, {}, top_k=2)
    assert same(one, other)


@pytest.mark.parametrize("fusion", ["sum", "mean_logits"])
def test_a_teacher_twice_at_half_the_weight_is_one_teacher(fusion: str) -> None:
    base, train = encoder(), rows()
    teachers, sources, target, _ = world(base)
    single = {"student": base, "teacher": teachers[0], "source": sources[0], "target": target}
    plain, _ = trained("panda", single, train, {})
    roles = late_roles(base, [teachers[0]] * 2, [sources[0]] * 2, target)
    twice, _ = trained("panda_late", roles, train, {}, top_k=2, fusion=fusion)
    assert all(torch.allclose(value, twice[name], rtol=0, atol=1e-9) for name, value in plain.items())


def prepared_late(base: Any, **settings: Any) -> tuple[Any, list[Any]]:
    teachers, sources, target, _ = world(base, 4)
    method = build("panda_late", late_roles(base, teachers, sources, target), **settings)
    method.prepare(source_data(rows()), FakeStep())
    return method, teachers


def test_late_fusion_by_hand() -> None:
    base, batch = encoder(), rows()
    method, teachers = prepared_late(base, top_k=2, lam0=3.0, schedule="const")
    method.state["similarities"] = [0.2, 0.9, -0.5, 0.4]
    assert method.chosen == [1, 3]
    q = method.student(batch)
    gaps = [(q - teacher(batch)).square().mean() for teacher in teachers]
    by_hand = cross_entropy(q, batch["class_label"]) + 1.5 * (0.9 * gaps[1] + 0.4 * gaps[3])
    assert method.loss(batch, FakeStep()).item() == pytest.approx(by_hand.item(), abs=1e-12)
    method.state["similarities"] = [-0.2, -0.9, -0.5, 0.4]  # one of two is opposed: the other counts for half
    by_hand = cross_entropy(q, batch["class_label"]) + 1.5 * 0.4 * gaps[3]
    assert method.loss(batch, FakeStep()).item() == pytest.approx(by_hand.item(), abs=1e-12)
    method.state["similarities"] = [-0.2, -0.9, -0.5, -0.4]
    assert torch.equal(method.loss(batch, FakeStep()), method.task_loss(q, batch))
    told = method.measures()
    assert {name: told[name] for name in ("source_0", "source_3", "sources")} == {
        "source_0": -0.2,
        "source_3": -0.4,
        "sources": 2.0,
    }


def test_the_mean_of_outputs_has_the_gradient_of_the_sum() -> None:
    base, batch = encoder(), rows()
    found = [gradient(prepared_late(base, fusion=fusion)[0], batch) for fusion in ("sum", "mean_logits")]
    plain = gradient(prepared_late(base, lam0=0.0)[0], batch)
    assert norm({name: found[0][name] - plain[name] for name in plain}) > 1e-3
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=0, atol=1e-12), name


def test_the_most_similar_sources_are_chosen() -> None:
    assert chosen_sources([0.1, 0.9, 0.5, 0.9], 3) == [1, 3, 2]
    assert chosen_sources([0.1, 0.9], 5) == [1, 0]


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lam0": -1.0}, "lam0 and beta must be 0 or more"),
        ({"temperature": 0.0}, "temperature must be above 0, schedule_epochs 1 or more"),
        ({"schedule_epochs": 0}, "temperature must be above 0, schedule_epochs 1 or more"),
        ({"positions": "all", "distill": "prob_kl"}, "positions = 'all' compares logits"),
        ({"prompt_length": 7, "student_init": "source"}, "source: its prompt .* does not fit this one"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        panda(**settings)


def test_wrong_settings_of_fusions_are_refused() -> None:
    base = encoder()
    teachers, sources, target, _ = world(base)
    with pytest.raises(UserError, match="cannot choose the sources of a prompt that is fused beforehand"):
        build("panda_early", fused_roles(base, teachers[0], sources, target), inputs="target")
    late = late_roles(base, teachers, sources, target)
    for settings, told in (
        ({"top_k": 0}, "top_k = 0 must be 1 or more"),
        ({"fusion": "mean_logits", "distill": "prompt"}, "is for distill = 'logits' at labelled positions"),
        ({"student_init": "source"}, "needs one source; here are several"),
    ):
        with pytest.raises(UserError, match=told):
            build("panda_late", late, **settings)
    with pytest.raises(ValueError, match="there are 2 teachers for 3 sources"):
        build("panda_late", late_roles(base, teachers[:2], sources, target))


def test_the_law_that_a_setting_breaks_follows_from_the_format() -> None:
    for form, broken in (("classes", set()), ("tokens", {"micro_batch"}), ("span", {"micro_batch"})):
        assert set(panda(encoder(form=form), positions="all").breaks()) == broken
    assert set(panda(teacher_train_mode=True).breaks()) == {"micro_batch", "frozen_eval"}
    assert panda().breaks() == {}


def test_the_teachers_dropout_is_on_where_it_is_asked_for() -> None:
    base, batch = encoder(), rows()
    for train, equal in ((False, True), (True, False)):
        method = panda(base, teacher_train_mode=train, **CONST)
        torch.manual_seed(1)
        values = [method.loss(batch, FakeStep()).item() for _ in range(2)]
        assert (values[0] == values[1]) is equal
        assert not any(module.training for module in method.modules())


def test_task_loss_is_cross_entropy() -> None:
    method, batch = panda(lam0=0.0), rows()
    q = method.student(batch)
    assert method.loss(batch, FakeStep()).item() == pytest.approx(
        cross_entropy(q, batch["class_label"]).item(), abs=1e-12
    )
    assert q.shape[1] == CLASSES
    assert task_losses(q, batch, "classes").shape == (batch.size,)
