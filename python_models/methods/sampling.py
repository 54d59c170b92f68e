# SPDX-License-Identifier: Apache-2.0
"""What methods share that learn from given images: their order, and whether they are the same."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from python_models.errors import UserError


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
