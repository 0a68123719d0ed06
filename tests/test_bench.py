"""The speed benchmark: every row runs, sides that differ are told, and the page follows from the results."""

import importlib.util
import json
import logging
import math
import statistics
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kdbench
from kdbench import memory

FOLDER = Path(kdbench.__file__).parent.parent / "benchmarks"
PUBLISHED = FOLDER.parent / "leaderboards" / "speed" / "v1"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the checkout")
QUICK = ["--quick", "--threads", "1"]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The script as a module; what it silences speaks again afterwards."""
    sys.path.insert(0, str(FOLDER))
    try:
        import step

        with warnings.catch_warnings():
            disabled = logging.root.manager.disable
            yield step
            logging.disable(disabled)
    finally:
        sys.path.remove(str(FOLDER))


def setting(bench: Any, **other: Any) -> Any:
    return bench.Setting(**{"vocab": 64, **bench.QUICK, **other})


def results(bench: Any, tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Run the script; return its exit code and what it wrote."""
    code = bench.main([*QUICK, "--out", str(tmp_path), *options])
    return code, json.loads((tmp_path / "results.json").read_text())


def test_every_row_runs_without_trl(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "trl_version", lambda: None)
    code, found = results(bench, tmp_path)
    assert code == 0
    lines = {line["row"]: line for line in found["rows"]}
    assert list(lines) == list(bench.ROWS)
    with_trl = {"distillation", "gkd", "supervised", "distillation_ragged"}
    for key, line in lines.items():
        assert line["problems"] == ([bench.TRL_MISSING] if key in with_trl else []), key
        assert ("ratio" in line or "megabytes" in line) == (key not in with_trl), key
        assert line["reached"] is None  # no limit is stated for this vocabulary
    measured = found["vocabularies"]["64"]
    checks = [(check["what"], check["same"]) for g in measured["groups"].values() for check in g["checks"]]
    told = ["loss", "prompt loss", "student loss", "greedy tokens", "loss of the first update"]
    assert checks == [(what, True) for what in told]
    for group in measured["groups"].values():
        for times in group["times"].values():
            assert len(times) in (1, 2)
            assert min(times) > 0
    lengths = measured["groups"]["sampling"]["notes"]["lengths"]
    assert [one["mean"] for one in lengths.values()] == [bench.QUICK["new"]] * 2
    page = (tmp_path / "table.md").read_text()
    assert page == bench.table(found)
    assert page.startswith("# Speed, quick run of toy sizes: its numbers mean nothing\n")
    assert " MB" not in page
    assert "GFLOP" not in page
    told = measured["groups"]["on_policy"]["notes"]["phases"]
    assert {"decode", "teacher", "student", "divergence", "backward"} <= set(told)
    assert all(told[name]["gflop"] > 0 for name in ("decode", "teacher", "divergence", "backward"))
    assert all(cost["seconds"] > 0 for cost in told.values())
    full = bench.table({**found, "quick": False})
    assert full.startswith("# Speed, v1\n")
    assert " MB" in full
    assert "GFLOP" in full
    assert "| 64 | on_policy | decode |" in full
    assert found["rows"] == again(bench, found)
    assert page.strip() == capsys.readouterr().out.strip()
    assert "TRL is not installed" in page
    assert {"cpu", "threads", "matmul_precision", "commit", "torch", "transformers", "trl"} <= set(
        found["environment"]
    )


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")
def test_trl_does_the_same_work_on_prompts_of_equal_length(bench: Any, tmp_path: Path) -> None:
    rows = ["distillation", "gkd", "supervised", "distillation_ragged"]
    code, found = results(bench, tmp_path, "--rows", ",".join(rows))
    assert code == 0
    assert [line["problems"] for line in found["rows"]] == [[]] * 4
    assert all("ratio" in line for line in found["rows"])
    assert all(line["growth_ratio"] > 0 for line in found["rows"][:2])
    groups = found["vocabularies"]["64"]["groups"]
    assert [check["same"] for name in ("trl", "supervised") for check in groups[name]["checks"]] == [True] * 3
    (ragged,) = groups["trl_ragged"]["checks"]  # it passes no position ids
    assert ragged["gradient_difference"] > 0.1


