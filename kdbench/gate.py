"""The regression check: do the methods still compute, train and score as when its references were learned?

Two measurements, each compared with the reference of the method's family in `configs/gate`:

- *Updates.* Every method makes its first `UPDATES` updates in float64 on tiny random models whose
  configuration has dropout: GPT-2 on rows of `tiny_instruct`, or the encoders and rows of `checks`, where
  other roles may be prompts on the student's encoder. Each loss term is computed a second time, from the
  models' own logits at the rows of the update, by formulas stated here and not taken from the methods or from
  `losses`. Every logged number, the movement of each group's weights and the counts of tokens are compared
  with stored ones.
- *Scores.* Every method runs once on its family's board, the whole way from stages to analyses, after the
  runs of other rows that it needs; on a board with axes at all values of its row, whose mean is its score.
  Its scores must lie in bands learned from `SEEDS` training seeds.

A number has *passed*, has *regressed* (with the amount), or was *not measured* (with the reason). The gate
fails on a regressed number, and on one that was not measured, since what is not measured is not guarded; but
not where the reason is stated in `EXEMPT`, nor where a stored number is missed under other versions of torch
or transformers than those it was learned with, for then the code need not be at fault. Formulas, counts that
must agree, and the teacher's repeatability need no stored number and hold under every version.

Tolerances: float64 leaves rounding alone to differ between machines. Each tolerance is `FACTOR` times the
largest difference seen between 1 and 2 threads and after moving the first weights by one unit in the last
place, at least `FLOOR`, relative to the largest entry. Bands are prediction intervals of Student's t for one
new seed; those of a family are missed by chance in a share `FALSE_ALARM` of gates whose random streams
changed. The gate's own seed is one of those learned from, so unchanged code is not at that risk.

A new method takes part by its name, and is of the family that has its head. To have its terms recomputed it
needs an entry in `FORMULAS`; for models other than those that the board's roles name, a row of the board.

Source: own; prediction interval as in Student 1908, https://doi.org/10.2307/2331554.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.special import erf, log_softmax, logsumexp, softmax
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

from kdbench import commands, registry, stages
from kdbench.checks import HEADS, SEVERAL
from kdbench.clock import running
from kdbench.config import TrainingConfig, check_settings, library_versions, load_board
from kdbench.distiller import Batch, Distiller, Parts
from kdbench.errors import UserError
from kdbench.harness import BatchSource, Recorder, SourceData, Trainer
from kdbench.paths import configs_dir
from kdbench.record import RunRecord, atomic
from kdbench.runner import Plan
from kdbench.stages import Places
from kdbench.strict import read_toml
from kdbench.tasks.tiny_instruct import TinyInstruct

Outcome = Literal["passed", "regressed", "not measured"]
Array = NDArray[np.float64]

UPDATES = 20  # student updates that leave a fingerprint
FACTOR, FLOOR = 100.0, 1e-9  # tolerance: so many times the largest difference seen, at least the floor
CEILING = 1e-7  # a recomputed term may never differ by more, whatever was learned
SEEDS = tuple(range(1, 11))  # training seeds that the bands are learned from; the gate runs the first
FALSE_ALARM = 0.01  # share of gates in which some band is missed by chance
SCORES = (
    "instruction_following/rouge_l",
    "instruction_following/length",
    "exposure_bias/accumulated_error@15",
    "exposure_bias/ex_acc_err@15",
)
FEW_SHOT_SCORES = ("few_shot/accuracy/topic", "few_shot/nll/topic")
TRANSFER_SCORES = ("transfer/score",)
EXEMPT: dict[str, str] = {}
"""Methods that the gate leaves out, each with the reason; they do not make it fail."""
UNSCORED = {
    "mlm": "pretraining has no score of its own: it makes the models of all rows of few_shot.toml",
    "mlm_pooler": "pretraining has no score of its own: it makes the encoder of all rows of transfer.toml",
}
"""Methods without a run on a board, each with the reason; that does not make the gate fail."""

TRAINING: dict[str, Any] = {
    "optimizer_steps": UPDATES + 4,  # so that a visit that begins within `UPDATES` is whole
    "batch_size": 8,
    "micro_batch": 3,  # uneven, so that a mean over micro-batches shows
    "rollout_batch": 5,
    "max_new_tokens": 12,
    "lr": 1e-2,
    "schedule": "linear",
    "warmup_steps": 3,
    "checkpoint_every": 0,
}
ROWS: dict[str, Any] = {"train": 48, "dev": 12, "noise": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {"prompt_distiller": {"probe_steps": 10}}  # of encoders, to be fast


@dataclass(frozen=True)
class Family:
    """Methods that are measured alike: by the `heads` of their models they share a board, the file of their
    reference, and the `scores` that are kept. `made_with` are further settings of their updates.
    """

    name: str
    heads: tuple[str, ...]
    board: str
    reference: str
    scores: tuple[str, ...]
    made_with: Mapping[str, Any]

    def settings(self) -> str:
        """A hash of what is measured: a reference learned with other settings says nothing."""
        board = read_toml(_board_path(self))
        return stages.digest(UPDATES, TRAINING, dict(self.made_with), self.scores, board)


INSTRUCTION = Family("rows", ("causal_lm",), "board.toml", "reference.json", SCORES, ROWS)
FEW_SHOT = Family(
    "few_shot_rows", ("masked_lm", "sequence"), "few_shot.toml", "few_shot.json", FEW_SHOT_SCORES, SETTINGS
)
TRANSFER = Family("transfer_rows", ("encoder",), "transfer.toml", "transfer.json", TRANSFER_SCORES, {})
FAMILIES = (INSTRUCTION, FEW_SHOT, TRANSFER)


def family(method: str) -> Family:
    """The family of a method; one that cannot be loaded, or has another head, fails when it is measured."""
    with suppress(Exception):
        head = registry.load_distiller(method).head
        return next(one for one in FAMILIES if head in one.heads)
    return INSTRUCTION


# ---------------------------------------------------------------------------------------------------- report
@dataclass(frozen=True)
class Number:
    """One checked number: what became of it, and why. `excused`: not measured, for a stated reason."""

    name: str
    outcome: Outcome
    reason: str = ""
    excused: bool = False


@dataclass
class Report:
    """Everything that the gate checked, and how long it took."""

    numbers: list[Number] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing has regressed and everything was measured, but for what is excused."""
        return all(number.outcome == "passed" or number.excused for number in self.numbers)

    def named(self, outcome: Outcome) -> list[str]:
        """The names of the numbers with this outcome."""
        return [number.name for number in self.numbers if number.outcome == outcome]

    def render(self) -> str:
        """The report as text: a line per method, then every number that has not passed."""
        lines = []
        for owner in dict.fromkeys(number.name.split("/")[0] for number in self.numbers):
            own = [number for number in self.numbers if number.name.split("/")[0] == owner]
            counts = Counter(number.outcome for number in own)
            lines.append(f"{owner:<20} " + ", ".join(f"{count} {name}" for name, count in counts.items()))
        for number in self.numbers:
            if number.outcome != "passed":
                lines.append(f"{number.outcome}: {number.name}: {number.reason}")
        lines += [f"note: {note}" for note in self.notes]
        counts = Counter(number.outcome for number in self.numbers)
        told = ", ".join(f"{counts[name]} {name}" for name in ("passed", "regressed", "not measured"))
        lines.append(f"gate {'passed' if self.passed else 'failed'}: {told} ({self.seconds:.0f} s)")
        return "\n".join(lines)


