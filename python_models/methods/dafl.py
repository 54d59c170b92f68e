# SPDX-License-Identifier: Apache-2.0
"""DAFL: Data-Free Learning of Student Networks (Chen et al., ICCV 2019).

The alternating form that later work benchmarks: a generator ``x = G(z)``, ``z ~ N(0, I)``, that
learns from the teacher alone (logits ``t``, penultimate features ``f``), by Adam on

    oh * mean CE(t, argmax t) - act * mean |f| + ie * sum_c m_c log m_c,    m = mean_b softmax(t),

then student steps on fresh images of the generator in eval mode. Logarithms are natural by default;
the authors' own code takes base 10 and other weights (0.05, 0.01 and 5 on CIFAR-10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from python_models import losses
from python_models.methods.base import (
    METHODS,
    Batch,
    Context,
    Method,
    Synthesis,
    backward_into,
    on_device,
    total,
)
from python_models.networks import build_generator


@dataclass(kw_only=True)
class DAFLSettings:
    """Settings of DAFL."""

    g_steps: int = 1
    """Generator steps in a round."""
    lr_g: float = 1e-3
    """Learning rate of the generator (Adam, betas 0.5 and 0.999)."""
    generator: str = "generator_large"
    """Name of the generator (see: kdci list generators)."""
    latent_dim: int = 512
    """Length of the latent vectors."""
    synthesis_batch_size: int = 256
    """Images in a generator step."""
    oh: float = 1.0
    """Weight of the one-hot term."""
    act: float = 1e-3
    """Weight of the activation term."""
    ie: float = 20.0
    """Weight of the information entropy term."""
    entropy_base: Literal["e", "10"] = "e"
    """Logarithm of the information entropy term."""


@METHODS.register("dafl")
class DAFL(Method[DAFLSettings]):
    """Generator against the teacher; the student learns from its fresh images."""

    summary = "generator trained on the teacher's certainty, activations and class balance"
    Settings = DAFLSettings
    defaults: ClassVar = {"kd_steps": 5, "temperature": 1.0, "lr": 0.1, "weight_decay": 1e-4}
    num_prototypes = 8
    needs_features = ("teacher",)

    def __init__(self, settings: DAFLSettings, context: Context) -> None:
        super().__init__(settings, context)
        channels, size, _ = context.image_shape
        with context.randomness.initialising("generator"):
            generator = build_generator(settings.generator, settings.latent_dim, size, channels)
        self.generator = on_device(generator, context.device)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=settings.lr_g, betas=(0.5, 0.999)
        )
        self.parts = {"generator": self.generator, "optimizer": self.optimizer}
        self._latents = context.randomness.on_device("latents")
        self._fresh: Batch | None = None

    def begin_round(self, index: int) -> Synthesis:
        """Train the generator, then draw the round's first mini-batch from it."""
        self.generator.train()
        terms: dict[str, Tensor] = {}
        for _ in range(self.settings.g_steps):
            latents = self.generator.sample_latents(
                self.settings.synthesis_batch_size, self._latents
            )
            terms = self.generator_losses(self.generator(latents))
            self.optimizer.zero_grad()
            backward_into(total(terms), self.generator)
            self.optimizer.step()
        images = self._sample()
        with torch.no_grad():
            self._fresh = Batch(images, self.teacher(images))
        return Synthesis(self._fresh, {name: term.detach() for name, term in terms.items()})

    def generator_losses(self, images: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the generator's loss for its images."""
        features = self.teacher.features(images)
        logits = self.teacher.classify(features)
        s = self.settings
        return {
            "oh": s.oh * losses.one_hot_loss(logits),
            "act": s.act * losses.activation_loss(features),
            "ie": s.ie * losses.information_entropy_loss(logits, s.entropy_base),
        }

    def next_batch(self) -> Batch:
        """Return fresh images; the first ones of a round are those of the dictionary."""
        batch, self._fresh = self._fresh, None
        return batch if batch is not None else Batch(self._sample())

    @torch.no_grad()
    def _sample(self) -> Tensor:
        self.generator.eval()  # also when a resumed run begins within a round
        latents = self.generator.sample_latents(self.context.batch_size, self._latents)
        images: Tensor = self.generator(latents)
        return images

    @torch.no_grad()
    def preview(self, count: int) -> Tensor:
        """Return images of latents that are the same in every picture."""
        self.generator.eval()
        latents = torch.randn(
            count, self.settings.latent_dim, generator=torch.Generator().manual_seed(0)
        )
        images: Tensor = self.generator(latents.to(self.context.device))
        return images
