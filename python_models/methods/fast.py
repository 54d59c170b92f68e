# SPDX-License-Identifier: Apache-2.0
"""Fast: Up to 100x Faster Data-free Knowledge Distillation (Fang et al., AAAI 2022).

A round takes a copy of a meta-generator and a batch of latents ``z`` and improves both for a few
steps of Adam, with uniformly drawn classes ``y`` and randomly cropped and mirrored images, on

    bn * sum_layers r' + oh * mean CE(t, y) - adv * mean_b [argmax s = argmax t] KL_1(T || S)_b.

r' is the distance of batch statistics from the teacher's BatchNorm statistics, averaged over rounds
with ``bn_momentum``; the adversarial term waits for the end of warm-up (the released code, whose
round counter runs ahead, starts it and resets the first layers one round earlier). The images of
the lowest loss go to a pool on the device, and the student learns from random batches of the pool.
The meta-generator then takes one Adam step of rate ``lr_g * g_steps`` along the sum of the inner
gradients (first-order MAML) or towards the copy (Reptile: gradient 67 (meta - copy)).

The released code for ImageNet shares one batch of latents among 50 rounds and learns it as it
learns the generator: ``--meta reptile --redraw-z-every 50``, with ``--lr-g-meta`` and
``--lr-z-meta``, in the preset ``fast-official-imagenet``. (Its first-order MAML adds the latents
themselves in place of their gradient; here it is the gradient.) There generated and pooled images
are cropped at random and resized, and a folder of images made before is part of the pool:
``--synthesis-crop-scale``, ``--crop-scale`` and ``--initial-pool``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from python_models import losses
from python_models.methods.base import (
    METHODS,
    Batch,
    Context,
    Synthesis,
    build_image_generator,
    generate,
)
from python_models.methods.descent import Descent
from python_models.methods.pooled import Best, PooledMethod, PoolSettings

REPTILE_GAIN = 67.0
"""Factor of the Reptile gradient in the released code."""


@dataclass(kw_only=True)
class FastSettings(PoolSettings):
    """Settings of Fast."""

    g_steps: int = 10
    """Inner steps of a round."""
    lr_g: float = 2e-3
    """Learning rate of the generator in them."""
    lr_z: float = 0.01
    """Learning rate of the latents."""
    meta: Literal["fomaml", "reptile", "none"] = "fomaml"
    """How the generator learns across rounds; none: it is simply trained on."""
    lr_g_meta: float | None = None
    """Learning rate of the meta-generator; by default --lr-g times --g-steps."""
    redraw_z_every: int = 1
    """Rounds that share one batch of latents, which is then learned across them as the generator
    is; 1: each round draws its own."""
    lr_z_meta: float = 5e-3
    """Learning rate of shared latents across rounds."""
    generator: str = "generator_small"
    """Name of the generator (see: kdci list generators)."""
    latent_dim: int = 256
    """Length of the latent vectors."""
    synthesis_batch_size: int = 256
    """Images made in a round."""
    bn: float = 10.0
    """Weight of the BatchNorm statistics."""
    oh: float = 0.4
    """Weight of the one-hot term."""
    adv: float = 1.1
    """Weight of the adversarial term."""
    bn_momentum: float = 0.9
    """Momentum of the batch statistics over rounds."""
    warmup: int = 20
    """Rounds before the first student step, and before the adversarial term."""
    reset_l0: bool = True
    """Draw the generator's first linear and BatchNorm layer anew after --reset-after rounds."""
    reset_after: int = 120
    """Rounds after warm-up at which that happens."""
    crop: int = 4
    """Padding of the random crop of generated and pooled images; 0: none."""
    flip: bool = True
    """Random horizontal flips of them."""
    crop_scale: float = 1.0
    """Below 1, a random resized crop takes the place of --crop: the least share of an image's area
    that it keeps."""
    synthesis_crop_scale: float | None = None
    """The same for generated images, in their loss; by default that of pooled ones."""


