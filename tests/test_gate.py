"""The gate: what it says of numbers, and that it fails, naming the number, for faults planted in the code."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdbench.classify
import kdbench.collect
import kdbench.distiller
import kdbench.few_shot
import kdbench.predict
import kdbench.rollout
from kdbench import config, gate, registry
from kdbench.classify import Classified
from kdbench.distiller import Batch, Totals
from kdbench.distillers import _classes, _panda, kd_ft, panda_late, pkd_ft, pot, prompt_distiller, prompt_kd
from kdbench.distillers.gkd import GKD
from kdbench.distillers.minillm import MiniLLM
from kdbench.distillers.mlm_pooler import MLMPooler
from kdbench.distillers.panda_early import PandaEarly
from kdbench.distillers.prompt_distiller import PromptDistiller
from kdbench.distillers.promptkd import PromptKD
from kdbench.distillers.seqkd import SeqKD
from kdbench.errors import UserError
from kdbench.harness import Trainer
from kdbench.losses import forward_kl
from kdbench.prompted import PromptedEncoder
from kdbench.prompts import DeepPrompt
from kdbench.rollout import rollout
from kdbench.runner import Plan
from kdbench.stages import Places
from kdbench.streams import uniform
from kdbench.task import Encoder, InstructionTask

Plant = Callable[[pytest.MonkeyPatch], None]
T = gate.UPDATES


# ----------------------------------------------------------------------------- what it says of given numbers
def _print(loss: float = 2.0, **changed: Any) -> gate.Fingerprint:
    """A made-up method's fingerprint, as good as can be."""
    good = gate.Fingerprint(
        logged={"student/loss": [loss / (i + 1) for i in range(T)]},
        moved={"student": 1.0},
        tokens=[9] * T,
        ends=[2] * T,
        repeats={"teacher": 0.0},
    )
    return replace(good, **changed)


