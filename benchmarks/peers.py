# SPDX-License-Identifier: Apache-2.0
"""Who can build a confounder dictionary, each doing the whole of it.

Principal components, k-means with at most ``MAX_ITER`` iterations and tolerance ``TOL`` (or what
comes nearest to them in the peer's own terms), final labels, the means of the *original* rows of
each cluster, and proportions. All get the same rows from the same memory and no row is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdci_ext import build_confounder_dictionary

MAX_ITER = 50
TOL = 1e-4
CHUNK = 8192


@dataclass(frozen=True)
class Problem:
    """Rows [n, d] float32, the number K of clusters and q of principal components."""

    features: Tensor
    k: int
    q: int
    max_iter: int = MAX_ITER

    @property
    def array(self) -> np.ndarray:
        """The same memory as a NumPy array."""
        array: np.ndarray = self.features.numpy()
        return array


@dataclass(frozen=True)
class Solution:
    """A dictionary as a peer found it.

    Attributes:
        labels: [n] integers.
        prototypes: [K, d].
        proportions: [K].
        iterations: Lloyd iterations made, on whichever device; None where the peer does not tell.
        basis: Gives the principal directions, [d, q]; None where the peer does not tell.
    """

    labels: Tensor
    prototypes: Tensor
    proportions: Tensor
    iterations: int | Tensor | None = None
    basis: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Peer:
    """Somebody's dictionary.

    Attributes:
        name: How it is called in tables.
        modules: What it imports.
        packages: Distributions whose versions the result file names.
        solve: From a problem and a seed to the dictionary.
        devices: Where it can run.
    """

    name: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    solve: Callable[[Problem, int], Solution]
    devices: tuple[str, ...] = ("cpu",)

    def absent(self, device: str = "cpu") -> str:
        """Say why it cannot run here; empty if it can."""
        if device not in self.devices:
            return f"does not run on {device}"
        try:
            for module in self.modules:
                importlib.import_module(module)
        except (ImportError, OSError) as error:
            return " ".join(f"not installed: {error}".split())
        if self.name == "faiss-gpu" and importlib.import_module("faiss").get_num_gpus() == 0:
            return "this faiss was built without GPU support"
        return ""


def native(problem: Problem, seed: int) -> Solution:
    """Run this library."""
    found = build_confounder_dictionary(
        *(problem.features, problem.k, problem.q),
        generator=torch.Generator().manual_seed(seed),
        max_iter=problem.max_iter,
        tol=TOL,
    )
    return Solution(found.labels, found.prototypes, found.proportions, found.num_iter)


def _finish(problem: Problem, labels: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, means of the original rows, and proportions, for peers that work on NumPy arrays.

    A product with the sparse indicator matrix of the clusters is the fastest way that was found to
    sum rows by label: 2 to 3 times as fast as ``index_add_``.
    """
    from scipy.sparse import csc_matrix

    n, k = len(labels), problem.k
    ones = np.ones(n, dtype=np.float32)
    sums = csc_matrix((ones, labels, np.arange(n + 1)), shape=(k, n)) @ problem.array
    counts = np.bincount(labels, minlength=k).astype(np.float32)
    means = sums / np.maximum(counts, 1)[:, None]
    return torch.from_numpy(labels), torch.from_numpy(means), torch.from_numpy(counts / n)


def scikit_learn(problem: Problem, seed: int) -> Solution:
    """Run scikit-learn's PCA and KMeans."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    return _scikit_learn(problem, seed, PCA, KMeans)


def scikit_learn_intelex(problem: Problem, seed: int) -> Solution:
    """Run scikit-learn-intelex's PCA and KMeans; scikit-learn itself is not patched."""
    from sklearnex.cluster import KMeans
    from sklearnex.decomposition import PCA

    # What its "auto" means on these shapes, where it then warns that it is not scikit-learn's.
    return _scikit_learn(problem, seed, PCA, KMeans, svd_solver="covariance_eigh")


def _scikit_learn(
    problem: Problem, seed: int, pca_class: type, kmeans_class: type, svd_solver: str = "auto"
) -> Solution:
    pca = pca_class(problem.q, svd_solver=svd_solver, random_state=seed)
    projected = pca.fit_transform(problem.array)
    kmeans = kmeans_class(
        problem.k, n_init=1, max_iter=problem.max_iter, tol=TOL, random_state=seed
    )
    kmeans.fit(projected)
    return Solution(
        *_finish(problem, np.asarray(kmeans.labels_)),
        iterations=int(kmeans.n_iter_),
        basis=lambda: torch.from_numpy(np.array(pca.components_)).T,
    )


