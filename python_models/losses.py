# SPDX-License-Identifier: Apache-2.0
"""Loss terms of data-free knowledge distillation, each a function of tensors and nothing else.

Notation: ``t`` and ``s`` are teacher and student logits ``[b, c]``, ``p = softmax(t)``. Every term
is to be *minimised*; the methods weight and add them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from python_models.distributed import ALONE, Part, World
from python_models.precision import at_least_float32


def kd_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Distillation loss ``KL_T(T || S) = T^2 / b * sum_bc q (log q - log r)`` of Hinton et al.

    ``q = softmax(t / T)``, ``r = softmax(s / T)``. The teacher is a constant.

    Args:
        student: Student logits, floating, ``[b, c]``.
        teacher: Teacher logits, floating, ``[b, c]``.
        temperature: Positive softening temperature ``T``.

    Returns:
        Scalar loss.

    Raises:
        ValueError: If the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.softmax(teacher.detach() / temperature, dim=1),
        reduction="batchmean",
    )


def one_hot_loss(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Cross-entropy of the teacher's prediction, which makes it certain of one class.

    Args:
        logits: Teacher logits, ``[b, c]``.
        targets: Classes asked for, int64 ``[b]`` (Fast, CMI); by default the teacher's own most
            probable ones (DAFL).

    Returns:
        Scalar ``mean CE(t, targets)``.
    """
    return F.cross_entropy(logits, logits.argmax(1) if targets is None else targets)


def activation_loss(features: Tensor) -> Tensor:
    """Negative mean magnitude of the teacher's features: real images excite them (DAFL).

    Args:
        features: Input of the teacher's classifying layer, ``[b, d]``.

    Returns:
        Scalar ``-mean |f|``.
    """
    return -features.abs().mean()


def information_entropy_loss(
    logits: Tensor, base: Literal["e", "2", "10"] = "e", world: World = ALONE
) -> Tensor:
    """Negative entropy of the batch's mean prediction: all classes should occur (DAFL, MosaicKD).

    Args:
        logits: Teacher logits, ``[b, c]``.
        base: Base of the logarithm. DAFL's released code uses 10, the benchmark form ``e``,
            MosaicKD 2.
        world: Processes whose logits make one batch.

    Returns:
        Scalar ``sum_c m_c log m_c`` with ``m = mean_b softmax(t)``.
    """
    # Clamped, since the derivative of m log m at an absent class is infinite.
    mean = world.mean(F.softmax(logits, dim=1).mean(0)).clamp(min=torch.finfo(logits.dtype).tiny)
    negative_entropy = (mean * mean.log()).sum()
    return negative_entropy if base == "e" else negative_entropy / math.log(float(base))


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions of each image: each should be of one class (MosaicKD).

    Args:
        logits: Teacher logits, ``[b, c]``.

    Returns:
        Scalar ``-1/b * sum_bc p log p``.
    """
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1).mean()


def adversarial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Negative divergence of teacher and student: images on which they differ (MosaicKD).

    Args:
        student: Student logits, ``[b, c]``.
        teacher: Teacher logits, ``[b, c]``; gradients flow into both.

    Returns:
        Scalar ``-1/b * sum_b KL_1(T || S)_b``.
    """
    return -_divergences(student, teacher).mean()


def masked_adversarial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Negative divergence of teacher and student where the student already agrees (CMI, Fast).

    Args:
        student: Student logits, ``[b, c]``.
        teacher: Teacher logits, ``[b, c]``; gradients flow into both.

    Returns:
        Scalar ``-1/b * sum_b [argmax s_b = argmax t_b] KL_1(T || S)_b``.
    """
    agree = student.argmax(1) == teacher.argmax(1)
    return -(_divergences(student, teacher) * agree).mean()


def _divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``KL_1(T || S)_b`` of each image, with gradients into both."""
    # With the target as a logarithm: else a probability that underflows has the gradient 0/0.
    return F.kl_div(
        F.log_softmax(student, dim=1),
        F.log_softmax(teacher, dim=1),
        reduction="none",
        log_target=True,
    ).sum(1)


