"""The contract of every distiller: laws tried on tiny random models, by the tests and by `kdbench check`.

Most laws compare two runs of one method that may differ in nothing: cut otherwise, padded otherwise, killed
and resumed. After each update the second run is put on the weights of the first, so that every update is
judged alone and rounding does not build up.

Source: the idea of one check that outsiders run on their own estimator is scikit-learn's `check_estimator`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
)
from transformers.utils import logging

from kdbench import registry, stages
from kdbench.clock import running
from kdbench.config import TrainingConfig, check_settings
from kdbench.distiller import Batch, Distiller, Parts, Store
from kdbench.distillers._transfer import IGNORED, PromptConfig, prompted
from kdbench.errors import UserError, unknown
from kdbench.harness import BatchSource, Recorder, Source, SourceData, Trainer
from kdbench.processes import Processes
from kdbench.rollout import evaluating
from kdbench.transferability import REPRESENTATIONS

Status = Literal["pass", "fail", "not claimed"]

EXACT, CLOSE = 1e-12, 1e-5  # largest relative distance of gradients in float64 and float32
BATCH = 5  # rows per update: not a multiple of any micro-batch tried
NEW_TOKENS = 8
SEVERAL = 4  # models for a role that holds several
PATIENCE = 20  # visits after which a method that has not updated a group is taken never to do so


@dataclass(frozen=True)
class Law:
    """What became of one law: `reason` says why it failed or is not claimed."""

    name: str
    status: Status
    reason: str
    seconds: float


class Broken(Exception):
    """A law does not hold; the message says where."""


class ProcessFailed(RuntimeError):
    """One of several processes died or raised an exception, which the message names."""


# ------------------------------------------------------------------------ models and rows by head
@dataclass(frozen=True)
class Head:
    """Tiny models and rows for methods of one `head`.

    `target` gives the position of a row (a batch of one) at which the loss must read the model, or None;
    `watched` the module whose output there it must depend on. `beside` makes another role's model from the
    student's, a seed and the method's settings, where it stands on it; `carried` are fields that every batch
    holds, whatever a method needs. The laws are tried with `other` too, rows of another format.
    """

    model: Callable[[str, int, bool], nn.Module]  # (role, seed, student's tokenizer); dropout in its config
    sets: Callable[[Sequence[str], bool], dict[str, Batch]]  # rows for these roles: train, dev, extra sets
    padded: Callable[[Batch, int], Batch]  # the same rows, padded by a seed's choice of width and ids
    reload: Callable[[Path], nn.Module]
    watched: Callable[[Any], nn.Module]
    target: Callable[[Batch], int | None]
    beside: Callable[[nn.Module, int, Any], nn.Module] | None = None
    carried: tuple[str, ...] = ()
    other: Head | None = None


VOCAB, EOS = 50, 0  # zero is what batches are padded with, so that padding looks like the end of a sequence


def _gpt2(role: str, seed: int, shared: bool) -> nn.Module:
    """Two layers whose weights are spread so wide that no gradient is small by chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=VOCAB,
            n_layer=2,
            n_head=2,
            n_embd=16 if role == "student" else 24,
            n_positions=256,
            eos_token_id=EOS,
            bos_token_id=EOS,
            initializer_range=0.3,
        )
        model: Any = GPT2LMHeadModel(config)
    with torch.no_grad():  # three nats more for the end of a sequence: many sampled responses have one
        end = model.get_input_embeddings().weight[EOS]
        model.transformer.ln_f.bias += 3 * end / end.square().sum()
    model.kdbench_encode = lambda text: [1 + ord(letter) % (VOCAB - 1) for letter in text]
    model.kdbench_pad = EOS
    return model  # type: ignore[no-any-return]


def _text_rows(count: int, first: int, prompt: tuple[int, int], response: tuple[int, int]) -> Batch:
    """Random rows with prompt and response lengths in these ranges; every fourth response has no end."""
    draw = torch.Generator().manual_seed(first)
    prompts = torch.randint(*prompt, (count,), generator=draw)
    length = prompts + torch.randint(*response, (count,), generator=draw)
    place = torch.arange(int(length.max()))
    ids = torch.randint(1, VOCAB, (count, len(place)), generator=draw)
    ended = torch.arange(count) % 4 != 3
    end = (place >= (length - 1)[:, None]) & ended[:, None] | (place >= length[:, None])
    return Batch(
        {
            "example_id": torch.arange(first, first + count),
            "input_ids": ids.masked_fill(end, EOS),
            "prompt_length": prompts,
            "length": length,
        }
    )


def _text_sets(roles: Sequence[str], shared: bool) -> dict[str, Batch]:
    train = _text_rows(24, 100, prompt=(1, 7), response=(1, 9))
    return {
        "train": train,
        "dev": train,
        "lm": _text_rows(12, 900, prompt=(1, 2), response=(4, 10)),
        "unlabeled": _text_rows(18, 500, prompt=(1, 7), response=(1, 9)),
    }


def _other_padding(batch: Batch, seed: int) -> Batch:
    """Widen every field by three columns; random ids stand where no text is."""
    if "input_ids" not in batch:
        return batch
    wide = {name: _wider(value) if value.dim() > 1 else value for name, value in batch.items()}
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randint(1, VOCAB, wide["input_ids"].shape, generator=draw)
    beyond = torch.arange(noise.shape[1]) >= batch["length"][:, None]
    return batch.replace(**{**wide, "input_ids": torch.where(beyond, noise, wide["input_ids"])})


def _wider(value: Tensor) -> Tensor:
    return torch.cat([value, value.new_zeros((value.shape[0], 3, *value.shape[2:]))], dim=1)


def _last_predicting(row: Batch) -> int | None:
    """The place that predicts the last token: what stands there is read by no other target's prediction."""
    last = int(row["length"][0]) - 2
    return None if last + 1 < int(row["prompt_length"][0]) or last < 0 else last


CLASSES = 3


@dataclass(frozen=True)
class Words:
    """The ids of a tiny encoder's tokenizer: special tokens, all words, and the words of the classes."""

    size: int
    pad: int
    cls: int
    sep: int
    mask: int
    words: tuple[int, int]  # first id, and the one after the last
    labels: tuple[int, ...]


