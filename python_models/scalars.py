# SPDX-License-Identifier: Apache-2.0
"""The columns of metrics.csv for TensorBoard, which is an optional package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from python_models.errors import UserError


class Scalars:
    """Writes rows of metrics as TensorBoard's scalars, at the student step that they name.

    Args:
        folder: Where its files go.
        done: Student steps made before; what an earlier process wrote of later ones is hidden.

    """

    def __init__(self, folder: Path, done: int) -> None:
        # TensorBoard hides what has this step or a later one.
        self._writer: Any = summary_writer()(str(folder), purge_step=done + 1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.csv."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


class NoScalars:
    """In the place of `Scalars` where nobody asked for them."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Close nothing."""


def summary_writer() -> Any:
    """Return PyTorch's class that writes for TensorBoard.

    Raises:
        UserError: If the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            'tensorboard=True needs its package: pip install "kdci_ext[tensorboard]", or give '
            "--no-tensorboard; metrics.csv holds the same values"
        ) from error
    return SummaryWriter
