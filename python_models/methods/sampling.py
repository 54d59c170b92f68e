# SPDX-License-Identifier: Apache-2.0
"""What methods share that learn from given images: selection, order, and being the same ones."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from python_models.data import UnlabelledImages, to_float
from python_models.errors import UserError
from python_models.methods.base import Context, Method
from python_models.reporting import Progress
from python_models.selection import Ranking, Selection, select_images

SettingsT = TypeVar("SettingsT")


class RandomOrder:
    """Goes through rows in random orders, each without repetition.

    What is left of an order when it holds less than the rows asked for is left out, as by a loader
    that drops its last batch; a set smaller than a batch is gone through several times in it.

    Args:
        stream: Source of randomness, on the CPU, so that all devices draw alike.
        device: Where the row numbers are wanted.

    Example:
        >>> order = RandomOrder(torch.Generator().manual_seed(0), torch.device("cpu"))
        >>> order.reset(10)
        >>> order.take(4).shape
        torch.Size([4])
    """

    def __init__(self, stream: torch.Generator, device: torch.device) -> None:
        self._stream = stream
        self._device = device
        self._rows = 0
        self._cursor = 0
        self._order = torch.empty(0, dtype=torch.int64, device=device)

    def reset(self, rows: int) -> None:
        """Begin anew with this number of rows, at least 1."""
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1")
        self._rows, self._cursor = rows, 0
        self._order = self._order[:0]

    def take(self, count: int) -> Tensor:
        """Return the next rows, int64 ``[count]``, each in [0, rows)."""
        if self._cursor + count > len(self._order):
            orders = [
                torch.randperm(self._rows, generator=self._stream)
                for _ in range(-(-count // self._rows))
            ]
            self._order, self._cursor = torch.cat(orders).to(self._device), 0
        taken = self._order[self._cursor : self._cursor + count]
        self._cursor += count
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the order and the place in it."""
        return {"rows": self._rows, "cursor": self._cursor, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._rows, self._cursor = state["rows"], state["cursor"]
        self._order = state["order"].to(self._device)


class SameData:
    """Part of a checkpoint that refuses to go on with other data than the run began with.

    Args:
        argument: The setting that names the data, for the error.
        tensors: The data on the CPU: the images first, of a row each.
    """

    def __init__(self, argument: str, *tensors: Tensor) -> None:
        self._argument = argument
        self._count = len(tensors[0])
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.contiguous().numpy().data)
        self._hash = digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return what tells the data from others."""
        return {"count": self._count, "hash": self._hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare.

        Raises:
            UserError: If the data are others.
        """
        if state["count"] != self._count:
            raise UserError(
                f"{self._argument} holds {self._count} images, but {state['count']} when the run "
                "began: resume needs the same images"
            )
        if state["hash"] != self._hash:
            raise UserError(
                f"{self._argument} holds other images than when the run began: resume needs the "
                "same ones"
            )


def require_memory(
    source: str,
    count: int,
    image_shape: tuple[int, int, int],
    device: torch.device,
    *,
    remedy: str,
) -> None:
    """Check that images fit in a device's memory, before they are read.

    Args:
        source: What asks for them, for the error.
        count: Number of images, a byte for each value.
        image_shape: Theirs.
        device: Where they shall be.
        remedy: What to do about it, for the error.

    Raises:
        UserError: If they do not fit.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = count * math.prod(image_shape)
    if needed > memory:
        raise UserError(
            f"{source}: {count} images of {list(image_shape)} take {needed / 2**30:.0f} GiB, but "
            f"{device} has {memory / 2**30:.0f} GiB: {remedy}"
        )


class SelectingMethod(Method[SettingsT]):
    """Base class of methods that select some of the unlabelled images once, before training.

    The selected images are held as bytes on the run's device, and named in checkpoints.

    Args:
        settings: The method's settings.
        context: What it works with.
        select: Images to keep; None: all.

    Attributes:
        images: The selected ones, uint8 ``[n, c, h, w]``, after `select`.
        indices: Their positions in the source, int64 ``[n]``, the best first.

    Raises:
        UserError: If there is nothing to select, or no memory for it.
    """

    needs_unlabelled = True

    def __init__(self, settings: SettingsT, context: Context, select: int | None) -> None:
        super().__init__(settings, context)
        if select is not None and select < 1:
            raise UserError(f"select={select} must be >= 1")
        source = context.open_unlabelled()
        self._source: UnlabelledImages | None = source
        self._num_candidates = len(source)
        self._wanted = select
        require_memory(
            *(f"select={select}", self.num_wanted, context.image_shape, context.device),
            remedy="select fewer",
        )
        self.images = torch.empty(0)
        self.indices = torch.empty(0, dtype=torch.int64)
        self._data: SameData | None = None

    @property
    def num_wanted(self) -> int:
        """Number of images to keep, if all of them can be read."""
        return min(self._wanted or self._num_candidates, self._num_candidates)

    def select(self, by: Ranking) -> Selection:
        """Select and keep the best images, in one pass over all.

        Raises:
            UserError: If the teacher's logits are NaN for every image.
        """
        found = select_images(
            *(self._logits(), self.num_wanted, self.context.num_classes, by), self.world
        )
        assert self._source is not None
        self._source.share_skipped(self.world)
        if not len(found.indices):
            raise UserError("the teacher's logits are NaN for every unlabelled image")
        self._keep(found.indices)
        return found

    def _logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the positions and the teacher's logits of this process's images, in one pass."""
        source, world = self._source, self.world
        assert source is not None
        count = math.ceil(len(source) / source.batch_size / world.size)
        progress = Progress("selecting", count, is_shown=world.is_first)
        try:
            for positions, images in source.batches(world.rank, world.size):
                yield positions, self.teacher(to_float(images.to(self.context.device)))
                progress.step({})
        finally:
            progress.close()

    def _keep(self, indices: Tensor) -> None:
        assert self._source is not None
        self.indices = indices
        images = self._source.take(indices)
        self._data = SameData("unlabelled", images)
        self.images = images.to(self.context.device)
        self._source = None  # it may hold all candidates

    def state_dict(self) -> dict[str, Any]:
        """Return the state; of the images only which they are."""
        return {
            **super().state_dict(),
            "num_candidates": self._num_candidates,
            "indices": self.indices,
            "images": None if self._data is None else self._data.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, reading the selected images from where they came."""
        if state["num_candidates"] != self._num_candidates:
            raise UserError(
                f"unlabelled holds {self._num_candidates} images, but {state['num_candidates']} "
                "when the run began: resume needs the same images"
            )
        super().load_state_dict(state)
        self._keep(state["indices"].cpu())
        assert self._data is not None
        self._data.load_state_dict(state["images"])
