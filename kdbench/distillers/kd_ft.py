"""Knowledge distillation of a classifier: labels, and the class probabilities of a fine-tuned teacher.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, sec. 2. With g `kd_ratio`, T `temperature`, z
the class logits of student (S) and teacher (T):

    L = (1 - g) CE(y, softmax(z_S)) + g T^2 KL(softmax(z_T / T) || softmax(z_S / T))      `hinton`
    L = mean over classes of (z_S - z_T)^2                                                `mse`

g and T are from the grid that PKD (Sun et al. 2019, https://arxiv.org/abs/1908.09355, sec. 4.2) gives this
baseline; `mse` is the loss of Tang et al. 2019, https://arxiv.org/abs/1903.12136, sec. 3.2, with no label.
Differs: the teacher's term is a divergence, 0 for equal models, where Hinton et al. have the cross-entropy
with soft targets: the gradient is the same. `mse` is divided by the number of classes. No dropout, unless the
training setting `student_dropout` brings it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kdbench.classify import class_logits
from kdbench.distiller import Batch, Data, Distiller, Step, example_mean
from kdbench.distillers._classes import (
    SoftTargetsConfig,
    cross_entropy,
    distilled,
    teacher_logits,
    with_cache,
)


class KDFT(Distiller):
    """(1 - kd_ratio) cross-entropy + kd_ratio T^2 KL, or the distance of logits; means over examples."""

    head = "sequence"
    needs = (
        *("example_id", "class_label", "input_ids", "length", "segment_ids"),
        *("teacher.input_ids", "teacher.length", "teacher.segment_ids"),
    )
    prepare_reads = ()

    @dataclass
    class Config(SoftTargetsConfig):
        """`kd_ratio` and `temperature` are read by `hinton` alone."""

        variant: Literal["hinton", "mse"] = "hinton"

    def prepare(self, data: Data, step: Step) -> Mapping[str, Batch]:
        """Return the training rows with the teacher's logits: it runs no more."""
        return {
            "train": with_cache(
                data.batches("train"), lambda batch: {"teacher_logits": teacher_logits(self.teacher, batch)}
            )
        }

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return L; nats per example, or squared logits for `mse`."""
        q, p = class_logits(self.student, batch), batch["teacher_logits"]
        if self.cfg.variant == "mse":
            return example_mean((q - p).square().mean(-1), batch)
        ce = example_mean(cross_entropy(q, batch["class_label"]), batch)
        kd = example_mean(distilled(q, p, self.cfg.temperature, "hinton_t2"), batch)
        step.log(ce=ce, kd=kd)
        ratio: float = self.cfg.kd_ratio
        return (1 - ratio) * ce + ratio * kd