# The student's words are no ids of another role: a model that is given them in place of its own fails.
_WORDS = Words(90, pad=0, cls=2, sep=3, mask=4, words=(50, 90), labels=(54, 50, 76))
_OTHER_WORDS = Words(45, pad=1, cls=0, sep=2, mask=44, words=(3, 44), labels=(3, 40, 12))


def _words(role: str, shared: bool) -> Words:
    return _WORDS if shared or role == "student" else _OTHER_WORDS


def _encoder(role: str, seed: int, shared: bool, auto: Any) -> nn.Module:
    """A BERT as the student, else a deeper RoBERTa with more heads and mostly another vocabulary."""
    words, student = _words(role, shared), role == "student"
    config: Any = (BertConfig if student else RobertaConfig)(
        vocab_size=words.size,
        hidden_size=16 if student else 24,
        intermediate_size=32 if student else 48,
        num_hidden_layers=2 if student else 4,
        num_attention_heads=2 if student else 4,
        max_position_embeddings=64,
        type_vocab_size=2 if student else 1,
        initializer_range=0.3,
        pad_token_id=words.pad,
    )
    config.mask_token_id, config.num_labels = words.mask, CLASSES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = auto.from_config(config)
    return model


def _masked_lm(role: str, seed: int, shared: bool) -> nn.Module:
    return _encoder(role, seed, shared, AutoModelForMaskedLM)


def _classifier(role: str, seed: int, shared: bool) -> nn.Module:
    return _encoder(role, seed, shared, AutoModelForSequenceClassification)


def _class_rows(
    count: int, first: int, roles: Sequence[str], prompted: bool, shared: bool, labelled: bool = True
) -> Batch:
    """Random texts of one or two sentences; each role cuts a word into tokens of its own, one or two.

    Where the text is prompted, the mask is one of its words, and one separator stands at the end.
    """
    draw = torch.Generator().manual_seed(first)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    sentences = [(number(2, 6), number(0, 4)) for _ in range(count)]  # words of each
    masked = [number(0, sum(pair)) for pair in sentences]  # words
    labels = torch.arange(count)[torch.randperm(count, generator=draw)] % CLASSES
    fields = {
        "example_id": torch.arange(first, first + count),
        "class_label": labels if labelled else torch.full((count,), -1),
    }
    plain: dict[str, Tensor] = {}  # the student's own
    for role in ("student", *(role for role in roles if role != "student")):
        words, prefix = _words(role, shared), "" if role == "student" else f"{role}."
        if shared and prefix:
            fields |= {prefix + name: value for name, value in plain.items()}
            continue
        rows = []
        for pair, mask in zip(sentences, masked, strict=True):
            row = [(words.cls, 0, -1)]  # id, segment, word
            for segment in range(2):
                for word in range(segment * pair[0], pair[0] + segment * pair[1]):
                    if prompted and word == mask:
                        row.append((words.mask, segment, word))
                    else:
                        row += [(number(*words.words), segment, word) for _ in range(number(1, 3))]
                if pair[segment] and (segment == 1 or pair[1] == 0 or not prompted):
                    row.append((words.sep, segment, -1))
            rows.append(row)
        length = torch.tensor([len(row) for row in rows])
        width = int(length.max())
        table = torch.tensor([row + [(words.pad, 0, -1)] * (width - len(row)) for row in rows])
        own = {"input_ids": table[:, :, 0], "length": length}
        if prompted:
            own["mask_index"] = (own["input_ids"] == words.mask).long().argmax(1)
            own["verbalizer_ids"] = torch.tensor(words.labels).repeat(count, 1)
            cloze = torch.tensor([number(1, len(row) - 1) for row in rows])
            own["cloze_index"] = cloze.masked_fill(torch.arange(count) % 3 == 1, -1)
        else:
            own |= {"segment_ids": table[:, :, 1], "word_index": table[:, :, 2]}
        fields |= {prefix + name: value for name, value in own.items()}
        plain = plain or own
    return Batch(fields)


def _class_sets(roles: Sequence[str], shared: bool, prompted: bool) -> dict[str, Batch]:
    return {
        "train": _class_rows(24, 100, roles, prompted, shared),
        "dev": _class_rows(9, 500, roles, prompted, shared),
        "unlabeled": _class_rows(18, 900, roles, prompted, shared, labelled=False),
    }


# what may stand beyond a row's end, by token field
_NOISE = {
    "input_ids": (0, _OTHER_WORDS.size),
    "segment_ids": (0, 9),
    "word_index": (-1, 9),
    "labels": (IGNORED, IGNORED + 1),
}


def _other_class_padding(batch: Batch, seed: int) -> Batch:
    """Widen the token fields of every role by three columns; anything stands beyond its own length."""
    draw = torch.Generator().manual_seed(seed)
    changed = {}
    for name, value in batch.items():
        role, dot, field = name.rpartition(".")
        if field in _NOISE:
            value = _wider(value)
            noise = torch.randint(*_NOISE[field], value.shape, generator=draw)
            beyond = torch.arange(value.shape[1]) >= batch[f"{role}{dot}length"][:, None]
            changed[name] = torch.where(beyond, noise, value)
    return batch.replace(**changed)


def _masked_place(row: Batch) -> int | None:
    """The mask, or the position that is masked for certain."""
    names = [name for name in ("mask_index", "cloze_index") if name in row]
    place = int(row[names[0]][0]) if names else -1
    return place if place >= 0 else None


def _bare_encoder(role: str, seed: int, shared: bool, form: str) -> nn.Module:
    """An encoder with its pooler, configured for a task of this format."""
    model: Any = _encoder(role, seed, shared, AutoModel)
    model.config.task_format = form
    return model  # type: ignore[no-any-return]


@functools.cache
def _format_rows(count: int, first: int, form: str) -> Batch:
    """Rows as the tasks of transfer collate them, of two formats; each word's first token has a label."""
    rows = _class_rows(count, first, ["student"], prompted=False, shared=False)
    names = ["example_id", "input_ids", "length", "segment_ids"]
    fields = {name: rows[name] for name in names}
    if form == "classes":
        cloze = 1 + torch.arange(count) % (rows["length"] - 2)
        cloze = cloze.masked_fill(torch.arange(count) % 3 == 1, -1)
        return Batch({**fields, "class_label": rows["class_label"], "cloze_index": cloze})
    word = rows["word_index"]
    starts = (word >= 0) & (word != torch.nn.functional.pad(word, (1, 0), value=-1)[:, :-1])
    labels = (rows["input_ids"] % CLASSES).masked_fill(~starts, IGNORED)
    return Batch({**fields, "labels": labels, "cloze_index": starts.long().argmax(1)})


