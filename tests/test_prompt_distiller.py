"""Prompt-Distiller against its equations in plain numpy, row by row and probe by probe; its identities."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from class_kit import (
    Array,
    ClassStep,
    assert_slope,
    class_rows,
    otherwise_padded,
    row_logits,
    row_states,
    tiny_bert,
    tiny_roberta,
    without_head,
)
from method_kit import log_softmax
from probe_kit import inner_states, probe_probabilities
from torch import Tensor, nn

from kdbench.classify import mlm_head
from kdbench.config import TrainingConfig
from kdbench.distiller import Batch, Distiller
from kdbench.distillers.prompt_distiller import PromptDistiller, contrastive, draw_negatives
from kdbench.distillers.prompt_kd import PromptKD
from kdbench.distillers.student_pt import StudentPT
from kdbench.errors import UserError
from kdbench.harness import BatchSource, Recorder, SourceData, Trainer
from kdbench.streams import stream_seed, uniform

ROLES = ("teacher", "pretrained")
Sets = Mapping[str, Batch]
FORMS = ["literal", "log", "infonce"]


def sets(classes: int = 2, segments: bool = False) -> dict[str, Batch]:
    """X of 9 rows, D_dev of 6, Xu of 10: texts of X and Xu come in other orders."""

    def texts(count: int, first_id: int = 100, labelled: bool = True) -> Batch:
        return class_rows("masked_lm", classes, ROLES, count, first_id, labelled, segments=segments)

    return {
        "train": texts(9),
        "dev": texts(18, first_id=300).rows(slice(12, 18)),
        "unlabeled": texts(13, first_id=500, labelled=False).rows(list(range(12, 2, -1))),
    }


def made(classes: int = 2, layers: int = 3, student: Any = None, **settings: Any) -> PromptDistiller:
    return PromptDistiller(
        PromptDistiller.Config(**{"probe_steps": 3, **settings}),
        student or tiny_bert(1, "masked_lm", classes, layers=layers),
        tiny_roberta(7, "masked_lm", classes, layers=4),
        tiny_roberta(8, "masked_lm", classes, layers=4),
    )


def trainer_of(distiller: Distiller, data: Sets, **changes: Any) -> Trainer:
    """A trainer whose method has prepared."""
    recorder, folder = changes.pop("recorder", None), changes.pop("folder", None)
    settings = {"optimizer_steps": 6, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 0, "weight_decay": 0.0}
    trainer = Trainer(
        distiller,
        BatchSource(data["train"]),
        TrainingConfig(**{**settings, **changes}),
        3,
        extras={"unlabeled": BatchSource(data["unlabeled"])} if "unlabeled" in data else {},
        recorder=recorder,
        folder=folder,
    )
    sources = {name: BatchSource(rows) for name, rows in data.items()}
    rows = trainer.prepare(SourceData(sources, 4, torch.device("cpu"))) or {}
    trainer.source = BatchSource(rows["train"]) if "train" in rows else trainer.source
    trainer.extras |= {name: BatchSource(batch) for name, batch in rows.items() if name != "train"}
    return trainer


def rows_of(trainer: Trainer) -> dict[str, Batch]:
    """The prepared rows, all of them."""
    sources = {"labeled": trainer.source, **trainer.extras}
    return {name: source.batch(range(len(source))) for name, source in sources.items()}


def step_on(
    distiller: PromptDistiller, rows: Sets, visit: int = 3
) -> tuple[float, dict[str, float], Any, ClassStep]:
    """One step on all rows: the loss, its logged terms, what the update was given, and the step."""
    step = ClassStep(visit=visit, extras={k: v for k, v in rows.items() if k != "labeled"})
    distiller.train_step(rows["labeled"], step)  # type: ignore[arg-type]
    (_, parts), terms = step.updated[0], dict(step.terms)
    loss = distiller.student_loss(parts, step).item()  # type: ignore[arg-type]
    distiller.zero_grad()
    return loss, terms, parts, step


# -------------------------------------------------------------------------------------- the oracle
def read_by_probes(distiller: PromptDistiller, role: str, batch: Batch) -> Array:
    """Each probe's distribution, [B, L - 1, N], of a role on its own view of the rows."""
    return probe_probabilities(distiller.bank(role), getattr(distiller, role), batch.of(role))


def match(t: Array, s: Array) -> float:
    """The exponent of eq. 5: the sum over all pairs of probes, over N_T N_S."""
    return sum(float(a @ b) for a in t for b in s) / (len(t) * len(s))


def kd_oracle(s: Array, t: Array, a: float, form: str) -> float:
    if form == "literal":
        return float(-(np.exp(log_softmax(t)) / a * log_softmax(s)).sum())
    p, q = log_softmax(t / a), log_softmax(s / a)
    return float((a * a if form == "hinton_t2" else 1) * (np.exp(p) * (p - q)).sum())


def cpd_oracle(own: float, others: list[float], form: str) -> float:
    f, total = np.exp(own), sum(np.exp(g) for g in others)
    return float(
        {"literal": -f / total, "log": -np.log(f / total), "infonce": -np.log(f / (f + total))}[form]
    )


def drawn(
    seed: int, visit: int, name: str, role: str, ids: list[int], labels: list[int], count: int
) -> list[list[int]]:
    """The pool rows of each anchor's negatives; the whole pool is the anchors here."""
    out = []
    for i, label in zip(ids, labels, strict=True):
        stream = stream_seed(seed, f"negatives/{name}/{role}")
        keyed = sorted(
            (float(uniform(stream, torch.tensor([i]), visit, m)), place)
            for place, (m, other) in enumerate(zip(ids, labels, strict=True))
            if other != label
        )
        out.append([place for _, place in (keyed[:count] if count else keyed)])
    return out


