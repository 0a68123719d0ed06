"""TinyBERT's distillation for a task: the teacher's layers first, then its class probabilities.

Source: Jiao et al. 2020 (TinyBERT), https://arxiv.org/abs/1909.10351, sec. 3.1, eq. 7-11, and its code,
https://github.com/huawei-noah/Pretrained-Language-Model/tree/master/TinyBERT. With L_S and L_T layers of
student and teacher, A attention scores before the softmax, H states (H^0 the embedding output), z logits:

    L_attn = sum_{m=1}^{L_S} MSE(A_S^m, A_T^{g(m)})              g(m) = m L_T / L_S
    L_hidn = sum_{m=0}^{L_S} MSE(W H_S^m + b, H_T^{g(m)})
    L_pred = CE(softmax(z_T / t), softmax(z_S / t)) / N

The first `intermediate_share` of the updates descends L_attn + L_hidn, the rest L_pred. No term has labels.
Modes: `full` is this; `prediction` has L_pred alone, throughout; `aligned` has no L_attn, and in L_hidn the
states of the first token and of whitespace words: means over their tokens, at words that both models read.
`full` is for models with one tokenizer. It takes means over heads first where their numbers differ.
Differs: one map (W, b) serves all m, as in the code; the paper has another, without bias, for the embeddings.
Means over positions are those of one row's own tokens, so that neither padding nor the cut of a batch moves
them; the code divides by the padded length and leaves the scores of padding's queries in. Scores are not
zeroed where they fall under -100, which in the code is how padding is known. L_pred's division by N is the
code's (`class_mean`). The classifier is the student's own; the code's applies a ReLU to the pooled state.
Data augmentation and general distillation are left out; no dropout, unless the training setting
`student_dropout` brings it back.
The code runs the stages one after the other, each with its own learning rate, schedule and optimizer; here
they share those of the row. So the second stage has only the end of the schedule: after a share of 0.8 of a
linear one to 0, a tenth of the peak rate in the mean. It goes on with the first's moments of AdamW, which for
pooler and classifier are zeros whose start is long corrected for: under a steady gradient their first steps
grow to 4.9 rates after 800 updates (6.6 at most), where a new AdamW takes 1. Weight decay acts on them in
both stages. A dev score before the second is that of a classifier never trained, and may be selected.
A board's row may keep the rate (`schedule = "constant"`). As in the code: one run with `intermediate_share` 1
whose last weights are kept, then one in mode `prediction` from its student, `run:<id>`; budgets add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdbench.classify import all_states, class_logits
from kdbench.distiller import Batch, Data, Distiller, Step, example_mean
from kdbench.distillers._classes import class_mean, soft_cross_entropy, teacher_logits, with_cache
from kdbench.errors import UserError


class TinyBERTFT(Distiller):
    """Attention scores and states of a uniform choice of layers, then soft cross-entropy."""

    head = "sequence"
    needs = (
        *("example_id", "input_ids", "length", "segment_ids", "word_index"),
        *("teacher.input_ids", "teacher.length", "teacher.segment_ids", "teacher.word_index"),
    )
    prepare_reads = ("mode",)

    @dataclass
    class Config:
        """What of the teacher is matched, and when."""

        mode: Literal["prediction", "full", "aligned"] = "prediction"
        intermediate_share: float = 0.8  # share of the updates that match layers, 0 to 1
        temperature: float = 1.0  # t, divides both models' logits
        class_mean: bool = True  # divides L_pred by the number of classes

        def __post_init__(self) -> None:
            if not 0 <= self.intermediate_share <= 1:
                raise ValueError(f"intermediate_share = {self.intermediate_share} is not in [0, 1]")
            if not self.temperature > 0:
                raise ValueError(f"temperature = {self.temperature} is not above 0")

    def __init__(self, cfg: Config, student: nn.Module, teacher: nn.Module) -> None:
        """Raises: UserError where the models do not suit the mode: `full` needs one vocabulary and the
        attention of BERT; `full` and `aligned` a number of teacher layers that the student's divides.
        """
        super().__init__(cfg, student, teacher)
        if cfg.mode == "prediction":
            return
        small: Any = student.config
        large: Any = teacher.config
        self.layers = uniform_map(large.num_hidden_layers, small.num_hidden_layers)
        self.fit = nn.Linear(small.hidden_size, large.hidden_size).to(next(student.parameters()).dtype)
        if cfg.mode == "full":
            if small.vocab_size != large.vocab_size:
                raise _two_tokenizers(f"vocabularies of {small.vocab_size} and {large.vocab_size} tokens")
            for model in (student, teacher):
                _self_attentions(model)

    def prepare(self, data: Data, step: Step) -> Mapping[str, Batch]:
        """Return the training rows with the teacher's logits; it runs later only to match layers.

        Raises: UserError where `full` is given rows that the models read as different tokens.
        """
        return {"train": with_cache(data.batches("train"), self._cache)}

    def _cache(self, batch: Batch) -> dict[str, Tensor]:
        fields = {"teacher_logits": teacher_logits(self.teacher, batch)}
        if self.cfg.mode == "prediction":
            return fields
        if self.cfg.mode == "full":
            _check_same_tokens(batch.of("student"), batch.of("teacher"))
        return fields | {name: value for name, value in batch.items() if name.startswith("teacher.")}

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return L_attn + L_hidn, L_hidn or L_pred, as mode and progress have it."""
        if self.cfg.mode != "prediction" and step.progress < self.cfg.intermediate_share:
            return self.intermediate_loss(batch, step)
        q, p = class_logits(self.student, batch), batch["teacher_logits"]
        soft = soft_cross_entropy(q, p, self.cfg.temperature)
        return example_mean(class_mean(soft, q) if self.cfg.class_mean else soft, batch)

    def intermediate_loss(self, batch: Batch, step: Step) -> Tensor:
        """Return L_attn + L_hidn in mode `full`, L_hidn in mode `aligned`."""
        theirs = batch.of("teacher")
        q = all_states(self.student, batch)
        with torch.no_grad():
            p = all_states(self.teacher, theirs)
        fitted = [self.fit(state).to(state.dtype) for state in q]
        followed = [p[layer] for layer in self.layers]
        if self.cfg.mode == "aligned":
            hidden = example_mean(word_distance(fitted, followed, batch, theirs), batch)
            step.log(hidden=hidden)
            return hidden
        length = batch["length"]
        hidden = example_mean(sum_of(hidden_distance, fitted, followed, length), batch)
        q_scores = attention_scores(self.student, q, range(1, len(q)))
        with torch.no_grad():
            p_scores = attention_scores(self.teacher, p, self.layers[1:])
        attention = example_mean(sum_of(attention_distance, q_scores, p_scores, length), batch)
        step.log(attention=attention, hidden=hidden)
        return attention + hidden