def _format_sets(roles: Sequence[str], shared: bool, form: str) -> dict[str, Batch]:
    return {"train": _format_rows(24, 100, form), "dev": _format_rows(9, 500, form)}


def _tuned(encoder: nn.Module, seed: int, cfg: Any) -> nn.Module:
    """A prompt and a head far from zero on the student's encoder, with means over texts as if it had read
    them: no two are opposed.

    The prompt has the form that the method's own has, by its settings.
    """
    config: Any = encoder.config
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = prompted(encoder, cfg if isinstance(cfg, PromptConfig) else PromptConfig())
    assert model.prompt is not None
    with torch.no_grad():
        model.prompt.vectors.normal_(std=0.5, generator=draw)
    units = config.num_hidden_layers, config.intermediate_size
    for inputs in ("own", "probe"):
        means = {name: torch.rand(config.hidden_size, generator=draw) for name in REPRESENTATIONS}
        means |= {"activation": torch.rand(units, generator=draw) - 0.5}
        means |= {"active": torch.rand(units, generator=draw)}
        model.signature |= {f"{inputs}.{name}": value for name, value in means.items()}
    return model


def _first_label(row: Batch) -> int:
    """The first labelled token."""
    return int((row["labels"][0] != IGNORED).long().argmax())


def _prompted_head(form: str, carried: str, other: Head | None = None) -> Head:
    return Head(
        model=functools.partial(_bare_encoder, form=form),
        sets=functools.partial(_format_sets, form=form),
        padded=_other_class_padding,
        reload=AutoModel.from_pretrained,
        watched=lambda model: model,
        target=_first_label if form == "tokens" else lambda row: 0,
        beside=_tuned,
        carried=("segment_ids", carried),
        other=other,
    )


def _logits(model: nn.Module) -> Tensor:
    """Outputs of a model on fixed inputs."""
    ids = torch.arange(5, 25).reshape(2, 10)
    with evaluating(model):
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    found: Tensor = out.logits if "logits" in out else out.pooler_output
    return found


HEADS = {
    "causal_lm": Head(
        model=_gpt2,
        sets=_text_sets,
        padded=_other_padding,
        reload=lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
        watched=lambda model: model.get_input_embeddings(),
        target=_last_predicting,
    ),
    "masked_lm": Head(
        model=_masked_lm,
        sets=functools.partial(_class_sets, prompted=True),
        padded=_other_class_padding,
        reload=lambda folder: AutoModelForMaskedLM.from_pretrained(folder, dtype="auto"),
        watched=lambda model: model.base_model,
        target=_masked_place,
    ),
    "sequence": Head(
        model=_classifier,
        sets=functools.partial(_class_sets, prompted=False),
        padded=_other_class_padding,
        reload=lambda folder: AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto"),
        watched=lambda model: model.base_model,
        target=lambda row: 0,
    ),
    "encoder": _prompted_head("classes", "class_label", other=_prompted_head("tokens", "labels")),
}


# -------------------------------------------------------------------------- runs that are watched
@dataclass
class Update:
    """One update: the rows it was given, the gradient before clipping, the group's weights afterwards."""

    group: str
    visit: int
    parts: dict[str, Batch]
    gradient: dict[str, Tensor]
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Probe(Trainer):
    """A trainer that keeps its updates, and can be altered from outside.

    Args: `change` is applied to every batch of an update; `follow` is another run whose weights this one
    takes over after each of its own updates; `around` is entered around each update; `loss` wraps each loss.
    """

    def __init__(
        self,
        distiller: Distiller,
        source: Source,
        training: TrainingConfig,
        seed: int,
        *,
        extras: Mapping[str, Source],
        dev: Source,
        processes: Processes | None = None,
        folder: Path | None = None,
        change: Callable[[Batch], Batch] = lambda batch: batch,
        follow: Probe | None = None,
        around: Callable[[str], AbstractContextManager[None]] = lambda group: nullcontext(),
        loss: Callable[[Callable[[Any, Any], Tensor]], Callable[[Any, Any], Tensor]] = lambda loss: loss,
    ) -> None:
        recorder = Recorder(gradient=self._keep)
        super().__init__(
            distiller,
            source,
            training,
            seed,
            extras=extras,
            processes=processes,
            folder=folder,
            recorder=recorder,
        )
        self.lines = recorder.losses
        self.seen: list[Update] = []
        self.dev = dev
        self._change, self._follow, self._around, self._wrap = change, follow, around, loss
        self._parts: dict[str, Batch] = {}
        self._ready = False

    def update(self, group: str, loss: Callable[[Any, Any], Tensor], batch: Batch | Parts) -> None:
        """Update, and take over the weights of the run that is followed."""
        number = len(self.seen)
        if isinstance(batch, Batch):
            batch = self._change(batch)
            self._parts = {"": batch}
        else:
            batch = self._parts = {name: self._change(part) for name, part in batch.items()}
        try:
            with self._around(group):
                super().update(group, self._wrap(loss), batch)
        finally:  # the last update of a budget ends the visit by an exception
            if len(self.seen) > number:
                self._settle(group, number)

    def _settle(self, group: str, number: int) -> None:
        params = self.optimizers[group].params
        if self._follow is not None and number < len(self._follow.seen):
            target = self._follow.seen[number]
            with torch.no_grad():
                for name, value in target.weights.items() if target.group == group else ():
                    params[name].copy_(value)
        self.seen[number].weights = {name: param.detach().clone() for name, param in params.items()}

    def _keep(self, group: str, gradient: dict[str, Tensor]) -> None:
        self.seen.append(Update(group, self.visit, self._parts, gradient))

    def ready(self) -> Probe:
        """Prepare, once."""
        if not self._ready:
            self._ready = True
            replaced = {"train": self.source, **self.extras}
            data = SourceData({**replaced, "dev": self.dev}, self.rollout_batch, self.processes.device)
            made = self.prepare(data) or {}
            if other := [name for name in made if name not in replaced]:
                raise Broken(f"prepare may return rows of {', '.join(replaced)}, not of {', '.join(other)}")
            replaced |= {name: BatchSource(rows) for name, rows in made.items()}
            self.source, self.extras = replaced.pop("train"), replaced
        return self

    def go(self, visits: int | None = None) -> Probe:
        """Make so many visits; by default two, and more until the student has three updates."""
        self.ready()
        least = 2 if visits is None else visits
        with running(self.clock):
            while self.updates < self.total and self.visit < PATIENCE:
                if self.visit >= least and (visits is not None or self.updates >= 3):
                    break
                self.one_visit()
        return self

    def weights(self) -> dict[str, Tensor]:
        """Return copies of all parameters and buffers of the distiller."""
        named = [*self.distiller.named_parameters(), *self.distiller.named_buffers()]
        return {name: value.detach().clone() for name, value in named}


