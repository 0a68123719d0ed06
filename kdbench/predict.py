"""Next-token distributions at the target positions, projected in chunks, never held whole.

A causal language model is seen as a trunk (ids to hidden states) and a head (hidden states to logits).
Whether a model's logits really are `head(trunk(ids))` is tried on a probe once per model: one that scales or
caps its logits afterwards is run whole instead, so that nothing is silently different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdbench import packing
from kdbench.clock import detail, role_of
from kdbench.distiller import Batch, target_mask
from kdbench.products import product
from kdbench.prompts import PromptedModel

ALIGNED = 64  # a head's rows on a GPU are filled up to a multiple of this


class Prediction:
    """Next-token distributions at N positions, as hidden states and the head that turns them into logits."""

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        targets: Tensor,
        vocab: int,
        *,
        at: Callable[[Tensor], Tensor] | None = None,
        scale: float = 1.0,
    ) -> None:
        self.hidden = hidden
        self.targets = targets
        self.vocab = vocab
        self._head, self._at, self._scale = head, at, scale
        # a prediction made without gradients stays so, also when the head, a parameter, projects it later
        self._grad = torch.is_grad_enabled()
        weights = head.parameters() if isinstance(head, nn.Module) else ()
        self._trained = [x for x in (hidden, *weights) if self._grad and x.requires_grad]

    def __len__(self) -> int:
        return len(self.hidden)

    def logits(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the logits [stop - start, V] of these positions, in float32 at least."""
        with torch.set_grad_enabled(self._grad and torch.is_grad_enabled()):
            return self._logits(self.hidden[start:stop])

    def tempered(self, temperature: float) -> Prediction:
        """Return softmax(logits / temperature) at the same positions; at temperature 1, this prediction."""
        if temperature == 1:
            return self
        with torch.set_grad_enabled(self._grad):
            scale = self._scale / temperature
            return Prediction(self.hidden, self._head, self.targets, self.vocab, at=self._at, scale=scale)

    def detached(self) -> Prediction:
        """Return the same distributions, without a gradient."""
        with torch.no_grad():
            hidden = self.hidden.detach()
            return Prediction(hidden, self._head, self.targets, self.vocab, at=self._at, scale=self._scale)

    def at_targets(self, states: Tensor) -> Tensor:
        """Return states of another layer, as a forward hook saw them in this forward pass, at the N target
        positions, [N, H].

        Raises: ValueError for a prediction that no forward pass made.
        """
        if self._at is None:
            raise ValueError("at_targets: no forward pass made this prediction")
        return self._at(states)

    # ---- what `losses` asks of a prediction whose gradient it forms chunk by chunk
    def trained(self) -> list[Tensor]:
        """Return the tensors that a gradient goes to: the hidden states, then weights of the head."""
        return self._trained

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return the logits [stop - start, V] without a gradient, in a tensor that may be overwritten."""
        with torch.no_grad():
            logits = self._logits(self.hidden[start:stop])
        own = logits.untyped_storage().data_ptr() != self.hidden.untyped_storage().data_ptr()
        return logits if own else logits.clone()

    def pull_back(self, start: int, stop: int, gradient: Tensor, into: list[Tensor]) -> None:
        """Add to `into`, which has the shapes of `trained()`, what the gradient [stop - start, V] of the
        logits of these positions means for them.
        """
        if self._scale != 1:
            gradient = gradient * self._scale
        head: Any = self._head
        plain = _is_plain(head) and head.bias is None
        autocast = torch.is_autocast_enabled(gradient.device.type)
        if plain and not autocast and gradient.dtype == head.weight.dtype:
            hidden, weight = self.hidden[start:stop].detach(), head.weight.detach()[: self.vocab]
            for tensor, total in zip(self._trained, into, strict=True):
                if tensor is self.hidden:
                    torch.mm(gradient, weight, out=total[start:stop])
                else:
                    total[: self.vocab].addmm_(gradient.t(), hidden)
            return
        own = self.hidden[start:stop].detach()
        own.requires_grad_(self.hidden.requires_grad)
        with torch.enable_grad():
            logits = self._project(own)
        asked = [own if tensor is self.hidden else tensor for tensor in self._trained]
        found = torch.autograd.grad(logits, asked, gradient.to(logits.dtype), allow_unused=True)
        for tensor, total, value in zip(self._trained, into, found, strict=True):
            if value is not None and tensor is self.hidden:
                total[start:stop] = value
            elif value is not None:
                total += value

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._project(hidden)
        # rows without a gap between them: what comes next reads them many times
        logits = (logits if logits.dtype == torch.float64 else logits.float()).contiguous()
        return logits if self._scale == 1 else logits * self._scale

    def _project(self, hidden: Tensor) -> Tensor:
        """The head's logits [..., V], in its own precision."""
        head: Any = self._head
        more = -self.vocab % ALIGNED if hidden.device.type == "cuda" else 0
        if type(head) is nn.Linear and (more or self.vocab < head.out_features):
            # no logits that nobody reads, but for some on a GPU, whose fast kernels want a round number
            weight, bias = head.weight[: self.vocab], None if head.bias is None else head.bias[: self.vocab]
            if more:
                weight = nn.functional.pad(weight, (0, 0, 0, more))
                bias = None if bias is None else nn.functional.pad(bias, (0, more))
            return product(hidden, weight, bias)[..., : self.vocab]
        logits: Tensor = product(hidden, head.weight, head.bias) if _is_plain(head) else head(hidden)
        return logits if logits.shape[-1] == self.vocab else logits[..., : self.vocab]


