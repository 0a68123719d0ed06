"""Encoders behind prompts: keys and values by hand, padding, what is trained, every format, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_kit import CLASSES, FAMILIES, LAYERS, WIDTH, M, build, encoder, otherwise_padded, rows, tuned
from torch import Tensor
from torch.nn.functional import gelu
from transformers import BertConfig

from kdbench.distiller import Batch
from kdbench.errors import UserError
from kdbench.prompted import FORMATS, PromptedEncoder, outputs_of
from kdbench.prompts import DeepPrompt


# ------------------------------------------------------------------------------------- keys and values
def reference_states(model: PromptedEncoder, ids: Tensor, segments: Tensor) -> Tensor:
    """Last states [T, H] of one unpadded text: attention written out, the prompt's keys and values before the
    text's own.
    """
    base: Any = model.encoder
    assert isinstance(model.prompt, DeepPrompt)
    m, heads = model.prompt.length, base.config.num_attention_heads
    roberta = base.config.model_type == "roberta"
    position = torch.arange(len(ids)) + m + (base.config.pad_token_id + 1 if roberta else 0)
    told = {} if roberta else {"token_type_ids": segments[None]}
    x = base.embeddings(input_ids=ids[None], position_ids=position[None], **told)[0]
    if hasattr(base, "embeddings_project"):
        x = base.embeddings_project(x)
    table = model.prompt.vectors.view(m, 2 * LAYERS, heads, WIDTH // heads)

    def split(value: Tensor) -> Tensor:  # [T, H] to [heads, T, H / heads]
        return value.view(len(value), heads, -1).transpose(0, 1)

    for number, layer in enumerate(base.encoder.layer):
        inner = layer.attention.self
        q = split(inner.query(x))
        k = torch.cat([table[:, 2 * number].transpose(0, 1), split(inner.key(x))], 1)
        v = torch.cat([table[:, 2 * number + 1].transpose(0, 1), split(inner.value(x))], 1)
        weights = (q @ k.transpose(1, 2) / math.sqrt(WIDTH // heads)).softmax(-1)
        read = (weights @ v).transpose(0, 1).reshape(len(ids), WIDTH)
        out = layer.attention.output
        x = out.LayerNorm(out.dense(read) + x)
        x = layer.output.LayerNorm(layer.output.dense(gelu(layer.intermediate.dense(x))) + x)
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_prompt_is_more_keys_and_values(family: str) -> None:
    model, batch = tuned(encoder(family), 2), rows()
    with torch.no_grad():
        states = model.states(batch)
        for row, stop in enumerate(batch["length"].tolist()):
            by_hand = reference_states(
                model, batch["input_ids"][row, :stop], batch["segment_ids"][row, :stop]
            )
            assert (states[row, :stop] - by_hand).abs().max() < 1e-6


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shallow", [False, True], ids=["deep", "shallow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, shallow: bool, form: str) -> None:
    model, batch = tuned(encoder(family, form), 2, shallow=shallow), rows(form)
    whole = model(batch)
    width = whole.shape[1]
    other = model(otherwise_padded(batch))
    for row, stop in enumerate(batch["length"].tolist()):
        alone = model(batch.rows([row]))
        end = stop if form in ("tokens", "span") else width
        assert torch.allclose(whole[row, :end], alone[0, :end], rtol=0, atol=1e-12)
        assert torch.allclose(whole[row, :end], other[row, :end], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shallow", [False, True], ids=["deep", "shallow"])
def test_a_prompt_of_zeros_is_not_no_prompt(shallow: bool) -> None:
    base, batch = encoder(), rows()
    zero = tuned(base, 2, std=0.0, shallow=shallow)
    bare = PromptedEncoder(base, None, "classes", CLASSES)
    assert not torch.allclose(zero.states(batch), bare.states(batch), atol=1e-3)


def test_a_forward_leaves_no_trace() -> None:
    """The cache grows in a forward: each needs its own."""
    model, batch = tuned(encoder(), 2), rows()
    first = model(batch)
    assert torch.equal(first, model(batch))


def test_order_of_prompt_tokens_matters_to_shallow_prompts_alone() -> None:
    batch = rows()
    for shallow in (False, True):
        model = tuned(encoder(), 2, shallow=shallow)
        before = model(batch)
        assert model.prompt is not None
        with torch.no_grad():
            model.prompt.vectors.copy_(model.prompt.vectors.flip(0))
        same = torch.allclose(before, model(batch), rtol=0, atol=1e-12)
        assert same is not shallow


def test_gradients_reach_prompt_and_head_alone() -> None:
    model = tuned(encoder(), 2)
    model(rows()).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "prompt.vectors",
        "head.weight",
        "head.bias",
    }
    assert all(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_dropout_is_of_training_alone() -> None:
    model, batch = tuned(encoder(), 2), rows()
    torch.manual_seed(1)
    model.train()
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


# ----------------------------------------------------------------------------------- what is trained
HEAD = WIDTH * CLASSES + CLASSES


@pytest.mark.parametrize(
    ("settings", "names", "count"),
    [
        ({}, {"prompt.vectors"}, 2 * LAYERS * WIDTH * M),
        ({"prompt": "shallow"}, {"prompt.vectors"}, M * WIDTH),
        (
            {"reparameterize": 5},
            {"prompt.vectors", *(f"prompt.mlp.{i}.{n}" for i in (0, 2) for n in ("weight", "bias"))},
            M * WIDTH + (WIDTH * 5 + 5) + (5 * 2 * LAYERS * WIDTH + 2 * LAYERS * WIDTH),
        ),
    ],
    ids=["deep", "shallow", "reparameterized"],
)
def test_trainable_are_prompt_and_head(settings: dict[str, Any], names: set[str], count: int) -> None:
    method = build("pt", {"student": encoder()}, **settings)
    trained = dict(method.groups()["student"].params)
    assert set(trained) == {f"student.{n}" for n in (*names, "head.weight", "head.bias")}
    assert sum(p.numel() for p in trained.values()) == count + HEAD
    assert method.measures() == {"trained_parameters": count + HEAD}


@pytest.mark.parametrize(
    ("layers", "width", "count"),
    [(24, 1024, 983_040), (12, 768, 368_640), (8, 512, 163_840), (4, 512, 81_920), (2, 128, 10_240)],
)
def test_published_sizes(layers: int, width: int, count: int) -> None:
    config = BertConfig(num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64)
    assert DeepPrompt(config, 20, 0.02).table().numel() == count


def test_prompt_and_head_start_at_the_noise_that_is_asked_for() -> None:
    base = encoder()
    prompt = build("pt", {"student": base}, prompt_length=500).student.prompt
    assert prompt.vectors.detach().std().item() == pytest.approx(0.02, rel=0.05)
    wide = build("pt", {"student": base}, prompt_length=500, prompt_init_std=1.0).student.prompt
    assert wide.vectors.detach().std().item() == pytest.approx(1.0, rel=0.05)


# -------------------------------------------------------------------------------------------- formats
SHAPES = {"classes": [6, 3], "number": [6, 1], "choice": [6, 2], "tokens": [6, 9, 3], "span": [6, 9, 2]}


@pytest.mark.parametrize("form", FORMATS)
def test_outputs_of_each_format(form: str) -> None:
    base, batch = encoder(form=form), rows(form)
    model = tuned(base, 2)
    out, states = model(batch), model.states(batch)
    assert list(out.shape) == SHAPES[form]
    read = states if form in ("tokens", "span") else base.pooler(states)
    assert torch.equal(out.flatten(), model.head(read).flatten())
    assert outputs_of(base.config) == {"number": 1, "choice": 1, "span": 2}.get(form, CLASSES)


def test_a_choice_is_read_alone() -> None:
    model, batch = tuned(encoder(form="choice"), 2), rows("choice")
    whole = model(batch)
    for choice in range(2):
        ids, length = batch["input_ids"][:, choice], batch["choice_length"][:, choice]
        one = Batch({"input_ids": ids, "segment_ids": batch["segment_ids"][:, choice], "length": length})
        assert torch.allclose(model.head(model.pooled(model.states(one)))[:, 0], whole[:, choice], atol=1e-12)


def test_the_prompt_reaches_the_logits_of_the_first_text_token() -> None:
    """Behind a shallow prompt the head reads the first token after it, not the prompt's first row."""
    model, batch = tuned(encoder(), 2, shallow=True), rows()
    before = model(batch)
    other = batch.replace(
        input_ids=torch.cat([batch["input_ids"][:, :1] % 5 + 7, batch["input_ids"][:, 1:]], 1)
    )
    assert model.states(batch).shape[1] == int(batch["length"].max())
    assert not torch.allclose(before, model(other))


