"""What is checked, and how: CI calls nox and nothing else, so a laptop and CI agree.

`nox` runs tests, lint, types, gate and certify with the exact versions of constraints.txt. These sessions
share one environment, `.nox/shared`, for torch takes minutes and gigabytes to install. By hand:
`nox -s slow`, `nox -s gpu`, `nox -s bench`, the speed benchmark, and `nox -s minimums`, the tests with the
lowest versions that pyproject.toml allows; the last two have environments of their own.
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import nox

nox.options.sessions = ["tests", "lint", "types", "gate", "certify"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).resolve().parent
SHARED = ROOT / ".nox" / "shared"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
# One thread: sums are then the same from run to run, and a busy machine does not slow the tests down.
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _tool(name: str) -> str:
    """The path of a command of the shared environment, which is made where it is missing or out of date."""
    folder = SHARED / ("Scripts" if os.name == "nt" else "bin")
    stated = b"".join((ROOT / file).read_bytes() for file in ("pyproject.toml", "constraints.txt"))
    digest = hashlib.sha256(sys.version.encode() + stated).hexdigest()
    stamp = SHARED / "installed"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != digest:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(SHARED)], check=True)
        install = ["-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", ".[dev]"]
        subprocess.run([str(folder / "python"), *install], check=True, cwd=ROOT)
        stamp.write_text(digest, encoding="utf-8")
    return str(folder / name)


def _run(session: nox.Session, name: str, *args: str) -> None:
    session.run(_tool(name), *args, env=ENV, external=True)


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """The fast tests: offline, two processes of one thread."""
    _run(session, "pytest", "-n", "2", *session.posargs)


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Ruff, with the rules of pyproject.toml."""
    _run(session, "ruff", "check", ".")


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """Mypy, strict, on the package and the analyses."""
    _run(session, "mypy")


@nox.session(python=False)
def gate(session: nox.Session) -> None:
    """The regression check of every method's first updates and short scores."""
    _run(session, "kdbench", "gate")


@nox.session(python=False)
def certify(session: nox.Session) -> None:
    """The fast certification of the estimators: bias and coverage where the truth is computed."""
    _run(session, "kdbench", "certify", "--fast", *session.posargs)


@nox.session(python=False)
def slow(session: nox.Session) -> None:
    """The tests that take minutes."""
    _run(session, "pytest", "-m", "slow", *session.posargs)


@nox.session(python=False)
def gpu(session: nox.Session) -> None:
    """The tests that need a CUDA device, then the benchmark of the GPU; its options follow `--`."""
    _run(session, "pytest", "-m", "gpu")
    _run(session, "python", "benchmarks/gpu.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The speed benchmark against a plain loop and TRL; its options follow `--`, in place of the published
    folder.
    """
    session.install("-c", "constraints.txt", "-e", ".[dev,bench]")
    session.run("pytest", "tests/test_bench.py", env=ENV)
    env = {name: value for name, value in ENV.items() if name != "OMP_NUM_THREADS"}
    options = session.posargs or ["--out", "leaderboards/speed/v1"]
    session.run("python", "benchmarks/step.py", *options, env=env)


@nox.session
def minimums(session: nox.Session) -> None:
    """The fast tests with the lowest version of each dependency that pyproject.toml allows."""
    lowest = [re.sub(r">=", "==", one) for one in PYPROJECT["project"]["dependencies"]]
    session.install(*lowest, *PYPROJECT["project"]["optional-dependencies"]["dev"])
    session.install("--no-deps", "-e", ".")
    session.run("pytest", *session.posargs, env=ENV)
