# SPDX-License-Identifier: Apache-2.0
"""Reads run folders and finds the runs to compare: the same seed with and without KDCI."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from python_models.checkpoint import NetworkInfo, read_info
from python_models.config import read_settings
from python_models.errors import UserError
from python_models.reporting import METRICS, RunFolder
from python_models.teacher import ROLES


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder says of its run.

    Attributes:
        folder: The files.
        name: The folder's name, with as many parents as tell it from the others.
        settings: The resolved settings, by flat name.
        epochs: The lines of metrics.csv: numbers by column, without those that are empty.
        summary: The results, or None where the run has not finished.
    """

    folder: RunFolder
    name: str
    settings: Mapping[str, Any]
    epochs: Sequence[Mapping[str, float]]
    summary: Mapping[str, Any] | None

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.settings["method"])

    @property
    def has_kdci(self) -> bool:
        """Whether it was trained with KDCI."""
        return bool(self.settings.get("kdci", True))

    @property
    def label(self) -> str:
        """``KDCI`` or ``vanilla``."""
        return "KDCI" if self.has_kdci else "vanilla"

    @property
    def accuracy(self) -> float | None:
        """Of the student when last measured, in percent; None where it never was."""
        if self.summary is not None:
            return self.result("accuracy")
        measured = self.column("accuracy")
        return measured[-1][1] if measured else None

    @property
    def steps(self) -> int:
        """Student steps made."""
        return int(self.epochs[-1].get("step", 0))

    @property
    def weights(self) -> Path | None:
        """File of the trained student, where it is there."""
        path = self.folder.weights("student")
        return path if path.is_file() else None

    @property
    def losses(self) -> list[str]:
        """Columns of loss terms."""
        columns = dict.fromkeys(name for row in self.epochs for name in row)
        return [name for name in columns if name not in METRICS]

    def column(self, name: str) -> list[tuple[int, float]]:
        """Return the pairs of epoch and value where a column was recorded."""
        return [(int(row["epoch"]), row[name]) for row in self.epochs if name in row]

    def result(self, name: str) -> float | None:
        """Return a number of the summary, or None where it was not recorded."""
        value = (self.summary or {}).get(name)
        return None if value is None else float(value)


@dataclass(frozen=True)
class Difference:
    """A setting that two runs of a pair do not share."""

    setting: str
    vanilla: Any
    kdci: Any

    @property
    def is_expected(self) -> bool:
        """Whether it belongs to KDCI."""
        return self.setting.startswith("kdci")


@dataclass(frozen=True)
class Comparison:
    """A pair of runs, or one run that has no partner.

    Attributes:
        vanilla: The run without KDCI.
        kdci: The run with KDCI.
        differences: Settings in which they differ.
    """

    vanilla: Run | None = None
    kdci: Run | None = None
    differences: tuple[Difference, ...] = ()

    @property
    def runs(self) -> list[Run]:
        """The runs that there are, vanilla first."""
        return [run for run in (self.vanilla, self.kdci) if run is not None]

    @property
    def title(self) -> str:
        """Method, student, seed and the folders."""
        settings = self.runs[0].settings
        names = " and ".join(run.name for run in self.runs)
        return f"{settings['method']}, seed {settings.get('seed')} ({names})"

    @property
    def recipe(self) -> tuple[Any, ...]:
        """What pairs have in common that differ in their seed alone."""
        settings = (self.kdci or self.runs[0]).settings
        varying = ("seed", "data_root", "device")
        shared = sorted((name, str(v)) for name, v in settings.items() if name not in varying)
        return (*shared, *((d.setting, str(d.vanilla), str(d.kdci)) for d in self.differences))


@dataclass(frozen=True)
class Task:
    """What was distilled, as far as the runs say.

    Attributes:
        dataset: Name of the dataset.
        num_classes: Number of classes.
    """

    dataset: str | None
    num_classes: int | None


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read run folders.

    Returns:
        The runs, and notes on folders that were passed over: those of teachers.

    Raises:
        UserError: If a folder holds no run or a damaged one, or none is left.
    """
    if not paths:
        raise UserError("runs is required: give one or more run folders of kdci distill")
    distinct = list({path.resolve(): path for path in paths}.values())
    names = _short_names(distinct)
    runs, notes = [], []
    for path, name in zip(distinct, names, strict=True):
        settings = _read_settings(path)
        if "method" not in settings and "network" in settings:
            notes.append(f"{path} holds a teacher's training, which is no part of the report")
            continue
        runs.append(_read_run(path, name, settings))
    if not runs:
        raise UserError(f"no run of kdci distill was given: {'; '.join(notes)}")
    return runs, notes


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return each folder's name with as many parents as make all names differ."""
    whole = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in whole)):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in whole]


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        kind = "is a file" if path.exists() else "is not there"
        raise UserError(f"run={path} {kind}: give the folder of a run")
    if not (path / "config.yaml").is_file():
        inside = sorted(str(file.parent) for file in path.glob("*/config.yaml"))
        hint = f": did you mean {' '.join(inside)}?" if inside else ": give the folder of a run"
        raise UserError(f"run={path} holds no run (no config.yaml){hint}")
    settings = read_settings(path / "config.yaml")
    if not ({"method", "network"} & set(settings)):
        raise UserError(f"{path / 'config.yaml'} names no method: it is not that of a run")
    return settings


