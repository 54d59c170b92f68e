# SPDX-License-Identifier: Apache-2.0
"""Labelled images in folders, a folder for each class; listed here, opened elsewhere."""

import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from python_models.data.decode import image_files, subfolders
from python_models.data.formats import CorruptDataError, MissingDataError

SPLIT_FOLDERS = {
    "train": ("train",),
    "valid": ("valid", "val", "validation"),
    "test": ("test", "val", "valid", "validation"),
}
"""What the folder of a split may be called, best first."""

USUAL_SIZE = 224
"""Size of images that do not say by themselves what the task's size is."""


class ImageFiles(NamedTuple):
    """A labelled source that is a file for each image, none of them opened.

    Attributes:
        folder: where `files` are.
        files: paths below `folder`.
        labels: int64 [n].
        class_names: of all classes, in the order of the labels.
    """

    folder: Path
    files: Sequence[str]
    labels: Tensor
    class_names: tuple[str, ...]


def read_class_folders(folder: Path, class_names: Sequence[str] | None = None) -> ImageFiles:
    """Lists the images of `folder/<class>/`, at any depth.

    Args:
        folder: one split.
        class_names: all classes, where the split may lack some; by default those that are there.

    Raises:
        CorruptDataError: if there are no folders of classes, no images, or unknown classes.
    """
    found = subfolders(folder)
    if not found:
        raise CorruptDataError(
            f"{folder}: holds no folders of classes: put images in {folder / '<class>'}"
        )
    names = tuple(class_names or found)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise CorruptDataError(
            f"{folder}: {unknown[0]!r} is not one of the classes {', '.join(names[:10])}"
            f"{', ...' if len(names) > 10 else ''}: take that folder away"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name in found:
            files += _below(folder, image_files(folder / name))
            labels += [label] * (len(files) - len(labels))
    return _listed(folder, files, labels, names)


def read_tiny_imagenet_val(folder: Path, annotations: Path) -> ImageFiles:
    """Lists the validation images of Tiny-ImageNet: `images/` and a line for each in a file.

    Args:
        folder: `tiny-imagenet-200/val`.
        annotations: its lines begin with a file's name and its class, separated by tabs.

    Raises:
        CorruptDataError: if a line is not like that, or names a class that `wnids.txt` lacks.
    """
    pairs = []
    for number, line in enumerate(_lines(annotations), 1):
        words = line.split("\t")
        if len(words) < 2:
            raise CorruptDataError(
                f"{annotations}: line {number} must be FILE, a tab and CLASS, got {line[:40]!r}"
            )
        pairs.append((words[0], words[1]))
    listed = folder.parent / "wnids.txt"
    names = sorted(_lines(listed) if listed.is_file() else {name for _, name in pairs})
    label_of = {name: label for label, name in enumerate(names)}
    unknown = next((name for _, name in pairs if name not in label_of), None)
    if unknown is not None:
        raise CorruptDataError(f"{annotations}: the class {unknown!r} is not in {listed}")
    files = [os.path.join("images", file) for file, _ in pairs]
    return _listed(folder, files, [label_of[name] for _, name in pairs], tuple(names))


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise CorruptDataError(f"{path}: not a text file ({error})") from error


def _below(folder: Path, paths: Iterable[str]) -> list[str]:
    start = len(os.path.join(folder, ""))
    return [path[start:] for path in paths]


def _listed(
    folder: Path, files: list[str], labels: list[int], class_names: tuple[str, ...]
) -> ImageFiles:
    if not files:
        raise CorruptDataError(f"{folder}: holds no images")
    return ImageFiles(folder, files, torch.tensor(labels), class_names)


def splits_of(folder: Path) -> dict[str, Path]:
    """Returns the folders of the splits in a folder, by split; empty if there are none."""
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        path = next((folder / name for name in names if (folder / name).is_dir()), None)
        if path is not None:
            found[split] = path
    return found


def class_names_of(folder: Path) -> tuple[str, ...]:
    """Returns the classes of all splits in a folder, sorted; a split may lack some.

    Raises:
        MissingDataError: if there are none.
    """
    names = sorted({name for path in splits_of(folder).values() for name in subfolders(path)})
    if not names:
        raise MissingDataError(
            f"{folder}: holds no labelled images: expected {folder / 'train' / '<class>'} and "
            f"{folder / 'test' / '<class>'} (or val) with images"
        )
    return tuple(names)


def guess_image_shape(folder: Path) -> tuple[int, int]:
    """Returns channels and size of the images in a folder, by the headers of the first ones.

    Grey if all of them are; their size if they are squares of one size up to `USUAL_SIZE`, else
    `USUAL_SIZE`.
    """
    from PIL import Image

    sizes, modes = set(), set()
    # One of each class, since a class may be grey by chance.
    firsts = (next(image_files(folder / name), None) for name in subfolders(folder))
    for path in islice(filter(None, firsts), 16):
        try:
            with Image.open(path) as image:
                sizes.add(image.size)
                modes.add(image.mode)
        except Exception:  # it will be reported when it is read
            continue
    is_grey = bool(modes) and modes <= {"1", "L", "I;16"}
    width, height = sizes.pop() if len(sizes) == 1 else (0, 0)
    is_small_square = width == height and 0 < width <= USUAL_SIZE
    return 1 if is_grey else 3, width if is_small_square else USUAL_SIZE
