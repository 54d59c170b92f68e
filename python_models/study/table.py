# SPDX-License-Identifier: Apache-2.0
"""What a study's results come to: accuracies and paired differences.

Each variant is compared with the first one, the baseline, and those that the study names with each
other, over pairs of runs that share everything else: seed, teacher, images and schedule. The
interval of the mean difference is Student's t over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from python_models.study.grid import Study

CONFIDENCE = 0.95
Accuracies = Mapping[tuple[str, str], Mapping[int, float]]
"""By entry and variant, then by seed; in percent."""


@dataclass(frozen=True)
class Difference:
    """A variant's accuracy minus that of another one, over pairs of the same seed.

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
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None with fewer than two."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def misses_floor(self) -> bool:
        """Whether a run that is done is below the floor."""
        return self.floor is not None and any(a < self.floor for a in self.accuracies)


@dataclass(frozen=True)
class Comparison:
    """A difference between two variants of an entry.

    Attributes:
        entry: ``task/method``, or the method.
        variant: Name of the variant.
        other: Name of the variant that it is compared with.
        difference: The first one's accuracy minus the other one's.
    """

    entry: str
    variant: str
    other: str
    difference: Difference


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


def accuracies_of(rows: Iterable[Mapping[str, Any]]) -> Accuracies:
    """Return the accuracies in rows of `results`."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        runs = found.setdefault((row["entry"], row["variant"]), {})
        runs[row["seed"]] = float(row["accuracy"])
    return found


def table(study: Study, found: Accuracies) -> list[Line]:
    """Return the lines of the table.

    Args:
        study: The study.
        found: As of `accuracies_of`.
    """
    lines = []
    for entry, cells in study.entries.items():
        for variant in dict.fromkeys(cell.variant for cell in cells):
            of_variant = [cell for cell in cells if cell.variant == variant]
            runs = found.get((entry, variant), {})
            compared = None
            if variant != study.baseline:
                compared = _compared(found, entry, variant, study.baseline)
            lines.append(
                Line(
                    entry,
                    variant,
                    len(of_variant),
                    tuple(runs[cell.seed] for cell in of_variant if cell.seed in runs),
                    compared,
                    of_variant[0].floor,
                )
            )
    return lines


def comparisons(study: Study, found: Accuracies) -> list[Comparison]:
    """Return the differences that the study asks for besides, where an entry has such a pair.

    Args:
        study: The study.
        found: As of `accuracies_of`.
    """
    return [
        Comparison(entry, variant, other, difference)
        for entry in study.entries
        for variant, other in study.comparisons
        if (difference := _compared(found, entry, variant, other)) is not None
    ]


def _compared(found: Accuracies, entry: str, variant: str, other: str) -> Difference | None:
    """Return the difference over the seeds that both variants have, or None without any."""
    ours, theirs = found.get((entry, variant), {}), found.get((entry, other), {})
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return paired_difference(differences) if differences else None
