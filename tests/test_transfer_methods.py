"""Full and prompt tuning, transfer from one source and from several: losses by hand, what is handed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_kit import CLASSES, LAYERS, WIDTH, M, build, encoder, own, rows, run, same, source_data, tuned
from method_kit import FakeStep
from torch import nn
from torch.nn.functional import cross_entropy

from kdbench.distiller import Batch, Totals
from kdbench.distillers._fusion import fuse
from kdbench.distillers._transfer import (
    IGNORED,
    counted,
    divergences,
    squared_gaps,
    task_losses,
    unit_mean,
)
from kdbench.errors import UserError
from kdbench.prompted import FORMATS
from kdbench.transferability import signature, similarity

Q = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
T = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
PAIR = Batch({"class_label": torch.tensor([1, 0]), "length": torch.tensor([3, 3])})


# -------------------------------------------------------------------------------------- losses by hand
def test_cross_entropy_and_gap_by_hand() -> None:
    assert unit_mean(task_losses(Q, PAIR, "classes"), PAIR).item() == pytest.approx(0.220095, abs=1e-6)
    assert unit_mean(squared_gaps(Q, T, PAIR, "classes"), PAIR).item() == pytest.approx(1.25, abs=1e-12)


def test_a_numbers_loss_by_hand() -> None:
    batch = Batch({"target": torch.tensor([1.0, -2.0])})
    q, p = torch.tensor([[3.0], [0.0]]).double(), torch.tensor([[0.0], [1.0]]).double()
    assert task_losses(q, batch, "number").tolist() == [4.0, 4.0]
    assert squared_gaps(q, p, batch, "number").tolist() == [9.0, 1.0]
    with pytest.raises(ValueError, match="a number has none"):
        divergences(q, p, batch, "number", 1.0)


def token_batch(labels: list[list[int]]) -> Batch:
    table = torch.tensor(labels)
    return Batch({"labels": table, "length": torch.full((len(table),), table.shape[1])})


def test_tokens_count_where_they_have_a_label() -> None:
    batch = token_batch([[IGNORED, 1, 0], [1, IGNORED, IGNORED]])
    draw = torch.Generator().manual_seed(1)
    q, p = torch.randn(2, 2, 3, 2, generator=draw, dtype=torch.float64)
    at = [(0, 1, 1), (0, 2, 0), (1, 0, 1)]
    by_hand = [float(cross_entropy(q[b, t][None], torch.tensor([y]))) for b, t, y in at]
    assert task_losses(q, batch, "tokens").tolist() == pytest.approx(by_hand, abs=1e-12)
    gaps = [float((q[b, t] - p[b, t]).square().mean()) for b, t, _ in at]
    assert squared_gaps(q, p, batch, "tokens").tolist() == pytest.approx(gaps, abs=1e-12)
    units = counted(batch, FakeStep())
    assert unit_mean(task_losses(q, units, "tokens"), units).item() == pytest.approx(
        sum(by_hand) / 3, abs=1e-12
    )
    whole = cross_entropy(q.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
    assert float(whole) == pytest.approx(sum(by_hand) / 3, abs=1e-12)


def test_a_spans_loss_is_over_the_positions_of_its_text() -> None:
    draw = torch.Generator().manual_seed(2)
    q, p = torch.randn(2, 2, 5, 2, generator=draw, dtype=torch.float64)
    batch = Batch(
        {"start": torch.tensor([1, 0]), "end": torch.tensor([2, 2]), "length": torch.tensor([5, 3])}
    )
    start = cross_entropy(q[1, :3, 0][None], torch.tensor([0]))
    end = cross_entropy(q[1, :3, 1][None], torch.tensor([2]))
    assert task_losses(q, batch, "span")[1].item() == pytest.approx(float(start + end) / 2, abs=1e-9)
    by_hand = float((q[1, :3] - p[1, :3]).square().mean())
    assert squared_gaps(q, p, batch, "span")[1].item() == pytest.approx(by_hand, abs=1e-12)
    log_q, log_p = q[1, :3].log_softmax(0), p[1, :3].log_softmax(0)
    kl = float((log_p.exp() * (log_p - log_q)).sum()) / 2
    assert divergences(q, p, batch, "span", 1.0)[1].item() == pytest.approx(kl, abs=1e-9)


def test_divergence_by_hand() -> None:
    q, p = Q[:1], T[1:]  # p is uniform
    s = torch.tensor([0.0, 1.0]).double().softmax(0)
    by_hand = float((0.5 * (0.5 / s).log()).sum())
    assert divergences(q, p, PAIR, "classes", 1.0).item() == pytest.approx(by_hand, abs=1e-9)
    assert divergences(q, q, PAIR, "classes", 3.0).item() == pytest.approx(0.0, abs=1e-12)
    halved = divergences(2 * q, 2 * p, PAIR, "classes", 2.0).item()
    assert halved == pytest.approx(4 * by_hand, abs=1e-9)


def test_means_are_over_the_whole_update() -> None:
    values = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert unit_mean(values, PAIR.with_totals(Totals(99, 8))).item() == 3 / 8
    units = PAIR.replace(units=torch.tensor([6.0, 6.0]))
    assert unit_mean(values, units).item() == 3 / 6


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["pt", "full_tune"])
def test_every_format_trains(name: str, form: str) -> None:
    train = rows(form)
    method = build(name, {"student": encoder(form=form)})
    value = method.loss(counted(train, FakeStep()), FakeStep()).item()
    assert value == pytest.approx(task_losses(method.student(train), train, form).mean().item(), abs=1e-12)
    before = own(method)
    _, lines = run(method, train, steps=30, batch_size=train.size, micro_batch=4)
    assert lines[0]["student/loss"] == pytest.approx(value, abs=1e-12)
    assert lines[-1]["student/loss"] < lines[0]["student/loss"]
    assert not same(before, own(method))


# ------------------------------------------------------------------------------------------ prompt tuning
def test_runs_of_a_seed_share_the_first_prompt() -> None:
    """Whatever the task and its head; only so is the cosine of two trained prompts told from chance."""
    one = build("pt", {"student": encoder()})
    other = build("pt", {"student": encoder(form="tokens", classes=7)})
    another = build("pt", {"student": encoder()}, seed=4)
    assert torch.equal(one.student.prompt.vectors, other.student.prompt.vectors)
    assert not torch.equal(one.student.prompt.vectors, another.student.prompt.vectors)


@pytest.mark.parametrize("form", ["classes", "tokens"])
def test_training_moves_prompt_and_head_and_not_the_encoder(form: str) -> None:
    base = encoder(form=form)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    method = build("pt", {"student": base})
    start = own(method)
    run(method, rows(form))
    assert same(before, base.state_dict())
    assert all(param.grad is None for param in base.parameters())
    assert all(not torch.equal(value, start[name]) for name, value in own(method).items())


def test_what_represents_a_task_is_kept_at_the_end() -> None:
    train = rows()
    method = build("pt", {"student": encoder()}, texts=3)
    run(method, train)
    method.finish(source_data(train))
    wanted = signature(method.student, [train.rows([0, 2, 4])])
    kept = method.student.signature
    assert {name.removeprefix("own.") for name in kept} == wanted.keys()
    assert all(torch.allclose(kept[f"own.{n}"], v.float(), atol=1e-6) for n, v in wanted.items())


def test_wrong_settings_are_refused() -> None:
    for settings, told in (
        ({"prompt_length": 0}, "prompt_length = 0 must be 1 or more"),
        ({"texts": 0}, "texts = 0 must be 1 or more"),
        ({"prompt_init_std": -1.0}, "must be 0 or more"),
        ({"prompt": "shallow", "reparameterize": 4}, "a shallow one has none"),
    ):
        with pytest.raises(UserError, match=told):
            build("pt", {"student": encoder()}, **settings)


# -------------------------------------------------------------------------------------------- full tuning
def test_full_tuning_moves_everything_that_is_read() -> None:
    for form, pooler in (("classes", True), ("tokens", False)):
        base = encoder(form=form)
        before = {name: value.clone() for name, value in base.state_dict().items()}
        method = build("full_tune", {"student": base})
        run(method, rows(form), steps=2)
        still = {name for name, value in base.state_dict().items() if torch.equal(value, before[name])}
        assert any(name.startswith("pooler") for name in still) is not pooler
        assert not any(name.startswith("encoder") and "query.weight" in name for name in still)
        counted_by_hand = sum(p.numel() for n, p in base.named_parameters() if pooler or "pooler" not in n)
        assert method.measures() == {"trained_parameters": counted_by_hand + WIDTH * CLASSES + CLASSES}


# ----------------------------------------------------------------------------------------------- transfer
def test_a_sources_prompt_is_handed_over_and_no_head() -> None:
    base = encoder()
    source = tuned(base, 2)
    method, plain = build("pot", {"student": base, "source": source}), build("pt", {"student": base})
    assert torch.equal(method.student.prompt.vectors, source.prompt.vectors)  # type: ignore[union-attr]
    assert method.student.prompt is not source.prompt
    assert not torch.equal(method.student.head.weight, source.head.weight)
    assert torch.equal(method.student.head.weight, plain.student.head.weight)


def test_heads_never_leak() -> None:
    """Nor does the head of question answering, or of another number of labels, whatever its name."""
    for form, outputs in (("span", 2), ("tokens", 7), ("choice", 1)):
        source = tuned(encoder(form=form, classes=7), 2)
        assert source.head.out_features == outputs
        method = build("pot", {"student": encoder(), "source": source})
        assert method.student.head.out_features == CLASSES
        assert torch.equal(method.student.prompt.vectors, source.prompt.vectors)  # type: ignore[union-attr]
        assert torch.equal(
            method.student.head.weight, build("pt", {"student": encoder()}).student.head.weight
        )


@pytest.mark.parametrize(
    ("source", "settings"),
    [({"m": M + 1}, {}), ({"shallow": True}, {}), ({}, {"prompt": "shallow"}), ({}, {"reparameterize": 4})],
    ids=["length", "kind", "own_kind", "mlp"],
)
def test_a_prompt_that_does_not_fit_is_one_clear_error(
    source: dict[str, Any], settings: dict[str, Any]
) -> None:
    base = encoder()
    with pytest.raises(UserError) as caught:
        build("pot", {"student": base, "source": tuned(base, 2, **source)}, **settings)
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith("source: its prompt {'vectors': ")
    assert "all rows of a board need the same prompt, prompt_length and reparameterize" in told


def test_the_source_is_left_as_it_is() -> None:
    base = encoder()
    source = tuned(base, 2)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    method = build("pot", {"student": base, "source": source})
    run(method, rows())
    assert same(before, source.state_dict())
    assert not torch.equal(method.student.prompt.vectors, source.prompt.vectors)  # type: ignore[union-attr]


def test_the_head_alone_may_be_trained() -> None:
    base = encoder()
    source = tuned(base, 2)
    method = build("pot", {"student": base, "source": source}, train="head")
    run(method, rows())
    assert torch.equal(method.student.prompt.vectors, source.prompt.vectors)  # type: ignore[union-attr]
    assert {name for name, _ in method.groups()["student"].params} == {
        "student.head.weight",
        "student.head.bias",
    }


# ------------------------------------------------------------------------------------------- early fusion
def several(base: Any, seeds: tuple[int, ...] = (2, 3, 4)) -> nn.ModuleList:
    return nn.ModuleList([tuned(base, seed) for seed in seeds])


def test_fused_prompts_by_hand() -> None:
    base = encoder()
    sources, target = several(base), tuned(base, 9)
    found = [similarity(one, target, "semantic") for one in sources]  # type: ignore[arg-type]
    first, second = sorted(range(3), key=lambda i: -found[i])[:2]
    method = build("pot_early", {"student": base, "sources": sources, "target": target}, top_k=2, tau=0.1)
    shares = torch.tensor([found[first], found[second]], dtype=torch.float64).div(0.1).softmax(0)
    vectors: list[Any] = [sources[i].prompt.vectors for i in (first, second)]  # type: ignore[union-attr]
    by_hand = shares[0] * vectors[0] + shares[1] * vectors[1]
    assert torch.allclose(method.student.prompt.vectors, by_hand, rtol=0, atol=1e-12)
    assert {name: value for name, value in method.measures().items() if name != "trained_parameters"} == {
        f"weight_{first}": pytest.approx(float(shares[0])),
        f"weight_{second}": pytest.approx(float(shares[1])),
    }


def test_one_fused_source_is_that_source() -> None:
    base = encoder()
    sources, target = several(base), tuned(base, 9)
    found = [similarity(one, target, "semantic") for one in sources]  # type: ignore[arg-type]
    best = sources[found.index(max(found))]
    fused = build("pot_early", {"student": base, "sources": sources, "target": target}, top_k=1)
    single = build("pot", {"student": base, "source": best})
    run(fused, rows())
    run(single, rows())
    assert same(own(fused), own(single))


def test_the_order_and_the_number_of_equal_sources_change_nothing() -> None:
    base = encoder()
    sources, target = several(base), tuned(base, 9)
    turned = nn.ModuleList([sources[i] for i in (2, 0, 1)])
    made = [
        own(build("pot_early", {"student": base, "sources": one, "target": target}, top_k=2))
        for one in (sources, turned)
    ]
    assert same(*made)
    twice = nn.ModuleList([sources[0], sources[0]])
    doubled = build("pot_early", {"student": base, "sources": twice, "target": target}, top_k=2)
    assert torch.equal(doubled.student.prompt.vectors, sources[0].prompt.vectors)  # type: ignore[union-attr]


def test_equal_weights_are_the_mean() -> None:
    base = encoder()
    sources, target = several(base), tuned(base, 9)
    method = build(
        "pot_early", {"student": base, "sources": sources, "target": target}, top_k=5, weights="uniform"
    )
    vectors: list[Any] = [one.prompt.vectors for one in sources]  # type: ignore[union-attr]
    assert torch.allclose(method.student.prompt.vectors, torch.stack(vectors).mean(0), rtol=0, atol=1e-12)
    for settings in ({"top_k": 0}, {"tau": 0.0}):
        with pytest.raises(UserError, match="top_k must be 1 or more, tau above 0"):
            build("pot_early", {"student": base, "sources": sources, "target": target}, **settings)


def test_the_fused_similarity_is_the_weighted_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    base = encoder()
    sources, target = several(base), tuned(base, 9)
    cfg = build("pot_early", {"student": base, "sources": sources, "target": target}, top_k=2).cfg
    known = dict(zip(sources, [0.5, -0.2, 0.9], strict=True))
    monkeypatch.setattr("kdbench.distillers._fusion.predicted", lambda cfg, source, target: known[source])
    fused = fuse(cfg, sources, target)
    share = torch.tensor([0.9, 0.5], dtype=torch.float64).softmax(0)
    assert list(fused.weights) == [2, 0]
    assert fused.similarity == pytest.approx(float(share[0] * 0.9 + share[1] * 0.5), abs=1e-12)
    assert list(fused.prompt) == ["vectors"]
    assert list(fused.prompt["vectors"].shape) == [M, 2 * LAYERS * WIDTH]