def oracle(distiller: PromptDistiller, data: Sets, visit: int = 3, seed: int = 7) -> dict[str, float]:
    """The weighted terms of a step on all of X and all of Xu."""
    cfg, found = distiller.cfg, {}
    labels = data["train"]["class_label"].numpy()
    z_s = row_logits(distiller.student, data["train"])
    found["mlm"] = float(np.mean([-log_softmax(z)[y] for z, y in zip(z_s, labels, strict=True)]))
    for name, split, roles in (
        ("labeled", "train", ("teacher",)),
        ("unlabeled", "unlabeled", distiller.unlabeled_teachers),
    ):
        batch = data[split]
        z_s = row_logits(distiller.student, batch)
        kd, cpd = [], []
        for role in roles:
            z_t = row_logits(getattr(distiller, role), batch.of(role))
            kd += [kd_oracle(s, t, cfg.alpha, cfg.kd_form) for s, t in zip(z_s, z_t, strict=True)]
            own, student = (read_by_probes(distiller, one, batch) for one in (role, "student"))
            told = labels if name == "labeled" else z_t.argmax(-1)
            ids = batch["example_id"].tolist()
            for i, negative in enumerate(drawn(seed, visit, name, role, ids, told.tolist(), cfg.negatives)):
                pairs = [(m, m if cfg.cpd_pairs == "same_sample" else i) for m in negative]
                others = [match(own[m], student[s]) for m, s in pairs]
                cpd.append(cpd_oracle(match(own[i], student[i]), others, cfg.cpd_form))
        found[f"kd_{name}"] = cfg.lam1 * float(np.mean(kd))
        found[f"cpd_{name}"] = cfg.lam2 * float(np.mean(cpd))
    return found