def patch_loss(logits: Tensor, *, real: bool) -> Tensor:
    """Cross-entropy of a patch discriminator: summed over the patches, mean over images (MosaicKD).

    Args:
        logits: One for each patch, positive for real, ``[b, 1, h, w]``.
        real: Whether the patches should be taken as real ones.

    Returns:
        Scalar ``1/b * sum_bhw log(1 + exp(-l))`` for real ones, with ``exp(l)`` for others.
    """
    return F.softplus(-logits if real else logits).sum() / len(logits)


def batch_norm_layers(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return a network's BatchNorm layers that store running statistics."""
    return [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


def normalised_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of features, each by its target's squared length (CID's NM_MSE).

    Args:
        student: The student's features, brought to the teacher's width, ``[b, d]``.
        teacher: The teacher's features, ``[b, d]``. A row of zeros has no direction to follow and
            counts nothing.

    Returns:
        Scalar ``mean_b ||f_b - g_b||^2 / ||g_b||^2``.
    """
    squares = teacher.square().sum(1)
    distances = (student - teacher).square().sum(1)
    # The inner choice keeps the gradient of the ratio that is not taken finite.
    ratios = distances / torch.where(squares > 0, squares, 1.0)
    return torch.where(squares > 0, ratios, 0.0).mean()


def class_representation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_classes: int,
    form: Literal["code", "paper"] = "code",
) -> Tensor:
    """Distance of the classes' cosine Gram matrices in student and teacher (CID).

    ``D_k`` is the difference of the cosine similarities between all images of class k in the batch;
    classes with a single image have no relations and are left out.

    Args:
        student: The student's features, ``[b, d_s]``.
        teacher: The teacher's features, ``[b, d_t]``.
        labels: Classes, int64 ``[b]``.
        num_classes: Number of classes.
        form: ``code``: the mean over the K classes with ``n_k >= 2`` images,
            ``1 / K sum_k ||D_k||_F^2 / n_k^2``; ``paper`` (equation 8): ``sum_k ||D_k||_F``.

    Returns:
        Scalar; 0 where no class has two images.
    """
    student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    members = F.one_hot(labels, num_classes).to(student.dtype)  # [b, c]
    difference = (student @ student.T - teacher @ teacher.T) * (members @ members.T)
    squares = members.T @ difference.square().sum(1)  # ||D_k||^2, [c]
    sizes = members.sum(0)
    counted = (sizes >= 2).to(student.dtype)
    if form == "code":
        means = counted * squares / sizes.clamp(min=1).square()
        return means.sum() / counted.sum().clamp(min=1)
    # The root's gradient is infinite at 0.
    positive = (counted > 0) & (squares > 0)
    return torch.where(positive, squares, 1.0).sqrt().mul(positive).sum()


def alignment_weights(
    student: Tensor, teacher: Tensor, form: Literal["paper", "code"] = "paper"
) -> Tensor:
    """Weights of images by how student and teacher agree on them, without gradient (KD3).

    Args:
        student: Student logits, ``[b, c]``.
        teacher: Teacher logits, ``[b, c]``.
        form: ``paper`` (equation 9): ``1 - sigmoid(||softmax(s) - softmax(t)||_1)``, large where
            they agree; ``code``: ``sigmoid(||s - t||_2)``, large where they do not.

    Returns:
        Weights in (0, 1), ``[b]``.
    """
    student, teacher = student.detach(), teacher.detach()
    if form == "paper":
        distance = (student.softmax(1) - teacher.softmax(1)).abs().sum(1)
        return 1 - torch.sigmoid(distance)
    return torch.sigmoid(torch.linalg.vector_norm(student - teacher, dim=1))


def weighted_alignment_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Mean over all elements of ``w_b (f - g)^2`` (KD3).

    Args:
        student: Features or feature maps, ``[b, ...]``.
        teacher: Of the same shape.
        weights: Of the images, ``[b]``.
    """
    return (weights * (student - teacher).square().flatten(1).mean(1)).mean()


def mix_contrast_loss(
    plain: Tensor,
    perturbed: Tensor,
    temperature: float,
    form: Literal["paper", "code"] = "paper",
) -> Tensor:
    """NT-Xent: the embeddings of an image and of its perturbed version should be the nearest (KD3).

    Args:
        plain: Embeddings z of length 1, ``[b, d]``, ``b >= 2``.
        perturbed: Those of the perturbed images z', of length 1, ``[b, d]``.
        temperature: Positive temperature tau.
        form: ``paper`` (equation 15): ``-sum_i log(exp(z_i z'_i / tau) / sum_{j != i}
            exp(z_i z'_j / tau))``, whose denominator leaves the positive pair out; ``code``: the
            mean over all 2b embeddings of the same with the positive pair and all others but the
            embedding itself in the denominator.

    Returns:
        Scalar loss.
    """
    b = len(plain)
    if form == "paper":
        scores = plain @ perturbed.T / temperature
        itself = torch.eye(b, dtype=torch.bool, device=plain.device)
        others = torch.logsumexp(scores.masked_fill(itself, -torch.inf), dim=1)
        return (others - scores.diagonal()).sum()
    both = torch.cat([plain, perturbed])
    itself = torch.eye(2 * b, dtype=torch.bool, device=plain.device)
    scores = (both @ both.T / temperature).masked_fill(itself, -torch.inf)
    partners = torch.arange(2 * b, device=plain.device).roll(b)
    return F.cross_entropy(scores, partners)


class BatchNormStatistics:
    """Distance of a batch's statistics from those stored in a teacher's BatchNorm layers.

    Inside a ``with`` block, hooks read the input of every BatchNorm layer of the teacher (in eval
    mode); with its batch mean ``u`` and biased variance ``v`` per channel, the stored ``m``, ``w``,

        ``loss() = sum_layers ||w - v||_2 + ||m - u||_2``    (un-squared norms, DeepInversion).

    With ``momentum = a > 0`` (Fast) ``u`` and ``v`` are replaced, once `update_average` was called,
    by ``(1 - a) u + a u'`` and ``(1 - a) v + a v'``, where ``u', v'`` are running averages of
    the batches that `update_average` was called after.

    Args:
        network: The teacher. Its parameters and buffers are not touched.
        momentum: ``a`` in [0, 1).
        world: Processes whose images make one batch.

    Raises:
        ValueError: If the network has no BatchNorm layer with running statistics.

    Example:
        >>> with BatchNormStatistics(teacher) as statistics:
        ...     logits = teacher(images)
        >>> statistics.loss().backward()
    """

    def __init__(self, network: nn.Module, momentum: float = 0.0, world: World = ALONE) -> None:
        layers = batch_norm_layers(network)
        if not layers:
            raise ValueError("the network has no BatchNorm layer with running statistics")
        self.momentum = momentum
        self._world = world
        self._layers = layers
        self._batch: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(layers)
        self._average: list[tuple[Tensor, Tensor]] | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> BatchNormStatistics:
        self._handles = [
            layer.register_forward_pre_hook(self._reader(index))
            for index, layer in enumerate(self._layers)
        ]
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if self._world.size > 1 and kind is None:
            self._pool_batch()

    def _pool_batch(self) -> None:
        """Replace this process's statistics by those of all processes' images, in one exchange."""
        sizes = [len(mean) for mean, _ in self._batch]
        means, variances = (torch.cat(each) for each in zip(*self._batch, strict=True))
        pooled = self._world.pooled_moments(means, variances)
        self._batch = list(zip(*(torch.split(each, sizes) for each in pooled), strict=True))

    def _reader(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # Mean and variance over everything but the channels.
            dims = [d for d in range(inputs[0].dim()) if d != 1]
            variance, mean = torch.var_mean(at_least_float32(inputs[0]), dim=dims, correction=0)
            self._batch[index] = (mean, variance)

        return read

    def loss(self, first: float = 1.0) -> Tensor:
        """Return the loss of the last batch that went through the teacher.

        Args:
            first: Factor on the first layer's term; DeepInversion takes 10 on ImageNet.
        """
        total = self._batch[0][0].new_zeros(())
        for index, layer in enumerate(self._layers):
            mean, variance = self._batch[index]
            if self._average is not None:
                old_mean, old_variance = self._average[index]
                mean = (1 - self.momentum) * mean + self.momentum * old_mean
                variance = (1 - self.momentum) * variance + self.momentum * old_variance
            assert layer.running_mean is not None
            assert layer.running_var is not None
            distance = torch.linalg.vector_norm(layer.running_var - variance)
            distance = distance + torch.linalg.vector_norm(layer.running_mean - mean)
            total = total + (distance if index else first * distance)
        return total

    def update_average(self) -> None:
        """Fold the last batch into the running averages (no effect without momentum)."""
        if self.momentum == 0:
            return
        batch = [(mean.detach(), variance.detach()) for mean, variance in self._batch]
        if self._average is not None:
            a = self.momentum
            batch = [
                (a * old_mean + (1 - a) * mean, a * old_variance + (1 - a) * variance)
                for (old_mean, old_variance), (mean, variance) in zip(
                    self._average, batch, strict=True
                )
            ]
        self._average = batch

    def state_dict(self) -> dict[str, Sequence[Tensor] | None]:
        """Return the running averages."""
        if self._average is None:
            return {"mean": None, "variance": None}
        return {
            "mean": [mean for mean, _ in self._average],
            "variance": [variance for _, variance in self._average],
        }

    def load_state_dict(self, state: dict[str, Sequence[Tensor] | None]) -> None:
        """Restore the running averages."""
        means, variances = state["mean"], state["variance"]
        self._average = None
        if means is not None and variances is not None:
            device = self._layers[0].running_mean.device  # type: ignore[union-attr]
            self._average = [
                (mean.to(device), variance.to(device))
                for mean, variance in zip(means, variances, strict=True)
            ]


def log_noise_transition(theta: Tensor, diagonal: float) -> Tensor:
    """Logarithm of DFND's noise adaptation matrix ``Q``.

    Row ``i`` of ``Q`` holds ``diagonal`` at column ``i`` and ``(1 - diagonal) softmax(theta_i)`` in
    the other columns, in order; every row sums to 1.

    Args:
        theta: Free parameters, ``[c, c - 1]``.
        diagonal: Probability in (0, 1) that the teacher's label is right.

    Returns:
        ``log Q``, ``[c, c]``.
    """
    classes = theta.shape[0]
    off_diagonal = F.log_softmax(theta, dim=1) + math.log1p(-diagonal)
    columns = torch.arange(classes, device=theta.device)
    # Column j of row i takes element j of the row left of the diagonal, j - 1 right of it.
    source = columns[None, :] - (columns[None, :] > columns[:, None]).long()
    spread = off_diagonal.gather(1, source.clamp(max=classes - 2))
    return torch.where(
        torch.eye(classes, dtype=torch.bool, device=theta.device),
        spread.new_full((), math.log(diagonal)),
        spread,
    )


def noise_adaptation_loss(student: Tensor, labels: Tensor, log_transition: Tensor) -> Tensor:
    """Negative log-likelihood of noisy labels under the student (DFND).

    Args:
        student: Student logits, ``[b, c]``.
        labels: The teacher's noisy labels, int64 ``[b]``.
        log_transition: ``log Q`` of `log_noise_transition`, ``[c, c]``.

    Returns:
        Scalar ``-mean log (softmax(s) Q)[label]``, by log-sum-exp so that it cannot underflow.
    """
    log_joint = F.log_softmax(student, dim=1) + log_transition.T[labels]
    return -torch.logsumexp(log_joint, dim=1).mean()


def _neighbour_differences(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what changes from pixel to pixel: across, down and along both diagonals."""
    return (
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., :-1, :-1] - images[..., 1:, 1:],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )


def _norm(values: Tensor, world: World) -> Tensor:
    """Return the Euclidean norm of all processes' values, that of the vector of their norms."""
    own: Tensor = torch.linalg.vector_norm(values)
    return own if world.size == 1 else torch.linalg.vector_norm(world.gather(own[None]))


def total_variation_l2(images: Tensor, world: World = ALONE) -> Tensor:
    """Roughness of images, as norms over the whole batch (DeepInversion).

    Args:
        images: ``[b, c, h, w]``.
        world: Processes whose images make one batch.

    Returns:
        Scalar ``sum_d ||D_d x||_2`` over the differences ``D_d`` to the right, lower and both
        diagonal neighbours.
    """
    norms = [_norm(change, world) for change in _neighbour_differences(images)]
    return torch.stack(norms).sum()


def total_variation_l1(images: Tensor) -> Tensor:
    """Roughness of images, as mean magnitudes (DeepInversion's second form).

    Args:
        images: ``[b, c, h, w]``.

    Returns:
        Scalar ``sum_d mean |D_d x|`` over the differences of `total_variation_l2`.
    """
    return torch.stack([change.abs().mean() for change in _neighbour_differences(images)]).sum()


def image_norm(
    images: Tensor, over: Literal["batch", "image"] = "batch", world: World = ALONE
) -> Tensor:
    """Un-squared Euclidean norm of images (DeepInversion).

    Args:
        images: ``[b, c, h, w]``.
        over: ``batch``: one norm of all values (its CIFAR-10 form); ``image``: the mean of the
            images' norms (its ImageNet form).
        world: Processes whose images make one batch.

    Returns:
        Scalar ``||x||_2`` or ``mean_b ||x_b||_2``.
    """
    if over == "batch":
        return _norm(images, world)
    norms: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norms.mean()


def competition_loss(
    student: Tensor, teacher: Tensor, *, clamped: bool = True, world: World = ALONE
) -> Tensor:
    """Agreement of student and teacher, by a Jensen-Shannon divergence (Adaptive DeepInversion).

    With ``P = softmax(s / 3)``, ``Q = softmax(t / 3)`` and ``M = (P + Q) / 2``, each then clamped
    to [0.01, 0.99], ``J = (KL(M || P) + KL(M || Q)) / 2``, averaged over the batch. The divergences
    run from the mean, as in the released code, not to it. A probability outside the clamp has no
    gradient: of 100 classes that is most of them.

    Args:
        student: Student logits, ``[b, c]``.
        teacher: Teacher logits, ``[b, c]``; gradients flow into both.
        clamped: ``1 - clamp(J, 0, 1)`` (DeepInversion) or ``-J`` (the benchmark form).
        world: Processes whose images make one batch.

    Returns:
        Scalar.
    """
    p, q = F.softmax(student / 3, dim=1), F.softmax(teacher / 3, dim=1)
    mean = ((p + q) / 2).clamp(0.01, 0.99)
    divergence = sum(
        0.5 * F.kl_div(other.clamp(0.01, 0.99).log(), mean, reduction="batchmean")
        for other in (p, q)
    )
    assert isinstance(divergence, Tensor)
    divergence = world.mean(divergence)
    return 1 - divergence.clamp(0, 1) if clamped else -divergence


def contrastive_loss(
    local: Tensor,
    global_: Tensor,
    num_current: int,
    temperature: float,
    part: Part | None = None,
) -> Tensor:
    """InfoNCE between two views of each image (CMI): each local view should find its global one.

    ``l_i = -log softmax_j(u_i . v_j / temperature)_i``, over all columns ``j``; the mean over the
    current images plus the mean over those from the memory bank, if there are any.

    Args:
        local: Unit vectors ``u`` of the local views, ``[n, k]``: current images, then old ones.
        global_: Unit vectors ``v`` of the global views, ``[n, k]``; constants.
        num_current: How many of the rows are of current images.
        temperature: Positive.
        part: Which of more current images, all of which are columns, are rows; by default all.

    Returns:
        Scalar.
    """
    similarities = local @ global_.detach().T / temperature
    own = torch.arange(len(local), device=local.device)
    if part is not None:
        own = own + torch.where(own < num_current, part.start, part.total - num_current)
    terms = F.cross_entropy(similarities, own, reduction="none")
    if num_current == len(local):
        return terms.mean()
    return terms[:num_current].mean() + terms[num_current:].mean()
