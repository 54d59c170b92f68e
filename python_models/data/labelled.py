# SPDX-License-Identifier: Apache-2.0
"""Labelled images in memory, and how they get there."""

import importlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from python_models.data.datasets import DatasetSpec, dataset_spec
from python_models.data.formats import (
    CorruptDataError,
    MissingDataError,
    RawImages,
    read_npz,
)
from python_models.data.images import pad_to, to_float

Augmentation = Callable[[Tensor, torch.Generator | None], Tensor]
"""Maps float images [b, c, h, w] and a source of randomness to augmented ones."""

SPLITS = ("train", "test")


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Labelled images, held as bytes.

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

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "LabelledData":
        """Returns the same data on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

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
        order = None
        if shuffle:
            origin = torch.device("cpu") if generator is None else generator.device
            order = torch.randperm(len(self), generator=generator, device=origin)
            order = order.to(self.images.device)
        stop = len(self) - len(self) % batch_size if drop_last else len(self)
        for start in range(0, stop, batch_size):
            part = slice(start, start + batch_size)
            if order is None:
                images, labels = self.images[part], self.labels[part]
            else:
                images = self.images.index_select(0, order[part])
                labels = self.labels.index_select(0, order[part])
            if device is not None:  # bytes travel, floats do not
                images, labels = images.to(device), labels.to(device)
            images = to_float(images)
            yield images if augment is None else augment(images, generator), labels


def load_labelled(
    dataset: str, split: str, data_root: str | Path = ".", download: bool = False
) -> LabelledData:
    """Loads one split of a labelled dataset; no file of the other split is touched.

    Args:
        dataset: a name in `DATASETS`, or NAME.npz for the files NAME_train.npz and NAME_test.npz
            with `images` uint8 [n, h, w] or [n, h, w, c], `labels` [n] and, if wanted,
            `class_names`. A named dataset may also lie under `data_root` as NAME_{split}.npz.
            Grey 28x28 images are padded with zeros to 32x32.
        split: "train" or "test".
        data_root: the folder under which datasets lie.
        download: let torchvision download the dataset to `data_root` if it is not there.

    Raises:
        ValueError: for an unknown dataset or split.
        MissingDataError: if the files are not there; the message says what to put where.
        CorruptDataError: if a file is damaged or not what the dataset says.

    Example:
        >>> load_labelled("digits", "test").images.shape
        torch.Size([360, 1, 32, 32])
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(map(repr, SPLITS))}")
    root = Path(data_root).expanduser()
    spec = dataset_spec(dataset, root)
    raw, source = read_split(spec, split, root, download)
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


def read_split(
    spec: DatasetSpec, split: str, root: Path, download: bool = False
) -> tuple[RawImages, str]:
    """Finds and parses the files of one split; returns their content and their names for errors.

    Raises:
        MissingDataError: if the files are not there; the message says what to put where.
        CorruptDataError: if a file is damaged.
    """
    layouts = spec.layouts(root, split)
    by_name = [root / f"{spec.name}_{split}.npz"]
    if by_name not in layouts and not spec.name.endswith(".npz"):
        layouts.append(by_name)
    files = _first_complete(layouts)
    if files is None and download and spec.torchvision is not None:
        _download(spec, root, split, layouts)
        files = _first_complete(layouts)
    if files is None:
        raise MissingDataError(_missing_message(spec, split, layouts))
    is_npz = bool(files) and files[0].suffix == ".npz"
    raw = read_npz(files[0]) if is_npz else spec.parse(files, split)
    if not len(raw.images):
        raise CorruptDataError(f"{files[0]}: holds no images")
    return raw, ", ".join(map(str, files)) or spec.name


def _first_complete(layouts: Sequence[Sequence[Path]]) -> list[Path] | None:
    for layout in layouts:
        found = [_plain_or_gz(path) for path in layout]
        if all(path.is_file() for path in found):
            return found
    return None


def _plain_or_gz(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _missing_message(spec: DatasetSpec, split: str, layouts: Sequence[Sequence[Path]]) -> str:
    lines = [
        f"{spec.name}: the {split} split was not found. It can be any one of (files as they are "
        f"or with .gz appended)"
    ]
    for layout in layouts:
        absent = [path.name for path in layout if not _plain_or_gz(path).is_file()]
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
        getattr(datasets, spec.torchvision)(str(root), train=split == "train", download=True)
    except Exception as error:  # no torchvision, no network, no mirror, no space, wrong checksum
        reason = str(error).strip() or type(error).__name__
        raise MissingDataError(
            f"{_missing_message(spec, split, layouts)}\nThe download failed: {reason}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
