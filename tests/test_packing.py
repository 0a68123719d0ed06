"""Rows without padding: packed forward and backward passes equal those of single rows, or are not used."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from method_kit import EOS, V, make_rows, tiny_gpt2
from test_prompts import Capped, Scaled, prompted, single_rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.activations import NewGELUActivation

from kdbench import packing
from kdbench.activations import SMALL, TanhGELU
from kdbench.distiller import Batch, target_mask
from kdbench.memory import checkpoint_activations
from kdbench.packing import NAME, Packing, is_plain_gpt2
from kdbench.predict import CausalLM, predict, shared
from kdbench.prompts import PromptedModel, SoftPrompt

COMMON = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
WINDOW = 9  # longer than the probe, shorter than some rows
GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.4}
GEMMA = {**COMMON, "head_dim": 4, "num_key_value_heads": 2}
LOCAL_NEO = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1]],
    "window_size": WINDOW,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2_untied": ("gpt2", {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "llama_gqa": ("llama", {**COMMON, "num_key_value_heads": 2}),
    "qwen2_gqa": ("qwen2", {**COMMON, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "opt": ("opt", {**COMMON, "ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.4}),
    "gpt_neox": ("gpt_neox", COMMON),
    "jetmoe": ("jetmoe", {**COMMON, "num_key_value_heads": 2, "kv_channels": 4, "num_local_experts": 2}),
}
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral_window": ("mistral", {**COMMON, "num_key_value_heads": 2, "sliding_window": WINDOW}),
    "bloom": (
        "bloom",
        {"vocab_size": V, "hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4},
    ),
    "falcon": (
        "falcon",
        {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "gemma2_softcap": ("gemma2", {**GEMMA, "sliding_window": WINDOW, "attn_logit_softcapping": 1.0}),
    "gpt_neo_local": ("gpt_neo", LOCAL_NEO),
    "phimoe_window": (
        "phimoe",
        {**COMMON, "num_key_value_heads": 2, "sliding_window": WINDOW, "num_local_experts": 2},
    ),
}
IN_FLOAT32 = {"phimoe_window": 1e-5, "gpt_neo_local": 1e-6, "gemma2_softcap": 1e-5, "bloom": 1e-6}
"""Models with parts that transformers computes in float32, and how near they come (logits of about 3)."""


def make(kind: str, **more: Any) -> Any:
    """A random model in float64 (or what it takes) whose distributions are far from uniform."""
    name, settings = {**PACKED, **PADDED}[kind]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**settings, **more}))
    for parameter in model.parameters():  # biases too, which start at 0
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return (model if kind == "phimoe_window" else model.double()).eval()


def ragged() -> Batch:
    """Rows of 1 to 15 tokens, longer than the probe; two without a target, padding and end have one id."""
    return make_rows(
        [[3, 4], [5], [6, 7, 8, 9, 2, 1], [1, 2, 3], [4, 4], [12]],
        [[5, 6, EOS], [], [7, 8, 9, 10, 11, 12, 1, 2, EOS], [EOS], [], [7, 8, 9, 10, 3, EOS]],
    )


def level() -> Batch:
    """Rows of equal length."""
    return make_rows([[3, 4], [5, 6, 7, 8], [1]], [[5, 6, 7, EOS], [9, EOS], [2, 3, 4, 5, 6]])


BATCHES = {"ragged": ragged, "level": level, "one": lambda: ragged().rows([2])}


def behind(model: Any, soft: int) -> Any:
    """The model behind `soft` trainable vectors, the same for the same model."""
    if not soft:
        return model
    torch.manual_seed(5)
    vectors = torch.randn(soft, model.get_input_embeddings().weight.shape[1])
    return PromptedModel(model, SoftPrompt(vectors.to(next(model.parameters()).dtype)))


def assert_same(
    model: Any, reference: Any, batch: Batch, near: float = 1e-12, offset: Tensor | None = None
) -> None:
    """Compare logits at the targets, and what any gradient of them means for all parameters, with single rows
    of a model that nobody prepared.
    """
    q = predict(model, batch if offset is None else batch.replace(position_offset=offset))
    wanted = single_rows(reference, batch, offset)
    torch.testing.assert_close(q.logits(), wanted, rtol=near, atol=near)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for one, logits in ((model, q.logits()), (reference, wanted)):
        one.zero_grad()
        (logits * weights.to(logits.dtype)).sum().backward()
    trained = dict(reference.named_parameters())
    moved = 0
    for name, parameter in model.named_parameters():
        mine, theirs = (torch.zeros(1) if x.grad is None else x.grad for x in (parameter, trained[name]))
        assert float((mine - theirs).norm()) <= 10 * near * max(1.0, float(theirs.norm())), name
        moved += bool(theirs.any())
    assert moved >= 1


# ------------------------------------------------------------------------------------------- the layout
@pytest.mark.parametrize("lengths", [[3, 1, 4], [2, 2], [5], [0, 3, 0, 1], [1, 1, 1]])
def test_tokens_go_to_rows_and_back(lengths: list[int]) -> None:
    rows = Packing(torch.tensor(lengths))
    assert (len(rows), rows.width, rows.full) == (sum(lengths), max(lengths), len(set(lengths)) == 1)
    padded = torch.arange(len(lengths) * max(lengths)).view(len(lengths), -1)
    tokens = [int(padded[b, t]) for b, n in enumerate(lengths) for t in range(n)]
    assert rows.pack(padded).tolist() == tokens
    packed = torch.randn(1, 2, sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    laid = rows.to_rows(packed)
    assert laid.shape == (len(lengths), 2, max(lengths), 3)
    start = 0
    for b, n in enumerate(lengths):
        assert torch.equal(laid[b, :, :n], packed[0, :, start : start + n])
        start += n
    assert torch.equal(rows.from_rows(laid), packed.transpose(1, 2))


def test_nothing_comes_back_from_behind_a_row() -> None:
    """Entries behind a row are those of other tokens: no gradient may reach these through them."""
    rows = Packing(torch.tensor([3, 1, 4, 2]))
    packed = torch.randn(1, 2, 10, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 10, 2, 3, dtype=torch.float64)
    (rows.from_rows(rows.to_rows(packed).square()) * weights).sum().backward()
    torch.testing.assert_close(packed.grad, 2 * packed.detach() * weights.transpose(1, 2))
    laid = torch.randn(4, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    rows.from_rows(laid).sum().backward()
    assert laid.grad is not None
    assert torch.equal(laid.grad[:, 0, :, 0], rows.real.double())


# ---------------------------------------------------------------------------------- models that are packed
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("soft", [0, 3])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("by_row", [False, True])
def test_packed_rows_equal_single_rows(
    kind: str, soft: int, rows: str, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over all rows padded to one length, and over each row by itself."""
    model = make(kind)
    reference = behind(copy.deepcopy(model), soft)
    model = behind(model, soft)
    assert CausalLM(model).packs
    assert CausalLM(model).split
    shapes = heard_attention(monkeypatch, always_by_row=by_row)
    batch = BATCHES[rows]()
    assert_same(model, reference, batch)
    lengths = ((batch["length"] - 1).clamp(min=1) + soft).tolist()
    wanted = [(1, length) for length in lengths] if by_row else [(len(lengths), max(lengths))]
    assert shapes == 2 * wanted


