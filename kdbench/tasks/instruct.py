"""Instructions with reference responses, read from JSONL: the papers' five sets by name, or any data of that
form.

Source: sets, splits and filters of MiniLLM (Gu et al. 2024, https://arxiv.org/abs/2306.08543), used by
PromptKD (Kim et al. 2024, https://arxiv.org/abs/2402.12842); its files on the hub,
https://huggingface.co/MiniLLM.
Differs: a local data folder may hold other copies of the sets; each copy's checksum enters the task's
revision.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kdbench import data
from kdbench.errors import UserError, unknown
from kdbench.task import InstructionTask, Row, spread

PAPER_SETS = ("dolly", "self-inst", "vicuna", "s-ni", "unni")

_SOURCES = ("auto", "hub", "local", "path")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = (".jsonl", ".json", ".gz")
_ROLES = {"train": ("train",), "dev": ("dev", "valid", "validation"), "test": ("test",)}


class Instruct(InstructionTask):
    """Train, dev and test sets of instructions.

    A set is a name (`kdbench list data`), a JSONL file, a folder with train.jsonl, dev.jsonl and test.jsonl
    (each may be gzipped), or a hub id `owner/name`. Where one file has to serve several of train, dev and
    test, dev is its first tenth (1,000 records at most), test the next tenth (likewise), and train the rest.
    """

    name: ClassVar[str] = "instruct"

    @dataclass
    class Settings(InstructionTask.Settings):
        """Which data; a limit takes that many records, spread evenly over the set (0: all)."""

        train: str = "dolly"
        dev: str = "dolly"
        tests: list[str] = field(
            default_factory=lambda: ["dolly", "self-inst", "vicuna", "s-ni", "unni-short"]
        )
        source: str = (
            "auto"  # of named sets: the local folder if there is one, else the hub; or hub, local, path
        )
        train_limit: int = 0
        dev_limit: int = 0
        test_limit: int = 0  # per test set

    def __init__(self, settings: Any = None, data_root: Path | None = None) -> None:
        super().__init__(settings, data_root)
        if self.settings.source not in _SOURCES:
            raise unknown("source", self.settings.source, _SOURCES, "task instruct")
        self._known = data.known("instruct")
        self._specs: dict[str, str] = {}  # split -> what the user named
        for split in ("train", "dev"):
            if getattr(self.settings, split):
                self._specs[split] = getattr(self.settings, split)
        for spec in self.settings.tests:
            split = f"test/{_label(spec)}"
            if split in self._specs:
                raise UserError(f"task instruct: tests name the set '{_label(spec)}' twice")
            self._specs[split] = spec
        if not self._specs:
            raise UserError("task instruct: no data: name a set in 'train', 'dev' or 'tests'")
        for split, spec in self._specs.items():
            self._locate(spec, _role(split))

    def rules(self) -> list[Any]:
        cfg = self.settings
        return [*super().rules(), cfg.train_limit, cfg.dev_limit, cfg.test_limit]

    def splits(self) -> list[str]:
        return list(self._specs)

    def load(self, split: str) -> list[Row]:
        """Reads one split; `example_id` is the record's number in its set, whatever the limit.

        Raises: UserError for a file that is missing, empty or malformed (with its line), or a hub out of
        reach.
        """
        spec, role = self._specs[split], _role(split)
        place = self._locate(spec, role)
        # the roles that read the same place; those of a hub id differ only once its splits are known
        sharing = {
            _role(other) for other, its in self._specs.items() if self._locate(its, _role(other)) == place
        }
        if isinstance(place, Path):
            rows, digest = data.read_jsonl(place)
            origin = {"path": self._shown(place), "sha256": digest}
        elif isinstance(place, _Hub):
            rows, origin = place.read()
            sharing = {role}
        else:
            rows, origin, sharing = _load_dataset(place, role, sharing)
        rows = [{"example_id": index, **row} for index, row in enumerate(rows)]
        rows = _part(rows, role, sharing, spec)
        self.origins[split] = {**origin, "records": len(rows)}
        limit: int = getattr(self.settings, f"{role}_limit")
        return spread(rows, limit)

    def scored_by(self, split: str) -> str | None:
        one = self._known.get(self._specs[split]) if self.settings.source != "path" else None
        return None if one is None else one.scored_by

    def _shown(self, path: Path) -> str:
        if self.data_root is not None and path.is_relative_to(self.data_root.resolve()):
            return str(path.relative_to(self.data_root.resolve()))
        return path.name

    def _locate(self, spec: str, role: str) -> Path | _Hub | str:
        """Where a set's records for a role lie: a file, a file on the hub, or a data set's hub id.

        Raises: UserError when there is no such set or file, and what to do about it.
        """
        source = self.settings.source
        path = Path(spec).expanduser()
        if source != "path" and spec in self._known:
            return self._named(self._known[spec], role)
        if path.is_file():
            return path.resolve()
        if path.is_dir():
            return _in_folder(path.resolve(), role)
        if source == "path":
            raise UserError(f"task instruct: {role} = '{spec}': there is no such file or folder")
        if source != "local" and _HUB_ID.fullmatch(spec) and path.suffix not in _SUFFIXES:
            return spec
        if path.suffix in _SUFFIXES or "/" in spec:
            raise UserError(f"task instruct: {role} = '{spec}': there is no such file or folder")
        raise unknown("data set", spec, self._known, "task instruct")

    def _named(self, one: data.DataSet, role: str) -> Path | _Hub:
        source, root = self.settings.source, self.data_root
        if role not in one.files:
            raise UserError(f"data set '{one.name}' has no {role} split; it has: {', '.join(one.files)}")
        file = one.files[role]
        if source in ("auto", "local") and file.local is not None and root is not None:
            if not root.is_dir():
                raise UserError(f"data root {root}: there is no such folder; {data.ROOT_HELP}")
            found = data.local_file(root, file.local)
            if found is not None:
                return found.resolve()
            if source == "local" or file.hub_file is None:
                raise UserError(
                    f"data set '{one.name}': {root} lacks {file.local}[.gz]; its source is {one.source}"
                )
        if source != "local" and one.hub is not None and file.hub_file is not None:
            return _Hub(one.hub, file)
        if file.local is None:
            raise UserError(f"data set '{one.name}' is read from the hub only ({one.hub}): {one.note}")
        if root is None:
            raise UserError(f"data set '{one.name}' needs a data folder: {data.ROOT_HELP}")
        raise UserError(f"data set '{one.name}' is not on the hub: use source = \"local\"")


@dataclass(frozen=True)
class _Hub:
    """A file of a hub repository and the part of it that the set uses."""

    repo: str
    file: data.DataFile

    def read(self) -> tuple[list[Row], dict[str, Any]]:
        assert self.file.hub_file is not None
        path, commit = data.fetch(self.repo, self.file.hub_file)
        rows, digest = data.read_jsonl(path)
        origin = {"hub": f"{self.repo}/{self.file.hub_file}", "commit": commit, "sha256": digest}
        return rows[self.file.start : self.file.stop], origin


def _in_folder(folder: Path, role: str) -> Path:
    """The folder's file for a role; train's file where the role has none of its own."""
    for name in (*_ROLES[role], "train"):
        found = data.local_file(folder, f"{name}.jsonl")
        if found is not None:
            return found
    raise UserError(
        f"{folder}: has no {role}.jsonl[.gz]" + ("" if role == "train" else " and no train.jsonl[.gz]")
    )


def _load_dataset(repo: str, role: str, used: set[str]) -> tuple[list[Row], dict[str, Any], set[str]]:
    """The rows of a hub data set for a role, their origin, and which `used` roles read the same split."""
    import datasets

    try:
        splits = datasets.load_dataset(repo)
    except Exception as error:  # network, missing repository, unreadable files: one line for all
        raise data.hub_error(repo, error) from error
    own = {r: next((name for name in names if name in splits), "train") for r, names in _ROLES.items()}
    name = own[role]
    if name not in splits:
        raise UserError(f"{repo}: has no split {role}; it has: {', '.join(splits)}")
    rows = [
        data.instruction_row(item, f"{repo}, {name} record {i}")
        for i, item in enumerate(splits[name], start=1)
    ]
    if not rows:
        raise UserError(f"{repo}: split {name} is empty")
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return rows, {"hub": f"{repo}:{name}", "sha256": digest}, {r for r in used if own[r] == name}


def _role(split: str) -> str:
    return split.split("/")[0]


def _part(rows: list[Row], role: str, roles: set[str], spec: str) -> list[Row]:
    """The role's part of rows that several roles share: dev first, then test, train the rest."""
    if len(roles) < 2:
        return rows
    held = min(1000, len(rows) // 10)
    if held == 0:
        raise UserError(
            f"{spec}: {len(rows)} records are too few to part into {', '.join(sorted(roles))}; it takes 10"
        )
    ends = {"dev": held if "dev" in roles else 0}
    ends["test"] = ends["dev"] + (held if "test" in roles else 0)
    parts = {
        "dev": rows[: ends["dev"]],
        "test": rows[ends["dev"] : ends["test"]],
        "train": rows[ends["test"] :],
    }
    return parts[role]


def _label(spec: str) -> str:
    """The name of a test set in outputs and tables: letters, digits, dot, dash and underscore."""
    name = Path(spec).name
    for suffix in (".gz", ".jsonl", ".json"):
        name = name.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "-", name) or "test"
