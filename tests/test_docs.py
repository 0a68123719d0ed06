"""What README and docs show: commands parse, boards load, the method shown is the one that is tested."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import typer.main

import kdbench
from kdbench.checks import LAWS
from kdbench.cli import app
from kdbench.config import (
    EvaluationConfig,
    EvidenceConfig,
    Select,
    TrainingConfig,
    boards,
    load_board,
    resolve,
)
from kdbench.registry import names

ROOT = Path(kdbench.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.skipif(not PAGES[0].is_file(), reason="needs the checkout")


def commands() -> list[str]:
    """Every line of the pages that runs kdbench."""
    found = []
    for page in PAGES:
        for line in re.findall(r"^    (\S.*)", page.read_text(), flags=re.MULTILINE):
            line = line.split(" && ")[-1].split("#")[0].strip()
            line = re.sub(r"^(\.venv/bin/|accelerate launch -m )", "", line)
            if re.match(r"kdbench [a-z]", line):
                found.append(line)
    return found


@pytest.mark.parametrize("line", commands() if PAGES[0].is_file() else [])
def test_commands_parse(line: str) -> None:
    group = typer.main.get_command(app)
    _, name, *args = shlex.split(line.replace("[RUN ...]", ""))
    group.commands[name].make_context(name, args)  # type: ignore[attr-defined]
    for at, arg in enumerate(args):
        if arg == "--board" and not args[at + 1].endswith(".toml"):
            assert args[at + 1] in boards()


def test_there_are_commands() -> None:
    assert len(commands()) > 15


def test_the_method_in_the_readme_is_the_tested_one() -> None:
    code = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), flags=re.DOTALL)
    assert code == [(ROOT / "tests" / "plugins" / "tempered_kd.py").read_text()]


def test_the_board_in_the_docs_loads(tmp_path: Path) -> None:
    (toml,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "boards.md").read_text(), flags=re.DOTALL)
    (tmp_path / "board.toml").write_text(toml)
    board = load_board(str(tmp_path / "board.toml"))
    for row in board.rows:
        assert resolve(board, "full", row.name, 1).method == row.method


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("methods", list(LAWS)),
        ("settings", [f.name for c in (TrainingConfig, EvaluationConfig, EvidenceConfig, Select)
                      for f in dataclasses.fields(c) if f.name != "decode"]),
    ],
)  # fmt: skip
def test_nothing_is_left_out(page: str, words: list[str]) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert [word for word in words if f"`{word}`" not in text] == []


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_method_and_board_is_in_the_readme() -> None:
    text = PAGES[0].read_text()
    for name in [*names("distillers"), *boards()]:
        assert f"`{name}`" in text