def heard_attention(monkeypatch: pytest.MonkeyPatch, always_by_row: bool) -> list[tuple[int, int]]:
    """Rows and width of every call of torch's attention from now on."""
    shapes: list[tuple[int, int]] = []
    attend = packing.scaled_dot_product_attention

    def heard(query: Tensor, *others: Tensor, **told: Any) -> Tensor:
        shapes.append((query.shape[0], query.shape[2]))
        return attend(query, *others, **told)

    monkeypatch.setattr(packing, "scaled_dot_product_attention", heard)
    monkeypatch.setattr(packing, "COST_OF_CALL", -1 if always_by_row else 2**20)
    return shapes


def test_attention_goes_row_by_row_where_padding_costs_more_than_calls() -> None:
    query = torch.empty(1, 8, 1, 64)
    assert Packing(torch.tensor([84, 127, 90, 96, 103, 109, 115, 121])).pays_by_row(query)
    assert not Packing(torch.tensor([127] * 8)).pays_by_row(query)
    assert not Packing(torch.tensor([3, 4, 5, 6, 7] * 12)).pays_by_row(query)


def test_no_token_attends_row_by_row_in_a_row_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2")
    reference = copy.deepcopy(model)
    assert CausalLM(model).packs
    shapes = heard_attention(monkeypatch, always_by_row=True)
    rows = Packing(torch.tensor([0, 3, 0, 1]))
    ids, every = torch.tensor([4, 5, 6, 7]), torch.arange(4)
    found = packing.run(model, rows, rows.place, every, input_ids=ids)
    wanted = [reference.transformer(input_ids=one[None]).last_hidden_state[0] for one in ids.split([3, 1])]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-12, atol=1e-12)
    assert shapes == 2 * [(1, 0), (1, 3), (1, 0), (1, 1)]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama_gqa"])
