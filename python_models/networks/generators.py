# SPDX-License-Identifier: Apache-2.0
"""Generators: latents in, images in [0, 1] out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from python_models.registry import Registry


class Generator(nn.Module):
    """What all generators share: subclasses put their layers into `stem` and `blocks`.

    The layers make images of `made_size`, the least multiple of `multiple` that is large enough;
    the centre of them is what is wanted.

    Attributes:
        latent_dim: length of the latent vectors, or channels of latents that are maps.
        latent_shape: shape of one latent, `(latent_dim,)` or `(latent_dim, h, w)`.
        image_shape: `(channels, height, width)` of the images.
        made_size: height and width before the cut.
        output_is_normalised: the images are to be taken as normalised ones, not as ones in [0, 1]:
            `Classifier.denormalise` makes those of them.

    Raises:
        ValueError: for a size or count below 1.
    """

    output_is_normalised = False

    def __init__(
        self, latent_dim: int, image_size: int, channels: int, *, width: int, multiple: int
    ) -> None:
        super().__init__()
        for argument, value in (
            ("latent_dim", latent_dim),
            ("image_size", image_size),
            ("channels", channels),
            ("width", width),
        ):
            if value < 1:
                raise ValueError(f"{argument}={value} must be at least 1")
        self.latent_dim = latent_dim
        self.latent_shape: tuple[int, ...] = (latent_dim,)
        self.image_shape = (channels, image_size, image_size)
        self.made_size = -(-image_size // multiple) * multiple
        self.stem: nn.Module
        self.blocks: nn.Module

    def forward(self, latents: Tensor) -> Tensor:
        """Returns images [b, channels, size, size] of latents `[b, *latent_shape]`."""
        images: Tensor = self.blocks(self.stem(latents))
        size = self.image_shape[1]
        if size == self.made_size:
            return images
        start = (self.made_size - size) // 2
        return images[..., start : start + size, start : start + size]

    def sample_latents(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws latents `[count, *latent_shape]` from N(0, 1), on the device of the parameters."""
        weight = next(self.parameters())
        device = weight.device if generator is None else generator.device
        latents = torch.randn(
            count, *self.latent_shape, generator=generator, device=device, dtype=weight.dtype
        )
        return latents.to(weight.device)


class VectorGenerator(Generator):
    """Linear stem to a quarter of the image's size (rounded up), two nearest-neighbour upsamplings.

    A 3x3 convolution, BatchNorm and LeakyReLU(0.2) follow each upsampling; a last 3x3 convolution
    and a sigmoid make the image.

    Args:
        latent_dim: length of the latent vectors.
        image_size: height and width of the images; made as the next multiple of 4, and cut.
        channels: channels of the images.
        width: channels before the last convolution; twice as many after the first upsampling.
        stem_width: channels of the stem, `2 * width` if not given.

    Example:
        >>> generator = VectorGenerator(latent_dim=100, image_size=32, channels=1)
        >>> generator(torch.randn(4, 100)).shape
        torch.Size([4, 1, 32, 32])
    """

    def __init__(
        self,
        latent_dim: int,
        image_size: int = 32,
        channels: int = 3,
        *,
        width: int = 64,
        stem_width: int | None = None,
    ) -> None:
        super().__init__(latent_dim, image_size, channels, width=width, multiple=4)
        stem_width = 2 * width if stem_width is None else stem_width
        size = self.made_size // 4
        self.stem = nn.Linear(latent_dim, stem_width * size * size)
        self.blocks = nn.Sequential(
            nn.Unflatten(1, (stem_width, size, size)),
            nn.BatchNorm2d(stem_width),
            *_upsampling(stem_width, 2 * width),
            *_upsampling(2 * width, width),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )


class DAFLGenerator(Generator):
    """The generator of DAFL's released code, which makes normalised images.

    As `VectorGenerator`, but its convolutions have biases, the BatchNorm layers after them
    epsilon 0.8, and tanh and a BatchNorm without weights make the image: of mean 0 and variance 1
    in each channel, as normalised images are (before the cut, where there is one).

    Args:
        latent_dim: length of the latent vectors.
        image_size: height and width of the images; made as the next multiple of 4, and cut.
        channels: channels of the images.
    """

    output_is_normalised = True

    def __init__(self, latent_dim: int, image_size: int = 32, channels: int = 3) -> None:
        width = 64
        super().__init__(latent_dim, image_size, channels, width=width, multiple=4)
        size = self.made_size // 4
        self.stem = nn.Linear(latent_dim, 2 * width * size * size)
        self.blocks = nn.Sequential(
            nn.Unflatten(1, (2 * width, size, size)),
            nn.BatchNorm2d(2 * width),
            *_upsampling(2 * width, 2 * width, bias=True, eps=0.8),
            *_upsampling(2 * width, width, bias=True, eps=0.8),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )


