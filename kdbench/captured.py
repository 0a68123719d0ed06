"""Sampling on a GPU without a word from the host: one CUDA graph per token, of fixed shapes by bucket.

A decoding step of a small model is a hundred kernels of microseconds, and the host cannot launch them as fast
as they run. So the whole step, the draw of the token included, is captured once per bucket (rows, width) and
replayed; every `CHECK_EVERY` tokens the host looks which rows have ended, and when half of them have, the
rest goes on in a smaller bucket. All graphs of a model read its weights from the same buffers, which each
rollout fills anew.

Source: own; the draw and its keys are those of `rollout`, so that both give the same tokens up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from kdbench.decoding import aligned, can_be_written_out, norm_of, prefilled, scale_of
from kdbench.predict import ALIGNED, CausalLM

CHECK_EVERY = 32  # tokens between two looks of the host
WIDTH = 64  # a bucket's width is a multiple of this
KEPT = 16  # buckets of a model that are kept, those that were used last

Draw = Callable[[list[Tensor], Tensor], Tensor]
"""Tokens [n] from the logits [n, V] of each model and uniform numbers [n, 1]."""


def fits(views: list[CausalLM], lengths: Tensor) -> bool:
    """Whether all models are GPT-2 as transformers has it, and every row has a prompt."""
    return all(map(can_be_written_out, views)) and bool((lengths > 0).all())


def rows_of(n: int) -> int:
    """The rows of the bucket for n rows: a power of two up to 8, a multiple of 8 above."""
    return 1 << (n - 1).bit_length() if n <= 8 else -(-n // 8) * 8


def sample(
    views: list[CausalLM],
    ids: Tensor,
    lengths: Tensor,
    shares: Tensor,
    room: Tensor,
    eos: Tensor,
    draw: Draw,
    name: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens [n, most], their number [n], whether a row ended [n] bool, and the first model's
    log-probabilities [n, most] (nats, float64), on the CPU.

    Args: `ids` [n, T] right padded, of `lengths` [n]; `shares` [n, most] uniform numbers; `room` [n] tokens
    that a row may get at most; `eos` ids that end a row; `name` tells settings of `draw` apart: equal names
    must draw alike.
    """
    n, most = shares.shape
    width = -(-(int(lengths.max()) + max(view.width for view in views) + most) // WIDTH) * WIDTH
    for view in views:
        _weights_of(view).load(view)
    bucket = _bucket(views, rows_of(n), width, draw, name, eos)
    bucket.start(views, ids, lengths, shares, room)
    where = torch.arange(n)  # of each row of the bucket, which row it is
    tokens, said = torch.zeros(n, most, dtype=torch.long), torch.zeros(n, most, dtype=torch.float64)
    count, ended = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
    for first in range(0, most, CHECK_EVERY):
        last = min(first + CHECK_EVERY, most)
        for _ in range(first, last):
            bucket.step()
        live = len(where)
        tokens[where, first:last] = bucket.tokens[:live, first:last].cpu()
        said[where, first:last] = bucket.said[:live, first:last].cpu()
        count[where], ended[where] = bucket.count[:live].cpu(), bucket.ended[:live].cpu()
        left = (~bucket.done[:live].cpu()).nonzero()[:, 0]
        if not len(left):
            break
        if len(left) <= live // 2 and rows_of(len(left)) < bucket.rows and last < most:
            smaller = _bucket(views, rows_of(len(left)), width, draw, name, eos)
            smaller.take(bucket, left)
            bucket, where = smaller, where[left]
    behind = torch.arange(most) >= count[:, None]
    return tokens.masked_fill(behind, 0), count, ended, said.masked_fill(behind, 0.0)


_buckets: WeakKeyDictionary[nn.Module, dict[Any, Bucket]] = WeakKeyDictionary()


def _bucket(views: list[CausalLM], rows: int, width: int, draw: Draw, name: Any, eos: Tensor) -> Bucket:
    """The bucket of that shape for these models, made and captured once."""
    known = _buckets.setdefault(views[0].inner, {})
    key = (rows, width, tuple(map(_place_of, views)), name, tuple(eos.tolist()))
    bucket = known.pop(key, None) or Bucket(views, rows, width, draw, eos)
    known[key] = bucket  # behind those that were used before
    while len(known) > KEPT:
        del known[next(iter(known))]
    return bucket


def _place_of(view: CausalLM) -> tuple[int, int, torch.dtype]:
    """What tells models apart: a bucket reads the tables of its models in place, and keeps them, so that no
    other model has them there.
    """
    return view.inner.transformer.wte.weight.data_ptr(), view.vocab, _dtype(view)


def _dtype(view: CausalLM) -> torch.dtype:
    """The precision of matrix products: autocast's where it is on, the weights' otherwise."""
    weight: Tensor = view.inner.transformer.wte.weight
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class Bucket:
    """Rows of fixed number and width, and the captured step that gives each of them one more token.

    `tokens` [rows, width], `said` [rows, width] and `count` [rows] are results; `ended` says that a row drew
    an end token, `done` that it gets no more.
    """

    def __init__(self, views: list[CausalLM], rows: int, width: int, draw: Draw, eos: Tensor) -> None:
        self.rows, self.width, self.draw = rows, width, draw
        self.models = [_Fixed(view, rows, width) for view in views]
        device = self.models[0].device
        self.eos = eos.to(device)
        self.tokens = torch.zeros(rows, width, dtype=torch.long, device=device)
        self.said = torch.zeros(rows, width, dtype=torch.float64, device=device)
        self.shares = torch.zeros(rows, width, dtype=torch.float64, device=device)
        self.room = torch.zeros(rows, dtype=torch.long, device=device)
        self.count = torch.zeros(rows, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)  # tokens drawn so far
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._capture()

    def start(
        self, views: list[CausalLM], ids: Tensor, lengths: Tensor, shares: Tensor, room: Tensor
    ) -> None:
        """Read the prompts."""
        n, most = shares.shape
        for model, view in zip(self.models, views, strict=True):
            model.start(view, ids, lengths)
        self._clear()
        self.shares[:n, :most] = shares.to(self.shares)
        self.room[:n] = room.to(self.room)
        self.done[:n] = False

    def take(self, other: Bucket, rows: Tensor) -> None:
        """Go on with some rows of a larger bucket."""
        n, index = len(rows), rows.to(self.index.device)
        self._clear()
        for name in ("tokens", "said", "shares", "room", "count", "ended", "done"):
            getattr(self, name)[:n] = getattr(other, name)[index]
        self.index.copy_(other.index)
        for mine, theirs in zip(self.models, other.models, strict=True):
            mine.take(theirs, index)

    def step(self) -> None:
        """Draw one token for every row, and read it."""
        if self.graph is None:
            with torch.no_grad():
                self._step()
        else:
            self.graph.replay()

    def _clear(self) -> None:
        for buffer in (self.tokens, self.said, self.shares, self.room, self.count, self.index):
            buffer.zero_()
        self.ended.fill_(False)
        self.done.fill_(True)

    def _step(self) -> None:
        logits = [model.logits for model in self.models]
        drawn = self.draw(logits, self.shares.index_select(1, self.index))
        vocab = logits[0].shape[-1]
        # an index behind the vocabulary is what the draw makes of NaN: kept for the host, not read by a model
        token = drawn.clamp(max=vocab - 1)
        self.tokens.index_copy_(1, self.index, drawn[:, None])
        log_prob = logits[0].log_softmax(-1).gather(-1, token[:, None]).double()
        self.said.index_copy_(1, self.index, log_prob)
        self.count.add_(~self.done)
        last = (token[:, None] == self.eos).any(-1) & ~self.done
        self.ended.logical_or_(last)
        self.done.logical_or_(last | (self.count >= self.room))
        for model in self.models:
            model.push(token)
        self.index.add_(1)

    def _capture(self) -> None:
        """Record the step, after it ran twice aside, as CUDA asks."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self._step()


class _Weights:
    """A GPT-2's matrices in buffers of the precision of matrix products, which all of its buckets read."""

    def __init__(self, view: CausalLM) -> None:
        self.dtype = _dtype(view)
        head = view.inner.get_output_embeddings()
        self.blocks = [_FixedBlock(block, self.dtype) for block in view.inner.transformer.h]
        self.vocab, rows = view.vocab, view.vocab + -view.vocab % ALIGNED
        self.head = torch.zeros(rows, head.weight.shape[1], dtype=self.dtype, device=head.weight.device)
        self.head_bias = None if head.bias is None else head.bias[: view.vocab]

    def load(self, view: CausalLM) -> None:
        """Take over the weights as they are."""
        with torch.no_grad():
            self.head[: self.vocab].copy_(view.inner.get_output_embeddings().weight[: view.vocab])
            for mine, block in zip(self.blocks, view.inner.transformer.h, strict=True):
                mine.load(block)


_weights: WeakKeyDictionary[nn.Module, dict[Any, _Weights]] = WeakKeyDictionary()


def _weights_of(view: CausalLM) -> _Weights:
    """The buffers of a model, made once."""
    known, key = _weights.setdefault(view.inner, {}), _place_of(view)
    if key not in known:
        known[key] = _Weights(view)
    return known[key]


class _Fixed:
    """One GPT-2 of a bucket: weights, keys and values at fixed places, the slot a number on the device."""

    def __init__(self, view: CausalLM, rows: int, width: int) -> None:
        trunk, self.weights = view.inner.transformer, _weights_of(view)
        self.device, self.dtype, self.rows, self.width = trunk.wte.weight.device, _dtype(view), rows, width
        self.tables = trunk.wte.weight.detach(), trunk.wpe.weight.detach()
        self.norm = norm_of(trunk.ln_f)
        shape = (rows, trunk.h[0].attn.num_heads, width, trunk.h[0].attn.head_dim)
        made = {"dtype": self.dtype, "device": self.device}
        self.cache = [(torch.zeros(shape, **made), torch.zeros(shape, **made)) for _ in trunk.h]
        self.bias = torch.zeros(rows, 1, 1, width, **made)
        self.slot = torch.zeros(1, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=self.device)
        exact = torch.promote_types(self.dtype, torch.float32)
        self.logits = torch.zeros(rows, view.vocab, dtype=exact, device=self.device)

    def start(self, view: CausalLM, ids: Tensor, lengths: Tensor) -> None:
        """Read the prompts."""
        n = len(ids)
        kept, hidden, longer, width = prefilled(view, ids, lengths)
        start = width - longer
        for (keys, values), pair in zip(self.cache, kept, strict=True):
            for space, states in zip((keys, values), pair, strict=True):
                space.zero_()  # what a mask hides is still multiplied by 0
                space[:n, :, :width] = aligned(states, start, width)
        slots = torch.arange(self.width, device=self.device)
        self.bias.fill_(-torch.inf)
        seen = (slots >= start[:, None]) & (slots < width)
        self.bias[:n, 0, 0].masked_fill_(seen, 0.0)
        self.slot.fill_(width)
        self.positions.zero_()
        self.positions[:n] = longer
        self.logits[:n] = self._logits(hidden)

    def take(self, other: _Fixed, rows: Tensor) -> None:
        """Go on with some rows of a larger bucket."""
        n = len(rows)
        for mine, theirs in zip(self.cache, other.cache, strict=True):
            for space, states in zip(mine, theirs, strict=True):
                space.zero_()
                space[:n] = states[rows]
        self.bias.fill_(-torch.inf)
        self.bias[:n] = other.bias[rows]
        self.positions.zero_()
        for name in ("positions", "logits"):
            getattr(self, name)[:n] = getattr(other, name)[rows]
        self.slot.copy_(other.slot)

    def push(self, tokens: Tensor) -> None:
        """Read one token per row."""
        n = self.rows
        last = self.tables[1].shape[0] - 1  # rows that are done run on beyond their room
        x = self.tables[0][tokens] + self.tables[1][self.positions.clamp(max=last)]
        self.bias.index_fill_(3, self.slot, 0.0)
        for block, (keys, values) in zip(self.weights.blocks, self.cache, strict=True):
            q, k, v = block.attend(x)
            keys.index_copy_(2, self.slot, k[:, :, None])
            values.index_copy_(2, self.slot, v[:, :, None])
            mask = self.bias.expand(n, 1, 1, self.width)
            found = scaled_dot_product_attention(
                q[:, :, None], keys, values, attn_mask=mask, scale=block.scale
            )
            x = block.finish(x, found.reshape(n, -1))
        self.logits.copy_(self._logits(layer_norm(x, *self.norm)))
        self.slot.add_(1).clamp_(max=self.width - 1)
        self.positions.add_(1)

    def _logits(self, hidden: Tensor) -> Tensor:
        bias = self.weights.head_bias
        logits = linear(hidden.to(self.dtype), self.weights.head)[:, : self.weights.vocab]
        return logits if bias is None else logits + bias.to(self.dtype)


class _FixedBlock:
    """A block's weights in buffers of the precision of matrix products."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        self.norms = [norm_of(block.ln_1), norm_of(block.ln_2)]
        self.act, self.scale, self.heads = block.mlp.act, scale_of(block.attn), block.attn.num_heads
        self.dtype = dtype
        self.weights = [
            (
                torch.empty_like(layer.weight.t(), dtype=dtype).contiguous(),
                torch.empty_like(layer.bias, dtype=dtype),
            )
            for layer in self._layers(block)
        ]

    @staticmethod
    def _layers(block: Any) -> tuple[Any, ...]:
        return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj

    def load(self, block: Any) -> None:
        for (weight, bias), layer in zip(self.weights, self._layers(block), strict=True):
            weight.copy_(layer.weight.t())
            bias.copy_(layer.bias)

    def attend(self, x: Tensor) -> tuple[Tensor, ...]:
        normed = layer_norm(x, *self.norms[0]).to(self.dtype)
        return linear(normed, *self.weights[0]).view(len(x), 3, self.heads, -1).unbind(1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + linear(attended, *self.weights[1])
        normed = layer_norm(x, *self.norms[1]).to(self.dtype)
        return x + linear(self.act(linear(normed, *self.weights[2])), *self.weights[3])
