# SPDX-License-Identifier: Apache-2.0
"""``kdci demo``: a teacher, and students that never see its data, in a few minutes on a CPU."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from python_models.config import TrainTeacherConfig, distill_config, leaves
from python_models.errors import Interrupted, UserError
from python_models.processes import cores, run_beside
from python_models.reporting import duration

MINI_DATA = "digits"


@dataclass(kw_only=True)
class DemoConfig:
    """What the demo runs on."""

    dataset: Literal["auto", "fashion-mnist", "digits"] = "auto"
    """fashion-mnist, the small digits of scikit-learn, or the first of them that there is."""
    data_root: Path = Path("data")
    """Folder that holds Fashion-MNIST; downloaded to it if it is nowhere."""
    download: bool = True
    """Download Fashion-MNIST if it is nowhere."""
    quick: bool = False
    """Less than a minute on the digits, to see that everything works; too short to learn well."""
    jobs: int | None = None
    """Students to train at a time, each in a process of its own; by default one per CPU core."""
    seed: int = 0
    """Seed of everything random."""
    out_dir: Path = Path("runs/demo")
    """Folder of the demo's runs; those of an earlier demo in it are replaced."""


@dataclass(frozen=True)
class Budget:
    """What is trained on a dataset.

    Attributes:
        teacher: Settings of the teacher's training.
        preset: Preset of the students.
        student: Settings that replace some of the preset's.
        noise: Settings of the student that learns from noise, besides.
    """

    teacher: dict[str, Any]
    preset: str
    student: dict[str, Any]
    noise: dict[str, Any]


BUDGETS = {
    "fashion-mnist": Budget({"epochs": 5, "batch_size": 256}, "demo-fashion", {}, {"epochs": 2}),
    "digits": Budget({"epochs": 40, "batch_size": 64}, "demo-digits", {}, {"epochs": 2}),
    "quick": Budget(
        {"epochs": 6, "batch_size": 64},
        "demo-digits",
        {"epochs": 1, "ep_steps": 60, "warmup": 5, "batch_size": 64, "synthesis_batch_size": 64},
        {"epochs": 1},
    ),
}
NETWORK = "lenet5_bn"


def demo(config: DemoConfig) -> list[dict[str, Any]]:
    """Run ``kdci demo``.

    Returns:
        The rows of the table that it prints.

    Raises:
        UserError: If the data that was asked for is missing.
        Interrupted: After Ctrl-C.
    """
    # Before torch is imported: waiting threads that spin would slow the other processes down.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from python_models.teacher import train_teacher

    begin = time.monotonic()
    dataset = MINI_DATA if config.quick else _find_data(config)
    budget = BUDGETS["quick" if config.quick else dataset]
    print(f"data: {dataset}, used to train and test the teacher and to test the students")
    out_dir = config.out_dir
    teacher = train_teacher(
        TrainTeacherConfig(
            network=NETWORK,
            dataset=dataset,
            data_root=config.data_root,
            crop=0,
            flip=False,
            seed=config.seed,
            device="cpu",
            out_dir=out_dir / "teacher",
            overwrite=True,
            **budget.teacher,
        )
    )
    runs = _student_settings(config, budget, dataset, out_dir)
    jobs = config.jobs or (1 if config.quick else min(len(runs), cores()))
    if jobs < 1:
        raise UserError(f"jobs={jobs} must be >= 1")
    if jobs == 1:
        _run_here(runs)
    else:
        _run_beside(runs, jobs)
    rows: list[dict[str, Any]] = [{"model": f"teacher ({NETWORK})", **teacher}]
    for name, settings in runs.items():
        summary = json.loads((settings["out_dir"] / "summary.json").read_text())
        rows.append({"model": name, **summary})
    _print_table(rows, time.monotonic() - begin, out_dir)
    return rows


