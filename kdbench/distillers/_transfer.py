"""What prompt tuning and prompt transfer share: the prompted model, the loss of a task, distances of outputs.

Shapes as in `kdbench.prompted`. A unit is what a task's loss is a mean over: an example, or a labelled token.

Source: task losses of P-Tuning v2's and PANDA's public code: cross-entropy, the squared error for a number,
the mean of the start's and the end's cross-entropy for a span.
Differs: means are over the units of the whole update, however it was cut; in that code over those of a batch,
which is the same for one process and one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdbench.distiller import Batch, Data, Distiller, Step
from kdbench.errors import UserError
from kdbench.prompted import PromptedEncoder, outputs_of
from kdbench.prompts import DeepPrompt, SoftPrompt
from kdbench.rollout import evaluating
from kdbench.transferability import signature

IGNORED = -100  # in `labels`: this token has no label
NEEDS = ("example_id", "input_ids", "length")


@dataclass
class PromptConfig:
    """The prompt; all tasks of a board need the same, for it is handed from one to the other."""

    prompt: Literal["deep", "shallow"] = "deep"  # keys and values of every layer, or vectors before the text
    prompt_length: int = 20  # prompt tokens
    prompt_init_std: float = (
        0.02  # of the prompt's normal noise; the head's is the encoder's initializer_range
    )
    reparameterize: int = (
        0  # width of the two-layer MLP that makes a deep prompt; 0: none (the code's is 512)
    )
    texts: int = 1000  # of the training texts that represent the task, at most

    def __post_init__(self) -> None:
        for name in ("prompt_length", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be 1 or more")
        if self.prompt_init_std < 0 or self.reparameterize < 0:
            raise ValueError("prompt_init_std and reparameterize must be 0 or more")
        if self.reparameterize and self.prompt == "shallow":
            raise ValueError("reparameterize makes deep prompts; a shallow one has none")


def prompted(encoder: nn.Module, cfg: PromptConfig) -> PromptedEncoder:
    """Return the frozen encoder behind a random prompt, with a new head for its task.

    The prompt is drawn first: runs of one seed share it, whatever their task.

    Raises: UserError for an encoder that takes no deep prompt.
    """
    any_encoder: Any = encoder
    prompt: DeepPrompt | SoftPrompt
    if cfg.prompt == "deep":
        prompt = DeepPrompt(any_encoder.config, cfg.prompt_length, cfg.prompt_init_std, cfg.reparameterize)
        _check_deep(any_encoder, prompt)
    else:
        width = any_encoder.get_input_embeddings().weight.shape[1]
        prompt = SoftPrompt(cfg.prompt_init_std * torch.randn(cfg.prompt_length, width))
    config = any_encoder.config
    return PromptedEncoder(
        encoder, prompt, config.task_format, outputs_of(config), getattr(config, "initializer_range", 0.02)
    )


def _check_deep(encoder: nn.Module, prompt: DeepPrompt) -> None:
    """Raises: UserError for an encoder whose attention does not read keys and values that it is given."""
    any_encoder: Any = encoder
    own = next(encoder.parameters())
    ids = torch.zeros(1, 1, dtype=torch.long, device=own.device)
    mask = torch.ones(1, 2, dtype=torch.long, device=own.device)
    cache = prompt.cache(prompt.table()[:1].detach().to(own)[None])
    with torch.no_grad(), evaluating(encoder):
        try:
            encoder(input_ids=ids, attention_mask=mask, past_key_values=cache)
            taken = cache.get_seq_length() > 1
        except (TypeError, RuntimeError, AttributeError):
            taken = False
    if not taken:
        raise UserError(
            f"{any_encoder.config.model_type} encoders take no keys and values from before: "
            "set prompt = 'shallow'"
        )


def load_prompt(model: PromptedEncoder, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put a source's prompt in place of the model's own; no head is handed over.

    Args: `tensors`: the prompt's own, by name; `where`: the source, for the error.

    Raises: UserError where they do not fit exactly: another length, kind or width.
    """
    assert model.prompt is not None
    own = model.prompt.state_dict()
    shapes = {name: list(value.shape) for name, value in own.items()}
    given = {name: list(value.shape) for name, value in tensors.items()}
    if shapes != given:
        raise UserError(
            f"{where}: its prompt {given} does not fit this one, {shapes}; all rows of a board need the same "
            "prompt, prompt_length and reparameterize"
        )
    model.prompt.load_state_dict(dict(tensors))


# ----------------------------------------------------------------------------------------------------- losses
def counted(batch: Batch, step: Step) -> Batch:
    """Return the rows with `units` [B], the labelled tokens of the whole update, where there are labels."""
    if "labels" not in batch:
        return batch
    count = step.all_sum((batch["labels"] != IGNORED).sum().double())
    return batch.replace(units=count.expand(batch.size))