class MapGenerator(Generator):
    """Latents that are maps of a sixteenth of the image's size (rounded up), four upsamplings.

    Convolution, BatchNorm and LeakyReLU(0.2) to `2 * width` channels; then four times as in
    `VectorGenerator`, to `2 * width`, `width`, `width` and `width` channels.

    Args:
        latent_dim: channels of the latents.
        image_size: height and width of the images; made as the next multiple of 16, and cut.
        channels: channels of the images.
        width: channels before the last convolution.
    """

    def __init__(
        self, latent_dim: int, image_size: int = 224, channels: int = 3, *, width: int = 64
    ) -> None:
        super().__init__(latent_dim, image_size, channels, width=width, multiple=16)
        self.latent_shape = (latent_dim, self.made_size // 16, self.made_size // 16)
        self.stem = nn.Sequential(*_convolution(latent_dim, 2 * width))
        self.blocks = nn.Sequential(
            *_upsampling(2 * width, 2 * width),
            *_upsampling(2 * width, width),
            *_upsampling(width, width),
            *_upsampling(width, width),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )


def _convolution(
    in_channels: int, out_channels: int, *, bias: bool = False, eps: float = 1e-5
) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias),
        nn.BatchNorm2d(out_channels, eps=eps),
        nn.LeakyReLU(0.2, inplace=True),
    ]


def _upsampling(
    in_channels: int, out_channels: int, *, bias: bool = False, eps: float = 1e-5
) -> list[nn.Module]:
    upsample = nn.Upsample(scale_factor=2, mode="nearest")
    return [upsample, *_convolution(in_channels, out_channels, bias=bias, eps=eps)]


GENERATORS: Registry[Callable[[int, int, int], Generator]] = Registry("generator")
"""Factories `(latent_dim, image_size, channels) -> Generator` by name."""


def build_generator(
    name: str, latent_dim: int, image_size: int = 32, channels: int = 3
) -> Generator:
    """Builds a freshly initialised generator.

    Args:
        name: a name in `GENERATORS`.
        latent_dim: length of the latent vectors.
        image_size: height and width of the images. They are made as the next multiple of 4
            (generator_imagenet: of 16), of which the centre is cut.
        channels: channels of the images.

    Raises:
        ValueError: for an unknown name (the message gives the nearest ones) or a count below 1.
    """
    return GENERATORS.get(name)(latent_dim, image_size, channels)


@GENERATORS.register("generator_small")
def generator_small(latent_dim: int, image_size: int = 32, channels: int = 3) -> Generator:
    """The generator of CMI and Fast: 2,328,899 parameters at latent_dim 256, 32x32, 3 channels."""
    return VectorGenerator(latent_dim, image_size, channels)


@GENERATORS.register("generator_large")
def generator_large(latent_dim: int, image_size: int = 32, channels: int = 3) -> Generator:
    """The generator of the alternating DAFL and of MosaicKD, with twice the channels in its stem.

    8,776,259 parameters at latent_dim 512, 32x32, 3 channels.
    """
    return VectorGenerator(latent_dim, image_size, channels, stem_width=256)


@GENERATORS.register("generator_tiny")
def generator_tiny(latent_dim: int, image_size: int = 32, channels: int = 3) -> Generator:
    """A quarter of generator_small's width, for small grey images on a CPU."""
    return VectorGenerator(latent_dim, image_size, channels, width=16)


@GENERATORS.register("generator_dafl")
def generator_dafl(latent_dim: int, image_size: int = 32, channels: int = 3) -> Generator:
    """The generator of DAFL's released code; its output is normalised already.

    8,423,939 parameters at latent_dim 1000, 32x32, 3 channels.
    """
    return DAFLGenerator(latent_dim, image_size, channels)


@GENERATORS.register("generator_imagenet")
def generator_imagenet(latent_dim: int, image_size: int = 224, channels: int = 3) -> Generator:
    """The generator of Fast for ImageNet, whose latents are maps of a sixteenth of the image.

    592,451 parameters at latent_dim 256, 3 channels. The released code has a linear layer besides,
    which it does not use.
    """
    return MapGenerator(latent_dim, image_size, channels)
