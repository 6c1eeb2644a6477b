"""Checkpoints that are whole or do not count: written aside, hashed, synced, renamed, and verified before loading.

Files and folders only; knows nothing of trainers or tensors. The hashes find damage, not malice: whoever can write a
checkpoint can write its manifest. What a checkpoint may contain is restricted where it is loaded (`weights_only`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_recipes.errors import RunFolderError
from qlora_recipes.run.files import read_bytes, write_json

MANIFEST = "manifest.json"
WRITING = ".writing"
"""Folder next to the checkpoints in which the next one is made."""
PROGRESS = "progress-{}.json"
"""File of a checkpoint with what one process has done, by its rank."""
_DELETING = ".deleting-"
_NAME = re.compile(r"checkpoint-\d+")
_PICKLED_WEIGHTS = ("adapter_model.bin", "pytorch_model.bin", "training_args.bin")


@dataclass(frozen=True)
class Checkpoint:
    """One resumable state, possibly damaged."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.rpartition("-")[2])

    @property
    def progress(self) -> list[Path]:
        """What each process that saved it has done, in the order of their ranks."""
        found = self.path.glob(PROGRESS.format("*"))
        return sorted(found, key=lambda file: int(file.stem.rpartition("-")[2]))

    def fault(self, *, hashes: bool = True) -> str | None:
        """Return what is wrong with it, or None; without `hashes` only names and sizes are checked."""
        try:
            listed = json.loads(read_bytes(self.path / MANIFEST, fix=""))["files"]
            found = {str(file.relative_to(self.path)): file for file in _files(self.path)}
            return next(_faults(listed, found, hashes), None)
        except FileNotFoundError:
            return f"it has no {MANIFEST}, which is written last"
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return f"its {MANIFEST} cannot be read ({type(error).__name__})"


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a checkpoint except its manifest; hidden files belong to the file system, not to us."""
    return (
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST and not file.name.startswith(".")
    )


def _faults(listed: dict[str, dict[str, Any]], found: dict[str, Path], hashes: bool) -> Iterator[str]:
    """Yield what is wrong; only the first counts, since those after it take for granted that it is not there."""
    if not listed:
        yield f"its {MANIFEST} lists no files"
    for name in sorted(listed.keys() - found.keys()):
        yield f"{name} is missing"
    for name in sorted(found.keys() - listed.keys()):
        yield f"{name} was added to it"
    for name in found:
        if Path(name).name in _PICKLED_WEIGHTS:
            yield f"{name} is a pickle, which can run code when it is opened"
    for name, entry in listed.items():
        size = found[name].stat().st_size
        if size != entry["bytes"]:
            yield f"{name} has {size:,} bytes, expected {entry['bytes']:,}"
        elif hashes and _sha256(found[name]) != entry["sha256"]:
            yield f"{name} has other contents than were written"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints in a folder, the newest first, whole or not."""
    found = [Checkpoint(path) for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def newest_intact(folder: Path) -> tuple[Checkpoint | None, dict[str, str]]:
    """Return the newest checkpoint that is whole, and the name and fault of each newer one, which is passed over."""
    passed_over: dict[str, str] = {}
    for checkpoint in checkpoints(folder):
        fault = checkpoint.fault()
        if fault is None:
            return checkpoint, passed_over
        passed_over[checkpoint.path.name] = fault
    return None, passed_over


def prepare(folder: Path) -> Path:
    """Return an empty folder to write the next checkpoint in; what an interrupted save left there is removed."""
    aside = folder / WRITING
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def publish(written: Path, folder: Path) -> Checkpoint:
    """Give a written checkpoint its manifest, sync all of it to disk, and move it into `folder`.

    A damaged checkpoint of the same name is kept under another name.

    Raises:
        RunFolderError: when an intact checkpoint of that name exists.
    """
    listed = {
        str(file.relative_to(written)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in _files(written)
    }
    write_json(written / MANIFEST, {"files": listed})
    folders = [path for path in written.rglob("*") if path.is_dir()]
    for path in (*_files(written), *folders, written):
        _sync(path)
    final = Checkpoint(folder / written.name)
    if final.path.exists():
        if final.fault() is None:
            raise RunFolderError(f"{final.path} already exists and is intact; a run writes each of its steps once")
        names = (final.path.with_name(f"damaged-{final.path.name}-{i}") for i in range(1, 10_000))
        final.path.rename(next(name for name in names if not name.exists()))
    written.rename(final.path)
    written.parent.rmdir()
    _sync(folder)
    return final


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk, so that a power cut cannot leave its name without its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(folder: Path, limit: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest, the best or a damaged one."""
    for remains in folder.glob(f"{_DELETING}*"):
        shutil.rmtree(remains, ignore_errors=True)
    whole = [checkpoint for checkpoint in checkpoints(folder) if checkpoint.fault(hashes=False) is None]
    if not limit or limit < 1:
        return
    others = [checkpoint for checkpoint in whole[1:] if not best or checkpoint.path.name != best.name]
    kept = len(whole) - len(others)
    for checkpoint in others[max(0, limit - kept) :]:
        gone = checkpoint.path.with_name(_DELETING + checkpoint.path.name)
        checkpoint.path.rename(gone)  # in one step, so that a kill leaves no half checkpoint
        shutil.rmtree(gone)
