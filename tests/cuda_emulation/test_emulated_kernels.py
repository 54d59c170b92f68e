# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a GPU: their sources, compiled for the host, against the reference.

``cuda_runtime.h`` beside this file runs each thread of a block as a fiber, and the blocks of a
cluster or of a cooperative launch by turns. What this cannot show is the speed of the kernels, what
nvcc makes of them, and memory ordering between blocks.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    LAYOUTS,
    Attention,
    attentions,
    feature_rows,
    make_attention,
    max_error,
    with_layout,
)
from torch import Tensor

from kdci_ext import reference

HERE = Path(__file__).resolve().parent
KERNELS = ("dictionary", "attention")
Dictionary = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

SHARED_BYTES = 227 << 10
DEVICES = {  # largest cluster, multiprocessors, bytes of shared memory of a block
    "clusters": (8, 3, SHARED_BYTES),
    "small clusters": (2, 3, SHARED_BYTES),
    "no clusters": (0, 4, 163 << 10),
    "little shared memory": (8, 2, 56 << 10),
}


@dataclass
class Emulation:
    """The operators, and the controls of the emulation."""

    ops: Any
    library: ctypes.CDLL

    def set_seed(self, seed: int) -> None:
        """Run blocks and threads in the order of ``seed``; 0 is the natural order."""
        self.library.set_seed(ctypes.c_uint64(seed))

    def set_device(self, largest_cluster: int, processors: int, shared_bytes: int) -> None:
        """Emulate a device; a largest cluster of 0 stands for none at all."""
        self.library.set_device(largest_cluster, processors, shared_bytes)

    def launches(self) -> int:
        """Kernels launched so far."""
        self.library.count_launches.restype = ctypes.c_int64
        return int(self.library.count_launches())


def build(compiler: str, folder: Path) -> Path:
    """Compile the CUDA sources for the host; KDCI_SANITIZE works here as in setup.py."""
    torch_folder = Path(torch.__file__).parent
    sanitize = os.environ.get("KDCI_SANITIZE")
    common = [f"-fsanitize={sanitize}"] if sanitize else []
    flags = [
        *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-I{HERE}"),
        *("-isystem", str(torch_folder / "include"), "-x", "c++", "-c"),
    ]
    kernels = [HERE.parents[1] / "csrc" / "cuda" / f"{name}.cu" for name in KERNELS]
    sources = [HERE / "emulation.cpp", *kernels]

    def compile_one(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        run([compiler, *common, *flags, str(source), "-o", str(output)])
        return output

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "kdci_emulated.so"
    link = ["-shared", "-Wl,-Bsymbolic,--no-as-needed", f"-L{torch_folder / 'lib'}", "-ltorch"]
    run([compiler, *common, *map(str, objects), *link, "-o", str(library)])
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stderr}", pytrace=False)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the CUDA sources for the host with")
    library = build(compiler, tmp_path_factory.mktemp("cuda_emulation"))
    torch.ops.load_library(str(library))
    return Emulation(torch.ops.kdci_ext_emulated, ctypes.CDLL(str(library)))


@pytest.fixture(autouse=True)
def _poisoned_memory_natural_order_and_device(emulation: Emulation) -> Iterator[None]:
    """Fill fresh memory with NaN, so that results show what is read before it is written."""
    emulation.set_seed(0)
    emulation.set_device(*DEVICES["clusters"])
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(deterministic)


def draws(num_prototypes: int, seed: int = 0, greedy: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    candidates = 2 + int(math.log(num_prototypes)) if greedy else 1
    return torch.rand(num_prototypes, candidates, generator=generator, dtype=torch.float64)


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator)


