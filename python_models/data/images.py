# SPDX-License-Identifier: Apache-2.0
"""Conversions of image tensors: 8 bits or [0, 1], size, channels."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Images resized at a time: bounds the memory of the float copies.
_CHUNK = 1024

# Weights of red, green and blue in grey, ITU-R BT.601.
_LUMA = (0.299, 0.587, 0.114)


def to_float(images: Tensor) -> Tensor:
    """Returns images as float32: uint8 is divided by 255, floating point is cast if need be.

    Raises:
        TypeError: for any other dtype.
    """
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if images.is_floating_point():
        return images.float()
    raise TypeError(f"images must be uint8 or floating point in [0, 1], got {images.dtype}")


def to_uint8(images: Tensor) -> Tensor:
    """Returns images as uint8: floating point in [0, 1] is scaled, rounded and clipped.

    Raises:
        TypeError: for a dtype that is neither uint8 nor floating point.
    """
    if images.dtype == torch.uint8:
        return images
    if images.is_floating_point():
        return images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
    raise TypeError(f"images must be uint8 or floating point in [0, 1], got {images.dtype}")


def pad_to(images: Tensor, size: int) -> Tensor:
    """Centres images [n, c, h, w] on black ones [n, c, size, size], where h, w <= size."""
    height, width = images.shape[-2:]
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


def fit(images: Tensor, image_size: int, channels: int) -> Tensor:
    """Brings uint8 images [n, c, h, w] to [n, channels, image_size, image_size].

    Colour becomes grey by its luma, grey becomes colour by repetition. The largest centred square
    is cut out, then resized bilinearly with antialiasing.

    Raises:
        ValueError: if `channels` or the channels of `images` are neither 1 nor 3.
    """
    for name, value in (("channels", channels), ("channels of images", images.shape[1])):
        if value not in (1, 3):
            raise ValueError(f"{name}={value} must be 1 (grey) or 3 (colour)")
    side = min(images.shape[-2:])
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    images = images[..., top : top + side, left : left + side]
    grey = channels < images.shape[1]
    if side != image_size or grey:
        chunks = torch.split(images, _CHUNK)
        images = torch.cat([_fit_chunk(chunk, image_size, grey) for chunk in chunks])
    return images.expand(-1, channels, -1, -1).contiguous()


def _fit_chunk(images: Tensor, size: int, grey: bool) -> Tensor:
    chunk = images.float()
    if grey:
        weights = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)
        chunk = (chunk * weights).sum(1, keepdim=True)
    if images.shape[-1] != size:
        chunk = F.interpolate(chunk, size=(size, size), mode="bilinear", antialias=True)
    return chunk.round_().clamp_(0, 255).to(torch.uint8)