class _Inline:
    """An executor that computes at once, in this process."""

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A gate over one made-up method, whose fingerprint and scores can be changed, and what it learned."""
    found: dict[str, Any] = {"print": _print(), "scores": lambda seed: 30.0 + seed % 3}

    @contextmanager
    def inline() -> Iterator[_Inline]:
        yield _Inline()

    def fingerprint(method: str, *, ulp: bool = False) -> gate.Fingerprint:
        if isinstance(found["print"], Exception):
            raise found["print"]
        return found["print"]  # type: ignore[no-any-return]

    def scores(method: str, seed: int, places: Places) -> dict[str, float | None]:
        return dict.fromkeys(gate.SCORES, found["scores"](seed))

    monkeypatch.setattr(gate, "_pool", inline)
    monkeypatch.setattr(gate, "fingerprint", fingerprint)
    monkeypatch.setattr(gate, "scores", scores)
    monkeypatch.setattr(gate, "_reference_path", lambda family: tmp_path / family.reference)
    monkeypatch.setattr(registry, "names", lambda kind: ["sft"])
    monkeypatch.setattr(gate, "FORMULAS", {})
    assert gate.learn().passed
    found["path"] = tmp_path / "reference.json"
    return found


def test_what_was_learned_passes(made_up: dict[str, Any]) -> None:
    report = gate.run()
    assert report.passed
    assert report.named("passed")
    assert report.named("regressed") == report.named("not measured") == []
    assert "gate passed: " in report.render()


@pytest.mark.parametrize(
    ("changed", "number", "told"),
    [
        ({"logged": {"student/loss": [2.1] * T}}, "sft/trajectory/student/loss", "2.1, stored 2, from"),
        ({"logged": {}}, "sft/trajectory/student/loss", "logged no more"),
        ({"moved": {"student": 0.0}}, "sft/moves/student", "no weight moved"),
        ({"moved": {"student": 1.001}}, "sft/movement/student", "1.001, stored 1"),
        ({"tokens": [9] * (T - 1) + [8]}, "sft/tokens", f"{9 * T - 1} counted in all, {9 * T} stored"),
        ({"ends": [1] * T}, "sft/ends", f"{T} counted in all, {2 * T} stored"),
        ({"repeats": {"teacher": 0.25}}, "sft/repeats/teacher", "differ by up to 0.25"),
        ({"disagree": ["update 3: a and b"]}, "sft/counts", "update 3: a and b"),
        ({"own": {"student/loss": [2.0] * T}}, "sft/recomputed/student/loss", "1, recomputed 2, from"),
        ({"own": {"student/ce": [2.0] * T}}, "sft/recomputed/student/ce", "does not log it"),
        ({"logged": {"student/loss": [math.nan] * T}}, "sft/trajectory/student/loss", "nan, stored 2"),
    ],
)  # fmt: skip
def test_a_regressed_number_is_named_with_its_amount(
    made_up: dict[str, Any], changed: dict[str, Any], number: str, told: str
) -> None:
    made_up["print"] = _print(**changed)
    report = gate.run(score=False)
    (found,) = [one for one in report.numbers if one.name == number]
    assert found.outcome == "regressed"
    assert told in found.reason
    assert not report.passed
    assert f"regressed: {number}: " in report.render()
    assert "gate failed: " in report.render()


def test_rounding_is_within_the_tolerance(made_up: dict[str, Any]) -> None:
    made_up["print"] = _print(2.0 * (1 + 1e-12), moved={"student": 1 + 1e-12})
    assert gate.run().passed


def test_a_score_beyond_its_band_regresses(made_up: dict[str, Any]) -> None:
    band = json.loads(made_up["path"].read_text())["methods"]["sft"]["scores"][gate.SCORES[0]]
    assert len(band["seeds"]) >= 8
    assert band["low"] < min(band["seeds"]) < max(band["seeds"]) < band["high"]
    made_up["scores"] = lambda seed: band["high"] + 0.5
    report = gate.run()
    assert report.named("regressed") == [f"sft/score/{name}" for name in gate.SCORES]
    assert "0.5 outside" in report.numbers[-1].reason
    made_up["scores"] = lambda seed: band["high"] - 0.5
    assert gate.run().passed


def test_what_raises_has_regressed(made_up: dict[str, Any]) -> None:
    made_up["print"] = ZeroDivisionError("division\nby zero")
    report = gate.run(score=False)
    assert report.named("regressed") == ["sft/updates"]
    assert "ZeroDivisionError: division by zero" in report.numbers[-1].reason


def test_not_measured(made_up: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made_up["print"] = UserError("no models for it")
    report = gate.run(score=False)
    assert report.named("not measured") == ["sft/updates"]
    assert not report.passed
    made_up["print"] = _print(logged={**_print().logged, "student/new": [1.0] * T})
    assert gate.run().named("not measured") == ["sft/trajectory/student/new"]
    made_up["print"] = _print()
    made_up["scores"] = lambda seed: None
    assert gate.run(updates=False).named("not measured") == [f"sft/score/{name}" for name in gate.SCORES]
    monkeypatch.setattr(gate, "EXEMPT", {"sft": "needs a page of text"})
    report = gate.run()
    assert report.named("not measured") == ["sft/all"]
    assert report.passed


def test_other_versions_excuse_stored_numbers_alone(
    made_up: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "library_versions", lambda: {"torch": "2.6.0", "transformers": "5.0.0"})
    assert gate.run().named("not measured") == []
    made_up["print"] = _print(2.1)
    report = gate.run()
    assert report.passed
    assert report.named("not measured") == ["sft/trajectory/student/loss"]
    assert "here is torch 2.6.0" in report.render()
    made_up["print"] = _print(repeats={"teacher": 0.25})
    assert gate.run().named("regressed") == ["sft/repeats/teacher"]


def test_a_reference_that_says_nothing(made_up: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr(gate, "UPDATES", T + 1)
        report = gate.run(score=False)
        assert "reference" in report.named("not measured")
        assert not report.passed
    made_up["path"].write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        gate.run()
    made_up["path"].unlink()
    report = gate.run(score=False)
    assert "kdbench gate --learn" in report.numbers[0].reason
    assert not report.passed


def test_what_is_wrong_in_itself_is_not_learned(made_up: dict[str, Any]) -> None:
    made_up["path"].unlink()
    made_up["print"] = _print(own={"student/loss": [2.0] * T})
    report = gate.learn()
    assert report.named("regressed") == ["sft/recomputed/student/loss"]
    made_up["print"] = ValueError("no")
    assert gate.learn().named("regressed") == ["sft/learn"]
    assert not made_up["path"].exists()
    made_up["print"] = _print()
    assert gate.learn().passed
    assert made_up["path"].exists()


def test_learning_one_method_keeps_the_others(
    made_up: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = json.loads(made_up["path"].read_text())["methods"]["sft"]
    made_up["print"] = _print(3.0)
    monkeypatch.setattr(registry, "find", lambda kind, name: None)
    assert gate.learn(["new"]).passed
    learned = json.loads(made_up["path"].read_text())["methods"]
    assert learned["sft"] == known
    assert learned["new"] != known
    monkeypatch.setattr(gate, "UPDATES", T + 1)
    assert gate.learn(["new"], score=False).named("regressed") == []
    assert list(json.loads(made_up["path"].read_text())["methods"]) == ["new"]


def test_a_family_has_its_own_reference(made_up: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "names", lambda kind: ["sft", "mlm"])
    before = made_up["path"].read_bytes()
    report = gate.run()
    assert report.named("not measured") == ["reference", "mlm/reference", "mlm/score"]
    assert "few_shot.json does not exist" in report.render()
    assert gate.learn(["mlm"]).passed
    assert made_up["path"].read_bytes() == before
    report = gate.run()
    assert report.passed
    assert report.named("not measured") == ["mlm/score"]


def test_methods_have_their_family_by_head() -> None:
    families = {
        name: gate.family(name).name
        for name in ("sft", "prompt_distiller_lm", "mlm", "pkd_ft", "panda", "mlm_pooler", "none")
    }
    few_shot, transfer = ["few_shot_rows"] * 2, ["transfer_rows"] * 2
    assert list(families.values()) == ["rows", "rows", *few_shot, *transfer, "rows"]


def test_a_score_is_the_mean_over_axis_values_after_the_runs_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[str, dict[str, Any]]] = []

    def done(plan: Any) -> Any:
        made.append((plan.run.row, plan.run.axes))
        value = {"names": 10.0, "mood_few": 20.0}.get(plan.run.axes.get("source"), 1000.0)
        return SimpleNamespace(scores={gate.TRANSFER_SCORES[0]: SimpleNamespace(value=value)})

    monkeypatch.setattr(gate, "_done", done)
    assert gate.scores("panda", 1, Places(tmp_path / "runs", tmp_path / "cache")) == {"transfer/score": 15.0}
    for source in ("names", "mood_few"):
        own = {"source": source, "target": "mood"}
        before = made[: made.index(("panda", own))]
        needed = [("pt", {"target": "mood"}), ("pt", {"target": source}), ("pot", own)]
        assert all(one in before for one in needed)
    assert len(made) == 7


def test_a_needed_run_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = SimpleNamespace(status="failed", reason="no luck")
    monkeypatch.setattr(Plan, "execute", lambda self: failed)
    with pytest.raises(RuntimeError, match="pt .*ended as failed: no luck"):
        gate.scores("panda_early", 1, Places(tmp_path / "runs", tmp_path / "cache"))


def test_unknown_method() -> None:
    with pytest.raises(UserError, match="Did you mean 'promptkd'"):
        gate.run(["promtkd"])


# -------------------------------------------------------------------------------------------- planted faults
def _gkd_forward(patch: pytest.MonkeyPatch) -> None:
    made = GKD.__init__

    def init(self: Any, cfg: Any, student: nn.Module, teacher: nn.Module) -> None:
        made(self, cfg, student, teacher)
        self.divergence = forward_kl

    patch.setattr(GKD, "__init__", init)


def _mask(change: Callable[[Batch, Tensor], Tensor]) -> Plant:
    """Change the target mask everywhere."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        true_mask = kdbench.distiller.target_mask
        for module in (kdbench.distiller, kdbench.predict):
            patch.setattr(module, "target_mask", lambda batch: change(batch, true_mask(batch)))

    return plant


