"""PromptKD against its formulas in plain numpy, from the raw logits of single rows behind the soft prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from method_kit import (
    EOS,
    Array,
    FakeStep,
    V,
    log_softmax,
    make_rows,
    ragged_rows,
    target_log_probs,
    tiny_gpt2,
)
from torch import Tensor

from kdbench.config import TrainingConfig
from kdbench.distiller import Batch
from kdbench.distillers.promptkd import PromptKD, dropout_on
from kdbench.harness import BatchSource, Recorder, Trainer
from kdbench.rollout import rollout

TEXT = {"Suppose you are a student.": [3, 9, 4, 12, 1, 7, 5], "short": [6, 2], "": []}
PAD = EOS


class Visit(FakeStep):
    """A visit whose updates descend by plain gradient steps in the group's parameters alone."""

    def __init__(self, distiller: PromptKD, index: int = 1, visit: int = 0, lr: float = 0.1) -> None:
        super().__init__(visit=visit)
        self.distiller, self.index, self.lr, self.max_new_tokens = distiller, index, lr, 6
        self.values: dict[str, float] = {}
        self.prompts: list[Array] = []

    def update(self, group: str, loss: Callable[[Any, Any], Tensor], batch: Any) -> None:
        self.updated.append((group, batch))
        self.prompts.append(vectors(self.distiller))
        self.distiller.zero_grad()
        value = loss(batch, self)
        value.backward()
        self.values[group] = value.item()
        with torch.no_grad():
            for _, param in self.distiller.groups()[group].params:
                if param.grad is not None:
                    param -= self.lr * param.grad


def made(teacher: Any = None, **settings: Any) -> PromptKD:
    teacher = teacher or tiny_gpt2(2, width=16, layers=2)
    teacher.kdbench_encode = lambda text: TEXT[text]
    teacher.kdbench_pad = PAD
    return PromptKD(PromptKD.Config(**{"max_new_tokens": 6, **settings}), tiny_gpt2(1), teacher)


def prompts() -> Batch:
    return ragged_rows().replace(row=torch.arange(5))


def vectors(distiller: PromptKD) -> Array:
    return distiller.prompt.vectors.detach().numpy().copy()


def prompted_log_probs(teacher: Any, soft: Array, batch: Batch) -> Array:
    """log p_P [N, V]: rows one at a time, [P; text] at positions 0, 1, ..."""
    logits = []
    for ids, start, stop in zip(batch["input_ids"], batch["prompt_length"], batch["length"], strict=True):
        with torch.no_grad():
            text = teacher.transformer.wte.weight[ids[:stop]]
            whole = torch.cat([torch.tensor(soft), text])[None]
            out = teacher(inputs_embeds=whole).logits[0, len(soft) :]
        logits.append(out[int(start) - 1 : int(stop) - 1].numpy())
    return log_softmax(np.concatenate(logits))


def kl(a: Array, b: Array) -> float:
    """Mean over positions of KL(a || b)."""
    return float((np.exp(a) * (a - b)).sum(-1).mean())


def oracle(distiller: PromptKD, batch: Batch, soft: Array | None = None) -> dict[str, float]:
    """Every KL between student q, teacher p and prompted teacher P that the method can use."""
    q, _ = target_log_probs(distiller.student, batch)
    p, _ = target_log_probs(distiller.teacher, batch)
    P = prompted_log_probs(distiller.teacher, vectors(distiller) if soft is None else soft, batch)
    return {"P||q": kl(P, q), "q||P": kl(q, P), "P||p": kl(P, p), "p||P": kl(p, P)}


# ---------------------------------------------------------------------------------------- the formulas
@pytest.mark.parametrize("kd", ["prompted_first", "fixed_first"])
@pytest.mark.parametrize("reg", ["prompted_first", "fixed_first"])
@pytest.mark.parametrize(("index", "base"), [(1, 1.0), (4, 1.0), (4, 0.3), (10, 1.0)])
def test_prompt_loss_is_that_of_the_specification(kd: str, reg: str, index: int, base: float) -> None:
    distiller = made(kd_direction=kd, reg_direction=reg, base_coef=base)
    step, batch = Visit(distiller, index), ragged_rows()
    terms = oracle(distiller, batch)
    assert min(abs(terms[a] - terms[b]) for a in terms for b in terms if a != b) > 1e-3, "two are alike"
    expected_kd = terms["P||q"] if kd == "prompted_first" else terms["q||P"]
    expected_reg = terms["P||p"] if reg == "prompted_first" else terms["p||P"]
    found = distiller.prompt_loss(batch, step)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(expected_kd + base * (1 - index / 10) * expected_reg, rel=1e-12)
    assert step.terms["prompt_kd"] == pytest.approx(expected_kd, rel=1e-12)
    assert step.terms.get("prompt_reg", expected_reg) == pytest.approx(expected_reg, rel=1e-12)


