# SPDX-License-Identifier: Apache-2.0
"""Configuration: dataclasses whose leaf names are at once command line flags and YAML keys.

A value is looked up in this order, the first that gives one wins: flag (or Python argument),
``--config`` file, ``--preset``, the method's own defaults, the defaults below. Names are unique
over all groups, so files are flat: ``lr-g`` on the command line is ``lr_g`` in YAML and in Python.
This module imports neither torch nor the methods, so that the command line stays quick.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from python_models.errors import UserError, unknown_name

SettingsT = TypeVar("SettingsT")
ConfigT = TypeVar("ConfigT")

Arguments = dict[str, Any]
"""Arguments of a network: on the command line ``NAME=VALUE ...``, in YAML a mapping."""


@dataclass(kw_only=True)
class TaskConfig:
    """What is distilled into what."""

    teacher: str | None = None
    """A run folder, a .safetensors file written by kdci, or with --teacher-weights a network: its
    name (see: kdci list networks) or, for one of your own, package.module:callable."""
    teacher_weights: Path | None = None
    """State dict (.pt, .pth, .safetensors) of a teacher that is given as a network."""
    teacher_args: Arguments = field(default_factory=dict)
    """Arguments of a teacher of your own, as NAME=VALUE."""
    student: str = "resnet18"
    """The student's network: a name (see: kdci list networks) or package.module:callable."""
    student_args: Arguments = field(default_factory=dict)
    """Arguments of a student of your own, as NAME=VALUE."""
    dataset: str | None = None
    """The teacher's task: gives classes, image shape, normalisation and the test images. By default
    the one that the teacher's file names."""
    data_root: Path = Path("data")
    """Folder that holds the datasets."""
    unlabelled: str | None = None
    """Images of a sampling method: a folder, an .npz file or a dataset's name."""
    unlabelled_imbalance: float = 1.0
    """Times that the first class of --unlabelled is made more frequent than the last one, to study
    imbalanced data; --unlabelled must be a dataset or an .npz with labels then."""
    evaluate: bool = True
    """Measure accuracy on the dataset's test images (the only original data ever opened)."""


@dataclass(kw_only=True)
class InputConfig:
    """What a network was made for, where neither its file nor a dataset says so, or says wrong."""

    num_classes: int | None = None
    """Number of classes."""
    image_size: int | None = None
    """Height and width of the images."""
    channels: int | None = None
    """Channels of the images: 1 grey, 3 colour."""
    normalisation: str | None = None
    """Normalisation of images in [0, 1] by name: none, default (to [-1, 1]), imagenet, cifar10 and
    so on; by default that of the network's file, or else of the dataset."""
    mean: tuple[float, ...] | None = None
    """Normalisation by numbers: what is subtracted, one value or one for each channel."""
    std: tuple[float, ...] | None = None
    """What is divided by then, likewise."""