VARIANTS: list[dict[str, Any]] = [
    {},
    {"kd_form": "literal", "cpd_form": "literal", "cpd_pairs": "same_sample"},
    {"kd_form": "hinton", "cpd_form": "log", "alpha": 3.0},
    {"cpd_form": "infonce", "cpd_pairs": "same_sample", "negatives": 0},
    {"cpd_form": "literal", "negatives": 2},
    {"negatives": 0, "lam1": 0.7, "lam2": 0.4},
    {"unlabeled_teacher": "tuned"},
    {"unlabeled_teacher": "both", "negatives": 3},
    {"unlabeled_teacher": "both", "cpd_pairs": "same_sample", "negatives": 2},
    {"pretrained_probes": "tuned"},
    {"probe": "linear"},
    {"probe": "frozen_head", "negatives": 3},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize(("classes", "segments"), [(2, False), (3, False), (2, True)])
def test_every_term_is_that_of_its_equation(classes: int, segments: bool, settings: dict[str, Any]) -> None:
    distiller, data = made(classes, **{"negatives": 3, **settings}), sets(classes, segments)
    rows = rows_of(trainer_of(distiller, data))
    loss, terms, _, _ = step_on(distiller, rows)
    expected = oracle(distiller, data)
    for name, value in expected.items():
        assert terms.pop(name) == pytest.approx(value, rel=1e-9), name
    assert loss == pytest.approx(sum(expected.values()), rel=1e-9)
    assert terms == {"skipped_labeled": 0, "skipped_unlabeled": 0}


@pytest.mark.parametrize("own_head", [True, False])
def test_whole_vocabulary_in_the_first_term_alone(own_head: bool) -> None:
    def student() -> Any:
        model = tiny_bert(1, "masked_lm", 3, layers=3)
        return model if own_head else without_head(model)

    for settings in ({}, {"lam2": 0.0}):
        one, other = (
            made(3, student=student(), pt_loss=name, **settings) for name in ("label_words", "full_vocab")
        )
        assert (mlm_head(other.student) is not None) == own_head
        data = sets(3)
        _, terms, _, _ = step_on(one, rows_of(trainer_of(one, data)))
        _, full, _, _ = step_on(other, rows_of(trainer_of(other, data)))
        x = data["train"]
        every = torch.arange(other.student.config.vocab_size).repeat(9, 1)  # type: ignore[union-attr, arg-type]
        whole = log_softmax(row_logits(other.student, x.replace(verbalizer_ids=every)))
        words = x["verbalizer_ids"].gather(1, x["class_label"][:, None])[:, 0].numpy()
        assert full.pop("mlm") == pytest.approx(-whole[np.arange(9), words].mean(), rel=1e-11)
        terms.pop("mlm")
        assert full == pytest.approx(terms, rel=1e-12)


def test_gradient_is_the_slope() -> None:
    for settings in ({}, {"cpd_pairs": "same_sample", "cpd_form": "literal"}):
        distiller = made(lam2=3.0, **settings)
        _, _, parts, _ = step_on(distiller, rows_of(trainer_of(distiller, sets())))
        for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight"):
            assert_slope(distiller, distiller.student_loss, parts, f"student.{name}")


# ------------------------------------------------------------------------- worked values and bounds
def g(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


WORKED = [("literal", -0.635116), ("log", 0.453947), ("infonce", 0.945661)]


@pytest.mark.parametrize(("form", "expected"), WORKED)
def test_matching_score_of_two_banks_is_the_sum_over_pairs_of_probes(form: Any, expected: float) -> None:
    """Eq. 5 through the method, with banks that answer given distributions for any text."""
    t, s = np.array([[0.9, 0.1], [0.7, 0.3]]), np.array([[0.6, 0.4], [0.8, 0.2]])
    assert np.exp(match(t, s)) == pytest.approx(1.858928, abs=5e-7)
    distiller = made(lam1=0.0, lam2=1.0, cpd_form=form, unlabeled=False)
    for role, told in (("teacher", t), ("student", s)):
        distiller.bank(role).probabilities = (  # type: ignore[method-assign]
            lambda states, told=told: torch.from_numpy(told).expand(len(states), 2, 2)
        )
    rows = rows_of(trainer_of(distiller, sets()))["labeled"]
    found = (
        distiller.bank("teacher").mean(torch.zeros(1, 3, 12))
        @ distiller.bank("student").mean(torch.zeros(1, 2, 8)).mT
    )
    assert found.item() == pytest.approx(match(t, s), rel=1e-14)
    part = rows.rows([0]).replace(
        teacher_negatives=g([[[0.1, 0.9], [0.3, 0.7]]]), teacher_valid=torch.tensor([[True, True]])
    )
    step = ClassStep()
    distiller.student_loss({"labeled": part}, step)  # type: ignore[arg-type]
    assert step.terms["cpd_labeled"] == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("form", "expected"), WORKED)
def test_worked_value_of_the_contrast(form: Any, expected: float) -> None:
    student = np.array([0.7, 0.3])
    positive = float(np.array([0.8, 0.2]) @ student)
    negative = [float(np.array(p) @ student) for p in ([0.1, 0.9], [0.3, 0.7])]
    assert np.exp([positive, *negative]) == pytest.approx([1.858928, 1.404948, 1.521962], abs=5e-7)
    found = contrastive(g([positive, *negative])[None], torch.tensor([[True, True]]), form)
    assert found.item() == pytest.approx(expected, abs=5e-7)
    padded = contrastive(g([positive, *negative, 0.9])[None], torch.tensor([[True, True, False]]), form)
    assert padded.item() == pytest.approx(found.item(), rel=1e-15)


def test_bounds_of_the_contrast_with_four_negatives() -> None:
    def value(form: Any, positive: float, negative: float) -> float:
        valid = torch.ones(1, 4, dtype=torch.bool)
        return contrastive(g([positive] + [negative] * 4)[None], valid, form).item()

    assert value("infonce", 1, 0) == pytest.approx(0.904832, abs=5e-7)
    assert value("infonce", 0, 1) == pytest.approx(2.474278, abs=5e-7)
    assert value("infonce", 0.4, 0.4) == pytest.approx(np.log(5), abs=1e-12)
    assert value("literal", 1, 0) == pytest.approx(-0.679570, abs=5e-7)
    assert value("literal", 0, 1) == pytest.approx(-0.091970, abs=5e-7)
    assert value("log", 0.3, 0.3) == pytest.approx(np.log(4), abs=1e-12)


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_literal_loss_at_constant_agreement_is_blind_to_it(agreement: float, count: int) -> None:
    valid = torch.ones(1, count, dtype=torch.bool)
    found = contrastive(g([agreement] * (1 + count))[None], valid, "literal")
    assert found.item() == pytest.approx(-1 / count, rel=1e-14)


def test_literal_same_sample_loss_of_a_perfect_student_is_that_of_a_uniform_one() -> None:
    """The same through the method: T and S agree on every text to the same degree."""
    settings = {"cpd_form": "literal", "cpd_pairs": "same_sample", "negatives": 3}
    distiller = made(**settings)
    rows = rows_of(trainer_of(distiller, sets()))
    for one_hot in (True, False):
        with torch.no_grad():
            for bank in (distiller.bank("student"),):
                bank.rows.zero_()  # a distribution that no text changes: one-hot, or uniform
                bank.bias.zero_()
                bank.bias[:, 0] = 60.0 if one_hot else 0.0
        flat = torch.tensor([1.0, 0.0] if one_hot else [0.5, 0.5], dtype=torch.float64)
        for store in (distiller.labeled_pool, distiller.unlabeled_pool):
            pool = store.batches()[0]
            fields = {name: flat.expand(pool.size, 2) for name in pool if name.endswith("mean_probe")}
            store.clear()
            store.add(pool.replace(**fields))
        told = {
            name: part.replace(**{n: flat.expand(part.size, 2) for n in part if n.endswith("mean_probe")})
            for name, part in rows.items()
        }
        _, terms, _, _ = step_on(distiller, told)
        assert terms["cpd_labeled"] == pytest.approx(-0.2 / 3, rel=1e-12)
        assert terms["cpd_unlabeled"] == pytest.approx(-0.2 / 3, rel=1e-12)


def test_one_probe_each_is_their_product_and_a_doubled_bank_the_same() -> None:
    """With two layers each model has one probe; a bank with each probe twice has the same mean."""
    distiller, x = made(layers=2), sets()["train"]
    trainer_of(distiller, sets())
    bank = distiller.bank("student")
    assert bank.layers == 1
    states = torch.tensor(inner_states(distiller.student, x))
    assert torch.equal(bank.mean(states), bank.probabilities(states)[:, 0])
    twice = copy.deepcopy(bank)
    twice.layers = 2
    for name, param in list(twice.named_parameters()):
        setattr(twice, name, nn.Parameter(param.detach().repeat_interleave(2, dim=0)))
    torch.testing.assert_close(twice.mean(states.repeat(1, 2, 1)), bank.mean(states), rtol=0, atol=1e-15)


# --------------------------------------------------------------------------------------- identities
def student_after(distiller: Distiller, data: Sets, **changes: Any) -> list[Tensor]:
    """Parameters after a training with the student's dropout."""
    trainer = trainer_of(distiller, data, student_dropout=True, **changes)
    trainer.fit()
    return [p.detach().clone() for p in distiller.student.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("pt_loss", ["label_words", "full_vocab"])
def test_without_weights_it_is_prompt_tuning_bit_by_bit(pt_loss: Any, segments: bool) -> None:
    data = sets(segments=segments)
    plain = StudentPT(StudentPT.Config(pt_loss), tiny_bert(1, "masked_lm", layers=3))
    expected = student_after(plain, data)
    assert same(student_after(made(lam1=0.0, lam2=0.0, pt_loss=pt_loss), data), expected)
    assert not same(student_after(made(lam1=0.0, lam2=0.1, pt_loss=pt_loss), data), expected)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("form", ["literal", "hinton_t2"])
def test_without_contrast_and_unlabelled_texts_it_is_prompt_kd_bit_by_bit(form: Any, segments: bool) -> None:
    data = sets(segments=segments)
    student, teacher = tiny_bert(1, "masked_lm", layers=3), tiny_roberta(7, "masked_lm", layers=4)
    expected = student_after(PromptKD(PromptKD.Config(kd_form=form), student, teacher), data)
    assert same(student_after(made(lam2=0.0, unlabeled=False, kd_form=form), data), expected)
    assert same(student_after(made(contrast=False, unlabeled=False, kd_form=form), data), expected)
    assert not same(student_after(made(lam2=0.0, kd_form=form), data), expected)


def test_without_the_contrastive_weight_the_probes_do_nothing() -> None:
    assert same(student_after(made(lam2=0.0), sets()), student_after(made(contrast=False), sets()))


def test_the_order_of_the_classes_does_not_matter() -> None:
    order = [2, 0, 1]
    place = torch.tensor(order).argsort()

    def permuted(batch: Batch) -> Batch:
        words = {name: batch[name][:, order] for name in batch if name.endswith("verbalizer_ids")}
        labels = batch["class_label"]
        return batch.replace(class_label=torch.where(labels < 0, labels, place[labels]), **words)

    def losses(data: Sets, **settings: Any) -> dict[str, float]:
        distiller = made(3, negatives=3, **settings)
        return step_on(distiller, rows_of(trainer_of(distiller, data)))[1]

    for settings in ({}, {"probe": "linear"}, {"cpd_pairs": "same_sample", "cpd_form": "literal"}):
        before = losses(sets(3), **settings)
        after = losses({name: permuted(batch) for name, batch in sets(3).items()}, **settings)
        assert after == pytest.approx(before, rel=1e-9)


def test_the_students_vocabulary_may_be_permuted() -> None:
    order = torch.randperm(25, generator=torch.Generator().manual_seed(1))
    place = order.argsort()
    renamed = tiny_bert(1, "masked_lm", layers=3)
    with torch.no_grad():
        embeddings, bias = renamed.get_input_embeddings().weight, renamed.cls.predictions.bias
        embeddings.copy_(embeddings[order].clone())
        bias.copy_(bias[order].clone())
    renamed.config.pad_token_id = int(place[0])
    data = {
        name: batch.replace(
            input_ids=place[batch["input_ids"]], verbalizer_ids=place[batch["verbalizer_ids"]]
        )
        for name, batch in sets().items()
    }
    one, other = made(), made(student=renamed)
    first = step_on(one, rows_of(trainer_of(one, sets())))[1]
    second = step_on(other, rows_of(trainer_of(other, data)))[1]
    assert second == pytest.approx(first, rel=1e-6)
    assert np.allclose(
        row_logits(other.student, data["train"]), row_logits(one.student, sets()["train"]), atol=1e-12
    )


def test_the_teachers_mask_index_matters_to_its_own_forward_alone() -> None:
    """Words before both teachers' texts change what they say, which is all that reaches the loss."""

    def longer(batch: Batch) -> Batch:
        fields = {}
        for role in ROLES:
            ids = batch[f"{role}.input_ids"]
            fields[f"{role}.input_ids"] = torch.cat(
                [ids[:, :1], ids.new_full((len(ids), 2), 9), ids[:, 1:]], 1
            )
            fields[f"{role}.length"] = batch[f"{role}.length"] + 2
            fields[f"{role}.mask_index"] = batch[f"{role}.mask_index"] + 2
        return batch.replace(**fields)

    data = {name: longer(batch) for name, batch in sets().items()}
    distiller = made()
    _, terms, _, _ = step_on(distiller, rows_of(trainer_of(distiller, data)))
    expected = oracle(distiller, data)
    assert {name: terms[name] for name in expected} == pytest.approx(expected, rel=1e-9)


# --------------------------------------------------------------------------------------- preparation
def test_rows_hold_the_students_fields_and_what_was_cached() -> None:
    distiller, data = made(), sets()
    rows = rows_of(trainer_of(distiller, data))
    plain = {name for name in data["train"] if "." not in name}
    assert set(rows["labeled"]) == plain | {"teacher_logits", "teacher_mean_probe"}
    assert set(rows["unlabeled"]) == plain | {"pretrained_logits", "pretrained_mean_probe"}
    for name, split, role in (("labeled", "train", "teacher"), ("unlabeled", "unlabeled", "pretrained")):
        model, batch = getattr(distiller, role), data[split].of(role)
        assert np.allclose(rows[name][f"{role}_logits"].numpy(), row_logits(model, batch), atol=1e-11)
        mean = probe_probabilities(distiller.bank(role), model, batch).mean(1)
        assert np.allclose(rows[name][f"{role}_mean_probe"].numpy(), mean, atol=1e-11)
        pool = getattr(distiller, f"{name}_pool").batches()
        assert len(pool) == 1
        assert all(torch.equal(pool[0][field], value) for field, value in rows[name].items())


def test_padding_of_the_texts_changes_no_cache() -> None:
    one, other = made(), made()
    rows = rows_of(trainer_of(one, sets()))
    wide = rows_of(trainer_of(other, {name: otherwise_padded(batch) for name, batch in sets().items()}))
    for name, part in rows.items():
        for field in part:
            if field != "input_ids":
                torch.testing.assert_close(wide[name][field], part[field], rtol=0, atol=1e-10)


@pytest.mark.parametrize("role", ["teacher", "pretrained", "student"])
def test_probes_are_those_of_a_plain_loop_with_the_best_step_kept(role: str) -> None:
    """Every layer's copy of the head by its own AdamW; the bank keeps the first step with the best mean."""
    steps = 12
    distiller, data = made(probe_steps=steps, probe_lr=0.05, probe_weight_decay=0.3), sets()
    trainer_of(distiller, data, grad_clip=None)
    bank, model = distiller.bank(role), getattr(distiller, role)
    x, dev = data["train"].of(role), data["dev"].of(role)
    states, dev_states = (torch.tensor(inner_states(model, rows)) for rows in (x, dev))
    accuracies, weights = np.zeros((steps, bank.layers)), []
    for j in range(bank.layers):
        head: Any = copy.deepcopy(mlm_head(model))
        whole = head.predictions if role == "student" else head
        words = x["verbalizer_ids"][0]
        rows, start = whole.decoder.weight[words].detach().clone(), whole.decoder.bias[words].detach().clone()
        bias = nn.Parameter(start)
        whole.decoder = nn.Identity()
        head.requires_grad_(True)
        named = [(n, p) for n, p in head.named_parameters() if "decoder" not in n and n.split(".")[-2:-1]]
        named = [(n, p) for n, p in named if n not in ("predictions.bias", "bias")]
        adam = torch.optim.AdamW(
            [
                {"params": [p for n, p in named if "dense.weight" in n], "weight_decay": 0.3},
                {"params": [bias, *(p for n, p in named if "dense.weight" not in n)], "weight_decay": 0.0},
            ],
            lr=0.05,
        )
        saved = []
        for number in range(steps):
            loss = nn.functional.cross_entropy(head(states[:, j]) @ rows.T + bias, x["class_label"])
            adam.zero_grad()
            (loss / bank.layers).backward()  # the bank's loss is the mean over layers
            adam.step()
            with torch.no_grad():
                answers = (head(dev_states[:, j]) @ rows.T + bias).argmax(-1)
            accuracies[number, j] = 100 * float((answers == dev["class_label"]).double().mean())
            saved.append(
                (next(p for n, p in named if "dense.weight" in n).detach().clone(), bias.detach().clone())
            )
        weights.append(saved)
    best = int(accuracies.mean(1).argmax())  # the first of equals
    for j in range(bank.layers):
        dense, bias = weights[j][best]
        torch.testing.assert_close(bank.dense_weight[j].detach(), dense, rtol=0, atol=1e-10)
        torch.testing.assert_close(bank.bias[j].detach(), bias, rtol=0, atol=1e-10)
    assert distiller.state["probe_accuracy"][role] == pytest.approx(accuracies[best].tolist())
    measures = distiller.measures()
    assert [measures[f"probe_accuracy/{role}/{j + 1}"] for j in range(bank.layers)] == pytest.approx(
        accuracies[best]
    )


def test_measures_name_each_probe_and_the_balance_of_pseudo_labels() -> None:
    distiller, data = made(3), sets(3)
    trainer_of(distiller, data)
    found = distiller.measures()
    probes = (
        [f"teacher/{j}" for j in (1, 2, 3)]
        + [f"pretrained/{j}" for j in (1, 2, 3)]
        + ["student/1", "student/2"]
    )
    pseudo = [f"pseudo_label/pretrained/{y}" for y in range(3)]
    assert set(found) == {f"probe_accuracy/{name}" for name in probes} | set(pseudo)
    answers = row_logits(distiller.pretrained, data["unlabeled"].of("pretrained")).argmax(-1)
    assert [found[name] for name in pseudo] == pytest.approx([100 * (answers == y).mean() for y in range(3)])


def test_probes_train_on_states_without_dropout_whatever_the_students_mode() -> None:
    quiet, loud = made(), made()
    trainer_of(quiet, sets())
    trainer_of(loud, sets(), student_dropout=True)
    assert all(torch.equal(v, loud.state_dict()[n]) for n, v in quiet.state_dict().items())
    assert loud.student.training
    assert not loud.teacher.training


def test_only_banks_that_are_read_are_made() -> None:
    def banks(**settings: Any) -> set[str]:
        distiller = made(**settings)
        trainer_of(distiller, sets())
        groups = set(distiller.groups()) - {"student"}
        assert groups == {f"{role}_probes" for role in distiller.state.get("probe_accuracy", ())}
        return groups

    every = {"teacher_probes", "pretrained_probes", "student_probes"}
    assert banks() == banks(unlabeled_teacher="both") == every
    two = {"teacher_probes", "student_probes"}
    assert (
        banks(pretrained_probes="tuned") == banks(unlabeled_teacher="tuned") == banks(unlabeled=False) == two
    )
    assert banks(contrast=False) == set()
    frozen = made(probe="frozen_head")
    trainer_of(frozen, sets())
    assert set(frozen.groups()) == {"student"}
    assert set(frozen.state["probe_accuracy"]) == {"teacher", "pretrained", "student"}


# ------------------------------------------------------------------------------------------ training
def test_teachers_and_probes_are_frozen_and_all_of_the_student_learns() -> None:
    gradients: dict[str, Tensor] = {}
    recorder = Recorder(gradient=lambda group, found: gradients.update(found) if group == "student" else None)
    distiller = made()
    trainer = trainer_of(distiller, sets(), recorder=recorder)
    kept = {n: v.clone() for n, v in distiller.state_dict().items() if not n.startswith("student.")}
    start = copy.deepcopy(distiller.student.state_dict())
    trainer.fit()
    for name, value in kept.items():
        assert torch.equal(distiller.state_dict()[name], value), name
    for name, param in distiller.named_parameters():
        if not name.startswith("student."):
            assert param.grad is None, name
    assert set(gradients) == {f"student.{n}" for n, _ in distiller.student.named_parameters()}
    silent = {name for name, grad in gradients.items() if not grad.any()}
    assert not [name for name in silent if ".key.bias" not in name], "softmax ignores a key's bias alone"
    assert any(not torch.equal(v, start[n]) for n, v in distiller.student.state_dict().items())


def test_contrast_alone_reaches_the_layers_below_the_last_probe() -> None:
    """L_CPD reads states 1..L - 1: the last layer and the head have no gradient of it."""
    distiller = made(lam1=0.0, lam2=1.0)
    _, _, parts, _ = step_on(distiller, rows_of(trainer_of(distiller, sets())))
    with_contrast = {}
    for lam2 in (1.0, 0.0):
        distiller.cfg.lam2 = lam2
        distiller.zero_grad()
        distiller.student_loss(parts, ClassStep()).backward()  # type: ignore[arg-type]
        with_contrast[lam2] = {
            n: p.grad.clone() for n, p in distiller.student.named_parameters() if p.grad is not None
        }
    changed = {
        n for n, grad in with_contrast[1.0].items() if (grad - with_contrast[0.0][n]).abs().max() > 1e-9
    }
    assert {int(n.split("layer.")[1][0]) for n in changed if "layer." in n} == {0, 1}
    assert "bert.embeddings.word_embeddings.weight" in changed
    assert not any(name.startswith("cls.predictions.transform") for name in changed)


def test_a_step_costs_one_forward_of_the_student_and_none_of_a_teacher() -> None:
    for settings in ({}, {"pt_loss": "full_vocab"}, {"lam2": 0.0}, {"cpd_pairs": "same_sample"}):
        distiller = made(**settings)
        rows = rows_of(trainer_of(distiller, sets()))
        calls: list[str] = []
        for role in ("student", *ROLES):
            for part in (getattr(distiller, role).base_model, mlm_head(getattr(distiller, role))):
                assert part is not None
                name = f"{role} {type(part).__name__}"
                part.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
        step = ClassStep(extras={"unlabeled": rows["unlabeled"]})
        distiller.train_step(rows["labeled"], step)  # type: ignore[arg-type]
        assert calls == ["student BertModel", "student BertOnlyMLMHead"]


def test_a_step_with_caches_is_that_of_live_teachers() -> None:
    """Eval-mode teachers read the batch anew, through the same probes, on every step."""

    class Live(PromptDistiller):
        raw: dict[int, Batch] = {}

        def student_loss(self, parts: Any, step: Any) -> Tensor:
            fresh = {}
            for name, part in parts.items():
                role = "teacher" if name == "labeled" else "pretrained"
                raw = Batch.cat([self.raw[int(i)] for i in part["example_id"]])
                fresh[name] = part.replace(
                    **{
                        f"{role}_logits": torch.tensor(row_logits(getattr(self, role), raw.of(role))),
                        f"{role}_mean_probe": torch.tensor(read_by_probes(self, role, raw).mean(1)),
                    }
                )
            return super().student_loss(fresh, step)

    cached = made()
    live = Live(cached.cfg, *(copy.deepcopy(getattr(cached, role)) for role in ("student", *ROLES)))
    for batch in sets().values():
        Live.raw |= {int(batch["example_id"][i]): batch.rows([i]) for i in range(batch.size)}
    for a, b in zip(student_after(cached, sets()), student_after(live, sets()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"cpd_pairs": "same_sample"}, {"unlabeled_teacher": "both"}], ids=str
)
@pytest.mark.parametrize("micro", [1, 3])
def test_an_update_depends_neither_on_its_cut_nor_on_the_order(micro: int, settings: Any) -> None:
    def gradients(micro: int, reverse: bool = False) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        recorder = Recorder(gradient=lambda group, g: found.update(g) if group == "student" else None)
        distiller = made(**settings, unlabeled_per_step=2)
        trainer = trainer_of(distiller, sets(), micro_batch=micro, batch_size=5, recorder=recorder)
        if reverse:
            draw = trainer._draw
            trainer._draw = lambda *a: draw(*a).rows([4, 3, 2, 1, 0])  # type: ignore[method-assign]
        trainer.one_visit()
        return found

    whole = gradients(5)
    assert max(float(grad.abs().max()) for grad in whole.values()) > 1e-2
    for other in (gradients(micro), gradients(5, reverse=True)):
        for name, grad in whole.items():
            torch.testing.assert_close(other[name], grad, rtol=0, atol=1e-11)


def test_the_logged_terms_do_not_depend_on_the_cut() -> None:
    def lines(micro: int) -> dict[str, float]:
        recorder = Recorder()
        trainer_of(made(), sets(), micro_batch=micro, recorder=recorder).one_visit()
        return recorder.losses[0]

    whole = lines(4)
    assert {
        f"student/{n}_{part}" for n in ("kd", "cpd", "skipped") for part in ("labeled", "unlabeled")
    } < set(whole)
    assert lines(1) == pytest.approx(whole, rel=1e-9)
    terms = ("mlm", "kd_labeled", "kd_unlabeled", "cpd_labeled", "cpd_unlabeled")
    assert whole["student/loss"] == pytest.approx(sum(whole[f"student/{name}"] for name in terms), rel=1e-12)


@pytest.mark.parametrize("settings", [{}, {"probe_refresh_every": 2}, {"probe": "frozen_head"}], ids=str)
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path: Path, settings: Any) -> None:
    straight = made(**settings)
    trainer_of(straight, sets()).fit()
    first = trainer_of(made(**settings), sets(), folder=tmp_path, checkpoint_every=1)
    rows = first.source, dict(first.extras)
    for _ in range(3):
        first.one_visit()
        first.save()
    again = Trainer(made(**settings), rows[0], first.training, 3, extras=rows[1], folder=tmp_path)
    assert again.distiller.labeled_pool.size == 0  # type: ignore[operator, union-attr]
    again.fit()
    assert again.distiller.labeled_pool.size == 9  # type: ignore[operator, union-attr]
    for name, value in straight.state_dict().items():
        assert torch.equal(again.distiller.state_dict()[name], value), name
    assert again.distiller.measures() == straight.measures()


