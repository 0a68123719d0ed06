"""Time and memory of an update, kdbench against a plain loop, TRL and a restatement of PromptKD's iteration.

    python benchmarks/step.py [--vocab 8192,50257] [--rounds 10] [--rows ROW,ROW] [--out FOLDER]

Both sides run in one process, in alternating order, on copies of the same weights and on the same texts, with
the same matrix-product precision and threads, dropout 0 and AdamW, each under the thresholds of the allocator
that it has where it runs alone. Before anything is timed, the two sides' loss and gradient on the same
responses are compared. A ratio is the median over rounds of kdbench / peer within the round. Memory is the
growth of the resident set over one update, each side in a process of its own that has made an update on short
texts before. Prints a table; `--out` writes it as `table.md`, and `results.json` with the seconds of every
round. TRL takes part where it is installed. docs/speed.md says more.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import ctypes
import gc
import json
import logging
import math
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _peers import (
    TRLGKD,
    UPDATES,
    Bare,
    Gradients,
    Ours,
    OursSampling,
    Plain,
    PlainPromptKD,
    PlainSampling,
    Setting,
    TRLDistillation,
    end_token,
    generate,
    left_padded,
    pair,
    short,
    texts,
    trl_version,
)
from _table import DISTILLATION, GKD, PLAIN, ROWS, TRL_MISSING, VOCABULARIES, figure, table
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

import kdbench
from kdbench.clock import Clock, running
from kdbench.config import library_versions
from kdbench.distiller import Batch
from kdbench.flops import FlopCounter
from kdbench.losses import reverse_kl
from kdbench.memory import KEEPING, set_thresholds
from kdbench.predict import predict
from kdbench.products import product
from kdbench.rollout import Draw, rollout

SAME_LOSS, SAME_GRADIENT = 1e-4, 1e-3  # relative differences up to which two sides do the same work
# glibc then gives a freed block of this size or more back at once, instead of raising that size as it goes:
# what is resident is what is in use
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}
# thresholds of glibc's allocator up to which it raises them by itself, in bytes: a peer has no others
UNTOLD = (2**25, 2**26)
QUICK = {
    "teacher": (2, 32, 2),
    "student": (1, 16, 2),
    "batch": 2,
    "prompt": 8,
    "shortest": 3,
    "new": 6,
    "prompts": 4,
    "products": (64,),
}


PROFILED = ("on_policy", "supervised", "promptkd")  # groups of which the page tells where the time goes
SHARE = {"overhead": 2.0, "trl_ragged": 0.3, "set": 0.3}  # of --rounds that a group makes
Step = Callable[[], Any]


@dataclass
class Group:
    """Sides that run alternately, with what was found out about them beforehand."""

    sides: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Any], step: str = "step") -> Any:
        """Make a side, or say why it cannot be made."""
        if name.startswith("TRL") and trl_version() is None:
            self.failed[name] = TRL_MISSING
            return None
        with self.foreign(name):
            self.sides[name] = make()
            self.steps[name] = getattr(self.sides[name], step)
        return self.sides.get(name)

    @contextmanager
    def foreign(self, name: str) -> Iterator[None]:
        """Leave out a side of TRL that fails, for another version may have another interface, and say why."""
        try:
            yield
        except Exception as error:
            if not name.startswith("TRL"):
                raise
            self.failed[name] = f"{type(error).__name__}: {error}"
            self.sides.pop(name, None)
            self.steps.pop(name, None)

    def compare(
        self, peer: str, what: str, ours: tuple[float, Gradients], make: Callable[[], Any], must: bool = True
    ) -> None:
        """Note how far loss and gradient of a peer are from ours on the same responses."""
        found: list[tuple[float, Gradients]] = []
        with self.foreign(peer):
            found += [make()] if peer in self.sides else []
        if not found:
            return
        loss, gradient = found[0]
        told: dict[str, Any] = {
            "peer": peer,
            "what": what,
            "kdbench": ours[0],
            "theirs": loss,
            "difference": abs(loss - ours[0]) / max(abs(ours[0]), 1e-12),
            "gradient_difference": _distance(gradient, ours[1]),
        }
        same = told["difference"] <= SAME_LOSS and told["gradient_difference"] <= SAME_GRADIENT
        self.checks.append(told | {"same": same, "must": must})


def _distance(one: Gradients, other: Gradients) -> float:
    """Relative Euclidean distance of two gradients; infinite where they are of other parameters."""
    if set(one) != set(other):
        return math.inf
    squares = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return math.sqrt(squares / max(sum(float(g.double().square().sum()) for g in other.values()), 1e-300))


def _responses(student: Any, prompts: Batch, setting: Setting) -> Batch:
    return rollout(student, prompts, Draw(2, 0, prompts.size, setting.new))


# ---- the groups
def on_policy(setting: Setting) -> Group:
    """Ragged prompts."""
    group, prompts = Group(), texts(setting, ragged=True)
    ours = group.add("kdbench", lambda: Ours("gkd", {}, prompts, setting))
    plain = group.add(PLAIN, lambda: Plain(prompts, setting))
    same = _responses(ours.student, prompts, setting)
    group.compare(PLAIN, "loss", ours.scored(same), lambda: plain.scored(same))
    group.steps["kdbench through oneDNN"] = ours.step_through_onednn
    return group


def trl(setting: Setting) -> Group:
    """Prompts of equal length, for TRL's trainers pass no position ids."""
    group, prompts = Group(), texts(setting, ragged=False)
    ours = group.add("kdbench", lambda: Ours("gkd", {}, prompts, setting))
    distillation = group.add(DISTILLATION, lambda: TRLDistillation(prompts, setting))
    gkd = group.add(GKD, lambda: TRLGKD(texts(setting, ragged=False, responses=True), setting, 1.0))
    same = _responses(ours.student, prompts, setting)
    group.compare(DISTILLATION, "loss", ours.scored(same), lambda: distillation.scored(same))
    group.compare(GKD, "loss", ours.scored(same), lambda: gkd.scored(same))
    return group