def _shifted(batch: Batch, mask: Tensor) -> Tensor:
    """The mask one token early: the last prompt token is a target, the last response token is none."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def _without_ends(batch: Batch, mask: Tensor) -> Tensor:
    """The mask that comes from ids: padding and ends of sequences look alike."""
    return mask & (batch["input_ids"][:, 1:] != 0)


def _rows_without_ends(patch: pytest.MonkeyPatch) -> None:
    encode = Encoder.encode
    patch.setattr(
        Encoder,
        "encode",
        lambda self, pairs: [replace(one, response=one.response[:-1]) for one in encode(self, pairs)],
    )


def _prompt_never_updated(patch: pytest.MonkeyPatch) -> None:
    def train_step(self: Any, batch: Batch, step: Any) -> None:
        batch = rollout(self.student, batch, step, self.cfg.max_new_tokens)
        step.update("student", self.student_loss, batch)

    patch.setattr(PromptKD, "train_step", train_step)


def _teacher_trains(patch: pytest.MonkeyPatch) -> None:
    set_modes = Trainer._set_modes

    def modes(self: Trainer) -> None:
        set_modes(self)
        self.distiller.teacher.train()

    patch.setattr(Trainer, "_set_modes", modes)


def _constant_coefficient(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PromptKD, "reg_coefficient", lambda self, step: 1.0)


def _without_t2(patch: pytest.MonkeyPatch) -> None:
    true = _classes.distilled
    for module in (kd_ft, pkd_ft, prompt_kd, prompt_distiller):
        patch.setattr(module, "distilled", lambda q, p, temperature, form: true(q, p, temperature, "hinton"))


def _reverse_kl(patch: pytest.MonkeyPatch) -> None:
    true = _classes.kl_divergence
    patch.setattr(_classes, "kl_divergence", lambda q, p, temperature=1.0: true(p, q, temperature))


def _tuned_on_unlabeled(patch: pytest.MonkeyPatch) -> None:
    made = PromptDistiller.__init__

    def init(self: Any, cfg: Any, student: nn.Module, teacher: nn.Module, pretrained: nn.Module) -> None:
        made(self, cfg, student, teacher, copy.deepcopy(teacher))

    patch.setattr(PromptDistiller, "__init__", init)


def _negatives_of_any_class(patch: pytest.MonkeyPatch) -> None:
    true = prompt_distiller.draw_negatives
    patch.setattr(
        prompt_distiller,
        "draw_negatives",
        lambda keys, eligible, count: true(keys, torch.ones_like(eligible), count),
    )


def _negatives_of_its_class(patch: pytest.MonkeyPatch) -> None:
    true = prompt_distiller.draw_negatives
    patch.setattr(
        prompt_distiller, "draw_negatives", lambda keys, eligible, count: true(keys, ~eligible, count)
    )


def _probes_one_layer_up(patch: pytest.MonkeyPatch) -> None:
    """Probe j reads layer j + 1; the last layer's states stay where they are for the head."""
    true = prompt_distiller.classified

    def classified(model: nn.Module, batch: Batch) -> Classified:
        out = true(model, batch)
        states = [out.states[:, :1], out.states[:, 2:], out.states[:, -1:]]
        return replace(out, states=torch.cat(states, dim=1))

    patch.setattr(prompt_distiller, "classified", classified)


