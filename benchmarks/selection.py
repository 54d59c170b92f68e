# SPDX-License-Identifier: Apache-2.0
"""Memory and speed of DFND's selection from a stream of logits.

The stream is made as it is read, a batch at a time, and its making is not in the time. Memory is
the growth of the resident set of a fresh process, see `benchmarks.memory`. It cannot be less than
what the selection keeps: a position, a certainty and the logits of every image selected. 600,000
images of 100 classes take 247 MB for that alone, whence the smaller selections where classes are
many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks import threads as pools
from python_models.selection import select_images

FILES = 1_000_000
QUICK_FILES = 100_000
SHAPES = [(10, 600_000), (100, 300_000), (1000, 30_000)]
"""Classes, and images to select; the first is DFND's own for CIFAR-10."""
WANTED_MB = 200.0
BATCH = 1024


@dataclass(frozen=True)
class Row:
    """A line of the result file.

    Attributes:
        files: Images in the stream.
        classes: Width of the logits.
        select: Images selected.
        kept_mb: Megabytes of what is kept of them.
        growth_mb: Megabytes by which the process grows at most.
        seconds: Time of the selection, without the making of the stream.
        files_per_s: Images in the stream by that time.
    """

    files: int
    classes: int
    select: int
    kept_mb: float
    growth_mb: float
    seconds: float
    files_per_s: float


def bench_shape(files: int, classes: int, select: int, threads: int) -> Row:
    """Measure one selection in a process of its own."""
    select = min(select, files)
    mib, seconds = memory.growth_mib(_prepare, files, classes, select, threads, threads=threads)
    kept = select * (8 + 4 + 4 * classes) / 1e6
    return Row(files, classes, select, kept, mib * 2**20 / 1e6, seconds, files / seconds)


def describe(row: Row) -> str:
    """Return a row as a line for the terminal, with what was wanted."""
    met = "yes" if row.growth_mb < WANTED_MB else "no"
    return (
        f"{row.files:,} images, {row.classes} classes, {row.select:,} selected: "
        f"{row.growth_mb:.1f} MB, of these {row.kept_mb:.1f} kept (< {WANTED_MB:.0f} [{met}]), "
        f"{row.files_per_s:,.0f} images/s"
    )


def _prepare(files: int, classes: int, select: int, threads: int) -> Callable[[], float]:
    pools.limit(threads)
    clock = time.process_time if threads == 1 else time.perf_counter

    def run(files: int, select: int) -> float:
        making = 0.0

        def stream() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal making
            generator = torch.Generator().manual_seed(0)
            for begin in range(0, files, BATCH):
                start = clock()
                positions = torch.arange(begin, min(begin + BATCH, files))
                logits = 3 * torch.randn(len(positions), classes, generator=generator)
                making += clock() - start
                yield positions, logits

        start = clock()
        select_images(stream(), select, classes, "highest confidence")
        return clock() - start - making

    run(4 * BATCH, BATCH)
    return lambda: run(files, select)