def assert_matches_reference(
    ops: Any,
    features: Tensor,
    uniforms: Tensor,
    start: Tensor | None = None,
    components: int | None = None,
    max_iter: int = 30,
    tol: float = 1e-4,
) -> Dictionary:
    """Compare what each row is assigned; surplus centres may change places by rounding."""
    n, d = features.shape
    arguments = (uniforms, start, components or d, max_iter, tol, 0.9)
    before = features.clone()
    got: Dictionary = ops.confounder_dictionary(features, *arguments)
    assert torch.equal(features, before)
    exact = reference.confounder_dictionary(features, *arguments)
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
    labels, exact_labels = got[2], exact[2]
    pairs = set(zip(labels.tolist(), exact_labels.tolist(), strict=True))
    assert len(pairs) == len(set(labels.tolist())) == len(set(exact_labels.tolist()))
    assert int(got[4]) == int(exact[4])
    scale = float(features.abs().max())
    prototypes, exact_prototypes = got[0][labels], exact[0][exact_labels]
    close = {"rtol": 1e-5, "atol": 1e-6 * scale}
    torch.testing.assert_close(prototypes, exact_prototypes, **close)
    torch.testing.assert_close(got[1][labels], exact[1][exact_labels])
    torch.testing.assert_close(got[3], exact[3], rtol=1e-4, atol=1e-12 * scale**2 * n)
    assert bool(torch.isfinite(got[0]).all())
    assert float(got[1].double().sum()) == pytest.approx(1.0, abs=1e-5)
    return got


# -- the emulation itself ----------------------------------------------------


def test_the_emulation_finds_divergent_and_missing_barriers(emulation):
    library = emulation.library
    library.detects_divergence.restype = ctypes.c_bool
    library.neighbours_see_each_other.restype = ctypes.c_bool
    assert library.detects_divergence()
    emulation.set_seed(7)
    assert library.neighbours_see_each_other(ctypes.c_bool(True))
    assert not library.neighbours_see_each_other(ctypes.c_bool(False))


@pytest.mark.parametrize("cooperative", [False, True])
def test_the_emulation_finds_missing_barriers_of_teams(emulation, cooperative):
    library = emulation.library
    library.teams_see_each_other.restype = ctypes.c_bool
    library.detects_deserters.restype = ctypes.c_bool
    with_barrier, without = [], []
    for seed in range(1, 5):
        emulation.set_seed(seed)
        for found, barrier in ((with_barrier, True), (without, False)):
            arguments = (ctypes.c_bool(cooperative), ctypes.c_bool(barrier))
            found.append(library.teams_see_each_other(*arguments))
    assert all(with_barrier)
    assert not any(without)
    assert library.detects_deserters()


def test_the_emulation_finds_copies_that_are_not_waited_for(emulation):
    library = emulation.library
    library.copies_come.restype = ctypes.c_bool
    assert library.copies_come(ctypes.c_bool(True))
    assert not library.copies_come(ctypes.c_bool(False))


# -- the dictionary ----------------------------------------------------------


@settings(max_examples=20)
@given(feature_rows(), st.data())
def test_dictionary_matches_the_reference(emulation, features, data):
    num_prototypes = data.draw(st.integers(1, min(features.shape[0], 12)))
    uniforms = draws(num_prototypes, data.draw(st.integers(0, 99)), data.draw(st.booleans()))
    assert_matches_reference(emulation.ops, features, uniforms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "d", "num_prototypes"),
    [
        (1, 1, 1),
        (9, 1, 3),
        (7, 4, 7),  # a prototype for every row
        (65, 5, 1),
        (40, 33, 6),  # solved by Jacobi rotations
        (100, 70, 5),  # solved by subspace iteration
        (20, 90, 6),  # more columns than rows
        (300, 6, 70),  # more centres than a tile has
    ],
)
def test_dictionary_shapes(emulation, n, d, num_prototypes, dtype):
    assert_matches_reference(
        emulation.ops,
        rows(n, d).to(dtype) + 3,
        draws(num_prototypes),
        components=min(d, max(1, num_prototypes - 1)),
    )


