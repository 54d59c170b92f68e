# SPDX-License-Identifier: Apache-2.0
"""DFND: Learning Student Networks in the Wild (Chen et al., CVPR 2021).

From unlabelled images, the ``select`` ones are kept that the teacher is most certain of (largest
``max softmax(t)``, that is, smallest ``CE(t, argmax t)``), in one pass over any number of images in
memory that does not grow with them. The student learns from the kept ones on

    kd_weight * KL_T(T || S) + noise_weight * mean -log (softmax(s) Q)[argmax t],

where the noise adaptation matrix Q ``[c, c]`` has ``diagonal`` on its diagonal and
``(1 - diagonal) softmax(theta_i)`` in the rest of row i; theta starts at 0 and is trained by Adam.

Paper and released code differ. The defaults are the code's form, ``KL_4(T || S) + NLL`` with
weights 1 and 1, where KL_T holds the factor T^2. ``--kd-weight 4 --temperature 1`` is the paper's,
``H_CE(Q(N_S), y) + lambda KL(T || S)`` with lambda = 4 and no temperature. The code normalises
images by ImageNet's statistics; here they are the teacher's.

The released code fixes Q's diagonal to the teacher's accuracy on the test images, which needs
original data. Here the default is the teacher's mean confidence on all unlabelled images, which
needs none (on the selected ones it is near 1 by their selection, and Q would be the identity); give
``--diagonal`` where the accuracy is known. With KDCI the divergence is that of the compensated
student, while the noise adaptation term keeps the student's own logits, which are what is deployed.

The kept images are held as bytes where the student is trained: 600,000 of 3x32x32 take 1.8 GB, of
3x224x224 they would take 84 GiB. What does not fit is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from python_models import losses
from python_models.data import RandomCropFlip, to_float
from python_models.errors import UserError
from python_models.methods.base import METHODS, Batch, Context, Divergence
from python_models.methods.sampling import RandomOrder, SelectingMethod


@dataclass(kw_only=True)
class DFNDSettings:
    """Settings of DFND."""

    select: int = 600000
    """Images to keep, those that the teacher is most certain of; all, if there are fewer."""
    kd_weight: float = 1.0
    """Weight of the distillation term; the paper's form of the loss is 4 with --temperature 1."""
    noise_weight: float = 1.0
    """Weight of the noise adaptation term."""
    diagonal: float | None = None
    """Diagonal of the noise adaptation matrix: how often the teacher is right. The released code
    takes the teacher's test accuracy; the default, its mean confidence on all unlabelled images,
    needs no original data."""
    lr_noise: float = 1e-3
    """Learning rate of the noise adaptation matrix (Adam)."""
    crop: int = 4
    """Padding of the random crop; 0: none."""
    flip: bool = True
    """Random horizontal flips."""


@METHODS.register("dfnd")
class DFND(SelectingMethod[DFNDSettings]):
    """Confident unlabelled images with noise adaptation."""

    summary = "the unlabelled images that the teacher is most certain of, with noise adaptation"
    Settings = DFNDSettings
    defaults: ClassVar = {
        "ep_steps": 0,
        "kd_steps": 1,
        "epochs": 33,
        "temperature": 4.0,
        "weight_decay": 5e-4,
        "schedule": "step",
    }
    num_prototypes = 128

    def __init__(self, settings: DFNDSettings, context: Context) -> None:
        super().__init__(settings, context, settings.select)
        if settings.diagonal is not None and not 0 < settings.diagonal < 1:
            raise UserError(f"diagonal={settings.diagonal} must lie between 0 and 1")
        self.diagonal = settings.diagonal or 0.0
        classes = context.num_classes
        self.theta = nn.Parameter(torch.zeros(classes, classes - 1, device=context.device))
        self.optimizer = torch.optim.Adam([self.theta], lr=settings.lr_noise)
        self.augment = RandomCropFlip(settings.crop, settings.flip)
        self.order = RandomOrder(context.randomness.on_cpu("order"), context.device)
        self.parts = {"optimizer": self.optimizer, "order": self.order}
        self._augment_stream = context.randomness.on_device("augment")

    def prepare(self) -> Tensor:
        """Select the images; their logits are the features of the dictionary."""
        found = self.select("highest confidence")
        if self.settings.diagonal is None:
            # Even a teacher that is always certain leaves room for noise.
            self.diagonal = min(max(found.confidence, 1e-3), 1 - 1e-3)
        self.order.reset(len(self.images))
        return found.logits.to(self.context.device)

    def steps_per_pass(self) -> int:
        """Return the student steps in one pass over the selected images.

        Images that turn out to be unreadable count: how many they are is not known before.
        """
        return max(1, self.num_wanted // self.context.batch_size)

    def next_batch(self) -> Batch:
        """Return the next augmented images of a random order without repetition."""
        part = self.world.part(self.context.batch_size)
        rows = self.order.take(self.context.batch_size)[part.rows]
        return Batch(self.augment(to_float(self.images[rows]), self._augment_stream, part))

    def student_losses(self, batch: Batch, divergence: Divergence) -> dict[str, Tensor]:
        """Return the distillation and the noise adaptation term."""
        assert batch.teacher_logits is not None
        student_logits = self.student(batch.images)
        log_transition = losses.log_noise_transition(self.theta, self.diagonal)
        noise = losses.noise_adaptation_loss(
            student_logits, batch.teacher_logits.argmax(1), log_transition
        )
        return {
            "kd": self.settings.kd_weight * divergence(student_logits, batch.teacher_logits),
            "noise": self.settings.noise_weight * noise,
        }

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser of the noise adaptation matrix."""
        return [self.optimizer]

    def preview(self, count: int) -> Tensor:
        """Return the selected images that the teacher is most certain of."""
        return to_float(self.images[:count])

    def state_dict(self) -> dict[str, Any]:
        """Return the state; of the images only which they are."""
        return {
            **super().state_dict(),
            "theta": self.theta.detach().clone(),
            "diagonal": self.diagonal,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, reading the selected images from where they came."""
        super().load_state_dict(state)
        with torch.no_grad():
            self.theta.copy_(state["theta"])
        self.diagonal = state["diagonal"]
