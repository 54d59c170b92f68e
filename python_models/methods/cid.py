# SPDX-License-Identifier: Apache-2.0
"""CID: Comprehensive Knowledge Distillation with Causal Intervention (Deng, Zhang, NeurIPS 2021).

Not data-free: it learns from the labelled training images (x, y), randomly cropped and mirrored.
With the student's features f and logits s, the teacher's g and t, a linear map R, and the weights
``sr`` and ``cr``, the loss is

    KL_T(T || S) + sr * mean_b ||R f - g||^2 / ||g||^2 + cr * class(f, g) + mean CE(s', y).

class() compares, class by class, the cosine similarities of the batch's images in the student with
those in the teacher (`losses.class_representation_loss`). s' is the prediction under intervention:

    s' = H [f ; softmax(s / T_c) K],    K_k = sum_{y = k} w f / sum_{y = k} w,   w = softmax(t)_y.

H is a linear head. A row of the context matrix K is the mean of f over all images of its class, as
the previous epoch met them, weighted by the teacher's certainty of that class. The last term waits
for the first ``init_epochs`` epochs, the last of which is the first to make a K. Epochs and tests
use one and the same K, so what is evaluated and exported is s', with H and K; before there is a K,
s is evaluated.

The released code and the paper differ; ``form`` chooses, ``code`` by default since it is what the
published weights and figures belong to:

    ====================  ===================================  ==============================
    point                 code                                 paper
    ====================  ===================================  ==============================
    class(), where D_k    1/K sum_k ||D_k||^2 / n_k^2          sum_k ||D_k|| (equation 8)
    is the difference in
    class k
    context               softmax(s / T_c) K, s a constant     softmax(s / T_c) diag(P) K,
                                                               P the classes' shares
    weights w of K        softmax(t / T_c)_y                   softmax(t)_y
    ====================  ===================================  ==============================

The paper has no initial phase either; its ``init_epochs`` is 1, as K needs an epoch. With KDCI the
divergence is that of the compensated student; s in the context and H see the student as it is, and
the accuracy "with compensation" is that of compensated s'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_models import losses
from python_models.data import RandomCropFlip, to_float
from python_models.errors import UserError
from python_models.methods.base import (
    METHODS,
    Batch,
    Context,
    Deployed,
    Divergence,
    Method,
    logits_of,
)
from python_models.methods.sampling import RandomOrder, SameData
from python_models.networks.base import with_features
from python_models.networks.intervention import InterventionNetwork

FEATURE_BATCH = 1024
"""Images in one forward pass over all of them."""


@dataclass(kw_only=True)
class CIDSettings:
    """Settings of CID."""

    form: Literal["code", "paper"] = "code"
    """Where they differ: the released code's form or the paper's."""
    sr: float = 65.0
    """Weight of the sample representations (NM_MSE)."""
    cr: float = 1.0
    """Weight of the class representations."""
    init_epochs: int = 20
    """Epochs before the intervention."""
    context_temperature: float = 4.0
    """Temperature of the context's coefficients and (code) of the weights in the context matrix."""
    crop: int = 4
    """Padding of the random crop; 0: none."""
    flip: bool = True
    """Random horizontal flips."""


@dataclass
class LabelledBatch(Batch):
    """A batch with the teacher's features, ``[b, d]``."""

    teacher_features: Tensor | None = None


