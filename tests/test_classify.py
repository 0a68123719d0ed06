"""Class logits and states against the model's own outputs on single unpadded rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from class_kit import (
    class_rows,
    otherwise_padded,
    row_logits,
    row_states,
    tiny_bert,
    tiny_roberta,
    without_head,
)
from torch import Tensor

from kdbench.classify import all_states, chosen_logits, class_logits, classified, mask_logits, mlm_head
from kdbench.distiller import Batch

FAMILIES = {"bert": tiny_bert, "roberta": tiny_roberta}
CASES = [
    (family, head, segments)
    for family in FAMILIES
    for head, segments in (("sequence", False), ("masked_lm", False), ("masked_lm", True))
]


def model_of(family: str, head: str, own_head: bool = True) -> Any:
    model = FAMILIES[family](3, head, 3, layers=3)
    return model if own_head else without_head(model)


def rows_of(family: str, head: str, segments: bool = False) -> Batch:
    return class_rows(head, 3, roles=(), families={"student": family}, segments=segments)


def places(rows: Batch) -> list[int]:
    found: list[int] = rows["mask_index"].tolist() if "mask_index" in rows else [0] * rows.size
    return found


def everything(model: Any, rows: Batch) -> dict[str, Tensor]:
    """All that is read of the rows; states beyond a row's end are left out."""
    with torch.no_grad():
        seen, states = classified(model, rows), all_states(model, rows)
        real = torch.arange(states[0].shape[1]) < rows["length"][:, None]
        found = {
            "class_logits": class_logits(model, rows),
            "classified": seen.logits,
            "states": seen.states,
            **{f"state {layer}": state[real] for layer, state in enumerate(states)},
        }
        if seen.whole is not None:
            chosen = (
                torch.arange(rows["input_ids"][:, : real.shape[1]].shape[1]) == rows["mask_index"][:, None]
            )
            found |= {"whole": seen.whole, "mask_logits": mask_logits(model, rows)}
            found["chosen_logits"] = chosen_logits(model, rows, chosen)
    return found


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize(("family", "head", "segments"), CASES)
def test_they_are_the_models_own(family: str, head: str, segments: bool, own_head: bool) -> None:
    """Whether or not the head can be told apart from the model."""
    model, rows = model_of(family, head, own_head), rows_of(family, head, segments)
    assert head == "sequence" or (mlm_head(model) is not None) == own_head
    found, states = everything(model, rows), row_states(model, rows)
    for name in ("class_logits", "classified"):
        assert np.allclose(found[name].numpy(), row_logits(model, rows), rtol=0, atol=1e-12)
    at = np.stack([one[:, place] for one, place in zip(states, places(rows), strict=True)])
    assert np.allclose(found["states"].numpy(), at, rtol=0, atol=1e-12)
    for layer in range(4):
        own = np.concatenate([one[layer] for one in states])
        assert np.allclose(found[f"state {layer}"].numpy(), own, rtol=0, atol=1e-12)
    if head == "sequence":
        assert classified(model, rows).whole is None
        return
    every = rows.replace(verbalizer_ids=torch.arange(model.config.vocab_size).repeat(rows.size, 1))
    for name in ("whole", "mask_logits", "chosen_logits"):
        assert np.allclose(found[name].numpy(), row_logits(model, every), rtol=0, atol=1e-12)
    assert torch.equal(found["classified"], found["whole"].gather(1, rows["verbalizer_ids"]))


@pytest.mark.parametrize(("family", "head", "segments"), CASES)
def test_neither_width_nor_content_of_the_padding_changes_anything(
    family: str, head: str, segments: bool
) -> None:
    model, rows = model_of(family, head), rows_of(family, head, segments)
    found = everything(model, rows)
    for seed in (0, 1):
        other = everything(model, otherwise_padded(rows, seed))
        assert other.keys() == found.keys()
        for name, value in found.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("segments", [False, True])
def test_segments_are_read_by_a_model_that_has_several(segments: bool) -> None:
    rows = rows_of("bert", "masked_lm", segments)
    one = rows.replace(segment_ids=torch.zeros_like(rows["input_ids"]))
    model = model_of("bert", "masked_lm")
    same = torch.equal(class_logits(model, rows), class_logits(model, one))
    assert same == (not segments)


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize(("family", "head", "segments"), CASES)
def test_no_row_gives_no_row(family: str, head: str, segments: bool, own_head: bool) -> None:
    model, rows = model_of(family, head, own_head), rows_of(family, head, segments)
    none, width = rows.rows([]), model.config.hidden_size
    seen, states = classified(model, none), all_states(model, none)
    assert class_logits(model, none).shape == seen.logits.shape == (0, 3)
    assert seen.states.shape == (0, 4, width)
    assert [state.shape for state in states] == [(0, rows["input_ids"].shape[1], width)] * 4
    assert {state.dtype for state in (seen.states, *states)} == {torch.float64}
    if head == "sequence":
        assert seen.whole is None
    else:
        assert seen.whole is not None
        assert seen.whole.shape == mask_logits(model, none).shape == (0, model.config.vocab_size)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_only_the_masks_states_go_through_the_head(family: str) -> None:
    model, rows, seen = model_of(family, "masked_lm"), rows_of(family, "masked_lm"), []
    head = mlm_head(model)
    assert head is not None
    assert head is {"bert": lambda: model.cls, "roberta": lambda: model.lm_head}[family]()
    head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    for run in (class_logits, classified, mask_logits):
        run(model, rows)  # type: ignore[operator]
    assert seen == [(6, model.config.vocab_size)] * 3
    all_states(model, rows)
    assert len(seen) == 3, "states need no head"


@pytest.mark.parametrize("own_head", [True, False])
def test_looking_for_the_head_restores_every_mode_and_happens_once(own_head: bool) -> None:
    model, calls = model_of("bert", "masked_lm", own_head), []
    model.train()
    model.bert.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    model.bert.register_forward_hook(lambda *_: calls.append(1))
    assert (mlm_head(model) is not None) == own_head
    tries = len(calls)
    assert tries
    mlm_head(model)
    assert len(calls) == tries
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("family", "head", "segments"), CASES)
def test_half_precision_gives_float32_logits(family: str, head: str, segments: bool) -> None:
    model, rows = model_of(family, head).float(), rows_of(family, head, segments)
    with torch.autocast("cpu", torch.bfloat16):
        seen = classified(model, rows)
        assert class_logits(model, rows).dtype == seen.logits.dtype == torch.float32
        assert seen.whole is None or seen.whole.dtype == torch.float32
