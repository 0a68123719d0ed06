"""Less memory, other number formats: checkpointed activations, models in bfloat16, matrix products."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from test_harness import Fit, Linears, Two, rows, trained, training
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from kdbench import harness, registry, runner
from kdbench.checks import Case, Probe
from kdbench.clock import Clock
from kdbench.config import RunConfig, TrainingConfig, load_board, resolve, run_id
from kdbench.distiller import Batch, Distiller, Group, Step, freeze, token_mean
from kdbench.distillers.promptkd import PromptKD, dropout_on
from kdbench.errors import UserError
from kdbench.harness import BatchSource, Milestone, Recorder, Trainer
from kdbench.losses import reverse_kl
from kdbench.memory import cast, checkpoint_activations
from kdbench.predict import predict
from kdbench.processes import Processes, matmul_precision
from kdbench.prompts import PromptedModel, SoftPrompt
from kdbench.rollout import Draw, rollout
from kdbench.strict import from_dict

Models = Callable[..., Any]


# ----------------------------------------------------------------------------- checkpointed activations
def saved_bytes(function: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a function returns, and the bytes of distinct tensors that it keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        value = function()
    return value, sum(kept.values())


def deep() -> Any:
    """A model of eight layers, so that what the head keeps counts for little."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=8, n_head=2, initializer_range=0.2
    )
    return GPT2LMHeadModel(config).eval()


def prompted(teacher: Any, batch: Batch, student: Any) -> tuple[Tensor, Tensor, int]:
    """Loss and gradient of a soft prompt in front of a frozen teacher, and what was kept for it."""
    prompt = SoftPrompt.from_ids(teacher, [3, 4, 5], 3)
    model = PromptedModel(freeze(teacher), prompt)
    with torch.no_grad():
        q = predict(student, batch)
    loss, size = saved_bytes(lambda: token_mean(reverse_kl(predict(model, batch), q), batch))
    loss.backward()
    assert prompt.vectors.grad is not None
    return loss.detach(), prompt.vectors.grad.clone(), size


def test_a_frozen_teacher_under_a_prompt_keeps_less(tiny_student: Models, causal_batch: Models) -> None:
    batch, student = causal_batch(sizes=[(3, 30), (5, 20)]), tiny_student().eval()
    plain = prompted(deep(), batch, student)
    teacher = deep()
    assert checkpoint_activations(teacher) == 8
    less = prompted(teacher, batch, student)
    torch.testing.assert_close(less[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(less[1], plain[1], rtol=1e-6, atol=1e-9)
    assert less[2] < 0.4 * plain[2]


def test_a_student_keeps_less(causal_batch: Models) -> None:
    batch, found = causal_batch(sizes=[(3, 30), (5, 20)]), []
    for less in (False, True):
        model = deep()
        for _ in range(2 * less):  # twice is as once
            assert checkpoint_activations(model) == 8
        loss, size = saved_bytes(lambda model=model: token_mean(-predict(model, batch).logits()[:, 1], batch))
        loss.backward()
        found.append((loss.detach(), [param.grad for param in model.parameters()], size))
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=1e-6, atol=1e-9)
    assert found[1][2] < 0.5 * found[0][2]


def test_masked_models_have_layers_too() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
        )
    ).eval()
    ids = torch.arange(12).view(2, 6)
    plain = torch.autograd.grad(model(input_ids=ids).logits.sum(), list(model.parameters())[5])[0]
    assert checkpoint_activations(model) == 3
    less = torch.autograd.grad(model(input_ids=ids).logits.sum(), list(model.parameters())[5])[0]
    torch.testing.assert_close(less, plain, rtol=1e-6, atol=1e-9)


