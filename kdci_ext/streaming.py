# SPDX-License-Identifier: Apache-2.0
"""Confounder dictionaries of features that do not fit in memory.

:func:`stream_confounder_dictionary` reads its rows several times, a block at a time. It is made of
the sums of :mod:`kdci_ext.sums`, and so are dictionaries of rows that several processes hold.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdci_ext import _checks, functional
from kdci_ext._blocks import Blocks, RowSample
from kdci_ext.dictionary import ConfounderDictionary
from kdci_ext.functional import Backend, Seeding
from kdci_ext.reference import accumulate_dtype
from kdci_ext.sums import (
    ColumnMoments,
    PartialSums,
    PrincipalSubspace,
    column_moments,
    dictionary_of,
    lloyd_by_sums,
    partial_sums,
)

__all__ = ["stream_confounder_dictionary"]


def stream_confounder_dictionary(
    source: Any,
    num_prototypes: int,
    pca_components: int | Literal["auto"] = "auto",
    *,
    generator: torch.Generator | None = None,
    init: Seeding = "greedy",
    initial_prototypes: Tensor | None = None,
    max_iter: int = 50,
    tol: float = 2e-4,
    momentum: float = 0.9,
    chunk_rows: int = 8192,
    sample_rows: int = 16384,
    device: torch.device | str | None = None,
    backend: Backend = "auto",
) -> ConfounderDictionary:
    """Cluster rows that do not fit in memory; see :func:`build_confounder_dictionary`.

    The source is read once for the covariance and a random sample of rows, and once for each
    Lloyd iteration and the final labels. The sample is clustered first, and its prototypes are what
    the iterations start from, so that few are needed. Beside the labels, memory holds one chunk of
    the source, ``chunk_rows`` rows in float64 with their K distances, the sample, and matrices of
    size d x d and K x d. The result is bitwise the same however the source cuts its rows.

    Args:
        source: Predictions, float32, float64, bfloat16 or float16; every pass must yield the same
            rows in the same order. One of: a tensor, NumPy array or memmap [n, d]; an iterable of
            chunks [m, d] that can be iterated repeatedly, such as a list or a DataLoader without
            shuffling (of batches that are tuples the first entry is taken); a function without
            arguments that returns an iterator of chunks, a new one each time.
        num_prototypes: K, 1 <= K <= n.
        pca_components: As for :func:`build_confounder_dictionary`.
        generator: Source of the sample and of the k-means++ draws; by default PyTorch's.
        init: As for :func:`build_confounder_dictionary`.
        initial_prototypes: Start from these [K, d] instead; no sample is then drawn.
        max_iter: As for :func:`build_confounder_dictionary`.
        tol: As for :func:`build_confounder_dictionary`.
        momentum: As for :func:`build_confounder_dictionary`.
        chunk_rows: Rows worked on at a time.
        sample_rows: Rows in the sample, at least K.
        device: Where to compute, and where the result lies; by default where the chunks are.
        backend: As for :func:`kdci_ext.sums.partial_sums`: passes over CUDA tensors are plain
            PyTorch. The sample is clustered with it too, by a native kernel where ``"auto"`` finds
            one.

    Returns:
        The dictionary, with the labels of all rows in the order of the source. It is that of
        :func:`build_confounder_dictionary` from the same start, to rounding.

    Raises:
        TypeError: For an argument of the wrong type, and for an iterator, which can be read only
            once.
        ValueError: For a wrong shape, device or range; for a source that is empty, not finite, or
            not the same in each pass; for chunks of different widths or types.
        RuntimeError: For ``backend="native"`` where there is no native kernel.

    Example:
        >>> chunks = [torch.randn(100, 10) for _ in range(5)]
        >>> d = stream_confounder_dictionary(chunks, num_prototypes=8)
        >>> d.prototypes.shape, d.labels.shape
        (torch.Size([8, 10]), torch.Size([500]))
    """
    _checks.positive_int("num_prototypes", num_prototypes)
    _checks.choice("init", init, ("greedy", "plain"))
    functional._check_stopping(max_iter, tol, momentum)
    _checks.generator(generator)
    _checks.positive_int("chunk_rows", chunk_rows)
    if _checks.positive_int("sample_rows", sample_rows) < num_prototypes:
        raise ValueError(
            f"sample_rows={sample_rows} must be >= num_prototypes, {num_prototypes}: the "
            "prototypes start as rows of the sample"
        )
    if initial_prototypes is not None:
        _checks.tensor("initial_prototypes", initial_prototypes, ("K", "d"))
        _checks.size("initial_prototypes", initial_prototypes, 0, num_prototypes, "num_prototypes")
        if not bool(torch.isfinite(initial_prototypes).all()):
            raise ValueError("initial_prototypes must be finite, but hold NaN or Inf")
    blocks = Blocks(source, chunk_rows, device)

    moments, sample = _measure(blocks, sample_rows, generator, initial_prototypes is None)
    n, d = blocks.n, len(moments.mean)
    if num_prototypes > n:
        raise ValueError(f"num_prototypes={num_prototypes} must be <= the number of rows, {n}")
    num_components = functional._num_components(pca_components, num_prototypes, d)
    subspace = moments.principal_subspace(num_components)
    if initial_prototypes is None:
        initial_prototypes = functional.confounder_dictionary(
            sample,
            num_prototypes,
            num_components,
            generator=generator,
            init=init,
            max_iter=max_iter,
            tol=tol,
            momentum=momentum,
            backend=backend,
        ).prototypes
    _checks.size("initial_prototypes", initial_prototypes, 1, d, "number of feature columns")
    prototypes = initial_prototypes.detach().to(sample.device, torch.float64)
    dtype = accumulate_dtype(sample)
    del sample

    labels = torch.full((n,), -1, dtype=torch.int64, device=prototypes.device)
    total, num_iter = lloyd_by_sums(
        lambda centers: _assign_all(blocks, centers, subspace, labels, backend),
        *(prototypes, subspace, n, num_components, max_iter, float(tol), float(momentum)),
    )
    return dictionary_of(total, n, subspace, labels, num_iter, dtype)


def _measure(
    blocks: Blocks, sample_rows: int, generator: torch.Generator | None, sampled: bool
) -> tuple[ColumnMoments, Tensor]:
    """Make the first pass: the moments of all rows, and a sample of them, empty if not wanted."""
    seed = 0
    if sampled:
        drawn_on = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=drawn_on))
    sample = RowSample(sample_rows if sampled else 0, seed)
    moments = None
    for _, block in blocks:
        added = column_moments(block)
        moments = added if moments is None else moments + added
        sample.add(block)
    assert moments is not None  # a source without rows is refused
    return moments, sample.rows


def _assign_all(
    blocks: Blocks,
    prototypes: Tensor,
    subspace: PrincipalSubspace,
    labels: Tensor,
    backend: Backend,
) -> tuple[PartialSums, bool]:
    """Make a pass that brings ``labels`` up to date; say what the sums are, and if any changed."""
    total = None
    moved = torch.zeros((), dtype=torch.bool, device=labels.device)
    for first, block in blocks:
        sums, assigned = partial_sums(block, prototypes, subspace, backend=backend)
        total = sums if total is None else total + sums
        previous = labels[first : first + len(block)]
        moved |= (assigned != previous).any()
        previous.copy_(assigned)
    assert total is not None
    return total, bool(moved)
