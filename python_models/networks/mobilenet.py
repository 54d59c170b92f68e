# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 (Sandler et al., 2018) at half the width, as distillation benchmarks use on CIFAR."""

from torch import Tensor, nn

from python_models.networks.base import NETWORKS, ImageNetwork
from python_models.networks.layers import conv1x1, init_convolutions_

EXPANSION = 6
LAST_CHANNELS = 1280

# Channels at full width, blocks and first stride of each stage. The second stage keeps the size,
# which the network for ImageNet halves there.
STAGES = (
    (16, 1, 1),
    (24, 2, 1),
    (32, 3, 2),
    (64, 4, 2),
    (96, 3, 1),
    (160, 3, 2),
    (320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, 1x1 projection; identity where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.layers = nn.Sequential(
            conv1x1(in_channels, hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            conv1x1(hidden, out_channels),
            nn.BatchNorm2d(out_channels),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, in_channels, h, w] to [b, out_channels, h / stride, w / stride]."""
        out: Tensor = self.layers(x)
        return x + out if self.has_shortcut else out


class MobileNetV2(ImageNetwork):
    """Stem of stride 2, seven stages, a 1x1 convolution to 1280 channels, global average, linear.

    Args:
        width: factor on the channels of the stem and of the stages.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, width: float, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        channels = int(32 * width)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
        )
        self.stages = nn.Sequential()
        for index, (full, count, first_stride) in enumerate(STAGES):
            stage = nn.Sequential()
            for block in range(count):
                stride = first_stride if block == 0 else 1
                expansion = EXPANSION if index else 1
                stage.append(InvertedResidual(channels, int(full * width), stride, expansion))
                channels = int(full * width)
            self.stages.append(stage)
        self.head = nn.Sequential(
            conv1x1(channels, LAST_CHANNELS),
            nn.BatchNorm2d(LAST_CHANNELS),
            nn.ReLU6(inplace=True),
        )
        self.fc = nn.Linear(LAST_CHANNELS, num_classes)
        self.feature_dim = LAST_CHANNELS
        init_convolutions_(self)

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the output of the last 1x1 convolution."""
        x: Tensor = self.head(self.stages(self.stem(images)))
        return x

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of features [b, 1280]."""
        logits: Tensor = self.fc(features)
        return logits


@NETWORKS.register("mobilenet_v2_half")
def mobilenet_v2_half(num_classes: int, in_channels: int = 3) -> MobileNetV2:
    """MobileNetV2 at half the width, for small images: 697,546 parameters for 10 classes."""
    return MobileNetV2(0.5, num_classes, in_channels)
