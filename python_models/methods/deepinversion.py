# SPDX-License-Identifier: Apache-2.0
"""DeepInversion: Dreaming to Distill (Yin et al., CVPR 2020), and its Adaptive form.

A round optimises one batch of *normalised* images ``x``, from N(0, 1), by Adam; the teacher (logits
``t``) and the student being trained (``s``) are in eval mode. At every step the batch is rolled by
one random offset of up to ``jitter`` pixels in each direction, perhaps mirrored as a whole, and

    oh * mean CE(t, y) + bn * sum_layers r
        + tv_l2 * TV_2(x) + tv_l1 * TV_1(x) + l2 * ||x|| + adi * c

falls: ``y`` are the classes asked for, ``r`` the distance of the batch's statistics from those of
the teacher's BatchNorm layers (the first one ``first_bn`` times), ``TV`` the differences to four
neighbours (norms over the batch, or mean magnitudes), ``||x||`` one norm of the batch or the mean
norm of its images, and ``c`` the competition with the student: with ``J`` a Jensen-Shannon
divergence of softmax(s / 3) and softmax(t / 3) (see `losses.competition_loss`),
``c = 1 - clamp(J, 0, 1)`` or ``-J``. The images go to a pool, clamped to valid pixels, and the
student learns from random batches of the pool.

The published forms are settings of this one method, each of them a preset:

- the released CIFAR-10 script (``deepinversion-official`` by its README,
  ``deepinversion-official-defaults`` without arguments): roll, TV_2, constant rate, no clipping. It
  means to keep the images of the lowest loss but keeps a reference to the ones that go on changing,
  so in effect the last: ``--keep last``;
- the released ImageNet script (``deepinversion-imagenet``): jitter and mirror, first layer ten
  times, ``g_steps_half`` steps on images averaged to half their size, then ``g_steps`` on whole
  ones, each with a linear warm-up and a half cosine of the rate, clipped to valid pixels after
  every step, best images kept (of the last stage: losses at two sizes do not compare);
- the benchmark of later work (``deepinversion-benchmark``, the defaults): ``-J``, TV_1, clipping.

Neither script has a distillation stage. With KDCI, the dictionary comes from the new images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from python_models import losses
from python_models.data import RandomRollFlip
from python_models.errors import UserError
from python_models.methods.base import METHODS, Batch, Context, Synthesis
from python_models.methods.descent import Descent
from python_models.methods.pooled import Best, PooledMethod, PoolSettings
from python_models.schedule import learning_rate, set_learning_rate


@dataclass(kw_only=True)
class DeepInversionSettings(PoolSettings):
    """Settings of DeepInversion."""

    g_steps: int = 1000
    """Steps on the images of a round."""
    g_steps_half: int = 0
    """Steps before these on images averaged to half their size; 0: none."""
    lr_image: float = 0.1
    """Learning rate of the images (Adam), in units of the teacher's normalised input: for a teacher
    of unnormalised images, a quarter of that for the usual statistics moves pixels alike."""
    betas: tuple[float, float] = (0.5, 0.99)
    """Adam's betas for the images."""
    image_schedule: Literal["constant", "cosine"] = "constant"
    """Rate over the steps: constant, or a half cosine to zero after a linear warm-up."""
    image_warmup: int = 100
    """Steps of that warm-up."""
    synthesis_batch_size: int = 256
    """Images made in a round."""
    targets: Literal["cycled", "random"] = "random"
    """Classes asked for: one after the other, or drawn at random."""
    jitter: int = 4
    """Largest offset of the batch in a step, in pixels."""
    mirror: bool = True
    """Mirror the batch in half of the steps."""
    clip: bool = True
    """Clip to valid pixels after each step."""
    keep: Literal["best", "last"] = "best"
    """Which images a round yields: those of the lowest loss or those after the last step."""
    oh: float = 1.0
    """Weight of the cross-entropy with the classes asked for."""
    bn: float = 10.0
    """Weight of the BatchNorm statistics."""
    first_bn: float = 1.0
    """Factor on the first BatchNorm layer's term."""
    tv_l2: float = 0.0
    """Weight of the total variation, as norms over the batch."""
    tv_l1: float = 1e-3
    """Weight of the total variation, as mean magnitudes."""
    l2: float = 0.0
    """Weight of the images' norm."""
    l2_over: Literal["batch", "image"] = "batch"
    """One norm of the batch, or the mean of its images' norms."""
    adi: float = 1.0
    """Weight of the competition with the student (Adaptive DeepInversion)."""
    adi_form: Literal["clamped", "plain"] = "plain"
    """1 - clamp(J, 0, 1), or -J."""