@dataclass(frozen=True)
class Case:
    """One method with its settings, on tiny models. Everything in it is fixed by its fields."""

    method: str
    settings: Mapping[str, Any]
    training: Mapping[str, Any]
    shared_tokenizer: bool = False
    seed: int = 1
    other: bool = False  # rows of the head's other format

    @property
    def cls(self) -> type[Distiller]:
        """The method's class."""
        return registry.load_distiller(self.method)

    @property
    def head(self) -> Head:
        """Models and rows for the method's head. Raises: Broken for a head that checks do not know."""
        if self.cls.head not in HEADS:
            raise Broken(f"checks know no models with the head '{self.cls.head}'. Known: {', '.join(HEADS)}")
        head = HEADS[self.cls.head]
        return head.other if self.other and head.other is not None else head

    def distiller(self, dtype: torch.dtype = torch.float64, seed: int | None = None) -> Distiller:
        """Return the method with new models, all with fixed weights: the student narrower than the others,
        or those on its own encoder.
        """
        roles, beside = stages.needed_roles(self.cls), self.head.beside
        settings = dict(self.settings)
        if any(field.name == "max_new_tokens" for field in dataclasses.fields(self.cls.Config)):
            settings.setdefault("max_new_tokens", NEW_TOKENS)
        name, made = registry.stem(self.method), dict[str, nn.Module]()

        def model(role: str) -> nn.Module:
            if role not in made:
                seed = roles.index(role) if role in roles else 0
                if beside is None or role == "student":
                    made[role] = self.head.model(role, seed, self.shared_tokenizer).to(dtype)
                else:
                    made[role] = on_the_students(role, seed, beside)
            return made[role]

        def on_the_students(role: str, seed: int, tuned: Callable[..., nn.Module]) -> nn.Module:
            student, cfg = model("student"), check_settings(self.cls.Config, settings, name)
            annotation = inspect.signature(self.cls.__init__).parameters[role].annotation
            if not str(annotation).rstrip("'>").endswith("ModuleList"):
                return tuned(student, seed, cfg)
            return nn.ModuleList([tuned(student, 100 * seed + i, cfg) for i in range(SEVERAL)])

        seed = self.seed if seed is None else seed
        return stages.build(self.cls, settings, model, seed, name).to(dtype)

    def budget(self, **changed: Any) -> TrainingConfig:
        """Return the training settings: a large learning rate, warm-up, clipping and decay all in use."""
        told: dict[str, Any] = {
            "optimizer_steps": 48,
            "batch_size": BATCH,
            "lr": 1e-2,
            "warmup_steps": 2,
            "checkpoint_every": 0,
        }
        if any(field.name == "max_new_tokens" for field in dataclasses.fields(TrainingConfig)):
            told["max_new_tokens"] = NEW_TOKENS
        return TrainingConfig(**{**told, **self.training, **changed})

    def sets(self, changed: Callable[[Batch], Batch] = lambda batch: batch) -> dict[str, Source]:
        """Return the rows of "train", "dev" and the extra sets that a board may have, with the fields that
        the method says it needs and those that every batch holds, and no other.
        """
        found = self.head.sets(stages.needed_roles(self.cls), self.shared_tokenizer)
        lacking = [name for name in self.cls.needs if name not in found["train"]]
        if lacking:
            known = ", ".join(found["train"])
            raise Broken(f"needs {', '.join(lacking)}; batches of {self.cls.head} hold {known}")
        wanted = dict.fromkeys(("example_id", *self.cls.needs, *self.head.carried))
        return {
            split: BatchSource(changed(Batch({name: rows[name] for name in wanted})))
            for split, rows in found.items()
        }

    def start(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        seed: int | None = None,
        sets: Mapping[str, Source] | None = None,
        training: Mapping[str, Any] | None = None,
        **watched: Any,
    ) -> Probe:
        """Return a run before anything has happened; `sets` are in place of the case's own, `watched` are
        arguments of `Probe`.
        """
        seed = self.seed if seed is None else seed
        found = {**self.sets(), **(sets or {})}
        return Probe(
            self.distiller(dtype, seed),
            found.pop("train"),
            self.budget(**(training or {})),
            seed,
            dev=found.pop("dev"),
            extras=found,
            **watched,
        )


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def _same_updates(one: Probe, other: Probe, tolerance: float, what: str) -> None:
    """Raise Broken unless both runs made the same updates, ||g - g'|| <= tolerance ||g|| in each."""
    sequences = [" ".join(update.group for update in run.seen) for run in (one, other)]
    if sequences[0] != sequences[1]:
        raise Broken(f"{what}: the updates are '{sequences[1]}', not '{sequences[0]}'")
    for number, (a, b) in enumerate(zip(one.seen, other.seen, strict=True), 1):
        apart = {**a.gradient, **{name: -value for name, value in b.gradient.items()}}
        for name in a.gradient.keys() & b.gradient.keys():
            apart[name] = a.gradient[name] - b.gradient[name]
        distance, norm = _norm(apart), _norm(a.gradient)
        if not distance <= tolerance * norm:
            size = f"{distance / norm:.1e} of its norm" if norm else f"{distance:.1e}"
            where = f"{what}: update {number}, the gradient of '{a.group}'"
            raise Broken(f"{where} differs by {size}; at most {tolerance:.0e} is allowed")


