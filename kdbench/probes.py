"""Probes that read class probabilities off every inner layer of a masked language model at its mask.

Shapes: B rows, L layers of the model, H width, N classes; probe j = 1..L - 1 reads the output of layer j.

Source: Prompt-Distiller (few-shot distillation for prompt-based learners with dual contrastive learning,
ICASSP 2023), sec. 3.2: "an MLM-based probe classifier for each transformer encoder layer (apart from the last
layer)".
Differs: the paper gives no architecture. A probe here is a copy of the model's own head up to its vocabulary,
which is cut down to the label words: what a probe may learn does not grow with the vocabulary. All layers are
stacked and run as one batched product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ProbeKind = Literal["head_copy", "linear", "frozen_head"]


class _Head(NamedTuple):
    """A masked language model's head: dense, activation, norm, decoder."""

    dense: nn.Linear
    activation: Callable[[Tensor], Tensor]
    norm: nn.LayerNorm
    decoder: nn.Linear


def _head_of(model: nn.Module) -> _Head:
    """Raises: ValueError for a model that is no masked language model of type BERT or RoBERTa."""
    any_model: Any = model
    kind = getattr(getattr(any_model, "config", None), "model_type", type(model).__name__)
    if kind == "bert" and hasattr(model, "cls") and hasattr(any_model.cls, "predictions"):
        bert = any_model.cls.predictions
        return _Head(
            bert.transform.dense, bert.transform.transform_act_fn, bert.transform.LayerNorm, bert.decoder
        )
    if kind == "roberta" and hasattr(model, "lm_head"):
        roberta = any_model.lm_head
        return _Head(roberta.dense, F.gelu, roberta.layer_norm, roberta.decoder)
    raise ValueError(
        f"probes copy the head of a masked language model of type bert or roberta, not of a "
        f"{type(model).__name__} of type '{kind}'"
    )


class ProbeBank(nn.Module):
    """The L - 1 probes of one model, of one kind.

    head_copy    a trainable copy of the model's head: dense, activation, norm, then the N rows of the label
                 words, which stay fixed, plus a trainable bias of each class
    linear       norm, then a trainable linear map to the N classes; starts at 0
    frozen_head  head_copy without training, a reading by the model's own head
    """

    rows: Tensor
    bias: Tensor
    weight: Tensor
    dense_weight: Tensor
    dense_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, model: nn.Module, n_classes: int, kind: ProbeKind = "head_copy") -> None:
        """Copy what the model's head holds now; the label words follow with `set_label_words`.

        Raises: ValueError for another kind, a model with fewer than two layers, or one without such a head.
        """
        super().__init__()
        if kind not in get_args(ProbeKind):
            raise ValueError(f"kind = '{kind}' is none of {', '.join(get_args(ProbeKind))}")
        any_model: Any = model
        head = _head_of(model)
        self.kind, self.layers = kind, int(any_model.config.num_hidden_layers) - 1
        if self.layers < 1:
            raise ValueError("a model with one layer has no inner layer to probe")
        self._activation, self._eps = head.activation, head.norm.eps
        width, like = head.decoder.in_features, head.decoder.weight.detach()
        if kind == "linear":
            self._hold("norm_weight", torch.ones_like(like[0]))
            self._hold("norm_bias", torch.zeros_like(like[0]))
            self._hold("weight", like.new_zeros(n_classes, width))
        else:
            self._hold("dense_weight", head.dense.weight)
            self._hold("dense_bias", head.dense.bias)
            self._hold("norm_weight", head.norm.weight)
            self._hold("norm_bias", head.norm.bias)
            self.register_buffer("rows", like.new_zeros(n_classes, width))
        self._hold("bias", like.new_zeros(n_classes))

    def _hold(self, name: str, value: Tensor) -> None:
        """Keep one copy of `value` per layer, trainable unless the bank is frozen."""
        stacked = value.detach().expand(self.layers, *value.shape).clone()
        if self.kind == "frozen_head":
            self.register_buffer(name, stacked)
        else:
            self.register_parameter(name, nn.Parameter(stacked))

    @torch.no_grad()
    def set_label_words(self, model: nn.Module, verbalizer_ids: Tensor) -> None:
        """Take the rows and biases of the label words, `verbalizer_ids` [N], from the model's decoder."""
        if self.kind == "linear":
            return
        decoder = _head_of(model).decoder
        self.rows.copy_(decoder.weight[verbalizer_ids])
        self.bias.copy_(decoder.bias[verbalizer_ids].expand_as(self.bias))

    def logits(self, states: Tensor) -> Tensor:
        """Return class logits [B, L - 1, N] of the mask's states [B, L - 1, H], layers 1..L - 1 in order, in
        float32 at least.
        """
        x = states.transpose(0, 1)
        if not torch.is_autocast_enabled(x.device.type):  # which casts by itself
            x = x.to(self.norm_bias.dtype)  # a model in bfloat16 gives states in it
        if self.kind == "linear":
            x = torch.baddbmm(self.bias[:, None], self._normed(x), self.weight.transpose(1, 2))
        else:
            x = torch.baddbmm(self.dense_bias[:, None], x, self.dense_weight.transpose(1, 2))
            x = self._normed(self._activation(x)) @ self.rows.T + self.bias[:, None]
        return (x if x.dtype == torch.float64 else x.float()).transpose(0, 1)

    def _normed(self, x: Tensor) -> Tensor:
        return torch.addcmul(
            self.norm_bias[:, None], F.layer_norm(x, x.shape[-1:], eps=self._eps), self.norm_weight[:, None]
        )

    def probabilities(self, states: Tensor) -> Tensor:
        """Return each probe's distribution over classes, [B, L - 1, N], for states [B, L - 1, H]."""
        return self.logits(states).softmax(-1)

    def mean(self, states: Tensor) -> Tensor:
        """Return the mean of the probes' distributions, [B, N], for states [B, L - 1, H]."""
        return self.probabilities(states).mean(1)