def test_student_loss_is_that_of_the_specification() -> None:
    batch = ragged_rows()
    for settings, name in [({}, "q||P"), ({"divergence": "forward_kl"}, "P||q")]:
        distiller = made(**settings)
        found = distiller.student_loss(batch, Visit(distiller))  # type: ignore[arg-type]
        assert found.item() == pytest.approx(oracle(distiller, batch)[name], rel=1e-12)
    values = [
        made(**settings).student_loss(batch, Visit(made())).item()  # type: ignore[arg-type]
        for settings in ({"divergence": "skew_reverse_kl"}, {"divergence": "skew_reverse_kl", "alpha": 0.5})
    ]
    assert values[0] > values[1] > 0


def test_regularisation_decays_linearly_with_the_update() -> None:
    distiller = made(base_coef=0.8)
    found = [distiller.reg_coefficient(Visit(distiller, g)) for g in range(1, 11)]  # type: ignore[arg-type]
    assert found == pytest.approx([0.8 * (1 - g / 10) for g in range(1, 11)])
    assert found[-1] == 0.0
    constant = made(base_coef=0.8, reg_schedule="constant")
    found = [constant.reg_coefficient(Visit(constant, g)) for g in range(1, 11)]  # type: ignore[arg-type]
    assert found == [0.8] * 10


@pytest.mark.parametrize(("settings", "index"), [({"base_coef": 0.0}, 1), ({}, 10)])
def test_without_weight_there_is_no_regularisation(settings: dict[str, Any], index: int) -> None:
    distiller = made(**settings)
    step = Visit(distiller, index)
    loss = distiller.prompt_loss(ragged_rows(), step)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(oracle(distiller, ragged_rows())["P||q"], rel=1e-12)
    assert "prompt_reg" not in step.terms


def slopes(value: Callable[[], Tensor], param: Tensor, entries: list[int]) -> list[float]:
    """Central differences of `value` in some entries of one parameter."""
    flat, found = param.data.view(-1), []
    for entry in entries:
        kept, values = flat[entry].item(), []
        for sign in (1, -1):
            flat[entry] = kept + sign * 1e-6
            values.append(value().item())
        flat[entry] = kept
        found.append((values[0] - values[1]) / 2e-6)
    return found


@pytest.mark.parametrize("kd", ["prompted_first", "fixed_first"])
@pytest.mark.parametrize("reg", ["prompted_first", "fixed_first"])
def test_the_prompts_gradient_is_the_slope_and_reaches_nothing_else(kd: str, reg: str) -> None:
    distiller = made(kd_direction=kd, reg_direction=reg)
    step, batch = Visit(distiller, 3), ragged_rows()
    distiller.prompt_loss(batch, step).backward()  # type: ignore[arg-type]
    grad = distiller.prompt.vectors.grad
    assert grad is not None
    assert bool((grad.norm(dim=1) > 1e-6).all())
    entries = [0, 17, 60, 111]
    expected = slopes(lambda: distiller.prompt_loss(batch, step), distiller.prompt.vectors, entries)  # type: ignore[arg-type]
    assert grad.view(-1)[entries].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert all(p.grad is None for p in distiller.student.parameters())
    assert all(p.grad is None for p in distiller.teacher.parameters())


