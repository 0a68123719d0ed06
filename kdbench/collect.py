"""Makes evidence: responses rolled in by student, teacher and reference, measured token by token by both
models.

Source: the measured quantities are described in `kdbench.evidence`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from kdbench.config import EvidenceConfig
from kdbench.distiller import Batch, target_mask
from kdbench.errors import unknown
from kdbench.evidence import Manifest, prompts_hash, write_evidence
from kdbench.losses import log_probs
from kdbench.predict import Prediction, predict
from kdbench.record import RecordError, load_arrays, read_json, save_arrays, write_json
from kdbench.rollout import Draw, evaluating, rollout
from kdbench.streams import stream_seed

SEED = 0  # the same draws for every method, seed and snapshot, so that comparisons are paired
PROFILES: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "no_repeat_ngram": 0},
    "minillm": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "no_repeat_ngram": 6},
}
_PIECE = 8  # batches that are sampled and measured before they are kept against an interruption
Columns = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Plan:
    """What to roll in: `gold` holds the prompts with their reference responses.

    `context`: measure the prompts' own tokens too (with the first draw of each roll-in).
    """

    gold: Batch
    samples: int
    max_new_tokens: int
    profile: str
    batch_size: int
    context: bool = True

    @property
    def decoding(self) -> dict[str, Any]:
        """The decoding settings as the manifest states them."""
        return {"max_new_tokens": self.max_new_tokens, **PROFILES[self.profile]}

    def prompts(self) -> list[tuple[int, list[int]]]:
        """(example_id, prompt ids) of each prompt."""
        ids, length = self.gold["input_ids"], self.gold["prompt_length"]
        rows = range(self.gold.size)
        return [(int(self.gold["example_id"][row]), ids[row, : int(length[row])].tolist()) for row in rows]

    def pieces(self) -> list[slice]:
        """The prompts in runs of `_PIECE` batches."""
        size = _PIECE * self.batch_size
        return [slice(at, min(at + size, self.gold.size)) for at in range(0, self.gold.size, size)]


@dataclass(frozen=True)
class RollIn:
    """Who wrote the responses: `responses(draw, prompts)` for each of `draws`.

    `said` remembers what the teacher predicts on them, for responses that are measured again and again.
    """

    draws: int
    responses: Callable[[int, slice], Batch]
    said: dict[tuple[int, ...], Prediction] | None = None


def plan(gold: Batch, config: EvidenceConfig, snapshot: bool = False, profile: str | None = None) -> Plan:
    """Return the plan of the final evidence in a decoding profile or, lighter, of a snapshot's.

    Raises: UserError for an unknown profile.
    """
    chosen = profile or config.profile
    if chosen not in PROFILES:
        raise unknown("decoding profile", chosen, PROFILES)
    if not snapshot:
        return Plan(gold, config.samples, config.max_new_tokens, chosen, config.batch_size)
    few = gold.rows(slice(0, config.snapshot_prompts))
    tokens = min(config.snapshot_tokens, config.max_new_tokens)
    return Plan(few, 1, tokens, chosen, config.batch_size, context=False)


def sampled(model: nn.Module, plan: Plan) -> RollIn:
    """Responses that `model` samples when they are asked for."""
    decoding = {key: value for key, value in plan.decoding.items() if key != "max_new_tokens"}

    def responses(draw: int, rows: slice) -> Batch:
        keys = Draw(stream_seed(SEED, "evidence"), draw, plan.batch_size)
        return rollout(model, plan.gold.rows(rows), keys, plan.max_new_tokens, **decoding).to("cpu")

    return RollIn(plan.samples, responses)


def held(draws: Sequence[Batch], said: dict[tuple[int, ...], Prediction] | None = None) -> RollIn:
    """Responses that are there already, one batch of all prompts per draw."""
    return RollIn(len(draws), lambda draw, rows: draws[draw].rows(rows), said)


def sample(model: nn.Module, plan: Plan, progress: str = "") -> list[Batch]:
    """Return one batch of responses per draw; `progress` names a progress bar, if there should be one."""
    made = sampled(model, plan)
    pieces = [(draw, rows) for draw in range(plan.samples) for rows in plan.pieces()]
    found: list[list[Batch]] = [[] for _ in range(plan.samples)]
    for draw, rows in tqdm(pieces, desc=progress, disable=not progress, leave=False):
        found[draw].append(made.responses(draw, rows))
    return [Batch.cat(parts) for parts in found]


def reference(plan: Plan) -> RollIn:
    """The reference responses, cut like a sample."""
    gold = plan.gold
    length = torch.minimum(gold["length"], gold["prompt_length"] + plan.max_new_tokens)
    finished = (length == gold["length"]) & gold["finished"]
    return held([gold.replace(length=length, finished=finished).to("cpu")])


def weights_hash(model: nn.Module) -> str:
    """16 digits of a hash of a model's parameters and buffers, by name and value."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]