def _unlike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose tensors are not bit-identical."""
    return [name for name, value in one.items() if name not in other or not torch.equal(value, other[name])]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _permuted(batch: Batch) -> Batch:
    """Return the rows in another order, parts of one size in the same."""
    return batch.rows(torch.randperm(batch.size, generator=torch.Generator().manual_seed(batch.size)))


# --------------------------------------------------------------------------------------- the laws
def roles(case: Case) -> None:
    """It is made of models for the arguments of `__init__` after `cfg`; rows have the fields it `needs`."""
    case.sets()
    case.distiller()


def fields(case: Case) -> None:
    """A visit reads no field of a batch but those it `needs`, and those of the head's every batch."""
    case.start().go(1)


def groups(case: Case) -> None:
    """Each trainable parameter is in exactly one group; every module is registered, so moved and saved."""
    distiller = case.distiller()
    known = {id(value) for value in (*distiller.modules(), *distiller.parameters())}
    for name, value in vars(distiller).items():
        if name not in vars(nn.Module()):
            for part in _inside(value):
                if isinstance(part, nn.Module | nn.Parameter) and id(part) not in known:
                    what = f"self.{name} hides a {type(part).__name__} from torch"
                    raise Broken(f"{what}; register it, in a nn.ModuleList for example")
    try:
        Trainer(distiller, case.sets()["train"], case.budget(), case.seed)
    except ValueError as error:
        raise Broken(str(error)) from error


def moves(case: Case) -> None:
    """Every group's weights move within a few visits, the student's among them, and losses are finite."""
    probe = case.start()
    before = probe.weights()
    while still := _still(probe, before):
        if probe.visit == PATIENCE or probe.updates == probe.total:
            raise Broken(f"group {' and '.join(still)} did not move in {probe.visit} visits")
        probe.go(probe.visit + 1)
    for line in probe.lines:
        wrong = [name for name, value in line.items() if value != value or abs(value) == float("inf")]
        if wrong:
            raise Broken(f"update {line['step']:.0f} logs {_few(wrong)} that are not finite")


def _still(probe: Probe, before: Mapping[str, Tensor]) -> list[str]:
    names = {id(param): name for name, param in probe.distiller.named_parameters()}
    return [
        f"'{group}'"
        for group, optimizer in probe.optimizers.items()
        if all(torch.equal(param, before[names[id(param)]]) for param in optimizer.params.values())
    ]


def isolated(case: Case) -> None:
    """Weights change in `step.update` alone, those of its group alone, and only its group has gradients.

    In `prepare` all but the student's may also be set by hand, to the best of several for example.
    """
    probe = case.start(around=lambda group: around(group))
    known: dict[int, Tensor] = {}

    def unchanged(when: str, but: str = "") -> None:
        for group, optimizer in probe.optimizers.items():
            for name, param in optimizer.params.items():
                if param.grad is not None:
                    raise Broken(f"{when}, '{name}' of group '{group}' has a gradient")
                by_hand = probe._preparing and not but and group != "student"
                fixed = group != but and not by_hand
                if fixed and not torch.equal(param, known.get(id(param), param)):
                    raise Broken(f"{when}, '{name}' of group '{group}' was changed")
                known[id(param)] = param.detach().clone()

    @contextmanager
    def around(group: str) -> Iterator[None]:
        unchanged(f"before an update of '{group}'")
        try:
            yield
        finally:
            unchanged(f"in an update of '{group}'", but=group)

    unchanged("before training")
    probe.ready()
    student = {id(param) for param in probe.optimizers["student"].params.values()}
    known = {key: value for key, value in known.items() if key in student}
    unchanged("after prepare")
    probe.go()
    unchanged("after the last update")


def frozen(case: Case) -> None:
    """What is in no group is bit-identical after a run."""
    probe = case.start()
    trained = {id(param) for optimizer in probe.optimizers.values() for param in optimizer.params.values()}
    fixed: dict[str, Tensor] = {
        name: param for name, param in probe.distiller.named_parameters() if id(param) not in trained
    }
    for role, module in _frozen_models(probe.distiller):
        fixed |= {f"{role}.{name}": buffer for name, buffer in module.named_buffers()}
    before = {name: value.detach().clone() for name, value in fixed.items()}
    probe.go()
    if changed := _unlike(before, fixed):
        raise Broken(f"{_few(changed)} changed, though in no group")


def frozen_eval(case: Case) -> None:
    """Frozen models run in eval mode, always."""
    probe = case.start()
    caught: dict[str, None] = {}
    student = probe.distiller.student
    shared = set(student.modules())  # what it shares with a frozen model runs for both

    def watch(path: str, module: nn.Module) -> None:
        def seen(*_: Any) -> None:
            if module.training and not (module in shared and student.training):
                caught.setdefault(path)

        module.register_forward_pre_hook(seen)

    for role, model in _frozen_models(probe.distiller):
        for name, module in model.named_modules():
            watch(f"{role}.{name}" if name else role, module)
    probe.go()
    if caught:
        raise Broken(f"{_few(list(caught))} ran in train mode")


def _frozen_models(distiller: Distiller) -> list[tuple[str, nn.Module]]:
    """Return the distiller's models without a parameter to train, by role."""
    trained = {id(param) for group in distiller.groups().values() for _, param in group.params}
    return [
        (role, model)
        for role, model in distiller.named_children()
        if trained.isdisjoint(map(id, model.parameters()))
    ]