def trl_ragged(setting: Setting) -> Group:
    """Ragged prompts, on which the trainer scores other logits than it sampled from, at the same cost."""
    group, prompts = Group(), texts(setting, ragged=True)
    ours = group.add("kdbench", lambda: Ours("gkd", {}, prompts, setting))
    distillation = group.add(DISTILLATION, lambda: TRLDistillation(prompts, setting))
    same = _responses(ours.student, prompts, setting)
    group.compare(DISTILLATION, "loss", ours.scored(same), lambda: distillation.scored(same), must=False)
    return group


def supervised(setting: Setting) -> Group:
    """The texts' own responses."""
    group, rows = Group(), texts(setting, ragged=False, responses=True)
    ours = group.add("kdbench", lambda: Ours("gkd", {"student_fraction": 0.0}, rows, setting))
    gkd = group.add(GKD, lambda: TRLGKD(rows, setting, 0.0))
    group.compare(GKD, "loss", ours.scored(rows), lambda: gkd.scored(rows))
    return group


def promptkd(setting: Setting) -> Group:
    """Ragged prompts; the plain side starts from the same soft prompt."""
    group, prompts = Group(), texts(setting, ragged=True)
    ours = group.add("kdbench", lambda: Ours("promptkd", {}, prompts, setting))
    plain = group.add("plain PromptKD", lambda: plain_promptkd(ours, prompts, setting))
    same = _responses(ours.student, prompts, setting)
    for of in ("prompt", "student"):
        mine = ours.scored(same, f"{of}_loss", of)
        group.compare("plain PromptKD", f"{of} loss", mine, partial(plain.scored, same, of))
    return group


def plain_promptkd(ours: Ours, prompts: Batch, setting: Setting) -> PlainPromptKD:
    """The plain iteration from the soft prompt and with the regularisation that `ours` has."""
    coefficient = ours.distiller.cfg.base_coef * (1 - 1 / UPDATES)
    return PlainPromptKD(prompts, setting, ours.distiller.prompt.vectors, coefficient)


