"""Data sets by name: where each comes from, what a local folder has of it, and reading its files.

A set is a file `configs/data/<name>.toml`. It names the public source, the licence, and per split the file on
the hub and the file in a local data folder with the sha256 of its (uncompressed) bytes. A local file may be
gzipped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tomllib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdbench.errors import Missing, UserError
from kdbench.paths import configs_dir

Row = dict[str, Any]

NO_LABEL = "-"  # the label of a row on whose class annotators did not agree
ROOT_HELP = "pass --data-root DIR or set KDBENCH_DATA_ROOT"

_MARKED = re.compile(r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:\n?$", re.DOTALL)


@dataclass(frozen=True)
class DataFile:
    """One file of a set: `local` below the data folder, `hub_file` in the set's hub repository, or both.

    `hub_more` names further hub files that follow it. Of a hub file the records `start` to `stop` (None: the
    end) are used; a local file is used whole. `records` and `sha256` are those of the local file that
    published records were made with.
    """

    local: str | None = None
    sha256: str = ""
    records: int = 0
    hub_file: str | None = None
    hub_more: tuple[str, ...] = ()
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class DataSet:
    """A named set; `kind` is "instruct" (JSONL), "text", "classify" or "transfer" (JSONL; on the hub also
    Parquet). `parted_by` parts a text file into documents; `scored_by` names the score that the set is meant
    for where it is not ROUGE-L. `hub_revision` is the branch of the hub's repository, if not the main one;
    `hub_columns` names the column of hub records that has each field, `hub_labels` the class (or tag) that
    each of their labels means.
    """

    name: str
    kind: str
    source: str
    licence: str
    note: str = ""
    hub: str | None = None
    hub_revision: str | None = None
    scored_by: str | None = None
    parted_by: str | None = None
    hub_columns: dict[str, str] = field(default_factory=dict)
    hub_labels: dict[str, str] = field(default_factory=dict)
    files: dict[str, DataFile] = field(default_factory=dict)


def known(kind: str | None = None) -> dict[str, DataSet]:
    """All sets that `configs/data` describes, by name; of one kind if given."""
    sets = {}
    for path in sorted((configs_dir() / "data").glob("*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        files = {split: DataFile(**entry) for split, entry in table.pop("files").items()}
        sets[path.stem] = DataSet(name=path.stem, files=files, **table)
    return {name: one for name, one in sets.items() if kind in (None, one.kind)}


def locate(one: DataSet, part: str, source: str, root: Path | None) -> Path | DataFile:
    """Where a part of a set lies: a file below the data folder, or else what to fetch from the hub.

    `source` is "auto" (the folder if it has the file, else the hub), "hub" or "local".

    Raises: Missing when there is neither, and what to do about it; UserError for a folder that is none.
    """
    file = one.files[part]
    if source != "hub" and root is not None and file.local is not None:
        if not root.is_dir():
            raise UserError(f"data root {root}: there is no such folder; {ROOT_HELP}")
        found = local_file(root, file.local)
        if found is not None:
            return found
        if source == "local" or file.hub_file is None:
            raise Missing(
                f"data set '{one.name}': {root} lacks {file.local}[.gz]; its source is {one.source}"
            )
    if source != "local" and one.hub is not None and file.hub_file is not None:
        return file
    if source == "hub":
        raise Missing(f"data set '{one.name}' is not on the hub: use source = \"local\"")
    told = f"; its file there is {file.local}" if file.local is not None else ""
    raise Missing(f"data set '{one.name}' needs a data folder: {ROOT_HELP}{told}")


def local_file(root: Path, name: str) -> Path | None:
    """The file `name` below `root`, or its gzipped form; None when there is neither."""
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, uncompressed when its name ends in .gz.

    Raises: UserError when it cannot be read.
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from error


def read_text(path: Path) -> tuple[str, str]:
    """The text of a UTF-8 file and the sha256 of its uncompressed bytes.

    Raises: UserError when it cannot be read or is not UTF-8.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: is not UTF-8 text") from error
    return text, hashlib.sha256(content).hexdigest()


