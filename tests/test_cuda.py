# SPDX-License-Identifier: Apache-2.0
"""The CUDA operators on a GPU; skipped without one (cuda_emulation/ tests their logic there)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from strategies import LAYOUTS, Attention, make_attention, max_error, with_layout
from torch import Tensor

import kdci_ext
from kdci_ext import reference
from kdci_ext._load import native_available

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not native_available() or not kdci_ext.build_info()["cuda"],
    reason="needs a GPU, and kdci_ext built with CUDA",
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [  # n, d, K
    (1, 1, 1),
    (7, 4, 7),
    (256, 10, 8),  # one launch of one block
    (256, 100, 8),  # one launch of a cluster
    (40, 300, 6),  # more columns than rows
    (1024, 200, 32),
    (1000, 600, 20),  # projected by the grid, clustered by a cluster
    (5000, 10, 16),  # projected and iterated by the grid, seeded by a cluster
    (6000, 120, 128),  # sums of clusters have no room in shared memory, in float64 nor have centres
    (5000, 6, 300),
    (40_000, 64, 40),  # seeded on a sample
]
OPTIONS = [(posterior, scale) for posterior in (False, True) for scale in (1.0, -0.5)]


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """Compare with full float32 products."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def features_of(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logit-like rows: noise around one-hot classes."""
    generator = torch.Generator().manual_seed(n + d)
    rows = torch.randn(n, d, generator=generator)
    rows[torch.arange(n), torch.randint(d, (n,), generator=generator)] += 6
    return rows.to(dtype).cuda()