def sampling(setting: Setting) -> Group:
    """Responses of equal length, and whether the likeliest tokens are the same."""
    group, prompts = Group(), texts(setting, ragged=True)
    ours = group.add(
        "kdbench", lambda: OursSampling(pair(setting)[0], prompts, setting, rollout_batch=setting.batch)
    )
    plain = group.add("generate", lambda: PlainSampling(pair(setting)[0], prompts, setting, setting.batch))
    (ids, mask), found = plain.parts[0], ours.sampled(0, greedy=True)
    theirs = generate(plain.student, ids, mask, setting.new, greedy=True)[:, ids.shape[1] :]
    response = left_padded(found, "length")[0][:, -setting.new :]
    equal = float((theirs == response).double().mean())
    group.checks.append({"peer": "generate", "what": "greedy tokens", "same": equal == 1, "must": True})
    group.checks[-1]["equal_share"] = equal
    return group


def mixed(setting: Setting) -> Group:
    """Responses that end: three draws a round, for their lengths differ from draw to draw."""
    return _with_ends(setting, texts(setting, ragged=True), setting.batch, draws=3)


def prompt_set(setting: Setting) -> Group:
    """A set of prompts as evaluation answers it."""
    prompts = texts(setting, ragged=True, count=setting.prompts)
    return _with_ends(setting, prompts, setting.prompts, draws=1)


def _with_ends(setting: Setting, prompts: Batch, rollout_batch: int, draws: int) -> Group:
    group = Group()
    mine, theirs = pair(setting)[0], pair(setting)[0]
    for student in (mine, theirs):
        end_token(student, setting)
    group.add("kdbench", lambda: OursSampling(mine, prompts, setting, rollout_batch, draws))
    group.add("generate", lambda: PlainSampling(theirs, prompts, setting, setting.batch, draws))
    return group


def overhead(setting: Setting) -> Group:
    """The trainer's update and the same functions without it."""
    group, prompts = Group(), texts(setting, ragged=True)
    ours = group.add("kdbench", lambda: Ours("gkd", {}, prompts, setting))
    # the trainer draws the rows in an order of its own, on which sampled responses do not depend
    bare = group.add("bare functions", lambda: Bare(prompts, setting))
    mine, theirs = ours.first_loss(), bare.step()
    difference = abs(mine - theirs) / max(abs(mine), 1e-12)
    told = {"peer": "bare functions", "what": "loss of the first update", "kdbench": mine, "theirs": theirs}
    group.checks.append(told | {"difference": difference, "same": difference <= SAME_LOSS, "must": True})
    return group


GROUPS: dict[str, Callable[[Setting], Group]] = {
    "on_policy": on_policy,
    "trl": trl,
    "supervised": supervised,
    "promptkd": promptkd,
    "sampling": sampling,
    "mixed": mixed,
    "overhead": overhead,
    "trl_ragged": trl_ragged,
    "set": prompt_set,
}


def own_allocator(side: str) -> None:
    """Give the allocator the thresholds that it has where this side runs alone: kdbench lets it keep what was
    freed, which would make peers in the same process faster than they are elsewhere.
    """
    set_thresholds(*(KEEPING if side.startswith(("kdbench", "bare functions")) else UNTOLD))


def kdbenchs_allocator(side: str) -> None:
    """Give the allocator the thresholds of kdbench, whatever side runs."""
    set_thresholds(*KEEPING)


ALLOCATORS: dict[str, Callable[[str], None]] = {"own": own_allocator, "kdbench": kdbenchs_allocator}


def alternate(
    steps: Mapping[str, Step], rounds: int, tick: Callable[[], None], before: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return the seconds of each side in each round; every second round goes backwards. `before` is told
    which side is next, and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps) if number % 2 == 0 else reversed(list(steps)):
            gc.collect()
            before(name)
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
            tick()
    return times


