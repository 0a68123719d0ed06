"""Seconds and peak memory of nested phases: `with phase("rollout"): ...`.

Time of an inner phase is not counted again in the outer one, so the seconds of all phases add up; a phase
that covers takes the time of the phases inside it. Peak bytes are the highest seen while the phase was the
innermost or an outer one: allocated and reserved by the device's allocator on a GPU, resident set size on a
CPU (Linux; 0 where the kernel does not tell).

`with detail("decode"): ...` opens a phase inside of a phase only where the running clock is detailed, as that
of a profile is: it synchronises a GPU, which an ordinary run is spared. Elsewhere it costs a look-up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn


@dataclass
class Phase:
    """What a phase cost: own seconds without those of inner phases, and peaks in bytes."""

    seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0


def _reset_peak_rss() -> None:
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_rss() -> int:
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Clock:
    """Collects the phases of one run; survives a kill through `state` and `load`."""

    def __init__(self, detailed: bool = False) -> None:
        """Args: `detailed`: whether `detail` opens phases too."""
        self.detailed = detailed
        self.phases: dict[str, Phase] = {}
        self._open: list[str] = []
        self._since = 0.0
        self._covered = False

    @property
    def innermost(self) -> str:
        """The name of the innermost phase that is open, "" where none is."""
        return self._open[-1] if self._open else ""

    def _charge(self) -> None:
        """Charge the time and the peaks since the last change of phase to the phases that are open."""
        now = time.perf_counter()
        if self._open:
            self.phases[self._open[-1]].seconds += now - self._since
            rss = _peak_rss()
            for name in self._open:
                entry = self.phases[name]
                entry.peak_rss_bytes = max(entry.peak_rss_bytes, rss)
                if torch.cuda.is_available():
                    entry.peak_allocated_bytes = max(
                        entry.peak_allocated_bytes, torch.cuda.max_memory_allocated()
                    )
                    entry.peak_reserved_bytes = max(
                        entry.peak_reserved_bytes, torch.cuda.max_memory_reserved()
                    )
        self._since = time.perf_counter()

    def _reset_peaks(self) -> None:
        _reset_peak_rss()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def phase(self, name: str, covers: bool = False) -> Iterator[None]:
        """Charge what happens inside to `name`; with `covers` also what opens a phase of its own there."""
        if self._covered:
            yield
            return
        self._covered = covers
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._charge()
        self.phases.setdefault(name, Phase())
        self._reset_peaks()
        self._open.append(name)
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._charge()
            self._open.pop()
            self._covered = False
            self._reset_peaks()

    def state(self) -> dict[str, dict[str, float]]:
        """Return the phases so far as plain numbers."""
        self._charge()
        return {name: asdict(entry) for name, entry in self.phases.items()}

    def load(self, state: dict[str, dict[str, float]]) -> None:
        """Go on from what an earlier process measured."""
        for name, entry in state.items():
            self.phases[name] = Phase(
                float(entry["seconds"]),
                *(int(entry[f"peak_{kind}_bytes"]) for kind in ("rss", "allocated", "reserved")),
            )

    def add(self, state: dict[str, dict[str, float]]) -> None:
        """Add what another process spent on work that this one found done: seconds summed, peaks maxed."""
        for name, entry in state.items():
            phase = self.phases.setdefault(name, Phase())
            phase.seconds += float(entry["seconds"])
            for kind in ("peak_rss_bytes", "peak_allocated_bytes", "peak_reserved_bytes"):
                setattr(phase, kind, max(getattr(phase, kind), int(entry[kind])))


def spent(
    before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return the phases of `after` with the seconds since `before`."""
    nothing = {"seconds": 0.0}
    return {
        name: {**entry, "seconds": entry["seconds"] - before.get(name, nothing)["seconds"]}
        for name, entry in after.items()
        if entry["seconds"] > before.get(name, nothing)["seconds"]
    }


_current: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def running(clock: Clock) -> Iterator[Clock]:
    """Make `clock` the one that `phase` charges."""
    token = _current.set(clock)
    try:
        yield clock
    finally:
        _current.reset(token)


@contextmanager
def phase(name: str, covers: bool = False) -> Iterator[None]:
    """Charge what happens inside to the phase `name` of the running clock; nothing where none runs.

    With `covers`, phases opened inside are charged to this one: the sampling of an evaluation is no training.
    """
    clock = _current.get()
    if clock is None:
        yield
    else:
        with clock.phase(name, covers):
            yield


_NOTHING: AbstractContextManager[None] = nullcontext()


def detail(name: str) -> AbstractContextManager[None]:
    """`phase(name)` where the running clock is detailed, and nothing elsewhere.

    A clock runs in the thread that started it: what torch computes in threads of its own, as the backward
    pass on a GPU, opens no detail and belongs to the phase that waits for it.
    """
    clock = _current.get()
    return clock.phase(name) if clock is not None and clock.detailed else _NOTHING


_roles: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def name_roles(models: Mapping[str, nn.Module]) -> None:
    """Remember which role each model has, for `role_of`; the models are not kept alive."""
    for role, model in models.items():
        _roles[model] = role


def role_of(model: nn.Module) -> str:
    """Return the role of a model, or of the model inside it that has one (behind a soft prompt); "forward"
    where none is known.
    """
    inner: object = model
    while isinstance(inner, nn.Module):
        if inner in _roles:
            return _roles[inner]
        inner = getattr(inner, "model", None)
    return "forward"
