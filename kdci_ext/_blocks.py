# SPDX-License-Identifier: Apache-2.0
"""Rows of a source that is read several times: in blocks of one size, and a sample of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from kdci_ext import _checks

# As many rows are compared between passes, to notice a source that shuffles.
_OPENING_ROWS = 64


def _is_array(value: object) -> bool:
    """Whether this is a tensor, a NumPy array or memmap, or alike (HDF5, Zarr)."""
    return hasattr(value, "shape") and hasattr(value, "__getitem__")


class Blocks:
    """The rows of a source, in blocks whose size does not depend on how the source cuts them.

    Each iteration is a pass over the source. The first one finds n, d and the type of the rows;
    later ones check that they get the same rows again.
    """

    def __init__(self, source: Any, block_rows: int, device: torch.device | str | None) -> None:
        if isinstance(source, Iterator):
            raise TypeError(
                f"source is a {type(source).__name__}, which can be read only once, but several "
                "passes are made: give an array, a list, a DataLoader, or a function that returns "
                "a new iterator each time"
            )
        self.source = source
        self.is_array = _is_array(source)
        if not (self.is_array or isinstance(source, Iterable) or callable(source)):
            raise TypeError(
                "source must be a tensor or array [n, d], an iterable of [m, d] chunks (wrap a "
                f"dataset in a DataLoader), or a function that returns one, got "
                f"{type(source).__name__}"
            )
        self.block_rows = block_rows
        self.device = device
        self.n = -1  # until the first pass is over
        self.opening: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each block's first row, and the block, valid until the next."""
        first, filled = 0, 0
        buffer: Tensor | None = None
        for piece in self._pieces():
            if buffer is None:
                buffer = piece.new_empty(self.block_rows, piece.shape[1])
            self._check_alike(first + filled, piece, buffer)
            while len(piece) > 0:
                taken = min(len(piece), self.block_rows - filled)
                buffer[filled : filled + taken] = piece[:taken]
                piece, filled = piece[taken:], filled + taken
                if filled == self.block_rows:
                    yield first, self._block(first, buffer)
                    first, filled = first + filled, 0
            del piece  # or its chunk would live while the next one is read
        if buffer is None:
            raise ValueError(
                "source is empty"
                if self.n < 0
                else "source is empty when it is read again, but several passes are made: a "
                "function must return a new iterator each time"
            )
        if filled > 0:
            yield first, self._block(first, buffer[:filled])
        if self.n < 0:
            self.n = first + filled
        elif self.n != first + filled:
            self._raise_changed(f"{self.n} rows in the first pass, {first + filled} in a later one")

    def _pieces(self) -> Iterator[Tensor]:
        """Yield the source's rows as tensors of at most ``block_rows``, which may be views."""
        if self.is_array:
            yield from self._split("source", self.source, "n")
            return
        number = 0
        # A dataset may be callable for reasons of its own.
        for batch in self.source if isinstance(self.source, Iterable) else self.source():
            chunk = batch[0] if isinstance(batch, tuple | list) and batch else batch
            del batch
            yield from self._split(f"source[{number}]", chunk, "m")
            del chunk
            number += 1

    def _split(self, name: str, chunk: Any, rows: str) -> Iterator[Tensor]:
        if not _is_array(chunk):
            raise TypeError(
                f"{name} must be a tensor or array of shape [{rows}, d], got {type(chunk).__name__}"
            )
        if len(chunk.shape) != 2:
            raise ValueError(f"{name} must have shape [{rows}, d], got {list(chunk.shape)}")
        if chunk.shape[1] == 0:
            raise ValueError(f"{name} must have columns, got shape {list(chunk.shape)}")
        for start in range(0, chunk.shape[0], self.block_rows):
            yield _as_tensor(name, chunk[start : start + self.block_rows], rows)

    def _block(self, first: int, rows: Tensor) -> Tensor:
        block = rows if self.device is None else rows.to(self.device)
        if self.n < 0:
            bad = (~torch.isfinite(block)).any(1)
            if bool(bad.any()):
                raise ValueError(
                    f"source must be finite: row {first + int(bad.nonzero()[0])} holds NaN or Inf; "
                    "drop such rows or find out where they arise"
                )
        if first == 0:
            opening = block[:_OPENING_ROWS].clone()
            if self.opening is None:
                self.opening = opening
            elif not torch.equal(self.opening, opening):
                self._raise_changed("the first rows are not those of the first pass")
        return block

    def _check_alike(self, row: int, piece: Tensor, buffer: Tensor) -> None:
        if piece.shape[1] != buffer.shape[1] or piece.dtype != buffer.dtype:
            raise ValueError(
                f"source must yield chunks of one width and type: from row {row} on they are "
                f"[m, {piece.shape[1]}] {piece.dtype}, but before [m, {buffer.shape[1]}] "
                f"{buffer.dtype}"
            )
        if 0 <= self.n < row + len(piece):
            self._raise_changed(f"{self.n} rows in the first pass, more in a later one")

    def _raise_changed(self, how: str) -> NoReturn:
        raise ValueError(
            f"source must yield the same rows in each pass, but: {how}; switch off shuffling and "
            "random augmentation"
        )


def _as_tensor(name: str, piece: Any, rows: str) -> Tensor:
    if not isinstance(piece, Tensor):
        array = np.array(piece)  # a copy, because a memmap may be read-only
        try:
            piece = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        except TypeError:
            raise TypeError(f"{name} must hold floating numbers, got {array.dtype}") from None
    return _checks.tensor(name, piece, (rows, "d")).detach()


class RowSample:
    """Rows drawn without replacement, at most ``size``, in the order in which they come.

    A row is kept if its random key is among the smallest, so that neither the number of rows need
    be known nor does the choice depend on the blocks.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rows = torch.empty(0)

    def add(self, block: Tensor) -> None:
        keys = torch.rand(len(block), dtype=torch.float64, generator=self.generator)
        self.keys = torch.cat([self.keys, keys])
        self.rows = torch.cat([self.rows, block]) if self.rows.numel() else block.clone()
        if len(self.keys) > self.size:
            kept = self.keys.argsort()[: self.size].sort().values
            self.keys, self.rows = self.keys[kept], self.rows[kept.to(block.device)]
