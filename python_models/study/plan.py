# SPDX-License-Identifier: Apache-2.0
"""What a study file says: which runs there are, and what is compared.

A study is a YAML file of these keys; names of tasks, methods, variants and teachers become parts
of file names::

    about: One line about it.
    source: Where its settings come from.
    seeds: [0, 1, 2]
    settings:               # of every run: any setting of kdci distill, as in a preset
      dataset: fashion-mnist
      teacher: fashion      # one of the teachers below, or what --teacher takes
    teachers:               # optional: trained first and shared; settings of kdci train-teacher
      fashion: {network: lenet5_bn, dataset: fashion-mnist, epochs: 5}
    tasks:                  # optional: settings of each task, as of a teacher and student
      half: {student: lenet5_half_bn}
      same: {student: lenet5_bn}

Methods:
      fast: {preset: demo-fashion, floor: 80}
      dafl: {method: dafl, lr: 0.01, floor: {vanilla: 70}, variants: [vanilla, kdci], seeds: [0]}
    variants:               # the first is the baseline that the others are compared with
      vanilla: {kdci: false}
      kdci: {kdci: true}

There is one run for each task, method, variant and seed. Where several of these give a setting,
the later one of preset, settings, task, method and variant wins. ``floor`` is an accuracy in
percent that every run of the method (or, by its name, of a variant) must reach; ``variants`` and
``seeds`` keep a method to some of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from python_models.config import (
    DistillConfig,
    TrainTeacherConfig,
    check,
    distill_defaults,
    override,
    read_yaml,
    study_paths,
)
from python_models.errors import UserError, unknown_name

KEYS = ("about", "source", "seeds", "settings", "teachers", "tasks", "methods", "variants")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
OF_THE_STUDY = {
    "seed": "give `seeds`",
    "out_dir": "the study makes its own folders",
    "resume": "the study resumes by itself",
    "overwrite": "remove the run's folder instead",
    "data_root": "give --data-root to kdci study",
    "download": "give --download to kdci study",
    "evaluate": "a study compares accuracies",
}
"""Settings that a study decides by itself."""

ConfigT = TypeVar("ConfigT")


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
    """

    name: str
    about: str
    teachers: Mapping[str, TrainTeacherConfig]
    variants: Mapping[str, Mapping[str, Any]]
    cells: tuple[Cell, ...]

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

    def own_teacher(self, cell: Cell) -> str | None:
        """Return the name of the cell's teacher if the study trains it."""
        name = cell.config.task.teacher
        return name if name in self.teachers else None