def test_refreshed_probes_follow_the_student_and_no_other_bank_moves() -> None:
    distiller, kept = made(probe_refresh_every=2, probe_lr=0.01), made(probe_lr=0.01)
    moved, seen = trainer_of(distiller, sets()), []
    for _ in range(5):
        before = distiller.student_probes.dense_weight.clone()  # type: ignore[union-attr, operator]
        moved.one_visit()
        seen.append(not torch.equal(before, distiller.student_probes.dense_weight))  # type: ignore[union-attr, arg-type]
    assert seen == [False, False, True, False, True]
    trainer_of(kept, sets())
    for name, value in kept.state_dict().items():
        if name.startswith(("teacher_probes", "pretrained_probes")):
            assert torch.equal(distiller.state_dict()[name], value), name


def test_refreshed_probes_are_those_of_a_plain_loop_on_the_student_of_that_visit() -> None:
    """Weights and moments go on from the last training; the best step on dev is kept, and is recorded."""
    steps, clip, data = 8, 0.2, sets()
    distiller = made(probe_refresh_every=2, probe_steps=steps, probe_lr=0.05, probe_weight_decay=0.3)
    trainer = trainer_of(distiller, data, grad_clip=clip)
    trainer.one_visit()
    trainer.one_visit()
    student, bank = copy.deepcopy(distiller.student), copy.deepcopy(distiller.bank("student"))
    told, optimizer = copy.deepcopy(distiller.state["probe_accuracy"]), trainer.optimizers["student_probes"]
    copies = dict(bank.requires_grad_(True).named_parameters(prefix="student_probes"))
    name_of = {id(param): name for name, param in optimizer.params.items()}
    adam = torch.optim.AdamW(
        [{"params": [copies[name_of[id(p)]] for p in each["params"]]} for each in optimizer.adam.param_groups]
    )
    adam.load_state_dict(copy.deepcopy(optimizer.adam.state_dict()))
    trainer.one_visit()

    x, dev = data["train"], data["dev"]
    states, dev_states = (torch.tensor(inner_states(student, rows)) for rows in (x, dev))
    right, saved, cut = [], [], 0
    for _ in range(steps):
        adam.zero_grad()
        logits = bank.logits(states)
        torch.stack(
            [nn.functional.cross_entropy(logits[:, j], x["class_label"]) for j in (0, 1)]
        ).mean().backward()
        norm = torch.stack([p.grad.norm() for p in bank.parameters() if p.grad is not None]).norm()
        for param in bank.parameters():
            if param.grad is not None and norm > clip:
                param.grad *= clip / norm
        cut += int(norm > clip)
        adam.step()
        with torch.no_grad():
            answers = bank.logits(dev_states).argmax(-1)
        right.append(100 * (answers == dev["class_label"][:, None]).double().mean(0).numpy())
        saved.append(copy.deepcopy(bank.state_dict()))
    best = int(np.mean(right, axis=1).argmax())
    assert 0 < best < steps - 1, "a selection that matters"
    assert cut > 0, "a clip that matters"
    for name, value in distiller.bank("student").state_dict().items():
        torch.testing.assert_close(value, saved[best][name], rtol=0, atol=1e-10)
    found = distiller.state["probe_accuracy"]
    assert found["student"] == pytest.approx(right[best].tolist())
    assert {role: found[role] for role in ROLES} == {role: told[role] for role in ROLES}
    rows = distiller.bank("student").rows
    words = x["verbalizer_ids"][0]
    first: Any = tiny_bert(1, "masked_lm", layers=3)
    assert torch.equal(rows, first.cls.predictions.decoder.weight[words])
    decoder: Any = student.cls.predictions.decoder  # type: ignore[union-attr]
    assert not torch.equal(rows, decoder.weight[words])


