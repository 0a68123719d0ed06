"""The benchmark of a GPU: its checks on the device, and that it runs, in tiny, where there is none."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kdbench
from kdbench.clock import Clock, detail, phase, running

ROOT = Path(kdbench.__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the checkout")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return script()


NAMES = ["check_greedy", "check_sampling", "check_divergences", "check_bf16"]


@pytest.mark.parametrize("name", NAMES)
def test_results_are_right_on_a_cpu(gpu: ModuleType, name: str) -> None:
    found = getattr(gpu, name)(torch.device("cpu"))
    for one in found if isinstance(found, list) else [found]:
        assert one.right, one


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_results_are_right_on_a_gpu(gpu: ModuleType, name: str) -> None:
    found = getattr(gpu, name)(torch.device("cuda"))
    for one in found if isinstance(found, list) else [found]:
        assert one.right, one


@pytest.mark.gpu
def test_phases_wait_for_the_gpu_and_see_its_memory() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    clock = Clock(detailed=True)
    with running(clock), phase("update"), detail("backward"):
        for _ in range(20):
            b = a @ a
        del b
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        a @ a
    end.record()
    torch.cuda.synchronize()
    assert clock.phases["backward"].seconds >= 0.5 * start.elapsed_time(end) / 1e3
    assert clock.phases["update"].seconds < clock.phases["backward"].seconds
    assert clock.phases["backward"].peak_allocated_bytes >= 2 * a.numel() * 4


def test_what_is_wrong_is_told(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    def wrong(logits: object, *others: object, **named: object) -> object:
        raise AssertionError("nothing is measured after a wrong result")

    monkeypatch.setattr(gpu, "checks", lambda device: [gpu.Check("greedy", 0.5, 0.0)])
    monkeypatch.setattr(gpu, "sampling", wrong)
    assert gpu.main(["--quick", "--device", "cpu"]) == 1
    assert not gpu.Check("nan", float("nan"), 1.0).right


def test_figures_against_their_limits(gpu: ModuleType) -> None:
    def one(row: str, seconds: float, peak: float | None = None) -> object:
        made = gpu.Measured(row, method=row, seconds=[seconds])
        made.peak_allocated_bytes = peak
        return made

    found = [one("kd", 0.1), one("gkd", 0.2), one("promptkd", 0.6, 15e9), one("minillm", 0.3)]
    sampled = {"seconds": {"rollout": [0.1, 0.3, 0.2], "generate": [4.0]}, "rows": 32, "new_tokens": 256}
    rows = gpu.figures(sampled, found)
    assert [row.value for row in rows] == pytest.approx([0.2, 20, 0.1, 2, 6, 3, 15])
    assert [row.reached for row in rows] == [False, True, True, True, False, True, True]
    text = gpu.told([gpu.Check("greedy", 0.0, 0.0)], rows, True).splitlines()
    assert [line.split()[-1] for line in text[3:]] == ["no", "yes", "yes", "yes", "no", "yes", "yes"]
    assert {line.split()[-1] for line in gpu.told([], rows, False).splitlines()[2:]} == {"–"}


def test_the_script_runs_in_tiny_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    told = ["--quick", "--device", "cpu", "--steps", "1", "--rounds", "1", "--out", str(file)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *told], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PromptKD / KD" in done.stdout
    found = json.loads(file.read_text())
    assert all(one["right"] for one in found["checks"])
    assert len(found["figures"]) == 7
    assert {one["reached"] for one in found["figures"]} == {None}
    assert [one["row"] for one in found["methods"]] == ["kd", "gkd", "promptkd", "minillm"]
    assert all(one["seconds"] for one in found["methods"])


@pytest.mark.parametrize("args", [["--device", "cpu"], ["--quick", "--device", "cpu", "--rounds", "0"]])
def test_what_makes_no_sense_is_refused(gpu: ModuleType, args: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(args)
    assert ended.value.code == 2
