"""How near two tasks are: golden values, invariants of each metric, signatures by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_kit import FAMILIES, LAYERS, WIDTH, M, encoder, otherwise_padded, rows, tuned
from torch import Tensor

from kdbench.errors import UserError
from kdbench.transferability import (
    METRICS,
    e_avg,
    e_concat,
    e_pairwise,
    neurons,
    overlap,
    semantic,
    signature,
    similarity,
    table_of,
)

P = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
Q = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
REPRESENTATIONS = ("cls_hidden", "pooler", "mean_tokens")


def bits(told: str) -> Tensor:
    return torch.tensor([letter == "1" for letter in told])


def prompts(seed: int = 0, m: int = 4, width: int = 6) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return list(torch.randn(2, m, width, generator=draw, dtype=torch.float64))


# --------------------------------------------------------------------------------------------- golden
def test_prompts_by_hand() -> None:
    assert e_avg(P, Q) == pytest.approx(0.707107, abs=1e-6)
    assert e_concat(P, Q) == pytest.approx(0.0, abs=1e-12)
    assert e_pairwise(P, Q) == pytest.approx(0.353553, abs=1e-6)


def test_overlap_by_hand() -> None:
    assert overlap(bits("1011"), bits("1101")) == pytest.approx(2 / 3, abs=1e-12)
    assert overlap(bits("1100"), bits("0011")) == 0.0
    assert overlap(bits("0000"), bits("0011")) == 0.0
    assert overlap(bits("1000"), bits("1111")) == pytest.approx(0.5, abs=1e-12)


def test_neurons_by_hand() -> None:
    one = {"activation": torch.tensor([[0.2, -1.0], [3.0, 0.1]]), "active": torch.tensor([[1.0, 0], [1, 1]])}
    other = {"activation": torch.tensor([[1.0, 2.0], [-1.0, 9]]), "active": torch.tensor([[0.5, 1], [0, 1]])}
    assert neurons(one, other) == pytest.approx(2 / 3, abs=1e-12)
    assert neurons(one, other, layers=1) == pytest.approx(1 / 2**0.5, abs=1e-12)
    assert neurons(one, other, by_text=True) == pytest.approx(1.5 / (3**0.5 * 1.5), abs=1e-12)
    with pytest.raises(UserError, match="are not known for this encoder"):
        neurons(one, {})


def test_semantic_by_hand() -> None:
    one, other = {"cls_hidden": torch.tensor([3.0, 4.0])}, {"cls_hidden": torch.tensor([4.0, -3.0])}
    assert semantic(one, one) == pytest.approx(1.0, abs=1e-12)
    assert semantic(one, other) == pytest.approx(0.0, abs=1e-12)
    assert semantic(one, {"cls_hidden": -one["cls_hidden"]}) == pytest.approx(-1.0, abs=1e-12)
    with pytest.raises(UserError, match="'pooler': this encoder has none; there are cls_hidden"):
        semantic(one, other, "pooler")


# ----------------------------------------------------------------------------------- invariants of prompts
@pytest.mark.parametrize("seed", range(3))
def test_prompt_metrics_keep_their_invariants(seed: int) -> None:
    one, other = prompts(seed)
    shuffled = one[[2, 0, 3, 1]]
    for metric in (e_avg, e_concat, e_pairwise):
        value = metric(one, other)
        assert metric(other, one) == pytest.approx(value, abs=1e-12)
        assert metric(5 * one, other) == pytest.approx(value, abs=1e-12)
        assert metric(-one, other) == pytest.approx(-value, abs=1e-12)
        assert -1 <= value <= 1
    assert e_avg(one, one) == pytest.approx(1.0, abs=1e-12)
    assert e_concat(one, one) == pytest.approx(1.0, abs=1e-12)
    assert e_avg(shuffled, other) == pytest.approx(e_avg(one, other), abs=1e-12)
    assert e_pairwise(shuffled, other) == pytest.approx(e_pairwise(one, other), abs=1e-12)
    assert abs(e_concat(shuffled, other) - e_concat(one, other)) > 1e-3


def test_a_scale_of_one_token_moves_the_mean_alone() -> None:
    one, other = prompts()
    scaled = one * torch.tensor([9.0, 1, 1, 1])[:, None]
    assert e_pairwise(scaled, other) == pytest.approx(e_pairwise(one, other), abs=1e-12)
    assert abs(e_avg(scaled, other) - e_avg(one, other)) > 1e-3


def test_prompts_of_two_lengths() -> None:
    one, other = prompts()
    with pytest.raises(ValueError, match=r"of shapes \[3, 6\] and \[4, 6\] cannot be compared"):
        e_concat(one[:3], other)
    assert e_avg(one[:1], one[:1].repeat(5, 1)) == pytest.approx(1.0, abs=1e-12)
    assert e_pairwise(one[:1], one[:1].repeat(5, 1)) == pytest.approx(1.0, abs=1e-12)


# ------------------------------------------------------------------------------------------ signatures
def test_a_signature_by_hand() -> None:
    """One text at a time, and the feed-forward parts' units read from the layers themselves."""
    base = encoder()
    model, batch = tuned(base, 2), rows()
    heard: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    hooks = [
        layer.intermediate.register_forward_hook(lambda _, args, out, at=at: heard[at].append(out[0, 0]))
        for at, layer in enumerate(base.encoder.layer)
    ]
    states = [model.states(batch.rows([row]))[0].detach() for row in range(batch.size)]
    for hook in hooks:
        hook.remove()
    found = signature(model, [batch.rows([0, 1]), batch.rows([2, 3, 4, 5])])
    units = torch.stack([torch.stack(layer) for layer in heard], 1).detach()
    wanted = {
        "cls_hidden": torch.stack([one[0] for one in states]).mean(0),
        "pooler": torch.stack([base.pooler(one[None])[0].detach() for one in states]).mean(0),
        "mean_tokens": torch.stack([one.mean(0) for one in states]).mean(0),
        "activation": units.mean(0),
        "active": (units > 0).double().mean(0),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-12), name
    assert list(found["activation"].shape) == [LAYERS, 12]
    assert 0 < float((found["activation"] > 0).double().mean()) < 1


