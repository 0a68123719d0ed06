"""MLM: which tokens are chosen, what becomes of them, the loss against the model's own logits, learning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from method_kit import FakeStep
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from kdbench.config import TrainingConfig
from kdbench.distiller import Batch
from kdbench.distillers.mlm import MLM
from kdbench.harness import BatchSource, Trainer
from kdbench.registry import load_distiller

V, PAD, CLS, SEP, MASK = 40, 0, 1, 2, 3
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def tiny(kind: str = "bert") -> Any:
    """A random encoder in float64, its configuration with dropout."""
    config: Any = (BertConfig if kind == "bert" else RobertaConfig)(
        vocab_size=V, max_position_embeddings=64, initializer_range=0.3, pad_token_id=PAD, **SIZES
    )
    config.mask_token_id = MASK
    torch.manual_seed(1)
    return (BertForMaskedLM if kind == "bert" else RobertaForMaskedLM)(config).double().eval()


def make(kind: str = "bert", **settings: Any) -> MLM:
    return MLM(MLM.Config(**settings), tiny(kind))


def rows(*lengths: int, cloze: dict[int, int] | None = None, width: int | None = None) -> Batch:
    """Rows of random words between CLS and SEP; `cloze` gives the positions that are masked for certain."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.full((len(lengths), width or max(lengths)), PAD)
    for row, length in enumerate(lengths):
        words = torch.randint(4, V, (length - 2,), generator=draw)
        ids[row, :length] = torch.tensor([CLS, *words.tolist(), SEP])
    places = torch.full((len(lengths),), -1)
    for row, place in (cloze or {}).items():
        places[row] = place
    return Batch(
        {
            "example_id": torch.arange(len(lengths)) + 70,
            "input_ids": ids,
            "length": torch.tensor(lengths),
            "cloze_index": places,
        }
    )


def test_it_is_registered_with_the_papers_shares() -> None:
    assert load_distiller("mlm") is MLM
    cfg = MLM.Config()
    assert (cfg.mask_share, cfg.replaced_by_mask, cfg.replaced_at_random) == (0.15, 0.8, 0.1)


def test_a_share_of_each_row_is_chosen_but_no_mark_and_no_padding() -> None:
    batch = rows(3, 12, 42, 22, width=50)
    made = make().masked(batch, FakeStep())
    chosen = made["targets"] >= 0
    assert chosen.sum(1).tolist() == [1, 2, 6, 3]  # 15 % of 1, 10, 40 and 20, rounded, one at least
    place = torch.arange(50)
    assert not (chosen & ((place == 0) | (place >= batch["length"][:, None] - 1))).any()
    assert torch.equal(made["targets"][chosen], batch["input_ids"][chosen])
    assert torch.equal(made["input_ids"][~chosen], batch["input_ids"][~chosen])


def test_a_row_without_words_has_no_target() -> None:
    made = make().masked(rows(2, 5), FakeStep())
    assert (made["targets"] >= 0).sum(1).tolist() == [0, 1]


def test_a_cloze_is_always_the_mask_and_counts_as_one() -> None:
    batch = rows(22, 22, 22, cloze={0: 4, 2: 20})
    for settings in ({}, {"replaced_by_mask": 0.0}, {"replaced_by_mask": 0.0, "replaced_at_random": 1.0}):
        made = make(**settings).masked(batch, FakeStep())
        assert (made["targets"] >= 0).sum(1).tolist() == [3, 3, 3]
        for row, place in ((0, 4), (2, 20)):
            assert int(made["input_ids"][row, place]) == MASK
            assert int(made["targets"][row, place]) == int(batch["input_ids"][row, place])


def test_shares_of_what_tokens_become() -> None:
    batch = rows(*[42] * 400)
    made = make(mask_share=0.5).masked(batch, FakeStep())
    chosen = made["targets"] >= 0
    seen, was = made["input_ids"][chosen], made["targets"][chosen]
    assert len(seen) == 8000
    by_mask, kept = (seen == MASK).double().mean().item(), (seen == was).double().mean().item()
    # a random token is the one that was there once in V - 2 times, never the mask or the padding
    for share, expected in ((by_mask, 0.8), (kept, 0.1 + 0.1 / (V - 2))):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 8000)
    random = seen[(seen != MASK) & (seen != was)]
    assert set(random.tolist()) == set(range(V)) - {MASK, PAD}
    places = chosen.double().mean(0)[1:41]
    assert (places - 0.5).abs().max() < 5 * 0.5 / math.sqrt(400)


@pytest.mark.parametrize(("pad", "mask"), [(0, 3), (38, 39), (39, 0), (17, 16), (None, 5)])
def test_a_random_token_is_any_but_padding_and_mask(pad: int | None, mask: int) -> None:
    model = tiny()
    model.config.pad_token_id, model.config.mask_token_id = pad, mask
    mlm = MLM(MLM.Config(mask_share=1.0, replaced_by_mask=0.0, replaced_at_random=1.0), model)
    made = mlm.masked(rows(*[42] * 200), FakeStep())
    drawn = made["input_ids"][made["targets"] >= 0].bincount(minlength=V)
    words = set(range(V)) - {pad, mask}
    assert set(drawn.nonzero()[:, 0].tolist()) == words
    mean = 8000 / len(words)
    assert max(abs(int(drawn[word]) - mean) for word in words) < 4.5 * math.sqrt(mean)


