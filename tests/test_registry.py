"""Names are file names; plug-in files; what enters the code hash."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdbench import registry
from kdbench.errors import UserError
from kdbench.paths import PACKAGE

PLUGIN = '''
from dataclasses import dataclass

from kdbench.distiller import Distiller


class Mine(Distiller):
    """Mine."""

    @dataclass
    class Config:
        temperature: float = 1.0

    def loss(self, batch, step):
        return self.student.weight.sum()
'''


def plugin(tmp_path: Path, text: str, name: str = "my_method.py") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        registry.load_distiller(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_come_from_files_and_import_nothing() -> None:
    code = (
        "import sys; from kdbench import registry\n"
        "for kind in ('distillers', 'tasks', 'analyses'): assert isinstance(registry.names(kind), list)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {"sft", "kd"} <= set(registry.names("distillers"))
    assert "tiny_instruct" in registry.names("tasks")
    assert not [
        name
        for kind in ("distillers", "tasks", "analyses")
        for name in registry.names(kind)
        if name[0] == "_"
    ]


@pytest.mark.parametrize("name", registry.names("distillers"))
def test_every_method_loads(name: str) -> None:
    cls = registry.load_distiller(name)
    assert cls.__module__ == f"kdbench.distillers.{name}"


@pytest.mark.parametrize("name", registry.names("tasks"))
def test_every_task_loads(name: str) -> None:
    cls = registry.load_task(name)
    assert cls.__module__ == f"kdbench.tasks.{name}"
    assert cls.name == name


@pytest.mark.parametrize("name", registry.names("analyses"))
def test_every_analysis_loads(name: str) -> None:
    assert registry.load_analysis(name).VERSION >= 1


def test_unknown_names() -> None:
    near = r"no method 'sftt'. Did you mean 'sft'\? Known: .*sft"
    with pytest.raises(UserError, match=near):
        registry.load_distiller("sftt")
    with pytest.raises(UserError, match=r"no task 'tiny-instruct'. Did you mean 'tiny_instruct'\?"):
        registry.load_task("tiny-instruct")
    with pytest.raises(UserError, match="no analysis 'nothing_like_it'"):
        registry.load_analysis("nothing_like_it")
    with pytest.raises(UserError, match="no method '_divergence'"):
        registry.load_distiller("_divergence")


def test_a_plugin_is_loaded_like_a_registered_method(tmp_path: Path) -> None:
    path = plugin(tmp_path, PLUGIN)
    cls = registry.load_distiller(path)
    assert cls.__name__ == "Mine"
    assert cls.Config().temperature == 1.0
    assert registry.load_distiller(path) is cls, "the same content is imported once"
    plugin(tmp_path, PLUGIN.replace("1.0", "2.0"))
    assert registry.load_distiller(path).Config().temperature == 2.0, "another content is another module"
    assert registry.stem(path) == "my_method"
    assert registry.stem("sft") == "sft"


def test_a_plugin_with_a_base_class_of_its_own(tmp_path: Path) -> None:
    text = PLUGIN + "\nclass Final(Mine):\n    pass\n"
    assert registry.load_distiller(plugin(tmp_path, text)).__name__ == "Final"


def test_plugins_that_are_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.py")
    assert refusal(missing) == f"{missing}: there is no such file"
    assert "defines none" in refusal(plugin(tmp_path, "x = 1\n"))
    assert "defines none" in refusal(
        plugin(tmp_path, "from kdbench.distillers.sft import *\nfrom kdbench.distiller import Distiller\n")
    )
    two = PLUGIN + "\nclass Other(Distiller):\n    pass\n"
    assert "defines 2 (Mine, Other)" in refusal(plugin(tmp_path, two))
    path = plugin(tmp_path, "import math\n\n\ndef f():\n    return 1 / 0\n\n\nf()\n")
    assert refusal(path) == f"{path}:5: ZeroDivisionError: division by zero"
    path = plugin(tmp_path, "import there_is_no_such_module\n")
    assert refusal(path) == f"{path}:1: ModuleNotFoundError: No module named 'there_is_no_such_module'"
    path = plugin(tmp_path, "x = 1\ndef f(:\n")
    assert refusal(path) == f"{path}:2: SyntaxError: invalid syntax"
    path = plugin(tmp_path, "raise SystemExit(3)\n")
    assert refusal(path) == f"{path}:1: SystemExit: 3"
    folder = tmp_path / "folder.py"
    folder.mkdir()
    assert "there is no such file" in refusal(str(folder))


def test_analysis_files_that_are_refused(tmp_path: Path) -> None:
    for text in ("VERSION = 1\n", "def analyze(run): ...\n", "VERSION = '1'\ndef analyze(run): ...\n"):
        with pytest.raises(UserError, match="an analysis file holds VERSION"):
            registry.load_analysis(plugin(tmp_path, text, "mine.py"))
    good = plugin(tmp_path, "VERSION = 1\ndef analyze(run): ...\n", "mine.py")
    assert registry.load_analysis(good).VERSION == 1


# ------------------------------------------------------------------------------------------- code hash

CODE = '''"""Module."""
import math  # a comment


class A:
    """Class."""

    def f(self, x: float) -> str:
        """Function."""
        return f"{math.sin(x) * 2:.3f}"
'''


def hash_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "code.py"
    path.write_text(text)
    return registry.code_hash([path])


def test_code_hash_ignores_comments_layout_and_docstrings(tmp_path: Path) -> None:
    base = hash_of(tmp_path, CODE)
    for old, new in [
        ('"""Module."""', '"""Another."""'),
        ('"""Module."""\n', ""),
        ("  # a comment", ""),
        ('    """Class."""\n', ""),
        ('"""Function."""', '"""Another\n\n        one."""'),
        ("\n\n\n", "\n# more\n\n\n\n"),
        (".sin(x) * 2", ".sin( x )*2"),
        ('"{math', "'{math"),
    ]:
        assert old in CODE
        text = CODE.replace(old, new)
        if new == "'{math":
            text = text.replace('3f}"', "3f}'")
        assert hash_of(tmp_path, text) == base, (old, new)


def test_code_hash_sees_what_moves_numbers(tmp_path: Path) -> None:
    hashes = {hash_of(tmp_path, CODE)}
    for old, new in [
        ("* 2", "* 3"),
        ("sin", "cos"),
        (".3f", ".4f"),
        ("x: float", "x: float = 0"),
        ("* 2", "/ 2"),
    ]:
        hashes.add(hash_of(tmp_path, CODE.replace(old, new)))
    assert len(hashes) == 6


def test_a_text_that_is_no_docstring_counts(tmp_path: Path) -> None:
    assert hash_of(tmp_path, "x = 'a'\n") != hash_of(tmp_path, "x = 'b'\n")
    assert hash_of(tmp_path, "x = None\n") != hash_of(tmp_path, "x = []\n")
    assert hash_of(tmp_path, "x = 0\n") != hash_of(tmp_path, "x = False\n")


def test_code_hash_does_not_depend_on_folder_or_order(tmp_path: Path) -> None:
    paths = [tmp_path / "one" / "a.py", tmp_path / "one" / "b.py"]
    paths[0].parent.mkdir()
    paths[0].write_text("x = 1\n")
    paths[1].write_text("x = 2\n")
    base = registry.code_hash(paths)
    assert registry.code_hash(paths[::-1]) == base
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert registry.code_hash([tmp_path / "two" / path.name for path in paths]) == base
    paths[0].write_text("x = 2\n")
    paths[1].write_text("x = 1\n")
    assert registry.code_hash(paths) != base


def test_code_hash_of_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        registry.code_hash([tmp_path / "no.py"])
    with pytest.raises(UserError, match=r"code.py:1: SyntaxError"):
        hash_of(tmp_path, "def f(:\n")


def test_code_files(tmp_path: Path) -> None:
    path = plugin(tmp_path, PLUGIN)
    files = registry.code_files(["sft", path], ["tiny_instruct"])
    names = {file.relative_to(PACKAGE).as_posix() for file in files if file.is_relative_to(PACKAGE)}
    assert {"losses.py", "harness.py", "rollout.py", "distillers/sft.py", "tasks/tiny_instruct.py"} <= names
    assert not {f"{name}.py" for name in registry.NOT_HASHED} & names
    assert "distillers/kd.py" not in names
    assert Path(path) in files
    with pytest.raises(UserError, match="no method 'nope'"):
        registry.code_files(["nope"], [])


def test_no_stale_name_is_exempt_from_the_code_hash() -> None:
    planned = {"gate"}
    assert {path.stem for path in PACKAGE.glob("*.py")} | planned >= registry.NOT_HASHED
