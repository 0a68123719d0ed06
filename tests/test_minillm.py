"""MiniLLM against its formulas in plain numpy, from the raw logits of single rows."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_kit import EOS, Array, FakeStep, V, make_rows, ragged_rows, target_log_probs, tiny_gpt2
from torch import Tensor, nn

from kdbench.config import TrainingConfig
from kdbench.distiller import Batch, gather_targets, target_mask
from kdbench.distillers.minillm import MiniLLM
from kdbench.harness import BatchSource, Recorder, Trainer

CHANGES: list[dict[str, Any]] = [
    {},
    {"teacher_mix": 0.6},
    {"importance_weights": False},
    {"gamma": 0.5},
    {"whiten": "off", "reward_scaling": 2.0},
    {"reward_clip": 0.5},
    {"return_from": "t+1"},
    {"length_norm": False},
    {"whiten": "off"},
    {"whiten": "micro_batch", "whiten_padding": True},
    {"whiten_padding": True},
    {"clip": 0.02},
    {"single_step": False},
    {"weight_single_step": True},
    {"weight_single_step": True, "teacher_mix": 0.7, "return_from": "t+1", "gamma": 1.0, "whiten": "off"},
]


class Visit(FakeStep):
    """A visit that keeps the rows of each update; `text` is the board's extra set "lm", if any."""

    def __init__(self, visit: int = 0, text: Batch | None = None) -> None:
        super().__init__(visit=visit)
        self.text, self.max_new_tokens = text, 6
        self.asked: list[str] = []

    def extra(self, name: str) -> Batch | None:
        self.asked.append(name)
        return self.text

    def update(self, group: str, loss: Callable[[Any, Any], Tensor], batch: Any) -> None:
        self.updated.append((group, batch))


def made(student: nn.Module | None = None, **settings: Any) -> MiniLLM:
    settings = {"max_new_tokens": 6, **settings}
    return MiniLLM(MiniLLM.Config(**settings), student or tiny_gpt2(1), tiny_gpt2(2, width=16, layers=2))


def prompts(n: int = 5) -> Batch:
    return ragged_rows().rows(list(range(n))).replace(row=torch.arange(n))


