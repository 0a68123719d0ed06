"""Soft prompts, and predictions at the target positions: aligned, cut to the vocabulary, true to models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_kit import EOS, Array, make_rows, ragged_rows, tiny_gpt2
from torch import Tensor, nn

from kdbench.distiller import Batch, target_tokens
from kdbench.losses import cross_entropy, forward_kl
from kdbench.predict import CausalLM, predict
from kdbench.prompts import PromptedModel, SoftPrompt


def prompted(model: nn.Module, length: int = 3, seed: int = 5) -> PromptedModel:
    torch.manual_seed(seed)
    return PromptedModel(model, SoftPrompt.random(model, length))


def single_rows(model: nn.Module, batch: Batch, offset: Tensor | None = None) -> Tensor:
    """Logits [N, V] of the model's own forward, one unpadded row at a time, behind the soft prompt if any."""
    inner: Any = model.model if isinstance(model, PromptedModel) else model
    found = []
    for row in range(batch.size):
        start, stop = int(batch["prompt_length"][row]), int(batch["length"][row])
        embedded = inner.get_input_embeddings()(batch["input_ids"][row : row + 1, :stop])
        k = 0
        if isinstance(model, PromptedModel):
            embedded = torch.cat([model.prompt.vectors[None], embedded], dim=1)
            k = model.prompt.length
        positions = torch.arange(stop + k)[None] + (0 if offset is None else offset[row])
        logits = inner(inputs_embeds=embedded, position_ids=positions).logits[0, k:]
        found.append(logits[start - 1 : stop - 1])
    return torch.cat(found)


class Scaled(type(tiny_gpt2(0))):  # type: ignore[misc]
    """A GPT-2 that scales its logits after the head, as Cohere and Granite do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 0.5 * out.logits
        return out


class Capped(type(tiny_gpt2(0))):  # type: ignore[misc]
    """A GPT-2 that caps its logits after the head, as Gemma 2 does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out


# ---------------------------------------------------------------------------------------- soft prompts
@pytest.mark.parametrize(
    ("length", "expected"), [(2, [3, 9]), (3, [3, 9, 4]), (5, [3, 9, 4, 3, 9]), (7, [3, 9, 4, 3, 9, 4, 3])]
)
def test_text_is_repeated_and_cut(length: int, expected: list[int]) -> None:
    model = tiny_gpt2(1)
    prompt = SoftPrompt.from_ids(model, [3, 9, 4], length)
    assert prompt.length == length
    assert torch.equal(prompt.vectors, model.transformer.wte.weight[expected])
    with torch.no_grad():
        prompt.vectors += 1  # a copy: the model's table stays
    assert not torch.equal(prompt.vectors, model.transformer.wte.weight[expected])


@pytest.mark.parametrize(("ids", "length"), [([], 3), ([1], 0), ([1], -1)])
def test_no_text_or_no_length_is_refused(ids: list[int], length: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SoftPrompt.from_ids(tiny_gpt2(1), ids, length)


def test_random_start_is_standard_normal_from_the_seeded_stream() -> None:
    model = tiny_gpt2(1, width=64)
    torch.manual_seed(3)
    first, second = SoftPrompt.random(model, 50), SoftPrompt.random(model, 50)
    torch.manual_seed(3)
    again = SoftPrompt.random(model, 50)
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, second.vectors)
    assert first.vectors.shape == (50, 64)
    assert abs(float(first.vectors.detach().mean())) < 0.1
    assert abs(float(first.vectors.detach().std()) - 1) < 0.1


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_vectors_are_kept_in_float32_at_least(dtype: torch.dtype, kept: torch.dtype) -> None:
    model = tiny_gpt2(1).to(dtype)
    assert SoftPrompt.from_ids(model, [1, 2], 3).vectors.dtype == kept
    assert SoftPrompt.random(model, 3).vectors.dtype == kept
    logits = predict(PromptedModel(model, SoftPrompt.from_ids(model, [1], 2)), ragged_rows()).logits()
    assert logits.dtype == kept


def test_only_the_prompt_of_a_frozen_model_gets_a_gradient() -> None:
    model = tiny_gpt2(1).requires_grad_(False)
    behind = prompted(model)
    assert [name for name, p in behind.named_parameters() if p.requires_grad] == ["prompt.vectors"]
    cross_entropy(predict(behind, ragged_rows())).sum().backward()
    assert behind.prompt.vectors.grad is not None
    assert bool((behind.prompt.vectors.grad.abs().sum(1) > 0).all())
    assert behind.config is model.config


