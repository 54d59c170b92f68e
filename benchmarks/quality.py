# SPDX-License-Identifier: Apache-2.0
"""How good a dictionary is, in one space for all and in float64, so that nobody wins by doing less.

Peers cluster in subspaces of their own, where inertias cannot be compared. Here the inertia of a
partition is that of the *original* rows around their clusters' means: what the subspace has lost
and what the clustering has lost show in one number. The variance that the subspace captures, as a
fraction of all, is given beside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.peers import Problem, Solution

CHUNK = 8192


class Judge:
    """Evaluates solutions of one problem.

    The scatter matrix of the rows, [d, d], is formed once, when the first subspace is looked at.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        features = problem.features
        # In float64 without a float64 copy.
        total = sum(chunk.double().sum(0) for chunk in features.split(CHUNK))
        self.mean = total / len(features)
        self.total = float(sum((c.double() - self.mean).square().sum()
                               for c in features.split(CHUNK)))  # fmt: skip
        self._scatter: Tensor | None = None

    def check(self, solution: Solution) -> None:
        """Refuse what is no dictionary of the problem's rows.

        Raises:
            ValueError: Saying what is wrong.
        """
        (n, d), k = self.problem.features.shape, self.problem.k
        labels = solution.labels
        if labels.shape != (n,) or int(labels.min()) < 0 or int(labels.max()) >= k:
            raise ValueError(f"labels are not {n} numbers from 0 to {k - 1}")
        if solution.prototypes.shape != (k, d) or solution.proportions.shape != (k,):
            raise ValueError(f"prototypes and proportions are not of the shapes [{k}, {d}], [{k}]")
        if not bool(torch.isfinite(solution.prototypes).all()):
            raise ValueError("prototypes are not finite")
        if abs(float(solution.proportions.double().sum()) - 1) > 1e-4:
            raise ValueError("proportions do not sum to 1")

    def inertia(self, labels: Tensor) -> float:
        """Sum of squared distances of the rows to their cluster's mean, per row."""
        features, k = self.problem.features, self.problem.k
        labels = labels.long()
        sums = torch.zeros(k, features.shape[1], dtype=torch.float64, device=features.device)
        parts = zip(features.split(CHUNK), labels.split(CHUNK), strict=True)
        for rows, chosen in parts:
            sums.index_add_(0, chosen, rows.double() - self.mean)
        counts = torch.bincount(labels, minlength=k).clamp(min=1)
        between = float((sums.square().sum(1) / counts).sum())
        return (self.total - between) / len(features)

    def captured(self, basis: Tensor) -> float:
        """Fraction of the variance in the span of the columns of ``basis``, [d, q]."""
        if self._scatter is None:
            self._scatter = sum(  # type: ignore[assignment]
                centred.T @ centred
                for centred in (c.double() - self.mean for c in self.problem.features.split(CHUNK))
            )
        assert self._scatter is not None
        orthonormal = torch.linalg.qr(basis.double()).Q
        return float((orthonormal * (self._scatter @ orthonormal)).sum()) / self.total

    def captured_by_native(self) -> float:
        """Fraction of the variance that the native projection keeps.

        The library gives out no basis. With one cluster, though, its inertia in the projected space
        is by definition the variance there, and the projection does not depend on K.
        """
        from kdci_ext import build_confounder_dictionary

        one = build_confounder_dictionary(self.problem.features, 1, self.problem.q)
        return float(one.inertia) / self.total


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; the latter is NaN for a single value."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)
