# SPDX-License-Identifier: Apache-2.0
"""Conversions of image tensors between 8 bits and [0, 1], sizes and channel counts."""

import torch
from torch import Tensor


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