def uniform_map(teacher: int, student: int) -> tuple[int, ...]:
    """Return g(m) = m L_T / L_S for m = 0..L_S; 0 is the embedding output.

    Args: `teacher` L_T and `student` L_S, their numbers of layers.
    Raises: UserError where L_S does not divide L_T.
    """
    if teacher % student:
        raise UserError(
            f"tinybert_ft: the teacher's {teacher} layers are no multiple of the student's {student}; "
            "mode 'prediction' needs none"
        )
    return tuple(m * teacher // student for m in range(student + 1))


def attention_scores(model: nn.Module, states: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """Return the scores before the softmax of `layers` (1..L), each [B, heads, T, T]: Q K^T / sqrt(d).

    They are computed again from the layer's input among `states` (0..L); padding is not masked.
    Raises: UserError for a model whose attention is not that of BERT.
    """
    attentions, scores = _self_attentions(model), []
    for layer in layers:
        attention, state = attentions[layer - 1], states[layer - 1]
        query, key = (
            part(state).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for part in (attention.query, attention.key)
        )
        score = (query @ key.transpose(2, 3)).to(state.dtype)  # which is wider than a product under autocast
        scores.append(score * query.shape[-1] ** -0.5)
    return scores


def _self_attentions(model: nn.Module) -> list[Any]:
    any_model: Any = model
    try:
        found = [layer.attention.self for layer in any_model.base_model.encoder.layer]
        for one in found:
            _ = one.query, one.key, one.num_attention_heads
    except AttributeError as error:
        name = type(model).__name__
        raise UserError(
            f"tinybert_ft: mode 'full' reads the attention of BERT's family; {name}'s is another"
        ) from error
    return found


def sum_of(
    distance: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Sequence[Tensor],
    p: Sequence[Tensor],
    length: Tensor,
) -> Tensor:
    """Return the sum over layers of `distance(q, p, length)`, [B]."""
    return torch.stack([distance(a, b, length) for a, b in zip(q, p, strict=True)]).sum(0)


def attention_distance(q: Tensor, p: Tensor, length: Tensor) -> Tensor:
    """Return the mean squared difference of scores [B, heads, T, T] over heads and pairs of real tokens, [B].

    Where the numbers of heads differ, the means over heads are compared.
    """
    if q.shape[1] != p.shape[1]:
        q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
    real = _real(length, q.shape[2])
    pairs = (real[:, :, None] & real[:, None, :])[:, None]
    return ((q - p).square() * pairs).sum((1, 2, 3)) / (q.shape[1] * length.square())


def hidden_distance(q: Tensor, p: Tensor, length: Tensor) -> Tensor:
    """Return the mean squared difference of states [B, T, d] over features and real tokens, [B]."""
    return ((q - p).square().mean(-1) * _real(length, q.shape[1])).sum(1) / length


def word_distance(q: Sequence[Tensor], p: Sequence[Tensor], ours: Batch, theirs: Batch) -> Tensor:
    """Return the sum over layers of the mean squared difference of words' states, [B].

    A word's state is the mean over its tokens. The mean is over features and the words that both models read:
    one that was cut off for either is left out. The first token counts as a word, for the classifier reads
    it. `q` and `p` hold states [B, T, d] of either tokenization.
    """
    index = word_places(ours, q[0].shape[1]), word_places(theirs, p[0].shape[1])
    words = int(max(one.max() for one in index)) + 1
    mine, other = (word_weights(one, words, q[0].dtype) for one in index)
    shared = (mine.sum(-1) > 0) & (other.sum(-1) > 0)
    total = []
    for a, b in zip(q, p, strict=True):
        squares = ((mine @ a).to(mine.dtype) - (other @ b).to(mine.dtype)).square()
        total.append((squares.mean(-1) * shared).sum(1))
    return torch.stack(total).sum(0) / shared.sum(1)


def word_places(batch: Batch, width: int) -> Tensor:
    """Return the word that each of `width` positions belongs to, [B, T]: 0 is the first token, j + 1 the word
    of index j, -1 none.
    """
    index = batch["word_index"][:, :width]
    index = (index + 1).masked_fill(~_real(batch["length"], width) | (index < 0), -1)
    index[:, 0] = 0
    return index


def word_weights(index: Tensor, words: int, dtype: torch.dtype) -> Tensor:
    """Return the weights [B, words, T] that turn states [B, T, d] into means over the tokens of each word.

    They sum to 1 for a word with a token in `index` [B, T], to 0 for any other.
    """
    member = (index[:, None, :] == torch.arange(words, device=index.device)[:, None]).to(dtype)
    return member / member.sum(-1, keepdim=True).clamp(min=1)


def _real(length: Tensor, width: int) -> Tensor:
    """Which of `width` positions are no padding, [B, width]."""
    return torch.arange(width, device=length.device) < length[:, None]


def _check_same_tokens(ours: Batch, theirs: Batch) -> None:
    length = ours["length"]
    width = int(length.max())
    own, other = (batch["input_ids"][:, :width] for batch in (ours, theirs))
    same = torch.equal(length, theirs["length"]) and not ((own != other) & _real(length, width)).any()
    if not same:
        raise _two_tokenizers("rows that the models read as different tokens")


def _two_tokenizers(what: str) -> UserError:
    return UserError(
        f"tinybert_ft: mode 'full' matches states token by token and was given {what}; "
        "use mode 'prediction' or 'aligned'"
    )
