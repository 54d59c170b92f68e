# SPDX-License-Identifier: Apache-2.0
"""LeNet-5 for 32x32 images (LeCun et al., 1998, with ReLU and max-pooling) and its half."""

import torch.nn.functional as F
from torch import Tensor, nn

from python_models.networks.base import NETWORKS, ImageNetwork


class LeNet(ImageNetwork):
    """Three 5x5 convolutions (the last one sees all of its input) and two linear layers.

    Args:
        widths: channels of the three convolutions, then units of the hidden linear layer.
        num_classes: number of logits.
        in_channels: channels of the images.
        batch_norm: put a BatchNorm after each convolution, for methods that match its statistics.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
        *,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        first, second, third, hidden = widths
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.conv3 = nn.Conv2d(second, third, 5)
        self.bn1 = nn.BatchNorm2d(first) if batch_norm else nn.Identity()
        self.bn2 = nn.BatchNorm2d(second) if batch_norm else nn.Identity()
        self.bn3 = nn.BatchNorm2d(third) if batch_norm else nn.Identity()
        self.hidden = nn.Linear(third, hidden)
        self.fc = nn.Linear(hidden, num_classes)
        self.feature_dim = self.map_channels = hidden

    def features(self, images: Tensor) -> Tensor:
        """Returns the hidden layer [b, feature_dim] of images [b, c, 32, 32].

        Raises:
            ValueError: if the images are not 32x32.
        """
        if images.shape[-2:] != (32, 32):
            raise ValueError(f"images must have shape [b, c, 32, 32], got {list(images.shape)}")
        # Pooling before ReLU gives the same values from a quarter of the work.
        x = F.relu(F.max_pool2d(self.bn1(self.conv1(images)), 2), inplace=True)
        x = F.relu(F.max_pool2d(self.bn2(self.conv2(x)), 2), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        return F.relu(self.hidden(x.flatten(1)), inplace=True)

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the hidden layer as a map [b, feature_dim, 1, 1]: nothing is pooled here."""
        return self.features(images)[:, :, None, None]

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of hidden vectors [b, feature_dim]."""
        logits: Tensor = self.fc(features)
        return logits


FULL = (6, 16, 120, 84)
HALF = (3, 8, 60, 42)


@NETWORKS.register("lenet5")
def lenet5(num_classes: int, in_channels: int = 1) -> LeNet:
    """LeNet-5: 61,706 parameters for 10 classes of grey images."""
    return LeNet(FULL, num_classes, in_channels)


@NETWORKS.register("lenet5_half")
def lenet5_half(num_classes: int, in_channels: int = 1) -> LeNet:
    """LeNet-5 at half the width: 15,738 parameters for 10 classes of grey images."""
    return LeNet(HALF, num_classes, in_channels)


@NETWORKS.register("lenet5_bn")
def lenet5_bn(num_classes: int, in_channels: int = 1) -> LeNet:
    """LeNet-5 with BatchNorm."""
    return LeNet(FULL, num_classes, in_channels, batch_norm=True)


@NETWORKS.register("lenet5_half_bn")
def lenet5_half_bn(num_classes: int, in_channels: int = 1) -> LeNet:
    """LeNet-5 at half the width with BatchNorm."""
    return LeNet(HALF, num_classes, in_channels, batch_norm=True)