def phases(side: Ours, updates: int = 3) -> dict[str, dict[str, float]]:
    """Return what each phase of an update takes: seconds, a mean over updates, and GFLOP of its products."""
    clock = Clock(detailed=True)
    with running(clock):
        for _ in range(updates):
            side.trainer.one_visit()
    counting = Clock(detailed=True)
    with running(counting), FlopCounter(counting) as counter:
        side.trainer.one_visit()
    return {
        name: {"seconds": told["seconds"] / updates, "gflop": counter.found.get(name, 0.0) / 1e9}
        for name, told in clock.state().items()
    }


# ---- memory
def _status(name: str) -> int:
    """A number of /proc/self/status in bytes. Raises: OSError where the kernel tells none."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not tell {name}")


def growth(step: Step) -> int:
    """Return the peak of the resident set during `step` above what it was before, in bytes; what was freed
    earlier is given back to the system first.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts at what is resident now
    step()
    return max(0, _status("VmHWM") - before)


def _update_growth(side: Any, setting: Setting, batch: Batch) -> int:
    side.use(short(setting), 2)
    side.step()
    side.use(batch, setting.new)
    return growth(getattr(side, "step_without_clock", side.step))


def divergence_growth(setting: Setting) -> int:
    """Return what value and gradient of the reverse KL of a batch of responses take beyond the hidden states,
    their gradient and that of the student's head, in bytes: the largest of three.
    """
    student, teacher = pair(setting, tied=False)
    weight = student.get_output_embeddings().weight
    exact = [0]

    def value_and_gradient(batch: Batch) -> Step:
        q = predict(student, batch)
        with torch.no_grad():
            p = predict(teacher, batch)

        def run() -> tuple[Tensor, ...]:
            loss = reverse_kl(q, p).sum() / len(q)
            found = torch.autograd.grad(loss, [q.hidden, weight])
            exact[0] = sum(gradient.numel() * gradient.element_size() for gradient in found)
            return found

        return run

    batch = texts(setting, ragged=False, responses=True)
    value_and_gradient(batch)()  # the library that multiplies keeps buffers of its own from here on
    return max(growth(value_and_gradient(batch)) - exact[0] for _ in range(3))


def memory(kind: str, setting: Setting) -> int:
    """Return the bytes that one update (or the divergence) of this side adds, on prompts of full length."""
    prompts = texts(setting, ragged=False)
    rows = texts(setting, ragged=False, responses=True)
    if kind == "divergence":
        return divergence_growth(setting)
    if kind == "plain PromptKD":
        side: Any = plain_promptkd(Ours("promptkd", {}, prompts, setting), prompts, setting)
    else:
        make: dict[str, Callable[[], Any]] = {
            "kdbench": lambda: Ours("gkd", {}, prompts, setting),
            "kdbench PromptKD": lambda: Ours("promptkd", {}, prompts, setting),
            PLAIN: lambda: Plain(prompts, setting),
            DISTILLATION: lambda: TRLDistillation(prompts, setting),
            GKD: lambda: TRLGKD(rows, setting, 1.0),
        }
        side = make[kind]()
    return _update_growth(side, setting, rows if kind == GKD else prompts)


def measured_memory(kind: str, setting: Setting, options: argparse.Namespace) -> int | str:
    """Return the bytes, found in a process of their own, or why there are none."""
    if kind.startswith("TRL") and trl_version() is None:
        return TRL_MISSING
    if options.quick:
        return memory(kind, setting)
    told = {"kind": kind, "setting": asdict(setting), "threads": options.threads}
    told["precision"] = options.precision
    command = [sys.executable, __file__, "--child", json.dumps(told)]
    where = {**os.environ, **GIVING_BACK}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=where)
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return int(json.loads(done.stdout.strip().splitlines()[-1])["bytes"])


def child(told: dict[str, Any]) -> None:
    """Measure the memory of one side and print it."""
    configure(told["threads"], told["precision"])
    sizes: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in told["setting"].items()}
    print(json.dumps({"bytes": memory(told["kind"], Setting(**sizes))}))


