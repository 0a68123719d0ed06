"""One large GPU: first whether its results are right, then seconds and memory against the limits set for it.

    python benchmarks/gpu.py [--out FILE] [--steps 5] [--rounds 5]
    python benchmarks/gpu.py --quick --device cpu     # tiny shapes: does the script run?

Right: greedy tokens are those of transformers' `generate` in float32, tokens sampled in float64 are those of
the CPU and do not depend on the batch, divergences and their gradients agree with the plain formula in
float64 on the CPU, and in bf16 the log-probabilities of sampled tokens are those that training sees.

Fast: GPT-2 XL's shape to GPT-2's with random weights, 32 rows of 256 + 256 tokens, bf16
(benchmarks/gpu_board.toml). Sampling alternates with `generate` in one process; each method's update is
measured in a process of its own, as `kdbench profile` does. What is not reached is printed with where the
time goes. Exit code 1 where a result is wrong, 0 otherwise.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GPT2Config, GPT2LMHeadModel

from kdbench import flops, profile
from kdbench.commands import quiet, silence, to_profile
from kdbench.config import RunConfig, load_board
from kdbench.distiller import Batch, gather_targets, token_mean
from kdbench.losses import divergence_named, token_log_prob
from kdbench.predict import predict
from kdbench.processes import Processes
from kdbench.profile_report import Machine, Measured, as_json, render
from kdbench.rollout import Draw, rollout
from kdbench.stages import Places

BOARD = Path(__file__).with_name("gpu_board.toml")
DIVERGENCES = ("forward_kl", "reverse_kl", "generalized_jsd", "skew_forward_kl", "skew_reverse_kl")
VOCAB = 501
VALUE, GRADIENT = 1e-6, 1e-5  # relative, in float32
NATS = 0.05  # median difference of a log-probability in bf16


# ---- is it right
@dataclass(frozen=True)
class Check:
    """One result against what it should be: the difference seen, and the largest allowed."""

    name: str
    seen: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.seen <= self.allowed


def small(layers: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A random GPT-2 whose distributions are far from uniform, on the CPU."""
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=4, vocab_size=VOCAB, n_positions=128, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).to(dtype).eval()


def ragged(rows: int, longest: int, response: int = 0) -> Batch:
    """Random prompts of 1 to `longest` tokens, and random responses of as many tokens as are told."""
    draw = torch.Generator().manual_seed(7)
    prompt = torch.randint(1, longest + 1, (rows,), generator=draw)
    return Batch(
        {
            "example_id": torch.arange(rows),
            "input_ids": torch.randint(1, VOCAB, (rows, longest + response), generator=draw),
            "prompt_length": prompt,
            "length": prompt + response,
        }
    )


def checks(device: torch.device) -> list[Check]:
    """Try everything; the first of a kind that is wrong does not hide the others."""
    return [check_greedy(device), *check_sampling(device), *check_divergences(device), check_bf16(device)]


def check_greedy(device: torch.device) -> Check:
    """The share of responses that are not those of `generate`; of prompts of different lengths, with ends."""
    model, batch, new = small(3, 64, 0).to(device), ragged(16, 24), 32
    ours = rollout(model, batch.to(device), Draw(0), new, temperature=0)
    wrong = 0
    for row in range(batch.size):  # one by one: without padding there is nothing to get wrong
        prompt = batch["input_ids"][row : row + 1, : int(batch["prompt_length"][row])].to(device)
        mask = torch.ones_like(prompt)
        told = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        with torch.no_grad():
            whole = model.generate(prompt, attention_mask=mask, **told)
        got = ours["input_ids"][row, : int(ours["length"][row])]
        wrong += not torch.equal(got, whole[0])
    return Check("greedy tokens of generate, float32: responses that differ", wrong / batch.size, 0.0)


def check_sampling(device: torch.device) -> list[Check]:
    """The share of sampled responses that differ between CPU and device, and between sizes of batches."""
    model, batch, new = small(3, 64, 0, torch.float64), ragged(16, 24), 32
    here = rollout(model, batch, Draw(3), new)
    there = rollout(copy.deepcopy(model).to(device), batch.to(device), Draw(3), new)
    alone = rollout(copy.deepcopy(model).to(device), batch.to(device), Draw(3, rollout_batch=1), new)
    return [
        Check("sampled tokens of the CPU, float64: responses that differ", _differ(here, there), 0.0),
        Check("sampled one by one, float64: responses that differ", _differ(there, alone), 0.0),
    ]


def _differ(one: Batch, other: Batch) -> float:
    width = max(one["input_ids"].shape[1], other["input_ids"].shape[1])
    a, b = (pad(x["input_ids"].cpu(), (0, width - x["input_ids"].shape[1])) for x in (one, other))
    same = (a == b).all(1) & (one["length"].cpu() == other["length"].cpu())
    return float((~same).double().mean())