# ---------------------------------------------------------------------------------------- unlabelled
def test_unlabelled_texts_are_drawn_only_where_a_term_reads_them() -> None:
    def draws(**settings: Any) -> int:
        distiller = made(**settings)
        rows, asked = rows_of(trainer_of(distiller, sets())), []

        class Step(ClassStep):
            def extra(self, name: str) -> Batch | None:
                asked.append(name)
                return super().extra(name)

        distiller.train_step(rows["labeled"], Step(extras=rows))  # type: ignore[arg-type]
        return len(asked)

    assert draws() == draws(lam1=0.0) == draws(lam2=0.0) == draws(contrast=False) == 1
    assert draws(unlabeled_per_step=3) == 3
    assert draws(lam1=0.0, lam2=0.0) == draws(lam1=0.0, contrast=False) == draws(unlabeled=False) == 0


def test_without_unlabelled_texts_the_board_needs_none() -> None:
    data = {name: rows for name, rows in sets().items() if name != "unlabeled"}
    distiller = made(unlabeled=False)
    trainer = trainer_of(distiller, data)
    trainer.fit()
    assert trainer.updates == 6
    with pytest.raises(UserError, match="no rows 'unlabeled'"):
        trainer_of(made(), data)
    distiller = made()
    labeled = rows_of(trainer_of(distiller, sets()))["labeled"]
    with pytest.raises(ValueError, match="no extra set 'unlabeled'"):
        distiller.train_step(labeled, ClassStep())  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"cpd_pairs": "same_sample"}, {"lam2": 0.0}], ids=str)