def test_dropout_is_that_of_the_first_time(tiny_teacher: Models, causal_batch: Models) -> None:
    """The masks of the recomputation are those of the forward pass, also where modes have changed since."""
    batch, found = causal_batch(), []
    for less in (False, True):
        teacher = freeze(tiny_teacher(dropout=0.5))
        prompt = SoftPrompt.from_ids(teacher, [3, 4, 5], 3)
        if less:
            checkpoint_activations(teacher)
        torch.manual_seed(5)
        with dropout_on(teacher, True):
            logits = predict(PromptedModel(teacher, prompt), batch).logits()
        assert not teacher.training
        loss = token_mean(logits.square().mean(-1), batch)
        loss.backward()
        assert not any(module.training for module in teacher.modules())
        found.append((loss.detach(), prompt.vectors.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


def test_sampling_and_copies_are_as_before(tiny_student: Models, causal_batch: Models) -> None:
    batch, model = causal_batch(), tiny_student().eval()
    plain, other = rollout(model, batch, Draw(1), 8)["input_ids"], copy.deepcopy(model)
    checkpoint_activations(model)
    assert torch.equal(rollout(model, batch, Draw(1), 8)["input_ids"], plain)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for one in (copied, other):
            for param in one.transformer.h.parameters():
                param.zero_()
    found = predict(copied, batch).logits()  # its layers are its own
    torch.testing.assert_close(found, predict(other, batch).logits())
    assert not torch.allclose(found, predict(model, batch).logits())


def test_training_with_checkpointed_activations(tiny_student: Models, tiny_teacher: Models) -> None:
    case, found = Case("promptkd", {}, {}), []
    for less in (False, True):
        found.append(case.start(training={"checkpoint_activations": less}).go())
    for mine, theirs in zip(found[1].lines, found[0].lines, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)
    calls = [hasattr(layer, "_parameters") and "forward" in vars(layer) for layer in _layers(found[1])]
    assert calls == [True] * len(calls)
    assert not any("forward" in vars(layer) for layer in _layers(found[0]))


def _layers(probe: Probe) -> list[nn.Module]:
    found = [layer for model in probe.distiller.children() for layer in model.modules()]
    return [layer for layer in found if type(layer).__name__ == "GPT2Block"]


def test_models_without_layers_are_refused() -> None:
    with pytest.raises(UserError, match="training.checkpoint_activations: no layer of the models"):
        Trainer(Fit(), rows(), training(checkpoint_activations=True), 1)


# -------------------------------------------------------------------------------------- models in bfloat16
def test_cast_keeps_ties_and_computed_buffers() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            tie_word_embeddings=True,
        )
    )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before
    cast(nn.ModuleDict({"a": model}), torch.bfloat16)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])
    assert model(input_ids=torch.arange(6)[None]).logits.dtype == torch.bfloat16
    plain = nn.Linear(2, 2)
    cast(plain, torch.bfloat16)  # no model of transformers: a soft prompt stays in float32
    assert plain.weight.dtype == torch.float32


def promptkd(teacher_precision: str | None, make: tuple[Models, Models], batch: Batch) -> Trainer:
    """Two visits of PromptKD with a teacher of the given precision."""
    teacher, student = make[0](dropout=0.0), make[1](dropout=0.0)
    teacher.kdbench_encode = lambda text: [3, 4, 5]
    method = PromptKD(PromptKD.Config(max_new_tokens=6), student, teacher)
    told = TrainingConfig(
        optimizer_steps=2,
        batch_size=4,
        lr=1e-3,
        teacher_precision=teacher_precision,  # type: ignore[arg-type]
        checkpoint_every=0,
    )
    gradients: dict[str, dict[str, Tensor]] = {}
    keep = Recorder(gradient=lambda group, gradient: gradients.setdefault(group, gradient))
    trainer = Trainer(method, BatchSource(batch), told, 1, recorder=keep)
    trainer.fit()
    trainer.first = gradients  # type: ignore[attr-defined]
    return trainer


def test_teacher_in_bfloat16_under_a_prompt(
    tiny_teacher: Models, tiny_student: Models, causal_batch: Models
) -> None:
    make, batch = (tiny_teacher, tiny_student), causal_batch()
    plain, half = (promptkd(precision, make, batch) for precision in (None, "bf16"))
    same = promptkd("fp32", make, batch)
    assert plain.recorder is not None
    assert half.recorder is not None
    assert same.recorder is not None
    assert same.recorder.losses == plain.recorder.losses
    assert {param.dtype for param in plain.distiller.teacher.parameters()} == {torch.float32}
    assert {param.dtype for param in half.distiller.teacher.parameters()} == {torch.bfloat16}
    assert {param.dtype for param in half.distiller.student.parameters()} == {torch.float32}
    assert half.distiller.prompt.vectors.dtype == torch.float32  # type: ignore[union-attr]
    for group, gradients in half.first.items():  # type: ignore[attr-defined]
        theirs = plain.first[group]  # type: ignore[attr-defined]
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32, name
            scale = theirs[name].norm()
            assert (gradient - theirs[name]).norm() <= 0.05 * scale, name
    for mine, other in zip(half.recorder.losses, plain.recorder.losses, strict=True):
        assert mine != other
        assert mine["student/loss"] == pytest.approx(other["student/loss"], rel=2e-2)
        assert mine["prompt/loss"] == pytest.approx(other["prompt/loss"], rel=2e-2)


