# SPDX-License-Identifier: Apache-2.0
"""Wide residual networks, WRN-depth-width (Zagoruyko and Komodakis, 2016)."""

import torch.nn.functional as F
from torch import Tensor, nn

from python_models.networks.base import NETWORKS, ImageNetwork
from python_models.networks.layers import conv1x1, conv3x3, init_convolutions_


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice; the shortcut is a convolution where channels change.

    `stride` acts in the first convolution and in the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut = (
            conv1x1(in_channels, out_channels, stride) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, in_channels, h, w] to [b, out_channels, h / stride, w / stride]."""
        activated = F.relu(self.bn1(x), inplace=True)
        out: Tensor = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        out = self.conv2(out)
        # A shape-changing shortcut starts from the activated input, an identity from the raw one.
        out += x if self.shortcut is None else self.shortcut(activated)
        return out


class WideResNet(ImageNetwork):
    """Stem of 16 channels, three stages of 16w, 32w and 64w, BatchNorm, global average, linear.

    Args:
        depth: number of convolutions on the main path plus the linear layer, 6n + 4.
        width: factor w on the channels of the three stages.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        ValueError: if `depth` is not 6n + 4 with n >= 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth={depth} must be 6n + 4 with n >= 1, such as 16 or 40")
        blocks = (depth - 4) // 6
        self.conv1 = conv3x3(in_channels, 16)
        self.layer1 = _stage(16, 16 * width, blocks, stride=1)
        self.layer2 = _stage(16 * width, 32 * width, blocks, stride=2)
        self.layer3 = _stage(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        self.feature_dim = self.map_channels = 64 * width
        init_convolutions_(self)

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the activated output [b, 64 * width, h, w] of the last stage."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return F.relu(self.bn1(x), inplace=True)

    def features(self, images: Tensor) -> Tensor:
        """Returns the spatial mean [b, 64 * width] of the last stage."""
        return self.feature_map(images).mean(dim=(2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of features [b, 64 * width]."""
        logits: Tensor = self.fc(features)
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (PreActivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(PreActivationBlock(in_channels, out_channels, stride), *rest)


@NETWORKS.register("wrn16_1")
def wrn16_1(num_classes: int, in_channels: int = 3) -> WideResNet:
    """WRN-16-1: 175,066 parameters for 10 classes."""
    return WideResNet(16, 1, num_classes, in_channels)


@NETWORKS.register("wrn16_2")
def wrn16_2(num_classes: int, in_channels: int = 3) -> WideResNet:
    """WRN-16-2: 691,674 parameters for 10 classes."""
    return WideResNet(16, 2, num_classes, in_channels)


@NETWORKS.register("wrn40_1")
def wrn40_1(num_classes: int, in_channels: int = 3) -> WideResNet:
    """WRN-40-1: 563,930 parameters for 10 classes."""
    return WideResNet(40, 1, num_classes, in_channels)


@NETWORKS.register("wrn40_2")
def wrn40_2(num_classes: int, in_channels: int = 3) -> WideResNet:
    """WRN-40-2: 2,243,546 parameters for 10 classes."""
    return WideResNet(40, 2, num_classes, in_channels)
