"""Errors that a user can mend, said in one line; the command line prints them and exits with 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was given, what is known and what to do about it, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Missing(UserError):
    """Data that is not where it was looked for; names the file and its source. Other data sets can go on."""


class OutOfMemory(Exception):
    """More than the memory there is; the message says what to lower. Ends a run with status `failed`."""


class Diverged(Exception):
    """A loss, a gradient or a distribution that is not finite; ends a run with status `diverged`."""


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known name that `given` was probably meant to be; None when nothing is near."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(given.lower(), list(names), n=1)
    return names[found[0]] if found else None


def unknown(what: str, given: str, known: Iterable[str], where: str = "") -> UserError:
    """The error for a name that does not exist: the nearest known name, then all of them.

    `unknown("setting", "promt_length", ["prompt_length"], "method")` reads
    `method: no setting 'promt_length'. Did you mean 'prompt_length'? Known: prompt_length.`
    """
    names = list(known)
    near = nearest(given, names)
    parts = [f"{where}: " if where else "", f"no {what} '{given}'."]
    if near is not None:
        parts.append(f" Did you mean '{near}'?")
    parts.append(f" Known: {', '.join(names)}." if names else " There are none.")
    return UserError("".join(parts))
