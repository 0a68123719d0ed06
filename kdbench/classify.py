"""Class logits and layer states of masked language models and sequence classifiers.

Shapes: B rows, T tokens, N classes, L layers, H width, V vocabulary. A batch with `mask_index` is prompted:
the classes are read at the mask, from the logits of their label words. Any other batch is for a model with a
classifier on its first token.

Source: scores of label words at the mask as in Schick & Schütze 2021 (PET),
https://arxiv.org/abs/2001.07676, sec. 3.1, and Gao et al. 2021 (LM-BFF), https://arxiv.org/abs/2012.15723,
sec. 3.
Differs: the mask's row is taken before the vocabulary's head, which then sees B rows instead of B x T; a
model whose logits are not its head on its last states is run whole. Masks come from `length`, never from ids.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdbench.clock import detail, role_of
from kdbench.distiller import Batch

P = ParamSpec("P")
T = TypeVar("T")


def _timed(run: Callable[Concatenate[nn.Module, P], T]) -> Callable[Concatenate[nn.Module, P], T]:
    """Let a detailed clock charge a model's run to its role."""

    @functools.wraps(run)
    def timed(model: nn.Module, /, *args: P.args, **named: P.kwargs) -> T:
        with detail(role_of(model)):
            return run(model, *args, **named)

    return timed


@dataclass(frozen=True)
class Classified:
    """One forward: `logits` [B, N] and `states` [B, L + 1, H] at the mask, or at the first token.

    State 0 is the embedding output, state j the output of layer j. `whole` [B, V] are the logits of the whole
    vocabulary at the mask, None without a mask.
    """

    logits: Tensor
    states: Tensor
    whole: Tensor | None


@_timed
def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of the N classes, [B, N], in float32 at least."""
    if "mask_index" in batch:
        return _verbalized(mask_logits(model, batch), batch)
    if not batch.size:
        return _none(model)
    any_model: Any = model
    return _precise(any_model(**_inputs(model, batch)).logits)


@_timed
def mask_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of the whole vocabulary at each row's mask, [B, V], in float32 at least."""
    any_model: Any = model
    if not batch.size:
        return torch.zeros(0, any_model.config.vocab_size, device=batch["input_ids"].device)
    head = mlm_head(model)
    if head is None:
        return _precise(_at(any_model(**_inputs(model, batch)).logits, batch["mask_index"]))
    last = any_model.base_model(**_inputs(model, batch)).last_hidden_state
    return _precise(head(_at(last, batch["mask_index"])))


@_timed
def chosen_logits(model: nn.Module, batch: Batch, chosen: Tensor) -> Tensor:
    """Return the vocabulary's logits at the `chosen` [B, T] positions, [n, V], in float32 at least.

    Only these positions go through the vocabulary's head, where the model has one that can be told apart.
    """
    any_model: Any = model
    head = mlm_head(model)
    if head is None:
        return _precise(any_model(**_inputs(model, batch)).logits[chosen])
    return _precise(head(any_model.base_model(**_inputs(model, batch)).last_hidden_state[chosen]))


@_timed
def classified(model: nn.Module, batch: Batch) -> Classified:
    """Return class logits and the states of every layer at the mask (or first token), from one forward."""
    any_model: Any = model
    prompted = "mask_index" in batch
    if not batch.size:
        config = any_model.config
        states = next(model.parameters()).new_zeros(0, config.num_hidden_layers + 1, config.hidden_size)
        return Classified(_none(model), states, mask_logits(model, batch) if prompted else None)
    place = batch["mask_index"] if prompted else torch.zeros_like(batch["length"])
    head = mlm_head(model) if prompted else None
    run = any_model if head is None else any_model.base_model
    out = run(**_inputs(model, batch), output_hidden_states=True)
    states = torch.stack([_at(state, place) for state in out.hidden_states], dim=1)
    if not prompted:
        return Classified(_precise(out.logits), states, None)
    whole = _precise(_at(out.logits, place) if head is None else head(_at(out.last_hidden_state, place)))
    return Classified(_verbalized(whole, batch), states, whole)


@_timed
def all_states(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return the states of the embedding output and of every layer at every position, L + 1 of [B, T, H]."""
    any_model: Any = model
    if not batch.size:
        config = any_model.config
        empty = next(model.parameters()).new_zeros(*batch["input_ids"].shape, config.hidden_size)
        return [empty] * (config.num_hidden_layers + 1)
    return list(any_model.base_model(**_inputs(model, batch), output_hidden_states=True).hidden_states)


_heads: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def mlm_head(model: nn.Module) -> nn.Module | None:
    """Return the module that turns a masked language model's last states into vocabulary logits.

    None where there is no one such module: that is tried on a probe, once per model.
    """
    if model not in _heads:
        _heads[model] = _find_head(model)
    name = _heads[model]
    return None if name is None else getattr(model, name)


def _find_head(model: nn.Module) -> str | None:
    any_model: Any = model
    trunk = getattr(any_model, "base_model", None)
    others = [name for name, child in model.named_children() if child is not trunk]
    if trunk is None or trunk is model or len(others) != 1:
        return None
    ids = torch.arange(4, device=next(model.parameters()).device)[None] % any_model.config.vocab_size
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            whole = any_model(**probe).logits
            ours = getattr(model, others[0])(trunk(**probe).last_hidden_state)
    except (TypeError, RuntimeError):
        return None
    finally:
        for module, training in modes:
            module.training = training
    same = isinstance(ours, Tensor) and ours.shape == whole.shape and torch.equal(ours, whole)
    return others[0] if same else None


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Ids cut to the longest row, the mask of real tokens, and segments where the model has several."""
    any_model: Any = model
    width = int(batch["length"].max())
    ids = batch["input_ids"][:, :width]
    real = torch.arange(width, device=ids.device) < batch["length"][:, None]
    pad = getattr(any_model.config, "pad_token_id", None)
    inputs = {"input_ids": ids if pad is None else ids.masked_fill(~real, pad), "attention_mask": real.long()}
    if "segment_ids" in batch and getattr(any_model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch["segment_ids"][:, :width] * real
    return inputs


def _at(states: Tensor, place: Tensor) -> Tensor:
    """States [B, T, H] at one position of each row, [B, H]."""
    return states[torch.arange(len(states), device=states.device), place]


def _verbalized(logits: Tensor, batch: Batch) -> Tensor:
    return logits.gather(1, batch["verbalizer_ids"])


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _none(model: nn.Module) -> Tensor:
    any_model: Any = model
    return torch.zeros(0, any_model.config.num_labels, device=next(model.parameters()).device)
