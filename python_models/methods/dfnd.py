# SPDX-License-Identifier: Apache-2.0
"""DFND: Learning Student Networks in the Wild (Chen et al., CVPR 2021).

From unlabelled images, the ``select`` ones are kept that the teacher is most certain of (largest
``max softmax(t)``, that is, smallest ``CE(t, argmax t)``). The student learns from them on

    kd_weight * KL_T(T || S) + noise_weight * mean -log (softmax(s) Q)[argmax t],

where the noise adaptation matrix Q ``[c, c]`` has ``diagonal`` on its diagonal and
``(1 - diagonal) softmax(theta_i)`` in the rest of row i; theta starts at 0 and is trained by Adam.
With the defaults this is the released code's form (weights 1 and 1, T = 4); ``--kd-weight 4
--temperature 1`` is the paper's.

The released code fixes Q's diagonal to the teacher's test accuracy, which needs original data. Here
the default is the teacher's mean confidence on all unlabelled images, which needs none (on the
selected ones it is near 1 by their selection, and Q would be the identity); give ``--diagonal``
where the accuracy is known. With KDCI the divergence is that of the compensated student, while the
noise adaptation term keeps the student's own logits, which are what is deployed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_models import losses
from python_models.data import RandomCropFlip, to_float
from python_models.errors import UserError
from python_models.methods.base import METHODS, Batch, Context, Divergence, Method
from python_models.networks import Classifier

SELECTION_BATCH = 1024
"""Images in one forward pass of the selection."""


@dataclass(kw_only=True)
class DFNDSettings:
    """Settings of DFND."""

    select: int = 600000
    """Images to keep, those that the teacher is most certain of; all, if there are fewer."""
    kd_weight: float = 1.0
    """Weight of the distillation term."""
    noise_weight: float = 1.0
    """Weight of the noise adaptation term."""
    diagonal: float | None = None
    """Diagonal of the noise adaptation matrix: how often the teacher is right. By default the
    teacher's mean confidence on all unlabelled images."""
    lr_noise: float = 1e-3
    """Learning rate of the noise adaptation matrix (Adam)."""
    crop: int = 4
    """Padding of the random crop; 0: none."""
    flip: bool = True
    """Random horizontal flips."""


@METHODS.register("dfnd")
class DFND(Method[DFNDSettings]):
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
    needs_unlabelled = True

    def __init__(self, settings: DFNDSettings, context: Context) -> None:
        super().__init__(settings, context)
        if settings.diagonal is not None and not 0 < settings.diagonal < 1:
            raise UserError(f"diagonal={settings.diagonal} must lie between 0 and 1")
        if settings.select < 1:
            raise UserError(f"select={settings.select} must be >= 1")
        candidates = context.load_unlabelled()
        self._num_candidates = len(candidates)
        self._candidates: Tensor | None = candidates
        self.images = torch.empty(0)
        self._images_hash = ""
        self.indices = torch.empty(0, dtype=torch.int64)
        self.diagonal = settings.diagonal or 0.0
        classes = context.num_classes
        self.theta = nn.Parameter(torch.zeros(classes, classes - 1, device=context.device))
        self.optimizer = torch.optim.Adam([self.theta], lr=settings.lr_noise)
        self.augment = RandomCropFlip(settings.crop, settings.flip)
        self.parts = {"optimizer": self.optimizer}
        self._order_stream = context.randomness.on_cpu("order")
        self._augment_stream = context.randomness.on_device("augment")
        self._order = torch.empty(0, dtype=torch.int64, device=context.device)
        self._cursor = 0

    def prepare(self) -> Tensor:
        """Select the images; their logits are the features of the dictionary."""
        assert self._candidates is not None
        indices, logits, confidence = select_confident(
            torch.split(self._candidates, SELECTION_BATCH),
            self.teacher,
            self.settings.select,
            self.context.device,
        )
        if self.settings.diagonal is None:
            # Even a teacher that is always certain leaves room for noise.
            self.diagonal = min(max(confidence, 1e-3), 1 - 1e-3)
        self._keep(indices)
        return logits

    def _keep(self, indices: Tensor) -> None:
        assert self._candidates is not None
        self.indices = indices
        images = self._candidates[indices]
        self._images_hash = hashlib.sha256(images.numpy()).hexdigest()
        self.images = images.to(self.context.device)
        self._candidates = None

    def steps_per_pass(self) -> int:
        """Return the student steps in one pass over the selected images."""
        selected = min(self.settings.select, self._num_candidates)
        return max(1, selected // self.context.batch_size)

    def next_batch(self) -> Batch:
        """Return the next augmented images of a random order without repetition."""
        if self._cursor + self.context.batch_size > len(self._order):
            orders = [
                torch.randperm(len(self.images), generator=self._order_stream)
                for _ in range(-(-self.context.batch_size // len(self.images)))
            ]
            # Drawn on the CPU, so that all devices draw alike; moved once for the whole pass.
            self._order, self._cursor = torch.cat(orders).to(self.context.device), 0
        chosen = self._order[self._cursor : self._cursor + self.context.batch_size]
        self._cursor += self.context.batch_size
        images = to_float(self.images[chosen])
        return Batch(self.augment(images, self._augment_stream))

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
            "num_candidates": self._num_candidates,
            "indices": self.indices,
            "images": self._images_hash,
            "order": self._order,
            "cursor": self._cursor,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, reading the selected images from where they came."""
        if state["num_candidates"] != self._num_candidates:
            raise UserError(
                f"unlabelled holds {self._num_candidates} images, but {state['num_candidates']} "
                "when the run began: resume needs the same images"
            )
        super().load_state_dict(state)
        with torch.no_grad():
            self.theta.copy_(state["theta"])
        self.diagonal = state["diagonal"]
        self._order, self._cursor = state["order"].to(self.context.device), state["cursor"]
        self._keep(state["indices"].cpu())
        if self._images_hash != state["images"]:
            raise UserError(
                "unlabelled holds other images than when the run began: resume needs the same ones"
            )


@torch.no_grad()
def select_confident(
    batches: Iterable[Tensor], teacher: Classifier, count: int, device: torch.device
) -> tuple[Tensor, Tensor, float]:
    """Select the images that a teacher is most certain of, in one pass with bounded memory.

    Args:
        batches: Images, uint8 ``[b, c, h, w]``; read once.
        teacher: In eval mode.
        count: Number of images to select.
        device: Where the teacher is.

    Returns:
        Positions of the images in the stream, int64 ``[n]`` on the CPU, the most certain first
        (of equals the earlier one), their logits ``[n, num_classes]``, ``n <= count``, and the
        teacher's mean confidence on all images.
    """
    seen = 0
    confidence = torch.zeros((), dtype=torch.float64, device=device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        logits = teacher(to_float(batch.to(device)))
        values = F.log_softmax(logits, dim=1).amax(1)
        confidence += values.double().exp().sum()
        # NaN sorts as the largest of all.
        values = values.nan_to_num(nan=-torch.inf)
        kept.append((values, torch.arange(seen, seen + len(batch), device=device), logits))
        seen += len(batch)
        if sum(len(part[0]) for part in kept) >= 2 * count:  # rarely, as sorting takes time
            kept = [_most_certain(kept, count)]
    _, indices, logits = _most_certain(kept, count)
    return indices.cpu(), logits, (confidence / seen).item()


def _most_certain(
    parts: list[tuple[Tensor, Tensor, Tensor]], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    values, indices, logits = (torch.cat(column) for column in zip(*parts, strict=True))
    order = values.argsort(descending=True, stable=True)[:count]
    return values[order], indices[order], logits[order]
