"""The confounder dictionary: native kernels against the reference, and the laws of k-means."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from dictionaries import BACKENDS, assert_same_partition, backends, build, clusters, inertia_of
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from strategies import DTYPES, LAYOUTS, feature_rows, many_rows, with_layout
from torch import Tensor

import kdci_ext
from kdci_ext import build_confounder_dictionary

# -- against the reference ---------------------------------------------------


@given(feature_rows(), st.data())
def test_matches_the_reference(features, data):
    """From equal draws the kernels choose the rows that the reference chooses and end where it
    ends, after as many iterations; in every type, for every layout. Where all rows lie on their
    prototypes, rounding decides whether a centre that none is left for moves once more.
    """
    n, d = features.shape
    num_prototypes = data.draw(st.integers(1, min(n, 12)))
    options = {
        "seed": data.draw(st.integers(0, 99)),
        "init": data.draw(st.sampled_from(["greedy", "plain"])),
        "pca_components": d,
    }
    native, exact = (
        build(features, num_prototypes, backend=backend, **options) for backend in BACKENDS
    )
    assert_same_partition(native.labels, exact.labels)
    scale = float(features.abs().max())
    rounding = 8 * torch.finfo(features.dtype).eps * scale
    if float(exact.inertia) > n * rounding**2:
        assert int(native.num_iter) == int(exact.num_iter)
    # Between duplicates a surplus centre may win or lose a row by rounding: compare what each row
    # is assigned, not the numbers of the clusters.
    torch.testing.assert_close(
        native.prototypes[native.labels],
        exact.prototypes[exact.labels],
        rtol=1e-5,
        atol=1e-6 * scale,
    )
    torch.testing.assert_close(native.proportions[native.labels], exact.proportions[exact.labels])
    torch.testing.assert_close(native.inertia, exact.inertia, rtol=1e-4, atol=1e-12 * scale**2 * n)


@given(many_rows(), st.sampled_from([20, 50, 130]), st.integers(0, 9))
def test_rows_end_with_their_nearest_prototype(features, num_prototypes, seed):
    """Rows are skipped while no other centre can have come nearer, and scored in integers first:
    still, where iterations end because no label changes, every row is nearest to its own prototype
    and every prototype is the mean of its rows.
    """
    d = build(
        *(features, num_prototypes, seed),
        pca_components=features.shape[1],
        tol=0.0,
        max_iter=1000,
        backend="native",
    )
    assert int(d.num_iter) < 1000
    scale = float(features.abs().max())
    mean = features.double().mean(0)
    rows = (features.double() - mean) / scale
    prototypes = (d.prototypes.double() - mean) / scale
    used = (d.proportions > 0).nonzero()[:, 0]
    squares = torch.cdist(
        rows, prototypes[used], compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    own = (rows - prototypes[d.labels]).square().sum(1)
    # Rows were centred in their own type: the spread is what the rounding is relative to.
    rounding = 64 * torch.finfo(features.dtype).eps * rows.square().sum(1).max()
    assert bool((own <= squares.amin(1) + rounding).all())
    counts = torch.bincount(d.labels, minlength=num_prototypes)
    frequencies = (counts.double() / len(rows)).to(d.proportions)
    torch.testing.assert_close(d.proportions, frequencies, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [16_384, 40_001])
def test_seeds_on_the_references_sample_of_many_rows(n):
    """From 2 x 8192 rows on, k-means++ looks at one row of each of 8192 stretches."""
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(n, 5, generator=generator).cumsum(0)  # an order that a sample could miss
    native, exact = (
        build(features, 5, pca_components=5, max_iter=2, backend=backend) for backend in BACKENDS
    )
    assert torch.equal(native.labels, exact.labels)
    torch.testing.assert_close(native.prototypes, exact.prototypes)


def clustered(kind: str) -> Tensor:
    """3000 rows in 24 clusters whose distances are hard to resolve beside the rows' lengths."""
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(24, 12, generator=generator)
    rows = centers[torch.arange(3000) % 24]
    if kind == "equal":
        return rows
    rows = rows + 0.05 * torch.randn(3000, 12, generator=generator)
    if kind == "an outlier":
        rows[5] *= 1e5
    elif kind == "some outliers":
        rows[:8] *= 3e3
    elif kind == "clusters of clusters":
        rows += 1e4 * torch.randn(4, 12, generator=generator)[torch.arange(3000) % 4]
    return rows