def moved(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """The student after it has learnt something: other weights."""
    other = copy.deepcopy(model)
    torch.manual_seed(11)
    with torch.no_grad():
        for param in other.parameters():
            param += scale * torch.randn_like(param)
    return other


def cut_by_row(values: Array, batch: Batch) -> list[Array]:
    sizes = (batch["length"] - batch["prompt_length"]).tolist()
    return np.split(values, np.cumsum(sizes)[:-1])


def oracle(
    cfg: MiniLLM.Config, old: nn.Module, new: nn.Module, teacher: nn.Module, batch: Batch
) -> dict[str, float]:
    """Spec 6.2 and 6.3, token by token: the loss of `new` on responses that `old` had sampled."""
    (log_old, y), (log_new, _), (log_p, _) = (target_log_probs(m, batch) for m in (old, new, teacher))
    n = np.arange(len(y))
    o, a, now = log_old[n, y], log_p[n, y], log_new[n, y]
    alpha = cfg.teacher_mix if cfg.importance_weights else 0.0
    w = np.exp(o) / ((1 - alpha) * np.exp(o) + alpha * np.exp(a))
    r = np.clip((a - o) / cfg.reward_scaling, -cfg.reward_clip, cfg.reward_clip)
    advantages = []
    for row in cut_by_row(r, batch):
        first = 0 if cfg.return_from == "t" else 1
        for t in range(len(row)):
            terms = [cfg.gamma ** (s - t - first) * row[s] for s in range(t + first, len(row))]
            advantages.append(sum(terms) / (max(len(terms), 1) if cfg.length_norm else 1))
    A = np.array(advantages)
    if cfg.whiten != "off":
        entries = A
        if cfg.whiten_padding:
            entries = np.concatenate([A, np.zeros(batch.size * cfg.max_new_tokens - len(A))])
        A = (A - entries.mean()) / np.sqrt(entries.var() + 1e-8)
    rho = w * np.exp(now - o)
    policy = np.maximum(-A * rho, -A * np.clip(rho, 1 - cfg.clip, 1 + cfg.clip)).mean()
    kl = (np.exp(log_new) * (log_new - log_p)).sum(-1)
    single = (w * kl if cfg.weight_single_step else kl).mean() if cfg.single_step else 0.0
    return {"policy": policy, "single": single, "total": policy + single, "reward": r.mean()}


def loss_of(distiller: MiniLLM, batch: Batch, new: nn.Module) -> tuple[Tensor, FakeStep]:
    """The loss of `new` on rows scored with the distiller's present student, as one update sees them."""
    step = Visit()
    rows = distiller.scored(batch, step)  # type: ignore[arg-type]
    distiller.student = new
    distiller.update(rows, step)  # type: ignore[arg-type]
    ((group, parts),) = step.updated
    assert group == "student"
    return distiller.objective(parts, step), step  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- the formulas
@pytest.mark.parametrize("changes", CHANGES)
def test_loss_is_that_of_the_specification(changes: dict[str, Any]) -> None:
    """Ragged rows, one of EOS alone, one cut before EOS, padding = EOS; every switch moves the loss."""
    distiller = made(**changes)
    old, batch = distiller.student, ragged_rows()
    new = moved(old)
    expected = oracle(distiller.cfg, old, new, distiller.teacher, batch)
    loss, step = loss_of(distiller, batch, new)
    assert float(loss.detach()) == pytest.approx(expected["total"], rel=1e-12)
    assert step.terms["policy"] == pytest.approx(expected["policy"], rel=1e-12)
    assert step.terms["reward"] == pytest.approx(expected["reward"], rel=1e-12)
    assert step.terms.get("single_step", 0.0) == pytest.approx(expected["single"], rel=1e-12)
    for name in set(changes) if changes.get("whiten") != "micro_batch" else ():
        rest = MiniLLM.Config(max_new_tokens=6, **{n: v for n, v in changes.items() if n != name})
        without = oracle(rest, old, new, distiller.teacher, batch)
        assert abs(expected["total"] - without["total"]) > 1e-4, f"{name} changes nothing"


@pytest.mark.parametrize("changes", CHANGES)
def test_gradient_is_the_slope_of_the_loss(changes: dict[str, Any]) -> None:
    distiller = made(**changes)
    step = Visit()
    rows = distiller.scored(ragged_rows(), step)  # type: ignore[arg-type]
    if distiller.cfg.whiten == "update":
        rows = rows.replace(advantage=distiller.whitened(rows, step, step.all_sum))
    distiller.student = moved(distiller.student)
    distiller.policy_loss(rows, step).backward()  # type: ignore[arg-type]
    name, param = next((n, p) for n, p in distiller.student.named_parameters() if "c_attn.weight" in n)
    assert param.grad is not None, name
    weight, slopes = param.data.view(-1), param.grad.view(-1)
    for entry in (3, 50, 120):
        kept, values = weight[entry].item(), []
        for sign in (1, -1):
            weight[entry] = kept + sign * 1e-6
            with torch.no_grad():
                values.append(float(distiller.policy_loss(rows, step)))  # type: ignore[arg-type]
        weight[entry] = kept
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(slopes[entry]), rel=1e-5, abs=1e-8)
    assert all(p.grad is None for p in distiller.teacher.parameters())


def test_descent_makes_rewarded_tokens_likelier() -> None:
    """One response, rewarded at its second token alone: that token's probability goes up, or down."""
    distiller = made(single_step=False, whiten="off", gamma=0.0, length_norm=False, importance_weights=False)
    batch = make_rows([[3, 4]], [[5, 6, EOS]])
    rows = distiller.scored(batch, Visit())  # type: ignore[arg-type]
    for sign in (1.0, -1.0):
        advantage = torch.zeros_like(rows["advantage"])
        advantage[0, 2] = sign
        distiller.zero_grad()
        distiller.policy_loss(rows.replace(advantage=advantage), Visit()).backward()  # type: ignore[arg-type]
        student = copy.deepcopy(distiller.student)
        with torch.no_grad():
            for param, source in zip(student.parameters(), distiller.student.parameters(), strict=True):
                if source.grad is not None:
                    param -= 1e-4 * source.grad
        before, after = (target_log_probs(m, batch)[0][1, 6] for m in (distiller.student, student))
        assert (after - before) * sign > 0