def _find_data(config: DemoConfig) -> str:
    """Return the dataset to use, downloading it if there is none."""
    if config.dataset == MINI_DATA:
        return MINI_DATA
    from python_models.data import MissingDataError, load_labelled

    try:
        load_labelled("fashion-mnist", "train", config.data_root, download=config.download)
    except MissingDataError:
        if config.dataset == "fashion-mnist":
            raise
        print(
            "Fashion-MNIST was neither found nor could it be downloaded; using scikit-learn's "
            "digits instead (put it under --data-root, or apt-get install dataset-fashion-mnist)"
        )
        return MINI_DATA
    return "fashion-mnist"


def _student_settings(
    config: DemoConfig, budget: Budget, dataset: str, out_dir: Path
) -> dict[str, dict[str, Any]]:
    """Return the settings of each student; the first two differ in KDCI alone."""
    common: dict[str, Any] = {
        "teacher": str(out_dir / "teacher"),
        "dataset": dataset,
        "data_root": config.data_root,
        "device": "cpu",
        "seed": config.seed,
        "overwrite": True,
        **budget.student,
    }
    # The noise student has the others' settings but fewer steps, which keeps the demo short; the
    # table says how many.
    shared = distill_config(preset=budget.preset).training
    known = {name for name, _, _ in leaves(distill_config(method="noise"))}
    noise = {
        "student": NETWORK,
        "method": "noise",
        "kdci": False,
        "out_dir": out_dir / "noise",
        **{
            name: getattr(shared, name)
            for name in ("ep_steps", "batch_size", "temperature", "optimizer", "lr", "weight_decay")
        },
        **{name: value for name, value in common.items() if name in known},
        **budget.noise,
    }
    data_free = {"preset": budget.preset, **common}
    return {
        "student, vanilla": {**data_free, "kdci": False, "out_dir": out_dir / "vanilla"},
        "student, KDCI": {**data_free, "kdci": True, "out_dir": out_dir / "kdci"},
        "student, uniform noise": noise,
    }


def _run_here(runs: dict[str, dict[str, Any]]) -> None:
    from python_models.distill import distill

    for settings in runs.values():
        distill(distill_config(**settings))


def _run_beside(runs: dict[str, dict[str, Any]], jobs: int) -> None:
    """Run students in processes of their own, `jobs` at a time, and show their lines."""
    commands = {
        name: ["python_models", "distill", *_flags(settings)] for name, settings in runs.items()
    }
    try:
        # The results come in the table.
        failed = run_beside(commands, jobs, lambda line: ": epoch " in line or "rror" in line)
    except KeyboardInterrupt as stop:
        raise Interrupted("stopped; the demo starts from the beginning the next time") from stop
    if failed:
        raise UserError(f"the run of the {failed[0]} failed; its message is above")


def _flags(settings: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def _print_table(rows: list[dict[str, Any]], seconds: float, out_dir: Path) -> None:
    print(f"\n{'model':26}{'accuracy':>10}{'seconds':>10}   learned from")
    sources = {
        "teacher": "labelled training images",
        "student, vanilla": "synthetic images alone",
        "student, KDCI": "synthetic images alone, with KDCI",
        "student, uniform noise": "noise",
    }
    for row in rows:
        source = sources[row["model"].split(" (")[0]]
        if "steps" in row:
            source += f", {row['steps']:,} steps"
        print(f"{row['model']:26}{row['accuracy']:>8.2f} %{row['seconds']:>10.0f}   {source}")
    by_name = {row["model"]: row["accuracy"] for row in rows}
    difference = by_name["student, KDCI"] - by_name["student, vanilla"]
    print(
        f"\nKDCI minus vanilla, same seed: {difference:+.2f} points. One pair of short runs shows "
        "that both work,\nnot which is better: that takes several seeds."
    )
    print(
        "Accuracies are of the last step, on the test images, which the preset's settings were "
        f"chosen on too.\nAll in all {duration(seconds)}."
    )
    print(f"Files, with pictures of the synthetic images: {out_dir}")