# -------------------------------------------------------------------------------------- tiny models and rows
def _model(role: str, task: TinyInstruct) -> nn.Module:
    """A GPT-2 of 2 layers in float64 whose numbers no library version changes; the student is narrower.

    The end of a sequence is likely enough that some responses end and some are cut.
    """
    tokenizer = task.tokenizer()
    eos = int(tokenizer.eos_token_id)
    width = 16 if role == "student" else 24
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": width, "n_positions": 192}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **shape)
    model: Any = _drawn(GPT2LMHeadModel(config).double(), role)
    with torch.no_grad():
        end = model.get_output_embeddings().weight[eos]
        model.base_model.ln_f.bias.copy_((4 if role == "student" else 3.5) * end / end.square().sum())
    model.config.pad_token_id = eos
    model.kdbench_encode = lambda text: list(tokenizer(text)["input_ids"])
    model.kdbench_pad = eos
    for part in (model, model.base_model):  # rows have no padding here, and the check only prints
        part.warn_if_padding_and_no_attention_mask = lambda ids, mask: None
    return model.eval()  # type: ignore[no-any-return]


def _drawn(model: nn.Module, role: str) -> nn.Module:
    """The model with weights that depend on the role and their names alone."""
    draw = np.random.RandomState(int(hashlib.sha256(role.encode()).hexdigest()[:8], 16))
    with torch.no_grad():
        for name, param in sorted(model.named_parameters()):
            value = torch.from_numpy(0.3 * draw.standard_normal(tuple(param.shape)))
            norm = any(part in name for part in ("ln_", "LayerNorm", "layer_norm"))
            param.copy_(1 + 0.3 * value if norm and name.endswith("weight") else value)
    return model


def _one_ulp(model: nn.Module) -> None:
    """Move about two thirds of the weights by one unit in the last place."""
    draw = np.random.RandomState(0)
    with torch.no_grad():
        for _, param in sorted(model.named_parameters()):
            param.mul_(torch.from_numpy(1 + 2.0**-52 * draw.randint(-1, 2, tuple(param.shape))))


@dataclass(frozen=True)
class Row:
    """One row of an update: its ids without padding, and how many of them are the prompt."""

    example: int
    ids: list[int]
    prompt: int

    @property
    def targets(self) -> range:
        """Places of the response's tokens."""
        return range(max(self.prompt, 1), len(self.ids))


def _rows(batch: Batch) -> list[Row]:
    fields = (batch[name].tolist() for name in ("example_id", "input_ids", "prompt_length", "length"))
    return [Row(example, ids[:end], prompt) for example, ids, prompt, end in zip(*fields, strict=True)]


# ------------------------------------------------------------------------------------- formulas, stated anew
class Seen:
    """One update before the method makes it: its rows, and log-probabilities of its models at their targets.

    `memory` lasts as long as the visit. Roles are the distiller's models, and `prompted`, the teacher behind
    the distiller's soft prompt.
    """

    def __init__(
        self, distiller: Distiller, parts: Mapping[str, Batch], index: int, total: int, memory: dict[str, Any]
    ) -> None:
        self.rows = {name: _rows(part) for name, part in parts.items()}
        self.index, self.total, self.memory = index, total, memory
        self._distiller: Any = distiller
        self._known: dict[tuple[str, str], Array] = {}

    def log(self, role: str, part: str = "") -> Array:
        """Log-probabilities [N, V] at the N targets of a part, row by row, from forwards without padding."""
        if (role, part) not in self._known:
            logits = [self._logits(role, row) for row in self.rows[part] if row.targets]
            at = np.concatenate(logits)
            at -= at.max(axis=1, keepdims=True)
            self._known[role, part] = at - np.log(np.exp(at).sum(axis=1, keepdims=True))
        return self._known[role, part]

    def _logits(self, role: str, row: Row) -> Array:
        model = self._distiller.teacher if role == "prompted" else getattr(self._distiller, role)
        ids, before = torch.tensor([row.ids]), 0
        if role == "prompted":
            vectors = self._distiller.prompt.vectors
            before = len(vectors)
            out = model(inputs_embeds=torch.cat([vectors[None], model.get_input_embeddings()(ids)], dim=1))
        else:
            out = model(input_ids=ids)
        logits: Array = out.logits[0, [before + t - 1 for t in row.targets]].numpy()
        return logits

    def said(self, role: str, part: str = "") -> Array:
        """Log-probability [N] that a model gives to each target token."""
        tokens = [row.ids[t] for row in self.rows[part] for t in row.targets]
        return self.log(role, part)[np.arange(len(tokens)), tokens]


