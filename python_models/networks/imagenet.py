# SPDX-License-Identifier: Apache-2.0
"""torchvision's networks for ImageNet; torchvision is imported when one is built."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from python_models.errors import UserError
from python_models.networks.base import NETWORKS, ImageNetwork

_PREFIX = "model."


class _TorchvisionNetwork(ImageNetwork):
    """A network of torchvision, whose weights files fit it: its state dict has the same keys.

    Args:
        name: function of `torchvision.models` that makes it.
        num_classes: number of logits.
        in_channels: channels of the images, 3.

    Raises:
        ValueError: if `in_channels` is not 3.
        UserError: if torchvision is there but was built for another PyTorch.
    """

    def __init__(self, name: str, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if in_channels != 3:
            raise ValueError(f"in_channels={in_channels} must be 3 for torchvision's {name}")
        try:
            models = importlib.import_module("torchvision.models")
        except RuntimeError as error:  # its operators do not load
            raise UserError(
                f"torchvision does not fit the installed PyTorch ({error}): install a matching pair"
            ) from error
        self.model: Any = getattr(models, name)(num_classes=num_classes)
        # `model.` is where the network lies here, and no part of the names in torchvision's files.
        self.register_state_dict_post_hook(_strip_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]


def _strip_prefix(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    for key in [key for key in state if key.startswith(prefix + _PREFIX)]:
        state[prefix + key.removeprefix(prefix + _PREFIX)] = state.pop(key)


def _add_prefix(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + _PREFIX + key.removeprefix(prefix)] = state.pop(key)


class ImageNetResNet(_TorchvisionNetwork):
    """ResNet of torchvision: 7x7 stem, max-pooling, four stages."""

    def __init__(self, name: str, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(name, num_classes, in_channels)
        self.feature_dim = self.model.fc.in_features

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the last stage's output."""
        m = self.model
        x: Tensor = m.maxpool(m.relu(m.bn1(m.conv1(images))))
        x = m.layer4(m.layer3(m.layer2(m.layer1(x))))
        return x

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of features [b, feature_dim]."""
        logits: Tensor = self.model.fc(features)
        return logits


class ImageNetMobileNetV2(_TorchvisionNetwork):
    """MobileNetV2 of torchvision; `classify` begins with its dropout."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__("mobilenet_v2", num_classes, in_channels)
        self.feature_dim = self.model.last_channel

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the output of the last 1x1 convolution."""
        x: Tensor = self.model.features(images)
        return x

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of features [b, 1280]."""
        logits: Tensor = self.model.classifier(features)
        return logits


@NETWORKS.register("imagenet_resnet18")
def imagenet_resnet18(num_classes: int, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-18 of torchvision, for ImageNet: 11,689,512 parameters for 1,000 classes."""
    return ImageNetResNet("resnet18", num_classes, in_channels)


@NETWORKS.register("imagenet_resnet34")
def imagenet_resnet34(num_classes: int, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-34 of torchvision, for ImageNet: 21,797,672 parameters for 1,000 classes."""
    return ImageNetResNet("resnet34", num_classes, in_channels)


@NETWORKS.register("imagenet_resnet50")
def imagenet_resnet50(num_classes: int, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-50 of torchvision, for ImageNet: 25,557,032 parameters for 1,000 classes."""
    return ImageNetResNet("resnet50", num_classes, in_channels)


@NETWORKS.register("imagenet_mobilenet_v2")
def imagenet_mobilenet_v2(num_classes: int, in_channels: int = 3) -> ImageNetMobileNetV2:
    """MobileNetV2 of torchvision, for ImageNet: 3,504,872 parameters for 1,000 classes."""
    return ImageNetMobileNetV2(num_classes, in_channels)