def check_divergences(device: torch.device) -> list[Check]:
    """Mean values and the gradients of all of the student's parameters, in float32 through both models on the
    device, against the formula on whole logits in float64 on the CPU.
    """
    batch, found = ragged(8, 24, 24), []
    for name in DIVERGENCES:
        student, teacher = small(2, 32, 1, torch.float64), small(3, 64, 2, torch.float64)
        plain, want = divergence_named(name), batch
        logits = [_target_logits(model, want) for model in (student, teacher)]
        value = plain(logits[0], logits[1].detach()).mean()
        value.backward()
        quick, fixed = (copy.deepcopy(m).float().to(device) for m in (student, teacher))
        quick.zero_grad()
        moved = batch.to(device)
        with torch.no_grad():
            p = predict(fixed, moved)
        got = token_mean(plain(predict(quick, moved), p), moved)
        got.backward()
        found.append(Check(f"{name}, value", _far(got, value), VALUE))
        apart = [
            _far(mine.grad, theirs.grad)
            for mine, theirs in zip(quick.parameters(), student.parameters(), strict=True)
            if float(theirs.grad.norm()) > 1e-9
        ]
        found.append(Check(f"{name}, gradient", max(apart), GRADIENT))
    return found


def _target_logits(model: Any, batch: Batch) -> Tensor:
    """Logits [N, V] at the target positions, by transformers' own forward pass, row by row."""
    rows = []
    for row in range(batch.size):
        start, end = int(batch["prompt_length"][row]), int(batch["length"][row])
        logits = model(batch["input_ids"][row : row + 1, : end - 1]).logits
        rows.append(logits[0, max(start, 1) - 1 :])
    return torch.cat(rows)


def _far(got: Tensor, want: Tensor) -> float:
    return float((got.detach().cpu().double() - want.detach()).norm() / want.detach().norm())


def check_bf16(device: torch.device) -> Check:
    """The median difference between a sampled token's log-probability as sampling and as training sees it."""
    model, batch = small(3, 64, 0).to(device), ragged(16, 24).to(device)
    with Processes(str(device), "bf16").autocast():
        made = rollout(model, batch, Draw(5), 32, log_probs=True)
        with torch.no_grad():
            seen = token_log_prob(predict(model, made))
    told = gather_targets(made["sampled_log_prob"], made)
    return Check("log-probability of sampled tokens, bf16, nats", float((seen - told).abs().median()), NATS)


# ---- is it fast
@dataclass(frozen=True)
class Figure:
    """One figure against its limit."""

    name: str
    value: float | None
    limit: float
    unit: str
    at_least: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the limit is kept; None where there is no figure."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def sampling(
    run: RunConfig, device: torch.device, rounds: int, wanted: profile.Wanted, places: Places
) -> dict[str, Any]:
    """Seconds of a rollout and of `generate`, alternating, with as many tokens and rows as the board says."""
    made = profile.Fresh(run, places, wanted)
    student: Any = made.model("student")
    source = made.source("train")
    assert source is not None
    rows, new = run.training.batch_size, run.training.max_new_tokens
    batch = source.batch(range(rows)).to(device)
    prompt = batch["input_ids"][:, : made.lengths[0]]
    theirs = copy.deepcopy(student).to(torch.bfloat16)
    autocast = Processes(str(device), run.training.precision).autocast
    step = Draw(1, rollout_batch=rows)

    def ours() -> int:
        with autocast():
            return int((rollout(student, batch, step, new)["length"] - batch["prompt_length"]).sum())

    def generate() -> int:
        with torch.no_grad():
            out = theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, max_new_tokens=new,
                min_new_tokens=new, pad_token_id=0,
            )  # fmt: skip
        return int(out.shape[0] * (out.shape[1] - prompt.shape[1]))

    for action in (ours, generate):
        if action() != rows * new:
            raise RuntimeError("a response ended before its time: the two are not compared at equal lengths")
    ours()  # a second time: what is captured at first is replayed now
    seconds: dict[str, list[float]] = {"rollout": [], "generate": []}
    for _ in range(rounds):
        for name, action in (("rollout", ours), ("generate", generate)):
            seconds[name].append(_timed(action, device))
            step.visit += 1
    shape = flops.shape_of(student)
    read = flops.decode_bytes(shape, rows, made.lengths[0], new, 2)
    return {"rows": rows, "new_tokens": new, "seconds": seconds, "decode_bytes": read}


