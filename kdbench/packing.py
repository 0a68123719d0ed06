"""Runs a causal language model without padding: all tokens in one sequence, attention row by row.

Everything in a transformer but attention treats tokens one by one, so padding costs it time for nothing. Here
the tokens of all rows are one sequence [1, N]; the attention function, which transformers lets a caller
register, lays queries, keys and values out as rows for the fused kernel and takes the results back, or calls
it for each row where padding would cost more.

Source: own; the idea is known from the training of BERT without padding (Zeng et al. 2022,
https://arxiv.org/abs/2208.08124).
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, GPT2LMHeadModel
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block, GPT2Model
from transformers.pytorch_utils import Conv1D

from kdbench.activations import TanhGELU

NAME = "kdbench_packed"
"""The attention function that models get: torch's fused attention, and row by row for packed tokens."""

# what an architecture may tell its attention without changing what is computed here
_HARMLESS = frozenset(
    "dropout scaling is_causal position_ids position_embeddings use_cache cache_position packing return_dict "
    "output_attentions output_hidden_states".split()
)

COST_OF_CALL = 2**17
"""What a call of attention costs beside its work: as much as so many products of entries of query and key."""


class Packing:
    """Where the tokens of B rows of different lengths stand in one sequence of N tokens.

    Args: `lengths` [B] int64, 0 included. `kept` receives each layer's keys and values as rows
    [B, heads, T, d], if given.
    """

    def __init__(self, lengths: Tensor, kept: list[tuple[Tensor, Tensor]] | None = None) -> None:
        self.lengths: list[int] = lengths.tolist()
        self.rows, self.width = len(self.lengths), max(self.lengths, default=0)
        self.kept = kept
        place = torch.arange(self.width, device=lengths.device)
        self.real = place < lengths[:, None]
        self.full = bool(self.real.all())
        self.row, self.place = self.real.nonzero(as_tuple=True)  # of each token, [N]
        self.slot = self.row * self.width + self.place  # of each token in the flat rows, [N]
        start = lengths.cumsum(0) - lengths
        last = max(len(self.slot) - 1, 0)
        # of each slot of the flat rows; behind a row stand other tokens, which no token of the row sees
        self.token = (start[:, None] + place).clamp(max=last).flatten()
        self.flat_real = self.real.flatten()

    def __len__(self) -> int:
        return len(self.slot)

    def pays_by_row(self, query: Tensor) -> bool:
        """Whether attention over `query` [1, heads, N, d] costs less row by row than over rows of equal
        length: on a CPU, where calls are cheap, and padding would make the scores of many pairs.
        """
        padded = self.rows * self.width**2 - sum(length**2 for length in self.lengths)  # pairs of tokens
        wasted = padded * query.shape[1] * query.shape[3]
        return query.device.type == "cpu" and wasted > self.rows * COST_OF_CALL

    def pack(self, padded: Tensor) -> Tensor:
        """Return the N tokens' entries of `padded` [B, T or more, ...], [N, ...]."""
        return padded[self.row, self.place]

    def to_rows(self, packed: Tensor) -> Tensor:
        """Return `packed` [1, heads, N, d] as rows [B, heads, T, d]; what is behind a row is arbitrary."""
        tokens = packed[0].transpose(0, 1)
        if not self.full:
            tokens = _move(tokens, self.token, self.slot, None)
        return tokens.view(self.rows, self.width, *tokens.shape[1:]).transpose(1, 2)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return rows [B, heads, T, d] as [1, N, heads, d]."""
        tokens = rows.transpose(1, 2).flatten(0, 1)
        if not self.full:
            tokens = _move(tokens, self.slot, self.token, self.flat_real)
        return tokens[None]


class _Move(torch.autograd.Function):
    """Takes entries at `index`; the gradient takes them back by `inverse`, 0 where `real` is false."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, *([] if real is None else [real]))
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        inverse, *real = ctx.saved_tensors
        back = gradient[0].index_select(0, inverse)
        if real:
            back = back.masked_fill_(~real[0][:, None, None], 0.0)
        return back, None, None, None


def _move(x: Tensor, index: Tensor, inverse: Tensor, real: Tensor | None) -> Tensor:
    moved: Tensor = _Move.apply(x, index, inverse, real)  # type: ignore[no-untyped-call]
    return moved


