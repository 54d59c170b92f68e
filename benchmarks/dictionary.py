# SPDX-License-Identifier: Apache-2.0
"""The whole confounder dictionary beside everybody else's, from the same rows.

For each shape: time, quality of the result, peak memory, and the time that its arithmetic alone
would take at the measured rate of multiply-adds (the floor).
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import memory
from benchmarks.data import teacher_like_logits
from benchmarks.harness import Contender, Timer, measure
from benchmarks.peers import Peer, Problem, Solution
from benchmarks.quality import Judge, mean_and_error
from kdci_ext import build_confounder_dictionary


@dataclass(frozen=True)
class Shape:
    """Rows n, columns d, clusters K, principal components q; and the ratios that we want.

    ``want_best`` is the time of the fastest peer by ours, ``want_sklearn`` that of scikit-learn by
    ours, on one thread and at an inertia and captured variance no worse.
    """

    n: int
    d: int
    k: int
    q: int
    want_best: float
    want_sklearn: float

    @property
    def label(self) -> str:
        """Such as 60kx100x128."""
        n = f"{self.n // 1000}k" if self.n >= 10000 else str(self.n)
        return f"{n}x{self.d}x{self.k}"

    @property
    def large(self) -> bool:
        """Whether a run takes so long that few rounds must do."""
        return self.n >= 10000

    @property
    def projected_mib(self) -> float:
        """Size of the projected rows, [n, q] float32."""
        return self.n * self.q * 4 / 2**20

    @property
    def labels_mib(self) -> float:
        """Size of the labels that are returned, [n] int64."""
        return self.n * 8 / 2**20


SHAPES = (
    Shape(256, 10, 8, 8, 4, 36),
    Shape(256, 100, 8, 32, 4, 15),
    Shape(1024, 200, 32, 64, 4, 10),
    Shape(1000, 1000, 32, 128, 2.5, 2.5),
    Shape(60_000, 100, 128, 32, 2.5, 8),
    Shape(600_000, 10, 128, 8, 6, 22),
    Shape(600_000, 100, 128, 32, 3, 8),
    Shape(100_000, 1000, 128, 128, 3, 4),
)
SEEDING_ROWS = 16384
LLOYD_STEPS = 8
LLOYD_ROUNDS = 9


@dataclass(frozen=True)
class Row:
    """A line of the result file: a peer on a shape. NaN and -1 stand for what is not known.

    Attributes:
        median_ms: Time of a whole dictionary, with its 20th and 80th percentile; ``rounds``,
            ``rejected``, ``noisy`` and ``cores`` are those of :class:`benchmarks.harness.Timing`.
        x_native: The peer's time by the native one's.
        inertia: Mean over seeds of the partition's inertia per row, see
            :mod:`benchmarks.quality`, with the standard error of that mean.
        captured: Fraction of the variance in the peer's subspace.
        seeds: Seeds that the means are over.
        iterations: Mean number of Lloyd iterations.
        memory_mib: Peak memory beyond the input, the result included; ``memory_x`` is what is left
            of it without the labels (8 bytes a row), by the size of the projected rows.
        floor_ms: See :func:`floor_gflop`, for the native number of iterations.
        x_floor: The time by the floor.
        lloyd_ms: An iteration of Lloyd, native alone; ``lloyd_share`` is its share of the peak rate
            of multiply-adds, counting 2 n K q operations whether or not all were made.
        note: Why there is no figure, or what is unusual about it.
    """

    shape: str
    n: int
    d: int
    k: int
    q: int
    peer: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    rejected: int
    noisy: int
    cores: float
    x_native: float
    inertia: float
    inertia_error: float
    captured: float
    seeds: int
    iterations: float
    memory_mib: float
    memory_x: float
    floor_ms: float
    x_floor: float
    lloyd_ms: float
    lloyd_share: float
    note: str


def floor_gflop(shape: Shape, iterations: float) -> float:
    """Count the operations that a dictionary in exact float32 needs, in units of 1e9.

    The covariance, symmetric: n d^2. From d = 100 on, 8 products of it with a block of q + 8
    vectors; below, nothing. The projection: 2 n d q. Greedy k-means++ on 16,384 rows at most, with
    2 + ln K candidates for each centre. ``iterations`` assignments of all rows and a last one,
    2 n K q each, none saved by pruning.
    """
    n, d, k, q = shape.n, shape.d, shape.k, shape.q
    covariance = n * d**2
    subspace = 8 * 2 * d**2 * (q + 8) if d >= 100 else 0
    projection = 2 * n * d * q
    seeding = 2 * k * (2 + int(math.log(k))) * q * min(n, SEEDING_ROWS)
    lloyd = (iterations + 1) * 2 * n * k * q
    return (covariance + subspace + projection + seeding + lloyd) / 1e9


def find_shapes(names: Sequence[str]) -> list[Shape]:
    """Return shapes by their labels.

    Raises:
        ValueError: If there is none of a name.
    """
    known = {shape.label: shape for shape in SHAPES}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown shape {name!r}: expected some of {', '.join(known)}")
    return [known[name] for name in names]


@dataclass(frozen=True)
class Options:
    """How long and how much to measure.

    Attributes:
        seconds: Time for the rounds of a shape.
        min_rounds: Rounds at least, whatever time they take.
        seeds: Seeds that small shapes are run with; large ones have one a round.
        peer_limit: Seconds for one dictionary; a peer that is expected to need more is skipped.
        memory: Which shapes' memory is measured: "large", "all" or "none".
        threads: Threads of every peer.
        device: "cpu" or "cuda".
    """

    seconds: float = 4.0
    min_rounds: int = 3
    seeds: int = 5
    peer_limit: float = 20.0
    memory: str = "large"
    threads: int = 1
    device: str = "cpu"


def bench_shape(
    shape: Shape, peers: Sequence[Peer], options: Options, timer: Timer, peak_gflops: float
) -> list[Row]:
    """Measure the peers on a shape; those that are absent or too slow get a row that says so."""
    features = teacher_like_logits(shape.n, shape.d).to(options.device)
    problem = Problem(features, shape.k, shape.q)
    judge = Judge(problem)
    notes: dict[str, str] = {}
    running: list[Peer] = []
    for peer in peers:
        reason = peer.absent(options.device) or _unfit(peer, problem, shape, options)
        if reason:
            notes[peer.name] = reason
        else:
            running.append(peer)

    inertias: dict[str, dict[int, float]] = {peer.name: {} for peer in running}
    captured: dict[str, float] = {}
    iterations: dict[str, list[int]] = {peer.name: [] for peer in running}

    def collect(name: str, seed: int, result: object) -> None:
        """Judge each seed's result once."""
        if seed in inertias[name]:
            return
        assert isinstance(result, Solution)
        judge.check(result)
        inertias[name][seed] = judge.inertia(result.labels)
        if result.iterations is not None:
            iterations[name].append(int(result.iterations))
        if name not in captured and result.basis is not None:
            captured[name] = judge.captured(result.basis())

    def contender(peer: Peer) -> Contender:
        return Contender(peer.name, lambda seed: peer.solve(problem, seed))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that k-means did not converge in MAX_ITER, for one
        timings = measure(
            [contender(peer) for peer in running],
            timer,
            seconds=options.seconds,
            min_rounds=options.min_rounds,
            seeds=options.min_rounds if shape.large else options.seeds,
            limit_s=options.peer_limit * options.min_rounds,
            collect=collect,
        )
        if not shape.large:
            for peer in running:
                for seed in range(options.seeds):
                    collect(peer.name, seed, peer.solve(problem, seed))
    captured["native"] = judge.captured_by_native()
    memories: dict[str, float] = {}
    remarks: dict[str, list[str]] = {peer.name: [] for peer in running}
    if options.device == "cpu" and options.memory in ("all", "large" if shape.large else "all"):
        for peer in running:
            try:
                memories[peer.name] = memory.peak_mib(
                    *(peer.name, shape.n, shape.d, shape.k, shape.q, options.threads)
                )
            except RuntimeError as error:
                remarks[peer.name].append(f"no memory: {error}")
    lloyd_ms = _lloyd_ms(problem, timer) if shape.large else math.nan
    steps = iterations["native"]
    floor_ms = (
        floor_gflop(shape, sum(steps) / len(steps)) / peak_gflops * 1e3 if steps else math.nan
    )
    native_ms = timings["native"].median_ms

    rows = []
    for peer in peers:
        common = (shape.label, shape.n, shape.d, shape.k, shape.q, peer.name)
        if peer.name in notes:
            rows.append(absent_row(*common, notes[peer.name]))
            continue
        timing = timings[peer.name]
        made = iterations[peer.name]
        mib = memories.get(peer.name, math.nan)
        is_native = peer.name == "native"
        if timing.rounds < options.min_rounds:
            remarks[peer.name].append(
                f"{timing.rounds} of {options.min_rounds} rounds: the limit of time"
            )
        per_iteration = 2e-6 * shape.n * shape.k * shape.q / peak_gflops
        rows.append(
            Row(
                *common,
                *vars(timing).values(),
                timing.median_ms / native_ms,
                *mean_and_error(list(inertias[peer.name].values())),
                captured.get(peer.name, math.nan),
                len(inertias[peer.name]),
                sum(made) / len(made) if made else math.nan,
                *(mib, (mib - shape.labels_mib) / shape.projected_mib),
                *(floor_ms, timing.median_ms / floor_ms),
                lloyd_ms if is_native else math.nan,
                per_iteration / lloyd_ms if is_native else math.nan,
                "; ".join(remarks[peer.name]),
            )
        )
    return rows


