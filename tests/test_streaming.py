"""Streaming and sharded dictionaries: cuts, orders and shards must not show in the result."""

from __future__ import annotations

import functools
import itertools
import operator
import weakref

import numpy as np
import pytest
import sharded
import torch
from dictionaries import BACKENDS, assert_same_partition, backends, clusters, inertia_of
from hypothesis import given
from hypothesis import strategies as st
from sharded import mixture
from strategies import DTYPES, feature_rows
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, TensorDataset

from kdci_ext import (
    ConfounderDictionary,
    build_confounder_dictionary,
    reference,
    stream_confounder_dictionary,
)
from kdci_ext._blocks import RowSample
from kdci_ext.sums import PartialSums, column_moments, partial_sums

WIDE = (torch.float32, torch.float64)


def stream(source, num_prototypes: int, seed: int = 0, **options) -> ConfounderDictionary:
    generator = torch.Generator().manual_seed(seed)
    return stream_confounder_dictionary(source, num_prototypes, generator=generator, **options)


def assert_equal(one: ConfounderDictionary, other: ConfounderDictionary) -> None:
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(other, name)), name


@st.composite
def cuts(draw: st.DrawFn, n: int, most: int = 5) -> list[int]:
    """Sizes, some of them 0, that add up to n."""
    edges = sorted(draw(st.lists(st.integers(0, n), max_size=most)))
    return [b - a for a, b in itertools.pairwise([0, *edges, n])]


# -- one result, however the rows come ----------------------------------------


@given(feature_rows(), st.data())
def test_cuts_change_no_bit(features, data):
    """Chunks of any sizes, empty ones too, give bitwise the dictionary of the whole tensor."""
    n = len(features)
    sizes = data.draw(cuts(n))
    num_prototypes = data.draw(st.integers(1, min(n, 12)))
    options = {"chunk_rows": data.draw(st.integers(1, 80)), "sample_rows": 32}
    whole = stream(features, num_prototypes, **options)
    assert_equal(stream(features.split(sizes), num_prototypes, **options), whole)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", ">f4"])
def test_sources_of_all_kinds_agree(tmp_path, dtype):
    """A memmap, opened read-only, arrays, a list, a DataLoader of (features, target) batches, a
    function and the tensor itself.
    """
    array = mixture(300, 6).numpy().astype(dtype)
    np.save(tmp_path / "rows.npy", array)
    memmap = np.load(tmp_path / "rows.npy", mmap_mode="r")
    rows = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    loader = DataLoader(TensorDataset(rows, torch.arange(300)), batch_size=37)
    options = {"chunk_rows": 50, "sample_rows": 80}
    expected = stream(rows, 7, **options)
    for source in (
        memmap,
        array,
        np.array_split(memmap, 4),
        list(rows.split(64)),
        loader,
        lambda: iter(rows.split(11)),
    ):
        assert_equal(stream(source, 7, **options), expected)


