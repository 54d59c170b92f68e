# SPDX-License-Identifier: Apache-2.0
"""The folder of a study: where its runs are, in which state, and who works on them.

::

    teachers/NAME/                          as of kdci train-teacher
    runs/[TASK/]METHOD/VARIANT-seedN/       as of kdci distill, and besides:
        study.json                          the teacher's weights by hash, the version and commit
        failed.json                         why it failed, where it did
        log.txt                             what it printed
        lock                                locked while a process works in the folder

Several processes share the folder without a coordinator: who holds the lock of a run (``flock``)
may work on it. The operating system frees a lock when its process ends, however it ends, so no lock
is ever stale; the empty files stay.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from python_models.checkpoint import write_atomically
from python_models.config import DistillConfig, StudyConfig, TrainTeacherConfig, flatten, override
from python_models.errors import UserError
from python_models.reporting import RunFolder
from python_models.schedule import differing_settings
from python_models.study.plan import Cell, Study
from python_models.teacher import ROLES


@dataclass(frozen=True)
class Job:
    """Something to train: a teacher of the study, or one of its runs.

    Attributes:
        title: Its name for people.
        path: Its folder.
        config: All settings.
        teacher: Name of the study's teacher that it needs, or None.
    """

    title: str
    path: Path
    config: TrainTeacherConfig | DistillConfig[Any]
    teacher: str | None

    @property
    def folder(self) -> RunFolder:
        """Its files."""
        return RunFolder.at(self.path)

    @property
    def is_done(self) -> bool:
        """Whether it is trained; the summary is what a run writes last."""
        return self.folder.summary.is_file()

    @property
    def has_begun(self) -> bool:
        """Whether a run is in the folder."""
        return self.folder.config.is_file()

    @property
    def summary(self) -> dict[str, Any] | None:
        """Its results, or None before it is done."""
        return read_json(self.folder.summary)

    @property
    def failure(self) -> str | None:
        """Why it failed when it was last tried, or None."""
        record = read_json(self.path / "failed.json")
        return None if record is None else str(record["reason"])

    def refusal(self) -> str | None:
        """Return why the run in the folder is not the one that the study means, or None."""
        if not self.has_begun:
            return None
        try:
            differing = differing_settings(flatten(self.config), self.folder.config)
        except UserError as error:
            return str(error)
        record = read_json(self.path / "study.json")
        if record is not None and isinstance(self.config, DistillConfig):
            digest = teacher_digest(self.config)
            if digest is not None and record["teacher_sha256"] not in (digest, None):
                differing.append("the teacher's weights are others now")
        if not differing:
            return None
        return (
            f"{self.path} holds a run of other settings ({', '.join(differing[:3])}): remove it, "
            "or give the study another --out-dir"
        )

    def record_failure(self, reason: str) -> None:
        """Write down why it failed."""
        write_json(self.path / "failed.json", {"reason": reason})

    def record_start(self) -> None:
        """Write down what the settings do not say: the teacher's weights, version and commit."""
        assert isinstance(self.config, DistillConfig)
        about = {"teacher_sha256": teacher_digest(self.config), **provenance()}
        write_json(self.path / "study.json", about)

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Within the block this process may work on it, if what is yielded is True.

        Raises:
            UserError: If the file system knows no locks.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot make {self.path / 'lock'}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            except OSError as error:
                raise UserError(
                    f"cannot lock {self.path / 'lock'} ({error.strerror}): the study folder must "
                    "be on a file system with flock; NFS needs its locks on"
                ) from error
            else:
                yield True
        finally:
            # Not LOCK_UN: a child that outlives this process goes on holding the lock.
            os.close(handle)


class StudyFolder:
    """The jobs of a study in its folder.

    Args:
        study: The study.
        config: Where it runs.

    Raises:
        UserError: If the settings for this machine are wrong.
    """

    def __init__(self, study: Study, config: StudyConfig) -> None:
        self.study = study
        self.path = config.out_dir or Path("runs") / f"study-{study.name}"
        machine: dict[str, Any] = {"data_root": config.data_root}
        if config.device is not None:
            machine["device"] = config.device
        self.teachers = {}
        for name, teacher in study.teachers.items():
            path = self.path / "teachers" / name
            settings = override(teacher, {**machine, "out_dir": path}, "kdci study")
            self.teachers[name] = Job(f"teacher {name}", path, settings, None)
        self.runs: dict[Cell, Job] = {}
        for cell in study.cells:
            path = self.path / "runs" / cell.path
            values = {**machine, "out_dir": path}
            own = study.own_teacher(cell)
            if own is not None:
                values["teacher"] = str(self.teachers[own].path)
            run = override(cell.config, values, "kdci study")
            self.runs[cell] = Job(cell.title, path, run, own)

    @property
    def jobs(self) -> list[Job]:
        """All that there is to train, teachers first."""
        needed = {job.teacher for job in self.runs.values()}
        teachers = [job for name, job in self.teachers.items() if name in needed]
        return [*teachers, *self.runs.values()]

    def why_not(self, job: Job) -> str | None:
        """Return why a job that is not done cannot be done either, or None."""
        reason = job.refusal() or job.failure
        if reason is not None or job.teacher is None:
            return reason
        teacher = self.teachers[job.teacher]
        missing = self.why_not(teacher)
        return None if missing is None else f"its teacher {job.teacher} failed: {missing}"

    def is_settled(self, job: Job) -> bool:
        """Whether there is nothing more to do for a job."""
        return job.is_done or self.why_not(job) is not None

    def is_ready(self, job: Job) -> bool:
        """Whether the job's teacher is there."""
        return job.teacher is None or self.teachers[job.teacher].is_done


def teacher_digest(config: DistillConfig[Any]) -> str | None:
    """Return the SHA-256 of the file of a run's teacher, or None where there is none."""
    task = config.task
    path = Path(str(task.teacher))
    if path.is_dir():
        found = [path / f"{role}.safetensors" for role in ROLES]
    else:
        found = [path] if task.teacher_weights is None else [task.teacher_weights]
    for file in found:
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


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, atomically."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
