# SPDX-License-Identifier: Apache-2.0
"""Configuration: dataclasses whose leaf names are at once command line flags and YAML keys.

A value is looked up in this order, the first that gives one wins: flag (or Python argument),
``--config`` file, ``--preset``, the method's own defaults, the defaults of the dataclasses. Names
are unique over all groups, so files are flat: ``lr-g`` on the command line is ``lr_g`` in YAML and
in Python. Nothing here imports torch or the methods before it must, so that the command line stays
quick.

The parts: `schema` holds the dataclasses, `flat` turns them into names and values and back, `files`
reads and writes these, `distillation` builds and checks the config of a run.
"""

from python_models.config.distillation import (
    check,
    default_settings,
    distill_config,
    distill_defaults,
)
from python_models.config.files import (
    preset_path,
    preset_paths,
    read_settings,
    read_yaml,
    study_paths,
    write_yaml,
)
from python_models.config.flat import flatten, leaves, override, read_arguments
from python_models.config.schema import (
    Arguments,
    CompensationConfig,
    DistillConfig,
    EvaluateConfig,
    InputConfig,
    OutputConfig,
    ReportConfig,
    StudyConfig,
    TaskConfig,
    TrainingConfig,
    TrainTeacherConfig,
)

__all__ = [
    "Arguments",
    "CompensationConfig",
    "DistillConfig",
    "EvaluateConfig",
    "InputConfig",
    "OutputConfig",
    "ReportConfig",
    "StudyConfig",
    "TaskConfig",
    "TrainTeacherConfig",
    "TrainingConfig",
    "check",
    "default_settings",
    "distill_config",
    "distill_defaults",
    "flatten",
    "leaves",
    "override",
    "preset_path",
    "preset_paths",
    "read_arguments",
    "read_settings",
    "read_yaml",
    "study_paths",
    "write_yaml",
]