@dataclass(kw_only=True)
class TrainingConfig:
    """The student's training."""

    epochs: int = 200
    """Number of epochs."""
    ep_steps: int = 400
    """Student steps in an epoch; 0: one pass over the images of a sampling method."""
    kd_steps: int = 400
    """Student steps in a round, that is, after each generator phase."""
    batch_size: int = 256
    """Images in a student step."""
    temperature: float = 20.0
    """Temperature of the distillation loss."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser of the student (and of KDCI's weights)."""
    lr: float = 0.1
    """Its learning rate."""
    momentum: float = 0.9
    """Its momentum (SGD)."""
    nesterov: bool = False
    """Nesterov's form of the momentum (SGD)."""
    weight_decay: float = 1e-4
    """Its weight decay."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Learning rate over the run: cosine to --lr-min, or a tenth at each of --milestones."""
    schedule_by: Literal["epoch", "round"] = "epoch"
    """When it changes: at each epoch, or at each round of --kd-steps."""
    lr_min: float = 0.0
    """Learning rate that the cosine ends at."""
    milestones: tuple[float, ...] = (0.4, 0.8)
    """Fractions of the run after which the step schedule divides by ten."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """How networks compute in training; losses, statistics, KDCI and weights stay in float32."""
    channels_last: bool = False
    """Keep teacher and student in the memory format that convolutions on GPUs prefer."""
    compile: bool = False
    """Compile the student, and the teacher's pass of student steps, by torch.compile."""
    cuda_graphs: bool = False
    """With --compile, on a GPU: replay compiled passes as CUDA graphs (mode reduce-overhead)."""
    seed: int = 0
    """Seed of everything random; on a CPU, with as many threads, it gives bitwise the same run."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""


@dataclass(kw_only=True)
class CompensationConfig:
    """KDCI: compensation of the student's logits by the confounder dictionary."""

    kdci: bool = True
    """Train with KDCI."""
    kdci_prototypes: int | None = None
    """Size of the dictionary; by default 8 for generators, 32 for inversion, 128 for sampling."""
    kdci_components: int | None = None
    """Principal components in which its rows are clustered; by default one less than prototypes,
    and at most the classes."""
    kdci_hidden_dim: int = 256
    """Width of the attention."""
    kdci_weighting: Literal["paper", "posterior"] = "paper"
    """Proportions after the softmax (paper) or inside it (posterior)."""
    kdci_scale: float = 1.0
    """Factor on the compensation."""
    kdci_attention: Literal["learned", "uniform", "random"] = "learned"
    """Attention over the prototypes (ablation)."""
    kdci_attention_temperature: float = 1.0
    """Divisor of the attention's scores (ours); below 1 attention concentrates."""
    kdci_init_gain: float = 1.0
    """Factor on the attention's initial weights (ours)."""
    kdci_projection: bool = False
    """Bring the prior into the logits by a learnable matrix (ours)."""
    kdci_lr_factor: float = 1.0
    """Factor on the learning rate for KDCI's weights (ours)."""
    kdci_dictionary: Literal["kmeans", "random", "shuffled", "classes"] = "kmeans"
    """Prototypes: k-means; normal draws (ablation); those of k-means with the classes shuffled, or
    log p(class), which is logit adjustment (ours, to compare with)."""
    kdci_batches: int = 1
    """Generated batches, the last ones, that the dictionary is made from (ours)."""
    kdci_proportions: Literal["frequency", "none"] = "frequency"
    """Proportions of the clusters, or none (ablation)."""
    kdci_dictionary_teacher: str | None = None
    """Another network whose logits of the images make the dictionary, given as --teacher is; a
    learnable matrix maps its classes to the student's (ablation). By default the teacher."""
    kdci_dictionary_weights: Path | None = None
    """State dict of such a network that is given by its name."""
    kdci_dictionary_dataset: str | None = None
    """Dataset that it was trained for, where it is given by its name."""


@dataclass(kw_only=True)
class OutputConfig:
    """The run folder."""

    out_dir: Path | None = None
    """Run folder; by default runs/<method>-<teacher>-<student>-<kdci or vanilla>-seed<n>."""
    evaluate_every: int = 1
    """Epochs between measurements of accuracy; the last epoch is always measured."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    checkpoint_minutes: float = 30.0
    """Minutes after which one is made within an epoch too; 0: never."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the run folder's tensorboard/."""
    resume: bool = False
    """Go on from the checkpoint in the run folder."""
    overwrite: bool = False
    """Replace a run that is in the run folder."""


