# SPDX-License-Identifier: Apache-2.0
"""Dictionaries of small problems, and what they are held to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdci_ext import ConfounderDictionary, build_confounder_dictionary

BACKENDS = ("native", "reference")
backends = pytest.mark.parametrize("backend", BACKENDS)


def build(features: Tensor, num_prototypes: int, seed: int = 0, **options) -> ConfounderDictionary:
    generator = torch.Generator().manual_seed(seed)
    return build_confounder_dictionary(features, num_prototypes, generator=generator, **options)


def clusters(
    n: int = 90, d: int = 6, groups: int = 3, spread: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Rows around far-apart centres, and which centre each belongs to."""
    generator = torch.Generator().manual_seed(1)
    centers = 8 * torch.randn(groups, d, generator=generator)
    members = torch.arange(n) % groups
    return centers[members] + spread * torch.randn(n, d, generator=generator), members


def assert_same_partition(labels: Tensor, members: Tensor) -> None:
    pairs = set(zip(labels.tolist(), members.tolist(), strict=True))
    assert len(pairs) == len(set(members.tolist())) == len(set(labels.tolist()))


def inertia_of(points: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the means of the labelled groups, by definition."""
    return sum(
        float((group - group.mean(0)).square().sum())
        for group in (points[labels == label] for label in labels.unique())
    )
