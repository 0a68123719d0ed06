"""Where boards, configs, analyses and the cache lie, in a checkout and in an installed wheel."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def _data(name: str) -> Path:
    checkout = PACKAGE.parent
    return checkout / name if (checkout / "pyproject.toml").is_file() else PACKAGE / "_data" / name


def leaderboards_dir() -> Path:
    """The folder of `<board>/v<N>/board.toml`: the checkout's, or the one that the wheel carries."""
    return _data("leaderboards")


def configs_dir() -> Path:
    """The folder of `models/**/*.toml`: the checkout's, or the one that the wheel carries."""
    return _data("configs")


def analyses_dir() -> Path:
    """The folder of the package `analyses`, which lies beside `kdbench` in a checkout and in a wheel."""
    return PACKAGE.parent / "analyses"


def cache_dir() -> Path:
    """The folder of what runs share (trained stages); `KDBENCH_CACHE`, or `~/.cache/kdbench`."""
    given = os.environ.get("KDBENCH_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "kdbench"


def runs_dir() -> Path:
    """The default folder of runs, `runs` in the working directory."""
    return Path("runs")
