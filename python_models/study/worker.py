# SPDX-License-Identifier: Apache-2.0
"""A worker process of ``kdci study``: trains what is left of a study, one job after the other.

Any number of workers, started by any number of ``kdci study``, share a study folder. Each job runs
in a child of its own, forked where torch is imported but not yet in use: a crash ends that job
alone, and its peak memory is its own. The child inherits the lock that the worker took, so that the
job stays taken as long as anyone works on it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from python_models.config import DistillConfig, StudyConfig, TrainTeacherConfig, override
from python_models.distill import distill
from python_models.errors import DivergenceError, Interrupted, UserError
from python_models.processes import POLL_S
from python_models.study.folder import Job, StudyFolder
from python_models.study.plan import load_study
from python_models.study.results import write_results
from python_models.teacher import train_teacher

WAIT_S = 0.3
"""Pause of a worker that has nothing to do until others have finished."""
STOPPED = 130


class Stopped(Exception):
    """The worker was told to stop, or who started it is gone."""


class Worker:
    """Works through a study folder.

    Args:
        folder: The study's.
    """

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        self._parent = os.getppid()
        self._stops = 0
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self._stops += 1

    @property
    def _is_stopping(self) -> bool:
        return self._stops > 0 or os.getppid() != self._parent

    def work(self) -> None:
        """Train until all is done, failed or refused, waiting for what others work on.

        Raises:
            Stopped: If it was told to.
        """
        left = self.folder.jobs
        while left:
            has_worked = False
            for job in left:
                self._check_stopped()
                if self._try(job):
                    has_worked = True
                    break  # a teacher may be ready now
            left = [job for job in left if not self.folder.is_settled(job)]
            if left and not has_worked:
                time.sleep(WAIT_S)

    def _check_stopped(self) -> None:
        if self._is_stopping:
            raise Stopped

    def _try(self, job: Job) -> bool:
        """Train a job if nobody else does; return whether it was."""
        if self.folder.is_settled(job) or not self.folder.is_ready(job):
            return False
        with job.locked() as is_mine:
            # Another process may have finished it a moment ago.
            if not is_mine or self.folder.is_settled(job):
                return False
            again = ", going on" if job.folder.checkpoint.is_file() else ""
            say(f"{job.title}: begun{again}")
            self._run(job)
            summary = job.summary
            if summary is None:
                say(f"{job.title}: failed: {job.failure}")
            else:
                say(f"{job.title}: {summary['accuracy']:.2f} % in {summary['seconds']:.0f} s")
            write_results(self.folder)
        return True

    def _run(self, job: Job) -> None:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _train(job)
        told = 0
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if self._is_stopping and told < max(1, self._stops):
                os.kill(child, signal.SIGTERM)  # it saves its state and ends; the second time, ends
                told += 1
            time.sleep(POLL_S)
        code = os.waitstatus_to_exitcode(status)
        self._check_stopped()
        if code == STOPPED:
            raise Stopped
        if not job.is_done and job.failure is None:
            # Without a record it would be tried for ever; where none can be written, this raises.
            end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            job.record_failure(f"its process {end}; see {job.path / 'log.txt'}")


def _train(job: Job) -> NoReturn:
    """Train a job in a forked process, and end that."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        code = _exit_code(job)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # in no case may a child go on as a worker
        os._exit(code)


def _exit_code(job: Job) -> int:
    """Train a job with its output in a file, and record why where it fails."""
    try:
        log = os.open(job.path / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(job)
        return 0
    except KeyboardInterrupt as stop:
        if isinstance(stop, Interrupted):
            print(stop)
        return STOPPED
    except (ValueError, FileNotFoundError, DivergenceError) as error:
        print(f"error: {error}")
        job.record_failure(str(error))
    except BaseException as error:  # SystemExit too, from a module of the user's
        traceback.print_exc()
        job.record_failure(f"{type(error).__name__}: {error}; see {job.path / 'log.txt'}")
    return 1


def train(job: Job) -> None:
    """Train a job from its beginning, or from its checkpoint.

    Raises:
        UserError: If something in its settings is wrong.
        DivergenceError: If a loss became NaN or infinite.
        Interrupted: If it was stopped, when its state is saved.
    """
    resume = job.has_begun
    if isinstance(job.config, TrainTeacherConfig):
        train_teacher(replace(job.config, resume=resume))
        return
    job.record_start()
    config: DistillConfig[Any] = job.config
    distill(replace(config, output=replace(config.output, resume=resume)))


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run a worker.

    Args:
        arguments: The settings of `StudyConfig` as JSON.

    Returns:
        0 when nothing is left to do, 130 when it was stopped.
    """
    # Once, instead of in each child, which takes seconds; neither begins to use a GPU.
    import matplotlib.figure  # noqa: F401
    import torch._dynamo  # noqa: F401  # which torch imports with the first optimiser

    values = json.loads(arguments[0])
    config = override(StudyConfig(study=values["study"]), values, "worker")
    try:
        Worker(StudyFolder(load_study(config.study), config)).work()
    except (Stopped, BrokenPipeError):  # the latter where who started it was killed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return STOPPED
    except UserError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