@pytest.mark.parametrize("empty", ["labeled", "unlabeled"])
def test_a_process_may_have_no_row_of_a_part(empty: str, settings: Any) -> None:
    distiller = made(**settings)
    rows = rows_of(trainer_of(distiller, sets()))
    whole, terms, _, _ = step_on(distiller, rows)
    told = {**rows, empty: rows[empty].rows([])}
    loss, rest, _, _ = step_on(distiller, told)
    gone = sum(value for name, value in terms.items() if name.endswith(f"_{empty}")) + (
        terms["mlm"] if empty == "labeled" else 0
    )
    assert loss == pytest.approx(whole - gone, rel=1e-9)
    assert rest[f"kd_{empty}"] == 0


# ----------------------------------------------------------------------------------------- negatives
def test_negatives_are_of_other_classes_and_drawn_without_replacement() -> None:
    keys = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    eligible = labels[None] != torch.arange(50)[:, None] % 3
    index, valid = draw_negatives(keys, eligible, 5)
    assert index.shape == (50, 5)
    assert valid.all()
    for i, row in enumerate(index):
        assert len(set(row.tolist())) == 5
        assert i % 3 not in labels[row].tolist()
    index, valid = draw_negatives(keys, eligible, 10)
    assert (valid.sum(1) == 8).all()
    for count in (0, 12, 99):
        index, valid = draw_negatives(keys, eligible, count)
        assert index.shape == (50, 12)
        assert torch.equal(valid, eligible)


