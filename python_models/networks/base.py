# SPDX-License-Identifier: Apache-2.0
"""What every network of this package offers, and the wrapper that normalises its input."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from python_models.registry import Registry


class ImageNetwork(nn.Module):
    """A classifier of images in two parts: `features` up to the last layer, then `classify`.

    Subclasses set `feature_dim` and implement both parts; images are already normalised here. Those
    that pool their last feature map into their features set `map_channels` too and implement
    `feature_map`, which some methods need.
    """

    feature_dim: int
    map_channels: int

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the map [b, map_channels, h, w] whose spatial mean `features` is."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Returns the penultimate vectors [b, feature_dim] of images [b, c, h, w]."""
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of penultimate vectors [b, feature_dim]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of images [b, c, h, w]."""
        return self.classify(self.features(images))


NETWORKS: Registry[Callable[[int, int], ImageNetwork]] = Registry("network")
"""Factories `(num_classes, in_channels) -> ImageNetwork` by name."""


def build_network(name: str, num_classes: int, in_channels: int = 3) -> ImageNetwork:
    """Builds a freshly initialised network.

    Args:
        name: a name in `NETWORKS`.
        num_classes: number of logits, at least 1.
        in_channels: channels of the images: 1 grey, 3 colour.

    Raises:
        ValueError: for an unknown name (the message gives the nearest ones) or a count below 1.

    Example:
        >>> build_network("lenet5", num_classes=10, in_channels=1).feature_dim
        84
    """
    factory = NETWORKS.get(name)
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1")
    return factory(num_classes, in_channels)


def count_parameters(module: nn.Module) -> int:
    """Returns the number of scalar parameters (running statistics are not parameters)."""
    return sum(parameter.numel() for parameter in module.parameters())


class Classifier(nn.Module):
    """A network together with its input normalisation: images in [0, 1] go in, logits come out.

    `mean` and `std` are buffers that are not saved: `classifier.network.state_dict()` holds the
    network's own keys, and checkpoints do not depend on the wrapper.

    Args:
        network: any module from normalised images [b, c, h, w] to logits [b, num_classes].
        mean: one value per channel, or a single one for all; `(0.0,)` with std `(1.0,)` leaves the
            images as they are.
        std: as `mean`, positive.

    Raises:
        ValueError: if the lengths differ or a std is not positive.

    Example:
        >>> network = build_network("resnet18", num_classes=10)
        >>> classifier = Classifier(network, mean=(0.491, 0.482, 0.447), std=(0.202, 0.199, 0.201))
        >>> classifier(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    mean: Tensor
    std: Tensor
    _scale: Tensor
    _shift: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise ValueError(
                f"mean and std must have one value per channel each, "
                f"got {len(mean)} and {len(std)} values"
            )
        if not all(value > 0 for value in std):
            raise ValueError(f"std={tuple(std)} must be positive")
        self.network = network
        # Computed in double so that the one-pass form below loses nothing to rounding.
        mean64 = torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1)
        std64 = torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
        for name, value in {
            "mean": mean64,
            "std": std64,
            "_scale": 1 / std64,
            "_shift": -mean64 / std64,
        }.items():
            self.register_buffer(name, value.float(), persistent=False)
        self._is_identity = not mean64.any() and bool((std64 == 1).all())

    def normalise(self, images: Tensor) -> Tensor:
        """Returns `(images - mean) / std` for images [b, c, h, w] in [0, 1], in one pass.

        Raises:
            TypeError: if the images are not floating point.
            ValueError: if they have the wrong number of dimensions or channels.
        """
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point in [0, 1], got {images.dtype}: "
                f"convert them, for example with `images.float() / 255`"
            )
        channels = self.mean.shape[1]
        if images.dim() != 4 or channels not in (1, images.shape[1]):
            expected = channels if channels > 1 else "c"
            raise ValueError(
                f"images must have shape [b, {expected}, h, w], got {list(images.shape)}"
            )
        if self._is_identity:
            return images
        return torch.addcmul(self._shift, images, self._scale)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of images [b, c, h, w] in [0, 1]."""
        logits: Tensor = self.network(self.normalise(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Returns the network's penultimate vectors [b, feature_dim] of images in [0, 1]."""
        features: Tensor = self._split_network().features(self.normalise(images))
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of penultimate vectors [b, feature_dim]."""
        logits: Tensor = self._split_network().classify(features)
        return logits

    @property
    def feature_dim(self) -> int:
        """Length of the network's penultimate vector."""
        return self._split_network().feature_dim

    def _split_network(self) -> ImageNetwork:
        if not isinstance(self.network, ImageNetwork):
            raise TypeError(
                f"{type(self.network).__name__} does not offer its penultimate vector: derive it "
                f"from python_models.networks.ImageNetwork with `features` and `classify`"
            )
        return self.network