def _other_label_words(patch: pytest.MonkeyPatch) -> None:
    true = kdbench.classify._verbalized
    patch.setattr(kdbench.classify, "_verbalized", lambda logits, batch: true(logits, batch).roll(1, -1))


def _weight_doubled(patch: pytest.MonkeyPatch) -> None:
    true = _panda.Transferred.weight
    patch.setattr(_panda.Transferred, "weight", lambda self, *told: 2 * true(self, *told))


def _distance_doubled(patch: pytest.MonkeyPatch) -> None:
    true = _panda.Transferred.distance
    patch.setattr(_panda.Transferred, "distance", lambda self, *told: 2 * true(self, *told))


def _weight_without_schedule(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_panda, "scheduled", lambda *told: 1.0)


def _gaps_summed(patch: pytest.MonkeyPatch) -> None:
    """The squared gap is summed over classes."""
    patch.setattr(_panda, "squared_gaps", lambda q, p, *told: (q - p).square().sum(-1))


def _teachers_dropout(patch: pytest.MonkeyPatch) -> None:
    def taught(self: Any, teacher: PromptedEncoder, batch: Batch) -> tuple[Tensor, Tensor]:
        teacher.train()
        with torch.no_grad():
            states = teacher.states(batch)
            outputs = teacher.outputs_from(states, batch)
        teacher.eval()
        return states, outputs

    patch.setattr(_panda.Transferred, "taught", taught)