def test_the_students_gradient_is_the_slope_and_reaches_nothing_else() -> None:
    distiller = made()
    step, batch = Visit(distiller), ragged_rows()
    distiller.student_loss(batch, step).backward()  # type: ignore[arg-type]
    param = dict(distiller.student.named_parameters())["transformer.h.0.attn.c_attn.weight"]
    assert param.grad is not None
    entries = [0, 17, 60, 111]
    expected = slopes(lambda: distiller.student_loss(batch, step), param, entries)  # type: ignore[arg-type]
    assert param.grad.view(-1)[entries].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert all(p.grad is not None for p in distiller.student.parameters())
    assert distiller.prompt.vectors.grad is None
    assert all(p.grad is None for p in distiller.teacher.parameters())


# --------------------------------------------------------------------------------------------- a visit
def test_a_visit_samples_once_then_moves_the_prompt_then_the_student() -> None:
    distiller = made()
    step = Visit(distiller, index=4)
    sampled = rollout(distiller.student, prompts(), step, 6)  # type: ignore[arg-type]
    before, old = vectors(distiller), copy.deepcopy(distiller.student.state_dict())
    expected = oracle(distiller, sampled)
    distiller.train_step(prompts(), step)  # type: ignore[arg-type]
    assert [group for group, _ in step.updated] == ["prompt", "student"]
    (_, first), (_, second) = step.updated
    assert torch.equal(first["input_ids"], sampled["input_ids"])
    assert torch.equal(second["input_ids"], sampled["input_ids"])
    assert torch.equal(second["length"], sampled["length"])
    assert step.values["prompt"] == pytest.approx(expected["P||q"] + 0.6 * expected["P||p"], rel=1e-10)
    after = step.prompts[1]
    assert np.abs(after - before).max() > 1e-4, "the prompt moved before the student's turn"
    moved = copy.deepcopy(distiller.student)
    distiller.student.load_state_dict(old)
    seen = oracle(distiller, sampled, after)["q||P"]
    assert abs(seen - oracle(distiller, sampled, before)["q||P"]) > 1e-6
    assert step.values["student"] == pytest.approx(seen, rel=1e-10), "the student sees the new prompt"
    assert any(
        not torch.equal(a, b) for a, b in zip(moved.parameters(), distiller.student.parameters(), strict=True)
    )
    assert np.array_equal(vectors(distiller), after), "the student's update leaves the prompt"


def test_the_response_is_the_students_and_no_token_is_forced() -> None:
    distiller = made(max_new_tokens=2)
    step = Visit(distiller)
    distiller.train_step(prompts(), step)  # type: ignore[arg-type]
    batch = step.updated[0][1]
    lengths = batch["length"] - batch["prompt_length"]
    unfinished = ~batch["finished"]
    assert bool(unfinished.any())
    assert lengths[unfinished].tolist() == [2] * int(unfinished.sum())
    last = batch["input_ids"].gather(1, batch["length"][:, None] - 1)[:, 0]
    assert bool((last[unfinished] != EOS).all())
    forced = batch["input_ids"].scatter(
        1, batch["length"][:, None] - 1, EOS
    )  # what the published code has there
    for loss in (distiller.prompt_loss, distiller.student_loss):
        value = loss(batch, step)  # type: ignore[arg-type]
        other = loss(batch.replace(input_ids=forced), step)  # type: ignore[arg-type]
        assert other.item() == pytest.approx(value.item(), rel=1e-12)


# ------------------------------------------------------------------------------------- the soft prompt
@pytest.mark.parametrize("length", [1, 5, 7, 10])
def test_prompt_starts_from_text_padding_or_noise(length: int) -> None:
    table = tiny_gpt2(2, width=16, layers=2).transformer.wte.weight.detach().numpy()
    text = TEXT["Suppose you are a student."]
    assert np.array_equal(vectors(made(prompt_length=length)), table[(text * 2)[:length]])
    short = made(prompt_length=length, prompt_text="short")
    assert np.array_equal(vectors(short), table[([6, 2] * 5)[:length]])
    assert np.array_equal(vectors(made(prompt_length=length, prompt_init="pad")), table[[PAD] * length])
    torch.manual_seed(4)
    teacher = tiny_gpt2(2, width=16, layers=2)
    torch.manual_seed(4)
    noise = PromptKD.Config(prompt_length=length, prompt_init="random")
    first = vectors(PromptKD(noise, tiny_gpt2(1), teacher))
    assert first.shape == (length, 16)
    assert np.abs(first).max() > 0.5