@METHODS.register("cid")
class CID(Method[CIDSettings]):
    """Sample and class representations, and an intervention head that stays."""

    summary = "labelled images: sample and class representations, causal intervention (no DFKD)"
    Settings = CIDSettings
    defaults: ClassVar = {
        "epochs": 240,
        "ep_steps": 0,
        "kd_steps": 1,
        "batch_size": 64,
        "temperature": 4.0,
        "lr": 0.05,
        "nesterov": True,
        "weight_decay": 5e-4,
        "schedule": "step",
        "milestones": (0.625, 0.75, 0.875),
    }
    num_prototypes = 128
    needs_features = ("teacher", "student")
    needs_labels = True

    def __init__(self, settings: CIDSettings, context: Context) -> None:
        super().__init__(settings, context)
        if not 1 <= settings.init_epochs < context.epochs:
            raise UserError(
                f"init_epochs={settings.init_epochs} must be >= 1 and below epochs="
                f"{context.epochs}: the intervention head learns in the epochs that are left"
            )
        if not settings.context_temperature > 0:
            raise UserError(f"context_temperature={settings.context_temperature} must be > 0")
        student = with_features(context.student.network)
        teacher = with_features(context.teacher.network)
        data = context.load_labelled()
        classes, device = context.num_classes, context.device
        self.shares = (torch.bincount(data.labels, minlength=classes) / len(data)).to(device)
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.augment = RandomCropFlip(settings.crop, settings.flip)
        self.order = RandomOrder(context.randomness.on_cpu("order"), device)
        self.order.reset(len(data))
        self._augment_stream = context.randomness.on_device("augment")
        with context.randomness.initialising("cid"):
            self.network = InterventionNetwork(student, classes, settings.context_temperature).to(
                device
            )
            self.transform = nn.Linear(student.feature_dim, teacher.feature_dim).to(device)
        self.is_intervening = False
        # Of this epoch: the weighted sum of each class's features, and of the weights.
        self.sums = torch.zeros(classes, student.feature_dim, device=device)
        self.weights = torch.zeros(classes, 1, device=device)
        self.parts = {
            "transform": self.transform,
            "order": self.order,
            "data": SameData("dataset", data.images, data.labels),
        }

    def deployed(self) -> Deployed:
        """Return the student with its intervention head; R learns too, without weight decay."""
        return Deployed(
            network=self.network,
            name="python_models.networks.intervention:intervention",
            arguments={"temperature": self.settings.context_temperature},
            parameter_groups=[
                {"params": list(self.network.head.parameters())},
                {"params": list(self.transform.parameters()), "weight_decay": 0.0},
            ],
        )

    @torch.no_grad()
    def prepare(self) -> Tensor:
        """Return the teacher's logits of all images, which the dictionary is built from."""
        chunks = torch.split(self.images, FEATURE_BATCH)
        return logits_of(chunks, self.teacher, self.world, self.context.num_classes)

    def steps_per_pass(self) -> int:
        """Return the student steps in one pass over the training images."""
        return max(1, len(self.images) // self.context.batch_size)

    def begin_epoch(self, index: int) -> None:
        """Replace the context matrix by that of the epoch before."""
        if index >= self.settings.init_epochs:
            means = self.sums / torch.where(self.weights > 0, self.weights, 1.0)
            if self.settings.form == "paper":
                means *= self.shares[:, None]
            # A class that no batch had keeps what it had.
            self.network.set_context(torch.where(self.weights > 0, means, self.network.context))
            self.is_intervening = True
        self.sums.zero_()
        self.weights.zero_()

    def next_batch(self) -> LabelledBatch:
        """Return augmented training images of a random order without repetition."""
        part = self.world.part(self.context.batch_size)
        rows = self.order.take(self.context.batch_size)[part.rows]
        images = self.augment(to_float(self.images[rows]), self._augment_stream, part)
        with torch.no_grad():
            features = self.teacher.features(images)
            logits = self.teacher.classify(features)
        return LabelledBatch(images, logits, self.labels[rows], features)

    def student_losses(self, batch: Batch, divergence: Divergence) -> dict[str, Tensor]:
        """Return the weighted terms, and add the batch to the next context matrix."""
        assert isinstance(batch, LabelledBatch)
        assert batch.teacher_logits is not None
        assert batch.teacher_features is not None
        assert batch.labels is not None
        s = self.settings
        features = self.student.features(batch.images)
        logits = self.student.classify(features)
        aligned = losses.normalised_mse_loss(self.transform(features), batch.teacher_features)
        # Classes have their images, and their relations, in all processes.
        of_all = self.world.gather(features)
        labels = self.world.gather(batch.labels)
        self._add_to_context(of_all.detach(), self.world.gather(batch.teacher_logits), labels)
        classes = losses.class_representation_loss(
            *(of_all, self.world.gather(batch.teacher_features), labels),
            *(self.context.num_classes, s.form),
        )
        terms = {
            "kd": divergence(logits, batch.teacher_logits),
            "sr": s.sr * aligned,
            "cr": s.cr * classes,
        }
        if self.is_intervening:
            coefficients = logits.detach() if s.form == "code" else logits
            intervened = self.network.head(self.network.with_context(features, coefficients))
            terms["inv"] = F.cross_entropy(intervened, batch.labels)
        return terms

    def _add_to_context(self, features: Tensor, teacher_logits: Tensor, labels: Tensor) -> None:
        temperature = self.settings.context_temperature if self.settings.form == "code" else 1.0
        certainty = (teacher_logits / temperature).softmax(1)
        # A product of matrices, since adding rows at an index is in no fixed order on a GPU.
        weights = (certainty * F.one_hot(labels, self.context.num_classes)).T  # [c, b]
        self.sums += weights @ features
        self.weights += weights.sum(1, keepdim=True)

    def preview(self, count: int) -> Tensor:
        """Return training images."""
        return to_float(self.images[:count])

    def state_dict(self) -> dict[str, Any]:
        """Return the state; the context matrix in use is part of the network."""
        return {
            **super().state_dict(),
            "is_intervening": self.is_intervening,
            "sums": self.sums,
            "weights": self.weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        super().load_state_dict(state)
        self.is_intervening = state["is_intervening"]
        self.sums.copy_(state["sums"])
        self.weights.copy_(state["weights"])
