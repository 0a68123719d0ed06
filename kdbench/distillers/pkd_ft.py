"""Patient knowledge distillation: labels, the teacher's class probabilities, and the first token's states.

Source: Sun et al. 2019 (BERT-PKD), https://arxiv.org/abs/1908.09355, sec. 3, eq. 4-8; defaults from its code,
https://github.com/intersun/PKD-for-BERT-Model-Compression (kd_ratio 0.7, T = 10, beta 500, Skip, normalised:
what it sets for PKD). With g `kd_ratio`, T `temperature`, L_T and k the layers of teacher and student:

    L    = (1 - g) CE(y, q) + g L_DS + beta L_PT
    L_DS = T^2 KL(softmax(z_T / T) || softmax(z_S / T))                 over N: `ds_reduction` "mean"
    L_PT = sum_{j=1}^{k-1} || n(W h_S^j) - n(h_T^{m(j)}) ||^2           over (k-1) d_T: `pt_reduction` "mean"
    n(h) = h / ||h||,   Skip: m(j) = j L_T / k rounded down,   Last: m(j) = L_T - k + j

h are the states of the first token. The last layer, which feeds the classifier, is left out, so a student of
one layer has no L_PT.
Differs: means over N classes and over layers and features are the code's; the paper prints a KL divergence
and a sum. Student and teacher of the paper are equally wide. Where they are not, W is one linear map for all
layers, without bias, which is trained with the student (in its optimizer group) and dropped with the teacher;
where they are, there is no W. The paper's student starts from the teacher's first k layers, this one from the
weights that the board gives it. Where k does not divide j L_T, rounding is ours. No dropout, unless the
training setting `student_dropout` brings it back. What the few-shot distillation example of EasyNLP,
https://github.com/alibaba/EasyNLP, calls PKD cannot be set here: states at the mask, not normalised and up to
the last layer, against a fixed random projection of the teacher's layers 21-24 or 15, 18, 21 and 24.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import normalize

from kdbench.classify import classified
from kdbench.distiller import Batch, Data, Distiller, Step, example_mean
from kdbench.distillers._classes import SoftTargetsConfig, class_mean, cross_entropy, distilled, with_cache
from kdbench.errors import UserError

Layers = Literal["skip", "last"]
Reduction = Literal["mean", "sum"]


class PKDFT(Distiller):
    """Distillation of class probabilities and of the first token's states in the layers below the last."""

    head = "sequence"
    needs = (
        *("example_id", "class_label", "input_ids", "length", "segment_ids"),
        *("teacher.input_ids", "teacher.length", "teacher.segment_ids"),
    )
    prepare_reads = ("layers",)

    @dataclass
    class Config(SoftTargetsConfig):
        """The defaults are those of the paper's code."""

        kd_ratio: float = 0.7
        beta: float = 500.0  # weight of L_PT, at least 0
        layers: Layers = "skip"  # which of the teacher's layers the student's follow
        normalize: bool = True  # states have length 1 before they are compared
        ds_reduction: Reduction = "mean"  # over classes; sum: the KL divergence
        pt_reduction: Reduction = "mean"  # over layers and features; sum: the paper's formula

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.beta >= 0:
                raise ValueError(f"beta = {self.beta} must be at least 0")

    def __init__(self, cfg: Config, student: nn.Module, teacher: nn.Module) -> None:
        """Raises: UserError where the student has more layers than the teacher."""
        super().__init__(cfg, student, teacher)
        small: Any = student.config
        large: Any = teacher.config
        self.layers = layer_map(cfg.layers, large.num_hidden_layers, small.num_hidden_layers)
        if not self.layers:
            warnings.warn("pkd_ft: a student of one layer has no L_PT; beta is not used", stacklevel=2)
        mapped = self.layers and small.hidden_size != large.hidden_size
        self.fit: nn.Module = (
            nn.Linear(small.hidden_size, large.hidden_size, bias=False) if mapped else nn.Identity()
        ).to(next(student.parameters()).dtype)

    def prepare(self, data: Data, step: Step) -> Mapping[str, Batch]:
        """Return the training rows with the teacher's logits and chosen states: it runs no more."""
        return {"train": with_cache(data.batches("train"), self._cache)}

    def _cache(self, batch: Batch) -> dict[str, Tensor]:
        out = classified(self.teacher, batch.of("teacher"))
        fields = {"teacher_logits": out.logits}
        return fields | ({"teacher_states": out.states[:, list(self.layers)]} if self.layers else {})

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return L."""
        out, p = classified(self.student, batch), batch["teacher_logits"]
        ce = example_mean(cross_entropy(out.logits, batch["class_label"]), batch)
        soft = distilled(out.logits, p, self.cfg.temperature, "hinton_t2")
        ds = example_mean(class_mean(soft, p) if self.cfg.ds_reduction == "mean" else soft, batch)
        step.log(ce=ce, ds=ds)
        ratio: float = self.cfg.kd_ratio
        beta: float = self.cfg.beta
        loss = (1 - ratio) * ce + ratio * ds
        if not self.layers:
            return loss
        states = self.fit(out.states[:, 1:-1])
        pt = example_mean(
            patience(states, batch["teacher_states"], self.cfg.normalize, self.cfg.pt_reduction), batch
        )
        step.log(pt=pt)
        return loss + beta * pt


def layer_map(layers: Layers, teacher: int, student: int) -> tuple[int, ...]:
    """Return the teacher's layer (1..L_T) that each of the student's layers 1..k-1 follows.

    Args: `teacher` L_T and `student` k, their numbers of layers. The layers grow strictly and end below L_T.
    Raises: UserError for k > L_T.
    """
    if student > teacher:
        raise UserError(
            f"pkd_ft: the student has {student} layers, the teacher {teacher}; it needs as many at least"
        )
    if layers == "last":
        return tuple(range(teacher - student + 1, teacher))
    return tuple(j * teacher // student for j in range(1, student))


def patience(q: Tensor, p: Tensor, normalized: bool, reduction: Reduction) -> Tensor:
    """Return the squared distance of states `q` and `p` [B, k-1, d], [B]: summed over layers and features, or
    their mean. Normalised, it does not change with the length of any state.
    """
    if normalized:
        q, p = normalize(q, dim=-1), normalize(p, dim=-1)
    squares = (q - p).square().flatten(1)
    return squares.sum(1) if reduction == "sum" else squares.mean(1)