def test_returns_by_hand() -> None:
    """Rewards 1, 2, 3 and 4 in rows of three and one tokens, discount one half."""
    batch = make_rows([[3, 4], [5]], [[6, 7, EOS], [EOS]])
    reward = torch.tensor([[9.0, 1, 2, 3, 9], [4, 9, 9, 9, 9]])[:, : batch["input_ids"].shape[1] - 1]
    reward = reward * target_mask(batch)
    cases: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [2.75 / 3, 3.5 / 2, 3.0, 4.0]),
        ({"length_norm": False}, [2.75, 3.5, 3.0, 4.0]),
        ({"return_from": "t+1"}, [3.5 / 2, 3.0, 0.0, 0.0]),
        ({"return_from": "t+1", "length_norm": False}, [3.5, 3.0, 0.0, 0.0]),
    ]
    for changes, expected in cases:
        found = made(gamma=0.5, **changes).advantage(reward, batch)
        assert gather_targets(found, batch).tolist() == pytest.approx(expected)
        assert float((found * ~target_mask(batch)).abs().sum()) == 0


def test_whitening_by_hand() -> None:
    """Advantages 1, 2, 3 and 6: mean 3, variance 3.5; with padding to 2 x 4, mean 1.5, variance 4."""
    batch = make_rows([[3, 4], [5]], [[6, 7, EOS], [EOS]])
    value = torch.zeros(target_mask(batch).shape, dtype=torch.float64)
    value[target_mask(batch)] = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    rows, step = batch.replace(advantage=value), Visit()
    for settings, mean, variance in [({}, 3.0, 3.5), ({"whiten_padding": True}, 1.5, 4.0)]:
        found = made(**{"max_new_tokens": 4, **settings}).whitened(rows, step, step.all_sum)
        expected = [(x - mean) / (variance + 1e-8) ** 0.5 for x in (1.0, 2.0, 3.0, 6.0)]
        assert gather_targets(found, batch).tolist() == pytest.approx(expected, rel=1e-12)
        assert float((found * ~target_mask(batch)).abs().sum()) == 0


def test_ratio_is_the_weight_when_nothing_has_moved_and_the_clip_acts_on_the_product() -> None:
    distiller = made(teacher_mix=0.5, single_step=False, whiten="off")
    batch = ragged_rows()
    rows = distiller.scored(batch, Visit())  # type: ignore[arg-type]
    (log_q, y), (log_p, _) = (target_log_probs(m, batch) for m in (distiller.student, distiller.teacher))
    q, p = (np.exp(x[np.arange(len(y)), y]) for x in (log_q, log_p))
    weight = gather_targets(rows["importance_weight"], rows).numpy()
    np.testing.assert_allclose(weight, q / (0.5 * q + 0.5 * p), rtol=1e-12)
    step = Visit()
    distiller.policy_loss(rows, step)  # type: ignore[arg-type]
    beyond = (weight < 0.8) | (weight > 1.2)
    assert step.terms["clipped_share"] == pytest.approx(beyond.mean())
    assert 0 < beyond.mean() < 1


def test_weights_stay_finite_where_the_teacher_forbids_or_the_student_never_says() -> None:
    distiller = made(teacher_mix=1.0)
    with torch.no_grad():
        for model, token in ((distiller.student, 5), (distiller.teacher, 7)):
            head: Any = model
            head.lm_head.weight = nn.Parameter(head.lm_head.weight.clone(), requires_grad=False)
            head.lm_head.weight[token] *= 1e4
    rows = distiller.float().scored(ragged_rows(), Visit())  # type: ignore[arg-type]
    for name in ("importance_weight", "reward", "advantage", "old_log_prob"):
        assert bool(rows[name].isfinite().all()), name