def read_jsonl(path: Path) -> tuple[list[Row], str]:
    """The instruction rows of a JSONL file and the sha256 of its uncompressed bytes; blank lines are skipped.

    Raises: UserError with file and line for a line that is not JSON, lacks a field or has one of a wrong
    type; with the file when it holds no record.
    """
    text, digest = read_text(path)
    return [instruction_row(item, where) for where, item in _records(path, text)], digest


def read_labelled(path: Path, hub: DataSet | None = None) -> tuple[list[Row], str, int]:
    """The labelled rows of a JSONL file or, of the hub set `hub`, a Parquet file: `text`, or `text_a` and
    `text_b`, and `label`; the sha256 of its uncompressed bytes; and how many rows without a label were left
    out (`NO_LABEL`: annotators did not agree).

    Raises: UserError as `read_jsonl`.
    """
    if path.suffix == ".parquet":
        digest = hashlib.sha256(read_bytes(path)).hexdigest()
        items = _parquet_records(path)
    else:
        text, digest = read_text(path)
        items = _records(path, text)
    rows = [labelled_row(item if hub is None else _renamed(item, hub), where) for where, item in items]
    kept = [row for row in rows if row["label"] != NO_LABEL]
    return kept, digest, len(rows) - len(kept)


def read_records(path: Path, hub: DataSet | None = None) -> tuple[list[tuple[str, Row]], str]:
    """The records of a JSONL file or, of the hub set `hub`, a Parquet file, each with its place, and the
    sha256 of its uncompressed bytes. Those of the hub have their fields and labels by their names here.

    Raises: UserError as `read_jsonl`.
    """
    if path.suffix == ".parquet":
        digest, items = hashlib.sha256(read_bytes(path)).hexdigest(), _parquet_records(path)
    else:
        text, digest = read_text(path)
        items = _records(path, text)
    found = []
    for where, item in items:
        if not isinstance(item, dict):
            raise UserError(f"{where}: must be a JSON object, is {_type(item)}")
        found.append((where, item if hub is None else _renamed(item, hub)))
    return found, digest


def labelled_row(item: Any, where: str) -> Row:
    """The fields of one record that a classification task reads: `text`, or `text_a` and `text_b`, and
    `label`, a name. White space around a sentence is taken off.

    Raises: UserError, beginning with `where`, for a missing or malformed field.
    """
    if not isinstance(item, dict):
        raise UserError(f"{where}: must be a JSON object, is {_type(item)}")
    names = ("text", "label") if "text" in item else ("text_a", "text_b", "label")
    row: Row = {}
    for name in names:
        if name not in item:
            wanted = "'text'" if not {"text_a", "text_b"} & item.keys() and name != "label" else f"'{name}'"
            raise UserError(f"{where}: lacks the field {wanted}; it has: {', '.join(item) or 'nothing'}")
        if not isinstance(item[name], str):
            raise UserError(f"{where}: '{name}' must be text, is {_type(item[name])}")
        row[name] = item[name].strip()
    if not all(row.values()):
        raise UserError(f"{where}: '{next(name for name in names if not row[name])}' is empty")
    return row


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The JSON value of each line that is not blank, with its place."""
    found = False
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                item = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: is not JSON: {error}") from error
            found = True
            yield where, item
    if not found:
        raise UserError(f"{path}: is empty: it holds no record")


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a Parquet file, each with its place."""
    import datasets

    try:
        table = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # a damaged file has many errors
        raise UserError(f"{path}: cannot be read as Parquet: {type(error).__name__}") from error
    for number, item in enumerate(table, start=1):
        yield f"{path} record {number}", item


def _renamed(item: Any, hub: DataSet) -> Any:
    """A hub record's fields, by their names and labels here."""
    if not isinstance(item, dict):
        return item
    row = {ours: item[theirs] for ours, theirs in hub.hub_columns.items() if theirs in item}
    if "tags" in row:
        row["tags"] = [hub.hub_labels.get(str(one), one) for one in row["tags"]]
    label = str(row.get("label"))
    return {**row, "label": hub.hub_labels[label]} if label in hub.hub_labels else row