@pytest.mark.parametrize("form", ["classes", "choice", "tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_do_not_depend_on_batches(family: str, form: str) -> None:
    model, batch = tuned(encoder(family, form), 2), rows(form)
    plain = signature(model, [batch])
    turned = otherwise_padded(batch).rows([5, 3, 0, 1, 4, 2])
    for other in (
        signature(model, [batch.rows([row]) for row in range(batch.size)]),
        signature(model, [turned]),
    ):
        for name, value in plain.items():
            assert torch.allclose(other[name], value, rtol=0, atol=1e-12), name


def permuted(model: Any) -> None:
    with torch.no_grad():
        model.prompt.vectors.copy_(model.prompt.vectors[[2, 0, 1]])


def test_semantic_is_blind_to_the_order_of_prompt_tokens_and_sees_the_prompt() -> None:
    base, batch = encoder(), rows()
    one, other = tuned(base, 2), tuned(base, 3)
    first, second = signature(one, [batch]), signature(other, [batch])
    permuted(one)
    again = signature(one, [batch])
    for name in REPRESENTATIONS:
        value = semantic(first, second, name)
        assert semantic(again, second, name) == pytest.approx(value, abs=1e-12)
        assert semantic(second, first, name) == pytest.approx(value, abs=1e-12)
        assert semantic(first, first, name) == pytest.approx(1.0, abs=1e-12)
        assert -1 <= value < 0.999
    assert len({round(semantic(first, second, name), 6) for name in REPRESENTATIONS}) == 3


def test_signatures_leave_modes_and_gradients_alone() -> None:
    model, batch = tuned(encoder(), 2), rows()
    quiet = signature(model, [batch])
    model.train()
    assert all(torch.equal(value, quiet[name]) for name, value in signature(model, [batch]).items())
    assert model.training
    assert model.encoder.training
    assert not any(value.requires_grad for value in quiet.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_text_is_no_signature() -> None:
    with pytest.raises(ValueError, match="needs at least one text"):
        signature(tuned(encoder(), 2), [])


# ---------------------------------------------------------------------------------------- similarities
@pytest.mark.parametrize("metric", METRICS)
def test_similarities_are_symmetric_and_in_range(metric: str) -> None:
    base, batch = encoder(), rows()
    models = [tuned(base, 2), tuned(base, 3)]
    for model in models:
        model.signature = {f"own.{n}": v for n, v in signature(model, [batch]).items()}
    value = similarity(*models, metric)
    assert similarity(*models[::-1], metric) == pytest.approx(value, abs=1e-12)
    assert (0 if metric == "on" else -1) <= value < 1
    if metric != "e_pairwise":  # which is the mean over pairs of different tokens too
        assert similarity(models[0], models[0], metric) == pytest.approx(1.0, abs=1e-12)


def test_similarity_reads_what_it_is_told_to() -> None:
    base = encoder()
    one, other = tuned(base, 2), tuned(base, 3)
    assert similarity(one, other, "e_avg") == e_avg(table_of(one), table_of(other))
    assert similarity(one, other, "semantic", "pooler") == pytest.approx(
        float(torch.cosine_similarity(one.signature["own.pooler"], other.signature["own.pooler"], 0)),
        abs=1e-12,
    )
    for model in (one, other):
        model.signature["probe.cls_hidden"] = torch.ones(WIDTH)
    assert similarity(one, other, "semantic", inputs="probe") == pytest.approx(1.0, abs=1e-6)
    assert similarity(one, other, "semantic") < 0.999
    with pytest.raises(UserError, match="no signature on these texts, but on own, probe"):
        similarity(one, other, "semantic", inputs="target")
    with pytest.raises(ValueError, match="metric = 'cosine' is none of semantic, e_avg"):
        similarity(one, other, "cosine")


def test_a_deep_prompts_token_is_its_whole_row() -> None:
    assert list(table_of(tuned(encoder(), 2)).shape) == [M, 2 * LAYERS * WIDTH]
    assert list(table_of(tuned(encoder(), 2, shallow=True)).shape) == [M, WIDTH]