@pytest.mark.parametrize(
    "kind", ["apart", "equal", "an outlier", "some outliers", "clusters of clusters"]
)
@pytest.mark.parametrize("num_prototypes", [25, 40])
def test_small_distances_count_beside_large_ones(kind, num_prototypes):
    """Integers and products stand in for squared differences only as long as these resolve the
    rows: from the same draws clusters are as good as the reference's.
    """
    rows = clustered(kind)
    native, exact = (
        statistics.median(
            float(build(rows, num_prototypes, seed, pca_components=12, backend=backend).inertia)
            for seed in range(5)
        )
        for backend in BACKENDS
    )
    assert native <= 1.02 * exact


def test_many_rows_on_any_number_of_threads(two_threads):
    """Sums over clusters are made in integers, so how threads share the rows changes no bit."""
    generator = torch.Generator().manual_seed(9)
    features = torch.randn(30_000, 40, generator=generator)
    one, two = two_threads(lambda: build(features, 24, max_iter=8))
    again = build(features, 24, max_iter=8)
    for other in (two, again):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.prototypes, other.prototypes)
        assert torch.equal(one.inertia, other.inertia)


def test_memory_is_that_of_the_projected_rows():
    """Beside its results the operator takes at most 1.15 times the projected rows."""
    features = torch.randn(600_000, 10)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        build(features, 128, pca_components=8, max_iter=1)
    workspace = max(e.self_cpu_memory_usage for e in profile.events())
    assert 4 * 8 * 600_000 < workspace <= 1.15 * 4 * 8 * 600_000


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_column_far_away_does_not_drown_the_others(backend, dtype):
    """Rows are scaled by their spread; a column that is 60 decades larger must not overflow."""
    features = torch.randn(64, 3, dtype=dtype) * 1e-30
    plain = build(features, 4, pca_components=3, backend=backend)
    features[:, 0] = 1e30
    d = build(features, 4, pca_components=3, backend=backend)
    assert bool(torch.isfinite(d.prototypes).all())
    assert 0 < float(d.inertia) < 10 * float(plain.inertia)


@pytest.mark.parametrize(
    ("n", "d", "k"), [(256, 10, 8), (256, 100, 8), (400, 200, 32), (60, 300, 8)]
)
def test_quality_equals_scikit_learn(n, d, k):
    """On logit-like rows the mean inertia over seeds is that of scikit-learn's PCA and k-means,
    to 3 %, and the variance captured is that of its exact PCA.
    """
    generator = torch.Generator().manual_seed(2)
    classes = torch.randint(d, (n,), generator=generator)
    features = torch.randn(n, d, generator=generator)
    features += 5 * torch.nn.functional.one_hot(classes, d)
    components = min(d, k - 1)
    projected = PCA(components, svd_solver="full").fit_transform(features.double().numpy())
    ours, theirs = [], []
    for seed in range(8):
        ours.append(float(build(features, k, seed).inertia))
        theirs.append(KMeans(k, n_init=1, random_state=seed, max_iter=50).fit(projected).inertia_)
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.03)


# -- the laws that scikit-learn's k-means is tested by -----------------------


@backends
def test_toy_result_by_hand(backend):
    """Two pairs on a line: means 0.5 and 10.5, four squared halves of inertia."""
    features = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    d = build(features, 2, initial_prototypes=torch.tensor([[0.0], [11.0]]), backend=backend)
    assert d.labels.tolist() == [0, 0, 1, 1]
    assert d.prototypes.tolist() == [[0.5], [10.5]]
    assert d.proportions.tolist() == [0.5, 0.5]
    assert float(d.inertia) == pytest.approx(1.0)


