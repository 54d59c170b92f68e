# SPDX-License-Identifier: Apache-2.0
"""Labelled images, in memory or in files, and how they are found."""

import importlib
import os
import socket
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from python_models.data.datasets import DatasetSpec, dataset_spec
from python_models.data.decode import SkippedFiles, Target, decode_batches
from python_models.data.folders import ImageFiles
from python_models.data.formats import (
    CorruptDataError,
    MissingDataError,
    RawImages,
    read_npz,
)
from python_models.data.images import pad_to, to_float

Augmentation = Callable[[Tensor, torch.Generator | None], Tensor]
"""Maps float images [b, c, h, w] and a source of randomness to augmented ones."""

IN_MEMORY_BYTES = 2 * 2**30
"""Folders whose images take up to this many bytes are decoded once, larger ones as needed."""


class LabelledImages(ABC):
    """Labelled images, wherever they are.

    Attributes:
        labels: int64 [n], each in [0, num_classes).
        num_classes: number of classes.
        class_names: their names.
    """

    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Returns the number of images; those that turn out to be unreadable count."""
        return len(self.labels)

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""

    @abstractmethod
    def select(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over chosen images.

        Args:
            parts: positions, int64 [b], of the images of each batch.

        Yields:
            For each part its images, uint8 [b, c, h, w], and labels; what cannot be read is left
            out.

        Raises:
            CorruptDataError: if nothing can be read.
        """

    def batches(
        self,
        batch_size: int,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        augment: Augmentation | None = None,
        *,
        drop_last: bool = False,
        device: torch.device | str | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates once over the data in batches of float32 images in [0, 1] and their labels.

        Args:
            batch_size: images per batch; the last batch may be smaller.
            shuffle: go in random order.
            generator: source of randomness of the order and the augmentation.
            augment: applied to each batch, on the device.
            drop_last: leave out a last batch that is smaller.
            device: where the batches are wanted; where the data is if not given.

        Raises:
            ValueError: if `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        return self._iterate(batch_size, shuffle, generator, augment, drop_last, device)

    def _iterate(
        self,
        batch_size: int,
        shuffle: bool,
        generator: torch.Generator | None,
        augment: Augmentation | None,
        drop_last: bool,
        device: torch.device | str | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if shuffle:
            origin = torch.device("cpu") if generator is None else generator.device
            order = torch.randperm(len(self), generator=generator, device=origin)
            order = order.to(self.labels.device)
        else:
            order = torch.arange(len(self), device=self.labels.device)
        if drop_last:
            order = order[: len(self) - len(self) % batch_size]
        for images, labels in self.select(torch.split(order, batch_size) if len(order) else ()):
            if device is not None:  # bytes travel, floats do not
                images, labels = images.to(device), labels.to(device)
            images = to_float(images)
            yield images if augment is None else augment(images, generator), labels


@dataclass(frozen=True, eq=False)
class LabelledData(LabelledImages):
    """Labelled images in memory, held as bytes.

    Attributes:
        images: uint8 [n, c, h, w].
        labels: int64 [n], each in [0, num_classes).
        num_classes: number of classes.
        class_names: their names.

    Raises:
        ValueError: if dtypes, shapes, labels or the number of names do not fit; the message says
            which.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(
                f"images must be uint8 [n, c, h, w], "
                f"got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 [{len(self.images)}], "
                f"got {self.labels.dtype} {list(self.labels.shape)}"
            )
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names must have num_classes={self.num_classes} names, "
                f"got {len(self.class_names)}"
            )
        if len(self.labels):
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"labels must lie in [0, {self.num_classes}), got {low} to {high}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "LabelledData":
        """Returns the same data on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def select(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over chosen images."""
        for part in parts:
            yield self.images.index_select(0, part), self.labels.index_select(0, part)


class LabelledFiles(LabelledImages):
    """Labelled images that stay files: decoded on threads when a batch of them is due.

    Files that cannot be used are left out; the first iteration that meets any warns once and names
    them.

    Args:
        source: the files and their labels.
        target: what their images shall look like.
    """

    def __init__(self, source: ImageFiles, target: Target) -> None:
        self.source = source
        self.target = target
        self.labels = source.labels
        self.class_names = source.class_names
        self.num_classes = len(source.class_names)
        self._has_warned = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.target.shape

    def select(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over chosen images."""
        folder, files = self.source.folder, self.source.files
        skipped = SkippedFiles()
        chosen = ((part, [os.path.join(folder, files[i]) for i in part.tolist()]) for part in parts)
        tried = 0
        for part, images, rows in decode_batches(chosen, self.target, skipped):
            tried += len(part)
            yield images, self.labels[part[rows]]
        if skipped.count and skipped.count == tried:
            raise CorruptDataError(f"{folder}: none of the {tried} images can be read: {skipped}")
        if skipped.count and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{folder}: left out {skipped.count} of {tried} labelled images that cannot be "
                f"read: {skipped}",
                stacklevel=2,
            )

    def load(self) -> LabelledData:
        """Decodes all images into memory."""
        images = torch.empty((len(self), *self.image_shape), dtype=torch.uint8)
        labels = torch.empty_like(self.labels)
        filled = 0
        for some, its_labels in self.select(torch.split(torch.arange(len(self)), 1024)):
            end = filled + len(some)
            images[filled:end], labels[filled:end] = some, its_labels
            filled = end
        return LabelledData(images[:filled], labels[:filled], self.num_classes, self.class_names)


def load_labelled(
    dataset: str,
    split: str,
    data_root: str | Path = ".",
    download: bool = False,
    image_shape: tuple[int, int, int] | None = None,
) -> LabelledImages:
    """Loads one split of a labelled dataset.

    No file of the train split is opened for another one. Of an .npz or a folder, what the test
    split says of the task holds for the train split as well.

    Args:
        dataset: a name in `DATASETS`, or NAME.npz for the files NAME_train.npz and NAME_test.npz
            with `images` uint8 [n, h, w] or [n, h, w, c], `labels` [n] and, if wanted,
            `class_names`, or a folder with `train/<class>/` and `test/<class>/` (or `val`), as
            torchvision's ImageFolder reads it. A named dataset may also lie under `data_root` as
            NAME_{split}.npz. Grey 28x28 images are padded with zeros to 32x32.
        split: "train" or "test"; for some datasets "valid" or "extra".
        data_root: the folder under which datasets lie.
        download: let torchvision download the dataset to `data_root` if it is not there.
        image_shape: (channels, height, width) that images in folders are brought to; by default
            those of the dataset's spec. Others come as they are.

    Returns:
        `LabelledData`, or `LabelledFiles` for images in folders that take more than
        `IN_MEMORY_BYTES`.

    Raises:
        ValueError: for an unknown dataset or split, or an impossible `image_shape`.
        MissingDataError: if the files are not there; the message says what to put where.
        CorruptDataError: if a file is damaged or not what the dataset says.

    Warns:
        UserWarning: once, if some images of a folder cannot be read; they are left out.

    Example:
        >>> load_labelled("digits", "test").images.shape
        torch.Size([360, 1, 32, 32])
    """
    root = Path(data_root).expanduser()
    spec = dataset_spec(dataset, root, may_open_train=split == "train")
    raw, source = read_split(spec, split, root, download)
    if isinstance(raw, ImageFiles):
        return _open_files(spec, raw, image_shape)
    class_names = spec.class_names
    if spec.classes_inferred:
        most = int(raw.labels.max()) + 1
        class_names += tuple(map(str, range(len(class_names), most)))
    images = raw.images
    if max(images.shape[2:]) < spec.image_size:
        images = pad_to(images, spec.image_size)
    expected = (spec.channels, spec.image_size, spec.image_size)
    if tuple(images.shape[1:]) != expected:
        raise CorruptDataError(
            f"{source}: images of {spec.name} must be [n, {', '.join(map(str, expected))}], "
            f"got {list(raw.images.shape)}"
        )
    try:
        return LabelledData(images, raw.labels, len(class_names), class_names)
    except ValueError as error:
        raise CorruptDataError(f"{source}: {error}") from error


def _open_files(
    spec: DatasetSpec, files: ImageFiles, image_shape: tuple[int, int, int] | None
) -> LabelledImages:
    if len(files.class_names) != spec.num_classes:
        raise CorruptDataError(
            f"{files.folder}: {spec.name} has {spec.num_classes} classes, but there are "
            f"{len(files.class_names)} here: complete it, or give the path of its folder as dataset"
        )
    channels, height, width = image_shape or (spec.channels, spec.image_size, spec.image_size)
    if height != width:
        raise ValueError(
            f"image_shape=({channels}, {height}, {width}): images in folders are cut to squares, "
            f"so height and width must be equal"
        )
    lazy = LabelledFiles(files, Target(channels, height, spec.crop))
    if len(lazy) * channels * height * width > IN_MEMORY_BYTES:
        return lazy
    return lazy.load()


def read_split(
    spec: DatasetSpec, split: str, root: Path, download: bool = False
) -> tuple[RawImages | ImageFiles, str]:
    """Finds and parses the files of one split; returns their content and their names for errors.

    Raises:
        ValueError: if the dataset has no such split.
        MissingDataError: if the files are not there; the message says what to put where.
        CorruptDataError: if a file is damaged.
    """
    files = find_split(spec, split, root, download)
    is_npz = bool(files) and files[0].suffix == ".npz" and not files[0].is_dir()
    raw = read_npz(files[0]) if is_npz else spec.parse(files, split)
    if isinstance(raw, RawImages) and not len(raw.images):
        raise CorruptDataError(f"{files[0]}: holds no images")
    return raw, ", ".join(map(str, files)) or spec.name


def find_split(spec: DatasetSpec, split: str, root: Path, download: bool = False) -> list[Path]:
    """Finds the files of one split, or its folder; an .npz of its name does as well.

    Raises:
        ValueError: if the dataset has no such split.
        MissingDataError: if the files are not there; the message says what to put where.
    """
    if split not in spec.splits:
        raise ValueError(f"split={split!r} must be one of {', '.join(map(repr, spec.splits))}")
    layouts = spec.layouts(root, split)
    by_name = [root / f"{spec.name}_{split}.npz"]
    if by_name not in layouts and not spec.name.endswith(".npz"):
        layouts.append(by_name)
    files = _first_complete(spec, layouts)
    if files is None and download and spec.torchvision is not None:
        _download(spec, root, split, layouts)
        files = _first_complete(spec, layouts)
    if files is None:
        raise MissingDataError(_missing_message(spec, split, layouts))
    return files


def _first_complete(spec: DatasetSpec, layouts: Sequence[Sequence[Path]]) -> list[Path] | None:
    for layout in layouts:
        found = [_find_part(spec, path) for path in layout]
        complete = [path for path in found if path is not None]
        if len(complete) == len(layout):
            return complete
    return None


def _find_part(spec: DatasetSpec, path: Path) -> Path | None:
    """Returns a part of a split as it is there: the folder, the file or its .gz."""
    if spec.is_folder and path.is_dir():
        return path
    plain_or_gz = (path, path.with_name(f"{path.name}.gz"))
    return next((file for file in plain_or_gz if file.is_file()), None)


def _missing_message(spec: DatasetSpec, split: str, layouts: Sequence[Sequence[Path]]) -> str:
    kind = "folders of images by class" if spec.is_folder else "files as they are or with .gz"
    lines = [f"{spec.name}: the {split} split was not found. It can be any one of ({kind})"]
    for layout in layouts:
        absent = [path.name for path in layout if _find_part(spec, path) is None]
        names = ", ".join(path.name for path in layout)
        # A set that is there in part is likely the one that was meant.
        missing = f" (missing: {', '.join(absent)})" if len(absent) < len(layout) else ""
        lines.append(f"  {layout[0].parent}/ with {names}{missing}")
    hint = "Put the files there or point the data root (--data-root) at them"
    if spec.torchvision is not None:
        hint += ", or let torchvision download them (download=True, --download)"
    lines.append(f"{hint}.")
    if spec.where:
        lines.append(f"They are at {spec.where}.")
    return "\n".join(lines)


def _download(spec: DatasetSpec, root: Path, split: str, layouts: Sequence[Sequence[Path]]) -> None:
    assert spec.torchvision is not None
    timeout = socket.getdefaulttimeout()
    try:
        datasets = importlib.import_module("torchvision.datasets")
        # A network that swallows packets would hang the download for ever.
        socket.setdefaulttimeout(30)
        which = (
            {"train": split == "train"} if spec.splits == ("train", "test") else {"split": split}
        )
        getattr(datasets, spec.torchvision)(str(root), **which, download=True)
    except Exception as error:  # no torchvision, no network, no mirror, no space, wrong checksum
        reason = str(error).strip() or type(error).__name__
        raise MissingDataError(
            f"{_missing_message(spec, split, layouts)}\nThe download failed: {reason}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