@METHODS.register("fast")
class Fast(PooledMethod[FastSettings]):
    """Meta-generator that fills a pool; the student learns from the pool."""

    summary = "meta-learned generator, few steps a round, BatchNorm statistics, image pool"
    Settings = FastSettings
    defaults: ClassVar = {"kd_steps": 400, "temperature": 20.0, "lr": 0.2, "lr_min": 2e-4}
    num_prototypes = 8
    needs_batch_norm = True

    def __init__(self, settings: FastSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.synthesis_augment = self.augment
        if settings.synthesis_crop_scale is not None:
            self.synthesis_augment = self._augmentation("synthesis_crop_scale")
        self.generator = build_image_generator(settings.generator, settings.latent_dim, context)
        lr_g_meta = settings.lr_g_meta or settings.lr_g * settings.g_steps
        groups: list[dict[str, Any]] = [{"params": self.generator.parameters(), "lr": lr_g_meta}]
        self.latents: nn.Parameter | None = None
        if settings.redraw_z_every > 1:
            # Zeros until the first round draws them.
            zeros = torch.zeros_like(self._draw_latents(torch.Generator(context.device)))
            self.latents = nn.Parameter(zeros)
            groups.append({"params": [self.latents], "lr": settings.lr_z_meta})
        self.optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999))
        self.statistics = losses.BatchNormStatistics(self.teacher, settings.bn_momentum, self.world)
        self.parts |= {
            "generator": self.generator,
            "optimizer": self.optimizer,
            "statistics": self.statistics,
        }
        self.descent = Descent("generator", context.precision, context.watch, context.world)
        self._synthesis_stream = context.randomness.on_device("synthesis")

    @property
    def warmup_rounds(self) -> int:
        """Rounds of synthesis before the first student step."""
        return self.settings.warmup

    def begin_round(self, index: int) -> Synthesis:
        """Make one batch of images, put it in the pool and update the meta-generator."""
        s, stream = self.settings, self._synthesis_stream
        if s.reset_l0 and index == s.warmup + s.reset_after:
            self._reset_first_layers()
        inner = self.generator if s.meta == "none" else copy.deepcopy(self.generator)
        inner.train()
        self.student.eval()
        latents = self._start_latents(index)
        targets = torch.randint(
            self.context.num_classes,
            (s.synthesis_batch_size,),
            generator=stream,
            device=self.context.device,
        )
        # All processes hold all latents, and each makes the images of its part of them.
        part = self.world.part(s.synthesis_batch_size)
        optimizer = torch.optim.Adam(
            [
                {"params": inner.parameters(), "lr": s.lr_g},
                {"params": [latents], "lr": s.lr_z},
            ],
            betas=(0.5, 0.999),
        )
        self.optimizer.zero_grad()
        best = Best(self.world)
        terms: dict[str, Tensor] = {}
        for _ in range(s.g_steps):
            images = generate(inner, latents[part.rows], self.teacher)
            terms = self.generator_losses(
                self.synthesis_augment(images, stream, part),
                targets[part.rows],
                adversarial=index >= s.warmup,
            )
            loss = self.descent.backward(terms, [optimizer], inner, latents)
            best.offer(loss, images)
            if s.meta == "fomaml":
                learned = self._learned(inner, latents)
                _add_gradients(self._learned(), self.descent.gradients(learned))
            self.descent.step()
        self.statistics.update_average()
        if s.meta == "reptile":
            _set_reptile_gradients(self._learned(), self._learned(inner, latents))
        if s.meta != "none":
            self.optimizer.step()
        (best_images,) = best.tensors
        self.pool.add(self.world.gather(best_images))
        return Synthesis(Batch(best_images), {name: term.detach() for name, term in terms.items()})

    def _draw_latents(self, stream: torch.Generator) -> Tensor:
        return self.generator.sample_latents(self.settings.synthesis_batch_size, stream)

    def _start_latents(self, index: int) -> Tensor:
        """Return the latents that a round begins with and improves."""
        if self.latents is None:
            return self._draw_latents(self._synthesis_stream).requires_grad_()
        if index % self.settings.redraw_z_every == 0:
            with torch.no_grad():
                self.latents.copy_(self._draw_latents(self._synthesis_stream))
            # Moments of the old latents mean nothing for new ones.
            self.optimizer.state.pop(self.latents, None)
        if self.settings.meta == "none":
            return self.latents
        return self.latents.detach().clone().requires_grad_()

    def _learned(
        self, generator: nn.Module | None = None, latents: Tensor | None = None
    ) -> list[Tensor]:
        """Return what is learned across rounds: the method's own, or a round's copy of it."""
        parameters = list[Tensor]((generator or self.generator).parameters())
        if self.latents is not None:
            parameters.append(self.latents if latents is None else latents)
        return parameters

    def generator_losses(
        self, images: Tensor, targets: Tensor, *, adversarial: bool
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the generator's loss for (augmented) images."""
        with self.statistics:
            logits = self.teacher(images)
        s = self.settings
        terms = {
            "bn": s.bn * self.statistics.loss(),
            "oh": s.oh * losses.one_hot_loss(logits, targets),
        }
        if adversarial and s.adv:
            student_logits = self.student(images)
            terms["adv"] = s.adv * losses.masked_adversarial_loss(student_logits, logits)
        return terms

    def _reset_first_layers(self) -> None:
        """Draw the first layer and the first BatchNorm layer from the initial distribution."""
        modules = list(self.generator.modules())
        # Latents that are maps begin with a convolution.
        first = next(m for m in modules if isinstance(m, (nn.Linear, nn.Conv2d)))
        norm = next(m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm))
        with self.context.randomness.initialising("reset"):
            for layer in (first, norm):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parts and the shared latents."""
        latents = None if self.latents is None else self.latents.detach().clone()
        return {**super().state_dict(), "latents": latents}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        if self.latents is not None:
            with torch.no_grad():
                self.latents.copy_(state["latents"])


def _add_gradients(to: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for target, gradient in zip(to, gradients, strict=True):
        target.grad = gradient.clone() if target.grad is None else target.grad + gradient


def _set_reptile_gradients(meta: Sequence[Tensor], inner: Sequence[Tensor]) -> None:
    for target, parameter in zip(meta, inner, strict=True):
        target.grad = REPTILE_GAIN * (target.detach() - parameter.detach())