# ---- the floor
def product_rates(sizes: Sequence[int]) -> dict[int, float]:
    """Return the GFLOP/s of square float32 matrix products through oneDNN, the best of several tries."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        rates = {}
        for size in sizes:
            a, b = torch.randn(size, size), torch.randn(size, size)
            rates[size] = 2 * size**3 / _least(partial(torch.mm, a, b), 3 if size > 2048 else 10) / 1e9
        return rates
    finally:
        torch.set_float32_matmul_precision(before)


def _least(step: Step, tries: int) -> float:
    """Return the seconds of the fastest of several tries, after one that is not timed."""
    step()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def head_rates(setting: Setting, rows: int = 128) -> dict[str, float]:
    """Return the GFLOP/s of some rows' product with the teacher's head by torch itself and by kdbench, the
    best of several tries.
    """
    width = setting.teacher[1]
    x, weight = torch.randn(rows, width), torch.randn(setting.vocab, width)
    with torch.no_grad():
        seconds = {
            "torch": _least(partial(linear, x, weight), 10),
            "kdbench": _least(partial(product, x, weight), 10),
        }
    return {name: 2 * x.numel() * setting.vocab / least / 1e9 for name, least in seconds.items()}


def operations(setting: Setting, real: bool) -> dict[str, float]:
    """Return the GFLOP of the products with weights in an on-policy update: sampling, the teacher's forward,
    the student's forward and backward; heads on response positions only, attention's own products left out.

    Args: `real` counts the real tokens of ragged prompts, else every row is as long as the longest.
    """
    new = setting.batch * setting.new
    prompts = setting.batch * setting.prompt
    if real:
        prompts = int(texts(setting, ragged=True)["prompt_length"].sum())

    def forward(shape: tuple[int, int, int], tokens: int) -> float:
        layers, width, _ = shape
        return 2 * (12 * layers * width**2 * tokens + width * setting.vocab * new) / 1e9

    return {
        "sampling": forward(setting.student, prompts + new - setting.batch),
        "teacher": forward(setting.teacher, prompts + new),
        "student": 3 * forward(setting.student, prompts + new),
    }


# ---- what is told
def configure(threads: int, precision: str) -> None:
    """Set threads and precision of matrix products, and silence the libraries."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return processor, versions, threads, precision and commit."""
    root = Path(kdbench.__file__).parent.parent

    def git(*args: str) -> str:
        with suppress(OSError):
            command = ["git", "-C", str(root), *args]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return done.stdout.strip() if done.returncode == 0 else ""
        return ""

    cpu = ""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        lines = [line.partition(":") for line in file]
        found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
        numbers = f"family {found.get('cpu family')}, model {found.get('model')}"
        units = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        flags = [unit for unit in units if unit in found.get("flags", "").split()]
        cpu = f"{found.get('model name', platform.machine())} ({numbers}; {', '.join(flags)})"
    return {
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "matmul_precision": options.precision,
        "allocator": options.allocator,
        "kdbench": kdbench.__version__,
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        **dict(library_versions()),
        "trl": trl_version(),
        "python": platform.python_version(),
    }


