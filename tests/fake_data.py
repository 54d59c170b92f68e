# SPDX-License-Identifier: Apache-2.0
"""Tiny files in the formats that image datasets come in."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def idx_bytes(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def write_idx_split(
    folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray, suffix: str = ""
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if suffix == ".gz" else bytes
    (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(images)))
    (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(labels)))


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_npz(path: Path, images: np.ndarray, labels: Any = None, **others: Any) -> None:
    if labels is not None:
        others["labels"] = labels
    np.savez_compressed(path, images=images, **others)


def save_image(path: Path, array: np.ndarray) -> None:
    pillow = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.fromarray(array).save(path)