def test_positions_of_a_row_stay_consecutive() -> None:
    """RoBERTa counts positions over what is not the padding id, so one inside a row would shift the rest."""
    mlm = make("roberta", mask_share=1.0, replaced_by_mask=0.0, replaced_at_random=1.0)
    embeddings, looked_up = mlm.student.roberta.embeddings, []
    embeddings.position_embeddings.register_forward_hook(
        lambda module, inputs, output: looked_up.append(inputs[0])
    )
    embeddings(input_ids=mlm.masked(rows(*[42] * 50), FakeStep())["input_ids"])
    assert torch.equal(looked_up[0], (torch.arange(42) + PAD + 1).expand(50, 42))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"replaced_by_mask": 1.0, "replaced_at_random": 0.0}, "mask"),
        ({"replaced_by_mask": 0.0, "replaced_at_random": 0.0}, "kept"),
    ],
)
def test_limits_of_the_shares(settings: dict[str, float], expected: str) -> None:
    batch = rows(30, 30)
    made = make(mask_share=1.0, **settings).masked(batch, FakeStep())
    chosen = made["targets"] >= 0
    assert chosen.sum() == 2 * 28
    wanted = torch.full_like(batch["input_ids"], MASK) if expected == "mask" else batch["input_ids"]
    assert torch.equal(made["input_ids"][chosen], wanted[chosen])


def test_a_choice_depends_on_seed_example_and_visit_alone() -> None:
    mlm, batch = make(), rows(30, 22, 17, cloze={1: 3})
    whole = mlm.masked(batch, FakeStep())
    for row in range(3):
        wide = torch.nn.functional.pad(batch["input_ids"], (0, 4), value=9)
        alone = mlm.masked(batch.replace(input_ids=wide).rows([row]), FakeStep())
        for name in ("input_ids", "targets"):
            length = int(batch["length"][row])
            assert torch.equal(alone[name][0, :length], whole[name][row, :length])
        assert (alone["targets"][0, length:] == -1).all()
    for other in (FakeStep(visit=1), FakeStep(seed=8)):
        assert not torch.equal(mlm.masked(batch, other)["targets"], whole["targets"])


@pytest.mark.parametrize("kind", ["bert", "roberta", "headless"])
def test_loss_is_the_mean_over_the_chosen_tokens(kind: str) -> None:
    mlm, step = make("roberta" if kind == "roberta" else "bert"), FakeStep()
    if kind == "headless":  # a model whose logits are not its head on its last states
        mlm.student.register_forward_hook(lambda module, args, out: type(out)(logits=out.logits / 2))
    mlm.train_step(rows(30, 5, 17, cloze={1: 2}), step)
    ((group, made),) = step.updated
    assert group == "student"
    nats = []
    for ids, length, targets in zip(made["input_ids"], made["length"], made["targets"], strict=True):
        with torch.no_grad():
            logits = mlm.student(input_ids=ids[None, :length]).logits[0]
        for place in (targets >= 0).nonzero()[:, 0].tolist():
            nats.append(float(-logits[place].log_softmax(0)[targets[place]]))
    assert len(nats) == 4 + 1 + 2
    assert set(made["target_count"].tolist()) == {7}
    assert mlm.loss(made, step).item() == pytest.approx(sum(nats) / 7, abs=1e-12)
    parts = [mlm.loss(made.rows([row]), step).item() for row in range(3)]
    assert sum(parts) == pytest.approx(sum(nats) / 7, abs=1e-12)


def test_only_chosen_positions_meet_the_vocabulary() -> None:
    mlm, seen = make(), []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(inputs[0].shape)

    batch = mlm.masked(rows(30, 12), FakeStep()).replace(target_count=torch.tensor([6, 6]))
    mlm.loss(batch, FakeStep())
    mlm.student.cls.register_forward_hook(keep)
    mlm.loss(batch, FakeStep())
    assert seen == [(6, 8)]


def test_it_learns_a_text_that_repeats() -> None:
    words = torch.arange(4, 16).repeat(3)[:18]
    batch = rows(*[20] * 8)
    batch = batch.replace(input_ids=torch.tensor([CLS, *words.tolist(), SEP]).repeat(8, 1))
    training = TrainingConfig(optimizer_steps=120, batch_size=8, lr=1e-2)
    trainer = Trainer(make(), BatchSource(batch), training, seed=1)
    losses: list[float] = []
    trainer.track = lambda line, step: losses.append(line["student/loss"])
    trainer.fit()
    assert losses[0] > 3
    assert losses[-1] < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_share": 0.0}, "mask_share = 0.0 is not in"),
        ({"mask_share": 1.1}, "mask_share = 1.1 is not in"),
        ({"replaced_by_mask": -0.1}, "replaced_by_mask = -0.1 is not in"),
        ({"replaced_at_random": 0.3}, "are above 1 together"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLM.Config(**settings)


def test_a_model_without_a_mask_token_is_refused() -> None:
    model = tiny()
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="has no mask_token_id: its tokenizer needs a mask token"):
        MLM(MLM.Config(), model)
