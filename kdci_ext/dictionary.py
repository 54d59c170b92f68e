# SPDX-License-Identifier: Apache-2.0
"""The confounder dictionary: what clustering a model's predictions yields."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConfounderDictionary:
    """Prototypes of a model's predictions and how often each occurs (KDCI, section 3.3).

    Attributes:
        prototypes: z, [K, d] float32 (float64 for float64 features): the mean of the original
            rows of each cluster. A surplus prototype (fewer distinct rows than K) has proportion
            0 and the mean of all rows.
        proportions: P(z), [K] in the type of ``prototypes``, in [0, 1], of sum 1.
        labels: The cluster of each row, [n] int64, in [0, K).
        inertia: Sum of squared distances to the assigned centres in the clustered (PCA) space,
            [] float64.
        num_iter: Lloyd iterations made, [] int64.

    Example:
        >>> d = build_confounder_dictionary(torch.randn(256, 10), num_prototypes=8)
        >>> d.num_prototypes, d.num_classes, d.labels.shape
        (8, 10, torch.Size([256]))
    """

    prototypes: Tensor
    proportions: Tensor
    labels: Tensor
    inertia: Tensor
    num_iter: Tensor

    @property
    def num_prototypes(self) -> int:
        """K."""
        return self.prototypes.shape[0]

    @property
    def num_classes(self) -> int:
        """d, the width of a row of logits."""
        return self.prototypes.shape[1]

    def to(self, device: torch.device | str) -> ConfounderDictionary:
        """Return the dictionary with its tensors on a device.

        Args:
            device: As for ``torch.Tensor.to``.

        Returns:
            A new dictionary; tensors that lie on ``device`` already are shared with it.

        Example:
            >>> d = build_confounder_dictionary(torch.randn(256, 10), num_prototypes=8)
            >>> d.to("cpu").prototypes is d.prototypes
            True
        """
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return ConfounderDictionary(**moved)
