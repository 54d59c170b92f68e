# SPDX-License-Identifier: Apache-2.0
"""The settings of every command, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

SettingsT = TypeVar("SettingsT")

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
