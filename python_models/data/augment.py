# SPDX-License-Identifier: Apache-2.0
"""Random augmentations of whole batches, on any device and differentiable."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RandomCropFlip:
    """Pads with zeros, crops back at a random offset and mirrors with probability 1/2, per image.

    No Python loop and no interpolation: every pixel of the result is a pixel of the input or zero.
    Gradients flow through it and are deterministic on every device, since the adjoint of a shift
    and flip is again one.

    Args:
        padding: largest shift in pixels, in each direction.
        flip: mirror half of the images left to right.

    Raises:
        ValueError: if `padding` is negative.

    Example:
        >>> augment = RandomCropFlip(padding=4)
        >>> augment(torch.rand(8, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 32, 32])
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        if padding < 0:
            raise ValueError(f"padding={padding} must not be negative")
        self.padding = padding
        self.flip = flip

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns augmented copies of images [b, c, h, w] of any dtype.

        Args:
            images: the batch; not changed.
            generator: source of randomness on any device; torch's own one for the images' device
                if not given.

        Raises:
            ValueError: if `images` is not [b, c, h, w].
        """
        if images.dim() != 4:
            raise ValueError(f"images must have shape [b, c, h, w], got {list(images.shape)}")
        device = images.device if generator is None else generator.device
        size = (2, len(images))
        shifts = torch.randint(
            -self.padding, self.padding + 1, size, generator=generator, device=device
        )
        flips = torch.zeros(len(images), dtype=torch.bool, device=device)
        if self.flip:
            flips = torch.rand(len(images), generator=generator, device=device) < 0.5
        shifts, flips = shifts.to(images.device), flips.to(images.device)
        shifted: Tensor = _ShiftFlip.apply(images, shifts[0], shifts[1], flips, self.padding)
        return shifted

    def __repr__(self) -> str:
        """Returns the constructor's call."""
        return f"RandomCropFlip(padding={self.padding}, flip={self.flip})"


def _shift_flip(images: Tensor, down: Tensor, right: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Mirrors where flips[b], then moves: out[b, c, i, j] = in[b, c, i + down[b], j + right[b]].

    Pixels from outside are 0; no shift exceeds `padding`.
    """
    height, width = images.shape[-2:]
    mirrored = torch.where(flips[:, None, None, None], images.flip(3), images)
    padded = F.pad(mirrored, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [b, c, 2p + 1, 2p + 1, h, w]
    batch = torch.arange(len(images), device=images.device)
    return windows[batch, :, down + padding, right + padding]


class _ShiftFlip(torch.autograd.Function):
    """`_shift_flip` with its adjoint as gradient: the opposite shift, gathered, not scattered."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        down: Tensor,
        right: Tensor,
        flips: Tensor,
        padding: int,
    ) -> Tensor:
        ctx.save_for_backward(down, right, flips)
        ctx.padding = padding
        return _shift_flip(images, down, right, flips, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        down, right, flips = ctx.saved_tensors
        # Mirroring after a shift is mirroring before the opposite shift.
        back = torch.where(flips, right, -right)
        grad_images = _ShiftFlip.apply(grad, -down, back, flips, ctx.padding)
        return grad_images, None, None, None, None
