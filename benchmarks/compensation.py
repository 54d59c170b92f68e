# SPDX-License-Identifier: Apache-2.0
"""Compensation, forward and backward, beside the formula in eager PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.harness import Contender, Timer, measure
from kdci_ext import reference
from kdci_ext.functional import compensate

SHAPES = [(256, 10, 8, 256), (256, 100, 32, 256), (512, 100, 128, 256), (256, 1000, 32, 256)]
QUICK = SHAPES[:1]


@dataclass(frozen=True)
class Row:
    """A line of the result file."""

    shape: str
    contender: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    rejected: int
    noisy: int
    cores: float
    x_native: float


def bench_shape(batch: int, d: int, k: int, hidden: int, timer: Timer, seconds: float) -> list[Row]:
    """Time gradients of the logits and the three weights, for B, d, K and H."""
    torch.manual_seed(0)
    logits = torch.randn(batch, d, requires_grad=True)
    prototypes, proportions = torch.randn(k, d), torch.full((k,), 1 / k)
    weights = [
        (torch.randn(*shape) / shape[-1] ** 0.5).requires_grad_()
        for shape in ((hidden, d), (hidden, d), (hidden,))
    ]
    grad = torch.randn(batch, d)

    def native(_: int) -> None:
        output = compensate(logits, prototypes, proportions, *weights)
        torch.autograd.grad(output, (logits, *weights), grad)

    def eager(_: int) -> None:
        output, *_rest = reference.compensate(logits, prototypes, proportions, *weights, False, 1.0)
        torch.autograd.grad(output, (logits, *weights), grad)

    def mul_sum(_: int) -> None:
        w_query, w_key, w_score = weights
        query, key = logits @ w_query.T, prototypes @ w_key.T
        score = (torch.tanh(query[:, None] + key[None]) * w_score).sum(-1)
        prior = torch.softmax(score, 1) @ (proportions[:, None] * prototypes)
        torch.autograd.grad(logits + prior, (logits, *weights), grad)

    contenders = [
        Contender("native", native),
        Contender("eager PyTorch (matvec)", eager),
        Contender("eager PyTorch (mul-sum)", mul_sum),
    ]
    found = measure(contenders, timer, seconds=seconds)
    base = found["native"].median_ms
    return [
        Row(f"B={batch} d={d} K={k} H={hidden}", name, *vars(t).values(), t.median_ms / base)
        for name, t in found.items()
    ]
