"""Probe banks against the model's own head, copied layer by layer, and against plain numpy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from class_kit import class_rows, row_logits, tiny_bert, tiny_roberta
from method_kit import tiny_gpt2
from probe_kit import numpy_logits
from torch import Tensor, nn

from kdbench.classify import classified, mlm_head
from kdbench.probes import ProbeBank

FAMILIES = ["bert", "roberta"]
KINDS = ["head_copy", "linear", "frozen_head"]


def model_of(family: str, layers: int = 4, classes: int = 3) -> Any:
    tiny = tiny_bert if family == "bert" else tiny_roberta
    model = tiny(3, "masked_lm", classes=classes, layers=layers)
    head: Any = mlm_head(model)
    with torch.no_grad():  # biases start at 0
        getattr(head, "predictions", head).decoder.bias.copy_(torch.linspace(-1, 1, model.config.vocab_size))
    return model


def rows_of(family: str, classes: int = 3) -> Any:
    return class_rows("masked_lm", classes=classes, roles=(), families={"student": family})


def bank_of(model: Any, family: str, kind: str = "head_copy", spread: float = 0.3) -> ProbeBank:
    """A bank whose probes have been moved apart."""
    bank = ProbeBank(model, model.config.num_labels, kind)  # type: ignore[arg-type]
    bank.set_label_words(model, rows_of(family)["verbalizer_ids"][0])
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in bank.parameters():
            param += spread * torch.randn(param.shape, generator=draw, dtype=param.dtype)
    return bank


def inner(model: Any, rows: Any) -> Tensor:
    with torch.no_grad():
        return classified(model, rows).states[:, 1:-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_each_probe_alone(family: str, kind: str) -> None:
    model = model_of(family)
    bank, states = bank_of(model, family, kind), inner(model, rows_of(family))
    logits = numpy_logits(bank, states.numpy())
    assert np.allclose(bank.logits(states).detach().numpy(), logits, atol=1e-12)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = bank.probabilities(states)
    assert found.shape == (6, 3, 3)
    assert np.allclose(found.detach().numpy(), expected, atol=1e-12)
    assert np.abs(expected[:, 0] - expected[:, 1]).max() > 1e-2, "two layers are alike"
    assert np.allclose(bank.mean(states).detach().numpy(), expected.mean(1), atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_copy_is_the_models_own_head(family: str) -> None:
    """On the last state every probe gives the model's class logits, on inner states the head's."""
    model, rows = model_of(family), rows_of(family)
    for kind in ("head_copy", "frozen_head"):
        bank = bank_of(model, family, kind, spread=0.0)
        with torch.no_grad():
            states = classified(model, rows).states
            last = bank.logits(states[:, -1:].expand(-1, 3, -1))
            head: Any = mlm_head(model)
            lens = head(states[:, 1:-1])[:, :, rows["verbalizer_ids"][0]]
        assert np.allclose(last.numpy(), row_logits(model, rows)[:, None], atol=1e-12)
        assert torch.allclose(bank.logits(states[:, 1:-1]), lens, atol=1e-12)


def test_a_bank_that_was_moved_is_the_deep_copied_head_with_its_weights() -> None:
    model, rows = model_of("roberta"), rows_of("roberta")
    bank, states = bank_of(model, "roberta"), inner(model, rows)
    for j in range(3):
        head = copy.deepcopy(model.lm_head)
        with torch.no_grad():
            head.dense.weight.copy_(bank.dense_weight[j])
            head.dense.bias.copy_(bank.dense_bias[j])
            head.layer_norm.weight.copy_(bank.norm_weight[j])
            head.layer_norm.bias.copy_(bank.norm_bias[j])
            head.decoder = nn.Linear(12, 3, dtype=torch.float64)
            head.decoder.weight.copy_(model.lm_head.decoder.weight[rows["verbalizer_ids"][0]])
            head.decoder.bias.copy_(bank.bias[j])
            assert torch.allclose(bank.logits(states)[:, j], head(states[:, j]), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_known_before_the_label_words(kind: str) -> None:
    model = model_of("bert")
    bank = ProbeBank(model, 3, kind)  # type: ignore[arg-type]
    before = {name: value.shape for name, value in bank.state_dict().items()}
    bank.set_label_words(model, torch.tensor([4, 9, 2]))
    assert {name: value.shape for name, value in bank.state_dict().items()} == before
    trainable = {name for name, _ in bank.named_parameters()}
    whole = {"dense_weight", "dense_bias", "norm_weight", "norm_bias", "bias"}
    assert trainable == {
        "head_copy": whole,
        "linear": {*whole, "weight"} - {"dense_weight", "dense_bias"},
    }.get(kind, set())
    assert ("rows" in dict(bank.named_buffers())) == (kind != "linear")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("j", [1, 2, 3])
def test_a_probe_reaches_the_layers_below_it_and_no_other(family: str, j: int) -> None:
    model, rows = model_of(family), rows_of(family)
    bank = bank_of(model, family)
    states = classified(model, rows).states[:, 1:-1]
    bank.logits(states)[:, j - 1, 0].sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    layers = {int(name.split("layer.")[1].split(".")[0]) for name in touched if "layer." in name}
    assert layers == set(range(j))
    assert any("embeddings.word" in name for name in touched)
    head = {"bert": ("cls.predictions.transform",), "roberta": ("lm_head.dense", "lm_head.layer_norm")}[
        family
    ]
    assert not any(name.startswith(head) for name in touched)
    rest = model.get_input_embeddings().weight.grad  # tied to the decoder, whose label rows are copies
    used = set(rows["input_ids"].flatten().tolist())
    assert not rest[[i for i in range(len(rest)) if i not in used]].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_a_bank_leaves_the_model_and_the_label_rows_alone(family: str) -> None:
    model, rows = model_of(family), rows_of(family)
    model.requires_grad_(False)
    kept = copy.deepcopy(model.state_dict())
    bank, states = bank_of(model, family), inner(model, rows)
    label_rows = bank.rows.clone()
    assert torch.equal(label_rows, model.get_input_embeddings().weight[rows["verbalizer_ids"][0]])
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.05)
    moved = copy.deepcopy(bank.state_dict())
    losses = []
    for _ in range(30):
        labels = rows["class_label"][:, None].expand(-1, 3)
        loss = nn.functional.cross_entropy(bank.logits(states).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert torch.equal(bank.rows, label_rows)
    changed = {name for name, value in bank.state_dict().items() if not torch.equal(value, moved[name])}
    assert changed == {name for name, _ in bank.named_parameters()}


def test_one_probes_loss_does_not_move_another() -> None:
    model = model_of("bert")
    bank = bank_of(model, "bert")
    bank.logits(inner(model, rows_of("bert")))[:, 1].sum().backward()
    for name, param in bank.named_parameters():
        assert param.grad is not None
        assert [bool(param.grad[j].any()) for j in range(3)] == [False, True, False], name


def test_half_precision_states_give_float32_probabilities() -> None:
    model = model_of("bert").float()
    bank = ProbeBank(model, 3)
    with torch.autocast("cpu", torch.bfloat16):
        states = torch.randn(2, 3, 8)
        assert bank.logits(states).dtype == bank.probabilities(states).dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (lambda: tiny_gpt2(1, layers=2), "head_copy", "GPT2LMHeadModel of type 'gpt2'"),
        (lambda: tiny_bert(1, "sequence", layers=2), "head_copy", "BertForSequenceClassification"),
        (lambda: nn.Linear(2, 2), "linear", "of a Linear"),
        (lambda: tiny_bert(1, "masked_lm", layers=1), "head_copy", "one layer"),
        (lambda: tiny_bert(1, "masked_lm", layers=2), "copy", "none of head_copy, linear, frozen_head"),
    ],
)
def test_what_has_no_such_head_is_refused(model: Any, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeBank(model(), 2, kind)
