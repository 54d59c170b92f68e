# SPDX-License-Identifier: Apache-2.0
r"""The operators in plain PyTorch, for every device that PyTorch has.

The algorithm is that of ``torch.ops.kdci_ext.*``; tests and benchmarks hold the native kernels to
these functions, and they serve where the native library is missing. ``confounder_dictionary``,
``assign_rows`` and ``compensate`` take and return what the operators do. Gradients come from
autograd. So ``compensate_backward`` has no twin here, and ``compensated_kd_loss`` returns the loss
alone, where the operator takes two more arguments (``need_grad``, ``dictionary_grad``) and returns
six gradients besides.

Arguments are not validated: :mod:`kdci_ext.functional` does that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["assign_rows", "compensate", "compensated_kd_loss", "confounder_dictionary"]

INERTIA_ROUNDING = 1e-9
"""Part of the points' sum of squares that a difference of inertias may owe to rounding."""


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the type to compute in.

    Args:
        *tensors: The inputs.

    Returns:
        float64 if any input is float64, else float32.
    """
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def confounder_dictionary(
    features: Tensor,
    uniforms: Tensor,
    initial_prototypes: Tensor | None,
    num_components: int,
    max_iter: int,
    tol: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cluster ``features`` [n, d] into K prototypes; see ``functional.confounder_dictionary``.

    Args:
        features: Rows to cluster, [n, d], any floating type.
        uniforms: Draws in [0, 1), [K, candidates] float64; one row per prototype.
        initial_prototypes: Starting prototypes [K, d] instead of k-means++, or None.
        num_components: PCA components q to cluster in, 1 <= q <= d; d means no PCA.
        max_iter: Lloyd iterations at most.
        tol: Stop when an iteration lowers the inertia by at most ``tol`` times the inertia.
        momentum: How far the centres go beyond the means, in steps of the last one.

    Returns:
        prototypes [K, d] and proportions [K], float32 (float64 for float64 features), labels [n]
        int64, inertia [] float64 and the number of iterations [] int64. All but the labels and the
        number of iterations are NaN where an input is not finite.

    Example:
        >>> rows, uniforms = torch.randn(256, 10), torch.rand(8, 4, dtype=torch.float64)
        >>> found = reference.confounder_dictionary(rows, uniforms, None, 7, 50, 2e-4, 0.9)
        >>> [tuple(value.shape) for value in found]
        [(8, 10), (8,), (256,), (), ()]
    """
    num_prototypes = uniforms.shape[0]
    dtype = accumulate_dtype(features)
    rows = features.to(dtype)
    n = rows.shape[0]
    mean = rows.double().sum(0) / n
    start = mean if initial_prototypes is None else initial_prototypes
    if not (bool(torch.isfinite(mean).all()) and bool(torch.isfinite(start).all())):
        nan = rows.new_full((), float("nan"))
        return (
            nan.expand(num_prototypes, rows.shape[1]).clone(),
            nan.expand(num_prototypes).clone(),
            torch.zeros(n, dtype=torch.int64, device=rows.device),
            nan.double(),
            torch.zeros((), dtype=torch.int64, device=rows.device),
        )
    # A power of two changes no digit, and keeps squares of tiny and huge rows representable.
    centered = rows.double() - mean
    _, exponent = torch.frexp(centered.abs().max())
    points = torch.ldexp(centered, -exponent).to(dtype)
    scaled_mean = mean
    basis = None
    if num_components < rows.shape[1]:
        covariance = points.double().T @ points.double()
        basis = torch.linalg.eigh(covariance).eigenvectors[:, -num_components:].to(dtype)
        points = points @ basis
    if initial_prototypes is None:
        sample = points[_sample(n, num_prototypes).to(points.device)]
        centers = sample[_plus_plus(sample, uniforms)]
    else:
        shifted = torch.ldexp(initial_prototypes.double() - scaled_mean, -exponent).to(dtype)
        centers = shifted if basis is None else shifted @ basis
    labels, centers, num_iter = _lloyd(points, centers, max_iter, tol, momentum)

    offsets = points.double() - centers[labels].double()
    inertia = torch.ldexp(offsets.square().sum(), 2 * exponent)
    counts = torch.bincount(labels, minlength=num_prototypes)
    sums = mean.new_zeros(num_prototypes, rows.shape[1]).index_add_(0, labels, rows.double())
    prototypes = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), mean)
    return (
        prototypes.to(dtype),
        (counts.double() / n).to(dtype),
        labels,
        inertia,
        torch.tensor(num_iter, device=rows.device),
    )


