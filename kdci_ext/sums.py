# SPDX-License-Identifier: Apache-2.0
r"""Sums over rows, from which a confounder dictionary is made where no process holds all of them.

Sums of shards can be added. :func:`column_moments` yields the principal subspace,
:func:`partial_sums` one Lloyd iteration. A dictionary of rows that several processes hold is then

>>> rows = torch.randn(512, 10)
>>> prototypes = rows[:8].double()  # the same on all processes
>>> shards = rows.split(300)  # each on a process of its own
>>> moments = column_moments(shards[0]) + column_moments(shards[1])
>>> subspace = moments.principal_subspace(7)
>>> for _ in range(20):
...     sums = [partial_sums(shard, prototypes, subspace)[0] for shard in shards]
...     total = sums[0] + sums[1]
...     prototypes = total.means(prototypes)
>>> proportions = total.counts / total.counts.sum()

where each process adds the others' with ``all_reduce()`` of :mod:`torch.distributed`:
``column_moments(shard).all_reduce()``, ``partial_sums(...)[0].all_reduce()``.

Sums and distances are in float64, so that rounding, and with it the order in which sums are added,
hardly ever shows in a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from kdci_ext import _checks, functional, reference
from kdci_ext.dictionary import ConfounderDictionary
from kdci_ext.functional import Backend
from kdci_ext.reference import LloydSteps

__all__ = [
    "ColumnMoments",
    "PartialSums",
    "PrincipalSubspace",
    "column_moments",
    "partial_sums",
]


@dataclass(frozen=True)
class PrincipalSubspace:
    """The space that rows are clustered in.

    Attributes:
        mean: Column means of all rows, [d] float64.
        basis: Orthonormal leading principal directions, [d, q] float64, or None for all of
            them, where a projection would only rotate.
        variance: Mean variance of the projected columns, [] float64.

    Example:
        >>> rows = torch.randn(64, 10)
        >>> subspace = column_moments(rows).principal_subspace(3)
        >>> subspace.mean.shape, subspace.basis.shape, subspace.variance.dtype
        (torch.Size([10]), torch.Size([10, 3]), torch.float64)
    """

    mean: Tensor
    basis: Tensor | None
    variance: Tensor

    def project(self, rows: Tensor) -> Tensor:
        """Return the coordinates of rows. Arguments are not validated.

        Args:
            rows: [m, d], any floating type.

        Returns:
            [m, q] float64.

        Example:
            >>> rows = torch.randn(64, 10)
            >>> column_moments(rows).principal_subspace(3).project(rows).shape
            torch.Size([64, 3])
        """
        centered = rows.double() - self.mean
        return centered if self.basis is None else centered @ self.basis


@dataclass(frozen=True)
class ColumnMoments:
    """Count, means and scatter of rows; those of two sets of rows add up with ``+``.

    Attributes:
        count: Number of rows, [] int64.
        mean: Column means, [d] float64; 0 without rows.
        scatter: Sum over the rows of the outer products of their offsets from ``mean``, [d, d]
            float64: ``count`` times the covariance.

    Example:
        >>> rows = torch.randn(100, 4).double()
        >>> moments = column_moments(rows[:70]) + column_moments(rows[70:])
        >>> int(moments.count)
        100
        >>> torch.testing.assert_close(moments.scatter / 100, rows.T.cov(correction=0))
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __add__(self, other: ColumnMoments) -> ColumnMoments:
        # Chan, Golub & LeVeque: unlike sums of squares, this loses nothing to far-off means.
        count = self.count + other.count
        offset = other.mean - self.mean
        share = other.count.double() / count.clamp(min=1)
        between = torch.outer(offset, offset * (self.count * share))
        return ColumnMoments(
            count, self.mean + share * offset, self.scatter + other.scatter + between
        )

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> ColumnMoments:
        """Return the moments of all processes' rows; every process of ``group`` must call it.

        Args:
            group: The processes; by default all.

        Returns:
            The moments, the same on all processes.

        Example:
            >>> store = torch.distributed.HashStore()
            >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            >>> int(column_moments(torch.randn(64, 10)).all_reduce().count)
            64
            >>> torch.distributed.destroy_process_group()
        """
        count = self.count.clone()
        distributed.all_reduce(count, group=group)
        mean = self.mean * (self.count.double() / count.clamp(min=1))
        distributed.all_reduce(mean, group=group)
        offset = self.mean - mean
        scatter = self.scatter + torch.outer(offset, offset * self.count)
        distributed.all_reduce(scatter, group=group)
        return ColumnMoments(count, mean, scatter)

    def principal_subspace(self, num_components: int) -> PrincipalSubspace:
        """Return the space of most variance.

        Args:
            num_components: q, 1 <= q <= d; with q = d the rows are centred alone.

        Returns:
            The subspace. It is as definite as the q-th eigenvalue of the covariance is different
            from the next.

        Raises:
            TypeError: For a number of components that is no int.
            ValueError: For a wrong number of components, and where the moments are of no rows or
                not finite.

        Example:
            >>> column_moments(torch.randn(64, 10)).principal_subspace(3).basis.shape
            torch.Size([10, 3])
        """
        d = len(self.mean)
        functional._components("num_components", num_components, d)
        count = int(self.count)
        if count == 0:
            raise ValueError("the moments are of no rows: there is no subspace to choose")
        if not bool(torch.isfinite(self.scatter).all()):
            raise ValueError("features are too large: sums of their squares overflow float64")
        if num_components == d:
            variances, basis = self.scatter.diagonal(), None
        else:
            variances, directions = torch.linalg.eigh(self.scatter)
            basis = directions[:, -num_components:].contiguous()
        variance = variances[-num_components:].clamp(min=0).mean() / count
        return PrincipalSubspace(self.mean, basis, variance)


