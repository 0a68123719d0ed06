"""Banks of probes in plain numpy, probe by probe."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from class_kit import Array, row_states

from kdbench.distiller import Batch
from kdbench.probes import ProbeBank


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def numpy_logits(bank: ProbeBank, states: Array, eps: float = 1e-12) -> Array:
    """Class logits [B, L - 1, N] for states [B, L - 1, H]."""
    value = {name: tensor.detach().numpy() for name, tensor in bank.state_dict().items()}
    out = []
    for j in range(states.shape[1]):
        x = states[:, j]
        if bank.kind != "linear":
            x = gelu(x @ value["dense_weight"][j].T + value["dense_bias"][j])
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        x = x * value["norm_weight"][j] + value["norm_bias"][j]
        rows = value["weight"][j] if bank.kind == "linear" else value["rows"]
        out.append(x @ rows.T + value["bias"][j])
    return np.stack(out, axis=1)


def inner_states(model: Any, rows: Batch) -> Array:
    """States [B, L - 1, H] of the inner layers at the mask, from single unpadded rows."""
    places = rows["mask_index"].tolist()
    return np.stack([one[1:-1, place] for one, place in zip(row_states(model, rows), places, strict=True)])


def probe_probabilities(bank: ProbeBank, model: Any, rows: Batch) -> Array:
    """Distributions [B, L - 1, N] of a bank on a model's own view of the rows."""
    logits = numpy_logits(bank, inner_states(model, rows))
    shifted: Array = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
