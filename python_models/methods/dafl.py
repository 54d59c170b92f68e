# SPDX-License-Identifier: Apache-2.0
"""DAFL: Data-Free Learning of Student Networks (Chen et al., ICCV 2019).

A generator ``x = G(z)``, ``z ~ N(0, I)``, learns from the teacher alone (logits ``t``, penultimate
features ``f``), by Adam on

    oh * mean CE(t, argmax t) - act * mean |f| + ie * sum_c m_c log m_c,    m = mean_b softmax(t).

``--form joint`` is the authors' released code: every step makes one batch ``x``, adds to this the
student's KL_T(T || S) on the detached ``x``, and after one backward pass updates the generator (in
train mode throughout; Adam with its default betas) and the student. Its logarithm has base 10, its
generator (generator_dafl) makes normalised images. With KDCI the dictionary is that of each round's
first batch: of every step's, with ``--kd-steps 1``.

``--form alternating``, the default, is what later work and KDCI's paper benchmark: generator steps
(betas 0.5 and 0.999, natural logarithm), then student steps on fresh images of the generator in
eval mode, the first batch of which makes the dictionary. The presets hold each form's settings; the
paper's weights (act 0.001, ie 20) belong to the alternating form.
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
    Divergence,
    Method,
    Synthesis,
    build_image_generator,
    generate,
)
from python_models.methods.descent import Descent


@dataclass(kw_only=True)
class DAFLSettings:
    """Settings of DAFL."""

    form: Literal["alternating", "joint"] = "alternating"
    """Generator steps and student steps in turn, or both at once as in the authors' code."""
    g_steps: int = 1
    """Generator steps in a round (alternating)."""
    lr_g: float = 1e-3
    """Learning rate of the generator (Adam)."""
    generator: str = "generator_large"
    """Name of the generator (see: kdci list generators)."""
    latent_dim: int = 512
    """Length of the latent vectors."""
    synthesis_batch_size: int = 256
    """Images in a generator step (alternating; a joint step has --batch-size of them)."""
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
        self.is_joint = settings.form == "joint"
        self.generator = build_image_generator(settings.generator, settings.latent_dim, context)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(),
            lr=settings.lr_g,
            betas=(0.9, 0.999) if self.is_joint else (0.5, 0.999),
        )
        self.parts = {"generator": self.generator, "optimizer": self.optimizer}
        self.descent = Descent("generator", context.precision, context.watch, context.world)
        self._latents = context.randomness.on_device("latents")
        self._fresh: Batch | None = None
        self._terms: dict[str, Tensor] = {}

    def begin_round(self, index: int) -> Synthesis:
        """Train the generator (alternating), then draw the round's first mini-batch from it."""
        if self.is_joint:
            self._fresh = self._joint_batch()
            return Synthesis(self._fresh)
        self.generator.train()
        terms: dict[str, Tensor] = {}
        for _ in range(self.settings.g_steps):
            features = self.teacher.features(self._generate(self.settings.synthesis_batch_size))
            terms = self.generator_losses(features, self.teacher.classify(features))
            self.descent.backward(terms, [self.optimizer], self.generator)
            self.descent.step()
        images = self._sample()
        with torch.no_grad():
            self._fresh = Batch(images, self.teacher(images))
        return Synthesis(self._fresh, {name: term.detach() for name, term in terms.items()})

    def _generate(self, count: int) -> Tensor:
        """Return this process's share of a batch of images."""
        latents = self.generator.sample_latents(count, self._latents)
        return generate(self.generator, self.world.share(latents), self.teacher)

    def generator_losses(self, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the generator's loss.

        Args:
            features: The teacher's penultimate vectors of generated images, ``[b, d]``.
            logits: Its logits of them, ``[b, c]``.
        """
        s = self.settings
        return {
            "oh": s.oh * losses.one_hot_loss(logits),
            "act": s.act * losses.activation_loss(features),
            "ie": s.ie * losses.information_entropy_loss(logits, s.entropy_base, self.world),
        }

    def next_batch(self) -> Batch:
        """Return fresh images; the first ones of a round are those of the dictionary."""
        batch, self._fresh = self._fresh, None
        if batch is not None:
            return batch
        return self._joint_batch() if self.is_joint else Batch(self._sample())

    def _joint_batch(self) -> Batch:
        """Make the images of a joint step, and keep the generator's loss for it."""
        self.generator.train()
        images = self._generate(self.context.batch_size)
        features = self.teacher.features(images)
        logits = self.teacher.classify(features)
        self._terms = self.generator_losses(features, logits)
        return Batch(images.detach(), logits.detach())

    @torch.no_grad()
    def _sample(self) -> Tensor:
        self.generator.eval()  # also when a resumed run begins within a round
        return self._generate(self.context.batch_size)

    def student_losses(self, batch: Batch, divergence: Divergence) -> dict[str, Tensor]:
        """Return the student's loss, in the joint form together with the generator's."""
        terms, self._terms = self._terms, {}
        return {**super().student_losses(batch, divergence), **terms}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the generator's optimiser in the joint form."""
        return [self.optimizer] if self.is_joint else []

    @torch.no_grad()
    def preview(self, count: int) -> Tensor:
        """Return images of latents that are the same in every picture."""
        self.generator.eval()
        latents = self.generator.sample_latents(count, torch.Generator().manual_seed(0))
        return generate(self.generator, latents, self.teacher)
