# SPDX-License-Identifier: Apache-2.0
"""Readers of the array files that image datasets come in; damage is reported with its mend."""

import gzip
import importlib
import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UInt8Array = npt.NDArray[np.uint8]

_FETCH_AGAIN = "delete it and fetch it again (download=True, --download)"
_WRITE_AGAIN = (
    "write it again with numpy.savez_compressed(path, images=..., labels=...): "
    "images uint8 [n, h, w] or [n, h, w, 3], labels integers [n]"
)


class MissingDataError(FileNotFoundError):
    """Data that was asked for is not there; the message says what to put where."""


class CorruptDataError(ValueError):
    """A data file is damaged or not what it should be; the message names it and the mend."""


class RawImages(NamedTuple):
    """The content of a labelled source: images uint8 [n, c, h, w] and labels int64 [n]."""

    images: Tensor
    labels: Tensor


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file, decompressed if it is gzip (by its content, not its name).

    Raises:
        CorruptDataError: if the compressed stream is damaged.
    """
    data = path.read_bytes()
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptDataError(
            f"{path}: not a complete gzip file ({error}): {_FETCH_AGAIN}"
        ) from error


def read_idx(path: Path, ndim: int) -> UInt8Array:
    """Reads an idx file of unsigned bytes, the format of MNIST; plain or gzip.

    Args:
        path: the file.
        ndim: number of dimensions it must have: 3 for images, 1 for labels.

    Raises:
        CorruptDataError: for another magic number, or more or fewer bytes than its header says.
    """
    data = read_bytes(path)
    magic = bytes((0, 0, 8, ndim))
    if data[:4] != magic:
        raise CorruptDataError(
            f"{path}: starts with {data[:4].hex() or 'nothing'}, but an idx file of bytes in "
            f"{ndim} dimension(s) starts with {magic.hex()}: {_FETCH_AGAIN}"
        )
    header = 4 + 4 * ndim
    if len(data) < header:
        raise CorruptDataError(
            f"{path}: {len(data)} bytes are fewer than its header's {header}: {_FETCH_AGAIN}"
        )
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    if len(data) - header != math.prod(shape):
        raise CorruptDataError(
            f"{path}: its header promises {math.prod(shape)} bytes of data for shape {shape}, "
            f"but there are {len(data) - header}: {_FETCH_AGAIN}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, bytes and strings; refuses all else."""

    # numpy 2 moved these functions; old files keep the old module names.
    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy._core.numeric", "_frombuffer"),
            ("_codecs", "encode"),  # bytes, as Python 3 writes them for Python 2
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Returns an allowed function or class.

        Raises:
            pickle.UnpicklingError: for any other one.
        """
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return super().find_class(module, name)


def read_pickle(path: Path) -> dict[str, Any]:
    """Reads a pickled dictionary of arrays, as CIFAR's Python version has it.

    No code of the file is run: only numpy arrays, containers, numbers, bytes and strings load.

    Raises:
        CorruptDataError: if the file is not such a pickle.
    """
    try:
        content = _ArrayUnpickler(io.BytesIO(read_bytes(path)), encoding="bytes").load()
    except CorruptDataError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CorruptDataError(
            f"{path}: not a readable pickle of arrays ({error}): {_FETCH_AGAIN}"
        ) from error
    if not isinstance(content, dict):
        raise CorruptDataError(
            f"{path}: holds a {type(content).__name__} instead of a dictionary: {_FETCH_AGAIN}"
        )
    return {key.decode() if isinstance(key, bytes) else str(key): content[key] for key in content}


def read_cifar_batch(path: Path, label_key: str) -> RawImages:
    """Reads one pickled batch of CIFAR: "data" uint8 [n, 3072] and n labels under `label_key`.

    Raises:
        CorruptDataError: if a part is absent or of another type or size.
    """
    content = read_pickle(path)
    absent = {"data", label_key} - content.keys()
    if absent:
        raise CorruptDataError(
            f"{path}: has no {sorted(absent)}, only {sorted(content)}: {_FETCH_AGAIN}"
        )
    data = content["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise CorruptDataError(
            f"{path}: 'data' must be uint8 [n, 3072], got {_describe(data)}: {_FETCH_AGAIN}"
        )
    labels = _read_labels(path, content[label_key], len(data), _FETCH_AGAIN)
    return RawImages(torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), labels)


def read_svhn(path: Path) -> RawImages:
    """Reads a MATLAB file of SVHN: "X" uint8 [32, 32, 3, n] and "y" [n, 1] in 1..10, 10 for zero.

    Raises:
        CorruptDataError: if a part is absent or of another type or size.
    """
    matlab = importlib.import_module("scipy.io")
    data = io.BytesIO(read_bytes(path))
    try:
        content = matlab.loadmat(data, variable_names=["X", "y"])
    except Exception as error:  # a damaged file can raise nearly anything
        raise CorruptDataError(
            f"{path}: not a readable MATLAB file ({error}): {_FETCH_AGAIN}"
        ) from error
    absent = {"X", "y"} - content.keys()
    if absent:
        raise CorruptDataError(f"{path}: has no {sorted(absent)}: {_FETCH_AGAIN}")
    images = content["X"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise CorruptDataError(
            f"{path}: 'X' must be uint8 [32, 32, 3, n], got {_describe(images)}: {_FETCH_AGAIN}"
        )
    labels = _read_labels(path, content["y"].reshape(-1), images.shape[3], _FETCH_AGAIN)
    if len(labels) and int(labels.max()) > 10:
        raise CorruptDataError(
            f"{path}: labels must lie in 1..10, got {int(labels.max())}: {_FETCH_AGAIN}"
        )
    return RawImages(torch.from_numpy(images.transpose(3, 2, 0, 1).copy()), labels % 10)


def read_npz(path: Path, *, with_labels: bool = True) -> RawImages:
    """Reads an .npz of images uint8 [n, h, w] or [n, h, w, c], c = 1 or 3, and integer labels [n].

    Without `with_labels` the labels are not opened, and come out empty.

    Raises:
        CorruptDataError: if the file is damaged or an array is absent or of another type or size.
    """
    with _OpenNpz(path) as archive:
        images = archive.read("images")
        if images.dtype != np.uint8:
            raise CorruptDataError(
                f"{path}: 'images' must be uint8, got {images.dtype}: {_WRITE_AGAIN}"
            )
        _check_npz_shape(path, images.shape)
        if images.ndim == 3:
            images = images[..., None]
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        if not with_labels:
            return RawImages(tensor, torch.empty(0, dtype=torch.int64))
        labels = _read_labels(path, archive.read("labels"), len(images), _WRITE_AGAIN)
        return RawImages(tensor, labels)


class NpzHeader(NamedTuple):
    """What an .npz tells without its images being read."""

    channels: int
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    classes_inferred: bool


def read_npz_header(path: Path) -> NpzHeader:
    """Reads the labels, the class names and the *shape* of the images of an .npz.

    Class names come from the optional array "class_names"; else they are "0", "1", ... up to the
    largest label.

    Raises:
        CorruptDataError: as `read_npz`.
    """
    with _OpenNpz(path) as archive:
        shape = archive.shape("images")
        _check_npz_shape(path, shape)
        inferred = "class_names" not in archive.names()
        if not inferred:
            class_names = tuple(str(name) for name in archive.read("class_names").ravel())
        else:
            labels = _read_labels(path, archive.read("labels"), shape[0], _WRITE_AGAIN)
            class_names = tuple(str(label) for label in range(int(labels.max()) + 1))
    channels = shape[3] if len(shape) == 4 else 1
    return NpzHeader(channels, (shape[1], shape[2]), class_names, inferred)


class _OpenNpz:
    """An open .npz whose failures, whatever numpy or zipfile raise, become `CorruptDataError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "_OpenNpz":
        self._archive = self._guard(lambda: zipfile.ZipFile(self.path))
        return self

    def __exit__(self, *exception: object) -> None:
        self._archive.close()

    def names(self) -> list[str]:
        """Returns the names of the arrays."""
        return [name.removesuffix(".npy") for name in self._archive.namelist()]

    def read(self, name: str) -> npt.NDArray[Any]:
        """Returns one array."""
        array: npt.NDArray[Any] = self._with_member(
            name, lambda member: np.lib.format.read_array(member, allow_pickle=False)
        )
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of one array from its header alone."""

        def read_shape(member: BinaryIO) -> tuple[int, ...]:
            version = np.lib.format.read_magic(member)
            if version == (1, 0):
                return np.lib.format.read_array_header_1_0(member)[0]
            return np.lib.format.read_array_header_2_0(member)[0]

        shape: tuple[int, ...] = self._with_member(name, read_shape)
        return shape

    def _with_member(self, name: str, read: Callable[[Any], Any]) -> Any:
        if name not in self.names():
            raise CorruptDataError(
                f"{self.path}: has no array {name!r}, only {self.names()}: {_WRITE_AGAIN}"
            )

        def action() -> Any:
            with self._archive.open(f"{name}.npy") as member:
                return read(member)

        return self._guard(action)

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # zipfile, zlib and numpy each have their own
            raise CorruptDataError(
                f"{self.path}: not a readable .npz ({error}): {_WRITE_AGAIN}"
            ) from error


def _check_npz_shape(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape:
        raise CorruptDataError(
            f"{path}: 'images' must have shape [n, h, w], [n, h, w, 1] or [n, h, w, 3] and not be "
            f"empty, got {list(shape)}: {_WRITE_AGAIN}"
        )


def _read_labels(path: Path, labels: Any, count: int, mend: str) -> Tensor:
    try:
        array = np.asarray(labels)
    except ValueError:  # a ragged list
        array = np.empty(0, dtype=object)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise CorruptDataError(
            f"{path}: labels must be integers [{count}], got {_describe(labels)}: {mend}"
        )
    if len(array) != count:
        raise CorruptDataError(f"{path}: has {count} images but {len(array)} labels: {mend}")
    if count and array.min() < 0:
        raise CorruptDataError(f"{path}: labels must not be negative, got {array.min()}: {mend}")
    return torch.from_numpy(array.astype(np.int64))


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"
