# SPDX-License-Identifier: Apache-2.0
"""CID's network: a student whose prediction rests on its features and their context."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from python_models.networks.base import (
    Classifier,
    ImageNetwork,
    build_network,
    with_features,
)


class InterventionNetwork(ImageNetwork):
    """A student with an intervention head (Deng and Zhang, NeurIPS 2021, equation 7).

    With the student's features f and logits s and the context matrix K, a row for each class, the
    logits are ``head([f, softmax(s / T) K])``. Before the first `set_context` they are s.

    Args:
        student: From images to features f [b, d] and logits s [b, num_classes].
        num_classes: number of logits.
        temperature: T, positive.
    """

    context: Tensor
    is_ready: Tensor

    def __init__(
        self, student: ImageNetwork | Classifier, num_classes: int, temperature: float
    ) -> None:
        super().__init__()
        self.student = student
        self.temperature = temperature
        self.feature_dim = 2 * student.feature_dim
        self.head = nn.Linear(self.feature_dim, num_classes)
        self.register_buffer("context", torch.zeros(num_classes, student.feature_dim))
        self.register_buffer("is_ready", torch.zeros((), dtype=torch.bool))

    def set_context(self, context: Tensor) -> None:
        """Replaces K [num_classes, d]."""
        self.context.copy_(context)
        self.is_ready.fill_(True)

    def with_context(self, features: Tensor, logits: Tensor) -> Tensor:
        """Returns [f, softmax(s / T) K], [b, 2 d], of the student's features and logits."""
        coefficients = (logits / self.temperature).softmax(1)
        return torch.cat([features, coefficients @ self.context], dim=1)

    def features(self, images: Tensor) -> Tensor:
        """Returns the student's features beside their context [b, 2 d]."""
        features = self.student.features(images)
        return self.with_context(features, self.student.classify(features))

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of features with context [b, 2 d]."""
        own = self.student.classify(features[:, : self.student.feature_dim])
        # Chosen on the device, which an `if` would wait for.
        return torch.where(self.is_ready, self.head(features), own)


def intervention(
    num_classes: int,
    in_channels: int,
    *,
    student: str,
    temperature: float,
    student_args: Mapping[str, Any] | None = None,
) -> InterventionNetwork:
    """Builds the network around a freshly initialised student, given by its name."""
    network = build_network(student, num_classes, in_channels, **student_args or {})
    return InterventionNetwork(with_features(network), num_classes, temperature)