@pytest.mark.parametrize("soft", [0, 2])
def test_positions_may_start_elsewhere_in_each_row(kind: str, soft: int) -> None:
    model = make(kind)
    reference = behind(copy.deepcopy(model), soft)
    offset = torch.tensor([0, 3, 5, 1, 2, 7])
    assert_same(behind(model, soft), reference, ragged(), offset=offset)


def test_many_rows_of_one_token_and_rows_longer_than_half_the_positions() -> None:
    model = make("gpt2")
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 2, 40, 1, 63, 2, 31]
    ids = [torch.randint(0, V, (n,), generator=generator).tolist() for n in sizes]
    batch = make_rows([one[:1] for one in ids], [one[1:] for one in ids])
    assert sum(sizes) > 2 * model.config.n_positions  # in all, more tokens than positions
    assert_same(model, reference, batch)


def test_only_the_soft_prompt_of_a_frozen_model_moves() -> None:
    model = make("gpt2").requires_grad_(False)
    reference = prompted(copy.deepcopy(model))
    model = prompted(model)
    weights = torch.randn(19, V, dtype=torch.float64)
    for logits in (predict(model, ragged()).logits(), single_rows(reference, ragged())):
        (logits * weights).sum().backward()
    grads = [one.prompt.vectors.grad for one in (model, reference)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama_gqa", "bloom"])
@pytest.mark.parametrize("soft", [0, 2])
def test_states_of_a_hook_at_the_targets(kind: str, soft: int) -> None:
    """Of an inner layer, and of the last, which GPT-2's written-out pass does not call by itself."""
    model = make(kind)
    reference: Any = behind(copy.deepcopy(model), soft)
    model = behind(model, soft)
    CausalLM(model)
    inner: Any = model.model if soft else model
    layers = next(m for m in inner.modules() if isinstance(m, nn.ModuleList))
    found: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda *call: found.append(call[2][0] if isinstance(call[2], tuple) else call[2])
        )
    batch = ragged()
    q = predict(model, batch)
    near = IN_FLOAT32.get(kind, 1e-12)
    torch.testing.assert_close(q.logits(), single_rows(reference, batch), rtol=near, atol=near)
    assert len(found) == 2
    bare: Any = reference.model if soft else reference
    expected: list[list[Tensor]] = [[], []]
    for layer, kept in zip(
        next(m for m in bare.modules() if isinstance(m, nn.ModuleList)), expected, strict=True
    ):
        layer.register_forward_hook(
            lambda *call, kept=kept: kept.append((call[2][0] if isinstance(call[2], tuple) else call[2])[0])
        )
    single_rows(reference, batch)
    spans = [
        (int(p) - 1 + soft, int(n) - 1 + soft)
        for p, n in zip(batch["prompt_length"], batch["length"], strict=True)
    ]
    for states, rows in zip(found, expected, strict=True):
        wanted = torch.cat([row[start:stop] for row, (start, stop) in zip(rows, spans, strict=True)])
        torch.testing.assert_close(q.at_targets(states), wanted, rtol=near, atol=near)


@pytest.mark.parametrize("watched", ["trunk", "last", None])
def test_gpt2s_last_block_is_called_where_somebody_listens(watched: str | None) -> None:
    model = make("gpt2")
    reference = copy.deepcopy(model)
    CausalLM(model)
    assert is_plain_gpt2(model)
    calls: list[int] = []
    if watched:
        module = model.transformer if watched == "trunk" else model.transformer.h[-1]
        module.register_forward_hook(lambda *call: calls.append(1))
    assert_same(model, reference, ragged())
    assert bool(calls) == bool(watched)


def test_gpt2_with_other_parts_is_not_taken_for_gpt2() -> None:
    """What is written out for GPT-2 would miss them."""

    class Other(nn.Embedding):
        pass

    parts = {
        "transformer.wte": Other(V, 16),
        "transformer.wpe": Other(64, 16),
        "transformer.ln_f": nn.Identity(),
        "transformer.h.1.ln_2": nn.Identity(),
        "transformer.h.0.mlp.c_fc": nn.Linear(16, 64),
        "lm_head": nn.Sequential(nn.Linear(16, V)),
    }
    assert is_plain_gpt2(make("gpt2"))
    for name, part in parts.items():
        model = make("gpt2_untied")
        model.set_submodule(name, part.double())
        assert not is_plain_gpt2(model), name
    assert not is_plain_gpt2(Capped(make("gpt2").config))


