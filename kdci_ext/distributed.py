# SPDX-License-Identifier: Apache-2.0
"""Confounder dictionaries of rows that the processes of ``torch.distributed`` share.

There are two ways to cluster them as one process would cluster them all:

- :func:`gathered_rows` brings the rows together, and every process runs the operator on them. For
  the mini-batches that KDCI clusters, of some hundred rows, this is one exchange of some kilobytes.
- :func:`distributed_confounder_dictionary` leaves the rows where they are and exchanges sums: a few
  times in each Lloyd iteration, of matrices whose size does not depend on the number of rows.

:meth:`kdci_ext.KDCI.update` with ``group`` takes the first up to ``GATHERED_ROWS`` rows.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, distributed

from kdci_ext import _checks, functional, reference
from kdci_ext.dictionary import ConfounderDictionary
from kdci_ext.functional import Backend, Seeding
from kdci_ext.sums import (
    PartialSums,
    PrincipalSubspace,
    column_moments,
    dictionary_of,
    gathered,
    lloyd_by_sums,
    partial_sums,
)

__all__ = ["GATHERED_ROWS", "distributed_confounder_dictionary", "gathered_rows"]

GATHERED_ROWS = 16384
"""Rows of all processes up to which they are clustered together rather than by sums."""


def gathered_rows(rows: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
    """Return the rows of all processes, in the order of their ranks; all of them must call it.

    Args:
        rows: This process's rows, [m, ...] of any type; m may differ between processes and be 0,
            the other dimensions and the type may not.
        group: The processes; by default all.

    Returns:
        [n, ...] with n the sum of all m, in the type of ``rows``, without gradients.

    Raises:
        TypeError: For rows that are no tensor.
        ValueError: For a tensor without dimensions.

    Example:
        >>> store = torch.distributed.HashStore()
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> gathered_rows(torch.randn(5, 3)).shape
        torch.Size([5, 3])
        >>> torch.distributed.destroy_process_group()
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows must be a tensor of shape [m, ...], got {type(rows).__name__}")
    if rows.dim() == 0:
        raise ValueError("rows must have shape [m, ...], got []: give [1] with rows[None]")
    counts = row_counts(rows, group)
    most = max(counts)
    if most == 0:
        return rows.detach()
    padding = rows.new_zeros(most - len(rows), *rows.shape[1:])
    parts = gathered(torch.cat([rows.detach(), padding]), group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def row_counts(rows: Tensor, group: distributed.ProcessGroup | None = None) -> list[int]:
    """Return how many rows each process holds; all of them must call it.

    Args:
        rows: This process's rows, [m, ...].
        group: The processes; by default all.

    Returns:
        The m of each process, by rank.
    """
    count = torch.tensor([len(rows)], device=rows.device)
    return torch.cat(gathered(count, group)).tolist()


def _first(group: distributed.ProcessGroup | None) -> int:
    """Return the global rank of a group's first process, whose random draws are everyone's."""
    return 0 if group is None else distributed.get_global_rank(group, 0)


def shared_generator(
    generator: torch.Generator | None,
    device: torch.device,
    group: distributed.ProcessGroup | None,
) -> torch.Generator:
    """Return a generator that draws on all processes what the first one's would draw.

    The first process's own generator draws; the others' are left as they are. All of them must
    call it.

    Args:
        generator: This process's, or None for PyTorch's of the device.
        device: Where the rows lie, and what processes exchange.
        group: The processes; None for all.

    Returns:
        The first process's generator, on the others a copy of it.
    """
    drawn_on = device if generator is None else generator.device
    if generator is None:
        default = torch.default_generator
        if drawn_on.type == "cuda":
            default = torch.cuda.default_generators[drawn_on.index or 0]
        generator = default
    state = generator.get_state().to(device)
    distributed.broadcast(state, _first(group), group=group)
    if distributed.get_rank(group) == 0:
        return generator
    twin = torch.Generator(drawn_on)
    twin.set_state(state.cpu())
    return twin


def share_bits(tensors: list[Tensor], group: distributed.ProcessGroup | None) -> None:
    """Overwrite tensors by the first process's: machines of other kinds may round otherwise.

    Args:
        tensors: Of the same shapes and types on all processes, all of which must call it.
        group: The processes; None for all.
    """
    for tensor in tensors:
        distributed.broadcast(tensor, _first(group), group=group)


def check_finite_rows(
    name: str, rows: Tensor, n: int, group: distributed.ProcessGroup | None
) -> None:
    """Refuse rows with NaN or Inf, whichever process holds them; all of them must call it.

    Args:
        name: What the error calls the rows.
        rows: This process's rows, [m, d].
        n: Rows of all processes.
        group: The processes.

    Raises:
        ValueError: On all processes, where one holds such a row.
    """
    bad = torch.tensor(int((~torch.isfinite(rows)).any(1).sum()), device=rows.device)
    distributed.all_reduce(bad, group=group)
    if int(bad):
        raise ValueError(
            f"{name} must be finite: {int(bad)} of the {n} rows of all processes hold NaN "
            "or Inf; drop these rows or find out where they arise"
        )


def distributed_confounder_dictionary(
    features_shard: Tensor,
    num_prototypes: int,
    pca_components: int | Literal["auto"] = "auto",
    *,
    generator: torch.Generator | None = None,
    init: Seeding = "greedy",
    initial_prototypes: Tensor | None = None,
    max_iter: int = 50,
    tol: float = 2e-4,
    momentum: float = 0.9,
    backend: Backend = "auto",
    group: distributed.ProcessGroup | None = None,
) -> ConfounderDictionary:
    """Cluster rows that several processes hold; see :func:`build_confounder_dictionary`.

    Every process of ``group`` must call it, with the same arguments but for its rows. None sees the
    others' rows: they add up their moments for the principal components, exchange the rows that
    k-means++ looks at (all up to 2 m, m = max(8192, 64 K), else m of them), and add up sums in each
    Lloyd iteration. The result is, to rounding, that of one process with all rows in the order of
    the ranks, and bitwise the same on all processes.

    Args:
        features_shard: This process's predictions [m, d], float32, float64, bfloat16 or float16;
            m may differ between processes and be 0.
        num_prototypes: K, at most the number of all rows.
        pca_components: As for :func:`build_confounder_dictionary`.
        generator: Source of the k-means++ draws, by default PyTorch's: that of the first process.
            Those of others are not used.
        init: As for :func:`build_confounder_dictionary`.
        initial_prototypes: Start from these [K, d], the same on all processes.
        max_iter: As for :func:`build_confounder_dictionary`.
        tol: As for :func:`build_confounder_dictionary`.
        momentum: As for :func:`build_confounder_dictionary`.
        backend: As for :func:`kdci_ext.sums.partial_sums`: shards of CUDA tensors are
            clustered by plain PyTorch.
        group: The processes; by default all.

    Returns:
        The dictionary of all rows, with the labels of this process's.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a wrong shape or range, and for features that are not finite; on all
            processes, whichever holds them.
        RuntimeError: For ``backend="native"`` where there is no native kernel, as for CUDA tensors.

    Example:
        >>> store = torch.distributed.HashStore()
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> d = distributed_confounder_dictionary(torch.randn(100, 10), num_prototypes=8)
        >>> torch.distributed.destroy_process_group()
        >>> d.prototypes.shape, d.labels.shape
        (torch.Size([8, 10]), torch.Size([100]))
    """
    rows = _checks.tensor("features_shard", features_shard, ("m", "d")).detach()
    device, d = rows.device, rows.shape[1]
    _checks.positive_int("num_prototypes", num_prototypes)
    num_components = functional._num_components(pca_components, num_prototypes, d)
    _checks.choice("init", init, ("greedy", "plain"))
    functional._check_stopping(max_iter, tol, momentum)
    _checks.generator(generator)
    if initial_prototypes is not None:
        _checks.tensor("initial_prototypes", initial_prototypes, ("K", "d"))
        _checks.size("initial_prototypes", initial_prototypes, 0, num_prototypes, "num_prototypes")
        _checks.size("initial_prototypes", initial_prototypes, 1, d, "number of feature columns")
    counts = row_counts(rows, group)
    n = sum(counts)
    if num_prototypes > n:
        raise ValueError(
            f"num_prototypes={num_prototypes} must be <= the number of rows of all processes, {n}"
        )
    check_finite_rows("features_shard", rows, n, group)

    subspace = column_moments(rows).all_reduce(group).principal_subspace(num_components)
    if initial_prototypes is None:
        initial_prototypes = _seed(
            *(rows, counts, num_prototypes, init, subspace),
            *(shared_generator(generator, device, group), group),
        )
    labels = torch.full((len(rows),), -1, dtype=torch.int64, device=device)

    def assign(prototypes: Tensor) -> tuple[PartialSums, bool]:
        sums, assigned = partial_sums(rows, prototypes, subspace, backend=backend)
        moved = (assigned != labels).any().long()
        distributed.all_reduce(moved, group=group)
        labels.copy_(assigned)
        return sums.all_reduce(group), bool(moved)

    total, num_iter = lloyd_by_sums(
        *(assign, initial_prototypes.detach().double(), subspace, n),
        *(num_components, max_iter, float(tol), float(momentum)),
    )
    found = dictionary_of(total, n, subspace, labels, num_iter, reference.accumulate_dtype(rows))
    share_bits([found.prototypes, found.proportions], group)
    return found


def _seed(
    rows: Tensor,
    counts: list[int],
    num_prototypes: int,
    init: Seeding,
    subspace: PrincipalSubspace,
    generator: torch.Generator,
    group: distributed.ProcessGroup | None,
) -> Tensor:
    """Choose the rows that `functional.confounder_dictionary` would choose of all, [K, d]."""
    index = reference._sample(sum(counts), num_prototypes).to(rows.device)
    first = sum(counts[: distributed.get_rank(group)])
    own = index[(index >= first) & (index < first + len(rows))] - first
    sample = gathered_rows(rows[own], group)
    candidates = 1 if init == "plain" else 2 + int(math.log(num_prototypes))
    uniforms = torch.rand(
        num_prototypes,
        candidates,
        dtype=torch.float64,
        generator=generator,
        device=generator.device,
    )
    return sample[reference._plus_plus(subspace.project(sample), uniforms)]