def unit_mean(values: Tensor, batch: Batch) -> Tensor:
    """Return the sum of `values`, one a unit, over the number of units of the whole update, a scalar."""
    if "units" in batch:
        return values.sum() / batch["units"][0].clamp(min=1).to(values.dtype)
    return values.sum() / max(batch.totals.examples, 1.0)


def task_losses(logits: Tensor, batch: Batch, task_format: str) -> Tensor:
    """Return the loss of each unit, in nats, or squared units of the number."""
    if task_format == "number":
        return (logits[:, 0] - batch["target"].to(logits.dtype)).square()
    if task_format == "tokens":
        labels, logits = _labelled(batch, logits)
        return functional.cross_entropy(logits, labels, reduction="none")
    if task_format == "span":
        both = _within(logits, batch)
        start = functional.cross_entropy(both[..., 0], batch["start"], reduction="none")
        return (start + functional.cross_entropy(both[..., 1], batch["end"], reduction="none")) / 2
    return functional.cross_entropy(logits, batch["class_label"], reduction="none")


def squared_gaps(q: Tensor, p: Tensor, batch: Batch, task_format: str) -> Tensor:
    """Return the mean over outputs of the squared difference of student and teacher logits, one a unit.

    Adding a number to all logits of the teacher changes it, unlike a softmax' divergence. Of a choice the
    outputs are the choices, of a span the positions of both ends.
    """
    gaps = (q - p).square()
    if task_format == "tokens":
        return _labelled(batch, gaps)[1].mean(-1)
    if task_format == "span":
        real = torch.arange(gaps.shape[1], device=gaps.device) < batch["length"][:, None]
        return (gaps * real[..., None]).sum((1, 2)) / (2 * batch["length"].clamp(min=1))
    return gaps.mean(-1)


def divergences(q: Tensor, p: Tensor, batch: Batch, task_format: str, temperature: float) -> Tensor:
    """Return T^2 KL(p || q) of the distributions softmax(logits / T), one a unit. Raises: ValueError: a
    number.
    """
    if task_format == "number":
        raise ValueError("distill = 'prob_kl' needs a distribution; a number has none")
    if task_format == "tokens":
        p, q = _labelled(batch, p)[1], _labelled(batch, q)[1]
    elif task_format == "span":
        p, q = _within(p, batch).transpose(1, 2), _within(q, batch).transpose(1, 2)
    log_q, log_p = (q / temperature).log_softmax(-1), (p / temperature).log_softmax(-1)
    kl = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return temperature**2 * (kl.mean(-1) if task_format == "span" else kl)


def _labelled(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
    """The labels of the labelled tokens [n], and the values [n, ...] there."""
    labels = batch["labels"][:, : values.shape[1]]
    return labels[labels != IGNORED], values[labels != IGNORED]


def _within(logits: Tensor, batch: Batch) -> Tensor:
    """Logits [B, T, 2] with the padding all but left out of the softmax over positions."""
    real = torch.arange(logits.shape[1], device=logits.device) < batch["length"][:, None]
    return logits.masked_fill(~real[..., None], -1e9)


# ----------------------------------------------------------------------------------------------------- method
class PromptTuned(Distiller):
    """A prompt and a head that are trained on a task; what a method adds is where the prompt starts, and a
    loss.
    """

    head = "encoder"
    needs = NEEDS
    student: PromptedEncoder

    @classmethod
    def added_positions(cls, cfg: Any) -> Mapping[str, int]:
        return {"student": cfg.prompt_length}

    def train_step(self, batch: Batch, step: Step) -> None:
        """Update prompt and head once."""
        step.update("student", self.loss, counted(batch, step))

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean of the task's loss over the update's units."""
        return unit_mean(task_losses(logits, batch, self.student.task_format), batch)

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the task's loss."""
        return self.task_loss(self.student(batch), batch)

    def finish(self, data: Data) -> None:
        """Keep what represents the task: its texts, and the extra set `probe`, read with the own prompt."""
        sets = {"own": "train", **({"probe": "probe"} if "probe" in data.names else {})}
        self.student.signature = {
            f"{inputs}.{name}": value.float()
            for inputs, split in sets.items()
            for name, value in signature(self.student, data.batches(split, 64, self.cfg.texts)).items()
        }

    def measures(self) -> Mapping[str, float]:
        return {"trained_parameters": trained_parameters(self)}


def trained_parameters(method: Distiller) -> float:
    """Return how many numbers the group `student` trains."""
    return float(sum(param.numel() for _, param in method.groups()["student"].params))
