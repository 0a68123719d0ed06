"""Checkpoints that are whole or refused: tensors as safetensors, the rest as JSON, both under a hash.

A checkpoint is a folder that gets its name by one rename after everything in it is on disk. On loading, its
hashes and the identity of the run are compared; what does not fit is named, never half loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdbench.errors import UserError
from kdbench.processes import Processes


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """The checkpoints of one training, newest kept. `identity` tells them from those of another run."""

    def __init__(self, folder: Path, identity: str, processes: Processes) -> None:
        self.folder, self.identity, self.processes = folder, identity, processes

    def save(
        self, step: int, shared: Mapping[str, Tensor], own: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint: `shared` tensors are alike on all processes, `own` are this process's alone."""
        final, new = self.folder / f"step-{step:08d}", self.folder / f"new-{step:08d}"
        if self.processes.is_main:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            _write(new / "shared.safetensors", shared)
        self.processes.wait()
        _write(new / f"own-{self.processes.rank}.safetensors", own)
        self.processes.wait()
        if self.processes.is_main:
            files = {path.name: _digest(path) for path in sorted(new.iterdir())}
            content = {
                "identity": self.identity,
                "world": self.processes.world,
                "files": files,
                "state": state,
            }
            text = json.dumps(content)
            seal = hashlib.sha256(text.encode()).hexdigest()
            (new / "state.json").write_text(f"{seal}\n{text}\n")
            _sync(new / "state.json")
            _sync(new)
            shutil.rmtree(final, ignore_errors=True)
            new.rename(final)
            _sync(self.folder)
            for old in self.folder.iterdir():
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
        self.processes.wait()

    def newest(self) -> Path | None:
        """Return the folder of the newest complete checkpoint, if there is one."""
        found = sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []
        return found[-1] if found else None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
        """Return (shared, own, state) of the newest checkpoint, or None where there is none.

        Raises: UserError naming a checkpoint that is torn, or belongs to another run or number of processes.
        """
        path = self.newest()
        if path is None:
            return None
        mend = "delete the folder to start this training again"
        try:
            seal, text = (path / "state.json").read_text().split("\n", 1)
            if hashlib.sha256(text.rstrip("\n").encode()).hexdigest() != seal:
                raise UserError(f"checkpoint {path}: state.json is torn or was changed; {mend}")
            content = json.loads(text)
            for name, digest in content["files"].items():
                if _digest(path / name) != digest:
                    raise UserError(f"checkpoint {path}: {name} is torn or was changed; {mend}")
            if content["identity"] != self.identity:
                raise UserError(
                    f"checkpoint {path}: it belongs to another run ({content['identity']}); {mend}"
                )
            if content["world"] != self.processes.world:
                raise UserError(
                    f"checkpoint {path}: it was written by {content['world']} processes, this run has "
                    f"{self.processes.world}; start as many, or {mend}"
                )
            shared = load_file(path / "shared.safetensors")
            own = load_file(path / f"own-{self.processes.rank}.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"checkpoint {path}: cannot be read ({error}); {mend}") from error
        return shared, own, content["state"]


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)
    _sync(path)
