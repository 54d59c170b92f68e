# SPDX-License-Identifier: Apache-2.0
"""Results of a study as tidy CSV files: one row a run, or one an epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from python_models.checkpoint import remove_temporaries
from python_models.compensation import num_prototypes
from python_models.report.collect import read_metrics
from python_models.study.folder import Job, StudyFolder
from python_models.study.grid import Cell
from python_models.study.records import MADE_BY, locked, makers, write_text

SIGNS = (
    *("compensation_ratio", "compensation_shift"),
    *("attention_prototypes", "dictionary_entropy"),
)
"""Columns of metrics.csv that say how large KDCI's prior was, and what it was made of."""
Row = dict[str, Any]


def finished(folder: StudyFolder) -> dict[Cell, Job]:
    """Return the runs that are done, of the settings that the study has now."""
    return {
        cell: job
        for cell, job in folder.runs.items()
        if job.is_done and folder.why_not(job) is None
    }


def results(folder: StudyFolder) -> list[Row]:
    """Return the rows of results.csv: runs that are done, in the order of the study.

    A run that went on under another version or commit names all of them, joined by ``+``; none
    where one of them is not known.
    """
    rows = []
    for cell, job in finished(folder).items():
        summary = job.summary or {}
        record = job.record
        config = cell.config
        rows.append(
            {
                "study": folder.study.name,
                "entry": cell.entry,
                "method": config.method,
                "variant": cell.variant,
                "teacher": config.task.teacher,
                "student": config.task.student,
                "dataset": config.task.dataset,
                "seed": cell.seed,
                "accuracy": summary.get("accuracy"),
                "compensated_accuracy": summary.get("compensated_accuracy"),
                "best_accuracy": summary.get("best_accuracy"),
                "teacher_accuracy": summary.get("teacher_accuracy"),
                "steps": summary.get("steps"),
                **{key: _joined(makers(record, key)) for key in MADE_BY},
            }
        )
    return rows


def _joined(names: Sequence[str]) -> str:
    """Return all names, or none where one is not known."""
    return "+".join(names) if all(names) else ""


def timings(folder: StudyFolder) -> list[Row]:
    """Return the rows of timings.csv, which differ however equal the results are."""
    rows = []
    for cell, job in finished(folder).items():
        summary = job.summary or {}
        rows.append(
            {
                "study": folder.study.name,
                "entry": cell.entry,
                "variant": cell.variant,
                "seed": cell.seed,
                "seconds": summary.get("seconds"),
                "peak_memory_mb": summary.get("peak_memory_mb"),
            }
        )
    return rows


def health(folder: StudyFolder) -> list[Row]:
    """Return the rows of health.csv: epochs of the runs with KDCI, and how large its prior was."""
    return [
        {
            "study": folder.study.name,
            "entry": cell.entry,
            "variant": cell.variant,
            "seed": cell.seed,
            "prototypes": num_prototypes(cell.config),
            "epoch": int(epoch["epoch"]),
            **{name: epoch.get(name) for name in SIGNS},
        }
        for cell, job in finished(folder).items()
        if cell.config.compensation.kdci
        for epoch in read_metrics(job.folder.metrics)
    ]


def write_results(folder: StudyFolder) -> None:
    """Write results.csv, health.csv and timings.csv of what is done, atomically.

    One process after the other, so that what an earlier one read never replaces a later one's rows.
    """
    with locked(folder.path / "results.lock", waits=True):
        for name, rows_of in (("results", results), ("health", health), ("timings", timings)):
            rows = rows_of(folder)
            buffer = io.StringIO()
            columns = list(rows[0]) if rows else ["study"]
            writer = csv.DictWriter(buffer, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            remove_temporaries(folder.path / f"{name}.csv")
            write_text(folder.path / f"{name}.csv", buffer.getvalue())
