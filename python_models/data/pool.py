# SPDX-License-Identifier: Apache-2.0
"""A bounded store of synthetic images that stays on the training device."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from python_models.data.images import to_float, to_uint8
from python_models.distributed import Part


class ImagePool:
    """Keeps at most `capacity` images and draws random batches of them.

    Policy "newest" keeps the last `capacity` images added; "reservoir" keeps a uniform sample of
    all images ever added (Vitter's algorithm R). Storage "float" keeps the values as they are,
    "uint8" a quarter of the memory at 8 bits per value. The memory is allocated once, at the start.

    Args:
        capacity: largest number of images.
        image_shape: (channels, height, width).
        device: where the images are kept and handed out.
        storage: "float" (float32) or "uint8".
        policy: "newest" or "reservoir".
        seed: of the reservoir's own random choices; "newest" makes none.

    Raises:
        ValueError: for a capacity below 1, a shape that is not (c, h, w), or an unknown storage or
            policy.

    Example:
        >>> pool = ImagePool(capacity=1000, image_shape=(3, 32, 32))
        >>> pool.add(torch.rand(256, 3, 32, 32))
        >>> len(pool), pool.sample(64).shape
        (256, torch.Size([64, 3, 32, 32]))
    """

    def __init__(
        self,
        capacity: int,
        image_shape: Sequence[int],
        device: torch.device | str = "cpu",
        storage: Literal["float", "uint8"] = "float",
        policy: Literal["newest", "reservoir"] = "newest",
        seed: int = 0,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1")
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(
                f"image_shape={tuple(image_shape)} must be (channels, height, width), all positive"
            )
        if storage not in ("float", "uint8"):
            raise ValueError(f"storage={storage!r} must be 'float' or 'uint8'")
        if policy not in ("newest", "reservoir"):
            raise ValueError(f"policy={policy!r} must be 'newest' or 'reservoir'")
        self.capacity = capacity
        self.image_shape = tuple(image_shape)
        self.storage = storage
        self.policy = policy
        dtype = torch.float32 if storage == "float" else torch.uint8
        self._images = torch.empty((capacity, *self.image_shape), dtype=dtype, device=device)
        self._seen = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Returns the number of images held now."""
        return min(self._seen, self.capacity)

    @property
    def seen(self) -> int:
        """Number of images ever added."""
        return self._seen

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self._images.device

    def add(self, images: Tensor) -> None:
        """Adds images [b, c, h, w]: floating point in [0, 1], or uint8. They are copied, detached.

        Raises:
            ValueError: if their shape is not that of the pool.
            TypeError: if they are neither floating point nor uint8.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must have shape [b, {expected}], got {list(images.shape)}")
        images = images.detach()
        images = to_float(images) if self.storage == "float" else to_uint8(images)
        if self.policy == "newest":
            self._add_newest(images)
        else:
            self._add_reservoir(images)
        self._seen += len(images)

    def _add_newest(self, images: Tensor) -> None:
        start = self._seen + max(len(images) - self.capacity, 0)
        images = images[-self.capacity :]
        start %= self.capacity
        head = min(len(images), self.capacity - start)
        self._images[start : start + head] = images[:head]
        self._images[: len(images) - head] = images[head:]

    def _add_reservoir(self, images: Tensor) -> None:
        # Image number t (from 0) takes slot t while there is room, then slot floor(u * (t + 1)) if
        # that is one. Later images overwrite earlier ones, so only the last one of a slot is kept.
        position = torch.arange(self._seen, self._seen + len(images))
        draws = torch.rand(len(images), generator=self._generator, dtype=torch.float64)
        slots = torch.where(position < self.capacity, position, (draws * (position + 1)).long())
        source = torch.arange(len(images))
        owner = torch.full((self.capacity + 1,), -1)
        owner.scatter_reduce_(0, slots.clamp(max=self.capacity), source, "amax")
        taken = (owner[:-1] >= 0).nonzero().squeeze(1)
        rows = owner[taken].to(images.device)
        self._images[taken.to(self.device)] = images[rows].to(self.device)

    def sample(
        self, n: int, generator: torch.Generator | None = None, part: Part | None = None
    ) -> Tensor:
        """Draws `n` random images, float32 [n, c, h, w] in [0, 1].

        No image comes twice before all have come once.

        Args:
            n: number of images.
            generator: source of randomness on any device; torch's own one for the pool's device if
                not given.
            part: which of them to return, by default all; `n` are drawn anyway.

        Raises:
            ValueError: if `n` is negative.
            RuntimeError: if the pool is empty.
        """
        if n < 0:
            raise ValueError(f"n={n} must not be negative")
        if not len(self):
            raise RuntimeError("the pool is empty: add images before sampling from it")
        device = self.device if generator is None else generator.device
        rounds = [
            torch.randperm(len(self), generator=generator, device=device)
            for _ in range(-(-n // len(self)))
        ]
        index = torch.cat(rounds)[:n] if rounds else torch.empty(0, dtype=torch.long, device=device)
        if part is not None:
            index = index[part.rows]
        return to_float(self._images.index_select(0, index.to(self.device)))

    def state_dict(self) -> dict[str, Any]:
        """Returns all that an exact resume needs; the images as they are stored, without room."""
        return {
            "capacity": self.capacity,
            "image_shape": self.image_shape,
            "storage": self.storage,
            "policy": self.policy,
            "seen": self._seen,
            "images": self._images[: len(self)].clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, on this pool's device.

        Raises:
            ValueError: if the state is of a pool of another capacity, shape, storage or policy.
        """
        for key in ("capacity", "image_shape", "storage", "policy"):
            expected, found = getattr(self, key), state[key]
            if (tuple(found) if key == "image_shape" else found) != expected:
                raise ValueError(
                    f"the saved pool has {key}={found!r}, this one has {key}={expected!r}: "
                    f"build the pool with the settings of the saved run"
                )
        self._seen = state["seen"]
        self._images[: len(self)] = state["images"].to(self.device)
        self._generator.set_state(state["generator"].cpu())
