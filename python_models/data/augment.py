# SPDX-License-Identifier: Apache-2.0
"""Random augmentations of whole batches, on any device and differentiable."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from python_models.distributed import Part


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

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """Returns augmented copies of images [b, c, h, w] of any dtype.

        Args:
            images: the batch; not changed.
            generator: source of randomness on any device; torch's own one for the images' device
                if not given.
            part: which rows of a larger batch these are, whose random numbers are all drawn.

        Raises:
            ValueError: if `images` is not [b, c, h, w].
        """
        if images.dim() != 4:
            raise ValueError(f"images must have shape [b, c, h, w], got {list(images.shape)}")
        device = images.device if generator is None else generator.device
        start, stop, total = part or (0, len(images), len(images))
        shifts = torch.randint(
            -self.padding, self.padding + 1, (2, total), generator=generator, device=device
        )
        flips = torch.zeros(total, dtype=torch.bool, device=device)
        if self.flip:
            flips = torch.rand(total, generator=generator, device=device) < 0.5
        shifts = shifts[:, start:stop].to(images.device)
        flips = flips[start:stop].to(images.device)
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


class RandomRollFlip:
    """Rolls a whole batch by one random offset in each direction and mirrors it or not, as one.

    What leaves the images on one side comes back on the other, so nothing is lost: DeepInversion's
    jitter. The three random numbers are read on the host; a generator on the CPU spares waiting
    for the device.

    Args:
        reach: largest offset in pixels, in each direction.
        flip: mirror the batch left to right with probability 1/2.

    Raises:
        ValueError: if `reach` is negative.

    Example:
        >>> roll = RandomRollFlip(reach=2, flip=False)
        >>> roll(torch.rand(8, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 32, 32])
    """

    def __init__(self, reach: int, flip: bool = True) -> None:
        if reach < 0:
            raise ValueError(f"reach={reach} must not be negative")
        self.reach = reach
        self.flip = flip

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Returns moved copies of images [b, c, h, w] of any dtype."""
        device = generator.device
        offsets = torch.randint(
            -self.reach, self.reach + 1, (2,), generator=generator, device=device
        )
        moved = images.roll(offsets.tolist(), dims=(2, 3))
        if self.flip and torch.rand((), generator=generator, device=device).item() < 0.5:
            moved = moved.flip(3)
        return moved


class RandomResizedCropFlip:
    """Cuts a random rectangle out of each image, brings it to full size, and mirrors half of them.

    The rectangle's share of the image's area is uniform in `scale`, the logarithm of its width over
    its height in that of `ratio`; of ten draws the first that fits is taken, else the whole image.
    It is resized bilinearly, without antialiasing, with pixels as areas (`align_corners=False`).

    Each image is multiplied by two small matrices, one of its rows and one of its columns: no
    Python loop, and gradients are deterministic on every device.

    Args:
        scale: least and largest share of the area, in (0, 1].
        ratio: least and largest width over height, positive.
        flip: mirror half of the images left to right.

    Raises:
        ValueError: if a range is empty or out of bounds.

    Example:
        >>> augment = RandomResizedCropFlip(scale=(0.25, 1.0))
        >>> augment(torch.rand(8, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 32, 32])
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.25, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale={scale} must rise within (0, 1]")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio={ratio} must rise and be positive")
        self.scale = scale
        self.ratio = ratio
        self.flip = flip

    def __call__(
        self, images: Tensor, generator: torch.Generator, part: Part | None = None
    ) -> Tensor:
        """Returns augmented copies of floating-point images [b, c, h, w].

        Args:
            images: the batch; not changed.
            generator: source of randomness on any device.
            part: which rows of a larger batch these are, whose random numbers are all drawn.
        """
        count, _, height, width = images.shape
        start, stop, total = part or (0, count, count)
        boxes, flips = self._draw(total, height, width, generator)
        boxes, flips = boxes[:, start:stop], flips[start:stop]
        top, left, box_height, box_width = boxes.to(images.device, images.dtype).unbind()
        flips = flips.to(images.device)
        rows = _bilinear(top, box_height, height, torch.zeros_like(flips))
        columns = _bilinear(left, box_width, width, flips)
        return rows[:, None] @ images @ columns[:, None].mT

    def _draw(
        self, count: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Returns whole-numbered top, left, height and width [4, count], and flips [count]."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            drawn = torch.rand(shape, generator=generator, device=generator.device)
            return low + (high - low) * drawn

        tries = (count, 10)
        area = height * width * uniform(*self.scale, *tries)
        ratio = uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), *tries).exp()
        sizes = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()]).round().clamp(min=1)
        # Filled on the device: copying them there would make the host wait.
        whole = torch.stack([area.new_full((), height), area.new_full((), width)])
        fits = (sizes <= whole[:, None, None]).all(0)
        first = fits.int().argmax(1)  # of equals, the first
        size = sizes.gather(2, first.expand(2, count)[:, :, None]).squeeze(2)
        size = torch.where(fits.any(1), size, whole[:, None])
        room = whole[:, None] - size + 1
        # Rounding may bring a draw just below 1 to the end of its range.
        start = (uniform(0, 1, 2, count) * room).floor().minimum(room - 1)
        flips = uniform(0, 1, count) < (0.5 if self.flip else 0.0)
        return torch.cat([start, size]), flips


def _bilinear(start: Tensor, length: Tensor, size: int, flips: Tensor) -> Tensor:
    """Matrices [b, size, size] that stretch `length` pixels from `start` over `size` of them.

    Args:
        start: first pixel, [b].
        length: number of pixels, [b].
        size: number of pixels before and after.
        flips: where to turn the result around, bool [b].
    """
    pixels = torch.arange(size, device=start.device, dtype=start.dtype)
    target = torch.where(flips[:, None], size - 1 - pixels, pixels)
    place = (target + 0.5) * (length / size)[:, None] - 0.5
    place = place.clamp(min=0).minimum(length[:, None] - 1) + start[:, None]
    # A hat around its place gives each of the two nearest pixels its share.
    return (1 - (place[:, :, None] - pixels).abs()).clamp(min=0)