def test_random_start_follows_torchs_seed() -> None:
    student, teacher = tiny_gpt2(1), tiny_gpt2(2)

    def start(seed: int) -> Array:
        torch.manual_seed(seed)
        return vectors(PromptKD(PromptKD.Config(prompt_init="random"), student, teacher))

    assert np.array_equal(start(1), start(1))
    assert not np.array_equal(start(1), start(2))


def test_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="needs text"):
        made(prompt_text="")


def test_prompt_is_registered_once_and_the_teacher_in_no_group() -> None:
    distiller = made()
    saved = distiller.state_dict()
    assert [name for name in saved if "prompt" in name] == ["prompt.vectors"]
    assert all(name.split(".")[0] in ("student", "teacher", "prompt") for name in saved)
    groups = distiller.groups()
    names = {group: [name for name, _ in made.params] for group, made in groups.items()}
    assert names["prompt"] == ["prompt.vectors"]
    assert names["student"] == ["student." + name for name, _ in distiller.student.named_parameters()]
    trainable = [name for name, p in distiller.named_parameters() if p.requires_grad]
    assert sorted(names["prompt"] + names["student"]) == sorted(trainable)
    assert distiller.prompted.prompt is distiller.prompt
    assert distiller.prompted.model is distiller.teacher
    assert distiller.predictor() is distiller.student


def test_the_prompts_optimizer_is_the_students_unless_given() -> None:
    group = made().groups()["prompt"]
    assert (group.lr, group.weight_decay, group.schedule, group.warmup_steps) == (None, None, None, None)
    groups = made(prompt_lr=0.03, prompt_weight_decay=0.0).groups()
    assert (groups["prompt"].lr, groups["prompt"].weight_decay) == (0.03, 0.0)
    assert (groups["student"].lr, groups["student"].weight_decay) == (None, None)


# ------------------------------------------------------------------------------------- teacher dropout
def test_teacher_dropout_is_on_only_while_the_prompt_trains() -> None:
    distiller = made(teacher_dropout=True)
    batch = ragged_rows()

    def value(loss: Callable[[Any, Any], Tensor]) -> float:
        return loss(batch, Visit(distiller, 10)).item()

    torch.manual_seed(0)
    assert value(distiller.prompt_loss) != value(distiller.prompt_loss), "its masks are random"
    assert value(distiller.student_loss) == value(distiller.student_loss)
    assert not any(module.training for module in distiller.teacher.modules())
    off = made()
    assert off.prompt_loss(batch, Visit(off, 10)).item() == pytest.approx(oracle(off, batch)["P||q"])  # type: ignore[arg-type]
    assert off.breaks() == {}
    assert set(distiller.breaks()) == {"micro_batch", "frozen_eval"}
    assert all("teacher_dropout" in reason for reason in distiller.breaks().values())


def test_bare_teacher_has_no_dropout_in_the_regularisation() -> None:
    """Only the prompted forward has masks: L_reg's fixed distribution is the teacher in eval mode."""
    distiller = made(teacher_dropout=True)
    modes: list[tuple[bool, bool]] = []
    inner: Any = distiller.teacher
    rows = ragged_rows()
    text = int((rows["length"] - 1).sum())

    def seen(module: Any, inputs: Any) -> None:
        modes.append((inner.training, inputs[0].shape[1] > text))

    distiller.prompt_loss(rows, Visit(distiller))  # type: ignore[arg-type]
    inner.transformer.h[0].register_forward_pre_hook(seen)
    distiller.prompt_loss(ragged_rows(), Visit(distiller))  # type: ignore[arg-type]
    assert modes == [(True, True), (False, False)]


def test_eval_mode_comes_back_after_an_error() -> None:
    model = tiny_gpt2(1)

    def failing() -> None:
        with dropout_on(model, True):
            assert model.training
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError):
        failing()
    assert not model.training


# ------------------------------------------------------------------------------------ with the harness
def trainer(micro: int = 8, steps: int = 4, recorder: Recorder | None = None, **settings: Any) -> Trainer:
    training = TrainingConfig(
        optimizer_steps=steps, batch_size=8, lr=1e-2, micro_batch=micro, rollout_batch=3, checkpoint_every=0
    )
    rows = make_rows([[1 + i % (V - 1), 2 + i % 7][: 1 + i % 2] for i in range(16)], [[EOS]] * 16)
    return Trainer(made(**settings), BatchSource(rows), training, 1, recorder=recorder)


