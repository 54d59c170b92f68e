# SPDX-License-Identifier: Apache-2.0
"""What methods share that fill a pool with the images of the lowest loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from python_models.data import ImagePool, RandomCropFlip
from python_models.distributed import ALONE, World
from python_models.methods.base import Batch, Context, Method


@dataclass(kw_only=True)
class PoolSettings:
    """Settings of the pool and of the student's batches from it."""

    pool_size: int = 60000
    """Capacity of the pool."""
    pool_policy: Literal["newest", "reservoir"] = "newest"
    """What a full pool keeps: the newest images, or a uniform sample of all there ever were."""
    pool_storage: Literal["float", "uint8"] = "uint8"
    """How the pool stores pixels."""
    crop: int = 4
    """Padding of the random crop of the student's images; 0: none."""
    flip: bool = True
    """Random horizontal flips of them."""


PoolSettingsT = TypeVar("PoolSettingsT", bound=PoolSettings)


class PooledMethod(Method[PoolSettingsT]):
    """Base class of methods whose student learns from augmented images of a growing pool.

    Attributes:
        pool: Filled by the subclass, in `begin_round`.
        augment: Random crop and flip of the student's images.
    """

    def __init__(self, settings: PoolSettingsT, context: Context) -> None:
        super().__init__(settings, context)
        self.pool = ImagePool(
            settings.pool_size,
            context.image_shape,
            context.device,
            settings.pool_storage,
            settings.pool_policy,
            seed=context.randomness.stream_seed("reservoir"),
        )
        self.augment = RandomCropFlip(settings.crop, settings.flip)
        self.parts = {"pool": self.pool}
        self._pool_stream = context.randomness.on_device("pool")

    def next_batch(self) -> Batch:
        """Return augmented images of the pool."""
        part = self.world.part(self.context.batch_size)
        images = self.pool.sample(self.context.batch_size, self._pool_stream, part)
        return Batch(self.augment(images, self._pool_stream, part))

    def preview(self, count: int) -> Tensor:
        """Return images of the pool."""
        return self.pool.sample(count, torch.Generator().manual_seed(0))


class Best:
    """Copies of tensors from the moment of the lowest loss; never waits for the device.

    Args:
        world: Processes whose mean loss counts.

    Example:
        >>> best = Best()
        >>> for loss, images in steps:
        ...     best.offer(loss, images)
        >>> (images,) = best.tensors
    """

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self.tensors: tuple[Tensor, ...] = ()
        self._loss: Tensor | None = None

    def offer(self, loss: Tensor, *tensors: Tensor) -> None:
        """Take these tensors if the loss is lower than all before, or the first one.

        Args:
            loss: Scalar.
            *tensors: Of the same shapes in every call.
        """
        loss = self._world.mean(loss.detach())
        if self._loss is None:
            self.tensors = tuple(tensor.detach().clone() for tensor in tensors)
            self._loss = loss.nan_to_num(nan=torch.inf)
            return
        better = loss < self._loss
        self.tensors = tuple(
            torch.where(better, new.detach(), old)
            for new, old in zip(tensors, self.tensors, strict=True)
        )
        self._loss = torch.where(better, loss, self._loss)
