"""PANDA: a new prompt on the target, taught by the prompt that was transferred from a source.

Source: Zhong et al. 2024, "PanDa: Prompt Transfer Meets Knowledge Distillation for Efficient Model
Adaptation", https://arxiv.org/abs/2208.10160, and its public code: the source's prompt is tuned on the target
(PoT); that model, frozen, teaches a random prompt on the same frozen encoder, weighted by how similar the two
tasks are.
Differs: see `_panda` for the weight, its schedule and the code's own values; the similarity needs a prompt of
the target, that of plain prompt tuning with the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from kdbench.distiller import Batch, Data, Step, freeze
from kdbench.distillers._panda import PandaConfig, Transferred
from kdbench.distillers._transfer import prompted
from kdbench.prompted import PromptedEncoder


class Panda(Transferred):
    """The task's loss and the distance to one transferred teacher."""

    @dataclass
    class Config(PandaConfig):
        """The prompt, and the distillation."""

    prepare_reads = ("metric", "representation", "inputs", "texts", "neuron_layers", "neurons_by_text")

    def __init__(
        self,
        cfg: Config,
        student: nn.Module,
        teacher: PromptedEncoder,
        source: PromptedEncoder,
        target: PromptedEncoder,
    ) -> None:
        super().__init__(cfg, prompted(student, cfg), teacher)
        self.source, self.target = freeze(source), freeze(target)
        self.check_teacher(teacher)
        self.start_at(source)

    def prepare(self, data: Data, step: Step) -> None:
        """Compare the source to the target."""
        self.state["similarity"] = self.compared(self.source, self.target, data)  # type: ignore[arg-type]

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Return the task's loss plus the weighted distance."""
        chosen = self.state["similarity"]["chosen"]
        return self.taught_loss(self.teacher, chosen, batch, step)  # type: ignore[arg-type]

    def measures(self) -> Mapping[str, float]:
        return {**super().measures(), **self.state["similarity"]}
