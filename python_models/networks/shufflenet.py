# SPDX-License-Identifier: Apache-2.0
"""ShuffleNetV1 (Zhang et al., 2018) and V2 (Ma et al., 2018) for small images.

The forms that distillation benchmarks use on CIFAR: a 1x1 stem of stride 1 instead of a strided
3x3 one with max-pooling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_models.networks.base import NETWORKS, ImageNetwork
from python_models.networks.layers import conv1x1, init_convolutions_

STEM_CHANNELS = 24


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleaves the channels of `groups` equal parts of x [b, c, h, w].

    Example:
        >>> shuffle_channels(torch.arange(6.0).view(1, 6, 1, 1), 2).flatten().tolist()
        [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    """
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, groups, channels // groups, height, width)
    return parts.transpose(1, 2).reshape(x.shape)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class _ShuffleNet(ImageNetwork):
    """Stem, three stages, whatever head the subclass adds, global average, linear layer."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, STEM_CHANNELS)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.stages = nn.Sequential()
        self.head: nn.Module = nn.Identity()

    def _finish(self, num_classes: int, channels: int) -> None:
        self.fc = nn.Linear(channels, num_classes)
        self.feature_dim = channels
        init_convolutions_(self)

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the map that is averaged."""
        x: Tensor = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.head(self.stages(x))
        return x

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of features [b, feature_dim]."""
        logits: Tensor = self.fc(features)
        return logits


class GroupBlock(nn.Module):
    """ShuffleNetV1's block: grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1, beside a shortcut.

    At stride 2 the shortcut is the input's 3x3 average, concatenated; else the input, added. As in
    the released code of the benchmarks, a ReLU follows the depthwise convolution too.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; in between, a quarter of those that are not the
            shortcut's.
        stride: 1 or 2.
        groups: groups of the 1x1 convolutions; the first is not grouped on the stem's output.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        made = out_channels - in_channels if stride == 2 else out_channels
        middle = made // 4
        self.groups = 1 if in_channels == STEM_CHANNELS else groups
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = _depthwise(middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, made, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, in_channels, h, w] to [b, out_channels, h / stride, w / stride]."""
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = shuffle_channels(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            out = torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], 1)
        else:
            out = out + x
        return F.relu(out, inplace=True)


class ShuffleNetV1(_ShuffleNet):
    """ShuffleNetV1 with 3 groups: stages of 240, 480 and 960 channels, 4, 8 and 4 blocks.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(in_channels)
        channels = STEM_CHANNELS
        for width, count in ((240, 4), (480, 8), (960, 4)):
            stage = nn.Sequential()
            for block in range(count):
                stage.append(GroupBlock(channels, width, 1 if block else 2, groups=3))
                channels = width
            self.stages.append(stage)
        self._finish(num_classes, channels)


class SplitBlock(nn.Module):
    """ShuffleNetV2's basic unit: half of the channels pass, the others are convolved; shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, channels, h, w] to the same shape."""
        passed, convolved = x.chunk(2, dim=1)
        return shuffle_channels(torch.cat([passed, self.branch(convolved)], 1), 2)


class DownBlock(nn.Module):
    """ShuffleNetV2's unit of stride 2: two branches on the whole input, concatenated; shuffle."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.shortcut = nn.Sequential(
            _depthwise(in_channels, 2),
            nn.BatchNorm2d(in_channels),
            conv1x1(in_channels, half),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )
        self.branch = _branch(in_channels, half, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, in_channels, h, w] to [b, out_channels, h / 2, w / 2]."""
        return shuffle_channels(torch.cat([self.shortcut(x), self.branch(x)], 1), 2)


def _branch(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv1x1(in_channels, out_channels),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        _depthwise(out_channels, stride),
        nn.BatchNorm2d(out_channels),
        conv1x1(out_channels, out_channels),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class ShuffleNetV2(_ShuffleNet):
    """ShuffleNetV2 x1: stages of 116, 232 and 464 channels, 4, 8 and 4 units, 1x1 to 1024.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(in_channels)
        channels = STEM_CHANNELS
        for width, count in ((116, 4), (232, 8), (464, 4)):
            rest = (SplitBlock(width) for _ in range(count - 1))
            self.stages.append(nn.Sequential(DownBlock(channels, width), *rest))
            channels = width
        self.head = nn.Sequential(
            conv1x1(channels, 1024), nn.BatchNorm2d(1024), nn.ReLU(inplace=True)
        )
        self._finish(num_classes, 1024)


@NETWORKS.register("shufflenet_v1")
def shufflenet_v1(num_classes: int, in_channels: int = 3) -> ShuffleNetV1:
    """ShuffleNetV1 with 3 groups, for small images: 862,768 parameters for 10 classes."""
    return ShuffleNetV1(num_classes, in_channels)


@NETWORKS.register("shufflenet_v2")
def shufflenet_v2(num_classes: int, in_channels: int = 3) -> ShuffleNetV2:
    """ShuffleNetV2 x1, for small images: 1,263,278 parameters for 10 classes."""
    return ShuffleNetV2(num_classes, in_channels)
