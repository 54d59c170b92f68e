# SPDX-License-Identifier: Apache-2.0
"""Learning rates as functions of progress, so that resuming needs no scheduler's state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from python_models.config import default_settings, read_settings
from python_models.errors import UserError

MAY_CHANGE = frozenset(
    {
        *("out_dir", "resume", "overwrite", "checkpoint_every", "checkpoint_minutes"),
        *("device", "data_root", "tensorboard", "teacher", "teacher_weights"),
    }
)
"""Settings that may differ when a run is resumed. The teacher's file may lie elsewhere: whether it
is the same teacher, the checkpoint tells by its weights."""
MAY_MOVE = frozenset({"kdci_dictionary_teacher", "kdci_dictionary_weights"})
"""Likewise where they were given before and are given now."""


def learning_rate(
    schedule: str,
    base: float,
    done: float,
    *,
    lr_min: float = 0.0,
    milestones: Sequence[float] = (),
) -> float:
    """Return the learning rate at a point of the run.

    Args:
        schedule: ``cosine`` to `lr_min`, ``step`` (a tenth at each milestone) or ``constant``.
        base: Rate at the start.
        done: Fraction of the run in [0, 1].
        lr_min: Rate at the end of the cosine.
        milestones: Fractions of the run.
    """
    if schedule == "cosine":
        return lr_min + (base - lr_min) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "step":
        return base * 0.1 ** sum(done >= milestone for milestone in milestones)
    return base


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of all of an optimiser's parameters, times the `lr_factor` of their group."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_factor", 1.0)


def differing_settings(settings: Mapping[str, Any], saved: Path) -> list[str]:
    """Return how settings differ from those that a run began with.

    Args:
        settings: Flat settings of now.
        saved: The run's config.yaml.

    Returns:
        ``name was ... and is ... now`` for each, without those that may change. A setting that the
        run's version did not have was what is the default now.
    """
    before = {**default_settings(settings), **read_settings(saved)}
    return [
        f"{name} was {before[name]!r} and is {value!r} now"
        for name, value in settings.items()
        if name not in MAY_CHANGE
        and before[name] != value
        and (name not in MAY_MOVE or None in (before[name], value))
    ]


def check_same_run(settings: Mapping[str, Any], saved: Path) -> None:
    """Check that a run is resumed with the settings it began with.

    Args:
        settings: Flat settings of now.
        saved: The run's config.yaml.

    Raises:
        UserError: Naming the first settings that differ.
    """
    differing = differing_settings(settings, saved)
    if differing:
        raise UserError(
            f"{saved.parent} cannot be resumed with other settings: {', '.join(differing[:3])}"
        )
