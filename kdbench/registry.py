"""Distillers, tasks and analyses by name: a name is a file name, and a path to a file is a name too.

Finding names imports nothing; only the three `load_*` functions import what they are asked for.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

from kdbench.errors import UserError, unknown
from kdbench.paths import PACKAGE, analyses_dir

if TYPE_CHECKING:
    from kdbench.distiller import Distiller
    from kdbench.task import Task

Kind = Literal["distillers", "tasks", "analyses"]

_ONE = {"distillers": "method", "tasks": "task", "analyses": "analysis"}

# Modules of the spine that cannot move a number of a run. Every other module of `kdbench` enters the run id,
# so that a new one is hashed until somebody says here that it need not be.
NOT_HASHED = frozenset(
    ["__init__", "__main__", "board", "certify", "checks", "cli", "clock", "commands", "compare", "config",
     "cost", "cost_figure", "cost_report", "counterfactuals", "data", "errors", "estimators", "evidence",
     "flops", "gate", "interventions", "intervals", "jobs", "paths", "per_prompt", "profile",
     "profile_report", "record", "registry", "strict"]
)  # fmt: skip
# Modules that make and score a finished run, but train nothing: a trained stage does not depend on them.
_AFTER_TRAINING = frozenset(["collect", "run_evidence", "runner"])


def folder(kind: Kind) -> Path:
    """The folder whose file names are the names of `kind`."""
    return analyses_dir() if kind == "analyses" else PACKAGE / kind


def names(kind: Kind) -> list[str]:
    """All names of `kind`, sorted; files that begin with an underscore are helpers, not names."""
    return sorted(path.stem for path in folder(kind).glob("*.py") if not path.stem.startswith("_"))


def is_path(name: str) -> bool:
    """Whether `name` is a path to a file rather than the name of something registered."""
    return name.endswith(".py")


def stem(name: str) -> str:
    """The name under which `name` is listed: itself, or the file's name without folder and suffix."""
    return Path(name).stem if is_path(name) else name


def find(kind: Kind, name: str) -> Path:
    """The file behind a name or path.

    Raises: UserError when there is no such file, with the nearest name.
    """
    if is_path(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"{name}: there is no such file")
        return path
    known = names(kind)
    if name not in known:
        raise unknown(_ONE[kind], name, known)
    return folder(kind) / f"{name}.py"


def _line_of(error: BaseException, path: Path) -> str:
    """`file:line` of the deepest place inside `path` that the error passed."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _import_file(path: Path) -> ModuleType:
    """Import a file outside the package, once per path and content."""
    resolved = path.resolve()
    try:
        content = resolved.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(str(resolved).encode() + b"\0" + content).hexdigest()[:12]
    name = f"kdbench_plugin_{digest}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        where = _line_of(error, resolved).replace(str(resolved), str(path))
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{where}: {type(error).__name__}: {reason}") from error
    return module


def _load(kind: Kind, name: str) -> ModuleType:
    path = find(kind, name)
    if is_path(name):
        return _import_file(path)
    package = "analyses" if kind == "analyses" else f"kdbench.{kind}"
    return importlib.import_module(f"{package}.{name}")


def _the_one(module: ModuleType, base: type, what: str, name: str) -> type:
    """The one subclass of `base` that the module defines and does not itself derive further."""
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    own = [
        one
        for one in dict.fromkeys(own)
        if not any(other is not one and issubclass(other, one) for other in own)
    ]
    if len(own) != 1:
        found = ", ".join(sorted(one.__name__ for one in own))
        told = f"defines {len(own)} ({found})" if own else "defines none"
        raise UserError(
            f"{name}: a {what} file holds one class derived from {base.__name__}; this one {told}"
        )
    return own[0]


def load_distiller(name: str) -> "type[Distiller]":
    """The distiller class of a registered method or of a plug-in file.

    Raises: UserError for an unknown name, a missing file, a file without exactly one distiller, and a
    plug-in that raises while it is imported (its exception and line).
    """
    from kdbench.distiller import Distiller

    return cast("type[Distiller]", _the_one(_load("distillers", name), Distiller, "method", name))


def load_task(name: str) -> "type[Task]":
    """The task class of a registered task or of a plug-in file.

    Raises: UserError, as `load_distiller`.
    """
    from kdbench.task import Task

    return cast("type[Task]", _the_one(_load("tasks", name), Task, "task", name))


def load_analysis(name: str) -> ModuleType:
    """The module of an analysis: it has `VERSION` and `analyze(run)`.

    Raises: UserError for an unknown name, and for a plug-in file without these two.
    """
    module: Any = _load("analyses", name)
    if not isinstance(getattr(module, "VERSION", None), int) or not callable(
        getattr(module, "analyze", None)
    ):
        raise UserError(
            f"{name}: an analysis file holds VERSION, a whole number, and a function analyze(run)"
        )
    return cast(ModuleType, module)


def code_files(methods: Iterable[str], tasks: Iterable[str], stage: bool = False) -> list[Path]:
    """The source files that can move a number of a run of these methods and tasks, the stages' included.

    They are the spine but for `NOT_HASHED`, each method's and each task's file, and the helper files
    (`_*.py`) beside them. With `stage`, those that can move a trained stage.
    """
    without = NOT_HASHED | _AFTER_TRAINING if stage else NOT_HASHED
    files = [path for path in PACKAGE.glob("*.py") if path.stem not in without]
    wanted: list[tuple[Kind, str]] = [("distillers", method) for method in methods]
    wanted += [("tasks", task) for task in tasks]
    for kind, name in wanted:
        files.append(find(kind, name))
        if not is_path(name):
            files += folder(kind).glob("_*.py")
    return sorted(set(files))


def _dump(node: object) -> str:
    """A text of a syntax tree that is equal in every Python version: empty fields are left out."""
    if isinstance(node, ast.AST):
        fields = ((name, getattr(node, name, None)) for name in node._fields)
        inner = ",".join(f"{name}={_dump(value)}" for name, value in fields if value not in (None, []))
        return f"{type(node).__name__}({inner})"
    if isinstance(node, list):
        return "[" + ",".join(map(_dump, node)) + "]"
    return repr(node)


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if text and isinstance(cast(Any, first).value.value, str):
                node.body = node.body[1:]
    return tree


def code_hash(paths: Sequence[Path]) -> str:
    """A hash of what source files do: comments, layout and docstrings do not change it, nor do folders.

    Raises: UserError when a file cannot be read or parsed.
    """
    parts = []
    for path in paths:
        try:
            parts.append(path.name + "\0" + _source_hash(path, path.read_bytes()))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


@functools.cache
def _source_hash(path: Path, content: bytes) -> str:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{_line_of(error, path)}: {type(error).__name__}: {error}") from error
    return hashlib.sha256(_dump(_without_docstrings(tree)).encode()).hexdigest()
