# SPDX-License-Identifier: Apache-2.0
"""What a study writes down beside its runs, and the locks on its files."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from python_models.checkpoint import write_atomically
from python_models.config import DistillConfig
from python_models.errors import UserError
from python_models.teacher import ROLES

DIGESTS = {
    "teacher_sha256": "teacher",
    "dictionary_teacher_sha256": "dictionary's teacher",
}
"""Keys of study.json for the weights that a run was given, and what they are."""
MADE_BY = ("version", "commit")
"""Keys of study.json for who made a run."""


def network_digests(config: DistillConfig[Any]) -> dict[str, str | None]:
    """Return the SHA-256 of the files of a run's teachers; None where there is no file."""
    task, kdci = config.task, config.compensation
    found = {"teacher_sha256": _network_digest(str(task.teacher), task.teacher_weights)}
    if kdci.kdci_dictionary_teacher is not None:
        found["dictionary_teacher_sha256"] = _network_digest(
            kdci.kdci_dictionary_teacher, kdci.kdci_dictionary_weights
        )
    return found


def _network_digest(source: str, weights: Path | None) -> str | None:
    path = Path(source)
    if path.is_dir():
        files = [path / f"{role}.safetensors" for role in ROLES]
    else:
        files = [path] if weights is None else [weights]
    for file in files:
        if file.is_file():
            status = file.stat()
            return _digest(file, status.st_mtime_ns, status.st_size)
    return None


@functools.lru_cache(maxsize=64)
def _digest(path: Path, _changed: int, _size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.lru_cache(maxsize=1)
def provenance() -> dict[str, str]:
    """Return the version of the package and, in a clone, the commit; else an empty string."""
    try:
        version = metadata.version("kdci_ext")
    except metadata.PackageNotFoundError:
        version = ""
    root = Path(__file__).resolve().parents[2]
    commit = ""
    if (root / ".git").exists():
        try:
            words = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=7")
            commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            commit = ""
    return {"version": version, "commit": commit.strip()}


def with_provenance(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return who made a run: what its record says, and this package where it is another one."""
    return {
        key: list(dict.fromkeys([*makers(record, key), now])) for key, now in provenance().items()
    }


def makers(record: Mapping[str, Any], key: str) -> Sequence[str]:
    """Return the versions or commits by which a run was made, in their order."""
    found = record.get(key, [])
    return [found] if isinstance(found, str) else found  # of older versions: one text


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds, or None where there is none.

    Raises:
        UserError: If it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; remove its folder") from error
    return found


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    write_atomically(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))


@contextmanager
def locked(path: Path, *, waits: bool = False) -> Iterator[bool]:
    """Within the block this process alone has a lock, if what is yielded is True.

    Args:
        path: The lock's file; it and its folder are made.
        waits: Wait for the lock; else False is yielded where another process has it.

    Raises:
        UserError: If the file cannot be made, or its file system knows no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot make {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        except OSError as error:
            raise UserError(
                f"cannot lock {path} ({error.strerror}): its folder must be on a file system with "
                "flock; NFS needs its locks on"
            ) from error
        else:
            yield True
    finally:
        # Not LOCK_UN: a child that outlives this process goes on holding the lock.
        os.close(handle)