# ---- the run
def measure(options: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    """Run the groups that these rows need, at every vocabulary."""
    results: dict[str, Any] = {
        "benchmark": "speed/v1",
        "environment": environment(options),
        "rounds": options.rounds,
        **({"quick": True} if options.quick else {}),
        "rows": [],
        "vocabularies": {},
    }
    groups = [name for name in GROUPS if any(ROWS[key].group == name for key in keys)]
    kinds = list(dict.fromkeys(kind for key in keys for kind in ROWS[key].grown))
    total = len(options.vocab) * (2 * sum(_rounds(name, options.rounds) for name in groups) + len(kinds))
    with tqdm(total=total, unit="step", disable=options.quick) as bar:
        for vocab in options.vocab:
            setting = Setting(vocab, **(QUICK if options.quick else {}))  # type: ignore[arg-type]
            found: dict[str, Any] = {"setting": asdict(setting), "groups": {}, "memory": {}}
            results["vocabularies"][str(vocab)] = found
            for kind in kinds:
                bar.set_description(f"{vocab} memory {kind}")
                found["memory"][kind] = measured_memory(kind, setting, options)
                bar.update()
            for name in groups:
                bar.set_description(f"{vocab} {name}")
                found["groups"][name] = _measured_group(name, setting, options, found, bar)
            results["rows"] += [figure(key, vocab, found) for key in keys]
            write(results, options.out)
    return results


def _rounds(group: str, rounds: int) -> int:
    return max(1, round(rounds * SHARE.get(group, 1.0)))


def _measured_group(
    name: str, setting: Setting, options: argparse.Namespace, found: dict[str, Any], bar: Any
) -> dict[str, Any]:
    group = GROUPS[name](setting)
    if options.precision != "highest":
        group.steps.pop("kdbench through oneDNN", None)
    if len(group.steps) < 2:  # there is no peer
        group.steps.clear()
    allocator = ALLOCATORS[options.allocator]
    for side, step in list(group.steps.items()):  # a first step is not timed
        allocator(side)
        with group.foreign(side):
            step()
    for one in group.sides.values():
        if hasattr(one, "lengths"):
            one.lengths.clear()
    rounds = _rounds(name, options.rounds)
    bar.total += rounds * (len(group.steps) - 2)
    if name == "on_policy":
        rates = [product_rates(setting.products)]
    times = alternate(group.steps, rounds, bar.update, allocator)
    allocator("kdbench")
    if name == "on_policy":
        rates.append(product_rates(setting.products))
        best = {size: max(rate[size] for rate in rates) for size in setting.products}
        found["floor"] = {
            "gflop_per_s": best,
            "best": max(best.values()),
            "padded": operations(setting, real=False),
            "real": operations(setting, real=True),
            "head": head_rates(setting),
        }
    mine = group.sides.get("kdbench")
    if isinstance(mine, Ours) and group.steps and name in PROFILED:
        group.notes["phases"] = phases(mine)
    sampled = {side: one.lengths for side, one in group.sides.items() if getattr(one, "lengths", None)}
    if sampled:
        group.notes["lengths"] = {
            side: {"mean": statistics.mean(all_of), "longest": max(all_of), "responses": len(all_of)}
            for side, all_of in sampled.items()
        }
    return {"times": times, "checks": group.checks, "notes": group.notes, "failed": group.failed}


def write(results: Mapping[str, Any], folder: Path | None) -> None:
    """Write `results.json` and `table.md`, where a folder is given."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1, default=str)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        (folder / "table.md").write_text(table(results), encoding="utf-8")


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 16:
        raise argparse.ArgumentTypeError("a vocabulary has at least 16 entries")
    return numbers


def _rows(text: str) -> list[str]:
    wanted = text.split(",")
    for key in wanted:
        if key not in ROWS:
            raise argparse.ArgumentTypeError(f"no row '{key}'. Known: {', '.join(ROWS)}")
    return wanted


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 where a side failed or did other work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab", type=_numbers, help="sizes of the vocabulary; default 8192,50257")
    parser.add_argument("--rounds", type=_positive, help="rounds of each comparison; default 10")
    parser.add_argument("--rows", type=_rows, default=list(ROWS), help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument(
        "--precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="torch.set_float32_matmul_precision, for both sides; default highest",
    )
    parser.add_argument("--threads", type=_positive, default=2, help="default 2")
    parser.add_argument(
        "--allocator",
        choices=list(ALLOCATORS),
        default="own",
        help="thresholds of glibc's allocator: each side's own (default), or kdbench's for all",
    )
    parser.add_argument("--out", type=Path, help="folder of results.json and table.md")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, one round, one process: whether everything runs"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(json.loads(options.child))
        return 0
    options.vocab = options.vocab or ([64] if options.quick else list(VOCABULARIES))
    options.rounds = options.rounds or (1 if options.quick else 10)
    configure(options.threads, options.precision)
    results = measure(options, options.rows)
    print(table(results))
    bad = [line for line in results["rows"] if set(line["problems"]) - {TRL_MISSING}]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
