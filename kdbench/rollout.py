"""Sampling responses as trainable batches.

A token is drawn by inverse CDF from one uniform number keyed by (seed, example, draw, position), so a
response depends on its keys and the model alone: not on the batch it was in, its order or its size (up to
ties in floating point).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from kdbench.clock import phase
from kdbench.distiller import Batch
from kdbench.errors import Diverged
from kdbench.predict import CausalLM
from kdbench.streams import uniform


class Keyed(Protocol):
    """The keys of a draw: a `Step` has them, and `Draw` where there is no training."""

    seed: int
    visit: int
    rollout_batch: int
    max_new_tokens: int

    def count(self, name: str, amount: float) -> None:
        """Add to a counter of the run's budget."""


@dataclass
class Draw:
    """Keys of a draw outside training: `visit` tells one sample of an example from another."""

    seed: int
    visit: int = 0
    rollout_batch: int = 64
    max_new_tokens: int = 256

    def count(self, name: str, amount: float) -> None:
        """Evaluation is not charged to the budget."""


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode without gradients, and put their modes back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def rollout(
    model: nn.Module,
    batch: Batch,
    step: Keyed,
    max_new_tokens: int | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    no_repeat_ngram: int = 0,
    mix: tuple[nn.Module, float] | None = None,
) -> Batch:
    """Return the prompts of `batch` with one sampled response each, in the same order.

    Args: `max_new_tokens` None is `step.max_new_tokens`; `temperature` 0 takes the likeliest token; `top_k` 0
    and `top_p` 1 cut nothing; `no_repeat_ngram` n forbids an n-gram of prompt and response to occur twice;
    `mix` = (teacher, alpha) samples from (1 - alpha) q + alpha p. A field `response_offset` [B] of `batch`
    says how many response tokens stand at the end of each prompt already (none of them an end token): they
    count as drawn, so that the next one has the key of its place in the whole response, and at most
    max_new_tokens - offset are added. Returns a batch with new `input_ids`, `length` (the end-of-sequence
    token included when it was drawn) and `finished` [B] bool; other fields are kept.
    Raises: ValueError for settings out of range, and for more tokens than the model has positions.
    """
    max_new_tokens = step.max_new_tokens if max_new_tokens is None else max_new_tokens
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or no_repeat_ngram < 0:
        raise ValueError(
            f"rollout: max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k}, "
            f"top_p {top_p}, no_repeat_ngram {no_repeat_ngram}: at least one is out of range"
        )
    models = [model] if mix is None else [model, mix[0]]
    for each in models:
        _check_positions(each, batch, max_new_tokens)
    offset = batch.get("response_offset")
    if offset is not None and not bool(((offset >= 0) & (offset <= max_new_tokens)).all()):
        raise ValueError(f"rollout: response_offset is not in 0..max_new_tokens = {max_new_tokens}")
    sampler = _Sampler(models, 0.0 if mix is None else mix[1], temperature, top_k, top_p, no_repeat_ngram)
    drawn = torch.zeros((batch.size, max_new_tokens), dtype=torch.long)
    new, finished = torch.zeros(batch.size, dtype=torch.long), torch.zeros(batch.size, dtype=torch.bool)
    with phase("rollout"), evaluating(*models):
        order = torch.argsort(batch["prompt_length"].cpu(), stable=True)
        if offset is not None:
            order = order[(offset.cpu() < max_new_tokens)[order]]
        for chunk in order.split(max(1, step.rollout_batch)) if len(order) else ():
            drawn[chunk], new[chunk], finished[chunk] = sampler.sample(batch, chunk, step, max_new_tokens)
    ids, prompt = batch["input_ids"], batch["prompt_length"].cpu()
    length = prompt + new
    width = int(length.max()) if batch.size else 1
    place = torch.arange(width) - prompt[:, None]
    text = pad(ids.cpu(), (0, max(0, width - ids.shape[1])))[:, :width]
    joined = torch.where(place < 0, text, drawn.gather(1, place.clamp(0, max_new_tokens - 1)))
    joined = joined.masked_fill(place >= new[:, None], 0).to(ids.device, ids.dtype)
    length, finished = length.to(ids.device), finished.to(ids.device)
    step.count("tokens_sampled", float(new.sum()))
    return batch.replace(input_ids=joined, length=length, finished=finished).with_totals(None)


def _check_positions(model: nn.Module, batch: Batch, max_new_tokens: int) -> None:
    view = CausalLM(model)
    known = getattr(view.inner.config, "max_position_embeddings", None)
    start = batch["prompt_length"] - batch.get("response_offset", torch.zeros_like(batch["prompt_length"]))
    longest = view.width + int(start.max()) + max_new_tokens if batch.size else 0
    if known is not None and longest - 1 > known:
        raise ValueError(
            f"rollout: prompts of up to {longest - max_new_tokens} tokens and max_new_tokens = "
            f"{max_new_tokens} need {longest - 1} positions, the model has {known}"
        )


def end_tokens(model: nn.Module) -> set[int]:
    """Return the ids that end a response of the model, by its config."""
    eos: Any = CausalLM(model).inner.config.eos_token_id
    return {int(i) for i in (eos if isinstance(eos, list | tuple) else [eos]) if i is not None}


