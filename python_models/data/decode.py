# SPDX-License-Identifier: Apache-2.0
"""Image files: finding them in folders of any size, and decoding them on threads."""

import importlib
import math
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from python_models.data.formats import MissingDataError

TagT = TypeVar("TagT")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
"""Endings of the files that are looked at, in small letters."""

MAX_PIXELS = 2**26
"""Images that decode to more pixels are skipped: one such image takes 200 MB as colour."""

BATCHES_AHEAD = 2
"""Batches that are being decoded while one is used."""

# What turns the pixels upright, by Exif orientation; names of PIL.Image.Transpose.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Target:
    """What decoded images look like.

    Attributes:
        channels: 1 (grey) or 3 (colour).
        size: height and width.
        crop: the centred square that is kept, as a fraction of the shorter side.

    Raises:
        ValueError: if one of them is out of range.
    """

    channels: int
    size: int
    crop: float = 1.0

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels} must be 1 (grey) or 3 (colour)")
        if self.size < 1:
            raise ValueError(f"image_size={self.size} must be at least 1")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop={self.crop} must lie in (0, 1]")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.size, self.size


class SkippedFiles:
    """Which files were left out, and why.

    All are counted; the first `KEEP` are remembered, so that a million of them do no harm.
    """

    KEEP = 10_000

    def __init__(self) -> None:
        self.count = 0
        self.entries: list[tuple[str, str]] = []

    def add(self, path: str, error: Exception) -> None:
        """Counts a file that cannot be used."""
        self.count += 1
        if len(self.entries) < self.KEEP:
            self.entries.append((path, _reason(error)))

    def __str__(self) -> str:
        """Returns the first names with their reasons, and how many more there are."""
        first = [f"{path} ({reason})" for path, reason in self.entries[:3]]
        more = [f"and {self.count - len(first)} more"] * (self.count > len(first))
        return ", ".join(first + more)

    def write(self, path: Path) -> None:
        """Writes a line for each file: its path, a tab, the reason."""
        lines = [f"{name}\t{reason}\n" for name, reason in self.entries]
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines)} more\n")
        path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _reason(error: Exception) -> str:
    """Returns an error in one line, without the path that it may repeat."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image, or damaged at its start"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def image_files(folder: str | Path, skipped: SkippedFiles | None = None) -> Iterator[str]:
    """Yields the paths of the images below a folder, by `IMAGE_SUFFIXES`, always in one order.

    A folder's files come first, sorted by name, then its subfolders. Links are followed, but into
    no folder twice; hidden files and folders are left out. Only the names of one folder at a time
    are in memory, and a few bytes for every folder.

    Args:
        folder: where to begin.
        skipped: takes the subfolders that cannot be read.

    Raises:
        MissingDataError: if `folder` itself cannot be read.
    """
    root = os.fspath(folder)
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        try:
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            files, subfolders = _list(directory)
        except OSError as error:
            if directory == root:
                raise MissingDataError(f"{root}: cannot be read ({_reason(error)})") from error
            if skipped is not None:
                skipped.add(os.path.join(directory, ""), error)
            continue
        for name in files:
            yield os.path.join(directory, name)
        waiting.extend(os.path.join(directory, name) for name in reversed(subfolders))


def subfolders(folder: str | Path) -> list[str]:
    """Returns the names of the folders in a folder, sorted, without hidden ones.

    Raises:
        MissingDataError: if it cannot be read.
    """
    try:
        return _list(os.fspath(folder))[1]
    except OSError as error:
        raise MissingDataError(f"{folder}: cannot be read ({_reason(error)})") from error


def _list(directory: str) -> tuple[list[str], list[str]]:
    """Returns the names of the images and of the folders in a folder, each sorted."""
    files, folders = [], []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            link = entry.path if entry.is_symlink() else None
            if os.path.isdir(link) if link else entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and (
                # A pipe would block its reader; a link that leads nowhere is to be reported.
                os.path.isfile(link) or not os.path.exists(link) if link else entry.is_file()
            ):
                files.append(entry.name)
    return sorted(files), sorted(folders)


def decode_batches(
    batches: Iterable[tuple[TagT, Sequence[str]]], target: Target, skipped: SkippedFiles
) -> Iterator[tuple[TagT, Tensor, Tensor]]:
    """Decodes batches of files on as many threads as there are cores, some batches ahead.

    Args:
        batches: pairs of anything and the paths of a batch.
        target: what the images shall look like.
        skipped: takes the files that cannot be used.

    Yields:
        For each batch in order its tag, the images that can be used, uint8
        ``[k, channels, size, size]``, and their places in the batch, int64 ``[k]``.
    """
    importlib.import_module("PIL.Image")  # its absence is no fault of the images
    # Pillow's warnings name no file. Those that matter here come back as a file that is skipped.
    warnings.filterwarnings("ignore", module=r"PIL\.", append=True)
    threads = os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads)
    pending: deque[tuple[TagT, Sequence[str], Tensor, list[Future[list[_Failure]]]]] = deque()

    def finish() -> tuple[TagT, Tensor, Tensor]:
        tag, paths, images, pieces = pending.popleft()
        failures = [failure for piece in pieces for failure in piece.result()]
        for row, error in failures:
            skipped.add(paths[row], error)
        if not failures:
            return tag, images, torch.arange(len(paths))
        usable = torch.ones(len(paths), dtype=torch.bool)
        usable[[row for row, _ in failures]] = False
        return tag, images[usable], usable.nonzero().squeeze(1)

    try:
        for tag, paths in batches:
            images = torch.empty((len(paths), *target.shape), dtype=torch.uint8)
            size = max(1, min(32, len(paths) // (4 * threads)))
            pieces = [
                pool.submit(_decode_into, images.numpy(), paths, range(i, i + size), target)
                for i in range(0, len(paths), size)
            ]
            pending.append((tag, paths, images, pieces))
            if len(pending) > BATCHES_AHEAD:
                yield finish()
        while pending:
            yield finish()
    finally:
        pool.shutdown(cancel_futures=True)


_Failure = tuple[int, Exception]


def _decode_into(
    images: npt.NDArray[np.uint8], paths: Sequence[str], rows: range, target: Target
) -> list[_Failure]:
    failures = []
    for row in rows[: len(paths) - rows.start]:
        try:
            images[row] = read_image(paths[row], target)
        except Exception as error:  # decoders of damaged files raise nearly anything
            failures.append((row, error))
    return failures


def read_image(path: str | Path, target: Target) -> npt.NDArray[np.uint8]:
    """Decodes one file and brings it to its target: upright, cut to a square, resized bilinearly.

    Colour becomes grey by its luma, grey is repeated, 16 bits become 8, and what is transparent
    lies on white.

    Returns:
        uint8 ``[channels, size, size]``.

    Raises:
        ValueError: for more than `MAX_PIXELS` pixels, and pixels whose range is unknown.
        Exception: whatever Pillow raises for a damaged file.
    """
    from PIL import Image  # only folders need Pillow

    mode = "L" if target.channels == 1 else "RGB"
    with Image.open(path) as image:
        # JPEGs can be decoded at a fraction of their size, at a fraction of the time.
        least = math.ceil(2 * target.size / target.crop)
        image.draft(mode, (least, least))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}")
        side = target.crop * min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = _flatten(image, mode).resize(
            (target.size, target.size),
            Image.Resampling.BILINEAR,
            box=(left, top, left + side, top + side),
            reducing_gap=2.0,
        )
        upright = _UPRIGHT.get(_orientation(image))
    if upright is not None:
        square = square.transpose(Image.Transpose[upright])
    pixels = np.asarray(square)
    return pixels[None] if target.channels == 1 else pixels.transpose(2, 0, 1)


def _flatten(image: Any, mode: str) -> Any:
    """Converts a Pillow image of any mode to grey or colour without transparency."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # convert() would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its pixels are 32-bit numbers of unknown range")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert(mode)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Any) -> int:
    """Returns the Exif orientation, 1 (upright) if it says none or cannot be read."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels are fine
        return 1
