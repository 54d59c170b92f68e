# SPDX-License-Identifier: Apache-2.0
"""Runs a study: starts its workers, and makes the table when they have finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from python_models.config import DistillConfig, StudyConfig, flatten
from python_models.data import DATASETS, load_labelled
from python_models.errors import Interrupted, UserError
from python_models.methods import METHODS
from python_models.processes import cores, run_beside
from python_models.study.folder import Job, StudyFolder
from python_models.study.markdown import accuracy_table, comparison_table
from python_models.study.plan import load_study
from python_models.study.plots import write_plots
from python_models.study.prior import prior_table
from python_models.study.records import locked, write_text
from python_models.study.results import results, write_results
from python_models.study.table import Comparison, Line, accuracies_of, comparisons, table
from python_models.teacher import resolve_device


@dataclass(frozen=True)
class StudyResult:
    """What a study came to.

    Attributes:
        folder: The study folder, which holds results.csv, health.csv, timings.csv, table.md and the
            plots.
        lines: The table, of all seeds that are done.
        comparisons: Differences between other variants that the study asks for.
        text: The tables as Markdown.
        problems: Runs of the chosen seeds that failed or were refused, and variants that missed
            their floor, with the reason; empty if everything is as the study says.
    """

    folder: Path
    lines: tuple[Line, ...]
    comparisons: tuple[Comparison, ...]
    text: str
    problems: tuple[str, ...]


def run_study(config: StudyConfig) -> StudyResult:
    """Run ``kdci study``: all runs of a study that are not done yet, then its table and plots.

    Args:
        config: Which study, and where.

    Returns:
        The table, and what went wrong.

    Raises:
        UserError: If the study's file or the settings are wrong.
        Interrupted: After Ctrl-C, when the runs in progress are saved.

    Example:
        >>> result = run_study(StudyConfig(study="mini", data_root=Path("data")))
        >>> result.lines[1].difference, result.problems
    """
    study = load_study(config.study)
    folder = StudyFolder(study, config)
    jobs = _jobs(folder, config)
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"out_dir={folder.path} is a file: give a folder")
    if config.download:
        _download(folder, config.data_root)
    _forget_failures(folder)
    left = [job for job in folder.jobs if not folder.is_settled(job)]
    done = len(folder.jobs) - len(left)
    print(f"study {study.name}: {len(folder.jobs)} to train, {done} done, in {folder.path}")
    failed: list[str] = []
    if left:
        arguments = json.dumps(flatten(config))
        commands = {
            f"worker {i + 1}": ["python_models.study.worker", arguments]
            for i in range(min(jobs, len(left)))
        }
        try:
            # By all `jobs`: a run's threads, and with them its bits, do not depend on what is left.
            failed = run_beside(commands, jobs, lambda _: True)
        except KeyboardInterrupt as stop:
            write_results(folder)
            raise Interrupted(f"stopped; {folder.path} goes on with the same command") from stop
    return _conclude(folder, failed)


def _jobs(folder: StudyFolder, config: StudyConfig) -> int:
    names = {
        job.config.training.device
        for job in folder.runs.values()
        if isinstance(job.config, DistillConfig)
    }
    kinds = {resolve_device(name).type for name in names}
    jobs = config.jobs if config.jobs is not None else cores() if kinds == {"cpu"} else 1
    if jobs < 1:
        raise UserError(f"jobs={jobs} must be >= 1")
    return jobs


def _forget_failures(folder: StudyFolder) -> None:
    """Let runs be tried again that failed before; not those that another process is at."""
    for job in folder.jobs:
        if job.failure is not None:
            with job.locked() as is_mine:
                if is_mine:
                    job.forget_failure()


def _download(folder: StudyFolder, data_root: Path) -> None:
    """Download what is not there; name what cannot be, whose runs will say so, and go on."""
    wanted: dict[tuple[str, str], None] = {}
    for job in folder.jobs:
        if isinstance(job.config, DistillConfig):
            task = job.config.task
            images = [task.unlabelled, getattr(job.config.settings, "initial_pool", None)]
            if METHODS.get(job.config.method).needs_labels:
                images.append(task.dataset)
            sources = [(task.dataset, "test"), *((name, "train") for name in images)]
        else:
            sources = [(job.config.dataset, "train"), (job.config.dataset, "test")]
        wanted.update({(str(n), split): None for n, split in sources if n in DATASETS})
    for name, split in wanted:
        try:
            load_labelled(name, split, data_root, download=False)
        except (OSError, ValueError):  # not there, or another process is downloading it
            try:
                with locked(data_root / "download.lock", waits=True):
                    load_labelled(name, split, data_root, download=True)
            except (OSError, ValueError) as error:
                print(f"{error}\nThe study goes on without the {split} split of {name}.")


def _conclude(folder: StudyFolder, failed: list[str]) -> StudyResult:
    write_results(folder)
    study = folder.study
    found = accuracies_of(results(folder))
    lines, others = tuple(table(study, found)), tuple(comparisons(study, found))
    parts = [f"# Study {study.name}", study.about, accuracy_table(lines, study.baseline)]
    parts += [comparison_table(others) if others else "", prior_table(folder)]
    text = "\n\n".join(filter(None, parts)) + "\n"
    write_text(folder.path / "table.md", text)
    write_plots(folder, lines)
    problems = [f"{name} ended early; its message is above" for name in failed]
    problems += _not_done(folder)
    problems += [
        f"{line.entry} {line.variant}: {min(line.accuracies):.2f} % is below the floor of "
        f"{line.floor:g} %"
        for line in lines
        if line.misses_floor
    ]
    return StudyResult(folder.path, lines, others, text, tuple(problems))


def _not_done(folder: StudyFolder) -> list[str]:
    """Return the jobs without a usable result, those with the same reason in one line."""
    by_reason: dict[str, list[Job]] = {}
    for job in folder.jobs:
        reason = folder.why_not(job)
        if reason is None and not job.is_done:
            reason = "is not done"
        if reason is not None:
            by_reason.setdefault(reason, []).append(job)
    found = []
    for reason, jobs in by_reason.items():
        more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
        found.append(f"{jobs[0].title}{more}: {reason}")
    return found