def test_each_row_of_the_pool_is_drawn_as_often() -> None:
    ids, pool = torch.arange(4000)[:, None], torch.arange(100, 110)
    index, _ = draw_negatives(uniform(1, ids, 0, pool), torch.ones(4000, 10, dtype=torch.bool), 3)  # type: ignore[arg-type]
    counts = index.flatten().bincount(minlength=10)
    assert (counts - 1200).abs().max() < 5 * (4000 * 0.3 * 0.7) ** 0.5
    pairs = {tuple(sorted(row)) for row in index.tolist()}
    assert len(pairs) == 120, "every set of three occurs"


def test_visits_draw_other_negatives_and_an_anchor_the_same_in_any_batch() -> None:
    distiller = made(negatives=2)
    rows = rows_of(trainer_of(distiller, sets()))
    _, _, first, _ = step_on(distiller, rows)
    _, _, again, _ = step_on(distiller, rows)
    _, _, later, _ = step_on(distiller, rows, visit=4)
    _, _, some, _ = step_on(distiller, {name: part.rows([5, 2]) for name, part in rows.items()})
    for name, role in (("labeled", "teacher"), ("unlabeled", "pretrained")):
        field = f"{role}_negatives"
        assert torch.equal(first[name][field], again[name][field])
        assert not torch.equal(first[name][field], later[name][field])
        assert torch.equal(some[name][field], first[name][field][[5, 2]])


def test_a_batch_of_one_class_still_finds_negatives() -> None:
    distiller = made()
    rows = rows_of(trainer_of(distiller, sets()))
    ones = rows["labeled"]["class_label"].nonzero()[:, 0].tolist()
    _, terms, parts, _ = step_on(distiller, {**rows, "labeled": rows["labeled"].rows(ones)})
    assert parts["labeled"]["teacher_valid"].sum(1).tolist() == [5] * len(ones), "the five texts of class 0"
    assert terms["skipped_labeled"] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", ["cross", "same_sample"])
def test_an_empty_pool_is_skipped_and_counted(form: Any, pairs: Any) -> None:
    """T' that answers one class for all of Xu leaves no negative there."""
    distiller = made(cpd_form=form, cpd_pairs=pairs)
    with torch.no_grad():
        word = int(sets()["train"]["pretrained.verbalizer_ids"][0, 1])
        distiller.pretrained.lm_head.bias[word] += 1e3  # type: ignore[index, union-attr]
    trainer = trainer_of(distiller, sets())
    loss, terms, _, step = step_on(distiller, rows_of(trainer))
    assert distiller.measures()["pseudo_label/pretrained/1"] == 100
    assert (terms["skipped_unlabeled"], terms["skipped_labeled"]) == (1, 0)
    assert step.counts == {"skipped_anchors": 10}
    assert terms["cpd_unlabeled"] == 0
    assert terms["cpd_labeled"] != 0
    assert np.isfinite(loss)
    trainer.fit()
    assert trainer.counters["skipped_anchors"] == 6 * 4
    assert all(bool(p.isfinite().all()) for p in distiller.student.parameters())