def _all_sources_teach(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(panda_late, "chosen_sources", lambda found, k: list(range(len(found))))


def _unweighted_similarity(patch: pytest.MonkeyPatch) -> None:
    """The similarity of fused sources is the plain mean over them all."""
    made = PandaEarly.__init__

    def init(
        self: Any, cfg: Any, student: nn.Module, teacher: Any, sources: nn.ModuleList, target: Any
    ) -> None:
        made(self, cfg, student, teacher, sources, target)
        models: Any = sources
        found = [_panda.predicted(cfg, one, target) for one in models]
        self.similarity = sum(found) / len(found)

    patch.setattr(PandaEarly, "__init__", init)


def _prompt_not_handed_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pot, "load_prompt", lambda *told: None)


def _layers_mixed_up(patch: pytest.MonkeyPatch) -> None:
    true = DeepPrompt.cache

    def swapped(self: DeepPrompt, table: Tensor) -> Any:
        first, second = table.chunk(2, dim=-1)
        return true(self, torch.cat([second, first], dim=-1))

    patch.setattr(DeepPrompt, "cache", swapped)


def _head_reads_states(patch: pytest.MonkeyPatch) -> None:
    """The first token's state is read in place of the pooled one."""
    patch.setattr(PromptedEncoder, "pooled", lambda self, states: states[:, 0])


def _bag_of_whole_rows(patch: pytest.MonkeyPatch) -> None:
    """The pooler is asked for the first and the last token too."""
    true = MLMPooler.loss

    def loss(self: Any, batch: Batch, step: Any) -> Tensor:
        place = torch.arange(batch["bag"].shape[1])
        ends = (place == 0) | (place == batch["length"][:, None] - 1)
        return true(self, batch.replace(bag=torch.where(ends, batch["input_ids"], batch["bag"])), step)

    patch.setattr(MLMPooler, "loss", loss)


WITHOUT_REFERENCE: dict[str, tuple[str, str, Plant]] = {
    "reverse and forward KL swapped": ("gkd", "gkd/recomputed/student/reverse_kl", _gkd_forward),
    "mask shifted by one": ("sft", "sft/recomputed/student/ce", _mask(_shifted)),
    "tuned teacher on unlabelled texts": (
        "prompt_distiller",
        "prompt_distiller/recomputed/student/kd_unlabeled",
        _tuned_on_unlabeled,
    ),
    "weight of the teacher doubled": ("panda", "panda/recomputed/student/weight", _weight_doubled),
}