# ------------------------------------------------------------------------------------ pretraining text
def test_pretraining_text_adds_its_loss_at_all_positions() -> None:
    text = make_rows([[], [4]], [[3, 5, 6, 7, 2], [9, 9, 1]], first_id=900)  # nothing before a first token
    targets = make_rows([[3], [4]], [[5, 6, 7, 2], [9, 9, 1]])
    for kd_ratio, coefficient in [(0.5, 1.0), (0.0, 1.0), (1.0, 0.3), (0.25, 2.0)]:
        distiller = made(kd_ratio=kd_ratio, lm_coef=coefficient)
        step = Visit(text=text)
        distiller.train_step(prompts(), step)  # type: ignore[arg-type]
        parts = step.updated[0][1]
        assert set(parts) == {"rollout", "lm"}
        assert parts["lm"].counts().tokens == 7
        (log_q, y), (log_p, _) = (
            target_log_probs(m, targets) for m in (distiller.student, distiller.teacher)
        )
        ce = -log_q[np.arange(len(y)), y].mean()
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
        found = distiller.objective(parts, step)  # type: ignore[arg-type]
        rest = distiller.policy_loss(parts["rollout"], step)  # type: ignore[arg-type]
        expected = coefficient * ((1 - kd_ratio) * ce + kd_ratio * kl)
        assert float((found - rest).detach()) == pytest.approx(expected, rel=1e-10)
        assert step.asked == ["lm"] * 4  # the next text for every update


def test_without_text_or_with_coefficient_0_there_is_no_such_loss() -> None:
    step = Visit()
    made().train_step(prompts(), step)  # type: ignore[arg-type]
    assert all(set(parts) == {"rollout"} for _, parts in step.updated)
    step = Visit(text=ragged_rows())
    made(lm_coef=0.0).train_step(prompts(), step)  # type: ignore[arg-type]
    assert step.asked == []


# --------------------------------------------------------------------- visits, inner epochs, processes
def test_a_visit_updates_on_all_rows_once_per_inner_epoch() -> None:
    step = Visit()
    made(inner_epochs=3).train_step(prompts(), step)  # type: ignore[arg-type]
    assert len(step.updated) == 3
    seen = [parts["rollout"]["example_id"].tolist() for _, parts in step.updated]
    assert all(sorted(ids) == [100, 101, 102, 103, 104] for ids in seen)
    assert len({tuple(ids) for ids in seen}) > 1, "inner epochs are shuffled"


def test_a_store_is_filled_without_updates_then_emptied() -> None:
    distiller = made(rollout_batches=3, inner_epochs=2)
    ids = []
    for visit in range(3):
        batch = prompts()
        batch = batch.replace(example_id=batch["example_id"] + 10 * visit)
        ids += batch["example_id"].tolist()
        step = Visit(visit)
        distiller.train_step(batch, step)  # type: ignore[arg-type]
        if visit < 2:
            assert step.updated == []
            assert distiller.rollouts.size == 5 * (visit + 1)
    assert distiller.rollouts.size == distiller.state["rows"] == 0
    assert len(step.updated) == 6
    for epoch in range(2):
        rows = [parts["rollout"] for _, parts in step.updated[3 * epoch : 3 * epoch + 3]]
        assert [part.size for part in rows] == [5, 5, 5]
        assert sorted(i for part in rows for i in part["example_id"].tolist()) == ids
        assert sorted(rows[0]["example_id"].tolist()) != ids[:5], "rows are mixed over the store"
        for part in rows:
            counted = gather_targets(part["advantage"], part)
            assert float(counted.mean()) == pytest.approx(0, abs=1e-9)
            assert float(counted.var(correction=0)) == pytest.approx(1, abs=1e-6)


