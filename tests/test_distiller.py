"""Batch, Totals, masks, Store and means: the laws every method stands on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_kit import EOS, make_rows, ragged_rows, tiny_gpt2
from torch import nn

from kdbench.distiller import (
    Batch,
    Distiller,
    Store,
    Totals,
    example_mean,
    freeze,
    gather_targets,
    scatter_targets,
    target_mask,
    target_tokens,
    token_mean,
)


def test_a_batch_is_a_mapping_of_equal_rows() -> None:
    rows = ragged_rows()
    assert (rows.size, len(rows), set(rows)) == (5, 4, {"example_id", "input_ids", "prompt_length", "length"})
    with pytest.raises(ValueError, match="'a': 2, 'b': 3"):
        Batch({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="at least one field"):
        Batch({})


def test_targets_are_the_response_tokens_with_eos_whatever_the_padding() -> None:
    rows = ragged_rows()  # padded with EOS
    expected = [5, 6, EOS, 7, 8, 9, 10, 11, EOS, EOS, 12, 1, 2, EOS]
    assert target_tokens(rows).tolist() == expected
    assert int(target_mask(rows).sum()) == rows.counts().tokens == len(expected)
    padding = torch.arange(rows["input_ids"].shape[1]) >= rows["length"][:, None]
    other = rows.replace(input_ids=rows["input_ids"].masked_fill(padding, 7))
    assert torch.equal(target_mask(other), target_mask(rows))
    assert target_tokens(other).tolist() == expected


def test_mask_marks_the_position_before_each_target() -> None:
    mask = target_mask(make_rows([[3, 4]], [[5, EOS]]))  # four tokens, one of padding
    assert mask.tolist() == [[False, True, True, False]]


def test_a_first_token_has_no_position_before_it() -> None:
    rows = make_rows([[3]], [[5]]).replace(prompt_length=torch.tensor([0]))
    assert target_mask(rows).tolist() == [[True, False]]


def test_scatter_and_gather_undo_each_other() -> None:
    rows = ragged_rows()
    values = torch.arange(1.0, 15.0)
    laid_out = scatter_targets(values, rows)
    assert laid_out.shape == target_mask(rows).shape
    assert torch.equal(laid_out != 0, target_mask(rows))
    assert torch.equal(gather_targets(laid_out, rows), values)
    wider = torch.nn.functional.pad(laid_out, (0, 4), value=9.0)
    assert torch.equal(gather_targets(wider, rows), values)


def test_means_of_parts_sum_to_the_mean_of_the_whole() -> None:
    rows = ragged_rows()
    tokens, examples = torch.randn(14, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    laid_out = scatter_targets(tokens, rows)
    for cuts in ([[0], [1], [2], [3], [4]], [[4, 2], [0, 3, 1]], [[], [0, 1, 2, 3, 4]]):
        parts = [rows.rows(cut).with_totals(rows.totals) for cut in cuts]
        of_tokens = [
            token_mean(gather_targets(laid_out[cut], part), part)
            for cut, part in zip(cuts, parts, strict=True)
        ]
        of_examples = [example_mean(examples[cut], part) for cut, part in zip(cuts, parts, strict=True)]
        torch.testing.assert_close(sum(of_tokens), tokens.mean(), rtol=0, atol=1e-15)
        torch.testing.assert_close(sum(of_examples), examples.mean(), rtol=0, atol=1e-15)


def test_totals_are_the_rows_own_until_they_are_set() -> None:
    rows = ragged_rows()
    assert rows.totals == Totals(14, 5)
    assert rows.rows([0, 2]).totals == Totals(4, 2)
    update = rows.with_totals(Totals(100, 50))
    assert update.rows([0]).totals == update.replace(extra=torch.zeros(5)).totals == Totals(100, 50)
    assert update.rows([0]).counts() == Totals(3, 1)
    assert update.with_totals(None).totals == Totals(14, 5)
    assert Batch({"x": torch.zeros(3)}).totals == Totals(3, 3)


def test_no_targets_give_zero_not_nan() -> None:
    rows = ragged_rows().rows([])
    assert float(token_mean(torch.zeros(0), rows)) == 0.0
    assert float(example_mean(torch.zeros(0), rows)) == 0.0


def test_rows_by_slice_list_and_tensor() -> None:
    rows = ragged_rows()
    for index in (slice(1, 3), [1, 2], torch.tensor([1, 2])):
        assert rows.rows(index)["example_id"].tolist() == [101, 102]
    assert rows.rows([]).size == 0


def test_cat_pads_to_the_widest_and_keeps_targets() -> None:
    first, second = make_rows([[3]], [[5, EOS]]), make_rows([[3, 4, 5, 6]], [[7, 8, 9]])
    joined = Batch.cat([first, second])
    assert joined["input_ids"].shape == (2, 8)
    assert target_tokens(joined).tolist() == [5, EOS, 7, 8, 9]
    assert joined["input_ids"][0, 4:].tolist() == [0, 0, 0, 0]
    assert torch.equal(Batch.cat([second])["input_ids"], second["input_ids"])
    with pytest.raises(ValueError, match="no batches"):
        Batch.cat([])


def test_save_and_load_keep_every_field(tmp_path: Path) -> None:
    rows = ragged_rows().replace(
        finished=torch.tensor([True, True, True, False, True]), score=torch.randn(5, 3).T.T
    )
    rows.save(tmp_path / "rows.safetensors")
    found = Batch.load(tmp_path / "rows.safetensors")
    assert set(found) == set(rows)
    for name, value in rows.items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_a_store_keeps_batches_in_order() -> None:
    store = Store()
    assert (store.size, store.batches()) == (0, [])
    store.add(ragged_rows())
    store.add(make_rows([[3]], [[4]]))
    assert store.size == 6
    assert [batch.size for batch in store.batches()] == [5, 1]
    store.clear()
    assert store.size == 0


def test_the_default_distiller_freezes_its_teacher_and_trains_its_student() -> None:
    class Probe(Distiller):
        def __init__(self, cfg: object, student: nn.Module, teacher: nn.Module) -> None:
            super().__init__(cfg, student, teacher)
            self.probe = nn.Linear(2, 2)

    probe = Probe(Probe.Config(), tiny_gpt2(1), tiny_gpt2(2).train())
    names = [name for name, _ in probe.groups()["student"].params]
    assert {"probe.weight", "student.transformer.wte.weight"} <= set(names)
    assert not any(name.startswith("teacher") for name in names)
    assert not any(module.training for module in probe.teacher.modules())
    assert probe.predictor() is probe.student
    assert probe.breaks() == {}
    with pytest.raises(NotImplementedError, match="Probe"):
        probe.loss(ragged_rows(), None)  # type: ignore[arg-type]


def test_freeze_returns_its_model_in_eval_mode() -> None:
    model = tiny_gpt2(1).train()
    assert freeze(model) is model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
