# SPDX-License-Identifier: Apache-2.0
"""KD3: Distribution Shift Matters for Knowledge Distillation with Webly Collected Images.

(Tang et al., ICCV 2023.) Data-free: it learns from unlabelled images, of which each epoch selects
anew those that look like the teacher's task. The student's last feature map is projected to the
teacher's and classified by the teacher's frozen classifier, in training and ever after
(`networks.shared_classifier`); the student's own classifier is not used. With features f, g of the
student and the teacher, their logits s, t under that classifier, and embeddings z = normalise(A f)
of an image and z' of its perturbed version (`mix_distribution`), the loss is

    mean_b w_b (f_b - g_b)^2 + mix * (contrast of the student's z, z' + that of the teacher's).

The maps A learn, the student's and the teacher's. At the start of an epoch the whole set, randomly
transformed as in training, goes through both networks in eval mode. C mixes their predictions with
weight alpha(e) on the student's; with y, p = argmax C, max C and n_k images of class k, the images
with p above the threshold of y are selected, which is lower for classes that are rarer.

``form`` chooses between the paper and the released code, which differ throughout:

    =========  =======================================  ======================================
    point      paper                                    code
    =========  =======================================  ======================================
    C          (1 - alpha) softmax(t)                   softmax((1 - alpha) t + alpha s)
               + alpha softmax(s)
    alpha      exp(-5 (e / (I/2) - 1)^2),               exp(-5 ((e + 1) / (2 I/3) - 1)^2),
               1 where e > I/2                          1 where e >= I/2
    threshold  cutoff r,  r = n_y / max n               cutoff r / (2 - r)
    w          1 - sigmoid(||softmax(s)                 sigmoid(||s - t||_2)
               - softmax(t)||_1)
    f, g       spatial means, the classifier's input    feature maps, at the smaller size
    contrast   sum_i, positive pair not in the          mean over z and z', positive pair in
               denominator (equation 15)                the denominator (NT-Xent)
    mix        0.01                                     0.001 (to be set)
    =========  =======================================  ======================================

e counts the I epochs from 0; the code has its alpha for I = 240 alone. In both forms w has no
gradient, and original and perturbed images go through the student as one batch.

Differences. The length of a run must be known in advance: an epoch is as many steps as there are
whole batches of *all* unlabelled images, drawn from the selected ones, which are gone through in
random orders as often as it takes. Where fewer than a batch are selected, the batch_size images of
the largest p are taken instead.

KD3 has no divergence of logits, which is what KDCI compensates. ``kd_weight`` adds one,
kd_weight * KL_T(T || S) on s and t, to both sides of a comparison; with its default of 0 the method
is KD3 itself, KDCI is off, and asking for it is an error. The dictionary is built once, from the
teacher's logits of the first epoch's selection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_models import losses
from python_models.data import RandomResizedCropFlip, to_float
from python_models.distributed import ALONE, World
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
from python_models.methods.sampling import RandomOrder, SameData, require_memory
from python_models.networks.base import with_features
from python_models.networks.shared_classifier import SharedClassifier, classifier_of, pool_to

Form = Literal["paper", "code"]

SELECTION_BATCH = 1024
"""Images in one forward pass of the selection."""


@dataclass(kw_only=True)
class KD3Settings:
    """Settings of KD3."""

    form: Form = "paper"
    """Where they differ: the paper's form or the released code's."""
    cutoff: float = 0.95
    """Threshold on the confidence for the most frequent class."""
    mix: float = 0.01
    """Weight of the contrast of images and their perturbed versions."""
    contrast_temperature: float = 0.3
    """Temperature of the contrast."""
    embedding_dim: int = 128
    """Length of the contrast's embeddings."""
    beta: float = 0.1
    """Both parameters of the beta distribution that mixes the images' statistics."""
    kd_weight: float = 0.0
    """Weight of a distillation term on the logits, which KD3 does not have and KDCI needs."""
    crop_scale: float = 0.08
    """Least share of an image's area that the random resized crop keeps; 1: no crop."""
    flip: bool = True
    """Random horizontal flips."""