def test_a_frozen_student_is_not_cast(tiny_teacher: Models, tiny_student: Models) -> None:
    """It is what is scored, also where a prompt in front of it alone is trained."""

    class Steers(Distiller):
        def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
            super().__init__(None, freeze(student), teacher)
            self.prompt = SoftPrompt.from_ids(student, [3, 4], 2)
            self.view = PromptedModel(student, self.prompt)

        def groups(self) -> dict[str, Group]:
            return {"student": Group(self.prompt.named_parameters(prefix="prompt"))}

    method = Steers(tiny_student(), tiny_teacher())
    Trainer(method, rows(), training(teacher_precision="bf16"), 1)
    assert {param.dtype for param in method.student.parameters()} == {torch.float32}
    assert {param.dtype for param in method.teacher.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", registry.names("distillers"))
def test_every_method_trains_beside_models_in_bfloat16(name: str) -> None:
    """First losses within bfloat16 of those in float32, gradients in float32, what is trained not cast."""
    case, made = Case(name, {}, {}), []
    for precision in ("bf16", "fp32"):
        probe = case.start(torch.float32, training={"teacher_precision": precision}).go(1)
        made.append(probe)
    half, plain = made
    trained = {id(p) for one in half.optimizers.values() for p in one.params.values()}
    assert all(p.dtype == torch.float32 for p in half.distiller.parameters() if id(p) in trained)
    assert all(p.dtype == torch.float32 for p in half.distiller.student.parameters())
    frozen = [child for child in half.distiller.children() if not trained & set(map(id, child.parameters()))]
    own = {id(param) for param in half.distiller.student.parameters()}
    for child in frozen:
        if own.isdisjoint(map(id, child.parameters())):  # others share its encoder
            assert all(param.dtype == torch.bfloat16 for param in child.parameters())
    for update in half.seen:
        assert {gradient.dtype for gradient in update.gradient.values()} <= {torch.float32}
    for mine, theirs in zip(half.lines[:1], plain.lines[:1], strict=True):
        assert mine["student/loss"] == pytest.approx(theirs["student/loss"], rel=5e-2, abs=2e-2)


@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_evidence_is_measured_in_float32(precision: str) -> None:
    overrides = [f"training.teacher_precision={precision}"]
    run = resolve(load_board("tiny-instruct/v1"), "debug", "kd", 1, overrides)
    assert run.evidence is not None
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    told = {"run": run, "processes": Processes(), "clock": Clock()}
    life: Any = SimpleNamespace(**told, materials=SimpleNamespace(model=lambda role: other))
    assert runner._Life.measuring(life, one) is (one if precision == "none" else other)
    assert runner._Life.measuring(life, None) is None


def test_float32_beside_bf16_is_refused() -> None:
    told = "teacher_precision = 'fp32' cannot stand beside precision = 'bf16'"
    with pytest.raises(ValueError, match=told):
        training(precision="bf16", teacher_precision="fp32")
    table = {"optimizer_steps": 1, "batch_size": 1, "lr": 1.0, "teacher_precision": "none"}
    assert from_dict(TrainingConfig, table, "x").teacher_precision is None
    with pytest.raises(UserError, match="x.teacher_precision: no choice 'bf17'. Did you mean 'bf16'"):
        from_dict(TrainingConfig, {**table, "teacher_precision": "bf17"}, "x")


# ---------------------------------------------------------------------------------------- matrix products
def test_products_have_their_precision_in_training_alone() -> None:
    seen: list[tuple[str, str]] = []

    class Looks(Two):
        def prepare(self, data: Any, step: Step) -> None:
            seen.append(("prepare", torch.get_float32_matmul_precision()))

        def loss(self, batch: Batch, step: Step) -> Tensor:
            seen.append(("loss", torch.get_float32_matmul_precision()))
            return super().loss(batch, step)

    def measure(step: int) -> None:
        seen.append(("measure", torch.get_float32_matmul_precision()))

    milestones = [Milestone(frozenset({1}), measure)]
    trainer = Trainer(Looks(), rows(), training(matmul="medium"), 1, milestones=milestones)
    trainer.prepare(None)
    trainer.one_visit()
    medium = [("prepare", "medium"), ("loss", "medium"), ("loss", "medium")]
    assert seen == [*medium, ("measure", "highest")]
    assert torch.get_float32_matmul_precision() == "highest"
    with matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_settings_enter_the_run_id_and_its_name() -> None:
    board = load_board("tiny-instruct/v1")

    def run(*overrides: str) -> RunConfig:
        return resolve(board, "debug", "kd", 1, overrides)

    changes = ("matmul=medium", "teacher_precision=bf16", "checkpoint_activations=true", "fit=true")
    ids = {run_id(run(), "code", {})}
    for change in changes:
        made = run(f"training.{change}")
        assert made.row == f"kd[training.{change}]"
        ids.add(run_id(made, "code", {}))
    assert len(ids) == 5
    assert run("training.matmul=highest").row == "kd"


# --------------------------------------------------------------------------------------------- optimizers
def test_adamw_is_fused_where_the_device_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(dtype: torch.dtype) -> torch.optim.AdamW:
        return harness.adamw([{"params": [nn.Parameter(torch.ones(2, dtype=dtype))]}], lr=0.1, eps=1e-3)

    assert made(torch.float32).defaults["fused"] is True
    assert made(torch.float64).defaults["fused"] is True
    other = made(torch.complex64)  # which the fused kernel refuses, as it does other devices
    assert not other.defaults["fused"]
    assert (other.defaults["lr"], other.defaults["eps"]) == (0.1, 1e-3)
    fused, plain = Linears(), Linears()
    trained(fused, optimizer_steps=5, batch_size=8)
    adam = torch.optim.AdamW
    monkeypatch.setattr(harness, "adamw", lambda groups, **settings: adam(groups, **settings))
    trained(plain, optimizer_steps=5, batch_size=8)
    torch.testing.assert_close(fused.student.weight, plain.student.weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept_for_the_next_update(kept: bool) -> None:
    """Two tensors under 32 MiB that are freed and made again need no new pages, under glibc."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ:
        pytest.skip("only glibc is told to keep what is freed")
    if huge.is_file() and "[always]" in huge.read_text():
        pytest.skip("pages of this kernel are too large to be counted")
    code = """
import resource, torch
from kdbench.memory import keep_freed

def use():
    pair = [torch.ones(6_000_000) for _ in range(2)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed()
before = [use() for _ in range(6)][-1]
print(use() - before)
"""
    unset = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    where = {name: value for name, value in os.environ.items() if name not in unset}
    # a threshold that the user sets is left alone: then every pair comes anew
    where |= {} if kept else {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=where)
    faults = int(done.stdout)
    assert faults < 500 if kept else faults > 5000


def test_what_was_kept_is_no_part_of_a_later_peak() -> None:
    """A training's peak does not hold what came before it, nor an evaluation between its updates."""
    if platform.libc_ver()[0] != "glibc" or not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs glibc, and a kernel that tells the peak")
    code = """
import torch
from kdbench.clock import Clock, running, phase
from kdbench.memory import give_back, keep_freed

keep_freed()
pairs = [torch.ones(5_000_000) for _ in range(20)]  # 400 MB in blocks under 32 MiB
last = torch.ones(1000)
del pairs
clock = Clock()
with running(clock):
    with phase("kept"):
        pass
    give_back()
    with phase("given back"):
        pass
print(*(told.peak_rss_bytes // 10**6 for told in clock.phases.values()))
"""
    unset = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    where = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=where)
    kept, given = map(int, done.stdout.split())
    assert kept - given > 300
