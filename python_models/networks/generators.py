# SPDX-License-Identifier: Apache-2.0
"""Generators: latent vectors in, images in [0, 1] out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from python_models.networks.layers import conv3x3
from python_models.registry import Registry


class Generator(nn.Module):
    """Linear stem to a quarter of the image's size, then two nearest-neighbour upsamplings.

    A 3x3 convolution, BatchNorm and LeakyReLU(0.2) follow each upsampling; a last 3x3 convolution
    and a sigmoid make the image.

    Attributes:
        output_is_normalised: the images are to be taken as normalised ones, not as ones in [0, 1]:
            `Classifier.denormalise` makes those of them.

    Args:
        latent_dim: length of the latent vectors.
        image_size: height and width of the images, a multiple of 4.
        channels: channels of the images.
        width: channels before the last convolution; twice as many after the first upsampling.
        stem_width: channels of the stem, `2 * width` if not given.

    Raises:
        ValueError: for an image size that is not a positive multiple of 4 or a count below 1.

    Example:
        >>> generator = Generator(latent_dim=100, image_size=32, channels=1)
        >>> generator(torch.randn(4, 100)).shape
        torch.Size([4, 1, 32, 32])
    """

    output_is_normalised = False

    def __init__(
        self,
        latent_dim: int,
        image_size: int = 32,
        channels: int = 3,
        *,
        width: int = 64,
        stem_width: int | None = None,
    ) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"image_size={image_size} must be a positive multiple of 4")
        for argument, value in (
            ("latent_dim", latent_dim),
            ("channels", channels),
            ("width", width),
        ):
            if value < 1:
                raise ValueError(f"{argument}={value} must be at least 1")
        self.latent_dim = latent_dim
        self.image_shape = (channels, image_size, image_size)
        stem_width = 2 * width if stem_width is None else stem_width
        size = image_size // 4
        self.stem = nn.Linear(latent_dim, stem_width * size * size)
        self.blocks = nn.Sequential(
            nn.Unflatten(1, (stem_width, size, size)),
            nn.BatchNorm2d(stem_width),
            nn.Upsample(scale_factor=2, mode="nearest"),
            conv3x3(stem_width, 2 * width),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2, mode="nearest"),
            conv3x3(2 * width, width),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Returns images [b, channels, size, size] in [0, 1] of latents [b, latent_dim]."""
        images: Tensor = self.blocks(self.stem(latents))
        return images

    def sample_latents(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws latents [count, latent_dim] from N(0, 1), on the device of the parameters."""
        weight = self.stem.weight
        device = weight.device if generator is None else generator.device
        latents = torch.randn(
            count, self.latent_dim, generator=generator, device=device, dtype=weight.dtype
        )
        return latents.to(weight.device)


class DAFLGenerator(Generator):
    """The generator of DAFL's released code, which makes normalised images.

    Its convolutions have biases and the BatchNorm layers after them epsilon 0.8; tanh and a
    BatchNorm without weights make the image: of mean 0 and variance 1 in each channel, as
    normalised images are.

    Args:
        latent_dim: length of the latent vectors.
        image_size: height and width of the images, a multiple of 4.
        channels: channels of the images.
    """

    output_is_normalised = True

    def __init__(self, latent_dim: int, image_size: int = 32, channels: int = 3) -> None:
        super().__init__(latent_dim, image_size, channels)
        size = image_size // 4
        self.blocks = nn.Sequential(
            nn.Unflatten(1, (128, size, size)),
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.BatchNorm2d(128, eps=0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(128, 64, 3, padding=1),
            nn.BatchNorm2d(64, eps=0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )


GENERATORS: Registry[Callable[[int, int, int], Generator]] = Registry("generator")
"""Factories `(latent_dim, image_size, channels) -> Generator` by name."""


def build_generator(
    name: str, latent_dim: int, image_size: int = 32, channels: int = 3
) -> Generator:
    """Builds a freshly initialised generator.

    Args:
        name: a name in `GENERATORS`.
        latent_dim: length of the latent vectors.
        image_size: height and width of the images, a multiple of 4.
        channels: channels of the images.

    Raises:
        ValueError: for an unknown name (the message gives the nearest ones) or an impossible size.
    """
    return GENERATORS.get(name)(latent_dim, image_size, channels)


@GENERATORS.register("generator_small")
def generator_small(latent_dim: int, image_size: int = 32, channels: int = 3) -> Generator:
    """The generator of CMI and Fast: 2,328,899 parameters at latent_dim 256, 32x32, 3 channels."""
    return Generator(latent_dim, image_size, channels)


@GENERATORS.register("generator_large")
def generator_large(latent_dim: int, image_size: int = 32, channels: int = 3) -> Generator:
    """The generator of the alternating DAFL and of MosaicKD, with twice the channels in its stem.

    8,776,259 parameters at latent_dim 512, 32x32, 3 channels.
    """
    return Generator(latent_dim, image_size, channels, stem_width=256)


@GENERATORS.register("generator_tiny")
def generator_tiny(latent_dim: int, image_size: int = 32, channels: int = 3) -> Generator:
    """A quarter of generator_small's width, for small grey images on a CPU."""
    return Generator(latent_dim, image_size, channels, width=16)


@GENERATORS.register("generator_dafl")
def generator_dafl(latent_dim: int, image_size: int = 32, channels: int = 3) -> Generator:
    """The generator of DAFL's released code; its output is normalised already.

    8,423,939 parameters at latent_dim 1000, 32x32, 3 channels.
    """
    return DAFLGenerator(latent_dim, image_size, channels)