def test_an_encoder_without_pooler_gives_the_first_state() -> None:
    model, batch = tuned(encoder("electra"), 2), rows()
    states = model.states(batch)
    assert torch.equal(model.pooled(states), states[:, 0])


def test_a_wrong_format_is_refused() -> None:
    base = encoder(form="clases")
    with pytest.raises(ValueError, match="task_format = 'clases' is none of classes, number"):
        outputs_of(base.config)


# ---------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("settings", [{}, {"prompt": "shallow"}, {"reparameterize": 5}], ids=str)
def test_what_is_saved_is_loaded_on_the_same_encoder(settings: dict[str, Any], tmp_path: Path) -> None:
    base = encoder()
    base.kdbench_key = "abc"
    model, batch = build("pt", {"student": base}, **settings).student, rows()
    model.signature = {"own.cls_hidden": torch.rand(WIDTH)}
    model.save_pretrained(tmp_path)
    again = PromptedEncoder.load(tmp_path, base)
    assert again.encoder is base
    assert torch.equal(again(batch), model(batch))
    assert torch.equal(again.signature["own.cls_hidden"], model.signature["own.cls_hidden"])
    assert again.signature.keys() == model.signature.keys()
    assert not any(n.startswith("encoder") for n in again.own())


def test_another_encoder_or_no_prompt_is_refused(tmp_path: Path) -> None:
    base, other = encoder(), encoder(seed=9)
    base.kdbench_key, other.kdbench_key = "abc", "xyz"
    with pytest.raises(UserError, match="holds no prompt of an encoder"):
        PromptedEncoder.load(tmp_path, base)
    tuned(base, 2).save_pretrained(tmp_path / "one")
    with pytest.raises(UserError, match="trained on the encoder abc, this is xyz"):
        PromptedEncoder.load(tmp_path / "one", other)
    PromptedEncoder(base, None, "classes", CLASSES).save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="a trained encoder without a prompt; there is nothing to transfer"):
        PromptedEncoder.load(tmp_path / "two", base)


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = encoder()
    tuned(base, 2).save_pretrained(tmp_path)
    path = tmp_path / "prompted.safetensors"
    kept = {n: v for n, v in load_file(path).items() if n != "head.bias"}
    save_file(kept, path)
    with pytest.raises(UserError, match=r"does not fit: head\.bias"):
        PromptedEncoder.load(tmp_path, base)