def test_other_work_is_told(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain loop without position ids is not the same work on ragged prompts."""
    import _peers

    monkeypatch.setattr(_peers, "positions", lambda mask: torch.arange(mask.shape[1])[None])
    code, found = results(bench, tmp_path, "--rows", "plain,promptkd")
    assert code == 1
    assert [line["problems"] for line in found["rows"]] == [
        ["not the same loss"],
        ["not the same prompt loss", "not the same student loss"],
    ]
    assert "not the same loss" in (tmp_path / "table.md").read_text()


def test_a_peer_that_fails_is_told_and_ours_that_fails_raises(bench: Any) -> None:
    def broken() -> None:
        raise TypeError("no such argument")

    group = bench.Group()
    group.failed.clear()
    with group.foreign("TRL GKDTrainer"):
        broken()
    assert group.failed == {"TRL GKDTrainer": "TypeError: no such argument"}
    with pytest.raises(TypeError, match="no such argument"):
        group.add("kdbench", broken)


# median ratio, ours / theirs, and growth, ours / theirs, as the project set them before it measured
TO_REACH = {
    "plain": ((0.62, 0.38), (None, None)),
    "distillation": ((0.60, 0.45), (None, 0.5)),
    "gkd": ((0.60, 0.28), (None, 0.25)),
    "supervised": ((0.75, 0.30), (None, None)),
    "promptkd": ((0.52, 0.24), (None, 0.25)),
    "sampling": ((0.45, 0.45), (None, None)),
    "mixed": ((0.25, 0.25), (None, None)),
    "divergence": ((32, 64), (None, None)),
    "floor": ((3.0, 3.5), (None, None)),
    "overhead": ((1.03, 1.03), (None, None)),
}


def test_limits(bench: Any) -> None:
    for key, row in bench.ROWS.items():
        most = tuple(row.most.get(v) for v in (8192, 50257))
        grown = tuple(row.most_grown.get(v) for v in (8192, 50257))
        assert (most, grown) == TO_REACH.get(key, ((None, None), (None, None))), key


def measured(ours: list[float], theirs: list[float], grown: tuple[int, int]) -> dict[str, Any]:
    times = {"kdbench": ours, "TRL DistillationTrainer": theirs}
    memory = dict(zip(("kdbench", "TRL DistillationTrainer"), grown, strict=True))
    return {"groups": {"trl": {"times": times, "checks": [], "failed": {}, "notes": {}}}, "memory": memory}


@pytest.mark.parametrize(
    ("ours", "theirs", "grown", "reached"),
    [
        ([0.8, 1.0, 9.0], [2.0, 2.5, 10.0], (50, 100), True),  # 0.4 of the peer twice, 0.9 once
        ([0.8, 1.0, 9.0], [2.0, 2.5, 10.0], (51, 100), False),
        ([1.0, 1.0, 0.2], [2.0, 2.0, 2.0], (10, 100), False),  # 0.5 twice, 0.1 once
    ],
)
def test_a_row_is_reached_by_its_median_and_its_memory(
    bench: Any, ours: list[float], theirs: list[float], grown: tuple[int, int], reached: bool
) -> None:
    line = bench.figure("distillation", 50257, measured(ours, theirs, grown))
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    assert line["ratio"]["median"] == ratios[1]
    assert line["ratio"]["min"] == ratios[0]
    assert line["growth_ratio"] == grown[0] / 100
    assert line["reached"] is reached


def test_a_row_of_another_vocabulary_is_not_judged(bench: Any) -> None:
    assert bench.figure("distillation", 8193, measured([1.0], [2.0], (1, 2)))["reached"] is None


def test_sides_take_turns(bench: Any) -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    told: list[str] = []
    times = bench.alternate(steps, 3, lambda: None, told.append)
    assert "".join(order) == "".join(told) == "abccbaabc"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_each_side_has_the_allocator_that_it_has_alone(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(bench, "set_thresholds", lambda *thresholds: found.append(thresholds))
    sides = ["kdbench", "kdbench through oneDNN", "bare functions", bench.PLAIN, bench.GKD, "generate"]
    for side in sides:
        bench.ALLOCATORS["own"](side)
        bench.ALLOCATORS["kdbench"](side)
    assert found[::2] == 3 * [memory.KEEPING] + 3 * [(2**25, 2**26)]
    assert found[1::2] == 6 * [memory.KEEPING]


def test_growth_is_the_peak_and_not_what_is_left(bench: Any) -> None:
    size = 64 * 10**6
    kept: list[torch.Tensor] = []

    def step() -> None:
        torch.ones(size // 4).sum()
        kept.append(torch.ones(size // 16))

    grown = bench.growth(step)
    assert 0.97 * size < grown < 1.1 * size + 8 * 10**6
    assert bench.growth(lambda: None) < 2 * 10**6


def test_operations_by_hand(bench: Any) -> None:
    """Teacher: 12 L D^2 weights in its blocks, at 8 x 128 tokens, and D V in its head at 8 x 64."""
    found = bench.operations(bench.Setting(8192), real=False)
    teacher = 2 * (12 * 6 * 512**2 * 1024 + 512 * 8192 * 512)
    student = 2 * (12 * 3 * 256**2 * 1024 + 256 * 8192 * 512)
    sampling = 2 * (12 * 3 * 256**2 * 8 * 127 + 256 * 8192 * 512)
    for name, value in {"teacher": teacher, "student": 3 * student, "sampling": sampling}.items():
        assert math.isclose(found[name], value / 1e9, rel_tol=1e-12)
    assert math.isclose(sum(found.values()), 70.8, abs_tol=0.1)
    real = bench.operations(bench.Setting(8192), real=True)
    tokens = int(bench.texts(bench.Setting(8192), ragged=True)["prompt_length"].sum()) + 512
    head = 2 * 512 * 8192 * 512 / 1e9
    assert math.isclose((real["teacher"] - head) / (found["teacher"] - head), tokens / 1024, rel_tol=1e-9)


def test_the_weights_in_the_count_are_those_of_the_model(bench: Any) -> None:
    sizes = setting(bench)
    student, _ = bench.pair(sizes)
    blocks = sum(p.numel() for p in student.transformer.h.parameters() if p.dim() == 2)
    assert blocks == 12 * sizes.student[0] * sizes.student[1] ** 2


def test_texts(bench: Any) -> None:
    sizes = bench.Setting(100)
    ragged, equal = bench.texts(sizes, ragged=True), bench.texts(sizes, ragged=False, responses=True)
    assert ragged["prompt_length"].tolist() == [21, 27, 33, 39, 46, 52, 58, 64]
    assert equal["prompt_length"].tolist() == [64] * 8
    assert equal["length"].tolist() == [128] * 8
    assert bench.texts(sizes, ragged=True, count=64).size == 64
    ids, mask = bench.left_padded(ragged, "prompt_length")
    for row in range(8):
        length = int(ragged["prompt_length"][row])
        assert ids[row, 64 - length :].tolist() == ragged["input_ids"][row, :length].tolist()
        assert mask[row].tolist() == [0] * (64 - length) + [1] * length


def test_both_sides_start_from_the_same_weights(bench: Any) -> None:
    one, other = bench.pair(setting(bench)), bench.pair(setting(bench))
    for a, b in zip(one, other, strict=True):
        assert a is not b
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(not p.requires_grad for p in one[1].parameters())
    assert one[0].config.eos_token_id is None


def test_the_end_token_makes_responses_a_third_as_long(bench: Any) -> None:
    sizes = bench.Setting(500, student=(1, 128, 2), prompts=200)
    torch.manual_seed(0)
    student = bench.pair(sizes)[0]
    assert bench.end_token(student, sizes) == 499
    prompts = bench.texts(sizes, ragged=True, count=sizes.prompts)
    ours = bench.OursSampling(student, prompts, sizes, rollout_batch=200)
    ours.step()
    assert len(ours.lengths) == 200
    assert 0.8 < statistics.mean(ours.lengths) / (64 / 3) < 1.2
    plain = bench.PlainSampling(student, prompts, sizes, 200)
    plain.step()
    assert 0.8 < statistics.mean(plain.lengths) / (64 / 3) < 1.2
    assert max(plain.lengths) <= 64


@pytest.mark.slow
def test_memory_in_a_process_of_its_own(bench: Any) -> None:
    options = Namespace(quick=False, threads=1, precision="highest")
    found = bench.measured_memory("divergence", setting(bench, vocab=5000), options)
    assert isinstance(found, int)
    assert "failed: " in bench.measured_memory("no such side", setting(bench), options)


def test_wrong_options_are_refused(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in {
        ("--rows", "plian"): "no row 'plian'. Known: plain, distillation",
        ("--rounds", "0"): "at least 1",
        ("--vocab", "3"): "at least 16 entries",
        ("--precision", "low"): "invalid choice",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            bench.main(list(options))
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err


def again(bench: Any, found: dict[str, Any]) -> list[Any]:
    """The rows, computed once more from what was measured."""
    lines = [(line["row"], line["vocab"]) for line in found["rows"]]
    rows = [bench.figure(key, vocab, found["vocabularies"][str(vocab)]) for key, vocab in lines]
    return list(json.loads(json.dumps(rows)))


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="nothing is published")
def test_the_published_page_follows_from_the_published_results(bench: Any) -> None:
    found = json.loads((PUBLISHED / "results.json").read_text())
    assert (PUBLISHED / "table.md").read_text() == bench.table(found)
    assert found["rows"] == again(bench, found)
    assert found["environment"]["matmul_precision"] == "highest"
    assert all(not set(line["problems"]) for line in found["rows"])