class Unsupported(Exception):
    """The architecture tells its attention something that is not done here."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **told: Any
) -> tuple[Tensor, None]:
    packing: Packing | None = told.get("packing")
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **told)
    for name, setting in told.items():
        if name not in _HARMLESS and setting is not None and setting is not False:
            raise Unsupported(f"{type(module).__name__}: {name} = {setting}")
    if told.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise Unsupported(f"{type(module).__name__}: attention is not causal")
    attend = functools.partial(
        scaled_dot_product_attention,
        dropout_p=told.get("dropout", 0.0),
        is_causal=True,
        scale=told.get("scaling"),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    if packing.kept is None and packing.pays_by_row(query):
        parts = zip(*(x.split(packing.lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([attend(*part).transpose(1, 2) for part in parts], dim=1), None
    keys, values = packing.to_rows(key), packing.to_rows(value)
    if packing.kept is not None:
        packing.kept.append((keys, values))
    return packing.from_rows(attend(packing.to_rows(query), keys, values)), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

_packable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_TANH_GELUS = (NewGELUActivation, type(ACT2FN["gelu_pytorch_tanh"]))
_DUMMY = torch.zeros(1, 1, 1, 1, dtype=torch.bool)  # a mask of four dimensions is passed on as it is


def prepare(model: nn.Module) -> bool:
    """Give a causal language model the fast kernels that compute the same function, and tell whether it can
    be run packed, by trying it on a probe. Done once per model; one that was given another attention function
    since then is run with padding.

    GELU in its form with tanh, which transformers composes of eight operations for GPT-2, becomes `TanhGELU`;
    attention by torch's fused kernel becomes the function of this module, which is that kernel for rows.
    """
    if model not in _packable:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _TANH_GELUS):
                    setattr(parent, name, TanhGELU().train(child.training))
        _packable[model] = _try(model)
    config: Any = getattr(model, "config", None)
    return _packable[model] and getattr(config, "_attn_implementation", None) == NAME


def _try(model: Any) -> bool:
    config = model.config
    trunk = getattr(model, "base_model", None)
    before = getattr(config, "_attn_implementation", None)
    if before not in ("sdpa", NAME) or trunk is None or trunk is model or _is_local(config):
        return False  # NAME: the copy of a model that is prepared
    parameter = next(model.parameters())
    vocab = int(getattr(config, "kdbench_vocab", None) or config.vocab_size)
    lengths = torch.tensor([5, 2, 7], device=parameter.device)
    ids = (torch.arange(21, device=parameter.device).view(3, 7) * 7 + 1) % vocab
    modes = [(module, module.training) for module in model.modules()]
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # what is compared here are kernels, not roundings
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            whole = trunk(input_ids=ids, use_cache=False).last_hidden_state
            config._attn_implementation = NAME
            packing = Packing(lengths)
            every = torch.arange(len(packing), device=parameter.device)
            packed = run(model, packing, packing.place, every, input_ids=packing.pack(ids))
            rows = trunk(input_ids=ids, use_cache=False).last_hidden_state
        wanted = packing.pack(whole).float()
        share = 1e-4 if parameter.dtype in (torch.float32, torch.float64) else 1e-2
        near = share * float(wanted.abs().max())
        works = torch.allclose(packed.float(), wanted, rtol=0.0, atol=near) and torch.equal(rows, whole)
    except Exception:  # whatever an architecture does not take, it is run with padding
        works = False
    finally:
        torch.set_float32_matmul_precision(products)
        for module, training in modes:
            module.training = training
    if not works:
        config._attn_implementation = before
    return works


def _is_local(config: Any) -> bool:
    """Whether some layer attends to the nearest tokens alone: a probe of few tokens does not show it, and
    some architectures tell their mask of it, not their attention function.
    """
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    reach = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return any(reach) or any(kind != "full_attention" for kind in kinds)


def run(model: Any, packing: Packing, positions: Tensor, wanted: Tensor, **inputs: Tensor) -> Tensor:
    """Return the hidden states [M, H] that a model's head reads, of the packed tokens at `wanted` [M].

    Args: `positions` [N]; `inputs` is `input_ids` [N] or `inputs_embeds` [N, D].
    """
    trunk = model.base_model
    if is_plain_gpt2(model) and not is_watched(trunk, trunk.h[-1]):
        return _gpt2(trunk, packing, positions, wanted, **inputs)
    given = {name: value[None] for name, value in inputs.items()}
    out = trunk(
        **given,
        position_ids=positions[None],
        attention_mask=_DUMMY.to(positions.device),
        use_cache=False,
        packing=packing,
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden[wanted]


def _gpt2(
    trunk: Any,
    packing: Packing,
    positions: Tensor,
    wanted: Tensor,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> Tensor:
    """`run` for GPT-2, whose last block needs no more than attention at tokens whose state nobody reads."""
    embedded = trunk.wte(input_ids[None]) if input_ids is not None else inputs_embeds
    x = trunk.drop(embedded + trunk.wpe(positions[None]))
    *blocks, last = trunk.h
    for block in blocks:
        out = block(x, packing=packing)
        x = out[0] if isinstance(out, tuple) else out
    x = (x + last.attn(last.ln_1(x), packing=packing)[0])[0][wanted]
    x = x + last.mlp(last.ln_2(x))
    hidden: Tensor = trunk.ln_f(x)
    return hidden


def is_watched(*modules: nn.Module) -> bool:
    """Whether hooks hear of the calls of some module, so that it must be called."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, name) for module in modules for name in hooks)


def is_plain_gpt2(model: Any) -> bool:
    """Whether a model is GPT-2 as transformers has it: then what is written out for it computes the same."""
    if type(model) is not GPT2LMHeadModel or type(model.transformer) is not GPT2Model:
        return False
    if model.config.add_cross_attention or type(model.lm_head) is not nn.Linear:
        return False
    trunk = model.transformer
    norms = [norm for block in trunk.h for norm in (block.ln_1, block.ln_2)]
    if any(type(norm) is not nn.LayerNorm for norm in (trunk.ln_f, *norms)):
        return False
    return all(type(table) is nn.Embedding for table in (trunk.wte, trunk.wpe)) and all(
        type(block) is GPT2Block
        and type(block.attn) is GPT2Attention
        and all(
            type(linear) is Conv1D
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        )
        for block in model.transformer.h
    )
