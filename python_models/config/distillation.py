# SPDX-License-Identifier: Apache-2.0
"""The config of a distillation: built from its layers, and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from python_models.config.files import preset_path, read_settings
from python_models.config.flat import flatten, leaves, override
from python_models.config.schema import DistillConfig, TrainTeacherConfig
from python_models.errors import UserError


def distill_defaults(
    preset: str | None = None, file: Path | None = None, method: str | None = None
) -> DistillConfig[Any]:
    """Return the config that a preset and a file leave to be overridden by flags or arguments.

    Args:
        preset: Name of a preset.
        file: YAML file; wins over the preset.
        method: Method; wins over both.

    Raises:
        UserError: If anything is unknown or of the wrong type.
    """
    from python_models.methods import METHODS

    layers = []
    if preset is not None:
        layers.append((f"preset {preset}", read_settings(preset_path(preset))))
    if file is not None:
        layers.append((str(file), read_settings(file)))
    named = [str(values["method"]) for _, values in layers if "method" in values]
    method = method or (named[-1] if named else "fast")
    if preset is not None and method != (chosen := layers[0][1].get("method", method)):
        raise UserError(f"preset {preset} is for the method {chosen}, not {method}")
    method_class = METHODS.get(method)
    config: DistillConfig[Any] = DistillConfig(settings=method_class.Settings(), method=method)
    config = override(config, method_class.defaults, f"defaults of {method}")
    for source, values in layers:
        config = override(config, {**values, "method": method}, source)
    return config


def distill_config(
    *, preset: str | None = None, config: Path | None = None, **values: Any
) -> DistillConfig[Any]:
    """Build the config of a distillation from flat names, as the command line does.

    Args:
        preset: Name of a preset.
        config: YAML file.
        **values: Any leaf by its name, for example ``method="dafl", kdci=False, g_steps=5``.

    Raises:
        UserError: If anything is unknown or of the wrong type.

    Example:
        >>> distill_config(method="dafl", teacher="runs/teacher", student="lenet5_half", epochs=10)
    """
    defaults = distill_defaults(preset, config, values.get("method"))
    return override(defaults, values, "distill_config")


def default_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat defaults of a run's settings, of its method or of training a teacher."""
    if "method" in settings:
        return flatten(distill_defaults(method=settings["method"]))
    return flatten(TrainTeacherConfig())


def check(config: DistillConfig[Any]) -> None:
    """Refuse values that no run can use, naming them.

    Raises:
        UserError: Naming the first such value.
    """
    compensation = config.compensation
    if config.task.teacher is None:
        raise UserError(
            "teacher is required: --teacher RUN_FOLDER, FILE.safetensors, or with "
            "--teacher-weights the name of a network or package.module:callable"
        )
    if not 1 <= config.task.unlabelled_imbalance < math.inf:
        raise UserError(
            f"unlabelled_imbalance={config.task.unlabelled_imbalance} must be >= 1 and finite"
        )
    training = config.training
    if training.nesterov and not training.momentum > 0:
        raise UserError(f"nesterov=True needs a momentum above 0, got {training.momentum}")
    if training.cuda_graphs and not training.compile:
        raise UserError("cuda_graphs=True replays what torch.compile makes: give --compile as well")
    if training.ep_steps < 0:
        raise UserError(f"ep_steps={training.ep_steps} must be >= 0")
    # The methods' own settings follow the same naming.
    for name, _, value in leaves(config):
        is_count = name in ("epochs", "num_classes", "channels") or name.endswith(
            ("_steps", "_size", "_dim", "_every")
        )
        if is_count and name != "ep_steps" and value is not None and value < 1:
            raise UserError(f"{name}={value} must be >= 1")
        is_positive = name in ("temperature", "lr") or (name.startswith("lr_") and name != "lr_min")
        if is_positive and value is not None and not value > 0:
            raise UserError(f"{name}={value} must be > 0")
    if 0 < training.ep_steps < training.kd_steps:
        raise UserError(
            f"kd_steps={training.kd_steps} must be <= ep_steps={training.ep_steps}: an epoch holds "
            "whole rounds"
        )
    for name in ("kdci_prototypes", "kdci_components", "kdci_batches"):
        count = getattr(compensation, name)
        if count is not None and count < 1:
            raise UserError(f"{name}={count} must be >= 1")
    for name in ("kdci_attention_temperature", "kdci_init_gain", "kdci_lr_factor"):
        factor = getattr(compensation, name)
        if not 0 < factor < math.inf:
            raise UserError(f"{name}={factor} must be > 0 and finite")
    other = compensation.kdci_dictionary_teacher
    for name in ("kdci_dictionary_weights", "kdci_dictionary_dataset"):
        if other is None and getattr(compensation, name) is not None:
            raise UserError(
                f"{name} belongs to a network of its own: give its name as kdci_dictionary_teacher"
            )
    if other is not None and not compensation.kdci:
        raise UserError(f"kdci_dictionary_teacher={other} needs KDCI: leave it out or give --kdci")
    if not config.output.checkpoint_minutes >= 0:
        raise UserError(f"checkpoint_minutes={config.output.checkpoint_minutes} must be >= 0")
    if config.output.resume and config.output.overwrite:
        raise UserError("resume and overwrite exclude each other: give one of them")
