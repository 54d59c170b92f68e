# SPDX-License-Identifier: Apache-2.0
"""ResNets for small images (He et al., 2016): 3x3 stem, no max-pooling, four stages."""

import torch.nn.functional as F
from torch import Tensor, nn

from python_models.networks.base import NETWORKS, ImageNetwork
from python_models.networks.layers import conv1x1, conv3x3, init_convolutions_


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, a 1x1 convolution where the shape changes.

    `stride` acts in the first convolution and in the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, in_channels, h, w] to [b, out_channels, h / stride, w / stride]."""
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNet(ImageNetwork):
    """Stem, four stages of 64, 128, 256 and 512 channels, global average, one linear layer.

    Args:
        blocks: number of basic blocks in each stage.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, blocks[0], stride=1)
        self.layer2 = _stage(64, 128, blocks[1], stride=2)
        self.layer3 = _stage(128, 256, blocks[2], stride=2)
        self.layer4 = _stage(256, 512, blocks[3], stride=2)
        self.fc = nn.Linear(512, num_classes)
        self.feature_dim = self.map_channels = 512
        init_convolutions_(self)

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the output [b, 512, h, w] of the last stage."""
        x: Tensor = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x

    def features(self, images: Tensor) -> Tensor:
        """Returns the spatial mean [b, 512] of the last stage."""
        return self.feature_map(images).mean(dim=(2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of features [b, 512]."""
        logits: Tensor = self.fc(features)
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride), *rest)


@NETWORKS.register("resnet18")
def resnet18(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-18 for small images: 11,173,962 parameters for 10 classes."""
    return ResNet((2, 2, 2, 2), num_classes, in_channels)


@NETWORKS.register("resnet34")
def resnet34(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-34 for small images: 21,282,122 parameters for 10 classes."""
    return ResNet((3, 4, 6, 3), num_classes, in_channels)