@pytest.mark.parametrize("fault", WITHOUT_REFERENCE)
def test_formulas_need_no_reference(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    method, number, plant = WITHOUT_REFERENCE[fault]
    missing = tmp_path / "none.json"
    report = gate.run([method], score=False, reference=missing)
    assert report.named("regressed") == []
    assert number in report.named("passed")
    plant(monkeypatch)
    assert number in gate.run([method], score=False, reference=missing).named("regressed")


def _no_importance_weights(patch: pytest.MonkeyPatch) -> None:
    scored = MiniLLM.scored

    def without(self: Any, sampled: Batch, step: Any) -> Batch:
        rows = scored(self, sampled, step)
        return rows.replace(importance_weight=torch.ones_like(rows["importance_weight"]))

    patch.setattr(MiniLLM, "scored", without)


def _not_whitened(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MiniLLM, "whitened", lambda self, rows, step, over_rows: rows["advantage"])


def _micro_mean(patch: pytest.MonkeyPatch) -> None:
    def micro(self: Any, part: Batch, cut: Tensor, totals: Totals, pieces: int) -> Batch:
        rows = part.rows(cut)
        own = rows.with_totals(None).counts()
        return rows.with_totals(Totals(own.tokens * pieces, own.examples * pieces))

    patch.setattr(Trainer, "_micro", micro)


def _no_schedule(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Trainer, "_lr", lambda self, group: self.training.lr)


def _optimizer(**changed: Any) -> Plant:
    """Change settings of every optimizer."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        made = Trainer._optimizer

        def optimizer(self: Any, group: Any) -> Any:
            result = made(self, group)
            for entry in result.adam.param_groups:
                entry.update(changed)
            return result

        patch.setattr(Trainer, "_optimizer", optimizer)

    return plant


def _no_clipping(patch: pytest.MonkeyPatch) -> None:
    descend = Trainer._descend
    patch.setattr(Trainer, "_descend", lambda self, optimizer, norm: descend(self, optimizer, 0.0))


def _other_position_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kdbench.rollout, "uniform", lambda seed, ids, draw, at: uniform(seed, ids, draw, at + 1))


def _likeliest_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kdbench.rollout, "inverse_cdf", lambda probabilities, u: probabilities.argmax(-1))


def _written_by_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SeqKD, "prepare", lambda self, data, step: {})


def _student_dropout(patch: pytest.MonkeyPatch) -> None:
    set_modes = Trainer._set_modes

    def modes(self: Trainer) -> None:
        set_modes(self)
        self.distiller.student.train()

    patch.setattr(Trainer, "_set_modes", modes)


def _prompt_follows(patch: pytest.MonkeyPatch) -> None:
    """The student is updated before the prompt."""

    def train_step(self: Any, batch: Batch, step: Any) -> None:
        batch = rollout(self.student, batch, step, self.cfg.max_new_tokens)
        step.update("student", self.student_loss, batch)
        step.update("prompt", self.prompt_loss, batch)

    patch.setattr(PromptKD, "train_step", train_step)


FAULTS: dict[str, tuple[str, str, Plant]] = {
    **WITHOUT_REFERENCE,
    "mask shifted by one, on-policy": ("gkd", "gkd/recomputed/student/reverse_kl", _mask(_shifted)),
    "ends dropped from the targets": ("sft", "sft/recomputed/student/ce", _mask(_without_ends)),
    "ends dropped from sampled targets": ("gkd", "gkd/recomputed/student/loss", _mask(_without_ends)),
    "ends dropped from the rows": ("sft", "rows/complete", _rows_without_ends),
    "prompt never updated": ("promptkd", "promptkd/moves/prompt", _prompt_never_updated),
    "teacher in train mode": ("kd", "kd/repeats/teacher", _teacher_trains),
    "coefficient does not decay": ("promptkd", "promptkd/coefficient", _constant_coefficient),
    "KD without T^2": ("kd_ft", "kd_ft/recomputed/student/kd", _without_t2),
    "KD of prompts without T^2": ("prompt_kd", "prompt_kd/recomputed/student/kd_labeled", _without_t2),
    "reverse KL of classes": ("prompt_kd", "prompt_kd/recomputed/student/kd_labeled", _reverse_kl),
    "negatives of any class": (
        "prompt_distiller",
        "prompt_distiller/recomputed/student/cpd_labeled",
        _negatives_of_any_class,
    ),
    "negatives of the anchor's class": (
        "prompt_distiller",
        "prompt_distiller/recomputed/student/cpd_unlabeled",
        _negatives_of_its_class,
    ),
    "probes one layer up": (
        "prompt_distiller",
        "prompt_distiller/recomputed/student/cpd_labeled",
        _probes_one_layer_up,
    ),
    "label words in another order": ("student_pt", "student_pt/recomputed/student/loss", _other_label_words),
    "encoder's teacher in train mode": ("prompt_kd", "prompt_kd/repeats/teacher", _teacher_trains),
    "distance to the teacher doubled": ("panda", "panda/recomputed/student/distance", _distance_doubled),
    "weight that does not decay": (
        "panda_early",
        "panda_early/recomputed/student/weight",
        _weight_without_schedule,
    ),
    "squared gaps summed over classes": (
        "panda_late",
        "panda_late/recomputed/student/weighted_distance",
        _gaps_summed,
    ),
    "dropout of a prompt's teacher": ("panda", "panda/recomputed/student/distance", _teachers_dropout),
    "all sources teach": ("panda_late", "panda_late/recomputed/student/weight", _all_sources_teach),
    "fused sources not weighted": (
        "panda_early",
        "panda_early/recomputed/student/weight",
        _unweighted_similarity,
    ),
    "source's prompt not handed over": ("pot", "pot/trajectory/student/loss", _prompt_not_handed_over),
    "layers of the prompt mixed up": ("pt", "pt/recomputed/student/loss", _layers_mixed_up),
    "head reads states": ("full_tune", "full_tune/recomputed/student/loss", _head_reads_states),
    "bag of whole rows": ("mlm_pooler", "mlm_pooler/recomputed/student/bag", _bag_of_whole_rows),
    # those that the gate was not written for
    "importance weights missing": ("minillm", "minillm/recomputed/student/policy", _no_importance_weights),
    "advantages not whitened": ("minillm", "minillm/recomputed/student/policy", _not_whitened),
    "mean over micro-batches": ("sft", "sft/recomputed/student/loss", _micro_mean),
    "student's dropout on": ("kd", "kd/recomputed/student/ce", _student_dropout),
    "schedule ignored": ("sft", "sft/trajectory/lr", _no_schedule),
    "weight decay applied to nothing": ("sft", "sft/movement/student", _optimizer(weight_decay=0.0)),
    "other betas": ("sft", "sft/movement/student", _optimizer(betas=(0.9, 0.98))),
    "gradients not clipped": ("sft", "sft/trajectory/student/loss", _no_clipping),
    "rollouts with another position key": ("gkd", "gkd/tokens", _other_position_key),
    "likeliest token instead of a sample": ("gkd", "gkd/tokens", _likeliest_token),
    "teacher's text not used": ("seqkd", "seqkd/tokens", _written_by_nobody),
    "student before its prompt": ("promptkd", "promptkd/trajectory/student/kd", _prompt_follows),
}


@pytest.fixture
def stored() -> None:
    """The stored numbers bind under the versions they were learned with."""
    for family in gate.FAMILIES:
        learned = json.loads(gate._reference_path(family).read_text())["versions"]
        if learned != config.library_versions():
            pytest.skip(f"the gate's {family.reference} is of {learned}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the gate's teacher and student init are trained once for several tests."""
    return tmp_path_factory.mktemp("gate")


@pytest.mark.slow
@pytest.mark.usefixtures("stored")
def test_the_gate_passes(folder: Path) -> None:
    report = gate.run(folder=folder)
    assert report.passed, report.render()
    assert report.named("not measured") == [f"{method}/score" for method in gate.UNSCORED]


@pytest.mark.slow
@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, number, plant = FAULTS[fault]
    plant(monkeypatch)
    report = gate.run([method], score=False)
    print(f"{fault}: {', '.join(report.named('regressed'))}")
    assert number in report.named("regressed"), report.render()
    assert not report.passed


def _greedy_answers(patch: pytest.MonkeyPatch) -> None:
    true = InstructionTask.outputs
    patch.setattr(
        InstructionTask,
        "outputs",
        lambda self, model, split, encoder, decode, *rest: true(
            self, model, split, encoder, replace(decode, temperature=0.0), *rest
        ),
    )


def _students_on_references(patch: pytest.MonkeyPatch) -> None:
    """The evidence of responses of the model's own is collected on the references instead."""
    patch.setattr(kdbench.collect, "sampled", lambda model, plan: kdbench.collect.reference(plan))


def _one_token_early(patch: pytest.MonkeyPatch) -> None:
    """Answers are read at the token before the mask."""
    true = kdbench.few_shot.mask_logits
    patch.setattr(
        kdbench.few_shot,
        "mask_logits",
        lambda model, batch: true(model, batch.replace(mask_index=batch["mask_index"] - 1)),
    )


def _one_token_late(patch: pytest.MonkeyPatch) -> None:
    """Models behind a prompt answer at their second token, but for those that are being trained."""
    true = PromptedEncoder.pooled
    patch.setattr(
        PromptedEncoder,
        "pooled",
        lambda self, states: true(self, states if torch.is_grad_enabled() else states[:, 1:]),
    )


SCORED: dict[str, tuple[str, Plant]] = {
    "greedy answers": ("sft/score/instruction_following/rouge_l", _greedy_answers),
    "rolled in on references": ("sft/score/exposure_bias/ex_acc_err@15", _students_on_references),
    "answers one token early": ("student_pt/score/few_shot/accuracy/topic", _one_token_early),
    "answers one token late": ("panda/score/transfer/score", _one_token_late),
}


@pytest.mark.slow
@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("fault", SCORED)
def test_faults_of_scoring_leave_the_band(fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, plant = SCORED[fault]
    shutil.rmtree(folder / "runs", ignore_errors=True)
    plant(monkeypatch)
    report = gate.run([number.split("/")[0]], updates=False, folder=folder)
    print(f"{fault}: {', '.join(report.named('regressed'))}")
    assert number in report.named("regressed"), report.render()