def _faiss(problem: Problem, seed: int, init: str, gpu: bool = False) -> Solution:
    import faiss

    array = problem.array if not gpu else problem.features.cpu().numpy()
    n, d = array.shape
    pca = faiss.PCAMatrix(d, problem.q)
    pca.max_points_per_d = n  # all rows, where it would take 1000 d
    pca.train(array)
    projected = pca.apply(array)
    kmeans = faiss.Kmeans(
        *(problem.q, problem.k),
        niter=problem.max_iter,
        seed=seed,
        gpu=gpu,
        init_method=getattr(faiss, f"ClusteringInitMethod_{init}"),
        # All rows, where it would take 256 a centre; and no warning that there are few.
        max_points_per_centroid=n,
        min_points_per_centroid=1,
        # A relative change of the inertia. On large shapes it stops after some 30 iterations where
        # scikit-learn, whose tolerance is on the centres' shift, makes 50: in favour of faiss, and
        # within 0.2 % of the inertia that it would reach with 1e-5.
        early_stop_threshold=TOL,
    )
    kmeans.train(projected)
    labels = kmeans.assign(projected)[1]
    return Solution(
        *_finish(Problem(torch.from_numpy(array), problem.k, problem.q), labels),
        iterations=len(kmeans.obj),
        basis=lambda: torch.from_numpy(faiss.vector_to_array(pca.A).reshape(problem.q, d).copy()).T,
    )


def faiss_random(problem: Problem, seed: int) -> Solution:
    """Run faiss's PCA and k-means from random rows."""
    return _faiss(problem, seed, "RANDOM")


def faiss_plusplus(problem: Problem, seed: int) -> Solution:
    """Run faiss's PCA and k-means from k-means++."""
    return _faiss(problem, seed, "KMEANS_PLUS_PLUS")


def faiss_gpu(problem: Problem, seed: int) -> Solution:
    """Run faiss's k-means on a GPU; its PCA has no GPU version."""
    return _faiss(problem, seed, "KMEANS_PLUS_PLUS", gpu=True)