def gradients_of(micro: int, **settings: Any) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    trainer(micro, recorder=Recorder(gradient=found.__setitem__), **settings).one_visit()
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return float((apart / sum(float(g.square().sum()) for g in one.values())) ** 0.5)


@pytest.mark.parametrize("micro", [1, 3])
def test_an_update_of_either_group_does_not_depend_on_its_cut(micro: int) -> None:
    whole, cut = gradients_of(8), gradients_of(micro)
    assert set(whole) == {"prompt", "student"}
    assert distance(whole["prompt"], cut["prompt"]) < 1e-12
    assert distance(whole["student"], cut["student"]) < 1e-10  # after Adam's division in the prompt's update
    broken = gradients_of(micro, teacher_dropout=True), gradients_of(8, teacher_dropout=True)
    assert distance(broken[0]["prompt"], broken[1]["prompt"]) > 1e-3, "the law that it says it breaks"


@pytest.mark.parametrize(("micro", "passes"), [(8, 1), (4, 4)])
def test_both_updates_share_one_pass_of_the_student(micro: int, passes: int) -> None:
    """But not where they are cut: then each piece is run in both. Sampling reads the prompts besides."""
    run, seen = trainer(micro), 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal seen
        seen += inputs[0].shape[1] > 6  # more tokens than three prompts have

    run.one_visit()  # may try the models
    run.distiller.student.transformer.h[0].register_forward_pre_hook(count)  # type: ignore[union-attr]
    run.one_visit()
    assert seen == passes


def test_both_groups_move_and_the_teacher_does_not() -> None:
    one = trainer()
    distiller: Any = one.distiller
    teacher = copy.deepcopy(distiller.teacher.state_dict())
    soft, student = vectors(distiller), copy.deepcopy(distiller.student.state_dict())
    one.fit()
    assert one.updates == 4
    assert np.abs(vectors(distiller) - soft).max() > 1e-3
    assert any(not torch.equal(v, student[n]) for n, v in distiller.student.state_dict().items())
    assert all(torch.equal(v, teacher[n]) for n, v in distiller.teacher.state_dict().items())


def test_a_fixed_prompt_and_a_faster_one() -> None:
    def distance_moved(**settings: Any) -> float:
        one = trainer(**settings)
        distiller: Any = one.distiller
        before = vectors(distiller)
        one.fit()
        return float(np.abs(vectors(distiller) - before).max())

    assert distance_moved(prompt_lr=0.0) == 0.0
    assert distance_moved(prompt_lr=0.05) > 2 * distance_moved()


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_length": 5},
        {"prompt_init": "pad"},
        {"prompt_init": "random"},
        {"prompt_text": "short"},
        {"prompt_lr": 0.05},
        {"base_coef": 0.0},
        {"reg_schedule": "constant"},
        {"kd_direction": "fixed_first"},
        {"reg_direction": "fixed_first"},
        {"divergence": "forward_kl"},
        {"teacher_dropout": True},
        {"max_new_tokens": 3},
    ],
)
def test_each_setting_changes_the_student(changes: dict[str, Any]) -> None:
    def trained(**settings: Any) -> list[Tensor]:
        one = trainer(**settings)
        one.fit()
        return [p.detach() for p in one.distiller.student.parameters()]

    assert any(not torch.equal(a, b) for a, b in zip(trained(), trained(**changes), strict=True))


def test_regularisation_keeps_the_prompted_teacher_near_the_teacher() -> None:
    def strayed(**settings: Any) -> float:
        one = trainer(steps=25, reg_schedule="constant", **settings)
        one.fit()
        distiller: Any = one.distiller
        return oracle(distiller, ragged_rows())["P||p"]

    assert strayed(base_coef=5.0) < strayed(base_coef=0.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_length": 0}, "prompt_length = 0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"base_coef": -1.0}, "base_coef = -1.0"),
        ({"divergence": "reverse_k"}, "Did you mean 'reverse_kl'"),
        ({"alpha": 0.1}, "no setting of reverse_kl 'alpha'"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptKD.Config(**wrong)
