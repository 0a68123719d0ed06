"""GKD: its loss for every divergence, whose responses it learns on, and its draw between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_kit import (
    FakeStep,
    assert_gradient_is_slope,
    gradients,
    kl,
    make_rows,
    ragged_rows,
    target_log_probs,
    tiny_gpt2,
)

from kdbench.distiller import Batch
from kdbench.distillers.gkd import GKD
from kdbench.registry import load_distiller
from kdbench.rollout import rollout


def make(teacher_seed: int = 2, **settings: Any) -> GKD:
    return GKD(GKD.Config(**{"max_new_tokens": 5, **settings}), tiny_gpt2(1), tiny_gpt2(teacher_seed))


def used(gkd: GKD, step: FakeStep, rows: Batch) -> Batch:
    gkd.train_step(rows, step)
    ((group, batch),) = step.updated
    assert group == "student"
    return batch


def test_it_is_registered_with_the_promptkd_papers_settings() -> None:
    assert load_distiller("gkd") is GKD
    cfg = GKD.Config()
    assert (cfg.divergence, cfg.student_fraction, cfg.sampling_temperature) == ("reverse_kl", 1.0, 1.0)


def test_reverse_and_forward_kl_are_what_their_names_say() -> None:
    rows = ragged_rows()
    values = {}
    for name in ("reverse_kl", "forward_kl"):
        gkd, step = make(divergence=name), FakeStep()
        values[name] = gkd.loss(rows, step).item()
        assert step.terms == {name: pytest.approx(values[name])}
    gkd = make()
    assert values["reverse_kl"] == pytest.approx(kl(gkd.student, gkd.teacher, rows), abs=1e-12)
    assert values["forward_kl"] == pytest.approx(kl(gkd.teacher, gkd.student, rows), abs=1e-12)
    assert abs(values["reverse_kl"] - values["forward_kl"]) > 0.1


def test_jsd_with_a_parameter() -> None:
    gkd, rows = make(divergence="generalized_jsd", beta=0.1), ragged_rows()
    log_q, _ = target_log_probs(gkd.student, rows)
    log_p, _ = target_log_probs(gkd.teacher, rows)
    q, p = np.exp(log_q), np.exp(log_p)
    m = 0.1 * p + 0.9 * q
    expected = (0.1 * p * (log_p - np.log(m)) + 0.9 * q * (log_q - np.log(m))).sum(-1).mean()
    assert gkd.loss(rows, FakeStep()).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "forward_kl"},
        {"divergence": "generalized_jsd", "beta": 0.1},
        {"divergence": "skew_reverse_kl", "alpha": 0.2},
        {"divergence": "symmetric_kl", "weight": 0.7},
    ],
)
def test_gradient_is_the_slope_of_the_loss(settings: dict[str, Any]) -> None:
    assert_gradient_is_slope(make(**settings), ragged_rows())


@pytest.mark.parametrize(
    "name", ["reverse_kl", "forward_kl", "generalized_jsd", "skew_forward_kl", "adaptive_kl", "symmetric_kl"]
)
def test_an_equal_teacher_gives_no_gradient(name: str) -> None:
    gkd = make(teacher_seed=1, divergence=name)
    assert gkd.loss(ragged_rows(), FakeStep()).item() == pytest.approx(0, abs=1e-14)
    assert max(float(grad.abs().max()) for grad in gradients(gkd, ragged_rows()).values()) < 1e-14


def test_on_policy_updates_use_the_students_own_sample() -> None:
    gkd, step, rows = make(), FakeStep(visit=3), ragged_rows()
    batch = used(gkd, step, rows)
    expected = rollout(tiny_gpt2(1), rows, FakeStep(visit=3), 5)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["length"], expected["length"])
    assert step.counts["tokens_sampled"] == batch.counts().tokens == batch.totals.tokens
    assert step.terms["reverse_kl"] == pytest.approx(kl(gkd.student, gkd.teacher, batch), abs=1e-12)
    again = used(make(), FakeStep(visit=4), rows)
    assert not torch.equal(again["length"], batch["length"]) or not torch.equal(
        again["input_ids"], batch["input_ids"]
    )


def test_sampling_carries_no_gradient_and_leaves_the_student_in_its_mode() -> None:
    gkd, step = make(), FakeStep()
    batch = used(gkd, step, ragged_rows())
    direct = gradients(make(), batch)
    for name, param in gkd.student.named_parameters():
        torch.testing.assert_close(param.grad, direct[name], rtol=0, atol=1e-12)
    assert not gkd.student.training
    assert all(p.grad is None for p in gkd.teacher.parameters())


def test_fraction_zero_is_the_divergence_on_the_reference_responses() -> None:
    gkd, step, rows = make(student_fraction=0.0), FakeStep(), ragged_rows()
    assert used(gkd, step, rows) is rows
    assert step.terms["reverse_kl"] == pytest.approx(kl(gkd.student, gkd.teacher, rows), abs=1e-12)
    assert step.counts == {}


def test_the_draw_depends_on_seed_and_visit_and_follows_the_fraction() -> None:
    gkd, visits = make(student_fraction=0.25, max_new_tokens=1), range(100)
    whole, part = ragged_rows().rows([0, 1]), ragged_rows().rows([1])

    def sampled(rows: Batch, seed: int) -> list[bool]:
        return [used(gkd, FakeStep(seed, visit), rows) is not rows for visit in visits]

    found = sampled(whole, 7)
    assert found == sampled(part, 7)  # as on another process, with another share of the batch
    assert found != sampled(part, 8)
    assert 12 <= sum(found) <= 38  # 25 expected, standard deviation 4.3


def test_sampling_temperature_zero_is_greedy() -> None:
    gkd = make(sampling_temperature=0.0)
    batch = used(gkd, FakeStep(), ragged_rows())
    log_q, targets = target_log_probs(gkd.student, batch)
    assert (log_q.argmax(-1) == targets).all()


def test_eos_is_a_target_though_it_is_the_padding() -> None:
    gkd = make(student_fraction=0.0)
    whole, cut = make_rows([[3, 4]], [[5, 6, 0]]), make_rows([[3, 4]], [[5, 6]])
    log_p, _ = target_log_probs(gkd.teacher, whole)
    log_q, _ = target_log_probs(gkd.student, whole)
    at_eos = float((np.exp(log_q[-1]) * (log_q[-1] - log_p[-1])).sum())
    total = 3 * gkd.loss(whole, FakeStep()).item()
    assert total == pytest.approx(2 * gkd.loss(cut, FakeStep()).item() + at_eos, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_fraction": 1.5}, "student_fraction = 1.5"),
        ({"sampling_temperature": -1.0}, "sampling_temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"divergence": "generalized_jsd", "beta": 1.0}, "reverse_kl"),
        ({"divergence": "generalized_jsd", "beta": 0.0}, "forward_kl"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GKD.Config(**settings)
