"""Sampling responses as trainable batches.

A token is drawn by inverse CDF from one uniform number keyed by (seed, example, draw, position), so a
response depends on its keys and the model alone: not on the batch it was in, its order or its size (up to
ties in floating point).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kdbench import captured
from kdbench.clock import detail, phase
from kdbench.decoding import Stream, stream
from kdbench.distiller import Batch
from kdbench.errors import Diverged
from kdbench.memory import keep_freed
from kdbench.predict import CausalLM
from kdbench.streams import uniform

IN_BLOCKS = 2**14
"""Entries of the vocabulary up to which a CPU sums a row's probabilities one by one."""


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
    log_probs: bool = False,
) -> Batch:
    """Return the prompts of `batch` with one sampled response each, in the same order.

    Args: `max_new_tokens` None is `step.max_new_tokens`; `temperature` 0 takes the likeliest token; `top_k` 0
    and `top_p` 1 cut nothing; `no_repeat_ngram` n forbids an n-gram of prompt and response to occur twice;
    `mix` = (teacher, alpha) samples from (1 - alpha) q + alpha p. A field `response_offset` [B] of `batch`
    says how many response tokens stand at the end of each prompt already (none of them an end token): they
    count as drawn, so that the next one has the key of its place in the whole response, and at most
    max_new_tokens - offset are added. `log_probs` adds a field `sampled_log_prob` [B, T-1]: the model's
    log-probability (nats, at temperature 1, nothing cut, no mixture) of each sampled token, laid out as
    `scatter_targets` does, 0 elsewhere. Returns a batch with new `input_ids`, `length` (the end-of-sequence
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
    said = torch.zeros((batch.size, max_new_tokens), dtype=torch.float64)
    new, finished = torch.zeros(batch.size, dtype=torch.long), torch.zeros(batch.size, dtype=torch.bool)
    with phase("rollout"), evaluating(*models):
        order = torch.argsort(batch["prompt_length"].cpu(), stable=True)
        if offset is not None:
            order = order[(offset.cpu() < max_new_tokens)[order]]
        for chunk in order.split(max(1, step.rollout_batch)) if len(order) else ():
            drawn[chunk], new[chunk], finished[chunk], said[chunk] = sampler.sample(
                batch, chunk, step, max_new_tokens, log_probs
            )
    ids, prompt = batch["input_ids"], batch["prompt_length"].cpu()
    length = prompt + new
    width = int(length.max()) if batch.size else 1
    place = torch.arange(width) - prompt[:, None]
    text = pad(ids.cpu(), (0, max(0, width - ids.shape[1])))[:, :width]
    joined = torch.where(place < 0, text, drawn.gather(1, place.clamp(0, max_new_tokens - 1)))
    joined = joined.masked_fill(place >= new[:, None], 0).to(ids.device, ids.dtype)
    length, finished = length.to(ids.device), finished.to(ids.device)
    step.count("tokens_sampled", float(new.sum()))
    fields = {"input_ids": joined, "length": length, "finished": finished}
    if log_probs:
        laid = said.gather(1, place.clamp(0, max_new_tokens - 1))
        laid = laid.masked_fill((place < 0) | (place >= new[:, None]), 0.0)[:, 1:]
        fields["sampled_log_prob"] = laid.float().to(ids.device)
    return batch.replace(**fields).with_totals(None)


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
    """Token-by-token sampling of rows from one model, or from a mixture of two."""

    def __init__(
        self, models: list[nn.Module], alpha: float, temperature: float, top_k: int, top_p: float, ngram: int
    ) -> None:
        self.views = [CausalLM(model) for model in models]
        self.alpha, self.temperature, self.top_k, self.top_p = alpha, temperature, top_k, top_p
        self.ngram = ngram
        self.eos = torch.tensor(sorted(end_tokens(models[0])), dtype=torch.long)

    def sample(
        self, batch: Batch, rows: Tensor, step: Keyed, max_new_tokens: int, say: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return for each of `rows` its response tokens [n, max_new_tokens], 0 behind the last, how many they
        are [n], whether they ended [n] bool, and their log-probabilities [n, max_new_tokens] if they are
        wanted; on the CPU.
        """
        device = next(self.views[0].inner.parameters()).device
        if device.type == "cpu":
            keep_freed()
        lengths = batch["prompt_length"].cpu()[rows]
        ids = batch["input_ids"].cpu()[rows, : int(lengths.max())]
        offset = batch["response_offset"].cpu()[rows] if "response_offset" in batch else None
        room = torch.full_like(rows, max_new_tokens) if offset is None else max_new_tokens - offset
        most = int(room.max())
        shares = self._shares(batch["example_id"].cpu()[rows], step, offset, most)
        if device.type == "cuda" and not self.ngram and captured.fits(self.views, lengths):
            found = self._captured(ids.to(device), lengths.to(device), shares, room)
        else:
            found = self._stepwise(ids, lengths, shares.to(device), room, say)
        tokens, count, ended, said = found
        more = max_new_tokens - most
        return pad(tokens, (0, more)), count, ended, pad(said, (0, more))

    def _captured(
        self, ids: Tensor, lengths: Tensor, shares: Tensor, room: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`sample` by captured steps on a GPU."""
        settings = self.alpha, self.temperature, self.top_k, self.top_p
        bare = copy(self)
        bare.views = []  # what is captured is kept, and must not keep the models
        with detail("decode"):
            found = captured.sample(
                self.views, ids, lengths, shares, room, self.eos, lambda x, u: bare._draw(x, u, []), settings
            )
        if int(found[0].max()) >= self.views[0].vocab:
            raise Diverged("sampling: the distribution of a response token is not finite")
        return found

    def _stepwise(
        self, ids: Tensor, lengths: Tensor, shares: Tensor, room: Tensor, say: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`sample` token by token; rows that have ended leave the batch at once."""
        device, most = shares.device, shares.shape[1]
        with detail("prefill"):
            streams = [stream(view, ids.to(device), lengths.to(device), most) for view in self.views]
        with detail("decode"):
            return self._decode(streams, ids, lengths, shares, room, say)

    def _decode(
        self, streams: list[Stream], ids: Tensor, lengths: Tensor, shares: Tensor, room: Tensor, say: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device, (rows, most) = shares.device, shares.shape
        prompts = zip(ids.tolist(), lengths.tolist(), strict=True) if self.ngram else ()
        bans = [_NgramBan(self.ngram, prompt[:length]) for prompt, length in prompts]
        responses = torch.zeros((rows, most), dtype=torch.long)
        log_probs = torch.zeros((rows, most), dtype=torch.float64)
        count, ended = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
        live = torch.arange(rows)
        for index in range(most):
            logits = [one.logits for one in streams]
            tokens = self._draw(logits, shares[:, index : index + 1], [bans[i] for i in live] if bans else [])
            drawn = tokens.cpu()
            if int(drawn.max()) >= logits[0].shape[-1]:  # what searchsorted gives for NaN
                raise Diverged(f"sampling: the distribution of response token {index} is not finite")
            responses[live, index], count[live] = drawn, index + 1
            if say:
                said = logits[0].double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
                log_probs[live, index] = said.cpu()
            for i, token in zip(live.tolist(), drawn.tolist(), strict=True) if bans else ():
                bans[i].push(token)
            last = torch.isin(drawn, self.eos)
            ended[live] = last
            keep = ~last & (index + 1 < room[live])
            if not keep.all():
                kept = _closed_up(keep)
                if not len(kept):
                    break
                live, there = live[kept], kept.to(device)
                tokens, shares = tokens[there], shares[there]
                for one in streams:
                    one.keep(there)
            if index + 1 < most:
                for one in streams:
                    one.push(tokens)
        return responses, count, ended, log_probs

    def _shares(self, example_id: Tensor, step: Keyed, offset: Tensor | None, most: int) -> Tensor:
        """The uniform numbers [n, most] of all rows and positions."""
        place = torch.arange(most) if offset is None else offset[:, None] + torch.arange(most)
        if self.temperature == 0:
            return torch.zeros(len(example_id), most)
        return uniform(step.seed, example_id[:, None], step.visit, place)

    def _draw(self, logits: list[Tensor], share: Tensor, bans: list[_NgramBan]) -> Tensor:
        """Return a token per row from the logits [n, V] of each model and uniform numbers [n, 1]."""
        if self.temperature == 0 and len(logits) == 1 and not bans:
            return torch.where(logits[0].isnan().any(-1), logits[0].shape[-1], logits[0].argmax(-1))
        probabilities = self._probabilities(logits)
        if bans:
            self._forbid(probabilities, bans)
        probabilities = self._truncate(probabilities)
        if self.temperature == 0:
            return probabilities.argmax(-1)
        return inverse_cdf(probabilities, share)

    def _probabilities(self, logits: list[Tensor]) -> Tensor:
        scaled = [x if x.dtype == torch.float64 else x.float() for x in logits]
        if self.temperature not in (0, 1):
            scaled = [x / self.temperature for x in scaled]
        parts = [torch.softmax(x, -1) for x in scaled]
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
    if probabilities.device.type == "cuda" or probabilities.shape[-1] > IN_BLOCKS:
        return inverse_cdf_in_blocks(probabilities, u)
    cdf = probabilities.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:].contiguous()
    tokens = torch.searchsorted(cdf, u.view(-1, 1) * total, right=True)
    last = torch.searchsorted(cdf, total)  # the first that reaches the total: never a token of no mass
    return torch.minimum(tokens, last)[:, 0]


def inverse_cdf_in_blocks(probabilities: Tensor, u: Tensor, block: int = 256) -> Tensor:
    """`inverse_cdf` by sums of blocks, then inside of one: a long row is scanned slowly, any by a GPU."""
    n, vocab = probabilities.shape
    whole = vocab - vocab % block
    sums = probabilities[:, :whole].view(n, whole // block, block).sum(-1, dtype=torch.float64)
    if whole < vocab:
        rest = probabilities[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
        sums = torch.cat([sums, rest], 1)
    sums = sums.cumsum(-1)
    total = sums[:, -1:].contiguous()
    target = u.view(-1, 1) * total
    reached = torch.searchsorted(sums, total)  # the first block that reaches the total
    which = torch.minimum(torch.searchsorted(sums, target, right=True), reached)
    which = which.clamp(max=sums.shape[1] - 1)  # one more where the total is not finite
    before = torch.where(which > 0, sums.gather(1, (which - 1).clamp(min=0)), 0.0)
    entries = which * block + torch.arange(block, device=probabilities.device)
    inside = probabilities.gather(1, entries.clamp(max=vocab - 1)).masked_fill(entries >= vocab, 0.0)
    inside = inside.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(inside, target - before, right=True)
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())  # never a token of no mass
    tokens = (which * block + torch.minimum(place, last))[:, 0]
    return torch.where(total[:, 0].isnan(), vocab, tokens)


def _closed_up(keep: Tensor) -> Tensor:
    """Return the indices of the rows to keep, those behind moved into the holes: few change their place."""
    n = int(keep.sum())
    index = torch.arange(n)
    index[~keep[:n]] = n + keep[n:].nonzero()[:, 0]
    return index


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