@pytest.mark.parametrize(
    ("n", "d", "launches"),
    [
        (300, 3, 1),  # all of it by a cluster
        (300, 260, 2),  # projected by the grid, clustered by a cluster
        (4200, 3, 3),  # projected by the grid, seeded by a cluster, iterated by the grid
    ],
)
def test_launches(emulation, n, d, launches):
    """A small problem is one launch, a large one a launch for each stage."""
    features = rows(n, d) + 4 * rows(4, d, 1)[torch.arange(n) % 4]
    before = emulation.launches()
    assert_matches_reference(emulation.ops, features, draws(4), components=min(d, 3), max_iter=4)
    assert emulation.launches() - before == launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("n", "d", "num_prototypes"),
    [
        (250, 90, 6),  # a team projects
        (290, 70, 66),  # more centres than a tile has, longer rows than are staged at once
        (4100, 4, 20),  # the grid
    ],
)
def test_devices(emulation, n, d, num_prototypes, device, dtype):
    """Whatever the team and whatever has room in shared memory, the result is the same."""
    emulation.set_device(*DEVICES[device])
    assert_matches_reference(
        emulation.ops,
        rows(n, d).to(dtype) + 3,
        draws(num_prototypes),
        components=min(d, num_prototypes - 1) if num_prototypes < 60 else d,
        max_iter=3,
    )


@pytest.mark.parametrize("n", [64, 256, 2048])
def test_many_candidates(emulation, n):
    """More of them than k-means++ has use for: rows leave shared memory to what they need."""
    emulation.set_device(*DEVICES["little shared memory"])
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(4, 512, generator=generator, dtype=torch.float64)
    features = rows(n, 40) + 4 * rows(4, 40, 1)[torch.arange(n) % 4]
    assert_matches_reference(emulation.ops, features, uniforms, max_iter=2)


@pytest.mark.parametrize(("first", "same_as"), [(math.nan, 0.0), (-1.0, 0.0), (2.0, 0.9999)])
def test_any_first_draw_names_a_row(emulation, first, same_as):
    """Nothing outside of the rows is read, whatever the operator is given."""
    got = []
    for value in (first, same_as):
        uniforms = draws(4)
        uniforms[0] = value
        arguments = (uniforms, None, 6, 1, 1e-4, 0.0)
        got.append(emulation.ops.confounder_dictionary(rows(200, 6), *arguments))
    assert torch.equal(got[0][0], got[1][0])


def test_long_rows_and_many_centres_of_the_grid(emulation):
    """Neither centres nor sums have room in shared memory; the last tile of rows is short."""
    emulation.set_device(8, 3, 56 << 10)
    before = emulation.launches()
    assert_matches_reference(
        emulation.ops, rows(700, 75), draws(90, greedy=False), max_iter=2, tol=0.0
    )
    assert emulation.launches() - before == 3


