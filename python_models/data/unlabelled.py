# SPDX-License-Identifier: Apache-2.0
"""Unlabelled images from folders, arrays and datasets, brought to the size of the task."""

import importlib
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from python_models.data.datasets import DATASETS, npz_path
from python_models.data.formats import CorruptDataError, MissingDataError, read_npz
from python_models.data.images import fit
from python_models.data.labelled import load_labelled

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_unlabelled(
    source: str | Path,
    data_root: str | Path,
    image_size: int,
    channels: int,
    limit: int | None = None,
    download: bool = False,
) -> Tensor:
    """Loads images without labels, uint8 [n, channels, image_size, image_size].

    Args:
        source: a name in `DATASETS` (its train split), an .npz (`labels` are not opened), or a
            folder that is searched for png, jpg, webp and bmp files at any depth, sorted by path.
            Relative paths are looked for in the working directory, then under `data_root`.
        data_root: the folder under which datasets lie.
        image_size: height and width wanted: the largest centred square is resized.
        channels: 1 (colour becomes grey) or 3 (grey is repeated).
        limit: take this many images at most, evenly spaced over the source.
        download: as in `load_labelled`, for the name of a dataset.

    Raises:
        ValueError: for sizes or limits below 1, or channels that are neither 1 nor 3.
        MissingDataError: if the source is not there or a folder holds no images.
        CorruptDataError: if an array file is damaged or no image of a folder can be read.

    Warns:
        UserWarning: once, if some images of a folder cannot be read; they are left out.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels} must be 1 (grey) or 3 (colour)")
    for name, value in (("image_size", image_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    root = Path(data_root).expanduser()
    if str(source) in DATASETS:
        images = load_labelled(str(source), "train", root, download).images
        return fit(_take_evenly(images, limit), image_size, channels)
    path = _find(source, root)
    if path.is_dir():
        return _read_folder(path, image_size, channels, limit)
    images = read_npz(path, with_labels=False).images
    return fit(_take_evenly(images, limit), image_size, channels)


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


def _take_evenly(images: Tensor, limit: int | None) -> Tensor:
    if limit is None or limit >= len(images):
        return images
    return images[torch.arange(limit) * len(images) // limit]


def _read_folder(folder: Path, image_size: int, channels: int, limit: int | None) -> Tensor:
    paths = sorted(_image_files(folder))
    if not paths:
        raise MissingDataError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    if limit is not None and limit < len(paths):
        paths = [paths[i * len(paths) // limit] for i in range(limit)]
    importlib.import_module("PIL.Image")  # its absence is no fault of the images
    images = torch.empty((len(paths), channels, image_size, image_size), dtype=torch.uint8)

    def read_into(row: int) -> str | None:
        try:
            images[row] = _read_image(paths[row], image_size, channels)
        except Exception as error:  # decoders of damaged files raise nearly anything
            return f"{paths[row]}: {error}"
        return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        errors = list(threads.map(read_into, range(len(paths))))
    readable = [row for row, error in enumerate(errors) if error is None]
    if len(readable) == len(paths):
        return images
    example = next(error for error in errors if error is not None)
    if not readable:
        raise CorruptDataError(
            f"{folder}: none of the {len(paths)} images can be read, for example {example}"
        )
    warnings.warn(
        f"{folder}: left out {len(paths) - len(readable)} of {len(paths)} images that cannot be "
        f"read, for example {example}",
        stacklevel=3,
    )
    return images[readable]


def _image_files(folder: Path) -> Iterator[Path]:
    """Yields the images below `folder`, through links but into no folder twice."""
    seen = set()
    for directory, subfolders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(directory, name)


def _read_image(path: Path, image_size: int, channels: int) -> Tensor:
    from PIL import Image  # only folders need Pillow

    mode = "L" if channels == 1 else "RGB"
    with Image.open(path) as image:
        # JPEGs can be decoded at a fraction of their size, at a fraction of the time.
        image.draft(mode, (2 * image_size, 2 * image_size))
        square = image.convert(mode)
        width, height = square.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = square.resize(
            (image_size, image_size),
            Image.Resampling.BILINEAR,
            box=(left, top, left + side, top + side),
            reducing_gap=2.0,
        )
    pixels = torch.from_numpy(np.array(square))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
