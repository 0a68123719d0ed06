"""Collecting evidence: every column against plain float64, contexts, profiles, resuming, invariances."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kdbench.collect
from kdbench.collect import Plan, collect, held, manifest_of, plan, reference, sample, sampled
from kdbench.config import EvidenceConfig
from kdbench.distiller import Batch
from kdbench.errors import UserError
from kdbench.evidence import Evidence, conditions, read_evidence, require_same_conditions
from kdbench.record import RecordError

MODELS = {"student": "s", "teacher": "t"}


@pytest.fixture
def gold(causal_batch: Callable[..., Batch]) -> Batch:
    """Five prompts with references; the last was cut before its end."""
    batch = causal_batch(sizes=((3, 4), (5, 2), (2, 6), (4, 1), (1, 5)))
    batch["input_ids"][4, 5] = 7
    last = batch["input_ids"].gather(1, batch["length"][:, None] - 1)[:, 0]
    return batch.replace(finished=last == 0)


def made(
    path: Path, student: nn.Module, teacher: nn.Module, what: Plan, names: str = "student teacher reference"
) -> Evidence:
    rolled = {
        "student": sampled(student, what),
        "teacher": held(sample(teacher, what)),
        "reference": reference(what),
    }
    chosen = {name: rolled[name] for name in names.split()}
    collect(student, teacher, what, chosen, path, manifest_of(what, MODELS))
    return read_evidence(path)


def by_key(evidence: Evidence) -> dict[tuple[int, ...], dict[str, Any]]:
    keys = zip(
        evidence.roll_in.tolist(),
        *(evidence.columns[name].tolist() for name in ("example_id", "draw", "position")),
        strict=True,
    )
    columns = {name: values.tolist() for name, values in evidence.columns.items()}
    return {key: {name: columns[name][at] for name in columns} for at, key in enumerate(keys)}


def direct(lq: np.ndarray[Any, Any], lp: np.ndarray[Any, Any], token: int) -> dict[str, float]:
    """The measurements of one position from two rows of logits [V], in float64."""
    q, p = np.exp(lq - lq.max()), np.exp(lp - lp.max())
    q, p = q / q.sum(), p / p.sum()
    m = (p + q) / 2
    found = {
        "forward_kl": (p * np.log(p / q)).sum(),
        "reverse_kl": (q * np.log(q / p)).sum(),
        "jsd": ((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2,
        "total_variation": np.abs(p - q).sum() / 2,
        "student_entropy": -(q * np.log(q)).sum(),
        "teacher_entropy": -(p * np.log(p)).sum(),
        "top1_agree": p.argmax() == q.argmax(),
    }
    if token >= 0:
        found |= {"student_log_prob": np.log(q[token]), "teacher_log_prob": np.log(p[token])}
        found |= {"teacher_rank": (p > p[token]).sum()}
    return {name: float(value) for name, value in found.items()}


def test_every_column_equals_the_plain_formula(
    tmp_path: Path,
    gold: Batch,
    tiny_student: Callable[..., nn.Module],
    tiny_teacher: Callable[..., nn.Module],
) -> None:
    student, teacher = tiny_student().double().eval(), tiny_teacher().double().eval()
    what = Plan(gold, 2, 6, "plain", 2)
    evidence = made(tmp_path / "e.parquet", student, teacher, what)
    rows = by_key(evidence)
    texts = {0: sample(student, what), 1: sample(teacher, what), 2: [gold]}
    checked = context = extra = 0
    for side, draws in texts.items():
        for draw, batch in enumerate(draws):
            for row in range(batch.size):
                start, end = int(batch["prompt_length"][row]), int(batch["length"][row])
                ids = batch["input_ids"][row, :end]
                with torch.no_grad():
                    lq, lp = (model(ids[None]).logits[0].numpy() for model in (student, teacher))
                ended = bool(batch["finished"][row])
                for at in range(1 if draw == 0 else start, end + (not ended)):
                    token = int(ids[at]) if at < end else -1
                    key = (side, int(batch["example_id"][row]), draw, at - start)
                    got = rows.pop(key)
                    assert (got["token"], got["context"]) == (token, at < start)
                    assert got["alive"] == (start <= at < end)
                    for name, value in direct(lq[at - 1], lp[at - 1], token).items():
                        assert got[name] == pytest.approx(value, rel=2e-6, abs=2e-7), (key, name)
                    if token < 0:
                        assert got["teacher_rank"] == -1
                        assert np.isnan(got["student_log_prob"])
                    checked, context, extra = checked + 1, context + (at < start), extra + (token < 0)
    assert not rows
    assert min(checked - context - extra, context, extra) > 5


def test_values_do_not_depend_on_batch_size_or_on_the_order_of_prompts(
    tmp_path: Path,
    gold: Batch,
    tiny_student: Callable[..., nn.Module],
    tiny_teacher: Callable[..., nn.Module],
) -> None:
    student, teacher = tiny_student().double(), tiny_teacher().double()
    one = made(tmp_path / "a.parquet", student, teacher, Plan(gold, 2, 6, "plain", 2))
    turned = gold.rows([3, 0, 4, 2, 1])
    wide = turned.replace(input_ids=torch.nn.functional.pad(turned["input_ids"], (0, 3), value=9))
    other = made(tmp_path / "b.parquet", student, teacher, Plan(wide, 2, 6, "plain", 64))
    assert one.manifest == other.manifest
    for name, values in one.columns.items():
        np.testing.assert_allclose(values, other.columns[name], rtol=1e-6, atol=1e-8, err_msg=name)


def test_a_teacher_equal_to_the_student_has_no_divergence_at_all(
    tmp_path: Path, gold: Batch, tiny_student: Callable[..., nn.Module]
) -> None:
    evidence = made(tmp_path / "e.parquet", tiny_student(), tiny_student(), Plan(gold, 1, 6, "plain", 2))
    for name in ("forward_kl", "reverse_kl", "jsd", "total_variation"):
        assert not evidence.columns[name].any(), name
    assert evidence.columns["top1_agree"].all()


def test_the_minillm_profile_repeats_no_6_gram(gold: Batch, tiny_student: Callable[..., nn.Module]) -> None:
    student = tiny_student()
    with torch.no_grad():
        student.transformer.wte.weight[5] *= 30  # a model that would write one token for ever
    for profile, repeats in (("plain", True), ("minillm", False)):
        (batch,) = sample(student, Plan(gold, 1, 30, profile, 4))
        grams = [
            tuple(batch["input_ids"][row, at : at + 6].tolist())
            for row in range(1)
            for at in range(int(batch["length"][row]) - 5)
        ]
        assert (len(set(grams)) < len(grams)) is repeats


class Stop(Exception):
    """An interruption."""


def test_an_interrupted_collection_goes_on_where_it_was(
    tmp_path: Path,
    gold: Batch,
    tiny_student: Callable[..., nn.Module],
    tiny_teacher: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kdbench.collect, "_PIECE", 1)
    student, teacher, what = tiny_student(), tiny_teacher(), Plan(gold, 2, 6, "plain", 2)
    made(tmp_path / "whole.parquet", student, teacher, what)
    real, calls = kdbench.collect.measure, [0]

    def stops(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise Stop
        return real(*args)

    monkeypatch.setattr(kdbench.collect, "measure", stops)
    path = tmp_path / "cut.parquet"
    with pytest.raises(Stop):
        made(path, student, teacher, what)
    assert not path.exists()
    (piece,) = list(path.with_suffix(".pieces").glob("student-0-2.npz"))
    piece.write_bytes(piece.read_bytes()[:100])  # torn: measured again
    made(path, student, teacher, what)
    total = 3 * 2 * 2 + 3
    assert calls[0] == 6 + total - 4
    assert path.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert path.with_suffix(".json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not path.with_suffix(".pieces").exists()


def test_pieces_of_other_settings_are_not_used(
    tmp_path: Path,
    gold: Batch,
    tiny_student: Callable[..., nn.Module],
    tiny_teacher: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher, path = tiny_student(), tiny_teacher(), tmp_path / "e.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(kdbench.collect, "write_evidence", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            made(path, student, teacher, Plan(gold, 1, 6, "plain", 2))
    assert len(list(path.with_suffix(".pieces").glob("*.npz"))) == 3
    assert made(path, student, teacher, Plan(gold, 1, 3, "plain", 2)).columns["position"].max() == 3


def test_a_snapshots_plan_is_light_and_an_unknown_profile_is_named(gold: Batch) -> None:
    config = EvidenceConfig(samples=3, snapshot_prompts=2, snapshot_tokens=5, max_new_tokens=9)
    light = plan(gold, config, snapshot=True)
    assert (light.gold.size, light.samples, light.max_new_tokens, light.context) == (2, 1, 5, False)
    assert plan(gold, config, profile="minillm").decoding["no_repeat_ngram"] == 6
    with pytest.raises(UserError, match="no decoding profile 'minilm'. Did you mean 'minillm'"):
        plan(gold, config, profile="minilm")


def test_evidence_of_other_conditions_is_refused_and_says_what_differs(
    tmp_path: Path,
    gold: Batch,
    tiny_student: Callable[..., nn.Module],
    tiny_teacher: Callable[..., nn.Module],
) -> None:
    student, teacher = tiny_student(), tiny_teacher()
    one = made(tmp_path / "a.parquet", student, teacher, Plan(gold, 1, 4, "plain", 2), "student").manifest
    mine = conditions(one)
    require_same_conditions(mine, conditions(one))
    few = made(tmp_path / "b.parquet", student, teacher, Plan(gold.rows([0, 1]), 1, 4, "plain", 2), "student")
    with pytest.raises(RecordError, match="kd and sft cannot be compared in pairs: other prompts"):
        require_same_conditions(mine, conditions(few.manifest), ("kd", "sft"))
    other = {**mine, "decoding": {**mine["decoding"], "temperature": 0.7, "max_new_tokens": 5}}
    with pytest.raises(RecordError, match=r"max_new_tokens 4 and 5.*temperature 1.0 and 0.7"):
        require_same_conditions(mine, other)
    with pytest.raises(RecordError, match=r"other teacher \(t and another\)"):
        require_same_conditions(mine, {**mine, "teacher": "another"})