def test_seeding_of_many_rows_uses_a_sample(emulation):
    """Row i of the sample is one of the i-th stratum; the seeds are those of the sample alone."""
    n, sample, num_prototypes = 16_500, 8192, 3
    features = rows(n, 2).double() + 5 * rows(3, 2, 1)[torch.arange(n) % 3].double()
    i = torch.arange(sample)
    start, end = i * n // sample, (i + 1) * n // sample
    chosen = start + (((i * 2654435769) % 2**32 * (end - start)) >> 32)
    centered = features - features.mean(0)
    uniforms = draws(num_prototypes)
    seeds = chosen[reference._plus_plus(centered[chosen], uniforms)]
    arguments = (num_prototypes, 3, 1e-4, 0.9)
    got = emulation.ops.confounder_dictionary(features, uniforms, None, 2, *arguments[1:])
    exact = reference.confounder_dictionary(features, uniforms, features[seeds], 2, *arguments[1:])
    assert torch.equal(got[2], exact[2])
    torch.testing.assert_close(got[0], exact[0])
    assert int(got[4]) == int(exact[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_between_two_centres_are_decided_exactly(emulation, dtype):
    """Products in float32 cannot tell these centres apart; distances in float64 can."""
    features = rows(200, 12).to(dtype) * 3
    start = features[:8].repeat(3, 1)
    start[8:16] += 1e-6 * rows(8, 12, 5).to(dtype)  # the rest are equal
    arguments = (draws(24), start, 12, 1, 0.0, 0.9)
    labels = emulation.ops.confounder_dictionary(features, *arguments)[2]
    assert torch.equal(labels, reference.confounder_dictionary(features, *arguments)[2])


@pytest.mark.parametrize(("n", "d", "components"), [(70, 140, 3), (200, 150, 5), (60, 64, 1)])
def test_subspace_holds_the_leading_variance(emulation, n, d, components):
    """Of one cluster the inertia is the variance that the projection keeps."""
    features = rows(n, d) * torch.linspace(3, 0.2, d)
    centered = features.double() - features.double().mean(0)
    exact = torch.linalg.svdvals(centered).square()[:components].sum()
    inertia = emulation.ops.confounder_dictionary(
        features, draws(1), None, components, 5, 0.0, 0.9
    )[3]
    assert float(inertia) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_deficient_features(emulation, rank):
    """Directions without variance must not become NaN, nor take part."""
    features = rows(50, rank) @ rows(rank, 80, 1) if rank else torch.full((50, 80), 2.5)
    got = assert_matches_reference(emulation.ops, features, draws(4), components=6)
    assert bool(torch.isfinite(got[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_distinct_rows_than_prototypes(emulation, dtype):
    features = rows(3, 4).repeat(8, 1).to(dtype)
    prototypes, proportions, labels, inertia, _ = emulation.ops.confounder_dictionary(
        features, draws(6), None, 4, 20, 1e-4, 0.9
    )
    assert float(inertia) == pytest.approx(0.0, abs=1e-25)
    assert int((proportions > 0).sum()) == 3
    torch.testing.assert_close(prototypes[labels], features)
    surplus = prototypes[proportions == 0]
    torch.testing.assert_close(surplus, features.mean(0).expand_as(surplus))


@pytest.mark.parametrize("device", ["clusters", "no clusters"])
@pytest.mark.parametrize("n", [900, 4200])
def test_empty_clusters_take_the_farthest_rows_of_all_blocks(emulation, n, device):
    """Most clusters start empty, and the rows they take lie in different blocks."""
    emulation.set_device(*DEVICES[device])
    features = rows(n, 12)
    features[:: n // 9] *= torch.arange(3.0, 13.0)[: len(features[:: n // 9]), None]
    start = rows(12, 12, 2)
    start[2:11] = 1000 + 100 * rows(9, 12, 3)
    assert_matches_reference(
        emulation.ops, features, draws(12), start=start, components=12, max_iter=6, tol=0.0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_clusters_take_the_farthest_rows(emulation, dtype):
    features = torch.tensor([[-3.0], [-2.5], [-2.0], [2.0], [2.1], [9.0], [11.5]], dtype=dtype)
    start = torch.tensor([[-2.5], [1000.0], [2.0], [2000.0]], dtype=dtype)
    got = assert_matches_reference(
        emulation.ops, features, draws(4), start=start, components=1, tol=1e-12
    )
    assert got[2].tolist() == [0, 0, 0, 2, 2, 3, 1]


@pytest.mark.parametrize("components", [3, 40])
def test_starting_prototypes_are_projected_like_the_features(emulation, components):
    features = rows(80, 40)
    assert_matches_reference(
        emulation.ops, features, draws(5), start=features[:5] + 0.1, components=components
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starting_prototypes_that_are_not_finite_end_in_nan(emulation, dtype):
    features = rows(30, 5).to(dtype)
    start = features[:4].clone()
    start[2, 1] = math.inf
    prototypes, proportions, *_ = emulation.ops.confounder_dictionary(
        features, draws(4), start, 5, 10, 1e-4, 0.9
    )
    assert bool(prototypes.isnan().all())
    assert bool(proportions.isnan().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("components", [2, 5])
def test_features_that_are_not_finite_end_in_nan(emulation, bad, dtype, components):
    features = rows(30, 5).to(dtype)
    features[17, 3] = bad
    prototypes, proportions, labels, inertia, num_iter = emulation.ops.confounder_dictionary(
        features, draws(4), None, components, 10, 1e-4, 0.9
    )
    assert bool(prototypes.isnan().all())
    assert bool(proportions.isnan().all())
    assert bool(inertia.isnan())
    assert labels.tolist() == [0] * 30
    assert int(num_iter) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dictionary_layouts_and_types(emulation, layout, dtype):
    features = with_layout(rows(40, 6).to(dtype), layout)
    assert_matches_reference(emulation.ops, features, draws(3), components=2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(emulation, scale):
    assert_matches_reference(emulation.ops, rows(40, 6) * scale, draws(3))
    large = rows(40, 6).double() * scale**5
    assert_matches_reference(emulation.ops, large, draws(3))


# -- the compensation --------------------------------------------------------


def run_compensate(ops: Any, inputs: Attention, grad: Tensor, posterior: bool, scale: float):
    compensated, *saved = ops.compensate(*inputs.operands, posterior, scale)
    grads = ops.compensate_backward(grad, *inputs.operands, *saved, posterior, scale, True)
    return compensated, grads


def run_reference(inputs: Attention, grad: Tensor, posterior: bool, scale: float):
    inputs = inputs.to(inputs.logits.dtype).requires_grad_()
    compensated = reference.compensate(*inputs.operands, posterior, scale)[0]
    grads = torch.autograd.grad(compensated, inputs.operands, grad.to(compensated.dtype))
    return compensated.detach(), grads


def assert_close_to_exact(
    got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], terms: float = 0.0
) -> None:
    """Hold errors against float64 to ten times those of plain PyTorch in the same precision.

    Logic is at stake here, so there is room for sums that cancel, in which PyTorch may be luckier:
    rounding is that of the largest result or, if larger, of ``terms``.
    """
    largest = max(terms, *(float(truth.abs().max()) for truth in exact))
    for one, other, truth in zip(got, plain, exact, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == truth.shape
        allowed = 10 * max_error(other, truth) + 50 * torch.finfo(one.dtype).eps * largest
        assert max_error(one, truth) <= allowed + 1e-30


@settings(max_examples=20)
@given(attentions(), st.booleans(), st.sampled_from([1.0, -0.5]))
def test_compensate_matches_the_reference(emulation, inputs, posterior, scale):
    grad = rows(*inputs.logits.shape).to(inputs.logits.dtype)
    exact, exact_grads = run_reference(inputs.to(torch.float64), grad, posterior, scale)
    plain, plain_grads = run_reference(inputs, grad, posterior, scale)
    got, got_grads = run_compensate(emulation.ops, inputs, grad, posterior, scale)
    assert_close_to_exact([got], [plain], [exact])
    assert_close_to_exact(got_grads, plain_grads, exact_grads)


@settings(max_examples=20)
@given(attentions(), st.booleans(), st.sampled_from([1.0, 4.0, 20.0]))
def test_kd_loss_matches_the_reference(emulation, inputs, posterior, temperature):
    options = (temperature, posterior, 1.0)

    def of_reference(bundle: Attention):
        bundle = bundle.to(bundle.logits.dtype).requires_grad_()
        loss = reference.compensated_kd_loss(*bundle.loss_operands, *options)
        return loss.detach(), torch.autograd.grad(loss, bundle.operands)

    exact, exact_grads = of_reference(inputs.to(torch.float64))
    plain, plain_grads = of_reference(inputs)
    loss, *grads = emulation.ops.compensated_kd_loss(*inputs.loss_operands, *options, True, True)
    assert_close_to_exact([loss], [plain], [exact], terms=1.0)
    assert_close_to_exact(grads, plain_grads, exact_grads)


def test_gradients_that_are_not_asked_for_are_empty(emulation):
    inputs = make_attention(6, 5, 4, 3).to(torch.float32)
    _, *saved = emulation.ops.compensate(*inputs.operands, False, 1.0)
    grads = emulation.ops.compensate_backward(
        torch.ones(6, 5), *inputs.operands, *saved, False, 1.0, False
    )
    assert [tuple(grad.shape) for grad in grads] == [(6, 5), (0,), (0,), (3, 5), (3, 5), (3,)]
    options = (2.0, False, 1.0)
    loss, *grads = emulation.ops.compensated_kd_loss(*inputs.loss_operands, *options, False, False)
    assert all(grad.shape == (0,) for grad in grads)
    with_grad = emulation.ops.compensated_kd_loss(*inputs.loss_operands, *options, True, False)
    assert torch.equal(loss, with_grad[0])
    assert [tuple(grad.shape) for grad in with_grad[2:4]] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("logits", "objection"),
    [
        (torch.empty(0, 5), "must not be empty"),
        (torch.ones(6, 5, dtype=torch.int64), "logits must be float32"),
        (torch.ones(6, 4), "prototypes does not have the expected shape"),
    ],
)
def test_attention_refuses_what_does_not_fit(emulation, logits, objection):
    _, *prior = make_attention(6, 5, 4, 3).to(torch.float32).operands
    with pytest.raises(RuntimeError, match=objection):
        emulation.ops.compensate(logits, *prior, False, 1.0)
    with pytest.raises(RuntimeError, match=objection):
        emulation.ops.compensated_kd_loss(
            logits, torch.zeros(logits.shape), *prior, 4.0, False, 1.0, True, False
        )


def test_inputs_of_mixed_types(emulation):
    inputs = make_attention(4, 5, 3, 6)
    inputs.logits = inputs.logits.to(torch.float16)
    grad = torch.ones(4, 5, dtype=torch.float16)
    exact, exact_grads = run_reference(inputs.to(torch.float64), grad, True, 1.0)
    compensated, grads = run_compensate(emulation.ops, inputs, grad, True, 1.0)
    assert compensated.dtype == torch.float16
    torch.testing.assert_close(compensated, exact.half())
    for one, truth, operand in zip(grads, exact_grads, inputs.operands, strict=True):
        assert one.dtype == operand.dtype
        torch.testing.assert_close(one, truth.to(one.dtype))


def test_extreme_logits_of_the_loss(emulation):
    """Probabilities that underflow add nothing, as 0 log 0 = 0 says."""
    inputs = make_attention(3, 4, 2, 3).to(torch.float32)
    inputs.teacher = torch.tensor([[1e4, 0, 0, 0], [0, -1e4, 0, 0], [1e30, 0, 0, 0]])
    loss, grad, *_ = emulation.ops.compensated_kd_loss(
        *inputs.loss_operands, 1.0, False, 1.0, True, True
    )
    exact = reference.compensated_kd_loss(*inputs.to(torch.float64).loss_operands, 1.0, False, 1.0)
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
    assert bool(torch.isfinite(grad).all())


# -- races and errors --------------------------------------------------------


def test_the_order_of_threads_and_blocks_does_not_matter(emulation):
    """A missing barrier would show as a difference between orders."""
    inputs = make_attention(37, 12, 9, 40).to(torch.float32)
    grad = rows(37, 12)

    def everything() -> list[Tensor]:
        found: list[Tensor] = []
        for device in DEVICES.values():
            emulation.set_device(*device)
            found += emulation.ops.confounder_dictionary(
                rows(90, 170), draws(6), None, 5, 6, 1e-4, 0.9
            )
        found += emulation.ops.confounder_dictionary(
            rows(290, 70), draws(66, greedy=False), None, 70, 2, 0.0, 0.9
        )
        wide = emulation.ops.confounder_dictionary(
            rows(50, 140).double(), draws(6), None, 5, 6, 1e-4, 0.9
        )
        wild = emulation.ops.confounder_dictionary(
            rows(5, 3).repeat(9, 1), draws(9), rows(9, 3, 4) * 9, 3, 6, 1e-4, 0.9
        )
        large = emulation.ops.confounder_dictionary(
            rows(4200, 3), draws(9), rows(9, 3, 4) * 9, 3, 3, 0.0, 0.9
        )
        compensated, grads = run_compensate(emulation.ops, inputs, grad, True, 1.0)
        loss = emulation.ops.compensated_kd_loss(*inputs.loss_operands, 4.0, False, 1.0, True, True)
        return [*found, *wide, *wild, *large, compensated, *grads, *loss]

    results = []
    for seed in (0, 1, 20):
        emulation.set_seed(seed)
        results.append(everything())
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)


def test_wrong_shapes_are_refused(emulation):
    inputs = make_attention(4, 5, 3, 6)
    inputs.w_key = inputs.w_key[:, :4]
    with pytest.raises(RuntimeError, match="w_key does not have the expected shape"):
        emulation.ops.compensate(*inputs.operands, False, 1.0)
    with pytest.raises(RuntimeError, match="num_components"):
        emulation.ops.confounder_dictionary(rows(4, 3), draws(2), None, 4, 5, 0.0, 0.9)
