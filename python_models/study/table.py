# SPDX-License-Identifier: Apache-2.0
"""Results of a study: a tidy CSV, and the table of paired differences made from it.

Each variant is compared with the first one, the baseline, over pairs of runs that share everything
else: seed, teacher, images and schedule. The interval of the mean difference is Student's t over
the seeds.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from python_models.checkpoint import write_atomically
from python_models.compensation import num_prototypes
from python_models.report.collect import read_metrics
from python_models.study.folder import Job, StudyFolder, read_json
from python_models.study.plan import Cell

CONFIDENCE = 0.95
SIGNS = (
    *("compensation_ratio", "compensation_shift"),
    *("attention_prototypes", "dictionary_entropy"),
)
"""Columns of metrics.csv that say how large KDCI's prior was, and what it was made of."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A variant's accuracy minus the baseline's, over pairs of the same seed.

    Attributes:
        mean: Mean difference in percentage points.
        half_width: Half of the 95 % confidence interval; None with fewer than two pairs.
        better: Pairs in which the variant is more accurate.
        worse: Pairs in which it is less accurate; the others are equal.
        pairs: Number of pairs.
    """

    mean: float
    half_width: float | None
    better: int
    worse: int
    pairs: int


@dataclass(frozen=True)
class Line:
    """A line of the table: a variant of an entry.

    Attributes:
        entry: ``task/method``, or the method.
        variant: Name of the variant.
        planned: Seeds in the study.
        accuracies: Of the runs that are done, in percent.
        difference: From the baseline; None for the baseline itself, or without a pair.
        floor: Accuracy that every run must reach, or None.
    """

    entry: str
    variant: str
    planned: int
    accuracies: tuple[float, ...]
    difference: Difference | None
    floor: float | None

    @property
    def mean(self) -> float | None:
        """Mean accuracy over the seeds."""
        return statistics.fmean(self.accuracies) if self.accuracies else None

    @property
    def misses_floor(self) -> bool:
        """Whether a run that is done is below the floor."""
        return self.floor is not None and any(a < self.floor for a in self.accuracies)


def paired_difference(differences: Sequence[float]) -> Difference:
    """Return the mean of paired differences with Student's 95 % confidence interval.

    Args:
        differences: One for each seed, in percentage points; at least one.

    Example:
        >>> found = paired_difference([1.0, 2.0, 3.0])
        >>> found.mean, round(found.half_width, 3), found.better, found.worse
        (2.0, 2.484, 3, 0)
    """
    count = len(differences)
    half_width = None
    if count > 1:
        from scipy.special import stdtrit  # scipy.stats takes a second to import

        quantile = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2))
        half_width = quantile * statistics.stdev(differences) / math.sqrt(count)
    return Difference(
        statistics.fmean(differences),
        half_width,
        sum(d > 0 for d in differences),
        sum(d < 0 for d in differences),
        count,
    )


def finished(folder: StudyFolder) -> dict[Cell, Job]:
    """Return the runs that are done, of the settings that the study has now."""
    return {
        cell: job
        for cell, job in folder.runs.items()
        if job.is_done and folder.why_not(job) is None
    }


def results(folder: StudyFolder) -> list[Row]:
    """Return the rows of results.csv: runs that are done, in the order of the study."""
    rows = []
    for cell, job in finished(folder).items():
        summary = job.summary or {}
        about = read_json(job.path / "study.json") or {}
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
                "version": about.get("version"),
                "commit": about.get("commit"),
            }
        )
    return rows


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


def prior_table(folder: StudyFolder) -> str:
    """Return how large the prior was at the first and the last epoch as Markdown, mean over seeds.

    Empty where no run with KDCI is done.
    """
    of_variant: dict[tuple[str, str, int], list[Row]] = {}
    for row in health(folder):
        if any(row[sign] is None for sign in SIGNS):
            continue  # of a version that did not record it
        of_variant.setdefault((row["entry"], row["variant"], row["prototypes"]), []).append(row)
    body = []
    for (entry, variant, prototypes), rows in of_variant.items():
        epochs = [row["epoch"] for row in rows]
        ends = [[row for row in rows if row["epoch"] == e] for e in (min(epochs), max(epochs))]

        def mean(sign: str, rows: Sequence[Row]) -> float:
            return statistics.fmean(row[sign] for row in rows)

        ratios = [f"{100 * mean('compensation_ratio', end):.3g}" for end in ends]
        body.append(
            (
                *(entry, variant, str(prototypes), " to ".join(ratios)),
                f"{mean('compensation_shift', ends[-1]):.1e}",
                f"{mean('attention_prototypes', ends[-1]):.1f}",
                f"{statistics.fmean(math.exp(row['dictionary_entropy']) for row in ends[-1]):.1f}",
            )
        )
    if not body:
        return ""
    header = (
        *("entry", "variant", "K", "prior / logits (%)", "shift (nats)"),
        *("attended to", "in the dictionary"),
    )
    return "\n".join(
        [
            *_aligned(header, body),
            "",
            "How large KDCI's prior was: mean |F| by mean |S| at the end of the first and of the "
            "last epoch, then, of the last one, the mean KL by which F changes the softmax, and "
            "how many of the K prototypes the attention and the dictionary's proportions spread "
            "over (exp of their entropies). Means over seeds.",
        ]
    )


def write_results(folder: StudyFolder) -> None:
    """Write results.csv, health.csv and timings.csv of what is done, atomically."""
    files = {"results": results(folder), "health": health(folder), "timings": timings(folder)}
    for name, rows in files.items():
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["study"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder.path / f"{name}.csv", buffer.getvalue())


def table(folder: StudyFolder, rows: Iterable[Mapping[str, Any]]) -> list[Line]:
    """Return the lines of the table.

    Args:
        folder: The study's.
        rows: Those of `results`.
    """
    found = {(row["entry"], row["variant"], row["seed"]): float(row["accuracy"]) for row in rows}
    baseline = folder.study.baseline
    lines = []
    for entry, cells in folder.study.entries.items():
        for variant in dict.fromkeys(cell.variant for cell in cells):
            of_variant = [cell for cell in cells if cell.variant == variant]
            seeds = [c.seed for c in of_variant if (entry, variant, c.seed) in found]
            accuracies = tuple(found[entry, variant, seed] for seed in seeds)
            differences = [
                found[entry, variant, seed] - found[entry, baseline, seed]
                for seed in seeds
                if (entry, baseline, seed) in found
            ]
            compared = variant != baseline and differences
            lines.append(
                Line(
                    entry,
                    variant,
                    len(of_variant),
                    accuracies,
                    paired_difference(differences) if compared else None,
                    of_variant[0].floor,
                )
            )
    return lines


def markdown(folder: StudyFolder, lines: Sequence[Line]) -> str:
    """Return the table as Markdown, aligned so that it reads as plain text too."""
    baseline = folder.study.baseline
    header = (
        "entry",
        "variant",
        "runs",
        "accuracy (%)",
        f"minus {baseline}",
        "95 % interval",
        "better/worse",
        "floor (%)",
    )
    body = [_words(line) for line in lines]
    parts = [f"# Study {folder.study.name}", ""]
    if folder.study.about:
        parts += [folder.study.about, ""]
    parts += [*_aligned(header, body), ""]
    parts.append(
        "Accuracy of the last student on the test images, without compensation, mean over seeds "
        "with its standard deviation. Differences are of pairs that share all but the variant, "
        "in percentage points, their mean with Student's 95 % interval over the seeds."
    )
    if any(line.difference is not None and line.difference.half_width is None for line in lines):
        parts.append("Where there is one pair alone, there is no interval: it takes several seeds.")
    prior = prior_table(folder)
    if prior:
        parts += ["", prior]
    return "\n".join(parts) + "\n"


def _aligned(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]

    def row(words: Sequence[str]) -> str:
        return f"| {' | '.join(w.ljust(n) for w, n in zip(words, widths, strict=True))} |"

    return [row(header), f"|{'|'.join('-' * (n + 2) for n in widths)}|", *map(row, body)]


def _words(line: Line) -> tuple[str, ...]:
    runs = str(len(line.accuracies))
    if len(line.accuracies) < line.planned:
        runs += f" of {line.planned}"
    accuracy = "-" if line.mean is None else f"{line.mean:.2f}"
    if len(line.accuracies) > 1:
        accuracy += f" ± {statistics.stdev(line.accuracies):.2f}"
    mean = interval = signs = "-"
    found = line.difference
    if found is not None:
        mean = f"{found.mean:+.2f}"
        signs = f"{found.better}/{found.worse}"
        if found.half_width is None:
            interval = "one pair"
        else:
            low, high = found.mean - found.half_width, found.mean + found.half_width
            interval = f"{low:+.2f} to {high:+.2f}"
    floor = "-"
    if line.floor is not None:
        state = "missed" if line.misses_floor else "met" if line.accuracies else "no run"
        floor = f"{line.floor:g}: {state}"
    return (line.entry, line.variant, runs, accuracy, mean, interval, signs, floor)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    write_atomically(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))