@given(feature_rows(), st.data())
def test_block_size_shows_in_rounding_alone(features, data):
    """Blocks of other sizes add the same float64 numbers in another order."""
    n, d = features.shape
    num_prototypes = data.draw(st.integers(1, min(n, 8)))
    start = features[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    options = {
        "initial_prototypes": start[:num_prototypes],
        "pca_components": d,
        "backend": data.draw(st.sampled_from(BACKENDS)),
    }
    one, other = (
        stream(features, num_prototypes, chunk_rows=data.draw(st.integers(1, 80)), **options)
        for _ in range(2)
    )
    assert torch.equal(one.labels, other.labels)
    scale = float(features.abs().max())
    for name in ("prototypes", "proportions"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-14 * scale
        )
    # In float32 a last digit of the mean may show.
    digits = 1e-6 if options["backend"] == "native" else 1e-12
    assert float(one.inertia) == pytest.approx(
        float(other.inertia), rel=digits, abs=digits**2 * n * scale**2
    )


@pytest.mark.parametrize("chunk_rows", [1, 17, 100, 8192])
def test_block_size_leaves_separated_clusters(chunk_rows):
    features, members = clusters()
    d = stream(features, 3, chunk_rows=chunk_rows, sample_rows=40)
    assert_same_partition(d.labels, members)


def test_memory_holds_one_chunk():
    """Each chunk is given up before the next one is asked for."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def chunks():
        nonlocal most
        for number in range(12):
            assert len(alive) == 0
            chunk = mixture(50, 4, seed=number)
            alive.add(chunk)
            most = max(most, len(alive))
            yield chunk
            del chunk

    d = stream(chunks, 5, chunk_rows=70, sample_rows=64)
    assert len(d.labels) == 600
    assert most == 1


# -- against the dictionary of rows in memory ---------------------------------


@given(feature_rows(WIDE), st.data())
def test_same_start_gives_the_result_in_memory(features, data):
    """From equal prototypes the iterations lead where those of the reference lead. Among duplicates
    a surplus centre may win a row by rounding there: compare what each row is assigned.
    """
    n, d = features.shape
    features = features.double()
    num_prototypes = data.draw(st.integers(1, min(n, 10)))
    components = data.draw(st.sampled_from([1, max(1, d - 1), d]))
    # Means of rows: outside the rows' span directions without variance, which are arbitrary, count.
    weights = torch.softmax(2 * mixture(num_prototypes, n).double(), 1)
    options = {"initial_prototypes": weights @ features, "pca_components": components}
    exact = build_confounder_dictionary(features, num_prototypes, backend="reference", **options)
    backend = data.draw(st.sampled_from(BACKENDS))
    got = stream(features, num_prototypes, chunk_rows=30, backend=backend, **options)
    scale = float(features.abs().max())
    torch.testing.assert_close(
        got.prototypes[got.labels], exact.prototypes[exact.labels], rtol=1e-9, atol=1e-12 * scale
    )
    assert float(got.inertia) == pytest.approx(
        float(exact.inertia), rel=1e-9, abs=1e-22 * n * scale**2
    )


@backends
def test_iterations_are_those_in_memory(backend):
    features = mixture(500, 6)
    options = {"initial_prototypes": features[:9], "backend": backend}
    exact = build_confounder_dictionary(features, 9, **options)
    got = stream(features, 9, chunk_rows=64, **options)
    assert torch.equal(got.labels, exact.labels)
    assert 2 < int(got.num_iter) == int(exact.num_iter)
    torch.testing.assert_close(got.inertia, exact.inertia, rtol=1e-6, atol=0)


def test_seeding_on_a_sample_is_as_good():
    """Over seeds the mean inertia is that of k-means++ on all rows, to 3 %."""
    features = mixture(4000, 8)
    ours = [float(stream(features, 12, seed, sample_rows=400).inertia) for seed in range(8)]
    theirs = [
        float(
            build_confounder_dictionary(
                features, 12, generator=torch.Generator().manual_seed(seed)
            ).inertia
        )
        for seed in range(8)
    ]
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.03)


@given(feature_rows(), st.data())
def test_returned_quantities_agree_with_each_other(features, data):
    """Whatever the input: proportions are the labels' frequencies, prototypes the means of the
    original rows, inertia the distances by definition, and all is finite.
    """
    n, d = features.shape
    num_prototypes = data.draw(st.integers(1, min(n, 20)))
    got = stream(
        *(features, num_prototypes),
        pca_components=d,
        tol=0.0,
        max_iter=300,
        chunk_rows=data.draw(st.integers(1, 80)),
        sample_rows=data.draw(st.integers(num_prototypes, 80)),
        backend=data.draw(st.sampled_from(BACKENDS)),
    )
    rows = features.double()
    counts = torch.bincount(got.labels, minlength=num_prototypes)
    assert int(got.labels.min()) >= 0
    torch.testing.assert_close(got.proportions.double(), counts.double() / n, rtol=1e-6, atol=0)
    scale = float(rows.abs().max())
    for i in range(num_prototypes):
        expected = rows[got.labels == i].mean(0) if counts[i] > 0 else rows.mean(0)
        torch.testing.assert_close(
            got.prototypes[i].double(), expected, rtol=1e-6, atol=1e-7 * scale
        )
    # In float32 the centred rows are rounded once, which distances between duplicates show.
    assert float(got.inertia) == pytest.approx(
        inertia_of(rows, got.labels), rel=1e-4, abs=1e-10 * n * scale**2
    )


# -- the laws at the edges -----------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_fewer_distinct_rows_than_prototypes(backend, dtype):
    """Surplus prototypes have proportion 0 and finite values; the rest are the distinct rows."""
    distinct = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25]], dtype=dtype)
    d = stream(distinct[torch.arange(30) % 3], 7, chunk_rows=8, backend=backend)
    used = d.proportions > 0
    assert int(used.sum()) == 3
    assert float(d.inertia) == 0.0
    assert sorted(d.prototypes[used].tolist()) == sorted(distinct.tolist())
    torch.testing.assert_close(d.prototypes[~used][0], distinct.to(d.prototypes.dtype).mean(0))


@backends
def test_empty_cluster_is_reseeded_at_the_farthest_row(backend):
    """A starting centre that wins no row takes the farthest one, from whatever block it comes."""
    features = torch.tensor([[-3.0], [-2.5], [-2.0], [2.0], [2.1], [9.0]])
    start = torch.tensor([[-2.5], [2.0], [1000.0]])
    for chunk_rows in (1, 2, 5, 10):
        d = stream(
            *(features, 3),
            initial_prototypes=start,
            tol=0.0,
            chunk_rows=chunk_rows,
            backend=backend,
        )
        assert d.labels.tolist() == [0, 0, 0, 1, 1, 2]


@backends
def test_equally_near_prototypes_give_the_lowest_index(backend):
    """Also where the product's rounding would tell them apart: far from the mean."""
    features = torch.tensor([[1e6, 0.1], [-1e6, 0.1], [1e6, 0.3], [-1e6, 0.3]])
    start = features[[0, 0, 1, 1]].clone()
    subspace = column_moments(features).principal_subspace(2)
    sums, labels = partial_sums(features, start, subspace, backend=backend)
    assert labels.tolist() == [0, 2, 0, 2]
    assert sums.counts.tolist() == [2, 0, 2, 0]


@backends
def test_clusters_closer_than_the_product_resolves(backend):
    """Of prototypes 1e-7 apart, in rows of size 1, each row takes its own."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    features = features + 1e-7 * torch.randn(20, 5, generator=generator, dtype=torch.float64)
    features = torch.cat([features, -features])
    subspace = column_moments(features).principal_subspace(5)
    _, labels = partial_sums(features, features, subspace, backend=backend)
    assert labels.tolist() == list(range(40))


@backends
def test_as_many_prototypes_as_rows(backend):
    features = torch.randn(9, 4)
    d = stream(features, 9, chunk_rows=4, backend=backend)
    assert sorted(d.labels.tolist()) == list(range(9))
    assert float(d.inertia) == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(d.prototypes[d.labels], features)


@backends
def test_one_prototype_is_the_mean(backend):
    features = torch.randn(50, 6) + 100
    d = stream(features, 1, chunk_rows=7, backend=backend)
    torch.testing.assert_close(d.prototypes[0], features.mean(0))
    assert d.proportions.tolist() == [1.0]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("pca_components", ["auto", 6])
@backends
def test_scale_does_not_matter(scale, pca_components, backend):
    features, members = clusters()
    options = {"pca_components": pca_components, "chunk_rows": 20, "sample_rows": 50}
    d = stream(features * scale, 3, backend=backend, **options)
    assert_same_partition(d.labels, members)
    assert bool(torch.isfinite(d.prototypes).all())


@backends
def test_one_column_and_a_constant_one(backend):
    features = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    start = torch.tensor([[0.0], [11.0]])
    d = stream(features, 2, initial_prototypes=start, chunk_rows=3, backend=backend)
    assert (d.labels.tolist(), d.prototypes.tolist()) == ([0, 0, 1, 1], [[0.5], [10.5]])
    assert float(d.inertia) == 1.0
    wider = torch.cat([features, torch.full((4, 1), 7.0)], 1)
    assert_same_partition(stream(wider, 2, chunk_rows=3, backend=backend).labels, d.labels)


def test_seed_decides_and_leaves_the_input_alone():
    features = mixture(300, 6)
    before = features.clone()
    first, again, other = (stream(features, 8, seed, sample_rows=50) for seed in (3, 3, 4))
    assert_equal(first, again)
    assert not torch.equal(first.labels, other.labels)
    assert torch.equal(features, before)


# -- the operator --------------------------------------------------------------


@given(feature_rows(), st.data())
def test_operator_matches_the_reference(features, data):
    """No row is farther from the centre it is given than from its nearest, but for rounding; the
    distances are those to that centre, the sums those of the labels.
    """
    n, d = features.shape
    subspace = column_moments(features).principal_subspace(data.draw(st.integers(1, d)))
    num_centers = data.draw(st.integers(1, 20))
    centers = mixture(num_centers, d).double() * features.double().std(correction=0)
    centers = centers if subspace.basis is None else centers @ subspace.basis
    inputs = (features, subspace.mean, subspace.basis, centers)
    labels, distances, sums = torch.ops.kdci_ext.assign_rows(*inputs)
    _, nearest, _ = reference.assign_rows(*inputs)

    exact = (subspace.project(features) - centers[labels]).square().sum(1)
    scale = float(features.abs().max())
    slack = {"rtol": 1e-5, "atol": 2e-5 * scale * d**0.5}
    torch.testing.assert_close(distances.sqrt(), exact.sqrt(), **slack)
    torch.testing.assert_close(distances.sqrt(), nearest.sqrt(), **slack)
    expected = sums.new_zeros(sums.shape).index_add_(0, labels, features.double())
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-14 * n * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("components", [3, 6])
def test_opcheck(dtype, components):
    rows = torch.randn(20, 6).to(dtype)
    subspace = column_moments(rows).principal_subspace(components)
    centers = subspace.project(rows[:4])
    operator = torch.ops.kdci_ext.assign_rows.default
    torch.library.opcheck(operator, (rows, subspace.mean, subspace.basis, centers))
    torch.library.opcheck(operator, (rows[:0], subspace.mean, subspace.basis, centers))


@pytest.mark.parametrize(("n", "d", "k"), [(1000, 10, 8), (5000, 200, 16)])
def test_threads_and_repeats_change_no_bit(two_threads, n, d, k):
    features = torch.randn(n, d)
    one, two = two_threads(lambda: stream(features, k, chunk_rows=3000, sample_rows=500))
    assert_equal(one, two)
    assert_equal(one, stream(features, k, chunk_rows=3000, sample_rows=500))


@pytest.mark.parametrize("dtype", WIDE)
def test_a_constant_column_may_be_of_any_size(dtype):
    """The other columns keep their clusters; where their scale is out of range all is finite."""
    features, members = clusters()
    features = torch.cat([features, torch.full((90, 1), 1e15)], 1).to(dtype)
    d = stream(features, 3, chunk_rows=32, pca_components=7, backend="native")
    assert_same_partition(d.labels, members)
    features = torch.cat([features * 1e-30, torch.full((90, 1), 1e30)], 1)
    start = features[:3]
    d = stream(features, 3, initial_prototypes=start, pca_components=8, backend="native")
    assert bool(torch.isfinite(d.prototypes).all())
    assert bool(torch.isfinite(d.inertia))


# -- the sample ----------------------------------------------------------------


@given(st.data())
def test_sample_does_not_depend_on_the_blocks(data):
    n, size = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 70))
    rows = torch.arange(n)[:, None].float()
    whole, pieces = RowSample(size, 5), RowSample(size, 5)
    whole.add(rows)
    for piece in rows.split(data.draw(st.integers(1, 60))):
        pieces.add(piece)
    assert torch.equal(whole.rows, pieces.rows)
    chosen = whole.rows[:, 0].tolist()
    assert len(chosen) == min(n, size)
    assert chosen == sorted(set(chosen))


def test_sample_takes_every_row_as_often():
    """Over 1500 draws of 4 of 12 rows each row is chosen 500 times, to 4 standard deviations."""
    counts = torch.zeros(12)
    for seed in range(1500):
        sample = RowSample(4, seed)
        for piece in torch.arange(12)[:, None].split(5):
            sample.add(piece)
        counts[sample.rows[:, 0]] += 1
    assert bool(((counts - 500).abs() < 4 * (1500 * (1 / 3) * (2 / 3)) ** 0.5).all())


# -- shards --------------------------------------------------------------------


def assert_same_sums(got: PartialSums, whole: PartialSums, features: Tensor) -> None:
    """Equal up to rounding; where rows are equally far, others of them may be kept."""
    scale, n = float(features.abs().max()), len(features)
    assert torch.equal(got.counts, whole.counts)
    torch.testing.assert_close(got.sums, whole.sums, rtol=0, atol=1e-14 * n * scale)
    for name in ("inertia", "far_distances"):
        torch.testing.assert_close(
            getattr(got, name), getattr(whole, name), rtol=1e-12, atol=1e-24 * n * scale**2
        )


@given(feature_rows(), st.data())
def test_shards_agree_with_the_whole(features, data):
    """Moments and sums of any shards, some of them empty, in any order add up to those of all
    rows, and lead to the same next prototypes.
    """
    n, d = features.shape
    sizes = data.draw(cuts(n))
    order = data.draw(st.permutations(range(len(sizes))))
    shards = [features.split(sizes)[i] for i in order]
    scale = float(features.abs().max()) or 1.0

    moments = functools.reduce(operator.add, map(column_moments, shards))
    whole = column_moments(features)
    assert torch.equal(moments.count, whole.count)
    torch.testing.assert_close(moments.mean, whole.mean, rtol=0, atol=1e-14 * scale)
    torch.testing.assert_close(
        moments.scatter, whole.scatter, rtol=1e-12, atol=1e-14 * n * scale**2
    )

    num_prototypes = data.draw(st.integers(1, 12))
    prototypes = mixture(num_prototypes, d).double() * features.double().std(correction=0)
    subspace = whole.principal_subspace(data.draw(st.sampled_from([1, d])))
    backend = data.draw(st.sampled_from(BACKENDS))
    parts = [partial_sums(shard, prototypes, subspace, backend=backend) for shard in shards]
    total = functools.reduce(operator.add, [sums for sums, _ in parts])
    expected, labels = partial_sums(features, prototypes, subspace, backend=backend)
    assert_same_sums(total, expected, features)
    joined = torch.empty_like(labels)
    for index, (_, part) in zip(order, parts, strict=True):
        joined.split(sizes)[index].copy_(part)
    assert torch.equal(joined, labels)


def test_moments_keep_their_digits_far_from_zero():
    """Sums of squares would lose all digits of a variance of 1 beside a mean of 1e8."""
    rows = torch.randn(400, 3, dtype=torch.float64)
    moments = functools.reduce(operator.add, map(column_moments, (rows + 1e8).split(7)))
    torch.testing.assert_close(moments.scatter / 400, rows.T.cov(correction=0), rtol=1e-6, atol=0)


def test_subspace_holds_the_leading_variance():
    features = mixture(200, 6).double()
    subspace = column_moments(features).principal_subspace(2)
    points = subspace.project(features)
    values = torch.linalg.eigvalsh(features.T.cov(correction=0))
    torch.testing.assert_close(points.var(0, correction=0), values[-2:])
    torch.testing.assert_close(subspace.variance, values[-2:].mean())


def test_two_processes_make_the_dictionary_of_the_whole(tmp_path):
    """With torch.distributed (gloo): both processes end with the same bits, and, to rounding,
    with what one process makes of all rows. One prototype starts empty and takes a row of whichever
    process has the farthest.
    """
    features = mixture(200, 6)
    start = features[:6].double()
    start[5] = 1e3
    torch.save((features, start), tmp_path / "rows.pt")
    multiprocessing.spawn(sharded.process, (str(tmp_path),), nprocs=2)
    (one, sums), (other, other_sums) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    whole, total = sharded.dictionary_of_shard(features, start, lambda part: part)
    assert torch.equal(one, other)
    assert all(torch.equal(sums[name], other_sums[name]) for name in sums)
    torch.testing.assert_close(one, whole, rtol=1e-9, atol=1e-12)
    assert_same_sums(PartialSums(**sums), total, features)
    torch.testing.assert_close(sums["far_rows"], total.far_rows)
    assert bool((total.counts > 0).all())


# -- bad input -----------------------------------------------------------------

ROWS = torch.randn(8, 4)
MANY = torch.randn(80, 4)


def _with(row: int, value: float) -> Tensor:
    rows = torch.randn(20, 4)
    rows[row, 1] = value
    return rows


def _read_once():
    chunks = iter(ROWS.split(3))
    return lambda: chunks


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ((chunk for chunk in ROWS.split(3)), TypeError, "generator, which can be read only once"),
        (_read_once(), ValueError, "source is empty when it is read again.*new iterator"),
        ([], ValueError, "source is empty"),
        ([ROWS[:0]], ValueError, "source is empty"),
        (ROWS[:0], ValueError, "source is empty"),
        (ROWS[:, :0], ValueError, r"source must have columns, got shape \[8, 0\]"),
        (ROWS[0], ValueError, r"source must have shape \[n, d\], got \[4\]"),
        ([ROWS, ROWS[0]], ValueError, r"source\[1\] must have shape \[m, d\], got \[4\]"),
        ([ROWS, ROWS[:, :3]], ValueError, r"from row 8 on they are \[m, 3\].*before \[m, 4\]"),
        ([ROWS, ROWS.double()], ValueError, "one width and type: from row 8 on.*float64"),
        ([ROWS.long()], TypeError, r"source\[0\] must be float32.*got torch.int64"),
        (np.ones((4, 2), dtype=object), TypeError, "source must hold floating numbers, got object"),
        (ROWS.tolist(), TypeError, r"source\[0\] must be a tensor or array.*got float"),
        ([{"x": ROWS}], TypeError, r"source\[0\] must be a tensor or array.*got dict"),
        (3, TypeError, "source must be a tensor or array.*got int"),
        (TensorDataset(ROWS), TypeError, "wrap a dataset in a DataLoader"),
        (_with(13, float("nan")), ValueError, "source must be finite: row 13 holds NaN or Inf"),
        ([ROWS, _with(5, -float("inf"))], ValueError, "row 13 holds NaN or Inf"),
        (ROWS[:2], ValueError, "num_prototypes=3 must be <= the number of rows, 2"),
        (ROWS.double() * 1e200, ValueError, "too large: sums of their squares overflow"),
    ],
)
def test_bad_sources_are_named(source, error, message):
    with pytest.raises(error, match=message):
        stream(source, 3, chunk_rows=6)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([MANY, MANY[:77]], "80 rows in the first pass, 77 in a later one"),
        ([MANY, torch.cat([MANY, ROWS])], "80 rows in the first pass, more in a later one"),
        ([MANY, MANY.flip(0)], "the first rows are not those of the first pass"),
        ([ROWS, ROWS[:7]], "the first rows are not those of the first pass"),
    ],
)
def test_source_that_changes_between_passes(passes, message):
    remaining = iter(passes)
    with pytest.raises(ValueError, match=message):
        stream(lambda: [next(remaining)], 3)


def test_shuffling_loader_is_noticed():
    """Labels would belong to no row: every pass sees another order."""
    loader = DataLoader(TensorDataset(torch.randn(200, 4)), batch_size=50, shuffle=True)
    with pytest.raises(ValueError, match="switch off shuffling"):
        stream(loader, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_prototypes": 0}, ValueError, "num_prototypes=0 must be at least 1"),
        ({"pca_components": 5}, ValueError, "pca_components=5 must be <=.*columns, 4"),
        ({"init": "random"}, ValueError, "init='random' must be one of 'greedy', 'plain'"),
        ({"max_iter": 0}, ValueError, "max_iter=0 must be at least 1"),
        ({"tol": -1.0}, ValueError, "tol=-1.0 must be >= 0"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows=0 must be at least 1"),
        ({"sample_rows": 2}, ValueError, "sample_rows=2 must be >= num_prototypes, 3"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' must be one of"),
        ({"initial_prototypes": ROWS[:2]}, ValueError, "dimension 0 must be 3"),
        ({"initial_prototypes": ROWS[:3, :2]}, ValueError, "dimension 1 must be 4"),
        ({"initial_prototypes": ROWS[:3] / 0}, ValueError, "initial_prototypes must be finite"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        stream(ROWS, **{"num_prototypes": 3, **options})


def test_a_seed_is_no_generator():
    with pytest.raises(TypeError, match=r"must be a torch\.Generator or None, got int"):
        stream_confounder_dictionary(ROWS, 3, generator=0)


def test_bad_shards_are_named():
    subspace = column_moments(ROWS).principal_subspace(2)
    with pytest.raises(ValueError, match="the moments are of no rows"):
        column_moments(ROWS[:0]).principal_subspace(2)
    with pytest.raises(ValueError, match="num_components=5 must be <="):
        column_moments(ROWS).principal_subspace(5)
    with pytest.raises(ValueError, match=r"features must have shape \[m, d\]"):
        partial_sums(ROWS[0], ROWS[:2], subspace)
    with pytest.raises(TypeError, match="subspace must be a PrincipalSubspace, got Tensor"):
        partial_sums(ROWS, ROWS[:2], ROWS.mean(0))
    with pytest.raises(ValueError, match=r"prototypes has shape \[3, 4\].* 2, the number of cl"):
        partial_sums(ROWS, ROWS[:2], subspace)[0].means(ROWS[:3])
    with pytest.raises(ValueError, match=r"prototypes has shape.*dimension 1 must be 4"):
        partial_sums(ROWS, ROWS[:2, :3], subspace)
    with pytest.raises(ValueError, match="prototypes must not be empty"):
        partial_sums(ROWS, ROWS[:0], subspace)
    with pytest.raises(ValueError, match=r"subspace.mean has shape \[4\]"):
        partial_sums(ROWS[:, :3], ROWS[:2, :3], subspace)
