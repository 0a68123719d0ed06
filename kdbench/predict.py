"""Next-token distributions at the target positions, projected in chunks, never held whole.

A causal language model is seen as a trunk (ids to hidden states) and a head (hidden states to logits).
Whether a model's logits really are `head(trunk(ids))` is tried on a probe once per model: one that scales or
caps its logits afterwards is run whole instead, so that nothing is silently different.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdbench.distiller import Batch, target_mask
from kdbench.prompts import PromptedModel


class Prediction:
    """Next-token distributions at N positions, as hidden states and the head that turns them into logits."""

    def __init__(self, hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, vocab: int) -> None:
        self.hidden = hidden
        self.targets = targets
        self.vocab = vocab
        self._head = head
        # a prediction made without gradients stays so, also when the head, a parameter, projects it later
        self._grad = torch.is_grad_enabled()

    def __len__(self) -> int:
        return len(self.hidden)

    def logits(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the logits [stop - start, V] of these positions, in float32 at least."""
        with torch.set_grad_enabled(self._grad and torch.is_grad_enabled()):
            logits = self._head(self.hidden[start:stop])[..., : self.vocab]
        return logits if logits.dtype == torch.float64 else logits.float()


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
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=enabled):
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


class CausalLM:
    """A causal language model, bare or prompted, as trunk and head; holds no state of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.prompt = model.prompt if isinstance(model, PromptedModel) else None
        self.inner: Any = model.model if isinstance(model, PromptedModel) else model
        self.vocab = usable_vocab(self.inner)
        self.split = _logits_are_head_of_trunk(self.inner)

    @property
    def width(self) -> int:
        """The number of soft-prompt vectors."""
        return 0 if self.prompt is None else self.prompt.length

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states (which are logits already where the model does not split)."""
        if self.split:
            logits: Tensor = self.inner.get_output_embeddings()(hidden)
            return logits
        return hidden

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


def predict(model: nn.Module, batch: Batch) -> Prediction:
    """Return the model's next-token distributions at the N target positions of `batch`, row by row.

    Rows are right padded, so no target sees padding and no attention mask is needed. A field
    `position_offset` [B] shifts the position ids of a row.
    """
    width = max(int(batch["length"].max()), 2) if batch.size else 2
    cut = batch.replace(input_ids=batch["input_ids"][:, :width])
    ids, mask = cut["input_ids"], target_mask(cut)
    view = CausalLM(model)
    positions = None
    if not batch.size:  # an empty share of an update: models do not take batches of no rows
        return Prediction(
            torch.zeros(0, view.vocab, device=ids.device), lambda logits: logits, ids[:, 0], view.vocab
        )
    if "position_offset" in batch:
        positions = (
            torch.arange(width - 1 + view.width, device=ids.device) + batch["position_offset"][:, None]
        )
    hidden = view.hidden(ids[:, :-1], positions)
    return Prediction(hidden[mask], view.head, ids[:, 1:][mask], view.vocab)
