"""One token after another from one model: the state of rows while they are sampled.

`stream` gives a model's rows the fastest decoder that it has: GPT-2's, written out below over preallocated
keys and values, or that of transformers for any other causal language model.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import GELU
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from transformers import DynamicCache

from kdbench.activations import TanhGELU
from kdbench.packing import Packing, is_plain_gpt2, is_watched
from kdbench.predict import CausalLM
from kdbench.products import Layer


class Stream(Protocol):
    """Rows being sampled from one model."""

    logits: Tensor
    """Of the next token, [n, V]."""

    def push(self, tokens: Tensor) -> None:
        """Append one token per row, [n]."""

    def keep(self, index: Tensor) -> None:
        """Go on with the rows at `index` [m], m <= n, alone."""


def stream(view: CausalLM, ids: Tensor, lengths: Tensor, room: int) -> Stream:
    """Return the rows of right-padded ids [n, T] of `lengths` [n], with room for that many tokens more."""
    if bool((lengths > 0).all()) and can_be_written_out(view):
        return GPT2Stream(view, ids, lengths, room)
    return CachedStream(view, ids, lengths)


def can_be_written_out(view: CausalLM) -> bool:
    """Whether the decoder below computes what the model does: it is GPT-2 and nobody watches its modules."""
    plain = view.packs and view.split and is_plain_gpt2(view.inner)
    return plain and not is_watched(*view.inner.modules())


class GPT2Stream:
    """GPT-2 over keys and values that are allocated once; rows end at the same slot, short ones start later.

    Source: Radford et al. 2019 (GPT-2), as in transformers, without its bookkeeping.
    """

    def __init__(self, view: CausalLM, ids: Tensor, lengths: Tensor, room: int) -> None:
        trunk = view.inner.transformer
        kept, hidden, self.positions, width = prefilled(view, ids, lengths)
        self.rows, self.slot = len(ids), width
        self.blocks, self.trunk = [_Block(block) for block in trunk.h], trunk
        start = width - self.positions  # the slot of each row's first token
        self.cache: list[tuple[Tensor, Tensor]] = []
        for keys, values in kept:
            shape = (self.rows, keys.shape[1], width + room, keys.shape[3])
            pair = keys.new_empty(shape), values.new_empty(shape)
            pair[0][:, :, :width], pair[1][:, :, :width] = (aligned(x, start, width) for x in (keys, values))
            self.cache.append(pair)
        self.bias: Tensor | None = None
        if bool((start > 0).any()):
            before = torch.arange(width + room, device=ids.device) < start[:, None]
            zeros = torch.zeros(before.shape, dtype=kept[0][0].dtype, device=ids.device)
            self.bias = zeros.masked_fill(before, -torch.inf)[:, None, None]
        self.norm = norm_of(trunk.ln_f)
        head = view.inner.get_output_embeddings()
        bias = None if head.bias is None else head.bias[: view.vocab]
        self.head = Layer(head.weight[: view.vocab], bias)
        self.logits = self.head(hidden)

    def push(self, tokens: Tensor) -> None:
        """Append one token per row."""
        n, slot, trunk = self.rows, self.slot, self.trunk
        bias = None if self.bias is None else self.bias[:n, ..., : slot + 1]
        x = trunk.wte.weight[tokens] + trunk.wpe.weight[self.positions[:n]]
        for block, (keys, values) in zip(self.blocks, self.cache, strict=True):
            q, k, v = block.attend(x)
            keys[:n, :, slot] = k
            values[:n, :, slot] = v
            found = scaled_dot_product_attention(
                q[:, :, None],
                keys[:n, :, : slot + 1],
                values[:n, :, : slot + 1],
                attn_mask=bias,
                scale=block.scale,
            )
            x = block.finish(x, found.reshape(n, -1))
        self.logits = self.head(layer_norm(x, *self.norm))
        self.slot += 1
        self.positions = self.positions + 1

    def keep(self, index: Tensor) -> None:
        """Go on with the rows at `index` alone; only rows that change their place are copied."""
        self.rows = len(index)
        self.logits, self.positions = self.logits[index], self.positions[index]
        moved = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        if len(moved):
            for pair in self.cache:
                for states in pair:
                    states[moved, :, : self.slot] = states[index[moved], :, : self.slot]
        self.bias = None if self.bias is None else self.bias[index]


def prefilled(
    view: CausalLM, ids: Tensor, lengths: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor, int]:
    """Run right-padded prompts [n, T] of `lengths` [n] once.

    Returns each layer's keys and values as right-padded rows [n, heads, T + k, d], the last hidden states
    [n, D], the lengths with the soft prompt's k, and T + k.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    longer = lengths + view.width
    rows = Packing(longer, kept)
    hidden = view.packed(ids, rows, rows.place, longer.cumsum(0) - 1)
    return kept, hidden, longer, rows.width