def find_study(name: str) -> Path:
    """Return a study's file.

    Args:
        name: Of a study that comes with the package, or a YAML file.

    Raises:
        UserError: If there is none.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(
                f"study={name} is not there: give a YAML file or a name of those in "
                "`kdci list studies`"
            )
        return path
    paths = study_paths()
    if name not in paths:
        raise unknown_name("study", name, paths)
    return paths[name]


def load_study(name: str, seeds: Sequence[int] | None = None) -> Study:
    """Read and check a study.

    Args:
        name: As for `find_study`.
        seeds: Only these of its seeds; by default all.

    Returns:
        The study; no dataset or teacher is opened.

    Raises:
        UserError: Naming the file and the key that is wrong, or a seed that is not in it.

    Example:
        >>> study = load_study("mini")
        >>> study.baseline, len(study.entries), len(study.cells)
        ('vanilla', 8, 64)
    """
    path = find_study(name)
    study = _Reader(path, read_yaml(path)).study()
    if seeds is None:
        return study
    known = {cell.seed for cell in study.cells}
    if not seeds or not known.issuperset(seeds):
        raise UserError(
            f"seeds={list(seeds)} must be some of those of {path}: {', '.join(map(str, known))}"
        )
    return replace(study, cells=tuple(cell for cell in study.cells if cell.seed in seeds))


class _Reader:
    """Reads the parts of a study's file; every error begins with its name and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values
        for key in values:
            if key not in KEYS:
                raise UserError(f"{path}: {unknown_name('key', key, KEYS)}")
        for key in ("seeds", "methods", "variants"):
            if key not in values:
                raise UserError(f"{path}: {key} is required")

    def study(self) -> Study:
        seeds = self._seeds()
        common = self._settings("settings", self.values.get("settings"))
        teachers = {
            name: self._teacher(f"teachers: {name}", values)
            for name, values in self._named("teachers").items()
        }
        tasks = {
            name: self._settings(f"tasks: {name}", values)
            for name, values in self._named("tasks").items()
        }
        variants = {
            name: self._settings(f"variants: {name}", values)
            for name, values in self._named("variants").items()
        }
        methods = self._named("methods")
        for kind, found in (("methods", methods), ("variants", variants)):
            if not found:
                raise self._error(kind, "must name at least one")
        cells: list[Cell] = []
        for task, of_task in (tasks or {"": {}}).items():
            for method, values in methods.items():
                layers = [("settings", common), (f"tasks: {task}", of_task)]
                cells += self._cells(task, method, values, layers, variants)
        kept = {name: self._kept_seeds(name, values, seeds) for name, values in methods.items()}
        by_seed = [
            replace(cell, seed=seed, config=override(cell.config, {"seed": seed}, "seeds"))
            for seed in seeds
            for cell in cells
            if seed in kept[cell.method]
        ]
        return Study(
            self.path.stem, str(self.values.get("about", "")), teachers, variants, tuple(by_seed)
        )

    def _cells(
        self,
        task: str,
        method: str,
        values: Any,
        layers: Sequence[tuple[str, Mapping[str, Any]]],
        variants: Mapping[str, Mapping[str, Any]],
    ) -> list[Cell]:
        """Return an entry's cells, with the default seed."""
        key = f"methods: {method}"
        own = dict(self._settings(key, values))
        floors = self._floors(key, own.pop("floor", None), variants)
        chosen = self._chosen(key, own.pop("variants", None), variants)
        own.pop("seeds", None)
        preset, name = own.pop("preset", None), own.pop("method", None)
        if preset is None and name is None:
            raise self._error(key, "must give a `preset` or a `method`")
        try:
            config = distill_defaults(preset, None, name)
        except ValueError as error:  # of the registry too
            raise self._error(key, str(error)) from error
        cells = []
        for variant in chosen:
            found = config
            of_variant = (f"variants: {variant}", variants[variant])
            for source, settings in (*layers, (key, own), of_variant):
                for word in ("preset", "method", "floor"):
                    if word in settings:
                        raise self._error(source, f"{word} belongs to `methods`")
                found = self._override(found, settings, source)
            title = f"{task}/{method}" if task else method
            self._check(f"{title} {variant}", found)
            cells.append(Cell(task, method, variant, 0, found, floors.get(variant)))
        return cells

    def _check(self, title: str, config: DistillConfig[Any]) -> None:
        from python_models.networks import NETWORKS, is_spec

        try:
            check(config)
        except UserError as error:
            raise UserError(f"{self.path}: {title}: {error}") from error
        student = config.task.student
        if not is_spec(student) and student not in NETWORKS:
            raise UserError(f"{self.path}: {title}: {unknown_name('network', student, NETWORKS)}")

    def _seeds(self) -> list[int]:
        seeds = self.values["seeds"]
        if not isinstance(seeds, list) or not seeds:
            raise self._error("seeds", "must be a list of whole numbers")
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise self._error("seeds", f"{seed!r} must be a whole number >= 0")
        if len(set(seeds)) < len(seeds):
            raise self._error("seeds", "names a seed twice")
        return seeds

    def _kept_seeds(self, method: str, values: Any, seeds: Sequence[int]) -> Sequence[int]:
        """Return the seeds that a method is kept to."""
        kept = seeds if values is None else values.get("seeds", seeds)
        if not isinstance(kept, list) or not kept or not all(seed in seeds for seed in kept):
            raise self._error(f"methods: {method}", "seeds must be a list of some of `seeds`")
        return kept

    def _named(self, key: str) -> dict[str, Any]:
        values: dict[str, Any] = self.values.get(key) or {}
        if not isinstance(values, dict):
            raise self._error(key, "must hold lines of the form `name: {setting: value}`")
        folded: dict[str, str] = {}
        for name in values:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise self._error(
                    key,
                    f"the name {name!r} must be letters, digits and . _ + -, as it becomes "
                    "part of file names",
                )
            if name.lower() in folded:
                raise self._error(
                    key, f"{folded[name.lower()]!r} and {name!r} differ in case alone"
                )
            folded[name.lower()] = name
        return values

    def _settings(self, key: str, values: Any, allowed: Sequence[str] = ()) -> dict[str, Any]:
        values = {} if values is None else values
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise self._error(key, "must hold settings, as `name: value`")
        settings: dict[str, Any] = {name.replace("-", "_"): v for name, v in values.items()}
        for name, hint in OF_THE_STUDY.items():
            if name in settings and name not in allowed:
                raise self._error(key, f"{name} is not for a study file: {hint}")
        return settings

    def _teacher(self, key: str, values: Any) -> TrainTeacherConfig:
        settings = self._settings(key, values, allowed=("seed",))
        config = self._override(TrainTeacherConfig(), settings, key)
        if config.dataset is None:
            raise self._error(key, "dataset is required")
        return config

    def _chosen(self, key: str, value: Any, variants: Mapping[str, Any]) -> list[str]:
        if value is None:
            return list(variants)
        if not isinstance(value, list) or not value:
            raise self._error(key, "variants must be a list of names of `variants`")
        for name in value:
            if name not in variants:
                raise self._error(key, str(unknown_name("variant", str(name), variants)))
        baseline = next(iter(variants))
        if baseline not in value:
            raise self._error(key, f"variants must keep the baseline, {baseline!r}")
        return [name for name in variants if name in value]

    def _floors(self, key: str, value: Any, variants: Mapping[str, Any]) -> dict[str, float]:
        if value is None:
            return {}
        floors = value if isinstance(value, dict) else dict.fromkeys(variants, value)
        for name, floor in floors.items():
            if name not in variants:
                raise self._error(key, f"floor: {unknown_name('variant', str(name), variants)}")
            is_number = isinstance(floor, (int, float)) and not isinstance(floor, bool)
            if not is_number or not 0 <= floor <= 100:
                raise self._error(key, f"floor={floor!r} must be an accuracy in percent")
        return {name: float(floor) for name, floor in floors.items()}

    def _override(self, config: ConfigT, values: Mapping[str, Any], key: str) -> ConfigT:
        return override(config, values, f"{self.path}: {key}")

    def _error(self, key: str, text: str) -> UserError:
        return UserError(f"{self.path}: {key}: {text}")
