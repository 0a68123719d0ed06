"""Makes evidence: responses rolled in by student, teacher and reference, measured token by token by both
models.

Source: the measured quantities are described in `kdbench.evidence`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdbench.config import EvidenceConfig
from kdbench.distiller import Batch, target_mask
from kdbench.evidence import Manifest, prompts_hash, write_evidence
from kdbench.losses import entropy, forward_kl, generalized_jsd, reverse_kl, total_variation
from kdbench.predict import predict
from kdbench.rollout import Draw, evaluating, rollout
from kdbench.streams import stream_seed

SEED = 0  # the same draws for every method, seed and snapshot, so that comparisons are paired
PROFILES: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "no_repeat_ngram": 0},
    "minillm": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "no_repeat_ngram": 6},
}


@dataclass(frozen=True)
class Plan:
    """What to roll in: `gold` holds the prompts with their reference responses."""

    gold: Batch
    samples: int
    max_new_tokens: int
    profile: str
    batch_size: int

    @property
    def decoding(self) -> dict[str, Any]:
        """The decoding settings as the manifest states them."""
        return {"max_new_tokens": self.max_new_tokens, **PROFILES[self.profile]}

    def prompts(self) -> list[tuple[int, list[int]]]:
        """(example_id, prompt ids) of each prompt."""
        ids, length = self.gold["input_ids"], self.gold["prompt_length"]
        rows = range(self.gold.size)
        return [(int(self.gold["example_id"][row]), ids[row, : int(length[row])].tolist()) for row in rows]


def plan(gold: Batch, config: EvidenceConfig, snapshot: bool = False) -> Plan:
    """Return the plan of the final evidence or, lighter, of a snapshot's."""
    if not snapshot:
        return Plan(gold, config.samples, config.max_new_tokens, config.profile, config.batch_size)
    few = gold.rows(slice(0, config.snapshot_prompts))
    return Plan(few, 1, min(config.snapshot_tokens, config.max_new_tokens), config.profile, config.batch_size)


def sample(model: nn.Module, plan: Plan) -> list[Batch]:
    """Return one batch of responses per draw."""
    decoding = {key: value for key, value in plan.decoding.items() if key != "max_new_tokens"}
    draws = [Draw(stream_seed(SEED, "evidence"), draw, plan.batch_size) for draw in range(plan.samples)]
    return [rollout(model, plan.gold, draw, plan.max_new_tokens, **decoding).to("cpu") for draw in draws]


def reference(plan: Plan) -> list[Batch]:
    """Return the reference responses, cut like a sample."""
    gold = plan.gold
    length = torch.minimum(gold["length"], gold["prompt_length"] + plan.max_new_tokens)
    finished = (length == gold["length"]) & gold["finished"]
    return [gold.replace(length=length, finished=finished).to("cpu")]


def collect(
    student: nn.Module,
    teacher: nn.Module,
    plan: Plan,
    rolled: Mapping[str, Callable[[], list[Batch]]],
    path: Path,
    models: Mapping[str, str],
    *,
    step: int | None = None,
    progress: bool = False,
) -> None:
    """Measure every roll-in and write the evidence file.

    Args: `rolled` gives the responses by roll-in name; `models` the content identity by role.
    """
    columns: dict[str, list[np.ndarray[Any, Any]]] = {}
    with evaluating(student, teacher):
        for name, responses in rolled.items():
            for draw, batch in enumerate(responses()):
                order = torch.argsort(batch["length"], stable=True).split(plan.batch_size)
                for rows in tqdm(order, desc=f"evidence {name}", disable=not progress, leave=False):
                    part = _measure(student, teacher, batch.rows(rows))
                    part["draw"] = np.full(len(part["token"]), draw, dtype=np.int32)
                    part["roll_in"] = np.full(len(part["token"]), name)
                    for column, values in part.items():
                        columns.setdefault(column, []).append(values)
    manifest = Manifest(
        profile=plan.profile,
        prompts_sha256=prompts_hash(plan.prompts()),
        decoding=plan.decoding,
        models=dict(models),
        dtype="float32",
        seed=SEED,
        step=step,
    )
    write_evidence(path, {name: np.concatenate(parts) for name, parts in columns.items()}, manifest)


def _measure(student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, np.ndarray[Any, Any]]:
    """Return the columns of these responses; an unfinished one has a row more, after its last token."""
    device = next(student.parameters()).device
    open_ended = ~batch["finished"]
    longer = batch.replace(
        input_ids=torch.nn.functional.pad(batch["input_ids"], (0, 1)), length=batch["length"] + open_ended
    ).to(device)
    q, p = predict(student, longer), predict(teacher, longer)
    mask = target_mask(longer)
    row, at = mask.nonzero(as_tuple=True)
    position = at + 1 - longer["prompt_length"][row]
    alive = at + 1 < batch["length"].to(device)[row]
    measured: dict[str, list[Tensor]] = {}
    size = max(1, 2**22 // q.vocab)
    for start in range(0, len(q), size):
        stop = min(start + size, len(q))
        lq, lp = q.logits(start, stop), p.logits(start, stop)
        for name, values in _columns(lq, lp, q.targets[start:stop]).items():
            measured.setdefault(name, []).append(values)
    out = {name: torch.cat(parts).cpu().numpy() for name, parts in measured.items()}
    real = alive.cpu().numpy()
    for name in ("student_log_prob", "teacher_log_prob"):
        out[name] = np.where(real, out[name], np.nan).astype(np.float32)
    out["teacher_rank"] = np.where(real, out["teacher_rank"], -1).astype(np.int32)
    return {
        **out,
        "example_id": longer["example_id"][row].cpu().numpy(),
        "position": position.cpu().numpy().astype(np.int32),
        "token": np.where(real, q.targets.cpu().numpy(), -1).astype(np.int32),
        "alive": real,
        "context": np.zeros(len(real), dtype=bool),
    }


def _columns(lq: Tensor, lp: Tensor, token: Tensor) -> dict[str, Tensor]:
    """The measurements at the positions of a chunk from both models' logits [n, V]."""
    log_q, log_p = lq.log_softmax(-1), lp.log_softmax(-1)
    chosen_p = log_p.gather(-1, token[:, None])
    return {
        "student_log_prob": log_q.gather(-1, token[:, None])[:, 0],
        "teacher_log_prob": chosen_p[:, 0],
        "forward_kl": forward_kl(lq, lp).clamp(min=0),
        "reverse_kl": reverse_kl(lq, lp).clamp(min=0),
        "jsd": generalized_jsd(lq, lp, 0.5).clamp(min=0),
        "total_variation": total_variation(lq, lp),
        "student_entropy": entropy(lq),
        "teacher_entropy": entropy(lp),
        "top1_agree": lq.argmax(-1) == lp.argmax(-1),
        "teacher_rank": (log_p > chosen_p).sum(-1),
    }
