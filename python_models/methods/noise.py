# SPDX-License-Identifier: Apache-2.0
"""Distillation on uniform noise: the floor that every data-free method must beat.

Each pixel is drawn from U(0, 1), anew for every step; the student learns on KL_T(T || S) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from python_models.methods.base import METHODS, Batch, Context, Method, Synthesis


@dataclass(kw_only=True)
class NoiseSettings:
    """Uniform noise has no settings."""


@METHODS.register("noise")
class Noise(Method[NoiseSettings]):
    """Images of uniform noise."""

    summary = "baseline: images of uniform noise"
    Settings = NoiseSettings
    defaults: ClassVar = {"kd_steps": 5, "temperature": 4.0}
    num_prototypes = 8

    def __init__(self, settings: NoiseSettings, context: Context) -> None:
        super().__init__(settings, context)
        self._stream = context.randomness.on_device("noise")
        self._fresh: Batch | None = None

    def begin_round(self, index: int) -> Synthesis:
        """Draw the round's first mini-batch, which the dictionary is built from."""
        self._fresh = self._draw_batch()
        return Synthesis(self._fresh)

    def next_batch(self) -> Batch:
        """Return fresh noise."""
        batch, self._fresh = self._fresh, None
        return self._draw_batch() if batch is None else batch

    def _draw_batch(self) -> Batch:
        return Batch(self.world.share(self._draw(self.context.batch_size, self._stream)))

    def preview(self, count: int) -> Tensor:
        """Return noise that is the same in every picture."""
        return self._draw(count, torch.Generator(self.context.device).manual_seed(0))

    def _draw(self, count: int, stream: torch.Generator) -> Tensor:
        shape = (count, *self.context.image_shape)
        return torch.rand(shape, generator=stream, device=self.context.device)