@backends
@pytest.mark.parametrize("pca_components", ["auto", 6])
def test_finds_separated_clusters(backend, pca_components):
    features, members = clusters()
    d = build(features, 3, pca_components=pca_components, backend=backend)
    assert_same_partition(d.labels, members)


@backends
def test_empty_cluster_is_reseeded_at_the_farthest_row(backend):
    """A starting centre that wins no row takes the row farthest from its own centre."""
    features = torch.tensor([[-3.0], [-2.5], [-2.0], [2.0], [2.1], [9.0]])
    start = torch.tensor([[-2.5], [2.0], [1000.0]])
    d = build(features, 3, initial_prototypes=start, backend=backend, tol=0.0)
    assert d.labels.tolist() == [0, 0, 0, 1, 1, 2]
    sklearn = KMeans(3, init=start.numpy(), n_init=1).fit(features.numpy())
    assert float(d.inertia) == pytest.approx(sklearn.inertia_)


@backends
def test_same_start_gives_scikit_learns_result(backend):
    """From equal starting centres Lloyd's iterations without momentum are scikit-learn's."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(200, 5, generator=generator)
    start = features[:7].clone()
    theirs = KMeans(7, init=start.numpy(), n_init=1, tol=0, max_iter=50).fit(features.numpy())
    options = {"pca_components": 5, "tol": 0.0, "momentum": 0.0}
    d = build(features, 7, initial_prototypes=start, backend=backend, **options)
    assert d.labels.tolist() == theirs.labels_.tolist()
    assert int(d.num_iter) == theirs.n_iter_
    assert float(d.inertia) == pytest.approx(theirs.inertia_, rel=1e-5)


@backends
def test_one_iteration_by_hand(backend):
    """max_iter=1 makes one step: assign to the start, move the centres, assign to them."""
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    start = features[:4]
    first = torch.cdist(features, start).argmin(1)
    moved = torch.stack([features[first == i].mean(0) for i in range(4)])
    expected = torch.cdist(features, moved).argmin(1)
    d = build(
        *(features, 4),
        initial_prototypes=start,
        pca_components=3,
        max_iter=1,
        tol=0.0,
        backend=backend,
    )
    assert torch.equal(d.labels, expected)
    assert int(d.num_iter) == 1


@backends
def test_a_local_optimum_is_a_fixed_point(backend):
    """Restarting from the result changes nothing."""
    features, _ = clusters(spread=2.0)
    first = build(features, 3, tol=0.0, pca_components=6, backend=backend)
    again = build(
        *(features, 3),
        initial_prototypes=first.prototypes,
        tol=0.0,
        pca_components=6,
        backend=backend,
    )
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.prototypes, again.prototypes)
    assert int(again.num_iter) <= 2


@backends
def test_zero_tolerance_stops_when_labels_repeat(backend):
    features, _ = clusters(n=300, spread=3.0)
    d = build(features, 5, tol=0.0, max_iter=300, backend=backend)
    assert 1 < int(d.num_iter) < 300


@backends
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_more_iterations_never_raise_the_inertia(backend, momentum):
    """Plain iterations lower it one by one; with momentum one may go too far, but never ends above
    the first.
    """
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(150, 4, generator=generator)
    options = {"tol": 0.0, "momentum": momentum, "backend": backend}
    inertias = [float(build(features, 6, max_iter=m, **options).inertia) for m in range(1, 9)]
    pairs = (
        itertools.pairwise(inertias)
        if momentum == 0
        else zip(inertias[:1] * 7, inertias[1:], strict=True)
    )
    assert all(b <= a * (1 + 1e-6) for a, b in pairs)


@backends
def test_two_steps_of_momentum_by_hand(backend):
    """After two means m1 and m2 the third assignment is to m2 + momentum (m2 - m1)."""
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(60, 2, generator=generator, dtype=torch.float64)

    def step(centers: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.cdist(features, centers).argmin(1)
        return labels, torch.stack([features[labels == i].mean(0) for i in range(4)])

    _, first = step(features[:4])
    _, second = step(first)
    labels, third = step(second + 0.5 * (second - first))
    assert not torch.equal(labels, step(second)[0])  # else this would show nothing
    d = build(
        *(features, 4),
        initial_prototypes=features[:4],
        max_iter=3,
        tol=0.0,
        momentum=0.5,
        backend=backend,
    )
    assert torch.equal(d.labels, step(third)[0])


@backends
def test_momentum_ends_lower_in_fewer_iterations(backend):
    """What it is for: over seeds, a lower inertia after fewer iterations."""
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(1500, 8, generator=generator)
    plain, ahead = (
        [build(features, 12, seed, momentum=m, backend=backend) for seed in range(4)]
        for m in (0.0, 0.9)
    )
    for name in ("inertia", "num_iter"):
        mean = [sum(float(getattr(d, name)) for d in found) for found in (ahead, plain)]
        assert mean[0] < mean[1], name


@backends
def test_a_step_too_far_is_taken_back(backend):
    """With a momentum that overshoots, the result is as good as any iteration has been: a fixed
    point, or at least not above what plain iterations from the same start reach in two.
    """
    generator = torch.Generator().manual_seed(9)
    features = torch.randn(80, 2, generator=generator)
    options = {"initial_prototypes": features[:5], "backend": backend}
    plain = build(features, 5, momentum=0.0, max_iter=2, **options)
    far = build(features, 5, momentum=0.999, tol=0.0, max_iter=500, **options)
    assert int(far.num_iter) < 500
    assert float(far.inertia) <= float(plain.inertia) * (1 + 1e-6)


@given(feature_rows(), st.data())
def test_returned_quantities_agree_with_each_other(features, data):
    """Whatever the input: proportions are the labels' frequencies, prototypes the means of the
    original rows, inertia the distances by definition, and all is finite.
    """
    n, d = features.shape
    num_prototypes = data.draw(st.integers(1, min(n, 20)))
    got = build(features, num_prototypes, pca_components=d, tol=0.0, max_iter=300)
    rows = features.double()
    counts = torch.bincount(got.labels, minlength=num_prototypes)
    assert int(got.labels.min()) >= 0
    torch.testing.assert_close(got.proportions.double(), counts.double() / n, rtol=1e-6, atol=0)
    scale = float(rows.abs().max())
    for i in range(num_prototypes):
        expected = rows[got.labels == i].mean(0) if counts[i] > 0 else rows.mean(0)
        torch.testing.assert_close(
            got.prototypes[i].double(), expected, rtol=1e-5, atol=1e-6 * scale
        )
    assert bool(torch.isfinite(got.prototypes).all())
    assert bool(torch.isfinite(got.inertia))
    # In float32 the centred rows are rounded once, which distances between duplicates show.
    assert float(got.inertia) == pytest.approx(
        inertia_of(rows, got.labels), rel=1e-4, abs=1e-12 * n * d * scale**2
    )


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_fewer_distinct_rows_than_prototypes(backend, dtype):
    """Surplus prototypes have proportion 0 and finite values; the rest are the distinct rows."""
    distinct = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25]], dtype=dtype)
    features = distinct[torch.arange(30) % 3]
    d = build(features, 7, backend=backend)
    used = d.proportions > 0
    assert int(used.sum()) == 3
    assert float(d.inertia) == pytest.approx(0.0, abs=1e-28)  # a mean of equal rows may round
    assert sorted(d.prototypes[used].tolist()) == sorted(distinct.tolist())
    assert bool(torch.isfinite(d.prototypes).all())


@backends
def test_as_many_prototypes_as_rows(backend):
    features = torch.randn(9, 4)
    d = build(features, 9, backend=backend)
    assert sorted(d.labels.tolist()) == list(range(9))
    assert float(d.inertia) == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(d.prototypes[d.labels], features)


@backends
def test_one_prototype_is_the_mean(backend):
    features = torch.randn(50, 6) + 100
    d = build(features, 1, backend=backend)
    torch.testing.assert_close(d.prototypes[0], features.mean(0))
    assert d.proportions.tolist() == [1.0]


@backends
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(backend, scale):
    """Scaling all rows scales the prototypes and leaves the labels alone, far from 1 as well."""
    features, members = clusters()
    d = build(features * scale, 3, backend=backend)
    assert_same_partition(d.labels, members)
    assert bool(torch.isfinite(d.prototypes).all())
    plain = build(features, 3, backend=backend)
    assert float(d.inertia) / scale**2 == pytest.approx(float(plain.inertia), rel=1e-4)


@given(st.integers(0, 50))
def test_translation_and_rotation_leave_the_partition(seed):
    """k-means knows distances only."""
    features, members = clusters()
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    moved = features @ rotation + 20 * torch.randn(6, generator=generator)
    for pca_components in (6, "auto"):
        d = build(moved, 3, seed, pca_components=pca_components, backend="native")
        assert_same_partition(d.labels, members)


@given(st.permutations(range(30)))
def test_permuting_the_rows_permutes_the_labels(order):
    features, members = clusters(n=30)
    d = build(features[order], 3, backend="native")
    assert_same_partition(d.labels, members[order])


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter_and_input_is_left_alone(backend, layout):
    features, _ = clusters()
    view = with_layout(features, layout)
    before = view.clone()
    d = build(view, 3, backend=backend)
    plain = build(features, 3, backend=backend)
    assert torch.equal(view, before)
    assert torch.equal(d.labels, plain.labels)
    assert torch.equal(d.prototypes, plain.prototypes)


def test_half_precision_follows_float32():
    """The narrow types are clustered in float32, as if they had been converted first."""
    features, _ = clusters()
    for dtype in (torch.bfloat16, torch.float16):
        narrow = build(features.to(dtype), 3, backend="native")
        wide = build(features.to(dtype).float(), 3, backend="native")
        assert torch.equal(narrow.labels, wide.labels)
        assert torch.equal(narrow.prototypes, wide.prototypes)
        assert narrow.prototypes.dtype == torch.float32


# -- determinism -------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "k"), [(300, 10, 8), (5000, 40, 16), (700, 130, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_and_repeats_change_no_bit(two_threads, n, d, k, dtype):
    features = torch.randn(n, d, dtype=dtype)
    one, two = two_threads(lambda: build(features, k, backend="native"))
    again = build(features, k, backend="native")
    for name in ("labels", "prototypes", "proportions", "inertia", "num_iter"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
        assert torch.equal(getattr(one, name), getattr(again, name)), name


@backends
def test_seed_decides(backend):
    features = torch.randn(300, 10)
    same = [build(features, 8, seed=3, backend=backend).labels for _ in range(2)]
    assert torch.equal(*same)
    torch.manual_seed(11)
    first = build_confounder_dictionary(features, 8, backend=backend)
    second = build_confounder_dictionary(features, 8, backend=backend)
    assert not torch.equal(first.labels, second.labels)


# -- bad input ---------------------------------------------------------------

ROWS = torch.randn(8, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ROWS, 12), ValueError, "num_prototypes=12 must be <= the number of feature rows, 8"),
        ((ROWS, 0), ValueError, "num_prototypes=0 must be at least 1"),
        ((ROWS, -1), ValueError, "num_prototypes=-1"),
        ((ROWS, 2.5), TypeError, "num_prototypes must be an int, got float"),
        ((ROWS, 2, 5), ValueError, "pca_components=5 must be <= the number of feature columns, 4"),
        ((ROWS, 2, 0), ValueError, "pca_components=0 must be at least 1"),
        ((ROWS[0], 1), ValueError, r"features must have shape \[n, d\], got \[4\]"),
        ((ROWS[:0], 1), ValueError, "features must not be empty"),
        ((ROWS[:, :0], 1), ValueError, "features must not be empty"),
        ((ROWS.long(), 2), TypeError, "features must be float32.*got torch.int64"),
        ((ROWS.tolist(), 2), TypeError, "features must be a tensor.*got list"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        build_confounder_dictionary(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"init": "random"}, ValueError, "init='random' must be one of 'greedy', 'plain'"),
        ({"max_iter": 0}, ValueError, "max_iter=0 must be at least 1"),
        ({"tol": -1.0}, ValueError, "tol=-1.0 must be >= 0"),
        ({"tol": float("nan")}, ValueError, "tol=nan must be finite"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"momentum": 1.0}, ValueError, "momentum=1.0 must be >= 0 and < 1"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' must be one of"),
        ({"initial_prototypes": ROWS[:3]}, ValueError, "dimension 0 must be 2"),
        ({"initial_prototypes": ROWS[:2].to("meta")}, ValueError, "is on meta, but features is on"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        build_confounder_dictionary(ROWS, 2, **options)


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_that_are_not_finite(backend, bad, dtype):
    features = torch.randn(20, 5).to(dtype)
    features[13, 2] = bad
    with pytest.raises(ValueError, match="1 of 20 rows hold NaN or Inf, first row 13"):
        build_confounder_dictionary(features, 3, backend=backend)
    unchecked = build_confounder_dictionary(features, 3, check_finite=False, backend=backend)
    assert bool(unchecked.inertia.isnan())


@backends
def test_initial_prototypes_that_are_not_finite(backend):
    start = torch.full((2, 4), float("nan"))
    with pytest.raises(ValueError, match="initial_prototypes must be finite"):
        build_confounder_dictionary(ROWS, 2, initial_prototypes=start, backend=backend)


# -- the framework -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    features = torch.randn(20, 6).to(dtype)
    uniforms = torch.rand(4, 3, dtype=torch.float64)
    operator = torch.ops.kdci_ext.confounder_dictionary.default
    torch.library.opcheck(operator, (features, uniforms, None, 3, 10, 1e-4, 0.9))
    torch.library.opcheck(operator, (features, uniforms, features[:4], 6, 10, 1e-4, 0.9))


@pytest.mark.parametrize(
    ("first", "same_as"), [(math.nan, 0.0), (-1.0, 0.0), (2.0, 0.9999), (math.inf, 0.9999)]
)
def test_any_first_draw_names_a_row(first, same_as):
    """Nothing outside of the rows is read, whatever the operator is given."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=generator)
    found = []
    for value in (first, same_as):
        uniforms = torch.full((4, 3), 0.5, dtype=torch.float64)
        uniforms[0] = value
        arguments = (uniforms, None, 6, 1, 1e-4, 0.0)
        found.append(torch.ops.kdci_ext.confounder_dictionary(features, *arguments)[0])
    assert torch.equal(*found)


def test_compiles_without_graph_breaks():
    @torch.compile(fullgraph=True, dynamic=True)
    def prior(features, uniforms):
        found = torch.ops.kdci_ext.confounder_dictionary(features, uniforms, None, 3, 20, 1e-4, 0.9)
        return found[1] @ found[0]

    for n in (20, 31):
        features = torch.randn(n, 6)
        uniforms = torch.rand(4, 3, dtype=torch.float64)
        # Whatever the clusters, the proportions weigh their means to the mean of all rows.
        torch.testing.assert_close(prior(features, uniforms), features.mean(0))


def test_result_moves_and_describes_itself():
    d = build(torch.randn(20, 6), 4)
    assert (d.num_prototypes, d.num_classes) == (4, 6)
    assert d.to("meta").labels.device.type == "meta"


def test_build_info_names_the_build():
    info = kdci_ext.build_info()
    assert info["simd"] in ("baseline", "avx2", "avx512", "avx512vnni")
    assert info["torch_target"] == "2.10"
    assert info["compiler"]
