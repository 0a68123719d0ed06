"""Seconds and peak memory of nested phases: `with phase("rollout"): ...`.

Time of an inner phase is not counted again in the outer one, so the seconds of all phases add up; a phase
that covers takes the time of the phases inside it. Peak bytes are the highest seen while the phase was the
innermost or an outer one: allocated and reserved by the device's allocator on a GPU, resident set size on a
CPU (Linux; 0 where the kernel does not tell).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass

import torch


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

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self._open: list[str] = []
        self._since = 0.0
        self._covered = False

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