@dataclass(kw_only=True)
class DistillConfig(Generic[SettingsT]):
    """Everything that decides a distillation run."""

    method: str = "fast"
    """Distillation method (see: kdci list methods)."""
    task: TaskConfig = field(default_factory=TaskConfig)
    input: InputConfig = field(default_factory=InputConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    settings: SettingsT
    compensation: CompensationConfig = field(default_factory=CompensationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


@dataclass(kw_only=True)
class TrainTeacherConfig:
    """Supervised training of a teacher on labelled data."""

    network: str = "resnet34"
    """The network: a name (see: kdci list networks) or package.module:callable."""
    network_args: Arguments = field(default_factory=dict)
    """Arguments of a network of your own, as NAME=VALUE."""
    dataset: str | None = None
    """Labelled dataset (see: kdci list datasets), an .npz file, or a folder of train/CLASS/ and
    test/CLASS/."""
    data_root: Path = Path("data")
    """Folder that holds the datasets."""
    download: bool = False
    """Download the dataset if it is not there."""
    image_size: int | None = None
    """Height and width that images in folders are brought to; by default the dataset's own."""
    epochs: int = 200
    """Number of epochs."""
    batch_size: int = 128
    """Images in a step."""
    lr: float = 0.1
    """Learning rate of SGD with Nesterov's momentum, cosine to zero."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 5e-4
    """Weight decay."""
    crop: int = 4
    """Padding of the random crop; 0: none."""
    flip: bool = True
    """Random horizontal flips."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""
    out_dir: Path | None = None
    """Run folder; by default runs/teacher-<network>-<dataset>-seed<n>."""
    resume: bool = False
    """Go on from the checkpoint in the run folder."""
    overwrite: bool = False
    """Replace a run that is in the run folder."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """Accuracy of a trained network on a dataset's test images."""

    network: str | None = None
    """A run folder, a .safetensors file written by kdci, or with --weights a network: its name
    (see: kdci list networks) or, for one of your own, package.module:callable."""
    weights: Path | None = None
    """State dict (.pt, .pth, .safetensors) of a network that is given as such."""
    network_args: Arguments = field(default_factory=dict)
    """Arguments of a network of your own, as NAME=VALUE."""
    input: InputConfig = field(default_factory=InputConfig)
    dataset: str | None = None
    """Labelled dataset; by default the one that the file names."""
    split: Literal["test", "train", "valid"] = "test"
    """Part of the dataset."""
    data_root: Path = Path("data")
    """Folder that holds the datasets."""
    batch_size: int = 500
    """Images in a forward pass."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""


@dataclass(kw_only=True)
class StudyConfig:
    """Where and how a study runs; the study itself is a YAML file."""

    study: str
    """A name of kdci list studies, or a YAML file."""
    out_dir: Path | None = None
    """Study folder; by default runs/study-<name>. Several processes, also on several machines, may
    work in one."""
    data_root: Path = Path("data")
    """Folder that holds the datasets."""
    download: bool = False
    """Download datasets that are not there."""
    device: str | None = None
    """Where to compute: auto, cpu, cuda, cuda:1, ...; by default as the study says."""
    seeds: tuple[int, ...] | None = None
    """Only these of the study's seeds; by default all."""
    jobs: int | None = None
    """Runs at a time, each in a process of its own; by default one per CPU core, and one on a
    GPU."""


@dataclass(kw_only=True)
class ReportConfig:
    """A page about distillation runs."""

    runs: tuple[Path, ...]
    """Run folders of kdci distill, of one task."""
    out_dir: Path = Path("runs/report")
    """Folder of the page, report.html, and of its figures; those of an earlier report in it are
    replaced."""
    data_root: Path | None = None
    """Folder that holds the datasets; by default the runs' own."""
    teacher: str | None = None
    """The teacher's run folder or .safetensors file; by default the one that the runs name."""
    images: int = 2000
    """Images of each run, and test images, in the Frechet distance."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""


# --- flat names -----------------------------------------------------------------------------------


def leaves(config: object) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, annotation and value of every leaf of a (nested) dataclass."""
    hints = get_type_hints(type(config))
    for item in fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from leaves(value)
        else:
            yield item.name, hints[item.name], value


def flatten(config: object) -> dict[str, Any]:
    """Return the leaves as a flat dict of plain YAML values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, _, value in leaves(config)}


def override(config: ConfigT, values: Mapping[str, Any], source: str) -> ConfigT:
    """Return a copy of a config with some leaves replaced.

    Args:
        config: A (nested) dataclass.
        values: New values by leaf name; ``-`` and ``_`` are the same. Converted to the leaf's type.
        source: Where they come from, for the error message.

    Raises:
        UserError: If a name is unknown or a value has the wrong type.
    """
    values = {name.replace("-", "_"): value for name, value in values.items()}
    hints = {name: hint for name, hint, _ in leaves(config)}
    for name in values:
        if name not in hints:
            raise UserError(f"{source}: {unknown_name('setting', name, hints)}")
    converted = {name: _convert(name, value, hints[name], source) for name, value in values.items()}
    return _replace_leaves(config, converted)


def _replace_leaves(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    changes: dict[str, Any] = {}
    for item in fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if is_dataclass(value):
            changes[item.name] = _replace_leaves(value, values)
        elif item.name in values:
            changes[item.name] = values[item.name]
    return replace(config, **changes)  # type: ignore[type-var]


def _convert(name: str, value: Any, hint: Any, source: str) -> Any:
    """Convert a YAML value to a leaf's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(a for a in arguments if a is not type(None))
        return _convert(name, value, hint, source)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: {name}={value!r} must be a mapping of names to values")
        return _network_arguments(name, value, source)
    if origin is Literal:
        if value in arguments:
            return value
        expected = "one of " + ", ".join(map(repr, arguments))
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_convert(name, item, arguments[0], source) for item in value)
        expected = "a list"
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            expected = "a number"
    elif hint is int and isinstance(value, bool):
        expected = "a whole number"
    elif isinstance(value, hint):
        return value
    else:
        expected = {int: "a whole number", bool: "true or false"}.get(hint, hint.__name__)
    raise UserError(f"{source}: {name}={value!r} must be {expected}")


_GIVEN_BY_THE_TASK = {"num_classes": "--num-classes", "in_channels": "--channels"}


def _network_arguments(name: str, values: Mapping[Any, Any], source: str) -> Arguments:
    arguments = {}
    for key, value in values.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise UserError(f"{source}: {name}: {key!r} cannot be the name of an argument")
        if key in _GIVEN_BY_THE_TASK:
            raise UserError(
                f"{source}: {name}: {key} follows from the dataset or {_GIVEN_BY_THE_TASK[key]}: "
                "leave it out"
            )
        # YAML 1.1 reads 1e-3 as text.
        is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.I)
        arguments[key] = float(value) if is_number else value
        try:
            json.dumps(value)  # as it is stored with the weights
        except TypeError as error:
            raise UserError(
                f"{source}: {name}: {key}={value!r} must be a number, text, true, false, null or a "
                "list or mapping of these"
            ) from error
    return arguments