# ----------------------------------------------------------------------------------------- predictions
@pytest.mark.parametrize("kind", [type(tiny_gpt2(0)), Scaled, Capped])
@pytest.mark.parametrize("soft", [0, 1, 4])
def test_logits_are_the_models_own_at_the_targets(kind: type[Any], soft: int) -> None:
    """Padding is EOS, responses end in EOS, and rows are ragged; no row sees the padding or another row."""
    model: Any = kind(tiny_gpt2(1, width=16, layers=2).config).double().eval()
    if soft:
        model = prompted(model, soft)
    batch = ragged_rows()
    q = predict(model, batch)
    assert len(q) == int((batch["length"] - batch["prompt_length"]).sum())
    assert torch.equal(q.targets, target_tokens(batch))
    torch.testing.assert_close(q.logits(), single_rows(model, batch), rtol=1e-12, atol=1e-12)
    assert torch.equal(q.logits(3, 7), q.logits()[3:7])
    wide = torch.cat([batch["input_ids"], torch.full((batch.size, 6), 7)], dim=1)
    again = predict(model, batch.replace(input_ids=wide))
    torch.testing.assert_close(again.logits(), q.logits(), rtol=1e-12, atol=1e-12)


def test_a_plain_model_is_split_and_one_that_changes_its_logits_is_not() -> None:
    config = tiny_gpt2(1).config
    assert CausalLM(tiny_gpt2(1)).split
    assert not CausalLM(Scaled(config).double()).split
    assert not CausalLM(Capped(config).double()).split


def test_the_probe_leaves_every_modules_mode() -> None:
    model = tiny_gpt2(1).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert CausalLM(model).split
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("soft", [0, 3])
def test_positions_can_be_shifted_by_row(soft: int) -> None:
    model: Any = tiny_gpt2(1)
    if soft:
        model = prompted(model, soft)
    batch = ragged_rows()
    offset = torch.tensor([0, 3, 5, 1, 2])
    shifted = predict(model, batch.replace(position_offset=offset)).logits()
    torch.testing.assert_close(shifted, single_rows(model, batch, offset), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(shifted, single_rows(model, batch))


@pytest.mark.parametrize("kind", [type(tiny_gpt2(0)), Capped])
def test_the_vocabulary_is_cut_to_the_shared_ids(kind: type[Any]) -> None:
    model: Any = kind(tiny_gpt2(1).config).double().eval()
    whole = predict(model, ragged_rows()).logits()
    model.config.kdbench_vocab = 9
    q = predict(model, ragged_rows())
    assert q.vocab == 9
    torch.testing.assert_close(q.logits(), whole[:, :9], rtol=1e-14, atol=1e-15)


def test_models_of_different_vocabularies_compare_on_the_shared_ids() -> None:
    student, teacher = tiny_gpt2(1), tiny_gpt2(2)
    batch = make_rows([[3, 4], [5]], [[5, 6, EOS], [7, EOS]])
    student.config.kdbench_vocab = teacher.config.kdbench_vocab = 9

    def log_probs(model: nn.Module) -> Array:
        logits = single_rows(model, batch)[:, :9].detach().numpy()
        return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))

    p, q = log_probs(teacher), log_probs(student)
    expected = (np.exp(p) * (p - q)).sum(-1)
    found = forward_kl(predict(student, batch), predict(teacher, batch)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_prediction_without_gradients_gives_none_to_the_head_either() -> None:
    """The head is projected later, when gradients are on again: a fixed model must stay out of it."""
    student, teacher = tiny_gpt2(1), tiny_gpt2(2)
    with torch.no_grad():
        fixed = predict(student, ragged_rows())
    moving = predict(teacher, ragged_rows())
    forward_kl(moving, fixed).sum().backward()
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in teacher.parameters())
    assert not fixed.logits().requires_grad


def test_no_rows_give_no_positions() -> None:
    for model in (tiny_gpt2(1), prompted(tiny_gpt2(1))):
        q = predict(model, ragged_rows().rows([]))
        assert len(q) == 0
        assert float(forward_kl(q, q).sum()) == 0.0


def test_a_row_without_a_response_has_no_target() -> None:
    batch = make_rows([[3, 4], [5], [6, 7]], [[5, EOS], [], [EOS]])
    q = predict(tiny_gpt2(1), batch)
    assert q.targets.tolist() == [5, EOS, EOS]
    torch.testing.assert_close(q.logits(), single_rows(tiny_gpt2(1), batch), rtol=1e-12, atol=1e-12)