def aligned(states: Tensor, start: Tensor, width: int) -> Tensor:
    """Return right-padded rows [n, heads, T, d] shifted to the right, each by its `start` [n]."""
    if not bool((start > 0).any()):
        return states
    source = (torch.arange(width, device=states.device) - start[:, None]).clamp(min=0)
    row = torch.arange(len(states), device=states.device)[:, None]
    return states[row, :, source].transpose(1, 2)


class _Block:
    """A block's weights for one token per row."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block.attn, block.mlp
        self.norms = [norm_of(block.ln_1), norm_of(block.ln_2)]
        self.act, self.scale, self.heads = mlp.act, scale_of(attention), attention.num_heads
        self.fused = type(mlp.act) in (GELU, TanhGELU) and mlp.act.approximate == "tanh"
        self.qkv, self.out, self.up, self.down = (
            Layer(layer.weight.t(), layer.bias)
            for layer in (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj)
        )

    def attend(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return query, key and value of one token per row, each [n, heads, d]."""
        qkv = self.qkv(layer_norm(x, *self.norms[0]))
        return qkv.view(len(x), 3, self.heads, -1).unbind(1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the block's result [n, D] for its input and what attention found."""
        x = self.out.added(attended, x)
        inner = layer_norm(x, *self.norms[1])
        inner = self.up.gelu(inner) if self.fused else self.act(self.up(inner))
        return self.down.added(inner, x)


def scale_of(attention: Any) -> float | None:
    """The factor of GPT-2's attention scores; None, which is 1 / sqrt(d), where transformers names none."""
    scale: float | None = getattr(attention, "scaling", None)
    return scale


def norm_of(module: Any) -> tuple[Any, ...]:
    """A layer norm as the arguments of `torch.nn.functional.layer_norm`."""
    return module.normalized_shape, module.weight, module.bias, module.eps


class CachedStream:
    """Any causal language model of transformers, by its own forward pass and cache; rows are left padded."""

    def __init__(self, view: CausalLM, ids: Tensor, lengths: Tensor) -> None:
        self.view = view
        forwards = [view.inner.forward, getattr(view.inner, "base_model", view.inner).forward]
        self.takes_positions = any("position_ids" in signature(forward).parameters for forward in forwards)
        width = int(lengths.max())
        place = torch.arange(width, device=ids.device) - (width - lengths)[:, None]
        padded = ids.gather(1, place.clamp(min=0)).masked_fill(place < 0, 0)
        mask = place >= 0
        inputs: dict[str, Any] = {"input_ids": padded}
        if view.prompt is not None:
            embedded, mask = _place_prompt(view, padded, mask)
            inputs = {"inputs_embeds": embedded}
        self.mask = None if bool(mask.all()) else mask.long()  # without padding, no mask: the faster kernel
        self.cache = DynamicCache()
        self.positions: Tensor
        self.logits: Tensor
        self._run((mask.long().cumsum(-1) - 1).clamp(min=0), inputs)

    def push(self, tokens: Tensor) -> None:
        """Append one token per row."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._run(self.positions + 1, {"input_ids": tokens[:, None]})

    def keep(self, index: Tensor) -> None:
        """Drop every row but those at `index`."""
        self.positions, self.logits = self.positions[index], self.logits[index]
        self.mask = None if self.mask is None else self.mask[index]
        self.cache.batch_select_indices(index)

    def _run(self, positions: Tensor, inputs: dict[str, Any]) -> None:
        if self.takes_positions:
            inputs["position_ids"] = positions
        if self.mask is not None:
            inputs["attention_mask"] = self.mask
        hidden, _ = self.view.trunk(**inputs, past_key_values=self.cache, use_cache=True)
        self.positions = positions[:, -1:]
        self.logits = self.view.head(hidden[:, -1])[:, : self.view.vocab]


def _place_prompt(view: CausalLM, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return embeddings [B, S + k, D] and mask [B, S + k] of left-padded ids with the prompt between padding
    and text.
    """
    assert view.prompt is not None
    text = view.inner.get_input_embeddings()(ids)
    slot = torch.arange(ids.shape[1] + view.width, device=ids.device)
    in_prompt = slot - (~mask).sum(1, keepdim=True)  # the prompt vector that would stand in this slot
    shifted = text[:, (slot - view.width).clamp(min=0)]
    vectors = view.prompt.vectors.to(text.dtype)[in_prompt.clamp(0, view.width - 1)]
    chosen = ((in_prompt >= 0) & (in_prompt < view.width))[..., None]
    return torch.where(chosen, vectors, shifted), in_prompt >= 0
