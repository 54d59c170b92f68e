"""One process of a sharded dictionary, in a module that starts quickly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from kdci_ext.sums import PartialSums, column_moments, partial_sums


def mixture(n: int, d: int, seed: int = 3) -> Tensor:
    """Rows of ten overlapping clouds."""
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(10, d, generator=generator)
    members = torch.randint(10, (n,), generator=generator)
    return centers[members] + torch.randn(n, d, generator=generator)


def dictionary_of_shard(
    shard: Tensor, start: Tensor, reduce: Callable[[Any], Any]
) -> tuple[Tensor, PartialSums]:
    """Iterate from ``start``; ``reduce`` adds the other shards' moments and sums."""
    subspace = reduce(column_moments(shard)).principal_subspace(4)
    prototypes = start
    for _ in range(9):
        total = reduce(partial_sums(shard, prototypes, subspace)[0])
        prototypes = total.means(prototypes)
    return prototypes, total


def process(rank: int, folder: str) -> None:
    """Make the dictionary of the rows and start in ``folder``, knowing one shard of the rows."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    features, start = torch.load(f"{folder}/rows.pt")
    shard = features.split([130, 70])[rank]
    prototypes, total = dictionary_of_shard(shard, start, lambda part: part.all_reduce())
    torch.save((prototypes, vars(total)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
