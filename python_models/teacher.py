# SPDX-License-Identifier: Apache-2.0
"""Teachers: loading one that exists, training one that does not."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from python_models.checkpoint import (
    NetworkInfo,
    StopRequest,
    export_network,
    load_weights,
    read_info,
    read_weights,
    resume_checkpoint,
    save_checkpoint,
)
from python_models.config import (
    DistillConfig,
    InputConfig,
    TrainTeacherConfig,
    flatten,
    write_yaml,
)
from python_models.data import (
    NORMALISATION,
    LabelledImages,
    MissingDataError,
    RandomCropFlip,
    dataset_spec,
    load_labelled,
    to_float,
)
from python_models.errors import Interrupted, UserError, unknown_name
from python_models.evaluate import accuracy
from python_models.methods import METHODS
from python_models.networks import Classifier, build_network, is_spec, names_from, short_name
from python_models.randomness import Randomness
from python_models.reporting import LossLog, Progress, RunFolder, write_metrics, write_summary
from python_models.schedule import check_same_run, learning_rate, set_learning_rate

ROLES = ("student", "teacher")


@dataclass(frozen=True)
class LoadedNetwork:
    """A trained network with what is known of it."""

    classifier: Classifier
    info: NetworkInfo

    def require_fit(self, data: LabelledImages, dataset: str) -> None:
        """Check that a dataset has the network's classes and image shape.

        Raises:
            UserError: If not.
        """
        shape = data.image_shape
        if data.num_classes != self.info.num_classes or shape != self.info.image_shape:
            raise UserError(
                f"dataset {dataset} has {data.num_classes} classes of images {list(shape)}, but "
                f"{self.info.network} was made for {self.info.num_classes} classes of images "
                f"{list(self.info.image_shape)}: give the dataset it was trained for"
            )


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is the GPU where there is one.

    Raises:
        UserError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} cannot be used ({reason}): try --device cpu") from error
    return device


def load_teacher(config: DistillConfig[Any]) -> LoadedNetwork:
    """Load the teacher of a distillation; see `load_network`.

    Raises:
        UserError: If it cannot be loaded, or what it was made for is not known.
    """
    task = config.task
    return load_network(
        *(str(task.teacher), task.teacher_weights, task.dataset),
        data_root=task.data_root,
        network_args=task.teacher_args,
        given=config.input,
        may_open_train=METHODS.get(config.method).needs_labels,
    )


def load_network(
    source: str,
    weights: Path | None,
    dataset: str | None,
    argument: str = "teacher",
    weights_argument: str = "teacher_weights",
    data_root: Path = Path("data"),
    *,
    network_args: Mapping[str, Any] | None = None,
    given: InputConfig | None = None,
    may_open_train: bool = False,
) -> LoadedNetwork:
    """Load a trained network, frozen and in eval mode.

    Args:
        source: A run folder, a .safetensors file that describes itself, a network's name or
            ``package.module:callable``.
        weights: State dict, where `source` is one of the latter two. Where it describes itself, it
            says what the network was made for.
        dataset: Task of a network that no file describes: classes, image shape and normalisation.
        argument: What the user calls `source`, for error messages.
        weights_argument: What the user calls `weights`.
        data_root: Where a dataset's .npz file may be.
        network_args: Arguments of ``package.module:callable``.
        given: Classes, image shape and normalisation that win over those of file and dataset; None
            where the user has no flags for them.
        may_open_train: Whether the dataset may be described by its train split, where that is an
            .npz or a folder and has no test split.

    Raises:
        UserError: If it cannot be found or does not fit.
    """
    path = Path(source)
    flag = f"--{weights_argument.replace('_', '-')}"
    if path.exists() or path.suffix == ".safetensors":
        for name, value in ((weights_argument, weights), (f"{argument}_args", network_args)):
            if value:
                raise UserError(
                    f"{name}={value} goes with a network's name, but {argument}={source} has one "
                    "of its own, and weights: leave one out"
                )
        path = _weights_in(path, argument)
        info = read_info(path)
        if info is None:
            raise UserError(
                f"{path} does not say which network it holds: give the network's name or "
                f"package.module:callable as --{argument} and this file as {flag}"
            )
        info = _described(info, given)
        with names_from(path):
            network = build_network(
                info.network, info.num_classes, info.image_shape[0], **info.arguments
            )
    else:
        if not is_spec(source) and len(path.parts) > 1:
            raise UserError(f"{argument}={source} is not there: give a run folder or a file")
        if weights is None:
            if not is_spec(source):
                build_network(source, 2)  # an unknown name is the likelier mistake
            raise UserError(
                f"{argument}={source} is a network's name: give its weights with {flag}, or a run "
                f"folder as --{argument}"
            )
        known = read_info(weights) if weights.suffix == ".safetensors" else None
        info = _described(
            known or _task(dataset, data_root, argument, given, may_open_train), given
        )
        if network_args or info.network != source:
            info = replace(info, network=source, arguments=dict(network_args or {}))
        path = weights
        network = build_network(source, info.num_classes, info.image_shape[0], **info.arguments)
    classifier = Classifier(network, info.mean, info.std)
    require_logits(classifier, info)  # before the weights, which lazy layers have no place for yet
    load_weights(network, read_weights(path), info.network, path)
    return LoadedNetwork(classifier.eval().requires_grad_(False), info)


def _weights_in(path: Path, argument: str) -> Path:
    """Return the file of weights in a run folder; a file as it is."""
    if not path.is_dir():
        return path
    files = [file for role in ROLES if (file := path / f"{role}.safetensors").is_file()]
    if not files:
        raise UserError(
            f"{argument}={path} is a folder without student.safetensors or teacher.safetensors: "
            "give the folder of a finished run"
        )
    return files[0]


def _task(
    dataset: str | None,
    data_root: Path,
    argument: str,
    given: InputConfig | None,
    may_open_train: bool,
) -> NetworkInfo:
    """Describe what a dataset's networks are made for, or else what is given."""
    has_flags = given is not None
    given = given or InputConfig()
    missing: MissingDataError | None = None
    if dataset is not None:
        try:
            spec = dataset_spec(dataset, data_root, may_open_train=may_open_train)
        except MissingDataError as error:
            missing = error
        else:
            shape = (spec.channels, spec.image_size, spec.image_size)
            mean, std = spec.normalisation
            return NetworkInfo("", spec.num_classes, shape, tuple(mean), tuple(std), dataset)
    classes, channels, size = given.num_classes, given.channels, given.image_size
    has_normalisation = given.normalisation or given.mean or given.std
    if classes is None or channels is None or size is None or not has_normalisation:
        flags = "--num-classes, --channels, --image-size, and --normalisation or --mean and --std"
        if missing is not None:
            others = f", or {flags}" if has_flags else ""
            raise UserError(
                f"{missing}: put the test split there, give a --{argument} that says what it was "
                f"made for (a run folder or its .safetensors file){others}"
            ) from missing
        raise UserError(
            f"dataset is required where --{argument} is a network's name; or else {flags}"
        )
    return NetworkInfo("", classes, (channels, size, size), (0.0,), (1.0,), dataset)


