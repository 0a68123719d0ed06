"""What tests of methods share: tiny float64 models, ragged rows, a `Step` that records, oracles in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from kdbench.distiller import Batch, Distiller
from kdbench.streams import generator

V, EOS = 13, 0
Array = npt.NDArray[np.float64]


def tiny_gpt2(seed: int, width: int = 8, layers: int = 1) -> GPT2LMHeadModel:
    """A random GPT-2 in float64 whose distributions are far from uniform; its config has dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V,
        n_positions=32,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        bos_token_id=EOS,
        eos_token_id=EOS,
        initializer_range=0.5,
    )
    return GPT2LMHeadModel(config).double().eval()


def ragged_rows() -> Batch:
    """Five rows padded with EOS: prompts of 1 to 4 tokens, responses of 1 to 6, one unfinished, one empty."""
    prompts = [[3, 4], [5], [6, 7, 8, 9], [1, 2, 3], [4, 4]]
    responses = [[5, 6, EOS], [7, 8, 9, 10, 11, EOS], [EOS], [12, 1], [2, EOS]]
    return make_rows(prompts, responses)


def make_rows(prompts: list[list[int]], responses: list[list[int]], first_id: int = 100) -> Batch:
    """Prompts with responses, right-padded with EOS one token beyond the longest."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    ids = torch.full((len(prompts), max(lengths) + 1), EOS)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : lengths[row]] = torch.tensor(p + r)
    return Batch(
        {
            "example_id": torch.arange(len(prompts)) + first_id,
            "input_ids": ids,
            "prompt_length": torch.tensor([len(p) for p in prompts]),
            "length": torch.tensor(lengths),
        }
    )


class FakeStep:
    """A `Step` without optimizer: `update` adds the gradients of the whole batch and keeps the batch."""

    def __init__(self, seed: int = 7, visit: int = 0) -> None:
        self.seed, self.visit, self.total = seed, visit, 10
        self.rollout_batch, self.max_new_tokens = 4, 5
        self.index, self.progress = 1, 0.0
        self.terms: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.updated: list[tuple[str, Batch]] = []

    def rng(self, name: str) -> torch.Generator:
        return generator(self.seed, name, self.visit)

    def all_sum(self, value: Tensor) -> Tensor:
        return value

    def count(self, name: str, amount: float) -> None:
        self.counts[name] = self.counts.get(name, 0.0) + amount

    def log(self, **terms: Tensor | float) -> None:
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + (
                value.item() if isinstance(value, Tensor) else value
            )

    def update(self, group: str, loss: Callable[[Any, Any], Tensor], batch: Any) -> None:
        self.updated.append((group, batch))
        loss(batch, self).backward()


class FakeData:
    """The rows that `prepare` may read, in parts of `size`."""

    def __init__(self, train: Batch, size: int = 2) -> None:
        self.train, self.size = train, size

    def batches(self, split: str, batch_size: int | None = None) -> Iterator[Batch]:
        assert split == "train"
        for start in range(0, self.train.size, self.size):
            yield self.train.rows(slice(start, start + self.size))


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def target_log_probs(
    model: nn.Module, batch: Batch, temperature: float = 1.0
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Log-probabilities [N, V] and target ids [N] from the model's own logits, one unpadded row at a time."""
    logits, targets = [], []
    for ids, start, stop in zip(batch["input_ids"], batch["prompt_length"], batch["length"], strict=True):
        with torch.no_grad():
            out = model(input_ids=ids[None, :stop]).logits[0].numpy()
        for t in range(int(start), int(stop)):
            logits.append(out[t - 1])
            targets.append(int(ids[t]))
    return log_softmax(np.stack(logits) / temperature), np.array(targets)


def nll(model: nn.Module, batch: Batch) -> float:
    """Mean of -log q(target) over all response tokens."""
    log_q, targets = target_log_probs(model, batch)
    return float(-log_q[np.arange(len(targets)), targets].mean())


def kl(first: nn.Module, second: nn.Module, batch: Batch, temperature: float = 1.0) -> float:
    """Mean of KL(first || second) over all response tokens."""
    a, _ = target_log_probs(first, batch, temperature)
    b, _ = target_log_probs(second, batch, temperature)
    return float((np.exp(a) * (a - b)).sum(-1).mean())


def gradients(distiller: Distiller, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the loss over `batch` in the student."""
    distiller.zero_grad()
    distiller.loss(batch, FakeStep()).backward()
    return {name: p.grad.clone() for name, p in distiller.student.named_parameters() if p.grad is not None}


def assert_gradient_is_slope(
    distiller: Distiller, batch: Batch, name: str = "transformer.wte.weight"
) -> None:
    """Compare the gradient in some entries of one parameter with central differences of the loss."""
    found = gradients(distiller, batch)[name].flatten()
    weight = dict(distiller.student.named_parameters())[name].data.view(-1)
    for entry in (1, len(weight) // 2, len(weight) - 2):
        kept, width = weight[entry].item(), 1e-5
        values = []
        for sign in (1, -1):
            weight[entry] = kept + sign * width
            with torch.no_grad():
                values.append(distiller.loss(batch, FakeStep()).item())
        weight[entry] = kept
        slope = (values[0] - values[1]) / (2 * width)
        assert abs(slope - float(found[entry])) <= 1e-8 + 1e-6 * abs(slope), (
            entry,
            slope,
            float(found[entry]),
        )
