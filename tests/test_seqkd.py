"""SeqKD: what the teacher writes, and each variant's loss on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_kit import (
    EOS,
    FakeData,
    FakeStep,
    assert_gradient_is_slope,
    gradients,
    kl,
    nll,
    ragged_rows,
    tiny_gpt2,
)
from torch import nn

from kdbench.distiller import Batch
from kdbench.distillers.kd import KD
from kdbench.distillers.seqkd import SeqKD
from kdbench.distillers.sft import SFT
from kdbench.registry import load_distiller


def make(**settings: Any) -> SeqKD:
    return SeqKD(SeqKD.Config(**{"max_new_tokens": 5, **settings}), tiny_gpt2(1), tiny_gpt2(2))


def force(model: nn.Module, order: list[int]) -> None:
    """Make a model say `order` by position: after the token at position t it always says order[t]."""
    width = model.config.n_embd
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        table = torch.nn.functional.one_hot(torch.arange(model.config.vocab_size), width).double()
        model.transformer.wte.weight.copy_(table * 100)
        for position, token in enumerate(order):
            model.transformer.wpe.weight[position] = 1e6 * table[token]


def responses(rows: Batch) -> list[list[int]]:
    spans = zip(rows["input_ids"], rows["prompt_length"], rows["length"], strict=True)
    return [ids[int(start) : int(stop)].tolist() for ids, start, stop in spans]


def test_it_is_registered_with_the_papers_settings() -> None:
    assert load_distiller("seqkd") is SeqKD
    assert (SeqKD.Config().variant, SeqKD.Config().kd_ratio) == ("mixed", 0.5)


def test_prepare_keeps_prompts_and_replaces_every_response() -> None:
    rows, step = ragged_rows(), FakeStep()
    written = make().prepare(FakeData(rows), step)["train"]
    assert torch.equal(written["example_id"], rows["example_id"])
    assert torch.equal(written["prompt_length"], rows["prompt_length"])
    for new, old, n in zip(written["input_ids"], rows["input_ids"], rows["prompt_length"], strict=True):
        assert torch.equal(new[:n], old[:n])
    assert bool((written["length"] > written["prompt_length"]).all())
    assert step.counts["tokens_sampled"] == written.counts().tokens
    assert step.updated == []


def test_teacher_text_depends_on_the_teacher_alone() -> None:
    rows = ragged_rows()
    gold_scrambled = rows.replace(input_ids=rows["input_ids"].clone())
    for row, (start, stop) in enumerate(zip(rows["prompt_length"], rows["length"], strict=True)):
        gold_scrambled["input_ids"][row, start:stop] = 11
    first = make().prepare(FakeData(rows), FakeStep())["train"]
    second = SeqKD(SeqKD.Config(max_new_tokens=5), tiny_gpt2(9), tiny_gpt2(2))
    assert responses(first) == responses(second.prepare(FakeData(gold_scrambled), FakeStep())["train"])
    assert responses(first) == responses(make().prepare(FakeData(rows, size=3), FakeStep())["train"])
    assert responses(first) != responses(make().prepare(FakeData(rows), FakeStep(seed=8))["train"])
    other = SeqKD(SeqKD.Config(max_new_tokens=5), tiny_gpt2(1), tiny_gpt2(3))
    assert responses(first) != responses(other.prepare(FakeData(rows), FakeStep())["train"])


def test_empty_and_unfinished_responses() -> None:
    seqkd = SeqKD(SeqKD.Config(max_new_tokens=3), tiny_gpt2(1), tiny_gpt2(2, width=16))
    # the prompts end at positions 1, 0, 3, 2 and 1: rows 0 and 4 end at once, the others never do
    force(seqkd.teacher, [5, EOS, 7, 6, 7, 8, 9, 10])
    rows = ragged_rows()
    written = seqkd.prepare(FakeData(rows), FakeStep())["train"]
    assert responses(written) == [[EOS], [5, EOS], [6, 7, 8], [7, 6, 7], [EOS]]
    assert written["finished"].tolist() == [True, True, False, False, True]
    assert written.counts().tokens == 10


@pytest.mark.parametrize(("variant", "ratio"), [("hard", 0.0), ("mixed", 0.25), ("soft", 1.0)])
def test_loss_of_each_variant(variant: str, ratio: float) -> None:
    seqkd, step = make(variant=variant, kd_ratio=0.25), FakeStep()
    rows = seqkd.prepare(FakeData(ragged_rows()), FakeStep())["train"]
    ce, forward = nll(seqkd.student, rows), kl(seqkd.teacher, seqkd.student, rows)
    assert seqkd.loss(rows, step).item() == pytest.approx((1 - ratio) * ce + ratio * forward, abs=1e-12)
    assert step.terms["ce"] == pytest.approx(ce, abs=1e-12)
    if ratio:
        assert step.terms["forward_kl"] == pytest.approx(forward, abs=1e-12)


@pytest.mark.parametrize("variant", ["hard", "mixed", "soft"])
def test_gradient_is_the_slope_of_the_loss(variant: str) -> None:
    assert_gradient_is_slope(make(variant=variant), ragged_rows())


def test_mixed_is_kd_and_hard_is_sft_on_the_same_rows() -> None:
    rows = ragged_rows()
    kd = KD(KD.Config(kd_ratio=0.5), tiny_gpt2(1), tiny_gpt2(2))
    sft = SFT(SFT.Config(), tiny_gpt2(1))
    for one, other in ((make(), kd), (make(variant="hard"), sft)):
        expected = gradients(other, rows)
        for name, grad in gradients(one, rows).items():
            assert torch.equal(grad, expected[name]), name


def test_hard_does_not_run_the_teacher() -> None:
    seqkd = make(variant="hard")
    seqkd.teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    seqkd.teacher.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    seqkd.loss(ragged_rows(), FakeStep())


@pytest.mark.parametrize("settings", [{"kd_ratio": -0.1}, {"max_new_tokens": 0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SeqKD.Config(**settings)