def test_rollouts_come_from_the_mixture_and_their_scores_from_the_moment_of_sampling() -> None:
    distiller = made(rollout_batches=2, teacher_mix=0.9)
    distiller.train_step(prompts(), Visit(0))  # type: ignore[arg-type]
    (stored,) = distiller.rollouts.batches()
    before = stored["old_log_prob"].clone()
    own = made(rollout_batches=2, teacher_mix=0.0)
    own.train_step(prompts(), Visit(0))  # type: ignore[arg-type]
    assert own.rollouts.batches()[0]["length"].tolist() != stored["length"].tolist()
    (unmixed,) = own.rollouts.batches()
    assert set(gather_targets(unmixed["importance_weight"], unmixed).tolist()) == {1.0}
    distiller.student = moved(distiller.student)
    step = Visit(1)
    distiller.train_step(prompts(), step)  # type: ignore[arg-type]
    rows = Batch.cat([parts["rollout"] for _, parts in step.updated[:2]])
    first = rows["slot"].argsort()[:5]
    assert torch.equal(rows["old_log_prob"][first][:, : before.shape[1]], before)


class Pair(Visit):
    """One of two processes that run as threads and meet in every sum."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.shared, self.barrier = rank, shared, barrier

    def all_sum(self, value: Tensor) -> Tensor:
        self.shared[self.rank] = value
        self.barrier.wait(30)
        total: Tensor = self.shared[0] + self.shared[1]
        self.barrier.wait(30)
        return total


@pytest.mark.parametrize("first", [0, 1, 3, 5])
@pytest.mark.parametrize("settings", [{}, {"whiten_padding": True}, {"rollout_batches": 2}])
def test_two_processes_update_on_the_rows_of_one(first: int, settings: dict[str, Any]) -> None:
    """Uneven and empty shares: the same rows in each update, the same advantages."""
    visits = settings.get("rollout_batches", 1)

    def batches() -> list[Batch]:
        rows = [prompts() for _ in range(visits)]
        return [one.replace(example_id=one["example_id"] + 10 * i) for i, one in enumerate(rows)]

    alone, single = made(**settings), Visit()
    for batch in batches():
        alone.train_step(batch, single)  # type: ignore[arg-type]
    shared: list[Any] = [None, None]
    barrier = threading.Barrier(2)
    steps = [Pair(rank, shared, barrier) for rank in (0, 1)]
    pair = [made(**settings), made(**settings)]

    def run(rank: int) -> None:
        for batch in batches():
            mine = list(range(first)) if rank == 0 else list(range(first, 5))
            pair[rank].train_step(batch.rows(mine), steps[rank])  # type: ignore[arg-type]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(steps[0].updated) == len(steps[1].updated) == len(single.updated) == 4 * visits
    for (_, whole), (_, left), (_, right) in zip(
        single.updated, steps[0].updated, steps[1].updated, strict=True
    ):
        assert advantages(whole) == pytest.approx({**advantages(left), **advantages(right)}, rel=1e-9)


def advantages(parts: Mapping[str, Batch]) -> dict[int, float]:
    """A weighted sum of each row's advantages by example."""
    rows = parts["rollout"]
    place = torch.arange(1, rows["advantage"].shape[1] + 1)
    sums = (rows["advantage"] * place).sum(1)
    return dict(zip(rows["example_id"].tolist(), sums.tolist(), strict=True))


# ------------------------------------------------------------------------------------ with the harness
def trainer(
    micro: int, folder: Path | None = None, recorder: Recorder | None = None, **settings: Any
) -> Trainer:
    training = TrainingConfig(
        optimizer_steps=8, batch_size=8, lr=1e-3, micro_batch=micro, rollout_batch=3, checkpoint_every=0
    )
    rows = make_rows([[1 + i % (V - 1), 2 + i % 7][: 1 + i % 2] for i in range(16)], [[EOS]] * 16)
    distiller = made(**settings)
    extras = {"lm": BatchSource(make_rows([[i % V] for i in range(20)], [[3, i % V, 5] for i in range(20)]))}
    source = BatchSource(rows)
    return Trainer(distiller, source, training, 1, extras=extras, folder=folder, recorder=recorder)


