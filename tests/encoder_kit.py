"""What tests of prompt transfer share: tiny encoders of three families, rows of every format, models that
stand on one encoder, and runs through the real trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel, RobertaConfig, RobertaModel

from kdbench import stages
from kdbench.clock import running
from kdbench.config import TrainingConfig
from kdbench.distiller import Batch, Distiller
from kdbench.distillers._transfer import IGNORED
from kdbench.harness import BatchSource, Recorder, SourceData, Trainer
from kdbench.prompted import PromptedEncoder, outputs_of
from kdbench.prompts import DeepPrompt, SoftPrompt
from kdbench.registry import load_distiller

VOCABULARY, CLASSES, M, LAYERS, WIDTH = 40, 3, 3, 2, 8
FAMILIES = ("bert", "roberta", "electra")
LENGTHS = (7, 4, 9, 5, 3, 8)


def encoder(family: str = "bert", form: str = "classes", seed: int = 1, classes: int = CLASSES) -> Any:
    """A random encoder in float64 and eval mode, set for a task; its config has dropout."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 40,
        "initializer_range": 0.4,
        "num_labels": classes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any
        if family == "bert":
            model = BertModel(BertConfig(pad_token_id=0, **sizes))
        elif family == "roberta":
            model = RobertaModel(RobertaConfig(pad_token_id=1, type_vocab_size=1, **sizes))
        else:
            model = ElectraModel(ElectraConfig(pad_token_id=0, embedding_size=6, **sizes))
    model.config.task_format = form
    return model.double().eval()


def rows(form: str = "classes", lengths: Sequence[int] = LENGTHS, first: int = 100) -> Batch:
    """Ragged rows with the fields of a format, padded with 0; ids 5 and more."""
    draw = torch.Generator().manual_seed(first)
    count, length = len(lengths), torch.tensor(lengths)
    shape = (count, 2, int(length.max())) if form == "choice" else (count, int(length.max()))
    ids = torch.randint(5, VOCABULARY, shape, generator=draw)
    place = torch.arange(shape[-1])
    real = place < (length[:, None, None] if form == "choice" else length[:, None])
    fields = {
        "example_id": torch.arange(first, first + count),
        "length": length,
        "segment_ids": ((place >= 3) & real).long().expand(shape).clone(),
        "input_ids": ids * real,
    }
    if form in ("classes", "choice"):
        fields["class_label"] = torch.arange(count) % (2 if form == "choice" else CLASSES)
    if form == "choice":
        fields["choice_length"] = torch.stack([length, (length - 1).clamp(min=3)], 1)
    if form == "number":
        fields["target"] = torch.linspace(-1, 2, count)
    if form == "tokens":
        labelled = real & (place > 0) & ((place + torch.arange(count)[:, None]) % 3 != 0)
        fields["labels"] = torch.where(labelled, ids % CLASSES, IGNORED)
    if form == "span":
        fields["start"], fields["end"] = torch.ones(count, dtype=torch.long), length - 2
    return Batch(fields)


def otherwise_padded(batch: Batch, seed: int = 0) -> Batch:
    """The same rows, three columns wider; any id and segment stands beyond a row's end."""
    draw = torch.Generator().manual_seed(seed)
    length = batch["choice_length"] if "choice_length" in batch else batch["length"]
    changed = {}
    for name in ("input_ids", "segment_ids", "labels"):
        if name not in batch:
            continue
        value = torch.cat([batch[name], batch[name][..., :3]], -1)
        noise = torch.randint(0, 30, value.shape, generator=draw)
        noise = torch.full_like(value, IGNORED) if name == "labels" else noise
        changed[name] = torch.where(torch.arange(value.shape[-1]) >= length[..., None], noise, value)
    return batch.replace(**changed)


def tuned(base: Any, seed: int, m: int = M, std: float = 0.7, shallow: bool = False) -> PromptedEncoder:
    """A prompt and a head far from zero on this encoder, with a random signature that opposes no other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = base.get_input_embeddings().weight.shape[1]
        prompt = SoftPrompt(std * torch.randn(m, width)) if shallow else DeepPrompt(base.config, m, std)
        model = PromptedEncoder(base, prompt, base.config.task_format, outputs_of(base.config), std)
        for name in ("cls_hidden", "pooler", "mean_tokens"):
            model.signature[f"own.{name}"] = torch.rand(WIDTH).double()
        model.signature["own.activation"] = torch.randn(LAYERS, 12).double()
    return model.to(next(base.parameters()).dtype).eval()


def build(name: str, roles: Mapping[str, nn.Module], seed: int = 3, **settings: Any) -> Any:
    """The method as a run builds it; prompts have M tokens."""
    told = settings if name == "full_tune" else {"prompt_length": M, **settings}
    return stages.build(load_distiller(name), told, roles.__getitem__, seed, name).eval()


def source_data(train: Batch) -> SourceData:
    return SourceData({"train": BatchSource(train)}, 4, torch.device("cpu"))


def run(method: Distiller, train: Batch, steps: int = 4, **training: Any) -> tuple[Trainer, list[Any]]:
    """Prepare and train by the real trainer, in batches of 4; returns it, and what it logged."""
    told = {"batch_size": 4, "lr": 3e-2, "warmup_steps": 0, "checkpoint_every": 0, **training}
    cfg = TrainingConfig(optimizer_steps=steps, **told)
    recorder = Recorder()
    trainer = Trainer(method, BatchSource(train), cfg, 5, recorder=recorder)
    with running(trainer.clock):
        trainer.prepare(source_data(train))
        while trainer.updates < steps:
            trainer.one_visit()
    return trainer, recorder.losses


def own(method: Any) -> dict[str, Tensor]:
    """Copies of the student's prompt and head."""
    return {name: value.detach().clone() for name, value in method.student.own().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are bit-identical."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
