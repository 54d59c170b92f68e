# SPDX-License-Identifier: Apache-2.0
"""MosaicKD: Mosaicking to Distill (Fang et al., NeurIPS 2021).

Out-of-domain images lend their local structure: a generator ``x = G(z)``, ``z ~ N(0, I)``, whose
patches a discriminator ``D`` cannot tell from those of unlabelled images ``u``, and whose images as
a whole the teacher is certain of. A round (an iteration of the released code) makes ``x`` once and
takes, with ``l = log(1 + exp(-.))`` summed over the patches,

1. a step of D on         local / 2 * (mean_b l(-D(x)) + mean_b l(D(u))),
2. a step of G on         local * mean_b l(D(x)) + align * mean_b H(p_b)
                          + balance * sum_c m_c log2 m_c - adv * KL_1(T || S),
                          p_b = softmax(t_b), m = mean_b p_b,
3. ``--kd-steps`` student steps on KL_T(T || S) of batches that are half fresh images of G, half
   randomly cropped and mirrored unlabelled ones.

D sees images normalised as the teacher's, without augmentation. Generator, discriminator and
student are in train mode throughout, the student in the generator's step too. All three learning
rates follow a cosine over the whole run that changes with each round. An epoch (``--ep-steps 0``)
is one pass of D over the unlabelled images, half a ``--batch-size`` in each round.

Of the unlabelled images all are used, or with ``--select`` those that the teacher is most uncertain
of: by its entropy (the released code, 50,000 of ImageNet or Places) or by its confidence (the
paper, 600,000). Unlike the released code, which normalises the unlabelled images of a student step
by statistics of their own, they are normalised as all others. In the paper's notation the student's
loss holds the generator's game too; in the code, and here, that never reaches the student.

The paper on KDCI counts MosaicKD among the sampling methods: one dictionary is built from all
selected images, and compensates the generated half of each batch as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from python_models import losses
from python_models.data import RandomCropFlip, to_float
from python_models.errors import UserError
from python_models.methods.base import (
    METHODS,
    Batch,
    Context,
    Synthesis,
    build_image_generator,
    generate,
    on_device,
)
from python_models.methods.descent import Descent
from python_models.methods.sampling import RandomOrder, SelectingMethod
from python_models.networks import build_discriminator
from python_models.schedule import learning_rate, set_learning_rate


@dataclass(kw_only=True)
class MosaicKDSettings:
    """Settings of MosaicKD."""

    select: int | None = None
    """Unlabelled images to keep, those that the teacher is least certain of; by default all."""
    select_by: Literal["entropy", "confidence"] = "entropy"
    """Its uncertainty: the highest entropy (released code) or the lowest confidence (paper)."""
    lr_g: float = 1e-3
    """Learning rate of the generator (Adam, betas 0.5 and 0.999) at the start of its cosine."""
    lr_d: float = 1e-3
    """The same of the discriminator."""
    generator: str = "generator_large"
    """Name of the generator (see: kdci list generators)."""
    latent_dim: int = 100
    """Length of the latent vectors."""
    discriminator: str = "discriminator_patch"
    """Name of the discriminator (see: kdci list discriminators)."""
    adv: float = 1.0
    """Weight of the adversarial term."""
    align: float = 1.0
    """Weight of the mean entropy of the teacher's predictions."""
    local: float = 1.0
    """Weight of the patch discriminator."""
    balance: float = 10.0
    """Weight of the entropy of the teacher's mean prediction."""
    crop: int = 4
    """Padding of the random crop of the student's unlabelled images; 0: none."""
    flip: bool = True
    """Random horizontal flips of them."""


