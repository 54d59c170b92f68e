# SPDX-License-Identifier: Apache-2.0
"""The operators beside what people use today, on the CPU.

    python -m benchmarks.operators [--threads 1] [--quick] [--save NAME]

``dictionary``: PCA and k-means of logits, against scikit-learn's PCA and KMeans(n_init=1), with the
same rows, components, prototypes, iterations and tolerance; the inertia is given for each, as a
mean over ten seeds. ``compensation``: forward and backward against the formula in eager PyTorch.
"""

from __future__ import annotations

import argparse
import os
import statistics

# Read by the thread pools when they start; idle ones should sleep, not spin beside the measured.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from benchmarks.harness import Contender, Row, machine, measure, report, save
from kdci_ext import build_confounder_dictionary, reference
from kdci_ext.functional import compensate

DICTIONARY_SHAPES = [(256, 10, 8), (256, 100, 8), (1024, 200, 32), (1000, 1000, 32)]
COMPENSATION_SHAPES = [
    (256, 10, 8, 256),
    (256, 100, 32, 256),
    (512, 100, 128, 256),
    (256, 1000, 32, 256),
]
SEEDS = 10


def teacher_like_logits(n: int, d: int) -> torch.Tensor:
    """Rows with imbalanced classes, one peak of 2 to 10, low-rank confusion and noise, [n, d]."""
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.rand(d, generator=generator).pow(2) + 0.01
    classes = torch.multinomial(frequencies, n, replacement=True, generator=generator)
    rank = min(32, d)
    rows = 0.7 * torch.randn(n, d, generator=generator)
    confusion = torch.randn(rank, d, generator=generator)
    rows += torch.randn(n, rank, generator=generator) @ confusion / rank**0.5
    peaks = 2 + 8 * torch.rand(n, 1, generator=generator)
    return rows.scatter_add_(1, classes[:, None], peaks)


def bench_dictionary(n: int, d: int, k: int, seconds: float) -> list[Row]:
    """Time the whole dictionary: PCA, seeding, iterations, prototypes, proportions."""
    features = teacher_like_logits(n, d)
    array = features.numpy()
    components = min(d, k - 1)

    def native(seed: int = 0) -> float:
        generator = torch.Generator().manual_seed(seed)
        found = build_confounder_dictionary(features, k, generator=generator)
        return float(found.inertia)

    def scikit_learn(seed: int = 0) -> float:
        projected = PCA(components, random_state=seed).fit_transform(array)
        found = KMeans(k, n_init=1, max_iter=50, tol=1e-4, random_state=seed).fit(projected)
        return float(found.inertia_)

    contenders = [
        Contender(name, run, statistics.mean(run(seed) for seed in range(SEEDS)))
        for name, run in (("native", native), ("scikit-learn PCA+KMeans", scikit_learn))
    ]
    return measure("dictionary", f"n={n} d={d} K={k}", contenders, seconds=seconds)


def bench_compensation(batch: int, d: int, k: int, hidden: int, seconds: float) -> list[Row]:
    """Time compensation forward and backward, gradients of the logits and the three weights."""
    torch.manual_seed(0)
    logits = torch.randn(batch, d, requires_grad=True)
    prototypes, proportions = torch.randn(k, d), torch.full((k,), 1 / k)
    weights = [
        (torch.randn(*shape) / shape[-1] ** 0.5).requires_grad_()
        for shape in ((hidden, d), (hidden, d), (hidden,))
    ]
    grad = torch.randn(batch, d)

    def native() -> None:
        output = compensate(logits, prototypes, proportions, *weights)
        torch.autograd.grad(output, (logits, *weights), grad)

    def eager() -> None:
        output, *_ = reference.compensate(logits, prototypes, proportions, *weights, False, 1.0)
        torch.autograd.grad(output, (logits, *weights), grad)

    def mul_sum() -> None:
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
    shape = f"B={batch} d={d} K={k} H={hidden}"
    return measure("compensation fwd+bwd", shape, contenders, seconds=seconds)


def main() -> None:
    """Run the benchmarks and print their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of every contender")
    parser.add_argument("--quick", action="store_true", help="one shape of each, half a second")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds = 0.5 if arguments.quick else 2.0
    rows: list[Row] = []
    with threadpool_limits(arguments.threads):
        for n, d, k in DICTIONARY_SHAPES[1:2] if arguments.quick else DICTIONARY_SHAPES:
            rows += bench_dictionary(n, d, k, seconds)
        for sizes in COMPENSATION_SHAPES[2:3] if arguments.quick else COMPENSATION_SHAPES:
            rows += bench_compensation(*sizes, seconds)
    print(machine())
    report(rows)
    if arguments.save:
        print(f"written to {save(arguments.save, rows)}")


if __name__ == "__main__":
    main()