def test_a_skipped_anchor_has_no_gradient_and_still_counts_in_the_mean() -> None:
    products = g([0.3, 0.2, 0.6]).repeat(2, 1).requires_grad_()
    valid = torch.tensor([[True, False], [False, False]])
    for form in FORMS:
        values = contrastive(products, valid, form)  # type: ignore[arg-type]
        assert values[1] == 0
        assert values[0] != 0
        gradient = torch.autograd.grad(values.sum(), products)[0]
        assert gradient.isfinite().all()
        assert (gradient != 0).tolist() == [[True, True, False], [False, False, False]]


def test_a_student_of_one_layer_has_no_contrast_and_says_so_once() -> None:
    with pytest.warns(UserWarning, match="one layer in student is none to probe") as told:
        distiller = made(layers=1)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = made(layers=1, contrast=False)
        assert distiller.breaks() == {}
        found = student_after(distiller, sets())
    assert all(bool(value.isfinite().all()) for value in found)
    assert same(found, student_after(plain, sets()))
    assert set(distiller.groups()) == {"student"}


# ------------------------------------------------------------------------- settings and controls
def test_hidden_states_of_the_negative_control() -> None:
    """TinyBERT's distance at the mask: student layer m against teacher layer m L_T / L_S, one map for all."""
    distiller, data = made(layers=2, aux_hidden="tinybert", aux_weight=0.7), sets()
    _, terms, _, _ = step_on(distiller, rows_of(trainer_of(distiller, data)))
    fit: Any = distiller.fit
    weight, bias = fit.weight.detach().numpy(), fit.bias.detach().numpy()
    for name, split, role in (("labeled", "train", "teacher"), ("unlabeled", "unlabeled", "pretrained")):
        batch, distances = data[split], []
        for s, t, i, k in zip(
            row_states(distiller.student, batch),
            row_states(getattr(distiller, role), batch.of(role)),
            batch["mask_index"].tolist(),
            batch[f"{role}.mask_index"].tolist(),
            strict=True,
        ):
            apart = [((weight @ s[m, i] + bias - t[2 * m, k]) ** 2).mean() for m in range(3)]
            distances.append(sum(apart))
        assert terms[f"aux_{name}"] == pytest.approx(0.7 * np.mean(distances), rel=1e-10)
    assert {"fit.weight", "fit.bias"} < {name for name, _ in distiller.groups()["student"].params}
    with pytest.raises(ValueError, match="4 layers of width 12 fit neither the student's 3 layers"):
        made(layers=3, aux_hidden="tinybert")


def test_probes_of_the_tuned_teacher_need_its_shape() -> None:
    models = tiny_bert(1, "masked_lm"), tiny_roberta(2, "masked_lm"), tiny_roberta(3, "masked_lm", layers=4)
    with pytest.raises(ValueError, match="needs a pretrained of the teacher's shape"):
        PromptDistiller(PromptDistiller.Config(pretrained_probes="tuned"), *models)
    distiller = made(pretrained_probes="tuned")
    assert distiller.bank("pretrained") is distiller.bank("teacher")


def test_defaults_are_those_of_the_paper() -> None:
    cfg = PromptDistiller.Config()
    assert (cfg.alpha, cfg.lam1, cfg.lam2) == (10, 0.2, 0.2)
    assert (cfg.kd_form, cfg.cpd_form, cfg.cpd_pairs, cfg.negatives) == ("hinton_t2", "infonce", "cross", 8)
    assert (cfg.probe, cfg.probe_steps, cfg.probe_lr, cfg.probe_weight_decay) == (
        "head_copy",
        300,
        1e-3,
        0.01,
    )
    assert (cfg.unlabeled_teacher, cfg.unlabeled_per_step, cfg.probe_refresh_every) == ("pretrained", 1, 0)
    group = made(probe_lr=0.5, probe_weight_decay=0.25).groups()["student_probes"]
    assert (group.lr, group.weight_decay, group.schedule, group.warmup_steps) == (0.5, 0.25, "constant", 0)


def test_prepare_reads_what_it_depends_on() -> None:
    """Settings that `prepare_reads` leaves out change nothing that is prepared."""
    cfg = PromptDistiller.Config()
    rest = set(vars(cfg)) - set(PromptDistiller.prepare_reads or ())
    changes = {
        "alpha": 2.0,
        "lam1": 0.5,
        "lam2": 0.0,
        "kd_form": "literal",
        "cpd_form": "log",
        "negatives": 0,
    }
    changes |= {"cpd_pairs": "same_sample", "pt_loss": "full_vocab", "aux_weight": 2.0}
    changes |= {"unlabeled_per_step": 2, "probe_refresh_every": 5}
    assert rest == set(changes)
    plain, other = trainer_of(made(), sets()), trainer_of(made(**changes), sets())
    for found in (Trainer.prepared_tensors, Trainer.own_tensors):
        mine, theirs = found(plain), found(other)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert plain.distiller.state == other.distiller.state


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 0.0}, "alpha = 0.0 is not a finite number above 0"),
        ({"lam1": -1.0}, "lam1 = -1.0 is not a finite number of 0 or more"),
        ({"lam2": np.nan}, "lam2 = nan is not a finite number of 0 or more"),
        ({"aux_weight": np.inf}, "aux_weight = inf is not a finite number of 0 or more"),
        ({"probe_weight_decay": -0.1}, "probe_weight_decay = -0.1 is not a finite"),
        ({"negatives": -1}, "negatives = -1 is not a finite number of 0 or more"),
        ({"probe_steps": 0}, "probe_steps = 0 is under 1"),
        ({"probe_lr": np.inf}, "probe_lr = inf is not a finite number above 0"),
        ({"unlabeled_per_step": 0}, "unlabeled_per_step = 0 is under 1"),
        ({"probe_refresh_every": -1}, "probe_refresh_every = -1 is not a finite"),
        ({"probe": "copy", "contrast": False}, "probe = 'copy' is none of head_copy, linear, frozen_head"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptDistiller.Config(**wrong)