@METHODS.register("mosaickd")
class MosaicKD(SelectingMethod[MosaicKDSettings]):
    """A generator of images whose patches are those of unlabelled images."""

    summary = "generator with the local patches of unlabelled images; the student learns from both"
    Settings = MosaicKDSettings
    defaults: ClassVar = {
        "ep_steps": 0,
        "kd_steps": 5,
        "batch_size": 512,
        "temperature": 1.0,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "schedule_by": "round",
    }
    num_prototypes = 128

    def __init__(self, settings: MosaicKDSettings, context: Context) -> None:
        super().__init__(settings, context, settings.select)
        if context.batch_size < 2:
            raise UserError(
                f"batch_size={context.batch_size} must be >= 2: one half is generated, the other "
                "sampled"
            )
        self.generator = build_image_generator(settings.generator, settings.latent_dim, context)
        with context.randomness.initialising("discriminator"):
            discriminator = build_discriminator(settings.discriminator, context.image_shape[0])
        self.discriminator = self.world.synchronised(on_device(discriminator, context.device))
        self.optimizer_g = torch.optim.Adam(
            self.generator.parameters(), lr=settings.lr_g, betas=(0.5, 0.999)
        )
        self.optimizer_d = torch.optim.Adam(
            self.discriminator.parameters(), lr=settings.lr_d, betas=(0.5, 0.999)
        )
        self.descent_g = Descent("generator", context.precision, context.watch, context.world)
        self.descent_d = Descent("discriminator", context.precision, context.watch, context.world)
        self.augment = RandomCropFlip(settings.crop, settings.flip)
        self._latents = context.randomness.on_device("latents")
        self._augment_stream = context.randomness.on_device("augment")
        randomness, device = context.randomness, context.device
        self._real_order = RandomOrder(randomness.on_cpu("order of patches"), device)
        self._order = RandomOrder(randomness.on_cpu("order"), device)
        self._num_sampled = context.batch_size // 2
        self._num_generated = context.batch_size - self._num_sampled
        self.world.require_even("half of batch_size", self._num_sampled)
        self.parts = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "optimizer_g": self.optimizer_g,
            "optimizer_d": self.optimizer_d,
            "real_order": self._real_order,
            "order": self._order,
        }

    def prepare(self) -> Tensor:
        """Select the unlabelled images; their logits are the features of the dictionary."""
        by_entropy = self.settings.select_by == "entropy"
        found = self.select("highest entropy" if by_entropy else "lowest confidence")
        for order in (self._real_order, self._order):
            order.reset(len(self.images))
        return found.logits.to(self.context.device)

    def steps_per_pass(self) -> int:
        """Return the student steps in the rounds that show each unlabelled image once to D."""
        return max(1, self.num_wanted // self._num_sampled) * self.context.kd_steps

    def begin_round(self, index: int) -> Synthesis:
        """Make one step of the discriminator and one of the generator, on the same images."""
        s, done = self.settings, self.context.progress()
        set_learning_rate(self.optimizer_g, learning_rate("cosine", s.lr_g, done))
        set_learning_rate(self.optimizer_d, learning_rate("cosine", s.lr_d, done))
        self.student.train()
        self.discriminator.train()
        images = self._generate()
        real = self._sample(self._real_order)
        discriminator_loss = self.discriminator_loss(images.detach(), real)
        terms_d = {"discriminator": discriminator_loss}
        self.descent_d.backward(terms_d, [self.optimizer_d], self.discriminator)
        self.descent_d.step()
        terms = self.generator_losses(images)
        self.descent_g.backward(terms, [self.optimizer_g], self.generator)
        self.descent_g.step()
        terms |= terms_d
        found = {name: term.detach() for name, term in terms.items()}
        return Synthesis(None, found, images.detach())

    def discriminator_loss(self, generated: Tensor, real: Tensor) -> Tensor:
        """Return the discriminator's loss for images in [0, 1]."""
        fake, true = self._patches(generated), self._patches(real)
        loss = losses.patch_loss(fake, real=False) + losses.patch_loss(true, real=True)
        return 0.5 * self.settings.local * loss

    def _patches(self, images: Tensor) -> Tensor:
        """Return the discriminator's logits for images in [0, 1]."""
        normalised = self.teacher.normalise(images)
        return self.context.precision.run(self.discriminator, normalised)

    def generator_losses(self, images: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the generator's loss for its images."""
        s = self.settings
        patches = self._patches(images)
        logits = self.teacher(images)
        return {
            "local": s.local * losses.patch_loss(patches, real=True),
            "align": s.align * losses.mean_entropy(logits),
            "balance": s.balance * losses.information_entropy_loss(logits, "2", self.world),
            "adv": s.adv * losses.adversarial_loss(self.student(images), logits),
        }

    def _generate(self) -> Tensor:
        self.generator.train()  # also when a resumed run begins within a round
        latents = self.generator.sample_latents(self._num_generated, self._latents)
        return generate(self.generator, self.world.share(latents), self.teacher)

    def _sample(self, order: RandomOrder) -> Tensor:
        rows = order.take(self._num_sampled)
        return to_float(self.images[self.world.share(rows)])

    @torch.no_grad()
    def next_batch(self) -> Batch:
        """Return fresh images of the generator, then as many augmented unlabelled ones."""
        part = self.world.part(self._num_sampled)
        sampled = self.augment(self._sample(self._order), self._augment_stream, part)
        return Batch(torch.cat([self._generate(), sampled]))

    @torch.no_grad()
    def preview(self, count: int) -> Tensor:
        """Return images of latents that are the same in every picture."""
        self.generator.eval()
        latents = self.generator.sample_latents(count, torch.Generator().manual_seed(0))
        return generate(self.generator, latents, self.teacher)