# ------------------------------------------------------------------------------ models that cannot be packed
@pytest.mark.parametrize("kind", PADDED)
@pytest.mark.parametrize("rows", ["ragged", "level"])
def test_what_cannot_be_packed_is_padded(kind: str, rows: str) -> None:
    """Some rows are longer than the window, and the window than the probe."""
    model = make(kind)
    reference = copy.deepcopy(model)
    assert not CausalLM(model).packs
    assert model.config._attn_implementation == reference.config._attn_implementation
    assert_same(model, reference, BATCHES[rows](), near=IN_FLOAT32.get(kind, 1e-12))


def test_eager_attention_is_padded_also_when_it_is_chosen_later() -> None:
    for later in (False, True):
        model = make("gpt2")
        reference = copy.deepcopy(model)
        if later:
            assert CausalLM(model).packs
        model.set_attn_implementation("eager")
        assert not CausalLM(model).packs
        assert_same(model, reference, ragged())


def test_attention_that_is_not_causal_is_not_packed() -> None:
    model = make("llama_gqa")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    assert not CausalLM(model).packs
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", [Scaled, Capped])
def test_models_that_change_their_logits_are_run_whole(kind: type[Any]) -> None:
    model: Any = kind(make("gpt2").config).double().eval()
    reference = copy.deepcopy(model)
    assert not CausalLM(model).split
    assert_same(model, reference, ragged())


def test_attention_told_something_unknown_is_refused() -> None:
    module = make("llama_gqa").model.layers[0].self_attn
    rows = Packing(torch.tensor([2, 1]))
    qkv = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    packing._attention(module, *qkv, None, packing=rows, scaling=0.5, sliding_window=None)
    for told in ({"sliding_window": 4}, {"softcap": 30.0}, {"is_causal": False}, {"position_bias": qkv[0]}):
        with pytest.raises(packing.Unsupported):
            packing._attention(module, *qkv, None, packing=rows, **told)


# --------------------------------------------------------------------------------- what is left behind
def test_modes_stay_as_they_were_and_dropout_acts_in_train_mode() -> None:
    model = make("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    model.train()
    model.transformer.h[0].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert CausalLM(model).packs
    assert {name: module.training for name, module in model.named_modules()} == before
    one, other = (predict(model, ragged()).logits().detach() for _ in range(2))
    assert not torch.allclose(one, other)
    model.eval()
    assert_same(model, copy.deepcopy(model), ragged())


@pytest.mark.parametrize("kind", ["gpt2", "llama_gqa", "mistral_window"])
def test_prepared_models_are_saved_as_any(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    made = predict(model, ragged()).logits()
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(single_rows(loaded, ragged()), made, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(predict(loaded, ragged()).logits(), made, rtol=1e-12, atol=1e-12)


def test_a_copy_of_a_prepared_model_is_packed_too() -> None:
    model = make("gpt2")
    made = predict(model, ragged()).logits()
    copied = copy.deepcopy(model)
    assert CausalLM(copied).packs
    assert torch.equal(predict(copied, ragged()).logits(), made)


def test_models_of_one_configuration_do_not_disturb_each_other() -> None:
    plain = make("gpt2")
    other = type(plain)(plain.config).double().eval()
    reference = copy.deepcopy(plain)
    assert CausalLM(plain).packs
    other.transformer.h[0].attn.is_causal = False  # it cannot be packed
    assert not CausalLM(other).packs
    assert_same(plain, reference, ragged())


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_gelu_is_gpt2s(dtype: torch.dtype, near: float, large: bool) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-20, -1e-20])]).to(dtype)
    theirs, ours = NewGELUActivation(), TanhGELU()
    x = x.repeat(9) if large else x
    assert (len(x) >= SMALL) == large
    found = []
    for act in (theirs, ours):
        at = x.clone().requires_grad_()
        value = act(at)
        found.append((value.detach(), torch.autograd.grad(value.sum(), at)[0]))
    assert (type(value.grad_fn).__name__ == "_BySigmoidBackward") == large
    (value, slope), (mine, my_slope) = found
    assert bool(((mine - value).abs() <= near * x.abs()).all())
    assert bool(((my_slope - slope).abs() <= 10 * near).all())
    model = make("gpt2")
    CausalLM(model)
    acts = [block.mlp.act for block in model.transformer.h]
    assert [(type(act), act.approximate) for act in acts] == [(TanhGELU, "tanh")] * 2