@dataclass(frozen=True)
class PartialSums:
    """What one Lloyd iteration needs to know of some rows; add those of others with ``+``.

    All shapes are the same for any number of rows, so that the fields can be exchanged between
    processes one by one.

    Attributes:
        sums: Sums of the original rows of each cluster, [K, d] float64.
        counts: Rows in each cluster, [K] int64.
        inertia: Sum of squared distances to the nearest centres in the clustered space, [] float64.
        far_distances: Squared distances of the K rows farthest from their centres, [K] float64,
            descending; 0 fills up where there are fewer rows.
        far_rows: These rows, [K, d] float64: where an empty cluster goes.
        far_labels: Their clusters, [K] int64.

    Example:
        >>> rows = torch.randn(64, 10)
        >>> subspace = column_moments(rows).principal_subspace(3)
        >>> one, other = (partial_sums(part, rows[:8], subspace)[0] for part in rows.split(40))
        >>> int((one + other).counts.sum())
        64
    """

    sums: Tensor
    counts: Tensor
    inertia: Tensor
    far_distances: Tensor
    far_rows: Tensor
    far_labels: Tensor

    def __add__(self, other: PartialSums) -> PartialSums:
        return PartialSums(
            self.sums + other.sums,
            self.counts + other.counts,
            self.inertia + other.inertia,
            *_farthest(
                len(self.counts),
                torch.cat([self.far_distances, other.far_distances]),
                torch.cat([self.far_rows, other.far_rows]),
                torch.cat([self.far_labels, other.far_labels]),
            ),
        )

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> PartialSums:
        """Return the sums over all processes' rows; every process of ``group`` must call it.

        Args:
            group: The processes; by default all.

        Returns:
            The sums, the same on all processes.

        Example:
            >>> rows = torch.randn(64, 10)
            >>> subspace = column_moments(rows).principal_subspace(3)
            >>> sums, _ = partial_sums(rows, rows[:8], subspace)
            >>> store = torch.distributed.HashStore()
            >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            >>> int(sums.all_reduce().counts.sum())
            64
            >>> torch.distributed.destroy_process_group()
        """
        sums, counts, inertia = self.sums.clone(), self.counts.clone(), self.inertia.clone()
        for total in (sums, counts, inertia):
            distributed.all_reduce(total, group=group)
        far = (self.far_distances, self.far_rows, self.far_labels)
        distances, rows, labels = (torch.cat(gathered(value, group)) for value in far)
        kept = _farthest(len(counts), distances, rows, labels)
        return PartialSums(sums, counts, inertia, *kept)

    def means(self, prototypes: Tensor) -> Tensor:
        """Return the prototypes of the next iteration.

        Each is the mean of its rows. Empty clusters, in order, take the rows farthest from their
        centres; where all rows are at their centres an empty cluster stays.

        Args:
            prototypes: Those that the rows were assigned to, [K, d], any floating type.

        Returns:
            [K, d] float64.

        Raises:
            TypeError: For prototypes of the wrong type.
            ValueError: For prototypes of a wrong shape.

        Example:
            >>> rows = torch.tensor([[0.0], [1.0], [10.0]])
            >>> prototypes = rows[[0, 2]]
            >>> sums, _ = partial_sums(rows, prototypes, column_moments(rows).principal_subspace(1))
            >>> sums.means(prototypes).tolist()
            [[0.5], [10.0]]
        """
        _checks.tensor("prototypes", prototypes, ("K", "d"))
        _checks.size("prototypes", prototypes, 0, self.sums.shape[0], "number of clusters")
        _checks.size("prototypes", prototypes, 1, self.sums.shape[1], "number of columns of rows")
        filled = self.filled()
        counts = filled.counts[:, None]
        return torch.where(counts > 0, filled.sums / counts.clamp(min=1), prototypes.double())

    def filled(self) -> PartialSums:
        """Move rows to empty clusters, as :meth:`means` does.

        Returns:
            The sums and counts after it; ``self`` where no row was moved.

        Example:
            >>> rows = torch.tensor([[0.0], [1.0], [10.0]])
            >>> centres = torch.tensor([[0.0], [1.0], [50.0]])
            >>> sums, _ = partial_sums(rows, centres, column_moments(rows).principal_subspace(1))
            >>> sums.counts.tolist(), sums.filled().counts.tolist()
            ([1, 2, 0], [1, 1, 1])
        """
        empty = (self.counts == 0).nonzero()[:, 0]
        empty = empty[self.far_distances[: len(empty)] > 0]
        if len(empty) == 0:
            return self
        sums, counts = self.sums.clone(), self.counts.clone()
        rows, donors = self.far_rows[: len(empty)], self.far_labels[: len(empty)]
        sums.index_add_(0, donors, rows, alpha=-1)
        counts -= torch.bincount(donors, minlength=len(counts))
        sums[empty] = rows
        counts[empty] = 1
        return replace(self, sums=sums, counts=counts)

    def between_clusters(self, subspace: PrincipalSubspace) -> Tensor:
        """Return the rows' sum of squares about their mean, less that about the clusters' means.

        Args:
            subspace: Where squares are measured.

        Returns:
            [] float64, >= 0.

        Example:
            >>> rows = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
            >>> subspace = column_moments(rows).principal_subspace(1)
            >>> sums, _ = partial_sums(rows, rows[[0, 3]], subspace)
            >>> float(sums.between_clusters(subspace))  # of 101 about 5.5, 1 is within clusters
            100.0
        """
        counts = self.counts[:, None]
        means = subspace.project(self.sums / counts.clamp(min=1))
        return (counts * means.square()).sum()