def _is_plain(head: Any) -> bool:
    """Whether a head is weight and bias alone: no subclass, no hook, no forward of its own."""
    return type(head) is nn.Linear and not packing.is_watched(head) and "forward" not in vars(head)


_splits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _logits_are_head_of_trunk(model: nn.Module) -> bool:
    """Tell whether `lm_head(base_model(ids))` equals the model's own logits, by running both once."""
    if model not in _splits:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        trunk = getattr(model, "base_model", None)
        if head is None or trunk is None or trunk is model:
            _splits[model] = False
        else:
            ids = torch.arange(4, device=next(model.parameters()).device)[None] % usable_vocab(model)
            modes = [(module, module.training) for module in model.modules()]
            enabled = torch.is_autocast_enabled(ids.device.type)
            model.eval()
            # no cache: older versions of torch hand weights cast here, without their graph, to later passes
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=enabled, cache_enabled=False):
                probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
                ours = head(trunk(**probe).last_hidden_state)
                whole = model(**probe).logits
            for module, training in modes:
                module.training = training
            _splits[model] = bool(torch.equal(ours, whole))
    return _splits[model]


def usable_vocab(model: nn.Module) -> int:
    """Return how many ids of the model's vocabulary count: those shared by student and teacher, or all."""
    config: Any = model.config
    return int(getattr(config, "kdbench_vocab", None) or config.vocab_size)


def _itself(hidden: Tensor) -> Tensor:
    return hidden


class CausalLM:
    """A causal language model, bare or prompted, as trunk and head; holds no state of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.prompt = model.prompt if isinstance(model, PromptedModel) else None
        self.inner: Any = model.model if isinstance(model, PromptedModel) else model
        self.vocab = usable_vocab(self.inner)
        self.packs = packing.prepare(self.inner)
        self.split = _logits_are_head_of_trunk(self.inner)

    @property
    def width(self) -> int:
        """The number of soft-prompt vectors."""
        return 0 if self.prompt is None else self.prompt.length

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """What turns hidden states into logits (they are logits already where the model does not split)."""
        head: Callable[[Tensor], Tensor] = self.inner.get_output_embeddings() if self.split else _itself
        return head

    def trunk(self, **inputs: Any) -> tuple[Tensor, Any]:
        """Run the model and return hidden states [B, T, H] and its cache, if it keeps one."""
        if self.split:
            out = self.inner.base_model(**inputs)
            return out.last_hidden_state, getattr(out, "past_key_values", None)
        out = self.inner(**inputs)
        return out.logits, getattr(out, "past_key_values", None)

    def hidden(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return hidden states [B, T, H] of right-padded ids: text starts at position 0, after the soft
        prompt if any.
        """
        inputs: dict[str, Any] = {"use_cache": False}
        if positions is not None:
            inputs["position_ids"] = positions
        if self.prompt is None:
            return self.trunk(input_ids=input_ids, **inputs)[0]
        embedded = self.inner.get_input_embeddings()(input_ids)
        vectors = self.prompt(len(input_ids)).to(embedded.dtype)
        return self.trunk(inputs_embeds=torch.cat([vectors, embedded], dim=1), **inputs)[0][:, self.width :]

    def packed(self, input_ids: Tensor, rows: packing.Packing, positions: Tensor, wanted: Tensor) -> Tensor:
        """Return hidden states [M, H] of those of the N packed tokens of right-padded ids [B, T] that are
        `wanted` [M]; the soft prompt's in front of each row count as tokens.

        Args: `rows` packs rows that the soft prompt has made longer; `positions` [N]. For models that
        `packs` and `split`.
        """
        if self.prompt is None:
            return packing.run(self.inner, rows, positions, wanted, input_ids=rows.pack(input_ids))
        text = rows.place - self.width
        ids = input_ids[rows.row, text.clamp(min=0)]
        embedded = self.inner.get_input_embeddings()(ids)
        vectors = self.prompt(rows.rows).flatten(0, 1).to(embedded.dtype)
        embedded = embedded.index_copy(0, (text < 0).nonzero()[:, 0], vectors)
        return packing.run(self.inner, rows, positions, wanted, inputs_embeds=embedded)