def manifest_of(plan: Plan, models: Mapping[str, str], step: int | None = None, run: str = "") -> Manifest:
    """The manifest of evidence that is made by this plan."""
    return Manifest(
        profile=plan.profile,
        prompts_sha256=prompts_hash(plan.prompts()),
        decoding=plan.decoding,
        models=dict(models),
        dtype="float32",
        seed=SEED,
        step=step,
        run=run,
    )


def collect(
    student: nn.Module,
    teacher: nn.Module,
    plan: Plan,
    rolled: Mapping[str, RollIn],
    path: Path,
    manifest: Manifest,
    *,
    progress: bool = False,
) -> None:
    """Measure every roll-in and write the evidence file; go on from the pieces of an interrupted call.

    Args: `rolled` gives the responses by roll-in name; `manifest` is `manifest_of` the plan. A snapshot is
    light and keeps no pieces.
    """
    pieces = _Pieces(pieces_of(path), manifest) if manifest.step is None else None
    parts: list[Columns] = []
    total = sum(one.draws for one in rolled.values()) * plan.gold.size
    with (
        evaluating(student, teacher),
        tqdm(total=total, desc="evidence", unit="response", disable=not progress, leave=False) as bar,
    ):
        for name, one in rolled.items():
            for draw in range(one.draws):
                for rows in plan.pieces():
                    key = f"{name}-{draw}-{rows.start}"
                    part = pieces.load(key) if pieces else None
                    if part is None:
                        responses = one.responses(draw, rows)
                        size, context = max(1, plan.batch_size // 4), plan.context and not draw
                        remembered = _Remembered(one.said, (draw, rows.start))
                        part = measure(student, teacher, responses, size, context, remembered)
                        part["draw"] = np.full(len(part["token"]), draw, dtype=np.int32)
                        part["roll_in"] = np.full(len(part["token"]), name)
                        if pieces:
                            pieces.save(key, part)
                    parts.append(part)
                    bar.update(rows.stop - rows.start)
    write_evidence(path, _joined(parts), manifest)
    if pieces:
        pieces.clear()


def pieces_of(path: Path) -> Path:
    """Where an interrupted collection leaves what it has."""
    return path.with_suffix(".pieces")


class _Remembered:
    """The teacher's predictions on the batches of one piece, made once where there is a memory for them."""

    def __init__(self, said: dict[tuple[int, ...], Prediction] | None, piece: tuple[int, ...]) -> None:
        self.said, self.piece = said, piece

    def predict(self, teacher: nn.Module, batch: Batch, number: int) -> Prediction:
        """What the teacher predicts on the batch of that number."""
        if self.said is None:
            return predict(teacher, batch)
        key = (*self.piece, number)
        if key not in self.said:
            self.said[key] = predict(teacher, batch)
        return self.said[key]


def measure(
    student: nn.Module,
    teacher: nn.Module,
    responses: Batch,
    batch_size: int,
    context: bool,
    remembered: _Remembered | None = None,
) -> Columns:
    """Return the evidence columns of these responses, but for `draw` and `roll_in`.

    They go through the models in batches of like length.
    """
    kept = remembered or _Remembered(None, ())
    order = torch.argsort(responses["length"], stable=True).split(batch_size)
    return _joined(
        [_measure(student, teacher, responses.rows(rows), context, kept, at) for at, rows in enumerate(order)]
    )


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Pieces:
    """Measured responses that an interrupted collection left in a folder, for the same manifest only."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        text = json.dumps(asdict(manifest), sort_keys=True)
        told = {"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
        with suppress(RecordError):
            if read_json(folder / "pieces.json") == told:
                return
        self.clear()
        write_json(folder / "pieces.json", told)

    def load(self, key: str) -> Columns | None:
        """The piece of that name, or None where it is not there or torn."""
        try:
            return load_arrays(self.folder / f"{key}.npz")
        except RecordError:
            return None

    def save(self, key: str, part: Columns) -> None:
        """Keep a piece; it appears complete or not at all."""
        save_arrays(self.folder / f"{key}.npz", part)

    def clear(self) -> None:
        """Forget all pieces."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _measure(
    student: nn.Module, teacher: nn.Module, batch: Batch, context: bool, kept: _Remembered, number: int
) -> Columns:
    """Return the columns of these responses; an unfinished one has a row more, after its last token.

    With `context` the prompt's tokens but the first are measured too.
    """
    device = next(student.parameters()).device
    open_ended = ~batch["finished"]
    longer = batch.replace(
        input_ids=torch.nn.functional.pad(batch["input_ids"], (0, 1)), length=batch["length"] + open_ended
    ).to(device)
    start = longer["prompt_length"]
    if context:
        longer = longer.replace(prompt_length=torch.ones_like(start))
    q, p = predict(student, longer), kept.predict(teacher, longer, number)
    row, at = target_mask(longer).nonzero(as_tuple=True)
    position = at + 1 - start[row]
    inside = position < 0
    real = at + 1 < batch["length"].to(device)[row]
    measured: dict[str, list[Tensor]] = {}
    for first, last in _chunks(len(q), max(1, 2**22 // q.vocab)):
        values = _columns(q.logits(first, last), p.logits(first, last), q.targets[first:last])
        for name, value in values.items():
            measured.setdefault(name, []).append(value)
    out = {name: torch.cat(parts).cpu().numpy() for name, parts in measured.items()}
    given = real.cpu().numpy()
    for name in ("student_log_prob", "teacher_log_prob"):
        out[name] = np.where(given, out[name], np.nan).astype(np.float32)
    out["teacher_rank"] = np.where(given, out["teacher_rank"], -1).astype(np.int32)
    return {
        **out,
        "example_id": longer["example_id"][row].cpu().numpy(),
        "position": position.cpu().numpy().astype(np.int32),
        "token": np.where(given, q.targets.cpu().numpy(), -1).astype(np.int32),
        "alive": (real & ~inside).cpu().numpy(),
        "context": inside.cpu().numpy(),
    }


def _chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _columns(lq: Tensor, lp: Tensor, token: Tensor) -> dict[str, Tensor]:
    """The measurements at the positions of a chunk from both models' logits [n, V].

    The divergences of `kdbench.losses`, with what they share computed once, and exactly 0 for equal logits:
    log q/m = log 2 - softplus(log p/q) and log p/m = log 2 - softplus(log q/p) for m = (p + q) / 2.
    """
    log_q, log_p = log_probs(lq), log_probs(lp)
    q, p, ratio = log_q.exp(), log_p.exp(), log_p - log_q
    half = math.log(2)
    chosen_p = log_p.gather(-1, token[:, None])
    jsd = p * (half - softplus(-ratio)) + q * (half - softplus(ratio))
    return {
        "student_log_prob": log_q.gather(-1, token[:, None])[:, 0],
        "teacher_log_prob": chosen_p[:, 0],
        "forward_kl": (p * ratio + (q - p)).sum(-1).clamp(min=0),
        "reverse_kl": (p - q - q * ratio).sum(-1).clamp(min=0),
        "jsd": 0.5 * jsd.sum(-1).clamp(min=0),
        "total_variation": 0.5 * (p - q).abs().sum(-1),
        "student_entropy": -(q * log_q).sum(-1),
        "teacher_entropy": -(p * log_p).sum(-1),
        "top1_agree": log_q.argmax(-1) == log_p.argmax(-1),
        "teacher_rank": (log_p > chosen_p).sum(-1),
    }