def test_gelu_of_a_transposed_tensor_and_its_second_derivative() -> None:
    x = torch.randn(256, 160, dtype=torch.float64).t().requires_grad_()
    assert x.numel() >= SMALL
    found = []
    for act in (NewGELUActivation(), TanhGELU()):
        value = act(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        found.append((value, slope, *torch.autograd.grad(slope.square().sum(), x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------- recomputed activations
@pytest.mark.parametrize("kind", ["gpt2", "llama_gqa"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_computed_again_in_the_backward_pass_attends_row_by_row(
    kind: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    attend = packing.Packing.to_rows

    def counted(self: Packing, packed: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return attend(self, packed)

    model = make(kind).requires_grad_(not frozen)
    reference = prompted(copy.deepcopy(model))
    layers = checkpoint_activations(model)
    assert layers == 2
    model = prompted(model)
    assert CausalLM(model).packs
    monkeypatch.setattr(packing.Packing, "to_rows", counted)
    predict(model, ragged()).logits().sum().backward()
    assert len(calls) >= 2 * 3 + 3  # query, key and value of two blocks, and at least one of them twice
    assert_same(model, reference, ragged())


def test_a_whole_prediction_computed_again_is_the_same() -> None:
    model = make("gpt2")
    reference = copy.deepcopy(model)
    batch = ragged()
    for one in (model, reference):
        one.zero_grad()
    logits = checkpoint(lambda: predict(model, batch).logits(), use_reentrant=False)
    logits.square().sum().backward()
    single_rows(reference, batch).square().sum().backward()
    for (name, p), r in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, r.grad, rtol=1e-10, atol=1e-10, msg=name)


# ------------------------------------------------------------------------------------------------- edges
@pytest.mark.parametrize("kind", ["gpt2", "llama_gqa", "bloom"])
@pytest.mark.parametrize("soft", [0, 2])
def test_rows_without_targets_and_ids_of_one_column(kind: str, soft: int) -> None:
    model = behind(make(kind), soft)
    batch = make_rows([[3, 4], [5]], [[], []])
    narrow = make_rows([[3], [5]], [[], []])
    narrow = narrow.replace(input_ids=narrow["input_ids"][:, :1])
    for rows in (batch, narrow):
        q = predict(model, rows)
        assert len(q) == len(q.targets) == 0
        assert q.logits().shape == (0, V)
        q.logits().sum().backward()


def test_targets_of_a_batch_wider_than_its_rows() -> None:
    batch = ragged()
    wide = batch.replace(input_ids=nn.functional.pad(batch["input_ids"], (0, 9), value=7))
    model = make("gpt2")
    q, again = predict(model, batch), predict(model, wide)
    assert torch.equal(q.targets, batch["input_ids"][:, 1:][target_mask(batch)])
    assert torch.equal(q.targets, again.targets)
    assert torch.equal(q.logits(), again.logits())


def test_the_bare_model_and_the_model_behind_a_prompt_share_the_probe() -> None:
    model = make("gpt2")
    before = copy.deepcopy(model.state_dict())
    assert CausalLM(behind(model, 3)).packs
    assert CausalLM(model).packs
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert tiny_gpt2(1).config._attn_implementation == "sdpa"


def test_a_shared_prediction_is_that_of_its_rows_and_weights() -> None:
    model, batch = make("gpt2"), ragged()
    with shared(model):
        one = predict(model, batch)
        assert predict(model, batch) is one
        assert predict(model, batch.rows(range(6))) is one  # as the harness cuts a batch into one piece
        with torch.no_grad():
            assert predict(model, batch).hidden.data_ptr() == one.hidden.data_ptr()
            assert not predict(model, batch).logits().requires_grad
        for name, value in (("prompt_length", 1), ("length", -1), ("position_offset", 1)):
            other = batch.replace(**{name: batch.get(name, torch.zeros(6, dtype=torch.long)) + value})
            assert predict(model, other) is not one, name
            wanted = predict(copy.deepcopy(model), other)
            torch.testing.assert_close(
                predict(model, other).logits(), wanted.logits(), rtol=1e-12, atol=1e-12
            )
        one = predict(model, batch)
        with torch.no_grad():
            model.lm_head.weight += 1
        assert predict(model, batch) is not one


def test_a_failed_shared_prediction_leaves_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2")
    assert CausalLM(model).packs
    with shared(model), monkeypatch.context() as patch:
        model.requires_grad_(False)  # as another group's update does
        patch.setattr(packing, "run", lambda *args, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            predict(model, ragged())
        assert not any(p.requires_grad for p in model.parameters())