def _squared_distances(points: Tensor, centers: Tensor) -> Tensor:
    """Squared distances [n, K] by differences, so that equal rows are exactly 0 apart."""
    return torch.stack(
        [(points.double() - center.double()).square().sum(1) for center in centers], 1
    )


def _sample(n: int, num_prototypes: int) -> Tensor:
    """Return the rows that k-means++ looks at: all, or of many one of each equal stretch."""
    size = max(8192, 64 * num_prototypes)
    if n < 2 * size:
        return torch.arange(n)
    index = torch.arange(size)
    begin = index * n // size
    length = (index + 1) * n // size - begin
    # Scrambled within the stretch, lest the sample resonates with an order of the rows.
    scrambled = index * 2654435769 & 0xFFFFFFFF
    return begin + (scrambled * length >> 32)


def _plus_plus(points: Tensor, uniforms: Tensor) -> Tensor:
    """Choose rows by (greedy) k-means++ (Arthur & Vassilvitskii, SODA 2007); returns [K]."""
    n = points.shape[0]
    chosen = [min(n - 1, int(uniforms[0, 0].item() * n))]
    nearest = _squared_distances(points, points[chosen[0]][None])[:, 0]
    for draws in uniforms[1:]:
        total = nearest.sum()
        if total == 0:
            chosen.append(chosen[0])
            continue
        last = int(nearest.nonzero()[-1])
        cumulative = nearest.cumsum(0)
        picks = torch.searchsorted(cumulative, draws.to(total.device) * total, right=True)
        picks = picks.clamp(max=last)
        potentials = torch.minimum(nearest[:, None], _squared_distances(points, points[picks]))
        best = _first_least(potentials.sum(0).tolist())
        chosen.append(int(picks[best]))
        nearest = potentials[:, best]
    return torch.tensor(chosen, device=points.device)


def _first_least(potentials: list[float]) -> int:
    """Index of the least value, where a later one must be less by more than rounding.

    Exact ties are common (of two rows that are each other's nearest either leaves the same), and
    every backend must break them alike.
    """
    best = 0
    for candidate, potential in enumerate(potentials):
        if potential < potentials[best] * (1 - 1e-6):
            best = candidate
    return best


class LloydSteps:
    """Where Lloyd's iterations with momentum go, and when they stop.

    With m_t the means after iteration t the next centres are m_t + momentum (m_t - m_(t-1)). Where
    that made the inertia rise, iterating goes on from the last means.

    Args:
        centers: The start, [K, q].
        total: Sum of squares of all points about the origin.
        max_iter: Iterations at most.
        tol: Stop when an iteration lowers the inertia by at most this part of it.
        momentum: See above.

    Attributes:
        centers: What to assign the points to next.
        means: Means of the clusters after the last iteration that counts; the result.
        is_ahead: Whether ``centers`` are other than ``means``.
        iteration: Iterations made.
    """

    def __init__(
        self, centers: Tensor, total: float, max_iter: int, tol: float, momentum: float
    ) -> None:
        self.centers = self.means = centers
        self.is_ahead = False
        self.iteration = 0
        self._inertia = math.inf
        self._rounding = INERTIA_ROUNDING * total
        self._max_iter, self._tol, self._momentum = max_iter, tol, momentum

    def advance(self, has_moved: bool, means: Tensor, is_relocated: bool, inertia: float) -> bool:
        """Move the centres.

        Args:
            has_moved: Whether any label changed when the points were assigned to ``centers``.
            means: Those of the new clusters, [K, q].
            is_relocated: Whether an empty cluster was given a point.
            inertia: That of the new clusters about their means.

        Returns:
            Whether to go on; else ``self.means`` are final.
        """
        self.iteration += 1
        if self.is_ahead and inertia > self._inertia + self._rounding:
            self.centers, self.is_ahead = self.means, False
            return self.iteration < self._max_iter
        lowered, last = self._inertia - inertia, self.means
        self._inertia, self.means = inertia, means
        if self._tol > 0 and not is_relocated and lowered <= self._tol * inertia + self._rounding:
            return False
        self.centers = means
        self.is_ahead = self._momentum > 0 and has_moved and self.iteration > 1 and not is_relocated
        if self.is_ahead:
            step = means.double() - last.double()
            self.centers = (means.double() + self._momentum * step).to(means.dtype)
        return self.iteration < self._max_iter