def gathered(value: Tensor, group: distributed.ProcessGroup | None) -> list[Tensor]:
    """Exchange tensors of one shape.

    Args:
        value: This process's.
        group: The processes, or None for all.

    Returns:
        All processes' values, by rank.
    """
    parts = [torch.empty_like(value) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, value, group=group)
    return parts


def _farthest(
    count: int, distances: Tensor, rows: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the ``count`` rows of the largest distances, earlier ones first where they are equal."""
    candidates = torch.arange(len(distances), device=distances.device)
    if len(distances) > count:  # sorting them all would take longer than the rest of a block
        candidates = (distances >= distances.topk(count).values[-1]).nonzero()[:, 0]
    order = candidates[distances[candidates].sort(descending=True, stable=True).indices[:count]]
    missing = count - len(order)
    return (
        F.pad(distances[order], (0, missing)),
        F.pad(rows[order].double(), (0, 0, 0, missing)),
        F.pad(labels[order], (0, missing)),
    )


def column_moments(features: Tensor) -> ColumnMoments:
    """Sum up the first and second moments of a shard's columns.

    Args:
        features: Rows [m, d], float32, float64, bfloat16 or float16; m may be 0.

    Returns:
        The moments, on the device of ``features``.

    Raises:
        TypeError: For features of the wrong type.
        ValueError: For features of a wrong shape.

    Example:
        >>> whole = torch.randn(100, 4)
        >>> moments = column_moments(whole[:70]) + column_moments(whole[70:])
        >>> torch.testing.assert_close(moments.mean.float(), whole.mean(0))
    """
    rows = _checks.tensor("features", features, ("m", "d")).detach().double()
    count = torch.tensor(len(rows), device=rows.device)
    mean = rows.sum(0) / count.clamp(min=1)
    centered = rows - mean
    return ColumnMoments(count, mean, centered.T @ centered)


def partial_sums(
    features: Tensor,
    prototypes: Tensor,
    subspace: PrincipalSubspace,
    *,
    backend: Backend = "auto",
) -> tuple[PartialSums, Tensor]:
    """Assign a shard's rows to their nearest prototypes and sum them up.

    Args:
        features: Rows [m, d], float32, float64, bfloat16 or float16; m may be 0.
        prototypes: Current prototypes, [K, d], in the space of ``features``.
        subspace: Where distances are measured; from :meth:`ColumnMoments.principal_subspace`.
        backend: ``"native"`` is a C++ operator for CPU tensors alone, which measures distances in
            float32 for float32 and narrower features; ``"reference"`` the plain PyTorch of
            :mod:`kdci_ext.reference`, in float64. ``"auto"`` takes the first for CPU tensors and
            the second for all others: there is no CUDA kernel, and in a build with CUDA no warning
            says so.

    Returns:
        The shard's sums, and the label of each row, [m] int64. Of equally near prototypes a row
        takes the one of the lowest index.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a wrong shape or device.
        RuntimeError: For ``backend="native"`` where there is no native kernel, as for CUDA tensors.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [10.0]])
        >>> subspace = column_moments(rows).principal_subspace(1)
        >>> sums, labels = partial_sums(rows, rows[[0, 2]], subspace)
        >>> labels.tolist(), sums.counts.tolist(), sums.means(rows[[0, 2]]).tolist()
        ([0, 0, 1], [2, 1], [[0.5], [10.0]])
    """
    _checks.tensor("features", features, ("m", "d"))
    _checks.not_empty("prototypes", _checks.tensor("prototypes", prototypes, ("K", "d")))
    if not isinstance(subspace, PrincipalSubspace):
        raise TypeError(
            f"subspace must be a PrincipalSubspace, got {type(subspace).__name__}: make one with "
            "column_moments(features).principal_subspace(num_components)"
        )
    d = features.shape[1]
    _checks.size("prototypes", prototypes, 1, d, "number of columns of features")
    _checks.size("subspace.mean", subspace.mean, 0, d, "number of columns of features")
    _checks.same_device(
        {"features": features, "prototypes": prototypes, "subspace.mean": subspace.mean}
    )
    rows, num_prototypes = features.detach(), len(prototypes)
    native = functional._use_native(backend, rows.device)
    if backend == "native" and rows.device.type != "cpu":
        raise RuntimeError(
            "backend='native' cannot be used: shards have a native kernel on the CPU alone"
        )
    assign_rows = (
        torch.ops.kdci_ext.assign_rows.default
        if native and rows.device.type == "cpu"
        else reference.assign_rows
    )
    labels, distances, by_label = assign_rows(
        rows, subspace.mean, subspace.basis, subspace.project(prototypes.detach())
    )
    sums = PartialSums(
        by_label,
        torch.bincount(labels, minlength=num_prototypes),
        distances.sum(),
        *_farthest(num_prototypes, distances, rows, labels),
    )
    return sums, labels


def lloyd_by_sums(
    assign: Callable[[Tensor], tuple[PartialSums, bool]],
    start: Tensor,
    subspace: PrincipalSubspace,
    n: int,
    num_components: int,
    max_iter: int,
    tol: float,
    momentum: float,
) -> tuple[PartialSums, int]:
    """Iterate over rows that only ``assign`` knows.

    Args:
        assign: Brings the labels of all rows up to date for these centres [K, d]; returns the sums
            over all rows and whether a label changed.
        start: First centres, [K, d] float64.
        subspace: Where distances are measured.
        n: Number of rows.
        num_components: Dimension of the subspace.
        max_iter: Iterations at most.
        tol: See `LloydSteps`.
        momentum: See `LloydSteps`.

    Returns:
        The final sums, and the number of iterations.
    """
    spread = subspace.variance * num_components * n
    steps = LloydSteps(start, float(spread), max_iter, tol, momentum)
    is_going_on = True
    while is_going_on:
        total, has_moved = assign(steps.centers)
        if not (has_moved or steps.is_ahead):
            return total, steps.iteration + 1
        filled = total.filled()
        is_going_on = steps.advance(
            has_moved,
            filled.means(steps.means),
            filled is not total,
            float(spread - filled.between_clusters(subspace)),
        )
    return assign(steps.means)[0], steps.iteration


def dictionary_of(
    total: PartialSums,
    n: int,
    subspace: PrincipalSubspace,
    labels: Tensor,
    num_iter: int,
    dtype: torch.dtype,
) -> ConfounderDictionary:
    """Make a dictionary of the sums over all rows.

    Args:
        total: The sums after the last iteration.
        n: Number of rows of all processes.
        subspace: Holds the mean of all rows, which surplus prototypes take.
        labels: Of the rows that are here, [m] int64.
        num_iter: Iterations made.
        dtype: Type of prototypes and proportions.

    Returns:
        The dictionary, with these labels.
    """
    counts = total.counts[:, None]
    return ConfounderDictionary(
        torch.where(counts > 0, total.sums / counts.clamp(min=1), subspace.mean).to(dtype),
        (total.counts.double() / n).to(dtype),
        labels,
        total.inertia,
        torch.tensor(num_iter, device=labels.device),
    )
