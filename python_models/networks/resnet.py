# SPDX-License-Identifier: Apache-2.0
"""ResNets for small images (He et al., 2016): 3x3 stem, no max-pooling.

ResNet-18, 34 and 50 are the ImageNet networks with four stages on a small image; ResNet-8 to 116,
that is 6n + 2 layers, are those that the paper made for CIFAR, with three. `x2` and `x4` name wider
ones, by the convention of the distillation literature.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from python_models.networks.base import NETWORKS, ImageNetwork
from python_models.networks.layers import conv1x1, conv3x3, init_convolutions_


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, a 1x1 convolution where the shape changes.

    `stride` acts in the first convolution and in the shortcut.
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, in_channels, h, w] to [b, width, h / stride, w / stride]."""
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, the last with four times the channels.

    `stride` acts in the 3x3 convolution and in the shortcut.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, in_channels, h, w] to [b, 4 * width, h / stride, w / stride]."""
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNet(ImageNetwork):
    """Stem, stages, global average, one linear layer; each stage but the first halves the image.

    Args:
        block: block of all stages.
        blocks: number of blocks in each stage.
        widths: channels of the stem, then of each stage (before the block's expansion).
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        stem, *stages = widths
        self.conv1 = conv3x3(in_channels, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self._stages = [f"layer{index + 1}" for index in range(len(stages))]
        channels = stem
        for name, count, width in zip(self._stages, blocks, stages, strict=True):
            strides = [1 if name == "layer1" else 2] + [1] * (count - 1)
            stage = nn.Sequential()
            for stride in strides:
                stage.append(block(channels, width, stride))
                channels = block.expansion * width
            self.add_module(name, stage)
        self.fc = nn.Linear(channels, num_classes)
        self.feature_dim = channels
        init_convolutions_(self)

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the last stage's output."""
        x: Tensor = F.relu(self.bn1(self.conv1(images)), inplace=True)
        for name in self._stages:
            x = self.get_submodule(name)(x)
        return x

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of features [b, feature_dim]."""
        logits: Tensor = self.fc(features)
        return logits


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


_FOUR_STAGES = (64, 64, 128, 256, 512)
_THREE_STAGES = (16, 16, 32, 64)


@NETWORKS.register("resnet18")
def resnet18(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-18 for small images: 11,173,962 parameters for 10 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), _FOUR_STAGES, num_classes, in_channels)


@NETWORKS.register("resnet34")
def resnet34(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-34 for small images: 21,282,122 parameters for 10 classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), _FOUR_STAGES, num_classes, in_channels)


@NETWORKS.register("resnet50")
def resnet50(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-50 for small images: 23,520,842 parameters for 10 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), _FOUR_STAGES, num_classes, in_channels)


@NETWORKS.register("resnet8")
def resnet8(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-8 of three stages: 78,042 parameters for 10 classes."""
    return ResNet(BasicBlock, (1,) * 3, _THREE_STAGES, num_classes, in_channels)


@NETWORKS.register("resnet14")
def resnet14(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-14 of three stages: 175,258 parameters for 10 classes."""
    return ResNet(BasicBlock, (2,) * 3, _THREE_STAGES, num_classes, in_channels)


@NETWORKS.register("resnet20")
def resnet20(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-20 of three stages: 272,474 parameters for 10 classes."""
    return ResNet(BasicBlock, (3,) * 3, _THREE_STAGES, num_classes, in_channels)


@NETWORKS.register("resnet56")
def resnet56(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-56 of three stages: 855,770 parameters for 10 classes."""
    return ResNet(BasicBlock, (9,) * 3, _THREE_STAGES, num_classes, in_channels)


@NETWORKS.register("resnet110")
def resnet110(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-110 of three stages: 1,730,714 parameters for 10 classes."""
    return ResNet(BasicBlock, (18,) * 3, _THREE_STAGES, num_classes, in_channels)


@NETWORKS.register("resnet116")
def resnet116(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-116 of three stages: 1,827,930 parameters for 10 classes."""
    return ResNet(BasicBlock, (19,) * 3, _THREE_STAGES, num_classes, in_channels)


@NETWORKS.register("resnet110x2")
def resnet110x2(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-110 with twice the channels in its stages: 6,899,610 parameters for 10 classes."""
    return ResNet(BasicBlock, (18,) * 3, (16, 32, 64, 128), num_classes, in_channels)


@NETWORKS.register("resnet8x4")
def resnet8x4(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-8 with four times the channels, stem of 32: 1,210,410 parameters for 10 classes."""
    return ResNet(BasicBlock, (1,) * 3, (32, 64, 128, 256), num_classes, in_channels)


@NETWORKS.register("resnet32x4")
def resnet32x4(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-32 with four times the channels, stem of 32: 7,410,730 parameters for 10 classes."""
    return ResNet(BasicBlock, (5,) * 3, (32, 64, 128, 256), num_classes, in_channels)