def _lloyd(
    points: Tensor, centers: Tensor, max_iter: int, tol: float, momentum: float
) -> tuple[Tensor, Tensor, int]:
    """Alternate assignment and means; returns labels [n], their centres [K, q], iterations."""
    num_prototypes = centers.shape[0]
    rows = points.double()
    total = float(rows.square().sum())
    steps = LloydSteps(centers, total, max_iter, tol, momentum)
    labels = points.new_full(points.shape[:1], -1, dtype=torch.int64)
    is_going_on = True
    while is_going_on:
        distances = _squared_distances(points, steps.centers)
        previous, labels = labels, distances.argmin(1)
        has_moved = not torch.equal(labels, previous)
        if not (has_moved or steps.is_ahead):
            return labels, steps.centers, steps.iteration + 1
        own = distances.gather(1, labels[:, None])[:, 0]
        members = _relocate_empty(labels, own, num_prototypes)
        counts = torch.bincount(members, minlength=num_prototypes)[:, None]
        sums = rows.new_zeros(centers.shape).index_add_(0, members, rows)
        means = (sums / counts.clamp(min=1)).to(points.dtype)
        is_going_on = steps.advance(
            has_moved,
            torch.where(counts > 0, means, steps.means),
            members is not labels,
            total - float((sums.square() / counts.clamp(min=1)).sum()),
        )
    return _squared_distances(points, steps.means).argmin(1), steps.means, steps.iteration