def absent_row(label: str, n: int, d: int, k: int, q: int, peer: str, note: str) -> Row:
    """Return the row of a peer that was not measured, with the reason."""
    nan = math.nan
    return Row(
        *(label, n, d, k, q, peer, nan, nan, nan, 0, 0, 0, nan, nan, nan, nan, nan, 0, nan),
        *(nan, nan, nan, nan, nan, nan, note),
    )


def _unfit(peer: Peer, problem: Problem, shape: Shape, options: Options) -> str:
    """Try a peer on few rows and say why it cannot be measured, or would take too long."""
    tiny = Problem(problem.features[:512], 8, min(8, problem.q))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peer.solve(tiny, 0)  # loads libraries and starts threads
        except Exception as error:  # whatever another library raises, the others can be measured
            if peer.name == "native":
                raise
            return " ".join(f"failed: {type(error).__name__}: {error}".split())
        if not shape.large or peer.name == "native":
            return ""
        parts = (shape.n // 32, shape.n // 16)  # fewer would fit in the caches
        taken = []
        for rows in parts:
            part = Problem(problem.features[:rows], problem.k, problem.q)
            start = time.perf_counter()
            peer.solve(part, 0)
            taken.append(time.perf_counter() - start)
    # A line through both: eigenvectors, for one, do not take longer for more rows.
    slope = max(0.0, taken[1] - taken[0]) / (parts[1] - parts[0])
    predicted = taken[1] + slope * (shape.n - parts[1])
    if predicted <= options.peer_limit:
        return ""
    return (
        f"skipped: {predicted:.0f} s expected from {parts[1]} rows, "
        f"the limit is {options.peer_limit:g} s"
    )


def _lloyd_ms(problem: Problem, timer: Timer) -> float:
    """Time an iteration of the native Lloyd alone.

    From fixed prototypes, one iteration and a few more are run: what the runs share, which is all
    but the iterations, cancels in their difference.
    """
    step = len(problem.features) // problem.k
    start = problem.features[::step][: problem.k].clone()
    made: dict[str, int] = {}

    def contender(name: str, steps: int) -> Contender:
        def run(_: int) -> None:
            found = build_confounder_dictionary(
                *(problem.features, problem.k, problem.q),
                initial_prototypes=start,
                max_iter=steps,
                tol=0.0,
            )
            made[name] = int(found.num_iter)

        return Contender(name, run)

    both = [contender("short", 1), contender("long", 1 + LLOYD_STEPS)]
    timings = measure(both, timer, seconds=0, min_rounds=LLOYD_ROUNDS)
    difference = timings["long"].median_ms - timings["short"].median_ms
    return difference / (made["long"] - made["short"])


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table of a shape."""
    first = rows[0]
    print(f"\nn={first.n} d={first.d} K={first.k} q={first.q}")
    print(f"  {'peer':26} {'median ms':>10} {'p20-p80':>17} {'x native':>8} {'x floor':>8} "
          f"{'inertia/row':>16} {'captured':>9} {'iter':>5} {'MiB':>7} {'rounds':>10}")  # fmt: skip
    for row in rows:
        if row.rounds == 0:
            print(f"  {row.peer:26} {row.note}")
            continue
        spread = f"{row.p20_ms:.4g}-{row.p80_ms:.4g}"
        quality = f"{row.inertia:.6g} ± {row.inertia_error:.1g}"
        rounds = f"{row.rounds}" + (f" -{row.rejected}" if row.rejected else "")
        rounds += f" !{row.noisy}" if row.noisy else ""
        print(f"  {row.peer:26} {row.median_ms:10.4g} {spread:>17} {row.x_native:8.2f} "
              f"{row.x_floor:8.2f} {quality:>16} {row.captured:9.5f} {row.iterations:5.1f} "
              f"{row.memory_mib:7.1f} {rounds:>10}  {row.note}")  # fmt: skip
    sys.stdout.flush()


def find_best(rows: Sequence[Row]) -> Row | None:
    """Return the fastest peer of a shape, or None where native ran alone."""
    others = [row for row in rows if row.peer != "native" and row.rounds > 0]
    return min(others, key=lambda row: row.median_ms, default=None)


def is_no_worse(native: Row, peer: Row) -> bool:
    """Whether native's inertia is at most the peer's, or within two standard errors of it.

    Captured variance is held to four digits: peers that approximate differ beyond them.
    """
    errors = [0.0 if math.isnan(r.inertia_error) else r.inertia_error for r in (native, peer)]
    captured = math.isnan(peer.captured) or native.captured >= peer.captured * (1 - 1e-4)
    return captured and native.inertia <= peer.inertia + 2 * math.hypot(*errors)


def summarize(rows: Sequence[Row]) -> list[str]:
    """Say for each shape what was wanted and what was found, a line each."""
    lines = []
    for shape in SHAPES:
        here = [row for row in rows if row.shape == shape.label]
        native = next((row for row in here if row.peer == "native"), None)
        if native is None:
            continue
        best = find_best(here)
        sklearn = next((r for r in here if r.peer == "scikit-learn" and r.rounds > 0), None)
        parts = []
        if best is not None:
            parts.append(_against(f"best ({best.peer})", native, best, shape.want_best))
        if sklearn is not None:
            parts.append(_against("scikit-learn", native, sklearn, shape.want_sklearn))
        if shape.n >= 1000:
            parts.append(f"floor x{native.x_floor:.2f} (<= 2) {_verdict(native.x_floor <= 2)}")
        if not math.isnan(native.lloyd_share):
            share = native.lloyd_share
            parts.append(f"Lloyd at {share:.2f} of peak (>= 0.85) {_verdict(share >= 0.85)}")
        if not math.isnan(native.memory_x) and shape.large:
            size = native.memory_x
            parts.append(f"extra memory x{size:.2f} (<= 1.15) {_verdict(size <= 1.15)}")
        lines.append(f"{shape.label:14} " + "; ".join(parts))
    return lines


def _against(name: str, native: Row, peer: Row, wanted: float) -> str:
    quality = (
        "inertia no worse"
        if is_no_worse(native, peer)
        else (
            f"but inertia {native.inertia / peer.inertia - 1:+.2%}, "
            f"variance {native.captured - peer.captured:+.5f}"
        )
    )
    reached = peer.x_native >= wanted and is_no_worse(native, peer)
    return f"{name} x{peer.x_native:.2f} (>= {wanted:g}), {quality} {_verdict(reached)}"


def _verdict(reached: bool) -> str:
    return "[yes]" if reached else "[no]"


def packages(peers: Sequence[Peer]) -> list[str]:
    """Return the distributions whose versions matter."""
    return list(dict.fromkeys(package for peer in peers for package in peer.packages))