def draws(num_prototypes: int, greedy: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(num_prototypes)
    candidates = 2 + int(math.log(num_prototypes)) if greedy else 1
    return torch.rand(num_prototypes, candidates, generator=generator, dtype=torch.float64).cuda()


def dictionary(
    features: Tensor, num_prototypes: int, uniforms: Tensor | None = None
) -> tuple[Tensor, ...]:
    components = min(features.shape[1], max(1, num_prototypes - 1))
    if uniforms is None:
        uniforms = draws(num_prototypes)
    result: tuple[Tensor, ...] = torch.ops.kdci_ext.confounder_dictionary(
        features, uniforms, None, components, 50, 1e-4, 0.9
    )
    return result


def on_gpu(inputs: Attention) -> Attention:
    return Attention(*(value.cuda() for value in vars(inputs).values()))


def loss_and_gradients(inputs: Attention, posterior: bool, scale: float) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = torch.ops.kdci_ext.compensated_kd_loss(
        *inputs.loss_operands, 4.0, posterior, scale, True, True
    )
    return result


def compensated_and_gradients(
    inputs: Attention, grad: Tensor, posterior: bool, scale: float
) -> tuple[Tensor, ...]:
    compensated, *saved = torch.ops.kdci_ext.compensate(*inputs.operands, posterior, scale)
    grads = torch.ops.kdci_ext.compensate_backward(
        grad, *inputs.operands, *saved, posterior, scale, True
    )
    return (compensated, *grads)


def calls() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Every operator on every path: all kinds of teams, direct and iterated subspace."""
    inputs = on_gpu(make_attention(64, 10, 8, 64).to(torch.float32))
    grad = features_of(64, 10)
    found: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for dtype in (torch.float32, torch.float64):
        for n, d, k in SHAPES:
            # Copies from the host wait for the device: make them beforehand.
            arguments = (features_of(n, d, dtype), k, draws(k))
            found[f"dictionary {n, d, k, dtype}"] = functools.partial(dictionary, *arguments)
    plain = (features_of(5000, 10), 16, draws(16, greedy=False))
    found["dictionary, plain seeding"] = functools.partial(dictionary, *plain)
    found["compensate"] = lambda: compensated_and_gradients(inputs, grad, False, 1.0)
    found["loss"] = lambda: loss_and_gradients(inputs, True, 1.0)
    return found


# -- values ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "num_prototypes"), SHAPES)
def test_dictionary_matches_reference_and_cpu(n, d, num_prototypes, dtype):
    """The same draws lead to the same partition, or to one as good."""
    features = features_of(n, d, dtype)
    components = min(d, max(1, num_prototypes - 1))
    got = dictionary(features, num_prototypes)
    arguments = (draws(num_prototypes).cpu(), None, components, 50, 1e-4, 0.9)
    plain = reference.confounder_dictionary(features.cpu(), *arguments)
    on_cpu = torch.ops.kdci_ext.confounder_dictionary(features.cpu(), *arguments)
    for other in (plain, on_cpu):
        for one, another in zip(got, other, strict=True):
            assert one.dtype == another.dtype
            assert one.shape == another.shape
            assert one.is_cuda
    # The subspace is found by iteration: rows between two centres may fall either way.
    assert float((got[2].cpu() == plain[2]).double().mean()) >= 0.98
    assert float(got[3]) == pytest.approx(float(plain[3]), rel=1e-2, abs=1e-9)
    # Of classes alike in size the CPU stops at another subspace of nearly the variance, in which
    # the draws may meet other rows.
    assert float(got[3]) == pytest.approx(float(on_cpu[3]), rel=3e-2, abs=1e-9)
    means = torch.stack([features.double()[got[2] == i].mean(0) for i in range(num_prototypes)])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got[0].double(), means, **close)
    counts = torch.bincount(got[2], minlength=num_prototypes)
    torch.testing.assert_close(got[1].double(), counts.double() / n, **close)


@pytest.mark.parametrize("components", [1, 5, 20])
def test_subspace_holds_the_leading_variance(components):
    features = features_of(3000, 300) * torch.linspace(3, 0.2, 300).cuda()
    centered = features.double() - features.double().mean(0)
    exact = torch.linalg.svdvals(centered).square()[:components].sum()
    inertia = torch.ops.kdci_ext.confounder_dictionary(
        features, draws(1), None, components, 5, 0.0, 0.9
    )[3]
    assert float(inertia) == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_end_in_nan(bad):
    for n in (300, 6000):
        features = features_of(n, 10)
        features[n // 2, 3] = bad
        prototypes, proportions, labels, inertia, num_iter = dictionary(features, 8)
        assert bool(prototypes.isnan().all())
        assert bool(proportions.isnan().all())
        assert bool(inertia.isnan())
        assert int(labels.abs().sum()) == 0
        assert int(num_iter) == 0


def test_starting_prototypes():
    features = features_of(3000, 40)
    start = features[:6] + 0.1
    got = torch.ops.kdci_ext.confounder_dictionary(features, draws(6), start, 5, 50, 1e-4, 0.9)
    plain = reference.confounder_dictionary(
        features.cpu(), draws(6).cpu(), start.cpu(), 5, 50, 1e-4, 0.9
    )
    assert float((got[2].cpu() == plain[2]).double().mean()) >= 0.98
    start[2, 3] = math.nan
    got = torch.ops.kdci_ext.confounder_dictionary(features, draws(6), start, 5, 50, 1e-4, 0.9)
    assert bool(got[0].isnan().all())


@pytest.mark.parametrize("n", [900, 20_000])
def test_empty_clusters_take_the_farthest_rows(n):
    """Most clusters start empty, and the rows they take lie in different blocks."""
    features = features_of(n, 12)
    features[:: n // 9] *= torch.arange(3.0, 13.0).cuda()[: len(features[:: n // 9]), None]
    start = features_of(12, 12)
    start[2:11] = 1000 + 100 * features_of(9, 12)
    got = torch.ops.kdci_ext.confounder_dictionary(features, draws(12), start, 12, 6, 0.0, 0.9)
    plain = reference.confounder_dictionary(
        features.cpu(), draws(12).cpu(), start.cpu(), 12, 6, 0.0, 0.9
    )
    assert torch.equal(got[2].cpu(), plain[2])
    torch.testing.assert_close(got[0].cpu(), plain[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeding_of_many_rows_uses_a_sample(dtype):
    """Row i of the sample is one of the i-th stratum; the seeds are those of the sample alone."""
    n, sample, num_prototypes = 50_000, 8192, 5
    features = features_of(n, 5).cpu().to(dtype)
    i = torch.arange(sample)
    start, end = i * n // sample, (i + 1) * n // sample
    chosen = start + (((i * 2654435769) % 2**32 * (end - start)) >> 32)
    centered = features.double() - features.double().mean(0)
    uniforms = draws(num_prototypes).cpu()
    seeds = features[chosen[reference._plus_plus(centered[chosen], uniforms)]]
    arguments = (5, 50, 1e-4, 0.9)
    got = torch.ops.kdci_ext.confounder_dictionary(
        features.cuda(), uniforms.cuda(), None, *arguments
    )
    plain = reference.confounder_dictionary(features, uniforms, seeds, *arguments)
    assert torch.equal(got[2].cpu(), plain[2])
    assert int(got[4]) == int(plain[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [200, 20_000])
def test_rows_between_two_centres_are_decided_exactly(n, dtype):
    """Products in float32 cannot tell these centres apart; distances in float64 can."""
    features = features_of(n, 12, dtype) * 3
    start = features[:8].repeat(3, 1)
    start[8:16] += 1e-6 * features_of(8, 12, dtype)  # the rest are equal
    arguments = (12, 1, 0.0, 0.9)
    got = torch.ops.kdci_ext.confounder_dictionary(features, draws(24), start, *arguments)
    plain = reference.confounder_dictionary(
        features.cpu(), draws(24).cpu(), start.cpu(), *arguments
    )
    assert torch.equal(got[2].cpu(), plain[2])


def test_duplicates_leave_surplus_prototypes_finite():
    features = features_of(4, 6).repeat(50, 1)
    prototypes, proportions, labels, inertia, _ = dictionary(features, 9)
    assert int((proportions > 0).sum()) == 4
    assert float(inertia) == pytest.approx(0.0, abs=1e-9)
    assert bool(torch.isfinite(prototypes).all())
    torch.testing.assert_close(prototypes[labels], features)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("posterior", "scale"), OPTIONS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (33, 7, 5, 50), (256, 100, 32, 256)])
def test_compensation_and_loss_match_the_reference(sizes, posterior, scale, dtype):
    inputs = on_gpu(make_attention(*sizes, zero_proportion=True).to(dtype))
    grad = features_of(sizes[0], sizes[1], dtype)

    def of_reference(bundle: Attention) -> tuple[Tensor, ...]:
        bundle = bundle.to(bundle.logits.dtype).requires_grad_()
        compensated = reference.compensate(*bundle.operands, posterior, scale)[0]
        grads = torch.autograd.grad(compensated, bundle.operands, grad.to(compensated.dtype))
        loss = reference.compensated_kd_loss(*bundle.loss_operands, 4.0, posterior, scale)
        loss_grads = torch.autograd.grad(loss, bundle.operands)
        return (compensated.detach(), *grads, loss.detach(), *loss_grads)

    exact = of_reference(inputs.to(torch.float64))
    plain = of_reference(inputs)
    got = (
        *compensated_and_gradients(inputs, grad, posterior, scale),
        *loss_and_gradients(inputs, posterior, scale),
    )
    for part in (slice(0, 7), slice(7, 14)):
        largest = max(float(truth.abs().max()) for truth in exact[part])
        for one, other, truth in zip(got[part], plain[part], exact[part], strict=True):
            assert one.dtype == other.dtype
            rounding = 50 * torch.finfo(one.dtype).eps * max(largest, 1e-3)
            assert max_error(one, truth) <= 10 * max_error(other, truth) + rounding


@pytest.mark.parametrize("weighting", ["paper", "posterior"])
def test_gradcheck(weighting):
    inputs = on_gpu(make_attention(4, 3, 5, 6)).requires_grad_()

    def compensate(*operands: Tensor) -> Tensor:
        return kdci_ext.functional.compensate(*operands, weighting=weighting, backend="native")

    assert torch.autograd.gradcheck(compensate, inputs.operands)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    features = features_of(200, 12)
    strided = with_layout(features, layout)
    for one, other in zip(dictionary(features, 6), dictionary(strided, 6), strict=True):
        assert torch.equal(one, other)


# -- how the device is used --------------------------------------------------


def test_results_repeat_bitwise():
    for name, call in calls().items():
        for one, other in zip(call(), call(), strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize(("n", "d", "num_prototypes"), [(1024, 200, 32), (40_000, 64, 40)])
def test_races_would_show_in_many_repeats(n, d, num_prototypes):
    arguments = (features_of(n, d), num_prototypes, draws(num_prototypes))
    first = dictionary(*arguments)
    for _ in range(50):
        for one, other in zip(first, dictionary(*arguments), strict=True):
            assert torch.equal(one, other)


def test_teams_on_two_streams_do_not_wait_for_each_other():
    """Blocks of a cooperative launch run all at once, or two of them could block the device."""
    arguments = [(features_of(n, 32), 24, draws(24)) for n in (20_000, 30_000)]
    expected = [dictionary(*each) for each in arguments]
    streams = [torch.cuda.Stream() for _ in arguments]
    torch.cuda.synchronize()
    got = []
    for _ in range(10):
        for each, stream in zip(arguments, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(dictionary(*each))
    torch.cuda.synchronize()
    for i, result in enumerate(got):
        for one, other in zip(result, expected[i % 2], strict=True):
            assert torch.equal(one, other)


def test_never_waits_for_the_device():
    found = calls()
    for call in found.values():  # the first call may allocate
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in found.values():
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_updates_look_for_nan_on_request():
    """By default they do not, since looking would stall the stream."""
    bad = features_of(20, 4)
    bad[7, 2] = torch.inf
    assert bool(kdci_ext.KDCI(4, 3).cuda().update(bad).prototypes.isnan().all())
    with pytest.raises(ValueError, match=r"teacher_logits must be finite: 1 of 20 .* first row 7"):
        kdci_ext.KDCI(4, 3, check_finite=True).cuda().update(bad)


def test_runs_on_the_current_stream():
    """Work queued before on a stream is seen, and work queued after sees the results."""
    features, uniforms = features_of(4000, 32), draws(8)
    expected = dictionary(features * 2, 8, uniforms)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        got = dictionary(features * 2, 8, uniforms)
        total = got[0].sum()
    stream.synchronize()
    assert torch.equal(got[2], expected[2])
    assert torch.equal(got[0], expected[0])
    assert float(total) == pytest.approx(float(expected[0].sum()), rel=1e-5)


def test_can_be_captured_in_a_graph():
    for name, call in calls().items():
        expected = call()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call()
        for _ in range(2):
            for tensor in got:
                tensor.zero_()
            graph.replay()
            torch.cuda.synchronize()
            for one, other in zip(got, expected, strict=True):
                assert torch.equal(one, other), name


def test_a_mix_of_devices_is_refused():
    features = features_of(20, 4)
    with pytest.raises(RuntimeError, match="same CUDA device"):
        torch.ops.kdci_ext.confounder_dictionary(features, draws(3).cpu(), None, 2, 5, 0.0, 0.9)
    inputs = on_gpu(make_attention(4, 3, 2, 5))
    inputs.w_key = inputs.w_key.cpu()
    with pytest.raises(RuntimeError, match="w_key must be on the same CUDA device"):
        torch.ops.kdci_ext.compensate(*inputs.operands, False, 1.0)