def predict(model: nn.Module, batch: Batch) -> Prediction:
    """Return the model's next-token distributions at the N target positions of `batch`, row by row.

    The rows go through the model without their padding where the architecture allows it (`packing`), right
    padded otherwise: no target sees padding, and no attention mask is needed. A field `position_offset` [B]
    shifts the position ids of a row.
    """
    with detail(role_of(model)):
        shared_here = _shared.get()
        if shared_here is not None and shared_here.model is model:
            return shared_here.predict(batch)
        return _predict(CausalLM(model), batch)


@contextmanager
def shared(model: nn.Module) -> Iterator[None]:
    """Run the model once where several updates of a visit predict on the same rows with the same weights.

    The first prediction on a batch is made with a gradient, even where it is asked for without one, and the
    next one on that batch takes it over. An update that is cut into micro-batches shares nothing, for their
    activations would have to be kept together; nor does a model in train mode, whose dropout differs.
    """
    token = _shared.set(_Shared(model))
    try:
        yield
    finally:
        _shared.reset(token)


class _Shared:
    """The last prediction of one model with its graph, and what it was made from."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trained = [param for param in model.parameters() if param.requires_grad]
        self.rows: list[Tensor | None] = []
        self.versions: list[int] = []
        self.made: Prediction | None = None

    def predict(self, batch: Batch) -> Prediction:
        """`predict` on the model."""
        whole = batch.size == batch.totals.examples
        if not whole or any(module.training for module in self.model.modules()):
            self.made = None
            return _predict(CausalLM(self.model), batch)
        versions = [param._version for param in self.model.parameters()]
        rows = [batch.get(name) for name in ("input_ids", "prompt_length", "length", "position_offset")]
        if self.made is None or not all(map(_equal, rows, self.rows)) or self.versions != versions:
            asked = [param.requires_grad for param in self.trained]
            for param in self.trained:
                param.requires_grad_(True)
            try:
                with torch.enable_grad():
                    self.made = _predict(CausalLM(self.model), batch)
            finally:
                for param, wanted in zip(self.trained, asked, strict=True):
                    param.requires_grad_(wanted)
            self.rows, self.versions = rows, versions
        return self.made if torch.is_grad_enabled() else self.made.detached()


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two fields are the same, or hold the same."""
    if one is None or other is None or one is other:
        return one is other
    return torch.equal(one, other)


_shared: ContextVar[_Shared | None] = ContextVar("shared", default=None)


def _predict(view: CausalLM, batch: Batch) -> Prediction:
    width = max(int(batch["length"].max()), 2) if batch.size else 2
    ids = batch["input_ids"][:, :width]
    if ids.shape[1] < 2:  # rows of one token: room for the one that it predicts
        ids = nn.functional.pad(ids, (0, 2 - ids.shape[1]))
    mask = target_mask(batch.replace(input_ids=ids))
    if not batch.size:  # an empty share of an update: models do not take batches of no rows
        return Prediction(torch.zeros(0, view.vocab, device=ids.device), _itself, ids[:, 0], view.vocab)
    targets = ids[:, 1:][mask]
    offset = batch.get("position_offset")
    if view.packs and view.split:
        rows = packing.Packing((batch["length"] - 1).clamp(min=1) + view.width)
        positions = rows.place if offset is None else rows.place + offset[rows.row]
        wanted = nn.functional.pad(mask, (view.width, 0))[rows.row, rows.place].nonzero()[:, 0]
        hidden = view.packed(ids, rows, positions, wanted)
        return Prediction(hidden, view.head, targets, view.vocab, at=lambda states: states[0][wanted])
    shifted = None
    if offset is not None:
        shifted = torch.arange(width - 1 + view.width, device=ids.device) + offset[:, None]
    hidden = view.hidden(ids[:, :-1], shifted)
    return Prediction(
        hidden[mask], view.head, targets, view.vocab, at=lambda states: states[:, view.width :][mask]
    )