def deterministic(case: Case) -> None:
    """Dropout is 0: a loss is a function of its rows and the weights, the same when computed twice."""

    def twice(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        def both(batch: Any, step: Any) -> Tensor:
            first, second = loss(batch, step).detach(), loss(batch, step)
            if not torch.equal(first, second):
                values = f"{float(first):.6g}, then {float(second.detach()):.6g}"
                raise Broken(f"the loss of the same rows is {values}")
            return second

        return both

    case.start(loss=twice).go()


def targets(case: Case) -> None:
    """The student learns at each row's target.

    In a causal language model that is the response to its end, the end-of-sequence token too where padding
    has its id; in a masked one the state at the mask; in a sequence classifier that of the first token, as in
    an encoder, or that of a token with a label.
    """
    probe = case.start(training={"micro_batch": 1}, loss=lambda loss: seen(loss))
    student: Any = probe.distiller.student
    while not isinstance(student, PreTrainedModel):  # a prompted model around a backbone
        inner = [child for child in student.children() if isinstance(child, PreTrainedModel)]
        if not inner:
            return
        student = inner[0]
    calls: list[tuple[Tensor, Tensor]] = []
    embedded = [torch.zeros(0)]  # the last ids: those of a text that comes as vectors, behind a prompt
    student.get_input_embeddings().register_forward_hook(lambda _, ids, out: embedded.__setitem__(0, ids[0]))

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> None:
        states = output if isinstance(output, Tensor) else output.last_hidden_state
        if torch.is_grad_enabled() and states.requires_grad:
            ids = inputs[0] if inputs else named.get("input_ids")
            ids = embedded[0] if ids is None else ids
            calls.append((ids, states))

    case.head.watched(student).register_forward_hook(keep, with_kwargs=True)

    def seen(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        def checked(batch: Any, step: Any) -> Tensor:
            calls.clear()
            value = loss(batch, step)
            for part in [batch] if isinstance(batch, Batch) else batch.values():
                if "input_ids" in part and part.size and probe._group == "student":
                    _reads_target(value, part, case.head.target(part), calls)
            return value

        return checked

    probe.go()


def _reads_target(
    value: Tensor, row: Batch, place: int | None, calls: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Raise Broken unless the loss depends on what was watched at `place` of this row."""
    if place is None:
        return
    known = place + 1 if "prompt_length" in row else int(row["length"][0])
    ids = row["input_ids"][0, :known]
    own = [  # a call may hold the rows of several parts; a prompt's states stand before the text's
        (out, at, place + out.shape[1] - given.shape[1])
        for given, out in calls
        if given.shape[1] >= known
        for at in (given[:, :known] == ids).all(1).nonzero()[:, 0].tolist()
    ]
    outputs = [out for out, _, _ in own]
    found = torch.autograd.grad(value, outputs, retain_graph=True, allow_unused=True) if own else ()
    if not any(
        gradient is not None and bool(gradient[at, behind].any())
        for gradient, (_, at, behind) in zip(found, own, strict=True)
    ):
        what = f"the state at position {place}"
        if "prompt_length" in row:
            ends = int(row["input_ids"][0, place + 1]) == EOS
            what = "the end of the sequence" if ends else "its last token"
        raise Broken(f"example {int(row['example_id'][0])}: {what} is no target of the student's loss")


def micro_batch(case: Case) -> None:
    """An update does not depend on the micro-batches its batch is cut into."""
    for dtype, tolerance, sizes in ((torch.float64, EXACT, (1, 2)), (torch.float32, CLOSE, (1,))):
        whole = case.start(dtype).go()
        for size in sizes:
            cut = case.start(dtype, training={"micro_batch": size}, follow=whole).go()
            _same_updates(whole, cut, tolerance, f"micro-batch {size}, {str(dtype).removeprefix('torch.')}")


def order(case: Case) -> None:
    """An update does not depend on the order of its rows."""
    plain = case.start().go()
    _same_updates(plain, case.start(change=_permuted, follow=plain).go(), EXACT, "rows in another order")


def padding(case: Case) -> None:
    """An update does not depend on what stands beyond the end of a row, nor on how wide the padding is."""
    plain = case.start().go()
    for seed in (1, 2):
        other = functools.partial(case.head.padded, seed=seed)  # type: ignore[call-arg]
        padded = case.start(sets=case.sets(other), change=other, follow=plain).go()
        _same_updates(plain, padded, EXACT, "other padding")


def rollouts(case: Case) -> None:
    """A sampled response depends on seed, example and visit, not on the rows beside it or their order."""
    plain = case.start().go()
    for size in (1, 2):
        other = case.start(training={"rollout_batch": size}, follow=plain).go()
        _same_responses(plain, other, f"rollout_batch {size}")
        _same_updates(plain, other, EXACT, f"rollout_batch {size}")
    turned = case.start(follow=plain).ready()
    turned.source = _Turned(turned.source)
    _same_responses(plain, turned.go(), "rows in another order")


@dataclass
class _Turned:
    """Rows of a source, those of each batch in another order."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, index: Sequence[int]) -> Batch:
        return _permuted(self.source.batch(index))

    def lengths(self, index: Sequence[int]) -> list[int]:
        return self.source.lengths(index)


def _same_responses(one: Probe, other: Probe, what: str) -> None:
    found: list[dict[tuple[Any, ...], set[tuple[int, ...]]]] = [{}, {}]
    for texts, probe in zip(found, (one, other), strict=True):
        for update in probe.seen:
            for name, part in update.parts.items():
                if "input_ids" not in part:
                    continue
                for row in range(part.size):
                    key = (update.visit, update.group, name, int(part["example_id"][row]))
                    ids = part["input_ids"][row, : int(part["length"][row])]
                    texts.setdefault(key, set()).add(tuple(ids.tolist()))
    for key, response in found[0].items():
        if response != found[1].get(key, response):
            raise Broken(f"{what}: visit {key[0] + 1}, the response to example {key[-1]} is another")


def processes(case: Case) -> None:
    """An update does not depend on the number of processes, with uneven and with empty shares of the rows."""
    in_processes(2, _uneven_shares, case)


def _uneven_shares(case: Case) -> None:
    both = Processes()
    for size in (BATCH, 1):
        alone = case.start(training={"batch_size": size}, processes=Processes(solo=True)).go()
        shared = case.start(training={"batch_size": size}, processes=both, follow=alone).go()
        _same_updates(alone, shared, EXACT, f"{size} rows on 2 processes")


def repeatable(case: Case) -> None:
    """The same seed gives bit-identical losses and weights, another seed others."""
    runs = []
    for number, seed in enumerate((case.seed, case.seed, case.seed + 1)):
        torch.manual_seed(number)  # nothing may follow from what another run left behind
        runs.append(case.start(torch.float32, seed=seed).go())
    first, again, other = runs
    for number, (a, b) in enumerate(zip(first.lines, again.lines, strict=False), 1):
        if wrong := [name for name, value in a.items() if value != b.get(name)]:
            raise Broken(f"the same seed gives another {_few(wrong)} at update {number}")
    if wrong := _unlike(first.weights(), again.weights()):
        raise Broken(f"the same seed gives other weights: {_few(wrong)}")
    if first.lines == other.lines and not _unlike(first.weights(), other.weights()):
        raise Broken("another seed gives the same losses and weights")


def resume(case: Case) -> None:
    """Killed after any visit, a new process goes on from the checkpoint as if nothing had happened."""
    with tempfile.TemporaryDirectory() as folder:
        live = case.start(torch.float32, folder=Path(folder)).ready()
        while True:
            live.save()
            made = {"train": live.source, **live.extras}
            fresh = case.start(torch.float32, folder=Path(folder), sets=made)
            fresh._ready = True  # as in a run, where what `prepare` made is kept
            try:
                fresh.resume()
            except UserError as error:
                raise Broken(f"after a kill after visit {live.visit}: {error}") from error
            lost = differences(live.distiller, fresh.distiller)
            if lost:
                kept = "a Store, a buffer, a parameter or an entry of self.state survives"
                raise Broken(f"a kill after visit {live.visit} loses {_few(lost)}; {kept}")
            if live.visit >= PATIENCE or (live.visit >= 2 and live.updates >= 3):
                break
            told = len(live.lines)
            fresh.go(live.visit + 1)
            live.go(live.visit + 1)
            wrong = ["losses"] if live.lines[told:] != fresh.lines else []
            wrong += _unlike(live.weights(), fresh.weights())
            if wrong:
                raise Broken(
                    f"resumed after visit {live.visit - 1}, the next visit gives other {_few(wrong)}"
                )


def saved(case: Case) -> None:
    """The predictor that is saved is the predictor that was trained."""
    probe = case.start(torch.float32).go(1)
    with tempfile.TemporaryDirectory() as folder, _without_progress_bars():
        model: Any = probe.distiller.predictor()
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
            # not bit by bit: a model that has been run here has faster kernels of the same functions
            before, after = _logits(model), _logits(case.head.reload(Path(folder)))
            apart = float((before - after).abs().max())
            if not apart <= CLOSE * float(before.abs().max()):
                raise Broken(f"its outputs differ by {apart:.1e} after save_pretrained and from_pretrained")
            return
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        save_file(weights, Path(folder) / "model.safetensors")
        again: Any = case.distiller(torch.float32).predictor()
        again.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        if wrong := _unlike(weights, again.state_dict()):
            raise Broken(f"{_few(wrong)} differ after saving and loading")


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def budget(case: Case) -> None:
    """A run makes exactly its number of student updates, reached in mid-visit too, each of a whole batch."""
    made_in = Counter(
        update.visit for update in case.start(torch.float32).go().seen if update.group == "student"
    )
    for total in {1, max(made_in.values(), default=1) + 1}:
        probe = case.start(torch.float32, training={"optimizer_steps": total}).go(PATIENCE)
        made = sum(update.group == "student" for update in probe.seen)
        if not made == total == len(probe.lines) == probe.updates:
            raise Broken(f"{made} updates of the student in {probe.visit} visits; the budget is {total}")
        if probe.counters["prompts"] != total * BATCH:
            seen = probe.counters["prompts"] / total
            raise Broken(f"an update of the student has {seen:g} examples on average, a batch {BATCH}")


LAWS: dict[str, Callable[[Case], None]] = {
    law.__name__: law
    for law in (
        roles,
        groups,
        fields,
        moves,
        isolated,
        frozen,
        frozen_eval,
        deterministic,
        targets,
        micro_batch,
        order,
        padding,
        rollouts,
        processes,
        repeatable,
        resume,
        saved,
        budget,
    )
}

_FIRST = ("roles", "groups", "fields")  # without these, no other law can be tried
# what may not hold either where another law is broken on purpose: dropout follows cut, order and padding
_FOLLOWS = {
    "micro_batch": ("deterministic", "order", "padding", "processes"),
    "frozen_eval": ("deterministic",),
}


def check(
    method: str,
    settings: Mapping[str, Any] | None = None,
    *,
    training: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    shared_tokenizer: bool = False,
) -> list[Law]:
    """Try the laws on a method, by name or path of its file, and return what became of each.

    A law that `breaks()` or the training settings declare broken is "not claimed"; it is tried too, and fails
    where it holds after all. Args: `settings` of the method, `training` settings, `only` these laws; those
    that all others stand on are returned where they fail. With `shared_tokenizer` all encoders read the
    student's ids, as a method may need that compares tokens.
    Raises: UserError for an unknown method, setting or law, and for a file that cannot be imported.
    """
    for name in only:
        if name not in LAWS:
            raise unknown("law", name, LAWS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            case = Case(method, dict(settings or {}), dict(training or {}), shared_tokenizer)
            return _check(case, only or tuple(LAWS))
    finally:
        torch.set_num_threads(threads)


def _check(case: Case, names: Sequence[str]) -> list[Law]:
    """Try the laws on all formats that the head has rows of; a law is as good as on its worst."""
    head = HEADS.get(registry.load_distiller(case.method).head)
    found = _check_format(case, names)
    if head is None or head.other is None or any(law.status == "fail" for law in found):
        return found
    others = {law.name: law for law in _check_format(dataclasses.replace(case, other=True), names)}
    if others.keys() != {law.name for law in found}:  # what all others stand on failed
        return list(others.values())
    worst = [max(law, others[law.name], key=lambda one: _WORSE.index(one.status)) for law in found]
    return [
        dataclasses.replace(law, seconds=first.seconds + others[law.name].seconds)
        for law, first in zip(worst, found, strict=True)
    ]


_WORSE: tuple[Status, ...] = ("pass", "not claimed", "fail")


def _check_format(case: Case, names: Sequence[str]) -> list[Law]:
    first = [_try(case, name) for name in _FIRST]
    if any(law.status == "fail" for law in first):
        return [law for law in first if law.status == "fail"][:1]
    declared = Trainer(case.distiller(), case.sets()["train"], case.budget(), case.seed).breaks()
    for name in declared:
        if name not in LAWS:
            raise unknown("law", name, LAWS, f"{case.method}: breaks()")
    follows = {name: f"follows from {law}" for law in declared for name in _FOLLOWS.get(law, ())}
    tried = {law.name: law for law in first}
    return [tried.get(name) or _try(case, name, declared.get(name), follows.get(name)) for name in names]


def _try(case: Case, name: str, declared: str | None = None, follows: str | None = None) -> Law:
    start = time.perf_counter()
    status: Status = "pass"
    reason = ""
    try:
        LAWS[name](case)
        if declared is not None:
            status, reason = "fail", f"declared broken ({declared}), but it holds"
    except Broken as broken:
        status, reason = "fail", str(broken)
        if declared is not None or follows is not None:
            status, reason = "not claimed", declared or follows or ""
    except UserError:
        raise
    except Exception as error:
        status, reason = "fail", told(error, case)
    return Law(name, status, reason, time.perf_counter() - start)


def told(error: BaseException, case: Case) -> str:
    """Return an exception in one line: type, message, and the last line of the method's file on its way."""
    if isinstance(error, ProcessFailed):
        return str(error)
    return _one_line(error, str(registry.find("distillers", case.method).resolve()))


def _one_line(error: BaseException, file: str = "") -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    frame = ([frame for frame in frames if frame.filename == file] or ours)[-1]
    return (
        f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(frame.filename).name}:{frame.lineno})"
    )


def render(laws: Sequence[Law]) -> str:
    """Return one aligned line for each law."""
    width = max((len(law.name) for law in laws), default=0)
    return "\n".join(
        f"{law.name:{width}}  {law.status:11}  {law.seconds:5.1f} s  {law.reason}".rstrip() for law in laws
    )


# ---------------------------------------------------------------------- what differs, by its name
def _inside(value: Any) -> Iterator[Any]:
    """Yield a value and, for a list, tuple, set or table, everything in it."""
    yield value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for part in value:
            yield from _inside(part)


def differences(one: Distiller, other: Distiller) -> list[str]:
    """Return the names of the tensors, stores and plain values in which two distillers differ, bit by bit."""
    found = _unlike(dict(one.named_parameters()), dict(other.named_parameters()))
    found += _unlike(dict(one.named_buffers()), dict(other.named_buffers()))
    for (path, a), (_, b) in zip(one.named_modules(), other.named_modules(), strict=True):
        # of libraries, or put into a model in their place when it is first run
        if not type(a).__module__.startswith(("torch.", "transformers.", "kdbench.activations")):
            found += _differ(_plain(a), _plain(b), path or "self", set())
    return found


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes but for those of every module."""
    return {name: value for name, value in vars(module).items() if name not in vars(nn.Module())}


def _differ(one: Any, other: Any, path: str, done: set[int]) -> list[str]:
    if id(one) in done or isinstance(one, nn.Module):
        return []
    done.add(id(one))
    if type(one) is not type(other):
        return [path]
    if isinstance(one, Tensor):
        return [] if one.shape == other.shape and torch.equal(one, other) else [path]
    if isinstance(one, torch.Generator):
        return [] if torch.equal(one.get_state(), other.get_state()) else [path]
    if isinstance(one, Store):
        return _differ([dict(b) for b in one.batches()], [dict(b) for b in other.batches()], path, done)
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return [path]
        return [name for key in one for name in _differ(one[key], other[key], f"{path}.{key}", done)]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [path]
        pairs = enumerate(zip(one, other, strict=True))
        return [name for i, (a, b) in pairs for name in _differ(a, b, f"{path}.{i}", done)]
    if isinstance(one, functools.partial):
        called = [(p.func, p.args, p.keywords) for p in (one, other)]
        return _differ(called[0], called[1], path, done)
    if isinstance(one, FunctionType | MethodType | type):
        return [] if one.__qualname__ == other.__qualname__ else [path]
    if isinstance(one, str | int | float | complex | bytes | set | frozenset | None):
        return [] if one == other or one != one else [path]
    if hasattr(one, "__dict__"):
        return _differ(vars(one), vars(other), path, done)
    return []


# ------------------------------------------------------------------------------ several processes
def in_processes(count: int, function: Callable[..., Any], *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Run `function(*args)` in `count` processes as `accelerate launch` would; return their results by rank.

    `function` is a top-level function of a module, so that the processes can import it. They are forked from
    one that has torch loaded, which the first call starts.
    Raises: Broken with its reason when a law breaks in one of them or they wait for each other; ProcessFailed
    with its exception when one fails.
    """
    forking = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forking else "spawn")
    if forking:
        models = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "bert", "roberta")]
        context.set_forkserver_preload([__name__, *models])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waiting: dict[Any, int] = {}
    started = []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_one_process, args=(rank, count, port, sender, function, args))
        process.start()
        sender.close()
        waiting[receiver] = rank
        started.append(process)
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, Exception]] = []
    end = time.monotonic() + timeout_s
    try:
        while waiting:
            # where one has failed, the others may be about to say that they lost it
            ready = wait(list(waiting), timeout=1.0 if failures else max(0.0, end - time.monotonic()))
            if not ready:
                break
            for receiver in ready:
                rank = waiting.pop(receiver)
                when, result = _received(receiver, rank, count)
                if isinstance(result, Exception):
                    failures.append((when, rank, result))
                else:
                    results[rank] = result
        if failures:
            raise min(failures, key=lambda failure: failure[:2])[2]
        if waiting:
            ranks = " and ".join(map(str, waiting.values()))
            raise Broken(f"after {timeout_s:g} s, process {ranks} of {count} has not ended")
    finally:
        for process in started:
            if len(results) < count:
                process.terminate()
            process.join()
    return [results[rank] for rank in range(count)]


def _received(receiver: Any, rank: int, count: int) -> tuple[float, Any]:
    """Return when a process ended, and its result or what it failed with."""
    with receiver:
        try:
            kind, when, result = receiver.recv()
        except EOFError:
            return 0.0, ProcessFailed(f"process {rank} of {count} died")
    if kind == "broken":
        result = Broken(result)
    elif kind == "failed":
        result = ProcessFailed(f"in process {rank} of {count}: {result}")
    return when, result


def _one_process(
    rank: int, count: int, port: int, sender: Connection, function: Callable[..., Any], args: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)})
    os.environ.update({"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    try:
        kind, result = "done", function(*args)
    except Broken as broken:
        kind, result = "broken", str(broken)
    except BaseException as error:
        kind, result = "failed", _one_line(error)
    try:
        sender.send((kind, time.monotonic(), result))
    finally:
        sender.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