def _described(info: NetworkInfo, given: InputConfig | None) -> NetworkInfo:
    """Replace what is given in a network's description."""
    given = given or InputConfig()
    for name in ("num_classes", "channels", "image_size"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be >= 1")
    channels, height, width = info.image_shape
    channels = given.channels or channels
    mean, std = _normalisation(given) or (info.mean, info.std)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UserError(
                f"{name}={list(values)} must have one value, or one for each of the {channels} "
                "channels: give --mean and --std, or another --normalisation"
            )
    return replace(
        info,
        num_classes=given.num_classes or info.num_classes,
        image_shape=(channels, given.image_size or height, given.image_size or width),
        mean=mean,
        std=std,
    )


def _normalisation(given: InputConfig) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    mean, std = given.mean, given.std
    if given.normalisation is not None:
        if mean or std:
            raise UserError("normalisation excludes mean and std: give the one or the others")
        if given.normalisation not in NORMALISATION:
            raise unknown_name("normalisation", given.normalisation, NORMALISATION)
        return NORMALISATION[given.normalisation]
    if not mean and not std:
        return None
    if not mean or not std or len(mean) != len(std):
        raise UserError(
            f"mean={list(mean or ())} and std={list(std or ())} must have the same number of "
            "values: one, or one for each channel"
        )
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise UserError(f"mean={list(mean)} and std={list(std)} must be finite, and std positive")
    return mean, std


def require_logits(classifier: Classifier, info: NetworkInfo) -> None:
    """Check by one image that a network makes the logits that it should.

    Raises:
        UserError: If not, or if it has a state that cannot be saved.
    """
    name = info.network
    with _probing(classifier, info) as image:
        try:
            logits = classifier(image)
        except Exception as error:  # a module of the user's may raise anything
            raise UserError(
                f"{name} does not take images {list(image.shape)}: {type(error).__name__}: {error}"
            ) from error
    expected = [1, info.num_classes]
    if list(logits.shape) != expected:
        raise UserError(
            f"{name} makes a tensor {list(logits.shape)} of images {list(image.shape)}, expected "
            f"logits {expected}: give its number of classes as an argument of its own, or another "
            "--num-classes"
        )
    state = classifier.network.state_dict()
    extra = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if extra:
        raise UserError(f"{name} has a state that cannot be saved safely: {extra[0]} is no tensor")


def require_features(classifier: Classifier, info: NetworkInfo) -> None:
    """Check by one image that a network's vector before the last layer can be found.

    Raises:
        UserError: If not.
    """
    with _probing(classifier, info) as image:
        classifier.features(image)


@contextmanager
def _probing(classifier: Classifier, info: NetworkInfo) -> Iterator[Tensor]:
    """Within the block a network is in eval mode; yields a black image for it."""
    training = classifier.training
    classifier.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield torch.zeros(1, *info.image_shape, device=classifier.mean.device)
    classifier.train(training)


def train_teacher(config: TrainTeacherConfig) -> dict[str, Any]:
    """Run ``kdci train-teacher``.

    Returns:
        What ``summary.json`` holds; ``accuracy`` is that of the last epoch in percent.

    Raises:
        UserError: If the configuration or the data are wrong.
        Interrupted: After Ctrl-C, when the state is saved.
    """
    if config.dataset is None:
        raise UserError("dataset is required: see `kdci list datasets`")
    for name, value in (
        ("epochs", config.epochs),
        ("batch_size", config.batch_size),
        ("image_size", config.image_size),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be >= 1")
    device = resolve_device(config.device)
    spec = dataset_spec(config.dataset, config.data_root)
    if config.image_size is not None and not spec.is_folder:
        raise UserError(
            f"image_size={config.image_size} is for images in folders; those of {config.dataset} "
            "have a size of their own: leave it out"
        )
    size = config.image_size or spec.image_size
    train, test = (
        load_labelled(
            *(config.dataset, split, config.data_root, config.download),
            image_shape=(spec.channels, size, size),
        )
        for split in ("train", "test")
    )
    info = NetworkInfo(
        config.network,
        train.num_classes,
        train.image_shape,
        tuple(spec.normalisation[0]),
        tuple(spec.normalisation[1]),
        config.dataset,
        config.network_args,
    )
    title = short_name(config.network)
    out_dir = config.out_dir or Path(
        f"runs/teacher-{title}-{Path(config.dataset).stem}-seed{config.seed}"
    )
    randomness = Randomness(config.seed, device)
    with randomness.initialising("network"):
        network = build_network(
            info.network, info.num_classes, info.image_shape[0], **info.arguments
        )
        classifier = Classifier(network, info.mean, info.std)
        require_logits(classifier, info)
    folder = RunFolder(out_dir, resume=config.resume, overwrite=config.overwrite)
    if config.resume:
        check_same_run(flatten(config), folder.config)
    write_yaml(folder.config, config)
    classifier.to(device)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    augment = RandomCropFlip(config.crop, config.flip) if config.crop or config.flip else None
    order_stream = randomness.on_cpu("order")
    augment_stream = randomness.on_device("augment")
    rows: list[dict[str, Any]] = []
    first_epoch, seconds = 0, 0.0
    state = resume_checkpoint(folder.checkpoint) if config.resume else None
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        randomness.load_state_dict(state["randomness"])
        rows, first_epoch, seconds = state["rows"], state["epoch"], state["seconds"]

    steps = -(-len(train.labels) // config.batch_size)
    log = LossLog(device)
    progress = Progress(f"teacher {title}", config.epochs * steps, first_epoch * steps)
    begin = time.monotonic() - seconds
    with StopRequest() as stop:
        for epoch in range(first_epoch, config.epochs):
            classifier.train()
            order = torch.randperm(len(train.labels), generator=order_stream)
            batches = train.select(torch.split(order, config.batch_size))
            for step, (images, labels) in enumerate(batches):
                # A single image has no batch statistics; none are left where all are unreadable.
                if not len(labels) or len(labels) == 1 < steps:
                    continue
                done = (epoch * steps + step) / (config.epochs * steps)
                set_learning_rate(optimizer, learning_rate("cosine", config.lr, done))
                images = to_float(images.to(device))
                if augment is not None:
                    images = augment(images, augment_stream)
                loss = F.cross_entropy(classifier(images), labels.to(device))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                log.add(epoch * steps + step, {"loss": loss})
                progress.step(log.last)
                if stop.requested:
                    break
            if stop.requested:
                # The epoch is repeated as a whole when the run is resumed.
                progress.close()
                kept = f"{first_epoch} of {config.epochs} epochs" if first_epoch else "no epoch"
                raise Interrupted(
                    f"stopped with {kept} kept in {folder.path}; go on with the same command and "
                    "--resume"
                )
            row = {"epoch": epoch + 1, **log.averages(), "seconds": time.monotonic() - begin}
            row["accuracy"] = accuracy(classifier, test, device)
            log.reset()
            rows.append(row)
            progress.epoch(
                f"epoch {epoch + 1}/{config.epochs}, loss {row['loss']:.3f}, "
                f"accuracy {row['accuracy']:.2f} %",
                {"accuracy": f"{row['accuracy']:.2f} %"},
            )
            write_metrics(folder.metrics, rows)
            first_epoch = epoch + 1
            save_checkpoint(
                folder.checkpoint,
                {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "randomness": randomness.state_dict(),
                    "rows": rows,
                    "epoch": first_epoch,
                    "seconds": time.monotonic() - begin,
                },
            )
    progress.close()
    export_network(folder.weights("teacher"), network, info)
    summary = {
        "network": config.network,
        "dataset": config.dataset,
        "accuracy": rows[-1]["accuracy"],
        "seconds": round(rows[-1]["seconds"], 1),
        "weights": str(folder.weights("teacher")),
    }
    write_summary(folder.summary, summary)
    return summary
