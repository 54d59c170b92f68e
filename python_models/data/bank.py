# SPDX-License-Identifier: Apache-2.0
"""A memory bank: the newest rows of features, on the training device."""

from typing import Any

import torch
from torch import Tensor

from python_models.data.pool import ImagePool


class FeatureBank:
    """A ring of at most `capacity` rows, of which random ones are drawn.

    Args:
        capacity: largest number of rows; the oldest leave it.
        width: length of a row.
        device: where the rows are kept and handed out.

    Raises:
        ValueError: for a capacity or width below 1.

    Example:
        >>> bank = FeatureBank(capacity=1000, width=16)
        >>> bank.add(torch.rand(256, 16))
        >>> len(bank), bank.sample(64, torch.Generator().manual_seed(0)).shape
        (256, torch.Size([64, 16]))
    """

    def __init__(self, capacity: int, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        # To a pool, a row is an image one pixel high.
        self._rows = ImagePool(capacity, (1, 1, width), device)

    def __len__(self) -> int:
        """Returns the number of rows held now."""
        return len(self._rows)

    def add(self, rows: Tensor) -> None:
        """Adds rows, floating point [n, width]. They are copied, detached, as float32.

        Raises:
            ValueError: if their shape is not that of the bank.
        """
        if rows.dim() != 2 or rows.shape[1] != self.width:
            raise ValueError(f"rows must have shape [n, {self.width}], got {list(rows.shape)}")
        self._rows.add(rows[:, None, None])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws `n` different rows, or all, in random order, if there are fewer.

        Args:
            n: number of rows.
            generator: source of randomness on any device.

        Returns:
            Float32 ``[m, width]`` with ``m = min(n, len(self))``.
        """
        count = min(n, len(self))
        if not count:
            return torch.empty(0, self.width, device=self._rows.device)
        return self._rows.sample(count, generator)[:, 0, 0]

    def state_dict(self) -> dict[str, Any]:
        """Returns all that an exact resume needs."""
        return self._rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, on this bank's device."""
        self._rows.load_state_dict(state)