def instruction_row(item: Any, where: str) -> Row:
    """The fields of one record that a task reads: instruction, input, output, and `prefix` where there is
    one.

    `input` may be missing or null (no input). A record that has a ready-made `prompt` in place of
    `instruction`, `<n>` for newline, is taken apart at the template's headings.

    Raises: UserError, beginning with `where`, for a missing or malformed field.
    """
    if not isinstance(item, dict):
        raise UserError(f"{where}: must be a JSON object, is {_type(item)}")
    if "instruction" not in item and isinstance(item.get("prompt"), str):
        item = {**item, **_taken_apart(item["prompt"], where)}
    for name in ("instruction", "output"):
        if name not in item:
            raise UserError(f"{where}: lacks the field '{name}'; it has: {', '.join(item) or 'nothing'}")
    row: Row = {
        "instruction": item["instruction"],
        "input": item.get("input") or "",
        "output": item["output"],
    }
    if item.get("prefix"):
        row["prefix"] = item["prefix"]
    for name, value in row.items():
        if name != "output" and not isinstance(value, str):
            raise UserError(f"{where}: '{name}' must be text, is {_type(value)}")
    output = row["output"]
    references = output if isinstance(output, list) else [output]
    if not all(isinstance(one, str) for one in references):
        raise UserError(f"{where}: 'output' must be text or a list of texts, is {_type(output)}")
    if not references or not all(one.strip() for one in references):
        raise UserError(f"{where}: 'output' is empty or has an empty reference")
    if not row["instruction"].strip():
        raise UserError(f"{where}: 'instruction' is empty")
    return row


def sources(
    data_root: Path | None, kinds: Iterable[str] = ("instruct", "text", "classify", "transfer")
) -> list[dict[str, str]]:
    """One row per file of every known set, as text: what `kdbench list data` prints.

    Columns: set, split, records, source, licence, hub, sha256 (of the uncompressed local file), local
    ("present", "other content", "lacking", "no data root", or "hub only"), note.
    """
    wanted = set(kinds)
    table = []
    for one in known().values():
        for split, file in one.files.items() if one.kind in wanted else ():
            table.append(
                {
                    "set": one.name,
                    "split": split,
                    "records": str(file.records) if file.records else "",
                    "source": one.source,
                    "licence": one.licence,
                    "hub": f"{one.hub}/{file.hub_file}" if file.hub_file else "",
                    "sha256": file.sha256,
                    "local": _presence(data_root, file),
                    "note": one.note,
                }
            )
    return table


def fetch(repo: str, name: str, revision: str | None = None) -> tuple[Path, str]:
    """A file of a data set on the hub, downloaded once into its cache: its path and its commit.

    Raises: Missing when it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    try:
        given: dict[str, Any] = {} if revision is None else {"revision": revision}
        path = Path(hf_hub_download(repo, name, repo_type="dataset", **given))
    except Exception as error:  # the hub's errors have no common base, and each means the same here
        raise Missing(str(hub_error(repo, error))) from error
    parts = path.parts
    return path, parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


def hub_error(repo: str, error: Exception) -> UserError:
    """The one line for whatever kept `repo` from being fetched."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return UserError(f"{repo}: cannot be fetched from the hub ({reason}); or {ROOT_HELP} for a local copy")


def _presence(root: Path | None, file: DataFile) -> str:
    if file.local is None:
        return "hub only"
    if root is None:
        return "no data root"
    path = local_file(root, file.local)
    if path is None:
        return "lacking"
    same = not file.sha256 or hashlib.sha256(read_bytes(path)).hexdigest() == file.sha256
    return "present" if same else "other content"


def _taken_apart(prompt: str, where: str) -> Row:
    found = _MARKED.search(prompt.replace("<n>", "\n"))
    if found is None:
        raise UserError(
            f"{where}: lacks the field 'instruction', and its 'prompt' is not in the template's form"
        )
    return {"instruction": found[1], "input": found[2] or ""}


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
