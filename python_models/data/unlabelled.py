# SPDX-License-Identifier: Apache-2.0
"""Unlabelled images from folders, arrays and datasets, brought to the size of the task.

A source is read in one pass of batches, in memory that does not grow with it, and afterwards by the
positions of the images that were kept. Positions count what cannot be read too, so that they stay
the same whatever is damaged.
"""

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from python_models.data.datasets import DATASETS, npz_path
from python_models.data.decode import (
    IMAGE_SUFFIXES,
    SkippedFiles,
    Target,
    decode_batches,
    image_files,
)
from python_models.data.formats import CorruptDataError, MissingDataError, read_npz
from python_models.data.images import fit
from python_models.data.labelled import LabelledData, find_split, load_labelled
from python_models.distributed import World
from python_models.errors import UserError

READ_SIZE = 1024
"""Images read at a time where a caller does not say; fewer if they are large."""


class UnlabelledImages(ABC):
    """A source of images without labels.

    Attributes:
        target: what its images look like when they are handed out.
        skipped: what the last pass over all images left out.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.skipped = SkippedFiles()

    @property
    def batch_size(self) -> int:
        """Images to read at a time, so that a batch takes 16 MB as bytes at most."""
        channels, height, width = self.target.shape
        return max(1, min(READ_SIZE, 2**24 // (channels * height * width)))

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of images; those that turn out to be unreadable count."""

    @abstractmethod
    def batches(self, rank: int = 0, size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates once over all images, in the order of their positions.

        Args:
            rank: number of this process, of `size` that read the images together: it gets each
                `size`-th batch. They call `share_skipped` then, which raises and warns for all.
            size: number of these processes.

        Yields:
            Positions, int64 [b], and images, uint8 [b, channels, size, size].

        Raises:
            CorruptDataError: if no image can be read, or the source changes meanwhile.

        Warns:
            UserWarning: at the end, if some images cannot be read; they are left out.
        """

    def share_skipped(self, world: World) -> None:
        """Brings together what several processes left out, each in its batches.

        Raises:
            CorruptDataError: if no image can be read; on all processes.

        Warns:
            UserWarning: on the first one, if some images cannot be read.
        """
        return None

    @abstractmethod
    def take(self, positions: Tensor) -> Tensor:
        """Returns the images at these positions, int64 [n], uint8 [n, channels, size, size].

        Raises:
            CorruptDataError: if one of them is not there or cannot be read.
        """

    def load(self, limit: int | None = None) -> Tensor:
        """Returns all readable images in memory, uint8 [n, channels, size, size].

        Args:
            limit: take this many at most, evenly spaced over the source.

        Raises:
            ValueError: for a limit below 1.
            CorruptDataError: if no image can be read.

        Warns:
            UserWarning: if some images cannot be read; they are left out.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} must be at least 1")
        if limit is None or limit >= len(self):
            return self._load(None)
        return self._load(torch.arange(limit) * len(self) // limit)

    @abstractmethod
    def _load(self, positions: Tensor | None) -> Tensor:
        """Returns the readable ones of these images, or of all."""


class ImageArray(UnlabelledImages):
    """Images that are in memory already.

    Args:
        images: uint8 [n, c, h, w].
        target: what they are brought to when they are handed out.
    """

    def __init__(self, images: Tensor, target: Target) -> None:
        super().__init__(target)
        self._images = images

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._images)

    def batches(self, rank: int = 0, size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates once over all images, or over each `size`-th batch of them."""
        for positions in torch.split(torch.arange(len(self)), self.batch_size)[rank::size]:
            yield positions, self._load(positions)

    def take(self, positions: Tensor) -> Tensor:
        """Returns the images at these positions."""
        if len(positions) and int(positions.max()) >= len(self):
            raise CorruptDataError(
                f"image {int(positions.max())} is wanted, but there are {len(self)}"
            )
        return self._load(positions)

    def _load(self, positions: Tensor | None) -> Tensor:
        images = self._images if positions is None else self._images[positions]
        return fit(images, self.target.size, self.target.channels)


class ImageTree(UnlabelledImages):
    """The image files below a folder, of which there may be millions: see `image_files`.

    Args:
        folder: where they are.
        target: what they are brought to.

    Raises:
        MissingDataError: if there are none.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        super().__init__(target)
        self.folder = folder
        self._count = sum(1 for _ in image_files(folder))
        if not self._count:
            raise MissingDataError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        """Returns the number of files."""
        return self._count

    def batches(self, rank: int = 0, size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates once over all images, or over each `size`-th batch of them."""
        return self._read(None, rank, size)

    def _read(
        self, wanted: Tensor | None, rank: int = 0, size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over the images at some positions, which must ascend, or over all."""
        self.skipped = skipped = SkippedFiles()
        total = self._count if wanted is None else len(wanted)
        self._unreadable = 0
        # All processes walk through the folder; one notes what is wrong with it.
        chunks = self._chunks(wanted, skipped if rank == 0 else None)
        for positions, images, rows in decode_batches(
            itertools.islice(chunks, rank, None, size), self.target, skipped
        ):
            self._unreadable += len(positions) - len(rows)
            if len(rows):
                yield positions[rows], images
        if size == 1:
            self._report(total, skipped)

    def share_skipped(self, world: World) -> None:
        """Brings together what several processes left out, each in its batches."""
        if world.size == 1:
            return
        found = world.objects((self._unreadable, self.skipped.count, self.skipped.entries))
        self._unreadable = sum(unreadable for unreadable, _, _ in found)
        self.skipped = skipped = SkippedFiles()
        skipped.count = sum(count for _, count, _ in found)
        skipped.entries = [entry for _, _, entries in found for entry in entries]
        del skipped.entries[SkippedFiles.KEEP :]
        self._report(self._count, skipped, is_warned=world.is_first)

    def _report(self, total: int, skipped: SkippedFiles, *, is_warned: bool = True) -> None:
        if self._unreadable == total:
            raise CorruptDataError(
                f"{self.folder}: none of the {total} images can be read: {skipped}"
            )
        if skipped.count and is_warned:
            warnings.warn(
                f"{self.folder}: left out {skipped.count} of {total} images that cannot be read: "
                f"{skipped}",
                stacklevel=3,
            )

    def _chunks(
        self, wanted: Tensor | None, skipped: SkippedFiles | None
    ) -> Iterator[tuple[Tensor, list[str]]]:
        """Yields the positions and paths of the files wanted, a batch at a time."""
        left = None if wanted is None else iter(wanted.tolist())
        following = -1 if left is None else next(left, -1)
        positions: list[int] = []
        paths: list[str] = []
        count = 0
        for path in image_files(self.folder, skipped):
            if left is None or count == following:
                positions.append(count)
                paths.append(path)
                following = -1 if left is None else next(left, -1)
            count += 1
            if len(paths) == self.batch_size:
                yield torch.tensor(positions), paths
                positions, paths = [], []
        if paths:
            yield torch.tensor(positions), paths
        if count != self._count:
            raise CorruptDataError(
                f"{self.folder}: held {self._count} images at first and {count} when it was read "
                "again: leave it alone meanwhile"
            )

    def take(self, positions: Tensor) -> Tensor:
        """Returns the images at these positions."""
        ascending, order = positions.sort()
        images = torch.empty((len(positions), *self.target.shape), dtype=torch.uint8)
        skipped = SkippedFiles()
        done = 0
        for some, decoded, _ in decode_batches(self._chunks(ascending, None), self.target, skipped):
            if skipped.count:
                raise CorruptDataError(f"{self.folder}: can no longer be read: {skipped}")
            images[order[done : done + len(some)]] = decoded
            done += len(some)
        if done < len(positions):
            raise CorruptDataError(
                f"{self.folder}: image {int(ascending[done])} is wanted, but there are {len(self)}"
            )
        return images

    def _load(self, positions: Tensor | None) -> Tensor:
        total = self._count if positions is None else len(positions)
        images = torch.empty((total, *self.target.shape), dtype=torch.uint8)
        filled = 0
        for _, some in self._read(positions):
            images[filled : filled + len(some)] = some
            filled += len(some)
        return images[:filled]


def open_unlabelled(
    source: str | Path,
    data_root: str | Path,
    image_size: int,
    channels: int,
    download: bool = False,
    imbalance: float = 1.0,
) -> UnlabelledImages:
    """Opens images without labels.

    Args:
        source: a name in `DATASETS` (its train split), an .npz (`labels` are not opened), or a
            folder whose images are found at any depth. Relative paths are looked for in the working
            directory, then under `data_root`.
        data_root: the folder under which datasets lie.
        image_size: height and width wanted: the largest centred square is resized.
        channels: 1 (colour becomes grey) or 3 (grey is repeated).
        download: as in `load_labelled`, for the name of a dataset.
        imbalance: times that class 0 is to be more frequent than the last one; above 1 the source
            must be a dataset or an .npz in memory, whose labels are then opened. See `long_tailed`.

    Raises:
        ValueError: for a size below 1, or channels that are neither 1 nor 3.
        UserError: for an imbalance below 1, or one of images without labels.
        MissingDataError: if the source is not there or a folder holds no images.
        CorruptDataError: if an array file is damaged.
    """
    has_tail = imbalance != 1
    target = Target(channels, image_size)
    root = Path(data_root).expanduser()
    if str(source) in DATASETS:
        spec = DATASETS.get(str(source))
        if spec.is_folder:
            (path,) = find_split(spec, "train", root, download)
        else:
            data = load_labelled(spec.name, "train", root, download)
            assert isinstance(data, LabelledData)
            kept = long_tailed(data.labels, imbalance) if has_tail else slice(None)
            return ImageArray(data.images[kept], target)
    else:
        path = _find(source, root)
    if path.is_dir():
        if has_tail:
            raise UserError(
                f"unlabelled_imbalance={imbalance:g} needs labels, but {path} is a folder of "
                "images: give a dataset in memory or an .npz file with labels"
            )
        return ImageTree(path, target)
    images, labels = read_npz(path, with_labels=has_tail)
    return ImageArray(images[long_tailed(labels, imbalance)] if has_tail else images, target)


def long_tailed(labels: Tensor, imbalance: float) -> Tensor:
    """Returns the positions of images that make a balanced dataset a long-tailed one.

    Of class c of C it keeps the first ``n imbalance^(-c / (C - 1))`` images, rounded, at least one,
    where n is the size of the smallest class.

    Args:
        labels: classes, int64 [n].
        imbalance: at least 1.

    Returns:
        int64 [m], ascending.

    Raises:
        UserError: for an imbalance below 1, or fewer than two classes.

    Example:
        >>> labels = torch.arange(3).repeat(100)
        >>> labels[long_tailed(labels, 25.0)].bincount()
        tensor([100,  20,   4])
    """
    classes, counts = torch.unique(labels, return_counts=True)
    if not 1 <= imbalance < math.inf or len(classes) < 2:
        raise UserError(
            f"unlabelled_imbalance={imbalance:g} must be >= 1 and finite, of at least 2 classes; "
            f"there are {len(classes)}"
        )
    smallest = int(counts.min())
    kept = []
    for index, label in enumerate(classes):
        wanted = smallest * imbalance ** (-index / (len(classes) - 1))
        kept.append((labels == label).nonzero()[: max(1, round(wanted)), 0])
    return torch.cat(kept).sort().values


def load_unlabelled(
    source: str | Path,
    data_root: str | Path,
    image_size: int,
    channels: int,
    limit: int | None = None,
    download: bool = False,
) -> Tensor:
    """Loads images without labels into memory, uint8 [n, channels, image_size, image_size].

    Args:
        source: as for `open_unlabelled`, like the others.
        data_root: the folder under which datasets lie.
        image_size: height and width wanted.
        channels: 1 or 3.
        limit: take this many images at most, evenly spaced over the source.
        download: let torchvision download a dataset.

    Raises:
        ValueError: for sizes or limits below 1, or channels that are neither 1 nor 3.
        MissingDataError: if the source is not there or a folder holds no images.
        CorruptDataError: if an array file is damaged or no image of a folder can be read.

    Warns:
        UserWarning: once, if some images of a folder cannot be read; they are left out.
    """
    return open_unlabelled(source, data_root, image_size, channels, download).load(limit)


def _find(source: str | Path, root: Path) -> Path:
    path = Path(source).expanduser()
    places = [path, root / path, npz_path(str(source), "train", root)]
    for place in places:
        if place.is_dir() or (place.is_file() and place.suffix == ".npz"):
            return place
    raise MissingDataError(
        f"unlabelled source {str(source)!r} is neither a dataset ({', '.join(DATASETS)}), nor a "
        f"folder of images, nor an .npz file: looked for {', '.join(map(str, places))}"
    )
