"""Makes interventions: responses that the other model finishes, and responses with replaced tokens.

Source: see `kdbench.counterfactuals`, which says what is stored and computes the curves.

One draw per prompt, with the same uniform number per example and position as the first draw of the evidence:
a response that nobody intervened in is that of the evidence, and a twin parts from it only where its
distribution does. No token is ever replaced by itself, by an end token or by another special token. Kinds of
replacement, each renormalised over the rest:

    random             uniform over the vocabulary
    teacher_unlikely   from the teacher's distribution outside its nucleus of `nucleus` (the fewest likeliest
                       tokens that hold this mass)
    student            from the student's distribution

Both distributions are given the *clean* prefix, so that a token has one replacement of each kind, at all
rates and places; where such a set is empty or has no mass, the replacement is uniform over what is left.
The tokens replaced at a rate are among those replaced at every higher rate.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kdbench import registry
from kdbench.collect import SEED, Plan, manifest_of, measure, sample
from kdbench.counterfactuals import (
    COLUMNS,
    NAMES,
    InterventionConfig,
    describe,
    read_intervention,
    write_intervention,
)
from kdbench.distiller import Batch, target_mask
from kdbench.errors import UserError
from kdbench.predict import predict
from kdbench.record import RecordError, load_arrays, save_arrays
from kdbench.rollout import Draw, end_tokens, evaluating, inverse_cdf, rollout
from kdbench.streams import stream_seed, uniform
from kdbench.task import InstructionTask, Task

Columns = dict[str, np.ndarray[Any, Any]]
Score = Callable[[int, list[int]], float]


def collect_interventions(
    student: nn.Module,
    teacher: nn.Module,
    plan: Plan,
    folder: Path,
    models: Mapping[str, str],
    config: InterventionConfig | None = None,
    names: Sequence[str] = NAMES,
    progress: bool = False,
    *,
    score: Score | None = None,
    special: Collection[int] = (),
    run: str = "",
) -> list[Path]:
    """Make `<folder>/<name>.parquet` of each named intervention; what is there for the same inputs is kept.

    An interrupted call goes on after the last condition that it finished.

    Args: `plan` gives prompts, decoding, max_new_tokens and batch size; `models` content identities by role;
    `score(example_id, response ids)` scores hand-overs, in its own unit; `special` holds the ids that never
    replace a token, beside the models' end tokens. `scoring` makes both for a task. `run`: the id of the run
    that the student belongs to.
    Returns the files, in the order of `names`.
    Raises: UserError for an unknown name and for a hand-over without `score`, ValueError for a vocabulary
    without two ordinary tokens.
    """
    config = config or InterventionConfig()
    if "hand_over" in names and score is None:
        raise UserError("hand_over: it compares responses with references, which this task does not have")
    few = replace(plan, gold=plan.gold.rows(slice(0, config.prompts)), samples=1)
    excluded = sorted({*special, *end_tokens(student), *end_tokens(teacher)})
    lab = _Lab(student, teacher, few, config, excluded)
    paths = [folder / f"{name}.parquet" for name in names]
    for name, path in zip(names, paths, strict=True):
        parts = path.with_suffix(".parts")
        told = describe(name, config, manifest_of(few, models, run=run), excluded)
        if _complete(path, told):
            continue
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        found: dict[str, Columns] = {}
        bar = tqdm(told["conditions"].items(), desc=f"intervention {name}", disable=not progress, leave=False)
        with evaluating(student, teacher):
            for condition, setting in bar:
                part = parts / f"{key}-{condition}.npz"
                try:
                    found[condition] = load_arrays(part)
                except RecordError:
                    responses = getattr(lab, name)(**setting)
                    found[condition] = lab.measured(responses, score if name == "hand_over" else None)
                    save_arrays(part, found[condition])
        write_intervention(path, told, found)
        shutil.rmtree(parts, ignore_errors=True)
    return paths


def scoring(task: Task, tokenizer: PreTrainedTokenizerBase, split: str) -> dict[str, Any]:
    """What `collect_interventions` needs of a task: `special`, and where it has references `score`, which is
    ROUGE-L x 100, the best over the references.
    """
    found: dict[str, Any] = {"special": tokenizer.all_special_ids}
    if isinstance(task, InstructionTask):
        rouge_l, encoder = registry.load_analysis("instruction_following").score_rows, task.encoder(tokenizer)
        known = {row["example_id"]: task.references(row) for row in task.rows(split)}
        found["score"] = lambda example, ids: rouge_l(
            [{"response": encoder.decode(ids), "references": known[example]}]
        )
    return found


def _complete(path: Path, told: dict[str, Any]) -> bool:
    try:
        return read_intervention(path).description == told
    except RecordError:
        return False


class _Lab:
    """Two models, their own responses to the plan's prompts, and what can be done to these."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        plan: Plan,
        config: InterventionConfig,
        special: list[int],
    ) -> None:
        self.models = {"student": student, "teacher": teacher}
        self.plan, self.config, self.special = plan, config, special
        self.own = cache(lambda role: sample(self.models[role], plan)[0])
        self.replacements = cache(self._replacements)

    def hand_over(self, first: str, tokens: int) -> Batch:
        """`first` writes `tokens` tokens, the other model finishes."""
        other = "teacher" if first == "student" else "student"
        return self.go_on(other, self.own(first), tokens)

    def corruption(self, kind: str = "", rate: float | None = None, place: float = 0.0) -> Batch:
        """The teacher's responses with tokens replaced at a rate, or at one place, a share of the length (the
        end token does not count).
        """
        batch = self.own("teacher")
        if not kind:
            return batch
        position, within = _positions(batch)
        if rate is None:
            chosen = position == (within * place).floor()
        else:
            chosen = _uniform("replaced", batch["example_id"][:, None], position) < rate
        return self.replaced(batch, "teacher", kind, chosen & (position >= 0) & (position < within))

    def recovery(self, kind: str = "", place: int = 0) -> Batch:
        """The student's responses, or those that go on behind token `place` with this token replaced."""
        batch = self.own("student")
        if not kind:
            return batch
        position, within = _positions(batch)
        changed = self.replaced(batch, "student", kind, position == place)
        return self.go_on("student", changed.rows((within[:, 0] > place).nonzero()[:, 0]), place + 1)

    def go_on(self, role: str, batch: Batch, tokens: int) -> Batch:
        """Cut each response to `tokens` tokens and let a model finish it, unless it had ended by then."""
        start, length = batch["prompt_length"], batch["length"]
        cut = torch.clamp(length - start, max=tokens)
        done = batch["finished"] & (length - start == cut)
        ended, still = (batch.rows(rows.nonzero()[:, 0]) for rows in (done, ~done))
        prompts = still.replace(prompt_length=(start + cut)[~done], response_offset=cut[~done])
        decoding = {key: value for key, value in self.plan.decoding.items() if key != "max_new_tokens"}
        draw = Draw(stream_seed(SEED, "evidence"), 0, self.plan.batch_size)
        new = rollout(self.models[role], prompts, draw, self.plan.max_new_tokens, **decoding)
        return Batch.cat([ended, new.replace(prompt_length=start[~done]).to("cpu")])

    def replaced(self, batch: Batch, role: str, kind: str, chosen: Tensor) -> Batch:
        """`batch`, the role's own responses, with the tokens at `chosen` [B, T] replaced."""
        return batch.replace(input_ids=batch["input_ids"].where(~chosen, self.replacements(role, kind)))

    def _replacements(self, role: str, kind: str) -> Tensor:
        """What each token of a role's own responses is replaced by, [B, T]."""
        batch = self.own(role)
        out = torch.zeros_like(batch["input_ids"])
        for rows in torch.argsort(batch["length"], stable=True).split(self.plan.batch_size):
            out[rows] = self._drawn(batch.rows(rows), kind)
        return out

    def _drawn(self, batch: Batch, kind: str) -> Tensor:
        model = self.models["student" if kind == "student" else "teacher"]
        device = next(model.parameters()).device
        given, mask = predict(model, batch.to(device)), target_mask(batch)
        row, at = mask.nonzero(as_tuple=True)
        u = _uniform("replacement", batch["example_id"][row], at + 1 - batch["prompt_length"][row]).to(device)
        if given.vocab - len(self.special) < 2:
            raise ValueError(
                f"interventions: a vocabulary of {given.vocab} has nothing to replace a token by"
            )
        tokens = [u.new_zeros(0, dtype=torch.long)]
        size = max(1, 2**21 // given.vocab)
        for start in range(0, len(given), size):
            part = slice(start, min(start + size, len(given)))
            logits = given.logits(part.start, part.stop).double()
            allowed = torch.ones_like(logits, dtype=torch.bool)
            allowed[:, [i for i in self.special if i < given.vocab]] = False
            allowed.scatter_(1, given.targets[part, None], False)
            if kind == "random":
                logits = torch.zeros_like(logits)
            elif kind == "teacher_unlikely":
                outside = allowed & ~_nucleus(logits, self.config.nucleus)
                allowed = torch.where(outside.any(-1, keepdim=True), outside, allowed)
            logits = logits.masked_fill(~allowed, -math.inf)
            no_mass = (logits == -math.inf).all(-1, keepdim=True)
            tokens.append(inverse_cdf(torch.where(no_mass, allowed.double(), logits.softmax(-1)), u[part]))
        out = torch.zeros_like(batch["input_ids"])
        out[row, at + 1] = torch.cat(tokens).cpu()
        return out

    def measured(self, batch: Batch, score: Score | None) -> Columns:
        """The columns of these responses, in order of example and position."""
        if not batch.size:
            return {name: np.zeros(0, dtype=kind) for name, kind in COLUMNS.items()}
        found = measure(self.models["student"], self.models["teacher"], batch, self.plan.batch_size, False)
        order = np.lexsort((found["position"], found["example_id"]))
        order = order[found["alive"][order]]
        out = {name: found[name][order].astype(kind) for name, kind in COLUMNS.items() if name != "score"}
        out["score"] = np.full(len(order), np.nan, dtype=np.float32)
        if score is not None:
            first = np.flatnonzero(out["position"] == 0)
            responses = zip(out["example_id"][first], np.split(out["token"], first[1:]), strict=True)
            scores = np.array([score(int(example), tokens.tolist()) for example, tokens in responses])
            out["score"] = scores.astype(np.float32)[np.cumsum(out["position"] == 0) - 1]
        return out


def _positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """(response position of each column [B, T]; response tokens without the end token [B, 1])."""
    position = torch.arange(batch["input_ids"].shape[1]) - batch["prompt_length"][:, None]
    return position, (batch["length"] - batch["prompt_length"] - batch["finished"].long())[:, None]


def _uniform(name: str, example_id: Tensor, position: Any) -> Tensor:
    """One number per entry of `position`, from a stream of its own."""
    return uniform(stream_seed(SEED, f"interventions/{name}"), example_id, 0, position)


def _nucleus(logits: Tensor, mass: float) -> Tensor:
    """The fewest likeliest tokens that hold `mass` of the probability, [N, V] bool."""
    ordered, index = logits.softmax(-1).sort(descending=True, stable=True)
    return torch.zeros_like(ordered, dtype=torch.bool).scatter(-1, index, ordered.cumsum(-1) - ordered < mass)