def _timed(action: Callable[[], Any], device: torch.device) -> float:
    flops.synchronize(device)
    start = time.perf_counter()
    action()
    flops.synchronize(device)
    return time.perf_counter() - start


def figures(sampled: dict[str, Any], found: list[Measured]) -> list[Figure]:
    """Every figure of the setting with its limit."""
    seconds = {name: statistics.median(values) for name, values in sampled["seconds"].items()}
    by_row = {one.row: one for one in found}
    kd = by_row["kd"].median

    def times_kd(row: str) -> float | None:
        median = by_row[row].median
        return median / kd if median is not None and kd else None

    peak = by_row["promptkd"].peak_allocated_bytes
    return [
        Figure(
            f"sampling {sampled['new_tokens']} tokens for {sampled['rows']} rows",
            seconds["rollout"],
            0.15,
            "s",
        ),
        Figure("generate / sampling", seconds["generate"] / seconds["rollout"], 15, "times", at_least=True),
        Figure("KD update", kd, 0.2, "s"),
        Figure("GKD / KD", times_kd("gkd"), 2.5, "times"),
        Figure("PromptKD / KD", times_kd("promptkd"), 5, "times"),
        Figure("MiniLLM, a student's update / KD", times_kd("minillm"), 3, "times"),
        Figure("PromptKD, peak allocated", None if peak is None else peak / 1e9, 16, "GB"),
    ]


def told(checked: list[Check], rows: list[Figure], judged: bool) -> str:
    """Both tables as text; `judged` says whether the limits are meant for this machine and size."""
    lines = [f"{'right' if one.right else 'WRONG':6} {one.seen:<9.2g} (at most {one.allowed:g})  {one.name}"
             for one in checked]  # fmt: skip
    lines += ["", f"{'figure':52} {'measured':>10} {'limit':>10}  reached"]
    for one in rows:
        value = "–" if one.value is None else f"{one.value:.3g}"
        sign = ">=" if one.at_least else "<="
        said = {True: "yes", False: "no", None: "–"}[one.reached if judged else None]
        lines.append(f"{one.name:45} {one.unit:>6} {value:>10} {sign + f' {one.limit:g}':>10}  {said}")
    return "\n".join(lines) + "\n"


def main(args: list[str] | None = None) -> int:
    """Check, measure, print and write; return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes: only whether the script runs")
    parser.add_argument("--steps", type=int, default=5, help="timed updates of each method")
    parser.add_argument("--rounds", type=int, default=5, help="timed rollouts")
    parser.add_argument("--out", type=Path, help="JSON")
    given = parser.parse_args(args)
    if given.steps < 1 or given.rounds < 1:
        parser.error("--steps and --rounds must be at least 1")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device that torch can use; --quick --device cpu tries the script")
    if given.device == "cpu" and not given.quick:
        parser.error("the full size is for a GPU; add --quick")
    quiet(1)
    silence()
    device, size = torch.device(given.device), "quick" if given.quick else "full"
    checked = checks(device)
    wrong = [one for one in checked if not one.right]
    if wrong:
        print(told(checked, [], False), end="")
        _write(given.out, {"checks": [dataclasses.asdict(one) for one in checked]})
        return 1
    with tempfile.TemporaryDirectory() as folder:
        places, wanted = (
            Places(Path(folder) / "runs", Path(folder) / "cache"),
            profile.Wanted(given.steps, True),
        )
        board = load_board(str(BOARD))
        runs = to_profile(board, size, [row.name for row in board.rows], [], given.device, {})
        sampled = sampling(runs[0], device, given.rounds, wanted, places)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the processes that follow need the memory
        machine, found = profile.measure_all(runs, places, wanted, lambda text: print(text, file=sys.stderr))
    rows, judged = figures(sampled, found), not given.quick
    print(told(checked, rows, judged))
    print(_sampling_said(sampled, machine))
    print(render(board.id, size, machine, found, "table"), end="")
    _write(
        given.out,
        {
            "checks": [{**dataclasses.asdict(one), "right": one.right} for one in checked],
            "figures": [
                {**dataclasses.asdict(one), "reached": one.reached if judged else None} for one in rows
            ],
            "sampling": sampled,
            **as_json(board.id, size, machine, found, None),
        },
    )
    return 1 if any(one.error for one in found) else 0


def _sampling_said(sampled: dict[str, Any], machine: Machine) -> str:
    least = sampled["decode_bytes"] / machine.bytes_per_s
    spread = {name: f"{min(v):.3g}..{max(v):.3g}" for name, v in sampled["seconds"].items()}
    return (
        f"sampling {spread['rollout']} s, generate {spread['generate']} s; reading weights and cache takes "
        f"{least:.3g} s at the rate of copying\n"
    )


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