def _read_run(path: Path, name: str, settings: Mapping[str, Any]) -> Run:
    folder = RunFolder(path, resume=True, overwrite=False)
    summary = _read_summary(folder.summary) if folder.summary.exists() else None
    return Run(folder, name, settings, read_metrics(folder.metrics), summary)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read a run's metrics.csv: numbers by column, a line an epoch, without those that are empty.

    Raises:
        UserError: If it is missing or damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} has no metrics.csv: its run has not finished an epoch yet"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    rows = []
    reader = csv.DictReader(text.splitlines())
    for number, line in enumerate(reader, start=2):
        row = {}
        for column, cell in line.items():
            if column is None or cell is None:
                raise UserError(
                    f"{path} is damaged: line {number} has another length than the first"
                )
            if cell == "":
                continue
            try:
                row[column] = float(cell)
            except ValueError as error:
                raise UserError(
                    f"{path} is damaged: line {number}, column {column} holds {cell!r}, no number"
                ) from error
        if not math.isfinite(row.get("epoch", math.nan)):
            raise UserError(f"{path} is damaged: line {number} has no epoch")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is damaged: it holds no epoch")
    return rows


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no results by name")
    for name in ("accuracy", "teacher_accuracy", "seconds", "peak_memory_mb"):
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{path} is damaged: {name} is {value!r}, no number")
    return values


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Pair each KDCI run with the vanilla run of its method, networks and seed.

    Where there are several vanilla runs it is the one with the fewest other settings; one vanilla
    run may be the partner of several KDCI runs. Runs without a partner stand alone, at the end.
    """
    vanilla = [run for run in runs if not run.has_kdci]
    pairs, alone = [], []
    for run in runs:
        if not run.has_kdci:
            continue
        partners = [other for other in vanilla if _identity(other) == _identity(run)]
        if partners:
            nearest = min(partners, key=lambda other: len(_differences(other, run)))
            pairs.append(Comparison(nearest, run, tuple(_differences(nearest, run))))
        else:
            alone.append(Comparison(kdci=run))
    paired = [pair.vanilla for pair in pairs]
    alone += [Comparison(vanilla=run) for run in vanilla if run not in paired]
    return pairs + alone


def _identity(run: Run) -> tuple[Any, ...]:
    teacher = Path(str(run.settings.get("teacher")))
    # The same folder may be written in several ways; a network's name is no path.
    where = teacher.resolve() if teacher.exists() else teacher
    return (run.method, run.settings.get("student"), run.settings.get("seed"), where)


def _differences(vanilla: Run, kdci: Run) -> list[Difference]:
    names = dict.fromkeys([*kdci.settings, *vanilla.settings])
    return [
        Difference(name, vanilla.settings.get(name), kdci.settings.get(name))
        for name in names
        if vanilla.settings.get(name) != kdci.settings.get(name)
    ]


def common_task(runs: Sequence[Run]) -> Task:
    """Return the one task of all runs.

    Raises:
        UserError: If there are several, naming a run of each.
    """
    found: dict[str, tuple[Any, Run]] = {}
    for run in runs:
        info = _network_info(run)
        known = {
            "dataset": run.settings.get("dataset") or (info.dataset if info else None),
            "number of classes": info.num_classes if info else None,
        }
        for kind, value in known.items():
            if value is None:
                continue
            first, other = found.setdefault(kind, (value, run))
            if first != value:
                raise UserError(
                    f"the runs are of different tasks: the {kind} is {first} in {other.name} and "
                    f"{value} in {run.name}: make a report of each task"
                )
    dataset, num_classes = (
        found.get(kind, (None,))[0] for kind in ("dataset", "number of classes")
    )
    return Task(dataset, num_classes)


def _network_info(run: Run) -> NetworkInfo | None:
    """Return what the student's file says of itself, or the teacher's where it is not there."""
    if run.weights is not None:
        return read_info(run.weights)
    teacher = Path(str(run.settings.get("teacher")))
    files = [teacher, *(teacher / f"{role}.safetensors" for role in ROLES)]
    file = next((f for f in files if f.suffix == ".safetensors" and f.is_file()), None)
    return None if file is None else read_info(file)