class _Sampler:
    """Token-by-token sampling of left-padded rows from one model, or from a mixture of two."""

    def __init__(
        self, models: list[nn.Module], alpha: float, temperature: float, top_k: int, top_p: float, ngram: int
    ) -> None:
        self.views = [CausalLM(model) for model in models]
        self.alpha, self.temperature, self.top_k, self.top_p, self.ngram = (
            alpha,
            temperature,
            top_k,
            top_p,
            ngram,
        )
        self.eos = torch.tensor(sorted(end_tokens(models[0])), dtype=torch.long)

    def sample(
        self, batch: Batch, rows: Tensor, step: Keyed, max_new_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each of `rows` its response tokens [n, max_new_tokens], 0 behind the last, how many they
        are [n] and whether they ended [n] bool; on the CPU.
        """
        device = next(self.views[0].inner.parameters()).device
        lengths = batch["prompt_length"].cpu()[rows]
        width = int(lengths.max())
        place = torch.arange(width) - (width - lengths)[:, None]
        padded = batch["input_ids"].cpu()[rows].gather(1, place.clamp(min=0)).masked_fill(place < 0, 0)
        example_id = batch["example_id"].to(device)[rows.to(device)]
        streams = [_Stream(view, padded.to(device), (place >= 0).to(device)) for view in self.views]
        prompts = zip(padded.tolist(), lengths.tolist(), strict=True) if self.ngram else ()
        bans = [_NgramBan(self.ngram, prompt[width - length :]) for prompt, length in prompts]
        responses = torch.zeros((len(rows), max_new_tokens), dtype=torch.long)
        count, ended = torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.bool)
        offset = batch["response_offset"].to(device)[rows.to(device)] if "response_offset" in batch else None
        room = torch.full_like(rows, max_new_tokens) if offset is None else max_new_tokens - offset.cpu()
        live = torch.arange(len(rows))
        for index in range(int(room.max())):
            position: Any = index if offset is None else offset + index  # one number, or one per row
            probabilities = self._probabilities([stream.logits for stream in streams])
            if bans:
                self._forbid(probabilities, [bans[i] for i in live.tolist()])
            probabilities = self._truncate(probabilities)
            if self.temperature == 0:
                tokens = probabilities.argmax(-1)
            else:
                tokens = inverse_cdf(probabilities, uniform(step.seed, example_id, step.visit, position))
            drawn = tokens.cpu()
            if int(drawn.max()) >= probabilities.shape[-1]:  # what searchsorted gives for NaN
                raise Diverged(f"sampling: the distribution of response token {index} is not finite")
            responses[live, index], count[live] = drawn, index + 1
            for i, token in zip(live.tolist(), drawn.tolist(), strict=True) if bans else ():
                bans[i].push(token)
            last = torch.isin(drawn, self.eos)
            ended[live] = last
            keep = ~last & (index + 1 < room[live])
            if not keep.any():
                break
            if not keep.all():
                kept = keep.nonzero()[:, 0]
                live, kept = live[kept], kept.to(device)
                tokens, example_id = tokens[kept], example_id[kept]
                offset = None if offset is None else offset[kept]
                for stream in streams:
                    stream.keep(kept)
            for stream in streams:
                stream.push(tokens)
        return responses, count, ended

    def _probabilities(self, logits: list[Tensor]) -> Tensor:
        scale = self.temperature or 1.0
        parts = [torch.softmax((x if x.dtype == torch.float64 else x.float()) / scale, -1) for x in logits]
        if len(parts) == 1:
            return parts[0]
        shared = min(part.shape[-1] for part in parts)
        return (1 - self.alpha) * parts[0][:, :shared] + self.alpha * parts[1][:, :shared]

    def _forbid(self, probabilities: Tensor, bans: list[_NgramBan]) -> None:
        where = [(slot, token) for slot, ban in enumerate(bans) for token in ban.banned()]
        if where:
            slots, tokens = torch.tensor(where, device=probabilities.device).T
            probabilities[slots, tokens] = 0.0

    def _truncate(self, probabilities: Tensor) -> Tensor:
        if self.top_k and self.top_k < probabilities.shape[-1]:
            least = probabilities.topk(self.top_k).values[:, -1:]
            probabilities = probabilities.where(probabilities >= least, 0.0)
        if self.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            before = ordered.cumsum(-1, dtype=torch.float64) - ordered
            ordered = ordered.where(before < self.top_p * ordered.sum(-1, keepdim=True), 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
        return probabilities


def inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """Return one token per row: the first whose cumulative mass exceeds the share `u` [B] of the total."""
    cdf = probabilities.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:].contiguous()
    tokens = torch.searchsorted(cdf, u[:, None] * total, right=True)
    last = torch.searchsorted(cdf, total)  # the first that reaches the total: never a token of no mass
    return torch.minimum(tokens, last)[:, 0]


class _Stream:
    """One model's view of the rows being sampled: key-value cache, mask, and the logits of the next token."""

    def __init__(self, view: CausalLM, ids: Tensor, mask: Tensor) -> None:
        self.view = view
        forwards = [view.inner.forward, getattr(view.inner, "base_model", view.inner).forward]
        self.takes_positions = any("position_ids" in signature(forward).parameters for forward in forwards)
        inputs: dict[str, Any] = {"input_ids": ids}
        if view.prompt is not None:
            embedded, mask = _place_prompt(view, ids, mask)
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


class _NgramBan:
    """The tokens that would complete an n-gram which prompt and response already hold.

    Source: Paulus et al. 2017, https://arxiv.org/abs/1705.04304, sec. 2.5.
    """

    def __init__(self, n: int, prompt: list[int]) -> None:
        self.n, self.tokens = n, list[int]()
        self.followers: dict[tuple[int, ...], set[int]] = {}
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> None:
        """Append one token."""
        self.tokens.append(token)
        if len(self.tokens) >= self.n:
            gram = tuple(self.tokens[-self.n :])
            self.followers.setdefault(gram[:-1], set()).add(gram[-1])

    def banned(self) -> set[int]:
        """Return the tokens that must not come next."""
        if len(self.tokens) < self.n - 1:
            return set()
        return self.followers.get(tuple(self.tokens[len(self.tokens) - self.n + 1 :]), set())
