# SPDX-License-Identifier: Apache-2.0
"""What every network of this package offers, and the wrapper that normalises its input."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from python_models.errors import UserError
from python_models.networks.custom import call_factory, import_factory, is_spec
from python_models.precision import Precision
from python_models.registry import Registry


class ImageNetwork(nn.Module):
    """A classifier of images in parts: `feature_map`, its spatial mean `features`, `classify`.

    Subclasses set `feature_dim` and implement `classify` and `feature_map`; one without a map that
    is averaged implements `features` instead, which is then a map of one pixel. Images are already
    normalised here.
    """

    feature_dim: int

    @property
    def map_channels(self) -> int:
        """Channels of the last feature map."""
        return self.feature_dim

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the last feature map [b, map_channels, h', w'] of images [b, c, h, w]."""
        return self.features(images)[:, :, None, None]

    def features(self, images: Tensor) -> Tensor:
        """Returns the penultimate vectors [b, feature_dim] of images [b, c, h, w]."""
        return self.feature_map(images).mean(dim=(2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of penultimate vectors [b, feature_dim]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of images [b, c, h, w]."""
        return self.classify(self.features(images))


NETWORKS: Registry[Callable[..., ImageNetwork]] = Registry("network")
"""Factories `(num_classes, in_channels) -> ImageNetwork` by name."""


def build_network(
    name: str, /, num_classes: int, in_channels: int = 3, **arguments: Any
) -> nn.Module:
    """Builds a freshly initialised network.

    Args:
        name: a name in `NETWORKS`, whose networks are all `ImageNetwork`s, or any importable class
            or function that makes a module, as `package.module:callable`.
        num_classes: number of logits, at least 1. A callable gets it where its signature has this
            name or takes any keyword.
        in_channels: channels of the images: 1 grey, 3 colour. A callable gets it where its
            signature has this name.
        **arguments: further keyword arguments of the callable.

    Raises:
        ValueError: for an unknown name (the message gives the nearest ones), a count below 1, a
            callable that cannot be imported, does not take the arguments or makes no module.

    Example:
        >>> build_network("lenet5", num_classes=10, in_channels=1).feature_dim
        84
        >>> build_network("torch.nn:Linear", 10, in_features=4, out_features=10)
        Linear(in_features=4, out_features=10, bias=True)
    """
    factory = import_factory(name) if is_spec(name) else NETWORKS.get(name)
    counts = {"num_classes": num_classes, "in_channels": in_channels}
    for argument, value in counts.items():
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1")
    return call_factory(factory, name, counts, arguments)


def count_parameters(module: nn.Module) -> int:
    """Returns the number of scalar parameters (running statistics are not parameters)."""
    return sum(parameter.numel() for parameter in module.parameters())


class Classifier(nn.Module):
    """A network together with its input normalisation: images in [0, 1] go in, logits come out.

    `mean` and `std` are buffers that are not saved: `classifier.network.state_dict()` holds the
    network's own keys, and checkpoints do not depend on the wrapper.

    The vector before the last layer is that of an `ImageNetwork`. Of any other module it is the
    input of the last `nn.Linear` that the module registers, whose output must be the logits.

    Args:
        network: any module from normalised images [b, c, h, w] to logits [b, num_classes].
        mean: one value per channel, or a single one for all; `(0.0,)` with std `(1.0,)` leaves the
            images as they are.
        std: as `mean`, positive.

    Attributes:
        precision: how the network computes; float32 unless a run sets another one.

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
        self.precision = Precision()
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

    def denormalise(self, normalised: Tensor) -> Tensor:
        """Returns the images [b, c, h, w] that `normalise` makes `normalised` of.

        What a generator with `output_is_normalised` makes goes through this first; its images may
        leave [0, 1].
        """
        if self._is_identity:
            return normalised
        return torch.addcmul(self.mean, normalised, self.std)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of images [b, c, h, w] in [0, 1].

        Raises:
            ValueError: if the network returns something else than one tensor.
        """
        return self.precision.run(self._logits, self.normalise(images))

    def _logits(self, normalised: Tensor) -> Tensor:
        logits = self.network(normalised)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(self.network).__name__} must return the logits [b, num_classes] alone, "
                f"got {type(logits).__name__}: wrap it in a module that does"
            )
        return logits

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the network's last feature map [b, map_channels, h', w'] of images in [0, 1].

        Its spatial mean is the penultimate vector; of a module that is no `ImageNetwork`, it is
        that vector as a map of one pixel.
        """
        if isinstance(self.network, ImageNetwork):
            return self.precision.run(self.network.feature_map, self.normalise(images))
        return self.features(images)[:, :, None, None]

    def features(self, images: Tensor) -> Tensor:
        """Returns the network's penultimate vectors [b, feature_dim] of images in [0, 1].

        Raises:
            UserError: if the network is no `ImageNetwork` and its last `nn.Linear` does not make
                its logits.
        """
        return self.precision.run(self._features, self.normalise(images))

    def _features(self, normalised: Tensor) -> Tensor:
        if isinstance(self.network, ImageNetwork):
            return self.network.features(normalised)
        last = self._last_linear()
        seen: list[tuple[Tensor, Tensor]] = []
        handle = last.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
        try:
            logits = self.network(normalised)
        finally:
            handle.remove()
        if not seen or seen[-1][1] is not logits:
            raise self._no_features("its last nn.Linear does not make its logits")
        return seen[-1][0]

    def classify(self, features: Tensor) -> Tensor:
        """Returns the logits [b, num_classes] of penultimate vectors [b, feature_dim]."""
        if isinstance(self.network, ImageNetwork):
            return self.precision.run(self.network.classify, features)
        return self.precision.run(self._last_linear(), features)

    @property
    def feature_dim(self) -> int:
        """Length of the network's penultimate vector."""
        if isinstance(self.network, ImageNetwork):
            return self.network.feature_dim
        return self._last_linear().in_features

    @property
    def map_channels(self) -> int:
        """Channels of the network's last feature map."""
        return self.feature_dim

    def _last_linear(self) -> nn.Linear:
        linears = [m for m in self.network.modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise self._no_features("it has no nn.Linear")
        return linears[-1]

    def _no_features(self, reason: str) -> UserError:
        return UserError(
            f"the vector before the last layer of {type(self.network).__name__} cannot be found: "
            f"{reason}. Derive it from python_models.networks.ImageNetwork, with `feature_dim`, "
            "`features` and `classify`"
        )


def with_features(network: nn.Module) -> ImageNetwork | Classifier:
    """Returns the network itself if it is an `ImageNetwork`, else one with its parts around it."""
    return network if isinstance(network, ImageNetwork) else Classifier(network, (0.0,), (1.0,))
