"""Commands in processes of their own, for tests that kill them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import kdbench


def environment(**changes: str) -> dict[str, str]:
    """This process' environment with the tested package on the path, also where it is not installed."""
    path = [str(Path(kdbench.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **changes}


def begin(folder: Path, *args: str) -> "subprocess.Popen[bytes]":
    """`kdbench` with these arguments; its runs, cache and log lie in `folder`."""
    env = environment(KDBENCH_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "kdbench", *args, "--runs", str(folder / "runs")]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )


def heed_interrupts() -> None:
    """Undo an ignored SIGINT, which a background job of a shell inherits and hands on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processes_of(folder: Path) -> list[int]:
    """Processes whose environment names the folder: those that `begin` started there, with their children."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if str(folder).encode() in (path / "environ").read_bytes() and state != "Z":
                found.append(int(path.name))
        except OSError:
            continue
    return found


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} took more than {seconds} s"
        time.sleep(0.005)
