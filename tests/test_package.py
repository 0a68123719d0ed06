"""The package as it is installed: versions, layering, and what the wheel carries."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kdbench
from kdbench.paths import analyses_dir, cache_dir, configs_dir, leaderboards_dir, runs_dir

ROOT = Path(kdbench.__file__).parent.parent
CHECKOUT = (ROOT / "pyproject.toml").is_file()
in_checkout = pytest.mark.skipif(not CHECKOUT, reason="needs the checkout")

# What must answer at once: neither torch nor transformers may be imported.
WITHOUT_TORCH = (
    "errors paths strict config registry record evidence per_prompt estimators counterfactuals intervals "
    "compare cost board cost_report cost_figure cli commands __main__ worlds.tables worlds.catalogue "
    "worlds.truth"
).split()


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_modules_that_answer_at_once_do_not_import_torch(module: str) -> None:
    code = f"import sys, kdbench.{module}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What each module of the spine may import of the package; what is not listed may import anything.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "paths": set(),
    "strict": {"errors"},
    "config": {"errors", "paths", "strict", "registry"},
    "registry": {"errors", "paths", "distiller", "task"},
    "cost": {"record"},
    "losses": {"predict", "distiller", "errors", "clock"},
}


@pytest.mark.parametrize("module", sorted(MAY_IMPORT))
def test_layers(module: str) -> None:
    assert _imports(Path(kdbench.__file__).parent / f"{module}.py") <= MAY_IMPORT[module]


def test_methods_and_tasks_stand_on_the_spine_only() -> None:
    above = {"harness", "stages", "config", "registry", "checks", "gate", "cli", "board"}
    folder = Path(kdbench.__file__).parent
    methods = {path.stem for path in (folder / "distillers").glob("[!_]*.py")}
    for path in (folder / "distillers").glob("*.py"):
        found = _imports(path)
        assert not found & (above | {"task", "tasks"}), path.name
        others = {name.removeprefix("distillers.") for name in found if name.startswith("distillers.")}
        assert not others & methods, f"{path.name} imports another method"
    for path in (folder / "tasks").glob("*.py"):
        assert not _imports(path) & above, path.name


def _imports(path: Path) -> set[str]:
    """Modules of kdbench that a file imports, without `kdbench.`; those below distillers in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
            if node.module in ("kdbench", "kdbench.distillers"):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            top, _, rest = module.partition(".")
            if top == "kdbench" and rest:
                found.add(rest if rest.startswith("distillers.") else rest.split(".")[0])
    return found


@in_checkout
def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted += [*project["optional-dependencies"]["track"], *project["optional-dependencies"]["bench"]]
    names = {_name(re.split(r"[<>=\[ ;]", one)[0]) for one in wanted}
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals, f"'{line}' is no exact version"
            assert "+" not in version, f"'{line}' names a local build"
            pins[_name(name)] = version
    assert names <= pins.keys(), f"not pinned: {sorted(names - pins.keys())}"
    assert pins["torch"] == "2.13.0"


def _name(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@in_checkout
def test_the_wheel_carries_analyses_boards_and_configs() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wheel = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["kdbench", "analyses"]
    for name, target in wheel["force-include"].items():
        assert (ROOT / name).is_dir()
        assert target == f"kdbench/_data/{name}"
    assert set(wheel["force-include"]) == {"leaderboards", "configs"}


@in_checkout
def test_nothing_but_nox_in_ci() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    commands = re.findall(r"- run: (.*)", workflow)
    assert commands
    assert all(re.match(r"(pip install nox|nox)\b", command) for command in commands), commands


def test_version_and_marker() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", kdbench.__version__)
    assert (Path(kdbench.__file__).parent / "py.typed").is_file()


def test_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (leaderboards_dir() / "tiny-instruct" / "v1" / "board.toml").is_file()
    assert (configs_dir() / "models" / "tiny" / "teacher.toml").is_file()
    assert analyses_dir().name == "analyses"
    assert runs_dir() == Path("runs")
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("KDBENCH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "kdbench"


def test_paths_in_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a pyproject.toml beside the package, boards and configs are those that the package carries."""
    package = tmp_path / "site-packages" / "kdbench"
    monkeypatch.setattr("kdbench.paths.PACKAGE", package)
    assert leaderboards_dir() == package / "_data" / "leaderboards"
    assert configs_dir() == package / "_data" / "configs"
    assert analyses_dir() == tmp_path / "site-packages" / "analyses"


def test_conftest_makes_what_it_says(tiny_tokenizer, tiny_student, tiny_teacher, causal_batch) -> None:
    import torch
    from conftest import VOCABULARY, same_weights

    text = "Suppose you are a student."
    ids = tiny_tokenizer(text)["input_ids"]
    assert len(tiny_tokenizer) == VOCABULARY
    assert tiny_tokenizer.unk_token_id not in ids
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id == 0
    student = tiny_student()
    assert student.training
    assert student.config.resid_pdrop == 0.1
    assert same_weights(student, tiny_student())
    assert not same_weights(student, tiny_student(seed=2))
    batch = causal_batch([(3, 4), (5, 2)])
    assert batch["input_ids"].shape == (2, 7)
    assert batch["input_ids"][0, 6] == 0
    assert torch.isfinite(tiny_teacher().eval()(batch["input_ids"]).logits).all()