def _relocate_empty(labels: Tensor, own: Tensor, num_prototypes: int) -> Tensor:
    """Give each empty cluster the row that is farthest from its centre, as scikit-learn does."""
    empty = (torch.bincount(labels, minlength=num_prototypes) == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return labels
    farthest = own.sort(descending=True, stable=True).indices[: len(empty)]
    farthest = farthest[own[farthest] > 0]
    if len(farthest) == 0:
        return labels
    members = labels.clone()
    members[farthest] = empty[: len(farthest)]
    return members


def assign_rows(
    features: Tensor, mean: Tensor, basis: Tensor | None, centers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign rows to the nearest centres, and sum them up; see ``sums.partial_sums``.

    Args:
        features: Rows [m, d], any floating type.
        mean: Point of the rows' space that is the origin of the centres', [d] float64.
        basis: Directions to project on, [d, q] float64, or None for q = d.
        centers: Centres [K, q] float64.

    Returns:
        labels [m] int64, of equally near centres the lowest index; squared distances [m] float64,
        0 where rounding alone can be the cause; and the sums [K, d] float64 of each label's rows.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [10.0]])
        >>> mean, centers = torch.zeros(1).double(), torch.tensor([[0.0], [10.0]]).double()
        >>> labels, distances, sums = reference.assign_rows(rows, mean, None, centers)
        >>> labels.tolist(), distances.tolist(), sums.tolist()
        ([0, 0, 1], [0.0, 1.0, 0.0], [[1.0], [10.0]])
    """
    rows = features.double()
    points = rows - mean if basis is None else (rows - mean) @ basis
    half_squares = centers.square().sum(1) / 2
    # Half the squared distance less that of the origin: one matrix product.
    scores = torch.addmm(half_squares, points, centers.T, alpha=-1)
    least, labels = scores.min(1)
    squares = points.square().sum(1)
    # What the product's rounding may have confused is told apart by differences.
    slack = 1e-12 * (squares + half_squares[labels])
    unsure = (scores <= (least + slack)[:, None]).sum(1) > 1
    labels[unsure] = _squared_distances(points[unsure], centers).argmin(1)
    distances = (points - centers[labels]).square().sum(1)
    rounding = (64 * torch.finfo(torch.float64).eps) ** 2 * (squares + mean.square().sum())
    if rows.device.type == "cpu":
        sums = rows.new_zeros(len(centers), rows.shape[1]).index_add_(0, labels, rows)
    else:  # there index_add_ adds in an order that changes
        members = torch.arange(len(centers), device=rows.device)[:, None] == labels
        sums = members.to(rows.dtype) @ rows
    return labels, torch.where(distances > rounding, distances, 0.0), sums


def compensate(
    logits: Tensor,
    prototypes: Tensor,
    proportions: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_score: Tensor,
    posterior: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Add the attention-weighted prior to ``logits``; see ``functional.compensate``.

    Args:
        logits: Student logits S, [B, d].
        prototypes: z, [K, d].
        proportions: P, [K].
        w_query: W_q, [H, d].
        w_key: W_k, [H, d].
        w_score: w_t, [H].
        posterior: Weigh by softmax(score + log P) instead of softmax(score) * P.
        scale: Factor on the prior.

    Returns:
        The compensated logits [B, d] in the type of ``logits``, and the attention weights [B, K]
        in float32, or float64 if an input is.

    Example:
        >>> s, z, p = torch.randn(4, 10), torch.randn(8, 10), torch.full((8,), 1 / 8)
        >>> w_query, w_key, w_score = torch.randn(16, 10), torch.randn(16, 10), torch.randn(16)
        >>> found = reference.compensate(s, z, p, w_query, w_key, w_score, False, 1.0)
        >>> [tuple(value.shape) for value in found]
        [(4, 10), (4, 8)]
    """
    inputs = (logits, prototypes, proportions, w_query, w_key, w_score)
    dtype = accumulate_dtype(*inputs)
    s, z, p, wq, wk, wt = (tensor.to(dtype) for tensor in inputs)
    score = torch.tanh((s @ wq.T)[:, None, :] + (z @ wk.T)[None, :, :]) @ wt
    if posterior:
        # Where P = 0 the weight is 0 and has no gradient; log 0 would make it NaN.
        present = p > 0
        log_p = torch.where(present, torch.where(present, p, 1.0).log(), float("-inf"))
        weights = torch.softmax(score + log_p, 1)
        prior = weights @ z
    else:
        weights = torch.softmax(score, 1)
        prior = weights @ (p[:, None] * z)
    return (s + scale * prior).to(logits.dtype), weights


def compensated_kd_loss(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    proportions: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_score: Tensor,
    temperature: float,
    posterior: bool,
    scale: float,
) -> Tensor:
    """KL_T(teacher || compensated student), [] ; see ``functional.compensated_kd_loss``.

    Args:
        student: Student logits S, [B, d].
        teacher: Teacher logits, [B, d], a constant.
        prototypes: z, [K, d].
        proportions: P, [K].
        w_query: W_q, [H, d].
        w_key: W_k, [H, d].
        w_score: w_t, [H].
        temperature: T > 0.
        posterior: As for :func:`compensate`.
        scale: As for :func:`compensate`.

    Returns:
        T^2 times the mean over the batch of the divergence, [] float32, or float64 if an input is.

    Example:
        >>> s, t = torch.randn(4, 10), torch.randn(4, 10)
        >>> z, p = torch.randn(8, 10), torch.full((8,), 1 / 8)
        >>> weights = torch.randn(16, 10), torch.randn(16, 10), torch.randn(16)
        >>> reference.compensated_kd_loss(s, t, z, p, *weights, 4.0, False, 1.0).shape
        torch.Size([])
    """
    dtype = accumulate_dtype(student, teacher, prototypes, proportions, w_query, w_key, w_score)
    compensated, _ = compensate(
        student.to(dtype), prototypes, proportions, w_query, w_key, w_score, posterior, scale
    )
    log_student = F.log_softmax(compensated / temperature, 1)
    log_teacher = F.log_softmax(teacher.detach().to(dtype) / temperature, 1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2
