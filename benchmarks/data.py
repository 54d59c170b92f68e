# SPDX-License-Identifier: Apache-2.0
"""Rows like a teacher's logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 16384
RANK = 32


def teacher_like_logits(n: int, d: int, seed: int = 0) -> Tensor:
    """Draw rows with imbalanced classes, a peak each, confusion of low rank, and noise.

    Class frequencies are Dirichlet(0.7), the peak of a row's class is uniform in [2, 10], the
    confusion has rank min(32, d) and unit variance, the noise has standard deviation 0.7.

    Args:
        n: Rows.
        d: Columns, the classes.
        seed: Seed of all draws.

    Returns:
        [n, d] float32. It is filled in chunks: no second array of its size is made.
    """
    random = np.random.default_rng(seed)
    frequencies = random.dirichlet(np.full(d, 0.7))
    rank = min(RANK, d)
    confusion = random.standard_normal((rank, d), dtype=np.float32) / np.float32(rank**0.5)
    rows = np.empty((n, d), dtype=np.float32)
    for start in range(0, n, CHUNK):
        chunk = rows[start : start + CHUNK]
        random.standard_normal(out=chunk, dtype=np.float32)
        chunk *= np.float32(0.7)
        chunk += random.standard_normal((len(chunk), rank), dtype=np.float32) @ confusion
        classes = random.choice(d, size=len(chunk), p=frequencies)
        peaks = random.uniform(2, 10, size=len(chunk)).astype(np.float32)
        chunk[np.arange(len(chunk)), classes] += peaks
    return torch.from_numpy(rows)
