# SPDX-License-Identifier: Apache-2.0
"""The best rows of a stream, in one pass and in memory that the stream's length does not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from python_models.distributed import ALONE, World

ROOM = 2**20
"""Numbers of new rows that there is room for at least."""
COLUMNS = 4
"""Columns that are sorted at a time, since a sorted copy of them all would double the memory."""


class TopRows:
    """Keeps the rows of a stream that have the largest values, on the CPU.

    Of equal values the one of the lower position is kept. A row whose value is NaN or ``-inf`` is
    never kept. In memory are the kept rows and, for new ones, room for a sixteenth of them or for
    `ROOM` numbers.

    Args:
        count: Rows to keep at most.
        width: Numbers in a row.

    Raises:
        ValueError: If one of them is below 1.

    Example:
        >>> top = TopRows(count=2, width=1)
        >>> top.add(torch.tensor([0.1, 0.9, 0.5]), torch.arange(3), torch.rand(3, 1))
        >>> top.result()[1]
        tensor([1, 2])
    """

    def __init__(self, count: int, width: int) -> None:
        for name, value in (("count", count), ("width", width)):
            if value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        self.count = count
        size = count + max(count // 16, ROOM // width, 1)
        self._values = torch.empty(size)
        self._positions = torch.empty(size, dtype=torch.int64)
        self._rows = torch.empty(size, width)
        self._used = 0
        self._least = -torch.inf

    def add(self, values: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Look at more rows.

        Args:
            values: What to judge them by, floating, ``[b]``.
            positions: Where they are in the stream, int64 ``[b]``; higher than all before.
            rows: Floating, ``[b, width]``, on any device.
        """
        values = values.float().cpu()
        better = (values > self._least).nonzero().squeeze(1)
        values, positions, rows = values[better], positions.cpu()[better], rows.cpu()[better]
        start = 0
        while start < len(values):
            size = min(len(values) - start, len(self._values) - self._used)
            source, goal = slice(start, start + size), slice(self._used, self._used + size)
            self._values[goal] = values[source]
            self._positions[goal] = positions[source]
            self._rows[goal] = rows[source]
            self._used += size
            start += size
            if self._used == len(self._values):
                self._drop()

    def _drop(self) -> None:
        """Drop all but the best, moving the last rows to where others have left."""
        if self._used <= self.count:
            return
        values = self._values[: self._used]
        least = values.kthvalue(self._used - self.count + 1).values
        keep = values > least
        equal = (values == least).nonzero().squeeze(1)
        equal = equal[self._positions[equal].argsort()]
        keep[equal[: self.count - int(keep.sum())]] = True
        free = (~keep[: self.count]).nonzero().squeeze(1)
        moved = self.count + keep[self.count :].nonzero().squeeze(1)
        for column in (self._values, self._positions, self._rows):
            column[free] = column[moved]
        self._used = self.count
        self._least = least.item()

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return values ``[n]``, positions ``[n]`` and rows ``[n, width]``, the best first.

        ``n <= count``. They are views of this object's memory, which is sorted in place.
        """
        self._drop()
        used = slice(self._used)
        values, positions, rows = self._values[used], self._positions[used], self._rows[used]
        order = positions.argsort()
        order = order[values[order].argsort(descending=True, stable=True)]
        values.copy_(values[order])
        positions.copy_(positions[order])
        for column in range(0, rows.shape[1], COLUMNS):
            part = rows[:, column : column + COLUMNS]
            part.copy_(part[order])
        return values, positions, rows


Ranking = Literal["highest confidence", "lowest confidence", "highest entropy"]
"""Which images are the best: by ``max p``, or by ``-sum_c p log p`` with ``p = softmax(t)``."""

_SCORES: dict[Ranking, Callable[[Tensor], Tensor]] = {
    "highest confidence": lambda log_p: log_p.amax(1),
    "lowest confidence": lambda log_p: -log_p.amax(1),
    "highest entropy": lambda log_p: -(log_p.exp() * log_p).sum(1),
}


class Selection(NamedTuple):
    """What was selected from a stream.

    Attributes:
        indices: Positions in the stream, int64 ``[n]`` on the CPU, the best first.
        logits: Theirs, float32 ``[n, c]`` on the CPU.
        confidence: The teacher's mean confidence on all images of the stream.
    """

    indices: Tensor
    logits: Tensor
    confidence: float


@torch.no_grad()
def select_images(
    stream: Iterable[tuple[Tensor, Tensor]],
    count: int,
    num_classes: int,
    by: Ranking,
    world: World = ALONE,
) -> Selection:
    """Select images by a teacher's logits, in one pass with bounded memory.

    Only the kept positions, scores and logits are in memory, and a sixteenth as many besides.

    Args:
        stream: Positions, int64 ``[b]``, ascending, and the teacher's logits ``[b, c]``; read once.
        count: Number of images to select.
        num_classes: Number of logits ``c``.
        by: What makes an image a good one.
        world: Processes with a stream each, of which the images of all are selected.

    Returns:
        The ``n <= count`` best images, of equals the earlier one. An image whose logits are NaN is
        none of them, and has the confidence 0.
    """
    top = TopRows(count, num_classes)
    seen = 0
    total = torch.zeros((), dtype=torch.float64)
    for positions, logits in stream:
        log_p = F.log_softmax(logits.float(), dim=1)
        confidence = log_p.amax(1).cpu().double().exp()
        total += confidence.nan_to_num(nan=0.0).sum()
        seen += len(positions)
        top.add(_SCORES[by](log_p), positions, logits)
    scores, indices, rows = top.result()
    if world.size > 1:
        # The best of all are among the best of each. Positions must ascend.
        order = indices.argsort()
        columns = [world.gather_uneven(column[order]) for column in (scores, indices, rows)]
        order = columns[1].argsort()
        top = TopRows(count, num_classes)
        top.add(*(column[order] for column in columns))
        _, indices, rows = top.result()
        total, seen = world.sum(total), int(world.sum(torch.tensor(seen)))
    return Selection(indices, rows, (total / max(seen, 1)).item())
