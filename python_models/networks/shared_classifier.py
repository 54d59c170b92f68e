# SPDX-License-Identifier: Apache-2.0
"""KD3's network: a student under its teacher's classifier."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_models.networks.base import (
    Classifier,
    ImageNetwork,
    build_network,
    with_features,
)
from python_models.networks.layers import conv1x1, conv3x3


class SharedClassifier(ImageNetwork):
    """A student whose last feature map is projected to its teacher's, then classified as there.

    The projector is a 1x1 convolution to half the teacher's channels, a 3x3 one and a 1x1 one to
    the teacher's channels, each with BatchNorm and ReLU. The student's own classifier is not used.

    Args:
        student: Has a `feature_map`.
        classifier: The teacher's; frozen here.
        map_size: height and width of the teacher's feature map; a larger one of the student is
            pooled to it.
    """

    def __init__(
        self, student: ImageNetwork | Classifier, classifier: nn.Linear, map_size: Sequence[int]
    ) -> None:
        super().__init__()
        channels = classifier.in_features
        half = max(1, channels // 2)
        self.student = student
        self.projector = nn.Sequential(
            conv1x1(student.map_channels, half),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            conv3x3(half, half),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            conv1x1(half, channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.classifier = classifier.requires_grad_(False)
        self.map_size = tuple(map_size)
        self.feature_dim = channels

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the projected map [b, map_channels, h, w] of images [b, c, h, w]."""
        projected: Tensor = self.projector(pool_to(self.student.feature_map(images), self.map_size))
        return projected

    def features(self, images: Tensor) -> Tensor:
        """Returns the spatial mean [b, feature_dim] of the projected map."""
        return self.feature_map(images).mean(dim=(2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Returns the teacher's logits [b, num_classes] of features [b, feature_dim]."""
        logits: Tensor = self.classifier(features)
        return logits


def pool_to(feature_map: Tensor, size: Sequence[int]) -> Tensor:
    """Averages a map [b, c, h, w] down to this height and width, where it is larger."""
    height, width = feature_map.shape[-2:]
    smaller = min(height, size[0]), min(width, size[1])
    if smaller == (height, width):
        return feature_map
    return F.adaptive_avg_pool2d(feature_map, smaller)


def classifier_of(network: ImageNetwork | Classifier) -> nn.Linear:
    """Returns a copy of the linear layer that a network's `classify` is.

    Raises:
        ValueError: if the network does not pool a feature map into the input of a linear layer.
    """
    name = type(network).__name__
    for layer in reversed([*network.modules()]):
        if not isinstance(layer, nn.Linear) or layer.in_features != network.feature_dim:
            continue
        probe = torch.linspace(-1, 1, layer.in_features, device=layer.weight.device)[None]
        with torch.no_grad():
            if not torch.equal(layer(probe), network.classify(probe)):
                continue
        copy = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device)
        with torch.no_grad():
            copy.weight.copy_(layer.weight)
            copy.bias.zero_()
            if layer.bias is not None:
                copy.bias.copy_(layer.bias)
        return copy
    raise ValueError(f"{name} does not classify by one linear layer, which the student would share")


def shared_classifier(
    num_classes: int,
    in_channels: int,
    *,
    student: str,
    feature_dim: int,
    map_size: Sequence[int],
    student_args: Mapping[str, Any] | None = None,
) -> SharedClassifier:
    """Builds the network around a freshly initialised student, given by its name."""
    network = build_network(student, num_classes, in_channels, **student_args or {})
    return SharedClassifier(with_features(network), nn.Linear(feature_dim, num_classes), map_size)
