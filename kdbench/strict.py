"""Dataclasses from tables, strictly: an unknown key or wrong type is refused with its place."""

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from kdbench.errors import UserError, unknown

T = TypeVar("T")


def _inside(where: str, key: object) -> str:
    return f"{where}: {key}" if not where or where.endswith((".toml", ".json")) else f"{where}.{key}"


def _said(value: object) -> str:
    """A value as the user wrote it, with its kind."""
    if isinstance(value, Mapping):
        return "a table"
    text = json.dumps(value, default=str)
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind.get(type(value), type(value).__name__)})"


def _expected(hint: Any) -> str:
    """A type in a user's words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    plain = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "'none'",
    }
    if hint in plain:
        return plain[hint]
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(arg) for arg in args)
    if origin is tuple and Ellipsis not in args:
        return f"a list of {len(args)}: " + ", ".join(_expected(arg) for arg in args)
    if origin in (list, tuple):
        return "a list, each " + _expected(args[0])
    return "a table" if origin is dict or dataclasses.is_dataclass(hint) else str(hint)


def _wrong(hint: Any, value: object, where: str) -> UserError:
    return UserError(f"{where}: expected {_expected(hint)}, given {_said(value)}")


def _read_union(args: tuple[Any, ...], hint: Any, value: object, where: str) -> Any:
    if type(None) in args and (value is None or (value == "none" and str not in args)):
        return None
    rest = [arg for arg in args if arg is not type(None)]
    if len(rest) == 1:
        return read(rest[0], value, where)
    exact = [arg for arg in rest if isinstance(arg, type) and type(value) is arg]
    for arg in exact + rest:
        try:
            return read(arg, value, where)
        except UserError:
            continue
    raise _wrong(hint, value, where)


def read(hint: Any, value: object, where: str) -> Any:
    """`value` as the type `hint`: dataclasses, lists, tuples, tables, literals, unions; int becomes float.

    TOML has no null: the text "none" stands for None where the type allows None and not text.

    Raises: UserError that names the place, what was expected and what was given.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint if isinstance(hint, type) else ()):
            return value
        return from_dict(typing.cast("type[Any]", hint), value, where)
    if origin in (typing.Union, types.UnionType):
        return _read_union(args, hint, value, where)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        if isinstance(value, str):
            raise unknown("choice", value, map(str, args), where)
        raise _wrong(hint, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(hint, value, where)
        return {str(key): read(args[1], one, _inside(where, key)) for key, one in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _wrong(hint, value, where)
        if origin is tuple and Ellipsis not in args:
            if len(value) != len(args):
                raise _wrong(hint, value, where)
            return tuple(
                read(arg, one, f"{where}[{i}]") for i, (arg, one) in enumerate(zip(args, value, strict=True))
            )
        return origin(read(args[0], one, f"{where}[{i}]") for i, one in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise _wrong(hint, value, where)


def _fields(cls: type[Any]) -> dict[str, "dataclasses.Field[Any]"]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init and f.metadata.get("toml", True)}


def from_dict(cls: type[T], data: object, where: str) -> T:
    """The dataclass `cls` from a table, strictly.

    `where` is the place that an error names, for example `board.toml: sizes.full`. A ValueError of the
    class's own `__post_init__` (a value out of range) is reported in the same way.

    Raises: UserError for a key that is not a field (with the nearest), a missing one, or a wrong type.
    """
    if not isinstance(data, Mapping):
        raise _wrong(cls, data, where)
    hints, fields = typing.get_type_hints(cls), _fields(cls)
    for key in data:
        if key not in fields:
            raise unknown("setting", str(key), fields, where)
    for name, one in fields.items():
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise UserError(f"{_inside(where, name)} is missing; expected {_expected(hints[name])}")
    values = {key: read(hints[key], value, _inside(where, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def to_dict(value: Any) -> Any:
    """Dataclasses as tables, tuples as lists, for JSON; `from_dict` is the way back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_dict(getattr(value, name)) for name in _fields(type(value))}
    if isinstance(value, Mapping):
        return {str(key): to_dict(one) for key, one in value.items()}
    return [to_dict(one) for one in value] if isinstance(value, list | tuple) else value


def changed(base: T, changes: Mapping[str, object], where: str) -> T:
    """A copy of the dataclass `base` with some fields read anew from a partial table.

    Raises: UserError, as `from_dict`.
    """
    return from_dict(type(base), {**to_dict(base), **changes}, where) if changes else base


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a table.

    Raises: UserError when it is missing, unreadable or not TOML (with the line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not TOML: {error}") from error
