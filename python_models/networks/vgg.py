# SPDX-License-Identifier: Apache-2.0
"""VGG networks (Simonyan and Zisserman, 2015) with BatchNorm, for small images.

Five stages of 3x3 convolutions, then the global average and one linear layer in place of the
paper's three, as is usual for CIFAR.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from python_models.networks.base import NETWORKS, ImageNetwork
from python_models.networks.layers import init_convolutions_

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five stages."""


class VGG(ImageNetwork):
    """Stages of convolution (with bias), BatchNorm and ReLU, with 2x2 max-pooling between them.

    The fourth stage is pooled only for images of 64 pixels or more, so that one of 32 keeps 4x4.

    Args:
        convolutions: number of convolutions in each of the five stages.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, convolutions: Sequence[int], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        channels = in_channels
        for count, width in zip(convolutions, WIDTHS, strict=True):
            stage = nn.Sequential()
            for _ in range(count):
                stage.append(nn.Conv2d(channels, width, 3, padding=1))
                stage.append(nn.BatchNorm2d(width))
                stage.append(nn.ReLU(inplace=True))
                channels = width
            self.stages.append(stage)
        self.fc = nn.Linear(channels, num_classes)
        self.feature_dim = channels
        init_convolutions_(self)

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the last stage's output."""
        is_large = min(images.shape[-2:]) >= 64
        x = images
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < 3 or (index == 3 and is_large):
                x = F.max_pool2d(x, 2)
        return x

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of features [b, 512]."""
        logits: Tensor = self.fc(features)
        return logits


@NETWORKS.register("vgg8_bn")
def vgg8_bn(num_classes: int, in_channels: int = 3) -> VGG:
    """VGG-8 with BatchNorm: 3,918,858 parameters for 10 classes."""
    return VGG((1, 1, 1, 1, 1), num_classes, in_channels)


@NETWORKS.register("vgg11_bn")
def vgg11_bn(num_classes: int, in_channels: int = 3) -> VGG:
    """VGG-11 with BatchNorm: 9,231,114 parameters for 10 classes."""
    return VGG((1, 1, 2, 2, 2), num_classes, in_channels)


@NETWORKS.register("vgg13_bn")
def vgg13_bn(num_classes: int, in_channels: int = 3) -> VGG:
    """VGG-13 with BatchNorm: 9,416,010 parameters for 10 classes."""
    return VGG((2, 2, 2, 2, 2), num_classes, in_channels)


@NETWORKS.register("vgg16_bn")
def vgg16_bn(num_classes: int, in_channels: int = 3) -> VGG:
    """VGG-16 with BatchNorm: 14,728,266 parameters for 10 classes."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels)
