# SPDX-License-Identifier: Apache-2.0
"""The folder of a study: where its runs are, in which state, and who works on them.

::

    teachers/NAME/                          as of kdci train-teacher
    runs/[TASK/]METHOD/VARIANT-seedN/       as of kdci distill, and besides:
        study.json                          its teachers' weights by hash, versions and commits
        failed.json                         why it failed, where it did
        log.txt                             what it printed
        lock                                locked while a process works in the folder
    results.lock                            locked while a process writes the results

Several processes share the folder without a coordinator: who holds the lock of a run (``flock``)
may work on it. The operating system frees a lock when its process ends, however it ends, so no lock
is ever stale; the empty files stay.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from python_models.checkpoint import remove_temporaries
from python_models.config import DistillConfig, StudyConfig, TrainTeacherConfig, flatten, override
from python_models.errors import UserError
from python_models.reporting import RunFolder
from python_models.schedule import differing_settings
from python_models.study.grid import Cell, Study
from python_models.study.records import (
    DIGESTS,
    locked,
    network_digests,
    read_json,
    with_provenance,
    write_json,
)


@dataclass(frozen=True)
class Job:
    """Something to train: a teacher of the study, or one of its runs.

    Attributes:
        title: Its name for people.
        path: Its folder.
        config: All settings.
        teachers: Names of the study's teachers that it needs.
    """

    title: str
    path: Path
    config: TrainTeacherConfig | DistillConfig[Any]
    teachers: tuple[str, ...] = ()

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
        record = read_json(self._failed)
        return None if record is None else str(record["reason"])

    @property
    def record(self) -> dict[str, Any]:
        """What was written down when it began; empty before."""
        return read_json(self._record) or {}

    @property
    def _failed(self) -> Path:
        return self.path / "failed.json"

    @property
    def _record(self) -> Path:
        return self.path / "study.json"

    def refusal(self) -> str | None:
        """Return why the run in the folder is not the one that the study means, or None."""
        if not self.has_begun:
            return None
        try:
            differing = differing_settings(flatten(self.config), self.folder.config)
        except UserError as error:
            return str(error)
        if isinstance(self.config, DistillConfig):
            record = self.record
            for key, digest in network_digests(self.config).items():
                if digest is not None and record.get(key) not in (digest, None):
                    differing.append(f"the {DIGESTS[key]}'s weights are others now")
        if not differing:
            return None
        return (
            f"{self.path} holds a run of other settings ({', '.join(differing[:3])}): remove it, "
            "or give the study another --out-dir"
        )

    def record_failure(self, reason: str) -> None:
        """Write down why it failed."""
        write_json(self._failed, {"reason": reason})

    def forget_failure(self) -> None:
        """Let it be tried again."""
        self._failed.unlink(missing_ok=True)

    def record_start(self) -> None:
        """Write down what the settings do not say: teachers' weights, and who begins or goes on."""
        assert isinstance(self.config, DistillConfig)
        for file in (self._record, self._failed):
            remove_temporaries(file)
        before = self.record if self.has_begun else {}
        digests = {
            key: before.get(key) or digest for key, digest in network_digests(self.config).items()
        }
        write_json(self._record, {**digests, **with_provenance(before)})

    def locked(self) -> AbstractContextManager[bool]:
        """Return a block within which this process may work on it, if what is yielded is True.

        Raises:
            UserError: If the file system knows no locks.
        """
        return locked(self.path / "lock")


class StudyFolder:
    """The jobs of a study in its folder.

    Args:
        study: The study.
        config: Where it runs, and which seeds are to be run.

    Raises:
        UserError: If the settings for this machine are wrong, or a seed is not in the study.

    Attributes:
        runs: Jobs of all cells, also of seeds that are not to be run here.
    """

    def __init__(self, study: Study, config: StudyConfig) -> None:
        self.study = study
        self.seeds = study.seeds if config.seeds is None else config.seeds
        if not self.seeds or not set(self.seeds) <= set(study.seeds):
            raise UserError(
                f"seeds={list(self.seeds)} must be some of those of the study {study.name}: "
                f"{', '.join(map(str, study.seeds))}"
            )
        self.path = config.out_dir or Path("runs") / f"study-{study.name}"
        machine: dict[str, Any] = {"data_root": config.data_root}
        if config.device is not None:
            machine["device"] = config.device
        self.teachers = {}
        for name, teacher in study.teachers.items():
            path = self.path / "teachers" / name
            settings = override(teacher, {**machine, "out_dir": path}, "kdci study")
            self.teachers[name] = Job(f"teacher {name}", path, settings)
        self.runs: dict[Cell, Job] = {}
        for cell in study.cells:
            path = self.path / "runs" / cell.path
            own = study.own_teachers(cell)
            paths = {setting: str(self.teachers[name].path) for setting, name in own.items()}
            run = override(cell.config, {**machine, "out_dir": path, **paths}, "kdci study")
            self.runs[cell] = Job(cell.title, path, run, tuple(dict.fromkeys(own.values())))

    @property
    def jobs(self) -> list[Job]:
        """All that there is to train for the seeds that are to be run, teachers first."""
        runs = [job for cell, job in self.runs.items() if cell.seed in self.seeds]
        needed = {name for job in runs for name in job.teachers}
        return [*(job for name, job in self.teachers.items() if name in needed), *runs]

    def why_not(self, job: Job) -> str | None:
        """Return why a job that is not done cannot be done either, or None."""
        reason = job.refusal() or job.failure
        if reason is not None:
            return reason
        for name in job.teachers:
            missing = self.why_not(self.teachers[name])
            if missing is not None:
                return f"its teacher {name} failed: {missing}"
        return None

    def is_settled(self, job: Job) -> bool:
        """Whether there is nothing more to do for a job."""
        return job.is_done or self.why_not(job) is not None

    def is_ready(self, job: Job) -> bool:
        """Whether the job's teachers are there."""
        return all(self.teachers[name].is_done for name in job.teachers)