def read_arguments(words: Iterable[str]) -> Arguments:
    """Read a network's arguments as they stand on the command line.

    Args:
        words: ``NAME=VALUE``, the values as in YAML.

    Raises:
        UserError: If a word has another form.

    Example:
        >>> read_arguments(["width=2", "shortcut=no", "rate=1e-3"])
        {'width': 2, 'shortcut': False, 'rate': 0.001}
    """
    import yaml

    arguments = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} must have the form NAME=VALUE")
        try:
            arguments[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{word!r} has a value that YAML cannot read") from error
    return _network_arguments("arguments", arguments, "command line")


# --- files ----------------------------------------------------------------------------------------

_ABOUT = ("about", "source")
_NOT_SAVED = ("out_dir", "resume", "overwrite")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a flat YAML file of settings.

    Raises:
        UserError: If it is missing, is no YAML, is no mapping or gives a name twice.
    """
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        """Refuses a name that is given twice, of which YAML would take the last one."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                line = f"{path}: line {key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode):
                    raise UserError(f"{line}: a name must be text, not a list or a mapping")
                if key.value in seen:
                    raise UserError(f"{line}: {key.value!r} is given twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that there is not, too
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a YAML file: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path} must hold lines of the form `name: value`")
    return values


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file without the keys that describe it (``about``, ``source``)."""
    return {name: value for name, value in read_yaml(path).items() if name not in _ABOUT}


def write_yaml(path: Path, config: object) -> None:
    """Write a config as a flat YAML file, without what concerns the one run folder."""
    import yaml

    from python_models.checkpoint import write_atomically

    values = {name: value for name, value in flatten(config).items() if name not in _NOT_SAVED}
    text = yaml.safe_dump(values, sort_keys=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def preset_paths() -> dict[str, Path]:
    """Return the presets that come with the package: name to YAML file."""
    return _shipped("presets")


def study_paths() -> dict[str, Path]:
    """Return the studies that come with the package: name to YAML file."""
    return _shipped("studies")


def _shipped(kind: str) -> dict[str, Path]:
    folder = Path(str(resources.files("python_models"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset_path(name: str) -> Path:
    """Return a preset's file.

    Raises:
        UserError: If there is none of this name.
    """
    paths = preset_paths()
    if name not in paths:
        raise unknown_name("preset", name, paths)
    return paths[name]


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
