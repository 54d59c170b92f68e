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
      digits: {network: lenet5_bn, dataset: mnist, epochs: 5}
    tasks:                  # optional: settings of each task, as of a teacher and student
      half: {student: lenet5_half_bn}
      same: {student: lenet5_bn}
    methods:
      fast: {preset: demo-fashion, floor: 80}
      dafl: {method: dafl, lr: 0.01, floor: {vanilla: 70}, variants: [vanilla, kdci], seeds: [0]}
    variants:               # the first is the baseline that the others are compared with
      vanilla: {kdci: false}
      kdci: {kdci: true}
      shuffled: {kdci: true, kdci_dictionary: shuffled}
      of-digits: {kdci: true, kdci_dictionary_teacher: digits}  # a teacher as above
    compare:                # optional: other pairs of variants, the first minus the second
      - [kdci, shuffled]

There is one run for each task, method, variant and seed. Where several of these give a setting,
the later one of preset, settings, task, method and variant wins. ``floor`` is an accuracy in
percent that every run of the method (or, by its name, of a variant) must reach; ``variants`` and
``seeds`` keep a method to some of them.
"""  # noqa: D214, D405, D411  # `methods:` is a key, no section of the docstring

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from python_models.study.grid import Cell, Study, teachers_by_name

KEYS = (
    *("about", "source", "seeds", "settings", "teachers", "tasks"),
    *("methods", "variants", "compare"),
)
MAX_SEED = 2**63 - 1  # of torch
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


def load_study(name: str) -> Study:
    """Read and check a study.

    Args:
        name: As for `find_study`.

    Returns:
        The study; no dataset or teacher is opened.

    Raises:
        UserError: Naming the file and the key that is wrong.

    Example:
        >>> study = load_study("mini")
        >>> study.baseline, len(study.entries), len(study.cells)
        ('vanilla', 8, 64)
    """
    path = find_study(name)
    return _Reader(path, read_yaml(path)).study()


class _Reader:
    """Reads the parts of a study's file; every error begins with its name and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values
        self.teachers: dict[str, TrainTeacherConfig] = {}
        for key in values:
            if key not in KEYS:
                raise UserError(f"{path}: {unknown_name('key', key, KEYS)}")
        for key in ("seeds", "methods", "variants"):
            if key not in values:
                raise UserError(f"{path}: {key} is required")

    def study(self) -> Study:
        seeds = self._seeds()
        common = self._settings("settings", self.values.get("settings"))
        self.teachers = {
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
            name=self.path.stem,
            about=str(self.values.get("about", "")),
            teachers=self.teachers,
            variants=variants,
            cells=tuple(by_seed),
            comparisons=self._comparisons(variants, cells),
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
        for word, value in (("preset", preset), ("method", name)):
            if value is not None and (not isinstance(value, str) or not value):
                raise self._error(key, f"{word}={value!r} must be the name of one")
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
        try:
            check(config)
        except UserError as error:
            raise self._error(title, str(error)) from error
        self._check_network(title, config.task.student)
        for setting, name in teachers_by_name(config).items():
            self._check_teacher(title, setting, name)

    def _check_network(self, key: str, name: str) -> None:
        if not _is_network(name):
            from python_models.networks import NETWORKS

            raise self._error(key, str(unknown_name("network", name, NETWORKS)))

    def _check_teacher(self, key: str, setting: str, name: str) -> None:
        """Refuse a name that can only be meant for a teacher of the study, and is none."""
        path = Path(name)
        is_name = len(path.parts) < 2 and path.suffix != ".safetensors"
        if not self.teachers or name in self.teachers or not is_name:
            return
        if not os.path.exists(name) and not _is_network(name):  # of any text, however long
            raise self._error(key, f"{setting}: {unknown_name('teacher', name, self.teachers)}")

    def _seeds(self) -> list[int]:
        seeds = self.values["seeds"]
        if not isinstance(seeds, list) or not seeds:
            raise self._error("seeds", "must be a list of whole numbers")
        for seed in seeds:
            self._check_seed("seeds", seed)
        if len(set(seeds)) < len(seeds):
            raise self._error("seeds", "names a seed twice")
        return seeds

    def _check_seed(self, key: str, seed: Any) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise self._error(key, f"{seed!r} must be a whole number from 0 to 2**63 - 1")

    def _kept_seeds(self, method: str, values: Any, seeds: Sequence[int]) -> Sequence[int]:
        """Return the seeds that a method is kept to."""
        kept = seeds if values is None else values.get("seeds", seeds)
        if not isinstance(kept, list) or not kept or not all(seed in seeds for seed in kept):
            raise self._error(f"methods: {method}", "seeds must be a list of some of `seeds`")
        return kept

    def _named(self, key: str) -> dict[str, Any]:
        values: dict[str, Any] | None = self.values.get(key)
        if values is None:
            return {}
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
        settings: dict[str, Any] = {}
        for name, value in values.items():
            if (setting := name.replace("-", "_")) in settings:
                raise self._error(key, f"{setting} is given twice, with - and with _")
            settings[setting] = value
        for name, hint in OF_THE_STUDY.items():
            if name in settings and name not in allowed:
                raise self._error(key, f"{name} is not for a study file: {hint}")
        return settings

    def _teacher(self, key: str, values: Any) -> TrainTeacherConfig:
        settings = self._settings(key, values, allowed=("seed",))
        config = self._override(TrainTeacherConfig(), settings, key)
        if config.dataset is None:
            raise self._error(key, "dataset is required")
        self._check_network(key, config.network)
        self._check_seed(f"{key}: seed", config.seed)
        return config

    def _chosen(self, key: str, value: Any, variants: Mapping[str, Any]) -> list[str]:
        if value is None:
            return list(variants)
        if not isinstance(value, list) or not value:
            raise self._error(key, "variants must be a list of names of `variants`")
        self._check_variants(key, value, variants)
        baseline = next(iter(variants))
        if baseline not in value:
            raise self._error(key, f"variants must keep the baseline, {baseline!r}")
        return [name for name in variants if name in value]

    def _check_variants(self, key: str, names: Iterable[Any], variants: Mapping[str, Any]) -> None:
        for name in names:
            if not isinstance(name, str) or name not in variants:
                raise self._error(key, str(unknown_name("variant", str(name), variants)))

    def _comparisons(
        self, variants: Mapping[str, Any], cells: Sequence[Cell]
    ) -> tuple[tuple[str, str], ...]:
        value = self.values.get("compare")
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self._error("compare", "must be a list of pairs, as `- [kdci, shuffled]`")
        for pair in value:
            if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
                raise self._error("compare", f"{pair!r} must be two variants, as [kdci, shuffled]")
            self._check_variants("compare", pair, variants)
            first, second = ({c.entry for c in cells if c.variant == name} for name in pair)
            if first.isdisjoint(second):
                raise self._error("compare", f"no method has both variants of {pair!r}")
        return tuple((first, second) for first, second in value)

    def _floors(self, key: str, value: Any, variants: Mapping[str, Any]) -> dict[str, float]:
        if value is None:
            return {}
        floors = value if isinstance(value, dict) else dict.fromkeys(variants, value)
        self._check_variants(f"{key}: floor", floors, variants)
        for floor in floors.values():
            is_number = isinstance(floor, (int, float)) and not isinstance(floor, bool)
            if not is_number or not 0 <= floor <= 100:
                raise self._error(key, f"floor={floor!r} must be an accuracy in percent")
        return {name: float(floor) for name, floor in floors.items()}

    def _override(self, config: ConfigT, values: Mapping[str, Any], key: str) -> ConfigT:
        return override(config, values, f"{self.path}: {key}")

    def _error(self, key: str, text: str) -> UserError:
        return UserError(f"{self.path}: {key}: {text}")


def _is_network(name: str) -> bool:
    from python_models.networks import NETWORKS, is_spec

    return is_spec(name) or name in NETWORKS