def gradients_of(micro: int, **settings: Any) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = []
    one = trainer(micro, recorder=Recorder(gradient=lambda group, grads: found.append(grads)), **settings)
    one.one_visit()
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return float((apart / sum(float(g.square().sum()) for g in one.values())) ** 0.5)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_an_update_does_not_depend_on_its_cut(micro: int) -> None:
    whole, cut = gradients_of(8)[0], gradients_of(micro)[0]
    assert distance(whole, cut) < 1e-12
    broken = gradients_of(micro, whiten="micro_batch")[0]
    assert distance(whole, broken) > 1e-3, "the setting that says it breaks this law does"


def test_breaks_names_the_law_and_why() -> None:
    assert made().breaks() == {}
    assert made(whiten="off").breaks() == {}
    assert "whiten = 'micro_batch'" in made(whiten="micro_batch").breaks()["micro_batch"]


def test_only_the_student_moves_and_the_budget_ends_a_visit() -> None:
    one = trainer(8, inner_epochs=3)
    before = copy.deepcopy(one.distiller.teacher.state_dict())
    start = copy.deepcopy(one.distiller.student.state_dict())
    one.fit()
    assert one.updates == 8
    assert all(torch.equal(v, before[n]) for n, v in one.distiller.teacher.state_dict().items())
    assert any(not torch.equal(v, start[n]) for n, v in one.distiller.student.state_dict().items())


def test_a_half_filled_store_survives_a_kill(tmp_path: Path) -> None:
    settings = {"rollout_batches": 2, "inner_epochs": 1}
    whole = trainer(8, **settings)
    whole.fit()
    killed = trainer(8, folder=tmp_path, **settings)
    for _ in range(3):  # two updates, then a store with one batch of two
        killed.one_visit()
    assert killed.distiller.rollouts.size == 8  # type: ignore[union-attr, operator]
    killed.save()
    resumed = trainer(8, folder=tmp_path, **settings)
    resumed.fit()
    assert resumed.visit == whole.visit
    for name, value in whole.distiller.student.state_dict().items():
        assert torch.equal(value, resumed.distiller.student.state_dict()[name]), name


# -------------------------------------------------------------------------------------------- settings
def test_optimizer_settings_are_the_boards_unless_given() -> None:
    (group,) = made().groups().values()
    assert (group.lr, group.betas, group.weight_decay) == (None, None, None)
    (group,) = made(betas=(0.9, 0.95), weight_decay=1e-6).groups().values()
    assert (group.betas, group.weight_decay) == ((0.9, 0.95), 1e-6)
    distiller = made()
    names = [name for name, _ in distiller.groups()["student"].params]
    assert names == ["student." + name for name, _ in distiller.student.named_parameters()]


def test_the_boards_length_holds_unless_the_method_has_its_own() -> None:
    for own, longest in [(None, 3), (5, 5)]:
        distiller, step = made(max_new_tokens=own, whiten_padding=True, inner_epochs=1), Visit()
        step.max_new_tokens = 3
        distiller.train_step(prompts(), step)  # type: ignore[arg-type]
        rows = step.updated[0][1]["rollout"]  # type: ignore[call-overload]
        assert int((rows["length"] - rows["prompt_length"]).max()) == longest
        again = distiller.scored(rows, step)  # type: ignore[arg-type]
        values = gather_targets(again["advantage"], rows).numpy()
        entries = np.concatenate([values, np.zeros(5 * longest - len(values))])
        expected = (values - entries.mean()) / np.sqrt(entries.var() + 1e-8)
        np.testing.assert_allclose(gather_targets(rows["advantage"], rows).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"teacher_mix": 1.5},
        {"gamma": -0.1},
        {"kd_ratio": 2.0},
        {"reward_scaling": 0.0},
        {"reward_clip": 0.0},
        {"clip": 0.0},
        {"inner_epochs": 0},
        {"rollout_batches": 0},
        {"max_new_tokens": 0},
        {"lm_coef": -1.0},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        replace(MiniLLM.Config(), **wrong)
