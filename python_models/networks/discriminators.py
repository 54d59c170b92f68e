# SPDX-License-Identifier: Apache-2.0
"""Discriminators: images in, logits of being real out."""

from collections.abc import Callable

from torch import Tensor, nn

from python_models.registry import Registry


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of 10x10 pixels, one every 4 pixels in each direction (MosaicKD).

    Two 4x4 convolutions of stride 2, each with LeakyReLU(0.2), the second with BatchNorm and
    without bias, then a 1x1 convolution without bias: no patch sees beyond itself, so that what is
    learned is how local structure looks, not whole objects.

    Args:
        channels: channels of the images.
        width: channels after the first convolution; twice as many after the second.

    Raises:
        ValueError: for a count below 1.

    Example:
        >>> PatchDiscriminator(channels=3)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, channels: int = 3, *, width: int = 128) -> None:
        super().__init__()
        for argument, value in (("channels", channels), ("width", width)):
            if value < 1:
                raise ValueError(f"{argument}={value} must be at least 1")
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 1, 1, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits [b, 1, h / 4, w / 4], one a patch, of normalised images [b, c, h, w]."""
        logits: Tensor = self.layers(images)
        return logits


DISCRIMINATORS: Registry[Callable[[int], nn.Module]] = Registry("discriminator")
"""Factories `(channels) -> nn.Module` by name."""


def build_discriminator(name: str = "discriminator_patch", channels: int = 3) -> nn.Module:
    """Builds a freshly initialised discriminator.

    Args:
        name: a name in `DISCRIMINATORS`.
        channels: channels of the images.

    Raises:
        ValueError: for an unknown name (the message gives the nearest ones) or channels below 1.
    """
    return DISCRIMINATORS.get(name)(channels)


@DISCRIMINATORS.register("discriminator_patch")
def discriminator_patch(channels: int = 3) -> PatchDiscriminator:
    """The patch discriminator of MosaicKD: 531,328 parameters for 3 channels."""
    return PatchDiscriminator(channels)


@DISCRIMINATORS.register("discriminator_tiny")
def discriminator_tiny(channels: int = 3) -> PatchDiscriminator:
    """A quarter of discriminator_patch's width, for small grey images on a CPU."""
    return PatchDiscriminator(channels, width=32)
