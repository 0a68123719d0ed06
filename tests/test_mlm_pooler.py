"""mlm_pooler: both terms against numpy, what is asked of the pooler, and that it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_kit import FakeStep, log_softmax
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel

from kdbench.distiller import Batch
from kdbench.distillers._masking import NONE
from kdbench.distillers.mlm_pooler import MLMPooler
from kdbench.registry import load_distiller

V, PAD, CLS, SEP, MASK = 40, 0, 1, 2, 3
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def tiny(kind: str = "bert") -> Any:
    """A random encoder in float64, in eval mode."""
    config: Any = (BertConfig if kind == "bert" else ElectraConfig)(
        vocab_size=V, max_position_embeddings=64, initializer_range=0.3, pad_token_id=PAD, **SIZES
    )
    config.mask_token_id = MASK
    torch.manual_seed(1)
    return (BertModel if kind == "bert" else ElectraModel)(config).double().eval()


def rows(*lengths: int, width: int | None = None, **fields: Any) -> Batch:
    draw = torch.Generator().manual_seed(5)
    ids = torch.full((len(lengths), width or max(lengths)), PAD)
    for row, length in enumerate(lengths):
        words = torch.randint(4, V, (length - 2,), generator=draw)
        ids[row, :length] = torch.tensor([CLS, *words.tolist(), SEP])
    return Batch(
        {
            "example_id": torch.arange(len(lengths)) + 70,
            "input_ids": ids,
            "length": torch.tensor(lengths),
            "segment_ids": torch.zeros_like(ids),
            "cloze_index": torch.full((len(lengths),), -1),
            **fields,
        }
    )


def make(**settings: Any) -> MLMPooler:
    return MLMPooler(MLMPooler.Config(**settings), tiny()).eval()


def test_it_is_registered() -> None:
    assert load_distiller("mlm_pooler") is MLMPooler


def test_both_terms_are_those_of_numpy() -> None:
    method, step = make(bag_weight=0.7), FakeStep()
    method.train_step(rows(9, 6, width=12), step)  # type: ignore[arg-type]
    ((_, batch),) = step.updated
    value = method.loss(batch, FakeStep()).item()  # type: ignore[arg-type]
    encoder: Any = method.student
    masked, bags = [], []
    for i, length in enumerate([9, 6]):
        with torch.no_grad():  # alone, without padding
            out = encoder(input_ids=batch["input_ids"][i : i + 1, :length])
            hidden = method.transform(out.last_hidden_state)[0].numpy()
            pooled = method.bag(out.pooler_output)[0].numpy()
        table, bias = encoder.get_input_embeddings().weight.detach().numpy(), method.bias.detach().numpy()
        log_q = log_softmax(hidden @ table.T + bias)
        target = batch["targets"][i, :length].numpy()
        masked += [-log_q[t, target[t]] for t in range(length) if target[t] != NONE]
        words = rows(9, 6, width=12)["input_ids"][i, 1 : length - 1].numpy()
        bags.append(-log_softmax(pooled)[words].mean())
    assert len(masked) == 2
    assert value == pytest.approx(np.mean(masked) + 0.7 * np.mean(bags), rel=1e-9)


def test_the_pooler_sees_what_is_masked_not_the_words() -> None:
    method, step = make(mask_share=1.0, replaced_at_random=0.0, replaced_by_mask=1.0), FakeStep()
    method.train_step(rows(9), step)  # type: ignore[arg-type]
    ((_, batch),) = step.updated
    assert (batch["input_ids"][0, 1:8] == MASK).all()
    assert batch["bag"][0].tolist() == [NONE, *rows(9)["input_ids"][0, 1:8].tolist(), NONE]


def test_where_a_task_gives_bag_ids_the_pooler_is_asked_for_those() -> None:
    asked = torch.tensor([[-1, 2, -1, 2, 5, -1, -1]])
    method, step = make(), FakeStep()
    method.train_step(rows(7, bag_ids=asked), step)  # type: ignore[arg-type]
    ((_, batch),) = step.updated
    told = FakeStep()
    method.loss(batch, told)  # type: ignore[arg-type]
    encoder: Any = method.student
    with torch.no_grad():
        pooled = method.bag(encoder(input_ids=batch["input_ids"]).pooler_output)[0].numpy()
    log_b = log_softmax(pooled)
    assert told.terms["bag"] == pytest.approx(-(2 * log_b[2] + log_b[5]) / 3, rel=1e-9)


def test_a_row_without_anything_to_ask_costs_nothing() -> None:
    method, step = make(), FakeStep()
    method.train_step(rows(5, bag_ids=torch.full((1, 5), -1)), step)  # type: ignore[arg-type]
    told = FakeStep()
    method.loss(step.updated[0][1], told)  # type: ignore[arg-type]
    assert told.terms["bag"] == 0.0


def test_the_pooler_is_trained_and_without_the_term_it_is_not() -> None:
    for weight, moves in ((1.0, True), (0.0, False)):
        method, step = make(bag_weight=weight), FakeStep()
        method.train_step(rows(9, 6), step)  # type: ignore[arg-type]
        encoder: Any = method.student
        grad = encoder.pooler.dense.weight.grad
        assert bool(grad is not None and grad.abs().sum() > 0) == moves


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="no pooler"):
        MLMPooler(MLMPooler.Config(), tiny("electra"))
    with pytest.raises(ValueError, match=r"bag_weight = -1"):
        MLMPooler.Config(bag_weight=-1)
    with pytest.raises(ValueError, match="mask_share = 0"):
        MLMPooler.Config(mask_share=0)
    without = tiny()
    without.config.mask_token_id = None
    with pytest.raises(ValueError, match="no mask_token_id"):
        MLMPooler(MLMPooler.Config(), without)


def test_it_learns_what_kinds_of_words_a_text_has() -> None:
    method = make()
    optimizer = torch.optim.Adam(method.parameters(), lr=0.02)
    first = last = 0.0
    for visit in range(60):
        step = FakeStep(visit=visit)
        kinds = torch.tensor([[-1, 4, 4, 4, -1], [-1, 9, 9, 9, -1]])
        ids = torch.tensor([[CLS, 10, 11, 12, SEP], [CLS, 20, 21, 22, SEP]])
        batch = rows(5, 5, bag_ids=kinds).replace(input_ids=ids)
        optimizer.zero_grad()
        method.train_step(batch, step)  # type: ignore[arg-type]
        optimizer.step()
        last = step.terms["bag"]
        first = first or last
    assert first > 2
    assert last < 0.5
