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

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_models import losses
from python_models.data import RandomCropFlip, UnlabelledImages, to_float
from python_models.distributed import ALONE, World
from python_models.errors import UserError
from python_models.methods.base import METHODS, Batch, Context, Divergence, Method
from python_models.reporting import Progress
from python_models.selection import TopRows


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
        source = context.open_unlabelled()
        self._source: UnlabelledImages | None = source
        self._num_candidates = len(source)
        self._require_memory()
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
        found = select_confident(
            *(self._logits(), self._selected, self.context.num_classes), self.world
        )
        if self._source is not None:
            self._source.share_skipped(self.world)
        if not len(found.indices):
            raise UserError("the teacher's logits are NaN for every unlabelled image")
        if self.settings.diagonal is None:
            # Even a teacher that is always certain leaves room for noise.
            self.diagonal = min(max(found.confidence, 1e-3), 1 - 1e-3)
        self._keep(found.indices)
        return found.logits.to(self.context.device)

    def _logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the positions and the teacher's logits of all images, in one pass."""
        source = self._source
        assert source is not None
        world = self.world
        count = math.ceil(len(source) / source.batch_size / world.size)
        progress = Progress("selecting", count, is_shown=world.is_first)
        try:
            for positions, images in source.batches(world.rank, world.size):
                yield positions, self.teacher(to_float(images.to(self.context.device)))
                progress.step({})
        finally:
            progress.close()

    def _keep(self, indices: Tensor) -> None:
        assert self._source is not None
        self.indices = indices
        images = self._source.take(indices)
        self._images_hash = hashlib.sha256(images.numpy().data).hexdigest()
        self.images = images.to(self.context.device)
        self._source = None  # it may hold all candidates

    @property
    def _selected(self) -> int:
        """Number of images to keep, if all of them can be read."""
        return min(self.settings.select, self._num_candidates)

    def _require_memory(self) -> None:
        device = self.context.device
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        else:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        needed = self._selected * math.prod(self.context.image_shape)
        if needed > memory:
            raise UserError(
                f"select={self.settings.select}: {self._selected} images of "
                f"{list(self.context.image_shape)} take {needed / 2**30:.0f} GiB, but {device} has "
                f"{memory / 2**30:.0f} GiB: select fewer"
            )

    def steps_per_pass(self) -> int:
        """Return the student steps in one pass over the selected images.

        Images that turn out to be unreadable count: how many they are is not known before.
        """
        return max(1, self._selected // self.context.batch_size)

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
        part = self.world.part(self.context.batch_size)
        images = to_float(self.images[chosen[part.rows]])
        return Batch(self.augment(images, self._augment_stream, part))

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


class Selection(NamedTuple):
    """What was selected from a stream.

    Attributes:
        indices: Positions in the stream, int64 ``[n]`` on the CPU, the most certain first.
        logits: Theirs, float32 ``[n, c]`` on the CPU.
        confidence: The teacher's mean confidence on all images of the stream.
    """

    indices: Tensor
    logits: Tensor
    confidence: float


@torch.no_grad()
def select_confident(
    stream: Iterable[tuple[Tensor, Tensor]],
    count: int,
    num_classes: int,
    world: World = ALONE,
) -> Selection:
    """Select the images that a teacher is most certain of, in one pass with bounded memory.

    Only the kept positions, certainties and logits are in memory, and a sixteenth as many besides.

    Args:
        stream: Positions, int64 ``[b]``, ascending, and the teacher's logits ``[b, c]``; read once.
        count: Number of images to select.
        num_classes: Number of logits ``c``.
        world: Processes with a stream each, of which the images of all are selected.

    Returns:
        The ``n <= count`` images of the largest ``max softmax(t)``, of equals the earlier one. An
        image whose logits are NaN is none of them, and has the confidence 0.
    """
    top = TopRows(count, num_classes)
    seen = 0
    total = torch.zeros((), dtype=torch.float64)
    for positions, logits in stream:
        certainty = F.log_softmax(logits.float(), dim=1).amax(1).cpu()
        total += certainty.double().exp().nan_to_num(nan=0.0).sum()
        seen += len(positions)
        top.add(certainty, positions, logits)
    values, indices, rows = top.result()
    if world.size > 1:
        # The best of all are among the best of each. Positions must ascend.
        order = indices.argsort()
        columns = [world.gather_uneven(column[order]) for column in (values, indices, rows)]
        order = columns[1].argsort()
        top = TopRows(count, num_classes)
        top.add(*(column[order] for column in columns))
        _, indices, rows = top.result()
        total, seen = world.sum(total), int(world.sum(torch.tensor(seen)))
    return Selection(indices, rows, (total / max(seen, 1)).item())
