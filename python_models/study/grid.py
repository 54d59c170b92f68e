# SPDX-License-Identifier: Apache-2.0
"""A study as a grid of runs: its cells, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from python_models.config import DistillConfig, TrainTeacherConfig


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a study.

    Attributes:
        task: Name of its task; empty in a study without tasks.
        method: Name of its method in the study.
        variant: Name of its variant.
        seed: Its seed.
        config: Settings, those apart that depend on the machine; the teacher is as in the file.
        floor: Accuracy in percent that it must reach, or None.
    """

    task: str
    method: str
    variant: str
    seed: int
    config: DistillConfig[Any]
    floor: float | None

    @property
    def entry(self) -> str:
        """What its variants and seeds share: ``task/method``, or the method."""
        return f"{self.task}/{self.method}" if self.task else self.method

    @property
    def path(self) -> str:
        """Its folder below that of all runs."""
        return f"{self.entry}/{self.variant}-seed{self.seed}"

    @property
    def title(self) -> str:
        """Its name for people."""
        return f"{self.entry} {self.variant} seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study that was read and checked.

    Attributes:
        name: The file's name without its ending.
        about: What it is about.
        teachers: Settings of the teachers that it trains, by name.
        variants: Settings of each variant; the first is the baseline.
        cells: All runs, in the order in which they are begun: seed by seed, so that a study that
            is stopped has whole pairs.
        comparisons: Pairs of variants that are compared besides, the first minus the second.
    """

    name: str
    about: str
    teachers: Mapping[str, TrainTeacherConfig]
    variants: Mapping[str, Mapping[str, Any]]
    cells: tuple[Cell, ...]
    comparisons: tuple[tuple[str, str], ...] = ()

    @property
    def baseline(self) -> str:
        """Name of the variant that others are compared with."""
        return next(iter(self.variants))

    @property
    def entries(self) -> dict[str, list[Cell]]:
        """The cells of each entry, in the order of the file."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.entry, []).append(cell)
        return found

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds."""
        return tuple(dict.fromkeys(cell.seed for cell in self.cells))

    def own_teachers(self, cell: Cell) -> dict[str, str]:
        """Return the study's teachers that a cell needs: setting and name."""
        return {
            setting: name
            for setting, name in teachers_by_name(cell.config).items()
            if name in self.teachers
        }


def teachers_by_name(config: DistillConfig[Any]) -> dict[str, str]:
    """Return a run's teachers by setting, those apart that are a network with a weights file."""
    task, kdci = config.task, config.compensation
    given = {
        "teacher": (task.teacher, task.teacher_weights),
        "kdci_dictionary_teacher": (kdci.kdci_dictionary_teacher, kdci.kdci_dictionary_weights),
    }
    return {
        setting: name
        for setting, (name, weights) in given.items()
        if name is not None and weights is None
    }
