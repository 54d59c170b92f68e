# SPDX-License-Identifier: Apache-2.0
"""What methods share that fill a pool with the images of the lowest loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from python_models.data import (
    CorruptDataError,
    ImagePool,
    MissingDataError,
    RandomCropFlip,
    RandomResizedCropFlip,
    UnlabelledImages,
)
from python_models.distributed import ALONE, World
from python_models.errors import UserError
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
    initial_pool: str | None = None
    """Images that the pool holds from the start, given as --unlabelled is; --pool-size counts
    them."""
    crop: int = 4
    """Padding of the random crop of the student's images; 0: none."""
    flip: bool = True
    """Random horizontal flips of them."""
    crop_scale: float = 1.0
    """Below 1, a random resized crop takes the place of --crop: the least share of an image's area
    that it keeps."""


PoolSettingsT = TypeVar("PoolSettingsT", bound=PoolSettings)


class PooledMethod(Method[PoolSettingsT]):
    """Base class of methods whose student learns from augmented images of a growing pool.

    Attributes:
        pool: Filled by the subclass, in `begin_round`; begins with ``initial_pool``.
        augment: Random crop and flip of the student's images.

    Raises:
        UserError: If a setting is impossible, or the initial pool is not there or too large.
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
        self.augment = self._augmentation("crop_scale")
        self.parts = {"pool": self.pool}
        self._pool_stream = context.randomness.on_device("pool")
        # Opened before anything is computed or written, and read by `prepare`.
        self._initial = self._open_initial_pool()

    def _augmentation(self, name: str) -> RandomCropFlip | RandomResizedCropFlip:
        """Return the random crop and flip whose least share of the area is the setting `name`."""
        scale = getattr(self.settings, name)
        if not 0 < scale <= 1:
            raise UserError(f"{name}={scale} must lie in (0, 1]")
        if scale < 1:
            return RandomResizedCropFlip((scale, 1.0), flip=self.settings.flip)
        return RandomCropFlip(self.settings.crop, self.settings.flip)

    def _open_initial_pool(self) -> UnlabelledImages | None:
        name, size = self.settings.initial_pool, self.settings.pool_size
        if name is None:
            return None
        try:
            source = self.context.open_images(name)
        except (MissingDataError, CorruptDataError) as error:
            raise UserError(f"initial_pool: {error}") from error
        if len(source) > size:
            raise UserError(
                f"initial_pool={name} holds {len(source)} images, which are more than "
                f"pool_size={size}: give --pool-size {len(source)} or more"
            )
        return source

    def prepare(self) -> None:
        """Put the initial images into the pool; a resumed run finds them in its checkpoint."""
        if self._initial is None:
            return
        for _, images in self._initial.batches():
            self.pool.add(images.to(self.context.device))
        self._initial = None  # it may hold all images

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, the pool's images among it."""
        super().load_state_dict(state)
        self._initial = None

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