def _project(features: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """Project on the leading eigenvectors of the covariance, without a centred copy."""
    n = len(features)
    mean = features.mean(0)
    covariance = torch.addmm(torch.outer(mean, mean), features.T, features, beta=-1, alpha=1 / n)
    basis = torch.linalg.eigh(covariance)[1][:, -q:].contiguous()
    return torch.addmm(-(mean @ basis), features, basis), basis


def _seed_plusplus(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: rows drawn in proportion to their squared distance to those drawn before."""
    norms = (rows * rows).sum(1)
    uniforms = torch.rand(k, generator=generator, device=rows.device)
    index = (uniforms[:1] * len(rows)).long()
    chosen, nearest = [index], torch.full_like(norms, torch.inf)
    for i in range(1, k):
        center = rows[index[0]]
        distance = torch.addmv(norms, rows, center, alpha=-2).add_(norms[index])
        nearest = torch.minimum(nearest, distance.clamp_(min=0), out=nearest)
        total = nearest.cumsum(0, dtype=torch.float64)
        index = torch.searchsorted(total, uniforms[i : i + 1] * total[-1]).clamp_(max=len(rows) - 1)
        chosen.append(index)
    return rows[torch.cat(chosen)]


def _assign(rows: Tensor, centers: Tensor, labels: Tensor, scores: Tensor) -> None:
    """Write the nearest centre of each row to ``labels``, a chunk of rows at a time."""
    half_norms = (centers * centers).sum(1) / 2
    transposed = centers.T.contiguous()
    for start in range(0, len(rows), len(scores)):
        chunk = rows[start : start + len(scores)]
        out = scores[: len(chunk)]
        torch.addmm(half_norms, chunk, transposed, alpha=-1, out=out)
        torch.argmin(out, 1, out=labels[start : start + len(scores)])


def _lloyd(
    rows: Tensor, centers: Tensor, max_iter: int, add: Callable[[Tensor, Tensor, int], Tensor]
) -> tuple[Tensor, int]:
    n, k = len(rows), len(centers)
    labels = torch.empty(n, dtype=torch.long, device=rows.device)
    scores = rows.new_empty(min(n, CHUNK), k)
    tolerance = TOL * rows.var(0, unbiased=False).mean()
    iteration, moving = 0, True
    while moving and iteration < max_iter:
        iteration += 1
        _assign(rows, centers, labels, scores)
        counts = torch.bincount(labels, minlength=k)[:, None]
        # An empty cluster keeps its centre.
        moved = torch.where(counts > 0, add(rows, labels, k) / counts.clamp(min=1), centers)
        moving = bool((moved - centers).square().sum() > tolerance)
        centers = moved
    _assign(rows, centers, labels, scores)
    return labels, iteration


def _index_add(rows: Tensor, labels: Tensor, k: int) -> Tensor:
    return rows.new_zeros(k, rows.shape[1]).index_add_(0, labels, rows)


def _sorted_add(rows: Tensor, labels: Tensor, k: int) -> Tensor:
    """Sum rows by label without atomics: sort by label, sum runs."""
    lengths = torch.bincount(labels, minlength=k)
    return torch.segment_reduce(rows[labels.argsort()], "sum", lengths=lengths, unsafe=True)


def _torch(
    problem: Problem,
    labels: Tensor,
    basis: Tensor,
    iterations: int | None = None,
    add: Callable[[Tensor, Tensor, int], Tensor] = _index_add,
) -> Solution:
    counts = torch.bincount(labels, minlength=problem.k)
    means = add(problem.features, labels, problem.k) / counts.clamp(min=1)[:, None]
    return Solution(labels, means, counts / len(labels), iterations, lambda: basis)


def plain_torch(problem: Problem, seed: int) -> Solution:
    """Run what one would write in PyTorch: eigh, k-means++, products of matrices, index_add_."""
    rows, basis = _project(problem.features, problem.q)
    generator = torch.Generator(rows.device).manual_seed(seed)
    centers = _seed_plusplus(rows, problem.k, generator)
    labels, iterations = _lloyd(rows, centers, problem.max_iter, _index_add)
    return _torch(problem, labels, basis, iterations)


def flash_style_torch(problem: Problem, seed: int) -> Solution:
    """Run k-means in the manner of Flash-KMeans in PyTorch: random start, sums of sorted rows."""
    rows, basis = _project(problem.features, problem.q)
    generator = torch.Generator(rows.device).manual_seed(seed)
    start = torch.randperm(len(rows), generator=generator, device=rows.device)[: problem.k]
    labels, iterations = _lloyd(rows, rows[start], problem.max_iter, _sorted_add)
    return _torch(problem, labels, basis, iterations, _sorted_add)


def fast_pytorch_kmeans(problem: Problem, seed: int) -> Solution:
    """Run fast_pytorch_kmeans after PyTorch's eigh; its tolerance is absolute."""
    from fast_pytorch_kmeans import KMeans

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the generator that the package draws from)
    rows, basis = _project(problem.features, problem.q)
    kmeans = KMeans(problem.k, max_iter=problem.max_iter, tol=TOL, init_method="kmeans++")
    return _torch(problem, kmeans.fit_predict(rows), basis)


def cuml(problem: Problem, seed: int) -> Solution:
    """Run cuML's PCA and KMeans (k-means||, its default start) on the same device memory."""
    import cupy
    from cuml.cluster import KMeans
    from cuml.decomposition import PCA

    pca = PCA(n_components=problem.q)
    projected = pca.fit_transform(cupy.from_dlpack(problem.features))
    kmeans = KMeans(problem.k, n_init=1, max_iter=problem.max_iter, tol=TOL, random_state=seed).fit(
        projected
    )
    labels = torch.from_dlpack(cupy.asarray(kmeans.labels_)).long()
    return _torch(problem, labels, torch.from_dlpack(cupy.asarray(pca.components_)).T)


BOTH = ("cpu", "cuda")
PEERS = (
    Peer("native", ("kdci_ext",), (), native, BOTH),
    Peer("scikit-learn", ("sklearn",), ("scikit-learn", "numpy"), scikit_learn),
    Peer("scikit-learn-intelex", ("sklearnex",), ("scikit-learn-intelex",), scikit_learn_intelex),
    Peer("faiss-random", ("faiss", "scipy"), ("faiss-cpu",), faiss_random),
    Peer("faiss-kmeans++", ("faiss", "scipy"), (), faiss_plusplus),
    Peer("torch", (), (), plain_torch, BOTH),
    Peer(
        "fast_pytorch_kmeans",
        ("fast_pytorch_kmeans",),
        ("fast_pytorch_kmeans",),
        fast_pytorch_kmeans,
        BOTH,
    ),
    Peer("torch-flash-style", (), (), flash_style_torch, ("cuda",)),
    Peer("cuml", ("cuml", "cupy"), ("cuml-cu12",), cuml, ("cuda",)),
    Peer("faiss-gpu", ("faiss", "scipy"), ("faiss-gpu",), faiss_gpu, ("cuda",)),
)
