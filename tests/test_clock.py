"""Seconds of nested phases add up; peaks are those of a phase while it was open."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import timeit
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from kdbench import clock
from kdbench.clock import Clock, detail, name_roles, phase, role_of, running
from kdbench.prompts import PromptedModel, SoftPrompt


class Time:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    fake = Time()
    monkeypatch.setattr(clock, "time", fake)
    return fake


def seconds(of: Clock) -> dict[str, float]:
    return {name: entry.seconds for name, entry in of.phases.items()}


def test_inner_seconds_are_not_counted_twice(time: Time) -> None:
    kept = Clock()
    with running(kept):
        time.now += 5  # outside of every phase
        for _ in range(2):
            with phase("update"):
                time.now += 1
                with phase("rollout"):
                    time.now += 10
                    with phase("rollout"):
                        time.now += 0.5
                time.now += 2
    assert seconds(kept) == {"update": 6.0, "rollout": 21.0}


def test_exception_closes_its_phases(time: Time) -> None:
    def fails() -> None:
        with phase("outer"), phase("inner"):
            time.now += 3
            raise RuntimeError

    kept = Clock()
    with running(kept):
        with pytest.raises(RuntimeError):
            fails()
        time.now += 100
        with phase("after"):
            time.now += 1
    assert seconds(kept) == {"outer": 0.0, "inner": 3.0, "after": 1.0}


def test_nothing_is_charged_where_no_clock_runs(time: Time) -> None:
    kept = Clock()
    with running(kept):
        pass
    with phase("late"):
        time.now += 1
    assert kept.phases == {}


def test_clocks_nest(time: Time) -> None:
    outer, inner = Clock(), Clock()
    with running(outer):
        with running(inner), phase("a"):
            time.now += 1
        with phase("b"):
            time.now += 2
    assert (seconds(outer), seconds(inner)) == ({"b": 2.0}, {"a": 1.0})


def test_state_survives_as_json(time: Time) -> None:
    kept = Clock()
    with running(kept), phase("update"):
        time.now += 4
        state = json.loads(json.dumps(kept.state()))  # in the middle of a phase, as a checkpoint is
        time.now += 100
    again = Clock()
    again.load(state)
    with running(again), phase("update"):
        time.now += 3
    assert seconds(again) == {"update": 7.0}
    assert again.phases["update"].peak_rss_bytes >= state["update"]["peak_rss_bytes"]


_PEAKS = """
import json
import numpy as np
from kdbench.clock import Clock, phase, running
kept = Clock()
with running(kept), phase("whole"):
    with phase("small"):
        pass
    with phase("large"):
        block = np.ones(16 * 2**20 // 8 * 4)  # 64 MiB
        del block
    with phase("small after"):
        pass
print(json.dumps({name: entry.peak_rss_bytes for name, entry in kept.phases.items()}))
"""


def test_peak_is_that_of_the_phase_and_of_those_around_it() -> None:
    """In a process of its own: where the peak cannot be set back, earlier tests would hide it."""
    if not clock._peak_rss():
        pytest.skip("the kernel tells no peak of the resident set")
    done = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True)
    peaks = json.loads(done.stdout)
    assert peaks["large"] - peaks["small"] >= 60 * 2**20
    assert peaks["whole"] >= peaks["large"]


def test_peak_of_an_earlier_phase_is_forgotten() -> None:
    """Where the kernel lets the peak be set back; else a later phase shows the earlier one's."""
    kept = Clock()
    with running(kept):
        with phase("large"):
            block = np.ones(16 * 2**20 // 8 * 4)
            del block
        before = clock._peak_rss()
        clock._reset_peak_rss()
        if not before or before - clock._peak_rss() < 60 * 2**20:
            pytest.skip("the kernel does not set the peak of the resident set back")
        with phase("small"):
            pass
    assert kept.phases["large"].peak_rss_bytes - kept.phases["small"].peak_rss_bytes >= 60 * 2**20


# ------------------------------------------------------------------------------------------------ details
def test_details_nest_and_subtract_where_the_clock_is_detailed(time: Time) -> None:
    kept = Clock(detailed=True)
    with running(kept), phase("update"):
        time.now += 1
        with detail("student"):
            time.now += 10
            with detail("divergence"):
                time.now += 100
        with detail("student"):
            time.now += 20
    assert seconds(kept) == {"update": 1.0, "student": 30.0, "divergence": 100.0}


def test_details_belong_to_their_phase_where_it_is_not(time: Time) -> None:
    kept = Clock()
    with running(kept), phase("update"):
        time.now += 1
        with detail("student"):
            time.now += 10
    assert seconds(kept) == {"update": 11.0}
    with detail("student"):  # no clock runs
        time.now += 1
    assert seconds(kept) == {"update": 11.0}


def test_a_covering_phase_takes_the_time_of_details(time: Time) -> None:
    kept = Clock(detailed=True)
    with running(kept), phase("evaluate", covers=True), detail("decode"):
        time.now += 3
    assert seconds(kept) == {"evaluate": 3.0}


def test_a_detail_synchronises_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name) or 0)
    with running(Clock()), detail("decode"):
        pass
    assert calls == []
    with running(Clock(detailed=True)), detail("decode"):
        pass
    assert calls.count("synchronize") == 2


def test_a_detail_that_is_not_asked_for_costs_next_to_nothing() -> None:
    def enter() -> None:
        with detail("student"):
            pass

    with running(Clock()):
        least = min(timeit.repeat(enter, number=1000, repeat=20)) / 1000
    assert least < 2e-6


def test_roles_are_found_through_a_soft_prompt() -> None:
    teacher, student, stranger = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    prompted = PromptedModel(stranger, SoftPrompt(torch.zeros(1, 2)))
    name_roles({"student": student, "teacher": teacher, "tuned": prompted})
    assert role_of(student) == "student"
    assert role_of(PromptedModel(teacher, SoftPrompt(torch.zeros(1, 2)))) == "teacher"
    assert role_of(prompted) == "tuned"  # its own role stands before that of the model inside
    assert role_of(stranger) == "forward"
    name_roles({"student": teacher})
    assert role_of(teacher) == "student"  # the newest


def test_naming_roles_keeps_no_model_alive() -> None:
    model = nn.Linear(2, 2)
    name_roles({"student": model})
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