@dataclass
class Views(Batch):
    """A batch with its perturbed version.

    Attributes:
        normalised: Normalised images, then the same perturbed, ``[2 b, c, h, w]``.
        teacher_map: The teacher's feature maps of both, ``[2 b, d, h', w']``.
    """

    normalised: Tensor | None = None
    teacher_map: Tensor | None = None


@METHODS.register("kd3")
class KD3(Method[KD3Settings]):
    """Dynamic selection, the teacher's classifier, and features that withstand shifts."""

    summary = "unlabelled images selected anew each epoch, shared classifier, feature alignment"
    Settings = KD3Settings
    defaults: ClassVar = {
        "epochs": 240,
        "ep_steps": 0,
        "kd_steps": 1,
        "batch_size": 1024,
        "temperature": 4.0,
        "lr": 0.05,
        "weight_decay": 5e-4,
        "schedule": "step",
        "milestones": (0.625, 0.75, 0.875),
        "kdci": False,
    }
    num_prototypes = 128
    needs_features = ("teacher", "student")
    needs_unlabelled = True

    def __init__(self, settings: KD3Settings, context: Context) -> None:
        super().__init__(settings, context)
        _check(settings, context)
        student = with_features(context.student.network)
        self._teacher_network = with_features(context.teacher.network)
        source = context.open_unlabelled()
        require_memory(
            *("unlabelled", len(source), context.image_shape, torch.device("cpu")),
            remedy="KD3 holds them all; give it fewer, or use dfnd or mosaickd with --select",
        )
        self.images = source.load()
        self.augment = RandomResizedCropFlip((settings.crop_scale, 1.0), flip=settings.flip)
        randomness, device = context.randomness, context.device
        with randomness.initialising("kd3"), torch.no_grad():
            classifier = classifier_of(self._teacher_network)
            blank = torch.zeros(1, *context.image_shape, device=device)
            map_size = self._teacher_network.feature_map(blank).shape[-2:]
            self.network = SharedClassifier(student, classifier, map_size).to(device)
            self.network = self.world.synchronised(self.network)
            width = classifier.in_features
            self.embeddings = nn.ModuleDict(
                {
                    "student": nn.Linear(width, settings.embedding_dim),
                    "teacher": nn.Linear(width, settings.embedding_dim),
                }
            ).to(device)
        # The rows of the images that this epoch learns from.
        self.selected = torch.empty(0, dtype=torch.int64)
        self.order = RandomOrder(randomness.on_cpu("order"), torch.device("cpu"))
        self.parts = {
            "embeddings": self.embeddings,
            "order": self.order,
            "data": SameData("unlabelled", self.images),
        }
        self._compute = context.precision.run
        self._selection_stream = randomness.on_device("selection")
        self._augment_stream = randomness.on_device("augment")
        self._mix_stream = randomness.on_device("mix")

    @property
    def has_divergence(self) -> bool:
        """Whether a distillation term was asked for."""
        return self.settings.kd_weight > 0

    def deployed(self) -> Deployed:
        """Return the student under the teacher's classifier; the embeddings learn too."""
        return Deployed(
            network=self.network,
            name="python_models.networks.shared_classifier:shared_classifier",
            arguments={
                "feature_dim": self.network.feature_dim,
                "map_size": list(self.network.map_size),
            },
            parameter_groups=[
                {
                    "params": [
                        *self.network.projector.parameters(),
                        *self.embeddings.parameters(),
                    ]
                }
            ],
        )

    @torch.no_grad()
    def prepare(self) -> Tensor:
        """Select for the first epoch; the teacher's logits are the features of the dictionary."""
        self._select(0)
        chunks = torch.split(self.dictionary_images(), SELECTION_BATCH)
        return logits_of(chunks, self.teacher, self.world, self.context.num_classes)

    def dictionary_images(self) -> Tensor:
        """Return the images that are selected now: for the dictionary, those of the first epoch."""
        return self.images[self.selected]

    def steps_per_pass(self) -> int:
        """Return the student steps in one pass over as many images as are unlabelled."""
        return max(1, len(self.images) // self.context.batch_size)

    def begin_epoch(self, index: int) -> None:
        """Select the epoch's images; `prepare` did so for the first."""
        if index > 0:
            self._select(index)

    @torch.no_grad()
    def _select(self, index: int) -> None:
        """Select in one pass with a batch of images on the device."""
        s = self.settings
        share = student_share(index, self.context.epochs, s.form)
        self.network.eval()
        confidences: list[Tensor] = []
        classes: list[Tensor] = []
        for images in torch.split(self.images, SELECTION_BATCH):
            part = self.world.part(len(images))  # may be empty, of a last chunk
            own = to_float(images[part.rows].to(self.context.device))
            augmented = self.augment(own, self._selection_stream, part)
            normalised = self.teacher.normalise(augmented)
            teacher = self._compute(self._teacher_network, normalised)
            student = self._compute(self.network, normalised)
            found = combine(teacher, student, share, s.form).max(1)
            confidences.append(self.world.gather_uneven(found.values))
            classes.append(self.world.gather_uneven(found.indices))
        confidence, predicted = torch.cat(confidences), torch.cat(classes)
        self.selected = select(
            *(confidence, predicted, self.context.num_classes, s.cutoff),
            least=self.context.batch_size,
            form=s.form,
        ).cpu()
        self.order.reset(len(self.selected))

    def next_batch(self) -> Views:
        """Return selected images, randomly transformed, with their perturbed versions."""
        part = self.world.part(self.context.batch_size)
        rows = self.selected[self.order.take(self.context.batch_size)[part.rows]]
        b = len(rows)
        images = to_float(self.images[rows].to(self.context.device))
        images = self.augment(images, self._augment_stream, part)
        normalised = self.teacher.normalise(images)
        perturbed = mix_distribution(normalised, self.settings.beta, self._mix_stream, self.world)
        both = torch.cat([normalised, perturbed])
        with torch.no_grad():
            maps = self._compute(self._teacher_network.feature_map, both)
            logits = self._compute(self._teacher_network.classify, maps[:b].mean((2, 3)))
        return Views(images, logits, normalised=both, teacher_map=maps)

    def student_losses(self, batch: Batch, divergence: Divergence) -> dict[str, Tensor]:
        """Return the weighted alignment, the contrast and, if asked for, the distillation term."""
        assert isinstance(batch, Views)
        assert batch.normalised is not None
        assert batch.teacher_map is not None
        assert batch.teacher_logits is not None
        s, b = self.settings, len(batch.images)
        student_map = self._compute(self.network.feature_map, batch.normalised)
        teacher_map = pool_to(batch.teacher_map, student_map.shape[-2:])
        student, teacher = student_map.mean((2, 3)), batch.teacher_map.mean((2, 3))
        logits = self._compute(self.network.classify, student[:b])
        weights = losses.alignment_weights(logits, batch.teacher_logits, s.form)
        ours, theirs = (student, teacher) if s.form == "paper" else (student_map, teacher_map)
        contrast = self._contrast("student", student) + self._contrast("teacher", teacher)
        terms = {
            "align": losses.weighted_alignment_loss(ours[:b], theirs[:b], weights),
            "mix": s.mix * contrast,
        }
        if s.kd_weight > 0:
            terms["kd"] = s.kd_weight * divergence(logits, batch.teacher_logits)
        return terms

    def _contrast(self, role: str, features: Tensor) -> Tensor:
        """Return the contrast of features of images and their perturbed versions, ``[2 b, d]``."""
        embeddings = F.normalize(self.embeddings[role](features), dim=1).chunk(2)
        plain, perturbed = (self.world.gather(each) for each in embeddings)
        s = self.settings
        return losses.mix_contrast_loss(plain, perturbed, s.contrast_temperature, s.form)

    def preview(self, count: int) -> Tensor:
        """Return the first of the selected images."""
        return to_float(self.images[self.selected[:count]])

    def state_dict(self) -> dict[str, Any]:
        """Return the state; of the images only which they are."""
        return {**super().state_dict(), "selected": self.selected}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        super().load_state_dict(state)
        self.selected = state["selected"]


def _check(settings: KD3Settings, context: Context) -> None:
    if context.batch_size < 2:
        raise UserError(f"batch_size={context.batch_size} must be >= 2: KD3 contrasts images")
    for name in ("contrast_temperature", "beta"):
        if not getattr(settings, name) > 0:
            raise UserError(f"{name}={getattr(settings, name)} must be > 0")
    for name in ("cutoff", "crop_scale"):
        if not 0 < getattr(settings, name) <= 1:
            raise UserError(f"{name}={getattr(settings, name)} must lie in (0, 1]")
    for name in ("mix", "kd_weight"):
        if not getattr(settings, name) >= 0:
            raise UserError(f"{name}={getattr(settings, name)} must be >= 0")


def student_share(index: int, epochs: int, form: Form = "paper") -> float:
    """Return alpha, the student's weight in the selection.

    Args:
        index: Epoch, from 0.
        epochs: Epochs of the run.
        form: The paper's or the code's.
    """
    if form == "paper":
        return math.exp(-5 * (index / (epochs / 2) - 1) ** 2) if index <= epochs / 2 else 1.0
    if index >= epochs / 2:
        return 1.0
    return math.exp(-5 * ((index + 1) / (epochs * 2 / 3) - 1) ** 2)


def combine(teacher: Tensor, student: Tensor, share: float, form: Form = "paper") -> Tensor:
    """Return probabilities of the classes from both networks' logits, ``[b, c]`` each.

    Args:
        teacher: Teacher logits.
        student: Student logits.
        share: The student's weight, from `student_share`.
        form: Mix probabilities (paper) or logits (code).
    """
    if form == "paper":
        return (1 - share) * teacher.softmax(1) + share * student.softmax(1)
    return ((1 - share) * teacher + share * student).softmax(1)


def select(
    confidence: Tensor,
    predicted: Tensor,
    num_classes: int,
    cutoff: float,
    *,
    least: int = 1,
    form: Form = "paper",
) -> Tensor:
    """Select the images whose confidence is above their class's threshold.

    Args:
        confidence: Largest probability, ``[n]``; NaN is below every threshold.
        predicted: Its class, int64 ``[n]``.
        num_classes: Number of classes.
        cutoff: Threshold of the most frequent class.
        least: If fewer images are selected, the `least` most confident ones are, or all.
        form: Threshold of a class with a share r of that class's images: ``cutoff * r`` (paper) or
            ``cutoff * r / (2 - r)`` (code).

    Returns:
        Rows, int64 ``[m]``: ascending, or by falling confidence (of equals the earlier one).
    """
    counts = torch.bincount(predicted, minlength=num_classes).to(confidence.dtype)
    ratio = counts / counts.max()
    thresholds = cutoff * (ratio if form == "paper" else ratio / (2 - ratio))
    selected = (confidence > thresholds[predicted]).nonzero().squeeze(1)
    if len(selected) >= least:
        return selected
    order = confidence.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    return order[:least]


def mix_distribution(
    images: Tensor, beta: float, stream: torch.Generator, world: World = ALONE
) -> Tensor:
    """Give each image and channel a mean and deviation between its own and another image's.

    With mean m and standard deviation d (unbiased) of an image's channel, those of the same channel
    of another image of the batch, m' and d', and u ~ Beta(beta, beta) drawn for each image, x
    becomes (u d + (1 - u) d') (x - m) / d + u m + (1 - u) m'.

    Args:
        images: Normalised images, ``[b, c, h, w]``.
        beta: Parameter of the distribution, positive.
        stream: Source of randomness, on the images' device.
        world: Processes whose images, equally many of each, make one batch.
    """
    size = len(images) * world.size
    variance, mean = torch.var_mean(images, dim=(2, 3), keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    other = torch.randperm(size, generator=stream, device=stream.device)
    # A beta distribution is that of one gamma variable's share of two; in double, as small
    # parameters make them underflow. torch.distributions draws so too, but from no stream.
    shape = torch.full((2, size, 1, 1, 1), beta, dtype=torch.float64, device=stream.device)
    first, second = torch._standard_gamma(shape, generator=stream)
    u = (first / (first + second)).to(images.dtype)
    u, other = world.share(u), world.share(other)
    mixed_mean = u * mean + (1 - u) * world.gather(mean)[other]
    mixed_deviation = u * deviation + (1 - u) * world.gather(deviation)[other]
    perturbed: Tensor = mixed_deviation * (images - mean) / deviation + mixed_mean
    return perturbed