@dataclass
class Given:
    """What an encoder's method starts from: rows with the fields of all roles, and its frozen models."""

    sets: dict[str, Batch]
    models: dict[str, Any] = field(default_factory=dict)
    known: dict[tuple[str, int], tuple[Array, Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {
            int(row["example_id"]): row
            for rows in self.sets.values()
            for row in (rows.rows([place]) for place in range(rows.size))
        }


class SeenTexts:
    """One update of encoders before the method makes it: what they say of its texts, whose rows are those
    from before training. Roles are the models as they were given, but for the student.
    """

    def __init__(self, distiller: Distiller, parts: Mapping[str, Batch], given: Given) -> None:
        self.distiller: Any = distiller
        self.batches, self._given = parts, given
        self._student: dict[tuple[str, int], tuple[Array, Array]] = {}

    def examples(self, part: str = "") -> list[int]:
        """The example ids of a part in order; `all <set>` is the whole of a set."""
        known = {**self.batches, **{f"all {name}": rows for name, rows in self._given.sets.items()}}
        ids: list[int] = known[part]["example_id"].tolist()
        return ids

    def field(self, name: str, part: str = "") -> list[Any]:
        """A field of the rows of a part, one of each row."""
        return [self._given.rows[example][name][0].tolist() for example in self.examples(part)]

    def logits(self, role: str, part: str = "") -> Array:
        """The logits of the classes, [B, N]."""
        return np.stack([self._read(role, example)[0] for example in self.examples(part)])

    def states(self, role: str, part: str = "") -> Array:
        """The states that the classes are read from, [B, L + 1, H]: 0 is the embeddings'."""
        return np.stack([self._read(role, example)[1] for example in self.examples(part)])

    def _read(self, role: str, example: int) -> tuple[Array, Array]:
        known = self._student if role == "student" else self._given.known
        if (role, example) not in known:
            known[role, example] = self._forward(role, self._given.rows[example])
        return known[role, example]

    def model(self, role: str) -> Any:
        """A role's model, of several as `<role>.<place>`."""
        if role == "student":
            return self.distiller.student
        name, _, place = role.partition(".")
        return self._given.models[name][int(place)] if place else self._given.models[name]

    def _forward(self, role: str, row: Batch) -> tuple[Array, Array]:
        """Logits [N] and states [L + 1, H] from one forward without padding."""
        model, row = self.model(role), row.of(role)
        own = slice(int(row["length"]))
        inputs = {"input_ids": row["input_ids"][:, own]}
        if "segment_ids" in row and model.config.type_vocab_size > 1:
            inputs["token_type_ids"] = row["segment_ids"][:, own]
        out = model(**inputs, output_hidden_states=True)
        place, logits = 0, out.logits[0]
        if "mask_index" in row:
            place = int(row["mask_index"])
            logits = logits[place, row["verbalizer_ids"][0]]
        return logits.numpy(), torch.cat(out.hidden_states)[:, place].numpy()


class SeenPrompted(SeenTexts):
    """One update of an encoder that may stand behind a deep prompt; all roles read the student's text."""

    def __init__(
        self, distiller: Distiller, parts: Mapping[str, Batch], given: Given, index: int, total: int
    ) -> None:
        super().__init__(distiller, parts, given)
        self.index, self.total = index, total

    def mean_text(self, role: str) -> Array:
        """The mean of the first token's last state [H] over the texts of the task that a model is of."""
        mean: Array = self.model(role).signature["own.cls_hidden"].double().numpy()
        return mean

    def _forward(self, role: str, row: Batch) -> tuple[Array, Array]:
        """Logits [N] and states [L + 1, H] from one forward without padding.

        A prompt token holds key and value of layer 0, then those of layer 1, and so on; heads lie beside each
        other.
        """
        model = self.model(role)
        encoder, own, before = model.encoder, slice(int(row["length"])), 0
        inputs: dict[str, Any] = {"input_ids": row["input_ids"][:, own]}
        if model.prompt is not None:
            before, heads = len(model.prompt.vectors), encoder.config.num_attention_heads
            inputs["past_key_values"] = cache = DynamicCache()
            parts = model.prompt.vectors.chunk(2 * encoder.config.num_hidden_layers, dim=1)
            by_head = [part.view(before, heads, -1).transpose(0, 1)[None] for part in parts]
            for layer, (key, value) in enumerate(zip(by_head[::2], by_head[1::2], strict=True)):
                cache.update(key, value, layer)
        out = encoder(
            **inputs,
            token_type_ids=row["segment_ids"][:, own],
            attention_mask=torch.ones(1, before + inputs["input_ids"].shape[1], dtype=torch.long),
            output_hidden_states=True,
        )
        weights = _weights(model.head)
        logits = out.pooler_output[0].numpy() @ weights["weight"].T + weights["bias"]
        return logits, torch.cat(out.hidden_states)[:, 0].numpy()


Terms = dict[str, float]
Formulas = Mapping[str, Callable[[Any], Terms]]


def _kl(first: Array, second: Array) -> float:
    """Mean over targets of sum_v a (log a - log b)."""
    return float((np.exp(first) * (first - second)).sum(axis=1).mean())


def _ce(seen: Seen, part: str = "") -> float:
    return float(-seen.said("student", part).mean())


def _sft(seen: Seen) -> Terms:
    return {"ce": _ce(seen), "loss": _ce(seen)}


def _kd(seen: Seen) -> Terms:
    kl = _kl(seen.log("teacher"), seen.log("student"))
    return {"ce": _ce(seen), "forward_kl": kl, "loss": 0.5 * _ce(seen) + 0.5 * kl}


def _gkd(seen: Seen) -> Terms:
    kl = _kl(seen.log("student"), seen.log("teacher"))
    return {"reverse_kl": kl, "loss": kl}


def _promptkd_prompt(seen: Seen) -> Terms:
    kd = _kl(seen.log("prompted"), seen.log("student"))
    reg = _kl(seen.log("prompted"), seen.log("teacher"))
    return {"prompt_kd": kd, "prompt_reg": reg, "loss": kd + (1 - seen.index / seen.total) * reg}


def _promptkd_student(seen: Seen) -> Terms:
    kl = _kl(seen.log("student"), seen.log("prompted"))
    return {"kd": kl, "loss": kl}


def _minillm(seen: Seen) -> Terms:
    """Spec: rewards doubled, gamma 0.95, length-normalised, whitened over the update, clip 0.2, alpha 0.2."""
    now, teacher, rows = (
        seen.said("student", "rollout"),
        seen.said("teacher", "rollout"),
        seen.rows["rollout"],
    )
    ends = np.cumsum([len(row.targets) for row in rows])
    starts = ends - [len(row.targets) for row in rows]
    old = seen.memory.setdefault("old", {})  # before the first update of a visit the student is the sampler
    for row, start, end in zip(rows, starts, ends, strict=True):
        old.setdefault(row.example, now[start:end])
    before = np.concatenate([old[row.example] for row in rows])
    reward = np.clip((teacher - before) / 0.5, -100, 100)
    advantage = np.zeros_like(reward)
    for start, end in zip(starts, ends, strict=True):
        for t in range(start, end):
            left = np.arange(end - t)
            advantage[t] = (0.95**left * reward[t:end]).sum() / len(left)
    advantage = (advantage - advantage.mean()) / np.sqrt(advantage.var() + 1e-8)
    weight = np.exp(before) / (0.8 * np.exp(before) + 0.2 * np.exp(teacher))
    ratio = weight * np.exp(now - before)
    clipped = np.minimum(np.maximum(ratio, 0.8), 1.2)
    policy = float(np.maximum(-advantage * ratio, -advantage * clipped).mean())
    single = _kl(seen.log("student", "rollout"), seen.log("teacher", "rollout"))
    text_ce = _ce(seen, "lm")
    text_kl = _kl(seen.log("teacher", "lm"), seen.log("student", "lm"))
    return {
        "policy": policy,
        "reward": float(reward.mean()),
        "clipped_share": float((clipped != ratio).mean()),
        "single_step": single,
        "lm_ce": text_ce,
        "lm_kl": text_kl,
        "loss": policy + single + 0.5 * text_ce + 0.5 * text_kl,
    }


def _prompt_distiller_lm(seen: Seen) -> Terms:
    """Spec: lam1 0.2, temperature 1. The contrast, and with it the loss, is not recomputed."""
    kd = {"labeled": "tuned", "unlabeled": "pretrained"}
    terms = {f"kd_{x}": 0.2 * _kl(seen.log(role, x), seen.log("student", x)) for x, role in kd.items()}
    return {"ce": _ce(seen, "labeled"), **terms}


def _class_ce(seen: SeenTexts, part: str = "") -> float:
    log = log_softmax(seen.logits("student", part), axis=1)
    return float(-log[np.arange(len(log)), seen.field("class_label", part)].mean())


def _soft(seen: SeenTexts, role: str, temperature: float = 10.0, part: str = "") -> float:
    """t^2 KL(teacher || student) of the distributions softmax(logits / t)."""
    p, q = (log_softmax(seen.logits(name, part) / temperature, axis=1) for name in (role, "student"))
    return temperature**2 * _kl(p, q)


def _only_ce(seen: SeenTexts) -> Terms:
    return {"loss": _class_ce(seen)}


def _student_ft(seen: SeenTexts) -> Terms:
    return {"ce": _class_ce(seen), "loss": _class_ce(seen)}


def _kd_ft(seen: SeenTexts) -> Terms:
    ce, kd = _class_ce(seen), _soft(seen, "teacher")
    return {"ce": ce, "kd": kd, "loss": 0.5 * ce + 0.5 * kd}


def _pkd_ft(seen: SeenTexts) -> Terms:
    """Spec: layer j of k follows j L / k, states of length 1, means over layers and features; 500 times."""
    ce, ds = _class_ce(seen), _soft(seen, "teacher") / seen.logits("teacher").shape[1]
    ours, theirs = seen.states("student"), seen.states("teacher")
    k, depth = ours.shape[1] - 1, theirs.shape[1] - 1
    squares = []
    for layer in range(1, k):
        q = ours[:, layer] @ seen.distiller.fit.weight.numpy().T
        p = theirs[:, layer * depth // k]
        unit = [x / np.sqrt((x**2).sum(axis=1, keepdims=True)) for x in (q, p)]
        squares.append((unit[0] - unit[1]) ** 2)
    pt = float(np.mean(squares))
    return {"ce": ce, "ds": ds, "pt": pt, "loss": 0.3 * ce + 0.7 * ds + 500 * pt}


def _tinybert_ft(seen: SeenTexts) -> Terms:
    p, log_q = softmax(seen.logits("teacher"), axis=1), log_softmax(seen.logits("student"), axis=1)
    return {"loss": float(-(p * log_q).mean())}  # over classes too


def _prompt_kd(seen: SeenTexts) -> Terms:
    ce, kd = _class_ce(seen), 0.2 * _soft(seen, "teacher")
    return {"mlm": ce, "kd_labeled": kd, "loss": ce + kd}


def _prompt_distiller(seen: SeenTexts) -> Terms:
    """Spec: lam1 and lam2 0.2, temperature 10."""
    terms = {"mlm": _class_ce(seen, "labeled")}
    for part, pool, role in (("labeled", "train", "teacher"), ("unlabeled", "unlabeled", "pretrained")):
        values = _contrast(seen, part, f"all {pool}", role)
        terms[f"kd_{part}"] = 0.2 * _soft(seen, role, part=part)
        terms[f"cpd_{part}"] = 0.2 * float(np.mean([value or 0.0 for value in values]))
        terms[f"skipped_{part}"] = float(np.mean([value is None for value in values]))
    return {**terms, "loss": sum(value for name, value in terms.items() if "skipped" not in name)}


def _contrast(seen: SeenTexts, part: str, pool: str, role: str) -> list[float | None]:
    """-log exp g / (exp g + sum_m exp g_m) of each anchor; None where no text is of another class.

    Negatives are those that the batch holds; one counts if a text of another class has this vector. They are
    8 or all there are: other numbers give NaN.
    """

    def labels(name: str) -> NDArray[Any]:
        gold = role == "teacher"
        return np.array(seen.field("class_label", name) if gold else seen.logits(role, name).argmax(axis=1))

    anchor = _mean_probe(seen.distiller.student_probes, seen.states("student", part))
    bank = getattr(seen.distiller, f"{role}_probes")
    own, vectors = (_mean_probe(bank, seen.states(role, name)) for name in (part, pool))
    drawn, valid = (seen.batches[part][f"{role}_{name}"].numpy() for name in ("negatives", "valid"))
    classes, values = labels(pool), list[float | None]()
    for i, label in enumerate(labels(part)):
        others = vectors[classes != label]
        if not len(others):
            values.append(None)
            continue
        negatives = [m for m in drawn[i][valid[i]] if np.abs(others - m).max(axis=1).min() < CEILING]
        g = np.array([own[i], *negatives]) @ anchor[i]
        complete = len(negatives) == min(8, len(others))
        values.append(float(logsumexp(g) - g[0]) if complete else math.nan)
    return values


def _mean_probe(bank: Any, states: Array) -> Array:
    """Mean over inner layers of softmax(E norm(gelu(W h + b)) + c), [B, N]; E are rows of label words."""
    weights = _weights(bank)
    read = []
    for j in range(states.shape[1] - 2):
        x = _normed_gelu(states[:, j + 1] @ weights["dense_weight"][j].T + weights["dense_bias"][j], 1e-12)
        x = x * weights["norm_weight"][j] + weights["norm_bias"][j]
        read.append(softmax(x @ weights["rows"].T + weights["bias"][j], axis=1))
    return np.asarray(np.mean(read, axis=0))


def _weights(module: nn.Module) -> dict[str, Array]:
    """A module's parameters and buffers by name."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: value.detach().numpy() for name, value in named}


def _normed_gelu(x: Array, epsilon: float) -> Array:
    """gelu(x) with mean 0 and variance 1 of each row."""
    x = x * (1 + erf(x / math.sqrt(2))) / 2
    normed: Array = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + epsilon)
    return normed


def _mlm(seen: SeenTexts) -> Terms:
    """The tokens to predict are those that the batch names; what stood there is known from before."""
    nats, batch = [], seen.batches[""]
    for i, original in enumerate(seen.field("input_ids")):
        places = (batch["targets"][i] >= 0).nonzero()[:, 0].tolist()
        ids = batch["input_ids"][i : i + 1, : int(batch["length"][i])]
        log = log_softmax(seen.distiller.student(input_ids=ids).logits[0].numpy(), axis=1)
        nats += [-log[place, original[place]] for place in places]
    return {"loss": float(np.mean(nats))}


def _mlm_pooler(seen: SeenPrompted) -> Terms:
    """Spec: both terms count once; a row's words are its tokens but for the first and the last."""
    weights, batch = _weights(seen.distiller), seen.batches[""]
    table = seen.distiller.student.get_input_embeddings().weight.numpy()
    nats, bags = list[float](), list[float]()
    for i, original in enumerate(seen.field("input_ids")):
        end = int(batch["length"][i])
        texts = {name: batch[name][i : i + 1, :end] for name in ("input_ids", "segment_ids")}
        out = seen.distiller.student(input_ids=texts["input_ids"], token_type_ids=texts["segment_ids"])
        places = (batch["targets"][i] >= 0).nonzero()[:, 0].tolist()
        x = out.last_hidden_state[0].numpy()[places]
        x = _normed_gelu(x @ weights["transform.0.weight"].T + weights["transform.0.bias"], 1e-5)
        x = x * weights["transform.2.weight"] + weights["transform.2.bias"]
        log = log_softmax(x @ table.T + weights["bias"], axis=1)
        nats += [-log[n, original[place]] for n, place in enumerate(places)]
        log = log_softmax(out.pooler_output[0].numpy() @ weights["bag.weight"].T + weights["bag.bias"])
        bags.append(-log[original[1 : end - 1]].mean())
    masked, bag = float(np.mean(nats)), float(np.mean(bags))
    return {"masked": masked, "bag": bag, "loss": masked + bag}


def _similarity(seen: SeenPrompted, source: str) -> float:
    a, b = seen.mean_text(source), seen.mean_text("target")
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _lam(seen: SeenPrompted, similarity: float) -> float:
    """Spec: max(0, s) times 1 in the first tenth of training, from then on linearly to 0 at its end."""
    done = (seen.index - 1) / seen.total
    return max(0.0, similarity) * min(1.0, (1 - done) / 0.9)


def _gap(seen: SeenPrompted, teacher: str) -> float:
    """Mean over texts and classes of the squared difference of logits."""
    return float(((seen.logits("student") - seen.logits(teacher)) ** 2).mean())


def _similar(seen: SeenPrompted) -> dict[int, float]:
    """Spec: the similarities of the 3 most similar sources, by place."""
    found = {i: _similarity(seen, f"sources.{i}") for i in range(len(seen.model("sources")))}
    return dict(sorted(found.items(), key=lambda one: -one[1])[:3])


def _taught(seen: SeenPrompted, similarity: float) -> Terms:
    task, weight, distance = _class_ce(seen), _lam(seen, similarity), _gap(seen, "teacher")
    return {"task": task, "weight": weight, "distance": distance, "loss": task + weight * distance}


def _panda(seen: SeenPrompted) -> Terms:
    return _taught(seen, _similarity(seen, "source"))


def _panda_early(seen: SeenPrompted) -> Terms:
    """Spec: the sources' similarity is their mean, weighted by its own softmax, tau 1."""
    found = np.array(list(_similar(seen).values()))
    return _taught(seen, float(softmax(found) @ found))


def _panda_late(seen: SeenPrompted) -> Terms:
    task, found = _class_ce(seen), _similar(seen)
    weights = {i: _lam(seen, similarity) / len(found) for i, similarity in found.items()}
    drawn = sum(weight * _gap(seen, f"teachers.{i}") for i, weight in weights.items())
    return {"task": task, "weight": sum(weights.values()), "weighted_distance": drawn, "loss": task + drawn}


FORMULAS: dict[str, Formulas] = {
    "sft": {"student": _sft},
    "kd": {"student": _kd},
    "seqkd": {"student": _kd},
    "gkd": {"student": _gkd},
    "minillm": {"student": _minillm},
    "promptkd": {"prompt": _promptkd_prompt, "student": _promptkd_student},
    "prompt_distiller_lm": {"student": _prompt_distiller_lm},
    "student_ft": {"student": _student_ft},
    "kd_ft": {"student": _kd_ft},
    "pkd_ft": {"student": _pkd_ft},
    "tinybert_ft": {"student": _tinybert_ft},
    "student_pt": {"student": _only_ce},
    "prompt_kd": {"student": _prompt_kd},
    "prompt_distiller": {"student": _prompt_distiller},
    "mlm": {"student": _mlm},
    "full_tune": {"student": _only_ce},
    "pt": {"student": _only_ce},
    "pot": {"student": _only_ce},
    "pot_early": {"student": _only_ce},
    "panda": {"student": _panda},
    "panda_early": {"student": _panda_early},
    "panda_late": {"student": _panda_late},
    "mlm_pooler": {"student": _mlm_pooler},
}
"""What a method's default settings compute: per group the terms it logs and `loss`, in nats."""

COEFFICIENTS = {"promptkd": ("prompt/loss", "prompt/prompt_kd", "prompt/prompt_reg")}
"""Logged (L, A, B) with L = A + (1 - g / T) B."""


# ---------------------------------------------------------------------------------- a method's first updates
@dataclass
class Fingerprint:
    """What a method's first updates left behind; lists have one entry per student update.

    `logged` are the numbers it logged, `own` those recomputed, `moved` the norm of each group's change,
    `tokens` and `ends` the target tokens and the ends of sequences among them as counted from the rows (all
    tokens, and no ends, of encoders),
    `disagree` what was counted in two ways with different results, `repeats` the largest difference between
    two forwards of each frozen model.
    """

    logged: dict[str, list[float | None]] = field(default_factory=dict)
    own: dict[str, list[float | None]] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    disagree: list[str] = field(default_factory=list)
    repeats: dict[str, float] = field(default_factory=dict)


class _Watched(Trainer):
    """A trainer that computes every update's terms before the method makes it."""

    def __init__(
        self,
        distiller: Distiller,
        sets: Mapping[str, Batch],
        formulas: Formulas,
        seen: Callable[[Mapping[str, Batch], _Watched], Any],
    ) -> None:
        recorder = Recorder()
        sources = {name: BatchSource(rows) for name, rows in sets.items()}
        source, self.dev = sources.pop("train"), sources.pop("dev")
        training = TrainingConfig(**TRAINING)
        super().__init__(distiller, source, training, 1, extras=sources, recorder=recorder)
        self.lines, self.formulas, self.seen = recorder.losses, formulas, seen
        self.found = Fingerprint()
        self._own: dict[int, Terms] = {}
        self.memory: dict[str, Any] = {}  # lasts as long as a visit
        self._eos = distiller.student.config.eos_token_id  # type: ignore[union-attr]
        self._looking = False
        self._watch_frozen()

    def _watch_frozen(self) -> None:
        """Run every forward of a frozen model a second time, in the mode in which the method runs it."""
        trained = {id(param) for optimizer in self.optimizers.values() for param in optimizer.params.values()}

        def watch(role: str, model: PreTrainedModel) -> None:
            self.found.repeats[role] = 0.0

            def again(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                if self._looking or kwargs.get("past_key_values") is not None:
                    return
                with self._only_looking():
                    apart = module(*args, **kwargs).last_hidden_state - output.last_hidden_state
                self.found.repeats[role] = max(self.found.repeats[role], float(apart.abs().max()))

            model.base_model.register_forward_hook(again, with_kwargs=True)

        for role, model in self.distiller.named_children():
            if isinstance(model, PreTrainedModel) and trained.isdisjoint(map(id, model.parameters())):
                watch(role, model)

    @contextmanager
    def _only_looking(self) -> Iterator[None]:
        self._looking = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._looking = False

    def update(self, group: str, loss: Callable[[Any, Any], Tensor], batch: Batch | Parts) -> None:
        """Look, then update."""
        parts = {"": batch} if isinstance(batch, Batch) else dict(batch)
        if group in self.formulas:
            modes = [(module, module.training) for module in self.distiller.modules()]
            self.distiller.eval()
            with self._only_looking():
                for term, value in self.formulas[group](self.seen(parts, self)).items():
                    self._own.setdefault(self.index, {})[f"{group}/{term}"] = value
            for module, training in modes:
                module.training = training
        if group == "student":
            self._count(parts)
        super().update(group, loss, batch)

    def _count(self, parts: Mapping[str, Batch]) -> None:
        tokens = ends = 0
        for part in parts.values():
            if "prompt_length" not in part:
                tokens += int(part["length"].sum())
                continue
            rows = _rows(part)
            tokens += sum(len(row.targets) for row in rows)
            ends += sum(row.ids[t] == self._eos for row in rows for t in row.targets)
            if "finished" in part and [row.ids[-1] == self._eos for row in rows] != part["finished"].tolist():
                self.found.disagree.append(
                    f"update {self.index}: `finished` and the last tokens of the responses"
                )
        self.found.tokens.append(tokens)
        self.found.ends.append(ends)

    def go(self) -> Fingerprint:
        """Make the updates and return what they left."""
        start = {name: param.detach().clone() for name, param in self.parameters().items()}
        sources = {"train": self.source, "dev": self.dev, **self.extras}
        for name, rows in (self.prepare(SourceData(sources, 5, self.processes.device)) or {}).items():
            self.replace_rows(name, rows)
        with running(self.clock):
            while self.updates < UPDATES and self.visit < 10 * UPDATES:
                self.memory.clear()
                self.one_visit()
        if self.updates < UPDATES:
            raise RuntimeError(f"{self.visit} visits made {self.updates} updates of 'student'")
        found, squares = self.found, Counter[str]()
        for name, param in self.parameters().items():
            squares[name.split("/")[0]] += float((param.detach() - start[name]).square().sum())  # type: ignore[assignment]
        found.moved = {group: math.sqrt(square) for group, square in squares.items()}
        if self.counters["tokens_seen"] != sum(found.tokens):
            found.disagree.append(f"tokens seen: {self.counters['tokens_seen']:.0f} by the harness")
        numbers = range(1, UPDATES + 1)
        lines = {int(line["step"]): line for line in self.lines}
        for table, by_update in ((found.logged, lines), (found.own, self._own)):
            names = dict.fromkeys(name for line in by_update.values() for name in line if name != "step")
            table.update({name: [by_update.get(i, {}).get(name) for i in numbers] for name in names})
        found.tokens, found.ends = found.tokens[:UPDATES], found.ends[:UPDATES]
        return found


def fingerprint(method: str, *, ulp: bool = False) -> Fingerprint:
    """Make a method's first updates; with `ulp`, from weights that differ in their last place.

    Raises: UserError when the gate has no models or rows for the method; whatever the method raises.
    """
    cls = registry.load_distiller(method)
    name, roles = registry.stem(method), stages.needed_roles(cls)
    task = TinyInstruct(TinyInstruct.Settings(**ROWS))
    sets = _instructions(task) if cls.head in INSTRUCTION.heads else {}
    if cls.head in (*FEW_SHOT.heads, *TRANSFER.heads):
        sets = HEADS[cls.head].sets(roles, False)
    if not sets or not set(cls.needs) <= set(sets["train"]):
        raise UserError(
            f"the gate has no models and rows for a {cls.head} method that needs {', '.join(cls.needs)}"
        )
    given, settings, made = Given(sets), SETTINGS.get(name, {}), dict[str, nn.Module]()

    def role(name: str) -> nn.Module:
        if name not in made:
            beside = cls.head in TRANSFER.heads and name != "student"
            made[name] = _beside(cls, name, role("student"), settings, ulp) if beside else alone(name)
            given.models[name] = copy.deepcopy(made[name])
        return made[name]

    def alone(name: str) -> nn.Module:
        if cls.head in INSTRUCTION.heads:
            model = _model(name, task)
        else:
            model = _drawn(HEADS[cls.head].model(name, 0, False).double(), name).eval()
        if ulp:
            _one_ulp(model)
        return model

    def seen(parts: Mapping[str, Batch], at: _Watched) -> Any:
        if cls.head in TRANSFER.heads:
            return SeenPrompted(distiller, parts, given, at.index, at.total)
        if cls.head in FEW_SHOT.heads:
            return SeenTexts(distiller, parts, given)
        return Seen(distiller, parts, at.index, at.total, at.memory)

    with torch.random.fork_rng(devices=[]):
        distiller = stages.build(cls, settings, role, 1, method).double()
        return _Watched(distiller, sets, FORMULAS.get(name, {}), seen).go()


def _beside(
    cls: type[Distiller], role: str, student: nn.Module, settings: Mapping[str, Any], ulp: bool
) -> nn.Module:
    """A role that stands on the student's encoder: a prompt and a head or, where the method takes a list,
    several.
    """
    beside, cfg = HEADS[cls.head].beside, check_settings(cls.Config, settings, role)
    assert beside is not None

    def one(name: str, seed: int) -> nn.Module:
        model: Any = beside(student, seed, cfg).double()  # what it says of its texts follows from the seed
        for kind in ("prompt", "head"):
            part = _drawn(getattr(model, kind), f"{name}.{kind}")
            if ulp:
                _one_ulp(part)
        return model.eval()  # type: ignore[no-any-return]

    first = 100 * stages.needed_roles(cls).index(role)
    if "ModuleList" not in str(inspect.signature(cls.__init__).parameters[role].annotation):
        return one(role, first)
    return nn.ModuleList([one(f"{role}.{i}", first + i) for i in range(SEVERAL)])


def _instructions(task: TinyInstruct) -> dict[str, Batch]:
    """Rows of the splits, text without prompts, and prompts without an answer that is used."""
    encoders = {"student": task.encoder(task.tokenizer())}
    rows = {split: task.collate(task.rows(split), encoders) for split in ("train", "dev")}
    dev = rows["dev"]
    text = dev.replace(prompt_length=torch.ones_like(dev["length"]), length=dev["length"].clamp(max=24))
    return {**rows, "lm": text, "unlabeled": dev}


def training_rows(own: Family = INSTRUCTION) -> dict[str, Any]:
    """Counts and content hash of the rows that fingerprints train on."""
    if own is not INSTRUCTION:
        found = {
            head: {
                name: {field: value.tolist() for field, value in rows.items()}
                for name, rows in HEADS[head].sets(("student", "teacher", "pretrained"), False).items()
            }
            for head in own.heads
        }
        return {"sha256": hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]}
    task = TinyInstruct(TinyInstruct.Settings(**ROWS))
    rows = _rows(task.collate(task.rows("train"), {"student": task.encoder(task.tokenizer())}))
    eos = task.tokenizer().eos_token_id
    return {
        "rows": len(rows),
        "tokens": sum(len(row.targets) for row in rows),
        "ends": sum(row.ids[t] == eos for row in rows for t in row.targets),
        "sha256": hashlib.sha256(json.dumps([(row.ids, row.prompt) for row in rows]).encode()).hexdigest()[
            :16
        ],
    }


# ---------------------------------------------------------------------------------------------------- scores
def scores(method: str, seed: int, places: Places) -> dict[str, float | None]:
    """Run a method on its family's board and return the family's scores, means over its row's axis values;
    None where one is not defined.

    Raises: UserError for a method that the board cannot run; RuntimeError when a run is not `done`, or one
    that it needs.
    """
    own = family(method)
    board = load_board(str(_board_path(own)))
    planner = commands.Planner(board, "gate", [], [method], "cpu", places)
    plans = [planner.plan(method, seed, axes) for axes in board.row_axis_values(method, "gate")]
    done = {plan.id: _done(plan) for plan in commands.with_needs(plans)}
    found: dict[str, float | None] = {}
    for name in own.scores:
        scored = [done[plan.id].scores.get(name) for plan in plans]
        values = [one.value for one in scored if one is not None and one.value is not None]
        found[name] = float(np.mean(values)) if len(values) == len(plans) else None
    return found


def _done(plan: Plan) -> RunRecord:
    """The record of a run, which is made where there is none. Raises: RuntimeError when it is not `done`."""
    record = plan.execute()
    if record.status != "done":
        raise RuntimeError(f"the run {commands.label_of(plan.run)} ended as {record.status}: {record.reason}")
    return record


# ------------------------------------------------------------------------------------------------- judgement
def _reference_path(family: Family) -> Path:
    return configs_dir() / "gate" / family.reference


def _board_path(family: Family) -> Path:
    return configs_dir() / "gate" / family.board


class _Judge:
    """Turns measurements into numbers with an outcome, against a stored reference."""

    def __init__(self, reference: Mapping[str, Any], report: Report) -> None:
        self.reference, self.report = reference, report
        learned, here = reference.get("versions", {}), library_versions()
        self.versions = ""
        if learned != here:
            told = [" ".join(f"{k} {v}" for k, v in versions.items()) for versions in (learned, here)]
            self.versions = f"the reference is of {told[0]}, here is {told[1]}"

    def say(self, name: str, good: bool, reason: str) -> None:
        """A number that needs no stored one."""
        self.report.numbers.append(Number(name, "passed") if good else Number(name, "regressed", reason))

    def stored(self, name: str, good: bool, reason: str) -> None:
        """A number compared with a stored one, which binds under the versions it was learned with."""
        if good or not self.versions:
            self.say(name, good, reason)
        else:
            self.missing(name, f"{reason}; {self.versions}", excused=True)

    def missing(self, name: str, reason: str, excused: bool = False) -> None:
        """A number that could not be measured."""
        self.report.numbers.append(Number(name, "not measured", reason, excused))

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """What the gate cannot run is not measured; a method that raises has regressed."""
        try:
            yield
        except UserError as error:
            self.missing(name, str(error))
        except Exception as error:
            self.say(name, False, " ".join(f"raised {type(error).__name__}: {error}".split()))

    def rows(self, owner: str, found: Mapping[str, Any]) -> None:
        """The training rows: each response has an end, and they are those of the reference."""
        if "ends" in found:
            what = f"{found['rows']} responses have {found['ends']} ends of sequence"
            self.say(f"{owner}/complete", found["ends"] == found["rows"], what)
        for name, value in self.reference.get("rows", {}).items():
            self.stored(f"{owner}/{name}", found[name] == value, f"{found[name]} instead of {value}")

    def updates(self, method: str, found: Fingerprint) -> None:
        """A method's first updates: what holds by itself, then what is stored."""
        known = self.reference.get("methods", {}).get(method)
        tolerances = (known or {}).get("recomputed", {})
        for term, own in found.own.items():
            name, logged = f"{method}/recomputed/{term}", found.logged.get(term)
            if logged is None:
                self.say(name, False, "the method does not log it")
                continue
            allowed = min(CEILING, tolerances.get(term, {"tolerance": CEILING})["tolerance"])
            self.say(name, *_compare(logged, own, allowed, "recomputed"))
        if method in COEFFICIENTS:
            self._coefficient(method, found)
        for group, norm in found.moved.items():
            self.say(f"{method}/moves/{group}", norm > 0, f"no weight moved in {UPDATES} updates")
        for role, apart in found.repeats.items():
            what = f"two forwards of the {role} in the same mode differ by up to {apart:.3g}"
            self.say(f"{method}/repeats/{role}", apart == 0, what)
        self.say(f"{method}/counts", not found.disagree, "; ".join(found.disagree[:3]) + " do not agree")
        if known is None:
            self.missing(f"{method}/reference", "no stored updates: run `kdbench gate --learn`")
            return
        for term in {**known["trajectory"], **found.logged}:
            self._trajectory(
                f"{method}/trajectory/{term}", known["trajectory"].get(term), found.logged.get(term)
            )
        for group in {**known["movement"], **found.moved}:
            stored = known["movement"].get(group, {"value": None, "tolerance": 0})
            good, reason = _compare(
                [found.moved.get(group)], [stored["value"]], stored["tolerance"], "stored"
            )
            self.stored(f"{method}/movement/{group}", good, reason)
        for name, counted in (("tokens", found.tokens), ("ends", found.ends)):
            good = counted == known[name]
            self.stored(f"{method}/{name}", good, f"{sum(counted)} counted in all, {sum(known[name])} stored")

    def _trajectory(self, name: str, stored: Any, logged: list[float | None] | None) -> None:
        if stored is None:
            self.missing(name, "a new term: run `kdbench gate --learn`")
        elif logged is None:
            self.stored(name, False, "is logged no more")
        else:
            self.stored(name, *_compare(logged, stored["values"], stored["tolerance"], "stored"))

    def _coefficient(self, method: str, found: Fingerprint) -> None:
        name = f"{method}/coefficient"
        nothing: list[float | None] = [None] * UPDATES
        whole, first, second = (found.logged.get(term, nothing) for term in COEFFICIENTS[method])
        got = [
            None if w is None or a is None or not b else (w - a) / b
            for w, a, b in zip(whole, first, second, strict=True)
        ]
        due: list[float | None] = [1 - i / TRAINING["optimizer_steps"] for i in range(1, UPDATES + 1)]
        self.say(name, *_compare(got, due, CEILING, "due"))

    def scores(self, method: str, found: Mapping[str, float | None]) -> None:
        """A method's scores against their bands."""
        bands = self.reference.get("methods", {}).get(method, {}).get("scores", {})
        for score, value in found.items():
            name, band = f"{method}/score/{score}", bands.get(score)
            if band is None:
                self.missing(name, "no band: run `kdbench gate --learn`")
            elif value is None:
                self.missing(name, "the run has no such score, or it is not defined", bool(self.versions))
            else:
                low, high = band["low"], band["high"]
                good = low <= value <= high
                past = f"{value:.4g} is {max(low - value, value - high):.3g} outside {low:.4g} .. {high:.4g}"
                self.stored(name, good, f"{past} ({len(band['seeds'])} seeds)")


def _compare(
    got: Sequence[float | None], want: Sequence[float | None], tolerance: float, what: str
) -> tuple[bool, str]:
    """(all agree, where and by how much they first do not), relative to the largest entry of `want`."""
    scale = max([abs(value) for value in want if value is not None], default=0.0) or 1.0
    for number, (a, b) in enumerate(zip(got, want, strict=True), 1):
        if a is None and b is None:
            continue
        if a is None or b is None or not abs(a - b) <= tolerance * scale:
            mine = "nothing" if a is None else f"{a:.8g}"
            theirs = "nothing" if b is None else f"{b:.8g}"
            return False, f"{mine}, {what} {theirs}, from update {number} on (tolerance {tolerance:.0e})"
    return True, ""


def _apart(a: Sequence[float | None], b: Sequence[float | None]) -> float:
    """The largest difference relative to the largest entry of `b`; infinite where one has no value."""
    scale = max([abs(value) for value in b if value is not None], default=0.0) or 1.0
    differences = [
        0.0 if x is None and y is None else math.inf if x is None or y is None else abs(x - y) / scale
        for x, y in zip(a, b, strict=True)
    ]
    return max(differences)


# ------------------------------------------------------------------------------------------------------- run
def run(
    methods: Sequence[str] | None = None,
    *,
    updates: bool = True,
    score: bool = True,
    reference: Path | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> Report:
    """Check the methods (None: all that are registered) against the stored reference, in this process.

    Args: `updates` and `score` leave out one of the two measurements; `reference` is another file; `folder`
    keeps the scores' `runs` and `cache`, and what is there already is not run again (None: nothing is kept).
    Raises: UserError for an unknown method or a reference that cannot be read.
    """
    start, report = time.monotonic(), Report()
    chosen = _chosen(methods)
    left = [method for method in chosen if method not in EXEMPT]
    bar = tqdm(total=len(left) * (updates + score), desc="gate", disable=None if progress else True)
    with _one_thread(), tempfile.TemporaryDirectory() as passing, bar:
        kept = folder or Path(passing)
        places = Places(kept / "runs", kept / "cache")
        for own, members in _by_family(chosen):
            judge = _Judge(_load(reference or _reference_path(own), own, report), report)
            if updates:
                judge.rows(own.name, training_rows(own))
            for method in members:
                if method in EXEMPT:
                    judge.missing(f"{method}/all", EXEMPT[method], excused=True)
                    continue
                if updates:
                    with judge.guarded(f"{method}/updates"):
                        judge.updates(method, fingerprint(method))
                    bar.update()
                if score and method in UNSCORED:
                    judge.missing(f"{method}/score", UNSCORED[method], excused=True)
                elif score:
                    with judge.guarded(f"{method}/run"):
                        judge.scores(method, scores(method, SEEDS[0], places))
                bar.update(int(score))
    without = [method for method in left if method not in FORMULAS]
    if updates and without:
        report.notes.append(f"no term is recomputed of {', '.join(without)}: no entry in FORMULAS")
    report.seconds = time.monotonic() - start
    return report


def _chosen(methods: Sequence[str] | None) -> list[str]:
    """The methods asked for, all registered ones for None. Raises: UserError for an unknown one."""
    chosen = list(registry.names("distillers") if methods is None else methods)
    for method in chosen:
        registry.find("distillers", method)
    return chosen


def _by_family(methods: Sequence[str]) -> Iterator[tuple[Family, list[str]]]:
    """Each family that some of the methods are of, with these."""
    owners = {method: family(method) for method in methods}
    for one in FAMILIES:
        if members := [method for method in methods if owners[method] is one]:
            yield one, members


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    return data


def _load(path: Path, family: Family, report: Report) -> dict[str, Any]:
    """The stored reference, empty (and the report says so) where there is none that fits."""
    if not path.is_file():
        report.numbers.append(
            Number("reference", "not measured", f"{path} does not exist: run `kdbench gate --learn`")
        )
        return {}
    data = _read(path)
    if data.get("settings") != family.settings():
        why = f"{path.name} was learned with other settings of the gate: run `kdbench gate --learn`"
        report.numbers.append(Number("reference", "not measured", why))
        return {}
    return data


@contextmanager
def _one_thread(threads: int = 1) -> Iterator[None]:
    """Run with so many torch threads and without the progress bars of transformers."""
    before, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if bars:
            logging.enable_progress_bar()


# ----------------------------------------------------------------------------------------------------- learn
def learn(
    methods: Sequence[str] | None = None,
    *,
    score: bool = True,
    reference: Path | None = None,
    progress: bool = False,
) -> Report:
    """Measure the methods (None: all) as they are and store that, unless something is wrong in itself.

    What is stored of other methods is kept if it was learned with the same settings, versions and rows.
    Returns the gate's own report on what was learned: nothing is stored unless it has passed.
    Raises: UserError for an unknown method or a reference that cannot be read.
    """
    start, report = time.monotonic(), Report()
    chosen = [method for method in _chosen(methods) if method not in EXEMPT]
    with tempfile.TemporaryDirectory() as folder, _pool() as pool:
        for own, members in _by_family(chosen):
            runs = _Runs(pool, folder, score, progress)
            part = _learn(own, members, runs, reference or _reference_path(own))
            report.numbers += part.numbers
            report.notes += part.notes
    report.seconds = time.monotonic() - start
    return report


@dataclass(frozen=True)
class _Runs:
    """Where and how the measurements of `learn` are made."""

    pool: ProcessPoolExecutor
    folder: str
    score: bool
    progress: bool


def _learn(own: Family, methods: Sequence[str], runs: _Runs, path: Path) -> Report:
    """`learn` for methods of one family."""
    report, learned, rows = Report(), dict[str, Any](), training_rows(own)
    told = {"settings": own.settings(), "versions": library_versions(), "rows": rows}
    known = dict[str, Any]()
    if path.is_file() and all(_read(path).get(name) == value for name, value in told.items()):
        known = _read(path)["methods"]
    judge = _Judge({**told, "methods": learned}, report)
    judge.rows(own.name, rows)
    variants, submit = ((1, False), (2, False), (1, True)), runs.pool.submit
    prints = {m: [submit(_fingerprint_in, m, *variant) for variant in variants] for m in methods}
    scored = [m for m in methods if runs.score and m not in UNSCORED]
    given = {m: [submit(_scores_in, runs.folder, m, seed) for seed in SEEDS] for m in scored}
    among = sum(family(method) is own and method not in UNSCORED for method in _chosen(None))
    for method in tqdm(methods, desc="learn", disable=None if runs.progress else True):
        with judge.guarded(f"{method}/learn"):
            found = [one.result() for one in prints[method]]
            values = [one.result() for one in given.get(method, ())]
            learned[method] = _of_updates(found)
            judge.updates(method, found[0])
            if values:
                learned[method]["scores"] = _bands(values, own.scores, among)
                judge.scores(method, values[0])
    if report.passed:
        _write(path, {**told, "methods": {**known, **learned}})
    report.notes.append(f"{path.name}: {'stored' if report.passed else 'left as it was'}")
    return report


@contextmanager
def _pool() -> Iterator[ProcessPoolExecutor]:
    """Two processes whose idle threads sleep: those of a busy machine would wait for each other in loops."""
    told = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(2, os.cpu_count() or 1), context, logging.disable_progress_bar) as pool:
            yield pool
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _fingerprint_in(method: str, threads: int, ulp: bool) -> Fingerprint:
    """`fingerprint` in a process of the pool."""
    torch.set_num_threads(threads)
    return fingerprint(method, ulp=ulp)


def _scores_in(folder: str, method: str, seed: int) -> dict[str, float | None]:
    """`scores` in a process of the pool, with the stages in a folder that the processes share."""
    torch.set_num_threads(1)
    return scores(method, seed, Places(Path(folder) / "runs", Path(folder) / "cache"))


def _write(path: Path, learned: Mapping[str, Any]) -> None:
    """Write JSON with every list of numbers on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(learned, indent=1, allow_nan=False)
    text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    with atomic(path) as file:
        file.write(text.encode() + b"\n")


def _of_updates(runs: Sequence[Fingerprint]) -> dict[str, Any]:
    """The stored form of a method's updates: the first run's numbers, tolerances from all runs."""
    first, others = runs[0], runs[1:]

    def tolerance(*seen: float) -> dict[str, float]:
        return {
            "seen": float(f"{max(seen):.2g}"),
            "tolerance": float(f"{max(FLOOR, FACTOR * max(seen)):.2g}"),
        }

    trajectory = {}
    for term, values in first.logged.items():
        stored = [None if value is None else float(f"{value:.13g}") for value in values]
        apart = [_apart(one.logged.get(term, [None] * UPDATES), values) for one in others]
        trajectory[term] = {"values": stored, **tolerance(*apart)}
    movement = {}
    for group, norm in first.moved.items():
        movement[group] = {
            "value": norm,
            **tolerance(*(_apart([one.moved[group]], [norm]) for one in others)),
        }
    recomputed = {
        term: tolerance(*(_apart(one.logged.get(term, [None] * UPDATES), one.own[term]) for one in runs))
        for term in first.own
    }
    return {
        "recomputed": recomputed,
        "trajectory": trajectory,
        "movement": movement,
        "tokens": first.tokens,
        "ends": first.ends,
    }


def _bands(runs: Sequence[Mapping[str, float | None]], names: Sequence[str], methods: int) -> dict[str, Any]:
    """Per score its values by seed and the interval for one more seed; none where a seed has no value.

    `methods` is how many the share of false alarms is divided among.
    """
    bands = {}
    for name in names:
        given = [run[name] for run in runs]
        values = np.array([value for value in given if value is not None])
        if len(values) < len(given):
            continue
        n = len(values)
        quantile = float(stats.t.ppf(1 - FALSE_ALARM / (2 * methods * len(names)), n - 1))
        middle, half = float(values.mean()), quantile * float(values.std(ddof=1)) * math.sqrt(1 + 1 / n)
        bands[name] = {"seeds": values.tolist(), "low": middle - half, "high": middle + half}
    return bands
