# SPDX-License-Identifier: Apache-2.0
"""Signs of whether a run is healthy, beside its losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def image_diversity(images: Tensor) -> Tensor:
    """Root mean square distance of the images of a batch from each other, per pixel.

    ``sqrt(mean_{i != j} ||x_i - x_j||^2 / p)`` for images of p values: 0 where all images are the
    same one, as when a generator's modes collapse, and 0.41 for uniform noise. It is computed as
    the root of twice the pixels' mean variance (unbiased) over the batch, which is the same number.

    Args:
        images: Floating, ``[b, c, h, w]``, ``b >= 2``.

    Returns:
        Scalar, at least 0; in [0, 1] for images in [0, 1] and large batches.

    Example:
        >>> image_diversity(torch.ones(8, 3, 32, 32))
        tensor(0.)
    """
    return (2 * images.float().var(dim=0).mean()).sqrt()


class Health:
    """What an epoch's row of metrics.csv says of the images; never waits for the device before.

    Args:
        num_classes: Number of classes.
        device: Where images and counts are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        # The run's counts of the teacher's predictions, as the epoch began.
        self._before = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._diversity: Tensor | None = None

    def saw(self, images: Tensor) -> None:
        """Look at the synthetic images of a round, ``[b, c, h, w]``."""
        if len(images) > 1:
            self._diversity = image_diversity(images)

    def end_epoch(self, class_counts: Tensor) -> dict[str, float]:
        """Return the signs of the epoch that ends here, and begin the next.

        Args:
            class_counts: How often the teacher predicted each class, since the run began, int64
                ``[num_classes]``.

        Returns:
            Values by their names in `reporting.METRICS`.
        """
        counts = class_counts - self._before
        self._before = class_counts.clone()
        shares = counts.double() / counts.sum()
        signs = {
            "class_entropy": torch.special.entr(shares).sum(),
            "class_min": shares.min(),
            "class_max": shares.max(),
        }
        if self._diversity is not None:
            signs["image_diversity"] = self._diversity.double()
        return dict(zip(signs, torch.stack(list(signs.values())).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return what the rest of the epoch needs."""
        return {"before": self._before, "diversity": self._diversity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._before.copy_(state["before"])
        diversity = state["diversity"]
        self._diversity = None if diversity is None else diversity.to(self._before.device)