@METHODS.register("deepinversion")
class DeepInversion(PooledMethod[DeepInversionSettings]):
    """Images optimised pixel by pixel, without a generator, that fill a pool."""

    summary = "images optimised against BatchNorm statistics and smoothness, image pool"
    Settings = DeepInversionSettings
    defaults: ClassVar = {"kd_steps": 400, "temperature": 20.0, "lr": 0.1, "weight_decay": 1e-4}
    num_prototypes = 32
    needs_batch_norm = True

    def __init__(self, settings: DeepInversionSettings, context: Context) -> None:
        super().__init__(settings, context)
        for name in ("g_steps_half", "image_warmup", "jitter"):
            if (value := getattr(settings, name)) < 0:
                raise UserError(f"{name}={value} must be >= 0")
        if len(settings.betas) != 2 or not all(0 <= beta < 1 for beta in settings.betas):
            raise UserError(f"betas={list(settings.betas)} must be two numbers in [0, 1)")
        self.statistics = losses.BatchNormStatistics(self.teacher, world=self.world)
        if settings.g_steps_half:
            self._require_half_size()
        self.descent = Descent("images", context.precision, context.watch)
        randomness = context.randomness
        self._synthesis_stream = randomness.on_device("synthesis")
        # Offsets are read on the host: from the CPU, reading them does not wait for the device.
        self._jitter_stream = randomness.on_cpu("jitter")
        channels = context.image_shape[0]
        black = torch.zeros(1, channels, 1, 1, device=context.device)
        self._valid = (self.teacher.normalise(black), self.teacher.normalise(black + 1))

    def _require_half_size(self) -> None:
        """Refuse images of half the size for networks that take one size only."""
        channels, height, width = self.context.image_shape
        small = torch.zeros(1, channels, height // 2, width // 2, device=self.context.device)
        seen_by = (self.teacher, self.student) if self.settings.adi else (self.teacher,)
        try:
            with torch.no_grad():
                for network in seen_by:
                    network.eval()(small)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"g_steps_half={self.settings.g_steps_half} needs networks that take images of "
                f"half the size, {height // 2}x{width // 2}: set it to 0 ({error})"
            ) from error

    def begin_round(self, index: int) -> Synthesis:
        """Make one batch of images and put it in the pool."""
        s, device = self.settings, self.context.device
        self.student.eval()
        inputs = torch.randn(
            (s.synthesis_batch_size, *self.context.image_shape),
            generator=self._synthesis_stream,
            device=device,
        )
        targets = self.world.share(self._draw_targets(index))
        inputs = self.world.share(inputs).clone()
        if s.g_steps_half:
            inputs, _, _ = self._optimise(inputs, targets, s.g_steps_half, shrink=2)
        last, best, terms = self._optimise(inputs, targets, s.g_steps, shrink=1)
        images = self._to_images(last if s.keep == "last" else best).clamp(0, 1)
        self.pool.add(self.world.gather(images))
        return Synthesis(Batch(images), {name: term.detach() for name, term in terms.items()})

    def _draw_targets(self, index: int) -> Tensor:
        count, classes = self.settings.synthesis_batch_size, self.context.num_classes
        device = self.context.device
        if self.settings.targets == "cycled":
            # On from the last round, so that small batches reach every class.
            return (index * count + torch.arange(count, device=device)) % classes
        return torch.randint(classes, (count,), generator=self._synthesis_stream, device=device)

    def _optimise(
        self, start: Tensor, targets: Tensor, steps: int, *, shrink: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Optimise normalised images, seen `shrink` times smaller.

        Returns:
            The images after the last step, those of the lowest loss, and the last loss's terms.
        """
        s = self.settings
        inputs = start.requires_grad_()
        optimizer = torch.optim.Adam([inputs], lr=s.lr_image, betas=s.betas)
        roll = RandomRollFlip(s.jitter // shrink, s.mirror)
        best = Best(self.world)
        terms: dict[str, Tensor] = {}
        for step in range(steps):
            set_learning_rate(optimizer, self._rate(step, steps))
            seen = F.avg_pool2d(inputs, shrink) if shrink > 1 else inputs
            terms = self.image_losses(roll(seen, self._jitter_stream), targets)
            loss = self.descent.backward(terms, [optimizer], inputs)
            if self.world.size > 1:
                # The images are this process's alone: the mean of losses has this gradient in them.
                assert inputs.grad is not None
                inputs.grad /= self.world.size
            best.offer(loss, inputs)
            self.descent.step()
            if s.clip:
                with torch.no_grad():
                    inputs.copy_(inputs.clamp(*self._valid))
        return inputs.detach(), best.tensors[0], terms

    def _rate(self, step: int, steps: int) -> float:
        s = self.settings
        if s.image_schedule == "constant":
            return s.lr_image
        if step < s.image_warmup:
            return s.lr_image * (step + 1) / s.image_warmup
        return learning_rate(
            "cosine", s.lr_image, (step - s.image_warmup) / (steps - s.image_warmup)
        )

    def image_losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the images' loss; those of weight 0 are left out.

        Args:
            inputs: Normalised images, ``[b, c, h, w]``.
            targets: Classes asked for, int64 ``[b]``.
        """
        s = self.settings
        images = self._to_images(inputs)
        with self.statistics:
            logits = self.teacher(images)
        terms = {
            "oh": s.oh * losses.one_hot_loss(logits, targets),
            "bn": s.bn * self.statistics.loss(s.first_bn),
        }
        if s.tv_l2:
            terms["tv_l2"] = s.tv_l2 * losses.total_variation_l2(inputs, self.world)
        if s.tv_l1:
            terms["tv_l1"] = s.tv_l1 * losses.total_variation_l1(inputs)
        if s.l2:
            terms["l2"] = s.l2 * losses.image_norm(inputs, s.l2_over, self.world)
        if s.adi:
            terms["adi"] = s.adi * losses.competition_loss(
                self.student(images),
                logits,
                clamped=s.adi_form == "clamped",
                world=self.world,
            )
        return terms

    def _to_images(self, inputs: Tensor) -> Tensor:
        """Return the images that the teacher's normalisation makes these inputs of."""
        return torch.addcmul(self.teacher.mean, inputs, self.teacher.std)
